"""Memories and states on disk: exact, of one model, and readable by later versions."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_extending as extending
import torch
from hypothesis import given, settings
from oracle import assert_same
from safetensors.torch import load_file, save_file
from strategies import VOCABULARY, config_options, examples, random_model, random_stream
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, carried_files
from block_recurrent_transformer_pytorch.carried_files import from_tensors, load, load_previous, save, to_tensors
from block_recurrent_transformer_pytorch.generation import seen_tokens

GOLDEN = Path(__file__).parent / "golden"
OPTIONS = {
    "num_tokens": VOCABULARY, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "max_seq_len": 8,
    "block_width": 4, "recurrent_layers": (2,), "num_state_vectors": 2, "use_compressed_mem": True,
    "compressed_mem_factor": 2,
}  # fmt: skip
MODEL = random_model(Config(**OPTIONS))
RAGGED = torch.tensor([7, 2, 13])


def carried_by(model: BlockRecurrentTransformer, lengths: Tensor | None = None, tokens: int = 13) -> tuple[Any, Any]:
    with torch.no_grad():
        return model(random_stream(3, tokens), lengths=lengths)[1:]


def assert_exact(one: Any, other: Any) -> None:
    """The same classes, types and numbers, to the last bit."""
    (ours, structure), (theirs, expected) = tree_flatten(one), tree_flatten(other)
    assert structure == expected
    for a, b in zip(ours, theirs):
        assert type(a) is type(b)
        assert (a.dtype == b.dtype and torch.equal(a, b)) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("lengths", [None, RAGGED])
@pytest.mark.parametrize("tokens", [13, 16])
def test_what_was_saved_comes_back_exactly(lengths, tokens, tmp_path):
    carried = carried_by(MODEL, lengths, tokens)
    save(tmp_path / "book.safetensors", *carried, MODEL)
    assert_exact(load(tmp_path / "book.safetensors", MODEL), carried)
    assert_exact(load(tmp_path / "book.safetensors"), carried)
    assert_exact(from_tensors(to_tensors(*carried)), carried)


@settings(max_examples=examples(15))
@given(options=config_options())
def test_of_every_variant(options):
    model = random_model(Config(**options))
    for carried in (carried_by(model), (model.init_memories(2), model.init_states(2)), carried_by(model, RAGGED)):
        assert_exact(from_tensors(to_tensors(*carried), model), carried)


def test_a_half_precision_model_keeps_its_types(tmp_path):
    model = copy.deepcopy(MODEL).bfloat16()
    carried = carried_by(model)
    save(tmp_path / "book", *carried, model)
    assert_exact(load(tmp_path / "book", model), carried)
    assert {leaf.dtype for leaf in tree_leaves(carried) if isinstance(leaf, Tensor)} == {torch.bfloat16, torch.float32}


def test_reading_on_from_a_file_is_reading_on(tmp_path):
    """Also by decoding, which writes into memories that are given away."""
    memories, states = carried_by(MODEL)
    save(tmp_path / "book", memories, states, MODEL)
    wanted = MODEL.generate(random_stream(3, 2), max_new_tokens=12, temperature=0, xl_memories=memories, states=states)
    memories, states = load(tmp_path / "book", MODEL)
    again = MODEL.generate(random_stream(3, 2), max_new_tokens=12, temperature=0, xl_memories=memories, states=states)
    assert torch.equal(again, wanted)
    loss = MODEL(random_stream(3, 5), xl_memories=memories, states=states, return_loss=True)[0]
    loss.backward()  # and trained on
    MODEL.zero_grad()


def test_no_two_tensors_share_memory():
    """Not even zeros that took the memory of one number."""
    memories, states = MODEL.init_memories(2), MODEL.init_states(2)
    loaded = from_tensors(to_tensors(memories, states))
    places = [leaf.data_ptr() for leaf in tree_leaves(loaded) if isinstance(leaf, Tensor)]
    assert len(set(places)) == len(places)
    assert all(leaf.is_contiguous() for leaf in tree_leaves(loaded) if isinstance(leaf, Tensor))


def test_what_was_seen_goes_with_them(tmp_path):
    seen = seen_tokens(VOCABULARY, random_stream(3, 13))
    save(tmp_path / "book", *carried_by(MODEL), MODEL, previous=seen)
    assert torch.equal(load_previous(tmp_path / "book", MODEL), seen)
    save(tmp_path / "book", *carried_by(MODEL), MODEL)
    assert load_previous(tmp_path / "book") is None


# -------------------------------------------------------------------------------------------------- with torch's own


def test_torch_save_and_load(tmp_path):
    carried = carried_by(MODEL, RAGGED)
    file = io.BytesIO()
    torch.save(carried, file)
    file.seek(0)
    assert_exact(torch.load(file, weights_only=True), carried)


def test_safetensors_takes_the_tensors(tmp_path):
    carried = MODEL.init_memories(2), MODEL.init_states(2)
    save_file(to_tensors(*carried), tmp_path / "plain.safetensors")
    assert_exact(from_tensors(load_file(tmp_path / "plain.safetensors")), carried)
    assert "memories/layers/0/block/k" in to_tensors(*carried)


# --------------------------------------------------------------------------------------------------------- other models


def test_another_models_memories_are_refused(tmp_path):
    other = random_model(Config(**{**OPTIONS, "num_state_vectors": 3}))
    save(tmp_path / "book", *carried_by(other), other)
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "book", MODEL)
    for word in (other.config.fingerprint, MODEL.config.fingerprint, "num_state_vectors=3 there, 2 here", "book"):
        assert word in str(caught.value)
    load(tmp_path / "book")


def test_options_that_do_not_matter_may_differ(tmp_path):
    save(tmp_path / "book", *carried_by(MODEL), MODEL)
    load(tmp_path / "book", random_model(Config(**{**OPTIONS, "max_seq_len": 16, "ff_dropout": 0.5})))


def test_a_file_from_before_an_option_was_there(tmp_path):
    """Its fingerprint is another one; its options, completed by their defaults, are the same."""
    tensors, options = to_tensors(*carried_by(MODEL)), json.loads(json.dumps(OPTIONS))
    save_file(tensors, tmp_path / "book", {"fingerprint": "0" * 16, "config": json.dumps(options)})
    load(tmp_path / "book", MODEL)


class Noted(NamedTuple):
    """A kind of memory that this library does not know."""

    notes: Tensor
    number: int


def test_a_kind_of_memory_of_ones_own(monkeypatch):
    """Its class is found in the model's empty memories, and nothing here needs to know it."""
    memories, states = carried_by(MODEL)
    past = {**memories.layers[0].past, "noted": Noted(torch.arange(3), 2)}
    layer = memories.layers[0]._replace(past=past)
    memories = memories._replace(layers=(layer, *memories.layers[1:]))
    tensors = to_tensors(memories, states)
    with pytest.raises(ValueError, match="Noted"):
        from_tensors(tensors)
    model = random_model(MODEL.config)
    monkeypatch.setattr(model, "init_memories", lambda batch: memories)
    assert_exact(from_tensors(tensors, model), (memories, states))


