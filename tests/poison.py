"""NaN or Inf in one tenant's data, for the tests that nothing of it reaches another tenant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from tests.programs import Draw, kind_of
from tests.tenants import Tenant


@dataclass(frozen=True)
class Poison:
    """`value` in every element of one tenant's inputs or of one of its weights, or in the first element alone."""

    tenant: int
    value: float
    everywhere: bool
    weight: int  # counted round

    def of(self, x: Any) -> Any:
        if kind_of(x) != "f":
            return x
        values = np.array(x)
        values.reshape(-1)[slice(None if self.everywhere else 1)] = self.value
        return jax.device_put(values)

    def in_inputs(self, tenants: Sequence[Tenant]) -> list[Tenant]:
        found = list(tenants)
        found[self.tenant] = replace(found[self.tenant], inputs=jax.tree.map(self.of, found[self.tenant].inputs))
        return found

    def in_weights(self, tenants: Sequence[Tenant]) -> tuple[list[Tenant], set[int]]:
        """(tenants, who holds the poisoned weight): it stays shared, if it was, by identity or by bytes."""
        owner = tenants[self.tenant]
        weights = [w for w in owner.params["ops"] if kind_of(w) == "f"]
        if not weights:
            return list(tenants), set()
        old = weights[self.weight % len(weights)]

        def same(tenant: Tenant, w: Any) -> bool:
            declared = owner.shared is not None and tenant.shared is not None
            return w is old or (declared and w.shape == old.shape and w.dtype == old.dtype and np.array_equal(w, old))

        new, found, hit = self.of(old), [], set()
        for i, t in enumerate(tenants):
            flags = [same(t, w) for w in t.params["ops"]]
            if any(flags):
                hit.add(i)
                poisoned = new if t.shared is None else jax.device_put(np.array(new))  # declared: an array of its own
                ops = [poisoned if flag else w for flag, w in zip(flags, t.params["ops"], strict=True)]
                t = replace(t, params={**t.params, "ops": ops}, shared=None if t.shared is None else ops)
            found.append(t)
        return found, hit


def draw_poison(draw: Draw, tenants: int) -> Poison:
    value = draw.choice([float("nan"), float("inf"), float("-inf")])
    return Poison(draw.integer(0, tenants - 1), value, draw.flag(), draw.integer(0, 99))
