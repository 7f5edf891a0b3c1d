"""What a tenant's params are, by the types of their arrays: other weights must be of the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from coalesce import jaxpr as J
from coalesce.errors import InvalidInput
from coalesce.program import Program
from coalesce.scheduler.events import Event
from coalesce.tracing import NOT_TAKEN, staged, struct


def types_of(params: Any) -> dict[str, str]:
    """Of each array, by its path; of what only looks like one, what it is."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path): type_of(leaf) for path, leaf in leaves if staged(leaf)}


def type_of(leaf: Any) -> str:
    try:
        return J.short(struct(leaf))
    except NOT_TAKEN:
        return type(leaf).__name__


def check_bits(programs: Sequence[Program], inside: bool) -> Sequence[Event]:
    """An order: raises InvalidInput for 64-bit types that JAX has on some other thread, and not on the driver's.
    `inside`: also of what is only computed, as in programs that were traced on a thread that has them."""
    for program in programs if not J.takes_wide() else ():
        wide = program.wide_inside if inside else program.wide
        if wide:
            raise InvalidInput(
                f"tenant {program.name!r} has {wide}, which takes jax_enable_x64 for the whole process and not "
                "on one thread: jax.config.update('jax_enable_x64', True)"
            )
    return ()


def check_types(name: str, known: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raises InvalidInput, which names the first that differs."""
    for path in {**known, **given}:
        was, now = (types.get(path, "no array") for types in (known, given))
        if was != now:
            raise InvalidInput(
                f"tenant {name!r}: params{path} is {now}, and {was} when it was added; give params of the same tree,"
                " shapes and dtypes, or add it as another tenant"
            )
