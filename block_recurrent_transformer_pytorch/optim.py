"""What turns gradients into steps: learning-rate schedules, the authors' Adafactor, loss scales, weight-decay groups.

Sources: the training code of the Block-Recurrent Transformer (Hutchins et al. 2022, arXiv 2203.07852; repository
google-research/meliad), whose recorded numbers the tests compare against, and Adafactor (Shazeer & Stern 2018,
arXiv 1804.04235) in the form that the optax library gives it.

Every schedule is a plain function of the step. Its factor is relative to `base`, the learning rate at the peak:

    lr = schedule("cosine", base=3e-4, warmup=1000, max_steps=100_000)             # lr(step), standalone
    LambdaLR(AdamW(params, lr=3e-4), schedule("cosine", warmup=1000, max_steps=100_000))
    LambdaLR(Adafactor(params), meliad_schedule("lr_rsqrt_decay_std", max_steps=500_000))   # as the paper
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Schedule = Callable[[int], float]

MIN_RSQRT_STEP = 100  # the authors' floor under 1/sqrt(step): no division by zero, no absurd rate without a warmup


# 1 schedules: step -> factor of the peak rate


def constant(step: int, max_steps: int) -> float:
    """1 at every step."""
    return 1.0


def exponential(step: int, max_steps: int, *, end: float) -> float:
    """end^(step / max_steps): from 1 down to `end` at max_steps, and on at the same pace."""
    return float(end ** (step / max_steps))


def linear(step: int, max_steps: int, *, end: float) -> float:
    """A straight line from 1 to `end` at max_steps, then halved every max_steps."""
    if step >= max_steps:
        return _halving(step, max_steps, end)
    return end + (1 - end) * (1 - step / max_steps)


def cosine(step: int, max_steps: int, *, end: float) -> float:
    """Half a cosine wave from 1 to `end` at max_steps (Hoffmann et al. 2022), then halved every max_steps."""
    if step >= max_steps:
        return _halving(step, max_steps, end)
    return end + (1 - end) * (1 + math.cos(math.pi * step / max_steps)) / 2


def cosine_spike(step: int, max_steps: int, *, end: float, spike: float, spike_steps: int) -> float:
    """`cosine`, or a line from `spike` to 0 at spike_steps where that is higher: a short time of a higher rate."""
    wave = cosine(step, max_steps, end=end)
    return wave if step >= max_steps else max(wave, spike * (1 - step / spike_steps))


def rsqrt(step: int, max_steps: int, *, start: int) -> float:
    """sqrt(start / step): 1 up to step `start`, no end. The paper's schedule, with start = the warmup."""
    return math.sqrt(start / max(step, start))


def rsqrt_to_end(step: int, max_steps: int, *, end: float) -> float:
    """end * sqrt(max_steps / step), at most 1: the same curve, placed so that it passes `end` at max_steps."""
    return min(1.0, end * math.sqrt(max_steps / max(step, MIN_RSQRT_STEP)))


def _halving(step: int, max_steps: int, end: float) -> float:
    """`end` at max_steps and half as much after every further max_steps."""
    return float(end * 2 ** (1 - step / max_steps))


