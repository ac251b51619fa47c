"""The promises, for random configurations and streams, in float64 to 1e-9: any split of a stream gives the same answer,
nothing leaks, everything that travels is a value, and the cost of a token is flat."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Oracle, assert_all_same, assert_same, carried, gradients, read_in_pieces, remembered
from strategies import VOCABULARY, config_options, examples, random_model, random_stream, splits
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, losses
from block_recurrent_transformer_pytorch.carried import Memories, States, detach, forget_rows, select_rows

OPTIONS = config_options()
TOLERANCE = 1e-9


def tries(count: int):
    return settings(max_examples=examples(count))


def said(model: BlockRecurrentTransformer, out: tuple[Tensor, Memories, States], row: int) -> dict[str, Tensor]:
    """Logits, memories and states of one row, by name."""
    logits, memories, states = out
    return {"logits": logits[row]} | carried(model.config, memories, states, row)


def assert_row_is(model, out, row: int, expected, expected_row: int = 0) -> None:
    assert_all_same(said(model, out, row), said(model, expected, expected_row), TOLERANCE, of=f"row {row} ")


def length(data: st.DataObject, config: Config, blocks: int = 4, least: int = 1) -> int:
    """Of a stream, up to so many blocks and a bit."""
    return data.draw(st.integers(least, max(least, min(16, blocks * config.block_width + 1))), label="n")


def row_mask(data: st.DataObject, batch: int, label: str) -> Tensor:
    return torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch), label=label))


def everything(*values: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]


# ------------------------------------------------------------------------ 1 any split of a stream gives the same answer


@tries(25)
@given(OPTIONS, st.data())
def test_any_split_gives_the_same_numbers_and_gradients(options: dict, data: st.DataObject) -> None:
    model = random_model(Config(**options))
    n = length(data, model.config, blocks=5)
    tokens = random_stream(2, n)
    whole = model(tokens)
    pieces = read_in_pieces(model, tokens, data.draw(splits(n), label="split"))
    for row in range(2):
        assert_row_is(model, pieces, row, whole, row)
    expected = gradients(model, said(model, whole, 0))
    assert_all_same(gradients(model, said(model, pieces, 0)), expected, TOLERANCE, of="gradient of ")


@tries(10)
@given(OPTIONS)
def test_one_token_at_a_time_gives_the_same_numbers(options: dict) -> None:
    model = random_model(Config(**options))
    tokens = random_stream(1, 3 * model.config.block_width + 1)
    with torch.no_grad():
        assert_row_is(model, read_in_pieces(model, tokens, [1] * tokens.shape[1]), 0, model(tokens))


# ------------------------------------------------------------------------------------------------------ 2 nothing leaks


@tries(15)
@given(OPTIONS, st.data())
@torch.no_grad()
def test_a_token_never_depends_on_a_later_one(options: dict, data: st.DataObject) -> None:
    model = random_model(Config(**options))
    n = length(data, model.config)
    cuts, at = data.draw(splits(n), label="split"), data.draw(st.integers(0, n - 1), label="changed token")
    tokens = random_stream(2, n)
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % VOCABULARY
    before, after = (read_in_pieces(model, x, cuts)[0] for x in (tokens, changed))
    assert_same(after[:, :at], before[:, :at], TOLERANCE)
    assert (after[:, at] - before[:, at]).abs().max() > 1e-6


@tries(15)
@given(OPTIONS, st.data())
@torch.no_grad()
def test_rows_never_depend_on_each_other(options: dict, data: st.DataObject) -> None:
    """Another row is changed, and rows are taken in another order or twice in the middle of the stream."""
    model = random_model(Config(**options))
    n = length(data, model.config, least=2)
    cut = data.draw(st.integers(1, n - 1), label="cut")
    tokens = random_stream(3, n)
    order = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4), label="rows"))
    first, memories, states = model(tokens[:, :cut])
    memories, states = select_rows(memories, order), select_rows(states, order)
    second, memories, states = model(tokens[order, cut:], xl_memories=memories, states=states)
    out = torch.cat((first[order], second), dim=1), memories, states
    for row, source in enumerate(order.tolist()):
        assert_row_is(model, out, row, model(tokens[source : source + 1]))
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % VOCABULARY
    for row in (0, 2):
        assert_row_is(model, read_in_pieces(model, changed, [cut, n - cut]), row, model(tokens), row)


@tries(20)
@given(OPTIONS, st.data())
@torch.no_grad()
def test_a_row_that_is_reset_is_a_fresh_model_and_the_others_go_on(options: dict, data: st.DataObject) -> None:
    """At a block's boundary and in its middle; then pieces of any length."""
    model = random_model(Config(**options))
    batch, before = 3, length(data, model.config)
    after = length(data, model.config)
    old, new = random_stream(batch, before), random_stream(batch, after, seed=1)
    reset = row_mask(data, batch, "reset")
    cuts = data.draw(splits(after), label="split")
    _, memories, states = model(old)
    first, memories, states = model(new[:, : cuts[0]], xl_memories=memories, states=states, reset=reset)
    logits = [first]
    if cuts[1:]:
        rest, memories, states = read_in_pieces(model, new[:, cuts[0] :], cuts[1:], memories, states)
        logits.append(rest)
    out = torch.cat(logits, dim=1), memories, states
    for row in range(batch):
        alone = old[row : row + 1], new[row : row + 1]
        if reset[row]:
            expected = model(alone[1])
        else:
            whole, *values = model(torch.cat(alone, dim=1))
            expected = whole[:, before:], *values
        assert_row_is(model, out, row, expected)


