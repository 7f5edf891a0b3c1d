"""What pyproject.toml cannot say: with COALESCE_MYPYC=1 mypyc compiles what the policy thinks with.

    pip install "mypy>=1.18" "setuptools>=77"
    COALESCE_MYPYC=1 pip install --no-build-isolation .     needs a C compiler
    make native                                             the same in place, for who works on the checkout

It decides the same. Left as they are: what is told to a policy and by it, which everybody makes; `coalescing`, whose
classes may be derived from; and protocols.
"""

import os

from setuptools import setup

THINKS = """
    admission choice costs cover demand doubt evidence hopes joining lag lanes latency laying levels load outlook
    patience promises quarantine queues rate requests shares slots starting tenancy times told trial wants
"""
OPTIONS = ["--follow-imports=silent", "--ignore-missing-imports", "--no-site-packages"]
ASKED = os.environ.get("COALESCE_MYPYC") == "1"


def modules() -> list:
    try:
        from mypyc.build import mypycify
    except ImportError as e:
        raise SystemExit("COALESCE_MYPYC=1 needs mypy: pip install mypy, then pip install --no-build-isolation") from e
    return mypycify([*OPTIONS, *(f"coalesce/scheduler/{name}.py" for name in THINKS.split())], opt_level="3")


setup(ext_modules=modules() if ASKED else [])
