"""The training wrapper: one loss a segment, weighted by tokens; what is dropped between them; who gets a gradient."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from strategies import VOCABULARY, random_model, random_stream
from torch import Tensor

import block_recurrent_transformer_pytorch as package
from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Config,
    RecurrentTrainerWrapper,
    RecurrentTrainWrapper,
    detach,
    forget_rows,
    kernels,
)
from block_recurrent_transformer_pytorch.paper import OPTIONS as PAPER

BASE = {
    "num_tokens": VOCABULARY, "dim": 8, "depth": 2, "dim_head": 4, "heads": 2, "ff_dim": 6, "max_seq_len": 8,
    "block_width": 4, "recurrent_layers": (1,), "num_state_vectors": 2,
}  # fmt: skip
PAPER_LIKE = {**PAPER, "qk_norm": "head", "all_layers_qk_rmsnorm": True, "kv_heads": 2}
IGNORE = -100


@cache
def model_of(**options: Any) -> BlockRecurrentTransformer:
    return random_model(Config(**{**BASE, **options}))


def gradients(model: BlockRecurrentTransformer) -> dict[str, Tensor]:
    """And forgets them."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def with_holes(batch: int, n: int) -> Tensor:
    """Tokens of which some are padding: within the first row, the second one's tail, and all of the last row."""
    x = random_stream(batch, n)
    x[0, 3:6] = IGNORE
    x[1, n // 2 :] = IGNORE
    x[-1] = IGNORE
    return x


def by_hand(model: BlockRecurrentTransformer, x: Tensor, cuts: list[int], cut_gradients: bool) -> Tensor:
    """The mean of the losses of all targets of x, read in pieces of the given lengths."""
    inputs = x[:, :-1].masked_fill(x[:, :-1] == IGNORE, 0)
    memories = states = None
    logits = []
    for piece in inputs.split(cuts, dim=1):
        if cut_gradients and memories is not None:
            memories, states = detach(memories), detach(states)
        out, memories, states = model(piece, xl_memories=memories, states=states)
        logits.append(out)
    losses = F.cross_entropy(torch.cat(logits, dim=1).mT, x[:, 1:], ignore_index=IGNORE, reduction="none")
    return losses.sum() / (x[:, 1:] != IGNORE).sum()


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("n", [1, 5, 8, 9, 24, 29])
def test_the_loss_is_the_mean_over_all_targets(n):
    """Whatever the lengths of the segments: 29 tokens are segments of 8, 8, 8 and 5."""
    model, x = model_of(), random_stream(3, n + 1)
    loss = RecurrentTrainWrapper(model)(x)
    cuts = [min(8, n - start) for start in range(0, n, 8)]
    assert_same(loss, by_hand(model, x, cuts, True), 1e-10)
    assert_same(sum(RecurrentTrainWrapper(model).segments(x)), loss, 1e-12)
    assert len(list(RecurrentTrainWrapper(model).segments(x))) == len(cuts)


def test_padding_does_not_count():
    model, x = model_of(), with_holes(4, 22)
    wrapper = RecurrentTrainWrapper(model)
    loss = by_hand(model, x, [8, 8, 5], True)
    assert_same(wrapper(x), loss, 1e-10)
    parts = torch.stack(list(wrapper.segments(x)))
    assert_same(parts.sum(), loss, 1e-10)
    # each part alone: the sum of the losses of its own targets, by the number of all
    counts = [(x[:, 1 + start : 1 + start + 8] != IGNORE).sum() for start in (0, 8, 16)]
    assert len(set(map(int, counts))) == 3
    first = model(x[:, :9], return_loss=True)[0]
    assert_same(parts[0], first * counts[0] / sum(counts), 1e-12)


def test_nothing_but_padding_is_a_loss_of_zero():
    model = model_of()
    loss = RecurrentTrainWrapper(model)(torch.full((2, 20), IGNORE))
    assert loss == 0
    loss.backward()
    assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_another_ignore_index():
    x = with_holes(4, 22)
    same = RecurrentTrainWrapper(model_of(ignore_index=-1))(torch.where(x == IGNORE, -1, x))
    assert_same(same, RecurrentTrainWrapper(model_of())(x), 1e-12)


def test_an_ignore_index_that_is_a_token_is_still_read():
    """A padding token of the vocabulary is no target; as an input it is what it is."""
    model, x = model_of(ignore_index=7), random_stream(4, 9)
    assert (x[:, :-1] == 7).any()
    loss = F.cross_entropy(model(x[:, :-1])[0].mT, x[:, 1:], ignore_index=7)
    assert_same(model(x, return_loss=True)[0], loss, 1e-10)


@pytest.mark.parametrize("seq_len", [1, 3, 4, 7, 8, 50])
def test_segments_of_any_length_have_the_same_loss(seq_len):
    model, x = model_of(), random_stream(2, 25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = RecurrentTrainWrapper(model, seq_len=seq_len)
    assert_same(wrapper(x), by_hand(model, x, [24], True), 1e-9)
    assert len(list(wrapper.segments(x))) == -(-24 // seq_len)


# ------------------------------------------------------------------------------------------------------------ gradients

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "compressed": {"use_compressed_mem": True, "compressed_mem_factor": 2, "max_seq_len": 12},
    "paper": {**PAPER_LIKE, "gate": "lstm", "state_update": "dual", "block_feedback": True},
    "enhanced, read below write": {
        "enhanced_recurrence": True, "recurrent_layers": (2,), "read_recurrent_layers": (1,),
    },
}  # fmt: skip
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_backward_by_segment_gives_the_gradients_of_all(variant):
    model, x = model_of(**VARIANTS[variant]), with_holes(4, 30)
    wrapper = RecurrentTrainWrapper(model)
    for loss in wrapper.segments(x):
        loss.backward()
    one_by_one = gradients(model)
    wrapper(x).backward()
    together = gradients(model)
    size = wrapper.seq_len
    by_hand(model, x, [min(size, 29 - start) for start in range(0, 29, size)], True).backward()
    for name, wanted in gradients(model).items():
        assert_same(one_by_one[name], wanted, 1e-9, name=name)
        assert_same(together[name], wanted, 1e-9, name=name)


@every_variant
def test_gradients_across_segments_are_those_of_one_long_call(variant):
    model, x = model_of(**VARIANTS[variant]), random_stream(2, 30)
    RecurrentTrainWrapper(model, detach_segments=False)(x).backward()
    across = gradients(model)
    model(x, return_loss=True)[0].backward()
    whole = gradients(model)
    RecurrentTrainWrapper(model)(x).backward()
    cut = gradients(model)
    for name, wanted in whole.items():
        assert_same(across[name], wanted, 1e-9, name=name)
    assert any((cut[name] - wanted).abs().max() > 1e-6 for name, wanted in whole.items())


def test_gradients_reach_given_states_only_without_detaching():
    model, x = model_of(), random_stream(2, 20)
    with torch.no_grad():
        _, memories, states = model(random_stream(2, 9, seed=1))
    for detach_segments in (True, False):
        leaf = states._replace(layers=tuple(s.clone().requires_grad_() for s in states.layers), kv=None)
        memories_at_0 = memories._replace(position=memories.position._replace(offset=0))
        wrapper = RecurrentTrainWrapper(model, detach_segments=detach_segments)
        wrapper(x, xl_memories=memories_at_0, states=leaf).backward()
        assert (leaf.layers[0].grad is None) == detach_segments
    model.zero_grad()


@pytest.mark.parametrize("is_read_without_gradients", [False, True])
def test_gradients_do_not_depend_on_prepared_keys(is_read_without_gradients):
    """A segment ends within a block; what decoding keeps ready follows from the rest of what is carried."""
    model, x = model_of(all_layers_qk_rmsnorm=True), random_stream(2, 13)
    found = []
    for keep in (True, False):
        with torch.set_grad_enabled(not is_read_without_gradients):
            _, *carried = model(x[:, :6])
            if is_read_without_gradients:
                _, *carried = model(x[:, 6:7], xl_memories=carried[0], states=carried[1])
        assert (carried[1].kv is not None) == is_read_without_gradients
        memories, states = (detach(value) for value in carried)
        if not keep:
            memories = memories._replace(layers=tuple(layer._replace(ready=None) for layer in memories.layers))
            states = states._replace(kv=None)
        model(x[:, 7:], xl_memories=memories, states=states, return_loss=True)[0].backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert_same(gradient, found[1][name], 1e-9, name=name)


@pytest.mark.filterwarnings("ignore:with segments of 2 tokens")
def test_projections_of_states_are_trained_by_every_segment():
    """Also by one that begins within a block, whose states were projected before."""
    model, x = model_of(), random_stream(2, 2 * 4 + 1)
    seen = []
    for loss in RecurrentTrainWrapper(model, seq_len=2).segments(x):
        loss.backward()
        seen.append(gradients(model)["layers.0.cell.to_kv.weight"])
        model.zero_grad()
    assert len(seen) == 4 and all(gradient.any() for gradient in seen)


def test_a_compiled_model_is_welcome():
    model, x = model_of(), random_stream(2, 13)
    compiled = RecurrentTrainWrapper(torch.compile(model, backend="eager"))
    assert compiled.model is model
    assert_same(compiled(x), RecurrentTrainWrapper(model)(x), 1e-9)


@every_variant
def test_every_parameter_gets_a_gradient(variant):
    """And the constructor warns of nothing."""
    config = Config(**{**BASE, **VARIANTS[variant]})
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper = RecurrentTrainWrapper(model)
    next(wrapper.segments(random_stream(2, wrapper.seq_len + 1))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


UPDATE = r"layers\.0\.cell\.(to_q|cross_norm|self_norm|update)"
UNTRAINED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # options of the model, of the wrapper, what the warning says, the parameters without a gradient
    "one block a segment": (
        {"max_seq_len": 4}, {}, "the state updates", UPDATE,
    ),
    "less than a block": (
        {}, {"seq_len": 3}, "the state updates", UPDATE,
    ),
    "compressed, two blocks a segment": (
        {"use_compressed_mem": True}, {}, "the compressors", r"layers\.\d\.compressor",
    ),
    "compressed, one block a segment": (
        {"use_compressed_mem": True, "max_seq_len": 4}, {}, "the state updates .* and the compressors",
        rf"{UPDATE}|layers\.\d\.compressor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNTRAINED)
def test_parameters_without_a_gradient_are_announced(case):
    options, of_wrapper, words, names = UNTRAINED[case]
    model = BlockRecurrentTransformer(**{**BASE, **options})
    with pytest.warns(UserWarning, match=words) as caught:
        wrapper = RecurrentTrainWrapper(model, **of_wrapper)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "detach_segments=False" in message and "find_unused_parameters=True" in message
    assert f"{wrapper.seq_len} tokens" in message and "blocks of 4" in message
    next(wrapper.segments(random_stream(2, wrapper.seq_len + 1))).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {name for name, _ in model.named_parameters() if re.match(names, name)}
    with warnings.catch_warnings():  # with gradients across segments it is fine
        warnings.simplefilter("error")
        wrapper = RecurrentTrainWrapper(model, detach_segments=False, **of_wrapper)
    model.zero_grad()
    wrapper(random_stream(2, 4 * 4 + 1)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_warning_points_at_the_callers_line():
    model = BlockRecurrentTransformer(**{**BASE, "max_seq_len": 4})
    with pytest.warns(UserWarning) as caught:
        RecurrentTrainWrapper(model)
    assert caught[0].filename == __file__


# --------------------------------------------------------------------------------------- the memory that training needs


class Kept:
    """A tensor kept for the backward pass; counts the elements of all that are alive."""

    alive = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor.detach(), tensor.numel()
        Kept.alive += self.size
        Kept.most = max(Kept.most, Kept.alive)

    def __del__(self) -> None:
        Kept.alive -= self.size


def test_small_models_recompute_nothing(monkeypatch):
    """The calls would cost more than they save; the gradients are the same."""
    model, x, calls, found = model_of(), random_stream(2, 13), [], []
    checkpoint = kernels.checkpoint
    monkeypatch.setattr(kernels, "checkpoint", lambda *given, **how: calls.append(1) or checkpoint(*given, **how))
    for least in (0, 2**18):
        monkeypatch.setattr(kernels, "RECOMPUTED_FROM", least)
        model(x, return_loss=True)[0].backward()
        found.append((len(calls), gradients(model)))
    (many, recomputed), (as_many, plain) = found
    assert 0 < many == as_many
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)


def most_kept(work: Callable[[], None]) -> int:
    """The most elements kept at any time during `work`."""
    Kept.alive = Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        work()
    return Kept.most


@every_variant
def test_activations_do_not_grow_with_the_number_of_segments(variant):
    """A segment that remembers little keeps less; from the third one on nothing grows."""
    wrapper = RecurrentTrainWrapper(model_of(**{**VARIANTS[variant], "max_seq_len": 8}), seq_len=12)

    def train(segments: int) -> None:
        for loss in wrapper.segments(random_stream(2, 12 * segments + 1)):
            loss.backward()
            del loss
        wrapper.transformer.zero_grad()

    assert most_kept(lambda: train(4)) == most_kept(lambda: train(9)) > 0


def test_activations_grow_where_gradients_cross_segments():
    """So the count of the test above does see them."""
    wrapper = RecurrentTrainWrapper(model_of(), detach_segments=False)
    three, six = (most_kept(lambda n=n: wrapper(random_stream(2, 8 * n + 1))) for n in (3, 6))
    assert six > 1.9 * three


# ------------------------------------------------------------------------------------------------------------- dropping


def carried_into(wrapper: RecurrentTrainWrapper, segments: int = 4, batch: int = 6) -> list[dict[str, Any]]:
    """The arguments of each call of the model."""
    calls: list[dict[str, Any]] = []

    def note(_: Any, arguments: Any, options: dict[str, Any]) -> None:
        calls.append({"x": arguments[0], **options})

    handle = wrapper.transformer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        list(wrapper.segments(random_stream(batch, wrapper.seq_len * segments + 1)))
    handle.remove()
    return calls


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses(wrapper: RecurrentTrainWrapper, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack(list(wrapper.segments(x)))


def test_states_dropped_at_rate_1_are_always_fresh():
    model, x = model_of(), random_stream(3, 25)
    wrapper = RecurrentTrainWrapper(model, state_dropout=1.0).train()
    memories, wanted = None, []
    with torch.no_grad():
        for start in range(0, 24, 8):
            loss, memories, _ = model(x[:, start : start + 9], xl_memories=memories, return_loss=True)
            wanted.append(loss / 3)
    assert_same(losses(wrapper, x), torch.stack(wanted), 1e-10)
    assert (losses(wrapper.eval(), x) - torch.stack(wanted)).abs().max() > 1e-6  # dropping is for training only


def test_memories_dropped_at_rate_1_are_always_empty():
    model, x = model_of(), random_stream(3, 25)
    wrapper = RecurrentTrainWrapper(model, xl_memories_dropout=1.0).train()
    states, wanted = None, []
    with torch.no_grad():
        for start in range(0, 24, 8):
            loss, _, states = model(x[:, start : start + 9], states=states, return_loss=True)
            wanted.append(loss / 3)
    assert_same(losses(wrapper, x), torch.stack(wanted), 1e-10)


def test_both_dropped_at_rate_1_leave_segments_alone():
    model, x = model_of(), random_stream(3, 25)
    wrapper = RecurrentTrainWrapper(model, 1.0, 1.0).train()
    with torch.no_grad():
        wanted = [model(x[:, start : start + 9], return_loss=True)[0] / 3 for start in range(0, 24, 8)]
    assert_same(losses(wrapper, x), torch.stack(wanted), 1e-10)


def test_only_complete_blocks_are_dropped():
    """Segments of 6 tokens end within a block of 4: what has been read of it stays, in memory and place."""
    model, x = model_of(), random_stream(3, 13)
    wrapper = RecurrentTrainWrapper(model, xl_memories_dropout=1.0, seq_len=6).train()
    with torch.no_grad():
        first, memories, states = model(x[:, :7], return_loss=True)
        assert memories.position.offset == 2
        memories = forget_rows(memories, torch.ones(3, dtype=torch.bool))
        second, _, _ = model(x[:, 6:], xl_memories=memories, states=states, return_loss=True)
        alone, _, _ = model(x[:, 6:], states=states, return_loss=True)
    assert_same(losses(wrapper, x), torch.stack((first, second)) / 2, 1e-10)
    assert (second - alone).abs() > 1e-6


def test_rows_are_dropped_one_by_one():
    """A dropped row equals one whose stream is dropped as a whole; the others are as without."""
    model, x = model_of(), random_stream(6, 17)
    wrapper = RecurrentTrainWrapper(model, 0.5, 0.5, generator=generator(2)).train()
    random = generator(2)
    torch.rand(6, generator=random)
    calls = carried_into(wrapper, segments=2)
    forget, fresh = calls[1]["xl_memories"].position.extra_blocks == 0, calls[1]["reset_states"]
    assert 0 < forget.sum() < 6 and 0 < fresh.sum() < 6 and not torch.equal(forget, fresh)
    kept_memories, kept_states = model(x[:, :8])[1:]
    for i in range(6):
        row = slice(i, i + 1)
        _, memories, states = model(x[row, :8])
        got = model(
            x[row, 8:], xl_memories=None if forget[i] else memories, states=None if fresh[i] else states,
            return_loss=True,
        )[0]  # fmt: skip
        one = torch.tensor([i])
        with torch.no_grad():
            call = {name: calls[1][name] for name in ("xl_memories", "states", "reset_states")}
            carried = package.select_rows(call["xl_memories"], one), package.select_rows(call["states"], one)
            same = model(
                x[row, 8:], xl_memories=carried[0], states=carried[1], reset_states=fresh[row], return_loss=True
            )[0]
        assert_same(same, got.detach(), 1e-10)
    assert kept_memories.position.full_blocks == 1 and kept_states.kv is None


def test_rates_and_reproducibility():
    model = model_of()

    def dropped(seed: int) -> tuple[Tensor, Tensor]:
        wrapper = RecurrentTrainWrapper(model, 0.3, 0.6, generator=generator(seed)).train()
        calls = carried_into(wrapper, segments=5, batch=200)[1:]
        memories = [call["xl_memories"] for call in calls]
        forgotten = torch.stack([m.layers[0].past["xl"].k.flatten(1).abs().sum(1) == 0 for m in memories])
        return forgotten, torch.stack([call["reset_states"] for call in calls])

    forgotten, fresh = dropped(0)
    assert abs(forgotten.double().mean() - 0.3) < 0.07
    assert abs(fresh.double().mean() - 0.6) < 0.07
    assert abs((forgotten & fresh).double().mean() - 0.18) < 0.06  # one does not decide the other
    assert all(torch.equal(a, b) for a, b in zip(dropped(0), (forgotten, fresh)))
    assert not torch.equal(dropped(1)[0], forgotten)


def test_a_generator_leaves_torchs_own_alone():
    state = torch.get_rng_state()
    carried_into(RecurrentTrainWrapper(model_of(), 0.5, 0.5, generator=generator()).train())
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_dropped_in_eval_mode():
    x = random_stream(4, 25)
    wrapper, plain = RecurrentTrainWrapper(model_of(), 1.0, 1.0).eval(), RecurrentTrainWrapper(model_of()).eval()
    assert torch.equal(losses(wrapper, x), losses(plain, x))


def test_given_memories_and_states_are_dropped_too():
    """They belong to the segment before."""
    model, x = model_of(), random_stream(3, 9)
    with torch.no_grad():
        _, memories, states = model(random_stream(3, 8, seed=3))
        fresh = model(x, return_loss=True)[0]
        wrapper = RecurrentTrainWrapper(model, 1.0, 1.0).train()
        assert_same(wrapper(x, xl_memories=memories, states=states), fresh, 1e-10)
        kept = wrapper.eval()(x, xl_memories=memories, states=states)
    assert (kept - fresh).abs() > 1e-6


# --------------------------------------------------------------------------------------------------- carrying and reset


def test_what_is_returned_continues_the_stream():
    model, x = model_of(), random_stream(2, 33)
    wrapper = RecurrentTrainWrapper(model)
    first, memories, states = wrapper(x[:, :17], return_memories_and_states=True)
    second = wrapper(x[:, 16:], xl_memories=memories, states=states)
    assert_same((first + second) / 2, wrapper(x), 1e-10)
    leaves = torch.utils._pytree.tree_leaves((memories, states))
    assert not any(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))


def test_the_generator_of_losses_returns_memories_and_states():
    wrapper, x = RecurrentTrainWrapper(model_of()), random_stream(2, 20)
    steps = wrapper.segments(x)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            memories, states = end.value
            break
    _, *wanted = wrapper(x, return_memories_and_states=True)
    assert memories.position.offset == wanted[0].position.offset == 3
    for got, same in zip(states.layers, wanted[1].layers):
        assert_same(got, same, 1e-12)


def test_reset_acts_once_before_the_first_segment():
    model, x = model_of(), random_stream(3, 20)
    wrapper = RecurrentTrainWrapper(model)
    with torch.no_grad():
        _, memories, states = model(random_stream(3, 10, seed=4))
        rows = torch.tensor([True, False, True])
        got = wrapper(x, xl_memories=memories, states=states, reset=rows)
        one = torch.tensor([1])
        kept = package.select_rows(memories, one), package.select_rows(states, one)
        parts = [wrapper(x[:1]), wrapper(x[1:2], xl_memories=kept[0], states=kept[1]), wrapper(x[2:])]
    assert_same(got, sum(parts) / 3, 1e-10)


@every_variant
def test_training_reads_no_data(variant, monkeypatch):
    """On the meta device there is none: on a GPU no step would wait for the one before, resets and drops included."""
    with torch.device("meta"):
        model = BlockRecurrentTransformer(**{**BASE, **VARIANTS[variant]})
        x, reset = torch.zeros(2, 26, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)  # activation checkpointing of PyTorch 2.5 asks for it
    wrapper = RecurrentTrainWrapper(model, 0.5, 0.5).train()
    _, memories, states = model(x[:, : wrapper.seq_len])
    for loss in wrapper.segments(x, xl_memories=memories, states=states, reset=reset):
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_empty_lists_are_a_fresh_start():
    wrapper, x = RecurrentTrainWrapper(model_of()), random_stream(2, 20)
    assert torch.equal(wrapper(x, xl_memories=[], states=[]), wrapper(x))


# ---------------------------------------------------------------------------------------------------------------- names


def test_the_old_name():
    assert RecurrentTrainerWrapper is RecurrentTrainWrapper


def test_the_call_of_0_4_4():
    """`wrapper = RecurrentTrainerWrapper(model, xl_memories_dropout=..., state_dropout=...); loss = wrapper(seq)`."""
    model = BlockRecurrentTransformer(**BASE)
    wrapper = RecurrentTrainerWrapper(model, xl_memories_dropout=0.1, state_dropout=0.1)
    loss = wrapper(random_stream(1, 33))
    loss.backward()
    assert loss.shape == ()
    new = wrapper.generate(random_stream(1, 5), length=40, temperature=1.0, filter_thres=0.9)
    assert new.shape == (1, 35)


def test_the_models_parameters_are_the_wrappers():
    wrapper = RecurrentTrainWrapper(model_of())
    assert [name for name, _ in wrapper.named_parameters()] == [
        f"transformer.{name}" for name, _ in model_of().named_parameters()
    ]


def test_importing_it_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RecurrentTrainWrapper(model_of())
        RecurrentTrainWrapper(model_of(recurrent_layers=(), max_seq_len=4))  # no state that could lack a gradient
