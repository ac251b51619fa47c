"""The figures: each a function that measures some cases, to be run in a process of its own.

`python -m benchmarks.figures NAME --json FILE` is what `python -m benchmarks` starts for each of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, RecurrentTrainWrapper
from block_recurrent_transformer_pytorch.paper import VARIANTS
from block_recurrent_transformer_pytorch.paper import options as paper_options

from .contestants import (
    ENWIK8,
    SMALL,
    TRAINING,
    gemma_token,
    onnx_host,
    onnx_prefill,
    onnx_token,
    ours_prefill,
    ours_step,
    ours_token,
    reference_prefill,
    reference_step,
    reference_token,
    tokens,
)  # fmt: skip
from .limits import limit_step, weights_once
from .measure import (
    DEVICE,
    Unavailable,
    case,
    describe_machine,
    has_fast_bf16,
    in_own_process,
    operators,
    peak_memory,
    peak_resident,
    resident,
    timed,
    warm_up,
)  # fmt: skip

Cases = list[dict[str, Any]]
TINY = {**SMALL, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "block_width": 16, "num_state_vectors": 16,
        "max_seq_len": 64, "recurrent_layers": (1,)}  # fmt: skip  # for --quick: says that everything runs, no more


def train_enwik8(quick: bool) -> Cases:
    """Training step at the reference's enwik8 configuration: forward, backward, optimizer, carried memories"""
    options, cases = TINY if quick else ENWIK8, []
    for batch, runs in ((1, 9), (4, 5)):
        for use_bf16 in (False, True):
            kind = "bf16 autocast" if use_bf16 else "fp32"
            name = f"batch {batch}, {kind}"
            if use_bf16 and not has_fast_bf16():
                cases.append(case(name, {}, "s", {"ours": "not measured: this processor only emulates bf16"}))
                continue
            makers = {who: bind(make, options, batch, use_bf16) for who, make in TRAINING.items()}
            makers["limit"] = bind(limit_step, options, batch, use_bf16)
            if batch > 1:
                del makers["RecurrentGemma"]  # its loop over tokens takes minutes
            if use_bf16:
                makers["reference, fp32"] = bind(reference_step, options, batch, False)
                makers["ours, fp32"] = bind(ours_step, options, batch, False)
            cases.append(timed(name, makers, 2 if quick else runs))
    return cases


def train_small(quick: bool) -> Cases:
    """Training step of a small model with many blocks (dim 128, depth 4, block 64, 64 states, 1,024 tokens)"""
    options, batch = TINY if quick else SMALL, 2 if quick else 8
    makers = {
        "ours": bind(ours_step, options, batch),
        "reference": bind(reference_step, options, batch),
        "limit": bind(limit_step, options, batch),
    }
    return [timed(f"batch {batch}, fp32", makers, 2 if quick else 9)]


SIZES: dict[str, tuple[int, dict[str, Any]]] = {  # batch, and what differs from the enwik8 configuration
    "a vocabulary of 20,000": (1, {"num_tokens": 20_000}),
    "dim 1024, depth 2, 16 heads": (1, {"dim": 1024, "depth": 2, "heads": 16, "recurrent_layers": (1,)}),
    "depth 8, blocks of 128, 256 states": (1, {"depth": 8, "block_width": 128, "num_state_vectors": 256}),
    "dim 256, depth 4, blocks of 128": (4, {
        "dim": 256, "depth": 4, "heads": 4, "block_width": 128, "num_state_vectors": 128, "max_seq_len": 512,
        "recurrent_layers": (2,),
    }),
    "dim 256, depth 4, without flash": (2, {
        "dim": 256, "depth": 4, "block_width": 256, "num_state_vectors": 256, "max_seq_len": 512,
        "recurrent_layers": (2,), "use_flash_attn": False,
    }),
    "dim 64, depth 2, blocks of 16": (4, {
        "dim": 64, "depth": 2, "dim_head": 32, "heads": 2, "block_width": 16, "num_state_vectors": 16,
        "max_seq_len": 128, "recurrent_layers": (1,),
    }),
}  # fmt: skip


def train_sizes(quick: bool) -> Cases:
    """Training step at other sizes, fp32"""
    cases = []
    for name, (batch, different) in SIZES.items():
        options = TINY if quick else {**ENWIK8, **different}
        contestants = (("ours", ours_step), ("reference", reference_step), ("limit", limit_step))
        makers = {who: bind(make, options, batch) for who, make in contestants}
        cases.append(timed(f"{name}, batch {batch}", makers, 2 if quick else 7))
    return cases


