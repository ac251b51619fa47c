"""Trains a Block-Recurrent Transformer on any text, and goes on exactly where it was stopped.

    python train.py                              # a first model: minutes on a CPU, enwik8's settings on a GPU
    python train.py --data my_texts/ --preset enwik8 --steps 20000 --out runs/mine
    python train.py --resume runs/mine           # after Ctrl-C, a crash or a kill: the same run, to the last bit
    torchrun --nproc-per-node 8 train.py --preset paper-150m --accumulate 1

A step reads the next segment (or several) of every row of the batch, each row its own document, and the memories and
states after it are carried to the next step. All rows of a step count as one batch, whatever the number of processes
and of `--accumulate`: the loss is the sum over the step's targets divided by their number.

What a run leaves in its folder:

    config.json       all options, the git commit, versions         checkpoints/   to go on from: the last and the best
    metrics.jsonl     one object a step: step, loss, ...            curve.png      the learning curve, with matplotlib
    timing.jsonl      seconds and tokens/s of the steps             tensorboard/   with tensorboard
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin are many times slower on a shared machine

import numpy as np
import torch
from beartype.roar import BeartypeCallHintViolation
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Config,
    Memories,
    States,
    checkpoint,
    data,
    detach,
    distributed,
    flags,
    forget_rows,
    metrics,
    optim,
    replay,
    runs,
)
from block_recurrent_transformer_pytorch.distributed import Processes, to_device
from block_recurrent_transformer_pytorch.files import written_at_once
from block_recurrent_transformer_pytorch.flags import DEVICES, PRESETS, natural, not_negative, positive, setting
from block_recurrent_transformer_pytorch.footprint import footprint

LONGEST_SKIP = 100  # steps without a finite gradient, one behind the other, that end a run

# ---------------------------------------------------------------------------------------------------------- 1 options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="train.py [options]", formatter_class=flags.HelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add_run_flags(parser.add_argument_group("the run"))
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model"))
    add_training_flags(parser.add_argument_group("training"))
    add_output_flags(parser.add_argument_group("what is measured and kept"))
    return parser


def add_run_flags(group: Any) -> None:
    add = group.add_argument
    add("--preset", choices=PRESETS, help="values for what is not given; default enwik8 on a GPU, else cpu")
    add("--config", metavar="FILE", help="a JSON object of options, named as here with _ for -, or the config.json of "
        "a run; it goes before the preset and behind the command line")  # fmt: skip
    add("--out", metavar="DIR", help="folder of the run; default runs/PRESET-DATE")
    add("--resume", metavar="DIR", nargs="?", const="", help="go on with the run in this folder (or in --out) from its "
        "last intact checkpoint, with its options; those given here replace them")  # fmt: skip
    add("--steps", type=positive, default=1000, help="optimizer steps of the whole run")
    add("--seed", type=natural, default=0, help="of weights, order of documents, dropout and samples")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="what computes; on a GPU every process takes its own")
    add("--threads", type=positive, help="threads of each process on the CPU; default torch's choice")
    add("--dry-run", action="store_true", help="print sizes, tokens and memory, and train nothing")


def add_data_flags(group: Any) -> None:
    add = group.add_argument
    add("--data", default="auto", help="a file, a folder, a glob pattern (a file is a document), a .jsonl file (a line "
        "is one), enwik8, stdlib (the Python standard library's source), or auto: enwik8 if it is in data/ or can be "
        "downloaded, else stdlib")  # fmt: skip
    add("--text-field", default="text", help="the field of a JSONL line that holds the text")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json of the tokenizers library; default bytes")
    add("--cache", metavar="DIR", default="data/cache", help="where token ids are kept between runs")


def add_model_flags(group: Any) -> None:
    add = group.add_argument
    add("--dim", type=positive, default=512, help="width of the model")
    add("--depth", type=positive, default=6, help="layers")
    add("--heads", type=positive, default=8, help="query heads")
    add("--dim-head", type=positive, default=64, help="width of a head")
    add("--block", type=positive, default=512, help="tokens of a block: the states change once a block")
    add("--states", type=positive, default=512, help="state vectors of a recurrent layer")
    add("--recurrent-layers", type=positive, nargs="+", metavar="N", help="layers, from 1, that have a state; default "
        "the one in the middle")  # fmt: skip
    add("--set", action="append", default=[], metavar="NAME=VALUE", type=setting, help="any other option of "
        "Config, as JSON: --set gate=lstm --set num_xl_blocks=2")  # fmt: skip


def add_training_flags(group: Any) -> None:
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--batch", type=positive, default=16, help="rows of a step, over all processes")
    add("--segment", type=positive, default=1024, help="tokens of a row that are read at once, whole blocks")
    add("--accumulate", type=positive, default=1, help="parts in which a process takes its rows, one behind the other, "
        "to save memory; the result is the same")  # fmt: skip
    add("--bptt", type=bptt, default=1, metavar="N|full|replay", help="segments that gradients go through; full: all "
        "of the step's; replay: all, at the memory of one and 4/3 of the time")  # fmt: skip
    add("--step-segments", type=positive, help="segments of every row that a step reads; default N of --bptt N, else 8")
    add("--optimizer", choices=("adamw", "adafactor"), default="adamw", help="adafactor: the authors'")
    add("--lr", type=not_negative, default=2e-4, help="highest learning rate; adafactor's is relative to the size of "
        "each parameter")  # fmt: skip
    add("--schedule", choices=("cosine", "linear", "rsqrt", "constant"), default="cosine", help="of the learning rate")
    add("--lr-end", type=not_negative, default=0.1, help="share of --lr that is left at the last step (cosine, linear)")
    add("--warmup", type=natural, default=100, help="steps of the linear rise, at most all steps")
    add("--betas", type=not_negative, nargs=2, default=[0.9, 0.99], help="of adamw")
    add("--weight-decay", type=not_negative, default=0.1, help="of adamw, on matrices; norms, gates, state ids and "
        "initial states do not decay")  # fmt: skip
    add("--clip", type=not_negative, default=1.0, help="largest norm of the gradient; 0: any")
    add("--memory-dropout", type=not_negative, default=0.0, help="chance that a row forgets its memories, a segment")
    add("--state-dropout", type=not_negative, default=0.0, help="chance that a row's states begin anew, a segment")
    add("--precision", choices=("auto", "fp64", "fp32", "bf16", "fp16"), default="auto", help="bf16 and fp16 by "
        "autocast; auto: bf16 where the processor multiplies it faster, else fp32")  # fmt: skip
    add("--checkpointing", action=switch, default=False, help="compute activations again instead of keeping them")
    add("--compile", action=switch, default=False, help="torch.compile the model")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun: every process holds all parameters "
        "(DDP), or a share of them (FSDP2)")  # fmt: skip
    add("--timeout", type=positive, default=50, help="seconds that a process waits for the others within a step; more "
        "for --compile")  # fmt: skip


def add_output_flags(group: Any) -> None:
    add = group.add_argument
    add("--valid-every", type=positive, default=500, help="steps between looks at the validation split")
    add("--valid-batches", type=positive, default=100, help="batches of one look")
    add("--final-batches", type=natural, default=0, help="batches of the look after the last step; 0: all")
    add("--checkpoint-every", type=positive, default=500, help="steps between checkpoints")
    add("--keep", type=positive, default=3, help="last checkpoints that are kept, beside the best")
    add("--sample", type=natural, default=400, help="tokens to write at the end; 0: none")


def bptt(text: str) -> int | str:
    return text if text in ("full", "replay") else positive(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options: defaults, then the preset's, a config file's, those of the run resumed, the command line's."""
    parser = make_parser()
    options = flags.parse(parser, argv)
    check(options, parser)
    return options


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What flags have to do with each other, and choices that depend on the machine."""
    if options.step_segments is None:
        options.step_segments = options.bptt if isinstance(options.bptt, int) else 8
    if isinstance(options.bptt, int) and options.step_segments % options.bptt:
        parser.error(f"--step-segments {options.step_segments} is not a multiple of --bptt {options.bptt}")
    parts = int(os.environ.get("WORLD_SIZE", "1")) * options.accumulate
    if options.batch % parts:
        parser.error(f"--batch {options.batch} cannot be divided into --accumulate {options.accumulate} parts of "
                     f"each of {parts // options.accumulate} processes")  # fmt: skip
    if options.segment % options.block:
        parser.error(f"--segment {options.segment} is not a multiple of --block {options.block}")
    for name in ("memory_dropout", "state_dropout", "lr_end"):
        if getattr(options, name) > 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} is above 1")
    if max(options.betas) >= 1:
        parser.error(f"--betas {options.betas} must be below 1")
    if options.optimizer == "adafactor" and options.parallel == "fsdp" and "WORLD_SIZE" in os.environ:
        parser.error("--optimizer adafactor needs whole parameters, --parallel fsdp splits them: use adamw, or ddp")
    if options.precision == "auto":
        options.precision = "bf16" if optim.multiplies_bf16(options.device) else "fp32"
    if wrong := sorted(flags.SET_BY_FLAGS & set(options.set)):
        parser.error(f"--set {wrong[0]}: there is a flag for this, or it follows from the data")
    try:
        model_config(options, num_tokens=256)
    except ValueError as error:
        parser.error(str(error))


# ------------------------------------------------------------------------------------------------------------- 2 a run


@dataclass
class Run:
    """Everything that a step needs or changes."""

    options: argparse.Namespace
    processes: Processes
    folder: Path
    model: BlockRecurrentTransformer
    segments: Segments
    loss: nn.Module  # the segments, in DDP where there are several processes
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    train: data.Corpus
    valid: data.Corpus
    tokenizer: data.Tokenizer
    stream: data.DocumentStream
    generator: torch.Generator  # of the dropout of memories and states; the same in all processes
    scale: optim.LossScale
    carried: list[tuple[Memories | None, States | None]]  # for each part of the rows of this process
    step: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    skipped_now: int = 0  # those since the last finite one
    told: dict[str, Any] | None = None  # of the last step, as long as it is not validated and written to the log
    stop: list[tuple[int, float]] = field(default_factory=list)  # signals that came, and when

    @property
    def rows(self) -> int:
        """Rows of each part."""
        return int(self.options.batch // (self.processes.size * self.options.accumulate))

    @property
    def tokens_per_step(self) -> int:
        return int(self.options.batch * self.options.segment * self.options.step_segments)


def load_data(options: argparse.Namespace, processes: Processes) -> tuple[data.Corpus, data.Corpus, data.Tokenizer]:
    """Training and validation tokens. The first process downloads and tokenises, then the others read its files."""
    if options.data == "auto":
        options.data = processes.share(data.choose() if processes.is_first else "")
    tokenizer = data.FileTokenizer(options.tokenizer) if options.tokenizer else data.ByteTokenizer()
    corpora = read_data(options, processes, tokenizer) if processes.is_first else None
    processes.wait()
    corpora = corpora or read_data(options, processes, tokenizer)
    if options.batch > corpora[0].total_tokens:
        raise ValueError(f"--batch {options.batch} is more than the {corpora[0].total_tokens} training tokens")
    train, valid = (corpus.cut(options.batch) for corpus in corpora)
    return train, valid, tokenizer


def read_data(options: argparse.Namespace, processes: Processes, tokenizer: data.Tokenizer) -> list[data.Corpus]:
    source = data.load_source(options.data, text_field=options.text_field, progress=processes.is_first)
    name = f"stdlib of Python {platform.python_version()}" if options.data == "stdlib" else options.data
    processes.say(f"data: {name}: {source.describe()}")
    parts = data.split(source)
    return [data.build_corpus(part, tokenizer, options.cache, progress=processes.is_first) for part in parts[:2]]


def model_config(options: argparse.Namespace, num_tokens: int) -> Config:
    values = {
        "num_tokens": num_tokens, "dim": options.dim, "depth": options.depth, "heads": options.heads,
        "dim_head": options.dim_head, "block_width": options.block, "max_seq_len": options.segment,
        "num_state_vectors": options.states, "use_flash_attn": True, "use_checkpointing": options.checkpointing,
        "recurrent_layers": options.recurrent_layers,
    }  # fmt: skip
    try:
        return Config.from_dict({**values, **options.set})
    except BeartypeCallHintViolation as error:
        raise ValueError(f"--set: {str(error).partition('parameter ')[2] or error}") from error


def make_optimizer(options: argparse.Namespace, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if options.optimizer == "adafactor":
        return optim.Adafactor([{"params": group["params"]} for group in groups], lr=options.lr)
    return torch.optim.AdamW(groups, lr=options.lr, betas=tuple(options.betas))


def build(options: argparse.Namespace, processes: Processes, path: Path) -> Run:
    """A run at its beginning."""
    train, valid, tokenizer = load_data(options, processes)
    torch.manual_seed(options.seed)  # the same weights in all processes
    config = model_config(options, train.num_tokens)
    try:
        model = BlockRecurrentTransformer(config).to(processes.device, optim.weight_type(options.precision))
    except (RuntimeError, TypeError) as error:  # no memory, or a size beyond 64 bits
        sizes = f"--dim {options.dim} --depth {options.depth} --set {options.set}"
        raise ValueError(f"{sizes}: the model cannot be built: {str(error).splitlines()[0]}") from error
    if processes.size > 1 and options.parallel == "fsdp":
        distributed.shard(model, processes)
    segments = Segments(torch.compile(model) if options.compile else model)  # type: ignore[arg-type]
    loss: nn.Module = segments
    if processes.size > 1 and options.parallel == "ddp":
        loss = distributed.replicate(segments, model, gradient_depth(options) * options.segment)
    optimizer = make_optimizer(options, optim.parameter_groups(model, options.weight_decay))
    schedule = optim.schedule(options.schedule, base=options.lr, max_steps=options.steps, end=options.lr_end,
                              warmup=min(options.warmup, options.steps))  # fmt: skip
    stream = data.DocumentStream(train, batch=options.batch, segment=options.segment, seed=options.seed,
                                 rank=processes.rank, world=processes.size)  # fmt: skip
    generator = torch.Generator().manual_seed(options.seed)
    checkpoint.seed_everything(options.seed, 0, processes.rank)
    carried: list[tuple[Memories | None, States | None]] = [(None, None)] * options.accumulate
    return Run(options, processes, path, model, segments, loss, optimizer, schedule, train, valid, tokenizer, stream,
               generator, optim.LossScale(options.precision == "fp16"), carried)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ 3 a step


class Segment(NamedTuple):
    """The next segment of some rows."""

    x: Tensor  # (b, n + 1) token ids, padding is ignore_index
    count: int  # targets
    reset: Tensor | None  # (b,) rows in which a document begins, if any
    forget: Tensor | None  # (b,) rows that lose their memories, if any
    reset_states: Tensor  # (b,) rows whose states begin anew


class Segments(nn.Module):
    """The loss of consecutive segments as one graph: what DistributedDataParallel wraps.

    `reset_states` is always given, so that the initial states are always part of the graph and every process has a
    gradient for the same parameters.
    """

    def __init__(self, model: BlockRecurrentTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, segments: list[Segment], memories: Memories | None, states: States | None, cut: bool = True
    ) -> tuple[Tensor, Memories | None, States | None]:
        """The summed cross-entropy in nats, and memories and states after the last segment, with `cut` detached."""
        nats = []
        for part in segments:
            if memories is not None and part.forget is not None:
                memories = forget_rows(memories, part.forget)
            reset = None if memories is None else part.reset
            loss, memories, states = self.model(
                part.x, xl_memories=memories, states=states, reset=reset, reset_states=part.reset_states,
                return_loss=True,
            )  # fmt: skip
            nats.append(loss * part.count)
        if cut:
            memories, states = memories and detach(memories), states and detach(states)
        return torch.stack(nats).sum(), memories, states


def autocast(options: argparse.Namespace) -> AbstractContextManager[Any]:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(options.device, types[options.precision]) if options.precision in types else nullcontext()


def to_segments(run: Run, batches: list[data.Batch], drops: list[tuple[Tensor, Tensor]], part: slice) -> list[Segment]:
    """Some rows of the next segments, on the device.

    Whether any row begins a document decides the path of the model, so it is read here, on the CPU, and all processes
    have to agree: with FSDP they would wait for each other in different layers.
    """
    device, segments = run.processes.device, []
    asked = [float(rows[part].any()) for batch, (forget, _) in zip(batches, drops) for rows in (batch.reset, forget)]
    agreed = run.processes.sum(*asked)
    for batch, (forget, reset_states), resets, forgets in zip(batches, drops, agreed[::2], agreed[1::2]):
        mask = batch.targets_mask[part]
        x = batch.tokens[part].clone()
        x[:, 1:].masked_fill_(~mask, run.model.config.ignore_index)
        segments.append(Segment(
            x.to(device, non_blocking=True),
            int(mask.sum()),
            batch.reset[part].to(device) if resets else None,
            forget[part].to(device) if forgets else None,
            reset_states[part].to(device),
        ))  # fmt: skip
    return segments


def dropped(run: Run, rate: float) -> Tensor:
    """Which of this process' rows drop something, (b,) bool. Drawn for all rows, so that their number of processes does
    not matter."""
    if not rate:
        return torch.zeros(len(run.stream.rows), dtype=torch.bool)
    drawn = torch.rand(run.options.batch, generator=run.generator) < rate
    return drawn[run.stream.rows.start : run.stream.rows.stop]


def train_step(run: Run) -> dict[str, Any]:
    """Reads the step's segments, moves the parameters; returns what is told about it."""
    options, processes = run.options, run.processes
    batches = [next(run.stream) for _ in range(options.step_segments)]
    drops = [(dropped(run, options.memory_dropout), dropped(run, options.state_dropout)) for _ in batches]
    (targets,) = processes.sum(sum(int(batch.targets_mask.sum()) for batch in batches))
    num_bytes = sum(run.train.count_bytes(batch) for batch in batches)

    nats = torch.zeros((), dtype=torch.float64, device=processes.device)
    for part in range(options.accumulate):
        rows = slice(part * run.rows, (part + 1) * run.rows)
        segments = to_segments(run, batches, drops, rows)
        nats += backward(run, part, segments, run.scale.value * processes.size / targets)

    rate = run.schedule(run.step + 1)
    norm, finite = optim.step(run.optimizer, lr=rate, clip=options.clip, scale=run.scale)
    if not finite:
        begin_anew(run)
    run.skipped += not finite
    run.skipped_now = 0 if finite else run.skipped_now + 1
    run.step += 1
    total_nats, total_bytes = processes.sum(float(nats), num_bytes)
    return {
        "step": run.step,
        "loss": total_nats / targets,
        "bits_per_byte": data.bits_per_byte(total_nats, total_bytes),
        "targets": int(targets),
        "lr": rate,
        "grad_norm": norm if finite else None,
        "skipped": run.skipped,
        "epoch": run.stream.epoch,
    }


