"""Tiles of indexed_gemm in three settings, and what is best in each: see experiments/collaborative_kernels.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import indexed_gemm
from coalesce.measuring.in_program import Work
from experiments import profiler
from experiments.kernel_clock import Contender
from experiments.peers_jax import COMMANDS
from experiments.products import op_of
from experiments.results import Row, table

SETTINGS = ("alone", "launch", "concurrent")
CANDIDATES = (  # m, n, k, warps, stages
    Blocks(16, 64, 64),
    Blocks(32, 32, 64),
    Blocks(32, 64, 64),
    Blocks(64, 32, 64),
    Blocks(64, 64, 32),
    Blocks(64, 64, 64),
    Blocks(64, 64, 128, 4, 2),
    Blocks(64, 128, 32),
    Blocks(128, 64, 32),
    Blocks(128, 64, 64, 8),
    Blocks(128, 128, 32, 8),
)


def dot(m: int, k: int, n: int, dtype: str) -> HeavyOp:
    left, right = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((m, k), (k, n)))
    return op_of(lambda w, x: jnp.dot(x, w), right, left)


def conv(size: int, channels: int, dtype: str) -> HeavyOp:
    """A 3x3 convolution of an image of so many channels to as many."""
    image = jax.ShapeDtypeStruct((1, size, size, channels), dtype)
    window = jax.ShapeDtypeStruct((3, 3, channels, channels), dtype)
    dimensions = ("NHWC", "HWIO", "NHWC")
    return op_of(
        lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions), window, image
    )


OPS: dict[str, Callable[[str], HeavyOp]] = {
    "SGEMM of figure 6": partial(dot, 3136, 576, 64),
    "ResNet-50 conv3": partial(conv, 28, 128),
    "ResNet-50 conv5": partial(conv, 7, 512),
    "BERT-base dense": partial(dot, 128, 768, 3072),
}


def trial(
    op: HeavyOp, candidates: Sequence[Blocks], problems: int, clock: Callable[[Mapping[str, Contender]], dict[str, Row]]
) -> list[Row]:
    """Every candidate timed in every setting by `clock`; those best in one say so."""
    contenders = {
        f"{blocks} {setting}": contender(op, blocks, setting, problems) for setting in SETTINGS for blocks in candidates
    }
    timed = clock(contenders)
    rows: list[Row] = []
    for blocks in candidates:
        own = {setting: timed[f"{blocks} {setting}"] for setting in SETTINGS}
        us = {setting: row.get("round_us_median") for setting, row in own.items()}
        failed = "; ".join(f"{setting}: {row['failed']}" for setting, row in own.items() if row["failed"])
        side, sum_us = us["concurrent"], own["concurrent"].get("launches_us")
        overlap = round(sum_us / side, 2) if side and sum_us else None  # 1 if they ran one after the other after all
        facts = {"blocks": vars(blocks), "us": us, "overlap": overlap}
        rows.append({"method": str(blocks), **facts, "best": [], "failed": failed})
    for setting in SETTINGS:
        if worked := [row for row in rows if row["us"][setting] is not None]:
            min(worked, key=lambda row: row["us"][setting])["best"].append(setting)
    return rows


def contender(op: HeavyOp, blocks: Blocks, setting: str, problems: int) -> Contender:
    count = problems if setting == "launch" else 1
    x = jax.ShapeDtypeStruct((count, 1, *op.lhs.shape), op.lhs.dtype)
    w = jax.ShapeDtypeStruct((count, *indexed_gemm.layout(op).of(op.rhs.shape)), op.rhs.dtype)
    run = partial(indexed_gemm.run, op, blocks=blocks)
    if setting != "concurrent":
        return Contender(Work(lambda x, ws: run(x, ws[0]), x, (w,)))
    options = {COMMANDS: "FUSION,CUSTOM_CALL", "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    others = (w, *[x, w] * (problems - 1))
    return Contender(Work(partial(side_by_side, run), x, others), options, profiler.span)


def side_by_side(run: Callable[[Any, Any], Any], x: Any, ws: Sequence[Any]) -> Any:
    """Launches that do not depend on one another, each with operands of its own."""
    operands = [x, *ws]
    return [run(left, right) for left, right in zip(operands[::2], operands[1::2], strict=True)]


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    count = head["settings"]["problems"]
    lines, reasons = [], []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
        greedy = next((row for row in own if "alone" in row["best"]), None)
        for setting in SETTINGS:
            for row in own:
                if setting in row["best"]:
                    lines.append([f"{op}, {dtype}: best {setting}", row["method"], *cells(row, greedy)])
        reasons += [f"- {op}, {dtype}, {row['method']}: {row['failed']}" for row in own if row["failed"]]
    text = [
        "# Tiles best alone and tiles best in company",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        f"indexed_gemm, microseconds: alone, one problem; launch, {count} problems in one launch; concurrent, {count} "
        "launches side by side. In parentheses, the throughput relative to the tile that is best alone. Overlap: how "
        "many of the concurrent launches ran at a time.",
        table(["operation", "tile m x n x k, warps, stages", *SETTINGS, "overlap"], lines),
        "\n".join(reasons),
    ]
    return "\n\n".join(filter(None, text)) + "\n"


def cells(row: Row, greedy: Row | None) -> list[str]:
    def cell(setting: str) -> str:
        us, base = row["us"][setting], greedy["us"][setting] if greedy else None
        if us is None:
            return "-"
        return f"{us:,.1f}" + (f" ({base / us:.2f}x)" if base and row is not greedy else "")

    return [*(cell(setting) for setting in SETTINGS), f"{row['overlap']:.1f}" if row["overlap"] else "-"]
