"""Memories and states on disk: what a model has read is kept exactly, and read by that model alone.

    save("book.safetensors", memories, states, model)          # after model(...) or generate(...)
    memories, states = load("book.safetensors", model)         # in another process, another day

A file is one of safetensors: a tensor for each tensor of the values, named by its path
("memories/layers/0/past/xl/k"), and one, `structure`, with the JSON of everything else: classes, numbers and None. Its
header holds the fingerprint and the options of the config. Nothing that is loaded is executed, and whatever nesting of
dicts, lists, tuples and named tuples the values are is kept, so that a new kind of memory needs nothing here.
`to_tensors` and `from_tensors` do the same for files of other makes; `torch.save` and `torch.load` take the values as
they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_map

from . import checkpoint
from .carried import KV, LayerMemory, Memories, Position, States
from .checks import describe
from .files import read_tensors, write_tensors

if TYPE_CHECKING:
    from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer

FORMAT = 2
STRUCTURE = "structure"
TYPES: tuple[type, ...] = (KV, LayerMemory, Memories, Position, States)

def save(
    path: str | Path, memories: Memories, states: States, model: BlockRecurrentTransformer, *,
    previous: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes a file that appears whole or not at all; one of that name is replaced.

    Args:
        model: whose values they are. The file is bound to its config, not to its weights.
        previous: which tokens were read, (b, num_tokens) bool, for a repetition penalty (`generation.seen_tokens`).

    Raises:
        ValueError: values that cannot be saved.
        OSError: the file cannot be written.
    """
    header = {"fingerprint": model.config.fingerprint, "config": json.dumps(asdict(model.config))}
    write_tensors(Path(path), to_tensors(memories, states, previous), header)


def load(
    path: str | Path, model: BlockRecurrentTransformer | None = None, *, device: torch.device | str | None = None
) -> tuple[Memories, States]:
    """Memories and states as they were saved, of the same types, to the last bit.

    Args:
        model: that will read on; None to look at them without one.
        device: where to put them; default the model's, or the CPU.

    Raises:
        ValueError: they are those of a model with another config, or the file is none of `save`; names both.
        OSError: the file cannot be read.
    """
    values = read(path, model, device)
    return values["memories"], values["states"]


def load_previous(
    path: str | Path, model: BlockRecurrentTransformer | None = None, *, device: torch.device | str | None = None
) -> Tensor | None:
    """The `previous` that was saved beside memories and states, if any. As `load` otherwise."""
    previous: Tensor | None = read(path, model, device)["previous"]
    return previous


def to_tensors(memories: Memories, states: States, previous: Tensor | None = None) -> dict[str, Tensor]:
    """Everything in tensors with memory of their own, for `safetensors.torch.save_file` and the like. On the CPU."""
    structure, tensors = checkpoint.flatten({"memories": memories, "states": states, "previous": previous})
    text = json.dumps({"format": FORMAT, "carried": structure}, allow_nan=False)
    return {**tensors, STRUCTURE: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def from_tensors(
    tensors: dict[str, Tensor], model: BlockRecurrentTransformer | None = None
) -> tuple[Memories, States]:
    """The inverse of `to_tensors`. A model with kinds of memory of its own is needed to know their classes.

    Raises:
        ValueError: not the tensors of `to_tensors`, or of a later version of it.
    """
    values = decoded(tensors, model)
    return values["memories"], values["states"]


def read(
    path: str | Path, model: BlockRecurrentTransformer | None, device: torch.device | str | None
) -> dict[str, Any]:
    """Memories, states and previous by name."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        tensors = read_tensors(Path(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of memories and states: {error}") from error
    if model is not None:
        check_header(path, header, model)
        device = model.token_emb.weight.device if device is None else device
    try:
        values = decoded(tensors, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    to_device: dict[str, Any] = tree_map(lambda x: x.to(device or "cpu") if isinstance(x, Tensor) else x, values)
    return to_device


def check_header(path: str | Path, header: dict[str, str], model: BlockRecurrentTransformer) -> None:
    """Whether a file is of a model with this config, perhaps from before the config had all of its options."""
    own, theirs, told = model.config.fingerprint, header.get("fingerprint"), "its options cannot be read"
    if theirs == own:
        return
    try:
        saved, here = json.loads(header["config"]), json.loads(json.dumps(asdict(model.config)))
        names = [name for name in saved if saved[name] != here.get(name)]
        told = "; ".join(f"{name}={saved[name]} there, {here.get(name)} here" for name in names)
        if type(model.config).from_dict(saved).fingerprint == own:
            return
    except (AttributeError, LookupError, TypeError, ValueError):
        pass
    raise ValueError(f"{path} is of a model with the fingerprint {theirs}, this model's is {own}: {told}")


def decoded(tensors: dict[str, Tensor], model: BlockRecurrentTransformer | None) -> dict[str, Any]:
    """The values by name that `to_tensors` took apart."""
    if STRUCTURE not in tensors:
        raise ValueError(f"these are not memories and states: there is no tensor {STRUCTURE!r}")
    try:
        content = json.loads(bytes(tensors[STRUCTURE].tolist()))
        version, structure = int(content["format"]), content["carried"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"tensor {STRUCTURE!r} cannot be read: {error}") from error
    if not 1 <= version <= FORMAT:
        raise ValueError(f"format {version} of memories and states is unknown, this version reads 1 to {FORMAT}")
    for older in range(version, FORMAT):
        structure = UPGRADES[older](structure)
    types = {*TYPES, *(named_tuples(model.init_memories(1)) if model is not None else ())}
    values: Any = checkpoint.unflatten(structure, tensors, types)
    match values:
        case {"memories": Memories(), "states": States(), "previous": Tensor() | None}:
            return dict(values)
    raise ValueError(f"tensor {STRUCTURE!r} describes no memories and states, but {describe(structure)}")


def named_tuples(value: Any) -> Iterator[type]:
    """The classes of named tuples in a nesting of dicts, lists and tuples."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        yield type(value)
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from named_tuples(item)


# ------------------------------------------------------------------------------------------------- names of old formats


def renamed_from_1(structure: Any) -> Any:
    """Format 1 (version 1.0.0) with the names of format 2.

    Place, blocks and ahead of `Memories` became a `Position`; xl and compressed of `LayerMemory` entries of `past`, and
    its window `ready`; the views of `States` became `kv`.
    """
    if isinstance(structure, list):
        return [renamed_from_1(item) for item in structure]
    if not isinstance(structure, dict):
        return structure
    structure = {key: renamed_from_1(item) for key, item in structure.items()}
    match structure.get("$namedtuple"):
        case ["Memories", {"layers": layers, "place": place, "blocks": blocks, "ahead": ahead}]:
            position = {"offset": place, "full_blocks": blocks, "extra_blocks": ahead, "known": None}
            fields = {"layers": layers, "position": {"$namedtuple": ["Position", position]}}
        case ["LayerMemory", {"xl": xl, "block": block, "compressed": compressed, "window": window}]:
            past = {"xl": xl} if compressed is None else {"xl": xl, "compressed": compressed}
            fields = {"block": block, "past": past, "ready": window}
        case ["States", {"layers": layers, "views": views}]:
            fields = {"layers": layers, "kv": views}
        case _:
            return structure
    return {"$namedtuple": [structure["$namedtuple"][0], fields]}


UPGRADES: dict[int, Callable[[Any], Any]] = {1: renamed_from_1}  # structure of a format -> of the next one
