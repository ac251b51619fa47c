"""What a segment costs in memory, from shapes alone: nothing is computed and no memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from .config import Config


class Footprint(NamedTuple):
    """Of a segment behind another."""

    parameters: int  # how many numbers
    trained: int  # of them
    activations: int  # bytes that the backward pass needs, beside the parameters
    carried: int  # bytes of memories and states


def place(model: nn.Module) -> None:
    """Gives a model on the device "meta" new tensors on the device in force."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(own, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def footprint(
    config: Config, rows: int, segment: int, device: str = "cpu", dtype: torch.dtype = torch.float32,
    prepare: Callable[[BlockRecurrentTransformer], None] = lambda model: None,
) -> Footprint:  # fmt: skip
    """Of `rows` segments of so many tokens: kernels of `device`, weights of `dtype`, under the autocast in force.

    `prepare` is called with the model, and may freeze parameters or add some.
    """
    kept: dict[int, tuple[Any, int]] = {}  # weak references: the graph within a loss is gone after the call

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        return tensor

    with torch.device("meta"):  # adapters cannot be put in among fake tensors
        model = BlockRecurrentTransformer(replace(config, init="torch"))
        prepare(model)
    with FakeTensorMode(), torch.device(device):
        place(model)
        x = torch.zeros(rows, segment + 1, dtype=torch.long)
        with torch.no_grad():
            _, memories, states = model(x[:, :-1], logits_to_keep=1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = model(x, xl_memories=memories, states=states, return_loss=True)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        torch.clear_autocast_cache()  # as at the end of the forward pass
        alive = {key: size for key, (storage, size) in kept.items() if not storage.expired()}
        activations = sum(size for key, size in alive.items() if key not in own)
        del held
    carried = sum(leaf.nbytes for leaf in tree_leaves((memories, states)) if isinstance(leaf, Tensor))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    wider = dtype.itemsize // torch.float32.itemsize
    return Footprint(parameters, trained, wider * activations, wider * carried)
