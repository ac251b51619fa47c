"""Text from a trained model, as it comes.

    python generate.py runs/mine --prompt "def main("
    python generate.py runs/mine --file book.txt --memory book.safetensors --prompt "Who is Ishmael?"   # read once
    python generate.py runs/mine --memory book.safetensors                                              # ask on
    python generate.py SmolLM2-135M --block 512 --xl-blocks 3 --file book.txt --prompt "The moral is"   # a Llama

Without --prompt, each line of the standard input is one. All that is read and written is one stream: the book, the
first prompt, its continuation, the next prompt, and so on. --memory keeps what the model remembers of it; nothing is
read twice, and a token costs the same however long the book was. Ctrl-C ends it, and the memory is saved.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Memories, States, carried_files, pretrained
from block_recurrent_transformer_pytorch.data import Tokenizer
from block_recurrent_transformer_pytorch.flags import DEVICES, HelpFormatter, natural, positive
from block_recurrent_transformer_pytorch.generation import Generation, seen_tokens

READ_AT_ONCE = 4096  # tokens of a book in one call
INTERRUPTED = 130  # the status of a program that Ctrl-C ended
SAMPLING = ("temperature", "repetition_penalty", "filter_thres", "top_k", "top_p", "min_p", "stop_tokens")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"generate.py: {message.removeprefix('argument ')}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=(__doc__ or "").splitlines()[0], usage="generate.py RUN [options]", allow_abbrev=False,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run of train.py, one that save_pretrained wrote, or that of a Llama, "
        "Mistral, Qwen, SmolLM or Phi-3 as transformers writes it")  # fmt: skip
    add("--checkpoint", choices=("best", "last"), default="best", help="which of the run; best: in validation")
    add("--prompt", metavar="TEXT", help="what to go on from; default: each line of the standard input")
    add("--file", metavar="BOOK", help="a text to read first")
    add("--memory", metavar="FILE", help="memories and states: loaded if the file is there, and saved at the end")
    add("--max-new-tokens", type=positive, default=400, metavar="N", help="tokens of each continuation")
    add("--seed", type=natural, metavar="N", help="of the random choices; default: another one each time")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="what computes")
    add("--threads", type=positive, metavar="N", help="threads on the CPU; default: torch's choice")

    add = parser.add_argument_group("what a Llama sees; other models know it themselves").add_argument
    add("--block", type=positive, metavar="N", help="tokens of a block; default: 512")
    add("--xl-blocks", type=natural, metavar="N", help="blocks before the current one that are seen; default: 1")
    add("--sinks", type=natural, metavar="N", help="first tokens of the stream that stay in sight; default: 4")

    add = parser.add_argument_group("how tokens are chosen").add_argument
    add("--temperature", type=float, default=Generation.temperature, metavar="T",
        help="divides the logits; 0: always the most likely token")  # fmt: skip
    add("--repetition-penalty", type=float, default=Generation.repetition_penalty, metavar="P",
        help="makes tokens that were read before less likely; 1: does not")  # fmt: skip
    add("--filter-thres", type=float, metavar="P",
        help="keeps the share 1 - P of the vocabulary; default: 0.9 where no other filter is given")  # fmt: skip
    add("--top-k", type=int, metavar="K", help="keeps the K most likely tokens; default: off")
    add("--top-p", type=float, metavar="P", help="keeps the most likely tokens that add up to P; default: off")
    add("--min-p", type=float, metavar="P", help="keeps tokens P times as likely as the likeliest; default: off")
    add("--stop-tokens", type=int, nargs="+", default=[], metavar="ID",
        help="ids of tokens at which a continuation ends; default: none")  # fmt: skip
    return parser


# ----------------------------------------------------------------------------------------------------------- the stream


class Past(NamedTuple):
    """Where the stream stands."""

    memories: Memories | None
    states: States | None
    seen: Tensor | None  # which tokens are in the memories, (1, num_tokens) bool
    unread: list[int]  # those that came after them


class Reader:
    """Reads and continues one stream of tokens. `past` changes in one step, so that Ctrl-C leaves it whole."""

    def __init__(self, model: BlockRecurrentTransformer, past: Past, generator: torch.Generator) -> None:
        self.model, self.past, self.generator = model, past, generator

    def ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.token_emb.weight.device)  # (1, n)

    def seen_with(self, tokens: list[int]) -> Tensor | None:
        if not tokens:
            return self.past.seen
        seen = seen_tokens(self.model.config.num_tokens, self.ids(tokens))
        return seen if self.past.seen is None else seen | self.past.seen

    @torch.no_grad()
    def after(self, tokens: list[int], unread: list[int]) -> Past:
        """The past once these tokens are in the memories and those come after them."""
        memories, states = self.past.memories, self.past.states
        for start in range(0, len(tokens), READ_AT_ONCE):
            part = self.ids(tokens[start : start + READ_AT_ONCE])
            _, memories, states = self.model(
                part, xl_memories=memories, states=states, logits_to_keep=1, use_dropout=False
            )
        return Past(memories, states, self.seen_with(tokens), unread)

    def read(self, tokens: list[int], name: str) -> None:
        """Reads a book; the last token waits for what comes next, of which it is the beginning."""
        pause = 0.5 if sys.stderr.isatty() else 15
        with tqdm(total=len(tokens), desc=name, unit="token", unit_scale=True, mininterval=pause) as bar:
            for start in range(0, len(tokens), READ_AT_ONCE):
                part = [*self.past.unread, *tokens[start : start + READ_AT_ONCE]]
                self.past = self.after(part[:-1], part[-1:])
                bar.update(min(READ_AT_ONCE, len(tokens) - start))

    def answer(self, prompt: list[int], **options: Any) -> Iterator[int]:
        """Continues the stream with a prompt and with tokens of the model's, which are yielded."""
        self.past.unread.extend(prompt)
        steps = self.model.stream(
            self.ids(self.past.unread), xl_memories=self.past.memories, states=self.past.states,
            previous=self.past.seen, generator=self.generator, **options,
        )  # fmt: skip
        while True:
            try:
                token = int(next(steps))
            except StopIteration as end:
                (memories, states), (*read, last) = end.value, self.past.unread
                self.past = Past(memories, states, self.seen_with(read), [last])
                return
            self.past.unread.append(token)
            yield token

    def save(self, path: str) -> None:
        past = self.after(self.past.unread, [])
        if past.memories is not None and past.states is not None:
            carried_files.save(path, past.memories, past.states, self.model, previous=past.seen)
            print(f"memories and states saved to {path}", file=sys.stderr)


