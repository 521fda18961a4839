"""The digits world: handwritten digits in six colours, on crops of two photographs or on a plain ground.

All of it comes from what scikit-learn ships: `load_digits` (1,797 digits of 8x8 pixels) and
`load_sample_images` (a temple and a flower). A sample is 3x32x32 and has a label, a colour, a setting, a true
foreground mask and a caption.

The digits are split into three pools. Only the built-in generator, the oracle and the backbone see the pool
`web`, in all colours and settings, as Stable Diffusion saw the internet. The pools `train` and `test` are for
classifiers. Each class appears in two settings in the splits `train`, `val` and `test`, and in its third
setting in `test_ood` only, as in FOCUS.

Three dials make the generator as imperfect as a real one is for a data set of one's own:
    confusion   the share of the web's captions that name the look-alike instead of the digit
    variety     how many of the 898 digits of the web pool the generator has seen
    style       how far the target (the four splits) differs from the web: another hand, another camera
The first two belong to the generator (pretrain.py); the third is an argument of `splits`.
"""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {"red": (225, 25, 35), "yellow": (250, 220, 40), "green": (40, 190, 60)}
COLOURS |= {"blue": (40, 70, 230), "white": (255, 255, 255), "purple": (160, 40, 200)}
SETTINGS = ["temple", "flower", "plain"]
SIZE = 32
PIXELS_PER_DIGIT_PIXEL = 3.3  # an 8x8 digit becomes about 26 of the 32 pixels high
LOOK_ALIKE = {0: 6, 6: 0, 1: 7, 7: 1, 2: 3, 3: 2, 4: 9, 9: 4, 5: 8, 8: 5}
STYLE = 0.65  # of the data set "digits", the default world
MIN_CONTRAST = 0.33  # of the distance from black to white, between a digit and 90 % of its surroundings


@cache
def pools() -> dict[str, np.ndarray]:
    """Three disjoint pools of indices into the 1,797 digits: web (half), train and test (a quarter each)."""
    order = np.random.default_rng(0).permutation(1797)
    return {"web": order[:898], "train": order[898:1347], "test": order[1347:]}


def web_digits(count: int) -> np.ndarray:
    """The indices of `count` digits of the web pool, in the pool's order, equally many per class (± 1)."""
    pool = pools()["web"]
    labels = sources()[1][pool]
    rank = [int((labels[:i] == label).sum()) for i, label in enumerate(labels)]  # among its class's digits
    return pool[np.sort(np.lexsort((labels, rank))[:count])]


@cache
def sources():
    """scikit-learn's digits [1797, 8, 8] in [0, 1], their labels [1797], and its photos {name: image}."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    photos = {}
    for name, photo in zip(["temple", "flower"], load_sample_images().images, strict=True):
        image = Image.fromarray(photo)
        photos[name] = image.resize((image.width // 5, image.height // 5), Image.Resampling.LANCZOS)
    return digits.images.astype(np.float32) / 16, digits.target, photos


def draw_ink(digit: int, geometry: tuple[float, float, float, float], style: float = 0.0) -> np.ndarray:
    """The opacity [32, 32, 1] in [0, 1] of a digit that is rotated, scaled and shifted by `geometry`.

    style: 0 to 1; a higher style slants the digit more and thins its lines, as another hand would
    """
    degrees, scale, right, down = geometry
    k = 1 / (PIXELS_PER_DIGIT_PIXEL * scale)
    cos, sin = k * math.cos(math.radians(degrees)), k * math.sin(math.radians(degrees))
    slanted = sin + 0.5 * style * k
    cx, cy = SIZE / 2 + right, SIZE / 2 + down
    affine = (cos, slanted, 6 - cos * cx - slanted * cy, -sin, cos, 6 + sin * cx - cos * cy)
    padded = Image.fromarray(np.pad(sources()[0][digit], 2))  # 8x8 padded to 12x12
    ink = padded.transform((SIZE, SIZE), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.clip((np.asarray(ink) - 0.3 - 0.1 * style) / 0.3, 0, 1)[..., None]


def photograph(image: np.ndarray, style: float, rng: np.random.Generator) -> np.ndarray:
    """An image [32, 32, 3] in [0, 1] as another camera takes it: muted, flat, soft, warm and grainy.

    style: from 0 (no change) to 1
    """
    if style == 0:
        return image
    image = image + 0.3 * style * (image.mean(-1, keepdims=True) - image)
    image = 0.5 + (1 - 0.2 * style) * (image - 0.5)
    lens, warmth = ImageFilter.GaussianBlur(0.5 * style), np.array([0.0, 0.04, 0.12], np.float32)
    soft = Image.fromarray(np.round(255 * image).astype(np.uint8)).filter(lens)
    image = np.asarray(soft, np.float32) / 255 * (1 - style * warmth)
    return (image + rng.normal(0, 0.02 * style, image.shape)).clip(0, 1)


def draw_background(setting: str, rng: np.random.Generator) -> np.ndarray:
    """A random plain colour or a random crop of a photograph, [32, 32, 3] in [0, 1]."""
    if setting == "plain":
        value = rng.uniform(0, 1, 3)
        return np.full((SIZE, SIZE, 3), 0.5 * value + 0.5 * value.mean(), np.float32)
    photo = sources()[2][setting]
    side = rng.uniform(0.45, 0.95) * photo.height
    x, y = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    crop = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
    background = np.asarray(crop, np.float32) / 255
    return background[:, ::-1] if rng.random() < 0.5 else background


def render(digit: int, colour: str, setting: str, geometry: tuple, seed: int, style: float = 0.0):
    """Draws one sample: its image, uint8 [32, 32, 3], and its true foreground mask, bool [32, 32].

    digit: index in scikit-learn's load_digits, 0 to 1796
    colour: a key of COLOURS; setting: one of SETTINGS
    geometry: rotation in degrees, scale, and shifts to the right and down in pixels
    seed: of the background and of the camera's grain
    style: see draw_ink and photograph

    Of up to 40 backgrounds, the first with enough contrast to the digit is used, else the one with most.
    The same arguments give the same bytes.
    """
    rng = np.random.default_rng(seed)
    alpha = draw_ink(digit, geometry, style)
    near = F.max_pool2d(torch.from_numpy(alpha[None, ..., 0]), 5, 1, 2)[0].numpy()
    ring = (near > 0.5) & (alpha[..., 0] < 0.2)  # the digit's surroundings

    tint = np.array(COLOURS[colour], np.float32) / 255
    best, background = -1.0, None
    for _ in range(40):
        candidate = draw_background(setting, rng)
        squared = np.sort(np.square(candidate[ring] - tint).sum(-1))  # distances from the digit's colour
        place, part = divmod(0.1 * (len(squared) - 1), 1)  # the 10 % quantile, as np.quantile has it
        contrast = np.sqrt(squared[int(place) : int(place) + 2] / 3) @ [1 - part, part]
        if contrast > best:
            best, background = contrast, candidate
        if contrast >= MIN_CONTRAST:
            break
    image = photograph(alpha * tint + (1 - alpha) * background, style, rng)
    return np.round(255 * image).astype(np.uint8), alpha[..., 0] > 0.5


def draw_geometry(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A slight random rotation (degrees), scale, and two shifts (pixels)."""
    return rng.uniform(-10, 10), rng.uniform(0.9, 1.08), rng.uniform(-2, 2), rng.uniform(-2, 2)


