"""All methods on the same digits, one table: the same classifier, real images, synthetic images and steps.

    python tests/compare.py                                     4, 16 and 64 images per class, five seeds
    python tests/compare.py --per_class 16 --seeds 1            a quarter of an hour on two cores
    python tests/compare.py --per_class 4 --images 0 40 160 640 --seeds 3    the figure, too

Every classifier is the small CNN with the weights pretrained without labels (common.train_backbone), all of
it learning for 600 steps by AdamW at 1e-3. `images` synthetic ones are made for each draw of real ones.
Random text-to-image, Real Guidance, DA-Fusion and DreamDA without AMST differ in their images only: a step
takes 16 real images, as without synthetic ones, and 32 synthetic ones. ActGen, DreamDA and DIAGen train as
their papers say, ActGen with the batch size that makes 600 steps of its 40 epochs, DIAGen on 48 draws a step,
the best of 30 epochs on the validation split. Seconds are medians; those of generation are without Textual
Inversion, whose tokens DA-Fusion and DIAGen share. Runs are kept in --out and not repeated, so the command
goes on where it was stopped, and several processes can share the work by --first_seed. Writes compare.json,
compare.md and, with several numbers of images, compare.png there.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402

STEPS, REAL, SYNTHETIC = 600, 16, 32  # training steps; images of a batch
BASE = "standard augmentation"  # what gains are counted from, seed by seed
SHARED = dict(
    dataset="digits", classifier="small_cnn", pretrained=True, optimizer="adamw", lr=1e-3, baseline=False
)


@dataclass
class Args:
    """What is compared."""

    per_class: list[int] = HfArg(default_factory=lambda: [4, 16, 64], help="real images per class")
    images: list[int] = HfArg(default_factory=lambda: [640], help="synthetic images, all classes")
    seeds: int = HfArg(default=5, help="seeds")
    first_seed: int = HfArg(default=0, help="the first of them")
    out: str = HfArg(default="runs/compare", help="where runs and tables are kept")


def run(script, out: Path, **arguments) -> dict:
    """The scores of the last classifier of a script's run; finished runs are read."""
    args = script.resolve(script.Args(**SHARED | arguments, out=str(out)))
    return list(script.run_once(args, common.make_accelerator()).values())[-1]


