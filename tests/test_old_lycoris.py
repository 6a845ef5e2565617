"""What older releases of LyCORIS wrote: ΔW is what their own modules add to a layer.

Takes the releases' sources from the folder that LYCORIS_RELEASES names, unpacked there as pip downloads them
(`pip download --no-deps --no-binary :all: lycoris-lora==2.0.2`); without it these tests are skipped.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from loraclr.formats import Change
from loraclr.lora import parse

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
LAYERS = {
    "linear": (LINEAR, lambda: nn.Linear(24, 16)),
    "square": (LINEAR, lambda: nn.Linear(16, 16)),
    "conv1": (CONV, lambda: nn.Conv2d(24, 16, 1)),
    "conv3": (CONV, lambda: nn.Conv2d(8, 16, 3, padding=1)),
}
#: Module → its file and the options that it is tried with, where a release knows them.
ALGORITHMS = {
    "LoConModule": ("locon", [{}, {"use_cp": True}, {"use_tucker": True}, {"weight_decompose": True}]),
    "LohaModule": ("loha", [{}, {"use_scalar": True}, {"weight_decompose": True}]),
    "LokrModule": ("lokr", [{}, {"factor": 4}, {"decompose_both": True}, {"weight_decompose": True}]),
    "GLoRAModule": ("glora", [{"alpha": 3.0}]),
    "IA3Module": ("ia3", [{}, {"train_on_input": True}]),
    "FullModule": ("full", [{}]),
    "DiagOFTModule": ("diag_oft", [{"lora_dim": 4}, {"lora_dim": 4, "rescaled": True}]),
}
RELEASES = ("1.8.0", "1.9.0", "2.0.2", "2.2.0.post3", "3.1.1")
#: Modules that came later.
LATER = {"FullModule": "1.9", "DiagOFTModule": "2.0"}
CASES = [(release, name) for release in RELEASES for name in ALGORITHMS if release >= LATER.get(name, "")]


@pytest.fixture
def modules(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where one release's modules are imported from, without its trainer around them; the package's name."""
    folder = os.environ.get("LYCORIS_RELEASES")
    if not folder:
        pytest.skip("set LYCORIS_RELEASES to a folder of unpacked releases of lycoris-lora to run this")
    root = Path(folder) / f"lycoris_lora-{request.param}" / "lycoris"
    if not root.is_dir():
        pytest.skip(f"{root.parent.name} is not in {folder}")
    for name in [name for name in sys.modules if name.split(".")[0] == "lycoris"]:
        monkeypatch.delitem(sys.modules, name)
    for name, place in (("lycoris", root), ("lycoris.modules", root / "modules")):
        package = ModuleType(name)
        package.__path__ = [str(place)]
        monkeypatch.setitem(sys.modules, name, package)
    yield "lycoris.modules"
    for name in [name for name in sys.modules if name.startswith("lycoris.")]:
        monkeypatch.delitem(sys.modules, name)


@torch.no_grad()
def trained(kind: type[nn.Module], layer: nn.Module, options: dict) -> nn.Module:
    """A module in its layer's place, with something learnt."""
    module = kind("x", layer, **{"lora_dim": 3, "alpha": 2.0, **options})
    module.apply_to()
    for name, parameter in module.named_parameters():
        if name == "dora_scale":
            parameter *= 1 + 0.3 * torch.rand_like(parameter)
        elif name == "scalar":
            parameter.fill_(0.7)
        else:
            parameter += 0.3 * torch.randn_like(parameter)
    return module.eval()


@torch.no_grad()
def added(layer: nn.Module, module: nn.Module) -> Tensor:
    """What the module adds to the layer's weight, read off one input channel and place at a time."""
    if isinstance(layer, nn.Linear):
        x = torch.eye(layer.in_features)
    else:
        channels, (height, width) = layer.in_channels, layer.kernel_size
        x = torch.eye(channels * height * width).reshape(-1, channels, height, width)
    change = module(x) - module(0 * x) - layer(x) + layer(0 * x)
    middle = (..., *(side // 2 for side in layer.kernel_size)) if isinstance(layer, nn.Conv2d) else ...
    return change[middle].T.reshape(layer.weight.shape)


def read(stem: str, module: nn.Module) -> Change:
    """What we read from the file that the release would write for one layer, and all of it."""
    own = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
    tensors = module.state_dict() if own is None else own
    lora = parse({f"{stem}.{key}": tensor.detach().clone() for key, tensor in tensors.items()}, {}, "x")
    assert lora.unused == () and list(lora.layers) == [stem]
    return lora.layers[stem]


@pytest.mark.parametrize(("modules", "name"), CASES, indirect=["modules"])
def test_delta_is_what_the_releases_module_adds(modules: str, name: str) -> None:
    torch.manual_seed(0)
    file, every = ALGORITHMS[name]
    make = getattr(importlib.import_module(f"{modules}.{file}"), name)
    known = {"alpha", "lora_dim", *inspect.signature(make).parameters}
    for options in (options for options in every if options.keys() <= known):
        for kind, (stem, layer_of) in LAYERS.items():
            layer = layer_of()
            before = copy.deepcopy(layer)
            try:
                module = trained(make, layer, options)
            except AssertionError:  # GLoRA of 1×1 convolutions only
                assert (name, kind) == ("GLoRAModule", "conv3")
                continue
            expected = added(before, module)
            found = read(stem, module).delta(before.weight.detach())
            assert expected.norm() > 0.1 * before.weight.norm(), (options, kind)
            assert (found - expected).norm() <= 1e-5 * expected.norm(), (options, kind)


@pytest.mark.parametrize("modules", ["2.0.2"], indirect=True)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_release_2_wrote_of_rotations_are_the_rotations_themselves(modules: str, kind: str) -> None:
    torch.manual_seed(0)
    make = importlib.import_module(f"{modules}.diag_oft").DiagOFTModule
    module = trained(make, LAYERS[kind][1](), {"lora_dim": 4, "constrain": 0.05})
    assert module.custom_state_dict().keys() == {"oft_diag"}
    assert type(read(LAYERS[kind][0], module)).__name__ == "OFT"


@pytest.mark.parametrize("modules", ["1.9.0", "2.0.2", "2.2.0.post3"], indirect=True)
def test_some_releases_scaled_gloras_output_twice_which_no_file_tells(modules: str) -> None:
    """Release 1.8, which writes the same file, scaled it once; so do we and ComfyUI."""
    torch.manual_seed(0)
    make = importlib.import_module(f"{modules}.glora").GLoRAModule
    layer = nn.Linear(24, 16)
    before = copy.deepcopy(layer)
    module = trained(make, layer, {"alpha": 1.5})
    found, expected = read(LINEAR, module).delta(before.weight.detach()), added(before, module)
    assert (found * 1.5 / 3 - expected).norm() <= 1e-5 * expected.norm()
