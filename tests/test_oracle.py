"""The model against the naive reading of its equations: outputs, memories, states and gradients, float64, 1e-10."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, assert_all_same, assert_same, carried, gradients, read_in_pieces, remembered, t5_bucket
from strategies import SCALINGS, VOCABULARY, config_options, examples, random_model, random_stream, splits
from torch import Tensor, nn

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, kernels, losses
from block_recurrent_transformer_pytorch import block_recurrent_transformer_pytorch as module
from block_recurrent_transformer_pytorch.block_recurrent_transformer_pytorch import T5Bias

BASE = {
    "num_tokens": VOCABULARY, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "max_seq_len": 3,
    "block_width": 3, "compressed_mem_factor": 3, "recurrent_layers": (2,), "num_state_vectors": 2,
}  # fmt: skip

# Every option at least once, most of them beside others that they meet.
CASES: dict[str, dict] = {
    "defaults": {},
    "default sizes of the feed-forward and the state": {"ff_dim": None, "num_state_vectors": None},
    "ff_mult": {"ff_dim": None, "ff_mult": 1.5},
    "relu": {"ff_activation": "relu"},
    "swiglu": {"ff_activation": "swiglu", "state_update": "dual"},
    "bias of queries, keys and values": {"qkv_bias": True, "kv_heads": 2},
    "norm_eps": {"norm_eps": 0.1},
    "norm_eps of all RMS norms": {"norm_eps": 0.1, "norm": "rms", "qk_norm": "rms", "all_layers_qk_rmsnorm": True},
    "logit_scale": {"logit_scale": 0.7},
    "logit_scale, tied": {"logit_scale": 1.0, "tie_embeddings": True},
    "rotary": {"positions": "rotary", "rotary_base": 7.0},
    "rotary in some layers": {"positions": "rotary", "unrotated_layers": (2,)},
    "rotary scaled linearly": {"positions": "rotary", "rotary_scaling": SCALINGS[0]},
    "rotary scaled as in Llama 3": {"positions": "rotary", "rotary_scaling": SCALINGS[1], "dim_head": 8},
    "rotary scaled by yarn": {"positions": "rotary", "rotary_scaling": SCALINGS[2], "dim_head": 8},
    "rotary scaled by yarn with options": {
        "positions": "rotary", "rotary_base": 7.0, "dim_head": 8, "rotary_scaling": SCALINGS[2] | {
            "beta_fast": 1.0, "beta_slow": 0.25, "attention_factor": 1.3,
        },
    },
    "xpos scaled": {"rotary_scaling": SCALINGS[2], "rotary_base": 50.0, "dim_head": 8},
    "sinks": {"extra_memories": {"sinks": {"tokens": 2}}},
    "sinks of some layers, two xl blocks, rotary": {
        "extra_memories": {"sinks": {"tokens": 3, "layers": (1, 3)}}, "num_xl_blocks": 2, "positions": "rotary",
        "recurrent_layers": (1, 3), "state_reads_memory": True,
    },
    "sinks without xl memory in some layers": {"extra_memories": {"sinks": {"tokens": 1}}, "xl_layers": (2,)},
    "sinks in front of compressed": {
        "extra_memories": {"sinks": {"tokens": 2}}, "use_compressed_mem": True, "block_width": 4, "max_seq_len": 4,
        "compressed_mem_factor": 2, "positions": "t5",
    },
    "a pretrained model's": {
        "positions": "rotary", "ff_activation": "swiglu", "norm": "rms", "norm_eps": 1e-5, "qkv_bias": True,
        "tokens_qk_norm": "none", "tie_embeddings": True, "logit_scale": 1.0,
        "extra_memories": {"sinks": {"tokens": 2}},
    },
    "routed": {"extra_memories": {"routed": {"capacity": 9, "chunk_size": 3, "num_chosen": 2}}, "kv_heads": 2},
    "routed, softmax, one token a chunk, positions t5": {
        "extra_memories": {"routed": {"capacity": 6, "chunk_size": 1, "num_chosen": 2, "operator": "softmax"}},
        "positions": "t5", "qk_norm": "head", "all_layers_qk_rmsnorm": True, "num_xl_blocks": 2,
    },
    "routed, gates, key shift, turned, without xl memory": {
        "extra_memories": {"routed": {
            "capacity": 12, "chunk_size": 3, "num_chosen": 4, "summary": "gate", "key_shift": True,
            "positions": "rotary", "layers": (1, 2),
        }}, "num_xl_blocks": 0, "positions": "rotary", "rotary_base": 7.0, "rotary_scaling": SCALINGS[2],
    },
    "routed, cold, several summaries, beside sinks and compressed": {
        "extra_memories": {
            "sinks": {"tokens": 2},
            "routed": {
                "capacity": 8, "chunk_size": 4, "num_chosen": 1, "num_summaries": 2, "temperature": 0.1, "layers": (3,),
            },
        }, "use_compressed_mem": True, "block_width": 4, "max_seq_len": 4, "compressed_mem_factor": 2,
    },
    "one head": {"heads": 1},
    "grouped key/value heads": {"heads": 4, "kv_heads": 2},
    "as many key/value heads as heads": {"heads": 2, "kv_heads": 2},
    "heads that do not fill dim": {"dim": 5, "heads": 3, "dim_head": 2},
    "width 1": {"block_width": 1, "max_seq_len": 1},
    "width 5": {"block_width": 5, "max_seq_len": 5},
    "no xl memory": {"num_xl_blocks": 0},
    "two xl blocks": {"num_xl_blocks": 2},
    "three xl blocks, positions t5": {"num_xl_blocks": 3, "positions": "t5"},
    "xl memory of some layers": {"xl_layers": (1, 3), "positions": "dynamic"},
    "no xl memory in a recurrent layer that reads it": {"xl_layers": (1,), "state_reads_memory": True},
    "compressed, factor 2 of 4": {
        "use_compressed_mem": True, "block_width": 4, "max_seq_len": 4, "compressed_mem_factor": 2,
    },
    "compressed, means": {"use_compressed_mem": True, "compressed_mem_factor": 2, "compressed_mem_pooling": "mean"},
    "compressed, maxima": {
        "use_compressed_mem": True, "block_width": 4, "max_seq_len": 4, "compressed_mem_factor": 2,
        "compressed_mem_pooling": "max", "kv_heads": 2,
    },
    "compressed, factor 1": {"use_compressed_mem": True, "compressed_mem_factor": 1},
    "compressed, factor does not divide": {"use_compressed_mem": True, "compressed_mem_factor": 2, "kv_heads": 2},
    "compressed, one entry a block for a queue of two": {
        "use_compressed_mem": True, "block_width": 5, "max_seq_len": 5, "compressed_mem_factor": 3, "qk_norm": "head",
        "all_layers_qk_rmsnorm": True,
    },
    "compressed behind two xl blocks of some layers": {
        "use_compressed_mem": True, "num_xl_blocks": 2, "xl_layers": (2, 3), "positions": "dynamic",
    },
    "enhanced": {"enhanced_recurrence": True},
    "enhanced, two xl blocks, states read them": {
        "enhanced_recurrence": True, "num_xl_blocks": 2, "state_reads_memory": True,
    },
    "sliding": {"attention_window": "sliding"},
    "sliding without memory": {"attention_window": "sliding", "num_xl_blocks": 0},
    "sliding, dynamic": {"attention_window": "sliding", "positions": "dynamic"},
    "sliding, t5, memory of some layers": {"attention_window": "sliding", "positions": "t5", "xl_layers": (2,)},
    "zeros": {"empty_memory": "zeros", "state_reads_memory": True},
    "zeros, two xl blocks, no positions": {"empty_memory": "zeros", "num_xl_blocks": 2, "positions": "none"},
    "sliding, zeros, enhanced": {"attention_window": "sliding", "empty_memory": "zeros", "enhanced_recurrence": True},
    "positions dynamic": {"positions": "dynamic"},
    "positions dynamic, distance not logarithmic": {"positions": "dynamic", "dynamic_log_distance": False},
    "positions t5": {"positions": "t5"},
    "positions t5, far": {"positions": "t5", "num_xl_blocks": 6, "depth": 2, "recurrent_layers": (1,)},
    "positions none": {"positions": "none"},
    "no recurrent layer": {"recurrent_layers": ()},
    "first layer recurrent": {"recurrent_layers": (1,)},
    "default recurrent layer": {"recurrent_layers": None, "depth": 4},
    "several recurrent layers": {"recurrent_layers": (1, 3)},
    "all layers recurrent": {"recurrent_layers": (3, 1, 2)},
    "read below": {"recurrent_layers": (3,), "read_recurrent_layers": (1,)},
    "read below, enhanced": {"recurrent_layers": (2,), "read_recurrent_layers": (1,), "enhanced_recurrence": True},
    "two states read at one layer, one of them its own": {"recurrent_layers": (3, 2), "read_recurrent_layers": (2, 2)},
    "crossing reads": {"depth": 4, "recurrent_layers": (4, 3), "read_recurrent_layers": (2, 1), "positions": "t5"},
    "one state vector": {"num_state_vectors": 1},
    "more states than tokens": {"num_state_vectors": 5},
    "dual": {"state_update": "dual"},
    "dual, lstm, relu": {"state_update": "dual", "gate": "lstm", "ff_activation": "relu"},
    "dual, full": {"state_update": "dual", "gate": "full"},
    "single": {"state_update": "single"},
    "single, lstm": {"state_update": "single", "gate": "lstm"},
    "skip, lstm": {"gate": "lstm"},
    "skip, full": {"gate": "full"},
    "no candidate bias": {"candidate_bias": False, "state_update": "dual"},
    "states read the memory": {"state_reads_memory": True, "num_xl_blocks": 2},
    "feedback": {"block_feedback": True},
    "feedback of the last of several": {"block_feedback": True, "depth": 4, "recurrent_layers": (1, 3)},
    "rms norm": {"norm": "rms"},
    "qk norm per head": {"qk_norm": "head", "positions": "t5"},
    "qk norm per head in all layers": {"qk_norm": "head", "all_layers_qk_rmsnorm": True, "positions": "dynamic"},
    "qk norm in all layers": {"all_layers_qk_rmsnorm": True, "kv_heads": 2},
    "qk norm of a layer that only reads": {"recurrent_layers": (3,), "read_recurrent_layers": (2,), "qk_norm": "head"},
    "no qk norm": {"qk_norm": "none"},
    "qk rms norm": {"qk_norm": "rms", "all_layers_qk_rmsnorm": True},
    "qk norm of the states alone": {"tokens_qk_norm": "none"},
    "qk norms of states and tokens": {"tokens_qk_norm": "rms", "qk_norm": "channel"},
    "qk norm of the tokens alone": {"tokens_qk_norm": "channel", "qk_norm": "none"},
    "scale of the qk norm": {"qk_norm_scale": 2.5},
    "tied": {"tie_embeddings": True},
    "checkpointing": {"use_checkpointing": True},
    "the authors' model": {
        "norm": "rms", "qk_norm": "head", "all_layers_qk_rmsnorm": True, "positions": "t5", "ff_activation": "relu",
        "kv_heads": 2, "attention_window": "sliding", "empty_memory": "zeros", "state_reads_memory": True,
        "candidate_bias": False, "tie_embeddings": True, "block_feedback": True, "gate": "lstm", "state_update": "dual",
    },
}  # fmt: skip


def stream_of_case(case: str) -> Tensor:
    """Two rows of a few blocks; longer where memories fill slowly and where the logarithmic buckets of T5 begin."""
    slow = ("compressed", "far", "sinks", "pretrained", "routed")
    return random_stream(2, 26 if any(word in case for word in slow) else 13)


def oracle_says(model: BlockRecurrentTransformer, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits, memories and states of the last row, and their gradients to all parameters."""
    oracle = Oracle(model.config, dict(model.named_parameters()))
    results = {"logits": oracle.read(tokens[-1].tolist())} | remembered(oracle)
    return results, gradients(model, results)


