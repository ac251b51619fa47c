"""A BlockRecurrentTransformer as models of transformers, whose cache is what the model carries: memories and states."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import utils as generation
from transformers.utils import ModelOutput

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Memories, States, detach, rotary, select_rows
from block_recurrent_transformer_pytorch import block_recurrent_transformer_pytorch as core_module
from block_recurrent_transformer_pytorch.checks import check_ids

from .configuration_block_recurrent_transformer import BlockRecurrentConfig

CACHE_NAME = "cache" if "cache" in generation.ALL_CACHE_NAMES else "past_key_values"  # which `generate` hands on


class BlockRecurrentCache:
    """Memories and states after the tokens that were read. A call of the model moves it on; deepcopy keeps it."""

    is_compileable = False
    is_croppable = False

    def __init__(self, memories: Memories | None = None, states: States | None = None, num_read: int = 0) -> None:
        self.memories, self.states, self.num_read = memories, states, num_read
        self.is_linear, self.is_sliding = [False], [False]  # `generate` cuts off full ids what was read
        self.layers: list[Any] = []

    def __len__(self) -> int:
        return 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read, padding included."""
        return self.num_read

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> BlockRecurrentCache:
        """Rows (m,) in that order, possibly repeated."""
        if self.memories is not None and self.states is not None:
            self.memories, self.states = select_rows(self.memories, beam_idx), select_rows(self.states, beam_idx)
        return self

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.memories is not None:
            keys = self.memories.layers[0].block.k
            self.reorder_cache(torch.arange(len(keys), device=keys.device).repeat_interleave(repeats))

    def detach(self) -> BlockRecurrentCache:
        """The same without gradients' history, between segments of truncated back-propagation."""
        if self.memories is None or self.states is None:
            return BlockRecurrentCache()
        return BlockRecurrentCache(detach(self.memories), detach(self.states), self.num_read)

    def crop(self, max_length: int) -> None:
        raise NotImplementedError("a Block-Recurrent Transformer cannot go back in what it has read: keep a deepcopy")

    def activate_past_recording(self) -> None:
        raise NotImplementedError("a Block-Recurrent Transformer cannot go back, as assisted decoding would have it")


@dataclass
class BlockRecurrentOutput(ModelOutput):
    """Of the base model: (b, n, d), what was carried on, and with `output_hidden_states` depth + 1 times (b, n, d)."""

    last_hidden_state: Tensor | None = None
    if CACHE_NAME == "cache":
        cache: BlockRecurrentCache | None = None
    else:  # its name before transformers 5.24
        past_key_values: BlockRecurrentCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class BlockRecurrentCausalOutput(ModelOutput):
    """Of the language model: the loss if there were labels, logits (b, n, v), and as above."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    if CACHE_NAME == "cache":
        cache: BlockRecurrentCache | None = None
    else:
        past_key_values: BlockRecurrentCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Padding(NamedTuple):
    """Where the tokens of a padded batch stand: `order` (b, n) brings them to the front, `lengths` (b,) counts them."""

    order: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, mask: Tensor | None, batch: int, n: int) -> Padding | None:
        """From a mask over these n tokens and perhaps those before them; None if all are there."""
        if mask is None:
            return None
        if mask.ndim != 2 or len(mask) != batch or mask.shape[1] < n:
            raise ValueError(
                f"attention_mask must be (b, n) of at least ({batch}, {n}), 1 for tokens and 0 for padding, not "
                f"{tuple(mask.shape)}; masks of single pairs of tokens are not supported"
            )
        there = mask[:, -n:].bool()
        if bool(there.all()):
            return None
        return cls((~there).long().argsort(dim=1, stable=True), there.sum(dim=1))

    def to_front(self, x: Tensor) -> Tensor:
        """(b, n, d), tokens first."""
        return x.gather(1, self.order[..., None].expand_as(x))

    def back(self, x: Tensor) -> Tensor:
        """(b, n, d), tokens where they stood."""
        return x.gather(1, self.order.argsort(dim=1)[..., None].expand_as(x))


class BlockRecurrentPreTrainedModel(PreTrainedModel):
    """What the base model and the language model share: initial values, and what is possible."""

    config_class = BlockRecurrentConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True  # `generate` refuses what would have to go back
    _supports_attention_backend = False
    _supports_sdpa = True
    _no_split_modules = ("BlockRecurrentTransformer",)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, rotary.XPos):
            module.reset_tables()
            module.tables._is_hf_initialized = True  # type: ignore[attr-defined]
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()
            if self.config.init == "lecun":
                core_module.init_lecun(module)

    @property
    def core(self) -> BlockRecurrentTransformer:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        return self.core.token_emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.core.token_emb = value
        self.core.config = replace(self.core.config, num_tokens=value.num_embeddings)


class BlockRecurrentModel(BlockRecurrentPreTrainedModel):
    """Token ids -> hidden states. The model itself is `transformer`; without `with_head` it has no output layer."""

    _keys_to_ignore_on_load_unexpected = (r"to_logits\.weight",)

    def __init__(self, config: BlockRecurrentConfig, with_head: bool = False) -> None:
        super().__init__(config)
        self.transformer = BlockRecurrentTransformer(config.core())
        if not with_head:
            self.transformer.to_logits = None
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def core(self) -> BlockRecurrentTransformer:
        return self.transformer

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, cache: BlockRecurrentCache | None = None,
        past_key_values: BlockRecurrentCache | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        return_dict: bool | None = None, reset: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Reads tokens where the cache left off.

        Args:
            input_ids: (b, n), or inputs_embeds: (b, n, d).
            attention_mask: (b, m) with m >= n, whose last n columns say which of the n tokens are there; padding may
                stand anywhere. Hidden states of padding are zero.
            cache: what an earlier call returned; it is moved on. `past_key_values` is its older name.
            use_cache: whether to return one; default config.use_cache in eval mode.
            output_hidden_states: the embeddings, and what each layer gives, the last one normalised. They lie on the
                path of the gradient if the call stays within one block, without padding; copies of them do not.
            reset: (b,) bool, rows in which a new document begins.

        Raises:
            ValueError: arguments that exclude one another or are not supported, and as the model itself.
        """
        if output_attentions:
            raise ValueError("output_attentions=True is not supported: see inspecting.py of this library")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, BlockRecurrentCache):
            raise ValueError(f"cache must be a BlockRecurrentCache, not {type(cache).__name__}")
        x = inputs_embeds if input_ids is None else self.embedded(input_ids)
        assert x is not None
        padding = Padding.of(attention_mask, *x.shape[:2])
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, memories, states, layers = self.encoded(x, padding, cache, reset, bool(wanted))
        if use_cache if use_cache is not None else self.config.use_cache and not self.training:
            cache = BlockRecurrentCache() if cache is None else cache
            cache.memories, cache.states, cache.num_read = memories, states, cache.num_read + x.shape[1]
        else:
            cache = None
        output = BlockRecurrentOutput(last_hidden_state=hidden, hidden_states=layers, **{CACHE_NAME: cache})
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def embedded(self, ids: Tensor) -> Tensor:
        """(b, n) -> (b, n, d)."""
        core = self.transformer
        ids = check_ids(ids, "input_ids", core.token_emb.weight.device, core.config.num_tokens)
        return core.embed(ids)

    def encoded(
        self, x: Tensor, padding: Padding | None, cache: BlockRecurrentCache | None, reset: Tensor | None, all_: bool
    ) -> tuple[Tensor, Memories, States, tuple[Tensor, ...] | None]:
        """Embedded tokens (b, n, d) through the core."""
        core, recompute = self.transformer, self.gradient_checkpointing and self.training
        if core.config.use_checkpointing != (recompute or self.config.use_checkpointing):
            core.config = replace(core.config, use_checkpointing=recompute or self.config.use_checkpointing)
        hidden, memories, states, layers, _ = core.encode(
            x if padding is None else padding.to_front(x), reset=reset, return_layers=all_,
            xl_memories=None if cache is None else cache.memories, states=None if cache is None else cache.states,
            lengths=None if padding is None else padding.lengths,
            overwrite=cache is not None and x.shape[1] == 1 and not torch.is_grad_enabled(),
        )  # fmt: skip
        found = None if layers is None else (x, *layers[1:-1], hidden)
        if padding is not None:
            hidden = padding.back(hidden)
            found = None if found is None else (x, *(padding.back(layer) for layer in found[1:]))
        return hidden, memories, states, found


