"""The picture on a merged LoRA's card: renewed with each merge, unless it is the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from loraclr import preview


def test_a_picture_of_ours_is_renewed_and_the_users_is_kept(tmp_path: Path) -> None:
    lora, place = tmp_path / "a.safetensors", tmp_path / "a.preview.png"
    for colour in ("red", "blue"):
        assert preview.wanted(lora)
        assert preview.save(Image.new("RGB", (8, 8), colour), lora) == place
        with Image.open(place) as picture:
            assert picture.getpixel((0, 0)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    Image.new("RGB", (8, 8), "green").save(place)
    kept = place.read_bytes()
    assert not preview.wanted(lora)
    assert preview.save(Image.new("RGB", (8, 8)), lora) is None
    assert place.read_bytes() == kept


def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a picture would never be renewed: it may be anyone's."""
    lora = tmp_path / "a.safetensors"
    place = preview.save(Image.new("RGB", (8, 8), "red"), lora)
    before = place.read_bytes()

    def half(picture: Image.Image, path: Path, *_: object, **__: object) -> None:
        path.write_bytes(before[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space left"):
        preview.save(Image.new("RGB", (8, 8), "blue"), lora)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert place.read_bytes() == before


def test_any_other_picture_of_the_users_is_enough(tmp_path: Path) -> None:
    (tmp_path / "a.webp").touch()
    assert preview.save(Image.new("RGB", (8, 8)), tmp_path / "a.safetensors") is None
    assert not (tmp_path / "a.preview.png").exists()
    (tmp_path / "b.preview.png").touch()
    assert not preview.wanted(tmp_path / "b.safetensors"), "a broken one may be anyone's"


def test_a_sheet_has_two_columns() -> None:
    three = [Image.new("RGB", (4, 2), colour) for colour in ("red", "lime", "blue")]
    sheet = preview.sheet(three)
    assert sheet.size == (8, 4)
    assert [sheet.getpixel(at) for at in ((0, 0), (4, 0), (0, 2), (4, 2))] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0),
    ]  # fmt: skip
