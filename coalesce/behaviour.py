"""What may be done with an equation besides running it where it stands: asked of everything that it holds."""

from __future__ import annotations

from coalesce import jaxpr as J

CALLBACKS = frozenset({"pure_callback", "io_callback", "debug_callback", "debug_print"})


def may_merge(eqn: J.Eqn) -> bool:
    """Whether two equal equations are one. Callbacks stay apart, since a user may count them, and so do barriers."""
    return not eqn.effects and J.primitives(eqn).isdisjoint(CALLBACKS | {"optimization_barrier"})


def may_move(eqn: J.Eqn) -> bool:
    """Whether an equation on weights may run once, ahead of all requests. Keys stay: a bank holds plain arrays."""
    keys = any(J.is_key(a.aval) for a in [*eqn.invars, *eqn.outvars])
    return not eqn.effects and not keys and J.primitives(eqn).isdisjoint(CALLBACKS)


def may_speculate(eqn: J.Eqn) -> bool:
    """Whether an equation may run where its own program might not have run it: what ends for certain, and is no code of
    the tenant's that may raise."""
    return J.primitives(eqn).isdisjoint(CALLBACKS | {"while"})


def calls_back(eqn: J.Eqn) -> bool:
    return not J.primitives(eqn).isdisjoint(CALLBACKS)
