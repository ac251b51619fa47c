"""The equations of the model, read token by token: slow, naive, and what every fast path is compared with.

One row, one token at a time. What is remembered is a Python list of (key, value) pairs, what a token sees is the list
of the pairs that are visible to it, and attention is a dot product and a softmax written out. No masks, no buffers, no
folding of blocks, no fused kernels. Differentiable, so gradients are compared too.

Hutchins et al. 2022 (arXiv 2203.07852) and its authors' code; Sun et al. 2022 for the rotary positions with decay,
Raffel et al. 2019 for the bucketed bias, Rae et al. 2019 for the compressed memory, Ding et al. 2020 for the enhanced
recurrence; Ainslie et al. 2023 for the shares of routed chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config
from block_recurrent_transformer_pytorch.carried import Memories, States
from block_recurrent_transformer_pytorch.routing import Store

Pair = tuple[Tensor, Tensor]  # a key and a value, each (kv_heads, dim_head); keys neither rotated nor scaled


def stack(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Keys and values, each (g, j, e)."""
    keys, values = zip(*pairs)
    return torch.stack(keys, dim=1), torch.stack(values, dim=1)


def softmax(logits: Tensor) -> Tensor:
    weights = (logits - logits.max().detach()).exp()
    return weights / weights.sum()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + (x / math.sqrt(2)).erf()) / 2


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def t5_bucket(distance: int) -> int:
    """Buckets 0 ... 15 hold one distance each, 16 ... 31 are logarithmic and end at 128."""
    if distance < 16:
        return distance
    return min(31, 16 + math.floor(16 * math.log(distance / 16) / math.log(8)))


def frequencies(config: Config) -> tuple[Tensor, float]:
    """What each channel pair turns by in a position, and what the logits grow by, channel by channel."""
    e, base, scaling = config.dim_head, config.rotary_base, config.rotary_scaling
    plain = 1 / base ** (torch.arange(0, e, 2, dtype=torch.float32) / e)
    if not scaling:
        return plain, 1.0
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return plain / factor, 1.0
    trained, shares = scaling["original_max_position_embeddings"], []
    for i, frequency in enumerate(plain.tolist()):
        if scaling["rope_type"] == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            share = (trained * frequency / (2 * math.pi) - low) / (high - low)
        else:
            turns = [scaling.get(f"beta_{name}", usual) for name, usual in (("fast", 32), ("slow", 1))]
            first, last = (e * math.log(trained / (2 * math.pi * turn)) / (2 * math.log(base)) for turn in turns)
            first, last = max(math.floor(first), 0), min(math.ceil(last), e - 1)
            share = 1 - (i - first) / (last - first if last != first else 0.001)
        shares.append(min(1.0, max(0.0, share)))
    kept = torch.tensor(shares)
    grows = scaling["rope_type"] == "yarn"
    usual = 1 + 0.1 * math.log(factor) if grows else 1.0
    return (1 - kept) * plain / factor + kept * plain, scaling.get("attention_factor", usual) ** 2


def rotated_dots(q: Tensor, keys: Tensor, distances: list[int], config: Config) -> Tensor:
    """The products of q (e,) and keys (j, e), all turned by their positions, of which only the distances are left.

    Channels i and i + e/2 are one complex number, turned by base^(-2i/e) for each position; zeta_i^(distance / 512) is
    what the decay of the query and its inverse for the key leave, zeta_i = (2i + 0.4 e) / (1.4 e). These constants are
    defined as numbers of single precision.
    """
    e = len(q)
    twice_i = torch.arange(0, e, 2, dtype=torch.float32)
    frequency, growth = frequencies(config)
    zeta = ((twice_i + 0.4 * e) / (1.4 * e)).to(q.dtype)
    distance = torch.tensor(distances, dtype=q.dtype)[:, None]
    angle = distance * frequency.to(q.dtype)
    decay = zeta ** (distance / 512) if config.positions == "xpos" else torch.ones_like(angle)
    (q_real, q_imag), (k_real, k_imag) = q.chunk(2), keys.chunk(2, dim=1)
    turned = (q_real * k_real + q_imag * k_imag) * angle.cos() - (q_imag * k_real - q_real * k_imag) * angle.sin()
    return growth * (decay * turned).sum(1)


