"""Banks: what the UNet was asked and predicted while a host drew; the polish learns from these."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraclr.hosts import Context, Record


@dataclass
class Bank:
    """UNet calls of one concept's own pictures: what it saw and what it predicted. Polish needs no other teacher.

    Lists of equal length, one entry for each picture and step, on the CPU, in the precision they were told in: x
    (4, h, w), t (), prediction (4, h, w), and the number of the prompt in `prompts`.
    """

    prompts: list[str]
    x: list[Tensor] = field(default_factory=list)
    t: list[Tensor] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    prediction: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)

    def add(self, x: Tensor, t: Tensor, prompt: int, prediction: Tensor) -> None:
        """One entry more, copied to the CPU."""
        self.t.append(t.detach().float().cpu().clone())
        for values, value in ((self.x, x), (self.prediction, prediction)):
            values.append(value.detach().cpu().clone())
        self.prompt.append(prompt)

    def spread(self, rows: int) -> tuple[list[str], Tensor, Tensor] | None:
        """Up to `rows` entries with a prompt, spread over the steps: prompts, x (B, 4, h, w), t (B,); None if empty."""
        entries = [entry for entry, prompt in enumerate(self.prompt) if self.prompts[prompt]]
        entries = entries[:: max(1, len(entries) // rows)][:rows]
        if not entries:
            return None
        x, t = (torch.stack([values[entry] for entry in entries]) for values in (self.x, self.t))
        return [self.prompts[self.prompt[entry]] for entry in entries], x, t

    def thinned(self, every: int) -> Bank:
        """Every so many entries of this bank; an odd number, as those with a prompt and without often alternate."""
        return Bank(self.prompts, self.x[::every], self.t[::every], self.prompt[::every], self.prediction[::every])


def filing(bank: Bank, contexts: Context) -> Record:
    """A `Record` that files UNet calls in `bank`.

    Hosts batch conditional and unconditional rows as they like, so a row's prompt is found by its context.

    Args:
        contexts: what the host's text encoders give for `bank.prompts`.
    """
    known = contexts.tokens.float()

    def record(x: Tensor, t: Tensor, context: Context, prediction: Tensor) -> None:
        tokens = context.tokens.detach().float()
        if tokens.shape[2] != known.shape[2]:
            return
        # The same prompt may have another length, that of the longest it was encoded with.
        length = min(tokens.shape[1], known.shape[1])
        near = torch.cdist(tokens[:, :length].flatten(1), known[:, :length].to(tokens.device).flatten(1))
        times = t.reshape(-1).expand(x.shape[0])
        for row, place in enumerate(near.argmin(1).tolist()):
            bank.add(x[row], times[row], place, prediction[row])

    return record
