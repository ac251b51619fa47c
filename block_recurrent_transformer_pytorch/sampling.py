"""Choosing the next token from logits: temperature, filters and penalties, without a device synchronisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is chosen. Filters are applied in this order, each to what the one before left.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        repetition_penalty: positive logits of tokens seen before are divided by it, negative ones multiplied
            (Keskar et al. 2019, arXiv 1909.05858). 1 does nothing.
        filter_thres: keeps the ceil((1 - filter_thres) * vocabulary) most likely tokens, as 0.4.4 does.
        top_k: keeps the k most likely tokens.
        top_p: keeps the smallest set of most likely tokens whose probabilities add up to p (Holtzman et al. 2019).
        min_p: keeps tokens at least min_p times as likely as the most likely one.

    Raises:
        ValueError: a number out of range.
    """

    temperature: float = 1.0
    repetition_penalty: float = 1.0
    filter_thres: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a number of at least 0, not {self.temperature}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty must be a number above 0, not {self.repetition_penalty}")
        if self.filter_thres is not None and not 0 <= self.filter_thres < 1:
            raise ValueError(f"filter_thres must be at least 0 and below 1, not {self.filter_thres}")
        if self.filter_thres is not None and self.top_k is not None:
            raise ValueError(f"filter_thres={self.filter_thres} and top_k={self.top_k} both say how many to keep")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, not {self.min_p}")

    def __call__(self, logits: Tensor, seen: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Logits (b, v), and which tokens each row has seen, (b, v) bool -> the next tokens (b,), int64."""
        logits = logits.float() if logits.dtype != torch.float64 else logits
        if seen is not None and self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
        logits = self.filtered((logits - logits.amax(-1, keepdim=True)) / temperature)
        # the Gumbel trick: an argmax needs no second pass over the probabilities and no synchronisation
        uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
        noise = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(logits.dtype).tiny)))
        return (logits + noise).argmax(-1)

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits with -inf for the tokens that are not to be chosen."""
        vocabulary = logits.shape[-1]
        keep = vocabulary if self.filter_thres is None else math.ceil((1 - self.filter_thres) * vocabulary)
        keep = min(keep, self.top_k or vocabulary)
        if keep < vocabulary:
            kept = torch.full_like(logits, -math.inf)
            values, index = logits.topk(keep)
            logits = kept.scatter(-1, index, values)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = torch.empty_like(logits).scatter(-1, index, ordered.masked_fill(before >= self.top_p, -math.inf))
        if self.min_p:
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(self.min_p), -math.inf)
        return logits
