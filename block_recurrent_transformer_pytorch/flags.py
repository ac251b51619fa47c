"""The options of train.py: presets, flags, and how a command line, JSON files and presets are put together."""

from __future__ import annotations

import argparse
import json
import math
import os
import textwrap
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from . import data, llama, optim, paper, pretrained
from .config import Config

# ----------------------------------------------------------------------------------------- 1 presets and types of flags

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


OF_CONFIG = {  # options of Config: their flags
    "block_width": "block", "num_state_vectors": "states", "max_seq_len": "segment", "dim": "dim", "depth": "depth",
    "heads": "heads", "dim_head": "dim_head", "recurrent_layers": "recurrent_layers", "num_tokens": "vocabulary",
    "use_checkpointing": "checkpointing",
}  # fmt: skip


def describe_presets() -> str:
    """What each preset holds, as flags; for the end of --help."""
    lines = ["presets (what a preset gives replaces the defaults above, and what you give replaces the preset's):", ""]
    for name, values in PRESETS.items():
        words = " ".join(word.replace("=", " ", 1).replace('"', "") for word in as_flags(values))
        lines += textwrap.wrap(f"{name}: {words}", 118, initial_indent="  ", subsequent_indent="      ",
                               break_on_hyphens=False, break_long_words=False)  # fmt: skip
    return "\n".join(lines)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that are not decided later, and the list of presets as it is."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, [], False) else action.help


def natural(text: str, least: int = 0) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} must be below 2^63")
    return number


def positive(text: str) -> int:
    return natural(text, 1)


def not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return number


def bptt(text: str) -> int | str:
    if text in ("full", "replay"):
        return text
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of segments nor full or replay") from error


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON or else as a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def weight(text: str) -> tuple[str, float]:
    """NAME=WEIGHT."""
    name, number = setting(text)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: the weight must be a number of at least 0")
    return name, float(number)


# ---------------------------------------------------------------------------------------------------------- 2 the flags


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a Block-Recurrent Transformer on any text, and goes on exactly where it was stopped.",
        usage="train.py [options]", formatter_class=HelpFormatter, allow_abbrev=False, epilog=describe_presets(),
    )  # fmt: skip
    add_run_flags(parser.add_argument_group("the run"))
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model"))
    add_tuning_flags(parser.add_argument_group("fine-tuning"))
    add_training_flags(parser.add_argument_group("training"))
    add_output_flags(parser.add_argument_group("what is measured and kept"))
    return parser


def add_run_flags(group: Any) -> None:
    add = group.add_argument
    add("--preset", choices=PRESETS, help="values for what is not given, listed below; default enwik8 on a GPU, else "
        "cpu")  # fmt: skip
    add("--config", metavar="FILE", help="a JSON object of options, named as here with _ for -, or the config.json of "
        "a run; it goes before the preset and behind the command line")  # fmt: skip
    add("--out", metavar="DIR", help="folder of the run; default runs/PRESET-DATE")
    add("--resume", metavar="DIR", nargs="?", const="", help="go on with the run in this folder (or in --out) from its "
        "last intact checkpoint, with its options; those given here replace them")  # fmt: skip
    add("--steps", type=positive, default=1000, help="optimizer steps of the whole run")
    add("--seed", type=natural, default=0, help="of weights, order of documents, dropout and samples")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="what computes; on a GPU every process takes its own")
    add("--threads", type=positive, help="threads of each process on the CPU; default torch's choice")
    add("--dry-run", action="store_true", help="print sizes, tokens and memory, and train nothing")


def add_data_flags(group: Any) -> None:
    add = group.add_argument
    add("--data", default="auto", help="a file, a folder, a glob pattern (a file is a document), a .jsonl file (a line "
        "is one), enwik8, stdlib (the Python standard library's source), or auto: enwik8 if it is in data/ or can be "
        "downloaded, else stdlib")  # fmt: skip
    add("--split", choices=data.HOWS, default="auto", help="how --data becomes 90 %% training, 5 %% validation and "
        "5 %% test text. documents: whole documents are held out; cut: the last tenth of each; auto: documents where "
        "there are 20 and the shares come out about right, else cut")  # fmt: skip
    add("--valid", metavar="PATH", help="text to validate on, given as --data is; all of --data is trained on then, "
        "and there is no test text")  # fmt: skip
    add("--text-field", default="text", help="the field of a JSONL line that holds the text")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json of the tokenizers library; default bytes")
    add("--cache", metavar="DIR", default="data/cache", help="where token ids are kept between runs")


