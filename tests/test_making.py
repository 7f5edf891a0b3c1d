"""What compilers are told, by whether somebody is served meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.runtime import making
from coalesce.runtime.making import Making
from coalesce.runtime.runtime import Runtime
from coalesce.serving import making as serving


class Jitted:
    """Lowers to itself, and remembers how it was compiled."""

    def __init__(self) -> None:
        self.options: list[Any] = []

    def lower(self, *arguments: Any) -> Jitted:
        return self

    def compile(self, compiler_options: Any) -> str:
        self.options.append(compiler_options)
        return "made"


UNTIMED = {"xla_gpu_autotune_level": 0}


@pytest.mark.parametrize(("platform", "serves", "same", "options"), [
    ("gpu", True, False, UNTIMED), ("gpu", False, True, UNTIMED), ("gpu", False, False, None),
    ("cpu", True, True, None),
])  # fmt: skip
def test_nothing_is_timed_on_a_gpu_that_serves_nor_where_kernels_are_to_be_the_same(platform, serves, same, options):
    make, jitted = Making(SimpleNamespace(platform=platform), None, same), Jitted()
    make.serves = serves
    for often in (True, False):
        assert make(lambda often=often: serving.Jitted(jitted, (), often=often)) == "made"
    assert jitted.options == [options, options and {**options, "xla_gpu_enable_command_buffer": ""}]


class Elsewhere:
    """In place of the compiler in another process, which is asked while somebody is served: it has none."""

    def __init__(self) -> None:
        self.asked = self.called = 0

    def compile(self, *_: Any) -> None:
        self.asked += 1

    def call(self, *_: Any, **__: Any) -> None:
        self.called += 1


def net(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params) @ params


def test_from_the_first_request_on_until_all_have_left_every_compiler_is_told_that_somebody_is_served(monkeypatch):
    """Also of what `verify` has a tenant compute alone. Trying a tenant out serves nobody."""
    made, compiled = list[str](), list[str]()

    def recorded(recipe: serving.Recipe, *rest: Any) -> Any:
        made.append((jitted := recipe()).function.__name__)
        return serving.make_here(lambda: jitted, *rest)

    def seen(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    monkeypatch.setattr(making, "make_here", recorded)
    params, x = np.ones((4, 4), np.float32), np.ones((2, 4), np.float32)
    elsewhere: Any = Elsewhere()
    with Runtime(widths=(1, 2), compiled=False) as rt:
        rt._stations[0].device.make.apart = elsewhere

        def add(name: str, fn: Any) -> int:
            """How many programs were made for it."""
            made.clear()
            rt.add_tenant(name, fn, params, example=(x,), slo=30.0, verify=True)
            rt.warm_up(60.0)
            return len(made)

        assert add("a", net) and not elsewhere.asked and not elsewhere.called
        assert "alone" in made
        rt.submit("a", x).result(60)
        jax.monitoring.register_event_duration_secs_listener(seen)
        try:
            asked = add("b", lambda p, x: net(p, x) + 1)
        finally:
            jax.monitoring.unregister_event_duration_listener(seen)
        assert "alone" in made and elsewhere.asked == asked and elsewhere.called == 2  # its passes, its plan
        assert 0 < len(compiled) <= asked, "something was compiled that no compiler was asked for"
        rt.remove_tenant("a")
        assert add("c", lambda p, x: net(p, x) + 2) and elsewhere.asked == asked + len(made)
        before = elsewhere.asked
        rt.remove_tenant("b")
        rt.remove_tenant("c")
        assert add("d", lambda p, x: net(p, x) + 3) and elsewhere.asked == before
