"""The host for AUTOMATIC1111's webui: its loaded model, its own pipeline, its progress bar and its Interrupt button.

Everything here must run inside the webui's job queue (`wrap_gradio_gpu_call`, or `with queue_lock`), which it never
takes itself: the lock is not reentrant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import networks  # the webui's own LoRA extension
import torch
from modules import devices, lowvram, paths, sd_hijack, sd_unet, shared
from modules.processing import StableDiffusionProcessing, StableDiffusionProcessingTxt2Img, process_images
from modules.prompt_parser import SdConditioning
from modules.textual_inversion import textual_inversion
from PIL import Image
from torch import Tensor, nn

from loraclr.embeddings import Embeddings
from loraclr.hosts import Cancelled, Checkpoint, Context, Record
from loraclr.hosts.attention import Pooling, Split, opened
from loraclr.hosts.recompute import LARGE, recomputed
from loraclr.keys import Family, Part, kohya_name

# The module types whose weights the webui's LoRA extension rewrites in place.
_REWRITTEN = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)

# state.job_no counts this many parts, so that the steps of one picture hardly move the bar.
_PARTS = 100_000


class A1111:
    """The checkpoint that the webui has loaded, as the merge sees it.

    Raises ValueError, one sentence for the user, if that checkpoint cannot be merged for.
    """

    def __init__(self) -> None:
        model = shared.sd_model  # loads the chosen checkpoint if the webui has not done so yet
        if model is None:
            raise ValueError("No checkpoint is loaded; choose one at the top of the page.")
        name = model.sd_checkpoint_info.name_for_extra
        encoders = _text_encoders(model)
        family = _family(model, len(encoders))
        if family is None:
            raise ValueError(
                f"{name} is no checkpoint of Stable Diffusion 1.x, 2.x or XL (without its refiner); only those can be"
                " merged for."
            )
        inputs = model.model.diffusion_model.input_blocks[0][0].in_channels
        if model.model.conditioning_key != "crossattn" or inputs != 4:
            raise ValueError(f"{name} is an inpainting or editing checkpoint; choose an ordinary one for the merge.")
        if sd_unet.get_unet_option() is not None:
            raise ValueError("An optimised UNet is active, which hides the model; set SD Unet to None in the settings.")
        self._model = model
        self.family: Family = family
        self.target = "v" if model.parameterization == "v" else "epsilon"
        self.size = _size(model, family, self.target)
        self.alphas = model.alphas_cumprod.float()
        self._encoders: dict[Part, nn.Module] = dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False))
        # What computes without calling layers, by the path that stands before its projections.
        self._closed: dict[tuple[Part, str], Split | Pooling] = {
            (part, f"{path}."): Split(module)
            for part, encoder in self._encoders.items()
            for path, module in encoder.wrapped.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        }
        if family == "sdxl":
            self._closed["text_encoder_2", ""] = Pooling(self._encoders["text_encoder_2"].wrapped)

    @property
    def device(self) -> torch.device:
        """Where the model computes; with medvram its weights rest elsewhere outside of a session."""
        return devices.device

    @property
    def checkpoint(self) -> Checkpoint:
        """The hash is not known where the webui runs without hashing."""
        told = self._model.sd_checkpoint_info
        return Checkpoint(Path(told.filename).name, told.sha256 or "")

    def layers(self) -> dict[str, nn.Module]:
        """Every Linear, Conv2d and norm layer of UNet and text encoders by canonical name: the live modules.

        OpenCLIP's q, k, v and out and SDXL's text projection are layers of their own, called inside a session only.
        """
        parts = {"unet": self._model.model.diffusion_model}
        parts |= {part: encoder.wrapped for part, encoder in self._encoders.items()}
        modules = {
            (part, path): module
            for part, root in parts.items()
            for path, module in root.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm))
        }
        for (part, path), closed in self._closed.items():
            modules |= {(part, f"{path}{side}"): module for side, module in closed.projections.items()}
        return {kohya_name(part, path, self.family): module for (part, path), module in modules.items()}

    def encode(self, prompts: Sequence[str]) -> Context:
        """The prompts through the webui's text encoders, with its emphasis, embeddings and clip skip."""
        with devices.autocast():
            encoded = self._model.get_learned_conditioning(SdConditioning(list(prompts)))
        if self.family != "sdxl":
            return Context(encoded)
        # The webui gives SDXL zeros for an empty negative prompt, which is what is guided away from.
        asked = torch.tensor([prompt != "" for prompt in prompts], device=encoded["crossattn"].device)
        pooled = encoded["vector"][:, : self._pooled_width]
        return Context(encoded["crossattn"] * asked[:, None, None], pooled * asked[:, None])

    def predict(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """One UNet call: x (B, 4, h, w) as the UNet sees it, t (B,) → prediction (B, 4, h, w).

        In the precision that the webui generates in, returned as float32.
        """
        x, t, tokens = (tensor.to(devices.device, devices.dtype_unet) for tensor in (x, t, context.tokens))
        with devices.autocast():
            if context.pooled is None:
                return self._model.model(x, t, c_crossattn=[tokens]).float()
            vector = torch.cat([context.pooled.to(x), self._sizes(x)], 1)
            return self._model.model(x, t, {"crossattn": tokens, "vector": vector}).float()

    @property
    def _pooled_width(self) -> int:
        """How much of SDXL's vector comes from the prompt; the rest are sizes."""
        return self._encoders["text_encoder_2"].wrapped.model.text_projection.shape[1]

    def _sizes(self, x: Tensor) -> Tensor:
        """What SDXL is told of the size of pictures of these latents, (B, …), as the webui tells it."""
        height, width = (8 * side for side in x.shape[-2:])
        told = {
            "original_size_as_tuple": (height, width),
            "crop_coords_top_left": (shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left),
            "target_size_as_tuple": (height, width),
        }
        embedded = [
            embedder(torch.tensor([told[embedder.input_key]], device=x.device, dtype=devices.dtype))
            for embedder in self._model.conditioner.embedders
            if embedder.input_key in told
        ]
        return torch.cat(embedded, 1).to(x).expand(x.shape[0], -1)

    def sample(
        self, prompts: Sequence[str], seed: int, steps: int, guidance: float, width: int, height: int
    ) -> list[Image.Image]:
        """Pictures by the webui's own txt2img, picture k from seed + k; nothing is saved. Raises Cancelled."""
        stop_if_cancelled()
        p = StableDiffusionProcessingTxt2Img(
            sd_model=self._model,
            prompt=list(prompts),
            batch_size=len(prompts),
            seed=seed,
            steps=steps,
            cfg_scale=guidance,
            width=width,
            height=height,
            sampler_name="Euler",
            scheduler="Automatic",
            s_min_uncond=0,
            tiling=False,
            restore_faces=False,
            do_not_save_samples=True,
            do_not_save_grid=True,
            do_not_reload_embeddings=True,
            disable_extra_networks=True,
            override_settings=self._overrides(),
        )
        # Text features computed while a concept's hooks are on must not reach the webui's cache.
        p.cached_c, p.cached_uc = [None, None], [None, None]
        with _own_progress():
            try:
                pictures = process_images(p).images
            finally:
                p.close()
        stop_if_cancelled()
        return pictures

    @contextmanager
    def watch(self, record: Record) -> Iterator[None]:
        """Call `record` for every UNet call made inside; cond and uncond rows may share a call or not."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            call = dict(zip(("x", "timesteps", "context", "y"), args, strict=False)) | kwargs
            vector = call.get("y")
            pooled = None if vector is None else vector[:, : self._pooled_width]
            record(call["x"], call["timesteps"], Context(call["context"], pooled), output)

        handle = self._model.model.diffusion_model.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def words(self, embeddings: Embeddings) -> Iterator[None]:
        """Inside, prompts may hold these words; one that the user has an embedding for keeps the user's."""
        database = sd_hijack.model_hijack.embedding_db
        added = [name for name in embeddings if name not in database.word_embeddings]
        try:
            for name in added:
                vectors = embeddings[name]
                data = vectors if len(vectors) > 1 else {"emb_params": next(iter(vectors.values()))}
                embedding = textual_inversion.create_embedding_from_data(data, name)
                database.register_embedding(embedding, self._model)
            yield
        finally:
            for name in added:
                database.register_embedding_by_name(None, self._model, name)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Everything that the merge does with the model runs inside.

        No LoRA or hypernetwork of the user is applied and the base weights are in place; gradients reach only tensors
        from outside the model. The next generation loads again what its prompt names.
        """
        hypernetworks = list(shared.loaded_hypernetworks)
        history = shared.cmd_opts.no_prompt_history
        trained = [
            parameter
            for part in (self._model.model, self._model.cond_stage_model)
            for parameter in part.parameters()
            if parameter.requires_grad
        ]
        # ldm's own checkpointing hands gradients to inputs and parameters only: factors in hooks would get none.
        checkpointed = [
            (module, name)
            for module in self._model.model.modules()
            for name in ("checkpoint", "use_checkpoint")
            if getattr(module, name, None) is True
        ]
        # sgm gives no gradients to text encoders that are not being trained.
        frozen = [encoder for encoder in self._encoders.values() if not encoder.is_trainable]
        self._unload_networks()
        shared.loaded_hypernetworks.clear()
        shared.cmd_opts.no_prompt_history = True  # "read the last generation" is to find the user's own
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            for module, name in checkpointed:
                setattr(module, name, False)
            for encoder in frozen:
                encoder.is_trainable = True
            unet = self._model.model.diffusion_model
            again = recomputed(unet, devices.autocast) if self.size >= LARGE else nullcontext()
            with self._on_device(), opened(list(self._closed.values())), again:
                yield
        finally:
            for encoder in frozen:
                encoder.is_trainable = False
            for module, name in checkpointed:
                setattr(module, name, True)
            for parameter in trained:
                parameter.requires_grad_(True)
            shared.cmd_opts.no_prompt_history = history
            shared.loaded_hypernetworks[:] = hypernetworks
            devices.torch_gc()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Keep UNet and text encoder on the device, where medvram and lowvram move them in and out by hooks.

        A part that has been moved away since its forward pass cannot take part in the backward pass.
        """
        if not lowvram.is_enabled(self._model):
            yield
            return
        parts = (self._model.model, self._model.cond_stage_model)
        movers = [
            (module, number, hook)
            for part in parts
            for module in part.modules()
            for number, hook in module._forward_pre_hooks.items()
            if getattr(hook, "__name__", "") == "send_me_to_gpu"
        ]
        lowvram.send_everything_to_cpu()
        try:
            for module, number, _ in movers:
                del module._forward_pre_hooks[number]
            for part in parts:
                part.to(devices.device)
            yield
        finally:
            for module, number, hook in movers:
                module._forward_pre_hooks[number] = hook
                module.to(devices.cpu)
            lowvram.send_everything_to_cpu()

    def publish(self, path: Path) -> None:
        """Make a newly written LoRA file known, also if it replaced one that the webui had applied or cached."""
        self._unload_networks()
        networks.networks_in_memory.pop(path.stem, None)
        networks.list_available_networks()
        # The cache's key holds the LoRA's name, not its content.
        StableDiffusionProcessing.cached_c, StableDiffusionProcessing.cached_uc = [None, None], [None, None]
        StableDiffusionProcessingTxt2Img.cached_hr_c = [None, None]
        StableDiffusionProcessingTxt2Img.cached_hr_uc = [None, None]

    def _overrides(self) -> dict[str, Any]:
        """Settings that a picture of the merge needs otherwise than the user has them."""
        wanted = {
            # Should the user choose another checkpoint meanwhile, it is loaded after the merge.
            "sd_model_checkpoint": self._model.sd_checkpoint_info.title,
            # These would make capture see another computation than `predict`.
            "token_merging_ratio": 0.0,
            "skip_early_cond": 0.0,
            "multiple_tqdm": False,
        }
        if not self._can_preview(shared.opts.show_progress_type):
            wanted["show_progress_type"] = "Approx cheap"
        return {name: value for name, value in wanted.items() if shared.opts.data.get(name) != value}

    def _can_preview(self, kind: str) -> bool:
        """Whether live previews of this kind need nothing that the webui would have to download first."""
        xl = self.family == "sdxl"
        models = {
            "Approx NN": f"VAE-approx/{'vaeapprox-sdxl' if xl else 'model'}.pt",
            "TAESD": f"VAE-taesd/{'taesdxl' if xl else 'taesd'}_decoder.pth",
        }
        folders = (Path(paths.models_path), Path(paths.script_path, "models"))
        return kind not in models or any((folder / models[kind]).exists() for folder in folders)

    def _unload_networks(self) -> None:
        """Base weights back in place: after a generation the webui leaves its LoRAs merged until the next one."""
        with torch.no_grad():
            networks.load_networks([])
            for module in self._model.network_layer_mapping.values():
                if isinstance(module, _REWRITTEN):
                    networks.network_apply_weights(module)


def _text_encoders(model: Any) -> list[nn.Module]:
    """The webui's wrappers around the text encoders, the first one first."""
    conditioner = getattr(model, "conditioner", None)
    candidates = [model.cond_stage_model] if conditioner is None else conditioner.embedders
    return [encoder for encoder in candidates if hasattr(encoder, "wrapped")]


def _family(model: Any, encoders: int) -> Family | None:
    if model.is_sdxl:
        return "sdxl" if encoders == 2 else None  # SDXL's refiner has only one, and so has SD 2.x Turbo
    if encoders != 1:
        return None
    return "sd1" if model.is_sd1 else "sd2" if model.is_sd2 else None


def _size(model: Any, family: Family, target: str) -> int:
    if family == "sdxl":
        return 1024
    # The configuration of the 768 model names 64 too.
    return 768 if family == "sd2" and target == "v" and model.image_size == 64 else 8 * int(model.image_size)


def report(stage: str, fraction: float, seconds_left: float | None = None) -> None:
    """The merge's progress, on the webui's own bar, which estimates the time left itself. Raises Cancelled."""
    shared.state.job_count = _PARTS
    shared.state.job_no = round(_PARTS * fraction)
    shared.state.sampling_step = 0
    shared.state.textinfo = stage
    stop_if_cancelled()


def stop_if_cancelled() -> None:
    """Raise Cancelled if the user has interrupted (or skipped) the running job."""
    state = shared.state
    if state.interrupted or state.skipped or state.stopping_generation:
        raise Cancelled("The merge was interrupted.")


@contextmanager
def _own_progress() -> Iterator[None]:
    """Generating a picture leaves the job's place on the progress bar as it was."""
    kept = ("job_count", "job_no", "job", "textinfo", "sampling_step", "sampling_steps")
    before = {name: getattr(shared.state, name) for name in kept}
    if before["job_count"] < 1:
        shared.state.job_count = 1  # else process_images would set it
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(shared.state, name, value)
