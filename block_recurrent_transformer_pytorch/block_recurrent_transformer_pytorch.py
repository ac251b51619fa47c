"""The Block-Recurrent Transformer: one model that reads a stream in any pieces.

Papers
    Hutchins et al. 2022, Block-Recurrent Transformers, arXiv 2203.07852
    Dai et al. 2019, Transformer-XL, arXiv 1901.02860 (the memory of the last blocks)
    Rae et al. 2019, Compressive Transformers, arXiv 1911.05507 (the compressed memory)
    Ding et al. 2020, ERNIE-Doc, arXiv 2012.15688 (enhanced recurrence)
    Shazeer 2019, arXiv 1911.02150 (one key/value head for all query heads)
    Su et al. 2021, RoFormer, arXiv 2104.09864; Sun et al. 2022, arXiv 2212.10554 (rotary positions with the xPos decay)
    Raffel et al. 2019, T5, arXiv 1910.10683 (bucketed position bias)

A recurrent layer, for the tokens X of one block and the states S as of the block's start:

    vertical    Y = X + [ attend(Q, K, V) ; attend(Q', Ks, Vs) ] Wo        then Y + feed-forward(Y)
    horizontal  C = [ attend(Qs, Ks, Vs) ; attend(Qs', K, V) ]
                S <- gate(S, candidate(C))                                 once, when the block is complete

K, V come from the tokens of this block and of the blocks before it (the XL memory), Ks, Vs from norm(S) + state ids.

The block being filled is the decoding cache: a layer carries the keys and values of the last complete blocks and
those of the tokens of the current block, and a state is read as of the start of its block. So training segments, long
prompts and one-token decoding are the same computation, and any split of a stream gives the same answer. Everything
that travels from call to call is a value: it goes in as an argument and comes out as a result.

Axis letters: b batch, n new tokens, t blocks, w block width, j keys, s states, h heads, g key/value heads, d dim,
e dim_head.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from beartype import BeartypeConf, beartype
from einops import rearrange
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from . import convert, generation, paper

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))

if TYPE_CHECKING:
    Count: TypeAlias = int
    Layers: TypeAlias = tuple[int, ...]
else:  # None may be given, and is replaced by what it stands for
    Count, Layers = int | None, tuple[int, ...] | None

# ------------------------------------------------------------------------------------------------------------ 1 config


@typechecked
@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and options of a model. Frozen; `asdict` of it is its config.json, `Config.from_dict` reads that back.

    The defaults are those of block-recurrent-transformer-pytorch 0.4.4. Layers are numbered from 1. None is replaced by
    what follows from other sizes: `dataclasses.replace(config, depth=12, xl_layers=None)` derives it anew.

    Raises:
        ValueError: a number out of range, or two options that cannot go together; the message names them.
    """

    # sizes
    num_tokens: int  # vocabulary
    dim: int
    depth: int
    dim_head: int = 64
    heads: int = 8
    kv_heads: int = 1  # key/value heads, each shared by heads / kv_heads query heads
    ff_mult: float = 4  # hidden size: dim * ff_mult, times 2/3 for geglu (which has three matrices instead of two)
    ff_dim: Count = None  # type: ignore[assignment]  # the hidden size itself, instead of ff_mult
    ff_activation: Literal["geglu", "relu"] = "geglu"
    # the stream
    max_seq_len: int = 1024  # default segment of the training wrapper; no limit on calls
    block_width: int = 512
    num_xl_blocks: int = 1  # complete blocks that a layer remembers word for word
    xl_layers: Layers = None  # type: ignore[assignment]  # the layers that do; None: all
    use_compressed_mem: bool = False  # a second queue of block_width // 2 entries for what leaves the first
    compressed_mem_factor: int = 4  # tokens in one compressed entry
    enhanced_recurrence: bool = False  # a layer remembers what the next layer computed one block earlier (ERNIE-Doc)
    attention_window: Literal["blocks", "sliding"] = "blocks"
    # blocks: the memory and this block up to the token itself; sliding: exactly the block_width positions before it
    empty_memory: Literal["masked", "zeros"] = "masked"  # before the first block: not there, or zero keys and values
    positions: Literal["xpos", "dynamic", "t5", "none"] = "xpos"
    dynamic_log_distance: bool = True  # the MLP of dynamic positions sees log(1 + distance) instead of distance / width
    # the recurrence
    recurrent_layers: Layers = None  # type: ignore[assignment]  # None: (depth // 2,)
    read_recurrent_layers: Layers = None  # type: ignore[assignment]  # where each state is read, at or below its layer; None: there
    num_state_vectors: Count = None  # type: ignore[assignment]  # None: block_width
    state_update: Literal["skip", "dual", "single"] = "skip"
    gate: Literal["fixed", "lstm", "full"] = "fixed"
    candidate_bias: bool = True  # b_z of the paper's z = W h + b_z
    state_reads_memory: bool = False  # states read the XL memory too, so that each token is read by two updates
    block_feedback: bool = False  # every layer without a state of its own reads the last recurrent layer's
    # normalisation
    norm: Literal["layer", "rms"] = "layer"
    qk_norm: Literal["channel", "head", "none"] = "channel"  # unit queries and keys, times a gain per channel or head
    all_layers_qk_rmsnorm: bool = False  # in all layers, or in recurrent layers only
    qk_norm_scale: float = 8.0  # scale of the attention logits of qk_norm="channel"
    # output and training
    tie_embeddings: bool = False  # logits = h E^T / sqrt(dim)
    init: Literal["torch", "lecun"] = "torch"  # PyTorch's initial values, or those of the paper's authors
    attn_dropout: float = 0.0  # on the matrix of the tokens' self-attention
    ff_dropout: float = 0.0  # on the output of the feed-forward
    emb_dropout: float = 0.0  # on the token embeddings
    attn_input_dropout: float = 0.0  # after the norm before the attention
    output_dropout: float = 0.0  # after the last norm
    ignore_index: int = -100
    use_flash_attn: bool = False  # scaled_dot_product_attention, or the same formula written out
    use_checkpointing: bool = False  # recompute a layer in the backward pass instead of keeping its activations

    def __post_init__(self) -> None:
        for name in ("ff_mult", "qk_norm_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        writes = (max(1, self.depth // 2),) if self.recurrent_layers is None else self.recurrent_layers
        derived = {
            "ff_dim": self.ff_dim if self.ff_dim is not None else self._default_ff_dim(),
            "xl_layers": tuple(range(1, self.depth + 1)) if self.xl_layers is None else tuple(sorted(self.xl_layers)),
            "recurrent_layers": writes,
            "read_recurrent_layers": writes if self.read_recurrent_layers is None else self.read_recurrent_layers,
            "num_state_vectors": self.block_width if self.num_state_vectors is None else self.num_state_vectors,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        self._check_numbers()
        self._check_layers()
        for wrong, why in self._conflicts():
            if wrong:
                raise ValueError(why)

    def _default_ff_dim(self) -> int:
        return int(self.dim * self.ff_mult * (2 / 3 if self.ff_activation == "geglu" else 1))

    def _check_numbers(self) -> None:
        for name in ("num_tokens", "dim", "depth", "dim_head", "heads", "kv_heads", "ff_dim", "max_seq_len",
                     "block_width", "num_state_vectors", "compressed_mem_factor"):  # fmt: skip
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
        for name in ("recurrent_layers", "read_recurrent_layers", "xl_layers"):
            layers = getattr(self, name)
            if unknown := [layer for layer in layers if not 1 <= layer <= self.depth]:
                raise ValueError(f"{name}={layers}: {unknown} not among the layers 1 to depth={self.depth}")
            if name != "read_recurrent_layers" and len(set(layers)) < len(layers):
                raise ValueError(f"{name}={layers} names a layer twice")
        reads, writes = self.read_recurrent_layers, self.recurrent_layers
        if len(reads) != len(writes):
            raise ValueError(f"read_recurrent_layers={reads} must name one layer for each of recurrent_layers={writes}")
        if any(read > write for read, write in zip(reads, writes)):
            raise ValueError(f"read_recurrent_layers={reads} must not lie above recurrent_layers={writes}")

    def _conflicts(self) -> list[tuple[bool, str]]:
        """Options that cannot go together."""
        full_memory = self.num_xl_blocks > 0 and self.xl_layers == tuple(range(1, self.depth + 1))
        all_normalised = self.all_layers_qk_rmsnorm or len(self.recurrent_layers) == self.depth
        sliding, compressed = self.attention_window == "sliding", self.use_compressed_mem
        return [
            (self.enhanced_recurrence and compressed,
             "enhanced_recurrence=True goes without compressed memories, use_compressed_mem=True was given"),
            (self.enhanced_recurrence and not full_memory,
             f"enhanced_recurrence=True needs equal memories in all layers, not xl_layers={self.xl_layers} "
             f"with num_xl_blocks={self.num_xl_blocks}"),
            (self.enhanced_recurrence and self.qk_norm == "head" and not all_normalised,
             "enhanced_recurrence=True hands keys down between layers, and qk_norm='head' stores them normalised: "
             f"all layers must be, with all_layers_qk_rmsnorm=True (recurrent_layers={self.recurrent_layers})"),
            (sliding and self.num_xl_blocks > 1,
             f"attention_window='sliding' looks back one block, num_xl_blocks={self.num_xl_blocks} was given"),
            (sliding and compressed,
             "attention_window='sliding' goes without compressed memories, use_compressed_mem=True was given"),
            (self.empty_memory == "zeros" and compressed,
             "empty_memory='zeros' goes without compressed memories, use_compressed_mem=True was given"),
            (compressed and (self.num_xl_blocks == 0 or not self.xl_layers),
             "use_compressed_mem=True compresses what leaves the XL memory, and no layer has one: "
             f"num_xl_blocks={self.num_xl_blocks}, xl_layers={self.xl_layers}"),
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
            (self.positions == "xpos" and self.dim_head % 2 == 1,
             f"positions='xpos' rotates pairs, dim_head={self.dim_head} is odd"),
        ]  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The config that `dataclasses.asdict` (or a JSON file of it) describes; unknown names are a ValueError."""
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise ValueError(f"config holds unknown options {unknown}")
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**given)

    @property
    def fingerprint(self) -> str:
        """A short hash of everything that decides the shape and meaning of memories and states."""
        free = {"max_seq_len", "ignore_index", "use_flash_attn", "use_checkpointing", "init"}
        told = {k: v for k, v in asdict(self).items() if k not in free and not k.endswith("dropout")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def reads(self, layer: int) -> tuple[int, ...]:
        """The recurrent layers whose states are read at `layer`, its own first."""
        writes = self.recurrent_layers
        if self.block_feedback and layer not in writes:
            return (max(writes),)
        pairs = zip(self.read_recurrent_layers, writes)
        return tuple(sorted(write for read, write in pairs if read == layer))

    def xl_width(self, layer: int) -> int:
        """Tokens of complete blocks that `layer` remembers."""
        return self.num_xl_blocks * self.block_width if layer in self.xl_layers else 0

    def compressed_width(self, layer: int) -> int:
        """Entries of the compressed memory of `layer`."""
        return self.block_width // 2 if self.use_compressed_mem and self.xl_width(layer) else 0

    @property
    def nearest(self) -> int:
        """The distance of the nearest key that a token sees: its own, or in a sliding window the one before."""
        return int(self.attention_window == "sliding")

    @property
    def compressed_per_block(self) -> int:
        """Entries that one block becomes when it is compressed."""
        return self.block_width // self.compressed_mem_factor

    @property
    def reach(self) -> int:
        """Complete blocks after which every memory is full and nothing is masked any more."""
        if self.empty_memory == "zeros":
            return 0
        compressed = -(-(self.block_width // 2) // self.compressed_per_block) if self.use_compressed_mem else 0
        return self.num_xl_blocks + compressed if self.xl_layers else 0

    def stages(self) -> list[tuple[int, ...]]:
        """Runs of layers, as indices from 0, that must go through the sequence together, block by block.

        A state that is read below the layer that writes it ties all layers between; enhanced recurrence ties all.
        """
        ties = [(layer, write) for layer in range(1, self.depth + 1) for write in self.reads(layer) if layer < write]
        if self.enhanced_recurrence:
            ties.append((1, self.depth))
        stages: list[tuple[int, ...]] = []
        for layer in range(1, self.depth + 1):
            tied = any(low < layer <= high for low, high in ties)
            stages = [*stages[:-1], (*stages[-1], layer - 1)] if tied else [*stages, (layer - 1,)]
        return stages


# ----------------------------------------------------------------------------------------------------- 2 carried values


class KV(NamedTuple):
    """Keys and values, oldest first; keys neither rotated nor scaled. Each (b, g, j, e)."""

    k: Tensor
    v: Tensor


class LayerMemory(NamedTuple):
    """What one layer remembers. Buffers of fixed width; entries for what has not been read yet are never looked at,
    or are the zeros of `empty_memory="zeros"`.

    `window` follows from the others: decoding keeps it so that keys are normalised and rotated once a block.
    """

    xl: KV  # the last complete blocks, (b, g, xl_width, e), right-aligned
    block: KV  # the block being filled, (b, g, w, e), left-aligned
    compressed: KV | None = None  # (b, g, compressed_width, e), right-aligned
    window: KV | None = None  # [compressed ; xl ; block], keys as the queries of this block see them; None: empty block


class Memories(NamedTuple):
    """The memories of all layers, and where each row of the batch stands in its stream."""

    layers: tuple[LayerMemory, ...]
    place: int | Tensor  # tokens in the block being filled, 0 ... w-1; (b,) int64 where rows differ
    blocks: int  # complete blocks that every row remembers, counted up to `Config.reach`
    ahead: Tensor | None = None  # (b,) int64: blocks that a row remembers beyond these, where rows differ


class States(NamedTuple):
    """The states as of the start of the block being filled: they change when it is complete."""

    layers: tuple[Tensor, ...]  # one (b, s, d) for each recurrent layer, at least fp32
    views: tuple[KV, ...] | None = None  # their keys and values as this block's tokens read them; None: empty block


torch.serialization.add_safe_globals([KV, LayerMemory, Memories, States])  # for torch.load(weights_only=True)
Carried = TypeVar("Carried", Memories, States)


def map_tensors(carried: Carried, function: Any) -> Carried:
    """`carried` with `function` applied to each of its tensors."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, carried)  # type: ignore[no-any-return]


def detach(carried: Carried) -> Carried:
    """The same values without their gradients' history: what ends back-propagation at a segment's boundary."""
    return map_tensors(carried, Tensor.detach)


def select_rows(carried: Carried, rows: Tensor) -> Carried:
    """The given rows, (m,) int64, in that order and possibly repeated: beam search, several samples of one prompt.

    Raises:
        ValueError: rows that are no integers, or not among those of `carried`.
    """
    batch = next((len(leaf) for leaf in tree_leaves(carried) if isinstance(leaf, Tensor)), None)
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be (m,) int64, not {describe(rows)}")
    if batch and rows.device.type == "cpu" and len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= batch):
        raise ValueError(f"rows={rows.tolist()} must be from 0 to {batch - 1}")
    return map_tensors(carried, lambda leaf: leaf.index_select(0, rows.to(leaf.device)))


def forget_rows(memories: Memories, rows: Tensor) -> Memories:
    """Memories in which `rows`, (b,) bool, hold no complete block any more; the block being filled stays."""
    batch = len(memories.layers[0].block.k)
    if not isinstance(rows, Tensor) or rows.shape != (batch,) or rows.dtype != torch.bool:
        raise ValueError(f"rows must be ({batch},) bool, one for each row of the memories, not {describe(rows)}")
    layers = tuple(
        layer._replace(
            xl=zero_rows(layer.xl, rows), compressed=layer.compressed and zero_rows(layer.compressed, rows), window=None
        )
        for layer in memories.layers
    )
    if memories.blocks == 0 and memories.ahead is None:
        return memories._replace(layers=layers)
    held = memories.blocks + (0 if memories.ahead is None else memories.ahead)
    return memories._replace(layers=layers, blocks=0, ahead=torch.where(rows, 0, held))


def without_prepared(memories: Memories, states: States) -> tuple[Memories, States]:
    """The same values, without what decoding keeps ready of them: windows and views.

    These follow from the rest. Where gradients are wanted they are computed anew: what made them gets its gradient
    through a graph, and would lose it wherever carried values are detached.
    """
    layers = tuple(layer._replace(window=None) for layer in memories.layers)
    return memories._replace(layers=layers), states._replace(views=None)


def per_row(rows: Tensor, like: Tensor) -> Tensor:
    """(b,) as (b, 1, ..., 1), to meet the axes of `like`."""
    return rows.view(-1, *(1,) * (like.ndim - 1))


def zero_rows(kv: KV, rows: Tensor) -> KV:
    return KV(*(x.masked_fill(per_row(rows, x), 0) for x in kv))


def choose_rows(rows: Tensor, new: KV, old: KV) -> KV:
    return KV(*(torch.where(per_row(rows, n), n, o) for n, o in zip(new, old)))


# --------------------------------------------------------------------------------------------- 3 norms and feed-forward


def at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    has_any = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_any else nullcontext()


RECOMPUTED_FROM = 2**18  # numbers of the largest input from which it is worth the calls


def is_functional() -> bool:
    """Whether torch.func is at work, which goes without the hooks of `checkpoint`."""
    return torch._C._are_functorch_transforms_active()


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None, draws: bool = False) -> Tensor:
    """function(*inputs), of which the backward pass keeps the inputs alone.

    For something cheap that ends in a matrix product: the product is not computed again, because recomputation stops
    with what it takes in. And for something small that keeps much, the write of a state. `draws` says that the function
    takes random numbers, and so will the same ones again.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_functional():
        return function(*inputs)  # a compiler chooses itself what to keep
    if max(x.numel() for x in inputs if x is not None) < RECOMPUTED_FROM:
        return function(*inputs)
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return result


def dropped(dropout: nn.Dropout, x: Tensor, use_dropout: bool | None) -> Tensor:
    return dropout(x) if use_dropout is None else F.dropout(x, dropout.p, use_dropout)


def make_norm(config: Config) -> nn.Module:
    """Layer norm with a gain and no bias, or RMS norm with epsilon 1e-6 inside the root."""
    if config.norm == "layer":
        return nn.LayerNorm(config.dim, bias=False)
    return nn.RMSNorm(config.dim, eps=1e-6)


class HeadsNorm(nn.Module):
    """Normalisation of the queries and keys of one attention: none. Logits are scaled by 1 / sqrt(dim_head)."""

    scale: float

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.scale = config.dim_head**-0.5

    def store(self, k: Tensor) -> Tensor:
        """Keys as they go into a memory; what all the attentions on the same keys share."""
        return k

    def view(self, k: Tensor) -> Tensor:
        """The keys of states, normalised without gains, for all the attentions that will read them.

        With k a unit key and g its gains, q . (k g) = (q g) . k: each reader has the gains in its queries.
        """
        return self.store(k)

    def gain(self, heads: int, of_views: bool = False) -> Tensor | None:
        """The gains of queries, (h, 1, e) or (h, 1, 1); those of queries to views hold the gains of the keys, too."""
        return None

    def normalise(self, q: Tensor, gain: Tensor | None) -> Tensor:
        """Queries (b, h, n, e), normalised, times gains."""
        return q

    def queries(self, q: Tensor, of_views: bool = False) -> Tensor:
        return self.normalise(q, self.gain(q.shape[1], of_views))

    def keys(self, k: Tensor) -> Tensor:
        """Stored keys as the queries of this attention meet them, if these are not queries to views."""
        return k

    def scaled(self, bias: Tensor) -> Tensor:
        """A position bias (h, j) in the units of the logits."""
        return bias


class Unit(torch.autograd.Function):
    """x / |x| * gain, lengths along the last axis and in at least fp32; zeros stay zeros. See `unit`.

    With y = x / |x|, the gradient of x is (g gain - y (y . g gain)) / |x|: the backward pass keeps x alone, and takes
    fewer operators than that of the formula.
    """

    generate_vmap_rule = True

    @staticmethod
    def length(x: Tensor) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(at_least_fp32(x), dim=-1, keepdim=True).clamp_min(1e-12)
        return lengths

    @staticmethod
    def forward(x: Tensor, gain: Tensor | None) -> Tensor:
        y = x / Unit.length(x)
        return (y if gain is None else y * gain).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, gain = ctx.saved_tensors
        length = Unit.length(x)
        y, scaled = x / length, grad if gain is None else grad * gain
        along = (y * scaled).sum(-1, keepdim=True)
        grad_x = (torch.addcmul(scaled, y, along, value=-1) / length).to(x.dtype)
        return grad_x, None if gain is None else (grad * y).sum_to_size(gain.shape).to(gain.dtype)


def unit(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """x (..., e) / |x| * gain."""
    if not torch.is_grad_enabled():
        return Unit.forward(x, gain)  # `apply` takes three times as long for a single token
    result: Tensor = Unit.apply(x, gain)  # type: ignore[no-untyped-call]
    return result


class ChannelNorm(HeadsNorm):
    """Unit queries and keys, each times a learned gain per channel; logits times `qk_norm_scale` (0.4.4 meant this)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = config.qk_norm_scale
        self.q_scale = nn.Parameter(torch.ones(config.dim_head))
        self.k_scale = nn.Parameter(torch.ones(config.dim_head))

    def view(self, k: Tensor) -> Tensor:
        return unit(k)

    def gain(self, heads: int, of_views: bool = False) -> Tensor:
        scale = self.q_scale * self.k_scale if of_views else self.q_scale
        return scale.expand(heads, 1, -1)

    def normalise(self, q: Tensor, gain: Tensor | None) -> Tensor:
        return unit(q, gain)

    def keys(self, k: Tensor) -> Tensor:
        return unit(k, self.k_scale)


