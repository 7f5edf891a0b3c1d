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
    coalesced  once for each peer
    floor      floor: see experiments/floor.py; own_batch: one tenant with all n requests as its batch
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from coalesce.models import by_name, Model, NAMES
from experiments import floor, pairs, peers_jax, peers_processes, peers_torch, settings
from experiments.cells import brief, tenants_of
from experiments.list_flags import define_counts, define_fields_of_models, define_names
from experiments.multiplexing_report import plot, report
from experiments.pairs import Best, Limits
from experiments.peers_common import Cell, Peer
from experiments.results import device_name, header, load_rows, Row, save_rows
from experiments.warming import compile_beside, handed_on, share_cache

GROWS = "its compile time grows faster than the program"
CROWD = "so many processes and their contexts are no way to serve"
PEERS = {
    "jax_in_turn": Peer("time", peers_jax.in_turn),
    "torch_in_turn": Peer("time", peers_torch.in_turn),
    "processes": Peer("time", peers_processes.time_sliced, 16, CROWD),
    "torch_streams": Peer("space", peers_torch.streams),
    "processes_mps": Peer("space", peers_processes.under_mps, 16, CROWD),
    "xla_concurrent": Peer("space", peers_jax.concurrent, 16, GROWS),
    "jax_vmap": Peer("user", peers_jax.vmap),
    "torch_vmap": Peer("user", peers_torch.vmap),
    "torch_compile": Peer("user", peers_torch.compiled, 16, GROWS),
    "own_batch": Peer("floor", peers_jax.own_batch),
}
METHODS = (*PEERS, "floor")
MODELS = ("resnet50", "resnet18", "vgg16", "mobilenetv2", "bert_base", "vit_b16", "lstm")
DTYPES = ("float32", "bfloat16")
TENANTS = {"resnet50": (1, 2, 4, 8, 16, 32, 64)}  # of the others 1, 8 and 32
NOTHING_AHEAD = ("processes", "processes_mps", "floor")  # compile in processes of their own, or in no time
PER_CELL = ("models", "dtypes", "tenants", "methods", "compile_beside", "budget_s")

FLAGS = flags.FLAGS  # experiments/settings.py has more of them; --dtypes stands for its --dtype
define_names("models", list(MODELS), "the models, one after the other", NAMES)
define_fields_of_models("fields", "fields of single models to set, as in lstm.steps=5,vgg16.image_size=32")
define_counts("tenants", None, "numbers of tenants; if not given, by model")
define_names("dtypes", list(DTYPES), "dtypes of weights and activations", DTYPES)
flags.DEFINE_bool("within_program", False, "also let Coalesce pack equal ops of one tenant")
flags.DEFINE_bool("pallas", True, "on a GPU also try Coalesce with Pallas kernels wherever they run, tuned or not")
flags.DEFINE_bool("autotune", False, "also try PyTorch compiled with max-autotune, which takes minutes a model")
flags.DEFINE_bool("retry_failed", False, "measure again the rows that failed")
flags.DEFINE_integer("compile_beside", 0, "first compile all cells, so many processes at once, and time none meanwhile")


class Pair(NamedTuple):
    """A cell of the results."""

    model: str
    dtype: str
    tenants: int
    pair: str


