"""Trains a Block-Recurrent Transformer on any text, and goes on exactly where it was stopped.

    python train.py                              # a first model: minutes on a CPU, enwik8's settings on a GPU
    python train.py --data my_texts/ --preset enwik8 --steps 20000 --out runs/mine
    python train.py --resume runs/mine           # after Ctrl-C, a crash or a kill: the same run, to the last bit
    python train.py --init runs/mine --data other_texts/ --lr 1e-4          # fine-tuning: its weights, a new run
    python train.py --init SmolLM2-135M/ --lora-rank 8 --data my_texts/     # of a pretrained Llama, too
    torchrun --nproc-per-node 8 train.py --preset paper-150m --accumulate 1

A step reads the next segment (or several) of every row of the batch, each row its own document, and the memories and
states after it are carried to the next step. All rows of a step count as one batch, whatever the number of processes
and of `--accumulate`: the loss is the sum over the step's targets divided by their number.

What a run leaves in its folder:

    config.json       all options, the git commit, versions         checkpoints/   to go on from: the last and the best
    metrics.jsonl     one object a step: step, loss, ...            curve.png      the learning curve, with matplotlib
    timing.jsonl      seconds and tokens/s of the steps             sample.txt     what the model writes
    tensorboard/      with tensorboard                              tokenizer.json  if it reads no bytes
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin are many times slower on a shared machine

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Memories,
    RecurrentTrainWrapper,
    States,
    carried_files,
    checkpoint,
    data,
    detach,
    distributed,
    optim,
    planning,
    replay,
    runs,
    texts,
    tuning,
)
from block_recurrent_transformer_pytorch.distributed import Processes, to_device
from block_recurrent_transformer_pytorch.files import written_at_once
from block_recurrent_transformer_pytorch.flags import gradient_depth, parse
from block_recurrent_transformer_pytorch.metrics import Log, draw_curve, show

LONGEST_SKIP = 100  # steps without a finite gradient, in a row, that end a run
MANY_EPOCHS = 50  # from which on there is a warning

# ------------------------------------------------------------------------------------------------------------- 1 a run


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
    sample: data.Corpus  # of the validation text: what is measured while training
    final: data.Corpus  # of it, or all of it: what is measured at the end
    tokenizer: data.Tokenizer
    rows: range  # those of this process, of all rows of a batch
    batches: data.ReadAhead
    generator: torch.Generator  # of the dropout of memories and states; the same in all processes
    scale: optim.LossScale
    carried: list[tuple[Memories | None, States | None]]  # for each part of the rows of this process
    step: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    skipped_now: int = 0  # those since the last finite one
    saved: int = 0  # step of the last checkpoint
    validated: int = 0  # step of the last validation
    unlogged: dict[str, Any] | None = None  # what version 1.0.0 kept of a step whose validation was stopped
    signals: list[tuple[int, float]] = field(default_factory=list)  # that came to this process, and when
    stopping: bool = False  # whether one came to any process, as all of them know

    @property
    def wrapper(self) -> RecurrentTrainWrapper:
        return self.segments.wrapper

    @property
    def tokens_per_step(self) -> int:
        return int(self.options.batch * self.options.segment * self.options.step_segments)


def build(options: argparse.Namespace, processes: Processes, path: Path, *, has_begun: bool) -> Run:
    """A run at its beginning; one that `has_begun` is then restored."""
    train, valid, tokenizer = texts.load(options, processes)
    torch.manual_seed(options.seed)  # the same weights in all processes
    model = tuning.build_model(options, processes, train.num_tokens, has_begun=has_begun)
    generator = torch.Generator().manual_seed(options.seed)
    segments = Segments(torch.compile(model) if options.compile else model, options, generator)  # type: ignore[arg-type]
    loss: nn.Module = segments
    if processes.size > 1 and options.parallel == "ddp":
        loss = distributed.replicate(segments, model, unused=bool(segments.wrapper.untrained()))
    groups = optim.parameter_groups(model, options.weight_decay)
    optimizer = optim.make(options.optimizer, groups, lr=options.lr, betas=options.betas)
    schedule = optim.schedule(options.schedule, base=options.lr, max_steps=options.steps, end=options.lr_end,
                              warmup=min(options.warmup, options.steps))  # fmt: skip
    stream = data.DocumentStream(train, batch=options.batch, segment=options.segment, seed=options.seed,
                                 rank=processes.rank, world=processes.size)  # fmt: skip
    reader = data.ReadAhead(stream, options.step_segments, pin=processes.device.type == "cuda")
    sample, final = (valid if not batches else valid.spread(options.batch, batches * options.segment)
                     for batches in (options.valid_batches, options.final_batches))  # fmt: skip
    carried: list[tuple[Memories | None, States | None]] = [(None, None)] * options.accumulate
    checkpoint.seed_everything(options.seed, 0, processes.rank)
    scale = optim.LossScale(options.precision == "fp16")
    return Run(options, processes, path, model, segments, loss, optimizer, schedule, train, valid, sample, final,
               tokenizer, stream.rows, reader, generator, scale, carried)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ 2 a step


class Segment(NamedTuple):
    """The next segment of some rows."""

    x: Tensor  # (b, n + 1) token ids, padding is ignore_index
    reset: Tensor | None  # (b,) rows in which a document begins, if any
    forget: Tensor | None  # (b,) rows that lose their memories, if any
    reset_states: Tensor  # (b,) rows whose states begin anew


class Segments(nn.Module):
    """The loss of consecutive segments as one graph: what DistributedDataParallel wraps.

    `reset_states` is always given, so that the initial states are always part of the graph and every process has a
    gradient for the same parameters.
    """

    def __init__(
        self, model: BlockRecurrentTransformer, options: argparse.Namespace, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.resets_every_block = options.reset_states_every_block
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what gets no gradient: `describe` says it in other words
            self.wrapper = RecurrentTrainWrapper(
                model, options.memory_dropout, options.state_dropout, generator=generator,
                auxiliary_losses=dict(options.auxiliary),
                seq_len=options.block if self.resets_every_block else gradient_depth(options) * options.segment,
            )  # fmt: skip

    def forward(
        self, segments: list[Segment], memories: Memories | None, states: States | None, cut: bool = True
    ) -> tuple[Tensor, Memories | None, States | None]:
        """The summed cross-entropy in nats, and memories and states after the last segment, with `cut` detached."""
        nats = []
        for segment in segments:
            reset, forget, reset_states = segment.reset if memories else None, segment.forget, segment.reset_states
            if self.resets_every_block:
                reset_states = torch.ones_like(reset_states)
            for x, count, _ in self.wrapper.parts(segment.x):  # one, or one for each block
                loss, memories, states = self.wrapper.step(x, memories, states, reset, (forget, reset_states))
                nats.append(loss * count)
                reset = forget = None
        if cut:
            memories, states = memories and detach(memories), states and detach(states)
        return torch.stack(nats).sum(), memories, states


def to_segments(
    run: Run, batches: list[data.Batch], resets: list[float], drops: list[tuple[Tensor | None, Tensor | None]],
    part: slice,
) -> list[Segment]:  # fmt: skip
    """Some rows of the next segments, on the device.

    Whether any row begins a document or forgets decides the path of the model, so all processes have to agree: with
    FSDP they would wait for each other in different layers.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(run.processes.device, non_blocking=True)

    def drop(rows: Tensor | None) -> Tensor | None:  # drawn for the rows of all processes
        return None if rows is None or not rows.any() else move(rows[run.rows.start : run.rows.stop][part])

    segments = []
    for batch, begins, (forget, reset_states) in zip(batches, resets, drops):
        x, mask, anew = move(batch.tokens[part]), move(batch.targets_mask[part]), drop(reset_states)
        segments.append(Segment(
            torch.cat([x[:, :1], x[:, 1:].masked_fill(~mask, run.model.config.ignore_index)], dim=1),
            move(batch.reset[part]) if begins else None,
            drop(forget),
            x.new_zeros(len(x), dtype=torch.bool) if anew is None else anew,
        ))  # fmt: skip
    return segments