def variants(quick: bool) -> Cases:
    """Training step of the authors' variants (dim 256, depth 4, block 128, 512 tokens) beside their `slide`"""
    sizes = {
        "num_tokens": 256, "dim": 256, "depth": 4, "heads": 4, "kv_heads": 4, "dim_head": 64, "ff_dim": 1024,
        "max_seq_len": 512, "block_width": 128, "num_state_vectors": 128, "attn_dropout": 0.0,
    }  # fmt: skip
    if quick:
        sizes |= {"dim": 32, "ff_dim": 64, "dim_head": 8, "block_width": 16, "num_state_vectors": 16, "max_seq_len": 64}
    slide, cases = paper_options("small", "slide", **sizes), []
    for variant in VARIANTS:
        if variant in ("slide", "xl"):
            continue
        makers = {
            "ours": bind(ours_step, paper_options("small", variant, **sizes), 2),
            "ours, slide": bind(ours_step, slide, 2),
        }
        cases.append(timed(variant, makers, 2 if quick else 5))
    return cases


def recurrent_layer(quick: bool) -> Cases:
    """A recurrent layer against one more plain layer: training step of 6 layers with it, and of 7 without"""
    options = TINY if quick else ENWIK8
    plain = {**options, "depth": options["depth"] + 1, "recurrent_layers": ()}
    makers = {"ours": bind(ours_step, options, 1), "one more plain layer": bind(ours_step, plain, 1)}
    return [timed("enwik8 configuration, batch 1", makers, 2 if quick else 7)]


REPLAYED = {**SMALL, "max_seq_len": 128}


def wrapped_step(how: str, options: dict[str, Any], segments: int) -> Callable[[], Any]:
    """Gradients of a document of many segments: through all of them by replay or at once, or cut between them."""
    from block_recurrent_transformer_pytorch.replay import replay_backward

    model = BlockRecurrentTransformer(**options).to(DEVICE)
    wrapper = RecurrentTrainWrapper(model, detach_segments=how == "cut between segments")
    x = tokens(options, 4, segments * options["max_seq_len"] + 1)

    def step() -> None:
        if how == "replay":
            replay_backward(wrapper, x)
        elif how == "at once":
            wrapper(x).backward()
        else:
            for loss in wrapper.segments(x):
                loss.backward()
        model.zero_grad()

    return step


def replay(quick: bool) -> Cases:
    """Exact gradients through 32 segments: by replay, all at once, and cut between segments (dim 128, batch 4)"""
    options, segments = (TINY, 4) if quick else (REPLAYED, 32)
    ways = {"ours": "replay", "ours, at once": "at once", "ours, cut": "cut between segments"}
    makers = {who: bind(wrapped_step, how, options, segments) for who, how in ways.items()}
    memory = {who: [in_own_process(peak_memory, wrapped_step, how, options, segments)] for who, how in ways.items()}
    return [
        timed(f"{segments} segments, time", makers, 2 if quick else 3),
        case(f"{segments} segments, peak memory", memory, "MiB"),
    ]


def prefill(quick: bool) -> Cases:
    """Reading a prompt without gradients, batch 1"""
    options = TINY if quick else ENWIK8
    cases = []
    for length in (128,) if quick else (1024, 4096):
        makers = {
            "ours": bind(ours_prefill, options, length, 1),
            "reference": bind(reference_prefill, options, length, 1),
        }
        cases.append(timed(f"{length:,} tokens", makers, 2 if quick else 5))
    return cases


def decode(quick: bool) -> Cases:
    """One token at the enwik8 configuration; the limit reads every weight once"""
    options, cases = TINY if quick else ENWIK8, []
    places = [(position, 1, False) for position in ((10, 50) if quick else (64, 257, 513, 1000, 1_000_000, 1_000_424))]
    at = 50 if quick else 1000
    places += [(at, 8, False), (at, 8, True), (at, 32, False), (at, 32, True)]
    for position, batch, ragged in places:
        read = enough(position, options["block_width"])
        makers: dict[str, Any] = {"ours": bind(ours_token, options, read, batch, ragged)}
        if not ragged and position == at and batch < 32:
            makers["ours, compiled"] = bind(ours_token, options, read, batch, ragged, True)
        if batch == 1:
            makers["reference"] = bind(reference_token, options, position, batch)
        if batch == 1 and position == at:
            makers["RecurrentGemma"] = bind(gemma_token, options, position, batch)
        makers["limit"] = bind(weights_once, options, batch)
        torch._dynamo.reset()
        calls = {"reference": 1, "RecurrentGemma": 5}
        rows = "ragged" if ragged else "equal"
        name = f"position {position:,}, batch {batch}{f', {rows}' if batch > 1 else ''}"
        cases.append(timed(name, makers, 2 if quick else 15, {who: calls.get(who, 20) for who in makers}))
        if read != position:
            cases[-1]["notes"]["ours"] = f"{read:,} tokens really read: the memories are full, and at the same place"
    return cases


