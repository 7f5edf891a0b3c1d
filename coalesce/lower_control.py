"""Loops and branches for many lanes: scan, while and cond rebuilt around the schedules of their regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from coalesce import jaxpr as J
from coalesce.bundle import Loop, Schedule
from coalesce.lanes import Banked, Env, InPacks, LaneValue, Origin, Part, plain, Shared, Stacked, stacked
from coalesce.slab import Picked, whole


@runtime_checkable
class Walk(Protocol):
    """What loops need of the walk that runs them."""

    def width(self, family: int) -> int: ...
    def read(self, env: Env, family: int, atom: J.Atom) -> LaneValue: ...
    def run(self, schedule: Schedule, env: Env) -> None: ...


def lower_loop(walk: Walk, loop: Loop, env: Env) -> list[LaneValue]:
    """The results of a control-flow equation for all lanes."""
    return RULES[loop.eqn.primitive.name](walk, loop, env)


def region(
    walk: Walk, loop: Loop, schedule: Schedule, jaxpr: Any, args: Sequence[LaneValue | InPacks]
) -> list[Shared | Stacked]:
    """Run the schedule of one region on its arguments."""
    pairs = zip(J.invars(jaxpr), args, strict=True)
    inner: Env = {(loop.family, var): value for var, value in pairs if not isinstance(value, InPacks)}
    walk.run(schedule, inner)
    return [plain(walk.read(inner, loop.family, atom)) for atom in J.outvars(jaxpr)]


def invariants(walk: Walk, loop: Loop, env: Env, atoms: Sequence[J.Atom]) -> list[LaneValue | InPacks]:
    """Operands that are the same in every step; among them may be weights that packs alone read."""
    unread = [not isinstance(a, J.Literal) and (loop.family, a) not in env for a in atoms]
    return [InPacks() if no else walk.read(env, loop.family, a) for a, no in zip(atoms, unread, strict=True)]


def operands(walk: Walk, loop: Loop, env: Env, atoms: Sequence[J.Atom]) -> list[LaneValue]:
    return [walk.read(env, loop.family, a) for a in atoms]


def as_flagged(values: Sequence[LaneValue], flags: Sequence[bool], lanes: int) -> list[Any]:
    """Raw arrays: [L, ...] where the flag is set, one lane's own elsewhere."""
    return [stacked(v, lanes) if flag else plain(v).value for v, flag in zip(values, flags, strict=True)]


def from_flags(values: Sequence[Any], flags: Sequence[bool]) -> list[LaneValue]:
    return [Stacked(v) if flag else Shared(v) for v, flag in zip(values, flags, strict=True)]


def scan(walk: Walk, loop: Loop, env: Env) -> list[LaneValue]:
    parts, lanes, flags = J.as_scan(loop.eqn), walk.width(loop.family), loop.varies
    consts = invariants(walk, loop, env, parts.consts)
    init = as_flagged(operands(walk, loop, env, parts.init), flags, lanes)
    xs = [one_value(walk.read(env, loop.family, a)) for a in parts.xs]
    scanned = not loop.unrolled  # what all lanes share; without a loop it is read where it lies
    y_flags: list[bool] = []

    def step(carry: Any, shared: Any) -> Any:
        i, values = carry
        at = parts.length - 1 - i if parts.reverse else i
        rest = iter(shared)
        x = [Shared(next(rest)) if isinstance(v, Shared) and scanned else step_of(v, at) for v in xs]
        outs = region(walk, loop, loop.bodies[0], parts.body, [*consts, *from_flags(values, flags), *x])
        new, ys = outs[: len(values)], outs[len(values) :]
        y_flags[:] = [isinstance(y, Stacked) for y in ys]
        return (i + 1, like(as_flagged(new, flags, lanes), values)), [y.value for y in ys]

    with J.context_of(loop.eqn):
        shared = [x.value for x in xs if isinstance(x, Shared) and scanned]
        start = (jnp.zeros((), jnp.int32), init)
        unroll = loop.unrolled or parts.unroll
        (_, carry), ys = lax.scan(step, start, shared, parts.length, parts.reverse, unroll)
    ys = [jnp.moveaxis(y, 1, 0) if flag else y for y, flag in zip(ys, y_flags, strict=True)]
    return from_flags(carry, flags) + from_flags(ys, y_flags)


