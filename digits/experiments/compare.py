"""Compares all methods on digits: the same real images, classifier, number of images drawn, and steps.

    python digits/experiments/compare.py                             8 to 64 images per class, five seeds
    python digits/experiments/compare.py --per_class 16 --seeds 1    twenty minutes of one core
    python digits/experiments/compare.py --per_class 16 --cells 0/0 0/0.65 0.45/0 0.45/0.65     when it pays

Every classifier is trained by the recipe of digits for about --steps steps of 8 images. A method draws about
IMAGES images. A cell CONFUSION/STYLE is a world: the share of captions in which the generator learned a
look-alike's name, and how far the target differs from the generator's images. A generator that does not exist
yet is trained by pretrain.py, in 20 to 40 minutes of one core.

Real Guidance, DA-Fusion, plain text-to-image and DreamDA by its sources' labels differ in images alone: a
step takes 3 real and 5 synthetic images, or 8 real ones. ActGen and DIAGen train as their papers say.
DA-Fusion and DIAGen share their learned tokens.

What stands in results.json in --out is not run again. The same command, started twice, shares the work: a
process passes over the runs of a seed that another one is at. Writes compare.md and, the accuracy over the
real images per class, compare.png.
"""

import contextlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from transformers.hf_argparser import HfArg, HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402
from digits import judge, pretrain  # noqa: E402

REAL, SYNTHETIC = 3, 5  # images of a batch
IMAGES = 960  # synthetic images of all classes together
BASE = "standard augmentation"  # gains are differences to its accuracy, seed by seed
SHARED = common.DIGITS | dict(
    dataset="digits", pretrained=False, head_lr=1.0, baseline=False, eval_every=10_000
)
MADE = {0.0: common.DIGITS_CLEAN, pretrain.CONFUSION: common.DIGITS_SD}  # generators by their confusion


@dataclass
class Args:
    """The numbers of images, seeds and worlds to compare the methods at."""

    per_class: list[int] = HfArg(default_factory=lambda: [8, 16, 32, 64], help="real images per class")
    steps: int = HfArg(default=4800, help="training steps of each classifier")
    seeds: int = HfArg(default=5, help="number of seeds")
    first_seed: int = HfArg(default=0, help="the first of the seeds")
    cells: list[str] = HfArg(default_factory=lambda: ["0.45/0.65"], help="worlds, CONFUSION/STYLE")
    out: str = HfArg(default="runs/compare", help="folder of the runs, the numbers and the tables")


def generator_of(confusion: float, out: Path) -> str:
    """The folder of the generator of this confusion, which is trained if there is none."""
    if confusion in MADE:
        return MADE[confusion]
    folder = out / f"sd-p{confusion:g}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".training"):
        if not (folder / "sd" / "model_index.json").exists():
            paths = dict(folder=str(folder), out=str(folder / "training"))
            pretrain.train(pretrain.Args(start=common.DIGITS_CLEAN, confusion=confusion, **paths))
    return str(folder / "sd")


