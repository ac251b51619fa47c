"""Low precision where it is harmless, and what attention is given: types, masks, and the same numbers by either way."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from strategies import random_model
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config
from block_recurrent_transformer_pytorch import block_recurrent_transformer_pytorch as module
from block_recurrent_transformer_pytorch.paper import OPTIONS as PAPER

BASE = {
    "num_tokens": 64, "dim": 64, "depth": 3, "dim_head": 32, "heads": 4, "block_width": 16, "max_seq_len": 32,
    "num_state_vectors": 5, "recurrent_layers": (2,), "use_flash_attn": True,
}  # fmt: skip
PAPER_LIKE = {**PAPER, "qk_norm": "head", "all_layers_qk_rmsnorm": True, "kv_heads": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "qk norm in all layers": {"all_layers_qk_rmsnorm": True, "kv_heads": 2},
    "compressed": {"use_compressed_mem": True},
    "paper": {**PAPER_LIKE, "gate": "lstm", "state_update": "single"},
    "feedback": {**PAPER_LIKE, "block_feedback": True},
    "dual": {"state_update": "dual", "gate": "full"},
    "enhanced": {"enhanced_recurrence": True, "num_xl_blocks": 2},
    "read below write": {"recurrent_layers": (3,), "read_recurrent_layers": (1,)},
    "sliding": {"attention_window": "sliding"},
    "dynamic, no norm": {"positions": "dynamic", "qk_norm": "none"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def small_model(variant: str, **options: Any) -> BlockRecurrentTransformer:
    """In fp32, with weights that bf16 holds, none at its initial value. (A random model in ten has states that rounding
    changes by 2 to 4 %: that of seed 0 with a dual update.)"""
    torch.manual_seed(1)
    model = BlockRecurrentTransformer(**{**BASE, **VARIANTS[variant], **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.bfloat16().float()


def stream(batch: int, n: int) -> Tensor:
    return torch.randint(64, (batch, n), generator=torch.Generator().manual_seed(0))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference by that of what is expected."""
    expected = expected.double()
    return ((actual.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


# -------------------------------------------------------------------------------------------------------- low precision

@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_models_are_close(variant):
    """Over 10 blocks. Rounding the weights' products alone costs about 0.5 % in a model of this depth."""
    model, x = small_model(variant), stream(2, 160)
    with torch.no_grad():
        exact, _, exact_states = copy.deepcopy(model).double()(x)
        assert relative_error(model(x)[0], exact) < 2e-6
        logits, memories, states = model.bfloat16()(x)
    assert relative_error(logits, exact) < 0.01
    assert all(relative_error(a, b) < 0.02 for a, b in zip(states.layers, exact_states.layers))
    assert all(
        kv.k.dtype == kv.v.dtype == torch.bfloat16
        for layer in memories.layers
        for kv in (layer.past["xl"], layer.block)
    )


@every_variant
def test_autocast_is_close(variant):
    """And carries what the model's own type is, so that calls with and without it can follow each other."""
    model, x = small_model(variant), stream(2, 160)
    with torch.no_grad():
        exact, _, exact_states = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits, memories, states = model(x)
        assert relative_error(logits, exact) < 0.008
        assert all(relative_error(a, b) < 0.02 for a, b in zip(states.layers, exact_states.layers))
        assert all(kv.k.dtype == torch.float32 for layer in memories.layers for kv in (layer.past["xl"], layer.block))
        after, _, _ = model(x[:, :40], xl_memories=memories, states=states)
        wanted, _, _ = model(torch.cat((x, x[:, :40]), dim=1))
    assert relative_error(after, wanted[:, 160:]) < 0.01


@every_variant
def test_autocast_trains(variant):
    model, x = small_model(variant), stream(2, 65)
    model(x, return_loss=True)[0].backward()
    exact = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = model(x, return_loss=True)
    assert loss.dtype == torch.float32
    loss.backward()
    noise = 1e-3 * max(gradient.norm() for gradient in exact.values())  # some gradients are zero but for rounding
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - exact[name]).norm() < 0.1 * exact[name].norm() + noise, name


@pytest.mark.parametrize("autocast", [False, True])
def test_states_stay_in_fp32(autocast):
    """Also what is in them: a state rounded to bf16 forgets small changes, block after block."""
    model = small_model("default") if autocast else small_model("default").bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        memories = states = None
        for part in stream(1, 160).split(23, dim=1):
            _, memories, states = model(part, xl_memories=memories, states=states)
            assert states.layers[0].dtype == torch.float32
    state = states.layers[0]
    assert (state != state.bfloat16().float()).float().mean() > 0.9


def test_positions_are_exact_in_bf16():
    """The angle of the 1000th position of a block is that of fp64, far below what bf16 could tell apart."""
    options = {"dim_head": 8, "heads": 1, "dim": 8, "block_width": 1024, "max_seq_len": 1024, "depth": 1}
    config = Config(**{**BASE, **options, "recurrent_layers": ()})
    model = BlockRecurrentTransformer(config).bfloat16()
    exact = BlockRecurrentTransformer(config).double().rotary.tables
    assert model.rotary.tables.dtype == torch.float32
    assert_same(model.rotary.tables.double(), exact, 2e-5)
    queries, keys = model.rotary.at(1000, 3)
    for table in (*queries, *keys):
        assert not torch.equal(table[..., 0, :], table[..., 1, :])


def test_dynamic_positions_tell_distances_apart_in_bf16():
    """bf16 has 8 bits, so that an MLP on distances in bf16 would know about 150 of 1,000."""
    config = Config(**{**BASE, "dim": 64, "block_width": 1024, "max_seq_len": 1024, "positions": "dynamic"})
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(config)
    bias = model.layers[0].position_bias
    distances = torch.arange(1000)
    expected = bias(distances)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bias(distances), expected)
    assert len(model.bfloat16().layers[0].position_bias(distances)[0].unique()) > 900


