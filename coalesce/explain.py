"""What `explain()` and `str(fused)` print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax

from coalesce import jaxpr as J
from coalesce.bundle import (
    Aligned,
    Attention,
    Bundle,
    items,
    JointLoop,
    JointStep,
    Loop,
    Pack,
    packs,
    Place,
    problems,
    Rowwise,
    Schedule,
    Step,
)
from coalesce.clusters import clusters_text
from coalesce.family import literal_splits
from coalesce.member import Member
from coalesce.passes.bundle_pipeline import BundleStep
from coalesce.passes.pipeline import Normalised
from coalesce.program import Program
from coalesce.report import alone_members, counted, flops, report_of
from coalesce.text import equation, Names, program_lines


def explain(programs: Sequence[Program], histories: Sequence[Normalised], steps: Sequence[BundleStep]) -> str:
    return "\n".join(lines(programs, histories, steps))


def lines(programs: Sequence[Program], histories: Sequence[Normalised], steps: Sequence[BundleStep]) -> Iterator[str]:
    bundle = steps[-1].bundle
    yield str(report_of(bundle))
    for history, names in by_history(programs, histories):
        for step in history.steps:
            yield f"\n# {names}: {after(step.name, step.seconds, step.changed)}"
            if step.changed:
                yield str(step.program)
    for before, step in zip([None, *steps], steps, strict=False):
        changed = before is None or step.bundle is not before.bundle
        yield f"\n# bundle: {after(step.name, step.seconds, changed)}"
        match step.name:
            case "cluster":
                yield clusters_text(step.bundle.clusters)
            case "align":
                yield from (aligned_text(group) for group in step.bundle.aligned)
            case "part_families" if changed:
                yield from (aligned_text(group) for group in step.bundle.aligned)
            case "side_by_side":
                yield from filter(None, [step.bundle.why_beside])
            case "cut_executables":
                yield step.bundle.why_starts
            case _ if changed:
                yield bundle_text(step.bundle)
    yield "\n# families"
    yield from family_lines(bundle)
    yield "\n# superkernels"
    yield from (pack_text(pack, bundle) for pack in packs(bundle.schedule) if pack.width > 1)
    if bundle.records:
        yield "\n# across families"
        yield f"predicted to win {bundle.predicted_us:.1f} us a round"
        yield from (f"{place_text(place)}: {record}" for place, record in bundle.records.items())
    elif len(bundle.families) > 1 and "align" not in [step.name for step in steps]:
        yield "\n# across families"
        yield 'nothing runs across families with policy="never"'
    yield "\n# heavy ops left alone"
    yield from (f"{member_text(m, bundle)}: {m.op.shape}: {reason}" for m, reason in alone_members(bundle))
    yield "\n# run lane by lane"
    for item in items(bundle.schedule):
        if isinstance(item, Step) and item.each:
            yield f"family {item.family} at {item.site}: {item.eqn.primitive.name}: {item.each}"


def after(name: str, seconds: float, changed: bool) -> str:
    return f"after {name} ({seconds * 1e3:.1f} ms{'' if changed else ', nothing to change'})"


def place_text(place: Place) -> str:
    return f"family {place[0]} at {place[1]}"


def aligned_text(group: Aligned) -> str:
    return f"{group.form}: {' with '.join(map(place_text, group.places))}"


def by_history(programs: Sequence[Program], histories: Sequence[Normalised]) -> list[tuple[Normalised, str]]:
    """Each history once, with the names of the tenants that share it."""
    found: dict[int, tuple[Normalised, list[str]]] = {}
    for program, history in zip(programs, histories, strict=True):
        found.setdefault(id(history), (history, []))[1].append(program.name)
    return [
        (h, names[0] + (f" and {len(names) - 1} more of its function" if len(names) > 1 else ""))
        for h, names in found.values()
    ]


def family_lines(bundle: Bundle) -> Iterator[str]:
    for f, family in enumerate(bundle.families):
        names = ", ".join(bundle.tenants[lane.tenant] for lane in family.lanes)
        shared = sum(len(set(rows)) < len(rows) for rows in family.rows)
        note = f", {shared} of {family.n_weights} weights shared between lanes" if shared else ""
        yield f"family {f}: {family.width} lane{'s' * (family.width > 1)} ({names}){note}"
    for split in literal_splits(bundle.families):
        yield f"{split}; make it an array in params to run them as one family"


def bundle_text(bundle: Bundle) -> str:
    """The plan in our stable text form."""
    names = {f: Names() for f in range(len(bundle.families))}
    out = []
    for f, family in enumerate(bundle.families):
        header = next(iter(program_lines(f"family {f} x{family.width}", family.jaxpr, family.n_weights, names[f])))
        out.append(header)
    ends = [*bundle.starts[1:], len(bundle.schedule)]
    for part, (start, end) in enumerate(zip(bundle.starts, ends, strict=True)):
        several = len(ends) > 1
        out += [f"  executable {part}"] if several else []
        out += schedule_lines(bundle, bundle.schedule[start:end], names, "    " if several else "  ")
    for f, family in enumerate(bundle.families):
        out.append(f"  -> family {f}: {', '.join(map(names[f], J.outvars(family.jaxpr)))}")
    out += ["  independent kernels run side by side"] if bundle.beside else []
    for i, array in enumerate(bundle.arrays):
        row = J.struct_short(jax.ShapeDtypeStruct(array.shape, array.dtype))
        out.append(f"  array {i}: {counted(len(array.rows), 'row')} of {row}, {array.layout}")
    for slab in bundle.slabs:
        first = bundle.arrays[slab.arrays[0]]
        row = J.struct_short(jax.ShapeDtypeStruct((slab.size,), first.dtype))
        places = ", ".join(f"array {a} at {start}" for a, start in zip(slab.arrays, slab.starts, strict=True))
        out.append(f"  slab of {counted(len(first.rows), 'row')} of {row}: {places}")
    return "\n".join(out)


def schedule_lines(bundle: Bundle, schedule: Schedule, names: dict[int, Names], indent: str) -> Iterator[str]:
    for item in schedule:
        match item:
            case Pack():
                yield indent + pack_text(item, bundle)
                yield from (f"{indent}  f{m.family}: {equation(m.eqn, names[m.family])}" for m in item.members)
                yield from (f"{indent}  then f{s.family}: {equation(s.eqn, names[s.family])}" for s in item.epilogue)
                if leaves_more(item):
                    yield f"{indent}  then it leaves {', '.join(map(names[item.members[0].family], item.results))}"
                yield from (f"{indent}  then rounded to TF32",) if item.rounds else ()
            case Attention(inside=inside, rounds=rounds):
                yield f"{indent}attention"
                yield from schedule_lines(bundle, inside, names, indent + "  ")
                yield from (f"{indent}  then rounded to TF32",) if rounds else ()
            case Rowwise(inside, results, rounded):
                yield f"{indent}rows"
                yield from schedule_lines(bundle, inside, names, indent + "  ")
                for left, how in ((results, ""), (rounded, ", rounded to TF32")):
                    own = ", ".join(map(names[inside[0].family], left))
                    yield from (f"{indent}  then it leaves {own}{how}",) if left else ()
            case Step(family, _, eqn, each):
                yield f"{indent}f{family}: {equation(eqn, names[family])}{f'  # lane by lane: {each}' if each else ''}"
            case JointStep(parts):
                yield f"{indent}together"
                yield from (f"{indent}  f{p.family}: {equation(p.eqn, names[p.family])}" for p in parts)
            case JointLoop(parts, body):
                yield f"{indent}together, {item.length} steps{', unrolled' * item.unrolled}"
                for part in parts:
                    region = J.as_scan(part.eqn).body
                    yield f"{indent}  f{part.family}: {equation(part.eqn, names[part.family])}"
                    yield f"{indent}    ({', '.join(map(names[part.family].typed, J.invars(region)))})"
                yield from schedule_lines(bundle, body, names, indent + "      ")
                for part in parts:
                    outs = ", ".join(map(names[part.family], J.outvars(J.as_scan(part.eqn).body)))
                    yield f"{indent}      -> f{part.family}: {outs}"
            case Loop(family, _, eqn, bodies):
                yield f"{indent}f{family}: {', '.join([equation(eqn, names[family]), *loop_facts(item)])}"
                for body, region in zip(bodies, J.regions(eqn), strict=True):
                    yield f"{indent}  ({', '.join(map(names[family].typed, J.invars(region)))})"
                    yield from schedule_lines(bundle, body, names, indent + "    ")
                    yield f"{indent}    -> {', '.join(map(names[family], J.outvars(region)))}"


def loop_facts(loop: Loop) -> list[str]:
    """How control flow runs, if not as it is written."""
    return ["unrolled"] * loop.unrolled + [f"in {loop.shifts} shifts of lanes"] * (loop.shifts > 1)


def leaves_more(pack: Pack) -> bool:
    """Whether a pack leaves another value than what its last step computes."""
    return bool(pack.epilogue) and pack.results != tuple(pack.epilogue[-1].eqn.outvars)


def pack_text(pack: Pack, bundle: Bundle) -> str:
    """One line: width, members, shape, kernel, waste."""
    total, padding = flops(pack, bundle)
    waste = f", {padding / total:.1%} padding" if padding else ""
    groups, rows = problems(pack, bundle.families)
    shared = f" as {groups} problem{'s' * (groups > 1)} of {rows} lanes" if rows > 1 else ""
    where = " + ".join(member_text(m, bundle) for m in pack.members)
    kernel = f": {pack.kernel_text}" if pack.kernel else ""
    form = f" {pack.form}" if pack.form else ""
    launch = f"{' chained' * pack.chained} in launch {pack.launch}" if pack.launch is not None else ""
    launch += ", not written" * pack.inner
    array = f" on array {pack.array}" if pack.array is not None else ""
    return f"pack {pack.index} x{pack.width} {pack.op.shape}{form}{kernel}{launch}{array}{shared}{waste} [{where}]"


def member_text(member: Member, bundle: Bundle) -> str:
    lanes = (
        f" x{member.width}"
        if member.width > 1
        else f" ({bundle.tenants[bundle.families[member.family].lanes[0].tenant]})"
    )
    return place_text((member.family, member.site)) + lanes
