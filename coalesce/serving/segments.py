"""A request shape as the segments that its program is cut into: each is a template of its own, which reads weights of
the same schema, and whose inputs and outputs are live values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from coalesce import jaxpr as J
from coalesce.family import Family, Lane
from coalesce.passes.segment import Segment, Segmented, why_whole
from coalesce.serving.fit import Template, template_of


@dataclass(frozen=True, eq=False)
class Segments:
    """`templates[s]` takes what lies in the registers `reads[s]`, and leaves its outputs in `writes[s]`. The inputs of
    the first are the request's, the outputs of the last its results."""

    templates: tuple[Template, ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    registers: tuple[jax.ShapeDtypeStruct, ...]  # of one lane
    why: str  # there are so many
    predicted_us: float  # of the whole, with one lane
    stays_whole: bool  # whatever cutting it would gain: it may raise, or not end

    def __len__(self) -> int:
        return len(self.templates)

    @property
    def lane_bytes(self) -> int:
        """What is kept between segments for one lane."""
        return sum(J.nbytes(r) for r in self.registers)


def segments_of(template: Template, cut: Segmented) -> Segments:
    return Segments(
        (template,) if len(cut.segments) == 1 else tuple(part(template, own) for own in cut.segments),
        tuple(own.reads for own in cut.segments),
        tuple(own.writes for own in cut.segments),
        cut.registers,
        cut.why,
        sum(cut.predicted_us, start=0.0),
        bool(why_whole(template.family.jaxpr)),
    )


def part(template: Template, own: Segment) -> Template:
    whole = template.family
    (lane,) = whole.lanes

    def of(values: Sequence) -> tuple:
        return tuple(values[w] for w in own.weights)

    inputs = tuple(range(len(J.invars(own.jaxpr)) - len(own.weights)))
    family = Family(own.jaxpr, len(own.weights), (Lane(0, of(lane.weights), inputs),), of(whole.rows), of(whole.owners))
    return template_of(family, of(template.weights))
