"""Embeddings that a LoRA file brings along: trained words, by encoder (`bundle_emb.` keys)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraclr.keys import Family

#: Name of the word → encoder (clip_l, clip_g; clip_h for SD 2.x) → its vectors (tokens, width).
Embeddings = dict[str, dict[str, Tensor]]

PREFIX = "bundle_emb."

_DOT = re.compile(r"\.")  # where the webui splits keys

_ENCODERS: dict[Family, dict[int, str]] = {
    "sd1": {768: "clip_l"},
    "sd2": {1024: "clip_h"},
    "sdxl": {768: "clip_l", 1280: "clip_g"},
}


def read(tensors: Mapping[str, Tensor], family: Family) -> tuple[Embeddings, list[str]]:
    """The bundled embeddings of a file, and the bundled keys that are none that the family can use.

    Keys are ``bundle_emb.<name>.<rest>``, as LyCORIS bundles a webui embedding file and as OneTrainer writes them; the
    width of the vectors says which encoder they are for, unless the rest names it. What OneTrainer trains behind the
    encoder (``…_out``) cannot be said in a prompt and is not read.
    """
    found: Embeddings = {}
    unused = []
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            continue
        name, _, rest = key.removeprefix(PREFIX).partition(".")
        named, fits = rest.rpartition(".")[2], encoder(tensor, family)
        misnamed = named.startswith("clip_") and named != fits
        if not name or fits is None or misnamed or named.endswith("_out") or fits in found.get(name, {}):
            unused.append(key)
            continue
        found.setdefault(name, {})[fits] = vectors(tensor)
    return found, unused


def encoder(tensor: Tensor, family: Family) -> str | None:
    """The encoder whose words have the width of this tensor; None if it is no embedding of the family."""
    if tensor.ndim not in (1, 2) or tensor.numel() == 0 or not tensor.is_floating_point():
        return None
    if not tensor.is_meta and not torch.isfinite(tensor.float()).all():  # an outline has no values
        return None
    return _ENCODERS[family].get(tensor.shape[-1])


def vectors(tensor: Tensor) -> Tensor:
    """An embedding's tensor as float32 vectors (tokens, width), sharing no memory with the file."""
    return tensor.to(torch.float32, copy=True).reshape(-1, tensor.shape[-1])


def distinct(sources: Sequence[Embeddings], unusable: re.Pattern[str] = _DOT) -> list[dict[str, str]]:
    """For each source new names of its words, so that all can be in one file: old → new, of those that change.

    A name without unusable signs that no earlier source has for other vectors.
    """
    taken: Embeddings = {}
    renamed = []
    for words in sources:
        names = {}
        for name, encoders in words.items():
            base = free = unusable.sub("_", name)
            number = 2
            while free in taken and not _same(taken[free], encoders):
                free, number = f"{base}_{number}", number + 1
            taken[free] = encoders
            if free != name:
                names[name] = free
        renamed.append(names)
    return renamed


def in_text(text: str, renamed: Mapping[str, str]) -> str:
    """A prompt with words under their new names."""
    if not renamed:
        return text
    # In one go: a new name may be another's old one. The longest first, since a name may begin as another does.
    names = "|".join(re.escape(old) for old in sorted(renamed, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{names})(?!\w)", lambda found: renamed[found[0]], text)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(vectors, other[encoder]) for encoder, vectors in one.items())


def bundle(words: Embeddings) -> dict[str, Tensor]:
    """Words as the keys of a LoRA file that the webui reads: vectors for two encoders by their names."""
    return {f"{PREFIX}{name}.{rest}": tensor for name, each in words.items() for rest, tensor in alone(each).items()}


def alone(encoders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a word's own embedding file."""
    return {"emb_params": next(iter(encoders.values()))} if len(encoders) == 1 else dict(encoders)
