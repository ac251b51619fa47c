"""What a run of train.py would be: sizes, parameters, tokens, memory. Nothing is computed and no memory is taken."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict
from functools import partial

from . import data, optim
from .flags import gradient_depth, model_config
from .footprint import footprint
from .tuning import choose_trained


def describe(options: argparse.Namespace, processes: int, train: data.Corpus, valid: data.Corpus) -> str:
    """Some lines to print; memory is that of each of so many processes."""
    config = model_config(options, train.num_tokens)
    rows, dtype = options.batch // (processes * options.accumulate), optim.weight_type(options.precision)
    with optim.autocast(options.precision, options.device):
        parameters, trained, activations, carried = footprint(
            config, rows, options.segment, options.device, dtype, partial(choose_trained, options=options)
        )
    tokens = options.batch * options.segment * options.step_segments
    share = processes if options.parallel == "fsdp" else 1
    kept = options.accumulate + (options.step_segments if options.bptt == "replay" else 0)  # memories and states
    copies = 3 if options.optimizer == "adamw" else 2  # gradient and averages
    model = "  ".join(f"{name}={json.dumps(value, separators=(',', ':'))}" for name, value in asdict(config).items())
    lines = {
        "model": "\n" + textwrap.fill(model, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False),
        "parameters": f"{parameters:,}" + ("" if trained == parameters else f", of which {trained:,} are trained"),
        "tokens": f"{train.total_tokens:,} for training, {valid.total_tokens:,} for validation",
        "a step": f"{tokens:,} tokens: {options.batch} rows, {options.step_segments} segments of {options.segment}",
        "a run": f"{options.steps:,} steps, {options.steps * tokens:,} tokens, "
                 f"{options.steps * tokens / train.total_tokens:.2f} epochs",
    }  # fmt: skip
    memory = {
        "weights": parameters * dtype.itemsize / share,
        "gradients and optimizer": copies * trained * dtype.itemsize / share,
        f"activations, in {options.precision}, for {rows} rows": gradient_depth(options) * activations,
        "what is carried": kept * carried,
    }
    lines |= {f"memory of {name}": f"{count / 2**20:,.1f} MiB" for name, count in memory.items()}
    return "\n".join(f"{name}: {text}" for name, text in lines.items())
