"""What users build on: names, defaults, the calls of 0.4.4, and models that are copied, moved, saved and cast."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import re
import subprocess
import sys
from dataclasses import MISSING, FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest
import torch
from oracle import assert_same
from strategies import VOCABULARY, random_model, random_stream
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import block_recurrent_transformer_pytorch as package
from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Config,
    Memories,
    RecurrentTrainerWrapper,
    States,
)
from block_recurrent_transformer_pytorch.paper import OPTIONS as PAPER

BASE = {
    "num_tokens": VOCABULARY, "dim": 8, "depth": 2, "dim_head": 4, "heads": 2, "block_width": 4, "max_seq_len": 8,
    "num_state_vectors": 3,
}  # fmt: skip
PAPER_LIKE = {
    **PAPER, "qk_norm": "head", "all_layers_qk_rmsnorm": True, "kv_heads": 2, "block_feedback": True, "gate": "lstm",
    "state_update": "dual",
}  # fmt: skip
LOADED = {
    "recurrent_layers": (1, 2), "read_recurrent_layers": (1, 1), "use_compressed_mem": True, "gate": "full",
    "all_layers_qk_rmsnorm": True, "positions": "dynamic", "state_update": "single", "kv_heads": 2,
}  # fmt: skip
CONFIGS = {"default": {}, "paper": PAPER_LIKE, "loaded": LOADED}
every_config = pytest.mark.parametrize("name", CONFIGS)


def config_of(name: str, **options: Any) -> Config:
    return Config(**{**BASE, **CONFIGS[name], **options})


def tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def same(one: Any, other: Any) -> bool:
    """Bitwise, types and structure included."""
    a, b = tree_leaves(one), tree_leaves(other)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b)
    )


def run(model: BlockRecurrentTransformer) -> Any:
    """Two calls, the second one within a block."""
    with torch.no_grad():
        _, memories, states = model(random_stream(2, 10))
        return model(random_stream(2, 7, seed=1), xl_memories=memories, states=states)


# ---------------------------------------------------------------------------------------------------------------- names


def test_all_names_are_there():
    assert set(package.__all__) >= {
        "BlockRecurrentTransformer", "Config", "KV", "LayerMemory", "Memories", "RecurrentTrainWrapper",
        "RecurrentTrainerWrapper", "States", "detach", "forget_rows", "select_rows",
    }  # fmt: skip
    assert all(hasattr(package, name) for name in package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", package.__version__)


def test_star_import_gives_them():
    names: dict[str, Any] = {}
    exec("from block_recurrent_transformer_pytorch import *", names)
    assert set(package.__all__) <= names.keys()


def test_the_core_imports_little():
    """Neither extras nor what only checkpoints, data and plots need."""
    script = (
        "import sys, block_recurrent_transformer_pytorch\n"
        "extras = {'safetensors', 'transformers', 'matplotlib', 'tokenizers', 'pandas', 'hypothesis', 'pytest'}\n"
        "print(sorted(extras & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------------- calls of 0.4.4

ARGUMENTS_OF_0_4_4 = {
    "num_tokens": None, "dim": None, "depth": None, "dim_head": 64, "heads": 8, "all_layers_qk_rmsnorm": False,
    "ff_mult": 4, "max_seq_len": 1024, "block_width": 512, "recurrent_layers": None, "read_recurrent_layers": None,
    "num_state_vectors": None, "ignore_index": -100, "use_flash_attn": False, "use_compressed_mem": False,
    "compressed_mem_factor": 4,
}  # fmt: skip


def test_constructor_arguments_of_0_4_4_and_their_defaults():
    ours = {field.name: field.default for field in fields(Config)}
    required = [f.name for f in fields(Config) if f.default is MISSING and f.default_factory is MISSING]
    assert required == ["num_tokens", "dim", "depth"]
    for name, default in ARGUMENTS_OF_0_4_4.items():
        assert name in ours
        assert name in required or ours[name] == default, name


def test_defaults_that_follow_from_others():
    config = Config(num_tokens=256, dim=96, depth=6)
    assert config.recurrent_layers == config.read_recurrent_layers == (3,)
    assert config.num_state_vectors == config.block_width == 512
    assert config.ff_dim == int(96 * 4 * 2 / 3)
    assert Config(num_tokens=256, dim=96, depth=1).recurrent_layers == (1,)
    assert Config(num_tokens=256, dim=96, depth=7).recurrent_layers == (3,)


def test_every_argument_of_0_4_4_at_once():
    model = BlockRecurrentTransformer(
        num_tokens=32, dim=16, depth=4, dim_head=8, heads=2, all_layers_qk_rmsnorm=True, ff_mult=2, max_seq_len=16,
        block_width=8, recurrent_layers=(2, 4), read_recurrent_layers=(1, 3), num_state_vectors=5, ignore_index=-1,
        use_flash_attn=True, use_compressed_mem=True, compressed_mem_factor=2,
    )  # fmt: skip
    logits, _, _ = model(torch.randint(32, (2, 16)))
    assert logits.shape == (2, 16, 32)


def documented_example(num_tokens: int, n: int, **options: Any) -> None:
    """The first code block of the README of 0.4.4."""
    model = BlockRecurrentTransformer(
        num_tokens=num_tokens, depth=6, dim_head=64, heads=8, recurrent_layers=(4,), use_compressed_mem=False,
        compressed_mem_factor=4, use_flash_attn=True, **options,
    )  # fmt: skip
    seq = torch.randint(0, num_tokens // 10, (1, n))
    out, mems1, states1 = model(seq)
    assert out.shape == (1, n, num_tokens)
    out, mems2, states2 = model(seq, xl_memories=mems1, states=states1)
    out, mems3, states3 = model(seq, xl_memories=mems2, states=states2)
    assert out.shape == (1, n, num_tokens)
    assert not same(mems2, mems3) and not same(states2, states3)


def test_documented_example_small():
    documented_example(200, 32, dim=32, max_seq_len=32, block_width=16, num_state_vectors=16)


@pytest.mark.slow
def test_documented_example():
    documented_example(20000, 1024, dim=512, max_seq_len=1024, block_width=512, num_state_vectors=512)


def test_training_example_of_0_4_4():
    """Its wrapper, its loss and its sample, as its train.py uses them."""
    model = BlockRecurrentTransformer(**BASE)
    wrapper = RecurrentTrainerWrapper(model, xl_memories_dropout=0.1, state_dropout=0.1)
    wrapper.train()
    loss = wrapper(random_stream(2, 33))
    loss.backward()
    assert loss.item() > 0
    wrapper.eval()
    sample = wrapper.generate(random_stream(1, 8), length=40)
    assert sample.shape == (1, 32)


def test_arguments_of_forward_are_keywords():
    """Except for the tokens: a call of 0.4.4 by position is refused, not misunderstood."""
    names = list(inspect.signature(BlockRecurrentTransformer.forward).parameters.values())[2:]
    assert all(name.kind is inspect.Parameter.KEYWORD_ONLY for name in names)
    with pytest.raises(TypeError):
        BlockRecurrentTransformer(**BASE)(random_stream(1, 4), True)


# -------------------------------------------------------------------------------------------------- names of parameters

FEED_FORWARD = ["feed_forward.norm.weight", "feed_forward.hidden.to_hidden.weight", "feed_forward.to_out.weight"]
CELL = ["cell.initial", "cell.ids", "cell.norm.weight", "cell.to_kv.weight", "cell.to_q.weight"]  # fmt: skip

NAMES: dict[str, list[str]] = {
    "default": [
        "token_emb.weight",
        *[f"layers.0.{name}" for name in (
            "norm.weight", "to_qkv.weight", "heads_norm.q_scale", "heads_norm.k_scale",
            "read_norm.0.q_scale", "read_norm.0.k_scale", "to_out.weight", *FEED_FORWARD, *CELL,
            "cell.self_norm.q_scale", "cell.self_norm.k_scale", "cell.cross_norm.q_scale", "cell.cross_norm.k_scale",
            "cell.update.to_candidate.weight", "cell.update.to_candidate.bias", "cell.update.gate.keep",
        )],
        *[f"layers.1.{name}" for name in (
            "norm.weight", "to_qkv.weight", "to_out.weight", *FEED_FORWARD,
        )],
        "norm.weight",
        "to_logits.weight",
    ],
    "paper": [
        "token_emb.weight",
        *[f"layers.0.{name}" for name in (
            "norm.weight", "to_qkv.weight", "heads_norm.head_scale", "position_bias.table",
            "read_norm.0.head_scale", "to_out.weight", *FEED_FORWARD, *CELL,
            "cell.self_norm.head_scale", "cell.cross_norm.head_scale",
            "cell.update.attention.to_candidate.weight",
            "cell.update.attention.gate.to_forget.weight", "cell.update.attention.gate.to_forget.bias",
            "cell.update.attention.gate.to_input.weight", "cell.update.attention.gate.to_input.bias",
            "cell.update.norm.weight", "cell.update.hidden.to_hidden.weight", "cell.update.to_candidate.weight",
            "cell.update.gate.to_forget.weight", "cell.update.gate.to_forget.bias",
            "cell.update.gate.to_input.weight", "cell.update.gate.to_input.bias",
        )],
        *[f"layers.1.{name}" for name in (
            "norm.weight", "to_qkv.weight", "heads_norm.head_scale", "position_bias.table",
            "read_norm.0.head_scale", "to_out.weight", *FEED_FORWARD,
        )],
        "norm.weight",
    ],
    "loaded": [
        "token_emb.weight",
        *[f"layers.{layer}.{name}" for layer in (0, 1) for name in (
            "norm.weight", "to_qkv.weight", "heads_norm.q_scale", "heads_norm.k_scale",
            "position_bias.to_hidden.weight", "position_bias.to_hidden.bias", "position_bias.mlp.1.weight",
            "position_bias.mlp.1.bias", "position_bias.mlp.3.weight", "position_bias.mlp.3.bias",
            *(["read_norm.0.q_scale", "read_norm.0.k_scale",
               "read_norm.1.q_scale", "read_norm.1.k_scale"] if layer == 0 else []),
            "to_out.weight", *FEED_FORWARD, "compressor.conv.weight", "compressor.conv.bias", *CELL,
            "cell.self_norm.q_scale", "cell.self_norm.k_scale", "cell.cross_norm.q_scale", "cell.cross_norm.k_scale",
            "cell.update.hidden.to_hidden.weight", "cell.update.to_candidate.weight", "cell.update.to_candidate.bias",
            "cell.update.gate.to_keep.weight", "cell.update.gate.to_keep.bias",
        )],
        "norm.weight",
        "to_logits.weight",
    ],
}  # fmt: skip


@every_config
def test_names_of_parameters_are_frozen(name):
    """Files of weights hold them. Order included: optimizers number parameters by it."""
    model = BlockRecurrentTransformer(config_of(name))
    assert list(model.state_dict()) == NAMES[name]
    assert [name for name, _ in model.named_parameters()] == NAMES[name]  # and no buffer is saved


def test_fields_of_carried_values_are_frozen():
    assert Memories._fields == ("layers", "position")
    assert package.Position._fields == ("offset", "full_blocks", "extra_blocks", "known")
    assert States._fields == ("layers", "kv")
    assert package.LayerMemory._fields == ("block", "past", "ready")
    model = BlockRecurrentTransformer(num_tokens=4, dim=8, depth=1, use_compressed_mem=True)
    assert list(model.init_memories(1).layers[0].past) == ["xl", "compressed"]
    assert package.KV._fields == ("k", "v")


# -------------------------------------------------------------------------------------------------------------- configs


@every_config
def test_a_config_goes_through_json(name):
    config = config_of(name)
    again = Config.from_dict(json.loads(json.dumps(asdict(config))))
    assert again == config
    assert again.fingerprint == config.fingerprint
    assert list(BlockRecurrentTransformer(again).state_dict()) == NAMES[name]


def test_a_config_is_frozen_and_hashable():
    config = config_of("default")
    with pytest.raises(FrozenInstanceError):
        config.dim = 9
    assert hash(config) == hash(config_of("default"))
    assert replace(config, ff_dropout=0.5) != config


def test_fingerprints_tell_what_memories_fit():
    """Not what only training or speed depends on."""
    config = config_of("default")
    free = {"max_seq_len": 12, "ignore_index": 0, "use_flash_attn": True, "use_checkpointing": True, "init": "lecun"}
    for name, value in {**free, "ff_dropout": 0.1, "attn_dropout": 0.1}.items():
        assert replace(config, **{name: value}).fingerprint == config.fingerprint, name
    told = {
        "dim": 16, "depth": 3, "heads": 4, "num_xl_blocks": 2, "positions": "none", "gate": "lstm", "norm": "rms",
        "recurrent_layers": (2,), "qk_norm_scale": 4.0, "num_tokens": 12, "empty_memory": "zeros",
    }  # fmt: skip
    others = {Config(**{**BASE, name: value}).fingerprint for name, value in told.items()}
    assert len(others | {config.fingerprint}) == len(told) + 1


def test_a_model_from_a_config_or_from_keywords():
    torch.manual_seed(0)
    one = BlockRecurrentTransformer(config_of("loaded"))
    torch.manual_seed(0)
    other = BlockRecurrentTransformer(**{**BASE, **LOADED})
    assert one.config == other.config
    assert same(one.state_dict(), other.state_dict())


# ------------------------------------------------------------------------------------------------- copied, moved, saved


@every_config
def test_deepcopy(name):
    model = random_model(config_of(name))
    twin = copy.deepcopy(model)
    assert same(run(model), run(twin))
    with torch.no_grad():
        twin.token_emb.weight.add_(1)
    assert not same(run(model), run(twin))


@every_config
def test_pickled_models_and_state_dicts(name):
    model = random_model(config_of(name))
    assert same(run(pickle.loads(pickle.dumps(model))), run(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = BlockRecurrentTransformer(model.config).double().eval()
    assert not same(run(other), run(model))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(run(other), run(model))


@every_config
@pytest.mark.parametrize("make", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copied_memories_and_states(name, make):
    model = random_model(config_of(name))
    with torch.no_grad():
        for lengths in (None, torch.tensor([10, 3])):
            _, memories, states = model(random_stream(2, 10), lengths=lengths)
            copied = make((memories, states))
            assert same(copied, (memories, states))
            assert type(copied[0]) is Memories and type(copied[1]) is States
            x = random_stream(2, 7, seed=1)
            again = model(x, xl_memories=copied[0], states=copied[1])
            assert same(again, model(x, xl_memories=memories, states=states))


@every_config
def test_memories_and_states_are_pytrees(name):
    model = random_model(config_of(name))
    _, memories, states = model(random_stream(2, 10))
    copied = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (memories, states))
    assert type(copied[0]) is Memories and type(copied[1]) is States
    assert same(copied, (memories, states))
    assert all(tensor.requires_grad is False for tensor in tensors(package.detach(memories), package.detach(states)))


@every_config
def test_made_on_the_meta_device(name):
    model = random_model(config_of(name)).float()
    with torch.device("meta"):
        other = BlockRecurrentTransformer(model.config)
    assert all(tensor.is_meta for tensor in [*other.parameters(), *other.buffers()])
    other = other.to_empty(device="cpu").eval()
    other.load_state_dict(model.state_dict())
    assert same(run(other), run(model))


@pytest.mark.parametrize("name", ["default", "paper", "loaded"])
def test_weights_assigned_to_a_model_on_the_meta_device(name):
    """`load_state_dict(assign=True)`: the tables of positions are in no state dict."""
    model = random_model(config_of(name)).float()
    with torch.device("meta"):
        other = BlockRecurrentTransformer(model.config).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    assert same(run(other), run(model))


def test_shapes_on_the_meta_device():
    with torch.device("meta"):
        model = BlockRecurrentTransformer(config_of("default"))
        x = torch.zeros(2, 10, dtype=torch.long)
    logits, memories, states = model(x)
    logits, memories, states = model(x, xl_memories=memories, states=states)
    assert logits.is_meta and logits.shape == (2, 10, VOCABULARY)
    assert all(tensor.is_meta for tensor in tensors(memories, states))


# ---------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("moves", "dtype"),
    [
        ([torch.float32], torch.float32),
        ([torch.bfloat16], torch.float32),
        ([torch.float16], torch.float32),
        ([torch.float64], torch.float64),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float64], torch.float64),
        ([torch.float64, torch.bfloat16], torch.float32),
    ],
)
def test_tables_of_positions_are_exact_after_any_cast(moves, dtype):
    """They are made anew for each type, and never in less than fp32."""
    model = BlockRecurrentTransformer(config_of("default", block_width=300, max_seq_len=300))
    for move in moves:
        model = model.to(move)
    assert model.rotary.tables.dtype == dtype
    assert model.token_emb.weight.dtype == moves[-1]
    exact = BlockRecurrentTransformer(config_of("default", block_width=300, max_seq_len=300)).double().rotary.tables
    assert_same(model.rotary.tables.double(), exact, 1e-12 if dtype == torch.float64 else 1e-6)


@every_config
def test_casting_there_and_back(name):
    """Weights that bf16 holds come back, and the numbers with them."""
    model = random_model(config_of(name)).bfloat16().float()
    wanted = run(model)
    assert same(run(model.double().bfloat16().float()), wanted)


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_types_of_what_comes_out(name, dtype):
    logits, memories, states = run(random_model(config_of(name)).to(dtype))
    assert logits.dtype == dtype
    assert all(tensor.dtype == dtype for tensor in tensors(memories))
    assert all(state.dtype == torch.promote_types(dtype, torch.float32) for state in states.layers)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(logits, memories, states))


def test_submodules_are_modules_of_their_own():
    """No module keeps a tensor from a call: only parameters and the tables of positions are there afterwards."""
    model = random_model(config_of("loaded"))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    run(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    for module in model.modules():
        assert not any(
            isinstance(value, Tensor) and not isinstance(value, nn.Parameter) for value in vars(module).values()
        )
