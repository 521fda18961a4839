"""Tries four settings or more of every method on validation data.

    python digits/experiments/tune.py                   hours of one core; a run is kept, never repeated
    python digits/experiments/tune.py --methods ActGen --first_seed 100 --seeds 1

The methods run as in compare.py, on 16 real images per class and with random seeds that no table uses. They
are judged on the digits of the split `val`: in their classes' common settings, as `test` has them, and in
the uncommon one, as `test_ood` has them. The digits of `test` and `test_ood` are not seen. A setting is as
good as the mean of both accuracies. Prints a table and writes it to --out, as tune.md.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: E402
from digits import world  # noqa: E402
from digits.experiments import compare  # noqa: E402

EDITS = [
    dict(strength=[strength], guidance_scale=scale)
    for strength, scale in ((0.3, 4.0), (0.5, 4.0), (0.5, 7.5), (0.7, 4.0))
]
VARIATIONS = [
    dict(noise_scale=noise, guidance_scale=scale)
    for noise, scale in ((3.0, 4.0), (6.0, 4.0), (12.0, 4.0), (24.0, 4.0))
]
FAST = dict(head_lr=16.0)  # tried last, for the methods of dreamda.py
LONG = dict(epochs=30)  # twice as many, for these, too
SOURCE, IMAGES = "DreamDA, seed labels", ("noise_scale", "guidance_scale")  # what DreamDA's images depend on
TRIALS = {
    compare.BASE: [
        {},
        dict(small_batch=True),
        dict(lr=3e-4),
        dict(augment="digits+randaugment"),
        LONG,
        FAST,
        FAST | LONG,
    ],
    compare.TEXT: [dict(guidance_scale=scale) for scale in (1.0, 2.0, 4.0, 7.5)],
    SOURCE: [*VARIATIONS, VARIATIONS[2] | LONG, VARIATIONS[2] | FAST],
    "DreamDA": [
        VARIATIONS[2] | changes
        for changes in (
            dict(auxiliary_lr=1.0),
            dict(auxiliary_lr=16.0),
            dict(auxiliary_lr=16.0, auxiliary_weight=0.5),
            LONG,
            LONG | dict(burn_in=1.0),  # the heads alone, without their labels
            FAST | LONG,
        )
    ],
    "DreamDA, true labels": [VARIATIONS[2], VARIATIONS[2] | FAST],
    "DIAGen": EDITS,
    "DA-Fusion": EDITS,
    "Real Guidance": EDITS,
    "ActGen": [
        dict(guidance_centre=centre, guidance_scale=scale)
        for centre, scale in ((6.25, 7.5), (10.0, 4.0), (10.0, 7.5), (13.0, 7.5))
    ],
}


@dataclass
class Args:
    """The methods to tune, and the world to tune them in."""

    methods: list[str] = HfArg(default_factory=lambda: [*TRIALS], help="names of methods")
    images: int = HfArg(default=640, help="synthetic images, all classes together")
    seeds: int = HfArg(default=2, help="number of seeds")
    first_seed: int = HfArg(default=100, help="the first of the seeds")
    style: float = HfArg(default=world.STYLE, help="the target's style, 0 to 1")
    diffusion: str = HfArg(default=common.DIGITS_SD, help="folder of the generator")
    out: str = HfArg(default="runs/tune", help="folder of the runs and the table")


def validation_splits(style: float) -> dict:
    """The splits of the digits world, but `test` and `test_ood` show the digits of `val`."""
    real = REAL_SPLITS(style)
    uncommon = world.render_pool(world.pools()["train"][300:], 596, 104, "uncommon", style)
    images = [Image.fromarray(image) for image in uncommon["images"].numpy()]
    return real | {"test": real["val"], "test_ood": (images, uncommon["labels"].tolist())}


REAL_SPLITS = world.splits


def main(args: Args) -> None:
    out, rows = Path(args.out), []
    dials = dict(style=args.style, diffusion=args.diffusion)
    with mock.patch.object(world, "splits", validation_splits):
        for name in args.methods:
            for changes in TRIALS[name]:
                found = [trial(name, changes, seed, out, args.images, dials) for seed in seeds_of(args)]
                rows.append((name, changes, found))
    lines = ["| method | setting | val | val, uncommon | mean | right digit |", "|---" * 6 + "|"]
    for name, changes, found in rows:
        setting = ", ".join(f"{key} {np.squeeze(value)}" for key, value in changes.items())
        columns = np.array(found).T
        columns = [*columns[:2], columns[:2].mean(0), columns[2]]
        cells = [" ".join("" if math.isnan(v) else f"{v:.1f}" for v in column) for column in columns]
        lines.append(f"| {name} | {setting} | {' | '.join(cells)} |")
    common.write_file(out / "tune.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def seeds_of(args: Args) -> range:
    return range(args.first_seed, args.first_seed + args.seeds)


def trial(name: str, changes: dict, seed: int, out: Path, images: int, dials: dict) -> list[float]:
    """The accuracies on `val` in common and uncommon settings, and the share of right digits, in %.

    DA-Fusion and DIAGen have the same tokens in all their trials. AMST labels the images that DreamDA drew in
    the trial of the same noise and guidance, and a faster last layer learns from these.
    """

    def folder_of(name: str, changes: dict) -> Path:
        return out / f"s{seed}" / name.replace(" ", "-") / "-".join(f"{k}={v}" for k, v in changes.items())

    folder = folder_of(name, changes)
    kept, first = folder / "trial.json", compare.Comparison(16, images, seed, out / f"s{seed}", **dials)
    if not kept.exists():
        if name in ("DA-Fusion", "DIAGen"):
            first.run("DA-Fusion")
            changes = changes | dict(embeddings=first.tokens())
        drawn = {key: changes[key] for key in IMAGES if key in changes}
        if name.startswith("DreamDA") and (name, changes) != (SOURCE, drawn):
            trial(SOURCE, drawn, seed, out, images, dials)
            images_of = folder_of(SOURCE, drawn) / SOURCE
            changes = changes | dict(synthetic=str(images_of))
        scores, synthetic, _ = compare.Comparison(16, images, seed, folder, **dials).run(name, **changes)
        right = compare.distances(synthetic, dials["style"])["oracle"] if synthetic else math.nan
        common.write_file(
            kept, [100 * scores[split]["top1"] for split in ("test", "test_ood")] + [100 * right]
        )
    return common.read_file(kept)


if __name__ == "__main__":
    common.cli(main, Args)
