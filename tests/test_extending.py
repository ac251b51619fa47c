"""Gates and memories of a user's own, and modules put in the place of the model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_all_same, assert_same, gradients, read_in_pieces
from strategies import random_model, random_stream
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from block_recurrent_transformer_pytorch import (
    KV,
    Appended,
    BlockRecurrentTransformer,
    Config,
    Gate,
    MemoryKind,
    Shares,
    config,
    forget_rows,
    losses,
    register_gate,
    register_memory,
)
from block_recurrent_transformer_pytorch.inspecting import inspecting

SIZES = {
    "num_tokens": 11, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "block_width": 4, "max_seq_len": 8,
    "recurrent_layers": (2,), "num_state_vectors": 3,
}  # fmt: skip


@register_gate("test_hard")
class HardGate(Gate):
    """Opens by steps of a clamp, for all channels alike."""

    def __init__(self, dim: int, dim_source: int, slope: float = 4.0) -> None:
        super().__init__(dim, dim_source)
        self.to_open, self.slope = nn.Linear(dim_source, 1), slope

    def forward(self, source: Tensor, state: Tensor) -> Shares:
        write = (0.5 + self.to_open(source).to(state.dtype) / self.slope).clamp(0, 1)
        return Shares(1 - write, write)


@register_memory("test_mean")
class MeanMemory(MemoryKind):
    """One entry a block, the mean of its keys and values: the last `entries` of them."""

    def __init__(self, config: Config, layer: int, entries: int = 3) -> None:
        super().__init__(config, layer)
        self.width = entries

    def append(self, memory: KV, blocks: KV, span: Any) -> Appended:
        means = [x.unflatten(2, (-1, self.block_width)).mean(3) for x in blocks]
        stream = [torch.cat(pair, dim=2) for pair in zip(memory, means)]  # (b, g, entries + t, e)
        seen = [x.unfold(2, self.width, 1)[:, :, : span.num_blocks].permute(0, 2, 1, 4, 3) for x in stream]
        return Appended(KV(*seen), None, KV(*(x[:, :, -self.width :] for x in stream)))


EXTRA = {"extra_memories": {"test_mean": {"entries": 3, "layers": (1, 3)}}}


def test_a_gate_of_ones_own_serves_and_is_seen() -> None:
    model = random_model(Config(**SIZES, gate="test_hard", gate_options={"slope": 2.0}))
    tokens = random_stream(2, 17)
    whole = model(tokens)
    assert_same(read_in_pieces(model, tokens, [3, 5, 1, 8])[0], whole[0], 1e-9)
    with inspecting(model) as seen:
        model(tokens)
    assert seen[2].keep[0].shape == (2, 3, 1)
    assert gradients(model, {"logits": whole[0]})["layers.1.cell.update.gate.to_open.weight"].any()


def test_a_memory_of_ones_own_gives_the_same_for_any_split() -> None:
    """With the memories in front of it, gradients and ragged rows included."""
    for options in ({}, {"num_xl_blocks": 2}, {"use_compressed_mem": True}, {"positions": "t5"}):
        model = random_model(Config(**SIZES | options, **EXTRA))
        tokens = random_stream(2, 38)
        whole = model(tokens)
        cut = read_in_pieces(model, tokens, [3, 13, 1, 1, 1, 19])
        assert_same(cut[0], whole[0], 1e-9)
        assert_all_same(gradients(model, {"x": cut[0]}), gradients(model, {"x": whole[0]}), 1e-9)
        lengths = torch.tensor([38, 21])
        ragged = model(tokens, lengths=lengths)
        assert_same(ragged[0][1, :21], whole[0][1, :21], 1e-9)
        later = random_stream(2, 9, seed=1)
        for row, n in enumerate(lengths.tolist()):
            alone = model(torch.cat((tokens[row : row + 1, :n], later[row : row + 1]), dim=1))[0][:, n:]
            assert_same(model(later, xl_memories=ragged[1], states=ragged[2])[0][row : row + 1], alone, 1e-9)


def test_a_memory_of_ones_own_matters_and_is_forgotten() -> None:
    model = random_model(Config(**SIZES, **EXTRA))
    plain = BlockRecurrentTransformer.from_weights(Config(**SIZES), model.state_dict())
    tokens = random_stream(2, 24)
    assert_same(plain(tokens[:, :8])[0], model(tokens[:, :8])[0], 1e-12)  # nothing has left the XL memory
    assert (plain(tokens)[0] - model(tokens)[0]).abs().max() > 1e-3
    _, memories, states = model(tokens)
    assert memories.layers[0].past["test_mean"].k.any() and "test_mean" not in memories.layers[1].past
    gone = forget_rows(memories, torch.tensor([True, False]))
    new = random_stream(2, 9, seed=1)
    fresh = model(new[:1], states=type(states)(tuple(x[:1] for x in states.layers)))[0]
    assert_same(model(new, xl_memories=gone, states=states)[0][:1], fresh, 1e-9)


def test_memories_of_one_model_are_refused_by_another() -> None:
    model, plain = random_model(Config(**SIZES, **EXTRA)), random_model(Config(**SIZES))
    _, memories, _ = model(random_stream(1, 9))
    with pytest.raises(ValueError, match=r"layer 1 has the memories \['test_mean', 'xl'\], this model has \['xl'\]"):
        plain(random_stream(1, 1), xl_memories=memories)
    other = random_model(Config(**SIZES, extra_memories={"test_mean": {"entries": 2, "layers": (1, 3)}}))
    with pytest.raises(ValueError, match=r"layer 1, test_mean: shape \(1, 1, 3, 4\)"):
        other(random_stream(1, 1), xl_memories=memories)


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="gate 'fixd' is not one of .*; did you mean 'fixed'"):
        Config(**SIZES, gate="fixd")
    with pytest.raises(ValueError, match="extra_memories 'mean' is not one of"):
        Config(**SIZES, extra_memories={"mean": {}})
    with pytest.raises(ValueError, match="gate 'fixed' is registered already"):
        register_gate("fixed")(type("Other", (Gate,), {}))
    assert register_gate("test_hard")(HardGate) is config.GATES["test_hard"]


# --------------------------------------------------------------------------- modules in the place of the model's own


class Adapter(nn.Module):
    """base(x) + B(A(x)), with neither a weight nor sizes of its own."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        options = {"bias": False, "dtype": base.weight.dtype}
        self.base, self.a = base, nn.Linear(base.in_features, rank, **options)
        self.b = nn.Linear(rank, base.out_features, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


VARIANTS = {
    "default": {}, "dual": {"state_update": "dual", "gate": "lstm"}, "single": {"state_update": "single"},
    "full": {"gate": "full"}, "dynamic": {"positions": "dynamic"}, "relu": {"ff_activation": "relu"},
    "compressed": {"use_compressed_mem": True}, "feedback": {"block_feedback": True},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rows", [1, 3, 32])  # 3 * 2 = dim_hidden / 2, 32 * 2 > 64
def test_every_linear_map_can_be_adapted(name: str, rows: int) -> None:
    """An adapter on every map equals the merged weights: logits, loss in chunks, decoding."""
    model = random_model(Config(**SIZES | VARIANTS[name]))
    adapted, merged = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(1)
    maps = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(maps) >= 14
    for path in maps:
        parent, _, child = path.rpartition(".")
        adapter = Adapter(adapted.get_submodule(path))
        setattr(adapted.get_submodule(parent), child, adapter)
        with torch.no_grad():
            merged.get_submodule(path).weight += adapter.b.weight @ adapter.a.weight
    x = random_stream(2, rows + 1)
    assert_same(adapted(x)[0], merged(x)[0])
    assert (adapted(x)[0] - model(x)[0]).abs().max() > 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGITS_AT_ONCE", 11)
        ours, theirs = adapted(x, return_loss=True)[0], merged(x, return_loss=True)[0]
    assert_same(ours, theirs, spread=1)
    ours.backward()
    assert adapted.to_logits.b.weight.grad.any()
    assert torch.equal(*(one.generate(x, max_new_tokens=9, temperature=0.0) for one in (adapted, merged)))


def weight_normed(head: nn.Module) -> None:
    parametrizations.weight_norm(head)


def pruned(head: nn.Module) -> None:
    prune.random_unstructured(head, "weight", amount=0.5)


def hooked(head: nn.Module) -> None:
    head.register_forward_hook(lambda _module, _inputs, out: out * 0.5)


def frozen(head: nn.Module) -> None:
    head.requires_grad_(False)


@pytest.mark.parametrize("change", [weight_normed, pruned, hooked, frozen])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_in_chunks_is_that_of_whatever_is_in_the_heads_place(change: Any, reduction: str) -> None:
    model, x = random_model(Config(**SIZES)), random_stream(2, 20)
    torch.manual_seed(0)
    change(model.to_logits)

    def run() -> list[Tensor]:
        found = []
        for _ in range(2):  # pruning recomputes its weight in every call
            model.zero_grad()
            loss = model(x, return_loss=True, reduction=reduction)[0]
            loss.backward()
            found = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        return found

    whole = run()
    logits = model(x[:, :-1])[0]
    assert_same(whole[0], F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction=reduction), spread=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "LOGITS_AT_ONCE", 33)
        for one, other in zip(run(), whole, strict=True):
            assert_same(one, other, 1e-12, spread=1)
