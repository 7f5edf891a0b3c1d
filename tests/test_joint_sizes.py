"""Random equations at random sizes: what runs jointly is what each is alone, whatever lies in the padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from coalesce import jaxpr as J
from coalesce.joint import joins, moves_apart
from tests.programs import Aval, Draw, many_compiles
from tests.stacked import check_joint, cut, equation, reshape_to, Shape

F32, I32, BOOL = jnp.float32, jnp.int32, jnp.bool_


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


def elementwise(pick: Draw, rank: int) -> Callable[[Draw], J.Eqn]:
    fn = pick.choice([lax.add, lax.div, lax.max])
    ones = [pick.choice([None, None, pick.integer(0, 1)]) for _ in range(rank)]  # which operand has one element there

    def draw(pick: Draw) -> J.Eqn:
        sizes = [pick.integer(1, 4) for _ in range(rank)]
        shapes = [tuple(1 if one == k else s for one, s in zip(ones, sizes, strict=True)) for k in range(2)]
        return equation(fn, *shapes)

    return draw


def broadcast(pick: Draw, rank: int) -> Callable[[Draw], J.Eqn]:
    kept = sorted(pick.sample(range(1, rank + 1), pick.integer(0, rank)))
    repeated = {d for d in kept if pick.flag()}

    def draw(pick: Draw) -> J.Eqn:
        out = shape_of(pick, rank + 1)
        shape = tuple(1 if d in repeated else out[d] for d in kept)
        return equation(lambda x: lax.broadcast_in_dim(x, out, kept), shape)

    return draw


def reshape(pick: Draw, rank: int) -> Callable[[Draw], J.Eqn]:
    """Factors, grouped in one way before and in another after."""
    before, after = ([pick.flag() for _ in range(rank - 1)] for _ in range(2))
    free = {pick.integer(0, rank - 1) for _ in range(pick.integer(0, 2))}
    fixed = [pick.integer(1, 3) for _ in range(rank)]

    def merged(factors: Sequence[int], joined: Sequence[bool]) -> Shape:
        shape = [factors[0]]
        for factor, join in zip(factors[1:], joined, strict=True):
            shape = [*shape[:-1], shape[-1] * factor] if join else [*shape, factor]
        return tuple(shape)

    def draw(pick: Draw) -> J.Eqn:
        factors = [pick.integer(1, 4) if d in free else fixed[d] for d in range(rank)]
        new = merged(factors, after)
        return equation(lambda x: reshape_to(x, new), merged(factors, before))

    return draw


def moved(pick: Draw, rank: int) -> Callable[[Draw], J.Eqn]:
    order = pick.shuffled(range(rank))
    return lambda pick: equation(lambda x: lax.transpose_p.bind(x, permutation=tuple(order)), shape_of(pick, rank))


def sliced(pick: Draw, rank: int) -> Callable[[Draw], J.Eqn]:
    # Where to begin, how far apart, and how many at the end are left out.
    cuts = {d: (pick.integer(0, 1), pick.integer(1, 2), pick.integer(0, 1)) for d in range(rank) if pick.flag()}
    fixed = shape_of(pick, rank, 3)

    def draw(pick: Draw) -> J.Eqn:
        shape = tuple(fixed[d] if d in cuts and pick.integer(0, 3) else pick.integer(3, 5) for d in range(rank))
        start = [cuts.get(d, (0, 1, 0))[0] for d in range(rank)]
        strides = [cuts.get(d, (0, 1, 0))[1] for d in range(rank)]
        limit = [s - cuts[d][2] if d in cuts else s for d, s in enumerate(shape)]
        return equation(lambda x: cut(x, start, limit, strides), shape)

    return draw


REDUCTIONS = [
    *((fn, F32) for fn in (lax.reduce_sum, lax.reduce_prod, lax.reduce_max, lax.reduce_min)),
    *((fn, I32) for fn in (lax.reduce_sum, lax.reduce_prod, lax.reduce_max, lax.reduce_min)),
    *((fn, dtype) for fn in (lax.reduce_and, lax.reduce_or) for dtype in (I32, BOOL)),
]


def reduced(pick: Draw, rank: int) -> Callable[[Draw], J.Eqn]:
    axes = tuple(sorted(pick.sample(range(rank), pick.integer(1, rank))))
    fn, dtype = pick.choice(REDUCTIONS)
    return lambda pick: equation(lambda x: fn(x, axes), Aval(shape_of(pick, rank), dtype))


def windowed(pick: Draw, rank: int) -> Callable[[Draw], J.Eqn]:
    kinds = [pick.integer(0, 1) for _ in range(rank)]
    window, fixed = tuple(1 + k for k in kinds), shape_of(pick, rank, 2)
    strides = tuple(pick.integer(1, 1 + k) for k in kinds)
    padding = [(k, 0) for k in kinds]
    init, fn = pick.choice([(0.0, lax.add), (-np.inf, lax.max), (np.inf, lax.min)])

    def draw(pick: Draw) -> J.Eqn:
        shape = tuple(n if k and pick.integer(0, 3) else pick.integer(2, 5) for n, k in zip(fixed, kinds, strict=True))
        return equation(lambda x: lax.reduce_window(x, init, fn, window, strides, padding), shape)

    return draw


def shape_of(pick: Draw, rank: int, least: int = 1) -> Shape:
    return tuple(pick.integer(least, least + 3) for _ in range(rank))


DRAWN = (elementwise, broadcast, reshape, reshape, moved, sliced, reduced, reduced, windowed)


@settings(max_examples=settings().max_examples // 2)
@given(st.sampled_from(DRAWN), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_whatever_joins_is_what_each_is_alone(kind, rank, seed):
    pick = Draw(seed)
    draw = kind(pick, rank)
    eqns = [draw(pick) for _ in range(pick.integer(2, 3))]
    if joins(eqns) and not moves_apart(eqns):
        check_joint(eqns, [pick.integer(1, 2) for _ in eqns], seed)


@pytest.mark.parametrize("kind", dict.fromkeys(DRAWN))
def test_drawn_equations_join_at_other_sizes(kind):
    """So that the property above is not empty."""
    found = 0
    for seed in range(100):
        pick = Draw(seed)
        draw = kind(pick, pick.integer(1, 4))
        eqns = [draw(pick) for _ in range(2)]
        shapes = [[a.aval.shape for a in eqn.invars] for eqn in eqns]
        found += shapes[0] != shapes[1] and joins(eqns) and not moves_apart(eqns)
    assert found >= 20, f"{found} of 100"
