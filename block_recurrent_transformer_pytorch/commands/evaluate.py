"""What a trained model's memory carries: bits per byte over whole documents, and with parts of the memory taken away.

    python evaluate.py runs/mine                          # the run's own validation split
    python evaluate.py runs/mine --data books/ --split all --rows 4

Every document is read from its first token to its last, in four ways:

    carried              memories and states as in training
    state reset          the states return to their initial values at the start of every block
    no XL memory         a block sees no earlier token, neither word for word nor compressed; states are carried
    neither              a block sees nothing but itself

The differences measure DEPENDENCE, not worth: how much worse this model gets when what it learned to rely on is taken
from it. A model that never had states would have learned to do without. What states are worth is the difference to
such a model, trained alike: `train.py --reset-states-every-block` trains one of the same parameters, and its "state
reset" is the figure to compare this run's "carried" with.

It prints a table with 95 % bootstrap intervals, and bits per byte by position in the document, and writes them with a
figure and one line a document to DIR/evaluation: table.txt, positions.csv, documents.csv, positions.png. And a page to
look at in a browser, report.html: the text (the beginning of it, --report-tokens), coloured by what each memory gave
each token, and what the states do over time. --no-report saves the time of reading that much once more.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Config,
    Memories,
    States,
    data,
    pretrained,
    report,
    select_rows,
)
from block_recurrent_transformer_pytorch.flags import DEVICES, positive

Floats = NDArray[np.float64]

WAYS = {  # name: (states are carried, memories are carried)
    "carried": (True, True),
    "state reset": (False, True),
    "no XL memory": (True, False),
    "neither": (False, False),
}
EDGES = 64 * 2 ** np.arange(15)  # positions 64 ... 1,048,576
MOST_TOKENS = 2**13  # of a call, over all rows; more where --rows segments have more
DEPENDENCE = """\
The differences show how much this model depends on what was taken away, not what it is worth: a model that was trained
without would have learned to do without. The control for that: train.py --reset-states-every-block, evaluated by its
"state reset"."""
CONTROL = """\
This model was trained with its states reset at every block: "state reset" is its figure; where states are carried it
sees what it never saw in training."""
MANY_DOCUMENTS = 10  # from so many on, documents are what the bootstrap draws; below, blocks


class Losses(NamedTuple):
    """Nats that were lost."""

    blocks: Floats  # in every block of every document
    positions: Floats  # between EDGES, with what lies before and behind
    tokens: NDArray[np.float32]  # by each of the first tokens of the corpus


class Layout(NamedTuple):
    """Where the blocks of the documents lie in arrays over all of them, and how many bytes each holds."""

    first: NDArray[np.int64]  # (documents + 1,)
    block_bytes: Floats  # (blocks,)
    position_bytes: Floats  # between EDGES
    bytes_per_token: Floats  # (documents,)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="evaluate.py DIR [options]", allow_abbrev=False
    )
    add = parser.add_argument
    add("run", metavar="DIR", help="folder of the run")
    add("--checkpoint", choices=("best", "last"), default="best", help="which of the run; best: in validation")
    add("--data", help="as of train.py; default the run's own")
    add("--split", choices=("valid", "test", "all"), default="valid", help="part of the data")
    add("--documents", type=positive, metavar="N", help="the first N documents only")
    add("--rows", type=positive, default=16, help="documents that are read side by side")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="what computes")
    add("--threads", type=positive, help="threads on the CPU; default torch's choice")
    add("--out", metavar="DIR", help="where to write; default evaluation in the run's folder")
    page = "a page with the text, coloured by what memory gave it: report.html, which holds that text"
    add("--report", action=argparse.BooleanOptionalAction, default=True, help=page)
    add("--report-tokens", type=positive, default=2**17, metavar="N", help="of the first N tokens, default %(default)s")
    return parser


# ------------------------------------------------------------------------------------------------------------ reading


def load_model(folder: Path, which: pretrained.Which, device: str) -> BlockRecurrentTransformer:
    saved = pretrained.load_checkpoint(folder, which)
    config = Config.from_dict(saved.metadata["model_config"])
    print(f"{saved.path}, step {saved.step}")
    return BlockRecurrentTransformer.from_weights(config, saved.tensors["model"]).to(device)


def load_options(folder: Path) -> dict[str, Any]:
    """How the run was trained."""
    if not folder.is_dir():
        raise ValueError(f"run {folder}: there is no such folder")
    try:
        trained: dict[str, Any] = json.loads((folder / "config.json").read_bytes())["options"]
        later = {"split": "documents", "valid": None, "reset_states_every_block": False}  # than version 1.0.0
        return later | {name: trained[name] for name in ("data", "text_field", "tokenizer", "cache")} | trained
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"run {folder}: its config.json cannot be read: {type(error).__name__}: {error}") from error


def load_documents(options: argparse.Namespace, trained: dict[str, Any]) -> tuple[data.Source, data.Corpus]:
    path, part = options.data or trained["data"], options.split
    if trained["valid"] and not options.data:
        if part == "test":
            raise ValueError(f"--split test: the run was given --valid {trained['valid']} and has no test text")
        path, part = (trained["valid"], "all") if part == "valid" else (path, part)
    source = data.load_source(path, text_field=trained["text_field"])
    if part != "all":
        source = getattr(data.split(source, trained["split"]), part)
    if options.documents:
        source = data.Source(source.documents[: options.documents])
    print(f"{path}, {options.split}: {source.describe()}")
    return source, data.build_corpus(source, pretrained.load_tokenizer(options.run), trained["cache"])


def lay_out(corpus: data.Corpus, width: int) -> Layout:
    lengths = corpus.lengths
    per_token = corpus.byte_counts / np.maximum(lengths, 1)
    blocks = -(-lengths // width)
    first = np.concatenate([[0], np.cumsum(blocks)])
    sizes = np.full(first[-1], width)
    sizes[first[1:][lengths > 0] - 1] = ((lengths - 1) % width + 1)[lengths > 0]
    ends = np.concatenate([[0], EDGES, [np.iinfo(np.int64).max]])
    within = np.minimum(lengths[:, None], ends[1:]) - np.minimum(lengths[:, None], ends[:-1])  # (documents, buckets)
    return Layout(first, sizes * np.repeat(per_token, blocks), per_token @ within, per_token)


class Stretch(NamedTuple):
    """Blocks of a document that are read one behind the other, each with what those before it left."""

    document: int
    first: int  # block that is read first
    counted: int  # block whose losses are the first to count: before it, memories fill
    end: int  # behind the last one


def make_stretches(model: BlockRecurrentTransformer, layout: Layout, way: str) -> list[Stretch]:
    """Whole documents where states are carried. Without them what a block sees is bounded: stretches begin anywhere.

    A layer sees so many blocks back, of which each has seen as many in the layer below.
    """
    keeps_states, keeps_memories = WAYS[way]
    config = model.config
    warm = config.depth * max(model.reach, config.num_xl_blocks) if keeps_memories else 0
    unbounded = config.enhanced_recurrence or config.extra_memories  # memories of memories, or a user's own kinds
    whole = keeps_states or (keeps_memories and unbounded)
    stretches = []
    for document, blocks in enumerate(np.diff(layout.first).tolist()):
        length = max(1, blocks if whole else 16 * warm)
        stretches += [
            Stretch(document, max(0, start - warm), start, min(blocks, start + length))
            for start in range(0, blocks, length)
        ]
    return stretches


def side_by_side(stretches: list[Stretch], rows: int, most: int) -> Iterator[list[Stretch]]:
    """The longest first, in groups of which each is at least half as long as its longest: up to `rows` of them, and
    more of short ones, as long as a group has no more than `most` blocks."""
    group: list[Stretch] = []
    longest = 1
    for stretch in sorted(stretches, key=lambda one: one.first - one.end):
        length = stretch.end - stretch.first
        if group and (2 * length < longest or len(group) >= max(rows, most // longest)):
            yield group
            group = []
        longest = longest if group else length
        group.append(stretch)
    if group:
        yield group


def progress(what: str, total: int, quiet: bool = False) -> tqdm[Any]:
    pause = 0.5 if sys.stderr.isatty() else 15
    return tqdm(total=total, desc=what, unit="token", unit_scale=True, mininterval=pause, disable=quiet)


@torch.no_grad()
def read(
    model: BlockRecurrentTransformer, corpus: data.Corpus, layout: Layout, rows: int, way: str, *,
    looked_at: int = 0, quiet: bool = False,
) -> Losses:  # fmt: skip
    """Reads all documents in one of WAYS. Calls are whole blocks, so that to carry nothing is to begin anew.

    `looked_at` is the number of tokens of the corpus whose losses are kept one by one.
    """
    keeps_states, keeps_memories = WAYS[way]
    bare = None if keeps_memories else without_memories(model)
    many = keeps_states and (keeps_memories or bare is not None)  # blocks a call
    model = bare or model
    config, width = model.config, model.config.block_width
    most = max(MOST_TOKENS, rows * config.max_seq_len) // width
    kept = np.zeros(min(looked_at, corpus.total_tokens), np.float32)
    losses = Losses(np.zeros(len(layout.block_bytes)), np.zeros(len(EDGES) + 1), kept)
    with progress(way, corpus.total_tokens, quiet) as bar:
        for group in side_by_side(make_stretches(model, layout, way), rows, most):
            memories: Memories | None = None
            states: States | None = None
            count, start, longest = max(1, most // len(group)) if many else 1, 0, group[0].end - group[0].first
            for start in range(0, longest, count):
                alive = [one for one in group if one.end - one.first > start]
                if len(alive) < len(group):
                    rows_left = torch.arange(len(alive))
                    memories = memories and select_rows(memories, rows_left)
                    states = states and select_rows(states, rows_left)
                group = alive
                part = load(corpus, layout, group, start, min(count, longest - start), width)
                x = torch.from_numpy(part.tokens).to(model.token_emb.weight.device)
                nats, memories, states = model(
                    x, xl_memories=memories, states=states, return_loss=True, reduction="none"
                )  # (b, n)
                memories, states = memories if keeps_memories or many else None, states if keeps_states else None
                add_up(losses, part, nats.cpu().numpy())
                bar.update(int(part.counts.sum()))
    return losses


def seconds_needed(model: BlockRecurrentTransformer, corpus: data.Corpus, rows: int) -> float | None:
    """How long reading in all WAYS will take, from reading some of it; None where that would take a tenth as long."""
    sample = corpus.spread(rows, 4 * max(model.config.max_seq_len, MOST_TOKENS // rows))
    if 10 * sample.total_tokens > corpus.total_tokens:
        return None
    began = time.perf_counter()
    for way in WAYS:
        read(model, sample, lay_out(sample, model.config.block_width), rows, way, quiet=True)
    return (time.perf_counter() - began) * corpus.total_tokens / sample.total_tokens


def without_memories(model: BlockRecurrentTransformer) -> BlockRecurrentTransformer | None:
    """The model as one that never has a memory, so that a call may hold many blocks; None where there is none."""
    if model.config.empty_memory == "zeros" or model.config.enhanced_recurrence:
        return None
    return report.with_options(model, num_xl_blocks=0, use_compressed_mem=False, extra_memories={})


class Part(NamedTuple):
    """What a call reads."""

    tokens: NDArray[np.int64]  # (b, n + 1): the token before, then the targets, padded with 0
    counts: NDArray[np.bool_]  # (b, n): which losses count
    blocks: NDArray[np.int64]  # (b, n / w): which blocks of all documents they are in
    positions: NDArray[np.int64]  # (b, n): where in their documents
    places: NDArray[np.int64]  # (b, n): where in the corpus


def load(corpus: data.Corpus, layout: Layout, group: list[Stretch], start: int, count: int, width: int) -> Part:
    """The next blocks of every stretch, so many from its `start` on."""
    document, first, counted, end = np.array(group).T[:, :, None]  # (b, 1) each
    blocks = first + start + np.arange(count)
    positions = (first + start) * width + np.arange(count * width)
    there = positions < np.minimum(end * width, corpus.lengths[document])
    before = np.append(positions[:, :1] - 1, positions, axis=1)  # (b, n + 1)
    tokens = corpus.tokens[np.minimum(corpus.offsets[document] + np.maximum(before, 0), corpus.total_tokens - 1)]
    known = np.append(before[:, :1] >= 0, there, axis=1)
    counts = there & (positions >= counted * width)
    places = corpus.offsets[document] + positions
    return Part(np.where(known, tokens, 0).astype(np.int64), counts, layout.first[document] + blocks, positions, places)


def add_up(losses: Losses, part: Part, nats: Floats) -> None:
    """Adds nats (b, n) to the blocks and positions that they belong to, and keeps those of tokens looked at."""
    looked_at = part.counts & (part.places < len(losses.tokens))
    losses.tokens[part.places[looked_at]] = nats[looked_at]
    nats, width = np.where(part.counts, nats, 0).astype(np.float64), nats.shape[1] // part.blocks.shape[1]
    held = part.counts[:, ::width]  # a block counts if its first token does
    losses.blocks[part.blocks[held]] += nats.reshape(*part.blocks.shape, width).sum(2)[held]
    buckets = np.searchsorted(EDGES, part.positions.ravel(), side="right")
    losses.positions[:] += np.bincount(buckets, weights=nats.ravel(), minlength=len(losses.positions))


# ----------------------------------------------------------------------------------------------------------- intervals


def bits(nats: Floats, num_bytes: Floats) -> Floats:
    return np.asarray(nats / math.log(2) / num_bytes)


def resampled(values: Iterable[Floats], times: int, seed: int = 0) -> list[Floats]:
    """Sums of each array over as many units as there are, drawn with replacement: the same units for all. (times,)"""
    arrays = np.stack(list(values))  # (k, units)
    random, units = np.random.default_rng(seed), arrays.shape[1]
    sums = [arrays @ np.bincount(random.integers(0, units, units), minlength=units) for _ in range(times)]
    return list(np.stack(sums, axis=1))


def interval(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def make_table(layout: Layout, losses: dict[str, Losses]) -> str:
    """Bits per byte of each way with intervals, and what it loses against carrying everything."""
    num_documents = len(layout.first) - 1
    unit = "documents" if num_documents >= MANY_DOCUMENTS else "blocks"

    def units(blocks: Floats) -> Floats:
        if unit == "blocks":
            return blocks
        sums = np.concatenate([[0], np.cumsum(blocks)])[layout.first]
        return np.diff(sums)

    drawn = resampled([units(layout.block_bytes), *(units(way.blocks) for way in losses.values())], 1000)
    base = bits(drawn[1], drawn[0])
    lines = [f"{'':14} bits per byte  95 % interval      against carried  95 % interval"]
    for (name, way), sums in zip(losses.items(), drawn[1:]):
        value = float(bits(way.blocks.sum(), layout.block_bytes.sum()))
        low, high = interval(bits(sums, drawn[0]))
        more = value - float(bits(losses["carried"].blocks.sum(), layout.block_bytes.sum()))
        least, most = interval(bits(sums, drawn[0]) - base)
        lines.append(f"{name:14} {value:13.4f}  {low:.4f} ... {high:.4f}  {more:+15.4f}  {least:+.4f} ... {most:+.4f}")
    lines.append(f"{num_documents:,} documents, {layout.block_bytes.sum():,.0f} bytes; the bootstrap draws {unit}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- writing


def write_documents(path: Path, source: data.Source, layout: Layout, losses: dict[str, Losses]) -> None:
    """One line a document; intervals from a bootstrap over its blocks."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # names of files are bytes
        writer = csv.writer(file)
        parts = ("bits_per_byte", "low", "high")
        names = [f"{way.replace(' ', '_')}_{part}" for way in losses for part in parts]
        writer.writerow(["document", "bytes", *names])
        for index, document in enumerate(source.documents):
            blocks = slice(layout.first[index], layout.first[index + 1])
            if blocks.start == blocks.stop:
                continue
            sizes, values = layout.block_bytes[blocks], []
            drawn = resampled([sizes, *(way.blocks[blocks] for way in losses.values())], 200)
            for way, sums in zip(losses.values(), drawn[1:]):
                values += [float(bits(way.blocks[blocks].sum(), sizes.sum())), *interval(bits(sums, drawn[0]))]
            writer.writerow([document.name, document.num_bytes, *(f"{value:.6f}" for value in values)])


