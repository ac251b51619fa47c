"""Several processes that train one model: who they are, how they share parameters, how rows are distributed.

    with start() as processes:                       # what torchrun says; a single process without it
        shard(model, processes)                      # FSDP2; or DistributedDataParallel around a module of yours
        total, = processes.sum(number_of_targets)
        tensors = full_state(model, processes)       # whole, on the CPU of the first process

Every function that talks to the others has to be called by all of them. Python values travel between these processes
over their own connections, by pickle as torch.distributed does it; nothing of that kind is ever read from a file.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from . import carried_files
from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from .carried import Memories, Position, States, map_tensors

Value = TypeVar("Value")
Carried = tuple[Memories, States]
PATIENCE = timedelta(hours=6)  # for what one process does while the others wait: tokenising, writing a checkpoint


# 1 the processes


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    patient: Any = None  # a gloo group for values on the CPU and for long waits; None: a single process

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64: ints are exact up to 2^53."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.patient is not None:
            dist.all_reduce(total, group=self.patient)
        return [float(value) for value in total]

    def share(self, value: Value) -> Value:
        """The value that the first process gives."""
        if self.patient is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes by rank, in the first; an empty list elsewhere."""
        if self.patient is None:
            return [value]
        values: list[Any] = [None] * self.size if self.is_first else []
        dist.gather_object(value, values if self.is_first else None, dst=0, group=self.patient)
        return values

    def say(self, text: str) -> None:
        """Prints, between the lines of a progress bar, in the first process."""
        if self.is_first:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.patient is not None:
            dist.barrier(group=self.patient)


