"""Scenes of several concepts: which are planned, and that every half comes from its own LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from toy import ToyHost, toy_lora

from loraclr import scenes
from loraclr.capture import applied
from loraclr.changes import Changes, changes_of
from loraclr.hosts import Context
from loraclr.prompts import STYLED


def acting(host: ToyHost, asked: list[Changes]) -> Callable:
    @contextmanager
    def act(places: Sequence[int]) -> Iterator[None]:
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(applied(host.layers(), asked[place]))
            yield

    return act


def test_all_ordered_pairs_come_up_and_styles_do_not() -> None:
    plan = scenes.side_by_side(["sks", None, "zyk", "kts"], 12)
    words, pairs = {0: "sks", 2: "zyk", 3: "kts"}, set()
    for scene in plan:
        left, right = scene.parts
        (first,), (second,) = left.concepts, right.concepts
        pairs.add((first, second))
        assert (left.begin, left.end, right.begin, right.end) == (0, 0.5, 0.5, 1)
        assert scene.prompt.index(words[first]) < scene.prompt.index(words[second])
        # Each half's LoRA is asked for its concept, in its place, and for something that it may know in the other's.
        assert left.prompt == scene.prompt.replace(words[second], "dog")
        assert right.prompt == scene.prompt.replace(words[first], "cat")
    assert pairs == {(0, 2), (2, 0), (0, 3), (3, 0), (2, 3), (3, 2)}


def test_every_concept_comes_up_early() -> None:
    plan = scenes.side_by_side(["a", "b", "c", "d"], 4)
    for half in (0, 1):
        assert {scene.parts[half].concepts for scene in plan} == {(0,), (1,), (2,), (3,)}


def test_one_thing_alone_has_no_scenes() -> None:
    assert scenes.side_by_side(["sks", None], 4) == []


def test_things_come_up_in_styles_in_turn() -> None:
    plan = scenes.styled(["sks", None, "zyk", None], [None, "ink", None, "oil"], 8)
    assert [scene.parts[0].concepts for scene in plan[:4]] == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert [scene.concepts for scene in plan[4:]] == [scene.concepts for scene in plan[:4]]
    assert len({scene.prompt for scene in plan}) == 8, "a pair that comes up again has another background"
    for scene in plan:
        (part,) = scene.parts
        thing, style = part.concepts
        assert part.prompt == scene.prompt and part.columns(8) == slice(0, 8)
        assert scene.prompt.index(("sks", "", "zyk")[thing]) < scene.prompt.index(("", "ink", "", "oil")[style])


def test_no_picture_of_a_thing_in_a_style_comes_up_twice() -> None:
    for count in (5, 40):
        plan = scenes.styled(["sks", None, "zyk"], [None, "ink", None], count)
        assert len(set(plan)) == len(plan) == min(count, 2 * len(STYLED))


def test_without_a_thing_or_a_style_there_is_nothing_in_a_style() -> None:
    assert scenes.styled(["sks", "zyk"], [None, None], 4) == scenes.styled([None], ["ink"], 4) == []


def test_a_thing_in_a_style_is_predicted_by_both_loras() -> None:
    host = ToyHost()
    asked = [changes_of(toy_lora(host, name, seed), host.layers()) for seed, name in enumerate(("a", "b"), start=1)]
    plan, told = scenes.styled(["sks", None], [None, "ink"], 2), []
    bank, _ = scenes.draw(host, acting(host, asked), plan, 5, 4, 3.0, 64, told.append)
    assert len(bank) == sum(told) == 2 * 2 * 4

    def away(entry: int, *who: Changes) -> float:
        x, t, text = bank.x[entry][None], bank.t[entry][None], bank.prompts[bank.prompt[entry]]
        with ExitStack() as stack, torch.no_grad():
            for changes in who:
                stack.enter_context(applied(host.layers(), changes))
            return float((host.predict(x, t, host.encode([text]))[0] - bank.prediction[entry]).abs().max())

    for entry in range(len(bank)):
        assert away(entry, *asked) < 1e-5 < 1e-3 < min(away(entry, asked[0]), away(entry, asked[1]), away(entry))


def test_each_half_is_predicted_by_its_own_lora() -> None:
    host = ToyHost()
    asked = [changes_of(toy_lora(host, name, seed), host.layers()) for seed, name in enumerate(("a", "b"), start=1)]
    plan, told = scenes.side_by_side(["sks", "zyk"], 3), []
    bank, latents = scenes.draw(host, acting(host, asked), plan, 5, 4, 3.0, 64, told.append)
    assert latents.shape == (3, 4, 8, 8) and latents.isfinite().all()
    assert len(bank) == 2 * 3 * 4 and sum(told) == 2 * len(bank)
    for entry in range(len(bank)):
        number = bank.prompt[entry]
        # An empty prompt's row stands right behind its scene's.
        scene = plan[number if number < 3 else bank.prompt[entry - 1]]
        for part, region in zip(scene.parts, (slice(0, 4), slice(4, 8)), strict=True):
            with applied(host.layers(), asked[part.concepts[0]]), torch.no_grad():
                text = part.prompt if number < 3 else ""
                wanted = host.predict(bank.x[entry][None], bank.t[entry][None], host.encode([text]))
            torch.testing.assert_close(bank.prediction[entry][..., region], wanted[0][..., region])


def test_one_lora_on_both_halves_samples_as_ddim_does() -> None:
    """With the same LoRA left and right, the composition is plain DDIM: compared with the formula written out."""
    host = ToyHost()
    change = changes_of(toy_lora(host, "a", 1), host.layers())
    halves = (scenes.Part((place,), "a sks and a sks", place / 2, (place + 1) / 2) for place in (0, 1))
    scene = scenes.Scene("a sks and a sks", tuple(halves))
    _, latents = scenes.draw(host, acting(host, [change, change]), [scene], 0, 3, 2.0, 64, lambda _: None)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    times, alphas = [667, 334, 1], [*(host.alphas[t].double() for t in (667, 334, 1)), torch.tensor(1.0)]
    with applied(host.layers(), change), torch.no_grad():
        for k, t in enumerate(times):
            told, untold = (
                host.predict(x.float(), torch.tensor([float(t)]), host.encode([text])).double()
                for text in (scene.prompt, "")
            )
            noise = untold + 2.0 * (told - untold)
            clean = (x - (1 - alphas[k]) ** 0.5 * noise) / alphas[k] ** 0.5
            x = alphas[k + 1] ** 0.5 * clean + (1 - alphas[k + 1]) ** 0.5 * noise
    torch.testing.assert_close(latents.double(), x, rtol=1e-4, atol=1e-4)


class Velocity(ToyHost):
    """The toy predicting v = √ᾱ ε − √(1 − ᾱ) z_0 instead of ε."""

    target = "v"

    def predict(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        noise, alpha = super().predict(x, t, context), self.alphas[t.long()].view(-1, 1, 1, 1)
        clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def test_a_model_that_predicts_v_draws_the_same_scene() -> None:
    drawn = []
    for host in (ToyHost(), Velocity()):
        asked = [changes_of(toy_lora(host, name, seed), host.layers()) for seed, name in enumerate(("a", "b"), start=1)]
        plan = scenes.side_by_side(["sks", "zyk"], 2)
        bank, latents = scenes.draw(host, acting(host, asked), plan, 5, 4, 3.0, 64, lambda _: None)
        drawn.append((latents, bank.prediction))
    torch.testing.assert_close(drawn[0][0], drawn[1][0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(drawn[0][1][0], drawn[1][1][0], atol=0.1)