def add_model_flags(group: Any) -> None:
    add = group.add_argument
    add("--dim", type=positive, default=512, help="width of the model")
    add("--depth", type=positive, default=6, help="layers")
    add("--heads", type=positive, default=8, help="query heads")
    add("--dim-head", type=positive, default=64, help="width of a head")
    add("--block", type=positive, default=512, help="tokens of a block: the states change once a block")
    add("--states", type=positive, default=512, help="state vectors of a recurrent layer")
    add("--recurrent-layers", type=positive, nargs="*", metavar="N", help="layers, from 1, that have a state; default "
        "the one in the middle, no number: none")  # fmt: skip
    add("--vocabulary", type=positive, metavar="N", help="token ids that the model has; default those of the tokenizer")
    add("--set", action="append", default=[], metavar="NAME=VALUE", type=setting, help="any other option of "
        "Config, as JSON: --set gate=lstm --set num_xl_blocks=2")  # fmt: skip


def add_tuning_flags(group: Any) -> None:
    add = group.add_argument
    add("--init", metavar="DIR", help="begin with the weights of another run, of a folder that save_pretrained "
        "wrote, or of a Llama, Mistral, Qwen, SmolLM or Phi-3 as transformers writes it, with its tokenizer and its "
        "options of the model. Only weights are taken: steps, optimizer and order of reading begin anew")  # fmt: skip
    add("--freeze", nargs="+", metavar="PATTERN", help="parameters that are not trained, by glob patterns of their "
        "names: --freeze 'token_emb.*' 'layers.[0-3].*'")  # fmt: skip
    add("--train-only", nargs="+", metavar="PATTERN", help="parameters that alone are trained, likewise; new: those "
        "that a pretrained model did not have")  # fmt: skip
    add("--lora-rank", type=positive, metavar="R", help="train adapters of this rank instead of the maps beside which "
        "they stand (LoRA, through PEFT), and what --train-only names")  # fmt: skip
    add("--lora-targets", nargs="+", metavar="PATTERN", help="linear maps that get an adapter, by glob patterns of "
        "their names; default 'layers.*'")  # fmt: skip


def add_training_flags(group: Any) -> None:
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--batch", type=positive, default=16, help="rows of a step, over all processes")
    add("--segment", type=positive, default=1024, help="tokens of a row that are read at once, whole blocks")
    add("--accumulate", type=positive, default=1, help="parts in which a process takes its rows, one behind the other, "
        "to save memory; the result is the same")  # fmt: skip
    add("--bptt", type=bptt, default=1, metavar="N|full|replay", help="segments that gradients go through; full: all "
        "of the step's; replay: all, at the memory of one and 4/3 of the time")  # fmt: skip
    add("--step-segments", type=positive, help="segments of every row that a step reads; default N of --bptt N, else 8")
    add("--optimizer", choices=("adamw", "adafactor"), default="adamw", help="adafactor: the authors'")
    add("--lr", type=not_negative, default=2e-4, help="highest learning rate; adafactor's is relative to the size of "
        "each parameter")  # fmt: skip
    add("--schedule", choices=("cosine", "linear", "rsqrt", "constant"), default="cosine", help="of the learning rate")
    add("--lr-end", type=not_negative, default=0.1, help="share of --lr that is left at the last step (cosine, linear)")
    add("--warmup", type=natural, default=100, help="steps of the linear rise, at most all steps")
    add("--betas", type=not_negative, nargs=2, default=[0.9, 0.99], help="of adamw")
    add("--weight-decay", type=not_negative, default=0.1, help="of adamw, on matrices; norms, gates, state ids and "
        "initial states do not decay")  # fmt: skip
    add("--clip", type=not_negative, default=1.0, help="largest norm of the gradient; 0: any")
    add("--memory-dropout", type=not_negative, default=0.0, help="chance that a row forgets its memories, a segment")
    add("--state-dropout", type=not_negative, default=0.0, help="chance that a row's states begin anew, a segment")
    add("--auxiliary", action="append", default=[], metavar="NAME=WEIGHT", type=weight, help="an auxiliary loss of the "
        "model, which changes the gradient and no figure: distillation, reconstruction, open_gates")  # fmt: skip
    add("--reset-states-every-block", action=switch, default=False, help="the control for what states are worth: they "
        "return to their initial values at every block, in training and validation, so that a model of the same "
        "parameters carries nothing in them; memories stay")  # fmt: skip
    add("--precision", choices=("auto", "fp64", "fp32", "bf16", "fp16"), default="auto", help="bf16 and fp16 by "
        "autocast; auto: bf16 where the processor multiplies it faster, else fp32")  # fmt: skip
    add("--checkpointing", action=switch, default=False, help="compute activations again instead of keeping them")
    add("--compile", action=switch, default=False, help="torch.compile the model")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun: every process holds all parameters "
        "(DDP), or a share of them (FSDP2)")  # fmt: skip
    add("--timeout", type=positive, default=50, help="seconds that a process waits for the others within a step; more "
        "for --compile")  # fmt: skip


