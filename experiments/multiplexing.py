"""Claim: on today's device Coalesce serves tenants faster than every way to multiplex them in time or in space.

    python -m experiments.multiplexing --models=resnet50 --dtypes=bfloat16 --tenants=16
    python -m experiments.multiplexing --models=mlp --fields=mlp.width=64 --tenants=4 --methods=jax_in_turn,floor

Times one round of n tenants, with distinct weights and distinct inputs: from its first call until all results are
there, and (`sustained`) where ten are issued one after the other. Each peer alternates with Coalesce in a pair of their
own, each in its best configuration; its outputs are compared with those of JAX one tenant after the other. Rows are
written when their pair ends, and a second run measures only the pairs that are not there yet. What cannot run has a row
that says why; --retry_failed tries those again.

    time       jax_in_turn, torch_in_turn, processes (sliced by the driver)
    space      torch_streams, processes_mps, xla_concurrent
    user       jax_vmap, torch_vmap, torch_compile: what one writes without us
    coalesced  once for each peer; and by itself, if asked for: what a tenant costs
    floor      floor: see experiments/floor.py; own_batch: one tenant with all n requests as its batch
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from absl import app, flags

from coalesce.models import NAMES
from experiments import settings
from experiments.beside import Beside, devices, environment, handed_on
from experiments.list_flags import define_counts, define_fields_of_models, define_names
from experiments.multiplexing_bench import Bench, METHODS, Pair
from experiments.multiplexing_report import plot, report
from experiments.pairs import OURS
from experiments.results import device_name, header, load_rows, Row, save_rows

MODELS = ("resnet50", "resnet18", "vgg16", "mobilenetv2", "bert_base", "vit_b16", "lstm")
DTYPES = ("float32", "bfloat16")
TENANTS = {"resnet50": (1, 2, 4, 8, 16, 32, 64)}  # of the others 1, 8 and 32
PER_CELL = ("models", "dtypes", "tenants", "methods", "beside", "budget_s")

FLAGS = flags.FLAGS  # experiments/settings.py has more of them; --dtypes stands for its --dtype
flags.adopt_module_key_flags(settings)
define_names("models", list(MODELS), "the models, one after the other", NAMES)
define_fields_of_models("fields", "fields of single models to set, as in lstm.steps=5,vgg16.image_size=32")
define_counts("tenants", None, "numbers of tenants; if not given, by model")
define_names("dtypes", list(DTYPES), "dtypes of weights and activations", DTYPES)
flags.DEFINE_bool("within_program", False, "also let Coalesce pack equal ops of one tenant")
flags.DEFINE_bool("pallas", True, "on a GPU also try Coalesce with Pallas kernels wherever they run, tuned or not")
flags.DEFINE_bool("called", False, "on a GPU also try Coalesce as JAX calls it, beside as a CUDA graph of its own")
flags.DEFINE_bool("autotune", False, "also try PyTorch compiled with max-autotune, which takes minutes a model")
flags.DEFINE_bool("retry_failed", False, "measure again the rows that failed")
flags.DEFINE_integer(
    "beside", 0, "build so many cells at once, in processes of which none runs while another times", lower_bound=0
)


def main(argv: Sequence[str]) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers need the device's memory too
    settings.begin(argv, METHODS)
    fields = settings.fields_of_models(FLAGS.fields)
    conditions = {"batch": FLAGS.batch, "fields": fields, "precision": FLAGS.precision}
    head = header(settings.command("multiplexing"), FLAGS.device_name or device_name(), FLAGS.note, **conditions)
    path = settings.folder() / ("multiplexing.json" if FLAGS.batch == 1 else f"multiplexing_batch{FLAGS.batch}.json")
    if FLAGS.retry_failed and path.exists():
        known = load_rows(path, head)
        failed = {pair_of(row) for row in known if row["failed"]}
        save_rows(path, head, [row for row in known if pair_of(row) not in failed])

    rows = measure_beside(path, head) if FLAGS.beside else measure_here(path, head, fields)
    if not rows:
        return
    text = report(head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        print(plot(path.with_name(f"{path.stem}_{model}_{dtype}.png"), f"{model}, {dtype}", own))


def measure_here(path: Path, head: dict[str, Any], fields: dict[str, dict[str, Any]]) -> list[Row]:
    return settings.measure_cells(
        path,
        head,
        wanted(),
        cell_of=pair_of,
        methods=lambda pair: [pair.pair],
        measure=Bench(fields).measure,
        order=place,
    )


def measure_beside(path: Path, head: dict[str, Any]) -> list[Row]:
    """Rows of processes that wrote them into folders of their own."""
    rows = [] if FLAGS.force else load_rows(path, head)

    def ended(folder: Path) -> None:
        new = load_rows(folder / path.name, head)
        there = {pair_of(row) for row in new}
        rows[:] = sorted([row for row in rows if pair_of(row) not in there] + new, key=place)
        save_rows(path, head, rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "experiments.multiplexing"]
        beside = Beside(command, FLAGS.beside, Path(folder), environment(), devices())
        beside.measure(missing_cells(rows), ended, FLAGS.budget_s)
    return rows


def wanted() -> list[Pair]:
    """Pairs of one model, dtype and number of tenants in a row: they share what `Bench` holds."""
    return [
        Pair(model, dtype, count, method)
        for model in FLAGS.models
        for dtype in FLAGS.dtypes
        for count in FLAGS.tenants or TENANTS.get(model, (1, 8, 32))
        for method in METHODS
        if (method != OURS if FLAGS.methods is None else method in FLAGS.methods)  # its pairs say it as well
    ]


def missing_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The flags of a process for each model, dtype and number of tenants of which a pair is missing."""
    there = {pair_of(row) for row in rows}
    missing: dict[tuple[str, str, int], list[str]] = {}
    for pair in wanted():
        if pair not in there:
            missing.setdefault(pair[:3], []).append(pair.pair)
    common = handed_on(PER_CELL)
    return [
        [f"--models={model}", f"--dtypes={dtype}", f"--tenants={tenants}", f"--methods={','.join(methods)}", *common]
        for (model, dtype, tenants), methods in missing.items()
    ]


def pair_of(row: Row) -> Pair:
    return Pair(row["model"], row["dtype"], row["tenants"], row["pair"])


def place(row: Row) -> tuple[int, ...]:
    """Where a row belongs in the file."""
    names = (*MODELS, *(name for name in NAMES if name not in MODELS))
    methods = METHODS.index(row["pair"]), row["method"] == "coalesced"
    return names.index(row["model"]), DTYPES.index(row["dtype"]), row["tenants"], *methods


if __name__ == "__main__":
    app.run(main)
