"""The adapter in transformers itself: generate, pipelines, saving, Trainer."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers", reason="needs the extra [transformers]")

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, data  # noqa: E402
from block_recurrent_transformer_pytorch.adapters import export as exporting  # noqa: E402
from block_recurrent_transformer_pytorch.adapters import transformers as adapter  # noqa: E402
from block_recurrent_transformer_pytorch.adapters.transformers import (  # noqa: E402
    modeling_block_recurrent_transformer as modeling,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied, lstm, single": {"tie_embeddings": True, "gate": "lstm", "state_update": "single"},
    "compressed": {"use_compressed_mem": True, "compressed_mem_factor": 2},
    "feedback, relative bias": {"block_feedback": True, "positions": "t5", "qk_norm": "head"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def core(**options: Any) -> BlockRecurrentTransformer:
    """Weights so large that a wrong memory shows in the tokens."""
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(
        num_tokens=256, dim=16, depth=2, dim_head=8, heads=2, block_width=4, max_seq_len=8, **options
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def wrapped(variant: str = "default") -> Any:
    model = exporting.to_transformers(core(**VARIANTS[variant]))
    model.generation_config.pad_token_id = None
    return model


def ids(rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    core().save_pretrained(path / "native", tokenizer=data.ByteTokenizer())
    assert exporting.main([str(path / "native"), str(path / "exported")]) == 0
    return path / "exported"


# ------------------------------------------------------------------------------------------------------------- calls


@every_variant
def test_logits_and_greedy_tokens_are_the_models_own(variant: str) -> None:
    model, x = wrapped(variant), ids()
    assert torch.equal(model(x).logits, model.core(x)[0])
    new = model.generate(x, max_new_tokens=13, do_sample=False)[:, 11:]
    assert torch.equal(new, model.core.generate(x, max_new_tokens=13, temperature=0.0))


@every_variant
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}])
def test_generate_with_cache_gives_what_it_gives_without(variant: str, options: dict[str, Any]) -> None:
    model, x = wrapped(variant), ids()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(2)
        found.append(model.generate(x, max_new_tokens=13, use_cache=use_cache, **{"do_sample": False} | options))
    assert torch.equal(*found)


def test_beams_without_reordering_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = wrapped(), ids()
    right = model.generate(x, max_new_tokens=13, num_beams=3, do_sample=False)
    monkeypatch.setattr(adapter.BlockRecurrentCache, "reorder_cache", lambda self, rows: self)
    assert not torch.equal(right, model.generate(x, max_new_tokens=13, num_beams=3, do_sample=False))


@every_variant
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_rows_are_as_each_alone(variant: str, beams: int) -> None:
    model, lengths = wrapped(variant), [11, 6, 1]
    rows = [ids(3)[i, :n] for i, n in enumerate(lengths)]
    padded = torch.stack([torch.cat((torch.zeros(11 - len(row), dtype=torch.long), row)) for row in rows])
    mask = torch.tensor([[0] * (11 - n) + [1] * n for n in lengths])
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams}
    together = model.generate(padded, attention_mask=mask, **options)[:, 11:]
    for row, found in zip(rows, together):
        assert torch.equal(found, model.generate(row[None], **options)[0, len(row) :])


def test_padding_may_stand_anywhere() -> None:
    model, x = wrapped(), ids(1)
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[0, [0, 4, 5, 10]] = 0
    there = mask[0].bool()
    torch.testing.assert_close(model(x, attention_mask=mask).logits[:, there], model(x[:, there]).logits)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_goes_on_from_a_returned_cache(name: str) -> None:
    model, x = wrapped(), ids()
    whole = model.generate(x, max_new_tokens=12, do_sample=False)
    first = model.generate(x, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache = first[modeling.CACHE_NAME]
    kept = copy.deepcopy(cache)
    assert torch.equal(model.generate(first.sequences, max_new_tokens=7, do_sample=False, **{name: cache}), whole)
    beams = model.generate(first.sequences, max_new_tokens=7, num_beams=3, do_sample=False, **{name: kept})
    assert torch.equal(beams, model.generate(first.sequences, max_new_tokens=7, num_beams=3, do_sample=False))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_call_goes_on_from_a_cache(name: str) -> None:
    model, x = wrapped(), ids()
    out = model(x[:, :6])
    cache = out[modeling.CACHE_NAME]
    torch.testing.assert_close(model(x[:, 6:], **{name: cache}).logits, model(x).logits[:, 6:])


def test_prefill_in_chunks() -> None:
    model, x = wrapped(), ids()
    options = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(x, prefill_chunk_size=3, **options), model.generate(x, **options))


def test_soft_prompts_and_their_gradient() -> None:
    model, x = wrapped(), ids()
    embedded = model.get_input_embeddings()(x).detach().requires_grad_()
    out = model(inputs_embeds=embedded, labels=x)
    torch.testing.assert_close(out.loss, model(x, labels=x).loss)
    out.loss.backward()
    assert embedded.grad is not None and bool(embedded.grad.abs().sum(-1)[:, :-1].all())
    new = model.generate(inputs_embeds=embedded.detach(), max_new_tokens=7, do_sample=False)
    assert torch.equal(new, model.generate(x, max_new_tokens=7, do_sample=False)[:, 11:])


def test_hidden_states_lie_on_the_path_of_the_gradient() -> None:
    model, x = wrapped(), ids(2, 4)
    out = model(x, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.logits.sum().backward()
    assert all(hidden.grad is not None and hidden.grad.any() for hidden in out.hidden_states)
    torch.testing.assert_close(model.core.logits(out.hidden_states[-1]), out.logits)


def test_resizing_the_vocabulary() -> None:
    model, x = wrapped(), ids()
    before = model(x).logits
    model.resize_token_embeddings(300)
    assert model.config.vocab_size == model.core.config.num_tokens == 300
    torch.testing.assert_close(model(x).logits[..., :256], before)
    assert model(torch.full_like(x, 299)).logits.shape == (2, 11, 300)


def test_activation_checkpointing_gives_the_same_gradient() -> None:
    model, x = wrapped().train(), ids()
    found = []
    for enable in (False, True):
        getattr(model, "gradient_checkpointing_enable" if enable else "zero_grad")()
        model.zero_grad()
        model(x, labels=x).loss.backward()
        assert model.core.config.use_checkpointing is enable
        found.append(model.core.token_emb.weight.grad.clone())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(2, 1, 11, 11)}, "attention_mask must be"),
        ({"cache": transformers.DynamicCache()}, "must be a BlockRecurrentCache"),
        ({"inputs_embeds": torch.zeros(2, 11, 16)}, "either input_ids or inputs_embeds"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped()(ids(), **options)


def test_what_would_go_back_is_refused() -> None:
    model, x = wrapped(), ids(1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(x, max_new_tokens=5, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(x, max_new_tokens=5, assistant_model=wrapped())
    with pytest.raises(NotImplementedError, match="cannot go back"):
        adapter.BlockRecurrentCache().crop(3)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(x, max_new_tokens=5, cache_implementation="static")


# ------------------------------------------------------------------------------------------------ folders, tokenizers


def test_the_exported_folder(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    x = ids()
    assert torch.equal(model(x).logits[..., :256], core()(x)[0])
    assert bool((model(x).logits.log_softmax(-1)[..., 256:] < -1e30).all()) and model.config.vocab_size == 259
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    text = "".join(map(chr, range(0, 800, 3))) + "\n  two  spaces . 深い"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    begin = model(torch.tensor([[257, 5]])).logits
    assert torch.equal(begin, model(torch.tensor([[0, 5]])).logits)
    base = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(model.core.logits(base(x).last_hidden_state), model.core(x)[0])
    assert "generate" in (folder / "README.md").read_text()


def test_the_folder_loads_with_remote_code_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "assert 'block_recurrent_transformer_pytorch.adapters.transformers' not in sys.modules;"
        "print(m.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist())"
    )
    root = str(Path(__file__).parents[2])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = core().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, temperature=0.0)[0].tolist()
    assert done.stdout.strip().endswith(str(wanted))


def test_exporting_what_cannot_be(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exporting.main([str(folder.parent / "native"), str(folder)]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert exporting.main([str(tmp_path / "nothing"), str(tmp_path / "new")]) == 1
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_variant
def test_saving_in_shards_and_loading(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = wrapped(variant).to(dtype), ids()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, told = adapter.BlockRecurrentForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again(x).logits, model(x).logits)


def test_pipeline_batched_streamer_and_stop_strings(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": 9, "do_sample": False}
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["Once upon", "a", "The longest of the three"]
    together = [one[0]["generated_text"] for one in pipe(prompts, batch_size=3, **options)]
    assert together == [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts]
    x = tokenizer(prompts[0], return_tensors="pt")
    whole = model.generate(**x, **options)
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**x, **options, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(whole[0, x["input_ids"].shape[1] :])
    letters = [number for number, token in enumerate(whole[0].tolist()) if number >= 9 and 32 < token < 127]
    if not letters:
        pytest.fail("the seed gives no letter to stop at")
    stop = chr(whole[0, letters[0]])
    stopped = model.generate(**x, **options, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(stopped, whole[:, : letters[0] + 1])


# ------------------------------------------------------------------------------------------------------------ Trainer


def trainer(folder: Path, steps: int, **options: Any) -> Any:
    torch.manual_seed(3)
    text = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(4))
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, per_device_eval_batch_size=2, save_steps=3,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        weight_decay=0.0, max_grad_norm=0.0, optim="sgd", **options,
    )  # fmt: skip
    pieces = adapter.StreamDataset(text, rows=2, seq_len=6)
    return adapter.StreamTrainer(wrapped(), arguments, train_dataset=pieces, eval_dataset=pieces)


def test_trainer_carries_memories_as_a_loop_of_ones_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, 7)
    run.train()
    model, pieces, cache = wrapped().train(), run.train_dataset, adapter.BlockRecurrentCache()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(7):
        rows = [pieces[2 * step + row] for row in range(2)]
        x, y = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "shift_labels"))
        out = model(x, shift_labels=y, cache=cache, use_cache=True)
        cache = (out[modeling.CACHE_NAME]).detach()
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], weight)
    assert "eval_loss" in run.evaluate()


def test_trainer_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole", 20)  # more than an epoch
    whole.train()
    for checkpoint in ("checkpoint-3", "checkpoint-18"):
        resumed = trainer(tmp_path / "resumed", 20)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / checkpoint))
        assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters()))
    load = adapter.StreamTrainer._load_from_checkpoint

    def forgets(self: Any, *args: Any) -> None:
        load(self, *args)
        self.carried = {}

    monkeypatch.setattr(adapter.StreamTrainer, "_load_from_checkpoint", forgets)
    resumed = trainer(tmp_path / "forgets", 20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters()))


def test_trainer_refuses_another_batch_size(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(tmp_path, per_device_train_batch_size=3, report_to=[], use_cpu=True)
    pieces = adapter.StreamDataset(torch.arange(200), rows=2, seq_len=6)
    with pytest.raises(ValueError, match="rows=2, the batch size is 3"):
        adapter.StreamTrainer(wrapped(), arguments, train_dataset=pieces)
