"""The data room: documents in, batches out.

    source = load_source("stdlib")                                     # documents as bytes, where they come from
    splits = split(source)                                             # 90/5/5, by document or within each
    corpus = build_corpus(splits.train, ByteTokenizer(), "data/cache")  # token ids in a memory-mapped file
    stream = DocumentStream(corpus, batch=32, segment=512, seed=0)     # every batch row reads one document in order
    batch = next(stream)                                               # tokens, reset, targets_mask, document, position

Each step is a value that the next one takes, and each knows the hash of what made it. The order of reading follows the
data pipeline of the Block-Recurrent Transformer (Hutchins et al., 2022, arXiv:2203.07852, and its released code): a row
reads its document to the end, segment by segment, then takes the next unread one; rows never swap and documents are
never packed together. `batch.tokens[:, 1:]` of a stream with ``shuffle=False`` are the released code's segments.

Legend of axis letters: b batch rows, n target tokens of a segment.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import http.client
import importlib
import io
import json
import math
import os
import sysconfig
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from .files import written_at_once

Integers = NDArray[np.integer[Any]]

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_BYTES = 100_000_000

_READ_ERRORS = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Summed loss in nats over the number of BYTES it stands for: comparable between any two tokenizers."""
    return nats / math.log(2) / num_bytes


# 1 sources: documents as bytes


class Document(NamedTuple):
    """One document, read when needed; it must fit in memory."""

    name: str  # path, path:line or path[start:stop], for messages and tables
    read: Callable[[], bytes]
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """The documents of a corpus in a fixed order, none of them empty."""

    documents: tuple[Document, ...]
    num_skipped: int = 0  # empty documents that were left out

    @property
    def num_bytes(self) -> int:
        return sum(document.num_bytes for document in self.documents)

    @property
    def sha256(self) -> str:
        """Of a single document's bytes (what ``sha256sum`` prints), else of the documents' sha256 in order."""
        digests = [document.sha256 for document in self.documents]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def describe(self) -> str:
        """One line to print: documents, bytes, empty documents skipped, sha256."""
        return (
            f"{len(self.documents):,} documents, {self.num_bytes:,} bytes, "
            f"{self.num_skipped:,} empty skipped, sha256 {self.sha256}"
        )


def load_source(data: str | Path, *, text_field: str = "text", progress: bool = True) -> Source:
    """Finds the documents behind ``data`` and reads each once, for its size and hash.

    Args:
        data: ``"stdlib"``: the Python standard library's own source. ``"enwik8"``: found in ./data or downloaded.
            Else a path: a file is one document; a folder (hidden files left out, links followed) or a glob pattern
            gives one document per file, in sorted order. A file that ends in .gz, or in .zip with a single member, is
            unpacked. A file that ends in .jsonl gives one document per line that is not blank. Endings may be in
            upper case.
        text_field: name of the field that holds the text of a JSONL line.
        progress: show a progress bar (on terminals, when it takes longer than a second).

    Raises:
        ValueError: nothing is found, a file cannot be read, or a JSONL line holds no such text; names path and line.
    """
    if str(data) == "stdlib":
        return standard_library(progress=progress)
    if str(data) == "enwik8":
        path = find_enwik8() or download_enwik8()
        if path is None:
            raise ValueError(f"data: enwik8 is not in ./data and cannot be downloaded from {ENWIK8_URL}")
        data = path
    try:
        readers = (reader for path in _list_files(str(data)) for reader in _readers(path, text_field))
        source = _survey(readers, progress)
    except OSError as error:
        raise ValueError(f"data: cannot read {str(data)[:200]}: {error.strerror}: {error.filename}"[:400]) from error
    if not source.documents:
        raise ValueError(f"data: {data} holds only empty documents ({source.num_skipped})")
    return source


def standard_library(*, progress: bool = True) -> Source:
    """The ``.py`` files of the running Python's standard library, tests included, installed packages excluded."""
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    paths = (path for path in root.rglob("*.py") if not installed & set(path.relative_to(root).parts))
    files = sorted((path for path in paths if path.is_file()), key=Path.as_posix)
    source = _survey(((str(path), partial(_read_file, path)) for path in files), progress)
    if not source.documents:
        raise ValueError(f"data: no .py file of the standard library in {root}")
    return source


