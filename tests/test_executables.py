"""cut_executables and the chain of what it cuts: what one executable computes, wherever a program is cut."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

import coalesce
from coalesce import jaxpr as J
from coalesce.bundle import JointStep, Pack
from coalesce.bundle_check import check_bundle
from coalesce.chain import Chain, cut
from coalesce.costs import Costs, device_of
from coalesce.costs.schedule import stretches
from coalesce.errors import InvalidInput, IRError, PlanError
from coalesce.passes.cut_executables import cut_executables
from coalesce.passes.first_reads import first_reads
from coalesce.passes.form_packs import form_packs
from tests.alone import alone as alone_of, array, check_fused, fuse_tenants, Tenant
from tests.bundles import bundle_of, replanned
from tests.cases import assert_inputs_isolated, assert_weights_isolated, Case, case_of, fuse, inputs_of
from tests.compare import assert_bitwise, assert_same
from tests.kin import draw_kin
from tests.programs import Draw, many_compiles
from tests.tenants import alone, draw_tenants

GPU = Costs(device_of("gpu"))
FIRST = jax.__version_info__ < (0, 11)  # later ones fuse products with what is around them, which rounds otherwise


@pytest.fixture(autouse=True, scope="module")
def cheap_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with many_compiles(tmp_path_factory.mktemp("compiled")):
        yield


def mlp(p: Any, x: Any) -> Any:
    for w in p:
        x = jnp.tanh(x @ w)
    return x


def tenants(layers: int = 3, lanes: int = 2) -> list[Tenant]:
    return [(mlp, [array(8, 8) for _ in range(layers)], (array(2, 8),)) for _ in range(lanes)]


def chain_of(fused: Any) -> Chain:
    chain = fused.compile()
    assert isinstance(chain, Chain)
    return chain


def types(avals: Any) -> list[str]:
    return [J.short(x) for x in jax.tree.leaves(avals)]


def test_a_program_is_cut_before_a_pack(golden):
    run = partial(cut_executables, platform="gpu", costs=GPU, executables=2)
    golden(replanned(run, form_packs(bundle_of(*tenants(2)))))


def few(examples: int) -> settings:
    """Of 200, where the usual number is as many: an example is several programs to compile."""
    return settings(max_examples=max(3, settings().max_examples * examples // 200))


def net(p: Any, x: Any, y: Any) -> Any:
    """Layers with what lies between them, a residual from the start, and results along the way; but no product that is
    added to something, since XLA contracts these or not as it fuses what is around them."""
    first, along = x, []
    for w, gain in p["layers"]:
        x = jnp.tanh((x @ w) * gain[None])
        if len(along) % 2:
            x = x + first
        along.append(x[:, :2])
    return {"last": x @ p["head"] + y[:, None], "along": along[::2], "given": y}


def nets(pick: Draw, families: int = 2) -> list[Tenant]:
    found: list[Tenant] = []
    for _ in range(families):
        size, rows = pick.integer(2, 6), pick.integer(1, 4)
        shapes = [(array(size, size), array(size)) for _ in range(pick.integer(2, 5))]
        for _ in range(pick.integer(1, 3)):
            layers = [(array(*w.shape), array(*gain.shape)) for w, gain in shapes]
            found.append((net, {"layers": layers, "head": array(size, 3)}, (array(rows, size), array(rows))))
    return found


@few(8)
@given(st.integers(0, 2**64 - 1), st.sampled_from([2, 3, 4, 100]), st.sampled_from(["always", "never"]))
@pytest.mark.once
def test_the_same_as_in_one(seed: int, executables: int, policy: str) -> None:
    found = nets(Draw(seed))
    requests = [x for *_, x in found]
    parts, whole = (fuse_tenants(found, policy=policy, executables=n, waste_bound=0.9) for n in (executables, 1))
    places = len(stretches(whole.bundle.schedule, whole.bundle.families, GPU))
    assert parts.report.executables == min(executables, places)
    agree = assert_bitwise if FIRST else assert_same
    agree(parts(requests), whole(requests))
    if executables > 4:
        return  # many programs to compile a second time
    staged = parts.staged()
    agree(staged.unstage(staged(staged.stage(requests))), jax.device_get(whole(requests)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pick = Draw(draw(st.integers(0, 2**64 - 1)))
    kin = pick.flag()
    found = draw_kin(pick, 2, 2, jnp.float32) if kin else draw_tenants(pick, 4, 2, jnp.float32)
    policy = "always" if kin else pick.choice(["always", "never"])
    return case_of(pick, found, executables=pick.choice([2, 3, 100]), policy=policy)


@few(6)
@given(cases())
def test_any_program_gives_what_tenants_get_alone_and_nothing_of_others(case: Case) -> None:
    program = fuse(case.found, case.options)
    results = program(inputs_of(case.found))
    for tenant, got in zip(case.found, results, strict=True):
        assert_same(got, alone(tenant), tenant.model.exact)
    assert_inputs_isolated(case, program, results)
    assert_weights_isolated(case, program, results)


def signature(executable: Any) -> tuple[list[str], list[str]]:
    return types(executable.args_info), [J.struct_short(x) for x in jax.tree.leaves(executable.out_info)]


def test_parts_take_what_they_read_and_values_stay_stacked():
    """One padded stack is handed on, of the lanes of both families, in the place of the one before it."""
    wide = [(mlp, [array(8, 8), array(8, 8), array(8, 4)], (array(3, 8),)) for _ in range(2)]
    fused = fuse_tenants([*tenants(), *wide], policy="always", executables=4)
    first, second, *last = chain_of(fused).executables
    assert any(isinstance(item, JointStep) for item in fused.bundle.schedule)
    assert signature(first) == (["f32[4,8,8]", *["f32[2,8]"] * 2, *["f32[3,8]"] * 2], ["f32[4,3,8]"])
    assert signature(second) == (["f32[4,8,8]", "f32[4,3,8]"], ["f32[4,3,8]"])
    assert "input_output_alias={ {}: (1, {}, may-alias) }" in second.as_text()
    assert [signature(part) for part in last] == [
        (["f32[2,8,8]", "f32[4,3,8]"], ["f32[2,8]", "f32[2,8]"]),
        (["f32[2,8,4]", "f32[4,3,8]"], ["f32[3,4]", "f32[3,4]"]),
    ]


def test_what_depends_on_inputs_alone_is_made_where_it_is_read():
    """By the first that reads it, if there are several."""

    def late(p: Any, x: Any, y: Any, z: Any) -> Any:
        shift, gain = jnp.exp(y)[None], jnp.sin(z)[None]
        return jnp.tanh(jnp.tanh(x @ p[0]) * gain @ p[1]) * gain + shift, jnp.cos(z)

    found = [(late, [array(8, 8), array(8, 8)], (array(2, 8), array(8), array(8))) for _ in range(2)]
    first, second = chain_of(check_fused(found, executables=2).staged()).executables
    assert signature(first) == (["f32[2,8,8]", "f32[2,2,8]", "f32[2,8]"], ["f32[2,8]", "f32[2,1,8]", "f32[2,2,8]"])
    assert signature(second) == (["f32[2,8,8]", "f32[2,8]", "f32[2,1,8]", "f32[2,2,8]"], ["f32[2,2,8]"])


def test_what_runs_early_is_made_late_if_it_is_read_late():
    """A schedule of several families begins with whatever is light."""

    def late(p: Any, x: Any, y: Any) -> Any:
        return jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) + jnp.exp(y)[None]

    found = [(late, [array(n, n), array(n, n)], (array(2, n), array(n))) for n in (8, 7)]
    fused = check_fused(found, executables=2, policy="always")
    assert "exp" in str(fused).partition("executable 1")[0]
    _, second = chain_of(fused.staged()).executables
    assert signature(second)[0] == ["f32[2,8,8]", "f32[1,8]", "f32[1,7]", "f32[2,2,8]"]


def test_results_come_from_the_part_that_makes_them():
    """Also those that are read again, those that are inputs, numbers or weights, and those that are given twice."""

    def all_kinds(p: Any, x: Any) -> Any:
        y = jnp.tanh(x @ p["a"])
        return y, y, x, 1.5, p["a"], jnp.arange(3), y[0], jnp.tanh(y @ p["b"])

    found = [(all_kinds, {"a": array(4, 4), "b": array(4, 2)}, (array(3, 4),)) for _ in range(2)]
    staged = check_fused(found, executables=2).staged()
    results = staged.unstage(staged(staged.stage([x for *_, x in found])))
    assert_same(results, [jax.device_get(alone_of(tenant)) for tenant in found])
    first, second = chain_of(staged).executables
    assert signature(first)[1] == ["f32[2,3,4]", "f32[2,3,4]", "f32[2,4]"]
    assert len(signature(second)[1]) == 5
    check_fused(found[:1], executables=2)


def test_what_is_handed_on_is_not_kept_and_nothing_else_is_taken():
    found = tenants()
    requests = [x for *_, x in found]
    staged = fuse_tenants(found, executables=3).staged()
    inputs = staged.stage(requests)
    first = staged(inputs)
    before = len(jax.live_arrays())
    again = staged(inputs)
    assert len(jax.live_arrays()) == before + len(jax.tree.leaves(again))
    assert_bitwise(again, first)
    one, two, _ = staged.compile().executables
    handed = one(stack_of(found, 0), inputs[0][0])[0]
    two(stack_of(found, 1), handed)
    assert handed.is_deleted()


def stack_of(found: list[Tenant], weight: int) -> Any:
    return jnp.stack([params[weight] for _, params, _ in found])


def test_a_value_that_is_a_result_is_not_donated():
    def both(p: Any, x: Any) -> Any:
        y = jnp.tanh(x @ p[0])
        return y, jnp.tanh(y @ p[1])

    found = [(both, [array(4, 4), array(4, 4)], (array(3, 4),))]
    _, second = chain_of(check_fused(found, executables=2)).executables
    assert signature(second)[0] == ["f32[1,4,4]", "f32[3,4]"] and "alias={" not in second.as_text()


def test_loops_and_launches_stay_whole():
    def recurrent(p: Any, x: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = jnp.tanh(h @ p["h"] + x)
            return h, h

        last, all_of = lax.scan(step, jnp.zeros((1, 4)), x @ p["in"])
        return jnp.tanh(last @ p["out"]), all_of

    weights = [{"h": array(4, 4), "in": array(3, 4), "out": array(4, 2)} for _ in range(3)]
    found = [(recurrent, p, (array(5, 1, 3),)) for p in weights]
    fused = check_fused(found, executables=9)
    assert fused.report.executables == 3


def test_callbacks_run_once_each():
    seen: list[float] = []

    def told(p: Any, x: Any) -> Any:
        y = jnp.tanh(x @ p[0])
        jax.debug.callback(lambda y: seen.append(float(y)), y.sum())
        jax.debug.callback(lambda w: seen.append(float(w)), p[0].sum())
        return jnp.tanh(y @ p[1])

    found = [(told, [array(4, 4), array(4, 4)], (array(3, 4),)) for _ in range(2)]
    fused = fuse_tenants(found, executables=2)
    assert fused.report.executables == 2
    fused([x for *_, x in found])
    jax.effects_barrier()
    assert len(seen) == 4


@pytest.mark.parametrize("how", ["jit", "vmap", "grad"])
def test_no_part_runs_for_a_program_that_is_part_of_another(how):
    """Neither tenant reads what the other does: the first part could run without the second's input."""
    seen: list[float] = []

    def told(p: Any, x: Any) -> Any:
        y = jnp.tanh(x @ p[0])
        jax.debug.callback(lambda y: seen.append(float(y)), y.sum())
        return jnp.tanh(y @ p[1])

    mine, other = [array(4, 4), array(4, 4)], [array(5, 5), array(5, 5)]
    found = [(told, mine, (array(2, 4),)), (mlp, other, (array(3, 5),))]
    fused = fuse_tenants(found, executables=4, policy="never")
    assert fused.report.executables > 1
    x, y = found[0][2][0], found[1][2][0]
    wrapped: dict[str, Any] = {"jit": jax.jit, "vmap": jax.vmap, "grad": jax.grad}
    wanted = {
        "jit": lambda y: fused([(x,), (y,)])[1],
        "vmap": lambda y: fused([(x,), (y,)])[1],
        "grad": lambda y: fused([(x,), (y,)])[1].sum(),
    }
    wrapped[how](wanted[how])(jnp.stack([y, y]) if how == "vmap" else y)
    jax.effects_barrier()
    assert len(seen) == 1


