"""`python -m benchmarks.plots FILE.json FOLDER`: figures against N, quality against cost, and a grid of pictures.

Ours with one ingredient left out are in tables only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw, ImageFont

from benchmarks.ingredients import INGREDIENTS

#: The paper's three alignments (Fig. 5), and what users notice besides.
SHOWN = {
    "text": "text alignment", "image": "image alignment", "identity": "identity alignment",
    "crosstalk": "cross-talk", "two_concept": "two concepts in one picture", "picture": "picture quality",
}  # fmt: skip


Colour = tuple[float, ...]


#: Colours of "tab20" that are neither orange, red nor grey.
_OTHERS = (0, 1, 4, 5, 8, 9, 10, 11, 12, 13, 16, 17, 18, 19)


def _colours(rows: Sequence[Mapping]) -> dict[str, Colour]:
    """One colour for each method in all panels, also where another has no such figure.

    Ours are orange, the darker the longer; what is no merge is black and grey; 14 colours are for the others.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ours = [method for method in methods if method.startswith("loraclr")]
    fixed = {
        method: colormaps["Oranges"](0.4 + 0.5 * place / max(1, len(ours) - 1)) for place, method in enumerate(ours)
    }
    fixed |= {"single": (0.0, 0.0, 0.0, 1.0), "base": (0.6, 0.6, 0.6, 1.0)}
    others = [method for method in methods if method not in fixed]
    named = {method: colormaps["tab20"](_OTHERS[place % len(_OTHERS)]) for place, method in enumerate(others)}
    return {method: fixed.get(method) or named[method] for method in methods}


#: How a mean looks that is of fewer sets of LoRAs than others of their number, and so not of the same LoRAs.
_HOLLOW = {"linestyle": "none", "markerfacecolor": "white", "markersize": 5, "zorder": 3}


def _fewer(rows: Sequence[Mapping]) -> set[tuple[int, str]]:
    """Number of LoRAs and method where fewer sets were measured than of another method with as many LoRAs."""
    most: dict[int, int] = {}
    for row in rows:
        most[row["concepts"]] = max(row["seeds"], most.get(row["concepts"], 0))
    return {(row["concepts"], row["method"]) for row in rows if 0 < row["seeds"] < most[row["concepts"]]}


def _legend(figure: Figure, named: Mapping[str, Artist], fewer: bool) -> None:
    hollow = {"open: fewer sets of LoRAs": Line2D([], [], marker="o", color="black", **_HOLLOW)} if fewer else {}
    named = {**named, **hollow}
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=9)


def against_count(rows: Sequence[Mapping], path: Path) -> Path:
    """Each figure over N, a line with error bars for each method; the single LoRAs dotted, as in the paper's Fig. 5.

    A mean over fewer sets of LoRAs than others beside it has an open marker.
    """
    fewer = _fewer(rows)
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, SHOWN.items(), strict=True):
        for method, colour in _colours(rows).items():
            _line(axes, [row for row in rows if row["method"] == method], name, colour, fewer)
        axes.set(title=title, xlabel="concepts merged", xticks=sorted({row["concepts"] for row in rows}))
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[2].get_legend_handles_labels()  # every method has an identity
    _legend(figure, dict(zip(labels, handles, strict=True)), bool(fewer))
    figure.savefig(path, dpi=130)
    return path


def _line(axes: Axes, rows: Sequence[Mapping], name: str, colour: Colour, fewer: set[tuple[int, str]]) -> None:
    drawn = sorted((row for row in rows if row[name] is not None), key=lambda row: row["concepts"])
    if not drawn:
        return
    method = drawn[0]["method"]
    looks = {"linestyle": ":" if method == "single" else "-", "linewidth": 2.4 if method.startswith("loraclr") else 1.2}
    errors = [row[f"{name}_se"] or 0.0 for row in drawn]
    places, values = [row["concepts"] for row in drawn], [row[name] for row in drawn]
    axes.errorbar(places, values, errors, marker="o", markersize=4, capsize=2, label=method, color=colour, **looks)
    hollow = [(place, value) for place, value in zip(places, values, strict=True) if (place, method) in fewer]
    if hollow:
        axes.plot(*zip(*hollow, strict=True), marker="o", color=colour, **_HOLLOW)