def train_step(run: Run) -> dict[str, Any]:
    """Reads the step's segments, moves the parameters; returns what was measured."""
    options, processes = run.options, run.processes
    batches = next(run.batches)
    every_row = torch.empty(options.batch, 0)  # drawn for all, so that the number of processes does not matter
    drops = [run.wrapper.drops(every_row) for _ in batches]
    own_targets = sum(int(batch.targets_mask.sum()) for batch in batches)
    targets, *resets = processes.sum(own_targets, *(float(batch.reset.any()) for batch in batches))
    num_bytes, epoch = sum(run.train.count_bytes(batch) for batch in batches), run.batches.epoch

    nats = torch.zeros((), dtype=torch.float64, device=processes.device)
    rows = len(run.rows) // options.accumulate
    for part in range(options.accumulate):
        segments = to_segments(run, batches, resets, drops, slice(part * rows, (part + 1) * rows))
        nats += backward(run, part, segments, run.scale.value * processes.size / targets)
    run.batches.read()  # while a GPU still computes

    rate = run.schedule(run.step + 1)
    norm, finite = optim.step(run.optimizer, lr=rate, clip=options.clip, scale=run.scale)
    if not finite:
        begin_anew(run)
    run.skipped += not finite
    run.skipped_now = 0 if finite else run.skipped_now + 1
    run.step += 1
    total_nats, total_bytes, signals = processes.sum(float(nats), num_bytes, len(run.signals))
    run.stopping = signals > 0
    return {
        "step": run.step,
        "loss": total_nats / targets,
        "bits_per_byte": data.bits_per_byte(total_nats, total_bytes),
        "targets": int(targets),
        "lr": rate,
        "grad_norm": norm if finite else None,
        "skipped": run.skipped,
        "epoch": epoch,
    }


