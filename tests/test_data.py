"""The data room: every byte is a target once, a stream continues anywhere, and bad input is named."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import math
import sys
import sysconfig
import types
import urllib.error
import urllib.request
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from block_recurrent_transformer_pytorch import data as data_module
from block_recurrent_transformer_pytorch.data import (
    Batch,
    ByteTokenizer,
    Corpus,
    DocumentStream,
    FileTokenizer,
    ReadAhead,
    Source,
    bits_per_byte,
    build_corpus,
    download_enwik8,
    find_enwik8,
    load_source,
    lost_by,
    split,
    standard_library,
)

quick = settings(deadline=None, max_examples=40)


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents whose tokens tell document and place apart: no two are equal."""
    first = np.cumsum([0, *lengths]) + 1
    documents = [np.arange(start, start + length) for start, length in zip(first, lengths)]
    return Corpus.from_tokens(documents, num_tokens=1 << 20)


@st.composite
def streams(draw: st.DrawFn, min_length: int = 0) -> dict[str, Any]:
    """Odd documents (empty, one token, exactly n, n + 1, k n tokens, any) and the arguments of a stream."""
    n = draw(st.integers(1, 6))
    odd = st.sampled_from([0, 1, n, n + 1, 2 * n, 3 * n, 5 * n]) | st.integers(0, 30)
    lengths = draw(st.lists(odd.filter(lambda length: length >= min_length), min_size=1, max_size=9).filter(any))
    return {
        "corpus": corpus_of(lengths),
        "batch": draw(st.sampled_from([1, 2, 3, 4, 6])),
        "segment": n,
        "seed": draw(st.integers(0, 3)),
        "shuffle": draw(st.booleans()),
    }


def same(left: Iterable[Batch], right: Iterable[Batch]) -> bool:
    pairs = itertools.zip_longest(left, right)
    return all(a is not None and b is not None and all(map(torch.equal, a, b)) for a, b in pairs)


# what a stream deals


@quick
@given(streams())
def test_every_token_is_a_target_exactly_once_in_an_epoch(arguments: dict[str, Any]) -> None:
    corpus, n = arguments["corpus"], arguments["segment"]
    seen: dict[int, list[int]] = defaultdict(list)
    row_of: dict[int, int] = {}
    for batch in DocumentStream(**arguments, repeat=False):
        assert batch.tokens.shape == (arguments["batch"], n + 1) and batch.tokens.dtype == torch.int64
        assert (batch.document >= 0).any()
        for row, (tokens, reset, mask, document, position) in enumerate(zip(*batch)):
            index, targets = int(document), tokens[1:][mask].tolist()
            assert not tokens[1:][~mask].any()
            assert mask.tolist() == [True] * len(targets) + [False] * (n - len(targets))  # a padded tail
            if index < 0:
                assert not reset and not targets and not tokens.any() and not position
                continue
            assert row_of.setdefault(index, row) == row  # rows do not swap
            assert bool(reset) == (index not in seen)
            assert int(position) == len(seen[index])
            assert int(tokens[0]) == (seen[index][-1] if seen[index] else 0)  # the shared token, or bos
            seen[index] += targets
    texts = [corpus.tokens[a:b].tolist() for a, b in zip(corpus.offsets, corpus.offsets[1:])]
    assert {index: text for index, text in enumerate(texts) if text} == dict(seen)


@quick
@given(streams())
def test_epochs_follow_for_ever_each_a_permutation(arguments: dict[str, Any]) -> None:
    stream = DocumentStream(**arguments)
    readable = np.flatnonzero(arguments["corpus"].lengths).tolist()
    dealt: list[int] = []
    while len(dealt) < 3 * len(readable):
        batch = next(stream)
        assert (batch.document >= 0).all()
        dealt += batch.document[batch.reset].tolist()
        assert stream.epoch == (len(dealt) - 1) // len(readable)
    for epoch in range(3):
        order = dealt[epoch * len(readable) : (epoch + 1) * len(readable)]
        assert order == readable if not arguments["shuffle"] else sorted(order) == readable


