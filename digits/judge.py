"""Judges images of the digits world by the oracle, a classifier trained on the web pool (common.load_oracle).

The digit that the oracle reads in a synthetic image is taken for the image's true class. Its features are the
space in which synthetic images are compared with the real test images.
"""

from pathlib import Path

import torch
from torch import nn

import common
from digits import world

FOLDER = Path(__file__).resolve().parent
KEYS, HEADS = ["labels", "colours", "settings"], [10, 6, 3]  # what the oracle reads; its logits for each


def read(images: common.Images, accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's features [N, 128] of the images, and the digits [N] that it reads in them."""
    oracle = common.load_oracle().to(accelerator.device)
    head, oracle.head = oracle.head.cpu(), nn.Identity()
    features, _ = common.predict(oracle, images, accelerator)
    return features, head(features)[:, : HEADS[0]].argmax(1)


def read_run(folder: Path) -> tuple[list[dict], torch.Tensor, torch.Tensor, torch.Tensor]:
    """A run's synthetic images: records, labels [N], digits [N] and settings [N] that the oracle reads."""
    records, accelerator = common.read_records(folder / "synthetic", world.NAMES), common.make_accelerator()
    images = common.images_of(records, folder / "synthetic", common.make_transforms(world.SIZE)[1])
    logits, labels = common.predict(common.load_oracle().to(accelerator.device), images, accelerator)
    digits, _, settings = (part.argmax(1) for part in logits.split(HEADS, 1))
    return records, labels, digits, settings


def uncommon_settings(labels: torch.Tensor) -> torch.Tensor:
    """The uncommon setting [N] of the classes `labels` [N], as the oracle counts the settings."""
    return torch.tensor([world.SETTINGS.index(world.uncommon_setting(y)) for y in labels.tolist()])


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The FID (Heusel et al. 2017) of features `fake` [M, D] against `real` [N, D]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = nn.Identity()
    identity.num_features = real.shape[1]
    fid = FrechetInceptionDistance(identity)
    fid.update(real, real=True)
    fid.update(fake, real=False)
    return fid.compute().item()


def distribution_distances(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> dict[str, float]:
    """FID, KID (unbiased MMD^2), precision and recall of features `fake` [M, D] against `real` [N, D].

    Precision is the share of fake features inside the real manifold, recall the share of real features inside
    the fake one. A manifold is a union of balls, one around each point, which reach to the point's k-th
    neighbour (Kynkaanniemi et al. 2019).
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(real), len(fake), 1000)
    kid = KernelInceptionDistance(nn.Identity(), subsets=1, subset_size=size)
    kid.update(real, real=True)
    kid.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # KID compares random subsets
        mean_kid = kid.compute()[0].item()

    def inside(points, manifold):
        # the nearest neighbour, at distance 0, is the point itself
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
        return (torch.cdist(points, manifold) <= radius).any(1).float().mean().item()

    distances = {"fid": frechet_distance(real, fake), "kid": mean_kid}
    return distances | {"precision": inside(fake, real), "recall": inside(real, fake)}


def distances_to_test(images: common.Images, data: common.Data, accelerator) -> tuple[dict, torch.Tensor]:
    """Compares images with the real test images: (distances, the digits [N] that the oracle reads).

    The distances are those of `distribution_distances` in the oracle's features, and "oracle": the share
    of images in which the oracle reads their label. The images need the transform of the test split.
    """
    (real, _), (fake, digits) = (read(part, accelerator) for part in (data.test, images))
    right = (digits == torch.tensor(images.labels)).float().mean().item()
    return distribution_distances(real, fake) | {"oracle": right}, digits
