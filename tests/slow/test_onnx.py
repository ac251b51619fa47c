"""The two graphs in onnxruntime and in torch.export, read by the host of the example, beside the model itself."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.slow
for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason="needs the extra [onnx]")

from block_recurrent_transformer_pytorch import (  # noqa: E402
    BlockRecurrentTransformer,
    Config,
    Gate,
    Shares,
    data,
    register_gate,
)
from block_recurrent_transformer_pytorch.adapters import onnx as adapter  # noqa: E402
from block_recurrent_transformer_pytorch.paper import OPTIONS as PAPER  # noqa: E402

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "onnx_stream.py"
HOST = runpy.run_path(str(EXAMPLE))
LIMIT = 300  # seconds of one test, or of one command
WIDTH, TOKENS = 4, 23
CLOSE = 2e-5  # of the largest logit, in float32
BASE = {
    "num_tokens": 256, "dim": 16, "depth": 1, "dim_head": 4, "heads": 4, "block_width": WIDTH, "max_seq_len": 8,
    "num_state_vectors": 3, "recurrent_layers": (1,),
}  # fmt: skip
WRITTEN: dict[str, dict[str, Any]] = {
    "memories": {
        "use_compressed_mem": True, "compressed_mem_factor": 2, "extra_memories": {"sinks": {"tokens": 2}},
        "gate": "lstm", "state_update": "dual",
    },
    "token-gated": {
        "state_update": "token_gated", "gate": "hard", "positions": "rotary", "ff_activation": "swiglu",
        "qkv_bias": True, "use_flash_attn": True, "tie_embeddings": False,
    },
}  # fmt: skip
TRACED: dict[str, dict[str, Any]] = {
    "enhanced": {"enhanced_recurrence": True, "depth": 2, "gate": "full"},
    "feedback": {
        **PAPER, "qk_norm": "head", "all_layers_qk_rmsnorm": True, "kv_heads": 2, "block_feedback": True, "depth": 2,
        "gate": "lstm", "state_update": "single",
    },
    "read below": {
        "depth": 2, "recurrent_layers": (2,), "read_recurrent_layers": (1,), "positions": "dynamic", "num_xl_blocks": 2,
        "state_reads_memory": True, "norm": "rms", "qk_norm": "rms",
    },
    "routed": {"extra_memories": {"routed": {"capacity": 8, "chunk_size": 2, "num_chosen": 2, "key_shift": True}}},
    "no states": {"recurrent_layers": (), "num_xl_blocks": 0, "qk_norm": "none"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make(**options: Any) -> BlockRecurrentTransformer:
    """Weights so large that a wrong memory shows in the tokens; in training mode, which must not matter."""
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(Config(**{**BASE, "ff_dropout": 0.5, "emb_dropout": 0.5, **options}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


class Programs(HOST["Model"]):
    """The host with the programs of torch.export in the place of onnxruntime."""

    def __init__(self, model: BlockRecurrentTransformer) -> None:
        graphs = {which: adapter.Graph(model, which) for which in ("token", "chunk")}
        carried = graphs["chunk"].carried
        self.names, tensors = carried.names, carried.tensors(*adapter.initial_values(model, 1))
        self.outputs = {which: graph.outputs[1:] for which, graph in graphs.items()}
        self.graphs = {which: adapter.export_program(graph).module() for which, graph in graphs.items()}
        self.initial = dict(zip(self.names, (x.detach().numpy() for x in tensors)))
        self.width = model.config.block_width
        self.manifest = {"config": {"num_tokens": model.config.num_tokens}}

    def call(self, graph: str, carried: dict[str, Any], **inputs: Any) -> tuple[Any, dict[str, Any]]:
        given = {name: torch.as_tensor(value) for name, value in (inputs | carried).items()}
        values = tuple(given[name] for name in self.names)
        logits, *changed = self.graphs[graph](given["ids"], given.get("lengths"), values)
        named = zip(self.outputs[graph], changed)
        return logits.detach().numpy(), carried | {
            name.removeprefix("next."): x.detach().numpy() for name, x in named
        }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each model of WRITTEN; the first by the command line, from a folder of weights."""
    folder = tmp_path_factory.mktemp("onnx")
    make(**WRITTEN["memories"]).save_pretrained(folder / "saved", tokenizer=data.ByteTokenizer())
    module = "block_recurrent_transformer_pytorch.adapters.onnx"
    run([sys.executable, "-m", module, str(folder / "saved"), str(folder / "memories")], folder)
    adapter.export_onnx(make(**WRITTEN["token-gated"]), folder / "token-gated")
    return {name: folder / name for name in WRITTEN}


