"""Schedules and Adafactor against the authors' recorded numbers; the groups of weight decay.

golden/lr_schedules.npz: 18 steps of seven schedules, warmup 1000, max_steps 100,000. golden/adafactor.npz: four steps
of four parameters, of which `out/big` and `out/tall` hold every 20th row.
"""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from block_recurrent_transformer_pytorch.optim import Adafactor, meliad_schedule, parameter_groups, schedule

GOLDEN = Path(__file__).parent / "golden"
RATES = dict(np.load(GOLDEN / "lr_schedules.npz"))
ADAFACTOR = dict(np.load(GOLDEN / "adafactor.npz"))
NAMES = ("big", "small", "vec", "tall")
STEPS = 4


# schedules


@pytest.mark.parametrize("name", [key.removeprefix("out/") for key in RATES if key.startswith("out/")])
def test_schedules_give_the_recorded_rates(name):
    rate = meliad_schedule(name, max_steps=100_000, warmup=1000)
    rates = [rate(int(step)) for step in RATES["in/step"]]
    np.testing.assert_allclose(rates, RATES[f"out/{name}"], rtol=3e-7)


@pytest.mark.parametrize("name", ["cosine", "linear", "rsqrt", "constant"])
def test_base_is_the_rate_after_the_warmup(name):
    rate = schedule(name, base=3e-4, warmup=200, max_steps=10_000_000)
    assert rate(0) == 0
    assert rate(100) == pytest.approx(1.5e-4, rel=1e-3)
    assert rate(200) == pytest.approx(3e-4, rel=1e-3)
    assert schedule(name, base=3e-4, max_steps=1000)(0) == 3e-4


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential", "rsqrt_to_end"])
def test_end_is_reached_at_max_steps(name):
    rate = schedule(name, base=2.0, warmup=100, max_steps=1000, end=0.05)
    assert rate(1000) == pytest.approx(0.1)
    assert rate(999) == pytest.approx(0.1, rel=3e-2)
    assert rate(2000) < 0.1


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_to_zero_stays_at_zero(name):
    rate = schedule(name, max_steps=10, end=0.0)
    assert [rate(10), rate(25)] == [0, 0] and rate(9) > 0


def test_schedule_through_lambda_lr():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=3e-4)
    scheduler = LambdaLR(optimizer, schedule("cosine", warmup=3, max_steps=10))
    rate = schedule("cosine", base=3e-4, warmup=3, max_steps=10)
    for step in range(15):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(step), rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"name": "triangle"}, "triangle.*cosine"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"warmup": 101}, "warmup=101.*max_steps=100"),
        ({"base": -1.0}, "base=-1"),
        ({"base": math.nan}, "base=nan"),
        ({"end": 1.5}, "end=1.5"),
        ({"name": "exponential", "end": 0.0}, "end=0.*exponential"),
        ({"spike": 0.5}, "spike=0.5"),
        ({"spike_steps": 0}, "spike_steps=0"),
    ],
)
def test_schedule_says_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        schedule(**{"name": "cosine", "max_steps": 100, **wrong})


def test_unknown_names_and_negative_steps():
    with pytest.raises(ValueError, match=r"cosine.*lr_cosine_decay"):
        meliad_schedule("cosine", max_steps=100)
    with pytest.raises(ValueError, match="step=-1"):
        schedule("constant", max_steps=100)(-1)


# Adafactor


def recorded(key, dtype=torch.float32):
    return torch.tensor(ADAFACTOR[key]).to(dtype)


def fresh(dtype=torch.float32):
    return {name: nn.Parameter(recorded(f"param/{name}", dtype)) for name in NAMES}


def run(parameters, optimizer, steps):
    """Takes the recorded steps; returns each parameter after each of them, in the recorded rows."""
    after = {}
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = float(ADAFACTOR[f"in/lr/{step}"])
        for name, parameter in parameters.items():
            parameter.grad = recorded(f"in/grad_{name}/{step}", parameter.dtype)
        optimizer.step()
        for name, parameter in parameters.items():
            after[name, step] = parameter.detach()[:: 20 if name in ("big", "tall") else 1].clone()
    return after


