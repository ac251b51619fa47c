"""torch.compile(fullgraph=True): the same numbers, no graph break, and nothing compiled anew in the steady state."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from oracle import assert_same
from strategies import VOCABULARY, random_model, random_stream
from torch import Tensor, nn

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, RecurrentTrainWrapper, detach, losses
from block_recurrent_transformer_pytorch.paper import OPTIONS as PAPER

pytestmark = pytest.mark.slow

WIDTH = 4
BASE = {
    "num_tokens": VOCABULARY, "dim": 8, "depth": 1, "dim_head": 4, "heads": 2, "ff_dim": 6, "max_seq_len": 2 * WIDTH,
    "block_width": WIDTH, "recurrent_layers": (1,), "num_state_vectors": 3, "use_flash_attn": True,
}  # fmt: skip
PAPER_LIKE = {**PAPER, "qk_norm": "head", "all_layers_qk_rmsnorm": True, "kv_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "compressed": {"use_compressed_mem": True, "compressed_mem_factor": 2},
    "enhanced": {"enhanced_recurrence": True, "depth": 2},
    "paper": {**PAPER_LIKE, "gate": "lstm", "state_update": "single"},
    "feedback": {**PAPER_LIKE, "block_feedback": True, "depth": 2},
    "read below write": {
        "recurrent_layers": (2,), "read_recurrent_layers": (1,), "positions": "dynamic", "depth": 2,
    },
    "two xl blocks, formula": {"num_xl_blocks": 2, "use_flash_attn": False, "state_update": "dual"},
}  # fmt: skip
every_variant = pytest.mark.parametrize("variant", VARIANTS)
LIMIT = 8  # graphs of one function, after which dynamo gives up
LIMIT_NAME = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def nothing_new() -> Any:
    """A context in which compiling anything is an error."""
    return torch._dynamo.config.patch(error_on_recompile=True)


def model_of(variant: str, **options: Any) -> BlockRecurrentTransformer:
    return random_model(Config(**{**BASE, **VARIANTS[variant], **options}))


def same_tensors(one: Any, other: Any, tolerance: float = 1e-9) -> None:
    a, b = (torch.utils._pytree.tree_leaves(x) for x in (one, other))
    assert len(a) == len(b)
    for x, y in zip(a, b):
        if isinstance(x, Tensor) and x.is_floating_point():
            assert_same(x, y, tolerance)
        else:
            assert x is y or x == y


# ------------------------------------------------------------------------------------------------------------- training


def train(model: nn.Module, segments: int, carried: Any = (None, None), seed: int = 0, **options: Any) -> list[Any]:
    """Losses, gradients and what is carried after each segment."""
    seen = []
    for i in range(segments):
        x = random_stream(2, 2 * WIDTH + 1, seed=seed + i)
        loss, *carried = model(x, xl_memories=carried[0], states=carried[1], return_loss=True, **options)
        carried = [detach(value) for value in carried]
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        seen.append((loss.detach(), [g.clone() for g in gradients if g is not None], carried))
        model.zero_grad()
    return seen


@every_variant
def test_training(variant):
    """Segments of two blocks with what the ones before left; once memories are full every step is the same graph."""
    model, backend = model_of(variant), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    eager = train(model, 6)
    first = train(compiled, 4)
    assert backend.graphs <= 3  # from nothing, from what that left, and the steady state
    with nothing_new():
        rest = train(compiled, 2, first[-1][2], seed=4)
    same_tensors(first + rest, eager)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_training_with_a_loss_in_chunks(tie_embeddings, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1)
    model = model_of("default", tie_embeddings=tie_embeddings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same_tensors(train(compiled, 2), train(model, 2))


@pytest.mark.parametrize(("variant", "backend"), [("paper", "aot_eager"), ("default", "inductor")])
def test_training_with_other_backends(variant, backend):
    """Whose graphs are checked for changed inputs, or fused. A step in the middle of a stream."""
    model = model_of(variant)
    carried = train(model, 2)[-1][2]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    same_tensors(train(compiled, 1, carried, seed=2), train(model, 1, carried, seed=2), 1e-8)


def test_training_with_new_documents():
    """Rows begin anew at a segment's start; their number and place change nothing of the graph."""
    model, backend = model_of("default"), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    carried = train(model, 2)[-1][2]
    graphs = []
    for rows in ([True, False], [False, False], [True, True]):
        reset = torch.tensor(rows)
        same_tensors(train(compiled, 2, carried, reset=reset), train(model, 2, carried, reset=reset))
        graphs.append(backend.graphs)
    assert graphs[0] == graphs[-1] <= 3


def test_training_with_dropped_memories_and_states():
    """The wrapper with both rates, compiled and not, from the same generator."""

    def losses(model: nn.Module) -> list[Tensor]:
        wrapper = RecurrentTrainWrapper(model, 0.5, 0.5, generator=torch.Generator().manual_seed(0)).train()
        return [loss.detach() for loss in wrapper.segments(random_stream(4, 2 * WIDTH * 6 + 1))]

    model, backend = model_of("default"), Counting()
    plain = losses(model)
    twin = copy.deepcopy(model)
    twin.compile(fullgraph=True, backend=backend)
    same_tensors(losses(twin), plain)
    assert 0 < backend.graphs <= 4


