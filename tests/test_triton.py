"""The Triton backend, in Triton's interpreter on the CPU and, where there is one, on a CUDA device; the cases are in
``triton_cases.py``. Each runs in a process of its own, since Triton reads ``TRITON_INTERPRET`` when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastode.backends import BACKENDS

ROOT = Path(__file__).parent.parent


def run_cases(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/triton_cases.py"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST"))}
    done = subprocess.run(command, cwd=ROOT, env=variables | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device():
    run_cases()


def test_importing_fastode_does_not_import_triton():
    code = "import sys, fastode; assert 'triton' not in sys.modules and 'fastode.kernels.combine' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_says_why_it_cannot_run(monkeypatch):
    backend = BACKENDS["triton"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "interpreter" in (backend.missing(torch.device("cpu")) or "")
    assert "meta" in (backend.missing(torch.device("meta")) or "")
