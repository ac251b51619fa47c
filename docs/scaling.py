"""The tables of scaling.md: memory and traffic of the paper's models, worked out from their sizes. Nothing is trained.

    python docs/scaling.py                        # prints the tables
    python docs/scaling.py --update               # writes them into scaling.md
    python docs/scaling.py --count medium_150M    # the formulas of the activations beside what autograd would keep

Parameters are counted on the meta device. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, paper
from block_recurrent_transformer_pytorch.footprint import footprint
from block_recurrent_transformer_pytorch.optim import _factored_dims

PAGE = Path(__file__).with_name("scaling.md")
SIZES = ["small_37M", "small_75M", "medium_150M", "medium_300M", "large_600M", "large_1200M"]
VARIANT, SEGMENT, SEGMENTS, MILLION = "fixed:skip", 4096, 8, 10**6
PRECISIONS = ("fp32", "bf16")
WORD = 4  # bytes of a parameter, a gradient and of each average of an optimizer: fp32, also under autocast


@cache
def make(size: str, variant: str = VARIANT, **options: Any) -> BlockRecurrentTransformer:
    """A model of the paper without storage."""
    with torch.device("meta"):
        return BlockRecurrentTransformer.paper(size, variant, **options)


def count(model: BlockRecurrentTransformer, prefix: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefix))


# ----------------------------------------------------------------------------------- what does not depend on the batch


def adafactor(model: BlockRecurrentTransformer) -> int:
    """Bytes that `optim.Adafactor` remembers: momentum, and second moments, factored where both sides have 128."""
    total = 0
    for p in model.parameters():
        dims = _factored_dims(p.shape, 128)
        total += p.numel() + (p.numel() if dims is None else p.shape[dims[0]] + p.shape[dims[1]])
    return WORD * total


def units(model: BlockRecurrentTransformer) -> list[int]:
    """Parameters of what `distributed.shard` gathers together: the model's own unit first, then the layers'."""
    names = [f"layers.{i}." if layer.cell is None else f"layers.{i}.feed_forward."
             for i, layer in enumerate(model.layers)]  # fmt: skip
    layers = [count(model, name) for name in names]
    return [count(model) - sum(layers), *layers]


def fsdp_memory(model: BlockRecurrentTransformer, processes: int) -> float:
    """A share of weights, gradients and averages; the model's own unit and two layers whole, with their gradients."""
    own, *layers = units(model)
    return WORD * (4 * count(model) / processes + 2 * own + 3 * max(layers))


# ------------------------------------------------------------------------------------------------- what a row needs


def activations(config: Config, tokens: int, precision: str) -> float:
    """Bytes kept for the backward pass of a segment of one row of a `fixed:skip` model, with a fused attention kernel.

    In values of a token, a layer keeps 3 d (what the two norms take in, and a dropout mask), 11 times all heads (keys
    and values, and once more beside those of the block before; queries raw, normalised and scaled; what attention
    finds, twice) and the hidden layer. The bias of the positions is kept once, whatever the number of rows, and its
    distances once for all layers. Under autocast the residual stream stays in fp32 and has copies in bf16, as have the
    output maps of the attention; what is computed again takes its weights' copies with it. The update of a state is
    computed again, and keeps what it takes in. The loss of a large vocabulary keeps the gradients of what it takes in,
    and of the embeddings.
    """
    inner, dim, width = config.heads * config.dim_head, config.dim, config.block_width
    layer = {"fp32": 4 * (3 * dim + 11 * inner + config.ff_dim), "bf16": 18 * dim + 22 * inner + 2 * config.ff_dim}
    token = {"fp32": 4 * 9 * inner, "bf16": 31 * inner + dim}  # of a recurrent layer: reading and being read
    state = {"fp32": 14 * dim + 20 * inner, "bf16": 15 * dim + 14 * inner}  # of a state vector in a block
    bias = 2 * width * width * config.heads * WORD  # under autocast, too
    pairs = 2 * width * width * 8  # which distance each query and key have, once for all layers
    cells, blocks = len(config.recurrent_layers), tokens // width
    total = config.depth * (tokens * layer[precision] + bias) + pairs + 5 * 4 * dim * tokens + vocabulary(config)
    total += cells * (tokens * token[precision] + blocks * config.num_state_vectors * state[precision])
    return total + (2 * dim * config.depth * inner if precision == "bf16" else 0)


def checkpointed(config: Config, tokens: int, precision: str) -> float:
    """The same with use_checkpointing: the input of every layer, and all of one layer while it is computed again."""
    inputs = 4 * config.dim * tokens * (config.depth + 4) + vocabulary(config)
    return inputs + one_layer(config, tokens, precision)


def one_layer(config: Config, tokens: int, precision: str) -> float:
    """What a layer keeps, and its share of what is kept once for all."""
    return (activations(config, tokens, precision) - vocabulary(config)) / config.depth


def vocabulary(config: Config) -> int:
    """The gradient of the embeddings, which the loss of a large vocabulary keeps."""
    return WORD * config.dim * config.num_tokens


def carried(config: Config) -> int:
    """Bytes of memories and states of one row at the end of a segment of whole blocks."""
    memory = 2 * config.kv_heads * config.dim_head * sum(config.xl_width(n) for n in range(1, config.depth + 1))
    return WORD * (memory + len(config.recurrent_layers) * config.num_state_vectors * config.dim)


# ------------------------------------------------------------------------------------------------------------ traffic


def ddp_traffic(parameters: int, processes: int) -> float:
    """Bytes that a process sends in a step: one all-reduce of the gradients, as a ring."""
    return 2 * (processes - 1) / processes * WORD * parameters