def test_a_row_that_ends_takes_the_next_unread_document() -> None:
    stream = DocumentStream(corpus_of([5, 2, 2, 2]), batch=2, segment=2, shuffle=False, repeat=False)
    assert [batch.document.tolist() for batch in stream] == [[0, 1], [0, 2], [0, 3]]


def test_order_depends_on_seed_and_epoch() -> None:
    def orders(seed: int) -> list[list[int]]:
        stream = DocumentStream(corpus_of([1] * 30), batch=30, segment=1, seed=seed)
        return [next(stream).document.tolist() for _ in range(2)]

    (first, second), (other, _) = orders(0), orders(1)
    assert first != second and first != other and orders(0) == [first, second]


def test_bos_begins_a_document_and_only_that() -> None:
    stream = DocumentStream(corpus_of([3, 3]), batch=1, segment=2, bos=77, shuffle=False, repeat=False)
    assert [batch.tokens[0].tolist() for batch in stream] == [[77, 1, 2], [2, 3, 0], [77, 4, 5], [5, 6, 0]]


@quick
@given(streams(), st.booleans())
def test_processes_share_one_global_batch(arguments: dict[str, Any], repeat: bool) -> None:
    whole = list(itertools.islice(DocumentStream(**arguments, repeat=repeat), 12))
    for world in (world for world in range(1, arguments["batch"] + 1) if arguments["batch"] % world == 0):
        ranks = [DocumentStream(**arguments, repeat=repeat, rank=rank, world=world) for rank in range(world)]
        parts = [list(itertools.islice(rank, 12)) for rank in ranks]
        assert {len(part) for part in parts} == {len(whole)}
        joined = [Batch(*map(torch.cat, zip(*batches))) for batches in zip(*parts)]
        assert same(joined, whole)


@quick
@given(streams(), st.booleans(), st.integers(0, 15), st.data())
def test_a_state_continues_exactly(arguments: dict[str, Any], repeat: bool, after: int, draw: st.DataObject) -> None:
    expected = list(itertools.islice(DocumentStream(**arguments, repeat=repeat), 20))
    world = draw.draw(st.sampled_from([world for world in (1, 2, 3) if arguments["batch"] % world == 0]))
    interrupted = DocumentStream(**arguments, repeat=repeat, rank=world - 1, world=world)
    for _ in itertools.islice(interrupted, after):
        pass
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = DocumentStream(**arguments, repeat=repeat)
    for _ in itertools.islice(resumed, draw.draw(st.integers(0, 3))):
        pass  # what was read before the state is loaded does not matter
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert same(itertools.islice(resumed, max(0, 20 - after)), expected[after:])


def test_an_ended_stream_stays_ended() -> None:
    stream = DocumentStream(corpus_of([3]), batch=2, segment=2, repeat=False)
    assert len(list(stream)) == 2
    assert list(stream) == []


def test_the_authors_interleaving() -> None:
    """Recorded from the released data pipeline: segments, start flags and epochs, rewinding and not."""
    golden = np.load(Path(__file__).parent / "golden" / "data_interleave.npz")
    corpus = Corpus.from_tokens([golden[f"in/doc/{i}"] for i in range(6)])
    for name, steps, repeat in (("out_rewind", 16, True), ("out_once", 9, False)):
        stream = DocumentStream(corpus, batch=2, segment=8, shuffle=False, repeat=repeat)
        for step in range(steps):
            batch = next(stream)
            assert np.array_equal(batch.tokens[:, 1:], golden[f"{name}/targets/{step}"])
            assert np.array_equal(batch.reset, golden[f"{name}/start_of_sequence/{step}"])
            assert stream.epoch == golden[f"{name}/epoch/{step}"].max()
        assert repeat or next(stream, None) is None


