"""NaN or Inf in one tenant's data, for the tests that nothing of it reaches another tenant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests.programs import kind_of, Tenant


@dataclass(frozen=True)
class Poison:
    """`value` in every element of one tenant's floats, or in the first element of each array."""

    tenant: int
    value: float
    everywhere: bool

    def of(self, x: Any) -> Any:
        if kind_of(x) != "f" or not x.size:
            return x
        return jnp.full_like(x, self.value) if self.everywhere else x.reshape(-1).at[0].set(self.value).reshape(x.shape)

    def in_inputs(self, tenants: Sequence[Tenant]) -> list[Tenant]:
        found = list(tenants)
        found[self.tenant] = replace(found[self.tenant], inputs=jax.tree.map(self.of, found[self.tenant].inputs))
        return found

    def in_weights(self, tenants: Sequence[Tenant]) -> tuple[list[Tenant], set[int]]:
        """(tenants, who holds something poisoned): what the tenant shares, by identity or by bytes, stays shared."""
        new = {token(w): self.of(w) for w in tenants[self.tenant].params["ops"]}
        found, hit = [], set()
        for i, t in enumerate(tenants):
            if new.keys() & set(map(token, t.params["ops"])):
                hit.add(i)
                ops = [copied(new.get(token(w), w), t.shared is not None) for w in t.params["ops"]]
                t = replace(t, params={**t.params, "ops": ops}, shared=None if t.shared is None else ops)
            found.append(t)
        return found, hit


def token(x: Any) -> Any:
    return (x.shape, str(x.dtype), np.asarray(x).tobytes())


def copied(x: Any, apart: bool) -> Any:
    return jnp.array(x, copy=True) if apart else x


def poisons(tenants: Sequence[Tenant]) -> st.SearchStrategy[Poison]:
    values = st.sampled_from([float("nan"), float("inf"), float("-inf")])
    return st.builds(Poison, st.integers(0, len(tenants) - 1), values, st.booleans())
