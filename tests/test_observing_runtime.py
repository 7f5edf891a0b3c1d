"""What watches the runtime, with real programs on a real device."""

import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.observing import overlay, recording
from coalesce.observing.metrics import Metrics
from coalesce.observing.recording import Recording
from coalesce.observing.trace import Trace
from coalesce.runtime.observer import Observer
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.events import Submitted
from coalesce.scheduler.invariants import check
from coalesce.scheduler.replay import replay

SLO = 30.0  # generous: what is tested here is not time
X = np.ones((1, 4), np.float32)


def scorer(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


@pytest.fixture(scope="module")
def serve() -> Callable[..., Runtime]:
    def make(*observers: Observer) -> Runtime:
        rt = Runtime(widths=(1, 2), observers=observers)
        for i in range(2):
            rt.add_tenant(f"t{i}", scorer, jnp.full((4, 4), 0.1 * i), example=(X,), slo=SLO)
        rt.warm_up(60.0)
        return rt

    return make


def test_a_trace_lies_over_the_profilers(serve, tmp_path: Path):
    trace, metrics = Trace(), Metrics()
    with serve(trace, metrics) as rt:
        metrics.watch(rt.health)
        jax.profiler.start_trace(str(tmp_path / "profile"))
        for i in range(10):
            rt.submit(f"t{i % 2}", X).result(60)
        jax.profiler.stop_trace()
        assert "coalesce_serving 1.0" in metrics.text()
    trace.save(tmp_path / "coalesce.json")
    overlay.main([str(tmp_path / name) for name in ("coalesce.json", "profile", "both.json")])
    events = json.loads((tmp_path / "both.json").read_text())["traceEvents"]
    decided = overlay.dispatches(events)
    begun = overlay.begun(events)
    assert len(begun) == 10 and begun.keys() <= decided.keys()
    assert all(begun[bundle] >= decided[bundle] - 1e-3 for bundle in begun)
    assert min(begun[bundle] - decided[bundle] for bundle in begun) == pytest.approx(0, abs=1e-3)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="stop_trace"):
        overlay.read_profile(tmp_path / "nothing")


def test_a_log_of_the_real_driver_replays_to_the_same_commands(serve, tmp_path: Path):
    with Recording(tmp_path / "log.jsonl") as log, serve(log) as rt:
        replies = [rt.submit(f"t{i % 2}", X, deadline=0.5 * (1 + i % 3)) for i in range(200)]
        replies[50].cancel()
        rt.remove_tenant("t1", drain=False)
        assert wait(replies, 60).not_done == set()
    assert log.dropped == 0
    decisions = recording.load(tmp_path / "log.jsonl")
    assert sum(len(d.event.requests) for d in decisions if isinstance(d.event, Submitted)) == 200
    assert replay(decisions, Coalescing()) is None
    assert check(decisions) == []


def test_the_log_tells_an_operator_what_happened(caplog):
    with caplog.at_level(logging.INFO, "coalesce.runtime"):
        with Runtime(widths=(1, 2)) as rt:
            rt.add_tenant("a", scorer, jnp.ones((4, 4)), example=(X,), slo=SLO)
            rt.warm_up(60.0)
            rt.update_tenant("a", jnp.zeros((4, 4)))
            rt.remove_tenant("a")
    said = [re.sub(r"[\d.]+ ms", "N ms", record.getMessage()) for record in caplog.records]
    assert said[0].startswith("family 0 of tenant 'a': not cut: ")
    assert [text for text in said if text.startswith("tenant 'a'")] == [
        "tenant 'a' is served: family 0, slot 0 of 16",
        "tenant 'a' has other weights",
        "tenant 'a' has left",
    ]
    assert "executable for family 0 x1 is ready: N ms" in said
    assert said[-1] == "the runtime is closed"
