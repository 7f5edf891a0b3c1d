"""A second client of a GPU, on which programs are captured, and the stream on which what was captured runs.

A CUDA graph has the addresses in it that its program got when it was captured. Arguments and results lie in arrays of
JAX's own client, which are there as long as somebody holds them. But what a program computes on the way lies where
something was free, and when it has ended JAX gives that memory to whoever asks next. So programs run here on another
client of jaxlib's, whose memory is for such values alone. They lie in the same place, one program's over another's:
graphs run one after the other, on one stream. Those that are to run at once have a client each.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from coalesce import jaxpr as J
from coalesce.capture.cuda import Cuda, cuda_of, follows, Owned
from coalesce.capture.ending import Around, ends, NOTHING, Recording, register, TARGET
from coalesce.errors import CaptureError

LOG = logging.getLogger("coalesce")

WANTED = "COALESCE_CAPTURE"  # an environment variable: 0 for never

# A CUDA graph cannot be launched while another is captured, so XLA is not to make any of its own.
OPTIONS: dict[str, Any] = {"xla_gpu_enable_command_buffer": ""}
HARMLESS = re.compile(r" (?:tuple|bitcast|get-tuple-element|after-all)\(")


class Line:
    """The stream of a GPU on which everything that was captured there runs, in the order of its launches; and another
    for what is brought there meanwhile."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        with cuda:
            self.stream, self.bringing = cuda.stream(), cuda.stream()

    def follow(self, arrays: Iterable[jax.Array]) -> None:
        """What is launched from now on begins after them."""
        with self.cuda:
            left = [x for x in arrays if not follows(self.stream.value or 0, x)]
        jax.block_until_ready(left)

    def wait(self) -> None:
        """Until all that was launched has ended, and been brought."""
        with self.cuda:
            self.cuda.wait("cuStreamSynchronize", self.bringing)
            self.cuda.wait("cuStreamSynchronize", self.stream)


class Place(NamedTuple):
    """Memory of the device that a program reads or writes."""

    address: int
    struct: jax.ShapeDtypeStruct


def place_of(x: jax.Array) -> Place:
    return Place(x.unsafe_buffer_pointer(), jax.ShapeDtypeStruct(x.shape, x.dtype))


class Aside:
    def __init__(self, device: Any, line: Line) -> None:
        self._device, self.line = device, line
        self._there: Any = None  # the same GPU, as the other client has it
        self._making = threading.RLock()
        self._works = False

    def load(self, compiled: Any) -> Any:
        """What JAX has compiled of `ends(...)` with `OPTIONS`, for this client.

        Raises:
          CaptureError: XLA runs something behind its end, or it cannot be loaded again.
        """
        check_order(compiled)
        try:
            return J.loaded_at(compiled, self.there)
        except Exception as e:
            raise CaptureError(f"the program cannot be loaded for another client: {type(e).__name__}: {e}") from e

    @property
    def there(self) -> Any:
        if self._there is None:
            with self._making:
                if self._there is None:
                    (self._there,) = J.second_client(self._device).local_devices()
        return self._there

    def capture(self, loaded: Any, arguments: Any, into: Sequence[Place], around: Around = NOTHING) -> Owned:
        """The CUDA graph of a program, which reads and writes these places, with what is copied `around` it.

        `loaded(*arguments, into)`, with an array for each `Place` in the pytree, gives its results and one more, in the
        memory of `into`, which it donates. Nothing of it runs now, and nothing is read: what lies there has to be there
        when the graph runs.

        Raises:
          CaptureError: the program does something that no CUDA graph can, such as to look at a value on the host.
        """
        with self._making:
            if not self._works:
                self._try()
                self._works = True
        return undisturbed(self._captured, loaded, arguments, into, around)

    def _try(self) -> None:
        """A program that does no harm: were nothing captured, the next one would run, and read what is not there."""
        struct = jax.ShapeDtypeStruct((1,), np.float32)
        try:
            with self.line.cuda:
                given, left = self.line.cuda.memory(4), self.line.cuda.memory(4)
            with jax.default_device(self._device):
                jitted = jax.jit(ends(lambda x, into: [x + 1]), donate_argnums=1, keep_unused=True)
                compiled = jitted.lower(struct, [struct]).compile(OPTIONS)
        except RuntimeError as e:
            raise CaptureError(f"nothing can be captured now: {type(e).__name__}: {e}") from e
        loaded = self.load(compiled)
        undisturbed(self._captured, loaded, (Place(given.address, struct),), [Place(left.address, struct)], NOTHING)

    def _captured(self, loaded: Any, arguments: Any, into: Sequence[Place], around: Around) -> Owned:
        made: Any = None
        with self.line.cuda:
            with Recording(self.line.cuda, around) as recording:
                try:
                    reads, writes = jax.tree.map(self._seen, (arguments, list(into)), is_leaf=is_place)
                    made = loaded(*reads, writes)
                    jax.block_until_ready(made)
                except Exception as e:
                    recording.error = recording.error or e
            graph = None if recording.graph is None else Owned(self.line.cuda, "cuGraphDestroy", recording.graph)
        if recording.error is not None or graph is None:
            error = recording.error or RuntimeError("XLA did not say where it runs")
            raise CaptureError(f"the program cannot be captured: {type(error).__name__}: {error}") from error
        if [x.unsafe_buffer_pointer() for x in made[:-1]] != [place.address for place in into]:
            raise CaptureError("the program cannot be captured: it does not leave its results where it was told to")
        return graph

    def _seen(self, place: Place) -> jax.Array:
        return J.view_at(place.address, place.struct.shape, place.struct.dtype, self.there)


