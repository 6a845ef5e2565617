"""Small square pictures of LoRAs, for the list to choose from and the rows: of the previews beside the files."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI, Response
from PIL import Image, ImageOps

from loraclr.webui import library

ROUTE = "/loraclr/thumbnail"
SIDE = 96  # pixels: previews are large, and the list shows dozens at a time
KINDS = ("png", "jpg", "jpeg", "webp", "gif", "avif")  # the webui's, in its order


def add_route(app: FastAPI) -> None:
    """Add the pictures' address. Like the webui's own for previews, whoever can see the page can see them."""
    app.add_api_route(ROUTE, thumbnail, methods=["GET"])


def of(path: Path) -> Path | None:
    """The preview of a LoRA file, if there is one."""
    names = (f"{path.stem}{middle}.{kind}" for kind in KINDS for middle in ("", ".preview"))
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def address(name: str, picture: Path) -> str:
    """Where the page finds the small picture of this LoRA; another address when the preview is another."""
    return f".{ROUTE}?name={quote(name, safe='')}&mtime={picture.stat().st_mtime_ns}"


def thumbnail(name: str) -> Response:
    """A LoRA's small picture; an empty answer where there is none, which a browser takes for no picture at all."""
    try:
        picture = of(library.path_of(name))
        content = None if picture is None else _small(picture, picture.stat().st_mtime_ns)
    except Exception:  # noqa: BLE001 (the LoRA is gone, or its picture is damaged, which fails in many ways inside Pillow)
        content = None
    if content is None:
        return Response(status_code=204, headers={"Cache-Control": "no-store"})
    return Response(content, media_type="image/png", headers={"Cache-Control": "max-age=60"})


@lru_cache(maxsize=512)
def _small(picture: Path, _: int) -> bytes:
    with Image.open(picture) as image:
        image.draft("RGB", (SIDE, SIDE))  # of a JPEG, no more than is needed is read
        small = image.convert("RGBA")
    buffer = io.BytesIO()
    ImageOps.fit(small, (SIDE, SIDE)).save(buffer, "png")
    return buffer.getvalue()
