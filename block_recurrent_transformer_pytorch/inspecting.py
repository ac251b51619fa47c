"""Looking inside a model while it runs: what tokens read in the states, and what gates keep and write.

    with inspecting(model) as seen:
        model(tokens)
    seen[3].keep[0]                      # the first block that layer 3 completed: the share of each state that is kept

Nothing is computed otherwise: the records are made by forward hooks, from what passes through the modules anyway. So
they change no number, cost nothing behind the `with`, and see decoding and training (what the backward pass computes
again is not recorded twice). Only calls of the thread that entered the `with` are recorded.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .block_recurrent_transformer_pytorch import (
    Attention,
    BlockRecurrentTransformer,
    Gate,
    RecurrentCell,
    RecurrentTrainWrapper,
    RoutedMemory,
    Shares,
)
from .kernels import at_least_fp32


@dataclass
class LayerRecord:
    """What happened in one layer, in the order in which it did.

    Axis letters: b batch, t blocks of a span, h heads, n tokens, s states, d dim.
    """

    state_attention: list[Tensor] = field(default_factory=list)
    """For each span that read a state: the weights of the states for each token, (b t, h, n, s). They sum to 1."""
    keep: list[Tensor] = field(default_factory=list)
    """For each block and gate: the share of the old state that is kept, to be broadcast to (b, s, d)."""
    write: list[Tensor] = field(default_factory=list)
    """The share of the candidate that is written; with `keep`, entry by entry."""
    state_norm: list[Tensor] = field(default_factory=list)
    """For each block: the length of each state vector afterwards, (b, s)."""
    write_size: list[Tensor] = field(default_factory=list)
    """For each block: how far each state vector moved, |new - old|, (b, s)."""
    choices: list[Tensor] = field(default_factory=list)
    """For each span: the numbers of the chunks that each query of a routed memory chose, (b, g, t, n, k); -1: none."""

    def __bool__(self) -> bool:
        return any(vars(self).values())


Records = dict[int, LayerRecord]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


@contextmanager
def inspecting(
    model: BlockRecurrentTransformer | RecurrentTrainWrapper, *, attention: bool = True
) -> Iterator[Records]:
    """Records what happens inside `model` during the `with`: a `LayerRecord` for each layer, by its number.

    Args:
        model: the model itself, not one that `torch.compile` made: compiled code runs no hooks.
        attention: record the attention to states, too: n * s numbers a head and layer.

    Raises:
        ValueError: a compiled model, or no model.
    """
    inner = model.model if isinstance(model, RecurrentTrainWrapper) else model
    if not isinstance(inner, BlockRecurrentTransformer):
        hint = ", which torch.compile made: give the model itself" if hasattr(inner, "_orig_mod") else ""
        raise ValueError(f"model must be a BlockRecurrentTransformer, not {type(inner).__name__}{hint}")
    if any(module._compiled_call_impl is not None for module in inner.modules()):
        raise ValueError("model was compiled in place by model.compile(): compiled code runs no hooks, inspect a copy")
    records = {number: LayerRecord() for number in range(1, inner.config.depth + 1)}
    handles = []
    try:
        for number, record in records.items():
            for part, hook in hooks(inner.layer(number), record, attention):
                handles.append(part.register_forward_hook(on_this_thread(hook), with_kwargs=True))
        yield records
    finally:
        for handle in handles:
            handle.remove()
    if inner.cells and not any(records.values()):
        warnings.warn(
            "nothing was recorded: no call read a state or completed a block, or compiled code ran, which has no hooks",
            stacklevel=3,
        )


def hooks(layer: Any, record: LayerRecord, attention: bool) -> Iterator[tuple[nn.Module, Hook]]:
    """The parts of a layer to listen to, and what to note of each."""
    for part in layer.modules():
        if isinstance(part, Gate):
            yield part, lambda module, args, kwargs, out: note_gate(record, out)
        elif isinstance(part, RecurrentCell):
            yield part.update, lambda module, args, kwargs, out: note_update(record, args[0], out.state)
        elif isinstance(part, RoutedMemory):
            yield part.router, lambda module, args, kwargs, out: record.choices.append(out[0].chunks)
    for part in layer.read_norm if attention else ():
        yield part, lambda module, args, kwargs, out: note_attention(record, module, *args)


def on_this_thread(hook: Hook) -> Hook:
    """The hook, for calls of this thread that are not made again by a backward pass."""
    own = threading.get_ident()

    @torch.no_grad()
    def guarded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if threading.get_ident() == own and torch._C._current_graph_task_id() == -1:
            hook(module, args, kwargs, out)

    return guarded


def note_gate(record: LayerRecord, shares: Shares) -> None:
    record.keep.append(shares.keep.detach().clone())
    record.write.append(shares.write.detach().clone())


def note_update(record: LayerRecord, old: Tensor, new: Tensor) -> None:
    record.state_norm.append(torch.linalg.vector_norm(new, dim=-1))
    record.write_size.append(torch.linalg.vector_norm(new - old, dim=-1))


def note_attention(record: LayerRecord, attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> None:
    heads, groups = q.shape[1], k.shape[1]
    k = k.to(q.dtype).repeat_interleave(heads // groups, dim=1)
    logits = at_least_fp32(q * cast(Attention, attention).scale @ k.transpose(-1, -2))
    record.state_attention.append(logits.softmax(-1))
