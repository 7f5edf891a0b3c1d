"""Everything that the policy was told, when, and what it answered: a line of JSON each (`coalesce.scheduler.record`).

    with Recording("log.jsonl") as recording, Runtime(observers=[recording]) as rt: ...

    python -m coalesce.observing.recording log.jsonl                # replays it through a fresh policy
    python -m coalesce.observing.recording log.jsonl --policy fifo  # what would that one have decided?

A policy is a function of events and times, so a log says why something happened, and a policy that was changed can be
asked what it would have done. Of several devices each has a file: log.jsonl, log.device1.jsonl, ...
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from coalesce.observing.aside import Aside
from coalesce.observing.lines import Lines
from coalesce.scheduler.baselines.edf import Edf
from coalesce.scheduler.baselines.fifo import Fifo
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command
from coalesce.scheduler.events import Event
from coalesce.scheduler.invariants import check
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.record import dump, read
from coalesce.scheduler.replay import replay
from coalesce.scheduler.run import Decision

POLICIES: dict[str, Callable[[], Policy]] = {"coalescing": Coalescing, "fifo": Fifo, "edf": Edf}


class Recording(Aside):
    """Writes until it is closed. What had to drop something cannot be replayed; `dropped` says so, and a warning."""

    def __init__(self, path: str | Path, most: int = 1_000_000) -> None:
        self._path, self._others = Path(path), dict[int, Recording]()
        self._lines = Lines(self._path)
        super().__init__(most)

    def on(self, device: int) -> Recording:
        if device == 0:
            return self
        if device not in self._others:
            path = self._path.with_name(f"{self._path.stem}.device{device}{self._path.suffix}")
            self._others[device] = Recording(path, self._most)
        return self._others[device]

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        self.put(Decision(event, now_ns, commands))

    def handle(self, item: Decision) -> None:
        self._lines.add(dump(*item) + "\n")

    def finish(self) -> None:
        self._lines.close()

    def lacking(self, dropped: int) -> str:
        why = "which came too fast or could not be written"
        return f"{self._path} lacks {dropped} decisions, {why}; it cannot be replayed"

    def close(self) -> None:
        super().close()
        for other in self._others.values():
            other.close()


def load(path: str | Path) -> list[Decision]:
    with Path(path).open(encoding="utf-8") as file:
        return list(read(file))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m coalesce.observing.recording", description="Replay a log through a fresh policy."
    )
    parser.add_argument("log", help="what a Recording wrote")
    parser.add_argument("--policy", choices=list(POLICIES), default="coalescing", help="which policy (%(default)s)")
    args = parser.parse_args(argv)
    try:
        log = load(args.log)
    except (OSError, ValueError) as e:
        parser.error(f"{args.log} is no log: {e}")
    if not log:
        parser.error(f"{args.log} is no log: it has no decision")
    violations = check(log)
    print(f"{len(log)} decisions, {len(violations)} violations of what is always true")
    print(*violations[:20], sep="\n", end="\n" if violations else "")
    divergence = replay(log, POLICIES[args.policy]())
    print(f"{args.policy} decides the same" if divergence is None else f"{args.policy} decides otherwise: {divergence}")
    return int(bool(violations) or divergence is not None)


if __name__ == "__main__":
    raise SystemExit(main())
