"""What fusing did, in counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coalesce.bundle import Bundle, items, JointLoop, Pack, packs, place_of, problems, Step, units
from coalesce.heavy import heavy_eqns
from coalesce.member import fold, Member
from coalesce.passes.components import components


@dataclass(frozen=True)
class TenantReport:
    """One tenant's part of a Report."""

    name: str
    family: int
    heavy_ops: int  # dots and convolutions of its program, after normalisation
    superkernels: int  # of two or more heavy ops, that it takes part in
    alone: int  # its heavy ops in none of these
    padding_waste: float  # share of the FLOPs of those superkernels that is padding
    across_families: int  # those of its heavy ops that share a superkernel with another family


@dataclass(frozen=True)
class Report:
    """Counted after normalisation. The body of a scan counts once and every branch of a cond counts; one pack is one
    superkernel, whatever it lowers to, and so are packs that share a launch."""

    programs: int
    families: int
    heavy_ops: int  # dots and convolutions of all programs, one by one
    superkernels: int  # packs, or packs that share a launch, of two or more of them
    alone: int  # heavy ops in none of these
    padding_waste: float  # share of superkernel FLOPs that is padding, 0 to 1
    superkernels_across: int  # superkernels with members of two or more families
    launches_shared: int  # superkernels of several packs
    ops_across: int  # heavy ops in those, over all tenants
    loops_across: int  # scans of two or more families that run as one
    predicted_gain_us: float  # what running across families wins a round, as predicted; 0 if nothing does
    components: int  # groups of families with no superkernel, launch or loop in common
    side_by_side: bool  # whether independent kernels run at once, as branches of one CUDA graph
    why_side_by_side: str  # or not; empty where there is nothing to choose
    executables: int  # that the program is compiled in
    why_executables: str  # so many
    tenants: tuple[TenantReport, ...]

    def __str__(self) -> str:
        across = f", {self.superkernels_across} across families" if self.superkernels_across else ""
        several = f", in {self.executables} executables" if self.executables > 1 else ""
        several = ", side by side" if self.side_by_side else several
        return (
            f"{counted(self.programs, 'program')} in {counted(self.families, 'family', 'families')}: "
            f"{counted(self.heavy_ops, 'heavy op')} -> {counted(self.superkernels, 'superkernel')}{across}, "
            f"{self.alone} alone, {self.padding_waste:.1%} padding{several}"
        )


def counted(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def flops(pack: Pack, bundle: Bundle) -> tuple[int, int]:
    """(FLOPs that a superkernel does, of them padding)."""
    groups, rows = problems(pack, bundle.families)
    total = pack.op.flops * groups * rows
    distinct = [len(set(fold(m, bundle.families[m.family]).place)) for m in pack.members]
    return total, total - sum(m.op.flops * n for m, n in zip(pack.members, distinct, strict=True))


def share(parts: list[tuple[int, int]]) -> float:
    total = sum(all_ for all_, _ in parts)
    return sum(pad for _, pad in parts) / total if total else 0.0


def alone_members(bundle: Bundle) -> list[tuple[Member, str]]:
    """Heavy ops in no superkernel, one for each member, with the reason."""
    found: list[tuple[Member, str]] = []
    for item in items(bundle.schedule):
        if isinstance(item, Pack) and item.width == 1 and item.launch is None:
            record = bundle.records.get(place_of(item))
            reasons = [item.reason, record.reason if record is not None else ""]
            found.append((item.members[0], "; ".join(filter(None, reasons))))
        if isinstance(item, Step):
            found.extend((m, item.why_alone) for m in item.alone)
    return found


def report_of(bundle: Bundle) -> Report:
    supers = [unit for unit in units(packs(bundle.schedule)) if sum(pack.width for pack in unit) > 1]
    across = [unit for unit in supers if len({m.family for pack in unit for m in pack.members}) > 1]
    alone = alone_members(bundle)
    tenants: Mapping[int, TenantReport] = {
        lane.tenant: TenantReport(
            name=bundle.tenants[lane.tenant],
            family=f,
            heavy_ops=len(heavy_eqns(family.jaxpr)),
            superkernels=sum(any(f in pack.families for pack in unit) for unit in supers),
            alone=sum(m.family == f for m, _ in alone),
            padding_waste=share([flops(pack, bundle) for unit in supers for pack in unit if f in pack.families]),
            across_families=sum(m.family == f for unit in across for pack in unit for m in pack.members),
        )
        for f, family in enumerate(bundle.families)
        for lane in family.lanes
    }
    return Report(
        programs=len(bundle.tenants),
        families=len(bundle.families),
        heavy_ops=sum(t.heavy_ops for t in tenants.values()),
        superkernels=len(supers),
        alone=sum(m.width for m, _ in alone),
        padding_waste=share([flops(pack, bundle) for unit in supers for pack in unit]),
        superkernels_across=len(across),
        launches_shared=sum(len(unit) > 1 for unit in supers),
        ops_across=sum(pack.width for unit in across for pack in unit),
        loops_across=sum(isinstance(item, JointLoop) for item in items(bundle.schedule)),
        predicted_gain_us=bundle.predicted_us,
        components=len(components(bundle.schedule)),
        side_by_side=bundle.beside,
        why_side_by_side=bundle.why_beside,
        executables=len(bundle.starts),
        why_executables=bundle.why_starts,
        tenants=tuple(tenants[i] for i in range(len(bundle.tenants))),
    )
