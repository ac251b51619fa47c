"""generate.py by its command line: what it writes, keeps and refuses, and how it ends."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_model

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, Config, carried_files
from block_recurrent_transformer_pytorch.commands import generate
from block_recurrent_transformer_pytorch.data import ByteTokenizer, FileTokenizer

ROOT = Path(__file__).resolve().parents[1]

OPTIONS = {
    "num_tokens": 256, "dim": 8, "depth": 2, "dim_head": 4, "heads": 2, "ff_dim": 6, "max_seq_len": 8,
    "block_width": 4, "num_state_vectors": 2,
}  # fmt: skip
MODEL = random_model(Config(**OPTIONS))
BOOK = b"Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. "
GREEDY = ("--temperature", "0", "--max-new-tokens", "9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate")
    MODEL.save_pretrained(path / "model", tokenizer=ByteTokenizer())
    (path / "book.txt").write_bytes(BOOK)
    return path


@pytest.fixture
def call(folder, capsys, monkeypatch):
    """call("--flag", ...) -> (status, standard output, standard error); `lines` are the standard input."""

    def start(*flags: object, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        try:
            status = generate.main([str(folder / "model"), *map(str, flags)])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return start


def said_after(text: bytes, new: int = 9, **options: object) -> bytes:
    """What the model says in one go, greedily."""
    prompt = torch.tensor([[*text]])
    return bytes(MODEL.generate(prompt, max_new_tokens=new, **{"temperature": 0, **options})[0].tolist())


def shown(text: bytes) -> str:
    return text.decode("utf-8", "replace")


# -------------------------------------------------------------------------------------------------------------- writing


def test_a_prompt_is_continued(call):
    status, out, err = call("--prompt", "the whale", *GREEDY)
    assert (status, out, err) == (0, shown(said_after(b"the whale")) + "\n", "")


def test_lines_are_prompts_of_one_stream(call):
    status, out, _ = call(*GREEDY, lines="who\n\nwhy\n")
    stream, wanted = b"", ""
    for line in (b"who", b"", b"why"):
        stream += line
        new = said_after(stream)
        stream, wanted = stream + new, wanted + shown(new) + "\n"
    assert (status, out) == (0, wanted)


def test_a_book_is_read_first(call, folder, monkeypatch):
    for most in (7, 4096):
        monkeypatch.setattr(generate, "READ_AT_ONCE", most)
        _, out, err = call("--file", folder / "book.txt", "--prompt", "Who?", *GREEDY)
        assert out == shown(said_after(BOOK + b"Who?")) + "\n"
        assert "book.txt" in err and "100%" in err
    _, out, _ = call("--file", folder / "book.txt", "--prompt", "", *GREEDY)
    assert out == shown(said_after(BOOK)) + "\n"


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_book_is_read_once_and_asked_many_times(call, folder, tmp_path, penalty, monkeypatch):
    """Over several calls with a memory as in one go, with the penalty for what any of them read."""
    memory = ("--memory", tmp_path / "memory", "--repetition-penalty", penalty)
    stream = BOOK
    status, out, err = call("--file", folder / "book.txt", *memory)
    assert (status, out) == (0, "") and f"saved to {tmp_path / 'memory'}" in err
    questions = (b"Who?", b"Where?")
    with monkeypatch.context() as patch:
        read = count_tokens(patch)
        outs = [call("--prompt", question.decode(), *memory, *GREEDY)[1] for question in questions]
    for question, out in zip(questions, outs):
        new = said_after(stream + question, repetition_penalty=penalty)
        stream += question + new
        assert out == shown(new) + "\n"
    assert sum(read) == len(stream) - len(BOOK)  # the book was read before


def count_tokens(patch) -> list[int]:
    """The tokens of each call of a loaded model."""
    read: list[int] = []
    whole = BlockRecurrentTransformer.forward

    def forward(self, x, **options):
        read.append(x.shape[1])
        return whole(self, x, **options)

    patch.setattr(BlockRecurrentTransformer, "forward", forward)
    return read


def test_a_seed_repeats_what_is_said(call):
    options = ("--prompt", "the", "--max-new-tokens", 30)
    assert call(*options, "--seed", 1) == call(*options, "--seed", 1)
    assert call(*options, "--seed", 1) != call(*options, "--seed", 2)
    assert call(*options) != call(*options)


def test_sampling_options_arrive(call):
    base = ("--prompt", "the", "--seed", 3, "--max-new-tokens", 30)
    options = {"--top-k": 2, "--top-p": 0.3, "--min-p": 0.5, "--filter-thres": 0.99, "--temperature": 0.1,
               "--repetition-penalty": 3}  # fmt: skip
    outs = [call(*base)[1], *(call(*base, flag, value)[1] for flag, value in options.items())]
    assert len(set(outs)) == len(outs)
    first = said_after(b"the")[0]
    _, out, _ = call("--prompt", "the", *GREEDY, "--stop-tokens", first, 3)
    assert out == shown(bytes([first])) + "\n"


# ----------------------------------------------------------------------------------------------------------- characters


@given(st.text(max_size=20))
def test_characters_come_whole(text):
    pieces = list(generate.texts(ByteTokenizer(), text.encode("utf-8", "surrogatepass")))
    assert "".join(pieces) == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_are_replaced(tokens):
    for before in (b"", b"a", "é".encode()[-1:]):
        assert "".join(generate.texts(ByteTokenizer(), tokens, before)) == tokens.decode("utf-8", "replace")


def test_text_comes_as_soon_as_it_can():
    tokens = iter("aé€𐍈b".encode())
    consumed = []

    def feed():
        for token in tokens:
            consumed.append(token)
            yield token

    seen = [(piece, len(consumed)) for piece in generate.texts(ByteTokenizer(), feed()) if piece]
    assert seen == [("a", 1), ("é", 3), ("€", 6), ("𐍈", 10), ("b", 11)]


@pytest.mark.parametrize("before", ["", "to", "é", "to be"])
def test_words_keep_their_spaces(before, tmp_path):
    """Of a tokenizer that writes the spaces between words itself."""
    library = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["to", "be", "or", "not", "é"])}
    made = library.Tokenizer(library.models.WordLevel(words, unk_token="to"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer, ids = FileTokenizer(tmp_path / "tokenizer.json"), [words[word] for word in before.split()]
    pieces = list(generate.texts(tokenizer, [2, 3, 0, 1], ids[-1:]))
    assert before + "".join(pieces) == f"{before} or not to be".strip()


def test_characters_of_a_tokenizer_file(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(vocab_size=270, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([BOOK.decode()], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer, text = FileTokenizer(tmp_path / "tokenizer.json"), "Call me Ismaël 🐳, please: çé"
    pieces = list(generate.texts(tokenizer, tokenizer.encode(text.encode()).tolist()))
    assert "".join(pieces) == text and len(pieces) > 10


# ---------------------------------------------------------------------------------------------------------- how it ends


def carried_after(text: bytes) -> tuple:
    with torch.no_grad():
        return MODEL(torch.tensor([[*text]]))[1:]


def same_stream(path: Path, text: bytes) -> None:
    """The memory in a file is that of this text: what comes next is the same."""
    memories, states = carried_files.load(path, MODEL)
    other = carried_after(text)
    follow = torch.tensor([[*b"and so on"]])
    with torch.no_grad():
        one = MODEL(follow, xl_memories=memories, states=states)[0]
        two = MODEL(follow, xl_memories=other[0], states=other[1])[0]
    assert torch.allclose(one, two, atol=1e-9)
    seen = carried_files.load_previous(path, MODEL)
    assert seen.nonzero()[:, 1].tolist() == sorted({*text})


def test_ctrl_c_in_an_answer_keeps_what_was_said(call, tmp_path, monkeypatch):
    whole, said = generate.texts, []

    def interrupted(tokenizer, tokens, before):
        def some():
            for token in tokens:
                said.append(token)
                if len(said) == 6:
                    raise KeyboardInterrupt
                yield token

        yield from whole(tokenizer, some(), before)

    monkeypatch.setattr(generate, "texts", interrupted)
    status, _, err = call("--prompt", "the whale", "--memory", tmp_path / "memory", *GREEDY)
    assert status == 130 and "interrupted" in err and "Traceback" not in err
    same_stream(tmp_path / "memory", b"the whale" + bytes(said))


def test_ctrl_c_in_a_book_keeps_what_was_read(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "READ_AT_ONCE", 10)
    whole, parts = generate.Reader.after, []

    def interrupted(self, tokens, unread):
        parts.append(tokens)
        if len(parts) == 4:
            raise KeyboardInterrupt
        return whole(self, tokens, unread)

    monkeypatch.setattr(generate.Reader, "after", interrupted)
    status, out, err = call("--file", folder / "book.txt", "--memory", tmp_path / "memory", *GREEDY)
    assert status == 130 and "interrupted" in err and out == ""
    same_stream(tmp_path / "memory", BOOK[:30])


def test_an_error_after_the_book_does_not_lose_it(call, folder, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("something")

    monkeypatch.setattr(generate, "texts", broken)
    status, _, err = call("--file", folder / "book.txt", "--memory", tmp_path / "memory", "--prompt", "a", *GREEDY)
    assert status == 2 and err.strip().endswith("generate.py: something")
    same_stream(tmp_path / "memory", BOOK)


def command(folder: Path, *flags: object) -> subprocess.Popen:
    words = [sys.executable, ROOT / "generate.py", folder / "model", "--threads", "1", *flags]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def test_the_command_ends_by_ctrl_c(folder, tmp_path):
    flags = ("--prompt", "the", "--max-new-tokens", 10**6, "--memory", tmp_path / "memory")
    with command(folder, *flags) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    carried_files.load(tmp_path / "memory", MODEL)


def test_the_command_ends_when_nobody_reads(folder, tmp_path):
    with command(folder, "--prompt", "the", "--max-new-tokens", 10**6, "--memory", tmp_path / "memory") as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert b"Traceback" not in err and b"Exception" not in err
    carried_files.load(tmp_path / "memory", MODEL)


# --------------------------------------------------------------------------------------------------------------- errors

WRONG = {
    "temperature": (["--temperature", -1], ["--temperature", "-1"]),
    "temperature a word": (["--temperature", "hot"], ["--temperature", "hot"]),
    "top_k": (["--top-k", 0], ["--top-k", "0"]),
    "top_p": (["--top-p", 2], ["--top-p", "2"]),
    "min_p": (["--min-p", -1], ["--min-p", "-1"]),
    "two filters": (["--filter-thres", 0.5, "--top-k", 3], ["--filter-thres=0.5", "3"]),
    "penalty": (["--repetition-penalty", 0], ["--repetition-penalty", "0"]),
    "stop token": (["--stop-tokens", 300], ["--stop-tokens holds [300]", "256"]),
    "length": (["--max-new-tokens", 0], ["--max-new-tokens", "0"]),
    "seed": (["--seed", -1], ["--seed", "-1"]),
    "empty prompt": (["--prompt", ""], ["--prompt is empty"]),
    "no book": (["--file", "nowhere.txt"], ["--file", "No such file", "nowhere.txt"]),
    "an empty book": (["--file", os.devnull], ["--file", "holds no text"]),
    "memory a folder": (["--memory", ROOT], ["--memory", str(ROOT)]),
    "memory no memory": (["--memory", __file__], ["--memory", "is no file of memories"]),
    "checkpoint": (["--checkpoint", "last"], ["RUN", "checkpoint='last'"]),
    "unknown": (["--top_k", 3], ["--top_k"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_one_line_that_names_the_flag(name, call):
    flags, words = WRONG[name]
    status, out, err = call("--max-new-tokens", 3, *flags)
    assert (status, out) == (2, "")
    assert err.startswith("generate.py: ") and err.count("\n") == 1
    missing = [word for word in words if word not in err]
    assert not missing, err


def test_no_run(capsys, tmp_path):
    assert generate.main([str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"generate.py: RUN {tmp_path / 'nowhere'} is no folder") and err.count("\n") == 1


def test_a_memory_of_another_model_or_of_several_streams(call, tmp_path):
    other = random_model(Config(**{**OPTIONS, "num_state_vectors": 3}))
    carried_files.save(tmp_path / "other", other.init_memories(1), other.init_states(1), other)
    carried_files.save(tmp_path / "rows", MODEL.init_memories(2), MODEL.init_states(2), MODEL)
    for name, word in (("other", "num_state_vectors=3 there, 2 here"), ("rows", "2 rows")):
        status, _, err = call("--memory", tmp_path / name, "--prompt", "a")
        assert status == 2 and err.startswith("generate.py: --memory") and word in err


def test_help_shows_the_defaults(call):
    status, out, _ = call("--help")
    assert status == 0
    for words in ("(default: 400)", "(default: 1.0)", "(default: best)", "0.9 where no other filter", "default: off"):
        assert words in " ".join(out.split())
