"""The page of `python -m coalesce inspect --html`: every family's program beside the others, coloured by superkernel.

    html_page(fused) -> str     one self-contained document, the same for the same programs

A column is a family; its tenants are the strips at its right edge, so that sixteen equal tenants take the space of one.
What an equation says when it is pointed at stands in its `title`, one fact a line, so that the page needs no
JavaScript; the script of `inspect.html` shows the same lines in a panel and lights up the members of a pack.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from importlib.resources import files
from string import Template

from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.bundle import (
    Attention,
    Bundle,
    equations,
    Item,
    items,
    JointLoop,
    JointStep,
    Loop,
    Pack,
    packs,
    problems,
    Rowwise,
    Schedule,
    Step,
)
from coalesce.explain import loop_facts, member_text, place_text
from coalesce.family import literal_splits
from coalesce.fused import Fused
from coalesce.heavy import heavy_eqns, is_heavy
from coalesce.member import Member
from coalesce.report import alone_members, flops, Report
from coalesce.text import equation, Names

READABLE = 20  # tenants whose names find room above their strips


def html_page(fused: Fused) -> str:
    """One self-contained HTML document about a fused program; nothing is compiled, and nothing runs."""
    bundle, report = fused.bundle, fused.report
    template = files("coalesce").joinpath("inspect.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(str(report)),
        summary=summary(report),
        families=join(Column(bundle, f, report).section() for f in range(len(bundle.families))),
        packs=join(pack_entry(p, bundle) for p in packs(bundle.schedule) if p.width > 1),
        alone=join(entry(m, bundle, m.op.shape, reason) for m, reason in alone_members(bundle)),
        notes=join(el("li", note) for note in notes(bundle)),
    )


# ---- markup --------------------------------------------------------------------------------------------------------


class Html(str):
    """Text that is markup already. Every other string is escaped on its way into the page."""


def el(tag: str, *children: str, **attributes: object) -> Html:
    """An element. `class_` is the attribute class, `data_pack` is data-pack; attributes that are None are left out."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    shown = "".join(f' {names[k]}="{html.escape(str(v))}"' for k, v in attributes.items() if v is not None)
    return Html(f"<{tag}{shown}>{join(children)}</{tag}>")