@contextmanager
def start(device: str | None = None, *, timeout: float = 50.0) -> Iterator[Processes]:
    """Joins the processes that torchrun started.

    Args:
        device: "cpu", "cuda", ...; default a GPU where there is one. Of several GPUs each process takes its own.
        timeout: seconds after which a collective operation of the training itself fails because another process does
            not take part in it. One that died is noticed at once, by its closed connection.

    Raises:
        ValueError: more processes on this machine than it has GPUs.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, torch.device(kind))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    own = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    yield Processes(dist.get_rank(), dist.get_world_size(), own, dist.new_group(backend="gloo", timeout=PATIENCE))
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


# 2 parameters


def shard(model: BlockRecurrentTransformer, processes: Processes) -> None:
    """Splits the parameters of a model among the processes with FSDP2 (`fully_shard`), in place.

    A plain layer is a unit: gathered when it runs, and released behind it. Of a recurrent layer only the feed-forward
    is: the cell's parameters are used by its layer and, between layers, by the model (initial states, projections), so
    they belong to the model's own unit, with the embeddings, which stays gathered from the model's first layer to the
    end of its backward pass. That costs the memory of the cells and saves gathering them for every block.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise ImportError(f"FSDP2 needs torch 2.6 or newer, this is {torch.__version__}") from error
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing is changed in place
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for layer in model.layers:
        fully_shard(layer if layer.cell is None else layer.feed_forward, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


def exchanging(module: nn.Module, model: BlockRecurrentTransformer, is_last: bool) -> AbstractContextManager[Any]:
    """Gradients are exchanged in the last backward pass of a step only. `module` is the model, or around it."""
    if is_sharded(model):
        model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
    elif isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()


def replicate(module: nn.Module, model: BlockRecurrentTransformer, *, unused: bool) -> DistributedDataParallel:
    """DistributedDataParallel around a module that trains `model`, some parameters of which are `unused` or not.

    Where every parameter is used, DDP deals the gradients to other buckets after its first step. A ring adds up each
    place of a bucket in an order of its own, so that a run that goes on would differ from one that never stopped in
    the last bit. On the CPU, where that is promised, the search for unused parameters keeps the buckets as they are.
    """
    weight = model.token_emb.weight
    on_cpu = weight.device.type == "cpu"
    if on_cpu:  # torch advises against a search that finds nothing, once a run: it finds this
        module.register_parameter("unused", nn.Parameter(weight.new_zeros(1)))
    keyword = "forward_sync_buffers"  # the buffers are constants; before torch 2.13 the argument had another name
    if keyword not in inspect.signature(DistributedDataParallel).parameters:
        keyword = "broadcast_buffers"
    options: dict[str, Any] = {"find_unused_parameters": unused or on_cpu, keyword: False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **options)


def full_state(module: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU of the first process; an empty dict elsewhere."""
    return {
        name: kept for name, tensor in module.state_dict().items() if (kept := whole(tensor, processes)) is not None
    }


def load_full_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `full_state`; every process gives the same tensors.

    Raises:
        ValueError: other names, shapes or types than those of the module.
    """
    own = module.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise ValueError(f"the weights {missing[:5]} are missing")
    if unknown := sorted(state.keys() - own.keys()):
        raise ValueError(f"the weights {unknown[:5]} are unknown")
    for name, tensor in own.items():
        if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
            kinds = [f"{one.dtype} {tuple(one.shape)}" for one in (state[name], tensor)]
            raise ValueError(f"the weight {name} is {kinds[0]} instead of {kinds[1]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(part_of(state[name], tensor))


def optimizer_state(
    names: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, processes: Processes
) -> dict[str, Any]:
    """What an optimizer remembers, by the parameters' names, with whole tensors on the CPU of the first process.

    A parameter that had no gradient yet has an empty entry.
    """
    state = {
        name: {
            key: whole(value, processes) if isinstance(value, Tensor) else value
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        for name, parameter in names.items()
    }
    return state if processes.is_first else {}


def load_optimizer_state(
    names: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """The inverse of `optimizer_state`; every process gives the same.

    Raises:
        ValueError: it is that of other parameters.
    """
    if other := sorted(names.keys() ^ state.keys()):
        raise ValueError(f"the optimizer's state is that of other parameters: {other[:5]}")
    optimizer.state.clear()
    for name, memory in state.items():
        parameter = names[name]
        if memory:
            optimizer.state[parameter] = {
                key: part_of(value, parameter) if isinstance(value, Tensor) and value.ndim else value
                for key, value in memory.items()
            }


def whole(tensor: Tensor, processes: Processes) -> Tensor | None:
    """A sharded or plain tensor as a plain one on the CPU of the first process, of its own memory; None elsewhere."""
    gathered: Tensor = getattr(tensor.detach(), "full_tensor", tensor.detach)()  # by all: they send their shares
    if not processes.is_first:
        return None
    return gathered.clone() if gathered.device.type == "cpu" else gathered.cpu()


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is kept: on its device, and sharded in the same way."""
    tensor = tensor.to(like.device)
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def average_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """The mean over the processes of every gradient, for those computed without DistributedDataParallel.

    A parameter without gradient counts as zero where another process has one; without any it is left alone.
    """
    own = list(parameters)
    has = torch.tensor([parameter.grad is not None for parameter in own], dtype=torch.int32)
    dist.all_reduce(has, op=dist.ReduceOp.MAX, group=processes.patient)
    for parameter, used in zip(own, has.tolist()):
        if used:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= processes.size


# 3 rows of carried values


def join_rows(parts: Sequence[Carried]) -> Carried:
    """Memories and states of several batches as those of one, in that order.

    Raises:
        ValueError: they are not at the same offset in their block.
    """
    memories, states = zip(*parts)
    offsets = [part.position.offset for part in memories]
    if any(isinstance(offset, Tensor) or offset != offsets[0] for offset in offsets):
        raise ValueError(f"batches at the offsets {offsets} in a block cannot be joined, only at one")
    held = torch.cat([held_blocks(part) for part in memories])
    fewest = int(held.min())
    extra = None if bool((held == fewest).all()) else held - fewest
    position = Position(offsets[0], fewest, extra)
    return Memories(_join([part.layers for part in memories]), position), _join(states)


def split_rows(carried: Carried, sizes: Sequence[int]) -> list[Carried]:
    """The inverse of `join_rows`: memories and states of batches of so many rows, all masked alike.

    Raises:
        ValueError: rows are at different offsets in their block.
    """
    memories, states = carried
    offset = memories.position.offset
    if isinstance(offset, Tensor):
        raise ValueError(f"rows at the offsets {offset.tolist()} in a block cannot be split, only at one")
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append((_take(memories, rows), _take(states, rows)))
        start += size
    return parts


def redistribute(parts: list[Any], rows: int, count: int) -> list[Any]:
    """The same rows in `count` equal parts: memories and states, or None and None where there are no more.

    Raises:
        ValueError: they are of another number of rows.
    """
    if parts[0][0] is None:
        return [(None, None)] * count
    held = [len(next(leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor))) for part in parts]
    if sum(held) != rows:
        raise ValueError(f"memories and states are of {held} rows, must be of {rows}")
    return parts if len(parts) == count else split_rows(join_rows(parts), [rows // count] * count)


def upgrade(version: int, structure: Any) -> Any:
    """Carried values as an older checkpoint format lays them out, laid out as now: `upgrade` of `checkpoint.load`.

    Checkpoints and files of carried values have the same format numbers.
    """
    for older in range(version, carried_files.FORMAT):
        structure = carried_files.UPGRADES[older](structure)
    return structure


def to_device(carried: Any, device: torch.device | str) -> Any:
    return map_tensors(carried, lambda leaf: leaf.to(device))


def _take(carried: Value, rows: slice) -> Value:
    def take(leaf: Any) -> Any:
        return leaf[rows].clone() if isinstance(leaf, Tensor) else leaf

    return tree_map(take, carried)  # type: ignore[no-any-return]


def held_blocks(memories: Memories) -> Tensor:
    """Complete blocks that each row remembers, (b,)."""
    like = memories.layers[0].block.k
    return memories.position.held_blocks(len(like), like.device)


def _join(trees: Sequence[Value]) -> Value:
    def cat(*leaves: Any) -> Any:
        return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]

    return tree_map(cat, trees[0], *trees[1:])  # type: ignore[no-any-return]
