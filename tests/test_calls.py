"""What a call takes and gives beside ids and logits: embeddings, losses of single tokens, hidden states of all layers;
under vmap, in inference mode, with values that are not numbers, on other default devices and types."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from strategies import random_model, random_stream
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.func import functional_call, grad, vmap

from block_recurrent_transformer_pytorch import (
    BlockRecurrentTransformer,
    Config,
    RecurrentTrainWrapper,
    cross_entropy,
    detach,
    forget_rows,
    losses,
    optim,
)
from block_recurrent_transformer_pytorch import block_recurrent_transformer_pytorch as module

SIZES = {
    "num_tokens": 11, "dim": 8, "depth": 3, "dim_head": 4, "heads": 2, "ff_dim": 6, "block_width": 4, "max_seq_len": 8,
    "recurrent_layers": (2,), "num_state_vectors": 3,
}  # fmt: skip
VARIANTS = {
    "default": {}, "flash": {"use_flash_attn": True}, "dual": {"state_update": "dual", "gate": "lstm"},
    "dynamic": {"positions": "dynamic"}, "t5": {"positions": "t5", "qk_norm": "head"},
    "compressed": {"use_compressed_mem": True}, "tied": {"tie_embeddings": True},
}  # fmt: skip
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def model_of(variant: str = "default", **options: object) -> BlockRecurrentTransformer:
    return random_model(Config(**SIZES | VARIANTS[variant] | options))


# -------------------------------------------------------------------------------------------- ids -> body -> head


@every_variant
def test_a_call_is_embed_encode_logits(variant: str) -> None:
    model, x = model_of(variant), random_stream(2, 14)
    logits, memories, states = model(x)
    hidden = model.encode(model.embed(x)).hidden
    assert torch.equal(model.logits(hidden), logits)
    assert torch.equal(model(inputs_embeds=model.token_emb(x))[0], logits)
    assert torch.equal(model(x, return_hidden=True)[0], hidden)
    more = random_stream(2, 3, seed=1)
    carried = {"xl_memories": memories, "states": states}
    assert torch.equal(model(inputs_embeds=model.token_emb(more), **carried)[0], model(more, **carried)[0])


@pytest.mark.parametrize("options", [{}, {"recurrent_layers": (1, 3), "read_recurrent_layers": (1, 2)}])
@pytest.mark.parametrize("lengths", [None, [14, 5]])
def test_hidden_states_of_every_layer(options: dict, lengths: list[int] | None) -> None:
    """They are what the layers gave, and the way from the embeddings to the logits leads through them."""
    model, x = model_of(**options), random_stream(2, 14)
    embedded = model.embed(x).detach().requires_grad_()
    rows = None if lengths is None else torch.tensor(lengths)
    out = model.encode(embedded, lengths=rows, return_layers=True)
    assert out.layers is not None and len(out.layers) == 1 + model.config.depth
    seen = torch.ones(2, 14, 1) if rows is None else (torch.arange(14) < rows[:, None])[..., None]
    assert torch.equal(out.layers[0], embedded * seen)
    assert torch.equal(model.norm(out.layers[-1]), out.hidden)
    assert all(layer.shape == embedded.shape for layer in out.layers)
    (found,) = torch.autograd.grad(out.layers[1].sum(), embedded)
    assert found.any() and model.encode(embedded).layers is None


def test_soft_prompts_learn() -> None:
    model, x = model_of(), random_stream(2, 6)
    prompt = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    _, memories, states = model(inputs_embeds=prompt.expand(2, -1, -1))
    model(x, xl_memories=memories, states=states, return_loss=True)[0].backward()
    assert prompt.grad is not None and prompt.grad.any()


@pytest.mark.parametrize("in_chunks", [False, True])
@every_variant
def test_losses_of_single_tokens_and_their_weights(variant: str, in_chunks: bool, monkeypatch) -> None:
    model, x = model_of(variant, ignore_index=3), random_stream(2, 15)
    weights = torch.rand(2, 14, dtype=torch.float64)
    targets = x[:, 1:]
    expected = F.cross_entropy(model(x[:, :-1])[0].transpose(1, 2), targets, ignore_index=3, reduction="none")
    if in_chunks:
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 50)
    each = model(x, return_loss=True, reduction="none")[0]
    assert_same(each, expected)
    weighted = expected * weights
    assert_same(model(x, return_loss=True, reduction="none", loss_weights=weights)[0], weighted)
    counted = (weights * (targets != 3)).sum()
    for reduction, by_hand in (("sum", weighted.sum()), ("mean", weighted.sum() / counted)):
        loss = model(x, return_loss=True, reduction=reduction, loss_weights=weights)[0]
        assert_same(loss, by_hand, spread=1)
        names, parameters = zip(*model.named_parameters())
        both = [torch.autograd.grad(one, parameters, retain_graph=True) for one in (loss, by_hand)]
        for name, ours, theirs in zip(names, *both, strict=True):
            assert_same(ours, theirs, spread=1, name=name)
    (ours,), (theirs,) = (torch.autograd.grad((one**2).sum(), [model.norm.weight]) for one in (each, expected))
    assert_same(ours, theirs)


def test_cross_entropy_of_any_head_and_shape() -> None:
    head, hidden = nn.Linear(8, 11).double(), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    targets = torch.randint(11, (2, 3, 5))
    expected = F.cross_entropy(head(hidden).flatten(0, 2), targets.flatten())
    assert_same(cross_entropy(head, hidden, targets), expected, spread=1)
    with pytest.raises(ValueError, match="reduction='max'"):
        cross_entropy(head, hidden, targets, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"do not agree: \[\(2, 3, 5, 8\), \(2, 3\)\]"):
        cross_entropy(head, hidden, targets[..., 0])


def test_arguments_that_cannot_be_combined() -> None:
    model, x = model_of(), random_stream(2, 5)
    embedded = model.embed(x)
    for options, words in (
        ({}, "either x"), ({"x": x, "inputs_embeds": embedded}, "either x"),
        ({"x": x, "reduction": "sum"}, "need return_loss=True"),
        ({"inputs_embeds": embedded, "return_loss": True}, "x must be token ids"),
        ({"inputs_embeds": embedded[..., :4]}, r"inputs_embeds must be \(b, n, dim=8\)"),
        ({"inputs_embeds": x}, "inputs_embeds"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model(**options)


def test_ids_of_every_integer_type() -> None:
    model, x = model_of(), random_stream(2, 9)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model(x.to(dtype), return_loss=True)[0], model(x, return_loss=True)[0])
        assert torch.equal(model(x.to(dtype))[0], model(x)[0])
        wanted = model.generate(x, max_new_tokens=3, temperature=0.0)
        assert torch.equal(model.generate(x.to(dtype), max_new_tokens=3, temperature=0.0), wanted)


# --------------------------------------------------------------------------------- where numbers cannot be looked at


@every_variant
def test_gradients_of_every_row_by_vmap(variant: str) -> None:
    model, x = model_of(variant), random_stream(3, 14)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row[None],), {"return_loss": True})[0]

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for row in range(3):
        for name, wanted in grad(loss)(parameters, x[row]).items():
            assert_same(found[name][row], wanted, 1e-12, spread=1, name=name)


def tensors(carried: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(carried) if isinstance(leaf, Tensor)]


def test_rows_without_tokens_keep_what_they_hold_to_themselves() -> None:
    """NaN in a row that brings no token reaches neither loss nor gradients, and stays where it is."""
    model, x = model_of(), random_stream(2, 10)
    _, memories, states = model(random_stream(2, 6))
    memories, states = detach(memories), detach(states)

    def run(poison: float) -> list[Tensor]:
        carried = torch.utils._pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (memories.layers, states)
        )
        for leaf in tensors(carried):
            leaf[1] = poison
        model.zero_grad()
        given = {"xl_memories": memories._replace(layers=carried[0]), "states": carried[1]}
        loss, after, states_after = model(x, lengths=torch.tensor([9, 0]), return_loss=True, **given)
        loss.backward()
        left = [leaf[1] for leaf in tensors((after.layers, states_after))]
        assert all((leaf == poison).all() or (leaf != leaf).all() for leaf in left)
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    clean, poisoned = run(1.0), run(float("nan"))
    assert all(torch.isfinite(found).all() for found in poisoned)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


def test_memories_made_in_inference_mode_can_be_trained_on() -> None:
    model, x = model_of(), random_stream(2, 9)
    with torch.inference_mode():
        _, memories, states = model(x)
    plain = model(x)[1:]
    wanted = model(x, xl_memories=detach(plain[0]), states=detach(plain[1]), return_loss=True)[0]
    for carried in ((memories, states), (detach(memories), detach(states))):
        loss = model(x, xl_memories=carried[0], states=carried[1], return_loss=True)[0]
        loss.backward()
        assert_same(loss, wanted, spread=1)
    forget_rows(memories, torch.tensor([True, False]))


def test_drops_do_not_follow_the_default_device_and_type() -> None:
    model = BlockRecurrentTransformer(**SIZES)
    wrapper = RecurrentTrainWrapper(model, 0.3, 0.3, generator=torch.Generator().manual_seed(0))
    x = random_stream(100, 2)
    plain = wrapper.drops(x)
    wrapper.generator.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            other = wrapper.drops(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, other))


@pytest.mark.parametrize("variant", ["default", "dual", "dynamic", "t5", "compressed"])
@pytest.mark.parametrize("n", [3, 40, 100])
def test_torchs_dynamic_quantisation(variant: str, n: int) -> None:
    """Every ordinary map is replaced, and calls of any length work; maps of gates stay exact."""
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(**SIZES | VARIANTS[variant]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = quantize_dynamic(model, {nn.Linear})
    assert not [name for name, part in small.named_modules() if type(part) is nn.Linear]
    x = random_stream(2, n)
    with torch.no_grad():
        found, wanted = small(x)[0], model(x)[0]
    assert (found - wanted).std() < 0.1 * wanted.std()
    assert small.generate(x, max_new_tokens=6).shape == (2, 6)


def test_a_model_on_several_devices_is_refused() -> None:
    model = model_of()
    model.layers[2].to("meta")
    with pytest.raises(ValueError, match="the embeddings are on cpu, a layer is on meta: .*on one device"):
        model(random_stream(1, 3))


# ------------------------------------------------------------------------------------------------- ready for a GPU


@pytest.mark.parametrize("options", [{}, {"num_xl_blocks": 2, "heads": 4, "kv_heads": 2}, {"use_compressed_mem": True}])
def test_the_causal_bias_of_a_gpu_is_the_mask_of_a_cpu(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of("flash", **options), random_stream(2, 23)
    calls, real = [], module.causal_lower_right
    expected = model(x)[0]
    monkeypatch.setattr(module, "CAUSAL_BIAS_ON", {"cpu"})
    monkeypatch.setattr(module, "causal_lower_right", lambda *sizes: calls.append(sizes) or real(*sizes))
    assert_same(model(x)[0], expected)
    assert calls and all(n < j for n, j in calls)


# ------------------------------------------------------------------------------------------------------------ config


def test_replacing_an_option_derives_anew_what_followed_from_it() -> None:
    config = Config(num_tokens=11, dim=8, depth=6, block_width=4, max_seq_len=8)
    assert config.xl_layers == (1, 2, 3, 4, 5, 6) and config.recurrent_layers == (3,) and config.ff_dim == 21
    deeper = replace(config, depth=12, dim=16, block_width=8)
    assert deeper == Config(num_tokens=11, dim=16, depth=12, block_width=8, max_seq_len=8)
    assert deeper.xl_layers == tuple(range(1, 13)) and deeper.recurrent_layers == (6,)
    assert deeper.ff_dim == 42 and deeper.num_state_vectors == 8
    given = replace(Config(**asdict(config) | {"recurrent_layers": [2], "ff_dim": 5}), depth=12, dim=16)
    assert given.recurrent_layers == given.read_recurrent_layers == (2,) and given.ff_dim == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recurrent_layers": 3}, r"recurrent_layers=3 must be a tuple of layer numbers, such as \(3,\)"),
        ({"dim": "8"}, "dim='8' must be a whole number"),
        ({"dim": True}, "dim=True must be a whole number"),
        ({"gate": 3}, "gate=3 must be a name"),
        ({"gate": "gru"}, "gate 'gru' is not one of"),
        ({"positions": "rope"}, "positions='rope' must be one of 'xpos', 'rotary', 'dynamic', 't5', 'none'"),
        ({"use_flash_attn": 1}, "use_flash_attn=1 must be True or False"),
        ({"ff_mult": "4"}, "ff_mult='4' must be a number"),
    ],
)
def test_types_of_options_are_said_in_words(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**SIZES | options)


def test_lists_are_tuples_and_positions_are_explained() -> None:
    assert Config(**SIZES | {"recurrent_layers": [2]}).recurrent_layers == (2,)
    with pytest.raises(ValueError, match=r"config must be a Config, not 256; sizes are given by name"):
        BlockRecurrentTransformer(256)  # type: ignore[arg-type]


NOT_DECAYED = {
    "skip": {"cell.initial", "cell.ids", "cell.update.gate.keep"},
    "dual": {"cell.initial", "cell.ids", "cell.update.gate.to_forget.weight", "cell.update.gate.to_input.weight",
             "cell.update.attention.gate.to_forget.weight", "cell.update.attention.gate.to_input.weight"},
    "single": {"cell.initial", "cell.ids", "cell.update.gate.to_keep.weight", "position_bias.table"},
}  # fmt: skip


@pytest.mark.parametrize("state_update", NOT_DECAYED)
def test_what_does_not_decay_by_name(state_update: str) -> None:
    """Matrices that do not, and all vectors."""
    gate = {"skip": "fixed", "dual": "lstm", "single": "full"}[state_update]
    positions = "t5" if state_update == "single" else "xpos"
    model = BlockRecurrentTransformer(**SIZES, state_update=state_update, gate=gate, positions=positions)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = ([names[p] for p in group["params"]] for group in optim.parameter_groups(model, weight_decay=0.1))
    matrices = {name.removeprefix("layers.1.") for name in kept if name.startswith("layers.1.")}
    assert {name for name in matrices if model.layers[1].get_parameter(name).ndim > 1 or name.endswith("keep")} == (
        NOT_DECAYED[state_update]
    )
    assert all(model.get_parameter(name).ndim > 1 for name in decayed)
