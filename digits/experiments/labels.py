"""Where AMST's labels are right, and where the source images' labels are. Judged by the oracle.

    python dreamda.py                                and with --seed 1, 2, ...
    python digits/experiments/labels.py --runs runs/dreamda-digits-s0 runs/dreamda-digits-s1

Splits the synthetic images by what they show: a digit in one of its class's two common settings, in which
training shows the class, or in the uncommon one. Prints for each part: its share of the images, the share of
right labels among the source images', the share that AMST labels, and of just these images the share of right
labels by AMST and by the source images. Means over the runs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: E402
from digits import judge  # noqa: E402

COLUMNS = ["setting", "share", "source right", "labelled", "AMST right", "source right, on these"]


@dataclass
class Args:
    """The runs to judge."""

    runs: list[str] = HfArg(default_factory=lambda: ["runs/dreamda-digits-s0"], help="DreamDA's runs")


def shares(folder: Path) -> dict[str, list[float]]:
    """For images in common and in uncommon settings: the shares of COLUMNS."""
    records, source, digits, settings = judge.read_run(folder)
    label = torch.tensor([-1 if r["pseudo_label"] is None else r["pseudo_label"] for r in records])
    new = settings == judge.uncommon_settings(digits)
    found = {}
    for name, part in (("common", ~new), ("uncommon", new)):
        labelled = part & (label >= 0)
        right = [(labels == digits)[chosen] for labels, chosen in ((source, part), (label, labelled))]
        values = [part, right[0], labelled[part], right[1], (source == digits)[labelled]]
        found[name] = [value.float().mean().item() for value in values]
    return found


def main(args: Args) -> None:
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    found = [shares(Path(run)) for run in args.runs]
    for name in ("common", "uncommon"):
        values = 100 * np.mean([run[name] for run in found], 0)
        print(f"| {name} | {' | '.join(f'{value:.0f} %' for value in values)} |")


if __name__ == "__main__":
    common.cli(main, Args)