def test_a_chain_is_called_as_it_was_compiled():
    fused = fuse_tenants(tenants(), executables=3)
    chain, inputs = chain_of(fused), [x for *_, own in tenants() for x in own]
    bank = list(fused.bank)
    want = [np.asarray(y) for y in chain(bank, inputs)]
    for wrong in ((bank, [*inputs, inputs[0]]), (bank, inputs[1:]), (bank, inputs, [])):
        with pytest.raises(TypeError, match="compiled for arguments"):
            chain(*wrong)
    assert_same(chain(bank, [np.asarray(x) for x in inputs]), want)
    assert chain.in_tree == jax.tree.structure((bank, inputs))


def test_what_nobody_reads_any_more_is_let_go():
    """Each layer is smaller than the last, so that no part could take the place of what it reads."""
    sizes = (64, 32, 16, 4)
    weights = [array(a, b) for a, b in zip((4, *sizes), sizes, strict=False)]
    fused = fuse_tenants([(mlp, weights, (array(2, 4),))], executables=4)
    alive: list[int] = []
    chain = chain_of(fused)
    calls, left = [step[0] for step in chain._steps], list[Any]()

    def counted(call: Any) -> Any:
        def run(*args: Any) -> Any:
            outs = call(*args)
            left.extend(weakref.ref(out) for out in outs)
            alive.append(sum(ref() is not None for ref in left))
            return outs

        return run

    rest = [step[1:] for step in chain._steps]
    chain._steps = [(counted(call), *own) for call, own in zip(calls, rest, strict=True)]
    fused([(array(2, 4),)])
    assert len(alive) == 4 and max(alive) == 2  # what a part reads, and what it leaves


