"""`python -m benchmarks.margins`: the paper's Fig. 8 on the miniature, identity over its margin m and its penalty λ.

The objective is the paper's (Eq. 1-5) in the reference loop, with a learning rate and a length at which it moves. The
prompts and the noise are those that the quality benchmark tunes on, so that nothing reported there is chosen here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import metrics, scenes
from benchmarks.contenders import Entry, reference
from benchmarks.scenes import Plan
from loraclr import report
from loraclr.cli import quiet
from loraclr.hosts.standalone import Standalone
from loraclr.objective import Distance
from loraclr.report import Mean, Table
from miniature.demo import to_merge
from miniature.drawing import draw, open_miniature
from miniature.judge import Judge

MARGINS, PENALTIES = (0.0, 0.25, 0.5, 1.0), (0.0, 1e-4, 1e-3, 1e-2)
NOTE = """Identity, the judge's cosine, ± one standard error over pictures; rows: margin m, columns: penalty λ. All
cells share prompts and noise. m = 0 is the objective without its negative term."""


def cell(host: Standalone, judge: Judge, count: int, plan: Plan, seed: int, loop: dict) -> Mean:
    """Merge `count` concepts with one setting of the reference loop, draw each, judge."""
    chosen = scenes.chosen(count, seed)
    entry: Entry = reference(host, [to_merge(concept) for concept in chosen], seed, loop)
    shots = scenes.tuning(chosen, plan, seed)
    pictures = draw(host, entry.changes((0,)), [shot.wanted.prompt for shot in shots], shots[0].noise, plan.steps)
    verdicts = judge.verdicts(pictures)
    return Mean(tuple(metrics.identity(v, chosen[shot.places[0]]) for v, shot in zip(verdicts, shots, strict=True)))


def run(
    host: Standalone, judge: Judge, count: int, plan: Plan, seed: int, common: Mapping,
    margins: Sequence[float] = MARGINS, penalties: Sequence[float] = PENALTIES,
) -> list[dict]:  # fmt: skip
    """Every pair of margin and penalty: [{"margin", "penalty", "identity", "identity_se"}].

    common: what the loop is told besides, in all cells (fields of `Settings`).
    """
    pairs = [(margin, penalty) for margin in margins for penalty in penalties]
    cells = []
    for margin, penalty in tqdm(pairs, desc="merging", unit="cell", file=sys.stderr):
        found = cell(host, judge, count, plan, seed, {"margin": margin, "penalty": penalty, **common})
        cells.append(
            {"margin": margin, "penalty": penalty, "identity": round(found.value, 5), "identity_se": found.error}
        )
    return cells


def table(cells: Sequence[dict], count: int) -> Table:
    """The cells as a grid, for a terminal."""
    penalties = list(dict.fromkeys(one["penalty"] for one in cells))
    lines = []
    for margin in dict.fromkeys(one["margin"] for one in cells):
        row = [one for one in cells if one["margin"] == margin]
        lines.append([f"m = {margin:g}", *(f"{one['identity']:.3f} ± {one['identity_se']:.3f}" for one in row)])
    return Table(f"The paper's objective, {count} LoRAs", ("", *(f"λ = {p:g}" for p in penalties)), lines, NOTE)


def plot(cells: Sequence[dict], path: Path) -> Path:
    """A line for each penalty over the margin."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for penalty in dict.fromkeys(one["penalty"] for one in cells):
        line = [one for one in cells if one["penalty"] == penalty]
        places, values = [one["margin"] for one in line], [one["identity"] for one in line]
        axes.errorbar(
            places, values, [one["identity_se"] for one in line], marker="o", capsize=2, label=f"λ = {penalty:g}"
        )
    axes.set(xlabel="margin m", ylabel="identity alignment")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=130)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser("benchmarks.margins", description=__doc__)
    options.add_argument("--count", type=int, default=4, help="LoRAs to merge (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--iterations", type=int, default=300, help="of the loop (default: %(default)s; the authors': 50)"
    )
    options.add_argument(
        "--rate", type=float, default=3e-3, help="of learning (default: %(default)s; the authors': 1e-4)"
    )
    options.add_argument(
        "--distance",
        choices=get_args(Distance),
        default="flat",
        help="of a concept's features as one long vector, as the authors' code has it, or of each row's "
        "(default: %(default)s)",
    )
    options.add_argument("--margins", type=float, nargs="+", default=MARGINS, help="default: %(default)s")
    options.add_argument("--penalties", type=float, nargs="+", default=PENALTIES, help="default: %(default)s")
    options.add_argument("--json", type=Path, default=Path("out/margins.json"), help="default: %(default)s")
    options.add_argument("--device", help="cpu, cuda, … (default: the graphics card if there is one)")
    args = options.parse_args(argv)
    quiet()
    common = {"iterations": args.iterations, "rate": args.rate, "distance": args.distance}
    cells = run(
        open_miniature(args.device), Judge.load(), args.count, Plan(tune=4), args.seed, common,
        args.margins, args.penalties,
    )  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"cells": cells}, indent=1) + "\n", encoding="utf-8")
    print(report.text(table(cells, args.count)))
    print(plot(cells, args.json.with_suffix(".png")))


if __name__ == "__main__":
    main()
