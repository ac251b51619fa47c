"""The documents say what is so: code runs, commands parse, tables are computed, links lead somewhere."""

import ast
import importlib.util
import json
import re
import runpy
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, paper

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for page in [ROOT / "README.md", *DOCS] if page.exists()]
GOLDEN = ROOT / "tests" / "golden"

by_name = {"ids": lambda path: path.name}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def load(path: Path):
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def recorded(name: str) -> dict[str, np.ndarray]:
    """The weights of one of the recorded models: `lucidrains.npz/default`, or a file of the authors' code."""
    file, _, case = name.partition("/")
    arrays = np.load(GOLDEN / file) if case else np.load(GOLDEN / "meliad" / file)
    prefix = f"{case}/param/" if case else "param/"
    return {key[len(prefix) :]: arrays[key] for key in arrays.files if key.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------------- examples


def run_example(name: str, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_tried_here():
    text = Path(__file__).read_text(encoding="utf-8")
    for example in (ROOT / "examples").glob("*.py"):
        assert f'run_example("{example.name}"' in text


def test_example_continue_from_memories(monkeypatch, capsys):
    told = run_example("continue_from_memories.py", monkeypatch, capsys, "--tokens", "300", "--dim", "32")
    assert float(re.search(r"reading everything again: (\S+)", told)[1]) < 1e-4
    assert "300 tokens read" in told and "20 and then 5 tokens for each of 2 questions" in told


def test_example_migrate_compares_with_what_0_4_4_gave(monkeypatch, capsys):
    told = run_example("migrate_from_0_4_4.py", monkeypatch, capsys)
    differences = [float(x) for x in re.findall(r"difference of the logits (\S+)", told)]
    assert len(differences) == 4 and max(differences) < 1e-8


def test_example_migrate_converts_a_file(monkeypatch, capsys, tmp_path):
    pytest.importorskip("safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in recorded("lucidrains.npz/read_below").items()}, tmp_path / "old.pt")
    arguments = ["--max-seq-len", "8", "--block-width", "4", "--read-recurrent-layers", "1"]
    arguments += ["--out", str(tmp_path)]
    run_example("migrate_from_0_4_4.py", monkeypatch, capsys, str(tmp_path / "old.pt"), *arguments)
    config = Config.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert config.block_width == 4 and config.read_recurrent_layers == (1,)
    assert (tmp_path / "model.safetensors").exists()


def test_example_train_minimal(monkeypatch, capsys):
    told = run_example("train_minimal.py", monkeypatch, capsys, "--steps", "3", "--dim", "32", "--segment", "32")
    bits = float(re.search(r"step 3: (\S+) bits per byte", told)[1])
    assert 2 < bits < 16
    assert "\nimport " in told


# ------------------------------------------------------------------------------------------------------------ documents


@pytest.mark.parametrize("page", DOCS, **by_name)
def test_python_code_runs_from_top_to_bottom(page, monkeypatch, tmp_path):
    """In a folder with the weights that the migration guide loads."""
    monkeypatch.chdir(tmp_path)
    torch.save({k: torch.from_numpy(v) for k, v in recorded("lucidrains.npz/default").items()}, "weights.pt")
    np.savez("params.npz", **recorded("model_lstm_dual.npz"))
    names: dict = {}
    for code in blocks(page, "python"):
        ast.parse(code)
        exec(compile(code, str(page), "exec"), names)


def commands() -> list[str]:
    code = [block for page in PAGES for block in blocks(page, "(?:sh|bash|shell|console)")]
    lines = [line for block in code for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line.split("#")[0].strip() for line in lines if re.match(r"(python|torchrun)\b.*\btrain\.py", line)})


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_trainer_parse(command, monkeypatch, tmp_path):
    """And the batch can be divided among the processes and parts."""
    train = load(ROOT / "train.py")
    words = shlex.split(command)
    launcher, flags = words[: words.index("train.py")], words[words.index("train.py") + 1 :]
    processes = 1
    for name in ("--nnodes", "--nproc-per-node"):
        if name in launcher:
            processes *= int(launcher[launcher.index(name) + 1])
    if processes > 1:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.chdir(tmp_path)
    if "--resume" in flags and (after := flags[flags.index("--resume") + 1 :]) and not after[0].startswith("-"):
        Path(after[0]).mkdir(parents=True)
    options = train.parse(flags)
    assert options.batch % (processes * options.accumulate) == 0
    train.model_config(options, num_tokens=256)


def test_scaling_tables_are_what_the_script_computes():
    scaling = load(ROOT / "docs" / "scaling.py")
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.updated(page) == page, "python docs/scaling.py --update"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scaling_formulas_are_near_what_autograd_keeps(precision):
    scaling = load(ROOT / "docs" / "scaling.py")
    options = paper.options("small_37M", scaling.VARIANT, depth=4, recurrent_layers=(2,))
    formula = scaling.activations(Config(**options), 2048, precision)
    assert 0.9 < formula / scaling.counted(options, 2048, precision) < 1.2  # torch 2.5 keeps less under autocast


def test_scaling_of_carried_values_is_what_is_carried():
    scaling = load(ROOT / "docs" / "scaling.py")
    options = paper.options("tiny_test", "fixed:skip", num_tokens=7, block_width=8, num_state_vectors=3, max_seq_len=8)
    model = BlockRecurrentTransformer(Config(**options))
    _, memories, states = model(torch.zeros(1, 16, dtype=torch.long))
    leaves = [x for layer in memories.layers for x in layer.past["xl"]] + list(states.layers)
    assert sum(x.nbytes for x in leaves) == scaling.carried(model.config)


def test_scaling_units_are_those_that_are_sharded():
    scaling = load(ROOT / "docs" / "scaling.py")
    model = scaling.make("small_37M")
    own, *layers = scaling.units(model)
    cell = next(layer for layer in model.layers if layer.cell is not None)
    outside = scaling.count(cell) - scaling.count(cell.feed_forward)
    assert own == outside + model.token_emb.weight.numel() + model.norm.weight.numel()
    assert own + sum(layers) == scaling.count(model) and len(layers) == 12


def test_every_option_of_the_model_is_explained():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    sizes = {"num_tokens", "dim", "depth", "dim_head", "heads", "max_seq_len", "block_width"}
    unmentioned = {"ignore_index", "use_flash_attn", "use_checkpointing"}  # change no numbers
    for name in {field.name for field in fields(Config)} - sizes - unmentioned:
        assert f"`{name}`" in text, name


def test_the_table_of_readings_names_options_values_and_defaults_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ") and line.count("|") == 6]
    assert len(rows) > 20
    options = {field.name: field for field in fields(Config)}
    default = Config(num_tokens=2, dim=48, depth=6)
    for _, _, _, option, value in rows[1:]:
        names = [name for name in re.findall(r"`(\w+)`", option.partition(":")[0]) if name in options]
        for choice in re.findall(r"`(\w+)`", option.partition(":")[2]):
            assert choice in options or choice in str(options[names[0]].type), (names, choice)
        told = re.fullmatch(r" (?:`(\w+)`|([\d.]+)) ", value)
        if told and names and told[1] != "heads":
            assert str(getattr(default, names[0])) in ((told[1] or told[2]), f"{told[2]}.0"), (names, value)
    assert default.recurrent_layers == (6 // 2,) and default.num_state_vectors == default.block_width
    assert default.ff_dim == int(8 * 48 / 3)


def test_the_constructor_of_0_4_4_is_covered():
    theirs = {  # inspect.signature of the real package
        "num_tokens", "dim", "depth", "dim_head", "heads", "all_layers_qk_rmsnorm", "ff_mult", "max_seq_len",
        "block_width", "recurrent_layers", "read_recurrent_layers", "num_state_vectors", "ignore_index",
        "use_flash_attn", "use_compressed_mem", "compressed_mem_factor",
    }  # fmt: skip
    assert theirs <= {field.name for field in fields(Config)}
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in theirs)


# ---------------------------------------------------------------------------------------------------- links and drawing


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, **by_name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    for link in (one or other for one, other in links):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_drawing_is_a_drawing():
    text = (ROOT / "docs" / "recurrent_layer.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and "prefers-color-scheme: dark" in text
    assert not re.search(r"<script|<image|https?://(?!www\.w3\.org/2000/svg)", text)
    used = {name for element in root.iter() for name in element.get("class", "").split()}
    light, dark = re.search(r"<style>(.*?)</style>", text, flags=re.S)[1].split("@media")
    for name in used - {"line", "head", "once"}:  # which have no colour
        assert f".{name} " in light and f".{name} " in dark, name
