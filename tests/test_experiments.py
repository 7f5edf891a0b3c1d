"""The experiments run, from their command line to their files; no test looks at a time."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from coalesce.models import by_name
from experiments import demo, methods, tenant_scaling
from experiments.cells import measure_cell, tenants_of
from experiments.measure import interleave
from experiments.methods import Candidate, Options, Tenants
from experiments.results import table

QUICK = ["--tenants=1,2", "--repeats=2", "--override=layers=2,width=4", "--max_one_program=1"]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs tenant_scaling with a command line."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["tenant_scaling", *arguments])
        with flagsaver.flagsaver():
            tenant_scaling.main(flags.FLAGS(sys.argv))

    return run


def saved(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_tenant_scaling_writes_a_row_a_method_and_cell(scale, tmp_path, capsys):
    scale(*QUICK, f"--out={tmp_path}", "--own_executables", "--within_program")
    result = saved(tmp_path)
    rows = {(row["tenants"], row["method"]): row for row in result["rows"]}
    shared = {"sequential", "one_program", "vmap", "fused"}
    assert set(rows) == {(1, m) for m in shared | {"own_jit"}} | {(2, m) for m in shared}
    left_out = rows.pop((2, "one_program"))
    assert "left out above 1 tenants" in left_out["failed"]
    for row in rows.values():
        assert not row["failed"] and row["error"] <= 1e-5 and row["repeats"] == 2
        assert 0 < row["round_us_p10"] <= row["round_us_median"] <= row["round_us_p90"]
    assert len(rows[2, "sequential"]["tried"]) == len(rows[2, "vmap"]["tried"]) == 2
    assert len(rows[2, "fused"]["tried"]) == 4  # within_program or not, staged or not
    assert result["header"]["versions"]["jax"] == jax.__version__
    assert "| 2 " in capsys.readouterr().out
    assert "--out" not in result["header"]["command"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


@pytest.mark.once  # the methods that the test above times
def test_tenant_scaling_goes_on_where_it_stopped(scale, tmp_path):
    scale(*QUICK, f"--out={tmp_path}", "--budget_s=0")
    assert not list(tmp_path.glob("*.json"))
    scale(*QUICK, f"--out={tmp_path}", "--tenants=2", "--methods=fused")
    before = saved(tmp_path)["rows"]
    scale(*QUICK, f"--out={tmp_path}", "--tenants=1,2", "--methods=fused")
    rows = saved(tmp_path)["rows"]
    assert [(row["tenants"], row["method"]) for row in rows] == [
        (n, m) for n in (1, 2) for m in ("sequential", "fused")
    ]
    assert rows[2:] == before
    with pytest.raises(SystemExit, match="other settings; --force"):
        scale(*QUICK, f"--out={tmp_path}", "--tolerance=0.5")


@pytest.mark.once
@pytest.mark.parametrize(
    "wrong, told",
    [
        ("--image_size=32", "mlp has not all of image_size"),
        ("--tenants=", "nothing is given"),
        ("--tolerance=-1", "a number from 0"),
        ("--seconds=nan", "a number from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(scale, wrong, told):
    with pytest.raises(flags.Error, match=told):
        scale(wrong)


def test_what_a_method_gets_wrong_is_not_timed():
    def zeros(tenants: Tenants, options: Options):
        yield Candidate("zeros", lambda: [jax.numpy.zeros((1, 4)) for _ in tenants.params])

    def out_of_memory(tenants: Tenants, options: Options):
        yield from methods.sequential(tenants, options)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nand where")

    tenants = tenants_of(by_name("mlp", layers=2, width=4), 2, batch=1)
    chosen = {"sequential": methods.sequential, "zeros": zeros, "half": out_of_memory}
    rows = measure_cell(tenants, chosen, [{}], tolerance=1e-5, repeats=2, seconds=10)
    assert rows["zeros"]["failed"] == "outputs differ by 1.0e+00, more than 1e-05"
    assert "round_us_median" not in rows["zeros"]
    assert rows["half"]["error"] == 0 and not rows["half"]["failed"]
    assert rows["half"]["tried"][1]["failed"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: no memory"


def test_tenants_differ_in_every_weight():
    tenants = tenants_of(by_name("mlp", layers=1, width=4), 2, batch=1)
    for leaves in zip(*(jax.tree.leaves(params) for params in tenants.params), strict=True):
        assert not np.array_equal(*leaves)


def test_contenders_take_turns():
    order: list[str] = []
    rounds = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleave(rounds, repeats=3, seconds=10, warmup=0)
    assert "".join(order) == "aabbcc" + "bbccaa" + "ccaabb"
    assert {timing.repeats for timing in timings.values()} == {3}


def test_table_is_aligned():
    assert table(["n", "us"], [["1", "7"], ["64", "1,234"]]).splitlines() == [
        "| n  |    us |",
        "| -- | ----: |",
        "| 1  |     7 |",
        "| 64 | 1,234 |",
    ]


@pytest.mark.once
def test_demo(standard_promotion, capsys):
    assert demo.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert "cnn-1, cnn-2, cnn-3" in out and "lstm-3" in out
    assert "36 │    13" in out  # heavy ops before and fused
    assert "body.0 x3]" in out


@pytest.mark.once  # the same fused program, of which wrong results are made here
def test_demo_fails_when_a_tenant_loses_accuracy(standard_promotion, capsys, monkeypatch):
    fuse = demo.coalesce.fuse

    class Broken:
        def __init__(self, programs):
            self.fused = fuse(programs)

        def __getattr__(self, name):
            return getattr(self.fused, name)

        def __call__(self, inputs):
            return [-logits for logits in self.fused(inputs)]

    monkeypatch.setattr(demo.coalesce, "fuse", Broken)
    assert demo.main(["--quick"]) == 1
    assert "is not as accurate" in capsys.readouterr().out
