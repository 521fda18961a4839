"""DIAGen on digits: fidelity against diversity, over the noise on the learned embeddings.

    python tests/sigma_sweep.py [--seed 100]        a few minutes on two cores

Learns a token per class from four training images each, then draws five variations of each of the forty
images, for one sigma after the other (in units of the embedding's root mean square): the share whose digit
the oracle reads as the class; precision and recall of the oracle's features against 1,800 real test images;
distance between two variations of an image (latents, relative to their norm). Also how well the tokens draw
their class after so many steps of Textual Inversion. Draws samples/diagen_sweep.png (a row: the image, then
variations, sigma growing).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import diagen  # noqa: E402

OUT = Path("samples")
SIGMAS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3)
STEPS = (0, 25, 50, 100, 200)
VARIATIONS = 5


def main(seed: int) -> None:
    accelerator = common.make_accelerator()
    args = diagen.resolve(diagen.Args(dataset="digits", seed=seed))
    data = common.data_of(args)
    real, _ = common.judge_digits(data.test, accelerator)
    plain = data.train.subset(range(len(data.train)), data.test.transform)
    images, labels = torch.stack([x for x, _ in plain]), torch.tensor(data.train.labels)
    tokens = [f"<{name}>" for name in common.class_folders(data.class_names)]
    pipe = common.load_pipeline(args.diffusion)
    with torch.no_grad():
        latents = common.encode(pipe, images)

    def judged(line: str, drawn: list[torch.Tensor]) -> None:
        pool = common.Images(
            [common.to_pil(x) for x in torch.cat(drawn)], labels.repeat(len(drawn)), data.test.transform
        )
        features, read = common.judge_digits(pool, accelerator)
        d = common.distribution_distances(real, features)
        right = (read == torch.tensor(pool.labels)).float().mean().item()
        with torch.no_grad():
            a, b = (common.encode(pipe, x).flatten(1) for x in drawn[:2])
        apart = ((a - b).norm(dim=1) / a.norm(dim=1)).mean().item()
        print(
            f"| {line} | {100 * right:.1f} | {d['precision']:.2f} | {d['recall']:.2f} | {apart:.2f} |",
            flush=True,
        )

    def draw(tokens: list[str], m: int, strength: float) -> torch.Tensor:
        """The m-th variation of each image, [40, 3, 32, 32]; at strength 1 next to nothing is left of it."""
        return diagen.img2img(
            pipe, latents, [args.prompt.format(tokens[y]) for y in labels],
            [common.generator(seed, i, m) for i in range(len(labels))],
            steps=args.steps, strength=strength, guidance_scale=args.guidance_scale,
        )  # fmt: skip

    learned = {0: diagen.initial_embeddings(pipe, data.class_names, args.initializer)}
    diagen.textual_inversion(
        pipe, images, labels, tokens, learned[0], steps=STEPS[-1], lr=args.inversion_lr, flip=False,
        batch_size=args.inversion_batch_size, templates=[args.prompt], seed=seed, save_every=STEPS[1],
        save=lambda state: learned.update({state["step"]: state["rows"].clone()}),
    )  # fmt: skip
    print(
        "| steps of Textual Inversion | class, % | precision | recall | between two |\n|---|---|---|---|---|"
    )
    for steps in STEPS:
        with diagen.NewTokens(pipe, tokens, learned[steps]):
            judged(str(steps), [draw(tokens, m, strength=1.0) for m in range(VARIATIONS)])
    print("\n| sigma | class, % | precision | recall | between two |\n|---|---|---|---|---|")
    grid, some = [images[1::7]], slice(1, None, 7)
    for sigma in SIGMAS:
        generators = [common.generator(seed, 3, c) for c in range(len(tokens))]
        rows = diagen.noisy_embeddings(
            learned[args.inversion_steps], [sigma] * VARIATIONS, generators, relative=True
        )
        drawn = []
        for m in range(VARIATIONS):  # a draw of the noise per variation
            with diagen.NewTokens(pipe, tokens, rows[:, m]):
                drawn.append(draw(tokens, m, args.strength))
        judged(str(sigma), drawn)
        grid.append(drawn[0][some])
    OUT.mkdir(exist_ok=True)
    rows = torch.stack(grid, 1).flatten(0, 1)
    common.save_grid(rows, OUT / "diagen_sweep.png", columns=len(grid), scale=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=100, help="of the draw of the images, and of all noise")
    main(parser.parse_args().seed)
