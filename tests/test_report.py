"""The page of an evaluation holds what the model gave: losses as `score` has them, differences, and what states did.

In a browser it is looked at in tests/slow/test_report_browser.py.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import assert_same
from strategies import random_model

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, data, report
from block_recurrent_transformer_pytorch.commands import evaluate
from block_recurrent_transformer_pytorch.inspecting import inspecting
from block_recurrent_transformer_pytorch.scoring import score

SIZES = {
    "num_tokens": 256, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "block_width": 4, "max_seq_len": 8,
    "recurrent_layers": (2,), "num_state_vectors": 3,
}  # fmt: skip
VARIANTS = {
    "default": {},
    "compressed": {"use_compressed_mem": True, "compressed_mem_factor": 2, "gate": "full"},
    "dual": {"state_update": "dual", "gate": "lstm", "recurrent_layers": (1, 3)},
    "hard": {"gate": "hard", "gate_options": {"per": "state"}},
    "feedback": {"block_feedback": True},
    "read below": {"recurrent_layers": (2, 3), "read_recurrent_layers": (1, 1)},
    "token_gated": {"state_update": "token_gated", "gate": "hard", "num_xl_blocks": 0},
    "routed": {"extra_memories": {"routed": {"capacity": 16, "chunk_size": 2, "num_chosen": 2, "layers": (3,)}}},
    "sliding": {"attention_window": "sliding", "positions": "t5", "empty_memory": "zeros"},
}
MIXED = "h\u00e9, \u6f22\u5b57 \U0001f600.\r\n\tEnd".encode()  # 23 bytes
TEXTS = [b"The first of all: </script> & <b>", b"x", MIXED, b"\xff\x00\x80 odd", b"1234"]  # 33, 1, 23, 7, 4 bytes


def documents(texts: list[bytes]) -> list[data.Document]:
    return [data.Document(f"/folder/{i}<b>.txt", lambda x=x: x, len(x), "") for i, x in enumerate(texts)]


def looked_at(model: BlockRecurrentTransformer, texts: list[bytes], most: int) -> tuple[report.Text, dict]:
    """The text and its losses as evaluate.py has them."""
    corpus = data.Corpus.from_tokens([list(text) for text in texts], 256)
    layout = evaluate.lay_out(corpus, model.config.block_width)
    losses = {way: evaluate.read(model, corpus, layout, 3, way, looked_at=most, quiet=True) for way in evaluate.WAYS}
    text = report.spell(documents(texts), data.ByteTokenizer(), corpus, most)
    return text, {way: one.tokens for way, one in losses.items()}


def opened(path: Path) -> tuple[dict, dict[str, bytes]]:
    """What the page's script reads."""
    page = path.read_text(encoding="utf-8")
    found = dict(re.findall(r'<script type="[^"]+" id="data-([\w-]+)">([^<]*)</script>', page))
    facts = json.loads(found.pop("facts"))
    return facts, {name: zlib.decompress(base64.b64decode(content)) for name, content in found.items()}


def bits_in(facts: dict, sections: dict[str, bytes]) -> list[np.ndarray]:
    """Bits of each token in each colouring, as the page's script computes them."""
    found = []
    for index, one in enumerate(facts["colourings"]):
        steps = np.frombuffer(sections[f"bits-{index}"], np.int8 if index else np.uint8).astype(float)
        levels = 127 if index else 255
        found.append(np.sign(steps) * (steps / levels) ** 2 * one["largest"])
    return found