def undisturbed(does: Callable[..., Owned], *given: Any) -> Owned:
    """Not on the main thread, on which Ctrl-C may raise anywhere: in what XLA calls it would be taken for a result."""
    if threading.current_thread() is not threading.main_thread():
        return does(*given)
    done = Future[Owned]()
    threading.Thread(target=settle, args=(done, does, given), name="coalesce-capture", daemon=True).start()
    try:
        return done.result()
    finally:
        del done  # what it raises holds this frame


def settle(done: Future[Owned], does: Callable[..., Owned], given: tuple[Any, ...]) -> None:
    try:
        done.set_result(does(*given))
    except BaseException as e:
        done.set_exception(e)


def is_place(x: Any) -> bool:
    return isinstance(x, Place)


class Graph:
    """CUDA graphs of programs that were captured on one line, and run at once if they are several.

    CUDA keeps one that runs until it has ended. Whoever holds what it uses, but for the programs, waits for that.
    """

    def __init__(self, line: Line, graphs: Sequence[Owned], programs: Any) -> None:
        """`programs` are those whose kernels these are. Raises CaptureError."""
        self._line, self._programs = line, programs
        with line.cuda:
            try:
                made = line.cuda.executable([graph.handle for graph in graphs])
            except RuntimeError as e:
                raise CaptureError(f"the program cannot be captured: {e}") from e
            self._executable = Owned(line.cuda, "cuGraphExecDestroy", made)

    def launch(self) -> None:
        """Returns before it has begun, unless so many are on their way that CUDA takes no more."""
        with self._line.cuda:
            self._line.cuda.wait("cuGraphLaunch", self._executable.handle, self._line.stream)

    def launch_soon(self) -> None:
        """The same for who has few on their way, and is in the context of the driver already."""
        self._line.cuda("cuGraphLaunch", self._executable.handle, self._line.stream)


def check_order(compiled: Any) -> None:
    """What runs behind the end of a capture would not be part of it.

    Raises:
      CaptureError: something does, or XLA does not say in which order it runs what.
    """
    head, found, entry = compiled.as_text().partition("\nENTRY ")
    operations = entry.partition("\n}")[0].splitlines()[1:]
    places = [i for i, line in enumerate(operations) if f'custom_call_target="{TARGET}"' in line]
    if not found or "is_scheduled=true" not in head or len(places) != 1:
        raise CaptureError("the program cannot be captured: XLA does not say in which order its operations run")
    for line in operations[places[0] + 1 :]:
        if not HARMLESS.search(line):
            raise CaptureError(f"the program cannot be captured: this would run behind its end: {line.strip()[:120]}")


making = threading.RLock()  # a device has one line, whoever asks first
lines: dict[Any, Line | None] = {}
asides: dict[tuple[Any, int], Aside] = {}


def line_of(device: Any) -> Line | None:
    """That of a JAX device; None of one that is no NVIDIA GPU, has no memory for one, or where WANTED was 0 when it was
    first asked for."""
    with making:
        if device not in lines:
            lines[device] = new_line(device)
        return lines[device]


def new_line(device: Any) -> Line | None:
    cuda = None if os.environ.get(WANTED) == "0" else cuda_of(device)
    if cuda is None:
        return None
    register()
    try:
        return Line(cuda)
    except RuntimeError as e:
        LOG.info("%s is left to JAX: %s", device, e)
        return None


def aside_of(device: Any, number: int = 0) -> Aside | None:
    """A second client of a JAX device; those of other numbers are for what runs at once. None as `line_of`."""
    with making:
        line = line_of(device)
        if line is None:
            return None
        if (device, number) not in asides:
            asides[device, number] = Aside(device, line)
        return asides[device, number]
