"""Block-Recurrent Transformers (Hutchins et al. 2022) in PyTorch."""

from .block_recurrent_transformer_pytorch import (
    Appended,
    BlockRecurrentTransformer,
    Encoded,
    Gate,
    MemoryKind,
    RecurrentTrainerWrapper,
    RecurrentTrainWrapper,
    Shares,
)
from .carried import KV, LayerMemory, Memories, Position, States, detach, forget_rows, select_rows
from .config import Config, register_gate, register_memory
from .losses import cross_entropy

__version__ = "1.1.0"
__all__ = [
    "KV",
    "Appended",
    "BlockRecurrentTransformer",
    "Config",
    "Encoded",
    "Gate",
    "LayerMemory",
    "Memories",
    "MemoryKind",
    "Position",
    "RecurrentTrainWrapper",
    "RecurrentTrainerWrapper",
    "Shares",
    "States",
    "cross_entropy",
    "detach",
    "forget_rows",
    "register_gate",
    "register_memory",
    "select_rows",
]
