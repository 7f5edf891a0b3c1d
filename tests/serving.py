"""Tenants whose weights lie in a bank, called by slot, for the tests of coalesce/serving/."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import coalesce
from coalesce import jaxpr as J
from coalesce.call import Caller
from coalesce.costs import Costs, device_of
from coalesce.kernels import choose, indexed_gemm
from coalesce.passes.pipeline import normalise
from coalesce.serving.executable import compile_executable, Executable, Lanes
from coalesce.serving.fit import Fit, fit
from coalesce.serving.pool import Pool
from coalesce.serving.schema import Options, plan_schema, Schema
from coalesce.serving.staging import Lane
from coalesce.serving.store import Preparer, Store
from tests.alone import alone, Tenant
from tests.compare import assert_same

CPU = Options("cpu", Costs(device_of("cpu")))


def indexed(op: Any, groups: int, platform: str) -> str:
    """Every op that the kernel supports runs as one that reads by slot."""
    return "indexed_gemm" if indexed_gemm.supports(op) else choose(op, groups, platform)


BY_SLOT = Options("cpu", Costs(device_of("cpu")), choice=indexed)


def fit_of(fn: Any, params: Any, *examples: tuple[Any, ...], shared: Any = None, name: str = "t") -> Fit:
    """A tenant with a request shape for each example."""
    programs = [coalesce.trace(fn, params, *x, name=name, shared=shared) for x in examples]
    return fit([normalise(program).program for program in programs])


@dataclass
class Serving:
    """Tenants in a store: tenant i in slots[i]. A pool for each request shape whose program is cut."""

    schema: Schema
    store: Store
    fits: list[Fit]
    slots: list[int]
    pools: list[Pool | None]

    def lanes(self, width: int, template: int = 0, segment: int = 0) -> Lanes:
        pool, program = self.pools[template], self.schema.segments[template]
        return Lanes(self.schema, program, width, self.store.capacity, segment, pool.slots if pool else 0)

    def executable(self, width: int, template: int = 0, packed: bool | None = None, segment: int = 0) -> Executable:
        return compile_executable([self.lanes(width, template, segment)], packed)

    def lane(self, tenant: int, inputs: Any, template: int = 0, state: int = 0) -> Lane:
        return Lane(self.slots[tenant], flat(self.fits[tenant], inputs, template), state)

    def run(self, executable: Executable, lanes: Sequence[Lane], template: int = 0) -> list[Any]:
        """The outputs of an executable of one entry, [width, ...]; None of a segment that is not the last."""
        outputs = executable.run([self.store.bank], [self.pools[template]], executable.stage([lanes]))
        (found,) = executable.fetch(outputs)
        return found

    def call(self, executable: Executable, lanes: Sequence[tuple[int, Any]], template: int = 0) -> list[Any]:
        """The results of (tenant, inputs) lanes, each in its tenant's pytree."""
        outputs = self.run(executable, [self.lane(tenant, x, template) for tenant, x in lanes], template)
        return [results(self.fits[t], [x[i] for x in outputs], template) for i, (t, _) in enumerate(lanes)]


def serve(
    fits: Sequence[Fit], capacity: int | None = None, options: Options = CPU, segments: int = 1, states: int = 8
) -> Serving:
    """`states` is how many lanes may be between two segments."""
    assert len({one.key for one in fits}) == 1
    schema = plan_schema(fits[0], options, segments)
    prepare = Preparer(schema)
    rows = [prepare(one) for one in fits]
    store = Store(schema, capacity or len(fits), rows[0])
    slots = [store.take() for _ in fits]
    for slot, own in zip(slots, rows, strict=True):
        store.write(slot, own)
    pools = [Pool(own.registers, states) if len(own) > 1 else None for own in schema.segments]
    return Serving(schema, store, list(fits), slots, pools)


def flat(fit: Fit, inputs: Any, template: int = 0) -> list[Any]:
    given = Caller((fit.programs[template],)).flatten([inputs])
    return [np.asarray(given[i]) for i in fit.inputs[template]]


def results(fit: Fit, values: list[Any], template: int = 0) -> Any:
    return Caller((fit.programs[template],)).unflatten(values)[0]


def plain(tree: Any) -> Any:
    """Leaves as NumPy arrays, of keys their data."""

    def one(x: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(x) if hasattr(x, "dtype") and J.is_key(x) else x)

    return jax.tree.map(one, tree)


def assert_alone(got: Any, tenant: Tenant) -> None:
    """As the tenant gets it alone."""
    assert_same(plain(got), plain(alone(tenant)))
