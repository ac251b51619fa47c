"""Checkpoints: exact round trips, crashes at every point of a write, damaged and malicious files, full disks."""

import errno
import hashlib
import json
import math
import os
import random
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from block_recurrent_transformer_pytorch import checkpoint as room
from block_recurrent_transformer_pytorch import files
from block_recurrent_transformer_pytorch.checkpoint import (
    DamagedCheckpoint,
    best,
    checkpoints,
    flatten,
    load,
    load_latest,
    rng_state,
    save,
    set_metric,
    set_rng_state,
    unflatten,
)


class KV(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor


class Layer(NamedTuple):
    xl: KV
    compressed: KV | None = None


def same(a, b):
    """Equal in type, structure and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and to_bytes(a) == to_bytes(b)
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(map(same, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)  # tells -0.0 from 0.0 and finds nan equal to itself


def to_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def there_and_back(tree, types=(KV, Layer)):
    structure, tensors = flatten(tree)
    structure = json.loads(json.dumps(structure, allow_nan=False))
    return unflatten(structure, tensors, types)


# trees

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensor(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    made = flat.reshape(shape)
    return draw(st.sampled_from([made, made.transpose(0, -1) if shape else made, made.expand(2, *made.shape)]))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(
    SCALARS | tensor(),
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(SCALARS, t, max_size=3)
        | st.dictionaries(st.sampled_from(["$tensor", "$tuple", "a", "a/b", "b", "__metadata__"]), t, max_size=3)
        | st.builds(Layer, st.builds(KV, t, t), t)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_any_tree_comes_back_to_the_last_bit(tree):
    assert same(there_and_back(tree), tree)


@settings(max_examples=15, deadline=None)
@given(tree=TREES, metadata=st.dictionaries(st.text(max_size=5), st.lists(SCALARS, max_size=3), max_size=3))
def test_any_tree_comes_back_from_the_disk(tmp_path_factory, tree, metadata):
    path = save(tmp_path_factory.mktemp("run"), tensors={"tree": tree}, metadata=metadata, step=7)
    loaded = load(path, types=(KV, Layer))
    assert same(loaded.tensors["tree"], tree)
    assert same(loaded.metadata, metadata)


def test_tied_tensors_stay_tied_and_overlapping_ones_come_apart():
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"a": base, "b": base.view(3, 4), "row": base[1], "t": base.t(), "parameter": nn.Parameter(base)}
    structure, tensors = flatten(tree)
    assert sorted(tensors) == ["a", "row", "t"]
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == 3
    back = unflatten(structure, tensors)
    assert back["a"] is back["b"] is back["parameter"] and not back["a"].requires_grad
    assert torch.equal(back["t"], base.t()) and torch.equal(back["row"], base[1])


def test_negated_views_are_saved_with_their_sign():
    negated = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert negated.is_neg()
    assert there_and_back(negated).tolist() == [-2.0, 4.0]


def test_names_of_a_state_dict_are_kept(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    path = save(tmp_path, tensors={"model": model.state_dict()}, metadata={}, step=1)
    assert list(load_file(path / "model.safetensors")) == sorted(model.state_dict())


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_optimizers_continue_bitwise(tmp_path, make):
    def trained(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((2, 3), float(step))).square().sum().backward()
            optimizer.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = trained(model, make(model.parameters(), lr=1e-2), range(6))

    model.load_state_dict(start)
    optimizer = make(model.parameters(), lr=1e-2)
    trained(model, optimizer, range(3))
    path = save(
        tmp_path, tensors={"model": model.state_dict(), "optimizer": optimizer.state_dict()}, metadata={}, step=3
    )
    other = nn.Linear(3, 2)
    loaded = load(path)
    other.load_state_dict(loaded.tensors["model"])
    optimizer = make(other.parameters(), lr=0.5)
    optimizer.load_state_dict(loaded.tensors["optimizer"])
    assert same(trained(other, optimizer, range(3, 6)), expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"a": [object()]}, "'a/0' is a builtins.object"),
        ({"a": np.float64(1)}, "numpy.float64"),
        ({"a": {1, 2}}, "builtins.set"),
        ({(1, 2): 3}, r"key \(1, 2\)"),
        ({"a": torch.zeros(2, device="meta")}, "'a'.*meta"),
        ({"a": torch.eye(2).to_sparse()}, "'a'.*sparse"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a'.*complex64"),
        ({"a": torch.zeros(2).as_subclass(type("Sub", (torch.Tensor,), {}))}, "'a'.*Sub"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        flatten(wrong)
    with pytest.raises(ValueError, match=message):
        save(tmp_path, tensors={"tree": wrong}, metadata={}, step=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "structure, message",
    [
        ({"$tensor": "absent"}, "absent"),
        ({"$tensor": 3}, "not a structure"),
        ({"$tensor": "t", "more": 1}, "not a structure"),
        ({"$float": "1e5"}, "not a structure"),
        ({"$tuple": {"a": 1}}, "not a structure"),
        ({"$dict": [[{"$tuple": []}, 1]]}, "not a key"),
        ({"$dict": [[1]]}, "not a key"),
        ({"$pickle": "gASVAAA="}, "not a structure"),
        ({"$namedtuple": ["system", {}]}, "'system' is not among the given types"),
        ({"$namedtuple": ["KV", {"k": 1}]}, "KV.*'k'.*v"),
        ({"$namedtuple": ["KV", {"k": 1, "v": 2, "__class__": 3}]}, "KV"),
        ({"$namedtuple": ["Path", {}]}, "Path"),
        (object(), "not a structure"),
    ],
)
def test_structures_that_flatten_does_not_make(structure, message):
    with pytest.raises(ValueError, match=message):
        unflatten(structure, {"t": torch.zeros(1)}, types=(KV, Path))


def test_deep_structures_are_refused():
    structure = []
    for _ in range(100_000):
        structure = [structure]
    with pytest.raises(ValueError, match="deep"):
        unflatten(structure, {})


# saving and loading


def write(folder, step, **options):
    tensors = {"model": {"w": torch.full((64,), float(step))}, "memories": Layer(KV(torch.ones(2), torch.zeros(2)))}
    return save(folder, tensors=tensors, metadata={"lr": math.inf, "steps": (1, 2)}, step=step, **options)


def read(folder):
    return load_latest(folder, types=(KV, Layer))


def test_a_checkpoint_is_what_was_saved(tmp_path):
    folder = tmp_path / "new" / "run"
    path = write(folder, 1234, metric=2.5)
    assert path == folder / "step-00001234"
    assert sorted(os.listdir(path)) == ["checkpoint.json", "memories.safetensors", "model.safetensors"]
    assert os.listdir(folder) == ["step-00001234"]
    loaded = read(folder)
    assert (loaded.step, loaded.metric, loaded.path, loaded.skipped) == (1234, 2.5, path, ())
    assert loaded.metadata == {"lr": math.inf, "steps": (1, 2)}
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((64,), 1234.0))
    assert isinstance(loaded.tensors["memories"], Layer) and loaded.tensors["memories"].compressed is None


def test_parts_can_be_loaded_alone(tmp_path):
    path = write(tmp_path, 1)
    (path / "memories.safetensors").unlink()
    assert list(load(path, only=["model"]).tensors) == ["model"]
    with pytest.raises(ValueError, match=r"trees \['memories', 'model'\], not \['optimizer'\]"):
        load(path, only=["optimizer"])


def test_files_are_as_readable_as_the_folder(tmp_path):
    path = write(tmp_path, 1)
    assert {file.stat().st_mode & 0o666 for file in path.iterdir()} == {path.stat().st_mode & 0o666}


def test_the_last_ones_and_the_best_stay(tmp_path):
    metrics = {1: 5.0, 2: 1.0, 3: math.nan, 4: 1.0, 5: None, 6: -math.inf, 7: 3.0}
    for step, metric in metrics.items():
        write(tmp_path, step, keep=2, metric=metric)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000006", "step-00000007"]
    assert best(tmp_path).name == "step-00000002"
    write(tmp_path, 8, keep=1, metric=0.5)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000008"]


def test_no_metric_no_best(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="metric"):
        best(tmp_path)


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=3)
    (tmp_path / "step-00000003" / "model.safetensors").unlink()
    (tmp_path / "step-00000002" / "checkpoint.json").write_bytes(b"{}")
    write(tmp_path, 4, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001", "step-00000004"]


def test_nothing_intact_is_overwritten(tmp_path):
    write(tmp_path, 5)
    before = {file: file.read_bytes() for file in (tmp_path / "step-00000005").iterdir()}
    for step in (5, 4):
        with pytest.raises(ValueError, match=f"step={step}.*step-00000005 is already there"):
            write(tmp_path, step)
    assert before == {file: file.read_bytes() for file in (tmp_path / "step-00000005").iterdir()}
    assert os.listdir(tmp_path) == ["step-00000005"]


def test_damaged_ones_are_replaced(tmp_path):
    for step in (4, 5, 6):
        write(tmp_path, step)
    for step in (5, 6):
        flip(tmp_path / f"step-0000000{step}" / "model.safetensors", -1)
    write(tmp_path, 5, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005"]
    assert read(tmp_path).skipped == ()


def test_arguments_are_checked(tmp_path):
    for wrong in (-1, 1.0, True, 2**60, "1"):
        with pytest.raises(ValueError, match="step="):
            save(tmp_path, tensors={}, metadata={}, step=wrong)
    with pytest.raises(ValueError, match="keep=0"):
        save(tmp_path, tensors={}, metadata={}, step=1, keep=0)
    for name in ("../model", "Model", "", "a.b", "a/b", 3):
        with pytest.raises(ValueError, match="tensors has the key"):
            save(tmp_path, tensors={name: {}}, metadata={}, step=1)
    with pytest.raises(ValueError, match=r"metadata holds the tensors \['w'\]"):
        save(tmp_path, tensors={}, metadata={"w": torch.ones(1)}, step=1)
    with pytest.raises(ValueError, match="metadata must be a dict"):
        save(tmp_path, tensors={}, metadata=[1], step=1)
    assert os.listdir(tmp_path) == []


def test_nothing_there(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        assert checkpoints(folder) == []
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            load_latest(folder)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "step-00000001")


def test_foreign_names_are_no_checkpoints(tmp_path):
    for name in (
        "step-1",
        "step-0000000x",
        "step-000000001",
        "step-00000001.bak",
        "step-\u0660000000\u0661",
        ".tmp-step-00000009",
    ):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == []


def test_wrong_types_are_the_callers_error_and_not_damage(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(ValueError, match=r"Layer.*types") as caught:
        load_latest(tmp_path, types=(KV,))
    assert not isinstance(caught.value, DamagedCheckpoint)


# damage


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


def truncate(file, size):
    os.truncate(file, size)


DAMAGES = {
    "last byte": lambda p: flip(p / "model.safetensors", -1),
    "header": lambda p: flip(p / "model.safetensors", 0),
    "short": lambda p: truncate(p / "model.safetensors", 100),
    "empty": lambda p: truncate(p / "memories.safetensors", 0),
    "absent": lambda p: (p / "memories.safetensors").unlink(),
    "json short": lambda p: truncate(p / "checkpoint.json", 300),
    "json empty": lambda p: truncate(p / "checkpoint.json", 0),
    "json absent": lambda p: (p / "checkpoint.json").unlink(),
    "json no utf-8": lambda p: (p / "checkpoint.json").write_bytes(b"\xff\xfe{"),
    "json list": lambda p: (p / "checkpoint.json").write_text("[]"),
    "json deep": lambda p: (p / "checkpoint.json").write_text("[" * 100_000),
    "json digits": lambda p: (p / "checkpoint.json").write_text('{"sha256": "", "content": ' + "9" * 5000 + "}"),
    "json huge": lambda p: truncate(p / "checkpoint.json", 1 << 40),
    "json fifo": lambda p: ((p / "checkpoint.json").unlink(), os.mkfifo(p / "checkpoint.json")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, damage):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    DAMAGES[damage](path)
    loaded = read(tmp_path)
    assert loaded.step == 1
    assert len(loaded.skipped) == 1 and str(path) in loaded.skipped[0]
    with pytest.raises(DamagedCheckpoint, match="step-00000002"):
        load(path, types=(KV, Layer))


def test_a_metric_is_given_afterwards_and_at_once(tmp_path, monkeypatch):
    write(tmp_path, 1, metric=2.0)
    path = write(tmp_path, 2)
    before = read(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            set_metric(tmp_path, 2, 1.0)
    assert read(tmp_path).metric is None
    set_metric(tmp_path, 2, 1.0)
    set_metric(tmp_path, 3, 0.5)  # of which there is no checkpoint
    after = read(tmp_path)
    assert (after.metadata, after.metric, best(tmp_path)) == (before.metadata, 1.0, path)
    assert same(after.tensors, before.tensors)


def test_the_format_before_is_read_and_laid_out_anew(tmp_path):
    path = write(tmp_path, 1)
    assert read(tmp_path).format == 2
    forge(path, lambda content: content.update(format=1))
    old = read(tmp_path)
    assert old.format == 1 and same(old.tensors, load(path, types=(KV, Layer)).tensors)
    calls = []

    def upgrade(version, structure):
        calls.append(version)
        return {"as": structure}

    assert load(path, types=(KV, Layer), upgrade=upgrade).tensors["model"].keys() == {"as"} and set(calls) == {1}
    forge(path, lambda content: content.update(format=2))
    load(path, types=(KV, Layer), upgrade=lambda *_: pytest.fail("it is of this format"))


def test_every_flipped_bit_of_the_json_is_found(tmp_path):
    path = write(tmp_path, 1)
    whole, file = load(path, types=(KV, Layer)), path / "checkpoint.json"
    for position in range(0, file.stat().st_size, 7):
        flip(file, position)
        try:
            loaded = load(path, types=(KV, Layer))
        except ValueError as error:
            assert str(path) in str(error)
        else:  # only the spelling of white space or of an escape can have changed
            assert same(tuple(loaded)[2:], tuple(whole)[2:])
        flip(file, position)


def test_all_damaged_is_an_error_that_names_them(tmp_path):
    for path in [write(tmp_path, step) for step in (1, 2)]:
        truncate(path / "model.safetensors", 10)
    with pytest.raises(ValueError, match=r"step-00000002.*10 bytes.*step-00000001.*10 bytes"):
        load_latest(tmp_path)


# malice: everything below has right digests


def forge(path, change):
    """Rewrites the JSON of a checkpoint after `change(content)`, with its digest made right."""
    file = path / "checkpoint.json"
    content = json.loads(file.read_text())["content"]
    content = change(content) or content
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    file.write_text(json.dumps({"sha256": digest, "content": content}))


def renamed(content, name):
    content["trees"][name] = content["trees"].pop("model")
    content["files"][f"{name}.safetensors"] = content["files"].pop("model.safetensors")


FORGERIES = {
    "path": lambda c: renamed(c, "../../../../etc/passwd"),
    "absolute": lambda c: renamed(c, "/etc/passwd"),
    "file of no tree": lambda c: c["files"].update({"../x": {"size": 1, "sha256": ""}}),
    "tree of no file": lambda c: c["trees"].update(other={}),
    "size too large": lambda c: c["files"]["model.safetensors"].update(size=1 << 80),
    "size negative": lambda c: c["files"]["model.safetensors"].update(size=-1),
    "size of another type": lambda c: c["files"]["model.safetensors"].update(size="100"),
    "digest of another type": lambda c: c["files"]["model.safetensors"].update(sha256=None),
    "facts of another type": lambda c: c["files"].update({"model.safetensors": [1, 2]}),
    "files of another type": lambda c: c.update(files=list(c["files"])),
    "trees of another type": lambda c: c.update(trees=list(c["trees"])),
    "step of another type": lambda c: c.update(step="2"),
    "another step": lambda c: c.update(step=3),
    "huge step": lambda c: c.update(step=10**300),
    "metric of another type": lambda c: c.update(metric="low"),
    "metadata of another type": lambda c: c.update(metadata=[1]),
    "metadata with a tensor": lambda c: c.update(metadata={"$tensor": "w"}),
    "no metadata": lambda c: c.pop("metadata") and None,
    "no files": lambda c: c.pop("files") and None,
    "structure": lambda c: c["trees"].update(model={"$tensor": "absent"}),
    "tree of another type": lambda c: c["trees"].update(model={"$dict": 3}),
    "named tuple": lambda c: c["trees"].update(model={"$namedtuple": ["Popen", {"args": "id"}]}),
    "version": lambda c: c.update(format=99),
    "no version": lambda c: c.pop("format") and None,
    "empty": lambda c: {"format": 1},
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_malicious_json_is_a_value_error(tmp_path, forgery):
    path = write(tmp_path, 2)
    forge(path, FORGERIES[forgery])
    for call in (lambda: load(path, types=(KV, Layer)), lambda: read(tmp_path)):
        with pytest.raises(ValueError, match=str(path)):
            call()


def test_another_version_is_neither_skipped_nor_removed(tmp_path):
    write(tmp_path, 1)
    forge(write(tmp_path, 2), FORGERIES["version"])
    with pytest.raises(ValueError, match=r"step-00000002.*version 99"):
        read(tmp_path)
    for step in (3, 4):
        write(tmp_path, step, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("linked", ["model.safetensors", "checkpoint.json", ""])
def test_symbolic_links_are_refused(tmp_path, linked):
    path = write(tmp_path / "run", 1)
    target = path / linked
    (tmp_path / "elsewhere").mkdir()
    target.rename(tmp_path / "elsewhere" / "thing")
    target.symlink_to(tmp_path / "elsewhere" / "thing")
    with pytest.raises(ValueError, match=r"step-00000001.* is not a"):
        load(path, types=(KV, Layer))
    write(tmp_path / "run", 2, keep=1)  # removes the link or what holds it, not what it points to
    assert (tmp_path / "elsewhere" / "thing").exists()


HEADERS = {
    "length beyond the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "no json": (8).to_bytes(8, "little") + b"not json",
    "nothing": b"",
    "data beyond the file": {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
    "negative shape": {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "huge empty shape": {"w": {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}},
    "overflow": {"w": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
    "dtype": {"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}},
    "overlap": {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "wv"},
}


@pytest.mark.parametrize("header", HEADERS)
def test_malicious_tensor_files_are_value_errors(tmp_path, header):
    path, data = write(tmp_path, 1), HEADERS[header]
    if isinstance(data, dict):
        text = json.dumps(data).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(4 if header != "huge empty shape" else 0)
    (path / "model.safetensors").write_bytes(data)
    facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(path, lambda content: content["files"].update({"model.safetensors": facts}))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(path, types=(KV, Layer))


def test_no_pickle():
    assert "pickle" not in Path(room.__file__).read_text().replace("without pickle", "")


# crashes and full disks


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_rust(*_):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where", ["os.fsync", "room.save_file", "Path.rename", "Path.open", "Path.mkdir"])
def test_a_full_disk_leaves_the_others_alone(tmp_path, monkeypatch, where):
    path = write(tmp_path, 1)
    before = {file: file.read_bytes() for file in path.iterdir()}
    owner, name = where.split(".")
    failing = full_in_rust if name == "save_file" else full
    with monkeypatch.context() as patch:
        patch.setattr({"os": os, "room": room, "Path": Path}[owner], name, failing)
        with pytest.raises(OSError, match="No space left") as caught:
            save(tmp_path, tensors={"w": torch.ones(3)}, metadata={}, step=2, keep=1)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert before == {file: file.read_bytes() for file in path.iterdir()}
    write(tmp_path, 2)


def test_a_real_limit_of_the_file_size(tmp_path):
    write(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError):
            save(tmp_path, tensors={"w": torch.ones(100_000)}, metadata={}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["step-00000001"]


def watch_disk(monkeypatch):
    """What is told to the disk, in order: ("sync", name) and ("rename", from, to)."""
    told, fsync, replace, rename = [], os.fsync, os.replace, os.rename

    def synced(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        told.append(("sync", path.name, path.stat().st_size if path.is_file() else sorted(os.listdir(path))))
        fsync(descriptor)

    def renamed(function, source, target):
        told.append(("rename", Path(source).name, Path(target).name))
        function(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda source, target: renamed(replace, source, target))
    monkeypatch.setattr(os, "rename", lambda source, target: renamed(rename, source, target))
    monkeypatch.setattr(Path, "rename", lambda source, target: os.rename(source, target))  # 3.10 keeps the first one
    return told


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    write(tmp_path, 1)
    told = watch_disk(monkeypatch)
    path = write(tmp_path, 2, keep=1)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert told == [
        ("sync", "model.safetensors", sizes["model.safetensors"]),
        ("sync", "memories.safetensors", sizes["memories.safetensors"]),
        ("sync", "checkpoint.json.tmp", sizes["checkpoint.json"]),
        ("rename", "checkpoint.json.tmp", "checkpoint.json"),
        ("sync", ".tmp-step-00000002", sorted(sizes)),  # the folder's entries
        ("rename", ".tmp-step-00000002", "step-00000002"),
        ("sync", tmp_path.name, ["step-00000001", "step-00000002"]),
        ("rename", "step-00000001", ".tmp-removed-step-00000001"),  # and only then the old one goes
    ]


def test_a_file_written_at_once_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")
    told = watch_disk(monkeypatch)
    with files.written_at_once(tmp_path / "a.json") as file:
        file.write(b"newer")
        assert (tmp_path / "a.json").read_text() == "old"
    assert told == [
        ("sync", "a.json.tmp", 5),
        ("rename", "a.json.tmp", "a.json"),
        ("sync", tmp_path.name, ["a.json"]),
    ]
    with pytest.raises(KeyError), files.written_at_once(tmp_path / "a.json") as file:
        file.write(b"half")
        raise KeyError
    assert (tmp_path / "a.json").read_text() == "newer" and os.listdir(tmp_path) == ["a.json"]


def test_a_lock_belongs_to_one(tmp_path):
    with files.locked(tmp_path / "lock"), pytest.raises(BlockingIOError), files.locked(tmp_path / "lock"):
        pass
    with files.locked(tmp_path / "lock"):
        pass


def test_leftovers_are_ignored_and_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002").mkdir()
    (tmp_path / ".tmp-step-00000002" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-removed-step-00000000").mkdir()
    assert read(tmp_path).step == 1
    write(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]


KILLED = """
    # Children of one process save in a loop and are killed: at every system call that matters, then at random moments.
    import logging, os, random, shutil, signal, sys, time
    import torch
    from block_recurrent_transformer_pytorch.checkpoint import load_latest, save

    logging.disable()
    torch.set_num_threads(1)
    folder = sys.argv[1]

    def saves(start, stop):
        for step in range(start, stop):
            save(folder, tensors={"w": torch.full((5000,), float(step))}, metadata={"s": step}, step=step, keep=2)

    def killed_at(count):
        calls = 0
        def before(function):
            def wrapped(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapped
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink", "open"):
            setattr(os, name, before(getattr(os, name)))

    def child(work):
        pid = os.fork()
        if pid == 0:
            work()
            os._exit(0)
        return pid

    def check(least):
        latest = load_latest(folder)
        assert latest.step >= least and not latest.skipped, (latest.step, latest.skipped, least)
        assert latest.metadata == {"s": latest.step}
        assert torch.equal(latest.tensors["w"], torch.full((5000,), float(latest.step)))
        return latest.step

    saves(1, 4)
    kills = 0
    for count in range(1, 1000):
        step = check(3)
        pid = child(lambda: (killed_at(count), saves(step + 1, step + 2)))
        status = os.waitpid(pid, 0)[1]
        now = check(step)
        assert now in (step, step + 1)
        if not os.WIFSIGNALED(status):
            assert now == step + 1
            break
        kills += 1
    for _ in range(6):
        step = check(3)
        pid = child(lambda: saves(step + 1, step + 10_000))
        time.sleep(random.uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        check(step)
    print("killed", kills)
"""


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 10  # that many different moments inside a single save


# random number generators


def draws(generator):
    return [
        [random.random(), random.gauss(0, 1), random.randrange(10**9)],
        [float(np.random.rand()), float(np.random.randn()), int(np.random.randint(10**9))],
        torch.rand(3).tolist() + torch.randn(17).tolist(),
        torch.rand(3, generator=generator).tolist(),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_generators_go_on_exactly(tmp_path, seed):
    for plant in (random.seed, np.random.seed, torch.manual_seed):
        plant(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(seed):  # an odd number of gaussians leaves one in store
        draws(generator)
    path = save(tmp_path, tensors={}, metadata={"rng": rng_state({"sampling": generator})}, step=1)
    expected = draws(generator)
    draws(generator)
    other = torch.Generator()
    set_rng_state(load(path).metadata["rng"], {"sampling": other})
    assert draws(other) == expected
    json.dumps(rng_state(), allow_nan=False)


@pytest.mark.parametrize(
    "key, value",
    [
        ("python", [3, [1, 2], None]),
        ("python", [3, [*[0] * 624, 10**6], None]),
        ("python", None),
        ("numpy", {}),
        ("numpy", []),
        ("torch", "AAAA"),
        ("torch", "not base64"),
        ("torch", ""),
        ("torch", 3),
        ("generators", {}),
        ("generators", {"sampling": "AAAA"}),
        ("generators", 3),
    ],
)
def test_malformed_states_of_generators(key, value):
    generator = torch.Generator()
    state = rng_state({"sampling": generator})
    with pytest.raises(ValueError, match="random number generators"):
        set_rng_state({**state, key: value}, {"sampling": generator})


def test_numpy_position_outside_its_words_is_refused():
    state = rng_state()
    for pos in (-1, 625, 10**9):
        with pytest.raises(ValueError, match=f"pos={pos}"):
            set_rng_state({**state, "numpy": {**state["numpy"], "pos": pos}})


def test_junk_as_torch_state_is_refused():
    state = rng_state()
    junk = room._to_base64(np.full(torch.get_rng_state().numel(), 255, np.uint8))
    with pytest.raises(ValueError, match="random number generators"):
        set_rng_state({**state, "torch": junk})
