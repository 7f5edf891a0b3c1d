"""One transfer each way for a call, where the device has memory of its own; here it is taken for such a one."""

from __future__ import annotations

import dataclasses
import gc
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.runtime.bundle import copied
from coalesce.runtime.runtime import Runtime
from coalesce.serving import captured as captured_module
from coalesce.serving.executable import compile_executable, Executable
from coalesce.serving.page_locked import can_leave
from coalesce.serving.staging import Lane
from coalesce.serving.words import can_pack, from_words, to_words, views, words
from tests.alone import array
from tests.serving import assert_alone, CPU, fit_of, results, serve, Serving
from tests.serving_models import tenants

SLO = 30.0


Array: Any = jax.Array


class Counted(Array):
    """An array of the device: who reads it has it transferred."""

    def __init__(self, array: jax.Array, log: list[str]) -> None:
        self.array, self.log = array, log

    def copy_to_host_async(self) -> None:
        self.log.append("sent")

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.log.append("read")
        return np.asarray(self.array)


def counting(executable: Executable) -> tuple[Executable, list[str]]:
    """The same, with a log of what is brought to the device and back."""
    log = list[str]()

    def call(*arguments: Any) -> Any:
        log.extend("brought" for x in jax.tree.leaves(arguments) if isinstance(x, np.ndarray))
        after, outputs = executable.compiled(*arguments)
        return after, jax.tree.map(lambda x: Counted(x, log), outputs)

    return dataclasses.replace(executable, compiled=call), log


def served(name: str) -> tuple[Serving, list[Any]]:
    found = tenants(name, 2)
    return serve([fit_of(fn, p, x) for fn, p, x in found]), found


def test_an_executable_of_two_families_has_one_transfer_each_way():
    each = [served("mixed"), served("mlp")]
    executable, log = counting(compile_executable([s.lanes(2) for s, _ in each], packed=True))
    entries = [[s.lane(t, found[t][2]) for t in (1, 0)] for s, found in each]
    outputs = executable.run([s.store.bank for s, _ in each], [None, None], executable.stage(entries))
    assert log == ["brought"]
    executable.send_back(outputs)
    got = executable.fetch(outputs)
    assert log == ["brought", "sent", "read"]
    for (serving, found), own in zip(each, got, strict=True):
        for i, t in enumerate((1, 0)):
            assert_alone(results(serving.fits[t], [x[i] for x in own]), found[t])


def test_a_segment_that_is_not_the_last_gives_nothing_back_beside_one_that_is():
    cut, (whole, found) = serve([fit_of(deep, weights(3), (array(2, 6),))], segments=2), served("mlp")
    tenant, x = found[0], array(2, 6)
    banks, pools, got = [cut.store.bank, whole.store.bank], [cut.pools[0], None], []
    for segment in range(2):
        lanes = [cut.lanes(1, segment=segment), whole.lanes(1)]
        executable, log = counting(compile_executable(lanes, packed=True))
        begins = cut.lane(0, (x,)) if segment == 0 else Lane(cut.slots[0], ())
        outputs = executable.run(banks, pools, executable.stage([[begins], [whole.lane(0, tenant[2])]]))
        executable.send_back(outputs)
        got.append(executable.fetch(outputs))
        assert log == ["brought", "sent", "read"]
        assert_alone(results(whole.fits[0], [v[0] for v in got[-1][1]]), tenant)
    assert got[0][0] is None
    assert_alone(results(cut.fits[0], [v[0] for v in got[1][0]]), (deep, weights(3), (x,)))


def test_one_result_is_given_back_as_it_is():
    """Whatever it is of: another buffer would save nothing."""
    serving, found = served("convnet")
    executable, log = counting(serving.executable(2, packed=True))
    outputs = executable.run([serving.store.bank], [None], executable.stage([[serving.lane(0, found[0][2])]]))
    assert len(outputs) == 1 and not executable.returned.packed
    executable.send_back(outputs)
    executable.fetch(outputs)
    assert log == ["brought", "sent", "read"]


def test_what_the_host_reads_by_itself_is_not_packed():
    serving, found = served("mixed")
    executable, log = counting(serving.executable(2, packed=False))
    outputs = executable.run([serving.store.bank], [None], executable.stage([[serving.lane(0, found[0][2])]]))
    executable.send_back(outputs)
    assert not executable.returned.packed and "sent" not in log


@pytest.mark.parametrize(("name", "packed"), [("mlp", True), ("convnet", False)])
def test_results_that_are_left_on_the_host_are_read_where_they_lie(name, packed):
    found = tenants(name, 2)
    serving = serve([fit_of(fn, p, x) for fn, p, x in found], options=dataclasses.replace(CPU, left=True))
    executable = serving.executable(4, packed=True)
    assert executable.returned.packed == packed
    outputs = executable.run(
        [serving.store.bank], [None], executable.stage([[serving.lane(t, found[t][2]) for t in (1, 0)]])
    )
    left = jax.tree.leaves(outputs)
    assert [x.sharding.memory_kind for x in left] == ["pinned_host"]
    executable.send_back(outputs)  # nothing: they are there
    (got,) = executable.fetch(outputs)
    addresses = [x.unsafe_buffer_pointer() for x in left]
    assert min(x.ctypes.data for x in got) == addresses[0]
    del outputs, left
    gc.collect()
    for i, t in enumerate((1, 0)):  # they are kept as long as anybody looks at them
        assert_alone(results(serving.fits[t], [x[i] for x in got]), found[t])


