"""Every kind of layer, as LyCORIS' own modules write it: ΔW is what the module itself adds to its layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loraclr import formats
from loraclr.blocks import block
from loraclr.changes import changes_of
from loraclr.formats import BOFT, IA3, OFT, Change, DoRA, GLoRA, Layer, LoHa, LoKr
from loraclr.lora import LoRAFormatError, parse

pytest.importorskip("lycoris.modules")
from lycoris_files import ALGORITHMS, norm, trained, written

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
NORM = "lora_unet_down_blocks_0_resnets_0_norm1"
LAYERS = {
    "linear": (LINEAR, lambda: nn.Linear(24, 16)),
    "square": (LINEAR, lambda: nn.Linear(16, 16, bias=False)),
    "conv1": (CONV, lambda: nn.Conv2d(24, 16, 1)),
    "conv3": (CONV, lambda: nn.Conv2d(8, 16, 3, padding=1)),
}
#: What a trainer writes about rank-stabilised training.
STABILISED = {"ss_network_args": '{"algo": "x", "rs_lora": "True"}'}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def read(stem: str, module: nn.Module, metadata: dict[str, str] | None = None) -> Change:
    """What we read from the file that the trainer would write for one layer, and all of it."""
    lora = parse(written(stem, module), metadata or {}, "x")
    assert lora.unused == () and list(lora.layers) == [stem]
    return lora.layers[stem]


def away(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative distance of two changes."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def added(layer: nn.Module, module: nn.Module) -> torch.Tensor:
    """What the trainer's forward adds to the layer's weight, read off one input channel and place at a time."""
    if isinstance(layer, nn.Linear):
        x = torch.eye(layer.in_features)
        return (module(x) - layer(x) - module(0 * x) + layer(0 * x)).T
    channels, (height, width) = layer.in_channels, layer.kernel_size
    x = torch.eye(channels * height * width).reshape(-1, channels, height, width)
    middle = height // 2
    change = module(x)[..., middle, middle] - layer(x)[..., middle, middle]
    change = change - (module(0 * x) - layer(0 * x))[..., middle, middle]
    return change.T.reshape(layer.weight.shape)


CASES = [
    *((algorithm, layer, {}) for algorithm in ALGORITHMS for layer in LAYERS),
    *((algorithm, layer, {"use_scalar": True}) for algorithm in ("LoRA", "LoHa", "LoKr", "GLoRA") for layer in LAYERS),
    *((algorithm, layer, {"rs_lora": True}) for algorithm in ("LoRA", "LoHa", "LoKr") for layer in ("linear", "conv3")),
    *((algorithm, "conv3", {"use_tucker": True}) for algorithm in ("LoRA", "LoHa", "LoKr")),
    *(
        (algorithm, layer, {"weight_decompose": True, "wd_on_out": on_out, **more})
        for algorithm in ("LoRA", "LoHa", "LoKr")
        for layer in LAYERS
        for on_out in (True, False)
        for more in ({}, {"rs_lora": True})
    ),
    *(("LoKr", layer, {"factor": 4, **o}) for layer in LAYERS for o in ({}, {"unbalanced_factorization": True})),
    *(("LoKr", layer, {"lora_dim": 1, "decompose_both": True}) for layer in LAYERS),
    *(("LoKr", layer, {"full_matrix": True}) for layer in LAYERS),
    ("LoKr", "conv3", {"lora_dim": 1, "decompose_both": True, "use_tucker": True}),
    *(("IA3", layer, {"train_on_input": True}) for layer in LAYERS),
    *((a, layer, {"rescaled": True, **o}) for a in ("OFT", "BOFT") for layer in LAYERS for o in ({}, {"lora_dim": 8})),
    *((a, layer, {"constraint": 0.05, "lora_dim": 4}) for a in ("OFT", "BOFT") for layer in LAYERS),
]


@pytest.mark.parametrize(("algorithm", "kind", "options"), CASES)
def test_delta_is_what_the_trainers_module_adds(algorithm: str, kind: str, options: dict) -> None:
    stem, make = LAYERS[kind]
    layer = make()
    if algorithm == "BOFT":
        options = {"lora_dim": 4, **options}
    module = trained(algorithm, layer, **options)
    expected = added(layer, module)
    change = read(stem, module, STABILISED if "rs_lora" in options else None)
    weight = layer.weight.detach()
    assert away(change.delta(weight), expected) < 1e-5
    up, down = change.factors(weight)
    assert away((up @ down).reshape(weight.shape), expected) < 1e-5
    assert up.shape[1] <= min(weight.shape[0], weight[0].numel()) or isinstance(change, Layer)
    kinds = {"LoRA": Layer, "LoHa": LoHa, "LoKr": LoKr, "GLoRA": GLoRA, "IA3": IA3, "OFT": OFT, "BOFT": BOFT}
    if algorithm in kinds:
        wanted = DoRA if options.get("weight_decompose") else kinds[algorithm]
        assert type(change) is wanted


@pytest.mark.parametrize("algorithm", ["LoRA", "GLoRA", "IA3", "OFT", "BOFT", "full"])
@pytest.mark.parametrize("kind", LAYERS)
def test_delta_is_the_writers_own_diff_weight(algorithm: str, kind: str) -> None:
    """LyCORIS' LoHa and LoKr apply their scale twice here, which their forward does not; those are compared above."""
    stem, make = LAYERS[kind]
    layer = make()
    module = trained(algorithm, layer, lora_dim=4)
    expected = module.get_diff_weight()[0].detach().reshape(layer.weight.shape)
    assert away(read(stem, module).delta(layer.weight), expected) < 1e-5