def run(command: list[str], folder: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=env, cwd=folder, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def random_ids(batch: int, seed: int = 1) -> Tensor:
    return torch.randint(256, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def logits_of(model: BlockRecurrentTransformer, ids: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids, use_dropout=False)[0].numpy()


def check_against(model: BlockRecurrentTransformer, host: Any) -> None:
    """Rows whose prompts have 1, 3, 5, ... tokens are read in chunks of three, then go on one by one, over six blocks;
    their logits are those of the model, which reads each row in one go, and so are the tokens it likes best."""
    for batch in (1, 2, 5):
        ids, places = random_ids(batch), np.arange(batch) * 2 + 1
        wanted, rows = logits_of(model, ids), np.arange(batch)
        tolerance = CLOSE * np.abs(wanted).max()
        logits, carried = host.read([row[:n].numpy() for row, n in zip(ids, places)], host.start(batch), chunk=3)
        for step in range(TOKENS - places.max() + 1):
            np.testing.assert_allclose(logits, wanted[rows, places + step - 1], rtol=0, atol=tolerance)
            if step < TOKENS - places.max():
                logits, carried = host.step(ids[rows, places + step].numpy(), carried)


def greedy(host: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    logits, carried = host.read(prompts, host.start(len(prompts)))
    tokens = []
    for _ in range(count):
        tokens.append(HOST["choose"](logits, 0, None))
        logits, carried = host.step(tokens[-1], carried)
    return np.stack(tokens, axis=1).tolist()


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", WRITTEN)
def test_onnxruntime_gives_the_logits_of_the_model(name: str, written: dict[str, Path]) -> None:
    check_against(make(**WRITTEN[name]), HOST["Model"](written[name], threads=1))


@pytest.mark.parametrize("name", TRACED)
def test_torch_export_gives_the_logits_of_the_model(name: str) -> None:
    """With any batch and any number of tokens, up to those of a block."""
    model = make(**TRACED[name])
    check_against(model, Programs(model))


@pytest.mark.parametrize("name", WRITTEN)
def test_onnxruntime_writes_the_same_tokens(name: str, written: dict[str, Path]) -> None:
    host, model = HOST["Model"](written[name], threads=1), make(**WRITTEN[name]).eval()
    prompts = [list(b"Once"), list(b"One of many blocks"), list(b"x")]
    wanted = model.generate([torch.tensor(row) for row in prompts], max_new_tokens=30, temperature=0.0).tolist()
    assert greedy(host, prompts, 30) == wanted
    assert len({token for row in wanted for token in row}) > 10


def test_a_row_begins_anew(written: dict[str, Path]) -> None:
    host, model = HOST["Model"](written["memories"], threads=1), make(**WRITTEN["memories"])
    before, after = random_ids(3), random_ids(3, seed=2)
    new = np.array([False, True, False])
    _, carried = host.read(list(before.numpy()), host.start(3))
    logits, _ = host.read(list(after.numpy()), host.reset(carried, new))
    wanted, alone = logits_of(model, torch.cat((before, after), dim=1))[:, -1], logits_of(model, after)[:, -1]
    np.testing.assert_allclose(
        logits, np.where(new[:, None], alone, wanted), rtol=0, atol=CLOSE * np.abs(wanted).max()
    )
    assert np.abs(alone - wanted).max() > 0.1


# --------------------------------------------------------------------------------------------------------------- files


def test_the_manifest_says_what_the_graphs_take_and_give(written: dict[str, Path]) -> None:
    for folder in written.values():
        manifest = json.loads((folder / "manifest.json").read_text())
        host = HOST["Model"](folder, threads=1)
        for which, graph in manifest["graphs"].items():
            session = host.graphs[which]
            for told, found in ((graph["inputs"], session.get_inputs()), (graph["outputs"], session.get_outputs())):
                assert list(told) == [one.name for one in found]
                types = [{"int64": "tensor(int64)", "float32": "tensor(float)"}[one["dtype"]] for one in told.values()]
                assert types == [one.type for one in found]
                for mine, theirs in zip(told.values(), found):
                    assert [size for size in mine["shape"] if isinstance(size, int)] == [
                        size for size in theirs.shape if isinstance(size, int)
                    ]
        assert manifest["carried"] == list(host.initial)
        assert Config.from_dict(manifest["config"]).block_width == manifest["block_width"] == WIDTH
        changed = list(manifest["graphs"]["token"]["outputs"])
        assert changed == ["logits", "next.position.offset", "next.memory.1.block.k", "next.memory.1.block.v"]
    assert json.loads((written["memories"] / "manifest.json").read_text())["tokenizer"] == "bytes"


def test_weights_are_written_once_and_no_paths_of_the_machine(written: dict[str, Path]) -> None:
    folder, model = written["memories"], make(**WRITTEN["memories"])
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert 0.8 * size < (folder / "weights.bin").stat().st_size < 2 * size  # each begins at a page
    for file in folder.iterdir():
        content = file.read_bytes()
        assert str(ROOT).encode() not in content and b"site-packages" not in content


def test_the_example_needs_no_torch(written: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--prompt", "Once upon", "--temperature", "0", "--max-new-tokens", "40", "--chunk", "3", "--threads", "1"]
    code = (
        "import runpy, sys\n"
        "blocked = ('torch', 'block_recurrent_transformer_pytorch', 'onnx', 'onnxscript', 'transformers')\n"
        "sys.modules |= dict.fromkeys(blocked)\n"  # importing any of them is an error
        f"sys.argv = ['onnx_stream.py', {str(written['memories'])!r}, *{flags!r}]\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    told = run([sys.executable, "-c", code], tmp_path)
    model = make(**WRITTEN["memories"]).eval()
    tokens = model.generate(torch.tensor([list(b"Once upon")]), max_new_tokens=40, temperature=0.0)
    text = bytes(tokens[0].tolist()).decode("utf-8", "replace")
    assert told.rstrip("\n\ufffd") == text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n\ufffd")


def test_the_example_samples_as_the_softmax_says() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1]])).repeat(20_000, axis=0).astype(np.float32)
    found = HOST["choose"](logits, 1.0, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(found) / len(found), [0.7, 0.2, 0.1], atol=0.01)
    cold = HOST["choose"](logits, 0.5, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(cold) / len(cold), np.array([0.49, 0.04, 0.01]) / 0.54, atol=0.01)


def test_the_example_takes_a_tokenizer_file(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers", reason="needs the extra [train]")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(vocab_size=300, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["one of many blocks of text"] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    theirs, text = HOST["FromFile"](tmp_path / "tokenizer.json"), "many blocks, é – and 😀 too"
    assert "".join(theirs.more(token) for token in theirs.encode(text)) == text


# ---------------------------------------------------------------------------------------------------- what is refused


@register_gate("looks")
class LooksGate(Gate):
    """Looks at a number, which a graph cannot."""

    def forward(self, source: Tensor, state: Tensor) -> Shares:
        keep = torch.full_like(state, float(source.mean() > 0))
        return Shares(keep, 1 - keep)


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    for model, named in (
        (make().double(), "float64"), (make(block_width=1), "block_width=1"), (make(gate="looks"), "gate='looks'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            adapter.export_onnx(model, tmp_path / "new")
    with pytest.raises(ValueError, match="model must be a BlockRecurrentTransformer"):
        adapter.export_onnx(nn.Linear(1, 1), tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        adapter.export_onnx(make(), tmp_path / "full")
    assert adapter.main([str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 1
