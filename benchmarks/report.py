"""Results as text, as tables of docs/benchmarks.md and the README, and as a picture. Ratios are medians of pairs
measured in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
LIMIT = "limit"
PEER = "Transformer-XL"
SUMMARY = [  # the rows of the README: figure, case, and what the README calls them
    ("train_enwik8", "batch 1, fp32", "training step, batch 1, fp32"),
    ("train_enwik8", "batch 4, bf16 autocast", "training step, batch 4, bf16 autocast"),
    ("memory", "batch 4, fp32", "peak memory of a training step, batch 4, fp32"),
    ("prefill", "4,096 tokens", "reading a prompt of 4,096 tokens"),
    ("decode", "position 64, batch 1", "one new token at position 64"),
    ("decode", "position 1,000, batch 1", "one new token at position 1,000"),
]


def quantity(value: float, unit: str) -> str:
    """A number as one reads it."""
    if unit == "s" and value < 1:
        return f"{value * 1e3:.3g} ms"
    if unit == "operators":
        return f"{value:,.0f}"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def ratio(entry: dict[str, Any]) -> str:
    """How many times ours it takes, with quartiles where there are several runs."""
    times = entry["ratio"]
    if entry["runs"] < 2:
        return f"{times['median']:.2f}"
    return f"{times['median']:.2f} ({times['low']:.2f}–{times['high']:.2f})"


def text(name: str, figure: dict[str, Any]) -> str:
    """A figure for the terminal: a line for each contestant."""
    lines = [f"\n{name}: {figure['title']}" + ("  [--quick: tiny sizes]" if figure["quick"] else "")]
    for case in figure["cases"]:
        lines.append(f"  {case['case']}")
        for who, entry in case["entries"].items():
            low, high = quantity(entry["low"], case["unit"]), quantity(entry["high"], case["unit"])
            between = f"{low} … {high}" if entry["runs"] > 1 else ""
            times = f"{ratio(entry)} × ours" if "ratio" in entry else ""
            lines.append(f"    {who:22}{quantity(entry['median'], case['unit']):>14}   {between:26}{times}")
        lines += [f"    {who:22}{note}" for who, note in case["notes"].items()]
    return "\n".join(lines)


def machine(results: dict[str, Any]) -> str:
    """What the figures were measured on; a line for each if they were not all measured at once."""
    lines: dict[str, list[str]] = {}
    for name, figure in results["figures"].items():
        m = figure["machine"]
        flags = " ".join(m["flags"]) or "no flags known"
        line = (
            f"{m['processor']} ({m['cores']} cores, {flags}), {m['threads']} threads, device {m['device']}, torch "
            f"{m['torch']}, Python {m['python']}, commit {m['commit']}, {m['date'][:10]}, `{figure['command']}`"
        )
        lines.setdefault(line, []).append(name)
    if len(lines) == 1:
        return f"Measured on: {next(iter(lines))}."
    return "\n".join(f"* {', '.join(names)}: {line}" for line, names in lines.items())


def markdown(results: dict[str, Any]) -> str:
    """One table; a row for each case."""
    head = ["", "ours", "reference", "reference / ours", "limit / ours", "others (their time or size / ours)"]
    lines = [row(head), row(["---", *["---:"] * 4, "---"])]
    for figure in results["figures"].values():
        lines.append(row([f"**{figure['title']}**", *[""] * 5]))
        lines += [row(cells(case)) for case in figure["cases"] if case["entries"]]
    notes = sorted({f"{who}: {note}." for f in results["figures"].values() for c in f["cases"]
                    for who, note in c["notes"].items()})  # fmt: skip
    how = "Medians, with quartiles of the ratios taken pair by pair in one run; above 1, ours is faster or smaller."
    end = ["", *(f"* {note}" for note in notes)] if notes else []
    return "\n".join([*lines, "", how, "", machine(results), *end])


def columns(figure: dict[str, Any]) -> list[str]:
    """A table of a figure whose cases have the same contestants: a column for each, and how many times the first."""
    names = list(figure["cases"][0]["entries"])
    lines = [row([f"**{figure['title']}**", *names]), row(["---", *["---:"] * len(names)])]
    for case in figure["cases"]:
        values = [
            quantity(entry["median"], case["unit"]) + (f" ({ratio(entry)})" if "ratio" in entry else "")
            for entry in case["entries"].values()
        ]
        lines.append(row([case["case"], *values]))
    return lines


def side_by_side(results: dict[str, Any]) -> str:
    """A table for each figure."""
    how = "Medians; in brackets how many times the first column, with quartiles of ratios taken pair by pair."
    tables = ["\n".join(columns(figure)) for figure in results["figures"].values()]
    return "\n\n".join([*tables, how, machine(results)])


def row(columns: list[str]) -> str:
    return "| " + " | ".join(columns) + " |"


def cells(case: dict[str, Any]) -> list[str]:
    entries, unit = case["entries"], case["unit"]
    others = []
    for who, entry in entries.items():
        if who not in ("ours", "reference", LIMIT):
            times = f" ({ratio(entry)})" if "ratio" in entry else ""
            others.append(f"{who} {quantity(entry['median'], unit)}{times}")
    value = {who: quantity(entries[who]["median"], unit) if who in entries else "" for who in ("ours", "reference")}
    against = {who: ratio(entries[who]) if "ratio" in entries.get(who, {}) else "" for who in ("reference", LIMIT)}
    return [case["case"], value["ours"], value["reference"], against["reference"], against[LIMIT], "; ".join(others)]


def summary(results: dict[str, Any]) -> str:
    """The table of the README: the rows of SUMMARY that were measured."""
    lines = [row(["", "this package", "0.4.4", "0.4.4 / this", f"{PEER} / this"]), row(["---", *["---:"] * 4])]
    figures: dict[str, dict[str, Any]] = {}
    for name, case_name, title in SUMMARY:
        figure = results["figures"].get(name, {"cases": []})
        for case in (case for case in figure["cases"] if case["case"] == case_name):
            _, ours, reference, times, _, _ = cells(case)
            peer = case["entries"].get(PEER, {})
            lines.append(row([title, ours, reference, times, ratio(peer) if "ratio" in peer else ""]))
            figures[name] = figure
    return "\n".join([*lines, "", machine({"figures": figures})])


def update_page(path: Path, table: str, name: str = "benchmark") -> None:
    """Puts a table between the two markers of a file that have its name.

    Raises:
        ValueError: the file has no markers, or not in this order.
    """
    content = path.read_text(encoding="utf-8")
    begin, end = BEGIN.replace("benchmark", name), END.replace("benchmark", name)
    start, stop = content.find(begin), content.find(end)
    if start < 0 or stop < start:
        raise ValueError(f"{path} must hold the lines {begin} and {end}")
    path.write_text(f"{content[: start + len(begin)]}\n{table}\n{content[stop:]}", encoding="utf-8")


def plot(results: dict[str, Any], path: Path) -> bool:
    """Bars of reference / ours and limit / ours for each case of seconds; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [(name, case) for name, figure in results["figures"].items() for case in figure["cases"]]
    against = {"reference": "tab:orange", LIMIT: "tab:green"}
    shown = [(name, case) for name, case in cases if any("ratio" in case["entries"].get(who, {}) for who in against)]
    if not shown:
        return True
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(shown)), layout="constrained")
    for offset, (who, colour) in zip((-0.2, 0.2), against.items()):
        points = [(i, case["entries"][who]["ratio"]) for i, (_, case) in enumerate(shown)
                  if "ratio" in case["entries"].get(who, {})]  # fmt: skip
        axes.barh(
            [i + offset for i, _ in points], [r["median"] for _, r in points], 0.38, color=colour,
            label=f"{who} / ours",
            xerr=[[r["median"] - r["low"] for _, r in points], [r["high"] - r["median"] for _, r in points]],
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{name}: {case['case']}" for name, case in shown], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("time, operators or memory, as a multiple of ours (log scale; quartiles)")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
