"""The documents say what is so: code runs, commands parse, tables are computed, links lead somewhere."""

import ast
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, config, paper
from block_recurrent_transformer_pytorch.commands import evaluate, generate, train
from block_recurrent_transformer_pytorch.flags import model_config
from block_recurrent_transformer_pytorch.llama import to_llama

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
    torch.save({k: torch.from_numpy(v) for k, v in recorded("lucidrains.npz/read_below").items()}, tmp_path / "old.pt")
    arguments = ["--max-seq-len", "8", "--block-width", "4", "--read-recurrent-layers", "1"]
    arguments += ["--out", str(tmp_path / "new")]
    run_example("migrate_from_0_4_4.py", monkeypatch, capsys, str(tmp_path / "old.pt"), *arguments)
    config = BlockRecurrentTransformer.from_pretrained(tmp_path / "new").config
    assert config.block_width == 4 and config.read_recurrent_layers == (1,)


def test_example_own_gate_and_memory(monkeypatch, capsys):
    told = run_example("own_gate_and_memory.py", monkeypatch, capsys)
    assert float(re.search(r"logits in two calls: (\S+)", told)[1]) < 1e-4
    assert "averages: torch.Size([1, 1, 6, 16])" in told and 0.3 < float(re.search(r"is kept: (\S+)", told)[1]) < 0.7


def test_example_train_minimal(monkeypatch, capsys):
    told = run_example("train_minimal.py", monkeypatch, capsys, "--steps", "3", "--dim", "32", "--segment", "32")
    bits = float(re.search(r"step 3: (\S+) bits per byte", told)[1])
    assert 2 < bits < 16
    assert "\nimport " in told


# ------------------------------------------------------------------------------------------------------------ documents


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run on a short text."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "book.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely.\n" * 200)
    flags = f"--preset tiny --steps 2 --sample 0 --device cpu --cache {folder / 'cache'}".split()
    assert train.main([*flags, "--data", str(folder / "book.txt"), "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def workplace(trained, monkeypatch, tmp_path):
    """A folder with the runs, the book and the pretrained model that the pages speak of."""
    for name in ("first", "tuned"):
        shutil.copytree(trained / "run", tmp_path / "runs" / name)
    like_llama = {"positions": "rotary", "ff_activation": "swiglu", "norm": "rms", "logit_scale": 1.0}
    sizes = {"num_tokens": 9, "dim": 16, "depth": 20, "heads": 2, "dim_head": 8, "max_seq_len": 16, "block_width": 8}
    to_llama(BlockRecurrentTransformer(**sizes, **like_llama, recurrent_layers=()), tmp_path / "SmolLM2-135M")
    (tmp_path / "SmolLM2-135M" / "tokenizer.json").touch()
    shutil.copy(trained / "book.txt", tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, **by_name)
def test_python_code_runs_from_top_to_bottom(page, workplace):
    """In a folder with the weights that the migration guide loads."""
    torch.save({k: torch.from_numpy(v) for k, v in recorded("lucidrains.npz/default").items()}, "weights.pt")
    np.savez("params.npz", **recorded("model_lstm_dual.npz"))
    names: dict = {"__name__": f"page_{page.stem}"}
    for code in blocks(page, "python"):
        ast.parse(code)
        exec(compile(code, str(page), "exec"), names)


def commands(script: str) -> list[str]:
    code = [block for page in PAGES for block in blocks(page, "(?:sh|bash|shell|console)")]
    lines = [line for block in code for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line.split("#")[0].strip() for line in lines if re.match(rf"(python|torchrun)\b.*\b{script}", line)})


def test_the_readme_tells_every_command_and_how_to_test():
    assert all(commands(script) for script in ("train.py", "generate.py", "evaluate.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^pip install .*\[test\].*pytest", readme, flags=re.M)) == 1  # which .ci/run looks for


@pytest.mark.parametrize("command", commands("generate.py"))
def test_commands_of_generate_run(command, workplace, monkeypatch, capsys):
    """The prompts of one without --prompt are the lines of the standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("And who is Ahab?\n"))
    flags = shlex.split(command)[2:]
    assert generate.main([*flags, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip()
    assert Path("book.safetensors").exists() == ("--memory" in flags)


@pytest.mark.parametrize("command", commands("evaluate.py"))
def test_commands_of_evaluate_parse(command):
    evaluate.make_parser().parse_args(shlex.split(command)[2:])


@pytest.mark.parametrize("command", commands("train.py"))
def test_commands_of_the_trainer_parse(command, workplace, monkeypatch):
    """And the batch can be divided among the processes and parts."""
    words = shlex.split(command)
    launcher, flags = words[: words.index("train.py")], words[words.index("train.py") + 1 :]
    processes = 1
    for name in ("--nnodes", "--nproc-per-node"):
        if name in launcher:
            processes *= int(launcher[launcher.index(name) + 1])
    if processes > 1:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    options = train.parse(flags)
    assert options.batch % (processes * options.accumulate) == 0
    model_config(options, num_tokens=options.vocabulary or 256)


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
            known = config.GATES if names[0] == "gate" else str(options[names[0]].type)
            assert choice in options or choice in known, (names, choice)
        told = re.fullmatch(r" (?:`(\w+)`|([\d.]+)) ", value)
        if told and names and told[1] != "heads":
            assert str(getattr(default, names[0])) in ((told[1] or told[2]), f"{told[2]}.0"), (names, value)
    assert default.recurrent_layers == (6 // 2,) and default.num_state_vectors == default.block_width
    assert default.ff_dim == int(8 * 48 / 3)


PACKAGE = ROOT / "block_recurrent_transformer_pytorch"


def rooms() -> list[str]:
    """The modules of the package in the order of the table in architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = text.partition("| room |")[2].partition("\n\n")[0].splitlines()[2:]
    return [name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])]


def test_the_table_of_rooms_names_every_module():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert sorted(rooms()) == sorted(modules), "name it in the table of rooms in docs/architecture.md"


def test_no_room_imports_one_below_it():
    order = rooms()
    for number, name in enumerate(order):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        for node in tree.body:  # not those within functions, nor for type checkers alone
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                for module in set(modules) & set(order):
                    assert module in order[:number], f"{name} imports {module}"


def test_the_way_of_a_token_names_functions_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    way = text.partition("### A token and a state on their way")[2].partition("###")[0]
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py"))
    names = set(re.findall(r"`(\w+)`", way))
    assert len(names) > 20
    for name in names:
        assert re.search(rf"(def|class) {name}\b|self\.{name} = ", source), name


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