def find_enwik8(folder: str | Path = "data") -> Path | None:
    """``enwik8``, ``enwik8.gz`` or ``enwik8.zip`` in ``folder``, the first that is there, else None."""
    paths = [Path(folder) / name for name in ("enwik8", "enwik8.gz", "enwik8.zip")]
    return next((path for path in paths if path.is_file()), None)


def download_enwik8(folder: str | Path = "data", *, timeout: float = 5.0, progress: bool = True) -> Path | None:
    """Downloads enwik8 (36 MB) and unpacks it to ``folder/enwik8`` (100 MB).

    Args:
        folder: made if missing.
        timeout: seconds to wait for a connection or for the next bytes.

    Returns:
        The path, or None if the machine is offline or what comes back is not enwik8.
    """
    packed = io.BytesIO()
    try:
        with urllib.request.urlopen(ENWIK8_URL, timeout=timeout) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            with _progress_bar("downloading enwik8", "B", total, progress) as bar:
                while piece := response.read(1 << 16):
                    bar.update(packed.write(piece))
        unpacked = _unzip(packed)
    except (http.client.HTTPException, *_READ_ERRORS):
        return None
    if len(unpacked) != ENWIK8_BYTES:
        return None
    path = Path(folder) / "enwik8"
    with written_at_once(path, shared=True) as file:
        file.write(unpacked)
    return path


def choose() -> str:
    """What to read where nobody says it: "enwik8" if it is in ./data or can be downloaded, else "stdlib"."""
    if find_enwik8() or download_enwik8():
        return "enwik8"
    print("enwik8 is not in data/ and cannot be downloaded: the Python standard library's source is read instead")
    return "stdlib"


def _list_files(data: str) -> list[Path]:
    """The files that ``data`` (a file, folder or glob pattern) stands for, sorted."""
    path = Path(data).expanduser()
    if data and path.is_file():
        return [path]
    if data and path.is_dir():
        found = _walk(path)
    else:
        found = (Path(match) for match in glob.glob(str(path), recursive=True) if data)
    files = sorted((p for p in found if p.is_file()), key=Path.as_posix)
    if not files:
        raise ValueError(f"data: {data!r} is no file, no folder with files and no pattern that matches a file")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """What lies below a folder, hidden names left out. Linked folders are followed, and each folder is entered once, so
    that links in a circle end."""

    def refuse(error: OSError) -> None:
        raise error

    entered = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(root)
        folders[:] = [] if real in entered else sorted(name for name in folders if not name.startswith("."))
        found = [] if real in entered else [Path(root, name) for name in names if not name.startswith(".")]
        entered.add(real)
        for path in found:
            if path.is_symlink() and not path.exists():
                warnings.warn(f"data: {path} is a link to what is not there, and left out", stacklevel=2)
        yield from found


