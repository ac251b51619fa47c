"""What no implementation can do without: the matrix products of a training step, the weights read for a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config

from .measure import DEVICE


class Product(NamedTuple):
    """`count` times the products (b, m, k) @ (b, k, n)."""

    b: int
    m: int
    k: int
    n: int
    count: int = 1


def linear(rows: int, inputs: int, outputs: int, count: int = 1) -> list[Product]:
    """A linear map: x W^T, and backward g W and g^T x."""
    shapes = ((rows, inputs, outputs), (rows, outputs, inputs), (outputs, rows, inputs))
    return [Product(1, *shape, count) for shape in shapes]


AT_ONCE = 2**18  # elements of attention matrices in one product: they stay in the cache, as a flash kernel's do


def attention(heads: int, rows: int, width: int, keys: int) -> list[Product]:
    """Every query with every key, in so many heads: q k^T and p v; backward, the gradients of v, p, q and k."""
    out = (rows, width, keys), (rows, keys, width)
    back = (keys, rows, width), (rows, width, keys), (rows, keys, width), (keys, rows, width)
    group = min(heads, max(1, AT_ONCE // (rows * keys)))
    return [Product(group, *shape, -(-heads // group)) for shape in (*out, *back)]


def step_products(config: Config, batch: int, length: int) -> list[Product]:
    """All products of a training step with full memories. The update of a state is that of `state_update="skip"`."""
    inner, groups, e = config.heads * config.dim_head, config.kv_heads, config.dim_head
    w, s, dim, tokens = config.block_width, config.num_state_vectors, config.dim, batch * length
    blocks = length // w
    products = linear(tokens, dim, config.num_tokens)
    hidden = config.ff_dim * (1 if config.ff_activation == "relu" else 2)
    for layer in range(1, config.depth + 1):
        reads = len(config.reads(layer))
        products += linear(tokens, dim, inner, 1 + reads) + linear(tokens, dim, 2 * groups * e)
        products += linear(tokens, inner * (1 + reads), dim)
        products += linear(tokens, dim, hidden) + linear(tokens, config.ff_dim, dim)
        products += attention(batch * blocks * config.heads, w, e, w + config.xl_width(layer))
        products += attention(batch * blocks * config.heads, w, e, s) * reads
    for _ in config.recurrent_layers:
        products += linear(batch * s, dim, 2 * groups * e, blocks) + linear(batch * s, dim, inner, 2 * blocks)
        products += linear(batch * s, 2 * inner, dim, blocks)
        products += attention(batch * config.heads, s, e, s) * blocks
        products += attention(batch * config.heads, s, e, w) * blocks
    return [product for product in products if product.count]


def limit_step(options: dict[str, Any], batch: int, use_bf16: bool = False) -> Callable[[], None]:
    """The products alone, each into a new output."""
    config = Config(**options)
    dtype = torch.bfloat16 if use_bf16 else torch.float32
    buffers: dict[tuple[int, ...], Tensor] = {}

    def factor(*shape: int) -> Tensor:
        if shape not in buffers:
            buffers[shape] = torch.randn(shape, device=DEVICE, dtype=dtype)
        return buffers[shape]

    work = []
    for b, m, k, n, count in step_products(config, batch, config.max_seq_len):
        work += [(factor(b, m, k), factor(b, k, n))] * count

    def step() -> None:
        for left, right in work:
            torch.bmm(left, right) if len(left) > 1 else torch.mm(left[0], right[0])

    return step


def weights_once(options: dict[str, Any], batch: int) -> Callable[[], None]:
    """Every weight that a token meets, read once: the linear maps of the layers, without those of the states."""
    model = BlockRecurrentTransformer(**options).to(DEVICE)
    maps = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".cell." not in name]
    work = [(torch.randn(batch, 1, weight.shape[1], device=DEVICE), weight) for weight in maps]

    def step() -> None:
        with torch.no_grad():
            for x, weight in work:
                F.linear(x, weight)

    return step
