"""What a trained model still knows, after so many tokens of filler: facts are written, the stream goes on, and at each
distance the questions are put to a copy of the carried values, which leaves the stream as it was."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from block_recurrent_transformer_pytorch import select_rows

from .tasks import NOT_ASKED, Facts
from .training import Reader, openings

WRITING = 1024  # tokens in which the facts are set; one fact alone is set within its last block
SEGMENT = 1024  # tokens of a call
LEAD = 8  # tokens of filler before each question
ASKED_AT_ONCE = 1024  # rows


def writing_length(task: Facts, block_width: int) -> int:
    return block_width if task.writes == 1 else WRITING


@torch.no_grad()
def remembered(
    read: Reader, task: Facts, rows: int, distances: list[int], draw: torch.Generator
) -> Iterator[dict[str, Any]]:
    """For each distance from the end of the writing, ascending: right answers of how many, and what gates did since.

    The memory this takes does not depend on the distance.
    """
    batch = task.draw(rows, writing_length(task, read.model.config.block_width), draw, unseen=True)
    _, carried = read(batch.tokens, logits_to_keep=1)
    filler, at, opened, weighed = task.stream(rows, draw), 0, 0.0, 0.0
    next(filler)
    for distance in distances:
        while at < distance:
            length = min(SEGMENT, distance - at)
            with openings(read.model) as gates:
                _, carried = read(filler.send(length), carried, logits_to_keep=1)
            opened, weighed = opened + length * gates.share, weighed + length * gates.mean.item()
            at += length
        right = asked(read, task, carried, batch.newest, draw)
        yield {
            "distance": distance, "right": right, "open_share": opened / at, "mean_write": weighed / at,
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }  # fmt: skip


def asked(read: Reader, task: Facts, carried: Any, newest: Tensor, draw: torch.Generator) -> list[int]:
    """How many of its facts each row knows, each asked for by itself."""
    row, key = (newest != NOT_ASKED).nonzero(as_tuple=True)
    right = torch.zeros(len(newest), dtype=torch.int64)
    for some, keys in zip(row.split(ASKED_AT_ONCE), key.split(ASKED_AT_ONCE)):
        question = task.draw_filler(len(some), LEAD + 2, draw, unseen=True)
        question[:, -2], question[:, -1] = task.get_token, task.first_key + keys
        logits, _ = read(question, tuple(select_rows(value, some) for value in carried), logits_to_keep=1)
        right.index_add_(0, some, (logits[:, -1].argmax(-1) == newest[some, keys]).long())
    return right.tolist()
