"""The model of a run: built or taken from elsewhere, and which of its parameters are trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from . import distributed, llama, lora, optim, pretrained
from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from .checks import matching
from .config import Config
from .distributed import Processes
from .flags import model_config

NEW = "new"  # what --train-only calls the parameters that a pretrained model did not have


def build_model(
    options: argparse.Namespace, processes: Processes, num_tokens: int, *, has_begun: bool
) -> BlockRecurrentTransformer:
    """The model with its first weights, those of --init unless the run `has_begun` and will put others in their place.

    Raises:
        ValueError: no such weights, or they do not fit; a model that is too large; patterns that match nothing.
    """
    config = model_config(options, num_tokens)
    if options.init and not has_begun:
        model = from_other_weights(options.init, config, processes.say)
    else:
        model = from_nothing(options, config)
    model.to(processes.device, optim.weight_type(options.precision))
    choose_trained(model, options)
    if processes.size > 1 and options.parallel == "fsdp":
        distributed.shard(model, processes)
    return model


def from_nothing(options: argparse.Namespace, config: Config) -> BlockRecurrentTransformer:
    try:
        return BlockRecurrentTransformer(config)
    except (RuntimeError, TypeError) as error:  # no memory, or a size beyond 64 bits
        sizes = f"--dim {options.dim} --depth {options.depth} --set {options.set}"
        raise ValueError(f"{sizes}: the model cannot be built: {str(error).splitlines()[0]}") from error


def from_other_weights(init: str, config: Config, say: Callable[[str], None]) -> BlockRecurrentTransformer:
    """A model with the weights of the folder that --init names, in training mode."""
    there, weights = load_weights(Path(init), config)
    other = differences(there, config)
    try:
        model = BlockRecurrentTransformer.from_weights(config, weights, "its weights", take=True).train()
    except ValueError as error:
        raise ValueError(
            f"--init {init}: its weights do not fit, this model has {other or 'others'} ({error}). Leave out the flags "
            "that change the model, and give the same --tokenizer; to go on with a run there is --resume"
        ) from error
    say(f"weights: from {init}{other and ', but with '}{other}")
    return model


def load_weights(folder: Path, config: Config) -> tuple[Config, dict[str, Tensor]]:
    """Of a run, of what `save_pretrained` wrote, or of a Llama with those options of `config` that it leaves open."""
    if pretrained.is_of_transformers(folder):
        return llama.load_weights(folder, config)
    try:
        return pretrained.load_weights(folder)
    except ValueError:
        if not pretrained.is_run(folder):
            raise
        return pretrained.load_weights(folder, checkpoint="last")  # a run that was never validated


def differences(then: Config, now: Config) -> str:
    """The options that change what weights and memories are or mean; empty if there are none."""
    if then.fingerprint == now.fingerprint:
        return ""
    pairs = [(name, value, getattr(then, name)) for name, value in asdict(now).items()]
    return ", ".join(f"{name}={value} instead of {was}" for name, value, was in pairs if value != was)[:300]


def choose_trained(model: BlockRecurrentTransformer, options: argparse.Namespace) -> None:
    """Freezes what --freeze, --train-only and --lora-rank say, and puts adapters in.

    Raises:
        ValueError: a pattern that matches nothing, or nothing is left to be trained.
    """
    names = dict(model.named_parameters())
    if options.train_only is not None or options.lora_rank:
        patterns = options.train_only or []
        new = llama.freeze_pretrained(model) if NEW in patterns else {}
        if NEW in patterns and not new:
            raise ValueError(f"--train-only {NEW}: the model has nothing that a pretrained one has not")
        chosen = set(matching(names, [one for one in patterns if one != NEW], "--train-only", "parameters"))
        if twice := sorted(chosen & new.keys()):
            raise ValueError(f"--train-only {NEW} trains of {twice[0]} what is new: no other pattern may match it")
        trained = chosen | new.keys()
    else:
        trained = names.keys() - set(matching(names, options.freeze or [], "--freeze", "parameters"))
    for name, parameter in names.items():
        parameter.requires_grad_(name in trained)
    if options.lora_rank:
        lora.add(model, options.lora_rank, options.lora_targets or ["layers.*"], "--lora-targets")
        for name in trained:  # which PEFT froze, too
            names[name].requires_grad_()
    elif not trained:
        raise ValueError(f"--freeze {' '.join(options.freeze)} leaves nothing to be trained")
