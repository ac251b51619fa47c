"""A model as a folder: written, read, refused; and the folder of a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import test_extending as extending
import torch
from safetensors.torch import load_file, save_file
from strategies import VOCABULARY, random_model, random_stream
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, checkpoint, pretrained
from block_recurrent_transformer_pytorch.data import ByteTokenizer, FileTokenizer

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {
    "num_tokens": VOCABULARY, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "max_seq_len": 8,
    "block_width": 4, "recurrent_layers": (2,), "num_state_vectors": 2,
}  # fmt: skip
MODEL = random_model(Config(**OPTIONS))


def plain(config: Config) -> dict:
    """The options of a config as a JSON file has them."""
    return json.loads(json.dumps(asdict(config)))


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"use_compressed_mem": True}, {"positions": "t5"}])
@pytest.mark.parametrize("max_shard_size", [10**9, 2000, 1])
def test_a_model_comes_back(options, max_shard_size, tmp_path):
    model = random_model(Config(**OPTIONS, **options))
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    loaded = BlockRecurrentTransformer.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config and not loaded.training
    same_weights(loaded, model)
    x = random_stream(2, 11)
    with torch.no_grad():
        assert torch.equal(loaded(x)[0], model(x)[0])
    loaded(x, return_loss=True)[0].backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters() if parameter.requires_grad)


def test_gates_and_memories_of_ones_own(tmp_path):
    options = {"gate": "test_hard", "gate_options": {"slope": 2.0}}
    model = random_model(Config(**extending.SIZES, **extending.EXTRA, **options))
    model.save_pretrained(tmp_path)
    loaded = BlockRecurrentTransformer.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.config.fingerprint == model.config.fingerprint
    same_weights(loaded, model)


def test_the_layout_is_that_of_transformers(tmp_path):
    MODEL.save_pretrained(tmp_path, tokenizer=ByteTokenizerOf11())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["format"] == 1 and content["tokenizer"] == "bytes"
    assert {name: content[name] for name in asdict(MODEL.config)} == plain(MODEL.config)
    MODEL.save_pretrained(tmp_path, max_shard_size=3000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("model*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in MODEL.state_dict().values())
    for file in files:
        tensors = load_file(tmp_path / file)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 3000
        assert all(index["weight_map"][name] == file for name in tensors)


class ByteTokenizerOf11(ByteTokenizer):
    num_tokens = VOCABULARY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_another_type(dtype, tmp_path):
    MODEL.save_pretrained(tmp_path)
    loaded = BlockRecurrentTransformer.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.token_emb.weight, MODEL.token_emb.weight.to(dtype))
    loaded(random_stream(2, 9))


def test_on_a_device(tmp_path):
    MODEL.save_pretrained(tmp_path)
    config, weights = pretrained.load_weights(tmp_path, device="meta")
    assert config == MODEL.config
    assert all(weight.is_meta for weight in weights.values())


def test_the_loaded_tensors_become_the_parameters(monkeypatch):
    """Not copies of them; and those of a state dict that a user gives stay the user's."""
    weights = {name: value.clone() for name, value in MODEL.state_dict().items()}
    taken = BlockRecurrentTransformer.from_weights(MODEL.config, weights, take=True)
    copied = BlockRecurrentTransformer.from_weights(MODEL.config, weights)
    for name, parameter in taken.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr()
    assert all(value.data_ptr() != weights[name].data_ptr() for name, value in copied.named_parameters())


