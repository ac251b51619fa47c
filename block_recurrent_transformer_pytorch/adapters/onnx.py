"""The model as two ONNX graphs, for a host without torch: what it carries goes in and comes out as named tensors.

    python -m block_recurrent_transformer_pytorch.adapters.onnx runs/mine FOLDER

    token.onnx       one token for each row, none of which is the last of its block
    chunk.onnx       up to block_width tokens for each row, within its block: they may complete it, and not go beyond
    weights.bin      of both graphs
    initial.npz      what a row carries that has read nothing, by name, for a batch of 1
    manifest.json    config and tokenizer; names, shapes and types of what goes in and comes out of each graph
    tokenizer.json   of the tokenizers library, if the model reads no bytes

The manifest comes last, so that a folder that has one is complete.

The value NAME comes out as next.NAME; one that does not come out of a graph stays as it was. Rows may stand at
different places, `position.offset` in their blocks, and of a chunk each brings `lengths` tokens, 0 or more; its logits
behind these mean nothing. A row begins a new document with where(row, initial, value) for every value that is carried.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import KeyEntry, TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from .. import __version__, data, pretrained
from ..block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from ..carried import LayerMemory, Memories, Position, States
from ..config import GATES, MEMORIES

FORMAT = 1
MANIFEST, INITIAL, WEIGHTS = "manifest.json", "initial.npz", "weights.bin"
BATCH, TOKENS = 3, 2  # of the examples that are traced; the graphs take any
SHARED_FROM = 1024  # bytes of the smallest weight that goes into WEIGHTS
ALIGNMENT = 4096  # of weights in it, so that they can be mapped into memory

Which = Literal["chunk", "token"]
WHICH: tuple[Which, ...] = ("chunk", "token")


class Carried(NamedTuple):
    """Memories and states as tensors with names, and back."""

    names: list[str]
    tree: TreeSpec
    known: int | None  # an offset that no row exceeds; None: rows may stand anywhere

    def tensors(self, memories: Memories, states: States) -> list[Tensor]:
        return tree_flatten(as_tree(memories, states))[0]

    def values(self, tensors: Iterable[Tensor]) -> tuple[Memories, States]:
        tree = tree_unflatten(tensors, self.tree)
        layers = tuple(LayerMemory(layer["block"], layer["past"]) for layer in tree["memory"])
        position = Position(tree["position"]["offset"], 0, tree["position"].get("blocks"), self.known)
        return Memories(layers, position), States(tuple(tree["states"]), tuple(tree["states_kv"]))


def as_tree(memories: Memories, states: States) -> dict[str, Any]:
    """Carried values as a nesting whose keys make their names."""
    offset, _, blocks, _ = memories.position
    return {
        "position": {"offset": offset} if blocks is None else {"offset": offset, "blocks": blocks},
        "memory": [{"block": layer.block, "past": layer.past} for layer in memories.layers],
        "states": list(states.layers),
        "states_kv": list(states.kv or ()),
    }


def initial_values(model: BlockRecurrentTransformer, batch: int) -> tuple[Memories, States]:
    """What rows carry that have read nothing, as the graphs take it: each row has a place of its own."""
    memories, states = model.init_memories(batch), model.init_states(batch)
    zero = torch.zeros(batch, dtype=torch.int64)
    position = Position(zero, 0, zero.clone() if model.reach else None)
    kv = tuple(model.cell(cell).project(state) for cell, state in zip(model.cells, states.layers))
    return memories._replace(position=position), states._replace(kv=kv)


def make_carried(model: BlockRecurrentTransformer, which: Which) -> Carried:
    paths, tree = tree_flatten_with_path(as_tree(*initial_values(model, 1)))
    known = model.config.block_width - 2 if which == "token" else None
    return Carried([named(path, model.cells) for path, _ in paths], tree, known)


def named(path: tuple[KeyEntry, ...], cells: Sequence[int]) -> str:
    """memory.1.past.xl.k, states.3: layers are numbered from 1."""
    first, *rest = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
    if first == "memory":
        rest[0] = str(int(rest[0]) + 1)
    if first in ("states", "states_kv"):
        rest[0] = str(cells[int(rest[0])])
    return ".".join((first, *rest))


class Graph(nn.Module):
    """The model as a function of tensors alone.

    Attributes:
        changing: which of the carried values come out of it, as indices.
    """

    @torch.no_grad()
    def __init__(self, model: BlockRecurrentTransformer, which: Which) -> None:
        super().__init__()
        self.model, self.which, self.carried = model, which, make_carried(model, which)
        self.changing = list(range(len(self.carried.names)))
        if which == "token":
            ids, _, before = self.example()
            _, *after = self(ids, None, before)
            self.changing = [index for index, (old, new) in enumerate(zip(before, after)) if new is not old]

    def example(self) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Arguments of `forward`."""
        memories, states = initial_values(self.model, BATCH)
        tensors = tuple(x.contiguous() for x in self.carried.tensors(memories, states))
        if self.which == "token":
            return torch.zeros(BATCH, 1, dtype=torch.int64), None, tensors
        return torch.zeros(BATCH, TOKENS, dtype=torch.int64), torch.full((BATCH,), TOKENS), tensors

    def forward(self, ids: Tensor, lengths: Tensor | None, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """ids (b, n), of which rows bring lengths (b,), and what is carried -> logits (b, n, v), and what changed."""
        memories, states = self.carried.values(values)
        logits, memories, states = self.model(
            ids, xl_memories=memories, states=states, lengths=lengths, use_dropout=False
        )
        after = self.carried.tensors(memories, states)
        return logits, *(after[index] for index in self.changing)

    def inputs(self) -> dict[str, Tensor]:
        """The example by the names of the inputs."""
        ids, lengths, values = self.example()
        first = {"ids": ids} if lengths is None else {"ids": ids, "lengths": lengths}
        return first | dict(zip(self.carried.names, values))

    @property
    def outputs(self) -> list[str]:
        return ["logits", *(f"next.{self.carried.names[index]}" for index in self.changing)]


@torch.no_grad()
def export_program(graph: Graph) -> ExportedProgram:
    """The graph as torch.export has it: of any batch, and a chunk of 1 to block_width tokens.

    Raises:
        ValueError: a gate or memory that is registered outside this library, and not made of operations on tensors.
    """
    config = graph.model.config
    batch, tokens = {0: Dim("batch", min=1)}, {1: Dim("n", min=1, max=config.block_width)}
    ids, lengths, values = graph.example()
    is_chunk = lengths is not None
    shapes = {
        "ids": batch | tokens if is_chunk else batch, "lengths": batch if is_chunk else None,
        "values": tuple(batch for _ in values),
    }  # fmt: skip
    try:
        return torch.export.export(graph, (ids, lengths, values), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        registered = [(f"gate={config.gate!r}", GATES[config.gate])]
        registered += [(f"extra_memories={{{name!r}: ...}}", MEMORIES[name]) for name in config.extra_memories]
        package = __name__.partition(".")[0]
        own = [name for name, kind in registered if kind.__module__.partition(".")[0] != package]
        if not own:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{' or '.join(own)} cannot be exported: {type(error).__name__}: {reason}") from error


class SharedWeights:
    """A file that holds each weight once, whichever graphs use it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.places: dict[bytes, int] = {}

    def take(self, model: onnx_ir.Model) -> None:
        """Moves the weights of a graph into the file."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= SHARED_FROM:
                content = tensor.tobytes()
                value.const_value = onnx_ir.ExternalTensor(
                    self.path.name, self.place(content), len(content), tensor.dtype, shape=tensor.shape,
                    name=value.name or "", base_dir=self.path.parent,
                )  # fmt: skip

    def place(self, content: bytes) -> int:
        """Where it begins in the file."""
        digest = hashlib.sha256(content).digest()
        if digest not in self.places:
            self.file.write(bytes(-self.file.tell() % ALIGNMENT))
            self.places[digest] = self.file.tell()
            self.file.write(content)
        return self.places[digest]


def write_graph(graph: Graph, program: ExportedProgram, path: Path, weights: SharedWeights) -> dict[str, Any]:
    """Writes one graph; what the manifest says of it."""
    inputs = graph.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # within torch
        warnings.simplefilter("ignore", DeprecationWarning)
        written = torch.onnx.export(
            program, dynamo=True, input_names=list(inputs), output_names=graph.outputs, verbose=False
        )
    assert written is not None
    model: onnx_ir.Model = written.model
    ClearMetadataAndDocStringPass()(model)  # where each operator comes from: paths of this machine
    weights.take(model)
    onnx_ir.save(model, path)
    return {"file": path.name, **signature(graph, inputs)}


def signature(graph: Graph, inputs: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shapes and types of inputs and outputs by name; "batch" and "n" stand for any number."""
    length: int | str = 1 if graph.which == "token" else "n"
    told = {
        name: {"shape": ["batch", *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")}
        for name, x in inputs.items()
    }
    told["ids"]["shape"] = ["batch", length]
    logits = {"shape": ["batch", length, graph.model.config.num_tokens], "dtype": "float32"}
    carried = {f"next.{name}": told[name] for name in graph.carried.names}
    return {"inputs": told, "outputs": {name: carried.get(name, logits) for name in graph.outputs}}


def check_exportable(model: BlockRecurrentTransformer) -> None:
    """Raises a ValueError that names what cannot be exported."""
    if not isinstance(model, BlockRecurrentTransformer):
        raise ValueError(f"model must be a BlockRecurrentTransformer, not {type(model).__name__}")
    weight = model.token_emb.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"model is {weight.dtype} on {weight.device}; export it in float32 on the CPU: from_pretrained(..., "
            "dtype=torch.float32), or a copy with .float().cpu()"
        )
    if model.config.block_width == 1:
        raise ValueError("block_width=1 cannot be exported: the graph of one token takes tokens that complete no block")


@torch.no_grad()
def export_onnx(
    model: BlockRecurrentTransformer, folder: pretrained.StrPath, tokenizer: data.Tokenizer | None = None
) -> None:
    """Writes both graphs and what a host needs for them; see the head of this module.

    Logits are those of the model in eval mode, to 2e-5 of the largest one.

    Args:
        model: in float32 on the CPU; it is not changed.
        folder: is made; it must be empty.
        tokenizer: a `data.ByteTokenizer` or `data.FileTokenizer`, to be kept beside the graphs.

    Raises:
        ValueError: a model that cannot be exported (another type or device, block_width=1, a gate or memory of your own
            that is not made of operations on tensors), a folder that is not empty, or a tokenizer that cannot be kept.
        OSError: it cannot be written.
    """
    check_exportable(model)
    kept, target = pretrained.kept_as(tokenizer), Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"folder: {target} is not an empty folder")
    graphs = [Graph(model, which) for which in WHICH]
    programs = [export_program(graph) for graph in graphs]
    target.mkdir(parents=True, exist_ok=True)
    told = {}
    with open(target / WEIGHTS, "wb") as file:
        weights = SharedWeights(target / WEIGHTS, file)
        for graph, program in zip(graphs, programs):
            told[graph.which] = write_graph(graph, program, target / f"{graph.which}.onnx", weights)
    carried = graphs[0].carried
    initial: dict[str, Any] = dict(zip(carried.names, (x.numpy() for x in carried.tensors(*initial_values(model, 1)))))
    np.savez_compressed(target / INITIAL, **initial)
    if isinstance(tokenizer, data.FileTokenizer):
        pretrained.write(target / pretrained.TOKENIZER, tokenizer.content)
    content = {
        "format": FORMAT, "made_by": f"block-recurrent-transformer-pytorch {__version__}", "tokenizer": kept,
        "block_width": model.config.block_width, "carried": carried.names, "initial": INITIAL, "graphs": told,
        "config": asdict(model.config),
    }  # fmt: skip
    pretrained.write(target / MANIFEST, json.dumps(content, indent=1).encode() + b"\n")


def load_tokenizer(source: pretrained.StrPath) -> data.Tokenizer | None:
    """That of a run or a saved model; None where it was saved without one."""
    folder = Path(source)
    if not pretrained.is_run(folder) and pretrained.read_config(folder).get("tokenizer") is None:
        return None
    return pretrained.load_tokenizer(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m block_recurrent_transformer_pytorch.adapters.onnx", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", metavar="RUN", help="folder of a run, or one that save_pretrained wrote")
    parser.add_argument("folder", metavar="FOLDER", help="to be made")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which of the run")
    options = parser.parse_args(arguments)
    try:
        model = pretrained.from_pretrained(options.source, checkpoint=options.checkpoint, dtype=torch.float32)
        export_onnx(model, options.folder, load_tokenizer(options.source))
    except (ValueError, ImportError, OSError) as error:
        print(f"onnx: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
