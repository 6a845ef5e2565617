"""Hooks: a change applied through them equals a change written into the weights, and nothing of them stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from loraclr.bank import Bank, filing
from loraclr.capture import applied, observed, same_inputs
from loraclr.changes import changes_of
from loraclr.formats import IA3
from loraclr.hosts import Context
from loraclr.lora import Layer, LoRA


class Net(nn.Module):
    """A 1×1 convolution, a 3×3 one with stride, and a linear layer over the places."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.wide, self.linear = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3, 2, 1), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.wide(self.point(x)).flatten(2).mT)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def random_changes(modules: dict[str, nn.Module], rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: (module.weight.shape[0], module.weight[0].numel()) for name, module in modules.items()}
    return {
        name: (
            torch.randn(o, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, d, generator=generator, dtype=torch.float64),
        )
        for name, (o, d) in shapes.items()
    }


def test_applied_equals_written_weights_and_leaves_no_trace(net: Net) -> None:
    modules = dict(net.named_children())
    changes, x = random_changes(modules), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain, written = net(x), copy.deepcopy(net)
    for name, (up, down) in changes.items():
        weight = getattr(written, name).weight
        weight.data += (up @ down).view(weight.shape)
    with applied(modules, changes):
        inside = net(x)
    torch.testing.assert_close(inside, written(x))
    assert not torch.allclose(inside, plain)
    assert torch.equal(net(x), plain)
    assert all(not module._forward_hooks for module in net.modules())


def test_hooks_go_when_the_run_fails(net: Net) -> None:
    modules = dict(net.named_children())
    with (
        pytest.raises(RuntimeError, match="stop"),
        applied(modules, random_changes(modules)),
        observed(modules, lambda *_: None),
    ):
        raise RuntimeError("stop")
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())


def test_gradients_reach_the_factors(net: Net) -> None:
    modules = dict(net.named_children())
    changes = {name: tuple(f.requires_grad_() for f in pair) for name, pair in random_changes(modules).items()}
    with applied(modules, changes):
        loss = net(torch.randn(1, 3, 8, 8, dtype=torch.float64)).square().sum()
    gradients = torch.autograd.grad(loss, [f for pair in changes.values() for f in pair])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_observed_rows_give_the_layer_its_output(net: Net) -> None:
    rows, x = {}, torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outputs = {}
    modules = dict(net.named_children())
    for name, module in modules.items():
        module.register_forward_hook(lambda _, args, output, name=name: outputs.__setitem__(name, output))
    with observed(modules, rows.__setitem__):
        net(x)
    for name, module in modules.items():
        expected = outputs[name] if name == "linear" else outputs[name].flatten(2).mT
        torch.testing.assert_close(rows[name] @ module.weight.flatten(1).T + module.bias, expected)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), ((2, 1), (0, 2), 1)])
def test_a_convolution_is_observed_at_the_places_that_are_chosen(stride, padding, dilation) -> None:
    wide = nn.Conv2d(3, 4, (3, 2), stride, padding, dilation)
    x, rows, asked = torch.randn(2, 3, 9, 7), {}, []
    every = nn.functional.unfold(x, wide.kernel_size, wide.dilation, wide.padding, wide.stride).mT

    def choose(name: str, count: int) -> torch.Tensor:
        asked.append((name, count))
        return torch.tensor([5, 0, count - 1])

    with observed({"wide": wide}, rows.__setitem__, choose):
        wide(x)
    assert asked == [("wide", every.shape[1])]
    assert torch.equal(rows["wide"], every[:, [5, 0, every.shape[1] - 1]])
    with observed({"wide": wide}, rows.__setitem__):
        wide(x)
    assert torch.equal(rows["wide"], every)


def test_strengths_of_unet_and_text_encoder_are_apart_and_linear() -> None:
    layer = Layer(torch.ones(2, 1), torch.ones(1, 2), alpha=0.5)
    lora = LoRA("a", None, "sd1", {"lora_unet_x_attn1_to_q": layer, "lora_te_text_model_y": layer})
    modules = {name: nn.Linear(2, 2) for name in lora.layers}
    changes = changes_of(lora, modules, weight=-2.0, text_weight=3.0)
    assert torch.equal(
        changes["lora_unet_x_attn1_to_q"][0] @ changes["lora_unet_x_attn1_to_q"][1], -1.0 * torch.ones(2, 2)
    )
    assert torch.equal(changes["lora_te_text_model_y"][0] @ changes["lora_te_text_model_y"][1], 1.5 * torch.ones(2, 2))
    assert changes_of(lora, modules, weight=4.0)["lora_te_text_model_y"][0][0, 0] == 2.0


def test_changes_come_from_the_live_weights_and_must_fit_them(net: Net) -> None:
    modules = dict(net.named_children())
    lora = LoRA("a", None, "sd1", {"wide": IA3(torch.tensor([0.5, 0.0, -1.0, 2.0]), on_input=False)})
    up, down = changes_of(lora, modules, weight=2.0)["wide"]
    expected = net.wide.weight.flatten(1).float() * torch.tensor([1.0, 0.0, -2.0, 4.0])[:, None]
    torch.testing.assert_close(up @ down, expected)
    with pytest.raises(ValueError, match=r"^a does not fit the loaded model: its wide is 4×\?, the model's 6×4\."):
        changes_of(lora, {"wide": net.linear})


def test_bank_finds_each_rows_prompt_by_its_context() -> None:
    contexts = Context(torch.randn(3, 7, 4))
    bank = Bank(["a", "b", ""])
    record = filing(bank, contexts)
    x, prediction = torch.randn(4, 4, 2, 2), torch.randn(4, 4, 2, 2)
    record(x, torch.tensor([7.0]), Context(contexts.tokens[[1, 0, 2, 2]] + 1e-4), prediction)
    record(x, torch.tensor([7.0]), Context(torch.randn(4, 7, 5)), prediction)  # another width: somebody else's call
    assert [bank.prompts[place] for place in bank.prompt] == ["b", "a", "", ""]
    assert torch.equal(torch.stack(bank.x), x)
    assert torch.equal(torch.stack(bank.prediction), prediction)
    assert all(t.item() == 7.0 for t in bank.t)


@pytest.mark.parametrize("told", [5, 9])
def test_bank_finds_a_prompt_that_is_told_with_another_length(told: int) -> None:
    """The webui makes a prompt as long as the longest that it is encoded with."""
    whole = torch.randn(3, 9, 4)
    bank = Bank(["a", "b", ""])
    x = torch.randn(2, 4, 2, 2)
    filing(bank, Context(whole[:, : 14 - told]))(x, torch.tensor([7.0]), Context(whole[[2, 0], :told]), x)
    assert [bank.prompts[place] for place in bank.prompt] == ["", "a"]


def test_only_q_k_v_of_a_self_attention_read_the_same() -> None:
    block = "lora_unet_input_blocks_4_1_transformer_blocks_{}_attn{}_to_{}"
    text = "lora_te{}_text_model_encoder_layers_0_self_attn_{}_proj"
    together = [
        [block.format(0, 1, side) for side in "qkv"],
        [block.format(1, 1, side) for side in "kv"],
        [text.format(1, side) for side in "qkv"],
        [text.format(2, side) for side in "qkv"],
    ]
    alone = [block.format(0, 2, "q"), block.format(0, 2, "k"), block.format(0, 1, "out_0"), text.format(1, "out")]
    groups = same_inputs([name for group in together for name in group] + alone)
    assert groups == together + [[name] for name in alone]
