"""Heavy ops for the tests of kernels, in the form that `canonicalize` leaves, which is what a kernel gets: dots as
[B.., M.., K..] x [B.., K.., N..], convolutions channels last. G problems with right operands of their own, R lanes on
each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from coalesce.heavy import heavy_op, HeavyOp
from coalesce.kernels import choose, indexed_gemm, KERNELS
from tests.programs import Aval, readable
from tests.tenants import array

FLOATS = (jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16)
WIDE = {**dict.fromkeys(FLOATS, jnp.float32), jnp.int8: jnp.int32}  # what to accumulate in
LAST = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@dataclass(frozen=True)
class Case:
    """A plain operation on one lane, and how many lanes there are."""

    call: Callable[[Any, Any], Any]
    lhs: Aval
    rhs: Aval
    groups: int
    per_group: int

    @property
    def op(self) -> HeavyOp:
        (eqn,) = jax.make_jaxpr(self.call)(self.lhs, self.rhs).jaxpr.eqns
        return heavy_op(eqn)

    @property
    def kernels(self) -> list[str]:
        return [name for name, kernel in KERNELS.items() if kernel.supports(self.op)]

    def data(self, seed: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(seed)
        lhs = Aval((self.groups, self.per_group, *self.lhs.shape), self.lhs.dtype)
        return array(lhs, rng), array(Aval((self.groups, *self.rhs.shape), self.rhs.dtype), rng)

    def compiled(self, names: Collection[str]) -> Callable[[Any, Any], dict[str, Any]]:
        """(lhs, rhs) -> the results of those of the kernels that support the operation."""
        op = self.op
        kernels = {name: KERNELS[name] for name in self.kernels if name in names}

        def run(lhs: Any, rhs: Any) -> dict[str, Any]:
            return {name: kernel.run(op, lhs, jax.vmap(kernel.layout(op))(rhs)) for name, kernel in kernels.items()}

        return jax.jit(run)

    def plain(self, lhs: Any, rhs: Any) -> Any:
        """The operation itself, lane by lane."""
        call, (lhs, rhs) = jax.jit(self.call), map(np.asarray, (lhs, rhs))
        return np.stack([[np.asarray(call(x, w)) for x in xs] for xs, w in zip(lhs, rhs, strict=True)])


@st.composite
def dots(draw: Any) -> Case:
    sizes = st.lists(st.integers(1, 5), max_size=2)
    batch, free_l, free_r = (draw(sizes) for _ in range(3))
    contract = draw(st.lists(st.integers(1, 5), max_size=2))
    dtype = draw(st.sampled_from([*FLOATS, jnp.int32, jnp.int8, jnp.complex64]))
    b, m, k = len(batch), len(free_l), len(contract)
    ends = tuple(range(b + m, b + m + k)), tuple(range(b, b + k))
    numbers = (ends, (tuple(range(b)), tuple(range(b))))
    wide = WIDE.get(dtype) if draw(st.booleans()) else None
    call = partial(lax.dot_general, dimension_numbers=numbers, precision="highest", preferred_element_type=wide)
    lhs, rhs = Aval((*batch, *free_l, *contract), dtype), Aval((*batch, *contract, *free_r), dtype)
    return Case(call, lhs, rhs, draw(st.integers(1, 3)), draw(st.integers(1, 3)))


@st.composite
def convs(draw: Any) -> Case:
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    groups, channels, features = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n, batch_groups = draw(st.integers(1, 2)), 1
    if groups == 1 and draw(st.integers(0, 7)) == 7:
        batch_groups = n
    size, kernel, strides, lhs_dilation, rhs_dilation = each(1, 6), each(1, 3), each(1, 3), each(1, 2), each(1, 2)
    lo, hi = each(-1, 2), each(-1, 2)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, rhs_dilation, strict=True)]
    held = [(s - 1) * d + 1 + a + b for s, d, a, b in zip(size, lhs_dilation, lo, hi, strict=True)]
    # Where the window does not fit into what is held, more padding on the right lets it.
    padding = readable([(a, b + max(0, r - h)) for a, b, r, h in zip(lo, hi, reach, held, strict=True)])
    dtype = draw(st.sampled_from(FLOATS))
    call = partial(
        lax.conv_general_dilated, window_strides=strides, padding=padding, lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation, dimension_numbers=LAST[rank], feature_group_count=groups,
        batch_group_count=batch_groups, precision="highest",
        preferred_element_type=WIDE[dtype] if draw(st.booleans()) else None,
    )  # fmt: skip
    lhs, rhs = (
        Aval((n, *size, groups * channels), dtype),
        Aval((*kernel, channels, groups * batch_groups * features), dtype),
    )
    return Case(call, lhs, rhs, draw(st.integers(1, 3)), draw(st.integers(1, 3)))


def indexed(op: HeavyOp, groups: int, platform: str) -> str:
    """A choice of kernels: indexed_gemm wherever it runs an op."""
    return "indexed_gemm" if indexed_gemm.supports(op) else choose(op, groups, platform)
