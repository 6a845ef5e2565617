"""The quality benchmark in short: the order of the methods on the miniature, by what the judge finds."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from benchmarks import metrics, scenes
from benchmarks.contenders import CONTENDERS
from loraclr.plan import POLISH_STEPS
from loraclr.report import Mean
from miniature.demo import to_merge
from miniature.drawing import draw, open_miniature
from miniature.judge import Judge

SHORT = {"steps": 8, "scenes": 0}
METHODS = {"base": {}, "sum": {}, "loraclr-fast": SHORT, "loraclr": SHORT, "single": {}}


def test_base_below_sum_below_fast_below_balanced_and_single_about_there(monkeypatch: pytest.MonkeyPatch) -> None:
    # So few that 16 pictures tell them apart: a single one that is lost moves the mean by .04.
    monkeypatch.setitem(POLISH_STEPS, "fast", 16)
    monkeypatch.setitem(POLISH_STEPS, "balanced", 80)
    host, judge, plan = open_miniature("cpu"), Judge.load(), scenes.Plan(concept=4)
    chosen = scenes.chosen(4, 0)
    shots = scenes.reporting(chosen, plan, 0)["concepts"]

    def identity(method: str) -> Mean:
        entry = CONTENDERS[method].run(host, [to_merge(concept) for concept in chosen], 0, METHODS[method])
        pictures = []
        for place in range(len(chosen)):
            prompts = [shot.wanted.prompt for shot in shots if shot.places == (place,)]
            pictures += draw(host, entry.changes((place,)), prompts, shots[place * plan.concept].noise, plan.steps)
        verdicts = judge.verdicts(pictures)
        return Mean(tuple(metrics.identity(v, chosen[shot.places[0]]) for v, shot in zip(verdicts, shots, strict=True)))

    found = {method: identity(method) for method in METHODS}
    values = {method: mean.value for method, mean in found.items()}
    print({method: str(mean) for method, mean in found.items()})
    assert values["base"] + 0.2 < values["sum"] < values["loraclr-fast"] - 0.05
    assert values["loraclr-fast"] + 0.05 < values["loraclr"] <= values["single"] + found["single"].error
