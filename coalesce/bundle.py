"""A bundle: the schedule of packs that runs many tenants' programs as one.

    Step        an equation that all lanes of its family run together, or lane by lane
    Loop        a scan, while or cond, with the schedule of each of its regions
    Pack        heavy ops that one superkernel runs; members may come from any family
    JointStep   equal equations of several members' families that run as one, on what a pack left stacked
    JointLoop   scans of several families that run as one, with one schedule for their bodies
    Attention   two packs and what is done to each row of the first's result, in one kernel
    Rowwise     equations of a family that are done to rows, such as a norm, in one kernel
    Array       one stacked array of weights: row r is one tenant's prepared weight, in the layout its readers want
    Bundle      families, schedule and arrays: everything that lowering needs, and nothing about values

A schedule is a topological order: whatever an item reads is bound by an item before it, or is an argument. Packs of one
launch stand side by side, and none reads what another computes, unless it is chained to it. (family, variable) names a
value in every scope.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import TypeVar

from coalesce import jaxpr as J
from coalesce.blocks import Blocks
from coalesce.clusters import Cluster
from coalesce.family import Family
from coalesce.heavy import HeavyOp
from coalesce.layout import Layout
from coalesce.member import Fold, fold, Member, stacked_fold
from coalesce.record import Record
from coalesce.slab import Slab

STACKED = ("equal", "padded")  # forms whose results stay stacked


@dataclass(frozen=True, eq=False)
class Pack:
    """One superkernel, or one heavy op alone (`width` 1). Its kernel runs `epilogue` on the result of its one member
    before it writes it, and `results` of what these steps compute are all that it leaves.

    `form` says how members of different shapes share it (see coalesce.unify); "" is a pack of one family, whose lanes
    share operands as `fold` says. Results of the forms "equal" and "padded" stay stacked.
    """

    index: int
    members: tuple[Member, ...]
    op: HeavyOp  # what the kernel runs: the members' own, or what they are padded to
    form: str = ""
    kernel: str = ""  # chosen by choose_kernels
    blocks: Blocks | None = None  # the kernel's, where they were tuned; None: by the kernel's own rule
    reason: str = ""  # of width 1: why nothing else is in it
    array: int | None = None  # the array its right operands lie in, set by plan_layouts
    weight_rounded: bool = False  # they lie as TF32 has them, even if its kernel does not need that
    epilogue: tuple[Step, ...] = ()  # set by fuse_epilogues
    results: tuple[J.Var, ...] = ()  # what others read of it, set with it
    rounds: bool = False  # its result to TF32; set by round_results
    rounded: bool = False  # its left operand comes so
    launch: int | None = None  # of packs that one kernel launch runs, the index of the first; set by share_launches
    chained: bool = False  # it reads what packs before it in its launch compute, tile by tile; set by chain_products
    inner: bool = False  # what it computes is read in its launch alone, and is not written

    @property
    def width(self) -> int:
        return sum(m.width for m in self.members)

    @property
    def families(self) -> tuple[int, ...]:
        """The families of its members, each once."""
        return tuple(dict.fromkeys(m.family for m in self.members))

    @property
    def kernel_text(self) -> str:
        """The kernel, with its blocks where they were tuned."""
        return f"{self.kernel} {self.blocks}" if self.blocks else self.kernel

    @property
    def name(self) -> str:
        return f"{'superkernel' if self.width > 1 else 'alone'}{self.index}_{self.kernel}"


@dataclass(frozen=True, eq=False)
class Step:
    """An equation of a family. `each` says why it runs lane by lane; empty: all lanes at once."""

    family: int
    site: str
    eqn: J.Eqn
    each: str = ""
    alone: tuple[Member, ...] = ()  # heavy ops inside an equation that is not walked into
    weights: tuple[int | None, ...] = ()  # for each operand, which weight of the family it is, if it is one
    stacks: bool = True  # whether lanes have results of their own, and batching them changes nothing but their place

    @property
    def why_alone(self) -> str:
        return self.each or f"inside {self.eqn.primitive.name}, which runs as it is"


@dataclass(frozen=True, eq=False)
class JointStep:
    """`parts[i]` is the equation of the i-th member of the pack that its operands come from. `arrays[k]` is the array
    of operand k, if that is a weight of each part."""

    parts: tuple[Step, ...]
    arrays: tuple[int | None, ...] = ()


@dataclass(frozen=True, eq=False)
class Loop:
    """Control flow of a family, walked into. `varies` flags the carry (scan, while) or the results (cond) that differ
    between lanes, `decides` whether the predicate or index does. The steps of a scan that is `unrolled` are no loop. It
    runs in `shifts`: for some of the lanes, then for others."""

    family: int
    site: str
    eqn: J.Eqn
    bodies: tuple[Schedule, ...]
    varies: tuple[bool, ...]
    decides: bool = False
    unrolled: bool = False
    shifts: int = 1


@dataclass(frozen=True, eq=False)
class JointLoop:
    """Scans that run as one; `body` schedules the bodies of all. It runs as often as the longest, and a shorter one
    keeps its carry from its own end on."""

    parts: tuple[Loop, ...]
    body: Schedule
    stacked: tuple[tuple[int, ...], ...] = ()  # carries that stay one stack: for each, its position in every part
    unrolled: bool = False

    @property
    def length(self) -> int:
        return max(J.as_scan(part.eqn).length for part in self.parts)


@dataclass(frozen=True, eq=False)
class Attention:
    """Products of one family, batched over heads say: `values` multiplies what `rowwise` makes of each row of `scores`.
    One kernel runs all of it, and leaves what the second computes, transposed if `after` says so."""

    scores: Pack
    rowwise: tuple[Step, ...]
    values: Pack
    after: tuple[Step, ...] = ()  # one transposition at most
    rounds: bool = False  # its result to TF32; set by round_results
    by_tma: bool = False  # where what it multiplies lies so that TMA can fetch it (kernels/mosaic_attention.py)

    @property
    def inside(self) -> Schedule:
        return self.scores, *self.rowwise, self.values, *self.after


@dataclass(frozen=True, eq=False)
class Rowwise:
    """Steps of one family that one kernel runs on whole rows. It leaves `results`, and `rounded` as TF32 has them."""

    inside: tuple[Step, ...]
    results: tuple[J.Var, ...]
    rounded: tuple[J.Var, ...] = ()


Place = tuple[int, str]  # (family, site)
Item = Step | JointStep | Loop | JointLoop | Pack | Attention | Rowwise
Schedule = tuple[Item, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Aligned:
    """Packs or scans of several families that are to run as one: each by the place of its first member."""

    places: tuple[Place, ...]
    form: str  # of coalesce.unify; "scan" for scans
    stacked: bool = False  # whether another aligned pack leaves all their operands stacked


@dataclass(frozen=True)
class Array:
    """`rows[r]` = (tenant, prepared weight): what lies in row r, in `layouts[r]`."""

    rows: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]  # of one row, in its layout
    dtype: str
    layouts: tuple[Layout, ...]

    @property
    def layout(self) -> str:
        """The layouts of its rows, each once."""
        return "; ".join(dict.fromkeys(map(str, self.layouts)))


@dataclass(frozen=True, eq=False)
class Bundle:
    """The plan of one fused program."""

    tenants: tuple[str, ...]
    families: tuple[Family, ...]
    schedule: Schedule = ()
    arrays: tuple[Array, ...] = ()
    stored: Mapping[tuple[int, int], int] = field(default_factory=dict)  # (family, weight) -> other readers' array
    slabs: tuple[Slab, ...] = ()  # which arrays are one argument, set by join_arrays
    aligned: tuple[Aligned, ...] = ()  # what `align` chose to issue together
    clusters: tuple[Cluster, ...] = ()  # packs that are near enough in shape to share a superkernel, by place
    predicted_us: float = 0.0  # what `aligned` wins, by the cost model
    records: Mapping[Place, Record] = field(default_factory=dict)  # why each heavy op is where it is
    beside: bool = False  # whether families run side by side, as branches of one CUDA graph; set by side_by_side
    why_beside: str = ""
    starts: tuple[int, ...] = (0,)  # where in the schedule each executable begins, set by cut_executables
    why_starts: str = ""  # there are so many


def arguments(bundle: Bundle) -> list[Slab]:
    """The arrays that the program takes: slabs, then those that are in none, as slabs of their own."""
    inside = {array for slab in bundle.slabs for array in slab.arrays}
    alone = [Slab((i,), (0,), prod(a.shape)) for i, a in enumerate(bundle.arrays) if i not in inside]
    return [*bundle.slabs, *alone]


def bodies(item: Item) -> tuple[Schedule, ...]:
    """The schedules inside an item."""
    match item:
        case Loop():
            return item.bodies
        case JointLoop():
            return (item.body,)
        case Attention() | Rowwise():
            return (item.inside,)
    return ()


def items(schedule: Schedule) -> Iterator[Item]:
    """Every item, those of loop bodies after their loop."""
    for item in schedule:
        yield item
        for body in bodies(item):
            yield from items(body)


def packs(schedule: Schedule) -> Iterator[Pack]:
    return (item for item in items(schedule) if isinstance(item, Pack))


def units(items: Iterable[T]) -> Iterator[tuple[T, ...]]:
    """The items of one level, or packs in their order; those that share a launch as one."""

    def unit(item: object) -> tuple[str, int]:
        launch = item.launch if isinstance(item, Pack) else None
        return ("item", id(item)) if launch is None else ("launch", launch)

    return (tuple(group) for _, group in groupby(items, unit))


def place_of(item: Item) -> Place:
    """What a pack or loop is called: the place of its first member."""
    match item:
        case Attention():
            return place_of(item.scores)
        case Pack():
            return item.members[0].family, item.members[0].site
        case Rowwise():
            return place_of(item.inside[0])
        case JointLoop() | JointStep():
            return item.parts[0].family, item.parts[0].site
    return item.family, item.site


def equations(item: Item) -> list[tuple[int, J.Eqn]]:
    """(family, equation) of everything that an item runs at its own level."""
    match item:
        case Pack():
            return [(m.family, m.eqn) for m in item.members] + [(step.family, step.eqn) for step in item.epilogue]
        case JointStep() | JointLoop():
            return [(part.family, part.eqn) for part in item.parts]
        case Attention() | Rowwise():
            return [pair for part in item.inside for pair in equations(part)]
    return [(item.family, item.eqn)]


def folds_of(pack: Pack, families: Sequence[Family]) -> list[Fold]:
    """How lanes lie in a pack: for each member, or for all of them as one in the forms that stack."""
    if pack.form in STACKED:
        return [stacked_fold(pack.members, families)]
    return [fold(m, families[m.family]) for m in pack.members]


def problems(pack: Pack, families: Sequence[Family]) -> tuple[int, int]:
    """(problems with a right operand of their own, lanes that share each) of a superkernel."""
    folds = folds_of(pack, families)
    if pack.form == "product":
        return sum(how.groups * m.op.batch for m, how in zip(pack.members, folds, strict=True)), 1
    return sum(how.groups for how in folds), folds[0].per_group
