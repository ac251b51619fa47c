"""`score` is log_softmax of one forward, whatever the pieces: by segment, by document, by what was read before."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import assert_same
from strategies import VOCABULARY, random_model, random_stream
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, losses
from block_recurrent_transformer_pytorch.scoring import score

OPTIONS = {
    "num_tokens": VOCABULARY, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "max_seq_len": 8,
    "block_width": 4, "recurrent_layers": (2,), "num_state_vectors": 2,
}  # fmt: skip
MODEL = random_model(Config(**OPTIONS))
LENGTHS = (9, 1, 33, 4, 20, 33, 2)


def in_one_go(tokens: Tensor, model: BlockRecurrentTransformer = MODEL) -> Tensor:
    """(b, n) -> (b, n - 1), by one forward."""
    with torch.no_grad():
        logits = model(tokens[:, :-1])[0].log_softmax(-1)
    return logits.gather(2, tokens[:, 1:, None])[..., 0]


def documents() -> list[Tensor]:
    return [row[:count] for row, count in zip(random_stream(len(LENGTHS), max(LENGTHS)), LENGTHS)]


@pytest.mark.parametrize("segment", [None, 1, 4, 7, 12, 1000])
def test_it_is_log_softmax_of_one_forward_whatever_the_segment(segment):
    tokens = random_stream(3, 41)
    scores = score(MODEL, tokens, segment=segment)
    assert scores.dtype == torch.float64 and not scores.requires_grad
    assert_same(scores, in_one_go(tokens), 1e-10)


@pytest.mark.parametrize("options", [{"use_compressed_mem": True}, {"tie_embeddings": True}])
def test_of_other_models(options):
    model, tokens = random_model(Config(**OPTIONS, **options)), random_stream(2, 30)
    assert_same(score(model, tokens, segment=5), in_one_go(tokens, model), 1e-10)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("segment", [5, 16])
def test_documents_of_many_lengths(rows, segment):
    """Each as if it were alone, in the order in which they were given."""
    scores = score(MODEL, documents(), rows=rows, segment=segment)
    assert [len(one) for one in scores] == [count - 1 for count in LENGTHS]
    for document, own in zip(documents(), scores):
        assert_same(own, in_one_go(document[None])[0] if len(document) > 1 else own, 1e-10)


def test_chunks_of_logits_change_nothing(monkeypatch):
    wanted = score(MODEL, documents())
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 3 * VOCABULARY)
    for one, other in zip(score(MODEL, documents()), wanted):
        assert_same(one, other, 1e-10)


def test_a_first_token_gives_all_of_them_a_probability():
    for document, own in zip(documents(), score(MODEL, documents(), bos=0)):
        assert len(own) == len(document)
        assert_same(own, in_one_go(torch.cat((torch.zeros(1).long(), document))[None])[0], 1e-10)


def test_reading_on():
    """A first half that is read, and a second that begins with its last token."""
    tokens = random_stream(3, 30)
    first, memories, states = score(MODEL, tokens[:, :13], return_memories_and_states=True)
    second = score(MODEL, tokens[:, 12:], xl_memories=memories, states=states)
    assert_same(torch.cat((first, second), dim=1), in_one_go(tokens), 1e-10)


def test_reading_on_with_rows_at_different_places():
    docs, follow = documents(), random_stream(len(LENGTHS), 6, seed=1)
    _, memories, states = score(MODEL, docs, segment=7, return_memories_and_states=True)
    more = [torch.cat((doc[-1:], row)) for doc, row in zip(docs, follow)]
    again = score(MODEL, more, xl_memories=memories, states=states)
    for doc, row, own in zip(docs, follow, again):
        assert_same(own, in_one_go(torch.cat((doc, row))[None])[0, -6:], 1e-10)


def test_nothing_to_judge():
    scores, memories, states = score(MODEL, random_stream(2, 1), return_memories_and_states=True)
    assert scores.shape == (2, 0)
    assert_same(score(MODEL, random_stream(2, 9), xl_memories=memories, states=states), in_one_go(random_stream(2, 9)))


def test_generated_tokens_are_the_most_likely_ones():
    prompt = random_stream(1, 5)
    new = MODEL.generate(prompt, max_new_tokens=10, temperature=0)
    scores = score(MODEL, torch.cat((prompt, new), dim=1))[0, -10:]
    assert (scores > -math.log(VOCABULARY)).all()


def test_half_precision_is_judged_in_fp32():
    model = random_model(MODEL.config).bfloat16()
    assert score(model, random_stream(1, 9)).dtype == torch.float32
    assert score(model, random_stream(1, 1)).dtype == torch.float32


def test_a_model_in_training_mode_has_no_dropout_and_stays_in_it():
    model = random_model(Config(**OPTIONS, ff_dropout=0.5, attn_dropout=0.5, emb_dropout=0.5)).train()
    tokens = random_stream(2, 21)
    scores = score(model, tokens)
    assert model.training
    assert_same(scores, in_one_go(tokens, model.eval()), 1e-10)


def test_memory_is_flat(monkeypatch):
    """No call reads more than a segment, and no logits are more than a chunk."""
    calls, sizes = [], []
    handles = [
        MODEL.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].shape[1])),
        MODEL.to_logits.register_forward_hook(lambda _, __, out: sizes.append(len(out))),
    ]
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * VOCABULARY)
    score(MODEL, random_stream(2, 101), segment=20)
    for handle in handles:
        handle.remove()
    assert calls == [20] * 5 and max(sizes) == 5


WRONG = {
    "segment": ({"segment": 0}, "segment must be at least 1"),
    "rows": ({"rows": 0}, "rows must be at least 1"),
    "bos": ({"bos": VOCABULARY}, "bos=11"),
    "an id": ({"tokens": torch.tensor([[1, 11]])}, "tokens holds token ids from 1 to 11"),
    "an id in a list": ({"tokens": [torch.tensor([1]), torch.tensor([11])]}, r"tokens\[1\] holds"),
    "floats": ({"tokens": torch.zeros(1, 3)}, "tokens must be token ids"),
    "one dimension": ({"tokens": torch.zeros(3).long()}, "tokens must be token ids"),
    "an empty document": ({"tokens": [torch.tensor([1]), torch.tensor([], dtype=torch.long)]}, r"\(0,\)"),
    "no documents": ({"tokens": []}, r"tokens must be .* not \[\]"),
    "numpy": ({"tokens": np.zeros((1, 3), dtype=np.int64)}, "tokens must be"),
    "another batch": ({"states": MODEL.init_states(3)}, "states"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    options, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        score(MODEL, **{"tokens": random_stream(2, 5), **options})
