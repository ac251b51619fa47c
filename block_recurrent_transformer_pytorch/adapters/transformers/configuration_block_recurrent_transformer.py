"""The options of a model as a configuration of transformers."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from transformers import PreTrainedConfig

from block_recurrent_transformer_pytorch import Config

REQUIRED = {"num_tokens": 256, "dim": 512, "depth": 6}  # transformers wants to build a configuration from nothing


class BlockRecurrentConfig(PreTrainedConfig):
    """The fields of `Config`, also under the names that transformers gives them (vocab_size, hidden_size, ...).

    Args:
        predicted_tokens: ids from this one on are read, but never predicted: padding, and marks of begin and end that
            training did not know. Their logits are the lowest number of their type. None: all are predicted.
        use_cache: whether calls in eval mode return memories and states when they do not say.

    Raises:
        ValueError: as `Config`, once a model is made, or `core` called.
    """

    model_type = "block_recurrent_transformer"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "vocab_size": "num_tokens", "hidden_size": "dim", "num_hidden_layers": "depth", "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads", "head_dim": "dim_head", "intermediate_size": "ff_dim",
        "tie_word_embeddings": "tie_embeddings",
    }  # fmt: skip

    def __init__(self, predicted_tokens: int | None = None, use_cache: bool = True, **options: Any) -> None:
        for theirs, ours in self.attribute_map.items():
            if theirs in options:
                value = options.pop(theirs)
                options.setdefault(ours, value)
        for field in fields(Config):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = options.pop(field.name, REQUIRED.get(field.name, default))
            setattr(self, field.name, list(value) if isinstance(value, tuple) else value)
        self.predicted_tokens, self.use_cache = predicted_tokens, use_cache
        super().__init__(**options)

    def core(self) -> Config:
        """The `Config` of the model itself."""
        return Config.from_dict({field.name: getattr(self, field.name) for field in fields(Config)})
