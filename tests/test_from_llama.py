"""What a pretrained model needs, without transformers: folders of its layout, sinks, options, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from oracle import assert_same, read_in_pieces
from safetensors.torch import load_file, save_file
from strategies import SCALINGS, random_model, random_stream
from torch import Tensor, nn

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, forget_rows
from block_recurrent_transformer_pytorch.llama import freeze_pretrained, new_parameters, to_llama

WRONG = (ValueError, BeartypeCallHintViolation)
LLAMA = {
    "num_tokens": 11, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "kv_heads": 1, "ff_dim": 6, "block_width": 4,
    "max_seq_len": 8, "num_xl_blocks": 2, "recurrent_layers": (), "positions": "rotary", "ff_activation": "swiglu",
    "norm": "rms", "norm_eps": 1e-5, "tokens_qk_norm": "none", "logit_scale": 1.0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied and scaled": {"tie_embeddings": True, "rotary_base": 500.0, "rotary_scaling": SCALINGS[1]},
    "qwen2": {"qkv_bias": True}, "qwen3": {"tokens_qk_norm": "rms"}, "smollm3": {"unrotated_layers": (2,)},
}  # fmt: skip
WINDOW = {"block_width": 4, "num_xl_blocks": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a small Llama."""
    to_llama(random_model(Config(**LLAMA)), tmp_path / "llama")
    return tmp_path / "llama"


def change(folder: Path, **values: Any) -> None:
    """Other values in config.json; None takes one away."""
    content = json.loads((folder / "config.json").read_text()) | values
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


