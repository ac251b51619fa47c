"""train.py and evaluate.py by their command lines, on tiny sizes: what a run says, keeps, refuses and repeats.

Most runs are in this process (`train.main`), which is the command without starting Python; the first test starts it.
Kills, several processes and compiling are in tests/slow/test_train_slow.py.
"""

import csv
import importlib.util
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from block_recurrent_transformer_pytorch import Config, checkpoint, forget_rows  # noqa: E402
from block_recurrent_transformer_pytorch.commands import evaluate, train  # noqa: E402
from block_recurrent_transformer_pytorch.flags import PRESETS, model_config  # noqa: E402
from block_recurrent_transformer_pytorch.footprint import footprint  # noqa: E402

SIZES = [
    *("--dim", "16", "--depth", "2", "--heads", "2", "--dim-head", "8", "--block", "4", "--segment", "16"),
    *("--states", "3", "--batch", "4", "--steps", "6", "--lr", "0.01", "--warmup", "2", "--valid-batches", "2"),
    *("--final-batches", "2", "--valid-every", "3", "--checkpoint-every", "2", "--sample", "0", "--preset", "cpu"),
    *("--device", "cpu"),
]
CPU = torch.device("cpu")
WORDS = ["def", "return", "self", "for", "in", "if", "else", "x", "y", "z", "import", "None", "(", ")", ":", "=", "+"]


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A folder of short documents of many lengths."""
    folder, draw = tmp_path_factory.mktemp("documents"), random.Random(0)
    for number in range(24):
        words = [draw.choice(WORDS) for _ in range(draw.choice([1, 3, 40, 150]))]
        (folder / f"{number:02}.txt").write_text(" ".join([str(number), *words]))
    return folder


@pytest.fixture
def run(documents, tmp_path, capsys, monkeypatch):
    """run("name", "--flag", ...) trains into tmp_path/name and returns (status, what it printed)."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(train, "draw_curve", lambda folder: "curve.png")  # takes longer than the run
    shared = ["--data", str(documents), "--cache", str(tmp_path / "cache")]

    def start(name, *flags, base=SIZES):
        status = train.main([*base, *shared, "--out", str(tmp_path / name), *flags])
        out = capsys.readouterr()
        return status, out.out + out.err

    return start


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in metrics(folder)]


