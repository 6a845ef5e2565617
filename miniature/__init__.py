"""The miniature: a small real Stable Diffusion 1.x that this repository trains itself, with its concept LoRAs."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
CHECKPOINT = WEIGHTS / "miniature.safetensors"
CONFIG = WEIGHTS / "miniature.yaml"
LORAS = WEIGHTS / "loras"
JUDGE = WEIGHTS / "judge.safetensors"
MERGES = WEIGHTS / "merges.txt.gz"
