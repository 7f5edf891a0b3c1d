"""What a runtime, a tenant and a request are told is checked before anything starts, and nobody else notices."""

import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.errors import InvalidInput, Shutdown, TuningError
from coalesce.runtime.frozen import set_aside
from coalesce.runtime.runtime import Runtime
from coalesce.runtime.station import Station
from tests.annotations import nothing_checked
from tests.checked import checked_runtime

X = np.ones((1, 4), np.float32)
W = np.eye(4, dtype=np.float32)


def dense(w: Any, x: Any) -> Any:
    return x @ w


@pytest.fixture(autouse=True, scope="module")
def as_users_call() -> Iterator[None]:
    with nothing_checked():
        yield


@pytest.fixture(scope="module")
def rt() -> Iterator[Runtime]:
    with checked_runtime(widths=(1,), compiled=False) as rt:
        rt.add_tenant("good", dense, W, example=(X,), slo=60.0)
        yield rt


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"widths": ()}, r"widths is \(\)"),
        ({"widths": (0, 1)}, r"widths is \(0, 1\)"),
        ({"widths": (1.5,)}, r"widths is \(1.5,\)"),
        ({"widths": 4}, "widths is 4"),
        ({"capacity": 0}, "capacity is 0"),
        ({"segments": 0}, "segments is 0"),
        ({"executables": 0}, "executables is 0"),
        ({"memory_limit": -1}, "memory_limit is -1"),
        ({"hang_s": 0}, "hang_s is 0"),
        ({"hang_s": float("nan")}, "hang_s is nan"),
        ({"stall_s": "long"}, "stall_s is 'long'"),
        ({"compiled": True}, "compiled is True"),
        ({"policy": None}, "policy is None"),
        ({"policy": lambda: "fifo"}, "policy is 'fifo'"),
        ({"observers": [SimpleNamespace()]}, "observers is "),
        ({"devices": []}, r"devices is \[\]"),
        ({"devices": "cpu"}, "devices is 'cpu'"),
    ],
)
def test_options_that_mean_nothing(options, text):
    with pytest.raises(InvalidInput, match=f"^{text}"):
        Runtime(**options)


def test_a_runtime_that_cannot_be_made_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    broken, before = tmp_path / "tuned.json", set_aside._holders
    broken.write_text("{")
    monkeypatch.setenv("COALESCE_TUNED", str(broken))
    with pytest.raises(TuningError, match="is no tuning database"):
        Runtime()
    assert set_aside._holders == before


def test_who_is_interrupted_keeps_no_schema_to_itself(rt, monkeypatch):
    class Interrupted(threading.Condition):
        def __exit__(self, *why: Any) -> None:
            super().__exit__(*why)
            monkeypatch.undo()
            raise KeyboardInterrupt

    site = rt._stations[0].quarters._site
    monkeypatch.setattr(site, "_free", Interrupted())
    with pytest.raises(KeyboardInterrupt), site.apart("some schema"):
        pass
    assert not site._taken


def test_a_close_that_was_interrupted_is_finished_by_the_next(monkeypatch):
    before, closes = set_aside._holders, Station.close

    def interrupted(*_: Any) -> None:
        monkeypatch.setattr(Station, "close", closes)
        raise KeyboardInterrupt

    monkeypatch.setattr(Station, "close", interrupted)
    own = Runtime()
    with pytest.raises(KeyboardInterrupt):
        own.close()
    assert own.health().status == "closed" and set_aside._holders == before + 1
    own.close()
    own.close()
    assert set_aside._holders == before and not any(thread.is_alive() for thread in own._stations[0].driver.threads)


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        ({"name": 3}, "tenant 3: a name is a str"),
        ({"slo": "5"}, "tenant 'new': slo is '5'"),
        ({"priority": "high"}, "tenant 'new': priority is 'high'"),
        ({"priority": 0.5}, "tenant 'new': priority is 0.5"),
        ({"quota": 1.5}, "tenant 'new': quota is 1.5"),
        ({"weight": None}, "tenant 'new': weight is None"),
        ({"example": X}, "tenant 'new': an example is of ndarray"),
        ({"example": None, "examples": []}, "tenant 'new': give either example="),
        ({"example": None, "examples": (X,)}, "tenant 'new': an example is of ndarray"),
        ({"params": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, "tenant 'new': params hold a ShapeDtypeStruct"),
    ],
)
def test_terms_that_mean_nothing(rt, terms, text):
    with pytest.raises(InvalidInput, match=re.escape(text)):
        rt.add_tenant(**{"name": "new", "fn": dense, "params": W, "example": (X,), "slo": 60.0, **terms})
    assert set(rt.stats().tenants) == {"good"}


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"w": W}, "params is no leaf, and f32.* when it was added; give params of the same tree"),
        (W[:3], r"params is f32\[3,4\], and f32\[4,4\] when it was added"),
        (np.eye(4, 5, dtype=np.float32), r"params is f32\[4,5\], and f32\[4,4\] when it was added"),
        (np.ma.masked_array(W, mask=W > 0), r"params is MaskedArray, and f32\[4,4\] when it was added"),
        (jax.ShapeDtypeStruct((4, 4), jnp.float32), "params hold a ShapeDtypeStruct"),
    ],
)
def test_weights_that_are_not_the_tenants(rt, params, text):
    with pytest.raises(InvalidInput, match=f"tenant 'good': .*{text}"):
        rt.update_tenant("good", params)
    np.testing.assert_array_equal(rt.submit("good", X).result(60), X)


