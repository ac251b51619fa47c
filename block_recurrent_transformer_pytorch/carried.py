"""What travels from call to call: memories, states, and where in its stream each row stands. Values, nothing else.

They go in as arguments and come out as results; no module keeps them, and no call changes the caller's. All of them are
NamedTuples (and a dict by kind of memory), so they are pytrees: `torch.compile`, DDP, FSDP2 and checkpointing take them
as they are. Axis letters: b batch, j entries, w block width, g key/value heads, s states, d dim, e dim_head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .checks import describe


class KV(NamedTuple):
    """Keys and values, oldest first; keys neither rotated nor scaled. Each (b, g, j, e)."""

    k: Tensor
    v: Tensor


class LayerMemory(NamedTuple):
    """What one layer remembers. Buffers of fixed width; entries for what has not been read yet are never looked at,
    or are the zeros of `empty_memory="zeros"`.

    `ready` follows from the others: decoding keeps it so that keys are normalised and rotated once a block.
    """

    block: KV  # the block being filled, (b, g, w, e), left-aligned
    past: dict[str, Any]  # what each kind of memory holds of complete blocks, by its name; "xl" is a KV, right-aligned
    ready: KV | None = None  # [other kinds ; xl ; block] as the queries of this block see them; None: not computed yet


class Position(NamedTuple):
    """Where each row of the batch stands in its stream.

    Ints while all rows agree, tensors where they differ. `known` is what the host knows of a tensor `offset` without
    reading it from the device: the offset of each row, or one number that none exceeds.
    """

    offset: int | Tensor  # tokens in the block being filled, 0 ... w-1; (b,) int64 where rows differ
    full_blocks: int  # complete blocks that every row remembers, counted until every memory is full
    extra_blocks: Tensor | None = None  # (b,) int64: complete blocks that a row remembers beyond these
    known: tuple[int, ...] | int | None = None

    def held_blocks(self, rows: int, device: torch.device) -> Tensor:
        """Complete blocks that each row remembers, (b,) int64."""
        if self.extra_blocks is None:
            return torch.full((rows,), self.full_blocks, device=device)
        return self.full_blocks + self.extra_blocks

    def without_bounds(self) -> Position:
        """The same for other rows: what the host knows of each row becomes one bound for all."""
        return self._replace(known=max(self.known)) if isinstance(self.known, tuple) else self

    def __repr__(self) -> str:
        held = f"{self.full_blocks} full blocks"
        if self.extra_blocks is not None:
            held = f"full blocks {(self.full_blocks + self.extra_blocks).tolist()}"
        return f"offset {self.offset.tolist() if isinstance(self.offset, Tensor) else self.offset}, {held}"


class Memories(NamedTuple):
    """The memories of all layers, and where each row stands in its stream."""

    layers: tuple[LayerMemory, ...]
    position: Position

    def __repr__(self) -> str:
        kinds = sorted({name for layer in self.layers for name in layer.past})
        rows = len(self.layers[0].block.k)
        return f"Memories({len(self.layers)} layers of {', '.join(kinds)}; {rows} rows; {self.position})"


class States(NamedTuple):
    """The states as of the start of the block being filled: they change when it is complete."""

    layers: tuple[Tensor, ...]  # one (b, s, d) for each recurrent layer, at least fp32
    kv: tuple[KV, ...] | None = None  # their keys and values as this block's tokens read them; None: not computed yet

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(state.shape)) for state in self.layers)
        return f"States({len(self.layers)} recurrent layers: {shapes or 'none'})"


torch.serialization.add_safe_globals([KV, LayerMemory, Position, Memories, States])  # for torch.load(weights_only=True)
Carried = TypeVar("Carried", Memories, States)


def map_tensors(carried: Carried, function: Callable[[Tensor], Tensor]) -> Carried:
    """`carried` with `function` applied to each of its tensors."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, carried)  # type: ignore[no-any-return]


def detach(carried: Carried) -> Carried:
    """The same values without their gradients' history: what ends back-propagation at a segment's boundary."""
    return map_tensors(carried, Tensor.detach)