def test_a_part_that_fails_takes_nothing_along():
    def fragile(p: Any, x: Any) -> Any:
        def refuse(y: Any) -> Any:
            if np.isnan(y).any():
                raise ValueError("not a number")
            return y

        y = jnp.tanh(x @ p[0])
        return jax.pure_callback(refuse, jax.ShapeDtypeStruct((3, 4), "float32"), jnp.tanh(y @ p[1]))

    found = [(fragile, [array(4, 4), array(4, 4)], (array(3, 4),)) for _ in range(2)]
    fused = check_fused(found, executables=2)
    assert fused.report.executables == 2
    with pytest.raises(Exception, match="not a number"):
        jax.block_until_ready(fused([(jnp.full((3, 4), jnp.nan),)] * 2))
    requests = [x for *_, x in found]
    assert_same(fused(requests), [alone_of(tenant) for tenant in found])


def test_keys_are_not_handed_on():
    def noisy(p: Any, key: Any, x: Any) -> Any:
        own, rest = jax.random.split(jax.random.wrap_key_data(key))
        y = jnp.tanh(x @ p[0] + jax.random.normal(own, (3, 4)))
        return jnp.tanh(y @ p[1] + jax.random.normal(rest, (3, 4)))

    key = jax.random.key_data(jax.random.key(0))
    found = [(noisy, [array(4, 4), array(4, 4)], (key, array(3, 4))) for _ in range(2)]
    check_fused(found, executables=2)


