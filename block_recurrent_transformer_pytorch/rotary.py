"""Rotary positions (Su et al. 2021, arXiv 2104.09864): frequencies, their scaling, and the tables of angles.

The scalings stretch a model over more positions than it was trained on. Their names, options and formulas are those of
`rope_parameters` in the configurations of transformers, of which a model's numbers are taken over to the last bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import Rotation


def linear(period: Tensor, base: float, *, factor: float) -> tuple[Tensor, float]:
    """All positions are divided by `factor`."""
    return 1.0 / period / factor, 1.0


def llama3(
    period: Tensor, base: float, *, factor: float, low_freq_factor: float, high_freq_factor: float,
    original_max_position_embeddings: float,
) -> tuple[Tensor, float]:  # fmt: skip
    """Slow channels are divided by `factor`, fast ones stay, those between are blended (Llama 3.1)."""
    frequency = 1.0 / period
    turns = original_max_position_embeddings / (2 * math.pi / frequency)  # within the context of the training
    share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - share) * frequency / factor + share * frequency, 1.0


def yarn(
    period: Tensor, base: float, *, factor: float, original_max_position_embeddings: float,
    attention_factor: float | None = None, beta_fast: float | None = None, beta_slow: float | None = None,
    mscale: float | None = None, mscale_all_dim: float | None = None, truncate: bool = True,
) -> tuple[Tensor, float]:  # fmt: skip
    """The same with a linear ramp over channels, and larger logits (Peng et al. 2023, arXiv 2309.00071)."""

    def channel(turns: float) -> float:
        """The channel pair that turns so often within the context of the training."""
        return len(period) * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(base)

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = channel(beta_fast or 32), channel(beta_slow or 1)
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, 2 * len(period) - 1)
    ramp = (torch.arange(len(period), dtype=torch.float32, device=period.device) - low) / (
        high - low if high != low else 0.001
    )
    kept = 1 - ramp.clamp(0, 1)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = growth(mscale) / growth(mscale_all_dim) if both else growth(1)  # type: ignore[arg-type]
    return 1.0 / (factor * period) * (1 - kept) + 1.0 / period * kept, attention_factor


SCALINGS: dict[str, Callable[..., tuple[Tensor, float]]] = {"linear": linear, "llama3": llama3, "yarn": yarn}


def check_scaling(scaling: dict[str, Any]) -> None:
    """Raises a ValueError if `Config.rotary_scaling` is not one of these with its options."""
    if not scaling:
        return
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        raise ValueError(f"rotary_scaling has the rope_type {kind!r}, which is not one of {sorted(SCALINGS)}")
    options = {name: one for name, one in inspect.signature(SCALINGS[kind]).parameters.items() if one.kind.value == 3}
    given = {name: value for name, value in scaling.items() if name != "rope_type"}
    if unknown := sorted(given.keys() - options.keys()):
        raise ValueError(f"rotary_scaling {kind!r} has no {unknown}, but {sorted(options)}")
    if missing := [name for name, one in options.items() if one.default is one.empty and given.get(name) is None]:
        raise ValueError(f"rotary_scaling {kind!r} lacks {missing}")
    for name, value in given.items():
        if name != "truncate" and value is not None and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"rotary_scaling: {name} must be a positive number, not {value!r}")


def frequencies(dim_head: int, base: float, scaling: dict[str, Any], device: torch.device) -> tuple[Tensor, float]:
    """What each pair of channels turns by in a position, (e/2,), and a factor of turned queries and keys.

    base^(-2i/e), then scaled. In fp32 whatever the type of the model is, so that all agree on them.
    """
    period = base ** (torch.arange(0, dim_head, 2, device=device, dtype=torch.float32) / dim_head)
    if not scaling:
        return 1.0 / period, 1.0
    options = {name: value for name, value in scaling.items() if name != "rope_type"}
    return SCALINGS[scaling["rope_type"]](period, base, **options)


class Rotary(nn.Module):
    """Rotary positions over all channels, the two halves of a head as pairs.

    Only differences of positions matter. The tables are kept in fp32 (fp64 in an fp64 model) whatever the type of the
    model is, for positions -low ... high - 1.
    """

    def __init__(
        self, dim_head: int, low: int, high: int, base: float = 10000.0, scaling: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.dim_head, self.low, self.high = dim_head, low, high
        self.base, self.scaling = base, scaling or {}
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
        frequency, factor = frequencies(self.dim_head, self.base, self.scaling, device)
        position = torch.arange(-self.low, self.high, device=device, dtype=dtype)[:, None]
        angle = position * frequency.to(dtype)
        cos, sin = angle.cos() * factor, angle.sin() * factor
        return torch.stack(self.decayed(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1), position))

    def decayed(self, cos: Tensor, sin: Tensor, position: Tensor) -> list[Tensor]:
        """Cosine and sine for queries, and for keys, from those (p, e) of positions (p, 1): there is no decay."""
        return [cos, sin, cos, sin]

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
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


class XPos(Rotary):
    """Rotary positions with the xPos decay (Sun et al. 2022, arXiv 2212.10554).

    Queries are scaled by zeta_i^(position / 512), keys by its inverse, with zeta_i = (2i + 0.4 e) / (1.4 e).
    """

    SCALE_BASE = 512

    def decayed(self, cos: Tensor, sin: Tensor, position: Tensor) -> list[Tensor]:
        even = torch.arange(0, self.dim_head, 2, device=position.device, dtype=torch.float32)
        zeta = (even + 0.4 * self.dim_head) / (1.4 * self.dim_head)
        decay = zeta.to(position.dtype) ** (position / self.SCALE_BASE)
        decay = torch.cat((decay, decay), dim=-1)
        return [cos * decay, sin * decay, cos / decay, sin / decay]


ROTARIES: dict[str, type[Rotary]] = {"xpos": XPos, "rotary": Rotary}  # by `Config.positions`
