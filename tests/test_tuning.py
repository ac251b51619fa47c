"""Fine-tuning: what is frozen costs nothing, patterns, pretrained folders of transformers, adapters that are merged.

Adapters in training need PEFT: tests/slow/test_peft.py.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from strategies import random_model
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from block_recurrent_transformer_pytorch import (  # noqa: E402
    BlockRecurrentTransformer,
    Config,
    checkpoint,
    cross_entropy,
    lora,
    losses,
    pretrained,
)
from block_recurrent_transformer_pytorch.commands import evaluate, generate, train  # noqa: E402
from block_recurrent_transformer_pytorch.flags import PRESETS, model_config, parse  # noqa: E402
from block_recurrent_transformer_pytorch.kernels import unit  # noqa: E402
from block_recurrent_transformer_pytorch.llama import to_llama  # noqa: E402

BYTES = [
    *("--dim", "16", "--depth", "3", "--heads", "2", "--dim-head", "8", "--block", "4", "--segment", "8"),
    *("--states", "3", "--recurrent-layers", "2"),
]
STEPS = [
    *("--preset", "tiny", "--batch", "2", "--steps", "3", "--lr", "0.01", "--warmup", "0", "--valid-every", "3"),
    *("--valid-batches", "1", "--final-batches", "1", "--checkpoint-every", "1", "--sample", "0", "--device", "cpu"),
    *("--precision", "fp32"),
]
LLAMA = {
    "num_tokens": 300, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "kv_heads": 1, "ff_dim": 6, "block_width": 4,
    "max_seq_len": 8, "num_xl_blocks": 2, "recurrent_layers": (), "positions": "rotary", "ff_activation": "swiglu",
    "norm": "rms", "norm_eps": 1e-5, "tokens_qk_norm": "none", "logit_scale": 1.0, "tie_embeddings": True,
}  # fmt: skip


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("In the beginning was the word, and the word was short. " * 40)
    return tmp_path / "text.txt"


@pytest.fixture
def run(tmp_path, text, capsys, monkeypatch):
    """run("name", "--flag", ...) trains into tmp_path/name and returns (status, what it printed)."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(train, "draw_curve", lambda folder: "curve.png")  # takes longer than the run

    def start(name, *flags):
        shared = ["--data", str(text), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / name)]
        status = train.main([*STEPS, *shared, *flags])
        out = capsys.readouterr()
        return status, out.out + out.err

    return start


@pytest.fixture
def llama(tmp_path):
    """The folder of a Llama with a tokenizer of fewer tokens than it has embeddings, as Qwen's are."""
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    to_llama(random_model(Config(**LLAMA)).float(), tmp_path / "llama")
    made = tokenizers.Tokenizer(tokenizers.models.BPE({chr(n): n for n in range(32, 127)}, []))
    made.save(str(tmp_path / "llama" / "tokenizer.json"))
    return tmp_path / "llama"


def saved(folder):
    """Model and optimizer of the last checkpoint."""
    return checkpoint.load_latest(folder / "checkpoints", only=["model", "optimizer"]).tensors


def changed(folder, before):
    """The names of the weights that are others than those `before`."""
    return {name for name, weight in saved(folder)["model"].items() if not torch.equal(weight, before[name])}


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.fixture
def gradients(monkeypatch):
    """The names of the parameters that have a gradient after a backward pass, for each one."""
    seen, whole = [], train.backward

    def backward(run, *rest):
        nats = whole(run, *rest)
        seen.append({name for name, parameter in run.model.named_parameters() if parameter.grad is not None})
        return nats

    monkeypatch.setattr(train, "backward", backward)
    return seen


@pytest.mark.parametrize(
    "flags", [("--freeze", "token_emb.*", "layers.[0-1].*", "norm.*"), ("--train-only", "layers.2.*", "to_logits.*")],
    ids=["freeze", "train-only"],
)  # fmt: skip
def test_what_is_frozen_stays_and_costs_neither_gradient_nor_optimizer(run, tmp_path, gradients, flags):
    run("begin", *BYTES, "--steps", "1", "--lr", "0")
    before = saved(tmp_path / "begin")["model"]
    gradients.clear()
    status, told = run("part", *BYTES, *flags)
    trained = {name for name in before if name.startswith(("layers.2.", "to_logits."))}
    assert status == 0 and changed(tmp_path / "part", before) == trained
    assert gradients == [trained] * 3
    assert {name for name, state in saved(tmp_path / "part")["optimizer"].items() if state} == trained
    assert f"of which {sum(before[name].numel() for name in trained):,} are trained" in told