@tries(20)
@given(OPTIONS, st.data())
def test_each_ragged_row_is_what_it_gives_alone(options: dict, data: st.DataObject) -> None:
    """Calls with different lengths of the rows, none and all among them, resets between, at last single tokens."""
    model = random_model(Config(**options))
    batch, width = data.draw(st.integers(2, 3), label="rows"), model.config.block_width
    documents: list[list[tuple[list[Tensor], list[Tensor]]]] = [[([], [])] for _ in range(batch)]
    memories = states = None
    for call in range(data.draw(st.integers(1, 3), label="calls") + 2):
        ragged = call > 1
        n = data.draw(st.integers(1, 2 * width + 1), label="n") if ragged else 1
        lengths = None
        if ragged or data.draw(st.booleans(), label="some rows wait"):
            lengths = torch.tensor(
                data.draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch), label="lengths")
            )
        reset = row_mask(data, batch, "reset") if call and data.draw(st.booleans(), label="resets") else None
        tokens = random_stream(batch, n, seed=call)
        logits, memories, states = model(tokens, xl_memories=memories, states=states, lengths=lengths, reset=reset)
        assert logits.shape == (batch, n, VOCABULARY)
        for row, held in enumerate([n] * batch if lengths is None else lengths.tolist()):
            assert not logits[row, held:].any()
            if reset is not None and reset[row]:
                documents[row].append(([], []))
            documents[row][-1][0].append(tokens[row, :held])
            documents[row][-1][1].append(logits[row, :held])
    together, alone = {}, {}
    for row, row_documents in enumerate(documents):
        for number, (tokens, logits) in enumerate(row_documents):
            stream = torch.cat(tokens)
            if not len(stream):
                continue
            whole, alone_memories, alone_states = model(stream[None])
            together[f"logits {row} {number}"], alone[f"logits {row} {number}"] = torch.cat(logits), whole[0]
            if number == len(row_documents) - 1:
                actual = carried(model.config, memories, states, row)
                assert_all_same(
                    actual, carried(model.config, alone_memories, alone_states), TOLERANCE, of=f"row {row} "
                )
    assume(together)
    assert_all_same(together, alone, TOLERANCE)
    assert_all_same(gradients(model, together), gradients(model, alone), TOLERANCE, of="gradient of ")


@pytest.mark.parametrize("lengths", [[3, 3], [0, 0], [0, 5], [5, 5], [1, 0]])
@pytest.mark.parametrize("start", [0, 2])
def test_lengths_of_every_kind(lengths: list[int], start: int) -> None:
    """Equal ones below n, none at all, all of them: the output has the shape of x and zeros behind each row."""
    model = random_model(Config(**SMALL))
    tokens, memories, states = random_stream(2, 5), None, None
    if start:
        _, memories, states = model(random_stream(2, start, seed=1))
    out = model(tokens, xl_memories=memories, states=states, lengths=torch.tensor(lengths))
    assert out[0].shape == (2, 5, VOCABULARY)
    for row, held in enumerate(lengths):
        assert not out[0][row, held:].any()
        if start + held:
            stream = (
                torch.cat((random_stream(2, start, seed=1)[row], tokens[row, :held])) if start else tokens[row, :held]
            )
            alone, *values = model(stream[None])
            assert_same(out[0][row, :held], alone[0, start:], TOLERANCE)
            actual = carried(model.config, out[1], out[2], row)
            assert_all_same(actual, carried(model.config, *values), TOLERANCE)


