"""The sampler against its formulas, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor

from block_recurrent_transformer_pytorch.sampling import Sampler

# Multiples of 1/8 in a small range: far enough apart that rounding decides nothing, and with ties unless `unique`.
LOGITS = st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=1, max_size=12, unique=True)
TIED = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)
SHARE = st.floats(0.01, 0.99)


def kept(sampler: Sampler, logits: list[float]) -> set[int]:
    """The tokens that a sampler leaves; their logits are unchanged and all others -inf."""
    row = torch.tensor([logits], dtype=torch.float64)
    left = sampler.filtered(row)[0]
    found = {i for i, value in enumerate(left.tolist()) if value != -math.inf}
    assert all(left[i] == row[0, i] for i in found)
    return found


def by_rank(logits: list[float]) -> list[int]:
    """Tokens from the most likely down."""
    return sorted(range(len(logits)), key=lambda i: -logits[i])


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(value - max(logits)) for value in logits]
    return [weight / sum(weights) for weight in weights]


def nucleus(logits: list[float], p: float) -> set[int]:
    """The smallest set of most likely tokens whose probabilities add up to p."""
    probabilities, chosen, total = softmax(logits), set(), 0.0
    for token in by_rank(logits):
        if total >= p:
            break
        chosen.add(token)
        total += probabilities[token]
    return chosen


def is_close_call(logits: list[float], p: float) -> bool:
    """Whether rounding decides who belongs to the nucleus."""
    total, probabilities = 0.0, softmax(logits)
    sums = [total := total + probabilities[token] for token in by_rank(logits)]
    return any(abs(s - p) < 1e-9 for s in sums)


# -------------------------------------------------------------------------------------------------------------- filters


@settings(max_examples=examples(100))
@given(LOGITS, st.integers(1, 15))
def test_top_k(logits, k):
    assert kept(Sampler(top_k=k), logits) == set(by_rank(logits)[:k])


@settings(max_examples=examples(100))
@given(LOGITS, st.floats(0, 0.999))
def test_filter_thres(logits, threshold):
    """The rule of 0.4.4: the ceil((1 - threshold) vocabulary) most likely ones."""
    count = math.ceil((1 - threshold) * len(logits))
    assert kept(Sampler(filter_thres=threshold), logits) == set(by_rank(logits)[:count])


@pytest.mark.parametrize(
    ("vocabulary", "threshold", "count"),
    [(256, 0.9, 26), (10, 0.9, 1), (20, 0.9, 2), (3, 0.5, 2), (7, 0, 7), (5, 0.999, 1)],
)
def test_filter_thres_counts(vocabulary, threshold, count):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)).tolist()
    assert len(kept(Sampler(filter_thres=threshold), logits)) == count


@settings(max_examples=examples(100))
@given(LOGITS, SHARE)
def test_top_p(logits, p):
    if not is_close_call(logits, p):
        assert kept(Sampler(top_p=p), logits) == nucleus(logits, p)


@settings(max_examples=examples(100))
@given(LOGITS, SHARE)
def test_min_p(logits, share):
    probabilities = softmax(logits)
    close = any(abs(p - share * max(probabilities)) < 1e-9 for p in probabilities)
    wanted = {i for i, p in enumerate(probabilities) if p >= share * max(probabilities)}
    assert close or kept(Sampler(min_p=share), logits) == wanted


@settings(max_examples=examples(100))
@given(LOGITS, st.none() | st.integers(1, 12), st.none() | SHARE, st.none() | SHARE)
def test_filters_in_their_order(logits, k, p, share):
    """Each one on what the one before left: the nucleus is that of the renormalised rest."""
    left = by_rank(logits)[:k]
    if p is not None:
        if is_close_call([logits[i] for i in left], p):
            return
        left = [left[i] for i in sorted(nucleus([logits[i] for i in left], p))]
    if share is not None:
        best = max(logits[i] for i in left)
        if any(abs(math.exp(logits[i] - best) - share) < 1e-9 for i in left):
            return
        left = [i for i in left if math.exp(logits[i] - best) >= share]
    assert kept(Sampler(top_k=k, top_p=p, min_p=share), logits) == set(left)


@settings(max_examples=examples(50))
@given(TIED, st.integers(1, 12), SHARE)
def test_ties_leave_the_right_number_of_likely_ones(logits, k, p):
    best = sorted(logits, reverse=True)
    assert sorted((logits[i] for i in kept(Sampler(top_k=k), logits)), reverse=True) == best[:k]
    assert 0 in {best.index(logits[i]) for i in kept(Sampler(top_p=p), logits)}


@pytest.mark.parametrize(
    "sampler", [Sampler(), Sampler(top_k=9), Sampler(top_p=1.0), Sampler(min_p=0.0), Sampler(filter_thres=0.0)]
)
def test_filters_that_keep_everything(sampler):
    assert kept(sampler, [0.0, -300.0, 5.0, 1.0]) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "sampler", [Sampler(top_k=1), Sampler(top_p=1e-9), Sampler(min_p=1.0), Sampler(filter_thres=0.99)]
)
def test_filters_that_keep_the_best_one(sampler):
    assert kept(sampler, [0.0, -3.0, 5.0, 1.0]) == {2}


def test_rows_are_filtered_one_by_one():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    for sampler in (Sampler(top_k=3), Sampler(top_p=0.6), Sampler(min_p=0.3), Sampler(top_k=5, top_p=0.7, min_p=0.1)):
        together = sampler.filtered(logits)
        assert torch.equal(together, torch.cat([sampler.filtered(row[None]) for row in logits]))


# --------------------------------------------------------------------------------------------- temperature and penalty


def frequencies(sampler: Sampler, logits: Tensor, draws: int = 20000, seen: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    rows = logits.expand(draws, -1)
    tokens = sampler(rows, None if seen is None else seen.expand(draws, -1), generator)
    return torch.bincount(tokens, minlength=len(logits)).double()


def assert_frequencies(counts: Tensor, probabilities: Tensor) -> None:
    """Nothing drawn that cannot be, and chi-square within five standard deviations of its mean."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * counts.sum()
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)


