"""multiplexing runs, from its command line to its files; peers compute what JAX does. No test looks at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from coalesce.models import by_name
from experiments import methods, pairs, peers_processes, peers_torch, peers_worker
from experiments.cells import tenants_of
from experiments.floor import Ceilings, floor_row, heavy_work
from experiments.measure import each_round, Timing
from experiments.methods import Candidate
from experiments.multiplexing_report import reasons, report, Times
from experiments.peers_common import Burst, CannotRun, Cell, OneTenant, Peer
from experiments.peers_jax import own_batch

ROOT = Path(__file__).parent.parent
LIMITS = pairs.Limits(tolerance=1e-5, repeats=2, seconds=10)
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"layers": 2, "width": 4},
    "resnet18": {"image_size": 32, "width": 4, "classes": 5, "stages": (1, 1)},
    "resnet50": {"image_size": 32, "width": 4, "classes": 5, "stages": (1, 2)},
    "vgg16": {"image_size": 8, "stages": ((4, 4), (8,)), "hidden": 16, "classes": 5},
    "mobilenetv2": {"image_size": 32, "stages": ((1, 4, 1, 1), (6, 8, 2, 2)), "stem": 4, "last": 16, "classes": 5},
    "bert_base": {"layers": 2, "hidden": 16, "heads": 2, "vocabulary": 50, "length": 8, "classes": 3},
    "vit_b16": {"layers": 2, "hidden": 16, "heads": 2, "patch": 8, "image_size": 16, "classes": 5},
    "lstm": {"layers": 2, "features": 6, "hidden": 8, "steps": 4, "classes": 5},
}


def multiplex(folder: Path, *arguments: str) -> dict[str, Any]:
    """Runs it in a process of its own: its flags have names that other experiments have too."""
    command = [sys.executable, "-m", "experiments.multiplexing", "--models=mlp", "--fields=mlp.layers=2,mlp.width=4"]
    command += ["--tenants=2", "--dtypes=float32", "--repeats=2", f"--out={folder}", *arguments]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "multiplexing.json").read_text()) | {"printed": run.stdout}


def cell_of(name: str, count: int = 2, batch: int = 1) -> Cell:
    model = by_name(name, **SMALL[name])
    return Cell(model, SMALL[name], "float32", batch, None, tenants_of(model, count, batch), [{}], ExitStack())


@pytest.mark.once
def test_multiplexing_writes_pairs_and_goes_on_where_it_stopped(tmp_path):
    before = multiplex(tmp_path, "--methods=jax_in_turn,xla_concurrent,coalesced,floor")["rows"]
    assert [(row["method"], row["kind"], row["pair"]) for row in before] == [
        ("jax_in_turn", "time", "jax_in_turn"),
        ("coalesced", "coalesced", "jax_in_turn"),
        ("xla_concurrent", "space", "xla_concurrent"),
        ("coalesced", "coalesced", "coalesced"),
        ("floor", "floor", "floor"),
    ]
    assert before[2]["failed"] == "needs a GPU: command buffers are CUDA graphs"
    for row in (*before[:2], before[3]):
        assert (row["model"], row["dtype"], row["tenants"], row["batch"]) == ("mlp", "float32", 2, 1)
        assert 0 < row["round_us_p10"] <= row["round_us_median"] <= row["round_us_p90"] <= row["latency_p99_us"]
        assert row["sustained_us_median"] > 0
        assert row["error"] <= 1e-5 and not row["failed"] and row["tried"]

    result = multiplex(tmp_path, "--methods=jax_in_turn,processes,floor")
    rows = {(row["method"], row["pair"]): row for row in result["rows"]}
    assert [row for row in result["rows"] if row["pair"] != "processes"] == before
    processes, ours = rows["processes", "processes"], rows["coalesced", "processes"]
    assert processes["error"] <= 1e-5 and not ours["failed"] and "JAX executables" in processes["how"]
    assert [bool(tried.get("failed")) for tried in processes["tried"]] == [False, True]  # PyTorch needs a GPU
    assert result["printed"].count("| processes (time) ") == 2 and "Sustained: " in result["printed"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("multiplexing.json", "multiplexing.md", "multiplexing_mlp_float32.png")
    }


@pytest.mark.once
def test_cells_that_are_built_beside_each_other_end_up_in_one_file(tmp_path):
    flags = "--methods=jax_in_turn,floor", "--tenants=1,2", "--beside=2"
    result = multiplex(tmp_path, *flags)
    rows = [(row["tenants"], row["method"]) for row in result["rows"]]
    assert rows == [(n, method) for n in (1, 2) for method in ("jax_in_turn", "coalesced", "floor")]
    assert not any(row["failed"] for row in result["rows"])
    assert multiplex(tmp_path, *flags)["rows"] == result["rows"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_the_best_of_what_works_counts():
    cell = cell_of("mlp")
    want = pairs.reference(cell)

    def configurations(cell: Cell) -> Iterator[tuple[dict[str, Any], Any]]:
        yield {"is": "right"}, lambda: methods.sequential(cell.tenants, {})
        yield {"is": "wrong"}, lambda: iter([Candidate("zeros", lambda: [jax.numpy.zeros((1, 4))] * 2)])
        yield {"is": "broken"}, lambda: iter([1 // 0])
        raise CannotRun("no more of them")

    best = pairs.best_of(configurations, cell, want, LIMITS)
    assert best.burst and best.burst.candidate.how == "one executable for all tenants" and not best.failed
    right, *others = best.tried
    assert right["chosen"] and right["error"] == 0
    assert [tried["failed"] for tried in others] == [
        "outputs differ by 1.0e+00, more than 1e-05",
        "ZeroDivisionError: integer division or modulo by zero",
        "no more of them",
    ]

    def nothing(cell: Cell):
        raise CannotRun("not here")

    def dies(cell: Cell) -> Iterator[tuple[dict[str, Any], Any]]:
        right, calls = next(methods.sequential(cell.tenants, {})), iter(range(4))

        def run() -> Any:
            if next(calls, None) is None:
                raise CannotRun("it died")
            return right.run()

        yield {}, lambda: iter([Candidate("dies", run)])
        yield {}, lambda: iter([Candidate("lives", right.run)])

    assert "while choosing: it died" in pairs.best_of(dies, cell, want, LIMITS).failed
    (row,) = pairs.measure_pair(cell, "peer", Peer("space", nothing), best, want, LIMITS)
    assert row["failed"] == "not here" and row["kind"] == "space"


def test_a_burst_is_several_rounds():
    cell = cell_of("mlp")
    want = pairs.reference(cell)
    candidate, latencies = next(methods.sequential(cell.tenants, {})), []
    ended: list[str] = []

    def run() -> Any:
        latencies.extend([0.25] * 10)
        return candidate.run()

    def burst(cell: Cell) -> Iterator[tuple[dict[str, Any], Any]]:
        cell.until_end.callback(ended.append, "processes")
        yield {}, lambda: iter([Burst(Candidate("ten at once", run), 10, latencies)])

    ours = pairs.best_of(pairs.coalesced, cell, want, LIMITS)
    theirs, coalesced = pairs.measure_pair(cell, "burst", Peer("time", burst), ours, want, LIMITS)
    assert theirs["latency_p99_us"] == 250_000 and theirs["how"] == "ten at once" and ended == ["processes"]
    assert (coalesced["method"], coalesced["kind"]) == ("coalesced", "coalesced")
    assert each_round(Timing(40.0, 20.0, 60.0, 80.0, 7), 10) == Timing(4.0, 2.0, 6.0, 8.0, 7)


def test_a_process_serves_in_its_fastest_form(monkeypatch):
    def broken() -> Candidate:
        raise RuntimeError("does not compile")

    took = {"plain": 2.0, "prepared": 1.0}
    monkeypatch.setattr(peers_worker, "seconds", lambda candidate: took[candidate.how])
    forms = {(how, False): lambda how=how: Candidate(how, list) for how in took}
    form, candidate = peers_worker.fastest({("prepared", True): broken, **forms})
    assert form == ["prepared", False] and candidate.how == "prepared"
    with pytest.raises(RuntimeError, match="does not compile"):
        peers_worker.fastest({("prepared", True): broken})


@pytest.mark.parametrize("autotune", [False, True])
def test_processes_try_all_forms_that_streams_do(autotune, monkeypatch):
    cell, specs = replace(cell_of("mlp"), autotune=autotune), []

    def workers(given: Any, env: Any) -> Any:
        specs.extend(given)
        return nullcontext(SimpleNamespace(burst=lambda requests: [], outputs=[], form=[]))

    monkeypatch.setattr(peers_torch, "check", lambda cell: None)
    monkeypatch.setattr(peers_torch, "prepared_cell", lambda cell: None)
    monkeypatch.setattr(peers_torch, "variants", lambda cell, traced=False: ("plain",))
    monkeypatch.setattr(peers_processes, "Workers", workers)
    monkeypatch.setattr(peers_worker, "fastest", lambda forms: ([*forms], None))
    with cell.until_end:
        next(peers_processes.processes(cell, "torch", {}))
    forms, _ = peers_worker.build(OneTenant(**json.loads(json.dumps(asdict(specs[0])))))
    assert forms == peers_torch.forms(cell)
    assert [how for _, how in forms].count(peers_torch.AUTOTUNED) == autotune


def test_rounds_in_a_row_are_waited_for_once():
    calls: list[str] = []

    def waits() -> str:
        calls.append("run")
        return "last"

    burst = Burst(Candidate("torch's", waits, issue=lambda: calls.append("issue")), 1)
    row = pairs.in_a_row(burst)
    assert row.candidate.run() == "last" and row.rounds == 10
    assert calls == ["issue"] * 9 + ["run"]
    assert pairs.in_a_row(row) is row


def test_one_tenant_serves_all_requests_as_its_batch():
    cell = cell_of("resnet18", count=3, batch=2)
    best = pairs.best_of(own_batch, cell, pairs.reference(cell), LIMITS)
    assert best.burst and best.error <= 1e-5


def test_floor_of_an_mlp():
    model = by_name("mlp", layers=3, width=8)
    ceilings = Ceilings(gbs=2.0, tflops=1e-6)  # 2,000 bytes and 1 FLOP a microsecond
    row = floor_row(model, 5, 4, ceilings)
    assert row["facts"]["heavy_ops"] == 3 and row["facts"]["flops"] == 3 * 2 * 4 * 8 * 8
    assert row["facts"]["bytes"] == 3 * 4 * (8 * 8 + 4 * 8 + 4 * 8)
    assert row["round_us_median"] == 5 * row["facts"]["flops"]
    assert floor_row(model, 5, 4, Ceilings(2.0, 1.0))["round_us_median"] == 5 * row["facts"]["bytes"] / 2000


def test_floor_reads_the_weights_of_a_loop_once():
    """The product of the inputs of all steps is one, before the loop."""
    inputs, hidden, head = heavy_work(by_name("lstm", layers=1, features=6, hidden=8, steps=4, classes=5), 1)
    assert (inputs.times, inputs.op.m, inputs.op.k) == (1, 4, 6) and head.op.n == 5
    assert inputs.nbytes == 4 * (6 * 32 + 4 * (6 + 32))
    assert hidden.times == 4 and hidden.nbytes == 4 * (8 * 32 + 4 * (8 + 32)) and hidden.flops == 4 * 2 * 8 * 32


def test_ratios_are_those_of_a_pair():
    def row(method: str, kind: str, pair: str, us: float, failed: str = "") -> dict[str, Any]:
        times = {} if failed else {f"round_us_{q}": us for q in ("median", "p10", "p90")} | {"latency_p99_us": us}
        cell = {"model": "mlp", "dtype": "float32", "tenants": 8, "batch": 1}
        return {
            **cell,
            "method": method,
            "kind": kind,
            "pair": pair,
            **times,
            "failed": failed,
            "how": "",
            "error": 0.0,
        }

    rows = [
        row("slow", "time", "slow", 90.0),
        row("coalesced", "coalesced", "slow", 10.0),
        row("quick", "time", "quick", 60.0),
        row("coalesced", "coalesced", "quick", 20.0),
        row("broken", "space", "broken", 0.0, failed="no device"),
        row("floor", "floor", "floor", 5.0),
    ]
    times = Times(rows)
    assert times.best(8, "time") == "quick" and times.faster(8, "quick") == 3.0 and times.of(8, "coalesced") == 15.0
    assert times.best(8, "space") is None
    assert list(reasons(rows)) == ["- broken with 8 tenants: no device"]
    text = report({"device": "d", "versions": {"jax": "1"}, "date": "", "note": "", "command": ""}, rows)
    lines = {line[0].strip(): line[1].strip() for row in text.splitlines() if len(line := row.split("|")[1:]) == 3}
    assert lines["quick (time)"] == "60 (3.00x)" and lines["over the best time"] == "3.00x"
    assert lines["over the best space"] == "-" and lines["of the floor"] == "33%"
    alone = report(
        {"device": "d", "versions": {"jax": "1"}, "date": "", "note": "", "command": ""},
        [row("coalesced", "coalesced", "coalesced", 10.0)],
    )
    assert "| coalesced           | 10 |" in alone and "against" not in alone and "1.00x" not in alone


def test_coalesce_alone_says_why_it_did_not_run():
    def run():
        raise RuntimeError("out of memory")

    nothing = pairs.Best(None, 0.0, ({"how": "", "options": {}, "failed": "no device"},))
    (row,) = pairs.measure_alone(nothing, LIMITS)
    assert (row["method"], row["kind"], row["failed"]) == ("coalesced", "coalesced", "no device")
    (row,) = pairs.measure_alone(pairs.Best(Burst(Candidate("", run), 1), 0.0, ()), LIMITS)
    assert row["failed"].startswith("while timing: ") and "out of memory" in row["failed"]


@pytest.mark.parametrize("name", SMALL)
def test_torch_models_compute_what_flax_does(name):
    torch = pytest.importorskip("torch")
    from experiments.torch_weights import variants

    cell = cell_of(name, batch=2)
    want = [np.asarray(jax.jit(cell.model.apply)(p, *x)) for p, x in tenants(cell)]
    with torch.no_grad():
        for weights in variants(cell.model):
            for call, output in zip(peers_torch.parts_of(cell, "cpu", weights).calls(), want, strict=True):
                np.testing.assert_allclose(call().numpy(), output, rtol=0, atol=2e-5 * np.abs(output).max())


@pytest.mark.parametrize("name", ["mlp", "resnet18", "bert_base", "lstm"])
def test_torch_peers_agree_with_jax(name, monkeypatch):
    """All that they do but record CUDA graphs, on a CPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(peers_torch, "recorded", lambda call: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    cell = cell_of(name)
    want = pairs.reference(cell)
    for weights in peers_torch.variants(cell, traced=True):
        parts = peers_torch.parts_of(cell, "cpu", weights)

        def configurations(cell: Cell, parts: peers_torch.Parts = parts):
            yield {}, lambda: peers_torch.graph_each(parts.calls())
            yield {}, lambda: peers_torch.graph_of_all(parts.calls(), streams=False)
            yield {}, lambda: peers_torch.stacked(parts, graph=True)

        best = pairs.best_of(configurations, cell, want, LIMITS)
        assert [tried.get("failed") for tried in best.tried] == [None] * 3


def tenants(cell: Cell) -> Iterator[tuple[Any, Any]]:
    return zip(cell.tenants.params, cell.tenants.inputs, strict=True)


def test_pallas_kernels_are_a_configuration_of_ours():
    """On a GPU one that is tried; here it is interpreted."""
    cell = cell_of("mlp", batch=2)
    kernels = {**methods.OWN_CHOICE, "Pallas kernels": methods.by_pallas}
    candidates = list(methods.fused(cell.tenants, {}, kernels=kernels, staged=True))
    assert [candidate.how for candidate in candidates] == [
        "",
        "inputs and outputs stay stacked",
        "Pallas kernels",
        "Pallas kernels, inputs and outputs stay stacked",
    ]
    for candidate in candidates:
        error, row = pairs.check(candidate, {}, pairs.reference(cell), 1e-5)
        assert error <= 1e-5 and "failed" not in row


def test_clients_of_mps_count_the_devices_that_it_sees():
    assert peers_processes.renumbered("") == {}
    assert peers_processes.renumbered("1") == {"CUDA_VISIBLE_DEVICES": "0"}
    assert peers_processes.renumbered("3,GPU-5") == {"CUDA_VISIBLE_DEVICES": "0,1"}