def texts(tokenizer: Tokenizer, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """The text of tokens as they come. What may be the beginning of a character waits for the rest of it.

    `before` are the last tokens in front of them: some tokenizers put a space between words and not before the first.
    """
    held = [] if tokenizer.decode(before).endswith("\ufffd") else list(before)
    done = len(held)  # tokens of `held` that were told, of which the last decide how the next ones are written
    for token in tokens:
        held.append(token)
        told, text = tokenizer.decode(held[:done]), tokenizer.decode(held)
        if len(text) > len(told) and not text.endswith("\ufffd"):
            yield text[len(told) :]
            held, done = held[done:], len(held) - done
    yield tokenizer.decode(held)[len(tokenizer.decode(held[:done])) :]


# ---------------------------------------------------------------------------------------------------------- the command


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Errors begin with the flag that they are about, in place of the argument's name."""
    try:
        yield
    except (ValueError, ImportError) as error:
        text = " ".join(str(error).split()).removeprefix(flag.strip("-").replace("-", "_")).strip()
        raise ValueError(f"{flag} {text}") from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ValueError(f"{flag} {error.strerror or error}{where}") from error


def check_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate`; a ValueError of theirs begins with the name of one."""
    sampling = {name: getattr(options, name) for name in SAMPLING}
    try:
        Generation(**sampling)
    except ValueError as error:
        name = next(name for name in SAMPLING if str(error).startswith(name))
        raise ValueError(f"--{name.replace('_', '-')}{str(error).removeprefix(name)}") from error
    return {**sampling, "max_new_tokens": options.max_new_tokens}


def load_past(path: str | None, model: BlockRecurrentTransformer) -> Past:
    """What an earlier call kept; nothing where there is no file yet."""
    nothing = Past(None, None, None, [])
    if path is None:
        return nothing
    if Path(path).is_dir() or Path(path).absolute().parent.is_file():
        raise ValueError(f"{path} is no place for a file")
    if not Path(path).exists():
        return nothing
    memories, states = carried_files.load(path, model)
    rows = len(next(leaf for leaf in tree_leaves(memories) if isinstance(leaf, Tensor)))
    if rows != 1:
        raise ValueError(f"{path} holds {rows} rows, this command reads one stream")
    return Past(memories, states, carried_files.load_previous(path, model), [])


def prompts(given: str | None) -> Iterator[str]:
    """The one that was given, or lines of the standard input."""
    if given is not None:
        yield given
        return
    mark = ">>> " if sys.stdin.isatty() else ""
    while True:
        print(mark, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.removesuffix("\n")


def load_model(options: argparse.Namespace) -> BlockRecurrentTransformer:
    names = {"block": "block_width", "xl_blocks": "num_xl_blocks", "sinks": "sink_tokens"}
    window = {name: value for flag, name in names.items() if (value := getattr(options, flag)) is not None}
    if pretrained.is_of_transformers(Path(options.run)):
        window = {"block_width": 512, "num_xl_blocks": 1} | window
        return BlockRecurrentTransformer.from_llama(options.run, **window).to(options.device)
    if window:
        raise ValueError(f"{options.run} is no Llama's folder: its model has a {next(iter(window))} of its own")
    return BlockRecurrentTransformer.from_pretrained(
        options.run, checkpoint=options.checkpoint, device=options.device
    )  # fmt: skip


def load(options: argparse.Namespace) -> tuple[Reader, Tokenizer]:
    with naming("RUN"):
        model = load_model(options)
        tokenizer = pretrained.load_tokenizer(options.run)
        if tokenizer.num_tokens > model.config.num_tokens:
            raise ValueError(
                f"{options.run}: its tokenizer has {tokenizer.num_tokens} tokens, the model {model.config.num_tokens}"
            )
    with naming("--stop-tokens"):
        Generation(stop_tokens=options.stop_tokens).check_vocabulary(model.config.num_tokens)
    with naming("--memory"):
        past = load_past(options.memory, model)
    generator = torch.Generator(options.device)
    generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    return Reader(model, past, generator), tokenizer


def converse(options: argparse.Namespace, sampling: dict[str, Any], reader: Reader, tokenizer: Tokenizer) -> None:
    """Reads the book, and answers one prompt after the other."""
    if options.file is not None:
        with naming("--file"):
            book = tokenizer.encode(Path(options.file).read_bytes()).tolist()
            if not book:
                raise ValueError(f"{options.file} holds no text")
        reader.read(book, options.file)
    for prompt in prompts(options.prompt):
        ids = tokenizer.encode(prompt.encode("utf-8", "surrogateescape")).tolist()
        if not ids and not reader.past.unread:
            if options.prompt is not None:
                raise ValueError("--prompt is empty, and no token before it waits to be continued")
            continue
        for text in texts(tokenizer, reader.answer(ids, **sampling), ids[-1:]):
            print(text, end="", flush=True)
        print(flush=True)


def run(options: argparse.Namespace) -> int:
    sampling = check_sampling(options)
    reader, tokenizer = load(options)
    try:
        converse(options, sampling, reader, tokenizer)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the text has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:  # however it ended: a book that was read is not to be read again
        if options.memory is not None:
            with naming("--memory"):
                reader.save(options.memory)
    return 0


def main(argv: list[str] | None = None) -> int:
    for file, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors=errors)
    options = make_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        return run(options)
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to save
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