def test_a_thousand_odd_documents(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = [generator.bytes(int(size)) for size in generator.integers(0, 4, 1000) * generator.integers(0, 200, 1000)]
    lines[500] = generator.bytes(5_000_000)  # invalid UTF-8 nearly everywhere
    for i, line in enumerate(lines):
        (tmp_path / f"{i:04}.bin").write_bytes(line)
    source = load_source(tmp_path)
    assert source.num_skipped == sum(not line for line in lines) > 0
    corpus = build_corpus(source, ByteTokenizer(), tmp_path / ".cache")
    stream = DocumentStream(corpus, batch=16, segment=1 << 16, repeat=False)
    assert sum(int(batch.targets_mask.sum()) for batch in stream) == corpus.total_bytes == sum(map(len, lines))


# bad input and foreign states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"segment": 0}, "segment=0"),
        ({"world": 0}, "world=0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch": 3, "world": 2}, "batch=3 cannot be divided among world=2"),
        ({"rank": 2, "world": 2}, r"rank=2 must be in \[0, world=2\)"),
        ({"bos": 256}, r"bos=256 must be in \[0, num_tokens=256\)"),
        ({"corpus": Corpus.from_tokens([[], []])}, "2 documents hold no token"),
    ],
)
def test_stream_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {"corpus": Corpus.from_tokens([[1, 2, 3]]), "batch": 2, "segment": 4} | change
    with pytest.raises(ValueError, match=message):
        DocumentStream(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 4}, "batch is 2, this stream has 4"),
        ({"segment": 3}, "segment is 4, this stream has 3"),
        ({"seed": 5}, "seed is 0, this stream has 5"),
        ({"shuffle": False}, "shuffle is True, this stream has False"),
        ({"repeat": False}, "repeat is True, this stream has False"),
        ({"bos": 1}, "bos is 0, this stream has 1"),
        ({"corpus": corpus_of([3, 5])}, f"corpus is '{corpus_of([3, 4]).fingerprint}', this stream has"),
        ({"corpus": corpus_of([3, 4]).cut(2)}, "corpus is .* cut 2"),
    ],
)
def test_state_of_another_stream_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"corpus": corpus_of([3, 4]), "batch": 2, "segment": 4}
    state = DocumentStream(**arguments).state_dict()
    with pytest.raises(ValueError, match=message):
        DocumentStream(**(arguments | change)).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": [0, 2]}, r"documents holds 2, not an int in \[-1, 2\)"),
        ({"documents": [0]}, "documents must be a list of 2 ints"),
        ({"positions": [0, -4]}, "positions holds -4"),
        ({"positions": None}, "positions must be a list of 2 ints, not None"),
        ({"epoch": "1"}, "epoch holds 1, not an int"),
        ({"num_dealt": 3}, "num_dealt holds 3"),
    ],
)
def test_damaged_state_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    stream = DocumentStream(corpus_of([3, 9]), batch=2, segment=2)
    next(stream)
    before = stream.state_dict()
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict(before | change)
    assert stream.state_dict() == before
    with pytest.raises(ValueError, match="lacks epoch, positions"):
        stream.load_state_dict({name: before[name] for name in before if name not in ("epoch", "positions")})


# one giant document


@quick
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any), st.integers(1, 12))
def test_cut_keeps_every_token_in_order(lengths: list[int], rows: int) -> None:
    corpus = corpus_of(lengths)
    cut = corpus.cut(rows)
    assert set(corpus.offsets) <= set(cut.offsets) and cut.offsets.tolist() == sorted(cut.offsets)
    assert cut.total_tokens == corpus.total_tokens
    assert cut.byte_counts.tolist() == cut.lengths.tolist()
    assert cut.lengths.max() <= max(1, math.ceil(1.5 * corpus.total_tokens / rows))
    assert cut.fingerprint != corpus.fingerprint


def test_one_document_is_cut_into_as_many_chunks_as_rows() -> None:
    corpus = corpus_of([10, 0])
    assert corpus.cut(4).lengths.tolist() == [2, 3, 2, 3, 0]
    other_bytes = Corpus(corpus.tokens, corpus.offsets, np.array([41, 3]), corpus.num_tokens, "")
    assert other_bytes.cut(4).byte_counts.sum() == 44
    with pytest.raises(ValueError, match="rows=0"):
        corpus.cut(0)


# sources


