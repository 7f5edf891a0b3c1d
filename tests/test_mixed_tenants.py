"""mixed_tenants and shape_clusters run, from their command line to their files; no test looks at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from coalesce.models import by_name, NAMES
from experiments import executables, mixed_methods, mixed_tenants, settings
from experiments.cells import tenants_of
from experiments.mixed_report import beside_lines, gain_lines

ROOT = Path(__file__).parent.parent
SMALL = [f"{name}.{field}" for name in ("lstm", "gru") for field in ("hidden=8", "features=8", "steps=3", "classes=4")]
QUICK = ["--sets=recurrent", "--repeats=3", f"--fields={','.join(SMALL)}"]


@pytest.fixture
def mix(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs mixed_tenants with a command line."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["mixed_tenants", *arguments])
        with flagsaver.flagsaver():
            mixed_tenants.main(flags.FLAGS(sys.argv))

    return run


@pytest.mark.once  # methods of one model are compared on both interpreters, in tests/test_experiments.py
def test_mixed_tenants_compares_eight_ways_to_serve_a_set(mix, tmp_path, capsys):
    mix(*QUICK, "--lanes=2", f"--out={tmp_path}", "--own_executables")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"mixed_tenants_lanes2.{end}" for end in ("json", "md", "png")
    }
    result = json.loads((tmp_path / "mixed_tenants_lanes2.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [*mixed_tenants.METHODS]
    for row in rows.values():
        assert row["models"] == ["lstm", "gru"] and not row["failed"] and row["error"] <= 1e-5
        assert row["sustained_us_median"] >= row["sustained_us_p10"] > 0
    assert len(rows["sequential"]["tried"]) == 2
    assert rows["never"]["facts"]["heavy_ops"] == 2 * (3 + 3)
    assert rows["never"]["facts"]["superkernels_across"] == rows["never"]["facts"]["ops_across"] == 0
    assert rows["always"]["facts"]["superkernels_across"] > 0
    assert result["header"]["settings"]["fields"]["gru"]["hidden"] == 8
    assert "hidden=8 (lstm, gru)" in capsys.readouterr().out

    before = result["rows"]
    mix(*QUICK, "--lanes=2", f"--out={tmp_path}", "--methods=always")
    assert json.loads((tmp_path / "mixed_tenants_lanes2.json").read_text())["rows"] == before


def test_graphs_alone_are_tried_where_nothing_is_to_be_called():
    mix = [tenants_of(by_name("mlp", layers=2, width=width), 1, 1) for width in (4, 8)]
    (only,) = mixed_methods.fused(mix, {}, "auto", mixed_tenants.WASTE_BOUND, called=False, captured=True)
    (own,) = mixed_methods.one_by_one(mix, {}, mixed_tenants.only_captured)
    assert only.how == own.how == "captured"
    want = [np.asarray(x) for x in jax.tree.leaves([t.apply(t.params[0], *t.inputs[0]) for t in mix])]
    for candidate in (only, own):
        got = jax.tree.leaves(candidate.split(candidate.run()))
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_every_model_is_in_a_set():
    assert {settings.named(item)[0] for items in mixed_tenants.SETS.values() for item in items} == set(NAMES)


def test_a_prediction_is_right_wrong_or_within_the_noise():
    def row(method, median, spread=2.0, ops=4, predicted=0.0):
        times = {"round_us_median": median, "round_us_p10": median, "round_us_p90": median + spread, "repeats": 300}
        facts = {"superkernels_across": ops // 2, "ops_across": ops, "loops_across": 0, "predicted_gain_us": predicted}
        return {"set": "s", "method": method, "failed": "", **times, "facts": facts}

    never = row("never", 100.0, ops=0)

    def verdict(other):
        (line,) = gain_lines([never, other])
        return line

    assert verdict(row("always", 120.0, predicted=-30.0)).endswith(
        "2 superkernels across families with 4 ops, joint loops: 0; "
        "predicted -30 us, measured -20 us (-20.0%); the sign is right, the size 1.5 times too large"
    )
    assert verdict(row("always", 120.0, predicted=-4.0)).endswith("the sign is right, the size 5 times too small")
    assert verdict(row("always", 720.0, predicted=-4.0)).endswith("the size 155 times too small")
    assert verdict(row("always", 120.0, predicted=-20.1)).endswith("the sign is right, and the size")
    assert verdict(row("always", 120.0, predicted=30.0)).endswith("the sign is wrong")
    assert verdict(row("always", 120.0, predicted=-0.1)).endswith("nothing was predicted")
    assert verdict(row("always", 101.9, predicted=-1.0)).endswith("within the noise")
    assert verdict(row("always", 101.9, predicted=30.0)).endswith("within the noise, though more was predicted")
    assert verdict(row("always", 102.1, predicted=30.0)).endswith("the sign is wrong")
    # 100 us between p10 and p90 of 300 rounds are 2.8 us of a median's error, of one of two medians.
    assert verdict(row("always", 105.0, spread=100.0, predicted=30.0)).endswith("though more was predicted")
    assert verdict(row("always", 106.0, spread=100.0, predicted=30.0)).endswith("the sign is wrong")
    nothing = verdict(row("auto", 101.0, ops=0))
    assert "packs nothing across families" in nothing and nothing.endswith("-1 us (-1.0%)")
    assert list(gain_lines([never, row("always", 90.0) | {"failed": "no memory"}])) == []
    # What runs side by side is compared with what packs nothing and does so too.
    beside, auto = row("beside", 80.0, ops=0), row("auto", 60.0, predicted=20.0)
    auto["facts"] |= {"side_by_side": True, "why_side_by_side": "side by side: it wins"}
    (line,) = gain_lines([never, beside, auto])
    assert line.endswith("measured +20 us (+25.0%); the sign is right, and the size")
    assert list(beside_lines([never, beside, auto])) == ["- s: side by side: it wins"]


@pytest.mark.once  # it counts what is traced, and runs nothing
def test_shape_clusters(tmp_path):
    # In a process of its own: its flags have names that those of the timed experiments have too.
    command = [sys.executable, "-m", "experiments.shape_clusters", "--models=lstm,gru,bert_small", f"--out={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "shape_clusters.json").read_text())["rows"]
    assert [row["bound"] for row in rows] == [n / 20 for n in range(11)]
    assert {row["ops"] for row in rows} == {3 + 3 + 25}
    assert rows[0]["padding"] == 0 < rows[-1]["padding"] < 0.5
    assert rows[0]["clusters"] > rows[-1]["clusters"]
    assert all(row["largest_padding"] <= row["bound"] for row in rows)
    shapes = json.loads((tmp_path / "shape_clusters_ops.json").read_text())["rows"]
    assert sum(shape["ops"] for shape in shapes) == 3 + 3 + 25
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    # The gates of the GRU, which are three, and of the LSTM, which are four, on one row.
    assert "| 1 x 2048 x 512 " in run.stdout and " 1 x 1536 x 512 |" in run.stdout


TOWERS = """
import jax, jax.numpy as jnp
import coalesce