class HeadNorm(HeadsNorm):
    """Unit queries and keys; logits, position bias included, times |a|, a learned per head (the authors' code)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = 1.0
        self.head_scale = nn.Parameter(torch.ones(config.heads))

    def store(self, k: Tensor) -> Tensor:
        return k * (at_least_fp32(k).square().sum(-1, keepdim=True) + 1e-6).rsqrt().to(k.dtype)

    def gain(self, heads: int, of_views: bool = False) -> Tensor:
        return self.head_scale.abs().view(-1, 1, 1)

    def normalise(self, q: Tensor, gain: Tensor | None) -> Tensor:
        return self.store(q) * (1 if gain is None else gain)

    def scaled(self, bias: Tensor) -> Tensor:
        return bias * self.head_scale.abs()[:, None]


HEADS_NORMS = {"none": HeadsNorm, "channel": ChannelNorm, "head": HeadNorm}


class ChannelsFirst(nn.Linear):
    """x W^T, laid out channel by channel: (rows, d) -> (f, rows).

    The two halves of a gated hidden layer lie apart then, and the channels begin at multiples of 16 numbers where the
    number of tokens is one: a matrix product whose rows of 1,365 numbers begin anywhere in a cache line takes half as
    long again on a CPU.
    """

    FEW = 64  # rows, for which the layout does not matter, and a small product would lose by it

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).t() if len(x) < self.FEW else self.weight @ x.t()


class Hidden(nn.Module):
    """The hidden layer of a feed-forward, dim_in -> ff_dim: relu(x W), or x W1 * gelu(x W2)."""

    def __init__(self, config: Config, dim_in: int) -> None:
        super().__init__()
        self.use_gate = config.ff_activation == "geglu"
        self.to_hidden = ChannelsFirst(dim_in, config.ff_dim * (2 if self.use_gate else 1), bias=False)

    def activate(self, hidden: Tensor) -> Tensor:
        """What `to_hidden` gives -> (rows, f)."""
        if not self.use_gate:
            return F.relu(hidden).t()
        value, gate = hidden.chunk(2, dim=0)
        return (value * F.gelu(gate)).t()

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, f)."""
        return self.activate(self.to_hidden(x.flatten(0, 1))).view(*x.shape[:2], -1)


