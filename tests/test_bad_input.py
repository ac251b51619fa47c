"""Wrong input is a ValueError (of beartype's for a wrong type) whose message names the argument and the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Config,
    Memories,
    RecurrentTrainWrapper,
    forget_rows,
    select_rows,
)

WRONG = (ValueError, BeartypeCallHintViolation)
SIZES = {
    "num_tokens": 11, "dim": 8, "depth": 2, "dim_head": 4, "heads": 2, "block_width": 4, "max_seq_len": 8,
    "num_state_vectors": 3,
}  # fmt: skip


def small_model(**options: Any) -> BlockRecurrentTransformer:
    return BlockRecurrentTransformer(**{**SIZES, **options}).eval()


MODEL = small_model()
WRAPPER = RecurrentTrainWrapper(MODEL)
TOKENS = torch.arange(10).view(2, 5)
with torch.no_grad():
    _, MEMORIES, STATES = MODEL(TOKENS)  # with ready keys, and keys and values of states


def at(**position: object) -> Memories:
    """The memories, at another position."""
    return MEMORIES._replace(position=MEMORIES.position._replace(**position))


def says(call: Callable[[], Any], *words: object) -> None:
    """`call` raises, and the message holds all the words."""
    with pytest.raises(WRONG) as caught:
        call()
    message = str(caught.value)
    missing = [word for word in words if str(word) not in message]
    assert not missing, f"{missing} not in: {message}"


def cases(names: Iterable[str]) -> Any:
    return pytest.mark.parametrize("name", list(names))


# ------------------------------------------------------------------------------------------------------------- config

CONFIGS: list[tuple[dict[str, Any], tuple[object, ...]]] = [
    ({"num_tokens": 0}, ("num_tokens", 0)),
    ({"dim": -8}, ("dim", -8)),
    ({"depth": 0}, ("depth", 0)),
    ({"dim_head": 0}, ("dim_head", 0)),
    ({"heads": 0}, ("heads", 0)),
    ({"kv_heads": 0}, ("kv_heads", 0)),
    ({"ff_mult": 0}, ("ff_mult", 0)),
    ({"ff_dim": 0}, ("ff_dim", 0)),
    ({"max_seq_len": 0}, ("max_seq_len", 0)),
    ({"block_width": 0}, ("block_width", 0)),
    ({"num_state_vectors": 0}, ("num_state_vectors", 0)),
    ({"compressed_mem_factor": 0}, ("compressed_mem_factor", 0)),
    ({"num_xl_blocks": -1}, ("num_xl_blocks", -1)),
    ({"qk_norm_scale": 0.0}, ("qk_norm_scale", 0.0)),
    ({"qk_norm_scale": math.nan}, ("qk_norm_scale", "nan")),
    ({"qk_norm_scale": math.inf}, ("qk_norm_scale", "inf")),
    ({"attn_dropout": 1.0}, ("attn_dropout", 1.0)),
    ({"ff_dropout": -0.1}, ("ff_dropout", -0.1)),
    ({"emb_dropout": 1.5}, ("emb_dropout", 1.5)),
    ({"attn_input_dropout": math.nan}, ("attn_input_dropout", "nan")),
    ({"output_dropout": 2}, ("output_dropout", 2)),
    ({"heads": 6, "kv_heads": 4}, ("heads=6", "kv_heads=4")),
    ({"max_seq_len": 10}, ("max_seq_len=10", "block_width=4")),
    ({"max_seq_len": 2}, ("max_seq_len=2", "block_width=4")),
    ({"recurrent_layers": (3,)}, ("recurrent_layers", 3, "depth=2")),
    ({"recurrent_layers": (0,)}, ("recurrent_layers", 0, "depth=2")),
    ({"recurrent_layers": (-1,)}, ("recurrent_layers", -1, "depth=2")),
    ({"recurrent_layers": (1, 1)}, ("recurrent_layers", "(1, 1)", "twice")),
    ({"xl_layers": (5,)}, ("xl_layers", 5, "depth=2")),
    ({"xl_layers": (2, 2)}, ("xl_layers", "(2, 2)", "twice")),
    ({"read_recurrent_layers": (1, 2)}, ("read_recurrent_layers", "(1, 2)", "recurrent_layers=(1,)")),
    ({"read_recurrent_layers": ()}, ("read_recurrent_layers", "()", "recurrent_layers=(1,)")),
    ({"read_recurrent_layers": (2,)}, ("read_recurrent_layers", "(2,)", "above", "recurrent_layers=(1,)")),
    ({"read_recurrent_layers": (0,)}, ("read_recurrent_layers", "[0]", "depth=2")),
    # wrong types
    ({"dim": 8.0}, ("dim", 8.0)),
    ({"dim": "8"}, ("dim", "'8'")),
    ({"depth": None}, ("depth", None)),
    ({"positions": "rope"}, ("positions", "rope")),
    ({"gate": "gru"}, ("gate", "gru")),
    ({"recurrent_layers": 1}, ("recurrent_layers", 1)),
    ({"recurrent_layers": (1.0,)}, ("recurrent_layers", 1.0)),
    ({"use_compressed_mem": "yes"}, ("use_compressed_mem", "yes")),
]

# One or more for each entry of Config._conflicts, in its order.
CONFLICTS: list[tuple[dict[str, Any], tuple[object, ...]]] = [
    (
        {"enhanced_recurrence": True, "use_compressed_mem": True},
        ("enhanced_recurrence=True", "use_compressed_mem=True"),
    ),
    ({"enhanced_recurrence": True, "qk_norm": "head"}, ("enhanced_recurrence=True", "qk_norm='head'", "(1,)")),
    ({"enhanced_recurrence": True, "num_xl_blocks": 0}, ("enhanced_recurrence=True", "num_xl_blocks=0")),
    ({"enhanced_recurrence": True, "xl_layers": (1,)}, ("enhanced_recurrence=True", "xl_layers=(1,)")),
    ({"attention_window": "sliding", "num_xl_blocks": 2}, ("attention_window='sliding'", "num_xl_blocks=2")),
    (
        {"attention_window": "sliding", "use_compressed_mem": True},
        ("attention_window='sliding'", "use_compressed_mem=True"),
    ),
    ({"empty_memory": "zeros", "use_compressed_mem": True}, ("empty_memory='zeros'", "use_compressed_mem=True")),
    ({"use_compressed_mem": True, "num_xl_blocks": 0}, ("use_compressed_mem=True", "num_xl_blocks=0")),
    ({"use_compressed_mem": True, "xl_layers": ()}, ("use_compressed_mem=True", "xl_layers=()")),
    ({"compressed_mem_pooling": "max"}, ("compressed_mem_pooling='max'", "use_compressed_mem=True")),
    ({"use_compressed_mem": True, "compressed_mem_factor": 5}, ("compressed_mem_factor=5", "block_width=4")),
    (
        {"use_compressed_mem": True, "block_width": 1, "max_seq_len": 1, "compressed_mem_factor": 1},
        ("use_compressed_mem=True", "block_width", 1),
    ),
    ({"block_feedback": True, "recurrent_layers": ()}, ("block_feedback=True", "recurrent_layers=()")),
    (
        {"block_feedback": True, "recurrent_layers": (2,), "read_recurrent_layers": (1,)},
        ("block_feedback=True", "read_recurrent_layers=(1,)"),
    ),
    ({"all_layers_qk_rmsnorm": True, "qk_norm": "none"}, ("all_layers_qk_rmsnorm=True", "qk_norm='none'")),
    ({"positions": "xpos", "dim_head": 5}, ("positions='xpos'", "dim_head=5")),
    ({"tokens_qk_norm": "rms", "all_layers_qk_rmsnorm": True}, ("tokens_qk_norm='rms'", "all_layers_qk_rmsnorm")),
    ({"tokens_qk_norm": "none", "qk_norm": "head"}, ("tokens_qk_norm='none'", "qk_norm='head'")),
    ({"tokens_qk_norm": "head"}, ("tokens_qk_norm='head'", "qk_norm='channel'")),
    ({"rotary_base": 5.0, "positions": "t5"}, ("rotary_base=5.0", "'t5'")),
    ({"rotary_scaling": {"rope_type": "linear", "factor": 2.0}, "positions": "none"}, ("rotary_scaling", "'none'")),
    ({"unrotated_layers": (1,), "positions": "dynamic"}, ("unrotated_layers=(1,)", "'dynamic'")),
    ({"state_update": "token_gated"}, ("state_update='token_gated'", "gate='hard'", "'fixed'")),
    (
        {"state_update": "token_gated", "gate": "hard", "state_reads_memory": True},
        ("state_update='token_gated'", "state_reads_memory=True"),
    ),
    (
        {"state_update": "token_gated", "gate": "hard", "enhanced_recurrence": True},
        ("state_update='token_gated'", "enhanced_recurrence=True"),
    ),
]


@pytest.mark.parametrize(("options", "words"), CONFIGS + CONFLICTS, ids=lambda value: str(value)[:60])
def test_config(options, words):
    says(lambda: Config(**{**SIZES, **options}), *words)
    says(lambda: BlockRecurrentTransformer(**{**SIZES, **options}), *words)


def test_every_conflict_has_a_case():
    """Each entry of the table says no to one of the cases, and to nothing in a valid config."""
    hit = set()
    for options, _ in CONFLICTS:
        wrong = replace(Config(**SIZES))  # a copy to set fields of that the checks would refuse
        for name, value in options.items():
            object.__setattr__(wrong, name, value)
        if "recurrent_layers" in options and "read_recurrent_layers" not in options:
            object.__setattr__(wrong, "read_recurrent_layers", options["recurrent_layers"])
        hit |= {i for i, (is_wrong, _) in enumerate(wrong._conflicts()) if is_wrong}
    table = Config(**SIZES)._conflicts()
    assert hit == set(range(len(table)))
    assert not any(is_wrong for is_wrong, _ in table)


MAKERS: dict[str, tuple[Callable[[], Any], tuple[object, ...]]] = {
    "config and options": (lambda: BlockRecurrentTransformer(Config(**SIZES), dim=8), ("config", "dim")),
    "config a dict": (lambda: BlockRecurrentTransformer(SIZES), ("config", "num_tokens")),
    "from_dict with an unknown name": (lambda: Config.from_dict({**asdict(Config(**SIZES)), "width": 3}), ("width",)),
    "from_dict with a wrong value": (lambda: Config.from_dict({**asdict(Config(**SIZES)), "dim": 0}), ("dim", 0)),
    "ff_mult nan": (lambda: Config(**SIZES, ff_mult=math.nan), ("ff_mult", "nan")),
    "ff_mult inf": (lambda: Config(**SIZES, ff_mult=math.inf), ("ff_mult", "inf")),
}


@cases(MAKERS)
def test_making_a_config(name):
    call, words = MAKERS[name]
    says(call, *words)


@pytest.mark.parametrize("options", [{"num_tokens": 11, "dim": 8}, {**SIZES, "width": 3}])
def test_missing_and_unknown_keywords_are_pythons_errors(options):
    with pytest.raises(TypeError, match=r"depth|width"):
        BlockRecurrentTransformer(**options)


# ------------------------------------------------------------------------------------------------------------ forward


def carried_by(batch: int = 2, tokens: int = 5, dtype: torch.dtype = torch.float32, **options: Any) -> tuple:
    """Memories and states of another model."""
    with torch.no_grad():
        return small_model(**options).to(dtype)(torch.zeros(batch, tokens, dtype=torch.long))[1:]


def forward(x: Any = TOKENS, model: BlockRecurrentTransformer = MODEL, **options: Any) -> Callable[[], Any]:
    return lambda: model(x, **options)


def with_memories(**options: Any) -> Callable[[], Any]:
    return lambda: MODEL(TOKENS, xl_memories=carried_by(**options)[0])


def with_states(**options: Any) -> Callable[[], Any]:
    return lambda: MODEL(TOKENS, states=carried_by(**options)[1])


def bools(*rows: bool) -> torch.Tensor:
    return torch.tensor(rows)


FORWARD: dict[str, tuple[Callable[[], Any], tuple[object, ...]]] = {
    "token id too large": (forward(TOKENS + 2), ("x", 11, "num_tokens=11")),
    "token id far too large": (forward(TOKENS + 2**40), (2**40, "num_tokens=11")),
    "token id negative": (forward(TOKENS - 1), ("x", -1, "num_tokens=11")),
    "padding without a loss": (forward(TOKENS - 100), (-100, "num_tokens=11")),
    "token ids float": (forward(TOKENS.float()), ("x", "float32")),
    "token ids bool": (forward(TOKENS > 2), ("x", "bool")),
    "token ids complex": (forward(TOKENS.to(torch.complex64)), ("x", "complex64")),
    "no tokens": (forward(TOKENS[:, :0]), ("x", "(2, 0)")),
    "no rows": (forward(TOKENS[:0]), ("x", "(0, 5)")),
    "1-D": (forward(TOKENS[0]), ("x", "(5,)")),
    "3-D": (forward(TOKENS[None]), ("x", "(1, 2, 5)")),
    "0-D": (forward(torch.tensor(1)), ("x", "()")),
    "a list": (forward([[1, 2]]), ("x", "[[1, 2]]")),
    "None": (forward(None), ("x", "inputs_embeds")),
    "numpy": (forward(np.zeros((2, 3), dtype=np.int64)), ("x", "array")),
    "tokens on another device": (forward(TOKENS.to("meta")), ("x", "meta", "cpu")),
    "memories as lists of tensors": (
        forward(xl_memories=[torch.zeros(2, 2, 4, 4)] * 2), ("xl_memories", "Memories", "list", "migration"),
    ),
    "states as lists of tensors": (forward(states=[torch.zeros(2, 3, 8)]), ("states", "States", "list", "migration")),
    "a tensor for memories": (forward(xl_memories=torch.zeros(2)), ("xl_memories", "Memories", "Tensor")),
    "states for memories": (forward(xl_memories=STATES), ("xl_memories", "Memories", "States")),
    "ids as numbers": (lambda: small_model()(TOKENS.float()), ("x", "integer", "torch.float32 (2, ")),
    "overwrite with gradients": (forward(overwrite=True), ("overwrite=True", "gradients")),
    "memories for states": (forward(states=MEMORIES), ("states", "States", "Memories")),
    "a tuple for memories": (forward(xl_memories=(1, 2)), ("xl_memories", "Memories", "tuple")),
    "an empty tuple for memories": (forward(xl_memories=()), ("xl_memories", "Memories", "tuple")),
    "zero for states": (forward(states=0), ("states", "States", "int")),
    "memories of another batch": (with_memories(batch=3), ("xl_memories", "(3, 1, 4, 4)", "(2, 1, 4, 4)")),
    "memories of another depth": (with_memories(depth=3), ("xl_memories", 3, "depth=2")),
    "memories of another dtype": (with_memories(dtype=torch.float64), ("xl_memories", "float64", "float32")),
    "memories of another width": (
        with_memories(block_width=8), ("xl_memories", "(2, 1, 8, 4)", "(2, 1, 4, 4)"),
    ),
    "memories of another head size": (with_memories(dim_head=8), ("xl_memories", "(2, 1, 4, 8)", "(2, 1, 4, 4)")),
    "memories of more key/value heads": (with_memories(kv_heads=2), ("xl_memories", "(2, 2, 4, 4)", "(2, 1, 4, 4)")),
    "memories of two blocks": (with_memories(num_xl_blocks=2), ("xl_memories", "(2, 1, 8, 4)", "(2, 1, 4, 4)")),
    "memories of none": (with_memories(num_xl_blocks=0), ("xl_memories", "(2, 1, 0, 4)", "(2, 1, 4, 4)")),
    "compressed memories for a model without": (
        with_memories(use_compressed_mem=True), ("xl_memories", "compressed", "this model has ['xl']"),
    ),
    "no compressed memories for a model with": (
        lambda: small_model(use_compressed_mem=True)(TOKENS, xl_memories=MEMORIES),
        ("xl_memories", "this model has ['compressed', 'xl']"),
    ),
    "memories at a place outside the block": (
        forward(xl_memories=at(offset=4)), ("xl_memories", "offset 4", "4"),
    ),
    "memories at a float place": (forward(xl_memories=at(offset=1.5)), ("xl_memories", "offset", 1.5)),
    "memories at float places": (
        forward(xl_memories=at(offset=torch.tensor([1.0, 2.0]))), ("xl_memories", "offset", "float32"),
    ),
    "too few rows ahead": (
        forward(xl_memories=at(extra_blocks=torch.tensor([1]))), ("xl_memories", "extra_blocks", "(2,)", "(1,)"),
    ),
    "a negative number ahead": (
        forward(xl_memories=at(extra_blocks=torch.tensor([-5, 0]))), ("xl_memories", "extra_blocks", "[-5, 0]"),
    ),
    "memories at a negative place": (forward(xl_memories=at(offset=-1)), ("xl_memories", "offset -1")),
    "memories at too few places": (
        forward(xl_memories=at(offset=torch.tensor([1]))), ("xl_memories", "offset", "(1,)", "(2,)"),
    ),
    "memories at a row's place outside the block": (
        forward(xl_memories=at(offset=torch.tensor([1, 7]))), ("xl_memories", "offset", 7),
    ),
    "memories of too many blocks": (forward(xl_memories=at(full_blocks=9)), ("xl_memories", "full_blocks", 9)),
    "memories on another device": (
        forward(xl_memories=torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), MEMORIES)),
        ("xl_memories", "meta", "cpu"),
    ),
    "states of another batch": (with_states(batch=1), ("states", "(1, 3, 8)", "(2, 3, 8)")),
    "states of another number": (with_states(num_state_vectors=4), ("states", "(2, 4, 8)", "(2, 3, 8)")),
    "states of another dim": (with_states(dim=16), ("states", "(2, 3, 16)", "(2, 3, 8)")),
    "states of more layers": (with_states(recurrent_layers=(1, 2)), ("states", 2, "recurrent_layers")),
    "states of no layer": (with_states(recurrent_layers=()), ("states", 0, "recurrent_layers")),
    "states of another dtype": (with_states(dtype=torch.float64), ("states", "float64", "float32")),
    "states with the views of another model": (
        forward(states=STATES._replace(kv=carried_by(kv_heads=2)[1].kv)), ("states", "(2, 2, 3, 4)"),
    ),
    "states with views of too few layers": (
        lambda: small_model(recurrent_layers=(1, 2))(
            TOKENS, states=carried_by(recurrent_layers=(1, 2))[1]._replace(kv=STATES.kv)
        ),
        ("states", "keys and values", 1, 2),
    ),
    "reset of another batch": (forward(reset=bools(True, False, True)), ("reset", "(2,)", "(3,)")),
    "reset of ints": (forward(reset=torch.tensor([1, 0])), ("reset", "bool", "int64")),
    "reset 2-D": (forward(reset=torch.zeros(2, 1, dtype=torch.bool)), ("reset", "(2,)", "(2, 1)")),
    "reset as a list": (forward(reset=[True, False]), ("reset", "[True, False]")),
    "reset as one bool": (forward(reset=True), ("reset", "True")),
    "lengths on another device": (
        forward(lengths=torch.ones(2, dtype=torch.long, device="meta")), ("lengths", "meta", "cpu"),
    ),
    "reset on another device": (forward(reset=torch.zeros(2, dtype=torch.bool, device="meta")), ("reset", "meta")),
    "reset_states of another batch": (forward(reset_states=bools(True)), ("reset_states", "(2,)", "(1,)")),
    "reset_states of floats": (forward(reset_states=torch.zeros(2)), ("reset_states", "bool", "float32")),
    "lengths of another batch": (forward(lengths=torch.tensor([1, 2, 3])), ("lengths", "(2,)", "(3,)")),
    "lengths of floats": (forward(lengths=torch.tensor([1.0, 2.0])), ("lengths", "float32")),
    "lengths of bools": (forward(lengths=bools(True, True)), ("lengths", "bool")),
    "lengths as a list": (forward(lengths=[1, 2]), ("lengths", "[1, 2]")),
    "lengths negative": (forward(lengths=torch.tensor([3, -1])), ("lengths", -1, "n=5")),
    "lengths too large": (forward(lengths=torch.tensor([3, 6])), ("lengths", 6, "n=5")),
    "logits_to_keep 0": (forward(logits_to_keep=0), ("logits_to_keep=0", "n=5")),
    "logits_to_keep negative": (forward(logits_to_keep=-1), ("logits_to_keep=-1", "n=5")),
    "logits_to_keep too large": (forward(logits_to_keep=6), ("logits_to_keep=6", "n=5")),
    "logits_to_keep float": (forward(logits_to_keep=1.5), ("logits_to_keep", 1.5)),
    "a loss of one token": (forward(TOKENS[:, :1], return_loss=True), ("x", "return_loss", "(2, 1)")),
    "a loss of 1-D": (forward(TOKENS[0], return_loss=True), ("x", "return_loss", "(5,)")),
    "a loss of no rows": (forward(TOKENS[:0], return_loss=True), ("x", "(0, ")),
    "a loss with logits_to_keep": (forward(return_loss=True, logits_to_keep=1), ("return_loss", "logits_to_keep")),
    "a loss with hidden states": (forward(return_loss=True, return_hidden=True), ("return_loss", "return_hidden")),
    "a loss on a target too large": (forward(TOKENS + 2, return_loss=True), ("x", 11, "num_tokens=11")),
    "a loss on a negative target that is not ignored": (forward(TOKENS - 1, return_loss=True), ("x", -1, "num_tokens")),
    "a loss on floats": (forward(TOKENS.float(), return_loss=True), ("x", "float32")),
    "a loss with lengths of the targets too": (forward(return_loss=True, lengths=torch.tensor([5, 5])), (5, "n=4")),
    "init_memories 0": (lambda: MODEL.init_memories(0), ("batch", 0)),
    "init_memories negative": (lambda: MODEL.init_memories(-2), ("batch", -2)),
    "init_states 0": (lambda: MODEL.init_states(0), ("batch", 0)),
    "forget_rows of another batch": (lambda: forget_rows(MEMORIES, bools(True)), ("rows", "(1,)", "(2,)")),
    "forget_rows of ints": (lambda: forget_rows(MEMORIES, torch.tensor([0, 1])), ("rows", "int64")),
    "select_rows out of range": (lambda: select_rows(MEMORIES, torch.tensor([0, 2])), ("rows", 2)),
    "select_rows of floats": (lambda: select_rows(MEMORIES, torch.tensor([0.0])), ("rows", "float32")),
    "select_rows of a list": (lambda: select_rows(MEMORIES, [0, 1]), ("rows", "[0, 1]")),
    "forget_rows of a list": (lambda: forget_rows(MEMORIES, [True, False]), ("rows", "(2,) bool", "[True, False]")),
}  # fmt: skip


@cases(FORWARD)
def test_forward(name):
    call, words = FORWARD[name]
    says(call, *words)


# ----------------------------------------------------------------------------------------------------------- generate

PROMPT = TOKENS[:, :3]

GENERATE: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "temperature negative": ({"temperature": -1.0}, ("temperature", -1.0)),
    "temperature NaN": ({"temperature": math.nan}, ("temperature", "nan")),
    "temperature infinite": ({"temperature": math.inf}, ("temperature", "inf")),
    "temperature a word": ({"temperature": "hot"}, ("temperature", "hot")),
    "repetition_penalty 0": ({"repetition_penalty": 0.0}, ("repetition_penalty", 0.0)),
    "repetition_penalty NaN": ({"repetition_penalty": math.nan}, ("repetition_penalty", "nan")),
    "top_k 0": ({"top_k": 0}, ("top_k", 0)),
    "top_k negative": ({"top_k": -5}, ("top_k", -5)),
    "top_k float": ({"top_k": 2.0}, ("top_k", 2.0)),
    "top_p 0": ({"top_p": 0.0}, ("top_p", 0.0)),
    "top_p above 1": ({"top_p": 1.01}, ("top_p", 1.01)),
    "top_p NaN": ({"top_p": math.nan}, ("top_p", "nan")),
    "min_p negative": ({"min_p": -0.1}, ("min_p", -0.1)),
    "min_p above 1": ({"min_p": 1.5}, ("min_p", 1.5)),
    "min_p NaN": ({"min_p": math.nan}, ("min_p", "nan")),
    "filter_thres 1": ({"filter_thres": 1.0}, ("filter_thres", 1.0)),
    "filter_thres negative": ({"filter_thres": -0.5}, ("filter_thres", -0.5)),
    "filter_thres NaN": ({"filter_thres": math.nan}, ("filter_thres", "nan")),
    "filter_thres and top_k": ({"filter_thres": 0.9, "top_k": 5}, ("filter_thres=0.9", "top_k=5")),
    "length of the prompt": ({"length": 3}, ("length=3", 3)),
    "length below the prompt": ({"length": 1}, ("length=1", 3)),
    "length float": ({"length": 5.0}, ("length", 5.0)),
    "default length and a longer prompt": ({"prime": torch.zeros(1, 9, dtype=torch.long)}, ("length=9", 9)),
    "length and max_new_tokens": ({"length": 9, "max_new_tokens": 2}, ("length=9", "max_new_tokens=2")),
    "max_new_tokens 0": ({"max_new_tokens": 0}, ("max_new_tokens", 0)),
    "max_new_tokens negative": ({"max_new_tokens": -3}, ("max_new_tokens", -3)),
    "stop token too large": ({"stop_tokens": 11}, ("stop_tokens", 11, "num_tokens=11")),
    "stop token negative": ({"stop_tokens": (1, -1)}, ("stop_tokens", -1, "num_tokens=11")),
    "stop token a word": ({"stop_tokens": "end"}, ("stop_tokens", "end")),
    "pad token too large": ({"pad_token": 11}, ("pad_token", 11, "num_tokens=11")),
    "pad token negative": ({"pad_token": -100}, ("pad_token", -100, "num_tokens=11")),
    "num_return_sequences 0": ({"num_return_sequences": 0}, ("num_return_sequences", 0)),
    "num_return_sequences negative": ({"num_return_sequences": -1}, ("num_return_sequences", -1)),
    "generator a seed": ({"generator": 42}, ("generator", 42)),
    "empty prompt": ({"prime": PROMPT[:, :0]}, ("prime", "(2, 0)")),
    "no prompts": ({"prime": PROMPT[:0]}, ("prime", "(0, 3)")),
    "prompt 1-D": ({"prime": PROMPT[0]}, ("prime", "(3,)")),
    "prompt 3-D": ({"prime": PROMPT[None]}, ("prime", "(1, 2, 3)")),
    "prompt float": ({"prime": PROMPT.float()}, ("prime", "float32")),
    "prompt with an id too large": ({"prime": PROMPT + 9}, ("prime", 16, "num_tokens=11")),
    "prompt a list of ints": ({"prime": [1, 2, 3]}, ("prime",)),
    "prompt a word": ({"prime": "hello"}, ("prime", "hello")),
    "empty list of prompts": ({"prime": []}, ("prime", "[]")),
    "list with an empty prompt": ({"prime": [PROMPT[0], PROMPT[0, :0]]}, ("prime", 0)),
    "list with a 2-D tensor": ({"prime": [PROMPT[0], PROMPT]}, ("prime", "(2, 3)")),
    "list with None among the prompts": ({"prime": [*[PROMPT[0]] * 9999, None]}, ("prime", None)),
    "list with a 0-D tensor": ({"prime": [torch.tensor(1)]}, ("prime", "()")),
    "list with floats": ({"prime": [PROMPT[0].float()]}, ("prime", "float32")),
    "list with an id too large": ({"prime": [PROMPT[0], PROMPT[0] + 9]}, ("prime", 11, "num_tokens=11")),
    "list with lengths": ({"prime": [PROMPT[0]], "lengths": torch.tensor([3])}, ("lengths", "prime")),
    "lengths with a 0": ({"lengths": torch.tensor([3, 0])}, ("lengths", "[3, 0]")),
    "lengths too large": ({"lengths": torch.tensor([3, 4])}, ("lengths", "[3, 4]", 3)),
    "lengths of another batch": ({"lengths": torch.tensor([3])}, ("lengths", "(2,)")),
    "lengths float": ({"lengths": torch.tensor([3.0, 2.0])}, ("lengths", "float32")),
    "length of the longest prompt": (
        {"prime": [PROMPT[0], TOKENS[0]], "length": 5}, ("length=5", 5),
    ),
    "memories of another batch": ({"xl_memories": carried_by(batch=3)[0]}, ("xl_memories", "(3, 1, 4, 4)")),
    "memories as a list": ({"xl_memories": [torch.zeros(2, 2, 4, 4)]}, ("xl_memories", "Memories")),
    "states of another batch": ({"states": carried_by(batch=3)[1]}, ("states", "(3, 3, 8)")),
    "states for memories": ({"xl_memories": STATES}, ("xl_memories",)),
}  # fmt: skip


@cases(GENERATE)
def test_generate(name):
    options, words = GENERATE[name]
    options = {"prime": PROMPT, **options}
    if "length" not in options and name != "default length and a longer prompt":
        options.setdefault("max_new_tokens", 2)
    says(lambda: MODEL.generate(**options), *words)
    says(lambda: WRAPPER.generate(**options), *words)


STREAM = {
    "stream: top_k 0": {"top_k": 0},
    "stream: id too large": {"prime": PROMPT + 9},
    "stream: lengths too large": {"lengths": torch.tensor([3, 4])},
}


@cases(STREAM)
def test_stream_says_so_at_once(name):
    """Not when the first token is asked for, far from the mistake."""
    with pytest.raises(WRONG):
        MODEL.stream(**{"prime": PROMPT, "max_new_tokens": 2, **STREAM[name]})


# ------------------------------------------------------------------------------------------------------------ wrapper


def first_segment(x: Any, **options: Any) -> Callable[[], Any]:
    return lambda: next(WRAPPER.segments(x, **options))


TRAIN: dict[str, tuple[Callable[[], Any], tuple[object, ...]]] = {
    "dropout above 1": (lambda: RecurrentTrainWrapper(MODEL, 1.5), ("xl_memories_dropout", 1.5)),
    "dropout negative": (lambda: RecurrentTrainWrapper(MODEL, 0.0, -0.5), ("state_dropout", -0.5)),
    "dropout NaN": (lambda: RecurrentTrainWrapper(MODEL, state_dropout=math.nan), ("state_dropout", "nan")),
    "dropout a word": (lambda: RecurrentTrainWrapper(MODEL, "half"), ("xl_memories_dropout", "half")),
    "segments of no token": (lambda: RecurrentTrainWrapper(MODEL, seq_len=0), ("seq_len", 0)),
    "segments of a float": (lambda: RecurrentTrainWrapper(MODEL, seq_len=4.0), ("seq_len", 4.0)),
    "no module": (lambda: RecurrentTrainWrapper(Config(**SIZES)), ("transformer", "Config")),
    "another module": (lambda: RecurrentTrainWrapper(torch.nn.Linear(2, 2)), ("transformer", "Linear")),
    "generator a seed": (lambda: RecurrentTrainWrapper(MODEL, generator=1), ("generator", 1)),
    "one token": (lambda: WRAPPER(TOKENS[:, :1]), ("x", "(2, 1)")),
    "1-D": (lambda: WRAPPER(TOKENS[0]), ("x", "(5,)")),
    "no rows": (lambda: WRAPPER(TOKENS[:0]), ("x", "(0, ")),
    "train on a list": (lambda: WRAPPER([[1, 2]]), ("x", "[[1, 2]]")),
    "an id too large": (lambda: WRAPPER(TOKENS + 2), ("x", 11, "num_tokens=11")),
    "floats": (lambda: WRAPPER(TOKENS.float()), ("x", "float32")),
    "segments of one token only": (first_segment(TOKENS[:, :1]), ("x", "(2, 1)")),
    "memories of another batch": (first_segment(TOKENS, xl_memories=carried_by(batch=3)[0]), ("xl_memories", 3)),
    "memories as lists": (first_segment(TOKENS, xl_memories=[torch.zeros(2)]), ("xl_memories", "list")),
    "states for memories": (first_segment(TOKENS, xl_memories=STATES), ("xl_memories", "States")),
    "states of another batch": (first_segment(TOKENS, states=carried_by(batch=3)[1]), ("states", "(3, 3, 8)")),
    "reset of another batch": (first_segment(TOKENS, reset=bools(True)), ("reset", "(1,)")),
}


@cases(TRAIN)
def test_wrapper(name):
    call, words = TRAIN[name]
    says(call, *words)


# ------------------------------------------------------------------------------------------------------------ loaders


def lucidrains_entries(depth: int = 2, writes: tuple[int, ...] = (2,), reads: tuple[int, ...] = (2,)) -> dict:
    """A state dict of version 0.4.4 with dim 8, two heads of 4, two state vectors; layers from 1."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_emb.weight": (11, 8), "to_logits.0.gamma": (8,), "to_logits.0.beta": (8,), "to_logits.1.weight": (11, 8),
    }  # fmt: skip
    for layer in range(1, depth + 1):
        name = f"layers.{layer - 1}"
        shapes |= {
            f"{name}.0.norm.gamma": (8,), f"{name}.0.norm.beta": (8,), f"{name}.0.to_q.weight": (8, 8),
            f"{name}.0.to_kv.weight": (8, 8), f"{name}.0.to_out.weight": (8, 8 * (1 + reads.count(layer))),
            f"{name}.1.0.gamma": (8,), f"{name}.1.0.beta": (8,), f"{name}.1.1.weight": (42, 8),
            f"{name}.1.3.weight": (8, 21),
        }  # fmt: skip
    for layer in writes:
        name = f"layers.{layer - 1}.0"
        shapes |= {f"{name}.attn.{x}_scale": (4,) for x in "qk"}
        name = f"{name}.state_container"
        shapes |= {
            f"{name}.init_state": (2, 8), f"{name}.state_pos_ids": (2, 8), f"{name}.learned_ema_beta": (8,),
            f"{name}.state_norm.gamma": (8,), f"{name}.state_norm.beta": (8,), f"{name}.q_to_state.weight": (8, 8),
            f"{name}.q_from_state.weight": (8, 8), f"{name}.state_to_q.weight": (8, 8),
            f"{name}.state_to_kv.weight": (8, 8), f"{name}.to_state_out.weight": (8, 16),
            f"{name}.state_out_to_gate.weight": (8, 8), f"{name}.state_out_to_gate.bias": (8,),
        }  # fmt: skip
        attentions = ("to_state_cross_attn", "state_self_attn", "from_state_cross_attn")
        shapes |= {f"{name}.{attention}.{x}_scale": (4,) for attention in attentions for x in "qk"}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def from_lucidrains(entries: Any, **options: Any) -> Callable[[], Any]:
    return lambda: BlockRecurrentTransformer.from_lucidrains(entries, **{"max_seq_len": 8, "block_width": 4, **options})