@jax.tree_util.register_pytree_node_class
class Named:
    """Weights, with what is no leaf."""

    def __init__(self, w: Any, name: Any) -> None:
        self.w, self.name = w, name

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        return (self.w,), (self.name, dense)

    @classmethod
    def tree_unflatten(cls, rest: Any, children: tuple[Any]) -> "Named":
        return cls(*children, rest[0])


class Label:
    """Compares by identity."""

    def __init__(self, text: str) -> None:
        self.text = text


def labelled(p: Any, x: Any) -> Any:
    return {p["name"]: p["inner"][0].w @ x.T + p["inner"][1], p["label"].text: p["act"](x)}


def params_of(**other: Any) -> dict[str, Any]:
    own = {
        "name": "old",
        "inner": [Named(W, "a"), W[:, :1]],
        "label": Label("text"),
        "act": lambda x: x + 1,
        "no": None,
    }
    return {**own, **other}


def test_weights_of_another_tree_or_beside_other_leaves(rt):
    """What is made anew and compares by identity is taken, if the same program and results come of it."""
    rt.add_tenant("named", labelled, params_of(), example=(X,), slo=60.0)
    named = r"params\['inner'\]\[0\].* lies in a"
    for other, text in [
        ({"name": "new"}, r"params\['name'\] is 'new', and 'old' when it was added; give params of the same tree"),
        ({"more": None}, r"params\['more'\] is None, and no leaf when"),
        ({"no": W}, r"params\['no'\] is f32\[4,4\], and None when"),
        ({"more": ()}, r"params\['act'\] lies in a dict of \[.*'more'.*\], and in a dict of \["),
        ({"inner": (Named(W, "a"), W[:, :1])}, f"{named} tuple, and in a list when"),
        ({"inner": [Named(W, "b"), W[:, :1]]}, rf"{named} Named of \('b', .*in a Named of \('a'"),
        ({"act": "none"}, r"params\['act'\] is 'none', and a function when"),
        ({"act": lambda x: x + 2}, "it would be another program"),
        ({"label": Label("other")}, r"results are PyTreeDef\(.*'other'.*\), and PyTreeDef\(.*'text'.*\) when"),
    ]:
        with pytest.raises(InvalidInput, match=f"tenant 'named': .*{text}"):
            rt.update_tenant("named", params_of(**other))
    rt.update_tenant("named", params_of(inner=[Named(2 * W, "a"), W[:, :1]]))
    got = rt.submit("named", X).result(60)
    assert set(got) == {"old", "text"}
    np.testing.assert_array_equal(got["old"], 2 * X.T + W[:, :1])
    rt.remove_tenant("named")


def test_weights_that_were_deleted(rt):
    gone = jnp.asarray(W)
    gone.delete()
    with pytest.raises(InvalidInput, match="tenant 'good': params was deleted"):
        rt.update_tenant("good", gone)
    with pytest.raises(InvalidInput, match="tenant 'new': constant 0 was deleted"):
        rt.add_tenant("new", lambda _, x: x @ gone, (), example=(X,), slo=60.0)
    assert set(rt.stats().tenants) == {"good"}


@pytest.mark.parametrize(
    ("fn", "params", "text"),
    [
        (lambda w, x: (x.astype(w.dtype) @ w).astype(x.dtype), W.astype("float64"), r"f64\[4,4\]"),
        (lambda w, x: (x @ w) * jnp.argmax(x).astype(x.dtype), W, r"i64\[\]"),
    ],
    ids=["weights", "inside"],
)
def test_types_of_64_bits_are_for_the_whole_process(rt, fn, params, text):
    with jax.enable_x64(True), pytest.raises(InvalidInput, match=f"'wide' has {text}, which takes jax_enable_x64"):
        rt.add_tenant("wide", fn, params, example=(X,), slo=60.0)
    np.testing.assert_array_equal(rt.submit("good", X).result(60), X)


@pytest.mark.once
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_process_that_was_forked_off_is_told(rt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX and of Python: about what is shown here
        child = os.fork()
    if not child:
        signal.alarm(30)
        told = 0
        for ask, *args in ((rt.submit, X), (rt.update_tenant, W), (rt.remove_tenant,)):
            try:
                ask("good", *args)
            except Shutdown:
                told += 1
        rt.close()
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    np.testing.assert_array_equal(rt.submit("good", X).result(60), X)


@pytest.mark.parametrize("terms", [{"priority": "high"}, {"priority": 0.5}, {"priority": None}, {"deadline": "soon"}])
def test_terms_of_a_request_that_mean_nothing_end_nobody_else(rt, terms):
    (name,) = terms
    with pytest.raises(InvalidInput, match=f"tenant 'good': {name} is "):
        rt.submit("good", X, **terms)
    np.testing.assert_array_equal(rt.submit("good", X, priority=np.int64(3)).result(60), X)


@pytest.mark.parametrize("deadline", [60, np.float32(60), np.array(60.0), Decimal(60), 10**12], ids=repr)
def test_a_deadline_is_any_finite_number(rt, deadline):
    np.testing.assert_array_equal(rt.submit("good", X, deadline=deadline).result(60), X)
    assert rt.health().status == "serving"


def deleted() -> jax.Array:
    gone = jnp.asarray(X)
    gone.delete()
    return gone


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jax.ShapeDtypeStruct(X.shape, X.dtype), "is a ShapeDtypeStruct"),
        (deleted, "was deleted"),
    ],
    ids=["struct", "deleted"],
)
def test_inputs_without_values_are_refused_at_submit(rt, make, text):
    with pytest.raises(InvalidInput, match=rf"tenant 'good': input\[0\] {text}"):
        rt.submit("good", make())
