"""Flags that belong to one experiment: two of them can be imported side by side, which absl's common flags forbid.

    FLAGS = flags.FlagValues()
    flags.DEFINE_integer("tenants", 8, "how many", flag_values=FLAGS)
    ...
    def main(argv: Sequence[str]) -> None:
        parse("isolation", FLAGS, argv)
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from experiments.results import device_folder, writable

QUIET = ("device_name", "note", "out")  # what the header says anyway, and the folder of one machine


def define_common(own: flags.FlagValues) -> None:
    flags.DEFINE_string("device_name", None, "how the results call the device", flag_values=own)
    flags.DEFINE_string("note", "", "a remark for the results' header", flag_values=own)
    flags.DEFINE_string("out", None, "folder of the results; experiments/results/<device> else", flag_values=own)


def parse(script: str, own: flags.FlagValues, argv: Sequence[str]) -> None:
    """Raises SystemExit for --help, and for what is no flag."""
    logging.set_verbosity(logging.WARNING)  # JAX names every backend that it does not find
    if "--help" in argv:
        print(f"python -m experiments.{script}\n{own.get_help()}")
        raise SystemExit(0)
    try:
        rest = own([script, *argv])
    except flags.Error as e:
        raise SystemExit(f"{e}\n--help lists the flags") from None
    if rest[1:]:
        raise SystemExit(f"what is {rest[1]}? --help lists the flags")


def command(script: str, own: flags.FlagValues) -> str:
    given = [own[name].serialize() for name in sorted(own) if own[name].present and name not in QUIET]
    return shlex.join(["python", "-m", f"experiments.{script}", *given])


def folder(own: Any) -> Path:
    return writable(Path(own.out or Path("experiments", "results", device_folder())))

