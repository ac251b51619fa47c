"""Runs: one for each experiment, arm and seed. What is done is on disk, so anything may be interrupted and goes on."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config

from .experiments import EXPERIMENTS
from .streaming import remembered
from .tasks import standard_library
from .training import Reader, train

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = 32  # of a part of the evaluation
WEIGHTS = Path(__file__).resolve().parent / ".weights"


@dataclass(frozen=True)
class Run:
    experiment: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.experiment}.{self.arm}.seed{self.seed}"

    def carry_out(self, folder: Path, weights: Path, parts: int) -> dict[str, Any]:
        """Trains, then reads so many parts of ROWS rows; each is written as soon as it is done, and not done again."""
        experiment = EXPERIMENTS[self.experiment]
        arm = experiment.arms[self.arm]
        config, task = experiment.config(arm), experiment.task
        path, stored = folder / f"{self.name}.json", weights / f"{self.name}.safetensors"
        setup = as_json({"experiment": self.experiment, "arm": self.arm, "seed": self.seed, "task": asdict(task),
                         "config": asdict(config), "recipe": asdict(experiment.recipe), "rows": ROWS,
                         "distances": distances(self), "reset_states": arm.reset_states})  # fmt: skip
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not is_same(result.get("setup", {}), setup):
            result = {"setup": setup}
        if len(finished(result, self)) >= parts:
            return result
        if "training" in result and stored.exists():
            model = BlockRecurrentTransformer(config).eval()
            model.load_state_dict(load_file(stored))
        else:
            model, result["training"] = train(config, task, experiment.recipe, self.seed, arm.reset_states)
            result |= {"machine": machine(), "parts": []}
            weights.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), stored)
            write(path, result)
        result["parts"] = finished(result, self)
        for part in range(len(result["parts"]), parts):
            result["parts"].append([])
            draw = torch.Generator().manual_seed(10**6 * (1 + part) + self.seed)
            for found in remembered(Reader(model, arm.reset_states), task, ROWS, distances(self), draw):
                result["parts"][part].append(found)
                write(path, result)
        return result


def is_same(stored: dict[str, Any], setup: dict[str, Any]) -> bool:
    """Whether a result was measured so. An option that Config did not have then counts as its default: those who add
    one keep what the others mean, and a result must not be thrown away for it."""
    names = [option.name for option in fields(Config) if option.default is MISSING is option.default_factory]
    defaults = as_json(asdict(Config(**{name: setup["config"][name] for name in names})))
    return {**stored, "config": defaults | stored.get("config", {})} == setup


def finished(result: dict[str, Any], run: Run) -> list[Any]:
    """The parts of the evaluation that went to the greatest distance."""
    return [part for part in result.get("parts", []) if len(part) == len(distances(run))]


def distances(run: Run) -> list[int]:
    experiment = EXPERIMENTS[run.experiment]
    is_far = run.arm in ("token-gated", *experiment.far_controls)
    return experiment.distances if is_far else experiment.control_distances


def runs(only: str, arms: str, seeds: tuple[int, ...] | None) -> Iterator[Run]:
    """Those of the named experiments (all that begin with one of the names, "" for all), arms and seeds."""
    for name, experiment in EXPERIMENTS.items():
        if not name.startswith(tuple(only.split(","))):
            continue
        for seed in seeds or experiment.seeds:
            yield from (Run(name, arm, seed) for arm in experiment.arms if not arms or arm in arms.split(","))


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    return {
        "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
        "text_bytes": [len(standard_library(unseen)) for unseen in (False, True)],
    }  # fmt: skip
