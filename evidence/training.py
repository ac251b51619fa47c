"""Training for a fixed number of steps, and what is read of a model while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, Gate

from .tasks import CELL, NOT_ASKED, Facts


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The same for every arm of an experiment unless the arm says otherwise."""

    steps: int
    tokens_per_step: int = 2048
    learning_rate: float = 3e-3
    warmup: int = 20
    decay_from: float = 0.7  # share of the steps from which on the rate falls to a twentieth
    penalty: float = 0.1  # times the mean opening of the gates, once answers are right more often than not
    promote_at: float = 0.85  # running accuracy at which sequences get longer and facts more
    least_steps: int = 20  # on each length


@dataclass
class Progress:
    """Where a training run stands."""

    stage: int = 0
    steps_in_stage: int = 0
    accuracy: float = 0.0


def stages(task: Facts) -> list[tuple[int, Facts]]:
    """Sequence lengths and numbers of facts, from easy to full."""
    full = (task.facts, task.overwritten)
    numbers = [(4, 0), (8, 4), full, full]
    return [
        (length, replace(task, facts=min(facts, full[0]), overwritten=min(again, full[1])))
        for length, (facts, again) in zip((64, 128, 256, 512), numbers)
        if 2 * CELL * (min(facts, full[0]) + min(again, full[1])) <= length
    ]


class Openings:
    """What the gates of a model decided in its last calls, seen from outside.

    Attributes:
        mean: the mean of all shares that are written.
        share: how many of them are not zero.
    """

    def __init__(self, model: BlockRecurrentTransformer) -> None:
        self.writes: list[Tensor] = []
        gates = [module for module in model.modules() if isinstance(module, Gate)]
        self.handles = [gate.register_forward_hook(lambda *call: self.writes.append(call[2].write)) for gate in gates]

    @property
    def mean(self) -> Tensor:
        return torch.stack([write.mean() for write in self.writes]).mean() if self.writes else torch.zeros(())

    @property
    def share(self) -> float:
        count = sum(write.numel() for write in self.writes)
        return sum(int((write > 0).sum()) for write in self.writes) / count if count else 0.0


@contextmanager
def openings(model: BlockRecurrentTransformer) -> Iterator[Openings]:
    """Watches the gates of a model; changes no number."""
    seen = Openings(model)
    try:
        yield seen
    finally:
        for handle in seen.handles:
            handle.remove()


@dataclass(frozen=True)
class Reader:
    """Reads tokens where carried values left off; with `reset_states`, each block begins with the initial states."""

    model: BlockRecurrentTransformer
    reset_states: bool = False

    def __call__(self, tokens: Tensor, carried: tuple[Any, Any] = (None, None), **options: Any) -> tuple[Tensor, Any]:
        """tokens (b, n) -> what the model gives for them, (b, n or logits_to_keep, ...), and the carried values."""
        if not self.reset_states:
            out, *after = self.model(tokens, xl_memories=carried[0], states=carried[1], **options)
            return out, tuple(after)
        outs, rows = [], torch.ones(len(tokens), dtype=torch.bool)
        for block in tokens.split(self.model.config.block_width, dim=1):
            out, *after = self.model(block, xl_memories=carried[0], states=carried[1], reset_states=rows, **options)
            outs.append(out)
            carried = tuple(after)
        return torch.cat(outs, dim=1), carried


def train(config: Config, task: Facts, recipe: Recipe, seed: int, reset_states: bool) -> tuple[Any, dict[str, Any]]:
    """A trained model, and how its training went."""
    torch.manual_seed(seed)
    model = BlockRecurrentTransformer(config).train()
    draw = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    read, progress, plan, history = Reader(model, reset_states), Progress(), stages(task), []
    started = time.process_time()
    for step in range(recipe.steps):
        length, now = plan[progress.stage]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(step, recipe)
        loss, accuracy, opened = train_step(read, now, length, recipe, progress.accuracy, optimizer, draw)
        progress.accuracy += 0.1 * (accuracy - progress.accuracy)
        progress.steps_in_stage += 1
        if (step + 1) % 50 == 0:
            history.append({"step": step + 1, "length": length, "facts": now.facts, "loss": round(loss, 4),
                            "accuracy": round(progress.accuracy, 4), "opened": round(opened, 4)})  # fmt: skip
        is_ready = progress.accuracy > recipe.promote_at and progress.steps_in_stage >= recipe.least_steps
        if is_ready and progress.stage + 1 < len(plan):
            progress = Progress(progress.stage + 1)
    spent = {"cpu_seconds": round(time.process_time() - started, 1), "reached": plan[progress.stage][0]}
    return model.eval(), {**spent, "parameters": sum(p.numel() for p in model.parameters()), "history": history}


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate of a step as a share of the highest: up, level, and down to a twentieth."""
    left = (1 - step / recipe.steps) / (1 - recipe.decay_from)
    return min(1.0, (step + 1) / recipe.warmup, max(0.05, left))


def train_step(
    read: Reader, task: Facts, length: int, recipe: Recipe, accuracy: float, optimizer: Any, draw: torch.Generator
) -> tuple[float, float, float]:
    """One step. Returns the loss, the share of right answers, and the mean opening of the gates."""
    rows = max(1, recipe.tokens_per_step // length)
    batch = task.draw(rows, length, draw, questions=max(4, length // 10))
    is_asked = batch.targets != NOT_ASKED
    with openings(read.model) as gates:
        hidden, _ = read(batch.tokens, return_hidden=True)
    logits = read.model.logits(hidden[is_asked])
    loss = F.cross_entropy(logits, batch.targets[is_asked])
    total = loss + recipe.penalty * max(0.0, 2 * accuracy - 1) * gates.mean
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(read.model.parameters(), 1.0)
    optimizer.step()
    right = (logits.argmax(-1) == batch.targets[is_asked]).float().mean()
    return loss.item(), right.item(), gates.mean.item()
