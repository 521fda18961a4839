"""Draws README's pictures of the digits world, and of what ActGen's losses change, into .pictures/.

    python tests/pictures.py          about two minutes on two cores

digits.png: samples of the web pool, and masks. losses.png: twelve test digits as guides, then the same guides
and seeds with no loss, with L_contra (bank: the images without a loss), with L_adv, with both; the classifier
is the oracle. Prints, over 24 guides, its cross-entropy and the distance to the bank.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actgen  # noqa: E402
import common  # noqa: E402

OUT = common.ROOT / ".pictures"


def main() -> None:
    common.save_digits_sheet(OUT / "digits.png")
    pipe, oracle = common.load_pipeline(str(common.ROOT / "digits_sd")), common.load_oracle()
    samples = common.render_pool(common.digit_pools()["test"], 200, seed=21)
    first = [int((samples["labels"] == y).nonzero()[k]) for k in (0, 1, 2) for y in range(10)][:24]
    guides = samples["images"][first].permute(0, 3, 1, 2).float() / 255
    labels = samples["labels"][first]
    recipe = actgen.RECIPES["digits"]

    def classifier(x):
        return oracle(x)[:, :10]

    def generate(bank, contrastive_weight, adversarial_weight):
        return actgen.generate(
            pipe, guides, labels, common.DIGIT_NAMES, classifier, bank=bank,
            generators=[common.generator(22, i) for i in range(len(labels))],
            contrastive_weight=contrastive_weight, adversarial_weight=adversarial_weight,
            **{k: recipe[k] for k in ("prompt", "guidance_scale", "attention_resolution", "nu")},
        )  # fmt: skip

    plain = generate(None, 0.0, 0.0)
    bank = {y: plain.latents[labels == y] for y in range(10)}
    rows = {"no loss": plain, "+ contrastive": generate(bank, 1.0, 0.0)}
    rows |= {"+ adversarial": generate(bank, 0.0, 0.1), "both": generate(bank, 1.0, 0.1)}
    for name, out in rows.items():
        loss = F.cross_entropy(classifier(out.images), labels).item()
        right = (classifier(out.images).argmax(1) == labels).float().mean().item()
        pairs = zip(out.latents, labels.tolist(), strict=True)
        distance = torch.stack([(z - bank[y]).flatten(1).norm(dim=1).mean() for z, y in pairs]).mean()
        print(f"{name:15} oracle's loss {loss:.3f}, right {right:.2f}, distance to the bank {distance:.2f}")
    grid = torch.cat([guides[:12], *(out.images[:12] for out in rows.values())])
    common.save_grid(grid, OUT / "losses.png", columns=12, scale=2)


if __name__ == "__main__":
    main()