def enough(position: int, width: int) -> int:
    """Tokens to read for the same memories, up to what is in them, as at a far position: full, at the same place."""
    return position if position <= 4 * width else 2 * width + position % width


def decode_far(quick: bool) -> Cases:
    """One token of the small model after really reading so many tokens"""
    options = TINY if quick else SMALL
    far = 20_000 if quick else 1_000_000
    near = 1000 - 1000 % options["block_width"] + far % options["block_width"]  # at the same place of a block
    makers = {"ours": bind(ours_token, options, far, 1), f"ours, at {near:,}": bind(ours_token, options, near, 1)}
    return [timed(f"position {far:,}", makers, 3 if quick else 25, dict.fromkeys(makers, 20))]


def memory(quick: bool) -> Cases:
    """Peak memory of a training step, each in its own process, beyond the imports"""
    options, cases = TINY if quick else ENWIK8, []
    contestants = {
        "ours": (ours_step, options), "ours, recomputing": (ours_step, {**options, "use_checkpointing": True}),
        "reference": (reference_step, options), "Transformer-XL": (TRAINING["Transformer-XL"], options),
    }  # fmt: skip
    for batch in (1, 4):
        peaks, notes = {}, {}
        for who, (make, chosen) in contestants.items():
            try:
                peaks[who] = [in_own_process(peak_memory, make, chosen, batch)]
            except Unavailable as why:
                notes[who] = str(why)
        cases.append(case(f"batch {batch}, fp32", peaks, "MiB", notes))
    recomputing = {**options, "use_checkpointing": True}
    makers = {"ours": bind(ours_step, options, 4), "ours, recomputing": bind(ours_step, recomputing, 4)}
    cases.append(timed("batch 4, time of recomputing", makers, 2 if quick else 3))
    return cases


def peaks_of_stream(options: dict[str, Any], *lengths: int) -> list[float]:
    """Peak memory of one process after so many tokens, and after so many more."""
    warm_up()
    before, peaks = resident(), []
    model, carried, read = BlockRecurrentTransformer(**options).to(DEVICE).eval(), {}, 0
    for length in lengths:
        while read < length:
            with torch.no_grad():
                _, memories, states = model(tokens(options, 1, options["max_seq_len"]), logits_to_keep=1, **carried)
            carried = {"xl_memories": memories, "states": states}
            read += options["max_seq_len"]
        peaks.append((peak_resident() - before) / 2**20)
    return peaks


def stream(quick: bool) -> Cases:
    """Peak memory of reading a stream with the small model, in one process"""
    options, long, short = (TINY, 20_000, 2_000) if quick else (SMALL, 1_000_000, 10_000)
    first, last = in_own_process(peaks_of_stream, options, short, long)
    return [case(f"{long:,} tokens", {"ours": [last], f"ours, {short:,} tokens": [first]}, "MiB")]


def dispatched(quick: bool) -> Cases:
    """Operators dispatched, without views: what a GPU would have to launch"""
    cases = []
    for name, options, batch in (("enwik8", ENWIK8, 1), ("small", SMALL, 8)):
        options, batch = (TINY, 1) if quick else (options, batch)
        makers = {"ours": ours_step, "reference": reference_step}
        counts, notes = count(makers, options, batch, False, False)
        cases.append(case(f"forward and backward, {name} configuration", counts, "operators", notes))
        position = 50 if quick else 1000
        counts, notes = count({"ours": ours_token, "reference": reference_token}, options, position, 1)
        cases.append(case(f"one token at position {position:,}, {name}", counts, "operators", notes))
        counts, notes = count({"ours": ours_token}, options, position, 8, True)
        cases.append(case(f"one token, {name}, batch 8, ragged", counts, "operators", notes))
    return cases


def count(makers: dict[str, Any], *arguments: Any) -> tuple[dict[str, list[float]], dict[str, str]]:
    counts, notes = {}, {}
    for who, make in makers.items():
        try:
            counts[who] = [operators(make(*arguments))]
        except Unavailable as why:
            notes[who] = str(why)
    return counts, notes


