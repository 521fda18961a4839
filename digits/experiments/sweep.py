"""Measures on digits what a method's images are like. Each command prints a table.

    python digits/experiments/sweep.py noise                         a quarter of an hour on two cores
    python digits/experiments/sweep.py sigma                         a few minutes
    python digits/experiments/sweep.py variants runs/LADDER          a ladder of actgen.py, made by --ladder
    python digits/experiments/sweep.py labels runs/RUN runs/RUN      runs of dreamda.py with seeds 0, 1, ...

noise     DreamDA's fidelity against its diversity, over the place and the scale of the noise: two variations
          of each of 200 images. Draws digits/pictures/dreamda_sweep.png, and dreamda.png: images, then a
          variation of each for growing scales.
sigma     DIAGen's, over the noise on the tokens in units of their root mean square: five variations of each
          of 80 images. Draws digits/pictures/diagen_sweep.png: a row an image, then one for each sigma.
variants  each of ActGen's rungs: the shares of images in which the oracle reads the digit of the label, its
          look-alike, and the class's uncommon setting, which no training image shows
labels    the shares of right labels, AMST's and the source images', in common and in uncommon settings

"Right digit" is the share in which the oracle reads the class. Precision, recall and FID compare the oracle's
features with those of real test images. "To the source" and "between two" are distances of a variation's
latents to those of its source and of another variation, over the norm of the source's latents.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402
from digits import judge, world  # noqa: E402

PICTURES = common.ROOT / "digits" / "pictures"
COLUMNS = ["right digit, %", "precision", "recall", "FID", "to the source", "between two"]
NOISE = {  # where DreamDA adds it: scales in standard deviations of the features
    "bottleneck": (0, 3, 6, 12, 18, 24),
    "mid_input": (6, 12),
    "down": (0.3, 0.6, 1),
    "up": (0.1, 0.2, 0.3),
    "latents": (0.1, 0.2, 0.3),
}
SIGMAS, VARIATIONS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3), 5


def show_row(cells: list, header: bool = False) -> None:
    """Prints a row of a table."""
    print(f"| {' | '.join(map(str, cells))} |" + ("\n" + "|---" * len(cells) + "|") * header, flush=True)


class Sweep:
    """The real images that a method varies, and how their variations are judged."""

    def __init__(self, script, **given):
        """script: dreamda or diagen, whose recipe for digits holds, but for the arguments that are given"""
        self.args, self.accelerator = script.METHOD.arguments(**given), common.make_accelerator()
        self.pipe = common.load_pipeline(self.args.diffusion, self.accelerator.device)
        data = common.load_data("digits", "", 32, "none", self.args.examples_per_class, self.args.seed)
        self.names, self.transform, self.labels = data.class_names, data.test.transform, data.train.labels
        self.images = torch.stack([image for image, _, _ in data.train])
        self.real, _ = judge.read(data.test, self.accelerator)
        with torch.no_grad():
            self.latents = common.encode(self.pipe, self.images)

    def generators(self, *key: int) -> list[torch.Generator]:
        """A generator for each image."""
        return [common.generator(*key, i) for i in range(len(self.images))]

    @torch.no_grad()
    def report(self, cells: list, drawn: list[torch.Tensor]) -> dict[str, float]:
        """Prints a row for several variations [N, 3, 32, 32] of every image, and returns its numbers."""
        pictures = [to_pil_image((255 * image.cpu()).round().byte()) for image in torch.cat(drawn)]
        images = common.Images(pictures, self.labels * len(drawn), self.transform)
        features, digits = judge.read(images, self.accelerator)
        distances = judge.distribution_distances(self.real, features)
        norm = self.latents.flatten(1).norm(dim=1)
        z = [common.encode(self.pipe, image) for image in drawn]
        far = torch.stack([(a - self.latents).flatten(1).norm(dim=1) / norm for a in z])
        right = (digits == torch.tensor(images.labels)).float().mean()
        values = [100 * right, *(distances[key] for key in ("precision", "recall", "fid"))]
        values += [far.mean(), ((z[0] - z[1]).flatten(1).norm(dim=1) / norm).mean()]
        numbers = dict(zip(COLUMNS, map(float, values), strict=True))
        show_row([*cells, *(f"{v:.{1 if key in ('FID', COLUMNS[0]) else 2}f}" for key, v in numbers.items())])
        return numbers


def sweep_noise() -> None:
    """DreamDA: two variations of each image for every place and scale of the noise."""
    sweep = Sweep(dreamda, examples_per_class=20)
    args, pipe = sweep.args, sweep.pipe
    prompts = [args.prompt.replace("{}", sweep.names[y]) for y in sweep.labels]

    def invert(key: int, inversion: str = "cycle", start: int | None = None):
        """Inverts every image; another key gives other random draws. start: a key for z_T alone."""
        options = {} if start is None else {"start_generators": sweep.generators(start)}
        options |= common.options(dreamda.invert, args) | {"inversion": inversion}
        return dreamda.invert(pipe, sweep.images, sweep.generators(key), **options)

    def vary(inverted, key: int, **perturbation) -> torch.Tensor:
        """One variation [N, 3, 32, 32] of every image."""
        options, of = common.options(dreamda.vary, args) | perturbation, torch.arange(len(sweep.images))
        z = dreamda.vary(pipe, inverted, of, prompts, sweep.generators(key), **options)
        return torch.cat([common.decode(pipe, part) for part in z.detach().split(100)])

    show_row(["noise on", "s", *COLUMNS], header=True)
    kinds = ("no inversion (img2img)", "none", None, (0,)), ("a path each", "cycle", 9, (0, 3, 6, 12))
    for name, inversion, start, scales in kinds:  # a path for each variation, from one z_T
        pair = [invert(key, inversion, start) for key in (1, 2)]
        for s in scales:
            drawn = [vary(path, key, noise_scale=s) for path, key in zip(pair, (3, 4), strict=True)]
            sweep.report([f"bottleneck, {name}", s], drawn)

    inverted, figure = invert(1), Figure(figsize=(6, 4), layout="constrained")
    axes, rows, some = figure.subplots(), [sweep.images], slice(5, None, 14)
    for where, scales in NOISE.items():
        points = []
        for s in scales:
            drawn = [vary(inverted, key, perturb=where, noise_scale=s) for key in (3, 4)]
            numbers = sweep.report([where, s], drawn)
            points.append((numbers["between two"], numbers["right digit, %"]))
            rows += [drawn[0]] if where == "bottleneck" and s != 3 else []
        axes.plot(*zip(*points, strict=True), "o-", label=where)
    axes.set(xlabel="distance between two variations / norm", ylabel="right digit (%)", xlim=(0, 1.2))
    axes.legend()
    figure.savefig(PICTURES / "dreamda_sweep.png", dpi=110)
    rows = [row[some].cpu() for row in rows]
    common.save_grid(torch.cat(rows), PICTURES / "dreamda.png", columns=len(rows[0]))


def sweep_sigma(seed: int = 100) -> None:
    """DIAGen: five variations of each image for every sigma."""
    sweep = Sweep(diagen, seed=seed, examples_per_class=8)
    args, pipe, labels = sweep.args, sweep.pipe, torch.tensor(sweep.labels)
    tokens = [f"<{name}>" for name in sweep.names]

    def draw(rows: torch.Tensor, m: int) -> torch.Tensor:
        """The m-th variation of every image, by these embeddings."""
        diagen.place_tokens(pipe, tokens, rows)
        prompts = [args.prompt.replace("{}", tokens[y]) for y in labels]
        options = dict(steps=args.steps, strength=args.strength[0], guidance_scale=args.guidance_scale)
        generators = [common.generator(seed, i, m) for i in range(len(labels))]
        return diagen.img2img(pipe, sweep.latents, prompts, generators, **options).cpu()

    rows, options = [], diagen.inversion_options(args)
    for y, (name, token) in enumerate(zip(sweep.names, tokens, strict=True)):
        start, own = diagen.initial_embedding(pipe, name, args.initializer), sweep.images[labels == y]
        rows.append(diagen.textual_inversion(pipe, own, token, start, seed=(seed, y), **options))
    rows = torch.stack(rows)
    show_row(["sigma", *COLUMNS], header=True)
    some = slice(1, None, 7)
    grid = [sweep.images[some]]
    for sigma in SIGMAS:  # every variation has its own draw of the noise
        generators = [common.generator(seed, 3, c) for c in range(len(tokens))]
        noisy = diagen.noisy_embeddings(rows, [sigma] * VARIATIONS, generators, relative=True)
        drawn = [draw(noisy[:, m], m) for m in range(VARIATIONS)]
        sweep.report([sigma], drawn)
        grid.append(drawn[0][some])
    common.save_grid(torch.stack(grid, 1).flatten(0, 1), PICTURES / "diagen_sweep.png", columns=len(grid))


def judge_variants(folder: Path) -> None:
    """ActGen's ladder: means over its seeds, plain text-to-image and guided images apart."""
    show_row(["rung", "images", "right digit, %", "look-alike, %", "uncommon setting, %"], header=True)
    for rung in actgen.LADDER:
        found = {}
        for file in sorted(folder.glob(f"{common.slug(rung)}-s*/synthetic/metadata.jsonl")):
            records, labels, digits, settings = judge.read_run(file.parents[1])
            alike = torch.tensor([world.LOOK_ALIKE[y] for y in labels.tolist()])
            uncommon = settings == judge.uncommon_settings(labels)
            shares = torch.stack([digits == labels, digits == alike, uncommon], 1).float()
            guided = torch.tensor([record["guided"] for record in records])
            for name, part in (("plain", ~guided), ("guided", guided)):
                found.setdefault(name, []).extend([shares[part].mean(0).tolist()] if part.any() else [])
        for name, values in found.items():
            if values:
                show_row([rung, name, *(f"{100 * v:.0f}" for v in np.mean(values, 0))])


