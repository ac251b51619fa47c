"""128 key-value pairs, written up to 262,144 tokens ago, read through routed memory: `python -m evidence.pairs`.

A sequence writes 128 pairs "SET value key" (or "SET key value") in slots of 8 tokens among filler, is followed by more
filler, and is asked 16 times "GET key -> value". Bare keys and values occur among the filler. The model has two layers:
one with a window of 3 tokens, and one with a window of 16 and a routed memory, computed where an answer is due. It is
trained on the 1,024 tokens with the pairs alone, and evaluated at each distance on one stream through the memory.

What makes it learn:
    W_q = W_k, orthogonal, with q . k twice as large; embeddings and output projections times 0.3
    summaries of all tokens (the maximum) choose from the first step on; means and gates are taught: brute-force
    attention, with the distillation loss beside it once retrieval is there; they choose in evaluation only
    gradients into the stored keys and values in every other step: with none the model learns nothing, with all it
    drifts
    a key shift (the key of token t from the features of t - 1) for "SET key value": there the value would have to fetch
    its key first

Results go to standard output and, with --out, to a JSON file: accuracy in % over 320 questions at each distance, chance
is 1.6 %.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from block_recurrent_transformer_pytorch.routing import Router, Store

NUM_KEYS, NUM_VALUES, NUM_FILLER = 256, 64, 64
SET, GET, KEYS = 0, 1, 2
VALUES = KEYS + NUM_KEYS
FILLER = VALUES + NUM_VALUES
NUM_TOKENS = FILLER + NUM_FILLER
NUM_PAIRS, SLOT, NUM_QUERIES = 128, 8, 16
WRITTEN = NUM_PAIRS * SLOT  # tokens that hold the pairs
WINDOW = 16


@dataclass
class Task:
    """One run: what is compared."""

    chunk_size: int = 8
    summary: str = "max"  # max, mean, means (of 4 tokens each), gate
    operator: str = "coordinate_descent"
    order: str = "value key"
    seed: int = 0
    steps: int = 300
    brute: int = 0  # of these, the first ones attend to all chunks
    distilled: tuple[int, int] = (0, 0)  # the first and the last step with the distillation loss
    num_chosen: int = 4
    router: str = "learned"  # learned, scores (no distillation), random (choices in evaluation), off
    bare: float = 0.1  # of the filler is keys and values, in evaluation
    training_bare: float = 0.3  # more of them, since 1,024 tokens hold few that mislead
    batch: int = 16
    learning_rate: float = 3e-3
    rows: int = 20  # of evaluation
    distances: tuple[int, ...] = (0, 4096, 65_536, 262_144)


def filler(shape: tuple[int, ...], bare: float, generator: torch.Generator) -> Tensor:
    plain = torch.randint(FILLER, NUM_TOKENS, shape, generator=generator)
    other = torch.randint(KEYS, FILLER, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < bare, other, plain)


def examples(task: Task, batch: int, bare: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Written tokens (b, 1024), questions "GET key value" (b, q, 3), and the chunks that hold the answers (b, q)."""
    tokens = filler((batch, WRITTEN), bare, generator)
    keys = torch.rand(batch, NUM_KEYS, generator=generator).argsort(1)[:, :NUM_PAIRS] + KEYS
    values = torch.randint(VALUES, FILLER, (batch, NUM_PAIRS), generator=generator)
    at = torch.arange(NUM_PAIRS) * SLOT + torch.randint(SLOT - 2, (batch, NUM_PAIRS), generator=generator)
    pair = (values, keys) if task.order == "value key" else (keys, values)
    for step, token in enumerate((torch.full_like(keys, SET), *pair)):
        tokens.scatter_(1, at + step, token)
    asked = torch.rand(batch, NUM_PAIRS, generator=generator).argsort(1)[:, :NUM_QUERIES]
    keys, values, at = (x.gather(1, asked) for x in (keys, values, at))
    return tokens, torch.stack([torch.full_like(keys, GET), keys, values], -1), (at + 2) // task.chunk_size


class RandomChoice(Router):
    """A control: chunks are chosen by lot."""

    def scores(self, value: Store, queries: Tensor, seen: Tensor) -> Tensor:
        scores = super().scores(value, queries, seen)
        return torch.where(scores == float("-inf"), scores, torch.rand_like(scores))


