"""Measures how well the class token's attention finds the digit: mean IoU with the true mask (ActGen, 4.2).

    python digits/experiments/attention_masks.py         a few minutes on two cores

Prints a table of the mean IoU over 300 images of the test pool, by layer and sampling step, for two kinds of
attention maps:
    noised    of the real image, noised to step i of 20, from one conditional pass of the U-Net
    guided    the mask m_t that ActGen's sampler uses at step i with this image as the guide, averaged over
              the layers and the steps so far
A map becomes a mask by a threshold, which is chosen on 300 images of the train pool. So is the radius of the
centred disc that the masks are compared with. Draws digits/pictures/attention_masks.png.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import actgen  # noqa: E402
import common  # noqa: E402
from digits import world  # noqa: E402

PICTURE = common.ROOT / "digits" / "pictures" / "attention_masks.png"
COUNT, BATCH, LOOK_AT = 300, 50, [0, 5, 10, 15, 19]
RECIPE = actgen.RECIPES["digits"]
PROMPT, STEPS = RECIPE["prompt"], RECIPE["steps"]
THRESHOLDS = np.linspace(0.05, 0.95, 19)


def iou(masks: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The intersection over union [N] of two sets of masks, bools [N, H, W]."""
    return (masks & true).flatten(1).sum(1) / (masks | true).flatten(1).sum(1).clamp(min=1)


def as_images(samples: dict) -> torch.Tensor:
    """The images of world.render_pool as floats [N, 3, 32, 32] in [0, 1]."""
    return samples["images"].permute(0, 3, 1, 2).float() / 255


def enlarge(maps: torch.Tensor) -> torch.Tensor:
    """Attention maps [N, r * r] at the images' size, [N, 32, 32], normalised as ClassAttention.mask does."""
    side = round(maps.shape[1] ** 0.5)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    maps = ((maps - low) / (high - low)).view(-1, 1, side, side)
    return F.interpolate(maps, (world.SIZE, world.SIZE), mode="bilinear")[:, 0]


@torch.no_grad()
def noised_maps(pipe, samples: dict) -> dict[tuple[str, str, int], torch.Tensor]:
    """The maps [N, 32, 32] of the noised real images by ("noised", layer, step)."""
    names, n = [world.NAMES[y] for y in samples["labels"]], len(samples["labels"])
    weights = actgen.class_token_weights(pipe.tokenizer, PROMPT, names)
    text, _ = pipe.encode_prompt([PROMPT.format(name) for name in names], "cpu", 1, False)
    pipe.scheduler.set_timesteps(STEPS)
    latents = common.encode(pipe, as_images(samples))
    noise = torch.stack([torch.randn(latents[0].shape, generator=common.generator(1, i)) for i in range(n)])
    layer_names, maps = {m: name for name, m in pipe.unet.named_modules()}, {}
    for step in tqdm(LOOK_AT, "noised images"):
        t, listeners = pipe.scheduler.timesteps[step], []
        for resolution in (8, 4):
            for layer in actgen.ClassAttention(pipe.unet, resolution, weights).layers:  # one listener each
                listener = actgen.ClassAttention(pipe.unet, resolution, weights)
                listener.layers, listener.heard = [layer], (torch.arange(n), torch.arange(n))
                listeners.append(listener.__enter__())
        pipe.unet(pipe.scheduler.add_noise(latents, noise, t.expand(n)), t, text)
        for listener in listeners:
            listener.__exit__()
            name = layer_names[listener.layers[0]].split(".transformer")[0]
            layer = f"{listener.resolution}x{listener.resolution} {name}"
            maps["noised", layer, step] = enlarge(listener.maps)
    return maps


