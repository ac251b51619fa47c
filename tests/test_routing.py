"""Routed memory against plain loops over the whole past, in float64; any split of a stream; operators against CoLT5."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from block_recurrent_transformer_pytorch import routing
from block_recurrent_transformer_pytorch.routing import Router, Store, coordinate_descent, softmax, top_k

exact = {"rtol": 1e-9, "atol": 1e-9}
minus_infinity = float("-inf")


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------------------- operators


def colt5(scores: Tensor, k: int, temperature: float, steps: int) -> Tensor:
    """The iteration of CoLT5: exp((s + a + b) / eps), a for the sum and b for the bound, in turn."""
    b = -scores
    for _ in range(steps):
        a = temperature * (math.log(k) - ((scores + b) / temperature).logsumexp(-1, keepdim=True))
        b = -(scores + a).clamp(min=0)
    return ((scores + a + b) / temperature).exp()


@pytest.mark.parametrize("k", [1, 2, 7, 19])
@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 10.0])
def test_coordinate_descent_is_what_the_iteration_of_colt5_ends_at(k, temperature):
    scores = torch.randn(5, 3, 20)
    shares = coordinate_descent(scores, k, temperature)
    torch.testing.assert_close(shares, colt5(scores, k, temperature, 5_000), rtol=0, atol=1e-3)
    torch.testing.assert_close(shares.sum(-1), torch.full((5, 3), float(k)), **exact)
    assert shares.min() >= 0 and shares.max() <= 1
    torch.testing.assert_close(coordinate_descent(scores, k, temperature, log=True).exp(), shares)


def test_twenty_steps_of_the_iteration_are_not_enough():
    scores = torch.randn(64, 512)
    sums = colt5(scores, 32, 0.1, 20).sum(-1)
    assert (sums - 32).abs().max() > 1
    torch.testing.assert_close(coordinate_descent(scores, 32, 0.1).sum(-1), torch.full((64,), 32.0), **exact)


def test_coordinate_descent_is_top_k_as_the_temperature_falls():
    scores = torch.randn(8, 50)
    torch.testing.assert_close(coordinate_descent(scores, 5, 1e-4), top_k(scores, 5), rtol=0, atol=1e-6)
    assert (coordinate_descent(scores, 5, 1.0) - top_k(scores, 5)).abs().max() > 0.1
    assert (top_k(scores, 5).sum(-1) == 5).all()


@pytest.mark.parametrize("k", [1, 3, 4, 6, 9])
def test_masked_scores_get_nothing_and_few_get_all(k):
    scores = torch.randn(4, 6)
    scores[:, 4:] = minus_infinity
    scores[3] = minus_infinity
    shares = coordinate_descent(scores, k)
    assert (shares[:, 4:] == 0).all() and (shares[3] == 0).all()
    torch.testing.assert_close(shares[:3].sum(-1), torch.full((3,), float(min(k, 4))), **exact)
    assert k < 4 or (shares[:3, :4] == 1).all()
    torch.testing.assert_close(softmax(scores[:3], k), scores[:3].softmax(-1))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("log", [False, True])
def test_gradients_of_operators(temperature, log):
    scores = torch.randn(3, 9, requires_grad=True)
    for operator, k in itertools.product((coordinate_descent, softmax), (1, 4)):
        assert torch.autograd.gradcheck(partial(operator, k=k, temperature=temperature, log=log), scores)


def test_gradients_of_masked_scores_are_zero():
    scores = torch.randn(3, 6)
    scores[:, 3:] = minus_infinity
    scores.requires_grad_()
    for k in (2, 3, 5):
        coordinate_descent(scores, k, 0.5).square().sum().backward()
    assert scores.grad.isfinite().all() and (scores.grad[:, 3:] == 0).all() and scores.grad[:, :3].abs().max() > 0


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 10), st.integers(0, 99))
def test_the_best_are_those_of_all(n, k, temperature, seed):
    scores = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    for operator in ("coordinate_descent", "softmax", "top_k"):
        shares, chosen = routing.best(scores, min(k, n), operator, temperature)
        every = routing.log_shares(scores, min(k, n), operator, temperature)
        torch.testing.assert_close(shares, every.gather(-1, chosen), **exact)
        torch.testing.assert_close(shares, every.topk(min(k, n)).values, **exact)


def test_bad_arguments_of_operators():
    for wrong in ({"k": 0}, {"k": 1, "temperature": 0.0}, {"k": 1, "temperature": float("nan")}):
        with pytest.raises(ValueError, match="k=0|temperature="):
            coordinate_descent(torch.zeros(3), **wrong)


# --------------------------------------------------------------------------------------------- a stream, and its oracle


class Stream:
    """Queries, keys and values of a layer, and how such a layer uses the kind: an XL memory of `num_xl` blocks.

    A row is reset at block `starts[row]`, and knows nothing of what was before.
    """

    def __init__(self, kind, num_blocks, *, batch=2, heads=4, num_xl=1, starts=None):
        self.kind, self.num_xl, self.w, self.num_blocks = kind, num_xl, kind.block_width, num_blocks
        g, e, n = kind.kv_heads, kind.dim_head, num_blocks * kind.block_width
        self.q = torch.randn(batch, heads, n, e)
        self.k, self.v = torch.randn(batch, g, n, e), torch.randn(batch, g, n, e)
        self.starts = torch.zeros(batch, dtype=torch.int64) if starts is None else torch.tensor(starts)

    def blocks(self, x, first, t):
        return x[:, :, first * self.w : (first + t) * self.w]

    def window(self, first, t):
        """Keys, values and bias of t blocks; what is before the stream or after a token is hidden."""
        w, m = self.w, self.num_xl * self.w
        pad = torch.nn.functional.pad
        k, v = (pad(x, (0, 0, m, 0)) for x in (self.k, self.v))
        k, v = (torch.stack([x[:, :, i * w : (i + 1) * w + m] for i in range(first, first + t)], 2) for x in (k, v))
        at = torch.arange(first, first + t)[:, None, None] * w + torch.arange(w)[:, None]
        keys = torch.arange(first, first + t)[:, None, None] * w + torch.arange(-m, w)
        starts = self.starts[:, None, None, None] * w
        hidden = (keys < 0) | (keys > at) | ((keys < starts) & (at >= starts))
        return (k, v), torch.zeros(hidden.shape).masked_fill(hidden, minus_infinity)[:, None]

    def step(self, value, first, t, **options):
        """t whole blocks at once."""
        left = range(first - self.num_xl, first - self.num_xl + t)
        rows = (left[0] >= self.starts) | ((first < self.starts) & (left[0] >= 0))
        if t > 1:
            assert rows.all()
        if rows.any():
            options["blocks"] = [self.blocks(x, left[0], t) for x in (self.k, self.v)]
            options["rows"] = None if rows.all() else rows
        window, bias = self.window(first, t)
        q = self.blocks(self.q, first, t).unflatten(2, (t, self.w))
        reading, after = self.kind(value, q, window, bias, distance=self.num_xl * self.w, **options)
        return reading.out.flatten(2, 3), after

    def tokens(self, value, block, start, stop):
        """Some tokens of the block being filled."""
        window, bias = self.window(block, 1)
        q = self.blocks(self.q, block, 1)[:, :, None, start:stop]
        distance = self.num_xl * self.w + start
        out = self.kind.read(value, value.stored[:, None], q, window, bias[..., start:stop, :], distance=distance).out
        return out.flatten(2, 3)

    def run(self, plan, value=None, **options):
        """plan: numbers of whole blocks, or lists of token counts that make up one block."""
        value = self.kind.empty(len(self.q), self.q) if value is None else value
        outs, block = [], 0
        for part in plan:
            value = value.forget((self.starts == block) & (self.starts > 0))
            if isinstance(part, int):
                out, value = self.step(value, block, part, **options)
                outs.append(out)
                block += part
                continue
            bounds = [0, *itertools.accumulate(part)]
            outs += [self.tokens(value, block, *bound) for bound in itertools.pairwise(bounds)]
            value = self.step(value, block, 1, **options)[1]
            block += 1
        assert block == self.num_blocks
        return torch.cat(outs, 2), value


def turned(kind, x, at):
    if kind.positions == "none":
        return x
    half = kind.dim_head // 2
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), at * kind.frequencies)
    return torch.cat([pairs.real, pairs.imag])


def bisected(z, k):
    """Shares of coordinate descent by bisection on the sum."""
    if k >= len(z):
        return torch.ones(len(z))
    low, high = -z.max() - 1e3, -z.min() + 1e3
    for _ in range(200):
        middle = (low + high) / 2
        if (z + middle).clamp(max=0).exp().sum() > k:
            high = middle
        else:
            low = middle
    return (z + low).clamp(max=0).exp()


def one_query(kind, q, far_q, shared_q, keys, values, near_k, near_v):
    """far_q (r, e) of a key head's group, keys and values (n, c, e) of what is visible."""
    logits, vs, scores = [[] for _ in q], [], []
    for chunk in keys:
        parts = chunk.reshape(kind.num_summaries, -1, kind.dim_head)
        if kind.gate is not None:
            summaries = [(torch.softmax(part @ kind.gate[0], 0)[:, None] * part).sum(0) for part in parts]
        else:
            summaries = [part.mean(0) for part in parts]
        scores.append(max((shared_q @ s).item() * kind.scale for s in summaries))
    k = min(kind.num_chosen, len(scores))
    z = torch.tensor(scores) / kind.temperature
    shares = {
        "coordinate_descent": bisected(z, kind.num_chosen), "softmax": z.softmax(0), "top_k": torch.ones(len(z))
    }[kind.operator]  # fmt: skip
    for i in z.argsort(descending=True)[:k]:
        for j in range(kind.chunk_size):
            for head in range(len(q)):
                logits[head].append(far_q[head] @ keys[i, j] * kind.scale + shares[i].log())
            vs.append(values[i, j])
    for key, v in zip(near_k, near_v):
        for head in range(len(q)):
            logits[head].append(q[head] @ key * kind.scale)
        vs.append(v)
    return torch.stack([torch.stack(row).softmax(0) @ torch.stack(vs) for row in logits])