def test_as_a_part_of_a_callers_program_it_is_one():
    found = tenants()
    requests = [x for *_, x in found]
    parts, whole = (fuse_tenants(found, executables=n) for n in (3, 1))
    staged = parts.staged()
    inputs = staged.stage(requests)
    assert_bitwise(jax.jit(parts)(requests), jax.jit(whole)(requests))
    assert_same(jax.jit(staged)(inputs), staged(inputs))
    grads = [jax.grad(lambda x: run([(x,), *requests[1:]])[0].sum())(requests[0][0]) for run in (parts, whole)]  # noqa: B023
    assert_bitwise(*grads)
    several = jnp.stack([requests[0][0]] * 2)
    rows = jax.vmap(lambda x: parts([(x,), *requests[1:]])[0])(several)
    assert_same(rows, jnp.stack([whole(requests)[0]] * 2))
    assert str(parts.jaxpr.jaxpr.eqns[-1]) == str(whole.jaxpr.jaxpr.eqns[-1])


def test_by_default_it_is_cut_where_that_wins():
    """Sixty layers of 4096 for a GPU; not for a CPU, nor three of them."""

    def planned(layers: int, **options: Any) -> coalesce.Fused:
        params = [jax.ShapeDtypeStruct((4096, 4096), "float32")] * layers
        x = jax.ShapeDtypeStruct((16, 4096), "float32")
        return coalesce.fuse([coalesce.trace(mlp, params, x, name="a")], tuned=False, **options)

    gpu = planned(60, platform="gpu")
    assert gpu.report.executables == len(gpu.bundle.starts) == 2
    assert str(gpu.report).endswith(", in 2 executables")
    assert gpu.report.why_executables.startswith("2 executables of ")
    explained = gpu.explain().splitlines()
    (heading,) = (i for i, line in enumerate(explained) if line.startswith("# bundle: after cut_executables"))
    assert explained[heading + 1] == gpu.report.why_executables
    few = planned(3, platform="gpu").report
    assert few.executables == 1 and few.why_executables == (
        "one executable: the host takes 9 us for its 4 arguments and the launch of its 6 kernels"
    )
    cpu = planned(60).report
    assert (cpu.executables, cpu.why_executables) == (1, "one executable: kernels run as they are launched")
    assert planned(60, platform="gpu", executables=1).report.executables == 1