def contents(source: Source) -> list[bytes]:
    return [document.read() for document in source.documents]


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("name", ["enwik8", "enwik8.gz", "enwik8.zip"])
def test_enwik8_in_each_packing(tmp_path: Path, name: str) -> None:
    text = bytes(range(200))
    packed = {"enwik8": text, "enwik8.gz": gzip.compress(text), "enwik8.zip": zipped(enwik8=text)}
    assert find_enwik8(tmp_path) is None
    (tmp_path / name).write_bytes(packed[name])
    path = find_enwik8(tmp_path)
    assert path == tmp_path / name
    source = load_source(path)
    assert source.sha256 == hashlib.sha256(text).hexdigest()
    assert [contents(part) for part in split(source)] == [[text[:180]], [text[180:190]], [text[190:]]]


def test_enwik8_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_module, "download_enwik8", lambda: None)
    with pytest.raises(ValueError, match="enwik8 is not in ./data and cannot be downloaded"):
        load_source("enwik8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "enwik8").write_bytes(b"wiki")
    assert contents(load_source("enwik8")) == [b"wiki"]


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(content: bytes | None) -> None:
        class Response(io.BytesIO):
            headers = types.MappingProxyType({})

        def urlopen(url: str, timeout: float) -> Response:
            assert url.endswith("enwik8.zip") and timeout <= 10
            if content is None:
                raise urllib.error.URLError("offline")
            return Response(content)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    monkeypatch.setattr(data_module, "ENWIK8_BYTES", 4)
    for content in (None, b"<html>log in first</html>", zipped(enwik8=b"short"), zipped(a=b"1234", b=b"1234")):
        answer(content)
        assert download_enwik8(tmp_path / "data") is None
        assert find_enwik8(tmp_path / "data") is None
    answer(zipped(enwik8=b"wiki"))
    path = download_enwik8(tmp_path / "data")
    assert path is not None and path.read_bytes() == b"wiki"
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["enwik8"]


def test_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.py", "a/z.py", "a/__init__.py", "a.txt", "site-packages/x.py", "dist-packages/y.py", "test/t.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if "init" in name else name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    source = standard_library()
    assert contents(source) == [b"a/z.py", b"b.py", b"test/t.py"]
    assert source.num_skipped == 1
    assert load_source("stdlib").sha256 == source.sha256


def test_the_real_standard_library_is_there() -> None:
    source = standard_library(progress=False)
    assert len(source.documents) > 500
    assert any(document.name.endswith("textwrap.py") for document in source.documents)
    assert f"{len(source.documents):,} documents" in source.describe() and source.sha256 in source.describe()


def test_file_folder_and_glob(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", ".git/x.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sub" / "empty.txt").touch()
    assert contents(load_source(tmp_path / "b.txt")) == [b"b.txt"]
    folder = load_source(str(tmp_path))
    assert contents(folder) == [b"a.md", b"b.txt", b"sub/c.txt"]
    assert folder.num_skipped == 1 and "1 empty skipped" in folder.describe()
    assert contents(load_source(f"{tmp_path}/**/*.txt")) == [b"b.txt", b"sub/c.txt"]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl"
    first, third, last = (
        b'{"text": "\xc3\xa9t\\u00e9", "body": "x"}\r',
        b'{"text": "", "body": "y"}',
        b'{"text": "3", "body": "z"}',
    )
    path.write_bytes(b"\n".join([first, b"", third, last]))
    source = load_source(path)
    assert contents(source) == ["été".encode(), b"3"]
    assert source.num_skipped == 1
    assert source.documents[1].name == f"{path}:4"
    assert contents(load_source(path, text_field="body")) == [b"x", b"y", b"z"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": oops}\n', r"data: .*a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n["text"]\n', r"data: .*a\.jsonl line 3 .*text_field='text', it has list"),
        ("a.jsonl", b'{"body": "a"}\n', r"line 1 has no string in text_field='text', it has body \(str\)"),
        ("a.jsonl", b'{"text": 7}\n', r"line 1 has no string in text_field='text', it has text \(int\)"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl.gz", b"", r"data: .*a\.jsonl\.gz is packed"),
        ("a.gz", b"no gzip", r"data: cannot read .*a\.gz"),
        ("a.gz", gzip.compress(bytes(1000))[:-9], r"data: cannot read .*a\.gz"),
        ("a.zip", b"no zip", r"data: cannot read .*a\.zip"),
        ("a.zip", zipped(a=b"1", b=b"2"), "holds 2 files instead of 1"),
        ("a.txt", b"", r"data: .*a\.txt holds only empty documents \(1\)"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_source(tmp_path / name)


@pytest.mark.parametrize("name", ["", "missing", "*.txt", "empty"])
def test_nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data: .* is no file, no folder with files and no pattern"):
        load_source(name)


# splits


@pytest.mark.parametrize(("number", "train", "valid"), [(3, 1, 1), (20, 18, 1), (40, 36, 2), (400, 360, 20)])
def test_split_by_document(tmp_path: Path, number: int, train: int, valid: int) -> None:
    for i in range(number):
        (tmp_path / f"{i:03}").write_text(f"document {i}")
    source = load_source(tmp_path)
    splits = split(source, "documents")
    if number >= 20:
        assert split(source) == splits
        assert f"{valid} and {valid} whole documents are held out" in splits.describe()
    names = [{document.name for document in part.documents} for part in splits]
    assert [len(part) for part in names] == [train, valid, valid]
    assert set.union(*names) == {document.name for document in source.documents}
    for part in splits:
        assert [d.name for d in part.documents] == sorted(d.name for d in part.documents)
    (tmp_path / "000").rename(tmp_path / "zzz")  # names do not matter
    assert {d.sha256 for d in split(load_source(tmp_path), "documents").valid.documents} == {
        d.sha256 for d in splits.valid.documents
    }


def test_equal_documents_go_together(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / str(i)).write_text(f"document {i % 30}")
    digests = [{document.sha256 for document in part.documents} for part in split(load_source(tmp_path))]
    assert not digests[0] & digests[1] and not digests[0] & digests[2] and not digests[1] & digests[2]


def test_two_documents_are_cut_and_tiny_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "b").write_bytes(bytes(range(40)))
    assert [part.num_bytes for part in split(load_source(tmp_path))] == [90 + 36, 5 + 2, 5 + 2]
    (tmp_path / "c.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match="source: 5 bytes in 1 documents are too few to split"):
        split(load_source(tmp_path / "c.txt"))


def test_a_few_documents_and_a_giant_among_small_ones_are_cut(tmp_path: Path) -> None:
    """Of three books one tenth is held out, not two of them."""
    for i in range(3):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 1000)
    splits = split(load_source(tmp_path))
    assert [part.num_bytes for part in splits] == [2700, 150, 150]
    text = splits.describe()
    assert "training 2,700 bytes (90.0 %)" in text and "each of the 3 documents is cut" in text
    for i in range(3, 40):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 1000)
    whole = split(load_source(tmp_path))
    assert [len(part.documents) for part in whole] == [36, 2, 2]
    (tmp_path / "0").write_bytes(bytes(100_000))  # in whichever part it comes, the shares are not 90/5/5
    source = load_source(tmp_path)
    assert [part.num_bytes for part in split(source)] == [part.num_bytes for part in split(source, "cut")]
    assert [len(part.documents) for part in split(source, "documents")] == [36, 2, 2]
    with pytest.raises(ValueError, match="how='thirds' must be one of auto, documents, cut"):
        split(source, "thirds")  # type: ignore[arg-type]


def test_endings_in_upper_case(tmp_path: Path) -> None:
    (tmp_path / "texts.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "packed.TXT.GZ").write_bytes(gzip.compress(b"three"))
    assert contents(load_source(tmp_path)) == [b"three", b"one", b"two"]


def test_linked_folders_are_followed_once_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere" / ".hidden").mkdir(parents=True)
    (tmp_path / "elsewhere" / "book").write_text("a book")
    (tmp_path / "elsewhere" / ".hidden" / "secret").write_text("a secret")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert contents(load_source(tmp_path / "data")) == [b"a book"]
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="data/gone is a link to what is not there"):
        assert contents(load_source(tmp_path / "data")) == [b"a book"]


# a sample of a corpus


def test_a_sample_is_spread_over_the_whole_corpus() -> None:
    corpus = Corpus.from_tokens([np.arange(1000) % 251])
    sample = corpus.spread(4, 10)
    starts = [0, 250, 500, 750]
    assert sample.lengths.tolist() == [10] * 4 and sample.total_bytes == 40
    assert sample.tokens.tolist() == [(start + i) % 251 for start in starts for i in range(10)]
    assert corpus.spread(4, 10).fingerprint == sample.fingerprint != corpus.fingerprint
    assert corpus.spread(10, 100) is corpus
    with pytest.raises(ValueError, match="rows=0"):
        corpus.spread(0, 1)


def test_a_sample_begins_with_short_documents_and_keeps_their_borders() -> None:
    documents = [[n] * 7 for n in range(50)] + [[], [99] * 150]
    corpus = Corpus.from_tokens(documents)
    sample = corpus.spread(5, 20)
    pieces = [sample.tokens[i:j].tolist() for i, j in zip(sample.offsets, sample.offsets[1:])]
    assert [(piece[0], len(piece)) for piece in pieces] == [
        (0, 7), (1, 7), (2, 6), (14, 7), (15, 7), (16, 6), (28, 7), (29, 7), (30, 6), (42, 7), (43, 7), (44, 6),
        (99, 20),
    ]  # fmt: skip
    assert all(len(set(piece)) == 1 for piece in pieces)
    assert sample.total_bytes == sample.total_tokens


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), st.integers(1, 5), st.integers(1, 30))
def test_a_sample_is_no_larger_than_asked_and_of_the_corpus(lengths: list[int], rows: int, length: int) -> None:
    documents = [[n] * size for n, size in enumerate(lengths)]
    corpus = Corpus.from_tokens(documents)
    sample = corpus.spread(rows, length)
    assert 0 < sample.total_tokens <= max(rows * length, corpus.total_tokens * (sample is corpus))
    counts = np.bincount(sample.tokens, minlength=len(lengths))
    assert (counts <= np.array(lengths)).all()  # nothing twice
    assert sample is corpus or 0 not in sample.lengths


def test_what_is_read_ahead_changes_no_state() -> None:
    def make() -> ReadAhead:
        corpus = Corpus.from_tokens([[n] * 9 for n in range(5)])
        return ReadAhead(DocumentStream(corpus, batch=2, segment=4), 2)

    plain, ahead = make(), make()
    for _ in range(9):
        before = plain.state_dict()
        ahead.read()
        assert ahead.state_dict() == before and ahead.epoch == plain.epoch
        one, other = next(plain), next(ahead)
        assert all(torch.equal(x, y) for a, b in zip(one, other) for x, y in zip(a, b))
    resumed = make()
    resumed.read()
    resumed.load_state_dict(ahead.state_dict())
    assert all(torch.equal(x, y) for a, b in zip(next(resumed), next(plain)) for x, y in zip(a, b))


def test_what_is_read_ahead_for_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    stream = DocumentStream(Corpus.from_tokens([[1] * 9]), batch=1, segment=4)
    batches = next(ReadAhead(stream, 2, pin=True))
    assert [id(tensor) for batch in batches for tensor in batch] == [id(tensor) for tensor in pinned]


# tokenizers and bits per byte


class FakeTokenizer:
    """Two ids for every word; what the `tokenizers` library offers of it."""

    @staticmethod
    def from_str(content: str) -> FakeTokenizer:
        if content != "{}":
            raise RuntimeError("not a tokenizer")
        return FakeTokenizer()

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...

    def get_vocab(self) -> dict[str, int]:
        return {"first": 0, "second": 299}

    def encode(self, text: str, add_special_tokens: bool) -> types.SimpleNamespace:
        assert not add_special_tokens
        return types.SimpleNamespace(ids=[0, 299] * len(text.split()))

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def fake_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileTokenizer:
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=FakeTokenizer))
    (tmp_path / "tokenizer.json").write_text("{}")
    return FileTokenizer(tmp_path / "tokenizer.json")


