"""Annotations are checked as the tests run: `check_all` lets beartype check every call of what is imported afterwards.

Checked are the functions and methods of modules, and what the generated constructors of dataclasses get; not functions
inside functions, which would be wrapped anew whenever the outer one is called, at milliseconds each. jaxtyping has such
a hook too; its checks of shapes, of which the library states none, took half of the time of `fuse`.

In each test the first calls of a function are checked, FIRST of them: with all of them simulating took twice as long,
and a hundred thousand events call a function as the first of them did.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache, update_wrapper
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import decode_source
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction, signature
from random import Random
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

with patch("random.getrandbits", Random(0).getrandbits):
    from beartype import beartype  # looks at one element of a list: which is not for hypothesis to know, or to decide

FIRST = 5
FUNCTION, CLASS = "__check_function__", "__check_class__"  # what a checked module calls the two


def check_all(package: str) -> None:
    """Check the modules of the package that are imported from now on."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == package]
    assert not loaded, f"imported already, and therefore unchecked: {loaded}"
    sys.meta_path.insert(0, Finder(package))


spent: list[tuple[FunctionType, CodeType]] = []  # functions that check no more, and the code that does


asleep: list[None] = []  # nothing is checked while there is something in it


@contextmanager
def nothing_checked() -> Iterator[None]:
    """As users call, who may give anything; not of coroutines and generators."""
    asleep.append(None)
    try:
        yield
    finally:
        asleep.pop()


def check_again() -> None:
    """All functions, from now on: another test begins."""
    while spent:
        fn, checks = spent.pop()
        fn.__code__ = checks


def check_function(fn: Any) -> Any:
    """The same function, whose code is one that checks until it has done so often enough: a function around it would
    take half of what checking does, in all calls."""
    if isgeneratorfunction(fn) or iscoroutinefunction(fn) or isasyncgenfunction(fn):
        return beartype(fn)
    own = fn.__code__
    inner = FunctionType(own, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    update_wrapper(inner, fn)
    del inner.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    inner.__kwdefaults__ = fn.__kwdefaults__
    checked = beartype(inner)
    if checked is inner:
        return fn
    left = FIRST

    def first(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if asleep:
            return inner(*args, **kwargs)
        left -= 1
        if left <= 0:
            left = FIRST
            fn.__code__ = own
            spent.append((fn, checks))
        return checked(*args, **kwargs)

    own_way = code_through(own.co_freevars)
    checks = own_way.replace(
        co_consts=tuple(first if x == "what is called" else x for x in own_way.co_consts),
        co_name=own.co_name, co_qualname=own.co_qualname,
        co_filename=own.co_filename, co_firstlineno=own.co_firstlineno,
    )  # fmt: skip
    fn.__signature__ = signature(fn)
    fn.__code__ = checks
    return fn


@cache
def code_through(free: tuple[str, ...]) -> CodeType:
    """Code that calls what it is told, of a function with free variables of these names, which are looked for in its
    frames: by pytest, when a test fails, and the interpreter crashes where there are none."""
    lines = [
        f"def around({', '.join(free)}):",
        "    def through(*_args, **_kwargs):",
        "        _call = 'what is called'",
        "        return _call(*_args, **_kwargs)",
        f"        {', '.join(free) or None}",
        "    return through",
    ]
    made: dict[str, Any] = {}
    exec("\n".join(lines), made)  # noqa: S102
    code = made["around"](*free).__code__
    assert code.co_freevars == free, f"{code.co_freevars} is not {free}"
    return code


def check_class(cls: type) -> type:
    if is_dataclass(cls) and "__init__" in vars(cls):
        checked = check_function(vars(cls)["__init__"])
        setattr(cls, "__init__", checked)  # noqa: B010, as type checkers forbid the other way
    return cls


class Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self._package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


class Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        """Compiled anew in each process: what is kept beside the sources is without checks."""
        tree = ast.parse(decode_source(self.get_data(self.path)), self.path)
        decorate(tree.body)
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update({FUNCTION: check_function, CLASS: check_class})
        super().exec_module(module)


def decorate(body: Sequence[ast.stmt]) -> None:
    """Functions below their own decorators, as these may hide the annotations; classes above, once they are made."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                node.decorator_list.append(ast.copy_location(ast.Name(FUNCTION, ast.Load()), node))
            case ast.ClassDef():
                node.decorator_list.insert(0, ast.copy_location(ast.Name(CLASS, ast.Load()), node))
                decorate(node.body)