def test_what_is_counted():
    """Kernels of each stretch, and whether they are part of a graph: patches and their product; a softmax; two packs of
    one launch; steps of a loop; a convolution of the library, which XLA may leave out of a graph and may not."""

    def counted(fn: Any, *shapes: tuple[int, ...], **options: Any) -> list[tuple[int, bool]]:
        weights, x = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes[1:]], jnp.zeros(shapes[0])
        fused = coalesce.fuse(
            [coalesce.trace(fn, weights, x, name=name) for name in "ab"], platform="gpu", tuned=False, **options
        )
        costs = options.get("costs", GPU)
        return [(s.kernels, s.graph) for s in stretches(fused.bundle.schedule, fused.bundle.families, costs)]

    def conv(p: Any, x: Any, groups: int = 1) -> Any:
        x = lax.conv_general_dilated(
            jnp.exp(x), p[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )
        return jax.nn.softmax(x @ p[1])

    def scan(p: Any, x: Any) -> Any:
        return lax.scan(lambda h, _: (jnp.tanh(h @ p[0]), None), x, None, 5)[0] @ p[1]

    def reshaped(p: Any, x: Any) -> Any:
        return (x @ p[0]).reshape(-1, 4) @ p[1]

    image = (1, 8, 8, 4)
    assert counted(conv, image, (3, 3, 4, 4), (4, 4)) == [(3, True), (4, True)]
    assert counted(partial(conv, groups=4), image, (3, 3, 1, 4), (4, 4)) == [(2, True), (4, True)]
    assert counted(reshaped, (2, 8), (8, 8), (4, 4)) == [(1, True), (1, True)]
    looping = Costs(replace(GPU.device, loop_us=0.0))
    assert counted(scan, (2, 8), (8, 8), (8, 8), costs=looping) == [(10, False), (1, True)]
    assert counted(scan, (2, 8), (8, 8), (8, 8)) == [(10, True), (1, True)]


def test_arguments_count_with_what_reads_them_first():
    """As many as the parts take, but for what was read before them or is handed on."""

    def tied(p: Any, x: Any) -> Any:
        y = jnp.tanh(x @ p["a"]) * p["gain"][None]
        return jnp.tanh(y @ p["b"]) @ p["a"] + x

    weights = [{"a": array(8, 8), "b": array(8, 8), "gain": array(8)} for _ in range(3)]
    fused = check_fused([(tied, p, (array(2, 8),)) for p in weights], executables=3)
    counts = first_reads(fused.bundle, fused.bundle.schedule, fused.bundle.starts)
    assert sum(counts) == len(fused.bank) + 3
    taken = [len(jax.tree.leaves(part.args_info)) for part in chain_of(fused).executables]
    assert counts == [5, 1, 0] and taken == [5, 1 + 1, 0 + 3]


def test_texts_of_all_executables():
    fused = fuse_tenants(tenants(), executables=2)
    assert fused.as_text().count("HloModule") == 2
    assert len(fused.cost_analysis()) == len(fused.memory_analysis()) == 2
    assert fused.lower().as_text().count("module @") == 1


def test_mistakes():
    for wrong in (0, -1):
        with pytest.raises(PlanError, match=f"executables is {wrong}; a program is compiled in one or more"):
            fuse_tenants(tenants(), executables=wrong)
    fused = fuse_tenants(tenants(), executables=2)
    with pytest.raises(InvalidInput, match="tenant 't1'"):
        fused([(array(2, 8),), (array(3, 8),)])
    for starts in [(1,), (0, 99), (0, 3, 2), (0, 0), (0, len(fused.bundle.schedule))]:
        with pytest.raises(IRError, match="executables begin at"):
            check_bundle(replace(fused.bundle, starts=starts))


def test_a_launch_is_not_cut():
    """Packs of one launch are one unit: none begins in the middle of it."""
    found = [(lambda w, x: x @ w, array(4, n), (array(2, 4),)) for n in (3, 5)]
    bundle = fuse_tenants(found, policy="never").bundle
    packs = [item for item in bundle.schedule if isinstance(item, Pack)]
    together = replace(bundle, schedule=tuple(replace(pack, launch=0) for pack in packs))
    check_bundle(together)
    assert [s.kernels for s in stretches(together.schedule, together.families, GPU)] == [1]
    check_bundle(replace(bundle, starts=(0, 1)))
    with pytest.raises(IRError, match="executables begin at"):
        check_bundle(replace(together, starts=(0, 1)))


def test_inputs_may_lie_on_another_device():
    here, *others = jax.devices()
    if not others:
        pytest.skip("needs two devices")
    found = tenants()
    fused = fuse_tenants(found, executables=2)
    results = fused([jax.device_put(x, others[0]) for *_, x in found])
    assert all(x.devices() == {here} for x in jax.tree.leaves(results))


def test_equations_are_placed():
    """What the scopes of a program say, where the whole is cut by hand."""

    def program(w: Any, x: Any) -> Any:
        with jax.named_scope("executable0"):
            y = jnp.tanh(x @ w)
        with jax.named_scope("executable1"):
            z = jnp.tanh(y @ w)
        return y[0], z[0]

    whole, _ = J.stage(program, array(4, 4), array(2, 4))
    first, second = cut(whole, 1, 2).links
    assert (first.reads, second.reads) == ((0, 1), (0, 3))
    for link in (first, second):
        J.verify(link.jaxpr)
