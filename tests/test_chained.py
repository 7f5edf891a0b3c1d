"""Chained products: one launch leaves what each product leaves by itself, and nothing else is written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import chained, indexed_gemm
from coalesce.kernels.chained import Link
from coalesce.kernels.epilogue import COLUMN, Epilogue, WHOLE
from coalesce.slab import Cut, Picked
from tests.alone import array
from tests.test_indexed_gemm import conv, op_of

DTYPE = jnp.bfloat16
BLOCKS = Blocks(16, 16, 16)
LANES = 3
DOT = partial(lax.dot_general, dimension_numbers=(((3,), (0,)), ((), ())))
PARTS = [parts for parts in product((True, False), repeat=3) if parts[0] or parts[2]]  # feed, head, narrow
PARTS = [parts for parts in PARTS if not parts[1] or parts[2]]


def ops(dtype: Any = DTYPE) -> dict[str, HeavyOp]:
    """A bottleneck of 5x5 positions, a row tile and a half."""
    return {
        "feed": op_of(conv((2, 2), "VALID", precision=None), (1, 9, 9, 24), (1, 1, 24, 48), dtype),
        "head": op_of(conv(precision=None), (1, 5, 5, 24), (3, 3, 24, 32), dtype),
        "wide": op_of(DOT, (1, 5, 5, 32), (32, 48), dtype),
        "narrow": op_of(DOT, (1, 5, 5, 48), (48, 24), dtype),
    }


def relu(y: Any) -> Any:
    return jnp.where(y > 0, y, jnp.zeros_like(y))


BIAS = Epilogue(lambda y, bias: relu(y + bias), (COLUMN,), DTYPE)
SUM = Epilogue(lambda y, bias, other: relu(y + bias + other), (COLUMN, WHOLE), DTYPE)


def random(*shape: int) -> jax.Array:
    return array(*shape).astype(DTYPE) * 0.5


def links(feed: bool, head: bool, narrow: bool, per_group: int = 1, written: bool = True) -> list[Link]:
    """Random operands; what another link computes is None."""
    found = ops()
    names = [*["feed"] * feed, *["head"] * head, "wide", *["narrow"] * narrow]
    made: list[Link] = []
    for name in names:
        op = found[name]
        inner = (name == "wide" and head) or name == "narrow"
        lhs = None if inner else random(LANES, per_group, *op.lhs.shape)
        rhs = jax.vmap(indexed_gemm.layout(op))(random(LANES, *op.rhs.shape))
        given: list[Any] = [random(LANES, per_group, op.n)]
        if name == "wide":
            given.append(None if feed else random(LANES, per_group, *op.out.shape))
        is_inner = name in ("feed", "head") or (name == "wide" and narrow and not written)
        made.append(Link(op, lhs, rhs, SUM if name == "wide" else BIAS, given, not is_inner))
    return made


def in_turn(chain: list[Link]) -> list[Any]:
    """Each by itself, as indexed_gemm runs it."""
    done: list[Any] = []
    for link in chain:
        lhs = done[-1] if link.lhs is None else link.lhs
        operands = [done[0] if y is None else y for y in link.operands]
        done.append(indexed_gemm.run(link.op, lhs, link.rhs, epilogue=link.epilogue, operands=operands))
    return done


def check(chain: list[Link], blocks: Blocks = BLOCKS) -> None:
    arrays = arrays_of(chain)
    each = jax.jit(lambda arrays: chained.run(placed(chain, arrays), blocks))(arrays)
    wanted = jax.jit(lambda arrays: in_turn(placed(chain, arrays)))(arrays)
    for link, got, want in zip(chain, each, wanted, strict=True):
        assert (got is not None) == link.written
        if got is not None:
            np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(np.array(["feed", "head", "narrow"])[list(parts)]))
def test_chains(parts):
    """What lies between is written where others read it."""
    check(links(*parts))


def test_what_nobody_else_reads_is_not_written():
    check(links(False, False, True, written=False))


def test_lanes_that_share_weights():
    check(links(True, True, True, per_group=2))


def test_a_left_operand_that_is_too_wide_to_keep(monkeypatch):
    monkeypatch.setattr(chained, "MOST_KEPT", 16)
    check(links(False, False, True), Blocks(32, 16, 16))


def test_slots_and_slabs():
    """Weights lie in slabs, of which some rows are read."""
    slots = jnp.asarray([2, 0, 2])

    def banked(x: Any, shape: tuple[int, ...]) -> Any:
        before = jnp.full((LANES, 8), jnp.nan, x.dtype)
        return Picked(Cut(jnp.concatenate([before, x.reshape(LANES, -1)], axis=1), 8, shape), slots)

    def in_bank(link: Link) -> Link:
        vector, *rest = link.operands
        return replace(link, rhs=banked(link.rhs, link.rhs.shape[1:]), operands=[banked(vector, (link.op.n,)), *rest])

    def picked(link: Link) -> Link:
        vector, *rest = link.operands
        return replace(link, rhs=link.rhs[slots], operands=[vector[slots], *rest])

    plain = links(True, True, True)
    got, want = (chained.run(list(map(each, plain)), BLOCKS)[-1] for each in (in_bank, picked))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_a_nan_stays_in_its_lane():
    chain = links(True, True, True)

    def poisoned(link: Link) -> Link:
        lhs = None if link.lhs is None else link.lhs.at[1].set(jnp.nan)
        return replace(link, lhs=lhs, rhs=link.rhs.at[1].set(jnp.nan))

    want, got = (np.asarray(chained.run(each, BLOCKS)[-1]) for each in (chain, list(map(poisoned, chain))))
    np.testing.assert_array_equal(got[::2], want[::2])
    assert not np.array_equal(got[1], want[1])


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11 and newer
def test_it_is_one_kernel_of_a_gpu_program():
    """Lowered for a GPU on a machine without one."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    chain = links(True, True, True)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(lambda arrays: chained.run(placed(chain, arrays), BLOCKS)).trace(arrays_of(chain))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 1


def arrays_of(chain: list[Link]) -> list[Any]:
    return [(link.lhs, link.rhs, link.operands) for link in chain]


def placed(chain: list[Link], arrays: list[Any]) -> list[Link]:
    return [replace(k, lhs=x, rhs=w, operands=given) for k, (x, w, given) in zip(chain, arrays, strict=True)]


def test_what_is_supported():
    found = ops()
    feed, head, wide, narrow = (found[name] for name in ("feed", "head", "wide", "narrow"))
    assert all(
        chained.supports(feed if f else None, head if h else None, wide, narrow if n else None) for f, h, n in PARTS
    )
    assert not chained.supports(None, head, wide, None), "a head without a narrow product"
    assert not chained.supports(head, None, wide, None), "a feed of another shape"
    assert not chained.supports(None, None, wide, head), "a narrow product that is none of rows"
    wider = op_of(DOT, (1, 5, 5, 48), (48, 257), DTYPE)
    assert not chained.supports(None, None, wide, wider), "more sums than a program keeps"
    odd = op_of(DOT, (1, 5, 5, 24), (24, 48), DTYPE)
    assert not chained.supports(None, op_of(DOT, (1, 5, 5, 8), (8, 24), DTYPE), odd, narrow), "a head of 24 columns"
    turned = op_of(partial(lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ()))), (1, 5, 5, 48), (5, 24), DTYPE)
    assert not chained.supports(None, None, wide, turned), "another dimension is multiplied"
    assert not chained.supports(feed, head, wide, ops(jnp.float32)["narrow"])