def change_weights(folder: Path, **values: Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors") | values
    save_file({name: value for name, value in weights.items() if value is not None}, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_goes_to_a_folder_and_comes_back(kind: str, tmp_path: Path) -> None:
    """With the same options, but for those that are no pretrained model's; more layers, states and sinks change no
    logit within the window."""
    model = random_model(Config(**LLAMA | KINDS[kind]))
    to_llama(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind.partition(",")[0]
    tokens = random_stream(2, 12)
    expected = model(tokens)[0]
    back = BlockRecurrentTransformer.from_llama(tmp_path, **WINDOW, sink_tokens=0, max_seq_len=8, use_flash_attn=False)
    assert back.config == model.config and not back.training
    assert torch.equal(back(tokens)[0], expected)
    for options in ({}, {"recurrent_layers": (1, 3)}, {"recurrent_layers": (3,), "read_recurrent_layers": (1,)},
                    {"recurrent_layers": (2,), "block_feedback": True, "gate": "lstm", "num_state_vectors": 3},
                    {"use_compressed_mem": True, "qk_norm": "rms"}):  # fmt: skip
        ours = BlockRecurrentTransformer.from_llama(tmp_path, **WINDOW, **options)
        assert_same(ours(tokens)[0], expected, 1e-12)
        assert_same(read_in_pieces(ours, tokens, [5, 1, 6])[0], expected, 1e-12)
        assert ours.config.extra_memories == {"sinks": {"tokens": 4}}


@torch.no_grad()
def test_routed_layers_change_nothing_before_something_left_the_window(folder: Path, tmp_path: Path) -> None:
    tokens = random_stream(1, 12)
    expected = BlockRecurrentTransformer.from_llama(folder, **WINDOW)(tokens)[0]
    routed = {"chunk_size": 2, "num_chosen": 2, "capacity": 16}
    ours = BlockRecurrentTransformer.from_llama(folder, **WINDOW, routed_layers=(1, 3), routed=routed)
    assert_same(ours(tokens)[0], expected, 1e-12)
    assert ours.config.extra_memories["routed"]["layers"] == (1, 3)
    assert ours.layer(2).routed is None and ours.layer(3).routed is not None and not new_parameters(ours)
    far = random_stream(1, 40)
    assert (ours(far)[0] - BlockRecurrentTransformer.from_llama(folder, **WINDOW)(far)[0]).abs().max() > 1e-3
    to_llama(ours, tmp_path / "home")
    assert torch.equal(load_file(tmp_path / "home/model.safetensors")["model.norm.weight"], ours.norm.weight)
    with pytest.raises(ValueError, match="is for routed_layers, and none were given"):
        BlockRecurrentTransformer.from_llama(folder, **WINDOW, routed=routed)
    gated = routed | {"summary": "gate", "num_summaries": 1}
    learned = BlockRecurrentTransformer.from_llama(folder, **WINDOW, routed_layers=(2,), routed=gated)
    assert list(new_parameters(learned)) == ["layers.1.extra.routed.router.gate"]
    with pytest.raises(ValueError, match=r"extra_memories=\['routed'\]"):
        to_llama(learned, tmp_path / "away")


def test_reading_a_folder_needs_no_transformers(folder: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from block_recurrent_transformer_pytorch import BlockRecurrentTransformer\n"
        f"BlockRecurrentTransformer.from_llama({str(folder)!r}, block_width=4, num_xl_blocks=2)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_type_is_that_of_the_files_or_as_asked(folder: Path) -> None:
    assert BlockRecurrentTransformer.from_llama(folder, **WINDOW).token_emb.weight.dtype == torch.float64
    model = BlockRecurrentTransformer.from_llama(folder, **WINDOW, dtype=torch.bfloat16, recurrent_layers=(2,))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generate(random_stream(1, 20), max_new_tokens=8).shape == (1, 8)


def test_the_config_of_older_versions(folder: Path) -> None:
    """rope_theta and rope_scaling, "type" for "rope_type"; tables among the weights; phi3's fused maps."""
    change(folder, rope_parameters=None, rope_theta=50.0, rope_scaling={"type": "linear", "factor": 2.0})
    change_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    model = BlockRecurrentTransformer.from_llama(folder, **WINDOW)
    assert model.config.rotary_base == 50 and model.config.rotary_scaling == {"rope_type": "linear", "factor": 2.0}
    change(folder, model_type="phi3")
    weights: dict[str, Tensor | None] = dict(load_file(folder / "model.safetensors"))
    for n in range(3):
        for fused, parts in (("self_attn.qkv", ("q", "k", "v")), ("mlp.gate_up", ("gate", "up"))):
            name = f"model.layers.{n}.{fused.partition('.')[0]}.%s_proj.weight"
            weights[f"model.layers.{n}.{fused}_proj.weight"] = torch.cat([weights[name % x] for x in parts])
            weights |= {name % x: None for x in parts}
    change_weights(folder, **weights)
    phi = BlockRecurrentTransformer.from_llama(folder, **WINDOW)
    assert torch.equal(phi(random_stream(1, 12))[0], model(random_stream(1, 12))[0])


# ------------------------------------------------------------------------------------------------- what is not carried


@pytest.mark.parametrize(("values", "match"), [
    ({"model_type": "mixtral"}, "model_type 'mixtral' is not one of"),
    ({"model_type": None}, "model_type None is not one of"),
    ({"vocab_size": None, "rms_norm_eps": None}, "lacks vocab_size, rms_norm_eps"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"model_type": "mistral", "use_sliding_window": None, "sliding_window": 11}, "sliding_window=11 is less than"),
    ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not one of"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "lacks"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "warp": 1}}, r"has no \['warp'\]"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "of single layers"),
    ({"num_key_value_heads": 2}, r"k_proj.weight has the shape \(4, 8\), not \(8, 8\)"),
    ({"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias"),
    ({"num_hidden_layers": 2}, "holds entries that this model has no place for.*layers.2"),
    ({"tie_word_embeddings": True, "num_hidden_layers": 4}, "lacks model.layers.3"),
])  # fmt: skip
def test_what_a_config_says_and_we_cannot_carry(folder: Path, values: dict[str, Any], match: str) -> None:
    change(folder, **values)
    if "rope_parameters" in values:
        change(folder, max_position_embeddings=None)
    with pytest.raises(ValueError, match=match):
        BlockRecurrentTransformer.from_llama(folder, **WINDOW)


def test_weights_that_have_no_place_or_another_shape(folder: Path) -> None:
    change_weights(folder, **{"model.layers.1.mlp.experts.gate": torch.ones(2)})
    with pytest.raises(ValueError, match="no place for.*experts"):
        BlockRecurrentTransformer.from_llama(folder, **WINDOW)
    change_weights(folder, **{"model.layers.1.mlp.experts.gate": None, "model.norm.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"model.norm.weight gives norm.weight the shape \(3,\)"):
        BlockRecurrentTransformer.from_llama(folder, **WINDOW)
    change_weights(folder, **{"model.norm.weight": torch.ones(8, dtype=torch.int8)})
    with pytest.raises(ValueError, match="model.norm.weight is torch.int8, and quantised weights are not carried"):
        BlockRecurrentTransformer.from_llama(folder, **WINDOW)
    change_weights(folder, **{"lm_head.weight": None, "model.norm.weight": torch.ones(8)})
    with pytest.raises(ValueError, match="lacks lm_head.weight"):
        BlockRecurrentTransformer.from_llama(folder, **WINDOW)


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    def refused(source: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            BlockRecurrentTransformer.from_llama(source, **WINDOW)

    refused(tmp_path / "nowhere", "is no folder")
    refused(tmp_path, "has no config.json")
    with pytest.raises(WRONG, match="block_width"):
        BlockRecurrentTransformer.from_llama(tmp_path, block_width="8", num_xl_blocks=2)
    refused(nn.Linear(2, 2), "must be a model of transformers, or a folder, not Linear")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "no model.safetensors .*pytorch_model.bin.*: have transformers load and save it as safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00001-of-00002.safetensors is missing")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")


def test_options_that_follow_from_the_model_cannot_be_given(folder: Path) -> None:
    for options, match in (
        ({"dim": 16, "qkv_bias": True}, "dim, qkv_bias follow from the pretrained model"),
        ({"sink_tokens": -1}, "sink_tokens must be at least 0, not -1"),
        ({"sink_tokens": 5}, "tokens must be from 1 to block_width=4, not 5"),
        ({"recurrent_layers": (4,)}, "not among the layers"),
    ):
        with pytest.raises(ValueError, match=match):
            BlockRecurrentTransformer.from_llama(folder, **WINDOW, **options)


@pytest.mark.parametrize(("options", "match"), [
    ({"recurrent_layers": (2,)}, r"recurrent_layers=\(2,\)"),
    ({"positions": "xpos", "norm": "layer"}, "positions='xpos', norm='layer'"),
    ({"use_compressed_mem": True}, "use_compressed_mem=True"),
    ({"tie_embeddings": True, "logit_scale": None}, "logit_scale=0.35"),
    ({"tokens_qk_norm": "channel"}, r"tokens_qk_norm=\['channel'\]"),
    ({"tokens_qk_norm": "rms", "qkv_bias": True}, "all of these"),
    ({"heads": 3}, "dim=8 is not a multiple of heads=3"),
])  # fmt: skip
def test_what_cannot_go_to_transformers(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        to_llama(random_model(Config(**LLAMA | options)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------- what is new learns


def test_only_what_is_new_learns(folder: Path) -> None:
    model = BlockRecurrentTransformer.from_llama(folder, **WINDOW, recurrent_layers=(2,))
    new = freeze_pretrained(model)
    assert new.keys() == new_parameters(model).keys() == model.new_parameters().keys()
    assert {n for n in new if not n.startswith(("layers.1.cell.", "layers.1.read_norm."))} == {
        "layers.1.to_qkv.weight", "layers.1.to_out.weight",
    }  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(new.values(), lr=0.1, weight_decay=0.0)
    x, losses = random_stream(2, 25), []
    for _ in range(8):
        loss = model(x, return_loss=True)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == new.keys() - {name for name in new if name.endswith("cross_norm.k_scale") and name not in changed}
    inner, qkv, out = 8, model.layers[1].to_qkv.weight, model.layers[1].to_out.weight
    was = before["layers.1.to_qkv.weight"]
    assert torch.equal(qkv[:inner], was[:inner]) and torch.equal(qkv[2 * inner :], was[2 * inner :])
    assert not torch.equal(qkv[inner : 2 * inner], was[inner : 2 * inner])
    assert torch.equal(out[:, :inner], before["layers.1.to_out.weight"][:, :inner]) and out[:, inner:].any()


# ---------------------------------------------------------------------------------------------------------------- sinks


FINGERPRINT = "1638d2a66c798d4f"  # of version 1.1.0
SINKS = {"extra_memories": {"sinks": {"tokens": 2}}}


@torch.no_grad()
def test_sinks_change_nothing_before_the_first_eviction_and_something_behind_it() -> None:
    model = random_model(Config(**LLAMA, **SINKS))
    plain = BlockRecurrentTransformer.from_weights(Config(**LLAMA), model.state_dict())
    tokens = random_stream(2, 24)
    assert torch.equal(plain(tokens[:, :12])[0], model(tokens[:, :12])[0])
    with_sinks, without = model(tokens)[0], plain(tokens)[0]
    assert_same(with_sinks[:, :12], without[:, :12], 1e-12)
    assert (with_sinks[:, 12:] - without[:, 12:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_sinks_are_the_first_tokens_for_ever_and_reset_by_row() -> None:
    model = random_model(Config(**LLAMA | {"depth": 1}, **SINKS))
    tokens = random_stream(2, 64)
    _, memories, _ = model(tokens)
    first = model(tokens[:, :3])[1].layers[0].block
    kept = memories.layers[0].past["sinks"]
    assert_same(kept.k, first.k[:, :, :2], 1e-12)
    assert_same(kept.v, first.v[:, :, :2], 1e-12)
    reset = torch.tensor([True, False])
    again, memories, _ = model(tokens[:, :29], xl_memories=memories, reset=reset)
    assert_same(again[:1], model(tokens[:1, :29])[0], 1e-9)
    assert_same(memories.layers[0].past["sinks"].k[1], kept.k[1], 1e-12)
    forgotten = forget_rows(memories, reset)
    assert not forgotten.layers[0].past["sinks"].k[0].any() and forgotten.layers[0].past["sinks"].k[1].any()


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(("options", "match"), [
    ({"rotary_base": 0.0}, "rotary_base must be a positive number, not 0.0"),
    ({"norm_eps": -1.0}, "norm_eps must be a positive number, not -1.0"),
    ({"logit_scale": float("nan")}, "logit_scale must be a positive number"),
    ({"rotary_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope', which is not one of"),
    ({"rotary_scaling": {"factor": 2.0}}, "rope_type None"),
    ({"rotary_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' lacks .*low_freq_factor"),
    ({"rotary_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be a positive number, not 0"),
    ({"rotary_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1}}, r"'linear' has no \['beta_fast'\]"),
    ({"unrotated_layers": (4,)}, r"unrotated_layers=\(4,\): \[4\] not among"),
    ({"unrotated_layers": 3}, "must be a tuple of layer numbers"),
    ({"dim_head": 3}, "positions='rotary' rotates pairs"),
    ({"attention_window": "sliding", "num_xl_blocks": 1, **SINKS}, "cannot be combined with extra_memories=.'sinks'."),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Config(**LLAMA | options)


def test_fingerprints_are_those_from_before_the_new_options() -> None:
    sizes = {"num_tokens": 11, "dim": 8, "depth": 3}
    assert Config(**sizes).fingerprint == FINGERPRINT
    others = ({"rotary_base": 7.0}, {"qkv_bias": True}, {"unrotated_layers": (1,)}, {"norm_eps": 0.1}, SINKS)
    assert len({Config(**sizes, **options).fingerprint for options in ({}, *others)}) == 6
