"""pack: one schedule in which what was aligned runs as one, and stays stacked as long as it can."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import coalesce
from coalesce.bundle import Aligned, JointLoop, JointStep, Pack
from coalesce.errors import IRError
from coalesce.passes.align import align
from coalesce.passes.cluster import cluster
from coalesce.passes.form_packs import form_packs
from coalesce.passes.pack import pack
from tests.alone import array
from tests.bundles import bundle_of, replanned
from tests.dataflow import all_of, check_plan
from tests.fixed_costs import Fixed


def aligned(*tenants, waste_bound=0.6, **options):
    """Whatever is legal."""
    bundle = cluster(form_packs(bundle_of(*tenants), **options), waste_bound=waste_bound)
    return align(bundle, costs=Fixed(), policy="always", waste_bound=waste_bound)


def packed(*tenants, **options):
    bundle = pack(aligned(*tenants, **options))
    check_plan(bundle, options.get("waste_bound", 0.6))
    assert pack(bundle) is bundle
    return bundle


def joint_names(bundle):
    return [step.parts[0].eqn.primitive.name for step in all_of(JointStep, bundle.schedule)]


def forms(bundle):
    return [item.form for item in all_of(Pack, bundle.schedule)]


def mlp(activation):
    def run(p, x):
        for w, b in p:
            x = activation(lax.dot(x, w) + lax.broadcast_in_dim(b, (x.shape[0], b.shape[0]), (1,)))
        return x

    return run


def layers(rows, *widths, activation=lax.tanh):
    """A tenant of an MLP."""
    params = [(array(i, o), array(o)) for i, o in zip(widths, widths[1:], strict=False)]
    return mlp(activation), params, (array(rows, widths[0]),)


def tower(rows, *widths):
    """A tenant of an MLP without biases."""

    def run(p, x):
        for w in p:
            x = lax.tanh(lax.dot(x, w))
        return x

    return run, [array(i, o) for i, o in zip(widths, widths[1:], strict=False)], (array(rows, widths[0]),)


def test_the_check_of_plans_sees_what_is_wrong():
    """tests/dataflow.py, which much of what is tested rests on."""
    bundle = packed(tower(2, 4, 8, 4), tower(2, 4, 6, 4))
    first, second, *rest = bundle.schedule
    assert isinstance(first, Pack) and isinstance(second, JointStep)
    assert second.parts[0].eqn.invars[0] is first.members[0].eqn.outvars[0]

    def fails(match, *schedule):
        with pytest.raises(AssertionError, match=match):
            check_plan(replace(bundle, schedule=schedule), 0.6)

    fails("runs before what it reads", second, first, *rest)
    fails("an equation is missing", first, *rest)
    fails("an equation runs twice", first, first, second, *rest)
    with pytest.raises(AssertionError, match="wastes"):
        check_plan(bundle, 0.1)


def test_a_stack_is_cut_apart_by_what_reads_it():
    """So the cost model charges nothing for it: in what XLA compiles, elementwise work slices what it reads."""
    waves = [
        coalesce.trace(lambda w, x: lax.sin(lax.dot(x, w)), array(4, 8), array(2, 4), name="sine"),
        coalesce.trace(lambda w, x: lax.cos(lax.dot(x, w)), array(4, 6), array(2, 4), name="cosine"),
    ]
    fused = coalesce.fuse(waves, policy="always", waste_bound=0.6)
    assert fused.report.superkernels_across == 1
    slicing = [block for block in str(fused.as_text()).split("\n\n") if " slice(" in block]
    assert len(slicing) == 2 and all(" sine(" in block or " cosine(" in block for block in slicing)


def moves_around_superkernels(*tenants):
    """What cuts stacks apart or makes them in the lowered program: before the first superkernel, between each and the
    next, and after the last."""
    found = [coalesce.trace(fn, params, *inputs, name=str(i)) for i, (fn, params, inputs) in enumerate(tenants)]
    moves = [[]]
    for eqn in coalesce.fuse(found, policy="always", waste_bound=0.6).jaxpr.jaxpr.eqns:
        if str(eqn.params.get("name", "")).startswith("superkernel"):
            moves.append([])
        elif eqn.primitive.name in ("slice", "dynamic_slice", "gather", "split", "unstack", "concatenate", "stack"):
            moves[-1].append(eqn.primitive.name)
    return moves


def test_nothing_is_unstacked_and_stacked_again_between_packs_of_the_same_members():
    first, *between, last = moves_around_superkernels(tower(2, 4, 8, 8, 4), tower(2, 4, 6, 6, 4))
    assert (first, between, last) == (["concatenate"], [[], []], ["slice", "slice"])
    # With a layer more in one of them there is such a pair, which shows that it would be seen.
    _, *between, _ = moves_around_superkernels(tower(2, 4, 8, 8, 4), tower(2, 4, 7, 20, 7, 4))
    assert any("slice" in moves and "concatenate" in moves for moves in between)


def test_two_mlps_of_other_widths(golden):
    """The biases are weights: they lie in one padded array, too."""
    golden(replanned(pack, aligned(layers(2, 4, 8, 3), layers(3, 5, 6, 3))))


def test_a_residual(golden):
    """The sum of two stacks of the same members."""

    def block(p, x):
        x = lax.dot(x, p[0])
        return x + lax.dot(lax.tanh(x), p[1])

    golden(replanned(pack, aligned(*[(block, [array(4, d), array(d, d)], (array(2, 4),)) for d in (3, 4)])))


def test_two_scans_of_unequal_length(golden):
    """The carry stays stacked from step to step; the results of the steps do not."""

    def rnn(length, d):
        def run(w, x):
            return lax.scan(lambda c, _: (lax.tanh(lax.dot(c, w)), c[0]), x, None, length)

        return run, array(d, d), (array(2, d),)

    golden(replanned(pack, aligned(rnn(3, 4), rnn(5, 5))))


def test_a_convolution_with_a_dot(golden):
    """As plain products nothing stays stacked."""

    def conv(w, x):
        y = lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return lax.tanh(y)

    conv_tenant = conv, array(2, 2, 2, 3), (array(1, 3, 3, 2),)
    golden(replanned(pack, aligned(conv_tenant, layers(4, 8, 3))))


def test_q_k_and_v_of_two_programs(golden):
    """Three members a family are one pack of six. No equation reads all six parts of its stack, so they go on apart."""

    def qkv(p, *inputs):
        q, k, v = (lax.dot(x, p[name]) for x, name in zip(inputs, "qkv", strict=True))
        return lax.tanh(q) * lax.sin(k) + v

    tenants = [(qkv, {name: array(4, d) for name in "qkv"}, (array(2, 4),) * 3) for d in (3, 4)]
    golden(replanned(pack, aligned(*tenants, within_program=True)))


def test_a_family_and_a_lane(golden):
    """The lanes of a family move as one; those that share a weight have one problem."""
    w = [(array(4, 8), array(8))]
    tenants = [(mlp(lax.tanh), w, (array(2, 4),)) for _ in range(2)]
    golden(replanned(pack, aligned(*tenants, layers(2, 4, 8, activation=lax.sin))))


def test_nothing_aligned():
    bundle = aligned(layers(2, 4, 8), layers(2, 16, 3), waste_bound=0.1)
    assert bundle.aligned == ()
    assert pack(bundle) is bundle


# ---- what stays stacked ----------------------------------------------------------------------------------------------


def test_tails_run_together():
    """Of three families; a normalisation over the padded dimension too."""

    def block(c):
        def run(w, x):
            x = lax.dot(x, w)
            x = x - jnp.mean(x, 1, keepdims=True)
            return jax.nn.softmax(x * c, axis=1)

        return run

    bundle = packed(*[(block(c), array(4, d), (array(2, 4),)) for c, d in ((1.0, 3), (2.0, 4), (3.0, 5))])
    assert all(len(step.parts) == 3 for step in all_of(JointStep, bundle.schedule))
    steps = joint_names(bundle)
    assert [steps.count(name) for name in ("reduce_sum", "reduce_max", "exp", "sub", "mul")] == [2, 1, 1, 2, 1]
    # What divides the sums are literals, other in each family: they fit, too.
    assert steps.count("div") == 2


def test_what_differs_runs_alone():
    bundle = packed(layers(2, 4, 8), layers(2, 4, 7, activation=lax.sin))
    assert joint_names(bundle) == ["add"]


def test_parts_that_read_no_stack_run_alone():
    """Nothing stands before them that is stacked."""

    def late(w, x):
        return lax.dot(lax.tanh(x), w)

    assert joint_names(packed(*[(late, array(4, d), (array(2, 4),)) for d in (3, 4)])) == []


def test_a_large_operand_is_not_stacked_for_a_small_one():
    """The sum over all rows is one number; the mask that it multiplies is an input."""

    def gated(w, x, mask):
        return mask * lax.reduce_sum(lax.dot(x, w), (0, 1))

    bundle = packed(*[(gated, array(4, d), (array(2, 4), array(9, 9))) for d in (3, 4)])
    assert "mul" not in joint_names(bundle)


def test_each_part_has_one_partner():
    """Two equal readers of each part are two joint steps."""

    def twice(w, x):
        x = lax.dot(x, w)
        return lax.tanh(x), lax.tanh(x * 2)

    bundle = packed(*[(twice, array(4, d), (array(2, 4),)) for d in (3, 4)])
    assert sorted(joint_names(bundle)) == ["mul", "tanh", "tanh"]


def test_carries_that_a_body_unstacks():
    """One carry comes out of a pack, the other of a sort, which has no rule for other sizes."""

    def step(w, c):
        return lax.tanh(lax.dot(c[0], w)), lax.sort(c[1])

    def rnn(length, d):
        def run(w, x):
            return lax.scan(lambda c, _: (step(w, c), None), (x, x), None, length)[0]

        return run, array(d, d), (array(2, d),)

    bundle = packed(rnn(3, 4), rnn(5, 5))
    [loop] = all_of(JointLoop, bundle.schedule)
    assert (loop.length, loop.stacked) == (5, ((0, 0),))


def test_carries_in_another_order():
    """Carries of one rank and dtype pair up in order, whatever they are."""

    def rnn(swapped, d):
        def run(w, x):
            def step(c, _):
                new = lax.tanh(lax.dot(c[swapped], w))
                return ((c[0] + new, new) if swapped else (new, c[1] + new)), None

            return lax.scan(step, (x, x), None, 3)[0]

        return run, array(d, d), (array(2, d),)

    bundle = packed(rnn(0, 4), rnn(1, 5))
    [loop] = all_of(JointLoop, bundle.schedule)
    assert set(loop.stacked) <= {(0, 0), (1, 1)}


def test_the_last_stack_goes_on_after_a_loop():
    """What follows the scans reads the stack that they leave."""

    def rnn(length, d):
        def run(w, x):
            x = lax.scan(lambda c, _: (lax.tanh(lax.dot(c, w)), None), x, None, length)[0]
            return lax.exp(x)

        return run, array(d, d), (array(2, d),)

    assert joint_names(packed(rnn(3, 4), rnn(5, 5))) == ["tanh", "exp"]


# ---- our own mistakes ------------------------------------------------------------------------------------------------


def test_a_cycle_is_an_error():
    bundle = aligned(layers(2, 3, 9, 3), layers(2, 9, 3, 9), waste_bound=0.0)
    heads = sorted(item.members[0].site for item in all_of(Pack, bundle.schedule) if item.members[0].family == 0)
    crossed = (Aligned(((0, heads[0]), (1, heads[1])), "equal"), Aligned(((0, heads[1]), (1, heads[0])), "equal"))
    with pytest.raises(IRError, match="wait for each other: packs were aligned in a cycle"):
        pack(replace(bundle, aligned=crossed))


def test_a_form_that_does_not_fit_is_an_error():
    bundle = aligned(layers(2, 4, 8), layers(2, 4, 7))
    broken = tuple(replace(group, form="equal") for group in bundle.aligned)
    with pytest.raises(IRError, match="family 0 at 0, family 1 at 0: aligned as 'equal', which they are not"):
        pack(replace(bundle, aligned=broken))


def test_the_order_of_tenants_is_that_of_the_members():
    first, second = layers(2, 4, 8), layers(2, 4, 7)
    run = partial(packed, waste_bound=0.5)
    assert forms(run(first, second)) == forms(run(second, first)) == ["padded"]
