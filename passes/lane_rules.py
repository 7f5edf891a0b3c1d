"""Which equations cannot run for all lanes at once, and why: the reasons that explain() prints."""

from __future__ import annotations

from jax.interpreters import batching

from coalesce import jaxpr as J

# Batched, these would give other numbers or other side effects than each tenant's own run.
LANE_BY_LANE = {
    "debug_callback": "a debug callback runs once for each tenant",
    "debug_print": "a debug callback runs once for each tenant",
    "pure_callback": "a callback on the host runs once for each tenant",
    "rng_bit_generator": "batching rng_bit_generator would give lanes other random bits",
}


def why_lane_by_lane(eqn: J.Eqn, decides: bool, pack_unbounded_loops: bool) -> str:
    """The reason to run an equation lane by lane; empty if all lanes can run at once.

    `decides`: whether a cond's index or a while's predicate differs between lanes.
    """
    name = eqn.primitive.name
    if name in LANE_BY_LANE:
        return LANE_BY_LANE[name]
    if eqn.effects and name not in J.REGIONS:
        return "it has a side effect, which runs once for each tenant"
    if not vmap_keeps_bits(eqn):
        return "batching this key implementation would give lanes other random bits"
    if name == "while":
        if decides and not pack_unbounded_loops:
            return (
                "its trip count depends on the lane, and one lane can keep a batch from ending: see "
                "pack_unbounded_loops"
            )
        if decides and eqn.effects:
            return "its trip count depends on the lane and its body has side effects"
    if name == "cond" and decides:
        inside = {e.primitive.name for branch in J.regions(eqn) for e in J.walk(branch)}
        if "while" in inside:
            return "a branch holds a while_loop, which lanes that take another branch must not run"
        if eqn.effects:
            return "a branch has side effects, which lanes that take another branch must not have"
    if name not in J.REGIONS and not batches(eqn):
        return f"{name} has no batching rule"
    return ""


def batches(eqn: J.Eqn) -> bool:
    return eqn.primitive in batching.fancy_primitive_batchers


# Key primitives whose batching rule gives every lane its own bits, by the name of the key's dtype.
KEEPS_BITS = {
    "key<fry>": {"random_bits", "random_split", "random_fold_in", "random_gamma", "random_seed"},
    "key<rbg>": {"random_split", "random_fold_in", "random_seed"},  # these are threefry's
}


def vmap_keeps_bits(eqn: J.Eqn) -> bool:
    """Threefry is a function of each key alone; the hardware generators are not, once batched."""
    name = eqn.primitive.name
    if not name.startswith("random_") or name in ("random_wrap", "random_unwrap"):
        return True
    keys = {str(a.aval.dtype) for a in [*eqn.invars, *eqn.outvars] if J.is_key(a.aval)}
    return all(name in KEEPS_BITS.get(key, ()) for key in keys)
