"""How alike pictures are, and to a text, by models that everyone has: CLIP, and ArcFace where insightface is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP = "openai/clip-vit-large-patch14"
BATCH = 16


class Clip:
    """CLIP's two halves through transformers; `name` is a folder, or a model of the hub or its local cache.

    Raises:
        OSError: there is no such model.
    """

    def __init__(self, name: str = CLIP, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.processor = CLIPImageProcessor.from_pretrained(name)
        self.model = CLIPModel.from_pretrained(name).to(device).eval()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features (B, C) of length 1."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _unit(self.model.text_projection(self.model.text_model(**tokens).pooler_output))

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features (B, C) of length 1."""
        found = []
        for begin in range(0, len(pictures), BATCH):
            part = [picture.convert("RGB") for picture in pictures[begin : begin + BATCH]]
            pixels = self.processor(part, return_tensors="pt").to(self.device)
            found.append(_unit(self.model.visual_projection(self.model.vision_model(**pixels).pooler_output)))
        return torch.cat(found)


class Faces:
    """ArcFace (Deng et al. 2019) through insightface.

    Raises:
        ImportError: insightface is not installed.
    """

    def __init__(self) -> None:
        from insightface.app import FaceAnalysis

        self.app = FaceAnalysis(name="buffalo_l")
        self.app.prepare(ctx_id=0 if torch.cuda.is_available() else -1)

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """The embeddings (faces, 512), of length 1, of every face in a picture, the largest first."""
        faces = self.app.get(np.asarray(picture.convert("RGB"))[:, :, ::-1])
        faces.sort(key=lambda face: -np.prod(face.bbox[2:] - face.bbox[:2]))
        return np.array([face.normed_embedding for face in faces]).reshape(-1, 512)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
