"""Claim: a model of eight numbers names blocks for a product that nobody measured, about as fast as its best ones.

    python -m experiments.tile_model

Fits coalesce/tuning/estimate.py to the times that Coalesce brings along (`tuned.json`: 16 ResNet-50), and chooses
blocks for each op by a fit to the others. Needs no device: it reads what was measured. Prints the fits, which belong
into estimate.py where the blocks by its own are slower, and writes a table: for each op the best blocks, those that are
chosen, and XLA's best kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from scipy.optimize import least_squares

import coalesce
from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import FUSING
from coalesce.measuring.case import cases
from coalesce.models import by_name
from coalesce.tuning import known
from coalesce.tuning.estimate import blocks_of, Fit, FITS, KERNEL, speaks_of, us
from experiments.results import header, Row, save_rows, table, writable

DEVICE, TENANTS, MODEL = "NVIDIA H200", 16, "resnet50"
NAMES = [field.name for field in fields(Fit)]
# Where a search starts, and no number leaves it by more than FACTOR: a microsecond to launch, for a fetch, and of each
# program, 590 TFLOP/s, 13 TB/s from the L2, 3.5 from memory.
START = Fit(1.0, 4.5e6, 1e5, 1.0, 3.5e6, 2e-5, 1.0, 0.05)
FACTOR = 20.0

FLAGS = flags.FLAGS
flags.DEFINE_string("folder", "experiments/results/tile_model", "where the results go")


@dataclass(frozen=True)
class Measured:
    """An op's times by blocks, those of the model's candidates alone, and the fastest of XLA's kernels."""

    op: HeavyOp
    times: Mapping[Blocks, float]
    best: float  # of all blocks that were measured, also those that the model leaves out
    other: float


def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"what is {argv[1]}?")
    folder = writable(Path(FLAGS.folder), "--folder names another")
    rows: list[Row] = []
    fits: dict[str, Fit] = {}
    for dtype in ("bfloat16", "float32"):
        ops = measured(dtype)
        start = START
        if "bfloat16" in fits:  # the chip's own, which do not bind in float32
            start = replace(start, l2=fits["bfloat16"].l2, memory=fits["bfloat16"].memory)
        free = [name for name in NAMES if not fits or name not in ("l2", "memory")]
        fits[dtype] = fit = fitted(ops, start, free)
        print(f"{dtype}: {fit}", flush=True)
        rows += [row_of(dtype, one, fitted([o for o in ops if o is not one], start, free), fit) for one in ops]
    head = header("python -m experiments.tile_model", DEVICE, "", fits={d: list(astuple(f)) for d, f in fits.items()})
    save_rows(folder / "tile_model.json", head, rows)
    text = report(rows)
    (folder / "tile_model.md").write_text(text, encoding="utf-8")
    print(text)


def measured(dtype: str) -> list[Measured]:
    model = by_name(MODEL, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    params = jax.eval_shape(model.init, jax.random.key(0))
    programs = [coalesce.trace(model.apply, params, *model.inputs(1), name=f"t{i}") for i in range(TENANTS)]
    entries = known().entries
    found: list[Measured] = []
    for case in cases(programs, DEVICE, platform="gpu"):
        entry = entries.get(case.key)
        if entry is None or not speaks_of(case.op, case.key.rows):
            continue
        times = {str(blocks): blocks for blocks in blocks_of(case.op, case.key.width, case.key.rows)}
        own = f"{KERNEL} "
        ours = {name.removeprefix(own): time for name, time in entry.tried.items() if name.startswith(own) and time}
        others = [time for name, time in entry.tried.items() if name.split()[0] not in FUSING and time]
        known_times = {times[name]: ours[name] for name in sorted(ours) if name in times}
        found.append(Measured(case.op, known_times, min(ours.values()), min(others)))
    return found


def fitted(ops: Sequence[Measured], start: Fit, free: Sequence[str]) -> Fit:
    """The least squares of the logarithms over the `free` numbers, where what is near the best weighs most."""

    def fit_of(logs: Any) -> Fit:
        return replace(start, **dict(zip(free, map(float, np.exp(logs)), strict=True)))

    def off(logs: Any) -> Any:
        fit = fit_of(logs)
        return np.concatenate(
            [
                [
                    (min(one.times.values()) / time) ** 2 * np.log(us(fit, one.op, TENANTS, 1, blocks) / time)
                    for blocks, time in one.times.items()
                ]
                for one in ops
            ]
        )

    first = np.log([getattr(start, name) for name in free])
    bounds = first - np.log(FACTOR), first + np.log(FACTOR)
    solved = least_squares(off, first, bounds=bounds, loss="soft_l1", f_scale=0.1, max_nfev=60)
    return Fit(*(float(f"{value:.3g}") for value in astuple(fit_of(solved.x))))


def row_of(dtype: str, one: Measured, without: Fit, fit: Fit) -> Row:
    def chosen(by: Fit) -> Blocks:
        return min(one.times, key=lambda blocks: us(by, one.op, TENANTS, 1, blocks))

    blocks = chosen(without)
    return {
        "dtype": dtype,
        "op": one.op.shape,
        "best_us": one.best,
        "chosen": str(blocks),
        "chosen_us": one.times[blocks],
        "chosen_by_all_us": one.times[chosen(fit)],
        "chosen_by_constants_us": one.times[chosen(FITS[DEVICE][jnp.dtype(dtype).itemsize])],
        "predicted_us": round(us(without, one.op, TENANTS, 1, blocks), 2),
        "xla_us": one.other,
    }


def report(rows: Sequence[Row]) -> str:
    text = [
        "# Blocks by a model, for ops that it was not fitted to",
        f"{DEVICE}, {TENANTS} problems each; microseconds in a program, with what follows the op. An op's blocks are "
        "chosen by a fit to all other ops of its dtype; beside them the best that was measured, and the best of XLA's "
        "kernels. The constants of estimate.py, which were fitted to earlier entries, stay while they choose blocks as "
        "fast as a fit to all that is here: others would change plans of ops that nobody measured.",
        "    python -m experiments.tile_model",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        slower = np.array([row["chosen_us"] / row["best_us"] for row in own])
        off = np.array([abs(row["predicted_us"] / row["chosen_us"] - 1) for row in own])
        kinds = ("best_us", "chosen_us", "xla_us", "chosen_by_all_us", "chosen_by_constants_us")
        sums = {key: sum(row[key] for row in own) for key in kinds}
        text += [
            f"## {dtype}",
            f"Chosen blocks take {np.mean(slower) - 1:.0%} longer than the best in the mean, {np.max(slower) - 1:.0%} "
            f"at worst; together {sums['chosen_us']:,.0f} us, the best {sums['best_us']:,.0f}, XLA's "
            f"{sums['xla_us']:,.0f}. Their predicted times are off by {np.median(off):.0%} in the median. By a fit "
            f"to all ops the blocks take {sums['chosen_by_all_us']:,.1f} us, by the constants of estimate.py "
            f"{sums['chosen_by_constants_us']:,.1f}.",
            table(
                ["op", "best", "chosen", "predicted", "XLA", "blocks"],
                [
                    [
                        row["op"],
                        *(f"{row[key]:.1f}" for key in ("best_us", "chosen_us", "predicted_us", "xla_us")),
                        row["chosen"],
                    ]
                    for row in own
                ],
            ),
        ]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    app.run(main)
