"""Whether mypyc has compiled what the policy thinks with (setup.py), beside its sources."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

HERE = Path(__file__).parent


def is_native() -> bool:
    return bool(objects())


def objects() -> list[Path]:
    """Shared objects, which Python loads instead of the sources beside them."""
    return sorted(path for path in HERE.iterdir() if path.name.endswith(tuple(EXTENSION_SUFFIXES)))


def stale() -> list[str]:
    """In a checkout: what was compiled of other sources, or has none any more."""
    names = []
    for path in objects():
        source = HERE / f"{path.name.split('.')[0]}.py"
        if not source.exists() or source.stat().st_mtime > path.stat().st_mtime:
            names.append(path.name)
    return names
