"""Types of command line flags, and flags from a JSON file."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are not decided later."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, [], False) else action.help


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def natural(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


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
