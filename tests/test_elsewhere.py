"""What other programs make of a file that we write: their own loaders find every layer, and the same ΔW.

Each needs a checkout of the program, named by an environment variable; without one its tests are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import architectures
import diffusers
import transformers
from safetensors.torch import load_file

from loraclr import keys
from loraclr.changes import is_text
from loraclr.concept import Concept
from loraclr.files import SD_VERSION, load, model_hash
from loraclr.formats import Norm
from loraclr.lora import Layer, LoRA, parse
from loraclr.plan import Settings
from loraclr.result import MOST_UNKNOWN, Merge, write

FAMILIES = ("sd1", "sd2", "sdxl")
WIDTHS = {"sd1": {"clip_l": 768}, "sd2": {"clip_h": 1024}, "sdxl": {"clip_l": 768, "clip_g": 1280}}
#: What kohya's trainer leaves alone: whatever is outside of attention blocks, resnets and samplers.
ENDS = ("time_embed", "label_emb", "conv_in", "conv_out", "input_blocks_0_0", "out_0", "out_2", "add_embedding")


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The program whose variable the test names, importable; what it needs only to draw is left out."""
    folder = os.environ.get(request.param)
    if not folder:
        pytest.skip(f"set {request.param} to a checkout of the program to run this")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    for name, part in (("comfy", "model_base"), ("library", "utils")):
        if (Path(folder) / name).is_dir():
            absent = Absent(f"{name}.{part}")
            monkeypatch.setitem(sys.modules, f"{name}.{part}", absent)
            setattr(importlib.import_module(name), part, absent)
    yield Path(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folder):
            del sys.modules[name]


