"""Measures DIAGen's fidelity against its diversity on digits, over the noise on the learned embeddings.

    python digits/experiments/sigma_sweep.py [--seed 100]        a few minutes on two cores

Learns a token for each class from eight training images, then draws five variations of each of the eighty
images for every sigma, in units of the root mean square of the embedding. Prints for each sigma:
    class                the share of variations in which the oracle reads the class
    precision, recall    of the oracle's features against those of 1,800 real test images
    between two          the distance between the latents of two variations of an image, over their norm
The same table before it shows how well the tokens draw their classes after so many steps of Textual
Inversion. Draws digits/pictures/diagen_sweep.png: in a row an image, then its variations for growing sigma.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: E402
import diagen  # noqa: E402
from digits import judge  # noqa: E402

PICTURE = common.ROOT / "digits" / "pictures" / "diagen_sweep.png"
SIGMAS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3)
STEPS = (0, 25, 50, 100, 200)
VARIATIONS = 5


class Sweep:
    """The images of the sweep, their classes' tokens, and how variations are drawn and judged."""

    def __init__(self, seed: int):
        self.args = diagen.resolve(diagen.Args(dataset="digits", seed=seed))
        self.pipe, self.accelerator = common.load_pipeline(self.args.diffusion), common.make_accelerator()
        data = common.data_of(self.args)
        self.transform, self.real = data.test.transform, judge.read(data.test, self.accelerator)[0]
        self.images = torch.stack([image for image, _ in data.train.transformed(self.transform)])
        self.labels, self.names = torch.tensor(data.train.labels), data.class_names
        self.tokens = [f"<{name}>" for name in common.class_folders(self.names)]
        self.latents = common.encode(self.pipe, self.images)

    def learn(self, steps: int) -> torch.Tensor:
        """The embeddings [10, d] of the tokens after so many steps of Textual Inversion."""
        start = diagen.initial_embeddings(self.pipe, self.names, self.args.initializer)
        return diagen.textual_inversion(
            self.pipe,
            self.images,
            self.labels,
            self.tokens,
            start,
            steps=steps,
            lr=self.args.inversion_lr,
            flip=False,
            batch_size=self.args.inversion_batch_size,
            templates=[self.args.prompt],
            seed=self.args.seed,
        )

    def draw(self, m: int, strength: float) -> torch.Tensor:
        """The m-th variation [40, 3, 32, 32] of each image. At strength 1 next to nothing of it is left."""
        return diagen.img2img(
            self.pipe,
            self.latents,
            [self.args.prompt.format(self.tokens[y]) for y in self.labels],
            [common.generator(self.args.seed, i, m) for i in range(len(self.labels))],
            steps=self.args.steps,
            strength=strength,
            guidance_scale=self.args.guidance_scale,
        )

    @torch.no_grad()
    def report(self, title, drawn: list[torch.Tensor]) -> None:
        """Prints a row of a table for several variations of every image."""
        pictures = [common.to_pil(x) for x in torch.cat(drawn)]
        images = common.Images(pictures, self.labels.repeat(len(drawn)), self.transform)
        features, digits = judge.read(images, self.accelerator)
        d = judge.distribution_distances(self.real, features)
        right = (digits == torch.tensor(images.labels)).float().mean().item()
        a, b = (common.encode(self.pipe, x).flatten(1) for x in drawn[:2])
        apart = ((a - b).norm(dim=1) / a.norm(dim=1)).mean().item()
        cells = f"{100 * right:.1f} | {d['precision']:.2f} | {d['recall']:.2f} | {apart:.2f}"
        print(f"| {title} | {cells} |", flush=True)


def main(seed: int) -> None:
    sweep = Sweep(seed)
    columns = " class, % | precision | recall | between two |\n|---|---|---|---|---|"

    print(f"| steps of Textual Inversion |{columns}")
    for steps in STEPS:
        with diagen.NewTokens(sweep.pipe, sweep.tokens, sweep.learn(steps)):
            sweep.report(steps, [sweep.draw(m, strength=1.0) for m in range(VARIATIONS)])

    print(f"\n| sigma |{columns}")
    rows, some = sweep.learn(sweep.args.inversion_steps), slice(1, None, 7)
    grid = [sweep.images[some]]
    for sigma in SIGMAS:
        generators = [common.generator(seed, 3, c) for c in range(len(sweep.tokens))]
        noisy = diagen.noisy_embeddings(rows, [sigma] * VARIATIONS, generators, relative=True)
        drawn = []
        for m in range(VARIATIONS):  # every variation has its own draw of the noise
            with diagen.NewTokens(sweep.pipe, sweep.tokens, noisy[:, m]):
                drawn.append(sweep.draw(m, sweep.args.strength[0]))
        sweep.report(sigma, drawn)
        grid.append(drawn[0][some])
    common.save_grid(torch.stack(grid, 1).flatten(0, 1), PICTURE, columns=len(grid), scale=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=100, help="seed of all random draws")
    main(parser.parse_args().seed)
