"""What a segment costs in memory, from shapes alone: nothing is computed and no memory is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from .config import Config


class Footprint(NamedTuple):
    """Of a segment behind another."""

    parameters: int  # how many numbers
    activations: int  # bytes that the backward pass needs, beside the parameters
    carried: int  # bytes of memories and states


def footprint(
    config: Config, rows: int, segment: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Footprint:
    """Of `rows` segments of so many tokens: kernels of `device`, weights of `dtype`, under the autocast in force."""
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(), torch.device(device):
        model = BlockRecurrentTransformer(replace(config, init="torch"))
        x = torch.zeros(rows, segment + 1, dtype=torch.long)
        with torch.no_grad():
            _, memories, states = model(x[:, :-1], logits_to_keep=1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = model(x, xl_memories=memories, states=states, return_loss=True)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        activations = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
        del held
    carried = sum(leaf.nbytes for leaf in tree_leaves((memories, states)) if isinstance(leaf, Tensor))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    wider = dtype.itemsize // torch.float32.itemsize
    return Footprint(parameters, wider * activations, wider * carried)
