"""Polish: the merged factors trained end to end, so that the model predicts with them what it predicts with each LoRA.

The layerwise optimum treats layers one by one; errors add up on the way to the picture. Here the loss is the paper's
positive term (Eq. 1 with d_p of Eq. 2) at the model's output instead of a layer's,
E ‖ε_merged(z_t, t, p_i) − ε_i(z_t, t, p_i)‖² over the concepts' own denoising runs, unconditional branch included, plus
the same on neutral prompts with the base model as teacher. The teachers' predictions were made before, so in a step no
teacher runs; only a `Look` asks them again. Guidance puts a prompt's prediction and the one without a prompt together
as u + g (c − u), which makes errors that differ larger and errors that are alike cancel; so in the last steps a share
of the loss is on this guided prediction.
Models that predict ε are compared in v, too: at one z_t the two differences are the same up to a
factor, Δε = √ᾱ_t Δv, and in ε the noisiest steps, which decide what is drawn and where, would hardly count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraclr.bank import Bank
from loraclr.capture import applied
from loraclr.changes import Changes
from loraclr.hosts import Host
from loraclr.reading import Reading
from loraclr.training import LOSS_SCALE, Trained, schedule
from loraclr.whitening import Whitening

CHECK = 200  # steps between two looks at what was kept out
PATIENCE = 2  # looks in a row that may be worse than the best before a run ends
FINISH = 0.7  # share of the steps that learn from rows alone, which are of twice as many states as pairs are


@dataclass(frozen=True)
class Row:
    """One line of training: entry `entry` of bank `bank`."""

    bank: int
    entry: int


def together(bank: Bank) -> list[tuple[int, ...]]:
    """The entries of a bank in pairs that guidance puts together, with the prompt and without, of one z_t and t.

    An entry that has no partner is alone.
    """
    empty = {place for place, prompt in enumerate(bank.prompts) if not prompt}
    key = [(float(t), hash(x.float().numpy().tobytes())) for t, x in zip(bank.t, bank.x, strict=True)]
    without = {key[entry]: entry for entry, prompt in enumerate(bank.prompt) if prompt in empty}
    pairs = [
        (entry, without[key[entry]])
        for entry, prompt in enumerate(bank.prompt)
        if prompt not in empty and key[entry] in without
    ]
    paired = {entry for pair in pairs for entry in pair}
    return pairs + [(entry,) for entry in range(len(bank)) if entry not in paired]


@dataclass(frozen=True)
class Look:
    """A look at what the factors draw by then, in the middle of training.

    Attributes:
        steps: before which it is taken.
        at: changes → what is learnt from afterwards, as banks, and their shares.
    """

    steps: Collection[int]
    at: Callable[[Changes], tuple[Sequence[Bank], Sequence[float]]]


def polish(
    host: Host,
    modules: Mapping[str, nn.Module],
    changes: Changes,
    banks: Sequence[Bank],
    shares: Sequence[float],
    steps: int,
    batch: int,
    seed: int,
    tick: Callable[[int, float], None],
    *,
    at_once: int | None = None,
    whitenings: Mapping[str, Whitening] | None = None,
    guidance: float = 1.0,
    guided: float = 0.0,
    held_out: Callable[[Changes], float] | None = None,
    reading: Reading | None = None,
    reads: float = 1.0,
    fixed: Changes | None = None,
    look: Look | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Train the factors for `steps` steps and return them: those with which least is missed of what was kept out.

    The down factors are trained in the coordinates in which their layer's inputs are white (`loraclr.whitening`).

    Args:
        banks: what to learn from.
        shares: how much of a batch comes from each bank, relative.
        batch: rows in a step.
        at_once: rows through the UNet at a time, None for all: fewer need less memory, and give the same gradients,
            but that a single one cannot be guided.
        tick: told (step, loss relative to the first steps) after each step; may raise to cancel.
        whitenings: of the layers' inputs; a layer without one is trained as it is.
        guidance, guided: g, and the share of the loss that is on the guided prediction, from `FINISH` of the steps on.
        held_out: how much factors miss of what is not learnt from. It is asked every `CHECK` steps and at the end, and
            a run that gets worse there ends early; runs of fewer steps are not looked at.
        fixed: changes that act beside the factors and stay as they are: of norm layers, which have no factors.
        reading, reads: what is learnt about words in each step, too, and its weight; both parts of the loss are shares
            of the LoRAs' effects.
        look: what is looked at on the way.
    Returns:
        Factors by layer name, float32; the ranks are those of `changes`.
    """
    trained = Trained(changes, whitenings or {}, host.device)
    generator = torch.Generator().manual_seed(seed)
    at_once = at_once or batch
    finish = round(FINISH * steps) if guided and at_once > 1 else steps
    units: dict[int, list[tuple[int, ...]]] = {}
    weights, count = _weights(banks, shares, units, False), batch
    first, effect, scale = None, 0.0, LOSS_SCALE
    best, least, worse = None, math.inf, 0
    for step in range(steps):
        looked = look is not None and step in look.steps
        if looked:
            banks, shares = look.at(trained.found())
        if step == finish:
            units.clear()
            count = max(1, batch // 2)
        if looked or step == finish:
            weights = _weights(banks, shares, units, step >= finish)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator).tolist()
        each = [units[id(banks[b])] for b in chosen]
        picked = [own[int(torch.randint(len(own), (1,), generator=generator))] for own in each]
        rows = [tuple(Row(b, entry) for entry in unit) for b, unit in zip(chosen, picked, strict=True)]
        lesson = reading.lesson() if reading else None
        if lesson and not 0.0 < effect < math.inf:
            effect = _effect(host, banks, [row for unit in rows for row in unit], at_once)
        # The hooks stay for the way back, on which a host may compute parts again.
        live = trained.live()
        with torch.enable_grad(), applied(modules, {**live, **(fixed or {})}):
            leaves = [value for pair in live.values() for value in pair]
            loss = _descend(host, banks, rows, at_once, leaves, scale, guidance, guided)
            if lesson:
                reading.learn(lesson, live, reads * effect, scale)
        if not trained.descend(live, schedule(step, steps)):
            scale = max(1.0, scale / 8)  # half precision overflowed on the way back: ask for less from the next step
        first = first or loss
        tick(step + 1, loss / max(first, 1e-20))
        if held_out and steps >= CHECK and ((step + 1) % CHECK == 0 or step + 1 == steps):
            found = trained.found()
            missing = held_out(found)
            best, least, worse = (found, missing, 0) if missing < least else (best, least, worse + 1)
            if worse >= PATIENCE:
                break
    return best or trained.found()


