"""The texts of a run of train.py: found, split into training and validation, tokenised; what they are is printed."""

from __future__ import annotations

import argparse
import platform

from . import data
from .distributed import Processes


def load(options: argparse.Namespace, processes: Processes) -> tuple[data.Corpus, data.Corpus, data.Tokenizer]:
    """Training and validation tokens, and the tokenizer. The first process downloads and tokenises, then the others
    read its files.

    Raises:
        ValueError: there is no such text, or too little of it.
    """
    if options.data == "auto":
        options.data = processes.share(data.choose() if processes.is_first else "")
    tokenizer = data.FileTokenizer(options.tokenizer) if options.tokenizer else data.ByteTokenizer()
    corpora = read(options, processes, tokenizer) if processes.is_first else None
    processes.wait()
    corpora = corpora or read(options, processes, tokenizer)
    if options.batch > corpora[0].total_tokens:
        raise ValueError(f"--batch {options.batch} is more than the {corpora[0].total_tokens} training tokens")
    train, valid = (corpus.cut(options.batch) for corpus in corpora)
    return train, valid, tokenizer


def read(options: argparse.Namespace, processes: Processes, tokenizer: data.Tokenizer) -> list[data.Corpus]:
    """The two corpora, before they are cut for the rows of a batch."""
    source = data.load_source(options.data, text_field=options.text_field, progress=processes.is_first)
    name = f"stdlib of Python {platform.python_version()}" if options.data == "stdlib" else options.data
    processes.say(f"data: {name}: {source.describe()}")
    if options.valid:
        parts = [source, data.load_source(options.valid, text_field=options.text_field, progress=processes.is_first)]
        processes.say(f"split: all of it for training; for validation {options.valid}: {parts[1].describe()}; no test "
                      "part")  # fmt: skip
    else:
        splits = data.split(source, options.split)
        processes.say(f"split: {splits.describe()}")
        parts = [splits.train, splits.valid]
    if options.tokenizer and (lost := data.lost_by(tokenizer, source)):
        processes.say("warning: the tokenizer loses text, so that its bits per byte cannot be compared with those of "
                      f"other tokenizers: {lost}")  # fmt: skip
    return [data.build_corpus(part, tokenizer, options.cache, progress=processes.is_first) for part in parts]
