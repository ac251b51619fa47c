"""The section of docs/evidence.md on text, and its plot, from the results alone."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .text import ARMS, BLOCK, CONTROL_OF, CURVE, FIRST, RATES, SEGMENT, TABLE, TUNED_AT, bits_at

Results = list[dict[str, Any]]
Curves = dict[tuple[str, int], dict[int, float]]  # bits per byte by tokens read, of each arm and seed

T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's, 95 %
PLOT = "evidence-text.png"
HEAD = f"""
## Does a state help on text?

Measured by `python -m evidence text`. Models of bytes (width 128, four layers, a sliding window of {BLOCK} tokens, 32
states in the third layer where there are any) read {SEGMENT} tokens of each of four documents a step; memories and
states are carried from step to step, gradients end there. AdamW, a rate that is level for 100 steps and then falls with
the root of the steps, chosen for each arm among {", ".join(f"{rate:g}" for rate in sorted(RATES))} by the bits per
byte of the first seed after {TUNED_AT:,} tokens. Validation: 65,536 evenly spaced bytes of unseen documents, always the
same. In brackets 95 % intervals over seeds (Student's t; none where there is one seed), then every seed by
itself. An arm and what it is compared with have the same seed, hence the same text in the same order.
**Below zero, the state helps.**

The controls were *trained* with the state back at its initial value at every block, so that they have the same
parameters and carry nothing: the difference to them is what carrying is worth, the difference to no recurrent layer
what the whole addition is worth.
"""


def load(folder: Path) -> Results:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "text").glob("*.seed*.json"))]
    return [result for result in found if result["setup"]["arm"] in ARMS]


def chosen(results: Results) -> Results:
    """The runs with the rate that went on: of each arm, the best of the first seed after TUNED_AT tokens.

    An arm whose grid is not complete has the best among the rates that all arms were tried with.
    """
    tried: dict[str, dict[float, float]] = {}
    for result in by_seed(results):
        arm, rate, bits = result["setup"]["arm"], result["setup"]["rate"], bits_at(result, TUNED_AT)
        if bits is not None:
            tried.setdefault(arm, {}).setdefault(rate, bits)  # that of the first seed
    common = set(RATES).intersection(*tried.values()) if tried else set()
    best = {}
    for arm, rates in tried.items():
        candidates = set(RATES) if rates.keys() >= set(RATES) else common
        best[arm] = min(candidates, key=rates.__getitem__, default=None)
    return [result for result in results if result["setup"]["rate"] == best.get(result["setup"]["arm"])]


def by_seed(results: Results) -> Results:
    return sorted(results, key=lambda result: int(result["setup"]["seed"]))


def curves(results: Results) -> Curves:
    return {(result["setup"]["arm"], result["setup"]["seed"]):
            {point["tokens"]: point["bits_per_byte"] for point in result["curve"]} for result in results}  # fmt: skip


def differences(found: Curves, arm: str, base: str, tokens: int) -> list[float]:
    """Bits per byte of an arm less those of another, of every seed that has both."""
    seeds = sorted(seed for name, seed in found if name == arm)
    pairs = [(found[arm, seed].get(tokens), found.get((base, seed), {}).get(tokens)) for seed in seeds]
    return [one - other for one, other in pairs if one is not None and other is not None]


def interval(values: list[float]) -> tuple[float, float] | None:
    """Of the mean, by Student's t; None of a single value."""
    if len(values) not in T:
        return None
    half = T[len(values)] * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def cell(values: list[float]) -> str:
    if not values:
        return ""
    around = interval(values)
    seeds = " / ".join(f"{value:+.3f}" for value in values)
    return f"{mean(values):+.3f} [{around[0]:+.3f}, {around[1]:+.3f}] {seeds}" if around else seeds


def columns(found: Curves) -> list[int]:
    """Doublings of FIRST, and the last point of all."""
    every = sorted({tokens for curve in found.values() for tokens in curve})
    return [t for t in every if t & (t - 1) == 0 and t >= FIRST] + [t for t in every[-1:] if t & (t - 1)]


def curve_table(found: Curves) -> list[str]:
    shown = columns(found)
    lines = [f"| tokens read | {' | '.join(f'{t:,}' for t in shown)} |", f"|---|{'---|' * len(shown)}"]
    rows: list[tuple[str, list[str]]] = []
    base = [curve for (arm, _), curve in sorted(found.items()) if arm == "none"]
    rows.append(("no recurrent layer: bits per byte",
                 [" / ".join(f"{curve[t]:.3f}" for curve in base if t in curve) for t in shown]))  # fmt: skip
    for arm in list(CURVE)[1:]:
        rows.append((f"{CURVE[arm].title}, less no recurrent layer",
                     [cell(differences(found, arm, "none", t)) for t in shown]))  # fmt: skip
    for arm, control in CONTROL_OF.items():
        rows.append((f"**{CURVE[arm].title}, less its control**",
                     [cell(differences(found, arm, control, t)) for t in shown]))  # fmt: skip
    return lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows if any(cells)]


def grid_table(results: Results) -> list[str]:
    """All rates that were ever tried, also others than those of the grid."""
    tried = {(r["setup"]["arm"], r["setup"]["seed"], r["setup"]["rate"]): bits_at(r, TUNED_AT) for r in results}
    rates = sorted({rate for _, _, rate in tried})
    lines = [f"\nRates, bits per byte after {TUNED_AT:,} tokens, first seed:\n",
             f"| | {' | '.join(f'{rate:g}' for rate in rates)} |", f"|---|{'---|' * len(rates)}"]  # fmt: skip
    for arm, what in ARMS.items():
        first = min((seed for name, seed, _ in tried if name == arm), default=0)
        found = [tried.get((arm, first, rate)) for rate in rates]
        if any(found):
            lines.append(f"| {what.title} | {' | '.join('' if b is None else f'{b:.3f}' for b in found)} |")
    missing = [arm for arm in ARMS if not all(rate in {r for name, _, r in tried if name == arm} for rate in RATES)]
    if missing:
        lines.append(f"\n**Not tuned yet, so that nothing follows from their figures**: {', '.join(missing)}. An arm "
                     "of these that was begun has the best rate that all begun arms were tried with.")  # fmt: skip
    return lines


