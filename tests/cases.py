"""What the property tests of fused programs share: a case, and that nothing of one tenant reaches another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp

import coalesce
from coalesce.bank import prepare_key, writer
from coalesce.costs import Costs, device_of
from coalesce.kernels import choose, KERNELS
from tests.compare import assert_as_good, assert_bitwise, assert_same
from tests.poison import draw_poison, Poison
from tests.programs import Draw
from tests.tenants import alone, in_float32, Tenant


@dataclass(frozen=True)
class Case:
    """Tenants, how to fuse them, and what else a property asks of them."""

    found: list[Tenant]
    options: dict[str, Any]
    poison: Poison
    order: list[int]


def case_of(pick: Draw, found: list[Tenant], **options: Any) -> Case:
    """With options that are drawn, but for those that are given."""
    drawn = {
        "within_program": pick.flag(),
        "pack_unbounded_loops": pick.flag(),
        "choose_kernel": preferring(pick.choice([None, 0, 1, 2])),
        "policy": pick.choice(["always", "always", "auto", "never"]),
        "waste_bound": pick.choice([0.0, 0.3, 0.6, 0.9]),
        "costs": Costs(device_of(pick.choice(["cpu", "gpu"]))),  # on a GPU most of what is this small wins
    }
    return Case(found, drawn | options, draw_poison(pick, len(found)), pick.shuffled(range(len(found))))


def preferring(n: int | None) -> Any:
    """Kernel choice: the n-th kernel of those that support an op, counted round, or the library's own choice."""

    def choice(op: Any, groups: int, platform: str) -> str:
        able = [name for name, kernel in KERNELS.items() if kernel.supports(op)]
        return choose(op, groups, platform) if n is None else able[n % len(able)]

    return choice


def fuse(found: Sequence[Tenant], options: dict[str, Any]) -> coalesce.Fused:
    programs = [coalesce.trace(t.fn, t.params, *t.inputs, name=f"t{i}", shared=t.shared) for i, t in enumerate(found)]
    with patch("coalesce.bank.writer", lambda program, entries: kept(Writer(prepare_key(program), entries, program))):
        return coalesce.fuse(programs, **options)


@dataclass(frozen=True)
class Writer:
    """What tells one from another, as in a bank itself."""

    key: Any
    entries: Any
    program: Any = field(compare=False)


@lru_cache(maxsize=32)
def kept(own: Writer) -> Any:
    """A program that is fused again, with poison in a weight, writes its bank by what is compiled already."""
    return writer(own.program, own.entries)


def fuse_to_read(found: Sequence[Tenant], options: dict[str, Any]) -> coalesce.Fused:
    """The same, but that no bank is written, whose programs are most of what there is to compile: not to be called."""
    with patch("coalesce.compile.build_bank", return_value=None):
        return fuse(found, options)


def inputs_of(found: Sequence[Tenant]) -> list[tuple[Any, ...]]:
    return [t.inputs for t in found]


def assert_each_as_alone(found: Sequence[Tenant], results: Sequence[Any], dtype: Any) -> None:
    """In float32 each tenant gets what it gets alone; in a narrower dtype what is as good."""
    for tenant, got in zip(found, results, strict=True):
        if dtype is jnp.float32:
            assert_same(got, alone(tenant), tenant.model.exact)
        else:
            assert_as_good(got, alone(tenant), alone(in_float32(tenant)), tenant.model.exact)


def assert_inputs_isolated(case: Case, program: coalesce.Fused, clean: list[Any]) -> None:
    """With poison in one tenant's inputs, every other tenant gets the same bits from the same executable."""
    results = program(inputs_of(case.poison.in_inputs(case.found)))
    for i in set(range(len(case.found))) - {case.poison.tenant}:
        assert_bitwise(results[i], clean[i])


def assert_weights_isolated(case: Case, program: coalesce.Fused, clean: list[Any]) -> None:
    """The same with poison in a weight, for whoever does not share it: the executable gets another bank."""
    bad, hit = case.poison.in_weights(case.found)
    if not hit:
        return
    other = fuse(bad, case.options)
    assert str(other) == str(program), "poison changed the plan"
    flat = program.compile()(list(other.bank), jax.tree.leaves(inputs_of(case.found)))
    results = jax.tree.unflatten(jax.tree.structure(clean), flat)
    for i in set(range(len(case.found))) - hit:
        assert_bitwise(results[i], clean[i])