def against_cost(rows: Sequence[Mapping], path: Path) -> Path:
    """Identity over seconds of capture and merge, a panel for each number of concepts; the single LoRAs dotted.

    A mean over fewer sets of LoRAs than others in its panel has an open marker.
    """
    fewer = _fewer(rows)
    counts = sorted({row["concepts"] for row in rows})
    figure = Figure(figsize=(1.5 + 3.2 * len(counts), 4), layout="constrained")
    every = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    colours = _colours(rows)
    named: dict[str, Artist] = {}
    for axes, count in zip(every, counts, strict=True):
        for row in rows:
            if row["concepts"] != count or row["identity"] is None or row["capture_s"] is None:
                continue
            method, seconds = row["method"], row["capture_s"] + row["merge_s"]
            if method == "single":
                named[method] = axes.axhline(row["identity"], linestyle=":", color=colours[method])
            elif seconds > 0:
                looks = {"marker": "D" if method.startswith("loraclr") else "o", "color": colours[method]}
                error = row["identity_se"] or 0.0
                named[method] = axes.errorbar(seconds, row["identity"], error, linestyle="none", capsize=2, **looks)
                if (count, method) in fewer:
                    axes.plot(seconds, row["identity"], **looks, **_HOLLOW)
        axes.set(xscale="log", xlabel="seconds", title=f"{count} concepts")
        axes.grid(alpha=0.25)
    every[0].set_ylabel("identity alignment")
    _legend(figure, {method: named[method] for method in colours if method in named}, bool(fewer))
    figure.savefig(path, dpi=130)
    return path


def grid(rows: Sequence[Mapping], strips: Path, path: Path, count: int | None = None, seed: int = 0) -> Path:
    """The first picture of each concept, a row for each method, of `count` concepts, None for the largest number.

    strips: the folder in which `benchmarks.quality` keeps its pictures. All rows of a column share prompt and noise.
    """
    count = count or max(row["concepts"] for row in rows)
    methods = [row["method"] for row in rows if row["concepts"] == count]
    known = [(m, strips / f"{count}-{seed}-{m}-concepts.png") for m in methods]
    known = [(method, strip) for method, strip in known if strip.exists()]
    if not known:
        raise FileNotFoundError(f"{strips} holds no pictures of {count} concepts: give the folder of this result.")
    with Image.open(known[0][1]) as first:
        side, each = first.height, first.width // first.height // count
    margin = 150
    sheet = Image.new("RGB", (margin + count * side, len(known) * side), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for row, (method, strip) in enumerate(known):
        pen.text((6, row * side + side // 2 - 8), method, (40, 40, 50), ImageFont.load_default(15))
        with Image.open(strip) as pictures:
            for column in range(count):
                left = column * each * side
                sheet.paste(pictures.crop((left, 0, left + side, side)), (margin + column * side, row * side))
    sheet.save(path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser("benchmarks.plots", description=__doc__)
    options.add_argument("json", type=Path, help="what benchmarks.quality has written")
    options.add_argument("folder", type=Path, help="where the plots go")
    options.add_argument("--pictures", type=Path, help="folder of its pictures, for the grid")
    options.add_argument("--count", type=int, help="concepts in the grid (default: the most there are)")
    options.add_argument("--seed", type=int, default=0, help="of the grid's set of concepts (default: %(default)s)")
    args = options.parse_args(argv)
    rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["method"] not in INGREDIENTS]
    args.folder.mkdir(parents=True, exist_ok=True)
    for plot in (against_count, against_cost):
        print(plot(rows, args.folder / f"{plot.__name__.replace('_', '-')}.png"))
    if args.pictures:
        print(grid(rows, args.pictures, args.folder / "grid.png", args.count, args.seed))


if __name__ == "__main__":
    main()
