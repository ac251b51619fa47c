"""train.py killed at any moment, on a full disk, by several processes, and compiled.

Most processes are forked from one that has imported everything: they live and die as those of a command line, without
the seconds that Python and torch take to start. Two tests use torchrun itself.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch._dynamo  # what the first optimizer of a process imports, in more than a second
import torch.distributed.fsdp

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from block_recurrent_transformer_pytorch import checkpoint, pretrained  # noqa: E402
from block_recurrent_transformer_pytorch.commands import train  # noqa: E402

pytestmark = pytest.mark.slow

SIZES = [
    *("--dim", "16", "--depth", "2", "--heads", "2", "--dim-head", "8", "--block", "4", "--segment", "16"),
    *("--states", "3", "--batch", "4", "--steps", "12", "--lr", "0.01", "--warmup", "2", "--valid-batches", "2"),
    *("--final-batches", "2", "--valid-every", "6", "--checkpoint-every", "2", "--sample", "0", "--preset", "cpu"),
    *("--device", "cpu", "--threads", "1"),
]
ENOUGH = 500  # seconds
SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server():
    """The process that others are forked from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        SERVER.set_forkserver_preload([__name__])
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("documents"), random.Random(0)
    for number in range(24):
        text = "".join(draw.choice("abcdef \n") for _ in range(draw.choice([3, 20, 150, 700])))
        (folder / f"{number:02}.txt").write_text(f"{number} {text}")
    return folder


@pytest.fixture(scope="module")
def command(documents, tmp_path_factory):
    """The words of a command that trains into a folder."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return lambda out, *flags: [*SIZES, "--data", str(documents), "--cache", cache, "--out", str(out), *flags]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done(command(folder))
    return folder


def main(words, output, environment, prelude):
    """What a process of its own does. `prelude` changes something before."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(environment)
    train.draw_curve = lambda folder: "curve.png"  # takes longer than the run
    if prelude is not None:
        prelude()
    sys.exit(train.main(words))


def begin(words, processes=1, prelude=None):
    """Starts a run in one process or in several; they write to the file that comes first."""
    output = Path(words[words.index("--out") + 1]).with_suffix(".txt")
    started, port = [], str(free_port())
    for rank in range(processes):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}  # fmt: skip
        started.append(SERVER.Process(target=main, args=(words, output, environment, prelude)))
        started[-1].start()
    return output, *started


def done(words, status=0, **options):
    """What a run says, which ends with this status."""
    output, *started = begin(words, **options)
    for process in started:
        process.join(ENOUGH)
        assert process.exitcode == status, output.read_text()
    return output.read_text()


def torchrun(words, processes):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
             f"--master-port={free_port()}", str(ROOT / "train.py")]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*start, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment)  # fmt: skip


def free_port():
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_bytes(one, other):
    last, same = checkpoint.checkpoints(one / "checkpoints")[-1], checkpoint.checkpoints(other / "checkpoints")[-1]
    assert last.name == same.name
    for file in sorted(path.name for path in last.iterdir()):
        assert (last / file).read_bytes() == (same / file).read_bytes(), file
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------------------------- kills


def test_killed_at_random_moments(command, tmp_path):
    flags = ["--steps", "80", "--set", "ff_dropout=0.1", "--memory-dropout", "0.2", "--accumulate", "2", "--bptt", "2"]
    began = time.monotonic()
    done(command(tmp_path / "whole", *flags))
    lasted = time.monotonic() - began
    draw, kills = random.Random(torch.seed()), 0
    while kills < 4:
        _, running = begin(command(tmp_path / "cut", *flags, "--resume"))
        running.join(draw.uniform(0.1, 0.5) * lasted)
        if running.exitcode is not None:
            break
        running.kill()
        running.join()
        kills += 1
    done(command(tmp_path / "cut", *flags, "--resume"))
    assert kills
    same_bytes(tmp_path / "whole", tmp_path / "cut")


def kill_in_save(name, calls, side):
    """Before or after a call of a function of `checkpoint`, while the checkpoint of step 6 is written."""
    function, save, count = getattr(checkpoint, name), checkpoint.save, []

    def counted_save(*args, **options):
        count[:] = [options["step"]]
        return save(*args, **options)

    def killed(*args, **options):
        fatal = count == [6, *range(calls)]
        count.append(len(count) - 1)
        if fatal and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **options)
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    checkpoint.save = counted_save
    setattr(checkpoint, name, killed)


