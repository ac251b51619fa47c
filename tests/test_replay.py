"""Replay gives the gradients of plain back-propagation through all segments."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, RecurrentTrainWrapper, paper
from block_recurrent_transformer_pytorch.replay import replay_backward

SMALL = {"num_tokens": 11, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "max_seq_len": 8, "block_width": 4,
         "num_state_vectors": 3}  # fmt: skip
PAPER = {**paper.OPTIONS, "qk_norm": "head", "all_layers_qk_rmsnorm": True, "kv_heads": 2}
VARIANTS = {
    "default": {},
    "two recurrent, one read below": {"recurrent_layers": (2, 3), "read_recurrent_layers": (1, 3)},
    "compressed": {"use_compressed_mem": True, "compressed_mem_factor": 2},
    "enhanced": {"enhanced_recurrence": True},
    "dynamic positions": {"positions": "dynamic"},
    "dropout": {"attn_dropout": 0.2, "ff_dropout": 0.3, "emb_dropout": 0.1},
    "fixed:skip": PAPER,
    "lstm:dual": {**PAPER, "gate": "lstm", "state_update": "dual"},
    "full:single": {**PAPER, "gate": "full", "state_update": "single"},
    "feedback": {**PAPER, "block_feedback": True},
}


def make(options, **wrapping):
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(**SMALL | options).double()
    twin = copy.deepcopy(model)
    plain = RecurrentTrainWrapper(model, detach_segments=False, **wrapping)
    return plain, RecurrentTrainWrapper(twin, detach_segments=False, **wrapping)


def assert_same_gradients(one, other):
    pairs = list(zip(one.named_parameters(), other.parameters()))
    assert pairs
    for (name, a), b in pairs:
        assert a.grad is not None and b.grad is not None, name
        assert (a.grad - b.grad).abs().max() < 1e-10, name


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_gradients_loss_and_carried_values_are_those_of_full_backpropagation(options, length=21):
    plain, replayed = make(options)
    x = torch.randint(0, 11, (2, length + 1))
    x[1, 14:] = -100
    reset = torch.tensor([True, False])
    with torch.no_grad():
        _, memories, states = plain.model(torch.randint(0, 11, (2, 6)))

    torch.manual_seed(1)
    loss, m1, s1 = plain(x, xl_memories=memories, states=states, reset=reset, return_memories_and_states=True)
    (loss * 3).backward()
    end = torch.get_rng_state()
    torch.manual_seed(1)
    again, m2, s2 = replay_backward(replayed, x, xl_memories=memories, states=states, reset=reset, scale=3.0)

    assert torch.equal(torch.get_rng_state(), end)
    assert abs(loss - again) < 1e-12
    assert_same_gradients(plain, replayed)
    for a, b in zip(tree_leaves((m1, s1)), tree_leaves((m2, s2))):
        if isinstance(a, torch.Tensor):
            assert torch.allclose(a, b, rtol=0, atol=1e-10) and not b.requires_grad
        else:
            assert a == b


def test_the_gradient_through_memories_that_were_given_is_not_lost():
    plain, replayed = make({})
    first, x = torch.randint(0, 11, (2, 8)), torch.randint(0, 11, (2, 25))
    for wrapper, backward in ((plain, None), (replayed, replay_backward)):
        _, memories, states = wrapper.model(first)
        if backward is None:
            wrapper(x, xl_memories=memories, states=states).backward()
        else:
            backward(wrapper, x, xl_memories=memories, states=states)
    assert_same_gradients(plain, replayed)


def test_memories_and_states_dropped_between_segments_are_the_same_in_the_second_pass():
    wrapping = {"xl_memories_dropout": 0.5, "state_dropout": 0.5}
    plain, replayed = make({}, **wrapping)
    x = torch.randint(0, 11, (4, 33))
    for wrapper in (plain, replayed):
        wrapper.generator = torch.Generator().manual_seed(3)
    plain(x).backward()
    replay_backward(replayed, x)
    assert_same_gradients(plain, replayed)


def test_all_backward_passes_but_the_last_are_without_synchronisation():
    _, replayed = make({})
    entered = []

    class NoSync:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *error):
            pass

    replay_backward(replayed, torch.randint(0, 11, (1, 25)), no_sync=NoSync)
    assert len(entered) == 2


def test_one_segment_of_activations_lives_at_a_time():
    def most_saved(segments):
        _, replayed = make({})
        live, most = 0, 0

        def pack(tensor):
            nonlocal live, most
            live += 1
            most = max(most, live)
            return Held(tensor)

        class Held:
            def __init__(self, tensor):
                self.tensor = tensor

            def __del__(self):
                nonlocal live
                live -= 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            replay_backward(replayed, torch.randint(0, 11, (1, 8 * segments + 1)))
        return most

    assert most_saved(8) <= most_saved(2)


def test_what_is_returned_does_not_hold_what_was_kept():
    """The memory for the values between segments is taken at once, and goes with them."""
    wrapper, _ = make({})
    _, *after = replay_backward(wrapper, torch.randint(11, (2, 9 * 8 + 1)))
    for leaf in tree_leaves(tuple(after)):
        assert not isinstance(leaf, torch.Tensor) or leaf.untyped_storage().nbytes() <= leaf.nbytes
