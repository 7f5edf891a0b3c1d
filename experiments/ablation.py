"""What each optional pass of the compiler brings, to which model, on the device at hand.

    python -m experiments.ablation --models=lstm,bert_base --dtypes=bfloat16 --tenants=8
    python -m experiments.ablation --models=mlp --fields=mlp.width=64 --methods=fuse_epilogues,join_arrays
    python -m experiments.ablation --models=vit_b16 --methods=nothing --databases=mine.json,theirs.json

Fuses n tenants with all passes, with all but one (`fuse(without=[pass])`), untuned, and tuned by other databases, each
in a program of its own, whose outputs are compared with those of the tenants one after the other. Programs whose plan
is the same as with all passes are not timed; the others take turns, a round by itself and rounds in a row, inputs and
outputs stacked. A cell is one model, dtype and number of tenants; a second run measures only the cells that are not
there yet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

import coalesce
from coalesce.bundle import packs
from coalesce.compile import OPTIONAL_PASSES
from coalesce.models import by_name, NAMES
from experiments import methods, pairs, settings
from experiments.cells import brief, largest_error, on_host, tenants_of
from experiments.list_flags import define, define_counts, define_fields_of_models, define_names
from experiments.methods import Tenants
from experiments.peers_common import Burst
from experiments.results import device_name, header, Row, table

ALL, UNTUNED = "nothing", "tuning"
VARIANTS = (ALL, *OPTIONAL_PASSES, UNTUNED)
DTYPES = ("float32", "bfloat16")


def there(item: str) -> str:
    """Of --databases, if it is a file; one that is no database has a row that says so."""
    if not Path(item).is_file():
        raise ValueError(f"there is no file {item}")
    return item


FLAGS = flags.FLAGS  # experiments/settings.py has more of them; --methods are what is left out
flags.adopt_module_key_flags(settings)
define_names("models", ["resnet50", "bert_base", "lstm"], "the models, one after the other", NAMES)
define_fields_of_models("fields", "fields of single models to set, as in lstm.steps=5,vgg16.image_size=32")
define_names("dtypes", list(DTYPES), "dtypes of weights and activations", DTYPES)
define_counts("tenants", [8], "numbers of tenants")
define(there, "databases", [], "files of tuning databases, each of which takes the place of the usual ones once")


class Cell(NamedTuple):
    model: str
    dtype: str
    tenants: int


def main(argv: Sequence[str]) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    settings.begin(argv, VARIANTS)
    fields = settings.fields_of_models(FLAGS.fields)
    head = header(
        settings.command("ablation"),
        FLAGS.device_name or device_name(),
        FLAGS.note,
        batch=FLAGS.batch,
        fields=fields,
        precision=FLAGS.precision,
    )
    path = settings.folder() / "ablation.json"
    cells = [Cell(m, d, n) for m in FLAGS.models for d in FLAGS.dtypes for n in FLAGS.tenants]
    rows = settings.measure_cells(
        path,
        head,
        cells,
        cell_of=lambda row: Cell(row["model"], row["dtype"], row["tenants"]),
        methods=lambda _: variants(),
        measure=lambda cell: measure(cell, fields.get(cell.model, {})),
        order=lambda row: (row["model"], row["dtype"], row["tenants"], place(row["method"])),
    )
    if rows:
        text = report(head, rows)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)


def variants() -> list[str]:
    """Those that --methods asks for, databases, and the one that they are compared with."""
    own = [name for name in VARIANTS if name == ALL or FLAGS.methods is None or name in FLAGS.methods]
    return own + [database(path) for path in FLAGS.databases]


def database(path: str) -> str:
    """What is left out for a database: the usual ones."""
    return f"{UNTUNED} but {path}"


def place(method: str) -> tuple[int, str]:
    """Databases last, by name."""
    return VARIANTS.index(method) if method in VARIANTS else len(VARIANTS), method


def measure(cell: Cell, fields: dict[str, Any]) -> list[Row]:
    model = by_name(cell.model, dtype=cell.dtype, param_dtype=cell.dtype, **fields)
    tenants, options = tenants_of(model, cell.tenants, FLAGS.batch), settings.options_to_try()[0]
    want = on_host(next(methods.sequential(tenants, options)))
    rows: dict[str, Row] = {}
    bursts: dict[str, Burst] = {}
    plans: dict[str, str] = {}
    for name in variants():
        print(f"{cell.model}, {cell.dtype}, {cell.tenants} tenants: without {name}", file=sys.stderr, flush=True)
        try:
            fused = fuse(tenants, name)
            if (plan := plan_of(fused)) in plans.values():
                rows[name] = {"same_as": next(other for other, text in plans.items() if text == plan)}
                continue
            rows[name], bursts[name], plans[name] = *built(fused, tenants, options, want, cell.dtype), plan
        except Exception as e:  # whatever fails is the variant's result
            rows[name] = {"failed": brief(e)}
    alone = pairs.timed(bursts, FLAGS.repeats, FLAGS.seconds)
    in_a_row = {name: pairs.in_a_row(burst) for name, burst in bursts.items()}
    sustained = pairs.timed(in_a_row, max(3, FLAGS.repeats // pairs.IN_A_ROW), FLAGS.seconds)
    for name in bursts:
        of_round = {f"round_us_{q}": getattr(alone[name], q) for q in ("median", "p10", "p90")}
        rows[name] |= {**of_round, "sustained_us_median": sustained[name].median, "repeats": alone[name].repeats}
    pairs.free()
    return [{**cell._asdict(), "method": name, "same_as": "", "failed": "", **row} for name, row in rows.items()]


def fuse(tenants: Tenants, left_out: str) -> coalesce.Fused:
    without = [left_out] if left_out in OPTIONAL_PASSES else []
    files = {database(path): path for path in FLAGS.databases}
    tuned = False if left_out == UNTUNED else files.get(left_out)
    return coalesce.fuse(methods.traced(tenants), without=without, tuned=tuned)


def plan_of(fused: coalesce.Fused) -> str:
    """Equal for programs that compute the same in the same way."""
    chosen = [f"{pack.kernel} {pack.blocks}" for pack in packs(fused.bundle.schedule)]
    return "\n".join([str(fused), *chosen])


def built(
    fused: coalesce.Fused, tenants: Tenants, options: dict[str, Any], want: Sequence[np.ndarray], dtype: str
) -> tuple[Row, Burst]:
    """Raises ValueError where outputs differ by more than the tolerance."""
    candidate = methods.in_stacks(fused, tenants, options)
    error, tolerance = largest_error(on_host(candidate), list(want)), settings.tolerance(dtype)
    if not error <= tolerance:
        raise ValueError(f"outputs differ by {error:.1e}, more than {tolerance:.0e}")
    return {"error": error}, Burst(candidate, 1)


def report(head: dict[str, Any], rows: Sequence[Row]) -> str:
    parts = [
        "# What each pass brings",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        "Median microseconds a round without a pass, and how many times that with all of them, which took turns with "
        "it; *sustained*: of ten rounds that are issued one after the other.",
    ]
    for cell in dict.fromkeys((row["model"], row["dtype"], row["tenants"]) for row in rows):
        own = [row for row in rows if (row["model"], row["dtype"], row["tenants"]) == cell]
        base = next(row for row in own if row["method"] == ALL)
        lines = [[row["method"], *shown(row, base)] for row in own]
        parts += [f"## {cell[0]}, {cell[1]}, {cell[2]} tenants", table(["without", "a round", "sustained"], lines)]
    return "\n\n".join(parts) + "\n"


def shown(row: Row, base: Row) -> list[str]:
    if row["failed"]:
        return [row["failed"], ""]
    if row["same_as"]:
        return ["same program" if row["same_as"] == ALL else f"as without {row['same_as']}", ""]
    return [relative(row, base, "round_us_median"), relative(row, base, "sustained_us_median")]


def relative(row: Row, base: Row, name: str) -> str:
    times = f" ({row[name] / base[name]:.2f}x)" if row is not base and base.get(name) else ""
    return f"{row[name]:,.0f}{times}"


if __name__ == "__main__":
    app.run(main)
