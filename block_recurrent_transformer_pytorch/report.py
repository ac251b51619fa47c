"""One page to look at instead of tables: a text, coloured by what each memory gave it, and the memory over time.

    text = report.spell(documents, tokenizer, corpus, most=2**17)
    nats = {"carried": ..., "state reset": ..., "no XL memory": ..., "neither": ...}  # losses of each token
    report.write("report.html", "my run", model, text, nats, positions, note)

What a memory gave a token is the loss without it, minus the loss with it, in bits. That is DEPENDENCE, not worth: the
model learned to rely on what is taken from it here. The page says so.

The page is one file without any address in it, `report.html` of this folder with the numbers put in. Each token takes
a byte for its loss and one for each memory: square roots of bits, in 255 or 127 steps, so that what is small is exact
to some hundredths and what is large to some tenths of a bit. Sums on the page are those of the numbers before that.

Axis letters: s states, d dim, h heads, n tokens of a block.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from .data import ByteTokenizer, Corpus, Document, FileTokenizer
from .files import written_at_once
from .inspecting import LayerRecord, inspecting
from .scoring import score

Floats = NDArray[np.floating[Any]]

COLUMNS = 400  # of what is drawn over time: so many means over blocks
QUANTILES = (0.1, 0.5, 0.9)
TOKENS_AT_ONCE = 2048
WITHOUT = {  # the ways of evaluate.py in which something is taken away, and what that is
    "state reset": ("states", "the recurrent states"),
    "no XL memory": ("XL memory", "the tokens of earlier blocks, word for word and compressed or chosen"),
    "neither": ("all memory", "states and earlier tokens together"),
}


class Text(NamedTuple):
    """Documents one behind the other, and where their tokens begin."""

    content: bytes
    starts: NDArray[np.int64]  # (tokens + 1,) bytes before each token, and all of them
    documents: list[tuple[str, int]]  # name, and number of the first token
    tokens: NDArray[np.int64]  # (tokens,) ids

    def split_documents(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The ids of each document, (n,) int64."""
        bounds = [first for _, first in self.documents[1:]]
        return [torch.from_numpy(part).to(device) for part in np.split(self.tokens, bounds)]


def spell(documents: Sequence[Document], tokenizer: ByteTokenizer | FileTokenizer, corpus: Corpus, most: int) -> Text:
    """The first `most` tokens of the documents, whose ids are in `corpus`.

    Raises:
        ValueError: no token at all; or the tokenizer does not give as many as the corpus holds.
    """
    contents, starts, names, count, size = [], [np.zeros(1, np.int64)], [], 0, 0
    for number, document in enumerate(documents):
        length = min(int(corpus.lengths[number]), most - count)
        if length < 1:
            continue
        content, begins = tokenizer.aligned(document.read(), length)
        if len(begins) != length:
            raise ValueError(f"tokenizer makes {len(begins)} tokens of {document.name}, the corpus holds {length}")
        contents.append(content)
        starts.append(size + np.append(begins[1:], len(content)))
        names.append((document.name, count))
        count, size = count + length, size + len(content)
    if not count:
        raise ValueError(f"documents hold no token, or most={most} is below 1")
    return Text(b"".join(contents), np.concatenate(starts), names, corpus.tokens[:count].astype(np.int64))


# -------------------------------------------------------------------------------------------------------- taking away


def with_options(model: BlockRecurrentTransformer, **options: Any) -> BlockRecurrentTransformer:
    """The model with other options of `Config`, and those of its weights that it then has. In eval mode."""
    config = replace(model.config, **options)
    with torch.device("meta"):
        names = BlockRecurrentTransformer(config).state_dict()
    weights = model.state_dict()
    return BlockRecurrentTransformer.from_weights(config, {name: weights[name] for name in names})


def further_kinds(model: BlockRecurrentTransformer) -> dict[str, dict[str, Any]]:
    """Kinds of memory beside the XL memory, and the options without which a model has all but one."""
    extra = model.config.extra_memories
    found = {
        f"{name} memory": {"extra_memories": {other: extra[other] for other in extra if other != name}}
        for name in extra
    }
    compressed: dict[str, dict[str, Any]] = {"compressed memory": {"use_compressed_mem": False}}
    return (compressed if model.config.use_compressed_mem else {}) | found


