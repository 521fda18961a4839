"""DreamDA on digits: fidelity against diversity, over the place and the scale of the noise.

    python tests/noise_sweep.py          about a quarter of an hour on two cores

For 200 training digits, two variations each, by digits_sd: the share whose digit the oracle reads as the
seed's; precision and recall of the oracle's features against 1,800 real test images; distance of the latents
to the seed's, and between two variations of a seed (both relative to the seed's norm). Draws
samples/dreamda_sweep.png (the curves) and samples/dreamda_scales.png (seeds, variations, s growing).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import dreamda  # noqa: E402

OUT = Path("samples")
SETTINGS = {  # place, noise of the two guidance rows: scales in standard deviations of the features
    ("bottleneck", "independent"): (0, 6, 12, 15, 18, 25),
    ("bottleneck", "paired"): (6, 12, 25, 50),
    ("mid_input", "independent"): (3, 6, 12),
    ("down", "independent"): (0.3, 0.6, 1, 2),
    ("up", "independent"): (0.1, 0.2, 0.3, 0.6),
    ("latents", "independent"): (0.1, 0.2, 0.25, 0.3),
}


def main() -> None:
    from accelerate import Accelerator
    from matplotlib.figure import Figure

    accelerator, recipe = Accelerator(cpu=True), dreamda.RECIPES["digits"]
    pipe, data = (
        common.load_pipeline(str(common.ROOT / "digits_sd")),
        common.load_data("digits", "", 32, "none", 20),
    )
    n = len(data.train)
    seeds, labels = torch.stack([data.train[i][0] for i in range(n)]), torch.tensor(data.train.labels)
    prompts = [recipe["prompt"].format(data.class_names[y]) for y in labels]
    real, _ = common.judge_digits(data.test, accelerator)
    z0 = common.encode(pipe, seeds)
    norm = z0.flatten(1).norm(dim=1)

    def generators(key):
        return [common.generator(key, i) for i in range(n)]

    def judged(name, scale, latents):
        images = torch.cat([common.decode(pipe, z) for z in latents])
        pool = common.Images([common.to_pil(x) for x in images], [0] * len(images), data.test.transform)
        features, read = common.judge_digits(pool, accelerator)
        d = common.distribution_distances(real, features)
        right = (read == labels.repeat(2)).float().mean().item()
        far = torch.cat([(z - z0).flatten(1).norm(dim=1) / norm for z in latents]).mean().item()
        apart = ((latents[0] - latents[1]).flatten(1).norm(dim=1) / norm).mean().item()
        print(
            f"| {name} | {scale} | {100 * right:.1f} | {d['precision']:.2f} | {d['recall']:.2f} "
            f"| {d['fid']:.1f} | {far:.2f} | {apart:.2f} |",
            flush=True,
        )
        return right, apart, d["recall"]

    def vary(inverted, key, **perturbation):
        return dreamda.vary(
            pipe, inverted, torch.arange(n), prompts, generators(key), relative_noise=True,
            guidance_scale=recipe["guidance_scale"], **perturbation,
        )  # fmt: skip

    print("| noise on | s | seed's digit, % | precision | recall | FID | to the seed | between two |")
    print("|---|---|---|---|---|---|---|---|")
    for method, name in (("none", "no inversion (img2img)"), ("cycle", "two inversions")):
        pair = [
            dreamda.invert(pipe, seeds, generators(k), method=method, steps=recipe["steps"]) for k in (1, 2)
        ]
        judged(name, "", [vary(inverted, 0, perturb="none", noise_scale=0) for inverted in pair])
    inverted = dreamda.invert(pipe, seeds, generators(1), steps=recipe["steps"])
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for (where, pairing), scales in SETTINGS.items():
        points = []
        for scale in scales:
            options = dict(perturb=where, noise_scale=scale, paired_noise=pairing == "paired")
            points.append(
                judged(f"{where}, {pairing}", scale, [vary(inverted, k, **options) for k in (3, 4)])
            )
        axes.plot([p[1] for p in points], [100 * p[0] for p in points], "o-", label=f"{where}, {pairing}")
    axes.set(xlabel="distance between two variations / norm", ylabel="seed's digit (%)", xlim=(0, 1.2))
    axes.legend()
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "dreamda_sweep.png", dpi=110)
    some = slice(5, None, 14)
    rows = [common.decode(pipe, vary(inverted, 3, noise_scale=s)[some]) for s in (0, 6, 12, 18, 25)]
    common.save_grid(
        torch.cat([seeds[some], *rows]), OUT / "dreamda_scales.png", columns=len(rows[0]), scale=2
    )


if __name__ == "__main__":
    main()