def test_numbers_of_less_than_a_byte_are_asked_for():
    """NumPy has a byte for each, the device has not."""
    x = np.arange(6, dtype=np.int8).reshape(1, 6)
    serving = serve([fit_of(lambda p, x: x.astype(jnp.int4), {}, (x,))], options=dataclasses.replace(CPU, left=True))
    executable = serving.executable(1, packed=True)
    outputs = executable.run([serving.store.bank], [None], executable.stage([[serving.lane(0, (x,))]]))
    executable.send_back(outputs)
    ((got,),) = executable.fetch(outputs)
    np.testing.assert_array_equal(got[0].astype(np.int8), x)


def test_arrays_of_all_dtypes_and_sizes_become_words_and_arrays_again():
    dtypes = [np.bool_, np.int8, np.uint16, jnp.bfloat16, np.float16, jnp.float8_e4m3fn, np.int32, np.float32]
    shapes = [(), (2, 0), (5,), (3, 4)]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        arrays: list[Any] = [
            np.asarray(rng.standard_normal(shape) * 9 * rng.integers(0, 2, shape)).astype(dtype)
            for dtype in (*dtypes, np.float64, np.int64)
            for shape in shapes
        ]
        arrays.append(np.asarray([np.nan, np.inf, -0.0], np.float32))
        parts = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        assert can_pack(parts)
        buffer = np.asarray(jax.jit(lambda: together(arrays, parts))())
        ends = np.cumsum([words(part) for part in parts])
        assert len(buffer) == ends[-1]
        again = jax.jit(lambda b: [from_words(x, part) for x, part in zip(jnp.split(b, ends[:-1]), parts, strict=True)])
        for found in (views(buffer, parts), map(np.asarray, again(buffer))):
            for x, y in zip(found, arrays, strict=True):
                assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def together(arrays: Any, parts: Any) -> jax.Array:
    return jnp.concatenate([to_words(jnp.asarray(x), part) for x, part in zip(arrays, parts, strict=True)])


def test_what_words_cannot_hold_is_not_packed():
    assert not can_pack([jax.ShapeDtypeStruct((2,), np.complex64)])
    assert not can_pack([jax.ShapeDtypeStruct((2,), jnp.int4)])


def test_whether_results_can_be_left_there_is_tried(monkeypatch):
    assert can_leave(jax.devices()[0])
    monkeypatch.setattr("coalesce.serving.page_locked.seen", lambda x: np.zeros(4, np.int32))
    assert not can_leave(jax.devices()[0]), "nothing arrives"
    monkeypatch.setattr("coalesce.serving.page_locked.KIND", "another")
    assert not can_leave(jax.devices()[0]), "it is elsewhere"
    monkeypatch.delattr(jax, "memory")
    assert not can_leave(jax.devices()[0]), "JAX has no name for it"


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (1, 501), (40, 30), (100, 100)])
def test_rows_of_results_are_copies_of_their_own(shape, dtype):
    stack = np.arange(6 * math.prod(shape)).reshape(6, *shape).astype(dtype)
    for rows in (stack, stack[::2], stack[..., ::-1] if shape else stack):
        got = copied(rows, 2)
        assert len(got) == 2
        for row, want in zip(got, rows, strict=False):
            assert not np.shares_memory(row, rows) and row.flags.writeable and row.dtype == dtype
            assert row.base is None or (type(row.base) is bytearray and len(row.base) == row.nbytes), "nobody else's"
            np.testing.assert_array_equal(row, want, strict=True)


def deep(params: Any, x: jax.Array) -> dict[str, jax.Array]:
    for w in params:
        x = jnp.tanh(jnp.dot(x, w, precision="highest"))
    return {"y": x, "positive": x > 0}


def weights(layers: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).standard_normal((layers, 6, 6)).astype(np.float32))


@pytest.mark.parametrize("segments", [1, 2])
def test_a_runtime_serves_so_and_each_has_results_of_its_own(segments, monkeypatch):
    """What one tenant holds keeps no other's results alive, and shows none."""
    monkeypatch.setattr(captured_module, "compile_executable", partial(compile_executable, packed=True))
    with Runtime(widths=(1, 4), segments=segments, compiled=False) as rt:
        for t in range(2):
            rt.add_tenant(f"t{t}", deep, weights(3, t), example=(np.ones((2, 6), np.float32),), slo=SLO)
        rt.warm_up(60.0)
        inputs = [np.random.default_rng(i).standard_normal((2, 6)).astype(np.float32) for i in range(8)]
        got = [reply.result(60) for reply in [rt.submit(f"t{i % 2}", x) for i, x in enumerate(inputs)]]
        for i, (x, own) in enumerate(zip(inputs, got, strict=True)):
            want = jax.jit(deep)(weights(3, i % 2), x)
            np.testing.assert_allclose(own["y"], want["y"], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(own["positive"], want["positive"])
            for array in own.values():
                assert array.base is None and array.flags.owndata and array.flags.writeable