def passes(model: BlockRecurrentTransformer) -> int:
    """How often `write` reads the text: to look inside, and without each further kind of memory."""
    return bool(model.cells) + len(further_kinds(model))


class Colouring(NamedTuple):
    """A number for each token."""

    name: str
    about: str
    bits: Floats  # (tokens,)


def colourings(
    model: BlockRecurrentTransformer, text: Text, nats: dict[str, Floats],
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Colouring]:  # fmt: skip
    """The loss of each token, and what each memory that the model has saved of it, in bits.

    Args:
        nats: of each token: "carried", and what is in WITHOUT.
        advance: is told how many tokens were read, for a progress bar.
    """
    config, bits = model.config, {way: np.asarray(loss, np.float64) / math.log(2) for way, loss in nats.items()}
    kinds = further_kinds(model)
    has = {"state reset": bool(model.cells), "no XL memory": bool(kinds or (config.num_xl_blocks and config.xl_layers))}
    has["neither"] = all(has.values())
    found = [Colouring("surprise", "what a token costs with all memory", bits["carried"])]
    found += [Colouring(*WITHOUT[way], bits[way] - bits["carried"]) for way in WITHOUT if has[way]]
    documents = text.split_documents(model.token_emb.weight.device) if kinds else []
    for name, options in kinds.items():
        scores = cast(list[Tensor], score(with_options(model, **options), documents, bos=0))
        less = -torch.cat(scores).double().cpu().numpy() / math.log(2)
        advance(len(text.tokens))
        found.append(Colouring(name, f"the {name} alone; the others stay", less - bits["carried"]))
    return found


# ------------------------------------------------------------------------------------------------------- looking inside


@dataclass
class Inside:
    """What happened in a model, an entry (blocks, ...) for each call, nan for blocks that are not full."""

    first_tokens: list[int] = field(default_factory=list)  # of each block
    attention: dict[str, list[Floats]] = field(default_factory=dict)
    """By layer and read, the mean over heads and tokens: the weights of the states, and the exponential of the entropy
    of these weights, (blocks, s + 1)."""
    states: dict[str, list[Floats]] = field(default_factory=dict)
    """By layer: QUANTILES over the states of their lengths, then of their movements, (blocks, 6)."""
    keep: dict[str, Tensor] = field(default_factory=dict)
    """By layer and gate: the sum over the full blocks, (s or 1, d or 1)."""
    full_blocks: int = 0


