"""A LoRA file without its values: layers, ranks, shapes and notes, read from the header in a moment."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loraclr import files
from loraclr.formats import BOFT, OFT
from loraclr.formats.scaling import PEFT_CONFIG
from loraclr.lora import LoRA, parse

# safetensors' names of number formats.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

# Rotations are computed when they are read; they are small.
_READ = (*(f".{suffix}" for suffix in OFT.owns | BOFT.owns),)


def load(path: str | os.PathLike[str]) -> LoRA:
    """A LoRA as `loraclr.files.load` gives it, but its tensors on the "meta" device: shapes only.

    Single numbers (alpha and the like) and the blocks of OFT have their values. Files other than .safetensors are read
    whole. Raises LoRAFormatError as that function does, but for values that are NaN.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return files.load(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {}
            for key in file.keys():  # noqa: SIM118 (a file handle, not a dict)
                part = file.get_slice(key)
                shape, dtype = part.get_shape(), _DTYPES.get(part.get_dtype())
                wanted = math.prod(shape) == 1 or dtype is None or key.endswith(_READ)
                tensors[key] = file.get_tensor(key) if wanted else torch.empty(shape, dtype=dtype, device="meta")
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return files.load(path)  # says in a sentence what is wrong
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        metadata = {PEFT_CONFIG: config.read_text(encoding="utf-8"), **metadata}
    return parse(tensors, metadata, path.stem, path)
