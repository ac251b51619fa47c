"""The benchmark's own arithmetic: who is compared with what, what counts as an operator, the tables of the pages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import contestants, figures, limits, measure, pretrained, report, run
from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config

RESULTS = {
    "figures": {
        "train": {
            "title": "Training step", "quick": False, "command": "python -m benchmarks",
            "machine": {"processor": "X", "cores": 2, "flags": ["avx2"], "threads": 1, "device": "cpu", "torch": "2",
                        "python": "3", "commit": "abc", "date": "2026-01-01T00:00:00+00:00"},
            "cases": [
                measure.case("batch 1", {"ours": [1.0, 2.0, 4.0], "reference": [2.0, 4.0, 8.0], "peer": [3.0, 3.0, 3.0],
                                         "limit": [0.5, 1.0, 2.0]}, "s", {"other": "not installed"}),
                measure.case("nobody", {}, "s"),
            ],
        }
    }
}  # fmt: skip


def test_contestants_take_turns():
    """A B A B, after a warm-up of each; the time is that of one call."""
    order: list[str] = []
    times = measure.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, {"b": 2})
    assert "".join(order) == "ab" + "abb" * 3
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_ratios_are_those_of_pairs():
    entries = measure.case("x", {"ours": [1.0, 10.0, 4.0], "reference": [3.0, 10.0, 8.0]}, "s")["entries"]
    assert entries["reference"]["ratio"]["median"] == 2.0  # of 3, 1 and 2
    assert entries["ours"]["median"] == 4.0
    assert "ratio" not in entries["ours"]


def test_an_absent_contestant_is_a_note():
    def absent():
        raise measure.Unavailable("is not installed")

    case = measure.timed("x", {"ours": lambda: lambda: None, "peer": absent}, 2)
    assert list(case["entries"]) == ["ours"]
    assert case["notes"] == {"peer": "is not installed"}


def test_operators_are_counted_without_views():
    x, y = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
    assert measure.operators(lambda: x.detach().view(16)[:4].expand(2, 4).t() + 1) == 1
    assert measure.operators(lambda: x @ y) == 1
    assert measure.operators(lambda: (x @ y).sum().backward()) > 3  # those of the backward pass too


@pytest.mark.parametrize("options", [contestants.ENWIK8, contestants.SMALL])
def test_limit_holds_the_products_of_the_model(options):
    """As many multiplications as the linear maps of the model, forward, and twice that backward."""
    options = {**options, "dim": 32, "heads": 2, "dim_head": 16, "num_tokens": 32}
    config, batch, length = Config(**options), 2, options["max_seq_len"]
    products = limits.step_products(config, batch, length)
    total = sum(p.b * p.m * p.k * p.n * p.count for p in products)
    model = BlockRecurrentTransformer(config)
    blocks, expected = length // config.block_width, 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rows = batch * config.num_state_vectors * blocks if ".cell." in name else batch * length
            expected += 3 * rows * module.weight.numel()
    w, s, e, pairs = config.block_width, config.num_state_vectors, config.dim_head, batch * blocks * config.heads
    expected += 6 * pairs * e * (config.depth * w * 2 * w + w * s + s * s + s * w)
    assert total == expected


def test_tokens_read_stand_in_for_a_far_position():
    for position in (1, 1000, 2048, 1_000_000, 1_000_424):
        read = figures.enough(position, 512)
        assert read <= 4 * 512
        assert read % 512 == position % 512
        assert read == position or read >= 2 * 512


def test_ragged_reading_and_one_token():
    options = {**figures.TINY, "use_flash_attn": True}
    step = contestants.ours_token(options, 40, 3, ragged=True)
    logits, memories, _ = step()
    assert logits.shape == (3, 1, 256)
    assert len(set(memories.position.offset.tolist())) > 1
    assert torch.equal(step()[0], logits)


def test_table(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_page(page, report.markdown(RESULTS))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| batch 1 | 2 s | 4 s | 2.00 (2.00–2.00) | 0.50 (0.50–0.50) | peer 3 s (1.50 (1.12–2.25)) |" in text
    assert "nobody" not in text and "* other: not installed." in text and "commit abc" in text
    report.update_page(page, report.markdown(RESULTS))
    assert page.read_text() == text
    with pytest.raises(ValueError, match="must hold the lines"):
        page.write_text("nothing")
        report.update_page(page, "table")


def test_the_pages_hold_what_was_measured():
    """All of it in docs/benchmarks.md, six rows in the README."""
    results = json.loads(run.RESULTS.read_text(encoding="utf-8"))
    root = Path(__file__).resolve().parent.parent
    for page, table in ((root / "docs" / "benchmarks.md", report.markdown), (root / "README.md", report.summary)):
        text = page.read_text(encoding="utf-8")
        between = text.partition(f"{report.BEGIN}\n")[2].partition(f"\n{report.END}")[0]
        assert between == table(results), "python -m benchmarks table --update-docs"
    assert report.summary(results).count("\n| ") == 1 + len(report.SUMMARY)


def test_the_page_holds_what_was_measured_of_pretrained_models():
    results = json.loads(pretrained.RESULTS.read_text(encoding="utf-8"))
    text = (Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    between = text.partition("<!-- pretrained table: begin -->\n")[2].partition("\n<!-- pretrained table: end -->")[0]
    assert between == report.side_by_side(results), "python -m benchmarks.pretrained --table"
    assert list(results["figures"]) == list(pretrained.FIGURES)
    assert not any(figure["quick"] for figure in results["figures"].values())


def test_a_table_with_a_column_for_each_contestant():
    values = {"fp32": [1.0, 2.0, 4.0], "int8": [0.5, 1.0, 2.0]}
    cases = [pretrained.against_first("a token", values, "s"), pretrained.against_first("size", {"fp32": [8.0]}, "MiB")]
    lines = report.columns({"title": "Weights", "cases": cases})
    assert lines[0] == "| **Weights** | fp32 | int8 |"
    assert lines[2:] == ["| a token | 2 s | 1 s (0.50 (0.50–0.50)) |", "| size | 8 MiB |"]


def test_command(tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(RESULTS))
    run.main(["table", "--results", str(file)])
    assert "| batch 1 |" in capsys.readouterr().out
    assert "1.50 (1.12–2.25) × ours" in report.text("train", RESULTS["figures"]["train"])
    for wrong in (["--only", "train_enwik9"], ["profile"], ["table", "decode"]):
        with pytest.raises(SystemExit):
            run.main(wrong)
    with pytest.raises(SystemExit, match="not there yet"):
        run.main(["table", "--results", str(tmp_path / "none.json")])
