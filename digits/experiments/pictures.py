"""Draws README's overview of the three methods, the digits world, and what ActGen's losses change.

    python digits/experiments/pictures.py          about two minutes on two cores

They are written into digits/pictures.

overview.png: of each method, what goes in, what is perturbed, what comes out, and where the label comes from.
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
import diagen  # noqa: E402
import dreamda  # noqa: E402
from digits import inside, judge, pretrain, world  # noqa: E402

PICTURES = common.ROOT / "digits" / "pictures"


CAPTIONS = {  # what goes in, what is perturbed, what comes out
    "ActGen": [
        "images that a classifier\nin training gets wrong",
        "mask of the class: there the image is\nmixed in; the prompt moves by gradients",
        "label: the class of the image,\nwhose foreground is kept",
    ],
    "DreamDA": [
        "any training images",
        "noise that leads back to the image;\nfresh noise on the U-Net's bottleneck",
        "label: the class on which\nfour heads agree, if they do",
    ],
    "DIAGen": [
        "a few images of each class",
        "the image under noise; the prompt: noise\non a learned token, other places",
        "label: the class of the image;\na filter weighs how sure it is",
    ],
}


SAMPLER = "prompt steps guidance_scale guidance_centre attention_resolution gradient_steps nu"  # ActGen's


def settings(script, names: str) -> dict:
    """The digits' values of some of a script's arguments."""
    return {name: script.RECIPES["digits"][name] for name in names.split()}


@torch.no_grad()
def draw_columns(pipe, images: torch.Tensor, labels: torch.Tensor, classifier) -> dict[str, list]:
    """Three images by each method: what goes in, what is perturbed, what comes out.

    images [N, 3, 32, 32] and labels [N]: those to choose from; classifier: of L_adv, which one image has
    """

    def generators(key: int) -> list[torch.Generator]:
        return [common.generator(key, i) for i in range(3)]

    x, y = (v[[int((labels == c).nonzero()[0]) for c in (3, 5, 8)]] for v in (images, labels))
    options = settings(actgen, SAMPLER)
    options |= {"generators": generators(31), "adversarial": torch.tensor([False, False, True])}
    out = actgen.generate(pipe, x, y, world.NAMES, classifier, **options)
    columns = {"ActGen": [x, F.interpolate(out.masks, x.shape[2:], mode="bilinear"), out.images]}

    x, y = (v[[int((labels == c).nonzero()[0]) for c in (2, 6, 4)]] for v in (images, labels))
    inverted = dreamda.invert(pipe, x, generators(32), **settings(dreamda, "steps"))
    prompts, options = (
        [world.caption(c) for c in y],
        settings(dreamda, "noise_scale relative_noise guidance_scale"),
    )
    z = dreamda.vary(pipe, inverted, torch.arange(3), prompts, generators(33), **options)
    columns["DreamDA"] = [x, common.decode(pipe, inverted.start), common.decode(pipe, z)]

    x, steps = images[labels == 7][:3], inside.Steps()
    start, recipe = diagen.initial_embeddings(pipe, ["background"]), diagen.RECIPES["digits"]
    learning = {"steps": recipe["inversion_steps"], "lr": recipe["inversion_lr"], "flip": False}
    with torch.enable_grad():
        S = diagen.textual_inversion(
            pipe,
            x,
            torch.zeros(3, dtype=torch.long),
            ["<S>"],
            start,
            templates=["a photo of a {}"],
            **learning,
        )
    S = diagen.noisy_embeddings(S, [0.0, recipe["sigmas"][2]], [common.generator(35)], relative=True)[0]
    with diagen.NewTokens(pipe, ["<S|0>", "<S|1>"], S):
        pass
    prompts = [
        "a photo of a <S|1>",
        "a photo of a white <S|0> on a temple background",
        "a photo of a blue <S|0>",
    ]
    options = settings(diagen, "steps guidance_scale") | {"strength": 0.7, "on_step": steps}
    out = diagen.img2img(pipe, common.encode(pipe, x), prompts, generators(34), **options)
    columns["DIAGen"] = [x, common.decode(pipe, steps[3]["x"]), out]
    return columns


def save_overview(columns: dict[str, list], path: Path) -> None:
    """Draws the columns of images with CAPTIONS under their rows."""
    figure = inside.new_figure(4.4)
    for axes, (method, rows) in zip(figure.subplots(1, 3), columns.items(), strict=True):
        labels = ["goes in", "is perturbed", "comes out"] if axes.get_subplotspec().is_first_col() else ()
        under = [["", caption, ""] for caption in CAPTIONS[method]]
        inside.sheet(axes, [list(row) for row in rows], labels=labels, under=under)
        axes.set_title(method, fontsize=13, weight="bold")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    pretrain.save_sheet(PICTURES / "digits.png")
    pipe, oracle = common.load_pipeline(common.DIGITS_SD), judge.load_oracle()
    samples = world.render_pool(world.pools()["test"], 200, seed=21, style=world.STYLE)
    first = [int((samples["labels"] == y).nonzero()[k]) for k in (0, 1, 2) for y in range(10)][:24]
    images = samples["images"].permute(0, 3, 1, 2).float() / 255
    guides, labels = images[first], samples["labels"][first]

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
            **settings(actgen, SAMPLER),
        )

    save_overview(draw_columns(pipe, images, samples["labels"], classifier), PICTURES / "overview.png")
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
