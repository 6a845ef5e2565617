"""The form's settings: how to merge, with the defaults of the core and a sentence on each."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

import gradio as gr

from loraclr import prompts
from loraclr.factor import Rank
from loraclr.methods import METHODS
from loraclr.objective import Distance
from loraclr.plan import Settings
from loraclr.webui.components import FormRow
from loraclr.webui.language import say

SPEEDS = ("Fast", "Balanced", "Best")
RANKS = ("exact", "auto", "4", "8", "16", "32", "64", "128", "256")
USUAL = Settings()
#: What the form's sliders allow, and the API.
LIMITS = {
    "neutral": (0, 1), "scenes": (0, 8), "steps": (1, 50), "size": (64, 1024), "guidance": (1, 15),
    "margin": (0, 10), "penalty": (0, 1), "iterations": (0, 5000), "rate": (0, 1),
}  # fmt: skip
#: The components in the order of `Form.fields`, which is that of the arguments of `read`.
FIELDS = (
    "speed", "rank", "method", "draw", "against_sum", "neutral", "kept", "closed", "scenes", "steps", "size",
    "guidance", "density", "ridge", "seed", "margin", "penalty", "iterations", "rate", "distance", "plain",
    "separate",
)  # fmt: skip


class Form:
    """The components, in the order in which `read` takes their values."""

    def __init__(self) -> None:
        self.speed = gr.Radio(
            SPEEDS,
            value="Fast",
            label="Speed",
            info="Fast suits most merges; of many LoRAs, twelve for example, Balanced keeps clearly more of each. "
            "It takes several times as long, and Best longer still.",
            elem_id="loraclr_speed",
        )
        with FormRow(elem_id="loraclr_basics"):
            self.rank = gr.Dropdown(
                RANKS,
                value="exact",
                allow_custom_value=True,
                label="Largest rank of the merged LoRA",
                info="exact: the sum of the LoRAs' ranks. auto: what keeps 99.5 % of a layer. Less: a smaller file.",
                elem_id="loraclr_rank",
            )
            self.method = gr.Dropdown(
                [name for name, method in METHODS.items() if method.offered],
                value="loraclr",
                label="Method of merging",
                info="loraclr is the one that this tab is for; the others merge as other tools do.",
                elem_id="loraclr_method",
            )
        about = gr.HTML(METHODS["loraclr"].text, elem_id="loraclr_method_about")
        self.method.change(
            lambda name: METHODS[name].text, [self.method], [about], show_progress=False, queue=False
        )  # fmt: skip
        with FormRow(elem_id="loraclr_drawing"):
            self.draw = gr.Checkbox(True, label="Draw pictures to compare", elem_id="loraclr_draw")
            self.against_sum = gr.Checkbox(False, label="Draw the weighted sum, too", elem_id="loraclr_against_sum")
        self.unchanged = _unchanged()
        self.advanced = _advanced()

    @property
    def fields(self) -> list[Any]:
        return [self.speed, self.rank, self.method, self.draw, self.against_sum, *self.unchanged, *self.advanced]


def _unchanged() -> list[Any]:
    """What the merged LoRA must leave as it is."""
    with gr.Accordion("What must not change", open=False, elem_id="loraclr_unchanged"):
        neutral = gr.Slider(
            *LIMITS["neutral"], value=USUAL.neutral, step=0.05, label="Protection of everything else",
            elem_id="loraclr_neutral",
            info="How much the merged LoRA must leave prompts without any trigger word as they are.",
        )  # fmt: skip
        kept = gr.Textbox(
            "\n".join(prompts.NEUTRAL), lines=4, label="Prompts to keep as they are", elem_id="loraclr_neutral_prompts",
            info="One a line, without any trigger word: what the merged LoRA must not change.",
        )  # fmt: skip
    return [neutral, kept]


def _advanced() -> list[Any]:
    """What few need to touch."""
    with gr.Accordion("Advanced", open=False, elem_id="loraclr_advanced"):
        closed = gr.Checkbox(
            USUAL.speed == "closed",
            label="Closed form only: quickest, without the polish that brings the concepts to full strength",
            elem_id="loraclr_closed",
        )
        with FormRow():
            steps = gr.Slider(
                *LIMITS["steps"], value=USUAL.steps, step=1, label="Sampling steps looked at", elem_id="loraclr_steps",
                info="Denoising steps of each picture that the LoRAs are watched in; the paper's code has 20.",
            )  # fmt: skip
            size = gr.Slider(
                0, 1024, value=USUAL.size or 0, step=64, label="Picture size looked at", elem_id="loraclr_size",
                info="Width and height in pixels; 0: the checkpoint's own. Smaller needs less memory. The paper's code "
                "has 512.",
            )  # fmt: skip
        with FormRow():
            guidance = gr.Slider(
                *LIMITS["guidance"], value=USUAL.guidance, step=0.5, label="CFG scale looked at",
                elem_id="loraclr_guidance", info="Of the same pictures; the paper's code has 1, no guidance.",
            )  # fmt: skip
            scenes = gr.Slider(
                *LIMITS["scenes"], value=USUAL.scenes, step=1, label="Scenes of two to learn from",
                elem_id="loraclr_scenes",
                info="For each LoRA, pictures of two subjects, each half drawn by its own LoRA, and of subjects in "
                "styles; 0: none, as in the paper.",
            )  # fmt: skip
        with FormRow():
            ridge = gr.Number(
                USUAL.ridge, label="Ridge λ of the closed form", elem_id="loraclr_ridge",
                info="Larger is more careful. The paper has no closed form.",
            )  # fmt: skip
            seed = gr.Number(
                USUAL.seed, label="Seed of the merge", precision=0, elem_id="loraclr_seed",
                info="The same seed and settings give the same file. -1 is a random one, which the recipe keeps.",
            )  # fmt: skip
        loop = _loop()
        density = gr.Slider(
            0.05, 1, value=0.5, step=0.05, label="Density", elem_id="loraclr_density",
            info="Share of the weights that ties, dare and magnitude-prune keep; others have no use for it.",
        )  # fmt: skip
        with FormRow():
            plain = gr.Checkbox(
                False, label="Plain file", elem_id="loraclr_plain",
                info="Leaves changes of biases and norm layers out, so that every program loads all of the file.",
            )  # fmt: skip
            separate = gr.Checkbox(
                False, label="Embeddings as files of their own", elem_id="loraclr_separate",
                info="In a folder beside the LoRA, not in it; Forge, ComfyUI and others read them only so.",
            )  # fmt: skip
    return [closed, scenes, steps, size, guidance, density, ridge, seed, *loop, plain, separate]


def _loop() -> list[Any]:
    """What the paper's own loop, the method reference, is told; the other methods have no use for it."""
    with FormRow():
        margin = gr.Number(
            USUAL.margin, label="Margin m of reference", elem_id="loraclr_margin",
            info="How far outputs of different concepts are pushed apart; the paper has 0.5.",
        )  # fmt: skip
        penalty = gr.Number(
            USUAL.penalty, label="Penalty λ of reference", elem_id="loraclr_penalty",
            info="How much large changes cost; the paper has 0.001.",
        )  # fmt: skip
    with FormRow():
        iterations = gr.Number(
            USUAL.iterations, label="Iterations of reference", precision=0, elem_id="loraclr_iterations",
            info="Steps for each layer; the paper's code has 50.",
        )  # fmt: skip
        rate = gr.Number(
            USUAL.rate, label="Learning rate of reference", elem_id="loraclr_rate",
            info="The paper has 0.0001; with it 50 steps move little.",
        )  # fmt: skip
    distance = gr.Radio(
        get_args(Distance), value=USUAL.distance, label="Distance of reference", elem_id="loraclr_distance",
        info="flat: of a concept's outputs as one long vector, as in the paper's code. token: of each token alone.",
    )  # fmt: skip
    return [margin, penalty, iterations, rate, distance]


