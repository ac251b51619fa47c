"""The Block-Recurrent Transformer: one model that reads a stream in any pieces.

Papers
    Hutchins et al. 2022, Block-Recurrent Transformers, arXiv 2203.07852
    Dai et al. 2019, Transformer-XL, arXiv 1901.02860 (the memory of the last blocks)
    Rae et al. 2019, Compressive Transformers, arXiv 1911.05507 (the compressed memory)
    Ding et al. 2020, ERNIE-Doc, arXiv 2012.15688 (enhanced recurrence)
    Shazeer 2019, arXiv 1911.02150 (one key/value head for all query heads)
    Su et al. 2021, RoFormer, arXiv 2104.09864; Sun et al. 2022, arXiv 2212.10554 (rotary positions with the xPos decay)
    Raffel et al. 2019, T5, arXiv 1910.10683 (bucketed position bias)
    Shazeer 2020, arXiv 2002.05202 (geglu and swiglu); Xiao et al. 2023, arXiv 2309.17453 (sink tokens)

A recurrent layer, for the tokens X of one block and the states S as of the block's start:

    vertical    Y = X + [ attend(Q, K, V) ; attend(Q', Ks, Vs) ] Wo        then Y + feed-forward(Y)
    horizontal  C = [ attend(Qs, Ks, Vs) ; attend(Qs', K, V) ]
                S <- gate(S, candidate(C))                                 once, when the block is complete

K, V come from the tokens of this block and of the blocks before it (the XL memory), Ks, Vs from norm(S) + state ids.

The block being filled is the decoding cache: a layer carries the keys and values of the last complete blocks and
those of the tokens of the current block, and a state is read as of the start of its block. So training segments, long
prompts and one-token decoding are the same computation, and any split of a stream gives the same answer. Everything
that travels from call to call is a value: it goes in as an argument and comes out as a result.

A call is cut into spans (spans.py). A span goes through the groups of layers once: a layer by itself takes all blocks
of the span at once, layers that depend on each other's states take them one by one.

Axis letters: b batch, n new tokens, t blocks, w block width, j keys, s states, h heads, g key/value heads, d dim,
e dim_head.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from beartype import BeartypeConf, beartype
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from . import convert, generation, paper
from .carried import (
    KV,
    LayerMemory,
    Memories,
    Position,
    States,
    choose_rows,
    detach,
    forget_rows,
    map_tensors,
    per_row,
    reset_offsets,
    trainable,
    without_derived,
)
from .checks import (
    check_count,
    check_embedded,
    check_ids,
    check_lengths,
    check_like,
    check_position,
    check_rows,
    check_tensor,
    check_type,
    describe,
)
from .config import GATES, MEMORIES, Config, register_gate, register_memory
from .kernels import (
    Rotation,
    at_least_fp32,
    called_in_fp32,
    is_functional,
    matmul_dtype,
    recomputed,
    rotate,
    unit,
    without_autocast,
)
from .losses import Reduction, cross_entropy
from .rotary import ROTARIES, Rotary, frequencies
from .routing import Operator, Reading, Router, Store
from .spans import Shape, Span, in_order, make_plan, take
from .token_gated import TokenGatedCell

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))


class Mode(NamedTuple):
    """How a call is computed; decided once, where it enters."""

    use_dropout: bool
    recompute: bool  # cheap parts are computed again in the backward pass instead of being kept
    checkpoint: bool  # so are whole layers
    in_parts: bool  # a large hidden layer exists a part at a time
    auxiliary: tuple[str, ...] = ()  # names of the auxiliary losses to compute

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        return F.dropout(x, rate) if self.use_dropout and rate > 0 else x

    def recomputed(self, function: Callable[..., Any], *inputs: Tensor | None, draws: bool = False) -> Any:
        """function(*inputs), of which the backward pass may keep the inputs alone; see `kernels.recomputed`."""
        return recomputed(function, *inputs, draws=draws) if self.recompute else function(*inputs)


# ------------------------------------------------------------------------------------------ 1 norms and feed-forward


def make_norm(config: Config) -> nn.Module:
    """Layer norm with a gain and no bias, or RMS norm; the epsilon is inside the root."""
    if config.norm == "layer":
        return nn.LayerNorm(config.dim, eps=config.norm_eps or 1e-5, bias=False)
    return nn.RMSNorm(config.dim, eps=config.norm_eps or 1e-6)


GATED: dict[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "swiglu": F.silu}


class Hidden(nn.Module):
    """The hidden layer of a feed-forward, dim_in -> ff_dim: relu(x W), x W1 * gelu(x W2), or x W1 * silu(x W2)."""

    def __init__(self, config: Config, dim_in: int) -> None:
        super().__init__()
        self.open = GATED.get(config.ff_activation)
        self.use_gate = self.open is not None
        self.to_hidden = nn.Linear(dim_in, config.ff_dim * (2 if self.use_gate else 1), bias=False)

    def activate(self, hidden: Tensor) -> Tensor:
        """What `to_hidden` gives -> (..., f)."""
        if self.open is None:
            return F.relu(hidden)
        value, gate = hidden.chunk(2, dim=-1)
        return value * self.open(gate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., f)."""
        return self.activate(self.to_hidden(x))