def error(after, names=NAMES):
    """The largest error over all steps, relative to how far the recorded parameters moved."""
    errors = []
    for name in names:
        start = recorded(f"param/{name}")[:: 20 if name in ("big", "tall") else 1]
        moved = (recorded(f"out/{name}/{STEPS - 1}") - start).square().mean().sqrt()
        errors += [(after[name, step] - recorded(f"out/{name}/{step}")).abs().max() / moved for step in range(STEPS)]
    return float(max(errors))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-4), (torch.float64, 3e-3)])  # recorded in float32
def test_adafactor_gives_the_recorded_parameters(dtype, bound):
    parameters = fresh(dtype)
    after = run(parameters, Adafactor(parameters.values()), range(STEPS))
    assert error(after) < bound


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.0},
        {"decay": 0.5},
        {"clip": 2.0},
        {"min_scale": 0.5},
        {"min_dim_to_factor": 129},
        {"min_dim_to_factor": 8},
    ],
)
def test_every_setting_matters(change):
    parameters = fresh()
    after = run(parameters, Adafactor(parameters.values(), **change), range(STEPS))
    assert error(after) > 3e-2


def test_maintained_adafactor_of_torch_differs():
    """Should this fail one day, torch's own can take the place of ours."""
    parameters = fresh()
    after = run(parameters, torch.optim.Adafactor(parameters.values(), eps=(1e-30, 1e-3)), range(STEPS))
    assert all(error(after, [name]) > 0.1 for name in NAMES)


def test_averages_are_factored_where_both_dimensions_are_large():
    parameters = fresh()
    optimizer = Adafactor(parameters.values())
    run(parameters, optimizer, [0])
    shapes = {n: {k: tuple(v.shape) for k, v in optimizer.state[parameters[n]].items() if k != "step"} for n in NAMES}
    assert shapes["big"] == {"row": (160, 1), "column": (1, 128), "momentum": (160, 128)}
    assert shapes["tall"] == {"square": (300, 8), "momentum": (300, 8)}


def test_factors_of_a_convolution_are_its_two_largest_dimensions():
    weight = nn.Parameter(torch.randn(6, 3, 5))
    optimizer = Adafactor([weight], min_dim_to_factor=5)
    weight.grad = torch.randn(6, 3, 5)
    optimizer.step()
    squared = weight.grad.square() + 1e-30
    torch.testing.assert_close(optimizer.state[weight]["row"], squared.mean(2, keepdim=True))
    torch.testing.assert_close(optimizer.state[weight]["column"], squared.mean(0, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_bitwise(dtype):
    straight = fresh(dtype)
    expected = run(straight, Adafactor(straight.values()), range(STEPS))

    first = fresh(dtype)
    optimizer = Adafactor(first.values())
    run(first, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    second = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    resumed = Adafactor(second.values())
    resumed.load_state_dict(saved)
    before = copy.deepcopy(saved)
    actual = run(second, resumed, range(2, STEPS))

    for key, value in actual.items():
        assert torch.equal(value, expected[key])
    for index, state in saved["state"].items():  # the caller's dict is not written to, and averages are float32
        for name, value in state.items():
            if name != "step":
                assert value.dtype == torch.float32
                assert torch.equal(value, before["state"][index][name])


def test_parameters_without_gradient_are_left_alone():
    still, moving = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Adafactor([still, moving])
    moving.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3)) and still not in optimizer.state
    assert not torch.equal(moving, torch.ones(3))


def test_zero_gradients_and_scalars_stay_finite():
    parameters = [nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(130, 130))]
    optimizer = Adafactor(parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in parameters)


