"""Bundle -> one JAX function `(bank, inputs) -> outputs`, by interpreting the schedule.

`jax.jit` traces the walk: superkernels become named calls in the jaxpr, every other equation is bound again, for all
lanes at once, under the context and source line that it was traced with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from coalesce import jaxpr as J
from coalesce.bundle import Bundle, Fold, fold, Loop, Member, Pack, Schedule, Step
from coalesce.kernels import KERNELS
from coalesce.lanes import (
    apply,
    apply_each,
    Banked,
    Env,
    from_lanes,
    LaneValue,
    read_bank,
    Shared,
    Stacked,
    take,
)
from coalesce.layout import Layout
from coalesce.lower_control import lower_loop


def lower(
    bundle: Bundle, backend: str | None = None
) -> Callable[[Sequence[Any], Sequence[Sequence[Any]]], list[list[Any]]]:
    """The fused function: (an array for each of bundle.arrays, each tenant's flat inputs) -> each tenant's outputs.

    `backend` is what it will run on, the default backend unless given.
    """
    backend = backend or jax.default_backend()

    def fused(bank: Sequence[Any], inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        walk = Walk(bundle, bank)
        env: Env = {}
        for f, family in enumerate(bundle.families):
            for w, var in enumerate(family.weights):
                if (f, w) in bundle.stored:
                    env[f, var] = Banked(bank[bundle.stored[f, w]], family.rows[w])
            for i, var in enumerate(family.inputs):
                env[f, var] = from_lanes([inputs[ln.tenant][ln.inputs[i]] for ln in family.lanes])
        walk.run(bundle.schedule, env)
        outputs: list[list[Any]] = [[] for _ in bundle.tenants]
        for f, family in enumerate(bundle.families):
            results = [read_bank(walk.read(env, f, atom)) for atom in J.outvars(family.jaxpr)]
            for ln, values in zip(family.lanes, by_lane(results, family.width, backend), strict=True):
                outputs[ln.tenant] = values
        return outputs

    return fused


# Kernels that run one op as its equation does.
AS_WRITTEN = ("batched_dot", "separate")

# Results up to this size are handed out by one small kernel on a CPU; larger ones deserve several threads.
SMALL_RESULTS = 1 << 20


def by_lane(results: Sequence[Shared | Stacked], lanes: int, backend: str) -> list[list[Any]]:
    """Each lane's own results."""

    def split(stacks: Sequence[Any]) -> list[list[Any]]:
        return [[x[i] for x in stacks] for i in range(lanes)]

    stacks = [r.value for r in results if isinstance(r, Stacked)]
    if backend == "cpu" and stacks and sum(J.nbytes(x) for x in stacks) <= SMALL_RESULTS:
        with J.cpu_small_call():
            parts = jax.jit(split)(stacks)
    else:
        parts = split(stacks)
    rest = [iter(part) for part in parts]
    return [[next(rest[i]) if isinstance(r, Stacked) else r.value for r in results] for i in range(lanes)]


class Walk:
    """Runs schedules. Scopes are environments: {(family, variable): value}."""

    def __init__(self, bundle: Bundle, bank: Sequence[Any]) -> None:
        self.bundle, self.bank = bundle, bank

    def width(self, family: int) -> int:
        return self.bundle.families[family].width

    def read(self, env: Env, family: int, atom: J.Atom) -> LaneValue:
        return Shared(J.literal_value(atom)) if isinstance(atom, J.Literal) else env[family, atom]

    def run(self, schedule: Schedule, env: Env) -> None:
        """Bind what every item of the schedule computes."""
        for item in schedule:
            match item:
                case Pack():
                    self.pack(item, env)
                case Step(family, _, eqn, each):
                    args = [self.read(env, family, a) for a in eqn.invars]
                    outs = apply_each(eqn, args, self.width(family)) if each else apply(eqn, args)
                    self.bind(env, family, eqn, outs)
                case Loop(family, _, eqn):
                    self.bind(env, family, eqn, lower_loop(self, item, env))

    def bind(self, env: Env, family: int, eqn: J.Eqn, outs: Sequence[LaneValue]) -> None:
        env.update(((family, v), out) for v, out in zip(eqn.outvars, outs, strict=True) if not J.is_drop(v))

    def pack(self, pack: Pack, env: Env) -> None:
        if pack.width == 1 and pack.kernel in AS_WRITTEN:  # nothing to stack: the tenant's own equation
            (m,) = pack.members
            lhs, rhs = m.eqn.invars
            weights = Banked(self.bank[pack.array], (0,)) if pack.array is not None else self.read(env, m.family, rhs)
            self.bind(env, m.family, m.eqn, apply(m.eqn, [self.read(env, m.family, lhs), weights]))
            return
        folds = [fold(m, self.bundle.families[m.family]) for m in pack.members]
        lhs = [self.left(m, how, env) for m, how in zip(pack.members, folds, strict=True)]
        op, kernel = pack.members[0].op, KERNELS[pack.kernel]
        if pack.array is not None:
            rhs = self.bank[pack.array]
        else:
            rhs = joined([self.right(m, kernel.layout(m.op), env) for m in pack.members])

        def run(x: Any, w: Any) -> Any:
            return kernel.run(op, x, w)

        run.__name__ = run.__qualname__ = pack.name
        with J.context_of(pack.members[0].eqn), jax.named_scope(pack.name):
            out = jax.jit(run)(joined(lhs), rhs)
        start = 0
        for m, how in zip(pack.members, folds, strict=True):
            self.bind(env, m.family, m.eqn, [unfolded(out[start : start + how.groups], m, how)])
            start += how.groups

    def left(self, member: Member, how: Fold, env: Env) -> Any:
        """The left operand as [groups, per_group, ...]."""
        value = read_bank(self.read(env, member.family, member.eqn.invars[0]))
        if isinstance(value, Shared):
            return jnp.broadcast_to(value.value, (how.groups, 1, *jnp.shape(value.value)))
        x = take(value.value, [i for group in how.order for i in group])
        return x.reshape(how.groups, how.per_group, *x.shape[1:])

    def right(self, member: Member, layout: Layout, env: Env) -> Any:
        """A right operand that is no weight, as [groups, ...] in the kernel's layout."""
        value = read_bank(self.read(env, member.family, member.eqn.invars[1]))
        x = value.value[None] if isinstance(value, Shared) else value.value
        return jax.vmap(layout)(x)


def joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def unfolded(out: Any, member: Member, how: Fold) -> LaneValue:
    flat = out.reshape(how.groups * how.per_group, *out.shape[2:])
    if not (member.lhs_varies or member.rhs_varies):
        return Shared(flat[0])
    return Stacked(take(flat, how.place)) if member.width > 1 else Shared(flat[0])
