"""Routed memory: a store of hundreds of thousands of tokens, of which every query reads the few chunks it chooses.

What leaves the XL memory goes into a ring of chunks of keys and values, each with a summary. Every query token scores
the summaries for itself (a choice per block of queries would let later tokens influence earlier ones), takes the best
chunks, and attends to their tokens beside its window, in one softmax:

    z = scores / temperature,   shares = operator(z),   chosen = the k largest shares
    logits = [ window ; q . keys of the chosen chunks + log share of the chunk ]

The log shares let a gradient reach the scores. Coordinate descent gives shares of 1 to everything where all chunks are
chosen, so that the memory is then exact attention over the whole past.

Papers
    Ainslie et al. 2023, CoLT5, arXiv 2303.09752 (routing by coordinate descent; Wright 2015, arXiv 1502.04759)
    Lu et al. 2025, MoBA, arXiv 2502.13189; Yuan et al. 2025, NSA, arXiv 2502.11089 (chunks chosen by their mean keys)
    Wu et al. 2022, Memorizing Transformers, arXiv 2203.08913 (each token looks up its own keys, without gradients)
    Mohtashami & Jaggi 2023, Landmark Attention, arXiv 2305.16300; Xiao et al. 2024, InfLLM, arXiv 2402.04617

Axis letters: b batch, t blocks, w tokens of a block (or n of one), h query heads, g key/value heads, p slots of the
ring, c tokens of a chunk, u summaries of a chunk, k chosen chunks, m chosen tokens, j keys of the window, e dim_head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .kernels import at_least_fp32, is_functional, without_autocast

Operator: TypeAlias = Literal["coordinate_descent", "softmax", "top_k"]
Pair: TypeAlias = tuple[Tensor, Tensor]  # keys and values
Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]

NOTHING = -1e30  # a score or logit of what is not there: exp of it is 0, and differences of it are numbers
BYTES_AT_ONCE = 100 * 2**20  # of what exists only while some queries choose and attend

# -------------------------------------------------------------------------------------------------- 1 scores to shares


def coordinate_descent(scores: Tensor, k: int, temperature: float = 1.0, *, log: bool = False) -> Tensor:
    """The largest soft choice of k: shares in [0, 1] that sum to k.

    The maximum of shares . scores + temperature * entropy(shares) under these constraints (CoLT5, 2303.09752) is
    share = min(1, exp((score + a) / temperature)), with one number a for all. CoLT5 iterates coordinate descent towards
    it, 50 times; here a is computed: if the m largest shares are 1, exp(a / temperature) is (k - m) over the sum of the
    other exp(score / temperature), and the first m is right at which no other share exceeds 1.

    Args:
        scores: (..., n); -inf for what must not be chosen.
        k: How many to choose.
        temperature: In units of the scores; towards 0 the k largest get 1, the others 0.
        log: Return the logarithms of the shares, -inf for what was -inf.

    Returns:
        (..., n) shares; all 1 where k or fewer can be chosen.

    Raises:
        ValueError: k below 1, or a temperature that is not above 0.
    """
    return shares_of(scores, k, "coordinate_descent", temperature, log)


def softmax(scores: Tensor, k: int, temperature: float = 1.0, *, log: bool = False) -> Tensor:
    """softmax(scores / temperature): the same arguments as `coordinate_descent`; shares sum to 1 whatever k is."""
    return shares_of(scores, k, "softmax", temperature, log)


def top_k(scores: Tensor, k: int, temperature: float = 1.0, *, log: bool = False) -> Tensor:
    """1 for the k largest scores and 0 for the others, without a gradient (MoBA); arguments as `coordinate_descent`."""
    return shares_of(scores, k, "top_k", temperature, log)


def shares_of(scores: Tensor, k: int, operator: Operator, temperature: float, log: bool) -> Tensor:
    shares = log_shares(scores, k, operator, temperature)
    return shares if log else shares.exp()


def log_shares(scores: Tensor, k: int, operator: Operator, temperature: float) -> Tensor:
    """Log shares (..., n) of all scores (..., n)."""
    z = scaled(scores, k, operator, temperature)
    if operator == "top_k":
        chosen = z.topk(min(k, z.shape[-1])).indices
        shares = torch.full_like(z, float("-inf")).scatter(-1, chosen, 0.0)
    elif operator == "coordinate_descent" and k >= z.shape[-1]:
        shares = torch.zeros_like(z)
    else:
        shares = (z + offset(z, *z.topk(min(k, z.shape[-1])), operator)).clamp(max=0)
    return shares.masked_fill(z <= NOTHING / 2, float("-inf"))


def best(scores: Tensor, k: int, operator: Operator, temperature: float) -> Pair:
    """The k largest of scores (..., n): their log shares, and their indices, each (..., k)."""
    z = scaled(scores, k, operator, temperature)
    values, indices = z.topk(k)
    if operator == "top_k" or (operator == "coordinate_descent" and k == z.shape[-1]):
        shares = torch.zeros_like(values)
    else:
        shares = (values + offset(z, values, indices, operator)).clamp(max=0)
    return shares.masked_fill(values <= NOTHING / 2, float("-inf")), indices


def scaled(scores: Tensor, k: int, operator: Operator, temperature: float) -> Tensor:
    """Scores in units of the temperature, with NOTHING for -inf."""
    if operator not in get_args(Operator):
        raise ValueError(f"operator={operator!r} is not among {', '.join(get_args(Operator))}")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; operator='top_k' is its limit")
    return (scores / temperature).masked_fill(scores == float("-inf"), NOTHING)


def offset(z: Tensor, values: Tensor, indices: Tensor, operator: Operator) -> Tensor:
    """What is added to z (..., n) so that min(1, exp) of it are the shares, (..., 1); its top k are given."""
    if operator == "softmax":
        return -log_sum(z, values[..., :1])
    k = values.shape[-1]
    rest = log_sum(z.scatter(-1, indices, NOTHING), values[..., -1:])
    left = torch.arange(k, 0, -1, device=z.device)  # k - m, for m = 0 ... k - 1 shares of 1
    with torch.no_grad():
        tails = torch.cat([values, rest], -1).flip(-1).logcumsumexp(-1).flip(-1)[..., :k]  # all but the m largest
        fits = values + left.to(z.dtype).log() - tails <= 0
        fits[..., -1] = True  # one share left, of exp(value) / (exp(value) + ...)
        full = fits.to(torch.int8).argmax(-1, keepdim=True)  # the first m that fits
        is_full = torch.arange(k, device=z.device) < full
    others = torch.cat([values.masked_fill(is_full, NOTHING), rest], -1).logsumexp(-1, keepdim=True)
    return left.to(z.dtype)[full].log() - others


def log_sum(z: Tensor, highest: Tensor) -> Tensor:
    """log sum exp of z (..., n), none of which is above `highest` (..., 1).

    What is e^-80 of that and less does not show in the sum; a processor takes a hundred times as long for an exp that
    underflows, and most chunks of a store may be hidden.
    """
    highest = highest.detach()
    return (z - highest).clamp(min=-80).exp().sum(-1, keepdim=True).log() + highest


# --------------------------------------------------------------------------------------------------------- 2 the store


class Store(NamedTuple):
    """A ring of chunks for each row of a batch; chunk number i of a row lies in slot i % p.

    Every tensor begins with the batch. A row that is forgotten keeps its chunks, and nothing looks at them.
    """

    k: Tensor  # (b, g, p, c, e), as queries meet them: normalised, and turned by their positions if any are
    v: Tensor  # (b, g, p, c, e)
    summaries: Tensor  # (b, g, p, u, e), at least fp32; u = 0 where the keys themselves are the summaries
    stored: Tensor  # (b,) int64: chunks that the row has ever stored
    newest: Tensor  # (b, g, 1, e), the key of the newest token, which shifted keys give to the next; else (b, g, 0, e)

    def forget(self, rows: Tensor) -> Store:
        """The store in which `rows`, (b,) bool, hold nothing."""
        newest = self.newest.masked_fill(rows[:, None, None, None], 0)
        return self._replace(stored=self.stored.masked_fill(rows, 0), newest=newest)

    def __repr__(self) -> str:
        b, g, p, c, e = self.k.shape
        return f"Store({b} rows, {g} heads, {p} slots of {c} tokens of {e}, {self.k.dtype})"


torch.serialization.add_safe_globals([Store])  # for torch.load(weights_only=True)


class Chosen(NamedTuple):
    """The chunks that each query chose."""

    k: Tensor  # (b, g, t, w, m, e) for m = k c tokens
    v: Tensor  # (b, g, t, w, m, e)
    log_shares: Tensor  # (b, g, t, w, k) of their chunks; -inf for what is not there
    slots: Tensor  # (b, g, t, w, k) int64


class Near(NamedTuple):
    """Queries and the window that they see."""

    q: Tensor  # (b, h, t, w, e)
    k: Tensor  # (b, g, t, j, e)
    v: Tensor  # (b, g, t, j, e)
    bias: Tensor | None = None  # added to the logits, broadcast to (b, h, t, w, j); -inf hides

    def logits(self, scale: float) -> Tensor:
        """(b, g, h / g, t, w, j), at least fp32."""
        (b, h, t, w, e), (_, g, _, j, _) = self.q.shape, self.k.shape
        q = self.q.view(b, g, h // g, t, w, e).transpose(2, 3).reshape(b, g, t, -1, e)
        logits = at_least_fp32(q @ self.k.transpose(-1, -2)) * scale  # (b, g, t, r w, j)
        logits = logits.view(b, g, t, h // g, w, j).transpose(2, 3)
        return logits if self.bias is None else logits + self.bias.expand(b, h, t, w, j).reshape(logits.shape)

    def mix(self, p: Tensor) -> Tensor:
        """Values with weights p (b, g, h / g, t, w, j), (b, g, h / g, t, w, e)."""
        b, g, r, t, w, _ = p.shape
        p = p.to(self.v.dtype).transpose(2, 3).reshape(b, g, t, r * w, -1)
        if torch.compiler.is_compiling():
            p = p.contiguous()  # the product would ask for strides that depend on a symbolic w
        return (p @ self.v).view(b, g, t, r, w, -1).transpose(2, 3)


class Reading(NamedTuple):
    """What `Router.read` gives."""

    out: Tensor  # (b, h, t, w, e)
    distillation: Tensor  # (b, g, t, w) the distillation loss of each query; zeros where it was not asked for
    chunks: Tensor  # (b, g, t, w, k) int64, numbers of the chosen chunks, -1 for none; k = 0 with `everything`
    seen: Tensor  # (b, t) int64, chunks that had been stored


class Router(nn.Module):
    """Stores what leaves the XL memory, chooses from it for every query, and attends to what is chosen.

    A score is scale * (mean of the queries of a key/value head's group) . summary, the largest where a chunk has
    several. Summaries are functions of the stored keys alone. The mean needs no training: on a pretrained model with
    rotary positions, operator "top_k" and several summaries a chunk are a good start. With `num_summaries=chunk_size`
    a chunk scores as its best token does, which is dearest and learns fastest; means and gates learn from
    `distillation_loss`.

    Positions: a token read from 262,144 tokens away must mean the same as in training, where nothing was that far, and
    the xPos decay leaves nothing of it. With "none" chosen tokens are met without a rotation, by unturned queries and
    keys: content alone, the same at every distance. With "rotary" keys and queries are turned by their true positions,
    without a decay, because a pretrained model expects that. (One fixed distance for all that is chosen, as in InfLLM,
    was worse than either.)

    Args:
        kv_heads, dim_head: g, e.
        block_width: Tokens of a block, w.
        capacity: Tokens that a query can choose from.
        chunk_size: Tokens of a chunk, c; divides block_width and capacity.
        num_chosen: Chunks that a query reads, k.
        max_blocks: Blocks that one `append` may bring; the ring has as many more slots.
        scale: Factor of logits and scores.
        operator, temperature: How scores become shares.
        summary: The mean of keys, or their mean weighted by softmax(w . key) with learned w ("gate").
        num_summaries: Summaries of a chunk, each of chunk_size / num_summaries keys; chunk_size: the keys themselves.
        num_skipped: Chunks at the beginning of a stream that are not chosen: other memories keep them.
        key_shift: The key of a token is that of the token before it: what follows a key is found by it.
        positions, frequencies: No positions; or rotary ones, with (e / 2,) radians a token, else 10000^(-2i/e).
        growth: Factor of turned queries and keys, which yarn has.
        dtype: Type of the stored keys and values; None: that of the model.

    Raises:
        ValueError: sizes that do not fit together; the message names them.
    """

    frequencies: Tensor

    def __init__(
        self,
        *,
        kv_heads: int,
        dim_head: int,
        block_width: int,
        capacity: int = 262_144,
        chunk_size: int = 16,
        num_chosen: int = 8,
        max_blocks: int = 1,
        scale: float = 1.0,
        operator: Operator = "coordinate_descent",
        temperature: float = 1.0,
        summary: Literal["mean", "gate"] = "mean",
        num_summaries: int = 1,
        num_skipped: int = 0,
        key_shift: bool = False,
        positions: Literal["none", "rotary"] = "none",
        frequencies: Tensor | None = None,
        growth: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.key_shift, self.growth, self.num_skipped = key_shift, growth, num_skipped
        self.kv_heads, self.dim_head, self.block_width = kv_heads, dim_head, block_width
        self.chunk_size, self.num_chosen, self.max_blocks = chunk_size, num_chosen, max_blocks
        self.num_summaries, self.positions, self.dtype = num_summaries, positions, dtype
        self.scale, self.operator, self.temperature = scale, operator, temperature
        self.check_sizes(capacity, summary, frequencies)
        self.num_visible = capacity // chunk_size  # chunks
        self.chunks_per_block = block_width // chunk_size
        self.num_slots = self.num_visible + max_blocks * self.chunks_per_block
        self.gate = nn.Parameter(torch.zeros(kv_heads, dim_head)) if summary == "gate" else None
        if positions == "rotary":
            if frequencies is None:
                frequencies = 10_000.0 ** (-torch.arange(0, dim_head, 2, dtype=torch.float64) / dim_head)
            self.register_buffer("frequencies", frequencies, persistent=False)

    def check_sizes(self, capacity: int, summary: str, frequencies: Tensor | None) -> None:
        chunk = self.chunk_size
        for name in ("kv_heads", "dim_head", "block_width", "chunk_size", "num_chosen", "max_blocks", "num_summaries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, size in (("block_width", self.block_width), ("capacity", capacity)):
            if size < chunk or size % chunk:
                raise ValueError(f"{name}={size} is not a multiple of chunk_size={chunk}")
        if self.num_chosen > capacity // chunk:
            raise ValueError(
                f"num_chosen={self.num_chosen} is above the {capacity // chunk} chunks of capacity={capacity} tokens"
            )
        if chunk % self.num_summaries:
            raise ValueError(f"chunk_size={chunk} is not a multiple of num_summaries={self.num_summaries}")
        if summary not in ("mean", "gate") or (summary == "gate" and self.num_summaries == chunk):
            size = chunk // self.num_summaries
            raise ValueError(f"summary={summary!r} of {size} keys must be 'mean', or 'gate' of 2 keys and more")
        if self.positions not in ("none", "rotary"):
            raise ValueError(f"positions={self.positions!r} is not among none, rotary")
        if self.positions == "rotary" and self.dim_head % 2:
            raise ValueError(f"positions='rotary' turns pairs, dim_head={self.dim_head} is odd")
        if frequencies is not None and (self.positions == "none" or frequencies.shape != (self.dim_head // 2,)):
            raise ValueError(
                f"frequencies {tuple(frequencies.shape)} must be ({self.dim_head // 2},), with positions='rotary', "
                f"not {self.positions!r}"
            )
        scaled(torch.zeros(1), self.num_chosen, self.operator, self.temperature)

    def forward(
        self,
        value: Store,
        q: Tensor,
        window: Pair,
        bias: Tensor | None = None,
        *,
        blocks: Pair | None = None,
        rows: Tensor | None = None,
        in_place: bool = False,
        detach: bool = False,
        far_q: Tensor | None = None,
        router_q: Tensor | None = None,
        **options: Any,
    ) -> tuple[Reading, Store]:
        """`append`, then `read`: a span of any number of blocks, `max_blocks` at a time.

        Args:
            blocks: What these t blocks push out of the XL memory, KV (b, g, t w, e); None: nothing.
            rows, in_place, detach: of `append`.
            q, window, bias, far_q, router_q, **options: of `read`.

        Returns:
            What the tokens read, and the next memory.
        """
        readings = []
        for some in slices(q.shape[2], self.max_blocks if blocks is not None else q.shape[2]):
            seen = value.stored[:, None].expand(-1, some.stop - some.start)
            if blocks is not None:
                k, v = (x[:, :, some.start * self.block_width : some.stop * self.block_width] for x in blocks)
                is_own = in_place or (some.start > 0 and not torch.is_grad_enabled())
                seen, value = self.append(value, (k, v), rows=rows, in_place=is_own, detach=detach)
            near = (window[0][:, :, some], window[1][:, :, some])
            far, router = (None if x is None else x[:, :, some] for x in (far_q, router_q))
            hides = bias[..., some, :, :] if bias is not None and bias.shape[-3] > 1 else bias
            readings.append(
                self.read(value, seen, q[:, :, some], near, hides, far_q=far, router_q=router, **options)
            )
        out, losses, chunks = (torch.cat([reading[i] for reading in readings], 2) for i in range(3))
        return Reading(out, losses, chunks, torch.cat([reading.seen for reading in readings], 1)), value

    # ------------------------------------------------------------------------------------------------------- the store

    def empty(self, batch: int, like: Tensor) -> Store:
        """The memory before anything was stored, on the device of `like`, and of its type if the kind has none."""
        dtype = self.dtype or like.dtype
        shape = (batch, self.kv_heads, self.num_slots, self.chunk_size, self.dim_head)
        wide = torch.promote_types(dtype, torch.float32)
        num_summaries = 0 if self.num_summaries == self.chunk_size and wide == dtype else self.num_summaries
        return Store(
            like.new_zeros(shape, dtype=dtype),
            like.new_zeros(shape, dtype=dtype),
            like.new_zeros((*shape[:3], num_summaries, self.dim_head), dtype=wide),
            torch.zeros(batch, dtype=torch.int64, device=like.device),
            like.new_zeros((batch, self.kv_heads, int(self.key_shift), self.dim_head), dtype=dtype),
        )

    def append(
        self,
        value: Store,
        blocks: Pair,
        *,
        rows: Tensor | None = None,
        in_place: bool = False,
        detach: bool = False,
    ) -> tuple[Tensor, Store]:
        """Stores t whole blocks that left the XL memory, the oldest first.

        Args:
            blocks: KV, keys and values (b, g, t w, e), keys as the queries will meet them but not yet turned.
            rows: (b,) bool, the rows in which they did leave; the others keep what they have. None: all.
            in_place: `value` is given away, and written into; otherwise its tensors are copied, once a call.
            detach: No gradient goes to these keys and values from later readings.

        Returns:
            `seen` (b, t): for each of these blocks the chunks that were stored when its predecessors had been and it
            had not, which is what `read` wants for the block that was computed at that time. And the next memory, which
            still holds all that any of them saw.

        Raises:
            ValueError: blocks of another shape, more than `max_blocks`, or in place while gradients are recorded.
        """
        keys, values = (x.detach() for x in blocks) if detach else blocks
        t = self.count_blocks(value, keys, values)
        if in_place and torch.is_grad_enabled() and (keys.requires_grad or value.k.requires_grad):
            raise ValueError("in_place=True writes into what the backward pass needs: detach=True, or torch.no_grad()")
        # slots that nobody sees yet: what is written there for other rows than `rows` is not counted, and so not seen
        step = self.chunks_per_block
        new = torch.arange(t * step, device=keys.device) + value.stored[:, None]  # (b, n) numbers of the new chunks
        keys, newest = self.shifted(value, keys, rows)
        k = self.turned(keys, self.token_positions(new))
        k, v = (x.view(*x.shape[:2], -1, self.chunk_size, x.shape[3]).to(value.k.dtype) for x in (k, values))
        summaries = self.summarise(k)[:, :, :, : value.summaries.shape[3]]
        store = [write(old, x, new % self.num_slots, in_place) for old, x in zip(value, (k, v, summaries))]
        counts = torch.arange(t + 1, device=keys.device) * step
        counts = counts * (1 if rows is None else rows[:, None]) + value.stored[:, None]  # (b, t + 1)
        return counts[:, :t], Store(store[0], store[1], store[2], counts[:, t], newest)

    def count_blocks(self, value: Store, keys: Tensor, values: Tensor) -> int:
        b, g, _, _, e = value.k.shape
        t, odd = divmod(keys.shape[2], self.block_width) if keys.ndim == 4 else (0, 1)
        if odd or not 1 <= t <= self.max_blocks or keys.shape != values.shape or keys.shape != (b, g, keys.shape[2], e):
            raise ValueError(
                f"blocks must be keys and values ({b}, {g}, t * {self.block_width}, {e}) for t = 1 ... max_blocks="
                f"{self.max_blocks} blocks, not {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        return t

    def shifted(self, value: Store, keys: Tensor, rows: Tensor | None) -> Pair:
        """Keys (b, g, n, e) in the places of the tokens that they are stored with, and the newest, for the next."""
        if not self.key_shift:
            return keys, value.newest
        stream = torch.cat([value.newest.to(keys.dtype), keys], 2)
        newest = stream[:, :, -1:].to(value.newest.dtype)
        if rows is not None:
            newest = torch.where(rows[:, None, None, None], newest, value.newest)
        return stream[:, :, :-1], newest

    def summarise(self, k: Tensor) -> Tensor:
        """Chunks of keys (b, g, p, c, e) -> their summaries (b, g, p, u, e), at least fp32."""
        parts = at_least_fp32(k).reshape(*k.shape[:3], self.num_summaries, -1, k.shape[4])  # (b, g, p, u, c / u, e)
        weights: Tensor | float = 1 / parts.shape[4]
        if self.gate is not None:
            gate = self.gate.to(parts.dtype)[:, None, None, None, :]  # (g, 1, 1, 1, e)
            weights = (parts * gate).sum(-1, keepdim=True).softmax(4)
        return (weights * parts).sum(4)

    # --------------------------------------------------------------------------------------------------------- reading

    def numbers(self, value: Store) -> Tensor:
        """Which chunk lies in each slot, (b, p); below 0: none."""
        slots = torch.arange(value.k.shape[2], device=value.stored.device)
        newest = value.stored[:, None] - 1
        return newest - (newest - slots) % len(slots)

    def visible(self, value: Store, seen: Tensor) -> Tensor:
        """Which slots a block may choose when `seen` (b, t) chunks had been stored, (b, t, p) bool."""
        numbers, seen = self.numbers(value)[:, None], seen[:, :, None]
        return (numbers >= (seen - self.num_visible).clamp(min=self.num_skipped)) & (numbers < seen)

    def scores(self, value: Store, queries: Tensor, seen: Tensor) -> Tensor:
        """The score of every chunk for every query (b, h, t, w, e), (b, g, t, w, p); -inf for what is not visible."""
        b, _, t, w, e = queries.shape
        summaries = value.summaries if value.summaries.shape[3] else value.k
        with without_autocast(queries.device.type):
            grouped = queries.to(summaries.dtype).view(b, self.kv_heads, -1, t * w, e).mean(2) * self.scale
            scores = grouped @ summaries.flatten(2, 3).transpose(2, 3)  # (b, g, t w, p u)
        scores = scores.view(b, self.kv_heads, t, w, -1, summaries.shape[3])
        scores = scores.squeeze(-1) if scores.shape[-1] == 1 else scores.max(-1).values
        return scores.masked_fill(~self.visible(value, seen)[:, None, :, None], float("-inf"))

    def choose(self, value: Store, queries: Tensor, seen: Tensor) -> Chosen:
        """Every query takes its best chunks.

        Args:
            queries: (b, h, t, w, e), turned if keys are. They may be others than those that attend.
            seen: (b, t) chunks that are in the past of each block, from `append`; `value.stored[:, None]` for the
                block being filled.
        """
        return self.chosen(value, self.scores(value, queries, seen))

    def chosen(self, value: Store, scores: Tensor) -> Chosen:
        shares, slots = best(scores, self.num_chosen, self.operator, self.temperature)  # (b, g, t, w, k)
        b, g, p, _, e = value.k.shape
        rows = slots + torch.arange(0, b * g * p, p, device=slots.device).view(b, g, 1, 1, 1)
        k, v = (x.flatten(3).flatten(0, 2).index_select(0, rows.flatten()) for x in (value.k, value.v))
        shape = (*slots.shape[:-1], -1, e)
        return Chosen(k.view(shape), v.view(shape), shares, slots)

    def read(
        self,
        value: Store,
        seen: Tensor,
        q: Tensor,
        window: Pair,
        bias: Tensor | None = None,
        *,
        far_q: Tensor | None = None,
        router_q: Tensor | None = None,
        distance: int | Tensor = 0,
        everything: bool = False,
        distil: bool = False,
        dropout: float = 0.0,
    ) -> Reading:
        """Attention of the tokens of t blocks to their windows and to the chunks that they choose, in one softmax.

        Queries are taken some at a time, so that little exists at once; in training the backward pass computes it anew.

        Args:
            value: The memory after `append`, if these blocks pushed any out of the XL memory.
            seen: (b, t), see `choose`.
            q: (b, h, t, w, e) queries to the window.
            window: KV, keys and values (b, g, t, j, e).
            bias: Added to the window's logits, (t or 1, w, j) or (b or 1, h or 1, t or 1, w, j); -inf hides.
            far_q: (b, h, t, w, e) queries to chosen keys, not turned; None: `q`.
            router_q: (b, h, t, w, e) queries to summaries, not turned; None: `far_q`.
            distance: Tokens between the end of the store and the first query of a block, int or (b,): what the XL
                memory holds, and the tokens of the block that came before. For rotary positions only.
            everything: Attend to all visible chunks, whatever their shares: brute force, which teaches a router.
            distil: Compute the `distillation_loss` too, towards the attention to everything.
            dropout: Probability that a weight of the attention is dropped.

        Raises:
            ValueError: shapes that do not go together.
        """
        far_q = q if far_q is None else far_q
        router_q = far_q if router_q is None else router_q
        self.check_reading(value, seen, (q, far_q, router_q), window)
        if self.positions == "rotary":
            steps = torch.arange(q.shape[3], device=q.device)
            ahead = steps + (distance[:, None, None] if isinstance(distance, Tensor) else distance)
            far_q, router_q = (self.turned(x, seen[:, :, None] * self.chunk_size + ahead) for x in (far_q, router_q))
        if bias is not None:
            bias = bias.expand(*bias.shape[:-3], *q.shape[2:4], -1)

        def part(blocks: slice, tokens: slice) -> Triple:
            here = (..., blocks, tokens, slice(None))
            near = Near(q[here], window[0][:, :, blocks], window[1][:, :, blocks], None if bias is None else bias[here])
            options = (everything, distil, dropout)
            return self.read_part(value, seen[:, blocks], near, far_q[here], router_q[here], *options)

        blocks_at_once, tokens_at_once = self.at_once(value, q, window[0].shape[3], everything or distil)
        parts = [
            [(blocks, tokens) for tokens in slices(q.shape[3], tokens_at_once)]
            for blocks in slices(q.shape[2], blocks_at_once)
        ]
        compute = part if len(parts) * len(parts[0]) == 1 else recomputed(part)
        rows = [[compute(*some) for some in row] for row in parts]
        out, losses, chunks = (
            torch.cat([torch.cat([found[i] for found in row], 3) for row in rows], 2) for i in range(3)
        )
        return Reading(out, losses, chunks, seen)

    def read_part(
        self,
        value: Store,
        seen: Tensor,
        near: Near,
        far_q: Tensor,
        router_q: Tensor,
        everything: bool,
        distil: bool,
        dropout: float,
    ) -> Triple:
        """`read` of some queries: outputs, losses, and numbers of chosen chunks."""
        scores = self.scores(value, router_q, seen)
        losses = scores.new_zeros(scores.shape[:-1])
        chunks = seen.new_zeros((*losses.shape, 0))
        if everything or distil:
            with torch.set_grad_enabled(torch.is_grad_enabled() and everything):
                visible = scores > float("-inf")
                out, mass = attend_with_all(near, far_q, value, visible, self.scale, dropout if everything else 0.0)
            losses = distillation_loss(scores, mass, self.temperature) if distil else losses
        if not everything:
            chosen = self.chosen(value, scores)
            out = attend_with_chosen(near, far_q, chosen, self.scale, dropout)
            numbers = self.numbers(value)[:, None, None, None].expand(*losses.shape, -1)
            chunks = numbers.gather(-1, chosen.slots).masked_fill(chosen.log_shares == float("-inf"), -1)
        return out, losses, chunks

    def at_once(self, value: Store, q: Tensor, window: int, everything: bool) -> tuple[int, int]:
        """How many blocks, and tokens of each, `read` takes at a time."""
        b, h, t, w, e = q.shape
        g, p, c = value.k.shape[1:4]
        seen = p * c if everything else self.num_chosen * c
        numbers = g * p * (self.num_summaries + 3) + 2 * h * (window + seen) + (0 if everything else 2 * g * seen * e)
        size = b * numbers * 4  # of one token
        if not isinstance(size, int):  # symbolic, in torch.export
            return t, w
        tokens = max(1, BYTES_AT_ONCE // size)
        return max(1, min(t, tokens // w)), min(w, tokens)

    def check_reading(self, value: Store, seen: Tensor, queries: tuple[Tensor, ...], window: Pair) -> None:
        b, g, _, _, e = value.k.shape
        q, shapes = queries[0], [tuple(x.shape) for x in (*queries, *window)]
        is_like = q.ndim == 5 and (q.shape[0], q.shape[4]) == (b, e) and q.shape[1] % g == 0
        if not is_like or any(shape != shapes[0] for shape in shapes[1:3]):
            raise ValueError(f"q, far_q, router_q must be ({b}, a multiple of {g}, t, w, {e}), not {shapes[:3]}")
        t, j = q.shape[2], window[0].shape[-2]
        if any(shape != (b, g, t, j, e) for shape in shapes[3:]):
            raise ValueError(f"window must be keys and values ({b}, {g}, {t}, j, {e}), not {shapes[3:]}")
        if seen.shape != (b, t) or seen.dtype != torch.int64:
            raise ValueError(f"seen must be ({b}, {t}) int64, from `append`, not {seen.dtype} {tuple(seen.shape)}")

    # ------------------------------------------------------------------------------------------------------- positions

    def token_positions(self, chunks: Tensor) -> Tensor:
        """Numbers of chunks (b, n) -> positions of their tokens (b, n c), counted from the first one ever stored."""
        within = torch.arange(self.chunk_size, device=chunks.device)
        return (chunks[:, :, None] * self.chunk_size + within).flatten(1)

    def turned(self, x: Tensor, at: Tensor) -> Tensor:
        """x (b, h, ..., e) turned by its positions (b, ...), if this kind has any.

        Angles are computed in float64: in fp32 those at position 1,000,000 would be off by 0.06.
        """
        if self.positions == "none":
            return x
        angles = (at[..., None].double() * self.frequencies.double())[:, None]  # (b, 1, ..., e / 2)
        wide = at_least_fp32(x)
        cos, sin = ((x * self.growth).to(wide.dtype) for x in (angles.cos(), angles.sin()))
        first, second = wide.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


# ------------------------------------------------------------------------------------------------ 3 attention, numerics


def attend_with_chosen(near: Near, far_q: Tensor, chosen: Chosen, scale: float, dropout: float = 0.0) -> Tensor:
    """One softmax over a window and over what each query chose, with the log shares in the logits of the latter.

    Args:
        near: Queries (b, h, t, w, e) and their window.
        far_q: (b, h, t, w, e) queries to chosen keys.

    Returns:
        (b, h, t, w, e); zeros for a query that sees nothing.
    """
    (b, h, t, w, e), g, dtype = far_q.shape, near.k.shape[1], near.q.dtype
    grouped = far_q.view(b, g, h // g, t, w, e).permute(0, 1, 3, 4, 2, 5)  # (b, g, t, w, r, e)
    far = at_least_fp32(grouped @ chosen.k.to(dtype).transpose(-1, -2)) * scale  # (b, g, t, w, r, m)
    shares = chosen.log_shares.repeat_interleave(far.shape[-1] // chosen.log_shares.shape[-1], -1)
    far = (far + shares[..., None, :]).permute(0, 1, 4, 2, 3, 5)  # (b, g, r, t, w, m)
    near_p, far_p = weights(near.logits(scale), far, dropout)
    read = far_p.permute(0, 1, 3, 4, 2, 5).to(dtype) @ chosen.v.to(dtype)  # (b, g, t, w, r, e)
    return (near.mix(near_p) + read.permute(0, 1, 4, 2, 3, 5)).flatten(1, 2)


def attend_with_all(
    near: Near, far_q: Tensor, value: Store, visible: Tensor, scale: float, dropout: float = 0.0
) -> Pair:
    """One softmax over a window and over all chunks that are `visible`, (b, g, t, w, p) bool; see `attend_with_chosen`.

    Returns:
        (b, h, t, w, e), and the attention that each chunk got, the mean over the heads of a group, (b, g, t, w, p).
    """
    (b, h, t, w, e), (g, p, c), dtype = far_q.shape, value.k.shape[1:4], near.q.dtype
    keys, values = (x.flatten(2, 3).to(dtype) for x in (value.k, value.v))  # (b, g, p c, e)
    far = at_least_fp32(far_q.reshape(b, g, -1, e) @ keys.transpose(-1, -2)).view(b, g, h // g, t, w, p, c) * scale
    far = far.masked_fill(~visible[:, :, None, ..., None], float("-inf")).flatten(-2)
    near_p, far_p = weights(near.logits(scale), far, dropout)
    read = (far_p.to(dtype).reshape(b, g, -1, p * c) @ values).view(b, g, h // g, t, w, e)
    return (near.mix(near_p) + read).flatten(1, 2), far_p.reshape(b, g, -1, t, w, p, c).sum(-1).mean(2)


def weights(near: Tensor, far: Tensor, dropout: float) -> Pair:
    """Softmax over both of two sets of logits (..., j), (..., m); zeros where all are -inf."""
    logits = torch.cat([near, far], -1)
    logits = logits.masked_fill(logits == float("-inf"), NOTHING)
    p = logits.softmax(-1).masked_fill(logits <= NOTHING / 2, 0.0)
    p = F.dropout(p, dropout) if dropout else p
    return p[..., : near.shape[-1]], p[..., near.shape[-1] :]


def distillation_loss(scores: Tensor, mass: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy from the attention that chunks got to the softmax of their scores: teaches a router.

    Gradients through the shares alone do not: where all is attended to they do not matter, and where little is chosen
    a chunk that was missed gets next to none. The mass is a target and gets no gradient; queries that attend to their
    window count little.

    Args:
        scores: (..., p), -inf for what is not visible.
        mass: (..., p) sums of attention weights, at most 1 together, from `attend_with_all`.
        temperature: That of the operator.

    Returns:
        (...) one loss for each query.
    """
    z = (scores / temperature).masked_fill(scores == float("-inf"), NOTHING)
    return -(mass.detach() * z.log_softmax(-1)).sum(-1)


def write(old: Tensor, new: Tensor, slots: Tensor, in_place: bool) -> Tensor:
    """`old` (b, g, p, ...) with `new` (b, g, n, ...) in the `slots` (b, n)."""
    target = old if in_place else old.clone()
    target[torch.arange(slots.shape[0], device=slots.device)[:, None], :, slots] = new.transpose(1, 2)
    return target


def slices(length: int, size: int) -> list[slice]:
    if length == size:  # both may be symbolic
        return [slice(0, length)]
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def recomputed(function: Callable[..., Triple]) -> Callable[..., Triple]:
    """`function`, of which the backward pass keeps the inputs alone."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_functional():
        return function

    def run(*inputs: Any) -> Triple:
        result: Triple = checkpoint(function, *inputs, use_reentrant=False)
        return result

    return run
