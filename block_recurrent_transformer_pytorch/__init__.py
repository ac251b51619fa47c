"""Block-Recurrent Transformers (Hutchins et al. 2022) in PyTorch."""

from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config

__version__ = "1.0.0"
__all__ = ["BlockRecurrentTransformer", "Config"]
