"""Scans of several families as one loop: each step runs one schedule for the bodies of all.

The loop runs as often as the longest scan. One that is shorter keeps its carry from its own end on, and what it would
have scanned out after that is cut off. Carries that every body leaves as one stack stay stacked from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from coalesce import jaxpr as J
from coalesce.bundle import JointLoop, Loop
from coalesce.lanes import Env, InPacks, join, Joint, LaneValue, plain, Stacked
from coalesce.lower_control import (
    as_flagged,
    from_flags,
    invariants,
    like,
    one_value,
    operands,
    select,
    step_of,
    Walk,
)
from coalesce.unify import largest


def lower_scans(walk: Walk, joint: JointLoop, env: Env) -> list[list[LaneValue]]:
    """The results of several scans that run as one."""
    parts, body, together = joint.parts, joint.body, joint.stacked
    scans = [ScanPart(walk, loop, {row[p] for row in together}, env) for p, loop in enumerate(parts)]
    length, lanes = max(s.scan.length for s in scans), tuple(s.lanes for s in scans)
    bodies = [s.scan.body for s in scans]
    shapes = [tuple(J.shape(J.outvars(b)[k]) for b, k in zip(bodies, row, strict=True)) for row in together]

    def carried(row: Sequence[int]) -> list[LaneValue]:
        return [walk.read(env, s.loop.family, s.scan.init[k]) for s, k in zip(scans, row, strict=True)]

    inits = list(map(carried, together))
    stacks = [join(values, lanes, largest(own)).value for values, own in zip(inits, shapes, strict=True)]
    ends = np.repeat(np.asarray([s.scan.length for s in scans], np.int32), lanes)

    def step(carry: Any, _: Any) -> Any:
        i, stacks, values = carry
        inner: Env = {}
        for s, own in zip(scans, values, strict=True):
            inner |= s.arguments(own, jnp.clip(s.scan.length - 1 - i if s.scan.reverse else i, 0, s.scan.length - 1))
        for row, stack, own in zip(together, stacks, shapes, strict=True):
            for s, k, part in zip(scans, row, Joint(stack, lanes, own).parts(), strict=True):
                inner[s.loop.family, J.invars(s.scan.body)[len(s.scan.consts) + k]] = part
        walk.run(body, inner)
        new_stacks = []
        for row, old, own in zip(together, stacks, shapes, strict=True):
            outs = [walk.read(inner, s.loop.family, J.outvars(s.scan.body)[k]) for s, k in zip(scans, row, strict=True)]
            new = join(outs, lanes, largest(own)).value
            new_stacks.append(new if min(ends) == length else select(i < ends, new, old))
        new_values, ys = [], []
        for s, own in zip(scans, values, strict=True):
            new, y = s.results(inner)
            if s.scan.length < length:
                new = [
                    lax.select(jnp.broadcast_to(i < s.scan.length, n.shape), n, o)
                    for n, o in zip(new, own, strict=True)
                ]
            new_values.append(new)
            ys.append(y)
        return (i + 1, new_stacks, new_values), ys

    first = scans[0].scan
    unroll = joint.unrolled or (first.unroll if all(s.scan.unroll == first.unroll for s in scans) else 1)
    with J.context_of(parts[0].eqn):
        start = (jnp.zeros((), jnp.int32), stacks, [s.init for s in scans])
        (_, stacks, values), ys = lax.scan(step, start, None, length, first.reverse, unroll)
    ended = [Joint(stack, lanes, own).parts() for stack, own in zip(stacks, shapes, strict=True)]
    results: list[list[LaneValue]] = []
    for p, s in enumerate(scans):
        carry = dict(zip(s.own, from_flags(values[p], [s.flags[k] for k in s.own]), strict=True))
        carry |= {row[p]: stack[p] for row, stack in zip(together, ended, strict=True)}
        at = length - s.scan.length if s.scan.reverse else 0
        own_ys = [lax.slice_in_dim(y, at, at + s.scan.length) for y in ys[p]]
        results.append([*(carry[k] for k in range(len(s.flags))), *s.stacked_ys(own_ys)])
    return results


class ScanPart:
    """One of several scans that run as one: its arguments and results in a step."""

    def __init__(self, walk: Walk, loop: Loop, together: set[int], env: Env) -> None:
        self.walk, self.loop, self.scan = walk, loop, J.as_scan(loop.eqn)
        self.lanes, self.flags = walk.width(loop.family), loop.varies
        self.own = [k for k in range(len(self.flags)) if k not in together]  # carries that are no part of a stack
        self.consts = invariants(walk, loop, env, self.scan.consts)
        init = operands(walk, loop, env, [self.scan.init[k] for k in self.own])
        self.init = as_flagged(init, [self.flags[k] for k in self.own], self.lanes)
        self.xs = [one_value(walk.read(env, loop.family, a)) for a in self.scan.xs]
        self.y_flags: list[bool] = []

    def arguments(self, carry: Sequence[Any], at: Any) -> Env:
        """The body's arguments, but for the carries of stacks."""
        args, c, n = J.invars(self.scan.body), len(self.scan.consts), len(self.flags)
        values: list[tuple[Any, LaneValue | InPacks]] = list(zip(args[:c], self.consts, strict=True))
        own = from_flags(carry, [self.flags[k] for k in self.own])
        values += zip((args[c + k] for k in self.own), own, strict=True)
        values += [(arg, step_of(x, at)) for arg, x in zip(args[c + n :], self.xs, strict=True)]
        return {(self.loop.family, arg): value for arg, value in values if not isinstance(value, InPacks)}

    def results(self, inner: Env) -> tuple[list[Any], list[Any]]:
        """(the next carries of its own, the ys)."""
        outs = [self.walk.read(inner, self.loop.family, atom) for atom in J.outvars(self.scan.body)]
        before = [self.flags[k] for k in self.own]
        new = as_flagged([outs[k] for k in self.own], before, self.lanes)
        ys = [plain(y) for y in outs[len(self.flags) :]]
        self.y_flags = [isinstance(y, Stacked) for y in ys]
        return like(new, self.init), [y.value for y in ys]

    def stacked_ys(self, ys: Sequence[Any]) -> list[LaneValue]:
        """Scanned results with their lane axis in front."""
        moved = [jnp.moveaxis(y, 1, 0) if flag else y for y, flag in zip(ys, self.y_flags, strict=True)]
        return from_flags(moved, self.y_flags)
