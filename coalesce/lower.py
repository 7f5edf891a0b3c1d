"""Bundle -> one JAX function `(bank, inputs) -> outputs`, by interpreting the schedule.

`jax.jit` traces the walk: superkernels become named calls in the jaxpr, every other equation is bound again, for all
lanes at once, under the context and source line that it was traced with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from coalesce import jaxpr as J
from coalesce.bundle import (
    arguments,
    Attention,
    Bundle,
    JointLoop,
    JointStep,
    Loop,
    Pack,
    place_of,
    Rowwise,
    Schedule,
    Step,
    units,
)
from coalesce.epilogues import epilogue_reads, result_of
from coalesce.joint import moves_apart, rows_of_parts, run
from coalesce.lanes import (
    apply,
    apply_each,
    Banked,
    Env,
    from_lanes,
    in_tf32,
    join,
    Joint,
    LaneValue,
    Part,
    plain,
    Shared,
    Stacked,
    stacked,
    take,
)
from coalesce.lower_attention import lower_attention, made_in
from coalesce.lower_control import lower_loop
from coalesce.lower_pack import lower_packs, Operands
from coalesce.lower_results import by_lane
from coalesce.lower_rows import lower_rows
from coalesce.lower_scans import lower_scans
from coalesce.lower_shifts import lower_in_shifts
from coalesce.slab import Cut, whole
from coalesce.strided import in_place, slices_in
from coalesce.unify import largest


def lower(
    bundle: Bundle, backend: str | None = None
) -> Callable[[Sequence[Any], Sequence[Sequence[Any]]], list[list[Any]]]:
    """The fused function: (an array for each of arguments(bundle), each tenant's flat inputs) -> each tenant's outputs.

    `backend` is what it will run on, the default backend unless given.
    """
    backend = backend or jax.default_backend()

    def fused(bank: Sequence[Any], inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        given = [
            [from_lanes([inputs[ln.tenant][ln.inputs[i]] for ln in family.lanes]) for i in range(len(family.inputs))]
            for family in bundle.families
        ]
        outputs: list[list[Any]] = [[] for _ in bundle.tenants]
        results_of = evaluated(bundle, arrays_in(bundle, bank), given, range(len(bundle.families)))
        for family, results in zip(bundle.families, results_of, strict=True):
            for ln, values in zip(family.lanes, by_lane(results, family.width, backend), strict=True):
                outputs[ln.tenant] = values
        return outputs

    return fused


def lower_stacked(
    bundle: Bundle, families: Sequence[int] | None = None
) -> Callable[[Sequence[Any], Sequence[Sequence[Any]]], list[list[Any]]]:
    """The same for lanes that stay stacked: (bank, inputs [L,...] of each family) -> outputs [L,...] of each family; or
    of `families` alone, which share nothing with the others."""

    def fused(bank: Sequence[Any], inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return run_stacked(bundle, arrays_in(bundle, bank), inputs, families)

    return fused


def run_stacked(
    bundle: Bundle, arrays: Sequence[Any], inputs: Sequence[Sequence[Any]], families: Sequence[int] | None = None
) -> list[list[Any]]:
    """(what lies where each of `bundle.arrays` is, inputs [L,...] of each family) -> outputs [L,...] of each family, or
    of some that share nothing with the others."""
    given: list[list[Shared | Stacked]] = [
        [Stacked(x) if family.width > 1 else Shared(x.reshape(x.shape[1:])) for x in own]
        for family, own in zip(bundle.families, inputs, strict=True)
    ]
    wanted = range(len(bundle.families)) if families is None else families
    outputs = zip(wanted, evaluated(bundle, arrays, given, wanted), strict=True)
    return [[stacked(value, bundle.families[f].width) for value in results] for f, results in outputs]


def evaluated(
    bundle: Bundle, arrays: Sequence[Any], inputs: Sequence[Sequence[Shared | Stacked]], wanted: Sequence[int]
) -> list[list[Shared | Stacked]]:
    """The outputs of the families that are wanted, from the inputs of all; `arrays` are those of the bundle: whole, cut
    or picked."""
    if len(wanted) < len(bundle.families):
        bundle = only(bundle, wanted)
    walk = Walk(bundle, arrays)
    env: Env = {}
    for f, (family, given) in enumerate(zip(bundle.families, inputs, strict=True)):
        for w, var in enumerate(family.weights):
            if (f, w) in bundle.stored:
                env[f, var] = Banked(arrays[bundle.stored[f, w]], family.rows[w])
        env.update(((f, var), value) for var, value in zip(family.inputs, given, strict=True))
    walk.run_parts(env)
    return [[plain(walk.read(env, f, atom)) for atom in J.outvars(bundle.families[f].jaxpr)] for f in wanted]


def only(bundle: Bundle, families: Sequence[int]) -> Bundle:
    """With nothing to run for others."""
    assert len(bundle.starts) == 1, "families are taken apart where they are one executable"
    schedule = tuple(item for item in bundle.schedule if place_of(item)[0] in families)
    return replace(bundle, schedule=schedule)


def arrays_in(bundle: Bundle, bank: Sequence[Any]) -> list[Any]:
    """Each of `bundle.arrays`, as it lies in the bank: an array, or a `Cut` of a slab."""
    found: dict[int, Any] = {}
    for slab, argument in zip(arguments(bundle), bank, strict=True):
        for array, start in zip(slab.arrays, slab.starts, strict=True):
            found[array] = argument if len(slab.arrays) == 1 else Cut(argument, start, bundle.arrays[array].shape)
    return [found[i] for i in range(len(bundle.arrays))]


def part_name(part: int) -> str:
    """The scope of what an executable runs."""
    return f"executable{part}"


# Kernels that run one op as its equation does.
AS_WRITTEN = ("batched_dot", "separate")


class Walk:
    """Runs schedules. Scopes are environments: {(family, variable): value}."""

    def __init__(self, bundle: Bundle, arrays: Sequence[Any]) -> None:
        self.bundle, self.arrays = bundle, arrays
        self.slices = slices_in(bundle)
        self.made = made_in(bundle)

    def of(self, bundle: Bundle, arrays: Sequence[Any], /) -> Walk:
        return Walk(bundle, arrays)

    def width(self, family: int) -> int:
        return self.bundle.families[family].width

    def read(self, env: Env, family: int, atom: J.Atom) -> LaneValue:
        return Shared(J.literal_value(atom)) if isinstance(atom, J.Literal) else env[family, atom]

    def run_parts(self, env: Env) -> None:
        """The bundle's schedule. What each of several executables runs is marked as its own, by a named scope."""
        starts = self.bundle.starts
        if len(starts) == 1:
            self.run(self.bundle.schedule, env)
            return
        for part, (start, end) in enumerate(zip(starts, [*starts[1:], len(self.bundle.schedule)], strict=True)):
            with jax.named_scope(part_name(part)):
                self.run(self.bundle.schedule[start:end], env)

    def run(self, schedule: Schedule, env: Env) -> None:
        """Bind what every item of the schedule computes."""
        for unit in units(schedule):
            match item := unit[0]:
                case Pack():
                    self.packs([pack for pack in unit if isinstance(pack, Pack)], env)
                case Step(family, _, eqn, each):
                    args = [self.read(env, family, a) for a in eqn.invars]
                    outs = apply_each(eqn, args, self.width(family)) if each else apply(eqn, args)
                    self.bind(env, family, eqn, outs)
                case Attention():
                    self.bind(env, place_of(item)[0], *lower_attention(self, item, env))
                case Rowwise():
                    env.update(lower_rows(self, item, env))
                case JointStep():
                    self.together(item, env)
                case Loop(family, _, eqn, shifts=shifts):
                    self.bind(env, family, eqn, (lower_in_shifts if shifts > 1 else lower_loop)(self, item, env))
                case JointLoop(parts):
                    for part, outs in zip(parts, lower_scans(self, item, env), strict=True):
                        self.bind(env, part.family, part.eqn, outs)

    def bind(self, env: Env, family: int, eqn: J.Eqn, outs: Sequence[LaneValue]) -> None:
        env.update(((family, v), out) for v, out in zip(eqn.outvars, outs, strict=True) if not J.is_drop(v))

    def apart(self, step: JointStep, args: Sequence[Joint | None], env: Env) -> None:
        """Each part by itself, and the results in one stack."""
        outs: list[list[LaneValue]] = []
        for i, part in enumerate(step.parts):
            atoms = zip(part.eqn.invars, args, strict=True)
            own = [self.read(env, part.family, a) if arg is None else Part(arg, i) for a, arg in atoms]
            outs.append(apply(part.eqn, own))
        lanes = [self.width(part.family) for part in step.parts]
        for k, column in enumerate(zip(*outs, strict=True)):
            shapes = [J.shape(part.eqn.outvars[k]) for part in step.parts]
            self.bind_parts(env, step, k, join(column, lanes, largest(shapes)))

    def bind_parts(self, env: Env, step: JointStep, k: int, joint: Joint) -> None:
        """The k-th result of each part."""
        for part, value in zip(step.parts, joint.parts(), strict=True):
            if not J.is_drop(var := part.eqn.outvars[k]):
                env[part.family, var] = value

    def packs(self, packs: Sequence[Pack], env: Env) -> None:
        """One pack, or those of one launch."""
        if len(packs) == 1 and packs[0].width == 1 and packs[0].kernel in AS_WRITTEN:
            self.as_written(packs[0], env)
            return
        ready = [self.operands(pack, env, packs[:i] if pack.chained else ()) for i, pack in enumerate(packs)]
        results = lower_packs([pack for pack, _ in ready], self.bundle.families, [own for _, own in ready])
        for pack, outs in zip(packs, results, strict=True):
            names = [(pack.members[0].family, v) for v in pack.results]
            names = names if pack.epilogue else [(m.family, m.eqn.outvars[0]) for m in pack.members]
            env.update(zip(names, outs, strict=not pack.inner))

    def as_written(self, pack: Pack, env: Env) -> None:
        """Nothing to stack: the tenant's own equation."""
        (m,) = pack.members
        lhs, rhs = m.eqn.invars
        weights = Banked(self.arrays[pack.array], (0,)) if pack.array is not None else self.read(env, m.family, rhs)
        self.bind(env, m.family, m.eqn, apply(m.eqn, [self.read(env, m.family, lhs), weights]))

    def operands(self, pack: Pack, env: Env, before: Sequence[Pack] = ()) -> tuple[Pack, Operands]:
        """What a pack reads, and the pack as it reads that: an image rather than a slice of it, where it can. None is
        what one of those computes that stand before it in its chain."""
        inner = {result_of(other) for other in before}
        found = in_place(pack, self.slices)
        image = env.get((pack.members[0].family, found[1])) if found else None
        if found and image is not None:
            pack, left = found[0], [image]
        else:
            atoms = [(m.family, m.eqn.invars[0]) for m in pack.members]
            left = [None if a in inner else self.read(env, f, a) for f, a in atoms]
            left = [in_tf32(value) for value in left] if pack.rounded else left
        if pack.array is not None:
            right = self.arrays[pack.array]
        else:
            right = [self.read(env, m.family, m.eqn.invars[1]) for m in pack.members]
        family = pack.members[0].family
        given = [None if a in inner else self.read(env, family, a) for a in epilogue_reads(pack)]
        return pack, Operands(left, right, given)

    def together(self, step: JointStep, env: Env) -> None:
        """Equations of several members, as one."""
        eqns = [part.eqn for part in step.parts]
        lanes = [self.width(part.family) for part in step.parts]
        args: list[Joint | None] = []
        for k, array in enumerate(step.arrays):
            atoms = [eqn.invars[k] for eqn in eqns]
            if isinstance(atoms[0], J.Literal):
                args.append(None)
                continue
            shapes = [J.shape(atom) for atom in atoms]
            if array is not None:
                rows = rows_of_parts(step, k, self.bundle)
                args.append(Joint(take(whole(self.arrays[array]), rows), tuple(lanes), tuple(shapes), zeros=True))
                continue
            values = [self.read(env, part.family, atom) for part, atom in zip(step.parts, atoms, strict=True)]
            args.append(join(values, lanes, largest(shapes)))
        if moves_apart(eqns):
            self.apart(step, args, env)
            return
        for k, out in enumerate(run(eqns, args)):
            shapes = tuple(J.shape(eqn.outvars[k]) for eqn in eqns)
            self.bind_parts(env, step, k, Joint(out, tuple(lanes), shapes))
