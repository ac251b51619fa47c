"""How a call is cut into spans: parts that the layers take at once.

A span is the rest of a block, the beginning of one, or several whole blocks. While all rows agree, everything is
planned with Python ints. Where rows differ, a call that stays within the block of every row is planned with tensors
alone, and nothing is read from the device; other calls read the offsets of the rows once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .carried import Position


class Span(NamedTuple):
    """Part of a call that the layers take at once: some tokens of one block, or some whole blocks.

    Rows agree, and `start`, `offset` and `completes` are no tensors; or they differ, and `offset` is (b,), and where
    they do not all bring `length` tokens `row_lengths` says how many each does. Several blocks only when every memory
    in front of the block is full.
    """

    start: int | Tensor  # the first token of the span in the call
    offset: int | Tensor  # tokens that the block held before
    num_blocks: int
    length: int  # tokens of each block
    completes: bool | Tensor  # whether the block is full afterwards
    full_blocks: int  # complete blocks that every row remembers
    extra_blocks: Tensor | None = None  # (b,) complete blocks that a row remembers beyond these
    row_lengths: Tensor | None = None
    in_place: bool = False  # the memories before the call are given away: new tokens may be written into them

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.length

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in what they remember or where they stand."""
        return self.extra_blocks is not None or not isinstance(self.offset, int)

    def one_by_one(self) -> list[Span]:
        """The same span, a block at a time."""
        return [self._replace(num_blocks=1)] * self.num_blocks


class Plan(NamedTuple):
    spans: list[Span]
    after: Position  # where the rows stand after the call


class Shape(NamedTuple):
    """What a plan needs to know of the model."""

    block_width: int
    reach: int  # complete blocks after which every memory in front of the block is full
    unmasked: int  # what a span says of full_blocks where nothing is ever masked (reach = 0)


def make_plan(shape: Shape, n: int, position: Position, lengths: Tensor | None, batch: int) -> Plan:
    """Cuts a call of n tokens, of which the rows bring `lengths` (b,), into spans."""
    if lengths is None and isinstance(position.offset, int):
        return plan_together(shape, n, position)
    within = plan_within_blocks(shape, n, position, lengths)
    return within or plan_apart(shape, n, position, lengths, batch)


def plan_together(shape: Shape, n: int, position: Position) -> Plan:
    """While all rows agree: the rest of the block, whole blocks, the beginning of a block.

    Blocks go one by one until every memory is full.
    """
    width, reach = shape.block_width, shape.reach
    offset, blocks, extra, _ = position
    assert isinstance(offset, int)
    spans, start = [], 0
    while start < n:
        if blocks >= reach:
            extra = None
        whole = (n - start) // width if offset == 0 and blocks >= reach else 0
        count, length = (whole, width) if whole else (1, min(n - start, width - offset))
        held = blocks if reach else shape.unmasked
        if offset + length == width:  # a branch, and no bool kept: torch.compile traces a symbolic offset
            spans.append(Span(start, offset, count, length, True, held, extra))
            start, offset, blocks = start + count * length, 0, min(reach, blocks + count)
            extra = None if extra is None else extra.clamp(max=reach - blocks)
        else:
            spans.append(Span(start, offset, count, length, False, held, extra))
            start, offset = start + length, offset + length
    return Plan(spans, Position(offset, blocks, None if blocks >= reach else extra))


def plan_within_blocks(shape: Shape, n: int, position: Position, lengths: Tensor | None) -> Plan | None:
    """One span for a call in which every row stays within its block, or just completes it; None where one may not.

    Made of tensors alone. While nothing is known of the rows' offsets, `torch.compile` and `torch.export` take it for
    granted: a call with such memories must not go beyond the block of any row.
    """
    width, known = shape.block_width, position.known
    if isinstance(position.offset, int):
        known = position.offset
    if known is None and not torch.compiler.is_compiling():
        return None
    most = max(known) if isinstance(known, tuple) else known
    row_lengths = None if lengths is None else lengths.long()
    offset = position.offset
    if not isinstance(offset, Tensor):
        assert row_lengths is not None  # otherwise rows agree
        offset = torch.full_like(row_lengths, offset)
    moved = offset + (n if row_lengths is None else row_lengths)
    held = position.full_blocks if shape.reach else shape.unmasked
    span = Span(0, offset, 1, n, False, held, position.extra_blocks, row_lengths)
    if most is not None and most + n < width:
        bound: tuple[int, ...] | int = most + n
        if isinstance(known, tuple) and lengths is None:
            bound = tuple(one + n for one in known)
        return Plan([span], position._replace(offset=moved, known=bound))
    if most is not None and (most + n > width or lengths is not None or not isinstance(known, tuple)):
        return None
    completes = moved == width
    extra = position.extra_blocks
    if extra is not None or position.full_blocks < shape.reach:
        extra = torch.zeros_like(moved) if extra is None else extra
        extra = (extra + completes).clamp(max=shape.reach - position.full_blocks)
    exact_now = tuple((one + n) % width for one in known) if isinstance(known, tuple) else None
    after = position._replace(offset=moved.masked_fill(completes, 0), extra_blocks=extra, known=exact_now)
    return Plan([span._replace(completes=completes)], after)


