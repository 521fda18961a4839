"""What ActGen's parts do to its images: are labels right, are settings new? Judged by the oracle.

    python actgen.py --ladder --eval_every 40 --seeds 5 --out runs/ladder-actgen
    python digits/experiments/variants.py --runs runs/ladder-actgen

Of the images of each rung, plain text-to-image and guided ones apart: the share in which the oracle reads
the digit of the label, its look-alike, and the class's uncommon setting, which no training image shows.
Means over the random seeds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import actgen  # noqa: E402
import common  # noqa: E402
from digits import judge, world  # noqa: E402


@dataclass
class Args:
    """The ladder to judge."""

    runs: str = HfArg(default="runs/actgen-digits-ladder-s0", help="folder of ActGen's ladder")


def shares(folder: Path) -> dict[bool, list[float]]:
    """For plain and guided images of a run: the shares of right digits, look-alikes, uncommon settings."""
    records, labels, digits, settings = judge.read_run(folder)
    alike = torch.tensor([world.LOOK_ALIKE[y] for y in labels.tolist()])
    uncommon = settings == judge.uncommon_settings(labels)
    found = torch.stack([digits == labels, digits == alike, uncommon], 1).float()
    guided = torch.tensor([record["guided"] for record in records])
    return {kind: found[guided == kind].mean(0).tolist() for kind in set(guided.tolist())}


def main(args: Args) -> None:
    header = ["rung", "images", "right digit, %", "look-alike, %", "uncommon setting, %"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for rung in actgen.LADDER:
        runs = sorted(Path(args.runs).glob(f"{common.slug(rung)}-s*/synthetic/metadata.jsonl"))
        found = [shares(file.parents[1]) for file in runs]
        for kind, name in ((False, "plain"), (True, "guided")):
            if values := [100 * np.array(run[kind]) for run in found if kind in run]:
                print(f"| {rung} | {name} | {' | '.join(f'{v:.0f}' for v in np.mean(values, 0))} |")


if __name__ == "__main__":
    common.cli(main, Args)
