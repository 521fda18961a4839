"""Measures how well the class token's attention finds the digit: mean IoU with the true mask (ActGen, 4.2).

    python digits/experiments/attention_masks.py         a few minutes on two cores

Prints the mean IoU over 300 images of the test pool for the mask m_t that ActGen's sampler uses at some
steps, at both resolutions of the U-Net's attention. A mask is cut at a threshold, which is chosen on 300
images of the train pool; so is the radius of the centred disc to compare with. Draws
digits/pictures/attention_masks.png, 16 images in columns: image, true mask, m_t at four steps.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import actgen  # noqa: E402
import common  # noqa: E402
from digits import world  # noqa: E402

PICTURE = common.ROOT / "digits" / "pictures" / "attention_masks.png"
COUNT, BATCH, LOOK_AT = 300, 50, [0, 5, 10, 14]


def iou(masks: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The intersection over union [N] of two sets of masks, bools [N, H, W]."""
    return (masks & true).flatten(1).sum(1) / (masks | true).flatten(1).sum(1).clamp(min=1)


def as_images(samples: dict) -> torch.Tensor:
    """The images of world.render_pool as floats [N, 3, 32, 32] in [0, 1]."""
    return samples["images"].permute(0, 3, 1, 2).float() / 255


def masks_of(pipe, samples: dict, resolution: int) -> dict[int, torch.Tensor]:
    """The masks m_t [N, 32, 32] of guided sampling without losses by step; the images are the guides."""
    options = common.options(actgen.generate, actgen.METHOD.arguments())
    options |= dict(attention_resolution=resolution, contrastive_weight=0.0, adversarial_weight=0.0)
    found = {step: [] for step in LOOK_AT}

    def keep(i, t, values) -> None:
        if i in found and "m" in values:
            found[i].append(F.interpolate(values["m"], (world.SIZE, world.SIZE), mode="bilinear")[:, 0].cpu())

    for part in torch.arange(COUNT).split(BATCH):
        guides, labels = as_images(samples)[part], samples["labels"][part]
        options |= dict(generators=[common.generator(2, int(j)) for j in part], on_step=keep)
        actgen.generate(pipe, guides, labels, world.NAMES, **options)
    return {step: torch.cat(parts) for step, parts in found.items()}


def best_disc(true: torch.Tensor) -> torch.Tensor:
    """The centred disc [1, 32, 32] of greatest IoU with the true masks."""
    grid = torch.meshgrid(*[torch.arange(world.SIZE) + 0.5 - world.SIZE / 2] * 2, indexing="ij")
    discs = [(torch.stack(grid).norm(dim=0) <= r)[None] for r in range(4, 20)]
    return max(discs, key=lambda disc: iou(disc, true).mean())


def main() -> None:
    pipe, pools = common.load_pipeline(common.DIGITS_SD), world.pools()
    chosen = world.render_pool(pools["train"], COUNT, seed=11, style=world.STYLE)
    judged = world.render_pool(pools["test"], COUNT, seed=12, style=world.STYLE)
    print(f"centred disc: IoU {iou(best_disc(chosen['masks']), judged['masks']).mean():.3f}")
    print(f"| maps |{''.join(f' step {step} |' for step in LOOK_AT)}\n{'|---' * (1 + len(LOOK_AT))}|")
    for resolution in (4, 8):
        choose, masks = (masks_of(pipe, samples, resolution) for samples in (chosen, judged))
        cells = []
        for step in LOOK_AT:
            means = {h: iou(choose[step] > h, chosen["masks"]).mean() for h in np.linspace(0.05, 0.95, 19)}
            cells.append(iou(masks[step] > max(means, key=means.get), judged["masks"]).mean())
        print(f"| {resolution}x{resolution} |{''.join(f' {cell:.3f} |' for cell in cells)}")
    columns = [judged["masks"].float(), *masks.values()]
    grey = [mask[:16, None].expand(-1, 3, -1, -1) for mask in columns]
    common.save_grid(torch.cat([as_images(judged)[:16], *grey]), PICTURE, columns=16)


if __name__ == "__main__":
    main()
