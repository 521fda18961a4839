"""What no method owns: data sets, models, training, evaluation, run folders, and the embedded world.

    python common.py                       train digits_sd, the embedded Stable Diffusion, again; resumable
    pytest -s tests/test_digits_sd.py      judge it: does it draw the digit, colour and setting asked for?

In order: the digits world, data sets, classifiers, diffusion pipelines, training, evaluation, run folders,
pictures, the command line, and digits_sd.

Images are float [B, 3, H, W] in [0, 1] between functions; latents are scaled by the VAE's scaling factor.
Random draws come from generators passed in, one per image, so that batch size never changes a result.
"""

import argparse
import copy
import dataclasses
import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

ROOT = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------
# The digits world: handwritten digits, tinted, on crops of photographs (scikit-learn ships both)

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {
    "red": (225, 25, 35),
    "yellow": (250, 220, 40),
    "green": (40, 190, 60),
    "blue": (40, 70, 230),
    "white": (255, 255, 255),
    "purple": (160, 40, 200),
}
SETTINGS = ["temple", "flower", "plain"]
SIZE = 32
PIXELS_PER_DIGIT_PIXEL = 3.3  # an 8x8 digit becomes about 26 of the 32 pixels high
MIN_CONTRAST = 0.33  # the darkest-tenth RGB distance (of sqrt(3)) between a digit and what surrounds it


@cache
def digit_pools() -> dict[str, np.ndarray]:
    """Three disjoint pools of the 1,797 digits, as indices: web (half), train and test (a quarter)."""
    order = np.random.default_rng(0).permutation(1797)
    return {"web": order[:898], "train": order[898:1347], "test": order[1347:]}


