"""States astray: what a concept's own LoRA makes of pictures that are on their way to something else.

On its own way to a picture a LoRA's concept shows in every state but the noisiest. A merge that learns from such
states alone learns to go by what it sees, and where its first steps lead a little aside, the concept fades from the
picture. So each LoRA is asked about states of other concepts' ways, too, where nothing but the prompt says what is
wanted. That is the thought of DAgger (Ross et al. 2011: teach a pupil where its errors lead) with states that are there
already in the place of the pupil's own, so no picture is drawn for it. Asked without a prompt, in the same states, the
LoRAs tell what they have in common, which is what guidance is to go away from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from loraclr.capture import Bank
from loraclr.hosts import Host


@torch.no_grad()
def astray(
    host: Host, banks: Sequence[Bank], place: int, count: int, batch: int, seed: int, tick: Callable[[int], object]
) -> Bank:
    """Up to `count` states of other banks, and what the UNet predicts there for bank `place`'s prompts and for none.

    Args:
        banks: one for each concept and last the neutral one; the LoRA of bank `place` is to act.
        batch: states that go through the UNet at a time, each twice.
        tick: told how many rows are done.
    """
    chance = random.Random(f"{seed} {place}")
    texts = [prompt for prompt in banks[place].prompts if prompt]
    others = [bank for bank in banks if bank is not banks[place]]
    # A state stands twice in a bank, with a prompt and without.
    states = [(bank, entry) for bank in others for entry, prompt in enumerate(bank.prompt) if bank.prompts[prompt]]
    found = Bank([*texts, ""])
    if not states or not texts:
        return found
    contexts = host.encode(found.prompts)
    drawn = chance.sample(states, min(count, len(states)))
    chosen = [(bank, entry, chance.randrange(len(texts))) for bank, entry in drawn]
    for begin in range(0, len(chosen), batch):
        part = chosen[begin : begin + batch]
        asked = [*(prompt for _, _, prompt in part), *[len(texts)] * len(part)]
        context = contexts[asked]
        x = torch.stack([bank.x[entry] for bank, entry, _ in part] * 2).to(context.tokens)
        t = torch.stack([bank.t[entry] for bank, entry, _ in part] * 2).to(x.device)
        predicted = host.predict(x, t, context)
        for row, ((bank, entry, _), prompt) in enumerate(zip(part * 2, asked, strict=True)):
            found.add(bank.x[entry], bank.t[entry], prompt, predicted[row].to(bank.prediction[entry].dtype))
        tick(len(asked))
    return found
