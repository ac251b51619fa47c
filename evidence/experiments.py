"""What is measured: tasks, the models beside each other on each, seeds and distances."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from block_recurrent_transformer_pytorch import Config

from .tasks import Facts
from .training import Recipe

SEEDS = (0, 1, 2)
THOUSANDS = [512, 4096, 65536]
LONG = [*THOUSANDS, 262144]
MILLION = [*LONG, 1048576]


@dataclass(frozen=True)
class Arm:
    """A model, and what is different about it."""

    title: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    reset_states: bool = False  # in training and afterwards, at each block's start


OURS = Arm("token-gated writes, hard gate")
CONTROLS = {
    "none": Arm("no recurrent layer", {"recurrent_layers": ()}),
    "xl4": Arm("no recurrent layer, XL memory of 4 blocks", {"recurrent_layers": (), "num_xl_blocks": 4}),
    "reset": Arm("state reset every block, in training, too", reset_states=True),
    "soft": Arm("token-gated writes, soft gate", {"gate": "full", "gate_options": {}}),
    "skip-hard": Arm("ordinary cell, hard gate per state", {"state_update": "skip", "gate_options": {"per": "state"}}),
    "skip-hard-channel": Arm("ordinary cell, hard gate per channel", {"state_update": "skip"}),
    "skip-fixed": Arm("ordinary cell, fixed gate (the paper's)",
                      {"state_update": "skip", "gate": "fixed", "gate_options": {}}),
    "skip-lstm": Arm("ordinary cell, LSTM gate (the paper's)",
                     {"state_update": "skip", "gate": "lstm", "gate_options": {}}),
    "no-match": Arm("token-gated writes, without matching initial values", {"matching_init": False}),
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One task, and how it is learned and asked for."""

    title: str
    task: Facts
    states: int
    recipe: Recipe
    distances: list[int]
    controls: tuple[str, ...] = ()
    control_distances: list[int] = field(default_factory=lambda: THOUSANDS)
    far_controls: tuple[str, ...] = ("soft",)  # those that are asked as far away as ours
    seeds: tuple[int, ...] = SEEDS

    @property
    def arms(self) -> dict[str, Arm]:
        return {"token-gated": OURS} | {name: CONTROLS[name] for name in self.controls}

    def config(self, arm: Arm) -> Config:
        """Two layers of width 64, a state in the upper one, blocks of 32 tokens."""
        options: dict[str, Any] = {
            "num_tokens": self.task.num_tokens, "dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "ff_mult": 1,
            "block_width": 32, "max_seq_len": 512, "recurrent_layers": (2,), "num_state_vectors": self.states,
            "state_update": "token_gated", "gate": "hard", "gate_options": {"noise": 0.5}, "matching_init": True,
            "embedding_std": 0.3, "use_flash_attn": True,
        }  # fmt: skip
        return Config(**options | arm.options)


ALL = tuple(CONTROLS)
SIXTEEN = Facts(facts=16, overwritten=8, keys=32)
EXPERIMENTS = {
    "one-fact": Experiment("One fact, random filler", Facts(), 8, Recipe(600), MILLION, ALL),
    "16-facts": Experiment(
        "16 facts, 8 of them overwritten, `SET value key`", SIXTEEN, 32, Recipe(1500), LONG, ALL
    ),
    "16-facts-key-first": Experiment(
        "16 facts, 8 of them overwritten, `SET key value`", replace(SIXTEEN, order="key value"), 32, Recipe(1500), LONG,
        ("skip-hard", "soft", "no-match"),
    ),
    "32-facts": Experiment(
        "32 facts, 16 of them overwritten", Facts(facts=32, overwritten=16, keys=64), 64, Recipe(2000), LONG
    ),
    "one-fact-in-text": Experiment(
        "One fact in source code, unseen files", Facts(filler="text"), 8, Recipe(600), MILLION,
        ("none", "reset", "soft", "skip-hard", "skip-hard-channel"),
    ),
    "8-facts-in-text": Experiment(
        "8 facts, 4 of them overwritten, in source code", Facts(facts=8, overwritten=4, keys=16, filler="text"), 32,
        Recipe(1500), LONG, ("skip-hard", "soft"),
    ),
} | {
    f"capacity-{facts}-in-{states}": Experiment(
        f"{facts} facts, {facts // 2} overwritten, in {states} states",
        Facts(facts=facts, overwritten=facts // 2, keys=2 * facts), states, Recipe(1500), [4096], seeds=(0,),
    )
    for facts in (8, 16, 32) for states in (8, 16, 32, 64)
}  # fmt: skip
