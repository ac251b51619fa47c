"""Routed memory inside the model: what it equals, what is taught, what it carries. Its operators: test_routing.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import assert_same, gradients
from strategies import random_model, random_stream
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Config,
    RecurrentTrainWrapper,
    forget_rows,
    select_rows,
)
from block_recurrent_transformer_pytorch.carried_files import load, save
from block_recurrent_transformer_pytorch.inspecting import inspecting

SIZES = {
    "num_tokens": 11, "dim": 8, "depth": 2, "dim_head": 4, "heads": 4, "kv_heads": 2, "ff_dim": 6, "block_width": 4,
    "max_seq_len": 8, "recurrent_layers": (1,), "num_state_vectors": 3,
}  # fmt: skip
ROUTED = {"capacity": 32, "chunk_size": 2, "num_chosen": 3, "layers": (2,)}


def model_of(options: dict | None = None, **sizes: object) -> BlockRecurrentTransformer:
    return random_model(Config(**SIZES | {"extra_memories": {"routed": ROUTED | (options or {})}} | sizes))


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("summaries", [1, 2])
@pytest.mark.parametrize("xl_blocks", [0, 1, 2])
def test_all_chunks_are_attention_to_the_whole_past(positions: str, summaries: int, xl_blocks: int) -> None:
    """As a model whose XL memory never ends; rotary positions are met as if nothing had been stored."""
    options = {"num_chosen": 16, "positions": positions, "num_summaries": summaries}
    routed = model_of(options, positions=positions, num_xl_blocks=xl_blocks)
    layers = {"xl_layers": (2,)} if xl_blocks == 0 else {}
    whole = random_model(Config(**SIZES | {"positions": positions, "num_xl_blocks": 9} | layers))
    tokens = random_stream(2, 33)
    if xl_blocks == 0:
        whole.load_state_dict(routed.state_dict())
        assert_same(routed(tokens)[0], whole(tokens)[0], 1e-9)
        return
    one_layer = {"depth": 1, "recurrent_layers": ()}
    routed = model_of(options | {"layers": (1,)}, positions=positions, num_xl_blocks=xl_blocks, **one_layer)
    whole = random_model(Config(**SIZES | one_layer | {"positions": positions, "num_xl_blocks": 9}))
    whole.load_state_dict(routed.state_dict())
    assert_same(routed(tokens)[0], whole(tokens)[0], 1e-9)
    fewer = model_of({"layers": (1,), "positions": positions}, positions=positions, **one_layer)
    fewer.load_state_dict(routed.state_dict())
    assert (fewer(tokens)[0] - whole(tokens)[0]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------- auxiliary losses


def test_an_auxiliary_loss_changes_the_gradient_and_not_the_value() -> None:
    model, tokens = model_of({"summary": "gate"}), random_stream(2, 25)
    gate = model.layer(2).extra["routed"].router.gate

    def loss(**options: object) -> tuple[Tensor, dict[str, Tensor]]:
        found = model(tokens, return_loss=True, **options)[0]
        return found, gradients(model, {"loss": found})

    plain, grads = loss()
    taught, more = loss(auxiliary={"distillation": 0.5})
    assert taught == plain
    encoded = model.encode(model.embed(tokens[:, :-1]), auxiliary=("distillation",))
    of_aux = gradients(model, {"loss": encoded.losses["distillation"]})
    assert of_aux["layers.1.extra.routed.router.gate"].abs().max() > 0 and gate is not None
    for name, grad in more.items():
        assert_same(grad, grads[name] + 0.5 * of_aux[name], name=name)


@pytest.mark.parametrize("cuts", [[24], [1, 3, 4, 8, 8], [5] * 4 + [4]], ids=str)
def test_the_mean_of_an_auxiliary_loss_does_not_depend_on_the_split(cuts: list[int]) -> None:
    """Tokens that can choose nothing do not count."""
    model, tokens, total, at, memories, states = model_of(), random_stream(2, 24), 0.0, 0, None, None
    for piece in tokens.split(cuts, dim=1):
        _, memories, states, _, losses = model.encode(
            model.embed(piece), xl_memories=memories, states=states, auxiliary=("distillation",)
        )
        counted = sum(place >= 8 for place in range(at, at + piece.shape[1]))  # two blocks are full before any is stored
        total, at = total + losses["distillation"] * counted, at + piece.shape[1]
    whole = model.encode(model.embed(tokens), auxiliary=("distillation",)).losses["distillation"]
    assert_same(total / 16, whole)
    assert whole > 0


def test_padding_does_not_count_in_an_auxiliary_loss() -> None:
    model, tokens = model_of(), random_stream(2, 24)
    lengths = torch.tensor([24, 10])
    both = model.encode(model.embed(tokens), lengths=lengths, auxiliary=("distillation",)).losses["distillation"]
    long = model.encode(model.embed(tokens[:1]), auxiliary=("distillation",)).losses["distillation"]
    short = model.encode(model.embed(tokens[1:, :10]), auxiliary=("distillation",)).losses["distillation"]
    assert_same(both, (16 * long + 2 * short) / 18)


def test_auxiliary_losses_are_called_by_their_names() -> None:
    model, tokens = model_of(), random_stream(2, 9)
    assert model.auxiliary_losses == ("distillation",)
    assert random_model(Config(**SIZES)).auxiliary_losses == ()
    with pytest.raises(ValueError, match=r"auxiliary=\['other'\]: this model has .* losses \['distillation'\]"):
        model(tokens, return_loss=True, auxiliary={"other": 1.0})
    for wrong in ({}, {"return_loss": True, "reduction": "sum"}):
        with pytest.raises(ValueError, match="needs return_loss=True and reduction='mean'"):
            model(tokens, auxiliary={"distillation": 1.0}, **wrong)
    with pytest.raises(ValueError, match=r"auxiliary_losses=\['other'\]: the model has \['distillation'\]"):
        RecurrentTrainWrapper(model, auxiliary_losses={"other": 1.0})


def test_the_wrapper_teaches_in_training_only() -> None:
    model, tokens = model_of({"summary": "gate"}), random_stream(2, 25)
    gate = model.layer(2).extra["routed"].router.gate

    def gradient(training: bool, weight: float) -> Tensor:
        wrapper = RecurrentTrainWrapper(model, auxiliary_losses={"distillation": weight}, detach_segments=False)
        return torch.autograd.grad(wrapper.train(training)(tokens), gate)[0]

    assert not torch.equal(gradient(True, 1.0), gradient(True, 2.0))
    assert torch.equal(gradient(False, 1.0), gradient(False, 2.0))


def test_distillation_brings_choices_near_to_attention() -> None:
    """With this loss alone: more of the attention to everything falls on the chosen chunks."""
    model = model_of({"training": "all", "summary": "gate"}).train()
    tokens = random_stream(8, 32)
    optimizer = torch.optim.Adam([model.layer(2).extra["routed"].router.gate], 0.1)
    losses = []
    for _ in range(30):
        losses.append(model.encode(model.embed(tokens), auxiliary=("distillation",)).losses["distillation"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3


# ------------------------------------------------------------------------------------------------------------- training


def test_all_chunks_are_attended_to_in_training_alone() -> None:
    tokens, taught, few = random_stream(2, 40), model_of({"training": "all"}), model_of()
    assert_same(taught(tokens)[0], few(tokens)[0])
    every = model_of({"num_chosen": 16})
    assert_same(taught.train()(tokens)[0], every(tokens)[0])
    assert (taught(tokens)[0] - few(tokens)[0]).abs().max() > 1e-3


def test_the_share_of_rows_whose_stored_keys_are_taught() -> None:
    """Without a gradient into the store, values of a block that left reach the loss in no other way."""

    def grad(rate: float) -> Tensor:
        model = model_of({"gradient_rate": rate}, recurrent_layers=(), num_xl_blocks=0, depth=2).train()
        embedded = model.embed(random_stream(16, 16)).detach().requires_grad_()
        hidden = model.encode(embedded).hidden[:, 12:]
        return torch.autograd.grad(hidden.square().sum(), embedded)[0][:, :12].abs().sum((1, 2)) > 0

    assert grad(1.0).all() and not grad(0.0).any()
    torch.manual_seed(0)
    assert 0 < grad(0.5).sum() < 16


def test_every_parameter_is_taught() -> None:
    model = model_of({"summary": "gate"}, matching_init=True).train()
    wrapper = RecurrentTrainWrapper(model, seq_len=16, auxiliary_losses={"distillation": 1.0})
    wrapper(random_stream(2, 33)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]


def test_matching_initial_values_ask_with_the_map_of_keys() -> None:
    layer = BlockRecurrentTransformer(Config(**SIZES, matching_init=True, extra_memories={"routed": ROUTED})).layer(2)
    q, kv = layer.to_qkv.weight.split([16, 16])
    assert torch.equal(q.view(2, 2, 4, 8)[:, 0], kv[:8].view(2, 4, 8))
    assert_same(kv @ kv.t() if len(kv) <= 8 else kv.t() @ kv, torch.eye(8), 1e-5)


# ------------------------------------------------------------------------------------------------------------ the store


def test_the_store_travels_like_any_other_memory(tmp_path: Path) -> None:
    model, tokens, more = model_of({"key_shift": True, "num_chosen": 16}), random_stream(3, 30), random_stream(3, 21)
    _, memories, states = model(tokens)
    expected = model(more, xl_memories=memories, states=states)[0]
    save(tmp_path / "book.safetensors", memories, states, model)
    again = load(tmp_path / "book.safetensors", model)
    assert torch.equal(model(more, xl_memories=again[0], states=again[1])[0], expected)
    rows = torch.tensor([2, 0])
    chosen = (select_rows(value, rows) for value in (memories, states))
    assert_same(model(more[rows], xl_memories=next(chosen), states=next(chosen))[0], expected[rows])
    reset = torch.tensor([False, True, False])
    anew = model(more, xl_memories=memories, states=states, reset=reset)[0]
    assert_same(anew[1], model(more[1:2])[0][0])
    assert_same(anew[0], expected[0])
    forgotten = model(more, xl_memories=forget_rows(memories, reset), states=states)[0]
    assert_same(forgotten[2], expected[2])
    assert (forgotten[1] - expected[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="routed"):
        other = model_of({"capacity": 16})
        other(more, xl_memories=memories, states=states)


@torch.no_grad()
def test_the_store_is_written_in_place_where_it_is_given_away() -> None:
    model, tokens = model_of(), random_stream(1, 60)
    _, memories, states = model(tokens[:, :20])

    def pointer(memories: object) -> int:
        return memories.layers[1].past["routed"].k.data_ptr()

    kept = model(tokens[:, 20:40], xl_memories=memories, states=states)[1]
    assert pointer(kept) != pointer(memories)
    before = memories.layers[1].past["routed"].k.clone()
    _, within, _ = model(tokens[:, 20:22], xl_memories=memories, states=states)
    assert pointer(within) == pointer(memories), "nothing left the XL memory, so nothing is copied"
    assert torch.equal(memories.layers[1].past["routed"].k, before)
    given = model(tokens[:, 20:40], xl_memories=memories, states=states, overwrite=True)[1]
    assert pointer(given) == pointer(memories)
    assert all(torch.equal(x, y) for x, y in zip(given.layers[1].past["routed"], kept.layers[1].past["routed"]))


@torch.no_grad()
def test_the_cost_of_a_token_does_not_depend_on_what_was_read() -> None:
    model, memories, states, counts = model_of(), None, None, []
    for tokens in random_stream(1, 90).split(1, dim=1):
        with FlopCounterMode(display=False) as counter:
            _, memories, states = model(tokens, xl_memories=memories, states=states, overwrite=True)
        counts.append(counter.get_total_flops())
    assert counts[40:60] == counts[64:84]


@torch.no_grad()
def test_a_store_of_fewer_bits() -> None:
    tokens = random_stream(2, 40)
    exact, rounded = model_of({"num_chosen": 16}), model_of({"num_chosen": 16, "dtype": "bfloat16"})
    out, (found, memories, _) = exact(tokens)[0], rounded(tokens)
    assert memories.layers[1].past["routed"].k.dtype == torch.bfloat16
    assert 0 < (found - out).abs().max() < 0.05 * (out.max() - out.min())


@torch.no_grad()
def test_the_chosen_chunks_are_seen() -> None:
    model, tokens = model_of(), random_stream(2, 30)
    with inspecting(model) as seen:
        out = model(tokens)[0]
    assert torch.equal(out, model(tokens)[0])
    chunks = torch.cat([x.flatten(2, 3) for x in seen[2].choices], dim=2)  # (b, g, n, k)
    assert not seen[1].choices and chunks.shape == (2, 2, 30, 3)
    for place in range(30):
        stored = max(0, place // 4 - 1) * 2
        here = chunks[:, :, place].sort(-1).values
        assert (here < stored).all() and (here >= -1).all()
        assert ((here == -1).sum(-1) == max(0, 3 - stored)).all()
        assert all(len(set(row)) == len(row) for row in here[..., max(0, 3 - stored) :].flatten(0, 1).tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 3}, "block_width=4 is not a multiple of chunk_size=3"),
        ({"capacity": 5}, "capacity=5 is not a multiple"),
        ({"chunks": 4}, r"extra_memories\['routed'\]: got an unexpected keyword argument 'chunks'"),
        ({"training": "some"}, "training must be 'chosen' or 'all'"),
        ({"gradient_rate": 2.0}, "gradient_rate must be from 0 to 1"),
        ({"dtype": "half a byte"}, "dtype='half a byte' is no type of torch"),
        ({"operator": "best"}, "operator='best'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(options)
