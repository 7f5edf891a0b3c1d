"""The drivers of the passes: what they record, and how they name a pass that breaks a program or a bundle."""

from dataclasses import replace

import pytest
from jax import lax

import coalesce
from coalesce import jaxpr as J
from coalesce.bundle import Bundle
from coalesce.compile import default_costs
from coalesce.errors import IRError
from coalesce.family import find_families
from coalesce.passes import bundle_pipeline
from coalesce.passes.dce import dce
from coalesce.passes.inline import inline
from coalesce.passes.pipeline import normalise, PROGRAM_PASSES
from coalesce.tuning import UNTUNED
from tests.alone import array
from tests.rewrites import checked


def dense(w, x):
    return lax.tanh(lax.dot(x, w))


def program(name="a"):
    return coalesce.trace(dense, array(4, 4), array(2, 4), name=name)


def with_equations(program, eqns):
    jaxpr = program.jaxpr
    return program.with_jaxpr(J.close(J.invars(jaxpr), eqns, J.outvars(jaxpr)))


# ---- passes over one program ---------------------------------------------------------------------------------------


def forget_an_equation(program):
    return with_equations(program, program.jaxpr.jaxpr.eqns[1:])


def repeat_an_equation(program):
    return with_equations(program, [*program.jaxpr.jaxpr.eqns, program.jaxpr.jaxpr.eqns[-1]])


def return_the_input(program):
    jaxpr = program.jaxpr
    return program.with_jaxpr(J.close(J.invars(jaxpr), jaxpr.jaxpr.eqns, J.invars(jaxpr)[:1]))


def fall_over(program):
    raise KeyError("dot_general")


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (forget_an_equation, r"broken program .*IRError: .*equation 0 \(tanh\) reads a variable that nothing binds"),
        (repeat_an_equation, r"broken program .*IRError: .*equation 2 \(tanh\) binds a variable a second time"),
        (return_the_input, r"broken program .*IRError: .*output 0 is f32\[4,4\], traced as f32\[2,4\]"),
        (fall_over, r"failed .*KeyError: 'dot_general'"),
    ],
)
def test_a_broken_program_pass_is_named_with_those_before_it(broken, text):
    with pytest.raises(coalesce.PassError, match=text) as caught:
        normalise(program(), [inline, dce, broken, dce])
    assert str(caught.value).startswith(broken.__name__)
    assert "(ran before: inline, dce): tenant 'a': " in str(caught.value)
    assert isinstance(caught.value.__cause__, IRError | KeyError)


def test_the_first_pass_has_none_before_it():
    with pytest.raises(coalesce.PassError, match=r"fall_over failed \(ran before: none\)"):
        normalise(program(), [fall_over])


def test_every_pass_is_recorded():
    steps = normalise(program()).steps
    assert [step.name for step in steps] == [run.__name__ for run in PROGRAM_PASSES]
    assert all(step.seconds >= 0 for step in steps)
    assert not any(step.changed for step in steps[:2])  # a flat program without dead code


def test_the_pipeline_as_a_whole_is_idempotent():
    def whole(program):
        return normalise(program, strict=True).program

    checked(whole, program())


# ---- passes over a bundle ------------------------------------------------------------------------------------------


def drop_the_last(bundle):
    return replace(bundle, schedule=bundle.schedule[:-1])


def reverse(bundle):
    return replace(bundle, schedule=bundle.schedule[::-1])


def run_one_twice(bundle):
    return replace(bundle, schedule=(*bundle.schedule, bundle.schedule[0]))


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (drop_the_last, r"broken bundle \(ran before: form_packs\): IRError: never scheduled: tanh"),
        (reverse, r"broken bundle \(ran before: form_packs\): IRError: family 0: tanh runs before what it reads"),
        (run_one_twice, r"broken bundle \(ran before: form_packs\): IRError: family 0: dot_general is scheduled twice"),
        (fall_over, r"failed \(ran before: form_packs\): KeyError: 'dot_general'"),
    ],
)
def test_a_broken_bundle_pass_is_named_with_those_before_it(broken, text, monkeypatch):
    real = bundle_pipeline.bundle_passes

    def with_broken(**options):
        first, *rest = real(**options)
        return (first, broken, *rest)

    monkeypatch.setattr(bundle_pipeline, "bundle_passes", with_broken)
    with pytest.raises(coalesce.PassError, match=f"{broken.__name__} .*{text}"):
        coalesce.fuse([program("a"), program("b")])


def test_every_bundle_pass_is_recorded():
    bundle = Bundle(("a", "b"), find_families([normalise(program(name)).program for name in "ab"]))
    steps = bundle_pipeline.plan(bundle, platform="cpu", costs=default_costs("cpu", UNTUNED))
    assert [step.name for step in steps] == [
        "form_packs", "cluster", "align", "part_families", "pack", "unroll_loops", "choose_kernels", "fuse_attention",
        "fuse_epilogues", "chain_products", "round_results", "fuse_rows", "run_in_shifts", "plan_layouts",
        "join_arrays", "side_by_side", "cut_executables",
    ]  # fmt: skip
    never = bundle_pipeline.plan(bundle, platform="cpu", costs=default_costs("cpu", UNTUNED), policy="never")
    assert [step.name for step in never] == [
        "form_packs",
        "unroll_loops",
        "choose_kernels",
        "fuse_attention",
        "fuse_epilogues",
        "chain_products",
        "round_results",
        "fuse_rows",
        "run_in_shifts",
        "plan_layouts",
        "join_arrays",
        "side_by_side",
        "cut_executables",
    ]
