"""Auxiliary losses of compressed memories and of gates: whom they teach, and that no split changes them."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import assert_same, gradients
from strategies import random_model, random_stream
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, RecurrentTrainWrapper
from block_recurrent_transformer_pytorch.inspecting import inspecting

SIZES = {
    "num_tokens": 11, "dim": 8, "depth": 2, "dim_head": 4, "heads": 4, "kv_heads": 2, "ff_dim": 6, "block_width": 4,
    "max_seq_len": 8, "recurrent_layers": (1,), "num_state_vectors": 3,
}  # fmt: skip
COMPRESSED = {"use_compressed_mem": True, "compressed_mem_factor": 2}
KINDS = {
    "conv": COMPRESSED,
    "conv, head": COMPRESSED | {"qk_norm": "head", "all_layers_qk_rmsnorm": True, "positions": "t5"},
    "conv, rms, two xl blocks": COMPRESSED | {"qk_norm": "rms", "num_xl_blocks": 2, "use_flash_attn": True},
    "conv, some layers, factor 3": COMPRESSED | {"compressed_mem_factor": 3, "xl_layers": (2,)},
    "hard": {"gate": "hard"},
    "lstm, dual": {"gate": "lstm", "state_update": "dual"},
    "full, single, read below": {"gate": "full", "state_update": "single", "recurrent_layers": (2,),
                                 "read_recurrent_layers": (1,)},
    "token-gated": {"gate": "hard", "state_update": "token_gated", "write_span": 2},
}  # fmt: skip
CONVOLUTIONS = [kind for kind in KINDS if kind.startswith("conv")]
CELLS = [kind for kind in KINDS if not kind.startswith("conv")]


def model_of(kind: str = "conv", **options: object) -> BlockRecurrentTransformer:
    return random_model(Config(**SIZES | KINDS[kind] | options))


def name_of(kind: str) -> str:
    return "reconstruction" if kind in CONVOLUTIONS else "open_gates"


def loss_of(model: BlockRecurrentTransformer, tokens: Tensor, name: str, **options: object) -> Tensor:
    return model.encode(model.embed(tokens), auxiliary=(name,), **options).losses[name]


def counted(kind: str, start: int, stop: int, blocks: int) -> int:
    """How many tokens, or blocks, of start ... stop - 1 have such a loss; `blocks` fill an XL memory."""
    if kind in CELLS:
        return stop // 4 - start // 4
    return sum(place >= 4 * blocks for place in range(start, stop))


# ---------------------------------------------------------------------------------------------------------- any split


@pytest.mark.parametrize("cuts", [[27], [1, 3, 4, 8, 11], [5] * 5 + [2], [1] * 27], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_does_not_depend_on_the_split(kind: str, cuts: list[int]) -> None:
    model, tokens, name = model_of(kind), random_stream(2, 27), name_of(kind)
    xl, total, all_counted, at, memories, states = model.config.num_xl_blocks, 0.0, 0, 0, None, None
    for piece in tokens.split(cuts, dim=1):
        _, memories, states, _, losses = model.encode(
            model.embed(piece), xl_memories=memories, states=states, auxiliary=(name,)
        )
        count = counted(kind, at, at + piece.shape[1], xl)
        total, all_counted, at = total + losses[name] * count, all_counted + count, at + piece.shape[1]
    assert_same(total / all_counted, loss_of(model, tokens, name))
    assert total > 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_lengths_count_for_what_they_bring(kind: str) -> None:
    """Also where they go on from different places."""
    model, tokens, name, xl = model_of(kind), random_stream(3, 43), name_of(kind), model_of(kind).config.num_xl_blocks
    lengths, more = torch.tensor([27, 10, 0]), torch.tensor([9, 0, 16])
    first = model.encode(model.embed(tokens[:, :27]), lengths=lengths, auxiliary=(name,))
    second = model.encode(
        model.embed(tokens[:, 27:]), lengths=more, auxiliary=(name,), xl_memories=first.memories, states=first.states
    )
    sums, counts = [0.0, 0.0], [0, 0]
    for row, (n, m) in enumerate(zip(lengths.tolist(), more.tolist())):
        alone = torch.cat((tokens[row, :n], tokens[row, 27 : 27 + m]))[None]
        of_first, of_both = counted(kind, 0, n, xl), counted(kind, 0, n + m, xl)
        part = loss_of(model, alone[:, :n], name) * of_first if of_first else 0.0
        both = loss_of(model, alone, name) * of_both if of_both else 0.0
        sums = [sums[0] + part, sums[1] + both - part]
        counts = [counts[0] + of_first, counts[1] + of_both - of_first]
    for found, total, count in zip((first, second), sums, counts):
        assert_same(found.losses[name], total / count)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_and_checkpoints_change_no_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, again, tokens = model_of(kind), model_of(kind, use_checkpointing=True), random_stream(2, 25)
    grads = [gradients(one, {"loss": loss_of(one, tokens, name_of(kind))}) for one in (model, again)]
    monkeypatch.setattr("block_recurrent_transformer_pytorch.kernels.RECOMPUTED_FROM", 0)
    grads.append(gradients(model, {"loss": loss_of(model, tokens, name_of(kind))}))
    for other in grads[1:]:
        for name, grad in grads[0].items():
            assert_same(other[name], grad, name=name)


# ------------------------------------------------------------------------------------------------------ reconstruction


def test_the_reconstruction_loss_is_that_of_its_formula() -> None:
    """One layer, one block in the XL memory: each later token compares what it finds in the block before its own."""
    model, tokens = model_of(depth=1, recurrent_layers=(), qk_norm="none"), random_stream(1, 11)
    layer, errors = model.layer(1), []
    q, kv = layer.to_qkv(layer.norm(model.embed(tokens)))[0].split([16, 16], dim=-1)
    k, v = kv.view(11, 2, 2, 4).unbind(1)  # (n, g, e)
    weight, bias = layer.compressor.conv.weight, layer.compressor.conv.bias
    for place in range(4, 11):
        start = place // 4 * 4 - 4
        for head in range(4):
            old = [x[start : start + 4] for x in (k, v)]
            pairs = [x.view(2, 2, 8) for x in old]  # (entry, token, g e)
            made = [
                torch.stack([sum(w[:, :, i] @ pair[i] for i in range(2)) + b for pair in part]).view(2, 2, 4)
                for part, w, b in zip(pairs, weight.chunk(2), bias.chunk(2))
            ]
            found = []
            for keys, values in (old, made):
                logits = keys[:, head // 2] @ q[place, 4 * head : 4 * head + 4] / 2
                found.append(logits.softmax(0) @ values[:, head // 2])
            errors.append((found[0] - found[1]).square().mean())
    assert_same(loss_of(model, tokens, "reconstruction"), torch.stack(errors).mean())


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_reconstruction_teaches_the_compressors_alone(kind: str) -> None:
    model, tokens = model_of(kind), random_stream(2, 30)
    loss_of(model, tokens, "reconstruction").backward()
    for name, parameter in model.named_parameters():
        if ".compressor." in name:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_the_cross_entropy_teaches_the_rest_as_before() -> None:
    """To the last bit: nothing of the loss reaches it."""
    model, tokens = model_of(), random_stream(2, 30)
    plain = gradients(model, {"loss": model(tokens, return_loss=True)[0]})
    taught = gradients(model, {"loss": model(tokens, return_loss=True, auxiliary={"reconstruction": 3.0})[0]})
    for name, grad in taught.items():
        assert torch.equal(grad, plain[name]) == (".compressor." not in name), name


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_reconstruction_brings_what_is_found_nearer(kind: str) -> None:
    """On tokens that it was not trained on, too."""
    model, tokens, others = model_of(kind), random_stream(8, 40, seed=1), random_stream(8, 40, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    before = loss_of(model, others, "reconstruction").item()
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(model, tokens, "reconstruction").backward()
        optimizer.step()
    assert loss_of(model, others, "reconstruction").item() < 0.7 * before


def test_compressors_learn_in_segments_in_which_nothing_compressed_is_read() -> None:
    """Two blocks a segment: the second asks for what the first will become."""
    model, tokens = model_of().train(), random_stream(2, 9)
    with pytest.warns(UserWarning, match="compressors in a first segment .*'reconstruction' teaches them"):
        plain = RecurrentTrainWrapper(model)
    assert "compressors" in plain.untrained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taught = RecurrentTrainWrapper(model, auxiliary_losses={"reconstruction": 1.0})
    weight = model.layer(1).compressor.conv.weight
    grad = torch.autograd.grad(plain(tokens), weight, allow_unused=True)[0]
    assert grad is None or not grad.any()
    assert torch.autograd.grad(taught(tokens), weight)[0].abs().sum() > 0
    with pytest.warns(UserWarning, match="compressors in a first segment .nothing is about to leave"):
        RecurrentTrainWrapper(model, seq_len=4, auxiliary_losses={"reconstruction": 1.0})


def test_poolings_have_nothing_to_learn() -> None:
    for pooling in ("mean", "max"):
        model = model_of(compressed_mem_pooling=pooling)
        assert model.auxiliary_losses == () and not [n for n, _ in model.named_parameters() if ".compressor." in n]
        assert "compressors" not in RecurrentTrainWrapper(model).untrained()
        with pytest.raises(ValueError, match=r"auxiliary=\['reconstruction'\]: this model has .* losses \[\]"):
            loss_of(model, random_stream(1, 9), "reconstruction")


# ---------------------------------------------------------------------------------------------------------- open gates


@pytest.mark.parametrize("kind", CELLS)
def test_open_gates_is_the_mean_share_that_gates_write(kind: str) -> None:
    model, tokens = model_of(kind), random_stream(2, 22)
    with inspecting(model) as seen:
        found = loss_of(model, tokens, "open_gates")
    cell = model.cells[0]
    assert_same(found, torch.cat([share.flatten() for share in seen[cell].write]).mean())
    assert 0 < found < 1


@pytest.mark.parametrize("kind", CELLS)
def test_open_gates_closes_gates(kind: str) -> None:
    model, tokens = model_of(kind).train(), random_stream(8, 22)
    optimizer, before = torch.optim.Adam(model.parameters(), 0.03), loss_of(model, tokens, "open_gates").item()
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model, tokens, "open_gates").backward()
        optimizer.step()
    assert loss_of(model, tokens, "open_gates").item() < 0.7 * before


def test_a_gate_that_decides_nothing_has_no_such_loss() -> None:
    model = model_of("hard", gate="fixed")
    with pytest.raises(ValueError, match=r"auxiliary=\['open_gates'\]: this model has the auxiliary losses \[\]"):
        loss_of(model, random_stream(1, 9), "open_gates")
    assert model_of("hard", **COMPRESSED).auxiliary_losses == ("open_gates", "reconstruction")
