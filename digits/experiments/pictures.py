"""Draws README's overview of the three methods, the digits world, and what ActGen's losses change.

    python digits/experiments/pictures.py          about two minutes on two cores

Into digits/pictures:
    overview.png    of each method what goes in, what is perturbed, what comes out
    digits.png      samples of the web pool and of the target, and true masks
    losses.png      guides, and what ActGen makes of them from the same random draws: with no loss, with
                    L_contra (the bank: the images before), with L_adv (the classifier: the oracle), with both
Prints the oracle's cross-entropy, the share in which it reads the class, and the mean distance to the bank.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402
from digits import inside, pretrain, world  # noqa: E402

PICTURES = common.ROOT / "digits" / "pictures"
CAPTIONS = {  # what is perturbed; the label of what comes out
    "ActGen": ("the image, mixed in where the class is;\nthe prompt, by gradients", "the image's class"),
    "DreamDA": ("noise that leads back to the image;\nnoise on the bottleneck", "where the heads agree"),
    "DIAGen": ("the image, under noise; the token,\nby noise; the prompt", "the class, weighed"),
}


def generators(key: int, count: int = 3) -> list[torch.Generator]:
    return [common.generator(key, i) for i in range(count)]


def draw_columns(pipe, images: torch.Tensor, labels: torch.Tensor, classifier) -> dict[str, list]:
    """Three images by each method, from images [N, 3, 32, 32]; classifier: of L_adv, which one image has."""
    of = {c: (labels == c).nonzero()[:, 0] for c in range(10)}
    x, y = (v[[int(of[c][0]) for c in (3, 5, 8)]] for v in (images, labels))
    options = common.options(actgen.generate, actgen.METHOD.arguments())
    options |= {"generators": generators(31), "adversarial": torch.tensor([False, False, True])}
    out, _, masks = actgen.generate(pipe, x, y, world.NAMES, classifier, **options)
    columns = {"ActGen": [x, F.interpolate(masks, x.shape[2:], mode="bilinear"), out]}

    x, args = images[[int(of[c][0]) for c in (2, 6, 4)]], dreamda.METHOD.arguments()
    inverted = dreamda.invert(pipe, x, generators(32), **common.options(dreamda.invert, args))
    prompts = [world.caption(c) for c in (2, 6, 4)]
    options = common.options(dreamda.vary, args)
    z = dreamda.vary(pipe, inverted, torch.arange(3), prompts, generators(33), **options)
    columns["DreamDA"] = [x, inside.decoded(pipe, inverted.start), inside.decoded(pipe, z)]

    x, args, steps = images[of[7][:3]], diagen.METHOD.arguments(), inside.Steps()
    start = diagen.initial_embedding(pipe, "seven", args.initializer)
    S = diagen.textual_inversion(pipe, x, "<S>", start, **diagen.inversion_options(args))
    S = diagen.noisy_embeddings(S[None], [0.0, args.sigmas[2]], generators(35, 1), relative=True)[0]
    diagen.place_tokens(pipe, ["<S|0>", "<S|1>"], S)
    prompts = ["<S|1>", "white <S|0> on a temple background", "blue <S|0>"]
    prompts = [args.prompt.replace("{}", prompt) for prompt in prompts]
    options = common.options(diagen.img2img, args) | {"strength": 0.7, "on_step": steps.add}
    with torch.no_grad():
        z = common.encode(pipe, x)
    out = diagen.img2img(pipe, z, prompts, generators(34), **options)
    return columns | {"DIAGen": [x, inside.decoded(pipe, steps[3]["x"]), out]}


def main() -> None:
    pretrain.save_sheet(PICTURES / "digits.png")
    pipe, oracle = common.load_pipeline(common.DIGITS_SD), common.load_oracle()
    samples = world.render_pool(world.pools()["test"], 200, seed=21, style=world.STYLE)
    images, labels = samples["images"].permute(0, 3, 1, 2).float() / 255, samples["labels"]

    def classifier(x: torch.Tensor) -> torch.Tensor:
        return oracle(x)[:, :10]

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    columns = draw_columns(pipe, images, labels, classifier)
    for axes, (method, rows) in zip(figure.subplots(1, 3), columns.items(), strict=True):
        titles = ["goes in", "is perturbed", "comes out"] if method == "ActGen" else ()
        under = [["", text, ""] for text in ("", CAPTIONS[method][0], f"label: {CAPTIONS[method][1]}")]
        inside.sheet(axes, [list(row) for row in rows], labels=titles, under=under)
        axes.set_title(method, fontsize=13, weight="bold")
    figure.savefig(PICTURES / "overview.png", dpi=150, bbox_inches="tight")

    first = [int((labels == y).nonzero()[k]) for k in (0, 1, 2) for y in range(10)][:24]
    guides, y, bank, rows = images[first], labels[first], {}, [images[first][:12]]
    runs = {"no loss": (0, 0), "+ contrastive": (1, 0), "+ adversarial": (0, 0.1), "both": (1, 0.1)}
    for name, weights in runs.items():
        options = common.options(actgen.generate, actgen.METHOD.arguments()) | {"bank": bank}
        options |= dict(zip(("contrastive_weight", "adversarial_weight"), weights, strict=True))
        options["generators"] = generators(22, len(y))
        drawn, z, _ = actgen.generate(pipe, guides, y, world.NAMES, classifier, **options)
        bank = bank or {c: z[y == c] for c in range(10)}
        with torch.no_grad():
            logits = classifier(drawn)
        far = torch.stack([(z[i] - bank[int(c)]).flatten(1).norm(dim=1).mean() for i, c in enumerate(y)])
        loss, right = F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()
        print(f"{name}: oracle's loss {loss:.3f}, right {right:.2f}, distance to the bank {far.mean():.2f}")
        rows.append(drawn[:12])
    common.save_grid(torch.cat(rows), PICTURES / "losses.png", columns=12)


if __name__ == "__main__":
    main()
