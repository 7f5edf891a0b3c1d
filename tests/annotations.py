"""Annotations are checked as the tests run: `check_all` lets beartype check every call of what is imported afterwards.

Checked are the functions and methods of modules, and what the generated constructors of dataclasses get; not functions
inside functions, which would be wrapped anew whenever the outer one is called, at milliseconds each. jaxtyping has such
a hook too; its checks of shapes, of which the library states none, took half of the time of `fuse`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import decode_source
from random import Random
from types import ModuleType
from typing import Any
from unittest.mock import patch

with patch("random.getrandbits", Random(0).getrandbits):
    from beartype import beartype  # looks at one element of a list: which is not for hypothesis to know, or to decide

FUNCTION, CLASS = "__check_function__", "__check_class__"  # what a checked module calls the two


def check_all(package: str) -> None:
    """Check the modules of the package that are imported from now on."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == package]
    assert not loaded, f"imported already, and therefore unchecked: {loaded}"
    sys.meta_path.insert(0, Finder(package))


def check_class(cls: type) -> type:
    if is_dataclass(cls) and "__init__" in vars(cls):
        setattr(cls, "__init__", beartype(vars(cls)["__init__"]))  # noqa: B010, as type checkers forbid the other way
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
        vars(module).update({FUNCTION: beartype, CLASS: check_class})
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