def _readers(path: Path, text_field: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and reader of every document in a file: its lines if it ends in .jsonl, else the file."""
    if path.name.lower().endswith((".jsonl.gz", ".jsonl.zip")):
        raise ValueError(f"data: {path} is packed; unpack it first, lines are read by their place in the file")
    if path.suffix.lower() != ".jsonl":
        yield str(path), partial(_read_file, path)
        return
    with path.open("rb") as file:
        start = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", partial(_read_json_line, path, start, number, text_field)
            start += len(line)


def _read_file(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            return gzip.decompress(data)
        return _unzip(io.BytesIO(data)) if path.suffix.lower() == ".zip" else data
    except _READ_ERRORS as error:
        raise ValueError(f"data: cannot read {path}: {error}") from error


def _unzip(file: BinaryIO) -> bytes:
    with zipfile.ZipFile(file) as archive:
        if len(archive.namelist()) != 1:
            raise ValueError(f"the archive holds {len(archive.namelist())} files instead of 1")
        return archive.read(archive.namelist()[0])


def _read_json_line(path: Path, start: int, number: int, text_field: str) -> bytes:
    """The text of line ``number``, which starts at byte ``start``."""
    with path.open("rb") as file:
        file.seek(start)
        line = file.readline()
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {path} line {number} is not JSON: {error}") from error
    fields = record if isinstance(record, dict) else {}
    if isinstance(text := fields.get(text_field), str):
        return text.encode("utf-8", "surrogatepass")
    found = ", ".join(f"{name} ({type(value).__name__})" for name, value in fields.items()) or type(record).__name__
    raise ValueError(f"data: {path} line {number} has no string in text_field={text_field!r}, it has {found[:200]}")


def _survey(readers: Iterable[tuple[str, Callable[[], bytes]]], progress: bool) -> Source:
    """Reads every document once for its size and hash; empty ones are left out and counted."""
    documents, num_skipped = [], 0
    with _progress_bar("reading", "B", None, progress) as bar:
        for name, read in readers:
            content = read()
            bar.update(len(content))
            if content:
                documents.append(Document(name, read, len(content), hashlib.sha256(content).hexdigest()))
            num_skipped += not content
    return Source(tuple(documents), num_skipped)


# 2 splits


How = Literal["auto", "documents", "cut"]
HOWS: tuple[How, ...] = ("auto", "documents", "cut")


class Splits(NamedTuple):
    train: Source
    valid: Source
    test: Source

    def describe(self) -> str:
        """One line to print: how many bytes and documents each part has, and why these."""
        total = sum(part.num_bytes for part in self)
        sizes = [f"{name} {part.num_bytes:,} bytes ({100 * part.num_bytes / total:.1f} %)"
                 for name, part in zip(("training", "validation", "test"), self)]  # fmt: skip
        held_out = len(self.valid.documents), len(self.test.documents)
        if any(getattr(document.read, "func", None) is _read_slice for document in self.valid.documents):
            why = f"each of the {len(self.train.documents):,} documents is cut, its last tenth is held out"
        else:
            why = f"{held_out[0]:,} and {held_out[1]:,} whole documents are held out, chosen by their contents"
        return f"{', '.join(sizes)}: {why}"


def split(source: Source, how: How = "auto") -> Splits:
    """Splits 90/5/5 into training, validation and test, the same way on every machine, without a seed.

    In one of two ways:

    * "documents": in the order of their sha256 (a shuffle that depends on nothing but the contents) the first 5 % of
      the documents are for validation, the next 5 % for testing (at least one each), the rest for training. Equal
      documents go together. Fewer than three different documents are cut.
    * "cut": of every document the first 90 % of its bytes are for training, the next 5 % for validation and the last
      5 % for testing. So enwik8 is split, and a few books.
    * "auto": by documents where there are at least 20 different ones and each held-out part comes to between 2.5 % and
      10 % of the bytes; else every document is cut. Three books are thus not one for training, one for validation and
      one for testing, and a giant among small documents does not leave most of the text unread.

    Raises:
        ValueError: a part would be empty, or an unknown `how`.
    """
    if how not in HOWS:
        raise ValueError(f"how={how!r} must be one of {', '.join(HOWS)}")
    digests = sorted({document.sha256 for document in source.documents})
    least = 20 if how == "auto" else 3
    splits = _by_document(source, digests) if how != "cut" and len(digests) >= least else None
    if how == "auto" and splits is not None:
        shares = [part.num_bytes / source.num_bytes for part in (splits.valid, splits.test)]
        splits = splits if all(0.025 <= share <= 0.1 for share in shares) else None
    if splits is None:
        splits = Splits(*(_cut_source(source, *ends) for ends in ((0, 90), (90, 95), (95, 100))))
    if not all(part.documents for part in splits):
        raise ValueError(f"source: {source.num_bytes} bytes in {len(digests)} documents are too few to split 90/5/5")
    return splits


def _by_document(source: Source, digests: list[str]) -> Splits:
    held_out = max(1, round(0.05 * len(digests)))
    groups = digests[2 * held_out :], digests[:held_out], digests[held_out : 2 * held_out]
    return Splits(*(_choose(source, set(group)) for group in groups))


def _choose(source: Source, digests: set[str]) -> Source:
    return Source(tuple(document for document in source.documents if document.sha256 in digests))


def _cut_source(source: Source, start: int, stop: int) -> Source:
    """Of every document the bytes from ``start`` to ``stop`` percent."""
    readers = []
    for document in source.documents:
        first, last = document.num_bytes * start // 100, document.num_bytes * stop // 100
        readers.append((f"{document.name}[{first}:{last}]", partial(_read_slice, document, first, last)))
    return _survey(readers, progress=False)


def _read_slice(document: Document, start: int, stop: int) -> bytes:
    return document.read()[start:stop]


# 3 tokenizers: bytes to ids


class Tokenizer(Protocol):
    """What `build_corpus` needs of a tokenizer."""

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that encode alike; part of the name of the cache."""

    def encode(self, data: bytes) -> Integers: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class ByteTokenizer:
    """Every byte is its own id."""

    num_tokens = 256
    fingerprint = "bytes"

    def encode(self, data: bytes) -> Integers:
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def aligned(self, data: bytes, most: int) -> tuple[bytes, NDArray[np.int64]]:
        """The text of the first `most` tokens, and the byte at which each begins."""
        return data[:most], np.arange(len(data[:most]))


class FileTokenizer:
    """A ``tokenizer.json`` of the `tokenizers` library (an extra), without its special tokens, truncation and padding.

    Invalid UTF-8 is replaced by U+FFFD. Texts over a MiB are encoded in pieces that end with a line, to keep memory
    and time in bounds.

    Raises:
        ImportError: the library is missing.
        ValueError: ``path`` is not such a file.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            library = importlib.import_module("tokenizers")
        except ImportError as error:
            message = "a tokenizer file needs: pip install block-recurrent-transformer-pytorch[train]"
            raise ImportError(message) from error
        try:
            content = Path(path).read_bytes()
            self._tokenizer = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"path: cannot read the tokenizer {path}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.num_tokens: int = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        if not self.num_tokens:
            raise ValueError(f"path: the tokenizer {path} has an empty vocabulary")
        self.content = content
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, data: bytes) -> Integers:
        ids: list[int] = []
        for piece in _pieces(data, 1 << 20):
            ids += self._tokenizer.encode(piece.decode("utf-8", "replace"), add_special_tokens=False).ids
        return np.array(ids, dtype=np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def aligned(self, data: bytes, most: int) -> tuple[bytes, NDArray[np.int64]]:
        """The text of the first `most` tokens in UTF-8, and the byte at which each begins.

        Tokens that share a character begin where it does; what belongs to no token belongs to the one before.
        """
        texts, starts, size = [], [np.empty(0, np.int64)], 0
        for piece in _pieces(data, 1 << 20):
            if sum(map(len, starts)) >= most:
                break
            text = piece.decode("utf-8", "replace")
            offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
            before = _ends(np.array([len(character.encode()) for character in text], np.int64))  # bytes
            starts.append(size + before[np.array([start for start, _ in offsets], np.int64)])
            texts.append(text.encode())
            size += len(texts[-1])
        begins = np.maximum.accumulate(np.append(np.concatenate(starts), size))
        last = min(most, len(begins) - 1)
        return b"".join(texts)[: begins[last]], begins[:last]


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Cuts ``data`` after the first newline at or behind every ``size`` bytes."""
    start = 0
    while start < len(data):
        stop = data.find(b"\n", start + size) + 1 or len(data)
        yield data[start:stop]
        start = stop


def lost_by(tokenizer: Tokenizer, source: Source, *, num_documents: int = 8, num_bytes: int = 1 << 14) -> str | None:
    """What a tokenizer loses of a text: the first place of a sample where decode(encode(text)) differs, or None.

    Bits per byte count the bytes of the text itself. Where tokens do not hold all of it, what they leave out costs
    nothing, and the figure is not comparable with that of another tokenizer.

    Args:
        source: the beginnings of so many of its documents, evenly spaced, are tried, so many bytes of each.
    """
    step = -(-len(source.documents) // num_documents)
    for document in source.documents[::step]:
        text = document.read()[:num_bytes].decode("utf-8", "ignore")
        back = tokenizer.decode(tokenizer.encode(text.encode()).tolist())
        if back != text:
            differs = (index for index, (one, other) in enumerate(zip(text, back)) if one != other)
            place = max(0, next(differs, min(len(text), len(back))) - 10)
            return f"{text[place : place + 20]!r} in {document.name} comes back as {back[place : place + 20]!r}"
    return None


# 4 the corpus: ids and the index of documents


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids of all documents, one behind the other, and where each begins.

    A document that the tokenizer gave no token stays in the index, so that ``Source.documents`` and the corpus count
    alike; a stream does not deal it.
    """

    tokens: Integers  # (total,) uint8, uint16 or uint32, usually a memory map
    offsets: NDArray[np.int64]  # (documents + 1,) document i holds tokens[offsets[i] : offsets[i + 1]]
    byte_counts: NDArray[Any]  # (documents,)
    num_tokens: int  # size of the vocabulary
    fingerprint: str  # hash of the source, the tokenizer and the cuts

    @classmethod
    def from_tokens(cls, documents: Sequence[ArrayLike], num_tokens: int = 256) -> Corpus:
        """A corpus in memory from sequences of ids, each id counted as one byte.

        Raises:
            ValueError: an id is outside [0, num_tokens).
        """
        arrays = [np.asarray(document, dtype=np.int64) for document in documents]
        tokens = _as_ids(np.concatenate([np.empty(0, np.int64), *arrays]), num_tokens, "documents")
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        digest = hashlib.sha256(f"{num_tokens} {lengths.tolist()}".encode() + tokens.tobytes()).hexdigest()
        return cls(tokens, _ends(lengths), lengths, num_tokens, digest)

    @property
    def num_documents(self) -> int:
        return len(self.byte_counts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(documents,) tokens of every document."""
        return np.diff(self.offsets)

    @property
    def total_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def total_bytes(self) -> int:
        return int(self.byte_counts.sum())

    def cut(self, rows: int) -> Corpus:
        """The same tokens with long documents cut into contiguous chunks of equal length, each then a document.

        For a corpus of one giant document (enwik8), whose batch would else have one busy row: it becomes ``rows``
        chunks. Of several documents each is cut according to its share of the tokens, so that none is longer than one
        and a half times what one of ``rows`` rows would read; short ones stay whole.
        With a tokenizer the bytes of a document are divided evenly among its chunks.
        """
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1")
        lengths = self.lengths
        chunks = np.rint(lengths * (rows / max(self.total_tokens, 1))).astype(np.int64)
        chunks = np.clip(chunks, 1, np.maximum(lengths, 1))
        owner = np.repeat(np.arange(self.num_documents), chunks)
        nth = np.arange(len(owner)) - (np.cumsum(chunks) - chunks)[owner]
        starts = self.offsets[owner] + lengths[owner] * nth // chunks[owner]
        byte_starts = _ends(self.byte_counts)[owner] + self.byte_counts[owner] * nth // chunks[owner]
        return Corpus(
            self.tokens,
            np.append(starts, self.offsets[-1]),
            np.diff(np.append(byte_starts, self.total_bytes)),
            self.num_tokens,
            f"{self.fingerprint} cut {rows}",
        )

    def spread(self, rows: int, length: int) -> Corpus:
        """A sample of the whole corpus, always the same: `rows` stretches of `length` tokens, evenly spaced.

        A stretch begins at its place, or where the document there begins if that is no longer than a stretch. What it
        has of a document is a document of the sample. The corpus itself, if the stretches would hold all of it.
        """
        if rows < 1 or length < 1:
            raise ValueError(f"rows={rows} and length={length} must be at least 1")
        if rows * length >= self.total_tokens:
            return self
        places = np.arange(rows) * self.total_tokens // rows
        owner = np.searchsorted(self.offsets, places, side="right") - 1
        starts = np.where(self.lengths[owner] <= length, self.offsets[owner], places)
        stops = np.minimum(starts + length, np.append(starts[1:], self.total_tokens))
        ends = self.offsets[1:]
        pieces = [  # (document, first token, end)
            (document, max(start, self.offsets[document]), min(stop, ends[document]))
            for start, stop in zip(starts, stops)
            for document in range(np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop) + 1)
            if max(start, self.offsets[document]) < min(stop, ends[document])
        ]
        document, first, end = np.array(pieces).T
        return Corpus(
            np.concatenate([self.tokens[i:j] for i, j in zip(first, end)]),
            _ends(end - first),
            (end - first) * (self.byte_counts[document] / self.lengths[document]),
            self.num_tokens,
            f"{self.fingerprint} spread {rows} {length}",
        )

    def count_bytes(self, batch: Batch) -> float:
        """How many bytes the targets of a batch stand for.

        Exact for bytes and for the sum over whole documents; within a document of other tokens, in proportion.
        """
        targets = batch.targets_mask.sum(1).cpu().numpy()
        document = batch.document.cpu().numpy()
        busy = targets > 0
        read = document[busy]
        return float((targets[busy] * (self.byte_counts[read] / self.lengths[read])).sum())


def build_corpus(source: Source, tokenizer: Tokenizer, cache: str | Path, *, progress: bool = True) -> Corpus:
    """Encodes every document once, into a memory-mapped file of the folder ``cache``.

    The file is named by the hash of the source's bytes and the tokenizer, written to a temporary name and renamed. If
    it is there already it is used; if any byte of it is damaged, a warning says so and it is built again. Processes
    that build the same file at the same time do not disturb each other, but do the work twice: let one go first.

    Raises:
        ValueError: the source gives no token, changed since it was surveyed, or an id is outside the vocabulary.
    """
    made_of = f"{_FORMAT}\n{source.sha256}\n{tokenizer.fingerprint}"
    fingerprint = hashlib.sha256(made_of.encode()).hexdigest()
    path = Path(cache) / f"{fingerprint[:32]}.tokens"
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"cache: {cache} is no folder")
    if path.exists():
        try:
            return _open_cache(path, fingerprint)
        except (ValueError, LookupError, TypeError) as error:
            warnings.warn(f"{path} is damaged and built again: {error}", stacklevel=2)
    _write_cache(path, source, tokenizer, fingerprint, progress)
    return _open_cache(path, fingerprint)