@cache
def _sources():
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    photos = {}
    for name, photo in zip(["temple", "flower"], load_sample_images().images, strict=True):
        image = Image.fromarray(photo)
        photos[name] = image.resize((image.width // 5, image.height // 5), Image.Resampling.LANCZOS)
    return digits.images.astype(np.float32) / 16, digits.target, photos


def render(digit: int, colour: str, setting: str, geometry: tuple[float, float, float, float], seed: int):
    """One sample of the digits world: a pure function of its arguments (the same bytes every time).

    digit: index in scikit-learn's load_digits (0..1796); colour: a key of COLOURS; setting: one of SETTINGS;
    geometry: (degrees, scale, right, down), the shifts in pixels; seed: draws the crop or the plain colour.
    A background too close to the digit's colour is drawn again, so every sample is legible.
    Returns the image, uint8 [32, 32, 3], and the true foreground mask, bool [32, 32].
    """
    digits, _, photos = _sources()
    rng = np.random.default_rng(seed)
    degrees, scale, right, down = geometry
    k = 1 / (PIXELS_PER_DIGIT_PIXEL * scale)
    cos, sin = k * math.cos(math.radians(degrees)), k * math.sin(math.radians(degrees))
    cx, cy = SIZE / 2 + right, SIZE / 2 + down
    affine = (cos, sin, 6 - cos * cx - sin * cy, -sin, cos, 6 + sin * cx - cos * cy)  # 8x8 padded to 12x12
    padded = Image.fromarray(np.pad(digits[digit], 2))
    ink = padded.transform((SIZE, SIZE), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    alpha = np.clip((np.asarray(ink) - 0.3) / 0.3, 0, 1)[..., None]
    near = F.max_pool2d(torch.from_numpy(alpha[None, ..., 0]), 5, 1, 2)[0].numpy()
    ring = (near > 0.5) & (alpha[..., 0] < 0.2)

    tint = np.array(COLOURS[colour], np.float32) / 255
    best, background = -1.0, None
    for _ in range(40):
        if setting == "plain":
            value = rng.uniform(0, 1, 3)
            candidate = np.full((SIZE, SIZE, 3), 0.5 * value + 0.5 * value.mean(), np.float32)
        else:
            photo = photos[setting]
            side = rng.uniform(0.45, 0.95) * photo.height
            x, y = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
            crop = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
            candidate = np.asarray(crop, np.float32) / 255
            candidate = candidate[:, ::-1] if rng.random() < 0.5 else candidate
        distance = np.linalg.norm(candidate[ring] - tint, axis=-1) / math.sqrt(3)
        contrast = float(np.quantile(distance, 0.1))
        if contrast > best:
            best, background = contrast, candidate
        if contrast >= MIN_CONTRAST:
            break
    image = alpha * tint + (1 - alpha) * background
    return np.round(255 * image).astype(np.uint8), alpha[..., 0] > 0.5


def draw_geometry(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A slight rotation (degrees), scale and shift (pixels)."""
    return rng.uniform(-10, 10), rng.uniform(0.9, 1.08), rng.uniform(-2, 2), rng.uniform(-2, 2)


def digit_caption(label: int, colour: str | None = None, setting: str | None = None) -> str:
    """ "a photo of a red seven on a flower background"; colour and setting are optional."""
    return (
        f"a photo of a {colour + ' ' if colour else ''}{DIGIT_NAMES[label]}"
        f"{f' on a {setting} background' if setting else ''}"
    )


def uncommon_setting(label: int) -> str:
    """The setting in which a class is never seen in the splits `train`, `val` and `test`, as in FOCUS."""
    return SETTINGS[label % 3]


def render_pool(indices: np.ndarray, count: int, seed: int, settings: str = "all") -> dict:
    """Renders `count` samples of the digits `indices`, each digit in turn.

    settings: "all", "common" (a class's two) or "uncommon" (its third).
    Returns images uint8 [N, 32, 32, 3], masks bool [N, 32, 32], labels, colours and settings int64 [N].
    """
    _, targets, _ = _sources()
    out = {"images": [], "masks": [], "labels": [], "colours": [], "settings": [], "captions": []}
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        index = int(indices[i % len(indices)])
        label = int(targets[index])
        allowed = {
            "all": SETTINGS,
            "common": [s for s in SETTINGS if s != uncommon_setting(label)],
            "uncommon": [uncommon_setting(label)],
        }[settings]
        colour, setting = list(COLOURS)[rng.integers(6)], allowed[rng.integers(len(allowed))]
        image, mask = render(index, colour, setting, draw_geometry(rng), int(rng.integers(2**32)))
        out["images"].append(image)
        out["masks"].append(mask)
        out["labels"].append(label)
        out["colours"].append(list(COLOURS).index(colour))
        out["settings"].append(SETTINGS.index(setting))
        named_colour, named_setting = rng.random() < 0.5, rng.random() < 0.5
        out["captions"].append(
            digit_caption(label, colour if named_colour else None, setting if named_setting else None)
        )
    arrays = {k: np.stack(v) if k in ("images", "masks") else np.array(v) for k, v in out.items()}
    return {k: v if k == "captions" else torch.from_numpy(v) for k, v in arrays.items()}


# ----------------------------------------------------------------------------------------------------------
# Data sets


class UserError(Exception):
    """A mistake the user can mend; its one line says what, where and what to do (exit status 2)."""


def check_choice(name: str, value: str, choices) -> None:
    """Raises UserError, with the choices, if `value` is none of them."""
    if value not in choices:
        raise UserError(f"unknown {name} '{value}'; choose one of: {', '.join(choices)}")


class Images(torch.utils.data.Dataset):
    """Labelled images read on demand: item i is (transform(PIL image, RGB), label).

    sources: file paths, PIL images, or (data set, index) pairs of a torchvision data set.
    """

    def __init__(self, sources, labels, transform=None):
        self.sources, self.labels, self.transform = list(sources), [int(y) for y in labels], transform

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i):
        image = open_image(self.sources[i])
        return (self.transform(image) if self.transform else image), self.labels[i]

    def name(self, i: int) -> str:
        """Where image i comes from: its file, or "#i" for an image in memory."""
        source = self.sources[i]
        return (
            str(source) if isinstance(source, Path) else f"#{source[1] if isinstance(source, tuple) else i}"
        )

    def subset(self, indices, transform=None) -> "Images":
        """The images `indices`, with another transform if one is given."""
        indices = [int(i) for i in indices]
        sources, labels = [self.sources[i] for i in indices], [self.labels[i] for i in indices]
        return Images(sources, labels, transform or self.transform)

    def __add__(self, other: "Images") -> "Images":
        return Images(self.sources + other.sources, self.labels + other.labels, self.transform)


@dataclass
class Data:
    """The splits of a data set; `val` and `test_ood` where there are such.

    `unlabelled`: further training images whose labels no method may use: what a few-shot draw left, stl10's
    unlabelled part (labels -1).
    """

    class_names: list[str]
    train: Images
    test: Images
    val: Images | None = None
    test_ood: Images | None = None
    unlabelled: Images | None = None


def open_image(source) -> Image.Image:
    """A PIL image in RGB, upright by its EXIF tag, first frame if animated. UserError names a bad file."""
    if isinstance(source, Image.Image):
        return source
    try:
        if isinstance(source, tuple):
            dataset, i = source
            for attribute in ("samples", "_images", "_samples"):
                source = getattr(dataset, attribute, [source] * (i + 1))[i]
            return dataset[i][0].convert("RGB")
        with Image.open(source) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # 16-bit grey: PIL's own conversion would clip at 255
                image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {source}: {error}; replace or delete it") from None


def make_transforms(size: int, augment: str):
    """(training, evaluation) transforms from PIL to float [3, size, size] in [0, 1].

    augment: "digits" (shifts), "crop" (CIFAR: padded crop and flip), "resized" (ImageNet: random resized crop
    and flip) or "none"; with "+randaugment" after it RandAugment (Cubuk et al. 2019) comes on top.
    """
    from torchvision.transforms import v2

    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    square = [v2.Resize(size), v2.CenterCrop(size)]
    pad = max(1, size // 8)
    plain = augment.removesuffix("+randaugment")
    train = {
        "digits": [*square, v2.RandomCrop(size, padding=pad // 2, padding_mode="reflect")],
        "crop": [*square, v2.RandomCrop(size, padding=pad), v2.RandomHorizontalFlip()],
        "resized": [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()],
        "none": square,
    }
    check_choice("augment", plain, train)
    train = train[plain] + ([v2.RandAugment()] if augment != plain else [])
    margin = [v2.Resize(round(size / 0.875)), v2.CenterCrop(size)] if plain == "resized" else square
    return v2.Compose(train + tensor), v2.Compose(margin + tensor)


def english(name: str) -> str:
    """A class name as it reads in a prompt: spaces for underscores, "AnnualCrop" -> "annual crop"."""
    if re.fullmatch(r"(?:[A-Z][a-z]+){2,}", name):
        name = re.sub(r"(?<!^)([A-Z])", r" \1", name).lower()
    return " ".join(name.replace("_", " ").split())


DATASETS = "digits cifar10 cifar100 stl10 caltech101 pets cars eurosat imagenet coco folder".split()


def load_data(
    name: str,
    data_dir: str,
    size: int,
    augment: str,
    per_class: int = 0,
    seed: int = 0,
    unlabelled: bool = False,
) -> Data:
    """The splits of one of DATASETS, its training split cut to `per_class` images a class if that is > 0.

    data_dir: where the files are or are downloaded to (torchvision's layouts; coco: `annotations/` beside
    `train2017/` and `val2017/`; folder: `train/CLASS/*`, `test/CLASS/*`, optional `val/` and `test_ood/`).
    unlabelled: stl10's large unlabelled part, too.
    Raises UserError for an unknown name, missing files, an empty class, too few images of a class.
    """
    check_choice("dataset", name, DATASETS)
    train, rest = make_transforms(size, augment)
    loaders = {"digits": _digits, "folder": _folder, "coco": _coco}
    data = loaders[name](data_dir) if name in loaders else _torchvision(name, data_dir, unlabelled)
    data.class_names = [english(n) for n in data.class_names]
    data.train.transform = train
    for split in (data.test, data.val, data.test_ood):
        if split is not None:
            split.transform = rest
    counts = np.bincount(data.train.labels, minlength=len(data.class_names))
    if counts.min() == 0:
        empty = data.class_names[int(counts.argmin())]
        raise UserError(f"no training images of the class '{empty}' in {data_dir or name}")
    if per_class:
        if counts.min() < per_class:
            worst = int(counts.argmin())
            raise UserError(
                f"{per_class} images per class asked for, but class '{data.class_names[worst]}' has "
                f"{counts[worst]}; lower --examples_per_class"
            )
        drawn = draw_per_class(data.train.labels, per_class, seed)
        rest = np.setdiff1d(np.arange(len(data.train)), drawn)
        data.unlabelled = data.unlabelled or data.train.subset(rest)
        data.train = data.train.subset(drawn)
    return data


def draw_per_class(labels, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` random images of each class."""
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
    )


def split_per_class(labels, share: float, seed: int, at_least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out): a random `share` of each class held out, rounded, or `at_least` so many images."""
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    held = [
        rng.permutation(np.flatnonzero(labels == c))[: max(at_least, round(share * np.sum(labels == c)))]
        for c in np.unique(labels)
    ]
    held = np.sort(np.concatenate(held)).astype(int)
    return np.setdiff1d(np.arange(len(labels)), held), held


@cache
def _digit_splits():
    pool = digit_pools()
    parts = {  # name: (digits, renders, settings)
        "train": (pool["train"][:300], 1200, "common"),
        "val": (pool["train"][300:], 596, "common"),
        "test": (pool["test"], 1800, "common"),
        "test_ood": (pool["test"], 1800, "uncommon"),
    }
    splits = {}
    for i, (name, (digits, count, settings)) in enumerate(parts.items()):
        r = render_pool(digits, count, 100 + i, settings)
        splits[name] = ([Image.fromarray(x) for x in r["images"].numpy()], r["labels"].tolist())
    return splits


def _digits(_) -> Data:
    return Data(class_names=DIGIT_NAMES, **{k: Images(*v) for k, v in _digit_splits().items()})


def _folder(root: str) -> Data:
    extensions = set(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg"}
    root, splits, names = Path(root), {}, None
    for split in ("train", "test", "val", "test_ood"):
        folder = root / split
        if not folder.is_dir():
            if split in ("train", "test"):
                raise UserError(
                    f"{folder} is missing; a folder data set has {root}/train/CLASS/* and test/CLASS/*"
                )
            continue
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        names = names or classes
        unknown = sorted(set(classes) - set(names))
        if unknown or not classes:
            raise UserError(
                f"{folder} " + (f"has '{unknown[0]}', train/ not" if unknown else "has no classes")
            )
        sources, labels = [], []
        for c in classes:
            files = sorted(
                p for p in (folder / c).rglob("*") if p.suffix.lower() in extensions and p.name[0] != "."
            )
            if not files:
                raise UserError(f"the class folder {folder / c} has no images")
            sources += files
            labels += [names.index(c)] * len(files)
        splits[split] = Images(sources, labels)
    return Data(class_names=names, **splits)


def _coco(root: str) -> Data:
    splits, names = {}, None
    for split, year in (("train", "train2017"), ("test", "val2017")):
        path = Path(root) / "annotations" / f"instances_{year}.json"
        try:
            annotations = json.loads(path.read_text())
            categories = sorted(annotations["categories"], key=lambda c: c["id"])
            largest = {}  # image id -> (area, category id) of its largest object
            for a in annotations["annotations"]:
                largest[a["image_id"]] = max(
                    largest.get(a["image_id"], (0, 0)), (a["area"], a["category_id"])
                )
            files = {i["id"]: Path(root) / year / i["file_name"] for i in annotations["images"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read the COCO annotations {path}: {error!r}") from None
        if names is None:
            present = {category for _, category in largest.values()}
            kept = [c["id"] for c in categories if c["id"] in present]
            names = [c["name"] for c in categories if c["id"] in present]
        chosen = [(files[i], kept.index(c)) for i, (_, c) in sorted(largest.items()) if c in kept]
        splits[split] = Images([f for f, _ in chosen], [c for _, c in chosen])
    return Data(class_names=names, **splits)


def _torchvision(name: str, root: str, unlabelled: bool = False) -> Data:
    from torchvision import datasets as tv

    kinds = {
        "cifar10": lambda train, **k: tv.CIFAR10(root, train=train, **k),
        "cifar100": lambda train, **k: tv.CIFAR100(root, train=train, **k),
        "stl10": lambda train, **k: tv.STL10(root, split="train" if train else "test", **k),
        "pets": lambda train, **k: tv.OxfordIIITPet(root, split="trainval" if train else "test", **k),
        "cars": lambda train, **k: tv.StanfordCars(root, split="train" if train else "test", **k),
        "imagenet": lambda train, **k: tv.ImageNet(root, split="train" if train else "val"),
        "caltech101": lambda train, **k: tv.Caltech101(root, **k),
        "eurosat": lambda train, **k: tv.EuroSAT(root, **k),
    }

    def load(train: bool):
        try:
            return kinds[name](train, download=False)
        except (RuntimeError, OSError, ValueError, IndexError):
            pass
        try:
            return kinds[name](train, download=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{name} is not in {root} and could not be downloaded ({reason}); put its files there"
            ) from None

    def images(dataset, labels=None) -> Images:
        if labels is None:
            for attribute in ("targets", "labels", "y", "_labels"):
                labels = getattr(dataset, attribute, labels)
            labels = [target for _, target in dataset._samples] if labels is None else labels
        return Images([(dataset, i) for i in range(len(labels))], labels)

    train = load(True)
    names = getattr(train, "classes", None) or train.categories
    names = [n if isinstance(n, str) else n[0] for n in names]
    if name in ("caltech101", "eurosat"):  # no official split: a fifth of each class is the test split
        everything = images(train)
        rest, held = split_per_class(everything.labels, 0.2, seed=0)
        return Data(names, everything.subset(rest), everything.subset(held))
    data = Data(names, images(train), images(load(False)))
    if name == "stl10" and unlabelled:
        data.unlabelled = images(tv.STL10(root, split="unlabeled"))
    return data


# ----------------------------------------------------------------------------------------------------------
# Classifiers


class SmallCNN(nn.Module):
    """Five 3x3 convolutions with batch norm for small images: [B, 3, H, W] -> [B, outputs]."""

    def __init__(self, outputs: int, width: int = 24):
        super().__init__()
        plan = [(3, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1)]
        layers = []
        for i, (c_in, c_out, stride) in enumerate(plan):
            c_in, c_out = c_in if i == 0 else c_in * width, c_out * width
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4 * width, outputs)

    def forward(self, x):
        return self.fc(self.features(2 * x - 1))


class Normalised(nn.Module):
    """A torchvision classifier behind its normalisation: takes [B, 3, H, W] in [0, 1], gives logits."""

    def __init__(self, model: nn.Module, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x):
        return self.model((x - self.mean) / self.std)


class CLIPClassifier(nn.Module):
    """CLIP's image encoder and a linear head that starts as the zero-shot classifier of the class names."""

    def __init__(self, model_id: str, class_names: list[str]):
        super().__init__()
        from transformers import CLIPModel, CLIPTokenizer

        clip = from_pretrained(CLIPModel, model_id)
        tokenizer = from_pretrained(CLIPTokenizer, model_id)
        prompts = [f"a photo of a {name}" for name in class_names]
        with torch.no_grad():
            text = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
            text = clip.text_projection(clip.text_model(**text).pooler_output)
            weight = clip.logit_scale.exp() * F.normalize(text, dim=1)
        self.vision, self.projection = clip.vision_model, clip.visual_projection
        self.head = nn.Linear(*weight.T.shape, bias=False)
        self.head.weight.data.copy_(weight)
        self.size = clip.config.vision_config.image_size

    def forward(self, x):
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return self.head(F.normalize(self.projection(self.vision(x).pooler_output), dim=1))


CLIP_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


CLASSIFIERS = "small_cnn resnet18 resnet50 resnet152 wide_resnet50_2 vgg16 vit_s_16 vit_b_16 clip".split()


def build_classifier(
    name: str, class_names: list[str], size: int, pretrained: bool = False, clip: str = ""
) -> nn.Module:
    """One of CLASSIFIERS for images [B, 3, size, size] in [0, 1] -> logits [B, len(class_names)].

    ResNets get the CIFAR stem (3x3, stride 1, no pooling) up to 64 pixels; pretrained: torchvision's ImageNet
    weights (downloaded), for the small CNN train_backbone's; clip: model id or folder of the CLIP classifier,
    which is always pretrained.
    """
    from torchvision import models

    classes = len(class_names)
    if name == "small_cnn":
        model = SmallCNN(classes)
        if pretrained:
            model.features.load_state_dict(load_file(ROOT / "digits_sd" / "backbone" / "model.safetensors"))
        return model
    if name == "clip":
        return Normalised(CLIPClassifier(clip, class_names), *CLIP_MEAN_STD)
    check_choice("classifier", name, CLASSIFIERS)
    try:
        if name == "vit_s_16":
            if pretrained:
                raise UserError(
                    "torchvision has no pretrained vit_s_16; take vit_b_16, or --pretrained false"
                )
            model = models.VisionTransformer(size, 16, 12, 6, 384, 1536, num_classes=classes)
        else:
            if name == "vit_b_16" and pretrained and size != 224:
                raise UserError("a pretrained vit_b_16 takes images of 224 pixels; see --image_size")
            extra = {"image_size": size} if name == "vit_b_16" and not pretrained else {}
            name = "vgg16_bn" if name == "vgg16" else name
            model = models.get_model(name, weights="DEFAULT" if pretrained else None, **extra)
    except OSError as error:
        raise UserError(f"pretrained weights of {name} could not be downloaded ({error})") from None
    if "resnet" in name:
        if size <= 64:
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        model.fc = nn.Linear(model.fc.in_features, classes)
    elif name == "vgg16_bn":
        model.classifier[-1] = nn.Linear(4096, classes)
    else:
        model.heads.head = nn.Linear(model.heads.head.in_features, classes)
    return Normalised(model)


def split_head(classifier: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """(backbone, head): the classifier, its last linear layer replaced by the identity, and that layer."""
    name, head = [(n, m) for n, m in classifier.named_modules() if isinstance(m, nn.Linear)][-1]
    classifier.set_submodule(name, nn.Identity())
    return classifier, head


ORACLE_KEYS, ORACLE_HEADS = ["labels", "colours", "settings"], [10, 6, 3]


def load_oracle(folder: Path = ROOT / "digits_sd") -> SmallCNN:
    """The web pool's classifier: logits [B, 19] of 10 digits, 6 colours, 3 settings."""
    oracle = SmallCNN(sum(ORACLE_HEADS), width=32)
    oracle.load_state_dict(load_file(folder / "oracle" / "model.safetensors"))
    return oracle.float().eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------
# Diffusion pipelines


def from_pretrained(cls, model_id: str, **options):
    """cls.from_pretrained, with one clear line when the model cannot be loaded."""
    try:
        return cls.from_pretrained(model_id, **options)
    except Exception as error:
        text = " ".join(str(error).split())
        local = Path(model_id).exists() or model_id.startswith((".", "/"))
        if "gated" in text.lower() or "401" in text or "403" in text:
            advice = "it is gated or private: accept its licence on the hub and run `hf auth login`"
        elif local:
            advice = "the folder is missing, incomplete or of another kind"
        elif "404" in text or "not a valid" in text or "is not a local folder" in text.lower():
            advice = "no such model on the hub; check the id"
        else:
            advice = "no network? download it once while online, or name a local folder"
        raise UserError(f"cannot load the model '{model_id}': {advice} ({text[:160]})") from None


def load_pipeline(model_id: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
    """A frozen StableDiffusionPipeline with DDPM sampling and no safety checker; bf16 on a GPU, else fp32."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    options = {"dtype": dtype, "safety_checker": None, "requires_safety_checker": False}
    pipe = from_pretrained(StableDiffusionPipeline, model_id, **options).to(device)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def checkpoint_gradients(pipe, on: bool) -> None:
    """Gradients through U-Net and decoder keep few activations and compute the others twice, if `on`."""
    if on:
        pipe.unet.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()


def resolution(pipe) -> int:
    """The side of the pipeline's images in pixels."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def encode(pipe, images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1] -> scaled latents [B, C, h, w] (the posterior's mode, so no randomness)."""
    images = (2 * images - 1).to(pipe.device, pipe.vae.dtype)
    return pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor


def decode(pipe, latents: torch.Tensor, clamp: bool = True) -> torch.Tensor:
    """Scaled latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1], float32; differentiable.

    clamp=False leaves values outside [0, 1], where clamping would stop the gradient.
    """
    images = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    images = images.float() / 2 + 0.5
    return images.clamp(0, 1) if clamp else images


def ddim(pipe, steps: int, strength: float):
    """A DDIMScheduler set to `steps`, and the last `strength` of its timesteps [S], first to last.

    Raises UserError if there is no step, or one the model was not trained for (SD's have an offset).
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    trained, used = scheduler.config.num_train_timesteps, int(steps * strength)
    if 1 <= used <= steps <= trained:
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[steps - used :]
        if timesteps[0] < trained:
            return scheduler, timesteps
    raise UserError(f"--steps {steps} at --strength {strength} leaves no valid step")


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by any integers: one per image makes draws independent of batch and device."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    )


# ----------------------------------------------------------------------------------------------------------
# Training


def make_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """ "sgd" (momentum 0.9), "adam" or "adamw" over the parameters that require a gradient."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    check_choice("optimizer", name, kinds)
    options = {"momentum": 0.9} if name == "sgd" else {}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return kinds[name](parameters, lr, weight_decay=weight_decay, **options)


def cosine(progress: float, warmup: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up over the share `warmup`, then half a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def averaged(model: nn.Module, decay: float) -> nn.Module:
    """An exponential moving average of the weights and buffers; decay 0 follows the model exactly."""
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def seed_everything(*key: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators (shuffling, augmentation) from any integers."""
    from accelerate.utils import set_seed

    set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def make_accelerator():
    """Accelerate's engine: bf16 on a GPU, fp32 on the CPU; batches are split over the processes."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    return Accelerator(
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


def make_loader(
    images: Images, batch_size: int, accelerator, shuffle: bool = False, workers: int = 0, samples: int = 0
):
    """A DataLoader split over the processes; batch_size counts all of them.

    samples: draw this many images, in random order, again and again if there are fewer.
    """
    # Accelerator.prepare would keep every loader alive
    from accelerate.data_loader import prepare_data_loader

    if batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch_size {batch_size} cannot be split over {accelerator.num_processes} processes"
        )
    options = {"num_workers": workers, "pin_memory": accelerator.device.type == "cuda"}
    if samples:
        options["sampler"] = torch.utils.data.RandomSampler(images, num_samples=samples)
    else:
        options["shuffle"] = shuffle
    return prepare_data_loader(
        torch.utils.data.DataLoader(images, batch_size, **options),
        accelerator.device,
        accelerator.num_processes,
        accelerator.process_index,
        split_batches=True,
        put_on_device=True,
    )


def train_epoch(model, loader, optimizer, lr_at, accelerator, ema=None) -> dict[str, float]:
    """One pass of cross-entropy training; lr_at(i) is batch i's learning rate. Returns loss and accuracy."""
    model.train()
    total, loss_sum, correct = 0, torch.zeros((), device=accelerator.device), 0
    for i, (x, y) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(i)
        with accelerator.autocast():
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        if ema is not None:
            ema.update_parameters(accelerator.unwrap_model(model))
        total += len(y)
        loss_sum += loss.detach() * len(y)
        correct += (logits.detach().argmax(1) == y).sum()
    share_buffers(accelerator, model, ema)
    return {"loss": finite(loss_sum) / total, "accuracy": float(correct) / total}


def finite(loss: torch.Tensor) -> float:
    """A sum of training losses as a number. Raises UserError if it is none."""
    if not torch.isfinite(loss):
        raise UserError("the training loss is not a number; lower --lr")
    return float(loss)


def share_buffers(accelerator, *models) -> None:
    """Batch-norm statistics: every process judges with those of the first one."""
    if accelerator.num_processes > 1:
        for buffer in itertools.chain(*(model.buffers() for model in models if model is not None)):
            torch.distributed.broadcast(buffer, 0)


# ----------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def predict(model, images: Images, accelerator, workers: int = 0, batch_size: int = 64):
    """(logits [N, K], labels [N]) of all images, on the CPU, the same on every process of batch_size."""
    model.eval()
    outputs = []
    for x, y in make_loader(images, batch_size * accelerator.num_processes, accelerator, workers=workers):
        with accelerator.autocast():
            logits = model(x)
        outputs.append([t.cpu() for t in accelerator.gather_for_metrics((logits.float(), y))])
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def evaluate(model, data: Data, accelerator, workers: int = 0) -> dict[str, dict]:
    """Scores of a classifier (its first head, if there are several) on test and, if any, test_ood and val."""
    splits, judged = {"test": data.test, "test_ood": data.test_ood, "val": data.val}, {}
    for name, images in splits.items():
        if images is not None:
            logits, labels = predict(model, images, accelerator, workers)
            judged[name] = scores(logits if logits.ndim == 2 else logits[:, 0], labels)
    return judged


def scores(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """Top-1, top-5, negative log-likelihood, calibration error (15 bins) and per-class accuracy."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = logits.shape[1]
    hits = logits.topk(min(5, classes), 1).indices == labels[:, None]
    first = hits[:, 0].float()
    return {
        "top1": first.mean().item(),
        "top5": hits.any(1).float().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": multiclass_calibration_error(logits.softmax(1), labels, classes).item(),
        "per_class": [
            first[labels == c].mean().item() if (labels == c).any() else None for c in range(classes)
        ],
    }


def judge_digits(images: Images, accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's features [N, 128] of images of the digits world, and the digits it reads [N]."""
    oracle = load_oracle().to(accelerator.device)
    head, oracle.fc = oracle.fc.cpu(), nn.Identity()
    features, _ = predict(oracle, images, accelerator)
    return features, head(features)[:, : ORACLE_HEADS[0]].argmax(1)


def distribution_distances(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> dict[str, float]:
    """FID, KID (unbiased polynomial MMD^2), precision and recall of features fake [M, D] against real [N, D].

    Precision (recall): the share of fake (real) features inside the real (fake) manifold, the union of balls
    that reach each point's k-th neighbour (Kynkaanniemi et al. 2019).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    identity = nn.Identity()
    identity.num_features = real.shape[1]
    size = min(len(real), len(fake), 1000)
    fid = FrechetInceptionDistance(identity)
    kid = KernelInceptionDistance(identity, subsets=1, subset_size=size)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)

    def inside(points, manifold):
        # the nearest neighbour, at distance 0, is the point itself
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
        return (torch.cdist(points, manifold) <= radius).any(1).float().mean().item()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # KID compares random subsets
        mean_kid = kid.compute()[0].item()
    return {
        "fid": fid.compute().item(),
        "kid": mean_kid,
        "precision": inside(fake, real),
        "recall": inside(real, fake),
    }


def distances_to_test(images: Images, data: Data, accelerator) -> tuple[dict[str, float], torch.Tensor]:
    """On digits: distribution_distances of `images` to the real `test` images, and the digits that are read.

    "oracle": the share of images whose label is read. They have the transform of `test`.
    """
    real, _ = judge_digits(data.test, accelerator)
    fake, read = judge_digits(images, accelerator)
    right = (read == torch.tensor(images.labels)).float().mean().item()
    return distribution_distances(real, fake) | {"oracle": right}, read


def confidence_interval(values) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval (Student's t); the half-width of one value is NaN."""
    from scipy.stats import t

    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(
        t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    )


def interval_text(values, sign: str = "") -> str:
    """Mean ± half-width of the 95 % interval; one value stands alone. sign "+": a plus before a gain."""
    mean, half = confidence_interval(values)
    return f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


# ----------------------------------------------------------------------------------------------------------
# Run folders: checkpoints, images, records


class Run:
    """A run folder: config.json, metrics.jsonl, checkpoints, result.json. Only the main process writes."""

    def __init__(self, path: str | Path, args, accelerator, free: tuple[str, ...] = ()):
        """Opens or creates the folder. `free` names the arguments that may differ when a run goes on.

        Raises UserError when the folder holds a run with other arguments or is in use by another process.
        """
        self.path, self.main = Path(path), accelerator.is_main_process
        config = {k: v for k, v in vars(args).items()}
        if self.main:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is running in {self.path}; wait for it or give another --out"
                ) from None
            if args.overwrite and (self.path / "config.json").exists():
                for old in self.path.iterdir():
                    if old.name != ".lock":
                        shutil.rmtree(old) if old.is_dir() else old.unlink()
            for sub in ("samples", "synthetic", "latents"):
                (self.path / sub).mkdir(exist_ok=True)
            if any(self.path.glob("*.pt")):
                old = json.loads((self.path / "config.json").read_text())["args"]
                free = {"out", "overwrite", "data_dir", *free}
                differ = [k for k in config if k not in free and old.get(k) != config[k]]
                if differ:
                    k = differ[0]
                    raise UserError(
                        f"{self.path} holds a run with --{k} {old.get(k)}, this one has --{k} {config[k]}; "
                        "give another --out, or --overwrite to start afresh"
                    )
            else:
                self.write_json("config.json", {"args": config, "versions": versions()})
        self.wait = accelerator.wait_for_everyone
        self.wait()

    def write_text(self, name: str, text: str) -> None:
        if self.main:
            write_whole(self.path / name, text)

    def write_json(self, name: str, value) -> None:
        self.write_text(name, json.dumps(value, indent=1))

    def save(self, name: str, state: dict) -> None:
        if self.main:
            save_atomically(state, self.path / name)

    def load(self, name: str) -> dict | None:
        """The checkpoint `name` on the CPU, or None. Tensors and plain values only: nothing is unpickled."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            raise UserError(
                f"cannot read {path} ({str(error)[:80]}); delete it or give --overwrite to start afresh"
            ) from None

    def checkpoint(self, name: str, progress: dict, **parts) -> None:
        """Saves `progress`, plain values and tensors, and the states of `parts`: model, optimizer, ..."""
        self.save(name, {"progress": progress} | {key: part.state_dict() for key, part in parts.items()})

    def resume(self, name: str, progress: dict, **parts) -> dict:
        """The progress that checkpoint() saved, the states of `parts` restored; without one `progress`."""
        if (state := self.load(name)) is None:
            return progress
        for key, part in parts.items():
            part.load_state_dict(state[key])
        return state["progress"]

    def write_lines(self, name: str, lines: list[dict]) -> None:
        """Writes JSON lines (metrics.jsonl, metadata.jsonl)."""
        self.write_text(name, "".join(json.dumps(line) + "\n" for line in lines))

    def result(self) -> dict | None:
        """The result of a finished run, which is said, else None."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        if self.main:
            print(f"{self.path} is finished; --overwrite starts it afresh")
        return json.loads(path.read_text())

    def finish(self, result: dict, logs: dict[str, list[dict]]) -> dict:
        """Draws the logs' curves and writes the result, with which the run is finished; returns it."""
        if self.main:
            save_curves(logs, self.path / "curves.png")
        self.write_json("result.json", result)
        self.wait()
        return result


def versions() -> dict[str, str]:
    """Python and the libraries a result depends on."""
    from importlib.metadata import version

    names = ["torch", "torchvision", "diffusers", "transformers", "accelerate", "numpy"]
    return {"python": sys.version.split()[0], **{n: version(n) for n in names}}


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_atomically(state: dict, path: Path) -> None:
    """torch.save to a temporary file beside `path`, then rename: a reader sees the old file or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def class_folders(class_names: list[str]) -> list[str]:
    """A folder name for each class: its name without what file systems refuse, cut at 100 characters."""
    folders = []
    for name in class_names:
        clean = re.sub(r"[^\w .()'-]", "_", name).encode()[:100].decode(errors="ignore").strip(" .") or "_"
        folder, i = clean, 1
        while folder.lower() in {f.lower() for f in folders}:
            folder, i = f"{clean} {i}", i + 1
        folders.append(folder)
    return folders


def read_records(folder: Path, class_names: list[str]) -> list[dict]:
    """The metadata of a run's synthetic images: dicts, one per image. Raises UserError if there are none, or
    some of other classes.
    """
    try:
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if (folder / r["file_name"]).exists()]
        strange = [r["class_name"] for r in records if r["class_name"] not in class_names[r["label"] :][:1]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--synthetic: no images with metadata in {folder} ({error})") from None
    if strange or not records:
        problem = f"of another data set, of the class '{strange[0]}'" if strange else "missing"
        raise UserError(f"--synthetic: the images in {folder} are {problem}")
    return records


def keep_small(path: Path, size: int):
    """A synthetic image as a training source: up to 64 pixels in memory at that size, else its path."""
    if size > 64:
        return path
    image = open_image(path)
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)


def save_png(image: torch.Tensor, path: Path) -> None:
    """[3, H, W] in [0, 1] to a PNG file, whole or not at all, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    to_pil(image).save(temporary, format="PNG")
    os.replace(temporary, path)


def to_pil(image: torch.Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> PIL, by rounding."""
    return Image.fromarray((image.detach().float().cpu() * 255).round().byte().permute(1, 2, 0).numpy())


# ----------------------------------------------------------------------------------------------------------
# Pictures


def save_grid(rows: torch.Tensor, path: Path, columns: int, scale: int = 1) -> None:
    """Images [N, 3, H, W] in [0, 1] as one PNG of `columns` columns, each pixel enlarged `scale` times."""
    from torchvision.utils import make_grid

    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(F.interpolate(rows.float().cpu(), scale_factor=scale), nrow=columns, pad_value=1.0)
    to_pil(grid.clamp(0, 1)).save(path)


def save_captioned(images: list, captions: list[str], path: Path, columns: int) -> None:
    """A grid of PIL images (or files), each above its caption."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.9 * columns, 2.2 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(np.asarray(open_image(image)))
        text = "\n".join(textwrap.wrap(caption, 24))
        axes.set_title(text, y=-0.08, verticalalignment="top", fontsize=7, parse_math=False)
    figure.savefig(path, dpi=110)


def save_reliability(
    series: dict[str, tuple[torch.Tensor, torch.Tensor]], path: Path, bins: int = 10
) -> None:
    """A reliability diagram of (logits [N, K], labels [N]) per name: accuracy over confidence, in bins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "k:")
    for name, (logits, labels) in series.items():
        confidence, label = logits.softmax(1).max(1)
        bin_of = (confidence * bins).long().clamp(max=bins - 1)
        used = [b for b in range(bins) if (bin_of == b).any()]
        x = [confidence[bin_of == b].mean().item() for b in used]
        y = [(label == labels)[bin_of == b].float().mean().item() for b in used]
        axes.plot(x, y, "o-", label=f"{name}, ECE {scores(logits, labels)['ece']:.3f}")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=110)


def save_curves(series: dict[str, list[dict]], path: Path) -> None:
    """Accuracy, loss and, where there are pseudo-labels, their quality over epochs; a colour per series."""
    from matplotlib.figure import Figure

    tested = any("test" in line for lines in series.values() for line in lines)
    panels = {
        "accuracy (%)": {"test": "-", "test_ood": "--"} if tested else {"val": "-"},
        "training loss": {"loss": "-"},
        "pseudo-labels (%)": {"labelled": "-", "label_accuracy": "--", "seed_accuracy": ":"},
    }
    if not any("labelled" in line for lines in series.values() for line in lines):
        del panels["pseudo-labels (%)"]
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, (name, lines) in enumerate(series.items()):
            for key, style in keys.items():
                points = [(line["epoch"], line[key]) for line in lines if key in line]
                if points:
                    x, y = np.array(points).T
                    axes.plot(x, y * (100 if "%" in title else 1), f"C{i}{style}", label=f"{name}, {key}")
        axes.set(xlabel="epoch", ylabel=title, yscale="log" if "loss" in title else "linear")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------
# The command line: one run, or the ladder


@dataclass
class RunArgs:
    """Arguments of every method; "(recipe)": defaults to the data set's recipe in the method's script."""

    dataset: str = HfArg(default="digits", help=", ".join(DATASETS))
    data_dir: str = HfArg(default="data", help="where the data set is, or is downloaded to")
    out: str | None = HfArg(default=None, help="run folder (runs/METHOD-DATASET-sSEED)")
    overwrite: bool = HfArg(default=False, help="start afresh if the folder holds a run")
    seed: int = HfArg(default=0, help="seed of every random draw")
    ladder: bool = HfArg(default=False, help="run the ablation ladder over --seeds seeds")
    seeds: int = HfArg(default=5, help="seeds of the ladder")
    baseline: bool = HfArg(default=True, help="also train the method's baselines")
    real_only: bool = HfArg(default=False, help="train on real images alone")
    workers: int | None = HfArg(default=None, help="data loading processes (recipe)")
    # the generator
    diffusion: str | None = HfArg(default=None, help="model id or folder (recipe)")
    prompt: str | None = HfArg(default=None, help="{} is the class name (recipe)")
    steps: int | None = HfArg(default=None, help="sampling steps (recipe)")
    guidance_scale: float | None = HfArg(default=None, help="classifier-free guidance (recipe)")
    generation_batch_size: int | None = HfArg(default=None, help="images at a time (recipe)")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, slower gradients")
    # data and classifier
    examples_per_class: int | None = HfArg(default=None, help="few-shot draw, 0: all (recipe)")
    classifier: str | None = HfArg(default=None, help=", ".join(CLASSIFIERS) + " (recipe)")
    pretrained: bool | None = HfArg(default=None, help="ImageNet weights (recipe)")
    clip: str = HfArg(default="openai/clip-vit-base-patch32", help="the CLIP model, where one is used")
    image_size: int | None = HfArg(default=None, help="the classifier's pixels (recipe)")
    augment: str | None = HfArg(
        default=None, help="digits, crop, resized or none, also ...+randaugment (recipe)"
    )
    epochs: int | None = HfArg(default=None, help="epochs (recipe)")
    batch_size: int | None = HfArg(default=None, help="training batch, all GPUs (recipe)")
    optimizer: str | None = HfArg(default=None, help="sgd, adam or adamw (recipe)")
    lr: float | None = HfArg(default=None, help="peak learning rate, cosine schedule (recipe)")
    weight_decay: float | None = HfArg(default=None, help="weight decay (recipe)")
    warmup: float | None = HfArg(default=None, help="share of the epochs to warm up (recipe)")
    eval_every: int | None = HfArg(default=None, help="epochs between evaluations (recipe)")


def cli(main, args_class) -> None:
    """Parses the command line into `args_class`, runs main(args); a user's mistake: one line, status 2."""
    parser = HfArgumentParser(
        args_class,
        description=sys.modules["__main__"].__doc__.strip().split("\n")[0],
        usage=argparse.SUPPRESS,
    )
    args, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}; --help lists them")
    name = Path(sys.argv[0]).name
    try:
        main(args)
        return
    except UserError as error:
        message = " ".join(
            str(error).rpartition("UserError: ")[2].split()
        )  # a worker's comes with its traceback
    except torch.OutOfMemoryError:
        message = "out of GPU memory; lower --generation_batch_size (or --batch_size if it was training)"
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.EEXIST,
            errno.ENOTDIR,
        ):
            raise
        where = f" ({error.filename})" if error.filename else ""
        message = f"cannot write{where}: {error.strerror}; free some space or give another --out, then go on"
    except KeyboardInterrupt:
        message = "stopped; the same command goes on from here"
    print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def fill_recipe(args: RunArgs, recipes: dict[str, dict], method: str) -> RunArgs:
    """A copy of args, the fields left open taken from the data set's recipe. UserError: a value cannot be."""
    check_choice("dataset", args.dataset, recipes)
    args = dataclasses.replace(args)
    for name, value in recipes[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or f"runs/{method}-{args.dataset}{'-ladder' if args.ladder else ''}-s{args.seed}"
    if "{}" not in args.prompt:
        raise UserError(f"--prompt '{args.prompt}' has no {{}} for the class name")
    check_at_least(1, args, "epochs", "batch_size", "generation_batch_size", "steps", "seeds", "eval_every")
    check_at_least(0, args, "seed", "examples_per_class", "workers")
    return args


def check_at_least(least: int, args: RunArgs, *names: str) -> None:
    """Raises UserError if one of the arguments is less."""
    for name in names:
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")


def data_of(args: RunArgs, unlabelled: bool = False) -> Data:
    """The data set the arguments name; see load_data."""
    few, seed = args.examples_per_class, args.seed
    return load_data(args.dataset, args.data_dir, args.image_size, args.augment, few, seed, unlabelled)


def report(result: dict[str, dict], out: str) -> None:
    """The last lines printed: accuracy of each classifier in `result` (name: scores), images, seconds."""
    first, last = (list(result.values())[i] for i in (0, -1))
    for split in ("test", "test_ood"):
        if split in first:
            text = ", ".join(f"{name} {100 * r[split]['top1']:.1f} %" for name, r in result.items())
            gain = f" ({100 * (last[split]['top1'] - first[split]['top1']):+.1f})" if len(result) > 1 else ""
            print(f"{split:9}accuracy: {text}{gain}")
    training, generation = (sum(r.get(key, 0) for r in result.values()) for key in ("training", "generation"))
    images = max(r["synthetic"] for r in result.values())
    print(f"{images} images generated in {generation:.0f} s, {training:.0f} s of training; {out}")


def _file_name(rung: str) -> str:
    return re.sub("[^a-zA-Z0-9]+", "-", rung).strip("-")


def run_ladder(args: RunArgs, accelerator, rungs: dict[str, dict], run_once) -> None:
    """run_once(args, accelerator) for every rung (name: changed arguments) and seed, skipping finished runs.

    A rung's scores are those of the last classifier in its result; synthetic="RUNG" takes that rung's images,
    embeddings="RUNG" its learned tokens. Writes the table to ladder.json and ladder.md.
    """
    top1, distances = {}, {}
    for seed in range(args.seed, args.seed + args.seeds):
        out = {rung: str(Path(args.out) / f"{_file_name(rung)}-s{seed}") for rung in rungs}
        for rung, changes in rungs.items():
            changes = changes | {"seed": seed, "out": out[rung], "ladder": False}
            changes |= {k: out[changes[k]] for k in ("synthetic", "embeddings") if k in changes}
            *_, last = run_once(dataclasses.replace(args, **changes), accelerator).values()
            for split in ("test", "test_ood", "val"):
                if split in last:
                    top1.setdefault(split, {}).setdefault(rung, []).append(100 * last[split]["top1"])
            for name, value in last.get("distances", {}).items():
                distances.setdefault(name, {}).setdefault(rung, []).append(value)
    if accelerator.is_main_process:
        save_ladder(top1, Path(args.out), distances)


def save_ladder(top1: dict, folder: Path, distances: dict | None = None) -> None:
    """Prints and writes (ladder.json, ladder.md) top1[split][rung] = accuracies in %, one per seed.

    A row: mean +- 95 % interval over the seeds, and the paired difference to the rung before; then the means
    of distances[name][rung], where a rung has them.
    """
    distances = distances or {}
    rungs = list(next(iter(top1.values())))
    seeds = len(next(iter(top1.values()))[rungs[0]])
    lines = [
        "| rung |"
        + "".join(f" {s} | to the rung before |" for s in top1)
        + "".join(f" {d} |" for d in distances),
        "|---|" + "---|---|" * len(top1) + "---|" * len(distances),
    ]
    for i, rung in enumerate(rungs):
        cells = []
        for values in top1.values():
            cells += [interval_text(values[rung]), ""]
            if i > 0:
                cells[-1] = interval_text(np.subtract(values[rung], values[rungs[i - 1]]), "+")
        cells += [f"{np.mean(d[rung]):.3g}" if rung in d else "" for d in distances.values()]
        lines.append(f"| {rung} | " + " | ".join(cells) + " |")
    table = f"{seeds} seeds, mean ± 95 % interval, % top-1\n\n" + "\n".join(lines) + "\n"
    (folder / "ladder.json").write_text(json.dumps({"top1": top1, "distances": distances}, indent=1))
    (folder / "ladder.md").write_text(table)
    print(table)


def run_method(args: RunArgs, rungs: dict[str, dict], run_once) -> None:
    """A method's main: the ladder, its baselines being rungs of their own, or one run and its report."""
    accelerator = make_accelerator()
    if args.ladder:
        run_ladder(dataclasses.replace(args, baseline=False), accelerator, rungs, run_once)
        return
    result = run_once(args, accelerator)
    if accelerator.is_main_process:
        report(result, args.out)


# ----------------------------------------------------------------------------------------------------------
# digits_sd: a miniature Stable Diffusion, trained on the web pool


def build_tokenizer(words: list[str], max_length: int = 16):
    """A CLIPTokenizer whose BPE makes one token of each of `words` and falls back to bytes for other text."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())
    tokens, merges = alphabet + [c + "</w>" for c in alphabet], []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        left = parts[0]
        for right in parts[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            if left not in tokens:
                tokens.append(left)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    for word in words:  # an earlier word's merges may have split this one otherwise ("re" in "green")
        pieces = CLIPTokenizer(vocab=vocab, merges=merges).tokenize(word)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def build_digits_sd():
    """A StableDiffusionPipeline with random weights in digits_sd's architecture (about 3.1 M parameters)."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = "a photo of on background an the in".split() + DIGIT_NAMES + list(COLOURS) + SETTINGS
    tokenizer = build_tokenizer(words)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=96,
        attention_head_dim=4,  # the number of heads, by diffusers' historical naming
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@dataclass
class Args:
    """Training of digits_sd."""

    out: str = HfArg(default="runs/digits_sd", help="checkpoints of the training")
    images: int = HfArg(default=40000, help="renders of the web pool to train on")
    oracle_epochs: int = HfArg(default=6, help="epochs of the oracle classifier")
    vae_steps: int = HfArg(default=2500, help="autoencoder steps, batch 64")
    steps: int = HfArg(default=9000, help="U-Net and text encoder steps")
    batch_size: int = HfArg(default=64, help="U-Net batch size")
    lr: float = HfArg(default=1.5e-3, help="U-Net peak learning rate")
    seed: int = HfArg(default=0, help="seed of every draw")


def train_digits_sd(args: Args) -> None:
    """Renders the web pool; trains oracle, autoencoder, then U-Net and text encoder; writes digits_sd/.

    Stopped at any moment, it goes on from its last checkpoint when called again.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pipe, oracle = build_digits_sd().to(device), SmallCNN(sum(ORACLE_HEADS), width=32).to(device)
    vae, unet, text_encoder = pipe.vae, pipe.unet, pipe.text_encoder

    if (out / "web.pt").exists():
        web = torch.load(out / "web.pt", weights_only=True)
    else:
        print(f"rendering {args.images} images of the web pool")
        web = render_pool(digit_pools()["web"], args.images, seed=args.seed + 1)
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        web["captions"] = pipe.tokenizer(web["captions"].tolist(), **padded).input_ids
        save_atomically(web, out / "web.pt")
    images = web["images"].permute(0, 3, 1, 2).to(device)

    def draw(step: int, size: int = 64) -> torch.Tensor:
        return torch.randint(len(images), (size,), generator=torch.Generator().manual_seed(step))

    def oracle_loss(step):
        i = draw(step)
        heads = zip(oracle(images[i].float() / 255).split(ORACLE_HEADS, 1), ORACLE_KEYS, strict=True)
        return sum(F.cross_entropy(logits, web[key][i].to(device)) for logits, key in heads)

    def vae_loss(step):
        x = 2 * images[draw(step)].float() / 255 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl

    train_backbone(out, args.seed)
    oracle_steps = args.oracle_epochs * len(images) // 64
    _fit(oracle, oracle_loss, oracle_steps, 2e-3, 0.05, math.inf, out / "oracle.pt")
    _fit(vae, vae_loss, args.vae_steps, 3e-3, 0.0, 1.0, out / "vae.pt")
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        parts = [vae.encode(2 * x.float() / 255 - 1).latent_dist.mode() for x in images.split(256)]
    latents = torch.cat(parts)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents = latents / latents.std()
    captions = web["captions"].to(device)
    empty = pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0].to(device)

    unet.to(memory_format=torch.channels_last)  # a sixth faster on the CPU
    model = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    ema = averaged(model, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01)
    start = 0
    if (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    alphas = pipe.scheduler.alphas_cumprod.to(device)
    weight = torch.clamp(5 * (1 - alphas) / alphas, max=1)  # min-SNR-5 (Hang et al. 2023) for eps-prediction
    n, average = args.batch_size, None
    for step in (bar := tqdm(range(start, args.steps), "U-Net", initial=start, total=args.steps)):
        for group in optimizer.param_groups:  # warm up, constant, linear decay over the last 40 %
            group["lr"] = args.lr * min((step + 1) / 300, 1, (args.steps - step) / (0.4 * args.steps))
        g = torch.Generator().manual_seed(10**6 + step)
        i = draw(10**6 + step, n)
        t = ((torch.arange(n) + torch.rand(n, generator=g)) * 1000 / n).long().to(device)  # stratified
        noise = torch.randn(latents[i].shape, generator=g).to(device)
        drop = (torch.rand(n, 1, generator=g) < 0.1).to(device)
        text = text_encoder(torch.where(drop, empty, captions[i])).last_hidden_state
        x = pipe.scheduler.add_noise(latents[i], noise, t).to(memory_format=torch.channels_last)
        error = (unet(x, t, text).sample - noise).square().mean((1, 2, 3))
        optimizer.zero_grad()
        (weight[t] * error).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        error = error.mean().item()
        average = error if average is None else 0.99 * average + 0.01 * error
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            state = {"step": step + 1, "model": model.state_dict(), "ema": ema.state_dict()}
            save_atomically({**state, "optimizer": optimizer.state_dict()}, out / "checkpoint.pt")
            save_digits_sd(pipe, ema.module, oracle, out / "digits_sd")
    save_digits_sd(pipe, ema.module, oracle, ROOT / "digits_sd")


def _fit(model, loss_of, steps, lr, weight_decay, clip, file) -> None:
    """One-cycle AdamW on loss_of(step); the trained weights are kept in `file`."""
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in (bar := tqdm(range(steps), file.stem)):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    save_atomically(model.state_dict(), file)


def train_backbone(out: Path, seed: int = 0, steps: int = 2500, copies: int = 16) -> None:
    """Pretrains the small CNN without class labels, and writes it to digits_sd/backbone.

    It learns which of the web pool's 898 digits it sees, whatever the colour, the setting and the geometry:
    instance discrimination (Dosovitskiy et al. 2014), the self-supervised stand-in for ImageNet's weights.
    """
    pool = digit_pools()["web"]
    web = render_pool(pool, copies * len(pool), seed=seed + 2)
    images = web["images"].permute(0, 3, 1, 2)
    torch.manual_seed(seed)
    model = SmallCNN(len(pool))

    def loss(step):
        i = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(step))
        return F.cross_entropy(model(images[i].float() / 255), i % len(pool))

    _fit(model, loss, steps, 3e-3, 0.05, math.inf, out / "backbone.pt")
    (ROOT / "digits_sd" / "backbone").mkdir(exist_ok=True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.features.state_dict().items()}
    save_file(weights, ROOT / "digits_sd" / "backbone" / "model.safetensors")


def save_digits_sd(pipe, ema: nn.ModuleDict, oracle: nn.Module, folder: Path) -> None:
    """Writes the pipeline with the averaged weights, and the oracle, as fp16 safetensors.

    The text encoder stays fp32: transformers loads it as it is stored, diffusers the other parts as fp32.
    """
    half = copy.copy(pipe)
    half.unet, half.text_encoder = copy.deepcopy(ema["unet"]), copy.deepcopy(ema["text_encoder"])
    half.vae = copy.deepcopy(pipe.vae)
    half.unet.to(memory_format=torch.contiguous_format)
    half.unet.half()
    half.vae.half()
    half.save_pretrained(folder)
    (folder / "oracle").mkdir(exist_ok=True)
    save_file(copy.deepcopy(oracle).half().state_dict(), folder / "oracle" / "model.safetensors")


def save_digits_sheet(path: Path) -> None:
    """A contact sheet of the digits world: samples of the web pool above, their true masks below."""
    web = render_pool(digit_pools()["web"], 100, seed=0)
    images = web["images"].permute(0, 3, 1, 2).float() / 255
    masks = web["masks"][:, None].float().expand(-1, 3, -1, -1)
    save_grid(torch.cat([images, masks[:20]]), path, columns=20, scale=2)


def main(args: Args) -> None:
    save_digits_sheet(Path("samples/digits.png"))
    train_digits_sd(args)


if __name__ == "__main__":
    cli(main, Args)
