"""Merge many LoRAs into one by what they do, not by what they weigh (LoRACLR, CVPR 2025).

from loraclr import Concept, load, merge, write
from loraclr.hosts.standalone import open_checkpoint

host = open_checkpoint("model.safetensors")
tiger = Concept(load("tiger.safetensors"), trigger="sks")
panda = Concept(load("panda.safetensors"), trigger="zyk", weight=0.8)
merged = merge(host, [tiger, panda])
write(merged, "both.safetensors")
print(merged.prompt("both"))
"""

from loraclr.concept import Concept
from loraclr.files import load
from loraclr.hosts import Cancelled
from loraclr.lora import LoRA, LoRAFormatError
from loraclr.merging import merge
from loraclr.plan import Settings
from loraclr.result import Merge, write

__all__ = ["Cancelled", "Concept", "LoRA", "LoRAFormatError", "Merge", "Settings", "load", "merge", "write"]
