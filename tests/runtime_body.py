"""What tests of the runtime on a device have in common: tenants of some models, served and compared with each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from coalesce.runtime.runtime import Runtime
from coalesce.serving.pool import Pool
from tests.compare import assert_same

SLO_S = 120.0  # time is not what is tested


@dataclass(frozen=True, eq=False)
class Kind:
    """Tenants of one model, with weights and inputs of their own."""

    number: int
    model: Any
    params: list[Any]
    inputs: list[tuple[Any, ...]]

    def name(self, tenant: int) -> str:
        return f"kind{self.number}-{tenant}"


def kinds_of(models: Sequence[Any], tenants: int) -> list[Kind]:
    found = []
    for number, model in enumerate(models):
        params = [model.init(jax.random.key(10 * number + i)) for i in range(tenants)]
        inputs = [model.example(jax.random.key(1000 + 10 * number + i)) for i in range(tenants)]
        found.append(Kind(number, model, params, [tuple(map(np.asarray, own)) for own in inputs]))
    return found


def check_served(rt: Runtime, kinds: Sequence[Kind], requests: int, add: bool = True) -> None:
    """Adds the tenants unless they are there, asks for all of them in turns, and compares."""
    for kind in kinds if add else ():
        for i, (params, inputs) in enumerate(zip(kind.params, kind.inputs, strict=True)):
            rt.add_tenant(kind.name(i), kind.model.apply, params, example=inputs, slo=SLO_S)
    rt.warm_up(600.0)
    pairs = [(kind, i) for kind in kinds for i in range(len(kind.params))]
    asked = [pairs[n % len(pairs)] for n in range(requests)]
    replies = [rt.submit(kind.name(i), *kind.inputs[i]) for kind, i in asked]
    alone = {(kind, i): jax.jit(kind.model.apply)(kind.params[i], *kind.inputs[i]) for kind, i in pairs}
    for pair, reply in zip(asked, replies, strict=True):
        got = reply.result(120)
        want = jax.tree.map(np.asarray, alone[pair])
        assert_same(jax.tree.map(np.asarray, got), want)


def pools_of(rt: Runtime, kind: Kind) -> list[Pool | None]:
    return [course.pool for course in rt._tenancy.residents[kind.name(0)].host.courses]
