"""Processes beside the one that serves find the modules that it finds, however many files it has open."""

import os
import subprocess
import sys

import pytest

from coalesce.runtime.apart import Compiler, is_starved
from coalesce.runtime.companion import command, search_path

fcntl = pytest.importorskip("fcntl")
resource = pytest.importorskip("resource")
pytestmark = pytest.mark.once
MANY = 1024  # files: what `select` takes


def test_what_lies_in_the_working_directory_is_no_module_unless_it_is_here(tmp_path, monkeypatch):
    (tmp_path / "this.py").write_text("print('another')")

    def said(path: str) -> bytes:
        return subprocess.run(command("this"), cwd=tmp_path, env={"PYTHONPATH": path}, stdout=-1, check=True).stdout

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["there", *sys.path])
    assert search_path().split(os.pathsep)[0] == str(tmp_path / "there")
    assert b"Zen" in said(search_path())
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert b"another" in said(search_path())


def test_who_has_many_files_open_hears_the_compiler_too():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard <= MANY:
        pytest.skip("nobody may have so many files open here")
    source, to = os.pipe()
    if resource.RLIM_INFINITY != soft <= MANY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (MANY + 1, hard))
    try:
        with open(fcntl.fcntl(source, fcntl.F_DUPFD, MANY), "rb") as answers:
            os.write(to, b"an answer")
            process = Compiler([sys.executable, "-S", "-c", ""])
            process.stdout = answers
            assert not is_starved(process, 60.0, 0.2)
            process.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(source)
        os.close(to)