def backward(run: Run, part: int, segments: list[Segment], weight: float) -> Tensor:
    """Adds the gradients of `weight` times the loss of one part of the rows; returns their loss, summed, in nats."""
    last_part = part == run.options.accumulate - 1
    if run.options.bptt == "replay":
        return replayed(run, part, segments, weight, last_part)
    memories, states = run.carried[part]
    depth = gradient_depth(run.options)
    total = torch.zeros((), dtype=torch.float64, device=run.processes.device)
    for start in range(0, len(segments), depth):
        is_last = last_part and start + depth >= len(segments)
        with distributed.exchanging(run.loss, run.model, is_last):
            with autocast(run):
                nats, memories, states = run.loss(segments[start : start + depth], memories, states)
            (nats * weight).backward()
        total += nats.detach()
    run.carried[part] = (memories, states)
    return total


def replayed(run: Run, part: int, segments: list[Segment], weight: float, is_last: bool) -> Tensor:
    """`backward` through all segments at the memory of one. DDP's own exchange expects one forward per backward pass,
    so gradients are averaged here."""

    def step(segment: Segment, memories: Memories | None, states: States | None) -> Any:
        with autocast(run):
            return run.segments([segment], memories, states, cut=False)

    distributed.exchanging(run.model, run.model, is_last)
    nats, memories, states = replay.replay_segments(step, segments, len(segments), run.carried[part],
                                                    device=run.processes.device, scale=weight)  # fmt: skip
    run.carried[part] = (memories, states)
    if is_last and isinstance(run.loss, DistributedDataParallel):
        distributed.average_gradients(run.model.parameters(), run.processes)
    return nats.double()


def autocast(run: Run) -> AbstractContextManager[Any]:
    return optim.autocast(run.options.precision, run.processes.device.type)


