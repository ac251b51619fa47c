"""Pretrained models of the Llama family in this architecture, and back.

A Llama is one of our models without recurrent layers whose window has not been left yet: the same numbers, to rounding.
Beyond the window it reads on at a flat cost, held together by sinks. New parts begin so that they change no number.

What is read is a model of transformers in memory, or a folder as transformers writes it (config.json and safetensors,
in one file or several), for which transformers need not be installed. Layout of a layer there and here:

    q_proj, k_proj, v_proj         to_qkv  [q ; q for each read ; k ; v]
    o_proj                         to_out  [o | 0 for each read]
    up_proj, gate_proj             feed_forward.hidden.to_hidden  [up ; gate]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer, TransformerBlock
from .config import Config
from .convert import Entries
from .pretrained import CONFIG, INDEX, StrPath, find_weights, read_json, read_shard, write, write_weights
from .rotary import SCALINGS, check_scaling

# model_type: what config.json means where it says nothing
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"use_sliding_window": False},
    "mistral": {"use_sliding_window": True, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "head_dim": 128},
    "smollm3": {
        "use_sliding_window": False, "rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4,
        "num_key_value_heads": 4,
    },
    "phi3": {"use_sliding_window": True, "original_max_position_embeddings": 4096},
}  # fmt: skip
NEEDED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps",
)  # fmt: skip
UNUSED = ("rotary_emb.inv_freq",)  # ends of names of old checkpoints: tables that follow from the config
ROUTED: dict[str, Any] = {  # what finds the most without training: docs/evidence.md
    "positions": "rotary", "operator": "top_k", "chunk_size": 8, "num_chosen": 32, "capacity": 65_536,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- reading


def from_llama(
    cls: type[BlockRecurrentTransformer], source: StrPath | nn.Module, *, block_width: int, num_xl_blocks: int,
    sink_tokens: int = 4, recurrent_layers: Sequence[int] = (), routed_layers: Sequence[int] = (),
    routed: Mapping[str, Any] = MappingProxyType({}), dtype: torch.dtype | None = None, **options: Any,
) -> BlockRecurrentTransformer:  # fmt: skip
    """See `BlockRecurrentTransformer.from_llama`."""
    content, weights, name = read_source(source)
    check_types(weights, name)
    theirs = options_of(content, window=block_width * (1 + num_xl_blocks), name=name)
    if given := sorted(options.keys() & theirs.keys()):
        raise ValueError(f"{', '.join(given)} follow from the pretrained model, and cannot be given")
    if sink_tokens < 0:
        raise ValueError(f"sink_tokens must be at least 0, not {sink_tokens}")
    sinks = {"sinks": {"tokens": sink_tokens}} if sink_tokens else {}
    own: dict[str, Any] = {
        "block_width": block_width, "num_xl_blocks": num_xl_blocks, "recurrent_layers": tuple(recurrent_layers),
        "max_seq_len": -(-1024 // block_width) * block_width if block_width > 0 else 1024, "use_flash_attn": True,
        "attn_dropout": float(content.get("attention_dropout") or 0),
    }  # fmt: skip
    if routed and not routed_layers:
        raise ValueError(f"routed={dict(routed)} is for routed_layers, and none were given")
    store = {"routed": {"layers": tuple(routed_layers), **ROUTED, **routed}} if routed_layers else {}
    options["extra_memories"] = sinks | store | options.get("extra_memories", {})
    config = Config(**theirs | own | options)
    entries = Entries({entry: moved_to(dtype, weights.pop(entry)) for entry in list(weights)}, name)  # not twice
    for layer in range(1, config.depth + 1):
        move_layer(entries, config, layer, is_fused=content["model_type"] == "phi3")
    move_ends(entries, config)
    entries.check_empty()
    ours = new_weights(config, entries.ours) | entries.ours
    return cls.from_weights(config, ours, name, entries.sources, take=True)


def begin_options(folder: Path) -> dict[str, Any]:
    """All options of `Config` with which a run begins that is given a folder and nothing else: what follows from it, a
    window of two blocks of 512 tokens, and four sinks.

    Raises:
        ValueError: a model that we cannot carry; names what of it.
    """
    content = read_json(folder / CONFIG)
    options = options_of(content, window=1, name=str(folder / CONFIG))  # the window is checked when it is known
    begin = {
        "block_width": 512, "num_xl_blocks": 1, "max_seq_len": 1024, "extra_memories": {"sinks": {"tokens": 4}},
        "recurrent_layers": (), "attn_dropout": float(content.get("attention_dropout") or 0),
    }  # fmt: skip
    found = asdict(Config(**options | begin))
    return found | {"recurrent_layers": [], "read_recurrent_layers": None}  # for whoever adds some


def load_weights(folder: Path, config: Config) -> tuple[Config, dict[str, Tensor]]:
    """Weights for a model of these options, of which those that follow from the pretrained model become what they are
    there. Errors as of `from_llama`."""
    theirs = options_of(read_json(folder / CONFIG), window=1, name=str(folder / CONFIG))
    own = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in theirs}
    model = BlockRecurrentTransformer.from_llama(folder, sink_tokens=0, **own)
    return model.config, model.state_dict()


def read_source(source: StrPath | nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The content of config.json, the weights by their names, and what errors call it."""
    if isinstance(source, nn.Module):
        config: Any = getattr(source, "config", None)
        if not hasattr(config, "to_dict"):
            raise ValueError(f"path_or_model must be a model of transformers, or a folder, not {type(source).__name__}")
        return config.to_dict(), dict(source.state_dict()), type(source).__name__
    folder = Path(source)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"path_or_model: {folder} {f'has no {CONFIG}' if folder.is_dir() else 'is no folder'}")
    content, weights = read_json(folder / CONFIG), dict[str, Tensor]()
    if not any((folder / name).is_file() for name in ("model.safetensors", INDEX)):
        found = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f", but {found}: have transformers load and save it as safetensors" if found else ""
        raise ValueError(f"path_or_model: {folder} has no model.safetensors and no {INDEX}{hint}")
    files = find_weights(folder)
    for file in dict.fromkeys(files.values()):
        weights |= read_shard(file, [name for name, place in files.items() if place == file])
    return content, weights, str(folder)


