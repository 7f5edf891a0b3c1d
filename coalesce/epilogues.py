"""What a pack of one member leaves, and what its epilogue reads."""

from __future__ import annotations

from coalesce import jaxpr as J
from coalesce.bundle import Pack


def results_of(pack: Pack) -> tuple[J.Var, ...]:
    """What a pack of one member leaves."""
    return pack.results if pack.epilogue else tuple(pack.members[0].eqn.outvars)


def result_of(pack: Pack) -> J.Var | None:
    """What a pack of one member leaves, if that is one value."""
    found = results_of(pack)
    return found[0] if len(found) == 1 else None


def epilogue_reads(pack: Pack) -> list[J.Var]:
    """What a pack's epilogue reads besides its result, each once; if of another shape, a vector over its columns."""
    own = {v for m in pack.members for v in m.eqn.outvars} | {v for step in pack.epilogue for v in step.eqn.outvars}
    read = [a for step in pack.epilogue for a in step.eqn.invars if not isinstance(a, J.Literal)]
    return list(dict.fromkeys(a for a in read if a not in own))