# --------------------------------------------------------------------------------- 3 everything that travels is a value


@tries(15)
@given(OPTIONS, st.data())
def test_a_call_changes_nothing_of_the_callers_and_repeats_itself(options: dict, data: st.DataObject) -> None:
    model = random_model(Config(**options))
    width = model.config.block_width
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2), label="lengths"))
    _, memories, states = model(random_stream(2, width), lengths=lengths if data.draw(st.booleans()) else None)
    tokens, reset = random_stream(2, length(data, model.config), seed=1), row_mask(data, 2, "reset")
    given_to_it = everything(
        tokens, memories, states, reset, dict(model.named_parameters()), dict(model.named_buffers())
    )
    copies, versions = [value.clone() for value in given_to_it], [value._version for value in given_to_it]
    frozen = memories, states
    first = model(tokens, xl_memories=memories, states=states, reset=reset)
    assert [value._version for value in given_to_it] == versions
    assert all(torch.equal(value, copy) for value, copy in zip(given_to_it, copies))
    assert frozen[0] is memories and frozen[1] is states
    again = model(tokens, xl_memories=memories, states=states, reset=reset)
    assert all(torch.equal(a, b) for a, b in zip(everything(again), everything(first), strict=True))
    carried_copies = deepcopy(detach(memories)), deepcopy(detach(states))
    other = deepcopy(model)(tokens, xl_memories=carried_copies[0], states=carried_copies[1], reset=reset)
    assert all(torch.equal(a, b) for a, b in zip(everything(other), everything(first), strict=True))


@tries(10)
@given(OPTIONS, st.data())
@torch.no_grad()
def test_results_share_no_storage_that_a_later_call_writes(options: dict, data: st.DataObject) -> None:
    """What was returned stays as it was while the stream goes on; a stream can be continued twice from one place."""
    model = random_model(Config(**options))
    n = length(data, model.config)
    out = model(random_stream(2, n))
    kept = [value.clone() for value in everything(out)]
    for seed in range(2):
        for cuts in ([1] * model.config.block_width, [2 * model.config.block_width]):
            read_in_pieces(model, random_stream(2, sum(cuts), seed=seed), cuts, out[1], out[2])
    assert all(torch.equal(value, copy) for value, copy in zip(everything(out), kept, strict=True))


@tries(10)
@given(OPTIONS, st.data())
def test_carried_values_are_pytrees(options: dict, data: st.DataObject) -> None:
    model = random_model(Config(**options))
    n = length(data, model.config, least=2)
    cut = data.draw(st.integers(1, n - 1), label="cut")
    tokens = random_stream(2, n)
    _, memories, states = model(tokens[:, :cut])

    def copied(value: Memories | States) -> Memories | States:
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)

    assert isinstance(copied(memories), Memories) and isinstance(copied(states), States)
    copy = model(tokens[:, cut:], xl_memories=copied(memories), states=copied(states))
    plain = model(tokens[:, cut:], xl_memories=memories, states=states)
    assert all(torch.equal(a, b) for a, b in zip(everything(copy), everything(plain), strict=True))


@tries(8)
@given(OPTIONS, st.data())
@torch.no_grad()
def test_what_follows_from_the_rest_can_be_left_out(options: dict, data: st.DataObject) -> None:
    """Prepared keys of the block being filled, and the projected states, are there for speed alone."""
    model = random_model(Config(**options))
    before, after = length(data, model.config), length(data, model.config, 2)
    tokens = random_stream(2, before + after)
    _, memories, states = model(tokens[:, :before])
    layers = tuple(layer._replace(ready=None) for layer in memories.layers)
    expected = model(tokens[:, before:], xl_memories=memories, states=states)
    out = model(tokens[:, before:], xl_memories=memories._replace(layers=layers), states=states._replace(kv=None))
    for row in range(2):
        assert_row_is(model, out, row, expected, row)