def test_closure_and_scheduler():
    parameter = nn.Parameter(torch.ones(4))
    optimizer = Adafactor([parameter])
    scheduler = LambdaLR(optimizer, meliad_schedule("lr_rsqrt_decay_std", max_steps=10_000))

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.detach()

    losses = []
    for _ in range(5):
        losses.append(float(optimizer.step(closure)))
        scheduler.step()
    assert losses[0] == losses[1] == 4.0 and losses[-1] < 4.0  # the rate at step 0 is 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"lr": -1.0}, "lr=-1"),
        ({"lr": math.inf}, "lr=inf"),
        ({"momentum": 1.0}, "momentum=1"),
        ({"decay": 0.0}, "decay=0"),
        ({"clip": 0.0}, "clip=0"),
        ({"eps": -1e-30}, "eps=-1e-30"),
        ({"min_scale": math.nan}, "min_scale=nan"),
        ({"min_dim_to_factor": 0}, "min_dim_to_factor=0"),
    ],
)
def test_adafactor_says_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        Adafactor([nn.Parameter(torch.ones(2))], **wrong)


def test_groups_are_checked_when_added():
    parameter, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Adafactor([parameter])
    for wrong, message in [({"lr": -1.0}, "lr=-1"), ({"weight_decay": 0.1}, "weight_decay=0.1")]:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [other], **wrong})
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [parameter]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [other], "momentum": 0.0, "weight_decay": 0.0})
    other.grad = torch.ones(2)
    optimizer.step()
    assert "momentum" not in optimizer.state[other]


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        Adafactor(embedding.parameters()).step()


# weight decay


class Recurrent(nn.Module):
    _no_weight_decay = ("state_ids", "absent")

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 2)
        self.state_ids = nn.Parameter(torch.zeros(3, 4))
        self.initial_state = nn.Parameter(torch.zeros(3, 4))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_parameter("absent", None)
        self.to_logits = nn.Linear(4, 7)
        self.to_logits.weight = self.embedding.weight
        self.initial_state._no_weight_decay = True


def named_groups(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def test_groups_hold_every_parameter_once():
    model = Recurrent()
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, kept = named_groups(model, groups)
    assert decayed == ["embedding.weight", "conv.weight"]
    assert kept == ["state_ids", "initial_state", "scale", "norm.weight", "norm.bias", "conv.bias", "to_logits.bias"]
    torch.optim.AdamW(groups)  # raises on a parameter that is in two groups
    model.embedding.requires_grad_(False)
    assert named_groups(model, parameter_groups(model, 0.1)) == [["conv.weight"], kept]


def test_marks_on_the_module_survive_a_copy():
    model = copy.deepcopy(Recurrent())
    decayed, kept = named_groups(model, parameter_groups(model, 0.1))
    assert "state_ids" in kept and "initial_state" in decayed  # a mark on a parameter is lost, as documented


def test_a_tied_parameter_is_marked_by_any_of_its_owners():
    model = Recurrent()
    model.to_logits._no_weight_decay = ("weight",)
    assert named_groups(model, parameter_groups(model, 0.1))[0] == ["conv.weight"]


def test_marks_are_found_below_wrappers_that_forward():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    wrapped = Wrapper(Recurrent())
    assert wrapped._no_weight_decay == ("state_ids", "absent")
    assert "inner.state_ids" in named_groups(wrapped, parameter_groups(wrapped, 0.1))[1]


@pytest.mark.parametrize("decay", [-0.1, math.nan, math.inf])
def test_weight_decay_must_be_sensible(decay):
    with pytest.raises(ValueError, match="weight_decay"):
        parameter_groups(nn.Linear(2, 2), decay)


def test_a_misspelt_mark_is_an_error():
    model = nn.Linear(2, 2)
    model._no_weight_decay = ("wieght",)
    with pytest.raises(ValueError, match=r"Linear.*wieght.*bias.*weight"):
        parameter_groups(model, 0.1)
