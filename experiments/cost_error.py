"""Claim: the cost model is near enough to what a device measures for packing to rest on it.

    python -m experiments.cost_error
    python -m experiments.cost_error --ops=40 --groups=1,8 --budget_s=240
    python -m experiments.cost_error --again=experiments/results/h100/cost_error.json     predicts anew, on any machine

Measures superkernels over heavy ops of coalesce.models, alone and in packs, and the copies between packs, each in the
middle of a program (coalesce/measuring/in_program.py), and compares them with `Costs` of the device; then does the same
for figures that were recorded on GPUs, which needs none. A second run of the command keeps the faster of its and the
earlier figures, since on a machine that others use the fastest is the one that was disturbed least.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from coalesce.costs import Costs, device_of, DEVICES
from coalesce.kernels import choose
from coalesce.measuring.in_program import in_program_us
from coalesce.models import NAMES
from experiments.cells import brief
from experiments.cost_cases import Case, kernels_of, model_ops, movement_cases, op_cases, sample, write_only
from experiments.cost_report import fastest, name_of, report, scatter
from experiments.list_flags import define_counts, define_names
from experiments.recorded_gpu import records
from experiments.results import device_folder, device_name, header, load_rows, Row, save_rows, writable

FLAGS = flags.FLAGS
flags.DEFINE_integer("ops", None, "distinct heavy ops to measure; 24 on a GPU, else 36", lower_bound=0)
define_names("models", list(NAMES), "models to take ops from", NAMES)
define_counts("groups", [1, 2, 4, 8], "problems in a pack")
define_names("dtypes", None, "dtypes of the models; float32, and bfloat16 on a GPU", ("float32", "bfloat16"))
flags.DEFINE_float("most_us", 3000.0, "no case is measured that is predicted to take longer")
flags.DEFINE_integer("repeats", 200, "timed rounds of each case, of which the fastest counts", lower_bound=3)
flags.DEFINE_float("seconds", 1.0, "most time for the repeats of a case")
flags.DEFINE_float("budget_s", 300.0, "no case is compiled after so many seconds")
flags.DEFINE_string("device_name", None, "how the results call the device")
flags.DEFINE_string("note", "", "a remark for the results' header, such as that others use the machine too")
flags.DEFINE_string("out", None, "folder of the results; experiments/results/<device> if not given")
flags.DEFINE_bool("force", False, "forget earlier figures")
flags.DEFINE_string("again", None, "a result to predict anew, for the device that it is of; nothing is measured")
flags.register_validator("again", lambda path: path is None or Path(path).is_file(), "there is no such file")

LEAST_US = 0.05  # what a clock can tell apart, over the runs of a case
MEASURED = ("measured_us", "failed")  # what is in a row besides the case
MOST_BYTES = 5e8  # of the weights of a case, where two runs need no more


def cases(costs: Costs, platform: str) -> Iterator[Case]:
    yield from movement_cases(costs)
    dtypes = FLAGS.dtypes or (["float32", "bfloat16"] if platform == "gpu" else ["float32"])
    count = FLAGS.ops if FLAGS.ops is not None else (24 if platform == "gpu" else 36)
    groups = FLAGS.groups
    for op in sample([op for dtype in dtypes for op in model_ops(dtype, FLAGS.models)], count):
        for kernel in kernels_of(op, groups, platform):
            yield from op_cases(op, kernel, groups, costs)


def runs_of(case: Case, platform: str) -> int:
    """Enough runs in a program for the clock, few enough for the memory and the compiler."""
    enough = (500 if platform == "gpu" else 1500) / max(case.predicted, 0.1)
    return int(max(2, min(16, enough, MOST_BYTES / max(case.work.weight_bytes, 1) - 1)))


def measure(case: Case, runs: int, write_us: float) -> Row:
    try:
        us = in_program_us(case.work, runs, repeats=FLAGS.repeats, seconds=FLAGS.seconds) - write_us
    except jax.errors.JaxRuntimeError as e:  # out of memory, say
        return case.row | {"failed": brief(e)}
    return case.row | ({"measured_us": round(us, 2)} if us > LEAST_US else {"failed": "too fast for the clock"})


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]}?")
    start = time.perf_counter()
    logging.set_verbosity(logging.WARNING)  # JAX names every backend that it does not find
    if FLAGS.again:
        if given := [name for name in ("models", "groups") if FLAGS[name].present]:
            raise app.UsageError(f"--again takes all models, and the groups of the result: leave --{given[0]} out")
        predict_again(Path(FLAGS.again))
        return
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    costs = Costs(device_of(platform, kind))
    command = " ".join(["python -m experiments.cost_error", *given_flags()])
    head = header(command, FLAGS.device_name or device_name(), FLAGS.note, entry=costs.device.name)
    path = writable(Path(FLAGS.out or Path("experiments", "results", device_folder()))) / "cost_error.json"
    before = {name_of(row): row for row in ([] if FLAGS.force else load_rows(path, head))}
    write_us = min(in_program_us(write_only(), 64, repeats=FLAGS.repeats, seconds=1) for _ in range(3))
    rows: list[Row] = []
    for case in cases(costs, platform):
        if case.predicted > FLAGS.most_us:
            continue
        old, row = before.get(name_of(case.row)), case.row
        if time.perf_counter() - start < FLAGS.budget_s:
            row = measure(case, runs_of(case, platform), write_us)
            print(f"{case.cls} {case.what} {case.kernel} x{case.groups}: {row}", file=sys.stderr, flush=True)
        rows.append(fastest(row, old))
        save_rows(path, head, rows)
    write(path, head, rows)


def predict_again(path: Path) -> None:
    """With what was measured as it was. A kernel that is not chosen any more keeps its rows, one that is chosen since
    has rows that say that it was not measured, and ops that no model has any more go."""
    result = json.loads(path.read_text(encoding="utf-8"))
    head = result["header"] | {"note": FLAGS.note or result["header"]["note"]}
    costs = Costs(DEVICES[head["settings"]["entry"]])
    old = {name_of(row): row for row in result["rows"]}
    found = [case for case in every_case(costs, result["rows"]) if name_of(case.row) in old or is_new(case)]
    anew = [case.row | measured(old.get(name_of(case.row))) for case in found]
    gone = len(old.keys() - set(map(name_of, anew)))
    new = [row for row in anew if name_of(row) not in old]
    left = [row for row in anew if row["kernel"] and not row["chosen"] and old.get(name_of(row), {}).get("chosen")]
    print(
        f"{path}: of {len(old)} rows {gone} are dropped, whose op no model has any more, and {len(left)} are of a "
        f"kernel that is not chosen any more; {len(new)} of kernels that are chosen since were not measured",
        file=sys.stderr,
    )
    save_rows(path, head, anew)
    write(path, head, anew)


def measured(old: Row | None) -> Row:
    return {"failed": "not measured"} if old is None else {key: old[key] for key in MEASURED if key in old}


def is_new(case: Case) -> bool:
    """Whether a case without a row is one that a run would measure."""
    return case.chosen and case.predicted <= FLAGS.most_us


def every_case(costs: Costs, rows: Sequence[Row]) -> Iterator[Case]:
    """The cases of ops that `rows` are of, in their groups, with their kernels and those that are chosen now."""
    yield from movement_cases(costs)
    groups = sorted({row["groups"] for row in rows if row["kernel"]})
    platform = costs.device.platform
    dtypes = dict.fromkeys(row["dtype"] for row in rows if row["kernel"])
    known = {(op.shape, str(op.lhs.dtype)): op for dtype in dtypes for op in model_ops(dtype, FLAGS.models)}
    kernels: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["kernel"]:
            kernels.setdefault((row["what"], row["dtype"]), []).append(row["kernel"])
    for name, own in kernels.items():
        if name not in known:
            continue
        op = known[name]
        for kernel in dict.fromkeys([*own, *(choose(op, g, platform) for g in groups)]):
            yield from op_cases(op, kernel, groups, costs)


def write(path: Path, head: Mapping[str, Any], rows: Sequence[Row]) -> None:
    recorded = [record.row for record in records()]
    text = report(head, rows, recorded)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text.split("## Every case")[0])
    title = f"Cost model against measurement, {head['device']}"
    print(scatter(path.with_suffix(".png"), title, [row for row in rows if "measured_us" in row] or recorded))


def given_flags() -> list[str]:
    left_out = ("device_name", "force", "note", "out")
    return [FLAGS[name].serialize() for name in FLAGS if FLAGS[name].present and name not in left_out]


if __name__ == "__main__":
    app.run(main)