def methods(k: int, images: int, seed: int, out: Path) -> dict:
    """Name: (scores, folder of the synthetic images, seconds of generation) for k real images per class."""
    draw = dict(seed=seed, examples_per_class=k)
    M = max(1, images // (10 * k))
    epochs = STEPS // math.ceil(10 * k * M / SYNTHETIC)
    plain = draw | dict(variations=M, batch_size=REAL, eval_every=1000, epochs=epochs)
    found = {}
    for name, changes in (("real images alone", dict(augment="none")), (BASE, {})):
        scores = run(dreamda, out / name, **plain, real_only=True, **changes)
        found[name] = scores, None, 0.0
    if not images:
        return found

    once = draw | dict(variations=M, epochs=1, iterations=1)  # for its images
    for name, changes in {
        "random text-to-image": dict(method="real_guidance", strength=1.0),
        "Real Guidance": dict(method="real_guidance"),
        "DA-Fusion": dict(method="da_fusion"),
    }.items():
        made = run(diagen, out / f"{name}, images", **once, **changes)
        source = out / f"{name}, images"
        scores = run(dreamda, out / name, **plain, labels="seed", synthetic=str(source))
        found[name] = scores, source / "synthetic", made["generation"]

    epochs, half = 40, 20
    seen = 10 * k * (epochs - 0.2 * half) + images * (1.5 * half - 0.5)
    scores = run(
        actgen, out / "ActGen", **draw, epochs=epochs, images_per_epoch=images // half, eval_every=1000,
        batch_size=round(seen / STEPS),
    )  # fmt: skip
    found["ActGen"] = scores, out / "ActGen" / "synthetic", scores["generation"]
    scores = run(dreamda, out / "DreamDA, seed labels", **plain, labels="seed")
    found["DreamDA, seed labels"] = scores, out / "DreamDA, seed labels" / "synthetic", scores["generation"]
    amst = run(dreamda, out / "DreamDA", **plain, synthetic=str(out / "DreamDA, seed labels"))
    found["DreamDA"] = amst, out / "DreamDA, seed labels" / "synthetic", scores["generation"]
    scores = run(
        diagen, out / "DIAGen", **draw, variations=M, epochs=30, iterations=STEPS // 30,
        embeddings=str(out / "DA-Fusion, images"),
        batch_size=REAL + SYNTHETIC, frozen=False, synthetic_probability=SYNTHETIC / (REAL + SYNTHETIC),
    )  # fmt: skip
    found["DIAGen"] = scores, out / "DIAGen" / "synthetic", scores["generation"]
    return found


def distances(folder: Path) -> dict[str, float]:
    """FID, precision, recall of a folder's images against the real test images, in the oracle's features."""
    accelerator, data = common.make_accelerator(), common.load_data("digits", "", 32, "none")
    records = common.read_records(folder, data.class_names)
    sources = [folder / r["file_name"] for r in records]
    images = common.Images(sources, [r["label"] for r in records], data.test.transform)
    return common.distances_to_test(images, data, accelerator)[0]


def main(args: Args) -> None:
    out, rows = Path(args.out), {}
    for k in args.per_class:
        for images in args.images:
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                folder = out / f"{k}-per-class-{images}-images-s{seed}"
                for name, (scores, synthetic, generation) in methods(k, images, seed, folder).items():
                    row = {s: 100 * scores[s]["top1"] for s in ("test", "test_ood")}
                    row |= {"generation": generation, "training": scores["training"]}
                    if synthetic:
                        cache = folder / f"{name}, distances.json"
                        if not cache.exists():
                            common.write_whole(cache, json.dumps(distances(synthetic)))
                        row |= json.loads(cache.read_text())
                    rows.setdefault((k, images, name), []).append(row)
    common.write_whole(
        out / "compare.json",
        json.dumps(
            [{"per_class": k, "images": n, "method": m, "runs": r} for (k, n, m), r in rows.items()], indent=1
        ),
    )

    lines = [line for k in args.per_class for line in table(rows, k, max(args.images))]
    common.write_whole(out / "compare.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    if len(args.images) > 1:
        draw(rows, args, out / "compare.png")


def table(rows: dict, k: int, images: int) -> list[str]:
    """The lines of a table: a row per method, gains paired with BASE seed by seed."""
    found = {name: runs for (of, n, name), runs in rows.items() if (of, n) == (k, images)}
    columns = (
        "method, test, gain, test_ood, gain, FID, precision, recall, generation (s), training (s)".split(", ")
    )
    lines = [f"\n{k} real images per class, {images} synthetic ones, {len(found[BASE])} seeds\n"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in found.items():
        cells = [name]
        for split in ("test", "test_ood"):
            values, base = ([run[split] for run in found[m]] for m in (name, BASE))
            gain = common.interval_text(np.subtract(values, base), "+") if name != BASE else ""
            cells += [common.interval_text(values), gain]
        for key, digits in (("fid", 1), ("precision", 2), ("recall", 2)):
            cells.append(f"{np.mean([run[key] for run in runs]):.{digits}f}" if key in runs[0] else "")
        cells += [f"{np.median([run[key] for run in runs]):.0f}" for key in ("generation", "training")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(rows: dict, args: Args, path: Path) -> None:
    """Accuracy over the number of synthetic images, a line per method, a panel per split."""
    from matplotlib.figure import Figure

    k = args.per_class[-1]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, split in zip(figure.subplots(1, 2), ("test", "test_ood"), strict=True):
        for name in dict.fromkeys(m for of, n, m in rows if of == k and n > 0):
            if name in ("real images alone", BASE):
                continue
            at = {n: r for (of, n, m), r in rows.items() if (of, m) == (k, name)}
            if 0 in args.images:
                at = {0: rows[k, 0, BASE]} | at
            axes.plot([*at], [np.mean([row[split] for row in r]) for r in at.values()], "o-", label=name)
        axes.set(xlabel=f"synthetic images, {k} real ones per class", ylabel=f"{split} accuracy (%)")
        axes.set_xscale("symlog", linthresh=min(n for n in args.images if n))
        axes.set_xticks(args.images, [str(n) for n in args.images])
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    common.cli(main, Args)
