"""Block-Recurrent Transformers in transformers: importing this registers them with its Auto classes.

    import block_recurrent_transformer_pytorch.adapters.transformers
    model = AutoModelForCausalLM.from_pretrained(folder)    # a folder that adapters.export wrote
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_block_recurrent_transformer import BlockRecurrentConfig
from .modeling_block_recurrent_transformer import (
    BlockRecurrentCache,
    BlockRecurrentForCausalLM,
    BlockRecurrentModel,
    BlockRecurrentPreTrainedModel,
)
from .streaming import StreamDataset, StreamTrainer
from .tokenizer import byte_tokenizer

__all__ = [
    "BlockRecurrentCache",
    "BlockRecurrentConfig",
    "BlockRecurrentForCausalLM",
    "BlockRecurrentModel",
    "BlockRecurrentPreTrainedModel",
    "StreamDataset",
    "StreamTrainer",
    "byte_tokenizer",
]

AutoConfig.register(BlockRecurrentConfig.model_type, BlockRecurrentConfig, exist_ok=True)
AutoModel.register(BlockRecurrentConfig, BlockRecurrentModel, exist_ok=True)
AutoModelForCausalLM.register(BlockRecurrentConfig, BlockRecurrentForCausalLM, exist_ok=True)
