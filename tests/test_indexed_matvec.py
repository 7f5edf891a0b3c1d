"""indexed_matvec beyond what tests/test_kernels.py asks of every kernel: blocks, slots, batch dimensions, epilogues."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from coalesce.blocks import Blocks
from coalesce.bundle import packs
from coalesce.heavy import heavy_op, HeavyOp
from coalesce.kernels import choose, indexed_matvec, KERNELS
from coalesce.models import by_name
from coalesce.slab import Picked
from tests.alone import array, check_fused
from tests.compare import assert_same

BLOCKS = [None, Blocks(1, 16, 16), Blocks(1, 8, 32), Blocks(1, 64, 128)]


def op_of(call, lhs, rhs) -> HeavyOp:
    (eqn,) = jax.make_jaxpr(call)(lhs, rhs).jaxpr.eqns
    return heavy_op(eqn)


def by_row(op: HeavyOp, groups: int, platform: str) -> str:
    return "indexed_matvec" if indexed_matvec.supports(op) else choose(op, groups, platform)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("k", "n", "lanes"), [(32, 16, 1), (40, 24, 1), (70, 33, 3)])
def test_lanes_read_the_rows_of_their_slots(k, n, lanes, blocks):
    """And nothing of the rows that are nobody's."""
    x, bank, slots = array(3, lanes, 1, k), array(5, k, n), jnp.asarray([4, 1, 4])
    bank = bank.at[jnp.asarray([0, 2, 3])].set(jnp.nan)
    op = op_of(lax.dot, x[0, 0], bank[0])
    got = indexed_matvec.run(op, x, Picked(jax.vmap(indexed_matvec.layout(op))(bank), slots), blocks=blocks)
    assert_same(got, jnp.einsum("grmk,gkn->grmn", x, bank[slots], precision="highest"))


def test_batch_dimensions():
    call = partial(lax.dot_general, dimension_numbers=(((2,), (1,)), ((0,), (0,))), precision="highest")
    x, bank, slots = array(2, 1, 4, 1, 24), array(3, 4, 24, 20), jnp.asarray([2, 0])
    op = op_of(call, x[0, 0], bank[0])
    assert op.batch == 4
    got = indexed_matvec.run(op, x, Picked(jax.vmap(indexed_matvec.layout(op))(bank), slots))
    assert_same(got, jax.vmap(jax.vmap(call, (0, None)))(x, bank[slots]))


def test_only_dots_of_one_row():
    assert not indexed_matvec.supports(op_of(lax.dot, array(2, 8), array(8, 4)))
    assert indexed_matvec.supports(op_of(lax.dot, array(1, 8), array(8, 4)))
    assert KERNELS["indexed_matvec"] is indexed_matvec


@pytest.mark.parametrize("shared", [False, True])
def test_a_tail_runs_inside(shared):
    def layer(p, x):
        return jnp.maximum(x @ p["w"] + p["b"][None], 0) * x.sum() + jnp.tanh(x[:, :12])

    w = array(24, 12)
    tenants = [(layer, {"w": w if shared else array(24, 12), "b": array(12)}, (array(1, 24),)) for _ in range(3)]
    fused = check_fused(tenants, choose_kernel=by_row)
    (pack,) = packs(fused.bundle.schedule)
    assert pack.kernel == "indexed_matvec" and pack.epilogue


def test_a_recurrent_model():
    model = by_name("lstm", hidden=32, steps=3)
    tenants = [(model.apply, model.init(jax.random.key(i)), model.example(jax.random.key(9 + i))) for i in range(2)]
    fused = check_fused(tenants, choose_kernel=by_row)
    assert "indexed_matvec" in str(fused)
