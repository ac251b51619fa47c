"""Exact gradients through all segments of a document, at the memory of one segment.

Memory replay back-propagation (Wu et al. 2020, Memformer, arXiv 2010.06891): a first pass without gradients keeps what
travels between the segments; a second one goes backwards, computes each segment anew with its graph, and hands the
gradients of what the segment had received to the segment before. About 4/3 of the time of plain back-propagation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .block_recurrent_transformer_pytorch import RecurrentTrainWrapper
from .carried import Memories, States, detach, without_derived

Step = Callable[[Any, Memories | None, States | None], tuple[Tensor, Memories, States]]


class Kept(NamedTuple):
    """What a segment is computed anew from."""

    segment: Any
    carried: tuple[Memories | None, States | None]  # what it received
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
    parts = list(wrapper.parts(x))
    segments = ((number, *part, wrapper.drops(part[0])) for number, part in enumerate(parts))

    def step(segment: Any, memories: Memories | None, states: States | None) -> tuple[Tensor, Memories, States]:
        number, part, count, total, drops = segment
        loss, memories, states = wrapper.step(part, memories, states, None if number else reset, drops)
        return loss * count / total, memories, states

    carried = (xl_memories or None, states or None)
    return replay_segments(step, segments, len(parts), carried, device=x.device, scale=scale, no_sync=no_sync)


def replay_segments(
    step: Step,
    segments: Iterable[Any],
    count: int,
    carried: tuple[Memories | None, States | None],
    *,
    device: torch.device,
    scale: float | Tensor = 1.0,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Memories, States]:
    """`replay_backward` of the sum of what `step(segment, memories, states)` gives as the loss of each segment.

    `step` is called twice for each of the `count` segments, and draws from torch's default generators alone.
    """
    kept: list[Kept] = []
    shelf = Shelf(count - 1)
    losses: list[Tensor] = []
    memories, states = carried
    with torch.no_grad():
        for number, segment in enumerate(segments):
            if memories is not None and states is not None and number > 0:
                memories, states = shelf.put(number - 1, without_derived(memories, states))
            kept.append(Kept(segment, (memories, states), Random.now(device)))
            loss, memories, states = step(segment, memories, states)
            losses.append(loss)
    assert memories is not None and states is not None
    memories, states = without_derived(memories, states)
    after = detach(memories), detach(states)
    now = Random.now(device)

    gradients: list[Tensor | None] = []
    while kept:
        again = kept.pop()
        is_first = not kept
        given, structure = tree_flatten(again.carried)
        received = given if is_first else [leaf.detach().requires_grad_() if travels(leaf) else leaf for leaf in given]
        again.random.restore()
        with nullcontext() if is_first else no_sync():
            loss, *left = step(again.segment, *tree_unflatten(received, structure))
            heads = [(loss, torch.ones_like(loss) * scale)]
            heads += [(leaf, g) for leaf, g in zip(tree_flatten(tuple(left))[0], gradients) if g is not None]
            heads = [(leaf, g) for leaf, g in heads if leaf.requires_grad]
            torch.autograd.backward([leaf for leaf, _ in heads], [g for _, g in heads])
        gradients = [leaf.grad if travels(leaf) and leaf.is_leaf else None for leaf in received]
    now.restore()
    return torch.stack(losses).sum(), *after


class Shelf:
    """Memory for what travels out of each of so many segments, taken at once.

    Many small tensors that stay, among the large ones of each segment that come and go, would leave gaps that an
    allocator can not give back.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.rows: dict[tuple[Any, ...], Tensor] = {}

    def put(self, place: int, carried: tuple[Memories, States]) -> tuple[Memories, States]:
        """The same values, in memory of the shelf; a tensor of equal numbers stays what it is."""
        leaves, structure = tree_flatten(carried)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() >= leaf.nbytes:
                key = (i, leaf.shape, leaf.dtype)
                if key not in self.rows:
                    self.rows[key] = leaf.new_empty((self.places, *leaf.shape))
                leaves[i] = self.rows[key][place].copy_(leaf)
        memories, states = tree_unflatten(leaves, structure)
        return memories, states


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