def begin_anew(run: Run) -> None:
    """Carried values that are not finite would spoil every later step: if any is, all rows lose theirs."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(run.carried) if isinstance(leaf, Tensor)]
    spoilt = not all(bool(tensor.isfinite().all()) for tensor in tensors)
    if run.processes.sum(spoilt)[0]:
        run.carried = [(None, None)] * run.options.accumulate


# ------------------------------------------------------------------------------------------- 3 validation and a sample


class Stopped(Exception):
    """A signal to stop came, and all processes know of it."""


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """Without gradients and dropout. The random numbers of training are left as they are."""
    run.segments.eval()
    try:
        with torch.no_grad(), autocast(run):
            yield
    finally:
        run.segments.train()
        if distributed.is_sharded(run.model):  # FSDP keeps what a forward pass gathered for a backward pass
            run.model.reshard()  # type: ignore[operator]


def validate_if_due(run: Run, log: Log) -> None:
    """Measures bits per byte of the validation text, if this is a step for that and it has not been done yet.

    A run that is stopped here is as it was after its step, so it is saved, and goes on here.
    """
    is_last, say = run.step == run.options.steps, run.processes.say
    if run.step <= run.validated or not (is_last or run.step % run.options.valid_every == 0):
        return
    valid = measure(run, run.sample)
    values = {"valid_bits_per_byte": valid}
    say(f"step {run.step}: validation {valid:.4f} bits per byte, over {describe_part(run, run.sample)}")
    if is_last:
        is_same = run.final.fingerprint == run.sample.fingerprint
        values["final_bits_per_byte"] = final = valid if is_same else measure(run, run.final)
        if not is_same:
            say(f"final validation, another measure: {final:.4f} bits per byte, over {describe_part(run, run.final)}")
    if run.processes.is_first:
        try:
            checkpoint.set_metric(run.folder / "checkpoints", run.step, valid)
        except OSError as error:
            say(f"the checkpoint of step {run.step} could not be given its metric: {error}")
    log.add(run.step, **values)
    run.validated = run.step


def describe_part(run: Run, part: data.Corpus) -> str:
    if part is run.valid:
        return "the whole validation text"
    return f"{part.total_tokens:,} evenly spaced tokens of {run.valid.total_tokens:,}"


def measure(run: Run, corpus: data.Corpus) -> float:
    """Bits per byte of all documents, with memories and states carried as in training."""
    processes, options = run.processes, run.options
    stream = data.DocumentStream(corpus, batch=options.batch, segment=options.segment, shuffle=False, repeat=False,
                                 rank=processes.rank, world=processes.size)  # fmt: skip
    nats, num_bytes = torch.zeros((), dtype=torch.float64, device=processes.device), 0.0
    memories = states = None
    with evaluating(run):
        for batch in stream:
            *resets, signals = processes.sum(float(batch.reset.any()), len(run.signals))
            if signals:
                raise Stopped
            segments = to_segments(run, [batch], resets, [(None, None)], slice(None))
            summed, memories, states = run.segments(segments, memories, states)
            nats += summed
            num_bytes += corpus.count_bytes(batch)
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
    return f"{texts[0]}>>>{texts[1]}"


# ----------------------------------------------------------------------------------- 4 the folder of a run, checkpoints


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
    if isinstance(run.tokenizer, data.FileTokenizer):
        with written_at_once(run.folder / "tokenizer.json") as file:
            file.write(run.tokenizer.content)


def save(run: Run, log: Log) -> bool:
    """Writes a checkpoint; False if the disk did not take it, and the ones before are as they were."""
    processes, written = run.processes, True
    own = [to_device(part, "cpu") for part in run.carried]
    trees = {
        "model": distributed.full_state(run.model, processes),
        "optimizer": distributed.optimizer_state(dict(run.model.named_parameters()), run.optimizer, processes),
        "carried": [part for parts in processes.gather(own) for part in parts],
    }
    metadata = {
        "stream": run.batches.state_dict(),
        "rng": processes.gather(checkpoint.rng_state({"memory": run.generator})),
        "loss_scale": [run.scale.value, run.scale.streak],
        "skipped": [run.skipped, run.skipped_now],
        "optimizer": run.options.optimizer,
        "model_config": json.loads(json.dumps(asdict(run.model.config))),  # plain numbers and lists
        "versions": runs.versions(),
    }
    if processes.is_first:
        try:
            log.sync()
            checkpoint.save(run.folder / "checkpoints", tensors=trees, metadata=metadata, step=run.step,
                            keep=run.options.keep)  # fmt: skip
        except OSError as error:
            processes.say(f"the checkpoint of step {run.step} could not be written: {error}")
            written = False
    written = processes.share(written)
    run.saved = run.step if written else run.saved
    return written


def restore(run: Run) -> None:
    """Goes on from the last checkpoint that can be used, on any number of processes."""
    options, processes, path = run.options, run.processes, run.folder / "checkpoints"
    saved = checkpoint.load_latest(path, types=carried_files.TYPES, upgrade=distributed.upgrade,
                                   check=lambda saved: take_over(run, saved))  # fmt: skip
    processes.wait()  # until all have read
    if processes.is_first:
        checkpoint.forget_after(path, saved.step)
    for reason in saved.skipped:
        processes.say(f"passed over a damaged checkpoint: {reason}")
    processes.say(f"going on after step {run.step} of {options.steps}, from {saved.path}")


def take_over(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Everything that `save` wrote. A ValueError says why that cannot be; the checkpoint before may then be taken."""
    try:
        runs.check_options(run.options, run.folder, run.model, run.batches.state_dict(), saved)
        processes, metadata, tensors = run.processes, saved.metadata, saved.tensors
        distributed.load_full_state(run.model, tensors["model"])
        distributed.load_optimizer_state(dict(run.model.named_parameters()), run.optimizer, tensors["optimizer"])
        run.batches.load_state_dict(metadata["stream"])
        share, size = run.options.accumulate, processes.size
        parts = distributed.redistribute(tensors["carried"], run.options.batch, share * size)
        run.carried = to_device(parts[processes.rank * share : (processes.rank + 1) * share], processes.device)
        run.scale.value, run.scale.streak = metadata["loss_scale"]
        run.skipped, run.skipped_now = metadata["skipped"]
        run.step, run.saved, run.unlogged = saved.step, saved.step, metadata.get("told")
        generators = metadata["rng"]
        if len(generators) == size:
            checkpoint.set_rng_state(generators[processes.rank], {"memory": run.generator})
        else:
            checkpoint.set_rng_state(generators[0], {"memory": run.generator})
            checkpoint.seed_everything(run.options.seed, run.step, processes.rank)
            processes.say(f"saved by {len(generators)} processes, going on with {size}: rows are dealt anew")
    except ValueError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"it is not as train.py writes it: {type(error).__name__}: {text}") from error


