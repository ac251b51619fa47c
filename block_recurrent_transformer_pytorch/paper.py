"""The models of the paper as its authors' code (meliad) builds them: which options, sizes and variants."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, Any] = {  # what the code does in all of its published settings
    "attention_window": "sliding", "empty_memory": "zeros", "positions": "t5", "norm": "rms", "ff_activation": "relu",
    "candidate_bias": False, "state_reads_memory": True, "tie_embeddings": True, "init": "lecun",
}  # fmt: skip

DROPOUTS: dict[str, Any] = dict.fromkeys(("attn_dropout", "ff_dropout", "attn_input_dropout", "output_dropout"), 0.05)

# size: dim, heads, dim_head, ff_dim, depth. The names count parameters in millions, without the embedding table.
SIZES = {
    "tiny_test": (32, 2, 16, 64, 3),
    "small": (512, 8, 128, 2048, 6),
    "small_37M": (512, 8, 64, 2048, 12),
    "small_75M": (512, 8, 128, 4096, 12),
    "medium_150M": (1024, 8, 128, 4096, 12),  # the main model of the paper
    "medium_300M": (1024, 16, 128, 8192, 12),
    "large_600M": (2048, 16, 128, 8192, 12),
    "large_1200M": (2048, 32, 128, 16384, 12),
    "tall_24L": (2048, 16, 128, 8192, 24),
}

# slide: segments of several windows; xl: one window a segment. The same layers, and no states, in both.
VARIANTS: dict[str, dict[str, Any]] = {
    "slide": {"recurrent_layers": ()},
    "xl": {"recurrent_layers": (), "max_seq_len": 512},
    **{
        f"{gate}:{update}": {"gate": gate, "state_update": update}
        for gate in ("fixed", "lstm", "full")
        for update in ("skip", "dual", "single")
    },
    "feedback": {"gate": "fixed", "state_update": "skip", "block_feedback": True},
}


def options(size: str, variant: str, **overrides: Any) -> dict[str, Any]:
    """The options of a `Config` for one of SIZES and one of VARIANTS, with `overrides` on top.

    Defaults: the T5 vocabulary of 32128 tokens, segments of 4096, windows of 512, 512 states in the third layer from
    the top (in layers 10 and 20 of 24), dropout 0.05.

    Raises:
        ValueError: an unknown size or variant.
    """
    for name, value, known in (("size", size, SIZES), ("variant", variant, VARIANTS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {list(known)}")
    dim, heads, dim_head, ff_dim, depth = SIZES[size]
    depth = overrides.get("depth", depth)
    return {
        "num_tokens": 32128, "dim": dim, "depth": depth, "heads": heads, "kv_heads": heads, "dim_head": dim_head,
        "ff_dim": ff_dim, "max_seq_len": 4096, "block_width": 512, "num_state_vectors": 512,
        "recurrent_layers": (10, 20) if depth == 24 else (max(1, depth - 2),), "qk_norm": "head",
        "all_layers_qk_rmsnorm": True, "use_flash_attn": True, **OPTIONS, **DROPOUTS, **VARIANTS[variant], **overrides,
    }  # fmt: skip
