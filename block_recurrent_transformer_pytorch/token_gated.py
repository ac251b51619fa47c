"""A recurrent cell whose writes are decided by tokens: few of them write, and what nobody writes to stays as it is.

In the paper each state decides for itself, from a mixture of all that it attended to, how much of it changes. Such a
state forgets a little with every block. Here each token decides whether it is written at all, and to which states:

    x_j = [k_j ; k_(j-1) ; ... ; k_(j-c+1)]            what the layer remembers of token j and of the c - 1 before it
    f_j = [x_j ; v_j ; v_(j-1) ; ... ; v_(j-c+1)]
    w_j = gate(f_j), one number from 0 to 1            a hard gate makes it 0, exactly, for almost every token
    a_j = softmax_s(scale unit(A x_j) . unit(Ks))      the states whose keys are like the address; a mean over key heads
    S_s <- S_s + w_j a_js (W f_j + b - S_s)            erase and add, for one token of the block after another

The keys Ks are those of the states as of the start of the block, so a block is written with a few products (`Writes`).
With the token before, a fact that comes as "key value" is stored under its key; with more of them, a gate tells a fact
from words that look like one. c = 4 is the usual width of short convolutions beside recurrences.

These writes are an addition to Hutchins et al. 2022. Erasing and adding at addresses found by content are those of
Graves et al. 2014 (arXiv 1410.5401), gates that saturate those of Louizos et al. 2017 (arXiv 1712.01312).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .carried import KV
from .kernels import unit


class Writes(NamedTuple):
    """What the writes of a block, one after the other, amount to: keep * old + shares^T values."""

    keep: Tensor  # (b, s): the product of 1 - w_js over all tokens j
    shares: Tensor  # (b, j, s): w_js times the product of 1 - w_is over all later tokens i


def in_sequence(w: Tensor) -> Writes:
    """S <- S + w_js (z_j - S) for each token j in turn, in closed form.

    Products are sums of logarithms, so that states to which no token writes are kept exactly, and a share of one
    erases all but the smallest number that the type tells from zero.

    Args:
        w: the share (b, j, s) of each state that each token replaces, from 0 to 1.
    """
    log_left = torch.log1p(-w.clamp(max=1 - torch.finfo(w.dtype).eps))
    from_here = log_left.flip(1).cumsum(1).flip(1)
    behind = torch.cat((from_here[:, 1:], torch.zeros_like(from_here[:, :1])), dim=1)
    return Writes(from_here[:, 0].exp(), w * behind.exp())


class TokenGatedCell(nn.Module):
    """States (b, s, d) that tokens write to.

    Args:
        dim: of a state.
        num_states: how many.
        kv_heads: heads of the tokens' keys and values, each `dim_head` wide; those of the states are as many.
        span: how many tokens a write is decided from, c.
        norm: of the states, before they are projected: (b, s, d) -> (b, s, d).
        gate: (b, t, j, 2 c g e) and a state -> shares, of which `write` (b, t, j, 1) is taken.
        stored_key: keys (b, g, s, e) of states -> the same as their readers take them.
    """

    _no_weight_decay = ("initial", "ids", "scale")
    losses = ("open_gates",)  # its gate always depends on the token

    def __init__(
        self, *, dim: int, num_states: int, kv_heads: int, dim_head: int, span: int, norm: nn.Module,
        gate: nn.Module, stored_key: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        super().__init__()
        inner = kv_heads * dim_head
        self.kv_heads, self.dim_head, self.span, self.stored_key = kv_heads, dim_head, span, stored_key
        self.initial = nn.Parameter(torch.empty(num_states, dim))
        self.ids = nn.Parameter(torch.empty(num_states, dim))
        self.norm = norm
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_address = nn.Linear(span * inner, inner, bias=False)
        self.scale = nn.Parameter(torch.empty(()))
        self.gate = gate
        self.to_value = nn.Linear(2 * span * inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.initial, std=0.1)
        nn.init.normal_(self.ids)
        nn.init.constant_(self.scale, 8.0)

    @torch.no_grad()
    def match(self, to_kv: Tensor) -> None:
        """Initial values with which a token finds what it wrote: one map makes the keys of tokens and of states.

        An address is then the sum of the keys of the token and of the one before, a value the sum of what these two
        were made from: either may be the key of a fact, and either its value.

        Args:
            to_kv: that map, (2 g e, d), keys first; its rows (or columns, if there are more rows) are orthonormal.
        """
        k, v = to_kv.chunk(2)
        self.to_kv.weight.copy_(to_kv)
        near = torch.zeros(self.span, 1)
        near[:2] = 1
        self.to_address.weight.copy_(torch.kron(near.t(), torch.eye(len(k))))
        self.to_value.weight.copy_(torch.cat((torch.kron(near, k), torch.kron(near, v))).t())
        nn.init.zeros_(self.to_value.bias)

    def initial_state(self) -> Tensor:
        """(s, d), in at least fp32."""
        return self.initial.to(torch.promote_types(self.initial.dtype, torch.float32))

    def project(self, state: Tensor) -> KV:
        """State (b, s, d) -> its keys and values (b, g, s, e), from norm(S) + ids."""
        projected = self.to_kv(self.norm(state.to(self.ids.dtype)) + self.ids)
        k, v = projected.unflatten(-1, (2 * self.kv_heads, self.dim_head)).transpose(1, 2).chunk(2, dim=1)
        return KV(self.stored_key(k), v)

    def features(self, tokens: KV) -> tuple[Tensor, Tensor]:
        """Tokens (b, t, g, c - 1 + j, e) -> x (b, t, j, c g e), keys alone, and f (b, t, j, 2 c g e), with values."""
        k, v = (x.transpose(2, 3).flatten(3) for x in tokens)
        last = k.shape[2] - self.span + 1
        k, v = (torch.cat([x[:, :, i : i + last] for i in reversed(range(self.span))], dim=-1) for x in (k, v))
        return k, torch.cat((k, v), dim=-1)

    def write(self, state: Tensor, state_k: Tensor, w: Tensor, q: Tensor, values: Tensor) -> Tensor:
        """The state after a block: gates w (b, j, 1), unit addresses q (b, g, j, e), values (b, j, d)."""
        logits = self.scale * (q @ unit(state_k).transpose(-1, -2))  # (b, g, j, s)
        address = logits.to(state.dtype).softmax(-1).mean(1)
        writes = in_sequence(w.to(state.dtype) * address)
        return state * writes.keep[..., None] + writes.shares.transpose(1, 2) @ values.to(state.dtype)

    def forward(
        self, state: Tensor, kv: KV, tokens: KV, mask: Tensor | None, mode: Any
    ) -> tuple[KV, Tensor, Tensor | None]:
        """Goes through t complete blocks.

        Args:
            state: (b, s, d), as of the start of the first block, and `kv`, its keys and values.
            tokens: stored keys and values (b, t, g, c - 1 + j, e) of the tokens of each block and of those before it,
                zeros where there are none.
            mask: None; states do not read the memory here.
            mode: of the call.

        Returns:
            Keys and values of the state as of the start of each block, (b, t, g, s, e), the state after the last, and
            the mean share of its tokens that a block writes, (b, t), if the loss `open_gates` is asked for.
        """
        keys, features = self.features(tokens)
        gates = cast(Any, self.gate).shares(features, state, mode).write  # (b, t, j, 1)
        q = unit(self.to_address(keys).unflatten(-1, (self.kv_heads, self.dim_head)).transpose(2, 3))
        blocks = list(zip(gates.unbind(1), q.unbind(1), self.to_value(features).unbind(1)))
        kvs = [kv]
        for block in blocks:
            state = mode.recomputed(self.write, state, kvs[-1].k, *block)
            if len(kvs) < len(blocks):
                kvs.append(self.project(state))
        opened = gates.flatten(2).mean(2) if "open_gates" in mode.auxiliary else None
        return KV(*(torch.stack(x, dim=1) for x in zip(*kvs))), state, opened
