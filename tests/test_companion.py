"""Processes beside the one that serves find the modules that it finds, however many files it has open."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from coalesce.runtime.apart import Apart, is_starved
from coalesce.runtime.companion import command, search_path
from coalesce.runtime.second import Compiler, environment, is_wanted, WANTED

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


CPU: Any = SimpleNamespace(platform="cpu")
CUDA: Any = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version="cuda 13000"))
ROCM: Any = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version="rocm 60300"))
TPU: Any = SimpleNamespace(platform="tpu", client=SimpleNamespace(platform_version="libtpu"))


def test_a_second_process_compiles_for_a_cpu_and_an_nvidia_gpu_unless_forbidden(monkeypatch):
    def wanted(asked: str | None) -> list[bool]:
        monkeypatch.delenv(WANTED) if asked is None else monkeypatch.setenv(WANTED, asked)
        return [is_wanted(device) for device in (CPU, CUDA, ROCM, TPU)]

    assert wanted(None) == [True, True, False, False]
    assert wanted("0") == [False] * 4
    assert wanted("1") == [True, True, False, False]
    assert Apart().takes_on(CPU) and Apart().takes_on(CUDA) and not Apart().takes_on(TPU)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert wanted("1") == [True, False, False, False]


def test_it_sees_the_gpus_that_are_seen_here_and_keeps_no_memory_of_them(monkeypatch):
    alone = environment({"cpu"})
    assert alone["JAX_PLATFORMS"] == "cpu" and "XLA_PYTHON_CLIENT_PREALLOCATE" not in alone
    both = environment({"cpu", "cuda"})
    assert both["JAX_PLATFORMS"] == "cuda,cpu" and both["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert both["JAX_CUDA_VISIBLE_DEVICES"] == "all"


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