def check_types(weights: dict[str, Tensor], name: str) -> None:
    """Raises a ValueError if weights are quantised."""
    for entry, tensor in weights.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name}: {entry} is {tensor.dtype}, and quantised weights are not carried")


def moved_to(dtype: torch.dtype | None, tensor: Tensor) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def options_of(content: dict[str, Any], *, window: int, name: str = CONFIG) -> dict[str, Any]:
    """The options of `Config` that follow from a config.json of transformers.

    Args:
        content: of config.json.
        window: tokens that a token may see, itself included.
        name: what errors call it.

    Raises:
        ValueError: something that we cannot carry; names it.
    """
    family = content.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{name}: model_type {family!r} is not one of {sorted(FAMILIES)}")
    content = FAMILIES[family] | content
    if missing := [key for key in NEEDED if content.get(key) is None]:
        raise ValueError(f"{name}: the configuration lacks {', '.join(missing)}")
    for wrong, why in conflicts(content, window):
        if wrong:
            raise ValueError(f"{name}: {why}")
    depth, heads = content["num_hidden_layers"], content["num_attention_heads"]
    base, scaling = rotary_options(content, name)
    return {
        "num_tokens": content["vocab_size"], "dim": content["hidden_size"], "depth": depth, "heads": heads,
        "dim_head": content.get("head_dim") or content["hidden_size"] // heads,
        "kv_heads": content.get("num_key_value_heads") or heads, "ff_dim": content["intermediate_size"],
        "ff_activation": "swiglu", "positions": "rotary", "rotary_base": base, "rotary_scaling": scaling,
        "unrotated_layers": unrotated_layers(content), "norm": "rms", "norm_eps": float(content["rms_norm_eps"]),
        "tokens_qk_norm": "rms" if family == "qwen3" else "none", "logit_scale": 1.0,
        "qkv_bias": family == "qwen2" or bool(content.get("attention_bias")),
        "tie_embeddings": bool(content.get("tie_word_embeddings")),
    }  # fmt: skip