HIDDEN_AT_ONCE = 2**21  # numbers of the largest hidden layer that a feed-forward makes at once


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = config.ff_dropout
        self.norm = make_norm(config)
        self.hidden = Hidden(config, config.dim)
        self.to_out = nn.Linear(config.ff_dim, config.dim, bias=False)
        self.rows_at_once = max(64, HIDDEN_AT_ONCE // (config.ff_dim * (1 + self.hidden.use_gate)))

    def widen(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.hidden.to_hidden(self.norm(x))
        return hidden

    def narrow(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.to_out(self.hidden.activate(hidden))
        return out

    def forward(self, x: Tensor, mode: Mode) -> Tensor:
        """(b, n, d) -> (b, n, d)."""
        rows = x.flatten(0, 1)
        parts = -(-rows.shape[0] // self.rows_at_once) if mode.in_parts else 1
        chunks = rows.chunk(parts) if parts > 1 else (rows,)
        out = [mode.recomputed(self.narrow, mode.recomputed(self.widen, part)) for part in chunks]
        return mode.dropout(torch.cat(out) if len(out) > 1 else out[0], self.dropout).view(x.shape)


# ------------------------------------------------------------------------------------------------------- 2 positions


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
        """Distances (j,) -> bias (h, j), in at least fp32: bf16 tells 256 distances apart, and no more."""
        own = next(self.parameters(), distance.new_zeros((), dtype=torch.float32)).dtype
        steps = distance.clamp(min=0).to(torch.promote_types(own, torch.float32))[:, None]
        with without_autocast(distance.device.type):
            x = torch.log1p(steps) if self.use_log else steps / self.unit
            for layer in (self.to_hidden, *self.mlp):
                x = called_in_fp32(layer, x)
        return x.t()


POSITION_BIASES = {"t5": T5Bias, "dynamic": DynamicBias}


class Distances(NamedTuple):
    """Query position - key position, for all queries and keys of a span."""

    values: Tensor  # all that occur, ascending
    seen: Tensor  # which of them a query sees, bool
    pairs: Tensor  # index into these for each query and key, (n, j), or (b, n, j) where offsets differ


class Visibility(NamedTuple):
    """Which keys the queries of a span see, in a layer whose memories put m entries in front of the block.

    Positions count from the start of the block; entries of the memories stand at -m ... -1.
    """

    first: int  # of [memories ; block], the part that some query sees: from here
    last: int  # to here
    distances: Distances | None  # where there is a mask or a position bias
    mask: Tensor | None  # True where visible, (n, j) or (b, n, j); None: everywhere, or causal
    added: Tensor | None  # the same as what is added to the logits, see `additive`; None with a position bias
    causal: bool  # each query sees the keys up to its own, the last query all of them
    q_tables: Rotation | None  # the rotary tables of the queries, and of all of [memories ; block]
    k_tables: Rotation | None
    new_tables: Rotation | None  # those of the keys of the new tokens


CAUSAL_BIAS_ON = {"cuda"}  # devices whose flash kernel takes keys in front of a causal block without a mask


def make_visibility(
    config: Config, span: Span, kinds: Sequence[MemoryKind], rotary: Rotary | None, device: torch.device,
    dtype: torch.dtype,
) -> Visibility:  # fmt: skip
    """Which keys the tokens of `span` see in a layer with these kinds of memory; dtype is that of the queries."""
    offset, n, width, total = span.offset, span.length, config.block_width, sum(kind.width for kind in kinds)
    low, high, has_gap = -total, width, False
    if not span.is_ragged and isinstance(offset, int):
        held, has_gap = held_entries(kinds, span.full_blocks)
        low = -held if not config.nearest or span.num_blocks > 1 else max(-held, offset - width)
        high = offset + n - (config.nearest if span.num_blocks == 1 else 0)
    elif isinstance(offset, int):
        high = offset + n
    has_bias, causal, is_masked = config.positions in POSITION_BIASES, False, span.is_ragged or has_gap
    if not is_masked and (n > 1 or span.num_blocks > 1):
        is_square = low == 0 and offset == 0  # a branch, and no bool kept: `offset` may be symbolic
        fits = config.use_flash_attn and device.type in CAUSAL_BIAS_ON and not has_bias
        if (is_square or fits) and not config.nearest:
            causal = True
        else:
            is_masked = True

    distances = mask = added = None
    if is_masked or has_bias:
        keys = torch.arange(low, high, device=device)
        distances = make_distances(config, offset, n, low, high, keys)
    if is_masked and distances is not None:
        mask = distances.seen[distances.pairs]
        if span.is_ragged or has_gap:
            mask = mask & held_keys(kinds, span, keys)
        added = None if has_bias else additive(mask, config.heads // config.kv_heads, dtype)
    first, last = total + low, total + high
    if rotary is None:
        return Visibility(first, last, distances, mask, added, causal, None, None, None)
    q_tables, new_tables = rotary.at(offset, n)
    k_tables = rotary.at(-total, total + width)[1]
    return Visibility(first, last, distances, mask, added, causal, q_tables, k_tables, new_tables)


def make_distances(config: Config, offset: int | Tensor, n: int, low: int, high: int, keys: Tensor) -> Distances:
    """Between n queries from `offset` on and the keys at low ... high - 1."""
    width, device = config.block_width, keys.device
    queries = torch.arange(n, device=device) + (offset if isinstance(offset, int) else offset[:, None])
    least = (offset if isinstance(offset, int) else 0) - (high - 1)
    most = (offset if isinstance(offset, int) else width - 1) + (n - 1) - low
    values = torch.arange(least, most + 1, device=device)
    seen = (values >= config.nearest) & (values <= width) if config.nearest else values >= 0
    return Distances(values, seen, queries[..., :, None] - keys - least)


def held_entries(kinds: Sequence[MemoryKind], blocks: int) -> tuple[int, bool]:
    """How far back from the block the farthest entry stands, and whether places nearer than it are still empty."""
    before = farthest = held = 0
    for kind in kinds:  # the nearest first
        if entries := kind.held(blocks):
            farthest = before + entries
            held += entries
        before += kind.width
    return farthest, held < farthest


def held_keys(kinds: Sequence[MemoryKind], span: Span, keys: Tensor) -> Tensor:
    """Which keys, at positions (j,), each row holds at all, (1 or b, 1, j) bool; those of the block count as held."""
    blocks = torch.full((1,), span.full_blocks, device=keys.device)
    blocks = (blocks if span.extra_blocks is None else span.full_blocks + span.extra_blocks).view(-1, 1, 1)
    is_held, before = keys >= 0, 0
    for kind in kinds:
        is_held = is_held | ((keys < -before) & (keys >= -before - kind.held_by_rows(blocks)))
        before += kind.width
    return is_held


# ------------------------------------------------------------------------------------------------------- 3 attention


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False,
    dropout: float = 0.0, use_flash: bool = True,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + mask) v. q (b, h, n, e), k and v (b, g, j, e) -> (b, h, n, e).

    mask: bool (True where visible) or additive, to be broadcast to (b, h, n, j); or (b, 1, n r, j) for the r = h / g
    heads that share a key/value head. causal: the last query sees all keys, each one before it one key less. A query
    that sees no key gives zeros. Where the mask allows it, the queries of r heads are one long row against one matrix
    of keys; otherwise keys and values are taken r times.
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
        if causal and n != k.shape[2]:  # a branch, and no bool kept: sizes may be symbolic
            bias = causal_lower_right(n, k.shape[2])
            return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, scale=scale)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal, scale=scale)
    logits = (q * scale) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(n, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - n)
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
    numbers = shared * mask.numel()
    is_small = isinstance(numbers, int) and numbers <= MASK_AT_ONCE  # in torch.export it is symbolic, and no int
    return batched(added.repeat_interleave(shared, dim=-2) if is_small else added)


def split_heads(x: Tensor, t: int, heads: int) -> Tensor:
    """(b, t n, h e) -> (b t, h, n, e): blocks go to the batch."""
    return x.reshape(x.shape[0] * t, -1, heads, x.shape[2] // heads).transpose(1, 2)


def join_heads(x: Tensor, t: int) -> Tensor:
    """(b t, h, n, e) -> (b, t n, h e)."""
    return x.transpose(1, 2).reshape(x.shape[0] // t, -1, x.shape[1] * x.shape[3])


class Attention(nn.Module):
    """softmax(scale q k^T) v, and the normalisation of its queries and keys: none here, scale 1 / sqrt(dim_head).

    A key takes two steps: `stored` is what all attentions on it share, `ready` what the queries of this one meet. The
    keys of states are `stored_state` at once, and are not made ready: what is left to do goes to their queries.
    """

    scale: float

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.scale, self.use_flash = config.dim_head**-0.5, config.use_flash_attn

    def stored(self, k: Tensor) -> Tensor:
        """Keys (b, g, j, e) as they go into a memory."""
        return k

    def ready(self, k: Tensor) -> Tensor:
        """Stored keys as the queries of this attention meet them, before they are turned by their positions."""
        return k

    def without_gain(self, k: Tensor) -> Tensor:
        """Stored keys as `state_queries` meet them: `ready` but for its parameters, which go to the queries."""
        return k

    def stored_state(self, k: Tensor) -> Tensor:
        """Keys of states, for all the attentions that will read them."""
        return self.without_gain(self.stored(k))

    def queries(self, q: Tensor) -> Tensor:
        """Queries (b, h, n, e) to ready keys."""
        return q

    def state_queries(self, q: Tensor) -> Tensor:
        """Queries (b, h, n, e) to stored states."""
        return self.queries(q)

    def scaled_bias(self, bias: Tensor) -> Tensor:
        """A position bias (h, j) in the units of the logits."""
        return bias

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
    ) -> Tensor:
        """`attend`, for queries and keys that have been through the methods above."""
        return attend(
            q, k, v, scale=self.scale, mask=mask, causal=causal, dropout=dropout, use_flash=self.use_flash
        )


class ChannelNormAttention(Attention):
    """Unit queries and keys, each times a learned gain per channel; logits times `qk_norm_scale` (0.4.4 meant this)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = config.qk_norm_scale
        self.q_scale = nn.Parameter(torch.empty(config.dim_head))
        self.k_scale = nn.Parameter(torch.empty(config.dim_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.q_scale)
        nn.init.ones_(self.k_scale)

    def normalised(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        return unit(x, gain)

    def ready(self, k: Tensor) -> Tensor:
        return self.normalised(k, self.k_scale)

    def without_gain(self, k: Tensor) -> Tensor:
        return self.normalised(k)

    def queries(self, q: Tensor) -> Tensor:
        return self.normalised(q, self.q_scale)

    def state_queries(self, q: Tensor) -> Tensor:
        return self.normalised(q, self.q_scale * self.k_scale)  # q . (k g) = (q g) . k


class RMSNormAttention(ChannelNormAttention):
    """Queries and keys through an RMS norm with a gain per channel, scale 1 / sqrt(dim_head) (Qwen3)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale, self.eps = config.dim_head**-0.5, config.norm_eps or 1e-6

    def normalised(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        wide = at_least_fp32(x)
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (normed if gain is None else normed * gain).to(x.dtype)


class HeadNormAttention(Attention):
    """Unit queries and keys; logits, position bias included, times |a|, a learned per head (the authors' code)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = 1.0
        self.head_scale = nn.Parameter(torch.empty(config.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.head_scale)

    def stored(self, k: Tensor) -> Tensor:
        return k * (at_least_fp32(k).square().sum(-1, keepdim=True) + 1e-6).rsqrt().to(k.dtype)

    def queries(self, q: Tensor) -> Tensor:
        return self.stored(q) * self.head_scale.abs().view(-1, 1, 1)

    def scaled_bias(self, bias: Tensor) -> Tensor:
        return bias * self.head_scale.abs()[:, None]


ATTENTIONS = {
    "none": Attention, "channel": ChannelNormAttention, "rms": RMSNormAttention, "head": HeadNormAttention,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- 4 memories


class Appended(NamedTuple):
    """What comes of whole blocks that a memory takes in."""

    seen: KV  # the entries that the tokens of each block see, (b, t, g, width, e)
    evicted: KV | None  # what the blocks push out, (b, g, t w, e), for the kinds of memory behind this one
    memory: Any  # afterwards


class MemoryKind(nn.Module):
    """A kind of memory of one layer: how much it holds, and what becomes of the blocks that go into it.

    The memory itself is a value that travels; a kind holds sizes, and perhaps parameters. Blocks go into the XL memory
    when they are complete, and what leaves that goes into every further kind. Several blocks may come at once, and
    each must see what it would have seen had they come one by one.

    Entries stand in front of the block, oldest first, aligned to the right; those that are not there yet are masked.
    An empty memory is zeros. A value with a method `forget(rows)` of its own forgets rows by that.

    Args:
        config: of the model.
        layer: its number, from 1.
        options: those of `Config.extra_memories`, for a kind that is registered.

    Attributes:
        name: under which the value is carried, in `LayerMemory.past`.
        width: entries in front of the block.
        per_block: entries that one block becomes.
        delay: complete blocks before the first one comes in.
        is_near: whether the entries stand directly in front of the XL memory, and not behind the compressed memory.
        losses: names of the auxiliary losses that come of it.
    """

    name: str = ""
    width: int = 0
    per_block: int = 1
    delay: int = 0
    is_near: bool = False
    losses: tuple[str, ...] = ()

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.block_width, self.kv_heads, self.dim_head = config.block_width, config.kv_heads, config.dim_head
        self.delay = config.xl_width(layer) // config.block_width

    def empty(self, batch: int, like: Tensor) -> Any:
        """A memory that holds nothing, of the type and on the device of `like`; by default a KV (b, g, width, e)."""
        return empty_kv(like, batch, self.kv_heads, self.width, self.dim_head)

    def view(self, memory: Any) -> KV:
        """The entries that the tokens of the block being filled see, (b, g, width, e)."""
        return cast(KV, memory)

    def append(self, memory: Any, blocks: KV, span: Span) -> Appended:
        """Takes in t whole blocks, keys and values (b, g, t w, e)."""
        raise NotImplementedError(f"{type(self).__name__} must define append")

    def append_rows(self, memory: Any, blocks: KV, span: Span, rows: Tensor) -> Appended:
        """`append` of one block, of the given rows (b,) bool alone."""
        appended = self.append(memory, blocks, span)
        return appended._replace(memory=choose_rows(rows, appended.memory, memory))

    def check(self, name: str, memory: Any, batch: int, like: Tensor) -> None:
        """Raises a ValueError if a memory is not one of this kind."""
        check_like(name, memory, self.empty(1, like.new_empty(0, device="meta")), batch, like.device)

    @property
    def blocks_until_full(self) -> int:
        return self.delay + -(-self.width // self.per_block) if self.width else 0

    def held(self, blocks: int) -> int:
        """Entries that are there after so many complete blocks."""
        return min(self.width, max(0, blocks - self.delay) * self.per_block)

    def held_by_rows(self, blocks: Tensor) -> Tensor:
        return ((blocks - self.delay) * self.per_block).clamp(0, self.width)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of that shape that take the memory of one number."""
    return like.new_zeros(()).expand(shape)


def empty_kv(like: Tensor, *shape: int) -> KV:
    return KV(zeros(like, *shape), zeros(like, *shape))


def check_kv(name: str, kv: Any, shape: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(kv, KV):
        raise ValueError(f"{name} must be a KV, not {describe(kv)}")
    check_tensor(name, kv.k, shape, like.dtype, like.device)
    check_tensor(name, kv.v, shape, like.dtype, like.device)


def cat_keys(*parts: Tensor) -> Tensor:
    """[oldest ; ... ; newest] along the keys, the last axis but one."""
    filled = [x for x in parts if x.shape[-2]] or parts[:1]
    return torch.cat(filled, dim=-2) if len(filled) > 1 else filled[0]


def windows(stream: Tensor, width: int, step: int, t: int) -> Tensor:
    """(b, g, j, e) -> (b, t, g, width, e): window i starts at i * step."""
    if t == 1:
        return stream[:, None, :, :width]
    if width % step:
        return stream.unfold(2, width, step)[:, :, :t].permute(0, 2, 1, 4, 3)
    parts = rearrange(stream, "b g (t n) e -> b t g n e", n=step)
    return cat_keys(*(parts[:, i : i + t] for i in range(width // step))) if width else parts[:, :t, :, :0]


def newest(stream: KV, memory: KV) -> KV:
    """The last entries of a stream, as many as the memory holds, in buffers of their own."""
    width = memory.k.shape[2]
    last = (x[:, :, x.shape[2] - width :].to(m.dtype) for x, m in zip(stream, memory))
    return KV(*(x.clone(memory_format=torch.contiguous_format) for x in last))


class XLMemory(MemoryKind):
    """The keys and values of the last complete blocks (Dai et al. 2019)."""

    name = "xl"

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.width, self.per_block, self.delay = config.xl_width(layer), config.block_width, 0

    def append(self, memory: KV, blocks: KV, span: Span) -> Appended:
        stream = KV(*map(cat_keys, memory, blocks))
        seen = KV(*(windows(x, self.width, self.block_width, span.num_blocks) for x in stream))
        evicted = KV(*(x[:, :, : blocks.k.shape[2]] for x in stream))
        return Appended(seen, evicted, newest(stream, memory))

    def check(self, name: str, memory: Any, batch: int, like: Tensor) -> None:
        check_kv(name, memory, (batch, self.kv_heads, self.width, self.dim_head), like)


POOLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"mean": F.avg_pool1d, "max": F.max_pool1d}


class CompressedMemory(MemoryKind):
    """Entries that each stand for `factor` tokens which left the XL memory (Rae et al. 2019).

    They are made by strided convolutions of keys and of values, or are means or maxima of each channel. Keys are those
    stored, not turned by their positions: an entry is met as if it were one token of the place where it stands.
    """

    name = "compressed"

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.width, self.factor = config.compressed_width(layer), config.compressed_mem_factor
        self.per_block = config.block_width // self.factor
        self.pool = POOLINGS.get(config.compressed_mem_pooling)
        if self.pool is None:
            channels = 2 * config.kv_heads * config.dim_head
            self.conv = nn.Conv1d(channels, channels, self.factor, stride=self.factor, groups=2)
            self.losses = ("reconstruction",)

    def compress(self, evicted: KV, t: int) -> KV:
        """(b, g, t w, e) -> (b, g, t (w // factor), e); the oldest w mod factor tokens of a block are passed over."""
        g = self.kv_heads
        both = torch.cat([rearrange(x, "b g (t w) e -> (b t) (g e) w", t=t) for x in evicted], dim=1)
        whole = both[:, :, self.block_width % self.factor :]
        k, v = (self.conv(whole) if self.pool is None else self.pool(whole, self.factor)).chunk(2, dim=1)
        return KV(*(rearrange(x, "(b t) (g e) w -> b g (t w) e", t=t, g=g) for x in (k, v)))

    def append(self, memory: KV, blocks: KV, span: Span) -> Appended:
        stream = KV(*map(cat_keys, memory, self.compress(blocks, span.num_blocks)))
        seen = KV(*(windows(x, self.width, self.per_block, span.num_blocks) for x in stream))
        return Appended(seen, None, newest(stream, memory))

    def check(self, name: str, memory: Any, batch: int, like: Tensor) -> None:
        check_kv(name, memory, (batch, self.kv_heads, self.width, self.dim_head), like)


@register_memory("sinks")
class SinkMemory(MemoryKind):
    """The first `tokens` of the first block that left the XL memory, kept for ever (Xiao et al. 2023).

    They stand directly in front of the XL memory, wherever they stood in the stream: what a model has learned to attend
    to when it needs nothing, and falls apart without.
    """

    is_near = True

    def __init__(self, config: Config, layer: int, tokens: int = 4) -> None:
        super().__init__(config, layer)
        if not 1 <= tokens <= config.block_width:
            raise ValueError(
                f"extra_memories['sinks']: tokens must be from 1 to block_width={config.block_width}, not {tokens}"
            )
        self.width = self.per_block = tokens

    def append(self, memory: KV, blocks: KV, span: Span) -> Appended:
        seen = KV(*(x[:, None].expand(-1, span.num_blocks, -1, -1, -1) for x in memory))
        if span.full_blocks > self.delay:
            return Appended(seen, None, memory)
        first = KV(*(x[:, :, : self.width].to(m.dtype).clone() for x, m in zip(blocks, memory)))
        if span.extra_blocks is not None:  # rows that hold theirs keep them
            first = choose_rows(span.full_blocks + span.extra_blocks <= self.delay, first, memory)
        return Appended(seen, None, first)

    def check(self, name: str, memory: Any, batch: int, like: Tensor) -> None:
        check_kv(name, memory, (batch, self.kv_heads, self.width, self.dim_head), like)


@register_memory("routed")
class RoutedMemory(MemoryKind):
    """A store of what left the XL memory, in which each query finds the few chunks that it reads: routing.py.

    It puts no entries in front of the block. Its layer attends to the window and to the chosen chunks in one softmax,
    to the latter with queries and keys that are not turned by their positions unless `positions` is "rotary". The
    chunks that hold the tokens of sinks are not chosen.

    Args:
        training: what is attended to in training, the "chosen" chunks or "all" (which teaches a router at first).
        gradient_rate: the share of rows, drawn in each training call, whose stored keys and values get a gradient.
        dtype: "float32", "bfloat16", ...; default that of the model.
        positions: "none", or "rotary" with the frequencies of the config, but in `unrotated_layers`.
        capacity, chunk_size, num_chosen, operator, temperature, summary, num_summaries, key_shift: those of
            `routing.Router`.
    """

    losses = ("distillation",)

    def __init__(
        self, config: Config, layer: int, *, training: Literal["chosen", "all"] = "chosen", gradient_rate: float = 1.0,
        dtype: str | None = None, positions: Literal["none", "rotary"] = "none", capacity: int = 262_144,
        chunk_size: int = 16, num_chosen: int = 8, operator: Operator = "coordinate_descent", temperature: float = 1.0,
        summary: Literal["mean", "gate"] = "mean", num_summaries: int = 1, key_shift: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(config, layer)
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"extra_memories['routed']: dtype={dtype!r} is no type of torch, such as 'bfloat16'")
        if training not in ("chosen", "all"):
            raise ValueError(f"extra_memories['routed']: training must be 'chosen' or 'all', not {training!r}")
        if not 0 <= gradient_rate <= 1:
            raise ValueError(f"extra_memories['routed']: gradient_rate must be from 0 to 1, not {gradient_rate}")
        self.attends_to_all, self.gradient_rate = training == "all", gradient_rate
        turns, growth = None, 1.0
        positions = "none" if layer in config.unrotated_layers else positions
        if positions == "rotary" and config.dim_head % 2 == 0:
            turns, growth = frequencies(config.dim_head, config.rotary_base, config.rotary_scaling, torch.device("cpu"))
        self.router = Router(
            kv_heads=config.kv_heads, dim_head=config.dim_head, block_width=config.block_width,
            capacity=capacity, chunk_size=chunk_size, num_chosen=num_chosen, operator=operator,
            temperature=temperature, summary=summary, num_summaries=num_summaries, key_shift=key_shift,
            num_skipped=-(-self.tokens_of_sinks(config, layer) // chunk_size), frequencies=turns, growth=growth,
            max_blocks=config.max_seq_len // config.block_width, positions=positions,
            scale=ATTENTIONS[config.qk_norm_of_tokens(layer)](config).scale,
            dtype=None if dtype is None else getattr(torch, dtype),
        )  # fmt: skip

    @staticmethod
    def tokens_of_sinks(config: Config, layer: int) -> int:
        """First tokens of the stream that the layer keeps as sinks: they must not be attended to twice."""
        has_sinks = "sinks" in config.extra_memories and layer in config.extra_layers("sinks")
        return int(config.extra_memories["sinks"].get("tokens", 4)) if has_sinks else 0

    def empty(self, batch: int, like: Tensor) -> Store:
        return self.router.empty(batch, like)

    def view(self, memory: Store) -> KV:
        return KV(*(x[:, :, 0, :0] for x in memory[:2]))

    def append(self, memory: Store, blocks: KV, span: Span) -> Appended:
        """Leaves the store to `read`: the queries of blocks that come together need it as each of them found it."""
        nothing = KV(*(x[:, None, :, :0].expand(-1, span.num_blocks, -1, -1, -1) for x in blocks))
        return Appended(nothing, None, memory)

    def read(
        self, memory: Store, q: Tensor, window: KV, bias: Tensor | None, leaving: Leaving, span: Span, mode: Mode,
        *, far_q: Tensor, distance: int | Tensor, dropout: float,
    ) -> tuple[Reading, Store]:  # fmt: skip
        """Stores what leaves the XL memory, ready keys and values, and attends: `Router.forward`."""
        blocks, in_place = leaving.blocks, span.in_place and not torch.is_grad_enabled() and is_writable(memory.k)
        if blocks is not None and mode.use_dropout and self.gradient_rate < 1:
            drawn = torch.rand(len(q), 1, 1, 1, device=q.device) < self.gradient_rate
            blocks = KV(*(torch.where(drawn, x, x.detach()) for x in blocks))
        found: tuple[Reading, Store] = self.router(
            memory, q, window, bias, blocks=blocks, rows=leaving.rows, in_place=in_place, far_q=far_q,
            distance=distance, dropout=dropout, everything=self.attends_to_all and mode.use_dropout,
            distil="distillation" in mode.auxiliary,
        )  # fmt: skip
        return found


class Leaving(NamedTuple):
    """What the blocks of a span push out of the XL memory."""

    blocks: KV | None = None  # (b, g, t w, e); None: nothing
    rows: Tensor | None = None  # the rows, (b,) bool, in which it does; None: all


def extend(buffer: KV, new: KV, span: Span, start: int = 0) -> KV:
    """A buffer (b, g, j, e), in which the block begins at `start`, with the new tokens in their places."""
    if span.in_place and span.length == 1 and is_writable(buffer.k) and is_writable(buffer.v):
        return overwritten(buffer, new, span, start)
    if isinstance(span.offset, int):
        start, stop = start + span.offset, start + span.offset + span.length
        return KV(*(torch.slice_scatter(old, x.to(old.dtype), 2, start, stop) for old, x in zip(buffer, new)))
    slot = torch.arange(-start, buffer.k.shape[2] - start, device=buffer.k.device) - span.offset[:, None]
    count = span.length if span.row_lengths is None else span.row_lengths[:, None]
    fresh = ((slot >= 0) & (slot < count))[:, None, :, None]
    if span.length > 1:
        index = slot.clamp(0, span.length - 1)[:, None, :, None].expand_as(buffer.k)  # into the new tokens
        new = KV(*(x.gather(2, index) for x in new))
    return KV(*(torch.where(fresh, x.to(old.dtype), old) for old, x in zip(buffer, new)))


def is_writable(x: Tensor) -> bool:
    """Whether x has memory of its own for each number, and may be changed here."""
    if not x.is_contiguous():
        return False
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference()


def overwritten(buffer: KV, new: KV, span: Span, start: int) -> KV:
    """`extend` by one token a row, in the buffer itself; a row that brings none keeps what it has there."""
    for old, x in zip(buffer, new):
        if isinstance(span.offset, int):
            old.narrow(2, start + span.offset, 1).copy_(x)  # an index would be a constant of a compiled graph
            continue
        index, x = per_row(start + span.offset, old).expand_as(x), x.to(old.dtype)
        if span.row_lengths is not None:
            x = torch.where(per_row(span.row_lengths, old) > 0, x, old.gather(2, index))
        old.scatter_(2, index, x)
    return buffer


# ----------------------------------------------------------------------------------------------------------- 5 gates


class Shares(NamedTuple):
    """What a gate decides: new state = keep * old + write * candidate. To be broadcast to (b, s, d), at least fp32."""

    keep: Tensor
    write: Tensor


def mixed(old: Tensor, candidate: Tensor, shares: Shares) -> Tensor:
    """keep * old + write * candidate, in the type of the state."""
    return torch.addcmul(old * shares.keep, candidate.to(old.dtype), shares.write)


class Gate(nn.Module):
    """Decides how much of a state is kept, and how much of its candidate is written.

    Args:
        dim: of the state.
        dim_source: of what the candidate is computed from.
        options: `Config.gate_options`.

    Attributes:
        is_noisy: whether `forward` takes `use_noise`, and draws random numbers where there is dropout.
        is_decided: whether what it decides depends on what it is given, so that a loss may ask for it to be closed.
    """

    is_noisy = False
    is_decided = True

    def __init__(self, dim: int, dim_source: int) -> None:
        super().__init__()

    def shares(self, source: Tensor, state: Tensor, mode: Mode) -> Shares:
        """What it decides in a call."""
        decided: Shares = self(source, state, use_noise=mode.use_dropout) if self.is_noisy else self(source, state)
        return decided

    def forward(self, source: Tensor, state: Tensor) -> Shares:
        """source (b, s, dim_source), state (b, s, d) -> shares, each to be broadcast to (b, s, d)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")


class GateLinear(nn.Linear):
    """A gate's map, with the authors' initial bias; `optim.parameter_groups` leaves it undecayed."""

    _no_weight_decay = ("weight", "bias")

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.bias, std=0.1)


@register_gate("fixed")
class FixedGate(Gate):
    """keep = sigmoid(b), write = 1 - keep: a learned share for each channel, whatever is read."""

    _no_weight_decay = ("keep",)
    is_decided = False

    def __init__(self, dim: int, dim_source: int) -> None:
        super().__init__(dim, dim_source)
        self.keep = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.keep, std=0.1)

    def forward(self, source: Tensor, state: Tensor) -> Shares:
        logit = self.keep.to(state.dtype)
        return Shares(logit.sigmoid(), (-logit).sigmoid())  # 1 - keep, however small


@register_gate("full")
class FullGate(Gate):
    """keep = sigmoid(h W + b + 1), write = 1 - keep, h the source of the candidate."""

    def __init__(self, dim: int, dim_source: int) -> None:
        super().__init__(dim, dim_source)
        self.to_keep = GateLinear(dim_source, dim)

    def forward(self, source: Tensor, state: Tensor) -> Shares:
        logit = self.to_keep(source).to(state.dtype) + 1
        return Shares(logit.sigmoid(), (-logit).sigmoid())


@register_gate("lstm")
class LSTMGate(Gate):
    """keep = sigmoid(h Wf + bf + 1), write = sigmoid(h Wi + bi - 1), h the source of the candidate."""

    def __init__(self, dim: int, dim_source: int) -> None:
        super().__init__(dim, dim_source)
        self.to_forget = GateLinear(dim_source, dim)
        self.to_input = GateLinear(dim_source, dim)

    def forward(self, source: Tensor, state: Tensor) -> Shares:
        keep = (self.to_forget(source).to(state.dtype) + 1).sigmoid()
        return Shares(keep, (self.to_input(source).to(state.dtype) - 1).sigmoid())


@register_gate("hard")
class HardGate(Gate):
    """write = clamp(1/2 + (h W + b - 1 + noise) / 4, 0, 1), keep = 1 - write: closed for good, or open, beyond +-2.

    A closed gate keeps a state exactly, however long; a sigmoid leaks. Noise on the logit, in training, keeps gradients
    coming through gates near the edge, and moves those that matter away from it.

    Args:
        noise: standard deviation of the normal noise on the logit, in training.
        per: whether each channel of a state has a gate, or each state one.
    """

    def __init__(
        self, dim: int, dim_source: int, *, noise: float = 0.5, per: Literal["channel", "state"] = "channel"
    ) -> None:
        super().__init__(dim, dim_source)
        if not noise >= 0:
            raise ValueError(f"gate_options: noise must be at least 0, not {noise}")
        if per not in ("channel", "state"):
            raise ValueError(f"gate_options: per must be 'channel' or 'state', not {per!r}")
        self.noise, self.is_noisy = noise, noise > 0
        self.to_write = GateLinear(dim_source, dim if per == "channel" else 1)

    def forward(self, source: Tensor, state: Tensor, use_noise: bool = False) -> Shares:
        logit = self.to_write(source).to(state.dtype) - 1
        if use_noise:
            logit = logit + self.noise * torch.randn_like(logit)
        write = (0.5 + logit / 4).clamp(0, 1)
        return Shares(1 - write, write)


def make_gate(config: Config, dim_source: int, dim: int | None = None) -> Gate:
    """The gate of the config for states of that width, default dim."""
    gate: Gate = GATES[config.gate](config.dim if dim is None else dim, dim_source, **config.gate_options)
    return gate


# --------------------------------------------------------------------------------------------------- 6 recurrent cell


class Updated(NamedTuple):
    state: Tensor  # (b, s, d)
    opened: Tensor | None = None  # the mean share that the gates write, (b,); None: nobody asked


def opened(shares: Shares, state: Tensor, mode: Mode) -> Tensor | None:
    """The mean share that a gate writes to the states of each row, (b,), if the loss `open_gates` is asked for."""
    if "open_gates" not in mode.auxiliary:
        return None
    return shares.write.expand_as(state).flatten(1).mean(1)


class SkipUpdate(nn.Module):
    """gate(S, C Wo): one gate, no feed-forward (the paper's best)."""

    def __init__(self, config: Config, dim_attended: int) -> None:
        super().__init__()
        self.to_candidate = nn.Linear(dim_attended, config.dim, bias=config.candidate_bias)
        self.gate = make_gate(config, dim_attended)

    def forward(self, state: Tensor, attended: Tensor, mode: Mode) -> Updated:
        shares = self.gate.shares(attended, state, mode)
        return Updated(mixed(state, self.to_candidate(attended), shares), opened(shares, state, mode))


class DualUpdate(nn.Module):
    """U = gate(S, C Wo), then gate'(U, feed-forward(U)): a gate in the place of each residual connection."""

    def __init__(self, config: Config, dim_attended: int) -> None:
        super().__init__()
        self.attention = SkipUpdate(config, dim_attended)
        self.norm = make_norm(config)
        self.hidden = Hidden(config, config.dim)
        self.to_candidate = nn.Linear(config.ff_dim, config.dim, bias=config.candidate_bias)
        self.gate = make_gate(config, config.ff_dim)

    def forward(self, state: Tensor, attended: Tensor, mode: Mode) -> Updated:
        state, first = self.attention(state, attended, mode)
        hidden = self.hidden(self.norm(state.to(attended.dtype)))
        shares = self.gate.shares(hidden, state, mode)
        second = opened(shares, state, mode)
        both = None if first is None or second is None else (first + second) / 2
        return Updated(mixed(state, self.to_candidate(hidden), shares), both)


class SingleUpdate(nn.Module):
    """gate(S, tanh(hidden(C) W)): one gate around a feed-forward on what was attended to."""

    def __init__(self, config: Config, dim_attended: int) -> None:
        super().__init__()
        self.hidden = Hidden(config, dim_attended)
        self.to_candidate = nn.Linear(config.ff_dim, config.dim, bias=config.candidate_bias)
        self.gate = make_gate(config, config.ff_dim)

    def forward(self, state: Tensor, attended: Tensor, mode: Mode) -> Updated:
        hidden = self.hidden(attended)
        shares = self.gate.shares(hidden, state, mode)
        return Updated(mixed(state, self.to_candidate(hidden).tanh(), shares), opened(shares, state, mode))


UPDATES = {"skip": SkipUpdate, "dual": DualUpdate, "single": SingleUpdate}


class RecurrentCell(nn.Module):
    """The horizontal direction: states (b, s, d) attend to themselves and to the tokens of a block, then change."""

    _no_weight_decay = ("initial", "ids")

    def __init__(self, config: Config) -> None:
        super().__init__()
        inner, dim = config.heads * config.dim_head, config.dim
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.initial = nn.Parameter(torch.empty(config.num_state_vectors, dim))
        self.ids = nn.Parameter(torch.empty(config.num_state_vectors, dim))
        self.norm = make_norm(config)
        self.to_kv = nn.Linear(dim, 2 * config.kv_heads * config.dim_head, bias=False)
        self.to_q = nn.Linear(dim, 2 * inner, bias=False)  # [of the states among themselves ; to the tokens]
        self.self_norm = ATTENTIONS[config.qk_norm](config)
        self.cross_norm = ATTENTIONS[config.qk_norm](config)
        self.update = UPDATES[config.state_update](config, 2 * inner)
        gates = [part for part in self.update.modules() if isinstance(part, Gate)]
        self.is_noisy = any(gate.is_noisy for gate in gates)
        self.losses = ("open_gates",) if any(gate.is_decided for gate in gates) else ()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.initial, std=0.1)
        nn.init.normal_(self.ids)

    @torch.no_grad()
    def match(self, to_kv: Tensor) -> None:
        """Initial values with which a state finds what is like it: one map makes all keys, of tokens and of states.

        Args:
            to_kv: that map, (2 g e, d), keys first.
        """
        self.to_kv.weight.copy_(to_kv)
        self.to_q.weight.copy_(as_queries(to_kv, self.kv_heads, self.heads).repeat(2, 1))

    def initial_state(self) -> Tensor:
        """(s, d), in at least fp32."""
        return self.initial.to(torch.promote_types(self.initial.dtype, torch.float32))

    def identified(self, state: Tensor) -> Tensor:
        """norm(S) + ids: what keys, values and queries of the states come from."""
        normed: Tensor = self.norm(state.to(self.ids.dtype))
        return normed + self.ids

    def project(self, state: Tensor) -> KV:
        """State (b, s, d) -> its keys and values (b, g, s, e), shared by both directions."""
        return self.kv_of(self.identified(state))

    def kv_of(self, source: Tensor) -> KV:
        k, v = split_heads(self.to_kv(source), 1, 2 * self.kv_heads).chunk(2, dim=1)
        return KV(self.self_norm.stored_state(k), v)

    def write(
        self, state: Tensor, source: Tensor, state_k: Tensor, state_v: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None, mode: Mode,
    ) -> Updated:  # fmt: skip
        """The state after a block whose ready keys and values are k, v (b, g, j, e).

        source: the identified state; state_k, state_v: its keys and values.
        """
        to_self, to_tokens = split_heads(self.to_q(source), 1, 2 * self.heads).chunk(2, dim=1)
        own = self.self_norm(self.self_norm.state_queries(to_self), state_k, state_v)
        others = self.cross_norm(self.cross_norm.queries(to_tokens), k, v, mask=mask)
        new: Updated = self.update(state, torch.cat((join_heads(own, 1), join_heads(others, 1)), dim=-1), mode)
        return new

    def forward(
        self, state: Tensor, kv: KV, tokens: KV, mask: Tensor | None, mode: Mode
    ) -> tuple[KV, Tensor, Tensor | None]:
        """Goes through t complete blocks.

        Args:
            state: (b, s, d), as of the start of the first block, and `kv`, its keys and values.
            tokens: stored keys and values (b, t, g, j, e) that the states attend to.
            mask: (b, 1, 1, j) bool, which of these are there; None: all.
            mode: of the call.

        Returns:
            Keys and values of the state as of the start of each block, (b, t, g, s, e), the state after the last, and
            the mean share that the gates write in each block, (b, t), if the loss `open_gates` is asked for.
        """
        kvs, source, shares = [kv], self.identified(state), []
        blocks = list(zip(self.cross_norm.ready(tokens.k).unbind(1), tokens.v.unbind(1)))
        write, draws = partial(self.write, mode=mode), mode.use_dropout and self.is_noisy
        for k, v in blocks:
            state, share = mode.recomputed(write, state, source, *kvs[-1], k, v, mask, draws=draws)
            shares.append(share)
            if len(kvs) < len(blocks):
                source = self.identified(state)
                kvs.append(self.kv_of(source))
        written = None if shares[0] is None else torch.stack(shares, dim=1)
        return KV(*(torch.stack(x, dim=1) for x in zip(*kvs))), state, written


def as_queries(to_kv: Tensor, kv_heads: int, heads: int) -> Tensor:
    """The map (2 g e, d) of keys and values -> one of queries (h e, d) in which each head asks with its keys' map."""
    k = rearrange(to_kv.chunk(2)[0], "(g e) d -> g e d", g=kv_heads)
    return k.repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)


def make_cell(config: Config) -> RecurrentCell | TokenGatedCell:
    if config.state_update != "token_gated":
        return RecurrentCell(config)
    source = 2 * config.write_span * config.kv_heads * config.dim_head
    return TokenGatedCell(
        dim=config.dim, num_states=config.num_state_vectors, kv_heads=config.kv_heads, dim_head=config.dim_head,
        span=config.write_span, norm=make_norm(config), gate=make_gate(config, source, dim=1),
        stored_key=ATTENTIONS[config.qk_norm](config).stored_state,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ 7 transformer block


class Taken(NamedTuple):
    """What the memory of a layer makes of the new tokens of a span."""

    keys: KV  # [memories ; block] as the queries see them, (b t, g, j, e)
    memory: LayerMemory  # after the span, but for a routed store, which is written where it is read
    leaving: Leaving
    for_states: KV | None  # what states attend to as each block completes, (b, t, g, j, e); None: no block does


class LayerOutput(NamedTuple):
    x: Tensor  # tokens, (b, t n, d)
    memory: LayerMemory
    state: Tensor | None  # of the layer's cell, (b, s, d); None in a plain layer
    state_kv: KV | None  # of the states as of the start of each block, (b, t, g, s, e)
    losses: dict[str, Tensor]  # auxiliary losses by name, each (2,): a sum, and of how many


class TransformerBlock(nn.Module):
    """One layer: self-attention beside reads of states, feed-forward, and in a recurrent layer the cell it writes."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        is_recurrent = layer in config.recurrent_layers
        inner, reads = config.heads * config.dim_head, config.reads(layer)
        self.heads, self.kv_heads, self.dim_head = config.heads, config.kv_heads, config.dim_head
        self.is_own_read = layer in reads
        self.other_reads = tuple(cell for cell in reads if cell != layer)
        self.state_reads_memory = config.state_reads_memory
        self.block_width = config.block_width
        self.attn_dropout, self.input_dropout = config.attn_dropout, config.attn_input_dropout
        self.norm = make_norm(config)
        self.widths = [inner] * (1 + len(reads)) + [2 * config.kv_heads * config.dim_head]
        self.to_qkv = nn.Linear(config.dim, sum(self.widths), bias=config.qkv_bias)  # [q ; a q for each read ; k ; v]
        self.heads_norm = ATTENTIONS[config.qk_norm_of_tokens(layer)](config)
        self.position_bias = POSITION_BIASES[config.positions](config) if config.positions in POSITION_BIASES else None
        self.read_norm = nn.ModuleList(ATTENTIONS[config.qk_norm](config) for _ in reads)
        self.to_out = nn.Linear(inner * (1 + len(reads)), config.dim, bias=False)
        self.feed_forward = FeedForward(config)
        self.xl = XLMemory(config, layer)
        self.compressor = CompressedMemory(config, layer) if config.compressed_width(layer) else None
        self.extra = nn.ModuleDict()
        for name, options in config.extra_memories.items():
            if layer in config.extra_layers(name):
                own = {option: value for option, value in options.items() if option != "layers"}
                try:
                    inspect.signature(MEMORIES[name]).bind(config, layer, **own)
                except TypeError as error:
                    raise ValueError(f"extra_memories[{name!r}]: {error}") from error
                kind: MemoryKind = MEMORIES[name](config, layer, **own)
                kind.name = name
                self.extra[name] = kind
        self.cell = make_cell(config) if is_recurrent else None

    @torch.no_grad()
    def match(self) -> None:
        """Matching initial values: one orthogonal map makes keys and values of tokens and states, and all queries."""
        to_kv = nn.init.orthogonal_(torch.empty(self.widths[-1], self.to_qkv.in_features))
        q = as_queries(to_kv, self.kv_heads, self.heads)
        self.to_qkv.weight.copy_(torch.cat((q.repeat(len(self.widths) - 1, 1), to_kv)))
        if self.cell is not None:
            self.cell.match(to_kv)

    @property
    def kinds(self) -> list[MemoryKind]:
        """The memories of complete blocks, the nearest first; each but the first takes in what leaves that."""
        extra = cast(list[MemoryKind], self.extra.values())
        near, far = [kind for kind in extra if kind.is_near], [kind for kind in extra if not kind.is_near]
        return [self.xl, *near, *far] if self.compressor is None else [self.xl, *near, self.compressor, *far]

    @property
    def routed(self) -> RoutedMemory | None:
        """The memory that the queries of this layer choose from, if it has one."""
        return cast(RoutedMemory, self.extra["routed"]) if "routed" in self.extra else None

    @property
    def auxiliary_losses(self) -> set[str]:
        """Names of the auxiliary losses that this layer has."""
        parts = [*self.kinds, *(() if self.cell is None else (self.cell,))]
        return {name for part in parts for name in part.losses}

    def empty_memory(self, batch: int, like: Tensor) -> LayerMemory:
        past = {kind.name: kind.empty(batch, like) for kind in self.kinds}
        return LayerMemory(empty_kv(like, batch, self.kv_heads, self.block_width, self.dim_head), past)

    def check_memory(self, name: str, memory: LayerMemory, batch: int, like: Tensor) -> None:
        """Raises a ValueError if a carried memory is not one of this layer."""
        kinds = self.kinds
        if memory.past.keys() != {kind.name for kind in kinds}:
            own = sorted(kind.name for kind in kinds)
            raise ValueError(f"{name} has the memories {sorted(memory.past)}, this model has {own}")
        check_kv(f"{name}, block", memory.block, (batch, self.kv_heads, self.block_width, self.dim_head), like)
        for kind in kinds:
            kind.check(f"{name}, {kind.name}", memory.past[kind.name], batch, like)
        if memory.ready is not None:
            width = self.block_width + sum(kind.width for kind in kinds)
            check_kv(f"{name}, ready", memory.ready, (batch, self.kv_heads, width, self.dim_head), like)

    # -- through the layer

    def forward(
        self, x: Tensor, memory: LayerMemory, state: Tensor | None, state_kv: KV | None, reads: Sequence[KV],
        span: Span, visibility: Visibility, mode: Mode,
    ) -> LayerOutput:  # fmt: skip
        """One span of the sequence through this layer.

        Args:
            x: (b, t n, d).
            memory: of this layer, before the span.
            state, state_kv: of this layer's cell as of the block's start; None in a plain layer.
            reads: keys and values (b, t, g, s, e) of other layers' states, to be read here.
        """
        t = span.num_blocks
        draws = mode.use_dropout and self.input_dropout > 0
        projected = mode.recomputed(partial(self.project, mode=mode), x, draws=draws)
        q, *to_read, kv = torch.split(projected, self.widths, dim=-1)
        k, v = split_heads(kv, 1, 2 * self.kv_heads).chunk(2, dim=1)
        k = self.heads_norm.stored(k)
        taken = self.remember(memory, KV(k, v), span, visibility)
        own_kv, losses = None, cast(dict[str, Tensor], {})
        if self.cell is not None and state is not None and state_kv is not None:
            own_kv, state, losses = self.updated(self.cell, state, state_kv, taken.for_states, span, mode)
            if self.is_own_read:
                reads = (own_kv, *reads)
        if self.compressor is not None and "reconstruction" in mode.auxiliary and self.compressor.losses:
            oldest = self.oldest_blocks(memory.past[self.xl.name], KV(k, v), span)
            losses["reconstruction"] = self.reconstruction(self.compressor, q, oldest, span)
        memory = taken.memory
        if self.routed is None:
            own = self.self_attention(q, taken.keys, visibility, t, mode)
        else:
            own, store, found_losses = self.routed_attention(self.routed, q, taken, span, visibility, mode)
            losses |= found_losses
            memory = memory._replace(past=memory.past | {self.routed.name: store})
        found = [own, *self.read_states(to_read, reads, t)]
        x = x + mode.recomputed(self.combine, *(join_heads(one, t) for one in found))
        x = x + self.feed_forward(x, mode)
        return LayerOutput(x, memory, state, own_kv, losses)

    def project(self, x: Tensor, mode: Mode) -> Tensor:
        """Tokens (b, t n, d) -> their queries, keys and values, side by side."""
        projected: Tensor = self.to_qkv(mode.dropout(self.norm(x), self.input_dropout))
        return projected

    def self_attention(self, q: Tensor, keys: KV, visibility: Visibility, t: int, mode: Mode) -> Tensor:
        """Queries (b, t n, h e), keys and values they see (b t, g, j, e) -> (b t, h, n, e)."""
        q = rotate(self.heads_norm.queries(split_heads(q, t, self.heads)), visibility.q_tables)
        mask, causal = visibility.added, visibility.causal
        if self.position_bias is not None:
            mask, causal = self.biases(visibility, q.dtype), False
        dropout = self.attn_dropout if mode.use_dropout else 0.0
        found: Tensor = self.heads_norm(q, keys.k, keys.v, mask=mask, causal=causal, dropout=dropout)
        return found

    def routed_attention(
        self, routed: RoutedMemory, q: Tensor, taken: Taken, span: Span, visibility: Visibility, mode: Mode
    ) -> tuple[Tensor, Store, dict[str, Tensor]]:
        """`self_attention` that reads the chosen chunks of a store, too; the next store, and auxiliary losses."""
        t = span.num_blocks
        content = self.heads_norm.queries(split_heads(q, t, self.heads))
        near, far = (
            rearrange(x, "(b t) h n e -> b h t n e", t=t) for x in (rotate(content, visibility.q_tables), content)
        )
        window = KV(*(rearrange(x, "(b t) g j e -> b g t j e", t=t) for x in taken.keys))
        left = taken.leaving
        if left.blocks is not None:
            left = left._replace(blocks=KV(self.heads_norm.ready(left.blocks.k), left.blocks.v))
        reading, store = routed.read(
            taken.memory.past[routed.name], near, window, self.hidden_keys(visibility, near), left, span, mode,
            far_q=far, distance=self.xl.width + span.offset, dropout=self.attn_dropout if mode.use_dropout else 0.0,
        )  # fmt: skip
        losses = {}
        if "distillation" in mode.auxiliary:
            can_choose = (reading.seen > routed.router.num_skipped)[:, None, :, None]
            losses["distillation"] = summed(reading.distillation, can_choose, span)
        return rearrange(reading.out, "b h t n e -> (b t) h n e"), store, losses

    def oldest_blocks(self, xl: KV, new: KV, span: Span) -> KV:
        """The oldest block of a full XL memory as each block of the span finds it, (b, g, t w, e)."""
        stop = span.num_blocks * self.block_width
        return KV(*(cat_keys(old, x)[:, :, :stop] for old, x in zip(xl, new)))

    def reconstruction(self, compressor: CompressedMemory, q: Tensor, oldest: KV, span: Span) -> Tensor:
        """The attention-reconstruction loss (Rae et al. 2019, algorithm 2), (2,): a sum, and of how many.

        Queries are those of every token whose XL memory is full; the keys, those of its oldest block, which is
        compressed when the block of the token completes. What a head finds there, as it is and compressed, is compared:
        the squared error, a mean over channels, heads and tokens. A token has both at hand before its block is full, so
        the loss is the same for every split. As in the paper, attention is by content alone, with queries and keys that
        are not turned: where an entry stands changes as it ages. Only the compressor gets a gradient.

        Args:
            q: (b, t n, h e).
            oldest: stored keys and values (b, g, t w, e).
        """
        t, until_full = span.num_blocks, self.xl.blocks_until_full
        if span.extra_blocks is None and span.full_blocks < until_full:
            return q.new_zeros(2, dtype=torch.promote_types(q.dtype, torch.float32))
        oldest = KV(*(x.detach() for x in oldest))
        queries = self.heads_norm.state_queries(split_heads(q, t, self.heads)).detach()

        def found(kv: KV) -> Tensor:
            k, v = (rearrange(x, "b g (t j) e -> (b t) g j e", t=t) for x in kv)
            return at_least_fp32(self.heads_norm(queries, self.heads_norm.without_gain(k), v))

        error = (found(compressor.compress(oldest, t)) - found(oldest)).square().mean(-1)
        error = rearrange(error, "(b t) h n -> b h t n", t=t)
        full = torch.ones_like(error, dtype=torch.bool)
        if span.extra_blocks is not None:
            full = full & per_row(span.full_blocks + span.extra_blocks >= until_full, error)
        return summed(error, full, span)

    def hidden_keys(self, visibility: Visibility, q: Tensor) -> Tensor | None:
        """What is added to the logits of the window, (1 or b, h or 1, 1, n, j): position biases, -inf if not seen."""
        if self.position_bias is not None:
            return self.biases(visibility, q.dtype)[:, :, None]
        mask = visibility.mask
        if visibility.causal:
            n = q.shape[3]
            mask = torch.ones(n, visibility.last - visibility.first, dtype=torch.bool, device=q.device)
            mask = mask.tril(visibility.last - visibility.first - n)
        return None if mask is None else additive(mask, 1, q.dtype)[:, :, None]

    def biases(self, visibility: Visibility, dtype: torch.dtype) -> Tensor:
        """The position bias of each query and key, -inf where the key is not seen, (1 or b, h, n, j)."""
        assert visibility.distances is not None and self.position_bias is not None
        values, seen, pairs = visibility.distances
        bias = self.heads_norm.scaled_bias(self.position_bias(values)).to(dtype).masked_fill(~seen, -math.inf)
        bias = bias[:, pairs].movedim(0, -3)
        bias = bias if bias.ndim == 4 else bias[None]
        return bias if visibility.mask is None else bias.masked_fill(~batched(visibility.mask), -math.inf)

    def read_states(self, queries: Sequence[Tensor], states: Sequence[KV], t: int) -> list[Tensor]:
        """What the tokens find in the states: one (b t, h, n, e) for each (b, t, g, s, e) and its queries."""
        found = []
        for projected, attention, kv in zip(queries, cast(list[Attention], self.read_norm), states):
            q = attention.state_queries(split_heads(projected, t, self.heads))
            found.append(attention(q, kv.k.flatten(0, 1), kv.v.flatten(0, 1)))
        return found

    def combine(self, *attended: Tensor) -> Tensor:
        """What each attention found, (b, t n, h e) -> (b, t n, d)."""
        out: Tensor = self.to_out(torch.cat(attended, dim=-1) if len(attended) > 1 else attended[0])
        return out

    def updated(
        self, cell: RecurrentCell | TokenGatedCell, state: Tensor, kv: KV, tokens: KV | None, span: Span, mode: Mode
    ) -> tuple[KV, Tensor, dict[str, Tensor]]:
        """Keys and values of the state as of the start of each block, (b, t, g, s, e), the state after the span, and
        auxiliary losses."""
        is_asked = "open_gates" in mode.auxiliary and bool(cell.losses)
        if tokens is None:
            return KV(kv.k[:, None], kv.v[:, None]), state, {"open_gates": state.new_zeros(2)} if is_asked else {}
        kvs, written, opened = cell(state, kv, tokens, self.absent_to_states(span), mode)
        rows = span.completes
        losses = {} if opened is None else {"open_gates": summed_rows(opened, rows)}
        return kvs, written if isinstance(rows, bool) else torch.where(per_row(rows, state), written, state), losses

    # -- its memory

    def remember(self, memory: LayerMemory, new: KV, span: Span, visibility: Visibility) -> Taken:
        """Takes in the keys and values (b, g, t n, e) of the tokens of a span."""
        is_whole = span.row_lengths is None and span.length == self.block_width  # in this order: n may be symbolic
        block = new if is_whole else extend(memory.block, new, span)
        if span.completes is False:
            ready = self.extended_ready(memory, block, new, span, visibility)
            after = LayerMemory(block, memory.past, ready)
            return Taken(self.visible(ready, span, visibility), after, Leaving(), None)
        seen, past, leaving = self.append_block(memory.past, block, span)
        blocks = KV(*(windows(x, self.block_width, self.block_width, span.num_blocks) for x in block))
        if is_whole:
            k, v = (cat_keys(*parts, own).flatten(0, 1) for own, *parts in zip(blocks, *reversed(seen)))
            keys = KV(self.made_ready(k, visibility.k_tables), v)
        else:
            keys = self.extended_ready(memory, block, new, span, visibility)
        for_states = blocks
        if self.state_reads_memory:
            for_states = KV(*map(cat_keys, self.held_in_xl(seen[0], span), blocks))
        elif isinstance(self.cell, TokenGatedCell):
            before = self.tokens_before(self.cell.span - 1, seen[0], span)
            for_states = KV(*map(cat_keys, before, blocks))
        left = KV(*(zeros(x, *x.shape) for x in memory.block))
        if isinstance(span.completes, Tensor):
            left = choose_rows(span.completes, left, block)
        return Taken(self.visible(keys, span, visibility), LayerMemory(left, past), leaving, for_states)

    def append_block(self, past: dict[str, Any], block: KV, span: Span) -> tuple[list[KV], dict[str, Any], Leaving]:
        """Puts blocks (b, g, t w, e) into all memories: what each block sees, the nearest first, the memories
        afterwards, and what left the first."""
        seen, after, leaving = [], dict(past), Leaving()
        blocks, rows = block, span.completes
        for kind in self.kinds:
            if kind is not self.xl:
                rows = arriving(span, self.xl.blocks_until_full)
                if rows is not False:
                    leaving = Leaving(blocks, rows if isinstance(rows, Tensor) else None)
            if isinstance(rows, Tensor):
                appended = kind.append_rows(past[kind.name], blocks, span, rows)
            elif rows:
                appended = kind.append(past[kind.name], blocks, span)
            else:
                appended = Appended(KV(*(x[:, None] for x in kind.view(past[kind.name]))), None, past[kind.name])
            seen.append(appended.seen)
            after[kind.name] = appended.memory
            blocks = blocks if appended.evicted is None else appended.evicted
        return seen, after, leaving

    def made_ready(self, k: Tensor, table: Rotation | None) -> Tensor:
        """Stored keys as the queries see them: normalised, scaled, and turned by their positions."""
        return rotate(self.heads_norm.ready(k), table)

    def extended_ready(self, memory: LayerMemory, block: KV, new: KV, span: Span, visibility: Visibility) -> KV:
        """[memories ; block] as the queries see them, with the new tokens in it, (b, g, m + w, e)."""
        kinds = self.kinds
        if memory.ready is None:
            views = [kind.view(memory.past[kind.name]) for kind in reversed(kinds)]
            k, v = (cat_keys(*parts) for parts in zip(*views, block))
            return KV(self.made_ready(k, visibility.k_tables), v)
        new = KV(self.made_ready(new.k, visibility.new_tables), new.v)
        return extend(memory.ready, new, span, start=sum(kind.width for kind in kinds))

    def visible(self, keys: KV, span: Span, visibility: Visibility) -> KV:
        """The part of [memories ; block] that some query sees."""
        if span.num_blocks > 1:
            return keys
        return KV(*(x[:, :, visibility.first : visibility.last] for x in keys))

    def held_in_xl(self, seen: KV, span: Span) -> KV:
        """The entries (b, t, g, j, e) of the XL memory that some row holds."""
        absent = 0 if span.extra_blocks is not None else self.xl.width - self.xl.held(span.full_blocks)
        return KV(*(x[..., absent:, :] for x in seen))

    def tokens_before(self, count: int, seen: KV, span: Span) -> KV:
        """The last tokens before each block, (b, t, g, count, e); zeros for those that the XL memory does not hold."""
        before = [x[..., -count:, :] if count else x[..., :0, :] for x in self.held_in_xl(seen, span)]
        if span.extra_blocks is not None:
            held = self.xl.held_by_rows(span.full_blocks + span.extra_blocks)
            age = torch.arange(before[0].shape[-2], 0, -1, device=held.device)
            absent = (age > held[:, None])[:, None, None, :, None]
            before = [x.masked_fill(absent, 0) for x in before]
        return KV(*(F.pad(x, (0, 0, count - x.shape[-2], 0)) for x in before))

    def absent_to_states(self, span: Span) -> Tensor | None:
        """Which of what states attend to each row holds, (b, 1, 1, j) bool; None: all of it."""
        if not self.state_reads_memory or span.extra_blocks is None:
            return None
        held = self.xl.held_by_rows(span.full_blocks + span.extra_blocks)
        places = torch.arange(self.xl.width + self.block_width, device=held.device)
        return (places >= self.xl.width - held[:, None])[:, None, None]


def summed(losses: Tensor, counts: Tensor, span: Span) -> Tensor:
    """The sum of losses (b, g, t, n), one a token, where `counts` (broadcast) and the token is there, and how many."""
    if span.row_lengths is not None:
        counts = counts & (torch.arange(losses.shape[3], device=losses.device) < per_row(span.row_lengths, losses))
    counts = counts.expand_as(losses)
    return torch.stack((losses.masked_fill(~counts, 0).sum(), counts.sum().to(losses.dtype)))


def summed_rows(losses: Tensor, rows: bool | Tensor) -> Tensor:
    """The sum of losses (b, t), one a block, over the given rows, (b,) bool or True for all, and how many they are."""
    if isinstance(rows, bool):
        return torch.stack((losses.sum(), losses.new_tensor(losses.numel())))
    counts = rows[:, None].expand_as(losses)
    return torch.stack((losses.masked_fill(~counts, 0).sum(), counts.sum().to(losses.dtype)))


def arriving(span: Span, delay: int) -> bool | Tensor:
    """The rows, (b,) bool, in which the block that a span completes pushes one out of an XL memory of so many."""
    if span.full_blocks >= delay or span.completes is False:
        return span.completes
    if span.extra_blocks is None:
        return False
    full = span.full_blocks + span.extra_blocks >= delay
    return full if span.completes is True else full & span.completes


# -------------------------------------------------------------------------------------- 8 Block-Recurrent Transformer


def hand_down(layers: list[LayerMemory], complete: Tensor | bool, width: int) -> list[LayerMemory]:
    """Enhanced recurrence: the newest block in the memory of each layer becomes what the next layer computed."""
    handed = []
    for layer, above in pairwise(layers):
        pairs = zip(layer.past["xl"], above.past["xl"])
        xl = KV(*(torch.cat((own[:, :, :-width], new[:, :, -width:]), dim=2) for own, new in pairs))
        if isinstance(complete, Tensor):
            xl = choose_rows(complete, xl, layer.past["xl"])
        handed.append(layer._replace(past=layer.past | {"xl": xl}))
    return [*handed, layers[-1]]


def init_lecun(module: nn.Module) -> None:
    """The initial values of the paper's authors: truncated normal, variance 1 / inputs, a tenth of that for gates."""
    if isinstance(module, nn.Linear):
        variance = (0.1 if isinstance(module, GateLinear) else 1.0) / module.in_features
        std = variance**0.5 / 0.87962566  # of the normal before it is cut at two of them
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


def renew_tables(model: nn.Module, _: Any) -> None:
    """After load_state_dict(assign=True) of weights on another device or of another type."""
    model.rotary.reset_tables(model.token_emb.weight)  # type: ignore[union-attr, operator]


class Encoded(NamedTuple):
    """What `BlockRecurrentTransformer.encode` gives."""

    hidden: Tensor  # (b, n, d), after the last norm
    memories: Memories
    states: States
    layers: tuple[Tensor, ...] | None  # the embedded tokens, and the output of each layer: depth + 1 of (b, n, d)
    losses: dict[str, Tensor]  # auxiliary losses by name, each a mean


@dataclass
class Carry:
    """What a call carries along from span to span."""

    layers: list[LayerMemory]
    states: dict[int, Tensor]  # by the number of the recurrent layer
    kv: dict[int, KV]  # keys and values of these states, once they are projected
    losses: dict[str, Tensor] = field(default_factory=dict)  # auxiliary losses by name, each (2,): a sum, and how many


class BlockRecurrentTransformer(nn.Module):
    """A language model that carries memories and states along a stream of tokens.

    Args:
        config: a `Config`, or its fields as keywords (`num_tokens=256, dim=512, depth=6, ...`).

    Raises:
        ValueError: options out of range or that cannot be combined.
    """

    def __init__(self, config: Config | None = None, **options: Any) -> None:
        super().__init__()
        if config is not None and not isinstance(config, Config):
            raise ValueError(
                f"config must be a Config, not {describe(config)}; sizes are given by name: num_tokens=256, ..."
            )
        if config is not None and options:
            raise ValueError(f"config was given, and so were the options {sorted(options)}")
        self.config = config = Config(**options) if config is None else config
        self.token_emb = nn.Embedding(config.num_tokens, config.dim)
        with torch.no_grad():
            self.token_emb.weight.mul_(config.embedding_std)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(1, config.depth + 1))
        self.norm = make_norm(config)
        self.to_logits = None if config.tie_embeddings else nn.Linear(config.dim, config.num_tokens, bias=False)
        self.logit_scale = config.logit_scale or (config.dim**-0.5 if config.tie_embeddings else 1.0)
        kinds = [self.layer(number).kinds for number in range(1, config.depth + 1)]
        self.rotary = None
        if config.positions in ROTARIES:
            remembered = max(sum(kind.width for kind in layer) for layer in kinds)
            make_rotary, scaling = ROTARIES[config.positions], config.rotary_scaling
            self.rotary = make_rotary(config.dim_head, remembered, config.block_width, config.rotary_base, scaling)
            self.register_load_state_dict_post_hook(renew_tables)  # type: ignore[no-untyped-call]
        never_masked = config.empty_memory == "zeros"
        self.reach = 0 if never_masked else max(kind.blocks_until_full for layer in kinds for kind in layer)
        self.shape = Shape(config.block_width, self.reach, config.num_xl_blocks)
        self.groups = config.layer_groups()
        self.cells = sorted(config.recurrent_layers)  # layers with a state, from 1
        if config.init == "lecun":
            self.apply(init_lecun)
        if config.matching_init:
            for layer in (self.layer(number) for number in range(1, config.depth + 1)):
                if layer.cell is not None or layer.routed is not None:
                    layer.match()

    def layer(self, number: int) -> TransformerBlock:
        """The layer of that number, from 1."""
        return cast(TransformerBlock, self.layers[number - 1])

    def cell(self, number: int) -> RecurrentCell | TokenGatedCell:
        """The recurrent cell of the layer of that number."""
        return cast("RecurrentCell | TokenGatedCell", self.layer(number).cell)

    @property
    def auxiliary_losses(self) -> tuple[str, ...]:
        """Names of the auxiliary losses that this model has."""
        numbers = range(1, self.config.depth + 1)
        return tuple(sorted({name for number in numbers for name in self.layer(number).auxiliary_losses}))

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
    @typechecked
    def from_llama(
        cls, path_or_model: str | Path | nn.Module, *, block_width: int, num_xl_blocks: int, sink_tokens: int = 4,
        recurrent_layers: Sequence[int] = (), routed_layers: Sequence[int] = (),
        routed: Mapping[str, Any] = MappingProxyType({}), dtype: torch.dtype | None = None, **options: Any,
    ) -> BlockRecurrentTransformer:  # fmt: skip
        """A pretrained Llama, Mistral, Qwen2, Qwen3, SmolLM2, SmolLM3 or Phi-3 that reads a stream of any length.

        Logits are the pretrained model's while no token has left the window of num_xl_blocks + 1 blocks, whatever is
        added here: new parts begin so that nothing changes. In eval mode.

        Args:
            path_or_model: a folder as transformers writes it (config.json and safetensors), or its model in memory.
            block_width, num_xl_blocks: a token sees the tokens before it in its block, and so many blocks before.
            sink_tokens: first tokens of the stream that stay (`SinkMemory`); 0 for none.
            recurrent_layers: layers that get a state.
            routed_layers: layers whose tokens also choose from what left the window, which needs no training.
            routed: options of that memory (`RoutedMemory`) other than `llama.ROUTED`.
            dtype: of the weights; default that of the source.
            options: further fields of `Config` that do not follow from the pretrained model.

        Raises:
            ValueError: what cannot be carried, by its name: other families, partial rotary positions, unknown scalings
                of them, sliding windows narrower than this one, biases elsewhere than in q, k and v, other weights.
        """
        from .llama import from_llama

        return from_llama(
            cls, path_or_model, block_width=block_width, num_xl_blocks=num_xl_blocks, sink_tokens=sink_tokens,
            recurrent_layers=recurrent_layers, routed_layers=routed_layers, routed=routed, dtype=dtype, **options,
        )  # fmt: skip

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """What a pretrained model did not have, by name, for an optimizer: `llama.new_parameters`."""
        from .llama import new_parameters

        return new_parameters(self)

    @classmethod
    def from_weights(
        cls, config: Config, weights: dict[str, Tensor], argument: str = "weights",
        sources: Mapping[str, str] = MappingProxyType({}), *, take: bool = False,
    ) -> BlockRecurrentTransformer:  # fmt: skip
        """A model in eval mode with these weights, on their device and of their type.

        Args:
            weights: by the names of the state dict.
            argument, sources: what errors call the weights, and the entries from which they were made.
            take: the weights become the parameters themselves, instead of being copied.

        Raises:
            ValueError: names or shapes that are not this model's.
        """
        if "token_emb.weight" not in weights:
            raise ValueError(f"{argument} has no token_emb.weight, but {sorted(weights)}")
        with torch.device("meta"):
            model = cls(config)
        for name, wanted in model.state_dict().items():
            if name in weights and weights[name].shape != wanted.shape:
                raise ValueError(
                    f"{argument}: {sources.get(name, name)} gives {name} the shape {tuple(weights[name].shape)}, "
                    f"a model of dim={config.dim} needs {tuple(wanted.shape)}"
                )
        like = weights["token_emb.weight"]
        own = weights if take else {name: tensor.to(like, copy=True) for name, tensor in weights.items()}
        try:
            model.load_state_dict(own, assign=True)
        except RuntimeError as error:  # torch's word for entries that are missing or left over
            raise ValueError(f"{argument}: {error}") from error
        return model.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> BlockRecurrentTransformer:
        """A model in eval mode from the folder of a run of train.py, or one that `save_pretrained` wrote.

        See `pretrained.from_pretrained` for the options (checkpoint, device, dtype).
        """
        from .pretrained import from_pretrained

        return from_pretrained(path, **options)

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """Writes config.json, model.safetensors and perhaps a tokenizer to a folder: `pretrained.save_pretrained`."""
        from .pretrained import save_pretrained

        save_pretrained(self, path, **options)

    # -- carried values

    def init_memories(self, batch: int) -> Memories:
        """Empty memories for a batch of that many rows: nothing has been read."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        like, numbers = self.token_emb.weight, range(1, self.config.depth + 1)
        return Memories(tuple(self.layer(number).empty_memory(batch, like) for number in numbers), Position(0, 0))

    def init_states(self, batch: int) -> States:
        """The learned initial states for a batch of that many rows."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        return States(tuple(self.cell(number).initial_state().repeat(batch, 1, 1) for number in self.cells))

    # -- the way through: ids -> embed -> encode -> logits

    def embed(self, x: Tensor, *, use_dropout: bool | None = None) -> Tensor:
        """Token ids (b, n) -> (b, n, d)."""
        return self.mode(use_dropout).dropout(self.token_emb(x), self.config.emb_dropout)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., v)."""
        hidden = hidden if self.logit_scale == 1 else hidden * self.logit_scale
        out: Tensor = F.linear(hidden, self.token_emb.weight) if self.to_logits is None else self.to_logits(hidden)
        return out

    def forward(
        self,
        x: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        xl_memories: Memories | list[Any] | None = None,
        states: States | list[Any] | None = None,
        reset: Tensor | None = None,
        reset_states: Tensor | None = None,
        lengths: Tensor | None = None,
        return_loss: bool = False,
        reduction: Reduction = "mean",
        loss_weights: Tensor | None = None,
        return_hidden: bool = False,
        logits_to_keep: int | None = None,
        auxiliary: Mapping[str, float] | None = None,
        overwrite: bool = False,
        use_dropout: bool | None = None,
    ) -> tuple[Tensor, Memories, States]:
        """Reads tokens where the memories left off.

        Args:
            x: token ids (b, n), n >= 1. With `return_loss` n + 1 of them, of which the last is only a target;
                `ignore_index` among them is no target, and read as token 0 if it is not in the vocabulary.
            inputs_embeds: (b, n, d) instead of ids: soft prompts, other encoders. Dropout of embeddings is the
                caller's.
            xl_memories: what an earlier call returned; None or [] for a fresh start.
            states: likewise. Each may be given without the other.
            reset: (b,) bool, rows in which a new document begins with this call.
            reset_states: (b,) bool, rows whose states alone return to their initial values.
            lengths: (b,) int, how many of the n tokens of each row are there (padding on the right); the output
                behind them is zero.
            return_loss: the cross-entropy in nats of the targets instead of logits.
            reduction: of the losses: "mean" over all targets, "sum", or "none" for (b, n).
            loss_weights: (b, n), weights of the losses; the mean is then the weighted one.
            return_hidden: the normalised hidden states (b, n, d) instead of logits; those of every layer: `encode`.
            logits_to_keep: only the logits of the last tokens of each row, so many.
            auxiliary: with `return_loss`, weights of auxiliary losses by name (`auxiliary_losses` lists those of this
                model). What is returned is the cross-entropy as ever; its gradient is that of the weighted sum.
            overwrite: `xl_memories` are given away: a single token, and what enters a routed store, is written into
                them instead of into a copy; they must not be used again. Without gradients.
            use_dropout: default as `model.train()` and `model.eval()` say.

        Returns:
            Logits (b, n, v), memories and states after the last token. They hold the graph: `detach` them between the
            segments of truncated back-propagation.

        Raises:
            ValueError: token ids out of range, empty input, values carried over from another model, batch, device or
                type, or arguments that cannot be combined.
        """
        if (x is None) == (inputs_embeds is None):
            raise ValueError("give either x, token ids, or inputs_embeds")
        if not return_loss and (reduction != "mean" or loss_weights is not None):
            raise ValueError(f"reduction={reduction!r} and loss_weights need return_loss=True")
        if auxiliary and (not return_loss or reduction != "mean"):
            raise ValueError(f"auxiliary={dict(auxiliary)} needs return_loss=True and reduction='mean'")
        targets = None
        if return_loss:
            x, targets = self.shifted(x, logits_to_keep, return_hidden)
        elif x is not None:
            x = check_ids(x, "x", self.token_emb.weight.device, self.config.num_tokens)
        if x is not None:
            inputs_embeds = self.embed(x, use_dropout=use_dropout)
        assert inputs_embeds is not None
        if logits_to_keep is not None:
            check_count("logits_to_keep", logits_to_keep, inputs_embeds.shape[1])
        hidden, memories, carried, _, losses = self.encode(
            inputs_embeds, xl_memories=xl_memories, states=states, reset=reset, reset_states=reset_states,
            lengths=lengths, overwrite=overwrite, use_dropout=use_dropout, auxiliary=tuple(auxiliary or ()),
        )  # fmt: skip
        if targets is not None:
            loss = self.loss(hidden, targets, lengths, reduction, loss_weights)
            for name, weight in (auxiliary or {}).items():
                loss = loss + weight * (losses[name] - losses[name].detach())
            return loss, memories, carried
        if logits_to_keep is not None:
            hidden = last_tokens(hidden, lengths, logits_to_keep)
        return hidden if return_hidden else self.logits(hidden), memories, carried

    def encode(
        self,
        embedded: Tensor,
        *,
        xl_memories: Memories | list[Any] | None = None,
        states: States | list[Any] | None = None,
        reset: Tensor | None = None,
        reset_states: Tensor | None = None,
        lengths: Tensor | None = None,
        overwrite: bool = False,
        use_dropout: bool | None = None,
        return_layers: bool = False,
        auxiliary: tuple[str, ...] = (),
    ) -> Encoded:
        """Embedded tokens (b, n, d) -> hidden states: all layers, and nothing of ids or logits.

        Arguments as in `forward`; with `return_layers` the output of every layer, too, and the named auxiliary losses.
        """
        if unknown := sorted(set(auxiliary) - set(self.auxiliary_losses)):
            raise ValueError(f"auxiliary={unknown}: this model has the auxiliary losses {list(self.auxiliary_losses)}")
        if overwrite and torch.is_grad_enabled():
            raise ValueError("overwrite=True cannot be combined with gradients: call the model under torch.no_grad()")
        self.check(embedded, xl_memories, states, {"reset": reset, "reset_states": reset_states}, lengths)
        batch, n, _ = embedded.shape
        before = self.start(batch, xl_memories, states, reset, reset_states)
        memories, carried = without_idle_rows(*before, lengths) if torch.is_grad_enabled() else before
        plan = make_plan(self.shape, n, memories.position, lengths, batch)
        carry = Carry(
            list(memories.layers), dict(zip(self.cells, carried.layers)), dict(zip(self.cells, carried.kv or ()))
        )
        mode, outputs = self.mode(use_dropout)._replace(auxiliary=auxiliary), []
        for span in plan.spans:
            span = span._replace(in_place=overwrite)
            outputs.append(self.run_span(take(embedded, span), carry, span, mode, return_layers))
        layers = [in_order(list(parts), plan.spans, n) for parts in zip(*outputs)] or [torch.zeros_like(embedded)]
        hidden = mode.dropout(self.norm(layers[-1]), self.config.output_dropout)
        kv = tuple(carry.kv[cell] for cell in self.cells) if len(carry.kv) == len(self.cells) else None
        memories = Memories(tuple(carry.layers), plan.after)
        carried = States(tuple(carry.states[cell] for cell in self.cells), kv)
        if torch.is_grad_enabled():
            memories, carried = with_idle_rows(*without_derived(memories, carried), *before, lengths)
        losses = {name: total / count.clamp(min=1) for name, (total, count) in carry.losses.items()}
        return Encoded(hidden, memories, carried, tuple(layers) if return_layers else None, losses)

    # -- spans, groups of layers, layers

    def run_span(self, x: Tensor, carry: Carry, span: Span, mode: Mode, keep_all: bool) -> list[Tensor]:
        """A span (b, t n, d) through all layers: what came out of the last, or with `keep_all` what went in and came
        out of each. `carry` moves on to the end of the span."""
        seen: dict[int, KV] = {}  # keys and values of states as of the start of each block of the span
        visibilities, outputs = self.visibilities(span, x.device), [x]
        for group in self.groups:
            found = self.run_group(group, outputs[-1], carry, seen, span, visibilities, mode, keep_all)
            outputs = [*outputs, *found] if keep_all else found
        return outputs

    def run_group(
        self, group: tuple[int, ...], x: Tensor, carry: Carry, seen: dict[int, KV], span: Span,
        visibilities: list[Visibility], mode: Mode, keep_all: bool,
    ) -> list[Tensor]:  # fmt: skip
        """A span through layers that must be scanned together; a layer by itself takes all its blocks at once.

        `seen` receives the keys and values of the group's own states, for the layers above.
        """
        steps = span.one_by_one() if len(group) > 1 else [span]
        cells = [index + 1 for index in group if index + 1 in carry.states]
        outputs: list[list[Tensor]] = []
        kvs: list[list[KV]] = []
        pieces = torch.split(x, steps[0].num_tokens, dim=1) if len(steps) > 1 else (x,)  # n may be symbolic
        for step, part in zip(steps, pieces):
            for cell in cells:
                if cell not in carry.kv:
                    carry.kv[cell] = self.cell(cell).project(carry.states[cell])
            now = seen | {cell: KV(*(kv[:, None] for kv in carry.kv[cell])) for cell in cells}
            found: list[Tensor] = []
            for index in group:
                part = self.run_layer(index, part, carry, now, step, visibilities[index], mode)
                found = [*found, part] if keep_all else [part]
            outputs.append(found)
            kvs.append([now[cell] for cell in cells])
            self.finish_block(cells, carry, step.completes)
        for cell, parts in zip(cells, zip(*kvs)):
            seen[cell] = KV(*(torch.cat(kv, dim=1) for kv in zip(*parts))) if len(parts) > 1 else parts[0]
        return [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*outputs)]

    def run_layer(
        self, index: int, x: Tensor, carry: Carry, now: dict[int, KV], span: Span, visibility: Visibility, mode: Mode
    ) -> Tensor:
        """A span through one layer, which reads the states `now` and leaves its own in `carry` and `now`."""
        layer, number = self.layer(index + 1), index + 1
        arguments: dict[str, Any] = {
            "memory": carry.layers[index], "state": carry.states.get(number), "state_kv": carry.kv.get(number),
            "reads": [now[cell] for cell in layer.other_reads], "span": span, "visibility": visibility, "mode": mode,
        }  # fmt: skip
        out: LayerOutput
        out = checkpoint(layer, x, use_reentrant=False, **arguments) if mode.checkpoint else layer(x, **arguments)
        carry.layers[index] = out.memory
        for name, loss in out.losses.items():
            carry.losses[name] = carry.losses[name] + loss if name in carry.losses else loss
        if out.state is not None and out.state_kv is not None:
            carry.states[number], now[number] = out.state, out.state_kv
        return out.x

    def finish_block(self, cells: list[int], carry: Carry, complete: bool | Tensor) -> None:
        """Where a block is complete, the next one has to project the new states."""
        if complete is False:
            return
        for cell in cells:
            kv = carry.kv.pop(cell)
            if isinstance(complete, Tensor):
                carry.kv[cell] = choose_rows(complete, self.cell(cell).project(carry.states[cell]), kv)
        if self.config.enhanced_recurrence:
            carry.layers[:] = hand_down(carry.layers, complete, self.config.block_width)

    def visibilities(self, span: Span, device: torch.device) -> list[Visibility]:
        """Which keys the tokens see in each layer; layers with memories of the same sizes share one."""
        known: dict[tuple[Any, ...], Visibility] = {}
        found: list[Visibility] = []
        dtype = matmul_dtype(self.token_emb.weight)
        for number in range(1, self.config.depth + 1):
            kinds = self.layer(number).kinds
            rotary = None if number in self.config.unrotated_layers else self.rotary
            sizes = (rotary is None, *((kind.width, kind.per_block, kind.delay) for kind in kinds))
            if sizes not in known:
                known[sizes] = make_visibility(self.config, span, kinds, rotary, device, dtype)
            found.append(known[sizes])
        return found

    # -- before and after

    def mode(self, use_dropout: bool | None = None) -> Mode:
        """How a call that enters now is computed."""
        has_gradients, plain = torch.is_grad_enabled(), not is_functional()
        is_eager = plain and not torch.compiler.is_compiling()  # a compiler chooses itself what to keep
        return Mode(
            use_dropout=self.training if use_dropout is None else use_dropout, recompute=has_gradients and is_eager,
            checkpoint=self.config.use_checkpointing and has_gradients and plain,
            in_parts=is_eager and self.token_emb.weight.device.type == "cpu",
        )  # fmt: skip

    def start(
        self, batch: int, memories: Memories | list[Any] | None, states: States | list[Any] | None,
        reset: Tensor | None, reset_states: Tensor | None,
    ) -> tuple[Memories, States]:  # fmt: skip
        """What a call begins with: carried or fresh values, in which rows of `reset` have read nothing, and rows of
        `reset_states` have their initial states."""
        begun = memories if isinstance(memories, Memories) else self.init_memories(batch)
        carried = states if isinstance(states, States) else self.init_states(batch)
        if torch.is_grad_enabled():
            begun, carried = without_derived(begun, carried)
            if not torch.compiler.is_compiling():
                begun, carried = trainable(begun), trainable(carried)
        if reset is not None:
            begun = reset_offsets(forget_rows(begun, reset), reset)
        for rows in (reset, reset_states):
            if rows is not None:
                pairs = zip(self.cells, carried.layers)
                carried = States(tuple(
                    torch.where(per_row(rows, old), self.cell(cell).initial_state(), old) for cell, old in pairs
                ))  # fmt: skip
        return begun, carried

    def shifted(self, x: Any, logits_to_keep: int | None, return_hidden: bool) -> tuple[Tensor, Tensor]:
        """Tokens (b, n + 1) -> inputs and targets (b, n)."""
        if logits_to_keep is not None or return_hidden:
            raise ValueError("return_loss=True cannot be combined with logits_to_keep and return_hidden")
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] < 2:
            raise ValueError(f"x must be token ids (b, n + 1) with n >= 1 when return_loss=True, not {describe(x)}")
        ignore, num_tokens = self.config.ignore_index, self.config.num_tokens
        x = check_ids(x, "x", self.token_emb.weight.device, num_tokens, ignore)
        inputs, targets = x[:, :-1], x[:, 1:].long()
        if not 0 <= ignore < num_tokens:
            inputs = inputs.masked_fill(inputs == ignore, 0)
        return inputs, targets

    def loss(
        self, hidden: Tensor, targets: Tensor, lengths: Tensor | None, reduction: Reduction, weights: Tensor | None
    ) -> Tensor:
        """The cross-entropy of targets (b, n) in nats; those behind `lengths` do not count."""
        if lengths is not None:
            behind = torch.arange(targets.shape[1], device=targets.device) >= lengths[:, None]
            targets = targets.masked_fill(behind, self.config.ignore_index)
        used = (self.token_emb.weight,) if self.to_logits is None else tuple(self.to_logits.parameters())
        return cross_entropy(
            self.logits, hidden, targets, reduction=reduction, weights=weights, parameters=used,
            ignore_index=self.config.ignore_index, num_tokens=self.config.num_tokens,
        )  # fmt: skip

    def check(
        self, embedded: Tensor, memories: Any, states: Any, resets: dict[str, Tensor | None], lengths: Tensor | None
    ) -> None:
        """Raises a ValueError that names the argument and the numbers."""
        config, weight = self.config, self.token_emb.weight
        check_embedded(embedded, config.dim)
        batch, n, _ = embedded.shape
        if embedded.device != weight.device:
            raise ValueError(f"inputs_embeds is on {embedded.device}, the model is on {weight.device}")
        if not torch.compiler.is_compiling():
            self.check_devices()
        check_type("xl_memories", memories, Memories)
        check_type("states", states, States)
        if memories:
            self.check_memories(memories, batch)
        if states:
            self.check_states(states, batch)
        for name, rows in resets.items():
            check_rows(name, rows, batch, embedded.device, (torch.bool,))
        check_lengths(lengths, batch, n, embedded.device)

    def check_devices(self) -> None:
        """Raises a ValueError if layers are on another device than the embeddings, as those of `device_map` may be."""
        own = self.token_emb.weight.device
        for part in (self.layers[0], self.layers[-1]):
            device = next((parameter.device for parameter in part.parameters()), own)
            if device != own:
                raise ValueError(
                    f"the embeddings are on {own}, a layer is on {device}: memories travel through all layers, so the "
                    "whole model must be on one device, without offloading"
                )

    def check_memories(self, memories: Memories, batch: int) -> None:
        """Raises a ValueError if these are not memories of this model, for so many rows."""
        if len(memories.layers) != self.config.depth:
            depth = self.config.depth
            raise ValueError(f"xl_memories holds {len(memories.layers)} layers, the model has depth={depth}")
        for number, memory in enumerate(memories.layers, start=1):
            self.layer(number).check_memory(f"xl_memories, layer {number}", memory, batch, self.token_emb.weight)
        check_position(memories.position, batch, self.config.block_width, self.reach)

    def check_states(self, states: States, batch: int) -> None:
        """Raises a ValueError if these are not states of this model, for so many rows."""
        config, own = self.config, self.token_emb.weight
        dtype = torch.promote_types(own.dtype, torch.float32)
        for name, values in (("states", states.layers), ("keys and values", states.kv)):
            if values is not None and len(values) != len(self.cells):
                raise ValueError(f"states holds {len(values)} {name}, the model has recurrent_layers={self.cells}")
        for cell, state in zip(self.cells, states.layers):
            shape = (batch, config.num_state_vectors, config.dim)
            check_tensor(f"states of layer {cell}", state, shape, dtype, own.device)
        for cell, kv in zip(self.cells, states.kv or ()):
            for one in kv:  # their type is that of the autocast in force then
                size = (batch, config.kv_heads, config.num_state_vectors, config.dim_head)
                check_tensor(f"states, keys and values of layer {cell}", one, size, one.dtype, own.device)

    # -- generation

    def generate(self, prime: Tensor | list[Tensor], length: int | None = None, **options: Any) -> Any:
        """Continues prompts, at the same cost per token however much was read before: see `generation.generate`."""
        return generation.generate(self, prime, length, **options)

    def stream(self, prime: Tensor | list[Tensor], length: int | None = None, **options: Any) -> Any:
        """The same, yielding the tokens (b,) as they come: see `generation.stream`."""
        return generation.stream(self, prime, length, **options)


def last_tokens(hidden: Tensor, lengths: Tensor | None, count: int) -> Tensor:
    """(b, n, d) -> (b, count, d): the last tokens that each row has; zero where a row has fewer."""
    if lengths is None:
        return hidden[:, -count:]
    index = lengths[:, None] - count + torch.arange(count, device=hidden.device)
    last = hidden.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[2]))
    return last.masked_fill((index < 0)[..., None], 0)


def without_idle_rows(memories: Memories, states: States, lengths: Tensor | None) -> tuple[Memories, States]:
    """Zeros in the rows that bring no token: what they hold must not reach a gradient, not even times zero."""
    if lengths is None:
        return memories, states
    idle = lengths == 0

    def blank(x: Tensor) -> Tensor:
        return x.masked_fill(per_row(idle, x), 0)

    position = memories.position
    return map_tensors(memories, blank)._replace(position=position), map_tensors(states, blank)


def with_idle_rows(
    memories: Memories, states: States, memories_before: Memories, states_before: States, lengths: Tensor | None
) -> tuple[Memories, States]:
    """The rows that bring no token as they were."""
    if lengths is None:
        return memories, states
    layers = choose_rows(lengths == 0, memories_before.layers, memories.layers)
    return memories._replace(layers=layers), choose_rows(lengths == 0, states_before, states)


# ---------------------------------------------------------------------------------------- 9 training and generating on


class RecurrentTrainWrapper(nn.Module):
    """Trains and samples a model over sequences of any length, a segment at a time.

    Args:
        transformer: a BlockRecurrentTransformer, or one compiled, or wrapped for several processes.
        xl_memories_dropout: the chance that a row forgets its complete blocks at a segment's start, in training.
        state_dropout: the chance that a row's states return to their initial values there.
        seq_len: tokens of a segment; default the model's max_seq_len.
        detach_segments: True cuts the gradients between segments, so that `segments` needs the memory of one;
            False lets them through all.
        auxiliary_losses: weights by name, in training; see `BlockRecurrentTransformer.forward`.
        generator: source of the randomness of the two dropouts, on the CPU; default torch's own.

    Raises:
        ValueError: a number out of range.
    """

    @typechecked
    def __init__(
        self, transformer: nn.Module, xl_memories_dropout: float = 0.0, state_dropout: float = 0.0, *,
        seq_len: int | None = None, detach_segments: bool = True, generator: torch.Generator | None = None,
        auxiliary_losses: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.transformer = transformer
        if not isinstance(self.model, BlockRecurrentTransformer):
            raise ValueError(f"transformer must be a BlockRecurrentTransformer, not {type(self.model).__name__}")
        self.config = config = self.model.config
        for name, rate in (("xl_memories_dropout", xl_memories_dropout), ("state_dropout", state_dropout)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {rate}")
        self.seq_len = config.max_seq_len if seq_len is None else seq_len
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, not {self.seq_len}")
        self.xl_memories_dropout, self.state_dropout = xl_memories_dropout, state_dropout
        self.detach_segments, self.generator = detach_segments, generator
        self.auxiliary_losses = auxiliary_losses or {}
        if unknown := sorted(self.auxiliary_losses.keys() - set(self.model.auxiliary_losses)):
            raise ValueError(f"auxiliary_losses={unknown}: the model has {list(self.model.auxiliary_losses)}")
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
        return cast(BlockRecurrentTransformer, model)

    def untrained(self) -> str:
        """The parts of the model that a segment by itself gives no gradient, in words."""
        config, blocks = self.config, self.seq_len / self.config.block_width
        parts = []
        if self.detach_segments and config.recurrent_layers and blocks <= 1:
            parts.append("the state updates (what is written is read in the next block)")
        taught = "reconstruction" in self.auxiliary_losses  # in the block before one leaves, and not after it
        untaught = config.num_xl_blocks + (not taught)
        learn = config.use_compressed_mem and config.compressed_mem_pooling == "conv"
        if self.detach_segments and learn and blocks <= untaught:
            parts.append("the compressors in a first segment (" + (
                "nothing is about to leave the XL memory)" if taught else
                "what leaves the XL memory is read a block later; the auxiliary loss 'reconstruction' teaches them)"
            ))  # fmt: skip
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
            random = torch.rand(len(x), generator=self.generator, dtype=torch.float32, device="cpu")
            return (random < rate).to(x.device)

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
            part, xl_memories=memories, states=states, reset=reset, reset_states=reset_states, return_loss=True,
            auxiliary=self.auxiliary_losses if self.training else None,
        )  # fmt: skip
        return loss, memories, states

    def forward(
        self, x: Tensor, *, xl_memories: Memories | None = None, states: States | None = None,
        reset: Tensor | None = None, return_memories_and_states: bool = False,
    ) -> Tensor | tuple[Tensor, Memories, States]:  # fmt: skip
        """The mean cross-entropy in nats over all targets of x, (b, n + 1) token ids; one graph for all segments."""
        losses: list[Tensor] = []
        memories, carried = yield_all(self.segments(x, xl_memories=xl_memories, states=states, reset=reset), losses)
        total = torch.stack(losses).sum()
        return (total, memories, carried) if return_memories_and_states else total

    def generate(self, prime: Tensor | list[Tensor], length: int | None = None, **options: Any) -> Any:
        """`BlockRecurrentTransformer.generate` of the model; `length` may be any number of segments."""
        return self.model.generate(prime, length, **options)

    def stream(self, prime: Tensor | list[Tensor], length: int | None = None, **options: Any) -> Any:
        """`BlockRecurrentTransformer.stream` of the model."""
        return self.model.stream(prime, length, **options)


def yield_all(steps: Generator[Tensor, None, tuple[Memories, States]], into: list[Tensor]) -> tuple[Memories, States]:
    """Runs a generator to its end: what it yields goes into a list, what it returns is returned."""
    while True:
        try:
            into.append(next(steps))
        except StopIteration as end:
            memories, states = end.value
            return memories, states


RecurrentTrainerWrapper = RecurrentTrainWrapper  # its name in 0.4.4
