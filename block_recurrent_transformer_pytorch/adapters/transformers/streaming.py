"""Training with transformers' Trainer on streams: memories and states go on from batch to batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from block_recurrent_transformer_pytorch import carried_files

from .modeling_block_recurrent_transformer import CACHE_NAME, BlockRecurrentCache

CARRIED = "carried.safetensors"


class StreamDataset(Dataset[dict[str, Tensor]]):
    """One long text as `rows` streams side by side, each cut into segments.

    Item i is segment i // rows of stream i % rows, so that a batch of `rows` items goes on where the last one ended.

    Args:
        tokens: (n,) ids.
        rows: the batch size of the Trainer, on its one device.
        seq_len: tokens of a segment.

    Raises:
        ValueError: fewer tokens than one segment in each row needs.
    """

    def __init__(self, tokens: Tensor, rows: int, seq_len: int) -> None:
        self.rows, self.seq_len = rows, seq_len
        self.segments = (len(tokens) - 1) // (rows * seq_len)
        if self.segments < 1:
            raise ValueError(f"tokens holds {len(tokens)}, {rows} rows of seq_len={seq_len} need {rows * seq_len + 1}")
        self.tokens = tokens.long()

    def __len__(self) -> int:
        return self.rows * self.segments

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, segment = index % self.rows, index // self.rows
        start = (row * self.segments + segment) * self.seq_len
        part = self.tokens[start : start + self.seq_len + 1]
        return {"input_ids": part[:-1], "shift_labels": part[1:], "reset": torch.tensor(segment == 0)}


class StreamTrainer(Trainer):
    """A Trainer that hands each batch what the one before it left, cuts gradients there, and keeps it in checkpoints.

    Datasets are those of `StreamDataset`, or others whose items are ordered likewise and hold input_ids, shift_labels
    and reset. A run that is resumed gives the same weights, to the bit, as one that was not interrupted.

    Raises:
        ValueError: several processes or devices, or a batch size that is not the dataset's `rows`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError("StreamTrainer runs in one process on one device; train.py trains on several")
        sizes = ((self.train_dataset, self.args.train_batch_size), (self.eval_dataset, self.args.eval_batch_size))
        for dataset, size in sizes:
            if isinstance(dataset, StreamDataset) and dataset.rows != size:
                raise ValueError(f"the dataset has rows={dataset.rows}, the batch size is {size}: they must be equal")
        self.args.dataloader_drop_last, self.args.remove_unused_columns = True, False
        self.label_names = ["shift_labels"]
        self.carried: dict[bool, BlockRecurrentCache] = {}  # in training, and in evaluation

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        cache = self.carried.get(model.training, BlockRecurrentCache())
        outputs = model(**inputs, **{CACHE_NAME: cache}, use_cache=True, num_items_in_batch=num_items_in_batch)
        self.carried[model.training] = outputs[CACHE_NAME].detach()
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.carried.pop(False, None)
        return super().evaluation_loop(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        cache = self.carried.get(True)
        if cache is not None and cache.memories is not None and cache.states is not None:
            core = self.accelerator.unwrap_model(self.model).core
            carried_files.save(Path(output_dir) / CARRIED, cache.memories, cache.states, core)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        core = self.accelerator.unwrap_model(self.model if model is None else model).core
        file = Path(resume_from_checkpoint) / CARRIED
        if not file.is_file():
            raise ValueError(f"{file} is missing: the checkpoint is not one of a StreamTrainer")
        self.carried = {True: BlockRecurrentCache(*carried_files.load(file, core, device=self.args.device))}