def join(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def details(name: str, text: str) -> Html:
    return el("details", el("summary", name), el("code", text))


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


# ---- the summary and the lists -------------------------------------------------------------------------------------


def summary(report: Report) -> Html:
    numbers = {
        "programs": f"{report.programs:,}",
        "families": f"{report.families:,}",
        "heavy ops": f"{report.heavy_ops:,}",
        "superkernels": f"{report.superkernels:,}",
        "across families": f"{report.superkernels_across:,}",
        "left alone": f"{report.alone:,}",
        "padding": f"{report.padding_waste:.1%}",
        **({"families run": "side by side"} if report.side_by_side else {}),
    }
    return el("dl", *(el("div", el("dt", k), el("dd", v)) for k, v in numbers.items()), class_="summary")


def hue(pack: Pack) -> str | None:
    """Neighbouring packs differ by the golden angle, so that they look different however many there are."""
    return f"--hue:{pack.index * 137.508 % 360:.0f}" if pack.width > 1 else None


def link(member: Member, bundle: Bundle) -> Html:
    return el("a", member_text(member, bundle), href=f"#f{member.family}-{member.site}")  # an id of Column.line


def entry(member: Member, bundle: Bundle, what: str, why: str) -> Html:
    return el("li", link(member, bundle), " ", el("code", what), " ", el("span", why, class_="why"))


def pack_entry(pack: Pack, bundle: Bundle) -> Html:
    return el(
        "li",
        el("span", str(pack.index), class_="chip"),
        el("code", pack.op.shape),
        el("span", f"{plural(pack.width, 'lane')}, {pack.kernel_text}, padding {padding(pack, bundle)}", class_="why"),
        el("span", *(part for m in pack.members for part in (link(m, bundle), " ")), class_="members"),
        data_pack=pack.index,
        style=hue(pack),
    )


def padding(pack: Pack, bundle: Bundle) -> str:
    total, waste = flops(pack, bundle)
    return f"{waste / total:.1%}" if waste else "none"


def notes(bundle: Bundle) -> Iterator[str]:
    """What runs lane by lane, and families that one literal keeps apart."""
    for item in items(bundle.schedule):
        if isinstance(item, Step) and item.each:
            yield f"family {item.family} at {item.site}: {item.eqn.primitive.name} runs lane by lane: {item.each}"
    for split in literal_splits(bundle.families):
        yield str(split)


# ---- a family ------------------------------------------------------------------------------------------------------


class Column:
    """Writes one family: its tenants, and its equations in program order."""

    def __init__(self, bundle: Bundle, index: int, report: Report) -> None:
        self.bundle, self.index, self.names = bundle, index, Names()
        self.family = bundle.families[index]
        self.weights = frozenset(self.family.weights)
        self.tenants = [report.tenants[lane.tenant] for lane in self.family.lanes]

    def section(self) -> Html:
        first, width = self.tenants[0], self.family.width
        weights, inputs = ([self.names.typed(v) for v in args] for args in (self.family.weights, self.family.inputs))
        names = [t.name for t in self.tenants]
        each = "each: " if width > 1 else ""
        return el(
            "section",
            el(
                "header",
                el("h2", f"family {self.index} ", el("small", first.name if width == 1 else f"{width} tenants")),
                el("p", f"{each}{first.heavy_ops} heavy ops, {first.alone} alone, {first.padding_waste:.1%} padding"),
                details(plural(width, "tenant"), ", ".join(names)),
                details(
                    f"{plural(len(weights), 'weight')}, {plural(len(inputs), 'input')}",
                    f"{', '.join(weights)} | {', '.join(inputs)}",
                ),
                el("div", *(el("span", n) for n in names if width <= READABLE), class_="names", aria_hidden="true"),
            ),
            self.scheduled(self.family.jaxpr, self.bundle.schedule, ""),
            class_="family",
            data_family=self.index,
            style=f"--lanes:{width};--cell:{max(2, min(14, 224 // width))}px",
        )

    def scheduled(self, jaxpr: ClosedJaxpr, schedule: Schedule, prefix: str) -> Html:
        """The equations of a region that the schedule walks into."""
        level = [part for item in schedule for part in (item.inside if isinstance(item, Attention) else (item,))]
        items: dict[int, Item] = {id(eqn): item for item in level for f, eqn in equations(item) if f == self.index}
        rows = [self.row(eqn, f"{prefix}{i}", items[id(eqn)]) for i, eqn in enumerate(jaxpr.jaxpr.eqns)]
        return el("ol", *rows, self.results(jaxpr))

    def row(self, eqn: J.Eqn, site: str, item: Item) -> Html:
        if isinstance(item, Pack) and any(step.eqn is eqn for step in item.epilogue):
            return el("li", self.line(eqn, site, [f"in the epilogue of {item.name}"]))
        if isinstance(item, Pack):
            kind = "heavy" if item.width > 1 else "heavy alone"
            return el("li", self.line(eqn, site, pack_facts(item, self.bundle), kind, item))
        if isinstance(item, Rowwise):
            return el("li", self.line(eqn, site, ["in a kernel on rows"]))
        if isinstance(item, JointStep):
            return el("li", self.line(eqn, site, [company(item.parts, self.index, site)]))
        if isinstance(item, JointLoop):
            region = J.as_scan(eqn).body
            inside = [self.arguments("body", region), self.scheduled(region, item.body, f"{site}.body.")]
            facts = [company(item.parts, self.index, site), *["unrolled"] * item.unrolled]
            return el("li", self.line(eqn, site, facts), *inside)
        if isinstance(item, Loop):
            inner: list[Html] = []
            for label, body, region in zip(J.region_labels(eqn), item.bodies, J.regions(eqn), strict=True):
                prefix = f"{site}.{label.replace(' ', '')}."  # as form_packs numbers the sites of a region
                inner += [self.arguments(label, region), self.scheduled(region, body, prefix)]
            return el("li", self.line(eqn, site, loop_facts(item)), *inner)
        assert isinstance(item, Step), f"{type(item).__name__} has its own rows"
        line = self.line(eqn, site, [f"lane by lane: {item.each}"] * bool(item.each), "each" * bool(item.each))
        return el("li", line, *self.inside(eqn, item, iter(item.alone)))

    def inside(self, eqn: J.Eqn, step: Step, alone: Iterator[Member]) -> Iterator[Html]:
        """What an equation that is not walked into holds, where there are heavy ops in it."""
        for region in J.subjaxprs(eqn):
            if not heavy_eqns(region):
                continue
            yield self.arguments(f"inside {eqn.primitive.name}", region)
            rows = [self.unscheduled(e, str(i), step, alone) for i, e in enumerate(region.jaxpr.eqns)]
            yield el("ol", *rows, self.results(region))

    def unscheduled(self, eqn: J.Eqn, site: str, step: Step, alone: Iterator[Member]) -> Html:
        if is_heavy(eqn):
            return el("li", self.line(eqn, site, [f"alone: {step.why_alone}"], "heavy alone", anchor=next(alone).site))
        line = self.line(eqn, site, kind="each" * bool(step.each), anchor="")
        return el("li", line, *self.inside(eqn, step, alone))

    def line(
        self,
        eqn: J.Eqn,
        site: str,
        facts: Iterable[str] = (),
        kind: str = "",
        pack: Pack | None = None,
        anchor: str | None = None,
    ) -> Html:
        """An equation in short, and in its title all that is known of it."""
        operands, outs = [self.operand(a) for a in eqn.invars], [v for v in eqn.outvars if not J.is_drop(v)]
        where = [f"source: {J.source(eqn) or 'unknown'}", f"operands: {', '.join(operands) or 'none'}"]
        left = ", ".join(self.names(v) for v in outs[:2]) + ", .." * (len(outs) > 2) + " = " * bool(outs)
        right = [f" {self.names(a)}" for a in eqn.invars]
        type_ = J.short(outs[0].aval) if len(outs) == 1 else ""
        anchor = site if anchor is None else anchor
        tag = "alone" if "alone" in kind else str(pack.index) if pack else ""
        return el(
            "div",
            el("span", site.rpartition(".")[2], class_="site"),
            el("span", el("code", left, el("b", eqn.primitive.name), *right), el("code", type_), class_="what"),
            el("span", tag, class_="tag"),
            el("i"),
            class_=f"eqn {kind}".strip(),
            id=f"f{self.index}-{anchor}" if anchor else None,
            data_pack=pack.index if pack else None,
            style=hue(pack) if pack else None,
            title="\n".join([equation(eqn, self.names), *where, *facts]),
        )

    def operand(self, atom: J.Atom) -> str:
        weight = not isinstance(atom, J.Literal) and atom in self.weights
        return f"{self.names.typed(atom)}{' (weight)' if weight else ''}"

    def arguments(self, label: str, region: ClosedJaxpr) -> Html:
        return el("p", f"{label}({', '.join(map(self.names.typed, J.invars(region)))})", class_="label")

    def results(self, jaxpr: ClosedJaxpr) -> Html:
        return el("li", f"-> {', '.join(map(self.names, J.outvars(jaxpr)))}", class_="label")


def company(parts: Iterable[Step | Loop], family: int, site: str) -> str:
    """With which equations of other families one runs."""
    others = [(part.family, part.site) for part in parts if (part.family, part.site) != (family, site)]
    return f"together with: {', '.join(map(place_text, others))}"


def pack_facts(pack: Pack, bundle: Bundle) -> Iterator[str]:
    """What a pack is, one fact a line."""
    yield f"pack: {pack.index}, a superkernel of {pack.width} lanes" if pack.width > 1 else f"alone: {pack.reason}"
    if pack.launch is not None:
        others = [p for p in packs(bundle.schedule) if p.launch == pack.launch and p is not pack]
        yield f"launch: with pack{'s' * (len(others) > 1)} {', '.join(str(p.index) for p in others)}"
    yield f"work: {pack.op.shape}"
    yield f"kernel: {pack.kernel_text}"
    if pack.width > 1:
        groups, rows = problems(pack, bundle.families)
        yield f"members: {', '.join(member_text(m, bundle) for m in pack.members)}"
        yield f"problems: {groups} different right operands, {plural(rows, 'lane')} on each"
        yield f"padding: {padding(pack, bundle)}"
    records = {place: bundle.records.get(place) for place in ((m.family, m.site) for m in pack.members)}
    yield from (f"{place_text(place)}: {record}" for place, record in records.items() if record is not None)
    if pack.array is not None:
        array = bundle.arrays[pack.array]
        yield f"weights: array {pack.array}, {plural(len(array.rows), 'row')} of {array.dtype}{list(array.shape)}"
