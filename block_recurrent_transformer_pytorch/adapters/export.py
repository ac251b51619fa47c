"""Turns a run, or what `save_pretrained` wrote, into a folder that transformers loads.

    python -m block_recurrent_transformer_pytorch.adapters.export runs/mine exported

The folder holds the weights, a tokenizer, a model card, and the code that AutoModelForCausalLM needs with
trust_remote_code=True; this library must be installed where it is loaded. A model of bytes gets three more ids, for
padding, begin and end, which it never predicts: begin and end are read as byte 0, which stands before a document in
training.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .. import data, pretrained
from ..block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from .transformers import BlockRecurrentConfig, BlockRecurrentForCausalLM, BlockRecurrentModel, byte_tokenizer
from .transformers.tokenizer import SPECIAL

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [block-recurrent-transformer]
---

# {name}

A Block-Recurrent Transformer (Hutchins et al. 2022): {parameters:,} parameters, {depth} layers of width {dim}, \
{tokens} tokens, blocks of {width} tokens, states in layers {states}. It carries memories and states of fixed size \
from call to call, so that a token costs the same however long the text is.

```python
# pip install "block-recurrent-transformer-pytorch[transformers]"
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

What it was trained on, and what it is fit for, is for its makers to say here.
"""


def to_transformers(model: BlockRecurrentTransformer, predicted_tokens: int | None = None) -> BlockRecurrentForCausalLM:
    """A language model of transformers with the same weights, not shared, on the same device, in eval mode."""
    config = BlockRecurrentConfig(**asdict(model.config), predicted_tokens=predicted_tokens)
    theirs = BlockRecurrentForCausalLM(config).to(model.token_emb.weight)
    theirs.core.load_state_dict(model.state_dict())
    return theirs.eval()  # type: ignore[no-any-return]


def with_more_tokens(model: BlockRecurrentTransformer, like: list[int]) -> BlockRecurrentTransformer:
    """The model with further ids, which are read as those in `like` are."""
    weights = dict(model.state_dict())
    for name in {"token_emb.weight", "to_logits.weight"} & set(weights):
        weights[name] = torch.cat((weights[name], weights[name][like]))
    config = replace(model.config, num_tokens=model.config.num_tokens + len(like))
    return BlockRecurrentTransformer.from_weights(config, weights)


def make_tokenizer(kept: data.Tokenizer, num_tokens: int) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer for transformers, and as which ids its further ones, from num_tokens on, are read."""
    if isinstance(kept, data.ByteTokenizer):
        if num_tokens != 256:
            raise ValueError(f"a model of bytes has num_tokens=256, this one {num_tokens}")
        return byte_tokenizer(), [0, 0, 0]
    if not isinstance(kept, data.FileTokenizer):
        raise ValueError(f"a {type(kept).__name__} cannot be exported")
    theirs = Tokenizer.from_str(kept.content.decode())
    if kept.num_tokens != num_tokens:
        raise ValueError(f"the tokenizer has {kept.num_tokens} tokens, the model num_tokens={num_tokens}")
    missing = [token for token in SPECIAL.values() if theirs.token_to_id(token) is None]
    return PreTrainedTokenizerFast(tokenizer_object=theirs, padding_side="left", **SPECIAL), [0] * len(missing)


def export(source: pretrained.StrPath, folder: pretrained.StrPath, checkpoint: pretrained.Which = "best") -> None:
    """Writes the folder.

    Args:
        source: the folder of a run of train.py, or one that `save_pretrained` wrote with a tokenizer.
        folder: is made; it must be empty.
        checkpoint: of a run, "best" or "last".

    Raises:
        ValueError: no such source, a folder that is not empty, or a tokenizer that does not fit the model.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"folder: {target} is not an empty folder")
    model = pretrained.from_pretrained(source, checkpoint=checkpoint)
    first = model.config.num_tokens
    tokenizer, like = make_tokenizer(pretrained.load_tokenizer(source), first)
    theirs = to_transformers(with_more_tokens(model, like) if like else model, first if like else None)
    for name in ("pad", "bos", "eos"):
        token = getattr(tokenizer, f"{name}_token_id")
        setattr(theirs.config, f"{name}_token_id", token)
        setattr(theirs.generation_config, f"{name}_token_id", token)
    BlockRecurrentConfig.register_for_auto_class()
    BlockRecurrentModel.register_for_auto_class("AutoModel")
    BlockRecurrentForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    theirs.save_pretrained(target)
    tokenizer.save_pretrained(target)
    card = CARD.format(
        name=target.name, parameters=sum(p.numel() for p in model.parameters()), depth=model.config.depth,
        dim=model.config.dim, tokens=first, width=model.config.block_width,
        states=", ".join(map(str, model.config.recurrent_layers)) or "none",
    )  # fmt: skip
    (target / "README.md").write_text(card, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m block_recurrent_transformer_pytorch.adapters.export", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", metavar="RUN", help="folder of a run, or one that save_pretrained wrote")
    parser.add_argument("folder", metavar="FOLDER", help="to be made")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which of the run")
    options = parser.parse_args(arguments)
    try:
        export(options.source, options.folder, options.checkpoint)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
