"""Durable checkpoints without pickle: tensors in safetensors files, everything else in JSON.

A checkpoint is one folder that appears whole or not at all:

    run/checkpoints/
        step-00001000/
            checkpoint.json         {"sha256": digest of the content, "content": {...}}
            model.safetensors       one file for each tree of tensors given to `save`
            optimizer.safetensors
        step-00002000/
        .tmp-step-00003000/         being written, or left behind by a killed process; never read, removed by `save`

`content` holds the format version, the step, the metric, the size and SHA-256 of every file, the structure of every
tree, and the caller's metadata. Nothing that is loaded is executed or imported: classes of named tuples are those that
the caller passes in. Digests find accidents (a torn write, a flipped bit); they do not prove who wrote a file.

    save(folder, tensors={"model": model.state_dict(), "optimizer": optimizer.state_dict(), "memories": memories},
         metadata={"config": config, "rng": rng_state(), "stream": stream.state_dict()}, step=1000, metric=loss)
    checkpoint = load_latest(folder, types=(Memories, LayerMemory, KV))
    model.load_state_dict(checkpoint.tensors["model"])

A folder belongs to one run, and one process at a time writes to it (rank 0 of several). POSIX file systems.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import read_tensors, sync, written_at_once

FORMAT = 1
MANIFEST = "checkpoint.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_STEP = 2**53

logger = logging.getLogger(__name__)

Tree = Any  # tensors, None, bool, int, float, str in any nesting of dicts, lists, tuples and named tuples
Json = Any  # what json.dumps takes
StrPath = str | os.PathLike[str]


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was written: half-written, truncated, altered, or never one of ours."""


class OtherFormat(ValueError):
    """A checkpoint of another version of this format, which is neither damaged nor passed over."""


class Checkpoint(NamedTuple):
    """What was loaded. Tensors are on the CPU, in memory of their own."""

    step: int
    tensors: dict[str, Tree]
    metadata: dict[str, Any]
    metric: float | None
    path: Path
    skipped: tuple[str, ...] = ()  # by `load_latest`: which newer checkpoints it passed over, and why


# 1 trees: any nesting of values <-> JSON and a flat dict of tensors


def flatten(tree: Tree) -> tuple[Json, dict[str, Tensor]]:
    """Splits a tree into a JSON structure and its tensors, so that `unflatten` gives it back to the last bit.

    Plain JSON stays readable as it is. What JSON lacks is an object with a single key that starts with "$":

        {"$tensor": name}    {"$tuple": [...]}    {"$namedtuple": [class name, {field: value}]}
        {"$float": "nan"}    {"$dict": [[key, value], ...]} where a key is no string or starts with "$"

    A tensor's name is its path ("state/0/exp_avg"); for a state dict of a module, the parameter's name. Tensors come
    back contiguous, on the CPU and without gradient. The same view of the same memory twice (tied weights) is stored
    once and comes back as one tensor; views that merely overlap are stored apart.

    Args:
        tree: tensors, None, bool, int, float, str in dicts (keys: None, bool, int, float, str), lists, tuples and
            named tuples. Subclasses of dict come back as dict.

    Returns:
        The structure, and the tensors by name: contiguous, on the CPU, none sharing memory with another.

    Raises:
        ValueError: something else, named by its path: other objects, subclasses of Tensor, sparse or meta tensors.
    """
    store = _Store()
    return _encode(tree, (), store), store.tensors


def unflatten(structure: Json, tensors: Mapping[str, Tensor], types: Iterable[type] = ()) -> Tree:
    """The inverse of `flatten`.

    Args:
        structure: from `flatten`, possibly read from a file that is not trusted.
        tensors: the tensors by name.
        types: the classes of named tuples that may occur, found by their `__name__`.

    Raises:
        ValueError: a structure that `flatten` does not make, an absent tensor, a named tuple not among `types` or
            with other fields than the class of that name has.
    """
    classes = {cls.__name__: cls for cls in types}
    try:
        return _decode(structure, tensors, classes)
    except RecursionError as error:
        raise ValueError("the structure is nested too deeply") from error


