"""Maps when each method pays: its gain over how well the generator knows the classes, the style, the digits.

    python digits/experiments/map.py                 hours; a run is kept and never repeated
    python digits/experiments/map.py --seeds 1 --confusions 0 0.45 --styles 0 0.65 --varieties 898

A cell of the map is a world: a generator whose captions name the look-alike with probability p (confusion),
and a target that differs from its images by the strength g (style). For every cell compare.py's methods run
on 16 real images per class. The generators of the map know all 898 digits of the web pool. A row of further
cells, at the default world's confusion and style, has generators that know fewer (variety). Those that are
missing are trained by pretrain.py, in 20 to 40 minutes of one core each. With --head_lr 16 the last layers of
all classifiers learn 16 times as fast as the rest.

The numbers of all runs are collected in --results; what stands there is not run again. Those of RESULTS.md
are in map.json beside this script; `--results digits/experiments/map.json` goes on from them. Writes to
--out: map.png, a heat map of the gain over standard augmentation for each method, and map.md, which also has
the share of right digits and the FID. The first two heat maps are controls that need no images.
"""

import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: E402
from digits import pretrain, world  # noqa: E402
from digits.experiments import compare  # noqa: E402

OTHERS = [*compare.WITHOUT_IMAGES, *(n for n in compare.METHODS if n.endswith(("published", "true labels")))]
METHODS = [name for name in compare.METHODS if name not in OTHERS]
CONTROLS = [compare.SMOOTHING, compare.HEADS]  # need no images
MADE = {(0.0, 898): common.DIGITS_CLEAN, (pretrain.CONFUSION, pretrain.VARIETY): common.DIGITS_SD}


@dataclass
class Args:
    """The worlds of the map."""

    confusions: list[float] = HfArg(default_factory=lambda: [0.0, 0.4, 0.45], help="p, one row for each")
    styles: list[float] = HfArg(default_factory=lambda: [0.0, 0.65, 0.8], help="g, one column for each")
    varieties: list[int] = HfArg(default_factory=lambda: [898, 10], help="digits the generator knows")
    images: int = HfArg(default=320, help="synthetic images")
    head_lr: float = common.number("(0, 1000]", "learning rate of all last layers, in multiples of --lr", 1.0)
    seeds: int = HfArg(default=3, help="number of seeds")
    first_seed: int = HfArg(default=0, help="the first of the seeds")
    out: str = HfArg(default="runs/map", help="folder of the generators, the runs and the map")
    results: str = HfArg(default="", help="file of the numbers of all runs; '': results.json in --out")


def generator_of(confusion: float, variety: int, out: Path, needed: bool) -> str:
    """The folder of the generator of these dials, trained if it is needed and missing."""
    if (confusion, variety) in MADE:
        return MADE[confusion, variety]
    folder = out / f"sd-p{confusion:g}-v{variety}"
    if needed and not (folder / "sd" / "model_index.json").exists():
        dials = dict(confusion=confusion, variety=variety, folder=str(folder), out=str(folder / "training"))
        pretrain.main(pretrain.Args(start=common.DIGITS_CLEAN, **dials))
    return str(folder / "sd")


def gains(args: Args, confusion: float, style: float, variety: int, out: Path) -> dict[str, dict]:
    """For each method, its gains on each split over standard augmentation, a number for each seed.

    Of its images also the share of right digits, and the FID.
    """
    store, found = Path(args.results or out / "results.json"), {}
    trained = compare.suffix(args.head_lr)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        folder = out / f"p{confusion:g}-g{style:g}-v{variety}{trained}-s{seed}"
        needed = {compare.key_of(folder, name) for name in METHODS} - common.read_file(store, {}).keys()
        generator = generator_of(confusion, variety, out, bool(needed))
        dials = dict(style=style, diffusion=generator, head_lr=args.head_lr)
        # these have nothing to do with the generator
        plain = out / f"g{style:g}{trained}-s{seed}"
        results = compare.results_of(16, args.images, seed, plain, store, [compare.BASE, *CONTROLS], **dials)
        base = results.pop(compare.BASE)
        results |= compare.results_of(16, args.images, seed, folder, store, METHODS, **dials)
        for name, result in results.items():
            entry = found.setdefault(name, {})
            for split in ("test", "test_ood"):
                entry.setdefault(split, []).append(result[split] - base[split])
            for key in ("oracle", "fid"):
                entry.setdefault(key, []).append(result.get(key, math.nan))
    return found


def draw(cells: dict, rows: list, columns: list, path: Path, names: tuple[str, str]) -> None:
    """Draws a heat map of each method's mean gain for each split; cells[row, column]: see gains."""
    from matplotlib.figure import Figure

    shown = CONTROLS + METHODS
    figure = Figure(figsize=(1.5 * len(shown) + 0.6, 4.2), layout="constrained")
    plots = figure.subplots(2, len(shown), sharex=True, sharey=True)
    for row, (split, limit) in zip(plots, (("test", 8), ("test_ood", 20)), strict=True):
        for axes, method in zip(row, shown, strict=True):
            values = [[np.mean(cells[r, c][method][split]) for c in columns] for r in rows]
            axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
            for (i, j), value in np.ndenumerate(values):
                colour = "white" if abs(value) > 0.55 * limit else "black"
                text = f"{round(value, 1) + 0.0:+.1f}"  # no -0.0
                axes.text(j, i, text, ha="center", va="center", fontsize=9, color=colour)
            axes.set_xticks(range(len(columns)), [f"{c:g}" for c in columns])
            axes.set_yticks(range(len(rows)), [f"{r:g}" for r in rows])
        row[0].set_ylabel(f"{split}\n{names[0]}")
    for top, bottom, method in zip(*plots, shown, strict=True):
        top.set_title(textwrap.fill(method, 15, break_on_hyphens=False), fontsize=10)
        bottom.set_xlabel(names[1])
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    (out := Path(args.out)).mkdir(parents=True, exist_ok=True)
    cells = {(p, g): gains(args, p, g, 898, out) for p in args.confusions for g in args.styles}
    row = {("variety", v): gains(args, pretrain.CONFUSION, world.STYLE, v, out) for v in args.varieties}
    draw(cells, args.confusions, args.styles, out / "map.png", ("confusion p", "style g"))
    lines = ["| row | column | method | test | test_ood | right digit | FID |", "|---" * 7 + "|"]
    for (r, c), found in (cells | row).items():
        for name, entry in found.items():
            texts = [common.interval_text(entry[split], "+") for split in ("test", "test_ood")]
            known = [f"{np.mean(entry[key]):.2f}".replace("nan", "") for key in ("oracle", "fid")]
            lines.append(f"| {r} | {c} | {name} | {' | '.join(texts + known)} |")
    common.write_file(out / "map.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    common.cli(main, Args)