def paper_tables(found: Curves, timing: dict[str, Any]) -> list[str]:
    """The paper's Table 1, small: at the most tokens that one seed, and that all seeds have read in every arm of it."""
    have = [arm for arm in TABLE if any(name == arm for name, _ in found)]
    seeds = sorted({seed for name, seed in found if name in have})
    if len(have) < 2:
        return []
    read = {seed: set.intersection(*({*found.get((arm, seed), {})} for arm in have)) for seed in seeds}
    ends = sorted({max(points, default=0) for points in (set.union(*read.values()), set.intersection(*read.values()))})
    return [line for tokens in ends if tokens for line in paper_table(found, have, tokens, timing.get("arms", {}))]


def paper_table(found: Curves, have: list[str], tokens: int, times: dict[str, Any]) -> list[str]:
    base = have[0]
    lines = [f"\n### The paper's Table 1, small: after {tokens:,} tokens\n",
             "Step time: CPU time of a training step over that of the first row, medians of steps in turns "
             "(`python -m evidence text-time`).\n",
             f"| | bits per byte | less {TABLE[base].title} | step time | parameters |",
             "|---|---|---|---|---|"]  # fmt: skip
    for arm in have:
        own = [curve[tokens] for (name, _), curve in sorted(found.items()) if name == arm and tokens in curve]
        less = "" if arm == base else cell(differences(found, arm, base, tokens))
        ratio = f"{times[arm]['median'] / times[base]['median']:.2f}" if {arm, base} <= {*times} else ""
        size = f"{times[arm]['parameters']:,}" if arm in times else ""
        lines.append(f"| {TABLE[arm].title} | {' / '.join(f'{b:.3f}' for b in own)} | {less} | {ratio} | {size} |")
    return lines


def spent(results: Results) -> str:
    points = [point for result in results for point in result["curve"]]
    read = sum(max(point["tokens"] for point in result["curve"]) for result in results if result["curve"])
    seen = {(r["machine"]["processor"], r["machine"]["torch"], r["precision"]) for r in results}
    machines = "; ".join(f"{processor}, torch {torch}, {precision}" for processor, torch, precision in sorted(seen))
    seconds = sum(point["cpu_seconds"] for point in points)
    return (f"\nMeasured on {machines}, one thread: {read:,} tokens read by {len(results)} runs, those of the grid "
            f"included, in {seconds:,.0f} CPU-seconds with validation.")  # fmt: skip


def report(folder: Path, docs: Path) -> list[str]:
    """The section; draws the plot beside it. Empty where nothing was measured."""
    results = load(folder)
    path = folder / "text" / "timing.json"
    timing = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    lines = [HEAD, f"![]({PLOT})"] if results else []
    names = sorted({result["setup"]["data"] for result in results})
    for name in names:
        own = [result for result in results if result["setup"]["data"] == name]
        found = curves(chosen(own))
        if found:
            lines += [f"\n### `{name}`\n", *curve_table(found), *grid_table(own), *paper_tables(found, timing),
                      spent(own)]  # fmt: skip
    if results:
        plot({name: curves(chosen([r for r in results if r["setup"]["data"] == name])) for name in names}, docs)
    return lines


def plot(by_name: dict[str, Curves], docs: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2 * len(by_name), figsize=(5.2 * 2 * len(by_name), 3.8), squeeze=False)
    for i, (name, found) in enumerate(by_name.items()):
        against_none = [(arm, "none", CURVE[arm].title) for arm in list(CURVE)[1:]]
        draw(axes[0][2 * i], found, against_none, f"{name}: less no recurrent layer")
        carried = [(arm, control, CURVE[arm].title) for arm, control in CONTROL_OF.items()]
        draw(axes[0][2 * i + 1], found, carried, f"{name}: less trained with the state reset")
    figure.tight_layout()
    figure.savefig(docs / PLOT, dpi=130)
    plt.close(figure)


def draw(axis: Any, found: Curves, pairs: list[tuple[str, str, str]], title: str) -> None:
    """Differences of pairs of arms: every seed thin, their mean thick, the interval as a band."""
    axis.axhline(0, color="gray", linewidth=0.8)
    for i, (arm, base, label) in enumerate(pairs):
        for seed in sorted(seed for name, seed in found if name == arm):
            only = {key: curve for key, curve in found.items() if key[1] == seed}
            points = [(t, values[0]) for t in sorted(found[arm, seed]) if (values := differences(only, arm, base, t))]
            axis.plot(*zip(*points), color=f"C{i}", linewidth=0.8, alpha=0.5) if points else None
        every = sorted({t for (name, _), curve in found.items() if name == arm for t in curve})
        means = [(t, mean(values)) for t in every if (values := differences(found, arm, base, t))]
        if means:
            axis.plot(*zip(*means), color=f"C{i}", marker=".", label=label)
        bands = [(t, *around) for t in every if (around := interval(differences(found, arm, base, t)))]
        if bands:
            axis.fill_between(*zip(*bands), color=f"C{i}", alpha=0.12)
    axis.set(xscale="log", xlabel="tokens read", ylabel="bits per byte")
    axis.set_title(title, size=9)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6)