def model_says(
    model: BlockRecurrentTransformer, tokens: Tensor, cuts: list[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same of the model, which reads all rows, in pieces."""
    logits, memories, states = read_in_pieces(model, tokens, cuts)
    results = {"logits": logits[-1]} | carried(model.config, memories, states)
    return results, gradients(model, results)


def assert_model_is_oracle(config: Config, tokens: Tensor, cuts: list[int], expected=None) -> None:
    model = random_model(config)
    expected_results, expected_gradients = expected or oracle_says(model, tokens)
    results, grads = model_says(model, tokens, cuts)
    assert results.keys() == expected_results.keys()
    for name, result in results.items():
        assert_same(result, expected_results[name], name=name)
    assert_all_same(grads, expected_gradients, of="gradient of ")


@cache
def oracle_of_case(case: str):
    return oracle_says(random_model(Config(**BASE | CASES[case])), stream_of_case(case))


@pytest.mark.parametrize("use_flash_attn", [True, False], ids=["flash", "written out"])
@pytest.mark.parametrize("case", CASES)
def test_model_is_oracle(case: str, use_flash_attn: bool) -> None:
    config = Config(**BASE | CASES[case], use_flash_attn=use_flash_attn)
    tokens = stream_of_case(case)
    assert_model_is_oracle(config, tokens, [2, tokens.shape[1] - 3, 1], oracle_of_case(case))


@settings(max_examples=examples(50))
@given(options=config_options(), data=st.data())
def test_model_is_oracle_for_any_configuration_and_split(options: dict, data: st.DataObject) -> None:
    config = Config(**options)
    n = data.draw(st.integers(1, min(16, 6 * config.block_width)))
    assert_model_is_oracle(config, random_stream(2, n), data.draw(splits(n)))


def test_t5_buckets_of_all_distances() -> None:
    bias = T5Bias(Config(**BASE, positions="t5"))
    distances = torch.arange(1024)
    assert bias.bucket(distances).tolist() == [t5_bucket(distance) for distance in range(1024)]
    assert [t5_bucket(distance) for distance in (15, 16, 18, 19, 112, 113, 128)] == [15, 16, 16, 17, 30, 31, 31]


# ------------------------------------------------------------- every option that is not about speed changes the numbers

# option -> (options that both models have, the value of the second model)
CHANGES: dict[str, tuple[dict, object]] = {
    "dim": ({}, 6),
    "depth": ({}, 4),
    "dim_head": ({}, 2),
    "heads": ({"kv_heads": 2}, 4),
    "kv_heads": ({}, 2),
    "ff_mult": ({"ff_dim": None}, 2),
    "ff_dim": ({}, 5),
    "ff_activation": ({}, "relu"),
    "qkv_bias": ({}, True),
    "block_width": ({"max_seq_len": 6}, 6),
    "num_xl_blocks": ({}, 2),
    "xl_layers": ({}, (1, 2)),
    "use_compressed_mem": ({}, True),
    "compressed_mem_factor": ({"use_compressed_mem": True}, 2),
    "compressed_mem_pooling": ({"use_compressed_mem": True}, "mean"),
    "enhanced_recurrence": ({}, True),
    "attention_window": ({}, "sliding"),
    "empty_memory": ({}, "zeros"),
    "positions": ({}, "none"),
    "rotary_base": ({}, 7.0),
    "rotary_scaling": ({}, SCALINGS[0]),
    "unrotated_layers": ({}, (1,)),
    "dynamic_log_distance": ({"positions": "dynamic"}, False),
    "recurrent_layers": ({}, (3,)),
    "read_recurrent_layers": ({}, (1,)),
    "num_state_vectors": ({}, 3),
    "state_update": ({}, "single"),
    "gate": ({}, "lstm"),
    "candidate_bias": ({}, False),
    "state_reads_memory": ({}, True),
    "block_feedback": ({}, True),
    "norm": ({}, "rms"),
    "norm_eps": ({}, 0.1),
    "qk_norm": ({}, "none"),
    "all_layers_qk_rmsnorm": ({}, True),
    "tokens_qk_norm": ({}, "none"),
    "qk_norm_scale": ({}, 4.0),
    "tie_embeddings": ({}, True),
    "logit_scale": ({}, 0.7),
    "extra_memories": ({}, {"sinks": {"tokens": 2}}),
}
DROPOUTS = [field.name for field in fields(Config) if field.name.endswith("dropout")]
SPEED = {"use_flash_attn": True, "use_checkpointing": True}
ELSEWHERE = {  # not about what a model computes, or tested in test_extending.py and test_token_gated.py
    "num_tokens", "max_seq_len", "ignore_index", "init", "gate_options", "write_span", "matching_init", "embedding_std",
    *DROPOUTS, *SPEED,
}  # fmt: skip


def pair_of_models(
    option: str, both: dict, value: object
) -> tuple[BlockRecurrentTransformer, BlockRecurrentTransformer]:
    """Two models that differ in one option; the second has the parameters of the first wherever the shapes allow it."""
    first = random_model(Config(**BASE | both), seed=0)
    second = random_model(Config(**BASE | both | {option: value}), seed=1)
    known = dict(first.named_parameters())
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if name in known and known[name].shape == parameter.shape:
                parameter.copy_(known[name])
    return first, second


def test_every_option_is_tried() -> None:
    assert set(CHANGES) | ELSEWHERE == {field.name for field in fields(Config)}
    assert not set(CHANGES) & ELSEWHERE


@pytest.mark.parametrize("option", CHANGES)
def test_option_changes_the_logits(option: str) -> None:
    first, second = pair_of_models(option, *CHANGES[option])
    tokens = random_stream(2, 20)
    assert (first(tokens)[0] - second(tokens)[0]).abs().max() > 1e-3


VALUES = [
    ("positions", {}, "t5"),
    ("positions", {}, "dynamic"),
    ("positions", {}, "rotary"),
    ("rotary_scaling", {"positions": "rotary", "dim_head": 8}, SCALINGS[1]),
    ("rotary_scaling", {"positions": "rotary"}, SCALINGS[2]),
    ("ff_activation", {}, "swiglu"),
    ("logit_scale", {"tie_embeddings": True}, 1.0),
    ("tokens_qk_norm", {"qk_norm": "none"}, "channel"),
    ("qk_norm", {}, "rms"),
    ("extra_memories", {"num_xl_blocks": 2, "extra_memories": {"sinks": {"tokens": 2}}}, {"sinks": {"tokens": 3}}),
    ("extra_memories", {}, {"routed": {"capacity": 6, "chunk_size": 3, "num_chosen": 1}}),
    ("qk_norm", {}, "head"),
    ("qk_norm", {"positions": "t5", "all_layers_qk_rmsnorm": True}, "head"),
    ("state_update", {}, "dual"),
    ("gate", {}, "full"),
    ("num_xl_blocks", {}, 0),
    ("use_compressed_mem", {"num_xl_blocks": 2}, True),
    ("xl_layers", {"state_reads_memory": True}, (1, 3)),
    ("compressed_mem_pooling", {"use_compressed_mem": True, "compressed_mem_pooling": "mean"}, "max"),
    ("empty_memory", {"attention_window": "sliding"}, "zeros"),
    ("enhanced_recurrence", {"attention_window": "sliding", "empty_memory": "zeros"}, True),
    ("recurrent_layers", {}, ()),
    ("recurrent_layers", {"depth": 4}, (2, 4)),
    ("block_feedback", {"recurrent_layers": (1, 2)}, True),
]


@pytest.mark.parametrize(("option", "both", "value"), VALUES)
def test_other_values_of_an_option_change_the_logits(option: str, both: dict, value: object) -> None:
    first, second = pair_of_models(option, both, value)
    tokens = random_stream(2, 20)
    assert (first(tokens)[0] - second(tokens)[0]).abs().max() > 1e-3


# The same parameters exactly: what differs is only how they are used.
SAME_SHAPES = [
    "num_xl_blocks", "xl_layers", "enhanced_recurrence", "attention_window", "empty_memory", "dynamic_log_distance",
    "state_reads_memory", "norm", "qk_norm_scale", "block_width", "positions", "rotary_base", "rotary_scaling",
    "unrotated_layers", "norm_eps", "logit_scale", "extra_memories",
]  # fmt: skip


@pytest.mark.parametrize("option", SAME_SHAPES)
def test_option_without_parameters_changes_the_logits_of_the_same_parameters(option: str) -> None:
    both, value = CHANGES[option]
    first, second = random_model(Config(**BASE | both)), random_model(Config(**BASE | both | {option: value}))
    assert second.load_state_dict(first.state_dict())
    tokens = random_stream(2, 20)
    assert (first(tokens)[0] - second(tokens)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("option", SPEED)
def test_option_for_speed_does_not_change_the_numbers(option: str) -> None:
    first, second = pair_of_models(option, {}, SPEED[option])
    tokens = random_stream(2, 20)
    assert_same(second(tokens)[0], first(tokens)[0])


@pytest.mark.parametrize("use_flash_attn", [True, False])
@pytest.mark.parametrize("option", DROPOUTS)
def test_dropout_acts_in_training_and_not_in_evaluation(option: str, use_flash_attn: bool) -> None:
    model = random_model(Config(**BASE | {option: 0.5, "use_flash_attn": use_flash_attn}))
    plain = random_model(Config(**BASE, use_flash_attn=use_flash_attn))
    tokens = random_stream(2, 20)
    expected = plain(tokens)[0]
    assert torch.equal(model(tokens)[0], expected)
    torch.manual_seed(0)
    assert (model.train()(tokens)[0] - expected).abs().max() > 1e-3
    assert torch.equal(plain.train()(tokens)[0], expected)


def test_init_changes_the_initial_values() -> None:
    def kernel(init: str) -> Tensor:
        torch.manual_seed(0)
        return BlockRecurrentTransformer(**BASE | {"dim": 256, "gate": "lstm"}, init=init).layers[1].to_qkv.weight

    assert abs(kernel("lecun").std().item() * 256**0.5 - 1) < 0.05
    assert abs(kernel("torch").std().item() * 256**0.5 - 3**-0.5) < 0.05


def test_max_seq_len_changes_nothing() -> None:
    first, second = pair_of_models("max_seq_len", {}, 30)
    tokens = random_stream(1, 20)
    assert torch.equal(first(tokens)[0], second(tokens)[0])


def test_config_is_its_dictionary() -> None:
    config = Config(**BASE | CASES["the authors' model"])
    assert Config.from_dict(asdict(config)) == config


# ---------------------------------------------------------------------------------------------- what backward passes do


def test_gradients_of_unit_vectors_are_exact() -> None:
    """First and second derivatives against finite differences, a gain for each channel or each head and channel."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for shape in ((5,), (3, 1, 5)):
        gain = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert_same(kernels.unit(x, gain), F.normalize(x, dim=-1) * gain)
        assert torch.autograd.gradcheck(kernels.unit, (x, gain))
        assert torch.autograd.gradgradcheck(kernels.unit, (x, gain))
    assert_same(kernels.unit(x), F.normalize(x, dim=-1))
    assert torch.autograd.gradcheck(kernels.unit, (x,))
    assert torch.autograd.gradgradcheck(kernels.unit, (x,))
    zero = torch.zeros(1, 1, 1, 5, requires_grad=True)
    out = kernels.unit(zero, torch.ones(5))
    assert not out.any()
    out.sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("options", [
    {}, {"use_flash_attn": True}, {"use_checkpointing": True}, {"tie_embeddings": True},
])  # fmt: skip
@pytest.mark.parametrize("in_chunks", [False, True])
def test_functional_gradients_are_those_of_backward(
    options: dict, in_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.func goes without hooks on saved tensors, and so without recomputation."""
    if in_chunks:
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 3 * BASE["num_tokens"])
    model = random_model(Config(**BASE, **options))
    x = random_stream(2, 2 * BASE["block_width"] + 1)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,), {"return_loss": True})[0]

    model(x, return_loss=True)[0].backward()
    for name, gradient in torch.func.grad(loss)(dict(model.named_parameters())).items():
        assert_same(gradient, model.get_parameter(name).grad, 1e-10, name=name)


def test_feed_forward_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        model = random_model(Config(**BASE))
        logits, _, _ = model(random_stream(3, 50))
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    whole = run()
    monkeypatch.setattr(module, "HIDDEN_AT_ONCE", 1)
    for one, other in zip(run(), whole, strict=True):
        assert_same(one, other, 1e-12)


# ----------------------------------------------------------------------------------------------------- loss in chunks


def loss_and_gradients(model: BlockRecurrentTransformer, x: Tensor, use_autocast: bool = False) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if use_autocast else nullcontext():
        loss = model(x, return_loss=True)[0]
    (2 * loss).backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("kind", "use_autocast", "tolerance"),
    [("float64", False, 1e-12), ("bfloat16", False, 5e-2), ("float32", True, 5e-2)],
)
def test_loss_in_chunks_has_the_same_gradients(kind, use_autocast, tolerance, monkeypatch) -> None:
    """In low precision, too, with targets that do not count, and with a factor behind the loss."""
    model = random_model(Config(**BASE, ignore_index=3)).to(getattr(torch, kind))
    x = random_stream(2, 50)
    whole = loss_and_gradients(model, x, use_autocast)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 8 * BASE["num_tokens"])
    for one, other in zip(loss_and_gradients(model, x, use_autocast), whole, strict=True):
        assert one.dtype == other.dtype
        size = 1 + other.double().abs().max()
        assert_same(one.double() / size, other.double() / size, tolerance)


def test_loss_in_chunks_calls_a_map_that_stands_in_for_the_output(monkeypatch) -> None:
    """A wrapper (LoRA, another precision) may have a weight, too, that is not all of it."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, x = random_model(Config(**BASE)), random_stream(2, 20)
    own = model.to_logits
    model.to_logits = Doubled(own.in_features, own.out_features, bias=False, dtype=own.weight.dtype)
    model.to_logits.weight = own.weight
    whole = loss_and_gradients(model, x)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1)
    for one, other in zip(loss_and_gradients(model, x), whole, strict=True):
        assert_same(one, other, 1e-12)


def test_loss_in_chunks_refuses_second_derivatives(monkeypatch) -> None:
    """Its gradients are taken in the forward pass: to differentiate them again would be wrong, and is an error."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1)
    model = random_model(Config(**BASE, ignore_index=3))
    loss = model(random_stream(2, 20), return_loss=True)[0]
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, [model.token_emb.weight], create_graph=True)