HIDDEN_AT_ONCE = 2**21  # numbers of the largest hidden layer that a feed-forward makes at once on a CPU


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.hidden = Hidden(config, config.dim)
        self.to_out = nn.Linear(config.ff_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ff_dropout)

    def widen(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.hidden.to_hidden(self.norm(x))
        return hidden

    def narrow(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.to_out(self.hidden.activate(hidden))
        return out

    def forward(self, x: Tensor, use_dropout: bool | None = None) -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        rows, size = x.flatten(0, 1), self.rows_at_once(x)
        parts = [recomputed(self.narrow, recomputed(self.widen, part)) for part in torch.split(rows, size)]
        out = dropped(self.dropout, torch.cat(parts) if len(parts) > 1 else parts[0], use_dropout)
        return out.view(x.shape)

    def rows_at_once(self, x: Tensor) -> int:
        """Tokens whose hidden layers exist at once, beside those kept for the backward pass: a CPU computes as fast."""
        count = x.shape[0] * x.shape[1]
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return count
        return max(64, HIDDEN_AT_ONCE // self.hidden.to_hidden.out_features // 64 * 64)


# --------------------------------------------------------------------------------------------------------- 4 positions


class Piece(NamedTuple):
    """Part of a call that the layers take at once: n tokens of one block, or t whole blocks.

    Rows agree, and `start`, `place` and `complete` are no tensors, or they differ, and then these are (b,) and `counts`
    says how many of the n tokens a row really brings. Several blocks only when every memory is full.
    """

    start: int | Tensor  # the first token of the piece in the call
    place: int | Tensor  # tokens already in the block
    t: int  # blocks
    n: int  # tokens of each
    complete: bool | Tensor  # whether the block is full afterwards
    blocks: int  # complete blocks that every row remembers
    ahead: Tensor | None = None  # (b,) blocks that a row remembers beyond these
    counts: Tensor | None = None
    overwrite: bool = False  # the memories before the piece are given away: new tokens may be written into them
    use_dropout: bool | None = None  # None: in training mode

    def one_by_one(self) -> list[Piece]:
        """The same piece, a block at a time."""
        return [self._replace(t=1)] * self.t


class Distances(NamedTuple):
    """Query position - key position, for all queries and keys of a piece."""

    values: Tensor  # all that occur, ascending
    seen: Tensor  # which of them a query sees, bool
    pairs: Tensor  # index into these for each query and key, (n, j), or (b, n, j) where places differ


class Pattern(NamedTuple):
    """Who sees whom in the self-attention of a piece, for a layer that remembers m entries.

    Positions count from the start of the block; remembered entries stand at -m ... -1.
    """

    first: int  # of [remembered entries ; block], the part that some query sees: from here
    last: int  # to here
    distances: Distances | None  # where there is a mask or a position bias
    mask: Tensor | None  # True where visible, (n, j) or (b, n, j); None: everywhere, or causal
    added: Tensor | None  # the same as what is added to the logits, see `additive`; None with a position bias
    causal: bool  # n = j, and each query sees the keys up to its own
    q_tables: Rotation | None  # the rotary tables of the queries, and of all of [remembered entries ; block]
    k_tables: Rotation | None
    new_tables: Rotation | None  # those of the keys of the new tokens


class Rotation(NamedTuple):
    """cos and sin of the angles of some positions, times their xPos factor. Each (..., j, e), at least fp32.

    The sine has a minus sign in the first half of the channels, which takes from the second.
    """

    cos: Tensor
    sin: Tensor


class XPos(nn.Module):
    """Rotary positions with the xPos decay (Sun et al. 2022), over all channels, the two halves of a head as pairs.

    Channel pair i turns by position * 10000^(-2i/e); queries are scaled by zeta_i^(position / 512), keys by its
    inverse, with zeta_i = (2i + 0.4 e) / (1.4 e). Only differences of positions matter. The tables are kept in fp32
    (fp64 in an fp64 model) whatever the type of the model is, for positions -low ... high - 1.
    """

    SCALE_BASE = 512

    def __init__(self, dim_head: int, low: int, high: int) -> None:
        super().__init__()
        self.dim_head, self.low, self.high = dim_head, low, high
        self.register_buffer("tables", torch.empty(0), persistent=False)
        self.tables: Tensor
        self.reset_tables()

    def reset_tables(self, like: Tensor | None = None) -> None:
        """Computes the tables anew, on the device and for the type of `like`, or that the buffer has now."""
        with torch.inference_mode(False):  # the tables are made there, too, as tensors that training may save
            self.tables = self.computed_tables(self.tables if like is None else like)

    def computed_tables(self, like: Tensor) -> Tensor:
        """(4, low + high, e): cosine and sine for queries, and for keys."""
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        even = torch.arange(0, self.dim_head, 2, device=device, dtype=torch.float32)
        frequency = 1.0 / (10000.0 ** (even / self.dim_head))  # fp32 in every model, so that all agree on them
        zeta = (even + 0.4 * self.dim_head) / (1.4 * self.dim_head)
        position = torch.arange(-self.low, self.high, device=device, dtype=dtype)[:, None]
        angle, decay = position * frequency.to(dtype), zeta.to(dtype) ** (position / self.SCALE_BASE)
        cos, sin = (torch.cat(halves, dim=-1) for halves in ((angle.cos(), angle.cos()), (-angle.sin(), angle.sin())))
        decay = torch.cat((decay, decay), dim=-1)
        return torch.stack([cos * decay, sin * decay, cos / decay, sin / decay])

    def _apply(self, fn: Any, recurse: bool = True) -> XPos:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_tables()
        return self

    def at(self, first: int | Tensor, count: int) -> tuple[Rotation, Rotation]:
        """The tables of `count` positions from `first` on, for queries and keys; (b,) `first` gives (b, 1, j, e)."""
        if isinstance(first, Tensor):
            rows = first[:, None] + torch.arange(self.low, self.low + count, device=first.device)
            cos_q, sin_q, cos_k, sin_k = self.tables[:, rows.clamp(max=self.low + self.high - 1)][:, :, None]
        else:
            cos_q, sin_q, cos_k, sin_k = self.tables[:, self.low + first : self.low + first + count]
        return Rotation(cos_q, sin_q), Rotation(cos_k, sin_k)


def rotate(x: Tensor, table: Rotation | None) -> Tensor:
    """x (..., j, e) turned by its positions."""
    if table is None:
        return x
    turned = x.roll(x.shape[-1] // 2, dims=-1)  # the other of each pair
    return torch.addcmul(x * table.cos, turned, table.sin).to(x.dtype)


class T5Bias(nn.Module):
    """A learned bias per head and bucket of distances (Raffel et al. 2019): 16 exact, 16 logarithmic up to 128."""

    _no_weight_decay = ("table",)
    BUCKETS, EXACT, FARTHEST = 32, 16, 128

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.heads, self.BUCKETS))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=self.BUCKETS**-0.5)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance >= 0, int64."""
        ratio = distance.clamp(min=1).to(torch.float32) / self.EXACT
        steps = self.BUCKETS - self.EXACT
        far = self.EXACT + (ratio.log() / math.log(self.FARTHEST / self.EXACT) * steps).long()
        return torch.where(distance < self.EXACT, distance, far.clamp(max=self.BUCKETS - 1))

    def forward(self, distance: Tensor) -> Tensor:
        """Distances (j,) -> bias (h, j)."""
        return self.table[:, self.bucket(distance.clamp(min=0))]


class DynamicBias(nn.Module):
    """A bias per head that a small MLP computes from the distance (as in CrossFormer, arXiv 2108.00154)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = max(8, config.dim // 4)
        self.use_log, self.unit = config.dynamic_log_distance, config.block_width
        self.to_hidden = nn.Linear(1, width)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, config.heads))

    def forward(self, distance: Tensor) -> Tensor:
        """Distances (j,) -> bias (h, j)."""
        steps = distance.clamp(min=0).to(torch.promote_types(self.to_hidden.weight.dtype, torch.float32))[:, None]
        with without_autocast(distance.device.type):  # bf16 tells 256 distances apart, and no more
            x = torch.log1p(steps) if self.use_log else steps / self.unit
            for layer in (self.to_hidden, *self.mlp):
                is_map = isinstance(layer, nn.Linear)
                x = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)) if is_map else layer(x)
        return x.t()


POSITION_BIASES = {"t5": T5Bias, "dynamic": DynamicBias}


# ------------------------------------------------------------------------------------------------------- 5 attention


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False,
    dropout: float = 0.0, use_flash: bool = True,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + mask) v. q (b, h, n, e), k and v (b, g, j, e) -> (b, h, n, e).

    mask: bool (True where visible) or additive, to be broadcast to (b, h, n, j); or (b, 1, n r, j) for the r = h / g
    heads that share a key/value head. A query that sees no key gives zeros. Where the mask allows it, the queries of r
    heads are one long row against one matrix of keys; otherwise keys and values are taken r times.
    """
    (batch, heads, n, width), groups = q.shape, k.shape[1]
    shared = heads // groups
    k, v = k.to(q.dtype), v.to(q.dtype)
    if k.shape[2] == 0:
        return torch.zeros_like(q)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if shared > 1 and not causal and (mask is None or n == 1 or mask.shape[2] == n * shared):
        rows = q.view(batch, groups, shared, n, width).transpose(2, 3).flatten(2, 3)
        if mask is not None and mask.shape[1] > 1:  # n = 1
            mask = mask.view(-1, groups, shared, mask.shape[3])
        found = attend(rows, k, v, scale=scale, mask=mask, dropout=dropout, use_flash=use_flash)
        return found.view(batch, groups, n, shared, width).transpose(2, 3).flatten(1, 2)
    if shared > 1:
        k, v = (x[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for x in (k, v))
    if use_flash:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=scale)
    logits = (q * scale) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return F.dropout(logits.softmax(-1), dropout) @ v
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    empty = (mask == -math.inf).all(-1, keepdim=True)
    weights = logits.add_(mask.masked_fill(empty, 0)).softmax(-1)
    return (F.dropout(weights, dropout) @ v).masked_fill(empty, 0)


def batched(mask: Tensor) -> Tensor:
    """A mask (n, j) or (b, n, j) -> (1 or b, 1, n, j)."""
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


MASK_AT_ONCE = 2**22  # numbers of the largest mask that is repeated for heads


def additive(mask: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """A mask (n, j) or (b, n, j) as what is added to the logits: (1 or b, 1, n, j).

    A small one is repeated for the `shared` heads of a key/value head, (1 or b, 1, n r, j), so that `attend` can take
    their queries as one long row.
    """
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    return batched(added.repeat_interleave(shared, dim=-2) if shared * mask.numel() <= MASK_AT_ONCE else added)


def split_heads(x: Tensor, t: int, heads: int) -> Tensor:
    """(b, t n, h e) -> (b t, h, n, e): blocks go to the batch."""
    return x.reshape(x.shape[0] * t, -1, heads, x.shape[2] // heads).transpose(1, 2)


def join_heads(x: Tensor, t: int) -> Tensor:
    """(b t, h, n, e) -> (b, t n, h e)."""
    return x.transpose(1, 2).reshape(x.shape[0] // t, -1, x.shape[1] * x.shape[3])


# --------------------------------------------------------------------------------------------------------- 6 memory


def cat_keys(old: Tensor, new: Tensor) -> Tensor:
    """[old ; new] along the keys."""
    return torch.cat((old, new), dim=2) if old.shape[2] else new


def extend(buffer: KV, new: KV, piece: Piece, start: int = 0) -> KV:
    """A buffer (b, g, j, e), in which the block begins at `start`, with the new tokens in their places."""
    if piece.overwrite and piece.n == 1 and is_writable(buffer.k) and is_writable(buffer.v):
        return overwritten(buffer, new, piece, start)
    if isinstance(piece.place, int):
        start, stop = start + piece.place, start + piece.place + piece.n
        return KV(*(torch.slice_scatter(old, x.to(old.dtype), 2, start, stop) for old, x in zip(buffer, new)))
    assert piece.counts is not None
    slot = torch.arange(-start, buffer.k.shape[2] - start, device=buffer.k.device) - piece.place[:, None]
    fresh = ((slot >= 0) & (slot < piece.counts[:, None]))[:, None, :, None]
    if piece.n > 1:
        index = slot.clamp(0, piece.n - 1)[:, None, :, None].expand_as(buffer.k)  # into the new tokens
        new = KV(*(x.gather(2, index) for x in new))
    return KV(*(torch.where(fresh, x.to(old.dtype), old) for old, x in zip(buffer, new)))


def is_writable(x: Tensor) -> bool:
    """Whether x has memory of its own for each number, and may be changed here."""
    if not x.is_contiguous():
        return False
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference()


def overwritten(buffer: KV, new: KV, piece: Piece, start: int) -> KV:
    """`extend` by one token a row, in the buffer itself; a row that brings none keeps what it has there."""
    for old, x in zip(buffer, new):
        if isinstance(piece.place, int):
            old.narrow(2, start + piece.place, 1).copy_(x)  # an index would be a constant of a compiled graph
        else:
            assert piece.counts is not None
            index = per_row(start + piece.place, old).expand_as(x)
            old.scatter_(2, index, torch.where(per_row(piece.counts, old) > 0, x.to(old.dtype), old.gather(2, index)))
    return buffer


def windows(stream: Tensor, width: int, step: int, t: int) -> Tensor:
    """(b, g, j, e) -> (b, t, g, width, e): window i starts at i * step."""
    if t == 1:
        return stream[:, None, :, :width]
    if width % step:
        return stream.unfold(2, width, step)[:, :, :t].permute(0, 2, 1, 4, 3)
    parts = rearrange(stream, "b g (t n) e -> b t g n e", n=step)
    return torch.cat([parts[:, i : i + t] for i in range(width // step)], dim=3)


class Compressor(nn.Module):
    """Strided convolutions that turn `factor` tokens into one entry, keys and values apart (Rae et al. 2019)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.width, self.factor, self.groups = config.block_width, config.compressed_mem_factor, config.kv_heads
        channels = 2 * config.kv_heads * config.dim_head
        self.conv = nn.Conv1d(channels, channels, self.factor, stride=self.factor, groups=2)

    def forward(self, evicted: KV) -> KV:
        """(b, g, t w, e) -> (b, g, t (w // factor), e); the oldest w mod factor tokens of a block are passed over."""
        g = self.groups
        t = evicted.k.shape[2] // self.width
        both = torch.cat([rearrange(x, "b g (t w) e -> (b t) (g e) w", t=t) for x in evicted], dim=1)
        k, v = self.conv(both[:, :, self.width % self.factor :]).chunk(2, dim=1)
        return KV(*(rearrange(x, "(b t) (g e) w -> b g (t w) e", t=t, g=g) for x in (k, v)))


