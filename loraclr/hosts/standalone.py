"""The standalone host: a checkpoint file run by diffusers, without any webui."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from loraclr.embeddings import Embeddings
from loraclr.hosts import Record
from loraclr.hosts.words import spoken
from loraclr.keys import kohya_name


class Standalone:
    """A Stable Diffusion 1.x pipeline of diffusers as a host (see `loraclr.hosts.Host`)."""

    family = "sd1"

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.device = pipeline.device
        self.alphas = pipeline.scheduler.alphas_cumprod.float()
        self.size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
            module.requires_grad_(False).eval()

    def layers(self) -> dict[str, nn.Module]:
        found = {}
        for part, root in (("unet", self.pipeline.unet), ("text_encoder", self.pipeline.text_encoder)):
            for path, module in root.named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
                    found[kohya_name(part, path, self.family)] = module
        return found

    def encode(self, prompts: list[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        length = tokenizer.model_max_length
        ids = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.pipeline.text_encoder(ids.to(self.device))[0]

    def predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.pipeline.unet(x, t, encoder_hidden_states=context).sample

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
            record(x, times, kwargs["encoder_hidden_states"], prediction)

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
        yield


def open_checkpoint(path: str | Path, device: str | torch.device | None = None) -> Standalone:
    """Load a Stable Diffusion 1.x checkpoint in the original layout.

    A yaml of the same name beside it, if there is one, describes the model (and names its tokenizer's folder), as the
    webui reads it; without one it is taken for Stable Diffusion 1.5.

    Raises:
        ValueError: the file is missing or is no such checkpoint.
        ImportError: diffusers or transformers is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The checkpoint {path} does not exist; give the path of a .safetensors file.")
    try:
        from diffusers import DDIMScheduler, StableDiffusionPipeline
    except ImportError as error:
        raise ImportError("The standalone host needs diffusers: pip install 'sd-webui-loraclr[standalone]'") from error

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    yaml_path = path.with_suffix(".yaml")
    try:
        if yaml_path.exists():
            pipeline = _from_yaml(path, yaml_path)
        else:
            pipeline = StableDiffusionPipeline.from_single_file(str(path), safety_checker=None)
    except (KeyError, RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be loaded as a Stable Diffusion 1.x checkpoint: {error}") from error
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return Standalone(pipeline.to(device, dtype))


def _from_yaml(path: Path, yaml_path: Path):
    """A pipeline built from the original layout's own configuration, by diffusers' converters."""
    import yaml
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        create_unet_diffusers_config_from_ldm,
        create_vae_diffusers_config_from_ldm,
    )
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    config = yaml.safe_load(yaml_path.read_text())
    params = config["model"]["params"]
    tensors = {name: value.float() for name, value in load_file(path).items()}

    unet_config = create_unet_diffusers_config_from_ldm(config, tensors)
    unet_config["sample_size"] = params["image_size"]
    unet = UNet2DConditionModel.from_config(unet_config)
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(tensors), unet_config))
    vae_config = create_vae_diffusers_config_from_ldm(config, tensors)
    vae = AutoencoderKL.from_config(vae_config)
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(tensors), vae_config))

    clip = Path(params["cond_stage_config"]["params"]["version"])
    clip = clip if clip.is_absolute() else yaml_path.parent / clip
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
