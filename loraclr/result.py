"""The result of a merge: layers of one LoRA with what is known about them, and the file that it becomes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from loraclr import files
from loraclr.changes import Changes, changes_of, is_text
from loraclr.concept import Concept
from loraclr.embeddings import Embeddings, distinct
from loraclr.formats import Norm
from loraclr.hinge import Objective
from loraclr.hosts import Checkpoint
from loraclr.keys import Family
from loraclr.lora import Layer, LoRA

#: Keys that were not understood are named in a note up to so many for each LoRA; the recipe names all.
NAMED = 6


@dataclass
class Merge:
    """The result: layers of one LoRA, and what is known about them.

    Attributes:
        settings: a dataclass of what the method was told.
        method: its name in `loraclr.methods`.
        missed: per concept name the share of its effect that the merge misses on a picture that it has not learnt from
            (0 is perfect), by the closed form and in the end.
        alignment: per concept name and kind of layer how near the merged change comes to its own (1: the same), see
            `loraclr.alignment`.
        objective: per kind of layer what the paper minimises, see `loraclr.hinge`.
        kept: per layer name the share of its output's energy (for methods by weights alone, of ‖ΔW‖²) that is left
            where a rank cut it, before any polish.
        seconds: wall-clock time by stage.
        memory: the most bytes in use at a time, see `loraclr.memory`.
        checkpoint: the model that it was made for; None if none was looked at.
        words: the embeddings that the LoRAs bring along.
        notes: what users should know, a sentence each.
    """

    family: Family
    concepts: list[Concept]
    settings: Any
    method: str = "loraclr"
    layers: dict[str, Layer | Norm] = field(default_factory=dict)
    missed: dict[str, tuple[float, float]] = field(default_factory=dict)
    alignment: dict[str, dict[str, float]] = field(default_factory=dict)
    objective: dict[str, Objective] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    words: Embeddings = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def changes(self, modules: Mapping[str, nn.Module] | None = None) -> Changes:
        """What it does to each layer. `modules`: a model's, for norm layers and biases that depend on it."""
        return changes_of(LoRA("merged", None, self.family, self.layers), modules)

    def prompt(self, name: str) -> str:
        """What to type to use the merged file under this name."""
        return f"<lora:{name}:1> {self.triggers}".rstrip()

    @property
    def ranks(self) -> str:
        """The ranks of its layers in words."""
        ranks = sorted({layer.rank for layer in self.layers.values() if layer.rank is not None})
        if not ranks:
            return "norm layers only"
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"

    @property
    def triggers(self) -> str:
        """Every concept's trigger words."""
        return ", ".join(concept.trigger for concept in self.concepts if concept.trigger)

    @property
    def overall(self) -> Objective | None:
        """The objective of all layers together; None where it was not looked at."""
        parts = self.objective.values()
        layers = sum(part.layers for part in parts)
        if not layers:
            return None
        active = sum(part.active * part.layers for part in parts) / layers
        return Objective(layers, sum(part.start for part in parts), sum(part.merged for part in parts), active)

    def figures(self) -> dict[str, Any]:
        """What was measured, as plain values; where nothing was, the entry is empty."""
        return {
            "effect_kept": {
                name: {"closed_form": 1 - closed, "polished": 1 - polished}
                for name, (closed, polished) in self.missed.items()
            },
            "alignment": self.alignment,
            "objective": {name: asdict(part) for name, part in self.objective.items()},
            "objective_overall": asdict(self.overall) if self.overall else {},
            "rank_kept": self.kept,
            "seconds": self.seconds,
            "peak_bytes": self.memory,
        }

    def recipe(self) -> dict:
        """Everything needed to run the same merge again, for the file's metadata."""
        concepts = [
            {
                "file": concept.lora.path.name if concept.lora.path else concept.lora.name,
                "hash": files.model_hash(concept.lora.path) if concept.lora.path else "",
                "trigger": concept.trigger,
                "weight": concept.weight,
                "text_weight": concept.text_weight,
                "kind": concept.kind,
                "prompts": concept.prompts,
                "blocks": concept.blocks,
                "unused": concept.lora.unused,
            }
            for concept in self.concepts
        ]
        settings = asdict(self.settings)
        return {
            "version": files.VERSION,
            "method": self.method,
            "checkpoint": None if self.checkpoint is None else asdict(self.checkpoint),
            "concepts": concepts,
            "settings": settings,
            "missed": self.missed,
            "kept": {name: round(share, 4) for name, share in self.kept.items()},
        }


