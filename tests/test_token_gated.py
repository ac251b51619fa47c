"""Token-gated writes against a reading token by token, and what they promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle, assert_all_same, assert_same, carried, gradients, read_in_pieces, remembered
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config
from block_recurrent_transformer_pytorch.token_gated import in_sequence

WIDTH = 4
BASE = {
    "num_tokens": 17, "dim": 12, "depth": 2, "heads": 4, "kv_heads": 2, "dim_head": 6, "block_width": WIDTH,
    "max_seq_len": WIDTH, "recurrent_layers": (2,), "num_state_vectors": 5, "state_update": "token_gated",
    "gate": "hard",
}  # fmt: skip


def make_model(**options: object) -> BlockRecurrentTransformer:
    """In float64, with some gates open and some closed."""
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(**BASE | options).double().eval()
    with torch.no_grad():
        for layer in model.layers:
            for name, parameter in layer.named_parameters():
                if name.endswith("to_write.weight"):
                    parameter.mul_(12)
    return model


def stream(rows: int, length: int) -> Tensor:
    return torch.randint(BASE["num_tokens"], (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [
    {}, {"qk_norm": "none"}, {"qk_norm": "head"}, {"num_xl_blocks": 0}, {"num_xl_blocks": 2}, {"write_span": 1},
    {"write_span": 6}, {"gate": "full"}, {"gate": "lstm"}, {"matching_init": True}, {"kv_heads": 4},
    {"attention_window": "sliding"}, {"empty_memory": "zeros"}, {"recurrent_layers": (1, 2)}, {"norm": "rms"},
    {"recurrent_layers": (2,), "read_recurrent_layers": (1,)}, {"block_feedback": True},
    {"state_update": "skip"}, {"state_update": "dual", "gate_options": {"per": "state"}}, {"block_width": 1},
])  # fmt: skip
def test_it_is_the_naive_reading(options: dict) -> None:
    """Token by token: outputs, what is carried, gradients."""
    model, tokens = make_model(**options), stream(1, 4 * WIDTH + 2)
    oracle = Oracle(model.config, dict(model.named_parameters()))
    expected = {"logits": oracle.read(tokens[0].tolist())}
    logits, memories, states = model(tokens)
    results = {"logits": logits[0], **carried(model.config, memories, states, 0)}
    expected |= remembered(oracle)
    assert_all_same(results, expected, 1e-10)
    assert_all_same(gradients(model, results), gradients(model, expected), 1e-9)


def inside(model: BlockRecurrentTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (1, g, w, e) that the second layer makes of the last block of tokens."""
    caught: list[tuple[Tensor, Tensor]] = []
    handle = model.layers[1].cell.register_forward_pre_hook(lambda _, given: caught.append(given[2]))
    model(tokens)
    handle.remove()
    k, v = (x[:, -1, :, 3:] for x in caught[-1])
    return k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writes_in_sequence(dtype: torch.dtype) -> None:
    """Those of one, and of none, are exact."""
    w = torch.rand(2, 7, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    w[0, 3, 1], w[1, :, 2] = 1, 0
    state, values = torch.randn(2, 5, 3, dtype=dtype), torch.randn(2, 7, 3, dtype=dtype)
    expected = state
    for j in range(7):
        expected = expected + w[:, j, :, None] * (values[:, j, None] - expected)
    keep, shares = in_sequence(w)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_same(keep[..., None] * state + shares.transpose(1, 2) @ values, expected, tolerance)
    assert (keep[1, 2] == 1).all() and not shares[1, :, 2].any()
    assert ((keep >= 0) & (keep <= 1)).all()
    assert (keep + shares.sum(1) - 1).abs().max() < 1e-6


def test_in_sequence_has_finite_gradients_at_its_ends() -> None:
    w = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.5]]], dtype=torch.float64, requires_grad=True)
    keep, shares = in_sequence(w)
    (keep.sum() + shares.square().sum()).backward()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("cuts", [[1] * 22, [3, 1, 8, 10], [22]])
@pytest.mark.parametrize("options", [
    {}, {"recurrent_layers": (1, 2)}, {"num_xl_blocks": 0}, {"num_xl_blocks": 2}, {"write_span": 1},
    {"write_span": 7}, {"write_span": 7, "num_xl_blocks": 2}, {"block_width": 1, "num_xl_blocks": 2},
])  # fmt: skip
def test_any_split_gives_the_same(cuts: list[int], options: dict) -> None:
    model, tokens = make_model(**options), stream(2, 22)
    whole, _, states = model(tokens)
    parts, _, after = read_in_pieces(model, tokens, cuts)
    assert_same(parts, whole, 1e-10)
    for one, other in zip(after.layers, states.layers):
        assert_same(one, other, 1e-10)


