"""What a run measures: an object a step in JSON Lines, TensorBoard where it is installed, and the learning curve.

A line of metrics.jsonl holds what a step of training gave, and two figures of validation where they were taken:

    valid_bits_per_byte     over the same evenly spaced sample of the validation split each time: the learning curve
    final_bits_per_byte     after the last step, over the whole split (or --final-batches): another measure
"""

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
    Lines of later steps than the one that the run goes on after are removed, and the final figure of an earlier end.
    """

    def __init__(self, folder: Path, *, after_step: int, last_step: int, enabled: bool) -> None:
        self.metrics: Any = None
        self.timing: Any = None
        self.board: Any = None
        self.line: dict[str, Any] = {"step": 0}  # the last one
        if not enabled:
            return
        for name in ("metrics.jsonl", "timing.jsonl"):
            cut_after(folder / name, after_step, last_step)
            (folder / name).touch()
        self.metrics = (folder / "metrics.jsonl").open("r+b")
        self.timing = (folder / "timing.jsonl").open("a")
        self.line = (read_lines(folder) or [self.line])[-1]
        self.metrics.seek(0, os.SEEK_END)
        try:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            return
        self.board = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def write(self, metrics: dict[str, Any], seconds: float) -> None:
        """A line for a step."""
        if self.metrics is None:
            return
        speed = {"step": metrics["step"], "seconds": seconds, "tokens_per_second": metrics["targets"] / seconds}
        print(as_json(speed), file=self.timing, flush=True)
        self.put(as_json(metrics) + "\n")
        self.line = metrics
        self.draw(metrics["step"], metrics | speed)

    def add(self, step: int, **values: float) -> None:
        """More values in the line of this step, which is the last one; or a line of their own, if there is none."""
        if self.metrics is None:
            return
        if self.line["step"] == step:
            values = {name: value for name, value in values.items() if name not in self.line}
            self.metrics.seek(-len("}\n"), os.SEEK_CUR)
            self.put(", " + as_json(values)[1:] + "\n")
            self.line = {**self.line, **values}
        else:
            self.line = {"step": step, **values}
            self.put(as_json(self.line) + "\n")
        self.draw(step, values)

    def put(self, text: str) -> None:
        self.metrics.write(text.encode())
        self.metrics.flush()

    def draw(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        for file in (self.metrics, self.timing) if self.metrics else ():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in (self.metrics, self.timing, self.board):
            if file is not None:
                file.close()


def show(bar: Any, metrics: dict[str, Any], seconds: float) -> None:
    """Moves the progress bar by a step."""
    shown = {"loss": f"{metrics['loss']:.3f}", "bits/byte": f"{metrics['bits_per_byte']:.3f}",
             "tokens/s": f"{metrics['targets'] / seconds:,.0f}"}  # fmt: skip
    if metrics["skipped"]:
        shown["skipped"] = str(metrics["skipped"])
    bar.set_postfix(shown, refresh=False)
    bar.update()


def as_json(values: dict[str, Any]) -> str:
    """JSON has no infinities and no NaN: they become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(plain)


def cut_after(path: Path, step: int, last_step: int) -> None:
    """Removes the lines of later steps, and one that was cut off, from a file of a run that goes on after `step`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            if values["step"] > step:
                continue
            if values["step"] < last_step:
                values.pop("final_bits_per_byte", None)
            kept.append(as_json(values) + "\n")
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
    with written_at_once(path) as file:
        file.write("".join(kept).encode())


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def draw_curve(folder: Path) -> str:
    """Draws curve.png from metrics.jsonl: training and validation bits per byte over the steps.

    Returns:
        "curve.png", or why there is none: matplotlib is missing, or no figure is finite.
    """
    try:
        import matplotlib
    except ImportError:
        return "no curve.png: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def series(name: str) -> list[tuple[int, float]]:
        return [(line["step"], line[name]) for line in read_lines(folder) if line.get(name) is not None]

    trained = series("bits_per_byte")
    if not trained:
        return "no curve.png: there is no finite loss"
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    steps, bits = np.array(trained).T
    axes.plot(steps, bits, color="tab:blue", alpha=0.25, linewidth=0.8)
    width = max(1, len(bits) // 50)
    smooth = np.convolve(bits, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"training, mean of {width} steps")
    if valid := series("valid_bits_per_byte"):
        axes.plot(*zip(*valid), "o-", color="tab:orange", label="validation, the same sample each time")
    if final := series("final_bits_per_byte"):
        axes.plot(*zip(*final), "*", color="tab:red", markersize=12, label="validation, the whole split")
    axes.set(xlabel="step", ylabel="bits per byte", title=folder.name, ylim=(0.9 * bits.min(), None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)
    return "curve.png"
