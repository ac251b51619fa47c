"""The model in lm-evaluation-harness: documents of any length are read through carried memories, never in windows.

    python -m block_recurrent_transformer_pytorch.adapters.lm_eval --model block-recurrent \
        --model_args path=runs/mine --tasks TASK --include_path FOLDER

is the command line of lm_eval in which this model is known; versions of it that read entry points know it themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor, nn
from tqdm import tqdm

from .. import pretrained
from ..block_recurrent_transformer_pytorch import BlockRecurrentTransformer
from ..scoring import score, side_by_side

NAME = "block-recurrent"
LOOKED_AT = 16  # tokens after which `generate_until` looks for what ends a text
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class BlockRecurrentLM(TemplateLM):
    """A trained model, before whose texts token 0 is read, as in training.

    Args:
        path: the folder of a run of train.py, or one that `save_pretrained` wrote with a tokenizer.
        checkpoint: of a run, "best" or "last".
        device: of the model; default the CPU, which also stands in, with a warning, for a GPU that is not there: the
            harness asks for cuda:0 of its own accord.
        segment: tokens that are read at once; default the model's max_seq_len. It changes nothing but memory and speed.
        batch_size: texts that are read side by side.
        max_gen_toks: length of generated texts, where a task does not say.

    Raises:
        ValueError: no such folder, or a number out of range.
    """

    def __init__(
        self, path: str, checkpoint: pretrained.Which = "best", device: str | None = None, segment: int | None = None,
        batch_size: int | str = 16, max_gen_toks: int = 256, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            warnings.warn(f"device={device!r} is not there, the model runs on the CPU", stacklevel=2)
            device = "cpu"
        self.model: BlockRecurrentTransformer = pretrained.from_pretrained(
            path, checkpoint=checkpoint, device=device or "cpu"
        )
        self.tokenizer = pretrained.load_tokenizer(path)
        self.segment = None if segment is None else int(segment)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1")
        self.rows, self.max_gen_toks = int(batch_size), int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(string.encode())]

    def tensor(self, tokens: Iterable[int]) -> Tensor:
        """(n,) int64 on the model's device."""
        return torch.tensor(list(tokens), dtype=torch.long, device=self.model.token_emb.weight.device)

    def after_0(self, tokens: list[int]) -> Tensor:
        """A context with the 0 before it; the harness gives the 0 alone for an empty one."""
        return self.tensor(tokens if tokens == [self.eot_token_id] else [self.eot_token_id, *tokens])

    # -- probabilities

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in nats."""
        texts = [self.tensor(self.tok_encode(request.args[0])) for request in requests]
        sums = [0.0] * len(texts)
        filled = [index for index, text in enumerate(texts) if len(text)]
        groups = list(side_by_side([texts[index] for index in filled], self.rows)) if filled else []
        for group in tqdm(groups, disable=disable_tqdm):
            chosen = [filled[place] for place in group]
            found = score(self.model, [texts[index] for index in chosen], bos=0, segment=self.segment, rows=self.rows)
            for index, own in zip(chosen, found):
                sums[index] = own.double().sum().item()
        return sums

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability in nats, and whether it is the most likely one, token by token."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        contexts = [self.after_0(context) for _, context, _ in requests]
        groups = list(side_by_side(contexts, self.rows)) if requests else []
        for group in tqdm(groups, disable=disable_tqdm):
            continuations = [self.tensor(requests[index][2]) for index in group]
            for index, answer in zip(group, self.judged([contexts[index] for index in group], continuations)):
                answers[index] = answer
        return answers

    @torch.no_grad()
    def judged(self, contexts: list[Tensor], continuations: list[Tensor]) -> list[tuple[float, bool]]:
        """Reads contexts, then what follows as one piece, at the memory of its logits."""
        _, memories, states = score(
            self.model, contexts, segment=self.segment, rows=self.rows, return_memories_and_states=True
        )
        inputs = [torch.cat((one[-1:], next_[:-1])) for one, next_ in zip(contexts, continuations)]
        padded = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        lengths = self.tensor(len(next_) for next_ in continuations)
        logits, _, _ = self.model(padded, xl_memories=memories, states=states, lengths=lengths, use_dropout=False)
        answers = []
        for own, next_ in zip(logits.double().log_softmax(dim=-1), continuations):
            own = own[: len(next_)]
            total = own.gather(1, next_[:, None]).sum().item()
            answers.append((total, bool((own.argmax(dim=-1) == next_).all())))
        return answers

    # -- texts

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to the first of its stop strings, which is left out."""
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: repr(sorted(requests[i].args[1].items())))
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for _, same in groupby(order, key=lambda i: repr(sorted(requests[i].args[1].items()))):
                for group in batches(list(same), self.rows):
                    contexts = [self.after_0(self.tok_encode(requests[index].args[0])) for index in group]
                    for index, text in zip(group, self.continued(contexts, dict(requests[group[0]].args[1]))):
                        texts[index] = text
                    bar.update(len(group))
        return texts

    def continued(self, contexts: list[Tensor], options: dict[str, Any]) -> list[str]:
        """One text for each context, with the options of a task."""
        until = options.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(options.pop("max_gen_toks", self.max_gen_toks))
        samples = options.pop("do_sample", options.get("temperature", 0) > 0)
        if unknown := sorted(set(options) - set(SAMPLING)):
            raise ValueError(f"generation_kwargs holds {unknown}, known are {SAMPLING}, until, do_sample, max_gen_toks")
        chosen = options if samples else {"temperature": 0.0}
        tokens: list[list[int]] = [[] for _ in contexts]
        steps = self.model.stream(contexts, max_new_tokens=most, **chosen)
        for number, new in enumerate(steps, start=1):
            for row, token in zip(tokens, new.tolist()):
                row.append(token)
            if number % LOOKED_AT == 0 and all(ended(self.tokenizer.decode(row), stops) for row in tokens):
                break
        return [until_first(self.tokenizer.decode(row), stops) for row in tokens]


def batches(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def ended(text: str, stops: list[str]) -> bool:
    return any(stop in text for stop in stops if stop)


def until_first(text: str, stops: list[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def main() -> None:
    """lm_eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    register_model(NAME)(BlockRecurrentLM)
    cli_evaluate()


if __name__ == "__main__":
    main()
