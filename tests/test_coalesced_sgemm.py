"""coalesced_sgemm runs, from its command line to its files; no test looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_coalesced_sgemm(tmp_path):
    # In a process of its own: its flags have names that those of other experiments have too.
    command = [sys.executable, "-m", "experiments.coalesced_sgemm", "--products=matvec", "--arithmetic=f32"]
    command += ["--problems=2", "--methods=jax_in_turn,batched_dot,floor", "--repeats=3", "--runs=2"]
    command += [f"--out={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "coalesced_sgemm.json").read_text())["rows"]
    assert [(row["method"], row["kind"], row["asked"]) for row in rows] == [
        ("jax_in_turn", "time", "jax_in_turn"),
        ("coalesced", "coalesced", "jax_in_turn"),
        ("batched_dot", "kernel", "batched_dot"),
        ("floor", "floor", "floor"),
    ]
    for row in rows:
        assert (row["product"], row["arithmetic"], row["problems"]) == ("matvec", "f32", 2)
        assert row["failed"] in ("", "too fast for the clock")
    assert rows[1]["error"] <= 1e-5
    assert "## matvec (M, K, N = (1, 1024, 2048)), f32" in run.stdout and "geometric mean" in run.stdout