class Stopped(Exception):
    """A signal to stop came within a step or a validation."""


def leave_if_stopped(run: Run) -> None:
    """Between the segments of a step, and of a validation: a signal comes to each process at another moment."""
    if run.processes.sum(len(run.stop))[0]:
        raise Stopped


@contextmanager
def undone_if_stopped(run: Run) -> Iterator[None]:
    """A step that is left half-way leaves nothing behind: the run is as it was behind the step before."""
    stream, carried = run.stream.state_dict(), list(run.carried)
    generator, rest = run.generator.get_state(), replay.Random.now(run.processes.device)
    try:
        yield
    except Stopped:
        run.stream.load_state_dict(stream)
        run.carried = carried
        run.generator.set_state(generator)
        rest.restore()
        run.optimizer.zero_grad(set_to_none=True)
        release(run)
        raise


def backward(run: Run, part: int, segments: list[Segment], weight: float) -> Tensor:
    """Adds the gradients of `weight` times the loss of one part of the rows; returns their loss, summed, in nats."""
    last_part = part == run.options.accumulate - 1
    if run.options.bptt == "replay":
        return replayed(run, part, segments, weight, last_part)
    memories, states = run.carried[part]
    depth = gradient_depth(run.options)
    total = torch.zeros((), dtype=torch.float64, device=run.processes.device)
    for start in range(0, len(segments), depth):
        leave_if_stopped(run)
        is_last = last_part and start + depth >= len(segments)
        with distributed.exchanging(run.loss, run.model, is_last):
            with autocast(run.options):
                nats, memories, states = run.loss(segments[start : start + depth], memories, states)
            (nats * weight).backward()
        total += nats.detach()
    run.carried[part] = (memories, states)
    return total


