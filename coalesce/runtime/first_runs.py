"""The first runs of an executable on a device with memory of its own, beside who serves and not in its stead.

In the first a GPU's driver loads the program's code, and JAX finds out how to call it; in the second XLA records its
CUDA graph. One of our own is captured before them. Each keeps the thread that it is called on for milliseconds: here a
compiler's, and not the driver's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from coalesce.runtime.loaded import Loaded

RUNS = 2

LOG = logging.getLogger("coalesce.runtime")


def run_first(loaded: Loaded, capacities: Sequence[int], at: Any) -> bool:
    """Runs an executable that was made for banks of these capacities, on the JAX device `at`, before the driver knows
    of it; whether that could be. Not one that writes registers, which it would take from whoever reads them. What of a
    bank is being written just now cannot be read: that is no failure, the driver will run it for nothing too."""
    if loaded.capacities != tuple(capacities) or any(pool is not None for pool in loaded.pools):
        return False
    try:
        loaded.executable.make_ready(loaded.banks)
        for _ in range(RUNS):
            loaded.run(at, loaded.blanks(), []).wait()
    except Exception as e:
        LOG.debug("it runs first where it is served: %s: %s", type(e).__name__, e)
        return False
    return True
