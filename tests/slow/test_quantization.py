"""Quantised weights through the real libraries, at any length: one token, within a block, several blocks, ragged rows.

The bounds are relative errors of logits, |quantised - fp32| / |fp32| over all of them, for random weights. Measured:
0.005 to 0.008 for int8 weights, 0.018 to 0.031 for int8 weights and activations, 0.078 to 0.115 for int4 weights.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "num_tokens": 96, "dim": 64, "depth": 3, "heads": 2, "dim_head": 32, "ff_dim": 128, "block_width": 8,
    "max_seq_len": 16, "num_state_vectors": 5, "recurrent_layers": (2,),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lstm": {"gate": "lstm"},
    "llama": {"positions": "rotary", "ff_activation": "swiglu", "norm": "rms", "kv_heads": 1, "recurrent_layers": (),
              "num_xl_blocks": 2, "extra_memories": {"sinks": {"tokens": 2}}},
}  # fmt: skip


def is_plain(module: nn.Module, name: str) -> bool:
    """Whether it is a linear map, but no gate's: these stay exact."""
    return type(module) is nn.Linear


def dynamic(model: BlockRecurrentTransformer) -> BlockRecurrentTransformer:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that torchao is to replace this
        return quantize_dynamic(model, {nn.Linear})


def int8(model: BlockRecurrentTransformer) -> BlockRecurrentTransformer:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao (pip install torchao)")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), is_plain)
    return model


def int4(model: BlockRecurrentTransformer) -> BlockRecurrentTransformer:
    """Its fast kernel on the CPU is one for bf16, and a prototype."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao (pip install torchao)")
    prototype = pytest.importorskip("torchao.prototype.quantization.int4", reason="needs torchao 0.18")
    quantization.quantize_(model.bfloat16(), prototype.PrototypeInt4WeightOnlyConfig(group_size=32), is_plain)
    return model


QUANTISERS: dict[str, tuple[Callable[[BlockRecurrentTransformer], BlockRecurrentTransformer], float]] = {
    "int8, torch's dynamic": (dynamic, 0.06), "int8, torchao": (int8, 0.02), "int4, torchao": (int4, 0.2),
}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def plain(request: pytest.FixtureRequest) -> BlockRecurrentTransformer:
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(**SIZES | VARIANTS[request.param]).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("to_out.weight"):
            parameter.normal_(std=0.1)  # so that the maps matter, and not the embedding alone
    return model


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def read(model: nn.Module, tokens: Tensor, pieces: list[int], **options: Any) -> Tensor:
    memories = states = None
    parts = []
    for piece in tokens.split(pieces, dim=1):
        logits, memories, states = model(piece, xl_memories=memories, states=states)
        parts.append(logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", QUANTISERS)
@torch.no_grad()
def test_outputs_are_near_those_of_fp32_at_any_length(plain: Any, kind: str, record_property: Any) -> None:
    quantise, bound = QUANTISERS[kind]
    small = quantise(copy.deepcopy(plain))
    maps = [name for name, module in plain.named_modules() if is_plain(module, name)]
    changed = [name for name in maps if type(small.get_submodule(name)) is not nn.Linear
               or type(small.get_submodule(name).weight) is not nn.Parameter]  # fmt: skip
    assert changed == maps
    tokens = torch.randint(SIZES["num_tokens"], (3, 45), generator=torch.Generator().manual_seed(1))
    whole = plain(tokens)[0]
    found = {n: error(small(tokens[:, :n])[0], whole[:, :n]) for n in (1, 5, 8, 24, 45)}
    found |= {f"one row of {n}": error(small(tokens[:1, :n])[0], whole[:1, :n]) for n in (1, 40)}
    found["in pieces"] = error(read(small, tokens, [1, 6, 1, 1, 20, 15, 1]), whole)
    lengths = torch.tensor([1, 22, 45])
    ragged, memories, states = small(tokens, lengths=lengths)
    found["ragged"] = error(ragged[1, :22], whole[1, :22])
    more = torch.stack([tokens[0, 1:10], tokens[1, 22:31], tokens[2, :9]])
    later = small(more, xl_memories=memories, states=states)[0]
    found["after ragged"] = max(error(later[0], whole[0, 1:10]), error(later[1], whole[1, 22:31]))
    print(kind, {name: round(value, 4) for name, value in found.items()})
    record_property("errors", found)
    assert 0 < max(found.values()) <= bound, found


@pytest.mark.parametrize("kind", QUANTISERS)
@torch.no_grad()
def test_decoding_goes_on_where_reading_stopped(plain: Any, kind: str) -> None:
    """Greedy, of one row and of rows of different lengths; in two calls what one call gives. Weights alone are a matter
    of each token: where only they are quantised, a row gives what it gives without the others."""
    small = QUANTISERS[kind][0](copy.deepcopy(plain))
    tokens = torch.randint(SIZES["num_tokens"], (2, 21), generator=torch.Generator().manual_seed(1))
    once = small.generate(tokens, max_new_tokens=20, temperature=0)
    first, memories, states = small.generate(
        tokens, max_new_tokens=9, temperature=0, return_memories_and_states=True
    )
    rest = small.generate(first[:, -1:], max_new_tokens=11, temperature=0, xl_memories=memories, states=states)
    assert torch.equal(torch.cat([first, rest], dim=1), once)
    ragged = small.generate([tokens[0], tokens[1, :5]], max_new_tokens=12, temperature=0)
    assert all(len(row) == 12 for row in ragged)
    if kind == "int8, torchao":
        assert torch.equal(small.generate(tokens[:1], max_new_tokens=20, temperature=0)[0], once[0])


@torch.no_grad()
def test_maps_of_gates_stay_exact() -> None:
    model = BlockRecurrentTransformer(**SIZES, gate="lstm").eval()
    small = int8(copy.deepcopy(model))
    own, before = (one.layers[1].cell.update.gate.to_forget.weight for one in (small, model))
    assert type(own) is nn.Parameter and torch.equal(own, before)
    assert type(small.layers[1].to_qkv.weight) is not nn.Parameter


@torch.no_grad()
def test_the_code_of_the_page_runs() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao (pip install torchao)")
    prototype = pytest.importorskip("torchao.prototype.quantization.int4", reason="needs torchao 0.18")
    text = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text(encoding="utf-8")
    page = text.partition("## Quantisation")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```py\n(.*?)^```", page, flags=re.S | re.M)
    names: dict[str, Any] = {"nn": nn, **vars(quantization), **vars(prototype)}
    names |= {name: BlockRecurrentTransformer(**SIZES).eval() for name in ("model", "other")}
    exec(code, names)
    for name in ("model", "other"):
        assert type(names[name].layers[0].to_qkv.weight) is not nn.Parameter
