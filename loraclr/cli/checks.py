"""What commands refuse before anything is loaded: files and devices that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraclr.cli import Refused


@contextmanager
def refusing() -> Iterator[None]:
    """Inside, a ValueError's or OSError's message is a sentence for the user; of a full graphics card there is one."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise Refused(
            "The graphics card ran out of memory: end other programs that use it, or give --device cpu, which is slow."
        ) from error
    except (ValueError, OSError) as error:
        raise Refused(" ".join(str(error).split())) from error


def check_output(output: Path, inputs: list[Path], overwrite: bool) -> None:
    """Refuse an output that could not be written, or that would replace what is read."""
    if output.suffix != ".safetensors":
        raise Refused(f"The output {output.name} must end in .safetensors.")
    if not output.parent.is_dir():
        raise Refused(f"The folder {output.parent} does not exist: create it, or choose another --output.")
    if output.is_dir():
        raise Refused(f"The output {output} is a folder: choose another name.")
    if any(output.exists() and path.exists() and output.samefile(path) for path in inputs):
        raise Refused(f"The output {output.name} is one of the files that are read: choose another name.")
    if output.exists() and not overwrite:
        raise Refused(f"{output} exists already: choose another --output, or add --overwrite to replace it.")
    if not os.access(output.parent, os.W_OK):
        raise Refused(f"The folder {output.parent} cannot be written to: choose another --output.")


def check_checkpoint(path: Path) -> None:
    """Look at a checkpoint's names only, which takes no time, and refuse what nothing can be merged for."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise Refused(f"The folder {path.name} holds no model of diffusers: give one that does, or a file.")
        return
    if not path.is_file():
        raise Refused(f"The checkpoint {path} does not exist: give the path of a .safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise Refused(f"The checkpoint {path.name} is cut off or is not a .safetensors file.") from error
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise Refused(f"{path.name} is not a Stable Diffusion checkpoint: it holds no UNet.")
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise Refused(f"{path.name} is SDXL's refiner or an SD 2.x Turbo: give a checkpoint of SD 1.x, 2.x or SDXL.")


def check_device(name: str | None) -> str | None:
    """Refuse a device that this machine does not have."""
    import torch

    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refused(f"The device {name} cannot be used here: leave --device out, or give --device cpu.") from error
    return name
