"""Experiments on what a state remembers.

python -m evidence facts                              all that is not done yet; hours, to be interrupted at will
python -m evidence facts --only one-fact              the experiments whose names begin so
python -m evidence facts --arms token-gated --seeds 3,4,5
python -m evidence pairs --arms max-8,max-16          128 pairs through routed memory
python -m evidence text --data books/ --valid others/ language models with and without a state; as long as one likes
python -m evidence text-time                          CPU-seconds of their training steps, in turns
python -m evidence report                             docs/evidence.md and its plots from evidence/results
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import pairs, report, text
from .experiments import CONTROLS, EXPERIMENTS, SEEDS
from .running import RESULTS, ROWS, WEIGHTS, runs

DOCS = Path(__file__).resolve().parent.parent / "docs"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["facts", "pairs", "text", "text-time", "report"])
    parser.add_argument("--only", default="", help=f"beginnings of names, of {', '.join(EXPERIMENTS)}")
    parser.add_argument(
        "--arms", default="",
        help=f"default all; of facts token-gated, {', '.join(CONTROLS)}; of pairs {', '.join(pairs.ARMS)}; of text "
        f"{', '.join(text.ARMS)}",
    )  # fmt: skip
    parser.add_argument("--seeds", default="", help="default those of the experiment")
    parser.add_argument(
        "--parts", type=int, help=f"of the evaluation: of facts of {ROWS} rows each (default 4); of pairs streams (3)"
    )
    parser.add_argument("--data", default="stdlib", help="of text: what is read, as --data of train.py")
    parser.add_argument("--valid", default="", help="of text: other text to validate on; default a part of --data")
    parser.add_argument("--tokens", type=int, default=2**26, help="of text: how many each run reads")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results, one JSON file each")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder that evidence.md goes to")
    options = parser.parse_args(given)
    options.seeds = tuple(int(seed) for seed in options.seeds.split(",") if seed)
    known = {"pairs": pairs.ARMS, "text": text.ARMS, "text-time": text.ARMS}.get(
        options.task, ("token-gated", *CONTROLS)
    )
    if unknown := set(filter(None, options.arms.split(","))) - {*known}:
        parser.error(f"--arms names {sorted(unknown)}, there are {', '.join(known)}")
    if not any(name.startswith(tuple(options.only.split(","))) for name in EXPERIMENTS):
        parser.error(f"--only={options.only} names no experiment, there are {', '.join(EXPERIMENTS)}")
    return options


def read_text(options: argparse.Namespace, weights: Path) -> None:
    what = text.Text(options.data, options.valid, options.results / "text", weights / "text")
    arms = [arm for arm in text.ARMS if not options.arms or arm in options.arms.split(",")]
    if options.task == "text-time":
        for arm, found in text.measure_steps(what, arms, pairs=12).items():
            print(f"{arm}: {found['median']} CPU-s a step, {found['parameters']:,} parameters", flush=True)
        return
    for run, result in text.carried_out(what, arms, options.seeds or SEEDS, options.tokens):
        print(f"{run.name}: {text.line(result)}", flush=True)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if options.task == "report":
        print(f"written: {report.write(options.results, options.docs)}")
        return
    torch.set_num_threads(options.threads)
    weights = WEIGHTS if options.results == RESULTS else options.results / ".weights"
    if options.task.startswith("text"):
        read_text(options, weights)
        return
    if options.task == "pairs":
        options.parts = options.parts or 3
        for name, seed, result in pairs.carried_out(
            options.arms, options.seeds, options.results, weights, options.parts
        ):
            print(f"{name}, seed {seed}: {pairs.line(result)}", flush=True)
        return
    for run in runs(options.only, options.arms, options.seeds):
        result = run.carry_out(options.results, weights, options.parts or 4)
        print(f"{run.name}: {report.line(result)}", flush=True)


if __name__ == "__main__":
    main()
