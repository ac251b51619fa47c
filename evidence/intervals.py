"""95 % intervals of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Z = 1.959964  # of the normal distribution


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Of `right` among `asked` independent answers (Wilson 1927)."""
    share, z2 = right / asked, Z * Z
    middle = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    half = Z / (1 + z2 / asked) * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked * asked))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(right: Sequence[int], each: int, draws: int = 2000) -> tuple[float, float]:
    """Of the share of right answers where each row gave `each`, which hang together: rows are drawn anew."""
    values = torch.tensor(right, dtype=torch.float64) / each
    rows = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def interval(right: Sequence[int], each: int) -> tuple[float, float]:
    """Wilson's where rows gave one answer each or all alike; the wider of both otherwise."""
    by_answer = wilson(sum(right), len(right) * each) if each == 1 else wilson(round(sum(right) / each), len(right))
    if each == 1 or len(set(right)) == 1:
        return by_answer
    return bootstrap(right, each)
