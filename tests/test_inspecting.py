"""Looking inside: what is recorded is what happened, and looking changes nothing."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from oracle import Oracle, assert_same
from strategies import random_model, random_stream

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, RecurrentTrainWrapper
from block_recurrent_transformer_pytorch.inspecting import inspecting

SIZES = {
    "num_tokens": 11, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "block_width": 4, "max_seq_len": 8,
    "recurrent_layers": (2,), "num_state_vectors": 3,
}  # fmt: skip


@pytest.mark.parametrize("gate", ["fixed", "lstm", "full"])
@pytest.mark.parametrize("state_update", ["skip", "dual", "single"])
def test_records_are_what_happened(gate: str, state_update: str) -> None:
    """Shares, norms and movements of every block, against states read one block at a time."""
    model = random_model(Config(**SIZES, gate=gate, state_update=state_update))
    tokens = random_stream(2, 12)
    with inspecting(model) as seen, torch.no_grad():
        model(tokens)
    oracle = [Oracle(model.config, dict(model.named_parameters())) for _ in range(2)]
    record, gates = seen[2], 2 if state_update == "dual" else 1
    assert len(record.state_norm) == len(record.write_size) == 3
    assert len(record.keep) == len(record.write) == 3 * gates
    for block in range(3):
        before = torch.stack([one.state[2] for one in oracle])
        for row, one in enumerate(oracle):
            one.read(tokens[row, 4 * block : 4 * block + 4].tolist())
        after = torch.stack([one.state[2] for one in oracle])
        assert_same(record.state_norm[block], after.norm(dim=-1), 1e-9)
        assert_same(record.write_size[block], (after - before).norm(dim=-1), 1e-9)
    if gate != "lstm":
        for keep, write in zip(record.keep, record.write):
            assert_same(keep + write, torch.ones_like(keep))
    assert not seen[1] and not seen[3]


def test_attention_to_states_is_what_tokens_read() -> None:
    """Weights times values are what the attention gave, in calls of any length, decoding included."""
    model = random_model(Config(**SIZES))
    found = []
    model.layer(2).read_norm[0].register_forward_hook(lambda _, inputs, out: found.append((inputs[2], out)))
    with inspecting(model) as seen, torch.no_grad():
        _, memories, states = model(random_stream(2, 6))
        model(random_stream(2, 1), xl_memories=memories, states=states)
    assert len(found) == len(seen[2].state_attention) == 3  # a block, two tokens, one token
    for (values, out), weights in zip(found, seen[2].state_attention):
        assert_same(weights.sum(-1), torch.ones_like(weights[..., 0]), spread=1)
        assert_same(weights @ values, out, 1e-9)


@pytest.mark.parametrize("use_checkpointing", [False, True])
def test_looking_changes_nothing_and_what_is_computed_again_is_not_recorded_again(use_checkpointing: bool) -> None:
    model, x = random_model(Config(**SIZES, use_checkpointing=use_checkpointing)), random_stream(2, 13)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(x, return_loss=True)[0]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = gradients()
    with inspecting(model) as seen:
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert len(seen[2].write_size) == 3
    assert not any(module._forward_hooks for module in model.modules())


def test_only_calls_of_this_thread_are_recorded_and_hooks_go_after_an_error() -> None:
    model = random_model(Config(**SIZES))
    with pytest.raises(KeyError), inspecting(model) as seen:
        other = threading.Thread(target=lambda: model(random_stream(2, 12)))
        other.start()
        other.join()
        assert not any(seen.values())
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_wrappers_can_be_inspected_and_compiled_models_are_refused() -> None:
    model = BlockRecurrentTransformer(**SIZES)
    with inspecting(RecurrentTrainWrapper(model), attention=False) as seen:
        model(random_stream(1, 8))
    assert len(seen[2].keep) == 2 and not seen[2].state_attention
    with pytest.raises(ValueError, match=r"torch\.compile"), inspecting(torch.compile(model)):
        pass
    model.layer(1).compile()
    with pytest.raises(ValueError, match="compiled in place"), inspecting(model):
        pass


def test_nothing_recorded_is_a_warning() -> None:
    model = random_model(Config(**SIZES))
    with pytest.warns(UserWarning, match="nothing was recorded"), inspecting(model, attention=False):
        model(random_stream(1, 3))
    plain = random_model(Config(**SIZES | {"recurrent_layers": ()}))
    with warnings.catch_warnings(), inspecting(plain):
        warnings.simplefilter("error")
        plain(random_stream(1, 3))
