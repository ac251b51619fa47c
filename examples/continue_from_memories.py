"""Reads a document once, keeps what the model remembers of it, and continues from there as often as wanted.

    python examples/continue_from_memories.py

The model is new and knows nothing; what is shown holds for any. The output says how large the remembered values are,
that going on from them equals reading everything again, and what a token costs after short and long documents.
For a trained model and real text, `generate.py` does the same at the terminal.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, carried_files, select_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=5000, help="length of the document")
    parser.add_argument("--dim", type=int, default=128)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = BlockRecurrentTransformer(
        num_tokens=256, dim=options.dim, depth=4, heads=4, dim_head=32, max_seq_len=128, block_width=64
    ).eval()
    document = torch.randint(256, (1, options.tokens))  # stands for a text
    questions = torch.randint(256, (2, 11))

    # 1. Read the document, in any pieces. Memories and states are values: nothing is left in the model.
    memories = states = None
    with torch.no_grad():
        for piece in document.split(1000, dim=1):
            _, memories, states = model(piece, xl_memories=memories, states=states, logits_to_keep=1)
    leaves = torch.utils._pytree.tree_leaves((memories, states))
    size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
    print(f"{options.tokens} tokens read, {size / 1024:.0f} KiB remembered")

    # 2. Keep it on disk, without pickle, and take it back.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "document.safetensors"
        carried_files.save(file, memories, states, model)
        memories, states = carried_files.load(file, model)

    # 3. Ask two questions of the same document: the remembered row twice.
    both = torch.tensor([0, 0])
    start = {"xl_memories": select_rows(memories, both), "states": select_rows(states, both)}
    with torch.no_grad():
        logits, _, _ = model(questions, **start)
        again, _, _ = model(torch.cat((document.expand(2, -1), questions), dim=1), logits_to_keep=questions.shape[1])
    print(f"largest difference of the logits from reading everything again: {(logits - again).abs().max():.1e}")

    # 4. Let it write. The prompt of the next call begins with the last token, which was not read yet.
    new, memories, states = model.generate(
        questions, max_new_tokens=20, top_p=0.9, return_memories_and_states=True,
        generator=torch.Generator().manual_seed(0), **start,
    )  # fmt: skip
    more = model.generate(new[:, -1:], max_new_tokens=5, xl_memories=memories, states=states, temperature=0)
    print(f"written: {new.shape[1]} and then {more.shape[1]} tokens for each of {len(new)} questions")

    # 5. A token costs the same after any document.
    for length in (options.tokens // 10, options.tokens):
        prompt = document[:, :length]
        with torch.no_grad():
            _, memories, states = model(prompt, logits_to_keep=1)
            began = time.perf_counter()
            for token in prompt[0, :64]:
                _, memories, states = model(token.view(1, 1), xl_memories=memories, states=states)
        print(f"after {length} tokens: {(time.perf_counter() - began) / 64 * 1e3:.2f} ms a token")


if __name__ == "__main__":
    main()