def schedule(
    name: str,
    *,
    max_steps: int,
    base: float = 1.0,
    warmup: int = 0,
    end: float = 0.1,
    spike: float = 4.0,
    spike_steps: int = 10_000,
) -> Schedule:
    """A learning-rate schedule by name: lr(step) = base * shape(max(step, warmup)) * min(step, warmup) / warmup.

    Step 0 of a warmup has the rate 0 (as the authors have it): count from 1 if the first step is to move anything.

    Args:
        name: "cosine", "linear", "exponential", "constant", "rsqrt", "rsqrt_to_end" or "cosine_spike".
        max_steps: length of the decay in optimizer steps.
        base: the rate at the peak. Leave it 1 under `LambdaLR`, which multiplies by the optimizer's own rate.
        warmup: steps of the linear rise from 0; 0 for none.
        end: factor reached at max_steps; 0 only for "cosine", "cosine_spike" and "linear". "constant" and "rsqrt" have
            no end and do not read it.
        spike, spike_steps: height (a factor) and length (steps) of the spike; only "cosine_spike" reads them.

    Returns:
        A pure function from the step (an int from 0) to the rate.

    Raises:
        ValueError: an unknown name, or numbers outside their range.
    """
    _check_schedule(max_steps, base, warmup, end, spike, spike_steps)
    shapes: dict[str, Schedule] = {
        "constant": lambda step: constant(step, max_steps),
        "exponential": lambda step: exponential(step, max_steps, end=end),
        "linear": lambda step: linear(step, max_steps, end=end),
        "cosine": lambda step: cosine(step, max_steps, end=end),
        "cosine_spike": lambda step: cosine_spike(step, max_steps, end=end, spike=spike, spike_steps=spike_steps),
        "rsqrt": lambda step: rsqrt(step, max_steps, start=max(warmup, MIN_RSQRT_STEP)),
        "rsqrt_to_end": lambda step: rsqrt_to_end(step, max_steps, end=end),
    }
    if name not in shapes:
        raise ValueError(f"schedule {name!r} is unknown, choose one of {', '.join(shapes)}")
    if end == 0 and name in ("exponential", "rsqrt_to_end"):
        raise ValueError(f"end={end} must be above 0 for schedule {name!r}")
    shape = shapes[name]

    def rate(step: int) -> float:
        if step < 0:
            raise ValueError(f"step={step} must not be negative")
        rise = min(step, warmup) / warmup if warmup else 1.0
        return base * shape(max(step, warmup)) * rise

    return rate


def _check_schedule(max_steps: int, base: float, warmup: int, end: float, spike: float, spike_steps: int) -> None:
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps} must be at least 1")
    if not 0 <= warmup <= max_steps:
        raise ValueError(f"warmup={warmup} must lie between 0 and max_steps={max_steps}")
    if not 0 <= base < math.inf:
        raise ValueError(f"base={base} must be finite and not negative")
    if not 0 <= end <= 1:
        raise ValueError(f"end={end} must lie in [0, 1]")
    if not 1 < spike < math.inf or spike_steps < 1:
        raise ValueError(f"spike={spike} must be above 1 and spike_steps={spike_steps} at least 1")


def meliad_schedule(name: str, *, max_steps: int, warmup: int = 1000) -> Schedule:
    """The authors' schedules by their own names and with their defaults, as absolute rates for Adafactor(lr=1).

    Their release trains with "lr_cosine_decay" (0.01 to 0.001); their code says that the paper used
    "lr_rsqrt_decay_std", 1/sqrt(step), which is 0.0316 at the end of a warmup of 1000 steps.

    Args:
        name: "lr_cosine_decay", "lr_cosine_decay_spike", "lr_linear_decay", "lr_exponential_decay", "lr_constant",
            "lr_rsqrt_decay" or "lr_rsqrt_decay_std".
        max_steps: length of the decay in optimizer steps.
        warmup: steps of the linear rise from 0.

    Raises:
        ValueError: an unknown name, or numbers outside their range.
    """
    settings: dict[str, tuple[str, float, float]] = {  # name, base, end
        "lr_cosine_decay": ("cosine", 0.01, 0.1),
        "lr_cosine_decay_spike": ("cosine_spike", 0.01, 0.1),
        "lr_linear_decay": ("linear", 0.01, 0.1),
        "lr_exponential_decay": ("exponential", 0.01, 0.1),
        "lr_constant": ("constant", 0.01, 0.1),
        "lr_rsqrt_decay": ("rsqrt_to_end", 0.05, 0.02),
        "lr_rsqrt_decay_std": ("rsqrt", 1 / math.sqrt(max(warmup, MIN_RSQRT_STEP)), 0.1),
    }
    if name not in settings:
        raise ValueError(f"schedule {name!r} is unknown, choose one of {', '.join(settings)}")
    shape, base, end = settings[name]
    return schedule(shape, base=base, warmup=warmup, max_steps=max_steps, end=end)


# 2 Adafactor