class BlockRecurrentForCausalLM(BlockRecurrentPreTrainedModel, GenerationMixin):
    """Token ids -> logits, and `generate`. The model itself is `core`."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__(config)
        self.model = BlockRecurrentModel(config, with_head=True)
        self.post_init()

    @property
    def core(self) -> BlockRecurrentTransformer:
        return self.model.transformer

    def get_output_embeddings(self) -> nn.Module | None:
        return self.core.to_logits

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.core.to_logits = new_embeddings

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, cache: BlockRecurrentCache | None = None,
        past_key_values: BlockRecurrentCache | None = None, labels: Tensor | None = None,
        shift_labels: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        return_dict: bool | None = None, reset: Tensor | None = None, num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """As the base model, and:

        Args:
            labels: (b, n) ids whose next ones are the targets, -100 for none; or shift_labels: (b, n), the targets
                themselves, so that a segment's last token has one, too.
            logits_to_keep: only of the last tokens, so many, or at these indices; 0: of all.
            num_items_in_batch: what the sum of losses is divided by, instead of the number of targets.
        """
        out = self.model(
            input_ids, attention_mask, inputs_embeds, cache, past_key_values, use_cache, output_hidden_states,
            output_attentions, return_dict=True, reset=reset,
        )  # fmt: skip
        hidden = out.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits, loss, first = self.core.logits(hidden), None, self.config.predicted_tokens
        if first is not None and first < logits.shape[-1]:
            behind = torch.arange(logits.shape[-1], device=logits.device) >= first
            logits = logits.masked_fill(behind, torch.finfo(logits.dtype).min)
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )  # fmt: skip
        output = BlockRecurrentCausalOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE_NAME: out.get(CACHE_NAME)}
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        inputs.pop("tokenizer", None)  # of stop_strings
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a Block-Recurrent Transformer has "
                "a cache of its own, of fixed size; leave the option out"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache:
            model_kwargs[CACHE_NAME] = BlockRecurrentCache()
        return True

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if expand_size > 1 and kwargs.get(CACHE_NAME) is not None:
            kwargs[CACHE_NAME] = copy.copy(kwargs[CACHE_NAME])
            kwargs[CACHE_NAME].batch_repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
