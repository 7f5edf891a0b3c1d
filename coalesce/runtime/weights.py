"""What a tenant's params are: their tree, the types of its arrays, and its other leaves. Other weights must be of the
same, since a program, and the tree of its results, may depend on all of it.

What compares by nothing but identity, as a function does, may be another object: a model that is made anew has its own.
What comes of it is compared, as a program and as the tree of its results.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from coalesce import jaxpr as J
from coalesce.errors import InvalidInput
from coalesce.program import Program
from coalesce.scheduler.events import Event
from coalesce.tracing import NOT_TAKEN, staged, struct


class Array(NamedTuple):
    """In place of one, which is not kept."""

    type: str  # of what only looks like an array, what it is


class Object(NamedTuple):
    """In place of what compares by identity, and may hold arrays."""

    kind: type


class Nothing(NamedTuple):
    """In place of a leaf, where there is none."""


@dataclass(frozen=True, eq=False)
class Types:
    leaves: Mapping[str, Any]  # by path; None is one too
    tree: Any


def types_of(params: Any) -> Types:
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: leaf is None)
    return Types({jax.tree_util.keystr(path): kept(leaf) for path, leaf in leaves}, tree)


def kept(leaf: Any) -> Any:
    if staged(leaf):
        return Array(type_of(leaf))
    return Object(type(leaf)) if is_by_identity(leaf) else leaf


def is_by_identity(own: Any) -> bool:
    return type(own).__eq__ is object.__eq__ and own is not None and not isinstance(own, type)


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


def check_types(name: str, known: Types, given: Types) -> None:
    """Raises InvalidInput, which names the first leaf that differs, or that lies in a container which does."""
    for path in {**known.leaves, **given.leaves}:
        was, now = (types.leaves.get(path, Nothing()) for types in (known, given))
        if not is_same(was, now):
            raise InvalidInput(other_than(name, f"params{path} is {text_of(now)}", text_of(was)))
    found = first_apart(known.tree, given.tree, [*given.leaves])
    if found is not None:
        path, was, now = found
        raise InvalidInput(other_than(name, f"params{path} lies in {now}", f"in {was}"))


def check_results(name: str, known: Sequence[Any], programs: Sequence[Program]) -> None:
    """`known` are the trees of results, one a request shape, that the tenant's clients are given."""
    for was, program in zip(known, programs, strict=True):
        if was != program.out_tree:
            raise InvalidInput(other_than(name, f"with these params results are {program.out_tree}", str(was)))


def other_than(name: str, now: str, was: str) -> str:
    return (
        f"tenant {name!r}: {now}, and {was} when it was added; give params of the same tree, shapes and dtypes, or add"
        " it as another tenant"
    )


def is_same(was: Any, now: Any) -> bool:
    if was is now or type(was) is not type(now):
        return was is now
    if isinstance(was, tuple | list):
        return len(was) == len(now) and all(map(is_same, was, now))
    if isinstance(was, dict):
        return was.keys() == now.keys() and all(is_same(was[key], now[key]) for key in was)
    if is_by_identity(was):
        return True
    try:
        return bool(was == now)
    except Exception:  # it holds arrays, say, and cannot be compared
        return True


def first_apart(was: Any, now: Any, paths: Sequence[str]) -> tuple[str, str, str] | None:
    """Of two trees with as many leaves the first, in a container that differs, and what that is in each."""
    one, other = was.node_data(), now.node_data()
    if not is_same(one, other) or len(was.children()) != len(now.children()):
        return next(iter(paths), ""), shown(one), shown(other)
    before = 0
    for inner, own in zip(was.children(), now.children(), strict=True):
        found = first_apart(inner, own, paths[before:])
        if found is not None:
            return found
        before += own.num_leaves
    return None


def shown(node: Any) -> str:
    """A container: its type, and what else JAX knows of it, as the keys of a dict."""
    kind, rest = node
    return f"a {kind.__name__}" + (f" of {text_of(rest)}" if rest is not None else "")


def text_of(leaf: Any) -> str:
    if isinstance(leaf, Array):
        return leaf.type
    if isinstance(leaf, Object):
        return f"a {leaf.kind.__name__}"
    return "no leaf" if isinstance(leaf, Nothing) else reprlib.repr(leaf)