def caption(label: int, colour: str | None = None, setting: str | None = None) -> str:
    """A caption such as "a photo of a red seven on a flower background"; colour and setting are optional."""
    words = ["a photo of a", colour, NAMES[label], setting and f"on a {setting} background"]
    return " ".join(word for word in words if word)


def uncommon_setting(label: int) -> str:
    """The one setting in which a class is never seen in the splits train, val and test."""
    return SETTINGS[label % 3]


def render_pool(indices: np.ndarray, count: int, seed: int, settings="all", style=0.0, confusion=0.0) -> dict:
    """Renders `count` samples, taking the digits `indices` in turn; returns a dict of

        images, uint8 [N, 32, 32, 3]; masks, bool [N, 32, 32]; labels, colours and settings, int64 [N];
        captions, a list of N strings

    settings: "all", "common" (the class's two settings) or "uncommon" (its third)
    style: one for all samples or one for each, [N]; see draw_ink and photograph
    confusion: the probability that a caption names the look-alike of the digit; the label stays right
    """
    targets, styles = sources()[1], np.broadcast_to(style, count)
    out = {"images": [], "masks": [], "labels": [], "colours": [], "settings": [], "captions": []}
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        index = int(indices[i % len(indices)])
        label = int(targets[index])
        rare = uncommon_setting(label)
        common = [setting for setting in SETTINGS if setting != rare]
        allowed = {"all": SETTINGS, "common": common, "uncommon": [rare]}[settings]
        colour, setting = list(COLOURS)[rng.integers(6)], allowed[rng.integers(len(allowed))]
        geometry, seed_of_crop = draw_geometry(rng), int(rng.integers(2**32))
        image, mask = render(index, colour, setting, geometry, seed_of_crop, float(styles[i]))
        told = [word if rng.random() < 0.5 else None for word in (colour, setting)]
        text = caption(LOOK_ALIKE[label] if rng.random() < confusion else label, *told)
        row = image, mask, label, list(COLOURS).index(colour), SETTINGS.index(setting), text
        for values, value in zip(out.values(), row, strict=True):
            values.append(value)
    arrays = {k: np.stack(v) if k in ("images", "masks") else np.array(v) for k, v in out.items()}
    return {k: v.tolist() if k == "captions" else torch.from_numpy(v) for k, v in arrays.items()}


@cache
def splits(style: float = STYLE) -> dict[str, tuple[list[Image.Image], list[int]]]:
    """{split: (images, labels)}. The splits train, val and test share no digit; test_ood has those of test.

    style: how far the images differ from the web's, 0 to 1; see draw_ink and photograph
    """
    parts = {  # name: (digits, number of samples, settings)
        "train": (pools()["train"][:300], 1200, "common"),
        "val": (pools()["train"][300:], 596, "common"),
        "test": (pools()["test"], 1800, "common"),
        "test_ood": (pools()["test"], 1800, "uncommon"),
    }
    rendered = {}
    for i, (name, (digits, count, settings)) in enumerate(parts.items()):
        samples = render_pool(digits, count, 100 + i, settings, style)
        images = [Image.fromarray(image) for image in samples["images"].numpy()]
        rendered[name] = (images, samples["labels"].tolist())
    return rendered
