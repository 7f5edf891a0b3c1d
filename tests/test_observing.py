"""What watches the runtime says what happened, on a device without JAX."""

import csv
import json
import logging
import threading
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from coalesce.errors import DeadlineExceeded, TenantFailure
from coalesce.observing import recording
from coalesce.observing.aside import Aside
from coalesce.observing.metrics import Metrics
from coalesce.observing.overlay import ANNOTATION, APART, main as lay_over, overlay, shift
from coalesce.observing.predictions import Predictions
from coalesce.observing.recording import Recording
from coalesce.observing.spans import Spans
from coalesce.observing.trace import DEVICE, DRIVER, REQUESTS, Trace
from coalesce.runtime.health import Health
from coalesce.runtime.observer import Observer
from coalesce.runtime.orders import Order
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Reason
from coalesce.scheduler.events import Event, TenantRemoved, Timer
from coalesce.scheduler.replay import replay
from coalesce.scheduler.run import Decision
from tests.fake_machine import FakeMachine, Served

pytestmark = pytest.mark.once


def serve_some(*observers: Observer) -> Served:
    """Sixteen requests that share bundles, one that fails alone, one that is cancelled and one that is refused."""
    machine = FakeMachine(raises=lambda value: value == "bad")
    machine.go.clear()
    with Served(machine, observers=observers) as served:
        first = served.submit("t0", "first")
        while not machine.launches:
            threading.Event().wait(0.001)
        replies = [served.submit(f"t{i % 4}", i) for i in range(15)]
        bad, refused = served.submit("t3", "bad"), served.submit("nobody", "x")
        cancelled = served.submit("t1", "never")
        assert cancelled.cancel()
        machine.go.set()
        for reply in [first, *replies]:
            reply.result(10)
        with pytest.raises(TenantFailure):
            bad.result(10)
        assert refused.exception(10) is not None and served.driver.book.wait_empty(10.0)
    return served


# ---- metrics -------------------------------------------------------------------------------------------------------


