"""Times taken in turns, operators counted, memory of a process: what the figures are made of."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")


class Unavailable(Exception):
    """A contestant that cannot be had here; the message says why."""


# ----------------------------------------------------------------------------------------------------------------- time


def interleave(
    contestants: Mapping[str, Callable[[], Any]], runs: int, calls: Mapping[str, int] | None = None, warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each contestant, taken in turns A B A B, so that whatever else the machine does strikes all alike.

    `calls` says how many calls of a contestant are one run (default 1); the time is that of one call.
    """
    for run in contestants.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, run in contestants.items():
            count = (calls or {}).get(name, 1)
            synchronise()
            start = clock()
            for _ in range(count):
                run()
            synchronise()
            times[name].append((clock() - start) / count)
    return times


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high}


def case(name: str, values: Mapping[str, list[float]], unit: str, notes: Mapping[str, str] | None = None) -> dict:
    """One line of a figure: the values of each contestant, and their ratios to ours, pair by pair."""
    entries = {who: {**spread(measured), "runs": len(measured)} for who, measured in values.items()}
    for who, entry in entries.items():
        if "ours" in values and who != "ours":
            entry["ratio"] = spread([theirs / ours for theirs, ours in zip(values[who], values["ours"])])
    return {"case": name, "unit": unit, "entries": entries, "notes": dict(notes or {})}


def timed(
    name: str, makers: Mapping[str, Callable[[], Callable[[], Any]]], runs: int,
    calls: Mapping[str, int] | None = None, warmup: int = 1,
) -> dict:  # fmt: skip
    """A case of seconds. Each maker builds one contestant; one that is not to be had becomes a note."""
    contestants, notes = {}, {}
    for who, make in makers.items():
        try:
            contestants[who] = make()
        except Unavailable as why:
            notes[who] = str(why)
    return case(name, interleave(contestants, runs, calls, warmup), "s", notes)


# ------------------------------------------------------------------------------------------------------------ operators


class Operators(TorchDispatchMode):
    """Counts the operators that run: those that a GPU would have to launch, without views and empty buffers."""

    PASSIVE = ("aten.empty", "aten.detach", "aten._unsafe_view", "aten.lift", "aten._reshape_alias", "profiler.")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.is_view and not str(func).startswith(self.PASSIVE):
            self.count += 1
        return func(*args, **(kwargs or {}))


def operators(run: Callable[[], Any]) -> float:
    """How many operators one call dispatches."""
    run()
    with Operators() as counter:
        run()
    return float(counter.count)


# --------------------------------------------------------------------------------------------------------------- memory


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function of this package in a fresh process with as many threads; Unavailable comes through.

    glibc is told to give freed blocks back at once: otherwise its habits, and not the step, would decide the peak.
    """
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")  # read as the process starts
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(with_threads, torch.get_num_threads(), function, *arguments).result()


def with_threads(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments)


def peak_memory(make: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """MiB that building and two runs take at their peak, beyond what a process had before. For one of its own."""
    warm_up()
    before = resident()
    run = make(*arguments)
    for _ in range(2):
        run()
    return (peak_resident() - before) / 2**20


def warm_up() -> None:
    """A step of nothing, for what PyTorch loads when it first computes."""
    model = torch.nn.Linear(8, 8, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(8, 8, device=DEVICE)).sum().backward()
    optimizer.step()


def resident() -> float:
    """Bytes in use now, and the peak starts here."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of Linux begins anew
    except OSError:
        return peak_resident()
    return kilobytes("VmRSS") * 1024


def peak_resident() -> float:
    if DEVICE.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    try:
        return kilobytes("VmHWM") * 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def kilobytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))


# ---------------------------------------------------------------------------------------------------------- the machine


def has_fast_bf16() -> bool:
    """Whether matrix products in bf16 are more than an emulation."""
    return DEVICE.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on."""
    info = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        info = {key.strip(): value.strip() for key, value in pairs}
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FAST_FLAGS if flag in flags],
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit of the working tree, with + where it was changed."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "block_recurrent_transformer_pytorch")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