def test_a_run_that_is_frozen_in_part_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch):
    flags = [*BYTES, "--freeze", "layers.0.*", "--state-dropout", "0.3"]
    run("whole", *flags)
    whole = train.backward

    def interrupted(run, *rest):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", interrupted)
        assert run("cut", *flags)[0] == 128 + signal.SIGINT
    assert train.main(["--resume", str(tmp_path / "cut"), "--device", "cpu"]) == 0
    first, second = (checkpoint.checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


REFUSED = {
    "--freeze layer.*": "--freeze 'layer.*' matches none of the ",
    "--freeze token_emb.* typo": "--freeze 'typo' matches none of the ",
    "--train-only layers.9.*": "--train-only 'layers.9.*' matches none of the ",
    "--freeze *": "--freeze * leaves nothing to be trained",
    "--freeze norm.* --train-only norm.*": "--freeze: --train-only freezes everything else already",
    "--freeze norm.* --lora-rank 2": "--freeze: --lora-rank freezes everything else already",
    "--lora-targets layers.*": "--lora-targets are those of --lora-rank R, which is not given",
    "--lora-rank 2 --lora-targets layers.*.to_kv": "--lora-targets 'layers.*.to_kv' matches none of the ",
    "--lora-rank 0": "--lora-rank: 0 is not at least 1",
    "--recurrent-layers --train-only new": "--train-only new: the model has nothing that a pretrained one has not",
    "--train-only new layers.1.cell.*": "--train-only new trains of layers.1.cell.",
    "--vocabulary 200": "--vocabulary 200 is less than the 256 tokens of the tokenizer",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(run, capsys, flags):
    expected = REFUSED[flags]
    if flags == "--lora-rank 2 --lora-targets layers.*.to_kv":
        flags += " --recurrent-layers"
    try:
        status, text = run("a", *BYTES, *flags.split())
    except SystemExit as end:  # argparse
        status, text = end.code, capsys.readouterr().err
    assert status == 2 and expected in text, text
    assert "which are named like layers." in text or "matches none" not in text


def test_adapters_without_peft_say_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    status, text = run("a", *BYTES, "--lora-rank", "2")
    assert status == 2 and "pip install block-recurrent-transformer-pytorch[peft]" in text


def test_a_dry_run_counts_what_is_frozen(run):
    def memory(*flags):
        _, told = run("a", *BYTES, "--dry-run", *flags)
        lines = dict(line.split(": ", 1) for line in told.splitlines() if ": " in line)
        return [float(lines[f"memory of {name}"].split()[0]) for name in (
            "gradients and optimizer", "activations, in fp32, for 2 rows")], lines["parameters"]  # fmt: skip

    (optimizer, activations), parameters = memory("--dim", "128")
    (less, fewer), told = memory("--dim", "128", "--train-only", "to_logits.*")
    assert less < optimizer / 5 and fewer < activations / 2
    assert "trained" not in parameters and told.endswith(f"of which {128 * 256:,} are trained")


# ----------------------------------------------------------------------------------------------- the loss and its head


class Sizes(TorchDispatchMode):
    """How many tensors of a shape come out of operators that are no views."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (list, tuple)) else [out]
        own = not func.is_view and "detach" not in str(func)
        self.count += own and any(isinstance(one, torch.Tensor) and one.shape in self.shape for one in made)
        return out


@pytest.mark.parametrize("at_once", [2**23, 100])
def test_a_frozen_head_builds_no_gradient_of_its_weight(monkeypatch, at_once):
    """In one chunk, and in several: no tensor of its weight's size, of either layout, is made."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    head = torch.nn.Linear(7, 31, bias=False)
    hidden, targets = torch.randn(3, 5, 7, requires_grad=True), torch.randint(31, (3, 5))
    found = {}
    for frozen in (False, True):
        head.weight.requires_grad_(not frozen)
        head.weight.grad = hidden.grad = None
        with Sizes({(31, 7), (7, 31)}) as sizes:
            cross_entropy(head, hidden, targets, num_tokens=31).backward()
        found[frozen] = (sizes.count, hidden.grad)
        assert (head.weight.grad is None) == frozen
    assert found[True][0] == 0 < found[False][0]
    assert torch.equal(found[True][1], found[False][1])


def test_a_frozen_gain_costs_no_gradient():
    """Of a norm's backward pass, whose product with the gradient is as large as its input."""
    x, gain = torch.randn(4, 8, requires_grad=True), torch.nn.Parameter(torch.randn(8))
    found = {}
    for frozen in (False, True):
        out = unit(x, gain.requires_grad_(not frozen))
        x.grad = None
        with Sizes({(4, 8)}) as sizes:
            out.sum().backward()
        found[frozen] = sizes.count, x.grad
    assert found[True][0] < found[False][0] and torch.equal(found[True][1], found[False][1])


def test_a_loss_in_chunks_of_which_nothing_is_trained(monkeypatch):
    """A frozen model is asked for its loss, and nobody said no_grad."""
    model = BlockRecurrentTransformer(num_tokens=31, dim=8, depth=1, heads=1, dim_head=4, block_width=4, max_seq_len=8)
    tokens = torch.randint(31, (2, 9))
    expected = model(tokens, return_loss=True)[0]
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 100)
    found = model.requires_grad_(False)(tokens, return_loss=True)[0]
    assert not found.requires_grad and torch.allclose(found, expected)


# ------------------------------------------------------------------------------------------ a pretrained model's folder


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_has_a_say_in_a_model_that_is_there(llama, preset):
    options = parse(["--preset", preset, "--init", str(llama)])
    expected = BlockRecurrentTransformer.from_llama(llama, block_width=512, num_xl_blocks=1).config
    assert model_config(options, 95).fingerprint == expected.fingerprint


def test_a_llama_is_taken_with_its_tokenizer_and_can_be_overridden(llama, tmp_path):
    options = parse([*STEPS, "--init", str(llama)])
    assert (options.block, options.segment, options.recurrent_layers, options.vocabulary) == (512, 1024, [], 300)
    assert options.tokenizer == str(llama / "tokenizer.json")
    assert options.set["num_xl_blocks"] == 1 and options.set["extra_memories"] == {"sinks": {"tokens": 4}}
    words = ["--block", "8", "--segment", "16", "--set", "num_xl_blocks=3", "--recurrent-layers", "2"]
    options = parse([*STEPS, "--init", str(llama), *words, "--set", "extra_memories={}"])
    assert (options.block, options.recurrent_layers, options.set["extra_memories"]) == (8, [2], {})
    assert options.set["num_xl_blocks"] == 3 and options.set["ff_activation"] == "swiglu"


WINDOW = ["--block", "4", "--segment", "8"]


def test_a_run_begins_as_the_llama_and_is_read_by_the_other_commands(run, llama, tmp_path, capsys):
    few = ["--steps", "1", "--lr", "0", "--recurrent-layers", "2", "--states", "3"]
    status, told = run("a", "--init", str(llama), *WINDOW, *few)
    assert status == 0 and f"weights: from {llama}" in told and ", but with" not in told
    plain = BlockRecurrentTransformer.from_llama(llama, block_width=4, num_xl_blocks=1)
    model = BlockRecurrentTransformer.from_pretrained(tmp_path / "a")
    tokens = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(tokens)[0], plain(tokens)[0], atol=1e-5)
    assert pretrained.load_tokenizer(tmp_path / "a").content == (llama / "tokenizer.json").read_bytes()
    assert generate.main([str(tmp_path / "a"), "--prompt", "In the", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_run_goes_on_and_is_read_without_the_llama(run, llama, tmp_path, capsys, monkeypatch):
    """Its tokenizer is in its folder."""
    content = (llama / "tokenizer.json").read_bytes()
    run("whole", "--init", str(llama), *WINDOW, "--schedule", "constant")
    run("cut", "--init", str(llama), *WINDOW, "--schedule", "constant", "--steps", "2")
    shutil.rmtree(llama)
    assert train.main(["--resume", str(tmp_path / "cut"), "--device", "cpu", "--steps", "3"]) == 0
    assert not changed(tmp_path / "cut", saved(tmp_path / "whole")["model"])
    assert pretrained.load_tokenizer(tmp_path / "cut").content == content
    assert evaluate.main([str(tmp_path / "cut"), "--device", "cpu"]) == 0
    options = parse([*STEPS, "--init", str(tmp_path / "cut")])
    assert options.tokenizer == str(tmp_path / "cut" / "tokenizer.json") and options.vocabulary == 300


def test_a_llama_of_half_precision_is_trained_in_fp32(run, llama, tmp_path):
    model = BlockRecurrentTransformer.from_llama(llama, block_width=4, num_xl_blocks=1, dtype=torch.bfloat16)
    to_llama(model, llama)
    assert run("a", "--init", str(llama), *WINDOW)[0] == 0
    assert saved(tmp_path / "a")["model"]["token_emb.weight"].dtype == torch.float32


def test_only_what_is_new_is_trained(run, llama, tmp_path):
    """Not one bit of the pretrained part of a map that is part new moves, whatever the weight decay."""
    flags = ["--init", str(llama), *WINDOW, "--recurrent-layers", "2", "--states", "3", "--weight-decay", "0.5"]
    run("begin", *flags, "--steps", "1", "--lr", "0")
    before = saved(tmp_path / "begin")["model"]
    status, told = run("a", *flags, "--train-only", "new")
    after = saved(tmp_path / "a")["model"]
    assert status == 0 and "are trained" in told
    moved = changed(tmp_path / "a", before)
    parts = ("layers.1.cell.", "layers.1.read_norm.", "layers.1.to_qkv.", "layers.1.to_out.")
    assert moved and all(name.startswith(parts) for name in moved)
    own, now = before["layers.1.to_qkv.weight"], after["layers.1.to_qkv.weight"]
    assert torch.equal(own[:8], now[:8]) and not torch.equal(own[8:16], now[8:16]) and torch.equal(own[16:], now[16:])
    own, now = before["layers.1.to_out.weight"], after["layers.1.to_out.weight"]
    assert torch.equal(own[:, :8], now[:, :8]) and not torch.equal(own[:, 8:], now[:, 8:])


def test_folders_that_are_refused(run, llama, tmp_path, capsys):
    def refused(*flags):
        try:
            status, text = run("a", "--init", str(llama), *WINDOW, *flags)
        except SystemExit as end:
            status, text = end.code, capsys.readouterr().err
        assert status == 2
        return text

    assert "its weights do not fit, this model has ff_dim=7 instead of 6" in refused("--set", "ff_dim=7")
    content = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(content | {"model_type": "mistral", "use_sliding_window": True,
                                                             "sliding_window": 6}))  # fmt: skip
    assert "sliding_window=6 is less than the 8 tokens" in refused()
    (llama / "config.json").write_text(json.dumps(content | {"model_type": "gpt2"}))
    assert "model_type 'gpt2' is not one of" in refused()
    (llama / "config.json").write_text(json.dumps(content))
    (llama / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused()


def test_a_llama_reads_a_book_and_is_asked(llama, text, tmp_path, capsys):
    """Directly, and saved with its tokenizer: the same answers; the memory is bound to the window."""
    window = ["--block", "4", "--xl-blocks", "2", "--sinks", "2"]
    ask = ["--prompt", "And", "--max-new-tokens", "9", "--temperature", "0", "--device", "cpu", "--file", str(text)]

    def answer(folder, *flags, status=0):
        assert generate.main([str(folder), *ask, *flags]) == status
        return capsys.readouterr()

    book = ["--memory", str(tmp_path / "book.safetensors")]
    told = answer(llama, *window, *book)
    assert told.out.strip() and "token/s" in told.err  # the progress bar
    model = BlockRecurrentTransformer.from_llama(llama, block_width=4, num_xl_blocks=2, sink_tokens=2)
    tokenizer = pretrained.load_tokenizer(llama)
    model.save_pretrained(tmp_path / "saved", tokenizer=tokenizer)
    assert answer(tmp_path / "saved").out == told.out != answer(llama).out
    tokens = torch.from_numpy(tokenizer.encode(text.read_bytes() + b"And"))[None]
    assert tokenizer.decode(model.generate(tokens, max_new_tokens=9, temperature=0)[0].tolist()) == told.out.strip()
    assert "block_width" in answer(llama, *book, "--block", "8", status=2).err
    told = answer(tmp_path / "saved", "--sinks", "2", status=2)
    assert "is no Llama's folder: its model has a sink_tokens of its own" in told.err


# ----------------------------------------------------------------------------------------------- adapters that are read


def test_adapters_are_merged(tmp_path):
    weight, down, up = torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 2)
    weights = {
        "a.base_layer.weight": weight.clone(), "a.base_layer.bias": torch.ones(5), "a.lora_A.default.weight": down,
        "a.lora_B.default.weight": up, "b.weight": torch.ones(2),
    }  # fmt: skip
    incomplete = dict(weights)
    lora.merge(weights)
    assert sorted(weights) == ["a.bias", "a.weight", "b.weight"]
    assert torch.allclose(weights["a.weight"], weight + lora.ALPHA / 2 * up @ down)
    del incomplete["a.lora_B.default.weight"]
    with pytest.raises(ValueError, match="the adapter of a cannot be merged"):
        lora.merge(incomplete)
