"""Claim: a round of many tenants costs little more than a round of one, once their programs are fused.

    python -m experiments.tenant_scaling --model=mlp --tenants=1,2,4,8,16,32,64
    python -m experiments.tenant_scaling --model=resnet50 --dtype=bfloat16 --tenants=1,16 --seconds=60

Times one round of n tenants of one model, with distinct weights and distinct inputs, by each method of
experiments/methods.py. A cell is one number of tenants: all methods give the same outputs, or are not timed; then they
are timed in turns, each in several configurations, of which the best counts. Rows are written as their cell ends, and a
second run fills in what the first one left out.
"""

from __future__ import annotations

import ast
import gc
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from coalesce.errors import CoalesceError
from coalesce.models import by_name, Model, NAMES
from experiments import methods
from experiments.measure import interleave
from experiments.methods import Candidate, Method, Options, Tenants
from experiments.results import device_folder, header, load_rows, plot, Row, save_rows, table

METHODS: dict[str, Method] = {
    "sequential": methods.sequential,
    "one_program": methods.one_program,
    "vmap": methods.vmap,
    "fused": methods.fused,
    "own_jit": methods.own_jit,
}
# CUDA graphs over dynamic slices as well: the default leaves those out, and each of them then cuts the graph in two.
GPU_OPTIONS = '{"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"}'

FLAGS = flags.FLAGS
flags.DEFINE_enum("model", "mlp", NAMES, "which model the tenants run")
flags.DEFINE_list("override", [], "fields of the model to set, as width=64,layers=12")
flags.DEFINE_integer("image_size", None, "the same as --override=image_size=...")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and activations")
flags.DEFINE_integer("batch", 1, "rows of a request")
flags.DEFINE_list("tenants", ["1", "2", "4", "8", "16", "32", "64"], "numbers of tenants, a cell each")
flags.DEFINE_list("methods", list(METHODS), f"some of {', '.join(METHODS)}; own_jit runs with one tenant only")
flags.DEFINE_string("precision", None, "of matrix products, such as highest; default: JAX's own")
flags.DEFINE_float("tolerance", None, "largest error relative to sequential; default: by dtype and precision")
flags.DEFINE_integer("repeats", 300, "timed rounds of each candidate")
flags.DEFINE_float("seconds", 30.0, "of timing in one cell; ends the repeats early")
flags.DEFINE_float("budget_s", None, "start no further cell after so many seconds")
flags.DEFINE_integer("max_one_program", 16, "one_program with more tenants is left out: it compiles too long")
flags.DEFINE_string("compiler_options", None, "XLA's, as JSON, for every method alike; default: {} on a CPU")
flags.DEFINE_bool("try_options", True, "also measure with XLA's defaults, and keep each method's better one")
flags.DEFINE_bool("own_executables", None, "sequential also with an executable for each tenant; default: on a GPU")
flags.DEFINE_bool("within_program", False, "fused also with within_program=True")
flags.DEFINE_string("note", "", "goes into the header, such as: shared machine")
flags.DEFINE_string("out", None, "folder of the results; default: experiments/results/<device>")
flags.DEFINE_bool("force", False, "measure again what the result file has already")


def tenants_of(model: Model, count: int, batch: int) -> Tenants:
    """Tenants with weights and requests of their own; tenant i is the same in every cell."""

    @jax.jit
    def make(key: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        weights, noise, request = jax.random.split(key, 3)
        leaves, tree = jax.tree.flatten(model.init(weights))
        keys = jax.random.split(noise, len(leaves))
        return tree.unflatten(list(map(distinct, keys, leaves))), model.example(request, batch)

    made = [make(jax.random.key(tenant)) for tenant in range(count)]
    return Tenants(model.apply, [params for params, _ in made], [inputs for _, inputs in made])


def distinct(key: jax.Array, leaf: jax.Array) -> jax.Array:
    """Initial biases, scales and statistics are equal in all tenants; a little noise tells them apart."""
    if leaf.ndim != 1 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return leaf + (0.01 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)


def why_not(method: str, count: int) -> str:
    if method == "one_program" and count > FLAGS.max_one_program:
        return f"not run above {FLAGS.max_one_program} tenants: XLA's compile time grows faster than the program"
    return ""


def measure_cell(model: Model, count: int, names: list[str], options: list[Options], tolerance: float) -> list[Row]:
    """One row a method."""
    tenants = tenants_of(model, count, FLAGS.batch)
    reference = None
    found: dict[str, list[tuple[Candidate, Options]]] = {}
    rows: dict[str, Row] = {name: {"method": name, "failed": why_not(name, count)} for name in names}
    # Sequential comes first: what it computes is what the others are compared with.
    for name in dict.fromkeys(["sequential", *(name for name in names if not why_not(name, count))]):
        row, start = rows.get(name, {}), time.perf_counter()
        print(f"  {name}: compiling", file=sys.stderr, flush=True)
        try:
            for option in options:
                for candidate in built(name)(tenants, option):
                    outputs = on_host(candidate.split(candidate.run()))
                    reference = outputs if reference is None else reference
                    row["error"] = max(row.get("error", 0.0), largest_error(outputs, reference))
                    found.setdefault(name, []).append((candidate, option))
        except (jax.errors.JaxRuntimeError, MemoryError, CoalesceError) as e:
            row["failed"] = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
        row["compile_s"] = round(time.perf_counter() - start, 2)
        if not row["failed"] and not row["error"] <= tolerance:
            row["failed"] = f"differs from sequential by {row['error']:.1e}, more than {tolerance:.0e}"
        if row["failed"] or name not in rows:
            found.pop(name, None)
    # The rounds of one method side by side are as far apart as those of two methods: each has the same neighbours.
    contenders = {(name, i): c.run for name, all_ in found.items() for i, (c, _) in enumerate(all_)}
    timings = interleave(contenders, repeats=FLAGS.repeats, seconds=FLAGS.seconds) if contenders else {}
    for name, all_ in found.items():
        tried = [{"how": c.how, "options": o, "round_us_median": timings[name, i].median} for i, (c, o) in enumerate(all_)]
        best = min(range(len(all_)), key=lambda i: tried[i]["round_us_median"])
        t = timings[name, best]
        quantiles = {"round_us_median": t.median, "round_us_p10": t.p10, "round_us_p90": t.p90, "repeats": t.repeats}
        rows[name] |= quantiles | {k: tried[best][k] for k in ("how", "options")}
        rows[name] |= {"tried": tried} if len(tried) > 1 else {}
    return list(rows.values())
