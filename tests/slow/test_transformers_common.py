"""transformers' own tests of models, from its source distribution: TRANSFORMERS_SOURCE is where that is unpacked.

The source distribution lacks the modules of which `test_modeling_common` takes its mixins for generation and export;
empty ones stand in for them.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.slow
SOURCE = os.environ.get("TRANSFORMERS_SOURCE", "")
if not SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE names no source distribution of transformers", allow_module_level=True)
pytest.importorskip("parameterized", reason="needs the package parameterized")

from block_recurrent_transformer_pytorch.adapters import transformers as adapter  # noqa: E402

LAYERS = "wants layers of a class of transformers; test_transformers.py tests that gradients stay the same"
MISSING = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def import_common() -> Any:
    """tests/test_modeling_common.py as a module of a package of its own."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(Path(SOURCE) / "tests")]
    sys.modules[package.__name__] = package
    for name, mixin in MISSING.items():
        stub = types.ModuleType(f"transformers_tests.{name}")
        setattr(stub, mixin, type(mixin, (), {}))
        sys.modules[f"transformers_tests.{name.split('.')[0]}"] = types.ModuleType(name)
        sys.modules[stub.__name__] = stub
    return importlib.import_module("transformers_tests.test_modeling_common")


with warnings.catch_warnings():
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # its marks are not ours
    common = import_common()
common.MODEL_MAPPING_NAMES["block_recurrent_transformer"] = "BlockRecurrentModel"
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["block_recurrent_transformer"] = "BlockRecurrentForCausalLM"


class Tester:
    batch_size, seq_length, is_training, hidden_size, num_hidden_layers = 2, 4, True, 16, 2

    def get_config(self) -> Any:
        return adapter.BlockRecurrentConfig(
            vocab_size=99, dim=16, depth=2, dim_head=8, heads=2, block_width=4, max_seq_len=8
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = common.ids_tensor([2, 4], 99)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestBlockRecurrent(common.ModelTesterMixin, unittest.TestCase):  # type: ignore[misc, name-defined]
    all_model_classes = (adapter.BlockRecurrentModel, adapter.BlockRecurrentForCausalLM)
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = Tester()

    @unittest.skip("the mixin for generation is not in the source distribution: test_transformers.py tests generate")
    def test_generation_tester_mixin_inheritance(self) -> None: ...

    @unittest.skip(LAYERS)
    def test_gradient_checkpointing_enable_disable(self) -> None: ...

    @unittest.skip(LAYERS)
    def test_training_gradient_checkpointing(self) -> None: ...

    @unittest.skip(LAYERS)
    def test_training_gradient_checkpointing_use_reentrant_false(self) -> None: ...

    @unittest.skip(LAYERS)
    def test_training_gradient_checkpointing_use_reentrant_true(self) -> None: ...
