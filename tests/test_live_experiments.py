"""The experiments that serve run, from their command line to their files; no test looks at a time."""

import json
import time
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from absl import flags

from coalesce.errors import DeadlineExceeded, DeviceError
from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Dispatch, WakeAt
from coalesce.scheduler.events import CatalogChanged, Completed, Event, Submitted, TenantAdded
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.run import Decision
from experiments import (
    configurations,
    isolation,
    live,
    own_flags,
    serve_demo,
    sim_vs_real,
    sim_vs_real_follow,
    sim_vs_real_slices,
)

TINY = "mlp.width=8;layers=2"


def saved(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    assert path.with_suffix(".md").exists()
    return json.loads(path.read_text())


@pytest.mark.once  # what it serves with is tested on both interpreters
def test_serve_demo_shows_every_tenant(capsys, tmp_path):
    arguments = [f"--tenants={TINY}:2:500,{TINY};width=4:1:500", "--duration=0.5", "--rate=40", "--widths=1,2"]
    serve_demo.main([*arguments, "--process=gamma", "--cv=2", f"--trace={tmp_path / 'trace.json'}"])
    shown = capsys.readouterr().out
    assert all(f"mlp-{i}" in shown for i in range(3)) and "in time" in shown
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 20


@pytest.mark.once  # what it serves with is tested on both interpreters
def test_isolation_has_a_row_for_each_number_and_method(tmp_path, capsys):
    tiny = ["--fields=width=8,layers=2", "--duration=0.1", f"--out={tmp_path}", "--most_processes=1"]
    isolation.main([*tiny, "--tenants=1,2", "--methods=fifo", "--budget_s=0"])
    first = saved(tmp_path)["rows"]
    assert [(row["tenants"], row["method"]) for row in first] == [(1, "fifo")]
    isolation.main([*tiny, "--tenants=1,2", "--methods=fifo,coalescing", "--budget_s=600"])
    isolation.main([*tiny, "--tenants=2", "--methods=processes,processes_mps"])
    rows = {(row["tenants"], row["method"]): row for row in saved(tmp_path)["rows"]}
    assert list(rows) == [(1, "coalescing"), (1, "fifo"), *((2, method) for method in isolation.METHODS)]
    assert rows[1, "fifo"] == first[0]
    for (tenants, method), row in rows.items():
        if method in ("coalescing", "fifo"):
            assert row["requests"] >= tenants and 0 < row["p10_ms"] <= row["p99_ms"]
    assert "left out above 1" in rows[2, "processes"]["failed"] and rows[2, "processes_mps"]["failed"]
    assert "| 2       | coalescing |" in capsys.readouterr().out


@pytest.mark.once
def test_a_loop_that_gets_no_result_ends_with_the_reason():
    refused = Future[Any]()
    refused.set_exception(DeadlineExceeded("too much"))
    rt: Any = SimpleNamespace(submit=lambda *_: refused)
    lives: Any = [SimpleNamespace(name=name, inputs=()) for name in "ab"]
    with pytest.raises(DeadlineExceeded):
        isolation.closed_loop(rt, lives, 600.0)


@pytest.mark.once  # what it serves with is tested on both interpreters
def test_the_simulator_gets_what_the_real_runtime_got(tmp_path, monkeypatch):
    monkeypatch.setitem(configurations.MODELS, "cpu", (("mlp", {"width": 8, "layers": 2}),))
    monkeypatch.setattr(sim_vs_real_slices, "WIDTHS", (1, 2))
    monkeypatch.setattr(sim_vs_real_slices, "ALONE", 3)
    monkeypatch.setattr(sim_vs_real, "LEAST_ALONE_S", 0.02)  # no host is too slow for that
    quick = ["--duration=0.4", "--slices=1", f"--out={tmp_path}"]
    sim_vs_real.main([*quick, "--configurations=12"])
    sim_vs_real.main([*quick, "--configurations=12"])  # it is there
    sim_vs_real.main([*quick, "--configurations=12,13", "--budget_s=0"])
    with pytest.raises(SystemExit, match=r"other settings; --out"):
        sim_vs_real.main([*quick, "--configurations=12", "--seed=1"])
    (row,) = saved(tmp_path)["rows"]
    assert row["requests"] > 0 and 0 <= row["real"] <= 1 and 0 <= row["simulated"] <= 1
    assert row["points"] == pytest.approx(100 * (row["simulated"] - row["real"]), abs=1e-2)
    assert row["chance"] == pytest.approx(abs(row["again"]) / 2, abs=1e-2)  # of one slice


@pytest.mark.parametrize("wrong", ["foo", "20", "-1", "1,,2"])
def test_configurations_that_there_are_not_are_refused(tmp_path, wrong):
    with pytest.raises(SystemExit, match="numbered from 0 to 19"):
        sim_vs_real.main([f"--configurations={wrong}", f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("models", configurations.MODELS.values(), ids=configurations.MODELS)
def test_configurations_are_twenty_that_differ(models):
    drawn = configurations.draw_configurations(models, 20, 0, 3)
    assert len({str(own[1:]) for own in drawn}) == 20
    assert drawn == configurations.draw_configurations(models, 20, 0, 3)
    assert drawn != configurations.draw_configurations(models, 20, 1, 3)
    fewer = configurations.draw_configurations(models, 20, 0, 2)
    assert fewer == [own._replace(segments=min(own.segments, 2)) for own in drawn] != drawn


def test_arrivals_of_a_run_are_those_of_the_next():
    requests = [Request(1, "b", 3, 900, 1000), Request(0, "a", 2, 700, 1000)]
    first, second = sim_vs_real.again(requests, 600)
    assert (first.time_ns, first.tenant, first.allowed_ns, first.family) == (100, "a", 300, 2)
    assert (second.time_ns, second.tenant, second.allowed_ns, second.family) == (300, "b", 100, 3)


@pytest.mark.parametrize("before", [0, 7])  # bundles of others
def test_a_policy_goes_on_after_a_log_as_if_it_were_one(before):
    catalog = Catalog(tuple(Executable(i, (Entry(0, 0, 2**i),), 100, 200) for i in range(2)))
    tenant = Tenant("a", (0,), 10_000)

    def arrived(number: int, time_ns: int) -> Submitted:
        return Submitted((Request(number, "a", 0, time_ns, time_ns + 10_000),))

    told: list[tuple[Event, int]] = [(CatalogChanged(catalog), 0), (TenantAdded(tenant), 0), (arrived(0, 10), 10),
                                     (Completed(0, 10, 110), 120), (arrived(1, 500), 500)]  # fmt: skip
    whole = Coalescing()
    answers = [tuple(whole.on_event(event, now_ns)) for event, now_ns in told]
    log = [
        Decision(
            event._replace(bundle=event.bundle + before) if isinstance(event, Completed) else event,
            now_ns,
            [c._replace(bundle=c.bundle + before) if isinstance(c, Dispatch) else c for c in answer],
        )
        for (event, now_ns), answer in zip(told, answers, strict=True)
    ]
    following = sim_vs_real_follow.Following(log)
    following.later(100)
    moved = [c._replace(time_ns=c.time_ns - 500) if isinstance(c, WakeAt) else c for c in answers[-1]]
    for later in following.later(500), following.later(500):  # neither knows of the other
        assert list(later.on_event(arrived(1, 0), 0)) == moved and moved


@pytest.fixture
def loadgen() -> Any:
    pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen has no wheel for this interpreter")
    from experiments import loadgen

    return loadgen


@pytest.mark.once  # what it serves with is tested on both interpreters
def test_loadgen_says_what_it_thinks(loadgen, tmp_path):
    loadgen.main([f"--tenants={TINY}:2", "--rate=800", "--latency_ms=60000", "--duration=0.5", "--queries=700",
                  f"--out={tmp_path}"])  # fmt: skip
    (row,) = saved(tmp_path)["rows"]
    assert row["result"] == "VALID" and row["because"] == []
    assert row["queries"] >= 700 and row["wrong"] == 0
    assert "mlperf_log" not in str(list(tmp_path.iterdir()))


def test_loadgen_has_an_answer_to_whatever_ends(loadgen, monkeypatch):
    """Else it would wait for ever. What is refused is sent again, after it was told of the others."""
    told, asked = [], []
    monkeypatch.setattr(loadgen.mlperf_loadgen, "QuerySamplesComplete", lambda own: told.append([r.id for r in own]))
    ends = {0: np.ones(3, np.float32), 1: DeadlineExceeded("late"), 2: DeviceError("gone"), 3: np.array([np.nan])}

    def submit(name: str, deadline: float | None) -> Future[Any]:
        asked.append((name, deadline))
        if deadline is not None:
            raise DeviceError("the device has gone")
        reply, end = Future[Any](), ends[int(name)]
        reply.set_exception(end) if isinstance(end, Exception) else reply.set_result(end)
        return reply

    lives = [SimpleNamespace(name=str(i), inputs=()) for i in ends]
    served = loadgen.Served(SimpleNamespace(submit=submit), lives)
    served.issue([SimpleNamespace(id=10 + i, index=i) for i in ends])
    while sum(map(len, told)) < len(ends):
        time.sleep(1e-3)
    served.close()
    assert sorted(chain.from_iterable(told)) == [10, 11, 12, 13] and told[-1] == [11]
    assert asked[-1] == ("1", loadgen.LATER_S) and (served.refused, served.wrong) == (1, 1)
    assert [str(e) for e in served.failures] == ["gone", "the device has gone"]


def test_loadgens_summary_is_read(loadgen):
    text = "Result is : VALID\n  Performance constraints satisfied : Yes\n99.00 percentile latency (ns)   : 123\n"
    assert loadgen.read_summary(text) == {
        "Result is": "VALID",
        "Performance constraints satisfied": "Yes",
        "99.00 percentile latency (ns)": "123",
    }


def test_kinds_of_tenants_are_read():
    kind = live.read_kind("mlp.width=8;layers=2:3:12.5")
    assert (kind.count, kind.slo_s, kind.text) == (3, 0.0125, TINY)
    assert [own.name for own in live.tenants([kind, live.read_kind(f"{TINY}:1:5")])] == [f"mlp-{i}" for i in range(4)]
    for wrong in ("mlp", "mlp:1", "mlp:x:5", "nobody:1:5", "mlp.width=:1:5", "mlp.wdth=3:1:5", "mlp:0:5", "mlp:1:0"):
        with pytest.raises(SystemExit, match="MODEL"):
            live.read_kind(wrong)


@pytest.mark.parametrize("process", live.PROCESSES)
def test_processes_have_the_rate_that_was_asked_for(process):
    times, end_ns = live.times_of(process, Random(1), 1000.0, 2.0), 60 * live.SECOND
    count = next(i for i, time_ns in enumerate(times) if time_ns > end_ns)
    assert count == pytest.approx(60_000, rel=0.1)


def test_flags_of_experiments_do_not_meet(capsys):
    own = flags.FlagValues()
    own_flags.define_common(own)
    own_flags.parse("name", own, ["--note=quiet", "--device_name=a device"])
    assert own.note == "quiet" and own_flags.command("name", own) == "python -m experiments.name"
    for wrong in (["--nothing=1"], ["word"]):
        with pytest.raises(SystemExit, match="--help"):
            own_flags.parse("name", own, wrong)
    with pytest.raises(SystemExit):
        own_flags.parse("name", own, ["--help"])
    assert "--note" in capsys.readouterr().out