SKEWED = torch.tensor([1.0, 0.5, 0.0, -0.5, 2.0, -1.0, 1.5])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_softmax_probabilities(temperature):
    counts = frequencies(Sampler(temperature=temperature), SKEWED)
    assert_frequencies(counts, (SKEWED / temperature).softmax(-1))


def test_frequencies_tell_temperatures_apart():
    """The test above would see a temperature that is 10 % wrong."""
    with pytest.raises(AssertionError):
        assert_frequencies(frequencies(Sampler(temperature=1.1), SKEWED), SKEWED.softmax(-1))


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"filter_thres": 0.5}, {"top_k": 5, "top_p": 0.9}]
)
def test_frequencies_of_what_is_kept(options):
    sampler = Sampler(**options)
    assert_frequencies(frequencies(sampler, SKEWED), sampler.filtered(SKEWED[None])[0].softmax(-1))


def test_temperature_acts_before_the_filters():
    """A hot distribution has a larger nucleus."""
    assert_frequencies(
        frequencies(Sampler(temperature=3.0, top_p=0.5), SKEWED),
        Sampler(top_p=0.5).filtered(SKEWED[None] / 3)[0].softmax(-1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_greedy(dtype):
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(2)).to(dtype)
    tokens = Sampler(temperature=0)(logits)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(Sampler(temperature=0, top_k=2, top_p=0.3, min_p=0.1)(logits), tokens)
    assert torch.equal(Sampler(temperature=1e-4)(logits.double()), logits.double().argmax(-1))


@pytest.mark.parametrize("temperature", [1e-37, 1e-300])
def test_hardly_any_temperature_is_greedy(temperature):
    logits = torch.tensor([[50.0, 100.0, 70.0]])
    assert Sampler(temperature=temperature)(logits, None, torch.Generator().manual_seed(0)).item() == 1


def test_bf16_logits_are_sampled_in_fp32():
    """8 bits of noise would make some tokens impossible."""
    logits = torch.zeros(2048).to(torch.bfloat16)
    tokens = Sampler()(logits.expand(8000, -1), None, torch.Generator().manual_seed(3))
    assert len(tokens.unique()) > 0.95 * 2048


@settings(max_examples=examples(50))
@given(LOGITS, st.integers(0, 2**12 - 1), st.sampled_from([0.5, 1.0, 1.3, 4.0]))
def test_repetition_penalty(logits, bits, penalty):
    """Keskar et al. 2019: a logit of a seen token is divided where positive, multiplied where negative."""
    seen = [bool(bits >> i & 1) for i in range(len(logits))]
    punished = [(x / penalty if x > 0 else x * penalty) if is_seen else x for x, is_seen in zip(logits, seen)]
    token = int(Sampler(temperature=0, repetition_penalty=penalty)(torch.tensor([logits]), torch.tensor([seen])))
    assert punished[token] == pytest.approx(max(punished))


def test_repetition_penalty_changes_frequencies():
    seen = torch.tensor([True, False, True, True, True, False, False])
    punished = torch.where(seen, torch.where(SKEWED > 0, SKEWED / 2, SKEWED * 2), SKEWED)
    assert_frequencies(frequencies(Sampler(repetition_penalty=2.0), SKEWED, seen=seen), punished.softmax(-1))
    assert_frequencies(frequencies(Sampler(repetition_penalty=1.0), SKEWED, seen=seen), SKEWED.softmax(-1))


# ---------------------------------------------------------------------------------------------------------- randomness


def test_a_generator_decides():
    logits = torch.randn(40, 100, generator=torch.Generator().manual_seed(4))

    def draw(seed: int) -> Tensor:
        return Sampler()(logits, None, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    state = torch.get_rng_state()
    draw(0)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
    torch.manual_seed(5)
    ours = Sampler()(logits)
    torch.manual_seed(5)
    assert torch.equal(Sampler()(logits), ours)  # and is the one without


def test_logits_are_not_changed():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(6))
    before, seen = logits.clone(), torch.ones(3, 9, dtype=torch.bool)
    Sampler(temperature=0.7, repetition_penalty=1.5, top_k=4, top_p=0.9, min_p=0.1)(logits, seen)
    assert torch.equal(logits, before)
    assert seen.all()


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"filter_thres": 0.5}, {}])
def test_extreme_logits(options):
    """Also tokens that a caller has ruled out with -inf."""
    logits = torch.tensor([[-math.inf, 1e30, -1e30, 3.0], [0.0, -math.inf, -math.inf, -math.inf]])
    tokens = Sampler(**options)(logits, None, torch.Generator().manual_seed(8))
    assert tokens.tolist() == [1, 0]
