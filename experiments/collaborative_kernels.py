"""Claim: the tile that is best for a kernel alone is not the one that is best in company (the paper's table 1).

    python -m experiments.collaborative_kernels --dtypes=bfloat16

For each operation, the tiles of indexed_gemm that are best in each of three settings, timed in all of them:

    alone       one problem on an idle device
    launch      16 problems in one launch, as Coalesce runs them
    concurrent  16 launches side by side, branches of one CUDA graph, as if each tenant had brought a kernel of its own

The first two are a kernel's own time, the third lasts from the first start to the last end; all by the profiler. Greedy
kernels are chosen alone and run in company; collaborative ones are chosen there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
from absl import app, flags

from experiments import kernel_clock, settings
from experiments.list_flags import define_names
from experiments.results import device_name, header, Row
from experiments.tile_trials import CANDIDATES, OPS, report, trial

DTYPES = ("float32", "bfloat16")

FLAGS = flags.FLAGS  # experiments/settings.py has more of them; --dtypes stands for its --dtype
flags.adopt_module_key_flags(settings)
define_names("dtypes", list(DTYPES), "dtypes of the operands; float32 at the default precision, TF32", DTYPES)
define_names("ops", None, "which operations; all if not given", OPS)
flags.DEFINE_integer("problems", 16, "problems in company", lower_bound=1)
flags.DEFINE_integer("rounds", 20, "rounds of each kernel", lower_bound=1)


class Case(NamedTuple):
    op: str
    dtype: str


def main(argv: Sequence[str]) -> None:
    settings.begin(argv, ())
    if jax.default_backend() != "gpu":
        raise app.UsageError("needs a GPU: elsewhere the kernel is interpreted, which says nothing about its time")
    conditions = {"problems": FLAGS.problems}
    head = header(
        settings.command("collaborative_kernels"), FLAGS.device_name or device_name(), FLAGS.note, **conditions
    )
    path = settings.folder() / "collaborative_kernels.json"
    cases = [Case(op, dtype) for dtype in FLAGS.dtypes for op in FLAGS.ops or OPS]
    rows = settings.measure_cells(
        path,
        head,
        cases,
        cell_of=lambda row: Case(row["op"], row["dtype"]),
        methods=lambda case: map(str, CANDIDATES),
        measure=measure,
        order=lambda row: (DTYPES.index(row["dtype"]), [*OPS].index(row["op"])),
    )
    if rows:
        text = report(head, rows)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)


def measure(case: Case) -> list[Row]:
    """A row for each candidate."""
    print(f"{case.op}, {case.dtype}", file=sys.stderr, flush=True)
    op = OPS[case.op](case.dtype)
    clock = partial(kernel_clock.times, rounds=FLAGS.rounds, seconds=FLAGS.seconds)
    return [{**case._asdict(), "shape": op.shape, **row} for row in trial(op, CANDIDATES, FLAGS.problems, clock)]


if __name__ == "__main__":
    app.run(main)