class _Store:
    """The tensors met so far, by name and by the memory they view."""

    dtypes = frozenset(
        {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
        | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
    )

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._views: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()

    def add(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{type(tensor).__name__}, {tensor.layout}, {tensor.device}"
            raise ValueError(f"{_where(path)} must be a plain dense tensor with data, got {kind}")
        if tensor.dtype not in self.dtypes:
            raise ValueError(f"{_where(path)} has dtype {tensor.dtype}, which cannot be saved")

        storage = tensor.untyped_storage()
        geometry = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg())
        view = (tensor.device, storage.data_ptr() if tensor.numel() else id(tensor), *geometry)
        if view not in self._views:
            self._views[view] = self._free_name("/".join(path) or "value")
            self.tensors[self._views[view]] = self._plain(tensor)
        return self._views[view]

    def _plain(self, tensor: Tensor) -> Tensor:
        plain = tensor.detach().resolve_neg().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in self._storages:
            plain = plain.clone()
        self._storages.add(plain.untyped_storage().data_ptr())
        return plain

    def _free_name(self, name: str) -> str:
        free, count = name, 1
        while free in self.tensors or free == "__metadata__":  # that one is the safetensors format's own
            count += 1
            free = f"{name}#{count}"
        return free


def _encode(value: Tree, path: tuple[str, ...], store: _Store) -> Json:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return {"$tensor": store.add(value, path)}
    if isinstance(value, dict):
        return _encode_dict(value, path, store)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = {name: _encode(field, (*path, name), store) for name, field in zip(value._fields, value, strict=True)}
        return {"$namedtuple": [type(value).__name__, fields]}
    if type(value) in (list, tuple):
        items = [_encode(item, (*path, str(index)), store) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    raise ValueError(f"{_where(path)} is a {type(value).__module__}.{type(value).__name__}, which cannot be saved")


def _encode_dict(value: dict[Any, Tree], path: tuple[str, ...], store: _Store) -> Json:
    for key in value:
        if key is not None and type(key) not in (bool, int, float, str):
            raise ValueError(f"{_where(path)} has the key {key!r}, keys are None, bool, int, float or str")
    items = [(key, _encode(item, (*path, str(key)), store)) for key, item in value.items()]
    if all(type(key) is str and not key.startswith("$") for key in value):
        return dict(items)
    return {"$dict": [[_encode(key, path, store), item] for key, item in items]}


def _decode(node: Json, tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> Tree:
    if node is None or type(node) in (bool, int, float, str):
        return node
    if type(node) is list:
        return [_decode(item, tensors, classes) for item in node]
    if type(node) is dict and not any(key.startswith("$") for key in node):
        return {key: _decode(item, tensors, classes) for key, item in node.items()}
    match node:
        case {"$tensor": str(name), **rest} if not rest:
            if name not in tensors:
                raise ValueError(f"tensor {name!r} is in the structure but not in the file")
            return tensors[name]
        case {"$float": "nan" | "inf" | "-inf" as text, **rest} if not rest:
            return float(text)
        case {"$tuple": list(items), **rest} if not rest:
            return tuple(_decode(item, tensors, classes) for item in items)
        case {"$dict": list(items), **rest} if not rest:
            return dict(_decode_item(item, tensors, classes) for item in items)
        case {"$namedtuple": [str(name), dict(fields)], **rest} if not rest:
            cls = _named_tuple(name, fields, classes)
            return cls(**{field: _decode(item, tensors, classes) for field, item in fields.items()})
    raise ValueError(f"not a structure of a tree: {str(node)[:100]}")


def _decode_item(item: Json, tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> tuple[Any, Tree]:
    match item:
        case [key, value]:
            key = _decode(key, {}, {})
            if key is None or type(key) in (bool, int, float, str):
                return key, _decode(value, tensors, classes)
    raise ValueError(f"not a key and value of a dict: {str(item)[:100]}")


def _named_tuple(name: str, fields: dict[str, Json], classes: Mapping[str, type]) -> Any:
    if name not in classes:
        known = ", ".join(sorted(classes)) or "none"
        raise ValueError(f"named tuple {name!r} is not among the given types ({known})")
    expected = getattr(classes[name], "_fields", None)
    if expected is None or set(expected) != set(fields):
        raise ValueError(f"{name} was saved with the fields {sorted(fields)}, the class given has {expected}")
    return classes[name]


def _where(path: tuple[str, ...]) -> str:
    return repr("/".join(path)) if path else "the value"


# 2 saving


def save(
    folder: StrPath,
    *,
    tensors: Mapping[str, Tree],
    metadata: dict[str, Any],
    step: int,
    keep: int = 3,
    metric: float | None = None,
) -> Path:
    """Writes the checkpoint `folder/step-00001234`, then removes those no longer wanted.

    Files and folders are synced before the checkpoint gets its name, and older ones are removed only after that, so
    that a kill or a power cut at any moment leaves the checkpoints before it, or all of this one as well.

    Args:
        folder: where the run keeps its checkpoints; made if absent.
        tensors: trees by name, e.g. model, optimizer, memories; each becomes a file `name.safetensors`.
        metadata: whatever else is needed to go on: anything that `flatten` takes, without tensors.
        step: optimizer steps done.
        keep: how many of the latest checkpoints stay.
        metric: a number of which lower is better, e.g. bits per byte of the validation set. The checkpoint with the
            lowest finite one stays as well.

    Returns:
        The folder of the new checkpoint.

    Raises:
        ValueError: a value that cannot be saved, or an intact checkpoint of this or a later step (a run that went back
            to an earlier step continues in another folder). Damaged ones are replaced.
        OSError: the disk is full, or another failure to write; the temporary folder is removed where possible and the
            previous checkpoints are as they were.
    """
    name = _step_name(step)
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1")
    flat = _flatten_all(tensors)
    content: dict[str, Json] = {
        "format": FORMAT,
        "step": step,
        "metric": _encode_metric(metric),
        "files": {},
        "trees": {tree: structure for tree, (structure, _) in flat.items()},
        "metadata": _encode_metadata(metadata),
    }

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    _refuse_to_go_back(folder, step)
    _write(folder / name, content, {tree: parts for tree, (_, parts) in flat.items()})
    _prune(folder, step, keep)
    return folder / name


def _write(path: Path, content: dict[str, Json], trees: dict[str, dict[str, Tensor]]) -> None:
    """Writes a checkpoint under a temporary name, and gives it its own once all of it is on the disk."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.mkdir()
        for name, tensors in trees.items():
            file = temporary / f"{name}.safetensors"
            content["files"][file.name] = _write_tensors(file, tensors)
        _write_manifest(temporary / MANIFEST, content)  # and the folder's entries
        _set_aside(path)
        temporary.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flatten_all(tensors: Mapping[str, Tree]) -> dict[str, tuple[Json, dict[str, Tensor]]]:
    flat = {}
    for name, tree in tensors.items():
        if not _is_tree_name(name):
            raise ValueError(f"tensors has the key {name!r}, names are lower-case letters, digits and underscores")
        try:
            flat[name] = flatten(tree)
        except ValueError as error:
            raise ValueError(f"tensors[{name!r}]: {error}") from error
    return flat


def _encode_metric(metric: float | None) -> Json:
    return _encode(None if metric is None else float(metric), ("metric",), _Store())


def _encode_metadata(metadata: dict[str, Any]) -> Json:
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be a dict, got {type(metadata).__name__}")
    try:
        structure, tensors = flatten(metadata)
    except ValueError as error:
        raise ValueError(f"metadata: {error}") from error
    if tensors:
        raise ValueError(f"metadata holds the tensors {sorted(tensors)}, which belong into tensors")
    return structure


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Json]:
    """Writes and syncs one file; returns its size and digest, as read back."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # failures of the disk arrive as text: "... No space left on device (os error 28)"
        code = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(code[1]) if code else None, str(error), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    sync(path)
    return {"size": path.stat().st_size, "sha256": _file_digest(path)}


def amend(folder: StrPath, *, metadata: dict[str, Any], step: int, metric: float | None) -> None:
    """Gives the checkpoint of a step other metadata and another metric, at once; its tensors stay."""
    file = Path(folder) / _step_name(step) / MANIFEST
    beside = {"metric": _encode_metric(metric), "metadata": _encode_metadata(metadata)}
    _write_manifest(file, {**_read_content(file), **beside})


def _write_manifest(path: Path, content: dict[str, Json]) -> None:
    data = json.dumps({"sha256": _content_digest(content), "content": content}, allow_nan=False, indent=1).encode()
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"metadata and structures take {len(data)} bytes of JSON, at most {MAX_MANIFEST_BYTES} may be")
    with written_at_once(path) as file:
        file.write(data)


def _refuse_to_go_back(folder: Path, step: int) -> None:
    for path in checkpoints(folder):
        if _step_of(path) < step:
            continue
        try:
            content = _read_manifest(path)
            _verify(path, content)
            for name in content["files"]:
                _read_tensors(path / name)
        except DamagedCheckpoint as error:
            logger.warning("%s; it will be replaced", error)
        else:
            raise ValueError(f"step={step}: {path} is already there and intact, use another folder or load that one")


def _prune(folder: Path, step: int, keep: int) -> None:
    """Leaves the last `keep` whole checkpoints, the best one, and those of another format.

    Later ones than `step` were found damaged before it was written, and go.
    """
    metrics: dict[Path, float | None] = {}
    wanted: set[Path] = set()
    for path in checkpoints(folder):
        if _step_of(path) > step:
            continue
        try:
            metrics[path] = _look(path)["metric"]
        except DamagedCheckpoint:
            continue
        except ValueError:
            wanted.add(path)
    wanted |= set(list(metrics)[-keep:]) | set(_lowest(metrics)[:1])
    for path in checkpoints(folder):
        if path not in wanted:
            _set_aside(path)
    _remove_leftovers(folder)


def _lowest(metrics: Mapping[Path, float | None]) -> list[Path]:
    """The checkpoints that have a finite metric, the lowest first and the earlier of equal ones first."""
    finite = {path: metric for path, metric in metrics.items() if metric is not None and math.isfinite(metric)}
    return sorted(finite, key=lambda path: finite[path])


def _set_aside(path: Path) -> None:
    """Renames what is to be removed, so that a removal cut short never looks like a checkpoint."""
    if os.path.lexists(path):
        path.rename(path.with_name(f".tmp-removed-{path.name}"))


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".tmp-*"):
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            logger.warning("cannot remove %s: %s", path, error)


# 3 loading


def checkpoints(folder: StrPath) -> list[Path]:
    """The folders named like a checkpoint, the earliest first; none where `folder` is absent. They are not checked."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted((folder / name for name in names if _parse_step(name) is not None), key=_step_of)


def best(folder: StrPath) -> Path:
    """The checkpoint with the lowest finite metric.

    Raises:
        FileNotFoundError: none has one.
    """
    metrics = {}
    for path in checkpoints(folder):
        try:
            metrics[path] = _look(path)["metric"]
        except DamagedCheckpoint as error:
            logger.warning("%s", error)
    lowest = _lowest(metrics)
    if not lowest:
        raise FileNotFoundError(f"no checkpoint with a metric in {folder}")
    return lowest[0]


def load_latest(
    folder: StrPath,
    *,
    types: Iterable[type] = (),
    only: Collection[str] | None = None,
    check: Callable[[Checkpoint], object] | None = None,
) -> Checkpoint:
    """Loads the latest checkpoint that is intact and can be used. Others are passed over: `skipped` says why.

    Args:
        folder: where the run keeps its checkpoints.
        types, only: see `load`.
        check: looks at what was loaded, before anyone uses it, and raises a ValueError that says why it cannot be used.
            Digests that fit prove nothing about the contents.

    Raises:
        FileNotFoundError: there is no checkpoint at all.
        OtherFormat: (a ValueError) the latest one is of another format version, which an earlier one would not mend.
        ValueError: none can be used; says of each why.
    """
    skipped: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            loaded = load(path, types=types, only=only)
            if check is not None:
                check(loaded)
        except OtherFormat:
            raise
        except ValueError as error:
            skipped.append(str(error) if str(error).startswith(str(path)) else f"{path}: {error}")
        else:
            return loaded._replace(skipped=tuple(skipped))
    if skipped:
        raise ValueError(f"no checkpoint in {folder} can be used: {'; '.join(skipped)}")
    raise FileNotFoundError(f"no checkpoint in {folder}")


def forget_after(folder: StrPath, step: int) -> None:
    """Sets aside the checkpoints of later steps, which were passed over, so that the run can write its own again.

    They are no checkpoints from then on, and the next `save` removes them.
    """
    _remove_leftovers(Path(folder))
    for path in checkpoints(folder):
        if _step_of(path) > step:
            _set_aside(path)


def load(path: StrPath, *, types: Iterable[type] = (), only: Collection[str] | None = None) -> Checkpoint:
    """Loads one checkpoint after its sizes and digests were verified.

    Args:
        path: the checkpoint's folder.
        types: the classes of named tuples that may occur in it.
        only: names of the trees to read; None for all. Files of the others are not looked at.

    Raises:
        FileNotFoundError: there is no such folder.
        DamagedCheckpoint: (a ValueError) something is missing, altered or malicious; names the file and the reason.
        OtherFormat: (a ValueError) another format version.
        ValueError: an unknown tree in `only`, named tuples not among `types`.
    """
    path = Path(path)
    content = _read_manifest(path)
    names = list(content["trees"]) if only is None else list(only)
    unknown = sorted(set(names) - set(content["trees"]))
    if unknown:
        raise ValueError(f"{path} has the trees {sorted(content['trees'])}, not {unknown}")
    _verify(path, content, names)
    try:
        trees = {
            name: unflatten(content["trees"][name], _read_tensors(path / f"{name}.safetensors"), types)
            for name in names
        }
    except DamagedCheckpoint:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(content["step"], trees, content["metadata"], content["metric"], path)


def _look(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are there and have their sizes; digests are not computed."""
    content = _read_manifest(path)
    for name, facts in content["files"].items():
        _check_size(path / name, facts["size"])
    return content


def _verify(path: Path, content: dict[str, Any], names: Iterable[str] | None = None) -> None:
    for name in content["trees"] if names is None else names:
        file, facts = path / f"{name}.safetensors", content["files"][f"{name}.safetensors"]
        _check_size(file, facts["size"])
        if _file_digest(file) != facts["sha256"]:
            raise DamagedCheckpoint(f"{file} does not have the SHA-256 that {MANIFEST} gives")


def _check_size(file: Path, size: int) -> None:
    try:
        facts = file.lstat()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{file} is missing") from error
    if not stat.S_ISREG(facts.st_mode):
        raise DamagedCheckpoint(f"{file} is not a regular file")
    if facts.st_size != size:
        raise DamagedCheckpoint(f"{file} has {facts.st_size} bytes, {MANIFEST} says {size}")


def _read_manifest(path: Path) -> dict[str, Any]:
    """The checked content of a checkpoint's JSON, with metric and metadata decoded."""
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise DamagedCheckpoint(f"{path} is not a folder itself")
    file = path / MANIFEST
    content = _read_content(file)
    version = content.get("format")
    if type(version) is not int:
        raise DamagedCheckpoint(f"{file} has format version {version!r}, which is no number")
    if version != FORMAT:
        raise OtherFormat(f"{file} has format version {version}, this library reads {FORMAT}")
    try:
        return _check_content(content, path)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"{file} is not as this library writes it: {error}") from error


def _read_content(file: Path) -> dict[str, Json]:
    try:
        size = file.lstat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise DamagedCheckpoint(f"{file} has {size} bytes, at most {MAX_MANIFEST_BYTES} may be")
        _check_size(file, size)
        outer = json.loads(file.read_bytes())
        if _content_digest(outer["content"]) != outer["sha256"]:
            raise DamagedCheckpoint(f"{file} does not have the SHA-256 that it gives itself")
        return dict(outer["content"])
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{file} is missing") from error
    except DamagedCheckpoint:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def _check_content(content: dict[str, Json], path: Path) -> dict[str, Any]:
    """Checks types and names, each of which could otherwise lead a malicious file out of its folder."""
    step, files, trees = content["step"], content["files"], content["trees"]
    if _parse_step(path.name) not in (None, _checked_step(step)):
        raise ValueError(f"step {step} in a folder named {path.name}")
    if type(files) is not dict or type(trees) is not dict or not all(_is_tree_name(name) for name in trees):
        raise ValueError(f"trees {str(trees)[:100]} of files {str(files)[:100]}")
    if set(files) != {f"{name}.safetensors" for name in trees}:
        raise ValueError(f"files {sorted(files)} for the trees {sorted(trees)}")
    for name, facts in files.items():
        if type(facts["size"]) is not int or type(facts["sha256"]) is not str:
            raise ValueError(f"size {facts['size']!r} and sha256 {facts['sha256']!r} of {name}")
    metric, metadata = unflatten(content["metric"], {}), unflatten(content["metadata"], {})
    if not (metric is None or type(metric) is float) or type(metadata) is not dict:
        raise ValueError(f"metric {metric!r}, metadata of type {type(metadata).__name__}")
    return {**content, "metric": metric, "metadata": metadata}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(file)
    except (SafetensorError, RuntimeError, OverflowError, TypeError, KeyError, ValueError) as error:
        raise DamagedCheckpoint(f"{file} is not a readable safetensors file: {error}") from error


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _content_digest(content: Json) -> str:
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()


def _is_tree_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) is not None