def tower(layers, x):
    for layer in layers:
        x = jax.nn.relu(x @ layer)
    return x

def programs():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    widths = {"small": 14, "twin of small": 14, "large": 16}
    return [coalesce.trace(tower, [f32(8, n), f32(n, 4)], f32(2, 8), name=name) for name, n in widths.items()]

def of_one_name():
    return [coalesce.trace(tower, [jax.ShapeDtypeStruct((8, n), jnp.float32)], jnp.ones((2, 8))) for n in (14, 16)]
"""
TWICE = """
from absl import app
from coalesce.errors import PlanError
from experiments import shape_clusters

try:
    shape_clusters.heavy_ops_of_families("towers:of_one_name")
except PlanError as e:
    print(e)
app.run(shape_clusters.main)
"""


@pytest.mark.once  # it counts what is traced, and runs nothing
def test_shape_clusters_of_a_users_tenants(tmp_path):
    (tmp_path / "towers.py").write_text(TOWERS)
    command = [sys.executable, "-c", TWICE, "--function=towers:programs", f"--out={tmp_path}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("two tenants are called 'tenant'")
    assert "among the tenants of towers:programs" in run.stdout and "small 1, large 1" in run.stdout
    shapes = json.loads((tmp_path / "shape_clusters_ops.json").read_text())["rows"]
    assert [(row["model"], row["m"], row["n"], row["k"]) for row in shapes] == [
        ("large", 2, 4, 16), ("large", 2, 16, 8), ("small", 2, 4, 14), ("small", 2, 14, 8),
    ]  # fmt: skip
    assert (tmp_path / "shape_clusters.png").exists()


EIGHT = "resnet18,vgg16,vit_ti16,bert_small,lstm,gru,dlrm,mlp"


@pytest.mark.once  # it plans, and runs nothing
@pytest.mark.parametrize("models", [EIGHT, pytest.param(",".join(NAMES), marks=pytest.mark.slow)], ids=["8", "all"])
def test_64_tenants_are_planned_in_seconds(tmp_path, models):
    """Of CPU time, so that it does not matter what else runs: a fifth of the bound or less is what it takes."""
    command = [sys.executable, "-m", "experiments.planning_time", f"--models={models}", f"--out={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert f"64 programs in {models.count(',') + 1} families" in run.stdout
    seconds = {row["what"]: row["seconds"] for row in json.loads((tmp_path / "planning_time.json").read_text())["rows"]}
    assert "align" in seconds and seconds["fuse, all of it"] < 20


@pytest.mark.once  # methods of one model are compared on both interpreters, in tests/test_experiments.py
def test_executables_compares_cuts_of_one_program(monkeypatch, tmp_path):
    arguments = [*QUICK, "--executables=1,3", "--seconds=1", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["executables", *arguments])
    with flagsaver.flagsaver():
        executables.main(flags.FLAGS(sys.argv))
    rows = json.loads((tmp_path / "executables_float32_lanes1.json").read_text())["rows"]
    assert [(row["asked"], row["executables"]) for row in rows] == [("1", 1), ("3", 3), ("per_family", 2)]
    assert all(row["error_to_first"] <= 1e-5 and row["sustained_us_median"] > 0 for row in rows)
    assert "| recurrent, 3 " in (tmp_path / "executables_float32_lanes1.md").read_text()
