"""Where the time goes: torch's profiler over a few steps, operators by their own time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from .contestants import ENWIK8, SMALL, ours_step, ours_token
from .measure import DEVICE, synchronise

PROFILES: dict[str, tuple[Callable[[], Callable[[], Any]], int]] = {  # what makes the step, and how often it runs
    "train_enwik8": (lambda: ours_step(ENWIK8, 1), 3),
    "train_small": (lambda: ours_step(SMALL, 8), 3),
    "decode": (lambda: ours_token(ENWIK8, 1000, 1), 100),
    "decode_8": (lambda: ours_token(ENWIK8, 1000, 8), 100),
    "decode_8_ragged": (lambda: ours_token(ENWIK8, 1000, 8, True), 100),
}


def show(name: str, rows: int = 30) -> None:
    """Prints the table of one of PROFILES."""
    make, steps = PROFILES[name]
    step = make()
    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        synchronise()
    print(f"{name}: {steps} steps")
    key = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=48))
