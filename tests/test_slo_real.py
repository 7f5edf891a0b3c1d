"""slo_attainment serves on the device at hand, from its flags to its files; no test looks at a time."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from absl import app

from coalesce.models import by_name
from experiments import slo_real, slo_serve, slo_torch, slo_turns
from experiments.peers_common import CannotRun
from experiments.results import Row
from experiments.slo_probe import OutOfTime, probe, search
from experiments.slo_real import Kind, owners
from experiments.slo_sheet import Cell, Sheet

TINY = by_name("mlp", width=8, layers=2)


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    own = SimpleNamespace(
        models=["mlp"], fields=["mlp.width=8", "mlp.layers=2"], dtype="float32", tenants=2, slo_scale=1e7,
        alone="program", cvs=[1.0], overloads=[2.0], loads=[0.02], probe_s=0.02, tries=1, within=0.5,
        lanes=[1, 2], policies=None, budget_s=None, device_name=None, note="", force=False, precision=None,
        segments=None, mixed=True, rates=[],
    )  # fmt: skip
    monkeypatch.setattr(slo_serve, "FLAGS", own)
    monkeypatch.setattr(slo_serve, "command", lambda *_: "the command")
    monkeypatch.setattr(slo_serve, "folder", lambda: tmp_path)
    monkeypatch.setattr(slo_serve, "tolerance", lambda: 1e-5)
    monkeypatch.setattr(slo_serve, "FIRST", 0.1)
    monkeypatch.setattr(slo_serve, "search", content)  # since an SLO of minutes is never missed
    return own


def content(tried: Any, first: float, within: float, found: Any) -> None:
    """A search that is content with the first rate that is good."""
    search(lambda rate: tried(rate) if rate == first else None, first, within, found)


@pytest.mark.once  # what it serves with is tested on both interpreters
def test_slo_attainment_serves_with_every_policy(flags, tmp_path, capsys):
    flags.budget_s = 0.0
    slo_serve.serve_all()
    assert not list(tmp_path.glob("*.json"))
    flags.budget_s = None
    slo_serve.serve_all()
    rows = saved(tmp_path)
    assert sorted((row["policy"], row["kind"]) for row in rows) == sorted(
        (policy, kind) for policy in slo_serve.REAL for kind in ("search", "overload", "load")
    )
    for row in rows:
        assert row["requests"] == row["planned"] and row["attainment"] == 1 and row["rate"] > 0
    shown = capsys.readouterr().out
    assert "torch_edf is missing" in shown and "| coalescing" in shown
    flags.policies = ["coalescing", "edf", "fifo"]
    slo_serve.serve_all()
    assert saved(tmp_path) == rows
    with pytest.raises(app.UsageError, match="no policy 'nobody'"):
        slo_serve.named_policies(["nobody"])


@pytest.mark.once  # what it serves with is tested on both interpreters
def test_policies_take_turns_at_given_rates(flags, tmp_path, monkeypatch, capsys):
    """One of them thinks in a process of its own."""
    turns: list[str] = []

    def probed(served: Any, *given: Any, **options: Any) -> Row:
        turns.append(served.policy)
        return probe(served, *given, **options)

    monkeypatch.setattr(slo_turns, "probe", probed)
    flags.rates, flags.tries, flags.policies = [40.0, 80.0], 2, ["elsewhere", "coalescing"]
    slo_serve.serve_all()
    assert turns == ["coalescing", slo_real.ELSEWHERE] * 4
    rows = saved(tmp_path)
    assert [(row["policy"], row["kind"], row["value"]) for row in rows] == [
        (policy, "rate", rate) for rate in (40.0, 80.0) for policy in turns[:2]
    ]
    assert len({tuple(row["slo_us"]) for row in rows}) == 1
    for row in rows:
        assert [one["attainment"] for one in row["tries"]] == [1.0, 1.0] and row["attainment"] == 1
    assert "## At given rates, in turns" in capsys.readouterr().out
    slo_serve.serve_all()
    assert len(turns) == 8, "what is there was measured again"


def test_turns_that_a_budget_ends_are_taken_again(flags, tmp_path, monkeypatch):
    left = iter([9.0, 9.0, 9.0, 0.0])
    monkeypatch.setattr(Sheet, "left_s", property(lambda sheet: next(left)))
    row = {"slo_share_p99": 0.5, "goodput": 1.0, "late": 0, "dropped": 0, "refused": 0, "requests": 10}
    shares = iter([0.9, 0.8, 0.7])
    monkeypatch.setattr(slo_turns, "probe", lambda *_: {**row, "attainment": next(shares)})
    sheet = Sheet(tmp_path / "rows.json", {}, 1.0)
    cells = [Cell(name, 1.0, "rate", 5.0) for name in "ab"]
    served: Any = None
    with pytest.raises(OutOfTime):
        slo_turns.take_turns(sheet, cells, lambda cell: served, {}, 1.0, 2)
    assert [(own["attainment"], len(own["tries"])) for own in sheet.rows] == [(0.7, 2), (0.8, 1)]
    assert sheet.missing(cells) == cells[1:]


def test_a_search_that_runs_out_of_time_goes_on(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(slo_serve, "search", search)
    tried: list[float] = []

    def probed(served: Any, rate: float, *_: Any, patient: bool = True) -> Row:
        if len(tried) == 3:
            sheet.budget_s = 0.0
        tried.append(rate)
        return {"rate": rate, "cv": 1.0, "attainment": float(rate < 70), "pace": 0.5}

    monkeypatch.setattr(slo_serve, "probe", probed)
    sheet = Sheet(tmp_path / "rows.json", {}, None)
    served: Any = None
    cell, facts = Cell("EDF packing", 1.0, "search"), {"bound": 1.0}
    flags.within = 0.05
    with pytest.raises(OutOfTime):
        slo_serve.look(sheet, cell, served, 1000.0, facts)
    assert sheet.rows[0]["unfinished"] and sheet.missing([cell]) == [cell] and len(tried) == 4
    sheet.rows, sheet.budget_s = json.loads((tmp_path / "rows.json").read_text())["rows"], None
    slo_serve.look(sheet, cell, served, 1000.0, facts)
    assert len(set(tried)) == len(tried) and sheet.missing([cell]) == []
    (row,) = sheet.rows
    assert 70 / 1.05 <= row["rate"] / 0.5 < 70 and row["bound"] == 1.0 and "bracket" not in row


def saved(folder: Path) -> list[Row]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())["rows"]


def test_torch_serves_what_jax_computes():
    """On a CPU, where the models run as they are."""
    pytest.importorskip("torch")
    owned = owners([Kind("mlp", {"width": 8, "layers": 2}, TINY, 0, 60 * 10**9)], 3)
    with slo_torch.queue_of(owned, None, 1e-5, 0.01, "cpu") as (queued, chosen):
        assert chosen.depth in slo_torch.DEPTHS and set(chosen.a_second) == set(slo_torch.DEPTHS)
        for own in owned:
            (result,) = queued.submit(own.name).result(60)
            want = TINY.apply(own.params, *map(jnp.asarray, own.inputs))
            np.testing.assert_allclose(result, want, rtol=1e-4, atol=1e-5)
        row = probe(queued, 200.0, 1.0, 0.1, 1)
        assert row["attainment"] == 1 and row["lanes_a_bundle"] == 1
    with pytest.raises(CannotRun, match="outputs of t0 differ"):
        with slo_torch.queue_of(owned, None, -1.0, 0.01, "cpu"):
            raise AssertionError("it computes something else")
