"""Reads a prompt and writes on, with onnxruntime, numpy and the tokenizer alone: no torch, and not this library.

    python -m block_recurrent_transformer_pytorch.adapters.onnx runs/mine FOLDER      # once, where torch is
    python examples/onnx_stream.py FOLDER --prompt "Once upon a time" --temperature 0.8

Memories and states go into each call and come out of it, of a fixed size however long the text is. `Model` below is all
that a host needs, for any number of rows at different places in their texts.
"""

import argparse
import codecs
import json
from pathlib import Path

import numpy as np
import onnxruntime


class Model:
    """The two graphs in a folder. What is carried is a dict of arrays by name, whose first axis is the row."""

    def __init__(self, folder, threads=0):
        self.manifest = json.loads((Path(folder) / "manifest.json").read_text())
        self.width = self.manifest["block_width"]
        with np.load(Path(folder) / self.manifest["initial"]) as arrays:
            self.initial = dict(arrays)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0: as many as there are cores
        self.graphs = {}
        for name, graph in self.manifest["graphs"].items():
            path, providers = str(Path(folder) / graph["file"]), ["CPUExecutionProvider"]
            self.graphs[name] = onnxruntime.InferenceSession(path, options, providers=providers)

    def start(self, rows):
        """What rows carry that have read nothing."""
        return {name: np.repeat(value, rows, axis=0) for name, value in self.initial.items()}

    def reset(self, carried, rows):
        """The same, but `rows`, (b,) bool, have read nothing."""
        return {
            name: np.where(rows.reshape(-1, *[1] * (value.ndim - 1)), self.initial[name], value)
            for name, value in carried.items()
        }

    def call(self, graph, carried, **inputs):
        """Logits (b, n, v) of one call of a graph, and what is carried after it."""
        names = list(self.manifest["graphs"][graph]["outputs"])
        logits, *changed = self.graphs[graph].run(names, inputs | carried)
        return logits, carried | {name.removeprefix("next."): value for name, value in zip(names[1:], changed)}

    def step(self, tokens, carried):
        """One token (b,) of each row -> logits (b, v) of the next, and what is carried."""
        ids = np.asarray(tokens, dtype=np.int64)[:, None]
        if carried["position.offset"].max() < self.width - 1:
            logits, carried = self.call("token", carried, ids=ids)
        else:  # a block is complete with this token: memories move on, states are written
            logits, carried = self.call("chunk", carried, ids=ids, lengths=np.ones(len(ids), np.int64))
        return logits[:, 0], carried

    def read(self, texts, carried, chunk=256):
        """Tokens of each row, as many as it has -> logits (b, v) after the last of each, and what is carried.

        They are read in chunks that stay within the block of their row. The logits of a row without tokens are zero.
        """
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1 token")
        left = [np.asarray(text, dtype=np.int64) for text in texts]
        last = np.zeros((len(left), self.manifest["config"]["num_tokens"]), np.float32)
        while any(len(row) for row in left):
            room = np.minimum(self.width - carried["position.offset"], chunk)
            parts = [row[:most] for row, most in zip(left, room)]
            lengths = np.array([len(part) for part in parts])
            ids = np.stack([np.pad(part, (0, lengths.max() - len(part))) for part in parts])
            logits, carried = self.call("chunk", carried, ids=ids, lengths=lengths)
            reads = lengths > 0
            last[reads] = logits[reads, lengths[reads] - 1]
            left = [row[len(part) :] for row, part in zip(left, parts)]
        return last, carried


def choose(logits, temperature, random):
    """The next token (b,) of each row; temperature 0: the most likely one."""
    if temperature == 0:
        return logits.argmax(-1)
    noise = random.gumbel(size=logits.shape)
    return (logits.astype(np.float64) / temperature + noise).argmax(-1)


class Bytes:
    """Every byte is its own id."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, text):
        return list(text.encode())

    def more(self, token):
        """The text that one more token brings."""
        return self.decoder.decode(bytes([token]))


class FromFile:
    """A tokenizer.json of the tokenizers library."""

    def __init__(self, path):
        from tokenizers import Tokenizer

        self.tokenizer, self.tokens, self.told = Tokenizer.from_file(str(path)), [], 0

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def more(self, token):
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens).rstrip("\ufffd")  # the rest of a character may still come
        new, self.told = text[self.told :], len(text)
        return new


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", help="that adapters.onnx wrote")
    parser.add_argument("--prompt", default="\n", metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=400, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: the most likely token")
    parser.add_argument("--chunk", type=int, default=256, metavar="N", help="tokens of the prompt in one call")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random choices; default: another one each time")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: as many as there are cores")
    options = parser.parse_args()
    if options.chunk < 1 or options.temperature < 0:
        parser.error("--chunk must be at least 1, --temperature at least 0")

    model = Model(options.folder, options.threads)
    kept = model.manifest["tokenizer"]
    if kept is None:
        parser.error(f"{options.folder} holds no tokenizer")
    tokenizer = Bytes() if kept == "bytes" else FromFile(Path(options.folder) / kept)
    prompt = tokenizer.encode(options.prompt)
    if not prompt:
        parser.error("--prompt is empty: there is nothing to go on from")
    random = np.random.default_rng(options.seed)

    logits, carried = model.read([prompt], model.start(1), options.chunk)
    for _ in range(options.max_new_tokens):
        token = choose(logits, options.temperature, random)
        print(tokenizer.more(int(token[0])), end="", flush=True)
        logits, carried = model.step(token, carried)
    print()


if __name__ == "__main__":
    main()
