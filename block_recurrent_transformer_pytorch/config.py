"""Sizes and options of a model, what follows from them, and the names under which gates and memories are registered."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable

from .rotary import check_scaling

if TYPE_CHECKING:
    Count: TypeAlias = int
    Layers: TypeAlias = tuple[int, ...]
else:  # None may be given, and is replaced by what it stands for
    Count, Layers = int | None, tuple[int, ...] | None

GATES: dict[str, Any] = {}  # gates of the recurrent cell, by the name that `Config.gate` gives
MEMORIES: dict[str, Any] = {}  # kinds of memory, by the names in `Config.extra_memories`

NEWER: dict[str, Any] = {  # options that came after the first fingerprints, which are without them at these values
    "extra_memories": {}, "gate_options": {}, "qkv_bias": False, "rotary_base": 10000.0, "rotary_scaling": {},
    "unrotated_layers": (), "norm_eps": None, "tokens_qk_norm": None, "logit_scale": None,
    "compressed_mem_pooling": "conv",
}  # fmt: skip

Class = TypeVar("Class", bound=type)


def register_gate(name: str) -> Callable[[Class], Class]:
    """Makes a subclass of `Gate` available as `Config(gate=name)`; see docs/how-to.md for an example."""
    return _registrar(GATES, "gate", name)


def register_memory(name: str) -> Callable[[Class], Class]:
    """Makes a subclass of `MemoryKind` available in `Config(extra_memories={name: {...}})`; see docs/how-to.md."""
    return _registrar(MEMORIES, "memory", name)


def _registrar(registry: dict[str, Any], what: str, name: str) -> Callable[[Class], Class]:
    def register(cls: Class) -> Class:
        known = registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{what} {name!r} is registered already, as {known.__module__}.{known.__qualname__}")
        registry[name] = cls
        return cls

    return register


class DerivedCount(int):
    """A count that followed from other options: `dataclasses.replace` derives it anew."""


class DerivedLayers(tuple[int, ...]):
    """Layers that followed from other options: `dataclasses.replace` derives them anew."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and options of a model. Frozen; `asdict` of it is its config.json, `Config.from_dict` reads that back.

    The defaults are those of block-recurrent-transformer-pytorch 0.4.4. Layers are numbered from 1. None is replaced by
    what follows from the other options, and `dataclasses.replace` derives that anew: with depth=12 instead of 6 the
    layers with a memory are 1 to 12.

    Raises:
        ValueError: a value of the wrong type or out of range, or two options that cannot be combined.
    """

    # sizes
    num_tokens: int  # vocabulary
    dim: int
    depth: int
    dim_head: int = 64
    heads: int = 8
    kv_heads: int = 1  # key/value heads, each shared by heads / kv_heads query heads
    ff_mult: float = 4  # hidden size: dim * ff_mult, times 2/3 with a gate (three matrices instead of two)
    ff_dim: Count = None  # type: ignore[assignment]  # the hidden size itself, instead of ff_mult
    ff_activation: Literal["geglu", "swiglu", "relu"] = "geglu"
    qkv_bias: bool = False  # of the tokens' queries (those of reads included), keys and values
    # the stream
    max_seq_len: int = 1024  # default segment of the training wrapper; no limit on calls
    block_width: int = 512
    num_xl_blocks: int = 1  # complete blocks whose keys and values a layer keeps
    xl_layers: Layers = None  # type: ignore[assignment]  # the layers that do; None: all
    use_compressed_mem: bool = False  # a second memory of block_width // 2 entries for what leaves the first
    compressed_mem_factor: int = 4  # tokens in one compressed entry
    compressed_mem_pooling: Literal["conv", "mean", "max"] = "conv"  # how they become one: learned, or of each channel
    extra_memories: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)
    # further kinds of memory by registered name, each with its options; "layers" says where, default all
    enhanced_recurrence: bool = False  # a layer remembers what the next layer computed one block earlier (ERNIE-Doc)
    attention_window: Literal["blocks", "sliding"] = "blocks"
    # blocks: the memory and this block up to the token itself; sliding: exactly the block_width positions before it
    empty_memory: Literal["masked", "zeros"] = "masked"  # before the first block: not there, or zero keys and values
    positions: Literal["xpos", "rotary", "dynamic", "t5", "none"] = "xpos"  # rotary: xpos without its decay
    rotary_base: float = 10000.0  # channel pair i turns by base^(-2i/e) a position
    rotary_scaling: dict[str, Any] = field(default_factory=dict, hash=False)
    # "rope_type" linear, llama3 or yarn, and its options, as in transformers' rope_parameters (rotary.py)
    unrotated_layers: tuple[int, ...] = ()  # layers without rotary positions (NoPE)
    dynamic_log_distance: bool = True  # the MLP of dynamic positions sees log(1 + distance) instead of distance / width
    # the recurrence
    recurrent_layers: Layers = None  # type: ignore[assignment]  # None: (depth // 2,)
    read_recurrent_layers: Layers = None  # type: ignore[assignment]  # where each state is read, at or below its layer; None: there
    num_state_vectors: Count = None  # type: ignore[assignment]  # None: block_width
    state_update: Literal["skip", "dual", "single", "token_gated"] = "skip"
    gate: str = "fixed"  # fixed, lstm, full, hard, or a registered one
    gate_options: dict[str, Any] = field(default_factory=dict, hash=False)
    write_span: int = 4  # token_gated: a token's write is decided from so many tokens, its own and those before it
    candidate_bias: bool = True  # b_z of the paper's z = W h + b_z
    state_reads_memory: bool = False  # states read the XL memory too, so that each token is read by two updates
    block_feedback: bool = False  # every layer without a state of its own reads the last recurrent layer's
    # normalisation
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float | None = None  # None: 1e-5 in layer norm, 1e-6 in RMS norm
    qk_norm: Literal["channel", "rms", "head", "none"] = "channel"
    # unit queries and keys times a gain per channel or head; rms: of length sqrt(dim_head) times a gain per channel
    all_layers_qk_rmsnorm: bool = False  # in all layers, or in recurrent layers only
    tokens_qk_norm: Literal["channel", "rms", "head", "none"] | None = None
    # that of the tokens among themselves, in all layers, where it is not to be that of the states
    qk_norm_scale: float = 8.0  # scale of the attention logits of qk_norm="channel"
    # output and training
    tie_embeddings: bool = False  # logits = h E^T * logit_scale
    logit_scale: float | None = None  # None: 1 / sqrt(dim) with tied embeddings, else 1
    init: Literal["torch", "lecun"] = "torch"  # PyTorch's initial values, or those of the paper's authors
    matching_init: bool = False
    # recurrent and routed layers begin with one map for the keys of tokens and states and all queries
    embedding_std: float = 1.0  # of the initial embeddings
    attn_dropout: float = 0.0  # on the matrix of the tokens' self-attention
    ff_dropout: float = 0.0  # on the output of the feed-forward
    emb_dropout: float = 0.0  # on the token embeddings
    attn_input_dropout: float = 0.0  # after the norm before the attention
    output_dropout: float = 0.0  # after the last norm
    ignore_index: int = -100
    use_flash_attn: bool = False  # scaled_dot_product_attention, or the same formula written out
    use_checkpointing: bool = False  # recompute a layer in the backward pass instead of keeping its activations

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("ff_mult", "qk_norm_scale", "rotary_base", "norm_eps", "logit_scale", "embedding_std"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value}")
        check_scaling(self.rotary_scaling)
        self._derive()
        self._check_numbers()
        self._check_layers()
        self._check_names()
        for wrong, why in self._conflicts():
            if wrong:
                raise ValueError(why)

    def _check_types(self) -> None:
        hints = get_type_hints(type(self))
        for name, hint in ((f.name, hints[f.name]) for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, value := tuple(value))
            wrong_bool = isinstance(value, bool) and hint is not bool
            if wrong_bool or not is_bearable(value, hint, conf=BeartypeConf(is_pep484_tower=True)):
                raise ValueError(f"{name}={value!r} must be {_in_words(hint)}")

    def _derive(self) -> None:
        def given(value: Any) -> bool:
            return value is not None and not isinstance(value, DerivedCount | DerivedLayers)

        hidden = self.dim * self.ff_mult * (1 if self.ff_activation == "relu" else 2 / 3)
        writes = self.recurrent_layers if given(self.recurrent_layers) else (max(1, self.depth // 2),)
        for name, count in (("ff_dim", int(hidden)), ("num_state_vectors", self.block_width)):
            if not given(getattr(self, name)):
                object.__setattr__(self, name, DerivedCount(count))
        for name, layers in (
            ("xl_layers", range(1, self.depth + 1)), ("recurrent_layers", writes), ("read_recurrent_layers", writes)
        ):  # fmt: skip
            if not given(getattr(self, name)):
                object.__setattr__(self, name, DerivedLayers(layers))
            elif name == "xl_layers":
                object.__setattr__(self, name, tuple(sorted(self.xl_layers)))

    def _check_numbers(self) -> None:
        for name in ("num_tokens", "dim", "depth", "dim_head", "heads", "kv_heads", "ff_dim", "max_seq_len",
                     "block_width", "num_state_vectors", "compressed_mem_factor", "write_span"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_xl_blocks < 0:
            raise ValueError(f"num_xl_blocks must be at least 0, not {self.num_xl_blocks}")
        for name in (f.name for f in fields(self) if f.name.endswith("dropout")):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.max_seq_len % self.block_width:
            raise ValueError(f"max_seq_len={self.max_seq_len} is not a multiple of block_width={self.block_width}")

    def _check_layers(self) -> None:
        extra = {f"extra_memories[{name!r}]['layers']": self.extra_layers(name) for name in self.extra_memories}
        named = {
            name: getattr(self, name)
            for name in ("recurrent_layers", "read_recurrent_layers", "xl_layers", "unrotated_layers")
        }
        for name, layers in (named | extra).items():
            if unknown := [layer for layer in layers if not 1 <= layer <= self.depth]:
                raise ValueError(f"{name}={layers}: {unknown} not among the layers 1 to depth={self.depth}")
            if name != "read_recurrent_layers" and len(set(layers)) < len(layers):
                raise ValueError(f"{name}={layers} names a layer twice")
        reads, writes = self.read_recurrent_layers, self.recurrent_layers
        if len(reads) != len(writes):
            raise ValueError(f"read_recurrent_layers={reads} must name one layer for each of recurrent_layers={writes}")
        if any(read > write for read, write in zip(reads, writes)):
            raise ValueError(f"read_recurrent_layers={reads} must not lie above recurrent_layers={writes}")

    def _check_names(self) -> None:
        """Whether gates and memories of these names are registered."""
        for what, names, known in (("gate", [self.gate], GATES), ("extra_memories", self.extra_memories, MEMORIES)):
            for name in names:
                if name not in known:
                    near = "".join(f"; did you mean {one!r}?" for one in get_close_matches(name, known, 1))
                    raise ValueError(f"{what} {name!r} is not one of {sorted(known)}{near}")

    def _conflicts(self) -> list[tuple[bool, str]]:
        """Options that cannot be combined."""
        full_memory = self.num_xl_blocks > 0 and self.xl_layers == tuple(range(1, self.depth + 1))
        all_normalised = all(self.qk_norm_of_tokens(layer) == "head" for layer in range(1, self.depth + 1))
        scaled = bool(self.rotary_scaling) or self.rotary_base != type(self).rotary_base
        sliding, compressed = self.attention_window == "sliding", self.use_compressed_mem
        is_rotated = self.positions in ("xpos", "rotary")
        further = "use_compressed_mem=True" if compressed else f"extra_memories={sorted(self.extra_memories)}"
        has_further = compressed or bool(self.extra_memories)
        return [
            (self.enhanced_recurrence and has_further,
             f"enhanced_recurrence=True cannot be combined with {further}"),
            (self.enhanced_recurrence and not full_memory,
             f"enhanced_recurrence=True needs equal memories in all layers, not xl_layers={self.xl_layers} "
             f"with num_xl_blocks={self.num_xl_blocks}"),
            (self.enhanced_recurrence and self.qk_norm == "head" and not all_normalised,
             "enhanced_recurrence=True hands keys down between layers, and qk_norm='head' stores them normalised: "
             f"all layers must be, with all_layers_qk_rmsnorm=True (recurrent_layers={self.recurrent_layers})"),
            (sliding and self.num_xl_blocks > 1,
             f"attention_window='sliding' looks back one block, num_xl_blocks={self.num_xl_blocks} was given"),
            (sliding and has_further, f"attention_window='sliding' cannot be combined with {further}"),
            (self.empty_memory == "zeros" and has_further,
             f"empty_memory='zeros' cannot be combined with {further}"),
            (compressed and (self.num_xl_blocks == 0 or not self.xl_layers),
             "use_compressed_mem=True compresses what leaves the XL memory, and no layer has one: "
             f"num_xl_blocks={self.num_xl_blocks}, xl_layers={self.xl_layers}"),
            (not compressed and self.compressed_mem_pooling != "conv",
             f"compressed_mem_pooling={self.compressed_mem_pooling!r} needs use_compressed_mem=True"),
            (compressed and self.compressed_mem_factor > self.block_width,
             f"compressed_mem_factor={self.compressed_mem_factor} is above block_width={self.block_width}"),
            (compressed and self.block_width < 2,
             f"use_compressed_mem=True needs block_width of at least 2, not {self.block_width}"),
            (self.block_feedback and not self.recurrent_layers,
             "block_feedback=True needs a recurrent layer, recurrent_layers=() was given"),
            (self.block_feedback and self.read_recurrent_layers != self.recurrent_layers,
             f"block_feedback=True decides who reads, read_recurrent_layers={self.read_recurrent_layers} was given"),
            (self.all_layers_qk_rmsnorm and self.qk_norm == "none",
             "all_layers_qk_rmsnorm=True needs a normalisation, qk_norm='none' was given"),
            (self.tokens_qk_norm is not None and self.all_layers_qk_rmsnorm,
             f"tokens_qk_norm={self.tokens_qk_norm!r} is for all layers, all_layers_qk_rmsnorm=True was given"),
            (self.tokens_qk_norm not in (None, self.qk_norm) and "head" in (self.tokens_qk_norm, self.qk_norm),
             "tokens and states attend to the same stored keys, and 'head' stores them normalised: "
             f"tokens_qk_norm={self.tokens_qk_norm!r} cannot be combined with qk_norm={self.qk_norm!r}"),
            (is_rotated and self.dim_head % 2 == 1,
             f"positions={self.positions!r} rotates pairs, dim_head={self.dim_head} is odd"),
            (scaled and not is_rotated,
             f"rotary_base={self.rotary_base} and rotary_scaling={self.rotary_scaling} need positions='rotary' or "
             f"'xpos', not {self.positions!r}"),
            (bool(self.unrotated_layers) and not is_rotated,
             f"unrotated_layers={self.unrotated_layers} needs positions='rotary' or 'xpos', not {self.positions!r}"),
            (self.state_update == "token_gated" and self.gate == "fixed",
             "state_update='token_gated' needs a gate that depends on the token, such as gate='hard', not 'fixed'"),
            (self.state_update == "token_gated" and self.state_reads_memory,
             "state_update='token_gated' writes each token once: it cannot be combined with state_reads_memory=True"),
            (self.state_update == "token_gated" and self.enhanced_recurrence,
             "state_update='token_gated' needs the token before each block as its own layer saw it: it cannot be "
             "combined with enhanced_recurrence=True"),
        ]  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The config that `dataclasses.asdict` (or a JSON file of it) describes; unknown names are a ValueError."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            near = [one for name in unknown for one in get_close_matches(name, known, 1)]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"config holds unknown options {unknown}{hint}")
        if missing := [name for name in ("num_tokens", "dim", "depth") if name not in values]:
            raise ValueError(f"config lacks {', '.join(missing)}")
        return cls(**{name: _as_tuples(value) for name, value in values.items()})

    @property
    def fingerprint(self) -> str:
        """A short hash of everything that decides the shape and meaning of memories and states."""
        free = {"max_seq_len", "ignore_index", "use_flash_attn", "use_checkpointing", "init", "matching_init",
                "embedding_std"}
        told = {k: v for k, v in asdict(self).items() if k not in free and not k.endswith("dropout")}
        for name, default in NEWER.items():
            if told[name] == default:
                del told[name]
        if self.state_update != "token_gated":
            del told["write_span"]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def reads(self, layer: int) -> tuple[int, ...]:
        """The recurrent layers whose states are read at `layer`, its own first."""
        writes = self.recurrent_layers
        if self.block_feedback and layer not in writes:
            return (max(writes),)
        pairs = zip(self.read_recurrent_layers, writes)
        return tuple(sorted(write for read, write in pairs if read == layer))

    def qk_norm_of_tokens(self, layer: int) -> str:
        """The normalisation of queries and keys in the self-attention of the tokens of `layer`."""
        if self.tokens_qk_norm is not None:
            return self.tokens_qk_norm
        return self.qk_norm if self.all_layers_qk_rmsnorm or layer in self.recurrent_layers else "none"

    def xl_width(self, layer: int) -> int:
        """Tokens of complete blocks that `layer` remembers."""
        return self.num_xl_blocks * self.block_width if layer in self.xl_layers else 0

    def compressed_width(self, layer: int) -> int:
        """Entries of the compressed memory of `layer`."""
        return self.block_width // 2 if self.use_compressed_mem and self.xl_width(layer) else 0

    def extra_layers(self, name: str) -> tuple[int, ...]:
        """The layers that have the extra memory of this name."""
        return tuple(self.extra_memories[name].get("layers") or range(1, self.depth + 1))

    @property
    def nearest(self) -> int:
        """The distance of the nearest key that a token sees: its own, or in a sliding window the one before."""
        return int(self.attention_window == "sliding")

    def layer_groups(self) -> list[tuple[int, ...]]:
        """Runs of layers, as indices from 0, that must go through the sequence together, block by block.

        A state that is read below the layer that writes it ties all layers between; enhanced recurrence ties all.
        """
        ties = [(layer, write) for layer in range(1, self.depth + 1) for write in self.reads(layer) if layer < write]
        if self.enhanced_recurrence:
            ties.append((1, self.depth))
        groups: list[tuple[int, ...]] = []
        for layer in range(1, self.depth + 1):
            tied = any(low < layer <= high for low, high in ties)
            groups = [*groups[:-1], (*groups[-1], layer - 1)] if tied else [*groups, (layer - 1,)]
        return groups


def _as_tuples(value: Any) -> Any:
    """What JSON made lists of, as it was."""
    if isinstance(value, dict):
        return {name: _as_tuples(item) for name, item in value.items()}
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _in_words(hint: Any) -> str:
    """What a field takes, as an error message says it."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if hint == Layers:
        return "a tuple of layer numbers, such as (3,)"
    words: dict[Any, str] = {
        int: "a whole number", Count: "a whole number", float: "a number", float | None: "a number or None",
        bool: "True or False", str: "a name", tuple[int, ...]: "a tuple of layer numbers, such as (3,)",
    }  # fmt: skip
    return words.get(hint, "a dictionary of options by name")
