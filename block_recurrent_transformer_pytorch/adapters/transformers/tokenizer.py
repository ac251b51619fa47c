"""Bytes as a tokenizer of transformers: ids 0 to 255 are the bytes themselves."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}


def letters_of_bytes() -> list[str]:
    """The letter by which ByteLevel writes each byte (GPT-2): the printable ones themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (chr(256 + number) for number in range(256 - len(printable)))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The 256 bytes, and 256 to 258 for padding, begin and end: no text holds these, and none is added to a text."""
    vocabulary = {letter: byte for byte, letter in enumerate(letters_of_bytes())}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **SPECIAL
    )
