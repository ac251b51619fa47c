"""Numerics that the model is built of: unit vectors, rotations, and what the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    has_any = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_any else nullcontext()


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """The type that products of `weight` have under the autocast in force."""
    kind = weight.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def is_functional() -> bool:
    """Whether torch.func is at work: no hooks of `checkpoint` then, and no tensor has numbers to look at."""
    return torch._C._are_functorch_transforms_active()


def called_in_fp32(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) in the type of x, for modules whose parameters are of a narrower one."""
    own = dict(module.named_parameters())
    wider = {name: parameter.to(x.dtype) for name, parameter in own.items() if parameter.dtype != x.dtype}
    result: Tensor = torch.func.functional_call(module, wider, (x,)) if wider else module(x)
    return result


RECOMPUTED_FROM = 2**18  # numbers of the largest input from which it is worth the calls


def recomputed(function: Callable[..., Any], *inputs: Tensor | None, draws: bool = False) -> Any:
    """function(*inputs), of which the backward pass keeps the inputs alone.

    For something cheap that ends in a matrix product: the product is not computed again, because recomputation stops
    with what it takes in. And for something small that keeps much, the write of a state. `draws` says that the function
    takes random numbers, and so will the same ones again.
    """
    if max(x.numel() for x in inputs if x is not None) < RECOMPUTED_FROM:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws)


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
        if gain is None or not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, (grad * y).sum_to_size(gain.shape).to(gain.dtype)


def unit(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """x (..., e) / |x| * gain."""
    if not torch.is_grad_enabled():
        return Unit.forward(x, gain)  # `apply` takes three times as long for a single token
    result: Tensor = Unit.apply(x, gain)  # type: ignore[no-untyped-call]
    return result


class Rotation(NamedTuple):
    """cos and sin of the angles of some positions, times their xPos factor. Each (..., j, e), at least fp32.

    The sine has a minus sign in the first half of the channels, which takes from the second.
    """

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, table: Rotation | None) -> Tensor:
    """x (..., j, e) turned by its positions."""
    if table is None:
        return x
    turned = x.roll(x.shape[-1] // 2, dims=-1)  # the other of each pair
    return torch.addcmul(x * table.cos, turned, table.sin).to(x.dtype)
