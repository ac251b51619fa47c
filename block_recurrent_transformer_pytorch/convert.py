"""Weights of other implementations: what config they have, and their arrays under our names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .paper import OPTIONS

# ---------------------------------------------------------------------------- block-recurrent-transformer-pytorch 0.4.4


def from_lucidrains(
    state_dict: Mapping[str, Tensor], *, max_seq_len: int, block_width: int,
    read_recurrent_layers: tuple[int, ...] | None,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """The options and the state dict of our model for a state dict of version 0.4.4, and whence each entry comes.

    Its attention divides the logits of normalised queries and keys by sqrt(dim_head), and the options say so. Its
    two maps after the states' attention, one behind the other, become one; its gate keeps 1 - sigmoid(beta).

    Raises:
        ValueError: entries are missing or unknown, or the layers where states are read have to be given.
    """
    theirs = Entries(dict(state_dict), "state_dict")
    depth = 1 + max((int(m[1]) for m in map(re.compile(r"layers\.(\d+)\.").match, theirs.left) if m), default=-1)
    if depth < 1:
        raise ValueError("state_dict holds no layers.N entries: not a BlockRecurrentTransformer of version 0.4.4")
    inner, dim = theirs.matrix("layers.0.0.to_q.weight").shape
    dim_head = theirs["layers.0.0.to_kv.weight"].shape[0] // 2
    writes = [n + 1 for n in range(depth) if f"layers.{n}.0.state_container.init_state" in theirs.left]
    counts = [theirs[f"layers.{n}.0.to_out.weight"].shape[1] // inner - 1 for n in range(depth)]
    reads = find_reads(tuple(writes), counts, read_recurrent_layers)
    convolution = theirs.get("mem_manager.layers.0.1.1.weight")
    states = theirs[f"layers.{writes[0] - 1}.0.state_container.init_state"].shape[0] if writes else None
    options: dict[str, Any] = {
        "num_tokens": theirs["token_emb.weight"].shape[0], "dim": dim, "depth": depth, "dim_head": dim_head,
        "heads": inner // dim_head, "ff_dim": theirs["layers.0.1.3.weight"].shape[1], "max_seq_len": max_seq_len,
        "block_width": block_width, "recurrent_layers": tuple(writes), "read_recurrent_layers": reads,
        "num_state_vectors": states,
        "all_layers_qk_rmsnorm": all(f"layers.{n}.0.attn.q_scale" in theirs.left for n in range(depth)),
        "qk_norm_scale": dim_head**-0.5, "use_compressed_mem": convolution is not None,
    }  # fmt: skip
    if convolution is not None:
        options["compressed_mem_factor"] = convolution.shape[2]

    theirs.move("token_emb.weight", "token_emb.weight")
    theirs.move("to_logits.0.gamma", "norm.weight")
    theirs.move("to_logits.1.weight", "to_logits.weight")
    for n in range(depth):
        cells = [write - 1 for write, read in sorted(zip(writes, reads)) if read == n + 1]
        lucidrains_layer(theirs, n, cells, options)
    for write in writes:
        lucidrains_state(theirs, write - 1, options)
    for name in [name for name in theirs.left if name.endswith("beta")]:
        if theirs.take(name).any():
            raise ValueError(f"state_dict entry {name} is not zero, and the norms of version 0.4.4 have no bias")
    theirs.check_empty()
    return options, theirs.ours, theirs.sources


def find_reads(writes: tuple[int, ...], counts: list[int], given: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layer where each state is read: `given`, or the only choice with `counts[n]` reads at layer n + 1."""
    wanted = tuple(n for n, count in enumerate(counts, start=1) for _ in range(count))
    if given is not None:
        if sorted(given) != list(wanted) or len(given) != len(writes) or any(r > w for r, w in zip(given, writes)):
            raise ValueError(f"read_recurrent_layers={given}, and the state_dict reads its states at layers {wanted}")
        return tuple(given)
    can_fit = len(wanted) == len(writes) and all(r <= w for r, w in zip(wanted, sorted(writes)))
    choices = list(itertools.islice(fitting_reads(writes, wanted), 2)) if can_fit else []
    if len(choices) != 1:
        raise ValueError(f"read_recurrent_layers must be given: states of layers {writes}, read as {choices}?")
    return choices[0]


