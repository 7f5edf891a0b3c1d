"""The command line: what a user's tenants become when they are fused, without running them.

    python -m coalesce inspect MODULE:FUNCTION                  print fused.explain()
    python -m coalesce inspect MODULE:FUNCTION --html PAGE      write a page to read in a browser
    python -m coalesce --version

FUNCTION takes nothing and returns the programs that `coalesce.trace` gave, as a list. Params may be ShapeDtypeStructs:
nothing is compiled, and no weight is needed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import reduce
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from coalesce.compile import fuse
from coalesce.errors import CoalesceError, PlanError, TraceError
from coalesce.html import html_page
from coalesce.program import Program

EXPECTED = "expected a function without parameters that returns a list of what coalesce.trace gave"


class UsageError(CoalesceError):
    """The command line names something that is not there, or not what it should be."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. What the user can put right is a message and status 2; an exception of
    their own code keeps its traceback."""
    options = parser().parse_args(argv)
    try:
        options.command(options)
        sys.stdout.flush()
    except (UsageError, TraceError, PlanError) as e:
        print(f"python -m coalesce: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m coalesce", description="Fuse many tenants' JAX inference programs.")
    top.add_argument("--version", action="version", version=version())
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect",
        help="show what fusing some programs gives",
        description="Print the programs after each pass, every superkernel, and every heavy op left alone with the "
        "reason. The fused program is not compiled.",
    )
    command.add_argument("function", metavar="MODULE:FUNCTION", help=f"{EXPECTED}; looked up from this directory too")
    command.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained page instead of the text")
    command.add_argument("--within-program", action="store_true", help="also pack equal ops of one program")
    command.add_argument(
        "--pack-unbounded-loops",
        action="store_true",
        help="also batch while loops whose trip count depends on the lane",
    )
    command.add_argument(
        "--platform", choices=("cpu", "gpu"), help="what kernels are chosen for (default: what JAX runs on here)"
    )
    command.set_defaults(command=show)
    return top


def version() -> str:
    try:
        ours = metadata.version("coalesce-jax")
    except metadata.PackageNotFoundError:
        ours = "(not installed)"
    return f"coalesce-jax {ours}, jax {jax.__version__}"


def show(options: argparse.Namespace) -> None:
    programs = programs_of(options.function)
    fused = fuse(
        programs,
        within_program=options.within_program,
        pack_unbounded_loops=options.pack_unbounded_loops,
        platform=options.platform,
    )
    if options.html is None:
        print(fused.explain())
        return
    try:
        options.html.write_text(html_page(fused), encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{options.html} cannot be written: {e.strerror}") from None
    print(f"{fused.report}\nwrote {options.html}")


def programs_of(target: str) -> list[Program]:
    """Call the function that `MODULE:FUNCTION` names.

    Raises:
      UsageError: there is no such module or function, it has parameters, or it returned something else.
    """
    function = find(target)
    needed = required_parameters(function)
    if needed:
        raise UsageError(f"{target} needs {', '.join(needed)}; {EXPECTED}")
    result = function()
    if isinstance(result, Program):
        raise UsageError(f"{target} returned one program; return a list, [program]")
    if not isinstance(result, list | tuple):
        raise UsageError(f"{target} returned a {type(result).__name__}; {EXPECTED}")
    if not result:
        raise UsageError(f"{target} returned no programs; {EXPECTED}")
    for i, item in enumerate(result):
        if not isinstance(item, Program):
            raise UsageError(f"{target} returned a list whose item {i} is a {type(item).__name__}; {EXPECTED}")
    return list(result)


def required_parameters(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in callables tell nobody
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def find(target: str) -> Callable[..., Any]:
    """The function called `MODULE:FUNCTION`; the current directory is importable, as with `python -m`."""
    module_name, _, path = target.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise UsageError(f"{target!r} is not of the form MODULE:FUNCTION, such as serving.tenants:programs")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise  # the module is there; what it imports is not
        hint = "; leave .py out" if module_name.endswith(".py") else ""
        raise UsageError(f"no module {module_name!r} in {os.getcwd()} or elsewhere on sys.path{hint}") from None
    try:
        found = reduce(getattr, path.split("."), module)
    except AttributeError:
        close = "".join(f"; did you mean {name!r}?" for name in get_close_matches(path, dir(module), n=1))
        raise UsageError(f"module {module_name!r} has no {path!r}{close}") from None
    if not callable(found):
        raise UsageError(f"{target} is a {type(found).__name__}; {EXPECTED}")
    return found


if __name__ == "__main__":
    sys.exit(main())
