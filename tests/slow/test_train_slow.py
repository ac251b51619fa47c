"""train.py killed at any moment, on a full disk, by several processes, and compiled."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from block_recurrent_transformer_pytorch import checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SIZES = [
    *("--dim", "16", "--depth", "2", "--heads", "2", "--dim-head", "8", "--block", "4", "--segment", "16"),
    *("--states", "3", "--batch", "4", "--steps", "12", "--lr", "0.01", "--warmup", "2", "--valid-batches", "2"),
    *("--final-batches", "2", "--valid-every", "6", "--checkpoint-every", "2", "--sample", "0", "--preset", "cpu"),
    *("--device", "cpu", "--threads", "1"),
]
ENOUGH = 500  # seconds


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("documents"), random.Random(0)
    for number in range(24):
        text = "".join(draw.choice("abcdef \n") for _ in range(draw.choice([3, 20, 150, 700])))
        (folder / f"{number:02}.txt").write_text(f"{number} {text}")
    return folder


@pytest.fixture(scope="module")
def command(documents, tmp_path_factory):
    """The words of a command that trains into a folder, in one process or in several."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def words(out, *flags, processes=1, prelude=""):
        start = [sys.executable, str(ROOT / "train.py")]
        if prelude:  # Python that changes something before the script runs
            script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{prelude}\nimport train\nsys.exit(train.main())"
            start = [sys.executable, "-c", script]
        if processes > 1:
            port = f"--master-port={free_port()}"
            start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), port]
            start.append(str(ROOT / "train.py"))
        return [*start, *SIZES, "--data", str(documents), "--cache", cache, "--out", str(out), *flags]

    return words


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done(command(folder))
    return folder


def free_port():
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]


def done(words, status=0, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, capture_output=True, text=True, timeout=ENOUGH, env=environment, **options)
    assert status is None or result.returncode == status, result.stdout + result.stderr
    return result


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
    flags = ["--steps", "150", "--set", "ff_dropout=0.1", "--memory-dropout", "0.2", "--accumulate", "2", "--bptt", "2"]
    began = time.monotonic()
    done(command(tmp_path / "whole", *flags))
    lasted = time.monotonic() - began
    draw, kills = random.Random(torch.seed()), 0
    for _ in range(5):
        running = subprocess.Popen(command(tmp_path / "cut", *flags, "--resume"), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        try:
            running.wait(draw.uniform(0.3, 0.9) * lasted)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            kills += 1
    done(command(tmp_path / "cut", *flags, "--resume"))
    assert kills
    same_bytes(tmp_path / "whole", tmp_path / "cut")


KILLS = {  # the moment within the write of a checkpoint: what is called then
    "between two files": ("_write_tensors", 1, "before"),
    "before the manifest": ("_write_manifest", 0, "before"),
    "before the new name": ("_write_manifest", 0, "after"),
    "before the old ones go": ("_prune", 0, "before"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_inside_the_write_of_a_checkpoint(command, whole, tmp_path, moment):
    name, calls, side = KILLS[moment]
    prelude = f"""
import os
from block_recurrent_transformer_pytorch import checkpoint
whole, saved, count = checkpoint.{name}, checkpoint.save, []
def save(*args, **options):
    count[:] = [] if options["step"] == 6 else [-10**9]
    return saved(*args, **options)
def killed(*args, **options):
    count.append(1)
    fatal = sum(count) == {calls + 1}
    if fatal and {side!r} == "before": os.kill(os.getpid(), 9)
    result = whole(*args, **options)
    if fatal: os.kill(os.getpid(), 9)
    return result
checkpoint.save, checkpoint.{name} = save, killed
"""
    done(command(tmp_path / "cut", prelude=prelude), status=-signal.SIGKILL)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")]
    assert names[-1] == ("step-00000006" if moment == "before the old ones go" else "step-00000004")
    text = done(command(tmp_path / "cut", "--resume")).stdout
    assert f"after step {int(names[-1][-2:])}" in text
    same_bytes(whole, tmp_path / "cut")


def test_a_full_disk(command, whole, tmp_path):
    """No file may be longer than 20 kB: checkpoints fail, the run goes to its end and says what is missing."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = done(command(tmp_path / "full"), status=1, preexec_fn=limited)
    assert "checkpoint of step 2 could not be written" in result.stdout and "--resume" in result.stderr
    assert not checkpoint.checkpoints(tmp_path / "full" / "checkpoints")
    done(command(tmp_path / "full", "--resume"))
    same_bytes(whole, tmp_path / "full")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(command, tmp_path, number):
    running = subprocess.Popen(command(tmp_path / "cut", "--steps", "2000"), stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    log = tmp_path / "cut" / "metrics.jsonl"
    while not log.exists() or not log.read_text():
        time.sleep(0.1)
    running.send_signal(number)
    out, _ = running.communicate(timeout=ENOUGH)
    assert running.returncode == 128 + number and f"--resume {tmp_path / 'cut'}" in out
    last = checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    assert int(last.name[-8:]) == len(losses(tmp_path / "cut"))


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
    done(command(tmp_path / "split", *exact, "--steps", "4", processes=2))
    done(command(tmp_path / "split", *exact, "--steps", "8", "--resume"))
    done(command(tmp_path / "joined", *exact, "--steps", "4"))
    text = done(command(tmp_path / "joined", *exact, "--steps", "8", "--resume", processes=2)).stdout
    assert "rows are dealt anew" in text
    for name in ("split", "joined"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-9)


@pytest.mark.parametrize("processes", [2, 4])  # of two numbers the sum is the same in any order, of four it is not
def test_several_processes_go_on_to_the_same_bytes(command, tmp_path, processes):
    flags = ["--set", "ff_dropout=0.2", "--schedule", "constant", "--valid-every", "4"]
    done(command(tmp_path / "whole", *flags, "--steps", "8", processes=processes))
    done(command(tmp_path / "cut", *flags, "--steps", "4", processes=processes))
    done(command(tmp_path / "cut", *flags, "--steps", "8", "--resume", processes=processes))
    same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_a_process_that_dies_ends_the_others(command, tmp_path):
    words = command(tmp_path / "run", "--steps", "100000", "--valid-every", "100000", processes=2)
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        time.sleep(0.1)
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


@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for the CPU needs a C++ compiler")
def test_compiled(command, tmp_path):
    few = [*EXACT, "--depth", "1", "--segment", "8", "--steps", "2", "--final-batches", "1"]
    done(command(tmp_path / "plain", *few))
    done(command(tmp_path / "compiled", *few, "--compile"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-9)