def routed_memory(task: Task, capacity: int) -> Router:
    kind = RandomChoice if task.router == "random" else Router
    return kind(
        kv_heads=1,
        dim_head=32,
        block_width=WRITTEN,
        capacity=capacity,
        chunk_size=task.chunk_size,
        num_chosen=task.num_chosen,
        scale=32**-0.5,
        operator=task.operator,
        summary="gate" if task.summary == "gate" else "mean",
        num_summaries={"max": task.chunk_size, "means": task.chunk_size // 4}.get(task.summary, 1),
    )


class Model(nn.Module):
    """A local layer, and a layer with routed memory, of one key/value head and two query heads."""

    def __init__(self, task: Task, dim: int = 64, heads: int = 2, dim_head: int = 32) -> None:
        super().__init__()
        self.heads, self.dim_head, self.reach, self.shift = heads, dim_head, 3, task.order == "key value"
        self.embedding = nn.Embedding(NUM_TOKENS, dim)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(5))
        self.near_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.near_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, dim_head, bias=False)
        self.to_v = nn.Linear(dim, dim_head, bias=False)
        self.outs = nn.ModuleList(nn.Linear(heads * dim_head, dim, bias=False) for _ in range(2))
        self.forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(2)
        )
        self.near_bias = nn.Parameter(torch.zeros(heads, self.reach))
        self.bias = nn.Parameter(torch.zeros(heads, WINDOW))
        self.head = nn.Linear(dim, NUM_VALUES)
        match = nn.init.orthogonal_(torch.empty(dim_head, dim)) * 2**0.5
        with torch.no_grad():
            self.to_k.weight.copy_(match)
            self.to_q.weight.copy_(match.repeat(heads, 1))
            for layer in (self.embedding, *self.outs, *(x[2] for x in self.forwards)):
                layer.weight.mul_(0.3)
        self.routed = routed_memory(task, WRITTEN)

    def features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b, n) after the local layer, and normalised for the next, each (b, n, d)."""
        x = self.embedding(tokens)
        y, e = self.norms[0](x), self.dim_head
        q = self.near_q(y).unflatten(-1, (self.heads, e))
        k, v = F.pad(self.near_kv(y), (0, 0, self.reach - 1, 0)).unfold(1, self.reach, 1).split(e, 2)  # (b, n, e, 3)
        p = (torch.einsum("bnhe,bnej->bnhj", q, k) * e**-0.5 + self.near_bias).softmax(-1)
        x = x + self.outs[0](torch.einsum("bnhj,bnej->bnhe", p, v).flatten(2))
        x = x + self.forwards[0](self.norms[1](x))
        return x, self.norms[2](x)

    def keys_and_values(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 1, n, e) each."""
        before = F.pad(y, (0, 0, 1, 0))[:, :-1] if self.shift else y
        return self.to_k(before)[:, None], self.to_v(y)[:, None]

    def remember(self, memory: Store, tokens: Tensor, **options: bool) -> Store:
        return self.routed.append(memory, self.keys_and_values(self.features(tokens)[1]), **options)[1]

    def answer(
        self, memory: Store, before: Tensor, questions: Tensor, **options: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Questions (b, q, 3) after tokens (b, n): logits (b, q, v), distillation losses, chosen slots (b, q, k)."""
        b, n = before.shape
        x, y = self.features(torch.cat([before, questions.flatten(1)], 1))
        at = n + 1 + 3 * torch.arange(questions.shape[1])
        q = self.to_q(y[:, at]).view(b, len(at), 1, self.heads, self.dim_head).permute(0, 3, 1, 2, 4)  # (b, h, q, 1, e)
        window = at[:, None] - torch.arange(WINDOW)
        k, v = (z[:, :, window] for z in self.keys_and_values(y))  # (b, 1, q, 16, e)
        seen = memory.stored[:, None].expand(-1, len(at))
        out, losses = self.routed.read(memory, seen, q, (k, v), self.bias[None, :, None, None], **options)
        x = x[:, at] + self.outs[1](out[:, :, :, 0].permute(0, 2, 1, 3).flatten(2))
        x = x + self.forwards[1](self.norms[3](x))
        slots = self.routed.choose(memory, q.detach(), seen).slots[:, 0, :, 0]  # (b, q, k)
        return self.head(self.norms[4](x)), losses, slots


def train(task: Task) -> Model:
    torch.manual_seed(task.seed)
    model, generator = Model(task), torch.Generator().manual_seed(1000 + task.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(task.steps):
        rate = min(1, (step + 1) / 50, 0.05 + 1.2 * (1 - step / task.steps))
        optimiser.param_groups[0]["lr"] = task.learning_rate * rate
        tokens, questions, _ = examples(task, task.batch, task.training_bare, generator)
        memory = model.routed.empty(task.batch, model.head.weight)
        if task.router != "off":
            memory = model.remember(memory, tokens, detach=step % 2 == 1)
        before = filler((task.batch, WINDOW), task.training_bare, generator)
        distil = task.distilled[0] <= step < task.distilled[1]
        logits, losses, _ = model.answer(memory, before, questions, everything=step < task.brute, distil=distil)
        loss = F.cross_entropy(logits.flatten(0, 1), questions[..., 2].flatten() - VALUES)
        (loss if losses is None else loss + losses.mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return model


@torch.no_grad()
def evaluate(task: Task, model: Model, rows_at_once: int = 4) -> dict[int, list[float]]:
    """At each distance, in %: right answers, and answers whose chunk was among the chosen ones."""
    generator = torch.Generator().manual_seed(77 + task.seed)
    far = filler((1, max(task.distances)), task.bare, generator)
    kind = routed_memory(task, WRITTEN + max(task.distances))
    kind.load_state_dict(model.routed.state_dict())
    model.routed = kind
    counts = {distance: [0, 0] for distance in task.distances}
    for _ in range(0, task.rows, rows_at_once):
        tokens, questions, chunks = examples(task, rows_at_once, task.bare, generator)
        memory = model.remember(kind.empty(rows_at_once, model.head.weight), tokens, in_place=True)
        before = filler((rows_at_once, WINDOW), task.bare, generator)
        for last, distance in pairwise((0, *task.distances)):
            for start in range(last, distance, WRITTEN):
                more = far[:, start : start + WRITTEN].expand(rows_at_once, -1)
                memory = model.remember(memory, more, in_place=True)
            asked = memory if task.router != "off" else kind.forget(memory, torch.ones(rows_at_once, dtype=torch.bool))
            logits, _, slots = model.answer(asked, before, questions)
            counts[distance][0] += int((logits.argmax(-1) == questions[..., 2] - VALUES).sum())
            counts[distance][1] += int((slots == chunks[..., None]).any(-1).sum())  # the ring has not wrapped
    return {d: [round(100 * x / (task.rows * NUM_QUERIES), 1) for x in count] for d, count in counts.items()}


TAUGHT = {"steps": 400, "brute": 400, "distilled": (150, 400)}
TASKS = {
    **{
        f"{summary}, chunks of {chunk_size}, {operator.replace('_', ' ')}": {
            "summary": summary, "chunk_size": chunk_size, "operator": operator, **({} if summary == "max" else TAUGHT)
        }
        for summary in ("max", "gate", "mean")
        for chunk_size in (8, 16)
        for operator in ("coordinate_descent", "softmax")
    },
    "max, SET key value, key shift": {"order": "key value"},
    "control: memory off": {"router": "off"},
    "control: random chunks": {"router": "random"},
    "control: gate, scores alone teach": {"summary": "gate", "steps": 400, "brute": 250},
    "control: mean, never taught": {"summary": "mean", "steps": 400, "brute": 400, "operator": "top_k"},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--only", default="", help="run the tasks whose names hold this")
    parser.add_argument("--out", type=Path, help="a JSON file for the results so far, written after each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in options.seeds:
        for name in (name for name in TASKS if options.only in name):
            task, start = Task(seed=seed, **TASKS[name]), time.process_time()
            model = train(task)
            trained = time.process_time() - start
            found = evaluate(task, model)
            results.append({"name": name, **asdict(task), "training_seconds": round(trained, 1), "results": found})
            shown = ", ".join(f"{d}: {right} (chunk chosen {chosen})" for d, (right, chosen) in found.items())
            print(f"{name}, seed {seed}, {trained:.0f} CPU seconds of training: {shown}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
