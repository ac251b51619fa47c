"""One thread (the tensors are tiny), the same hypothesis examples in every run, and what large models recompute in the
backward pass is recomputed in small ones, too.

`HYPOTHESIS_PROFILE=explore EXAMPLES=20 pytest tests/test_properties.py` draws new examples, 20 times as many.
"""

import os

import torch
from hypothesis import HealthCheck, settings

from block_recurrent_transformer_pytorch import kernels

torch.set_num_threads(1)
kernels.RECOMPUTED_FROM = 0

common = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", derandomize=True, database=None, **common)
settings.register_profile("explore", **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