def fitting_reads(writes: tuple[int, ...], wanted: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Orders of the layers `wanted`, ascending, in which no state is read above the layer that writes it."""
    if not writes:
        yield ()
        return
    lowest = min(range(len(writes)), key=writes.__getitem__)  # has the fewest places to be read
    for read in sorted({read for read in wanted if read <= writes[lowest]}):
        at = wanted.index(read)
        for others in fitting_reads(writes[:lowest] + writes[lowest + 1 :], wanted[:at] + wanted[at + 1 :]):
            yield (*others[:lowest], read, *others[lowest:])


def lucidrains_layer(theirs: Entries, n: int, cells: list[int], options: dict[str, Any]) -> None:
    """Layer n (from 0), where the states of the layers `cells` are read."""
    names = {
        "norm.weight": f"layers.{n}.0.norm.gamma", "to_out.weight": f"layers.{n}.0.to_out.weight",
        "feed_forward.norm.weight": f"layers.{n}.1.0.gamma",
        "feed_forward.hidden.to_hidden.weight": f"layers.{n}.1.1.weight",
        "feed_forward.to_out.weight": f"layers.{n}.1.3.weight",
    }  # fmt: skip
    if f"layers.{n}.0.attn.q_scale" in theirs.left:
        names |= {f"heads_norm.{x}_scale": f"layers.{n}.0.attn.{x}_scale" for x in "qk"}
    if options["use_compressed_mem"]:
        names |= {f"compressor.conv.{x}": f"mem_manager.layers.{n}.1.1.{x}" for x in ("weight", "bias")}
    containers = [f"layers.{cell}.0.state_container" for cell in cells]
    for here, container in enumerate(containers):
        attention = f"{container}.to_state_cross_attn"
        names |= {f"read_norm.{here}.{x}_scale": f"{attention}.{x}_scale" for x in "qk"}
    for ours, name in names.items():
        theirs.move(name, f"layers.{n}.{ours}")
    e, dim = options["dim_head"], options["dim"]
    queries = [f"layers.{n}.0.to_q.weight", *[f"{container}.q_to_state.weight" for container in containers]]
    shapes = dict.fromkeys(queries, (options["heads"] * e, dim))
    theirs.join({**shapes, f"layers.{n}.0.to_kv.weight": (2 * e, dim)}, f"layers.{n}.to_qkv.weight")


def lucidrains_state(theirs: Entries, n: int, options: dict[str, Any]) -> None:
    """The state container of layer n (from 0)."""
    container, dim_head = f"layers.{n}.0.state_container", options["dim_head"]
    names = {
        "initial": "init_state", "ids": "state_pos_ids", "norm.weight": "state_norm.gamma",
        "to_kv.weight": "state_to_kv.weight",
        **{f"self_norm.{x}_scale": f"state_self_attn.{x}_scale" for x in "qk"},
        **{f"cross_norm.{x}_scale": f"from_state_cross_attn.{x}_scale" for x in "qk"},
    }  # fmt: skip
    for ours, name in names.items():
        theirs.move(f"{container}.{name}", f"layers.{n}.cell.{ours}")
    maps = f"{container}.to_state_out.weight", f"{container}.state_out_to_gate.weight"
    first, second = map(theirs.take, maps)
    first = rearrange(first, "d (h two e) -> d (two h e)", two=2, e=dim_head)  # [self ; cross], there within each head
    update = f"layers.{n}.cell.update"
    theirs.put(f"{update}.to_candidate.weight", (second.double() @ first.double()).to(first.dtype), *maps)
    theirs.move(f"{container}.state_out_to_gate.bias", f"{update}.to_candidate.bias")
    theirs.put(f"{update}.gate.keep", -theirs.take(f"{container}.learned_ema_beta"), f"{container}.learned_ema_beta")
    queries, shape = ("state_to_q", "q_from_state"), (options["heads"] * dim_head, options["dim"])
    theirs.join({f"{container}.{name}.weight": shape for name in queries}, f"layers.{n}.cell.to_q.weight")


# ------------------------------------------------------------------------------------------- the authors' code (meliad)


def from_meliad(
    params: Mapping[str, Any], *, window_length: int
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """The options and the state dict of our model for parameters of the paper's own code, `path -> array`, and whence
    each entry comes.

    Raises:
        ValueError: paths are missing, unknown, or describe something that the code's published settings do not.
    """
    if window_length < 1:
        raise ValueError(f"window_length must be at least 1, not {window_length}")
    theirs = Entries({path: as_tensor(path, array) for path, array in params.items()}, "params")
    depth = 1 + max((int(m[1]) for m in map(re.compile(r"transformer(\d+)/").match, theirs.left) if m), default=-1)
    if depth < 1:
        raise ValueError("params holds no transformerN/ paths: not a language model of the authors' code")
    num_tokens, _ = theirs.matrix("embed/embedding").shape
    writes = [n for n in range(depth) if f"transformer{n}/recurrent_initial_state" in theirs.left]
    others = [n for n in range(depth) if n not in writes]
    options = {
        "num_tokens": num_tokens, "depth": depth, "max_seq_len": window_length, "block_width": window_length,
        "recurrent_layers": tuple(n + 1 for n in writes),
        "block_feedback": bool(writes) and any(f"transformer{n}/tbase/attention_scale2" in theirs.left for n in others),
        **meliad_layer_options(theirs, "transformer0/", f"transformer{writes[0]}/" if writes else ""),
    }  # fmt: skip
    theirs.move("embed/embedding", "token_emb.weight")
    theirs.move("final_layernorm/scale", "norm.weight")
    for n in range(depth):
        meliad_layer(theirs, f"transformer{n}/", f"layers.{n}.", options)
    theirs.check_empty()
    return options, theirs.ours, theirs.sources


def as_tensor(path: str, array: Any) -> Tensor:
    try:
        return torch.as_tensor(array)
    except (RuntimeError, TypeError, ValueError) as error:  # torch's words for what is no array
        raise ValueError(f"params: {path} must be an array, not {type(array).__name__}") from error


def meliad_layer_options(theirs: Entries, path: str, recurrent: str) -> dict[str, Any]:
    """Sizes and options that the paths of one layer tell, and of a recurrent one (\"\" without)."""
    dim, inner = theirs.matrix(f"{path}tbase/_kvq/queries_layer/kernel").shape
    heads = theirs.matrix(f"{path}relative_positions/rel_embedding").shape[0]
    normalised = f"{path}tbase/_kvq/attention_scale" in theirs.left
    options: dict[str, Any] = {
        "dim": dim, "heads": heads, "kv_heads": heads, "dim_head": inner // heads,
        "ff_dim": theirs.matrix(f"{path}tbase/ffn/hidden0/kernel").shape[1],
        "qk_norm": "head" if normalised else "none", "all_layers_qk_rmsnorm": normalised, **OPTIONS,
    }  # fmt: skip
    if recurrent:
        options["num_state_vectors"] = theirs[f"{recurrent}recurrent_initial_state"].shape[0]
        cell = f"{recurrent}recurrent_tbase/"
        dual = f"{cell}pre_ffn_layernorm/scale" in theirs.left
        single = not dual and f"{cell}ffn/output_layer/kernel" in theirs.left
        options["state_update"] = "dual" if dual else "single" if single else "skip"
        mlp = f"{cell}{'ffn' if single else 'post_attn_mlp'}"
        names = {"gate_bias": "fixed", "forget_gate/kernel": "lstm", "gate_layer/kernel": "full"}
        gates = [gate for name, gate in names.items() if f"{mlp}/{name}" in theirs.left]
        if len(gates) != 1:
            raise ValueError(f"params: {mlp} must hold one gate of {sorted(names.values())}, not {gates}")
        options["gate"] = gates[0]
    return options


def meliad_layer(theirs: Entries, path: str, ours: str, options: dict[str, Any]) -> None:
    """One layer of the authors' code at `path`, under our names that begin with `ours`."""
    arrays = {
        "norm.weight": "tbase/_kvq/pre_attn_layernorm/scale",
        "position_bias.table": "relative_positions/rel_embedding",
        "feed_forward.norm.weight": "tbase/pre_ffn_layernorm/scale",
    }
    kernels = {
        "to_out.weight": "tbase/post_attn_mlp/output_layer",
        "feed_forward.hidden.to_hidden.weight": "tbase/ffn/hidden0",
        "feed_forward.to_out.weight": "tbase/ffn/output_layer",
    }
    scales = {"heads_norm": "tbase/_kvq/attention_scale", "read_norm.0": "tbase/attention_scale2"}
    both, pair, tokens = ["queries_layer", "queries2_layer"], ["keys_layer", "values_layer"], f"{path}tbase/_kvq"
    shape = options["dim"], options["heads"] * options["dim_head"]
    queries = both if f"{tokens}/queries2_layer/kernel" in theirs.left else both[:1]
    theirs.join_kernels({f"{tokens}/{name}/kernel": shape for name in queries + pair}, f"{ours}to_qkv.weight")
    if f"{path}recurrent_initial_state" in theirs.left:
        cell = "recurrent_tbase/"
        scales |= {"cell.self_norm": f"{cell}_kvq/attention_scale", "cell.cross_norm": f"{cell}attention_scale2"}
        arrays |= {
            "cell.initial": "recurrent_initial_state",
            "cell.ids": f"{cell}_kvq/position_embeddings",
            "cell.norm.weight": f"{cell}_kvq/pre_attn_layernorm/scale",
        }
        for names, joined in ((both, "cell.to_q.weight"), (pair, "cell.to_kv.weight")):
            theirs.join_kernels({f"{path}{cell}_kvq/{name}/kernel": shape for name in names}, ours + joined)
        has_attention_mlp = f"{path}{cell}post_attn_mlp/output_layer/kernel" in theirs.left
        has_ffn = f"{path}{cell}ffn/output_layer/kernel" in theirs.left
        if has_attention_mlp:
            prefix = "cell.update.attention." if has_ffn else "cell.update."
            meliad_gated(theirs, f"{path}{cell}post_attn_mlp/", ours + prefix)
        if has_ffn:
            meliad_gated(theirs, f"{path}{cell}ffn/", f"{ours}cell.update.")
            kernels["cell.update.hidden.to_hidden.weight"] = f"{cell}ffn/hidden0"
        if has_ffn and has_attention_mlp:
            arrays["cell.update.norm.weight"] = f"{cell}pre_ffn_layernorm/scale"
    arrays |= {f"{name}.head_scale": scale for name, scale in scales.items() if f"{path}{scale}" in theirs.left}
    for name, array in arrays.items():
        theirs.move(path + array, ours + name)
    for name, kernel in kernels.items():
        theirs.move_kernel(f"{path}{kernel}/kernel", ours + name)


def meliad_gated(theirs: Entries, path: str, ours: str) -> None:
    """The last map of an MLP of the state side, and its gate."""
    theirs.move_kernel(f"{path}output_layer/kernel", f"{ours}to_candidate.weight")
    if f"{path}gate_bias" in theirs.left:
        theirs.move(f"{path}gate_bias", f"{ours}gate.keep")
    names = {"forget_gate": "to_forget", "input_gate": "to_input", "gate_layer": "to_keep"}
    for name, linear in names.items():
        if f"{path}{name}/kernel" in theirs.left:
            theirs.move_kernel(f"{path}{name}/kernel", f"{ours}gate.{linear}.weight")
            theirs.move(f"{path}{name}/bias", f"{ours}gate.{linear}.bias")


class Entries:
    """Arrays by name, each to be taken once and put under a name of ours; what is missing or left is a ValueError."""

    def __init__(self, entries: dict[str, Tensor], argument: str) -> None:
        self.left, self.argument = entries, argument
        self.ours: dict[str, Tensor] = {}
        self.sources: dict[str, str] = {}  # our name: theirs

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.left:
            raise ValueError(f"{self.argument} lacks {name}")
        return self.left[name]

    def matrix(self, name: str) -> Tensor:
        if self[name].ndim != 2:
            raise ValueError(f"{self.argument}: {name} has the shape {tuple(self[name].shape)}, and must have two axes")
        return self[name]

    def get(self, name: str) -> Tensor | None:
        return self.left.get(name)

    def take(self, name: str) -> Tensor:
        value = self[name]
        del self.left[name]
        return value.detach().clone()

    def put(self, ours: str, value: Tensor, *names: str) -> None:
        self.ours[ours], self.sources[ours] = value, " and ".join(names)

    def move(self, name: str, ours: str) -> None:
        self.put(ours, self.take(name), name)

    def join(self, shapes: dict[str, tuple[int, int]], ours: str) -> None:
        """Maps of the same input, with the shapes they must have, that are one of ours."""
        self.check_shapes(shapes)
        self.put(ours, torch.cat([self.take(name) for name in shapes]), *shapes)

    def join_kernels(self, shapes: dict[str, tuple[int, int]], ours: str) -> None:
        """The same for matrices that are multiplied from the other side there."""
        self.check_shapes(shapes)
        self.put(ours, torch.cat([self.take(name).T for name in shapes]), *shapes)

    def check_shapes(self, shapes: dict[str, tuple[int, int]]) -> None:
        for name, shape in shapes.items():
            if self[name].shape != shape:
                raise ValueError(f"{self.argument}: {name} has the shape {tuple(self[name].shape)}, not {shape}")

    def move_kernel(self, name: str, ours: str) -> None:
        """A matrix that is multiplied from the other side there."""
        self.matrix(name)
        self.put(ours, self.take(name).T.contiguous(), name)

    def check_empty(self) -> None:
        if self.left:
            raise ValueError(f"{self.argument} holds entries that this model has no place for: {sorted(self.left)[:8]}")
