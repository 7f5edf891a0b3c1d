"""Which equations cannot run for all lanes at once, and why: the reasons that explain() prints."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.interpreters import batching

from coalesce import jaxpr as J
from coalesce.behaviour import calls_back, may_speculate

# Batched, these would give other numbers or other side effects than each tenant's own run.
LANE_BY_LANE = {
    "debug_callback": "a debug callback runs once for each tenant",
    "debug_print": "a debug callback runs once for each tenant",
    "pure_callback": "a callback on the host runs once for each tenant",
    "rng_bit_generator": "batching rng_bit_generator would give lanes other random bits",
}


def why_lane_by_lane(eqn: J.Eqn, flags: Sequence[bool], decides: bool, pack_unbounded_loops: bool) -> str:
    """The reason to run an equation lane by lane; empty if all lanes can run at once.

    Args:
      flags: which operands differ between lanes.
      decides: whether a cond's index or a while's predicate differs between lanes.
    """
    name = eqn.primitive.name
    if name not in J.REGIONS:
        return why_not_batched(eqn, flags)
    if name == "while" and decides:
        if not pack_unbounded_loops:
            return (
                "its trip count depends on the lane, and one lane can keep a batch from ending: "
                "see pack_unbounded_loops"
            )
        if eqn.effects:
            return "its trip count depends on the lane and its body has side effects"
        if calls_back(eqn):
            return "its trip count depends on the lane and it holds a callback, which lanes that are done must not run"
    if name == "cond" and decides:
        if not may_speculate(eqn):
            held = "callback" if calls_back(eqn) else "while_loop"
            return f"a branch holds a {held}, which lanes that take another branch must not run"
        if eqn.effects:
            return "a branch has side effects, which lanes that take another branch must not have"
    return ""


def why_not_batched(eqn: J.Eqn, flags: Sequence[bool]) -> str:
    """As `why_lane_by_lane`, of an equation that is not walked into: what it holds counts."""
    name, inside = eqn.primitive.name, J.primitives(eqn)
    for held in sorted(inside & LANE_BY_LANE.keys()):
        return LANE_BY_LANE[held] if held == name else f"it holds a {held}: {LANE_BY_LANE[held]}"
    if eqn.effects:
        return "it has a side effect, which runs once for each tenant"
    if not all(map(vmap_keeps_bits, [eqn, *(e for sub in J.subjaxprs(eqn) for e in J.walk(sub))])):
        return "batching this key implementation would give lanes other random bits"
    if "while" in inside:
        return "it holds a while_loop, whose trip count may depend on the lane"
    if eqn.primitive not in batching.fancy_primitive_batchers:
        return f"{name} has no batching rule"
    return "" if name in BATCHES_ALWAYS or not any(flags) else refusal(eqn, flags)


# Primitives whose batching rules cover every case: no need to try.
BATCHES_ALWAYS = frozenset(
    """abs add and argmax argmin broadcast_in_dim clamp concatenate convert_element_type copy cos cumsum div dot_general
    conv_general_dilated dynamic_slice dynamic_update_slice eq erf erf_inv exp exp2 expm1 floor gather ge gt integer_pow
    iota is_finite le log log1p logistic lt max min mul ne neg not or pad pow random_bits random_fold_in random_split
    random_unwrap random_wrap reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_window_max rem
    reshape rev round rsqrt select_n shift_left shift_right_logical sign sin slice sort split sqrt square squeeze
    stop_gradient sub tan tanh transpose unstack xor""".split()
)


def refusal(eqn: J.Eqn, flags: Sequence[bool]) -> str:
    """Try the batching rule on abstract values: there are rules that cover some operands and refuse others."""
    axes = tuple(0 if flag else None for flag in flags)

    def operand(atom: J.Atom, flag: bool) -> jax.ShapeDtypeStruct:
        struct = J.aval_struct(atom.aval)
        return jax.ShapeDtypeStruct((2, *struct.shape), struct.dtype) if flag else struct

    structs = [operand(a, flag) for a, flag in zip(eqn.invars, flags, strict=True)]
    try:
        jax.eval_shape(jax.vmap(lambda *xs: J.bind(eqn, xs), in_axes=axes), *structs)
    except Exception as e:  # of a rule of the user's: JAX asserts that nothing is batched that the function closes over
        said = str(e).strip().partition("\n")[0]
        return f"the batching rule of {eqn.primitive.name} refuses it: {said or type(e).__name__}"
    return ""


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
