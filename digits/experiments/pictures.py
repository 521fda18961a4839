"""Draws two of README's pictures into digits/pictures: the digits world, and what ActGen's losses change.

    python digits/experiments/pictures.py          about two minutes on two cores

digits.png: samples of the web pool, and true masks.
losses.png: twelve test digits as guides, then what the sampler makes of them from the same random draws: with
no loss, with L_contra, with L_adv, with both. The bank of L_contra holds the images made without a loss, and
the classifier of L_adv is the oracle. Prints, over 24 guides, the oracle's cross-entropy, the share of images
in which it reads the class, and the mean distance to the bank.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import actgen  # noqa: E402
import common  # noqa: E402
from digits import judge, pretrain, world  # noqa: E402

PICTURES = common.ROOT / "digits" / "pictures"


def main() -> None:
    pretrain.save_sheet(PICTURES / "digits.png")
    pipe, oracle = common.load_pipeline(common.DIGITS_SD), judge.load_oracle()
    samples = world.render_pool(world.pools()["test"], 200, seed=21)
    first = [int((samples["labels"] == y).nonzero()[k]) for k in (0, 1, 2) for y in range(10)][:24]
    guides = samples["images"][first].permute(0, 3, 1, 2).float() / 255
    labels = samples["labels"][first]
    recipe = actgen.RECIPES["digits"]

    def classifier(x):
        return oracle(x)[:, : judge.HEADS[0]]

    def generate(bank, contrastive_weight, adversarial_weight):
        return actgen.generate(
            pipe,
            guides,
            labels,
            world.NAMES,
            classifier,
            generators=[common.generator(22, i) for i in range(len(labels))],
            bank=bank,
            contrastive_weight=contrastive_weight,
            adversarial_weight=adversarial_weight,
            **{k: recipe[k] for k in ("prompt", "guidance_scale", "attention_resolution", "nu")},
        )

    plain = generate(None, 0.0, 0.0)
    bank = {y: plain.latents[labels == y] for y in range(10)}
    rows = {
        "no loss": plain,
        "+ contrastive": generate(bank, 1.0, 0.0),
        "+ adversarial": generate(bank, 0.0, 0.1),
        "both": generate(bank, 1.0, 0.1),
    }
    for name, out in rows.items():
        logits = classifier(out.images)
        loss = F.cross_entropy(logits, labels).item()
        right = (logits.argmax(1) == labels).float().mean().item()
        pairs = zip(out.latents, labels.tolist(), strict=True)
        distance = torch.stack([(z - bank[y]).flatten(1).norm(dim=1).mean() for z, y in pairs]).mean()
        print(f"{name:15} oracle's loss {loss:.3f}, right {right:.2f}, distance to the bank {distance:.2f}")
    grid = torch.cat([guides[:12], *(out.images[:12] for out in rows.values())])
    common.save_grid(grid, PICTURES / "losses.png", columns=12, scale=2)


if __name__ == "__main__":
    main()
