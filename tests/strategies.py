"""Random configurations, models, streams and splits of them."""

from __future__ import annotations

import os

import torch
from hypothesis import strategies as st
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config

VOCABULARY = 11
SCALINGS = (
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 2.0},
)  # fmt: skip


def examples(usual: int) -> int:
    """How many examples a property tries: the usual number, times EXAMPLES of the environment."""
    return max(1, round(usual * float(os.environ.get("EXAMPLES", 1))))


@st.composite
def config_options(draw: st.DrawFn, **forced: object) -> dict:
    """Options of a small valid `Config`: any that can go together; `forced` ones as given."""

    def choose(name: str, *values: object) -> object:
        return forced.get(name, draw(st.sampled_from(values)))

    depth, width, xl_blocks = (
        choose("depth", 2, 1, 3, 4),
        choose("block_width", 3, 2, 1, 4, 5),
        choose("num_xl_blocks", 1, 2, 0),
    )
    layers = range(1, depth + 1)
    some_layers = st.lists(st.sampled_from(layers), unique=True, max_size=depth)
    xl_layers = forced.get("xl_layers", draw(st.none() | some_layers.map(tuple)))
    enhanced = choose("enhanced_recurrence", False, True)
    if enhanced:
        xl_layers, xl_blocks = None, max(1, xl_blocks)
    remembers = xl_blocks > 0 and xl_layers != ()
    compressed = remembers and width > 1 and not enhanced and choose("use_compressed_mem", False, True)
    sinks = 0 if enhanced else min(width, choose("sink_tokens", 0, 1, 2))
    sink_layers = draw(some_layers)
    sink_options = {"tokens": sinks, "layers": tuple(sink_layers)} if sink_layers else {"tokens": sinks}
    routed = {} if enhanced or not choose("routed", False, True) else draw(routed_options(width, depth))
    memories = ({"sinks": sink_options} if sinks else {}) | ({"routed": routed} if routed else {})
    window = "blocks" if compressed or memories or xl_blocks > 1 else choose("attention_window", "blocks", "sliding")
    positions = choose("positions", "xpos", "rotary", "dynamic", "t5", "none")
    is_rotated = positions in ("xpos", "rotary")
    is_turned = is_rotated or routed.get("positions") == "rotary"
    dim_head = choose("dim_head", 4, 2) if is_turned else choose("dim_head", 4, 3, 1)
    heads = choose("heads", 2, 1, 4)
    writes = forced.get("recurrent_layers", tuple(draw(some_layers)))
    feedback = bool(writes) and choose("block_feedback", False, True)
    reads = None if feedback else tuple(draw(st.integers(1, write)) for write in writes)
    qk_norm = choose("qk_norm", "channel", "head", "rms", "none")
    of_tokens = None if qk_norm == "head" else choose("tokens_qk_norm", None, "none", "rms", "channel")
    unrotated = forced.get("unrotated_layers", tuple(draw(some_layers)))
    return {
        "num_tokens": VOCABULARY,
        "dim": choose("dim", 8, 5, 16),
        "depth": depth,
        "dim_head": dim_head,
        "heads": heads,
        "kv_heads": draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        "ff_dim": choose("ff_dim", 6, 3),
        "ff_activation": choose("ff_activation", "geglu", "swiglu", "relu"),
        "qkv_bias": choose("qkv_bias", False, True),
        "max_seq_len": width,
        "block_width": width,
        "num_xl_blocks": xl_blocks,
        "xl_layers": xl_layers,
        "use_compressed_mem": compressed,
        "compressed_mem_factor": draw(st.integers(1, width)),
        "compressed_mem_pooling": choose("compressed_mem_pooling", "conv", "mean", "max") if compressed else "conv",
        "enhanced_recurrence": enhanced,
        "attention_window": window,
        "extra_memories": memories,
        "empty_memory": "masked" if compressed or memories else choose("empty_memory", "masked", "zeros"),
        "positions": positions,
        "rotary_base": choose("rotary_base", 10000.0, 7.0) if is_rotated else 10000.0,
        "rotary_scaling": choose("rotary_scaling", {}, *SCALINGS) if is_rotated else {},
        "unrotated_layers": unrotated if is_rotated else (),
        "dynamic_log_distance": choose("dynamic_log_distance", True, False),
        "recurrent_layers": writes,
        "read_recurrent_layers": reads,
        "num_state_vectors": choose("num_state_vectors", 2, 1, 3),
        "state_update": choose("state_update", "skip", "dual", "single"),
        "gate": choose("gate", "fixed", "lstm", "full"),
        "candidate_bias": choose("candidate_bias", True, False),
        "state_reads_memory": choose("state_reads_memory", False, True),
        "block_feedback": feedback,
        "norm": choose("norm", "layer", "rms"),
        "norm_eps": choose("norm_eps", None, 0.1),
        "qk_norm": qk_norm,
        "tokens_qk_norm": of_tokens,
        "all_layers_qk_rmsnorm": qk_norm != "none"
        and of_tokens is None
        and ((enhanced and qk_norm == "head") or choose("all_layers_qk_rmsnorm", False, True)),
        "qk_norm_scale": choose("qk_norm_scale", 8.0, 1.0),
        "tie_embeddings": choose("tie_embeddings", False, True),
        "logit_scale": choose("logit_scale", None, 0.7),
        "use_flash_attn": choose("use_flash_attn", True, False),
    }


@st.composite
def routed_options(draw: st.DrawFn, width: int, depth: int) -> dict:
    """Options of a routed memory. Where keys are shifted, chunks that score alike may differ, so all are chosen."""
    size = draw(st.sampled_from([c for c in range(1, width + 1) if width % c == 0]))
    chunks, shift = draw(st.sampled_from([1, 2, 3, 6])), draw(st.booleans())
    parts = draw(st.sampled_from([u for u in range(1, size + 1) if size % u == 0]))
    return {
        "capacity": size * chunks,
        "chunk_size": size,
        "num_chosen": chunks if shift else draw(st.integers(1, chunks)),
        "num_summaries": parts,
        "summary": "mean" if parts == size else draw(st.sampled_from(["mean", "gate"])),
        "operator": "coordinate_descent" if shift else draw(
            st.sampled_from(["coordinate_descent", "softmax", "top_k"])
        ),
        "temperature": draw(st.sampled_from([1.0, 0.3])),
        "key_shift": shift,
        "positions": draw(st.sampled_from(["none", "rotary"])),
        "layers": (draw(st.integers(1, depth)),),
    }  # fmt: skip


def random_model(config: Config, seed: int = 0) -> BlockRecurrentTransformer:
    """In float64 and eval mode, no parameter at its initial value: gains, gates, biases and scales all matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlockRecurrentTransformer(config).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.3 * torch.randn_like(parameter)
                if name.endswith("head_scale"):
                    parameter *= torch.randn_like(parameter).sign()  # the scale is its absolute value
    return model


def random_stream(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))


@st.composite
def splits(draw: st.DrawFn, n: int, most: int = 6) -> list[int]:
    """Lengths >= 1 of at most `most` pieces that make n."""
    cuts = draw(st.lists(st.integers(1, n - 1), unique=True, max_size=most - 1)) if n > 1 else []
    ends = [*sorted(cuts), n]
    return [end - start for start, end in zip([0, *ends], ends)]
