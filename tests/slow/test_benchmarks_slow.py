"""The benchmark's command from end to end, at its tiny sizes and with nothing but this library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import pretrained  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("start", "names"),
    [(["-m", "benchmarks"], "train_small,replay,memory,stream,operators,import"), (["benchmarks/run.py"], "import")],
)
def test_quick_run(tmp_path, start, names):
    results = tmp_path / "results.json"
    command = [sys.executable, *start, "--quick", "--no-install", "--threads", "1", "--only", names]
    done = subprocess.run([*command, "--results", str(results)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(results.read_text())["figures"]
    assert sorted(figures) == sorted(names.split(","))
    for figure in figures.values():
        assert all(case["entries"]["ours"]["median"] > 0 for case in figure["cases"] if case["entries"])


def test_every_figure_of_pretrained_models_runs(tmp_path, capsys):
    for name in ("peft", "torchao", "transformers"):
        pytest.importorskip(name, reason=f"needs {name}")
    pretrained.main(["--quick", "--results", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["figures"]) == list(pretrained.FIGURES)
    told = capsys.readouterr().out
    assert "| fp32, CPU time |" in told and "| one token |" in told and "| writing behind 128 tokens, a token |" in told