@pytest.mark.parametrize("size", [100.0, 1e-3])
def test_unit_keys_in_fp16_are_unit_keys(size):
    """Squares of 100 * 8 channels and more are beyond fp16, those of 1e-3 below it."""
    torch.manual_seed(0)
    keys = size * torch.randn(1, 1, 16, 64)
    for norm in ("head", "channel"):
        heads_norm = module.ATTENTIONS[norm](Config(**{**BASE, "dim_head": 64, "qk_norm": norm}))
        kept, wanted = (heads_norm.stored_state(k).float() for k in (keys.half(), keys))
        assert relative_error(kept, wanted) < 2e-3


def test_a_gate_that_keeps_nearly_all_still_writes():
    """1 - g of e^-17 is a share of 4e-8, and is not lost beside 1."""
    gate = module.FixedGate(3, 3)
    gate.keep.data.fill_(17.0)
    old, z = torch.zeros(1, 1, 3), torch.ones(1, 1, 3)
    written = module.mixed(old, z, gate(z, old))
    assert_same(written, torch.full_like(written, 1 / (1 + torch.e**17)), 1e-10)
    written.sum().backward()
    assert gate.keep.grad.all()


def test_weights_loaded_in_inference_mode_can_be_trained():
    model = small_model("default")
    with torch.inference_mode():
        model.load_state_dict(model.state_dict())
    model(stream(1, 9), return_loss=True)[0].backward()


# ---------------------------------------------------------------------------------------------- what attention is given