def same_bytes(one, other):
    """The last checkpoints of two runs, file by file; and what they logged."""
    last, same = checkpoint.checkpoints(one / "checkpoints")[-1], checkpoint.checkpoints(other / "checkpoints")[-1]
    assert last.name == same.name
    for file in sorted(path.name for path in last.iterdir()):
        assert (last / file).read_bytes() == (same / file).read_bytes(), file
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Ctrl-C within this step of the next run."""
    whole = train.backward

    def interrupted(run, *rest):
        if run.step == step - 1 and not run.signals:
            os.kill(os.getpid(), number)
        return whole(run, *rest)

    monkeypatch.setattr(train, "backward", interrupted)


# ------------------------------------------------------------------------------------------------------------- a run


def test_the_command_line(documents, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "tiny", "--steps", "4", "--data", str(documents),
               "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--threads", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert "24 documents" in done.stdout and "parameters" in done.stdout and ">>>" in done.stdout
    assert "tokens/s" in done.stderr and "bits/byte" in done.stderr
    final = metrics(tmp_path / "run")[-1]["final_bits_per_byte"]
    assert lines[-1].startswith(f"validation: {final:.4f} bits per byte, over ")
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "no curve.png: matplotlib is not installed" in done.stdout


def test_what_a_run_leaves(run, tmp_path):
    status, text = run("a", "--sample", "5")
    assert status == 0 and "sample" in text
    assert ">>>" in (tmp_path / "a" / "sample.txt").read_text()
    told = json.loads((tmp_path / "a" / "config.json").read_text())
    assert told["options"]["dim"] == 16 and told["model"]["dim"] == 16
    assert told["options"]["precision"] in ("fp32", "bf16")  # what auto was on this machine
    assert told["versions"]["torch"] == torch.__version__ and "commit" in told
    lines = metrics(tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "valid_bits_per_byte" in line] == [3, 6]
    assert [line["step"] for line in lines if "final_bits_per_byte" in line] == [6]
    assert all(line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2)) for line in lines)
    assert len((tmp_path / "a" / "timing.jsonl").read_text().splitlines()) == 6
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "a" / "checkpoints")]
    assert names == ["step-00000002", "step-00000004", "step-00000006"]
    assert not list((tmp_path / "a").glob("*.tmp"))


def test_two_runs_are_equal_and_a_seed_changes_them(run, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run(name, "--seed", seed)
    same_bytes(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_it_learns(run, tmp_path):
    run("a", "--steps", "40", "--valid-every", "40", "--checkpoint-every", "40")
    assert losses(tmp_path / "a")[-1] < losses(tmp_path / "a")[0] - 1.5


def test_what_the_terminal_cannot_show_does_not_end_a_run(run, monkeypatch):
    monkeypatch.setattr(train, "write_sample", lambda run: "caf\u00e9 \ufffd \udcff")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert run("a", "--steps", "1", "--sample", "1")[0] == 0


def test_a_run_that_ends_without_a_finite_loss_says_so(run):
    status, text = run("a", "--lr", "1e30", "--steps", "4", "--schedule", "constant", "--warmup", "0")
    assert status == 0 and "validation: nan bits per byte" in text


def test_a_curve_of_nothing_is_not_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "bits_per_byte": null}\n')
    pytest.importorskip("matplotlib")
    assert train.draw_curve(tmp_path) == "no curve.png: there is no finite loss"
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize(
    "flags", ["", "--set positions=t5", "--precision bf16", "--precision fp64", "--set init=lecun"]
)
def test_a_dry_run_counts_the_activations_that_there_are(flags):
    options = train.parse([*SIZES, "--precision", "fp32", *flags.split()])
    config = model_config(options, 256)
    model = train.BlockRecurrentTransformer(config).to(torch.float64 if options.precision == "fp64" else torch.float32)
    x = torch.zeros(4, options.segment + 1, dtype=torch.long)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    mixed, hooks = train.optim.autocast(options.precision, "cpu"), torch.autograd.graph.saved_tensors_hooks
    with mixed, hooks(pack, lambda tensor: tensor):
        with torch.no_grad():
            _, memories, states = model(x[:, :-1])
        held = model(x, xl_memories=memories, states=states, return_loss=True)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    real = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    del held
    with train.optim.autocast(options.precision, options.device):
        found = footprint(config, 4, options.segment, dtype=train.optim.weight_type(options.precision))
    assert found.activations == pytest.approx(real, rel=0.05)


def test_a_dry_run_writes_nothing(run, tmp_path):
    status, text = run("a", "--dry-run")
    assert status == 0 and not (tmp_path / "a").exists()
    assert all(word in text for word in ("parameters: ", "tokens: ", "memory of activations, in ", "6 steps"))
    model = text[text.index("model: ") : text.index("parameters: ")]
    assert "  dim=16  depth=2" in model and max(map(len, model.splitlines())) < 120


# ------------------------------------------------------------------------------------------------- stop and go on

MODES = {
    "plain": "",
    "dropout": "--set ff_dropout=0.2 --set attn_dropout=0.1 --memory-dropout 0.3 --state-dropout 0.3",
    "accumulated": "--accumulate 2",
    "bptt": "--bptt 2 --step-segments 4",
    "full": "--bptt full --step-segments 3 --set emb_dropout=0.1",
    "replay": "--bptt replay --step-segments 3 --set emb_dropout=0.1 --memory-dropout 0.3 --accumulate 2",
    "adafactor": "--optimizer adafactor --schedule rsqrt",
    "compressed": "--set use_compressed_mem=true --set compressed_mem_factor=2",
    "dynamic": "--set positions=dynamic --set gate=lstm --checkpointing --precision bf16",
}


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_an_interrupted_run_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch, flags):
    run("whole", *flags.split())
    interrupt_at(monkeypatch, 3)
    status, text = run("cut", *flags.split())
    monkeypatch.undo()
    assert status == 130 and f"--resume {tmp_path / 'cut'}" in text
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [1, 2, 3]
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0  # all options come from its folder
    same_bytes(tmp_path / "whole", tmp_path / "cut")


def interrupt_validation_of(monkeypatch, step):
    """Ctrl-C behind the first batch of the validation after this step of the next run."""
    whole = train.to_segments

    def interrupted(run, *rest):
        if not run.segments.training and run.step == step and not run.signals:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(run, *rest)

    monkeypatch.setattr(train, "to_segments", interrupted)


@pytest.mark.parametrize("step", [3, 6])
def test_a_validation_that_was_interrupted_is_done_again(run, tmp_path, monkeypatch, step):
    flags = ["--memory-dropout", "0.3", "--set", "ff_dropout=0.2", "--keep", "1"]
    run("whole", *flags)
    for resume in ((), ("--resume",)):  # the second one too
        with monkeypatch.context() as patch:
            interrupt_validation_of(patch, step)
            status, text = run("cut", *flags, *resume)
        assert status == 130 and f"stopped after step {step} of 6" in text
        lines = metrics(tmp_path / "cut")
        assert [line["step"] for line in lines] == list(range(1, step + 1))
        assert "valid_bits_per_byte" not in lines[-1]
        assert checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")[-1].name == f"step-0000000{step}"
    assert run("cut", *flags, "--resume")[0] == 0
    same_bytes(tmp_path / "whole", tmp_path / "cut")
    best = [checkpoint.best(tmp_path / name / "checkpoints").name for name in ("whole", "cut")]
    assert best[0] == best[1]


@pytest.mark.parametrize(("seconds", "said"), [(0.0, "stopped after step 4 of 6"), (2.0, "stopped at once")])
def test_a_second_signal_ends_a_run_at_once_unless_it_is_the_same_again(run, tmp_path, monkeypatch, seconds, said):
    """A scheduler signals all processes, and torchrun passes on what it gets."""
    whole, clock = train.backward, train.time.monotonic

    def interrupted(run, *rest):
        if run.step == 3 and not run.signals:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(train.time, "monotonic", lambda: clock() + seconds)
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(run, *rest)

    monkeypatch.setattr(train, "backward", interrupted)
    status, text = run("a")
    assert said in text and status == (143 if seconds == 0 else 130)
    last = checkpoint.checkpoints(tmp_path / "a" / "checkpoints")[-1]
    assert last.name == ("step-00000004" if seconds == 0 else "step-00000002")


def test_without_a_checkpoint_a_run_begins_anew(run, tmp_path):
    run("whole")
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    (tmp_path / "cut" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    (tmp_path / "cut" / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')
    status, text = run("cut", "--resume")
    assert status == 0 and "no checkpoint yet" in text
    same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_a_run_whose_checkpoints_are_gone_keeps_its_log(run, tmp_path):
    run("a")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    status, text = run("a", "--resume")
    assert status == 2 and f"--resume {tmp_path / 'a'}: its checkpoints/ is missing" in text
    (tmp_path / "a" / "checkpoints").write_text("no folder")
    status, text = run("a", "--resume")
    assert status == 2 and "its checkpoints/ is missing" in text
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_no_run(run, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear")
    status, text = run("letters", "--resume")
    assert status == 2 and "no config.json" in text
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["mother.txt"]


def test_a_damaged_checkpoint_is_named_once_and_the_one_before_used(run, tmp_path, caplog):
    run("whole")
    run("cut", "--steps", "6")
    last = tmp_path / "cut" / "checkpoints" / "step-00000006" / "model.safetensors"
    last.write_bytes(last.read_bytes()[:-7])
    status, text = run("cut", "--resume")
    assert status == 0 and "damaged" in text and text.count(str(last)) == 1 and "after step 4" in text
    assert str(last) not in caplog.text  # which the terminal would show as well
    same_bytes(tmp_path / "whole", tmp_path / "cut")


def forge(folder, edit):
    """Changes the content of a run's last checkpoint, and its digest too."""
    forge_at(checkpoint.checkpoints(folder / "checkpoints")[-1], edit)


def forge_at(path, edit):
    file = path / checkpoint.MANIFEST
    content = json.loads(file.read_text())["content"]
    edit(content)
    file.write_text(json.dumps({"sha256": checkpoint._content_digest(content), "content": content}))


def put(content, *path, value):
    """Sets what stands at a path of the content of a checkpoint, or removes it where the value is `Ellipsis`."""
    *way, last = (int(key) if key.isdigit() else key for key in path)
    for key in way:
        content = content[key]
    if value is ...:
        del content[last]
    else:
        content[last] = value