def fsdp_traffic(model: BlockRecurrentTransformer, processes: int, passes: int) -> float:
    """Bytes that a process sends in a step of so many forward and backward passes (--accumulate times segments).

    In each pass the layers are gathered twice and the model's own unit once; gradients are reduced in the last one.
    """
    own, *layers = units(model)
    gathered = passes * (2 * sum(layers) + own)
    return (processes - 1) / processes * WORD * (gathered + count(model))


# ------------------------------------------------------------------------------------------------------------- tables


def table(head: str, rows: list[list[Any]]) -> str:
    lines = [head, "|---" + "|---:" * (head.count("|") - 2) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def millions(n: float) -> str:
    return f"{n / 1e6:,.1f}"


def gb(n: float) -> str:
    return f"{n / 1e9:,.2f}"


def sizes() -> str:
    rows = []
    for size in SIZES:
        dim, heads, dim_head, ff_dim, depth = paper.SIZES[size]
        model = make(size)
        embedding = model.token_emb.weight.numel()
        others = [count(make(size, variant)) - embedding for variant in ("slide", "lstm:dual")]
        rows.append([f"`{size}`", dim, f"{heads} × {dim_head}", ff_dim, depth, millions(others[0]),
                     millions(count(model) - embedding), millions(others[1]), millions(embedding)])  # fmt: skip
    return table("| size | dim | heads | ff_dim | depth | slide | fixed:skip | lstm:dual | T5 table |", rows)


def parameters() -> str:
    rows = []
    for size in SIZES:
        model = make(size)
        n = count(model)
        fsdp = [gb(fsdp_memory(model, p)) for p in (8, 64)]
        rows.append([f"`{size}`", millions(n), gb(WORD * n), gb(2 * WORD * n), gb(adafactor(model)),
                     gb(4 * WORD * n), *fsdp, gb(3 * WORD * n)])  # fmt: skip
    head = ("| size | parameters, M | weights | AdamW | Adafactor | one GPU, or each of DDP | each of 8, FSDP2 "
            "| each of 64, FSDP2 | host, checkpoint |")  # fmt: skip
    return table(head, rows)


def rows() -> str:
    lines = []
    for size in SIZES:
        model = make(size)
        config = model.config
        kept = [gb(activations(config, SEGMENT, p)) for p in PRECISIONS]
        again = [gb(checkpointed(config, SEGMENT, p)) for p in PRECISIONS]
        lines.append([f"`{size}`", *kept, *again, gb(carried(config))])
    return table("| size | fp32 | bf16 | fp32, checkpointing | bf16, checkpointing | carried |", lines)


def traffic() -> str:
    lines = []
    for size in SIZES:
        model = make(size)
        values = [ddp_traffic(count(model), 8), ddp_traffic(count(model), 64)]
        values += [fsdp_traffic(model, 8, 1), fsdp_traffic(model, 8, 4), fsdp_traffic(model, 64, 1)]
        lines.append([f"`{size}`", *map(gb, values)])
    head = "| size | DDP, 8 | DDP, 64 | FSDP2, 8, one pass | FSDP2, 8, four passes | FSDP2, 64, one pass |"
    return table(head, lines)


def depths() -> str:
    lines = []
    for size in SIZES:
        model = make(size)
        config = model.config
        kept, held = activations(config, SEGMENT, "bf16"), carried(config)
        lines.append([f"`{size}`", gb(kept), gb(SEGMENTS * kept), gb(kept + (SEGMENTS + 1) * held),
                      gb(checkpointed(config, SEGMENT, "bf16") + (SEGMENTS + 1) * held),
                      gb(kept + (-(-MILLION // SEGMENT) + 1) * held)])  # fmt: skip
    head = f"| size | `--bptt 1` | `--bptt {SEGMENTS}` | `--bptt replay` | replay, checkpointing | replay, 1 M tokens |"
    return table(head, lines)


TABLES = {"sizes": sizes, "parameters": parameters, "rows": rows, "traffic": traffic, "bptt": depths}


def updated(page: str) -> str:
    """The page with the tables between its markers as they are computed now."""
    for name, compute in TABLES.items():
        begin, end = f"<!-- {name} -->\n\n", f"\n\n<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = before + begin + compute() + end + rest.split(end)[1]
    return page


# ----------------------------------------------------------------------------------------------- what autograd keeps


class Fused(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, mask, out)
        return out


def counted(options: dict[str, Any], tokens: int, precision: str) -> int:
    """Bytes that autograd keeps for a segment of one row, beside the parameters: from shapes alone."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:
        if precision == "bf16":
            q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        return Fused.apply(q, k, v, mask)

    real, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return footprint(Config(**options), rows=1, segment=tokens).activations
    finally:
        F.scaled_dot_product_attention = real


def comparison(size: str) -> str:
    options = paper.options(size, VARIANT)
    lines = []
    for precision in PRECISIONS:
        formula = activations(Config(**options), SEGMENT, precision)
        lines.append([precision, gb(formula), gb(counted(options, SEGMENT, precision))])
    config = Config(**options)
    absent = one_layer(config, SEGMENT, "fp32")  # when the backward pass begins
    formula = checkpointed(config, SEGMENT, "fp32") - absent
    lines.append(["fp32, checkpointing", gb(formula),
                  gb(counted({**options, "use_checkpointing": True}, SEGMENT, "fp32"))])  # fmt: skip
    return table(f"| {size} | formula, GB | counted, GB |", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the tables into scaling.md")
    parser.add_argument("--count", metavar="SIZE", choices=paper.SIZES, help="check the formulas of the activations")
    options = parser.parse_args()
    if options.count:
        print(comparison(options.count))
    elif options.update:
        PAGE.write_text(updated(PAGE.read_text()))
    else:
        print("\n\n".join(f"{name}\n\n{compute()}" for name, compute in TABLES.items()))


if __name__ == "__main__":
    main()