def one_value(value: LaneValue) -> LaneValue:
    """A weight that all lanes share, as the shared value that it is; a part of a stack by itself."""
    one = isinstance(value, Part) or (isinstance(value, Banked) and len(set(value.rows)) == 1)
    return plain(value) if one else value


def step_of(value: LaneValue, at: Any) -> LaneValue:
    """What one iteration reads of a scanned value: a slice behind the lane axis, since to move the axis would copy the
    whole, which may be the weights of all layers."""
    if isinstance(value, Banked):
        picked = isinstance(value.array, Picked)
        return Banked(value.array.step(at) if picked else index_behind(whole(value.array), at), value.rows)
    own = plain(value)
    before = own.origin if own.origin and own.origin.at is None else None  # not of one step of another loop
    origin = replace(before or Origin(own.value), at=at)
    if isinstance(own, Shared):
        return Shared(index_behind(own.value[None], at)[0], origin)
    return Stacked(index_behind(own.value, at), origin)


def index_behind(x: Any, at: Any) -> Any:
    if x.shape[1] == 0:  # a loop of no steps: its body is traced and never run
        return jnp.zeros((x.shape[0], *x.shape[2:]), x.dtype)
    return lax.dynamic_index_in_dim(x, at, 1, keepdims=False)


def while_loop(walk: Walk, loop: Loop, env: Env) -> list[LaneValue]:
    assert not J.ends_by_row(loop.eqn), "inline leaves no loop that ends row by row"
    parts, lanes, flags = J.as_while(loop.eqn), walk.width(loop.family), loop.varies
    cond_consts = invariants(walk, loop, env, parts.cond_consts)
    body_consts = invariants(walk, loop, env, parts.body_consts)
    init = as_flagged(operands(walk, loop, env, parts.init), flags, lanes)

    def runs(carry: Any) -> Any:
        (go,) = region(walk, loop, loop.bodies[0], parts.cond, [*cond_consts, *from_flags(carry, flags)])
        return go

    def body(carry: Any) -> Any:
        outs = region(walk, loop, loop.bodies[1], parts.body, [*body_consts, *from_flags(carry, flags)])
        new = like(as_flagged(outs, flags, lanes), carry)
        if not loop.decides:
            return new
        go = stacked(runs(carry), lanes)  # lanes that are done keep what they have
        return [select(go, n, old) for n, old in zip(new, carry, strict=True)]

    def any_runs(carry: Any) -> Any:
        go = runs(carry)
        return jnp.any(go.value) if loop.decides else go.value

    with J.context_of(loop.eqn):
        return from_flags(lax.while_loop(any_runs, body, init), flags)


def cond(walk: Walk, loop: Loop, env: Env) -> list[LaneValue]:
    parts, lanes, flags = J.as_cond(loop.eqn), walk.width(loop.family), loop.varies
    args = invariants(walk, loop, env, parts.operands)
    index = plain(walk.read(env, loop.family, parts.index))

    def branch(i: int) -> Callable[[], list[Any]]:
        return lambda: as_flagged(region(walk, loop, loop.bodies[i], parts.branches[i], args), flags, lanes)

    branches = [branch(i) for i in range(len(loop.bodies))]
    with J.context_of(loop.eqn):
        if not loop.decides:
            return from_flags(lax.switch(index.value, branches), flags)
        which = jnp.clip(stacked(index, lanes), 0, len(branches) - 1)
        results = [run() for run in branches]  # every lane runs every branch and keeps its own
        chosen = [jax.vmap(pick)(which, *column) for column in zip(*results, strict=True)]
    return from_flags(chosen, flags)


def pick(index: Any, *cases: Any) -> Any:
    out = cases[0]
    for i, case in enumerate(cases[1:], 1):
        out = lax.select(jnp.broadcast_to(index == i, case.shape), case, out)
    return out


def select(lanes: Any, new: Any, old: Any) -> Any:
    return jax.vmap(lambda go, n, o: lax.select(jnp.broadcast_to(go, n.shape), n, o))(lanes, new, old)


def like(values: Sequence[Any], carry: Sequence[Any]) -> list[Any]:
    """Values with the weak types of the carry, which a loop must keep."""
    return [
        J.set_weak_type(v, bool(getattr(jax.typeof(c), "weak_type", False))) for v, c in zip(values, carry, strict=True)
    ]


RULES: dict[str, Callable[[Any, Loop, Any], list[LaneValue]]] = {"scan": scan, "while": while_loop, "cond": cond}
