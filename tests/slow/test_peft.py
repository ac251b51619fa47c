"""Low-rank adapters through PEFT: on every linear map, with carried memories, merged, saved, and in train.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, checkpoint, detach, lora  # noqa: E402
from block_recurrent_transformer_pytorch.commands import evaluate, generate, train  # noqa: E402

peft = pytest.importorskip("peft", reason="needs peft (pip install peft)")
pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "num_tokens": 61, "dim": 32, "depth": 4, "heads": 2, "dim_head": 16, "block_width": 8, "max_seq_len": 16,
    "num_state_vectors": 5, "recurrent_layers": (2, 3),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lstm, compressed": {"gate": "lstm", "use_compressed_mem": True},
    "dual": {"state_update": "dual"},
    "llama": {"positions": "rotary", "ff_activation": "swiglu", "norm": "rms", "kv_heads": 1, "qkv_bias": True,
              "num_xl_blocks": 2, "extra_memories": {"sinks": {"tokens": 2}}},
    "token-gated": {"state_update": "token_gated", "gate": "hard"},
    "tied": {"tie_embeddings": True},
}  # fmt: skip


def adapted(variant: str) -> Any:
    """A model with an adapter beside each of its linear maps, the head included, and what PEFT makes of it."""
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(**SIZES | VARIANTS[variant])
    maps = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=maps)), maps


def tokens_of(n: int, seed: int = 1) -> Tensor:
    return torch.randint(SIZES["num_tokens"], (3, n), generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, steps: int = 6) -> list[float]:
    """Losses of some steps, each of which begins with the memories and states of the one before."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    memories = states = None
    losses = []
    for step in range(steps):
        x = tokens_of(22, seed=step % 2)
        loss, memories, states = model(x, xl_memories=memories, states=states, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        memories, states = detach(memories), detach(states)
        losses.append(loss.item())
    return losses


def read(model: nn.Module) -> Tensor:
    """Logits of a text in pieces, over several blocks."""
    memories = states = None
    parts = []
    with torch.no_grad():
        for piece in tokens_of(45).split([1, 20, 3, 21], dim=1):
            logits, memories, states = model(piece, xl_memories=memories, states=states)
            parts.append(logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_on_every_map_are_trained_merged_and_saved(variant: str, tmp_path: Path) -> None:
    model, maps = adapted(variant)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = trained(model)
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    adapters = [name for name in before if ".lora_B." in name]
    assert moved == {name for name in before if "lora_" in name} and len(adapters) == len(maps)
    model.eval()
    expected = read(model)

    model.save_pretrained(tmp_path)
    plain = BlockRecurrentTransformer(**SIZES | VARIANTS[variant])
    plain.load_state_dict({name.removeprefix("base_model.model.").replace(lora.BASE, "."): value
                           for name, value in before.items() if "lora_" not in name}, strict=False)  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.allclose(read(loaded), expected, atol=1e-5)

    merged = model.merge_and_unload()
    assert type(merged) is BlockRecurrentTransformer and not any("lora" in name for name, _ in merged.named_modules())
    assert torch.allclose(read(merged), expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(read(BlockRecurrentTransformer.from_pretrained(tmp_path / "merged")), read(merged))


def test_our_merging_is_that_of_peft() -> None:
    model, _ = adapted("lstm, compressed")
    trained(model)
    weights = {name.removeprefix("base_model.model."): value.clone() for name, value in model.state_dict().items()}
    lora.merge(weights)
    expected = model.merge_and_unload().state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in expected.items())


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bound on what merging changes."""
    page = (ROOT / "docs" / "how-to.md").read_text(encoding="utf-8").partition("## Adapters")[2]
    code = page.partition("```py\n")[2].partition("```")[0]
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(**SIZES).eval()
    names: dict[str, Any] = {"model": model, "tokens": tokens_of(20), "nn": nn, "peft": peft}
    expected = read(model)
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert torch.allclose(read(names["plain"]), expected, atol=1e-5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------ train.py

SMALL = [
    *("--dim", "16", "--depth", "3", "--heads", "2", "--dim-head", "8", "--block", "4", "--segment", "8"),
    *("--states", "3", "--recurrent-layers", "2", "--preset", "tiny", "--batch", "2", "--steps", "4", "--lr", "0.01"),
    *("--warmup", "0", "--valid-every", "4", "--valid-batches", "1", "--final-batches", "1"),
    *("--checkpoint-every", "1", "--sample", "5", "--device", "cpu", "--precision", "fp32"),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setattr(train, "draw_curve", lambda folder: "curve.png")
    (tmp_path / "text.txt").write_text("In the beginning was the word, and the word was short. " * 40)
    shared = ["--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "cache")]

    def start(name: str, *flags: str, base: list[str] = SMALL) -> tuple[int, str]:
        status = train.main([*base, *shared, "--out", str(tmp_path / name), *flags])
        out = capsys.readouterr()
        return status, out.out + out.err

    return start


def model_of(folder: Path) -> dict[str, Tensor]:
    return checkpoint.load_latest(folder / "checkpoints", only=["model"]).tensors["model"]


def test_a_run_with_adapters(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only adapters move and have an optimizer's state; after Ctrl-C it goes on to the same bytes; all commands read
    it, and a new run begins with what it became."""
    run("base")
    flags = ["--init", str(tmp_path / "base"), "--lora-rank", "2"]
    status, told = run("whole", *flags)
    assert status == 0 and "are trained" in told
    own, base = model_of(tmp_path / "whole"), model_of(tmp_path / "base")
    assert all(torch.equal(own[name], base[name.replace(lora.BASE, ".")]) for name in own if "lora_" not in name)
    saved = checkpoint.load_latest(tmp_path / "whole" / "checkpoints", only=["optimizer"]).tensors["optimizer"]
    with_state = {name for name, state in saved.items() if state}
    assert with_state == {name for name in own if "lora_" in name} and len(with_state) > 20
    assert not any("to_logits" in name for name in with_state)  # the head is no target unless it is named

    backward = train.backward

    def interrupted(run: Any, *rest: Any) -> Tensor:
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return backward(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", interrupted)
        assert run("cut", *flags)[0] == 128 + signal.SIGINT
    assert train.main(["--resume", str(tmp_path / "cut"), "--device", "cpu"]) == 0
    last = [checkpoint.checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut")]
    for file in sorted(path.name for path in last[0].iterdir()):
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes(), file

    merged = dict(own)
    lora.merge(merged)
    read = BlockRecurrentTransformer.from_pretrained(tmp_path / "whole", checkpoint="last").state_dict()
    assert all(torch.equal(read[name], merged[name]) for name in read)
    assert not torch.equal(read["layers.0.to_qkv.weight"], base["layers.0.to_qkv.weight"])
    assert generate.main([str(tmp_path / "whole"), "--prompt", "In", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert evaluate.main([str(tmp_path / "whole"), "--device", "cpu"]) == 0
    run("next", "--init", str(tmp_path / "whole"), "--lr", "0")
    assert all(torch.equal(read[name], value) for name, value in model_of(tmp_path / "next").items())


def test_adapters_beside_what_is_trained_itself(run: Any, tmp_path: Path) -> None:
    run("base")
    flags = ["--init", str(tmp_path / "base"), "--lora-rank", "2", "--lora-targets", "layers.*.to_qkv", "to_logits"]
    assert run("a", *flags, "--train-only", "layers.1.*", "*norm.weight")[0] == 0
    own, base = model_of(tmp_path / "a"), model_of(tmp_path / "base")
    moved = {name for name, value in own.items() if "lora_" in name or not torch.equal(value, base.get(name, value))}
    assert {name.partition(".lora_")[0] for name in moved if "lora_" in name} == {
        "layers.0.to_qkv", "layers.2.to_qkv", "to_logits"
    }  # fmt: skip
    whole = {name for name in moved if "lora_" not in name}
    assert whole and all(name.startswith("layers.1.") or name.endswith("norm.weight") for name in whole)


def test_other_adapters_than_the_run_has_are_refused(run: Any, tmp_path: Path) -> None:
    run("a", "--lora-rank", "2")
    status, told = run("a", "--resume", "--lora-rank", "3")
    assert status == 2 and "--lora-rank 3: the run in" in told and "has other adapters, or none" in told


def test_a_dry_run_counts_adapters(run: Any) -> None:
    def optimizer(*flags: str) -> float:
        _, told = run("a", "--dim", "256", "--dry-run", *flags)
        return float(told.partition("memory of gradients and optimizer: ")[2].split()[0])

    assert optimizer("--lora-rank", "2") < optimizer() / 20
