"""Does a state help on text? Small models of bytes, with and without one, beside each other as they read on.

Every run is one of `train.py`, which goes on exactly where it was stopped, and is taken a slice of tokens further at a
time: at any moment all arms have read about as much. The rate falls with the root of the steps, as in the paper, so
that a run has no end that would have to be known when it begins. All arms of a seed read the same text in the same
order, so differences are those of pairs. Each begins once with every rate of a small grid; the best of them after
TUNED_AT tokens goes on, in the other seeds, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from block_recurrent_transformer_pytorch.distributed import start
from block_recurrent_transformer_pytorch.flags import as_flags, parse

from .running import machine, write

BATCH, SEGMENT, BLOCK = 4, 512, 64
PER_STEP = BATCH * SEGMENT
SIZES = {
    "preset": "cpu", "dim": 128, "depth": 4, "heads": 4, "dim_head": 32, "block": BLOCK, "segment": SEGMENT,
    "states": 32, "recurrent_layers": [3], "batch": BATCH, "schedule": "rsqrt", "warmup": 50, "valid_every": 10**9,
    "valid_batches": 32, "final_batches": 32, "checkpoint_every": 64, "keep": 1, "sample": 0, "device": "cpu",
    "set": {"all_layers_qk_rmsnorm": True, "attention_window": "sliding"},
}  # fmt: skip
RATES = (8e-3, 4e-3, 16e-3)
FIRST = 131_072  # tokens of the first slice
LARGEST = 262_144  # of a slice
TUNED_AT = FIRST
LAG = 4  # the first seed reads so many times as far as the others


@dataclass(frozen=True)
class Arm:
    """A model, and what is different about it."""

    title: str
    flags: dict[str, Any] = field(default_factory=dict, hash=False)  # of train.py
    settings: dict[str, Any] = field(default_factory=dict, hash=False)  # those without a flag of their own


NONE: dict[str, Any] = {"recurrent_layers": []}
RESET: dict[str, Any] = {"reset_states_every_block": True}
GATED = {"state_update": "token_gated", "gate": "hard", "gate_options": {"noise": 0.5}, "matching_init": True}
CURVE = {
    "none": Arm("no recurrent layer", NONE),
    "skip": Arm("fixed:skip"),
    "skip-reset": Arm("fixed:skip, trained with the state reset every block", RESET),
    "gated": Arm("token-gated writes, hard gate", {}, GATED),
    "gated-reset": Arm("token-gated writes, trained with the state reset every block", RESET, GATED),
}
CONTROL_OF = {"skip": "skip-reset", "gated": "gated-reset"}
TABLE = {
    "deeper": Arm("sliding window, one layer more", NONE | {"depth": 5}),
    "xl4": Arm("XL memory of 4 windows", NONE, {"attention_window": "blocks", "num_xl_blocks": 4}),
    "skip": CURVE["skip"],
    "dual": Arm("fixed:dual", {}, {"state_update": "dual"}),
    "lstm": Arm("lstm:skip", {}, {"gate": "lstm"}),
    "feedback": Arm("feedback", {}, {"block_feedback": True}),
}
ARMS = CURVE | TABLE


@dataclass(frozen=True)
class Text:
    """What is read, and where runs and results of it are kept."""

    data: str  # as --data of train.py
    valid: str  # as --valid; "" for a part of `data`
    results: Path
    runs: Path
    sizes: dict[str, Any] = field(default_factory=dict, hash=False)  # instead of those in SIZES

    @property
    def name(self) -> str:
        return "-".join(Path(self.data).resolve().parts[-2:]) if Path(self.data).exists() else self.data


@dataclass(frozen=True)
class Run:
    """One model with one seed and one rate."""

    text: Text
    arm: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.text.name}.{self.arm}.seed{self.seed}.rate{self.rate:g}"

    @property
    def result(self) -> dict[str, Any]:
        """What is known so far."""
        path = self.text.results / f"{self.name}.json"
        setup = {"data": self.text.name, "arm": self.arm, "seed": self.seed, "rate": self.rate,
                 "options": as_json(self.options)}  # fmt: skip
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found if found.get("setup") == setup else {"setup": setup, "machine": machine(), "curve": []}

    @property
    def options(self) -> dict[str, Any]:
        arm, sizes = ARMS[self.arm], SIZES | self.text.sizes
        return sizes | arm.flags | {"set": sizes["set"] | arm.settings, "lr": self.rate, "seed": self.seed}

    def flags(self, steps: int) -> list[str]:
        """The command line of train.py that takes the run so far."""
        where = {"data": self.text.data, "valid": self.text.valid or None, "cache": str(self.text.runs / "cache"),
                 "out": str(self.text.runs / self.name), "steps": steps, "threads": 1}  # fmt: skip
        return [*as_flags(self.options | where), "--resume"]

    def read_to(self, tokens: int) -> dict[str, Any]:
        """Trains until so many tokens are read and writes what validation gave, unless that is known."""
        from block_recurrent_transformer_pytorch.commands import train

        result = self.result
        if any(point["tokens"] == tokens for point in result["curve"]):
            return result
        folder, began = self.text.runs / self.name, time.process_time()
        self.text.runs.mkdir(parents=True, exist_ok=True)
        said = folder.with_name(f"{self.name}.log")
        with said.open("a") as log, redirect_stdout(log), redirect_stderr(log):
            status = train.main(self.flags(tokens // PER_STEP))
        if status:
            raise SystemExit(f"{self.name} stopped, see {said}; the same command goes on")
        config = json.loads((folder / "config.json").read_text())
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        point = {"tokens": tokens, "bits_per_byte": line["valid_bits_per_byte"], "training_loss": line["loss"],
                 "epoch": line["epoch"], "cpu_seconds": round(time.process_time() - began, 1)}  # fmt: skip
        result |= {"texts": config["corpus"], "precision": config["options"]["precision"]}
        result["curve"] = sorted([*result["curve"], point], key=lambda one: int(one["tokens"]))
        write(self.text.results / f"{self.name}.json", result)
        return result


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def ends(tokens: int) -> list[int]:
    """Where slices end: the first three double, then all are alike."""
    found = [FIRST]
    while found[-1] < tokens:
        found.append(found[-1] + min(found[-1], LARGEST))
    return found


def plan(arms: list[str], seeds: tuple[int, ...], tokens: int) -> list[tuple[int, int, str]]:
    """(end of the slice, seed, arm), in the order in which they are read: the first seed is ahead of the others."""
    slices = [
        (end * (1 if seed == seeds[0] else LAG), i, end, seed)
        for end in ends(tokens) for i, seed in enumerate(seeds)
    ]  # fmt: skip
    return [(end, seed, arm) for _, _, end, seed in sorted(slices) for arm in arms]


def bits_at(result: dict[str, Any], tokens: int) -> float | None:
    """Bits per byte after so many tokens, if they are known."""
    return next((float(point["bits_per_byte"]) for point in result["curve"] if point["tokens"] == tokens), None)


def tune(text: Text, arms: list[str], seed: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """The grid, rate by rate, so that no arm has been tried with more of them than another."""
    for rate in RATES:
        for run in (Run(text, arm, seed, rate) for arm in arms):
            yield run, run.read_to(TUNED_AT)


def carried_out(
    text: Text, arms: list[str], seeds: tuple[int, ...], tokens: int
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """All that is planned, and what is known of a run after each slice."""
    tried: dict[str, dict[float, float]] = {arm: {} for arm in arms}
    for run, result in tune(text, arms, seeds[0]):
        tried[run.arm][run.rate] = bits_at(result, TUNED_AT) or 0.0
        yield run, result
    for end, seed, arm in plan(arms, seeds, tokens):
        run = Run(text, arm, seed, min(tried[arm], key=tried[arm].__getitem__))
        yield run, run.read_to(end)


def line(result: dict[str, Any]) -> str:
    last = result["curve"][-1]
    return f"{last['tokens']:,} tokens {last['bits_per_byte']:.4f} bits per byte, {last['cpu_seconds']} CPU-s"


def measure_steps(text: Text, arms: list[str], pairs: int) -> dict[str, Any]:
    """CPU-seconds of a training step of each arm, taken in turns; written beside the curves."""
    from block_recurrent_transformer_pytorch.commands import train

    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    with start("cpu", timeout=50) as processes:
        runs = {}
        for arm in arms:
            options = parse(Run(text, arm, 0, RATES[0]).flags(1))
            runs[arm] = train.build(options, processes, text.runs / f"timing-{arm}", has_begun=False)
            train.train_step(runs[arm])
        for _ in range(pairs):
            for arm, run in runs.items():
                began = time.process_time()
                train.train_step(run)
                seconds[arm].append(time.process_time() - began)
    sizes = {arm: sum(p.numel() for p in run.model.parameters()) for arm, run in runs.items()}
    found = {arm: {"seconds": [round(s, 4) for s in taken], "median": round(median(taken), 4), "parameters": sizes[arm]}
             for arm, taken in seconds.items()}  # fmt: skip
    write(text.results / "timing.json", {"machine": machine(), "arms": found})
    return found
