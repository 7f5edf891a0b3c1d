"""The bank: rows written in place while calls are under way, growth, what it takes; and what executables do with it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from coalesce.bundle import packs
from coalesce.errors import OutOfDeviceMemory
from coalesce.runtime.bundle import Bundle
from coalesce.runtime.device import Device
from coalesce.runtime.host import courses_of, Host
from coalesce.runtime.loaded import Home, Loaded
from coalesce.serving.executable import trace_executable
from coalesce.serving.page_locked import page_locked
from coalesce.serving.staging import Filled, Lane, SPARES, zero
from coalesce.serving.store import free_bytes, Preparer
from tests.alone import array
from tests.compare import assert_bitwise
from tests.hlo import instructions
from tests.serving import assert_alone, BY_SLOT, fit_of, results, serve
from tests.serving_models import mlp, MODELS, tenants


def test_growth_keeps_slots_and_results():
    found = tenants("mlp", 3)
    serving = serve([fit_of(fn, p, x) for fn, p, x in found[:2]], capacity=2)
    store, lanes = serving.store, [(t, found[t][2]) for t in (1, 0)]
    before = serving.call(serving.executable(2), lanes)
    assert store.free == 0
    needed = store.bytes_to_grow(4)
    assert needed == 2 * serving.schema.slot_bytes + max(x.nbytes for x in store.bank)
    store.make_ready(4)
    store.grow(4)
    assert store.capacity == 4 and store.nbytes == 4 * serving.schema.slot_bytes
    assert_bitwise(serving.call(serving.executable(2), lanes), before)
    serving.slots.append(store.take())
    serving.fits.append(fit_of(*found[2][:2], found[2][2]))
    store.write(serving.slots[2], Preparer(serving.schema)(serving.fits[2]))
    (got,) = serving.call(serving.executable(1), [(2, found[2][2])])
    assert serving.slots == [0, 1, 2]
    assert_alone(got, found[2])


def test_slots_are_given_out_again_the_lowest_first():
    store = serve([fit_of(*MODELS["mlp"]()[:2], (array(2, 6),))], capacity=4).store
    assert [store.take(), store.take()] == [1, 2]
    store.release(1)
    store.release(0)
    assert [store.take(), store.take(), store.take()] == [0, 1, 3]
    assert store.free == 0


def test_a_write_changes_no_call_before_it_and_moves_nothing():
    """Many calls and writes, none of which is waited for."""
    found = tenants("mlp", 2)
    fits = [fit_of(fn, p, x) for fn, p, x in found]
    serving = serve(fits[:1], capacity=3)
    prepare, executable = Preparer(serving.schema), serving.executable(1)
    rows = [prepare(one) for one in fits]
    places = {x.unsafe_buffer_pointer() for x in serving.store.bank}
    staged = executable.stage([[serving.lane(0, found[0][2])]])
    pending = []
    for turn in range(60):
        serving.store.write(serving.slots[0], rows[turn % 2])
        pending.append(executable.run([serving.store.bank], [None], staged))
    assert {x.unsafe_buffer_pointer() for x in serving.store.bank} == places
    for turn, outputs in enumerate(pending):
        got = results(fits[0], [x[0] for x in executable.fetch(outputs)[0]])
        assert_alone(got, (mlp, found[turn % 2][1], found[0][2]))


def test_only_rows_in_use_move_and_each_once():
    """On a CPU weights are gathered; nothing else of their size is copied, and never the bank."""
    weight = 64 * 64
    fits = [fit_of(mlp, [(array(64, 64), array(64)) for _ in range(2)], (array(3, 64),)) for _ in range(2)]
    serving = serve(fits, capacity=16)
    text = serving.executable(4).compiled.as_text()
    moves = [i for i in instructions(text) if i.opcode in ("copy", "concatenate", "transpose", "pad", "slice")]
    assert not [i.text for i in moves if i.elements >= weight]
    assert max(i.elements for i in instructions(text) if i.opcode != "parameter") <= 4 * weight


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by JAX 0.11 and newer
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_kernels_of_a_gpu_read_the_bank_in_place(name):
    """Lowered for a GPU on a machine without one: no gather of weights, of the size of a bank no result at all."""
    found = tenants(name, 2)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):  # equations remember it, from JAX 0.12 on
        fits = [fit_of(fn, p, x) for fn, p, x in found]
    serving = serve(fits, capacity=8, options=BY_SLOT)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = trace_executable([serving.lanes(4)], packed=True)
        text = traced.function.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == len(list(packs(traced.bundle.schedule))) == 3
    (bank,) = serving.store.bank
    gathers = [line for line in text.splitlines() if "stablehlo.gather" in line or "stablehlo.dynamic_slice" in line]
    assert not [line for line in gathers if f"tensor<{bank.shape[0]}x{bank.shape[1]}xf32>" in line]


@pytest.mark.parametrize("gathered", [False, True])
def test_what_a_call_brings_may_lie_in_one_buffer(gathered, monkeypatch):
    """Of all dtypes; as it does where there is a transfer. Its rows may be copied by one call."""
    monkeypatch.setattr("coalesce.serving.gather.LARGE", 0)
    monkeypatch.setattr("coalesce.serving.staging.is_worth_it", lambda: gathered)
    for name in ("mixed", "noisy"):
        found = tenants(name, 2)
        serving = serve([fit_of(fn, p, x) for fn, p, x in found])
        executable = serving.executable(4, packed=True)
        assert executable.stage([[serving.lane(0, found[0][2])]]).arguments.ndim == 1
        for t, got in zip((1, 0, 1), serving.call(executable, [(t, found[t][2]) for t in (1, 0, 1)]), strict=True):
            assert_alone(got, found[t])


@pytest.mark.parametrize("locked", [True, False])
def test_memory_of_calls_that_have_ended_is_filled_again(locked, monkeypatch):
    """Whoever had it before leaves nothing in lanes that are not used; what has not ended keeps its own."""
    if locked:
        monkeypatch.setattr("coalesce.serving.page_locked.LITTLE", 0)
    found = tenants("mixed", 2)
    serving = serve([fit_of(fn, p, x) for fn, p, x in found])
    executable = serving.executable(4, packed=True)

    def lanes(*own: int) -> list[Lane]:
        return [serving.lane(t, found[t][2]) for t in own]

    assert len(executable.staging._spare) == SPARES, "what the first calls need is there before them"
    first, second = executable.stage([lanes(0, 1, 0)]), executable.stage([lanes(1)])
    more = [executable.stage([lanes(1)]) for _ in range(SPARES - 2)]
    assert not executable.staging._spare and (first.locked is not None) == locked
    assert not np.shares_memory(first.given[0].slots, second.given[0].slots)
    third = executable.stage([lanes(1)])
    executable.take_back(first)
    assert third.locked is None, "there is more of it, but not of the kind that was made ready"
    again = executable.stage([lanes(1)])
    assert np.shares_memory(first.given[0].slots, again.given[0].slots)
    assert not any(np.any(own[1:].view(np.uint8)) for own in again.given[0].inputs)
    outputs = executable.fetch(executable.run([serving.store.bank], [None], again))[0]
    assert_alone(results(serving.fits[1], [x[0] for x in outputs]), found[1])
    for own in (third, second, again, *more, *(executable.stage([lanes(0)]) for _ in range(3))):
        executable.take_back(own)
    most = SPARES + 1 if locked else SPARES
    assert len(executable.staging._spare) == most, "what was made ready, and one more at most"


def test_page_locked_memory_outlives_calls_that_fail(monkeypatch):
    """It is made once: whether the lanes cannot be staged, nothing is launched, or what was launched fails."""
    monkeypatch.setattr("coalesce.serving.page_locked.LITTLE", 0)
    found = tenants("mixed", 2)
    serving = serve([fit_of(fn, p, x) for fn, p, x in found])
    executable, device, own = serving.executable(4, packed=True), Device(), serving.lane(0, found[0][2])

    def staged() -> Filled:
        filled = executable.stage([[own] * 3])
        assert filled.locked is not None, "an executable that has failed has none any more"
        return filled

    def cannot_launch(*_: Any) -> Any:
        raise ValueError("no")

    fails = dataclasses.replace(executable, compiled=cannot_launch)
    courses = courses_of([0], serving.schema.segments, 0, [()])
    loaded = Loaded(fails, (Home(Host(serving.schema, Preparer(serving.schema), serving.store, courses), courses[0]),))
    for _ in range(SPARES + 1):
        with pytest.raises(ValueError, match="no"):
            loaded.run(device.at, [[own] * 3], [])
    for _ in range(SPARES + 1):
        filled = staged()
        outputs = executable.run([serving.store.bank], [None], filled)
        for x in jax.tree.leaves(outputs):
            x.delete()  # whoever fetches it is told an error
        bundle = Bundle(device.at, executable, [None], filled, outputs, [])
        for _ in range(2):
            with pytest.raises(RuntimeError, match="deleted"):
                bundle.wait()
    for _ in range(SPARES + 1):
        with pytest.raises((ValueError, TypeError)):
            executable.stage([[own, own, own._replace(inputs=[np.zeros((7, 7))] * len(own.inputs))]])
    assert len(executable.staging._spare) == SPARES, "none is there twice"
    again = executable.stage([[own]])
    assert not any(np.any(x[1:].view(np.uint8)) for x in again.given[0].inputs)
    outputs = executable.fetch(executable.run([serving.store.bank], [None], again))[0]
    assert_alone(results(serving.fits[0], [x[0] for x in outputs]), found[0])


def test_page_locked_memory_is_not_written_while_it_is_sent(monkeypatch):
    """A call that fails does not end the transfer to it."""
    monkeypatch.setattr("coalesce.serving.page_locked.LITTLE", 0)
    found = tenants("mlp", 1)
    serving = serve([fit_of(fn, p, x) for fn, p, x in found])
    executable = serving.executable(2, packed=True)
    seen: list[Any] = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: seen.append((x, len(executable.staging._spare))))
    filled = executable.stage([[serving.lane(0, found[0][2])]])
    sent = filled.arguments
    executable.take_back_failed(filled)
    assert len(seen) == 1 and seen[0][0] is sent
    assert (seen[0][1], len(executable.staging._spare)) == (SPARES - 1, SPARES)


def test_what_is_written_into_page_locked_memory_is_what_the_device_gets():
    assert page_locked(1000, np.dtype(np.uint32)) is None, "little is sent sooner with the call"
    locked = page_locked(100_000, np.dtype(np.uint32))
    assert locked is not None and not locked.view.any()
    sent = []
    for i in range(3):
        locked.view[:] = np.arange(100_000) + i
        sent.append(jax.block_until_ready(locked.sent()))
    assert sent[0].aval == jax.device_put(locked.array, locked.there).aval != locked.array.aval, "it is not on the host"
    for i, x in enumerate(sent):
        assert_bitwise(np.asarray(x), (np.arange(100_000) + i).astype(np.uint32))


def test_arrays_of_the_host_belong_to_one_call_where_the_device_reads_them():
    found = tenants("mlp", 1)
    serving = serve([fit_of(fn, p, x) for fn, p, x in found])
    executable = serving.executable(2, packed=False)
    first = executable.stage([[serving.lane(0, found[0][2])]])
    executable.take_back(first)
    again = executable.stage([[serving.lane(0, found[0][2])]])
    assert not np.shares_memory(first.given[0].inputs[0], again.given[0].inputs[0])


def test_zeros_of_every_dtype():
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, np.bool_, np.int64, np.float32):
        stack = np.ones((3, 2), dtype)
        zero(stack[1:])
        assert stack[0].all() and not stack[1:].any()


def test_small_and_wide_dtypes_are_packed():
    def small(p, a, b, c):
        return (a + p["x"]).astype(jnp.float32), b ^ p["y"], c + jnp.int8(1)

    params = {"x": jnp.asarray([1, 2, 3], jnp.bfloat16), "y": jnp.asarray([True, False, True])}
    x = (jnp.asarray([0.5, 1, 2], jnp.bfloat16), jnp.asarray([True, True, False]), jnp.arange(5, dtype=jnp.int8))
    serving = serve([fit_of(small, params, x)])
    (got,) = serving.call(serving.executable(2, packed=True), [(0, x)])
    assert_alone(got, (small, params, x))


def test_a_limit_says_what_is_left():
    serving = serve([fit_of(*MODELS["mlp"]()[:2], (array(2, 6),))], capacity=2)
    used = serving.store.nbytes
    assert used == 2 * serving.schema.slot_bytes
    assert free_bytes([serving.store], used + 100) in range(101)
    if jax.default_backend() == "cpu":
        assert free_bytes([serving.store], used + 100) == 100 and free_bytes([serving.store]) is None


def test_garbage_is_looked_for_only_where_the_device_itself_has_no_room(monkeypatch):
    free, collected = [10], list[int]()

    def collect() -> None:
        collected.append(free[0])
        free[0] = 100

    monkeypatch.setattr("coalesce.runtime.room.set_aside", SimpleNamespace(collect=collect))
    for module in ("coalesce.runtime.room", "coalesce.serving.store"):
        monkeypatch.setattr(f"{module}.free_there", lambda: free[0])
    with pytest.raises(OutOfDeviceMemory, match="and 5 are free"):
        Device(memory_limit=5).check_room("a tenant", 8)
    assert not collected
    Device().check_room("a tenant", 50)
    assert collected == [10]
