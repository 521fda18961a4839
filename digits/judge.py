"""Judges images of the digits world by an oracle: a classifier trained on the web pool.

The digit that the oracle reads in a synthetic image is taken for the image's true label. Its features are the
space in which synthetic images are compared with the real test images.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import common
from digits import world

FOLDER = Path(__file__).resolve().parent
KEYS, HEADS = ["labels", "colours", "settings"], [10, 6, 3]  # what the oracle reads; its logits for each


def load_oracle(folder: Path = FOLDER) -> common.SmallCNN:
    """The oracle: images [B, 3, 32, 32] in [0, 1] -> logits [B, 19] of 10 digits, 6 colours, 3 settings."""
    oracle = common.SmallCNN(sum(HEADS), width=32)
    oracle.load_state_dict(load_file(folder / "oracle" / "model.safetensors"))
    return oracle.float().eval().requires_grad_(False)


def read(images: common.Images, accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's features [N, 128] of the images, and the digits [N] that it reads in them."""
    oracle = load_oracle().to(accelerator.device)
    head, oracle.fc = oracle.fc.cpu(), nn.Identity()
    features, _ = common.predict(oracle, images, accelerator)
    return features, head(features)[:, : HEADS[0]].argmax(1)


@torch.no_grad()
def read_run(folder: Path) -> tuple[list[dict], torch.Tensor, torch.Tensor, torch.Tensor]:
    """A run's synthetic images: their records, their labels [N], and the digits [N] and settings [N] that the
    oracle reads in them.
    """
    records = common.read_records(folder / "synthetic", world.NAMES)
    shown = common.images_of(records, folder / "synthetic", common.make_transforms(32, "none")[1])
    images = torch.stack([image for image, _ in shown])
    digits, _, settings = (logits.argmax(1) for logits in load_oracle()(images).split(HEADS, 1))
    return records, torch.tensor(shown.labels), digits, settings


def uncommon_settings(labels: torch.Tensor) -> torch.Tensor:
    """The uncommon setting [N] of the classes `labels` [N], as the oracle counts the settings."""
    return torch.tensor([world.SETTINGS.index(world.uncommon_setting(y)) for y in labels.tolist()])


def distribution_distances(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> dict[str, float]:
    """FID, KID (unbiased polynomial MMD^2), precision and recall of features `fake` [M, D] against `real` [N,
    D].

    Precision is the share of fake features inside the real manifold, recall the share of real features inside
    the fake one. A manifold is a union of balls, one around each point, which reach to the point's k-th
    neighbour (Kynkaanniemi et al. 2019).
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(real), len(fake), 1000)
    kid = KernelInceptionDistance(nn.Identity(), subsets=1, subset_size=size)
    kid.update(real, real=True)
    kid.update(fake, real=False)

    def inside(points, manifold):
        # the nearest neighbour, at distance 0, is the point itself
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
        return (torch.cdist(points, manifold) <= radius).any(1).float().mean().item()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # KID compares random subsets
        mean_kid = kid.compute()[0].item()
    return {
        "fid": common.frechet_distance(real, fake),
        "kid": mean_kid,
        "precision": inside(fake, real),
        "recall": inside(real, fake),
    }


def distances_to_test(
    images: common.Images, data: common.Data, accelerator
) -> tuple[dict[str, float], torch.Tensor]:
    """Compares images with the real test images: (distances, the digits [N] that the oracle reads).

    The distances are those of `distribution_distances` in the oracle's features, and "oracle": the share
    of images in which the oracle reads their label. The images need the transform of the test split.
    """
    real, _ = read(data.test, accelerator)
    fake, digits = read(images, accelerator)
    right = (digits == torch.tensor(images.labels)).float().mean().item()
    return distribution_distances(real, fake) | {"oracle": right}, digits
