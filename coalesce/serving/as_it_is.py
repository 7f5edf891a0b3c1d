"""One lane at a time, as its tenant's program was traced: no pass has rewritten it, and no kernel of ours runs in it.

For tenants who do not get in company what they get alone. Their weights lie in a bank like all others, and they are
asked for, staged and fetched in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coalesce import jaxpr as J
from coalesce.bundle import Array
from coalesce.layout import AS_IS
from coalesce.serving.fit import Template


def arrays_of(template: Template) -> tuple[Array, ...]:
    """Every weight by itself, in the order in which the program takes them."""
    weights = J.invars(template.family.jaxpr)[: template.family.n_weights]
    return tuple(
        Array(((0, number),), J.shape(var), J.dtype(var), (AS_IS,))
        for number, var in zip(template.weights, weights, strict=True)
    )


def run_one(template: Template, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """What lies in the first row of each -> results [1, ...]."""
    found = J.evaluate(template.family.jaxpr, [x[0] for x in (*weights, *inputs)])
    return [x[None] for x in found]