def oracle(stream):
    """Every token of every row by itself."""
    kind, w, c = stream.kind, stream.w, stream.kind.chunk_size
    out = torch.empty_like(stream.q)
    heads = stream.q.shape[1] // kind.kv_heads
    for b, g, at in itertools.product(range(len(stream.q)), range(kind.kv_heads), range(stream.q.shape[2])):
        start, block = stream.starts[b].item() * w, at // w
        if at < start:  # before the row was reset
            start = 0
        first = max(start, (block - stream.num_xl) * w)  # of the window
        chunks = range(max(0, (first - start) // c - kind.num_visible), (first - start) // c)
        at_tokens = [torch.arange(start + i * c, start + (i + 1) * c) for i in chunks]
        keys = [torch.stack([turned(kind, stream.k[b, g, t], t - start) for t in tokens]) for tokens in at_tokens]
        group = slice(g * heads, (g + 1) * heads)
        far_q = torch.stack([turned(kind, x, at - start) for x in stream.q[b, group, at]])
        out[b, group, at] = one_query(
            kind, stream.q[b, group, at], far_q, far_q.mean(0),
            torch.stack(keys) if keys else torch.empty(0, c, kind.dim_head),
            [stream.v[b, g, tokens] for tokens in at_tokens] and torch.stack([stream.v[b, g, t] for t in at_tokens]),
            stream.k[b, g, first : at + 1], stream.v[b, g, first : at + 1],
        )  # fmt: skip
    return out


def make(**options):
    sizes = {"kv_heads": 2, "dim_head": 4, "block_width": 4, "capacity": 16, "chunk_size": 2, "num_chosen": 3}
    kind = Router(**{**sizes, "max_blocks": 3, "scale": 0.5, **options})
    if kind.gate is not None:
        torch.nn.init.normal_(kind.gate)
        kind.gate.data[1:] = kind.gate.data[:1]
    return kind.requires_grad_(False)


variants = [
    {},
    {"operator": "softmax", "temperature": 0.5},
    {"operator": "top_k", "num_summaries": 2},
    {"summary": "gate", "temperature": 0.1},
    {"summary": "gate", "chunk_size": 4, "num_summaries": 2, "num_chosen": 2},
    {"positions": "rotary", "operator": "top_k"},
    {"chunk_size": 1, "num_chosen": 16, "positions": "rotary"},
    {"kv_heads": 1, "num_chosen": 8},
]


@pytest.mark.parametrize("options", variants, ids=str)
def test_equals_plain_loops_over_the_whole_past(options):
    stream = Stream(make(**options), 9)  # 7 blocks leave the XL memory, 4 fit: the ring wraps
    out, value = stream.run([1, 1, 3, [2, 2], 2, [1, 3]])
    torch.testing.assert_close(out, oracle(stream), **exact)
    assert value.stored.tolist() == [8 * 4 // stream.kind.chunk_size] * 2


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("num_summaries", [1, 2])
def test_all_chunks_are_brute_force_attention(positions, num_summaries):
    kind = make(capacity=32, num_chosen=16, positions=positions, num_summaries=num_summaries)
    stream = Stream(kind, 8)
    out, _ = stream.run([1, 1, 3, 3])
    if positions == "none":
        n = stream.q.shape[2]
        hidden = torch.arange(n)[:, None] < torch.arange(n)
        k, v = (x.repeat_interleave(2, 1) for x in (stream.k, stream.v))
        full = (stream.q @ k.transpose(2, 3) * kind.scale).masked_fill(hidden, minus_infinity).softmax(-1) @ v
        torch.testing.assert_close(out, full, **exact)
    torch.testing.assert_close(out, oracle(stream), **exact)


def test_rotary_positions_are_those_of_full_rotary_attention():
    """With window keys turned in the same way nothing tells a chosen token from one in the window."""
    kind = make(capacity=64, num_chosen=32, positions="rotary")
    stream = Stream(kind, 8)
    n = stream.q.shape[2]
    at = torch.arange(n).expand(2, n)
    q, k = kind.turned(stream.q, at), kind.turned(stream.k, at)
    hidden = torch.arange(n)[:, None] < torch.arange(n)
    logits = q @ k.repeat_interleave(2, 1).transpose(2, 3) * kind.scale
    full = logits.masked_fill(hidden, minus_infinity).softmax(-1) @ stream.v.repeat_interleave(2, 1)
    value, outs = kind.empty(2, q), []
    for block in range(8):
        seen = value.stored[:, None]
        if block:
            pair = [stream.blocks(x, block - 1, 1) for x in (stream.k, stream.v)]
            seen, value = kind.append(value, pair)
        (_, v), bias = stream.window(block, 1)
        turned_k = torch.nn.functional.pad(k, (0, 0, 4, 0))[:, :, None, block * 4 : block * 4 + 8]
        far_q = stream.blocks(stream.q, block, 1)[:, :, None]
        near_q = stream.blocks(q, block, 1)[:, :, None]
        outs.append(kind.read(value, seen, near_q, (turned_k, v), bias, far_q=far_q, distance=4).out)
    # before the first append nothing is seen, and a block sees what left before it began
    assert value.stored.tolist() == [14, 14]
    got = torch.cat(outs, 3).flatten(2, 3)
    torch.testing.assert_close(got, full, **exact)


def test_far_positions_are_precise():
    kind = make(dim_head=64, positions="rotary")
    x = torch.randn(1, 1, 2, 64, dtype=torch.float32)
    near, far = (kind.turned(x, torch.tensor([[start, start + 7]])) for start in (0, 1_000_000))
    products = [(x[:, :, 0] * x[:, :, 1]).sum() for x in (near, far)]
    torch.testing.assert_close(*products, rtol=0, atol=1e-4)


spans = st.one_of(st.integers(1, 7), st.sampled_from([[1, 3], [1, 1, 1, 1], [4], [2, 2]]))
plans = st.lists(spans, min_size=1, max_size=5)


@given(plans, st.integers(0, 2), st.integers(1, 4), st.sampled_from(variants[:6]), st.integers(0, 99))
def test_any_split_gives_the_same(plan, num_xl, visible_blocks, options, seed):
    torch.manual_seed(seed)
    kind = make(**{**options, "capacity": 4 * visible_blocks, "num_chosen": 1})
    plan = [*[1] * num_xl, *plan]  # the XL memory is full before blocks come several at a time
    stream = Stream(kind, sum(part if isinstance(part, int) else 1 for part in plan), num_xl=num_xl)
    one_by_one, last = stream.run([1] * stream.num_blocks)
    out, value = stream.run(plan)
    torch.testing.assert_close(out, one_by_one, **exact)
    for have, want in zip(value, last):
        torch.testing.assert_close(have, want, **exact)
    in_place, _ = stream.run(plan, in_place=True)
    torch.testing.assert_close(in_place, out, **exact)


def test_rows_that_begin_at_different_blocks():
    stream = Stream(make(), 10, batch=3, starts=[0, 3, 6])
    out, value = stream.run([1, 1, 1, 1, [2, 2], 1, 1, [1, 3], 2])
    torch.testing.assert_close(out, oracle(stream), **exact)
    assert value.stored.tolist() == [18, 12, 6]
    alone = Stream(stream.kind, 4, batch=1)
    alone.q, alone.k, alone.v = (x[2:, :, 24:] for x in (stream.q, stream.k, stream.v))
    torch.testing.assert_close(alone.run([1, 1, 2])[0], out[2:, :, 24:], **exact)


def test_nothing_comes_from_later_tokens_or_other_rows():
    stream = Stream(make(), 8)
    out, _ = stream.run([1, 1, 3, 3])
    for x in (stream.q, stream.k, stream.v):
        x[0, :, 22:] = torch.randn_like(x[0, :, 22:])
    changed, _ = stream.run([1, 1, 3, 3])
    assert torch.equal(changed[0, :, :22], out[0, :, :22]) and torch.equal(changed[1], out[1])
    assert not torch.equal(changed[0, :, 22:], out[0, :, 22:])


@pytest.mark.parametrize("everything", [False, True])
def test_few_queries_at_a_time(monkeypatch, everything):
    """The same outputs, losses and gradients, whatever is computed at once."""
    kind = make(summary="gate")
    kind.gate.requires_grad_()
    stream = Stream(kind, 6)
    leaves = [x.requires_grad_() for x in (stream.q, stream.k, stream.v)]

    def read():
        value = kind.empty(2, stream.q)
        _, value = kind.append(value, [stream.blocks(x, 0, 2) for x in (stream.k, stream.v)])
        seen, value = kind.append(value, [stream.blocks(x, 2, 3) for x in (stream.k, stream.v)])
        window, bias = stream.window(3, 3)
        q = stream.blocks(stream.q, 3, 3).unflatten(2, (3, 4))
        out, losses, *_ = kind.read(value, seen, q, window, bias, everything=everything, distil=True)
        grads = torch.autograd.grad(out.square().sum() + losses.sum(), [*leaves, kind.gate])
        return out, losses, *grads

    whole = read()
    for limit in (1, 4000, 100_000):
        monkeypatch.setattr(routing, "BYTES_AT_ONCE", limit)
        for have, want in zip(read(), whole):
            torch.testing.assert_close(have, want, **exact)


def test_gradients_reach_scores_and_store():
    kind = make(summary="gate", num_chosen=2)
    kind.gate.requires_grad_()
    blocks = [torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(2)]
    q, router_q = torch.randn(1, 4, 1, 4, 4, requires_grad=True), torch.randn(1, 4, 1, 4, 4, requires_grad=True)
    window = [torch.randn(1, 2, 1, 3, 4) for _ in range(2)]

    def read(k, v, q, router_q, gate):
        seen, value = kind.append(kind.empty(1, q), (k, v))
        value = kind.append(value, (k.roll(1, 2), v))[1]
        return kind.read(value, value.stored[:, None], q, window, router_q=router_q).out

    assert torch.autograd.gradcheck(read, (*blocks, q, router_q, kind.gate))
    seen, value = kind.append(kind.empty(1, q), blocks, detach=True)
    assert not value.k.requires_grad and not value.v.requires_grad and value.summaries.requires_grad


def test_distillation_teaches_the_router_and_nobody_else():
    kind = make(capacity=16)
    blocks = [torch.randn(2, 2, 12, 4) for _ in range(2)]
    seen, value = kind.append(kind.empty(2, blocks[0]), blocks)
    q = torch.randn(2, 4, 1, 4, 4)
    router_q = torch.randn(2, 4, 1, 4, 4, requires_grad=True)
    window = [torch.randn(2, 2, 1, 3, 4) for _ in range(2)]
    seen = value.stored[:, None]
    out, losses, *_ = kind.read(value, seen, q, window, router_q=router_q, everything=True, distil=True)
    logits = torch.einsum("bghwe,bgne->bghwn", q[:, :, 0].unflatten(1, (2, 2)), value.k.flatten(2, 3)) * kind.scale
    near = torch.einsum("bghwe,bgne->bghwn", q[:, :, 0].unflatten(1, (2, 2)), window[0][:, :, 0]) * kind.scale
    logits[..., 12:] = minus_infinity
    mass = torch.cat([logits, near], -1).softmax(-1)[..., :-3].unflatten(-1, (-1, 2)).sum(-1).mean(2)[..., :6]
    shared = router_q[:, :, 0].unflatten(1, (2, 2)).mean(2)
    scores = torch.einsum("bgwe,bgne->bgwn", shared, value.summaries[:, :, :6, 0]) * kind.scale
    want = -(mass * scores.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(losses[:, :, 0], want, **exact)
    assert not out.requires_grad
    own_q = q.clone().requires_grad_()
    taught = kind.read(value, seen, own_q, window, router_q=router_q, everything=True, distil=True).distillation
    assert torch.autograd.grad(taught.sum(), own_q, allow_unused=True) == (None,)
    optimiser = torch.optim.Adam([router_q], 0.1)
    for _ in range(200):
        optimiser.zero_grad()
        losses = kind.read(value, seen, q, window, router_q=router_q, distil=True).distillation
        losses.sum().backward()
        optimiser.step()
    assert losses.mean() < 0.9 * want.mean()


def test_the_numbers_of_chosen_chunks():
    """The key of each chunk is a unit vector; after the ring has wrapped, queries find theirs and nothing else."""
    kind = make(kv_heads=1, dim_head=16, chunk_size=4, block_width=4, capacity=16, num_chosen=1, operator="top_k")
    value = kind.empty(1, torch.zeros(1))
    for block in range(9):
        assert value.stored.tolist() == [block]
        keys = torch.eye(16)[block % 16].expand(1, 1, 4, 16)
        _, value = kind.append(value, (keys, keys))
    q = torch.eye(16)[[5, 8, 6, 7]].view(1, 1, 1, 4, 16) * 9
    reading = kind.read(value, value.stored[:, None], q, [torch.zeros(1, 1, 1, 2, 16)] * 2)
    assert reading.chunks.flatten().tolist() == [5, 8, 6, 7]
    nothing = kind.read(kind.empty(1, q), torch.zeros(1, 1, dtype=torch.int64), q, [torch.zeros(1, 1, 1, 2, 16)] * 2)
    assert nothing.chunks.flatten().tolist() == [-1] * 4


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1], [3, 1], [1, 2, 1]], ids=str)
def test_a_shifted_key_is_that_of_the_token_before(pieces):
    shifted, plain = make(key_shift=True), make()
    k, v = torch.randn(2, 2, 16, 4), torch.randn(2, 2, 16, 4)
    before = torch.nn.functional.pad(k, (0, 0, 1, 0))[:, :, :-1]
    have, want, start = shifted.empty(2, k), plain.empty(2, k), 0
    for blocks in pieces:
        here = slice(4 * start, 4 * (start + blocks))
        _, have = shifted.append(have, (k[:, :, here], v[:, :, here]))
        _, want = plain.append(want, (before[:, :, here], v[:, :, here]))
        start += blocks
    for x, y in zip(have[:4], want[:4]):
        assert torch.equal(x, y)
    rows = torch.tensor([False, True])
    _, after = shifted.append(have.forget(rows), (k[:, :, :4], v[:, :, :4]), rows=rows)
    assert torch.equal(after.newest[0], have.newest[0]) and torch.equal(after.newest[1], k[1, :, 3:4])
    assert (after.k[1, :, 0, 0] == 0).all(), "the first token of a row that begins anew has none before it"


def test_a_query_that_sees_nothing_gets_zeros():
    kind = make()
    value = kind.empty(1, torch.zeros(1))
    q, window = torch.randn(1, 2, 1, 4, 4), [torch.randn(1, 2, 1, 3, 4) for _ in range(2)]
    hidden = torch.full((1, 4, 3), minus_infinity)
    assert (kind.read(value, value.stored[:, None], q, window, hidden).out == 0).all()
    assert kind.read(value, value.stored[:, None], q, window).out.abs().max() > 0


# ----------------------------------------------------------------------------------------------------------- the value


def test_copies_only_what_changes():
    kind = make()
    blocks = [torch.randn(2, 2, 4, 4) for _ in range(2)]
    value = kind.empty(2, blocks[0])
    pointers = [x.data_ptr() for x in value[:3]]
    forgotten = value.forget(torch.tensor([True, False]))
    assert [x.data_ptr() for x in forgotten[:3]] == pointers
    before = [x.clone() for x in value]
    _, copied = kind.append(value, blocks)
    assert all(torch.equal(x, y) for x, y in zip(value, before))
    assert not {x.data_ptr() for x in copied[:3]} & set(pointers)
    _, written = kind.append(value, blocks, in_place=True)
    assert [x.data_ptr() for x in written[:3]] == pointers
    for x, y in zip(written, copied):
        assert torch.equal(x, y)


def test_reading_does_not_copy_the_store():
    kind = Router(kv_heads=1, dim_head=32, block_width=16, capacity=65_536, num_chosen=2)
    value = kind.empty(1, torch.zeros(1, dtype=torch.float32))._replace(stored=torch.tensor([4096]))
    q, window = torch.randn(1, 2, 1, 1, 32, dtype=torch.float32), [torch.randn(1, 1, 1, 8, 32, dtype=torch.float32)] * 2
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        kind.read(value, value.stored[:, None], q, window)
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert largest < value.k.numel() * 4 / 8


def test_cost_does_not_depend_on_what_was_read():
    kind = make(capacity=4096)
    stream = Stream(kind, 3)
    counts = []
    for stored in (0, 100, 10**9):
        value = kind.empty(2, stream.q)
        value = value._replace(stored=torch.full_like(value.stored, stored))
        with FlopCounterMode(display=False) as counter:
            stream.step(value, 2, 1)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


def test_store_in_bf16():
    kind, rounded = make(chunk_size=4, num_summaries=4), make(chunk_size=4, num_summaries=4, dtype=torch.bfloat16)
    assert [x.empty(1, torch.zeros(1)).summaries.shape[3] for x in (kind, rounded)] == [0, 4]
    stream = Stream(kind, 5)
    stream.k = stream.k.bfloat16().double()  # the same choices
    out, _ = stream.run([1, 1, 3])
    stream.kind = rounded
    near, value = stream.run([1, 1, 3])
    assert value.k.dtype == torch.bfloat16 and value.summaries.dtype == torch.float32
    error = (near - out).square().mean().sqrt() / out.square().mean().sqrt()
    assert 0 < error < 5e-3


def test_rows_differ_without_a_host_read():
    """On the meta device nothing can be read."""
    with torch.device("meta"):
        kind = make(positions="rotary", summary="gate")
        value = kind.empty(2, torch.empty(1))
        rows = torch.empty(2, dtype=torch.bool)
        blocks = [torch.empty(2, 2, 4, 4)] * 2
        value = value.forget(rows)
        q, window = torch.empty(2, 4, 1, 4, 4), [torch.empty(2, 2, 1, 8, 4)] * 2
        options = {"far_q": q, "distance": torch.empty(2, dtype=torch.int64), "distil": True}
        (out, losses, *_), value = kind(value, q, window, blocks=blocks, rows=rows, in_place=True, **options)
    assert out.shape == q.shape and losses.shape == (2, 2, 1, 4) and value.stored.shape == (2,)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"block_width": 6, "chunk_size": 4}, "block_width=6 is not a multiple of chunk_size=4"),
        ({"capacity": 15}, "capacity=15 is not a multiple"),
        ({"num_chosen": 9}, "num_chosen=9 is above the 8 chunks"),
        ({"num_chosen": 0}, "num_chosen must be at least 1"),
        ({"num_summaries": 3}, "chunk_size=2 is not a multiple of num_summaries=3"),
        ({"summary": "gate", "num_summaries": 2}, "summary='gate' of 1 keys"),
        ({"summary": "median"}, "summary='median'"),
        ({"positions": "xpos"}, "positions='xpos'"),
        ({"positions": "rotary", "dim_head": 3}, "dim_head=3 is odd"),
        ({"frequencies": torch.ones(2)}, "with positions='rotary'"),
        ({"operator": "sort"}, "operator='sort'"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_bad_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)


