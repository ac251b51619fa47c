"""Who is measured: this library, the reference, and its peers, each doing the same work. Installed beside the project.

Nothing here ends up in the environment: packages go to `.reference/NAME`, which is put at the end of the search path.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, detach

from .measure import DEVICE, ROOT, Unavailable

PACKAGES = {  # folder: what pip installs there
    "reference": ["--no-deps", "block-recurrent-transformer-pytorch==0.4.4"],
    "x-transformers": ["--no-deps", "x-transformers==2.31.10", "torch-einops-utils", "einx", "frozendict", "loguru"],
    "transformers": ["transformers==5.23.0"],
}
ENWIK8: dict[str, Any] = {  # the reference's training script, with the flash attention on
    "num_tokens": 256, "dim": 512, "depth": 6, "dim_head": 64, "heads": 8, "max_seq_len": 1024, "block_width": 512,
    "num_state_vectors": 512, "recurrent_layers": (4,), "use_flash_attn": True,
}  # fmt: skip
SMALL: dict[str, Any] = {  # many blocks, small products
    "num_tokens": 256, "dim": 128, "depth": 4, "dim_head": 32, "heads": 4, "max_seq_len": 1024, "block_width": 64,
    "num_state_vectors": 64, "recurrent_layers": (2,), "use_flash_attn": True,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- packages


def install() -> list[str]:
    """Installs what is not there yet; the names of what could not be had."""
    missing = []
    for name, requirements in PACKAGES.items():
        folder = ROOT / ".reference" / name
        stamp = folder / "installed.txt"
        if stamp.exists() and stamp.read_text() == "\n".join(requirements):
            continue
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder)]
        if subprocess.run([*command, *requirements], check=False).returncode:
            missing.append(name)
        else:
            stamp.write_text("\n".join(requirements))
    return missing


def package(name: str, module: str) -> ModuleType:
    """A module of a package of PACKAGES."""
    folder = ROOT / ".reference" / name
    if not (folder / "installed.txt").exists():
        raise Unavailable(f"{name} is not installed")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer may fail in any way, and the others are measured all the same
        raise Unavailable(f"{name} cannot be imported: {error}") from error


def reference_class() -> Any:
    """The model of the reference, whose module has the name of ours and so is loaded under another one."""
    name = "block_recurrent_transformer_pytorch"
    path = ROOT / ".reference" / "reference" / name / f"{name}.py"
    if "reference_model" in sys.modules:
        return sys.modules["reference_model"].BlockRecurrentTransformer
    if not path.exists():
        raise Unavailable("the reference is not installed")
    warnings.filterwarnings("ignore", message=".*sdp_kernel.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    spec = importlib.util.spec_from_file_location("reference_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference_model"] = module
    spec.loader.exec_module(module)
    return module.BlockRecurrentTransformer


# ------------------------------------------------------------------------------------------------------- training steps

Step = Callable[[], Any]


def tokens(options: dict[str, Any], batch: int, length: int | None = None) -> Tensor:
    length = options["max_seq_len"] + 1 if length is None else length
    return torch.randint(0, options["num_tokens"], (batch, length), device=DEVICE)


def precision(use_bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16) if use_bf16 else nullcontext()


def training_step(model: nn.Module, loss_of: Callable[[], Tensor], use_bf16: bool, optimise: bool) -> Step:
    """Forward, backward and optimizer; with `optimise` off the gradients alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with precision(use_bf16):
            loss = loss_of()
        loss.backward()
        if optimise:
            optimizer.step()
        optimizer.zero_grad()

    return step


def ours_step(options: dict[str, Any], batch: int, use_bf16: bool = False, optimise: bool = True) -> Step:
    model = BlockRecurrentTransformer(**options).to(DEVICE)
    x, carried = tokens(options, batch), {}

    def loss_of() -> Tensor:
        loss, memories, states = model(x, return_loss=True, **carried)
        carried.update(xl_memories=detach(memories), states=detach(states))
        return loss

    return training_step(model, loss_of, use_bf16, optimise)


