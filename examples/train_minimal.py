"""The smallest honest training loop: documents in order, memories carried from step to step, one loss a segment.

    python examples/train_minimal.py

Trains on the source of Python's own json, email and asyncio packages. `train.py` adds what a real run wants:
validation, checkpoints, several processes.
"""

import argparse
import asyncio
import email
import json
import math
from pathlib import Path

import numpy as np
import torch

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, RecurrentTrainWrapper
from block_recurrent_transformer_pytorch.data import ByteTokenizer, Corpus, DocumentStream
from block_recurrent_transformer_pytorch.optim import parameter_groups, schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--segment", type=int, default=256, help="tokens of a row in a step")
    options = parser.parse_args()

    torch.manual_seed(0)
    files = [file for package in (json, email, asyncio) for file in sorted(Path(package.__file__).parent.glob("*.py"))]
    corpus = Corpus.from_tokens([np.frombuffer(file.read_bytes(), np.uint8) for file in files])
    stream = DocumentStream(corpus, batch=8, segment=options.segment)

    model = BlockRecurrentTransformer(
        num_tokens=256, dim=options.dim, depth=3, heads=4, dim_head=32, max_seq_len=options.segment,
        block_width=options.segment // 4, num_state_vectors=16, use_flash_attn=True,
    )  # fmt: skip
    wrapper = RecurrentTrainWrapper(model, state_dropout=0.05)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=3e-3)
    rate = schedule("cosine", max_steps=options.steps, warmup=min(10, options.steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(min(step + 1, options.steps)))

    memories = states = None
    losses: list[float] = []
    for step, batch in zip(range(1, options.steps + 1), stream):
        x = batch.tokens
        x[:, 1:].masked_fill_(~batch.targets_mask, model.config.ignore_index)  # the padding after a document's end
        loss, memories, states = wrapper(
            x, xl_memories=memories, states=states, reset=batch.reset, return_memories_and_states=True
        )  # reset: rows in which a document begins. What comes back is detached (detach_segments=True).
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == options.steps:
            last = losses[-10:]
            print(f"step {step}: {sum(last) / len(last) / math.log(2):.3f} bits per byte, mean of {len(last)} steps")

    prompt = torch.tensor([list(b"import ")])
    text = wrapper.generate(prompt, max_new_tokens=80, temperature=0.8, top_p=0.9)
    print("import " + ByteTokenizer().decode(text[0].tolist()))


if __name__ == "__main__":
    main()