def read(
    speed: str,
    rank: Any,
    method: str,
    draw: bool,
    against_sum: bool,
    neutral: float,
    kept: str,
    closed: bool,
    scenes: float,
    steps: float,
    size: float,
    guidance: float,
    density: float,
    ridge: float | None,
    seed: float | None,
    margin: float | None,
    penalty: float | None,
    iterations: float | None,
    rate: float | None,
    distance: str,
    plain: bool,
    separate: bool,
) -> dict[str, Any]:
    """What `job.Order` takes of the form. Raises ValueError, one sentence."""
    if ridge is None or ridge <= 0:
        raise ValueError(say("The ridge λ must be a number above 0, 0.001 for example."))
    if method not in METHODS:
        raise ValueError(f"There is no method {method}.")
    lines = lines_of(kept)
    if not lines:
        raise ValueError(say("There are no prompts to keep as they are: write one a line under What must not change."))
    loop = {"margin": margin, "penalty": penalty, "iterations": iterations, "rate": rate}
    for name, value in loop.items():
        if value is None or not LIMITS[name][0] <= value <= LIMITS[name][1]:
            least, most = LIMITS[name]
            raise ValueError(
                say(
                    "The {name} of reference must be a number from {least} to {most}.",
                    name=name,
                    least=least,
                    most=most,
                )
            )
    settings = Settings(
        speed="closed" if closed else speed.lower(),
        rank=rank_of(rank),
        neutral=neutral,
        scenes=int(scenes),
        ridge=ridge,
        steps=int(steps),
        guidance=guidance,
        size=side_of(size),
        neutral_prompts=lines,
        seed=seed_of(seed),
        distance=distance,
        **{**loop, "iterations": int(iterations)},
    )
    return {
        "settings": settings, "method": method, "density": density, "draw": draw, "against_sum": against_sum,
        "plain": plain, "separate": separate,
    }  # fmt: skip


