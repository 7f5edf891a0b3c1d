"""A log told again: a policy is a function of its events, so a fresh one must answer what the recorded one did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from coalesce.scheduler.commands import Command
from coalesce.scheduler.policy import Policy
from coalesce.scheduler.run import Decision


class Divergence(NamedTuple):
    """The first decision that differs."""

    number: int  # from 0
    recorded: Decision
    commands: Sequence[Command]  # the answer to the same event now

    def __str__(self) -> str:
        event, now_ns, recorded = self.recorded
        now = list(self.commands)
        return f"decision {self.number}, at {now_ns}: {event}\n  recorded {list(recorded)}\n  now      {now}"


def replay(log: Iterable[Decision], policy: Policy) -> Divergence | None:
    """Where a fresh policy, made with the same arguments, answers otherwise; None where nowhere."""
    for number, decision in enumerate(log):
        commands = policy.on_event(decision.event, decision.now_ns)
        if list(commands) != list(decision.commands):
            return Divergence(number, decision, commands)
    return None