def _weights(
    banks: Sequence[Bank], shares: Sequence[float], units: dict[int, list[tuple[int, ...]]], pairs: bool
) -> Tensor:
    """How often each bank is drawn from (banks,), an empty one never; `units` learn what is drawn of it, by its id."""
    for bank in banks:
        if id(bank) not in units:
            units[id(bank)] = together(bank) if pairs else [(entry,) for entry in range(len(bank))]
    return torch.tensor([share if len(bank) else 0.0 for share, bank in zip(shares, banks, strict=True)])


def _descend(
    host: Host,
    banks: Sequence[Bank],
    units: Sequence[tuple[Row, ...]],
    at_once: int,
    factors: list[Tensor],
    scale: float,
    guidance: float,
    guided: float,
) -> float:
    """Add the gradients of the rows' mean error in v, which is returned, to the factors'; `scale` is out of them."""
    times = torch.stack([banks[unit[0].bank].t[unit[0].entry] for unit in units])
    weights, whole = in_v(host, times) * torch.tensor([float(len(unit)) for unit in units]), 0.0
    weights = (weights / weights.sum()).to(host.device)
    step = max(1, at_once // max(map(len, units)))
    for begin in range(0, len(units), step):
        part = units[begin : begin + step]
        differences = difference(host, banks, [row for unit in part for row in unit]).split(
            [len(unit) for unit in part]
        )
        losses = torch.stack([_loss(one, guidance, guided) for one in differences])
        loss = (losses * weights[begin : begin + step]).sum()
        for value, gradient in zip(factors, torch.autograd.grad(loss * scale, factors, allow_unused=True), strict=True):
            if gradient is not None:
                value.grad += gradient / scale
        whole += loss.item()
    return whole


@torch.no_grad()
def _effect(host: Host, banks: Sequence[Bank], rows: Sequence[Row], at_once: int) -> float:
    """The mean error of these rows in v without any change, so the size of what is to be learnt."""
    weights = in_v(host, torch.stack([banks[row.bank].t[row.entry] for row in rows])).to(host.device)
    parts = [rows[begin : begin + at_once] for begin in range(0, len(rows), at_once)]
    errors = torch.cat([error(host, banks, part) for part in parts])
    return ((errors * weights).sum() / weights.sum()).item()


def _loss(unit: Tensor, guidance: float, guided: float) -> Tensor:
    """The mean squared difference of one row (1, 4, h, w), or of two and of what guidance makes of them."""
    plain = unit.square().mean()
    if len(unit) < 2:
        return plain
    # Divided by what independent errors grow by, so that the two parts are of one size.
    both = (guidance * unit[0] - (guidance - 1) * unit[1]).square().mean() / (guidance**2 + (guidance - 1) ** 2)
    return (1 - guided) * plain + guided * both


def in_v(host: Host, t: Tensor) -> Tensor:
    """What a squared difference of the host's predictions at the timesteps t (B,) is multiplied by to be one of v."""
    if host.target == "v":
        return torch.ones(len(t))
    return 1 / host.alphas.cpu()[t.long().clamp(0, len(host.alphas) - 1)]


def error(host: Host, banks: Sequence[Bank], rows: Sequence[Row]) -> Tensor:
    """Mean squared difference (B,) between what the host predicts now and the rows' teachers."""
    return difference(host, banks, rows).square().flatten(1).mean(1)


def difference(host: Host, banks: Sequence[Bank], rows: Sequence[Row]) -> Tensor:
    """What the host predicts now less the rows' teachers (B, 4, h, w)."""
    texts = [banks[row.bank].prompts[banks[row.bank].prompt[row.entry]] for row in rows]
    unique = list(dict.fromkeys(texts))
    context = host.encode(unique)[[unique.index(text) for text in texts]]
    x = torch.stack([banks[row.bank].x[row.entry] for row in rows]).to(context.tokens)
    t = torch.stack([banks[row.bank].t[row.entry] for row in rows]).to(x.device)
    teacher = torch.stack([banks[row.bank].prediction[row.entry] for row in rows]).to(x.device, torch.float32)
    return host.predict(x, t, context).float() - teacher


@torch.no_grad()
def missed(
    host: Host, modules: Mapping[str, nn.Module], changes: Changes, banks: Sequence[Bank], batch: int
) -> list[float]:
    """How much of each bank's effect the merge misses: Σ‖v_merged − v_i‖² / Σ‖v_base − v_i‖², 0 is perfect.

    Of a concept's bank only what is predicted with a prompt counts: without one nothing says which concept is wanted.
    For the last bank, the neutral one, whose teacher is the base itself, the plain mean squared difference is given.
    """
    results = []
    for place, bank in enumerate(banks):
        merged, base, own = [], [], place < len(banks) - 1
        asked = [entry for entry, prompt in enumerate(bank.prompt) if own and bank.prompts[prompt]]
        rows = [Row(place, entry) for entry in asked or range(len(bank))]
        for begin in range(0, len(rows), batch):
            part = rows[begin : begin + batch]
            weights = in_v(host, torch.stack([bank.t[row.entry] for row in part])).to(host.device)
            base.append(error(host, banks, part) * weights)
            with applied(modules, changes):
                merged.append(error(host, banks, part) * weights)
        left, whole = torch.cat(merged).sum().item(), torch.cat(base).sum().item()
        results.append(left / whole if own and whole > 0 else left / len(rows))
    return results
