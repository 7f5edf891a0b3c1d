"""Whether mypyc has compiled what the policy thinks with (setup.py)."""

from __future__ import annotations

from coalesce.scheduler import outlook


def is_native() -> bool:
    return not str(outlook.__file__).endswith(".py")
