"""Launches of a trace are told apart by program and by round. What a GPU really traces is not needed for that."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp

from experiments import profiler
from experiments.profiler import gaps, Launch, Line, lines, rounds_of, span, split, total

PAUSE_US = profiler.PAUSE_S * 1e6


def test_launches_of_a_trace():
    def event(name: str, start: int) -> Any:
        return SimpleNamespace(name=name, start_ns=start, duration_ns=500)

    stream = SimpleNamespace(name="Stream #13(Compute)", events=[event("a", 2000), event("b", 3000)])
    other = SimpleNamespace(name="XLA Ops", events=[event("a", 2000)])
    planes = [
        SimpleNamespace(name="/host:CPU", lines=[stream]),
        SimpleNamespace(name="/device:GPU:0", lines=[stream, other]),
    ]
    found = list(profiler.launches(SimpleNamespace(planes=planes)))
    assert found == [Launch("a", 2.0, 0.5), Launch("b", 3.0, 0.5)]
    assert total(found) == 1.0 and span(found) == 1.5
    assert lines([*found, Launch("a", 9.0, 1.5)], 2) == [Line("a", 1.0, 1.0), Line("b", 0.5, 0.25)]


def test_gaps_are_where_no_launch_runs():
    launches = [Launch("a", 5.0, 4.0), Launch("b", 6.0, 1.0), Launch("c", 9.0, 1.0), Launch("d", 12.0, 1.0)]
    assert gaps(launches) == [Line("d", 1, 2.0)] and gaps([]) == []


def test_programs_are_parted_by_pauses():
    one = [Launch("a", 0.0, 5.0), Launch("b", 1.0, PAUSE_US)]  # b runs long after the start of what follows
    two = [Launch("c", 2 * PAUSE_US, 5.0), Launch("c", 2 * PAUSE_US + 7, 5.0)]
    assert split([*one, *two]) == [one, two] and split([]) == []


def test_rounds_of_programs(monkeypatch):
    """Programs that a trace does not tell apart have one each."""
    one = [Launch("a", float(i), 0.5) for i in range(4)]
    two = [Launch("b", 9 * PAUSE_US + i, 0.5) for i in range(2)]
    traces = iter([[*one, *two], [*one[:3], *two], one, two, one, one[:3], []])

    class Traced:
        def __enter__(self) -> list[Launch]:
            return next(traces)

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(profiler, "traced", Traced)
    monkeypatch.setattr(profiler.time, "sleep", lambda seconds: None)
    calls: list[int] = []

    def run(i: int) -> Any:
        calls.append(i)
        return jnp.zeros(1)

    right = [[one[:2], one[2:]], [two[:1], two[1:]]]
    assert rounds_of([run, run], 2) == right and calls == [0, 1, 2] * 2 + [0, 1] * 2
    assert rounds_of([run, run], 2) == right
    assert rounds_of([run, run], 2) == [[], []]


def test_a_trace_without_a_gpu_has_no_launches():
    with profiler.traced() as launches:
        jnp.zeros(3).block_until_ready()
    assert launches == []