def test_byte_tokenizer() -> None:
    everything = bytes(range(256))
    assert ByteTokenizer().encode(everything).tolist() == list(everything)
    assert ByteTokenizer().decode([0xC3, 0xA9, 0xFF]) == "é\ufffd"
    assert ByteTokenizer().num_tokens == 256


def test_bits_per_byte_counts_bytes_not_tokens(tmp_path: Path, fake_tokenizer: FileTokenizer) -> None:
    texts = ["one two three", "\n", "four", "five six"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    source = load_source(f"{tmp_path}/*.txt")
    corpus = build_corpus(source, fake_tokenizer, tmp_path / "cache")
    assert corpus.num_tokens == 300 and corpus.tokens.dtype == np.uint16
    assert corpus.lengths.tolist() == [6, 0, 2, 4]  # of a line feed nothing is left, and it is not dealt
    assert corpus.byte_counts.tolist() == [13, 1, 4, 8]
    batches = list(DocumentStream(corpus, batch=2, segment=4, repeat=False))
    assert sum(map(corpus.count_bytes, batches)) == pytest.approx(13 + 4 + 8)
    assert bits_per_byte(25 * 8 * math.log(2), 25) == pytest.approx(8)


def test_tokenizer_file_errors(tmp_path: Path, fake_tokenizer: FileTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.json").write_text("[]")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(ValueError, match=f"path: cannot read the tokenizer .*{name}"):
            FileTokenizer(tmp_path / name)
    monkeypatch.setattr(FakeTokenizer, "get_vocab", dict)
    with pytest.raises(ValueError, match="has an empty vocabulary"):
        FileTokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install block-recurrent-transformer-pytorch\[train\]"):
        FileTokenizer(tmp_path / "tokenizer.json")


def test_what_a_tokenizer_loses_is_found(tmp_path: Path, fake_tokenizer: FileTokenizer) -> None:
    (tmp_path / "text").write_text("a text")
    source = load_source(tmp_path / "text")
    assert lost_by(ByteTokenizer(), source) is None
    assert lost_by(fake_tokenizer, source) == f"'a text' in {tmp_path / 'text'} comes back as '0 299 0 299'"


def test_long_texts_are_encoded_in_pieces_that_end_with_a_line(fake_tokenizer: FileTokenizer) -> None:
    line = b"word " * 100 + b"\n"
    text = line * 6000  # 3 MB
    pieces = list(data_module._pieces(text, 1 << 20))
    assert len(pieces) == 3 and b"".join(pieces) == text and all(piece.endswith(b"\n") for piece in pieces)
    assert len(fake_tokenizer.encode(text)) == 2 * 100 * 6000


def test_a_real_tokenizer_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["[UNK]"])
    model.train_from_iterator(["the block recurrent transformer reads the text block by block"] * 9, trainer)
    model.enable_truncation(3)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    text = "the transformer reads été \x00".encode()
    ids = tokenizer.encode(text)
    assert 3 < len(ids) < len(text) and ids.max() < tokenizer.num_tokens
    assert tokenizer.decode(ids.tolist()).encode() == text
    assert "\ufffd" in tokenizer.decode(tokenizer.encode(b"a\xffb").tolist())


# the cache


class CountingTokenizer(ByteTokenizer):
    def __init__(self, num_tokens: int = 256, fingerprint: str = "counting") -> None:
        self.num_tokens, self.fingerprint, self.calls = num_tokens, fingerprint, 0

    def encode(self, data: bytes) -> Any:
        self.calls += 1
        return super().encode(data)


@pytest.fixture
def three_files(tmp_path: Path) -> Source:
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / name).write_text(name * 50)
    return load_source(tmp_path / "text")


