"""Block-Recurrent Transformers (Hutchins et al. 2022) in PyTorch."""

from .block_recurrent_transformer_pytorch import (
    KV,
    BlockRecurrentTransformer,
    Config,
    LayerMemory,
    Memories,
    RecurrentTrainerWrapper,
    RecurrentTrainWrapper,
    States,
    detach,
    forget_rows,
    select_rows,
)

__version__ = "1.0.0"
__all__ = [
    "KV",
    "BlockRecurrentTransformer",
    "Config",
    "LayerMemory",
    "Memories",
    "RecurrentTrainWrapper",
    "RecurrentTrainerWrapper",
    "States",
    "detach",
    "forget_rows",
    "select_rows",
]