def begun(concepts: Sequence[Concept], settings: Any, folded: bool = False) -> Merge:
    """A merge with no layers yet, its concepts and their words under names that no two of them share.

    folded: whether the merge makes up for what is lost of embeddings for single layers (see `loraclr.folding`).
    """
    result = Merge(concepts[0].lora.family, [], settings)
    concepts = _named_apart(concepts)
    renames = distinct([concept.lora.words for concept in concepts])
    for concept, renamed in zip(concepts, renames, strict=True):
        result.concepts.append(concept.with_words(renamed))
        result.words |= result.concepts[-1].lora.words
        for old, new in renamed.items():
            result.notes.append(f"The word {old} of {concept.lora.name} is called {new} in the merged file.")
        if unused := concept.lora.unused:
            count, shown = len(unused), ", ".join(unused[:NAMED]) + (", …" if len(unused) > NAMED else "")
            result.notes.append(
                f"Keys of {concept.lora.name} that are not understood are left out, {count} in all ({shown})."
            )
        if concept.lora.layer_embeddings:
            words = ", ".join(concept.lora.layer_embeddings)
            result.notes.append(
                f"Of {concept.lora.name}'s embeddings of {words} for single layers the mean is kept, and the rest made "
                "up for as far as one text for all layers allows."
                if folded
                else f"Of {concept.lora.name}'s embeddings of {words} for single layers the mean is kept."
            )
    return result


