"""PRNG keys, which are staged as their key data."""

from __future__ import annotations

from typing import Any

import jax


def key_struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def key_layout(aval: Any) -> tuple[Any, jax.ShapeDtypeStruct]:
    """(the key implementation, the struct of the key data) of a typed key array."""
    impl: list[Any] = []

    def data(key: jax.Array) -> jax.Array:
        impl.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    struct = jax.eval_shape(data, key_struct(aval))
    return impl[0], jax.ShapeDtypeStruct(struct.shape, struct.dtype)