def replayed(run: Run, part: int, segments: list[Segment], weight: float, is_last: bool) -> Tensor:
    """`backward` through all segments at the memory of one. DDP's own exchange expects one forward per backward pass,
    so gradients are averaged here."""

    def step(segment: Segment, memories: Memories | None, states: States | None) -> Any:
        leave_if_stopped(run)
        with autocast(run.options):
            return run.segments([segment], memories, states, cut=False)

    distributed.exchanging(run.model, run.model, is_last)
    nats, *carried = replay.replay_segments(step, segments, len(segments), run.carried[part],
                                            device=run.processes.device, scale=weight)  # fmt: skip
    run.carried[part] = (carried[0], carried[1])
    if is_last and isinstance(run.loss, DistributedDataParallel):
        distributed.average_gradients(run.model.parameters(), run.processes)
    return nats.double()


def gradient_depth(options: argparse.Namespace) -> int:
    """Segments that one graph holds."""
    if options.bptt == "replay":
        return 1
    return int(options.step_segments if options.bptt == "full" else options.bptt)


def begin_anew(run: Run) -> None:
    """Carried values that are not finite would spoil every later step: if any is, all rows lose theirs."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(run.carried) if isinstance(leaf, Tensor)]
    spoilt = not all(bool(tensor.isfinite().all()) for tensor in tensors)
    if run.processes.sum(spoilt)[0]:
        run.carried = [(None, None)] * run.options.accumulate


# ------------------------------------------------------------------------------------------- 4 validation and a sample


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """Without gradients and dropout. The random numbers of training are left as they are."""
    run.model.eval()
    try:
        with torch.no_grad(), autocast(run.options):
            yield
    finally:
        run.model.train()
        release(run)


def release(run: Run) -> None:
    """FSDP keeps what a forward pass gathered for a backward pass: there is none."""
    if distributed.is_sharded(run.model):
        run.model.reshard()  # type: ignore[operator]


def validate(run: Run, num_batches: int | None) -> float:
    """Bits per byte of the validation split, or of its first batches, with carried memories."""
    processes, options = run.processes, run.options
    stream = data.DocumentStream(run.valid, batch=options.batch, segment=options.segment, shuffle=False, repeat=False,
                                 rank=processes.rank, world=processes.size)  # fmt: skip
    everything, nothing = slice(None), torch.zeros(len(stream.rows), dtype=torch.bool)
    nats, num_bytes = torch.zeros((), dtype=torch.float64, device=processes.device), 0.0
    memories = states = None
    with evaluating(run):
        for batch in islice(stream, num_batches):
            leave_if_stopped(run)
            segments = to_segments(run, [batch], [(nothing, nothing)], everything)
            summed, memories, states = run.segments(segments, memories, states)
            nats += summed
            num_bytes += run.valid.count_bytes(batch)
    return data.bits_per_byte(*processes.sum(float(nats), num_bytes))


def write_sample(run: Run) -> str:
    """The beginning of a validation document, and how the model goes on; to be called by all processes."""
    document = int(np.argmax(run.valid.lengths))
    start = run.valid.offsets[document]
    prompt = torch.tensor(run.valid.tokens[start : start + 64].astype(np.int64), device=run.processes.device)
    generator = torch.Generator(run.processes.device).manual_seed(run.options.seed)
    with evaluating(run):
        new = run.model.generate(prompt[None], max_new_tokens=run.options.sample, temperature=0.8, top_p=0.95,
                                 generator=generator)  # fmt: skip
    texts = [run.tokenizer.decode(tokens.tolist()) for tokens in (prompt, new[0])]
    return f"--- sample (after >>>) ---\n{texts[0]}>>>{texts[1]}\n---"


# --------------------------------------------------------------------------------------------- 5 the folder of the run


def write_config(run: Run) -> None:
    content = {
        "options": {**vars(run.options), "out": None, "resume": None, "config": None, "dry_run": None, "device": None},
        "model": asdict(run.model.config),
        "commit": runs.commit(Path(__file__).resolve().parent),
        "versions": runs.versions(),
        "processes": run.processes.size,
        "threads": torch.get_num_threads(),
        "corpus": {"train": run.train.fingerprint, "valid": run.valid.fingerprint},
    }  # fmt: skip
    with written_at_once(run.folder / "config.json") as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


# ------------------------------------------------------------------------------------------------------- 6 checkpoints


def metadata_of(run: Run) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, in the first process."""
    return {
        "stream": run.stream.state_dict(),
        "rng": run.processes.gather(checkpoint.rng_state({"memory": run.generator})),
        "loss_scale": [run.scale.value, run.scale.streak],
        "skipped": [run.skipped, run.skipped_now],
        "told": run.told,
        "optimizer": run.options.optimizer,
        "model_config": asdict(run.model.config),
        "versions": runs.versions(),
    }


