"""The command line: what a user's tenants become when they are fused, without running them.

    python -m coalesce inspect MODULE:FUNCTION                  print fused.explain()
    python -m coalesce inspect MODULE:FUNCTION --html PAGE      write a page to read in a browser
    python -m coalesce tune MODULE:FUNCTION                     measure kernels for them on the device at hand
    python -m coalesce tune --model=resnet50 --tenants=16       the same for tenants of one of our models
    python -m coalesce tune --show                              print what was measured
    python -m coalesce --version

FUNCTION takes nothing and returns the programs that `coalesce.trace` gave, as a list. Params may be ShapeDtypeStructs:
no tenant is run, and no weight is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from coalesce.compile import fuse
from coalesce.errors import PlanError, TraceError, TuningError
from coalesce.html import html_page
from coalesce.kernels import KERNELS
from coalesce.measuring.tune import tune
from coalesce.models import NAMES
from coalesce.target import EXPECTED, Function, programs_of, Tenants, UsageError
from coalesce.tuning import known, load, user_file
from coalesce.tuning.show import table

LIMITS = ("workers", "seconds", "force", "company")
TUNE = ("function", "model", "dtype", "tenants", "out", "kernels", *LIMITS)  # None where they are not given


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. What the user can put right is a message and status 2; an exception of
    their own code keeps its traceback."""
    options = parser().parse_args(argv)
    try:
        options.command(options)
        sys.stdout.flush()
    except (UsageError, TraceError, PlanError, TuningError) as e:
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
    add_tune(commands)
    return top


def add_tune(commands: Any) -> None:
    command = commands.add_parser(
        "tune",
        help="measure kernels for some programs",
        description="Measure kernels and their block sizes for the packs of some programs on the device at hand, which "
        "nothing else should use, and keep the best for coalesce.fuse. An interrupted run goes on where it was.",
    )
    command.add_argument("function", nargs="?", metavar="MODULE:FUNCTION", help=f"{EXPECTED}, as for inspect")
    command.add_argument("--model", choices=NAMES, help="instead of a function: tenants of this model")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the model's weights and activations (default: bfloat16)",
    )
    command.add_argument("--tenants", type=int, help="how many of the model (default: 16)")
    command.add_argument("--out", type=Path, metavar="FILE", help="the database to fill (default: the user's own)")
    command.add_argument("--workers", type=int, help="processes that compile at once (default: this one)")
    command.add_argument("--seconds", type=float, help="begin nothing after so many")
    command.add_argument("--force", action="store_true", default=None, help="measure again what is known")
    company = "also measure the best beside another launch (GPU)"
    command.add_argument("--company", action="store_true", default=None, help=company)
    some = "measure only these, with commas between, and what runs untuned (default: all)"
    command.add_argument("--kernels", metavar="NAMES", help=some)
    command.add_argument(
        "--show", nargs="?", const="", metavar="FILE", help="print a database; what fuse uses, if no file is given"
    )
    command.set_defaults(command=tuned)


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


def check_tune(options: argparse.Namespace) -> None:
    """Raises UsageError for options that say nothing beside each other, and for numbers that are none of theirs."""
    given = [name for name in TUNE if getattr(options, name) is not None]
    if options.show is not None and given:
        what = options.function if given[0] == "function" else f"--{given[0]}"
        raise UsageError(f"tune --show prints what was measured and takes nothing else: leave {what} out")
    if options.show is not None:
        return
    if (options.function is None) == (options.model is None):
        raise UsageError("tune takes MODULE:FUNCTION or --model, one of them")
    if options.function and (of_model := [name for name in ("dtype", "tenants") if name in given]):
        raise UsageError(f"--{of_model[0]} is of a --model; {options.function} says which tenants it has")
    if options.tenants is not None and options.tenants < 1:
        raise UsageError(f"--tenants is {options.tenants}; it is how many of the model, one or more")
    if options.workers is not None and options.workers < 0:
        raise UsageError(f"--workers is {options.workers}; it is a number of processes, 0 for none besides this one")
    if options.seconds is not None and not options.seconds >= 0:
        raise UsageError(f"--seconds is {options.seconds:g}; it is a time from 0")


def tuned(options: argparse.Namespace) -> None:
    own = user_file()
    check_tune(options)
    if options.show is not None:
        print(table(load(Path(options.show)) if options.show else known()))
        return
    # A process reserves most of a GPU's memory when it starts to use it, and there may be several.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    of_model = options.dtype or "bfloat16", options.tenants or 16
    source = Function(options.function) if options.function else Tenants(options.model, *of_model)
    out = options.out or own
    if out is None:
        raise UsageError("there is no home directory to keep measurements in; give a file with --out")
    kernels = options.kernels.split(",") if options.kernels else []
    if unknown := sorted(set(kernels) - set(KERNELS)):
        raise UsageError(f"there is no kernel {unknown[0]!r}; there are {', '.join(KERNELS)}")
    limits = {name: getattr(options, name) for name in LIMITS if getattr(options, name) is not None}
    database = tune(source, out, kernels=kernels, **limits)
    if not database.entries:
        raise TuningError("nothing was measured, so nothing was written")
    used = "fuse uses it" if out == own else f"fuse(..., tuned={str(out)!r}) uses it"
    print(f"{out} has {len(database.entries)} entries; {used}")


if __name__ == "__main__":
    sys.exit(main())