def tolerance(bits: np.ndarray, levels: int) -> np.ndarray:
    """Half a step of the square root."""
    largest, half = np.abs(bits).max(), 0.5 / levels
    return largest * (2 * half * np.sqrt(np.abs(bits) / largest) + half**2) + 1e-6


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_page_holds_what_score_gives(options, tmp_path):
    model = random_model(Config(**SIZES | options))
    text, nats = looked_at(model, TEXTS, most=52)
    positions = [[0, "", 52, 1.0, 2.0, 3.0, math.nan]]
    report.write(tmp_path / "report.html", "a <title>", model, text, nats, positions, "note")
    facts, sections = opened(tmp_path / "report.html")
    whole = b"".join(TEXTS)[:52]
    assert sections["text"] == text.content == whole and facts["tokens"] == facts["bytes"] == 52
    assert facts["documents"] == [["0<b>.txt", 0], ["1<b>.txt", 33], ["2<b>.txt", 34]]
    assert facts["positions"] == [[0, "", 52, 1.0, 2.0, 3.0, None]]

    ids = [torch.tensor(list(part)) for part in (TEXTS[0], TEXTS[1], TEXTS[2])]
    expected = -torch.cat(score(model, ids, bos=0))[:52].numpy() / math.log(2)
    assert nats["carried"] / math.log(2) == pytest.approx(expected, rel=1e-5)
    found, names = bits_in(facts, sections), [one["name"] for one in facts["colourings"]]
    assert (np.abs(found[0] - expected) <= tolerance(expected, 255)).all()
    for name, way in (("states", "state reset"), ("XL memory", "no XL memory"), ("all memory", "neither")):
        if name not in names:
            assert name != "states" and not model.config.num_xl_blocks
            continue
        saved = (nats[way].astype(float) - nats["carried"]) / math.log(2)
        index = names.index(name)
        assert (np.abs(found[index] - saved) <= tolerance(saved, 127)).all(), name
        assert facts["colourings"][index]["mean"] == pytest.approx(saved.sum() / 52, abs=1e-5)
        assert np.abs(saved).max() > 0.01, name
    assert ("compressed memory" in names) == model.config.use_compressed_mem
    assert ("routed memory" in names) == bool(model.config.extra_memories)


def test_a_further_memory_is_taken_away_alone():
    """From a model of the same weights without it; only tokens behind what the XL memory holds can differ."""
    model = random_model(Config(**SIZES | VARIANTS["compressed"]))
    text, nats = looked_at(model, TEXTS, most=1000)
    found = {one.name: one.bits for one in report.colourings(model, text, nats)}
    plain = random_model(Config(**SIZES | VARIANTS["compressed"] | {"use_compressed_mem": False}))
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    ids = [torch.tensor(list(part)) for part in TEXTS]
    expected = -torch.cat(score(plain, ids, bos=0)) / math.log(2) - torch.from_numpy(nats["carried"]) / math.log(2)
    assert found["compressed memory"] == pytest.approx(expected.numpy(), abs=1e-5)
    assert np.abs(found["compressed memory"][:8]).max() < 1e-5 < np.abs(found["compressed memory"][8:33]).max()
    assert report.passes(model) == 2 and report.passes(plain) == 1


def test_a_model_without_memory_has_its_losses_only(tmp_path):
    model = random_model(Config(**SIZES | {"recurrent_layers": (), "num_xl_blocks": 0}))
    text, nats = looked_at(model, TEXTS, most=20)
    report.write(tmp_path / "report.html", "none", model, text, nats, [], "note")
    facts, _ = opened(tmp_path / "report.html")
    assert [one["name"] for one in facts["colourings"]] == ["surprise"] and "columns" not in facts


def test_losses_of_tokens_are_those_of_their_blocks():
    model = random_model(Config(**SIZES))
    corpus = data.Corpus.from_tokens([list(range(i, i + n)) for i, n in enumerate((9, 0, 1, 30, 8))], 256)
    layout = evaluate.lay_out(corpus, 4)
    blocks = np.repeat(np.arange(len(layout.block_bytes)), layout.block_bytes.astype(int))
    for way in evaluate.WAYS:
        every = evaluate.read(model, corpus, layout, 2, way, looked_at=999, quiet=True)
        assert np.bincount(blocks, weights=every.tokens) == pytest.approx(every.blocks, rel=1e-5)
        first = evaluate.read(model, corpus, layout, 2, way, looked_at=11, quiet=True)
        assert np.array_equal(first.tokens, every.tokens[:11]), way


