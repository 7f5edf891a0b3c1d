"""Memory of the device, and as much of the host, page-locked, in which arrays lie alike: one copy brings them all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import jax
import numpy as np

from coalesce.capture.aside import Place
from coalesce.capture.cuda import Cuda
from coalesce.captured import aligned
from coalesce.serving.words import nbytes

ALIGNED = 256  # bytes, as what CUDA gives


class Mirrored:
    """In the driver's context. Raises RuntimeError if there is no memory."""

    def __init__(self, cuda: Cuda, structs: Sequence[jax.ShapeDtypeStruct]) -> None:
        starts = [0, *accumulate(aligned(nbytes(own), ALIGNED) for own in structs)]
        self._host = cuda.host_memory(starts[-1], np.dtype(np.uint8))
        self._device = cuda.memory(self._host.nbytes)
        self.places = [Place(self._device.address + at, own) for at, own in zip(starts, structs, strict=False)]
        self.arrays = [  # on the host
            self._host[at : at + nbytes(own)].view(own.dtype).reshape(own.shape)
            for at, own in zip(starts, structs, strict=False)
        ]
        self.to_device = self._device.address, self._host.ctypes.data, self._host.nbytes
        self.to_host = self._host.ctypes.data, self._device.address, self._host.nbytes
