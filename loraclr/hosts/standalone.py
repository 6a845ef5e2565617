"""The standalone host: a checkpoint file run by diffusers, without any webui."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loraclr.embeddings import Embeddings
from loraclr.files import file_hash
from loraclr.hosts import Checkpoint, Context, Record
from loraclr.hosts.recompute import LARGE, recomputed
from loraclr.hosts.words import spoken
from loraclr.keys import Family, kohya_name


class Standalone:
    """A Stable Diffusion 1.x, 2.x or XL pipeline of diffusers as a host (see `loraclr.hosts.Host`)."""

    def __init__(self, pipeline, path: Path | None = None) -> None:
        self.pipeline, self.path = pipeline, path
        self.pipeline.set_progress_bar_config(disable=True)
        self.family = _family(pipeline)
        self.device = pipeline.device
        self.alphas = pipeline.scheduler.alphas_cumprod.float()
        self.target = "v" if pipeline.scheduler.config.prediction_type == "v_prediction" else "epsilon"
        self.size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        parts = {name: getattr(pipeline, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
        self._parts = {name: part for name, part in parts.items() if part is not None}
        for module in (*self._parts.values(), pipeline.vae):
            module.requires_grad_(False).eval()
        if self.size >= LARGE:
            pipeline.vae.enable_slicing()  # a batch is decoded picture by picture: the decoder needs most memory

    @cached_property
    def checkpoint(self) -> Checkpoint:
        if self.path is None:
            return Checkpoint(type(self.pipeline).__name__)
        return Checkpoint(self.path.name, file_hash(self.path) if self.path.is_file() else "")

    def layers(self) -> dict[str, nn.Module]:
        return {
            kohya_name(part, path, self.family): module
            for part, root in self._parts.items()
            for path, module in root.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm)
        }

    def encode(self, prompts: list[str]) -> Context:
        encoded = self.pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.family != "sdxl":
            return Context(encoded[0])
        tokens, _, pooled, _ = encoded
        if self.pipeline.config.force_zeros_for_empty_prompt:
            asked = torch.tensor([prompt != "" for prompt in prompts], device=tokens.device)
            tokens, pooled = tokens * asked[:, None, None], pooled * asked[:, None]
        return Context(tokens, pooled)

    def predict(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        unet, added = self.pipeline.unet, None
        x, tokens = x.to(unet.dtype), context.tokens.to(unet.dtype)
        if context.pooled is not None:
            height, width = (self.pipeline.vae_scale_factor * side for side in x.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]]).to(x).expand(x.shape[0], -1)
            added = {"text_embeds": context.pooled.to(x), "time_ids": sizes}
        return unet(x, t, encoder_hidden_states=tokens, added_cond_kwargs=added).sample.float()

    @torch.no_grad()
    def sample(
        self, prompts: list[str], seed: int, steps: int, guidance: float, width: int, height: int
    ) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed + place) for place in range(len(prompts))]
        result = self.pipeline(
            prompt=prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            generator=generators,
        )
        return result.images

    @contextmanager
    def watch(self, record: Record) -> Iterator[None]:
        def after(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
            x = args[0] if args else kwargs["sample"]
            t = args[1] if len(args) > 1 else kwargs["timestep"]
            prediction = output[0] if isinstance(output, tuple) else output.sample
            times = torch.as_tensor(t, device=x.device).reshape(-1).expand(x.shape[0])
            pooled = (kwargs.get("added_cond_kwargs") or {}).get("text_embeds")
            record(x, times, Context(kwargs["encoder_hidden_states"], pooled), prediction)

        handle = self.pipeline.unet.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def words(self, embeddings: Embeddings) -> Iterator[None]:
        pipeline = self.pipeline
        with ExitStack() as stack:
            for suffix, encoders in (("", ("clip_l", "clip_h")), ("_2", ("clip_g",))):
                own = {word: each[one] for word, each in embeddings.items() for one in encoders if one in each}
                tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
                if own and tokenizer is not None:
                    encoder = getattr(pipeline, f"text_encoder{suffix}")
                    stack.callback(setattr, pipeline, f"tokenizer{suffix}", tokenizer)
                    setattr(pipeline, f"tokenizer{suffix}", stack.enter_context(spoken(tokenizer, encoder, own)))
            yield

    @contextmanager
    def session(self) -> Iterator[None]:
        with recomputed(self.pipeline.unet) if self.size >= LARGE else nullcontext():
            yield


def _family(pipeline) -> Family:
    """By its build alone, so that a model of another width is of the family that it is built as."""
    if getattr(pipeline, "text_encoder_2", None) is not None:
        return "sdxl"
    return "sd2" if pipeline.unet.config.use_linear_projection else "sd1"


def open_checkpoint(path: str | Path, device: str | torch.device | None = None) -> Standalone:
    """Load a Stable Diffusion 1.x, 2.x or XL model: a checkpoint in the original layout, or a folder of diffusers.

    Diffusers tells the family from the file, and gets its configuration and tokenizer from the hub or the local cache.
    A yaml of the same name beside a checkpoint of SD 1.x or 2.x, as the webui reads it, is believed if it says that the
    model predicts v. One that names a folder with the tokenizer is all that an SD 1.x model is built from.

    Raises:
        ValueError: the file is missing or is no such checkpoint.
        ImportError: diffusers or transformers is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"The checkpoint {path} does not exist; give the path of a .safetensors file.")
    try:
        from diffusers import DDIMScheduler
    except ImportError as error:
        raise ImportError("The standalone host needs diffusers: pip install 'sd-webui-loraclr[standalone]'") from error

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        pipeline = _pipeline(path, device, dtype)
    except SafetensorError as error:
        raise ValueError(
            f"The checkpoint {path.name} is cut off or is not a .safetensors file; get it again, or convert it."
        ) from error
    except (KeyError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be loaded as a Stable Diffusion checkpoint: {error}") from error
    if type(pipeline).__name__ not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise ValueError(
            f"{path.name} is a {type(pipeline).__name__}; only Stable Diffusion 1.x, 2.x and XL can be merged for."
        )
    if pipeline.unet.config.in_channels != 4 or pipeline.text_encoder is None:
        raise ValueError(f"{path.name} is an inpainting, editing or refiner model; choose an ordinary one.")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return Standalone(pipeline, path)


def _pipeline(path: Path, device: torch.device, dtype: torch.dtype):
    """The pipeline on its device; read in the precision that it is to have, which halves what the CPU needs for it."""
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    if path.is_dir():
        return DiffusionPipeline.from_pretrained(path, local_files_only=True, torch_dtype=dtype).to(device)
    described = _described(path.with_suffix(".yaml"))
    # Usual yamls leave the tokenizer out, or name it as the hub does.
    clip = described.get("cond_stage_config", {}).get("params", {}).get("version")
    if clip and (path.parent / clip).is_dir():
        return _from_yaml(path, described, path.parent / clip).to(device, dtype)
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    if not any(key.startswith("conditioner.") for key in keys):
        pipeline = StableDiffusionPipeline.from_single_file(str(path), safety_checker=None, torch_dtype=dtype)
        pipeline.to(device)
        if described.get("parameterization") == "v":
            pipeline.scheduler.register_to_config(prediction_type="v_prediction")
        elif _family(pipeline) == "sd2":  # both kinds of SD 2.x look alike
            predicts = "epsilon" if predicts_noise(pipeline.unet) else "v_prediction"
            pipeline.scheduler.register_to_config(prediction_type=predicts)
        return pipeline
    pipeline = StableDiffusionXLPipeline.from_single_file(str(path), torch_dtype=dtype).to(device)
    if "v_pred" in keys:  # how such checkpoints of SDXL mark themselves
        pipeline.scheduler.register_to_config(
            prediction_type="v_prediction", rescale_betas_zero_snr="ztsnr" in keys, timestep_spacing="trailing"
        )
    return pipeline


@torch.no_grad()
def predicts_noise(unet) -> bool:
    """Whether a UNet of diffusers predicts ε, not v: z_t of the last timestep is nearly ε, which it then gives back."""
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(unet.device, unet.dtype)
    prediction = unet(x, 999, encoder_hidden_states=torch.zeros(1, 77, width).to(x)).sample
    return torch.cosine_similarity(prediction.flatten(), x.flatten(), dim=0).item() > 0.5


def _described(yaml_path: Path) -> dict:
    """What a yaml in the original layout says of the model, its `model.params`; nothing if there is no such file."""
    if not yaml_path.exists():
        return {}
    import yaml

    try:
        return yaml.safe_load(yaml_path.read_text(encoding="utf-8"))["model"]["params"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{yaml_path.name} beside it describes no model; correct it or move it away") from error


def _from_yaml(path: Path, params: dict, clip: Path):
    """A pipeline built from the original layout's own configuration, by diffusers' converters; `clip`: tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        create_unet_diffusers_config_from_ldm,
        create_vae_diffusers_config_from_ldm,
    )
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    config = {"model": {"params": params}}
    tensors = {name: value.float() for name, value in load_file(path).items()}

    unet_config = create_unet_diffusers_config_from_ldm(config, tensors)
    unet_config["sample_size"] = params["image_size"]
    unet = UNet2DConditionModel.from_config(unet_config)
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(tensors), unet_config))
    vae_config = create_vae_diffusers_config_from_ldm(config, tensors)
    vae = AutoencoderKL.from_config(vae_config)
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(tensors), vae_config))

    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(clip))
    prefix = "cond_stage_model.transformer.text_model."
    flat = "text_model." if any(name.startswith("text_model.") for name in text_encoder.state_dict()) else ""
    text = {flat + name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    text_encoder.load_state_dict(text, strict=False)

    scheduler = DDIMScheduler(
        beta_start=params["linear_start"],
        beta_end=params["linear_end"],
        num_train_timesteps=params["timesteps"],
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if params.get("parameterization") == "v" else "epsilon",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(str(clip)),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