# ------------------------------------------------------------------------------------------------------- 5 the run


def train(options: argparse.Namespace, processes: Processes) -> int:
    """A run from its beginning, or from where it was stopped, to its end; returns the exit status."""
    path = runs.make_folder(options.out, options.preset, options.resume, processes)
    with runs.locked(path, processes):
        has_begun = processes.share(options.resume and bool(checkpoint.checkpoints(path / "checkpoints")))
        run = build(options, processes, path, has_begun=has_begun)
        if has_begun:
            restore(run)
        elif options.resume:
            processes.say(f"{path} holds no checkpoint yet: starting from the beginning")
        if processes.is_first:
            write_config(run)
            (path / "checkpoints").mkdir(exist_ok=True)
        describe(run)
        log = Log(path, after_step=run.step, last_step=options.steps, enabled=processes.is_first)
        with runs.listening(run.signals, quiet=not processes.is_first), closing(log):
            complete = loop(run, log)
        if not complete:
            return 128 + (run.signals[0][0] if run.signals else signal.SIGINT)
        finish(run, log)
    return 0


def loop(run: Run, log: Log) -> bool:
    """Steps until the last one, each saved and then validated where that is due; False if a signal came before."""
    options, pause = run.options, 0.5 if sys.stderr.isatty() else 15
    if run.unlogged and log.line["step"] < run.step:
        log.write(run.unlogged, math.nan)
    figure = "final_bits_per_byte" if run.step == options.steps else "valid_bits_per_byte"
    run.validated = run.processes.share(log.line["step"] if figure in log.line else 0)
    quiet = not run.processes.is_first
    bar = tqdm(total=options.steps, initial=run.step, unit="step", mininterval=pause, disable=quiet)
    with bar, suppress(Stopped):
        if run.step:
            validate_if_due(run, log)  # where it was stopped
        while run.step < options.steps:
            began = time.perf_counter()
            metrics = train_step(run)
            seconds = time.perf_counter() - began
            log.write(metrics, seconds)
            show(bar, metrics, seconds)
            if run.step % options.checkpoint_every == 0 or run.step == options.steps:
                save(run, log)
            if run.stopping:
                raise Stopped
            validate_if_due(run, log)
            if run.skipped_now >= LONGEST_SKIP:
                rate = f"lower --lr {options.lr}?"
                raise FloatingPointError(f"{LONGEST_SKIP} steps in a row had no finite gradient: {rate}")
    if run.saved < run.step and not save(run, log):
        raise OSError(f"the last checkpoint is not written; with more room: {resume_command(run)}")
    complete = run.step >= options.steps and run.validated >= run.step
    if not complete:
        run.processes.say(f"stopped after step {run.step} of {options.steps}; to go on: {resume_command(run)}")
    return complete