def save(run: Run, metric: float | None, *, amend: bool = False) -> bool:
    """Writes a checkpoint; False if the disk did not take it, and the ones before are as they were.

    With `amend` only what the validation added to the checkpoint of this step, which a signal had stopped.
    """
    processes, path, written = run.processes, run.folder / "checkpoints", True
    own = [to_device(part, "cpu") for part in run.carried]
    trees = {
        "model": distributed.full_state(run.model, processes),
        "optimizer": distributed.optimizer_state(dict(run.model.named_parameters()), run.optimizer, processes),
        "carried": [part for parts in processes.gather(own) for part in parts],
    }
    beside: dict[str, Any] = {"metadata": metadata_of(run), "step": run.step, "metric": metric}
    if processes.is_first:
        try:
            if amend:
                checkpoint.amend(path, **beside)
            else:
                checkpoint.save(path, tensors=trees, keep=run.options.keep, **beside)
        except OSError as error:
            processes.say(f"the checkpoint of step {run.step} could not be written: {error}")
            written = False
    return processes.share(written)


def restore(run: Run) -> None:
    """Goes on from the last checkpoint that can be used, on any number of processes; without one, at step 0.

    What is read may be damaged or forged: all of it is looked at before anything of the run changes.
    """
    options, processes, path = run.options, run.processes, run.folder / "checkpoints"
    try:
        saved = checkpoint.load_latest(path, types=distributed.CARRIED_TYPES, check=lambda saved: verify(run, saved))
    except FileNotFoundError:
        processes.say(f"{run.folder} holds no checkpoint yet: starting from the beginning")
        return
    processes.wait()  # until all have read
    if processes.is_first:
        checkpoint.forget_after(path, saved.step)
    for reason in saved.skipped:
        processes.say(f"passed over a damaged checkpoint: {reason}")
    take_over(run, saved)
    processes.say(f"going on after step {run.step} of {options.steps}, from {saved.path}")


