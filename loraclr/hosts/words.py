"""Words that a LoRA brings along, in prompts for a tokenizer and a text encoder of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Tokenizer:
    """A tokenizer that also knows words of their own vectors: ids from `len(tokenizer)` on, one for each vector.

    Around such a word a prompt is cut, as the webui cuts it around an embedding's name. Everything but the call itself
    is the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, counts: Mapping[str, int]) -> None:
        self._tokenizer, self._first, self._ids = tokenizer, len(tokenizer), {}
        for word, count in counts.items():
            begin = self._first + sum(map(len, self._ids.values()))
            self._ids[word] = list(range(begin, begin + count))
        longest = sorted(counts, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest))})")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return self._first

    def __call__(
        self,
        text: str | Sequence[str],
        padding: str | bool = False,
        max_length: int | None = None,
        truncation: bool = False,
        **_: Any,
    ) -> SimpleNamespace:
        """`input_ids` and `attention_mask` (B, T) of prompts."""
        own = self._tokenizer
        most = (max_length or own.model_max_length) - 2
        rows = [self._tokens(one) for one in ([text] if isinstance(text, str) else text)]
        rows = [[own.bos_token_id, *(row[:most] if truncation else row), own.eos_token_id] for row in rows]
        length = most + 2 if padding == "max_length" else max(map(len, rows))
        ids = torch.tensor([row + [own.pad_token_id] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._pattern.split(text):
            known = self._ids.get(part)
            ids += self._tokenizer(part, add_special_tokens=False).input_ids if known is None else known
        return ids


@contextmanager
def spoken(tokenizer: Any, encoder: nn.Module, words: Mapping[str, Tensor]) -> Iterator[Tokenizer]:
    """A tokenizer that knows the words (each (tokens, width)), whose ids the text encoder understands inside."""
    first, vectors = len(tokenizer), torch.cat(list(words.values()))
    asked: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = args[0] if args else kwargs["input_ids"]
        asked[:] = [ids]
        ids = ids.masked_fill(ids >= first, 0)
        return ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": ids})

    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        (ids,) = asked
        own = ids >= first
        table = vectors.to(output)
        return torch.where(own[..., None], table[(ids - first).clamp(min=0)], output)

    handles = [
        encoder.register_forward_pre_hook(before, with_kwargs=True),
        encoder.get_input_embeddings().register_forward_hook(after),
    ]
    try:
        yield Tokenizer(tokenizer, {word: len(rows) for word, rows in words.items()})
    finally:
        for handle in handles:
            handle.remove()