def test_full_kronecker_product_and_glora_are_rank_stabilised_where_the_metadata_say_so() -> None:
    layer = nn.Linear(24, 16)
    for algorithm, options in (("LoKr", {"full_matrix": True}), ("GLoRA", {})):
        module = trained(algorithm, layer, rs_lora=True, **options)
        assert away(read(LINEAR, module, STABILISED).delta(layer.weight), added(layer, module)) < 1e-5
        assert away(read(LINEAR, module).delta(layer.weight), added(layer, module)) > 0.1


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "DoRA", "DoRA on input", "DoRA of LoHa", "DoRA of LoKr", "set"])
def test_strength_is_linear_and_apart_for_unet_and_text_encoder(algorithm: str, kind: str) -> None:
    """Below 0 and above 1, with a block's weight on top, for every kind of layer."""
    stem, make = LAYERS[kind]
    layer, text = make(), "lora_te_text_model_encoder_layers_0_mlp_fc1"
    if algorithm == "set":
        tensors = {f"{stem}.set_weight": torch.randn_like(layer.weight)}
    else:
        plain = {"DoRA of LoHa": "LoHa", "DoRA of LoKr": "LoKr"}.get(algorithm, algorithm.replace("DoRA", "LoRA")[:5])
        options = {"weight_decompose": True, "wd_on_out": "input" not in algorithm} if "DoRA" in algorithm else {}
        tensors = written(stem, trained(plain.strip(), layer, **({"lora_dim": 4} | options)))
    lora = parse(tensors | {key.replace(stem, text): tensor for key, tensor in tensors.items()}, {}, "x")
    delta = lora.layers[stem].delta(layer.weight)
    assert isinstance(lora.layers[stem], DoRA) == ("DoRA" in algorithm) and delta.norm() > 0
    blocks = {block(stem, "sd1"): 1.5, "BASE": -3.0}
    for weight, text_weight in ((-0.5, None), (1.7, -2.0), (0.3, 4.0)):
        changes = changes_of(lora, dict.fromkeys((stem, text), layer), weight, text_weight, blocks)
        for name, share in ((stem, 1.5 * weight), (text, -3.0 * (weight if text_weight is None else text_weight))):
            up, down = changes[name]
            found = (up @ down[:, : layer.weight[0].numel()]).reshape(layer.weight.shape)
            assert away(found, share * delta) < 1e-5


def test_lokr_and_loha_give_thin_factors_where_there_are_such() -> None:
    layer = nn.Linear(64, 64)
    for algorithm, rank in (("LoHa", 9), ("LoKr", 24)):
        change = read(LINEAR, trained(algorithm, layer))
        up, down = change.factors(layer.weight)
        assert up.shape == (64, rank) and down.shape == (rank, 64)
        torch.testing.assert_close(up @ down, change.delta(layer.weight))


