"""A trained model as a folder: what `BlockRecurrentTransformer.save_pretrained` writes and `.from_pretrained` reads.

    config.json                       the options of Config, the format version, and which tokenizer there is
    model.safetensors                 the weights, named as in the state dict; a large model's are cut into
    model-00001-of-00003.safetensors  several files, which model.safetensors.index.json lists by name, as in
    model.safetensors.index.json      the transformers library
    tokenizer.json                    of the tokenizers library, if the model reads no bytes

What is read may also be the folder of a run of train.py, of which the best or the last checkpoint is taken. Nothing
that is read is executed, and weights are not in memory twice.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from . import checkpoint as checkpoints
from . import data, lora
from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from .config import Config
from .files import read_tensors, tensor_names, write_tensors, written_at_once

FORMAT = 1
MODEL_TYPE = "block_recurrent_transformer"
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

Which = Literal["best", "last"]
StrPath = str | Path


# ------------------------------------------------------------------------------------------------------------- writing


def save_pretrained(
    model: BlockRecurrentTransformer, path: StrPath, tokenizer: data.Tokenizer | None = None, *,
    max_shard_size: int = 5 * 10**9,
) -> None:  # fmt: skip
    """Writes the folder `path`; a model that was saved there before is replaced.

    config.json goes first and comes last, so that a folder that has one is complete.

    Args:
        tokenizer: a `data.ByteTokenizer` or `data.FileTokenizer`, to be kept with the model.
        max_shard_size: bytes of weights in one file; more are cut into several.

    Raises:
        ValueError: the folder is that of a run, a tokenizer that cannot be kept or has more tokens than the model, or
            weights that share memory.
        OSError: it cannot be written.
    """
    folder = Path(path)
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size} must be at least 1 byte")
    if is_run(folder):
        raise ValueError(f"path: {folder} is the folder of a run, choose another one")
    if tokenizer is not None and tokenizer.num_tokens > model.config.num_tokens:
        raise ValueError(f"tokenizer has {tokenizer.num_tokens} tokens, the model num_tokens={model.config.num_tokens}")
    kept = kept_as(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / CONFIG, folder / TOKENIZER, folder / INDEX, *folder.glob("model*.safetensors")):
        stale.unlink(missing_ok=True)
    write_weights(folder, model.state_dict(), max_shard_size)
    if isinstance(tokenizer, data.FileTokenizer):
        write(folder / TOKENIZER, tokenizer.content)
    content = {"model_type": MODEL_TYPE, "format": FORMAT, "tokenizer": kept, **asdict(model.config)}
    write(folder / CONFIG, json.dumps(content, indent=2).encode() + b"\n")


def kept_as(tokenizer: data.Tokenizer | None) -> str | None:
    """What config.json says of a tokenizer."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, data.FileTokenizer):
        return TOKENIZER
    if isinstance(tokenizer, data.ByteTokenizer):
        return "bytes"
    raise ValueError(f"tokenizer must be a ByteTokenizer, a FileTokenizer or None, not {type(tokenizer).__name__}")


def write_weights(folder: Path, weights: dict[str, Tensor], max_shard_size: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [WEIGHTS]
    for file, shard in zip(files, shards):
        try:
            write_tensors(folder / file, shard, {"format": "pt"})
        except RuntimeError as error:  # safetensors: "Some tensors share memory, ..."
            raise ValueError(f"model: its weights cannot be saved: {error}") from error
    if len(shards) > 1:
        content = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
            "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
        }
        write(folder / INDEX, json.dumps(content, indent=2).encode() + b"\n")


def write(path: Path, content: bytes) -> None:
    with written_at_once(path) as file:
        file.write(content)


