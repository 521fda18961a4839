"""Compares all methods on the same digits: the same real images, classifier, number of images and of steps.

    python digits/experiments/compare.py                             4, 16, 64 images per class, five seeds
    python digits/experiments/compare.py --per_class 16 --seeds 1    a quarter of an hour on two cores
    python digits/experiments/compare.py --per_class 4 --images 0 40 160 640 --seeds 3   draws the figure, too

Every classifier is the small CNN with the weights that digits/pretrain.py learned without labels. All of it
learns, for about 600 steps of 24 images, by AdamW at a learning rate of 1e-3. A method makes --images
synthetic images for each draw of real ones.

CutMix (Yun et al. 2019), label smoothing, a last layer that learns faster, RandAugment and smaller batches
need no generator: what any user would try first. Nor do AMST's heads alone: DreamDA's classifier without its
images. With --label_smoothing 0.1 or --head_lr 16 all classifiers are trained so, those of the methods as
well.

Real Guidance and DA-Fusion run as published and at DIAGen's settings. They, random text-to-image, and DreamDA
without AMST differ in their images alone. A step takes 8 real images and 16 synthetic ones, in training
without synthetic images 24 real ones. ActGen, DreamDA and DIAGen train as their papers say. ActGen is its
few-shot variant, and has as many epochs as make about 600 steps of all its images. Of DIAGen's 24 images a
step two in three are synthetic, and its classifier is the best of 30 epochs on the validation split.

The seconds in the table are medians. Those of generation leave out Textual Inversion, because DA-Fusion and
DIAGen share their tokens. A run is kept in --out and never repeated, so the command goes on where it was
stopped, and several processes can share the work, each with a --first_seed of its own. The numbers of all
runs are collected in --results; what stands there is not run again. compare.md and, for several numbers of
images, the figure compare.png are written to --out.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402
from digits import judge, world  # noqa: E402

STEPS, REAL, SYNTHETIC = 600, 8, 16  # training steps; real and synthetic images of a batch
PLAIN, TEXT = "real images alone", "random text-to-image"
BASE = "standard augmentation"  # gains are differences to its accuracy, seed by seed
SMOOTHING, HEAD = "label smoothing", "faster last layer"  # need no generator: what a method's gain is worth
HEADS = "AMST's heads alone"  # what AMST's labels are worth
DIALS = ("style", "diffusion", "label_smoothing", "head_lr")  # arguments that hold for all methods
SHARED = dict(dataset="digits", classifier="small_cnn", pretrained=True, baseline=False)
SHARED |= dict(optimizer="adamw", lr=1e-3, head_lr=1.0)


@dataclass
class Args:
    """The numbers of images and seeds to compare the methods at."""

    per_class: list[int] = HfArg(default_factory=lambda: [4, 16, 64], help="real images per class")
    images: list[int] = HfArg(default_factory=lambda: [640], help="synthetic images, all classes together")
    seeds: int = HfArg(default=5, help="number of seeds")
    first_seed: int = HfArg(default=0, help="the first of the seeds")
    style: float = HfArg(default=world.STYLE, help="the target's style, 0 to 1")
    diffusion: str = HfArg(default=common.DIGITS_SD, help="folder of the generator")
    label_smoothing: float = common.number("[0, 1)", "label smoothing of all trainings", 0.0)
    head_lr: float = common.number("(0, 1000]", "learning rate of all last layers, in multiples of --lr", 1.0)
    out: str = HfArg(default="runs/compare", help="folder of the runs and the tables")
    results: str = HfArg(default="", help="file of the numbers of all runs; '': results.json in --out")


def run(script, out: Path, **arguments) -> dict:
    """The scores of the last classifier of a script's run in `out`. A finished run is read, not repeated."""
    args = script.resolve(script.Args(**SHARED | arguments, out=str(out)))
    return list(script.run_once(args, common.make_accelerator()).values())[-1]


