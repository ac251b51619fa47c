"""The numbers of the authors' code: recorded parameters, inputs, outputs, gradients, caches and states."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from block_recurrent_transformer_pytorch import BlockRecurrentTransformer, convert, detach
from block_recurrent_transformer_pytorch import block_recurrent_transformer_pytorch as module
from block_recurrent_transformer_pytorch.spans import Span

GOLDEN = Path(__file__).parent / "golden" / "meliad"
MODELS = sorted(path.stem for path in GOLDEN.glob("model_*.npz"))
LAYERS = sorted(path.stem for path in [*GOLDEN.glob("layer_*.npz"), *GOLDEN.glob("xl_*.npz")])
WINDOW, SEGMENTS = 8, 3


class Recording:
    """An npz file; floats come as float64."""

    def __init__(self, name):
        self.arrays = np.load(GOLDEN / f"{name}.npz")

    def __getitem__(self, key):
        value = torch.from_numpy(self.arrays[key])
        return value.double() if value.is_floating_point() else value

    def under(self, prefix, new=""):
        return {new + key[len(prefix) :]: self[key] for key in self.arrays.files if key.startswith(prefix)}


def assert_near(ours, theirs, tolerance=1e-4, what=""):
    """Within `tolerance` of the spread of theirs."""
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    error = (ours - theirs).abs().max() / theirs.std()
    assert error < tolerance, f"{what}: off by {error:.1e} of the spread"


def assert_caches_match(memory, state, record, prefix, segment):
    for ours, name in ((memory.past["xl"].k, "previous_keys"), (memory.past["xl"].v, "previous_values")):
        assert_near(ours.transpose(1, 2), record[f"{prefix}{name}/{segment}"], what=name)
    if state is not None:
        assert_near(state, record[f"{prefix}recurrent_state/{segment}"], what="state")


@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_gives_the_recorded_numbers(name):
    record = Recording(name)
    model = BlockRecurrentTransformer.from_meliad(record.under("param/"), window_length=WINDOW)
    assert not model.training and model.token_emb.weight.dtype == torch.float64
    memories = states = None
    for segment in range(SEGMENTS):
        start = record[f"in/start_of_sequence/{segment}"]
        logits, memories, states = model(
            record[f"in/tokens/{segment}"].long(), xl_memories=memories, states=states, reset=start
        )
        memories, states = detach(memories), detach(states)
        assert_near(logits, record[f"out/logits/{segment}"], what="logits")
        targets = record[f"in/targets/{segment}"].long()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        losses = losses * record[f"in/loss_mask/{segment}"]
        assert_near(losses, record[f"out/token_losses/{segment}"], what="losses")
        losses.sum().backward()
        for n, memory in enumerate(memories.layers):
            state = states.layers[model.cells.index(n + 1)] if n + 1 in model.cells else None
            assert_caches_match(memory, state, record, f"out/transformer{n}/", segment)
    _, gradients, _ = convert.from_meliad(record.under("grad/"), window_length=WINDOW)
    parameters = dict(model.named_parameters())
    assert gradients.keys() == parameters.keys()
    for key, gradient in gradients.items():
        assert_near(parameters[key].grad, gradient, 1e-3, what=f"gradient of {key}")


@pytest.mark.parametrize("name", MODELS)
def test_one_token_at_a_time_gives_the_recorded_numbers_too(name):
    record = Recording(name)
    model = BlockRecurrentTransformer.from_meliad(record.under("param/"), window_length=WINDOW)
    tokens = record["in/tokens/0"].long()
    memories = states = None
    logits = []
    with torch.no_grad():
        for n in range(tokens.shape[1]):
            out, memories, states = model(tokens[:, n : n + 1], xl_memories=memories, states=states)
            logits.append(out)
    assert_near(torch.cat(logits, dim=1), record["out/logits/0"], what="logits")


def layer_as_model(record):
    """A model of that one layer, whose embedding and last norm are not used."""
    dim = record["in/xs/0"].shape[-1]
    params = record.under("param/", "transformer0/")
    params |= {"embed/embedding": torch.zeros(4, dim).double(), "final_layernorm/scale": torch.ones(dim).double()}
    return BlockRecurrentTransformer.from_meliad(params, window_length=WINDOW)


def read_layer(model, record, segment, memories, states, xs):
    """(ys, memories, states) for embedded inputs."""
    start = record[f"in/start_of_sequence/{segment}"]
    _, memories, states, layers, _ = model.encode(
        xs, xl_memories=memories, states=states, reset=start, return_layers=True
    )
    return layers[-1], memories, states


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_the_recorded_numbers(name):
    record = Recording(name)
    model = layer_as_model(record)
    memories = states = None
    for segment in range(SEGMENTS):
        xs = record[f"in/xs/{segment}"].requires_grad_()
        ys, memories, states = read_layer(model, record, segment, memories, states, xs)
        memories, states = detach(memories), detach(states)
        assert_near(ys, record[f"out/ys/{segment}"], what="ys")
        state = states.layers[0] if states.layers else None
        assert_caches_match(memories.layers[0], state, record, "out/", segment)
        (ys * record[f"in/cotangent/{segment}"]).sum().backward()
        assert_near(xs.grad, record[f"wgrad_xs/{segment}"], 1e-3, what="gradient of xs")
    gradients = record.under("wgrad/", "transformer0/")
    gradients |= {"embed/embedding": torch.zeros(4, 32), "final_layernorm/scale": torch.zeros(32)}
    _, gradients, _ = convert.from_meliad(gradients, window_length=WINDOW)
    for key, parameter in model.named_parameters():
        if key not in ("token_emb.weight", "norm.weight"):
            assert_near(parameter.grad, gradients[key], 1e-3, what=f"gradient of {key}")


@pytest.mark.parametrize("name", ["layer_bias_skip", "xl_t5"])
def test_what_happens_inside_a_layer_is_as_recorded(name, monkeypatch):
    record = Recording(name)
    model = layer_as_model(record)
    layer = model.layers[0]
    attended, outputs = [], {}

    def attend(*args, **kwargs):
        attended.append(original(*args, **kwargs))
        return attended[-1]

    def keep(key):
        return lambda _module, _inputs, output: outputs.setdefault(key, []).append(output)

    original = module.attend
    monkeypatch.setattr(module, "attend", attend)
    hooks = {"pre_attn_layernorm": layer.norm, "qkv": layer.to_qkv}
    for key, part in (hooks | {"pre_ffn": layer.feed_forward.norm, "ffn": layer.feed_forward}).items():
        part.register_forward_hook(keep(key))
    memories = states = None
    for segment in range(2):
        attended.clear(), outputs.clear()
        ys, memories, states = read_layer(model, record, segment, memories, states, record[f"in/xs/{segment}"])

        def mid(path, segment=segment):
            return record[f"mid/{path}/{segment}"]

        windows = ys.shape[1] // WINDOW
        state_side, token_side = attended[: 2 * windows if states.layers else 0], attended[-1 - len(states.layers) :]
        for window in range(windows):
            for part, ours in zip(("state_self", "state_cross"), state_side[2 * window : 2 * window + 2]):
                assert_near(ours.transpose(1, 2), mid(f"attention/{part}/window{window}"), what=part)
            for part, ours in zip(("token_self", "token_cross"), token_side):
                folded = ours.unflatten(0, (-1, windows))[:, window]  # (b, h, n, e)
                assert_near(folded.transpose(1, 2), mid(f"attention/{part}/window{window}"), what=part)
        q, *_, k, v = outputs["qkv"][0].chunk(3 + len(states.layers), dim=-1)  # as many key as query heads
        kvq = "tbase/_kvq"
        for path, ours in (
            (f"{kvq}/pre_attn_layernorm/call0", outputs["pre_attn_layernorm"][0]),
            (f"{kvq}/queries_layer/call0", q),
            (f"{kvq}/keys_layer/call0", k),
            (f"{kvq}/values_layer/call0", v),
            ("tbase/pre_ffn_layernorm/call0", outputs["pre_ffn"][0].view(ys.shape)),
            ("tbase/ffn/output_layer/call0", outputs["ffn"][0]),
            ("tbase/ffn/call0", ys),
        ):
            assert_near(ours, mid(path), what=path)


def test_the_buckets_of_the_t5_bias_are_theirs():
    record = Recording("t5_buckets")
    config = module.Config(**module.paper.options("tiny_test", "slide"))
    buckets = module.T5Bias(config).bucket(record["in/distance"].long())
    assert torch.equal(buckets, record["out/bucket"].long())


def test_the_mask_is_theirs():
    record = Recording("t5_buckets")
    config = module.Config(**module.paper.options("tiny_test", "slide", block_width=8, max_seq_len=8))
    span = Span(start=0, offset=0, num_blocks=1, length=8, completes=True, full_blocks=1)
    kinds = [module.XLMemory(config, 1)]
    visible = module.make_visibility(config, span, kinds, None, torch.device("cpu"), torch.float32)
    assert torch.equal(visible.mask, record["out/causal_mask_w8"][:, :15].bool())
    assert not record["out/causal_mask_w8"][:, 15].any()  # the last token is seen by none of its block: left out
    values, _, pairs = visible.distances
    assert torch.equal(values[pairs], -record["out/relative_position_w8"][:, :15].long())


COUNTS = {  # millions of parameters without the embedding table: plain 12 layers, plain 13, fixed:skip, lstm:dual
    "small_37M": (37.8, 40.9, 40.4, 45.6),
    "small_75M": (75.5, 81.8, 80.2, 90.7),
    "medium_150M": (151.0, 163.6, 160.5, 181.4),
    "medium_300M": (302.0, 327.2, 319.8, 361.8),
    "large_600M": (604.0, 654.4, 639.7, 723.6),
    "large_1200M": (1208.0, 1308.7, 1277.2, 1445.0),
}
CASES = [
    (size, variant, {"depth": depth}, count)
    for size, counts in COUNTS.items()
    for (variant, depth), count in zip((("slide", 12), ("xl", 13), ("fixed:skip", 12), ("lstm:dual", 12)), counts)
] + [
    ("medium_150M", "fixed:dual", {}, 168.9),
    ("medium_150M", "fixed:single", {}, 170.9),
    ("medium_150M", "lstm:single", {}, 179.3),
    ("medium_150M", "lstm:skip", {}, 164.7),
    ("tall_24L", "fixed:skip", {}, 1279.4),
]


@pytest.mark.parametrize("size, variant, options, millions", CASES)
def test_the_sizes_of_the_paper_have_the_counts_of_their_code(size, variant, options, millions):
    with torch.device("meta"):
        model = BlockRecurrentTransformer.paper(size, variant, **options)
    count = sum(parameter.numel() for parameter in model.parameters()) - model.token_emb.weight.numel()
    assert round(count / 1e6, 1) == millions


def test_initial_values_have_the_spread_of_their_code():
    torch.manual_seed(0)
    model = BlockRecurrentTransformer.paper("small_37M", "lstm:dual", num_tokens=256, depth=3)
    cell, update = model.layers[0].cell, model.layers[0].cell.update
    for linear, scale in ((model.layers[0].to_qkv, 1), (cell.to_kv, 1), (update.gate.to_forget, 0.1)):
        weight = linear.weight
        assert abs(weight.std() * weight.shape[1] ** 0.5 / scale**0.5 - 1) < 0.02
        assert weight.abs().max() <= 2 * (scale / weight.shape[1]) ** 0.5 / 0.87962
    assert abs(model.token_emb.weight.std() - 1) < 0.02 and abs(cell.ids.std() - 1) < 0.02
    assert abs(cell.initial.std() - 0.1) < 0.005 and abs(update.gate.to_input.bias.std() - 0.1) < 0.01
    assert abs(model.layers[0].position_bias.table.std() * 32**0.5 - 1) < 0.15


@pytest.mark.parametrize("size, variant", [("huge", "fixed:skip"), ("small", "fixed:skop")])
def test_unknown_sizes_and_variants_are_named(size, variant):
    with pytest.raises(ValueError, match="huge|fixed:skop"):
        BlockRecurrentTransformer.paper(size, variant)
