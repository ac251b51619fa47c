"""Turns weights of block-recurrent-transformer-pytorch 0.4.4 into a model of this package.

    python examples/migrate_from_0_4_4.py weights.pt --max-seq-len 1024 --block-width 512 --out converted
    python examples/migrate_from_0_4_4.py                    # a model recorded from 0.4.4, kept with the tests

`weights.pt` holds the state dict of a BlockRecurrentTransformer (not of the wrapper around it). The folder `converted`
receives model.safetensors and config.json, which `from_pretrained` reads. Without arguments the logits are compared
with those that 0.4.4 gave.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

RECORDED = Path(__file__).parents[1] / "tests" / "golden" / "lucidrains.npz"


def recorded_example(case: str = "default") -> BlockRecurrentTransformer:
    """A small model of 0.4.4, converted; prints how far its logits are from the recorded ones."""
    arrays = np.load(RECORDED)
    prefix = f"{case}/param/"
    weights = {k[len(prefix) :]: torch.from_numpy(arrays[k]).double() for k in arrays.files if k.startswith(prefix)}
    options = json.loads(str(arrays[f"{case}/options"]))
    model = BlockRecurrentTransformer.from_lucidrains(
        weights, max_seq_len=options["max_seq_len"], block_width=options["block_width"]
    )
    memories = states = None
    for segment in range(4):
        tokens = torch.from_numpy(arrays[f"{case}/tokens/{segment}"])
        theirs = torch.from_numpy(arrays[f"{case}/logits/{segment}"])
        with torch.no_grad():
            logits, memories, states = model(tokens, xl_memories=memories, states=states)
        print(f"segment {segment}: largest difference of the logits {(logits - theirs).abs().max():.1e}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="?", help="file of torch.save(model.state_dict(), ...)")
    parser.add_argument("--max-seq-len", type=int, default=1024, help="as the model was made with")
    parser.add_argument("--block-width", type=int, default=512, help="as the model was made with")
    parser.add_argument("--read-recurrent-layers", type=int, nargs="+", help="only if the conversion asks for them")
    parser.add_argument("--out", type=Path, help="folder for model.safetensors and config.json")
    options = parser.parse_args()

    if options.weights is None:
        model = recorded_example()
    else:
        reads = options.read_recurrent_layers
        model = BlockRecurrentTransformer.from_lucidrains(
            torch.load(options.weights, map_location="cpu", weights_only=True),
            max_seq_len=options.max_seq_len, block_width=options.block_width,
            read_recurrent_layers=tuple(reads) if reads else None,
        )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.config}")

    if options.out:
        model.save_pretrained(options.out)
        again = BlockRecurrentTransformer.from_pretrained(options.out)  # how to read it back
        print(f"saved in {options.out}, as {again.token_emb.weight.dtype}")


if __name__ == "__main__":
    main()
