"""On a GPU nothing is read back, and no tensor built on the host, from call to call: counted on a fake one.

`FakeTensorMode` knows shapes, types and devices, and holds no numbers: a read from the device is an error there, and so
is an operation on tensors of two devices. A device that is not there changes PyTorch for the whole process, so that
test_host_reads.py runs this file in one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Memories,
    RecurrentTrainWrapper,
    forget_rows,
    select_rows,
)

DEVICE = "fakegpu"
_setup_privateuseone_for_python_backend(DEVICE)
torch.fakegpu.get_amp_supported_dtype = lambda: [torch.bfloat16]

SIZES = {
    "num_tokens": 64, "dim": 32, "depth": 3, "dim_head": 16, "heads": 2, "block_width": 4, "max_seq_len": 8,
    "num_state_vectors": 3, "use_flash_attn": True,
}  # fmt: skip
VARIANTS = {
    "default": {},
    "authors": {
        "positions": "t5", "attention_window": "sliding", "empty_memory": "zeros", "qk_norm": "head", "kv_heads": 2,
        "norm": "rms", "state_update": "dual", "gate": "lstm", "state_reads_memory": True, "tie_embeddings": True,
    },
    "compressed": {"use_compressed_mem": True, "num_xl_blocks": 2, "positions": "dynamic"},
    "handed down": {"enhanced_recurrence": True, "state_reads_memory": True, "block_feedback": True},
}  # fmt: skip
every_variant = pytest.mark.parametrize("variant", VARIANTS)


class FromHost(TorchDispatchMode):
    """Counts the copies between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in [*tensors, *([out] if isinstance(out, Tensor) else [])] if x.ndim}
        if len(devices) > 1:
            self.copies.append(f"{func} {devices}")
        return out


@contextmanager
def on_a_fake_gpu(variant: str) -> Iterator[tuple[BlockRecurrentTransformer, FromHost]]:
    with FakeTensorMode(), FromHost() as copies, pytest.MonkeyPatch.context() as patch:
        for name in ("uniform_", "normal_", "kaiming_uniform_", "ones_"):
            patch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        with torch.device(DEVICE):
            model = BlockRecurrentTransformer(**SIZES | VARIANTS[variant])
        yield model, copies


def ids(n: int, rows: int = 2) -> Tensor:
    return torch.zeros(rows, n, dtype=torch.long, device=DEVICE)


def mask() -> Tensor:
    return torch.zeros(2, dtype=torch.bool, device=DEVICE)


def ragged(memories: Memories, offsets: tuple[int, ...]) -> Memories:
    """Memories whose rows stand at these offsets, as a call with `lengths` leaves them."""
    offset = torch.empty(len(offsets), dtype=torch.long, device=DEVICE)
    return memories._replace(position=memories.position._replace(offset=offset, known=offsets))


@every_variant
def test_a_training_step_with_resets_and_dropped_memories(variant: str) -> None:
    with on_a_fake_gpu(variant) as (model, copies):
        memories, states = model.init_memories(2), model.init_states(2)
        for _ in range(2):
            memories = forget_rows(memories, mask())
            _, memories, states = model(
                ids(25), xl_memories=memories, states=states, reset=mask(), reset_states=mask(), return_loss=True
            )
            memories, states = model(ids(16), xl_memories=memories, states=states)[1:]
        assert not copies.copies


@every_variant
def test_decoding_of_equal_rows(variant: str) -> None:
    with on_a_fake_gpu(variant) as (model, copies), torch.no_grad():
        _, memories, states = model(ids(13), logits_to_keep=1)
        for _ in range(5):
            _, memories, states = model(ids(1), xl_memories=memories, states=states, overwrite=True)
        assert not copies.copies


@every_variant
def test_decoding_of_ragged_rows(variant: str) -> None:
    """Over the end of a block, two for one of the rows."""
    with on_a_fake_gpu(variant) as (model, copies), torch.no_grad():
        _, memories, states = model(ids(13), logits_to_keep=1)
        memories = ragged(memories, (3, 1))
        for _ in range(7):
            _, memories, states = model(ids(1), xl_memories=memories, states=states, overwrite=True)
        assert memories.position.known == (2, 0)
        assert not copies.copies


@every_variant
def test_rows_that_stop_and_chunks_within_a_block(variant: str) -> None:
    with on_a_fake_gpu(variant) as (model, copies), torch.no_grad():
        _, memories, states = model(ids(8), logits_to_keep=1)
        lengths = torch.empty(2, dtype=torch.long, device=DEVICE)
        for n in (1, 2):
            _, memories, states = model(ids(n), xl_memories=memories, states=states, lengths=lengths)
        assert memories.position.known == 3
        with pytest.raises(DataDependentOutputException):  # one of them may complete its block: they are asked
            model(ids(1), xl_memories=memories, states=states, lengths=lengths)
        rows = torch.empty(3, dtype=torch.long, device=DEVICE)
        chosen = select_rows(ragged(memories, (2, 1)), rows), select_rows(states, rows)
        model(ids(1, rows=3), xl_memories=chosen[0], states=chosen[1])
        assert not copies.copies


def test_a_reset_in_the_middle_of_a_block() -> None:
    with on_a_fake_gpu("default") as (model, copies), torch.no_grad():
        _, memories, states = model(ids(9))
        _, memories, _ = model(ids(2), xl_memories=memories, states=states, reset=mask())
        assert memories.position.known == 3 and not copies.copies


def test_counting_notices_a_copy_and_a_read() -> None:
    with on_a_fake_gpu("default") as (model, copies):
        torch.zeros(3).to(DEVICE)
        assert copies.copies
        with pytest.raises(DataDependentOutputException):
            mask().any().item()
        wrapper = RecurrentTrainWrapper(model, xl_memories_dropout=0.5)
        wrapper(ids(33))
