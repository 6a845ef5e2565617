"""Polish: what it starts from, what it learns from, and that half precision does not stop it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toy import ToyHost, toy_lora

from loraclr.bank import Bank, filing
from loraclr.capture import applied
from loraclr.changes import changes_of
from loraclr.hosts import Context
from loraclr.polish import CHECK, Look, _descend, _loss, missed, polish, together
from loraclr.training import balanced


def bank_of(host: ToyHost, changes, prompts: list[str]) -> Bank:
    bank = Bank([*prompts, ""])
    with applied(host.layers(), changes), torch.no_grad():
        contexts = host.encode(bank.prompts)
        with host.watch(filing(bank, contexts)):
            host.sample(prompts, 0, 6, 3.0, 64, 64)
    return bank


class HalfHost(ToyHost):
    """The toy with its UNet in half precision, its weights and so its gradients very small."""

    def __init__(self) -> None:
        super().__init__()
        self.unet.half()
        self.unet.outward.weight.data *= 1e-2
        self.unet.outward.bias.data.zero_()

    def layers(self) -> dict[str, nn.Module]:
        return {"lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": self.unet.ff}

    def predict(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        return self.unet(x.half(), t.half(), context.tokens.half()).float()


def test_balanced_factors_have_the_same_product_and_one_size() -> None:
    torch.manual_seed(0)
    before = 1e2 * torch.randn(4, 2), 1e-2 * torch.randn(2, 5)
    up, down = balanced(*before)
    torch.testing.assert_close(up @ down, before[0] @ before[1])
    torch.testing.assert_close(up.square().mean(), down.square().mean())
    assert all(value.isfinite().all() for value in balanced(torch.zeros(4, 2), torch.randn(2, 5)))


def test_a_perfect_start_misses_nothing_and_no_change_misses_all() -> None:
    host = ToyHost()
    changes = changes_of(toy_lora(host, "a", 1), host.layers())
    banks = [bank_of(host, changes, ["a sks", "a photo of a sks"]), bank_of(host, {}, ["a dog", "a cat"])]
    assert missed(host, host.layers(), changes, banks, 5)[0] < 1e-9
    assert abs(missed(host, host.layers(), {}, banks, 5)[0] - 1) < 1e-6
    assert missed(host, host.layers(), {}, banks, 5)[1] < 1e-12


def test_entries_of_one_noise_go_together() -> None:
    host = ToyHost()
    bank = bank_of(host, {}, ["a dog", "a cat"])
    pairs = together(bank)
    assert len(pairs) == len(bank) // 2
    assert sorted(entry for pair in pairs for entry in pair) == list(range(len(bank)))
    for told, untold in pairs:
        assert bank.prompts[bank.prompt[told]] and not bank.prompts[bank.prompt[untold]]
        assert torch.equal(bank.x[told], bank.x[untold]) and bank.t[told] == bank.t[untold]


def test_an_entry_without_partner_is_alone() -> None:
    bank = Bank(["a dog", ""])
    bank.add(torch.zeros(4, 2, 2), torch.tensor(1.0), 0, torch.zeros(4, 2, 2))
    bank.add(torch.ones(4, 2, 2), torch.tensor(1.0), 1, torch.zeros(4, 2, 2))
    assert together(bank) == [(0,), (1,)]


def test_the_guided_loss_against_its_definition() -> None:
    torch.manual_seed(0)
    told, untold, teachers = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    unit = torch.stack([told[0] - teachers[0], untold[0] - teachers[1]])
    mine, its = untold[0] + 4 * (told[0] - untold[0]), teachers[1] + 4 * (teachers[0] - teachers[1])
    assert torch.allclose(_loss(unit, 4.0, 1.0), (mine - its).square().mean() / 25)
    assert torch.allclose(_loss(unit, 4.0, 0.0), unit.square().mean())
    assert torch.allclose(_loss(unit[:1], 4.0, 1.0), unit[0].square().mean())
    same = unit[:1].expand(2, -1, -1, -1)  # what is wrong alike with and without the prompt is not made larger
    assert torch.allclose(_loss(same, 4.0, 1.0), unit[0].square().mean() / 25)


def run(host: ToyHost, steps: int = 30):
    layers = host.layers()
    teacher = changes_of(toy_lora(host, "a", 1), layers)
    start = changes_of(toy_lora(host, "b", 2, size=0.1), layers)
    banks = [bank_of(host, teacher, ["a sks", "a photo of a sks"]), bank_of(host, {}, ["a dog", "a cat"])]
    told = []
    result = polish(host, host.layers(), start, banks, [1.0, 0.3], steps, 8, 0, lambda *tick: told.append(tick))
    return start, result, banks, told


def test_it_learns_the_teacher_and_tells_every_step() -> None:
    host = ToyHost()
    start, result, banks, told = run(host, 150)
    before, after = (missed(host, host.layers(), changes, banks, 8)[0] for changes in (start, result))
    assert after < 0.5 * before
    assert [step for step, _ in told] == list(range(1, 151))
    assert all(up.shape == start[name][0].shape and not up.requires_grad for name, (up, _) in result.items())


def test_what_a_look_finds_is_learnt_from_then_on() -> None:
    host, shown = ToyHost(), []
    layers = host.layers()
    teacher, start = changes_of(toy_lora(host, "a", 1), layers), changes_of(toy_lora(host, "b", 2, size=0.1), layers)
    neutral, found = bank_of(host, {}, ["a dog", "a cat"]), bank_of(host, teacher, ["a sks", "a photo of a sks"])

    def at(changes) -> tuple[list[Bank], list[float]]:
        shown.append(changes)
        return [neutral, found], [1.0, 3.0]

    def left(look: Look | None) -> tuple[float, list[int]]:
        told = []
        result = polish(host, layers, start, [neutral], [1.0], 150, 8, 0, lambda *tick: told.append(tick), look=look)
        return missed(host, layers, result, [found, neutral], 8)[0], [step for step, _ in told]

    (without, _), (with_it, steps) = left(None), left(Look([40], at))
    assert with_it < 0.7 * without and steps == list(range(1, 151))
    (changes,) = shown
    assert any(not torch.equal(pair[0], balanced(*start[name])[0]) for name, pair in changes.items())


def test_a_look_can_weigh_anew_what_was_there() -> None:
    host = ToyHost()
    layers = host.layers()
    first, second = (changes_of(toy_lora(host, name, seed), layers) for seed, name in enumerate(("a", "b"), 1))
    start = {name: (up, 0.1 * down) for name, (up, down) in first.items()}
    banks = [bank_of(host, first, ["a sks"]), bank_of(host, second, ["a sks"])]  # which contradict each other

    def left(shares: list[float]) -> list[float]:
        look = Look([20], lambda _: (banks, shares))
        result = polish(host, layers, start, banks, [1.0, 1.0], 100, 8, 0, lambda *_: None, look=look)
        return missed(host, layers, result, [*banks, banks[0]], 8)[:2]

    one, other = left([1.0, 0.01]), left([0.01, 1.0])
    assert one[0] < 0.5 * other[0] and other[1] < 0.5 * one[1]


def test_half_precision_learns_too() -> None:
    host = HalfHost()
    start, result, banks, _ = run(host, 60)
    before, after = (missed(host, host.layers(), changes, banks, 8)[0] for changes in (start, result))
    assert after < 0.9 * before


def test_steps_that_overflow_change_nothing() -> None:
    class Broken(ToyHost):
        def predict(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
            return super().predict(x, t, context) * (torch.inf if torch.is_grad_enabled() else 1.0)

    start, result, _, _ = run(Broken(), 3)
    for name, pair in start.items():
        for before, after in zip(balanced(*pair), result[name], strict=True):
            torch.testing.assert_close(after, before)


def test_rows_one_by_one_teach_the_same() -> None:
    host = ToyHost()
    layers = host.layers()
    teacher, start = (changes_of(toy_lora(host, name, seed), layers) for name, seed in (("a", 1), ("b", 2)))
    banks = [bank_of(host, teacher, ["a sks", "a photo of a sks"]), bank_of(host, {}, ["a dog", "a cat"])]
    whole, single = (
        polish(host, layers, start, banks, [1.0, 0.3], 5, 8, 0, lambda *_: None, at_once=at_once)
        for at_once in (None, 1)
    )
    for name, pair in whole.items():
        for a, b in zip(pair, single[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class TestHeldOut:
    def told(self, scores: list[float], steps: int = 5 * CHECK) -> tuple[int, list, dict]:
        """How many steps a run takes whose held-out looks give these scores, what was looked at, and what came out."""
        host, looked, ticks = ToyHost(), [], []
        layers, rest = host.layers(), iter(scores)
        teacher, start = (changes_of(toy_lora(host, name, seed), layers) for name, seed in (("a", 1), ("b", 2)))
        banks = [bank_of(host, teacher, ["a sks"]), bank_of(host, {}, ["a dog"])]

        def held_out(found) -> float:
            looked.append(found)
            return next(rest)

        result = polish(
            host, layers, start, banks, [1.0, 0.3], steps, 2, 0, lambda *tick: ticks.append(tick), held_out=held_out
        )
        return len(ticks), looked, result

    def test_a_run_that_gets_worse_ends_and_its_best_is_kept(self) -> None:
        steps, looked, result = self.told([0.3, 0.2, 0.25, 0.21, 0.0])
        assert steps == 4 * CHECK
        name = next(iter(result))
        assert torch.equal(result[name][0], looked[1][name][0])
        assert not torch.equal(result[name][0], looked[0][name][0])

    def test_a_run_that_gets_better_again_goes_on(self) -> None:
        steps, looked, result = self.told([0.3, 0.4, 0.2, 0.25, 0.1])
        assert steps == 5 * CHECK
        assert torch.equal(*(each[next(iter(result))][1] for each in (result, looked[-1])))

    def test_the_last_steps_count_too(self) -> None:
        """A run may end between two looks: what it has learnt since the last one is not thrown away."""
        steps, looked, result = self.told([0.3, 0.2], CHECK + 28)
        assert steps == CHECK + 28 and len(looked) == 2
        assert torch.equal(result[next(iter(result))][1], looked[1][next(iter(result))][1])

    def test_a_short_run_is_not_looked_at(self) -> None:
        steps, looked, _ = self.told([], CHECK - 1)
        assert steps == CHECK - 1 and not looked


@pytest.mark.parametrize("looks", [(), (4,), (7,), (8,)])
def test_the_last_steps_learn_from_pairs_and_the_others_from_rows_alone(looks, monkeypatch) -> None:
    host, seen = ToyHost(), []

    def watched(host, banks, units, *rest) -> float:
        seen.append([len(unit) for unit in units])
        return _descend(host, banks, units, *rest)

    monkeypatch.setattr("loraclr.polish._descend", watched)
    layers = host.layers()
    teacher, start = (changes_of(toy_lora(host, name, seed), layers) for name, seed in (("a", 1), ("b", 2)))
    banks = [bank_of(host, teacher, ["a sks"]), bank_of(host, {}, ["a dog"])]
    look = Look(looks, lambda _: ([*banks, bank_of(host, teacher, ["a cat"])], [1.0, 1.0, 1.0]))
    for guided, at_once, pairs in ((0.3, None, 3), (0.3, 2, 3), (0.3, 1, 0), (0.0, None, 0)):
        seen.clear()
        polish(
            host, layers, start, banks, [1.0, 1.0], 10, 8, 0, lambda *_: None, at_once=at_once, guidance=4.0,
            guided=guided, look=look,
        )  # fmt: skip
        assert seen == [[1] * 8] * (10 - pairs) + [[2] * 4] * pairs


def test_banks_of_different_precision_are_learnt_from_together() -> None:
    """Pictures come in the UNet's own precision, scenes of two, which are put together here, in float32."""
    host = ToyHost()
    layers = host.layers()
    teacher, start = (changes_of(toy_lora(host, name, seed), layers) for name, seed in (("a", 1), ("b", 2)))
    banks = [bank_of(host, teacher, ["a sks"]), bank_of(host, {}, ["a dog"])]
    banks[0].x, banks[0].prediction = (
        [value.half() for value in values] for values in (banks[0].x, banks[0].prediction)
    )
    result = polish(host, layers, start, banks, [1.0, 1.0], 3, 8, 0, lambda *_: None, guidance=4.0, guided=0.3)
    assert all(value.isfinite().all() for pair in result.values() for value in pair)