def verify(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Raises a ValueError that says why the run cannot go on from a checkpoint, if it cannot."""
    try:
        check_metadata(run, saved)
        check_options(run, saved)
        distributed.check_full_state(run.model, saved.tensors["model"])
        expected = optim.state_after_a_step(
            lambda parameters: make_optimizer(run.options, [{"params": parameters}]), dict(run.model.named_parameters())
        )
        distributed.check_optimizer_state(expected, saved.tensors["optimizer"], saved.step)
        parts = run.processes.size * run.options.accumulate
        distributed.check_parts(saved.tensors["carried"], run.model, run.options.batch, parts)
        copy(run.stream).load_state_dict(saved.metadata["stream"])
    except ValueError:
        raise
    except (ArithmeticError, AttributeError, BeartypeCallHintViolation, LookupError, RuntimeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"it is not as train.py writes it: {type(error).__name__}: {text}") from error


def check_metadata(run: Run, saved: checkpoint.Checkpoint) -> None:
    """The types and ranges of what a checkpoint holds beside tensors."""
    metadata = saved.metadata
    kinds = {"stream": dict, "rng": list, "loss_scale": list, "skipped": list, "optimizer": str, "model_config": dict}
    for name, kind in kinds.items():
        if type(metadata.get(name)) is not kind or not metadata[name]:
            raise ValueError(f"{name} is {str(metadata.get(name))[:80]}, no {kind.__name__} that train.py writes")
    match metadata["loss_scale"], metadata["skipped"]:
        case [float(value), int(streak)], [int(skipped), int(now)] if (
            1 <= value < math.inf and streak >= 0 and 0 <= now <= skipped <= saved.step
        ):
            pass
        case found:
            raise ValueError(f"loss_scale and skipped are {str(found)[:80]}")
    metrics.check(metadata.get("told"), saved.step)
    for state in metadata["rng"]:
        checkpoint.read_rng_state(state, {"memory": run.generator})


def check_options(run: Run, saved: checkpoint.Checkpoint) -> None:
    """The options that a run cannot change when it goes on."""
    options, stream, metadata = run.options, run.stream.state_dict(), saved.metadata
    config, was = run.model.config, metadata["model_config"]
    if was.get("depth") != config.depth or Config.from_dict(was).fingerprint != config.fingerprint:
        other = [f"{name}={now} instead of {was.get(name)}" for name, now in asdict(config).items()
                 if was.get(name, now) != now]  # fmt: skip
        raise ValueError(f"its model has other sizes or options than those given now: {', '.join(other)[:200]}")
    own = {"batch": options.batch, "segment": options.segment, "seed": options.seed, "optimizer": options.optimizer}
    for name, now in own.items():
        was = metadata["optimizer"] if name == "optimizer" else metadata["stream"].get(name)
        if was != now:
            raise ValueError(f"--{name} {now}: the run in {run.folder} has {was}")
    if metadata["stream"].get("corpus") != stream["corpus"]:
        raise ValueError(f"--data {options.data}: the run in {run.folder} reads another text, or its files have "
                         "changed since")  # fmt: skip
    was, dtype = saved.tensors["model"]["token_emb.weight"].dtype, run.model.token_emb.weight.dtype
    if was != dtype:
        raise ValueError(f"--precision {options.precision} keeps weights in {dtype}, the run in {run.folder} in {was}")


def take_over(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Everything that `save` wrote, after `verify`."""
    processes, metadata = run.processes, saved.metadata
    distributed.load_full_state(run.model, saved.tensors["model"])
    names = dict(run.model.named_parameters())
    distributed.load_optimizer_state(names, run.optimizer, saved.tensors["optimizer"])
    run.stream.load_state_dict(metadata["stream"])
    share, size = run.options.accumulate, processes.size
    parts = distributed.deal(saved.tensors["carried"], run.options.batch, share * size)
    run.carried = to_device(parts[processes.rank * share : (processes.rank + 1) * share], processes.device)
    run.scale.value, run.scale.streak = metadata["loss_scale"]
    run.skipped, run.skipped_now = metadata["skipped"]
    run.step, run.told = saved.step, metadata.get("told")
    generators = metadata["rng"]
    if len(generators) == processes.size:
        checkpoint.set_rng_state(generators[processes.rank], {"memory": run.generator})
    else:
        checkpoint.set_rng_state(generators[0], {"memory": run.generator})
        checkpoint.seed_everything(run.options.seed, run.step, processes.rank)
        processes.say(f"saved by {len(generators)} processes, going on with {processes.size}: rows are dealt anew")


# ------------------------------------------------------------------------------------------------------- 7 the run


def train(options: argparse.Namespace, processes: Processes) -> int:
    """A run from its beginning, or from where it was stopped, to its end; returns the exit status."""
    path = runs.make_folder(options.out, options.preset, options.resume, processes)
    with runs.locked(path, processes):
        run = build(options, processes, path)
        if options.resume:
            restore(run)
        if processes.is_first:
            write_config(run)
            (path / "checkpoints").mkdir(exist_ok=True)
        describe(run)
        log = metrics.Log(path, after_step=run.step - bool(run.told), enabled=processes.is_first)
        with listening(run), closing(log):
            complete = loop(run, log)
        if not complete:
            return 128 + (run.stop[0][0] if run.stop else signal.SIGINT)
        finish(run)
    return 0


def loop(run: Run, log: metrics.Log) -> bool:
    """Steps until the last one; False if a signal came before."""
    options, valid, saved, seconds = run.options, None, run.step, math.nan
    pause = 0.5 if sys.stderr.isatty() else 15
    bar = tqdm(total=options.steps, initial=run.step - bool(run.told), unit="step", mininterval=pause,
               disable=not run.processes.is_first)  # fmt: skip
    with bar, suppress(Stopped):
        while run.told or run.step < options.steps:
            if not run.told:
                began = time.perf_counter()
                with undone_if_stopped(run):
                    run.told = train_step(run)
                seconds = time.perf_counter() - began
            valid = look(run)
            told, run.told = run.told, None
            log.write(told if valid is None else {**told, "valid_bits_per_byte": valid}, seconds)
            metrics.show(bar, told, seconds)
            if run.step == saved or run.step % options.checkpoint_every == 0:
                log.sync()
                saved = run.step if save(run, valid, amend=run.step == saved) else saved
            if run.skipped_now >= LONGEST_SKIP:
                rate = f"lower --lr {options.lr}?"
                raise FloatingPointError(f"{LONGEST_SKIP} steps in a row had no finite gradient: {rate}")
    if saved < run.step:
        log.sync()
        if not save(run, None if run.told else valid):
            raise OSError(f"the last checkpoint is not written; with more room: {resume_command(run)}")
    complete = run.step >= options.steps and not run.told
    if not complete:
        run.processes.say(f"stopped after step {run.step} of {options.steps}; to go on: {resume_command(run)}")
    return complete


def look(run: Run) -> float | None:
    """Bits per byte of the validation split, if this is a step for it."""
    options, is_last = run.options, run.step == run.options.steps
    if not is_last and run.step % options.valid_every:
        return None
    valid = validate(run, options.final_batches or None if is_last else options.valid_batches)
    run.processes.say(f"step {run.step}: validation {valid:.4f} bits per byte")
    return valid


@contextmanager
def listening(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the run; once more, and it ends at once, without a checkpoint.

    Within a second they count as one: a scheduler signals all processes, and torchrun passes on what it gets.
    """

    def stop(number: int, frame: Any) -> None:
        run.stop.append((number, time.monotonic()))
        if run.stop[-1][1] - run.stop[0][1] > 1:
            raise KeyboardInterrupt
        if len(run.stop) == 1 and run.processes.is_first:  # print may be at work, and takes no second call
            os.write(2, b"\nstopping (once more: at once)\n")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_command(run: Run) -> str:
    start = f"torchrun --nproc-per-node {run.processes.size} " if run.processes.size > 1 else "python "
    return f"{start}{Path(sys.argv[0]).name} --resume {shlex.quote(str(run.folder))}"


def describe(run: Run) -> None:
    options, processes = run.options, run.processes
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    processes.say(f"model: {parameters:,} parameters; {run.train.total_tokens:,} training tokens, "
        f"{run.valid.total_tokens:,} for validation; {run.tokens_per_step:,} a step")  # fmt: skip
    parallel = f", {processes.size} processes ({options.parallel})" if processes.size > 1 else ""
    processes.say(f"preset {options.preset}: {options.steps} steps, {options.precision} on {processes.device}"
        f"{parallel}, into {run.folder}; Ctrl-C stops it and it can go on later")  # fmt: skip
    if parallel and options.parallel == "fsdp" and (tied := max(map(len, run.model.stages))) > 1:
        processes.say(f"note: {tied} layers go through a segment together, block by block: FSDP gathers each of them "
            "once a block, --parallel ddp does not")  # fmt: skip


def finish(run: Run) -> None:
    """A sample, the learning curve, and the last line."""
    if run.options.sample:
        run.processes.say(write_sample(run))
    if not run.processes.is_first:
        return
    metrics.draw_curve(run.folder)
    valid = metrics.last(run.folder, "valid_bits_per_byte")
    skipped = f", {run.skipped} steps skipped" if run.skipped else ""
    epochs = run.step * run.tokens_per_step / run.train.total_tokens
    run.processes.say(f"done: {run.step} steps, {epochs:.2f} epochs{skipped}; {run.folder}")
    run.processes.say(f"validation: {valid:.4f} bits per byte")


def dry_run(options: argparse.Namespace, processes: Processes) -> int:
    """Prints what a run would be: sizes, parameters, tokens, memory."""
    train, valid, _ = load_data(options, processes)
    config = model_config(options, train.num_tokens)
    rows, dtype = options.batch // (processes.size * options.accumulate), optim.weight_type(options.precision)
    with autocast(options):
        parameters, activations, carried = footprint(config, rows, options.segment, options.device, dtype)
    tokens = options.batch * options.segment * options.step_segments
    share = processes.size if options.parallel == "fsdp" else 1
    kept = options.accumulate + (options.step_segments if options.bptt == "replay" else 0)  # memories and states
    copies = 3 if options.optimizer == "adamw" else 2  # gradient and averages
    lines = {
        "model": json.dumps(asdict(config)),
        "parameters": f"{parameters:,}",
        "tokens": f"{train.total_tokens:,} for training, {valid.total_tokens:,} for validation",
        "a step": f"{tokens:,} tokens: {options.batch} rows, {options.step_segments} segments of {options.segment}",
        "a run": f"{options.steps:,} steps, {options.steps * tokens:,} tokens, "
                 f"{options.steps * tokens / train.total_tokens:.2f} epochs",
    }  # fmt: skip
    memory = {
        "weights": parameters * dtype.itemsize / share,
        "gradients and optimizer": copies * parameters * dtype.itemsize / share,
        f"activations, in {options.precision}, for {rows} rows": gradient_depth(options) * activations,
        "what is carried": kept * carried,
    }
    lines |= {f"memory of {name}": f"{count / 2**20:,.1f} MiB" for name, count in memory.items()}
    processes.say("\n".join(f"{name}: {text}" for name, text in lines.items()))
    return 0


def main(argv: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    processes = None
    try:
        with distributed.start(options.device, timeout=options.timeout) as processes:
            return dry_run(options, processes) if options.dry_run else train(options, processes)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        status = 2 if isinstance(error, (ValueError, ImportError)) else 1
    except KeyboardInterrupt:
        print("train.py: stopped at once; --resume goes on from the last checkpoint", file=sys.stderr, flush=True)
        status = 130
    except RuntimeError as error:
        if processes is None or processes.size == 1:
            raise
        print(f"train.py: process {processes.rank} of {processes.size} ends: {error}\nIf another process died, its own "
              "message is nearby; --resume goes on from the last checkpoint.", file=sys.stderr, flush=True)  # fmt: skip
        status = 1
    if processes is not None and processes.size > 1:
        os._exit(status)  # an orderly exit would wait for the other processes
    return status


if __name__ == "__main__":
    sys.exit(main())
