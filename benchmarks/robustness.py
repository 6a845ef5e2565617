"""`python -m benchmarks.robustness`: LoRAs as people have them, merged with the defaults.

Of mixed rank and strength, undertrained and overtrained ones, styles among things. For every concept: by its own LoRA,
and merged. What the merge itself says of weak concepts stands below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import loraclr
from benchmarks import metrics
from benchmarks.scenes import REPORTING, REPORTING_NOISE
from loraclr import report
from loraclr.bank import Bank, filing
from loraclr.capture import applied
from loraclr.changes import Changes, changes_of, layer_of
from loraclr.cli import quiet
from loraclr.factor import truncate
from loraclr.hosts.standalone import Standalone
from loraclr.lora import LoRA
from loraclr.plan import POLISH_STEPS, Settings
from loraclr.report import Mean, Share, Table
from miniature.demo import STEPS, to_merge
from miniature.drawing import GUIDANCE, draw, open_miniature
from miniature.evaluate import alone
from miniature.judge import Judge
from miniature.vocabulary import CONCEPT

NOTE = """\
± is one standard error over pictures, the same prompts and noise for both. kept: of its effect, on a picture that the
merge has not learnt from, as the merge says it. text: backgrounds and base-class words obeyed."""

Spoil = Callable[[Standalone, LoRA, str], LoRA]


def undertrained(share: float) -> Spoil:
    """A LoRA that does only a share of what it should: every change that much smaller."""

    def weaker(host: Standalone, lora: LoRA, trigger: str) -> LoRA:
        return with_changes(host, lora, changes_of(lora, weight=share))

    return weaker


def cut(rank: int) -> Spoil:
    """A LoRA brought to a smaller rank by its weights alone, as tools that resize LoRAs do."""

    def resized(host: Standalone, lora: LoRA, trigger: str) -> LoRA:
        return with_changes(host, lora, {name: truncate(*pair, rank) for name, pair in changes_of(lora).items()})

    return resized


def overtrained(steps: int, pictures: int = 2, rows: int = 8, rate: float = 2e-3) -> Spoil:
    """A LoRA trained on, on a few of its own pictures with one caption, until it knows little else."""

    def trained(host: Standalone, lora: LoRA, trigger: str) -> LoRA:
        caption, modules = f"a photo of a {trigger}", host.layers()
        pairs = [[factor.clone().requires_grad_() for factor in pair] for pair in changes_of(lora).values()]
        changes = dict(zip(lora.layers, map(tuple, pairs), strict=True))
        clean = _latents(host, modules, changes, [caption] * pictures)
        optimizer = torch.optim.AdamW([factor for pair in pairs for factor in pair], lr=rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            t = torch.randint(len(host.alphas), (rows,), generator=generator)
            alpha, chosen = host.alphas[t].view(-1, 1, 1, 1), clean[torch.arange(rows) % pictures]
            noise = torch.randn(chosen.shape, generator=generator)
            noisy = alpha.sqrt() * chosen + (1 - alpha).sqrt() * noise
            with applied(modules, changes):
                F.mse_loss(host.predict(noisy, t, host.encode([caption] * rows)), noise).backward()
            optimizer.step()
            optimizer.zero_grad()
        return with_changes(host, lora, {name: tuple(f.detach() for f in pair) for name, pair in changes.items()})

    return trained


def _latents(host: Standalone, modules: dict, changes: Changes, texts: list[str]) -> torch.Tensor:
    """The clean latents (B, 4, h, w) of pictures of these texts, as the last steps of drawing them see them."""
    bank = Bank([texts[0], ""])
    with torch.no_grad(), applied(modules, changes), host.watch(filing(bank, host.encode(bank.prompts))):
        host.sample(texts, 0, STEPS, GUIDANCE, host.size, host.size)
    last = min(map(float, bank.t))
    ends = [x for x, t, prompt in zip(bank.x, bank.t, bank.prompt, strict=True) if float(t) == last and prompt == 0]
    return torch.stack(ends) / host.alphas[int(last)].sqrt()


def with_changes(host: Standalone, lora: LoRA, changes: Changes) -> LoRA:
    """The LoRA with other changes of its layers."""
    modules = host.layers()
    return replace(lora, layers={name: layer_of(pair, modules[name].weight.shape) for name, pair in changes.items()})


@dataclass(frozen=True)
class Member:
    """One LoRA of a set: the concept, what is special about it in words, and how it comes about."""

    name: str
    special: str = ""
    spoil: Spoil | None = None
    weight: float = 1.0


#: What is merged, each set by itself.
SETS: dict[str, tuple[Member, ...]] = {
    "ranks": (Member("tiger", "rank 1", cut(1)), Member("robot", "rank 8"), Member("guitar", "rank 4")),
    "weights": (
        Member("panda", "weight 0.7", weight=0.7), Member("rocket"), Member("penguin", "weight 1.3", weight=1.3),
    ),
    "undertrained": (Member("frog", "half", undertrained(0.5)), Member("doughnut"), Member("hamburger")),
    "overtrained": (Member("guitar", "overtrained", overtrained(200)), Member("octopus"), Member("tiger")),
    "styles": (Member("outline", "style"), Member("mosaic", "style"), Member("penguin")),
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What the pictures of a concept show."""

    identity: Mean
    top1: Share
    text: Mean


