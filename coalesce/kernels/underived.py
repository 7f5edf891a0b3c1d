"""A kernel that has no derivative says so, and what to do: Pallas would stop with an assertion of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from coalesce.errors import PlanError


def underived(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function of arrays, which refuses to be differentiated; under `jit` or `vmap` it is what it was."""
    own = jax.custom_jvp(run)

    def refuse(primals: Any, tangents: Any) -> Any:
        raise PlanError(
            f"kernel {name} of a fused program has no derivative; to differentiate it fuse(..., platform='cpu'), whose "
            "kernels are XLA's on any device"
        )

    own.defjvp(refuse)
    return own