UNUSABLE = {  # a checkpoint whose digests are right: where, what, and what is said of it
    "no metadata": ("metadata", {}, "KeyError: 'model_config'"),
    "another text": ("metadata/stream/corpus", "x", "another text"),
    "another version of numpy's state": ("metadata/rng/0/numpy", {}, "random number generators"),
    "a parameter is missing": ("trees/model/norm.weight", ..., "['norm.weight'] are missing"),
    "another shape": ("trees/model/norm.weight", {"$tensor": "token_emb.weight"}, "(256, 16) instead of"),
    "a class of its own": ("trees/model", {"$namedtuple": ["Popen", {"args": "id"}]}, "Popen"),
    "another optimizer's state": ("trees/optimizer/norm.weight", ..., "that of other parameters: ['norm.weight']"),
    "too few rows": ("metadata/stream/batch", 3, "--batch 4"),
    "another step": ("step", 7, "step 7 in a folder"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_checkpoint_that_cannot_be_used_is_named_and_the_one_before_taken(run, tmp_path, name):
    run("whole", "--steps", "4")
    run("cut", "--steps", "4")
    path, value, said = UNUSABLE[name]
    forge(tmp_path / "cut", lambda content: put(content, *path.split("/"), value=value))
    status, text = run("cut", "--steps", "4", "--resume")
    last = tmp_path / "cut" / "checkpoints" / "step-00000004"
    assert status == 0 and f"passed over a damaged checkpoint: {last}" in text and said in text, text
    assert "going on after step 2 of 4" in text
    same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_a_run_goes_on_from_behind_a_forged_checkpoint_and_ends_where_all_are_forged(run, tmp_path):
    run("whole")
    run("cut")
    forge(tmp_path / "cut", lambda content: put(content, "trees", "optimizer", "norm.weight", value=...))
    status, text = run("cut", "--resume")
    assert status == 0 and "after step 4" in text
    same_bytes(tmp_path / "whole", tmp_path / "cut")
    for path in checkpoint.checkpoints(tmp_path / "cut" / "checkpoints"):
        forge_at(path, lambda content: put(content, "metadata", "skipped", value=None))
    before = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    status, text = run("cut", "--resume")
    last = text.splitlines()[-1]
    assert status == 2 and "Traceback" not in text and "can be used: " in last
    assert all(f"step-0000000{step}: it is not as train.py writes it: TypeError" in last for step in (2, 4, 6))
    assert before == {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}


def test_an_unreadable_tensor_file_with_the_right_digest_is_passed_over_and_replaced(run, tmp_path):
    run("whole")
    run("cut")
    file = tmp_path / "cut" / "checkpoints" / "step-00000006" / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + b"no header is that long")
    facts = {"size": file.stat().st_size, "sha256": checkpoint._file_digest(file)}
    forge(tmp_path / "cut", lambda content: content["files"].update({file.name: facts}))
    status, text = run("cut", "--resume")
    assert status == 0 and str(file) in text and "after step 4" in text
    same_bytes(tmp_path / "whole", tmp_path / "cut")


GOLDEN = ROOT / "tests" / "golden" / "run_1_0_0"


@pytest.fixture
def recorded(tmp_path):
    """A run of version 1.0.0 after step 8, and flags to go on with it."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    flags = ["--data", str(GOLDEN / "texts.jsonl"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    return tmp_path / "run", flags


def test_a_run_of_the_version_before_goes_on_as_it_would_have(recorded, capsys):
    folder, flags = recorded
    expected = json.loads((folder / "expected.json").read_text())
    assert train.main(["--resume", str(folder), "--steps", "12", *flags]) == 0
    assert "going on after step 8 of 12" in capsys.readouterr().out
    lines = metrics(folder)
    assert [line["loss"] for line in lines[8:]] == pytest.approx(expected["loss"], rel=1e-5)
    assert lines[-1]["final_bits_per_byte"] == pytest.approx(expected["valid_bits_per_byte"]["12"], rel=1e-5)
    names = [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]
    assert names[-1] == "step-00000012" and checkpoint.load(folder / "checkpoints" / names[-1], only=[]).format == 2


def test_a_run_of_the_version_before_that_was_stopped_in_its_validation(recorded):
    folder, flags = recorded
    whole = metrics(folder)
    told = {name: value for name, value in whole[-1].items() if name != "valid_bits_per_byte"}
    forge(folder, lambda content: (content["metadata"].update(told=told), content.update(metric=None)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole[:-1]))
    assert train.main(["--resume", str(folder), "--steps", "8", *flags]) == 0
    line, expected = metrics(folder)[-1], json.loads((folder / "expected.json").read_text())
    assert {name: line[name] for name in told} == told
    assert line["final_bits_per_byte"] == pytest.approx(expected["valid_bits_per_byte"]["8"], rel=1e-5)
    assert checkpoint.best(folder / "checkpoints").name == "step-00000008"


def test_a_run_of_the_version_before_is_evaluated(recorded, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)
    folder, (_, path, *_) = recorded
    assert evaluate.main([str(folder), "--data", path]) == 0
    assert "step-00000008, step 8" in capsys.readouterr().out


def test_the_layout_of_the_version_before_becomes_the_new_one():
    content = json.loads((GOLDEN / "checkpoints" / "step-00000008" / "checkpoint.json").read_text())["content"]
    old = content["trees"]["carried"]
    ((_, (memories, states)),) = train.distributed.upgrade(1, old)[0].items()
    (name, fields), (_, of_states) = memories["$namedtuple"], states["$namedtuple"]
    assert name == "Memories" and fields.keys() == {"layers", "position"}
    name, position = fields["position"]["$namedtuple"]
    assert name == "Position" and position == {
        "offset": 0, "full_blocks": 2, "extra_blocks": {"$tensor": "0/0/ahead"}, "known": None
    }  # fmt: skip
    name, layer = fields["layers"]["$tuple"][0]["$namedtuple"]
    assert name == "LayerMemory" and layer.keys() == {"block", "past", "ready"} and layer["ready"] is None
    assert layer["past"].keys() == {"xl", "compressed"} and of_states.keys() == {"layers", "kv"}


def test_a_full_disk_costs_a_checkpoint_not_the_run(run, tmp_path, monkeypatch):
    run("whole")
    whole = checkpoint.save

    def full(folder, *, step, **rest):
        if step == 4:
            raise OSError(28, "No space left on device")
        return whole(folder, step=step, **rest)

    monkeypatch.setattr(checkpoint, "save", full)
    status, text = run("full")
    assert status == 0 and "checkpoint of step 4 could not be written" in text and "No space left" in text
    same_bytes(tmp_path / "whole", tmp_path / "full")


def test_a_run_is_made_longer(run, tmp_path):
    run("a", "--schedule", "constant")
    status, text = run("a", "--schedule", "constant", "--resume", "--steps", "8")
    assert status == 0 and [line["step"] for line in metrics(tmp_path / "a")] == list(range(1, 9))
    assert [line["step"] for line in metrics(tmp_path / "a") if "final_bits_per_byte" in line] == [8]


# ---------------------------------------------------------------------------------------- beginning with other weights


@pytest.fixture
def other_text(tmp_path):
    (tmp_path / "other.txt").write_text("In the beginning was the word, and it was short. " * 60)
    return str(tmp_path / "other.txt")


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_init_takes_weights_and_sizes_and_nothing_else(run, tmp_path, other_text, kind):
    run("a", "--set", "gate=lstm", "--recurrent-layers", "2")
    if kind == "folder":
        train.BlockRecurrentTransformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "folder")
    source = str(tmp_path / ("a" if kind == "run" else "folder"))
    few = ["--device", "cpu", "--preset", "tiny", "--steps", "1", "--lr", "0", "--sample", "0"]
    status, text = run("b", "--init", source, "--data", other_text, base=few)
    assert status == 0 and f"weights: from {source}" in text, text
    told = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("a", "b")]
    assert told[0]["model"] == told[1]["model"] and told[1]["options"]["init"] == source
    old = checkpoint.load(checkpoint.best(tmp_path / "a" / "checkpoints"), only=["model"]).tensors["model"]
    saved = checkpoint.load_latest(tmp_path / "b" / "checkpoints", only=["model"])
    assert saved.step == 1 and all(torch.equal(old[name], new) for name, new in saved.tensors["model"].items())


def test_a_run_from_other_weights_goes_on_without_them(run, tmp_path, other_text, monkeypatch):
    run("a")
    flags = ["--init", str(tmp_path / "a"), "--data", other_text]
    run("whole", *flags)
    assert losses(tmp_path / "whole")[0] < losses(tmp_path / "a")[0]
    interrupt_at(monkeypatch, 3)
    assert run("cut", *flags)[0] == 130
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "a")
    assert train.main(["--resume", str(tmp_path / "cut"), "--device", "cpu"]) == 0
    same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_what_init_refuses_and_what_it_changes(run, tmp_path, capsys, other_text):
    run("a")
    source = str(tmp_path / "a")
    status, text = run("b", "--init", source, "--dim", "24")
    assert status == 2 and "its weights do not fit, this model has dim=24 instead of 16" in text
    assert "to go on with a run there is --resume" in text
    with pytest.raises(SystemExit):
        train.parse(["--init", source, "--resume", source])
    assert "--resume goes on with one: give only one of them" in capsys.readouterr().err
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        train.parse(["--init", str(tmp_path / "odd")])
    assert "config.json holds no model" in capsys.readouterr().err
    status, text = run("c", "--init", source, "--set", "qk_norm_scale=4", "--steps", "1")  # changes no weight
    assert status == 0 and "but with qk_norm_scale=4 instead of 8.0" in text
    status, text = run("a", "--resume", "--data", other_text)
    assert status == 2 and f"to train its weights on this one: --init {source} --out NEW" in text


# ---------------------------------------------------------------------------------------------- what is validated, how


def test_validation_text_of_its_own(run, tmp_path, documents, other_text, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)
    status, text = run("a", "--valid", other_text)
    assert status == 0 and f"for validation {other_text}: 1 documents, 2,940 bytes" in text and "no test part" in text
    assert f"{sum(path.stat().st_size for path in documents.iterdir()):,} training tokens" in text
    assert evaluate.main([str(tmp_path / "a")]) == 0
    assert f"{other_text}, valid: 1 documents, 2,940 bytes" in capsys.readouterr().out
    assert evaluate.main([str(tmp_path / "a"), "--split", "test"]) == 2
    assert "has no test text" in capsys.readouterr().err


def test_the_split_is_printed_and_chosen(run, tmp_path):
    for number in range(3):
        (tmp_path / f"book{number}.txt").write_text(f"It was the night {number}. " * 200)
    status, text = run("a", "--data", str(tmp_path / "book*.txt"))
    assert status == 0 and "each of the 3 documents is cut, its last tenth is held out" in text
    status, text = run("b", "--data", str(tmp_path / "book*.txt"), "--split", "documents")
    assert status == 0 and "1 and 1 whole documents are held out" in text


def test_validation_while_training_is_spread_and_the_final_figure_is_another(run, tmp_path, monkeypatch):
    (tmp_path / "two.txt").write_bytes(b"ab" * 400)
    whole, read = train.measure, []
    monkeypatch.setattr(train, "measure", lambda run, corpus: read.append(corpus) or whole(run, corpus))
    flags = ["--valid", str(tmp_path / "two.txt"), "--valid-batches", "3", "--final-batches", "0"]
    status, text = run("a", *flags)
    assert status == 0 and text.count("bits per byte, over 192 evenly spaced tokens of 800") == 2
    assert text.count("bits per byte, over the whole validation text") == 2 and "final validation, another" in text
    assert [corpus.total_tokens for corpus in read] == [192, 192, 800]  # steps 3 and 6, and all of it
    assert read[0] is read[1] and read[0].num_documents == 4
    third, last = metrics(tmp_path / "a")[2], metrics(tmp_path / "a")[-1]
    assert "final_bits_per_byte" not in third and last["final_bits_per_byte"] != last["valid_bits_per_byte"]
    best = checkpoint.load(checkpoint.best(tmp_path / "a" / "checkpoints"), only=[])
    assert best.metric == last["valid_bits_per_byte"]  # never the other measure


def test_the_curve_marks_the_final_figure(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    lines = [{"step": step, "bits_per_byte": 8.0 / step} for step in (1, 2, 3)]
    lines[1]["valid_bits_per_byte"] = 4.5
    lines[2] |= {"valid_bits_per_byte": 4.0, "final_bits_per_byte": 5.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train.draw_curve(tmp_path) == "curve.png"
    curves = {line.get_label(): list(map(tuple, line.get_xydata())) for line in drawn[0].axes[0].lines}
    assert curves["validation, the same sample each time"] == [(2, 4.5), (3, 4.0)]
    assert curves["validation, the whole split"] == [(3, 5.0)]


def test_a_run_without_matplotlib_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in train.draw_curve(tmp_path)


def test_many_epochs_are_a_warning(run, tmp_path):
    (tmp_path / "short.txt").write_text("twelve bytes")
    status, text = run("a", "--data", str(tmp_path / "short.txt"), "--steps", "12")
    assert status == 0 and "warning: 12 steps read the 10 training tokens 77 times" in text


# ------------------------------------------------------------------------------------------- what a step computes


def test_states_that_are_reset_every_block_carry_nothing(run, tmp_path):
    options = train.parse([*SIZES, "--reset-states-every-block"])
    torch.manual_seed(0)
    model = train.BlockRecurrentTransformer(model_config(options, 256)).double()
    segments = train.Segments(model, options, torch.Generator())
    x, no = torch.randint(256, (4, 33)), torch.zeros(4, dtype=torch.bool)
    parts = [train.Segment(x[:, start : start + 17], None, None, no) for start in (0, 16)]
    loss, memories, states = segments(parts, None, None)
    nats, carried = 0.0, None
    for start in range(0, 32, 4):
        mean, carried, _ = model(x[:, start : start + 5], xl_memories=carried, return_loss=True)
        nats = nats + 16 * mean
    assert loss.item() == pytest.approx(nats.item(), rel=1e-12)
    again = segments(parts[1:], memories, states)[0]
    noise = train.States(tuple(torch.randn_like(state) for state in states.layers))
    assert torch.equal(segments(parts[1:], memories, noise)[0], again)
    plain = train.Segments(model, train.parse(SIZES), torch.Generator())
    assert plain(parts, None, None)[0].item() != pytest.approx(loss.item(), rel=1e-6)
    assert not torch.equal(plain(parts[1:], memories, noise)[0], plain(parts[1:], memories, states)[0])


def test_states_whose_writing_is_not_trained_are_a_note(run):
    noted = "writing is not trained"
    assert noted in run("a", "--segment", "4", "--steps", "1")[1]
    assert noted not in run("b", "--segment", "4", "--steps", "1", "--bptt", "2")[1]
    assert noted not in run("c", "--segment", "4", "--steps", "1", "--bptt", "replay")[1]


def test_a_control_run(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)
    flags = ["--reset-states-every-block", "--precision", "fp64", "--sample", "5"]
    status, text = run("a", *flags)
    assert status == 0 and "this run is a control" in text and "no sample.txt" in text
    run("b", *flags, "--bptt", "full", "--step-segments", "2", "--steps", "3")
    run("c", *flags, "--bptt", "replay", "--step-segments", "2", "--steps", "3")
    assert losses(tmp_path / "c") == pytest.approx(losses(tmp_path / "b"), rel=1e-10)
    assert evaluate.main([str(tmp_path / "a")]) == 0
    assert '"state reset" is its figure' in capsys.readouterr().out


def test_accumulation_changes_nothing(run, tmp_path):
    for parts in ("1", "2", "4"):
        run(parts, "--accumulate", parts, "--precision", "fp64")
    for parts in ("2", "4"):
        assert losses(tmp_path / parts) == pytest.approx(losses(tmp_path / "1"), rel=1e-9)


def test_replay_is_full_back_propagation_and_truncation_is_not(run, tmp_path):
    for name, depth in (("full", "full"), ("replay", "replay"), ("short", "1")):
        run(name, "--bptt", depth, "--step-segments", "4", "--precision", "fp64")
    assert losses(tmp_path / "replay") == pytest.approx(losses(tmp_path / "full"), rel=1e-10)
    norms = [[line["grad_norm"] for line in metrics(tmp_path / name)] for name in ("full", "replay", "short")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-9)
    assert losses(tmp_path / "short")[0] == losses(tmp_path / "full")[0] and norms[2][0] != pytest.approx(norms[0][0])


def test_activation_checkpointing_changes_nothing(run, tmp_path):
    run("a", "--precision", "fp64")
    run("b", "--precision", "fp64", "--checkpointing")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "rsqrt"])
def test_schedules(run, tmp_path, schedule):
    run("a", "--schedule", schedule, "--lr-end", "0.2")
    rates = [line["lr"] for line in metrics(tmp_path / "a")]
    expected = train.optim.schedule(schedule, base=0.01, max_steps=6, warmup=2, end=0.2)
    assert rates == [expected(step) for step in range(1, 7)]


def test_every_option_changes_the_losses(run, tmp_path):
    options = [
        "", "--clip 0.01", "--weight-decay 5", "--betas 0.5 0.6", "--memory-dropout 0.9", "--state-dropout 0.9",
        "--lr-end 1", "--warmup 6", "--optimizer adafactor", "--precision fp16", "--precision bf16", "--set gate=lstm",
        "--recurrent-layers 2", "--states 5", "--schedule linear", "--lr 0.02", "--heads 4", "--dim-head 4",
    ]  # fmt: skip
    seen = set()
    for number, flags in enumerate(options):
        status, _ = run(str(number), "--steps", "3", "--precision", "fp32", *flags.split())
        assert status == 0 and all(math.isfinite(loss) for loss in losses(tmp_path / str(number))), flags
        seen.add(tuple(losses(tmp_path / str(number))))
        assert len(seen) == number + 1, flags


def test_a_step_asks_the_other_processes_twice_however_many_segments_it_has(run, monkeypatch):
    """Before the first segment and after the last; signals and resets are learned in passing."""
    whole, places = train.Processes.sum, []
    monkeypatch.setattr(train.Processes, "sum", lambda self, *values: places.append(1) or whole(self, *values))
    run("a", "--step-segments", "4", "--accumulate", "2", "--steps", "3", "--valid-every", "3", "--valid-batches", "1")
    training = 2 * 3
    validation = len(places) - training
    places.clear()
    run("b", "--step-segments", "8", "--accumulate", "4", "--steps", "3", "--valid-every", "3", "--valid-batches", "1")
    assert len(places) == training + validation


def test_a_step_without_finite_gradient_is_skipped_and_counted(run, tmp_path, monkeypatch):
    whole, seen = train.backward, []

    def poisoned(run, part, segments, weight):
        seen.append([parameter.detach().clone() for parameter in run.model.parameters()])
        nats = whole(run, part, segments, weight)
        if run.step == 2:
            next(run.model.parameters()).grad[0, 0] = math.nan
        return nats

    monkeypatch.setattr(train, "backward", poisoned)
    status, text = run("a")
    assert status == 0 and "1 steps skipped" in text
    assert [line["skipped"] for line in metrics(tmp_path / "a")] == [0, 0, 1, 1, 1, 1]
    assert metrics(tmp_path / "a")[2]["grad_norm"] is None
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3]))  # the third step moved nothing
    assert not all(torch.equal(a, b) for a, b in zip(seen[3], seen[4]))


def test_carried_values_that_are_not_finite_are_dropped(run, tmp_path, monkeypatch):
    whole = train.backward

    def poisoned(run, part, segments, weight):
        nats = whole(run, part, segments, weight)
        if run.step == 2:
            next(run.model.parameters()).grad[0, 0] = math.nan
            memories, states = run.carried[part]
            states.layers[0][0] = math.nan
        return nats

    monkeypatch.setattr(train, "backward", poisoned)
    run("a")
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "a"))
    assert metrics(tmp_path / "a")[-1]["skipped"] == 1


def test_a_run_without_any_finite_gradient_ends(run, monkeypatch):
    monkeypatch.setattr(train, "LONGEST_SKIP", 3)
    monkeypatch.setattr(train, "backward", lambda run, part, segments, weight: torch.tensor(math.nan))
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda parameters, norm: torch.tensor(math.nan))
    status, text = run("a")
    assert status == 1 and "3 steps in a row had no finite gradient" in text and "--lr 0.01" in text


def test_loss_scale():
    scale = train.optim.LossScale(True)
    scale.update(False)
    assert scale.value == 2.0**15
    for _ in range(2000):
        scale.update(True)
    assert scale.value == 2.0**16 and scale.streak == 2000
    off = train.optim.LossScale(False)
    off.update(False)
    assert off.value == 1.0


# ------------------------------------------------------------------------------------------------- data and options


def test_jsonl(run, tmp_path):
    lines = [json.dumps({"id": n, "body": f"document {n} " * (n % 5 + 1)}) for n in range(30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    status, text = run("a", "--data", str(tmp_path / "texts.jsonl"), "--text-field", "body")
    assert status == 0 and "30 documents" in text
    status, text = run("b", "--data", str(tmp_path / "texts.jsonl"))
    assert status == 2 and "text_field='text'" in text


def test_one_file_becomes_many_rows(run, tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 400)
    status, text = run("a", "--data", str(tmp_path / "book.txt"))
    assert status == 0 and "1 documents, 12,800 bytes" in text
    assert all(line["targets"] == 64 for line in metrics(tmp_path / "a"))  # no row is idle


def test_tokenizer(run, tmp_path, documents):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(["?", *WORDS])}, "?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    status, text = run("a", "--tokenizer", str(tmp_path / "tokenizer.json"))
    line = metrics(tmp_path / "a")[0]
    assert status == 0 and line["bits_per_byte"] < line["loss"] / math.log(2)  # a token has more than a byte
    assert "warning: the tokenizer loses text" in text and "comes back as '?" in text


def test_automatic_data_says_so(monkeypatch, capsys):
    monkeypatch.setattr(train.data, "find_enwik8", lambda: None)
    monkeypatch.setattr(train.data, "download_enwik8", lambda: None)
    assert train.data.choose() == "stdlib" and "enwik8 is not in data/" in capsys.readouterr().out
    monkeypatch.setattr(train.data, "find_enwik8", lambda: Path("data/enwik8.gz"))
    assert train.data.choose() == "enwik8"


def test_options_come_from_presets_files_and_flags(tmp_path):
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"preset": "tiny", "dim": 24, "steps": 7, "set": {"gate": "lstm"}, "betas": [0.8, 0.9]}))
    options = train.parse(["--config", str(file), "--steps", "9", "--set", "num_xl_blocks=2"])
    assert (options.preset, options.dim, options.steps, options.depth) == ("tiny", 24, 9, 2)
    assert options.set == {"gate": "lstm", "num_xl_blocks": 2} and options.betas == [0.8, 0.9]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build(preset):
    options = train.parse(["--preset", preset])
    config = model_config(options, 256)
    assert config.block_width == options.block and config.dim == options.dim
    assert options.batch % options.accumulate == 0


def test_the_options_of_a_run_are_a_config_file(run, tmp_path):
    run("a")
    again = ["--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")]
    assert train.main(again) == 0
    same_bytes(tmp_path / "a", tmp_path / "b")


REFUSED = {
    "--segment 15": "--segment 15 is not a multiple of --block 4",
    "--batch 3 --accumulate 2": "--batch 3 cannot be divided into --accumulate 2",
    "--bptt 2 --step-segments 3": "--step-segments 3 is not a multiple of --bptt 2",
    "--bptt some": "--bptt: 'some' is neither a number of segments nor full or replay",
    "--steps 0": "--steps: 0 is not at least 1",
    "--lr nan": "--lr: 'nan' is not a number of at least 0",
    "--lr abc": "--lr: 'abc' is not a number of at least 0",
    "--steps many": "--steps: 'many' is not a whole number",
    "--memory-dropout 2": "--memory-dropout 2.0 is above 1",
    "--betas 0.9 1": "must be below 1",
    "--set dim=3": "--set dim: --dim instead",
    "--set num_tokens=3": "--set num_tokens: --vocabulary instead",
    "--set gaet=lstm": "--set gaet: the model has no such option; did you mean gate?",
    "--set positions=xpso": "positions='xpso' must be one of 'xpos', 'rotary', 'dynamic', 't5', 'none'",
    "--set num_xl_blocks=two": "num_xl_blocks='two'",
    "--set dim": "--set: 'dim' is not NAME=VALUE",
    "--set colour=3": "colour",
    "--set gate=gru": "gate",
    "--recurrent-layers 3": "recurrent_layers",
    "--data nowhere": "nowhere",
    "--config nowhere.json": "--config: nowhere.json",
    "--resume nowhere": "--resume nowhere",
    "--optimizer sgd": "--optimizer",
    "--device nothing": "nothing",
    "--seed 9223372036854775808": "--seed: 9223372036854775808 must be below 2^63",
    "--batch 9223372036854775807": "--batch 9223372036854775807 is more than the",
    "--dim 4611686018427387904": "--dim 4611686018427387904 --depth 2 --set {",
    "--set ff_dim=99999999999999999999": "'ff_dim': 99999999999999999999}: the model cannot be built",
    f"--cache {__file__}": f"cache: {__file__} is no folder",
    f"--data {'x' * 300}": f"data: cannot read {'x' * 200}: File name too long",
    "--resume . --out elsewhere": "--resume .: the run goes on in its folder",
    f"--out {__file__}": f"--out {__file__} is no folder",
    f"--out {__file__}/run": f"--out {__file__}/run cannot be written to: Not a directory",
    "--init nowhere": "--init nowhere: its config.json cannot be read",
    "--valid nowhere": "'nowhere' is no file",
    "--split thirds": "--split",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(run, tmp_path, capsys, flags):
    try:
        status, text = run("a", *flags.split())
    except SystemExit as end:  # argparse
        status, text = end.code, capsys.readouterr().err
    assert status and REFUSED[flags] in text, text
    assert "Traceback" not in text and not (tmp_path / "a" / "checkpoints").exists()


CONFIGS = {
    '{"colour": 3}': "unknown option 'colour'",
    '{"config": "other.json"}': "unknown option 'config'",
    '{"set": [1]}': "gives no JSON object for set",
    '{"set": {"gate": 3}}': "gate=3",
    '{"steps": {"a": 1}}': "--steps",
    "[1]": "not a JSON object",
    '{"options": 3}': "not a JSON object",
    "[" * 100_000: "cannot be read",
    '{"resume": "nowhere"}': "--resume nowhere",
}


@pytest.mark.parametrize("content", CONFIGS, ids=range(len(CONFIGS)))
def test_config_files_that_are_refused(tmp_path, capsys, content):
    (tmp_path / "my.json").write_text(content)
    with pytest.raises(SystemExit):
        train.parse(["--config", str(tmp_path / "my.json"), "--preset", "tiny"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and CONFIGS[content] in lines[1]  # the usage, and what is wrong


def test_help_says_what_presets_hold(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "tiny: --dim 32 --depth 2" in text and "--set all_layers_qk_rmsnorm=true" in text
    assert all(f"{name}: --" in text for name in PRESETS)


def test_another_optimizer_than_the_preset_needs_a_rate(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--preset", "paper-150m", "--optimizer", "adamw"])
    assert "give --lr too" in capsys.readouterr().err
    assert train.parse(["--preset", "paper-150m", "--optimizer", "adamw", "--lr=2e-4"]).lr == 2e-4


def test_the_folder_of_a_run_may_come_from_a_config_file(tmp_path):
    (tmp_path / "my.json").write_text(json.dumps({"out": str(tmp_path / "there")}))
    assert train.parse(["--config", str(tmp_path / "my.json")]).out == str(tmp_path / "there")


def test_a_run_never_overwrites_another(run, tmp_path):
    run("a")
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    status, text = run("a")
    assert status == 2 and "is not empty" in text and "--resume" in text
    with train.runs.locked(tmp_path / "a", train.Processes(0, 1, torch.device("cpu"))):
        status, text = run("a", "--resume")
    assert status == 2 and "in use" in text
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before


OTHERS = {
    "--dim 24": "other sizes", "--batch 2": "--batch 2: the run", "--seed 5": "--seed 5: the run",
    "--segment 8": "--segment 8: the run", "--optimizer adafactor": "--optimizer adafactor: the run",
    "--precision fp64": "--precision fp64 keeps weights in torch.float64", f"--data {__file__}": "--init ",
}  # fmt: skip


def test_dropout_may_change_when_a_run_goes_on(run):
    run("a")
    assert run("a", "--resume", "--steps", "7", "--set", "ff_dropout=0.2")[0] == 0


def test_resuming_with_another_model_or_stream_is_refused(run):
    run("a")
    for flags, words in OTHERS.items():
        status, text = run("a", "--resume", "--steps", "8", *flags.split())
        assert status == 2 and words in text, text


def test_a_run_whose_log_is_lost_goes_on(run, tmp_path):
    run("a")
    (tmp_path / "a" / "metrics.jsonl").unlink()
    status, text = run("a", "--resume")
    assert status == 0 and "validation: nan" not in text  # it is measured again
    (tmp_path / "a" / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert run("a", "--resume", "--steps", "8")[0] == 0
    assert [line["step"] for line in metrics(tmp_path / "a")] == [6, 7, 8]


# -------------------------------------------------------------------------------------------------- several processes


def test_only_the_first_process_copies_what_a_checkpoint_holds():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    names, first, second = dict(model.named_parameters()), *(train.Processes(rank, 2, CPU) for rank in (0, 1))
    assert train.distributed.full_state(model, second) == {}
    assert train.distributed.optimizer_state(names, optimizer, second) == {}
    kept = train.distributed.full_state(model, first)
    assert torch.equal(kept["weight"], model.weight) and kept["weight"].data_ptr() != model.weight.data_ptr()
    assert train.distributed.optimizer_state(names, optimizer, first).keys() == names.keys()


def test_rows_are_redistributed_in_order():
    torch.manual_seed(0)
    options = train.parse([*SIZES, "--set", "use_compressed_mem=true", "--set", "compressed_mem_factor=4"])
    model = train.BlockRecurrentTransformer(model_config(options, 256)).eval()
    x, forget = torch.randint(256, (4, 16)), torch.tensor([True, False, False, True])
    _, memories, states = model(x)
    _, memories, states = model(x[:, :4], xl_memories=forget_rows(memories, forget), states=states)
    halves = train.distributed.redistribute([(memories, states)], 4, 2)
    assert train.distributed.redistribute(halves, 4, 2) is halves
    (whole,) = train.distributed.redistribute(halves, 4, 1)
    logits = [model(x[:, :3], xl_memories=m, states=s)[0] for m, s in ((memories, states), whole)]
    assert torch.equal(*logits)
    for half, (m, s) in zip((slice(0, 2), slice(2, 4)), halves):
        assert torch.allclose(model(x[half, :3], xl_memories=m, states=s)[0], logits[0][half], atol=1e-6)
    assert train.distributed.redistribute([(None, None)], 4, 2) == [(None, None)] * 2
    with pytest.raises(ValueError, match=r"memories and states are of \[2, 2\] rows, must be of 6"):
        train.distributed.redistribute(halves, 6, 2)


@pytest.mark.parametrize(("parallel", "option"), [("fsdp", "block_feedback=true"), ("ddp", "block_feedback=true"),
                                                  ("fsdp", "gate=lstm")])  # fmt: skip
def test_fsdp_says_where_it_gathers_layers_once_a_block(tmp_path, capsys, parallel, option):
    flags = ["--parallel", parallel, "--set", option, "--recurrent-layers", "2"]
    options = train.parse([*SIZES, *flags, "--out", str(tmp_path)])
    model = train.BlockRecurrentTransformer(model_config(options, 256))
    corpus = train.data.Corpus.from_tokens([[1, 2, 3]])
    run = SimpleNamespace(options=options, processes=train.Processes(0, 2, CPU), model=model, train=corpus,
                          valid=corpus, tokens_per_step=64, folder=tmp_path,
                          wrapper=train.RecurrentTrainWrapper(model))  # fmt: skip
    train.describe(run)
    noted = "FSDP gathers each of them once a block" in capsys.readouterr().out
    assert noted == (parallel == "fsdp" and option == "block_feedback=true")


# --------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation(run, tmp_path, documents, capsys):
    pytest.importorskip("matplotlib")
    run("a", "--precision", "fp64")
    options = ["--split", "all", "--rows", "5", "--data", str(documents), "--documents", "12"]
    assert evaluate.main([str(tmp_path / "a"), *options]) == 0
    text, out = capsys.readouterr().out, tmp_path / "a" / "evaluation"
    assert "not what it is worth" in text and "not what it is worth" in (out / "table.txt").read_text()
    assert all(way in text for way in evaluate.WAYS) and (out / "positions.png").read_bytes().startswith(b"\x89PNG")
    model = evaluate.load_model(tmp_path / "a", "best", "cpu")
    with (out / "documents.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows[:6]:
        expected = alone(model, Path(row["document"]).read_bytes())
        found = [float(row[f"{way.replace(' ', '_')}_bits_per_byte"]) for way in evaluate.WAYS]
        assert found == pytest.approx(expected, abs=2e-6)
        assert float(row["carried_low"]) <= found[0] + 1e-6 and found[0] <= float(row["carried_high"]) + 1e-6
    with (out / "positions.csv").open() as file:
        positions = list(csv.DictReader(file))
    assert [int(row["from"]) for row in positions[:3]] == [0, 64, 128]
    total = sum(int(row["bytes"]) for row in positions)
    assert total == sum(int(row["bytes"]) for row in rows)


def test_evaluation_writes_a_page(run, tmp_path, documents, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)
    run("a")
    page, folder = tmp_path / "a" / "evaluation" / "report.html", str(tmp_path / "a")
    assert evaluate.main([folder, "--no-report"]) == 0 and not page.exists()
    assert evaluate.main([folder, "--split", "all", "--report-tokens", "30"]) == 0
    facts = json.loads(page.read_text().partition('id="data-facts">')[2].partition("</script>")[0])
    assert facts["tokens"] == 30 and facts["title"] == "a, all" and "not what it is worth" in facts["note"]
    with (page.parent / "positions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row[3] for row in facts["positions"]] == pytest.approx([float(row["carried"]) for row in rows], rel=1e-3)
    assert facts["documents"][0] == ["00.txt", 0]
    page.unlink()
    diverged = {"carried": np.full(30, np.nan)}
    write = evaluate.report.write
    monkeypatch.setattr(evaluate.report, "write", lambda *args, **more: write(*args[:4], args[4] | diverged, *args[5:]))
    assert evaluate.main([folder, "--report-tokens", "30"]) == 0 and not page.exists()
    assert "no report: the losses hold 30 tokens that are not finite" in capsys.readouterr().err


@torch.no_grad()
def alone(model, text):
    """Bits per byte of one document in each of the four ways, block by block."""
    x, width, found = torch.tensor([[0, *text]]), model.config.block_width, []
    for keeps_states, keeps_memories in evaluate.WAYS.values():
        memories = states = None
        nats = 0.0
        for start in range(0, len(text), width):
            part = x[:, start : start + width + 1]
            loss, memories, states = model(part, xl_memories=memories, states=states, return_loss=True)
            nats += float(loss) * (part.shape[1] - 1)
            memories, states = memories if keeps_memories else None, states if keeps_states else None
        found.append(nats / math.log(2) / len(text))
    return found


VARIANTS = {
    "default": {},
    "compressed": {"use_compressed_mem": True, "compressed_mem_factor": 2, "num_xl_blocks": 2},
    "enhanced": {"enhanced_recurrence": True},
    "feedback": {"block_feedback": True, "positions": "dynamic", "dynamic_log_distance": False},
    "sliding": {"attention_window": "sliding", "positions": "t5", "empty_memory": "zeros"},
    "sliding, masked": {"attention_window": "sliding", "positions": "t5"},
    "no memory": {"num_xl_blocks": 0, "state_update": "dual"},
    "memory of one layer": {"xl_layers": (2,), "qk_norm": "head", "state_reads_memory": True},
    "no state": {"recurrent_layers": ()},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_documents_are_read_as_if_each_were_alone(options, monkeypatch):
    """In stretches and side by side, every token once, to the same losses as block by block."""
    monkeypatch.setattr(evaluate, "MOST_TOKENS", 48)
    torch.manual_seed(0)
    config = Config(num_tokens=11, dim=8, depth=2, dim_head=4, heads=2, block_width=4, max_seq_len=8,
                          num_state_vectors=3, **options)  # fmt: skip
    model = train.BlockRecurrentTransformer(config).double().eval()
    draw = random.Random(0)
    texts = [[draw.randrange(11) for _ in range(length)] for length in (3, 0, 4, 170, 9, 61, 1, 33)]
    corpus = train.data.Corpus.from_tokens(texts, num_tokens=11)
    layout = evaluate.lay_out(corpus, 4)
    found = {way: evaluate.read(model, corpus, layout, 3, way) for way in evaluate.WAYS}
    for way, losses_of_way in found.items():
        assert losses_of_way.positions.sum() == pytest.approx(losses_of_way.blocks.sum())
        assert (losses_of_way.blocks > 0).all(), way
    for document, text in enumerate(texts):
        blocks = slice(*layout.first[document : document + 2])
        bits = [found[way].blocks[blocks].sum() / math.log(2) / max(1, len(text)) for way in evaluate.WAYS]
        assert not text or bits == pytest.approx(alone(model, text), rel=1e-9), document


@pytest.mark.parametrize("way", evaluate.WAYS)
def test_every_token_counts_once(way, monkeypatch):
    class Even(torch.nn.Module):
        """Every token costs one nat."""

        config = Config(num_tokens=11, dim=2, depth=1, block_width=4, max_seq_len=8)
        token_emb = torch.nn.Linear(1, 1)

        reach = 1

        def forward(self, x, **carried):
            return torch.full((len(x), x.shape[1] - 1), math.log(11)), None, None

    monkeypatch.setattr(evaluate, "without_memories", lambda model: None)
    monkeypatch.setattr(evaluate, "MOST_TOKENS", 64)
    draw = random.Random(1)
    for _ in range(5):
        texts = [[1] * draw.choice([0, 1, 3, 4, 5, 70, 300]) for _ in range(9)]
        corpus = train.data.Corpus.from_tokens([*texts, [1]], 11)
        layout = evaluate.lay_out(corpus, 4)
        losses_of_way = evaluate.read(Even(), corpus, layout, draw.choice([1, 2, 16]), way)
        assert losses_of_way.blocks / math.log(11) == pytest.approx(layout.block_bytes)
        assert losses_of_way.positions / math.log(11) == pytest.approx(layout.position_bytes)


def test_the_bootstrap_covers_the_truth():
    draw = np.random.default_rng(1)
    inside = 0
    for seed in range(60):
        units = draw.normal(2.0, 0.5, 100)
        low, high = evaluate.interval(evaluate.resampled([units], 200, seed)[0] / 100)
        inside += low <= 2.0 <= high
    assert 50 <= inside <= 60


@pytest.mark.parametrize("flags", ["nowhere", "RUN --data nowhere", "RUN --split test --data TOKENS"])
def test_evaluation_refuses(run, tmp_path, capsys, flags):
    run("a")
    flags = flags.replace("RUN", str(tmp_path / "a")).replace("TOKENS", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    assert evaluate.main(flags.split()) == 2
    assert ("there is no such folder" if flags == "nowhere" else "evaluate.py: ") in capsys.readouterr().err


def test_evaluation_passes_over_a_damaged_checkpoint(run, tmp_path):
    run("a")
    last = checkpoint.checkpoints(tmp_path / "a" / "checkpoints")[-1]
    (last / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over a damaged checkpoint"):
        assert evaluate.main([str(tmp_path / "a"), "--checkpoint", "last", "--documents", "1"]) == 0


@pytest.mark.parametrize(
    "flags", ["--documents -1", "--rows 0", "--threads 0", "--device nothing", "--report-tokens 0"]
)
def test_numbers_that_evaluation_refuses(capsys, flags):
    with pytest.raises(SystemExit):
        evaluate.main(["run", *flags.split()])
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", ["[]", '{"options": []}', '{"options": {}}'])
def test_evaluation_names_a_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        evaluate.load_options(tmp_path)


def test_evaluation_says_how_long_it_takes(monkeypatch):
    torch.manual_seed(0)
    config = Config(num_tokens=11, dim=8, depth=1, dim_head=4, heads=2, block_width=4, max_seq_len=8)
    model = train.BlockRecurrentTransformer(config)
    corpus = train.data.Corpus.from_tokens([[n % 11] * 50 for n in range(40)], num_tokens=11)
    assert evaluate.seconds_needed(model, corpus, 4) is None  # it takes no longer than to find out
    monkeypatch.setattr(evaluate, "MOST_TOKENS", 8)
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    assert evaluate.seconds_needed(model, corpus, 4) == pytest.approx(2.0 * 2000 / 128)
    assert [evaluate.describe_seconds(s) for s in (80, 600, 7200)] == ["80 s", "10 min", "2.0 h"]


def test_documents_with_odd_names_and_contents(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "draw", lambda *_: None)
    folder = tmp_path / "odd"
    folder.mkdir()
    contents = [b"", b"x", b"\r\n" * 9, b"\xff\xfe\x80", b"\0" * 20, b"words and words", "é漢字".encode()[:-1]]
    for number, content in enumerate(contents * 4):
        name = [b"plain", b"sp ace", b"new\nline", b"\xff\xfe", b"*[glob]?", b'a,b"q'][number % 6]
        Path(os.fsdecode(os.fsencode(folder) + b"/%d" % number + name)).write_bytes(content)
    status, text = run("a", "--data", str(folder), "--steps", "2", "--valid-every", "2", "--sample", "9")
    assert status == 0 and "4 empty skipped" in text
    assert evaluate.main([str(tmp_path / "a"), "--split", "all"]) == 0
    with (tmp_path / "a" / "evaluation" / "documents.csv").open(newline="", errors="surrogateescape") as file:
        assert len(list(csv.reader(file))) == 1 + 24


# ----------------------------------------------------------------------------------------------------- auxiliary losses


def test_an_auxiliary_loss_teaches_and_leaves_the_figures_alone(run, tmp_path):
    gated = ("--set", "gate=full")
    assert run("plain", *gated)[0] == 0
    assert run("taught", *gated, "--auxiliary", "open_gates=100")[0] == 0
    plain, taught = metrics(tmp_path / "plain"), metrics(tmp_path / "taught")
    assert plain[0]["loss"] == taught[0]["loss"] and plain[-1]["loss"] != taught[-1]["loss"]
    assert run("taught", "--resume", "--steps", "8")[0] == 0
    assert metrics(tmp_path / "taught")[-1]["step"] == 8
    status, text = run("other", *gated, "--auxiliary", "distillation=1")
    assert status == 2 and "the model has ['open_gates']" in text
    with pytest.raises(SystemExit):
        run("wrong", "--auxiliary", "open_gates=-1")
