"""The options of train.py: presets, types of flags, and how a command line, JSON files and presets are put together."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from . import paper

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SET_BY_FLAGS = {  # options of Config that have a flag of their own, or follow from the data
    "num_tokens", "max_seq_len", "block_width", "num_state_vectors", "use_checkpointing", "use_flash_attn", "dim",
    "depth", "heads", "dim_head", "recurrent_layers", "ignore_index",
}  # fmt: skip


def of_the_paper(size: str) -> dict[str, Any]:
    """The authors' settings of their best variant, Rec:fixed:skip, for a size of `paper.SIZES`."""
    model = paper.options(size, "fixed:skip")
    named = {"dim", "depth", "heads", "dim_head", "recurrent_layers"}
    flags = {"max_seq_len": "segment", "block_width": "block", "num_state_vectors": "states"}
    return {
        **{flags.get(name, name): value for name, value in model.items() if name in named or name in flags},
        "recurrent_layers": list(model["recurrent_layers"]), "batch": 32, "accumulate": 8, "steps": 500_000,
        "optimizer": "adafactor", "lr": 1000**-0.5, "schedule": "rsqrt", "warmup": 1000, "clip": 0.0,
        "valid_every": 1000, "valid_batches": 400, "checkpoint_every": 1000,
        "set": {k: v for k, v in model.items() if k not in named and k not in flags and k not in SET_BY_FLAGS},
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {  # seconds: to see that everything works
        "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "block": 16, "segment": 64, "states": 8, "batch": 8,
        "steps": 50, "lr": 3e-3, "warmup": 5, "valid_every": 25, "valid_batches": 4, "final_batches": 16,
        "checkpoint_every": 25, "sample": 64,
    },
    "cpu": {  # some minutes on two cores
        "dim": 128, "depth": 4, "heads": 4, "dim_head": 32, "block": 64, "segment": 256, "states": 32, "batch": 8,
        "steps": 1200, "lr": 3e-3, "warmup": 100, "valid_every": 300, "valid_batches": 32, "checkpoint_every": 300,
        "set": {"all_layers_qk_rmsnorm": True},
    },
    "enwik8": {  # sizes, batch and dropouts of train.py in 0.4.4; its rate was 1e-4 throughout
        "dim": 512, "depth": 6, "heads": 8, "dim_head": 64, "block": 512, "segment": 1024, "states": 512,
        "recurrent_layers": [4], "batch": 16, "accumulate": 4, "steps": 100_000, "lr": 2e-4, "warmup": 1000,
        "clip": 0.5, "memory_dropout": 0.1, "state_dropout": 0.1, "valid_every": 500, "valid_batches": 100,
        "checkpoint_every": 500,
    },
    "paper-150m": of_the_paper("medium_150M"),
    "paper-650m": of_the_paper("large_600M"),
    "paper-1.3b": of_the_paper("large_1200M"),
}  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are not decided later."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, [], False) else action.help


def natural(text: str, least: int = 0) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
    if int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} must be below 2^63")
    return int(text)


def positive(text: str) -> int:
    return natural(text, 1)


def not_negative(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return float(text)


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON or else as a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The options: defaults, then the preset's, the config file's, those of the run resumed, the command line's."""
    given = parser.parse_args(argv)
    read: list[str] = []
    if given.config:
        read += as_flags(read_options(parser, "--config", Path(given.config)))
        given = parser.parse_args([*read, *argv])
    folder = given.resume or given.out
    if given.resume is not None and not folder:
        parser.error("--resume needs the run's folder: --resume DIR, or --out DIR --resume")
    if given.resume and not Path(given.resume).is_dir():
        parser.error(f"--resume {given.resume}: there is no such folder")
    if given.resume and given.out and Path(given.resume) != Path(given.out):
        parser.error(f"--resume {given.resume}: the run goes on in its folder, not in --out {given.out}")
    options_of_run: dict[str, Any] = {}
    if given.resume is not None and (Path(folder) / "config.json").exists():
        options_of_run = read_options(parser, "--resume", Path(folder) / "config.json")
        read += as_flags(options_of_run)
    if given.preset and options_of_run.get("preset", given.preset) != given.preset:
        parser.error(f"--preset {given.preset}: the run in {folder} has the preset {options_of_run['preset']}")
    preset = parser.parse_args(read + argv).preset or ("enwik8" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args([*as_flags(PRESETS[preset]), *read, *argv])
    options.preset, options.out, options.resume = preset, folder, given.resume is not None
    options.set = dict(options.set)
    given_lr = any(word.partition("=")[0] == "--lr" for word in (*read, *argv))
    if options.optimizer != PRESETS[preset].get("optimizer", "adamw") and not given_lr:
        parser.error(f"--optimizer {options.optimizer}: the rate of preset {preset} is for another one, give --lr too")
    return options


def read_options(parser: argparse.ArgumentParser, flag: str, path: Path) -> dict[str, Any]:
    """The options in a JSON file, or in the config.json of a run. Their values are checked as those of flags."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        parser.error(f"{flag}: {path} cannot be read: {error}")
    values = values.get("options", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        parser.error(f"{flag}: {path} is not a JSON object of options")
    if not isinstance(values.get("set", {}), dict):
        parser.error(f"{flag}: {path} gives no JSON object for set")
    known = set(vars(parser.parse_args([]))) - {"config"}
    if unknown := sorted(name for name, value in values.items() if name not in known and value is not None):
        parser.error(f"{flag}: {path} has the unknown option {unknown[0]!r}")
    return values


def as_flags(values: dict[str, Any]) -> list[str]:
    """Options as a command line gives them."""
    flags = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "set":
            flags += [f"--set={option}={json.dumps(content)}" for option, content in value.items()]
        elif isinstance(value, bool):
            flags += [flag] if value else [f"--no-{flag[2:]}"]
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags += [f"{flag}={value}"]
    return flags
