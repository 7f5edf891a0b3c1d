"""Claim: coalescing the product behind a convolution, and the mat-vec behind an LSTM, pays for itself many times over.

    python -m experiments.coalesced_sgemm
    python -m experiments.coalesced_sgemm --products=matvec --arithmetic=bf16 --problems=1,16 --seconds=2

The products are those of the paper's figure 6: M=3136 K=576 N=64, ResNet-18's conv2_2, and one step of an LSTM of 512
units, M=1 K=1024 N=2048. n problems have operands of their own. `jax_in_turn` and `coalesced` are rounds of calls,
dispatch included, and alternate. The other rows are kernels inside a program, where nothing but their own time counts
(coalesce/measuring/in_program.py), and the device floor. A second run measures only the rows that are not there yet.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, cast, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from coalesce.heavy import heavy_eqns, heavy_op, HeavyOp
from coalesce.kernels import KERNELS
from coalesce.measuring.in_program import in_program_us, NOISE, Work
from coalesce.models import Model
from coalesce.passes.pipeline import normalise
from coalesce.tracing import trace
from experiments import floor, pairs, peers_jax, settings
from experiments.cells import brief
from experiments.cost_cases import run_kernel, write_only
from experiments.methods import Tenants
from experiments.peers_common import Cell, Peer
from experiments.results import device_name, header, Row, table

PRODUCTS = {"sgemm": (3136, 576, 64), "matvec": (1, 1024, 2048)}  # M, K, N
ARITHMETIC = {"f32": ("float32", "highest"), "tf32": ("float32", None), "bf16": ("bfloat16", None)}
PEER = "jax_in_turn"

FLAGS = flags.FLAGS  # experiments/settings.py has more of them
flags.DEFINE_list("products", list(PRODUCTS), f"which products; of {', '.join(PRODUCTS)}")
flags.DEFINE_list("arithmetic", list(ARITHMETIC), "f32: precision highest; tf32: float32 at the default precision")
flags.DEFINE_list("problems", ["1", "2", "4", "8", "16", "32", "64", "120"], "numbers of problems")
flags.DEFINE_integer("runs", 16, "runs of a kernel in a program")


class Case(NamedTuple):
    product: str
    arithmetic: str
    problems: int
    asked: str  # the peer of a pair, a kernel or the floor

    @property
    def dtype(self) -> str:
        return ARITHMETIC[self.arithmetic][0]

    @property
    def precision(self) -> str | None:
        return ARITHMETIC[self.arithmetic][1]


def multiply(precision: str | None, params: Any, x: jax.Array) -> jax.Array:
    return jnp.dot(x, params["kernel"], precision=precision)


@cache
def function(precision: str | None) -> Any:
    """One object for all tenants, so that they share what is traced from it."""
    return partial(multiply, precision)


def op_of(case: Case) -> HeavyOp:
    m, k, n = PRODUCTS[case.product]
    left, right = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in ((m, k), (k, n)))
    program = normalise(trace(function(case.precision), {"kernel": right}, left)).program
    (op,) = map(heavy_op, heavy_eqns(program.jaxpr))
    return op


def calls(case: Case) -> list[Row]:
    """Rounds of JAX calls against one coalesced call."""
    m, k, n = PRODUCTS[case.product]

    def operand(seed: int, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(np.roll(np.resize(NOISE, shape), seed), case.dtype)

    params = [{"kernel": operand(i, (k, n)) / k**0.5} for i in range(case.problems)]
    inputs = [(operand(-i, (m, k)),) for i in range(case.problems)]
    tenants = Tenants(function(case.precision), params, inputs)
    model = Model(case.product, cast(Any, None), tenants.apply)  # no network: the peers of one are not asked
    options = settings.options_to_try()
    cell = Cell(model, {}, case.dtype, m, case.precision, tenants, options, ExitStack())
    exact = 1e-5 if case.precision == "highest" else settings.tolerance(case.dtype)
    limits = pairs.Limits(FLAGS.tolerance or exact, FLAGS.repeats, FLAGS.seconds)
    want = pairs.reference(cell)
    ours = pairs.best_of(pairs.coalesced, cell, want, limits)
    return pairs.measure_pair(cell, PEER, Peer("time", peers_jax.in_turn), ours, want, limits)


def inside(case: Case, write_us: float) -> Row:
    """A kernel in the middle of a program."""
    op, kernel = op_of(case), KERNELS[case.asked]
    row: Row = {"method": case.asked, "kind": "kernel"}
    if not kernel.supports(op):
        return row | {"failed": "does not run this product"}
    left = jax.ShapeDtypeStruct((case.problems, 1, *op.lhs.shape), op.lhs.dtype)
    right = jax.ShapeDtypeStruct((case.problems, *kernel.layout(op).of(op.rhs.shape)), op.rhs.dtype)
    work = Work(partial(run_kernel, kernel.run, op), left, (right,))
    try:
        us = in_program_us(work, FLAGS.runs, repeats=FLAGS.repeats, seconds=FLAGS.seconds) - write_us
    except Exception as e:  # of a kernel language, say, which raises its own
        return row | {"failed": brief(e)}
    return row | ({"round_us_median": round(us, 2), "failed": ""} if us > 0 else {"failed": "too fast for the clock"})


def main(argv: Sequence[str]) -> None:
    kernels = [name for name, kernel in KERNELS.items() if kernel.supports(op_of(Case("sgemm", "f32", 1, "")))]
    settings.begin(argv, asked := (PEER, *kernels, "floor"))
    head = header(settings.command("coalesced_sgemm"), FLAGS.device_name or device_name(), FLAGS.note)
    path = settings.folder() / "coalesced_sgemm.json"

    @cache
    def ceilings(arithmetic: str) -> floor.Ceilings:
        dtype, precision = ARITHMETIC[arithmetic]
        with jax.default_matmul_precision(precision or "default"):
            return floor.measure_ceilings(dtype)

    @cache
    def write_us() -> float:
        return min(in_program_us(write_only(), 64, repeats=FLAGS.repeats, seconds=1) for _ in range(3))

    def measure(case: Case) -> list[Row]:
        print(f"{case.product}, {case.arithmetic}, {case.problems} problems: {case.asked}", file=sys.stderr, flush=True)
        if case.asked == PEER:
            rows = calls(case)
        elif case.asked == "floor":
            us = case.problems * floor.Work(op_of(case)).us(ceilings(case.arithmetic))
            facts = vars(ceilings(case.arithmetic))
            rows = [{"method": "floor", "kind": "floor", "round_us_median": round(us, 4), "failed": "", "facts": facts}]
        else:
            rows = [inside(case, write_us())]
        return [case._asdict() | row for row in rows]

    order = list(PRODUCTS), list(ARITHMETIC), [PEER, *KERNELS, "floor"]
    rows = settings.measure_cells(
        path,
        head,
        [
            Case(product, arithmetic, int(count), name)
            for product in FLAGS.products
            for arithmetic in FLAGS.arithmetic
            for count in FLAGS.problems
            for name in asked
            if FLAGS.methods is None or name in FLAGS.methods
        ],
        cell_of=lambda row: Case(*(row[name] for name in Case._fields)),
        methods=lambda case: [case.asked],
        measure=measure,
        order=lambda row: (
            *(names.index(row[key]) for names, key in zip(order, ("product", "arithmetic", "asked"), strict=True)),
            row["problems"],
        ),
    )
    if rows:
        text = report(head, rows)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)


def report(head: dict[str, Any], rows: Sequence[Row]) -> str:
    text = [
        "# Products coalesced: rounds of calls, and kernels inside a program",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        "Microseconds for n problems; in parentheses, for calls how many times that of `coalesced`, for kernels the "
        "share of the floor.",
    ]
    for product, arithmetic in dict.fromkeys((row["product"], row["arithmetic"]) for row in rows):
        own = [row for row in rows if (row["product"], row["arithmetic"]) == (product, arithmetic)]
        text += [f"## {product} (M, K, N = {PRODUCTS[product]}), {arithmetic}", product_table(own)]
    return "\n\n".join(text) + "\n"


def product_table(rows: Sequence[Row]) -> str:
    found = {(row["method"], row["problems"]): row["round_us_median"] for row in rows if not row["failed"]}
    counts = sorted({row["problems"] for row in rows})

    def cell(method: str, count: int) -> str:
        us, ours, least = (found.get((name, count)) for name in (method, "coalesced", "floor"))
        if us is None:
            return "-"
        if method == PEER and ours:
            return f"{us:,.0f} ({us / ours:.2f}x)"
        return f"{us:,.1f} ({least / us:.0%})" if least and method in KERNELS else f"{us:,.1f}"

    lines = [[name, *(cell(name, n) for n in counts)] for name in dict.fromkeys(row["method"] for row in rows)]
    ratios = [found[PEER, n] / found["coalesced", n] for n in counts if n > 1 and ("coalesced", n) in found]
    mean = f"Calls in turn over one coalesced call, geometric mean over n > 1: {np.exp(np.mean(np.log(ratios))):.2f}x"
    reasons = [f"- {row['method']}, {row['problems']} problems: {row['failed']}" for row in rows if row["failed"]]
    parts = [table(["problems", *map(str, counts)], lines), mean if ratios else "", "\n".join(reasons)]
    return "\n\n".join(filter(None, parts))


if __name__ == "__main__":
    app.run(main)
