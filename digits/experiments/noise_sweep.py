"""Measures DreamDA's fidelity against its diversity on digits, over the place and the scale of the noise.

    python digits/experiments/noise_sweep.py          about a quarter of an hour on two cores

Draws two variations of each of 200 source images for every place and scale of the noise. A source image is
called the seed in the table, which has these columns:
    seed's digit         the share of variations in which the oracle reads the digit of the source image
    precision, recall    of the oracle's features against those of 1,800 real test images; and FID
    to the seed          the distance from the latents of a variation to those of the source image
    between two          the distance between the latents of two variations of a source image
Both distances are divided by the norm of the source image's latents. Into digits/pictures it draws
dreamda_sweep.png, the curves, and dreamda.png: source images, then a variation of each for growing scales.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: E402
import dreamda  # noqa: E402
from digits import judge  # noqa: E402

PICTURES = common.ROOT / "digits" / "pictures"
PER_CLASS = 20
SETTINGS = {  # (place, noise of the two guidance rows): scales in standard deviations of the features
    ("bottleneck", "independent"): (0, 3, 6, 12, 18, 24),
    ("bottleneck", "paired"): (6, 12, 24, 48),
    ("mid_input", "independent"): (6, 12),
    ("down", "independent"): (0.3, 0.6, 1),
    ("up", "independent"): (0.1, 0.2, 0.3),
    ("latents", "independent"): (0.1, 0.2, 0.3),
}


class Sweep:
    """The source images of the sweep, how they are varied, and how the variations are judged."""

    def __init__(self):
        self.recipe, self.accelerator = dreamda.RECIPES["digits"], common.make_accelerator()
        self.pipe = common.load_pipeline(common.DIGITS_SD)
        data = common.load_data("digits", "", 32, "none", PER_CLASS)
        self.images = torch.stack([image for image, _ in data.train])
        self.labels, self.transform = torch.tensor(data.train.labels), data.test.transform
        self.prompts = [self.recipe["prompt"].format(data.class_names[y]) for y in self.labels]
        self.real, _ = judge.read(data.test, self.accelerator)
        self.latents = common.encode(self.pipe, self.images)

    def generators(self, key: int) -> list[torch.Generator]:
        return [common.generator(key, i) for i in range(len(self.images))]

    def invert(self, key: int, method: str = "cycle", start: int | None = None):
        """Inverts every source image; another key gives other random draws. start: a key for z_T alone."""
        options = dict(method=method, steps=self.recipe["steps"])
        if start is not None:
            options["start_generators"] = self.generators(start)
        return dreamda.invert(self.pipe, self.images, self.generators(key), **options)

    def vary(self, inverted, key: int, **perturbation) -> torch.Tensor:
        """The latents of one variation of every source image."""
        return dreamda.vary(
            self.pipe,
            inverted,
            torch.arange(len(self.images)),
            self.prompts,
            self.generators(key),
            relative_noise=True,
            guidance_scale=self.recipe["guidance_scale"],
            **perturbation,
        )

    def report(self, name: str, scale, latents: list[torch.Tensor]) -> tuple[float, float]:
        """Prints a row of the table from the latents of two variations of every source image.

        Returns the share of the right digit and the distance between two variations.
        """
        drawn = [common.to_pil(x) for z in latents for x in common.decode(self.pipe, z)]
        images = common.Images(drawn, self.labels.repeat(len(latents)), self.transform)
        features, digits = judge.read(images, self.accelerator)
        d = judge.distribution_distances(self.real, features)
        right = (digits == torch.tensor(images.labels)).float().mean().item()
        norm = self.latents.flatten(1).norm(dim=1)
        far = torch.cat([(z - self.latents).flatten(1).norm(dim=1) / norm for z in latents]).mean().item()
        apart = ((latents[0] - latents[1]).flatten(1).norm(dim=1) / norm).mean().item()
        print(
            f"| {name} | {scale} | {100 * right:.1f} | {d['precision']:.2f} | {d['recall']:.2f} "
            f"| {d['fid']:.1f} | {far:.2f} | {apart:.2f} |",
            flush=True,
        )
        return right, apart


def main() -> None:
    from matplotlib.figure import Figure

    sweep = Sweep()
    print("| noise on | s | seed's digit, % | precision | recall | FID | to the seed | between two |")
    print("|---|---|---|---|---|---|---|---|")

    # variety without noise on the features: from the inversions alone
    for method, name in (("none", "no inversion (img2img)"), ("cycle", "two inversions")):
        pair = [sweep.invert(key, method) for key in (1, 2)]
        sweep.report(name, "", [sweep.vary(inverted, 0, perturb="none", noise_scale=0) for inverted in pair])

    # a path for each variation, from one z_T, with and without noise on the bottleneck
    pair = [sweep.invert(key, start=9) for key in (1, 2)]
    for scale in (0, 3, 6, 12):
        drawn = [
            sweep.vary(inverted, key, noise_scale=scale) for inverted, key in zip(pair, (3, 4), strict=True)
        ]
        sweep.report("bottleneck, a path each", scale, drawn)

    # one inversion, and noise in one place after the other
    inverted, figure = sweep.invert(1), Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (where, pairing), scales in SETTINGS.items():
        points, name = [], f"{where}, {pairing}"
        for scale in scales:
            options = dict(perturb=where, noise_scale=scale, paired_noise=pairing == "paired")
            points.append(sweep.report(name, scale, [sweep.vary(inverted, key, **options) for key in (3, 4)]))
        axes.plot([apart for _, apart in points], [100 * right for right, _ in points], "o-", label=name)
    axes.set(xlabel="distance between two variations / norm", ylabel="seed's digit (%)", xlim=(0, 1.2))
    axes.legend()
    figure.savefig(PICTURES / "dreamda_sweep.png", dpi=110)

    some = slice(5, None, 14)
    scaled = [sweep.vary(inverted, 3, noise_scale=scale)[some] for scale in (0, 6, 12, 18, 24)]
    rows = [sweep.images[some], *(common.decode(sweep.pipe, z) for z in scaled)]
    common.save_grid(torch.cat(rows), PICTURES / "dreamda.png", columns=len(rows[0]), scale=2)


if __name__ == "__main__":
    main()
