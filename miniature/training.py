"""One training loop for every part of the miniature: warm-up and cosine, clipping, averaging, progress, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

SAVE_SECONDS = 60.0


class Average:
    """Exponential moving average of a module's parameters, with a horizon that grows with the steps taken."""

    def __init__(self, module: nn.Module, decay: float = 0.998) -> None:
        self.module, self.decay = module, decay
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.module.named_parameters():
            self.values[name].lerp_(value, 1 - decay)

    @torch.no_grad()
    def store(self) -> None:
        """Put the averaged values into the module."""
        for name, value in self.module.named_parameters():
            value.copy_(self.values[name])


def train(
    name: str,
    module: nn.Module,
    groups: list[dict],
    loss: Callable[[int], Tensor],
    steps: int,
    run: Path,
    warmup: int = 100,
    clip: float = 1.0,
    on_save: Callable[[], None] | None = None,
) -> None:
    """Minimise `loss(step)` over `steps` steps and leave the averaged parameters in `module`.

    The state lies in `run/NAME.state` and is written every minute; a run that was stopped goes on from there,
    and one that is finished returns at once with its result in `module`.

    Args:
        groups: parameter groups for AdamW; each `lr` is the peak rate.
        loss: called with the step; returns a scalar with gradient.
    """
    run.mkdir(parents=True, exist_ok=True)
    path = run / f"{name}.state"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    average = Average(module)
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, first = state["average"], state["step"]

    def save(step: int) -> None:
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
        torch.save({**state, "step": step}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5.0)
    saved, mean = time.monotonic(), None
    for step in bar:
        rate = min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        average.update(step)
        mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if time.monotonic() - saved > SAVE_SECONDS:
            save(step + 1)
            saved = time.monotonic()
    if first < steps:
        save(steps)
    average.store()
