"""ablation runs from its command line to its files, and measures what is missing. No test looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coalesce.compile import OPTIONAL_PASSES

ROOT = Path(__file__).parent.parent
TINY = (
    "--models=lstm",
    "--fields=lstm.steps=2,lstm.hidden=4,lstm.features=4,lstm.classes=2",
    "--tenants=2",
    "--dtypes=float32",
)


def ablate(folder: Path, *given: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "experiments.ablation", *TINY, "--repeats=2", f"--out={folder}"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([*command, *given], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "| without " in run.stdout
    return json.loads((folder / "ablation.json").read_text())["rows"]


@pytest.mark.once
def test_each_pass_has_a_row(tmp_path):
    rows = {row["method"]: row for row in ablate(tmp_path)}
    assert set(rows) == {"nothing", *OPTIONAL_PASSES, "tuning"}
    assert not any(row["failed"] for row in rows.values())
    assert rows["fuse_attention"]["same_as"] == rows["tuning"]["same_as"] == "nothing"  # there is none, on a CPU
    timed = {name for name, row in rows.items() if not row["same_as"]}
    assert timed > {"nothing", "hoist_weights"}
    assert all(rows[name]["round_us_median"] > 0 and rows[name]["sustained_us_median"] > 0 for name in timed)
    again = ablate(tmp_path, "--methods=cse")
    assert {row["method"]: row for row in again} == rows


@pytest.mark.once
def test_databases_have_rows(tmp_path):
    empty, broken = tmp_path / "empty.json", tmp_path / "broken.json"
    empty.write_text('{"format": 1, "entries": []}')
    broken.write_text("{}")
    found = {row["method"]: row for row in ablate(tmp_path, "--methods=nothing", f"--databases={empty},{broken}")}
    assert list(found) == ["nothing", f"tuning but {broken}", f"tuning but {empty}"]
    assert found[f"tuning but {empty}"]["same_as"] == "nothing"
    assert "has format None" in found[f"tuning but {broken}"]["failed"]
