"""`python -m miniature.train`: build the miniature's weights from nothing, part by part; stopped runs go on.

The parts do not wait for each other more than they must: the judge and the VAE need only scenes, the UNet needs the
latents by design (not the VAE), the LoRAs need the UNet. On CPUs with few cores, start several parts in processes of
one thread each (OMP_NUM_THREADS=1): two processes that share cores with two threads each run many times slower.
The weights in git were trained with the numbers of steps below, in several sittings; the totals, and with them the
rates' cosine, were lengthened or shortened on the way. The base's first 2500 steps and the LoRAs' first 4000, on that
base, had no offset noise; the LoRAs' first 1700 had fewer whole pictures and, as the base's, noise levels drawn one by
one. The octopus went on by itself with 12 whole pictures a step: 2000 steps, then three more ranks and 1700 steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from miniature import JUDGE, LORAS, adapters, autoencoder, diffusion, judge
from miniature.checkpoint import Miniature, device, save
from miniature.vocabulary import CONCEPTS

PARTS = ("judge", "vae", "base", "checkpoint", "loras")
DECODER_STEPS, ENCODER_STEPS, BASE_STEPS, LORA_STEPS, JUDGE_STEPS = 3000, 1200, 4200, 6000, 1200
GROUP = 6  # LoRAs trained side by side in one process


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m miniature.train", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all, in this order)")
    parser.add_argument("--run", type=Path, default=Path("runs/miniature"), help="folder for states of training")
    parser.add_argument("--group", type=int, choices=(0, 1), help="only this half of the LoRAs")
    options = parser.parse_args(arguments)
    parts, run, where = options.parts or list(PARTS), options.run, device()
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {unknown[0]}; there are {', '.join(PARTS)}")

    if "judge" in parts:
        judge.fit(run, JUDGE_STEPS).save(JUDGE)
    if "vae" in parts:
        autoencoder.fit(run, where, DECODER_STEPS, ENCODER_STEPS)
    if "base" in parts:
        diffusion.fit(run, where, BASE_STEPS)
    if "checkpoint" in parts:
        vae = autoencoder.fit(run, where, DECODER_STEPS, ENCODER_STEPS)
        model = diffusion.fit(run, where, BASE_STEPS)
        model.restore()
        save(Miniature(model.unet, vae, model.text_encoder))
    if "loras" in parts:
        groups = (0, 1) if options.group is None else (options.group,)
        for group in groups:
            model = diffusion.shipped(run).to(where)
            chosen = CONCEPTS[group * GROUP : (group + 1) * GROUP]
            adapters.save(adapters.fit(model, chosen, run, where, LORA_STEPS), LORAS)


if __name__ == "__main__":
    main()
