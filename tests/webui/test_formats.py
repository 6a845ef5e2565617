"""Files of every format in a real webui: its own ΔW is ours, and it knows every key of what is merged from them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, checkout, running
from safetensors.torch import save_file
from torch import Tensor, nn
from webui_driver import Webui

from loraclr.folding import cross_layers

BLOCK, ATTENTION = "lora_unet_down_blocks_0", "lora_unet_down_blocks_0_attentions_0"
TEXT = "lora_te_text_model_encoder_layers_0"
LINEAR = [
    f"{TEXT}_self_attn_q_proj", f"{TEXT}_mlp_fc1", f"{ATTENTION}_transformer_blocks_0_attn1_to_q",
    f"{ATTENTION}_transformer_blocks_0_attn2_to_k", f"{ATTENTION}_transformer_blocks_0_ff_net_0_proj",
    f"{BLOCK}_resnets_0_time_emb_proj",
]  # fmt: skip
CONV = [f"{ATTENTION}_proj_in", f"{BLOCK}_resnets_0_conv1", "lora_unet_down_blocks_1_resnets_0_conv_shortcut"]
ALL = LINEAR + CONV
NORMS = [f"{BLOCK}_resnets_0_norm1", f"{ATTENTION}_transformer_blocks_0_norm1", f"{TEXT}_layer_norm1"]

#: Name of the file → algorithm, its options, layers.
AGREE: dict[str, tuple[str, dict, list[str]]] = {
    "lora": ("LoRA", {}, ALL),
    "lora of rank 7 with alpha 3.5": ("LoRA", {"lora_dim": 7, "alpha": 3.5}, ALL),
    "rank-stabilised": ("LoRA", {"rs_lora": True}, ALL),
    "locon with mid": ("LoRA", {"use_tucker": True}, CONV),
    "loha": ("LoHa", {}, ALL),
    "loha with mid": ("LoHa", {"use_tucker": True}, CONV),
    "lokr": ("LoKr", {"lora_dim": 2, "factor": 4}, ALL),
    "lokr, both factorised": ("LoKr", {"lora_dim": 1, "decompose_both": True, "factor": 4}, ALL),
    "lokr, both whole": ("LoKr", {"full_matrix": True}, ALL),
    "lokr with mid": ("LoKr", {"lora_dim": 1, "use_tucker": True}, CONV),
    "ia3": ("IA3", {}, LINEAR),
    "ia3 on input": ("IA3", {"train_on_input": True}, LINEAR),
    "oft": ("OFT", {"lora_dim": 4}, ALL),
    "oft, rescaled": ("OFT", {"lora_dim": 4, "rescaled": True}, ALL),
    "oft, constrained": ("OFT", {"lora_dim": 4, "constraint": 0.05}, ALL),
    "boft": ("BOFT", {"lora_dim": 4}, ALL[:-1]),
    "boft, rescaled": ("BOFT", {"lora_dim": 4, "rescaled": True}, ALL[:-1]),
    "full": ("full", {}, ALL),
    "dora": ("LoRA", {"weight_decompose": True, "wd_on_out": False}, ALL),
    "dora of loha": ("LoHa", {"weight_decompose": True, "wd_on_out": False}, ALL),
    "dora of lokr": ("LoKr", {"weight_decompose": True, "wd_on_out": False, "lora_dim": 2, "factor": 4}, ALL),
}  # fmt: skip
GLORA = {f"{side}{number}.weight": f"{side}{3 - number}.weight" for side in "ab" for number in (1, 2)}


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of one layer with other suffixes; those that get none are left out."""
    split = [(*key.split(".", 1), tensor) for key, tensor in tensors.items()]
    return {f"{stem}.{names.get(suffix, suffix)}": tensor for stem, suffix, tensor in split if names.get(suffix, "?")}


