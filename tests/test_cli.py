"""The command line: what is wrong is said in one sentence, status 2, before any slow work, and nothing is written."""

from __future__ import annotations

import io
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toy import ToyHost, toy_lora

import loraclr
from loraclr import files, merging
from loraclr.__main__ import main, parser
from loraclr.cli import Refused, checks
from loraclr.cli import merge as command
from loraclr.cli.progress import Line, clock, sentence
from loraclr.formats import Norm
from loraclr.hinge import Objective
from loraclr.hosts import Checkpoint
from loraclr.lora import Layer
from loraclr.methods import METHODS
from loraclr.plan import Settings

TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(path: Path, width: int = 4, trigger: str = "", names: tuple[str, ...] = (TEXT, UNET)) -> Path:
    """A small LoRA file."""
    layers = {name: Layer(torch.ones(width, 2), torch.ones(2, width), 2.0) for name in names}
    return files.save(path, layers, {"modelspec.trigger_phrase": trigger} if trigger else {})


def dora(path: Path) -> Path:
    """A small DoRA: what it changes depends on the base weight."""
    tensors = {f"{UNET}.lora_{side}.weight": torch.ones(*size) for side, size in (("up", (4, 2)), ("down", (2, 4)))}
    save_file(tensors | {f"{UNET}.dora_scale": torch.full((4, 1), 3.0)}, path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two LoRAs, one of them with a trigger of its own, and something that looks like a checkpoint."""
    monkeypatch.chdir(tmp_path)
    lora(tmp_path / "a.safetensors")
    lora(tmp_path / "b.safetensors", trigger="zyk")
    save_file(
        {"model.diffusion_model.out.2.weight": torch.zeros(1), "cond_stage_model.transformer.x": torch.zeros(1)},
        tmp_path / "model.safetensors",
    )
    return tmp_path


class Tiny:
    """A host of two small layers, which is enough to be checked against."""

    family, device, size, checkpoint = "sd1", torch.device("cpu"), 64, Checkpoint("tiny.safetensors", "1")

    def layers(self) -> dict[str, torch.nn.Module]:
        modules = {TEXT: torch.nn.Linear(4, 4), UNET: torch.nn.Linear(4, 4)}
        for module in modules.values():
            torch.nn.init.constant_(module.weight, 0.5)
        return modules

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def sample(self, prompts: list[str], *_: object) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8), "red") for _ in prompts]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The standalone host replaced by `Tiny`; the checkpoints that were opened."""
    opened: list[Path] = []
    monkeypatch.setattr("loraclr.hosts.standalone.open_checkpoint", lambda path, _: opened.append(path) or Tiny())
    return opened


def fake_merge(host: Tiny, concepts: list, settings: Settings, progress: merging.Progress) -> loraclr.Merge:
    """A merge that takes no time: the first LoRA as it is."""
    progress("Polishing", 0.5, 2.0)
    return loraclr.Merge(
        family="sd1",
        layers=dict(concepts[0].lora.layers),
        concepts=concepts,
        settings=settings,
        seconds={"solve": 61.0},
        missed={concept.lora.name: (0.5, 0.25) for concept in concepts},
        objective={"attention": Objective(3, 8.0, 1.5, 0.5), "feed-forward": Objective(1, 2.0, 0.5, 0.1)},
        memory={"process": 3 * 2**29},
    )


OUT = ["--checkpoint", "model.safetensors", "--output", "out.safetensors"]
A = ["--lora", "a.safetensors", "--trigger", "sks"]


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str], progress: bool = False) -> str:
    """The one sentence on stderr of a merge that is refused, after checking that it is one and that nothing changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["merge", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    if progress:  # the merge had begun
        err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("Merging layers"))
    assert err.startswith("loraclr: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return err


class TestRefusedBeforeAnythingIsLoaded:
    """Everything here is found without opening the checkpoint."""

    @pytest.fixture(autouse=True)
    def _nothing_is_opened(self, host: list[Path]):
        yield
        assert host == []

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (OUT, "No LoRA is chosen"),
            (["--trigger", "sks", *A, *OUT], "--trigger belongs to a LoRA: write it after its --lora"),
            (["--weight", "1", *A, *OUT], "--weight belongs to a LoRA"),
            ([*A, "--trigger", "again", *OUT], "--trigger is given twice for a.safetensors"),
            (["--lora", "a.safetensors", *OUT], "a.safetensors does not say which words call it"),
            (["--lora", "a.safetensors", "--trigger", " ", *OUT], "a.safetensors does not say which words call it"),
            ([*A, "--weight", "0", *OUT], "a has weight 0"),
            ([*A, "--weight", "nan", *OUT], "a has weight nan"),
            ([*A, "--text-weight", "inf", *OUT], "a has text weight inf"),
            ([*A, "--weight", "much", *OUT], "invalid float value: 'much'"),
            ([*A, "--kind", "thing", *OUT], "invalid choice: 'thing'"),
            ([*A, "--rank", "0", *OUT], "invalid positive whole number value: '0'"),
            ([*A, *OUT, "--device", "nonsense"], "The device nonsense cannot be used here"),
            ([*A, *OUT[:2]], "There is no --output"),
            ([*A, *OUT[2:]], "--method loraclr looks at the model: give its --checkpoint"),
            ([*A, *OUT[2:], "--method", "gradient-fusion"], "--method gradient-fusion looks at the model"),
            ([*A, *OUT, "--method", "ties", "--speed", "best"], "--speed means nothing to --method ties"),
            ([*A, *OUT, "--method", "ties", "--device", "cpu"], "--device means nothing to --method ties"),
            ([*A, *OUT, "--method", "ties", "--scenes", "2"], "--scenes means nothing to --method ties"),
            ([*A, *OUT, "--scenes", "-1"], "--scenes -1 cannot be drawn"),
            ([*A, *OUT, "--seed", "-1"], "--seed -1 is below 0: give 0 or more"),
            ([*A, *OUT, "--margin", "0.5"], "--margin means nothing to --method loraclr"),
            ([*A, *OUT, "--method", "reference", "--iterations", "-1"], "--iterations -1 is below 0"),
            ([*A, *OUT, "--method", "reference", "--distance", "far"], "invalid distance (flat or token) value: 'far'"),
            ([*A, *OUT, "--distance", "token"], "--distance means nothing to --method loraclr"),
            ([*A, *OUT, "--density", "0.3"], "--density means nothing to --method loraclr"),
            ([*A, *OUT, "--method", "sum", "--density", "0.3"], "--density means nothing to --method sum"),
            ([*A, *OUT, "--method", "ties", "--density", "0"], "invalid share above 0 and up to 1 value: '0'"),
            ([*A, *OUT, "--method", "concat", "--rank", "2"], "--rank means nothing to --method concat"),
            ([*A, "--weight", "0", "--text-weight", "0", *OUT], "a has weight 0"),
            ([*A, "--blocks", "OUT12=1", *OUT], "a.safetensors: 'OUT12' is no block"),
            ([*A, "--blocks", "1,x", *OUT, "--method", "sum"], "a.safetensors: 'x' is no block weight"),
            ([*A, "--blocks", "1,1", *OUT], "a.safetensors: 2 block weights were given, but SD 1.x takes 17 or 26"),
            ([*A, "--blocks", "0", *OUT], "a has weight 0 in every layer"),
            ([*A, *OUT, "--method", "factor-sum"], "invalid choice: 'factor-sum'"),
            (["--lora", "gone.safetensors", "--trigger", "x", *OUT], "gone.safetensors does not exist"),
            ([*A, *OUT[:2], "--output", "a.safetensors"], "a.safetensors is one of the files that are read"),
            ([*A, *OUT[:2], "--output", "a.safetensors", "--overwrite"], "is one of the files that are read"),
            ([*A, *OUT[:2], "--output", "model.safetensors", "--overwrite"], "is one of the files that are read"),
            ([*A, *OUT[:2], "--output", "b.safetensors"], "b.safetensors exists already"),
            ([*A, *OUT[:2], "--output", "no/where.safetensors"], "The folder no does not exist"),
            ([*A, *OUT[:2], "--output", "out.ckpt"], "must end in .safetensors"),
            ([*A, *OUT[2:], "--checkpoint", "gone.safetensors"], "The checkpoint gone.safetensors does not exist"),
            ([*A, *OUT[2:], "--checkpoint", "b.safetensors"], "b.safetensors is not a Stable Diffusion checkpoint"),
            ([*A, *OUT[:3]], "expected one argument"),
        ],
    )
    def test_arguments(self, here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
        assert words in refused(arguments, here, capsys)

    def test_truncated_lora(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (here / "cut.safetensors").write_bytes((here / "a.safetensors").read_bytes()[:-8])
        assert "cut.safetensors is cut off" in refused(
            ["--lora", "cut.safetensors", "--trigger", "x", *OUT], here, capsys
        )

    def test_foreign_lora(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (here / "text.safetensors").write_text("not a LoRA")
        assert "text.safetensors" in refused(["--lora", "text.safetensors", "--trigger", "x", *OUT], here, capsys)

    def test_checkpoint_as_lora(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sentence = refused(["--lora", "model.safetensors", "--trigger", "x", *OUT], here, capsys)
        assert "model.safetensors is a checkpoint, not a LoRA" in sentence

    def test_truncated_checkpoint(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (here / "cut.safetensors").write_bytes((here / "model.safetensors").read_bytes()[:-4])
        assert "The checkpoint cut.safetensors is cut off" in refused(
            [*A, *OUT[2:], "--checkpoint", "cut.safetensors"], here, capsys
        )

    def test_refiner(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        names = ("model.diffusion_model.out.2.weight", "conditioner.embedders.0.model.ln_final.weight")
        save_file({name: torch.zeros(1) for name in names}, here / "other.safetensors")
        assert "is SDXL's refiner" in refused([*A, *OUT[2:], "--checkpoint", "other.safetensors"], here, capsys)

    def test_folder_without_a_model(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (here / "folder").mkdir()
        assert "holds no model" in refused([*A, *OUT[2:], "--checkpoint", "folder"], here, capsys)

    def test_loras_of_two_families(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lora(here / "xl.safetensors", names=("lora_te2_text_model_encoder_layers_0_self_attn_q_proj",))
        sentence = refused([*A, "--lora", "xl.safetensors", "--trigger", "x", *OUT], here, capsys)
        assert "a is for SD1 and xl for SDXL" in sentence

    def test_no_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        assert "required: command" in capsys.readouterr().err


class TestRefusedByTheModel:
    """What only the loaded model shows, still before the merge begins."""

    @pytest.fixture(autouse=True)
    def _no_merge(self, host: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(merging, "merge", lambda *_: pytest.fail("the merge was begun"))

    def test_lora_of_another_shape(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lora(here / "wide.safetensors", width=6)
        sentence = refused([*A, "--lora", "wide.safetensors", "--trigger", "x", *OUT], here, capsys)
        assert "wide does not fit the loaded model" in sentence

    def test_checkpoint_that_cannot_be_loaded(self, here, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(path: Path, device: str | None) -> None:
            raise ValueError("model.safetensors cannot be loaded:\n  half of it\n  is missing")

        monkeypatch.setattr("loraclr.hosts.standalone.open_checkpoint", broken)
        assert "cannot be loaded: half of it is missing" in refused([*A, *OUT], here, capsys)

    def test_missing_package(self, here, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(path: Path, device: str | None) -> None:
            raise ImportError("The standalone host needs diffusers")

        monkeypatch.setattr("loraclr.hosts.standalone.open_checkpoint", missing)
        assert main(["merge", *A, *OUT]) == 1
        assert capsys.readouterr().err == "loraclr: The standalone host needs diffusers\n"


class TestMerge:
    @pytest.fixture(autouse=True)
    def _fast(self, host: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(merging, "merge", fake_merge)

    def test_says_what_was_written_and_how_to_use_it(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["merge", *A, "--lora", "b.safetensors", *OUT]) == 0
        out, err = capsys.readouterr()
        assert "Wrote out.safetensors: 2 LoRAs, rank 2" in out
        assert "in 1:01." in out
        assert "a: 75 % of its effect kept" in out
        assert "over 4 layers: 10 without a LoRA, 2 with the merged one; its negative term acts on 40 %" in out
        assert "Most memory in use: process 1.5 GB." in out
        assert out.endswith("Prompt: <lora:out:1> sks, zyk\n")
        assert err == "Polishing: 50 %, 0:02 left\nDrawing a picture for its card: 100 %\n"
        assert files.load(here / "out.safetensors").triggers() == "sks, zyk"

    def test_a_picture_for_its_card_unless_there_is_one(self, here: Path) -> None:
        """Two concepts side by side; a picture of the user's is left alone."""
        assert main(["merge", *A, "--lora", "b.safetensors", *OUT]) == 0
        with Image.open(here / "out.preview.png") as picture:
            assert picture.size == (16, 8) and picture.getpixel((12, 4)) == (255, 0, 0)
        (here / "mine.jpg").touch()
        for name, more in (("mine", []), ("none", ["--no-preview"])):
            out = ["--checkpoint", "model.safetensors", "--output", f"{name}.safetensors"]
            assert main(["merge", *A, *out, *more]) == 0
            assert not (here / f"{name}.preview.png").exists()

    @pytest.mark.parametrize(
        ("end", "words"),
        [
            (torch.cuda.OutOfMemoryError(), "the graphics card's memory is full."),
            (KeyboardInterrupt(), "it was cancelled."),
            (RuntimeError("not enough\nmemory"), "not enough memory"),
            (AssertionError(), "AssertionError"),
        ],
    )
    @pytest.mark.parametrize("part", ["drawn", "save"])
    def test_a_picture_that_fails_costs_no_merge(
        self, here: Path, capsys, monkeypatch: pytest.MonkeyPatch, part: str, end: BaseException, words: str
    ) -> None:
        """However it ends, and Ctrl-C, too: the LoRA is there before the picture is begun."""

        def fails(*_: object) -> None:
            assert files.load(here / "out.safetensors").triggers() == "sks"
            raise end

        monkeypatch.setattr(f"loraclr.preview.{part}", fails)
        assert main(["merge", *A, *OUT]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("Wrote out.safetensors")
        assert f"\nThere is no picture for its card: {words}\n" in out
        assert "Cancelled" not in err
        assert not (here / "out.preview.png").exists()

    def test_overwrite(self, here: Path) -> None:
        old = lora(here / "out.safetensors", width=6).read_bytes()
        assert main(["merge", *A, *OUT, "--overwrite"]) == 0
        assert (here / "out.safetensors").read_bytes() != old

    def test_dtype(self, here: Path) -> None:
        assert main(["merge", *A, *OUT, "--dtype", "fp32"]) == 0
        assert (here / "out.safetensors").stat().st_size > (here / "a.safetensors").stat().st_size

    @pytest.mark.parametrize("stop", [loraclr.Cancelled, KeyboardInterrupt])
    def test_cancelled(self, here, capsys, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
        def cancelled(*_: object) -> None:
            raise stop

        monkeypatch.setattr(merging, "merge", cancelled)
        before = sorted(here.iterdir())
        assert main(["merge", *A, *OUT]) == 130
        assert capsys.readouterr().err == "loraclr: Cancelled; nothing was written.\n"
        assert sorted(here.iterdir()) == before

    def test_a_full_graphics_card(self, here, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(merging, "merge", full)
        assert "The graphics card ran out of memory: end other programs" in refused([*A, *OUT], here, capsys)

    def test_output_that_appears_meanwhile_is_kept(self, here, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
        def slow(*arguments) -> loraclr.Merge:
            lora(here / "out.safetensors", width=6)
            return fake_merge(*arguments[:3], lambda *_: None)

        monkeypatch.setattr(merging, "merge", slow)
        assert main(["merge", *A, *OUT]) == 2
        assert "exists already" in capsys.readouterr().err
        assert files.load(here / "out.safetensors").layers[TEXT].up.shape == (6, 2)


class TestByWeightsAlone:
    """Methods that need only the files: no checkpoint, no trigger words."""

    @pytest.fixture(autouse=True)
    def _no_model(self, host: list[Path]):
        yield
        assert host == []

    def test_sum_of_two_files(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pair = ["--lora", "a.safetensors", "--weight", "0.5", "--lora", "b.safetensors"]
        assert main(["merge", *pair, "--output", "out.safetensors", "--method", "sum"]) == 0
        assert "Wrote out.safetensors: 2 LoRAs, rank 4" in capsys.readouterr().out
        merged = files.load(here / "out.safetensors")
        torch.testing.assert_close(merged.layers[UNET].delta(), torch.full((4, 4), 3.0))
        recipe = json.loads(merged.metadata["loraclr.recipe"])
        assert (recipe["method"], recipe["concepts"][0]["weight"], recipe["concepts"][0]["trigger"]) == ("sum", 0.5, "")
        sidecar = json.loads((here / "out.json").read_text())
        assert sidecar["activation text"] == "zyk"
        assert sidecar["notes"] == "Merged by sum from a, b (zyk)."

    @pytest.mark.parametrize("method", [m for m, what in METHODS.items() if what.offered and not what.needs_model])
    def test_every_method_writes_a_lora_of_the_rank_asked_for(self, here: Path, method: str) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in ("c", "d"):
            layers = {UNET: Layer(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator), 2.0)}
            files.save(here / f"{name}.safetensors", layers, {})
        rank = [] if method == "concat" else ["--rank", "1"]
        pair = ["--lora", "c.safetensors", "--lora", "d.safetensors"]
        assert main(["merge", *pair, "--output", "out.safetensors", "--method", method, *rank]) == 0
        layer = files.load(here / "out.safetensors").layers[UNET]
        assert layer.rank == (1 if rank else 4)
        assert layer.delta().abs().max() > 0.01

    @pytest.mark.parametrize(("method", "rank"), [("sum", "auto"), ("ties", "auto"), ("svd", "2"), ("ties", "2")])
    def test_what_a_rank_keeps_is_said_and_told(
        self, here: Path, capsys: pytest.CaptureFixture[str], method: str, rank: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in ("c", "d"):
            fades = torch.diag(torch.tensor([3.0, 1.0, 0.3, 0.1]))
            factors = torch.randn(9, 4, generator=generator) @ fades, torch.randn(4, 8, generator=generator)
            files.save(here / f"{name}.safetensors", {UNET: Layer(*factors, 4.0)}, {}, torch.float32)
        pair = ["--lora", "c.safetensors", "--lora", "d.safetensors"]
        how = ["--method", method, "--dtype", "fp32"]
        assert main(["merge", *pair, "--output", "out.safetensors", *how, "--rank", rank]) == 0
        said = capsys.readouterr().out
        assert main(["merge", *pair, "--output", "all.safetensors", *how, "--rank", "8"]) == 0
        merged, whole = (files.load(here / f"{name}.safetensors") for name in ("out", "all"))
        layer, delta = merged.layers[UNET], whole.layers[UNET].delta()
        share = 1 - float((delta - layer.delta()).square().sum() / delta.square().sum())
        told = json.loads(merged.metadata["loraclr.recipe"])["kept"]
        assert told == {UNET: pytest.approx(share, abs=1e-4)} and 0.5 < share < 0.9999
        share = f"{100 * share:.1f} %"
        assert f"The rank keeps {share} of a layer's change on average, {share} in the worst ({UNET})." in said
        energies = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
        assert layer.rank == (int((energies < 0.995).sum()) + 1 if rank == "auto" else 2)

    def test_plain_leaves_out_what_diffusers_refuses(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        layers = {
            UNET: Layer(torch.ones(4, 2), torch.ones(2, 4), 2.0, bias=torch.ones(4)),
            "lora_unet_conv_norm_out": Norm(torch.ones(4)),
            "odd": Layer(torch.ones(4, 2), torch.ones(2, 4), 2.0),
        }
        files.save(here / "c.safetensors", layers, {})
        how = ["merge", "--lora", "c.safetensors", "--method", "sum", "--output"]
        assert main([*how, "with.safetensors"]) == 0
        told = capsys.readouterr().out
        assert "diffusers does not load this file" in told and "--plain on the command line, leaves these" in told
        keys = [f"odd.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")]
        assert f"Keys of c that are not understood are left out, 3 in all ({', '.join(keys)})." in told
        recipe = json.loads(files.load(here / "with.safetensors").metadata["loraclr.recipe"])
        assert [concept["unused"] for concept in recipe["concepts"]] == [keys]
        assert main([*how, "without.safetensors", "--plain"]) == 0
        assert "The changes of 1 biases and 1 norm layers are left out." in capsys.readouterr().out
        plain = files.load(here / "without.safetensors")
        torch.testing.assert_close(plain.layers[UNET].delta(), torch.full((4, 4), 2.0), rtol=1e-3, atol=0)
        assert plain.layers.keys() == {UNET} and plain.layers[UNET].bias is None
        diffusers = pytest.importorskip("diffusers")
        diffusers.StableDiffusionPipeline.lora_state_dict(here / "without.safetensors")
        with pytest.raises(ValueError, match="lora_unet_conv_norm_out"):
            diffusers.StableDiffusionPipeline.lora_state_dict(here / "with.safetensors")
        files.save(here / "norms.safetensors", {"lora_unet_conv_norm_out": Norm(torch.ones(4))}, {})
        assert main(["merge", "--lora", "norms.safetensors", *how[3:], "x.safetensors", "--plain"]) == 2
        assert "Only norm layers are changed" in capsys.readouterr().err
        assert not list(here.glob("x.*"))

    def test_blocks(self, here: Path) -> None:
        ones = ",".join(["0", *["2"] * 16])
        assert main(["merge", *A, "--blocks", ones, "--output", "out.safetensors", "--method", "sum"]) == 0
        merged = files.load(here / "out.safetensors")
        assert set(merged.layers) == {UNET}  # the text encoder's weight is 0
        torch.testing.assert_close(merged.layers[UNET].delta(), torch.full((4, 4), 4.0))

    def test_a_recipe_makes_the_same_file_again(self, here: Path) -> None:
        pair = ["--lora", "a.safetensors", "--weight", "-0.5", "--blocks", "IN01=2", "--lora", "b.safetensors"]
        assert main(["merge", *pair, "--output", "out.safetensors", "--method", "dare-ties", "--seed", "5"]) == 0
        assert main(["merge", "--recipe", "out.safetensors", "--output", "again.safetensors"]) == 0
        first, again = (files.load(here / f"{name}.safetensors") for name in ("out", "again"))
        assert first.metadata["sshs_model_hash"] == again.metadata["sshs_model_hash"]
        recipes = [json.loads(lora.metadata["loraclr.recipe"]) for lora in (first, again)]
        assert recipes[0] == recipes[1]

    def test_a_recipe_finds_files_in_folders_and_tells_two_of_one_name_apart(self, here: Path) -> None:
        for place, name in (("x", "a"), ("y/z", "b")):
            (here / place).mkdir(parents=True)
            (here / f"{name}.safetensors").rename(here / place / "same.safetensors")
        pair = ["--lora", "x/same.safetensors", "--lora", "y/z/same.safetensors", "--weight", "0.5"]
        assert main(["merge", "--method", "sum", *pair, "--output", "out.safetensors"]) == 0
        assert main(["merge", "--recipe", "out.safetensors", "--output", "again.safetensors"]) == 0
        first, again = (load_file(here / f"{name}.safetensors") for name in ("out", "again"))
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
        merged = files.load(here / "again.safetensors")
        assert merged.metadata["modelspec.merged_from"] == "same, same 2"

    def test_a_recipe_finds_files_with_signs_of_patterns_in_their_names(self, here: Path) -> None:
        (here / "deep").mkdir()
        (here / "a.safetensors").rename(here / "deep" / "[SD15] a.safetensors")
        pair = ["--lora", "deep/[SD15] a.safetensors", "--lora", "b.safetensors"]
        assert main(["merge", "--method", "sum", *pair, "--output", "out.safetensors"]) == 0
        assert main(["merge", "--recipe", "out.safetensors", "--output", "again.safetensors"]) == 0

    def test_a_recipe_says_no_places(self, here: Path, capsys) -> None:
        """It may be another's: nothing is read but in the folders that are looked into."""
        pair = ["--lora", "a.safetensors", "--lora", "b.safetensors", "--method", "sum"]
        assert main(["merge", *pair, "--output", "out.safetensors"]) == 0
        recipe = json.loads(files.load(here / "out.safetensors").metadata["loraclr.recipe"])
        lora(here.parent / f"{here.name} c.safetensors")
        for place in (f"{here.parent}/", "../"):
            recipe["concepts"][1] |= {"file": f"{place}{here.name} c.safetensors", "hash": ""}
            files.annotate("out.safetensors", {"loraclr.recipe": json.dumps(recipe)})
            capsys.readouterr()
            assert main(["merge", "--recipe", "out.safetensors", "--output", "again.safetensors"]) == 2
            assert f"{here.name} c.safetensors, which the recipe names, is not in" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--recipe", "out.safetensors", *A], "--recipe says which LoRAs to merge and how: leave --lora out"),
            (["--recipe", "out.safetensors", "--scenes", "0"], "and how: leave --scenes out"),
            (["--recipe", "out.safetensors", "--margin", "1"], "and how: leave --margin out"),
            (["--recipe", "out.safetensors", "--seed", "1"], "leave --seed out"),
            (["--recipe", "a.safetensors"], "a.safetensors holds no recipe"),
            (["--recipe", "gone.safetensors"], "gone.safetensors does not exist"),
            (["--recipe", "changed.safetensors"], "b.safetensors is not the file that the recipe was made with"),
            (["--recipe", "lost.safetensors"], "c.safetensors, which the recipe names, is not in"),
            (["--recipe", "newer.safetensors"], "The recipe in newer.safetensors cannot be read"),
        ],
    )
    def test_recipes_that_cannot_be_followed(self, here: Path, capsys, arguments: list[str], words: str) -> None:
        pair = ["--lora", "a.safetensors", "--lora", "b.safetensors", "--method", "sum"]
        assert main(["merge", *pair, "--output", "out.safetensors"]) == 0
        recipe = json.loads(files.load(here / "out.safetensors").metadata["loraclr.recipe"])
        entry = recipe["concepts"][1]
        told = {
            "changed": recipe | {"concepts": [entry | {"hash": "0"}]},
            "lost": recipe | {"concepts": [entry | {"file": "c.safetensors"}]},
            "newer": recipe | {"settings": {"colour": 1}},
        }
        for name, changed in told.items():
            layers = files.load(here / "a.safetensors").layers
            files.save(here / f"{name}.safetensors", layers, {"loraclr.recipe": json.dumps(changed)})
        capsys.readouterr()
        assert words in refused([*arguments, "--output", "again.safetensors"], here, capsys)

    def test_a_recipe_does_not_replace_what_it_merges(self, here: Path, capsys) -> None:
        pair = ["--lora", "a.safetensors", "--lora", "b.safetensors", "--method", "sum"]
        assert main(["merge", *pair, "--output", "out.safetensors"]) == 0
        before = (here / "a.safetensors").read_bytes()
        capsys.readouterr()
        again = ["merge", "--recipe", "out.safetensors", "--overwrite", "--output"]
        assert main([*again, "a.safetensors"]) == 2
        assert "The output a.safetensors is one of the files that are read" in capsys.readouterr().err
        assert (here / "a.safetensors").read_bytes() == before
        assert main([*again, "model.safetensors"]) == 0

    def test_dora_needs_a_checkpoint(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        dora(here / "dora.safetensors")
        sentence = refused(["--lora", "dora.safetensors", *OUT[2:], "--method", "sum"], here, capsys)
        assert "What dora changes depends on the model" in sentence and "give the checkpoint" in sentence

    def test_loras_of_two_shapes_are_refused(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        lora(here / "wide.safetensors", width=6)
        sentence = refused([*A, "--lora", "wide.safetensors", *OUT[2:], "--method", "ties"], here, capsys)
        assert "wide does not fit a: its lora_te" in sentence
        assert "6×6" in sentence

    def test_orthogonal_says_when_it_is_not_possible(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sentence = refused(
            [*A, "--lora", "b.safetensors", *OUT[2:], "--method", "orthogonal"], here, capsys, progress=True
        )
        assert "cannot be made orthogonal" in sentence


def test_a_merge_by_weights_takes_base_weights_from_a_checkpoint(here: Path, host: list[Path]) -> None:
    dora(here / "dora.safetensors")
    assert main(["merge", "--lora", "dora.safetensors", *OUT, "--method", "sum", "--dtype", "fp32"]) == 0
    assert host == [Path("model.safetensors")]
    base = torch.full((4, 4), 0.5)
    changed = base + 2.0  # of ones(4, 2) @ ones(2, 4)
    expected = changed * 3 / changed.norm(dim=1, keepdim=True) - base
    torch.testing.assert_close(files.load(here / "out.safetensors").layers[UNET].delta(), expected)


def test_a_recipe_makes_the_same_merge_for_a_model_again(here: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole merge on a toy: with its own checkpoint the same file, with another one that is said."""
    models = {"model.safetensors": Checkpoint("model.safetensors", "1"), "other.safetensors": Checkpoint("other", "2")}
    (here / "other.safetensors").write_bytes((here / "model.safetensors").read_bytes())

    def toy(path: Path, _: str | None) -> ToyHost:
        opened = ToyHost()
        opened.checkpoint = models[path.name]
        return opened

    monkeypatch.setattr("loraclr.hosts.standalone.open_checkpoint", toy)
    for seed, name in enumerate(("a", "b")):
        files.save(here / f"{name}.safetensors", toy_lora(ToyHost(), name, seed).layers, {}, overwrite=True)
    each = ["--lora", "a.safetensors", "--trigger", "sks", "--weight", "1.5", "--lora", "b.safetensors"]
    each += ["--trigger", "zyk", "--weight", "-0.5", "--text-weight", "0.3", "--blocks", "M00=0.5"]
    how = ["--speed", "closed", "--rank", "3", "--seed", "4", "--dtype", "bf16"]
    assert main(["merge", "--checkpoint", "model.safetensors", *each, *how, "--output", "out.safetensors"]) == 0
    again = ["merge", "--recipe", "out.safetensors", "--dtype", "bf16"]
    assert main([*again, "--checkpoint", "model.safetensors", "--output", "again.safetensors"]) == 0
    assert "The recipe was made with" not in capsys.readouterr().out
    first, second = (files.load(here / name).metadata for name in ("out.safetensors", "again.safetensors"))
    assert first["sshs_model_hash"] == second["sshs_model_hash"]
    told = [json.loads(metadata["loraclr.recipe"]) for metadata in (first, second)]
    assert told[0] == told[1] and told[0]["checkpoint"] == {"name": "model.safetensors", "hash": "1"}
    assert main([*again, "--checkpoint", "other.safetensors", "--output", "third.safetensors"]) == 0
    assert "The recipe was made with model.safetensors; this merge is for other." in capsys.readouterr().out
    sentence = refused([*again[1:], "--output", "fourth.safetensors"], here, capsys)
    assert "looks at the model: give its --checkpoint (model.safetensors)" in sentence


def test_options_belong_to_the_lora_before_them() -> None:
    arguments = ["merge", "--checkpoint", "c", "--lora", "a", "--trigger", "x", "--kind", "style", "--lora", "b"]
    arguments += ["--weight", "0.8", "--text-weight", "0.5", "--lora", "c", "--output", "o"]
    first, second, third = parser().parse_args(arguments).entries
    assert first == command.Entry(Path("a"), "x", None, None, "style")
    assert second == command.Entry(Path("b"), None, 0.8, 0.5, None)
    assert third == command.Entry(Path("c"))


def test_concept_takes_what_the_file_says(here: Path) -> None:
    concept = command.concept_of(command.Entry(here / "b.safetensors", weight=-0.5))
    assert (concept.trigger, concept.weight, concept.text_weight, concept.kind) == ("zyk", -0.5, None, "subject")
    assert concept.blocks is None


def test_concept_takes_weights_of_unet_text_encoder_and_blocks(here: Path) -> None:
    concept = command.concept_of(command.Entry(here / "b.safetensors", None, 0.0, 2.5, blocks="BASE=-2"))
    assert (concept.strength(UNET), concept.strength(TEXT)) == (0, -5)
    concept = command.concept_of(command.Entry(here / "b.safetensors", None, -3.0, blocks="IN01=0.5"))
    assert (concept.strength(UNET), concept.strength(TEXT)) == (-1.5, -3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concepts", "0"], "--concepts 0 cannot be merged"),
        (["--concepts", "2", "99"], "--concepts 99 cannot be merged"),
        (["--pictures", "0"], "--pictures 0 draws nothing"),
        (["--output", "taken"], "The folder taken cannot be made"),
    ],
)
def test_demo_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[str], words: str
) -> None:
    pytest.importorskip("diffusers")
    import miniature.checkpoint  # before its place is changed, which it looks up once

    (tmp_path / "taken").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(miniature, "CHECKPOINT", tmp_path / "taken")
    assert main(["demo", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    def test_terminal_rewrites_one_line(self) -> None:
        stream = Terminal()
        with Line(stream) as line:
            line("Looking", 0.0, None)
            line("Polishing", 0.5, 65.0)
            line("Done", 1.0, 0.0)
        assert stream.getvalue() == "\r\x1b[KLooking: 0 %\r\x1b[KPolishing: 50 %, 1:05 left\r\x1b[KDone: 100 %\n"

    def test_terminal_ends_its_line_when_stopped(self) -> None:
        def interrupted() -> None:
            with Line(stream) as line:
                line("Looking", 0.0, None)
                raise KeyboardInterrupt

        stream = Terminal()
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert stream.getvalue().endswith("Looking: 0 %\n")

    def test_elsewhere_plain_lines_for_stages_and_tenths(self) -> None:
        stream = io.StringIO()
        with Line(stream) as line:
            for part in range(8):
                line(f"Polishing, step {part} of 8", part / 16, None)
            line("Done", 1.0, 0.0)
        assert stream.getvalue().splitlines() == [
            "Polishing, step 0 of 8: 0 %", "Polishing, step 2 of 8: 12 %", "Polishing, step 4 of 8: 25 %",
            "Polishing, step 6 of 8: 38 %", "Done: 100 %",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("seconds", "words"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (-1, "0:00")]
    )
    def test_clock(self, seconds: float, words: str) -> None:
        assert clock(seconds) == words

    def test_sentence_without_an_estimate(self) -> None:
        assert sentence("Looking", 0.123, None) == "Looking: 12 %"


def test_output_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "os", SimpleNamespace(access=lambda *_: False, W_OK=2))
    with pytest.raises(Refused, match="cannot be written to"):
        checks.check_output(tmp_path / "out.safetensors", [], False)
