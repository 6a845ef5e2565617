"""The whole path on the miniature, by the command line: two LoRA files in, one out, and it draws both concepts."""

from __future__ import annotations

import json

import torch

from loraclr import files
from loraclr.__main__ import main
from loraclr.capture import applied
from loraclr.changes import changes_of
from loraclr.hosts.standalone import open_checkpoint
from miniature import LORAS, checkpoint
from miniature.judge import Judge

NAMES, TRIGGERS = ("tiger", "panda"), ("sks", "zyk")


def test_two_loras_become_one_that_draws_both(tmp_path, capsys) -> None:
    model = checkpoint.install(tmp_path / "model")
    output = tmp_path / "both.safetensors"
    command = ["merge", "--checkpoint", str(model), "--output", str(output), "--device", "cpu"]
    for name, trigger in zip(NAMES, TRIGGERS, strict=True):
        command += ["--lora", str(LORAS / f"{name}.safetensors"), "--trigger", trigger]
    assert main(command) == 0
    assert "<lora:both:1> sks, zyk" in capsys.readouterr().out

    merged = files.load(output)
    missed = json.loads(merged.metadata["loraclr.recipe"])["missed"]
    assert all(after < before for before, after in missed.values())
    assert json.loads(output.with_suffix(".json").read_text())["activation text"] == "sks, zyk"

    host, judge = open_checkpoint(model, "cpu"), Judge.load()
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    before = host.predict(x, t, host.encode(["a cat"]))
    right = []
    with applied(host.layers(), changes_of(merged, host.layers())):
        for name, trigger in zip(NAMES, TRIGGERS, strict=True):
            prompts = [f"a {trigger} on a {colour} background" for colour in ("orange", "teal", "purple", "pink")]
            right += [verdict.shows(name) for verdict in judge.verdicts(host.sample(prompts, 100, 16, 4.0, 128, 128))]
    assert sum(right) >= 4, right
    assert torch.equal(before, host.predict(x, t, host.encode(["a cat"])))
