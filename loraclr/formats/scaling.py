"""How a trainer scales a change: by alpha in the file, else by what PEFT's or kohya's metadata says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: Where diffusers keeps PEFT's adapter_config.json in a file's metadata, its keys prefixed with the model's part.
PEFT_CONFIG = "lora_adapter_metadata"


class Scaling:
    """The scaling rules of one file, from its metadata."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.config = _json(metadata, PEFT_CONFIG)
        arguments = _json(metadata, "ss_network_args")
        self.stabilised = str(arguments.get("rs_lora", "")).lower() == "true"

    def of(self, stem: str, alpha: Tensor | None, rank: int | None, glora: bool = False) -> float:
        """The factor of a change.

        Args:
            stem: the layer's name as the file spells it.
            alpha: what the file stores beside the layer.
            rank: of the change; None for a full Kronecker product.
            glora: LyCORIS stores its alpha as the user gave it, all others' as what divides by the rank.
        """
        if alpha is None:
            return self._of_peft(stem, rank)
        value = float(alpha)
        if rank is None:
            # LyCORIS does not scale it and stores alpha = rank; rank-stabilised it scales by √rank, alpha = rank·√rank.
            return value ** (1 / 3) if self.stabilised else 1.0
        return value / math.sqrt(rank) if glora and self.stabilised else value / rank

    def _of_peft(self, stem: str, rank: int | None) -> float:
        """PEFT's alpha/r for a layer, 1 if the metadata do not tell it."""
        stem = stem.removeprefix("base_model.model.")
        part, _, module = stem.partition(".")
        config = {
            key.removeprefix(f"{part}."): value for key, value in self.config.items() if key.startswith(f"{part}.")
        }
        if not config:
            config, module = self.config, stem
        try:
            r = rank or float(_for_module(config, "rank_pattern", module, config.get("r", 1)))
            alpha = float(
                _for_module(config, "alpha_pattern", module, config.get("lora_alpha", config.get("alpha", r)))
            )
            # Rank-stabilised LoRA divides by the root of the rank instead of the rank.
            return alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        except (ValueError, TypeError, AttributeError, ZeroDivisionError, re.error):
            return 1.0


def _for_module(config: Mapping[str, Any], patterns: str, module: str, default: Any) -> Any:
    """A module's own value where a pattern of the config names it."""
    for pattern, own in (config.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return own
    return default


def _json(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):  # no JSON, a number without end, or brackets without end
        return {}
    return value if isinstance(value, dict) else {}
