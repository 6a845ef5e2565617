"""Merge many LoRAs into one by what they do, not by what they weigh (LoRACLR, CVPR 2025)."""
