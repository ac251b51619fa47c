"""Records lucidrains.npz from the real block-recurrent-transformer-pytorch 0.4.4.

    pip install --no-deps --target .reference block-recurrent-transformer-pytorch==0.4.4
    python tests/golden/record_lucidrains.py .reference

The package is imported from that folder: its import name is ours, so it must not be installed beside this one.
Float32 parameters, randomly moved away from their initial values; float64 logits of carried segments.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

SMALL = {"num_tokens": 12, "dim": 16, "depth": 3, "dim_head": 8, "heads": 2, "max_seq_len": 8, "block_width": 4,
         "num_state_vectors": 3}  # fmt: skip
CASES = {
    "default": {},
    "flash": {"use_flash_attn": True, "block_width": 8, "num_state_vectors": None},
    "two_recurrent": {"recurrent_layers": (1, 3)},
    "read_below": {"recurrent_layers": (3,), "read_recurrent_layers": (1,)},
    "read_two_at_one": {"recurrent_layers": (2, 3), "read_recurrent_layers": (2, 2)},
    "compressed": {"use_compressed_mem": True, "compressed_mem_factor": 2},
    "compressed_uneven": {"use_compressed_mem": True, "compressed_mem_factor": 3, "depth": 2},
    "all_normalised": {"all_layers_qk_rmsnorm": True, "ff_mult": 2},
    "one_head": {"heads": 1, "dim_head": 16, "depth": 1, "recurrent_layers": (1,)},
}
SEGMENTS = 4


def record(package: object, name: str, arrays: dict) -> None:
    torch.manual_seed(len(name))
    options = SMALL | CASES[name]
    model = package.BlockRecurrentTransformer(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std() if parameter.numel() > 1 else 1.0
            parameter.add_(torch.randn_like(parameter) * 0.3 * spread)
    for key, value in model.state_dict().items():
        arrays[f"{name}/param/{key}"] = value.numpy().copy()
    model.double()
    memories, states = [], []
    for segment in range(SEGMENTS):
        tokens = torch.randint(0, options["num_tokens"], (2, options["max_seq_len"]))
        with torch.no_grad():
            logits, memories, states = model(tokens, xl_memories=memories, states=states)
        arrays[f"{name}/tokens/{segment}"] = tokens.numpy()
        arrays[f"{name}/logits/{segment}"] = logits.numpy()
    arrays[f"{name}/options"] = np.array(json.dumps(options))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".reference").resolve()
    sys.path.insert(0, str(folder))
    reference = importlib.import_module("block_recurrent_transformer_pytorch")
    assert folder in Path(reference.__file__).parents, f"imported {reference.__file__}, not the package in {folder}"
    recorded: dict = {}
    for case in CASES:
        record(reference, case, recorded)
    np.savez_compressed(Path(__file__).parent / "lucidrains.npz", **recorded)
