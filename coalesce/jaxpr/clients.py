"""A second client of a device, and arrays in it of memory that it has not allocated.

JAX has one client for each platform, which allocates what programs need where something was free. jaxlib makes others,
each with memory of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_uint8, c_uint16, c_uint64, c_void_p, POINTER
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jaxlib import xla_client

try:
    from jaxlib._jax import dlpack_managed_tensor_to_buffer as from_dlpack  # pyright: ignore
except ImportError:  # of some other jaxlib: whoever asks is told
    from_dlpack: Any = None

CUDA = 2  # kDLCUDA
KINDS = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}  # DLPack's, by NumPy's
BFLOAT = 4
NAME = b"dltensor"  # of a capsule, which points to it


def second_client(device: Any) -> Any:
    """Another client of jaxlib for one NVIDIA GPU of JAX's, which takes memory as it needs it."""
    options = dict(xla_client.generate_pjrt_gpu_plugin_options())
    options |= {"preallocate": False, "allocator": "bfc", "visible_devices": [device.local_hardware_id]}
    return xla_client.make_c_api_client("cuda", options, None)


def loaded_at(compiled: Any, device: Any) -> Any:
    """JAX's Compiled for a device of another client."""
    return deserialize_and_load(*serialize(compiled), backend=device.client, execution_devices=[device])


class Tensor(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (
        ("data", c_void_p),
        ("device_type", c_int),
        ("device_id", c_int),
        ("ndim", c_int),
        ("kind", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", c_void_p),
        ("offset", c_uint64),
        ("context", c_void_p),
        ("deleter", c_void_p),
    )


described: dict[int, Any] = {}  # by address, what jaxlib still looks at


@ctypes.CFUNCTYPE(None, c_void_p)
def forget(tensor: int, known: dict[int, Any] = described) -> None:
    """Also when the interpreter ends, and names of modules are gone."""
    known.pop(tensor, None)


Capsule = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, ctypes.c_char_p, c_void_p)
new_capsule = Capsule(("PyCapsule_New", ctypes.pythonapi))


def view_at(address: int, shape: Sequence[int], dtype: Any, device: Any) -> jax.Array:
    """An array on a CUDA device of that client: whatever lies there, row after row. Nobody else is told of it, and it
    holds nothing: who frees the memory, or writes to it, has to know.

    Raises:
      TypeError: DLPack has no word for the dtype.
    """
    kind, bits = kind_of(dtype)
    sizes = (c_int64 * len(shape))(*shape)
    tensor = Tensor(address, CUDA, device.local_hardware_id or 0, len(shape), kind, bits, 1, sizes, None, 0, None, None)
    tensor.deleter = ctypes.cast(forget, c_void_p).value
    at = ctypes.addressof(tensor)
    described[at] = tensor, sizes
    capsule = new_capsule(at, NAME, None)
    return from_dlpack(capsule, device, device.get_stream_for_external_ready_events())


def kind_of(dtype: Any) -> tuple[int, int]:
    """DLPack's code, and the bits of a number."""
    dtype = np.dtype(dtype)
    if dtype == jnp.bfloat16:
        return BFLOAT, 16
    if dtype.kind not in KINDS:
        raise TypeError(f"DLPack has no word for {dtype.name}")
    return KINDS[dtype.kind], 8 * dtype.itemsize
