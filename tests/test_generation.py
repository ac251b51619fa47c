"""Generation is nothing but `forward`, one token at a time: what it says, what it costs, what it leaves behind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from functools import cache
from typing import Any

import pytest
import torch
from oracle import assert_same
from strategies import VOCABULARY, random_model, random_stream
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Config,
    RecurrentTrainWrapper,
    generation,
    select_rows,
)
from block_recurrent_transformer_pytorch.generation import Generation, seen_tokens
from block_recurrent_transformer_pytorch.paper import OPTIONS as PAPER

BASE = {
    "num_tokens": VOCABULARY, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "max_seq_len": 8,
    "block_width": 4, "recurrent_layers": (2,), "num_state_vectors": 2, "use_flash_attn": True,
}  # fmt: skip
# with an output matrix of its own, as a small random model that ties it says one word for ever
PAPER_LIKE = {**PAPER, "qk_norm": "head", "all_layers_qk_rmsnorm": True, "kv_heads": 2, "tie_embeddings": False}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "compressed": {"use_compressed_mem": True, "compressed_mem_factor": 2},
    "paper": PAPER_LIKE,
    "paper, feedback": {**PAPER_LIKE, "block_feedback": True, "gate": "lstm", "state_update": "dual"},
    "enhanced": {"enhanced_recurrence": True, "num_xl_blocks": 2},
    "read below write": {"recurrent_layers": (3,), "read_recurrent_layers": (1,), "positions": "dynamic"},
}
SEEDS = {"paper, feedback": 1}  # models that do not say one word for ever
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def model_of(variant: str) -> BlockRecurrentTransformer:
    return random_model(Config(**{**BASE, **VARIANTS[variant]}), SEEDS.get(variant, 0))


def generate(model: nn.Module, prime: Any, new: int, **options: Any) -> Any:
    """Greedy unless told otherwise."""
    return model.generate(prime, max_new_tokens=new, **{"temperature": 0, **options})


def by_rereading(model: BlockRecurrentTransformer, prompt: Tensor, new: int) -> Tensor:
    """Greedy tokens (b, new), with everything read anew for each of them."""
    tokens = prompt
    for _ in range(new):
        tokens = torch.cat((tokens, model(tokens)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens[:, prompt.shape[1] :]


def same_carried(one: tuple, other: tuple) -> None:
    """Memories and states agree, with places and blocks."""
    for a, b in zip(torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other)):
        if isinstance(a, Tensor) and a.is_floating_point():
            assert_same(a, b, 1e-9)
        else:
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)) if a is not None else b is None


# --------------------------------------------------------------------------------------------------------- what it says


@every_variant
@pytest.mark.parametrize("length", [1, 6])
def test_greedy_equals_reading_everything_anew(variant, length):
    model, prompt = model_of(variant), random_stream(2, length)
    assert torch.equal(generate(model, prompt, 11), by_rereading(model, prompt, 11))


@every_variant
def test_greedy_over_many_blocks(variant):
    """Every new token is the most likely one after all those before it, which one call reads."""
    model, prompt = model_of(variant), random_stream(3, 6)
    new = generate(model, prompt, 36)
    assert len(new.unique()) > 3, "a model that always says the same would hide mistakes"
    with torch.no_grad():
        logits, _, _ = model(torch.cat((prompt, new), dim=1))
    assert torch.equal(logits[:, 5:-1].argmax(-1), new)


@every_variant
def test_ragged_prompts_equal_each_row_alone(variant):
    model, padded = model_of(variant), random_stream(4, 9)
    lengths = torch.tensor([1, 9, 4, 6])
    rows = [row[:count] for row, count in zip(padded, lengths)]
    together = generate(model, rows, 10)
    assert torch.equal(together, torch.cat([generate(model, row[None], 10) for row in rows]))
    assert torch.equal(generate(model, padded, 10, lengths=lengths), together)  # whatever the padding holds


@every_variant
def test_continuing_equals_one_go(variant):
    """The last token of each row is not read yet, so the next prompt begins with it."""
    model, prompt = model_of(variant), random_stream(3, 5)
    whole, *after_whole = generate(model, prompt, 17, return_memories_and_states=True)
    tokens, carried, said = prompt, (None, None), []
    for new in (1, 6, 3, 7):
        new_tokens, *carried = generate(
            model, tokens, new, xl_memories=carried[0], states=carried[1], return_memories_and_states=True
        )
        said.append(new_tokens)
        tokens = new_tokens[:, -1:]
    assert torch.equal(torch.cat(said, dim=1), whole)
    same_carried(tuple(carried), tuple(after_whole))


@every_variant
def test_what_is_carried_is_what_was_read(variant):
    model, prompt = model_of(variant), random_stream(2, 5)
    new, *carried = generate(model, prompt, 10, return_memories_and_states=True)
    with torch.no_grad():
        read = model(torch.cat((prompt, new[:, :-1]), dim=1))[1:]
    assert carried[0].position.offset == read[0].position.offset == 14 % 4
    same_carried(tuple(carried), read)


@every_variant
def test_continuing_rows_that_stopped_earlier(variant):
    """Ragged prompts; rows stop at different times; a new line for each; each row equals what it says alone."""
    model = model_of(variant)
    rows = [row[:count] for row, count in zip(random_stream(4, 7), (2, 7, 4, 5))]
    said, *carried = generate(model, rows, 12, stop_tokens=STOPS, return_memories_and_states=True)
    ends = [count_until_stop(row, STOPS) for row in said]
    assert len(set(ends)) > 1, "no row stopped earlier"
    follow = random_stream(4, 3, seed=5)
    prompts = [torch.cat((row[end - 1 : end], more)) for row, end, more in zip(said, ends, follow)]
    again = generate(model, prompts, 9, xl_memories=carried[0], states=carried[1])
    for row, new, end, more, now in zip(rows, said, ends, follow, again):
        assert torch.equal(generate(model, torch.cat((row, new[:end], more))[None], 9)[0], now)


# ------------------------------------------------------------------------------------------------- stopping and padding

STOPS = (0, 3, 5)


def count_until_stop(row: Tensor, stops: tuple[int, ...]) -> int:
    """Tokens up to the first stop token, that one included."""
    found = [i for i, token in enumerate(row.tolist()) if token in stops]
    return found[0] + 1 if found else len(row)


@pytest.mark.parametrize(
    ("variant", "stops"),
    [*((variant, STOPS) for variant in VARIANTS), ("default", 3), ("default", (3,)), ("default", [5])],
)
def test_stop_tokens(variant, stops):
    model, prompt = model_of(variant), random_stream(6, 5)
    free, cut = generate(model, prompt, 12), generate(model, prompt, 12, stop_tokens=stops, pad_token=9)
    stops = (stops,) if isinstance(stops, int) else tuple(stops)
    ends = [count_until_stop(row, stops) for row in free]
    assert cut.shape[1] == max(ends)
    for row, whole, end in zip(cut, free, ends):
        assert torch.equal(row[:end], whole[:end])
        assert (row[end:] == 9).all()


def test_a_row_that_stopped_reads_nothing_more():
    model, prompt = model_of("default"), random_stream(6, 5)
    cut, memories, states = generate(model, prompt, 12, stop_tokens=STOPS, return_memories_and_states=True)
    ends = [count_until_stop(row, STOPS) for row in cut]
    assert len(set(ends)) > 1
    for i, end in enumerate(ends):
        _, *alone = generate(model, prompt[i : i + 1], end, return_memories_and_states=True)
        row = torch.tensor([i])
        offset = memories.position.offset
        place = offset if isinstance(offset, int) else int(offset[i])
        assert place == alone[0].position.offset
        one = select_rows(memories, row), select_rows(states, row)
        logits = [model(prompt[:1], xl_memories=m, states=s)[0] for m, s in (one, alone)]
        assert_same(*logits, 1e-9)


def test_all_rows_stopped():
    model, prompt = model_of("default"), random_stream(3, 5)
    first = generate(model, prompt, 1)
    stopped = generate(model, prompt, 1000, stop_tokens=first[:, 0].tolist())
    assert torch.equal(stopped, first)


def test_pad_token_may_be_a_stop_token():
    model, prompt = model_of("default"), random_stream(6, 5)
    cut = generate(model, prompt, 12, stop_tokens=STOPS, pad_token=3)
    assert torch.equal(cut, generate(model, prompt, 12, stop_tokens=STOPS, pad_token=9).where(cut != 3, cut))


# --------------------------------------------------------------------------------------------------------------- length


def test_length_counts_the_prompt():
    model, prompt = model_of("default"), random_stream(2, 5)
    greedy = {"temperature": 0}
    assert torch.equal(model.generate(prompt, 12, **greedy), generate(model, prompt, 7))
    assert torch.equal(model.generate(prompt, length=6, **greedy), generate(model, prompt, 1))
    assert model.generate(prompt, **greedy).shape == (2, BASE["max_seq_len"] + 1 - 5)  # 0.4.4's default


def test_length_of_ragged_prompts():
    """Each row gets what its own prompt leaves; the shorter rows of the result are padded."""
    model = model_of("default")
    rows = [row[:count] for row, count in zip(random_stream(3, 7), (2, 7, 4))]
    new = model.generate(rows, 10, temperature=0, pad_token=9)
    assert new.shape == (3, 8)
    for row, said in zip(rows, new):
        count = 10 - len(row)
        assert torch.equal(said[:count], generate(model, row[None], count)[0])
        assert (said[count:] == 9).all()


def test_prompts_of_any_integer_type_and_layout():
    model, prompt = model_of("default"), random_stream(2, 6)
    wanted = generate(model, prompt[:, ::2], 5)
    for same in (prompt[:, ::2].int(), prompt.t().contiguous().t()[:, ::2], prompt[:, ::2].contiguous()):
        assert torch.equal(generate(model, same, 5), wanted)
    assert wanted.dtype == torch.int64


# ------------------------------------------------------------------------------------------------ several continuations


def test_num_return_sequences_is_row_major():
    model, prompt = model_of("default"), random_stream(2, 5)
    three = generate(model, prompt, 8, num_return_sequences=3)
    assert torch.equal(three, generate(model, prompt, 8).repeat_interleave(3, dim=0))
    ragged = [prompt[0], prompt[1, :2]]
    three = generate(model, ragged, 8, num_return_sequences=3)
    assert torch.equal(three, generate(model, ragged, 8).repeat_interleave(3, dim=0))


def test_several_samples_differ_and_come_from_their_own_prompt():
    model, prompt = model_of("default"), random_stream(2, 5)
    sampled = generate(
        model, prompt, 8, temperature=1.0, top_k=8, num_return_sequences=4, generator=torch.Generator().manual_seed(0)
    )
    repeated = generate(
        model, prompt.repeat_interleave(4, dim=0), 8, temperature=1.0, top_k=8,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(sampled, repeated)
    assert len(sampled[:4].unique(dim=0)) > 1


def test_several_continuations_with_length_and_memories():
    model = model_of("compressed")
    rows = [row[:count] for row, count in zip(random_stream(2, 7), (3, 6))]
    new, memories, states = model.generate(
        rows, 9, temperature=0, num_return_sequences=2, return_memories_and_states=True
    )
    assert new.shape == (4, 6)
    assert states.layers[0].shape[0] == memories.layers[0].past["xl"].k.shape[0] == 4
    assert torch.equal(new[::2], new[1::2])


def test_beam_search_by_select_rows():
    """Beams kept with select_rows are scored as when read from the beginning."""
    model, prompt = model_of("enhanced"), random_stream(1, 6)
    beams, width = prompt.expand(3, -1), 3
    with torch.no_grad():
        out, memories, states = model(beams, logits_to_keep=1)
        scores = torch.tensor([0.0, -1e9, -1e9], dtype=torch.float64)
        for _ in range(9):
            total = (scores[:, None] + out[:, -1].log_softmax(-1)).flatten()
            scores, chosen = total.topk(width)
            rows, tokens = chosen // VOCABULARY, chosen % VOCABULARY
            beams = torch.cat((beams[rows], tokens[:, None]), dim=1)
            memories, states = select_rows(memories, rows), select_rows(states, rows)
            out, memories, states = model(tokens[:, None], xl_memories=memories, states=states)
        logits = model(beams)[0][:, 5:-1].log_softmax(-1)
    anew = logits.gather(2, beams[:, 6:, None]).sum((1, 2))
    assert len(beams.unique(dim=0)) == width
    assert_same(scores, anew, 1e-9)


# ----------------------------------------------------------------------------------------------------------- randomness


def test_a_generator_makes_it_reproducible():
    model, prompt = model_of("default"), random_stream(2, 5)

    def sample(seed: int) -> Tensor:
        return generate(model, prompt, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(0), sample(0))
    assert any(not torch.equal(sample(0), sample(seed)) for seed in range(1, 4))


def test_the_filter_of_0_4_4_is_the_default():
    model, prompt = model_of("default"), random_stream(2, 5)

    def sample(**options: Any) -> Tensor:
        return generate(model, prompt, 12, temperature=1.0, generator=torch.Generator().manual_seed(0), **options)

    assert torch.equal(sample(), sample(filter_thres=0.9))
    assert not torch.equal(sample(), sample(filter_thres=0.0))
    assert torch.equal(sample(top_p=1.0), sample(filter_thres=0.0))  # any filter of the caller's replaces it


def test_repetition_penalty_sees_prompt_and_continuation():
    model, tokens = model_of("default"), random_stream(1, 3)
    new = generate(model, tokens, 12, repetition_penalty=1.5)
    for _ in range(12):
        logits = model(tokens)[0][0, -1]
        punished = torch.where(logits > 0, logits / 1.5, logits * 1.5)
        seen = torch.isin(torch.arange(VOCABULARY), tokens)
        tokens = torch.cat((tokens, torch.where(seen, punished, logits).argmax().view(1, 1)), dim=1)
    assert torch.equal(tokens[:, 3:], new)
    assert not torch.equal(new, generate(model, random_stream(1, 3), 12))


def test_repetition_penalty_does_not_see_padding():
    model, padded = model_of("default"), random_stream(2, 6)
    lengths = torch.tensor([2, 6])
    ragged = generate(model, padded, 6, lengths=lengths, repetition_penalty=3.0)
    assert torch.equal(ragged[:1], generate(model, padded[:1, :2], 6, repetition_penalty=3.0))


# ------------------------------------------------------------------------------------------------------------ streaming


@every_variant
def test_streaming_yields_the_same(variant):
    model = model_of(variant)
    rows = [row[:count] for row, count in zip(random_stream(3, 7), (2, 7, 4))]
    options = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 5, "stop_tokens": STOPS, "num_return_sequences": 2}
    whole, *carried = model.generate(
        rows, **options, generator=torch.Generator().manual_seed(0), return_memories_and_states=True
    )
    steps, tokens = model.stream(rows, **options, generator=torch.Generator().manual_seed(0)), []
    while True:
        try:
            tokens.append(next(steps))
        except StopIteration as end:
            same_carried(end.value, tuple(carried))
            break
    assert all(token.shape == (6,) for token in tokens)
    assert torch.equal(torch.stack(tokens, dim=1), whole)


def test_streaming_computes_as_it_goes():
    calls = count_calls(model := model_of("default"))
    steps = model.stream(random_stream(1, 5), max_new_tokens=1000, temperature=0)
    assert calls == []
    next(steps)
    assert calls == [5]
    next(steps), next(steps)
    assert calls == [5, 1, 1]
    steps.close()


def test_changing_a_yielded_token_does_not_reach_the_model():
    model, prompt = model_of("default"), random_stream(2, 5)
    said = []
    for token in model.stream(prompt, max_new_tokens=8, temperature=0):
        said.append(token.clone())
        token.zero_()
    assert torch.equal(torch.stack(said, dim=1), generate(model, prompt, 8))


def test_the_wrapper_generates_the_same():
    model, prompt = model_of("default"), random_stream(2, 5)
    wrapper = RecurrentTrainWrapper(model)
    assert torch.equal(wrapper.generate(prompt, 30, temperature=0), generate(model, prompt, 25))
    streamed = torch.stack(list(wrapper.stream(prompt, max_new_tokens=25, temperature=0)), dim=1)
    assert torch.equal(streamed, generate(model, prompt, 25))


# -------------------------------------------------------------------------------------------------------- what it costs


def count_calls(model: BlockRecurrentTransformer) -> list[int]:
    """The numbers of tokens of all later calls of `model`, filled as they come."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].shape[1]))
    HOOKS.append(handle)
    return calls


