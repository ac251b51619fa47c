"""Exact gradients through all segments of a document, at the memory of one segment.

Memory replay back-propagation (Wu et al. 2020, Memformer, arXiv 2010.06891): a first pass without gradients keeps what
travels between the segments; a second one goes backwards, computes each segment anew with its graph, and hands the
gradients of what the segment had received to the segment before. About 4/3 of the time of plain back-propagation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .block_recurrent_transformer_pytorch import Memories, RecurrentTrainWrapper, States, detach, without_windows


class Kept(NamedTuple):
    """What a segment is computed anew from."""

    part: Tensor  # its tokens
    targets: Tensor  # how many its targets are
    carried: tuple[Memories | None, States | None]  # what it received
    drops: tuple[Tensor | None, Tensor | None]
    random: Random


def replay_backward(
    wrapper: RecurrentTrainWrapper,
    x: Tensor,
    *,
    xl_memories: Memories | None = None,
    states: States | None = None,
    reset: Tensor | None = None,
    scale: float | Tensor = 1.0,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Memories, States]:
    """Adds to the parameters' gradients what `(scale * loss).backward()` would with `detach_segments=False`.

    Args:
        wrapper: says how long a segment is, and what is dropped between them.
        x: token ids (b, n + 1), n any number of segments.
        xl_memories, states, reset: as in `RecurrentTrainWrapper.forward`; gradients flow into what has a graph.
        scale: factor of the gradients, as for accumulation or a gradient scaler.
        no_sync: context for all backward passes but the last one (DistributedDataParallel's `no_sync`).

    Returns:
        The mean loss in nats over all targets of x, detached; memories and states after the last token, detached.
    """
    kept: list[Kept] = []
    memories, carried = xl_memories or None, states or None
    losses: list[Tensor] = []
    with torch.no_grad():
        for part, count, total in wrapper.parts(x):
            kept.append(Kept(part, count, (memories, carried), wrapper.drops(part), Random.now(x.device)))
            loss, memories, carried = wrapper.step(part, memories, carried, None if losses else reset, kept[-1].drops)
            memories = without_windows(memories)  # as the second pass leaves them
            losses.append(loss * count / total)
    assert memories is not None and carried is not None
    after = detach(memories), detach(carried)
    now = Random.now(x.device)

    gradients: list[Tensor | None] = []
    while kept:
        segment = kept.pop()
        is_first = not kept
        given, structure = tree_flatten(segment.carried)
        received = given if is_first else [leaf.detach().requires_grad_() if travels(leaf) else leaf for leaf in given]
        segment.random.restore()
        with nullcontext() if is_first else no_sync():
            before: tuple[Memories | None, States | None] = tree_unflatten(received, structure)
            loss, *left = wrapper.step(segment.part, *before, reset if is_first else None, segment.drops)
            heads = [(loss, torch.ones_like(loss) * scale * segment.targets / total)]
            heads += [(leaf, g) for leaf, g in zip(tree_flatten(tuple(left))[0], gradients) if g is not None]
            heads = [(leaf, g) for leaf, g in heads if leaf.requires_grad]
            torch.autograd.backward([leaf for leaf, _ in heads], [g for _, g in heads])
        gradients = [leaf.grad if travels(leaf) and leaf.is_leaf else None for leaf in received]
    now.restore()
    return torch.stack(losses).sum(), *after


def travels(leaf: Any) -> bool:
    """Whether gradients can flow through a carried value."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class Random(NamedTuple):
    """The states of torch's default generators, so that dropout draws the same again."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Random:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
