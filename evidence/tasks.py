"""Facts to be remembered, among filler: sequences that follow from a seed."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

NUM_VALUES = 16  # chance is 1 / 16
CELL = 5  # tokens; a cell holds one fact (3 tokens), one question (2 tokens), or filler alone
NOT_ASKED = -100
UNSEEN_SHARE = 5  # every fifth file of the real text is kept for evaluation


class Batch(NamedTuple):
    """Sequences with facts in them."""

    tokens: Tensor  # (b, n)
    targets: Tensor  # (b, n): the token to be named after a question; NOT_ASKED elsewhere
    newest: Tensor  # (b, keys): the token of the value that each key was given last; NOT_ASKED where none


@dataclass(frozen=True)
class Facts:
    """`SET value key` or `SET key value` among filler, then `GET key`, to be answered by the newest value of the key.

    Facts stand at random places, across block borders, too. Bare keys and values occur in the filler as well.
    """

    facts: int = 1  # different keys that are set
    overwritten: int = 0  # of these, how many are set a second time, to another draw of the value
    keys: int = 1  # the facts' keys are drawn from so many
    order: Literal["value key", "key value"] = "value key"
    filler: Literal["random", "text"] = "random"  # text: source code of the Python standard library, as bytes

    @property
    def first_value(self) -> int:
        return ord("a") if self.filler == "text" else 0

    @property
    def first_key(self) -> int:
        return ord("A") if self.filler == "text" else NUM_VALUES

    @property
    def num_filler(self) -> int:
        """Tokens that occur in the filler; SET and GET come after them."""
        return 256 if self.filler == "text" else 2 * NUM_VALUES + self.keys

    @property
    def num_tokens(self) -> int:
        return self.num_filler + 2

    @property
    def set_token(self) -> int:
        return self.num_filler

    @property
    def get_token(self) -> int:
        return self.num_filler + 1

    @property
    def writes(self) -> int:
        return self.facts + self.overwritten

    def stream(self, rows: int, draw: torch.Generator) -> Generator[Tensor, int, None]:
        """Endless filler of unseen files, or noise: a generator to which the length of the next piece is sent."""
        at = torch.randint(2**40, (rows, 1), generator=draw)
        length = yield torch.empty(rows, 0, dtype=torch.int64)
        while True:
            if self.filler == "random":
                length = yield torch.randint(self.num_filler, (rows, length), generator=draw)
            else:
                text = standard_library(unseen=True)
                at = at + length
                length = yield text[(at - length + torch.arange(length)) % len(text)].long()

    def draw_filler(self, rows: int, length: int, draw: torch.Generator, unseen: bool = False) -> Tensor:
        """(rows, length) tokens: uniform noise, or text from a random place on."""
        if self.filler == "random":
            return torch.randint(self.num_filler, (rows, length), generator=draw)
        text = standard_library(unseen)
        starts = torch.randint(len(text), (rows, 1), generator=draw)
        return text[(starts + torch.arange(length)) % len(text)].long()

    def draw(
        self, rows: int, length: int, draw: torch.Generator, *, questions: int = 0, unseen: bool = False
    ) -> Batch:
        """Sequences for training: facts in their first half, `questions` at any distance behind; or facts alone.

        Raises:
            ValueError: a length that does not hold all facts.
        """
        cells = length // CELL
        span = cells // 2 if questions else cells
        if span < self.writes:
            raise ValueError(f"length={length} has room for {span} facts, {self.writes} are to be set")
        tokens = self.draw_filler(rows, length, draw, unseen)
        keys = shuffled(rows, self.keys, draw)[:, : self.facts]
        again = keys.gather(1, shuffled(rows, self.facts, draw)[:, : self.overwritten])
        keys = torch.cat((keys, again), dim=1)
        keys = keys.gather(1, shuffled(rows, self.writes, draw))
        values = self.first_value + torch.randint(NUM_VALUES, keys.shape, generator=draw)
        places = shuffled(rows, span, draw)[:, : self.writes].sort(dim=1).values
        self.put_facts(tokens, keys, values, places * CELL + torch.randint(CELL - 2, places.shape, generator=draw))
        newest = torch.full((rows, self.keys), NOT_ASKED)
        for i in range(self.writes):
            newest.scatter_(1, keys[:, i : i + 1], values[:, i : i + 1])
        targets = torch.full((rows, length), NOT_ASKED)
        if questions:
            self.put_questions(tokens, targets, keys, values, places, min(questions, cells - self.writes), draw)
        return Batch(tokens, targets, newest)

    def put_facts(self, tokens: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> None:
        """Facts (b, m) into tokens, each from its place on."""
        named = [values, keys + self.first_key]
        first, second = named if self.order == "value key" else named[::-1]
        tokens.scatter_(1, at, self.set_token).scatter_(1, at + 1, first).scatter_(1, at + 2, second)

    def put_questions(
        self, tokens: Tensor, targets: Tensor, keys: Tensor, values: Tensor, places: Tensor, count: int,
        draw: torch.Generator,
    ) -> None:  # fmt: skip
        """Questions into free cells behind the first fact; which fact is asked for: near ones as often as far ones."""
        rows, cells = len(tokens), tokens.shape[1] // CELL
        is_taken = torch.zeros(rows, cells).scatter_(1, places, 1.0)
        asked = (torch.rand(rows, cells, generator=draw) + is_taken).argsort(dim=1)[:, :count]
        distance = asked[:, :, None] - places[:, None]  # (b, count, m)
        weight = torch.where(distance > 0, 1 / distance.clamp(min=1), 0.0)
        is_valid = (weight > 0).any(-1)
        weight = torch.where(is_valid[..., None], weight, 1.0)
        chosen = torch.multinomial(weight.flatten(0, 1), 1, generator=draw).view(rows, count)
        key = keys.gather(1, chosen)
        is_same = (distance > 0) & (keys[:, None] == key[..., None])
        newest = torch.where(is_same, places[:, None].expand_as(distance), -1).argmax(-1)
        at = asked * CELL + torch.randint(CELL - 1, asked.shape, generator=draw)
        row = torch.arange(rows)[:, None].expand_as(at)[is_valid]
        at = at[is_valid]
        tokens[row, at] = self.get_token
        tokens[row, at + 1] = self.first_key + key[is_valid]
        targets[row, at + 1] = values.gather(1, newest)[is_valid]


def shuffled(rows: int, count: int, draw: torch.Generator) -> Tensor:
    """A permutation of 0 ... count - 1 in each row."""
    return torch.rand(rows, count, generator=draw).argsort(dim=1)


@lru_cache(maxsize=2)
def standard_library(unseen: bool) -> Tensor:
    """The source of the Python standard library that runs this, without its tests: bytes of the files of one part."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    files = [path for path in files if not {"site-packages", "test", "tests", "idle_test"} & set(path.parts)]
    random.Random(0).shuffle(files)
    part = [path for i, path in enumerate(files) if (i % UNSEEN_SHARE == 0) == unseen]
    return torch.from_numpy(np.frombuffer(b"".join((root / path).read_bytes() for path in part), np.uint8).copy())
