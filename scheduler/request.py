"""Who asks, and for what.

    Tenant     one model: how urgent its requests are, and how large its share is
    Request    one call of it: one lane of some bundle, until it ends

A family is a number: tenants of one family run one program, so that their requests can be lanes of one executable.
"""

from __future__ import annotations

from typing import NamedTuple


class Tenant(NamedTuple):
    name: str
    families: tuple[int, ...]  # of each of its request shapes
    slo_ns: int  # from submit to result, for requests without a deadline of their own
    priority: int = 0  # larger goes first, strictly
    weight: float = 1.0  # its share, among tenants of one priority
    quota: int = 1024  # the most requests that may wait


class Request(NamedTuple):
    id: int  # no two are equal; those of one thread ascend
    tenant: str
    family: int
    arrival_ns: int
    deadline_ns: int
    priority: int = 0