GROWTH = """
import re, sys, torch
from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

BlockRecurrentTransformer.from_pretrained(sys.argv[1])
before = most()
model = BlockRecurrentTransformer.from_pretrained(sys.argv[2])
print((most() - before) / sum(value.nbytes for value in model.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures on Linux")
@pytest.mark.parametrize("kind", ["one file", "shards", "run"])
def test_weights_are_not_in_memory_twice(kind, tmp_path):
    """The peak of a process grows by their size (50 MB), and little more."""
    MODEL.save_pretrained(tmp_path / "small")
    config = Config(num_tokens=256, dim=512, depth=4, max_seq_len=512, num_state_vectors=8)
    with torch.device("meta"):
        model = BlockRecurrentTransformer(config)
    model = model.to_empty(device="cpu")
    if kind == "run":
        metadata = {"model_config": plain(config)}
        folder = tmp_path / "large" / "checkpoints"
        checkpoint.save(folder, tensors={"model": model.state_dict()}, metadata=metadata, step=1, metric=1.0)
    else:
        model.save_pretrained(tmp_path / "large", max_shard_size=10**9 if kind == "one file" else 10**7)
    command = [sys.executable, "-c", GROWTH, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert 0.9 < float(done.stdout) < 1.3


def test_saving_again_replaces_all_of_it(tmp_path):
    MODEL.save_pretrained(tmp_path, max_shard_size=1)
    other = random_model(Config(**{**OPTIONS, "depth": 2, "recurrent_layers": (1,)}))
    other.save_pretrained(tmp_path)
    same_weights(BlockRecurrentTransformer.from_pretrained(tmp_path), other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_that_was_not_finished_is_none(tmp_path, monkeypatch):
    MODEL.save_pretrained(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "write_tensors", full)
    with pytest.raises(OSError, match="space"):
        MODEL.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        BlockRecurrentTransformer.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------- tokenizers


def test_bytes(tmp_path):
    model = BlockRecurrentTransformer(**{**OPTIONS, "num_tokens": 256})
    model.save_pretrained(tmp_path, tokenizer=ByteTokenizer())
    assert isinstance(pretrained.load_tokenizer(tmp_path), ByteTokenizer)


def file_tokenizer(folder: Path) -> FileTokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "to", "be", "or", "not"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "made.json"))
    return FileTokenizer(folder / "made.json")


def test_a_tokenizer_file_is_kept_as_it_was(tmp_path):
    tokenizer = file_tokenizer(tmp_path)
    MODEL.save_pretrained(tmp_path / "saved", tokenizer=tokenizer)
    (tmp_path / "made.json").unlink()
    again = pretrained.load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(b"to be or not").tolist() == [1, 2, 3, 4]


def test_no_tokenizer(tmp_path):
    MODEL.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without a tokenizer"):
        pretrained.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"256 tokens, the model num_tokens=11"):
        MODEL.save_pretrained(tmp_path, tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="not object"):
        MODEL.save_pretrained(tmp_path, tokenizer=type("object", (), {"num_tokens": 3})())


# --------------------------------------------------------------------------------------------------------------- strict


def changed(folder: Path, name: str, value: Tensor | None) -> None:
    """The weights of a folder with one of them otherwise, or left out."""
    weights = load_file(folder / "model.safetensors")
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    save_file(weights, folder / "model.safetensors")


def config_with(folder: Path, **options: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


WRONG = {
    "missing": (lambda f: changed(f, "norm.weight", None), ["norm.weight"]),
    "left over": (lambda f: changed(f, "adapter.weight", torch.zeros(3)), ["adapter.weight"]),
    "no embedding": (lambda f: changed(f, "token_emb.weight", None), ["token_emb.weight"]),
    "shape": (lambda f: changed(f, "norm.weight", torch.zeros(9)), ["norm.weight", "(9,)", "(8,)"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "not weights": (lambda f: (f / "model.safetensors").write_text("pickle"), ["model.safetensors"]),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
    "a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json"]),
    "later format": (lambda f: config_with(f, format=2), ["config.json", "format 2"]),
    "another model": (lambda f: config_with(f, model_type="llama"), ["llama"]),
    "unknown option": (lambda f: config_with(f, dimm=8), ["config.json", "dimm"]),
    "too deep": (lambda f: config_with(f, depth=10**6), ["config.json", "depth=1000000"]),
    "a word for a number": (lambda f: config_with(f, dim="eight"), ["config.json", "eight"]),
    "out of range": (lambda f: config_with(f, heads=0), ["config.json", "heads", "0"]),
    "no folder": (lambda f: shutil.rmtree(f), ["is no folder"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_as_it_was_written_is_refused(name, tmp_path):
    MODEL.save_pretrained(tmp_path / "saved")
    change, words = WRONG[name]
    change(tmp_path / "saved")
    with pytest.raises(ValueError) as caught:
        BlockRecurrentTransformer.from_pretrained(tmp_path / "saved")
    missing = [word for word in [*words, str(tmp_path / "saved")] if word not in str(caught.value)]
    assert not missing, caught.value


def shards_with(folder: Path, change: dict[str, str]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= change
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


WRONG_SHARDS = {
    "a file is missing": (lambda f: next(f.glob("model-00002*")).unlink(), "model-00002"),
    "a name is missing": (lambda f: shards_with(f, {"more": min(f.glob("model-*")).name}), "['more']"),
    "a file elsewhere": (lambda f: shards_with(f, {"norm.weight": "../other.safetensors"}), "weight_map"),
}


@pytest.mark.parametrize("name", WRONG_SHARDS)
def test_shards_that_do_not_fit_are_refused(name, tmp_path):
    MODEL.save_pretrained(tmp_path, max_shard_size=3000)
    change, word = WRONG_SHARDS[name]
    change(tmp_path)
    with pytest.raises(ValueError) as caught:
        BlockRecurrentTransformer.from_pretrained(tmp_path)
    assert word in str(caught.value)


def test_arguments(tmp_path):
    MODEL.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="checkpoint='first'"):
        BlockRecurrentTransformer.from_pretrained(tmp_path, checkpoint="first")
    with pytest.raises(ValueError, match="checkpoint='last'"):
        BlockRecurrentTransformer.from_pretrained(tmp_path, checkpoint="last")
    with pytest.raises(ValueError, match="max_shard_size=0"):
        MODEL.save_pretrained(tmp_path, max_shard_size=0)


# ---------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def run(tmp_path):
    """A folder as train.py leaves it: the checkpoint with the lowest loss is not the last one."""
    options = {**OPTIONS, "num_tokens": 256}
    for step, metric in ((2, 1.5), (4, 2.5)):
        tensors = {"model": random_model(Config(**options), seed=step).state_dict(), "optimizer": {"step": step}}
        metadata = {"model_config": plain(Config(**options))}
        checkpoint.save(tmp_path / "run/checkpoints", tensors=tensors, metadata=metadata, step=step, metric=metric)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"options": {"dim": 8, "tokenizer": None}}))
    return tmp_path / "run"


def test_the_best_and_the_last_checkpoint_of_a_run(run):
    for which, step in (("best", 2), ("last", 4)):
        model = BlockRecurrentTransformer.from_pretrained(run, checkpoint=which)
        same_weights(model, random_model(model.config, seed=step))
    same_weights(BlockRecurrentTransformer.from_pretrained(run), random_model(model.config, seed=2))
    assert isinstance(pretrained.load_tokenizer(run), ByteTokenizer)


def test_a_run_of_train(tmp_path):
    """Its model, as evaluate.py loads it, and its tokenizer."""
    from block_recurrent_transformer_pytorch.commands import evaluate, train

    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    flags = [
        *("--preset", "tiny", "--steps", "4", "--valid-every", "2", "--checkpoint-every", "2", "--final-batches", "1"),
        *("--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")),
        *("--sample", "0", "--threads", "1", "--device", "cpu"),
    ]
    assert train.main(flags) == 0
    for which in ("best", "last"):
        model = BlockRecurrentTransformer.from_pretrained(tmp_path / "run", checkpoint=which)
        same_weights(model, evaluate.load_model(tmp_path / "run", which, "cpu"))
    assert isinstance(pretrained.load_tokenizer(tmp_path / "run"), ByteTokenizer)


def test_from_a_run_to_a_saved_model(run, tmp_path):
    model = BlockRecurrentTransformer.from_pretrained(run)
    model.save_pretrained(tmp_path / "saved", tokenizer=pretrained.load_tokenizer(run))
    same_weights(BlockRecurrentTransformer.from_pretrained(tmp_path / "saved"), model)
    with pytest.raises(ValueError, match="folder of a run"):
        model.save_pretrained(run)


def test_runs_that_cannot_be_read(run, tmp_path):
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(path)
    for which, words in (("best", "'last' needs no loss"), ("last", "no checkpoint in")):
        with pytest.raises(ValueError, match=words):
            BlockRecurrentTransformer.from_pretrained(tmp_path / "run", checkpoint=which)
    checkpoint.save(
        tmp_path / "run" / "checkpoints", tensors={"model": {}}, metadata={"model_config": 3}, step=1, metric=1.0
    )
    with pytest.raises(ValueError, match="holds no config of a model"):
        BlockRecurrentTransformer.from_pretrained(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="says nothing of a tokenizer"):
        pretrained.load_tokenizer(tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over_with_a_word(run):
    newest = checkpoint.checkpoints(run / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=newest.name):
        BlockRecurrentTransformer.from_pretrained(run, checkpoint="last")
