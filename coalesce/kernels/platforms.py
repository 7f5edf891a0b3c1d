"""Which form of a kernel a program gets: that of the platform that it is lowered for.

JAX traces all forms before it is known which one is lowered: of a product that TMA fetches, the kernel that runs
elsewhere as well, and that one compiled and interpreted. Whoever lowers for one platform says so (`only`), and nothing
else is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax import lax

LOWERED = ("cpu", "cuda", "rocm")  # as JAX calls what it lowers for

lowered_for: ContextVar[str | None] = ContextVar("lowered_for", default=None)


@contextmanager
def only(platform: str) -> Iterator[None]:
    """What is traced inside is lowered for this one, and no other; of a name that is not known nothing follows."""
    token = lowered_for.set(platform if platform in LOWERED else None)
    try:
        yield
    finally:
        lowered_for.reset(token)


def by_platform(*args: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """As `lax.platform_dependent`."""
    platform = lowered_for.get()
    if platform is None:
        return lax.platform_dependent(*args, default=default, **forms)
    return forms.get(platform, default)(*args)
