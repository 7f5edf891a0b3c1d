"""collaborative_kernels with tiny operations, interpreted and timed by a clock of the test's own."""

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
from coalesce.kernels import KERNELS
from experiments import profiler
from experiments.products import op_of
from experiments.tile_trials import contender, conv, dot, OPS, report, SETTINGS, trial

ROOT = Path(__file__).parent.parent
SMALL, LARGE = Blocks(16, 16, 16), Blocks(32, 32, 16)


def test_operations_are_those_they_are_named_after():
    shapes = {name: (op.m, op.k, op.n) for name, op in ((name, make("bfloat16")) for name, make in OPS.items())}
    assert shapes == {
        "SGEMM of figure 6": (3136, 576, 64),
        "ResNet-50 conv3": (784, 1152, 128),
        "ResNet-50 conv5": (49, 4608, 512),
        "BERT-base dense": (128, 768, 3072),
    }


@pytest.mark.once  # kernels that tests of their own run on both interpreters
@pytest.mark.parametrize("op", [dot(20, 24, 18, "float32"), conv(5, 8, "float32")])
def test_every_setting_computes_all_problems(op):
    draw = partial(jax.random.normal, dtype="float32")
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = draw(keys[0], (3, 1, *op.lhs.shape)), draw(keys[1], (3, *op.rhs.shape))
    want = KERNELS["separate"].run(op, x, w)
    w = jax.vmap(KERNELS["indexed_gemm"].layout(op))(w)
    runs = {setting: contender(op, SMALL, setting, 3).work for setting in SETTINGS}
    assert [len(work.ws) for work in runs.values()] == [1, 1, 5]
    apart = [part for i in range(3) for part in (x[i : i + 1], w[i : i + 1])]
    alone, launch, concurrent = (work.run for work in runs.values())
    assert alone and launch and concurrent
    check = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    check(alone(x[:1], [w[:1]]), want[:1])
    check(launch(x, [w]), want)
    check(np.concatenate(list(concurrent(apart[0], apart[1:]))), want)
    assert contender(op, SMALL, "concurrent", 3).measure is profiler.span


def test_best_alone_and_best_in_company():
    us = {"16x16x16 w4 s3": (9.0, 50.0, 60.0), "32x32x16 w4 s3": (10.0, 40.0, 30.0)}

    def clock(contenders: Any) -> dict[str, dict[str, Any]]:
        times = {f"{name} {s}": time for name, own in us.items() for s, time in zip(SETTINGS, own, strict=True)}
        assert set(times) == set(contenders)
        return {name: {"round_us_median": time, "launches_us": 120.0, "failed": ""} for name, time in times.items()}

    def fails(contenders: Any) -> dict[str, dict[str, Any]]:
        return {
            name: {"failed": "no shared memory"} if "32x32" in name else row for name, row in clock(contenders).items()
        }

    op = dot(20, 24, 18, "float32")
    rows = trial(op, [SMALL, LARGE], 3, clock)
    assert [row["best"] for row in rows] == [["alone"], ["launch", "concurrent"]]
    assert [row["overlap"] for row in rows] == [2.0, 4.0]
    head = {"device": "d", "versions": {"jax": "1"}, "date": "", "note": "", "command": "", "settings": {"problems": 3}}
    text = report(head, [{"op": "tiny", "dtype": "float32", **row} for row in rows])
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| tiny")
    ]
    assert lines == [
        ["tiny, float32: best alone", "16x16x16 w4 s3", "9.0", "50.0", "60.0", "2.0"],
        [
            "tiny, float32: best launch",
            "32x32x16 w4 s3",
            *(large := ["10.0 (0.90x)", "40.0 (1.25x)", "30.0 (2.00x)", "4.0"]),
        ],
        ["tiny, float32: best concurrent", "32x32x16 w4 s3", *large],
    ]
    rows = trial(op, [SMALL, LARGE], 3, fails)
    assert rows[0]["best"] == [*SETTINGS] and rows[1]["us"]["alone"] is None
    assert "launch: no shared memory" in report(head, [{"op": "tiny", "dtype": "float32", **row} for row in rows])


def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "experiments.collaborative_kernels"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "needs a GPU" in run.stdout + run.stderr


def test_an_operation_of_a_function():
    op = op_of(lambda w, x: x @ w, jax.ShapeDtypeStruct((3, 4), "float32"), jax.ShapeDtypeStruct((2, 3), "float32"))
    assert (op.kind, op.m, op.k, op.n) == ("dot", 2, 3, 4)
