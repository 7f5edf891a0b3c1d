"""How a tenant's own weights and inputs are those of a schema, which all tenants share that run the same programs.

    Template    one request shape: the family's program, its weights numbered as in the schema
    Fit         a tenant as its schema sees it

A schema numbers prepared weights over all request shapes of a tenant, each value once, so that all of them read one
copy. Tenants fit one schema if their programs are equal, weights that are shared are equal by their bytes, and what is
one value for one of them is one for all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax

from coalesce import jaxpr as J
from coalesce.behaviour import may_speculate
from coalesce.dependence import mark
from coalesce.family import Family, family, Lane, leaf_token
from coalesce.program import Program
from coalesce.structure import canonical, ValueNumbers


@dataclass(frozen=True, eq=False)
class Template:
    """One request shape. `family` has one lane; its owners (0, w) name weights by their number in the schema."""

    family: Family
    weights: tuple[int, ...]  # for each weight of the family, its number
    inputs: tuple[jax.ShapeDtypeStruct, ...]  # of the family, for one lane
    outputs: tuple[jax.ShapeDtypeStruct, ...]

    @cached_property
    def takes_zeros(self) -> bool:
        """Whether it may run on inputs that nobody has sent: it ends for certain, and calls nobody back."""
        return all(map(may_speculate, self.family.jaxpr.jaxpr.eqns))


@dataclass(frozen=True, eq=False)
class Fit:
    key: Hashable  # of the schema that it fits
    programs: tuple[Program, ...]  # normalised, one a request shape
    templates: tuple[Template, ...]
    sources: tuple[tuple[int, int], ...]  # for each weight of the schema, (program, prepared weight)
    own: tuple[bool, ...]  # whether each tenant has its own, rather than one that is shared
    inputs: tuple[tuple[int, ...], ...]  # for each input of each template, which flat input of the tenant it is


def fit(programs: Sequence[Program]) -> Fit:
    """A tenant from its normalised programs, one a request shape."""
    numbers, leaves = ValueNumbers(), dict[Hashable, int]()
    sources: dict[Hashable, tuple[int, int]] = {}  # by value, in the order of the schema
    shared: list[Hashable] = []  # for each, what it is if tenants share it
    forms, templates, inputs = [], [], []
    for i, program in enumerate(programs):
        form = canonical(program.jaxpr, program.n_weights)
        values, own = prepared(program, numbers, leaves)
        for w in (a for a in form.args if a < program.n_weights):
            if values[w] not in sources:
                sources[values[w]] = (i, w)
                shared.append(None if own[w] else shared_value(program, w))
        number = {value: n for n, value in enumerate(sources)}
        found = family([(0, program, form)], [values], {value: (0, n) for value, n in number.items()})
        (lane,) = found.lanes
        forms.append(form.key)
        templates.append(template_of(found, tuple(number[values[w]] for w in lane.weights)))
        inputs.append(lane.inputs)
    key = (tuple(forms), tuple(t.weights for t in templates), tuple(shared))
    own = tuple(value is None for value in shared)
    return Fit(key, tuple(programs), tuple(templates), tuple(sources.values()), own, tuple(inputs))


def prepared(program: Program, numbers: ValueNumbers, leaves: dict[Hashable, int]) -> tuple[list[Hashable], list[bool]]:
    """For each prepared weight its value number, equal for equal values of one tenant, and whether it depends on leaves
    that are the tenant's own."""
    tokens = [leaves.setdefault(leaf_token(program, leaf), len(leaves)) for leaf in program.leaves]
    own = [not (leaf.shared or leaf.constant) for leaf in program.leaves]
    if program.prepare is None:
        return list(tokens), own
    return list(numbers.of(program.prepare, tokens)), mark(program.prepare, own)[1]


def shared_value(program: Program, weight: int) -> Hashable:
    """What a prepared weight is that depends on shared leaves alone: how it is computed, and from which bytes."""
    if program.prepare is None:
        return leaf_token(program, program.leaves[weight])
    args, out = J.invars(program.prepare), J.outvars(program.prepare)[weight]
    form = canonical(J.close(args, program.prepare.jaxpr.eqns, [out]), len(args))
    return form.key, tuple(leaf_token(program, program.leaves[a]) for a in form.args)


def template_of(found: Family, weights: tuple[int, ...]) -> Template:
    inputs = tuple(J.aval_struct(v.aval) for v in found.inputs)
    return Template(found, weights, inputs, tuple(J.aval_struct(v.aval) for v in J.outvars(found.jaxpr)))


def widened(template: Template, own: Sequence[bool], width: int, first: int) -> Family:
    """So many lanes, each a tenant, from `first` on: lane i reads row i of what each tenant has its own."""
    one = template.family
    (lane,) = one.lanes
    rows = tuple(tuple(range(width)) if own[w] else (0,) * width for w in template.weights)
    owners = tuple(tuple((first + i, w) for i in range(width)) if own[w] else ((first, w),) for w in template.weights)
    lanes = tuple(Lane(first + i, lane.weights, lane.inputs) for i in range(width))
    return Family(one.jaxpr, one.n_weights, lanes, rows, owners)