def add_output_flags(group: Any) -> None:
    add = group.add_argument
    add("--valid-every", type=positive, default=500, help="steps between validations")
    add("--valid-batches", type=positive, default=100, help="batches of a validation: the same ones each time, from "
        "places that are evenly spaced over the validation text")  # fmt: skip
    add("--final-batches", type=natural, default=0, help="batches of the final figure after the last step; 0: all")
    add("--checkpoint-every", type=positive, default=500, help="steps between checkpoints")
    add("--keep", type=positive, default=3, help="last checkpoints that are kept, beside the best")
    add("--sample", type=natural, default=400, help="tokens to write at the end, into sample.txt; 0: none")


# ----------------------------------------------------------------------------- 3 from a command line, files and presets


def check_setting(name: str) -> None:
    """Raises a ValueError if `--set name=...` is an option that Config does not have, or that has a flag."""
    known = {field.name for field in fields(Config)}
    if name not in known:
        near = get_close_matches(name, known - SET_BY_FLAGS, 1)
        hint = f"; did you mean {near[0]}?" if near else f", there are {', '.join(sorted(known - SET_BY_FLAGS))}"
        raise ValueError(f"--set {name}: the model has no such option{hint}")
    if name in SET_BY_FLAGS:
        flag = f"--{OF_CONFIG[name].replace('_', '-')} instead" if name in OF_CONFIG else "it cannot be chosen"
        raise ValueError(f"--set {name}: {flag}")


def options_of_model(folder: Path) -> dict[str, Any]:
    """The options of train.py that give model and tokenizer of a run, of a folder that `save_pretrained` wrote, or of a
    Llama.

    Raises:
        ValueError: it is none of these.
    """
    try:
        content = json.loads((folder / "config.json").read_bytes())
        trained = content.get("options", {})
        config = {field.name: content.get("model", content).get(field.name) for field in fields(Config)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"--init {folder}: its config.json cannot be read: {error}") from error
    if pretrained.is_of_transformers(folder):
        config |= llama.begin_options(folder)
    if not isinstance(config["dim"], int):
        raise ValueError(f"--init {folder}: config.json holds no model")
    if (folder / "tokenizer.json").is_file():
        trained = {"tokenizer": str(folder / "tokenizer.json")}
    named = {flag: config[name] for name, flag in OF_CONFIG.items() if flag != "checkpointing"}
    rest = {name: value for name, value in config.items() if name not in SET_BY_FLAGS and value is not None}
    return {**named, "set": rest, "tokenizer": trained.get("tokenizer")}


def parse(argv: list[str]) -> argparse.Namespace:
    """The options: defaults, then the preset's, those of the model that --init names, a config file's, those of the run
    resumed, the command line's."""
    parser = make_parser()
    options = gather(parser, argv)
    check(options, parser)
    return options


