"""What a test itself holds on the device."""

from __future__ import annotations

import gc
from collections.abc import Callable

import jax


def held_from_now() -> Callable[[], int]:
    """Bytes of the arrays that there are, without those of other tests, which may go at any time: they stay until the
    function that is returned goes."""
    gc.collect()
    others = {id(x): x for x in jax.live_arrays()}

    def held() -> int:
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays() if id(x) not in others)

    return held
