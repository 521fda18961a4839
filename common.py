"""What the three methods share: data sets, classifiers, pipelines, training, evaluation; last, the machinery.

Images are float [B, 3, H, W] in [0, 1] between functions. Latents are scaled by the VAE's scaling factor.
Every image has a random generator of its own, which is passed in, so the batch size never changes a draw.

README says how far results are reproducible.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import operator
import os
import re
import shutil
import sys
import textwrap
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

from digits import world

ROOT = Path(__file__).resolve().parent
DIGITS_SD = str(ROOT / "digits" / "sd")  # the embedded Stable Diffusion, as imperfect as a real one
DIGITS_CLEAN = str(ROOT / "digits" / "sd_clean")  # another, which knows the digits nearly perfectly
CACHE = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "generative-augmentation")


class UserError(Exception):
    """A mistake that the user can mend. Its one line says what is wrong, where, and what to do."""


def require(condition, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_choice(name: str, value: str, choices) -> None:
    """Raises UserError, which lists the choices, unless `value` is one of them."""
    require(value in choices, f"unknown {name} '{value}'; choose one of: {', '.join(choices)}")


def shorten(error: Exception) -> str:
    """An error's message as a part of one line."""
    return " ".join(str(error).split())[:200]


def say(line: str) -> None:
    """Prints a line, on the main process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


# ----------------------------------------------------------------------------------------------------------
# Data sets


class Images(torch.utils.data.Dataset):
    """Labelled images that are read on demand: item i is (transform(PIL image in RGB), label).

    sources: file paths, PIL images, or (data set, index) pairs for a data set that keeps its images itself
    transform: a Transform
    """

    def __init__(self, sources, labels, transform=None, kept=None):
        self.sources, self.labels, self.transform = list(sources), [int(y) for y in labels], transform
        self.kept = kept  # see keep

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, i):
        return self.transform(self.image(i)), self.labels[i]

    def image(self, i: int):
        """Image i: a PIL image or, of images that are kept, uint8 [3, size, size]."""
        return self.kept[i] if self.kept is not None else open_image(self.sources[i])

    def keep(self) -> "Images":
        """Reads all images at once and keeps them as squares of 8 bits, if they are small and fit in memory.

        The largest that are kept have 64 pixels, and all together 2 GiB.
        """
        size = getattr(self.transform, "size", None)
        if size and size <= 64 and len(self) * 3 * size**2 <= 2**31 and self.kept is None:
            with ThreadPool() as pool:
                self.kept = pool.map(lambda s: self.transform.square(open_image(s)), self.sources)
        return self

    def name(self, i: int) -> str:
        """The file of image i, or "#i" if the image does not come from a file of its own."""
        source = self.sources[i]
        if isinstance(source, Path):
            return str(source)
        return f"#{source[1] if isinstance(source, tuple) else i}"

    def subset(self, indices, transform=None) -> "Images":
        """The images `indices`, with another transform if one is given."""
        parts = [v and [v[int(i)] for i in indices] for v in (self.sources, self.labels, self.kept)]
        sources, labels, kept = parts
        return Images(sources, labels, self.transform, kept).transformed(transform or self.transform)

    def transformed(self, transform) -> "Images":
        """The same images with another transform."""
        now, then = (getattr(t, "size", None) and (t.size, t.how) for t in (transform, self.transform))
        return Images(self.sources, self.labels, transform, self.kept if now == then else None)

    def __add__(self, other: "Images") -> "Images":
        kept = None if self.kept is None or other.kept is None else self.kept + other.kept
        return Images(self.sources + other.sources, self.labels + other.labels, self.transform, kept)


@dataclass
class Data:
    """The splits of a data set. `val` and `test_ood` are None where the data set has no such split.

    unlabelled: further training images whose labels no method may use. They are what a few-shot draw left, or
    stl10's unlabelled part (labels -1).
    """

    class_names: list[str]
    train: Images
    test: Images
    val: Images | None = None
    test_ood: Images | None = None
    unlabelled: Images | None = None

    def splits(self) -> dict[str, Images]:
        """The splits that there are, by their names."""
        return {name: images for name, images in vars(self).items() if isinstance(images, Images)}


def open_image(source) -> Image.Image:
    """Opens a source of Images in RGB with 8 bits: upright by its EXIF tag, transparent parts in white.

    Raises UserError, which names the file, if it cannot be read.
    """
    if isinstance(source, Image.Image):
        return source
    name = Images([source], [0]).name(0)
    try:
        if isinstance(source, tuple):
            dataset, i = source
            if not isinstance(item := dataset[i], dict):
                return item[0].convert("RGB")
            (encoded,) = item.values()  # see _hf
            source = io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"]
        with Image.open(source) as image:
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF: the image as it is
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # PIL's own conversion would clip at 255
                image = Image.fromarray(to_8_bits(np.asarray(image)))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # of any kind, if the file is damaged
        raise UserError(f"cannot read the image {name}: {error}; replace or delete it") from None


def to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values of any range as 0 to 255.

    White is 1 for floats up to 1, else 2^n - 1 with the smallest n >= 8 that holds the image's largest value.
    If there are negative values, black is the least value and white the largest.
    """
    values = np.nan_to_num(grey.astype(float), nan=0, posinf=0, neginf=0)
    black, white = 0, values.max()
    if values.min() < -0.1 * abs(white):  # less is what resampling leaves around 0
        black = values.min()
    elif grey.dtype.kind == "f" and white < 1.1:
        white = 1
    else:
        white = 2 ** max(8, math.ceil(math.log2(white + 1))) - 1
    return ((values - black) * (255 / max(white - black, 1e-9))).round().clip(0, 255).astype(np.uint8)


def square(size: int, how: str = "crop") -> list:
    """The steps that make a PIL image a square of `size` pixels: "squeeze" its sides or "crop" its centre."""
    from torchvision.transforms import v2

    steps = {"crop": [v2.Resize(size), v2.CenterCrop(size)], "squeeze": [v2.Resize((size, size))]}
    check_choice("--square", how, steps)
    return steps[how]


class Transform:
    """How images are seen: PIL image in RGB -> float [3, size, size] in [0, 1], in three stages.

        square    a square of 8 bits, uint8 [3, size, size]
        each      a random change of one image of 8 bits, such as RandAugment
        steps     (function, n) pairs: random changes of a batch, float [B, 3, S, S], on its device. Each
                  takes uniform random numbers [B, n] in [0, 1), so that an image's change is its own

    size, how: of a square that is not random, else None
    """

    def __init__(self, square: list, steps=(), each=None, size: int | None = None, how: str | None = None):
        from torchvision.transforms import v2

        self.square, self.each, self.steps = v2.Compose([*square, v2.PILToTensor()]), each, list(steps)
        self.size, self.how = size, how

    @property
    def draws(self) -> int:
        """The random numbers that the steps take for each image."""
        return sum(n for _, n in self.steps)

    @property
    def random(self) -> bool:
        """Whether an image is seen otherwise each time."""
        return bool(self.steps or self.each or self.size is None)

    def read(self, image) -> torch.Tensor:
        """A PIL image, or one that is kept: uint8 [3, size, size] after square and each."""
        x = image if isinstance(image, torch.Tensor) else self.square(image)
        return self.each(x) if self.each else x

    def augment(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, size, size] -> float after the steps; u: [B, draws]."""
        x = x.float() / 255
        for function, n in self.steps:
            x, u = function(x, u[:, :n]), u[:, n:]
        return x

    def __call__(self, image) -> torch.Tensor:
        return self.augment(self.read(image)[None], torch.rand(1, self.draws))[0]


def shift(x: torch.Tensor, u: torch.Tensor, padding: int, mode: str) -> torch.Tensor:
    """Random crops [B, 3, S, S] of padded images, u: [B, 2]. mode: "constant" (black) or "reflect"."""
    (B, C, S, _), offset = x.shape, (u * (2 * padding + 1)).long()
    batch, channel, place = (torch.arange(n, device=x.device) for n in (B, C, S))
    rows, columns = (offset[:, k, None] + place for k in (0, 1))  # [B, S]
    at = batch[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    return F.pad(x, [padding] * 4, mode)[at]


def flip(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Mirrors half of the images, u: [B, 1]."""
    return torch.where(u[..., None, None] < 0.5, x.flip(3), x)


