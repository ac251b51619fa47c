"""Nothing is read from a GPU between calls: see fake_gpu.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "variants", ["default", pytest.param("authors or compressed or handed", marks=pytest.mark.slow)]
)
def test_on_a_fake_gpu(variants: str) -> None:
    chosen = f"{variants} or reset or notices" if variants == "default" else variants
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, "fake_gpu.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