def guided_maps(pipe, samples: dict) -> dict[tuple[str, str, int], torch.Tensor]:
    """The maps [N, 32, 32] of guided sampling by ("guided", layer, step), as far as the guide is mixed in."""
    images, labels, n = as_images(samples), samples["labels"], len(samples["labels"])
    recorded, mask = [], actgen.ClassAttention.mask
    actgen.ClassAttention.mask = lambda self: (recorded.append(self.maps.clone()), mask(self))[1]
    try:
        for i in tqdm(range(0, n, BATCH), "guided sampling"):
            actgen.generate(
                pipe,
                images[i : i + BATCH],
                labels[i : i + BATCH],
                world.NAMES,
                generators=[common.generator(2, j) for j in range(i, min(n, i + BATCH))],
                prompt=PROMPT,
                steps=STEPS,
                **{k: RECIPE[k] for k in ("guidance_scale", "guidance_centre", "attention_resolution")},
            )
    finally:
        actgen.ClassAttention.mask = mask
    batches = len(range(0, n, BATCH))
    calls = len(recorded) // batches  # of mask(), in each batch; the last is for generate's own result
    return {
        ("guided", "8x8, all", step): enlarge(torch.cat(recorded[step::calls]))
        for step in LOOK_AT
        if step < calls - 1
    }


def best_disc(chosen: dict) -> torch.Tensor:
    """The centred disc [1, 32, 32] that has the greatest IoU with the true masks of `chosen`."""
    grid = torch.meshgrid(*[torch.arange(world.SIZE) + 0.5 - world.SIZE / 2] * 2, indexing="ij")
    radius = torch.stack(grid).norm(dim=0)
    discs = [(radius <= r)[None] for r in range(4, 20)]
    return max(discs, key=lambda disc: iou(disc, chosen["masks"]).mean())


def report(found: dict, labels: torch.Tensor) -> None:
    """Prints the table of mean IoUs, and the best layer and step of each kind by class.

    found[kind, layer, step]: (the IoUs [N], the threshold)
    """
    print("| maps | layer |" + "".join(f" step {s} |" for s in LOOK_AT))
    print("|---|---|" + "---|" * len(LOOK_AT))
    for layer in dict.fromkeys(key[:2] for key in found):
        cells = [f"{found[*layer, s][0].mean():.3f}" if (*layer, s) in found else "" for s in LOOK_AT]
        print(f"| {layer[0]} | {layer[1]} | " + " | ".join(cells) + " |")
    for kind in ("noised", "guided"):
        _, layer, step = key = max((k for k in found if k[0] == kind), key=lambda k: found[k][0].mean())
        values, threshold = found[key]
        by_class = " ".join(f"{name} {values[labels == c].mean():.2f}" for c, name in enumerate(world.NAMES))
        where = f"{layer}, step {step}, IoU {values.mean():.3f} at threshold {threshold:.2f}"
        print(f"best {kind}: {where}; {by_class}")


def save_picture(judged: dict, maps: dict) -> None:
    """Draws 16 images in columns: the image, its true mask, and its guided map at four steps."""
    columns = [judged["masks"], *(maps["guided", "8x8, all", step] for step in (0, 5, 10, 15))]
    grey = [m[:16, None].float().expand(-1, 3, -1, -1) for m in columns]
    common.save_grid(torch.cat([as_images(judged)[:16], *grey]), PICTURE, columns=16, scale=2)


def main() -> None:
    pipe, pools = common.load_pipeline(common.DIGITS_SD), world.pools()
    chosen = world.render_pool(pools["train"], COUNT, seed=11, style=world.STYLE)
    judged = world.render_pool(pools["test"], COUNT, seed=12, style=world.STYLE)
    print(f"centred disc: IoU {iou(best_disc(chosen), judged['masks']).mean():.3f}")

    choose, judge = (noised_maps(pipe, s) | guided_maps(pipe, s) for s in (chosen, judged))
    found = {}
    for key, maps in judge.items():
        threshold = max(THRESHOLDS, key=lambda h: iou(choose[key] > h, chosen["masks"]).mean())  # noqa: B023
        found[key] = iou(maps > threshold, judged["masks"]), threshold
    report(found, judged["labels"])
    save_picture(judged, judge)


if __name__ == "__main__":
    main()
