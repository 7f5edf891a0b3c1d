"""An executable for a device with memory of its own runs first on the thread that has compiled it."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coalesce.runtime import device as device_module
from coalesce.runtime.device import Device
from coalesce.runtime.first_runs import run_first
from coalesce.runtime.loaded import Loaded
from coalesce.runtime.runtime import Runtime

X = np.ones((1, 8), np.float32)


def net(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ params) @ params)


def add(rt: Runtime, name: str, fn: Any) -> None:
    rt.add_tenant(name, fn, np.full((8, 8), 0.1, np.float32), example=(X,), slo=30.0)
    rt.warm_up(120.0)


def test_it_runs_unless_it_writes_registers_or_its_bank_is_another_or_being_written(monkeypatch):
    def loaded_of(rt: Runtime) -> tuple[Loaded, Any]:
        device = rt._stations[0].device
        return next(iter(device._loaded.values())), device.at

    with Runtime(widths=(1,), compiled=False) as rt:
        add(rt, "a", net)
        loaded, at = loaded_of(rt)
        assert run_first(loaded, loaded.capacities, at)
        assert not run_first(loaded, [own + 1 for own in loaded.capacities], at)
        written, bank = Loaded(loaded.executable, loaded.homes), [jnp.copy(x) for x in loaded.banks[0]]
        written.banks = [bank]
        assert run_first(written, loaded.capacities, at)
        bank[0].delete()
        assert not run_first(written, loaded.capacities, at)
        np.testing.assert_allclose(rt.submit("a", X).result(60), net(jnp.full((8, 8), 0.1), jnp.asarray(X)), rtol=1e-5)
        threads = list[str]()

        def recorded(*given: Any) -> bool:
            threads.append(threading.current_thread().name)
            return run_first(*given)

        monkeypatch.setattr(device_module, "run_first", recorded)
        add(rt, "b", lambda p, x: net(p, x) + 1)
        assert not threads  # there is nothing to be loaded on a CPU
        monkeypatch.setattr(Device, "copies", True)
        add(rt, "c", lambda p, x: net(p, x) + 2)
        assert threads == ["coalesce-compiler"]
    with Runtime(widths=(1,), segments=2, compiled=False) as rt:
        add(rt, "a", net)
        loaded, at = loaded_of(rt)
        assert loaded.pools[0] is not None and not run_first(loaded, loaded.capacities, at)