def main(argv: Sequence[str]) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers need the device's memory too
    settings.begin(argv, METHODS)
    fields = settings.fields_of_models(FLAGS.fields)
    conditions = {"batch": FLAGS.batch, "fields": fields, "precision": FLAGS.precision}
    head = header(
        settings.command("multiplexing", "compile_beside"), FLAGS.device_name or device_name(), FLAGS.note, **conditions
    )
    path = settings.folder() / ("multiplexing.json" if FLAGS.batch == 1 else f"multiplexing_batch{FLAGS.batch}.json")
    if FLAGS.retry_failed and path.exists():
        save_rows(path, head, [row for row in load_rows(path, head) if not row["failed"]])

    if FLAGS.compile_beside:
        compile_beside("multiplexing", cells_to_compile(path, head), FLAGS.compile_beside, share_cache())
    bench = Bench(fields)
    rows = settings.measure_cells(
        path,
        head,
        wanted(),
        cell_of=pair_of,
        methods=lambda pair: [pair.pair],
        measure=bench.measure,
        order=place,
    )
    if not rows:
        return
    text = report(head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        print(plot(path.with_name(f"{path.stem}_{model}_{dtype}.png"), f"{model}, {dtype}", own))


def wanted() -> list[Pair]:
    """Pairs of one model, dtype and number of tenants in a row: they share what `Bench` holds."""
    return [
        Pair(model, dtype, count, method)
        for model in FLAGS.models
        for dtype in FLAGS.dtypes
        for count in FLAGS.tenants or TENANTS.get(model, (1, 8, 32))
        for method in METHODS
        if FLAGS.methods is None or method in FLAGS.methods
    ]


def cells_to_compile(path: Path, head: dict[str, Any]) -> list[list[str]]:
    """The flags of a process for each model, dtype and number of tenants of which a pair is missing."""
    there = set() if FLAGS.force else {pair_of(row) for row in load_rows(path, head)}
    missing: dict[tuple[str, str, int], list[str]] = {}
    for pair in wanted():
        if pair not in there and pair.pair not in NOTHING_AHEAD:
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


class Bench:
    """Measures pairs, and keeps between those of the same tenants what all of them need."""

    def __init__(self, fields: dict[str, dict[str, Any]]) -> None:
        self.fields = fields
        self.key: tuple[str, str, int] | None = None
        self.held: Held | None = None
        self.ceilings = cache(floor.measure_ceilings)

    def measure(self, pair: Pair) -> list[Row]:
        print(f"{pair.model}, {pair.dtype}, {pair.tenants} tenants: {pair.pair}", file=sys.stderr, flush=True)
        fields = self.fields.get(pair.model, {})
        model = by_name(pair.model, dtype=pair.dtype, param_dtype=pair.dtype, **fields)
        if pair.pair == "floor":
            rows = [floor.floor_row(model, pair.tenants, FLAGS.batch, self.ceilings(pair.dtype))]
        else:
            rows = self.alternate(pair, model, fields)
        common = {"model": pair.model, "dtype": pair.dtype, "tenants": pair.tenants, "batch": FLAGS.batch}
        pairs.free()
        return [{**common, "pair": pair.pair, **row} for row in rows]

    def alternate(self, pair: Pair, model: Model, fields: dict[str, Any]) -> list[Row]:
        limits = Limits(settings.tolerance(pair.dtype), FLAGS.repeats, FLAGS.seconds)
        peer = PEERS[pair.pair]
        if peer.most is not None and pair.tenants > peer.most:
            reason = f"left out above {peer.most} tenants: {peer.because}"
            return [{"method": pair.pair, "kind": peer.kind, "failed": reason}]
        if self.held is None or self.key != pair[:3]:
            self.held = None  # the last tenants' weights, before there are new ones
            pairs.free()
            try:
                self.held, self.key = hold(pair, model, fields, limits), pair[:3]
            except (jax.errors.JaxRuntimeError, MemoryError) as e:
                return [{"method": pair.pair, "kind": peer.kind, "failed": f"no reference: {brief(e)}"}]
        return pairs.measure_pair(self.held.cell, pair.pair, peer, self.held.ours, self.held.want, limits)


class Held(NamedTuple):
    """Tenants, the outputs that everybody's are compared with, and Coalesce's best configuration."""

    cell: Cell
    want: list[np.ndarray]
    ours: Best


def hold(pair: Pair, model: Model, fields: dict[str, Any], limits: Limits) -> Held:
    print("  coalesced: building", file=sys.stderr, flush=True)
    tenants = tenants_of(model, pair.tenants, FLAGS.batch)
    options = settings.options_to_try()
    given = model, fields, pair.dtype, FLAGS.batch, FLAGS.precision, tenants, options
    cell = Cell(*given, until_end=ExitStack(), autotune=FLAGS.autotune)
    want = pairs.reference(cell)
    ours = partial(pairs.coalesced, within_program=FLAGS.within_program, try_pallas=FLAGS.pallas)
    return Held(cell, want, pairs.best_of(ours, cell, want, limits))


if __name__ == "__main__":
    app.run(main)
