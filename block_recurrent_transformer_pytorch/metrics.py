"""What a run tells: an object a step in JSON Lines, TensorBoard where it is installed, and the learning curve."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from .files import written_at_once


class Log:
    """metrics.jsonl, timing.jsonl and TensorBoard in the folder of a run; silent where `enabled` is not set.

    metrics.jsonl depends on the options alone: two equal runs, or a run that was stopped and went on, write the same.
    Lines of later steps than the one that the run goes on after are removed.
    """

    def __init__(self, folder: Path, *, after_step: int, enabled: bool) -> None:
        self.files: list[Any] = []
        self.board: Any = None
        if not enabled:
            return
        for name in ("metrics.jsonl", "timing.jsonl"):
            cut_after(folder / name, after_step)
            self.files.append((folder / name).open("a"))
        try:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            return
        self.board = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def write(self, metrics: dict[str, Any], seconds: float) -> None:
        if not self.files:
            return
        speed = {"step": metrics["step"], "seconds": seconds, "tokens_per_second": metrics["targets"] / seconds}
        for file, values in zip(self.files, (metrics, speed)):
            print(json.dumps({name: finite(value) for name, value in values.items()}), file=file, flush=True)
        for name, value in (metrics | speed).items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(name, value, metrics["step"])

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        for file in self.files:
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in (*self.files, *([self.board] if self.board else [])):
            file.close()


def check(told: Any, step: int) -> None:
    """Raises a ValueError if this is not what a step tells, nor None; it may come from a file that is not trusted."""
    match told:
        case None:
            return
        case {
            "step": int(found), "loss": float(), "bits_per_byte": float(), "targets": int(targets), "lr": float(),
            "grad_norm": float() | None, "skipped": int(), "epoch": int(), **rest,
        } if found == step and 0 < targets < 2**53 and not rest:  # fmt: skip
            return
    raise ValueError(f"told is {str(told)[:80]}")


def show(bar: Any, told: dict[str, Any], seconds: float) -> None:
    """Moves the progress bar by a step."""
    shown = {"loss": f"{told['loss']:.3f}", "bits/byte": f"{told['bits_per_byte']:.3f}",
             "tokens/s": f"{told['targets'] / seconds:,.0f}"}  # fmt: skip
    if told["skipped"]:
        shown["skipped"] = str(told["skipped"])
    bar.set_postfix(shown, refresh=False)
    bar.update()


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_after(path: Path, step: int) -> None:
    """Removes the lines of later steps, and one that was cut off, from a file of a run that goes on after `step`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, LookupError, TypeError):
            continue
    with written_at_once(path) as file:
        file.write("".join(kept).encode())


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path, name: str) -> float:
    """The last value of this name in metrics.jsonl; NaN if there is none, or it was not finite."""
    values = [line[name] for line in read_lines(folder) if name in line]
    return math.nan if not values or values[-1] is None else float(values[-1])


def draw_curve(folder: Path) -> None:
    """curve.png from metrics.jsonl: training and validation bits per byte over the steps. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_lines(folder)
    steps = [line["step"] for line in lines]
    bits = np.array([math.nan if line["bits_per_byte"] is None else line["bits_per_byte"] for line in lines])
    if not np.isfinite(bits).any():
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.plot(steps, bits, color="tab:blue", alpha=0.25, linewidth=0.8)
    width = max(1, len(bits) // 50)
    smooth = np.convolve(np.nan_to_num(bits), np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"training, mean of {width} steps")
    valid = [(line["step"], line["valid_bits_per_byte"]) for line in lines if "valid_bits_per_byte" in line]
    if valid:
        axes.plot(*zip(*valid), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="bits per byte", title=folder.name, ylim=(0.9 * np.nanmin(bits), None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)
