"""What a runtime is told when it is made: checked before anything starts that would have to be stopped again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from coalesce.errors import InvalidInput
from coalesce.runtime.observer import Observer
from coalesce.runtime.terms import is_count, is_positive
from coalesce.scheduler.policy import Policy


def check_options(
    policy: Any,
    devices: Any,
    widths: Any,
    capacity: Any,
    segments: Any,
    memory_limit: Any,
    executables: Any,
    compiled: Any,
    hang_s: Any,
    stall_s: Any,
    observers: Any,
) -> None:
    """Raises InvalidInput; see the arguments of `Runtime`."""
    if devices is not None and not (is_list(devices, lambda device: isinstance(device, jax.Device)) and len(devices)):
        raise InvalidInput(f"devices is {devices!r}; give a list of at least one JAX device, or None")
    if devices is not None and len(devices) > 1 and not callable(policy):
        raise InvalidInput("with several devices give policy= as a function that makes one for each")
    if not (is_list(widths, is_count) and len(widths)):
        raise InvalidInput(f"widths is {widths!r}; give how many lanes executables have, each a number of at least 1")
    for name, value in (("capacity", capacity), ("segments", segments)):
        if not (value is None or is_count(value)):
            raise InvalidInput(f"{name} is {value!r}; give a number, at least 1, or None")
    if not is_count(executables):
        raise InvalidInput(f"executables is {executables!r}; give how many are kept, at least 1")
    if not (memory_limit is None or memory_limit == 0 or is_positive(memory_limit)):
        raise InvalidInput(f"memory_limit is {memory_limit!r}; give a number of bytes, or None")
    for name, value in (("hang_s", hang_s), ("stall_s", stall_s)):
        if not is_positive(value):
            raise InvalidInput(f"{name} is {value!r}; give seconds, more than 0")
    if not (compiled is None or compiled is False or isinstance(compiled, str | os.PathLike)):
        raise InvalidInput(f"compiled is {compiled!r}; give a folder, False for none, or None for the usual one")
    if not is_list(observers, lambda observer: isinstance(observer, Observer)):
        raise InvalidInput(f"observers is {observers!r}; give a list of coalesce.runtime.observer.Observer")


def made_policies(policy: Policy | Callable[[], Policy], devices: Sequence[Any] | None) -> list[Policy]:
    """One for each device; raises InvalidInput if it is none."""
    made = [policy() if callable(policy) else policy for _ in devices or [None]]
    for one in made:
        if not isinstance(one, Policy):
            raise InvalidInput(f"policy is {one!r}; give an object with on_event(event, now_ns), or what makes one")
    return made


def is_list(given: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(given, Sequence) and all(map(is_right, given))
