"""The numbers of block-recurrent-transformer-pytorch 0.4.4 (golden/record_lucidrains.py), and not its defects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, convert

ARRAYS = np.load(Path(__file__).parent / "golden" / "lucidrains.npz")
CASES = sorted({key.split("/")[0] for key in ARRAYS.files})


def load(case, dtype=torch.float64, **options):
    prefix = f"{case}/param/"
    weights = {k[len(prefix) :]: torch.from_numpy(ARRAYS[k]).to(dtype) for k in ARRAYS.files if k.startswith(prefix)}
    recorded = json.loads(str(ARRAYS[f"{case}/options"]))
    sizes = {"max_seq_len": recorded["max_seq_len"], "block_width": recorded["block_width"]}
    return BlockRecurrentTransformer.from_lucidrains(weights, **sizes, **options), recorded


@pytest.mark.parametrize("case", CASES)
def test_carried_segments_give_the_recorded_logits(case):
    model, recorded = load(case)
    assert not model.training and model.token_emb.weight.dtype == torch.float64
    assert model.config.heads == recorded["heads"] and model.config.dim_head == recorded["dim_head"]
    memories = states = None
    for segment in range(4):
        tokens = torch.from_numpy(ARRAYS[f"{case}/tokens/{segment}"])
        with torch.no_grad():
            logits, memories, states = model(tokens, xl_memories=memories, states=states)
        theirs = torch.from_numpy(ARRAYS[f"{case}/logits/{segment}"])
        assert (logits - theirs).abs().max() < 1e-8 * theirs.std()


@pytest.mark.parametrize("case", CASES)
def test_options_are_read_from_the_state_dict(case):
    model, recorded = load(case)
    for name in ("num_tokens", "dim", "depth", "use_compressed_mem", "all_layers_qk_rmsnorm", "compressed_mem_factor"):
        if name in recorded and (name != "compressed_mem_factor" or recorded["use_compressed_mem"]):
            assert getattr(model.config, name) == recorded[name]
    if "read_recurrent_layers" in recorded:
        assert list(model.config.read_recurrent_layers) == recorded["read_recurrent_layers"]


def test_read_layers_may_be_given_and_must_fit():
    model, _ = load("read_below", read_recurrent_layers=(1,))
    assert model.config.read_recurrent_layers == (1,)
    with pytest.raises(ValueError, match=r"read_recurrent_layers=\(2,\)"):
        load("read_below", read_recurrent_layers=(2,))


def test_the_scale_of_normalised_attention_is_used_in_new_models_only():
    model, _ = load("default")
    layer = model.layers[model.cells[0] - 1]
    assert layer.heads_norm.scale == model.config.dim_head**-0.5
    assert BlockRecurrentTransformer(num_tokens=4, dim=8, depth=1).layers[0].heads_norm.scale == 8


def test_cutting_the_stream_inside_blocks_changes_nothing():
    model, recorded = load("default")
    tokens = torch.from_numpy(ARRAYS["default/tokens/0"])
    memories = states = None
    pieces = []
    with torch.no_grad():
        for start in range(0, tokens.shape[1], 3):
            out, memories, states = model(tokens[:, start : start + 3], xl_memories=memories, states=states)
            pieces.append(out)
    theirs = torch.from_numpy(ARRAYS["default/logits/0"])
    assert (torch.cat(pieces, dim=1) - theirs).abs().max() < 1e-8 * theirs.std()


def test_many_recurrent_layers_are_told_apart_at_once():
    """An enumeration of all orders would take hours."""
    layers = tuple(range(1, 25))
    assert convert.find_reads(layers, [1] * 24, None) == convert.find_reads(layers, [1] * 24, layers) == layers
    assert convert.find_reads((3, 1, 2), [1, 1, 1], None) == (3, 1, 2)
    for writes, counts in [((2, 3), [1, 1, 0]), (tuple(range(1, 25)), [0] * 23 + [24]), ((1, 2), [2, 1])]:
        with pytest.raises(ValueError, match="read_recurrent_layers must be given"):
            convert.find_reads(writes, counts, None)
