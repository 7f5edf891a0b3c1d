"""Waiting for a GPU by its driver: see coalesce/waiting.py. On one, tests/test_gpu.py waits for arrays."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coalesce
from coalesce.capture.cuda import Cuda
from coalesce.waiting import Driver, driver_of


class Library:
    """Stands for libcuda: notes what is called, and answers `code` to one kind of call."""

    def __init__(self, code: int = 0, to: str = "cuStreamSynchronize") -> None:
        self.calls: list[str] = []
        self.streams, self.code, self.to = 0, code, to

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "cuStreamCreate":
                self.streams += 1
                arguments[0]._obj.value = self.streams
            return self.code if name == self.to else 0

        return call


class Given:
    """Stands for an array: a stream follows it, or cannot."""

    def __init__(self, raises: Exception | None = None) -> None:
        self.raises = raises
        self.followed_by: list[int] = []

    def __dlpack__(self, stream: int) -> None:
        if self.raises:
            raise self.raises
        self.followed_by.append(stream)


def driver_by(library: Library) -> Driver:
    return Driver(Cuda(library, library, 0))


def test_a_pytree_comes_back_as_it_is() -> None:
    tree = {"a": jnp.ones(3) + 1, "b": [2, "s", None], "key": jax.random.key(0), "c": np.ones(2)}
    assert coalesce.block_until_ready(tree) is tree
    assert driver_of(tree["a"]) is None  # of a CPU there is none


def test_what_failed_raises() -> None:
    def fail(x: Any) -> Any:
        raise ValueError("on purpose")

    with pytest.raises(Exception, match="on purpose"):
        coalesce.block_until_ready(jax.pure_callback(fail, jax.ShapeDtypeStruct((), np.float32), np.float32(0)))
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        coalesce.block_until_ready([gone])


def test_one_stream_follows_all_that_it_can_and_waits_once() -> None:
    library = Library()
    driver, arrays, odd = driver_by(library), [Given(), Given()], Given(BufferError("no such dtype"))
    library.calls.clear()
    assert driver.wait([arrays[0], odd, arrays[1]]) == [odd]
    assert [x.followed_by for x in arrays] == [[1], [1]]
    assert library.calls == ["cuCtxPushCurrent_v2", "cuStreamCreate", "cuStreamSynchronize", "cuCtxPopCurrent_v2"]
    driver.wait(arrays)
    assert library.streams == 1  # it is used again


def test_threads_that_wait_at_once_have_a_stream_each() -> None:
    driver, together = driver_by(Library()), threading.Barrier(4)

    class Meeting(Given):
        def __dlpack__(self, stream: int) -> None:
            super().__dlpack__(stream)
            together.wait()

    arrays = [Meeting() for _ in range(4)]
    threads = [threading.Thread(target=driver.wait, args=([x],)) for x in arrays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(x.followed_by[0] for x in arrays) == [1, 2, 3, 4]


def test_without_memory_for_a_stream_jax_waits() -> None:
    library, arrays = Library(2, "cuStreamCreate"), [Given(), Given()]
    assert driver_by(library).wait(arrays) == arrays
    assert not arrays[0].followed_by and library.calls[-1] == "cuCtxPopCurrent_v2"


def test_an_error_of_the_driver_is_raised_and_the_context_given_back() -> None:
    library = Library(code=700)
    driver = driver_by(library)
    with pytest.raises(RuntimeError, match="cuStreamSynchronize with error 700"):
        driver.wait([Given()])
    assert library.calls[-1] == "cuCtxPopCurrent_v2"
