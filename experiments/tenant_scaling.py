"""Claim: serving many tenants of one model costs much less in one fused program than one tenant after the other.

    python -m experiments.tenant_scaling --model=mlp --override=width=64 --tenants=1,4,16
    python -m experiments.tenant_scaling --model=resnet50 --dtype=bfloat16 --tenants=1,16 --seconds=60

Times one round of n tenants, with distinct weights and distinct inputs, by each method of experiments/methods.py, in
every configuration of it that is worth trying, of which the best counts. A cell is one number of tenants: outputs are
compared first, and then all configurations are timed in turns. Rows are written when their cell ends, and a second run
measures only the cells that are not there yet.
"""

from __future__ import annotations

import ast
import gc
import json
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from coalesce.models import by_name, Model, NAMES
from experiments import methods
from experiments.cells import measure_cell, tenants_of
from experiments.methods import Method, Options
from experiments.results import device_folder, device_name, header, load_rows, plot, Row, save_rows
from experiments.scaling_report import report

METHODS: dict[str, Method] = {
    "sequential": methods.sequential,  # first: the others' outputs are compared with its
    "one_program": methods.one_program,
    "vmap": methods.vmap,
    "fused": methods.fused,
    "own_jit": methods.own_jit,
}
# CUDA graphs over dynamic slices too: the default leaves these out, and each of them cuts a graph in two.
COMMAND_BUFFERS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION",
}

FLAGS = flags.FLAGS
flags.DEFINE_enum("model", "mlp", NAMES, "the model of all tenants")
flags.DEFINE_list("override", [], "fields of the model to set, as in width=64,layers=12")
flags.DEFINE_integer("image_size", None, "short for --override=image_size=...")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of weights and activations")
flags.DEFINE_integer("batch", 1, "rows of a request")
flags.DEFINE_list("tenants", ["1", "2", "4", "8", "16", "32", "64"], "numbers of tenants, one cell each")
flags.DEFINE_list("methods", list(METHODS), f"which of {', '.join(METHODS)}; sequential always runs")
flags.DEFINE_string("precision", None, "jax_default_matmul_precision, such as highest")
flags.DEFINE_float("tolerance", None, "largest error relative to sequential; by dtype and device if not given")
flags.DEFINE_integer("repeats", 300, "timed rounds of each configuration")
flags.DEFINE_float("seconds", 60.0, "most time for the repeats of a cell")
flags.DEFINE_float("budget_s", None, "no cell starts after so many seconds")
flags.DEFINE_integer("max_one_program", 16, "one_program is left out with more tenants than that")
flags.DEFINE_string("compiler_options", None, "JSON, for all methods; on a GPU CUDA graphs if not given")
flags.DEFINE_bool("try_options", True, "try XLA's defaults beside --compiler_options and keep each method's better one")
flags.DEFINE_bool("own_executables", None, "try an executable a tenant for sequential; on a GPU unless said otherwise")
flags.DEFINE_bool("within_program", False, "try within_program=True for fused")
flags.DEFINE_string("device_name", None, "how the results call the device")
flags.DEFINE_string("note", "", "a remark for the results' header, such as that others use the machine too")
flags.DEFINE_string("out", None, "folder of the results; experiments/results/<device> if not given")
flags.DEFINE_bool("force", False, "measure again what the results have already")


def chosen_model() -> tuple[Model, str]:
    """The model, and its name with what was overridden."""
    overrides = dict(item.split("=", 1) for item in FLAGS.override)
    if FLAGS.image_size is not None:
        overrides["image_size"] = str(FLAGS.image_size)
    fields: dict[str, Any] = {name: ast.literal_eval(value) for name, value in overrides.items()}
    model = by_name(FLAGS.model, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype, **fields)
    return model, " ".join([FLAGS.model, *(f"{name}={value}" for name, value in overrides.items())])


def options_to_try() -> list[Options]:
    on_gpu = jax.default_backend() == "gpu"
    given = FLAGS.compiler_options
    options = json.loads(given) if given is not None else COMMAND_BUFFERS if on_gpu else {}
    return [options, {}] if FLAGS.try_options and options else [options]