def test_cache_is_built_once(tmp_path: Path, three_files: Source) -> None:
    tokenizer, cache = CountingTokenizer(), tmp_path / "deep" / "cache"
    first, second = (build_corpus(three_files, tokenizer, cache) for _ in range(2))
    assert tokenizer.calls == 3
    assert isinstance(second.tokens, np.memmap)
    assert bytes(second.tokens) == b"".join(contents(three_files))
    assert second.offsets.tolist() == [0, 50, 100, 150] and second.fingerprint == first.fingerprint
    assert len(list(cache.iterdir())) == 1
    other = build_corpus(three_files, CountingTokenizer(fingerprint="other"), cache)
    assert other.fingerprint != first.fingerprint
    (tmp_path / "text" / "a").write_text("b" * 50)
    assert build_corpus(load_source(tmp_path / "text"), tokenizer, cache).fingerprint != first.fingerprint
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(("num_tokens", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_cache_type_follows_the_vocabulary(tmp_path: Path, three_files: Source, num_tokens: int, dtype: str) -> None:
    corpus = build_corpus(three_files, CountingTokenizer(num_tokens), tmp_path)
    assert corpus.tokens.dtype == np.dtype(dtype) and corpus.tokens[0] == ord("a")


def with_header(content: bytes, header: Any) -> bytes:
    """Another header, with its hash made right."""
    body = json.dumps(header).encode().ljust(4096 - 65)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body + content[4096:]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "header does not match"),
        (lambda content: content[:1000], "header does not match"),
        (lambda content: content[:100] + b"?" + content[101:], "header does not match"),
        (lambda content: content[:-1], "bytes instead of"),
        (lambda content: content + b"\0", "bytes instead of"),
        (lambda content: content[:-8] + b"\1" + content[-7:], "tokens do not match"),
        (lambda content: content[:4096] + b"?" + content[4097:], "tokens do not match"),
        (lambda content: with_header(content, []), "list indices"),
        (lambda content: with_header(content, {"num_tokens": "many"}), "TypeError|supported between"),
    ],
)
def test_damaged_cache_is_reported_and_rebuilt(tmp_path: Path, three_files: Source, damage: Any, reason: str) -> None:
    build_corpus(three_files, ByteTokenizer(), tmp_path)
    (path,) = tmp_path.glob("*.tokens")
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.warns(UserWarning, match=f"{path.name} is damaged and built again: .*{reason}"):
        corpus = build_corpus(three_files, ByteTokenizer(), tmp_path)
    assert path.read_bytes() == content and corpus.total_tokens == 150
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_corpus(three_files, ByteTokenizer(), tmp_path)


