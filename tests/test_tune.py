"""`tune` from programs to a database, and from a database to kernels and blocks in a fused program."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coalesce
from coalesce.__main__ import main
from coalesce.blocks import Blocks
from coalesce.bundle import packs
from coalesce.compile import default_device
from coalesce.errors import TuningError
from coalesce.html import html_page
from coalesce.kernels import indexed_gemm, KERNELS
from coalesce.measuring import (
    case as cases_module,
    measure as measure_module,
    profile as profile_module,
    tune as tune_module,
)
from coalesce.measuring.case import cases
from coalesce.measuring.measure import bank_count, entry_of, measure, worth_trying
from coalesce.measuring.profile import between_marks, kernels_us, Launch, MARK, span, total
from coalesce.measuring.tune import tune
from coalesce.tuning import candidate_name, Database, Entry, load, packaged, save
from tests.alone import array
from tests.compare import assert_same

BLOCKS = Blocks(16, 32, 16)


def net(p, x):
    x = jax.nn.relu(x @ p["a"] + p["bias"][None])
    return jax.lax.conv_general_dilated(
        x.reshape(1, 4, 4, 8), p["b"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


SHAPES = {"a": (8, 8), "bias": (8,), "b": (3, 3, 8, 4)}


def tenants():
    return [{name: array(*shape) for name, shape in SHAPES.items()} for _ in range(3)]


def programs(params):
    with jax.default_matmul_precision("highest"):
        return [coalesce.trace(net, p, array(16, 8), name=f"t{i}") for i, p in enumerate(params)]


def abstract():
    p = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    return [coalesce.trace(net, p, x, name=name) for name in "abc"]


def database(programs, kernel="indexed_gemm", blocks=BLOCKS):
    """As if this had been the fastest for everything."""
    found = cases(programs, default_device().device_kind)
    return Database({case.key: Entry(kernel, 1.0, blocks) for case in found})


def test_tuned_blocks_reach_the_kernel_and_change_no_result(monkeypatch):
    used = []
    product_of = indexed_gemm.product_of

    def watched(*args):
        product = product_of(*args)
        used.append(product.tiled.blocks)
        return product

    monkeypatch.setattr(indexed_gemm, "product_of", watched)
    params = tenants()
    given = programs(params)
    fused = coalesce.fuse(given, tuned=database(given))
    x = [array(16, 8) for _ in given]
    results = fused([(x,) for x in x])
    assert used == [BLOCKS, BLOCKS]
    assert [(pack.kernel, pack.blocks) for pack in packs(fused.bundle.schedule)] == [("indexed_gemm", BLOCKS)] * 2
    assert [len(pack.epilogue) > 0 for pack in packs(fused.bundle.schedule)] == [True, False]
    plain = coalesce.fuse(given, tuned=False)
    assert {pack.blocks for pack in packs(plain.bundle.schedule)} == {None}
    assert_same(results, plain([(x,) for x in x]))
    with jax.default_matmul_precision("highest"):
        assert_same(results, [net(p, x) for p, x in zip(params, x, strict=True)])


def test_explain_and_the_page_say_which_blocks():
    given = abstract()
    fused = coalesce.fuse(given, tuned=database(given))
    superkernels = fused.explain().split("# superkernels")[1].split("#")[0].strip().splitlines()
    assert all(": indexed_gemm 16x32x16 w4 s3 on array" in line for line in superkernels)
    assert "kernel: indexed_gemm 16x32x16 w4 s3" in html_page(fused)
    assert "w4 s3" not in coalesce.fuse(given, tuned=False).explain()


def test_the_callers_kernel_goes_first_with_its_own_best_blocks():
    given = abstract()
    known = database(given)
    both = {"indexed_gemm 32x32x32 w4 s2": 2.0, "indexed_gemm 64x32x32 w4 s2": 3.0, "separate": 1.0}
    known = Database({key: Entry("separate", 1.0, tried=both) for key in known.entries})

    def kernels(**options):
        bundle = coalesce.fuse(given, tuned=known, **options).bundle
        return {(pack.kernel, pack.blocks) for pack in packs(bundle.schedule)}

    assert kernels() == {("separate", None)}
    assert kernels(choose_kernel=lambda *_: "indexed_gemm") == {("indexed_gemm", Blocks(32, 32, 32, 4, 2))}
    assert kernels(platform="gpu") == {("batched_dot", None), ("conv_slices", None)}  # was measured elsewhere


def test_each_case_once_with_the_work_that_most_of_its_packs_do():
    def several(p, x):
        for w in p[:2]:
            x = jnp.tanh(x @ w)
        return x @ p[2]

    w = [array(4, 4) for _ in range(3)]
    found = cases([coalesce.trace(several, w, array(2, 4), name=name) for name in "ab"], "device")
    assert [(case.times, case.steps, case.key.width, case.key.rows) for case in found] == [(3, "tanh", 1, 2)]  # shared
    found = cases(abstract(), "device")
    assert [(case.times, case.steps) for case in found] == [(1, "add max"), (1, "")]


@pytest.mark.parametrize("place", [0, 1])
def test_all_kernels_of_a_case_do_the_same_work(place):
    """Those that leave the elementwise work to XLA too."""
    case = cases(programs(tenants()), "device")[place]
    weights = array(case.key.width, *case.op.rhs.shape)
    x, reads = array(*case.lhs.shape), [array(*struct.shape) for struct in case.reads]
    candidates = {0: ["batched_dot", "separate"], 1: ["conv_slices", "conv_grouped", "separate"]}[place]
    results = {}
    for kernel in ["indexed_gemm", *candidates]:
        rhs = jax.vmap(KERNELS[kernel].layout(case.op))(weights)
        assert (rhs.shape, rhs.dtype) == (case.rhs(kernel).shape, case.rhs(kernel).dtype)
        results[kernel] = jax.jit(case.run(kernel, BLOCKS if kernel == "indexed_gemm" else None))(x, rhs, *reads)
    for kernel in candidates:
        assert_same(results[kernel], results["indexed_gemm"])


def test_kernels_between_marks_belong_to_one_run():
    names = [("a", 1.0), ("b", 2.0), (f"{MARK}_0", 9.0), (MARK, 9.0), ("a", 4.0), (MARK, 9.0), ("left over", 5.0)]
    found = between_marks([Launch(name, float(i), us) for i, (name, us) in enumerate(names)])
    assert [total(own) for own in found] == [3.0, 0.0, 4.0] and span(found[1]) == 0.0
    assert span([Launch("a", 10.0, 5.0), Launch("b", 11.0, 2.0), Launch("c", 14.0, 3.0)]) == 7.0  # they overlap


def test_making_the_operands_does_not_count(monkeypatch):
    """Each of five runs of two programs gets operands of its own, made before it and apart from it."""
    events, made = [], []

    class Traced:
        def __enter__(self):
            events.clear()
            return events

        def __exit__(self, *_):
            pass

    def launched(name, us):
        events.append(Launch(name, float(len(events)), us))

    def operands():
        launched("copy", 100.0)
        made.append(len(made))
        return made[-1]

    def program(us):
        def run(turn, given):
            assert given == made[-1]
            launched("kernel", us + turn)
            return turn

        return run

    monkeypatch.setattr(profile_module, "traced", Traced)
    monkeypatch.setattr(profile_module, "marker", lambda: lambda: launched(MARK, 9.0))
    assert kernels_us([program(10.0), program(20.0)], operands) == [14.0, 25.0]  # of turns 0 to 8 and 1 to 9
    assert len(made) == 2 + 10
    monkeypatch.setattr(profile_module, "marker", lambda: lambda: None)
    with pytest.raises(TuningError, match="0 marks for 10 runs, two for each"):
        kernels_us([program(10.0), program(20.0)], operands)


def test_weights_come_from_memory():
    def banks(*shape):
        return bank_count(jax.ShapeDtypeStruct(shape, np.dtype(jnp.bfloat16)))

    assert banks(16, 2048, 1024) == 3 and banks(64, 4608, 512) == 3
    assert banks(16, 64, 64) == 64
    assert banks(16, 512, 512) * 16 * 512 * 512 * 2 >= 128 * 1024**2


def test_on_a_gpu_each_run_reads_another_bank_and_xla_compiles_alone(monkeypatch):
    """The profiler and the device apart, which are not here."""
    (case, _) = cases(abstract(), "device")
    held, compiled, results, measures = [], [], [], []

    class Lock(contextlib.AbstractContextManager):
        def __enter__(self):
            held.append(True)

        def __exit__(self, *_):
            held.clear()

    def compile_one(case, kernel, blocks, count):
        compiled.append((kernel, bool(held)))
        return None if kernel == "separate" else compiled_or_none(case, kernel, blocks, count)

    def kernels_us(programs, operands, measure):
        assert held
        measures.append(measure)
        results.extend([program(turn, operands()) for program in programs for turn in (0, 1)])
        return [float(i) for i in range(len(programs))]

    compiled_or_none = measure_module.compiled_or_none
    monkeypatch.setattr(measure_module, "on_a_gpu", lambda: True)
    monkeypatch.setattr(measure_module, "compiled_or_none", compile_one)
    monkeypatch.setattr(measure_module, "kernels_us", kernels_us)
    tried = [("batched_dot", None), ("separate", None), ("indexed_gemm", BLOCKS)]
    assert measure(case, tried, Lock()) == {"indexed_gemm 16x32x16 w4 s3": 0.0, "batched_dot": 1.0, "separate": None}
    assert compiled == [("indexed_gemm", False), ("batched_dot", True), ("separate", True)]
    (tiled,), *_, (xla,) = results
    assert tiled.shape == xla.shape == (3, 1, 16, 8)
    results.clear()
    assert measure(case, tried, Lock(), beside=True) == {
        **{"indexed_gemm 16x32x16 w4 s3": 0.0, "batched_dot": 0.5, "separate": None}  # half of both
    }
    assert measures == [total, span] and [len(result) for result in results] == [2] * 4


def test_what_did_not_run_is_kept_as_such(monkeypatch):
    (case, _) = cases(abstract(), "device")
    monkeypatch.setattr(measure_module, "in_program_us", lambda *_, **__: 2.5)
    times = measure(case, [("batched_dot", None)]) | {"indexed_gemm 16x16x16 w4 s2": None}
    entry = entry_of(case, times)
    assert entry is not None
    assert (entry.kernel, entry.us, entry.blocks) == ("batched_dot", 2.5, None)
    assert (entry.epilogue, entry.jax) == ("add max", jax.__version__)
    assert entry.tried == times
    assert entry_of(case, {"batched_dot": None}) is None


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    out, said, measured = tmp_path / "tuned.json", [], []

    def times(case, tried, lock=None):
        measured.append(case.op.kind)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {name: float(i + 1) for i, (name, _) in enumerate(tried)}

    monkeypatch.setattr(tune_module, "measure", times)
    with pytest.raises(KeyboardInterrupt):
        tune(abstract, out, say=said.append)
    assert len(load(out).entries) == 1
    done = tune(abstract, out, say=said.append)
    assert measured == ["dot", "conv", "conv"] and load(out) == done and len(done.entries) == 2
    kind = default_device().device_kind
    assert said[0] == f"2 cases on {kind}, 0 of them known"
    assert said[2] == f"2 cases on {kind}, 1 of them known"
    assert said[1].startswith("[1/2, 0 min left] 1 x dot [16,8] x [8,8] -> [16,8] x3: batched_dot 1.0 us, then ")
    tune(abstract, out, say=said.append)
    assert len(measured) == 3
    tune(abstract, out, seconds=-1.0, force=True, say=said.append)
    assert len(measured) == 3
    tune(abstract, out, force=True, say=said.append)
    assert len(measured) == 5


def test_company_is_measured_once_and_of_what_may_win(tmp_path, monkeypatch):
    out, said, measured = tmp_path / "tuned.json", [], []

    def times(case, tried, lock=None, beside=False):
        measured.append((case.op.kind, beside))
        return {name: 10.0 / (i + 1) if beside else i + 1.0 for i, (name, _) in enumerate(tried)}

    monkeypatch.setattr(tune_module, "measure", times)
    with pytest.raises(TuningError, match="on a GPU alone"):
        tune(abstract, out, company=True, say=said.append)
    monkeypatch.setattr(tune_module, "on_a_gpu", lambda: True)
    before = tune(abstract, out, say=said.append)
    after = tune(abstract, out, company=True, say=said.append)
    assert measured == [("dot", False), ("conv", False), ("dot", True), ("conv", True)]
    tune(abstract, out, company=True, say=said.append)
    assert len(measured) == 4 and load(out) == after
    for key, entry in after.entries.items():
        assert replace(entry, company={}) == before.entries[key]  # what was measured alone stays
        assert entry.company[entry.kernel] == 10.0 and len(entry.company) == len(entry.tried)
    tune(abstract, out, company=True, force=True, say=said.append)
    assert measured[4:] == [("dot", False), ("dot", True), ("conv", False), ("conv", True)]


def test_without_memory_for_company_what_was_measured_alone_is_kept(tmp_path, monkeypatch):
    def times(case, tried, lock=None, beside=False):
        if beside:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")
        return {name: i + 1.0 for i, (name, _) in enumerate(tried)}

    said = []
    monkeypatch.setattr(tune_module, "measure", times)
    monkeypatch.setattr(tune_module, "on_a_gpu", lambda: True)
    found = tune(abstract, tmp_path / "tuned.json", company=True, say=said.append)
    assert [(entry.us, entry.company) for entry in found.entries.values()] == [(1.0, {})] * 2
    again = tune(abstract, tmp_path / "tuned.json", company=True, say=said.append)
    assert again == found and said[-1].endswith("x3: not measured: RESOURCE_EXHAUSTED: out of memory")


def test_the_fastest_few_and_one_of_each_kernel_may_win():
    times = {f"indexed_gemm 16x16x{k} w4 s2": float(k) for k in (16, 32, 64, 128, 256, 512, 1024)}
    few = worth_trying({"separate": None, "batched_dot": 1e4, "batched_matvec": 1e3, **times})
    assert [kernel for kernel, _ in few] == ["indexed_gemm"] * 6 + ["batched_dot", "batched_matvec"]
    assert [blocks.k for _, blocks in few if blocks] == [16, 32, 64, 128, 256, 512]


def test_what_cannot_be_measured_is_said_and_left_out(tmp_path, monkeypatch):
    def times(case, tried, lock=None):
        if case.op.kind == "dot":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")
        return dict.fromkeys([name for name, _ in tried])

    said = []
    monkeypatch.setattr(tune_module, "measure", times)
    assert tune(abstract, tmp_path / "tuned.json", say=said.append).entries == {}
    assert said[1].endswith("x3: not measured: RESOURCE_EXHAUSTED: out of memory")
    assert said[2].endswith("x3: no candidate ran")


def test_end_to_end_on_this_device(tmp_path, monkeypatch, capsys):
    """What the command measures is what fuse uses."""
    (tmp_path / "tenants_of_test_tune.py").write_text("from tests.test_tune import abstract as programs\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(measure_module, "in_program_us", quick(measure_module.in_program_us))
    assert main(["tune", "tenants_of_test_tune:programs", "--out", "tuned.json"]) == 0
    out, err = capsys.readouterr()
    assert out == "tuned.json has 2 entries; fuse(..., tuned='tuned.json') uses it\n"
    assert err.count("\n") == 3
    entries = load(tmp_path / "tuned.json").entries
    assert all(entry.us >= 0 and entry.kernel in entry.tried for entry in entries.values())
    fused = coalesce.fuse(abstract(), tuned="tuned.json")
    assert sorted(pack.kernel for pack in packs(fused.bundle.schedule)) == sorted(e.kernel for e in entries.values())
    assert main(["tune", "--show", "tuned.json"]) == 0
    assert capsys.readouterr().out.startswith("op  ")


def quick(run):
    return lambda work, runs, **_: run(work, 1, repeats=3, seconds=0.0)


def test_tenants_of_a_model(monkeypatch):
    found = {}

    def tune(source, out, **options):
        found.update(options, source=source)
        return packaged()

    monkeypatch.setattr("coalesce.__main__.tune", tune)
    assert main(["tune", "--model=mlp", "--dtype=float32", "--tenants=2", "--workers=3", "--seconds=5"]) == 0
    assert [program.name for program in found["source"]()] == ["tenant 0", "tenant 1"]
    assert (found["workers"], found["seconds"]) == (3, 5.0) and not {"force", "company"} & found.keys()
    assert hash(found["source"]) is not None and len(cases_module.cases(found["source"](), "device")) > 0


def test_only_some_kernels(tmp_path, monkeypatch, capsys):
    said, measured = [], []

    def times(case, tried, lock=None):
        measured.extend(name for name, _ in tried)
        return {name: float(i + 1) for i, (name, _) in enumerate(tried)}

    monkeypatch.setattr(tune_module, "measure", times)
    found = tune(abstract, tmp_path / "tuned.json", kernels=["conv_slices"], say=said.append)
    assert measured == ["conv_slices"] and [entry.kernel for entry in found.entries.values()] == ["conv_slices"]
    assert said[1].endswith(": not measured: conv_slices cannot run it")


def test_some_kernels_are_measured_beside_what_runs_untuned(tmp_path, monkeypatch):
    """Or the best of a few would take the place of a better one."""
    measured = []

    def times(case, tried, lock=None):
        measured.append([name for name, _ in tried])
        return {candidate_name(*one): float(len(tried) - i) for i, one in enumerate(tried)}

    monkeypatch.setattr(tune_module, "measure", times)
    found = tune(abstract, tmp_path / "tuned.json", kernels=["conv_grouped", "separate"], say=lambda line: None)
    assert measured == [["separate", "batched_dot"], ["conv_grouped", "separate", "conv_slices"]]
    assert [entry.kernel for entry in found.entries.values()] == ["batched_dot", "conv_slices"]


def test_what_runs_untuned_is_what_the_same_database_says(tmp_path, monkeypatch):
    """Of a number of tenants near by, with its blocks; of the very number what is forced to be measured again."""
    measured = []

    def times(case, tried, lock=None):
        measured.append([candidate_name(*one) for one in tried])
        return {candidate_name(*one): float(len(tried) - i) for i, one in enumerate(tried)}

    monkeypatch.setattr(tune_module, "measure", times)
    out, near = tmp_path / "tuned.json", database(abstract())
    save(Database({replace(key, width=2): entry for key, entry in near.entries.items()}), out)
    tune(abstract, out, kernels=["separate"], say=lambda line: None)
    assert measured == [["separate", f"indexed_gemm {BLOCKS}"]] * 2
    measured.clear()
    save(database(abstract(), "conv_grouped"), out)
    tune(abstract, out, kernels=["separate"], force=True, say=lambda line: None)
    assert measured[-1] == ["separate", "conv_grouped"]


def test_a_broken_database_of_the_user_is_no_matter_for_another(tmp_path, monkeypatch):
    broken = tmp_path / "own.json"
    broken.write_text("{")
    monkeypatch.setenv("COALESCE_TUNED", str(broken))
    monkeypatch.setattr(tune_module, "measure", lambda case, tried, lock=None: {candidate_name(*tried[0]): 1.0})
    for kernels in ([], ["separate"]):
        found = tune(abstract, tmp_path / "new.json", kernels=kernels, force=True, say=lambda line: None)
        assert len(found.entries) == 2


def test_a_kernel_that_there_is_not(capsys):
    assert main(["tune", "--model=mlp", "--kernels=batched_dot,conv"]) == 2
    assert "there is no kernel 'conv'; there are batched_dot," in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a:b", "--model=mlp"]])
def test_one_source_at_a_time(arguments, capsys):
    assert main(["tune", *arguments]) == 2
    assert "UsageError: tune takes MODULE:FUNCTION or --model, one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("a:b --dtype=float32", "--dtype is of a --model; a:b says which tenants it has"),
        ("a:b --tenants=4", "--tenants is of a --model"),
        ("--show --model=mlp", "takes nothing else: leave --model out"),
        ("--company --show", "takes nothing else: leave --company out"),
        ("a:b --show", "takes nothing else: leave a:b out"),
        ("--model=mlp --seconds=-1", "--seconds is -1; it is a time from 0"),
        ("--model=mlp --seconds=nan", "--seconds is nan"),
        ("--model=mlp --workers=-1", "--workers is -1"),
        ("--model=mlp --tenants=0", "--tenants is 0; it is how many of the model, one or more"),
    ],
)
def test_options_that_say_nothing_are_refused(arguments, told, capsys):
    assert main(["tune", *arguments.split()]) == 2
    assert f"UsageError: {told}" in capsys.readouterr().err.replace("tune --show prints what was measured and ", "")


def test_a_database_that_is_none_is_a_message(tmp_path, capsys):
    (tmp_path / "tuned.json").write_text("no")
    assert main(["tune", "--show", str(tmp_path / "tuned.json")]) == 2
    assert "TuningError: " in capsys.readouterr().err


def test_show_what_fuse_uses(capsys):
    assert main(["tune", "--show"]) == 0
    assert "NVIDIA H200" in capsys.readouterr().out
