"""cost_error runs, from its command line to its files, and predicts anew what was measured; no test looks at a time."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.cost_cases import cls_of, model_ops
from experiments.cost_report import fastest, rank_correlation, ranks


def test_rank_correlation():
    assert list(ranks(np.array([3.0, 1.0, 3.0, 2.0]))) == [2.5, 0.0, 2.5, 1.0]
    assert rank_correlation([(1, 10), (2, 20), (3, 30)]) == pytest.approx(1)
    assert rank_correlation([(1, 30), (2, 20), (3, 10)]) == pytest.approx(-1)


def test_the_faster_of_two_runs_counts():
    new, failed = {"predicted_us": 2, "measured_us": 5}, {"predicted_us": 2, "failed": "out of memory"}
    assert fastest(new, None) == fastest(new, failed) == new
    assert fastest(new, {"predicted_us": 1, "measured_us": 4}) == {"predicted_us": 2, "measured_us": 4}
    assert fastest(failed, {"predicted_us": 1, "measured_us": 4}) == {"predicted_us": 2, "measured_us": 4}
    assert fastest(failed, None) == failed


# In a zoo of one model, for speed.
AGAIN = """
import sys
from absl import app, flags
from experiments import cost_error

flags.FLAGS([*sys.argv[:-2], "--models=mlp"])
for path in sys.argv[-2:]:
    flags.FLAGS.again = path
    try:
        cost_error.main(["cost_error"])
    except app.UsageError as e:
        print(e)
    flags.FLAGS["models"].present = 0
    cost_error.main(["cost_error"])
"""


def by_hand(path: Path) -> None:
    """Measured with other kernels."""
    op = model_ops("float32", ["mlp"])[0]
    row = {"cls": cls_of(op, ""), "what": op.shape, "dtype": "float32", "groups": 2, "predicted_us": 1.0}
    rows = [
        row | {"kernel": "batched_dot", "chosen": True, "measured_us": 7.0},
        row | {"kernel": "separate", "chosen": True, "measured_us": 8.0},
        row | {"kernel": "batched_dot", "chosen": True, "measured_us": 9.0, "what": "of no model", "groups": 1},
    ]
    head = {"command": "c", "device": "d", "date": "2026-01-01", "note": "", "versions": {"jax": "0"}}
    path.write_text(json.dumps({"header": head | {"settings": {"entry": "CPU"}}, "rows": rows}))


def check_by_hand(path: Path, told: str) -> None:
    said = "of 3 rows 1 are dropped, whose op no model has any more, and 1 are of a kernel that is not chosen any more"
    assert f"{said}; 1 of kernels that are chosen since were not measured" in told
    found = {(row["kernel"], row["groups"]): row for row in json.loads(path.read_text())["rows"] if row["kernel"]}
    assert set(found) == {("batched_dot", 1), ("batched_dot", 2), ("separate", 2)}
    assert (found["batched_dot", 2]["measured_us"], found["separate", 2]["measured_us"]) == (7.0, 8.0)
    assert found["batched_dot", 2]["chosen"] and not found["separate", 2]["chosen"]
    assert found["batched_dot", 2]["predicted_us"] != 1.0 and found["batched_dot", 1]["failed"] == "not measured"
    assert "1 cases are of kernels that the compiler does not take for them now" in path.with_suffix(".md").read_text()


@pytest.mark.once
def test_cost_error_writes_its_files_and_predicts_again_what_was_measured(tmp_path):
    """In processes of their own: the experiments define flags of one name."""
    few = ["--models=mlp", "--ops=1", "--groups=1,2", "--repeats=3", "--seconds=0.1", "--most_us=10"]
    command = [sys.executable, "-m", "experiments.cost_error", *few, f"--out={tmp_path}"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    rows = json.loads((tmp_path / "cost_error.json").read_text())["rows"]
    assert [(row["kernel"], row["groups"]) for row in rows if row["cls"] == "matvec"] == [
        ("batched_dot", 1), ("batched_dot", 2),
    ]  # fmt: skip
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    (tmp_path / "cost_error.md").unlink()
    (tmp_path / "other").mkdir()
    paths = tmp_path / "cost_error.json", tmp_path / "other" / "cost_error.json"
    by_hand(paths[1])
    command = [sys.executable, "-c", AGAIN, "--most_us=10", f"--out={tmp_path}", "--note=Fitted.", *map(str, paths)]
    again = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("--again takes all models, and the groups of the result: leave --models out")
    check_by_hand(paths[1], again.stderr)
    assert json.loads((tmp_path / "cost_error.json").read_text())["rows"] == rows
    assert "Fitted." in (tmp_path / "cost_error.md").read_text()
