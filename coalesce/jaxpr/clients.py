"""A second client of a device, and arrays of the first one in it.

JAX has one client for each platform, which allocates what programs need where something was free. jaxlib makes others,
each with memory of its own.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jaxlib import xla_client

try:  # where it is in jaxlib 0.10 and newer
    from jaxlib._jax import dlpack_managed_tensor_to_buffer as from_dlpack  # pyright: ignore
except ImportError:
    from_dlpack: Any = None


def second_client(device: Any) -> Any:
    """Another client of jaxlib for one NVIDIA GPU of JAX's, which takes memory as it needs it."""
    options = dict(xla_client.generate_pjrt_gpu_plugin_options())
    options |= {"preallocate": False, "allocator": "bfc", "visible_devices": [device.local_hardware_id]}
    return xla_client.make_c_api_client("cuda", options, None)


def view_at(x: jax.Array, device: Any) -> jax.Array:
    """An array on the same GPU as another client's device sees it: the same memory, which lives as long as either."""
    return from_dlpack(x.__dlpack__(), device, device.get_stream_for_external_ready_events())


def loaded_at(compiled: Any, device: Any) -> Any:
    """JAX's Compiled for a device of another client."""
    return deserialize_and_load(*serialize(compiled), backend=device.client, execution_devices=[device])