def test_a_registered_kind_of_memory(tmp_path):
    model = random_model(Config(**extending.SIZES, **extending.EXTRA))
    carried = carried_by(model, RAGGED)
    save(tmp_path / "book", *carried, model)
    assert_exact(load(tmp_path / "book", model), carried)
    with pytest.raises(ValueError, match="extra_memories="):
        load(tmp_path / "book", random_model(Config(**extending.SIZES)))


# ---------------------------------------------------------------------------------------------------------- bad files


def wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    text, plain, later, odd = (folder / name for name in ("text", "plain", "later", "odd"))
    text.write_text("Call me Ishmael.")
    save_file({"weight": torch.zeros(2)}, plain)
    content = json.loads(bytes(to_tensors(*carried_by(MODEL))["structure"].tolist()))
    for path, changed in ((later, {**content, "format": 99}), (odd, {**content, "carried": {"memories": 1}})):
        save_file({"structure": torch.tensor([*json.dumps(changed).encode()], dtype=torch.uint8)}, path)
    return {
        "text": (text, "is no file of memories"),
        "weights": (plain, "are not memories and states"),
        "later": (later, "format 99"),
        "odd": (odd, "describes no memories and states"),
    }


@pytest.mark.parametrize("name", ["text", "weights", "later", "odd"])
def test_other_files_are_refused(name, tmp_path):
    path, words = wrong_files(tmp_path)[name]
    with pytest.raises(ValueError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere", MODEL)


def test_a_file_takes_the_place_of_another_at_once(tmp_path, monkeypatch):
    save(tmp_path / "book", *carried_by(MODEL), MODEL)
    before = (tmp_path / "book").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(carried_files.write_tensors.__globals__["os"], "replace", full)
    with pytest.raises(OSError, match="space"):
        save(tmp_path / "book", *carried_by(MODEL, RAGGED), MODEL)
    assert (tmp_path / "book").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["book"]


# --------------------------------------------------------------------------------------------------------- old formats


@pytest.mark.parametrize("kind", ["equal", "ragged"])
def test_files_of_version_1_0_0(kind):
    """Recorded by golden/record_carried.py: the same model goes on from them with the same logits."""
    kept = load_file(GOLDEN / "carried_1_0_0_model.safetensors")
    weights = {name.removeprefix("model/"): value for name, value in kept.items() if name.startswith("model/")}
    model = BlockRecurrentTransformer.from_weights(Config(**OPTIONS), weights)
    memories, states = load(GOLDEN / f"carried_1_0_0_{kind}.safetensors", model)
    with torch.no_grad():
        logits, _, _ = model(kept["following"], xl_memories=memories, states=states)
    assert_same(logits, kept[f"logits/{kind}"], 1e-10)


def test_the_names_of_version_1_0_0_become_those_of_format_2():
    tensors = load_file(GOLDEN / "carried_1_0_0_ragged.safetensors")
    structure = json.loads(bytes(tensors["structure"].tolist()))["carried"]
    renamed = carried_files.renamed_from_1(structure)
    name, memories = renamed["memories"]["$namedtuple"]
    assert (name, set(memories)) == ("Memories", {"layers", "position"})
    name, position = memories["position"]["$namedtuple"]
    assert name == "Position" and position["full_blocks"] == 0 and position["known"] is None
    assert position["offset"] == {"$tensor": "memories/place"}
    assert position["extra_blocks"] == {"$tensor": "memories/ahead"}
    for index, layer in enumerate(memories["layers"]["$tuple"]):
        name, fields = layer["$namedtuple"]
        assert (name, set(fields)) == ("LayerMemory", {"block", "past", "ready"})
        assert set(fields["past"]) == {"xl", "compressed"}
        assert fields["past"]["xl"]["$namedtuple"][1]["k"] == {"$tensor": f"memories/layers/{index}/xl/k"}
    assert set(renamed["states"]["$namedtuple"][1]) == {"layers", "kv"}