def test_rows_of_different_lengths_and_resets_are_rows_alone() -> None:
    model, tokens = make_model(), stream(3, 3 * WIDTH)
    lengths = torch.tensor([5, 12, 3])
    _, memories, states = model(tokens, lengths=lengths)
    more, reset = stream(3, 7), torch.tensor([False, True, False])
    out, _, after = model(more, xl_memories=memories, states=states, reset=reset)
    for row in range(3):
        past = tokens[row : row + 1, : lengths[row]] if not reset[row] else tokens[:1, :0]
        expected, _, alone = model(torch.cat((past, more[row : row + 1]), dim=1))
        assert_same(out[row], expected[0, -7:], 1e-10)
        assert_same(after.layers[0][row], alone.layers[0][0], 1e-10)


def test_a_closed_gate_keeps_the_state_exactly() -> None:
    """However much is read; in single precision."""
    model = make_model().float()
    with torch.no_grad():
        _, memories, states = model(stream(2, 5 * WIDTH))
        model.layers[1].cell.gate.to_write.bias.fill_(-1e4)
        after = model(stream(2, 100 * WIDTH), xl_memories=memories, states=states)[2]
    assert torch.equal(after.layers[0], states.layers[0])


def test_noise_moves_gates_in_training_alone() -> None:
    model, tokens = make_model(), stream(2, 3 * WIDTH)
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model = make_model(gate_options={"noise": 0.0}).train()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_matching_initial_values_find_what_was_written() -> None:
    """A token that wrote by its key is found by the same key: its state has the greatest share of the read."""
    torch.manual_seed(0)
    sizes = {"dim": 48, "heads": 2, "kv_heads": 1, "dim_head": 24}
    model = BlockRecurrentTransformer(**BASE | sizes | {"matching_init": True}).double().eval()
    tokens, cell = torch.tensor([[3, 11, 7, 0]]), model.layers[1].cell
    with torch.no_grad():
        cell.initial.zero_()
        cell.gate.to_write.weight.zero_()
        cell.gate.to_write.bias.fill_(3.0)  # all gates are open: the last token is written behind all others
        state = model(tokens)[2].layers[0]
        k = F.normalize(inside(model, tokens)[0][0, 0, -1], dim=-1)
        before, after = (F.normalize(cell.project(one)[0][0, 0], dim=-1) @ k for one in (cell.initial[None], state))
    assert (after > before).all() and (after - before).mean() > 0.2


@pytest.mark.parametrize("init", ["torch", "lecun"])
def test_matching_initial_values_are_the_last_word_and_need_no_memory(init: str) -> None:
    """Beside either kind of other initial values; and where weights are to be loaded, on the meta device."""
    config = Config(**BASE, matching_init=True, init=init)
    model = BlockRecurrentTransformer(config)
    keys = model.layers[1].to_qkv.weight[-24:]
    assert torch.equal(model.layers[1].cell.to_kv.weight, keys)
    assert_same(keys.t() @ keys, torch.eye(12), 1e-5)
    loaded = BlockRecurrentTransformer.from_weights(config, model.state_dict())
    assert torch.equal(loaded(stream(1, 9))[0], model.eval()(stream(1, 9))[0])


def test_the_ordinary_cell_can_begin_with_matching_values() -> None:
    model = BlockRecurrentTransformer(**BASE | {"state_update": "skip", "matching_init": True})
    cell = model.layers[1].cell
    k = cell.to_kv.weight[:12].view(2, 6, 12)
    assert torch.equal(cell.to_q.weight.view(2, 4, 6, 12), k.repeat_interleave(2, dim=0).expand(2, 4, 6, 12))


def test_hard_gates_of_the_ordinary_cell() -> None:
    """One for each channel or for each state; both close and open exactly."""
    for per, size in (("channel", 12), ("state", 1)):
        model = BlockRecurrentTransformer(**BASE | {"state_update": "skip", "gate_options": {"per": per, "noise": 0.0}})
        gate = model.double().layers[1].cell.update.gate
        source = torch.linspace(-99, 99, 5, dtype=torch.float64)[:, None] * gate.to_write.weight[0]
        keep, write = gate(source, torch.zeros(5, 12, dtype=torch.float64))
        assert write.shape == (5, size)
        logit = (source @ gate.to_write.weight[0] + gate.to_write.bias[0] - 1).detach()
        assert_same(write[:, 0], (0.5 + logit / 4).clamp(0, 1), 1e-12)
        assert torch.equal(keep, 1 - write)
        assert write[0, 0] == 0 and write[-1, 0] == 1


def test_every_parameter_learns_in_one_step() -> None:
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(**BASE)
    model(stream(2, 3 * WIDTH), return_loss=True)[0].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(("options", "message"), [
    ({"gate_options": {"noise": -0.5}}, "noise must be at least 0, not -0.5"),
    ({"gate_options": {"per": "head"}}, "per must be 'channel' or 'state', not 'head'"),
    ({"gate": "fixed"}, "state_update='token_gated' needs a gate that depends on the token"),
    ({"state_reads_memory": True}, "state_update='token_gated'.*state_reads_memory=True"),
    ({"enhanced_recurrence": True}, "state_update='token_gated'.*enhanced_recurrence=True"),
    ({"write_span": 0}, "write_span must be at least 1, not 0"),
    ({"embedding_std": 0.0}, "embedding_std must be a positive number, not 0.0"),
])  # fmt: skip
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockRecurrentTransformer(Config(**BASE | options))