def test_bad_input():
    kind = make()
    value = kind.empty(2, torch.zeros(1))
    for shape in ((2, 2, 3, 4), (2, 2, 16, 4), (1, 2, 4, 4), (2, 1, 4, 4), (2, 2, 4)):
        with pytest.raises(ValueError, match="blocks must be keys and values"):
            kind.append(value, [torch.zeros(shape)] * 2)
    with pytest.raises(ValueError, match="in_place=True"):
        kind.append(value, [torch.zeros(2, 2, 4, 4, requires_grad=True)] * 2, in_place=True)
    q, window, seen = torch.zeros(2, 4, 1, 4, 4), [torch.zeros(2, 2, 1, 8, 4)] * 2, value.stored[:, None]
    for arguments, message in [
        ((value, seen, q[:, :3], window), "q, far_q, router_q must be"),
        ((value, seen, q, [x[:, :, 0] for x in window]), "window must be"),
        ((value, seen[:, 0], q, window), "seen must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind.read(*arguments)


def test_the_value_travels_like_any_other():
    kind = make()
    stream = Stream(kind, 6)
    out, value = stream.run([1, 1, 3, 1])
    assert isinstance(value, Store) and "2 rows" in repr(value)
    rows = torch.tensor([1, 1, 0])
    picked = Store(*(x.index_select(0, rows) for x in value))
    q = torch.randn(2, 4, 1, 4, 4)
    window, _ = stream.window(5, 1)
    want = kind.read(value, value.stored[:, None], q, window).out[rows]
    got = kind.read(picked, picked.stored[:, None], q[rows], [x[rows] for x in window]).out
    torch.testing.assert_close(got, want, **exact)