def compiling(quick: bool) -> Cases:
    """Seconds until the first call of the compiled model returns, and what one call takes then"""
    options, cases = TINY if quick else ENWIK8, []
    for name, make, arguments in (
        ("decoding, batch 1", ours_token, (50 if quick else 1000, 1)), ("training step, batch 1", ours_step, (1,)),
    ):  # fmt: skip
        torch._dynamo.reset()
        eager = make(options, *arguments)
        step = compiled_step(make, options, *arguments)
        start = time.perf_counter()
        step()
        first = time.perf_counter() - start
        cases.append(case(f"{name}, first call", {"ours, compiled": [first]}, "s"))
        makers = {"ours": lambda run=eager: run, "ours, compiled": lambda run=step: run}
        cases.append(timed(f"{name}, calls after it", makers, 2 if quick else 5))
    return cases


def compiled_step(make: Callable[..., Any], options: dict[str, Any], *arguments: Any) -> Callable[[], Any]:
    if make is ours_token:
        return ours_token(options, *arguments, use_compile=True)
    original = BlockRecurrentTransformer.forward
    model_forward = torch.compile(original, fullgraph=True)

    def step() -> Any:
        BlockRecurrentTransformer.forward = model_forward
        try:
            return run()
        finally:
            BlockRecurrentTransformer.forward = original

    run = make(options, *arguments)
    return step


def onnx(quick: bool) -> Cases:
    """In onnxruntime, at the enwik8 configuration"""
    options, who = TINY if quick else ENWIK8, "ours, onnxruntime"
    width, runs = options["block_width"], 2 if quick else 15
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            host = onnx_host(options, folder / "onnx")
        except Unavailable as why:
            return [case("one token", {}, "s", {who: str(why)})]
        cases = []
        for batch, ragged in ((1, False), (8, False), (8, True)):
            place = (50 if quick else 1000, batch, ragged)
            makers = {"ours": bind(ours_token, options, *place), who: bind(onnx_token, host, *place)}
            rows = f", {'ragged' if ragged else 'equal'}" if batch > 1 else ""
            title = f"one token at position {place[0]:,}, batch {batch}{rows}"
            cases.append(timed(title, makers, runs, dict.fromkeys(makers, 20)))
        last = 2 * width - 1
        makers = {"ours": bind(ours_token, options, last, 1), who: bind(onnx_token, host, last, 1)}
        cases.append(timed("the last token of a block, batch 1", makers, runs))
        makers = {"ours": bind(ours_prefill, options, 2 * width, 1), who: bind(onnx_prefill, host, 2 * width, 1)}
        cases.append(timed(f"reading {2 * width:,} tokens, batch 1", makers, 2 if quick else 5))
        BlockRecurrentTransformer(**options).save_pretrained(folder / "saved")
        sizes = {
            who: [sum(file.stat().st_size for file in (folder / part).iterdir()) / 2**20]
            for who, part in (("ours", "saved"), (who, "onnx"))
        }
        return [*cases, case("size of the files", sizes, "MiB")]


def importing(quick: bool) -> Cases:
    """Import of the package on top of torch"""
    code = "import torch, time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    times = []
    for _ in range(2 if quick else 7):
        done = subprocess.run(
            [sys.executable, "-c", code.format("block_recurrent_transformer_pytorch")], capture_output=True, text=True,
            check=True, cwd=Path(__file__).resolve().parent.parent,
        )  # fmt: skip
        times.append(float(done.stdout))
    return [case("import block_recurrent_transformer_pytorch", {"ours": times}, "s")]


def bind(make: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """`make` with its arguments, to be called when its turn comes."""
    return lambda: make(*arguments)


FIGURES: dict[str, Callable[[bool], Cases]] = {
    "train_enwik8": train_enwik8, "train_small": train_small, "train_sizes": train_sizes, "variants": variants,
    "recurrent_layer": recurrent_layer, "replay": replay, "prefill": prefill, "decode": decode,
    "decode_far": decode_far, "memory": memory, "stream": stream, "operators": dispatched, "compile": compiling,
    "import": importing, "onnx": onnx,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=FIGURES)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny sizes: says that everything runs, no more")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    figure = FIGURES[given.name]
    cases = figure(given.quick)
    title = (figure.__doc__ or "").strip()
    record = {"title": title, "machine": describe_machine(), "quick": given.quick, "cases": cases}
    given.json.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