def _named_apart(concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts, each LoRA whose name an earlier one has with a number behind it: PEFT gives all files one name."""
    apart, taken = [], set()
    for concept in concepts:
        name, number = concept.lora.name, 2
        while name in taken:
            name, number = f"{concept.lora.name} {number}", number + 1
        taken.add(name)
        apart.append(concept if name == concept.lora.name else replace(concept, lora=replace(concept.lora, name=name)))
    return apart


_OPEN_CLIP_ATTENTION: dict[Family, str] = {
    "sd2": r"(lora_te_text_model_encoder_layers_\d+_self_attn)_(?:q|k|v|out)_proj",
    "sdxl": r"(lora_te2_text_model_encoder_layers_\d+_self_attn)_(?:q|k|v|out)_proj",
}


def with_whole_attention(layers: Mapping[str, Layer | Norm], family: Family) -> dict[str, Layer | Norm]:
    """The layers, and zeros for what an attention of OpenCLIP lacks: the webui takes q, k, v and out together only."""
    whole = dict(layers)
    for name, layer in layers.items():
        match = re.fullmatch(_OPEN_CLIP_ATTENTION.get(family, "(?!)"), name)
        for side in ("q", "k", "v", "out") if match else ():
            width = layer.up.shape[0]
            whole.setdefault(f"{match[1]}_{side}_proj", Layer(torch.zeros(width, 1), torch.zeros(1, width), 1.0))
    return whole


#: Forge refuses a LoRA with more keys than this that it does not know: embeddings, and norm layers of text encoders.
MOST_UNKNOWN = 12


def write(
    merge: Merge,
    path: str | Path,
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
    bundle: bool = True,
) -> Path:
    """Write the merged LoRA with metadata and sidecar.

    Its words are bundled, unless `bundle` is off or they make more keys than Forge allows: then each is a file of its
    own, in a folder beside the LoRA, for the webui's folder of embeddings, under another name if some system refuses a
    file of its own, in the merge's triggers too; and `merge.notes` says so.

    Raises:
        FileExistsError: a file is there and `overwrite` is not set.
        ValueError: values are too large for `dtype`. In both cases nothing is written.
    """
    path = Path(path)
    layers = with_whole_attention(merge.layers, merge.family)
    norms = 2 * sum(isinstance(layer, Norm) and is_text(name) for name, layer in layers.items())
    known = norms <= MOST_UNKNOWN
    bundle = bundle and sum(map(len, merge.words.values())) + norms * known <= MOST_UNKNOWN
    if any(isinstance(layer, Norm) or layer.bias is not None for layer in layers.values()):
        merge.notes.append(
            "diffusers does not load this file, and kohya's tools leave a part of it out: it changes biases or norm "
            "layers. Plain file under Advanced, or --plain on the command line, leaves these changes out."
        )
    if not known:
        merge.notes.append("Forge does not load this file: it changes norm layers of a text encoder.")
    folder = path.with_name(f"{path.stem} embeddings") if merge.words and not bundle else None
    renamed = {} if folder is None else distinct([merge.words], files.UNUSABLE)[0]
    concepts = [concept.with_words(renamed) for concept in merge.concepts]
    words = {renamed.get(word, word): encoders for word, encoders in merge.words.items()}
    loras = [concept.lora for concept in concepts]
    sources, triggers = [lora.name for lora in loras], [concept.trigger for concept in concepts]
    metadata = files.lora_metadata(merge.family, layers, loras, triggers, merge.recipe())
    files.save(path, layers, metadata, dtype, overwrite, words, folder)
    for concept in merge.concepts:
        for old in (word for word in concept.lora.words if word in renamed):
            merge.notes.append(f"The word {old} of {concept.lora.name} is called {renamed[old]} in the merged file.")
    merge.concepts, merge.words = concepts, words
    if folder is not None:
        merge.notes.append(
            f"Move the files in {folder.name} into the webui's folder of embeddings: the prompt uses them."
        )
    named = (f"{source} ({trigger})" if trigger else source for source, trigger in zip(sources, triggers, strict=True))
    notes = f"Merged by {'LoRACLR' if merge.method == 'loraclr' else merge.method} from {', '.join(named)}."
    written = files.write_sidecar(path, merge.triggers, merge.family, " ".join([notes, *merge.notes]))
    if written is None and files.activation_text(path) != merge.triggers:
        merge.notes.append(f"{path.stem}.json holds notes of yours and stays as it is, activation text included.")
    return path


def make_plain(merge: Merge) -> None:
    """Leave out what only some programs load, changes of biases and norm layers; `merge.notes` says how many.

    Raises:
        ValueError: nothing else is there.
    """
    kept = {name: layer for name, layer in merge.layers.items() if isinstance(layer, Layer)}
    biases, norms = sum(layer.bias is not None for layer in kept.values()), len(merge.layers) - len(kept)
    if not kept:
        raise ValueError("Only norm layers are changed, and a plain file leaves them out: nothing is left to write.")
    if biases or norms:
        merge.notes.append(f"The changes of {biases} biases and {norms} norm layers are left out.")
    merge.layers = {name: replace(layer, bias=None) for name, layer in kept.items()}


def note_bled(path: str | Path, bled: Mapping[str, Mapping[str, float]]) -> None:
    """Add to the recipe of a merged file what was measured after it was written.

    Args:
        bled: per concept name the share of every other LoRA's effect in its pictures (see `loraclr.crosstalk`).
    """
    with safe_open(path, framework="pt") as file:
        recipe = json.loads(file.metadata()["loraclr.recipe"])
    files.annotate(path, {"loraclr.recipe": json.dumps({**recipe, "bled": bled}, ensure_ascii=False)})
