"""Ways to serve one round of tenants of several models; see experiments/methods.py for those of one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import coalesce
from experiments.methods import Candidate, in_graph, Method, Options, Tenants

Mix = Sequence[Tenants]  # one for each model


def one_by_one(mix: Mix, options: Options, method: Method[Tenants]) -> Iterator[Candidate]:
    """A method for the tenants of each model, called for one model after the other; a round waits once, at its end."""
    for parts in zip(*(list(method(tenants, options)) for tenants in mix), strict=True):

        def split(outputs: Sequence[Any], parts: Sequence[Candidate] = parts) -> list[Any]:
            return [tenant for part, own in zip(parts, outputs, strict=True) for tenant in part.split(own)]

        yield Candidate(parts[0].how, lambda parts=parts: [part.run() for part in parts], split)


def fused(
    mix: Mix,
    options: Options,
    policy: str,
    waste_bound: float,
    launches: bool = False,
    executables: int | None = None,
    side_by_side: bool | None = None,
    called: bool = True,
    captured: bool = False,
) -> Iterator[Candidate]:
    """coalesce.fuse of all tenants, by its public call if it is to be `called`, and `captured`."""
    programs = [
        coalesce.trace(tenants.apply, params, *inputs, name=f"model {m} tenant {i}")
        for m, tenants in enumerate(mix)
        for i, (params, inputs) in enumerate(zip(tenants.params, tenants.inputs, strict=True))
    ]
    options_of_plan: dict[str, Any] = {
        "policy": policy,
        "waste_bound": waste_bound,
        "launches": launches,
        "executables": executables,
        "side_by_side": side_by_side,
    }
    requests = [inputs for tenants in mix for inputs in tenants.inputs]
    if called:
        together = coalesce.fuse(programs, **options_of_plan)
        together.compile(options)
        yield Candidate("", lambda: together(requests), facts=facts_of(together))
    if captured:
        again = coalesce.fuse(programs, **options_of_plan, captured=True)
        yield replace(in_graph(again, requests), facts=facts_of(again))


def facts_of(together: coalesce.Fused) -> dict[str, Any]:
    report = together.report
    return {
        "heavy_ops": report.heavy_ops,
        "superkernels": report.superkernels,
        "superkernels_across": report.superkernels_across,
        "launches_shared": report.launches_shared,
        "ops_across": report.ops_across,
        "loops_across": report.loops_across,
        "padding": report.padding_waste,
        "predicted_gain_us": report.predicted_gain_us,
        "side_by_side": report.side_by_side,
        "why_side_by_side": report.why_side_by_side,
        "executables": report.executables,
        "why_executables": report.why_executables,
    }