def judge_labels(folders: list[Path]) -> None:
    """DreamDA's runs: means over them, of what the images show in common and in uncommon settings."""
    show_row(["setting", "share", "source right", "labelled", "AMST right", "source right, on these"], True)
    found = {"common": [], "uncommon": []}
    for folder in folders:
        records, source, digits, settings = judge.read_run(folder)
        label = torch.tensor([-1 if r["pseudo_label"] is None else r["pseudo_label"] for r in records])
        new, given = settings == judge.uncommon_settings(digits), label >= 0
        for name, part in (("common", ~new), ("uncommon", new)):
            right, both = source == digits, part & given
            values = part, right[part], given[part], (label == digits)[both], right[both]
            found[name].append([value.float().mean().item() for value in values])
    for name, values in found.items():
        show_row([name, *(f"{100 * v:.0f} %" for v in np.mean(values, 0))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["noise", "sigma", "variants", "labels"])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, of variants and labels")
    args = parser.parse_args()
    if args.command in ("variants", "labels") and not args.runs:
        parser.error(f"{args.command} needs the folder of a run")
    commands = {"noise": sweep_noise, "sigma": sweep_sigma}
    commands |= {"variants": lambda: judge_variants(*args.runs), "labels": lambda: judge_labels(args.runs)}
    commands[args.command]()


if __name__ == "__main__":
    main()
