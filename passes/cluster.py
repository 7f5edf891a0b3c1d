"""Find the heavy ops that are near enough in shape to share a superkernel: the candidates of `align`.

Before                                        After
    pack 0 x1 dot M=1 N=8 K=4 [family 0]          cluster 0 M=1 N=8 K=4 ops=2 ... : family 0 at 0, family 1 at 0
    pack 1 x1 dot M=1 N=7 K=4 [family 1]

A family's pack stands in its cluster as one op, at its place. Gives: `bundle.clusters` holds every pack once.
"""

from __future__ import annotations

from dataclasses import replace

from coalesce.bundle import Bundle, packs, place_of
from coalesce.clusters import cluster as clusters_of, WASTE_BOUND


def cluster(bundle: Bundle, *, waste_bound: float = WASTE_BOUND) -> Bundle:
    """`waste_bound`: the largest share of an op's FLOPs in a superkernel that may be padding, in [0, 1)."""
    if bundle.clusters or len(bundle.families) < 2:
        return bundle
    found = clusters_of([(place_of(pack), pack.op) for pack in packs(bundle.schedule)], waste_bound=waste_bound)
    return replace(bundle, clusters=found) if found else bundle