# ------------------------------------------------------------------------------------------------------ looking inside


@pytest.mark.parametrize("at_once", [1, 8, 2048])
@pytest.mark.parametrize("name", ["default", "dual", "feedback", "read below", "hard"])
def test_what_happened_inside_is_what_states_did(name, at_once, monkeypatch):
    """Against states and attention of single blocks."""
    monkeypatch.setattr(report, "TOKENS_AT_ONCE", at_once)
    model = random_model(Config(**SIZES | VARIANTS[name]))
    text, _ = looked_at(model, TEXTS, most=52)
    counted = []
    inside = report.look(model, text, counted.append)
    assert sum(counted) == 52 and inside.first_tokens == [*range(0, 33, 4), 33, *range(34, 52, 4)]
    lengths = {layer: [] for layer in model.cells}
    moves = {layer: [] for layer in model.cells}
    attention = {}
    for document in text.split_documents():
        memories, states = None, model.init_states(1)
        for block in torch.cat([torch.zeros(1, dtype=torch.int64), document[:-1]]).split(4):
            with inspecting(model) as seen:
                _, memories, after = model(block[None], xl_memories=memories, states=states)
            for layer, record in seen.items():
                for index, weights in enumerate(record.state_attention):
                    attention.setdefault((layer, index), []).append(weights[0].mean((0, 1)).tolist())
            for layer, old, new in zip(model.cells, states.layers, after.layers):
                full = len(block) == 4
                lengths[layer].append(new[0].norm(dim=-1).median().item() if full else math.nan)
                moves[layer].append((new - old)[0].norm(dim=-1).median().item() if full else math.nan)
            states = after
    for layer in model.cells:
        rows = np.concatenate(inside.states[f"layer {layer}"])
        assert rows[:, 1] == pytest.approx(np.array(lengths[layer]), rel=1e-5, nan_ok=True)
        assert rows[:, 4] == pytest.approx(np.array(moves[layer]), rel=1e-5, nan_ok=True)
    reads = {"default": 1, "dual": 2, "feedback": 3, "read below": 2, "hard": 1}[name]
    assert len(inside.attention) == reads
    for entries, expected in zip(inside.attention.values(), attention.values(), strict=True):
        rows = np.concatenate(entries)
        assert rows[:, :3] == pytest.approx(np.array(expected), abs=1e-6) and rows.shape[1] == 3 + 1
        assert (rows[:, 3] >= 1).all() and (rows[:, 3] <= 3 + 1e-5).all()
    assert len(inside.keep) == (4 if name == "dual" else len(model.cells))


def test_half_lives():
    """Of a gate that keeps the same share in every block, whatever is read."""
    model = random_model(Config(**SIZES))
    text, _ = looked_at(model, TEXTS, most=52)
    sections = {}
    facts = report.inside_facts(report.look(model, text), sections)
    (gate,) = facts["gates"]
    keep = model.cell(2).update.gate.keep.detach().sigmoid()
    expected = np.array([math.log(0.5) / math.log(share) for share in keep.tolist()])
    assert gate["half_life"] == pytest.approx(np.sort(expected), rel=1e-3)
    assert gate["channels"] == np.argsort(expected).tolist() and gate["blocks"] == 8 + 0 + 4
    assert gate["low"] == gate["high"] == gate["half_life"]
    ends = report.half_lives(torch.tensor([1.0, 0.0, 0.5, 0.25]))
    assert ends.tolist() == pytest.approx([math.inf, 0, 1, 0.5]) and report.numbers(ends) == [None, 0, 1, 0.5]


