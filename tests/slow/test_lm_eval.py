"""The adapter in lm-evaluation-harness itself, offline."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="needs the extra [lm-eval]")

from lm_eval.api.instance import Instance  # noqa: E402

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, data  # noqa: E402
from block_recurrent_transformer_pytorch.adapters.lm_eval import BlockRecurrentLM  # noqa: E402

TEXTS = ["one of many blocks of text, é " * 9, "b", "a text of middling length " * 3, ""]
LAUNCHER = "block_recurrent_transformer_pytorch.adapters.lm_eval"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(
        num_tokens=256, dim=16, depth=2, dim_head=8, heads=2, block_width=4, max_seq_len=8
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    path = tmp_path_factory.mktemp("lm") / "model"
    model.save_pretrained(path, tokenizer=data.ByteTokenizer())
    return path


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def log_probabilities(folder: Path, text: str) -> torch.Tensor:
    """Of every byte, in one call of the model over all of the text."""
    model = BlockRecurrentTransformer.from_pretrained(folder)
    ids = torch.tensor([[0, *text.encode()]])
    found: torch.Tensor = model(ids[:, :-1])[0].log_softmax(-1)[0].gather(1, ids[0, 1:, None])[:, 0].detach()
    return found


@pytest.mark.parametrize("segment", [None, 1, 7, 64, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rolling_does_not_depend_on_segments(folder: Path, segment: int | None, batch_size: int) -> None:
    model = BlockRecurrentLM(str(folder), segment=segment, batch_size=batch_size)
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", *((text,) for text in TEXTS)), True)
    wanted = [float(log_probabilities(folder, text).sum()) if text else 0.0 for text in TEXTS]
    assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihood(folder: Path, batch_size: int) -> None:
    model = BlockRecurrentLM(str(folder), batch_size=batch_size)
    pairs = [(TEXTS[0], " and more"), ("", "x"), ("b", TEXTS[2]), (TEXTS[2][:-1], "x")]
    new = model.model.generate(model.after_0(list(b"Once"))[None], max_new_tokens=1, temperature=0.0)
    if int(new) < 128:
        pairs.append(("Once", chr(int(new))))
    found = model.loglikelihood(instances("loglikelihood", *pairs), True)
    for (context, text), (value, greedy) in zip(pairs, found):
        own = log_probabilities(folder, context + text)[len(context.rstrip().encode()) :]  # the harness moves spaces
        assert value == pytest.approx(float(own.sum()), abs=1e-9)
        assert greedy is (context == "Once")


def test_generate_until(folder: Path) -> None:
    model = BlockRecurrentLM(str(folder), batch_size=2)
    prompts = ["Once", "a longer one than that", "b"]
    free = model.generate_until(instances("generate_until", *((one, {"max_gen_toks": 40}) for one in prompts)), True)
    for prompt, text in zip(prompts, free):
        ids = model.model.generate(model.after_0(list(prompt.encode()))[None], max_new_tokens=40, temperature=0.0)
        assert text == bytes(ids[0].tolist()).decode("utf-8", "replace")
    stop = free[0][5]
    options = {"until": [stop], "max_gen_toks": 40}
    found = model.generate_until(instances("generate_until", *((one, options) for one in prompts)), True)
    assert found == [text.split(stop)[0] for text in free]
    with pytest.raises(ValueError, match="num_beams"):
        model.generate_until(instances("generate_until", ("a", {"num_beams": 3})), True)


def test_bad_options_are_named(folder: Path) -> None:
    if not torch.cuda.is_available():  # the harness asks for a GPU that is not there
        with pytest.warns(UserWarning, match="device='cuda:0' is not there"):
            BlockRecurrentLM(str(folder), device="cuda:0")
    with pytest.raises(ValueError, match="batch_size='auto'"):
        BlockRecurrentLM(str(folder), batch_size="auto")


def test_the_command_line_gives_the_bits_per_byte_of_the_model(folder: Path, tmp_path: Path) -> None:
    texts = [text for text in TEXTS if text]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": "own_text", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}, "doc_to_text": "",
        "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    (tmp_path / "own_text.yaml").write_text(json.dumps(task))
    command = [
        sys.executable, "-m", LAUNCHER, "run", "--model", "block-recurrent", "--model_args",
        f"path={folder},segment=7", "--tasks", "own_text", "--include_path", str(tmp_path), "--batch_size", "2",
        "--output_path", str(tmp_path / "out.json"),
    ]  # fmt: skip
    root = str(Path(__file__).parents[2])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = tmp_path.glob("out*.json")
    found = json.loads(result.read_text())["results"]["own_text"]["bits_per_byte,none"]
    nats = -sum(float(log_probabilities(folder, text).sum()) for text in texts)
    assert found == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), abs=1e-6)