HOOKS: list[Any] = []


@pytest.fixture(autouse=True)
def remove_hooks():
    yield
    while HOOKS:
        HOOKS.pop().remove()


@every_variant
def test_the_prompt_is_read_once_and_then_each_token_once(variant):
    calls = count_calls(model := model_of(variant))
    generate(model, random_stream(2, 11), 20)
    assert calls == [11] + [1] * 19  # the last one is not read


def test_several_continuations_read_the_prompt_once():
    model, rows = model_of("default"), []
    HOOKS.append(model.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0])))
    generate(model, random_stream(2, 11), 4, num_return_sequences=5)
    assert rows == [2, 10, 10, 10]


class Operators(TorchDispatchMode):
    """Records the name of every operator that runs and the sizes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves(args)
        self.seen.append((str(function), [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]))
        return function(*args, **(kwargs or {}))


@every_variant
def test_a_token_costs_the_same_however_much_was_read(variant):
    """The same operators on tensors of the same sizes, 6 and 20 blocks into a stream."""
    model, costs = model_of(variant), []
    with torch.no_grad():
        for blocks in (6, 20):
            _, memories, states = model(random_stream(1, 4 * blocks))
            with Operators() as operators:
                for _ in range(4):
                    _, memories, states = model(random_stream(1, 1), xl_memories=memories, states=states)
            costs.append(operators.seen)
    assert costs[0] == costs[1]
    assert len(costs[0]) > 100


def test_what_is_carried_holds_nothing_else():
    """After a long prompt, too: no tensor keeps a larger one alive, and none is saved with it."""
    model = model_of("default")
    with torch.no_grad():
        _, memories, states = model(random_stream(1, 200))
    for tensor in torch.utils._pytree.tree_leaves((memories, states)):
        if isinstance(tensor, Tensor):
            assert tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()


@every_variant
def test_decoding_reads_no_data(variant):
    """On the meta device there is none: on a GPU nothing would wait for the token before."""
    with torch.device("meta"):
        model = BlockRecurrentTransformer(**{**BASE, **VARIANTS[variant]}).eval()
        prompt = torch.zeros(2, 5, dtype=torch.long)
    filters = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    assert generate(model, prompt, 5, num_return_sequences=2, **filters).shape == (4, 5)


def test_only_the_last_logits_of_a_prompt_are_made():
    model, sizes = model_of("default"), []
    HOOKS.append(model.to_logits.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape))))
    generate(model, random_stream(2, 11), 3)
    assert sizes == [(2, 1, VOCABULARY)] * 3


# ------------------------------------------------------------------------------------------------ what it leaves behind


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def model_with_dropout() -> BlockRecurrentTransformer:
    return random_model(Config(**BASE, attn_dropout=0.5, ff_dropout=0.5, emb_dropout=0.5)).train()


def test_a_training_model_generates_in_eval_mode_and_trains_on():
    model = model_with_dropout()
    model.layers[1].eval()  # frozen by its owner
    before = modes(model)
    prompt = random_stream(2, 5)
    assert torch.equal(generate(model, prompt, 12), generate(model, prompt, 12))
    assert modes(model) == before
    assert True in before and False in before
    said = generate(model, prompt, 12)
    assert torch.equal(said, generate(model.eval(), prompt, 12))
    assert not any(modes(model))


class Boom(Exception):
    pass


def test_modes_come_back_after_an_exception():
    model = model_with_dropout()
    model.norm.eval()
    before = modes(model)
    calls = []

    def explode(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Boom

    HOOKS.append(model.layers[2].register_forward_hook(explode))
    with pytest.raises(Boom):
        generate(model, random_stream(2, 5), 12)
    assert modes(model) == before
    assert torch.is_grad_enabled()


def test_between_streamed_tokens_the_model_is_as_it_was():
    model = model_with_dropout()
    before, prompt = modes(model), random_stream(2, 5)
    said = []
    for token in model.stream(prompt, max_new_tokens=6, temperature=0):
        assert modes(model) == before
        assert torch.is_grad_enabled()
        said.append(token)
        model(prompt, return_loss=True)[0].backward()  # a training step in between changes nothing here
    assert torch.equal(torch.stack(said, dim=1), generate(model, prompt, 6))
    steps = model.stream(prompt, max_new_tokens=6)
    next(steps)
    steps.close()
    assert modes(model) == before


def test_no_gradients_are_made():
    model, prompt = model_of("paper, feedback"), random_stream(2, 5)
    new, memories, states = generate(model, prompt, 6, return_memories_and_states=True)
    leaves = torch.utils._pytree.tree_leaves((new, memories, states))
    assert not any(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))
    assert not any(leaf.is_inference() for leaf in leaves if isinstance(leaf, Tensor))  # training may go on from here
    loss, _, _ = model(prompt, xl_memories=memories, states=states, return_loss=True)
    loss.backward()
    model.zero_grad()


def test_memories_with_a_graph_are_welcome():
    model, prompt = model_of("default"), random_stream(2, 5)
    _, memories, states = model(prompt)
    assert states.layers[0].requires_grad and memories.layers[0].block.k.requires_grad
    new = generate(model, prompt, 6, xl_memories=memories, states=states)
    assert torch.equal(new, generate(model, torch.cat((prompt, prompt), dim=1), 6))


def test_the_callers_values_are_not_changed():
    model, prompt = model_of("compressed"), random_stream(2, 5)
    with torch.no_grad():
        _, memories, states = model(prompt)
    copies = [leaf.clone() for leaf in torch.utils._pytree.tree_leaves((memories, states)) if isinstance(leaf, Tensor)]
    before = prompt.clone()
    first = generate(model, prompt, 15, xl_memories=memories, states=states)
    assert torch.equal(prompt, before)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((memories, states)) if isinstance(leaf, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(copies, leaves))
    assert torch.equal(generate(model, prompt, 15, xl_memories=memories, states=states), first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_any_grad_mode(mode):
    model, prompt = model_of("default"), random_stream(2, 5)
    with mode():
        assert torch.equal(generate(model, prompt, 12), by_rereading(model, prompt, 12))


# ------------------------------------------------------------------------------------------ continuing, for all options

PENALISED = {"repetition_penalty": 1.3}
SAMPLED = {
    "greedy": {"temperature": 0},
    "penalty": {"temperature": 0, **PENALISED},
    "top_k": {"temperature": 0.9, "top_k": 4, **PENALISED},
    "top_p": {"temperature": 1.1, "top_p": 0.8, **PENALISED},
    "min_p": {"temperature": 1.3, "min_p": 0.05, **PENALISED},
    "filter_thres": {"temperature": 1.0, "filter_thres": 0.5, **PENALISED},
}


def as_mask(tokens: Tensor) -> Tensor:
    return seen_tokens(VOCABULARY, tokens)


def as_rows(tokens: Tensor) -> list[Tensor]:
    return list(tokens)


@pytest.mark.parametrize("form", [Tensor.clone, as_rows, as_mask])
@pytest.mark.parametrize("sampled", SAMPLED)
def test_continuing_equals_one_go_for_every_option(sampled, form):
    """With a repetition penalty, too, for which the tokens so far are handed on."""
    model, prompt = model_of("default"), random_stream(3, 5)
    options = SAMPLED[sampled]
    whole = model.generate(prompt, max_new_tokens=24, generator=torch.Generator().manual_seed(3), **options)
    generator, read, carried = torch.Generator().manual_seed(3), prompt, (None, None)
    for new in (1, 11, 12):
        tokens, *carried = model.generate(
            read[:, -1:] if carried[0] else prompt, max_new_tokens=new, xl_memories=carried[0], states=carried[1],
            previous=form(read), generator=generator, return_memories_and_states=True, **options,
        )  # fmt: skip
        read = torch.cat((read, tokens), dim=1)
    assert torch.equal(read[:, 5:], whole)


def test_without_what_came_before_the_penalty_says_otherwise():
    model, prompt = model_of("default"), random_stream(3, 5)
    with torch.no_grad():
        _, memories, states = model(prompt[:, :-1])
    carried = {"xl_memories": memories, "states": states, **PENALISED}
    one_go = generate(model, prompt, 12, **PENALISED)
    assert torch.equal(generate(model, prompt[:, -1:], 12, previous=prompt[:, :-1], **carried), one_go)
    assert not torch.equal(generate(model, prompt[:, -1:], 12, **carried), one_go)


def test_previous_goes_with_several_continuations_and_rows_of_any_length():
    model, prompt = model_of("default"), random_stream(2, 3)
    previous = [torch.tensor([1, 2, 3, 4]), torch.tensor([9])]
    several = generate(model, prompt, 8, previous=previous, num_return_sequences=2, **PENALISED)
    for row, before, said in zip(prompt, previous, several[::2]):
        assert torch.equal(generate(model, row[None], 8, previous=before[None], **PENALISED)[0], said)
    assert torch.equal(several[::2], several[1::2])


@pytest.mark.parametrize(
    ("previous", "words"),
    [
        (torch.zeros(3, 4, dtype=torch.long), "previous holds 3 rows, prime has 2"),
        (torch.zeros(2, 4, dtype=torch.bool), "num_tokens=11"),
        (torch.full((2, 4), 11), "previous holds token ids from 11 to 11"),
        ([torch.zeros(2)] * 2, "previous must be token ids"),
    ],
)
def test_bad_previous(previous, words):
    with pytest.raises(ValueError, match=words):
        model_of("default").generate(random_stream(2, 3), max_new_tokens=2, previous=previous)


# ------------------------------------------------------------------------------------------------------------- options


def test_generate_and_stream_take_one_list_of_options():
    with pytest.raises(TypeError, match="temprature"):
        model_of("default").generate(random_stream(1, 3), max_new_tokens=2, temprature=1.0)
    with pytest.raises(TypeError, match="temprature"):
        model_of("default").stream(random_stream(1, 3), max_new_tokens=2, temprature=1.0)
    options = Generation(temperature=0.5, top_k=3, stop_tokens=(1,))
    with pytest.raises(FrozenInstanceError):
        options.temperature = 1.0
    assert Generation().filter_thres == 0.9 and options.filter_thres is None


# -------------------------------------------------------------------------------------------- several threads, a device


def test_threads_share_a_model_in_training_mode():
    """Each of four says what one says alone, and a training pass beside them keeps its dropout."""
    model = model_with_dropout()
    prompts = [random_stream(2, 5, seed=seed) for seed in range(16)]
    alone = [generate(model, prompt, 12) for prompt in prompts]
    kept, stop = [], threading.Event()

    def train() -> None:
        while not stop.is_set():
            with torch.no_grad():
                a, b = model(prompts[0])[0], model(prompts[0])[0]
            kept.append(not torch.equal(a, b))  # other draws of dropout

    trainer = threading.Thread(target=train)
    trainer.start()
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda prompt: generate(model, prompt, 12), prompts))
    stop.set()
    trainer.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    assert len(kept) > 3 and all(kept)
    assert all(modes(model))


def test_dropout_is_a_matter_of_the_call():
    model, prompt = model_with_dropout(), random_stream(2, 5)
    with torch.no_grad():
        off, trained, on = (model(prompt, use_dropout=use)[0] for use in (False, None, True))
        model.eval()
        assert torch.equal(off, model(prompt)[0])
        assert not torch.equal(off, trained) and not torch.equal(off, on)
        assert not torch.equal(off, model(prompt, use_dropout=True)[0])


@pytest.mark.parametrize("every", [3, 16])
@every_variant
def test_asking_now_and_then_whether_all_have_stopped(variant, every, monkeypatch):
    """As on a device whose answers are waited for: the same tokens, memories and states."""
    model = model_of(variant)
    rows = [row[:count] for row, count in zip(random_stream(6, 7), (2, 7, 4, 5, 3, 6))]
    kinds = [{"max_new_tokens": 21}, {"length": 20}, {"max_new_tokens": 2}]
    for kind in kinds:
        options = {"temperature": 0, "stop_tokens": STOPS, "pad_token": 3, "return_memories_and_states": True, **kind}
        monkeypatch.setattr(generation, "reads_every", lambda device: 1)
        now, *carried = model.generate(rows, **options)
        monkeypatch.setattr(generation, "reads_every", lambda device: every)
        then, *carried_then = model.generate(rows, **options)
        assert torch.equal(now, then)
        follow = [torch.tensor([1, 2, 4])] * 6
        said = [
            generate(model, follow, 6, xl_memories=memories, states=states)
            for memories, states in (carried, carried_then)
        ]
        assert torch.equal(*said)


class Reads(TorchDispatchMode):
    """Counts the times that numbers are asked for, and the tensors that are built of Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        self.count += "_local_scalar_dense" in name or "lift_fresh" in name or "is_nonzero" in name
        return function(*args, **(kwargs or {}))


class Echo(nn.Module):
    """Calls the model outside of `Reads`, so that only the loop's own are counted."""

    def __init__(self, model: BlockRecurrentTransformer) -> None:
        super().__init__()
        self.model, self.config, self.token_emb = model, model.config, model.token_emb

    def forward(self, x: Tensor, **options: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return self.model(x, **options)


@pytest.mark.parametrize(
    ("options", "every", "reads"), [({}, 16, 0), ({"stop_tokens": (0, 3)}, 16, 4), ({"stop_tokens": (0, 3)}, 1, 64)]
)
def test_the_loop_asks_for_nothing(options, every, reads, monkeypatch):
    """64 tokens more of a ragged batch read nothing more from the device, with stop tokens once every 16."""
    monkeypatch.setattr(generation, "reads_every", lambda device: every)
    monkeypatch.setattr(Generation, "__call__", lambda self, logits, *_: torch.ones(3, dtype=torch.long))
    model, prompt, counts = Echo(model_of("default")), random_stream(3, 7), []
    for length in (9, 9 + 64):
        with Reads() as seen:
            generation.generate(model, prompt, length, lengths=torch.tensor([2, 7, 4]), **options)
        counts.append(seen.count)
    assert counts[1] - counts[0] == reads