def reference_step(options: dict[str, Any], batch: int, use_bf16: bool = False, optimise: bool = True) -> Step:
    model = reference_class()(**options).to(DEVICE)
    x, carried = tokens(options, batch), {}

    def loss_of() -> Tensor:
        loss, memories, states = model(x, return_loss=True, **carried)
        carried.update(xl_memories=memories, states=states)
        return loss

    return training_step(model, loss_of, use_bf16, optimise)


def transformer_xl_step(options: dict[str, Any], batch: int, use_bf16: bool = False, optimise: bool = True) -> Step:
    """x-transformers: a Transformer-XL of the same sizes that reads the same tokens in windows of a block."""
    x_transformers, width = package("x-transformers", "x_transformers"), options["block_width"]
    layers = x_transformers.Decoder(
        dim=options["dim"], depth=options["depth"], heads=options["heads"], attn_dim_head=options["dim_head"],
        attn_one_kv_head=True, attn_flash=True, rotary_pos_emb=True, ff_glu=True, ff_mult=8 / 3, ff_no_bias=True,
    )  # fmt: skip
    model = x_transformers.TransformerWrapper(
        num_tokens=options["num_tokens"], max_seq_len=width, max_mem_len=width, use_abs_pos_emb=False,
        attn_layers=layers,
    ).to(DEVICE)  # fmt: skip
    x, carried = tokens(options, batch), {"mems": None}

    def loss_of() -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for start in range(0, x.shape[1] - 1, width):
            part, targets = x[:, start : start + width], x[:, start + 1 : start + width + 1]
            logits, mems = model(part, mems=carried["mems"], return_mems=True)
            carried["mems"] = [mem.detach() for mem in mems]
            total = total + F.cross_entropy(logits.transpose(1, 2).float(), targets)
        return total

    return training_step(model, loss_of, use_bf16, optimise)


