"""Bringing an array to a device without finding out anew what there is to do."""

from __future__ import annotations

from typing import Any

from jaxlib import xla_client

# Called with (the abstract value of what is there then, its sharding, [array], [device]); None where jaxlib has no such
# call.
batched_device_put: Any = getattr(xla_client, "batched_device_put", None)