def plan_apart(shape: Shape, n: int, position: Position, lengths: Tensor | None, batch: int) -> Plan:
    """While rows differ: each span takes every row to the end of its block, or of its tokens. Reads the offsets."""
    offset, extra, blocks = position.offset, position.extra_blocks, position.full_blocks
    offsets = [offset] * batch if isinstance(offset, int) else offset.tolist()
    held = [blocks] * batch if extra is None else [min(shape.reach, blocks + more) for more in extra.tolist()]
    ends = [n] * batch if lengths is None else lengths.tolist()
    device = next(x.device for x in (lengths, offset, extra) if isinstance(x, Tensor))
    spans: list[Span] = []
    starts = [0] * batch
    if isinstance(offset, int) and extra is None and min(ends):
        spans, after = plan_together(shape, min(ends), position)
        starts, offsets, held = [min(ends)] * batch, [int(after.offset)] * batch, [after.full_blocks] * batch
    while any(start < stop for start, stop in zip(starts, ends)):
        left = [stop - start for start, stop in zip(starts, ends)]
        spans.append(span_of_rows(shape, left, starts, offsets, held, device))
        for row, more in enumerate(left):
            taken = spans[-1].num_tokens if spans[-1].num_blocks > 1 else min(more, shape.block_width - offsets[row])
            starts[row] += taken
            full = (offsets[row] + taken) // shape.block_width
            held[row] = min(shape.reach, held[row] + full)
            offsets[row] = (offsets[row] + taken) % shape.block_width
    if len(set(offsets)) == 1:
        return Plan(spans, Position(offsets[0], min(held), extra_of(held, device)))
    where = torch.tensor(offsets, device=device)
    return Plan(spans, Position(where, min(held), extra_of(held, device), tuple(offsets)))


def span_of_rows(
    shape: Shape, left: list[int], starts: list[int], offsets: list[int], held: list[int], device: torch.device
) -> Span:
    """The next span of rows that still bring `left` tokens."""
    width = shape.block_width

    def agreed(values: Sequence[int]) -> int | Tensor:
        return values[0] if len(set(values)) == 1 else torch.tensor(values, device=device)

    whole = min(left) // width if not any(offsets) and min(held) >= shape.reach else 0
    lengths = [whole * width] * len(left) if whole else [min(x, width - offset) for x, offset in zip(left, offsets)]
    length, blocks = width if whole else max(lengths), min(held) if shape.reach else shape.unmasked
    full = [offset + taken == width or whole > 0 for offset, taken in zip(offsets, lengths)]
    extra = extra_of(held, device)
    if len(set(zip(offsets, lengths))) == 1:
        return Span(agreed(starts), offsets[0], whole or 1, length, full[0], blocks, extra)
    completes = torch.tensor(full, device=device) if any(full) else False
    start, offset, row_lengths = (torch.tensor(values, device=device) for values in (starts, offsets, lengths))
    return Span(start, offset, 1, length, completes, blocks, extra, row_lengths)


def extra_of(held: list[int], device: torch.device) -> Tensor | None:
    """Blocks beyond those that every row holds, (b,); None where rows agree."""
    return None if len(set(held)) == 1 else torch.tensor([count - min(held) for count in held], device=device)


def take(x: Tensor, span: Span) -> Tensor:
    """The span's part of (b, n, d): (b, num_tokens, d)."""
    if isinstance(span.start, int):
        return x if span.num_tokens == x.shape[1] else x[:, span.start : span.start + span.num_tokens]
    index = span.start[:, None] + torch.arange(span.num_tokens, device=x.device)
    return x.gather(1, index.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2]))


def in_order(parts: list[Tensor], spans: list[Span], n: int) -> Tensor:
    """The inverse of `take` for all spans: (b, n, d), zero where a row has no token."""
    plain = all(isinstance(span.start, int) and span.row_lengths is None for span in spans)
    if plain and sum(span.num_tokens for span in spans) == n:
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    hidden = torch.cat(parts, dim=1)
    batch, device, base = hidden.shape[0], hidden.device, 0
    order = torch.full((batch, n + 1), hidden.shape[1], device=device)
    for span in spans:
        index = torch.arange(span.num_tokens, device=device).expand(batch, -1)
        target = index + (span.start if isinstance(span.start, int) else span.start[:, None])
        if span.row_lengths is not None:
            target = torch.where(index < span.row_lengths[:, None], target, n)
        order.scatter_(1, target, index + base)
        base += span.num_tokens
    padded = torch.cat((hidden, hidden.new_zeros(batch, 1, hidden.shape[2])), dim=1)
    return padded.gather(1, order[:, :n, None].expand(-1, -1, hidden.shape[2]))
