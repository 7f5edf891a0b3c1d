"""Claim: coalescing the product behind a convolution, and the mat-vec behind an LSTM, pays for itself many times over.

    python -m experiments.coalesced_sgemm --products=sgemm --arithmetic=bf16
    python -m experiments.coalesced_sgemm --sizes=sgemm=64x32x16 --problems=1,2 --methods=jax_in_turn,batched_dot

The products are those of the paper's figure 6: M=3136 K=576 N=64, ResNet-18's conv2_2, and one step of an LSTM of 512
units, M=1 K=1024 N=2048. n problems have operands of their own, and are run in two ways:

    calls    Coalesce against jax_in_turn, torch_in_turn, torch_streams and torch_bmm, each pair in turns, from the
             first dispatch until all results are there
    inside   kernels, where nothing but their own time counts (experiments/kernel_clock.py): those of coalesce/kernels,
             indexed_gemm with several tiles besides, and cuBLAS batched; and the device floor (experiments/floor.py)

A second run measures only what is not there yet, so that --budget_s may cut the work into parts. What is inside is
measured together: to ask for other kernels of it by --methods replaces the first ones.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from coalesce.kernels import choose
from experiments import floor, kernel_clock, pairs, settings
from experiments.list_flags import define, define_counts, define_names
from experiments.pairs import Best, Limits
from experiments.peers_common import Cell
from experiments.peers_product import PEERS
from experiments.products import ARITHMETIC, Products, SIZES
from experiments.products_kernels import contender, CUBLAS, NAMES, names, pallas
from experiments.products_report import plot, report, summaries, SUMMARY
from experiments.results import device_name, header, Row, save_rows

FLOOR = "floor"
INSIDE = "inside"


def size(item: str) -> str:
    """Of `--sizes`, if it is one."""
    name, _, given = item.partition("=")
    if name not in SIZES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", given):
        raise ValueError(f"what is {item}? A product of {', '.join(SIZES)} and its M, K and N, as in sgemm=64x32x16")
    return item


FLAGS = flags.FLAGS  # experiments/settings.py has more of them
flags.adopt_module_key_flags(settings)
define_names("products", list(SIZES), f"which products; of {', '.join(SIZES)}", SIZES)
define(size, "sizes", [], "other sizes of a product, MxKxN, as in sgemm=64x32x16")
define_names(
    "arithmetic",
    list(ARITHMETIC),
    "f32: precision highest; tf32: float32 at the default precision",
    ARITHMETIC,
)
define_counts("problems", [1, 2, 4, 8, 16, 32, 64, 120], "numbers of problems")
flags.DEFINE_integer("runs", 20, "runs of a kernel inside a program", lower_bound=1)
FLAGS.set_default("seconds", 0.5)  # of one pair, of the hundreds that there are
FLAGS.set_default("compiler_options", "{}")  # CUDA graphs are of several kernels


class Case(NamedTuple):
    """A cell of the results: a pair, or all that is inside a program."""

    product: str
    arithmetic: str
    problems: int
    asked: str  # a peer, or INSIDE

    @property
    def products(self) -> Products:
        m, k, n = sizes()[self.product]
        return Products(m, k, n, self.arithmetic, self.problems)


def main(argv: Sequence[str]) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs the device's memory too
    settings.begin(argv, (*PEERS, *NAMES, FLOOR))
    conditions = {"sizes": sizes()}
    head = header(settings.command("coalesced_sgemm"), FLAGS.device_name or device_name(), FLAGS.note, **conditions)
    path = settings.folder() / "coalesced_sgemm.json"
    rows = settings.measure_cells(
        path,
        head,
        wanted(),
        cell_of=lambda row: Case(*(row[name] for name in Case._fields)),
        methods=lambda case: contenders(case) if case.asked == INSIDE else [case.asked],
        measure=measure,
        order=place,
    )
    if not (rows := [row for row in rows if row["asked"] != SUMMARY]):
        return
    found = summaries(rows)
    save_rows(path, head, sorted([*rows, *found], key=place))
    text = report(head, rows, found)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    for product in dict.fromkeys(row["product"] for row in rows):
        own = [row for row in rows if row["product"] == product]
        print(plot(path.with_name(f"{path.stem}_{product}.png"), product, sizes()[product], own))


def wanted() -> list[Case]:
    """Cases of the same problems in a row: they share what `held` keeps."""
    return [
        case
        for product in FLAGS.products
        for arithmetic in FLAGS.arithmetic
        for count in FLAGS.problems
        for asked in (*PEERS, INSIDE)
        if (case := Case(product, arithmetic, count, asked))
        and (contenders(case) if asked == INSIDE else FLAGS.methods is None or asked in FLAGS.methods)
    ]


def place(row: Row) -> tuple[int, ...]:
    """Where a row belongs in the file; what is inside a program stands as it was measured."""
    asked = [*PEERS, INSIDE, SUMMARY]
    case = [*SIZES].index(row["product"]), [*ARITHMETIC].index(row["arithmetic"]), asked.index(row["asked"])
    return *case, row["problems"], row["method"] == "coalesced"


def sizes() -> dict[str, list[int]]:
    """M, K, N of each product."""
    found = {name: [*given] for name, given in SIZES.items()}
    for item in FLAGS.sizes:
        name, _, given = item.partition("=")
        found[name] = [int(size) for size in given.split("x")]
    return found


def measure(case: Case) -> list[Row]:
    print(f"{case.product}, {case.arithmetic}, {case.problems} problems: {case.asked}", file=sys.stderr, flush=True)
    if case.asked == INSIDE:
        rows = inside(case)
    else:
        cell, want, ours, limits = held(case.products)
        rows = pairs.measure_pair(cell, case.asked, PEERS[case.asked], ours, want, limits)
        pairs.free()
    return [case._asdict() | row for row in rows]


@lru_cache(maxsize=1)
def held(products: Products) -> tuple[Cell, list[np.ndarray], Best, Limits]:
    """What the pairs of the same problems share: the outputs that all are compared with, and our best configuration."""
    cell = products.cell(settings.options_to_try())
    exact = 1e-5 if products.precision == "highest" else settings.tolerance(products.dtype)
    limits = Limits(FLAGS.tolerance or exact, FLAGS.repeats, FLAGS.seconds)
    want = pairs.reference(cell)
    return cell, want, pairs.best_of(pairs.coalesced, cell, want, limits), limits


def contenders(case: Case) -> list[str]:
    """What --methods asks for of all that runs inside a program; where Pallas kernels are interpreted, which says
    nothing about their time, they must be asked for by name."""
    gpu = jax.default_backend() == "gpu"
    default = [name for name in names(case.products) if gpu or not pallas(name)]
    if FLAGS.methods is None:
        return [*default, FLOOR]
    return [name for name in (*names(case.products), FLOOR) if name in FLAGS.methods]


def inside(case: Case) -> list[Row]:
    asked, op = contenders(case), case.products.op
    least = case.problems * floor.Work(op).us(ceilings(case.arithmetic))
    works = {name: contender(case.products, name) for name in asked if name != FLOOR}
    rows = kernel_clock.times(works, rounds=FLAGS.runs, seconds=FLAGS.seconds)
    chosen = choose(op, case.problems, jax.default_backend())
    found: list[Row] = []
    for name, row in rows.items():
        share = {} if row["failed"] else {"of_floor": round(least / row["round_us_median"], 4)}
        kind = "library" if name == CUBLAS else "kernel"
        found.append({"method": name, "kind": kind, "chosen": name == chosen, **row, **share})
    if FLOOR in asked:
        facts = vars(ceilings(case.arithmetic))
        us = round(least, 4)
        found.append({"method": FLOOR, "kind": FLOOR, "round_us_median": us, "failed": "", "facts": facts})
    return found


@cache
def ceilings(arithmetic: str) -> floor.Ceilings:
    dtype, precision = ARITHMETIC[arithmetic]
    with jax.default_matmul_precision(precision or "default"):
        return floor.measure_ceilings(dtype)


if __name__ == "__main__":
    app.run(main)
