"""A cell of an experiment: the same tenants served by several methods, compared with each other and timed in turns."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coalesce.errors import CoalesceError
from coalesce.models import Model
from experiments.measure import each_round, interleave, issued, Timing
from experiments.methods import Candidate, Method, Options, Served, Tenants
from experiments.results import Row


@dataclass(frozen=True)
class Attempt:
    """One configuration of a method; `candidate` is None if it failed."""

    options: Options
    candidate: Candidate | None
    error: float = 0.0  # of the outputs, relative to the reference
    failed: str = ""


def tenants_of(model: Model, count: int, batch: int) -> Tenants:
    """Tenants with weights and requests of their own; tenant i is the same in every cell."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    request = jax.jit(partial(model.example, batch=batch))
    with ThreadPoolExecutor(os.cpu_count()) as several:  # 8 BERT-base are 900 million numbers
        params = list(several.map(partial(draw, shapes), range(count)))
    return Tenants(model.apply, params, [request(jax.random.key(i)) for i in range(count)])


def draw(shapes: Any, seed: int) -> Any:
    """Weights of those shapes, each with a scale that keeps activations in range, and no two of them equal.

    NumPy draws them: to compile a large model's own initializers takes minutes on a CPU.
    """
    rng = np.random.default_rng(seed)

    def leaf(path: Any, struct: jax.ShapeDtypeStruct) -> jax.Array:
        noise, name = rng.standard_normal(struct.shape, np.float32), path[-1].key
        if name in ("bias", "mean", "scale", "var"):
            return jnp.asarray(0.01 * noise + (name in ("scale", "var")), struct.dtype)
        return jnp.asarray(noise / np.sqrt(np.float32(math.prod(struct.shape[:-1]))), struct.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def measure_cell(
    tenants: Served,
    methods: Mapping[str, Method[Served]],
    options: Sequence[Options],
    *,
    tolerance: float,
    repeats: int,
    seconds: float,
    in_a_row: int = 0,
) -> dict[str, Row]:
    """A row for each method. The outputs of the first one are what the others' are compared with. With `in_a_row` half
    of the time is for so many rounds that are issued one after the other."""
    reference: list[np.ndarray] | None = None
    attempts: dict[str, list[Attempt]] = {}
    compile_s: dict[str, float] = {}
    for name, method in methods.items():
        print(f"  {name}: compiling", file=sys.stderr, flush=True)
        start = time.perf_counter()
        attempts[name] = build(method, tenants, options, reference, tolerance)
        compile_s[name] = round(time.perf_counter() - start, 2)
        working = next((a.candidate for a in attempts[name] if a.candidate), None)
        reference = on_host(working) if reference is None and working else reference
    rounds = {
        (name, i): a.candidate.run for name, tried in attempts.items() for i, a in enumerate(tried) if a.candidate
    }
    print(f"  timing {len(rounds)} candidates in turns", file=sys.stderr, flush=True)
    try:
        timings = interleave(rounds, repeats=repeats, seconds=seconds / 2 if in_a_row else seconds)
        rows = {key: partial(issued, run, run, in_a_row) for key, run in rounds.items()} if in_a_row else {}
        sustained = interleave(rows, repeats=max(3, repeats // max(in_a_row, 1)), seconds=seconds / 2)
    except jax.errors.JaxRuntimeError as e:  # out of memory, say, with the temporaries of two rounds alive
        return {name: {"failed": f"while timing: {brief(e)}", "compile_s": compile_s[name]} for name in methods}
    return {
        name: {
            **row_of(tried, {i: t for (of, i), t in timings.items() if of == name}),
            **sustained_of([t for (of, _), t in sustained.items() if of == name], in_a_row),
            "compile_s": compile_s[name],
        }
        for name, tried in attempts.items()
    }


def sustained_of(timings: Sequence[Timing], rounds: int) -> Row:
    """Of the configuration that takes the least for so many rounds in a row: what one of them takes."""
    if not timings:
        return {}
    best = each_round(min(timings, key=lambda timing: timing.median), rounds)
    return {"sustained_us_median": best.median, "sustained_us_p10": best.p10}


def build(
    method: Method[Served],
    tenants: Served,
    options: Sequence[Options],
    reference: list[np.ndarray] | None,
    tolerance: float,
) -> list[Attempt]:
    """Every configuration of a method, compiled and run once."""
    attempts = []
    for option in options:
        try:
            for candidate in method(tenants, option):
                error = largest_error(on_host(candidate), reference) if reference else 0.0
                wrong = not error <= tolerance  # a NaN is wrong too
                reason = f"outputs differ by {error:.1e}, more than {tolerance:.0e}" if wrong else ""
                attempts.append(Attempt(option, None if wrong else candidate, error, reason))
        except (jax.errors.JaxRuntimeError, MemoryError, CoalesceError) as e:
            attempts.append(Attempt(option, None, failed=brief(e)))
    return attempts


def brief(e: BaseException) -> str:
    """The first line of an error; the exception itself would keep the arrays of its frames alive."""
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"


def on_host(candidate: Candidate) -> list[np.ndarray]:
    """Each tenant's outputs of one round, as one flat array."""
    outputs = [jax.tree.leaves(tenant) for tenant in candidate.split(candidate.run())]
    return [np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves]) for leaves in outputs]


def largest_error(outputs: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """Of the tenants, the largest norm of the difference relative to the norm of the reference."""
    pairs = zip(outputs, reference, strict=True)
    return max(float(np.linalg.norm(out - want) / np.linalg.norm(want)) for out, want in pairs)


def row_of(attempts: Sequence[Attempt], timings: Mapping[int, Timing]) -> Row:
    """The best configuration's numbers, and every configuration that was tried."""
    tried: list[Row] = []
    for i, attempt in enumerate(attempts):
        how = attempt.candidate.how if attempt.candidate else ""
        median = {"round_us_median": timings[i].median} if i in timings else {"failed": attempt.failed}
        tried.append({"how": how, "options": attempt.options, **median})
    if not timings:
        return {"failed": "; ".join(a.failed for a in attempts), "tried": tried}
    best = min(timings, key=lambda i: timings[i].median)
    time_, candidate = timings[best], attempts[best].candidate
    facts = {"facts": candidate.facts} if candidate and candidate.facts else {}
    return {
        "round_us_median": time_.median,
        "round_us_p10": time_.p10,
        "round_us_p90": time_.p90,
        "repeats": time_.repeats,
        "error": attempts[best].error,
        "how": tried[best]["how"],
        "options": attempts[best].options,
        "failed": "",
        **facts,
        "tried": tried,
    }
