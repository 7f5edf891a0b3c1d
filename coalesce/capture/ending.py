"""The last operation of a program that is to be captured: it begins the capture before the first one, and ends it.

XLA gives a custom call of its FFI the stream that it launches on, and calls it twice in a run: before anything is
launched (`initialize`), when every operation before it in the program has been prepared, and in its place (`execute`).
A stream that captures takes down what is launched on it instead of running it. Nothing that JAX does with the stream
before or after a program is captured so, such as the callback that tells it of the end.

The functions are Python's, called through XLA's C API for FFI, of which they read a few fields that have lain where
they do since its version 0.1. Without a capture they do nothing.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint32, c_void_p, POINTER
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from coalesce.capture.cuda import BY_ANY_THREAD, Cuda

TARGET = "coalesce_capture"
METADATA = 1  # XLA_FFI_Extension_Metadata: XLA asks what the function is
VERSION_AT = 16  # of XLA_FFI_Api: its size and extensions, the version (24 bytes), internal functions, then pointers to
ERROR_CREATE_AT = 48  # functions, of which XLA_FFI_Error_Create is the first
STREAM_GET_AT = 80  # and XLA_FFI_Stream_Get the fifth
FAILED_PRECONDITION = 9  # XLA_FFI_Error_Code_FAILED_PRECONDITION


class Version(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class Metadata(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("version", Version), ("traits", c_uint32))


class Extension(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("kind", c_int), ("next", c_void_p), ("metadata", POINTER(Metadata)))


class Frame(ctypes.Structure):
    """XLA_FFI_CallFrame, as far as it is read."""

    _fields_ = (
        ("size", c_size_t),
        ("extension", POINTER(Extension)),
        ("api", c_void_p),
        ("context", c_void_p),
        ("stage", c_int),
    )


class StreamGet(ctypes.Structure):
    """What XLA_FFI_Stream_Get takes and gives."""

    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("context", c_void_p), ("stream", c_void_p))


class ErrorCreate(ctypes.Structure):
    """What XLA_FFI_Error_Create takes."""

    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int))


Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(Frame))
GetStream = ctypes.CFUNCTYPE(c_void_p, POINTER(StreamGet))
CreateError = ctypes.CFUNCTYPE(c_void_p, POINTER(ErrorCreate))


class Around(NamedTuple):
    """What is copied before a program and after it: (to, from, bytes), each by its address."""

    before: Sequence[tuple[int, int, int]] = ()
    after: Sequence[tuple[int, int, int]] = ()


NOTHING = Around()


class Recording:
    """What the program that runs now launches: one at a time in a process. In the context of `cuda`.

    Whoever runs such a program without one has `alone` meanwhile: each of them would be taken for this one.
    """

    alone = threading.Lock()
    now: Recording | None = None

    def __init__(self, cuda: Cuda, around: Around = NOTHING) -> None:
        self._cuda, self._around = cuda, around
        self._stream: int | None = None  # that captures
        self.graph: c_void_p | None = None  # what was captured
        self.error: Exception | None = None

    def __enter__(self) -> Recording:
        self.alone.acquire()
        Recording.now = self
        return self

    def __exit__(self, *_: object) -> None:
        """A stream that captures takes nothing else, also when that has failed."""
        Recording.now = None
        try:
            if self._stream is not None:
                self.end()
        finally:
            self.alone.release()

    def begin(self, stream: int) -> bool:
        """Whether it has begun. Else the program must not run: what it reads may not be there."""
        if self._stream is None and self.graph is None and self.error is None:
            if self._attempt(self._cuda, "cuStreamBeginCapture_v2", c_void_p(stream), BY_ANY_THREAD):
                self._stream = stream
                self._copy(self._around.before)
        return self._stream is not None and self.error is None

    def end(self) -> None:
        if self._stream is not None:
            self._copy(self._around.after)
            stream, self._stream = c_void_p(self._stream), None
            graph = c_void_p()
            self._attempt(self._cuda, "cuStreamEndCapture", stream, byref(graph))
            self.graph = graph if graph.value else None

    def _copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        for copy in copies:
            self._attempt(self._cuda.copy, *copy, c_void_p(self._stream))

    def _attempt(self, does: Callable[..., None], *arguments: Any) -> bool:
        """XLA calls through C, where nothing can be raised."""
        try:
            does(*arguments)
        except Exception as e:
            self.error = self.error or e
            return False
        return True


def tells_what_it_is(frame: Any) -> bool:
    """XLA asks once, when it is told of the function: for the version of the API, which is its own here."""
    if not frame.extension or frame.extension.contents.kind != METADATA:
        return False
    metadata, own = frame.extension.contents.metadata.contents, Version.from_address(frame.api + VERSION_AT)
    metadata.version.major, metadata.version.minor = own.major, own.minor
    metadata.traits = 0
    return True


def stream_of(frame: Any) -> int:
    asked = StreamGet(ctypes.sizeof(StreamGet), None, frame.context, None)
    error = GetStream(c_void_p.from_address(frame.api + STREAM_GET_AT).value or 0)(byref(asked))
    return 0 if error else asked.stream or 0


def error_of(frame: Any, message: bytes) -> int | None:
    """One of XLA's, which takes it."""
    asked = ErrorCreate(ctypes.sizeof(ErrorCreate), None, message, FAILED_PRECONDITION)
    return CreateError(c_void_p.from_address(frame.api + ERROR_CREATE_AT).value or 0)(byref(asked))


@Handler
def initialize(pointer: Any) -> int | None:
    frame, recording = pointer.contents, Recording.now
    if tells_what_it_is(frame) or recording is None or recording.begin(stream_of(frame)):
        return None
    return error_of(frame, b"the capture did not begin")


@Handler
def execute(pointer: Any) -> None:
    frame, recording = pointer.contents, Recording.now
    if not tells_what_it_is(frame) and recording is not None:
        recording.end()


@cache
def register() -> None:
    """XLA is told of it, for programs on NVIDIA GPUs: once in a process that compiles or loads any."""
    stages = {"initialize": jax.ffi.pycapsule(initialize), "execute": jax.ffi.pycapsule(execute)}
    jax.ffi.register_ffi_target(TARGET, stages, platform="CUDA")


def ends(function: Callable[..., Sequence[jax.Array]]) -> Callable[..., tuple[Any, ...]]:
    """`function`, whose arrays pass through the last call where they lie, so that XLA does whatever is to be done for
    them before it, such as to copy one that is given back twice. It may make one operation of a call and the slices
    that it reads; not across a barrier. One more array means nothing: there would be no call without any."""

    register()

    def ended(*arguments: Any) -> tuple[Any, ...]:
        results = jax.lax.optimization_barrier(list(function(*arguments)))
        given_back = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
        places = {i: i for i in range(len(results))}
        call = jax.ffi.ffi_call(
            TARGET, [*given_back, jax.ShapeDtypeStruct((1,), jnp.uint32)], input_output_aliases=places
        )
        return tuple(call(*results))

    return ended