def write(folder: Path) -> dict[str, list[str]]:
    """Write a file of every format for the miniature's own layers. Returns each one's layers."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from lycoris_files import norm, trained, written

    from loraclr.keys import compvis_unet_path
    from miniature import drawing

    torch.manual_seed(0)
    layers: dict[str, nn.Module] = drawing.open_miniature("cpu").layers()
    made: dict[str, list[str]] = {}

    def add(name: str, names: list[str], tensors_of: Callable[[str], dict[str, Tensor]]) -> None:
        tensors = {key: tensor for layer in names for key, tensor in tensors_of(layer).items()}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
        made[name] = names

    def by(algorithm: str, options: dict) -> Callable[[str], dict[str, Tensor]]:
        return lambda layer: written(layer, trained(algorithm, layers[layer], 0.1, **options))

    folder.mkdir(parents=True)
    for name, (algorithm, options, names) in AGREE.items():
        add(name, names, by(algorithm, options))
    plain, glora = by("LoRA", {}), by("GLoRA", {"alpha": 3.0})
    add("every layer", [k for k, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)], plain)
    add("without alpha", ALL, lambda layer: renamed(plain(layer), {"alpha": ""}))
    peft = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight", "alpha": ""}
    add("lora_A and lora_B", ALL, lambda layer: renamed(plain(layer), peft))
    add("many ranks", ALL, lambda layer: by("LoRA", {"lora_dim": 1 + ALL.index(layer), "alpha": 1.5})(layer))
    add("old glora", LINEAR, lambda layer: renamed(glora(layer), GLORA))
    add("norm", NORMS, lambda layer: written(layer, norm(layers[layer])))
    rotation = torch.linalg.qr(torch.eye(4) + 0.1 * torch.randn(8, 4, 4)).Q
    add("oft_diag", LINEAR[2:4], lambda layer: {f"{layer}.oft_diag": rotation})
    oft, unet = by("OFT", {"lora_dim": 4, "constraint": 0.05}), [name for name in ALL if name.startswith("lora_unet")]
    kohya = {name: f"oft_unet_{compvis_unet_path(name).replace('.', '_')}" for name in unet}
    add("kohya's oft", unet, lambda layer: {k.replace(layer, kohya[layer]): t for k, t in oft(layer).items()})
    # What the webui reads otherwise than the trainers do.
    add("new glora", LINEAR, glora)
    add("glora with alpha", LINEAR, lambda layer: renamed(by("GLoRA", {})(layer), GLORA))
    add("dora on output", ALL, by("LoRA", {"weight_decompose": True, "wd_on_out": True}))
    add("ia3 of convolutions", CONV, by("IA3", {}))
    add("a bias alone", LINEAR[:1], lambda layer: {f"{layer}.diff_b": torch.ones(len(layers[layer].weight))})
    return made


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Webui, dict[str, list[str]]]]:
    """A webui with the miniature and a file of each format; each file's layers."""
    checkout()
    pytest.importorskip("lycoris.modules")
    from miniature import checkpoint

    data = tmp_path_factory.mktemp("webui")
    checkpoint.install(data / "models" / "Stable-diffusion")
    made = write(data / "models" / "Lora")
    with running(data, probe=True) as webui:
        yield webui, made


@pytest.fixture(scope="module")
def said(started) -> dict[str, dict]:
    """What the probe says of each file."""
    webui, made = started
    return webui.ask("/deltas", {"names": list(made)})


OTHERWISE = ["new glora", "glora with alpha", "dora on output", "ia3 of convolutions", "a bias alone"]


def test_the_webuis_own_deltas_are_ours(started, said: dict[str, dict]) -> None:
    for name in set(said) - set(OTHERWISE):
        found, names = said[name], sorted(started[1][name])
        assert found["layers"] == names and found["unused"] == [], name
        assert found["failed"] == found["complaints"] == found["others"] == [], (name, found)
        assert sorted(found["computed"]) == sorted(found["weights"]) == names
        worst = max([*found["computed"].values(), *found["weights"].values(), *found["biases"].values()])
        assert worst < 1e-3, (name, found)
    assert len(said["full"]["biases"]) > 5 and len(said["norm"]["biases"]) == 3


def test_where_the_webui_reads_a_file_otherwise_than_its_trainer(said: dict[str, dict]) -> None:
    """These are as the trainers have them here (tests/test_formats.py); a webui that learns them is to be noticed."""
    assert said["new glora"]["failed"]
    assert min(said["glora with alpha"]["computed"].values()) > 0.1
    wrong = said["dora on output"]
    assert wrong["failed"] or wrong["complaints"] or max(wrong["computed"].values()) > 0.1
    wrong = said["ia3 of convolutions"]
    assert wrong["failed"] or wrong["complaints"] or max(wrong["computed"].values()) > 0.1
    assert "Could not find a module type" in said["a bias alone"]["refused"]


def test_what_is_merged_of_all_of_them_is_known_to_the_webui(started) -> None:
    webui, made = started
    names = ["locon with mid", "loha", "lokr", "ia3", "oft", "full", "norm", "dora on output", "new glora"]
    triggers = [f"sks{number}" for number in range(len(names))]
    merged = webui.ask("/probe", {"names": names, "triggers": triggers, "name": "all of them"})
    assert merged["complaints"] == [] and merged["unused"] == ["bundle_emb.sks8.emb_params"]
    assert merged["listed"] == ["SD1", merged["hash"]]
    folded = {f"{layer}_to_{side}" for layer in cross_layers() for side in "kv"}  # of the last one's word
    assert set(merged["layers"]) == {layer for name in names for layer in made[name]} | folded
    assert merged["untouched"] and merged["restored"]
    assert min(merged["effect"]) > 0.01 and max(merged["apart"]) < 1e-3, merged


def test_an_edlora_is_merged_and_its_word_known_to_the_webui(started) -> None:
    merged = started[0].ask("/probe", {"names": ["lora", "loha"], "triggers": ["sks", "zyk"], "name": "with a word"})
    assert merged["order"] == [f"{layer}_to_{side}" for layer in cross_layers() for side in "kv"]
    assert merged["words"] == {"zyk": ["clip_l"]} and merged["complaints"] == []
    assert merged["untouched"] and merged["restored"]
    assert max(merged["apart"]) < 1e-3 and min(merged["word's effect"]) > 10 * max(merged["apart"])