def without(entries: dict, name: str) -> dict:
    assert name in entries
    return {key: value for key, value in entries.items() if key != name}


def meliad_entries() -> dict[str, Any]:
    """The parameters of a small model of the authors' code: four layers, the second one recurrent."""
    path = Path(__file__).parent / "golden" / "meliad" / "model_bias_skip.npz"
    arrays = np.load(path)
    return {name.removeprefix("param/"): arrays[name] for name in arrays if name.startswith("param/")}


def from_meliad(entries: Any, window_length: Any = 8) -> Callable[[], Any]:
    return lambda: BlockRecurrentTransformer.from_meliad(entries, window_length=window_length)


LUCIDRAINS, MELIAD = lucidrains_entries(), meliad_entries()
CELL = "transformer1/recurrent_tbase/post_attn_mlp"

LOADERS: dict[str, tuple[Callable[[], Any], tuple[object, ...]]] = {
    "weights: empty": (
        lambda: BlockRecurrentTransformer.from_weights(Config(num_tokens=4, dim=4, depth=1), {}),
        ("weights", "token_emb.weight"),
    ),
    "lucidrains: empty": (from_lucidrains({}), ("state_dict", "layers.N")),
    "lucidrains: another model": (from_lucidrains({"lm_head.weight": torch.zeros(2, 2)}), ("state_dict", "layers.N")),
    "lucidrains: no dict": (from_lucidrains([]), ("state_dict",)),
    "lucidrains: missing entry of a layer": (
        from_lucidrains(without(LUCIDRAINS, "layers.1.1.0.gamma")), ("state_dict", "layers.1.1.0.gamma"),
    ),
    "lucidrains: missing entry of a state": (
        from_lucidrains(without(LUCIDRAINS, "layers.1.0.state_container.state_norm.gamma")),
        ("state_dict", "layers.1.0.state_container.state_norm.gamma"),
    ),
    "lucidrains: missing first projection": (
        from_lucidrains(without(LUCIDRAINS, "layers.0.0.to_q.weight")), ("state_dict", "layers.0.0.to_q.weight"),
    ),
    "lucidrains: missing embedding": (
        from_lucidrains(without(LUCIDRAINS, "token_emb.weight")), ("state_dict", "token_emb.weight"),
    ),
    "lucidrains: unknown entry": (
        from_lucidrains({**LUCIDRAINS, "layers.0.0.extra": torch.zeros(1)}), ("state_dict", "layers.0.0.extra"),
    ),
    "lucidrains: a bias that is not zero": (
        from_lucidrains({**LUCIDRAINS, "to_logits.0.beta": torch.ones(8)}), ("state_dict", "to_logits.0.beta"),
    ),
    "lucidrains: an entry of another shape": (
        from_lucidrains({**LUCIDRAINS, "layers.1.0.to_kv.weight": torch.zeros(16, 8)}),
        ("state_dict", "layers.1.0.to_kv.weight", "(16, 8)", "(8, 8)"),
    ),
    "lucidrains: ambiguous reads": (
        from_lucidrains(lucidrains_entries(3, writes=(2, 3), reads=(1, 2))),
        ("read_recurrent_layers", "(2, 3)", "(1, 2)", "(2, 1)"),
    ),
    "lucidrains: reads that cannot be": (
        from_lucidrains(LUCIDRAINS, read_recurrent_layers=(1,)), ("read_recurrent_layers=(1,)", "(2,)"),
    ),
    "lucidrains: too many reads": (
        from_lucidrains(LUCIDRAINS, read_recurrent_layers=(2, 2)), ("read_recurrent_layers=(2, 2)", "(2,)"),
    ),
    "lucidrains: block_width that does not divide": (
        from_lucidrains(LUCIDRAINS, block_width=3), ("max_seq_len=8", "block_width=3"),
    ),
    "lucidrains: block_width float": (from_lucidrains(LUCIDRAINS, block_width=4.0), ("block_width", 4.0)),
    "meliad: empty": (from_meliad({}), ("params", "transformerN")),
    "meliad: no dict": (from_meliad(None), ("params",)),
    "meliad: missing entry": (
        from_meliad(without(MELIAD, "transformer2/tbase/pre_ffn_layernorm/scale")),
        ("params", "transformer2/tbase/pre_ffn_layernorm/scale"),
    ),
    "meliad: missing embedding": (from_meliad(without(MELIAD, "embed/embedding")), ("params", "embed/embedding")),
    "meliad: missing ids": (
        from_meliad(without(MELIAD, "transformer1/recurrent_tbase/_kvq/position_embeddings")),
        ("params", "transformer1/recurrent_tbase/_kvq/position_embeddings"),
    ),
    "meliad: missing gate": (from_meliad(without(MELIAD, f"{CELL}/gate_bias")), ("params", CELL, "gate", "[]")),
    "meliad: unknown entry": (from_meliad({**MELIAD, "embed/extra": np.zeros(1)}), ("params", "embed/extra")),
    "meliad: an entry of another shape": (
        from_meliad({**MELIAD, "transformer2/tbase/pre_ffn_layernorm/scale": np.zeros(5, dtype=np.float32)}),
        ("params", "transformer2/tbase/pre_ffn_layernorm/scale", "(5,)", "(32,)"),
    ),
    "meliad: a kernel of one axis": (
        from_meliad({**MELIAD, "transformer0/tbase/ffn/hidden0/kernel": np.zeros(5, dtype=np.float32)}),
        ("params", "transformer0/tbase/ffn/hidden0/kernel", "(5,)"),
    ),
    "meliad: keys of one axis": (
        from_meliad({**MELIAD, "transformer0/tbase/_kvq/keys_layer/kernel": np.zeros(5, dtype=np.float32)}),
        ("params", "transformer0/tbase/_kvq/keys_layer/kernel", "(5,)"),
    ),
    "meliad: no array": (
        from_meliad({**MELIAD, "embed/embedding": None}), ("params", "embed/embedding", "NoneType"),
    ),
    "meliad: window_length 0": (from_meliad(MELIAD, 0), ("window_length", 0)),
    "meliad: window_length float": (from_meliad(MELIAD, 8.0), ("window_length", 8.0)),
}  # fmt: skip


@cases(LOADERS)
def test_loaders(name):
    call, words = LOADERS[name]
    says(call, *words)


def test_the_entries_of_these_tables_load():
    assert from_lucidrains(LUCIDRAINS)().config.recurrent_layers == (2,)
    ambiguous = lucidrains_entries(3, writes=(2, 3), reads=(1, 2))
    assert from_lucidrains(ambiguous, read_recurrent_layers=(2, 1))().config.read_recurrent_layers == (2, 1)
    assert from_meliad(MELIAD)().config.recurrent_layers == (2,)


def test_no_call_changed_what_it_was_given():
    with torch.no_grad():
        _, memories, states = MODEL(TOKENS)
    was, now = map(torch.utils._pytree.tree_leaves, ((MEMORIES, STATES), (memories, states)))
    assert len(was) == len(now)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(was, now))
    assert LUCIDRAINS.keys() == lucidrains_entries().keys()
    assert MELIAD.keys() == meliad_entries().keys()
