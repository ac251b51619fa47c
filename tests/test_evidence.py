"""The experiments of `python -m evidence`: their tasks, their bookkeeping, and that they can be interrupted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from strategies import random_model
from torch import Tensor

from block_recurrent_transformer_pytorch.inspecting import inspecting
from evidence import __main__ as command
from evidence import pairs, pretrained, running
from evidence.experiments import EXPERIMENTS, OURS, Experiment
from evidence.intervals import bootstrap, interval, wilson
from evidence.streaming import remembered
from evidence.tasks import NOT_ASKED, NUM_VALUES, Facts, standard_library
from evidence.training import Reader, Recipe, openings, rate, stages, train

TASKS = [
    Facts(), Facts(facts=4, overwritten=2, keys=8), Facts(facts=4, overwritten=4, keys=8, order="key value"),
    Facts(facts=3, overwritten=1, keys=5, filler="text"),
]  # fmt: skip


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def facts_in(task: Facts, tokens: list[int]) -> list[tuple[int, int, int]]:
    """Where facts end, their keys, and the tokens of their values, as one reads them."""
    found = []
    for at, token in enumerate(tokens):
        if token == task.set_token:
            value, key = tokens[at + 1 : at + 3] if task.order == "value key" else tokens[at + 2 : at : -1]
            found.append((at + 2, key - task.first_key, value))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_questions_ask_for_the_newest_value(task: Facts) -> None:
    batch = task.draw(40, 128, draw(), questions=8)
    asked = 0
    for tokens, targets, newest in zip(*(x.tolist() for x in batch)):
        facts = facts_in(task, tokens)
        assert len(facts) == task.writes and len({key for _, key, _ in facts}) == task.facts
        last = {key: value for _, key, value in facts}
        assert newest == [last.get(key, NOT_ASKED) for key in range(task.keys)]
        for at in (at for at, target in enumerate(targets) if target != NOT_ASKED):
            assert tokens[at - 1] == task.get_token
            before = {key: value for end, key, value in facts if end < at}
            assert targets[at] == before[tokens[at] - task.first_key]
            asked += 1
        assert tokens.count(task.get_token) == sum(target != NOT_ASKED for target in targets)
    assert asked > 40
    assert batch.tokens.min() >= 0 and batch.tokens.max() < task.num_tokens


@pytest.mark.parametrize("task", TASKS)
def test_facts_alone_fill_all_places(task: Facts) -> None:
    """And follow from the seed; they begin anywhere in a block."""
    batch, again = (task.draw(400, 64, draw(3), unseen=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(batch, again))
    assert (batch.targets == NOT_ASKED).all()
    starts = (batch.tokens == task.set_token).nonzero()[:, 1]
    assert len(set((starts % 32).tolist())) > 20
    with pytest.raises(ValueError, match="length=15 has room for"):
        Facts(facts=4, keys=4).draw(1, 15, draw())


def test_unseen_text_is_of_other_files() -> None:
    train_text, unseen = standard_library(False), standard_library(True)
    assert len(train_text) > len(unseen) > 10**5
    sample = bytes(unseen[5000:5400].tolist())
    assert sample not in bytes(train_text.tolist())


def test_filler_of_a_stream_goes_on_where_it_was() -> None:
    task = Facts(filler="text")
    stream = task.stream(2, draw())
    next(stream)
    pieces = torch.cat([stream.send(length) for length in (7, 1, 30)], dim=1)
    stream = task.stream(2, draw())
    next(stream)
    assert torch.equal(stream.send(38), pieces)
    text = bytes(standard_library(True).tolist())
    assert bytes(pieces[0].tolist()) in text + text[:40]


def test_stages_grow_to_the_full_task() -> None:
    for experiment in EXPERIMENTS.values():
        plan = stages(experiment.task)
        assert plan[-1] == (512, experiment.task)
        for length, task in plan:
            task.draw(1, length, draw(), questions=4)


def test_the_learning_rate_goes_up_and_down() -> None:
    rates = [rate(step, Recipe(100, warmup=10)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:70] == [1.0] * 61 and rates[-1] == 0.05


class Knowing:
    """In the place of a reader: knows all facts of the writing and counts what it reads."""

    def __init__(self, task: Facts, known: Tensor) -> None:
        self.task, self.known, self.model = task, known, torch.nn.Module()
        self.model.config = EXPERIMENTS["one-fact"].config(OURS)

    def __call__(self, tokens: Tensor, carried: tuple = (None, None), **options: object) -> tuple[Tensor, tuple]:
        logits = torch.zeros(len(tokens), 1, self.task.num_tokens)
        if (tokens[:, -2] == self.task.get_token).all():
            assert tokens.shape[1] == 10
            answer = self.known[carried[1][:, 0], tokens[:, -1] - self.task.first_key]
            logits[torch.arange(len(tokens)), 0, answer] = 1
        rows = torch.arange(len(tokens))[:, None] if carried[1] is None else carried[1]
        read = torch.zeros(len(tokens), 1) if carried[0] is None else carried[0] + tokens.shape[1]
        return logits, (read, rows)


def test_every_fact_is_asked_for_at_every_distance() -> None:
    task = TASKS[1]
    known = task.draw(6, 1024, draw(5), unseen=True).newest
    known[2] = -1 % task.num_tokens  # a row that knows nothing
    found = list(remembered(Knowing(task, known), task, 6, [512, 3000], draw(5)))
    assert [one["distance"] for one in found] == [512, 3000]
    assert all(one["right"] == [4, 4, 0, 4, 4, 4] for one in found)


def test_openings_are_those_of_the_gates() -> None:
    torch.manual_seed(0)
    model, _ = train(EXPERIMENTS["one-fact"].config(OURS), Facts(), Recipe(1), 0, reset_states=False)
    tokens = Facts().draw_filler(2, 64, draw())
    with torch.no_grad(), openings(model) as seen:
        expected = model(tokens)[0]
    writes = torch.cat(seen.writes, dim=1)
    assert writes.shape == (2, 2, 32, 1)
    assert seen.share == (writes > 0).float().mean().item() and torch.allclose(seen.mean, writes.mean())
    assert torch.equal(model(tokens)[0], expected) and torch.equal(torch.cat(seen.writes, dim=1), writes)


def test_a_reader_that_resets_states_knows_nothing_of_earlier_blocks() -> None:
    experiment = EXPERIMENTS["one-fact"]
    model, _ = train(experiment.config(OURS), experiment.task, Recipe(2), 0, reset_states=True)
    tokens = experiment.task.draw_filler(3, 160, draw())
    with torch.no_grad():
        out, (_, states) = Reader(model, reset_states=True)(tokens)
        other = tokens.clone()
        other[:, :40] = 0
        again, (_, states_again) = Reader(model, reset_states=True)(other)
    assert torch.equal(states.layers[0], states_again.layers[0])
    assert torch.allclose(out[:, -32:], again[:, -32:], atol=1e-6) and not torch.allclose(out[:, :80], again[:, :80])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    task = Facts(facts=2, overwritten=1, keys=3)
    recipe = Recipe(2, tokens_per_step=256)
    experiment = Experiment("Two facts", task, 4, recipe, [32, 96], ("none",), [32], seeds=(0, 1))
    monkeypatch.setitem(EXPERIMENTS, "small", experiment)
    monkeypatch.setattr(running, "ROWS", 3)
    return "small"


def test_what_was_interrupted_goes_on(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running.Run(small, "token-gated", 0)
    whole = run.carry_out(tmp_path / "whole", tmp_path / "whole", 2)
    assert [len(part) for part in whole["parts"]] == [2, 2]
    run.carry_out(tmp_path, tmp_path, 1)
    path = tmp_path / f"{run.name}.json"
    stopped = json.loads(path.read_text())
    path.write_text(json.dumps(stopped | {"parts": [*stopped["parts"], stopped["parts"][0][:1]]}))  # in the second part
    monkeypatch.setattr(running, "train", None)  # is not done again
    resumed = run.carry_out(tmp_path, tmp_path, 2)
    for part, expected in zip(resumed["parts"], whole["parts"], strict=True):
        assert [{**one, "peak_mib": 0} for one in part] == [{**one, "peak_mib": 0} for one in expected]
    assert json.loads(path.read_text())["parts"] == resumed["parts"]


def test_other_settings_begin_anew(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running.Run(small, "none", 0)
    first = run.carry_out(tmp_path, tmp_path, 1)
    monkeypatch.setitem(EXPERIMENTS, small, Experiment(**{**vars(EXPERIMENTS[small]), "states": 5}))
    assert run.carry_out(tmp_path, tmp_path, 1)["setup"] != first["setup"]


def test_a_new_option_of_the_library_leaves_results_valid(small: str, tmp_path: Path) -> None:
    """What it did not have then counts as its default, and as nothing else."""
    run = running.Run(small, "none", 0)
    setup = run.carry_out(tmp_path, tmp_path, 1)["setup"]
    for name in ("qkv_bias", "rotary_scaling", "num_xl_blocks"):
        config = {option: value for option, value in setup["config"].items() if option != name}
        older = {**setup, "config": config}
        assert running.is_same(older, setup)
        assert not running.is_same(older, {**setup, "config": {**setup["config"], name: 7}})
    assert not running.is_same({}, setup)


def test_the_report_says_what_the_results_say(small: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command.main(["facts", "--only", "small", "--results", str(tmp_path), "--parts", "1"])
    path = tmp_path / "small.token-gated.seed1.json"
    result = json.loads(path.read_text())
    result["parts"][0][1]["right"] = [2, 2, 1]
    path.write_text(json.dumps(result))
    path = tmp_path / "small.token-gated.seed0.json"
    result = json.loads(path.read_text())
    result["parts"][0][1] |= {"right": [2, 2, 2], "open_share": 0.25, "mean_write": 0.125}
    path.write_text(json.dumps(result))
    command.main(["report", "--results", str(tmp_path), "--docs", str(tmp_path)])
    text = (tmp_path / "evidence.md").read_text()
    assert "## Two facts" in text and " 100.0 / 83.3 |" in text and "| 91.7 [" in text
    row = next(line for line in text.splitlines() if line.startswith("| token-gated") and "83.3 |" in line)
    assert "| 2.5e-01 / " in row and "| 1.2e-01 / " in row
    (tmp_path / "small.none.seed1.json").unlink()
    command.main(["report", "--results", str(tmp_path), "--docs", str(tmp_path)])
    assert "* small: `none` of seed 1\n" in (tmp_path / "evidence.md").read_text()
    assert (tmp_path / "evidence-distance.png").exists()


def test_intervals() -> None:
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson 1927, as tabulated
    assert wilson(100, 100)[1] == 1 and wilson(0, 10)[0] == 0
    low, high = bootstrap([1, 0] * 50, 1)
    assert low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)
    assert interval([4, 4, 4], 4) == wilson(3, 3) and interval([1, 0], 1) == wilson(1, 2)
    assert 0 < interval([4, 3, 4], 4)[0] < interval([4, 3, 4], 4)[1] <= 1


def test_unknown_names_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = (["--arms", "nobody"], "--arms names ['nobody']"), (["--only", "tea"], "--only=tea names no experiment")
    for given, message in wrong:
        with pytest.raises(SystemExit):
            command.arguments(["facts", *given])
        assert message in capsys.readouterr().err


def test_guessing_is_one_of_the_values() -> None:
    assert NUM_VALUES == 16 and Facts(keys=4).num_tokens == 38 and Facts(filler="text").num_tokens == 258


# ---------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("order", ["value key", "key value"])
def test_pairs_are_written_once_and_asked_for_by_their_keys(order: str) -> None:
    tokens, keys, values = pairs.written(order, 3, 0.5, draw())
    assert tokens.shape == (3, 1024) and all(len(set(row)) == 128 for row in keys.tolist())
    for row, key, value in zip(tokens.tolist(), keys.tolist(), values.tolist()):
        found = [row[at + 1 : at + 3] for at, token in enumerate(row) if token == pairs.SET]
        assert found == [[v, k] if order == "value key" else [k, v] for k, v in zip(key, value)]
    asked, answers = pairs.questions(keys, values, 20, draw(1))
    known = [dict(zip(*row)) for row in zip(keys.tolist(), values.tolist())]
    for row, (question, answer) in enumerate(zip(asked.unflatten(1, (-1, 3)).tolist(), answers.tolist())):
        assert [get for get, _, _ in question] == [pairs.GET] * 20 and [v for _, _, v in question] == answer
        assert [known[row][key] for _, key, _ in question] == answer


@pytest.mark.parametrize("arm", ["max-8", "max-8-key-first", "gate-8", "random", "off"])
def test_arms_of_pairs_are_trained_and_asked(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(pairs.ARMS[arm], steps=2, taught_from=1 if pairs.ARMS[arm].taught_from else None, distances=(0, 48))
    monkeypatch.setitem(pairs.ARMS, arm, small)
    torch.manual_seed(0)
    monkeypatch.setattr(pairs, "train", partial(pairs.train, batch=1))
    result = pairs.carry_out(arm, 0, tmp_path, tmp_path / "weights", 1)
    assert [found["distance"] for found in result["parts"][0]] == [0, 48]
    assert pairs.carry_out(arm, 0, tmp_path, tmp_path / "weights", 1) == result, "what is done is not done again"
    assert "CPU-s" in pairs.line(result) and small.title in "\n".join(pairs.report(tmp_path))


def test_matching_initial_values_find_the_chunk_of_a_key() -> None:
    """Before any training, and by lot not."""
    shares = {}
    for name in ("max-8", "random"):
        torch.manual_seed(0)
        model = pairs.make(pairs.ARMS[name], pairs.LENGTH).eval()
        tokens, keys, values = pairs.written("value key", 1, 0.0, draw())
        asked, _ = pairs.questions(keys, values, 64, draw())
        with inspecting(model) as seen, torch.no_grad():
            model(torch.cat((tokens, pairs.filler((1, pairs.LEAD), 0.0, draw()), asked), 1))
        chosen = torch.cat([chunks.flatten(2, 3) for chunks in seen[2].choices], 2)[0, 0, 1024 + pairs.LEAD + 1 :: 3]
        places = [(tokens[0] == key).nonzero().item() // 8 for key in asked[0, 1::3]]
        shares[name] = (chosen == torch.tensor(places)[:, None]).any(1).double().mean()
    assert shares["max-8"] > 0.9 and shares["random"] < 0.2


# ---------------------------------------------------------------------------------------------------- pretrained models


def test_shares_of_what_attention_to_everything_gains(tmp_path: Path) -> None:
    """Bits per byte are added up over ranges of tokens; a share is that of the gain over the window."""
    for arm, nats in (("window", 4.0), ("all", 2.0), ("routed-mean", 2.5)):
        ranges = [{"from": at, "nats": nats * 100, "bytes": 200} for at in range(0, 1024, 512)]
        setup = {"experiment": "pretrained", "arm": arm, "book": "a book", "tokens": 1024, "options": {}}
        result = {"setup": setup, "ranges": ranges, "cpu_seconds": 1.0, "machine": {}}
        (tmp_path / f"pretrained.{arm}.a.json").write_text(json.dumps(result))
    results = {result["setup"]["arm"]: result for result in pretrained.load(tmp_path)}
    assert pretrained.bits(results["window"], 0, 1024) == pytest.approx(2 / math.log(2))
    assert pretrained.share(results, "routed-mean") == "75" and pretrained.share(results, "all") == ""
    assert "| 75 | 1 |" in "\n".join(pretrained.report(tmp_path))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "NAMES", ("no_such_package",))
    with pytest.raises(SystemExit, match="needs no_such_package"):
        pretrained.pretrained()


def test_losses_do_not_depend_on_the_pieces() -> None:
    model = random_model(replace(pairs.config(pairs.ARMS["max-8"], 64), max_seq_len=64)).float()
    tokens = torch.randint(pairs.NUM_TOKENS, (200,), generator=draw())
    whole, parts = (torch.tensor(pretrained.losses(model, tokens, piece)) for piece in (199, 37))
    assert len(whole) == 199
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
