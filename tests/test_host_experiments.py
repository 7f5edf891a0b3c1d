"""The experiments about the runtime's own cost run, from their command line to their files; no test looks at a time."""

import json
from pathlib import Path

import numpy as np
import pytest

from coalesce.runtime import first_runs, making
from coalesce.runtime.apart import Apart
from coalesce.serving import making as serving
from experiments import host_time, newcomer
from experiments.newcomer_ways import WAYS


def saved(path: Path) -> dict:
    assert path.with_suffix(".md").read_text().startswith("# ")
    return json.loads(path.read_text())


@pytest.mark.once  # what it serves with is tested on both interpreters
def test_host_time_has_a_row_for_each_way_and_size(tmp_path, capsys):
    host_time.main(["--requests=64", "--bytes=64", "--staged=4096", "--repeats=1", f"--out={tmp_path}"])
    rows = saved(tmp_path / "host_time.json")["rows"]
    assert [row["way"] for row in rows] == ["submit", "infer", "refused", "floor", "python", "staging"]
    assert all(row["host_us"] > 0 for row in rows[:5]) and rows[5]["gbs"] > 0
    assert [1 <= row["lanes"] <= 16 for row in rows[:5]] == [True, True, False, True, False]
    text = (tmp_path / "host_time.md").read_text()
    assert "< 30 us" in text and text in capsys.readouterr().out
    assert "    python -m experiments.host_time --bytes=64 --repeats=1 --requests=64 --staged=4096\n" in text


@pytest.mark.once  # what it serves with is tested on both interpreters
def test_newcomers_are_added_while_others_are_asked(tmp_path, capsys):
    tiny = ["--fields=width=8,layers=2", "--rate=50", "--families=1", "--turns=1", "--widths=1"]
    tiny.append("--ways=present,bare")
    newcomer.main([*tiny, f"--out={tmp_path}"])
    (row,) = saved(tmp_path / "newcomer.json")["rows"]
    kinds = ("steady", "beside", "adding", "bare_adding")
    assert row["families"] == 1 and min(row[f"{kind}_requests"] for kind in kinds) > 0
    assert row["p99_ratio"] == round(row["adding_p99_ms"] / row["steady_p99_ms"], 2)
    assert row["bare_p99_ratio"] == round(row["bare_adding_p99_ms"] / row["steady_p99_ms"], 2)
    text = (tmp_path / "newcomer.md").read_text()
    assert "the target is 2" in text and "bare: " in text and text in capsys.readouterr().out
    assert "    python -m experiments.newcomer --families=1 --fields=width=8,layers=2" in text


def test_quantiles_are_in_milliseconds():
    assert newcomer.quantiles(np.linspace(0, 0.1, 1001).tolist()) == {
        "requests": 1001, "p50_ms": 50.0, "p99_ms": 99.0, "p999_ms": 99.9,
    }  # fmt: skip


def test_each_way_to_take_newcomers_in_leaves_all_as_it_was():
    def switches() -> list[object]:
        return [first_runs.RUNS, serving.WITHOUT_GRAPH, making.UNTIMED, Apart.compile, Apart.call]

    usual = switches()
    changed = {}
    for way, switch in WAYS.items():
        with switch():
            changed[way] = [i for i, (now, own) in enumerate(zip(switches(), usual, strict=True)) if now is not own]
        assert switches() == usual
    assert changed == {
        "present": [], "before": [0, 1, 3, 4], "here": [3, 4], "late": [0], "graphs": [1], "bare": [2],
    }  # fmt: skip