def test_norm_layers_change_weight_and_bias() -> None:
    for layer in (nn.GroupNorm(4, 16), nn.LayerNorm(16)):
        module = norm(layer)
        change = read(NORM, module)
        torch.testing.assert_close(change.delta(layer.weight), module.get_merged_weight()[0] - layer.weight)
        torch.testing.assert_close(change.bias_delta(layer.bias), module.get_merged_weight()[1] - layer.bias)


def test_full_differences_change_the_bias_too() -> None:
    layer = nn.Linear(24, 16)
    module = trained("full", layer)
    change = read(LINEAR, module)
    torch.testing.assert_close(change.bias_delta(layer.bias), module.get_diff_weight()[1])
    with pytest.raises(ValueError, match="16 biases does not fit 9"):
        change.bias_delta(torch.zeros(9))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_both_layouts_of_glora(data: st.DataObject) -> None:
    """Square layers too, whose tensors fit both."""
    old, kernel = data.draw(st.booleans()), data.draw(st.sampled_from([[], [1, 1], [3, 3]]))
    i = data.draw(st.integers(2, 9))
    o, rank = data.draw(st.sampled_from([i, i + 3])), data.draw(st.integers(1, i - 1))
    shape = (o, i, *kernel)
    weight = torch.randn(shape)
    ones = [1] * len(kernel)
    a_up, a_down, b_up, b_down = (
        torch.randn(*size) for size in ((i, rank, *ones), (rank, i, *ones), (o, rank, *ones), (rank, i, *kernel))
    )
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    tensors = {f"{CONV}.{n}.weight": t for n, t in zip(names, (a_up, a_down, b_up, b_down), strict=True)}
    change = parse(tensors | {f"{CONV}.alpha": torch.tensor(2.0)}, {}, "x").layers[CONV]
    through = torch.einsum("oi...,ij->oj...", weight, a_up.flatten(1) @ a_down.flatten(1))
    expected = 2 / rank * (through + (b_up.flatten(1) @ b_down.flatten(1)).reshape(shape))
    assert away(change.delta(weight), expected) < 1e-5


def test_lycoris_2s_oft_stores_the_rotations() -> None:
    rotation = torch.linalg.qr(torch.randn(4, 4, 4)).Q
    weight = torch.randn(16, 24)
    change = parse({f"{LINEAR}.oft_diag": rotation}, {}, "x").layers[LINEAR]
    assert away(change.delta(weight), torch.block_diag(*rotation).T @ weight - weight) < 1e-5


def test_set_weight_replaces_the_weight_and_a_bias_alone_changes_only_itself() -> None:
    weight, new, bias = torch.randn(16, 24), torch.randn(16, 24), torch.randn(16)
    lora = parse({f"{LINEAR}.set_weight": new, f"{CONV}.diff_b": bias}, {}, "x")
    torch.testing.assert_close(weight + lora.layers[LINEAR].delta(weight), new)
    assert lora.layers[CONV].delta(torch.randn(16, 8, 3, 3)).abs().sum() == 0
    torch.testing.assert_close(lora.layers[CONV].bias_delta(), bias)


