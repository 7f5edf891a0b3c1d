"""Two packs and what lies between them, as one kernel. It reads its operands from what they are made of, where that is
little: a part of a product of queries, keys and values, a bias, a scale. Whoever made them otherwise is then unread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from coalesce import jaxpr as J
from coalesce.attended import Attended, regrouped
from coalesce.bundle import Attention, Bundle, items, Step
from coalesce.kernels import attention, mosaic_attention
from coalesce.kernels.attention import Dim, on_rows, Operand, Place, REDUCTIONS
from coalesce.kernels.epilogue import runs_on_tiles
from coalesce.kernels.platforms import by_platform
from coalesce.kernels.tiles import unnamed
from coalesce.lanes import Banked, Env, LaneValue, plain, Shared, Stacked
from coalesce.slab import Cut, Picked
from coalesce.tf32 import nearest

Made = Mapping[tuple[int, Any], J.Eqn]  # what makes a family's variable, where a kernel can do it as it reads

MOVES = ("broadcast_in_dim", "expand_dims", "reshape", "slice", "squeeze", "transpose")
DTYPES = {"float32", "bfloat16", "float16", "bool"}
MOST = 4  # arrays that an operand is made of


@runtime_checkable
class Walk(Protocol):
    made: Made

    def width(self, family: int) -> int: ...
    def read(self, env: Env, family: int, atom: J.Atom) -> LaneValue: ...


def made_in(bundle: Bundle) -> Made:
    steps = (item for item in items(bundle.schedule) if isinstance(item, Step) and not item.each)
    own = (s for s in steps if s.eqn.primitive.name in MOVES or made_of_tiles(s.eqn))
    return {(s.family, s.eqn.outvars[0]): s.eqn for s in own}


def made_of_tiles(eqn: J.Eqn) -> bool:
    """Whether it is elementwise work on values of one shape, on those of one row or column, and on numbers."""
    if not runs_on_tiles(eqn):
        return False
    out = J.shape(eqn.outvars[0])
    dtypes = {J.dtype(v) for v in [*eqn.invars, *eqn.outvars]}
    fit = (J.shape(a) == () or (not isinstance(a, J.Literal) and len(J.shape(a)) == len(out)) for a in eqn.invars)
    return len(out) > 0 and dtypes <= DTYPES and all(fit)


def lower_attention(walk: Walk, item: Attention, env: Env) -> tuple[J.Eqn, list[LaneValue]]:
    """The last equation, and its result."""
    scores, values = item.scores.members[0], item.values.members[0]
    f, lanes = scores.family, walk.width(scores.family)
    made = Attended(scores.op, scores.eqn.outvars[0])
    for step in item.rowwise:
        followed = made.follow(step.eqn)
        assert followed, f"no work on rows: {step.eqn}"
    last = item.after[-1].eqn if item.after else values.eqn
    left = values.eqn.invars[0] in made.of  # the weights, which are turned on the right otherwise
    found = made.values(values.op, values.eqn.invars[not left], left)
    assert found is not None, f"no product along rows: {values.eqn}"
    multiplied, dims = found
    tiles: list[tuple[J.Atom, Sequence[Dim]]] = [
        (scores.eqn.invars[0], made.left),
        (scores.eqn.invars[1], made.right),
        (values.eqn.invars[left], multiplied),
        *made.reads.items(),
    ]
    for step in item.after:
        dims = tuple(dims[d] for d in step.eqn.params["permutation"])
    out = J.aval_struct(last.outvars[0].aval)
    target = Place(jax.ShapeDtypeStruct((lanes, *out.shape), out.dtype), dims)
    work = partial(rowwise, item, list(made.reads), values.eqn.invars[not left])
    product = replace(unnamed(scores.op), m=made.rows)
    what = attention.Attention(product, unnamed(values.op), values.op.n if left else values.op.m, work, made.sizes)
    what = replace(what, finish=nearest) if item.rounds else what

    # By TMA what is multiplied is fetched as it lies; the rest is read by registers all the same.
    operands = [operand(walk, env, f, *tile, arithmetic=i > 2 or not item.by_tma) for i, tile in enumerate(tiles)]
    by_tma = item.by_tma and mosaic_attention.supports(what, operands, target)
    if item.by_tma and not by_tma:
        operands = [operand(walk, env, f, *tile) for tile in tiles]

    def by(kernel: Callable[..., Any], arrays: Sequence[Sequence[Any]]) -> Any:
        given = [with_arrays(own, found) for own, found in zip(operands, arrays, strict=True)]
        return kernel(what, given, target, lanes)

    def run(arrays: Sequence[Sequence[Any]]) -> Any:
        if not by_tma:
            return by(attention.run, arrays)
        on_cuda, elsewhere = partial(by, mosaic_attention.run), partial(by, attention.run)
        return by_platform(arrays, cuda=on_cuda, default=elsewhere)

    name = f"{'superkernel' if lanes > 1 else 'alone'}{item.values.index}_attention"
    run.__name__ = run.__qualname__ = name
    with J.context_of(values.eqn), jax.named_scope(name):
        result = jax.jit(run)([own.arrays for own in operands])
    return last, [Stacked(result) if lanes > 1 else Shared(result.reshape(out.shape))]


def rowwise(
    item: Attention,
    reads: Sequence[J.Var],
    end: J.Atom,
    scores: Sequence[Any],
    given: Sequence[Sequence[Any]],
    valid: Sequence[Any],
    rows: Any,
) -> Iterator[Any]:
    """What becomes of scores, which come in tiles of some columns each, with tiles of what it reads besides. Of a tile
    all is computed before the next, so that little is kept, but for what is a number for each row."""
    made = {step.eqn.outvars[0]: step.eqn for step in item.rowwise}
    numbers = set[Any]()
    for v, eqn in made.items():
        one = all(isinstance(a, J.Literal) or a in numbers for a in eqn.invars)
        numbers |= {v} if one or eqn.primitive.name in REDUCTIONS else set()
    known: dict[tuple[Any, int], Any] = {(item.scores.members[0].eqn.outvars[0], i): x for i, x in enumerate(scores)}
    known |= {(v, i): as_read(x, v) for v, tiles in zip(reads, given, strict=True) for i, x in enumerate(tiles)}

    def value(atom: J.Atom, i: int) -> Any:
        if isinstance(atom, J.Literal):
            return J.literal_value(atom)
        key = atom, 0 if atom in numbers else i
        if key not in known:
            known[key] = computed(made[atom], i)
        return known[key]

    def computed(eqn: J.Eqn, i: int) -> Any:
        if eqn.primitive.name in REDUCTIONS:  # a number may stand for all of its row
            whole = [rows.spread(value(eqn.invars[0], i), x.shape) for i, x in enumerate(scores)]
            return rows.reduced(eqn, whole, valid)
        args = [value(a, i) for a in eqn.invars]
        # the second product is told of a transposition
        return args[0] if eqn.primitive.name == "transpose" else rows.on(eqn, args)

    assert not isinstance(end, J.Literal), "what is multiplied by values came of scores"
    for i, x in enumerate(scores):
        yield rows.spread(value(end, i), x.shape)


def operand(walk: Walk, env: Env, family: int, atom: J.Atom, dims: Sequence[Dim], arithmetic: bool = True) -> Operand:
    """How a tile of a value is read: `dims` says what its dimensions count. From what it was moved from, or of what
    little it was made of, where that is there; without `arithmetic` of a value and numbers alone."""
    reader = Reader(walk, env, family, arithmetic)
    make = reader.read(atom, dims, [0] * len(dims))
    if len(reader.places) > MOST:
        reader = Reader(walk, env, family, arithmetic)
        make = reader.leaf(atom, dims, [0] * len(dims))
    return Operand(tuple(reader.places), make if reader.made else None)


class Reader:
    """Finds what an operand is made of; gives how to make its tile of theirs."""

    def __init__(self, walk: Walk, env: Env, family: int, arithmetic: bool = True) -> None:
        self.walk, self.env, self.family, self.arithmetic = walk, env, family, arithmetic
        self.lanes = walk.width(family)
        self.places: list[Place] = []
        self.made = False

    def read(self, atom: J.Atom, dims: Sequence[Dim], starts: Sequence[int]) -> Callable[[Sequence[Any]], Any]:
        if isinstance(atom, J.Literal):
            self.made = True
            return lambda tiles: number(atom)
        if len(self.places) > MOST:  # already too many: what reads a value twice, over and over, would never end
            return self.leaf(atom, dims, starts)
        eqn = self.walk.made.get((self.family, atom))
        if eqn is None or not all(isinstance(a, J.Literal) or (self.family, a) in self.env for a in eqn.invars):
            return self.leaf(atom, dims, starts)
        source, *rest = eqn.invars
        match eqn.primitive.name:
            case "transpose":
                order = [eqn.params["permutation"].index(i) for i in range(len(dims))]
                return self.read(source, [dims[i] for i in order], [starts[i] for i in order])
            case "slice" if set(eqn.params["strides"] or (1,)) == {1}:
                return self.read(
                    source, dims, [a + b for a, b in zip(starts, eqn.params["start_indices"], strict=True)]
                )
            case "broadcast_in_dim" if not rest:
                kept, sizes = eqn.params["broadcast_dimensions"], J.shape(source)
                one = [size == 1 for size in sizes]
                own = [None if single else dims[at] for at, single in zip(kept, one, strict=True)]
                return self.read(source, own, [0 if x else starts[at] for at, x in zip(kept, one, strict=True)])
        several = sum(prod(J.shape(a)) > 1 for a in eqn.invars) > 1
        if eqn.primitive.name in ("reshape", "expand_dims", "squeeze") and not any(starts):
            own = regrouped(tuple(dims), J.shape(atom), J.shape(source))
            return self.leaf(atom, dims, starts) if own is None else self.read(source, own, [0] * len(own))
        if eqn.primitive.name in MOVES or (several and not self.arithmetic):
            return self.leaf(atom, dims, starts)
        args = [self.read(a, *self.one_for_all(a, dims, starts)) for a in eqn.invars]
        self.made = True
        return lambda tiles: on_rows(eqn, [as_read(arg(tiles), a) for arg, a in zip(args, eqn.invars, strict=True)])

    @staticmethod
    def one_for_all(atom: J.Atom, dims: Sequence[Dim], starts: Sequence[int]) -> tuple[list[Dim], list[int]]:
        """What an elementwise equation's operand counts: nothing in dimensions of size one."""
        sizes = J.shape(atom)
        own = [dim if size > 1 else None for size, dim in zip(sizes, dims, strict=False)]
        return own, [start if size > 1 else 0 for size, start in zip(sizes, starts, strict=False)]

    def leaf(self, atom: J.Atom, dims: Sequence[Dim], starts: Sequence[int]) -> Callable[[Sequence[Any]], Any]:
        value = self.walk.read(self.env, self.family, atom)
        own_rows = isinstance(value, Banked) and value.rows == tuple(range(self.lanes))
        if isinstance(value, Banked) and own_rows and J.dtype(atom) != "bool":
            return self.placed(in_bank(value.array, dims, starts))
        value = plain(value)
        by_lane, array = isinstance(value, Stacked), jnp.asarray(value.value)
        if array.dtype == bool:
            array = array.astype(jnp.int8)  # kernels load no truth values
        if array.shape == ():
            array, dims, starts = array.reshape(1), [None], [0]
        return self.placed(Place(array, tuple(dims), by_lane, tuple(starts)))

    def placed(self, place: Place) -> Callable[[Sequence[Any]], Any]:
        at = len(self.places)
        self.places.append(place)
        return lambda tiles: tiles[at]


def number(literal: J.Literal) -> Any:
    """As a tile: what is computed of numbers alone is computed by the kernel too, and no backend takes plain ones."""
    return jnp.full((1, 1), J.literal_value(literal), J.dtype(literal))


def in_bank(array: Any, dims: Sequence[Dim], starts: Sequence[int]) -> Place:
    """Where weights lie, of which each lane reads a row of its own."""
    slots = array.slots if isinstance(array, Picked) else None
    lies = array.array if isinstance(array, Picked) else array
    if isinstance(lies, Cut):
        return Place(lies.slab, tuple(dims), True, tuple(starts), (lies.start, lies.shape), slots)
    return Place(lies, tuple(dims), True, tuple(starts), None, slots)


def with_arrays(operand: Operand, arrays: Sequence[Any]) -> Operand:
    found, places = iter(arrays), []
    for place in operand.places:
        array = next(found)
        places.append(replace(place, array=array, slots=None if place.slots is None else next(found)))
    return replace(operand, places=tuple(places))


def as_read(x: Any, atom: J.Atom) -> Any:
    """A tile in the dtype of its value."""
    return x != 0 if J.dtype(atom) == "bool" and jnp.asarray(x).dtype != bool else x
