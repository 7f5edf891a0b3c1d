"""Arrays of any dtypes as 32-bit words, side by side in one buffer: inside a program, and on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD = np.dtype(np.uint32)


def nbytes(part: jax.ShapeDtypeStruct) -> int:
    return part.size * part.dtype.itemsize


def words(part: jax.ShapeDtypeStruct) -> int:
    return -(-nbytes(part) // WORD.itemsize)


def can_pack(structs: Sequence[jax.ShapeDtypeStruct]) -> bool:
    """Whether all of them can be made of words: none is complex, or of less than a byte."""
    return not any(jnp.issubdtype(s.dtype, jnp.complexfloating) or is_narrow(s.dtype) for s in structs)


def is_narrow(dtype: Any) -> bool:
    if not jnp.issubdtype(dtype, jnp.number):
        return False
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
    return info.bits < 8


def from_words(x: Any, part: jax.ShapeDtypeStruct) -> Any:
    """Inside a program: an array out of the words that hold its bytes."""
    dtype = in_bytes(part)
    if dtype.itemsize > WORD.itemsize:
        x = x.reshape(-1, dtype.itemsize // WORD.itemsize)
    x = lax.bitcast_convert_type(x, dtype).reshape(-1)[: part.size].reshape(part.shape)
    return x != 0 if part.dtype == np.bool_ else x


def to_words(x: Any, part: jax.ShapeDtypeStruct) -> Any:
    """Inside a program: the words that hold an array's bytes."""
    dtype = in_bytes(part)
    x = x.astype(dtype).reshape(-1)
    if dtype.itemsize < WORD.itemsize:
        each = WORD.itemsize // dtype.itemsize
        x = lax.pad(x, jnp.zeros((), dtype), [(0, words(part) * each - part.size, 0)]).reshape(-1, each)
    return lax.bitcast_convert_type(x, WORD).reshape(-1)


def in_bytes(part: jax.ShapeDtypeStruct) -> np.dtype:
    return jnp.dtype(jnp.uint8 if part.dtype == np.bool_ else part.dtype)


def views(buffer: np.ndarray, parts: Sequence[jax.ShapeDtypeStruct]) -> list[np.ndarray]:
    """On the host: arrays one after another in a buffer."""
    found, start = [], 0
    for part in parts:
        place = buffer[start : start + words(part)]
        found.append(place.view(np.uint8)[: nbytes(part)].view(part.dtype).reshape(part.shape))
        start += words(part)
    return found