class Adafactor(Optimizer):
    """Adafactor as the authors trained with it: factored second moments, clipped and scaled steps, momentum.

    For the gradient g of a parameter p at step t = 0, 1, ...:

        beta = 1 - (t + 1)^-decay                       g2 = g^2 + eps
        v    = beta v + (1 - beta) g2                   u = g / sqrt(v)
        row, column = the same averages of the means of g2 over either of its two largest dimensions, in place of v
               where both have at least `min_dim_to_factor` entries     u = g / sqrt(row / mean(row) * column)
        u    = u / max(1, RMS(u) / clip) * lr * max(min_scale, RMS(p))
        m    = momentum m + (1 - momentum) u            p = p - m

    No other Adafactor was found to give these numbers: `torch.optim.Adafactor` has no momentum, bounds lr by 1/sqrt(t)
    and factors every matrix; that of transformers factors every matrix too; those of timm do not scale by RMS(p).

    Averages are kept in at least float32, also for parameters of half precision, and stay so in a state dict.
    Parameters without a gradient are left alone. There is no weight decay.

    Args:
        params: parameters or parameter groups; a group may override every setting below.
        lr: factor of the step relative to RMS(p). 1, so that a schedule's value is the rate itself.
        momentum: decay of the average of the steps, without bias correction; 0 keeps no such average.
        decay: exponent of the second moment's averaging.
        clip: largest RMS of a step before it is scaled.
        eps: added to the squared gradient.
        min_scale: smallest RMS that a parameter is taken to have.
        min_dim_to_factor: both of the two largest dimensions must have this many entries to be factored.

    Raises:
        ValueError: a setting outside its range; at a step, a sparse or complex gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        decay: float = 0.8,
        clip: float = 1.0,
        eps: float = 1e-30,
        min_scale: float = 1e-3,
        min_dim_to_factor: int = 128,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "decay": decay,
            "clip": clip,
            "eps": eps,
            "min_scale": min_scale,
            "min_dim_to_factor": min_dim_to_factor,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with its own settings where it has any.

        Raises:
            ValueError: a setting outside its range, or a weight decay.
        """
        _check_adafactor({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient; returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse or gradient.is_complex():
            raise ValueError(f"Adafactor needs dense real gradients, got {gradient.layout} {gradient.dtype}")
        dtype = _state_dtype(parameter)
        gradient = gradient.to(dtype)
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1

        update = _normalised(gradient, state, group)
        update.div_((_rms(update) / group["clip"]).clamp(min=1.0))
        update.mul_(group["lr"] * _rms(parameter.to(dtype)).clamp(min=group["min_scale"]))
        if group["momentum"]:
            update = _average(state, "momentum", update, 1 - group["momentum"])
        parameter.sub_(update)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state as `Optimizer` does, but keeps averages of half-precision parameters in float32."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    dtype = _state_dtype(parameter)
                    self.state[parameter][name] = value.to(device=parameter.device, dtype=dtype, copy=True)


def _normalised(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The gradient divided by the root of its averaged square, which `state` remembers."""
    weight = state["step"] ** -group["decay"]  # 1 - beta; 1 at the first step, which thus forgets the zeros
    squared = gradient.square().add_(group["eps"])
    dims = _factored_dims(gradient.shape, group["min_dim_to_factor"])
    if dims is None:
        return _average(state, "square", squared, weight).rsqrt().mul_(gradient)

    first, second = dims
    row = _average(state, "row", squared.mean(second, keepdim=True), weight)
    column = _average(state, "column", squared.mean(first, keepdim=True), weight)
    return gradient * (row / row.mean(first, keepdim=True)).rsqrt() * column.rsqrt()


def _average(state: dict[str, Any], name: str, value: Tensor, weight: float) -> Tensor:
    """Moves the average `name` by `weight` towards `value`; it starts at zero. Returns the remembered tensor."""
    if name not in state:
        state[name] = value.new_zeros(value.shape)
    average: Tensor = state[name].lerp_(value, weight)
    return average


def _factored_dims(shape: torch.Size, min_dim: int) -> tuple[int, int] | None:
    """The two largest dimensions, or None where the smaller of them has fewer than `min_dim` entries."""
    if len(shape) < 2:
        return None
    first, second = sorted(sorted(range(len(shape)), key=lambda dim: shape[dim])[-2:])
    return (first, second) if min(shape[first], shape[second]) >= min_dim else None


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _check_adafactor(group: dict[str, Any]) -> None:
    if not 0 <= group["lr"] < math.inf:
        raise ValueError(f"lr={group['lr']} must be finite and not negative")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum={group['momentum']} must lie in [0, 1)")
    for name in ("decay", "clip", "eps", "min_scale"):
        if not 0 < group[name] < math.inf:
            raise ValueError(f"{name}={group[name]} must be finite and above 0")
    if group["min_dim_to_factor"] < 1:
        raise ValueError(f"min_dim_to_factor={group['min_dim_to_factor']} must be at least 1")
    if group.get("weight_decay", 0):
        raise ValueError(f"weight_decay={group['weight_decay']}: the authors' Adafactor has none, set it to 0")


def make(name: str, groups: list[dict[str, Any]], *, lr: float, betas: list[float]) -> Optimizer:
    """ "adamw", or the authors' "adafactor", which has neither betas nor a weight decay, for groups of parameters."""
    if name == "adafactor":
        return Adafactor([{"params": group["params"]} for group in groups], lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]))


# 3 precision


def multiplies_bf16(device: str) -> bool:
    """Whether a "cpu" (with AMX or AVX512-BF16) or "cuda" multiplies matrices of bf16 faster than of fp32."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    questions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in questions)


def weight_type(precision: str) -> torch.dtype:
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device, types[precision]) if precision in types else nullcontext()


class LossScale:
    """The factor that keeps small gradients within fp16: halved when one overflows, doubled after 2,000 without."""

    def __init__(self, enabled: bool) -> None:
        self.value, self.streak, self.enabled = 2.0**16 if enabled else 1.0, 0, enabled

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        self.streak = self.streak + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.streak % 2000 == 0:
            self.value *= 2


# 4 a step


def step(optimizer: Optimizer, *, lr: float, clip: float, scale: LossScale) -> tuple[float, bool]:
    """Moves the parameters, unless the gradient is not finite, and forgets the gradients.

    Args:
        optimizer: its parameters have the gradients of a loss that was multiplied by `scale.value`.
        lr: the rate of this step.
        clip: largest norm of the gradient; 0: any.
        scale: learns whether the gradient was finite.

    Returns:
        The norm of the gradient before clipping, and whether it was finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    total = nn.utils.clip_grad_norm_(parameters, clip * scale.value if clip else math.inf)
    norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total) / scale.value
    finite = math.isfinite(norm)
    if finite:
        if scale.value != 1:
            torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], scale.value)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scale.update(finite)
    return norm, finite