class Oracle:
    """One stream read from its beginning.

    Args:
        config: of the model.
        parameters: of the model, by name; `dict(model.named_parameters())`.

    Attributes:
        xl: for each layer, the pairs of the last complete blocks, oldest first.
        compressed: for each layer, the compressed entries, oldest first.
        sinks: for each layer, the first pairs that left its XL memory.
        store: for each layer with a routed memory, all pairs that left its XL memory, keys as they are met.
        block: for each layer, the pairs of the block being filled.
        state: for each recurrent layer, its state as of the start of the block, (s, d).
    """

    def __init__(self, config: Config, parameters: dict[str, Tensor]) -> None:
        self.config, self.parameters = config, parameters
        self.dtype = parameters["token_emb.weight"].dtype
        self.layers = range(1, config.depth + 1)
        self.cells = sorted(config.recurrent_layers)
        zero = parameters["token_emb.weight"].new_zeros(config.kv_heads, config.dim_head)
        self.xl: dict[int, list[Pair]] = {layer: [] for layer in self.layers}
        if config.empty_memory == "zeros":
            self.xl = {layer: [(zero, zero)] * self.xl_width(layer) for layer in self.layers}
        self.compressed: dict[int, list[Pair]] = {layer: [] for layer in self.layers}
        self.sinks: dict[int, list[Pair]] = {layer: [] for layer in self.layers}
        self.store: dict[int, list[Pair]] = {layer: [] for layer in self.layers}
        self.newest = dict.fromkeys(self.layers, zero)  # the newest key in the store, where keys are shifted
        self.block: dict[int, list[Pair]] = {layer: [] for layer in self.layers}
        self.state = {cell: parameters[f"layers.{cell - 1}.cell.initial"] for cell in self.cells}
        self.views = {cell: self.view(cell) for cell in self.cells}

    # -- what the options say

    def xl_width(self, layer: int) -> int:
        return self.config.num_xl_blocks * self.config.block_width if layer in self.config.xl_layers else 0

    @property
    def sink_layers(self) -> tuple[int, ...]:
        return self.config.extra_layers("sinks") if "sinks" in self.config.extra_memories else ()

    @property
    def routed_layers(self) -> tuple[int, ...]:
        return self.config.extra_layers("routed") if "routed" in self.config.extra_memories else ()

    def cells_read_at(self, layer: int) -> list[int]:
        """The recurrent layers whose states the tokens of a layer read, from the lowest up."""
        config = self.config
        if config.block_feedback:
            return [layer if layer in self.cells else self.cells[-1]]
        return sorted(
            write for read, write in zip(config.read_recurrent_layers, config.recurrent_layers) if read == layer
        )

    def qk_norm_of_tokens(self, layer: int) -> str:
        if self.config.tokens_qk_norm is not None:
            return self.config.tokens_qk_norm
        normalised = layer in self.cells or self.config.all_layers_qk_rmsnorm
        return self.config.qk_norm if normalised else "none"

    # -- small parts

    def has(self, name: str) -> bool:
        return name in self.parameters

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.parameters[f"{name}.weight"] @ x
        return y + self.parameters[f"{name}.bias"] if self.has(f"{name}.bias") else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        if self.config.norm == "layer":
            x = x - x.mean()
            return x / (x.square().mean() + (self.config.norm_eps or 1e-5)).sqrt() * self.parameters[f"{name}.weight"]
        return x / (x.square().mean() + (self.config.norm_eps or 1e-6)).sqrt() * self.parameters[f"{name}.weight"]

    def hidden(self, name: str, x: Tensor) -> Tensor:
        y = self.linear(f"{name}.to_hidden", x)
        if self.config.ff_activation == "relu":
            return y * (y > 0)
        half = len(y) // 2
        return y[:half] * (silu if self.config.ff_activation == "swiglu" else gelu)(y[half:])

    def heads_of(self, projected: Tensor) -> Tensor:
        """(h e,) cut into heads (h, e)."""
        return projected.reshape(-1, self.config.dim_head)

    def pair_of(self, projected: Tensor, qk_norm: str) -> Pair:
        """Key and value from one linear map, all keys first. With a gain per head, keys are unit vectors at once."""
        both = self.heads_of(projected)
        k, v = both[: self.config.kv_heads], both[self.config.kv_heads :]
        return (self.unit(k, qk_norm) if qk_norm == "head" else k), v

    def unit(self, x: Tensor, qk_norm: str) -> Tensor:
        """Unit vectors along the last axis, or (rms) those whose mean square is 1."""
        if qk_norm == "rms":
            return x / (x.square().mean(-1, keepdim=True) + (self.config.norm_eps or 1e-6)).sqrt()
        square = x.square().sum(-1, keepdim=True)
        return x / (square + 1e-6).sqrt() if qk_norm == "head" else x / square.sqrt().clamp(min=1e-12)

    # -- attention

    def attention(
        self, q: Tensor, pairs: list[Pair], qk_norm: str, norm: str, layer: int = 0, distances: list[int] | None = None
    ) -> Tensor:
        """The queries (h, e) of one token or state on all the given pairs: the heads' outputs, one behind the other.

        With a `layer`, its position scheme applies, and the distance to each pair must be told.
        """
        if not pairs:
            return torch.zeros_like(q).flatten()
        keys, values = stack(pairs)
        shared_by = self.config.heads // self.config.kv_heads
        outputs = []
        for head in range(self.config.heads):
            group = head // shared_by
            logits = self.logits(q[head], keys[group], head, qk_norm, norm, layer, distances)
            outputs.append(softmax(logits) @ values[group])
        return torch.cat(outputs)

    def logits(
        self, q: Tensor, keys: Tensor, head: int, qk_norm: str, norm: str, layer: int, distances: list[int] | None
    ) -> Tensor:
        """One head, q (e,) and keys (j, e): scale q.k + bias; where the head has a gain a, |a| (q.k + bias)."""
        config = self.config
        if qk_norm in ("channel", "rms"):
            q = self.unit(q, qk_norm) * self.parameters[f"{norm}.q_scale"]
            keys = self.unit(keys, qk_norm) * self.parameters[f"{norm}.k_scale"]
        elif qk_norm == "head":
            q = self.unit(q, qk_norm)  # the keys are unit vectors already
        is_rotated = layer and layer not in config.unrotated_layers and config.positions in ("xpos", "rotary")
        dots = rotated_dots(q, keys, distances, config) if is_rotated else keys @ q
        has_bias = layer and config.positions in ("t5", "dynamic")
        bias = self.position_bias(layer, head, distances) if has_bias else torch.zeros_like(dots)
        if qk_norm == "head":
            return self.parameters[f"{norm}.head_scale"][head].abs() * (dots + bias)
        return dots * (config.qk_norm_scale if qk_norm == "channel" else config.dim_head**-0.5) + bias

    def position_bias(self, layer: int, head: int, distances: list[int]) -> Tensor:
        name = f"layers.{layer - 1}.position_bias"
        if self.config.positions == "t5":
            return self.parameters[f"{name}.table"][head, [t5_bucket(distance) for distance in distances]]
        return torch.stack([self.dynamic_bias(name, distance)[head] for distance in distances])

    def dynamic_bias(self, name: str, distance: int) -> Tensor:
        """The bias of each head (h,), from an MLP of two hidden layers."""
        width, log = self.config.block_width, self.config.dynamic_log_distance
        seen = torch.tensor([math.log(1 + distance) if log else distance / width], dtype=self.dtype)
        hidden = silu(self.linear(f"{name}.to_hidden", seen))
        return self.linear(f"{name}.mlp.3", silu(self.linear(f"{name}.mlp.1", hidden)))

    # -- the vertical direction: tokens

    def read(self, tokens: list[int]) -> Tensor:
        """The logits of the next tokens, (n, v)."""
        return torch.stack([self.step(token) for token in tokens])

    def step(self, token: int) -> Tensor:
        """Logits (v,) after one more token."""
        config, embedding = self.config, self.parameters["token_emb.weight"]
        x = embedding[token]
        for layer in self.layers:
            x = self.token_through(layer, x)
        if len(self.block[1]) == config.block_width:
            self.complete_block()
        x = self.norm("norm", x)
        scale = config.logit_scale or (1 / math.sqrt(config.dim) if config.tie_embeddings else 1)
        return scale * (embedding @ x if config.tie_embeddings else self.linear("to_logits", x))

    def token_through(self, layer: int, x: Tensor) -> Tensor:
        name, qk_norm = f"layers.{layer - 1}", self.qk_norm_of_tokens(layer)
        h = self.norm(f"{name}.norm", x)
        place = len(self.block[layer])
        cells, inner = self.cells_read_at(layer), self.config.heads * self.config.dim_head
        projected = self.linear(f"{name}.to_qkv", h)
        *queries, kv = projected.split([inner] * (1 + len(cells)) + [len(projected) - inner * (1 + len(cells))])
        self.block[layer].append(self.pair_of(kv, qk_norm))
        distances, pairs = self.visible(layer, place)
        q = self.heads_of(queries[0])
        if layer in self.routed_layers:
            attended = [self.routed_attention(layer, q, distances, pairs)]
        else:
            attended = [self.attention(q, pairs, qk_norm, f"{name}.heads_norm", layer, distances)]
        for i, cell in enumerate(cells):
            q = self.heads_of(queries[1 + i])
            attended.append(self.attention(q, self.views[cell], self.config.qk_norm, f"{name}.read_norm.{i}"))
        x = x + self.linear(f"{name}.to_out", torch.cat(attended))
        h = self.norm(f"{name}.feed_forward.norm", x)
        return x + self.linear(f"{name}.feed_forward.to_out", self.hidden(f"{name}.feed_forward.hidden", h))

    # -- routed memory

    def met(self, x: Tensor, gain: str, layer: int) -> Tensor:
        """Queries or keys (..., e) of the tokens of a layer as they are multiplied, without positions."""
        norm, name = self.qk_norm_of_tokens(layer), f"layers.{layer - 1}.heads_norm"
        if norm in ("channel", "rms"):
            return self.unit(x, norm) * self.parameters[f"{name}.{gain}_scale"]
        if norm == "head" and gain == "q":
            return self.unit(x, norm) * self.parameters[f"{name}.head_scale"].abs()[:, None]
        return x

    def turned(self, x: Tensor, position: int, layer: int) -> Tensor:
        """Queries or keys (..., e) at a position of the stream, if those of the store are turned."""
        positions = self.config.extra_memories["routed"].get("positions", "none")
        if positions == "none" or layer in self.config.unrotated_layers:
            return x
        frequency, growth = frequencies(self.config)
        angle = position * frequency.to(x.dtype)
        real, imag = x.chunk(2, dim=-1)
        cos, sin = math.sqrt(growth) * angle.cos(), math.sqrt(growth) * angle.sin()
        return torch.cat((real * cos - imag * sin, imag * cos + real * sin), dim=-1)

    def routed_attention(self, layer: int, q: Tensor, distances: list[int], near: list[Pair]) -> Tensor:
        """Each head (h, e) attends to what is near and to the tokens of the best chunks of its group in the store."""
        config, options = self.config, self.config.extra_memories["routed"]
        norm, name = self.qk_norm_of_tokens(layer), f"layers.{layer - 1}.heads_norm"
        store, size = self.store[layer], options.get("chunk_size", 16)
        sinks = config.extra_memories["sinks"]["tokens"] if layer in self.sink_layers else 0
        first = max(-(-sinks // size), (len(store) - options["capacity"]) // size)
        chunks = [store[i : i + size] for i in range(first * size, len(store), size)]
        here = len(store) + len(self.xl[layer]) + len(self.block[layer]) - 1
        far_q = self.turned(self.met(q, "q", layer), here, layer)
        scale = {"channel": config.qk_norm_scale, "head": 1.0}.get(norm, config.dim_head**-0.5)
        shared_by, outputs = config.heads // config.kv_heads, []
        for head in range(config.heads):
            group = head // shared_by
            asks = far_q[group * shared_by : (group + 1) * shared_by].mean(0)
            shares = self.shares([asks @ s * scale for s in self.best_summaries(layer, chunks, group, asks)])
            keys, values = stack(near) if near else (q.new_zeros(config.kv_heads, 0, config.dim_head),) * 2
            logits = [*self.logits(q[head], keys[group], head, norm, name, layer, distances)]
            values = [*values[group]]
            for i, share in shares.items():
                for key, value in chunks[i]:
                    logits.append(far_q[head] @ key[group] * scale + share.log())
                    values.append(value[group])
            outputs.append(softmax(torch.stack(logits)) @ torch.stack(values))
        return torch.cat(outputs)

    def best_summaries(self, layer: int, chunks: list[list[Pair]], group: int, asks: Tensor) -> list[Tensor]:
        """Of each chunk the summary that is most like what is asked for."""
        options, gate = self.config.extra_memories["routed"], f"layers.{layer - 1}.extra.routed.router.gate"
        best = []
        for chunk in chunks:
            found = []
            for part in torch.stack([key[group] for key, _ in chunk]).chunk(options.get("num_summaries", 1)):
                weights = softmax(part @ self.parameters[gate][group]) if self.has(gate) else 1 / len(part)
                found.append((part * (weights[:, None] if self.has(gate) else weights)).sum(0))
            best.append(max(found, key=lambda summary: (asks @ summary).item()))
        return best

    def shares(self, scores: list[Tensor]) -> dict[int, Tensor]:
        """The chosen chunks and their shares."""
        options = self.config.extra_memories["routed"]
        k, operator = options["num_chosen"], options.get("operator", "coordinate_descent")
        order = sorted(range(len(scores)), key=lambda i: -scores[i].item())
        z = [scores[i] / options.get("temperature", 1.0) for i in order]
        if not z:
            return {}
        if operator == "top_k" or (operator == "coordinate_descent" and k >= len(z)):
            return {i: torch.ones_like(z[0]) for i in order[:k]}
        whole = 0  # shares of 1; what is left of k goes to the others, as in a softmax
        if operator == "coordinate_descent":
            def left(whole: int) -> Tensor:
                return (k - whole) / torch.stack(z[whole:]).exp().sum()
            while whole < k - 1 and z[whole].exp() * left(whole) > 1:
                whole += 1
        total = 1 if operator == "softmax" else k - whole
        shares = softmax(torch.stack(z[whole:])) * total
        ones = [torch.ones_like(z[0])] * whole
        return dict(zip(order[:k], [*ones, *shares]))

    def visible(self, layer: int, place: int) -> tuple[list[int], list[Pair]]:
        """The distances and pairs that the token at a place of the block sees, oldest first.

        Sinks, and before them compressed entries, stand in front of the XL memory, as if each were one token.
        """
        past = self.compressed[layer] + self.sinks[layer] + self.xl[layer]
        at = {position - len(past): pair for position, pair in enumerate(past + self.block[layer])}
        seen = [(place - position, pair) for position, pair in at.items()]
        if self.config.attention_window == "sliding":
            seen = [(distance, pair) for distance, pair in seen if 1 <= distance <= self.config.block_width]
        return [distance for distance, _ in seen], [pair for _, pair in seen]

    # -- the horizontal direction: states, when a block is complete

    def complete_block(self) -> None:
        self.state = {cell: self.written(cell) for cell in self.cells}
        self.views = {cell: self.view(cell) for cell in self.cells}
        for layer in self.layers:
            self.remember(layer)
        self.block = {layer: [] for layer in self.layers}

    def identified(self, cell: int, i: int) -> Tensor:
        """norm(S) + id of the i-th state."""
        name = f"layers.{cell - 1}.cell"
        return self.norm(f"{name}.norm", self.state[cell][i]) + self.parameters[f"{name}.ids"][i]

    def view(self, cell: int) -> list[Pair]:
        """A key and a value for each state."""
        projected = [
            self.linear(f"layers.{cell - 1}.cell.to_kv", self.identified(cell, i)) for i in range(len(self.state[cell]))
        ]
        return [self.pair_of(kv, self.config.qk_norm) for kv in projected]

    def written(self, cell: int) -> Tensor:
        """The next state."""
        if self.config.state_update == "token_gated":
            return self.written_by_tokens(cell)
        name, qk_norm, rows = f"layers.{cell - 1}.cell", self.config.qk_norm, []
        tokens = (self.xl[cell] if self.config.state_reads_memory else []) + self.block[cell]
        for i, old in enumerate(self.state[cell]):
            source = self.identified(cell, i)
            to_self, to_cross = map(self.heads_of, self.linear(f"{name}.to_q", source).chunk(2))
            itself = self.attention(to_self, self.views[cell], qk_norm, f"{name}.self_norm")
            others = self.attention(to_cross, tokens, qk_norm, f"{name}.cross_norm")
            rows.append(self.updated(f"{name}.update", old, torch.cat((itself, others))))
        return torch.stack(rows)

    def updated(self, name: str, old: Tensor, attended: Tensor) -> Tensor:
        """One state after the attention of its block."""
        if self.config.state_update == "skip":
            return self.gated(f"{name}.gate", old, self.linear(f"{name}.to_candidate", attended), attended)
        if self.config.state_update == "single":
            hidden = self.hidden(f"{name}.hidden", attended)
            return self.gated(f"{name}.gate", old, self.linear(f"{name}.to_candidate", hidden).tanh(), hidden)
        candidate = self.linear(f"{name}.attention.to_candidate", attended)
        middle = self.gated(f"{name}.attention.gate", old, candidate, attended)
        hidden = self.hidden(f"{name}.hidden", self.norm(f"{name}.norm", middle))
        return self.gated(f"{name}.gate", middle, self.linear(f"{name}.to_candidate", hidden), hidden)

    def written_by_tokens(self, cell: int) -> Tensor:
        """The next state: one token after another replaces a share of each state whose key is like its address."""
        config, name, block = self.config, f"layers.{cell - 1}.cell", self.block[cell]
        nothing = (torch.zeros_like(block[0][0]),) * 2
        pairs = [nothing] * (config.write_span - 1) + self.xl[cell] + block
        state = self.state[cell]
        for last in range(len(pairs) - len(block), len(pairs)):
            keys, values = zip(*(pairs[last - i] for i in range(config.write_span)))
            features = torch.cat([x.flatten() for x in (*keys, *values)])
            address = self.heads_of(self.linear(f"{name}.to_address", features[: len(features) // 2]))
            found = [
                softmax(self.parameters[f"{name}.scale"] * torch.stack([
                    self.unit(sought, "channel") @ self.unit(key[group], "channel") for key, _ in self.views[cell]
                ]))
                for group, sought in enumerate(address)
            ]  # fmt: skip
            shares = self.gate_shares(f"{name}.gate", features)[1] * sum(found) / len(found)
            value = self.linear(f"{name}.to_value", features)
            state = torch.stack([old + share * (value - old) for old, share in zip(state, shares)])
        return state

    def gated(self, name: str, old: Tensor, candidate: Tensor, source: Tensor) -> Tensor:
        keep, write = self.gate_shares(name, source)
        return old * keep + candidate * write

    def gate_shares(self, name: str, source: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the old is kept and of the new is written."""
        if self.config.gate == "lstm":
            return (
                sigmoid(self.linear(f"{name}.to_forget", source) + 1),
                sigmoid(self.linear(f"{name}.to_input", source) - 1),
            )
        if self.config.gate == "hard":
            write = (0.5 + (self.linear(f"{name}.to_write", source) - 1) / 4).clamp(0, 1)
            return 1 - write, write
        if self.config.gate == "full":
            keep = sigmoid(self.linear(f"{name}.to_keep", source) + 1)
        else:
            keep = sigmoid(self.parameters[f"{name}.keep"])
        return keep, 1 - keep

    # -- memory, when a block is complete

    def remember(self, layer: int) -> None:
        width = self.xl_width(layer)
        above = layer + 1 if self.config.enhanced_recurrence and layer < self.config.depth else layer
        pairs = self.xl[layer] + self.block[above]
        leaving, self.xl[layer] = pairs[: max(0, len(pairs) - width)], pairs[max(0, len(pairs) - width) :]
        if leaving and not self.sinks[layer] and layer in self.sink_layers:
            self.sinks[layer] = leaving[: self.config.extra_memories["sinks"]["tokens"]]
        if layer in self.routed_layers:
            for key, value in leaving:
                ready = self.met(key, "k", layer)
                if self.config.extra_memories["routed"].get("key_shift"):
                    ready, self.newest[layer] = self.newest[layer], ready
                self.store[layer].append((self.turned(ready, len(self.store[layer]), layer), value))
        if self.config.use_compressed_mem and width:
            entries = self.compressed[layer] + self.compress(layer, leaving)
            self.compressed[layer] = entries[max(0, len(entries) - self.config.block_width // 2) :]

    def compress(self, layer: int, pairs: list[Pair]) -> list[Pair]:
        """One entry for every `factor` tokens of a block, counted from its end: the oldest that do not fill one go."""
        factor, shape = self.config.compressed_mem_factor, (self.config.kv_heads, self.config.dim_head)
        pooling = self.config.compressed_mem_pooling
        if pooling != "conv":
            groups = [pairs[first : first + factor] for first in range(len(pairs) % factor, len(pairs), factor)]
            pool = {"mean": sum_by_count, "max": largest}[pooling]
            return [(pool([k for k, _ in group]), pool([v for _, v in group])) for group in groups]
        name = f"layers.{layer - 1}.compressor.conv"
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        half = len(bias) // 2
        entries = []
        for first in range(len(pairs) % factor, len(pairs), factor):
            k, v = bias[:half], bias[half:]
            for i in range(factor):
                key, value = pairs[first + i]
                k = k + weight[:half, :, i] @ key.flatten()
                v = v + weight[half:, :, i] @ value.flatten()
            entries.append((k.reshape(shape), v.reshape(shape)))
        return entries


# -- comparing


def assert_same(
    actual: Tensor, expected: Tensor, tolerance: float = 1e-10, spread: float = 0.0, name: str = ""
) -> None:
    """The largest difference is within `tolerance` of the spread of what is expected (or of `spread`, where larger)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not expected.numel():
        return
    spread = max(spread, (expected.max() - expected.min()).item(), 1e-3)
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * spread, f"{name}: off by {error:.3g}, {error / spread:.3g} of the spread"


def assert_all_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10, of: str = ""
) -> None:
    """The same names and values, as exact as assert_same asks, or as exact as a hundredth of the largest value is."""
    assert actual.keys() == expected.keys()
    largest = max((value.abs().max().item() for value in expected.values() if value.numel()), default=0.0)
    for name, value in expected.items():
        assert_same(actual[name], value, tolerance, spread=1e-2 * largest, name=of + name)


def remembered(oracle: Oracle) -> dict[str, Tensor]:
    """Everything that an oracle carries, by name."""
    found = {}
    for layer in oracle.layers:
        for name in ("xl", "compressed", "sinks", "block"):
            if pairs := getattr(oracle, name)[layer]:
                keys, values = stack(pairs)
                found |= {f"layer {layer} {name} keys": keys, f"layer {layer} {name} values": values}
        if layer in oracle.routed_layers and oracle.store[layer]:
            keys, values = stack(oracle.store[layer][-oracle.config.extra_memories["routed"]["capacity"] :])
            found |= {f"layer {layer} store keys": keys, f"layer {layer} store values": values}
    return found | {f"state {cell}": oracle.state[cell] for cell in oracle.cells}


def sum_by_count(vectors: list[Tensor]) -> Tensor:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total / len(vectors)


def largest(vectors: list[Tensor]) -> Tensor:
    """The largest number of each channel."""
    best = vectors[0]
    for vector in vectors[1:]:
        best = torch.where(vector > best, vector, best)
    return best


def carried(config: Config, memories: Memories, states: States, row: int = -1) -> dict[str, Tensor]:
    """The same of one row of what a model carries: the filled part of each buffer."""
    position = memories.position
    place = position.offset if isinstance(position.offset, int) else int(position.offset[row])
    blocks = position.full_blocks + (0 if position.extra_blocks is None else int(position.extra_blocks[row]))
    if config.empty_memory == "zeros":
        blocks = config.num_xl_blocks
    compressed = max(0, blocks - config.num_xl_blocks) * (config.block_width // config.compressed_mem_factor)
    found = {}
    for number, layer in enumerate(memories.layers, start=1):
        has_sinks = blocks > config.xl_width(number) // config.block_width and "sinks" in layer.past
        for name, held in (
            ("xl", blocks * config.block_width), ("compressed", compressed), ("block", place),
            ("sinks", config.block_width if has_sinks else 0),
        ):  # fmt: skip
            for kind, buffer in zip(("keys", "values"), layer.block if name == "block" else layer.past.get(name, ())):
                held = min(held, buffer.shape[2])
                start = 0 if name == "block" else buffer.shape[2] - held
                if held:
                    found[f"layer {number} {name} {kind}"] = buffer[row, :, start : start + held]
        if "routed" in layer.past:
            found |= stored(config, number, layer.past["routed"], row)
    return found | {f"state {cell}": s[row] for cell, s in zip(sorted(config.recurrent_layers), states.layers)}


def stored(config: Config, layer: int, store: Store, row: int) -> dict[str, Tensor]:
    """What one row of a routed memory holds, oldest first."""
    (_, _, slots, size, _), count = store.k.shape, int(store.stored[row])
    visible = range(max(0, count - config.extra_memories["routed"]["capacity"] // size), count)
    at = [number % slots for number in visible]
    return {f"layer {layer} store {kind}": x[row, :, at].flatten(1, 2) for kind, x in (
        ("keys", store.k), ("values", store.v)
    ) if at}  # fmt: skip


def gradients(model: BlockRecurrentTransformer, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all parameters, for one random combination of all results; the same one for the same names and shapes."""
    draw = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for _, result in sorted(results.items()):
        total = total + (result * torch.randn(result.shape, generator=draw, dtype=result.dtype)).sum()
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def read_in_pieces(
    model: BlockRecurrentTransformer,
    tokens: Tensor,
    cuts: list[int],
    memories: Memories | None = None,
    states: States | None = None,
) -> tuple[Tensor, Memories, States]:
    """One call after another. Logits of all tokens, and what the last call returned."""
    logits = []
    for piece in tokens.split(cuts, dim=1):
        out, memories, states = model(piece, xl_memories=memories, states=states)
        logits.append(out)
    return torch.cat(logits, dim=1), memories, states