# The cache file: a header of 4096 bytes (hash of the rest of the header, newline, JSON, spaces), the tokens, and the
# index: offsets (documents + 1) and byte counts (documents), both int64. All little-endian. The header holds the hash
# of what is behind it, which is checked at each opening: a second a GB, as long as the sources take to be surveyed.
_FORMAT = 2
_HEADER_BYTES = 4096


def _write_cache(path: Path, source: Source, tokenizer: Tokenizer, fingerprint: str, progress: bool) -> None:
    lengths, digest = [], hashlib.sha256()
    bar = _progress_bar("tokenizing", "B", source.num_bytes, progress)
    with written_at_once(path, shared=True) as file, bar:
        file.write(bytes(_HEADER_BYTES))
        for document in source.documents:
            data = document.read()
            if hashlib.sha256(data).hexdigest() != document.sha256:
                raise ValueError(f"source: {document.name} changed while it was read")
            ids = _as_ids(tokenizer.encode(data), tokenizer.num_tokens, f"tokenizer: {document.name}").tobytes()
            file.write(ids)
            digest.update(ids)
            lengths.append(len(ids) // _dtype(tokenizer.num_tokens).itemsize)
            bar.update(len(data))
        if not sum(lengths):
            raise ValueError(f"source: {len(lengths)} documents of {source.num_bytes} bytes give no token")
        byte_counts = np.array([document.num_bytes for document in source.documents])
        index = np.concatenate([_ends(np.array(lengths)), byte_counts]).astype("<i8").tobytes()
        file.write(index)
        digest.update(index)
        header = {
            "fingerprint": fingerprint,
            "num_tokens": tokenizer.num_tokens,
            "documents": len(lengths),
            "total_tokens": sum(lengths),
            "sha256": digest.hexdigest(),
        }
        body = json.dumps(header).encode().ljust(_HEADER_BYTES - 65)
        file.seek(0)
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _open_cache(path: Path, fingerprint: str) -> Corpus:
    """Maps the file; a ValueError says in what it is damaged."""
    size, content = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        digest, _, body = file.read(_HEADER_BYTES).partition(b"\n")
        while piece := file.read(1 << 20):
            content.update(piece)
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("the header does not match its hash")
    header = json.loads(body)
    dtype = _dtype(header["num_tokens"])
    total, documents = header["total_tokens"], header["documents"]
    index_start = _HEADER_BYTES + total * dtype.itemsize
    expected = index_start + 8 * (2 * documents + 1)
    if size != expected:
        raise ValueError(f"it holds {size} bytes instead of {expected}")
    if header["fingerprint"] != fingerprint:
        raise ValueError(f"it was made of {header['fingerprint']} instead of {fingerprint}")
    if content.hexdigest() != header["sha256"]:
        raise ValueError("the tokens do not match their hash")
    index = np.fromfile(path, dtype="<i8", offset=index_start)
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=_HEADER_BYTES, shape=(total,))
    return Corpus(tokens, index[: documents + 1], index[documents + 1 :], header["num_tokens"], fingerprint)