# 5 weight decay


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that are trained, in two groups for AdamW: those that decay, and those that do not.

    Matrices decay: projections, feed-forwards, convolutions, and embeddings too, as in GPT-2 (where the table is tied
    to the output it is one). What has fewer than two dimensions does not: gains of norms, biases, gates of one vector,
    attention scales. Nor does what is marked, whatever its shape, in either of two ways:

        module._no_weight_decay = ("state_ids", "initial_state")     names of the module's own parameters
        parameter._no_weight_decay = True                            lost by deepcopy, to_empty and fully_shard

    Args:
        model: any module, also one that is sharded or wrapped.
        weight_decay: decay of the first group, per step and relative to the learning rate.

    Returns:
        Always two groups, each parameter in exactly one of them and tied ones once, in the order of `named_parameters`;
        those without requires_grad in none.
        A parameter that is tied to a marked one counts as marked.

    Raises:
        ValueError: a negative or non-finite decay, or a module that marks a name that is none of its parameters.
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay} must be finite and not negative")
    exempt = {id(parameter) for module in model.modules() for parameter in _marked(module)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        decays = parameter.dim() >= 2 and id(parameter) not in exempt
        (decayed if decays else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _marked(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters that it, or the parameter itself, says are not to decay."""
    own = module._parameters  # with the absent (None) ones
    names = inspect.getattr_static(module, "_no_weight_decay", ())  # static: a wrapper may forward to what it wraps
    unknown = sorted(set(names) - set(own))
    if unknown:
        raise ValueError(f"{type(module).__name__}._no_weight_decay names {unknown}, its parameters are {sorted(own)}")
    return [p for name, p in own.items() if p is not None and (name in names or getattr(p, "_no_weight_decay", False))]
