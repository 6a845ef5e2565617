"""Scenes of several concepts: which are planned, and that every half comes from its own LoRA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from toy import ToyHost, toy_lora

from loraclr import scenes
from loraclr.capture import Changes, applied, changes_of
from loraclr.hosts import Context


def acting(host: ToyHost, asked: list[Changes]) -> Callable:
    return lambda place: applied(host.layers(), asked[place])


def test_all_ordered_pairs_come_up_and_styles_do_not() -> None:
    plan = scenes.plan(["sks", None, "zyk", "kts"], 12)
    assert {(scene.left, scene.right) for scene in plan} == {(0, 2), (2, 0), (0, 3), (3, 0), (2, 3), (3, 2)}
    for scene in plan:
        words = {0: "sks", 2: "zyk", 3: "kts"}
        assert scene.prompt.index(words[scene.left]) < scene.prompt.index(words[scene.right])
        # Each half's LoRA is asked for its concept, in its place, and for something that it may know in the other's.
        assert scene.halves[0] == scene.prompt.replace(words[scene.right], "dog")
        assert scene.halves[1] == scene.prompt.replace(words[scene.left], "cat")


def test_every_concept_comes_up_early() -> None:
    plan = scenes.plan(["a", "b", "c", "d"], 4)
    assert {scene.left for scene in plan} == {scene.right for scene in plan} == {0, 1, 2, 3}


def test_one_thing_alone_has_no_scenes() -> None:
    assert scenes.plan(["sks", None], 4) == []


def test_each_half_is_predicted_by_its_own_lora() -> None:
    host = ToyHost()
    asked = [changes_of(toy_lora(host, name, seed), host.layers()) for seed, name in enumerate(("a", "b"), start=1)]
    plan, told = scenes.plan(["sks", "zyk"], 3), []
    bank, latents = scenes.draw(host, acting(host, asked), plan, 5, 4, 3.0, 64, told.append)
    assert latents.shape == (3, 4, 8, 8) and latents.isfinite().all()
    assert len(bank) == 2 * 3 * 4 and sum(told) == 2 * len(bank)
    for entry in range(len(bank)):
        number = bank.prompt[entry]
        halves = plan[number].halves if number < 3 else ("", "")
        # An empty prompt's row stands right behind its scene's.
        scene = plan[number if number < 3 else bank.prompt[entry - 1]]
        for concept, text, region in ((scene.left, halves[0], slice(0, 4)), (scene.right, halves[1], slice(4, 8))):
            with applied(host.layers(), asked[concept]), torch.no_grad():
                wanted = host.predict(bank.x[entry][None], bank.t[entry][None], host.encode([text]))
            torch.testing.assert_close(bank.prediction[entry][..., region], wanted[0][..., region])


def test_one_lora_on_both_halves_samples_as_ddim_does() -> None:
    """With the same LoRA left and right, the composition is plain DDIM: compared with the formula written out."""
    host = ToyHost()
    change = changes_of(toy_lora(host, "a", 1), host.layers())
    scene = scenes.Scene(0, 1, "a sks and a sks", ("a sks and a sks", "a sks and a sks"))
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
        plan = scenes.plan(["sks", "zyk"], 2)
        bank, latents = scenes.draw(host, acting(host, asked), plan, 5, 4, 3.0, 64, lambda _: None)
        drawn.append((latents, bank.prediction))
    torch.testing.assert_close(drawn[0][0], drawn[1][0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(drawn[0][1][0], drawn[1][1][0], atol=0.1)
