"""Decoding: prompts in, new tokens out. One call of the model per token, which costs the same however much was read.

`BlockRecurrentTransformer.generate` and `.stream` hand over to the functions of that name here. The options of both are
one list, `Generation`. The model is not changed: it is called without dropout and without gradients, whatever its mode,
so that threads may share it. (Dropout in modules that others put into the model follows the mode of these.)
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from beartype import BeartypeConf, beartype
from torch import Tensor, nn

from .carried import Memories, States, select_rows
from .checks import check_ids, describe
from .sampling import Sampler

if TYPE_CHECKING:
    from .block_recurrent_transformer_pytorch import BlockRecurrentTransformer
else:
    BlockRecurrentTransformer = nn.Module

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
Prompts = Tensor | list[Tensor]


@typechecked
@dataclass(frozen=True, kw_only=True)
class Generation(Sampler):
    """How prompts are continued: how each token is chosen, as of a `Sampler`, and when a continuation ends.

    Without any filter (filter_thres, top_k, top_p, min_p), filter_thres is 0.9, as in 0.4.4.

    Args:
        length: tokens of prompt and continuation together, as 0.4.4 counts them; default the model's max_seq_len + 1.
        max_new_tokens: tokens of the continuation, instead of `length`.
        stop_tokens: a row ends with the first of these, and is padded with `pad_token` behind it.
        pad_token: what stands behind the end of a row.
        num_return_sequences: continuations of each prompt, one after the other in the rows of the result.

    Raises:
        ValueError: a number out of range, or options that exclude one another.
    """

    length: int | None = None
    max_new_tokens: int | None = None
    stop_tokens: int | Sequence[int] = ()
    pad_token: int = 0
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if self.filter_thres is None and self.top_k is None and self.top_p is None and self.min_p is None:
            object.__setattr__(self, "filter_thres", 0.9)
        super().__post_init__()
        if self.length is not None and self.max_new_tokens is not None:
            raise ValueError(
                f"length={self.length} and max_new_tokens={self.max_new_tokens} both say how much to generate"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be at least 1, not {self.num_return_sequences}")

    @property
    def stops(self) -> tuple[int, ...]:
        return (self.stop_tokens,) if isinstance(self.stop_tokens, int) else tuple(self.stop_tokens)

    def check_vocabulary(self, num_tokens: int) -> None:
        """Whether the tokens named here are in the vocabulary."""
        for name, ids in (("stop_tokens", self.stops), ("pad_token", (self.pad_token,))):
            if wrong := [token for token in ids if not 0 <= token < num_tokens]:
                raise ValueError(f"{name} holds {wrong}, num_tokens={num_tokens}")

    def num_new_tokens(self, prompt_lengths: list[int], default_length: int) -> list[int]:
        """How many tokens each row gets at most."""
        if self.max_new_tokens is not None:
            return [self.max_new_tokens] * len(prompt_lengths)
        length = default_length if self.length is None else self.length
        if length <= max(prompt_lengths):
            raise ValueError(
                f"length={length} counts the prompt of {max(prompt_lengths)} tokens; "
                "give a larger length or max_new_tokens"
            )
        return [length - count for count in prompt_lengths]


@typechecked
def generate(
    model: BlockRecurrentTransformer,
    prime: Prompts,
    length: int | None = None,
    *,
    lengths: Tensor | None = None,
    xl_memories: Memories | list[Any] | None = None,
    states: States | list[Any] | None = None,
    previous: Prompts | None = None,
    generator: torch.Generator | None = None,
    return_memories_and_states: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Memories, States]:
    """Continues prompts, at the same cost per token however much was read before.

    To go on later from what is returned, begin the next prompt with the last token, which is not read yet:

        new, memories, states = model.generate(prompt, max_new_tokens=100, return_memories_and_states=True)
        more = model.generate(new[:, -1:], max_new_tokens=100, xl_memories=memories, states=states)

    This gives what one call for 200 tokens would (with the same `generator`). A repetition penalty looks at all tokens
    so far: give those before the prompt as `previous=torch.cat((prompt, new), dim=1)`.

    Args:
        prime: prompts (b, m), m >= 1; or a list of 1-D tensors of any lengths; or padded on the right, with
            `lengths` (b,). With `xl_memories` and `states` they continue what these have read.
        length: tokens of prompt and continuation together, see `Generation`.
        previous: what was read before the prompts, for the repetition penalty: token ids (b, m), a list of 1-D tensors,
            or which tokens of the vocabulary there were, (b, num_tokens) bool (see `seen_tokens`).
        generator: source of the randomness, on the model's device.
        return_memories_and_states: return (tokens, memories, states).
        options: those of `Generation`: max_new_tokens, temperature (0: the most likely token), repetition_penalty,
            filter_thres, top_k, top_p, min_p, stop_tokens, pad_token, num_return_sequences.

    Returns:
        The new tokens alone, (b * num_return_sequences, n) int64; n is less than asked for if all rows stopped.

    Raises:
        ValueError: an argument out of range, or arguments that exclude one another.
    """
    chosen = Generation(length=length, **options)
    read_every = reads_every(model.token_emb.weight.device)
    steps = begin(model, prime, lengths, (xl_memories, states), previous, generator, chosen, read_every)
    tokens = []
    while True:
        try:
            tokens.append(next(steps))
        except StopIteration as end:
            memories, carried, counts = end.value
            break
    new = torch.stack(tokens, dim=1)
    if chosen.stops and read_every > 1:
        new = new[:, : longest(new, counts, chosen.stops)]
    return (new, memories, carried) if return_memories_and_states else new


@typechecked
def stream(
    model: BlockRecurrentTransformer,
    prime: Prompts,
    length: int | None = None,
    *,
    lengths: Tensor | None = None,
    xl_memories: Memories | list[Any] | None = None,
    states: States | list[Any] | None = None,
    previous: Prompts | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Generator[Tensor, None, tuple[Memories, States]]:
    """The same as `generate`, yielding the tokens (b,) as they come; memories and states are the return value.

    With stop tokens each token is awaited before the next one is computed, as whoever looks at it does anyway.
    """
    chosen = Generation(length=length, **options)
    steps = begin(model, prime, lengths, (xl_memories, states), previous, generator, chosen, read_every=1)

    def tokens() -> Generator[Tensor, None, tuple[Memories, States]]:
        memories, carried, _ = yield from steps
        return memories, carried

    return tokens()


def reads_every(device: torch.device) -> int:
    """After how many tokens `generate` asks whether all rows have stopped.

    On the CPU the answer costs nothing. Another device is waited for, so up to 15 tokens are computed behind the last
    stop token, and cut off; the generator has drawn for them, too.
    """
    return 1 if device.type == "cpu" else 16


# ------------------------------------------------------------------------------------------------------------ the loop

Steps = Generator[Tensor, None, tuple[Memories, States, Tensor]]


def begin(
    model: BlockRecurrentTransformer, prime: Prompts, lengths: Tensor | None, carried: tuple[Any, Any],
    previous: Prompts | None, generator: torch.Generator | None, options: Generation, read_every: int,
) -> Steps:  # fmt: skip
    """Checks everything at once, before the first token is asked for, and makes the loop."""
    config, device = model.config, model.token_emb.weight.device
    options.check_vocabulary(config.num_tokens)
    prompt, lengths = padded("prime", prime, lengths, device, config.num_tokens)
    own = [prompt.shape[1]] * len(prompt) if lengths is None else lengths.tolist()
    counts = options.num_new_tokens(own, config.max_seq_len + 1)
    before = None if previous is None else seen_before(previous, len(prompt), device, config.num_tokens)
    seen = None
    if options.repetition_penalty != 1:
        seen = seen_tokens(config.num_tokens, prompt, lengths)
        seen = seen if before is None else seen | before
    return decode(model, prompt, lengths, carried, seen, counts, options, generator, read_every)


def decode(
    model: BlockRecurrentTransformer, prompt: Tensor, lengths: Tensor | None, carried: tuple[Any, Any],
    seen: Tensor | None, counts: list[int], options: Generation, generator: torch.Generator | None, read_every: int,
) -> Steps:  # fmt: skip
    """Read, choose, yield. Rows that have ended read nothing more.

    Nothing is read from the device, and nothing built on the host, from token to token; but with stop tokens it is
    asked every `read_every` tokens how many rows are alive.

    Returns:
        Memories, states, and how many tokens each row could get, (b,).
    """
    logits, memories, states = read(
        model, prompt, xl_memories=carried[0], states=carried[1], lengths=lengths, logits_to_keep=1
    )
    if options.num_return_sequences > 1:
        rows = torch.arange(len(prompt), device=prompt.device).repeat_interleave(options.num_return_sequences)
        logits, seen = logits[rows], None if seen is None else seen[rows]
        memories, states = select_rows(memories, rows), select_rows(states, rows)
        counts = [count for count in counts for _ in range(options.num_return_sequences)]
    stop = torch.tensor(options.stops, device=prompt.device, dtype=torch.long)
    left = torch.tensor(counts, device=prompt.device)
    alive = torch.ones_like(left, dtype=torch.bool)
    for step in range(1, max(counts) + 1):
        token = options(logits[:, -1], seen, generator).masked_fill(~alive, options.pad_token)
        yield token.clone()
        if step == max(counts):
            break
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        alive = alive & (left > step)
        all_alive = step < min(counts)
        if options.stops:
            alive = alive & ~torch.isin(token, stop)
            num_alive = int(alive.sum()) if step % read_every == 0 else None
            if num_alive == 0:
                break
            all_alive = num_alive == len(counts)
        now = None if all_alive else alive.long()
        logits, memories, states = read(
            model, token[:, None], xl_memories=memories, states=states, lengths=now, overwrite=True
        )
    return memories, states, left


def read(model: BlockRecurrentTransformer, tokens: Tensor, **options: Any) -> tuple[Tensor, Memories, States]:
    """A call without gradients and without dropout, which leaves the model and its mode alone."""
    with torch.no_grad():
        return model(tokens, use_dropout=False, **options)  # type: ignore[no-any-return]


def longest(new: Tensor, counts: Tensor, stops: tuple[int, ...]) -> int:
    """How many tokens the longest row has, of new (b, n), counts (b,): the first stop token is the last one."""
    stopped = torch.isin(new, torch.tensor(stops, device=new.device))
    ends = torch.where(stopped.any(dim=1), stopped.int().argmax(dim=1) + 1, new.shape[1])
    return int(torch.minimum(ends, counts).max())


# ------------------------------------------------------------------------------------------------------------- prompts


def padded(
    name: str, prime: Prompts, lengths: Tensor | None, device: torch.device, num_tokens: int
) -> tuple[Tensor, Tensor | None]:
    """Prompts as (b, m), padded on the right, and their lengths (b,) if they may differ."""
    if isinstance(prime, list):
        if lengths is not None:
            raise ValueError(f"lengths goes with a padded {name}, not with a list of prompts")
        wrong = [row for row in prime if not isinstance(row, Tensor) or row.ndim != 1 or not len(row)]
        if wrong or not prime:
            shown = f"with {describe(wrong[0])}" if wrong else "[]"
            raise ValueError(f"{name} must be a list of 1-D tensors of at least one token each, not {shown}")
        lengths = torch.tensor([len(row) for row in prime], device=prime[0].device)
        prime = nn.utils.rnn.pad_sequence(prime, batch_first=True)
    prompt = check_ids(prime, name, device, num_tokens)
    if lengths is not None:
        if lengths.shape != prompt.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"lengths must be ({len(prompt)},) int, one per row of {name}, not {describe(lengths)}")
        if int(lengths.min()) < 1 or int(lengths.max()) > prompt.shape[1]:
            raise ValueError(f"lengths={lengths.tolist()} must be from 1 to the {prompt.shape[1]} tokens of {name}")
    return prompt, lengths


def seen_tokens(num_tokens: int, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Which tokens of the vocabulary each row of (b, n) ids holds, (b, num_tokens) bool: a `previous` of `generate`.

    Joined with | these say what a row has seen in several pieces, in little memory however much it was.
    """
    seen = torch.zeros(len(tokens), num_tokens + 1, dtype=torch.bool, device=tokens.device)
    if lengths is not None:
        behind = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
        tokens = tokens.long().masked_fill(behind, num_tokens)
    return seen.scatter_(1, tokens.long(), True)[:, :-1].contiguous()


def seen_before(previous: Prompts, batch: int, device: torch.device, num_tokens: int) -> Tensor:
    """`previous`, in any of its forms, as (b, num_tokens) bool."""
    if len(previous) != batch:
        raise ValueError(f"previous holds {len(previous)} rows, prime has {batch}")
    if isinstance(previous, Tensor) and previous.dtype == torch.bool:
        if previous.shape != (batch, num_tokens) or previous.device != device:
            raise ValueError(
                f"previous must be ({batch}, num_tokens={num_tokens}) bool on {device}, not {describe(previous)} "
                f"on {previous.device}"
            )
        return previous
    return seen_tokens(num_tokens, *padded("previous", previous, None, device, num_tokens))
