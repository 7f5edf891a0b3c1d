"""coalesced_sgemm runs, from its command line to its files; peers compute what JAX does. No test looks at a time."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from coalesce.blocks import Blocks
from coalesce.tuning import candidate_name
from experiments import kernel_clock, pairs, peers_product, peers_torch, profiler
from experiments.kernel_clock import Contender
from experiments.pairs import Limits
from experiments.peers_product import LAYOUTS, PEERS
from experiments.products import Products
from experiments.products_kernels import contender, MATRIX_TILES, NAMES, names, pallas, ROW_TILES
from experiments.products_report import reasons, report, summaries
from experiments.profiler import Launch

ROOT = Path(__file__).parent.parent
tiled = partial(candidate_name, "indexed_gemm")
TILE = tiled(Blocks(64, 64, 32))
LIMITS = Limits(tolerance=1e-5, repeats=2, seconds=10)


# The device's floor is measured where multiplexing is tested: seconds, each time.
RUN = """
from absl import app
from experiments import coalesced_sgemm, floor

floor.measure_ceilings = lambda dtype: floor.Ceilings(10.0, 0.05)
try:
    coalesced_sgemm.size("sgemm=8x32")
except ValueError as e:
    print(e)
app.run(coalesced_sgemm.main)
"""


def multiply(folder: Path, *arguments: str) -> dict[str, Any]:
    """Runs it in a process of its own: its flags have names that those of other experiments have too."""
    command = [sys.executable, "-c", RUN, "--products=sgemm", "--sizes=sgemm=8x32x16"]
    command += ["--arithmetic=f32", "--repeats=3", "--runs=2", "--seconds=0.1", f"--out={folder}", *arguments]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((folder / "coalesced_sgemm.json").read_text()) | {"printed": run.stdout}


@pytest.mark.once
def test_it_writes_rows_and_goes_on_where_it_stopped(tmp_path):
    methods = f"--methods=jax_in_turn,torch_streams,batched_dot,{TILE},floor"
    before = multiply(tmp_path, methods, "--problems=2")["rows"]
    assert [(row["method"], row["kind"], row["asked"]) for row in before] == [
        ("jax_in_turn", "time", "jax_in_turn"),
        ("coalesced", "coalesced", "jax_in_turn"),
        ("torch_streams", "space", "torch_streams"),
        *[("coalesced", "coalesced", "torch_streams")] * (not before[2]["failed"]),
        ("batched_dot", "kernel", "inside"),
        (TILE, "kernel", "inside"),
        ("floor", "floor", "inside"),
        ("summary", "summary", "summary"),
    ]
    for row in before[:-1]:
        assert (row["product"], row["arithmetic"], row["problems"]) == ("sgemm", "f32", 2)
    assert before[1]["error"] <= 1e-5
    assert before[2]["failed"] in ("PyTorch is not installed", NO_DEVICE)

    result = multiply(tmp_path, methods, "--problems=2,3")
    assert [row for row in result["rows"] if row["problems"] == 2] == before[:-1]
    (totals,) = [row for row in result["rows"] if row["kind"] == "summary"]
    mean = totals["over_jax_in_turn_geometric_mean"]
    assert list(totals["over_jax_in_turn"]) == ["2", "3"]
    assert f"geometric mean over 2, 3 problems: {mean:.2f}x" in result["printed"]
    assert "## sgemm (M=8 K=32 N=16), f32" in result["printed"]
    assert result["printed"].startswith("what is sgemm=8x32? A product of ")
    files = {"coalesced_sgemm.json", "coalesced_sgemm.md", "coalesced_sgemm_sgemm.png"}
    assert {path.name for path in tmp_path.iterdir()} == files


NO_DEVICE = "needs a GPU: PyTorch sees no CUDA device to record CUDA graphs on"


def row(method: str, kind: str, asked: str, us: float, problems: int = 4, **others: Any) -> dict[str, Any]:
    cell = {"product": "sgemm", "arithmetic": "bf16", "problems": problems, "asked": asked}
    return {**cell, "method": method, "kind": kind, "round_us_median": us, "failed": "", **others}


def test_the_summary_takes_ratios_within_pairs_and_the_best_kernel():
    rows = [
        *(row("jax_in_turn", "time", "jax_in_turn", us, n) for n, us in ((1, 9.0), (4, 80.0), (16, 400.0))),
        *(row("coalesced", "coalesced", "jax_in_turn", us, n) for n, us in ((1, 9.0), (4, 10.0), (16, 200.0))),
        row("torch_bmm", "user", "torch_bmm", 30.0),
        row("coalesced", "coalesced", "torch_bmm", 20.0),
        row("batched_dot", "kernel", "inside", 6.0),
        row("indexed_gemm", "kernel", "inside", 5.0),
        row("cublas_batched", "library", "inside", 4.0),
        row("separate", "kernel", "inside", 0.0, failed="no memory"),
        row("floor", "floor", "inside", 2.0),
    ]
    (totals,) = summaries(rows)
    assert totals["over_jax_in_turn"] == {"4": 8.0, "16": 2.0} and totals["over_jax_in_turn_geometric_mean"] == 4.0
    assert totals["best_kernel"] == {"4": "indexed_gemm"} and totals["best_kernel_of_floor"] == {"4": 0.4}
    assert totals["best_kernel_over_cublas_batched"] == {"4": 0.8}
    assert list(reasons(rows)) == ["- separate with 4 problems: no memory"]
    head = {"device": "d", "versions": {"jax": "1"}, "date": "", "note": "", "command": ""}
    text = report(head | {"settings": {"sizes": {"sgemm": [8, 32, 16]}}}, rows, [totals])
    lines = {line[0].strip(): line[2].strip() for row in text.splitlines() if len(line := row.split("|")[1:]) == 5}
    assert lines["jax_in_turn (time)"] == "80.0 (8.00x)" and lines["torch_bmm (user)"] == "30.0 (1.50x)"
    assert lines["coalesced (coalesced)"] == "15.0" and lines["cublas_batched (library)"] == "4.0 (50%)"
    assert "geometric mean over 4, 16 problems: 4.00x" in text


@pytest.mark.once  # by kernels that are tested on both interpreters
@pytest.mark.parametrize("m", [1, 24])
def test_kernels_inside_compute_the_products(m):
    products = Products(m, 48, 20, "f32", 3)
    keys = jax.random.split(jax.random.key(0), 2)
    left, right = jax.random.normal(keys[0], (3, 1, m, 48)), jax.random.normal(keys[1], (3, 48, 20))
    found = names(products)
    assert {"batched_dot", "separate", *map(tiled, ROW_TILES if m == 1 else MATRIX_TILES)} <= set(found) <= set(NAMES)
    for name in [name for name in found if not pallas(name)] + [found[-1]]:
        work = contender(products, name).work
        weights = right.mT if work.ws[0].shape == (3, 20, 48) else right
        assert work.run is not None
        got = work.run(left, [weights]).reshape(3, m, 20)
        np.testing.assert_allclose(got, np.matmul(left[:, 0], right), rtol=0, atol=1e-4)


def test_a_contender_that_is_not_what_it_says_has_a_reason():
    work = contender(Products(4, 8, 4, "f32", 2), "batched_dot").work
    broken = Contender(contender(Products(4, 8, 4, "f32", 2), "batched_dot").work, {"xla_no_such_option": True})
    found = kernel_clock.compiled({"right": Contender(work), "wrong": Contender(work, library="cublas"), "odd": broken})
    assert found["wrong"] == "XLA does not call cublas for it" and "xla_no_such_option" in found["odd"]
    left, right = kernel_clock.operands(kernel_clock.structs_of(work), rounds=2)
    np.testing.assert_array_equal(found["right"](*left), kernel_clock.run_on(found["right"], [left, right], 3))


def test_the_profiler_is_the_clock_of_a_gpu(monkeypatch):
    """Here it is replaced: each round of the program is two launches, the second of which starts during the first."""
    work, calls = contender(Products(4, 8, 4, "f32", 2), "batched_dot").work, []

    def rounds_of(runs: Any, rounds: int) -> Any:
        calls.extend(run(i).shape for run in runs for i in range(rounds))
        return [[[Launch("a", 0.0, 8.0 + i), Launch("b", 4.0, 8.0)] for i in range(rounds)] for _ in runs]

    monkeypatch.setattr(profiler, "rounds_of", rounds_of)
    contenders = {
        "busy": Contender(work),
        "wrong": Contender(work, library="cublas"),
        "span": Contender(work, measure=profiler.span),
    }
    rows = kernel_clock.by_profiler(contenders, 3)
    assert list(rows) == list(contenders) and calls == [(2, 1, 4, 4)] * 6
    assert rows["busy"]["round_us_median"] == 17.0 and rows["busy"]["kernels"] == ["a", "b"]
    assert rows["span"]["round_us_median"] == 12.0 and rows["span"]["launches_us"] == 17.0
    assert rows["wrong"] == {"failed": "XLA does not call cublas for it"}


def test_torch_peers_agree_with_jax(monkeypatch):
    """All that they do but record CUDA graphs, on a CPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(peers_torch, "check_device", lambda precision: None)
    monkeypatch.setattr(peers_torch, "recorded", lambda call: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    own = peers_product.operands
    monkeypatch.setattr(peers_product, "operands", lambda cell, device, layout: own(cell, "cpu", layout))
    cell = Products(6, 8, 4, "f32", 3).cell([{}])
    want = pairs.reference(cell)
    for name, count in (("jax_in_turn", 1), ("torch_in_turn", 2 * len(LAYOUTS)), ("torch_bmm", len(LAYOUTS))):
        best = pairs.best_of(PEERS[name].configurations, cell, want, LIMITS)
        assert [tried.get("failed") for tried in best.tried] == [None] * count
