"""What the page's server answers without a browser: the page, the API behind its password, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
from typing import Any
from urllib.parse import quote

import pytest
import torch
from alone_driver import REPOSITORY, USER, Alone
from safetensors.torch import load_file, save_file

from loraclr import files

BASE = "/loraclr/v1"


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
        assert refused(alone, f"/sd_extra_networks/thumb?filename={quote(str(path))}") == 404


def command(alone: Alone, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m loraclr merge --server` with these."""
    line = [sys.executable, "-m", "loraclr", "merge", "--server", alone.address, *arguments]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_line_merges_by_it(alone: Alone) -> None:
    """Through the password, by name; and refuses without it."""
    pair = ["--lora", "tiger", "--lora", "panda", "--trigger", "my panda", "--name", "by server"]
    quick = ["--speed", "closed", "--scenes", "0"]
    without = command(alone, *pair)
    assert (without.returncode, without.stderr.count("\n")) == (2, 1)
    assert "give --api-auth USER:PASS" in without.stderr
    done = command(alone, *pair, *quick, "--api-auth", USER)
    assert done.returncode == 0, done.stderr
    assert "Prompt: <lora:by server:1> sks, my panda" in done.stdout
    assert "%" in done.stderr
    assert "by server.safetensors" in alone.files()
    again = command(alone, *pair, "--api-auth", USER)
    assert again.returncode == 2
    assert "by server.safetensors exists already" in again.stderr


def test_a_plain_file_with_its_embeddings_beside_it(alone: Alone) -> None:
    """As the command line asks for it; without that both are in the file."""
    norm = "lora_unet_conv_norm_out"
    ones = torch.ones(32)
    tensors = load_file(alone.loras / "panda.safetensors") | {f"{norm}.w_norm": ones, f"{norm}.b_norm": ones.clone()}
    save_file(tensors | {"bundle_emb.zyk.x": torch.ones(1, 768)}, alone.loras / "pivotal.safetensors")
    how = ["--method", "sum", "--api-auth", USER, "--lora", "tiger", "--lora", "pivotal", "--trigger", "zyk", "--name"]
    for name, more in (("all", []), ("less", ["--plain", "--separate-embeddings"])):
        done = command(alone, *how, name, *more)
        assert done.returncode == 0, done.stderr
    whole, plain = (files.load(alone.loras / f"{name}.safetensors") for name in ("all", "less"))
    assert whole.layers.keys() - plain.layers.keys() == {norm} and plain.layers.keys() <= whole.layers.keys()
    assert whole.embeddings.keys() == {"zyk"} and not plain.embeddings
    assert (alone.loras / "less embeddings" / "zyk.safetensors").exists()
    assert not (alone.loras / "all embeddings").exists()


def test_refused_merges(alone: Alone) -> None:
    """The sentence comes with status 422."""
    request = {"loras": [{"name": "tiger"}, {"name": "nobody"}]}
    with pytest.raises(urllib.error.HTTPError) as error:
        alone.ask(f"{BASE}/merge", request)
    assert error.value.code == 422
    assert "nobody is no longer in the LoRA folder" in json.load(error.value)["detail"]
