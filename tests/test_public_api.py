"""The public names, and what each of them gives."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxpr_as_fun

import coalesce
from coalesce.models import by_name
from tests.alone import array
from tests.compare import assert_same

NAMES = {
    "trace", "fuse", "Fused", "Captured", "Program", "Report", "Runtime", "block_until_ready",
    "CoalesceError", "TraceError", "PassError", "PlanError", "CaptureError", "InvalidInput",
    "ServingError", "QueueFull", "DeadlineExceeded", "TenantClosed", "TenantFailure", "CompileError",
    "OutOfDeviceMemory", "DeviceError", "PolicyError", "Shutdown", "StateLost",
}  # fmt: skip


def mlp(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x


def params(*widths):
    return [{"w": array(i, o), "b": array(o)} for i, o in zip(widths, widths[1:], strict=False)]


@pytest.fixture(scope="module")
def fused():
    """Two tenants of one family and one of another."""
    programs = [coalesce.trace(mlp, params(4, 8, 3), array(2, 4), name=name) for name in ("a", "b")]
    return coalesce.fuse([*programs, coalesce.trace(mlp, params(4, 5), array(2, 4), name="c")])


def test_names():
    assert set(dir(coalesce)) == NAMES
    assert all(callable(getattr(coalesce, name)) for name in NAMES)
    with pytest.raises(AttributeError, match="module 'coalesce' has no attribute 'Tracer'"):
        _ = coalesce.Tracer  # type: ignore[attr-defined]


def test_importing_the_package_does_not_import_jax():
    code = "import sys, coalesce; assert 'jax' not in sys.modules; coalesce.trace; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_signatures():
    trace = inspect.signature(coalesce.trace).parameters
    assert list(trace) == ["fn", "params", "example_inputs", "name", "shared"]
    assert trace["example_inputs"].kind == inspect.Parameter.VAR_POSITIONAL
    fuse = inspect.signature(coalesce.fuse).parameters
    assert next(iter(fuse)) == "programs"
    assert {p.kind for name, p in fuse.items() if name != "programs"} == {inspect.Parameter.KEYWORD_ONLY}
    assert (fuse["policy"].default, fuse["waste_bound"].default) == ("auto", 0.4)
    assert fuse["within_program"].default is False
    assert fuse["pack_unbounded_loops"].default is False


def test_the_runtime_and_its_errors():
    runtime = inspect.signature(coalesce.Runtime).parameters
    assert {p.kind for p in runtime.values()} == {inspect.Parameter.KEYWORD_ONLY}
    terms = inspect.signature(coalesce.Runtime.add_tenant).parameters
    assert list(terms)[1:4] == ["name", "fn", "params"] and terms["slo"].default is inspect.Parameter.empty
    kinds = [getattr(coalesce, name) for name in NAMES]
    errors = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, coalesce.ServingError)}
    assert len(errors) == 11
    assert all(error.grpc.isupper() and 400 <= error.http < 600 for error in errors | {coalesce.InvalidInput})


def test_report(fused):
    report = fused.report
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.programs = 4  # type: ignore[misc]
    fields = ["programs", "families", "heavy_ops", "superkernels", "alone", "padding_waste"]
    across = ["superkernels_across", "launches_shared", "ops_across", "loops_across", "predicted_gain_us"]
    last = ["components", "side_by_side", "why_side_by_side", "executables", "why_executables", "tenants"]
    assert [f.name for f in dataclasses.fields(report)] == [*fields, *across, *last]
    assert (report.programs, report.families, report.heavy_ops) == (3, 2, 5)
    assert (report.superkernels, report.alone, report.padding_waste) == (2, 1, 0.0)
    first, _, third = report.tenants
    assert (first.name, first.family, first.heavy_ops, first.superkernels, first.alone) == ("a", 0, 2, 2, 0)
    assert (third.name, third.family, third.heavy_ops, third.superkernels, third.alone) == ("c", 1, 1, 0, 1)
    assert first.padding_waste == third.padding_waste == 0.0
    assert first.across_families == third.across_families == 0


def test_report_across_families():
    """The first layers of both programs are one superkernel, and so are the scans with the dots in their bodies."""

    def rnn(w, x):
        x = jnp.tanh(x @ w[0])
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w[1]), None), x, None, 3)[0]

    shapes = (4, 5), (4, 4), (4, 4)
    programs = [
        coalesce.trace(rnn, [array(4, d), array(d, d)], array(2, 4), name=f"t{i}") for i, (_, d) in enumerate(shapes)
    ]
    report = coalesce.fuse(programs, policy="always", waste_bound=0.5).report
    assert (report.families, report.heavy_ops, report.superkernels, report.alone) == (2, 6, 2, 0)
    assert (report.superkernels_across, report.ops_across, report.loops_across) == (2, 6, 1)
    # Two of three lanes have 4 of 5 columns, then 4 of 5 rows as well.
    assert report.padding_waste == pytest.approx(1 - (20 + 16 + 16 + 25 + 16 + 16) / (3 * 20 + 3 * 25))
    assert [t.across_families for t in report.tenants] == [2, 2, 2]
    counts = "6 heavy ops -> 2 superkernels, 2 across families, 0 alone, 19.3% padding"
    assert str(report) == f"3 programs in 2 families: {counts}"


def test_report_text(fused, golden):
    golden(fused.report)


def test_program_text(golden):
    golden(coalesce.trace(mlp, params(4, 8, 3), array(2, 4), name="a"))


def test_fused_text(fused, golden):
    golden(fused)


def test_call(fused):
    x = array(2, 4)
    results = fused([(x,), (x + 1,), (x,)])
    assert [r.shape for r in results] == [(2, 3), (2, 3), (2, 5)]
    assert_same(results, fused([(x,), (x + 1,), (x,)]))
    assert_same(results, fused([[x], [x + 1], [x]]))


def test_explain(fused):
    """Every pass with its time, every pack, every heavy op left alone with its reason."""
    text = fused.explain()
    for run in ("inline", "dce", "canonicalize", "hoist_weights", "cse"):
        assert f"after {run} (" in text
    for run in ("form_packs", "cluster", "align", "pack", "choose_kernels", "plan_layouts"):
        assert f"# bundle: after {run} (" in text
    assert "a and 1 more of its function" not in text.split("# bundle")[1]
    assert "family 0: 2 lanes (a, b)" in text and "family 1: 1 lane (c)" in text
    superkernels = text.split("# superkernels")[1].split("#")[0].strip().splitlines()
    assert [line.split(":")[0] for line in superkernels] == [
        "pack 0 x2 dot M=2 N=8 K=4 f32[2,4] x f32[4,8]",
        "pack 1 x2 dot M=2 N=3 K=8 f32[2,8] x f32[8,3]",
    ]
    [alone] = text.split("# heavy ops left alone")[1].split("#")[0].strip().splitlines()
    assert "(c): dot M=2 N=5 K=4 f32[2,4] x f32[4,5]: one lane in its family" in alone


def test_explain_prints_a_plan_once(fused):
    """A pass of a bundle that changes nothing says so, as one of a program does."""
    text, plan = fused.explain(), str(fused)
    assert text.count(plan) == 1
    same = [b.name for a, b in zip(fused.steps, fused.steps[1:], strict=False) if a.bundle is b.bundle]
    assert "join_arrays" in same
    assert all(re.search(rf"# bundle: after {name} \(.*nothing to change", text) for name in same)


def test_explain_across_families():
    """What was found, chosen and predicted, and the record of every heavy op."""
    programs = [coalesce.trace(mlp, params(4, d, 3), array(2, 4), name=f"t{d}") for d in (7, 8)]
    text = coalesce.fuse(programs, policy="always").explain()
    assert "# bundle: after align (" in text and "padded: family 0 at 0 with family 1 at 0" in text
    across = text.split("# across families")[1].split("#")[0].strip().splitlines()
    assert across[0].startswith("predicted to win ")
    assert [line.split(":")[0] for line in across[1:]] == [f"family {f} at {i}" for f in (0, 1) for i in (0, 3)]
    assert (
        across[1].split(":")[1].startswith(" with family 1 at 0 as dot M=2 N=8 K=4 f32[2,4] x f32[4,8], 12.5% padding")
    )


def test_jaxpr(fused):
    """Banks and inputs in; a named call for each superkernel, and an op alone as its tenant wrote it."""
    jaxpr = fused.jaxpr
    banks = [array.shape for array in fused.bank]
    assert [v.aval.shape for v in jaxpr.jaxpr.invars] == [*banks, (2, 4), (2, 4), (2, 4)]
    assert [v.aval.shape for v in jaxpr.jaxpr.outvars] == [(2, 3), (2, 3), (2, 5)]
    calls = [eqn.params["name"] for eqn in jaxpr.jaxpr.eqns if "name" in eqn.params]
    assert sum(name.startswith("superkernel") for name in calls) == 2
    assert sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.jaxpr.eqns) == 1
    x = array(2, 4)
    got = jaxpr_as_fun(jaxpr)(*fused.bank, x, x, x)
    assert_same(got, fused([(x,)] * 3))


def test_compiled(fused):
    compiled = fused.compile()
    assert fused.compile() is compiled
    assert fused.cost_analysis()["flops"] > 0
    assert fused.memory_analysis().argument_size_in_bytes > 0
    assert "superkernel0" in fused.as_text()


def test_eight_lstms():
    """Abstract weights of the published size: the product of the carry is packed in the loop, and counted once; that of
    the inputs before it."""
    model = by_name("lstm")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    fused = coalesce.fuse([coalesce.trace(model.apply, shapes, *model.inputs(), name=f"lstm{i}") for i in range(8)])
    report = fused.report
    assert (report.programs, report.families) == (8, 1)
    assert (report.heavy_ops, report.superkernels, report.alone) == (8 * 3, 3, 0)
    assert sum(".body." in line for line in fused.explain().split("# superkernels")[1].splitlines()) == 1