def _dtype(num_tokens: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds the ids of a vocabulary."""
    return np.dtype("<u1" if num_tokens <= 1 << 8 else "<u2" if num_tokens <= 1 << 16 else "<u4")


def _as_ids(tokens: Integers, num_tokens: int, name: str) -> Integers:
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < num_tokens:
        raise ValueError(f"{name}: token ids {tokens.min()} to {tokens.max()} are outside [0, num_tokens={num_tokens})")
    return tokens.astype(_dtype(num_tokens), copy=False)


def _ends(lengths: Integers) -> NDArray[np.int64]:
    """[0, l_0, l_0 + l_1, …]"""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


# 5 the stream: documents dealt to batch rows


class Batch(NamedTuple):
    """The next segment of every row."""

    tokens: Tensor  # (b, n + 1) int64: the token before the segment, then the targets, padded with 0
    reset: Tensor  # (b,) bool: a document begins, so the row's memories and states start afresh
    targets_mask: Tensor  # (b, n) bool: where tokens[:, 1:] is a target
    document: Tensor  # (b,) int64: index of the document in the corpus, -1 for an idle row
    position: Tensor  # (b,) int64: place of tokens[:, 1] in its document, in tokens

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))

    def pin(self) -> Batch:
        """In page-locked memory, from which a GPU copies while it computes."""
        return Batch(*(tensor.pin_memory() for tensor in self))


class DocumentStream(Iterator[Batch]):
    """Deals the documents of a corpus to the rows of a batch.

    A row reads its document in order, ``segment`` targets at a time; the tail is padded and masked. Then it takes the
    next unread document of the epoch. ``tokens[:, 0]`` is the last target of the row's segment before, or ``bos`` where
    a document begins: every token of every document is a target exactly once in an epoch.

    An epoch's order is a permutation from ``(seed, epoch)``, or the corpus' own with ``shuffle=False``. With ``repeat``
    the next epoch follows for ever (at once, where rows outnumber documents). Without, a row that finds no more
    document idles (no reset, nothing in the mask, document -1) until all rows are done, and the iteration stops.

    Of several processes each computes the same dealing and loads only its rows, ``[rank * b / world, (rank + 1) * b /
    world)``: the global batch does not depend on their number, and all stop after the same number of batches.

    Args:
        corpus: what to read; see `Corpus.cut` for one giant document.
        batch: rows of the global batch.
        segment: targets of a segment, n.
        bos: id of the start token. 0 (NUL) keeps the vocabulary of bytes at 256.

    Raises:
        ValueError: a number out of range, ``batch`` that ``world`` does not divide, or a corpus without a token.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch: int,
        segment: int,
        seed: int = 0,
        shuffle: bool = True,
        repeat: bool = True,
        bos: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for name, value in {"batch": batch, "segment": segment, "world": world}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        if batch % world:
            raise ValueError(f"batch={batch} cannot be divided among world={world} processes")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} must be in [0, world={world})")
        if not 0 <= bos < corpus.num_tokens:
            raise ValueError(f"bos={bos} must be in [0, num_tokens={corpus.num_tokens})")
        if not corpus.total_tokens:
            raise ValueError(f"corpus: its {corpus.num_documents} documents hold no token")
        self.corpus, self.batch, self.segment, self.seed = corpus, batch, segment, seed
        self.shuffle, self.repeat, self.bos = shuffle, repeat, bos
        self.rows = range(rank * batch // world, (rank + 1) * batch // world)
        self._lengths = corpus.lengths
        self._document = np.full(batch, -1, dtype=np.int64)  # that a row reads, -1: none
        self._position = np.zeros(batch, dtype=np.int64)  # of the row's next segment in it
        self._start_epoch(0)

    def __next__(self) -> Batch:
        finished = (self._document < 0) | (self._position >= self._lengths[self._document])
        for row in np.flatnonzero(finished):
            self._document[row], self._position[row] = self._next_document(), 0
        if (self._document < 0).all():
            raise StopIteration
        batch = self._load()
        self._position += self.segment
        return batch

    @property
    def epoch(self) -> int:
        """That of the document dealt last, from 0; rows that still read older ones may lag behind."""
        return self._epoch

    def _start_epoch(self, epoch: int) -> None:
        readable = np.flatnonzero(self._lengths)
        generator = np.random.default_rng([self.seed, epoch])
        self._order = generator.permutation(readable) if self.shuffle else readable
        self._epoch, self._num_dealt = epoch, 0

    def _next_document(self) -> int:
        if self._num_dealt == len(self._order):
            if not self.repeat:
                return -1
            self._start_epoch(self._epoch + 1)
        self._num_dealt += 1
        return int(self._order[self._num_dealt - 1])

    def _load(self) -> Batch:
        """Reads the tokens of this process' rows."""
        rows = slice(self.rows.start, self.rows.stop)
        document, position = self._document[rows], self._position[rows]
        tokens = np.zeros((len(document), self.segment + 1), dtype=np.int64)  # (b, n + 1)
        sizes = np.zeros(len(document), dtype=np.int64)
        for row in np.flatnonzero(document >= 0):
            first, end = self.corpus.offsets[document[row] : document[row] + 2]
            start = first + position[row]
            sizes[row] = size = min(self.segment, end - start)
            tokens[row, 1 : size + 1] = self.corpus.tokens[start : start + size]
            tokens[row, 0] = self.corpus.tokens[start - 1] if position[row] else self.bos
        return Batch(
            tokens=torch.from_numpy(tokens),
            reset=torch.from_numpy((document >= 0) & (position == 0)),
            targets_mask=torch.from_numpy(np.arange(self.segment) < sizes[:, None]),
            document=torch.from_numpy(document.copy()),
            position=torch.from_numpy(position.copy()),
        )

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a state to be continued."""
        return {
            "corpus": self.corpus.fingerprint,
            "batch": self.batch,
            "segment": self.segment,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "repeat": self.repeat,
            "bos": self.bos,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where all rows stand, those of other processes too: numbers, strings and lists, ready for JSON."""
        return {
            **self._settings(),
            "epoch": self._epoch,
            "num_dealt": self._num_dealt,
            "documents": self._document.tolist(),
            "positions": self._position.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state`` was taken, on any number of processes.

        Raises:
            ValueError: the state is of another corpus, batch, segment, seed, …, or holds impossible numbers; the
                stream is then unchanged.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"state: lacks {', '.join(missing)}")
        for name, ours in self._settings().items():
            if state[name] != ours:
                raise ValueError(f"state: {name} is {state[name]!r}, this stream has {ours!r}")
        documents = _integers("documents", state["documents"], self.batch, -1, self.corpus.num_documents)
        positions = _integers("positions", state["positions"], self.batch, 0, 1 << 62)
        (epoch,) = _integers("epoch", [state["epoch"]], 1, 0, 1 << 62)
        (num_dealt,) = _integers("num_dealt", [state["num_dealt"]], 1, 0, len(self._order) + 1)
        self._start_epoch(int(epoch))
        self._num_dealt, self._document, self._position = int(num_dealt), documents, positions


class ReadAhead(Iterator[list[Batch]]):
    """The batches of a step at a time, the next ones read while a GPU still computes.

    `read` loads what the following `next` gives; a state is that of what was given, whatever was read ahead.

    Args:
        stream: without end, as with ``repeat``.
        count: batches of a step.
        pin: whether to put them into page-locked memory.
    """

    def __init__(self, stream: DocumentStream, count: int, *, pin: bool = False) -> None:
        self.stream, self.count, self.pin = stream, count, pin
        self._ready: list[Batch] = []
        self._state: dict[str, Any] = {}
        self.epoch = stream.epoch  # of the document dealt last, in what was given

    def read(self) -> None:
        """Loads the next step's batches, unless they are there."""
        if not self._ready:
            self._state = self.stream.state_dict()
            batches = [next(self.stream) for _ in range(self.count)]
            self._ready = [batch.pin() for batch in batches] if self.pin else batches

    def __next__(self) -> list[Batch]:
        self.read()
        batches, self._ready = self._ready, []
        self.epoch = self.stream.epoch
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands behind what was given."""
        return self._state if self._ready else self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)
        self._ready, self.epoch = [], self.stream.epoch


def _integers(name: str, values: Any, count: int, low: int, high: int) -> NDArray[np.int64]:
    """Checks ``count`` ints in [low, high) of a state."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"state: {name} must be a list of {count} ints, not {str(values)[:80]}")
    for value in values:
        if type(value) is not int or not low <= value < high:
            raise ValueError(f"state: {name} holds {str(value)[:80]}, not an int in [{low}, {high})")
    return np.array(values, dtype=np.int64)


def _progress_bar(title: str, unit: str, total: int | None, progress: bool) -> Any:
    """On terminals only, and only when it takes longer than a second."""
    hidden = None if progress else True
    return tqdm(desc=title, unit=unit, total=total, unit_scale=True, delay=1.0, leave=False, disable=hidden)
