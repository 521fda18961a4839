"""Is the embedded generator good enough to rest on? Judged by the oracle, which is judged on held-out digits.

pytest -s tests/test_digits_sd.py          prints what it measures; writes samples/digits_sd.png
"""

import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm

import common

SAMPLES, GUIDANCE, STEPS = 500, 4.0, 40


@pytest.fixture(scope="module")
def oracle():
    return common.load_oracle()


@pytest.fixture(scope="module")
def real():
    """Held-out digits (train and test pools) in all colours and settings."""
    pools = common.digit_pools()
    return common.render_pool(np.concatenate([pools["train"], pools["test"]]), 899, seed=2)


def as_float(images):
    return images.permute(0, 3, 1, 2).float() / 255


def answers(oracle, images):
    """What the oracle sees: digit, colour and setting of each image."""
    return [logits.argmax(1) for logits in oracle(images).split(common.ORACLE_HEADS, 1)]


def share(x, y):
    return (x == y).float().mean().item()


def sample(pipe, prompts, seed):
    parts = []
    for i in tqdm(range(0, len(prompts), 50), "sampling"):
        generators = [common.generator(seed, j) for j in range(i, min(i + 50, len(prompts)))]
        options = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "output_type": "pt"}
        parts.append(pipe(prompts[i : i + 50], generator=generators, **options).images)
    return torch.cat(parts)


def test_oracle_names_held_out_real_samples(oracle, real):
    digit, colour, setting = answers(oracle, as_float(real["images"]))
    report = [share(digit, real["labels"]), share(colour, real["colours"]), share(setting, real["settings"])]
    print("\noracle on held-out real samples: digit {:.3f}, colour {:.3f}, setting {:.3f}".format(*report))
    assert report[0] >= 0.95 and min(report[1:]) >= 0.95


def test_class_prompts_draw_the_digit(pipe, oracle, real):
    labels = torch.arange(SAMPLES) % 10
    images = sample(pipe, [common.digit_caption(y) for y in labels], seed=3)
    common.save_grid(images[:100], common.ROOT / "samples" / "digits_sd.png", columns=20, scale=2)
    digit = answers(oracle, images)[0]
    per_class = [share(digit[labels == c], labels[labels == c]) for c in range(10)]
    print(f"\nclass prompts: {share(digit, labels):.3f} right; by class", [f"{p:.2f}" for p in per_class])
    with torch.no_grad():
        features = [oracle.features(2 * x - 1) for x in (as_float(real["images"]), images)]
        print({k: round(v, 3) for k, v in common.distribution_distances(*features).items()})
        halves = common.distribution_distances(features[0][:450], features[0][450:])
        print("two halves of the real samples:", {k: round(v, 3) for k, v in halves.items()})
    assert share(digit, labels) >= 0.90


def test_colour_and_setting_words_are_obeyed(pipe, oracle):
    n, colours = 180, list(common.COLOURS)
    wanted = [torch.arange(n) % 10, torch.arange(n) // 10 % 6, torch.arange(n) // 60 % 3]
    prompts = [
        common.digit_caption(y, colours[c], common.SETTINGS[s]) for y, c, s in zip(*wanted, strict=True)
    ]
    obeyed = [
        share(a, b) for a, b in zip(answers(oracle, sample(pipe, prompts, seed=4)), wanted, strict=True)
    ]
    print("\nfull prompts: digit {:.3f}, colour {:.3f}, setting {:.3f} right".format(*obeyed))
    assert obeyed[1] >= 0.85 and obeyed[2] >= 0.85


def test_stock_diffusers_loads_and_draws():
    stock = StableDiffusionPipeline.from_pretrained(common.ROOT / "digits_sd")
    image = stock("a photo of a red seven on a flower background", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    size = sum(f.stat().st_size for f in (common.ROOT / "digits_sd").rglob("*") if f.is_file())
    assert size < 8e6


def test_autoencoder_keeps_the_image(pipe, real):
    images = as_float(real["images"][:64])
    error = (common.decode(pipe, common.encode(pipe, images)) - images).square().mean().item()
    assert -10 * math.log10(error) > 28  # dB
