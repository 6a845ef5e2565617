"""What others do, against what others do: PEFT's functions and adapters, lstsq, and the definitions written out."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import WIDTH, ToyHost, toy_lora

from loraclr import blocks, methods, objective
from loraclr.baselines import arithmetic, fitting
from loraclr.concept import Concept
from loraclr.factor import decompose
from loraclr.formats import IA3, Bias, DoRA, Full, LoHa, LoKr, Norm
from loraclr.lora import Layer, LoRA
from loraclr.merging import _Run
from loraclr.methods import METHODS, Options
from loraclr.plan import Settings

peft = pytest.importorskip("peft")
from peft.utils import merge_utils as oracle  # noqa: E402

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some(count: int = 3, outputs: int = 7, width: int = 9, ranks: tuple[int, ...] = (2, 3, 1)) -> list:
    return [(random(outputs, ranks[k], seed=2 * k), random(ranks[k], width, seed=2 * k + 1)) for k in range(count)]


def deltas_of(changes: list) -> list[Tensor]:
    return [up @ down for up, down in changes]


ONES = torch.ones(3)


def test_concat_is_the_sum_and_average_counts_absent_loras() -> None:
    changes, deltas = some(), deltas_of(some())
    up, down = arithmetic.concat(changes)
    assert up.shape == (7, 6)
    torch.testing.assert_close(up @ down, oracle.task_arithmetic(deltas, ONES))
    up, down = arithmetic.average(changes, 4)
    torch.testing.assert_close(up @ down, oracle.task_arithmetic(deltas, ONES / 4))


def test_stacked_adds_the_changes_of_weight_up() -> None:
    a, b, c = some()
    total = methods.stacked([{"x": a, "y": b}, {"y": c}])
    for name, parts in (("x", [a]), ("y", [b, c])):
        torch.testing.assert_close(arithmetic.dense(total[name]), sum(deltas_of(parts)))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_pruned_sums_and_ties_agree_with_peft(density: float, seed: int) -> None:
    deltas = [random(7, 9, seed=10 * seed + k) for k in range(3)]
    tight = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        arithmetic.magnitude_prune(deltas, density), oracle.magnitude_prune(deltas, ONES, density), **tight
    )
    torch.testing.assert_close(arithmetic.ties(deltas, density), oracle.ties(deltas, ONES, density), **tight)
    for ours, theirs in (
        (arithmetic.dare_linear, oracle.dare_linear),
        (arithmetic.dare_ties, oracle.dare_ties),
    ):
        torch.manual_seed(seed)  # PEFT draws from the global generator
        expected = theirs(deltas, ONES, density)
        torch.testing.assert_close(ours(deltas, density, torch.Generator().manual_seed(seed)), expected, **tight)


def test_ties_by_hand() -> None:
    deltas = [torch.tensor([[4.0, -1.0, 0.5, 3.0]]), torch.tensor([[2.0, 5.0, -0.5, -4.0]])]
    torch.testing.assert_close(arithmetic.ties(deltas, 1.0), torch.tensor([[3.0, 5.0, 0.5, -4.0]]))
    torch.testing.assert_close(arithmetic.ties(deltas, 0.5), torch.tensor([[4.0, 5.0, 0.0, -4.0]]))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_density_is_checked(density: float) -> None:
    for prune in (arithmetic.trim, lambda d, share: arithmetic.drop(d, share, torch.Generator())):
        with pytest.raises(ValueError, match="density is"):
            prune(torch.ones(2, 2), density)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 7, bias=False)


def peft_merge(changes: list, kind: str, **options) -> Tensor:
    """ΔW of PEFT's `add_weighted_adapter` for adapters with these factors, alpha = rank, weight 1."""
    ranks = [down.shape[0] for _, down in changes]
    configs = [peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"]) for rank in ranks]
    model = peft.get_peft_model(Net(), configs[0], adapter_name="0")
    for place, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(place), config)
    layer = model.base_model.model.layer
    for place, (up, down) in enumerate(changes):
        layer.lora_B[str(place)].weight.data, layer.lora_A[str(place)].weight.data = up.clone(), down.clone()
    names = [str(place) for place in range(len(changes))]
    model.add_weighted_adapter(names, [1.0] * len(names), "merged", combination_type=kind, **options)
    return layer.get_delta_weight("merged").detach()


