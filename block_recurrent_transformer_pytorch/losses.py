"""The cross-entropy of a head's logits, of which a chunk of rows exists at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .kernels import at_least_fp32, is_functional

Reduction = Literal["mean", "sum", "none"]
LOGITS_AT_ONCE = 2**23  # numbers of the largest matrix of logits that a loss makes


def cross_entropy(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, reduction: Reduction = "mean",
    weights: Tensor | None = None, ignore_index: int = -100, parameters: tuple[Tensor, ...] | None = None,
    num_tokens: int | None = None,
) -> Tensor:  # fmt: skip
    """The cross-entropy in nats of `head(hidden)` and `targets`.

    The head is called, whatever it is, for chunks of rows whose logits are at most LOGITS_AT_ONCE numbers, so that the
    logits of a long segment with a large vocabulary need not exist at once. Where the sum is wanted, the gradients of a
    chunk are taken while it is there, and nothing is computed twice: they can then be taken once, without
    `create_graph`. The losses of single tokens ("none") compute their logits again in the backward pass.

    Args:
        head: hidden states (m, d) -> logits (m, v); a module, or a function of `parameters`.
        hidden: (..., d).
        targets: (...) int64; `ignore_index` is no target.
        reduction: "mean" over the targets (with weights: the sum of weighted losses over the sum of weights, as in
            `torch.nn.functional.cross_entropy`), "sum", or "none" for the losses (...), 0 where there is no target.
        weights: (...) of the targets.
        parameters: what the head computes with, to receive gradients; default those of the module.
        num_tokens: v, if known; else all rows are taken at once.

    Raises:
        ValueError: shapes that do not agree, or an unknown reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not one of 'mean', 'sum', 'none'")
    if targets.shape != hidden.shape[:-1] or (weights is not None and weights.shape != targets.shape):
        shapes = [tuple(x.shape) for x in (hidden, targets, *([] if weights is None else [weights]))]
        raise ValueError(f"hidden (..., d), targets (...) and weights (...) do not agree: {shapes}")
    if parameters is None:
        parameters = tuple(head.parameters()) if isinstance(head, nn.Module) else ()
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    counted = (wanted != ignore_index).to(at_least_fp32(rows.new_zeros(())).dtype)
    scale = counted if weights is None else counted * weights.flatten()
    size = rows.shape[0] if num_tokens is None else max(1, LOGITS_AT_ONCE // num_tokens)

    def losses(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(at_least_fp32(head(rows)), wanted, ignore_index=ignore_index, reduction="none")

    if reduction == "none":
        return (in_chunks(losses, rows, wanted, size) * scale).view(targets.shape)
    used = tuple(parameter for parameter in parameters if parameter.requires_grad)  # a frozen one costs no gradient
    is_wanted = torch.is_grad_enabled() and (rows.requires_grad or bool(used))
    if rows.shape[0] <= size or torch.compiler.is_compiling() or is_functional() or not is_wanted:
        total = (in_chunks(losses, rows, wanted, size) * scale).sum()
    else:
        total = SummedCrossEntropy.apply(head, rows, wanted, scale, size, *used)  # type: ignore[no-untyped-call]
    if reduction == "sum":
        return total
    return total / (scale.sum().clamp(min=1) if weights is None else scale.sum())


def in_chunks(losses: Callable[[Tensor, Tensor], Tensor], rows: Tensor, wanted: Tensor, size: int) -> Tensor:
    """losses(rows, wanted) for `size` rows at a time, whose logits the backward pass computes again."""
    if rows.shape[0] <= size:
        return losses(rows, wanted)
    parts = torch.split(rows, size), torch.split(wanted, size)
    if is_functional() or not torch.is_grad_enabled():
        return torch.cat([losses(*part) for part in zip(*parts)])
    return torch.cat([
        checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in zip(*parts)
    ])  # fmt: skip


class SummedCrossEntropy(torch.autograd.Function):
    """The sum of weighted cross-entropies of head(x), `size` rows at a time, and its gradients in the same pass.

    With p = softmax(logits), the gradient of a row's logits is weight * (p - onehot(target)). From it those of x and of
    the head's parameters are taken through the head's own graph, while it is there.
    """

    @staticmethod
    def forward(
        ctx: Any, head: Callable[[Tensor], Tensor], x: Tensor, targets: Tensor, scale: Tensor, size: int,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        total, grad_x = scale.new_zeros(()), []
        summed = [at_least_fp32(torch.zeros_like(parameter)) for parameter in parameters]
        for rows, wanted, weight in zip(*(torch.split(one, size) for one in (x, targets, scale))):
            with torch.enable_grad():
                own = rows.detach().requires_grad_(ctx.needs_input_grad[1])
                logits = head(own)
            index = torch.where(weight != 0, wanted, 0)[:, None]
            p = at_least_fp32(logits.detach()).log_softmax(-1)
            total = total - (p.gather(1, index)[:, 0] * weight).sum()
            p.exp_().scatter_add_(1, index, p.new_tensor(-1).expand(index.shape))
            inputs = [one for one in (own, *parameters) if one.requires_grad]
            grad_logits = p.mul_(weight[:, None]).to(logits.dtype)
            found = list(torch.autograd.grad(logits, inputs, grad_logits, allow_unused=True))
            if own.requires_grad:
                grad_x.append(found.pop(0))
            for own_sum, grad in zip(summed, found):
                if grad is not None:
                    own_sum += at_least_fp32(grad)
        gradients = [grad.to(parameter.dtype) for grad, parameter in zip(summed, parameters)]
        ctx.save_for_backward(*([torch.cat(grad_x)] if grad_x else []), *gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss of this many logits can be differentiated once: call backward without create_graph=True, or "
                'take reduction="none" and sum the losses'
            )
        saved = [grad.to(one.dtype) * one for one in ctx.saved_tensors]
        grad_x = saved.pop(0) if ctx.needs_input_grad[1] else None
        return (None, grad_x, None, None, None, *saved)