def affine(x: torch.Tensor, degrees, scale=1.0, right=0.0, down=0.0) -> torch.Tensor:
    """Images turned counter-clockwise, enlarged and shifted by shares of their side, each a number or [B]."""
    B = len(x)
    angle, scale, right, down = (
        torch.as_tensor(v, device=x.device).expand(B) for v in (degrees, scale, right, down)
    )
    cos, sin = torch.cos(torch.deg2rad(angle)) / scale, torch.sin(torch.deg2rad(angle)) / scale
    inverse = torch.stack(
        [cos, -sin, -2 * (cos * right - sin * down), sin, cos, -2 * (sin * right + cos * down)], 1
    )
    grid = F.affine_grid(inverse.view(B, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def turn(x: torch.Tensor, u: torch.Tensor, degrees: float = 15.0) -> torch.Tensor:
    """Turns the images by up to `degrees` either way; the corners become black. u: [B, 1]."""
    return affine(x, degrees * (2 * u[:, 0] - 1))


def make_transforms(size: int, augment: str, how: str = "crop") -> tuple[Transform, Transform]:
    """The training and the evaluation transform of images of `size` pixels.

    augment: "digits" (shifts), "crop" (CIFAR's padded crop, flip), "resized" (ImageNet's random resized crop,
        flip), "squeezed" (DIAGen: squeezed to a square, flip, rotation by up to 15 degrees), "zoomed" (DIAGen
        on FOCUS: random resized crop of 70 % or more, flip, rotation) or "none"; "+randaugment" after any of
        them adds RandAugment (Cubuk et al. 2019)
    how: see `square`, for evaluation and for augmentations that start from a square
    """
    from torchvision.transforms import v2

    kind, pad = augment.removesuffix("+randaugment"), max(1, size // 8)
    kinds = {
        "digits": [(partial(shift, padding=max(1, pad // 2), mode="reflect"), 2)],
        "crop": [(partial(shift, padding=pad, mode="constant"), 2), (flip, 1)],
        "resized": [(flip, 1)],
        "squeezed": [(flip, 1), (turn, 1)],
        "zoomed": [(flip, 1), (turn, 1)],
        "none": [],
    }
    check_choice("augment", kind, kinds)
    how = "squeeze" if kind in ("squeezed", "zoomed") else how
    zoomed = {"resized": [v2.RandomResizedCrop(size)], "zoomed": [v2.RandomResizedCrop(size, (0.7, 1.0))]}
    each = v2.RandAugment() if augment != kind else None
    if kind in zoomed:
        training = Transform(zoomed[kind], kinds[kind], each)
    else:
        training = Transform(square(size, how), kinds[kind], each, size, how)
    if kind == "resized":
        return training, Transform([v2.Resize(round(size / 0.875)), v2.CenterCrop(size)], size=size, how=kind)
    return training, Transform(square(size, how), size=size, how=how)


def english(name: str) -> str:
    """A class name as it reads in a prompt: without a number or an id before it, with spaces between words.

    "001.Black_footed_Albatross" becomes "Black footed Albatross", "n02085620-Chihuahua" "Chihuahua",
    "n01440764" "tench", "AnnualCrop" "annual crop", "Apple___Black_rot" "apple black rot".
    """
    if re.fullmatch(r"n\d{8}", name):
        return wordnet().get(name, [name])[0]
    name = re.sub(r"^(\d+\.|0\d*[_ -]|n\d{8}[_ -])[\W_]*(?=[^\W\d_])", "", name)
    if "__" in name or re.fullmatch(r"([A-Z][a-z]+){2,}", name):
        name = re.sub(r"(?<=[a-z])([A-Z])", r" \1", name).lower()
    return " ".join(name.replace("_", " ").split())


@functools.cache
def wordnet() -> dict[str, list[str]]:
    """The synonyms of each synset of ImageNet: n01440764 is called tench, or Tinca tinca."""
    from timm.data import ImageNetInfo

    names = {synset: lemmas.split(", ") for synset, lemmas in ImageNetInfo()._lemmas.items()}
    return names | {"n02012849": ["crane bird"]}  # WordNet calls the machine and the bird "crane"


def name_classes(folders: list[str], file: Path | None, prompt: str) -> list[str]:
    """English names of the classes that a data set calls `folders`; `file`: see read_class_names.

    Synsets that read alike are told apart by synonyms. Warns of other names that read alike, and of numbers
    and ids, with the prompt.
    """
    given = read_class_names(file, folders) if file else {}
    number = re.compile(r"\d+[\W_]+(?=[^\W\d_])")
    numbered = all(map(number.match, folders))  # "7-Eleven" among others keeps its number
    names = [given.get(f) or english(number.sub("", f, count=1) if numbered else f) for f in folders]
    count = Counter(name.lower() for name in names)
    for i, folder in enumerate(folders):
        if count[names[i].lower()] > 1 and folder not in given:
            names[i] = next((n for n in wordnet().get(folder, []) if n.lower() not in count), names[i])
    count = Counter(name.lower() for name in names)
    general = re.compile(r"\b(class|label|category|id)(?![a-z])", re.IGNORECASE)
    word = re.compile(r"[a-z]{2}|[A-Za-z]{3}|[^\x00-\x7f]")  # not in "12", "c0", "A330" or "AD"
    odd = {
        "a number or an id": [n for n in names if not word.search(general.sub("", n))],
        "another class's, too": [n for n in names if count[n.lower()] > 1],
    }
    for reason, those in odd.items():
        if those:
            folder, reads = folders[names.index(those[0])], fill_prompt(prompt, those[0])
            say(
                f"warning: the prompt of class '{folder}' will read \"{reads}\", {reason} "
                f"({len(those)} of {len(names)} classes); --class_names FILE names the classes"
            )
    return names


def read_class_names(file: Path, folders: list[str]) -> dict[str, str]:
    """The names in a file of lines "FOLDER,NAME", or of one name a line for all folders in their order."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names {file}: {error}") from None
    given, known = {}, set(folders)
    for line in lines:
        pairs = [re.split(rf"\s*{mark}\s*", line, maxsplit=1) for mark in (r"[,;:=\t]", r"\s")]
        folder, *name = next((pair for pair in pairs if pair[0] in known), [line])
        given[folder] = " ".join(name).replace("_", " ")
    strange = [folder for folder in given if folder not in known]
    if strange and len(lines) == len(folders):
        return {folder: line.replace("_", " ") for folder, line in zip(folders, lines, strict=True)}
    advice = f"give lines FOLDER,NAME, or {len(folders)} names in order"
    require(not strange, f"{file}: there is no class '{''.join(strange[:1])}'; {advice}")
    return given


TORCHVISION = {  # its class, and what that calls the training and the test split, if there are official ones
    "cifar10": ("CIFAR10", True, False),
    "cifar100": ("CIFAR100", True, False),
    "stl10": ("STL10", "train", "test"),
    "caltech101": ("Caltech101",),
    "pets": ("OxfordIIITPet", "trainval", "test"),
    "cars": ("StanfordCars", "train", "test"),
    "eurosat": ("EuroSAT",),
    "flowers102": ("Flowers102", "train", "test"),
    "food101": ("Food101", "train", "test"),
    "fgvc_aircraft": ("FGVCAircraft", "trainval", "test"),
    "dtd": ("DTD", "train", "test"),
    "sun397": ("SUN397",),
    "country211": ("Country211", "train", "test"),
    "imagenet": ("ImageNet", "train", "val"),
}
DATASETS = ["digits", *TORCHVISION, "coco", "folder", "hf"]


def load_data(
    name: str, data_dir: str, size: int, augment: str, per_class: int = 0, seed: int = 0,
    unlabelled: bool = False, style: float = world.STYLE, class_names: str = "",
    skip_bad_images: bool = False, prompt: str = "a photo of a {}",
) -> Data:  # fmt: skip
    """Loads one of DATASETS.

    data_dir: where the files are, or are downloaded to, in torchvision's layouts. coco: `annotations/` beside
    `train2017/` and `val2017/`. folder: see _folder. hf: see _hf.
    size, augment: see make_transforms
    per_class: draws so many training images of each class; 0 takes all
    unlabelled: also loads stl10's large unlabelled part
    style: of digits only, how far the images differ from the generator's, 0 to 1
    class_names: a file of class names, see read_class_names; by default `classes.txt` of a folder
    skip_bad_images: leaves out images that cannot be read
    prompt: what a warning of a class name shows it in

    Raises UserError for an unknown name, missing files, unreadable images, an empty class, a single class, or
    too few images of a class.
    """
    check_choice("dataset", name, DATASETS)
    augmented, plain = make_transforms(size, augment)
    if name in TORCHVISION:
        data = _torchvision(name, data_dir, unlabelled)
    elif name == "digits":
        data = Data(world.NAMES, **{split: Images(*part) for split, part in world.splits(style).items()})
    else:
        data = {"coco": _coco, "folder": _folder, "hf": _hf}[name](data_dir)
    own = Path(data_dir, "classes.txt")
    file = class_names or (own if name in ("folder", "hf") and own.exists() else None)
    data.class_names = name_classes(data.class_names, file and Path(file), prompt)
    check_images(data, data_dir, skip_bad_images)
    check_counts(data, data_dir or name, per_class)
    if per_class:
        drawn = draw_per_class(data.train.labels, per_class, seed)
        left = np.setdiff1d(np.arange(len(data.train)), drawn)
        data.unlabelled = data.unlabelled or data.train.subset(left)
        data.train = data.train.subset(drawn)
    for split, images in data.splits().items():
        images.transform = augmented if split in ("train", "unlabelled") else plain
        if split != "unlabelled":
            images.keep()
    return data


def check_counts(data: Data, where: str, per_class: int) -> None:
    """Raises UserError if a class or the test has too few images; says if the classes are very unequal."""
    names, counts = data.class_names, np.bincount(data.train.labels, minlength=len(data.class_names))
    (fewest, rarest), (most, largest) = ((counts[i], names[i]) for i in (counts.argmin(), counts.argmax()))
    require(fewest, f"no training images of the class '{rarest}' in {where}")
    too_few = f"--examples_per_class {per_class}: the class '{rarest}' has only {fewest} training images"
    require(fewest >= per_class, too_few)
    require(len(data.test), f"no test images in {where}")
    if most > 10 * fewest:
        advice = "--examples_per_class draws as many of each, the class mean counts them alike"
        say(f"unequal classes: {fewest} training images of '{rarest}', {most} of '{largest}'; {advice}")


def check_images(data: Data, where: str, skip: bool) -> None:
    """Opens every image that is not in memory; CACHE remembers the good ones, which are not opened again.

    Raises UserError, which lists the unreadable ones, or leaves them out if `skip`. Warns of blank images.
    """
    sources = {_stamp(source): source for images in data.splits().values() for source in images.sources}
    sources.pop(0, None)
    cache = CACHE / f"{hashlib.sha256(os.fsencode(os.path.abspath(where))).hexdigest()[:16]}.pt"
    known = set(read_file(cache, torch.tensor([])).tolist())
    todo = {stamp: source for stamp, source in sources.items() if stamp not in known}
    if not todo:
        return
    with ThreadPool() as pool:
        found = tqdm(pool.imap(_fault, todo.values(), 8), "checking images", len(todo), leave=False)
        faults = {stamp: fault for stamp, fault in zip(todo, found, strict=True) if fault}
    with contextlib.suppress(OSError):  # no place to remember them
        write_file(cache, torch.tensor([stamp for stamp in sources if stamp not in faults]))
    blank = [todo[stamp] for stamp, fault in faults.items() if fault == BLANK]
    if blank:
        say(f"warning: {len(blank)} images are {BLANK}, such as {Images(blank, []).name(0)}")
    bad = {stamp: fault for stamp, fault in faults.items() if fault != BLANK}
    if bad:
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        listed = f"{len(bad)} of {len(sources)} images: {'; '.join([*bad.values()][:10])}{more}"
        require(skip, f"{listed}; replace or delete them, or leave them out by --skip_bad_images")
        say(f"left out {listed}")
        for name, images in data.splits().items():
            good = [i for i, source in enumerate(images.sources) if _stamp(source) not in bad]
            setattr(data, name, images.subset(good))


BLANK = "nearly black or of one colour"


def _fault(source) -> str:
    """What is wrong with an image: that it cannot be read, or that it is blank; "" if nothing is."""
    try:
        image = open_image(source)
    except UserError as error:
        return str(error).removesuffix("; replace or delete it")
    low, high = image.convert("L").resize((64, 64), Image.Resampling.BOX).getextrema()
    return BLANK if high < 16 or high - low < 4 else ""


def _stamp(source) -> int:
    """A number that changes with the file of a source of Images; 0 if the image is in memory."""
    if isinstance(source, Path):
        stat = source.stat() if source.exists() else None  # if there is no file, opening it will say so
        key = f"{os.path.abspath(source)} {stat and (stat.st_size, stat.st_mtime_ns)}"
    elif isinstance(source, tuple) and hasattr(source[0], "_fingerprint"):  # of `datasets`
        key = f"{source[0]._fingerprint} {source[1]}"
    else:
        return 0
    return int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8], signed=True)


def by_class(labels) -> list[np.ndarray]:
    """The indices of each class's images, for the classes that occur."""
    ends = np.unique(labels, return_counts=True)[1].cumsum()
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])


def draw_per_class(labels, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` random images of each class."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(members)[:per_class] for members in by_class(labels)])


def split_per_class(labels, share: float, seed: int, at_least: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Holds out a random `share` of each class, at least `at_least` images: indices (others, held out)."""
    rng = np.random.default_rng(seed)
    counted = [(members, max(at_least, round(share * len(members)))) for members in by_class(labels)]
    held = np.sort(np.concatenate([rng.permutation(members)[:n] for members, n in counted])).astype(int)
    return np.setdiff1d(np.arange(len(labels)), held), held


def _data(names: list, splits: dict[str, list[tuple]], where) -> Data:
    """Splits of (source, class) pairs; without a test split, a fifth of each class of train becomes one."""
    index, images = {name: i for i, name in enumerate(names)}, {}
    advice = "a classifier needs two; if its folder holds the class folders, give that as --data_dir"
    require(len(names) > 1, f"{where} has one class only, '{', '.join(map(str, names))}'; {advice}")
    for split, pairs in splits.items():
        strange = next((name for _, name in pairs if name not in index), None)
        require(strange is None, f"{where}/{split} has a class '{strange}' that {where}/train does not have")
        images[split] = Images([source for source, _ in pairs], [index[name] for _, name in pairs])
    if "test" not in images:
        everything = images["train"]
        others, held = split_per_class(everything.labels, 0.2, seed=0)
        require(len(held), f"{where} has no test split, and too few images of each class to hold some out")
        say(f"{where} has no test split: a fifth of each class is held out for it, {len(held)} images")
        images |= {"train": everything.subset(others), "test": everything.subset(held)}
    return Data([str(name) for name in names], **images)


SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "test_ood": "test_ood"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
STRAY = re.compile(r"\.|@eaDir|__MACOSX|#recycle|\$RECYCLE|Thumbs\.db|BACKGROUND_Google", re.IGNORECASE)


def _folder(root: str, names: dict[str, str] = SPLITS) -> Data:
    """`train/CLASS/*`, and optionally `test`, `val` and `test_ood`, or class folders alone.

    names: which split a folder holds, by its name
    """
    root, skipped, found = Path(root), Counter(), {}
    layout = f"a folder data set has {root}/train/CLASS/*, or {root}/CLASS/*"
    folders = [p for p in sorted(root.glob("*")) if p.is_dir() and not STRAY.match(p.name)]
    known = [p for p in folders if p.name.lower() in SPLITS]
    parts = [(names.get(p.name.lower()), p) for p in folders]
    if len(known) < len(folders) and not any(q.is_dir() for p in known for q in p.iterdir()):
        parts = [("train", root)]  # class folders alone, of which one may be called "train"
    for split, part in parts:
        if split is None:
            skipped["folders that are no split"] += 1
            continue
        require(split not in found, f"{root} has two folders for {split}, one is {part.name}; keep one")
        found[split] = _class_files(part, skipped)
        require(found[split], f"{part} has no class folders; {layout}")
    require("train" in found, f"{root / 'train'} is missing; {layout}")
    said = ", ".join(f"{n} {kind}" for kind, n in skipped.most_common()) or "nothing"
    for split, classes in found.items():
        for name, files in classes.items():
            unknown = f"{root}/{split} has a class '{name}' that {root}/train does not have"
            require(name in found["train"], unknown)
            folder = dict(parts)[split] / name
            require(files, f"the class folder {folder} has no images; skipped: {said}")
    if skipped:
        say(f"skipped in {root}: {said}")
    splits = {s: [(file, name) for name in classes for file in classes[name]] for s, classes in found.items()}
    return _data([*found["train"]], splits, root)


def _class_files(root: Path, skipped: Counter) -> dict[str, list[Path]]:
    """The images in each class folder of `root`; counts what else there is in `skipped`, by kind.

    A link is followed once, and never back into `root`.
    """
    Image.init()
    stubs = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # PIL knows them, but cannot read them by itself
    kinds = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - stubs}
    heic = dict.fromkeys((".heic", ".heif"), " (convert them to JPEG)")
    classes, home, followed = {}, root.resolve(), set()

    def look(folder, images=None):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            kind = os.path.splitext(entry.name)[1].lower()
            target = Path(os.path.realpath(entry)) if entry.is_symlink() else None
            again = target in followed or target and (target in home.parents or target.is_relative_to(home))
            if target:
                followed.add(target)
            if STRAY.match(entry.name):
                skipped["hidden"] += 1
            elif target and not target.exists():
                skipped["broken links"] += 1
            elif again:
                skipped["links to what was there already"] += 1
            elif entry.is_dir():
                look(entry, classes.setdefault(entry.name, []) if images is None else images)
            elif kind not in kinds:
                skipped[f"{kind or 'nameless'} files{heic.get(kind, '')}"] += 1
            elif images is None:
                skipped["files outside of class folders"] += 1
            else:
                images.append(Path(entry))

    look(root)
    return classes


def _hf(root: str) -> Data:
    """OWNER/NAME or OWNER/NAME/CONFIG of the Hugging Face hub, or its formats in a local folder or file.

    The columns of images and labels are found by their types. If labels could be in several, name one after
    a #, as in uoft-cs/cifar100#fine_label. Images without a label are left out. Without a test split,
    validation is the test split. A split that is alone counts as train.
    """
    import datasets

    root, _, chosen = root.partition("#")
    path, hub = Path(root), re.fullmatch(r"(\w[\w.-]*(?:/[\w.-]+)?)(?:/([\w.-]+))?", root)
    advice = "give OWNER/NAME of the hub, which needs a network, or a local folder"
    require(path.exists() or hub, f"there is no data set '{root}'; {advice}")
    try:
        if any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(root)
        elif path.is_file():
            loaded = datasets.load_dataset(path.suffix[1:], data_files=root)
        elif path.exists():
            loaded = datasets.load_dataset(root)
        else:
            loaded = datasets.load_dataset(*hub.groups())
    except Exception as error:
        raise UserError(f"cannot load the data set '{root}' ({shorten(error)}); {advice}") from None
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    parts = {SPLITS.get(s.lower()) if len(loaded) > 1 else "train": part for s, part in loaded.items()}
    require("train" in parts, f"the data set '{root}' has no split train, but {', '.join(loaded)}")
    image, label = _columns(parts["train"].features, chosen, root)
    names, splits = dict(enumerate(getattr(parts["train"].features[label], "names", []))), {}
    for split, part in parts.items():
        labels = [names.get(y) if names else y for y in part[label]]  # None, or -1 of a ClassLabel: no label
        pictures = part.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        pairs = [((pictures, i), y) for i, y in enumerate(labels) if y is not None]
        if split and pairs:
            splits[split] = pairs
    require("train" in splits, f"'{root}' has no labels in the column '{label}'")
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    counts = ", ".join(f"{len(pairs)} for {split}" for split, pairs in splits.items())
    say(f"{root}: images of the column '{image}', labels of '{label}'; {counts}")
    used = {name for _, name in splits["train"]}
    return _data([name for name in names.values() if name in used] or sorted(used), splits, root)


def _columns(features, chosen: str, root: str) -> tuple[str, str]:
    """The columns of images and of labels; see _hf."""
    import datasets

    def of(kind):
        return [column for column, feature in features.items() if isinstance(feature, kind)]

    images = of(datasets.Image) + [c for c in of(dict) if "bytes" in features[c]]
    require(images, f"'{root}' has no column of images, but {', '.join(features)}")
    kinds = ("int", "uint", "bool", "string", "large_string")
    values = [c for c in of(datasets.Value) if features[c].dtype.startswith(kinds)]
    labels = of(datasets.ClassLabel) or values
    usual = [c for c in labels if c in ("label", "labels", "class", "target")]
    labels = [chosen] if chosen else usual if len(usual) == 1 else labels
    found = labels and labels[0] in features
    require(found, f"'{root}' has no column of labels {chosen}, but {', '.join(features)}")
    choice = f"choose one, as in --data_dir {root}#{labels[0]}"
    require(len(labels) == 1, f"labels of '{root}' could be {', '.join(labels)}; {choice}")
    return images[0], labels[0]


def _coco(root: str) -> Data:
    splits = {}
    for split, year in (("train", "train2017"), ("test", "val2017")):
        path = Path(root, "annotations", f"instances_{year}.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
            files = {image["id"]: Path(root, year, image["file_name"]) for image in content["images"]}
            objects = sorted((a["area"], a["category_id"], a["image_id"]) for a in content["annotations"])
            largest = {image: category for _, category, image in objects}
            splits[split] = [(files[image], names[category]) for image, category in sorted(largest.items())]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read the COCO annotations {path}: {error!r}") from None
    used = {name for _, name in splits["train"]}
    splits["test"] = [(file, name) for file, name in splits["test"] if name in used]
    return _data([name for name in names.values() if name in used], splits, root)


def _torchvision(name: str, root: str, unlabelled: bool = False) -> Data:
    from torchvision import datasets as tv

    kind, *splits = TORCHVISION[name]

    def load(*split):
        options = {} if name in ("cars", "imagenet") else {"download": True}  # if it is not there
        try:
            return getattr(tv, kind)(root, *split, **options)
        except Exception as error:
            missing = f"{name} is not in {root} and could not be downloaded ({shorten(error)})"
            raise UserError(f"{missing}; put its files there") from None

    def pairs(dataset) -> list[tuple]:
        has = vars(dataset)
        files = has.get("samples") or has.get("_samples")
        if "_labels" in has:
            files = zip(has.get("_images") or has["_image_files"], dataset._labels, strict=True)
        if files:  # in an order that does not depend on the file system
            return sorted((Path(file), dataset.classes[y]) for file, y in files)
        labels = has["targets"] if "targets" in has else has["labels"]
        return [((dataset, i), dataset.classes[y]) for i, y in enumerate(labels)]

    if name == "imagenet":
        for split in splits if any(Path(root).glob("ILSVRC2012_img_*.tar")) else ():
            load(split)  # unpacks its archive
        return _folder(root, {"train": "train", "val": "test", "validation": "test"})
    parts = [load(split) for split in splits] or [load()]
    if name == "caltech101":
        return _folder(Path(root, "caltech101", "101_ObjectCategories"))
    data = _data(parts[0].classes, dict(zip(("train", "test"), map(pairs, parts), strict=False)), name)
    if name == "stl10" and unlabelled:
        more = load("unlabeled")
        data.unlabelled = Images([(more, i) for i in range(len(more))], more.labels)
    return data


# ----------------------------------------------------------------------------------------------------------
# Classifiers


class SmallCNN(nn.Module):
    """Five 3x3 convolutions with batch norm, for small images: [B, 3, H, W] in [0, 1] -> [B, outputs]."""

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
    """A classifier behind its normalisation: images [B, 3, H, W] in [0, 1] -> logits."""

    def __init__(self, model: nn.Module, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x):
        return self.model((x - self.mean) / self.std)


class CLIPClassifier(nn.Module):
    """CLIP's image encoder and a linear head, which starts as the zero-shot classifier of the class names."""

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


def build_classifier(
    name: str, class_names: list[str], size: int, pretrained: bool = False, clip: str = ""
) -> nn.Module:
    """Builds a classifier: images [B, 3, size, size] in [0, 1] -> logits [B, len(class_names)].

    name: "small_cnn", "clip" or any model of timm, such as resnet50, vgg16_bn or vit_small_patch16_224
    pretrained: timm's weights, which are downloaded; for the small CNN those of digits/backbone
    clip: the model id or folder of the CLIP classifier, which is always pretrained

    Up to 64 pixels, ResNets and VGGs have the form that is usual for CIFAR. Raises UserError if there is no
    such classifier, or if its weights cannot be loaded.
    """
    import timm

    if name == "small_cnn":
        model = SmallCNN(len(class_names))
        if pretrained:
            model.features.load_state_dict(load_file(ROOT / "digits" / "backbone" / "model.safetensors"))
        return model
    if name == "clip":
        return Normalised(CLIPClassifier(clip, class_names), *CLIP_MEAN_STD)
    choices = "choose small_cnn, clip or a model of timm, such as resnet50"
    require(timm.is_model(name), f"unknown classifier '{name}'; {choices}")
    options = {"num_classes": len(class_names), "pretrained": pretrained}
    try:
        try:
            model = timm.create_model(name, img_size=size, **options)  # transformers have a fixed size
        except TypeError:
            model = timm.create_model(name, **options)
    except (OSError, RuntimeError) as error:
        what = f"the classifier {name} cannot be loaded for {size} pixels"
        raise UserError(f"{what} ({shorten(error)})") from None
    if size <= 64:
        model = as_on_cifar(model, len(class_names))
    return Normalised(model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


def as_on_cifar(model: nn.Module, classes: int) -> nn.Module:
    """Fits a model of timm to small images: a ResNet gets a 3x3 stem without pooling, a VGG one head."""
    from timm.layers import ClassifierHead
    from timm.models import ResNet
    from timm.models.vgg import VGG

    if isinstance(model, ResNet):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    if isinstance(model, VGG):
        model.pre_logits, model.head = nn.Identity(), ClassifierHead(512, classes)
    return model


def last_linear(classifier: nn.Module) -> tuple[str, nn.Linear]:
    """The name of a classifier's last linear layer, and the layer."""
    return [(name, m) for name, m in classifier.named_modules() if isinstance(m, nn.Linear)][-1]


def split_head(classifier: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Splits a classifier into its backbone, whose last linear layer becomes the identity, and that layer."""
    name, head = last_linear(classifier)
    classifier.set_submodule(name, nn.Identity())
    return classifier, head


# ----------------------------------------------------------------------------------------------------------
# Diffusion pipelines


def from_pretrained(cls, model_id: str, **options):
    """cls.from_pretrained, but a model that cannot be loaded ends in one line. `~` is the home folder."""
    model_id = os.path.expanduser(model_id)
    hub, advice = re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", model_id), "no such folder"
    require(hub or Path(model_id).exists(), f"cannot load the model '{model_id}': {advice}")
    if "/" not in model_id or not Path(model_id).parent.is_dir():
        advice += "; a model id of the hub needs a network and, if it is gated, its licence"
    if Path(model_id).exists():
        advice = "the folder is incomplete or holds a model of another kind"
    if Path(model_id).is_file():
        advice = f"it is a file; convert it by {cls.__name__}.from_single_file(FILE).save_pretrained(FOLDER)"
    try:
        return cls.from_pretrained(model_id, **options)
    except Exception as error:
        raise UserError(f"cannot load the model '{model_id}': {advice} ({shorten(error)})") from None


def native_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU that computes in it, fp16 on an older GPU, else fp32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_pipeline(
    model_id: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False, lora: str | None = None,
):  # fmt: skip
    """Loads a frozen StableDiffusionPipeline with DDPM sampling and without safety checker.

    dtype: by default native_dtype(device)
    gradient_checkpointing: gradients through U-Net and decoder take less memory and more time
    lora: see fuse_lora
    """
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.utils import is_peft_available, logging

    require(not lora or is_peft_available(), "--lora needs the package peft; install it: pip install peft")
    logging.set_verbosity(logging.CRITICAL)  # an error is raised as well
    logging.disable_progress_bar()
    device = torch.device(device)
    dtype = dtype or native_dtype(device)
    options = {"dtype": dtype, "safety_checker": None, "requires_safety_checker": False}
    if any(Path(model_id).glob("unet/*.fp16.safetensors")):
        options["variant"] = "fp16"
    pipe = from_pretrained(StableDiffusionPipeline, model_id, **options)
    check_kind(pipe, model_id)
    if lora:
        fuse_lora(pipe, lora)
    pipe.to(device)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)  # as in ddim()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
        if gradient_checkpointing:
            part.enable_gradient_checkpointing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_kind(pipe, model_id: str) -> None:
    """Raises UserError if the pipeline is not a text-to-image Stable Diffusion 1 or 2."""
    unet, latents = pipe.unet.config, pipe.vae.config.latent_channels
    channels = f"its U-Net takes {unet.in_channels} channels for {latents} latent ones, as for inpainting"
    lcm = "its U-Net wants the guidance scale, as an LCM's does; give its base model with an LCM as --lora"
    text_fits = unet.cross_attention_dim == pipe.text_encoder.config.hidden_size
    right = {
        "its U-Net wants further conditions, as SDXL's does": unet.addition_embed_type is None,
        channels: unet.in_channels == unet.out_channels == latents,
        "its text encoder does not fit its U-Net": text_fits,
        lcm: unet.time_cond_proj_dim is None,
    }
    for problem, absent in right.items():
        require(absent, f"'{model_id}' is not a text-to-image Stable Diffusion 1 or 2: {problem}")


def fuse_lora(pipe, path: str) -> None:
    """Adds LoRA weights (Hu et al. 2022) to the pipeline's own, whose layers stay what they are.

    path: a file, a folder or a model id. Raises UserError if these are no LoRA weights of this model.
    """
    path = os.path.expanduser(path)
    advice = "give LoRA weights that were trained on this model"
    if not Path(path).exists():
        advice = "no such file or folder; a model id of the hub needs a network"
    try:
        pipe.load_lora_weights(path)
        require(pipe.get_list_adapters(), "none of its weights has a place in the model")
        pipe.fuse_lora(safe_fusing=True)
        pipe.unload_lora_weights()
    except Exception as error:
        raise UserError(f"cannot load --lora '{path}': {advice} ({shorten(error)})") from None


def fill_prompt(prompt: str, name: str) -> str:
    """The prompt with the class name in the place of {}; other braces are plain text."""
    return prompt.replace("{}", name)


def check_prompt(pipe, prompt: str, class_names: list[str], where: str, vectors: int = 0) -> None:
    """Raises UserError, which begins with `where`, if the tokenizer's length cuts off a class name.

    vectors: instead of the name stands a token of so many vectors, if any
    """
    before, room = prompt.split("{}")[0], pipe.tokenizer.model_max_length - 2  # without start and end
    for name in class_names:
        end = len(pipe.tokenizer.tokenize(before if vectors else before + name)) + vectors
        what = f"{where}: the class '{name}' ends at token {end} of the prompt, of which {room} are read"
        require(end <= room, f"{what}; shorten it{' or lower --vectors' if vectors > 1 else ''}")


def resolution(pipe) -> int:
    """The side of the pipeline's images in pixels."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def encode(pipe, images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] -> scaled latents [B, C, h, w], the posterior's mode: not random."""
    images = (2 * images - 1).to(pipe.device, pipe.vae.dtype)
    return pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor


def decode(pipe, latents: torch.Tensor, clamp: bool = True) -> torch.Tensor:
    """Scaled latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1], float32; differentiable.

    clamp=False leaves values outside of [0, 1], where clamping would stop the gradient.
    """
    images = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    images = images.float() / 2 + 0.5
    return images.clamp(0, 1) if clamp else images


def ddim(pipe, steps: int, strength: float):
    """A DDIMScheduler set to `steps`, and the last `strength` of its timesteps [S], in the order of sampling.

    Raises UserError if no step is left, or if the model was not trained for one (SD's timesteps have an
    offset).
    """
    from diffusers import DDIMScheduler

    # choice: up to four steps, as distilled models take (LCM, Turbo), begin at the noisiest timestep, 999. By
    # SD's own spacing four would begin at 751, and a single one at 1, which leaves an image as it is.
    few = {"timestep_spacing": "trailing"} if steps <= 4 else {}
    # never clip latents: other schedulers' configs leave clip_sample to DDIM's default, True
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **few)
    trained, used = scheduler.config.num_train_timesteps, int(steps * strength)
    if 1 <= used <= steps <= trained:
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[steps - used :]
        if timesteps[0] < trained:
            return scheduler, timesteps
    advice = f"choose --strength up to 1, --steps below {trained}, and their product at least 1"
    none = f"--steps {steps} with --strength {strength} leaves no step that the model was trained for"
    raise UserError(f"{none}; {advice}")


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by any integers. One per image makes draws independent of batch and device."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


# ----------------------------------------------------------------------------------------------------------
# Training


def make_optimizer(
    name: str, model: nn.Module, lr: float, weight_decay: float, rates: dict[nn.Module, float] | None = None
) -> torch.optim.Optimizer:
    """ "sgd" (momentum 0.9), "adam" or "adamw" over the parameters that require a gradient.

    rates: for parts of the model their learning rates, in multiples of lr; set_lr keeps to them
    """
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    check_choice("optimizer", name, kinds)
    options = {"momentum": 0.9} if name == "sgd" else {}
    rates = rates or {}
    apart = {p for part in rates for p in part.parameters()}
    rest = [p for p in model.parameters() if p not in apart]
    parts = [(1.0, rest), *((factor, part.parameters()) for part, factor in rates.items())]
    groups = [
        {"params": [p for p in part if p.requires_grad], "lr": factor * lr, "factor": factor}
        for factor, part in parts
    ]
    return kinds[name]([group for group in groups if group["params"]], weight_decay=weight_decay, **options)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate; in make_optimizer's optimizers every part's in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)


def head_rate(args, net: nn.Module) -> dict[nn.Module, float]:
    """The learning rate of a classifier's last linear layer, for make_optimizer."""
    return {last_linear(net)[1]: args.head_lr}


def new_classifier(args, accelerator, class_names: list[str], wrap=lambda net: net, rates=head_rate):
    """A new classifier by the arguments: (the network, the model to train over all processes, its optimizer).

    wrap: changes the network before the optimizer sees it, such as a frozen backbone or several heads
    rates: gives, from (args, network), the learning rates of its parts, as make_optimizer takes them
    """
    torch.manual_seed(args.seed)
    net = wrap(build_classifier(args.classifier, class_names, args.image_size, args.pretrained, args.clip))
    net = net.to(memory_format=torch.channels_last)  # faster convolutions
    optimizer = make_optimizer(args.optimizer, net, args.lr, args.weight_decay, rates(args, net))
    return net, *accelerator.prepare(net, optimizer)


def cosine(progress: float, warmup: float = 0.0) -> float:
    """The learning-rate factor at `progress` in [0, 1]: linear warm-up, then half a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Best:
    """The weights of the epoch with the highest score so far: early stopping, and a part of a checkpoint."""

    def __init__(self):
        self.epoch, self.score, self.weights = -1, -math.inf, None

    def update(self, epoch: int, score: float, net: nn.Module) -> None:
        """Keeps a copy of the network's weights if the score is higher than every earlier one."""
        if score > self.score:
            self.epoch, self.score = epoch, score
            self.weights = {k: v.clone() for k, v in net.state_dict().items()}

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def seed_everything(accelerator, *key: int) -> None:
    """Seeds the global generators of Python, NumPy and torch, from which augmentations draw, by any integers.

    Each process gets another seed, and its loading workers get theirs from it.
    """
    from accelerate.utils import set_seed

    set_seed(int(np.random.SeedSequence((*key, accelerator.process_index)).generate_state(1)[0]))


def make_accelerator(report_to: str = "none", folder: str | None = None):
    """Accelerate's engine, which splits each batch over the processes.

    The precision is the one that `accelerate launch --mixed_precision` names, else that of native_dtype.
    Processes wait for one another as long as it takes: one may ask a language model meanwhile.
    report_to: one of accelerate's trackers, which logs in `folder`; UserError if its package is missing
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
    from accelerate.utils import DataLoaderConfiguration

    check_choice("--report_to", report_to, ["none", *LOGGER_TYPE_TO_CLASS])
    tracker = {} if report_to == "none" else {"log_with": report_to, "project_dir": folder}
    installed = not tracker or filter_trackers(report_to, folder)
    require(installed, f"--report_to {report_to} needs a package; pip install {report_to}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[native_dtype(device)]
    named = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the launcher sets "no" if it was not told
    return Accelerator(
        mixed_precision=native if named == "no" else named,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        **tracker,
    )


class Order(torch.utils.data.Sampler):
    """The images of an epoch in their order: pairs of an index and a random seed."""

    def __init__(self, count: int):
        self.set(torch.arange(count))

    def set(self, order: torch.Tensor, *key: int) -> None:
        """The next epoch's indices; `key` is the random seed of its augmentations."""
        self.order, self.seeds = order, torch.randint(2**62, (len(order),), generator=generator(*key))

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        return zip(self.order.tolist(), self.seeds.tolist(), strict=True)


class Seen(torch.utils.data.Dataset):
    """Images by (index, seed): uint8 [3, size, size], the random numbers of its augmentation, and its label.

    All random numbers of an image come from its seed. They depend on no batch, process or worker.
    """

    def __init__(self, images: Images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        (i, seed), transform = key, self.images.transform
        if transform.random:  # else the caller's generator is not reset
            torch.default_generator.manual_seed(seed)
        return transform.read(self.images.image(i)), torch.rand(transform.draws), self.images.labels[i]


class Loader:
    """Batches of images x and labels y on the device; each batch is split over the processes.

        for x, y in loader:                         all images in order, for evaluation
        for x, y in loader.shuffle(seed, epoch):    an epoch of training
        for x, y in loader.draw(order, seed):       the images that `order` [n] names

    batch_size: counts all processes
    samples: images of an epoch of training, again and again if there are fewer; a last batch that is not full
        is left out, unless it is the only one. 0: for evaluation
    workers: processes that read images, on each GPU; they live as long as the loader. Images that are kept in
        memory need none.
    """

    def __init__(self, images: Images, batch_size: int, accelerator, workers: int = 0, samples: int = 0):
        # Accelerator.prepare would keep every loader alive
        from accelerate.data_loader import prepare_data_loader

        whole = batch_size % accelerator.num_processes == 0
        message = f"--batch_size {batch_size} is not a multiple of {accelerator.num_processes} processes"
        require(whole, message)
        workers = 0 if images.kept is not None else min(workers, os.cpu_count())
        self.images, self.samples, self.order = images, samples, Order(len(images))
        self.batches = prepare_data_loader(
            torch.utils.data.DataLoader(
                Seen(images),
                batch_size,
                sampler=self.order,
                drop_last=samples >= batch_size,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=accelerator.device.type == "cuda",
            ),
            accelerator.device,
            accelerator.num_processes,
            accelerator.process_index,
            split_batches=True,
            put_on_device=True,
        )

    def draw(self, order, *key: int) -> "Loader":
        """Sets the images of the next epoch; `key` is the random seed of their augmentations."""
        self.order.set(torch.as_tensor(order), *key)
        return self

    def shuffle(self, *key: int) -> "Loader":
        """Sets a random order, by the random seed `key`, for the next epoch."""
        g, n = generator(*key), len(self.images)
        passes = [torch.randperm(n, generator=g) for _ in range(math.ceil(self.samples / n))]
        return self.draw(torch.cat(passes)[: self.samples], *key, 1)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for x, u, y in self.batches:
            yield self.images.transform.augment(x, u), y


def train_epoch(model, loader, optimizer, lr_at, accelerator, label_smoothing=0.0) -> dict[str, float]:
    """Trains for one pass over the loader with cross-entropy. Returns the mean loss and the accuracy.

    loader: batches of images and their labels [B], or probabilities [B, K]
    lr_at(i): the learning rate of batch i
    label_smoothing: the share of a label, or of its probabilities, that all classes get alike
    """
    model.train()
    total, loss_sum, correct = 0, torch.zeros((), device=accelerator.device), 0
    for i, (x, y) in enumerate(loader):
        set_lr(optimizer, lr_at(i))
        with accelerator.autocast():
            logits = model(x)
            loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        total += len(y)
        loss_sum += loss.detach() * len(y)
        correct += (logits.detach().argmax(1) == (y if y.ndim == 1 else y.argmax(1))).sum()
    share_buffers(accelerator, model)
    return {"loss": finite(loss_sum) / total, "accuracy": float(correct) / total}


def to_evaluate(epoch: int, epochs: int, every: int) -> bool:
    """Whether a classifier is evaluated after this epoch: after every `every` epochs, and after the last."""
    return (epoch + 1) % every == 0 or epoch + 1 == epochs


def finite(loss: torch.Tensor) -> float:
    """A sum of training losses as a number. Raises UserError if it is infinite or NaN."""
    require(torch.isfinite(loss), "the training loss is not a number; lower --lr")
    return float(loss)


def share_buffers(accelerator, model) -> None:
    """Gives every process the batch-norm statistics of the first, so that all judge alike."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


# ----------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def predict(model, images: Images, accelerator, workers: int = 0, batch_size: int = 64, reduce=None, seed=()):
    """The logits [N, K] and labels [N] of all images, on the CPU and equal on every process.

    batch_size: of each process
    seed: integers, the random seed of the images' augmentation, if there is one
    reduce: a function of the logits of a batch, which returns tensors to keep in their place
    """
    model.eval()
    outputs = []
    loader = Loader(images, batch_size * accelerator.num_processes, accelerator, workers)
    for x, y in loader.draw(range(len(images)), *seed):
        with accelerator.autocast():
            logits = model(x)
        require(logits.isfinite().all(), "the classifier's outputs are not numbers; lower --lr")
        kept = (logits.float(),) if reduce is None else reduce(logits.float())
        outputs.append([t.cpu() for t in accelerator.gather_for_metrics((*kept, y))])
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def evaluate(model, data: Data, accelerator, workers: int = 0) -> dict[str, dict]:
    """The scores of a classifier, or of its first head, on test and, if there are any, test_ood and val."""
    splits, judged = {"test": data.test, "test_ood": data.test_ood, "val": data.val}, {}
    for name, images in splits.items():
        if images is not None:
            logits, labels = predict(model, images, accelerator, workers)
            judged[name] = scores(logits if logits.ndim == 2 else logits[:, 0], labels)
    return judged


def scores(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """Top-1, top-5, class mean, negative log-likelihood, expected calibration error (15 bins), per class.

    class_mean: the mean of the classes' accuracies, which counts rare classes as much as frequent ones
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = logits.shape[1]
    hits = logits.topk(min(5, classes), 1).indices == labels[:, None]
    first = hits[:, 0].float()
    per_class = [first[labels == c].mean().item() if (labels == c).any() else None for c in range(classes)]
    return {
        "top1": first.mean().item(),
        "top5": hits.any(1).float().mean().item(),
        "class_mean": float(np.mean([accuracy for accuracy in per_class if accuracy is not None])),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": multiclass_calibration_error(logits.softmax(1), labels, classes).item(),
        "per_class": per_class,
    }


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The FID (Heusel et al. 2017) of features `fake` [M, D] to `real` [N, D]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = nn.Identity()
    identity.num_features = real.shape[1]
    fid = FrechetInceptionDistance(identity)
    fid.update(real, real=True)
    fid.update(fake, real=False)
    return fid.compute().item()


def judge_images(net, run, title: str, folder: Path, data: Data, accelerator, workers: int = 0) -> dict:
    """How well the generator knows classes and style: how a classifier of real images sees its images.

    net, title: a new classifier, and the title in the run of the one whose weights it takes
    folder: of the synthetic images and their metadata

    Returns "read", the share of the synthetic images that it takes for their class; "read_test", the same of
    the real test images; "fid", the FID of the two in its features; "by", the title. At most 2,000 images
    of each are looked at.
    """
    net.load_state_dict(read_file(run.path / f"{slug(title)}.pt")["model"])
    synthetic = images_of(read_records(folder, data.class_names), folder, data.test.transform)
    head, inputs, read = last_linear(net)[1], [], []
    hook = head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].float()))

    def reduce(logits):
        return logits.flatten(1)[:, : len(data.class_names)].argmax(1), inputs.pop()

    for images in (data.test, synthetic):
        some = images.subset(np.random.default_rng(0).permutation(len(images))[:2000])
        read.append(predict(net, some, accelerator, workers, reduce=reduce))
    hook.remove()
    real, fake = (features for _, features, _ in read)
    shares = [(found == truth).float().mean().item() for found, _, truth in read]
    return {"by": title, "read_test": shares[0], "read": shares[1], "fid": frechet_distance(real, fake)}


def confidence_interval(values) -> tuple[float, float]:
    """The mean, and half the width of the 95 % interval (Student's t), which is NaN for a single value."""
    from scipy.stats import sem, t

    values = np.asarray(values, float)
    half = t.ppf(0.975, len(values) - 1) * sem(values) if len(values) > 1 else math.nan
    return float(values.mean()), float(half)


def interval_text(values, sign: str = "") -> str:
    """The mean ± half the width of the 95 % interval; a single value alone. sign "+": a plus for gains."""
    mean, half = confidence_interval(values)
    return f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


# ==========================================================================================================
# MACHINERY: skip on a first reading. Run folders, files, pictures, the command line.
# ==========================================================================================================


class Run:
    """A run folder. Four verbs let a run that was stopped at any moment go on to the same result:

        for epoch in run.epochs("ActGen", 300, net=net)    the epochs still to do, a checkpoint after each
        value = run.once("plan.json", compute, ...)        computed once, then read from its file
        for batch in run.missing("drawing", files, 8)      batches of `files` that are not on disk yet
        run.keep(images, files)                            writes the images of a batch

    config.json marks a begun run: from run.begin() on, other arguments are an error. Several processes may
    share the folder. The main process alone writes, but for the images, which each process writes itself.
    """

    # arguments that may change when a run goes on
    FREE = {"out", "overwrite", "data_dir", "seeds", "workers", "report_to"}
    FREE |= {"generation_batch_size", "gradient_checkpointing"}

    def __init__(self, args, accelerator, free: tuple[str, ...] = ()):
        """Opens or creates the folder args.out. `free` names more arguments that may change, beside FREE.

        Raises UserError if another process uses the folder, or if it holds a run with other arguments.
        """
        self.path, self.accelerator, self.main = Path(args.out), accelerator, accelerator.is_main_process
        self.wait = accelerator.wait_for_everyone
        self.config, self.logs, self.line, self.plan, self.done = dict(vars(args)), {}, {}, {}, {}
        if self.main:
            self._lock()
            if args.overwrite and (self.path / "config.json").exists():  # else it is no run's folder
                self._empty()
            old = read_file(self.path / "config.json", {"args": self.config})["args"]
            for key, now in self.config.items():
                change = f"holds a run with --{key} {old.get(key)}, this one has --{key} {now}"
                same = key in self.FREE or key in free or old.get(key) == now
                require(same, f"{self.path} {change}; give another --out, or --overwrite")
        self.wait()
        self.seconds = read_file(self.path / "seconds.json", {})

    def _lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / ".lock", blocking=False)
        try:
            self.lock.acquire()
        except Timeout:
            message = f"another process is running in {self.path}; wait for it or give another --out"
            raise UserError(message) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"warning: files in {self.path} cannot be locked; start no second run in it")

    def _empty(self) -> None:
        # config.json goes last: without it, what is left would count as no run's
        for old in sorted(self.path.iterdir(), key=lambda path: path.name == "config.json"):
            if old.name != ".lock":
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def result(self) -> dict | None:
        """Returns the result of a finished run, and says that it is finished; else None."""
        result = read_file(self.path / "result.json")
        if result and self.main:
            print(f"{self.path} is finished; --overwrite starts it afresh")
            self.lock.release()
        return result

    def begin(self, plan: dict[str, str] | None = None) -> None:
        """Writes config.json, after every check: a run that ends before it may be given other arguments.

        plan: what each title of `missing` and `epochs` will do, such as "320 images"; it is printed
        """
        if self.main and plan:
            print(f"{self.path}: " + "; ".join(f"{title}, {text}" for title, text in plan.items()))
        self.plan = {title: text.split()[:2] for title, text in (plan or {}).items()}
        if self.main and not (self.path / "config.json").exists():
            self.write("config.json", {"args": self.config, "versions": versions()})
        self.wait()

    def left(self) -> str:
        """About how long the rest of the plan takes, if each unit takes as long as the ones before.

        "over" stands before it while there was no unit yet of some kind, such as images.
        """
        total, over = 0.0, ""
        for title, (count, unit) in self.plan.items():
            alike = [t for t, (_, u) in self.plan.items() if u == unit and self.done.get(t)]
            alike = [title] if title in alike else alike
            rest, done = int(count) - self.done.get(title, 0), sum(self.done[t] for t in alike)
            over = "over " if rest > 0 and not done else over
            total += max(0, rest) * sum(self.seconds.get(t, 0.0) for t in alike) / max(1, done)
        return f"whole run: {over}{tqdm.format_interval(total)} left" if self.plan else ""

    def write(self, name: str, value) -> None:
        """Writes a file whole or not at all, on the main process; see write_file."""
        if self.main:
            write_file(self.path / name, value)

    def once(self, name: str, compute, *args, together: bool = False):
        """Returns compute(*args), kept in the file `name` (.json, .jsonl, .pt or text): read if it is there.

        The main process computes while the others wait. together: all processes compute, because `compute` is
        a joint work of theirs, such as `predict`.
        """
        missing = not (self.path / name).exists()
        self.wait()
        if missing and (self.main or together):
            self.write(name, compute(*args))
        self.wait()
        return read_file(self.path / name)

    def missing(self, title: str, files: list[Path], batch_size: int):
        """Yields this process's batches, as lists of indices into `files`, that are not on disk yet.

        A batch of which one file is missing is drawn whole, because the batch decides over the last bits.
        After its last batch the process waits for the others. Shows a progress bar and counts seconds[title].
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        batches = [[*range(b, min(b + batch_size, len(files)))] for b in range(0, len(files), batch_size)]
        todo = [b for b in batches[rank::processes] if not all(files[i].exists() for i in b)]
        done = self.done.get(title, 0) + len(files)
        with tqdm(desc=title, total=len(todo), leave=False, disable=not (self.main and todo)) as bar:
            for i, batch in enumerate(todo, 1):
                clock = time.time()
                yield batch
                self.count(title, time.time() - clock)
                self.done[title] = done - (len(todo) - i) * batch_size * processes
                bar.set_postfix_str(self.left(), refresh=False)
                bar.update()
        self.done[title] = done
        self.wait()

    def keep(self, images: torch.Tensor, files: list[Path], latents: torch.Tensor | None = None) -> None:
        """Writes images [B, 3, H, W] in [0, 1] as PNG files, each after its latents in latents/STEM.pt.

        Raises UserError if an image is not made of numbers.
        """
        causes = [f"--{k}" for k in ("guidance_scale", "noise_scale", "sigmas", "nu") if k in self.config]
        advice = f"lower {' or '.join(causes)}, or give another --diffusion"
        for i, file in enumerate(files):
            require(images[i].isfinite().all(), f"the image {file.name} came out as NaN; {advice}")
            if latents is not None:
                write_file(self.path / "latents" / f"{file.stem}.pt", latents[i].cpu().clone())
            save_png(images[i], file)

    def epochs(self, title: str, count: int, **parts):
        """Yields the epochs (0 to count - 1) that are still to do, with a progress bar.

        Before the first it restores the checkpoint TITLE.pt: the states of `parts` (models, optimizers; None
        is left out) and the log. After each it saves them, and writes what the epoch gave to `log` as a line
        of metrics.jsonl. seconds[title] counts the time, without that of `missing`.
        """
        parts |= {"scaler": getattr(self.accelerator, "scaler", None)}  # of the losses, in fp16
        parts = {key: part for key, part in parts.items() if part is not None}
        state = read_file(self.path / f"{slug(title)}.pt")
        for key, part in parts.items() if state else ():
            part.load_state_dict(state[key])
        log = self.logs[title] = state["log"] if state else []
        self.done[title] = len(log)
        if len(log) < count:
            self._track(title)
        with tqdm(desc=title, total=count, initial=len(log), disable=not self.main) as bar:
            for epoch in range(len(log), count):
                clock, before = time.time(), sum(self.seconds.values())
                self.line = {"classifier": title, "epoch": epoch + 1}
                yield epoch
                drawing = sum(self.seconds.values()) - before
                self.count(title, time.time() - clock - drawing)
                log.append(self.line)
                numbers = {k: v for k, v in self.line.items() if isinstance(v, int | float)}
                self.accelerator.log(numbers, step=epoch + 1)
                self.done[title] = epoch + 1
                bar.update()
                shown = [f"{k}={v:.3f}" for k, v in numbers.items() if isinstance(v, float)]
                bar.set_postfix_str(", ".join([*shown, self.left()]))
                self.write("metrics.jsonl", list(itertools.chain(*self.logs.values())))
                states = {key: part.state_dict() for key, part in parts.items()}
                self.write(f"{slug(title)}.pt", states | {"log": log})
        while self.accelerator.trackers:
            self.accelerator.trackers.pop().finish()

    def _track(self, title: str) -> None:
        """Starts a run of the tracker that --report_to names; each classifier has one of its own."""
        config = {k: v if isinstance(v, int | float | str) else str(v) for k, v in self.config.items()}
        self.accelerator.project_configuration.logging_dir = str(self.path / "logs" / slug(title))
        names = {"wandb": {"name": f"{self.path.name}, {title}", "dir": str(self.path)}}
        self.accelerator.init_trackers("generative-augmentation", config, names)

    def log(self, **values) -> None:
        """Adds values to the present epoch's line of metrics.jsonl."""
        self.line |= values

    def log_scores(self, scores: dict[str, dict]) -> None:
        """Adds the scores of `evaluate` to the present epoch's line, each split's top-1 beside them."""
        self.log(scores=scores, **{split: score["top1"] for split, score in scores.items()})

    def outcome(self, title: str) -> dict:
        """The scores of the last epoch of run.epochs(title, ...), and its seconds of training."""
        return self.logs[title][-1]["scores"] | {"training": self.seconds.get(title, 0.0)}

    def count(self, title: str, seconds: float) -> None:
        """Adds to the seconds spent on something."""
        self.seconds[title] = self.seconds.get(title, 0.0) + seconds
        self.write("seconds.json", self.seconds)

    def finish(self, result: dict) -> dict:
        """Draws the curves of all epochs, writes the result, which marks a finished run, and returns it.

        The folder is free then: the same process may read the run again.
        """
        if self.main:
            save_curves(self.logs, self.path / "curves.png")
        self.write("result.json", result)
        self.wait()
        if self.main:
            self.lock.release()
        return result


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on."""
    from importlib.metadata import version

    names = ["torch", "torchvision", "diffusers", "transformers", "accelerate", "numpy"]
    return {"python": sys.version.split()[0], **{n: version(n) for n in names}}


def slug(text: str) -> str:
    """A title as a file name: "+ image guidance" becomes "image-guidance"."""
    return re.sub("[^a-zA-Z0-9]+", "-", text).strip("-")


def write_file(path: Path, value) -> None:
    """Writes a file whole or not at all: .json, .jsonl (records), .pt (tensors), .png (an image) or text.

    The file is written beside its place and then renamed, so a reader sees the old one or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        if path.suffix == ".pt":
            torch.save(value, buffer := io.BytesIO())  # to a file, it may hide that the disk is full
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        elif path.suffix == ".png":
            to_pil(value).save(f, format="PNG")
        elif path.suffix == ".jsonl":
            f.writelines(f"{json.dumps(line)}\n".encode() for line in value)
        else:
            f.write((json.dumps(value, indent=1) if path.suffix == ".json" else value).encode())
    os.replace(temporary, path)


def read_file(path: Path, default=None):
    """Reads what write_file wrote, or returns the default if there is no such file; nothing is unpickled.

    Raises UserError if the file cannot be read.
    """
    if not path.exists():
        return default
    try:
        if path.suffix == ".pt":
            return torch.load(path, weights_only=True, map_location="cpu")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text) if path.suffix == ".json" else text
    except Exception as error:
        message = f"cannot read {path} ({str(error)[:80]}); delete it, or start afresh with --overwrite"
        raise UserError(message) from None


def class_folders(class_names: list[str]) -> list[str]:
    """A folder name for each class: its name without what file systems refuse, cut at 100 bytes."""
    folders, taken = [], set()
    for name in class_names:
        clean = re.sub(r"[^\w .()'-]", "_", name).encode()[:100].decode(errors="ignore").strip(" .") or "_"
        if re.fullmatch(r"(?i:con|prn|aux|nul|(com|lpt)[\d¹²³])", clean.partition(".")[0].rstrip()):
            clean = f"_{clean}"  # a device's name on Windows
        folder, i = clean, 1
        while folder.lower() in taken:
            folder, i = f"{clean} {i}", i + 1
        folders.append(folder)
        taken.add(folder.lower())
    return folders


def read_records(folder: Path, class_names: list[str]) -> list[dict]:
    """The metadata records of another run's synthetic images, for --synthetic.

    Raises UserError if there are none, or if some are of other classes.
    """
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        records = [r for r in map(json.loads, lines) if (folder / r["file_name"]).exists()]
        pairs = ((r["class_name"], r["label"]) for r in records)
        strange = [name for name, y in pairs if [name] != class_names[y : y + 1]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--synthetic: no images with metadata in {folder} ({error})") from None
    other = f"{folder} has images of another data set's class '{''.join(strange[:1])}'"
    require(not strange, f"--synthetic: {other}")
    require(records, f"--synthetic: the images in {folder} are missing")
    return records


def images_of(records: list[dict], folder: Path, transform) -> Images:
    """The synthetic images of the records, which lie in `folder`, with their labels."""
    return Images([folder / r["file_name"] for r in records], [r["label"] for r in records], transform)


def to_pil(image: torch.Tensor) -> Image.Image:
    """An image [3, H, W] in [0, 1] as a PIL image, its values rounded."""
    return Image.fromarray((image.detach().float().cpu() * 255).round().byte().permute(1, 2, 0).numpy())


def save_png(image: torch.Tensor, path: Path) -> None:
    """Writes an image [3, H, W] in [0, 1] as a PNG file, whole or not at all; makes its folder if need be."""
    write_file(path, image)


def save_grid(images: torch.Tensor, path: Path, columns: int, scale: int = 1) -> None:
    """Writes images [N, 3, H, W] in [0, 1] as one PNG grid; each pixel is enlarged `scale` times."""
    from torchvision.utils import make_grid

    grid = make_grid(F.interpolate(images.float().cpu(), scale_factor=scale), nrow=columns, pad_value=1.0)
    write_file(path, grid.clamp(0, 1))


def save_captioned(images: list, captions: list[str], path: Path, columns: int) -> None:
    """Draws PIL images, or image files, in a grid, a caption under each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [textwrap.wrap(caption, 24) for caption in captions]
    wide, high = 1.9, 1.95 + 0.12 * max(map(len, texts))  # of a cell, in inches, as are all places below
    width, height = wide * columns, high * math.ceil(len(images) / columns)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))  # for all images, since axes take long to make
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        pixels, row, column = np.asarray(open_image(image)), *divmod(i, columns)
        x, y = wide * (column + 0.5), high * row + 0.95  # the middle of the image
        down, right = (0.9 * side / max(pixels.shape) for side in pixels.shape[:2])
        axes.imshow(pixels, extent=(x - right, x + right, y + down, y - down))
        axes.text(x, high * row + 1.9, "\n".join(text), fontsize=7, ha="center", va="top", parse_math=False)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    figure.savefig(path, dpi=110)


def save_reliability(series: dict[str, tuple], path: Path, bins: int = 10) -> None:
    """Draws a reliability diagram, accuracy over confidence, of (logits [N, K], labels [N]) for each name."""
    from sklearn.calibration import calibration_curve

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "k:")
    for name, (logits, labels) in series.items():
        confidence, label = logits.softmax(1).max(1)
        y, x = calibration_curve(label == labels, confidence, n_bins=bins)
        axes.plot(x, y, "o-", label=f"{name}, ECE {scores(logits, labels)['ece']:.3f}")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=110)


def save_curves(series: dict[str, list[dict]], path: Path) -> None:
    """Draws accuracy, loss and the quality of pseudo-labels, if there are any, over epochs, per series."""
    known = set(itertools.chain(*itertools.chain(*series.values())))
    accuracies = {"test": "-", "test_ood": "--"} if "test" in known else {"val": "-"}
    panels = {"accuracy (%)": accuracies, "training loss": {"loss": "-"}}
    if "labelled" in known:
        panels["pseudo-labels (%)"] = {"labelled": "-", "label_accuracy": "--", "seed_accuracy": ":"}
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (i, name), (key, style) in itertools.product(enumerate(series), keys.items()):
            points = [(line["epoch"], line[key]) for line in series[name] if key in line]
            if points:
                x, y = np.array(points).T
                axes.plot(x, y * (100 if "%" in title else 1), f"C{i}{style}", label=f"{name}, {key}")
        axes.set(xlabel="epoch", ylabel=title, yscale="log" if "loss" in title else "linear")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------
# The command line: one run, or the ladder


def number(interval: str, help: str, default=None, **options):
    """An argument field whose numbers must lie in an interval such as "(0, 1]", which --help shows."""
    options = options or {"default": default}
    return HfArg(help=help, metadata={"metavar": interval}, **options)


def check_numbers(args) -> None:
    """Raises UserError if a number of the arguments is not in the interval of its field; NaN is in none."""
    for field in dataclasses.fields(args):
        value, interval = getattr(args, field.name), field.metadata.get("metavar", "")
        if value is None or not interval:
            continue
        low, high = map(float, interval[1:-1].split(","))
        above, below = (operator.le if end in "[]" else operator.lt for end in (interval[0], interval[-1]))
        values = value if isinstance(value, list) else [value]
        fits = values and all(above(low, v) and below(v, high) for v in values)
        require(fits, f"--{field.name} {value} must lie in {interval}")


@dataclass
class RunArgs:
    """The arguments of every method. Where the default is None, the data set's recipe gives the value."""

    dataset: str = HfArg(default="digits", help=", ".join(DATASETS))
    data_dir: str = HfArg(default="data", help="folder of the data set; hf: its id, OWNER/NAME")
    class_names: str = HfArg(default="", help="file of lines FOLDER,NAME; else data_dir's classes.txt")
    skip_bad_images: bool = HfArg(default=False, help="leave out images that cannot be read")
    style: float = number("[0, 1]", "digits only: how unlike the generator's images", world.STYLE)
    out: str | None = HfArg(default=None, help="run folder; if none is given, runs/METHOD-DATASET-sSEED")
    overwrite: bool = HfArg(default=False, help="start afresh if the folder holds a run")
    seed: int = number("[0, 4294967295]", "seed of every random draw", 0)
    ladder: bool = HfArg(default=False, help="run the ablation ladder over --seeds seeds")
    seeds: int = number("[1, 1000]", "number of seeds of the ladder", 5)
    report_to: str = HfArg(default="none", help="log metrics to, too: tensorboard, wandb or none")
    baseline: bool = HfArg(default=True, help="also train the method's baselines")
    real_only: bool = HfArg(default=False, help="train on the real images alone")
    workers: int | None = number("[0, 1000]", "processes that load images, on each GPU")
    # the generator
    diffusion: str | None = HfArg(default=None, help="Stable Diffusion: model id or local folder")
    lora: str | None = HfArg(default=None, help="LoRA weights for it: file, folder or model id; needs peft")
    prompt: str | None = HfArg(default=None, help="prompt; {} stands for the class name")
    steps: int | None = number("[1, 10000]", "sampling steps")
    guidance_scale: float | None = number("[0, 100]", "scale of classifier-free guidance")
    generation_batch_size: int | None = number("[1, 1e6]", "images that are generated at a time")
    square: str = HfArg(default="squeeze", help="how real images become square for it: squeeze or crop")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory for gradients, but slower")
    # data and classifier
    examples_per_class: int | None = number("[0, 1e9]", "real training images per class; 0 takes all")
    classifier: str | None = HfArg(default=None, help="small_cnn, clip, or any model of timm")
    pretrained: bool | None = HfArg(default=None, help="start from pretrained weights")
    clip: str = HfArg(default="openai/clip-vit-base-patch32", help="CLIP model, where CLIP is used")
    image_size: int | None = number("[8, 1024]", "side of the classifier's images in pixels")
    augment: str | None = HfArg(
        default=None, help="digits, crop, resized, squeezed, zoomed or none; also with +randaugment after it"
    )
    epochs: int | None = number("[1, 1e6]", "training epochs")
    batch_size: int | None = number("[1, 1e6]", "real images in a training batch, over all GPUs")
    optimizer: str | None = HfArg(default=None, help="sgd, adam or adamw")
    lr: float | None = number("(0, 100]", "peak learning rate")
    head_lr: float | None = number("(0, 1000]", "learning rate of the last layer, in multiples of --lr")
    weight_decay: float | None = number("[0, 1]", "weight decay")
    warmup: float | None = number("[0, 1)", "share of the epochs in which the learning rate warms up")
    label_smoothing: float | None = number("[0, 1)", "share of a label that all classes get alike")
    eval_every: int | None = number("[1, 1e6]", "epochs from one evaluation to the next")


def cli(main, args_class, recipes: dict[str, dict] | None = None) -> None:
    """Parses the command line and runs main(args). A user's mistake ends in one line and exit status 2.

    recipes: see recipe_of; `--dataset cifar10 --help` shows the values in use
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may lack letters, as in a file on Windows
        sys.stdout.reconfigure(errors="replace")
    about = sys.modules["__main__"].__doc__.strip().split("\n")[0]
    parser = HfArgumentParser(args_class, description=about, usage=argparse.SUPPRESS)
    if recipes:
        first = argparse.ArgumentParser(add_help=False, exit_on_error=False)
        first.add_argument("--dataset", nargs="?", default="digits")
        first.add_argument("--classifier", nargs="?")
        parser.set_defaults(**recipe_of(recipes, **vars(first.parse_known_args()[0])))
    args, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}; --help lists them")
    name = Path(sys.argv[0]).name
    try:
        main(args)
        return
    except UserError as error:  # from a loading worker it comes with the worker's traceback before it
        message = " ".join(str(error).rpartition("UserError: ")[2].split())
    except torch.OutOfMemoryError:
        message = "out of GPU memory; lower --generation_batch_size, or --batch_size if it was training"
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        message = "a loading process died; lower --workers, or give a container more --shm-size"
    except OSError as error:
        if error.errno is None:
            raise
        where = f" {error.filename}" if error.filename else ""
        message = f"cannot read or write{where}: {error.strerror}; mend this or give another --out"
    except KeyboardInterrupt:
        message = "stopped; the same command goes on from here"
    print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def recipe_of(recipes: dict[str, dict], dataset: str, classifier: str | None = None) -> dict:
    """A data set's recipe; what a classifier changes about it stands in recipes["DATASET/CLASSIFIER"]."""
    return recipes.get(dataset, {}) | recipes.get(f"{dataset}/{classifier}", {})


def fill_recipe(args: RunArgs, recipes: dict[str, dict], method: str) -> RunArgs:
    """Returns a copy of args whose fields left None have the values of the data set's recipe.

    Raises UserError if a value cannot be.
    """
    check_choice("dataset", args.dataset, DATASETS)
    recipe = recipe_of(recipes, args.dataset, args.classifier)
    args = dataclasses.replace(args, **{k: v for k, v in recipe.items() if getattr(args, k) is None})
    for key, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, key, os.path.expanduser(value))
    args.out = args.out or f"runs/{method}-{args.dataset}{'-ladder' if args.ladder else ''}-s{args.seed}"
    count = args.prompt.count("{}")
    require(count == 1, f"--prompt '{args.prompt}' must have one {{}} for the class name, not {count}")
    check_numbers(args)
    return args


def check_training(args: RunArgs, accelerator, data: Data) -> None:
    """Raises UserError if the classifier, the optimizer or the batches that the arguments name cannot be."""
    names, size = data.class_names, args.image_size
    net = build_classifier(args.classifier, names, size, args.pretrained, args.clip)
    make_optimizer(args.optimizer, net, args.lr, args.weight_decay)
    Loader(data.train, args.batch_size, accelerator)
    batch = min(2, args.batch_size // accelerator.num_processes)
    try:
        net.train()(torch.zeros(batch, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        cannot = f"the classifier {args.classifier} cannot train on {batch} images of {size} pixels"
        raise UserError(f"{cannot}: {error}; change --image_size or --batch_size") from None
    square(args.image_size, args.square)


def data_of(args: RunArgs, unlabelled: bool = False) -> Data:
    """The data set that the arguments name; see load_data."""
    return load_data(
        args.dataset, args.data_dir, args.image_size, args.augment, args.examples_per_class, args.seed,
        unlabelled, args.style, args.class_names, args.skip_bad_images, args.prompt,
    )  # fmt: skip


def report(result: dict[str, dict], out: str) -> None:
    """Prints the last lines of a run: a table of accuracies and the gain, number of images, seconds."""
    kinds, scores = {"top-1": "top1", "class mean": "class_mean"}, list(result.values())
    rows = [["accuracy in %", *result, "gain"]]
    for split, (kind, key) in itertools.product(("test", "test_ood"), kinds.items()):
        if split in scores[0]:
            values = [100 * r[split][key] for r in scores]
            rows.append([f"{split}, {kind}", *(f"{v:.1f}" for v in values), f"{values[-1] - values[0]:+.1f}"])
    columns = [*zip(*rows, strict=True)][: None if len(scores) > 1 else -1]
    widths = [max(map(len, column)) for column in columns]
    for first, *cells in zip(*columns, strict=True):
        print(first.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), sep="  ")
    if judged := scores[-1].get("judged"):
        print(
            f"{judged['by']} reads {100 * judged['read']:.1f} % of the synthetic images as their class, and "
            f"{100 * judged['read_test']:.1f} % of the test images; FID of the two in its features "
            f"{judged['fid']:.1f}"
        )
    training, generation = (sum(r.get(key, 0) for r in scores) for key in ("training", "generation"))
    images = max(r["synthetic"] for r in scores)
    print(f"{images} images generated in {generation:.0f} s, {training:.0f} s of training; {out}")


def run_ladder(args: RunArgs, accelerator, rungs: dict[str, dict], run_once) -> None:
    """Calls run_once(args, accelerator) for every rung (name: changed arguments) and every seed.

    A rung's scores are those of the last classifier in its result. synthetic="RUNG" takes the images of that
    rung, embeddings="RUNG" its learned tokens. Writes the table to ladder.json and ladder.md.
    """
    top1, class_mean, distances = (defaultdict(lambda: defaultdict(list)) for _ in range(3))
    for seed in range(args.seed, args.seed + args.seeds):
        out = {rung: str(Path(args.out) / f"{slug(rung)}-s{seed}") for rung in rungs}
        for rung, changes in rungs.items():
            changes = changes | {"seed": seed, "out": out[rung], "ladder": False}
            changes |= {k: out[changes[k]] for k in ("synthetic", "embeddings") if k in changes}
            *_, last = run_once(dataclasses.replace(args, **changes), accelerator).values()
            accelerator.free_memory()  # it would keep every run's model and optimizer
            for split in ("test", "test_ood", "val"):
                if split in last:
                    top1[split][rung].append(100 * last[split]["top1"])
                    class_mean[split][rung].append(100 * last[split]["class_mean"])
            for name, value in last.get("distances", {}).items():
                distances[name][rung].append(value)
    if accelerator.is_main_process:
        save_ladder(top1, class_mean, distances, Path(args.out))


def save_ladder(top1: dict, class_mean: dict, distances: dict, folder: Path) -> None:
    """Prints and writes (ladder.json, ladder.md) the accuracies top1[split][rung], in %, one for each seed.

    A row has, for each split, the mean ± 95 % interval over the seeds, the paired difference to the rung
    before, and the class mean; then the means of distances[name][rung], where the rung has them.
    """
    rungs = list(next(iter(top1.values())))
    seeds = len(next(iter(top1.values()))[rungs[0]])
    columns = ["rung", *(c for s in top1 for c in (s, "to the rung before", "class mean")), *distances]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for i, rung in enumerate(rungs):
        cells = []
        for split, values in top1.items():
            gain = np.subtract(values[rung], values[rungs[i - 1]])
            cells += [interval_text(values[rung]), interval_text(gain, "+") if i > 0 else ""]
            cells.append(interval_text(class_mean[split][rung]))
        cells += [f"{np.mean(d[rung]):.3g}" if rung in d else "" for d in distances.values()]
        lines.append(f"| {rung} | " + " | ".join(cells) + " |")
    table = f"{seeds} seeds, mean ± 95 % interval, % top-1\n\n" + "\n".join(lines) + "\n"
    write_file(folder / "ladder.json", {"top1": top1, "class_mean": class_mean, "distances": distances})
    write_file(folder / "ladder.md", table)
    print(table)


def run_method(args: RunArgs, rungs: dict[str, dict], run_once) -> None:
    """A method's main: the ladder, in which the baselines are rungs, or one run and its report."""
    accelerator = make_accelerator(args.report_to, args.out)
    if args.ladder:
        run_ladder(dataclasses.replace(args, baseline=False), accelerator, rungs, run_once)
        return
    result = run_once(args, accelerator)
    if accelerator.is_main_process:
        report(result, args.out)
