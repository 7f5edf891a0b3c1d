"""Print the path of an interpreter that Coalesce can use.

    python3 tools/newest_python.py                              the one running this, or else the newest one found
    python3 tools/newest_python.py --newer-than .venv/bin/python    the newest one found, if newer than that one

Searched: `python3` and `python3.N` in every folder of PATH, and what pyenv has installed. An interpreter counts if it
can make a virtual environment. This file keeps to old syntax, since `python3` may be older than Coalesce supports.
"""

import glob
import os
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 14)  # minor versions for which JAX, in the range of pyproject.toml, has wheels

PROBE = """
import sys, sysconfig, ensurepip, venv
if sys.version_info.releaselevel == "final" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print(sys.version_info[0], sys.version_info[1], sys.executable)
"""


def probe(path):
    """(version, real path) of the interpreter at `path`; None if it is none, or has no venv or ensurepip."""
    try:
        out = subprocess.check_output([path, "-c", PROBE], stderr=subprocess.DEVNULL, timeout=60).decode()
    except (OSError, subprocess.SubprocessError):
        return None
    if not out.strip():
        return None
    major, minor, executable = out.strip().split(" ", 2)
    return (int(major), int(minor)), executable


def candidates():
    names = ["python3"] + [f"python3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        for name in names:
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK):
                yield path
    pyenv = shutil.which("pyenv")
    if pyenv:
        root = subprocess.check_output([pyenv, "root"]).decode().strip()
        for minor in range(OLDEST[1], NEWEST[1] + 1):
            for path in sorted(glob.glob(os.path.join(root, "versions", f"3.{minor}.*", "bin", "python3"))):
                yield path


def newest():
    found = [probe(path) for path in candidates()]
    return max((p for p in found if p and OLDEST <= p[0] <= NEWEST), default=None)


def main(args):
    if args[:1] == ["--newer-than"]:
        base, best = probe(args[1]), newest()
        if not best or (base and best[0] <= base[0]):
            sys.exit("no newer interpreter found on PATH or in pyenv")
    else:
        here = probe(sys.executable)
        best = here if here and OLDEST <= here[0] <= NEWEST else newest()
        if not best:
            sys.exit(
                f"Coalesce needs Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} with the modules venv and"
                f" ensurepip; python3 is {sys.version.split()[0]}, and no other was found on PATH or in pyenv."
                " Install one (on Debian and Ubuntu also python3-venv), or name it: make PYTHON=/path/to/python3"
            )
    print(best[1])


if __name__ == "__main__":
    main(sys.argv[1:])
