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
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from absl import app, flags

from coalesce.models import by_name, Model, NAMES
from experiments import methods, settings
from experiments.cells import measure_cell, tenants_of
from experiments.list_flags import check_fields, define_counts, define_fields
from experiments.methods import Method, Tenants
from experiments.results import device_name, header, plot, Row
from experiments.scaling_report import report

METHODS: dict[str, Method[Tenants]] = {
    "sequential": methods.sequential,  # first: the others' outputs are compared with its
    "one_program": methods.one_program,
    "vmap": methods.vmap,
    "fused": partial(methods.fused, staged=True),
    "own_jit": methods.own_jit,
}

FLAGS = flags.FLAGS  # experiments/settings.py has more of them
flags.adopt_module_key_flags(settings)
flags.DEFINE_enum("model", "mlp", NAMES, "the model of all tenants")
define_fields("override", [], "fields of the model to set, as in width=64,layers=12")
flags.DEFINE_integer("image_size", None, "short for --override=image_size=...", lower_bound=1)
define_counts("tenants", [1, 2, 4, 8, 16, 32, 64], "numbers of tenants, one cell each")
flags.DEFINE_integer("max_one_program", 16, "one_program is left out with more tenants than that")
flags.DEFINE_bool("within_program", False, "try within_program=True for fused")


@flags.multi_flags_validator(["model", "image_size"])
def has_images(given: dict[str, Any]) -> bool:
    try:
        check_fields(given["model"], {} if given["image_size"] is None else {"image_size": given["image_size"]})
    except ValueError as e:
        raise flags.ValidationError(str(e)) from None
    return True


def chosen_model() -> tuple[Model, str]:
    """The model, and its name with what was overridden."""
    overrides = dict(item.split("=", 1) for item in FLAGS.override)
    if FLAGS.image_size is not None:
        overrides["image_size"] = str(FLAGS.image_size)
    fields: dict[str, Any] = {name: ast.literal_eval(value) for name, value in overrides.items()}
    model = by_name(FLAGS.model, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype, **fields)
    return model, " ".join([FLAGS.model, *(f"{name}={value}" for name, value in overrides.items())])


def chosen_methods(count: int) -> dict[str, Method[Tenants]]:
    """The methods of a cell, configured."""
    configured = METHODS | {
        "sequential": partial(methods.sequential, own_executables=settings.own_executables()),
        "fused": partial(methods.fused, within_program=FLAGS.within_program, staged=True),
    }
    return {name: configured[name] for name in settings.wanted(METHODS) if name != "own_jit" or count == 1}


def left_out(count: int) -> dict[str, Row]:
    """Methods that a cell does not run, with the reason."""
    if count <= FLAGS.max_one_program or "one_program" not in settings.wanted(METHODS):
        return {}
    reason = f"left out above {FLAGS.max_one_program} tenants: XLA's compile time grows faster than the program"
    return {"one_program": {"failed": reason}}


def main(argv: Sequence[str]) -> None:
    settings.begin(argv, METHODS)
    model, label = chosen_model()
    common = {"model": label, "dtype": FLAGS.dtype, "batch": FLAGS.batch}
    conditions = {**common, "precision": FLAGS.precision, "tolerance": settings.tolerance()}
    head = header(settings.command("tenant_scaling"), FLAGS.device_name or device_name(), FLAGS.note, **conditions)
    batch = [f"batch={FLAGS.batch}"] if FLAGS.batch > 1 else []
    stem = "_".join(["tenant_scaling", *label.replace("=", "").split(), FLAGS.dtype, *batch])
    path = settings.folder() / f"{stem}.json"

    def measure(count: int) -> list[Row]:
        print(f"{label}, {FLAGS.dtype}: {count} tenants", file=sys.stderr, flush=True)
        skipped, asked = left_out(count), chosen_methods(count)
        run = {name: method for name, method in asked.items() if name not in skipped}
        tenants = tenants_of(model, count, FLAGS.batch)
        measured = measure_cell(tenants, run, settings.options_to_try(), **settings.limits()) | skipped
        return [{**common, "tenants": count, "method": name, **measured[name]} for name in asked]

    rows = settings.measure_cells(
        path,
        head,
        FLAGS.tenants,
        cell_of=lambda row: row["tenants"],
        methods=chosen_methods,
        measure=measure,
        order=lambda row: row["tenants"],
    )
    if not rows:
        return
    title = f"One round of n tenants: {label}, {FLAGS.dtype}, batch {FLAGS.batch}"
    text = report(title, head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(plot(path.with_suffix(".png"), title, rows, x="tenants", line="method"))


if __name__ == "__main__":
    app.run(main)
