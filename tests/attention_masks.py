"""Do the class token's attention maps find the digit? Mean IoU with the true mask, by step and layer.

    python tests/attention_masks.py      a few minutes on two cores; writes samples/attention_masks.png

300 images of the test pool; every threshold, and the radius of the centred disc they are compared with, is
chosen on 300 images of the train pool. "noised": the real image, noised to step i of 40, one conditional
U-Net row. "guided": the mask m_t that ActGen's sampler uses at step i with this image as its guide (maps
averaged over the layers and the steps so far).
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actgen  # noqa: E402
import common  # noqa: E402

COUNT, STEPS, LOOK_AT = 300, 40, [0, 5, 10, 15, 20, 25, 30, 35, 39]
THRESHOLDS = np.linspace(0.05, 0.95, 19)


def iou(masks: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """[N, H, W] bools against [N, H, W] bools -> [N]."""
    return (masks & true).flatten(1).sum(1) / (masks | true).flatten(1).sum(1).clamp(min=1)


def enlarge(maps: torch.Tensor) -> torch.Tensor:
    """[N, r * r] maps -> [N, 32, 32], normalised to [0, 1] as ClassAttention.mask does."""
    side = round(maps.shape[1] ** 0.5)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    maps = ((maps - low) / (high - low)).view(-1, 1, side, side)
    return F.interpolate(maps, (common.SIZE, common.SIZE), mode="bilinear")[:, 0]


def maps_of(pipe, samples: dict) -> dict[tuple[str, str, int], torch.Tensor]:
    """{("noised" or "guided", layer, step): [N, 32, 32]}."""
    images, labels = samples["images"].permute(0, 3, 1, 2).float() / 255, samples["labels"]
    names, out = [common.DIGIT_NAMES[y] for y in labels], {}
    prompt, n = "a photo of a {}", len(images)
    weights = actgen.class_token_weights(pipe.tokenizer, prompt, names)
    text, _ = pipe.encode_prompt([prompt.format(name) for name in names], "cpu", 1, False)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    latents = common.encode(pipe, images)
    layer_names = {m: name for name, m in pipe.unet.named_modules()}
    with torch.no_grad():
        for step in tqdm(LOOK_AT, "noised images"):
            noise = torch.stack(
                [torch.randn(latents[0].shape, generator=common.generator(1, i)) for i in range(n)]
            )
            t = scheduler.timesteps[step]
            listeners = []
            for resolution in (8, 4):
                for layer in actgen.ClassAttention(pipe.unet, resolution, weights).layers:
                    listener = actgen.ClassAttention(pipe.unet, resolution, weights)
                    listener.layers, listener.rows = [layer], (torch.arange(n), torch.arange(n))
                    listeners.append(listener.__enter__())
            pipe.unet(scheduler.add_noise(latents, noise, t.expand(n)), t, text)
            for listener in listeners:
                listener.__exit__()
                name = layer_names[listener.layers[0]].split(".transformer")[0]
                out["noised", f"{listener.resolution}x{listener.resolution} {name}", step] = enlarge(
                    listener.maps
                )
    recorded, mask = [], actgen.ClassAttention.mask
    actgen.ClassAttention.mask = lambda self: (recorded.append(self.maps.clone()), mask(self))[1]
    try:
        for i in tqdm(range(0, n, 50), "guided sampling"):
            part = slice(i, i + 50)
            actgen.generate(
                pipe,
                images[part],
                labels[part],
                common.DIGIT_NAMES,
                generators=[common.generator(2, j) for j in range(i, min(n, i + 50))],
                prompt=prompt,
                guidance_scale=4.0,
                attention_resolution=8,
            )
    finally:
        actgen.ClassAttention.mask = mask
    calls = len(recorded) // len(range(0, n, 50))  # the last is generate's own result
    for step in [s for s in LOOK_AT if s < calls - 1]:
        maps = torch.cat([recorded[b * calls + step] for b in range(len(recorded) // calls)])
        out["guided", "8x8, all", step] = enlarge(maps)
    return out


def main() -> None:
    pipe, pools = common.load_pipeline(str(common.ROOT / "digits_sd")), common.digit_pools()
    chosen = common.render_pool(pools["train"], COUNT, seed=11)
    judged = common.render_pool(pools["test"], COUNT, seed=12)

    grid = torch.stack(
        torch.meshgrid(*[torch.arange(common.SIZE) + 0.5 - common.SIZE / 2] * 2, indexing="ij")
    )
    radius = grid.norm(dim=0)
    discs = [(radius <= r)[None].expand(COUNT, -1, -1) for r in range(4, 20)]
    best = max(discs, key=lambda disc: iou(disc, chosen["masks"]).mean())
    print(f"centred disc: IoU {iou(best, judged['masks']).mean():.3f}")

    choose, judge, rows = maps_of(pipe, chosen), maps_of(pipe, judged), {}
    for key in judge:
        threshold = max(THRESHOLDS, key=lambda h: iou(choose[key] > h, chosen["masks"]).mean())
        rows[key] = (iou(judge[key] > threshold, judged["masks"]), threshold)
    layers = list(dict.fromkeys(key[:2] for key in rows))
    print(
        "| maps | layer |" + "".join(f" step {s} |" for s in LOOK_AT) + "\n|---|---|" + "---|" * len(LOOK_AT)
    )
    for layer in layers:
        cells = [f"{rows[*layer, s][0].mean():.3f}" if (*layer, s) in rows else "" for s in LOOK_AT]
        print(f"| {layer[0]} | {layer[1]} | " + " | ".join(cells) + " |")
    for kind in ("noised", "guided"):
        key = max((k for k in rows if k[0] == kind), key=lambda k: rows[k][0].mean())
        per_class = [rows[key][0][judged["labels"] == c].mean().item() for c in range(10)]
        by_class = " ".join(f"{n} {v:.2f}" for n, v in zip(common.DIGIT_NAMES, per_class, strict=True))
        value, threshold = rows[key][0].mean(), rows[key][1]
        print(
            f"best {kind}: {key[1]}, step {key[2]}, IoU {value:.3f} at threshold {threshold:.2f}; {by_class}"
        )
    image = judged["images"].permute(0, 3, 1, 2).float() / 255
    expand = lambda m: m[:, None].float().expand(-1, 3, -1, -1)  # noqa: E731
    rows_of = [image, expand(judged["masks"])] + [
        expand(judge["guided", "8x8, all", s]) for s in (0, 5, 10, 15)
    ]
    path = common.ROOT / "samples" / "attention_masks.png"
    common.save_grid(torch.cat([r[:16] for r in rows_of]), path, columns=16, scale=2)


if __name__ == "__main__":
    main()