def gather(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The options from all their sources, each checked by itself."""
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
    if given.resume is not None and given.init:
        parser.error(f"--init {given.init} begins a new run from the weights of another, --resume goes on with one: "
                     "give only one of them")  # fmt: skip
    if given.resume and given.out and Path(given.resume) != Path(given.out):
        parser.error(f"--resume {given.resume}: the run goes on in its folder, not in --out {given.out}")
    options_of_run: dict[str, Any] = {}
    if given.resume is not None and (Path(folder) / "config.json").exists():
        options_of_run = read_options(parser, "--resume", Path(folder) / "config.json")
        if (Path(folder) / "tokenizer.json").is_file():  # whatever became of the one that was given
            options_of_run["tokenizer"] = str(Path(folder) / "tokenizer.json")
        read += as_flags(options_of_run)
    if given.init:  # whose options give way to all others
        try:
            read = as_flags(options_of_model(Path(given.init))) + read
        except ValueError as error:
            parser.error(str(error))
    if given.preset and options_of_run.get("preset", given.preset) != given.preset:
        parser.error(f"--preset {given.preset}: the run in {folder} has the preset {options_of_run['preset']}")
    preset = parser.parse_args(read + argv).preset or ("enwik8" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args([*as_flags(PRESETS[preset]), *read, *argv])
    options.preset, options.out, options.resume = preset, folder, given.resume is not None
    options.set, options.auxiliary = dict(options.set), dict(options.auxiliary)
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
    if isinstance(values, dict) and "options" in values:
        values = values["options"]
        if isinstance(values, dict):
            values.setdefault("split", "documents")  # as in version 1.0.0, which had no such option
    if not isinstance(values, dict):
        parser.error(f"{flag}: {path} is not a JSON object of options")
    if any(not isinstance(values.get(name, {}), dict) for name in ("set", "auxiliary")):
        parser.error(f"{flag}: {path} gives no JSON object for set or auxiliary")
    known = set(vars(parser.parse_args([]))) - {"config"}
    if unknown := sorted(name for name, value in values.items() if name not in known and value is not None):
        parser.error(f"{flag}: {path} has the unknown option {unknown[0]!r}")
    return values


def as_flags(values: dict[str, Any]) -> list[str]:
    """Options as a command line gives them."""
    words: list[str] = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, dict):
            words += [f"{flag}={option}={json.dumps(content)}" for option, content in value.items()]
        elif isinstance(value, bool):
            words += [flag] if value else [f"--no-{flag[2:]}"]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [f"{flag}={value}"]
    return words


def gradient_depth(options: argparse.Namespace) -> int:
    """Segments that one graph holds."""
    if options.bptt == "replay":
        return 1
    return int(options.step_segments if options.bptt == "full" else options.bptt)


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What flags have to do with each other, and choices that depend on the machine."""
    if options.step_segments is None:
        options.step_segments = options.bptt if isinstance(options.bptt, int) else 8
    if isinstance(options.bptt, int) and options.step_segments % options.bptt:
        parser.error(f"--step-segments {options.step_segments} is not a multiple of --bptt {options.bptt}")
    parts = int(os.environ.get("WORLD_SIZE", "1")) * options.accumulate
    if options.batch % parts:
        parser.error(f"--batch {options.batch} cannot be divided into --accumulate {options.accumulate} parts of "
                     f"each of {parts // options.accumulate} processes")  # fmt: skip
    if options.segment % options.block:
        parser.error(f"--segment {options.segment} is not a multiple of --block {options.block}")
    for name in ("memory_dropout", "state_dropout", "lr_end"):
        if getattr(options, name) > 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} is above 1")
    if max(options.betas) >= 1:
        parser.error(f"--betas {options.betas} must be below 1")
    check_tuning(options, parser)
    if options.optimizer == "adafactor" and options.parallel == "fsdp" and "WORLD_SIZE" in os.environ:
        parser.error("--optimizer adafactor needs whole parameters, --parallel fsdp splits them: use adamw, or ddp")
    if options.precision == "auto":
        options.precision = "bf16" if optim.multiplies_bf16(options.device) else "fp32"
    try:
        for name in options.set:
            check_setting(name)
        model_config(options, num_tokens=2)
    except ValueError as error:
        parser.error(str(error))


def check_tuning(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What the flags of fine-tuning have to do with each other."""
    if options.freeze and (options.train_only or options.lora_rank):
        flag = "--train-only" if options.train_only else "--lora-rank"
        parser.error(f"--freeze: {flag} freezes everything else already; give only one of them")
    if options.lora_targets and not options.lora_rank:
        parser.error("--lora-targets are those of --lora-rank R, which is not given")
    if options.init and not options.tokenizer and pretrained.is_of_transformers(Path(options.init)):
        parser.error(f"--init {options.init} has no tokenizer.json: give --tokenizer FILE")
    if "new" in (options.train_only or ()) and options.parallel == "fsdp" and "WORLD_SIZE" in os.environ:
        parser.error("--train-only new trains parts of maps, which --parallel fsdp splits otherwise: use ddp")


def model_config(options: argparse.Namespace, num_tokens: int) -> Config:
    """The sizes and options of the model, for a tokenizer of so many tokens.

    Raises:
        ValueError: they cannot be combined, or are out of range.
    """
    if options.vocabulary and options.vocabulary < num_tokens:
        raise ValueError(f"--vocabulary {options.vocabulary} is less than the {num_tokens} tokens of the tokenizer: "
                         "give the --tokenizer of the model, or none")  # fmt: skip
    values = {
        "num_tokens": options.vocabulary or num_tokens, "dim": options.dim, "depth": options.depth,
        "heads": options.heads, "dim_head": options.dim_head, "block_width": options.block,
        "max_seq_len": options.segment, "num_state_vectors": options.states, "use_flash_attn": True,
        "use_checkpointing": options.checkpointing, "recurrent_layers": options.recurrent_layers,
    }  # fmt: skip
    return Config.from_dict({**values, **options.set})
