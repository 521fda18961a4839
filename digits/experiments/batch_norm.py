"""Shows why small batches help so much on few images: batch norm's statistics are noisier in them.

    python digits/experiments/batch_norm.py     twenty minutes of one core; a run is kept, never repeated

The classifiers are trained as in compare.py, and judged on validation data as in tune.py. Batch norm takes
its statistics from the whole batch, or from groups of it ("ghost batch norm", Hoffer et al. 2017), which
changes nothing but their noise; or it keeps those of the pretrained network, which have none. Prints a table
and writes it to --out, as batch_norm.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: E402
import dreamda  # noqa: E402
from digits import world  # noqa: E402
from digits.experiments import compare, tune  # noqa: E402

WHOLE, FIXED = "the batch", "the pretrained network"  # where the statistics come from, or groups of n images
SEED, TRUTH = "DreamDA, seed labels", "DreamDA, true labels"
LABELS = {compare.TEXT: "seed", SEED: "seed", TRUTH: "truth"}
ROWS = [(compare.BASE, source) for source in (WHOLE, "groups of 8", "groups of 4", FIXED)]
ROWS.insert(1, (f"{compare.BASE}, 8 images a step", WHOLE))
ROWS += [(name, source) for name in LABELS for source in (WHOLE, "groups of 8", "groups of 4")]


@dataclass
class Args:
    """The seeds of the trainings."""

    seeds: int = HfArg(default=2, help="number of seeds")
    first_seed: int = HfArg(default=100, help="the first of the seeds")
    images: int = HfArg(default=640, help="synthetic images, all classes together")
    out: str = HfArg(default="runs/batch_norm", help="folder of the runs and the table")


def batch_norm(source: str) -> type[nn.BatchNorm2d]:
    """Batch norm that in training takes its statistics from `source`."""

    class BatchNorm(nn.BatchNorm2d):
        def forward(self, x):
            if self.training and source == FIXED:
                known = self.running_mean, self.running_var, self.weight, self.bias
                return F.batch_norm(x, *known, training=False, eps=self.eps)
            groups = len(x) // int(source.split()[-1]) if self.training and source != WHOLE else 1
            out = torch.empty_like(x)
            for i in range(groups):  # every group has real and synthetic images
                out[i::groups] = super().forward(x[i::groups])
            return out

    return BatchNorm


def accuracies(name: str, source: str, seed: int, out: Path, images: int) -> list[float]:
    """The accuracies in % on `val`, in common and in uncommon settings. The images are drawn only once."""
    kept = out / f"s{seed}" / source / name
    if not (kept / "accuracies.json").exists():
        dials = dict(style=world.STYLE, diffusion=common.DIGITS_SD)
        shared, own = (compare.Comparison(16, images, seed, o, **dials) for o in (out / f"s{seed}", kept))
        if name in LABELS:
            drawn = shared.run(compare.TEXT if name == compare.TEXT else SEED)[1].parent
            settings = dict(labels=LABELS[name], synthetic=str(drawn))
        with mock.patch.object(nn, "BatchNorm2d", batch_norm(source)):
            if name in LABELS:
                scores = compare.run(dreamda, kept, **own.plain, **settings)
            else:
                scores, *_ = own.run(name)
        common.write_file(
            kept / "accuracies.json", [100 * scores[split]["top1"] for split in ("test", "test_ood")]
        )
    return common.read_file(kept / "accuracies.json")


def main(args: Args) -> None:
    out = Path(args.out)
    lines = ["| images and labels | statistics of | val | val, uncommon | mean |", "|---" * 5 + "|"]
    with mock.patch.object(world, "splits", tune.validation_splits):
        for name, source in ROWS:
            found = [accuracies(name, source, seed, out, args.images) for seed in tune.seeds_of(args)]
            val, uncommon = np.array(found).T
            texts = [" ".join(f"{v:.1f}" for v in values) for values in (val, uncommon)]
            lines.append(f"| {name} | {source} | {' | '.join(texts)} | {np.mean(found):.1f} |")
    common.write_file(out / "batch_norm.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    common.cli(main, Args)