@tries(15)
@given(OPTIONS, st.booleans(), st.data())
def test_activation_checkpointing_gives_the_same_gradients(options: dict, training: bool, data: st.DataObject) -> None:
    """With the same random draws in training mode."""
    dropouts = dict.fromkeys(("attn_dropout", "ff_dropout", "emb_dropout", "attn_input_dropout", "output_dropout"), 0.2)
    config = Config(**options, **dropouts)
    n = length(data, config, least=2)
    cut = data.draw(st.integers(1, n - 1), label="cut")
    found = []
    for use_checkpointing in (False, True):
        model = random_model(replace(config, use_checkpointing=use_checkpointing)).train(training)
        torch.manual_seed(0)
        results = said(model, read_in_pieces(model, random_stream(2, n), [cut, n - cut]), 0)
        found.append((results, gradients(model, results)))
    (results, grads), (checkpointed_results, checkpointed_grads) = found
    assert_all_same(checkpointed_results, results, TOLERANCE)
    assert_all_same(checkpointed_grads, grads, TOLERANCE)


def test_activation_checkpointing_recomputes() -> None:
    """Fewer tensors are kept for the backward pass."""

    def saved(use_checkpointing: bool) -> int:
        model, kept = random_model(Config(**SMALL, use_checkpointing=use_checkpointing)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            model(random_stream(2, 12))
        return len(kept)

    assert saved(True) < saved(False) / 2


# ---------------------------------------------------------------------------------------- 4 the cost of a token is flat


class Attended:
    """Counts (query, key) pairs, and the keys of each call, of scaled_dot_product_attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs = self.keys = 0
        real = F.scaled_dot_product_attention

        def counted(q: Tensor, k: Tensor, *arguments: object, **options: object) -> Tensor:
            self.pairs += q.shape[:-1].numel() * k.shape[2]
            self.keys += k.shape[2]
            return real(q, k, *arguments, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)

    def taken(self) -> tuple[int, int]:
        pairs, keys, self.pairs, self.keys = self.pairs, self.keys, 0, 0
        return pairs, keys


def reads_of(config: Config) -> int:
    """How many times the tokens of some layer read a state."""
    if config.block_feedback:
        return config.depth
    return len(config.recurrent_layers)


@tries(12)
@given(OPTIONS)
@torch.no_grad()
def test_one_token_attends_to_a_bounded_number_of_keys(options: dict) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        counts = Attended(monkeypatch)
        model = random_model(Config(**options | {"use_flash_attn": True}))
        config = model.config
        width, state = config.block_width, config.num_state_vectors
        xl = [config.num_xl_blocks * width if layer in config.xl_layers else 0 for layer in range(1, config.depth + 1)]
        further = sum(kind.width for layer in model.layers for kind in layer.extra.values())
        own = sum(x + width + (width // 2 if config.use_compressed_mem else 0) for x in xl)
        bound = own + further + reads_of(config) * state
        writes = sum(
            state + width + (xl[cell - 1] if config.state_reads_memory else 0) for cell in config.recurrent_layers
        )
        memories = states = None
        keys = []
        for token in random_stream(1, 12 * width)[0]:
            _, memories, states = model(token[None, None], xl_memories=memories, states=states)
            keys.append(counts.taken()[1])
            assert keys[-1] <= bound + writes * (len(keys) % width == 0)
        assert keys[-width:] == keys[-2 * width : -width], "a block costs more the later it comes"
        assert all(a <= b for a, b in zip(keys, keys[width:])), "until the memories are full"


@tries(8)
@given(OPTIONS)
@torch.no_grad()
def test_work_of_one_call_grows_in_proportion_to_its_tokens(options: dict) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        counts = Attended(monkeypatch)
        model = random_model(Config(**options | {"use_flash_attn": True}))
        width, pairs = model.config.block_width, []
        for blocks in (12, 18, 24):
            model(random_stream(1, blocks * width))
            pairs.append(counts.taken()[0])
        assert pairs[2] - pairs[1] == pairs[1] - pairs[0]
        is_counted = model.cells or any(layer.routed is None for layer in model.layers)  # routed layers do not `attend`
        assert pairs[1] > pairs[0] or not is_counted


@tries(10)
@given(OPTIONS, st.data())
@torch.no_grad()
def test_what_is_carried_never_grows(options: dict, data: st.DataObject) -> None:
    model = random_model(Config(**options))
    width = model.config.block_width

    def shapes(memories: Memories, states: States) -> tuple:
        parts = [(layer.past, layer.block) for layer in memories.layers]
        return [x.shape for x in everything(parts)], [x.shape for x in everything(states.layers)]

    memories, states = model.init_memories(2), model.init_states(2)
    expected = shapes(memories, states)
    derived = None
    for n in data.draw(st.lists(st.integers(1, 3 * width), min_size=1, max_size=5), label="lengths of calls"):
        _, memories, states = model(random_stream(2, n), xl_memories=memories, states=states)
        assert shapes(memories, states) == expected
        if memories.position.offset:
            now = [x.shape for x in everything([layer.ready for layer in memories.layers], states.kv)]
            derived = derived or now
            assert now == derived
        numbers = [value for value in tree_flatten((memories, states))[0] if not isinstance(value, Tensor)]
        assert all(0 <= value <= width + model.reach for value in numbers if value is not None)


# -------------------------------------------------------------------------------------------------- states and memories

SMALL = {
    "num_tokens": VOCABULARY, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "max_seq_len": 3,
    "block_width": 3, "recurrent_layers": (2,), "num_state_vectors": 2,
}  # fmt: skip


def forget(oracle: Oracle) -> None:
    """No complete block is remembered any more."""
    oracle.xl = Oracle(oracle.config, oracle.parameters).xl
    oracle.compressed, oracle.sinks, oracle.store = ({layer: [] for layer in oracle.layers} for _ in range(3))
    oracle.newest = Oracle(oracle.config, oracle.parameters).newest


def start_state(oracle: Oracle) -> None:
    """The initial state takes the place of the one that the block began with."""
    fresh = Oracle(oracle.config, oracle.parameters)
    oracle.state, oracle.views = fresh.state, fresh.views


def continued(model: BlockRecurrentTransformer, old: Tensor, new: Tensor, change=None) -> dict[str, Tensor]:
    """What the oracle says of `new` when it has read `old` and something was then done to it."""
    oracle = Oracle(model.config, dict(model.named_parameters()))
    oracle.read(old.tolist())
    if change is not None:
        change(oracle)
    return {"logits": oracle.read(new.tolist())} | remembered(oracle)


@tries(12)
@given(OPTIONS, st.data())
@torch.no_grad()
def test_rows_that_forget_lose_the_complete_blocks_alone(options: dict, data: st.DataObject) -> None:
    model = random_model(Config(**options))
    old, new = (random_stream(2, length(data, model.config, 3), seed) for seed in range(2))
    rows = row_mask(data, 2, "rows that forget")
    _, memories, states = model(old)
    out = read_in_pieces(model, new, data.draw(splits(new.shape[1])), forget_rows(memories, rows), states)
    for row in range(2):
        expected = continued(model, old[row], new[row], forget if rows[row] else None)
        assert_all_same(said(model, out, row), expected, TOLERANCE, of=f"row {row} ")


@tries(12)
@given(OPTIONS, st.data())
@torch.no_grad()
def test_states_alone_can_be_reset(options: dict, data: st.DataObject) -> None:
    model = random_model(Config(**options))
    old, new = (random_stream(2, length(data, model.config, 3), seed) for seed in range(2))
    rows = row_mask(data, 2, "rows")
    _, memories, states = model(old)
    out = model(new, xl_memories=memories, states=states, reset_states=rows)
    for row in range(2):
        expected = continued(model, old[row], new[row], start_state if rows[row] else None)
        assert_all_same(said(model, out, row), expected, TOLERANCE, of=f"row {row} ")


@tries(10)
@given(config_options(recurrent_layers=(1,)), st.data())
@torch.no_grad()
def test_states_without_memories_and_memories_without_states(options: dict, data: st.DataObject) -> None:
    """A new window over an old state, whatever the place where that was left; an old window with the first state."""
    model = random_model(Config(**options))
    old, new = (random_stream(1, length(data, model.config, 3), seed) for seed in range(2))
    _, memories, states = model(old)

    def empty(oracle: Oracle) -> None:
        forget(oracle)
        oracle.block = {layer: [] for layer in oracle.layers}

    cases = [({"states": states}, empty), ({"xl_memories": memories}, start_state)]
    for values, change in cases:
        assert_all_same(said(model, model(new, **values), 0), continued(model, old[0], new[0], change), TOLERANCE)


@tries(8)
@given(OPTIONS)
@torch.no_grad()
def test_a_fresh_start_can_be_told_in_four_ways(options: dict) -> None:
    model = random_model(Config(**options))
    tokens = random_stream(2, 2 * model.config.block_width + 1)
    _, memories, states = model(tokens)
    expected = model(tokens)
    starts = [
        {"xl_memories": [], "states": []},
        {"xl_memories": model.init_memories(2), "states": model.init_states(2)},
        {"xl_memories": memories, "states": states, "reset": torch.ones(2, dtype=torch.bool)},
    ]
    for start in starts:
        for row in range(2):
            assert_row_is(model, model(tokens, **start), row, expected, row)


def test_detached_values_are_the_same_without_a_gradient() -> None:
    model = random_model(Config(**SMALL))
    embedding = model.token_emb.weight
    old, new = torch.zeros(1, 7, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)
    _, memories, states = model(old)
    cut = detach(memories), detach(states)
    assert not any(value.requires_grad for value in everything(cut))
    kept = everything(memories, states)
    assert all(torch.equal(a, b) for a, b in zip(everything(cut), kept, strict=True))
    assert any(value.requires_grad for value in kept)
    for (carried_memories, carried_states), flows in ((cut, False), ((memories, states), True)):
        logits = model(new, xl_memories=carried_memories, states=carried_states)[0]
        gradient = torch.autograd.grad(logits.square().sum(), embedding, retain_graph=True)[0]
        assert gradient[0].any() == flows, "the gradient of token 0, which only the old stream holds"
        assert gradient[1].any()


@pytest.mark.parametrize("part", ["states", "xl_memories"])
def test_states_and_memories_matter(part: str) -> None:
    model = random_model(Config(**SMALL))
    _, memories, states = model(random_stream(1, 7))
    values = {"states": states, "xl_memories": memories}
    tokens = random_stream(1, 5, seed=1)
    without = {name: value for name, value in values.items() if name != part}
    assert (model(tokens, **values)[0] - model(tokens, **without)[0]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------- what a call can return


@tries(20)
@given(OPTIONS, st.booleans(), st.data())
@torch.no_grad()
def test_memories_given_away_serve_as_well(options: dict, is_ragged: bool, data: st.DataObject) -> None:
    """Tokens written into the buffers of the memories: the numbers are those of copies, over boundaries of blocks."""
    model, batch, steps = random_model(Config(**options)), 2, 2 * options["block_width"] + 3
    x, start = random_stream(batch, 4), torch.tensor(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=2)))
    _, *copied = model(x, lengths=start if is_ragged else None)
    overwritten = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, copied)
    for token in random_stream(batch, steps, seed=1).split(1, dim=1):
        brings = torch.tensor([1, data.draw(st.integers(0, 1))]) if is_ragged else None
        given = overwritten[0].layers[0].block.k
        expected, *copied = model(token, xl_memories=copied[0], states=copied[1], lengths=brings)
        got, *overwritten = model(
            token, xl_memories=overwritten[0], states=overwritten[1], lengths=brings, overwrite=True
        )
        assert torch.equal(got, expected)
        assert all(torch.equal(one, other) for one, other in zip(tensors(overwritten), tensors(copied)))
        if int(torch.as_tensor(overwritten[0].position.offset).min()) > 1:
            assert overwritten[0].layers[0].block.k is given  # and no copy was made


@torch.no_grad()
def test_memories_of_rows_that_share_their_numbers_are_copied_first() -> None:
    """One stream expanded to several rows: what a row writes must not be seen by the others."""
    model, tokens = random_model(Config(**SMALL)), random_stream(3, 1, seed=1)
    _, *carried = model(random_stream(1, 2))
    shared = tree_map(lambda leaf: leaf.expand(3, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf, carried)
    expected, *after = model(tokens, xl_memories=shared[0], states=shared[1])
    got, *overwritten = model(tokens, xl_memories=shared[0], states=shared[1], overwrite=True)
    assert torch.equal(got, expected)
    assert all(torch.equal(one, other) for one, other in zip(tensors(overwritten), tensors(after)))


def tensors(carried: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(carried)[0] if isinstance(leaf, Tensor)]


@torch.no_grad()
@pytest.mark.parametrize("is_ragged", [False, True])
def test_generation_leaves_the_memories_it_begins_with(is_ragged: bool) -> None:
    sizes = {"num_tokens": VOCABULARY, "dim": 8, "depth": 2, "dim_head": 4, "heads": 2, "max_seq_len": 4}
    model = random_model(Config(**sizes, block_width=4))
    lengths = torch.tensor([3, 1]) if is_ragged else None
    _, memories, states = model(random_stream(2, 6), lengths=lengths)
    _, memories, states = model(random_stream(2, 1), xl_memories=memories, states=states)  # with prepared keys
    before = [leaf.clone() for leaf in tensors((memories, states))]
    out = [
        model.generate(random_stream(2, 1), max_new_tokens=9, temperature=0.0, xl_memories=memories, states=states)
        for _ in range(2)
    ]
    assert torch.equal(*out)
    assert all(torch.equal(one, other) for one, other in zip(before, tensors((memories, states))))


@tries(12)
@given(OPTIONS, st.data())
@torch.no_grad()
def test_logits_to_keep_are_the_last_of_each_row(options: dict, data: st.DataObject) -> None:
    model = random_model(Config(**options))
    n = length(data, model.config)
    tokens, keep = random_stream(2, n), data.draw(st.integers(1, n), label="logits_to_keep")
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2), label="lengths"))
    assume(lengths.max() > 0)
    whole = model(tokens)[0]
    assert_same(model(tokens, logits_to_keep=keep)[0], whole[:, -keep:], TOLERANCE)
    kept = model(tokens, lengths=lengths, logits_to_keep=keep)[0]
    assert kept.shape == (2, keep, VOCABULARY)
    for row, held in enumerate(lengths.tolist()):
        last = whole[row, max(0, held - keep) : held]
        assert_same(kept[row, keep - len(last) :], last, TOLERANCE)
        assert not kept[row, : keep - len(last)].any()


def mean_loss(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy written out, over the targets that count."""
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(picked * counts).sum() / counts.sum().clamp(min=1)


@tries(15)
@given(OPTIONS, st.sampled_from([-100, -1, 3]), st.booleans(), st.data())
def test_loss_is_the_mean_cross_entropy_of_the_targets_that_count(
    options: dict, ignore_index: int, in_chunks: bool, data: st.DataObject
) -> None:
    """`ignore_index` is no target, and read as token 0 if it is no token; what is behind `lengths` does not count."""
    model = random_model(Config(**options, ignore_index=ignore_index))
    n = length(data, model.config)
    tokens = random_stream(2, n + 1)
    tokens[torch.rand(tokens.shape, generator=torch.Generator().manual_seed(n)) < 0.3] = ignore_index
    lengths = None
    if data.draw(st.booleans(), label="ragged"):
        lengths = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2), label="lengths"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        if in_chunks:
            monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 2 * VOCABULARY)
        loss, memories, states = model(tokens, return_loss=True, lengths=lengths)
    read = tokens[:, :-1].clamp(min=0)
    expected = model(read, lengths=lengths)
    counts = tokens[:, 1:] != ignore_index
    if lengths is not None:
        counts &= torch.arange(n) < lengths[:, None]
    by_hand = mean_loss(expected[0], tokens[:, 1:], counts)
    assert_same(loss, by_hand, TOLERANCE)
    for row in range(2):
        assert_all_same(
            carried(model.config, memories, states, row), carried(model.config, *expected[1:], row), TOLERANCE
        )
    results, results_by_hand = ({"loss": value} for value in (loss, by_hand))
    assert_all_same(gradients(model, results), gradients(model, results_by_hand), TOLERANCE, of="gradient of ")


@pytest.mark.parametrize("tie_embeddings", [False, True])
@torch.no_grad()
def test_hidden_states_times_the_output_map_are_the_logits(tie_embeddings: bool) -> None:
    model = random_model(Config(**SMALL, tie_embeddings=tie_embeddings))
    tokens = random_stream(2, 7)
    hidden = model(tokens, return_hidden=True)[0]
    weight = model.token_emb.weight / math.sqrt(model.config.dim) if tie_embeddings else model.to_logits.weight
    assert_same(hidden @ weight.T, model(tokens)[0], TOLERANCE)