def test_cache_of_another_corpus_under_the_name_is_rebuilt(tmp_path: Path, three_files: Source) -> None:
    build_corpus(three_files, ByteTokenizer(), tmp_path)
    (path,) = tmp_path.glob("*.tokens")
    build_corpus(three_files, CountingTokenizer(), tmp_path / "other")
    (other,) = (tmp_path / "other").glob("*.tokens")
    path.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="it was made of"):
        build_corpus(three_files, ByteTokenizer(), tmp_path)


def test_a_failure_leaves_no_file_behind(tmp_path: Path, three_files: Source) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"tokenizer: .*a: token ids 97 to 97 are outside \[0, num_tokens=97\)"):
        build_corpus(three_files, CountingTokenizer(num_tokens=97), cache)
    (tmp_path / "text" / "b").write_text("changed")
    with pytest.raises(ValueError, match="source: .*b changed while it was read"):
        build_corpus(three_files, ByteTokenizer(), cache)
    with pytest.raises(ValueError, match="0 documents of 0 bytes give no token"):
        build_corpus(Source(()), ByteTokenizer(), cache)
    assert list(cache.iterdir()) == []


def test_from_tokens_refuses_ids_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"documents: token ids -1 to 9 are outside \[0, num_tokens=256\)"):
        Corpus.from_tokens([[-1], [9]])


def test_batch_moves_as_a_whole() -> None:
    batch = next(DocumentStream(corpus_of([3]), batch=1, segment=2)).to("meta")
    assert all(tensor.device.type == "meta" for tensor in batch)
