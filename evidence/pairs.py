"""128 key-value pairs, written up to 262,144 tokens ago, read through the routed memory of the library's own model.

A sequence writes 128 pairs "SET value key" (or "SET key value") in slots of 8 tokens among filler, in which bare keys
and values occur, and is asked "GET key -> value" afterwards. The model has two layers with blocks of 16 tokens and XL
memories of one block; the upper one has a routed memory, and every token of it routes. It is trained on sequences of
about 1,100 tokens, and read on to 262,144 tokens.

What makes it learn, each needed:
    matching initial values (W_q = W_k, orthogonal), with queries and keys sqrt(2) times as large; embeddings, and the
    output projections that would drown the match, times 0.3; a lower layer that begins with a view of three tokens
    a loss over the 64 values alone: while a model learns which tokens are values at all, what it retrieves is noise to
    it, and it unlearns to retrieve
    summaries of all tokens choose from the first step on; means and gates are taught: training attends to all chunks,
    and the distillation loss joins in once retrieval is there
    gradients into the stored keys and values in half of the rows: with none the keys drift
    shifted keys for "SET key value", where the value would otherwise have to fetch its key first
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config
from block_recurrent_transformer_pytorch.block_recurrent_transformer_pytorch import T5Bias
from block_recurrent_transformer_pytorch.routing import Router, Store

from .intervals import wilson
from .running import as_json, machine, write

NUM_KEYS, NUM_VALUES, NUM_FILLER = 256, 64, 64
SET, GET, KEYS = 0, 1, 2
VALUES = KEYS + NUM_KEYS
FILLER = VALUES + NUM_VALUES
NUM_TOKENS = FILLER + NUM_FILLER
NUM_PAIRS, SLOT = 128, 8
WRITTEN = NUM_PAIRS * SLOT  # tokens that hold the pairs
LEAD, BLOCK = 16, 16
QUESTIONS = 64  # of a sequence of the training
LENGTH = -(-(WRITTEN + LEAD + 3 * QUESTIONS) // BLOCK) * BLOCK
PIECE = 2048  # tokens of a call of the evaluation
BARE = 0.6, 0.1  # of the filler: keys and values that nobody set, in training (few tokens), and in evaluation (many)


@dataclass(frozen=True)
class Arm:
    """What is compared."""

    title: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # of the routed memory
    order: str = "value key"
    steps: int = 400
    taught_from: int | None = None  # the step from which the distillation loss is on
    all_until: int = 0  # up to this step, training attends to all chunks
    chooses: str = "scores"  # scores, or by lot ("random")
    distances: tuple[int, ...] = (0, 4096, 65_536)


FAR = (0, 4096, 65_536, 262_144)
TAUGHT: dict[str, Any] = {"taught_from": 150, "all_until": 400}
ARMS = {
    "max-8": Arm("best token, chunks of 8", {"chunk_size": 8, "num_summaries": 8}, distances=FAR),
    "max-16": Arm("best token, chunks of 16", {"chunk_size": 16, "num_summaries": 16}, distances=FAR),
    "max-8-key-first": Arm(
        "best token, chunks of 8, `SET key value`, shifted keys",
        {"chunk_size": 8, "num_summaries": 8, "key_shift": True}, "key value", distances=FAR,
    ),
    "gate-8": Arm("gate, chunks of 8", {"chunk_size": 8, "summary": "gate"}, distances=FAR, **TAUGHT),
    "gate-16": Arm("gate, chunks of 16", {"chunk_size": 16, "summary": "gate"}, **TAUGHT),
    "mean-8": Arm("mean, chunks of 8", {"chunk_size": 8}, **TAUGHT),
    "softmax": Arm("best token, chunks of 8, softmax", {"chunk_size": 8, "num_summaries": 8, "operator": "softmax"}),
    "no-shift": Arm(
        "best token, chunks of 8, `SET key value`, keys not shifted", {"chunk_size": 8, "num_summaries": 8}, "key value"
    ),
    "off": Arm("no routed memory", {}),
    "random": Arm("chunks chosen by lot", {"chunk_size": 8, "num_summaries": 8}, chooses="random"),
    "scores-alone": Arm(
        "gate, chunks of 8, no distillation", {"chunk_size": 8, "summary": "gate"}, all_until=250
    ),
    "never-taught": Arm(
        "mean key, chunks of 8, top-k in evaluation alone", {"chunk_size": 8, "operator": "top_k"}, all_until=400,
    ),
}  # fmt: skip


def config(arm: Arm, capacity: int) -> Config:
    routed = {"capacity": capacity, "num_chosen": 4, "gradient_rate": 0.5, "layers": (2,)} | arm.options
    return Config(
        num_tokens=NUM_TOKENS, dim=64, depth=2, heads=2, dim_head=32, ff_mult=1, block_width=BLOCK, max_seq_len=LENGTH,
        recurrent_layers=(), positions="t5", embedding_std=0.3, matching_init=True, use_flash_attn=True,
        extra_memories={"routed": routed} if arm.options else {},
    )  # fmt: skip


def make(arm: Arm, capacity: int) -> BlockRecurrentTransformer:
    model = BlockRecurrentTransformer(config(arm, capacity))
    with torch.no_grad():
        queries_and_keys = model.layer(2).widths[0] + model.layer(2).widths[-1] // 2
        model.layer(2).to_qkv.weight[:queries_and_keys] *= 2**0.5
        cast(T5Bias, model.layer(1).position_bias).table[:, 3:] -= 5
        for branch in (model.layer(1).feed_forward, model.layer(2), model.layer(2).feed_forward):
            branch.to_out.weight *= 0.3
    if arm.chooses == "random":
        model.layer(2).extra["routed"].router.__class__ = RandomRouter
    return model


class RandomRouter(Router):
    """A control: chunks are chosen by lot."""

    def scores(self, value: Store, queries: Tensor, seen: Tensor) -> Tensor:
        scores = super().scores(value, queries, seen)
        return torch.where(scores == float("-inf"), scores, torch.rand_like(scores))


# ------------------------------------------------------------------------------------------------------------- the task


def filler(shape: tuple[int, ...], bare: float, draw: torch.Generator) -> Tensor:
    """Filler, of which a share are keys and values that nobody set."""
    plain = torch.randint(FILLER, NUM_TOKENS, shape, generator=draw)
    other = torch.randint(KEYS, FILLER, shape, generator=draw)
    return torch.where(torch.rand(shape, generator=draw) < bare, other, plain)


def written(order: str, batch: int, bare: float, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (b, 1024), and their keys and values, each (b, 128)."""
    tokens = filler((batch, WRITTEN), bare, draw)
    keys = torch.rand(batch, NUM_KEYS, generator=draw).argsort(1)[:, :NUM_PAIRS] + KEYS
    values = torch.randint(VALUES, FILLER, (batch, NUM_PAIRS), generator=draw)
    at = torch.arange(NUM_PAIRS) * SLOT + torch.randint(SLOT - 2, (batch, NUM_PAIRS), generator=draw)
    pair = (values, keys) if order == "value key" else (keys, values)
    for step, token in enumerate((torch.full_like(keys, SET), *pair)):
        tokens.scatter_(1, at + step, token)
    return tokens, keys, values


