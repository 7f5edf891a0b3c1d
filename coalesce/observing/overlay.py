"""One trace of the runtime and of jax.profiler, on one clock.

    jax.profiler.start_trace("profile")
    ...                                                    # serve, with a Trace among the observers
    jax.profiler.stop_trace()
    trace.save("coalesce.json")

    python -m coalesce.observing.overlay coalesce.json profile both.json

The profiler counts from its own start. Both know every bundle: the runtime when it decided to dispatch it, the profiler
where the dispatch began, by an annotation with the bundle's number. The second follows the first at once, so the
smallest difference over all bundles is that of the clocks, but for some microseconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ANNOTATION = "coalesce bundle"  # as in coalesce/runtime/device.py, which would bring JAX along
APART = 1000  # added to the profiler's processes, so that they are not taken for the runtime's


def read_profile(path: str | Path) -> list[dict[str, Any]]:
    """The events of the newest trace in a folder that was given to jax.profiler, or of one file."""
    found = Path(path)
    if found.is_dir():
        files = sorted(found.rglob("*.trace.json.gz"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        if not files:
            raise FileNotFoundError(f"{path} holds no *.trace.json.gz; did jax.profiler.stop_trace() run?")
        found = files[-1]
    with gzip.open(found, "rt", encoding="utf-8") as file:
        return [event for event in events_of(json.load(file), found) if "ph" in event]


def events_of(trace: Any, path: str | Path) -> list[dict[str, Any]]:
    """Raises ValueError if it has none."""
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise ValueError(f"{path} is no trace: it has no list of traceEvents")
    return events


Bundle = tuple[int, int]  # its device, and its number there


def dispatches(events: Sequence[dict[str, Any]]) -> dict[Bundle, float]:
    """When the runtime decided to dispatch each bundle, in microseconds."""
    return {
        (event["args"]["device"], bundle): event["ts"] + event["dur"]
        for event in events
        for bundle in event.get("args", {}).get("bundles", ())
    }


def begun(events: Sequence[dict[str, Any]]) -> dict[Bundle, float]:
    """When the profiler saw each dispatch begin, in microseconds of its own."""
    found = (event for event in events if event.get("name") == ANNOTATION and "ts" in event)
    return {(int(e["args"].get("device", 0)), int(e["args"]["bundle"])): e["ts"] for e in found}


def shift(ours: Sequence[dict[str, Any]], profile: Sequence[dict[str, Any]]) -> float:
    """What to add to the profiler's times.

    Raises:
      ValueError: no bundle is in both.
    """
    ours_us, annotated = dispatches(ours), begun(profile)
    both = ours_us.keys() & annotated.keys()
    if not both:
        raise ValueError(
            f"of {len(ours_us)} bundles of the runtime and {len(annotated)} of the profile none is the same; "
            "record both at the same time, and save the trace before its bundles are forgotten"
        )
    return -min(annotated[number] - ours_us[number] for number in both)


def overlay(ours: Sequence[dict[str, Any]], profile: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All events, in the runtime's time."""
    add_us = shift(ours, profile)
    moved = [{**e, "pid": e["pid"] + APART, **({"ts": e["ts"] + add_us} if "ts" in e else {})} for e in profile]
    return [*ours, *moved]


def main(argv: Sequence[str] | None = None) -> None:
    what = "One trace of the runtime and of jax.profiler, on one clock."
    parser = argparse.ArgumentParser(prog="python -m coalesce.observing.overlay", description=what)
    parser.add_argument("trace", help="what Trace.save wrote")
    parser.add_argument("profile", help="the folder given to jax.profiler.start_trace, or a *.trace.json.gz")
    parser.add_argument("out", help="the file to write")
    args = parser.parse_args(argv)
    try:
        ours = events_of(json.loads(Path(args.trace).read_text(encoding="utf-8")), args.trace)
        both = overlay(ours, read_profile(args.profile))
    except (OSError, EOFError, ValueError) as e:  # a profile that was cut short ends early
        parser.error(f"there is nothing to lay over each other: {e}")
    try:
        Path(args.out).write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": both}), encoding="utf-8")
    except OSError as e:
        parser.error(f"{args.out} cannot be written: {e.strerror}; give another file")


if __name__ == "__main__":
    main()