def _checked_step(step: Any) -> int:
    if type(step) is not int or not 0 <= step < MAX_STEP:
        raise ValueError(f"step={step!r} must be an int from 0 to {MAX_STEP - 1}")
    return step


def _step_name(step: int) -> str:
    return f"step-{_checked_step(step):08d}"


def _parse_step(name: str) -> int | None:
    """The step in a checkpoint's folder name, None for any other name."""
    match = re.fullmatch(r"step-([0-9]{8,16})", name)
    if match is None or int(match[1]) >= MAX_STEP or _step_name(int(match[1])) != name:
        return None
    return int(match[1])


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


# 4 random number generators


def rng_state(generators: Mapping[str, torch.Generator] | None = None) -> dict[str, Any]:
    """The state of every random number generator in use, exactly and as JSON, for the metadata of a checkpoint.

    Covers Python's `random`, numpy's global one, torch's on the CPU and, where there is one, on the current CUDA
    device (one process, one GPU), and the given ones. With several processes each has a state of its own.

    Args:
        generators: torch generators of the caller's own, by name.
    """
    version, internal, gauss = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    return {
        "python": [version, list(internal), gauss],
        "numpy": {
            "bit_generator": numpy["bit_generator"],
            "key": _to_base64(numpy["state"]["key"].astype("<u4")),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": _to_base64(torch.get_rng_state().numpy()),
        "cuda": _to_base64(torch.cuda.get_rng_state().numpy()) if torch.cuda.is_available() else None,
        "generators": {name: _to_base64(g.get_state().numpy()) for name, g in (generators or {}).items()},
    }


def set_rng_state(state: dict[str, Any], generators: Mapping[str, torch.Generator] | None = None) -> None:
    """Puts every generator back to where `rng_state` found it.

    The CUDA generator is left alone where either side has none: a run may go on on another kind of machine, though
    then not bitwise.

    Args:
        state: from `rng_state`, possibly read from a file that is not trusted.
        generators: torch generators with the same names as then, on the same kinds of device.

    Raises:
        ValueError: a state that is malformed, or other names of generators. None has been set then.
    """
    own = dict(generators or {})
    new = read_rng_state(state, own)
    random.setstate(new.python)
    np.random.set_state(new.numpy)
    torch.set_rng_state(new.torch)
    if new.cuda is not None:
        torch.cuda.set_rng_state(new.cuda)
    for name, generator in own.items():
        generator.set_state(new.generators[name])


def seed_everything(*numbers: int) -> None:
    """Other random numbers in every generator but those of the caller's own, for other numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class RngState(NamedTuple):
    """The states of all generators, each in the form that its owner takes."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: Tensor | None
    generators: dict[str, Tensor]


def read_rng_state(state: dict[str, Any], generators: Mapping[str, torch.Generator]) -> RngState:
    """What `set_rng_state` would set, tried on generators that nobody uses.

    Raises:
        ValueError: see `set_rng_state`.
    """
    try:
        if set(state["generators"]) != set(generators):
            raise ValueError(f"saved generators are {sorted(state['generators'])}, given ones {sorted(generators)}")
        version, internal, gauss = state["python"]
        cuda = state["cuda"] if torch.cuda.is_available() else None
        new = RngState(
            (version, tuple(internal), None if gauss is None else float(gauss)),
            _numpy_state(state["numpy"]),
            _to_tensor(state["torch"]),
            None if cuda is None else _to_tensor(cuda),
            {name: _to_tensor(state["generators"][name]) for name in generators},
        )
        random.Random().setstate(new.python)
        np.random.RandomState().set_state(new.numpy)
        torch.Generator().set_state(new.torch)
        if new.cuda is not None:
            torch.Generator("cuda").set_state(new.cuda)
        for name, generator in generators.items():
            torch.Generator(generator.device).set_state(new.generators[name])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"not a state of the random number generators: {type(error).__name__}: {error}") from error
    return new


def _numpy_state(state: dict[str, Any]) -> dict[str, Any]:
    key = np.frombuffer(base64.b64decode(state["key"], validate=True), dtype="<u4")
    if state["bit_generator"] != "MT19937" or key.size != 624 or not 0 <= state["pos"] <= 624:  # numpy checks no pos
        raise ValueError(f"numpy's {state['bit_generator']!r} with {key.size} words, pos={state['pos']!r}")
    return {
        "bit_generator": "MT19937",
        "state": {"key": key.astype(np.uint32), "pos": int(state["pos"])},
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }


def _to_base64(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _to_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
