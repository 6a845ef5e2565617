"""What the page's server answers without a browser: the page, the API behind its password, and the command line."""

from __future__ import annotations

import io
import json
import struct
import time
import urllib.error
import urllib.request
import zlib
from typing import Any
from urllib.parse import quote

import pytest
import torch
from alone_driver import REPOSITORY, USER, Alone
from PIL import Image
from safetensors.torch import load_file, save_file

from loraclr import files
from loraclr.__main__ import main

BASE = "/loraclr/v1"
PAIR = [{"name": "tiger"}, {"name": "panda"}]


def refused(alone: Alone, path: str, body: Any = None, **how: Any) -> int:
    """The status of a request that is refused."""
    with pytest.raises(urllib.error.HTTPError) as error:
        alone.ask(path, body, **how)
    return error.value.code


def test_the_page(alone: Alone) -> None:
    """Its parts, each id once."""
    config = alone.ask("/config")
    ids = [component["props"].get("elem_id") for component in config["components"]]
    ours = [name for name in ids if name and name.startswith("loraclr_")]
    assert {"loraclr_loras", "loraclr_merge", "loraclr_trigger_1", "loraclr_result"} <= set(ours)
    assert len(ours) == len(set(ours))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("loras", None), ("loras/tiger", None), ("methods", None), ("schema", None), ("jobs/x", None),
        ("merge", {}), ("jobs/x/cancel", {}),
    ],
)  # fmt: skip
def test_the_password(alone: Alone, path: str, body: Any) -> None:
    """Every route asks for it."""
    for user in (None, "someone:wrong", "other:secret"):
        assert refused(alone, f"{BASE}/{path}", body, user=user) == 401
    if "x" not in path and body is None:
        assert alone.ask(f"{BASE}/{path}")


def test_only_this_machine_and_only_pictures(alone: Alone) -> None:
    """No other site's page may ask, and nothing but pictures of the LoRA folder is given out."""
    assert refused(alone, "/", headers={"Host": "evil.example"}) == 400
    with open(f"/proc/{alone.process.pid}/net/tcp") as sockets:
        addresses = {line.split()[1] for line in sockets if line.split()[3] == "0A"}
    assert f"0100007F:{alone.port:04X}" in addresses
    assert f"00000000:{alone.port:04X}" not in addresses
    for path in (alone.loras / "tiger.safetensors", alone.loras / ".." / "log", REPOSITORY / "docs/images/tab.png"):
        with urllib.request.urlopen(f"{alone.address}/loraclr/thumbnail?name={quote(str(path))}") as answer:
            assert (answer.status, answer.read()) == (204, b"")


def test_a_damaged_picture_is_none(alone: Alone) -> None:
    """However it is damaged; of the last one Pillow says SyntaxError, when it comes to the wrong name of a part."""
    path = alone.loras / "panda.png"
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "png")
    whole = buffer.getvalue()
    part = b"IDAT" + whole[41:45]
    named = (
        whole[:33] + struct.pack(">I", 4) + part + struct.pack(">I", zlib.crc32(part)) + b"\0\0\0\4" + b"8\1\1\1" * 4
    )
    try:
        for content, status in ((whole, 200), (whole[:40], 204), (b"no picture", 204), (named, 204)):
            path.write_bytes(content)
            with urllib.request.urlopen(f"{alone.address}/loraclr/thumbnail?name=panda") as answer:
                assert answer.status == status, content
    finally:
        path.unlink()


def test_the_command_line_merges_by_it(alone: Alone, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the password, by name; and refuses without it."""
    line = ["merge", "--server", alone.address, "--lora", "tiger", "--lora", "panda", "--trigger", "my bear"]
    line += ["--name", "by server", "--method", "sum"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "give --api-auth USER:PASS" in said
    assert said.count("\n") == 1
    assert main([*line, "--api-auth", USER]) == 0
    out, progress = capsys.readouterr()
    assert "Prompt: <lora:by server:1> sks, my bear" in out
    assert "%" in progress
    assert "by server.safetensors" in alone.files()
    assert main([*line, "--api-auth", USER]) == 2
    assert "by server.safetensors exists already" in capsys.readouterr().err


def test_a_job_tells_its_figures(alone: Alone) -> None:
    """What the tab has under Details, as JSON."""
    loras = [{"name": name, "prompts": ["a {}"]} for name in ("tiger", "panda")]
    settings = {"speed": "closed", "steps": 2, "size": 64, "neutral_prompts": ["a cat"], "rank": 4}
    job = quote(alone.ask(f"{BASE}/merge", {"loras": loras, "name": "figures", "settings": settings})["job"])
    while (done := alone.ask(f"{BASE}/jobs/{job}"))["state"] in ("queued", "running"):
        time.sleep(0.2)
    assert done["state"] == "done", done
    assert done["kept"].keys() == done["bled"].keys() == {"tiger", "panda"}
    figures = done["figures"]
    assert figures["alignment"]["tiger"].keys() == figures["objective"].keys()
    for part in figures["objective"].values():
        assert part["merged"] < part["start"]
        assert 0 <= part["active"] <= 1
    assert len(figures["rank_kept"]) == sum(part["layers"] for part in figures["objective"].values())
    assert figures["peak_bytes"]["process"] > 2**28


def test_a_plain_file_with_its_embeddings_beside_it(alone: Alone) -> None:
    """As the command line asks for it; without that both are in the file."""
    norm = "lora_unet_conv_norm_out"
    ones = torch.ones(32)
    tensors = load_file(alone.loras / "panda.safetensors") | {f"{norm}.w_norm": ones, f"{norm}.b_norm": ones.clone()}
    save_file(tensors | {"bundle_emb.zyk.x": torch.ones(1, 768)}, alone.loras / "pivotal.safetensors")
    line = ["merge", "--server", alone.address, "--api-auth", USER, "--method", "sum", "--lora", "tiger"]
    line += ["--lora", "pivotal", "--trigger", "zyk", "--name"]
    for name, more in (("all", []), ("less", ["--plain", "--separate-embeddings"])):
        assert main([*line, name, *more]) == 0
    whole, plain = (files.load(alone.loras / f"{name}.safetensors") for name in ("all", "less"))
    assert whole.layers.keys() - plain.layers.keys() == {norm} and plain.layers.keys() <= whole.layers.keys()
    assert whole.embeddings.keys() == {"zyk"} and not plain.embeddings
    assert (alone.loras / "less embeddings" / "zyk.safetensors").exists()
    assert not (alone.loras / "all embeddings").exists()


@pytest.mark.parametrize(
    ("order", "answer"),
    [
        ({"loras": [{"name": "tiger"}, {"name": "nobody"}]}, "nobody is no longer in the LoRA folder"),
        ({"loras": PAIR, "settings": {"rank": 0}}, 'The largest rank is "0": choose exact, auto or a whole number'),
        ({"loras": PAIR, "settings": {"size": 100.5}}, "The picture size is 100.5: choose a multiple of 64."),
        ({"loras": PAIR, "settings": {"size": 500}}, "The picture size is 500: choose a multiple of 64."),
        ({"loras": PAIR, "settings": {"size": 0}}, "The setting size is 0: choose 64 to 1024."),
    ],
)
def test_refused_merges(alone: Alone, order: dict[str, Any], answer: str) -> None:
    """The sentence comes with status 422, at once."""
    with pytest.raises(urllib.error.HTTPError) as error:
        alone.ask(f"{BASE}/merge", order)
    assert error.value.code == 422
    assert answer in json.load(error.value)["detail"]