def samples(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """By name, then by the values of the labels, which stand in alphabetical order of their names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_metrics_say_what_the_accounts_say():
    metrics = Metrics()
    served = serve_some(metrics)
    got, stats = samples(metrics.text()), served.accounts.stats()
    for name, own in stats.tenants.items():
        assert got["coalesce_requests_submitted_total"][name,] == own.submitted
        assert got["coalesce_requests_total"]["ok", name] == own.ok
        assert got["coalesce_request_latency_seconds_count"][name,] == own.ok
        assert got["coalesce_request_latency_seconds_bucket"]["+Inf", name] == own.ok
        assert got["coalesce_device_seconds_total"][name,] == pytest.approx(own.device_s)
        assert got["coalesce_padding_seconds_total"][name,] == pytest.approx(own.padding_s)
        assert got["coalesce_requests_waiting"][name,] == 0 == got["coalesce_requests_running"][name,]
    assert got["coalesce_requests_total"]["failed", "t3"] == 1 == got["coalesce_requests_total"]["cancelled", "t1"]
    assert not any("nobody" in labels for own in got.values() for labels in own)
    assert sum(got["coalesce_bundles_total"].values()) == stats.bundles
    assert sum(n * int(lanes) for (_, lanes, _), n in got["coalesce_bundles_total"].items()) == stats.lanes
    assert got["coalesce_bundles_failed_total"]["0",] >= 1
    assert got["coalesce_device_busy_seconds_total"]["0",] == pytest.approx(stats.device_s)
    good = stats.bundles - got["coalesce_bundles_failed_total"]["0",]
    assert got["coalesce_bundle_actual_to_predicted_ratio_count"]["0",] == good
    assert got["coalesce_executables"] == {("0", str(width)): 1 for width in (1, 2, 4, 8)}


def test_metrics_know_who_waits_and_who_runs():
    machine, metrics = FakeMachine(), Metrics()
    machine.go.clear()
    with Served(machine, observers=[metrics]) as served:
        served.submit("t0", 0)
        while not machine.launches:
            threading.Event().wait(0.001)
        seen: dict[str, Any] = {}
        replies = [served.submit("t1", i) for i in range(40)]
        while sum(seen.get("coalesce_requests_submitted_total", {}).values()) < 41 or len(machine.launches) < 2:
            seen = samples(metrics.text())
        seen = samples(metrics.text())
        running = sum(seen["coalesce_requests_running"].values())
        assert running == sum(map(len, machine.launches))
        assert running + sum(seen["coalesce_requests_waiting"].values()) == 41
        machine.go.set()
        replies[-1].result(10)


def test_metrics_forget_a_tenant_when_its_last_request_has_ended():
    machine, metrics = FakeMachine(), Metrics()
    machine.go.clear()
    with Served(machine, observers=[metrics]) as served:
        replies = [served.submit("t2", i) for i in range(20)]
        served.driver.inbox.put(TenantRemoved("t2", drain=True))
        while "t2" not in metrics._tenants or not metrics._tenants["t2"].leaving:
            threading.Event().wait(0.001)
        assert "t2" in metrics.text()
        machine.go.set()
        assert all(reply.result(10) for reply in replies) and served.driver.book.wait_empty(10.0)
    assert 't2"' not in metrics.text() and 't1"' in metrics.text()
    assert metrics._owners == {}


def test_metrics_are_of_one_runtime_and_nothing_is_global():
    one, other = Metrics(), Metrics()
    serve_some(one)
    assert samples(other.text())["coalesce_bundles_failed_total"] == {("0",): 0}
    assert "coalesce_requests_submitted" not in str(list(REGISTRY.collect()))


def test_metrics_over_http_show_the_health_too():
    metrics = Metrics()
    metrics.watch(lambda: Health("failed", "a reason", 3, 0, 7, 2, {"family 0 x4": "why"}, 1024))
    port, stop = metrics.serve(0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        got = samples(answer.read().decode())
    stop()
    assert got["coalesce_serving"][()] == 0 and got["coalesce_weight_bytes"][()] == 1024
    assert got["coalesce_executables_compiling"][()] == 2 and got["coalesce_executables_failed"][()] == 1


# ---- spans ---------------------------------------------------------------------------------------------------------


def exported(*, within: str | None = None) -> list[Any]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    with Spans(provider) as spans:
        if within is None:
            serve_some(spans)
        else:
            with Served(FakeMachine(), observers=[spans]) as served, tracer.start_as_current_span(within):
                served.submit("t0", 1).result(10)
                assert served.driver.book.wait_empty(10.0)
    assert spans.dropped == 0
    return list(exporter.get_finished_spans())


def test_a_span_for_each_request_with_its_bundles_below_it():
    spans = exported()
    requests = [s for s in spans if s.name == "coalesce.request"]
    bundles = [s for s in spans if s.name == "coalesce.bundle"]
    assert len(requests) == 19 and len(bundles) + len(requests) == len(spans)
    outcomes = [s.attributes["coalesce.outcome"] for s in requests]
    assert {o: outcomes.count(o) for o in outcomes} == {"ok": 16, "failed": 1, "cancelled": 1, "unknown_tenant": 1}
    for span in requests:
        own = [b for b in bundles if b.parent.span_id == span.context.span_id]
        assert all(span.start_time <= b.start_time <= b.end_time <= span.end_time for b in own)
        outcome = span.attributes["coalesce.outcome"]
        broken = [b.status.status_code is StatusCode.ERROR for b in own]
        assert (not own) == (outcome in ("cancelled", "unknown_tenant"))
        assert all(broken[:-1]) and (not own or broken[-1] == (outcome != "ok"))
        assert outcome != "failed" or own[-1].status.description == "ValueError: cannot compute 'bad'"
        assert (span.status.status_code is StatusCode.ERROR) == (outcome in ("failed", "unknown_tenant"))
        assert span.parent is None
    assert max(b.attributes["coalesce.lanes"] for b in bundles) > 1


def test_the_callers_span_is_the_parent():
    spans = {s.name: s for s in exported(within="handle")}
    assert spans["coalesce.request"].parent.span_id == spans["handle"].context.span_id
    assert spans["coalesce.bundle"].context.trace_id == spans["handle"].context.trace_id


# ---- traces --------------------------------------------------------------------------------------------------------


def test_a_trace_has_every_decision_bundle_lane_and_deadline(tmp_path: Path):
    trace = Trace()
    served = serve_some(trace)
    trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    stats = served.accounts.stats()
    for event in events:
        assert event["ph"] in "MXbne" and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
    bundles = [e for e in events if (e["pid"], e["tid"], e["ph"]) == (DEVICE, 1, "X")]
    lanes = [e for e in events if e["pid"] == DEVICE and e["tid"] > 1 and e["ph"] == "X"]
    assert len(bundles) == stats.bundles and len(lanes) == stats.lanes
    assert sum(e["args"]["lanes"] for e in bundles) == len(lanes)
    for track in {e["tid"] for e in events if e["pid"] == DEVICE and e["ph"] == "X"}:  # nothing overlaps on a track
        own = [e for e in events if (e["pid"], e["tid"], e["ph"]) == (DEVICE, track, "X")]
        times = sorted((round(e["ts"] * 1e3), round((e["ts"] + e["dur"]) * 1e3)) for e in own)
        assert all(end <= start for (_, end), (start, _) in zip(times, times[1:], strict=False))
    told = [bundle for e in events if e["pid"] == DRIVER and e["ph"] == "X" for bundle in e["args"]["bundles"]]
    assert told == sorted(e["args"]["bundle"] for e in bundles)
    requests = {ph: [e["id"] for e in events if e["pid"] == REQUESTS and e["ph"] == ph] for ph in "bne"}
    assert sorted(requests["b"]) == sorted(requests["e"]) == sorted(requests["n"]) == list(range(19))
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert {"decisions", "bundles", "lane 0", "t0", "t3"} <= names


def test_a_trace_keeps_what_was_last():
    trace = Trace(most=10)
    serve_some(trace)
    assert sum(e["ph"] in "Xb" for e in trace.events()) >= 10 and len(trace._seen) == 10


def test_the_profilers_times_move_to_the_runtimes():
    trace = Trace()
    serve_some(trace)
    ours = trace.events()
    ticks = [e for e in ours if e["pid"] == DRIVER and e["ph"] == "X" and e["args"]["bundles"]]
    profile: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "host"}}]
    for delay_us, e in enumerate(ticks, 3):  # the profiler's clock is 5,000 us ahead; the driver takes 3 us and more
        at = e["ts"] + e["dur"] + 5000 + delay_us
        for bundle in map(str, e["args"]["bundles"]):
            begun = {"ph": "X", "pid": 7, "tid": 1, "ts": at, "dur": 9.0}
            profile.append({**begun, "name": ANNOTATION, "args": {"bundle": bundle}})
    assert shift(ours, profile) == pytest.approx(-5003)
    both = overlay(ours, profile)
    moved = [e for e in both if e["pid"] == 7 + APART]
    assert len(moved) == len(profile) and len(both) == len(ours) + len(profile)
    assert moved[1]["ts"] == pytest.approx(ticks[0]["ts"] + ticks[0]["dur"])
    with pytest.raises(ValueError, match="none is the same"):
        shift(ours, profile[:1])


# ---- predictions ---------------------------------------------------------------------------------------------------


def test_predictions_are_beside_what_came(tmp_path: Path):
    with Predictions(tmp_path / "p.csv") as as_csv, Predictions(tmp_path / "p.jsonl") as as_lines:
        stats = serve_some(as_csv, as_lines).accounts.stats()
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == stats.bundles
    assert [row["bundle"] for row in rows] == [str(line["bundle"]) for line in lines]
    assert sum(line["actual_us"] for line in lines) == pytest.approx(stats.device_s * 1e6)
    assert all(0 < line["expected_us"] <= line["expected_at_most_us"] for line in lines)
    assert any(line["failed"] for line in lines) and {line["executable"] for line in lines} <= {
        f"family 0 x{width}" for width in (1, 2, 4, 8)
    }


# ---- recordings ----------------------------------------------------------------------------------------------------


def test_a_recording_replays_to_the_same_commands(tmp_path: Path, capsys):
    decisions: list[Decision] = []

    class Keeps(Observer):
        def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
            decisions.append(Decision(event, now_ns, tuple(commands)))

    with Recording(tmp_path / "log.jsonl") as log, Served(FakeMachine(), observers=[log, Keeps()]) as served:
        replies = [served.submit(f"t{i % 4}", i) for i in range(40)]
        wait(replies, 10)
    assert recording.load(tmp_path / "log.jsonl") == decisions and len(decisions) > 10
    assert recording.main([str(tmp_path / "log.jsonl")]) == 0
    assert "0 violations" in capsys.readouterr().out
    assert recording.main([str(tmp_path / "log.jsonl"), "--policy=fifo"]) == 1
    assert "fifo decides otherwise: decision " in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "", "no log", "{}", '{"traceEvents": [1]}'])
def test_what_is_no_log_or_trace_is_told_in_a_line(tmp_path: Path, capsys, text: str | None):
    path = tmp_path / "file"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        recording.main([str(path)])
    with pytest.raises(SystemExit):
        lay_over([str(path), str(tmp_path), str(tmp_path / "both.json")])
    told = capsys.readouterr().err
    assert f"{path} is no log: " in told and "there is nothing to lay over each other: " in told
    assert not (tmp_path / "both.json").exists()


def test_a_recording_that_lacks_something_says_so(tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING), Recording(tmp_path / "log.jsonl", most=0) as log:
        serve_some(log)
    assert "cannot be replayed" in caplog.text and (tmp_path / "log.jsonl").read_text() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without a disk that is always full")
def test_what_a_full_disk_did_not_take_is_counted_and_said_once(caplog):
    with Recording("/dev/full") as log, Predictions("/dev/full") as predictions:
        stats = serve_some(predictions).accounts.stats()
        for i in range(200):
            log.decided(Timer(), i, ())
    assert (log.dropped, predictions.dropped) == (200, stats.bundles)
    assert Counter(record.levelname for record in caplog.records) == {"ERROR": 2, "WARNING": 2}
    assert "No space left" in caplog.text and "lacks 200 decisions" in caplog.text and "be replayed" in caplog.text


# ---- several devices -----------------------------------------------------------------------------------------------


def test_devices_are_told_apart(tmp_path: Path):
    metrics, trace = Metrics(), Trace()
    with Recording(tmp_path / "log.jsonl") as log, Predictions(tmp_path / "p.csv") as predictions:
        for device in range(2):
            serve_some(*(watcher.on(device) for watcher in (metrics, trace, log, predictions)))
    got = samples(metrics.text())
    for device in "01":
        assert got["coalesce_bundles_failed_total"][device,] >= 1
        assert got["coalesce_executables"][device, "8"] == 1
    names = {e["args"]["name"] for e in trace.events() if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {"coalesce requests"} | {f"coalesce {what} {d}" for what in ("driver", "device") for d in range(2)}
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert {row["device"] for row in rows} == {"0", "1"}
    for name in ("log.jsonl", "log.device1.jsonl"):
        assert replay(recording.load(tmp_path / name), Coalescing()) is None


# ---- what takes a while --------------------------------------------------------------------------------------------


class Slow(Aside):
    def __init__(self, most: int) -> None:
        self.go, self.got = threading.Event(), []
        super().__init__(most)

    def handle(self, item: int) -> None:
        self.go.wait(10)
        if item in (1, 3):
            raise ValueError("one") if item == 1 else SystemExit
        self.got.append(item)

    def finish(self) -> None:
        self.got.append("end")


def test_what_is_put_aside_is_handled_in_order_and_once(caplog):
    slow = Slow(most=1000)
    with caplog.at_level(logging.WARNING):
        for i in range(5):
            slow.put(i)
        slow.go.set()
        slow.flush()
        assert slow.got == [0, 2, 4]
        slow.close()
        slow.close()
    assert slow.got == [0, 2, 4, "end"] and slow.dropped == 2
    assert caplog.text.count("could not take what it was told") == 1
    assert "Slow lacks 2 of what it was told" in caplog.text


def test_a_writer_that_is_too_slow_drops_and_counts_and_never_blocks():
    slow = Slow(most=3)
    for i in range(2, 100):
        slow.put(i)
    assert slow.dropped >= 98 - 4
    slow.go.set()
    slow.close()
    assert len(slow.got) + slow.dropped == 98 + 1


def test_callers_threads_tell_of_requests_only_who_listens():
    seen: list[tuple[int, str]] = []

    class Listens(Observer):
        def sent(self, ticket: Ticket) -> None:
            seen.append((ticket.request.id, threading.current_thread().name))

    with Served(FakeMachine(), observers=[Listens(), Observer()]) as served:
        served.submit("t0", 1).result(10)
    assert seen == [(0, threading.current_thread().name)]


def test_who_refuses_several_at_once_tells_so_and_others_one_by_one():
    alone: list[tuple[int, Reason]] = []
    together: list[list[tuple[int, Reason]]] = []

    class Alone(Observer):
        def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
            alone.append((ticket.request.id, reason))

    class Together(Alone):
        def rejected_together(self, stopped: Mapping[Ticket, Reason], now_ns: int) -> None:
            together.append([(ticket.request.id, reason) for ticket, reason in stopped.items()])

    go = threading.Event()
    with Served(FakeMachine(), observers=[Alone(), Together()]) as served:
        served.driver.inbox.put(Order(lambda: () if go.wait(10) else ()))
        replies = [served.submit(f"t{i}", i, deadline_s=-1.0) for i in range(3)]
        go.set()
        assert [type(reply.exception(10)) for reply in replies] == [DeadlineExceeded] * 3
        assert served.driver.book.wait_empty(5.0)
        rejected = [own.rejected for own in served.accounts.stats().tenants.values()]
        outcomes = [own.outcome for own in served.history.requests()]
    assert alone == [(i, Reason.EXPIRED) for i in range(3)] and together == [alone]
    assert sum(own.get(Reason.EXPIRED, 0) for own in rejected) == 3
    assert outcomes == ["its deadline had passed before submit"] * 3