@dataclass(frozen=True)
class Found:
    """A concept by its own LoRA and merged, and the share of its effect that the merge says it kept."""

    own: Seen
    merged: Seen
    kept: float


def tried(
    host: Standalone, judge: Judge, members: Sequence[Member], settings: Settings, pictures: int
) -> tuple[list[Found], list[str]]:
    """Merge a set, and draw and judge each concept twice; also the merge's notes."""
    asked = []
    for member in members:
        concept = to_merge(CONCEPT[member.name])
        lora = member.spoil(host, concept.lora, concept.trigger) if member.spoil else concept.lora
        asked.append(replace(concept, lora=lora, weight=member.weight))
    merge = loraclr.merge(host, asked, settings)
    merged = merge.changes()

    def seen(place: int, changes: Changes) -> Seen:
        concept = CONCEPT[members[place].name]
        wanted = alone(concept, pictures, REPORTING)
        noise = REPORTING_NOISE + 1000 * place
        verdicts = judge.verdicts(draw(host, changes, [one.prompt for one in wanted], noise, STEPS))
        text = (metrics.text_alignment([v], one) for v, one in zip(verdicts, wanted, strict=True))
        return Seen(
            Mean(tuple(metrics.identity(verdict, concept) for verdict in verdicts)),
            Share(sum(verdict.shows(concept.name) for verdict in verdicts), len(verdicts)),
            Mean(tuple(text)),
        )

    found = [
        Found(seen(place, concept.changes()), seen(place, merged), 1 - merge.missed[concept.lora.name][1])
        for place, concept in enumerate(asked)
    ]
    return found, merge.notes


def line(name: str, member: Member, found: Found) -> list[str]:
    """A row of the table."""
    own, merged = found.own, found.merged
    pairs = ((own.identity, merged.identity), (own.top1, merged.top1), (own.text, merged.text))
    return [name, member.name, member.special, *(str(one) for pair in pairs for one in pair), f"{found.kept:.0%}"]


COLUMNS = ("set", "LoRA", "special", "identity, own", "merged", "top-1, own", "merged", "text, own", "merged", "kept")


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each concept, and below what the merges say."""
    options = argparse.ArgumentParser("benchmarks.robustness", description=__doc__, allow_abbrev=False)
    options.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    options.add_argument("--speed", default="fast", choices=list(POLISH_STEPS))
    options.add_argument("--pictures", type=int, default=8, help="of each concept (default: %(default)s)")
    args = options.parse_args(argv)
    quiet()
    host, judge, rows, notes = open_miniature("cpu"), Judge.load(), [], []
    for name in tqdm(args.sets, desc="sets", unit="set", file=sys.stderr):
        found, said = tried(host, judge, SETS[name], Settings(speed=args.speed), args.pictures)
        rows += [line(name, member, one) for member, one in zip(SETS[name], found, strict=True)]
        notes += [f"{name}: {sentence}" for sentence in said]
    print(report.text(Table("LoRAs as people have them", COLUMNS, rows, "\n".join([NOTE, *notes]))))


if __name__ == "__main__":
    main()