def resume_command(run: Run) -> str:
    """As it was started: by the file train.py, or by the command that is installed."""
    script, module = Path(sys.argv[0]).name, "-m block_recurrent_transformer_pytorch.commands.train"
    is_file = script.endswith(".py")
    if run.processes.size > 1:
        start = f"torchrun --nproc-per-node {run.processes.size} {script if is_file else module}"
    else:
        start = f"python {script}" if is_file else script
    return f"{start} --resume {shlex.quote(str(run.folder))}"


def describe(run: Run) -> None:
    options, processes = run.options, run.processes
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    part = "" if trained == parameters else f", of which {trained:,} are trained"
    processes.say(f"model: {parameters:,} parameters{part}; {run.train.total_tokens:,} training tokens, "
        f"{run.valid.total_tokens:,} for validation; {run.tokens_per_step:,} a step")  # fmt: skip
    parallel = f", {processes.size} processes ({options.parallel})" if processes.size > 1 else ""
    processes.say(f"preset {options.preset}: {options.steps} steps, {options.precision} on {processes.device}"
        f"{parallel}, into {run.folder}; Ctrl-C stops it and it can go on later")  # fmt: skip
    epochs = options.steps * run.tokens_per_step / run.train.total_tokens
    if epochs > MANY_EPOCHS:
        processes.say(f"warning: {options.steps} steps read the {run.train.total_tokens:,} training tokens "
            f"{epochs:,.0f} times, so the model may learn them by heart: fewer --steps, or more text")  # fmt: skip
    if options.reset_states_every_block:
        processes.say("note: states return to their initial values at every block: this run is a control")
    elif run.wrapper.seq_len <= options.block and options.bptt != "replay" and run.model.config.recurrent_layers:
        processes.say(f"note: gradients go through one block (--segment {options.segment} --bptt {options.bptt}), and "
            "what is written into states is read in the next one: writing is not trained; --bptt 2?")  # fmt: skip
    if parallel and options.parallel == "fsdp" and (tied := max(map(len, run.model.groups))) > 1:
        processes.say(f"note: {tied} layers go through a segment together, block by block: FSDP gathers each of them "
            "once a block, --parallel ddp does not")  # fmt: skip


def finish(run: Run, log: Log) -> None:
    """A sample, the learning curve, and the last line."""
    say, options = run.processes.say, run.options
    if options.sample and options.reset_states_every_block:
        say("no sample.txt: it would be written with states carried, which this model never had")
    elif options.sample:
        sample = write_sample(run)
        say(f"--- sample (after >>>) ---\n{sample}\n---")
        if run.processes.is_first:
            (run.folder / "sample.txt").write_text(sample + "\n", encoding="utf-8", errors="surrogateescape")
    if not run.processes.is_first:
        return
    if (drawn := draw_curve(run.folder)) != "curve.png":
        say(drawn)
    skipped = f", {run.skipped} steps skipped" if run.skipped else ""
    epochs = run.step * run.tokens_per_step / run.train.total_tokens
    say(f"done: {run.step} steps, {epochs:.2f} epochs{skipped}; {run.folder}")
    final = log.line.get("final_bits_per_byte")
    say(f"validation: {math.nan if final is None else final:.4f} bits per byte, over {describe_part(run, run.final)}")


def plan(options: argparse.Namespace, processes: Processes) -> int:
    """Prints what a run would be, and trains nothing."""
    train, valid, _ = texts.load(options, processes)
    processes.say(planning.describe(options, processes.size, train, valid))
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
            return plan(options, processes) if options.dry_run else train(options, processes)
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