def ours(changes: list, method: str, **options) -> Tensor:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    loras = [
        replace(toy_lora(ToyHost(), str(k), k), layers={name: Layer(up, down, float(down.shape[0]))})
        for k, (up, down) in enumerate(changes)
    ]
    return methods.combine([Concept(lora, "") for lora in loras], method, Options(**options)).layers[name].delta()


@pytest.mark.parametrize(
    ("method", "kind", "changes", "options", "peft_options"),
    [
        ("concat", "cat", some(), {}, {}),
        ("sum", "cat", some(), {}, {}),
        ("svd", "svd", some(), {}, {}),
        ("svd", "svd", some(), {"rank": 2}, {"svd_rank": 2}),
        ("ties", "ties_svd", some(), {"rank": 4}, {"svd_rank": 4, "density": 0.5}),
        ("magnitude-prune", "magnitude_prune_svd", some(), {"rank": 2}, {"svd_rank": 2, "density": 0.5}),
        ("factor-sum", "linear", some(ranks=(2, 2, 2)), {}, {}),
    ],
)
def test_whole_methods_agree_with_peft(method, kind, changes, options, peft_options) -> None:
    expected = peft_merge(changes, kind, **peft_options)
    torch.testing.assert_close(ours(changes, method, **options), expected, rtol=1e-5, atol=1e-5)


def test_factor_sum_is_no_sum_and_refuses_other_ranks() -> None:
    changes = some(ranks=(2, 2, 2))
    up, down = arithmetic.factor_sum(changes)
    assert not torch.allclose(up @ down, sum(deltas_of(changes)), atol=0.5)
    with pytest.raises(ValueError, match="ranks 1, 2, 3 cannot be added"):
        arithmetic.factor_sum(some())


def overlap(changes) -> float:
    """The largest cosine between two LoRAs' input subspaces."""
    bases = [torch.linalg.qr(down.T).Q for _, down in changes]
    return max(float(torch.linalg.matrix_norm(a.T @ b, 2)) for a, b in itertools.combinations(bases, 2))


def test_orthogonal_is_the_sum_where_loras_are_orthogonal() -> None:
    basis = torch.linalg.qr(random(9, 9)).Q
    changes = [(random(7, 2, seed=k), random(2, 2, seed=9 + k) @ basis[:, 2 * k : 2 * k + 2].T) for k in range(3)]
    up, down = arithmetic.orthogonal(changes)
    torch.testing.assert_close(up @ down, sum(deltas_of(changes)), rtol=1e-5, atol=1e-5)
    assert overlap(changes) < 1e-6


def test_orthogonal_of_loras_that_do_nothing_does_nothing() -> None:
    nothing = torch.zeros(5, 1), torch.zeros(1, 6)
    up, down = arithmetic.orthogonal([nothing, nothing])
    assert not (up @ down).any()


def test_orthogonal_gives_each_lora_inputs_of_its_own() -> None:
    changes = some()
    assert overlap(changes) > 0.3
    up, down = arithmetic.orthogonal(changes)
    parts = list(zip(up.split([2, 3, 1], 1), down.split([2, 3, 1]), strict=True))
    assert overlap(parts) < 1e-5
    for (own, _), (part, _) in zip(changes, parts, strict=True):
        torch.testing.assert_close(own, part)


@pytest.mark.parametrize("changes", [some(ranks=(4, 4, 4)), [some()[0], some()[0]]])
def test_orthogonal_says_when_it_is_not_possible(changes: list) -> None:
    with pytest.raises(ValueError, match="cannot be made orthogonal"):
        arithmetic.orthogonal(changes)


