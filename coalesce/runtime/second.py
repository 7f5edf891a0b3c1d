"""The process that compiles beside the one that serves (coalesce.runtime.apart): where there is one, with which devices
it is started, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import jax

from coalesce.runtime import ticks
from coalesce.runtime.companion import command, search_path
from coalesce.runtime.compiler import IDLE

WANTED = "COALESCE_APART"  # an environment variable: 0 for never
PLUGINS = {"cpu": "cpu", "gpu": "cuda"}  # what JAX is told to have


class Compiler(subprocess.Popen[bytes]):
    """And what ticks beside it, if it is idle and something does."""

    ticking: subprocess.Popen[bytes] | None = None


def started(idle: bool, platforms: Collection[str] = ("cpu",)) -> Compiler:
    env = os.environ | environment(platforms)
    ticking = ticks.started(env) if idle else None
    with ticking.stdin if ticking is not None and ticking.stdin is not None else nullcontext() as orders:
        numbers = [] if orders is None else [orders.fileno()]
        compiler = Compiler(
            command("coalesce.runtime.compiler", *([IDLE] if idle else []), *map(str, numbers)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=numbers,
            env=env,
        )
    compiler.ticking = ticking
    return compiler


def environment(platforms: Collection[str]) -> dict[str, str]:
    """For these platforms, with the devices that are seen here; JAX's default is one of the first platform."""
    own = {
        "JAX_PLATFORMS": ",".join(sorted(platforms, key="cpu".__eq__)),
        "JAX_NUM_CPU_DEVICES": str(jax.config.jax_num_cpu_devices),  # pyright: ignore
        "PYTHONPATH": search_path(),
    }
    if "cuda" in platforms:
        seen = jax.config.values.get("jax_cuda_visible_devices")
        own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **({"JAX_CUDA_VISIBLE_DEVICES": seen} if seen else {})}
    return own


def is_wanted(device: Any) -> bool:
    """Numbers of devices are of one process: among several of JAX's another one would have others."""
    if os.environ.get(WANTED) == "0" or not sys.executable:
        return False
    if device.platform == "cpu":
        return True
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
    return is_cuda and jax.process_count() == 1


def end(process: Compiler) -> None:
    process.kill()
    process.communicate()
    if process.ticking is not None:
        process.ticking.kill()
        process.ticking.wait()
