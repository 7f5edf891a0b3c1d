"""A second client of a GPU, on which programs are captured, and the stream on which what was captured runs.

A CUDA graph has the addresses in it that its program got when it was captured. Arguments and results lie in arrays of
JAX's own client, which are there as long as somebody holds them. But what a program computes on the way lies where
something was free, and when it has ended JAX gives that memory to whoever asks next. So programs run here on another
client of jaxlib's, whose memory is for such values alone. They lie in the same place, one program's over another's:
graphs run one after the other, on one stream. Those that are to run at once have a client each.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from ctypes import c_void_p
from functools import cache
from typing import Any

import jax

from coalesce import jaxpr as J
from coalesce.capture.cuda import Cuda, cuda_of
from coalesce.capture.ending import Recording, register, TARGET
from coalesce.errors import CaptureError

# A CUDA graph cannot be launched while another is captured, so XLA is not to make any of its own.
OPTIONS: dict[str, Any] = {"xla_gpu_enable_command_buffer": ""}
HARMLESS = re.compile(r" (?:tuple|bitcast|get-tuple-element|after-all)\(")


class Line:
    """The stream of a GPU on which everything that was captured there runs, in the order of its launches."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        with cuda:
            self.stream = cuda.stream()
        self.turn = threading.RLock()  # of whoever launches several things in a row

    def wait(self) -> None:
        """Until all that was launched has ended."""
        with self.cuda:
            self.cuda("cuStreamSynchronize", self.stream)


class Aside:
    def __init__(self, device: Any, line: Line) -> None:
        self._device, self.line = device, line
        self._there: Any = None  # the same GPU, as the other client has it

    def load(self, compiled: Any) -> Any:
        """What JAX has compiled of `ends(...)` with `OPTIONS`, for this client."""
        check_order(compiled)
        return J.loaded_at(compiled, self.there)

    @property
    def there(self) -> Any:
        if self._there is None:
            (self._there,) = J.second_client(self._device).local_devices()
        return self._there

    def capture(self, loaded: Any, arguments: Sequence[Any], results: Sequence[jax.Array]) -> c_void_p:
        """The CUDA graph of a program, which reads and writes these arrays of JAX's own client.

        `loaded(*arguments, results)` gives its results and one more, in the memory of `results`, which it donates. The
        arrays have to be there as long as the graph is launched. Nothing of it runs now.

        Raises:
          CaptureError: the program does something that no CUDA graph can, such as to look at a value on the host.
        """
        jax.block_until_ready((arguments, results))
        with self.line.cuda, Recording(self.line.cuda) as recording:
            try:
                reads, into = jax.tree.map(lambda x: J.view_at(x, self.there), (list(arguments), list(results)))
                made = loaded(*reads, into)
                jax.block_until_ready(made)
            except Exception as e:
                raise CaptureError(f"the program cannot be captured: {type(e).__name__}: {e}") from e
        if recording.error is not None or recording.graph is None:
            raise CaptureError(f"the program cannot be captured: {recording.error or 'XLA did not say where it runs'}")
        for got, want in zip(made[:-1], results, strict=True):
            if got.unsafe_buffer_pointer() != want.unsafe_buffer_pointer():
                raise CaptureError("the program does not leave its results where it was told to")
        return recording.graph


class Graph:
    """CUDA graphs of programs that were captured on one line, and run at once if they are several."""

    def __init__(self, line: Line, graphs: Sequence[c_void_p], holding: Any) -> None:
        """`holding` is what has to be there: arrays, and the programs, whose kernels these are."""
        self._line, self._holding = line, holding
        with line.cuda:
            self._executable = line.cuda.executable(list(graphs))
            for graph in graphs:
                line.cuda("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Returns before it has begun."""
        cuda = self._line.cuda
        with cuda:
            cuda("cuGraphLaunch", self._executable, self._line.stream)

    def __del__(self) -> None:
        """CUDA keeps one that runs until it has ended; its memory and its kernels are another matter."""
        made = getattr(self, "_executable", None)
        if made is None:
            return
        with self._line.cuda:
            self._line.cuda.library.cuStreamSynchronize(self._line.stream)
            self._line.cuda.library.cuGraphExecDestroy(made)


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


@cache
def line_of(device: Any) -> Line | None:
    """That of a JAX device; None of one that is no NVIDIA GPU."""
    cuda = cuda_of(device)
    if cuda is None:
        return None
    register()
    return Line(cuda)


@cache
def aside_of(device: Any, number: int = 0) -> Aside | None:
    """A second client of a JAX device; those of other numbers are for what runs at once. None as `line_of`."""
    line = line_of(device)
    return None if line is None else Aside(device, line)
