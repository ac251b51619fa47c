"""Low-rank adapters: W x + (ALPHA / rank) B A x, of which only A and B are trained (Hu et al. 2021, arXiv 2106.09685).

PEFT puts them into a model and names their weights. A checkpoint of training holds W, A and B, so that a run goes on to
the same bytes; whoever only reads it gets W + (ALPHA / rank) B A, for which PEFT need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import Tensor, nn

from .checks import matching

ALPHA = 16  # so that the rate need not change with the rank; no checkpoint holds it, so it has to stay
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."  # PEFT's names of W, A and B


def add(model: nn.Module, rank: int, targets: Sequence[str], argument: str = "targets") -> None:
    """Puts adapters beside linear maps, in place, and freezes everything but them. B is zero: no number changes yet.

    Args:
        rank: rows of A.
        targets: glob patterns of names of linear maps; a map whose weight is trained itself gets no adapter.
        argument: what errors call the targets.

    Raises:
        ValueError: a pattern that no frozen linear map matches.
        ImportError: PEFT is missing.
    """
    frozen = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    ]  # fmt: skip
    found = matching(frozen, targets, argument, "frozen linear maps")
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("adapters need: pip install block-recurrent-transformer-pytorch[peft]") from error
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=found), model)


def merge(weights: dict[str, Tensor]) -> None:
    """Makes the weights of a plain model of those of one with adapters, in place; does nothing where there are none.

    Raises:
        ValueError: an adapter that is not whole, or of another shape than its map.
    """
    for name in [name for name in weights if BASE in name]:
        plain, (module, _, kind) = name.replace(BASE, "."), name.partition(BASE)
        weights[plain] = weights.pop(name)
        if kind != "weight":
            continue
        try:
            down, up = weights.pop(f"{module}{DOWN}weight"), weights.pop(f"{module}{UP}weight")
            weights[plain].addmm_(up, down, alpha=ALPHA / len(down))
        except (LookupError, RuntimeError) as error:
            raise ValueError(f"the adapter of {module} cannot be merged: {error}") from error


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The adapters among the weights of a model, by name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items() if DOWN in name or UP in name}