def chosen_methods(count: int) -> dict[str, Method]:
    """The methods of a cell, configured."""
    own = jax.default_backend() == "gpu" if FLAGS.own_executables is None else FLAGS.own_executables
    configured = METHODS | {
        "sequential": partial(methods.sequential, own_executables=own),
        "fused": partial(methods.fused, within_program=FLAGS.within_program),
    }
    wanted = [name for name in METHODS if name in FLAGS.methods or name == "sequential"]
    return {name: configured[name] for name in wanted if name != "own_jit" or count == 1}


def given_flags() -> list[str]:
    """The command line, without what the header says anyway and without the folder of one machine."""
    names = [name for name in FLAGS if FLAGS[name].present and name not in ("device_name", "force", "note", "out")]
    return [FLAGS[name].serialize() for name in names]


def default_tolerance() -> float:
    """Deep random networks amplify rounding; errors in the rows say how far each method really is."""
    if FLAGS.dtype == "bfloat16":
        return 1e-1
    return 1e-5 if jax.default_backend() == "cpu" or FLAGS.precision == "highest" else 1e-2


def left_out(count: int) -> dict[str, Row]:
    """Methods that a cell does not run, with the reason."""
    if count <= FLAGS.max_one_program or "one_program" not in FLAGS.methods:
        return {}
    reason = f"left out above {FLAGS.max_one_program} tenants: XLA's compile time grows faster than the program"
    return {"one_program": {"failed": reason}}


def main(argv: Sequence[str]) -> None:
    if unknown := [*argv[1:], *(set(FLAGS.methods) - set(METHODS))]:
        raise app.UsageError(f"what is {unknown[0]}? Methods: {', '.join(METHODS)}")
    start = time.perf_counter()
    logging.set_verbosity(logging.WARNING)  # JAX names every backend that it does not find
    if FLAGS.precision:
        jax.config.update("jax_default_matmul_precision", FLAGS.precision)
    model, label = chosen_model()
    tolerance = default_tolerance() if FLAGS.tolerance is None else FLAGS.tolerance
    common = {"model": label, "dtype": FLAGS.dtype, "batch": FLAGS.batch}
    settings = {**common, "precision": FLAGS.precision, "tolerance": tolerance}
    command = shlex.join(["python", "-m", "experiments.tenant_scaling", *given_flags()])
    head = header(command, FLAGS.device_name or device_name(), FLAGS.note, **settings)
    folder = Path(FLAGS.out or Path("experiments", "results", device_folder()))
    batch = [f"batch={FLAGS.batch}"] if FLAGS.batch > 1 else []
    stem = "_".join(["tenant_scaling", *label.replace("=", "").split(), FLAGS.dtype, *batch])
    path = folder / f"{stem}.json"
    rows = [] if FLAGS.force else load_rows(path, head)
    for count in map(int, FLAGS.tenants):
        cell_methods, skipped = chosen_methods(count), left_out(count)
        if set(cell_methods) <= {row["method"] for row in rows if row["tenants"] == count}:
            continue
        if FLAGS.budget_s is not None and time.perf_counter() - start > FLAGS.budget_s:
            print(f"the budget of {FLAGS.budget_s:g} s is spent; the same command goes on from here", file=sys.stderr)
            break
        print(f"{label}, {FLAGS.dtype}: {count} tenants", file=sys.stderr, flush=True)
        run = {name: method for name, method in cell_methods.items() if name not in skipped}
        limits = {"tolerance": tolerance, "repeats": FLAGS.repeats, "seconds": FLAGS.seconds}
        measured = measure_cell(tenants_of(model, count, FLAGS.batch), run, options_to_try(), **limits) | skipped
        new = [{**common, "tenants": count, "method": name, **measured[name]} for name in cell_methods]
        rows = sorted([row for row in rows if row["tenants"] != count] + new, key=lambda row: row["tenants"])
        save_rows(path, head, rows)
        gc.collect()  # the cell's weights lie in cycles of closures; the next cell needs their memory
    if not rows:
        return
    title = f"One round of n tenants: {label}, {FLAGS.dtype}, batch {FLAGS.batch}"
    text = report(title, head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(plot(path.with_suffix(".png"), title, rows, x="tenants", line="method"))


if __name__ == "__main__":
    app.run(main)