def write_positions(path: Path, layout: Layout, losses: dict[str, Losses]) -> list[list[Any]]:
    """One line for each range of positions that some document reaches; returns them."""
    starts, rows = [0, *EDGES.tolist()], []
    for index in np.flatnonzero(layout.position_bytes):
        end = int(EDGES[index]) if index < len(EDGES) else ""
        values = [float(bits(way.positions[index], layout.position_bytes[index])) for way in losses.values()]
        rows.append([starts[index], end, round(float(layout.position_bytes[index])), *values])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["from", "to", "bytes", *(way.replace(" ", "_") for way in losses)])
        writer.writerows(rows)
    return rows


def draw(path: Path, rows: list[list[Any]], names: list[str], title: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    middles = [math.sqrt(max(row[0], 32) * (row[1] or 2 * row[0])) for row in rows]
    for index, name in enumerate(names):
        axes.plot(middles, [row[3 + index] for row in rows], "o-", markersize=4, label=name)
    axes.set(xscale="log", xlabel="position in the document (tokens)", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_report(
    path: Path, title: str, model: BlockRecurrentTransformer, text: report.Text, losses: dict[str, Losses],
    positions: list[list[Any]], note: str,
) -> None:  # fmt: skip
    nats, total = {name: way.tokens for name, way in losses.items()}, report.passes(model) * len(text.tokens)
    try:
        with progress("report", total) as bar:
            report.write(path, title, model, text, nats, positions, note, advance=bar.update)
    except ValueError as error:
        print(f"no report: {error}", file=sys.stderr)


def evaluate(options: argparse.Namespace) -> None:
    folder = Path(options.run)
    out = Path(options.out) if options.out else folder / "evaluation"
    trained = load_options(folder)
    model = load_model(folder, options.checkpoint, options.device)
    source, corpus = load_documents(options, trained)
    if corpus.num_tokens > model.config.num_tokens:  # a model may have more ids than its tokenizer
        raise ValueError(f"--data gives {corpus.num_tokens} kinds of tokens, the model has {model.config.num_tokens}")
    layout = lay_out(corpus, model.config.block_width)
    rows = min(options.rows, corpus.num_documents)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written to: {error.strerror}") from error
    needed = seconds_needed(model, corpus, rows)
    duration = "" if needed is None else f"; about {describe_seconds(needed)} in all"
    print(f"reading {corpus.total_tokens:,} tokens in {len(WAYS)} ways{duration}", flush=True)
    looked_at = options.report_tokens if options.report else 0
    losses = {way: read(model, corpus, layout, rows, way, looked_at=looked_at) for way in WAYS}

    note = CONTROL if trained["reset_states_every_block"] else DEPENDENCE
    table = f"{make_table(layout, losses)}\n{note}"
    (out / "table.txt").write_text(table + "\n")
    positions = write_positions(out / "positions.csv", layout, losses)
    write_documents(out / "documents.csv", source, layout, losses)
    draw(out / "positions.png", positions, list(losses), f"{folder.name}, {options.split}")
    print(f"{'position':>10}  {'bytes':>12}  " + "  ".join(f"{way:>12}" for way in losses))
    for start, _, count, *values in positions:
        print(f"{start:>10,}  {count:>12,}  " + "  ".join(f"{value:12.4f}" for value in values))
    print(f"\n{table}\n")
    if options.report:
        text = report.spell(source.documents, pretrained.load_tokenizer(options.run), corpus, looked_at)
        write_report(out / "report.html", f"{folder.name}, {options.split}", model, text, losses, positions, note)
    print(f"written to {out}")


def describe_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(argv: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    options = make_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        evaluate(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
