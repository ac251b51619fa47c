"""`python -m evidence text`: arms in turns, gone on with to the last bit, and what its report says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from block_recurrent_transformer_pytorch.commands import train
from evidence import __main__ as command
from evidence import text, text_report
from evidence.text import ARMS, Run, Text, carried_out, ends, plan

TINY = {
    "dim": 16, "heads": 2, "dim_head": 8, "states": 4, "valid_batches": 1, "final_batches": 1, "checkpoint_every": 1,
    "warmup": 1,
}  # fmt: skip


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Text:
    """A few texts, and an experiment whose slices are two steps and more."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(train, "draw_curve", lambda folder: "curve.png")
    for name, value in {"FIRST": 4096, "LARGEST": 4096, "TUNED_AT": 4096, "RATES": (2e-3, 4e-3)}.items():
        monkeypatch.setattr(text, name, value)
    for name, value in {"FIRST": 4096, "TUNED_AT": 4096, "RATES": (2e-3, 4e-3)}.items():
        monkeypatch.setattr(text_report, name, value)
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(" ".join(str(n * (i + 3)) for n in range(4000)))
    return Text(str(folder), "", tmp_path / "results" / "text", tmp_path / "runs", TINY)


def curve(run: Run) -> list[Any]:
    return [(point["tokens"], point["bits_per_byte"], point["training_loss"]) for point in run.result["curve"]]


def test_all_arms_are_models_and_controls_differ_in_the_reset_alone(books: Text) -> None:
    for arm in ARMS:
        text.parse(Run(books, arm, 0, 1e-3).flags(1))
    for arm, control in text.CONTROL_OF.items():
        options = Run(books, arm, 0, 1e-3).options
        assert Run(books, control, 0, 1e-3).options == options | {"reset_states_every_block": True}


def test_arms_take_turns_and_the_first_seed_is_ahead() -> None:
    turns = plan(["none", "skip"], (5, 6), 4 * text.FIRST)
    assert {(seed, arm) for _, seed, arm in turns} == {(s, a) for s in (5, 6) for a in ("none", "skip")}
    read: dict[tuple[int, str], int] = {}
    for end, seed, arm in turns:
        assert end > read.get((seed, arm), 0)
        read[seed, arm] = end
        of_seed = [read.get((seed, a), 0) for a in ("none", "skip")]
        assert max(of_seed) - min(of_seed) <= text.LARGEST
        assert read.get((6, arm), 0) <= read[5, arm]
    assert ends(text.FIRST) == [text.FIRST] and ends(10**6)[-1] >= 10**6


def test_a_killed_run_goes_on_to_the_last_bit(books: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(books, "gated", 0, 4e-3)
    for tokens in (4096, 8192):
        whole.read_to(tokens)
    cut = Run(Text(books.data, "", books.results / "cut", books.runs / "cut", TINY), "gated", 0, 4e-3)
    step = train.train_step

    def killed(run: train.Run) -> dict[str, Any]:
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)  # once the step is done, the run stops
        return step(run)

    cut.read_to(4096)
    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(SystemExit, match="goes on"):
        cut.read_to(8192)
    monkeypatch.setattr(train, "train_step", step)
    assert len(cut.result["curve"]) == 1
    torn = cut.text.runs / cut.name / "checkpoints" / ".tmp-step-00000009"  # as a kill leaves it
    torn.mkdir()
    cut.read_to(8192)
    assert curve(cut) == curve(whole) and len(curve(cut)) == 2
    shutil.rmtree(cut.text.runs / cut.name)  # the results alone, as in a clone: the run is repeated and goes on
    cut.read_to(12288)
    whole.read_to(12288)
    assert curve(cut) == curve(whole) and len(curve(cut)) == 3


def test_grid_command_and_report(books: Text, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text, "SIZES", text.SIZES | TINY)
    flags = ["--data", books.data, "--results", str(tmp_path / "results"), "--arms", "none,skip,skip-reset,deeper"]
    command.main(["text", *flags, "--tokens", "8192", "--seeds", "0,1"])
    runs = [json.loads(path.read_text()) for path in sorted((tmp_path / "results" / "text").glob("*.json"))]
    assert {run["setup"]["rate"] for run in runs if run["setup"]["seed"] == 0} == {2e-3, 4e-3}
    chosen = text_report.chosen(runs)
    for run in chosen:
        rivals = [r for r in runs if r["setup"]["arm"] == run["setup"]["arm"] and r["setup"]["seed"] == 0]
        best = min(rivals, key=lambda r: r["curve"][0]["bits_per_byte"])
        assert best["setup"]["rate"] == run["setup"]["rate"]
    assert {(r["setup"]["arm"], r["setup"]["seed"]) for r in chosen} == {
        (arm, seed) for arm in ("none", "skip", "skip-reset", "deeper") for seed in (0, 1)
    }
    monkeypatch.setattr(text_report, "plot", lambda *args: None)
    page = "\n".join(text_report.report(tmp_path / "results", tmp_path))
    found = text_report.curves(chosen)
    first = found["skip", 0][4096] - found["none", 0][4096]
    assert f"{first:+.3f}" in page and "Table 1, small: after 8,192 tokens" in page
    assert list(carried_out(books, ["none"], (0,), 4096))  # nothing is read twice


def test_steps_are_timed_in_turns(books: Text) -> None:
    found = text.measure_steps(books, ["none", "skip"], pairs=2)
    assert all(len(taken["seconds"]) == 2 and taken["median"] > 0 for taken in found.values())
    assert found["none"]["parameters"] < found["skip"]["parameters"]
    assert json.loads((books.results / "timing.json").read_text())["arms"] == found


def test_a_rate_is_chosen_among_those_that_all_arms_had() -> None:
    def tried(arm: str, seed: int, **bits: float) -> list[dict[str, Any]]:
        return [{"setup": {"arm": arm, "seed": seed, "rate": rate},
                 "curve": [{"tokens": text.TUNED_AT, "bits_per_byte": bits[name]}]}
                for name, rate in zip("abc", text.RATES) if name in bits]  # fmt: skip

    whole, part = tried("none", 0, a=3.0, b=2.0, c=1.0), tried("skip", 0, a=2.0, b=3.0)
    other = tried("none", 1, a=0.5, b=9.0, c=9.0)  # not the first seed
    rates = {r["setup"]["arm"]: r["setup"]["rate"] for r in text_report.chosen([*other, *whole, *part])}
    assert rates == {"none": text.RATES[2], "skip": text.RATES[0]}


def test_differences_are_of_pairs_and_their_interval_is_students() -> None:
    found = {("skip", 0): {8: 2.0}, ("none", 0): {8: 2.5}, ("skip", 1): {8: 2.0}, ("none", 1): {8: 2.25},
             ("skip", 2): {8: 1.0}}  # fmt: skip
    assert text_report.differences(found, "skip", "none", 8) == [-0.5, -0.25]
    low, high = text_report.interval([-1.0, 0.0, 1.0]) or (0, 0)
    assert abs(high - 4.303 / 3**0.5) < 1e-9 and low == -high
    assert text_report.interval([1.0]) is None