def train_with_cutmix(out: Path, **arguments) -> dict:
    """The scores of a classifier that is trained on the real images alone, with CutMix."""
    from torchvision.transforms.v2 import CutMix

    if not (out / "result.json").exists():
        args = dreamda.resolve(dreamda.Args(**SHARED | arguments, out=str(out)))
        accelerator, data = common.make_accelerator(), common.data_of(args)
        net, model, optimizer = common.new_classifier(args, accelerator, data.class_names)
        size = REAL + SYNTHETIC
        loader = common.Loader(data.train, size, accelerator, samples=STEPS * size).shuffle(args.seed, 0)
        cutmix, clock = CutMix(num_classes=len(data.class_names)), time.time()
        for step, (x, y) in enumerate(loader):
            x, y = cutmix(x, y)
            common.set_lr(optimizer, args.lr * common.cosine(step / STEPS, args.warmup))
            loss = F.cross_entropy(model(x), y, label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = {"training": time.time() - clock}
        common.write_file(out / "result.json", common.evaluate(net, data, accelerator) | seconds)
    return common.read_file(out / "result.json")


def train_heads(out: Path, **arguments) -> dict:
    """The scores of AMST's classifier if all its heads learn from the real images alone."""
    args = dreamda.resolve(dreamda.Args(**SHARED | arguments, out=str(out)))
    run = common.Run(args, accelerator := common.make_accelerator())
    if not (result := run.result()):
        run.begin()
        scores, *_ = dreamda.train(args, run, accelerator, common.data_of(args), None, "amst")
        result = run.finish({HEADS: scores})
    return result[HEADS]


class Comparison:
    """The methods on k real images per class and about `images` synthetic ones, in the world of the dials.

    out: folder of the runs; dials: those of DIALS

    A method is called with its name and what to change in its settings. It returns its scores, the folder of
    its synthetic images or None, and the seconds of their generation.
    """

    def __init__(self, k: int, images: int, seed: int, out: Path, **dials):
        self.k, self.images, self.seed, self.out = k, images, seed, out
        self.draw = dict(seed=seed, examples_per_class=k, **dials)
        self.M = max(1, images // (10 * k))  # variations of a real image
        epochs = STEPS // math.ceil(10 * k * self.M / SYNTHETIC)
        self.plain = self.draw | dict(variations=self.M, batch_size=REAL, eval_every=1000, epochs=epochs)

    def run(self, name: str, **changes):
        """The result of a method of METHODS, some of its settings changed."""
        method, settings = METHODS[name]
        return method(self, name, **settings | changes)

    def tokens(self) -> str:
        """The folder of the run whose learned tokens DA-Fusion and DIAGen share."""
        return str(self.out / "DA-Fusion, images")

    def real(self, name: str, **changes):
        """Training on the real images alone."""
        if changes.pop("small_batch", False):  # 4 real images, and 4 in the place of synthetic ones
            epochs = max(1, round(STEPS / (10 * self.k * self.M // 4)))
            changes |= dict(batch_size=4, synthetic_ratio=1.0, epochs=epochs)
        return run(dreamda, self.out / name, **self.plain | changes, real_only=True), None, 0.0

    def cutmix(self, name: str, **changes):
        """The same with CutMix."""
        torch.manual_seed(self.seed)
        return train_with_cutmix(self.out / name, **self.plain | changes), None, 0.0

    def heads(self, name: str, **changes):
        """AMST's heads, in as many steps, of 16 real images each."""
        return train_heads(self.out / name, **self.plain | changes), None, 0.0

    def img2img(self, name: str, **changes):
        """Methods that differ in their images alone: DIAGen's script makes them, DreamDA's trains on them."""
        source = self.out / f"{name}, images"
        if changes["method"] == "da_fusion_published":
            changes = dict(embeddings=self.tokens()) | changes
        made = run(diagen, source, **self.draw | changes, variations=self.M, epochs=1, iterations=1)
        scores = run(dreamda, self.out / name, **self.plain, labels="seed", synthetic=str(source))
        return scores, source / "synthetic", made["generation"]

    def actgen(self, name: str, **changes):
        """ActGen, few-shot: all real images are guides. In the first half it sees ever more variants."""
        k, n, all_seen = self.k, self.images, STEPS * (REAL + SYNTHETIC)
        half = min(n, round((all_seen + 0.5 * n) / (20 * k + 1.5 * n)))  # of the epochs; it draws in each
        size = round((20 * k * half + n * (1.5 * half - 0.5)) / STEPS)
        steps = dict(epochs=2 * half, images_per_epoch=n // half, batch_size=size, eval_every=1000)
        scores = run(actgen, self.out / name, **self.draw | changes, **steps)
        return scores, self.out / name / "synthetic", scores["generation"]

    def dreamda(self, name: str, **changes):
        """DreamDA by seed labels, or by AMST on the images that it then has already."""
        source = Path(changes.get("synthetic", self.out / "DreamDA, seed labels"))
        if changes["labels"] != "seed":
            changes["synthetic"] = str(source)
        scores = run(dreamda, self.out / name, **self.plain | changes)
        made = common.read_file(source / "result.json")["seed labels"]["generation"]
        return scores, source / "synthetic", made

    def diagen(self, name: str, **changes):
        """DIAGen, with DA-Fusion's tokens."""
        share = SYNTHETIC / (REAL + SYNTHETIC)
        steps = dict(epochs=30, iterations=STEPS // 30, batch_size=REAL + SYNTHETIC)
        settings = dict(variations=self.M, synthetic_probability=share, embeddings=self.tokens()) | steps
        scores = run(diagen, self.out / name, **self.draw | settings | changes)
        return scores, self.out / name / "synthetic", scores["generation"]


METHODS = {  # a method runs after those above it
    PLAIN: (Comparison.real, dict(augment="none")),
    BASE: (Comparison.real, {}),
    f"{BASE}, 8 images a step": (Comparison.real, dict(small_batch=True)),
    "RandAugment": (Comparison.real, dict(augment="digits+randaugment")),
    "CutMix": (Comparison.cutmix, {}),
    SMOOTHING: (Comparison.real, dict(label_smoothing=0.1)),
    HEAD: (Comparison.real, dict(head_lr=16.0)),
    HEADS: (Comparison.heads, {}),
    TEXT: (Comparison.img2img, dict(method="real_guidance", strength=[1.0])),
    "Real Guidance, as published": (Comparison.img2img, dict(method="real_guidance_published")),
    "Real Guidance": (Comparison.img2img, dict(method="real_guidance")),
    "DA-Fusion": (Comparison.img2img, dict(method="da_fusion")),
    "DA-Fusion, as published": (Comparison.img2img, dict(method="da_fusion_published")),
    "ActGen": (Comparison.actgen, dict(few_shot=True)),
    "DreamDA, seed labels": (Comparison.dreamda, dict(labels="seed")),
    "DreamDA": (Comparison.dreamda, dict(labels="amst")),
    "DreamDA, true labels": (Comparison.dreamda, dict(labels="truth")),  # what the best labels would bring
    "DIAGen": (Comparison.diagen, {}),
}
WITHOUT_IMAGES = [n for n, (method, _) in METHODS.items() if method.__name__ in ("real", "cutmix", "heads")]


def distances(folder: Path, style: float) -> dict[str, float]:
    """The distances of a folder's images to the real test images; see judge.distances_to_test."""
    accelerator, data = common.make_accelerator(), common.load_data("digits", "", 32, "none", style=style)
    images = common.images_of(common.read_records(folder, data.class_names), folder, data.test.transform)
    return judge.distances_to_test(images, data, accelerator)[0]


def suffix(head_lr: float, smoothing: float = 0.0) -> str:
    """What a folder's name says of how all its classifiers are trained; nothing if as usual."""
    return (f"-smoothing{smoothing:g}" if smoothing else "") + (f"-head{head_lr:g}" if head_lr != 1 else "")


def key_of(folder: Path, name: str) -> str:
    """The key of a method's run in the file of all numbers; folder: that of the seed's runs."""
    return f"{folder.name}: {name}"


def results_of(
    k: int, images: int, seed: int, folder: Path, store: Path, names: list[str] | None = None, **dials
) -> dict[str, dict]:
    """The numbers of a seed's runs, by method: accuracies in %, distances, seconds.

    store: a file of the numbers of all runs, by the name of their folder and the method; those that are there
        are read, the others are added
    names: of METHODS; without them all, or, if there are to be no synthetic images, those that need none.
        HEAD and SMOOTHING are left out if the dials give them to all methods: then they are BASE.
    """
    results, comparison = {}, Comparison(k, images, seed, folder, **dials)
    equal_to_base = [name for name in (SMOOTHING, HEAD) if METHODS[name][1].items() <= dials.items()]
    for name in names or (METHODS if images else WITHOUT_IMAGES):
        if name in equal_to_base:
            continue
        key = key_of(folder, name)
        if key not in common.read_file(store, {}):
            scores, synthetic, generation = comparison.run(name)
            numbers = {split: 100 * scores[split]["top1"] for split in ("test", "test_ood")}
            numbers |= {"generation": generation, "training": scores["training"]}
            numbers |= distances(synthetic, dials["style"]) if synthetic else {}
            numbers = {key: round(float(value), 4) for key, value in numbers.items()}
            with FileLock(f"{store}.lock"):
                common.write_file(store, common.read_file(store, {}) | {key: numbers})
        results[name] = common.read_file(store)[key]
    return results


def main(args: Args) -> None:
    out, rows = Path(args.out), {}
    store = Path(args.results or out / "results.json")
    for k in args.per_class:
        for images in args.images:
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                trained = suffix(args.head_lr, args.label_smoothing)
                folder = out / f"{k}-per-class-{images}-images{trained}-s{seed}"
                dials = {name: getattr(args, name) for name in DIALS}
                for name, result in results_of(k, images, seed, folder, store, **dials).items():
                    rows.setdefault((k, images, name), []).append(result)
    lines = [line for k in args.per_class for line in table(rows, k, max(args.images))]
    common.write_file(out / "compare.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    if len(args.images) > 1:
        draw(rows, args, out / "compare.png")


def table(rows: dict, k: int, images: int) -> list[str]:
    """The lines of a table with a row for each method. Its gains over BASE are paired seed by seed.

    rows[k, images, method]: the results of the seeds; see results_of
    """
    found = {name: runs for (of, n, name), runs in rows.items() if (of, n) == (k, images)}
    columns = "method, test, gain, test_ood, gain, FID, precision, recall, right digit, generation, training"
    columns = columns.split(", ")
    lines = [f"\n{k} real images per class, {images} synthetic ones, {len(found[BASE])} seeds\n"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in found.items():
        cells = [name]
        for split in ("test", "test_ood"):
            values, base = ([run[split] for run in found[m]] for m in (name, BASE))
            gain = common.interval_text(np.subtract(values, base), "+") if name != BASE else ""
            cells += [common.interval_text(values), gain]
        for key, digits in (("fid", 1), ("precision", 2), ("recall", 2), ("oracle", 2)):
            cells.append(f"{np.mean([run[key] for run in runs]):.{digits}f}" if key in runs[0] else "")
        cells += [f"{np.median([run[key] for run in runs]):.0f}" for key in ("generation", "training")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(rows: dict, args: Args, path: Path) -> None:
    """Draws accuracy over the number of synthetic images: a line for each method, a panel for each split."""
    from matplotlib.figure import Figure

    k = args.per_class[-1]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, split in zip(figure.subplots(1, 2), ("test", "test_ood"), strict=True):
        for name in dict.fromkeys(m for of, n, m in rows if of == k and n > 0):
            if name in (PLAIN, BASE):
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