@settings(max_examples=40, deadline=None)
@given(outputs=st.integers(1, 9), width=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 999))
def test_decompose_is_the_best_of_its_rank(outputs: int, width: int, rank: int, seed: int) -> None:
    delta = random(outputs, width, seed=seed, dtype=DOUBLE)
    up, down = decompose(delta, rank)
    lost = torch.linalg.svdvals(delta)[rank:].square().sum()
    assert (delta - up @ down).square().sum().item() == pytest.approx(lost.item(), rel=1e-6, abs=1e-12)
    up, down = decompose(delta)
    torch.testing.assert_close(up @ down, delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fall", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(130, 200), (200, 130)])
def test_decompose_finds_few_of_many_directions(fall: float, shape: tuple[int, int]) -> None:
    """Also where the singular values hardly differ, so that no direction stands out."""
    left, right = (torch.linalg.qr(random(size, 130, seed=size, dtype=DOUBLE))[0] for size in shape)
    singular = torch.arange(1, 131, dtype=DOUBLE) ** -fall
    delta = left * singular @ right.T
    up, down = decompose(delta, 8)
    assert up.shape == (shape[0], 8)
    kept, best = (up @ down).square().sum(), singular[:8].square().sum()
    torch.testing.assert_close(kept, best, rtol=1e-6, atol=0)
    torch.testing.assert_close((delta - up @ down).square().sum(), delta.square().sum() - best, rtol=1e-5, atol=1e-12)


def test_decompose_finds_the_rank_and_survives_zeros() -> None:
    up, down = decompose(random(20, 3) @ random(3, 15, seed=1))
    assert up.shape == (20, 3)
    assert decompose(torch.zeros(200, 130), 4)[0].shape == (200, 1)
    with pytest.raises(RuntimeError):
        decompose(torch.full((200, 130), torch.nan), 4)
    up, down = decompose(torch.zeros(4, 3))
    assert up.shape == (4, 1)
    assert torch.equal(up @ down, torch.zeros(4, 3))


def inputs_of(changes: list, rows: int = 40) -> list[Tensor]:
    return [random(rows, down.shape[1], seed=50 + k, dtype=DOUBLE) for k, (_, down) in enumerate(changes)]


class TestGradientFusion:
    def fused(self, steps: int) -> tuple[Tensor, list, list]:
        changes = [(up.double(), down.double()) for up, down in some()]
        inputs = inputs_of(changes)
        gram = sum(x.T @ x for x in inputs)
        crosses = [down @ x.T @ x for x, (_, down) in zip(inputs, changes, strict=True)]
        up, down = fitting.gradient_fusion(gram, [up for up, _ in changes], crosses, steps)
        return up @ down, changes, inputs

    def test_converged_is_least_squares(self) -> None:
        delta, changes, inputs = self.fused(500)
        targets = torch.cat([x @ (up @ down).T for x, (up, down) in zip(inputs, changes, strict=True)])
        expected = torch.linalg.lstsq(torch.cat(inputs), targets).solution.T
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-6)

    def test_its_iterates_are_those_of_the_dense_problem(self) -> None:
        steps = 4
        delta, changes, inputs = self.fused(steps)
        gram = sum(x.T @ x for x in inputs)
        cross = sum((up @ down) @ (x.T @ x) for x, (up, down) in zip(inputs, changes, strict=True))
        found = torch.zeros_like(delta).requires_grad_()
        search = torch.optim.LBFGS([found], max_iter=steps, history_size=25, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            value = ((found @ gram - 2 * cross) * found).sum() / cross.abs().max()
            value.backward()
            return value

        search.step(loss)
        # The very first step length depends on the gradient's 1-norm, which a rotation changes; the line search mends
        # that, so the two agree closely and not exactly.
        close = (delta - found.detach()).norm() / found.detach().norm()
        assert close < 0.05
        assert not torch.allclose(delta, self.fused(500)[0], atol=1e-3)


class TestReference:
    def test_loss_and_first_step_are_those_of_the_definition(self) -> None:
        changes = [(0.1 * up, down) for up, down in some()]
        weight, inputs = random(7, 9, seed=99), [x.float() for x in inputs_of(changes, 6)]
        delta = fitting.reference(weight, changes, inputs, fitting.Loop(steps=2, rate=1e-3))
        variable = torch.zeros(7, 9, requires_grad=True)
        targets = [x @ (weight + up @ down).T for x, (up, down) in zip(inputs, changes, strict=True)]
        guesses = [x @ (weight + variable).T for x in inputs]
        loss = torch.zeros(())
        for i in range(3):
            negative = min((targets[i] - guesses[j]).norm() for j in range(3) if j != i)
            loss = loss + ((targets[i] - guesses[i]).square().sum() + (0.5 - negative).clamp(min=0).square()) / 3
        loss = loss + 0.1 * (torch.stack(guesses) - torch.stack(targets)).square().mean()
        loss.backward()
        # AdamW's first step is the rate times the sign of the gradient; the best of two losses is after that step.
        torch.testing.assert_close(delta, -1e-3 * variable.grad.sign(), rtol=1e-3, atol=1e-6)

    def test_the_distance_is_of_the_whole_features_or_of_each_row(self) -> None:
        changes = [(0.1 * up, down) for up, down in some()]
        weight, inputs = random(7, 9, seed=99), [x.float() for x in inputs_of(changes)]
        targets = [x @ (weight + up @ down).T for x, (up, down) in zip(inputs, changes, strict=True)]
        steps = {}
        for distance in get_args(objective.Distance):
            loop = fitting.Loop(steps=2, rate=1e-3, margin=9.0, penalty=0.0, distance=distance, mse=0.0, decay=0.0)
            steps[distance] = fitting.reference(weight, changes, inputs, loop)
            variable = torch.zeros_like(weight).requires_grad_()
            guesses = [x @ (weight + variable).T for x in inputs]
            objective.contrastive(targets, guesses, 9.0, distance).backward()
            torch.testing.assert_close(steps[distance], -1e-3 * variable.grad.sign(), rtol=1e-3, atol=1e-6)
        assert not torch.equal(*steps.values())

    def test_run_to_convergence_it_reaches_the_closed_form(self) -> None:
        changes = [(0.1 * up, down) for up, down in some()]
        weight, inputs = random(7, 9, seed=99), [x.float() for x in inputs_of(changes)]
        loop = fitting.Loop(steps=1500, rate=3e-3, margin=0.0, penalty=0.0, mse=0.0, decay=0.0)
        delta = fitting.reference(weight, changes, inputs, loop)
        targets = torch.cat([x @ (up @ down).T for x, (up, down) in zip(inputs, changes, strict=True)])
        expected = torch.linalg.lstsq(torch.cat(inputs), targets).solution.T
        torch.testing.assert_close(delta, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())

    def test_rows_of_all_concepts_are_kept_at_the_same_places(self) -> None:
        fit = fitting.Reference(fitting.Loop(rows=4), torch.zeros(3, 2), [None, None], "cpu")
        rows = torch.arange(40.0).view(2, 10, 2)
        for concept in (0, 1):
            fit.add(concept, rows)
            fit.add(concept, rows + 100)
        first, second = (torch.cat(kept) for kept in fit.inputs)
        assert first.shape == (8, 2)
        assert torch.equal(first, second)


class TestOnTheModel:
    def test_a_merge_hands_the_reference_the_same_places_of_large_pictures_for_all_concepts(self) -> None:
        host, name = ToyHost(), "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
        concepts = [Concept(toy_lora(host, word, seed), word) for seed, word in enumerate(("sks", "zyk"), start=1)]
        run = _Run(host, concepts, Settings(tokens=8), lambda *_: None, fitting.by_reference)
        rows = torch.randn(2, 64, WIDTH)
        for place in range(2):
            with run.watching(place, [name].__contains__):
                run.modules[name](rows)
        first, second = (torch.cat(kept) for kept in run.statistics[name].inputs[:2])
        assert len(first) == 16
        assert torch.equal(first, second)

    def test_gradient_fusion_and_reference_go_the_merge_s_way(self) -> None:
        host = ToyHost()
        concepts = [Concept(toy_lora(host, name, seed), name) for seed, name in enumerate(("sks", "zyk"), start=1)]
        host.target = "v"  # all timesteps count alike in what is missed
        quick = Settings(steps=3)
        missed = {}
        for name in ("loraclr", "gradient-fusion", "reference"):
            chosen = replace(quick, speed="closed")
            result = methods.merge(host, concepts, name, chosen)
            assert result.method == name
            assert result.recipe()["method"] == name
            assert result.layers.keys() == concepts[0].lora.layers.keys()
            missed[name] = max(before for before, _ in result.missed.values())
        assert missed["gradient-fusion"] < missed["reference"]  # which hardly moves in 50 steps of 1e-4
        assert missed["gradient-fusion"] == pytest.approx(missed["loraclr"], abs=0.2)
        assert 0.8 < missed["reference"] < 1.05

    def test_the_reference_loop_is_as_long_and_fast_as_the_settings_say(self, monkeypatch) -> None:
        host, loops = ToyHost(), []
        concepts = [Concept(toy_lora(host, name, seed), name) for seed, name in enumerate(("sks", "zyk"), start=1)]

        def watched(weight, changes, inputs, loop):
            loops.append(loop)
            return torch.zeros_like(weight)

        monkeypatch.setattr(fitting, "reference", watched)
        told = Settings(margin=1.0, penalty=0.0, distance="token", iterations=7, rate=0.5)
        methods.merge(host, concepts, "reference", told)
        assert set(loops) == {fitting.Loop(steps=7, rate=0.5, margin=1.0, penalty=0.0, distance="token")}
        with pytest.raises(ValueError, match="There is no distance far: choose flat or token"):
            Settings(distance="far")
        loops.clear()
        methods.merge(host, concepts, "reference")
        assert set(loops) == {fitting.Loop()}  # the authors' own


class TestCombine:
    def concepts(self) -> list[Concept]:
        host = ToyHost()
        return [Concept(toy_lora(host, "a", 1, rank=2), "", 0.7), Concept(toy_lora(host, "b", 2, rank=3), "zyk")]

    def test_strengths_of_unet_and_text_encoder(self) -> None:
        concepts = self.concepts()
        concepts[0] = replace(concepts[0], text_weight=0.0)
        result = methods.combine(concepts, "sum")
        for name, layer in result.layers.items():
            own = 0.0 if name.startswith("lora_te") else 0.7
            a, b = (concept.lora.layers[name].delta() for concept in concepts)
            torch.testing.assert_close(layer.delta(), own * a + b)
            assert layer.conv == concepts[0].lora.layers[name].conv
        assert result.triggers == "zyk"

    def test_block_weights_count_once_and_0_leaves_a_layer_alone(self) -> None:
        concepts = self.concepts()
        weights = blocks.block_weights("BASE=0 M00=-1.5")
        result = methods.combine([replace(concepts[0], blocks=weights), concepts[1]], "concat")
        for name, layer in result.layers.items():
            a, b = (concept.lora.layers[name].delta() for concept in concepts)
            own = 0.0 if name.startswith("lora_te") else -1.5 * 0.7
            assert layer.rank == min(3 if own == 0 else 5, *layer.size)
            torch.testing.assert_close(layer.delta(), own * a + b)
        assert result.recipe()["concepts"][0]["blocks"]["M00"] == -1.5

    @pytest.mark.parametrize("method", ["ties", "svd"])
    def test_a_layer_that_no_lora_changes_is_kept_whole(self, method: str) -> None:
        concepts = self.concepts()
        name = next(iter(concepts[0].lora.layers))
        for concept in concepts:
            concept.lora.layers[name].up.zero_()
        result = methods.combine(concepts, method, Options(rank=1))
        assert not result.layers[name].delta().any() and result.kept[name] == 1
        assert all(0 < share <= 1 + 1e-6 for share in result.kept.values())

    def test_dare_is_the_same_for_a_seed(self) -> None:
        runs = [methods.combine(self.concepts(), "dare-linear", Options(seed=seed)) for seed in (0, 0, 1)]
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
        deltas = [run.layers[name].delta() for run in runs]
        assert torch.equal(deltas[0], deltas[1])
        assert not torch.equal(deltas[0], deltas[2])

    def test_progress_and_cancel(self) -> None:
        shares = []
        methods.combine(self.concepts(), "ties", progress=lambda stage, share, left: shares.append(share))
        assert shares == sorted(shares)
        assert shares[-1] == 1

    def test_what_cannot_be_combined(self) -> None:
        concepts = self.concepts()
        with pytest.raises(ValueError, match="choose at least one"):
            methods.combine([], "sum")
        with pytest.raises(ValueError, match="looks at the model"):
            methods.combine(concepts, "loraclr")
        with pytest.raises(ValueError, match="choose svd"):
            methods.combine(concepts, "concat", Options(rank=2))
        with pytest.raises(ValueError, match="factor-sum cannot merge these LoRAs: in lora_.*ranks 2, 3"):
            methods.combine(concepts, "factor-sum")
        with pytest.raises(ValueError, match="b has weight 0 in every layer"):
            methods.combine([concepts[0], replace(concepts[1], blocks=blocks.block_weights("0"))], "sum")

    def test_every_method_says_what_it_does_in_one_sentence(self) -> None:
        for name, method in METHODS.items():
            assert method.name == name
            assert method.text.endswith(".") and ". " not in method.text


class TestEveryKindOfLayer:
    """Methods by weights alone take what needs no model, and with a model everything."""

    NAME = "lora_unet_down_blocks_0_resnets_0_conv1"
    NORM = "lora_unet_down_blocks_0_resnets_0_norm1"

    def loras(self) -> list[LoRA]:
        loha = LoHa(*(random(*size, seed=k) for k, size in enumerate(((4, 2), (2, 18), (4, 2), (2, 18)))), 0.5)
        lokr = LoKr(*(random(*size, seed=k) for k, size in enumerate(((2, 1), (1, 2), (2, 1), (1, 9)))), 0.5, 1)
        kinds = [
            Layer(random(4, 2), random(2, 18), 1.0, True, (3, 3)),
            loha,
            lokr,
            Full(random(4, 2, 3, 3), bias=random(4, seed=5)),
        ]
        loras = [LoRA(str(k), None, "sd1", {self.NAME: kind}) for k, kind in enumerate(kinds)]
        loras[0].layers[self.NORM] = Norm(random(4, seed=6), bias=random(4, seed=7))
        loras[3].layers[self.NORM] = Norm(random(4, seed=8))
        return loras

    @pytest.mark.parametrize("method", ["sum", "average", "concat", "ties"])
    def test_formats_mix(self, method: str) -> None:
        loras = self.loras()
        concepts = [Concept(lora, "", 0.5 + k) for k, lora in enumerate(loras)]
        result = methods.combine(concepts, method, Options(density=1.0) if method == "ties" else None)
        layer, norm = result.layers[self.NAME], result.layers[self.NORM]
        deltas = [(0.5 + k) * lora.layers[self.NAME].delta() for k, lora in enumerate(loras)]
        expected, share = arithmetic.elect(deltas) if method == "ties" else sum(deltas), 1.0
        if method == "average":
            expected, share = expected / 4, 0.25
        torch.testing.assert_close(layer.delta(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.bias, share * 3.5 * loras[3].layers[self.NAME].bias, rtol=1e-4, atol=1e-4)
        assert (layer.conv, layer.kernel) == (True, (3, 3))
        weight = 0.5 * random(4, seed=6) + 3.5 * random(4, seed=8)
        torch.testing.assert_close(norm.weight, share * weight)
        torch.testing.assert_close(norm.bias, share * 0.5 * random(4, seed=7))

    def test_the_kernel_is_told_by_the_name_where_no_file_tells_it(self) -> None:
        result = methods.combine([Concept(self.loras()[1], "")], "sum")
        assert (result.layers[self.NAME].conv, result.layers[self.NAME].kernel) == (True, (3, 3))

    def test_what_depends_on_the_model_needs_one(self) -> None:
        modules = {self.NAME: nn.Conv2d(2, 4, 3)}
        inner = self.loras()[0].layers[self.NAME]
        kinds = [DoRA(inner, random(4).abs()), IA3(random(4, seed=1), False), Bias(bias=random(4, seed=2))]
        concepts = [Concept(LoRA(str(k), None, "sd1", {self.NAME: kind}), "") for k, kind in enumerate(kinds)]
        for concept, kind in zip(concepts, ("LoRA with DoRA", "IA3", "bias"), strict=True):
            with pytest.raises(ValueError, match=rf"depends on the model \({self.NAME}, {kind}\): give the checkpoint"):
                methods.combine([concept], "sum")
        layer = methods.combine(concepts, "sum", modules=modules).layers[self.NAME]
        expected = sum(kind.delta(modules[self.NAME].weight) for kind in kinds)
        torch.testing.assert_close(layer.delta(), expected.flatten(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.bias, kinds[2].bias)
        with pytest.raises(ValueError, match="0 has layers that the loaded model lacks"):
            methods.combine(concepts, "sum", modules={})


def test_stacked_norms_and_biases_add_up() -> None:
    norm, wide = (torch.ones(2), torch.zeros(2)), (torch.ones(2, 1), torch.ones(1, 4))
    plain = (torch.full((2, 1), 2.0), torch.ones(1, 3))
    found = methods.stacked([{"norm": norm, "layer": wide}, {"norm": norm, "layer": plain}])
    assert torch.equal(found["norm"][0], torch.full((2,), 2.0))
    up, down = found["layer"]
    assert torch.equal(up @ down, torch.tensor([[3.0, 3.0, 3.0, 1.0]] * 2))  # the last column is a bias
