"""Log-probabilities of the tokens of documents of any length, at the memory of one segment of them.

    score(model, tokens)                            # (b, n) ids -> (b, n - 1): of each token but the first
    score(model, [one, another], bos=0)             # of each token, after a 0, of documents of any lengths
    score(model, cat(question, answer))[:, -m:]     # of an answer of m tokens

Memories and states are carried through a document, so that its last token is judged after all others. What a stream
loses in bits per byte is -sum(log-probabilities) / ln 2 / bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_ids, describe
from .kernels import at_least_fp32
from .losses import cross_entropy

if TYPE_CHECKING:
    from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer
    from .carried import Memories, States

Scores = Tensor | list[Tensor]


def score(
    model: BlockRecurrentTransformer, tokens: Tensor | list[Tensor], *, xl_memories: Memories | None = None,
    states: States | None = None, bos: int | None = None, segment: int | None = None, rows: int = 16,
    return_memories_and_states: bool = False,
) -> Scores | tuple[Scores, Memories, States]:  # fmt: skip
    """The natural logarithm of the probability that the model gives each token, after all those before it.

    Args:
        model: is called without dropout and without gradients, and not changed.
        tokens: documents (b, n), or a list of 1-D tensors of any lengths >= 1; on the model's device.
        xl_memories, states: what was read before, a row for each document. The first token is what comes next: as
            after `generate`, the last token before it is not read yet, or its probability is not asked for.
        bos: a token to read before each document, so that its first token has a probability, too; train.py reads 0.
        segment: tokens that are read at once; default the model's max_seq_len. It changes nothing but memory and speed.
        rows: documents of a list that are read side by side, if nothing is carried.
        return_memories_and_states: return (log-probabilities, memories, states), of which the last token of each
            document is not read yet: begin with it to go on, as with `generate`.

    Returns:
        At least fp32. For (b, n) the log-probabilities (b, n - 1) of tokens[:, 1:], for a list those of each document's
        tokens but the first; with `bos` those of all tokens.

    Raises:
        ValueError: an argument out of range, or values carried over from another model or batch.
    """
    for name, number in (("segment", segment), ("rows", rows)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    if bos is not None and not 0 <= bos < model.config.num_tokens:
        raise ValueError(f"bos={bos} must be from 0 to {model.config.num_tokens - 1}, num_tokens is one more")
    documents = [prefixed(document, bos) for document in checked(model, tokens)]
    segment = model.config.max_seq_len if segment is None else segment
    carries = bool(xl_memories or states) or return_memories_and_states
    groups = [range(len(documents))] if carries or isinstance(tokens, Tensor) else side_by_side(documents, rows)
    scores: list[Tensor] = [documents[0]] * len(documents)
    memories, carried = xl_memories, states
    for group in groups:
        found, memories, carried = read(model, [documents[i] for i in group], xl_memories, states, segment)
        for index, own in zip(group, found):
            scores[index] = own
    result = torch.stack(scores) if isinstance(tokens, Tensor) else scores
    if not return_memories_and_states:
        return result
    return result, memories or model.init_memories(len(documents)), carried or model.init_states(len(documents))


def checked(model: BlockRecurrentTransformer, tokens: Any) -> list[Tensor]:
    """Documents (n,) of int64."""
    device, num_tokens = model.token_emb.weight.device, model.config.num_tokens
    if isinstance(tokens, Tensor):
        return list(check_ids(tokens, "tokens", device, num_tokens).long())
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"tokens must be (b, n) token ids, or a list of 1-D tensors of them, not {describe(tokens)}")
    if wrong := [one for one in tokens if not isinstance(one, Tensor) or one.ndim != 1 or not len(one)]:
        raise ValueError(f"tokens must be a list of 1-D tensors of at least one token each, not {describe(wrong[0])}")
    return [check_ids(one[None], f"tokens[{i}]", device, num_tokens)[0].long() for i, one in enumerate(tokens)]


def prefixed(document: Tensor, bos: int | None) -> Tensor:
    return document if bos is None else F.pad(document, (1, 0), value=bos)


def side_by_side(documents: list[Tensor], rows: int) -> Iterator[list[int]]:
    """Which documents are read together, the longest first: up to `rows`, each at least half as long as the longest."""
    group: list[int] = []
    for index in sorted(range(len(documents)), key=lambda i: -len(documents[i])):
        if group and (len(group) == rows or 2 * len(documents[index]) < len(documents[group[0]])):
            yield group
            group = []
        group.append(index)
    yield group


@torch.no_grad()
def read(
    model: BlockRecurrentTransformer, documents: list[Tensor], memories: Any, states: Any, segment: int
) -> tuple[list[Tensor], Any, Any]:
    """Reads documents as the rows of one batch: the log-probabilities of all tokens but the first of each."""
    counts = [len(document) - 1 for document in documents]  # that are read
    padded = nn.utils.rnn.pad_sequence(documents, batch_first=True)  # (b, n)
    found = [at_least_fp32(model.token_emb.weight.new_empty(len(documents), 0))]
    for start in range(0, max(counts), segment):
        stop = min(start + segment, max(counts))
        inside = [min(max(count - start, 0), stop - start) for count in counts]
        lengths = None if min(inside) == stop - start else torch.tensor(inside, device=padded.device)
        hidden, memories, states = model(
            padded[:, start:stop], xl_memories=memories, states=states, lengths=lengths, return_hidden=True,
            use_dropout=False,
        )  # fmt: skip
        targets = padded[:, start + 1 : stop + 1]
        found.append(
            -cross_entropy(model.logits, hidden, targets, reduction="none", num_tokens=model.config.num_tokens)
        )
    return [row[:count] for row, count in zip(torch.cat(found, dim=1), counts)], memories, states
