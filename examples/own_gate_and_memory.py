"""A gate and a kind of memory of your own, in a model: python examples/own_gate_and_memory.py"""

import torch
from torch import Tensor, nn

from block_recurrent_transformer_pytorch import (
    KV,
    Appended,
    BlockRecurrentTransformer,
    Config,
    Gate,
    MemoryKind,
    Shares,
    register_gate,
    register_memory,
)
from block_recurrent_transformer_pytorch.inspecting import inspecting


@register_gate("shared")
class SharedGate(Gate):
    """One share for all channels of a state vector, chosen from what was read."""

    def __init__(self, dim: int, dim_source: int) -> None:
        super().__init__(dim, dim_source)
        self.to_write = nn.Linear(dim_source, 1)

    def forward(self, source: Tensor, state: Tensor) -> Shares:  # (b, s, dim_source), (b, s, d)
        write = self.to_write(source).to(state.dtype).sigmoid()  # (b, s, 1)
        return Shares(keep=1 - write, write=write)


@register_memory("averages")
class Averages(MemoryKind):
    """One entry for each block that left the XL memory, the mean of its keys and values; the last few of them."""

    def __init__(self, config: Config, layer: int, entries: int = 4) -> None:
        super().__init__(config, layer)
        self.width = entries

    def append(self, memory: KV, blocks: KV, span: object) -> Appended:  # (b, g, entries, e), (b, g, t w, e)
        means = [x.unflatten(2, (-1, self.block_width)).mean(3) for x in blocks]  # (b, g, t, e)
        stream = [torch.cat(pair, dim=2) for pair in zip(memory, means)]  # oldest first
        blocks_seen = [x.unfold(2, self.width, 1)[:, :, :-1].permute(0, 2, 1, 4, 3) for x in stream]
        return Appended(KV(*blocks_seen), None, KV(*(x[:, :, -self.width :].clone() for x in stream)))


sizes = {"num_tokens": 256, "dim": 64, "depth": 4, "heads": 4, "dim_head": 16, "block_width": 32, "max_seq_len": 128}
own = {"gate": "shared", "extra_memories": {"averages": {"entries": 6, "layers": (1, 2)}}}
model = BlockRecurrentTransformer(**sizes, **own).eval()
text = torch.randint(256, (1, 500))
with torch.no_grad(), inspecting(model) as seen:
    whole, memories, _ = model(text)
    _, before, states = model(text[:, :321])
    rest, _, _ = model(text[:, 321:], xl_memories=before, states=states)
print(f"largest difference of the logits in two calls: {(whole[:, 321:] - rest).abs().max():.1e}")
print(f"share that is kept: {torch.cat(seen[2].keep).mean():.3f}")
print(f"averages: {memories.layers[0].past['averages'].k.shape}")
