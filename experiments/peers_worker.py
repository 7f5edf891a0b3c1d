"""One process of experiments/peers_processes.py: serves one tenant's requests, as many as each line of its input says.

Its first line of output says in which form it serves, and holds the outputs of one request; the others hold the seconds
that each request of a burst took. A form that is not given is the fastest of those that there are.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import jax

from coalesce.models import by_name
from experiments import methods, peers_torch
from experiments.alone import alone
from experiments.cells import draw, on_host
from experiments.methods import Candidate, Tenants
from experiments.peers_common import Cell, OneTenant


def main() -> None:
    one = OneTenant(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print what they like
    if one.precision:
        jax.config.update("jax_default_matmul_precision", one.precision)
    form, candidate = build(one)
    outputs = [float(x) for x in on_host(candidate)[0]]
    print(json.dumps({"form": form, "outputs": outputs}), file=answers)
    for line in sys.stdin:
        print(json.dumps([seconds(candidate) for _ in range(int(line))]), file=answers)


Form = list[Any]  # of PyTorch: what its weights are, and whether and how the model is compiled; of JAX nothing


def build(one: OneTenant) -> tuple[Form, Candidate]:
    """A tenant, served by its engine."""
    fields = {name: tuples(value) for name, value in one.fields.items()}
    model = by_name(one.model, dtype=one.dtype, param_dtype=one.dtype, **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    request = jax.jit(partial(model.example, batch=one.batch))(jax.random.key(one.tenant))
    tenants = Tenants(model.apply, [draw(shapes, one.tenant)], [request])
    if one.engine == "jax":
        return [], next(methods.sequential(tenants, one.options))
    cell = Cell(model, fields, one.dtype, one.batch, one.precision, tenants, [], ExitStack(), one.autotune)
    parts = peers_torch.prepared_cell(cell)
    if one.form:
        return one.form, served(parts, *one.form)
    return fastest({form: partial(served, parts, *form) for form in peers_torch.forms(cell)})


def served(parts: Callable[[str], peers_torch.Parts], weights: str, compiled: peers_torch.Compiled) -> Candidate:
    return next(peers_torch.graph_each(parts(weights).calls(compiled)))


def fastest(forms: Mapping[tuple[Any, ...], Callable[[], Candidate]], requests: int = 30) -> tuple[Form, Candidate]:
    """By the median of some requests, with nobody else under way; a form that does not run is left out."""
    found: list[tuple[float, Form, Candidate]] = []
    broken: list[Exception] = []
    for form, of in forms.items():
        try:
            candidate = of()
            with alone():
                seconds(candidate)
                found.append((median(seconds(candidate) for _ in range(requests)), [*form], candidate))
        except Exception as e:  # whatever a framework raises
            broken.append(e)
    if not found:
        raise broken[0]
    _, form, candidate = min(found, key=lambda one: one[0])
    return form, candidate


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that fields of a model are."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def seconds(candidate: Candidate) -> float:
    start = time.perf_counter()
    jax.block_until_ready(candidate.run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