class Absent(ModuleType):
    """A module of which every class is there and has no instances."""

    setup_logging = staticmethod(lambda *_, **__: None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of the weight, of every layer of the family."""
    parts = {"unet": architectures.diffusers_unet(family)}
    for part, *size in architectures.TEXT_ENCODERS[family]:
        parts[part] = architectures.transformers_text_encoder(*size[:-1], part == "text_encoder_2")
    return {keys.kohya_name(part, path, family): shape for part, each in parts.items() for path, shape in each.items()}


def random_layer(shape: tuple[int, ...], rank: int, bias: bool = False) -> Layer:
    inputs = torch.Size(shape[1:]).numel()
    up, down = torch.randn(shape[0], rank), torch.randn(rank, inputs) / inputs**0.5
    kernel = tuple(shape[2:])
    return Layer(up, down, rank / 2, bool(kernel), kernel or (1, 1), bias=torch.randn(shape[0]) if bias else None)


def written(folder: Path, family: str, layers: dict[str, Layer | Norm]) -> Path:
    """A merged LoRA with a word beside its layers, as users get it."""
    lora = LoRA("one", None, family, layers)
    words = {"word": {encoder: torch.randn(2, width) for encoder, width in WIDTHS[family].items()}}
    merge = Merge(family, [Concept(lora, "word")], Settings(), layers=layers, words=words)
    return write(merge, folder / "merged.safetensors")


def compared(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs.reshape(ours.shape)).norm() <= 1e-3 * ours.norm()


#: Transformer blocks beside each resnet going down, and going up from the last one on, as ComfyUI's settings have them.
DEPTHS = {
    "sd1": ([1] * 6 + [0] * 2, [1] * 9 + [0] * 3),
    "sd2": ([1] * 6 + [0] * 2, [1] * 9 + [0] * 3),
    "sdxl": ([0] * 2 + [2] * 2 + [10] * 2, [0] * 3 + [2] * 3 + [10] * 3),
}


def as_comfyui_has_it(family: str) -> tuple[SimpleNamespace, SimpleNamespace]:
    """UNet and text encoders as its loader asks for them: by the names of their weights, and the UNet's settings."""
    original = architectures.ORIGINAL_UNETS[family]
    down, up = DEPTHS[family]
    settings = {
        "num_res_blocks": [2] * len(original["channel_mult"]),
        "channel_mult": original["channel_mult"],
        "transformer_depth": down,
        "transformer_depth_middle": down[-1] or 1,
        "transformer_depth_output": up,
    }
    paths = architectures.original_unet(**original)
    names = [f"diffusion_model.{path}.{side}" for path in paths for side in ("weight", "bias")]
    texts = [
        f"{encoder}.transformer.{path if path.startswith('text_') else f'text_model.{path}'}.weight"
        for encoder, (part, *size) in zip(WIDTHS[family], architectures.TEXT_ENCODERS[family], strict=True)
        for path in architectures.transformers_text_encoder(*size[:-1], part == "text_encoder_2")
    ]
    unet = SimpleNamespace(state_dict=lambda: dict.fromkeys(names), model_config=SimpleNamespace(unet_config=settings))
    return unet, SimpleNamespace(state_dict=lambda: dict.fromkeys(texts))


def changes_of_all(there: dict[str, tuple[int, ...]]) -> dict[str, Layer | Norm]:
    """A change of each layer, one with a bias, and of norm layers but the text encoders', which hosts pass over."""
    layers: dict[str, Layer | Norm] = {}
    for number, (name, shape) in enumerate(there.items()):
        if len(shape) > 1:
            layers[name] = random_layer(shape, 2 + number % 3, bias=name == "lora_unet_conv_in")
        elif not is_text(name):
            layers[name] = Norm(torch.randn(shape), bias=torch.randn(shape))
    return layers


@pytest.mark.parametrize("checkout", ["COMFYUI_DIR"], indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_loads_every_key(checkout, tmp_path, family, caplog) -> None:
    importlib.import_module("comfy.cli_args").args.cpu = True
    comfy = importlib.import_module("comfy.lora")
    torch.manual_seed(0)
    there = shapes(family)
    layers = changes_of_all(there)
    file = load_file(written(tmp_path, family, layers))
    unet, texts = as_comfyui_has_it(family)
    known = comfy.model_lora_keys_clip(texts, comfy.model_lora_keys_unet(unet, {}))
    patches = comfy.load_lora(file, known)
    assert [record.getMessage() for record in caplog.records if "bundle_emb" not in record.getMessage()] == []
    for name in list(layers)[::25]:
        weight = torch.zeros(there[name])
        theirs = comfy.calculate_weight([(1.0, patches[known[name]], 1.0, None, None)], weight, known[name])
        compared(layers[name].delta().reshape(weight.shape), theirs)


@pytest.fixture
def forge(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Forge's own modules that find a LoRA, match its keys and add it to a weight, on the CPU."""
    monkeypatch.setattr(sys, "argv", ["forge", "--always-cpu"])
    for folder in ("packages_3rdparty", "extensions-builtin/sd_forge_lora"):
        monkeypatch.syspath_prepend(str(checkout / folder))
    modules = Absent("modules")
    modules.sd_models = SimpleNamespace(read_metadata_from_safetensors=lambda path: load(path).metadata)
    modules.cache = SimpleNamespace(cached_data_for_file=lambda title, name, path, read: read())
    modules.shared = SimpleNamespace(
        cmd_opts=SimpleNamespace(lora_dir=str(tmp_path)),
        walk_files=lambda folder, allowed_extensions: [
            str(path) for path in Path(folder).iterdir() if path.suffix in allowed_extensions
        ],
    )
    for name, module in (("modules", modules), ("sentencepiece", Absent("sentencepiece"))):
        monkeypatch.setitem(sys.modules, name, module)
    names = {"lora": "backend.patcher.lora", "networks": "networks"}
    return SimpleNamespace(**{name: importlib.import_module(module) for name, module in names.items()})


class Patched:
    """A model of Forge's as its loader asks for it: it notes what is to be added to which weight."""

    def __init__(self, model: SimpleNamespace) -> None:
        self.model = self.cond_stage_model = model
        self.patches: dict[str, tuple] = {}

    def clone(self) -> Patched:
        return self

    def add_patches(self, patches: dict[str, tuple], **_: object) -> set[str]:
        self.patches = patches
        return set(patches) & self.model.state_dict().keys()


def as_forge_has_it(family: str) -> tuple[Patched, Patched]:
    """The same models in Forge's wrapping."""
    unet, texts = as_comfyui_has_it(family)
    unet.diffusion_model = SimpleNamespace(config=unet.model_config.unet_config)
    unet.config = SimpleNamespace(huggingface_repo=family)
    return Patched(unet), Patched(texts)


@pytest.mark.parametrize("checkout", ["FORGE_DIR"], indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_forge_lists_the_file_and_loads_every_key(forge, tmp_path, family, capsys) -> None:
    torch.manual_seed(0)
    there = shapes(family)
    layers = changes_of_all(there)
    path = written(tmp_path, family, layers)
    forge.networks.list_available_networks()
    listed = forge.networks.available_networks["merged"]
    assert listed.sd_version.name == SD_VERSION[family] and listed.hash == model_hash(path)
    unet, texts = as_forge_has_it(family)
    file = load_file(path)
    assert forge.networks.load_lora_for_models(unet, texts, file, 1.0, 1.0) == (unet, texts)
    said = capsys.readouterr().out
    unknown = [key for key in file if key.startswith("bundle_emb.")]
    assert f"with unmatched keys {unknown}" in said and len(unknown) == len(WIDTHS[family])
    assert said.count("(skipped 0 keys)") == 2
    known = forge.lora.model_lora_keys_unet(unet.model, {}) | forge.lora.model_lora_keys_clip(texts.model, {})
    for name in list(layers)[::25]:
        weight, patch = torch.zeros(there[name]), (unet.patches | texts.patches)[known[name]]
        theirs = forge.lora.merge_lora_to_weight([(1.0, patch, 1.0, None, None)], weight)
        compared(layers[name].delta().reshape(weight.shape), theirs)


@pytest.mark.parametrize("checkout", ["FORGE_DIR"], indirect=True)
@pytest.mark.parametrize("words", [MOST_UNKNOWN, MOST_UNKNOWN + 1])
def test_forge_loads_a_file_of_any_number_of_words(forge, tmp_path, words, capsys) -> None:
    """One more would make it refuse the file, so they are files of their own then."""
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    layers = {name: random_layer(shapes("sd1")[name], 2)}
    many = {f"word{number}": {"clip_l": torch.randn(1, 768)} for number in range(words)}
    merge = Merge("sd1", [Concept(LoRA("one", None, "sd1", layers), "word0")], Settings(), layers=layers, words=many)
    file = load_file(write(merge, tmp_path / "merged.safetensors"))
    bundled = [key for key in file if key.startswith("bundle_emb.")]
    assert len(bundled) == (words if words <= MOST_UNKNOWN else 0)
    more = {f"bundle_emb.more{number}.vector": torch.randn(1, 768) for number in range(MOST_UNKNOWN + 1)}
    for tensors, taken in ((file, 1), (file | more, 0)):
        unet, texts = as_forge_has_it("sd1")
        forge.networks.load_lora_for_models(unet, texts, tensors, 1.0, 1.0)
        assert len(unet.patches) == taken
        assert ("LoRA version mismatch" in capsys.readouterr().out) == (not taken)


def new_weights() -> tuple[dict[str, torch.Tensor], str, torch.Tensor]:
    """A file that replaces a layer's weight, the layer's name, and its weight without the file."""
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    shape = shapes("sd1")[name]
    return {f"{name}.set_weight": torch.randn(shape)}, name, torch.randn(shape)


@pytest.mark.parametrize("checkout", ["COMFYUI_DIR"], indirect=True)
def test_a_new_weight_is_what_comfyui_makes_of_it(checkout) -> None:
    importlib.import_module("comfy.cli_args").args.cpu = True
    comfy = importlib.import_module("comfy.lora")
    file, name, weight = new_weights()
    known = comfy.model_lora_keys_unet(as_comfyui_has_it("sd1")[0], {})
    patch = comfy.load_lora(file, known)[known[name]]
    theirs = comfy.calculate_weight([(1.0, patch, 1.0, None, None)], weight.clone(), name)
    compared(parse(file, {}, "x").layers[name].delta(weight), theirs - weight)


@pytest.mark.parametrize("checkout", ["FORGE_DIR"], indirect=True)
def test_a_new_weight_is_what_forge_makes_of_it(forge) -> None:
    file, name, weight = new_weights()
    known = forge.lora.model_lora_keys_unet(as_forge_has_it("sd1")[0].model, {})
    patches, _ = forge.lora.load_lora(file, known)
    theirs = forge.lora.merge_lora_to_weight([(1.0, patches[known[name]], 1.0, None, None)], weight)
    compared(parse(file, {}, "x").layers[name].delta(weight), theirs - weight)


@pytest.mark.parametrize("checkout", ["SD_SCRIPTS_DIR"], indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_loads_every_key(checkout, tmp_path, family) -> None:
    kohya = importlib.import_module("networks.lora")
    torch.manual_seed(0)
    there = {
        name: shape
        for name, shape in shapes(family).items()
        if len(shape) > 1 and not name.removeprefix("lora_unet_").startswith(ENDS) and "text_projection" not in name
    }
    layers = {name: random_layer(shape, 2 + number % 3) for number, (name, shape) in enumerate(there.items())}
    biased = next(reversed(layers))  # such layers it passes over, with their ΔW
    path = written(tmp_path, family, layers | {biased: random_layer(there[biased], 2, bias=True)})
    with torch.device("meta"):
        unet = (
            importlib.import_module("library.sdxl_original_unet").SdxlUNet2DConditionModel()
            if family == "sdxl"
            else diffusers.UNet2DConditionModel(layers_per_block=2, **architectures.DIFFUSERS_UNETS[family])
        )
        encoders = [text_encoder(*size) for size in architectures.TEXT_ENCODERS[family]]
    texts = encoders if family == "sdxl" else encoders[0]
    network, tensors = kohya.create_network_from_weights(1.0, str(path), None, texts, unet, for_inference=True)
    network.apply_to(texts, unet, True, True)
    result = network.load_state_dict(tensors, False)
    assert result.missing_keys == []
    unexpected = {key for key in result.unexpected_keys if not key.startswith("bundle_emb.")}
    assert unexpected == {f"{biased}.diff", f"{biased}.diff_b"}
    del layers[biased]
    theirs = {module.lora_name: module for module in [*network.text_encoder_loras, *network.unet_loras]}
    assert theirs.keys() == layers.keys()
    for name in list(layers)[::25]:
        compared(layers[name].delta(), theirs[name].get_weight())


@pytest.mark.parametrize("checkout", ["SD_SCRIPTS_DIR"], indirect=True)
@pytest.mark.parametrize("alpha", [1e-3, 0.5])
@pytest.mark.parametrize("conv", [False, True])
def test_kohyas_own_oft_is_read(checkout, alpha: float, conv: bool) -> None:
    torch.manual_seed(0)
    path = (
        "down_blocks_0_attentions_0_proj_in" if conv else "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    )
    layer = nn.Conv2d(8, 12, 1) if conv else nn.Linear(8, 12)
    before = layer.weight.detach().clone()
    module = importlib.import_module("networks.oft").OFTInfModule(f"oft_unet_{path}", layer, 1.0, 4, alpha)
    nn.init.normal_(module.oft_blocks)
    tensors = {f"oft_unet_{path}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    ours = parse(tensors, {}, "oft").layers[f"lora_unet_{path}"].delta(before)
    module.merge_to(1.0)
    theirs = layer.weight.detach() - before
    assert theirs.norm() > 1e-3 * before.norm() and (ours - theirs).norm() <= 1e-5 * before.norm()


def text_encoder(part: str, width: int, heads: int, layers: int, open_clip: bool) -> nn.Module:
    """A text encoder of transformers with the names that its versions before 5 had."""
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads
    )
    model = transformers.CLIPTextModel(config)
    if hasattr(model, "text_model"):
        return model
    named = nn.Module()
    named.text_model = model
    return named