def select_rows(carried: Carried, rows: Tensor) -> Carried:
    """The given rows, (m,) int64, in that order and possibly repeated: beam search, several samples of one prompt.

    Raises:
        ValueError: rows that are no integers, or not among those of `carried`.
    """
    batch = next((len(leaf) for leaf in tree_leaves(carried) if isinstance(leaf, Tensor)), None)
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be (m,) int64, not {describe(rows)}")
    if batch and rows.device.type == "cpu" and len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= batch):
        raise ValueError(f"rows={rows.tolist()} must be from 0 to {batch - 1}")
    if isinstance(carried, Memories):
        carried = carried._replace(position=carried.position.without_bounds())
    return map_tensors(carried, lambda leaf: leaf.index_select(0, rows.to(leaf.device)))


def forget_rows(memories: Memories, rows: Tensor) -> Memories:
    """Memories in which `rows`, (b,) bool, hold no complete block any more; the block being filled stays.

    Raises:
        ValueError: rows that are no bools, or not as many as those of the memories.
    """
    batch = len(memories.layers[0].block.k)
    if not isinstance(rows, Tensor) or rows.shape != (batch,) or rows.dtype != torch.bool:
        raise ValueError(f"rows must be ({batch},) bool, one for each row of the memories, not {describe(rows)}")
    layers = tuple(
        layer._replace(past={name: forgotten(value, rows) for name, value in layer.past.items()}, ready=None)
        for layer in memories.layers
    )
    position = memories.position
    if position.full_blocks or position.extra_blocks is not None:
        held = position.full_blocks + (0 if position.extra_blocks is None else position.extra_blocks)
        position = position._replace(full_blocks=0, extra_blocks=torch.where(rows, 0, held))
    return Memories(layers, position)


def forgotten(value: Any, rows: Tensor) -> Any:
    """A memory of one kind in which `rows` hold nothing: what its `forget` says, or zeros."""
    if hasattr(value, "forget"):
        return value.forget(rows)
    return tree_map(lambda x: x.masked_fill(per_row(rows, x), 0), value)


def reset_offsets(memories: Memories, rows: Tensor) -> Memories:
    """Memories in which the block being filled of `rows`, (b,) bool, is empty."""
    layers = tuple(layer._replace(block=forgotten(layer.block, rows), ready=None) for layer in memories.layers)
    position = memories.position
    if isinstance(position.offset, Tensor):
        return Memories(layers, position._replace(offset=position.offset.masked_fill(rows, 0)).without_bounds())
    if position.offset:
        offset = torch.where(rows, 0, position.offset)
        return Memories(layers, position._replace(offset=offset, known=position.offset))
    return Memories(layers, position)


def without_derived(memories: Memories, states: States) -> tuple[Memories, States]:
    """The same values, without what decoding keeps ready of them: the ready keys, and the keys and values of states.

    These follow from the rest. Where gradients are wanted they are computed anew: what made them gets its gradient
    through a graph, and would lose it wherever carried values are detached.
    """
    layers = tuple(layer._replace(ready=None) for layer in memories.layers)
    return memories._replace(layers=layers), states._replace(kv=None)


def trainable(carried: Carried) -> Carried:
    """The same values as tensors that autograd takes: those made under `torch.inference_mode` are copied."""
    return map_tensors(carried, lambda leaf: leaf.clone() if leaf.is_inference() else leaf)


def per_row(rows: Tensor, like: Tensor) -> Tensor:
    """(b,) as (b, 1, ..., 1), to meet the axes of `like`."""
    return rows.view(-1, *(1,) * (like.ndim - 1))


Tree = TypeVar("Tree")


def choose_rows(rows: Tensor, new: Tree, old: Tree) -> Tree:
    """`new` in the rows of a (b,) bool, `old` elsewhere; of one structure, whose tensors begin with the batch."""

    def choose(n: Any, o: Any) -> Any:
        return o if n is o else torch.where(per_row(rows, n), n, o)

    return tree_map(choose, new, old)  # type: ignore[no-any-return]