def test_training_with_recomputation():
    model = model_of("default", use_checkpointing=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same_tensors(train(compiled, 2), train(model, 2))


def test_training_in_mixed_precision():
    """Autocast around a compiled model in fp32."""
    model, backend = model_of("default").float(), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        same_tensors(train(compiled, 2), train(model, 2), 1e-2)


# ------------------------------------------------------------------------------------------------- prefill and decoding


@torch.no_grad()
def decode(model: nn.Module, lengths: list[int], carried: Any = (None, None), seed: int = 0) -> list[Any]:
    """Logits, memories and states of each call."""
    seen = []
    for i, n in enumerate(lengths):
        out = model(random_stream(2, n, seed=seed + i), xl_memories=carried[0], states=carried[1])
        seen.append(out)
        carried = out[1:]
    return seen


@every_variant
def test_prefill_and_decoding(variant):
    """Over three boundaries of blocks, and then, all memories being full, over three more without compiling."""
    model, backend = model_of(variant), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    prefill, steps, more = [2 * WIDTH + 3], [1] * (3 * WIDTH), [1] * (3 * WIDTH)
    eager = decode(model, prefill + steps + more)
    first = decode(compiled, prefill + steps)
    with nothing_new():
        rest = decode(compiled, more, first[-1][1:], seed=len(first))
    same_tensors(first + rest, eager)
    assert backend.graphs <= 6 < LIMIT


def test_decoding_with_inductor():
    """Two blocks in the middle of a stream."""
    model = model_of("default")
    carried = decode(model, [2 * WIDTH + 3])[-1][1:]
    compiled = torch.compile(model, fullgraph=True)
    same_tensors(decode(compiled, [1] * (2 * WIDTH), carried), decode(model, [1] * (2 * WIDTH), carried), 1e-8)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_decoding_in_the_buffers_of_the_memories(backend):
    """A compiled model writes into memories that are given away, too, with the same numbers and no new graph."""
    model = model_of("default")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    start = decode(model, [2 * WIDTH + 3])[-1][1:]
    expected = decode(model, [1] * (6 * WIDTH), start)
    carried, kept = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, start), 0
    for i, (logits, memories, _) in enumerate(expected):
        with nothing_new() if i >= 3 * WIDTH else contextlib.nullcontext():
            out, *after = compiled(
                random_stream(2, 1, seed=i), xl_memories=carried[0], states=carried[1], overwrite=True
            )
        same_tensors([out, after[0]], [logits, memories], 1e-8)
        kept += after[0].layers[0].block.k is carried[0].layers[0].block.k
        carried = after
    assert kept >= 4 * (WIDTH - 1)


@pytest.mark.parametrize(("variant", "graphs"), [("default", 7), ("compressed", 10)])
def test_decoding_from_nothing(variant, graphs):
    """One token at a time from the beginning of a stream: a few graphs more for each block until memories are full."""
    model, backend = model_of(variant), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch({LIMIT_NAME: 2 * LIMIT}):
        same_tensors(decode(compiled, [1] * (5 * WIDTH)), decode(model, [1] * (5 * WIDTH)))
    assert backend.graphs <= graphs


def test_prompts_of_several_lengths():
    """A graph for each, as a prompt is cut into other pieces."""
    model, backend = model_of("default"), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    lengths = (1, 3, WIDTH, 2 * WIDTH, 2 * WIDTH + 1, 2 * WIDTH + 3)
    for n in lengths:
        same_tensors(decode(compiled, [n]), decode(model, [n]))
    assert backend.graphs <= len(lengths)


def test_generating_with_a_compiled_model():
    """`model.compile()` compiles what `generate` calls; its greedy tokens are those of the model as it is."""
    model, backend = model_of("default"), Counting()
    prompt = random_stream(2, 2 * WIDTH + 3)
    plain = model.generate(prompt, max_new_tokens=6 * WIDTH, temperature=0)
    twin = copy.deepcopy(model).train()
    twin.compile(fullgraph=True, backend=backend)
    assert torch.equal(twin.generate(prompt, max_new_tokens=6 * WIDTH, temperature=0), plain)
    assert 0 < backend.graphs <= 6
    assert twin.training
    graphs = backend.graphs
    assert torch.equal(twin.generate(prompt, max_new_tokens=6 * WIDTH, temperature=0), plain)
    assert backend.graphs == graphs


def test_ragged_rows_run_compiled_with_breaks():
    """Where rows stand at different places, data is read; without fullgraph it works all the same."""
    model = model_of("default")
    compiled = torch.compile(model, backend="eager")
    seen = []
    with torch.no_grad():
        for call in (model, compiled):
            _, memories, states = call(random_stream(2, 9), lengths=torch.tensor([9, 2]))
            seen.append(call(random_stream(2, 3, seed=1), xl_memories=memories, states=states)[0])
    same_tensors(*seen)