KILLS = {  # the moment within the write of a checkpoint: what is called then
    "between two files": ("_write_tensors", 1, "before"),
    "before the manifest": ("_write_manifest", 0, "before"),
    "before the new name": ("_write_manifest", 0, "after"),
    "before the old ones go": ("_prune", 0, "before"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_inside_the_write_of_a_checkpoint(command, whole, tmp_path, moment):
    done(command(tmp_path / "cut"), status=-signal.SIGKILL, prelude=partial(kill_in_save, *KILLS[moment]))
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")]
    assert names[-1] == ("step-00000006" if moment == "before the old ones go" else "step-00000004")
    text = done(command(tmp_path / "cut", "--resume"))
    assert f"after step {int(names[-1][-2:])}" in text
    same_bytes(whole, tmp_path / "cut")


def limit_files():
    """No file may be longer than 20 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk(command, whole, tmp_path):
    """Checkpoints fail, the run goes to its end and says what is missing."""
    text = done(command(tmp_path / "full"), status=1, prelude=limit_files)
    assert "checkpoint of step 2 could not be written" in text and "with more room: " in text
    assert not checkpoint.checkpoints(tmp_path / "full" / "checkpoints")
    done(command(tmp_path / "full", "--resume"))
    same_bytes(whole, tmp_path / "full")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(command, tmp_path, number):
    output, running = begin(command(tmp_path / "cut", "--steps", "2000"))
    wait_for_steps(tmp_path / "cut", 1)
    os.kill(running.pid, number)
    running.join(ENOUGH)
    assert running.exitcode == 128 + number
    assert output.read_text().splitlines()[-1].endswith(f"--resume {tmp_path / 'cut'}")
    last = checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    assert int(last.name[-8:]) == len(losses(tmp_path / "cut"))


def wait_for_steps(folder, count):
    began = time.monotonic()
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < count:
        assert time.monotonic() < began + ENOUGH
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------- several processes

EXACT = ["--precision", "fp64"]
DROPS = "--memory-dropout 0.3 --state-dropout 0.3"
TOGETHER = {
    "ddp": f"--parallel ddp --bptt 2 --step-segments 4 --accumulate 2 --checkpointing {DROPS}",
    "ddp replay": "--parallel ddp --bptt replay --step-segments 3",
    "ddp one block": "--parallel ddp --segment 4 --set use_compressed_mem=true --set compressed_mem_factor=2",
    "fsdp": f"--parallel fsdp --bptt 2 --step-segments 4 --accumulate 2 --set use_compressed_mem=true {DROPS}",
    "fsdp replay": "--parallel fsdp --bptt replay --step-segments 3",
}


@pytest.mark.parametrize("flags", TOGETHER.values(), ids=TOGETHER)
def test_two_processes_are_one_and_their_checkpoints_fit_each_other(command, tmp_path, flags):
    """One process for 8 steps; two for 4, then one to 8; one for 4, then two to 8: the same losses."""
    exact = [*EXACT, "--schedule", "constant", *flags.split()]
    done(command(tmp_path / "one", *exact, "--steps", "8"))
    done(command(tmp_path / "split", *exact, "--steps", "4"), processes=2)
    done(command(tmp_path / "split", *exact, "--steps", "8", "--resume"))
    done(command(tmp_path / "joined", *exact, "--steps", "4"))
    text = done(command(tmp_path / "joined", *exact, "--steps", "8", "--resume"), processes=2)
    assert "rows are dealt anew" in text and "Warning" not in text
    for name in ("split", "joined"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-9)


def test_several_processes_go_on_to_the_same_bytes(command, tmp_path):
    """Four: of two numbers the sum is the same in any order."""
    flags = ["--set", "ff_dropout=0.2", "--schedule", "constant", "--valid-every", "4"]
    done(command(tmp_path / "whole", *flags, "--steps", "8"), processes=4)
    done(command(tmp_path / "cut", *flags, "--steps", "4"), processes=4)
    resumed = torchrun(command(tmp_path / "cut", *flags, "--steps", "8", "--resume"), processes=4)
    text, _ = resumed.communicate(timeout=ENOUGH)
    assert resumed.returncode == 0, text
    same_bytes(tmp_path / "whole", tmp_path / "cut")


def stop_one(validating):
    """A signal reaches the second process alone, within step 6 or its validation."""
    name = "to_segments" if validating else "backward"
    whole = getattr(train, name)

    def stopping(run, *rest):
        in_validation = not run.segments.training
        if run.processes.rank and run.step == 5 + validating and in_validation == validating and not run.signals:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(run, *rest)

    setattr(train, name, stopping)


STOPS = {
    "ddp in a step": "--parallel ddp --accumulate 2 --bptt 2 --step-segments 4",
    "ddp in a validation": "--parallel ddp",
    "fsdp in a step": "--parallel fsdp --bptt replay --step-segments 3",
    "fsdp in a validation": f"--parallel fsdp --set use_compressed_mem=true {DROPS}",
}


@pytest.mark.parametrize("name", STOPS)
def test_several_processes_stop_at_the_same_place_and_go_on_to_the_same_bytes(command, tmp_path, name):
    flags, validating = [*STOPS[name].split(), "--set", "ff_dropout=0.2"], name.endswith("validation")
    done(command(tmp_path / "whole", *flags), processes=2)
    output, *started = begin(command(tmp_path / "cut", *flags), processes=2, prelude=partial(stop_one, validating))
    for process in started:
        process.join(ENOUGH)
    assert [process.exitcode for process in started] == [128 + signal.SIGINT, 128 + signal.SIGTERM], output.read_text()
    assert "stopped after step 6 of 12" in output.read_text() and len(losses(tmp_path / "cut")) == 6
    done(command(tmp_path / "cut", *flags, "--resume"), processes=2)
    same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_a_process_that_dies_ends_the_others(command, tmp_path):
    words = command(tmp_path / "run", "--steps", "100000", "--valid-every", "100000")
    running = torchrun(words, processes=2)
    wait_for_steps(tmp_path / "run", 5)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    ranks = {child: rank_of(child) for child in children}
    victim = next(child for child, rank in ranks.items() if rank == "1")
    os.kill(int(victim), signal.SIGKILL)
    began = time.monotonic()
    out, _ = running.communicate(timeout=60)
    assert time.monotonic() - began < 60 and running.returncode != 0
    assert "process 0 of 2 ends" in out or "Signal 9 (SIGKILL)" in out
    assert not any(Path(f"/proc/{child}").exists() and rank_of(child) for child in children)


def rank_of(child):
    try:
        environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
    except OSError:
        return None
    return next((entry[5:] for entry in environment if entry.startswith("RANK=")), None)


# ------------------------------------------------------------------------------------------------------------ compile


def compile_without_kernels():
    """Graphs are traced and differentiated as ever; tests/slow/test_compile.py waits for the C++ of their kernels."""
    torch.compile = partial(torch.compile, backend="aot_eager")


def test_compiled(command, tmp_path):
    few = [*EXACT, "--depth", "1", "--segment", "8", "--steps", "2", "--final-batches", "1"]
    done(command(tmp_path / "plain", *few))
    done(command(tmp_path / "compiled", *few, "--compile"), prelude=compile_without_kernels)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-9)


# ------------------------------------------------------------------------------------------------- frozen, and adapters


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "flags", [["--freeze", "token_emb.*", "layers.0.*"], ["--lora-rank", "2", "--train-only", "*norm.weight"]],
    ids=["frozen", "adapters"],
)  # fmt: skip
def test_two_processes_train_a_part_as_one_does(command, tmp_path, parallel, flags):
    """In losses, and in the weights that are read of the run."""
    if "--lora-rank" in flags:
        pytest.importorskip("peft", reason="needs peft (pip install peft)")
    done(command(tmp_path / "one", *flags, "--precision", "fp64"))
    done(command(tmp_path / "two", *flags, "--precision", "fp64", "--parallel", parallel), processes=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-9)
    one, two = (pretrained.load_weights(tmp_path / name, checkpoint="last")[1] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-7) for name in one)
