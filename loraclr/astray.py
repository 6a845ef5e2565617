"""States astray: what a concept's own LoRA makes of pictures that are on their way to something else.

On its own way to a picture a LoRA's concept shows in every state but the noisiest. A merge that learns from such
states alone learns to go by what it sees, and where its first steps lead a little aside, the concept fades from the
picture. So each LoRA is asked about states of other concepts' ways, too, where nothing but the prompt says what is
wanted. That is the thought of DAgger (Ross et al. 2011: teach a pupil where its errors lead) with states that are there
already in the place of the pupil's own, so no picture is drawn for it; the pupil's own come in the middle of the polish
(`loraclr.teachers.Teachers.look_again`). Asked without a prompt, in the same states, the LoRAs tell what they have in
common, which is what guidance is to go away from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from loraclr.bank import Bank
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
    chosen = [(*state, chance.randrange(len(texts))) for state in chance.sample(states, min(count, len(states)))]
    for begin in range(0, len(chosen), batch):
        part = chosen[begin : begin + batch]
        for bank, entry, prompt in [*part, *((bank, entry, len(texts)) for bank, entry, _ in part)]:
            found.add(bank.x[entry], bank.t[entry], prompt, bank.prediction[entry])
    answer(host, found, batch, tick)
    return found


@torch.no_grad()
def answer(host: Host, bank: Bank, batch: int, tick: Callable[[int], object]) -> None:
    """Put what the host predicts now in place of a bank's predictions, twice `batch` entries at a time."""
    contexts = host.encode(bank.prompts)
    for begin in range(0, len(bank), 2 * batch):
        rows = slice(begin, begin + 2 * batch)
        context = contexts[bank.prompt[rows]]
        x = torch.stack(bank.x[rows]).to(context.tokens)
        predicted = host.predict(x, torch.stack(bank.t[rows]).to(x.device), context)
        bank.prediction[rows] = list(predicted.to(bank.prediction[begin]).cpu())
        tick(len(x))
