"""The recipe of a merge, as the merged file holds it, and what is needed to run the same merge again."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from loraclr import files
from loraclr.concept import Concept
from loraclr.hosts import Checkpoint
from loraclr.methods import METHODS, Options
from loraclr.plan import Settings


@dataclass(frozen=True)
class Recipe:
    """What a merged file says about how it was made.

    Attributes:
        checkpoint: the model that it was made for, if it tells one.
        entries: per LoRA its file's name, its hash, and how it was to be merged (see `loraclr.result.Merge.recipe`).
    """

    method: str
    entries: Sequence[dict[str, Any]]
    settings: Settings | Options
    checkpoint: Checkpoint | None = None

    def note(self, checkpoint: Checkpoint | None) -> str | None:
        """A sentence for the user if a merge for this model is not the same again."""
        if self.checkpoint is None or checkpoint is None:
            return None
        known = self.checkpoint.hash and checkpoint.hash
        same = self.checkpoint.hash == checkpoint.hash if known else self.checkpoint.name == checkpoint.name
        which = f"a file of this name with other content ({self.checkpoint.name})"
        which = self.checkpoint.name if self.checkpoint.name != checkpoint.name else which
        return None if same else f"The recipe was made with {which}; this merge is for {checkpoint.name}."

    def concepts(self, folders: Sequence[Path]) -> list[Concept]:
        """The LoRAs, looked for by name and hash in the folders, and in all that lies below the first.

        Raises:
            ValueError: one is not there or is another file than it was; the sentence names it.
        """
        return [_concept(entry, folders) for entry in self.entries]


def read(path: Path) -> Recipe:
    """The recipe in a merged file.

    Raises:
        ValueError: there is none, or another version wrote it; one sentence that names the file.
    """
    text = files.load(path).metadata.get("loraclr.recipe")
    if text is None:
        raise ValueError(f"{path.name} holds no recipe: only a LoRA that was merged here does.")
    try:
        told = json.loads(text)
        method = METHODS[told["method"]]
        kind = Settings if method.needs_model else Options
        known = {field.name for field in fields(kind)}
        if unknown := sorted(set(told["settings"]) - known):
            raise KeyError(unknown[0])
        lists = {name: tuple(value) for name, value in told["settings"].items() if isinstance(value, list)}
        checkpoint = Checkpoint(**told["checkpoint"]) if told.get("checkpoint") else None
        return Recipe(method.name, told["concepts"], kind(**{**told["settings"], **lists}), checkpoint)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The recipe in {path.name} cannot be read: another version of LoRACLR wrote it.") from error


def _concept(entry: dict[str, Any], folders: Sequence[Path]) -> Concept:
    return Concept(
        files.load(_file(entry, folders)), entry["trigger"], entry["weight"], entry["text_weight"], entry["kind"],
        tuple(entry["prompts"]), entry["blocks"],
    )  # fmt: skip


def _file(entry: dict[str, Any], folders: Sequence[Path]) -> Path:
    """The file that a recipe's entry is about: in one of the folders, or anywhere below the first."""
    name, other = Path(entry["file"]).name, None  # a recipe may be another's, and says no places
    for path in chain((folder / name for folder in folders), folders[0].rglob(glob.escape(name))):
        if not path.is_file():
            continue
        if not entry["hash"] or files.model_hash(path) == entry["hash"]:
            return path
        other = other or path
    if other is not None:
        raise ValueError(f"{other.name} is not the file that the recipe was made with: get that one.")
    where = " or ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
    raise ValueError(f"{name}, which the recipe names, is not in {where}: put it there.")
