"""Does bf16 autocast learn as fp32 does? Runs train.py with several seeds in both, and compares the losses.

python -m benchmarks.loss_curves --seeds 3 --steps 500 --train --data stdlib --threads 1

What stands behind --train goes to train.py. Runs that are complete are not run again. The table gives, for each
stretch of steps, the mean loss (nats a byte) of all seeds, how far a seed is from another (standard deviation), and how
far bf16 is from fp32 with the same seed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import ROOT
from block_recurrent_transformer_pytorch import metrics


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics.read_lines(folder)] if (folder / "metrics.jsonl").exists() else []


def train(folder: Path, seed: int, precision: str, steps: int, flags: list[str]) -> list[float]:
    """The loss of every step. A run that was broken off goes on."""
    if len(losses(folder)) < steps:
        start = ["--resume", str(folder)] if folder.exists() else ["--out", str(folder)]
        command = [sys.executable, "train.py", *start, "--seed", str(seed), "--precision", precision,
                   "--steps", str(steps), *flags]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True)
    return losses(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "loss-curves")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="flags of train.py")
    options = parser.parse_args()
    runs = {
        (precision, seed): train(
            options.out / f"{precision}-{seed}", seed, precision, options.steps, ["--preset", "cpu", *options.train]
        )
        for seed in range(options.seeds)
        for precision in ("fp32", "bf16")
    }
    print(f"\n{'steps':>12}  {'fp32':>8}  {'seeds ±':>8}  {'bf16':>8}  {'bf16 - fp32, each seed'}")
    width = max(1, options.steps // 5)
    for first in range(0, options.steps, width):
        last = min(first + width, options.steps)
        mean = {key: statistics.mean(run[first:last]) for key, run in runs.items()}
        fp32, bf16 = ([mean[precision, seed] for seed in range(options.seeds)] for precision in ("fp32", "bf16"))
        spread = statistics.stdev(fp32) if options.seeds > 1 else float("nan")
        apart = "  ".join(f"{low - full:+.5f}" for full, low in zip(fp32, bf16, strict=True))
        means = f"{statistics.mean(fp32):8.5f}  {spread:8.5f}  {statistics.mean(bf16):8.5f}"
        print(f"{f'{first + 1}-{last}':>12}  {means}  {apart}")


if __name__ == "__main__":
    main()