@torch.no_grad()
def look(
    model: BlockRecurrentTransformer, text: Text, advance: Callable[[int], object] = lambda tokens: None
) -> Inside:
    """Reads each document after a 0, as train.py and evaluate.py do, and notes what tokens and states do.

    Args:
        advance: is told how many tokens were read, for a progress bar.
    """
    inside, width, read = Inside(), model.config.block_width, 0
    segment = max(1, TOKENS_AT_ONCE // width) * width
    for document in text.split_documents(model.token_emb.weight.device):
        memories = states = None
        for tokens in torch.split(F.pad(document, (1, -1)), segment):  # the last token is not read
            with inspecting(model) as seen:
                _, memories, states = model(tokens[None], xl_memories=memories, states=states, logits_to_keep=1)
            inside.first_tokens += range(read, read + len(tokens), width)
            for layer, record in seen.items():
                note_attention(inside, layer, record, len(model.layer(layer).read_norm))
                if layer in model.cells:
                    note_states(inside, layer, record, blocks=-(-len(tokens) // width))
                note_gates(inside, layer, record, len(tokens) // width)
            inside.full_blocks += len(tokens) // width
            read += len(tokens)
            advance(len(tokens))
    return inside


def named(layer: int, what: str, index: int, count: int) -> str:
    return f"layer {layer}, {what} {index + 1}" if count > 1 else f"layer {layer}"


def note_attention(inside: Inside, layer: int, record: LayerRecord, reads: int) -> None:
    """Spans come one behind the other, and in each the reads."""
    for index in range(reads):
        weights = record.state_attention[index::reads]  # (t, h, n, s) each
        means = torch.cat([one.mean((1, 2)) for one in weights])
        spread = torch.cat([torch.special.entr(one).sum(-1).exp().mean((1, 2)) for one in weights])
        rows = torch.cat([means, spread[:, None]], dim=1).float().cpu().numpy()
        inside.attention.setdefault(named(layer, "read", index, reads), []).append(rows)


def note_states(inside: Inside, layer: int, record: LayerRecord, blocks: int) -> None:
    rows = torch.full((blocks, 2 * len(QUANTILES)), math.nan, dtype=torch.float64)
    if record.state_norm:
        levels = torch.tensor(QUANTILES, dtype=torch.float64)
        measures = [torch.cat(one).double().cpu() for one in (record.state_norm, record.write_size)]  # (full blocks, s)
        rows[: len(measures[0])] = torch.cat([one.quantile(levels, dim=1).T for one in measures], dim=1)
    inside.states.setdefault(f"layer {layer}", []).append(rows.float().numpy())


def note_gates(inside: Inside, layer: int, record: LayerRecord, full_blocks: int) -> None:
    """Of gates with a share for each block; the shares of those that decide for each token have a fourth axis."""
    shares = [keep for keep in record.keep if keep.ndim < 4]
    gates = len(shares) // max(full_blocks, 1)
    for index in range(gates):
        total = torch.stack(shares[index::gates]).double().cpu().sum(0)
        total = total.reshape((1,) * (3 - total.ndim) + total.shape)[0]
        name = named(layer, "gate", index, gates)
        inside.keep[name] = total + inside.keep.get(name, 0)


def half_lives(keep: Tensor) -> Tensor:
    """Blocks after which half of an old value is left, ln 0.5 / ln k, from shares k; inf where all is kept."""
    return math.log(2) / keep.clamp(0, 1).log().abs()


def in_columns(rows: Floats, columns: int) -> Floats:
    """Means over neighbouring blocks, (blocks, ...) -> (columns, ...); nan where there is nothing but nan."""
    starts = -(-np.arange(columns) * len(rows) // columns)
    known = np.isfinite(rows)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(known, rows, 0.0), starts)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


# ------------------------------------------------------------------------------------------------------------- the page


def quantised(bits: Floats, levels: int) -> tuple[NDArray[np.integer[Any]], float]:
    """Square roots of bits in so many steps, 255 where there are none below 0, else 127 up and down; and the largest.

    bits = sign(q) (q / levels)^2 largest
    """
    largest = float(np.abs(bits).max(initial=0)) or 1.0
    steps = np.sign(bits) * np.rint(levels * np.sqrt(np.abs(bits) / largest))
    return steps.astype(np.uint8 if levels == 255 else np.int8), largest


def packed(array: NDArray[Any] | bytes) -> str:
    raw = array if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes()
    return base64.b64encode(zlib.compress(raw, 6)).decode()


def numbers(values: Any) -> list[Any]:
    """Nested lists with four digits; None for what is not finite, of which JSON knows nothing."""
    array = np.asarray(values, np.float64)
    if array.ndim > 1:
        return [numbers(row) for row in array]
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in array]


def describe_model(model: BlockRecurrentTransformer) -> str:
    config = model.config
    parts = [
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.2f} million parameters",
        f"{config.depth} layers of {config.dim}",
        f"blocks of {config.block_width} tokens",
    ]
    if model.cells:
        layers = ", ".join(map(str, model.cells))
        parts.append(f"{config.num_state_vectors} states in layer {layers}, gate {config.gate}")
    return " · ".join(parts)


def inside_facts(inside: Inside, sections: dict[str, str]) -> dict[str, Any]:
    """What happened inside, for the page's script; maps of attention go into `sections`."""
    columns = min(COLUMNS, len(inside.first_tokens))
    first_tokens = [inside.first_tokens[-(-column * len(inside.first_tokens) // columns)] for column in range(columns)]
    attention: list[dict[str, Any]] = []
    gates, states = [], []
    for name, entries in inside.attention.items():
        means = in_columns(np.concatenate(entries), columns)  # (columns, s + 1)
        steps, largest = quantised(means[:, :-1].T, 255)
        key = f"attention-{len(attention)}"
        sections[key] = packed(steps)
        attention.append(
            {"name": name, "key": key, "states": len(steps), "largest": largest, "spread": numbers(means[:, -1])}
        )
    for name, total in inside.keep.items():
        keep = total / inside.full_blocks
        channels = half_lives(keep.mean(0))
        low, high = (half_lives(keep.quantile(level, dim=0)) for level in (QUANTILES[0], QUANTILES[2]))
        order = channels.argsort()
        lives = {key: numbers(x[order]) for key, x in (("half_life", channels), ("low", low), ("high", high))}
        gates.append({"name": name, "channels": order.tolist(), "blocks": inside.full_blocks, **lives})
    for name, entries in inside.states.items():
        means = in_columns(np.concatenate(entries), columns).T  # (6, columns)
        if np.isfinite(means).any():
            states.append({"name": name, "length": numbers(means[:3]), "movement": numbers(means[3:])})
    return {"columns": first_tokens, "attention": attention, "gates": gates, "states": states}


def shortened(documents: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Names without the folder that all of them are in."""
    shared = len(os.path.commonpath([os.path.dirname(name) for name, _ in documents]))
    return [(name[shared:].lstrip("/"), first) for name, first in documents]


def make_page(
    title: str, about: str, note: str, block_width: int, text: Text, coloured: Sequence[Colouring],
    positions: Sequence[Sequence[Any]], ways: Sequence[str], inside: dict[str, Any], sections: dict[str, str],
) -> str:  # fmt: skip
    """The page; see `write`.

    Raises:
        ValueError: numbers that are not finite.
    """
    shown, num_bytes = [], len(text.content)
    for index, one in enumerate(coloured):
        if not np.isfinite(one.bits).all():
            raise ValueError(f"the losses hold {int((~np.isfinite(one.bits)).sum())} tokens that are not finite")
        steps, largest = quantised(one.bits, 127 if index else 255)
        sections[f"bits-{index}"] = packed(steps)
        mean = float(one.bits.sum() / num_bytes)
        shown.append({"name": one.name, "about": one.about, "largest": largest, "mean": round(mean, 6)})
    sections["text"] = packed(text.content)
    lengths = np.diff(text.starts)
    if (lengths != 1).any():
        sections["lengths"] = packed(lengths.astype(np.uint32))
    facts = {
        "title": title, "about": about, "note": note, "blockWidth": block_width, "tokens": len(lengths),
        "bytes": num_bytes, "documents": shortened(text.documents), "colourings": shown, "ways": list(ways),
        "positions": [[*row[:3], *numbers(row[3:])] for row in positions], **inside,
    }  # fmt: skip
    data = [("facts", "application/json", json.dumps(facts).replace("<", "\\u003c"))]
    data += [(name, "text/plain", content) for name, content in sections.items()]
    scripts = "\n".join(f'<script type="{kind}" id="data-{name}">{content}</script>' for name, kind, content in data)
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    safe_title = html.escape(title).encode("utf-8", "replace").decode()
    return template.replace("{{title}}", safe_title).replace("{{data}}", scripts)


def write(
    path: str | Path, title: str, model: BlockRecurrentTransformer, text: Text, nats: dict[str, Floats],
    positions: Sequence[Sequence[Any]], note: str, advance: Callable[[int], object] = lambda tokens: None,
) -> None:  # fmt: skip
    """Writes the page. The text is read once to look inside, and once for each kind of memory beside the XL memory.

    Args:
        path: of the file; it holds the text itself.
        title: what was evaluated on what.
        text: from `spell`.
        nats: the loss of each token of the text, (tokens,): "carried", "state reset", "no XL memory", "neither".
        positions: rows of (from, to, bytes, bits per byte of each of these), by position in the document.
        note: what the differences mean.
        advance: is told how many tokens were read, for a progress bar.

    Raises:
        ValueError: losses that are not finite, or not one for each token.
        OSError: the file cannot be written.
    """
    for way, loss in nats.items():
        if np.shape(loss) != text.tokens.shape:
            raise ValueError(f"nats[{way!r}] must hold {len(text.tokens)} numbers, not {np.shape(loss)}")
    sections: dict[str, str] = {}
    coloured = colourings(model, text, nats, advance)
    inside = inside_facts(look(model, text, advance), sections) if model.cells else {}
    about = describe_model(model)
    width, ways = model.config.block_width, list(nats)
    page = make_page(title, about, note, width, text, coloured, positions, ways, inside, sections)
    with written_at_once(Path(path)) as file:
        file.write(page.encode())
