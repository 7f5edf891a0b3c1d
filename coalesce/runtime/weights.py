"""What a tenant's params are, by the types of their arrays: other weights must be of the same, and all must be there in
the runtime's threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import jax

from coalesce import jaxpr as J
from coalesce.errors import InvalidInput
from coalesce.program import Program
from coalesce.tracing import staged, struct


def types_of(params: Any) -> dict[str, str]:
    """Of each array, by its path; of what only looks like one, what it is."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path): type_of(leaf) for path, leaf in leaves if staged(leaf)}


def type_of(leaf: Any) -> str:
    try:
        return J.short(struct(leaf))
    except TypeError:
        return type(leaf).__name__


def check_types(name: str, known: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Raises InvalidInput, which names the first that differs."""
    for path in {**known, **given}:
        was, now = (types.get(path, "no array") for types in (known, given))
        if was != now:
            raise InvalidInput(
                f"tenant {name!r}: params{path} is {now}, and {was} when it was added; give params of the same tree,"
                " shapes and dtypes, or add it as another tenant"
            )


def check_wide(program: Program) -> None:
    """Raises InvalidInput for types of 64 bits that only the calling thread has, or the tenant inside its function."""
    wide = program.wide
    if wide is None and J.takes_wide():
        made = [out.aval for eqn in J.walk(program.jaxpr) for out in eqn.outvars]
        wide = next((J.short(aval) for aval in made if J.is_wide(aval)), None)
    if wide is not None and not others_take_wide():
        raise InvalidInput(
            f"tenant {program.name!r} was traced with jax_enable_x64 and has {wide}, which the runtime's threads have"
            " not: a context is of one thread. Set it for the process: jax.config.update('jax_enable_x64', True)"
        )


def others_take_wide() -> bool:
    found: list[bool] = []
    other = threading.Thread(target=lambda: found.append(J.takes_wide()))
    other.start()
    other.join()
    return found[0]