def written(method: str, told: Mapping[str, Any]) -> list[Any]:
    """The form's values for a recipe's settings, in the order of `FIELDS`; what it does not tell is left as usual."""
    usual = asdict(USUAL)
    known = {**usual, **{name: value for name, value in told.items() if name in usual}}
    speed, rank = known["speed"], known["rank"]
    values = {
        **known,
        "speed": speed.title() if speed.title() in SPEEDS else SPEEDS[0],
        "rank": "exact" if rank is None else str(rank),
        "draw": True,
        "plain": False,
        "separate": False,
        "against_sum": False,
        "method": method if method in METHODS else "loraclr",
        "distance": known["distance"] if known["distance"] in get_args(Distance) else USUAL.distance,
        "closed": speed == "closed",
        "size": known["size"] or 0,
        "density": told.get("density", 0.5),
        "kept": "\n".join(known["neutral_prompts"]),
    }
    return [values[name] for name in FIELDS]


def rank_of(chosen: Any) -> Rank:
    """What is written in the rank's field. Raises ValueError, one sentence."""
    word = str(chosen if chosen or chosen == 0 else "exact").strip().lower()  # 0 is no empty field
    if word in ("exact", "auto"):
        return None if word == "exact" else "auto"
    if not word.isdecimal() or int(word) < 1:
        raise ValueError(
            say('The largest rank is "{rank}": choose exact, auto or a whole number above 0.', rank=chosen)
        )
    return int(word)


def side_of(size: float | None) -> int | None:
    """The picture size that is written; 0 or none: the checkpoint's own. Raises ValueError, one sentence."""
    if size and size % 64:  # the UNet halves a picture's latents, of an eighth of its side, three times
        raise ValueError(say("The picture size is {size}: choose a multiple of 64.", size=size))
    return int(size) if size else None


def seed_of(number: float | None) -> int:
    """The seed that is written; below 0 a random one, as the webui's own fields have it."""
    seed = int(number or 0)
    return seed if seed >= 0 else random.randrange(2**31)


def lines_of(text: str | None) -> tuple[str, ...]:
    """The lines of a field that are not empty."""
    return tuple(line.strip() for line in (text or "").splitlines() if line.strip())