def remember(
    memory: LayerMemory, filled: KV, stream: KV | None, queue: KV | None, window: KV | None, piece: Piece
) -> LayerMemory:
    """The memory after a piece.

    filled: the block being filled, or whole blocks. stream, queue: [xl ; blocks that are complete now] and
    [compressed ; what they push out of the XL memory, compressed], or None where no block is complete.
    """
    if stream is None:
        return memory._replace(block=filled, window=window)
    xl, block = newest(stream, memory.xl), KV(*(zeros(x, *x.shape) for x in memory.block))
    compressed = None if queue is None or memory.compressed is None else newest(queue, memory.compressed)
    if isinstance(piece.complete, Tensor):
        rows = piece.complete
        xl, block = choose_rows(rows, xl, memory.xl), choose_rows(rows, block, filled)
        if compressed is not None and memory.compressed is not None:
            compressed = choose_rows(rows, compressed, memory.compressed)
    return memory._replace(xl=xl, block=block, compressed=compressed, window=None)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of that shape that take the memory of one number."""
    return like.new_zeros(()).expand(shape)


def newest(stream: KV, queue: KV) -> KV:
    """The last entries of a stream, as many as the queue holds, in buffers of their own."""
    width = queue.k.shape[2]
    last = (x[:, :, x.shape[2] - width :].to(q.dtype) for x, q in zip(stream, queue))
    return KV(*(x.clone(memory_format=torch.contiguous_format) for x in last))


# ----------------------------------------------------------------------------------------------------------- 7 gates


class GateLinear(nn.Linear):
    """A gate's map, with the authors' initial bias; `optim.parameter_groups` leaves it undecayed."""

    _no_weight_decay = ("weight", "bias")

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.bias, std=0.1)


class FixedGate(nn.Module):
    """old * g + z * (1 - g), g = sigmoid(b): a learned share per channel of the old state is kept."""

    _no_weight_decay = ("keep",)

    def __init__(self, dim: int, dim_source: int) -> None:
        super().__init__()
        self.keep = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.keep, std=0.1)

    def forward(self, old: Tensor, z: Tensor, source: Tensor) -> Tensor:
        return torch.lerp(old, z.to(old.dtype), (-self.keep.to(old.dtype)).sigmoid())  # 1 - g, however small


class FullGate(nn.Module):
    """old * g + z * (1 - g), g = sigmoid(h W + b + 1), h the source of the candidate."""

    def __init__(self, dim: int, dim_source: int) -> None:
        super().__init__()
        self.to_keep = GateLinear(dim_source, dim)

    def forward(self, old: Tensor, z: Tensor, source: Tensor) -> Tensor:
        write: Tensor = (-1 - self.to_keep(source).to(old.dtype)).sigmoid()  # 1 - g
        return torch.lerp(old, z.to(old.dtype), write)


class LSTMGate(nn.Module):
    """old * f + z * i, f = sigmoid(h Wf + bf + 1), i = sigmoid(h Wi + bi - 1), h the source of the candidate."""

    def __init__(self, dim: int, dim_source: int) -> None:
        super().__init__()
        self.to_forget = GateLinear(dim_source, dim)
        self.to_input = GateLinear(dim_source, dim)

    def forward(self, old: Tensor, z: Tensor, source: Tensor) -> Tensor:
        forget: Tensor = (self.to_forget(source).to(old.dtype) + 1).sigmoid()
        take: Tensor = (self.to_input(source).to(old.dtype) - 1).sigmoid()
        return old * forget + z * take


GATES = {"fixed": FixedGate, "full": FullGate, "lstm": LSTMGate}


# --------------------------------------------------------------------------------------------------- 8 recurrent cell


class SkipUpdate(nn.Module):
    """gate(S, C Wo): one gate, no feed-forward (the paper's best)."""

    def __init__(self, config: Config, dim_attended: int) -> None:
        super().__init__()
        self.to_candidate = nn.Linear(dim_attended, config.dim, bias=config.candidate_bias)
        self.gate = GATES[config.gate](config.dim, dim_attended)

    def forward(self, state: Tensor, attended: Tensor) -> Tensor:
        new: Tensor = self.gate(state, self.to_candidate(attended), attended)
        return new


class DualUpdate(nn.Module):
    """U = gate(S, C Wo), then gate'(U, feed-forward(U)): a gate in the place of each residual connection."""

    def __init__(self, config: Config, dim_attended: int) -> None:
        super().__init__()
        self.attention = SkipUpdate(config, dim_attended)
        self.norm = make_norm(config)
        self.hidden = Hidden(config, config.dim)
        self.to_candidate = nn.Linear(config.ff_dim, config.dim, bias=config.candidate_bias)
        self.gate = GATES[config.gate](config.dim, config.ff_dim)

    def forward(self, state: Tensor, attended: Tensor) -> Tensor:
        state = self.attention(state, attended)
        hidden = self.hidden(self.norm(state.to(self.to_candidate.weight.dtype)))
        new: Tensor = self.gate(state, self.to_candidate(hidden), hidden)
        return new


class SingleUpdate(nn.Module):
    """gate(S, tanh(hidden(C) W)): one gate around a feed-forward on what was attended to."""

    def __init__(self, config: Config, dim_attended: int) -> None:
        super().__init__()
        self.hidden = Hidden(config, dim_attended)
        self.to_candidate = nn.Linear(config.ff_dim, config.dim, bias=config.candidate_bias)
        self.gate = GATES[config.gate](config.dim, config.ff_dim)

    def forward(self, state: Tensor, attended: Tensor) -> Tensor:
        hidden = self.hidden(attended)
        new: Tensor = self.gate(state, self.to_candidate(hidden).tanh(), hidden)
        return new


UPDATES = {"skip": SkipUpdate, "dual": DualUpdate, "single": SingleUpdate}


class RecurrentCell(nn.Module):
    """The horizontal direction: states (b, s, d) attend to themselves and to the tokens of a block, then change."""

    _no_weight_decay = ("initial", "ids")

    def __init__(self, config: Config) -> None:
        super().__init__()
        inner, dim = config.heads * config.dim_head, config.dim
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.use_flash = config.use_flash_attn
        self.initial = nn.Parameter(torch.empty(config.num_state_vectors, dim))
        self.ids = nn.Parameter(torch.empty(config.num_state_vectors, dim))
        self.norm = make_norm(config)
        self.to_kv = nn.Linear(dim, 2 * config.kv_heads * config.dim_head, bias=False)
        self.to_q = nn.Linear(dim, 2 * inner, bias=False)  # [of the states among themselves ; to the tokens]
        self.self_norm = HEADS_NORMS[config.qk_norm](config)
        self.cross_norm = HEADS_NORMS[config.qk_norm](config)
        self.update = UPDATES[config.state_update](config, 2 * inner)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.initial, std=0.1)
        nn.init.normal_(self.ids)

    def identified(self, state: Tensor) -> Tensor:
        """norm(S) + ids: what keys, values and queries of the states come from."""
        normed: Tensor = self.norm(state.to(self.ids.dtype))
        return normed + self.ids

    def project(self, state: Tensor) -> KV:
        """State (b, s, d) -> its keys and values (b, g, s, e), shared by both directions."""
        return self.view_of(self.identified(state))

    def view_of(self, source: Tensor) -> KV:
        k, v = split_heads(self.to_kv(source), 1, 2 * self.kv_heads).chunk(2, dim=1)
        return KV(self.self_norm.view(k), v)

    def write(
        self, state: Tensor, source: Tensor, state_k: Tensor, state_v: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None, gain: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The state after a block whose keys and values are k, v (b, g, j, e).

        source: the identified state; state_k, state_v: its projection; gain: of the queries.
        """
        q = self.self_norm.normalise(split_heads(self.to_q(source), 1, 2 * self.heads), gain)
        to_self, to_cross = q.chunk(2, dim=1)
        own = attend(to_self, state_k, state_v, scale=self.self_norm.scale, use_flash=self.use_flash)
        others = attend(to_cross, k, v, scale=self.cross_norm.scale, mask=mask, use_flash=self.use_flash)
        new: Tensor = self.update(state, torch.cat((join_heads(own, 1), join_heads(others, 1)), dim=-1))
        return new

    def forward(self, state: Tensor, view: KV, tokens: KV, mask: Tensor | None = None) -> tuple[KV, Tensor]:
        """Goes through t complete blocks.

        Args:
            state: (b, s, d), as of the start of the first block, and `view`, its projection.
            tokens: keys and values (b, t, g, j, e) that the states attend to.
            mask: (b, 1, 1, j) bool, which of these are there; None: all.

        Returns:
            The projection of the state as of the start of each block, (b, t, g, s, e), and the state after the last.
        """
        views, source = [view], self.identified(state)
        gains = self.self_norm.gain(self.heads, of_views=True), self.cross_norm.gain(self.heads)
        gain = torch.cat([one for one in gains if one is not None]) if gains[0] is not None else None
        blocks = list(zip(self.cross_norm.keys(tokens.k).unbind(1), tokens.v.unbind(1)))
        for k, v in blocks:
            state = recomputed(self.write, state, source, *views[-1], k, v, mask, gain)
            if len(views) < len(blocks):
                source = self.identified(state)
                views.append(self.view_of(source))
        return KV(*(torch.stack(x, dim=1) for x in zip(*views))), state


# ---------------------------------------------------------------------------------------------- 9 transformer block


class Passed(NamedTuple):
    """What comes out of a layer."""

    x: Tensor  # tokens, (b, t n, d)
    memory: LayerMemory
    state: Tensor | None  # of the layer's cell, (b, s, d); None in a plain layer
    views: KV | None  # of the states as of the start of each block, (b, t, g, s, e)


class TransformerBlock(nn.Module):
    """One layer: self-attention beside reads of states, feed-forward, and in a recurrent layer the cell it writes."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        is_recurrent = layer in config.recurrent_layers
        inner, reads = config.heads * config.dim_head, config.reads(layer)
        self.heads, self.kv_heads, self.use_flash = config.heads, config.kv_heads, config.use_flash_attn
        self.is_own_read = layer in reads
        self.other_reads = tuple(cell for cell in reads if cell != layer)
        self.state_reads_memory = config.state_reads_memory
        self.block_width = config.block_width
        self.xl_width, self.compressed_width = config.xl_width(layer), config.compressed_width(layer)
        self.attn_dropout = config.attn_dropout
        self.norm = make_norm(config)
        self.input_dropout = nn.Dropout(config.attn_input_dropout)
        self.widths = [inner] * (1 + len(reads)) + [2 * config.kv_heads * config.dim_head]
        self.to_qkv = nn.Linear(config.dim, sum(self.widths), bias=False)  # [q ; a q for each read ; k ; v]
        use_norm = is_recurrent or config.all_layers_qk_rmsnorm
        self.heads_norm = HEADS_NORMS[config.qk_norm if use_norm else "none"](config)
        self.position_bias = POSITION_BIASES[config.positions](config) if config.positions in POSITION_BIASES else None
        self.read_norm = nn.ModuleList(HEADS_NORMS[config.qk_norm](config) for _ in reads)
        self.to_out = nn.Linear(inner * (1 + len(reads)), config.dim, bias=False)
        self.feed_forward = FeedForward(config)
        self.compressor = Compressor(config) if config.compressed_width(layer) else None
        self.cell = RecurrentCell(config) if is_recurrent else None

    def project(self, x: Tensor, use_dropout: bool | None = None) -> Tensor:
        """Tokens (b, t n, d) -> their queries, keys and values, side by side."""
        projected: Tensor = self.to_qkv(dropped(self.input_dropout, self.norm(x), use_dropout))
        return projected

    def self_attention(self, q: Tensor, keys: KV, pattern: Pattern, t: int, use_dropout: bool | None) -> Tensor:
        """Queries (b, t n, h e), keys and values they see (b t, g, j, e) -> (b t, h, n, e)."""
        q = rotate(self.heads_norm.queries(split_heads(q, t, self.heads)), pattern.q_tables)
        mask, causal = pattern.added, pattern.causal
        if self.position_bias is not None:
            mask, causal = self.biases(pattern, q.dtype), False
        dropout = self.attn_dropout if (self.training if use_dropout is None else use_dropout) else 0.0
        return attend(q, keys.k, keys.v, scale=self.heads_norm.scale, mask=mask, causal=causal, dropout=dropout,
                      use_flash=self.use_flash)  # fmt: skip

    def biases(self, pattern: Pattern, dtype: torch.dtype) -> Tensor:
        """The position bias of each query and key, -inf where the key is not seen, (1 or b, h, n, j)."""
        assert pattern.distances is not None and self.position_bias is not None
        values, seen, pairs = pattern.distances
        bias = self.heads_norm.scaled(self.position_bias(values)).to(dtype).masked_fill(~seen, -math.inf)
        bias = bias[:, pairs].movedim(0, -3)
        bias = bias if bias.ndim == 4 else bias[None]
        return bias if pattern.mask is None else bias.masked_fill(~batched(pattern.mask), -math.inf)

    def combine(self, *attended: Tensor) -> Tensor:
        """What each attention found, (b, t n, h e) -> (b, t n, d)."""
        out: Tensor = self.to_out(torch.cat(attended, dim=-1) if len(attended) > 1 else attended[0])
        return out

    def read(self, queries: Sequence[Tensor], views: Sequence[KV], t: int) -> list[Tensor]:
        """What the tokens find in the states: one (b t, h, n, e) for each view (b, t, g, s, e) and its queries."""
        found = []
        norms: Iterable[HeadsNorm] = self.read_norm  # type: ignore[assignment]
        for projected, norm, view in zip(queries, norms, views):
            q = norm.queries(split_heads(projected, t, self.heads), of_views=True)
            k, v = (x.flatten(0, 1) for x in view)
            found.append(attend(q, k, v, scale=norm.scale, use_flash=self.use_flash))
        return found

    def forward(
        self, x: Tensor, memory: LayerMemory, state: Tensor | None, view: KV | None, reads: Sequence[KV], piece: Piece,
        pattern: Pattern,
    ) -> Passed:  # fmt: skip
        """One piece of the sequence through this layer.

        Args:
            x: (b, t n, d).
            memory: of this layer, before the piece.
            state, view: of this layer's cell as of the block's start; None in a plain layer.
            reads: views (b, t, g, s, e) of other layers' states, to be read here.

        Returns:
            Tokens, memory and state after the piece, and the views of the own state.
        """
        t = piece.t
        project = partial(self.project, use_dropout=piece.use_dropout)
        projected = recomputed(project, x, draws=self.input_dropout.p > 0)
        q, *to_read, kv = torch.split(projected, self.widths, dim=-1)
        k, v = split_heads(kv, 1, 2 * self.kv_heads).chunk(2, dim=1)
        new = KV(self.heads_norm.store(k), v)
        is_whole = piece.n == self.block_width and piece.counts is None
        filled = new if is_whole else extend(memory.block, new, piece)
        stream = queue = None
        if piece.complete is not False:
            stream = KV(*map(cat_keys, memory.xl, filled))
        if stream is not None and memory.compressed is not None and self.compressor is not None:
            evicted = self.compressor(KV(*(x[:, :, : filled.k.shape[2]] for x in stream)))
            queue = KV(*map(cat_keys, memory.compressed, evicted))

        views = None
        if self.cell is not None and state is not None and view is not None:
            views = KV(view.k[:, None], view.v[:, None])
            if stream is not None:
                views, written = self.cell(state, view, *self.to_be_read_by_states(stream, filled, piece))
                rows = piece.complete
                state = written if isinstance(rows, bool) else torch.where(per_row(rows, state), written, state)
            if self.is_own_read:
                reads = (views, *reads)

        window = None if is_whole else self.extended_window(memory, new, pattern, piece)
        keys = window or self.whole_windows(memory, filled, stream, queue, pattern, t)
        if t == 1:
            keys = KV(*(x[:, :, pattern.first : pattern.last] for x in keys))
        attended = [self.self_attention(q, keys, pattern, t, piece.use_dropout), *self.read(to_read, reads, t)]
        x = x + recomputed(self.combine, *(join_heads(found, t) for found in attended))
        x = x + self.feed_forward(x, piece.use_dropout)
        return Passed(x, remember(memory, filled, stream, queue, window, piece), state, views)

    def seen(self, k: Tensor, table: Rotation | None) -> Tensor:
        """Stored keys as the queries see them: normalised, scaled, and turned by their positions."""
        return rotate(self.heads_norm.keys(k), table)

    def extended_window(self, memory: LayerMemory, new: KV, pattern: Pattern, piece: Piece) -> KV:
        """[compressed ; xl ; block] with the new tokens in it, (b, g, m + w, e)."""
        window = memory.window
        if window is None:
            k, v = (cat_keys(past, block) for past, block in zip(self.past(memory), memory.block))
            window = KV(self.seen(k, pattern.k_tables), v)
        new = KV(self.seen(new.k, pattern.new_tables), new.v)
        return extend(window, new, piece, start=self.compressed_width + self.xl_width)

    def whole_windows(
        self, memory: LayerMemory, filled: KV, stream: KV | None, queue: KV | None, pattern: Pattern, t: int
    ) -> KV:
        """[compressed ; xl ; block] of each of t whole blocks, (b t, g, m + w, e)."""
        if t == 1:
            k, v = map(cat_keys, self.past(memory), filled)
            return KV(self.seen(k, pattern.k_tables), v)
        assert stream is not None
        width, size = self.block_width, self.compressed_width
        keys = [windows(x, self.xl_width + width, width, t) for x in stream]
        if queue is not None:
            keys = [torch.cat((windows(q, size, (q.shape[2] - size) // t, t), k), dim=3) for q, k in zip(queue, keys)]
        k, v = (x.flatten(0, 1) for x in keys)
        return KV(self.seen(k, pattern.k_tables), v)

    def past(self, memory: LayerMemory) -> KV:
        """[compressed ; xl], (b, g, m, e)."""
        return memory.xl if memory.compressed is None else KV(*map(cat_keys, memory.compressed, memory.xl))

    def to_be_read_by_states(self, stream: KV, filled: KV, piece: Piece) -> tuple[KV, Tensor | None]:
        """What states attend to as each block completes, (b, t, g, j, e), and which of it is there, (b, 1, 1, j)."""
        width, t = self.block_width, piece.t
        if not self.state_reads_memory:
            return KV(*(windows(x, width, width, t) for x in filled)), None
        if piece.ahead is None:
            absent = self.xl_width - min(self.xl_width, piece.blocks * width)
            return KV(*(windows(x[:, :, absent:], self.xl_width + width - absent, width, t) for x in stream)), None
        absent_rows = self.xl_width - (piece.blocks + piece.ahead) * width
        mask = torch.arange(self.xl_width + width, device=absent_rows.device) >= absent_rows[:, None]
        return KV(*(x[:, None] for x in stream)), mask[:, None, None]


# -------------------------------------------------------------------------------------- 10 Block-Recurrent Transformer


def make_pattern(
    config: Config, piece: Piece, layer: int, rotary: XPos | None, device: torch.device, dtype: torch.dtype
) -> Pattern:
    """Who sees whom in the self-attention of `layer` during `piece`; dtype is that of the queries."""
    xl, compressed, nearest = config.xl_width(layer), config.compressed_width(layer), config.nearest
    place, n, width = piece.place, piece.n, config.block_width
    is_ragged = piece.ahead is not None or not isinstance(place, int)
    low, high = -(xl + compressed), place + n if isinstance(place, int) else width
    if isinstance(place, int) and not is_ragged:
        held = min(xl, piece.blocks * width)
        held += min(compressed, max(0, piece.blocks - config.num_xl_blocks) * config.compressed_per_block)
        low = -held if not nearest or piece.t > 1 else max(-held, place - width)
        high = place + n - (nearest if piece.t == 1 else 0)
    causal, is_masked = False, is_ragged
    if not is_ragged and (n > 1 or piece.t > 1):
        if low == 0 and place == 0 and not nearest:  # a branch, and no bool kept: `place` may be symbolic
            causal = True
        else:
            is_masked = True

    distances = mask = added = None
    has_bias = config.positions in POSITION_BIASES
    if is_masked or has_bias:
        keys = torch.arange(low, high, device=device)
        distances = make_distances(config, place, n, low, high, keys)
    if is_masked and distances is not None:
        mask = distances.seen[distances.pairs]
        if is_ragged:
            mask = mask & held_rows(config, piece, keys, xl, compressed)
        added = None if has_bias else additive(mask, config.heads // config.kv_heads, dtype)
    first, last = xl + compressed + low, xl + compressed + high
    if rotary is None:
        return Pattern(first, last, distances, mask, added, causal, None, None, None)
    q_tables, new_tables = rotary.at(place, n)
    k_tables = rotary.at(-(xl + compressed), xl + compressed + width)[1]
    return Pattern(first, last, distances, mask, added, causal, q_tables, k_tables, new_tables)


def make_distances(config: Config, place: int | Tensor, n: int, low: int, high: int, keys: Tensor) -> Distances:
    """Between n queries from `place` on and the keys at low ... high - 1."""
    width, device = config.block_width, keys.device
    queries = torch.arange(n, device=device) + (place if isinstance(place, int) else place[:, None])
    least = (place if isinstance(place, int) else 0) - (high - 1)
    most = (place if isinstance(place, int) else width - 1) + (n - 1) - low
    values = torch.arange(least, most + 1, device=device)
    seen = (values >= config.nearest) & (values <= width) if config.nearest else values >= 0
    return Distances(values, seen, queries[..., :, None] - keys - least)


def held_rows(config: Config, piece: Piece, keys: Tensor, xl: int, compressed: int) -> Tensor:
    """Which keys, at positions (j,), each row holds at all, (b, 1, j) bool; those of the block count as held."""
    blocks = torch.as_tensor(piece.blocks, device=keys.device) + (0 if piece.ahead is None else piece.ahead)
    blocks = blocks.view(-1, 1, 1)
    in_xl = keys >= -(blocks * config.block_width).clamp(max=xl)
    entries = ((blocks - config.num_xl_blocks) * config.compressed_per_block).clamp(0, compressed)
    return torch.where(keys < -xl, keys >= -xl - entries, in_xl)


def plan(config: Config, n: int, place: int, blocks: int, ahead: Tensor | None) -> tuple[list[Piece], Any]:
    """Cuts n tokens into pieces while all rows agree: the rest of the block, whole blocks, the beginning of a block.

    Blocks go one by one until every memory is full. Also returns (place, blocks, ahead) afterwards.
    """
    pieces, width, reach, start = [], config.block_width, config.reach, 0
    while start < n:
        if blocks >= reach:
            ahead = None
        whole = (n - start) // width if place == 0 and blocks >= reach else 0
        t, tokens = (whole, width) if whole else (1, min(n - start, width - place))
        held = blocks if reach else config.num_xl_blocks
        if place + tokens == width:  # a branch, and no bool kept: torch.compile traces a symbolic place
            pieces.append(Piece(start, place, t, tokens, True, held, ahead))
            start, place, blocks = start + t * tokens, 0, min(reach, blocks + t)
            ahead = None if ahead is None else ahead.clamp(max=reach - blocks)
        else:
            pieces.append(Piece(start, place, t, tokens, False, held, ahead))
            start, place = start + tokens, place + tokens
    return pieces, (place, blocks, None if blocks >= reach else ahead)


def plan_rows(
    config: Config, lengths: list[int], starts: list[int], places: list[int], held: list[int], device: torch.device
) -> tuple[list[Piece], Any]:
    """The same while rows differ: each piece takes every row to the end of its block, or of its tokens."""
    width, reach, pieces = config.block_width, config.reach, []

    def tensor(values: list[Any]) -> Tensor:
        return torch.tensor(values, device=device)

    def agreed(values: list[int]) -> int | Tensor:
        return values[0] if len(set(values)) == 1 else tensor(values)

    def ahead() -> Tensor | None:
        return None if len(set(held)) == 1 else tensor([h - min(held) for h in held])

    while any(start < stop for start, stop in zip(starts, lengths)):
        left = [stop - start for start, stop in zip(starts, lengths)]
        t = min(left) // width if not any(places) and min(held) >= reach else 0
        counts = [t * width] * len(left) if t else [min(x, width - place) for x, place in zip(left, places)]
        n, blocks = width if t else max(counts), min(held) if reach else config.num_xl_blocks
        full = [place + count == width or t > 0 for place, count in zip(places, counts)]
        if len(set(zip(places, counts))) == 1:
            pieces.append(Piece(agreed(starts), places[0], t or 1, n, full[0], blocks, ahead()))
        else:
            complete = tensor(full) if any(full) else False
            pieces.append(Piece(tensor(starts), tensor(places), 1, n, complete, blocks, ahead(), tensor(counts)))
        starts = [start + count for start, count in zip(starts, counts)]
        places = [0 if f else place + count for f, place, count in zip(full, places, counts)]
        held = [min(reach, h + (t or 1)) if f else h for f, h in zip(full, held)]
    return pieces, (agreed(places), min(held), ahead())


def hand_down(layers: list[LayerMemory], complete: Tensor | bool, width: int) -> list[LayerMemory]:
    """Enhanced recurrence: the newest block in the memory of each layer becomes what the next layer computed."""
    handed = []
    for layer, above in pairwise(layers):
        xl = KV(*(torch.cat((own[:, :, :-width], new[:, :, -width:]), dim=2) for own, new in zip(layer.xl, above.xl)))
        handed.append(layer._replace(xl=choose_rows(complete, xl, layer.xl) if isinstance(complete, Tensor) else xl))
    return [*handed, layers[-1]]


LOGITS_AT_ONCE = 2**23  # numbers of the largest matrix of logits that a loss makes


class CrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies, in nats, of logits x W^T, of which `size` rows exist at a time.

    With p = softmax(x W^T), the gradient of a row's logits is p - onehot(target). Those of x and W are taken from it
    in the forward pass, while the rows are there, so that nothing is computed twice.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, targets: Tensor, ignore: int, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, d), weight (v, d), targets (n,) -> the sum, and its gradients (n, d) and (v, d)."""
        total, grad_weight = at_least_fp32(x.new_zeros(())), at_least_fp32(torch.zeros_like(weight))
        grad_x = []
        for rows, wanted in zip(torch.split(x, size), torch.split(targets, size)):
            counted = (wanted != ignore)[:, None]
            index = torch.where(counted, wanted[:, None], 0)
            logits = F.linear(rows, weight)
            p = at_least_fp32(logits).log_softmax(-1)
            total = total - (p.gather(1, index) * counted).sum()
            p.exp_().scatter_add_(1, index, p.new_tensor(-1).expand(index.shape))
            grad = p.to(logits.dtype)
            grad_x.append((grad @ weight * counted).to(x.dtype))
            grad_weight = grad_weight + at_least_fp32(grad.t() @ (rows * counted))
        return total, torch.cat(grad_x), grad_weight.to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, targets, ctx.ignore, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, targets, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, targets, grad_x, grad_weight = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again: the formula
            p = F.linear(x, weight).softmax(-1)
            counted = (targets != ctx.ignore)[:, None]
            index = torch.where(counted, targets[:, None], 0)
            wrong = p.scatter_add(1, index, -torch.ones_like(index, dtype=p.dtype)) * counted * grad
            return wrong @ weight, wrong.t() @ x, None, None, None
        return grad * grad_x, grad * grad_weight, None, None, None


def init_lecun(module: nn.Module) -> None:
    """The initial values of the paper's authors: truncated normal, variance 1 / inputs, a tenth of that for gates."""
    if isinstance(module, nn.Linear):
        variance = (0.1 if isinstance(module, GateLinear) else 1.0) / module.in_features
        std = variance**0.5 / 0.87962566  # of the normal before it is cut at two of them
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


def renew_tables(model: nn.Module, _: Any) -> None:
    """After load_state_dict(assign=True) of weights on another device or of another type."""
    model.rotary.reset_tables(model.token_emb.weight)  # type: ignore[union-attr, operator]


class BlockRecurrentTransformer(nn.Module):
    """A language model that carries memories and states along a stream of tokens.

    Args:
        config: a `Config`, or its fields as keywords (`num_tokens=256, dim=512, depth=6, ...`).

    Raises:
        ValueError: options out of range or that cannot go together.
    """

    @typechecked
    def __init__(self, config: Config | None = None, **options: Any) -> None:
        super().__init__()
        if config is not None and options:
            raise ValueError(f"config was given, and so were the options {sorted(options)}")
        self.config = config = Config(**options) if config is None else config
        self.token_emb = nn.Embedding(config.num_tokens, config.dim)
        self.emb_dropout = nn.Dropout(config.emb_dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(1, config.depth + 1))
        self.norm = make_norm(config)
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.to_logits = None if config.tie_embeddings else nn.Linear(config.dim, config.num_tokens, bias=False)
        self.rotary = None
        if config.positions == "xpos":
            layers = range(1, config.depth + 1)
            remembered = max(config.xl_width(layer) + config.compressed_width(layer) for layer in layers)
            self.rotary = XPos(config.dim_head, remembered, config.block_width)
            self.register_load_state_dict_post_hook(renew_tables)  # type: ignore[no-untyped-call]
        self.stages = config.stages()
        self.cells = sorted(config.recurrent_layers)  # layers with a state, from 1
        if config.init == "lecun":
            self.apply(init_lecun)

    # -- other ways to make one

    @classmethod
    @typechecked
    def paper(cls, size: str = "medium_150M", variant: str = "fixed:skip", **options: Any) -> BlockRecurrentTransformer:
        """A new model of the paper as its authors' code builds and initialises it.

        Args:
            size: small_37M, medium_150M, ..., large_1200M, tall_24L (`paper.SIZES`).
            variant: slide, xl, fixed:skip, fixed:dual, fixed:single, lstm:skip, ..., full:single, feedback
                (`paper.VARIANTS`).
            options: fields of `Config` to be otherwise (num_tokens=256, block_width=1024, ...).
        """
        return cls(Config(**paper.options(size, variant, **options)))

    @classmethod
    @typechecked
    def from_lucidrains(
        cls, state_dict: dict[str, Tensor], *, max_seq_len: int, block_width: int,
        read_recurrent_layers: tuple[int, ...] | None = None,
    ) -> BlockRecurrentTransformer:  # fmt: skip
        """A model with the weights, and the numbers, of one of block-recurrent-transformer-pytorch 0.4.4.

        Sizes and options are read from the state dict; `read_recurrent_layers` has to be given only where they leave a
        choice. The logits of normalised queries and keys are divided by sqrt(dim_head), as 0.4.4 does. In eval mode,
        on the device and of the type of the arrays.
        """
        options, weights, sources = convert.from_lucidrains(
            state_dict, max_seq_len=max_seq_len, block_width=block_width, read_recurrent_layers=read_recurrent_layers
        )
        return cls.from_weights(Config(**options), weights, "state_dict", sources)

    @classmethod
    @typechecked
    def from_meliad(cls, params: dict[str, Any], *, window_length: int) -> BlockRecurrentTransformer:
        """A model with the weights, and the numbers, of one of the authors' code, given as `path -> array`.

        Sizes and variant are read from the paths (those of a checkpoint, joined by "/"). In eval mode, of the type of
        the arrays. Segments of any length; the block is `window_length`.
        """
        options, weights, sources = convert.from_meliad(params, window_length=window_length)
        return cls.from_weights(Config(**options), weights, "params", sources)

    @classmethod
    def from_weights(
        cls, config: Config, weights: dict[str, Tensor], argument: str = "weights",
        sources: Mapping[str, str] = MappingProxyType({}), assign: bool = False,
    ) -> BlockRecurrentTransformer:  # fmt: skip
        """A model in eval mode with these weights, on the device and of the type of the embedding.

        Errors speak of `argument`, and of the entries in it from which ours were made, `sources`. With `assign` the
        tensors become the parameters, instead of being copied.
        """
        if "token_emb.weight" not in weights:
            raise ValueError(f"{argument} has no token_emb.weight, but {sorted(weights)}")
        like = weights["token_emb.weight"]
        with torch.device("meta"):
            model = cls(config)
        for name, wanted in model.state_dict().items():
            if name in weights and weights[name].shape != wanted.shape:
                raise ValueError(
                    f"{argument}: {sources.get(name, name)} gives {name} the shape {tuple(weights[name].shape)}, "
                    f"a model of dim={config.dim} needs {tuple(wanted.shape)}"
                )
        model = model.to(like.dtype)
        if assign:
            weights = {name: weight.to(like.device, like.dtype) for name, weight in weights.items()}
        else:
            model = model.to_empty(device=like.device)
        try:
            model.load_state_dict(weights, assign=assign)
        except RuntimeError as error:  # torch's word for entries that are missing or left over
            raise ValueError(f"{argument}: {error}") from error
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, checkpoint: Literal["best", "last"] = "best", device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> BlockRecurrentTransformer:  # fmt: skip
        """The model in a folder that `save_pretrained` wrote, or in that of a run of train.py. In eval mode.

        Args: see `pretrained.load_weights`.

        Raises:
            ValueError: the folder is not as it was written, or weights are missing, left over or of another shape.
        """
        from . import pretrained  # which needs Config

        config, weights = pretrained.load_weights(path, checkpoint=checkpoint, device=device, dtype=dtype)
        return cls.from_weights(config, weights, str(path), assign=True)

    def save_pretrained(self, path: str | Path, tokenizer: Any = None, **options: Any) -> None:
        from . import pretrained

        pretrained.save_pretrained(self, path, tokenizer, **options)

    # -- carried values

    def init_memories(self, batch: int) -> Memories:
        """Empty memories for a batch of that many rows: nothing has been read."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        config, weight = self.config, self.token_emb.weight

        def empty(width: int) -> KV:
            return KV(*(zeros(weight, batch, config.kv_heads, width, config.dim_head) for _ in range(2)))

        layers = []
        for layer in range(1, config.depth + 1):
            compressed = config.compressed_width(layer)
            xl, block = empty(config.xl_width(layer)), empty(config.block_width)
            layers.append(LayerMemory(xl, block, empty(compressed) if compressed else None))
        return Memories(tuple(layers), place=0, blocks=0)

    def init_states(self, batch: int) -> States:
        """The learned initial states for a batch of that many rows."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        return States(tuple(self.initial_state(cell).repeat(batch, 1, 1) for cell in self.cells))

    def initial_state(self, cell: int) -> Tensor:
        initial: Tensor = self.layers[cell - 1].cell.initial  # type: ignore[union-attr, assignment]
        return initial.to(torch.promote_types(initial.dtype, torch.float32))

    # -- the one way through

    def forward(
        self,
        x: Tensor,
        *,
        xl_memories: Memories | None = None,
        states: States | None = None,
        reset: Tensor | None = None,
        reset_states: Tensor | None = None,
        lengths: Tensor | None = None,
        return_loss: bool = False,
        return_hidden: bool = False,
        logits_to_keep: int | None = None,
        overwrite: bool = False,
        use_dropout: bool | None = None,
    ) -> tuple[Tensor, Memories, States]:
        """Reads tokens where the memories left off.

        Args:
            x: token ids (b, n), n >= 1. With `return_loss` n + 1 of them, of which the last is only a target;
                `ignore_index` among them is no target, and read as token 0 if it is not in the vocabulary.
            xl_memories: what an earlier call returned; None or [] for a fresh start.
            states: likewise. Each may be given without the other.
            reset: (b,) bool, rows in which a new document begins with this call.
            reset_states: (b,) bool, rows whose states alone return to their initial values.
            lengths: (b,) int, how many of the n tokens of each row are there (padding on the right); the output
                behind them is zero.
            return_loss: the mean cross-entropy in nats over all targets instead of logits.
            return_hidden: the normalised hidden states (b, n, d) instead of logits.
            logits_to_keep: only the logits of the last tokens of each row, so many.
            overwrite: `xl_memories` are given away, and a single token may be written into them instead of into a
                copy; they must not be used again. For decoding, without gradients.
            use_dropout: whether there is dropout in this call; default in training mode.

        Returns:
            Logits (b, n, v), memories and states after the last token. They hold the graph: `detach` them between the
            segments of truncated back-propagation.

        Raises:
            ValueError: token ids out of range, empty input, values carried over from another model, batch, device or
                type, or arguments that do not go together.
        """
        if overwrite and torch.is_grad_enabled():
            raise ValueError("overwrite=True goes without gradients: call the model under torch.no_grad()")
        targets = None
        if return_loss:
            x, targets = self.shifted(x, logits_to_keep, return_hidden)
        self.check(x, xl_memories, states, {"reset": reset, "reset_states": reset_states}, lengths, logits_to_keep)
        batch, n = x.shape
        memories = xl_memories or self.init_memories(batch)
        states = states or self.init_states(batch)
        if torch.is_grad_enabled():
            memories, states = without_prepared(memories, states)
        memories, states = self.reset_rows(memories, states, reset, reset_states)
        pieces, (place, blocks, ahead) = self.pieces(n, memories, lengths)
        if overwrite:
            pieces = [piece._replace(overwrite=True) for piece in pieces]
        if use_dropout is not None:
            pieces = [piece._replace(use_dropout=use_dropout) for piece in pieces]

        embedded = dropped(self.emb_dropout, self.token_emb(x), use_dropout)
        hidden, layers, states = self.read(embedded, memories, states, pieces)
        memories = Memories(layers, place, blocks, ahead)
        if torch.is_grad_enabled():
            memories, states = without_prepared(memories, states)
        elif isinstance(place, int) and place == 0:
            states = states._replace(views=None)

        if lengths is not None or any(isinstance(piece.start, Tensor) for piece in pieces):
            hidden = self.in_order(hidden, pieces, n)
        if lengths is not None and targets is not None:
            behind = torch.arange(n, device=x.device) >= lengths[:, None]
            targets = targets.masked_fill(behind, self.config.ignore_index)
        if logits_to_keep:
            hidden = self.last_tokens(hidden, lengths, logits_to_keep)
        hidden = dropped(self.output_dropout, self.norm(hidden), use_dropout)
        if targets is not None:
            return self.loss(hidden, targets), memories, states
        return hidden if return_hidden else self.logits(hidden), memories, states

    def read(
        self, x: Tensor, memories: Memories, states: States, pieces: list[Piece]
    ) -> tuple[Tensor, tuple[LayerMemory, ...], States]:
        """Embedded tokens (b, n, d) through all layers, piece after piece."""
        layers = list(memories.layers)
        state = dict(zip(self.cells, states.layers))
        view: dict[int, KV] = dict(zip(self.cells, states.views or ()))
        read = []
        for piece in pieces:
            if len(pieces) == 1 and isinstance(piece.start, int):
                part = x
            elif isinstance(piece.start, int):
                part = x[:, piece.start : piece.start + piece.t * piece.n]
            else:
                index = piece.start[:, None] + torch.arange(piece.t * piece.n, device=x.device)
                part = x.gather(1, index.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2]))
            seen: dict[int, KV] = {}  # the views as of the start of each block of the piece
            patterns = self.patterns(piece, x.device)
            for stage in self.stages:
                part = self.run_stage(stage, part, layers, state, view, seen, piece, patterns)
            read.append(part)
        hidden = read[0] if len(read) == 1 else torch.cat([x[:, :0], *read], dim=1)
        views = tuple(view[cell] for cell in self.cells) if len(view) == len(self.cells) else None
        return hidden, tuple(layers), States(tuple(state[cell] for cell in self.cells), views)

    def run_stage(
        self, stage: tuple[int, ...], x: Tensor, layers: list[LayerMemory], state: dict[int, Tensor],
        view: dict[int, KV], seen: dict[int, KV], piece: Piece, patterns: list[Pattern],
    ) -> Tensor:  # fmt: skip
        """One piece through layers that must be scanned together; a layer by itself takes all its blocks at once.

        `layers`, `state` and `view` (the projection of each state as of the block's start) move on to the end of the
        piece; `seen` receives the views of the stage's own cells for the layers above.
        """
        spans = piece.one_by_one() if len(stage) > 1 else [piece]
        cells = [index + 1 for index in stage if self.layers[index].cell is not None]
        parts: list[Tensor] = []
        views: dict[int, list[KV]] = {cell: [] for cell in cells}
        for span, part in zip(spans, torch.split(x, spans[0].t * spans[0].n, dim=1)):
            for cell in cells:
                if cell not in view:
                    view[cell] = self.layers[cell - 1].cell.project(state[cell])  # type: ignore[union-attr, operator]
            now = seen | {cell: KV(*(kv[:, None] for kv in view[cell])) for cell in cells}
            for index in stage:
                layer, number = self.layers[index], index + 1
                reads = [now[cell] for cell in layer.other_reads]  # type: ignore[union-attr]
                out = self.run_layer(
                    layer, part, layers[index], state.get(number), view.get(number), reads, span, patterns[index]
                )
                part, layers[index] = out.x, out.memory
                if out.state is not None and out.views is not None:
                    state[number], now[number] = out.state, out.views
            for cell in cells:
                views[cell].append(now[cell])
                self.renew_view(cell, state, view, span.complete)
            if self.config.enhanced_recurrence and span.complete is not False:
                layers[:] = hand_down(layers, span.complete, self.config.block_width)
            parts.append(part)
        for cell in cells:
            seen[cell] = KV(*(torch.cat(kv, dim=1) for kv in zip(*views[cell]))) if len(spans) > 1 else views[cell][0]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def run_layer(self, layer: nn.Module, *arguments: Any) -> Passed:
        recompute = self.config.use_checkpointing and torch.is_grad_enabled() and not is_functional()
        out: Passed = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
        return out

    def renew_view(self, cell: int, state: dict[int, Tensor], view: dict[int, KV], complete: bool | Tensor) -> None:
        """Where a block is complete, the view of the old state goes; the next block projects the new one."""
        if complete is True:
            del view[cell]
        elif isinstance(complete, Tensor):
            new = self.layers[cell - 1].cell.project(state[cell])  # type: ignore[union-attr, operator]
            view[cell] = choose_rows(complete, new, view[cell])

    def patterns(self, piece: Piece, device: torch.device) -> list[Pattern]:
        """Who sees whom in each layer; layers with memories of the same width share one."""
        kinds: dict[tuple[int, int], Pattern] = {}
        patterns, dtype = [], self.token_emb.weight.dtype
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        for layer in range(1, self.config.depth + 1):
            kind = (self.config.xl_width(layer), self.config.compressed_width(layer))
            if kind not in kinds:
                kinds[kind] = make_pattern(self.config, piece, layer, self.rotary, device, dtype)
            patterns.append(kinds[kind])
        return patterns

    # -- before and after

    def pieces(self, n: int, memories: Memories, lengths: Tensor | None) -> tuple[list[Piece], Any]:
        """How a call of n tokens is cut, and (place, blocks, ahead) after it. Reads data only where rows differ."""
        config, (_, place, blocks, ahead) = self.config, memories
        if lengths is None and isinstance(place, int):
            return plan(config, n, place, blocks, ahead)
        batch, device = memories.layers[0].block.k.shape[0], memories.layers[0].block.k.device
        places = [place] * batch if isinstance(place, int) else place.tolist()
        held = [blocks] * batch if ahead is None else [min(config.reach, blocks + more) for more in ahead.tolist()]
        ends = [n] * batch if lengths is None else lengths.tolist()
        pieces: list[Piece] = []
        starts = [0] * batch
        if isinstance(place, int) and ahead is None and min(ends):
            pieces, (place, blocks, _) = plan(config, min(ends), place, blocks, None)
            starts, places, held = [min(ends)] * batch, [place] * batch, [blocks] * batch
        rest, after = plan_rows(config, ends, starts, places, held, device)
        return pieces + rest, after

    def in_order(self, hidden: Tensor, pieces: list[Piece], n: int) -> Tensor:
        """The outputs of all pieces, (b, sum of t n, d), put where their tokens stood, (b, n, d); zero elsewhere."""
        batch, device, base = hidden.shape[0], hidden.device, 0
        order = torch.full((batch, n + 1), hidden.shape[1], device=device)
        for piece in pieces:
            size = piece.t * piece.n
            index = torch.arange(size, device=device).expand(batch, size)
            target = index + (piece.start if isinstance(piece.start, int) else piece.start[:, None])
            if piece.counts is not None:
                target = torch.where(index < piece.counts[:, None], target, n)
            order.scatter_(1, target, index + base)
            base += size
        hidden = F.pad(hidden, (0, 0, 0, 1))
        return hidden.gather(1, order[:, :n, None].expand(-1, -1, hidden.shape[2]))

    def last_tokens(self, hidden: Tensor, lengths: Tensor | None, count: int) -> Tensor:
        """(b, n, d) -> (b, count, d): the last tokens that each row has; zero where a row has fewer."""
        if lengths is None:
            return hidden[:, -count:]
        index = lengths[:, None] - count + torch.arange(count, device=hidden.device)
        last = hidden.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2]))
        return last.masked_fill((index < 0)[..., None], 0)

    def reset_rows(
        self, memories: Memories, states: States, reset: Tensor | None, reset_states: Tensor | None
    ) -> tuple[Memories, States]:
        """Rows of `reset` as at a fresh start, rows of `reset_states` with their initial states."""
        if reset is not None:
            memories = forget_rows(memories, reset)
            blocks = tuple(layer._replace(block=zero_rows(layer.block, reset)) for layer in memories.layers)
            memories = memories._replace(layers=blocks)
            if isinstance(memories.place, Tensor) or memories.place:
                place = torch.as_tensor(memories.place, device=reset.device).expand(len(reset)).masked_fill(reset, 0)
                agreed = len(set(place.tolist())) == 1
                memories = memories._replace(place=int(place[0]) if agreed else place)
        for rows in (reset, reset_states):
            if rows is not None:
                pairs = zip(self.cells, states.layers)
                fresh = tuple(torch.where(per_row(rows, old), self.initial_state(cell), old) for cell, old in pairs)
                states = States(fresh)
        return memories, states

    def logits(self, hidden: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, v)."""
        if self.to_logits is None:
            return F.linear(hidden * self.config.dim**-0.5, self.token_emb.weight)
        out: Tensor = self.to_logits(hidden)
        return out

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets that count; 0 without any. Logits exist for a chunk at a time."""
        ignore, size = self.config.ignore_index, max(1, LOGITS_AT_ONCE // self.config.num_tokens)
        rows, wanted = hidden.flatten(0, 1), targets.flatten()

        def summed(rows: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(at_least_fp32(self.logits(rows)), wanted, ignore_index=ignore, reduction="sum")

        to_logits = self.to_logits
        is_own = to_logits is None or (type(to_logits) is nn.Linear and to_logits.bias is None)
        if len(rows) <= size or not is_own:  # another map that was put in its place is called as a whole
            total = summed(rows, wanted)
        elif torch.is_grad_enabled():
            weight = self.token_emb.weight if to_logits is None else to_logits.weight
            x = rows * self.config.dim**-0.5 if to_logits is None else rows
            total = CrossEntropy.apply(x, weight, wanted, ignore, size)[0]  # type: ignore[no-untyped-call]
        else:
            total = torch.stack([*map(summed, torch.split(rows, size), torch.split(wanted, size))]).sum()
        return total / (targets != ignore).sum().clamp(min=1)

    def shifted(self, x: Tensor, logits_to_keep: int | None, return_hidden: bool) -> tuple[Tensor, Tensor]:
        """Tokens (b, n + 1) -> inputs and targets (b, n)."""
        if logits_to_keep is not None or return_hidden:
            raise ValueError("return_loss=True goes without logits_to_keep and return_hidden")
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] < 2:
            raise ValueError(f"x must be token ids (b, n + 1) with n >= 1 when return_loss=True, not {describe(x)}")
        self.check_ids(x, self.config.ignore_index)
        inputs, targets = x[:, :-1], x[:, 1:].long()
        if not 0 <= self.config.ignore_index < self.config.num_tokens:
            inputs = inputs.masked_fill(inputs == self.config.ignore_index, 0)
        return inputs, targets

    # -- generation

    generate = generation.generate
    stream = generation.stream

    # -- checks

    def check(
        self, x: Tensor, memories: Memories | None, states: States | None, resets: dict[str, Tensor | None],
        lengths: Tensor | None, logits_to_keep: int | None,
    ) -> None:  # fmt: skip
        """Raises a ValueError that names the argument and the numbers. Token ids are read on the CPU only."""
        if not isinstance(x, Tensor) or x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"x must be token ids (b, n) with b >= 1 and n >= 1, not {describe(x)}")
        self.check_ids(x, None)
        batch, n = x.shape
        for name, value, kind in (("xl_memories", memories, Memories), ("states", states, States)):
            if isinstance(value, list) and not value:
                continue
            if value is not None and not isinstance(value, kind):
                raise ValueError(
                    f"{name} must be the {kind.__name__} that a call returned, not {type(value).__name__}; lists of "
                    "tensors are what version 0.4.4 carried, see docs/migration.md"
                )
        if memories:
            self.check_memories(memories, batch)
        if states:
            self.check_states(states, batch)
        for name, rows in resets.items():
            is_mask = isinstance(rows, Tensor) and rows.shape == (batch,) and rows.dtype == torch.bool
            if rows is not None and not is_mask:
                raise ValueError(f"{name} must be ({batch},) bool, one for each row of x, not {describe(rows)}")
            if rows is not None and rows.device != x.device:
                raise ValueError(f"{name} is on {rows.device}, x is on {x.device}")
        if lengths is not None:
            kinds = (torch.int32, torch.int64)
            if not isinstance(lengths, Tensor) or lengths.shape != (batch,) or lengths.dtype not in kinds:
                raise ValueError(f"lengths must be ({batch},) int, one for each row of x, not {describe(lengths)}")
            if lengths.device != x.device:
                raise ValueError(f"lengths is on {lengths.device}, x is on {x.device}")
            if int(lengths.min()) < 0 or int(lengths.max()) > n:
                raise ValueError(f"lengths={lengths.tolist()} must be from 0 to the n={n} tokens of x")
        if logits_to_keep is not None and (not isinstance(logits_to_keep, int) or not 1 <= logits_to_keep <= n):
            raise ValueError(f"logits_to_keep={logits_to_keep} must be from 1 to the n={n} tokens of x")

    def check_ids(self, x: Tensor, ignore: int | None, name: str = "x") -> None:
        if x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be token ids, int64 or int32, not {describe(x)}")
        if x.device != self.token_emb.weight.device:
            raise ValueError(f"{name} is on {x.device}, the model is on {self.token_emb.weight.device}")
        if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
            return
        ids = x if ignore is None else x[x != ignore]
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.config.num_tokens):
            low, high = int(ids.min()), int(ids.max())
            raise ValueError(f"{name} holds token ids from {low} to {high}, num_tokens={self.config.num_tokens}")

    def check_memories(self, memories: Memories, batch: int) -> None:
        config, kind = self.config, (self.token_emb.weight.dtype, self.token_emb.weight.device)
        if len(memories.layers) != config.depth:
            raise ValueError(f"xl_memories holds {len(memories.layers)} layers, the model has depth={config.depth}")
        for layer, memory in enumerate(memories.layers, start=1):
            compressed = config.compressed_width(layer)
            sizes = {"xl": config.xl_width(layer), "block": config.block_width, "compressed": compressed}
            sizes["window"] = sum(sizes.values())
            if (memory.compressed is None) != (compressed == 0):
                raise ValueError(
                    f"xl_memories: layer {layer} has {'no' if memory.compressed is None else 'a'} compressed memory, "
                    f"the model has use_compressed_mem={config.use_compressed_mem}"
                )
            for name, size in sizes.items():
                want = (batch, config.kv_heads, size, config.dim_head)
                for kv in getattr(memory, name) or ():
                    self.check_carried(kv, want, kind, "xl_memories, layer {}, {}", layer, name)
        if not 0 <= memories.blocks <= config.reach:
            raise ValueError(f"xl_memories counts blocks={memories.blocks}, this model remembers {config.reach}")
        place = memories.place
        for name, value, other in (("place", place, int), ("ahead", memories.ahead, type(None))):
            is_rows = isinstance(value, Tensor) and value.shape == (batch,) and value.dtype == torch.int64
            if not isinstance(value, other) and not is_rows:
                raise ValueError(
                    f"xl_memories: {name} must be ({batch},) int64, one for each row of x, not {describe(value)}"
                )
        ahead = memories.ahead
        is_read = self.token_emb.weight.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_read and ahead is not None and int(ahead.min()) < 0:
            raise ValueError(f"xl_memories: ahead={ahead.tolist()} must be at least 0")
        for row in place.tolist() if isinstance(place, Tensor) else [place]:
            if not 0 <= row < config.block_width:
                raise ValueError(f"xl_memories stands at place {row} of a block of {config.block_width}")

    def check_states(self, states: States, batch: int) -> None:
        config, own = self.config, self.token_emb.weight
        kind = torch.promote_types(own.dtype, torch.float32), own.device
        if len(states.layers) != len(self.cells):
            raise ValueError(f"states holds {len(states.layers)} states, the model has recurrent_layers={self.cells}")
        for cell, state in zip(self.cells, states.layers):
            want = (batch, config.num_state_vectors, config.dim)
            self.check_carried(state, want, kind, "states of layer {}", cell)
        if states.views is not None and len(states.views) != len(self.cells):
            raise ValueError(f"states holds {len(states.views)} views, the model has recurrent_layers={self.cells}")
        for cell, view in zip(self.cells, states.views or ()):
            for kv in view:
                size = (batch, config.kv_heads, config.num_state_vectors, config.dim_head)
                if tuple(kv.shape) != size:
                    raise ValueError(f"states, view of layer {cell}: shape {tuple(kv.shape)}, this model needs {size}")

    def check_carried(
        self, value: Tensor, shape: tuple[int, ...], kind: tuple[torch.dtype, torch.device], name: str, *which: Any
    ) -> None:
        """Compares with the shape, and the type and device, of this model; `which` fills the places in `name`."""
        if value.shape != shape:
            raise ValueError(f"{name.format(*which)}: shape {tuple(value.shape)}, this model and batch need {shape}")
        if (value.dtype, value.device) != kind:
            raise ValueError(
                f"{name.format(*which)}: {value.dtype} on {value.device}, this model carries {kind[0]} on {kind[1]}"
            )


