"""What compilers are told, by whether somebody is served meanwhile."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from coalesce.runtime.device import Device


class Jitted:
    """Lowers to itself, and remembers how it was compiled."""

    def __init__(self) -> None:
        self.options: list[Any] = []

    def lower(self, *arguments: Any) -> Jitted:
        return self

    def compile(self, compiler_options: Any) -> str:
        self.options.append(compiler_options)
        return "made"


@pytest.mark.parametrize(("platform", "serving", "options"), [
    ("gpu", True, {"xla_gpu_autotune_level": 0}), ("gpu", False, None), ("cpu", True, None), ("cpu", False, None),
])  # fmt: skip
def test_nothing_is_timed_on_a_gpu_that_serves(platform, serving, options):
    device, jitted = Device(), Jitted()
    device.at = SimpleNamespace(platform=platform)
    if serving:
        device._launched_s = time.monotonic()
    assert device.make(jitted, (), ()) == "made"
    assert jitted.options == [options]
