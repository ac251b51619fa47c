"""Measures this library beside the reference, its peers and the limits of the machine.

python -m benchmarks                                  all figures, about half an hour on two cores
python -m benchmarks --only train_enwik8,decode       some of them; the others keep their places in the results
python -m benchmarks --quick                          tiny sizes, a few minutes: says that everything runs, no more
python -m benchmarks table --update-docs              the tables of docs/benchmarks.md and the README
python -m benchmarks profile decode                   where the time goes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # started as a file: modules are to be found from the project on, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "benchmarks"

from benchmarks import contestants, profiling, report
from benchmarks.figures import FIGURES
from benchmarks.measure import ROOT

RESULTS = Path(__file__).resolve().parent / "results.json"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=["run", "table", "profile"], default="run")
    parser.add_argument("what", nargs="?", choices=list(profiling.PROFILES), help="what to profile")
    parser.add_argument("--only", default=",".join(FIGURES), help=f"figures, of {', '.join(FIGURES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, written to results-quick.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all that torch takes")
    parser.add_argument("--results", type=Path, help="default benchmarks/results.json; a picture is put beside it")
    parser.add_argument("--no-install", action="store_true", help="take what .reference holds already")
    parser.add_argument("--update-docs", action="store_true", help="with table: put it into docs/benchmarks.md, and "
                        "its summary into README.md")  # fmt: skip
    options = parser.parse_args(given)
    if unknown := set(options.only.split(",")) - set(FIGURES):
        parser.error(f"--only names {sorted(unknown)}, the figures are {', '.join(FIGURES)}")
    if (options.task == "profile") != (options.what is not None):
        parser.error(f"profile needs one of {', '.join(profiling.PROFILES)}")
    if options.results is None:
        options.results = RESULTS.with_name("results-quick.json") if options.quick else RESULTS
    return options


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": {}}


def measure(options: argparse.Namespace) -> int:
    """Each figure in a process of its own; the results are written after each. Returns how many failed."""
    if not options.no_install:
        for name in contestants.install():
            print(f"{name} could not be installed: it is left out")
    results, failed = load(options.results), 0
    command = "python -m benchmarks" + (f" --threads {options.threads}") + (" --quick" if options.quick else "")
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figure.json"
            child = [sys.executable, "-m", "benchmarks.figures", name, "--json", str(file),
                     "--threads", str(options.threads), *["--quick"] * options.quick]  # fmt: skip
            if subprocess.run(child, cwd=ROOT, check=False).returncode:
                print(f"\n{name}: failed, see above")
                failed += 1
                continue
            figure = {**json.loads(file.read_text()), "command": command}
        results["figures"][name] = figure
        results["figures"] = {known: results["figures"][known] for known in FIGURES if known in results["figures"]}
        options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(report.text(name, figure), flush=True)
    print(f"\n{report.machine(results)}\nresults: {options.results}")
    picture = options.results.with_suffix(".png")
    print(f"picture: {picture}" if report.plot(results, picture) else "no picture: matplotlib is not installed")
    return failed


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if options.task == "profile":
        torch.set_num_threads(options.threads)
        profiling.show(options.what)
    elif options.task == "run":
        sys.exit(1 if measure(options) else 0)
    elif not options.results.exists():
        sys.exit(f"{options.results} is not there yet: run python -m benchmarks first")
    elif options.update_docs:
        results = load(options.results)
        report.update_page(ROOT / "docs" / "benchmarks.md", report.markdown(results))
        report.update_page(ROOT / "README.md", report.summary(results))
    else:
        print(report.markdown(load(options.results)))


if __name__ == "__main__":
    main()