def describe(value: Any) -> str:
    """A value as an error message shows it."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


# --------------------------------------------------------------------------------------- 11 training and generating on


class RecurrentTrainWrapper(nn.Module):
    """Trains and samples a model over sequences of any length, a segment at a time.

    Args:
        transformer: a BlockRecurrentTransformer, or one compiled, or wrapped for several processes.
        xl_memories_dropout: the chance that a row forgets its complete blocks at a segment's start, in training.
        state_dropout: the chance that a row's states return to their initial values there.
        seq_len: tokens of a segment; default the model's max_seq_len.
        detach_segments: True cuts the gradients between segments, so that `segments` needs the memory of one;
            False lets them through all.
        generator: source of the randomness of the two dropouts, on the CPU; default torch's own.

    Raises:
        ValueError: a number out of range.
    """

    @typechecked
    def __init__(
        self, transformer: nn.Module, xl_memories_dropout: float = 0.0, state_dropout: float = 0.0, *,
        seq_len: int | None = None, detach_segments: bool = True, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.transformer = transformer
        if not isinstance(self.model, BlockRecurrentTransformer):
            raise ValueError(f"transformer must be a BlockRecurrentTransformer, not {type(self.model).__name__}")
        self.config = self.model.config
        for name, rate in (("xl_memories_dropout", xl_memories_dropout), ("state_dropout", state_dropout)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {rate}")
        config = self.config
        self.seq_len = config.max_seq_len if seq_len is None else seq_len
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {self.seq_len}")
        self.xl_memories_dropout, self.state_dropout = xl_memories_dropout, state_dropout
        self.detach_segments, self.generator = detach_segments, generator
        if untrained := self.untrained():
            warnings.warn(
                f"with segments of {self.seq_len} tokens, blocks of {config.block_width} and gradients cut between "
                f"segments, {untrained} get no gradient. Use longer segments or detach_segments=False; for "
                "DistributedDataParallel as it is, find_unused_parameters=True.",
                stacklevel=3,
            )

    @property
    def model(self) -> BlockRecurrentTransformer:
        """The model itself, whatever was wrapped around it: DistributedDataParallel's `module`, torch.compile's."""
        model = self.transformer
        while (inner := model._modules.get("_orig_mod", model._modules.get("module"))) is not None:
            model = inner
        return model  # type: ignore[return-value]

    def untrained(self) -> str:
        """The parts of the model that a segment by itself gives no gradient, in words."""
        config, blocks = self.config, self.seq_len / self.config.block_width
        parts = []
        if self.detach_segments and config.recurrent_layers and blocks <= 1:
            parts.append("the state updates (what is written is read in the next block)")
        if self.detach_segments and config.use_compressed_mem and blocks <= config.num_xl_blocks + 1:
            parts.append("the compressors in a first segment (what leaves the XL memory is read a block later)")
        return " and ".join(parts)

    def segments(
        self, x: Tensor, *, xl_memories: Memories | None = None, states: States | None = None,
        reset: Tensor | None = None,
    ) -> Generator[Tensor, None, tuple[Memories, States]]:  # fmt: skip
        """One loss for each segment of x, (b, n + 1) token ids, to call backward on before the next is computed.

        Each is weighted by the share of its targets, so that their sum is the mean over all targets of x. Memories and
        states after the last token are the generator's return value; `reset` acts before the first segment.
        """
        memories, carried = xl_memories or None, states or None
        for part, count, total in self.parts(x):
            if self.detach_segments:
                memories, carried = memories and detach(memories), carried and detach(carried)
            loss, memories, carried = self.step(part, memories, carried, reset, self.drops(part))
            reset = None
            yield loss * count / total
        assert memories is not None and carried is not None
        return (detach(memories), detach(carried)) if self.detach_segments else (memories, carried)

    def parts(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The segments of x, (b, seq_len + 1), neighbours sharing one token; the targets in each, and in all of x."""
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] < 2:
            raise ValueError(f"x must be token ids (b, n + 1) with n >= 1, not {describe(x)}")
        counted = x[:, 1:] != self.config.ignore_index
        total = counted.sum().clamp(min=1)
        for start in range(0, x.shape[1] - 1, self.seq_len):
            stop = start + self.seq_len
            yield x[:, start : stop + 1], counted[:, start:stop].sum(), total

    def drops(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Which rows (b,) forget their complete blocks, and which their states, before a segment; None: no row does."""

        def draw(rate: float) -> Tensor | None:
            if rate == 0 or not self.training:
                return None
            return (torch.rand(len(x), generator=self.generator) < rate).to(x.device)

        return draw(self.xl_memories_dropout), draw(self.state_dropout)

    def step(
        self, part: Tensor, memories: Memories | None, states: States | None, reset: Tensor | None,
        drops: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Memories, States]:  # fmt: skip
        """One segment: its mean loss, and what it leaves behind."""
        forget, reset_states = drops
        if forget is not None and memories is not None:
            memories = forget_rows(memories, forget)
        loss, memories, states = self.transformer(
            part, xl_memories=memories, states=states, reset=reset, reset_states=reset_states, return_loss=True
        )
        return loss, memories, states

    def forward(
        self,
        x: Tensor,
        *,
        xl_memories: Memories | None = None,
        states: States | None = None,
        reset: Tensor | None = None,
        return_memories_and_states: bool = False,
    ) -> Tensor | tuple[Tensor, Memories, States]:
        """The mean cross-entropy in nats over all targets of x, (b, n + 1) token ids; one graph for all segments."""
        losses = self.segments(x, xl_memories=xl_memories, states=states, reset=reset)
        total: Any = 0.0
        while True:
            try:
                total = total + next(losses)
            except StopIteration as end:
                return (total, *end.value) if return_memories_and_states else total

    @typechecked
    def generate(self, prime: Tensor | list[Tensor], length: int | None = None, **options: Any) -> Any:
        """`BlockRecurrentTransformer.generate` of the model; `length` may be any number of segments."""
        return self.model.generate(prime, length, **options)

    @typechecked
    def stream(self, prime: Tensor | list[Tensor], length: int | None = None, **options: Any) -> Any:
        """`BlockRecurrentTransformer.stream` of the model."""
        return self.model.stream(prime, length, **options)


RecurrentTrainerWrapper = RecurrentTrainWrapper  # its name in 0.4.4
