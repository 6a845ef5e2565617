"""What the polish of a merge learns from, besides each concept's own pictures, on a toy host."""

from __future__ import annotations

import pytest
import torch
from toy import ToyHost, toy_lora

from loraclr.capture import Bank, Changes, applied
from loraclr.concept import Concept
from loraclr.merging import _Run, by_closed_form, merge
from loraclr.plan import Settings

THING, STYLE = "sks", "ink style"


def begun(host: ToyHost, speed: str = "fast") -> _Run:
    concepts = [Concept(toy_lora(host, "thing", 1), THING), Concept(toy_lora(host, "style", 2), STYLE, kind="style")]
    return _Run(host, concepts, Settings(speed=speed, steps=2), lambda *_: None, by_closed_form)


def away(host: ToyHost, bank: Bank, changes: Changes) -> float:
    """How far a bank is from what the host predicts with these changes, at most."""
    with torch.no_grad(), applied(host.layers(), changes):
        context = host.encode([bank.prompts[prompt] for prompt in bank.prompt])
        wanted = host.predict(torch.stack(bank.x), torch.stack(bank.t), context)
    return float((torch.stack(bank.prediction) - wanted).abs().max())


def test_later_steps_see_where_the_merged_loras_pictures_lead() -> None:
    """The places are its own, the predictions each concept's, and the base's for what must not change."""
    run = begun(host := ToyHost(), "balanced")
    merged = {name: (2 * up, down) for name, (up, down) in run.asked[0].items()}
    drawn: list[torch.Tensor] = []
    with applied(host.layers(), merged), host.watch(lambda x, *_: drawn.extend(x)):
        host.sample(run.texts[0][:8:2], 3000, 2, run.settings.guidance, host.size, host.size)
    banks = run.revisited(merged)
    assert [bank.prompts for bank in banks] == [[*texts[::2], ""] for texts in run.texts]
    assert max(away(host, bank, changes) for bank, changes in zip(banks, run.asked, strict=True)) < 1e-5
    assert min(away(host, bank, merged) for bank in banks) > 1e-3
    assert all(any(torch.equal(x, seen) for seen in banks[0].x) for x in drawn)


@pytest.mark.parametrize(("speed", "revisit"), [("fast", 2), ("balanced", 2), ("balanced", 0)])
def test_only_thorough_merges_draw_again_and_all_steps_are_told(speed: str, revisit: int) -> None:
    host, told = ToyHost(), []
    merge(host, begun(host).concepts, Settings(speed=speed, steps=2, revisit=revisit), lambda *now: told.append(now))
    again = [place for place, (stage, _, _) in enumerate(told) if stage.endswith(" again")]
    steps = [(place, stage) for place, (stage, _, _) in enumerate(told) if stage.startswith("Polishing")]
    last = Settings(speed).polish_steps(2)
    assert [stage for _, stage in steps] == [f"Polishing, step {step} of {last}" for step in range(1, last + 1)]
    assert bool(again) == (speed == "balanced" and revisit > 0)
    if again:
        assert sum(place < again[0] for place, _ in steps) == last - last // 3
    assert [share for _, share, _ in told] == sorted(share for _, share, _ in told)
    assert told[steps[-1][0]][1] == pytest.approx(1.0, abs=0.01)
