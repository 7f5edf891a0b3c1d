"""A tenant that goes while a thread is in the middle of a call about it, and whose name and slot others have by then:
nobody reads what another tenant's weights make of an input, and nobody writes there. Or one whose program is cut then.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from coalesce.errors import TenantClosed
from coalesce.runtime import cutting
from coalesce.runtime.runtime import Runtime
from tests.checked import checked_runtime

SLO = 60.0


def vector(value: float) -> np.ndarray:
    return np.full(4, value, np.float32)


def add(w: Any, x: Any) -> Any:
    return (w + x) * 2 - w


def times(w: Any, x: Any) -> Any:
    return (w["w"] * x + w["w"]) * 2


class Meanwhile:
    """An input of which nobody knows the values before something else has been done."""

    shape, dtype = (4,), np.dtype(np.float32)

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.do()
        return vector(1)


@jax.tree_util.register_pytree_node_class
class Params:
    """Weights in a container of the tenant's own, whose code may do anything."""

    def __init__(self, value: Any, do: Callable[[], None] = lambda: None) -> None:
        self.value, self.do = value, do

    def __getitem__(self, name: str) -> Any:
        return self.value

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        do, self.do = self.do, lambda: None
        do()
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> "Params":
        return cls(*children)


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.once)], ids=["whole", "in segments"])
def rt(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    with checked_runtime(widths=(1,), capacity=4, segments=request.param, compiled=False) as rt:
        rt.add_tenant("stays", add, vector(1), example=(vector(0),), slo=SLO)
        yield rt


def replaced(rt: Runtime, name: str, fn: Any, params: Callable[[float], Any]) -> None:
    """Another one has the slot, and another one the name."""
    rt.remove_tenant(name)
    rt.add_tenant("other", fn, params(100), example=(vector(0),), slo=SLO)
    rt.add_tenant(name, fn, params(3), example=(vector(0),), slo=SLO)


@pytest.mark.parametrize("is_last", [False, True], ids=["of many", "last of its family"])
def test_a_request_is_not_its_namesakes(rt: Runtime, is_last: bool):
    fn, params = (times, lambda v: {"w": vector(v)}) if is_last else (add, vector)
    rt.add_tenant("goes", fn, params(2), example=(vector(0),), slo=SLO)
    with pytest.raises(TenantClosed, match="'goes' was removed meanwhile"):
        rt.submit("goes", Meanwhile(lambda: replaced(rt, "goes", fn, params)), deadline=5.0)
    np.testing.assert_array_equal(rt.submit("goes", vector(1)).result(60), fn(params(3), vector(1)))
    with pytest.raises(TenantClosed, match="'other' was removed meanwhile"):
        asyncio.run(rt.infer("other", Meanwhile(lambda: rt.remove_tenant("other"))))
    rt.remove_tenant("goes")
    assert set(rt.stats().tenants) == {"stays"}


def test_new_weights_do_not_go_into_a_slot_that_another_has(rt: Runtime):
    rt.add_tenant("goes", times, Params(vector(2)), example=(vector(0),), slo=SLO)
    with pytest.raises(TenantClosed, match="'goes' was removed meanwhile"):
        rt.update_tenant("goes", Params(vector(50), lambda: replaced(rt, "goes", times, lambda v: Params(vector(v)))))
    for name, weight in (("other", 100), ("goes", 3)):
        got = rt.submit(name, vector(1)).result(60)
        np.testing.assert_array_equal(got, times({"w": vector(weight)}, vector(1)))
    free = rt._tenancy.residents["goes"].host.store.free
    for name in ("other", "goes"):
        rt.update_tenant(name, Params(vector(7)))
        np.testing.assert_array_equal(rt.submit(name, vector(1)).result(60), times({"w": vector(7)}, vector(1)))
    assert rt._tenancy.residents["goes"].host.store.free == free
    for name in ("other", "goes"):
        rt.remove_tenant(name)


def test_a_request_finds_its_program_that_was_cut_meanwhile(rt: Runtime, monkeypatch):
    monkeypatch.setattr(cutting, "GRACE_S", 0.0)
    site, host = rt._stations[0].quarters._site, rt._tenancy.residents["stays"].host
    before = host.families

    def cut() -> None:
        """In as many segments as it has: it goes on under another number."""
        with site.apart(host.schema.key):
            cutting.go_on(site, host, cutting.made(site, host, [course.segments for course in host.courses]))

    got = rt.submit("stays", Meanwhile(cut), deadline=20.0).result(60)
    np.testing.assert_array_equal(got, add(vector(1), vector(1)))
    assert set(before).isdisjoint(host.families)