# ------------------------------------------------------------------------------------------------------------- reading


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a run of train.py."""
    return (folder / "checkpoints").is_dir()


def is_of_transformers(folder: Path) -> bool:
    """Whether it is a folder that the transformers library wrote of a model of its own; `llama` reads some of them."""
    try:
        content = json.loads((folder / CONFIG).read_bytes())
        return bool(content.get("model_type", MODEL_TYPE) != MODEL_TYPE)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def from_pretrained(
    path: StrPath, *, checkpoint: Which = "best", device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> BlockRecurrentTransformer:
    """The model in a folder, in eval mode. Arguments and errors: see `load_weights`.

    Raises:
        ValueError: also for weights that are missing, left over, or of another shape; names them.
    """
    config, weights = load_weights(path, checkpoint=checkpoint, device=device, dtype=dtype)
    return BlockRecurrentTransformer.from_weights(config, weights, str(path), take=True)


def load_weights(
    path: StrPath, *, checkpoint: Which = "best", device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Config, dict[str, Tensor]]:
    """The config and the weights of a saved model, or of a run.

    Args:
        path: the folder that `save_pretrained` wrote, or that of a run of train.py.
        checkpoint: of a run, the one with the lowest loss in validation, or the last one that is intact.
        device, dtype: of the weights; default the CPU, and the type that they were saved in.

    Returns:
        A Config, and tensors by their names in the state dict, each with memory of its own.

    Raises:
        ValueError: no such folder, or not as it was written; names the file and what is wrong.
    """
    folder = Path(path)
    if checkpoint not in ("best", "last"):
        raise ValueError(f"checkpoint={checkpoint!r} is not 'best' or 'last'")
    if is_run(folder):
        saved = load_checkpoint(folder, checkpoint)
        config = make_config(saved.path, saved.metadata.get("model_config"), len(saved.tensors["model"]))
        weights = saved.tensors["model"]
        for name in weights:  # one at a time: the one that was read goes when its copy is there
            weights[name] = moved(weights[name], device, dtype)
        return config, weights
    if checkpoint == "last":
        raise ValueError(f"checkpoint='last': {folder} is no run's folder, which alone has several")
    content = read_config(folder)
    files = find_weights(folder)
    config = make_config(folder / CONFIG, options_in(content), len(files))
    weights = {}
    for file in dict.fromkeys(files.values()):
        own = read_shard(file, [name for name, place in files.items() if place == file])
        weights |= {name: moved(own.pop(name), device, dtype) for name in list(own)}
    return config, weights


def load_checkpoint(folder: Path, which: Which) -> checkpoints.Checkpoint:
    """The best or last checkpoint of a run, with its model alone; adapters are merged into the maps beside them."""
    path = folder / "checkpoints"
    try:
        if which == "best":
            saved = checkpoints.load(checkpoints.best(path), only=["model"])
        else:
            saved = checkpoints.load_latest(path, only=["model"])
    except FileNotFoundError as error:
        hint = "; checkpoint 'last' needs no loss in validation" if which == "best" else ""
        raise ValueError(f"{error}{hint}") from error
    for reason in saved.skipped:
        warnings.warn(f"passed over a damaged checkpoint: {reason}", stacklevel=3)
    lora.merge(saved.tensors["model"])
    return saved


def make_config(path: Path, options: Any, num_tensors: int) -> Config:
    """The config of a file, which may be forged."""
    try:
        if options["depth"] > num_tensors:  # it would not fit in memory
            raise ValueError(f"depth={options['depth']} layers in {num_tensors} tensors")
        return Config.from_dict(options)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} holds no config of a model: {type(error).__name__}: {text}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, of a format that is known."""
    if not (folder / CONFIG).is_file():
        what = f"has no {CONFIG} and no checkpoints" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}; give what save_pretrained wrote, or the folder of a run of train.py")
    content = read_json(folder / CONFIG)
    if content.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{folder / CONFIG}: model_type is {content.get('model_type')!r} and not {MODEL_TYPE!r}")
    if content.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG}: format {content.get('format')!r} is unknown, this version reads {FORMAT}")
    return content


def options_in(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in ("model_type", "format", "tokenizer")}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content


def find_weights(folder: Path) -> dict[str, Path]:
    """Which file each tensor is in, by name."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(names_in(folder / WEIGHTS), folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS} and no {INDEX}")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of names of files beside it")
    return {name: folder / place for name, place in places.items()}


def read_shard(file: Path, names: list[str]) -> dict[str, Tensor]:
    """The tensors of a file, which must be these."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    found = names_in(file)
    missing, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing or extra:
        raise ValueError(f"{file} is not as {INDEX} says: missing are {missing}, left over are {extra}")
    return read_tensors(file)


def names_in(file: Path) -> list[str]:
    try:
        return tensor_names(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no readable safetensors file: {error}") from error


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def load_tokenizer(path: StrPath) -> data.ByteTokenizer | data.FileTokenizer:
    """The tokenizer of a saved model, of a run, or of a folder of the transformers library.

    Raises:
        ValueError: there is none, or its file cannot be read.
        ImportError: it is a file of the tokenizers library, which is not installed.
    """
    folder = Path(path)
    if is_run(folder):
        options = read_json(folder / CONFIG).get("options")
        if not isinstance(options, dict) or "tokenizer" not in options:
            raise ValueError(f"{folder / CONFIG} says nothing of a tokenizer")
        if not options["tokenizer"]:
            return data.ByteTokenizer()
        own = folder / TOKENIZER  # runs of version 1.1.0 do not keep it
        return data.FileTokenizer(own if own.is_file() else options["tokenizer"])
    if is_of_transformers(folder) and not (folder / TOKENIZER).is_file():
        raise ValueError(f"{folder} has no {TOKENIZER}: AutoTokenizer.from_pretrained(...).save_pretrained writes one")
    kept = TOKENIZER if is_of_transformers(folder) else read_config(folder).get("tokenizer")
    if kept == TOKENIZER:
        return data.FileTokenizer(folder / TOKENIZER)
    if kept == "bytes":
        return data.ByteTokenizer()
    raise ValueError(f"{folder / CONFIG}: the model was saved without a tokenizer")
