"""One process of experiments/peers_processes.py: serves one tenant's requests, as many as each line of its input says.

Its first line of output holds the outputs of one request, the others the seconds that each request of a burst took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax

from coalesce.models import by_name
from experiments import methods, peers_torch
from experiments.cells import draw, on_host
from experiments.methods import Candidate, Tenants
from experiments.peers_common import Cell


def main() -> None:
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print what they like
    if spec["precision"]:
        jax.config.update("jax_default_matmul_precision", spec["precision"])
    candidate = build(spec)
    outputs = [float(x) for x in on_host(candidate)[0]]
    print(json.dumps(outputs), file=answers)
    for line in sys.stdin:
        print(json.dumps([seconds(candidate) for _ in range(int(line))]), file=answers)


def build(spec: dict[str, Any]) -> Candidate:
    """The tenant of that number, as experiments/cells.py draws it, served as the spec says."""
    fields = {name: tuples(value) for name, value in spec["fields"].items()}
    model = by_name(spec["model"], dtype=spec["dtype"], param_dtype=spec["dtype"], **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    request = jax.jit(partial(model.example, batch=spec["batch"]))(jax.random.key(spec["tenant"]))
    tenants = Tenants(model.apply, [draw(shapes, spec["tenant"])], [request])
    if spec["engine"] == "jax":
        return next(methods.sequential(tenants, spec["options"]))
    cell = Cell(model, fields, spec["dtype"], spec["batch"], spec["precision"], tenants, [], ExitStack())
    weights = peers_torch.variants(cell)[-1]
    return next(peers_torch.graph_each(peers_torch.prepared_cell(cell)(weights).calls()))


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that fields of a model are."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def seconds(candidate: Candidate) -> float:
    start = time.perf_counter()
    jax.block_until_ready(candidate.run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