class Comparison:
    """The methods on k real images per class, in one world, with one random seed.

    A method takes its name and its script's arguments; it returns its scores and its images' folder, or None.
    """

    def __init__(self, k: int, confusion: float, style: float, seed: int, out: Path, steps: int = 4800):
        self.k, self.steps, self.style, self.out = k, steps, style, out
        self.M = max(1, IMAGES // (10 * k))  # synthetic images of each real one
        self.draw = SHARED | dict(seed=seed, examples_per_class=k, style=style)
        self.draw["diffusion"] = generator_of(confusion, out.parent)
        epochs = max(1, round(steps * SYNTHETIC / (10 * k * self.M)))
        self.plain = self.draw | dict(variations=self.M, epochs=epochs, batch_size=REAL, unlabelled=0)
        self.plain |= dict(synthetic_ratio=SYNTHETIC / REAL, auxiliary_lr=1.0, burn_in=0.5, threshold=0.5)

    def run(self, script, folder: str, **arguments) -> dict:
        """The scores of the last classifier of a script's run. A finished run is read, not repeated."""
        args = script.METHOD.arguments(**arguments, out=str(self.out / folder))
        return [*common.run_once(script.METHOD, args, common.make_accelerator()).values()][-1]

    def real(self, name: str, **changes):
        """Training on the real images alone."""
        return self.run(dreamda, name, **self.plain | changes, real_only=True), None

    def img2img(self, name: str, **changes):
        """Methods that differ in their images alone: DIAGen's script draws them, DreamDA's trains on them."""
        source = f"{name}, images"
        short = dict(variations=self.M, epochs=1, iterations=1)
        self.run(diagen, source, **self.draw | short | changes)
        scores = self.run(dreamda, name, **self.plain, labels="seed", synthetic=str(self.out / source))
        return scores, self.out / source

    def actgen(self, name: str, **changes):
        """ActGen. In the first half of its epochs it draws images and sees ever more of them."""
        n, real, seen = 10 * self.k * self.M, 10 * self.k, self.steps * (REAL + SYNTHETIC)
        half = min(n, round((seen + n / 2) / (2 * real + 1.5 * n)))
        steps = dict(epochs=2 * half, images_per_epoch=n // half, batch_size=REAL + SYNTHETIC)
        return self.run(actgen, name, **self.draw | steps | changes), self.out / name

    def dreamda(self, name: str, labels: str):
        """DreamDA by its sources' labels, or by others on the same images."""
        source = self.out / SOURCES
        given = {} if name == SOURCES else {"synthetic": str(source)}
        return self.run(dreamda, name, **self.plain | given, labels=labels), source

    def diagen(self, name: str, **changes):
        """DIAGen, with DA-Fusion's tokens."""
        steps = dict(epochs=20, iterations=self.steps // 20, batch_size=REAL + SYNTHETIC, eval_every=1)
        steps |= dict(synthetic_probability=SYNTHETIC / (REAL + SYNTHETIC), variations=self.M)
        steps |= dict(embeddings=str(self.out / "DA-Fusion, images"))
        return self.run(diagen, name, **self.draw | steps | changes), self.out / name

    def numbers(self, name: str) -> dict[str, float]:
        """The numbers of a method's run: accuracies in %, what its images are like, seconds."""
        method, changes = METHODS[name]
        scores, folder = method(self, name, **changes)
        found = {split: 100 * scores[split]["top1"] for split in ("test", "test_ood")}
        found["training"] = scores["training"]
        if folder:
            made = [*common.read_file(folder / "result.json").values()][-1]
            found["generation"] = made["generation"]
            accelerator = common.make_accelerator()
            data = common.load_data("digits", "", 32, style=self.style)
            records = common.read_records(folder / "synthetic", data.class_names)
            images = common.images_of(records, folder / "synthetic", data.test.transform)
            distances, _ = judge.distances_to_test(images, data, accelerator)
            found |= {"FID": distances["fid"], "right digit": 100 * distances["oracle"]}
        return {key: round(float(value), 3) for key, value in found.items()}


SOURCES = "DreamDA, sources' labels"
METHODS = {  # a method runs after those above it
    BASE: (Comparison.real, {}),
    "RandAugment": (Comparison.real, dict(augment="digits+randaugment")),
    "no label smoothing": (Comparison.real, dict(label_smoothing=0.0)),
    "plain text-to-image": (Comparison.img2img, dict(method="real_guidance", strength=[1.0])),
    "Real Guidance": (Comparison.img2img, dict(method="real_guidance")),
    "DA-Fusion": (Comparison.img2img, dict(method="da_fusion")),
    "DIAGen": (Comparison.diagen, {}),
    SOURCES: (Comparison.dreamda, dict(labels="seed")),
    "DreamDA, AMST": (Comparison.dreamda, dict(labels="amst")),
    "DreamDA, true labels": (Comparison.dreamda, dict(labels="truth")),  # what the best labels would bring
    "ActGen": (Comparison.actgen, {}),
}


def compare(args: Args, store: Path) -> dict[tuple, dict[str, list]]:
    """By cell, real images per class and method: the numbers of the seeds that have all methods.

    Runs what `store` lacks, unless another process is at it.
    """
    found, seeds = {}, range(args.first_seed, args.first_seed + args.seeds)
    for cell, seed, k in itertools.product(args.cells, seeds, args.per_class):
        confusion, style = map(float, cell.split("/"))
        out = Path(args.out, f"p{confusion:g}-g{style:g}-{k}-per-class-{args.steps}-steps-s{seed}")
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout), FileLock(out / ".comparing", blocking=False):
            for name in METHODS:
                if (key := f"{args.steps} {cell} {k} {seed} {name}") not in common.read_file(store, {}):
                    numbers = Comparison(k, confusion, style, seed, out, args.steps).numbers(name)
                    with FileLock(f"{store}.lock"):
                        common.write_file(store, common.read_file(store, {}) | {key: numbers})
    kept = common.read_file(store, {})
    for cell, k, seed in itertools.product(args.cells, args.per_class, seeds):
        runs = {name: kept.get(f"{args.steps} {cell} {k} {seed} {name}") for name in METHODS}
        for name, run in runs.items() if all(runs.values()) else ():
            for key, value in run.items():
                found.setdefault((cell, k, name), {}).setdefault(key, []).append(value)
    return found


def table(found: dict[tuple, dict[str, list]]) -> list[str]:
    """A table per cell: test / test_ood of BASE, and the other methods' gains over BASE, seed by seed.

    They are means with 95 % intervals; the last columns are means over all runs.
    """
    lines, about = [], ["right digit", "FID"]
    for cell in dict.fromkeys(cell for cell, _, _ in found):
        sizes = [k for c, k, name in found if (c, name) == (cell, BASE)]
        columns = [f"cell {cell}", *(f"{k} per class" for k in sizes), *about]
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name in METHODS:
            cells, runs = [name], [found[cell, k, name] for k in sizes]
            for k in sizes:
                base, own = ([found[cell, k, n][s] for s in ("test", "test_ood")] for n in (BASE, name))
                gains = own if name == BASE else np.subtract(own, base)
                cells.append(" / ".join(common.interval_text(gain, "+" * (name != BASE)) for gain in gains))
            known = {key: [v for run in runs for v in run.get(key, [])] for key in about}
            cells += [f"{np.mean(values):.0f}" if values else "" for values in known.values()]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(found: dict[tuple, dict[str, list]], path: Path) -> None:
    """Draws accuracies over the real images per class: a line a method, a row of panels a cell."""
    worlds = list(dict.fromkeys(cell for cell, _, _ in found))
    figure = Figure(figsize=(10, 4 * len(worlds)), layout="constrained")
    panels = figure.subplots(len(worlds), 2, squeeze=False)
    for (row, cell), (column, split) in itertools.product(enumerate(worlds), enumerate(("test", "test_ood"))):
        axes = panels[row, column]
        for i, name in enumerate(METHODS):
            points = [(k, np.mean(run[split])) for (c, k, n), run in found.items() if (c, n) == (cell, name)]
            style = "k--" if name == BASE else f"C{i % 10}o-"
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.2, markersize=4)
        axes.set(xlabel="real images per class", ylabel=f"{split} accuracy (%)", title=f"cell {cell}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    out = Path(args.out)
    if found := compare(args, out / "results.json"):
        lines = table(found)
        common.write_file(out / "compare.md", "\n".join(lines) + "\n")
        draw(found, out / "compare.png")
        print("\n".join(lines))


if __name__ == "__main__":
    about = __doc__.split("\n")[0]
    main(*HfArgumentParser(Args, description=about, allow_abbrev=False).parse_args_into_dataclasses())
