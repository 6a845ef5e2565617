"""What LyCORIS' own modules write for a layer: the tensors of a LoRA file by suffix."""

from __future__ import annotations

import copy

import torch
from lycoris import modules as lycoris
from torch import Tensor, nn

ALGORITHMS = {
    "LoRA": lycoris.LoConModule,
    "LoHa": lycoris.LohaModule,
    "LoKr": lycoris.LokrModule,
    "GLoRA": lycoris.GLoRAModule,
    "IA3": lycoris.IA3Module,
    "OFT": lycoris.DiagOFTModule,
    "BOFT": lycoris.ButterflyOFTModule,
    "full": lycoris.FullModule,
}


def trained(algorithm: str, layer: nn.Module, size: float = 0.3, **options: object) -> nn.Module:
    """A module of the real trainer with everything that it trains set to something of about this size."""
    layer = copy.deepcopy(layer)
    module = ALGORITHMS[algorithm]("x", layer, **{"lora_dim": 3, "alpha": 2.0, **options})
    if algorithm == "full":
        module.apply_to()  # from now on it holds the weight, and writes its difference to what it was
    for name, parameter in module.named_parameters():
        if name == "dora_scale":
            parameter.data *= 1 + size * torch.rand_like(parameter)
        elif name == "scalar":
            parameter.data.fill_(0.7)
        else:
            parameter.data += size * torch.randn_like(parameter)
    return module.eval()


def written(stem: str, module: nn.Module) -> dict[str, Tensor]:
    """What the trainer writes for one layer, under the layer's name."""
    return {f"{stem}.{suffix}": tensor.detach().clone() for suffix, tensor in module.state_dict().items()}


def norm(layer: nn.Module) -> nn.Module:
    """A trained module for a norm layer."""
    module = lycoris.NormModule("x", layer)
    for parameter in module.parameters():
        parameter.data.normal_()
    return module
