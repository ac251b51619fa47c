"""Bad input is a ValueError that names the argument and the numbers. Token ids are looked at on the CPU only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .kernels import is_functional

if TYPE_CHECKING:
    from .carried import Position

ID_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def describe(value: Any) -> str:
    """A value as an error message shows it."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = f"{type(value).__module__}.{type(value).__name__}"
        return f"{kind} {value.dtype} {tuple(value.shape)}: use torch.as_tensor"
    text = repr(value)
    return text if len(text) <= 200 else f"{type(value).__name__} {text[:80]}..."


def matching(names: Iterable[str], patterns: Sequence[str], argument: str, what: str) -> list[str]:
    """The names that match any of some glob patterns, in their order; each pattern must match one."""
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            example = f", which are named like {known[len(known) // 2]}" if known else ""
            raise ValueError(f"{argument} {pattern!r} matches none of the {len(known)} {what}{example}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


def can_look(x: Tensor) -> bool:
    """Whether reading numbers of x costs nothing and breaks nothing: no GPU waits, no graph breaks."""
    is_real = x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_functional()
    return is_real and type(x) in (Tensor, torch.nn.Parameter)


def check_ids(x: Any, name: str, device: torch.device, num_tokens: int, ignore_index: int | None = None) -> Tensor:
    """Token ids (b, n), of any integer type, as int64; `ignore_index` among them counts as one."""
    if not isinstance(x, Tensor) or x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} must be token ids (b, n) with b >= 1 and n >= 1, not {describe(x)}")
    if x.dtype not in ID_TYPES:
        raise ValueError(f"{name} must be token ids of an integer type, not {describe(x)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the model is on {device}")
    if can_look(x):
        ids = x if ignore_index is None else x[x != ignore_index]
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if low < 0 or high >= num_tokens:
            raise ValueError(f"{name} holds token ids from {low} to {high}, num_tokens={num_tokens}")
    return x if x.dtype in (torch.int64, torch.int32) else x.long()


def check_embedded(x: Any, dim: int, name: str = "inputs_embeds") -> None:
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != dim or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"{name} must be (b, n, dim={dim}) floating point with b >= 1 and n >= 1, not {describe(x)}")


def check_rows(name: str, rows: Any, batch: int, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    """Whether an argument is (b,), one entry for each row; None is fine."""
    if rows is None:
        return
    if not isinstance(rows, Tensor) or rows.shape != (batch,) or rows.dtype not in dtypes:
        kind = "bool" if dtypes == (torch.bool,) else "int"
        raise ValueError(f"{name} must be ({batch},) {kind}, one for each row of x, not {describe(rows)}")
    if rows.device != device:
        raise ValueError(f"{name} is on {rows.device}, x is on {device}")


def check_lengths(lengths: Any, batch: int, n: int, device: torch.device) -> None:
    check_rows("lengths", lengths, batch, device, (torch.int32, torch.int64))
    if lengths is not None and can_look(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > n):
        raise ValueError(f"lengths={lengths.tolist()} must be from 0 to the n={n} tokens of x")


def check_count(name: str, count: Any, n: int) -> None:
    if not isinstance(count, int) or not 1 <= count <= n:
        raise ValueError(f"{name}={count} must be from 1 to the n={n} tokens of x")


def check_type(name: str, value: Any, kind: type) -> None:
    """Whether a carried value is of this library; None and [] stand for a fresh start."""
    if value is None or (isinstance(value, list) and not value) or isinstance(value, kind):
        return
    raise ValueError(
        f"{name} must be the {kind.__name__} that a call returned, not {type(value).__name__}; lists of "
        "tensors are what version 0.4.4 carried, see docs/migration.md"
    )


def check_position(position: Position, batch: int, block_width: int, reach: int) -> None:
    """Whether rows stand at offsets of a block, and hold as many complete blocks as there can be."""
    offset, extra = position.offset, position.extra_blocks
    for name, value, other in (("offset", offset, int), ("extra_blocks", extra, type(None))):
        is_rows = isinstance(value, Tensor) and value.shape == (batch,) and value.dtype == torch.int64
        if not isinstance(value, other) and not is_rows:
            raise ValueError(
                f"xl_memories: {name} must be ({batch},) int64, one for each row of x, not {describe(value)}"
            )
    if not 0 <= position.full_blocks <= reach:
        raise ValueError(f"xl_memories counts full_blocks={position.full_blocks}, this model remembers {reach}")
    if isinstance(offset, int) or can_look(offset):
        for row in [offset] if isinstance(offset, int) else offset.tolist():
            if not 0 <= row < block_width:
                raise ValueError(f"xl_memories stands at offset {row} of a block of {block_width}")
    if extra is not None and can_look(extra) and int(extra.min()) < 0:
        raise ValueError(f"xl_memories: extra_blocks={extra.tolist()} must be at least 0")


def check_tensor(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Whether a carried tensor has the shape, and the type and device, of this model."""
    if not isinstance(value, Tensor) or value.shape != shape:
        shown = tuple(value.shape) if isinstance(value, Tensor) else describe(value)
        raise ValueError(f"{name}: shape {shown}, this model and batch need {shape}")
    if value.dtype != dtype or value.device != device:
        raise ValueError(f"{name}: {value.dtype} on {value.device}, this model carries {dtype} on {device}")


def check_like(name: str, value: Any, like: Any, batch: int, device: torch.device) -> None:
    """Whether a pytree of tensors has the structure of another, and its shapes and types for that batch."""
    (leaves, structure), (wanted, expected) = tree_flatten(value), tree_flatten(like)
    if structure != expected:
        raise ValueError(f"{name} is a {type(value).__name__}, this model carries a {type(like).__name__}")
    for leaf, want in zip(leaves, wanted):
        check_tensor(name, leaf, (batch, *want.shape[1:]), want.dtype, device)