def questions(keys: Tensor, values: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` of them as tokens "GET key value" (b, 3 count), and the values (b, count)."""
    asked = torch.rand(keys.shape, generator=draw).argsort(1)[:, :count]
    keys, values = keys.gather(1, asked), values.gather(1, asked)
    return torch.stack((torch.full_like(keys, GET), keys, values), -1).flatten(1), values


# ------------------------------------------------------------------------------------------------- training, evaluating


def train(arm: Arm, seed: int, batch: int = 4, rate: float = 3e-3) -> tuple[BlockRecurrentTransformer, dict[str, Any]]:
    torch.manual_seed(seed)
    model, draw = make(arm, LENGTH).train(), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    history, started = [], time.process_time()
    for step in range(arm.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50, 0.05 + 1.2 * (1 - step / arm.steps))
        if arm.options:
            model.layer(2).extra["routed"].attends_to_all = step < arm.all_until
        tokens, keys, values = written(arm.order, batch, BARE[0], draw)
        asked, answers = questions(keys, values, QUESTIONS, draw)
        tokens = torch.cat((tokens, filler((batch, LEAD), BARE[0], draw), asked), 1)
        is_taught = arm.taught_from is not None and step >= arm.taught_from
        encoded = model.encode(model.embed(tokens), auxiliary=("distillation",) if is_taught else ())
        logits = model.logits(encoded.hidden[:, WRITTEN + LEAD + 1 :: 3])[..., VALUES:FILLER]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten() - VALUES)
        optimizer.zero_grad()
        (loss + sum(encoded.losses.values())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            right = (logits.argmax(-1) == answers - VALUES).float().mean().item()
            history.append({"step": step + 1, "loss": round(loss.item(), 4), "accuracy": round(right, 4)})
    return model.eval(), {"cpu_seconds": round(time.process_time() - started, 1), "history": history}


@torch.no_grad()
def recalled(arm: Arm, weights: dict[str, Tensor], part: int, seed: int) -> list[dict[str, int]]:
    """One stream: how many of its 128 pairs are known at each distance from the end of the writing."""
    model = make(arm, WRITTEN + max(arm.distances) + LEAD + 3 * NUM_PAIRS)  # nothing falls out while it is asked
    model.load_state_dict(weights)
    model.eval()
    draw = torch.Generator().manual_seed(10**6 * (1 + part) + seed)
    tokens, keys, values = written(arm.order, 1, BARE[1], draw)
    memories, at, found = model(tokens, return_hidden=True)[1], 0, []
    for distance in arm.distances:
        while at < distance:
            piece = filler((1, min(PIECE, distance - at)), BARE[1], draw)
            _, memories, _ = model(piece, xl_memories=memories, overwrite=True, logits_to_keep=1)
            at += piece.shape[1]
        asked, answers = questions(keys, values, NUM_PAIRS, draw)
        logits, _, _ = model(torch.cat((filler((1, LEAD), BARE[1], draw), asked), 1), xl_memories=memories)
        right = (logits[:, LEAD + 1 :: 3, VALUES:FILLER].argmax(-1) == answers - VALUES).sum()
        found.append({"distance": distance, "right": int(right)})
    return found


def carry_out(name: str, seed: int, folder: Path, weights: Path, parts: int) -> dict[str, Any]:
    """Trains, and reads so many streams; each is written as soon as it is done, and not done again."""
    arm, path = ARMS[name], folder / f"pairs.{name}.seed{seed}.json"
    stored = weights / f"pairs.{name}.seed{seed}.safetensors"
    setup = as_json({"experiment": "pairs", "arm": name, "seed": seed, **asdict(arm)})
    setup["config"] = as_json(asdict(config(arm, LENGTH)))
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if result.get("setup") != setup:
        result = {"setup": setup, "parts": []}
    if len(result["parts"]) >= parts:
        return result
    if not ("training" in result and stored.exists()):
        model, result["training"] = train(arm, seed)
        result |= {"machine": machine(), "parts": []}
        weights.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), stored)
        write(path, result)
    for part in range(len(result["parts"]), parts):
        result["parts"].append(recalled(arm, load_file(stored), part, seed))
        write(path, result)
    return result


def carried_out(
    only: str, seeds: tuple[int, ...], folder: Path, weights: Path, parts: int
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every seed of the arms of these names ("" for all), one after another."""
    for seed in seeds or (0, 1, 2):
        for name in (name for name in ARMS if not only or name in only.split(",")):
            yield name, seed, carry_out(name, seed, folder, weights, parts)


def line(result: dict[str, Any]) -> str:
    """One run, for the terminal."""
    shares = " ".join(f"{distance:,}: {100 * share:.1f}" for distance, share in shares_of([result]).items())
    return f"{shares}   {result['training']['cpu_seconds']} CPU-s"


def shares_of(results: list[dict[str, Any]]) -> dict[int, float]:
    """By distance, over all parts of the results."""
    return {distance: sum(right) / (len(right) * NUM_PAIRS) for distance, right in answered(results).items()}


def answered(results: list[dict[str, Any]]) -> dict[int, list[int]]:
    """By distance, how many pairs each stream knew."""
    streams: dict[int, list[int]] = {}
    for found in (found for result in results for part in result["parts"] for found in part):
        streams.setdefault(found["distance"], []).append(found["right"])
    return streams


HEAD = f"""
## {NUM_PAIRS} pairs through routed memory

Measured by `python -m evidence pairs`. {NUM_PAIRS} pairs in {WRITTEN:,} tokens are read through the routed memory of
the upper of two layers (width 64, blocks of {BLOCK} tokens). Every token of it chooses 4 chunks; after 262,144 tokens
there are {262_144 // 8:,} of 8 tokens to choose from. Trained on {LENGTH:,} tokens. Accuracy among
{NUM_VALUES} values in percent (a guess is right in {100 / NUM_VALUES:.1f}) over all seeds, with 95 % intervals
(Wilson), then every seed by itself. Each stream is asked for all {NUM_PAIRS} of its pairs.
"""


def load(folder: Path) -> list[dict[str, Any]]:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("pairs.*.json"))]
    return [result for result in results if result["parts"]]


def report(folder: Path) -> list[str]:
    """The section of docs/evidence.md."""
    results = load(folder)
    if not results:
        return []
    titles = [f"{distance:,} tokens" for distance in FAR]
    lines = [HEAD, f"| | {' | '.join(titles)} | steps | CPU-s |", f"|---|{'---|' * (len(titles) + 2)}"]
    for name, arm in ARMS.items():
        own = [result for result in results if result["setup"]["arm"] == name]
        if own:
            cells = [cell(own, distance) for distance in FAR]
            seconds = " / ".join(f"{result['training']['cpu_seconds']:.0f}" for result in own)
            lines.append(f"| {arm.title} | {' | '.join(cells)} | {arm.steps} | {seconds} |")
    return lines


def cell(results: list[dict[str, Any]], distance: int) -> str:
    right = answered(results).get(distance)
    if not right:
        return ""
    low, high = wilson(sum(right), len(right) * NUM_PAIRS)
    seeds = " / ".join(f"{100 * shares_of([result])[distance]:.1f}" for result in results)
    return f"{100 * shares_of(results)[distance]:.1f} [{100 * low:.1f}, {100 * high:.1f}] {seeds}"
