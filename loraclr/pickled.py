"""LoRAs in PyTorch's own files (.pt, .pth, .ckpt, .bin): read as plain tensors only, so that no file can run code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from loraclr.lora import LoRAFormatError

SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})


def load(path: Path) -> dict:
    """The dict in a file that `torch.save` wrote, on the CPU.

    Raises LoRAFormatError with one sentence for every other file. Only the zip layout is read: PyTorch before 2.6 could
    be made to run code by its older layouts and by TorchScript archives although `weights_only` was asked for.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":  # PyTorch goes by these; Python finds one behind other data, too
                raise zipfile.BadZipFile
            with zipfile.ZipFile(file) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise LoRAFormatError(
            f"{path.name} is cut off or is not a file that PyTorch 1.6 or newer has saved; convert it to .safetensors."
        ) from error
    try:
        if "data.pkl" in names:  # a file can be made in which PyTorch sees other names than Python does
            with open(path, "rb") as file:
                names = {name.rpartition("/")[2] for name in torch._C.PyTorchFileReader(file).get_all_records()}
        wanted = "data.pkl" in names and "constants.pkl" not in names
        # Not torch.load: the webui puts one of its own there, which gives None for what newer PyTorch has saved.
        content = torch.serialization.load(path, map_location="cpu", weights_only=True) if wanted else None
    except pickle.UnpicklingError as error:
        raise LoRAFormatError(
            f"{path.name} holds more than tensors, which could run code, and is not read; convert it to .safetensors."
        ) from error
    except Exception as error:  # a damaged archive fails in many ways inside PyTorch
        raise LoRAFormatError(f"{path.name} is damaged ({type(error).__name__}); download or copy it again.") from error
    if not wanted:
        raise LoRAFormatError(f"{path.name} is a zip file, but holds no tensors of a LoRA; choose a LoRA file.")
    if not isinstance(content, dict):
        raise LoRAFormatError(f"{path.name} holds a {type(content).__name__}, not a LoRA; choose a LoRA file.")
    return content
