"""How a process beside the one that serves is started: with the modules that are found here, and no others."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def command(module: str, *arguments: str) -> Sequence[str]:
    """Runs a module. The working directory, which Python would search first, may hold modules of any name."""
    return [sys.executable, "-P", "-m", module, *arguments]


def search_path() -> str:
    """For PYTHONPATH; the working directory is in it only if modules are looked for there in this process too."""
    return os.pathsep.join(os.path.abspath(path) for path in sys.path)
