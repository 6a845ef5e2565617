"""`python -m benchmarks.plots FILE.json FOLDER`: figures against N, quality against cost, and a grid of pictures.

Ours with one ingredient left out are in tables only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from benchmarks.contenders import ON_REQUEST

#: The paper's three alignments (Fig. 5), and what users notice besides.
SHOWN = {
    "text": "text alignment", "image": "image alignment", "identity": "identity alignment",
    "crosstalk": "cross-talk", "two_concept": "two concepts in one picture", "picture": "picture quality",
}  # fmt: skip


def against_count(rows: Sequence[Mapping], path: Path) -> Path:
    """Each figure over N, a line with error bars for each method; the single LoRAs dotted, as in the paper's Fig. 5."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, SHOWN.items(), strict=True):
        for place, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            # One colour in all panels, also where another method has no such figure; 20 of them, more than methods.
            _line(axes, [row for row in rows if row["method"] == method], name, colormaps["tab20"](place % 20))
        axes.set(title=title, xlabel="concepts merged", xticks=sorted({row["concepts"] for row in rows}))
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[2].get_legend_handles_labels()  # every method has an identity
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=130)
    return path


def _line(axes: Axes, rows: Sequence[Mapping], name: str, colour: tuple[float, ...]) -> None:
    drawn = sorted((row for row in rows if row[name] is not None), key=lambda row: row["concepts"])
    if not drawn:
        return
    method = drawn[0]["method"]
    looks = {"linestyle": ":" if method == "single" else "-", "linewidth": 2.4 if method.startswith("loraclr") else 1.2}
    errors = [row[f"{name}_se"] or 0.0 for row in drawn]
    places, values = [row["concepts"] for row in drawn], [row[name] for row in drawn]
    axes.errorbar(places, values, errors, marker="o", markersize=3, capsize=2, label=method, color=colour, **looks)


def against_cost(rows: Sequence[Mapping], path: Path) -> Path:
    """Identity over seconds of capture and merge, at the largest number of concepts."""
    most = max(row["concepts"] for row in rows)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row["concepts"] != most or row["identity"] is None or row["capture_s"] is None:
            continue
        seconds = row["capture_s"] + row["merge_s"]
        if seconds > 0:
            axes.errorbar(seconds, row["identity"], row["identity_se"] or 0.0, marker="o", capsize=2)
            axes.annotate(row["method"], (seconds, row["identity"]), (5, 4), textcoords="offset points", fontsize=9)
        elif row["method"] == "single":
            axes.axhline(row["identity"], linestyle=":", color="0.4", label="single LoRAs")
    axes.set(xscale="log", xlabel="seconds", ylabel="identity alignment", title=f"{most} concepts")
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    return path


def grid(rows: Sequence[Mapping], strips: Path, path: Path, seed: int = 0) -> Path:
    """The first picture of each concept, a row for each method, at the largest number of concepts.

    strips: the folder in which `benchmarks.quality` keeps its pictures. All rows of a column share prompt and noise.
    """
    most = max(row["concepts"] for row in rows)
    methods = [row["method"] for row in rows if row["concepts"] == most]
    known = [(m, strips / f"{most}-{seed}-{m}-concepts.png") for m in methods]
    known = [(method, strip) for method, strip in known if strip.exists()]
    if not known:
        raise FileNotFoundError(f"{strips} holds no pictures of {most} concepts: give the folder of this result.")
    with Image.open(known[0][1]) as first:
        side, each = first.height, first.width // first.height // most
    margin = 150
    sheet = Image.new("RGB", (margin + most * side, len(known) * side), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for row, (method, strip) in enumerate(known):
        pen.text((6, row * side + side // 2 - 8), method, (40, 40, 50), ImageFont.load_default(15))
        with Image.open(strip) as pictures:
            for column in range(most):
                left = column * each * side
                sheet.paste(pictures.crop((left, 0, left + side, side)), (margin + column * side, row * side))
    sheet.save(path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser("benchmarks.plots", description=__doc__)
    options.add_argument("json", type=Path, help="what benchmarks.quality has written")
    options.add_argument("folder", type=Path, help="where the plots go")
    options.add_argument("--pictures", type=Path, help="folder of its pictures, for the grid")
    args = options.parse_args(argv)
    rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["method"] not in ON_REQUEST]
    args.folder.mkdir(parents=True, exist_ok=True)
    for plot in (against_count, against_cost):
        print(plot(rows, args.folder / f"{plot.__name__.replace('_', '-')}.png"))
    if args.pictures:
        print(grid(rows, args.pictures, args.folder / "grid.png"))


if __name__ == "__main__":
    main()