def gemma(options: dict[str, Any]) -> nn.Module:
    """transformers: RecurrentGemma of the same sizes (two recurrent layers, then one with a window of a block)."""
    transformers = package("transformers", "transformers")
    transformers.logging.set_verbosity_error()
    dim, heads = options["dim"], options["heads"]
    config = transformers.RecurrentGemmaConfig(
        vocab_size=options["num_tokens"], hidden_size=dim, num_hidden_layers=max(3, options["depth"]), lru_width=dim,
        intermediate_size=2 * (dim * 8 // 3), num_attention_heads=heads, num_key_value_heads=1,
        head_dim=options["dim_head"], attention_window_size=options["block_width"], pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.RecurrentGemmaForCausalLM(config).to(DEVICE)


def gemma_step(options: dict[str, Any], batch: int, use_bf16: bool = False, optimise: bool = True) -> Step:
    model, x = gemma(options), tokens(options, batch, options["max_seq_len"])
    return training_step(model, lambda: model(input_ids=x, labels=x).loss, use_bf16, optimise)


TRAINING = {
    "ours": ours_step, "reference": reference_step, "Transformer-XL": transformer_xl_step, "RecurrentGemma": gemma_step,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- reading


def read_to(model: BlockRecurrentTransformer, position: int, batch: int, ragged: bool = False) -> dict[str, Any]:
    """Memories and states with `position` tokens read; ragged: every row a little less than the one before."""
    width, carried = model.config.block_width, {}
    x = torch.randint(0, model.config.num_tokens, (batch, min(position, 2 * width)), device=DEVICE)
    with torch.no_grad():
        for start in range(0, position, 2 * width):
            part = x[:, : min(2 * width, position - start)]
            lengths = None
            if ragged and start == 0:
                lengths = part.shape[1] - torch.arange(batch, device=DEVICE) * (part.shape[1] // (2 * batch))
            _, memories, states = model(part, lengths=lengths, logits_to_keep=1, **carried)
            carried = {"xl_memories": memories, "states": states}
    return carried


def ours_token(
    options: dict[str, Any], position: int, batch: int, ragged: bool = False, use_compile: bool = False
) -> Step:
    """One token after `position` others, as `generate` reads it. Each call writes the same token in the same place."""
    model = BlockRecurrentTransformer(**options).to(DEVICE).eval()
    carried = read_to(model, position - 1, batch, ragged)
    token = tokens(options, batch, 1)
    with torch.no_grad():  # the first token after a prompt lays out the block's keys, those after it do not
        _, memories, states = model(token, **carried)
    carried = {"xl_memories": memories, "states": states}
    run = torch.compile(model, fullgraph=True) if use_compile else model

    def step() -> Any:
        with torch.no_grad():
            return run(token, overwrite=True, **carried)

    return step


def reference_token(options: dict[str, Any], position: int, batch: int) -> Step:
    """One token at `position`: its `generate` reads the whole segment up to the token anew, each time."""
    model = reference_class()(**options).to(DEVICE).eval()
    carried: dict[str, Any] = {}
    if position > options["max_seq_len"]:
        with torch.no_grad():
            _, memories, states = model(tokens(options, batch, options["max_seq_len"]))
        carried = {"xl_memories": memories, "states": states}
    x = tokens(options, batch, (position - 1) % options["max_seq_len"] + 1)

    def step() -> Any:
        with torch.no_grad():
            return model(x, **carried)

    return step


def gemma_token(options: dict[str, Any], position: int, batch: int) -> Step:
    model = gemma(options).eval()
    x = tokens(options, batch, min(position, 2 * options["block_width"]))
    place = torch.tensor([position], device=DEVICE)
    with torch.no_grad():
        model(input_ids=x, use_cache=True)

    def step() -> Any:
        with torch.no_grad():
            return model(input_ids=x[:, :1], cache_position=place, position_ids=place[None], use_cache=True)

    return step


def ours_prefill(options: dict[str, Any], length: int, batch: int) -> Step:
    model, x = BlockRecurrentTransformer(**options).to(DEVICE).eval(), tokens(options, batch, length)

    def step() -> Any:
        with torch.no_grad():
            return model(x, logits_to_keep=1)

    return step


def reference_prefill(options: dict[str, Any], length: int, batch: int) -> Step:
    model, x = reference_class()(**options).to(DEVICE).eval(), tokens(options, batch, length)

    def step() -> None:
        carried: dict[str, Any] = {}
        with torch.no_grad():
            for part in x.split(options["max_seq_len"], dim=1):
                _, memories, states = model(part, **carried)
                carried = {"xl_memories": memories, "states": states}

    return step


def onnx_host(options: dict[str, Any], folder: Path) -> Any:
    """The graphs of a model, written to a folder, in onnxruntime: the `Model` of examples/onnx_stream.py."""
    if DEVICE.type != "cpu":
        raise Unavailable("is measured on the CPU alone")
    try:
        from block_recurrent_transformer_pytorch.adapters.onnx import export_onnx

        host = runpy.run_path(str(ROOT / "examples" / "onnx_stream.py"))["Model"]
    except ImportError as why:
        raise Unavailable(f"needs the extra [onnx]: {why}") from why
    export_onnx(BlockRecurrentTransformer(**options), folder)
    return host(folder, threads=torch.get_num_threads())


def onnx_token(host: Any, position: int, batch: int, ragged: bool = False) -> Step:
    """One token after `position` others, as in `ours_token`."""
    options = host.manifest["config"]
    less = (position - 1) // (2 * batch) if ragged else 0  # every row so many tokens less than the one before
    texts = [text[: position - row * less] for row, text in enumerate(tokens(options, batch, position).numpy())]
    _, carried = host.read(texts, host.start(batch), chunk=host.width)
    token = tokens(options, batch, 1)[:, 0].numpy()
    return lambda: host.step(token, carried)


def onnx_prefill(host: Any, length: int, batch: int) -> Step:
    x = tokens(host.manifest["config"], batch, length).numpy()
    return lambda: host.read(x, host.start(batch), chunk=host.width)