def conflicts(content: dict[str, Any], window: int) -> list[tuple[bool, str]]:
    """What a model of a known family may have, and we cannot carry."""
    sliding = content.get("sliding_window") if content["use_sliding_window"] else None
    kinds = sorted(set(content.get("layer_types") or ()) - {"full_attention", "sliding_attention"})
    dropped = [name for name in ("resid_pdrop", "embd_pdrop") if content.get(name)]
    activation, biased = content.get("hidden_act", "silu"), [n for n in ("mlp_bias",) if content.get(n)]
    return [
        (activation not in ("silu", "swish"), f"hidden_act {activation!r} is not 'silu'"),
        (sliding is not None and sliding < window,
         f"sliding_window={sliding} is less than the {window} tokens that a token sees with this block_width and "
         "num_xl_blocks: windows of single layers are not carried, take a window of at most that"),
        (bool(kinds), f"layer_types {kinds} are not carried"),
        (bool(dropped), f"{', '.join(dropped)}: dropout of residuals is not carried"),
        (bool(biased), f"{', '.join(biased)}: a bias of the feed-forward is not carried"),
    ]  # fmt: skip


def rotary_options(content: dict[str, Any], name: str) -> tuple[float, dict[str, Any]]:
    """Base and scaling of rotary positions, from rope_parameters, or from rope_theta and rope_scaling before those."""
    given = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{name}: rope_parameters of single layers are not carried: {sorted(given)}")
    scaling = {key: value for key, value in given.items() if value is not None}
    base = scaling.pop("rope_theta", content.get("rope_theta", 10000.0))
    partial = scaling.pop("partial_rotary_factor", content.get("partial_rotary_factor") or 1.0)
    if partial != 1:
        raise ValueError(f"{name}: partial_rotary_factor={partial}: all channels are rotated here, or none")
    kind = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", kind)
    if kind == "default":
        return float(base), {}
    if kind not in SCALINGS or (kind == "yarn" and content["model_type"] == "phi3"):  # which means longrope there
        raise ValueError(f"{name}: rope_type {kind!r} is not one of {['default', *sorted(SCALINGS)]}")
    if kind == "linear":
        scaling.pop("original_max_position_embeddings", None)
    else:
        trained = content.get("original_max_position_embeddings")
        trained = trained or scaling.get("original_max_position_embeddings") or content.get("max_position_embeddings")
        scaling["original_max_position_embeddings"] = trained
        if kind == "yarn" and "factor" not in scaling and trained:
            scaling["factor"] = content.get("max_position_embeddings", trained) / trained
    scaling = {"rope_type": kind, **scaling}
    try:
        check_scaling(scaling)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return float(base), scaling


def unrotated_layers(content: dict[str, Any]) -> tuple[int, ...]:
    """SmolLM3's layers without positions."""
    if content["model_type"] != "smollm3":
        return ()
    depth, interval = content["num_hidden_layers"], content["no_rope_layer_interval"]
    rotated = content.get("no_rope_layers")  # 1 where there are positions
    if rotated is None:
        rotated = [layer % interval for layer in range(1, depth + 1)]
    return tuple(layer for layer, has_rope in enumerate(rotated[:depth], start=1) if not has_rope)


# ------------------------------------------------------------------------------------------------------------- weights


