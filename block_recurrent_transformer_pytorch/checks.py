"""Bad input is a ValueError that names the argument and the numbers. Token ids are looked at on the CPU only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ID_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def describe(value: Any) -> str:
    """A value as an error message shows it."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else f"{type(value).__name__} {text[:80]}..."


def can_look(x: Tensor) -> bool:
    """Whether reading numbers of x costs nothing and breaks nothing: no GPU waits, no graph breaks."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def check_ids(x: Any, name: str, device: torch.device, num_tokens: int) -> Tensor:
    """Token ids (b, n), of any integer type, as int64 or int32."""
    if not isinstance(x, Tensor) or x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} must be token ids (b, n) with b >= 1 and n >= 1, not {describe(x)}")
    if x.dtype not in ID_TYPES:
        raise ValueError(f"{name} must be token ids of an integer type, not {describe(x)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the model is on {device}")
    if can_look(x) and (int(x.min()) < 0 or int(x.max()) >= num_tokens):
        low, high = int(x.min()), int(x.max())
        raise ValueError(f"{name} holds token ids from {low} to {high}, num_tokens={num_tokens}")
    return x if x.dtype in (torch.int64, torch.int32) else x.long()
