"""The folder of a run: never that of another, written to by one run at a time, what made it, and what cannot change."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__, files, lora
from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from .checkpoint import Checkpoint
from .config import Config
from .distributed import Processes
from .tuning import differences


def make_folder(out: str | None, preset: str, resume: bool, processes: Processes) -> Path:
    """The folder of the run, made by the first process; without `out` one of runs/ named by the preset and the time.

    Raises:
        ValueError: a new run would go into the folder of another, there is none to resume, or it cannot be written to.
    """
    if out is None:
        name = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        taken = (Path("runs") / name, *(Path("runs") / f"{name}-{number}" for number in range(2, 1000)))
        out = processes.share(next(str(path) for path in taken if not path.exists()))
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is no folder")
    names = processes.share({path.name for path in folder.iterdir()} if folder.exists() else set())
    names -= {"lock", "config.json.tmp"}
    if names and not resume:
        raise ValueError(f"--out {folder} is not empty; --resume goes on with the run in it")
    if names and "config.json" not in names:
        raise ValueError(f"--resume {folder}: there are files, but no run: it has no config.json")
    if "metrics.jsonl" in names and not (folder / "checkpoints").is_dir():
        raise ValueError(f"--resume {folder}: its checkpoints/ is missing, and to begin anew would lose its "
                         "metrics.jsonl: put the one back, or the other away")  # fmt: skip
    if refused := processes.share(make_writable(folder) if processes.is_first else ""):
        raise ValueError(f"--out {folder} cannot be written to: {refused}")
    return folder


def make_writable(folder: Path) -> str:
    """Makes the folder; returns why it cannot be written to, if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return ""


@contextmanager
def locked(folder: Path, processes: Processes) -> Iterator[None]:
    """Only one run at a time writes to a folder. The lock goes with the process, however it ends."""
    if not processes.is_first:
        yield
        return
    try:
        with files.locked(folder / "lock"):
            yield
    except BlockingIOError as error:
        raise ValueError(f"--out {folder} is in use by a run that has not ended") from error


@contextmanager
def listening(signals: list[tuple[int, float]], *, quiet: bool) -> Iterator[None]:
    """Ctrl-C and SIGTERM are noted, with their time, and nothing else; one more of them is a KeyboardInterrupt.

    Within a second they count as one: a scheduler signals all processes, and torchrun passes on what it gets.
    """

    def note(number: int, frame: Any) -> None:
        signals.append((number, time.monotonic()))
        if signals[-1][1] - signals[0][1] > 1:
            raise KeyboardInterrupt
        if len(signals) == 1 and not quiet:  # print may be at work, and takes no second call
            os.write(2, b"\nstopping after this step (once more: at once)\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_options(
    options: argparse.Namespace, folder: Path, model: BlockRecurrentTransformer, stream: dict[str, Any],
    saved: Checkpoint,
) -> None:  # fmt: skip
    """A ValueError names what a run cannot change when it goes on. `stream` is the state of its text's reader."""
    metadata, weights = saved.metadata, saved.tensors["model"]
    begin = f"--init {folder} --out NEW"
    if other := differences(Config.from_dict(metadata["model_config"]), model.config):
        raise ValueError(f"its model has other sizes or options than those given now: {other}; to begin a new run with "
                         f"its weights: {begin}")  # fmt: skip
    if lora.shapes(weights) != lora.shapes(model.state_dict()):
        raise ValueError(f"--lora-rank {options.lora_rank}: the run in {folder} has other adapters, or none; to "
                         f"begin a new run with its weights: {begin}")  # fmt: skip
    own = {"batch": options.batch, "segment": options.segment, "seed": options.seed, "optimizer": options.optimizer}
    for name, now in own.items():
        then = metadata["optimizer"] if name == "optimizer" else metadata["stream"][name]
        if then != now:
            raise ValueError(f"--{name} {now}: the run in {folder} has {then}")
    if metadata["stream"]["corpus"] != stream["corpus"]:
        raise ValueError(f"--data {options.data}: the run in {folder} reads another text, or its files have changed "
                         f"since; to train its weights on this one: {begin}")  # fmt: skip
    then, dtype = weights["token_emb.weight"].dtype, model.token_emb.weight.dtype
    if then != dtype:
        raise ValueError(f"--precision {options.precision} keeps weights in {dtype}, the run in {folder} in {then}")


def versions() -> dict[str, str]:
    return {
        "block_recurrent_transformer_pytorch": __version__, "torch": str(torch.__version__), "numpy": np.__version__,
        "python": platform.python_version(), "platform": platform.platform(),
    }  # fmt: skip


def commit(folder: Path) -> str | None:
    """The git commit of a folder, with "+" if files were changed since."""
    try:
        found, changed = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("+" if changed else "")
