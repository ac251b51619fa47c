"""Records tests/golden/carried_*.safetensors: what this version's memories and states look like on disk.

    PYTHONPATH=tests python tests/golden/record_carried.py 1_0_0

Done once for each format; a later version must go on from these files with the same numbers. Beside them lie the
weights, the tokens that come next, and their logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from strategies import VOCABULARY, random_model, random_stream

from block_recurrent_transformer_pytorch import Config, carried_files

GOLDEN = Path(__file__).parent
CONFIG = Config(
    num_tokens=VOCABULARY, dim=8, depth=3, dim_head=4, heads=2, ff_dim=6, max_seq_len=8, block_width=4,
    recurrent_layers=(2,), num_state_vectors=2, use_compressed_mem=True, compressed_mem_factor=2,
)  # fmt: skip
LENGTHS = {"equal": None, "ragged": torch.tensor([7, 2, 13])}  # rows that stand at one place, and at three


def record(version: str) -> None:
    model, tokens, following = random_model(CONFIG), random_stream(3, 13), random_stream(3, 6, seed=1)
    kept = {f"model/{name}": value for name, value in model.state_dict().items()} | {"following": following}
    with torch.no_grad():
        for kind, lengths in LENGTHS.items():
            _, *carried = model(tokens, lengths=lengths)
            carried_files.save(GOLDEN / f"carried_{version}_{kind}.safetensors", *carried, model)
            kept[f"logits/{kind}"] = model(following, xl_memories=carried[0], states=carried[1])[0]
    save_file(kept, GOLDEN / f"carried_{version}_model.safetensors")


if __name__ == "__main__":
    record(sys.argv[1])