def test_means_in_columns():
    rows = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, np.nan], [7.0, 8.0], [9.0, 1.0]])
    assert_same(torch.from_numpy(report.in_columns(rows, 5)).nan_to_num(-1), torch.from_numpy(rows).nan_to_num(-1))
    found = report.in_columns(rows, 2)  # of blocks 0 to 2, and 3 and 4
    assert found[:, 0].tolist() == [3, 8] and found[:, 1].tolist() == [2, 4.5]
    assert math.isnan(report.in_columns(rows[1:3], 1)[0, 1])


# -------------------------------------------------------------------------------------------------------- text and page


def test_tokens_of_a_tokenizer_are_found_in_the_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    library.train_from_iterator(["the first of the others, then the end " * 20], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.FileTokenizer(tmp_path / "tokenizer.json")
    texts = [b"the others", "the \u6f22 then \xe9\n".encode(), b"odd \xff the"]
    corpus = data.Corpus.from_tokens([tokenizer.encode(text) for text in texts], tokenizer.num_tokens)
    text = report.spell(documents(texts), tokenizer, corpus, 10**6)
    assert text.content.decode() == "".join(one.decode("utf-8", "replace") for one in texts)
    assert len(text.starts) == len(text.tokens) + 1 == corpus.total_tokens + 1 and text.starts[-1] == len(text.content)
    for number, token in enumerate(text.tokens):
        piece = text.content[text.starts[number] : text.starts[number + 1]].decode("utf-8", "replace")
        decoded = tokenizer.decode([token])
        assert piece == decoded or "\ufffd" in decoded or not piece, (piece, decoded)
    for most in range(1, len(text.tokens)):
        cut = report.spell(documents(texts), tokenizer, corpus, most)
        assert np.array_equal(cut.starts, text.starts[: most + 1]) and cut.content == text.content[: text.starts[most]]


def test_quantised_numbers_are_near():
    draw = np.random.default_rng(0)
    for levels, bits in ((255, draw.gamma(0.5, 4, 5000)), (127, draw.laplace(0, 1, 5000)), (127, np.zeros(3))):
        steps, largest = report.quantised(bits, levels)
        back = np.sign(steps.astype(float)) * (steps.astype(float) / levels) ** 2 * largest
        assert (np.abs(back - bits) <= tolerance(bits, levels) if bits.any() else back == bits).all()
        assert steps.dtype.itemsize == 1


def test_the_page_loads_nothing_and_escapes_names(tmp_path):
    model = random_model(Config(**SIZES))
    text, nats = looked_at(model, TEXTS, most=52)
    report.write(tmp_path / "report.html", "a </title><script>", model, text, nats, [], "</script><b>")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]+", page) == ["http://www.w3.org/2000/svg"]  # the name of SVG
    assert not re.search(r"<(img|link|iframe|script)\b[^>]*(src|href)=\"(?!data:)", page) and "@import" not in page
    assert "<title>a &lt;/title&gt;&lt;script&gt;</title>" in page and page.count("</script>") == page.count("<script")
    assert "default-src 'none'" in page and "{{" not in page


def test_refuses():
    model = random_model(Config(**SIZES))
    text, nats = looked_at(model, TEXTS, most=52)
    with pytest.raises(ValueError, match=r"nats\['carried'\] must hold 52 numbers, not \(51,\)"):
        report.write("never.html", "", model, text, nats | {"carried": nats["carried"][1:]}, [], "")
    broken = nats | {"neither": np.where(np.arange(52) == 7, np.nan, nats["neither"])}
    with pytest.raises(ValueError, match="1 tokens that are not finite"):
        report.write("never.html", "", model, text, broken, [], "")
    corpus = data.Corpus.from_tokens([[1, 2]], 256)
    with pytest.raises(ValueError, match="most=0 is below 1"):
        report.spell(documents(TEXTS[:1]), data.ByteTokenizer(), corpus, 0)
    with pytest.raises(ValueError, match="makes 1 tokens of /folder/0<b>.txt, the corpus holds 2"):
        report.spell(documents([b"x"]), data.ByteTokenizer(), corpus, 9)
    assert not Path("never.html").exists()
