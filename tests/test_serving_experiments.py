"""What slo_attainment, overload and policy_regret do around the simulator: cells, searches, tables."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from absl import app

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.commands import Reason
from coalesce.scheduler.events import CatalogChanged
from coalesce.scheduler.run import Outcome
from experiments import overload, overload_report, policy_regret, slo_report, slo_sweeps
from experiments.policy_instances import random_instance
from experiments.results import header
from experiments.simulated import (
    arrivals_of,
    chosen,
    DEVICE,
    fill,
    highest,
    POLICIES,
    row_of,
    run_policy,
    Setting,
)
from experiments.slo_real import Offered

pytestmark = pytest.mark.once

SMALL = Setting(rate=2000.0, tenants=4)


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_policy_serves_a_light_load_and_no_more_than_the_bound(name):
    light = row_of(name, replace(SMALL, rate=100.0), 100, 1)
    assert light["attainment"] > 0.9
    heavy = row_of(name, replace(SMALL, rate=3 * SMALL.bound), 400, 1)
    assert 0 < heavy["goodput"] <= 1.2 * SMALL.bound
    assert heavy["requests"] == round(heavy["attainment"] * heavy["requests"]) + sum(
        heavy[end] for end in ("late", "refused", "dropped")
    )


def test_policies_of_a_row_see_the_same_arrivals():
    first, again = (list(arrivals_of(SMALL, 200, 7)) for _ in range(2))
    assert first == again and {a.tenant for a in first} == {"t0", "t1", "t2", "t3"}
    assert len(first) == pytest.approx(200, rel=0.3)
    assert list(arrivals_of(SMALL, 200, 8)) != first


def test_tenants_are_dealt_to_programs():
    setting = replace(SMALL, families=2)
    assert [tenant.families for tenant in setting.members] == [(0,), (1,), (0,), (1,)]
    run = run_policy("EDF packing", setting, arrivals_of(setting, 200, 1))
    assert {request.family for request in run.requests} == {0, 1}
    assert set(run.outcomes) <= {Outcome.OK, Outcome.LATE, Outcome.DROPPED}


def test_the_bounds_of_a_setting():
    setting = Setting(slo_scale=5.0, alpha_us=100, beta_us=900, widths=(1, 2, 4, 8, 16, 32))
    assert setting.slo_ns == 5_000_000
    assert setting.bound == pytest.approx(32 / 0.0041)
    assert setting.fused_load == pytest.approx(0.64 * 10_000)
    assert setting.unfused_load == 0 and replace(setting, tenants=1).unfused_load == setting.fused_load


def test_the_highest_value_that_is_good_is_found_within_a_share_of_it():
    tried: list[float] = []
    found = highest(lambda x: tried.append(x) or x <= 370, 10, 10_000, 0.02)
    assert 370 / 1.02 <= found <= 370 and len(tried) < 15
    assert highest(lambda x: False, 10, 100, 0.02) == 0
    assert highest(lambda x: True, 10, 100, 0.02) == 100


def test_policies_are_chosen_by_name_in_our_order():
    assert chosen(["EDF packing", "coalescing"]) == ["coalescing", "EDF packing"]
    assert chosen(None) == list(POLICIES)
    with pytest.raises(app.UsageError, match="there is no policy 'edf'"):
        chosen(["edf"])


def test_rows_that_are_there_are_not_made_again(tmp_path, capsys):
    made: list[str] = []

    def fill_in(wanted: list[str], again: bool = False, size: int = 1) -> list[dict]:
        def measure(cell: str) -> dict:
            made.append(cell)
            return {"cell": cell, "number": len(made)}

        head = header("command", DEVICE, size=size)
        return fill(tmp_path / "x.json", head, wanted, ["a", "b", "c"], lambda row: row["cell"], measure, again)

    fill_in(["c"])
    rows = fill_in(["a", "c"])
    assert made == ["c", "a"] and [row["cell"] for row in rows] == ["a", "c"]
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == rows
    assert fill_in(["a"], again=True) == [{"cell": "a", "number": 3}, {"cell": "c", "number": 1}]
    for wanted, again in ((["a", "b", "c"], False), (["a"], True)):  # what is kept was not measured alike
        with pytest.raises(SystemExit, match="x.json was measured with other settings; --force .*, of all policies"):
            fill_in(wanted, again, size=2)
    assert [row["number"] for row in fill_in(["a", "b", "c"], again=True, size=2)] == [4, 5, 6]


def test_a_search_ends_at_the_line():
    found = slo_sweeps.search("FIFO, one by one", SMALL, 100, 1)
    rate = found["rate"]
    assert 0.05 * 1015 < rate < 1015  # one by one, nothing is faster than one run after another
    at, above = (row_of("FIFO, one by one", replace(SMALL, rate=r), 100, 1)["attainment"] for r in (rate, 2 * rate))
    assert at >= 0.99 > above


def test_slo_attainment_reports_every_sweep(tmp_path):
    names = ["EDF packing", "EDF, one by one"]
    wanted = [cell for cell in slo_sweeps.cells(names) if cell[2] in (0.5, 2.0, 2, 0)]
    rows = [slo_sweeps.measure(cell, 30, 1) for cell in wanted]
    assert [slo_sweeps.cell_of(row) for row in rows] == wanted
    text = slo_report.report(header("the command", DEVICE, requests=100), json.loads(json.dumps(rows)))
    assert "## The rate at which 99% of the requests are in time" in text
    assert all(f"## Share in time by {title}" in text for title in slo_report.TITLES.values())
    assert "| tenants | programs |" in text and "4,420 (50% of the bound)" in text
    assert "plot" in slo_report.plot(tmp_path / "plot.png", rows)


def test_a_burst_is_on_top_of_what_comes_anyway():
    setting = replace(overload.USUAL, rate=1000.0)
    times = [a.time_ns for a in overload.burst_arrivals(setting, 100, 1)]
    assert times == sorted(times)
    inside = sum(5e8 <= t < 6e8 for t in times)
    assert inside == pytest.approx(1000, rel=0.2) and len(times) - inside == pytest.approx(1900, rel=0.1)


def test_recovery_counts_from_the_end_of_the_burst():
    good, bad = (100, 100), (90, 100)
    bins = [good] * 4 + [bad] * 3 + [good] * 73
    assert overload.recovered_after(bins, 125) == 50
    assert overload.recovered_after([good] * 80, 110) == 15
    assert overload.recovered_after([bad] * 80, 100) is None
    assert overload.recovered_after(bins[:-1] + [bad], 125) == 50  # one bin of many is chance
    assert overload.recovered_after([good] * 40 + [bad] * 40, 125) is None


def test_overload_reports_goodput_and_recovery(tmp_path):
    names = ["coalescing", "EDF packing"]
    cells = [("offered", name, 300.0) for name in names] + [
        ("any width", "EDF packing", 2000.0),
        ("burst", "EDF packing", 60.0),
    ]
    slow = replace(overload.USUAL, alpha_us=5_000.0, beta_us=10_000.0, slo_scale=10.0, widths=(1, 2, 4, 8, 16))
    rows = [overload.measure(cell, 0.1, 1, slow) for cell in cells]
    assert [overload.cell_of(row) for row in rows] == cells
    text = overload_report.report(header("the command", DEVICE), rows, slow)
    assert "178 requests a second" in text and "| 300 " in text and "for 60 ms, at 75% of the bound" in text
    assert "nearly any width" in text and "| 2,000 " in text
    assert "plot" in overload_report.plot(tmp_path / "plot.png", rows, slow)


def test_the_capacity_that_overload_is_held_against():
    assert overload.USUAL.bound == pytest.approx(19_200) and overload.USUAL.slo_ns == 25_000_000


def test_a_twentieth_of_the_optimum_is_lost_at_most():
    """Of the instances whose optimum is committed, which takes long to find and never changes."""
    path = Path(policy_regret.__file__).parent / "results" / "policy_regret" / "policy_regret.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 200
    lost = [1 - policy_regret.serve("coalescing", random_instance(row["seed"])) / row["optimum"] for row in rows]
    assert 0 < mean(lost) <= 0.05


def test_regret_is_the_share_of_the_optimum_that_is_lost(tmp_path):
    rows = [policy_regret.measure(seed, 10.0) for seed in (1, 4)]
    for row in rows:
        assert all(0 <= policy_regret.regret(row, name) <= 1 for name in (*POLICIES, policy_regret.BEST))
        assert policy_regret.regret(row, policy_regret.BEST) == min(policy_regret.regret(row, n) for n in POLICIES)
    text = policy_regret.report(header("the command", DEVICE), rows)
    assert "Seed 4: of 11 requests 11 can be in time; coalescing" in text and "t0@" in text
    assert "plot" in policy_regret.plot(tmp_path / "plot.png", rows)
    half = {**rows[0], **dict.fromkeys(POLICIES, 1), "optimum": 2}
    assert policy_regret.regret(half, "coalescing") == 0.5
    assert policy_regret.regret({**half, "optimum": 0}, "coalescing") == 0


def test_reasons_of_baselines_are_those_of_requests_that_came_too_late():
    run = run_policy("EDF, one by one", replace(SMALL, rate=5000.0), arrivals_of(replace(SMALL, rate=5000.0), 200, 1))
    assert set(run.reasons.values()) <= {Reason.INFEASIBLE, Reason.EXPIRED}


def test_a_width_counts_that_all_segments_of_a_program_have():
    offered = Offered()
    forms = [(0, 0, 1, 10), (0, 1, 1, 20), (0, 0, 4, 30), (7, 0, 2, 5)]
    made = tuple(Executable(i, (Entry(f, s, w),), ns, 9 * ns) for i, (f, s, w, ns) in enumerate(forms))
    mixed = Executable(9, (Entry(0, 0, 1), Entry(7, 0, 2)), 12, 13)
    offered.decided(CatalogChanged(Catalog((*made, mixed), {0: 2})), 0, [])
    assert offered.times() == [{1: 30}, {2: 5}]
