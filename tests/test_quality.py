"""The quality benchmark: what is drawn, what is compared, how a stopped run goes on; the host only pretends to draw."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from benchmarks import contenders, ingredients, margins, quality, results, scenes
from benchmarks.results import FIGURES, Piece, Pieces
from benchmarks.scenes import QUICK, Plan
from loraclr import files, merging, methods, polish, prompts, report
from loraclr.blocks import block
from loraclr.formats import IA3
from loraclr.hosts.standalone import Standalone
from loraclr.lora import Layer
from loraclr.result import begun
from miniature import demo
from miniature.drawing import draw, open_miniature
from miniature.judge import Judge
from miniature.vocabulary import CLASSES, CONCEPT, CONCEPTS

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TINY = Plan(concept=2, beside=1, pairs=2, base=4, tune=1, steps=1)


class Host:
    """Draws noise that depends on seed, prompt and the changes that are applied."""

    family, device, size, checkpoint = "sd1", torch.device("cpu"), 128, None

    def __init__(self) -> None:
        self.layer = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.zeros_(self.layer.weight)
        self.drawn: list[tuple[str, int, float]] = []

    def layers(self) -> dict[str, torch.nn.Module]:
        return {UNET: self.layer}

    @torch.no_grad()
    def sample(self, prompts: list[str], seed: int, *_: object) -> list[Image.Image]:
        change = float(self.layer(torch.ones(1, 4)).sum())
        pictures = []
        for place, prompt in enumerate(prompts):
            self.drawn.append((prompt, seed + place, change))
            levels = np.random.default_rng(seed + place).integers(60, 190, (128, 128, 3)) + 10 * change
            pictures.append(Image.fromarray(levels.clip(0, 255).astype(np.uint8)))
        return pictures


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the benchmark on LoRAs of one layer; returns (host, run)."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for place, concept in enumerate(CONCEPTS):
        up = torch.zeros(4, 1)
        up[place % 4] = 1 + place / 12
        down = torch.eye(4)[place % 3][None] if place < 3 else torch.ones(1, 4)
        files.save(folder / f"{concept.name}.safetensors", {UNET: Layer(up, down, 1.0)}, {})
    monkeypatch.setattr(demo, "LORAS", folder)
    host, judge = Host(), Judge.load()

    def run(names=("sum", "average"), counts=(2,), seeds=1, plan=TINY) -> list[dict]:
        return quality.run(tmp_path / "q.json", plan, counts, seeds, names, host, judge)

    return host, run


class TestScenes:
    def test_reporting_tuning_and_merging_never_share_a_prompt_or_noise(self) -> None:
        plan = Plan()
        reporting = [s for seed in range(3) for part in scenes.reporting(CONCEPTS, plan, seed).values() for s in part]
        tuning = [shot for seed in range(3) for shot in scenes.tuning(CONCEPTS, plan, seed)]
        merging = {
            line
            for c in CONCEPTS
            for line in prompts.filled(c.phrase, "style" if c.is_style else "subject", thorough=True)
        }
        merging |= set(prompts.kept(prompts.NEUTRAL, thorough=True))
        told = {shot.wanted.prompt for shot in reporting}
        assert not told & {shot.wanted.prompt for shot in tuning}
        assert not told & merging
        noise = [shot.noise for shot in reporting]
        assert len(set(noise)) == len(noise)  # no two seeds share one either
        assert not set(noise) & {shot.noise for shot in tuning}
        assert min(noise) > 100_000  # a merge draws from its seed on, one noise for each prompt

    def test_counts(self) -> None:
        for plan in (Plan(), QUICK, TINY):
            parts = scenes.reporting(scenes.chosen(4, 0), plan, 0)
            assert len(parts["concepts"]) == 4 * plan.concept
            assert len(parts["beside"]) == 4 * plan.beside
            assert len(parts["base"]) == plan.base
            assert len(parts["pairs"]) == max(plan.pairs, 2 * plan.concept)

    @pytest.mark.parametrize("count", [8, 12])
    def test_pairs_are_of_all_concepts_alike_and_others_for_another_seed(self, count: int) -> None:
        drawn = [scenes.reporting(concepts, Plan(), s)["pairs"] for s in range(3) for concepts in [CONCEPTS[:count]]]
        for shots in drawn:
            places = [place for shot in shots for place in shot.places]
            times = {place: places.count(place) for place in range(count)}
            assert min(times.values()) >= Plan().concept - 1 and max(times.values()) <= Plan().concept + 1
            assert len({shot.wanted.prompt for shot in shots}) == len(shots)
            assert {shot.places[0] for shot in shots} == {k for k in range(count) if not CONCEPTS[k].is_style}
        assert len({frozenset(shot.places for shot in shots) for shots in drawn}) == 3
        assert scenes.reporting(CONCEPTS[:count], Plan(), 0)["pairs"] == drawn[0]

    def test_a_pair_is_of_the_concepts_that_its_prompt_names(self) -> None:
        for part in ("concepts", "beside", "pairs"):
            for shot in scenes.reporting(CONCEPTS, Plan(), 0)[part]:
                names = {CONCEPTS[place].name for place in shot.places}
                assert names == shot.names - set(CLASSES), shot

    def test_seeds_choose_concepts_and_every_colour_is_known(self) -> None:
        assert scenes.chosen(12, 0) == CONCEPTS
        assert scenes.chosen(4, 0) == scenes.chosen(4, 0)
        assert len({scenes.chosen(4, seed) for seed in range(3)}) > 1
        for part in scenes.reporting(CONCEPTS, Plan(), 0).values():
            assert all(shot.wanted.colour in scenes.REPORTING for shot in part)

    def test_base_objects_are_not_the_same_for_every_concept_and_seed(self) -> None:
        for count in (4, 8, 12):
            parts = [scenes.reporting(scenes.chosen(count, seed), Plan(), seed) for seed in range(3)]
            things = [[n for n in shot.wanted.objects if n in CLASSES] for part in parts for shot in part["beside"]]
            every = [name for names in things for name in names]
            assert len(set(every)) >= 28 and max(map(every.count, every)) <= 3 * len(every) / len(CLASSES)

    def test_base_objects_that_merges_look_at_are_not_new(self) -> None:
        quick = (*prompts.usual("subject"), *prompts.usual("style"), *prompts.NEUTRAL, *prompts.STAND_INS)
        assert {name for name in CLASSES if name in " ".join(quick).split()} == scenes.FAMILIAR  # at any speed the same
        assert {"dog", "key"} <= scenes.FAMILIAR and not {"turtle", "bus"} & scenes.FAMILIAR
        shots = scenes.reporting((CONCEPT["tiger"], CONCEPT["outline"]), Plan(), 0)["beside"]
        assert {shot.is_new for shot in shots} == {True, False}
        for shot in shots:
            assert shot.is_new == bool(set(shot.wanted.objects) - {"tiger"} - scenes.FAMILIAR)

    def test_a_thing_in_a_style_is_one_object(self) -> None:
        shots = scenes.reporting((CONCEPT["tiger"], CONCEPT["outline"]), TINY, 0)["pairs"]
        assert {(shot.wanted.objects, shot.wanted.look) for shot in shots} == {(("tiger",), "outline")}


class TestRun:
    def test_rows_have_every_figure_with_its_error(self, bench, tmp_path: Path) -> None:
        _, run = bench
        found = run()
        assert [(row["concepts"], row["method"]) for row in found] == [
            (2, "base"), (2, "single"), (2, "sum"), (2, "average"),
        ]  # fmt: skip
        for row in found:
            for figure in FIGURES:
                assert row[figure] is not None and row[f"{figure}_se"] >= 0, (row["method"], figure)
        assert json.loads((tmp_path / "q.json").read_text()) == {"rows": found}

    def test_pairs_that_a_merge_has_looked_at_are_not_new(self, bench, tmp_path: Path, monkeypatch) -> None:
        _, run = bench
        usual = contenders.CONTENDERS["sum"]
        knowing = replace(usual, run=lambda *told: replace(usual.run(*told), seen={frozenset((0, 1))}))
        monkeypatch.setitem(quality.KNOWN, "sum", knowing)
        run(("sum", "average"), counts=(3,), plan=replace(TINY, pairs=6))
        pieces = Pieces(tmp_path / "q.jsonl", vars(replace(TINY, pairs=6))).done
        lengths = {name: len(pieces[3, name, 0].values["two_new"]) for name in ("sum", "average")}
        styles = sum(concept.is_style for concept in scenes.chosen(3, 0))
        assert styles == 0 and lengths == {"sum": 4, "average": 6}

    def test_what_a_merge_has_looked_at(self, monkeypatch) -> None:
        names = ("tiger", "panda", "frog", "outline")
        asked = [quality.to_merge(CONCEPT[name]) for name in names]
        merge = begun(asked, None)
        monkeypatch.setattr(contenders.methods, "merge", lambda *_: merge)
        seen = contenders.CONTENDERS["loraclr-fast"].run(None, asked, 0, {}).seen
        assert seen == {frozenset(pair) for pair in itertools.combinations(range(4), 2)}, "a style with each thing"
        assert not ingredients.INGREDIENTS["fast-no-scenes"].run(None, asked, 0, {}).seen
        assert not contenders.CONTENDERS["gradient-fusion"].run(None, asked, 0, {}).seen

    def test_what_is_compared_with_what(self, bench) -> None:
        _, run = bench
        base, single, added, _ = run()
        assert single["image"] == pytest.approx(1, abs=1e-4) and single["pixel"] == 0 and single["identity_delta"] == 0
        assert base["base_drift"] == 0 and base["pixel"] > 0
        assert added["base_drift"] > 0 and added["pixel"] > 0
        assert added["identity_delta"] == pytest.approx(added["identity"] - single["identity"], abs=1e-4)

    def test_each_row_draws_with_its_own_changes_and_the_same_noise(self, bench) -> None:
        host, run = bench
        run(names=("sum",))
        by_prompt: dict[tuple[str, int], set[float]] = {}
        for prompt, noise, change in host.drawn:
            by_prompt.setdefault((prompt, noise), set()).add(round(change, 3))
        names = scenes.chosen(2, 0)
        shots = scenes.reporting(names, TINY, 0)["concepts"]
        both = by_prompt[shots[0].wanted.prompt, shots[0].noise] | by_prompt[shots[-1].wanted.prompt, shots[-1].noise]
        own = sorted(both)[1:3]  # 0 is the base, then each LoRA alone, then their sum
        assert min(both) == 0
        assert max(both) == pytest.approx(sum(own), abs=2e-3)

    def test_a_stopped_run_goes_on(self, bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        host, run = bench
        run(names=("sum",))
        before = (tmp_path / "q.jsonl").read_text()
        host.drawn.clear()
        first = run(names=("sum",))
        assert host.drawn == []  # all is there
        (tmp_path / "q.jsonl").write_text(before[:-40])  # stopped within the last line
        again = run(names=("sum",))
        assert [row["identity"] for row in again] == [row["identity"] for row in first]
        assert all(row["date"] == date.today().isoformat() for row in again)
        assert {change for *_, change in host.drawn} != {0.0}
        assert len(host.drawn) == 2 * TINY.concept + 2 * TINY.beside + TINY.pairs + TINY.base  # one row anew
        host.drawn.clear()
        run(names=("sum",), plan=replace(TINY, concept=3))
        assert host.drawn  # another plan, other pictures

    def test_a_method_that_cannot_merge_says_so(self, bench) -> None:
        _, run = bench
        rows = {(row["concepts"], row["method"]): row for row in run(names=("orthogonal",), counts=(12,))}
        row = rows[12, "orthogonal"]
        assert row["identity"] is None and "cannot be made orthogonal" in row["refused"]
        assert "cannot be made orthogonal" in report.text(results.table(list(rows.values())))

    def test_only_what_is_shown_is_explained(self, bench) -> None:
        _, run = bench
        note = results.table(run(names=("sum",)), ("identity_delta", "two_concept")).note
        assert "Δ: merged" in note and "judge's cosine" in note and "each in its half" in note
        assert "cross-talk" not in note and "not looked at together" not in note

    def test_options_are_chosen_on_tuning_prompts_only_and_once(self, bench, monkeypatch: pytest.MonkeyPatch) -> None:
        host, run = bench
        grid = ({"scale": 0.5}, {"scale": 2.0})
        monkeypatch.setitem(quality.KNOWN, "sum", replace(contenders.CONTENDERS["sum"], grid=grid))
        row = run(names=("sum",), seeds=2)[-1]
        assert row["settings"] in grid
        assert row["seeds"] == 2
        tuned = [noise for _, noise, _ in host.drawn if noise >= scenes.TUNING_NOISE]
        assert len(tuned) == len(grid) * 4 * TINY.tune, "of two concepts as many as of four"


class TestIngredients:
    """Those that no setting leaves out."""

    def test_the_sum_in_the_place_of_the_closed_form(self) -> None:
        changes = [(torch.randn(3, 2), torch.randn(2, 4)), None, (torch.randn(3, 1), torch.randn(1, 4))]
        told = ingredients.Summed(4, changes)
        told.add(0, torch.randn(5, 4))
        up, down = told.solve()
        torch.testing.assert_close(up @ down, changes[0][0] @ changes[0][1] + changes[2][0] @ changes[2][1])

    def test_a_function_is_another_one_for_this_method_only(self, monkeypatch) -> None:
        asked, used = [quality.to_merge(CONCEPT["tiger"])], []
        merge = begun(asked, None)
        monkeypatch.setattr(contenders.methods, "merge", lambda *_: used.append(polish.in_v) or merge)
        ingredients.INGREDIENTS["fast-as-predicted"].run(None, asked, 0, {})
        contenders.CONTENDERS["loraclr-fast"].run(None, asked, 0, {})
        assert used == [ingredients.as_predicted, polish.in_v] and polish.in_v is not ingredients.as_predicted

    def test_factors_cut_whatever_the_layer_reads(self) -> None:
        up, down = torch.eye(2), torch.diag(torch.tensor([2.0, 1.0]))
        gram = torch.diag(torch.tensor([1.0, 100.0]))  # nearly all is read along the second direction
        for cut, left in ((merging.truncate, [0.0, 1.0]), (ingredients.by_weights_alone, [2.0, 0.0])):
            found = cut(up, down, 1, gram)
            torch.testing.assert_close((found[0] @ found[1]).diagonal(), torch.tensor(left))


@pytest.fixture(scope="module")
def miniature() -> Standalone:
    return open_miniature("cpu")


def test_every_contender_but_those_on_the_model_merges_the_miniatures_loras(miniature: Standalone) -> None:
    for name in ("factor-sum", "svd", "ties", "dare-ties", "dare-linear", "magnitude-prune", "orthogonal", "average"):
        asked = [quality.to_merge(CONCEPT[concept]) for concept in ("tiger", "panda")]
        contender = contenders.CONTENDERS[name]
        entry = contender.run(miniature, asked, 0, contender.grid[-1] if contender.grid else {})
        assert entry.changes((0,)) is entry.changes((0, 1))
        assert set(entry.changes((0, 1))) == set(asked[0].lora.layers)
        assert entry.merge_s > 0


def test_loras_whose_change_depends_on_the_model_take_part(miniature: Standalone) -> None:
    concept = quality.to_merge(CONCEPT["tiger"])
    name = next(name for name, layer in concept.lora.layers.items() if isinstance(layer, Layer))
    rows = miniature.layers()[name].weight.shape[0]
    lora = replace(concept.lora, layers={**concept.lora.layers, name: IA3(torch.full((rows,), 0.5), on_input=False)})
    asked = [replace(concept, lora=lora), quality.to_merge(CONCEPT["panda"])]
    for method in ("single", "sum", "block-weights"):
        assert name in contenders.CONTENDERS[method].run(miniature, asked, 0, {}).changes((0,))


def test_a_dense_method_is_not_cut_in_the_benchmark(miniature: Standalone) -> None:
    asked = [quality.to_merge(CONCEPT[concept]) for concept in ("tiger", "panda")]
    entry = contenders.CONTENDERS["ties"].run(miniature, asked, 0, {})
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    deltas = [concept.lora.layers[name].delta() for concept in asked]
    expected = methods.arithmetic.ties(deltas, 0.5)
    up, down = entry.changes((0,))[name]
    torch.testing.assert_close(up @ down, expected, rtol=1e-4, atol=1e-6)


def test_block_weights_leave_out_the_blocks_that_are_not_named(miniature: Standalone) -> None:
    asked = [quality.to_merge(CONCEPT[concept]) for concept in ("tiger", "panda")]
    options = {"blocks": "IN04-OUT11=0", "scale": 0.5}
    shallow = contenders.CONTENDERS["block-weights"].run(miniature, asked, 0, options).changes((0,))
    assert {block(name) for name in shallow} == {"BASE", "IN01", "IN02"}
    whole = contenders.CONTENDERS["sum"].run(miniature, asked, 0, {}).changes((0,))
    for name, (up, down) in shallow.items():
        torch.testing.assert_close(up @ down, 0.5 * (whole[name][0] @ whole[name][1]))


def test_drawing_in_batches_keeps_the_noise() -> None:
    host = Host()
    told: list[int] = []
    pictures = draw(host, {}, ["x"] * 20, 7, 1, told.append)
    assert [noise for _, noise, _ in host.drawn] == list(range(7, 27))
    assert sum(told) == len(pictures) == 20


def test_errors_are_of_the_mean_over_all_pictures() -> None:
    values = {figure: [1.0, 0.0] for figure in FIGURES}
    pieces = [Piece(2, method, seed, {}, values) for method in ("single", "sum") for seed in (0, 1)]
    row = results.rows(pieces)[1]
    assert (row["seeds"], row["identity"], row["top1"]) == (2, 0.5, 0.5)
    assert row["identity_se"] == pytest.approx(float(np.std([1, 0, 1, 0], ddof=1)) / 2, abs=1e-5)
    assert (row["identity_delta"], row["identity_delta_se"]) == (0, 0)


def test_a_table_has_the_columns_that_are_asked_for() -> None:
    values = {figure: [1.0, 0.0] for figure in FIGURES}
    rows = results.rows([Piece(2, method, 0, {}, values, 1.25, 2.0) for method in ("single", "sum")])
    told = results.table(rows, ("identity", "identity_delta", "two_concept", "merge_s"))
    assert told.columns == ["", "identity", "Δ identity", "two", "merge s"]
    assert told.rows[1] == ["2 sum", "0.500±0.500", "+0.000±0.000", "0.500±0.250", "2.0"]
    assert len(results.table(rows).columns) == len(results.COLUMNS) + 1


def test_pieces_of_another_plan_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "pieces.jsonl"
    Pieces(path, {"concept": 1}).add(Piece(2, "sum", 0, {"concept": 1}))
    assert Pieces(path, {"concept": 2}).done == {}
    assert list(Pieces(path, {"concept": 1}).done) == [(2, "sum", 0)]


def test_a_piece_is_the_same_in_memory_and_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pieces.jsonl"
    kept = Pieces(path, {})
    names, values = ["tiger", "panda"], {"identity": [1 / 3, 2 / 3]}
    kept.add(Piece(2, "sum", 0, {}, values, merge_s=1 / 3, names=names, date="2026-11-29"))
    kept.add(Piece(2, "sum", 1, {}, values, names=names, date="2026-11-30"))
    assert Pieces(path, {}).done == kept.done
    [row] = results.rows(list(kept.done.values()))
    assert row["date"] == "2026-11-29", "a row is as old as its oldest part"


def test_plots_are_drawn(tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    values = {figure: [1.0, 0.0] for figure in FIGURES}
    pieces = [Piece(n, name, 0, {}, values, 1.0, 2.0) for n in (2, 4) for name in ("single", "sum", "loraclr")]
    pieces.append(Piece(4, "orthogonal", 0, {}, refused="no"))
    (tmp_path / "q.json").write_text(json.dumps({"rows": results.rows(pieces)}))
    plots.main([str(tmp_path / "q.json"), str(tmp_path / "plots")])
    for name in ("against-count", "against-cost"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_a_method_has_one_colour_in_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    kept = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    values = {figure: [1.0, 0.0] for figure in FIGURES}
    alone = {**values, "two_concept": []}
    pieces = [Piece(2, "single", 0, {}, alone), Piece(2, "sum", 0, {}, values)]
    plots.against_count(results.rows(pieces), tmp_path / "never")
    colours: dict[str, set] = {}
    for axes in kept[0].axes:
        for bars in axes.containers:
            colours.setdefault(bars.get_label(), set()).add(bars.lines[0].get_color())
    assert sorted(colours) == ["single", "sum"]
    assert all(len(found) == 1 for found in colours.values())


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("plot", "places"), [("against_count", [2] * 6), ("against_cost", [3.0])])
def test_means_of_fewer_sets_are_told_from_the_others(monkeypatch: pytest.MonkeyPatch, plot, places, few: bool) -> None:
    """With two LoRAs the last method has one set of two, or as many as the others; with four all have one."""
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    kept = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    values = {figure: [1.0, 0.0] for figure in FIGURES}
    measured = [
        (n, name, seed) for n, seeds in ((2, (0, 1)), (4, (0,))) for seed in seeds for name in ("single", "sum")
    ]
    measured += [(2, "ties", 0), (4, "ties", 0), *([] if few else [(2, "ties", 1)])]
    pieces = [Piece(*key, {}, values, 1.0, 2.0) for key in measured]
    getattr(plots, plot)(results.rows([*pieces, Piece(2, "factor-sum", 0, {}, refused="no")]), Path("never"))
    hollow = [line for axes in kept[0].axes for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in hollow] == ([(x, 0.5) for x in places] if few else [])
    told = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert told == ["single", "sum", "ties", *(["open: fewer sets of LoRAs"] if few else [])]


@pytest.mark.parametrize(("others", "told", "seed"), [([], (), 0), ([4], (2, 1), 1)])
def test_grid_has_a_row_for_each_method_and_a_column_for_each_concept(tmp_path: Path, others, told, seed) -> None:
    plots = pytest.importorskip("benchmarks.plots", exc_type=ImportError)
    rows = [{"concepts": n, "method": method} for n in (2, *others) for method in ("single", "sum", "refused")]
    for level, method in ((50, "single"), (100, "sum")):
        strip = Image.new("L", (8 * 4, 8), 0)  # two concepts, two pictures of each
        for place in range(4):
            strip.paste(level + place, (8 * place, 0, 8 * place + 8, 8))
        strip.convert("RGB").save(tmp_path / f"2-{seed}-{method}-concepts.png")
    with Image.open(plots.grid(rows, tmp_path, tmp_path / "grid.png", *told)) as grid:
        assert grid.size == (150 + 16, 16)
        found = [[grid.getpixel((x, y))[0] for x in (154, 162)] for y in (4, 12)]
    assert found == [[50, 52], [100, 102]]
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        plots.grid(rows, tmp_path / "elsewhere", tmp_path / "grid.png")


@pytest.mark.parametrize("arguments", [["--counts", "2,13"], ["--methods", "sum,magic"], ["--seeds", "x"]])
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        quality.parser().parse_args(arguments)


class TestMargins:
    def test_every_cell_is_the_loop_with_its_margin_and_penalty(self, bench, tmp_path, monkeypatch) -> None:
        told: list[dict] = []

        def loop(host, concepts, seed, options):
            told.append(options)
            return contenders.single(host, concepts, seed, options)

        monkeypatch.setattr(margins, "reference", loop)
        cells = margins.run(bench[0], Judge.load(), 2, TINY, 0, {"iterations": 7}, (0.0, 1.0), (0.1,))
        assert told == [{"margin": m, "penalty": 0.1, "iterations": 7} for m in (0.0, 1.0)]
        assert [(one["margin"], one["penalty"]) for one in cells] == [(0.0, 0.1), (1.0, 0.1)]
        lines = report.text(margins.table(cells, 2))
        assert "m = 1" in lines and f"{cells[1]['identity']:.3f}" in lines
        assert margins.plot(cells, tmp_path / "m.png").stat().st_size > 1000