@pytest.fixture
def calls(monkeypatch):
    """Every call of scaled_dot_product_attention, as a dict of its arguments."""
    seen: list[dict[str, Any]] = []
    real = F.scaled_dot_product_attention

    def note(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        seen.append({"q": q, "k": k, "v": v, "mask": mask, **options})
        return real(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    return seen


def read(
    model: BlockRecurrentTransformer, *lengths: int, calls: list | None = None, batch: int = 2, **options: Any
) -> None:
    """Reads calls of these lengths; `calls` holds those of attention in the last one."""
    memories = states = None
    with torch.no_grad():
        for n in lengths:
            if calls is not None:
                calls.clear()
            _, memories, states = model(stream(batch, n), xl_memories=memories, states=states, **options)


BIASED = {"paper", "feedback", "dynamic, no norm"}  # a bias for each distance has to be told by a mask


@every_variant
def test_a_first_block_is_causal_without_a_mask(variant, calls):
    read(small_model(variant), 16, calls=calls)
    by_tokens = (16, 16 * 4)  # queries: a block, or those of all heads in a row; states have 5
    tokens = [call for call in calls if call["q"].shape[2] in by_tokens and call["k"].shape[2] > 5]
    assert len(tokens) == BASE["depth"]
    for call in tokens:
        if variant in BIASED or variant == "sliding":
            assert call["mask"] is not None and not call["is_causal"]
        else:
            assert call["mask"] is None and call["is_causal"]
            assert call["q"].shape == call["k"].shape == call["v"].shape == (2, 4, 16, 32)


@every_variant
def test_one_token_with_full_memories_needs_no_mask(variant, calls):
    """Nothing is hidden from it, except that the window of `sliding` leaves out what is too old."""
    read(small_model(variant), 16 * 6 + 5, 1, calls=calls)
    assert len(calls) >= BASE["depth"] + 1
    for call in calls:
        assert not call["is_causal"]
        assert call["mask"] is None or variant in BIASED
        if call["mask"] is not None:
            assert call["mask"].dtype == call["q"].dtype
            assert torch.isfinite(call["mask"]).all()


def test_one_token_without_memories_needs_no_mask(calls):
    """What is not there is left out instead of masked."""
    read(small_model("default"), 5, 1, calls=calls)
    assert all(call["mask"] is None and call["k"].shape[2] in (6, 5) for call in calls)


def test_shared_keys_are_not_copied_for_one_token(calls):
    """All query heads are rows of queries against the one head of keys."""
    read(small_model("default"), 16 * 3, 1, calls=calls)
    assert {call["q"].shape[1] for call in calls} == {call["k"].shape[1] for call in calls} == {1}
    assert {call["q"].shape[2] for call in calls} == {4}


@pytest.mark.parametrize("positions", ["xpos", "dynamic"])
def test_shared_keys_are_not_copied_for_blocks(positions, calls, monkeypatch):
    """Neither with memories, unless the mask would be large."""
    for large in (False, True):
        monkeypatch.setattr(module, "MASK_AT_ONCE", 0 if large else 2**22)
        read(small_model("default", positions=positions), 16 * 3, 16, calls=calls)
        tokens = [call for call in calls if call["k"].shape[2] == 32]
        assert len(tokens) == BASE["depth"]
        is_copied = large or positions == "dynamic"  # with a bias, each head has a mask of its own
        heads, queries = (4, 16) if is_copied else (1, 64)
        for call in tokens:
            assert call["q"].shape[1:3] == (heads, queries) and call["k"].shape[1] == heads
            assert call["mask"].shape == (1, 4 if positions == "dynamic" else 1, queries, 32)


@every_variant
def test_whole_blocks_are_one_call(variant, calls):
    """All blocks of a call at once in a layer that is a stage of its own."""
    model = small_model(variant)
    read(model, 16 * 6, 16 * 8, calls=calls)
    alone = [stage for stage in model.groups if len(stage) == 1]
    folded = [call for call in calls if call["q"].shape[0] == 2 * 8 and call["k"].shape[2] >= 16]
    assert len(folded) == len(alone)
    for call in folded:
        mask = call["mask"]
        assert mask is None or mask.shape[0] == 1, "one mask for all blocks"


HOW = [
    (variant, how)
    for variant in VARIANTS
    for how in ("fp32", "bf16", "autocast")
]


@pytest.mark.parametrize(("variant", "how"), HOW)
def test_types_and_layout(variant, how, calls):
    """One type for queries, keys and values, a mask of bool or of that type, and channels side by side.

    Autocast itself casts what it is given: fp32 where gains in fp32 came last.
    """
    model = small_model(variant)
    dtype = torch.float32 if how == "fp32" else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
        read(model.bfloat16() if how == "bf16" else model, 16 * 3 + 5, 20, 1)
    assert calls
    for call in calls:
        assert call["q"].dtype == call["k"].dtype == call["v"].dtype
        assert how == "autocast" or call["q"].dtype == dtype
        assert call["mask"] is None or call["mask"].dtype in (torch.bool, call["q"].dtype)
        assert all(call[name].stride(-1) == 1 for name in "qkv")


def test_dropout_only_in_training(calls):
    model = small_model("default", attn_dropout=0.5)
    read(model, 20)
    assert {call["dropout_p"] for call in calls} == {0.0}
    calls.clear()
    read(model.train(), 20)
    assert {call["dropout_p"] for call in calls} == {0.0, 0.5}  # 0 for states


def test_without_flash_it_is_not_called(calls):
    read(small_model("default", use_flash_attn=False), 40)
    assert calls == []


# ----------------------------------------------------------------------------------------------------- flash or written


def everything(model: BlockRecurrentTransformer, lengths: Tensor | None) -> dict[str, Tensor]:
    """Logits, states and all gradients of a loss on them, over two calls."""
    first, memories, states = model(stream(3, 21), lengths=lengths)
    second, memories, states = model(stream(3, 13), xl_memories=memories, states=states)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double() for x in (first, second)]
    loss = sum((x * w).sum() for x, w in zip((first, second), weights)) + sum(s.square().sum() for s in states.layers)
    loss.backward()
    found = {"first": first, "second": second, **{f"state {i}": s for i, s in enumerate(states.layers)}}
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}


@every_variant
@pytest.mark.parametrize("ragged", [False, True])
def test_flash_and_the_formula_agree(variant, ragged):
    """Outputs and gradients in float64, rows at the same place or at different ones."""
    options = {**BASE, **VARIANTS[variant], "dim": 16, "dim_head": 4, "ff_dim": 8, "block_width": 8, "max_seq_len": 8}
    lengths = torch.tensor([21, 1, 10]) if ragged else None
    flash = everything(random_model(Config(**options)), lengths)
    formula = everything(random_model(Config(**{**options, "use_flash_attn": False})), lengths)
    assert flash.keys() == formula.keys()
    for name, value in flash.items():
        assert torch.isfinite(value).all(), name
        assert_same(value, formula[name], 1e-10, name=name)
