"""The flags of the timed experiments, what follows from them, and cells that are measured once."""

from __future__ import annotations

import ast
import gc
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from experiments.methods import Options
from experiments.results import device_folder, load_rows, Row, save_rows, writable


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


# CUDA graphs over dynamic slices and over cuDNN's convolutions too: the default leaves these out, and each of them cuts
# a graph in two. With convolutions a ResNet-50 of its own jit takes half as long on an H100.
COMMAND_BUFFERS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONVOLUTION",
}
# Kernels one by one: the first starts while the host launches the others, and none waits for a graph to be updated. It
# wins where kernels take longer than their launch.
ONE_BY_ONE = {"xla_gpu_enable_command_buffer": ""}

FLAGS = flags.FLAGS
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of weights and activations")
flags.DEFINE_integer("batch", 1, "rows of a request", lower_bound=1)
flags.DEFINE_list("methods", None, "which methods; all if not given, and sequential always")
flags.DEFINE_string("precision", None, "jax_default_matmul_precision, such as highest")
flags.DEFINE_float("tolerance", None, "largest error relative to sequential; by dtype and device if not given")
flags.DEFINE_integer("repeats", 300, "timed rounds of each configuration", lower_bound=1)
flags.DEFINE_float("seconds", 60.0, "most time for the repeats of a cell")
flags.DEFINE_float("budget_s", None, "no cell starts after so many seconds")
for limit in ("tolerance", "seconds", "budget_s"):  # a lower bound lets nan through
    flags.register_validator(limit, lambda given: given is None or given >= 0, "a number from 0 is wanted")
flags.DEFINE_string("compiler_options", None, "JSON, for all methods; on a GPU CUDA graphs if not given")
flags.register_validator("compiler_options", lambda given: given is None or is_object(given), "not a JSON object")
flags.DEFINE_bool(
    "try_options",
    True,
    "try XLA's defaults beside --compiler_options, and on a GPU no CUDA graphs, and keep each method's best",
)
flags.DEFINE_bool("own_executables", None, "try an executable a tenant for sequential; on a GPU unless said otherwise")
flags.DEFINE_string("device_name", None, "how the results call the device")
flags.DEFINE_string("note", "", "a remark for the results' header, such as that others use the machine too")
flags.DEFINE_string("out", None, "folder of the results; experiments/results/<device> if not given")
flags.DEFINE_bool("force", False, "measure again what the results have already")


def begin(argv: Sequence[str], methods: Iterable[str]) -> None:
    """What every main does first."""
    if unknown := [*argv[1:], *(set(FLAGS.methods or ()) - set(methods))]:
        raise app.UsageError(f"what is {unknown[0]}? Methods: {', '.join(methods)}")
    logging.set_verbosity(logging.WARNING)  # JAX names every backend that it does not find
    if FLAGS.precision:
        try:
            jax.config.update("jax_default_matmul_precision", FLAGS.precision)
        except ValueError as e:
            raise app.UsageError(f"--precision={FLAGS.precision}: {e}") from None


def wanted(methods: Iterable[str]) -> list[str]:
    """Those that --methods asks for, and sequential, with whose outputs the others' are compared."""
    return [name for name in methods if FLAGS.methods is None or name in FLAGS.methods or name == "sequential"]


def options_to_try() -> list[Options]:
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu:
        wake_cudnn()
    given = FLAGS.compiler_options
    options = json.loads(given) if given is not None else COMMAND_BUFFERS if on_gpu else {}
    others: list[Options] = [{}, ONE_BY_ONE] if on_gpu else [{}]
    return [options, *others] if FLAGS.try_options and options else [options]


def wake_cudnn() -> None:
    """A convolution outside of any CUDA graph. cuDNN's handle cannot be made while a graph is recorded, which is the
    first that happens where executables with COMMAND_BUFFERS come from JAX's compilation cache and nothing is tuned."""
    image, kernel = jnp.ones((1, 8, 8, 8)), jnp.ones((3, 3, 8, 8))
    dimensions = ("NHWC", "HWIO", "NHWC")
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    jax.block_until_ready(jax.jit(partial(convolve, dimension_numbers=dimensions))(image, kernel))


def own_executables() -> bool:
    return jax.default_backend() == "gpu" if FLAGS.own_executables is None else FLAGS.own_executables


def tolerance(dtype: str | None = None) -> float:
    """Deep random networks amplify rounding; errors in the rows say how far each method really is."""
    if FLAGS.tolerance is not None:
        return FLAGS.tolerance
    if (dtype or FLAGS.dtype) == "bfloat16":
        return 1e-1
    return 1e-5 if jax.default_backend() == "cpu" or FLAGS.precision == "highest" else 1e-2


def limits() -> dict[str, Any]:
    """For `measure_cell`."""
    return {"tolerance": tolerance(), "repeats": FLAGS.repeats, "seconds": FLAGS.seconds}


def command(script: str, *without: str) -> str:
    """The command line, without what the header says anyway and without the folder of one machine."""
    left_out = ("device_name", "force", "note", "out", *without)
    names = [name for name in FLAGS if FLAGS[name].present and name not in left_out]
    return shlex.join(["python", "-m", f"experiments.{script}", *(FLAGS[name].serialize() for name in names)])


def folder() -> Path:
    return writable(Path(FLAGS.out or Path("experiments", "results", device_folder())))


def named(item: str) -> tuple[str, dict[str, Any]]:
    """A model, or one field of it: `mlp`, or `mlp.width=64`."""
    place, _, value = item.partition("=")
    model, _, field = place.partition(".")
    return model, {field: ast.literal_eval(value)} if field else {}


def fields_of_models(items: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By model, of items as in `lstm.steps=5`."""
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        model, own = named(item)
        found.setdefault(model, {}).update(own)
    return found


def measure_cells(
    path: Path,
    head: dict[str, Any],
    cells: Sequence[Any],
    *,
    cell_of: Callable[[Row], Any],
    methods: Callable[[Any], Iterable[str]],
    measure: Callable[[Any], list[Row]],
    order: Callable[[Row], Any],
) -> list[Row]:
    """All rows of a file, with those of the cells that it lacks measured now; it is written after each of them."""
    start = time.perf_counter()
    rows = [] if FLAGS.force else load_rows(path, head)
    for cell in cells:
        if set(methods(cell)) <= {row["method"] for row in rows if cell_of(row) == cell}:
            continue
        if FLAGS.budget_s is not None and time.perf_counter() - start > FLAGS.budget_s:
            print(f"the budget of {FLAGS.budget_s:g} s is spent; the same command goes on from here", file=sys.stderr)
            break
        new = measure(cell)
        rows = sorted([row for row in rows if cell_of(row) != cell] + new, key=order)
        save_rows(path, head, rows)
        gc.collect()  # the cell's weights lie in cycles of closures; the next cell needs their memory
    return rows