FUSED = "lora_te2_text_model_encoder_layers_0_self_attn_in_proj"


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [(a, o) for a in ("LoRA", "LoHa", "LoKr") for o in ({}, {"weight_decompose": True})] + [("full", {})],
)
def test_a_fused_projection_is_taken_apart(algorithm: str, options: dict) -> None:
    layer = nn.Linear(16, 48)
    module = trained(algorithm, layer, **options)
    tensors = {f"{FUSED}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    lora = parse(tensors, {}, "x")
    names = [FUSED.replace("in_proj", f"{letter}_proj") for letter in "qkv"]
    assert list(lora.layers) == names and lora.unused == ()
    whole = added(layer, module)
    for name, weight, expected in zip(names, layer.weight.detach().chunk(3), whole.chunk(3), strict=True):
        assert away(lora.layers[name].delta(weight), expected) < 1e-5
        up, down = lora.layers[name].factors(weight)
        assert away(up @ down, expected) < 1e-5
    if algorithm == "full":
        biases = [lora.layers[name].bias_delta() for name in names]
        torch.testing.assert_close(torch.cat(biases), module.get_diff_weight()[1].detach())


@pytest.mark.parametrize(
    ("algorithm", "options"), [("IA3", {}), ("GLoRA", {}), ("OFT", {}), ("LoRA", {"weight_decompose": True})]
)
def test_what_looks_at_the_whole_fused_weight_is_refused(algorithm: str, options: dict) -> None:
    module = trained(algorithm, nn.Linear(16, 48), wd_on_out=False, **options)
    tensors = {f"{FUSED}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    with pytest.raises(LoRAFormatError, match="^bad cannot be read: in .*q_proj.*cannot be taken apart into 3"):
        parse(tensors, {}, "bad")


def test_a_fused_bias_alone_is_taken_apart() -> None:
    lora = parse({f"{FUSED}.diff_b": torch.arange(48.0)}, {}, "x")
    torch.testing.assert_close(lora.layers[FUSED.replace("in_proj", "v_proj")].bias_delta(), torch.arange(32.0, 48.0))


def test_a_layer_alone_and_fused_is_refused() -> None:
    module = trained("LoRA", nn.Linear(16, 48))
    tensors = {f"{FUSED}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    alone = {key.replace("in_proj", "k_proj"): tensor for key, tensor in tensors.items()}
    with pytest.raises(LoRAFormatError, match="^bad has .*k_proj twice, alone and fused"):
        parse(tensors | alone, {}, "bad")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_change_that_does_not_fit_a_weight_says_both_shapes(algorithm: str) -> None:
    change = read(LINEAR, trained(algorithm, nn.Linear(24, 16), lora_dim=4))
    wrong = torch.zeros(12, 20)
    assert not change.fits((12, 20)) and change.fits((16, 24))
    with pytest.raises(ValueError, match=r"a change of (16|\?)×(24|\?) does not fit a weight of 12×20"):
        change.delta(wrong)


def test_only_kinds_without_the_base_weight_give_a_delta_without_it() -> None:
    for algorithm in ALGORITHMS:
        change = read(LINEAR, trained(algorithm, nn.Linear(24, 16), lora_dim=4))
        assert change.needs_base == (algorithm in ("GLoRA", "IA3", "OFT", "BOFT"))
        if change.needs_base:
            with pytest.raises(ValueError, match="depends on the base weight"):
                change.delta()
        else:
            torch.testing.assert_close(change.delta(), change.delta(torch.zeros(16, 24)))


def test_half_precision_weights_give_float32_changes() -> None:
    weight = torch.randn(16, 24)
    for algorithm in ALGORITHMS:
        change = read(LINEAR, trained(algorithm, nn.Linear(24, 16), lora_dim=4))
        with torch.autocast("cpu", torch.bfloat16):
            found = change.delta(weight.bfloat16())
        assert away(found, change.delta(weight.bfloat16().float())) < 1e-6


#: The suffix that is taken away, and whether the rest is still something.
NEEDED = {
    "LoRA": {"lora_up.weight", "lora_down.weight"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "GLoRA": {"a1.weight", "a2.weight", "b1.weight", "b2.weight"},
    "IA3": {"weight"},
}


@pytest.mark.parametrize(("algorithm", "suffix"), [(a, s) for a, needed in NEEDED.items() for s in sorted(needed)])
def test_a_missing_tensor_is_named(algorithm: str, suffix: str) -> None:
    module = trained(algorithm, nn.Linear(24, 16))
    tensors = {f"{LINEAR}.{key}": tensor for key, tensor in module.state_dict().items() if key != suffix}
    with pytest.raises(LoRAFormatError, match=rf"^bad is incomplete: {LINEAR} has no {suffix}; get the file again\.$"):
        parse(tensors, {}, "bad")


@pytest.mark.parametrize("algorithm", ["LoHa", "LoKr", "GLoRA", "OFT", "BOFT"])
def test_tensors_that_do_not_fit_together_are_refused(algorithm: str) -> None:
    module = trained(algorithm, nn.Linear(24, 16), lora_dim=2 if algorithm == "LoKr" else 4)
    tensors = {f"{LINEAR}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    for key in [key for key in tensors if not key.endswith(("alpha", "lokr_w1", "lokr_w2_b"))]:
        changed = tensors | {key: torch.cat([tensors[key], tensors[key][..., :1]], -1)}
        with pytest.raises(LoRAFormatError, match=f"^bad is damaged: in {LINEAR}, .*; get the file again"):
            parse(changed, {}, "bad")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_low_rank_kinds_for_all_ranks_shapes_alphas_and_precisions(data: st.DataObject) -> None:
    algorithm = data.draw(st.sampled_from(["LoRA", "LoHa", "LoKr"]))
    rank, alpha = data.draw(st.integers(1, 6)), data.draw(st.floats(0.25, 8))
    o, i, size = data.draw(st.integers(1, 6)) * 2, data.draw(st.integers(1, 6)) * 2, data.draw(st.sampled_from([1, 3]))
    layer = nn.Conv2d(i, o, size, padding=size // 2) if data.draw(st.booleans()) else nn.Linear(i, o)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    options = {name: data.draw(st.booleans()) for name in ("use_tucker", "decompose_both", "weight_decompose")}
    module = trained(algorithm, layer, lora_dim=rank, alpha=alpha, wd_on_out=data.draw(st.booleans()), **options)
    change = read(CONV, module)
    expected = added(layer, module)
    assert (change.delta(layer.weight) - expected).norm() <= 1e-5 * (expected.norm() + layer.weight.norm())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_missing_a_layer_is_read_or_refused_in_a_sentence(data: st.DataObject) -> None:
    algorithm = data.draw(st.sampled_from(sorted(ALGORITHMS)))
    options = {"weight_decompose": True} if algorithm in ("LoRA", "LoHa", "LoKr") else {}
    stem, make = LAYERS[data.draw(st.sampled_from(sorted(LAYERS)))]
    module = trained(algorithm, make(), lora_dim=4, **options)
    tensors = {f"{stem}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    kept = data.draw(st.sets(st.sampled_from(sorted(tensors))))
    try:
        lora = parse({key: tensors[key] for key in kept}, {}, "bad")
    except LoRAFormatError as error:
        assert str(error).startswith("bad ") and str(error).endswith(".")
    else:
        assert set(lora.layers) == {stem} and set(lora.unused) <= kept


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (".lora_up.weight", ".lora_down.weight"),
        (".lora_B.weight", ".lora_A.weight"),
        (".lora.up.weight", ".lora.down.weight"),
        ("_lora.up.weight", "_lora.down.weight"),
        (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    ],
)
def test_every_spelling_of_a_low_rank_layer_is_the_same_change(up: str, down: str) -> None:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = torch.randn(16, 4), torch.randn(4, 24)
    lora = parse({f"{path}{up}": factors[0], f"{path}{down}": factors[1]}, {}, "x")
    torch.testing.assert_close(lora.layers[LINEAR].delta(), factors[0] @ factors[1])


def test_every_suffix_splits_in_every_spelling() -> None:
    spelled = {
        "lora_up.weight": ["lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight"],
        "lora_down.weight": ["lora_down.weight", "lora_A.weight", "lora_linear_layer.down.weight"],
        "lora_up.bias": ["lora_up.bias", "lora_B.bias"],
        "alpha": ["alpha", "lora.alpha"],
        "lora_magnitude_vector": ["lora_magnitude_vector", "lora_magnitude_vector.default.weight"],
    }
    for suffix, spellings in spelled.items():
        assert {formats.split(f"unet.a.to_q.{spelling}") for spelling in spellings} == {("unet.a.to_q", suffix)}
    assert formats.split("unet.a.to_q_lora.up.weight") == ("unet.a.to_q", "lora_up.weight")
    for kind in formats.KINDS:
        for suffix in kind.owns:
            assert formats.split(f"{LINEAR}.{suffix}") == (LINEAR, suffix)
    assert formats.split(f"{LINEAR}.other") is None