def move_layer(entries: Entries, config: Config, layer: int, is_fused: bool) -> None:
    """The weights of one layer, from 1."""
    theirs, ours = f"model.layers.{layer - 1}.", f"layers.{layer - 1}."
    inner, shared, dim = config.heads * config.dim_head, config.kv_heads * config.dim_head, config.dim
    reads = len(config.reads(layer))
    if is_fused:
        split(entries, f"{theirs}self_attn.qkv_proj.weight", f"{theirs}self_attn.%s_proj.weight",
              {"q": inner, "k": shared, "v": shared})  # fmt: skip
        split(entries, f"{theirs}mlp.gate_up_proj.weight", f"{theirs}mlp.%s_proj.weight",
              {"gate": config.ff_dim, "up": config.ff_dim})  # fmt: skip
    shapes = {"q": inner, "k": shared, "v": shared}
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        sources = {x: f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv"}
        axes = {name: (shapes[x], dim) if kind == "weight" else (shapes[x],) for x, name in sources.items()}
        entries.check_shapes(cast(Any, axes))
        q, k, v = (entries.take(name) for name in sources.values())
        entries.put(f"{ours}to_qkv.{kind}", torch.cat([q] * (1 + reads) + [k, v]), *sources.values())
    entries.check_shapes({f"{theirs}self_attn.o_proj.weight": (dim, inner)})
    o = entries.take(f"{theirs}self_attn.o_proj.weight")
    o = torch.cat([o] + [torch.zeros_like(o)] * reads, dim=1)
    entries.put(f"{ours}to_out.weight", o, f"{theirs}self_attn.o_proj.weight")
    hidden = {f"{theirs}mlp.{x}_proj.weight": (config.ff_dim, dim) for x in ("up", "gate")}
    entries.join(hidden, f"{ours}feed_forward.hidden.to_hidden.weight")
    entries.move(f"{theirs}mlp.down_proj.weight", f"{ours}feed_forward.to_out.weight")
    entries.move(f"{theirs}input_layernorm.weight", f"{ours}norm.weight")
    entries.move(f"{theirs}post_attention_layernorm.weight", f"{ours}feed_forward.norm.weight")
    if config.tokens_qk_norm == "rms":
        for x in "qk":
            entries.move(f"{theirs}self_attn.{x}_norm.weight", f"{ours}heads_norm.{x}_scale")


def split(entries: Entries, name: str, names: str, rows: dict[str, int]) -> None:
    """A map that Phi-3 keeps in one, as the several that others have."""
    total = sum(rows.values())
    if entries.matrix(name).shape[0] != total:
        raise ValueError(f"{entries.argument}: {name} has {entries[name].shape[0]} rows, not {total}")
    for part, value in zip(rows, torch.split(entries.take(name), list(rows.values()))):
        entries.left[names % part] = value


def move_ends(entries: Entries, config: Config) -> None:
    """Embedding, last norm, output; what nobody uses goes."""
    entries.move("model.embed_tokens.weight", "token_emb.weight")
    entries.move("model.norm.weight", "norm.weight")
    if config.tie_embeddings:
        entries.left.pop("lm_head.weight", None)  # state dicts hold it all the same
    else:
        entries.move("lm_head.weight", "to_logits.weight")
    for name in [name for name in entries.left if name.endswith(UNUSED)]:
        del entries.left[name]


def new_weights(config: Config, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Initial values of what a pretrained model has not, a layer at a time, like `known`."""
    with torch.device("meta"):
        wanted = BlockRecurrentTransformer(config).state_dict()
    layers = sorted({int(name.split(".")[1]) for name in wanted if name not in known and name.startswith("layers.")})
    found: dict[str, Tensor] = {}
    for index in layers:
        block = TransformerBlock(config, index + 1).state_dict()
        names = {f"layers.{index}.{name}": value for name, value in block.items()}
        found |= {name: value.to(known["token_emb.weight"]) for name, value in names.items() if name not in known}
    return found


# ------------------------------------------------------------------------------------------- what is new, for training


def new_parameters(model: BlockRecurrentTransformer) -> dict[str, nn.Parameter]:
    """The parameters that a pretrained model did not have, by name: of states, compressors, extra memories.

    In layers that read a state `to_qkv` and `to_out` are among them: they hold the queries of the reads and the columns
    through which these act, beside what is pretrained (`freeze_pretrained`).
    """
    found: dict[str, nn.Parameter] = {}
    for number in range(1, model.config.depth + 1):
        layer = model.layer(number)
        parts = ["cell.", "read_norm.", "compressor.", "extra."]
        parts += ["to_qkv.", "to_out."] if model.config.reads(number) else []
        prefix = f"layers.{number - 1}."
        found |= {prefix + name: p for name, p in layer.named_parameters() if name.startswith(tuple(parts))}
    return found


def freeze_pretrained(model: BlockRecurrentTransformer) -> dict[str, nn.Parameter]:
    """Leaves only the new parameters to be trained, and returns them by name.

    Of the maps that are part new, the gradient of the pretrained part is zero, and `optim.parameter_groups` does not
    let them decay: that part stays what it is. Deep copies lose this; moving a model does not.
    """
    found = new_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found)
    inner = model.config.heads * model.config.dim_head
    for number in range(1, model.config.depth + 1):
        layer, size = model.layer(number), inner * len(model.config.reads(number))
        if not size:
            continue
        for part, axis in ((layer.to_qkv, 0), (layer.to_out, 1)):
            for parameter in part.parameters():
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
                hook = partial(only, axis=axis, first=inner, size=size)
                parameter.register_hook(hook)  # type: ignore[no-untyped-call]
    return found


def only(gradient: Tensor, axis: int, first: int, size: int) -> Tensor:
    """A gradient that is zero but in a part of one axis."""
    out = torch.zeros_like(gradient)
    out.narrow(axis, first, size).copy_(gradient.narrow(axis, first, size))
    return out


# --------------------------------------------------------------------------------------------------------- and back


def to_llama(model: BlockRecurrentTransformer, path: StrPath, *, max_position_embeddings: int | None = None) -> None:
    """Writes a model without recurrent layers as a folder that transformers loads, with equal logits within the window.

    Args:
        path: the folder; its config.json and weights are replaced.
        max_position_embeddings: what config.json says; default the tokens that a token of this model sees.

    Raises:
        ValueError: an option that no family has; names it.
        OSError: the folder cannot be written.
    """
    config, folder = model.config, Path(path)
    family = family_of(config)
    window = config.block_width * (1 + config.num_xl_blocks)
    content = config_json(config, family, max_position_embeddings or window)
    content["dtype"] = content["torch_dtype"] = str(model.token_emb.weight.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / CONFIG, folder / INDEX, *folder.glob("model*.safetensors")):
        stale.unlink(missing_ok=True)
    write_weights(folder, weights_there(model), 5 * 10**9)
    write(folder / CONFIG, json.dumps(content, indent=2).encode() + b"\n")


def weights_there(model: BlockRecurrentTransformer) -> dict[str, Tensor]:
    """The weights of a model without recurrent layers, by the names that they have in transformers."""
    config, own = model.config, model.state_dict()
    inner, shared = config.heads * config.dim_head, config.kv_heads * config.dim_head
    theirs = {"model.embed_tokens.weight": own["token_emb.weight"], "model.norm.weight": own["norm.weight"]}
    if not config.tie_embeddings:
        theirs["lm_head.weight"] = own["to_logits.weight"]
    names = {
        "input_layernorm": "norm", "post_attention_layernorm": "feed_forward.norm", "self_attn.o_proj": "to_out",
        "mlp.down_proj": "feed_forward.to_out",
    }
    for n in range(config.depth):
        there, here = f"model.layers.{n}.", f"layers.{n}."
        theirs |= {f"{there}{name}.weight": own[f"{here}{ours}.weight"] for name, ours in names.items()}
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = torch.split(own[f"{here}to_qkv.{kind}"], [inner, shared, shared])
            theirs |= {f"{there}self_attn.{x}_proj.{kind}": part.clone() for x, part in zip("qkv", parts)}
        up, gate = own[f"{here}feed_forward.hidden.to_hidden.weight"].chunk(2)
        theirs |= {f"{there}mlp.up_proj.weight": up.clone(), f"{there}mlp.gate_proj.weight": gate.clone()}
        if config.qk_norm_of_tokens(n + 1) == "rms":
            theirs |= {f"{there}self_attn.{x}_norm.weight": own[f"{here}heads_norm.{x}_scale"] for x in "qk"}
    return theirs


def family_of(config: Config) -> str:
    """The model_type that has the options of a config."""
    of_tokens = {config.qk_norm_of_tokens(layer) for layer in range(1, config.depth + 1)}
    scale = config.logit_scale or (config.dim**-0.5 if config.tie_embeddings else 1.0)
    has_weights = config.extra_memories.get("routed", {}).get("summary") == "gate"
    further = sorted(set(config.extra_memories) - ({"sinks"} if has_weights else {"sinks", "routed"}))
    wanted = {"positions": "rotary", "ff_activation": "swiglu", "norm": "rms", "empty_memory": "masked",
              "attention_window": "blocks", "enhanced_recurrence": False, "use_compressed_mem": False}  # fmt: skip
    wrong = [f"{name}={getattr(config, name)!r}" for name, value in wanted.items() if getattr(config, name) != value]
    wrong += [f"recurrent_layers={config.recurrent_layers}"] if config.recurrent_layers else []
    wrong += [f"extra_memories={further}"] if further else []
    wrong += [f"logit_scale={scale}"] if scale != 1 else []
    wrong += [f"tokens_qk_norm={sorted(of_tokens)}"] if of_tokens not in ({"none"}, {"rms"}) else []
    if wrong:
        raise ValueError(f"model cannot go to transformers, where no Llama has {', '.join(wrong)}")
    has = {"qwen3": of_tokens == {"rms"}, "qwen2": config.qkv_bias, "smollm3": bool(config.unrotated_layers)}
    families = [name for name, present in has.items() if present] or ["llama"]
    if len(families) > 1:
        raise ValueError(
            "model cannot go to transformers, where no Llama has all of these: "
            f"tokens_qk_norm={sorted(of_tokens)}, qkv_bias={config.qkv_bias}, "
            f"unrotated_layers={config.unrotated_layers}"
        )
    if families[0] != "qwen3" and config.dim % config.heads:
        raise ValueError(f"model cannot go to transformers: dim={config.dim} is not a multiple of heads={config.heads}")
    return families[0]


def config_json(config: Config, family: str, max_position_embeddings: int) -> dict[str, Any]:
    """What transformers reads of it, before its version 5 (rope_theta, rope_scaling) and since."""
    classes = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
    rotary = {"rope_type": "default", **config.rotary_scaling}
    content = {
        "architectures": [f"{classes[family]}ForCausalLM"], "model_type": family, "vocab_size": config.num_tokens,
        "hidden_size": config.dim, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.dim_head, "intermediate_size": config.ff_dim,
        "hidden_act": "silu", "rms_norm_eps": config.norm_eps or 1e-6, "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attn_dropout, "attention_bias": False, "mlp_bias": False,
        "max_position_embeddings": max_position_embeddings, "use_sliding_window": False,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,  # for a tokenizer to say
        "rope_theta": config.rotary_base, "rope_scaling": config.rotary_scaling or None,
        "rope_parameters": {"rope_theta": config.rotary_base, **rotary},
    }  # fmt: skip
    if family == "smollm3":
        content["no_rope_layers"] = [int(n not in config.unrotated_layers) for n in range(1, config.depth + 1)]
    return content
