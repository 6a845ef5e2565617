"""States astray: whose they are, what is asked there, and that a concept's own LoRA answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from toy import ToyHost, toy_lora

from loraclr import plan
from loraclr.astray import astray
from loraclr.bank import Bank
from loraclr.capture import applied
from loraclr.changes import changes_of
from loraclr.concept import Concept
from loraclr.merging import Settings, _Run, by_closed_form, merge

THING, STYLE = "sks", "ink style"
LOOKING = "Looking at what it draws so far"


def concepts(host: ToyHost) -> list[Concept]:
    return [Concept(toy_lora(host, "one", 1), THING), Concept(toy_lora(host, "two", 2), STYLE, kind="style")]


def states(bank: Bank) -> set:
    return {(x.numpy().tobytes(), float(t)) for x, t in zip(bank.x, bank.t, strict=True)}


def test_each_lora_is_asked_for_its_own_prompts_in_states_of_the_others() -> None:
    host = ToyHost()
    run = _Run(host, concepts(host), Settings(speed="fast", steps=2), lambda *_: None, by_closed_form)
    for place in range(3):
        run.look(place, ())
    run.teachers.look_astray()
    asked_for = plan.states(run.texts, run.settings)
    assert len(run.teachers.stray) == 3 and min(asked_for) > 20
    for place, (bank, own) in enumerate(zip(run.teachers.stray, run.teachers.own, strict=True)):
        changes = changes_of(run.concepts[place].lora, host.layers()) if place < 2 else {}
        elsewhere = set().union(*(states(other) for other in run.teachers.own if other is not own))
        assert states(bank) <= elsewhere and not states(bank) <= states(own)
        assert len(bank) == 2 * asked_for[place]
        assert bank.prompts == own.prompts
        asked = [bank.prompts[number] != "" for number in bank.prompt]
        assert sum(asked) == len(asked) / 2  # each state with a prompt and without, as guidance puts them together
        with applied(host.layers(), changes), torch.no_grad():
            context = host.encode(bank.prompts)[bank.prompt]
            wanted = host.predict(torch.stack(bank.x), torch.stack(bank.t), context)
        torch.testing.assert_close(torch.stack(bank.prediction), wanted)


def test_a_second_look_asks_each_lora_in_states_of_what_the_merged_one_draws() -> None:
    host = ToyHost()
    run = _Run(host, concepts(host), Settings(speed="best", steps=2), lambda *_: None, by_closed_form)
    merged = changes_of(toy_lora(host, "merged", 3), host.layers())
    run.teachers.look_again(merged)
    run.teachers.look_again(merged)
    first, second = run.teachers.again
    for place, bank in enumerate(first):
        changes = changes_of(run.concepts[place].lora, host.layers()) if place < 2 else {}
        assert len(bank) == 2 * 2 * plan.AGAIN and not states(bank) & states(second[place])
        with applied(host.layers(), merged), torch.no_grad():
            drawn = run.teachers._draw("", bank.prompts[:-1], 3000)
        assert states(drawn) == states(bank)
        with applied(host.layers(), changes), torch.no_grad():
            context = host.encode(bank.prompts)[bank.prompt]
            wanted = host.predict(torch.stack(bank.x), torch.stack(bank.t), context)
        torch.testing.assert_close(torch.stack(bank.prediction), wanted)
        assert not torch.allclose(torch.stack(drawn.prediction), wanted, atol=1e-2)


@pytest.mark.parametrize(
    ("speed", "weight", "times"),
    [("closed", 1.0, 0), ("fast", 1.0, 1), ("balanced", 1.0, 2), ("best", 1.0, 3), ("best", 0.0, 0)],
)
def test_a_merge_looks_again_in_the_middle_of_the_polish(
    monkeypatch: pytest.MonkeyPatch, speed: str, weight: float, times: int
) -> None:
    monkeypatch.setitem(plan.POLISH_STEPS, "balanced", 150)
    monkeypatch.setitem(plan.POLISH_STEPS, "best", 160)
    host, told = ToyHost(), []
    settings = Settings(speed=speed, steps=2, again=weight)
    merge(host, concepts(host), settings, lambda stage, share, _: told.append((share, stage)))
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    stages = [stage for _, stage in told]
    looks = [before.startswith("Polishing") and now == LOOKING for before, now in itertools.pairwise(stages)]
    assert sum(looks) == times and (LOOKING in stages) == (times > 0)


def test_the_same_seed_asks_the_same_and_another_something_else() -> None:
    host, told = ToyHost(), []
    banks = [Bank([word, ""]) for word in ("a", "b", "c")]
    for number, bank in enumerate(banks):
        for step in range(8):
            x, t = torch.full((4, 8, 8), number + step / 8), torch.tensor(100.0 * step)
            for prompt in (0, 1):
                bank.add(x, t, prompt, torch.zeros_like(x))
    one, same, other = (astray(host, banks, 0, 12, 5, seed, told.append) for seed in (1, 1, 2))
    assert torch.equal(torch.stack(one.x), torch.stack(same.x))
    assert not torch.equal(torch.stack(one.x), torch.stack(other.x))
    assert sum(told) == 3 * 24 and max(told) == 10


def test_where_there_is_no_other_picture_nothing_goes_astray() -> None:
    assert len(astray(ToyHost(), [Bank(["a", ""])], 0, 8, 4, 0, lambda rows: None)) == 0


@pytest.mark.parametrize(("speed", "weight"), [("fast", 0.5), ("fast", 0.0), ("closed", 0.5), ("balanced", 0.5)])
def test_a_merge_looks_at_them_if_it_is_polished_and_they_have_weight(speed: str, weight: float) -> None:
    host, told = ToyHost(), []
    settings = Settings(speed=speed, steps=2, astray=weight)
    merge(host, concepts(host), settings, lambda *now: told.append(now))
    looked = any(stage == "Looking at what could go wrong" for stage, _, _ in told)
    assert looked == (speed != "closed" and weight > 0)
    assert [share for _, share, _ in told] == sorted(share for _, share, _ in told)
