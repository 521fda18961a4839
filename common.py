"""What the methods share: the generator, classifiers and training, data sets, run folders, the command line.

Images are float [B, 3, H, W] in [0, 1] between functions. Latents are scaled by the VAE's scaling factor.
Every image has a random generator of its own, so the batch size never changes a draw.
"""

import argparse
import contextlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs, data_loader
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors.torch import load_file
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import CLIPModel, CLIPTokenizer
from transformers.hf_argparser import HfArg, HfArgumentParser

ROOT = Path(__file__).resolve().parent
DIGITS_SD, DIGITS_CLEAN = (str(ROOT / "digits" / sd) for sd in ("sd", "sd_clean"))  # see digits/README.md


class UserError(Exception):
    """An error that the user can fix. Its message, one line, says what is wrong, where, and often the fix."""


def require(condition, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def say(line: str) -> None:
    """Prints a line, on the main process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line.encode(code := sys.stdout.encoding or "utf-8", "replace").decode(code))


# The generator ----------------------------------------------------------------------------------------------


def from_pretrained(cls, model_id: str, **options):
    """What cls.from_pretrained(model_id) returns; UserError if it fails. model_id: a hub id or a folder."""
    advice = "there is no such folder; a hub model needs a network and, if gated, a login that may read it"
    if Path(model_id).exists():
        advice = "it must be a folder that save_pretrained wrote, whole and of this kind"
    try:
        return cls.from_pretrained(model_id, **options)
    except Exception as error:
        raise UserError(f"cannot load the model '{model_id}': {advice} ({error!s:.200})") from None


def native_dtype(device: str) -> torch.dtype:
    """bf16 on a GPU with native bf16, fp16 on other CUDA GPUs, else fp32. device: a type such as "cuda"."""
    if device != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_pipeline(model_id: str, device="cpu", dtype=None, checkpointing: bool = False):
    """A frozen StableDiffusionPipeline; dtype: by default native_dtype. UserError if not SD 1 or 2."""
    diffusers.utils.logging.set_verbosity(50)  # it logs errors that it also raises
    for package in (diffusers, transformers):
        package.utils.logging.disable_progress_bar()
    options = {"safety_checker": None, "requires_safety_checker": False}
    options["dtype"] = dtype or native_dtype(torch.device(device).type)
    pipe = from_pretrained(StableDiffusionPipeline, model_id, **options)
    unet, width = pipe.unet.config, pipe.text_encoder.config.hidden_size
    fits = unet.in_channels == unet.out_channels == pipe.vae.config.latent_channels
    fits &= unet.cross_attention_dim == width and not (unet.addition_embed_type or unet.time_cond_proj_dim)
    require(fits, f"'{model_id}' is SDXL, an LCM or for inpainting, not Stable Diffusion 1 or 2")
    pipe.to(device).set_progress_bar_config(disable=True)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)  # never clip latents
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        if checkpointing and part is not pipe.text_encoder:
            part.enable_gradient_checkpointing()
    return pipe


def check_prompt(pipe, prompt: str, names: list[str], where: str, learned: bool = False) -> None:
    """Raises UserError if the tokenizer cuts a name off the prompt; learned: one token stands for a name."""
    before, room = prompt.split("{}")[0], pipe.tokenizer.model_max_length - 2  # without start and end
    for name in names:
        end = len(pipe.tokenizer.tokenize(before if learned else before + name, verbose=False)) + learned
        require(end <= room, f"{where}: '{name}' ends at token {end}, but {room} are read; shorten the text")


def encode(pipe, images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] -> scaled latents [B, C, h, w]: the posterior's mode, not a sample."""
    encoded = pipe.vae.encode((2 * images - 1).to(pipe.device, pipe.vae.dtype))
    tiny = hasattr(encoded, "latents")  # a tiny VAE has no posterior
    return (encoded.latents if tiny else encoded.latent_dist.mode()) * pipe.vae.config.scaling_factor


def decode(pipe, latents: torch.Tensor, clamp: bool = True) -> torch.Tensor:
    """Scaled latents [B, C, h, w] -> images [B, 3, H, W], float32, in [0, 1] if clamped; differentiable."""
    images = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    images = images.float() / 2 + 0.5
    return images.clamp(0, 1) if clamp else images


def ddim(pipe, steps: int, strength: float):
    """A DDIMScheduler of `steps` steps and its last int(steps * strength) timesteps; or raises UserError."""
    # never clip latents: other schedulers' configs leave clip_sample to DDIM's default, True
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    trained, used = scheduler.config.num_train_timesteps, int(steps * strength)
    none = f"--steps {steps} with --strength {strength} leaves no step, or the model has only {trained}"
    require(1 <= used <= steps <= trained, none)
    scheduler.set_timesteps(steps)
    require(scheduler.timesteps[-used] < trained, none)
    return scheduler, scheduler.timesteps[steps - used :]


def generator(*key: int) -> torch.Generator:
    """A CPU generator, seeded by integers. With one per image, draws do not depend on batch or device."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


def options(function: Callable, args) -> dict:
    """The attributes of `args` that `function` takes as keyword-only arguments, as {name: value}."""
    taken = [p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    return {name: getattr(args, name) for name in taken if hasattr(args, name)}


# Classifiers and their training -----------------------------------------------------------------------------


class Classifier(nn.Module):
    """A backbone f and a linear head: images [B, 3, H, W] in [0, 1] -> logits [B, K].

    backbone: f, images normalised by mean, std [3] -> features [B, d]; if self.frozen, f stays in eval mode
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear, mean=(0.5,) * 3, std=(0.5,) * 3):
        super().__init__()
        self.backbone, self.head, self.frozen = backbone, head, False
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(values).view(3, 1, 1), persistent=False)

    def features(self, x):
        return self.backbone((x - self.mean) / self.std)

    def forward(self, x):
        return self.head(self.features(x))

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self


def small_cnn(width: int = 24) -> nn.Sequential:
    """Five 3x3 convolutions with batch norm, for small images: [B, 3, H, W] -> features [B, 4 width]."""
    layers, c_in = [], 3
    for c_out, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class CLIPBackbone(nn.Module):
    """CLIP's image encoder: normalised images [B, 3, H, W] -> features [B, d] of length 1."""

    def __init__(self, clip):
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection
        self.size = clip.config.vision_config.image_size

    def forward(self, x):
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return F.normalize(self.projection(self.vision(x).pooler_output), dim=1)


@torch.no_grad()
def clip_classifier(model_id: str, class_names: list[str]) -> Classifier:
    """CLIP's image encoder; its head holds the text features of "a photo of a {name}" (zero-shot)."""
    clip, tokenizer = from_pretrained(CLIPModel, model_id).float(), from_pretrained(CLIPTokenizer, model_id)
    prompts = [f"a photo of a {name}" for name in class_names]
    text = clip.text_model(**tokenizer(prompts, padding=True, truncation=True, return_tensors="pt"))
    text = F.normalize(clip.text_projection(text.pooler_output), dim=1)
    head = nn.Linear(*text.T.shape, bias=False)
    head.weight.copy_(clip.logit_scale.exp() * text)
    return Classifier(CLIPBackbone(clip), head, timm.data.OPENAI_CLIP_MEAN, timm.data.OPENAI_CLIP_STD)


def build_classifier(args, class_names: list[str]) -> Classifier:
    """The Classifier that args name, with a new head (clip: zero-shot); UserError if it cannot be built."""
    name, size, pretrained = args.classifier, args.image_size, args.pretrained
    if name == "clip":
        return clip_classifier(args.clip, class_names)
    if name == "small_cnn":
        backbone, weights = small_cnn(), ROOT / "digits" / "backbone" / "model.safetensors"
        backbone.load_state_dict(load_file(weights) if pretrained else backbone.state_dict())
        return Classifier(backbone, nn.Linear(96, len(class_names)))
    try:
        try:
            net = timm.create_model(name, pretrained, num_classes=0, img_size=size)  # a ViT's is fixed
        except TypeError:
            net = timm.create_model(name, pretrained, num_classes=0)
        if size <= 64 and isinstance(net, timm.models.ResNet) and isinstance(old := net.conv1, nn.Conv2d):
            # as on CIFAR, a stem without stride and pooling; choice: the middle of pretrained kernels
            net.conv1, net.maxpool = nn.Conv2d(3, old.out_channels, 3, 1, 1, bias=False), nn.Identity()
            middle = v2.functional.center_crop(old.weight.data, [3, 3])
            net.conv1.weight.data = middle if pretrained else net.conv1.weight.data
        if size <= 64 and isinstance(net, timm.models.vgg.VGG):  # and a head without hidden layers
            net.pre_logits, net.head = nn.Identity(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with torch.no_grad():
            features = net.eval()(torch.zeros(1, 3, size, size)).shape[1:]
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        other = f"small_cnn, clip or a model of timm that takes {size} pixels"
        raise UserError(f"--classifier {name}: give {other}, such as resnet50 ({error!s:.200})") from None
    require(len(features) == 1, f"--classifier {name}: its features are {list(features)}, not a vector")
    config, head = net.pretrained_cfg, nn.Linear(*features, len(class_names))
    return Classifier(net.train(), head, config["mean"], config["std"])


def make_accelerator():
    """An Accelerator with the precision of `accelerate launch`, or native_dtype if that is "no" or unset."""
    gpu, named = torch.cuda.is_available(), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    native = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(native_dtype("cuda" if gpu else "cpu"), "no")
    wait = InitProcessGroupKwargs(timeout=timedelta(days=7))  # others wait while one asks a language model
    cpu = not gpu and int(os.environ.get("WORLD_SIZE", 1)) > 1
    return Accelerator(cpu=cpu, mixed_precision=native if named == "no" else named, kwargs_handlers=[wait])


def make_optimizer(name: str, net: nn.Module, lr: float, weight_decay: float, rates: dict[nn.Module, float]):
    """SGD (Nesterov momentum 0.9), Adam or AdamW; rates: {part of net: learning rate in multiples of lr}.

    Biases and normalisation layers have no weight decay, as in the released training scripts.
    """
    factors, groups = {p: factor for part, factor in rates.items() for p in part.parameters()}, {}
    for p in filter(lambda p: p.requires_grad, net.parameters()):
        groups.setdefault((factors.get(p, 1.0), weight_decay * (p.ndim > 1)), []).append(p)
    groups = [{"params": ps, "factor": f, "weight_decay": decay} for (f, decay), ps in groups.items()]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[name](groups, lr, **({"momentum": 0.9, "nesterov": True} if name == "sgd" else {}))


def new_classifier(args, accelerator, class_names: list[str], wrap=lambda net: net, rates=None):
    """Returns (the network, the same as prepared by accelerate, its optimizer) of a new classifier.

    wrap: changes the new network; rates: network -> make_optimizer's rates; default {head: args.head_lr}
    """
    torch.manual_seed(args.seed)
    net = wrap(build_classifier(args, class_names)).to(memory_format=torch.channels_last)  # is faster
    net.backbone.requires_grad_(not args.frozen)
    net.frozen = args.frozen
    rates = rates(net) if rates else {net.head: args.head_lr}
    optimizer = make_optimizer(args.optimizer, net, args.lr, args.weight_decay, rates)
    return net, *accelerator.prepare(net, optimizer)


def cosine(progress: float, warmup: float = 0.0) -> float:
    """The learning-rate factor at `progress` in [0, 1]: linear warm-up, then half a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def shuffled(n: int, samples: int, *key: int) -> torch.Tensor:
    """`samples` indices of n images: one random permutation after another, seeded by the integers `key`."""
    g = generator(*key)
    return torch.cat([torch.randperm(n, generator=g) for _ in range(math.ceil(samples / n))])[:samples]


def load(images, batch_size: int, accelerator, workers: int = 0, order=None, seed=(), drop_last=False):
    """A loader of batches (images x, labels y, indices i) on the device, each batch split over the processes.

    order: indices of the images to load, by default all; drop_last: drop a last batch that is not full
    seed: integers; an image's augmentation depends only on them and on the image's position in `order`
    """
    place = accelerator.device, accelerator.num_processes, accelerator.process_index
    require(batch_size % place[1] == 0, f"{place[1]} processes cannot share a batch of {batch_size} equally")
    order = [int(i) for i in (range(len(images)) if order is None else order)]
    if seed:
        seeds = torch.randint(2**62, (len(order),), generator=generator(*seed)).tolist()
        order = [*zip(order, seeds, strict=True)]
    options = {"num_workers": min(workers, os.cpu_count()), "pin_memory": accelerator.device.type == "cuda"}
    options["drop_last"] = drop_last and len(order) >= batch_size
    loader = DataLoader(images, batch_size, sampler=order, **options)
    # Accelerator.prepare would keep every loader alive
    return data_loader.prepare_data_loader(loader, *place, split_batches=True, put_on_device=True)


def train_epoch(model, batches, optimizer, rates, accelerator, smoothing=0.0, loss_of=None) -> float:
    """Trains on the batches and returns the mean loss; rates: one learning rate for each batch.

    loss_of: batch -> loss; by default the cross-entropy of a batch (x, y, i), y [B] or [B, K]
    """
    loss_of = loss_of or (lambda batch: F.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing))
    model.train()
    steps, total = 0, torch.zeros((), device=accelerator.device)
    for lr, batch in zip(rates, batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        with accelerator.autocast():
            loss = loss_of(batch)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        steps, total = steps + 1, total + loss.detach()
    for buffer in model.buffers() if accelerator.num_processes > 1 else ():
        torch.distributed.broadcast(buffer, 0)  # one process's batch-norm statistics, so that all judge alike
    require(total.isfinite(), "the training loss is not a number; lower --lr")
    return float(total) / steps


@torch.no_grad()
def predict(model, images, accelerator, workers=0, batch_size=64, reduce=lambda z: (z,), seed=()):
    """The logits [N, K] and labels [N] of all images, on the CPU, the same on every process.

    reduce: a batch's logits -> the tensors to return instead; batch_size: per process; seed: see load
    """
    model.eval()
    outputs = []
    for x, y, _ in load(images, batch_size * accelerator.num_processes, accelerator, workers, seed=seed):
        with accelerator.autocast():
            logits = model(x).float()
        require(logits.isfinite().all(), "the classifier's outputs are NaN or infinite; lower --lr")
        outputs.append([t.cpu() for t in accelerator.gather_for_metrics((*reduce(logits), y))])
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def evaluate(model, data: "Data", accelerator, workers: int = 0) -> dict[str, dict]:
    """{split: scores} on test and, if present, test_ood and val; of several heads, the first one's."""
    splits = [split for split in ("test", "test_ood", "val") if split in data.splits()]
    found = {split: predict(model, data.splits()[split], accelerator, workers) for split in splits}
    return {split: scores(z if z.ndim == 2 else z[:, 0], y) for split, (z, y) in found.items()}


def scores(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1, the mean of the classes' accuracies, and the negative log-likelihood of logits [N, K]."""
    hits, nll = (logits.argmax(1) == labels).float(), F.cross_entropy(logits, labels).item()
    class_mean = torch.stack([hits[labels == c].mean() for c in labels.unique()]).mean().item()
    return {"top1": hits.mean().item(), "class_mean": class_mean, "nll": nll}


def interval_text(values, sign: str = "") -> str:
    """Text: mean ± half the 95 % interval (Student's t) of three values or more. sign: "+" for gains."""
    half = f" ± {stats.t.ppf(0.975, len(values) - 1) * stats.sem(values):.1f}" if len(values) > 2 else ""
    return f"{np.mean(values):{sign}.1f}{half}"


# Data sets --------------------------------------------------------------------------------------------------


@dataclass
class Images(Dataset):
    """Labelled images: images[i] is (transform(image), label, i); images[i, seed] seeds the transform."""

    sources: list  # image files, (data set, index) pairs, or PIL images, perhaps with their `filename`
    labels: list[int]
    transform: Callable | None = None  # PIL image in RGB -> [3, H, W]

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, key):
        i, seed = key if isinstance(key, tuple) else (key, None)
        image = open_image(self.sources[i])
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:  # torchvision draws from the global generator
                torch.default_generator.manual_seed(seed)
            return self.transform(image), self.labels[i], i

    def seen(self, transform) -> "Images":
        """The same images with another transform."""
        return replace(self, transform=transform)

    def subset(self, indices) -> "Images":
        """The images with these indices."""
        sources, labels = ([part[int(i)] for i in indices] for part in (self.sources, self.labels))
        return replace(self, sources=sources, labels=labels)

    def __add__(self, other: "Images") -> "Images":
        return replace(self, sources=self.sources + other.sources, labels=self.labels + other.labels)

    def decoded(self) -> "Images":
        """The same images, decoded in memory if they need at most 2 GiB per process (estimated from ten)."""
        sizes = [open_image(source).size for source in self.sources[:: len(self) // 10 + 1]]
        if len(self) * 3 * np.mean([width * height for width, height in sizes]) > 2**31:
            return self
        with ThreadPool() as pool:
            return replace(self, sources=pool.map(open_image, self.sources))

    def name(self, i: int) -> str:
        """The file of image i, or "#i" if the image has no file of its own."""
        file = getattr(self.sources[i], "filename", self.sources[i])
        return str(file) if isinstance(file, Path) else f"#{i}"


@dataclass
class Data:
    """The splits of a data set; a missing split is None.

    folders: the data set's own class names; class_names: the same classes in English, for prompts
    unlabelled: stl10's own, or the images that examples_per_class leaves out; their labels train nothing
    truth: for digits alone: (images, accelerator) -> the classes [N] that its oracle sees in the images
    """

    folders: list[str]
    train: Images
    test: Images | None = None
    val: Images | None = None
    test_ood: Images | None = None
    unlabelled: Images | None = None
    class_names: list[str] = ()
    truth: Callable | None = None

    def splits(self) -> dict[str, Images]:
        return {name: images for name, images in vars(self).items() if isinstance(images, Images)}

    def fingerprint(self) -> dict[str, str]:
        """{part: text}: the classes; each split's image count and hash of file names, sizes and labels."""
        found = {"the list of classes": ", ".join(self.class_names)}
        for split, images in self.splits().items():
            files = [*map(images.name, range(len(images)))]
            listed = [(Path(file).name, file[0] != "#" and Path(file).stat().st_size) for file in files]
            digest = sha256(repr([listed, images.labels]).encode()).hexdigest()
            found[split] = f"{len(images)} images ({digest[:12]})"
        return found


def open_image(source) -> Image.Image:
    """Opens one of Images.sources as RGB: upright by EXIF, 16 bits scaled to 8, white where transparent."""
    if isinstance(source, Image.Image):
        return source
    try:
        if isinstance(source, tuple):
            item = source[0][source[1]]
            image = next(iter(item.values())) if isinstance(item, dict) else item[0]
        else:
            image = Image.open(source)
            # choice: decode a JPEG at 1/2 to 1/8 of its size if both sides stay >= 1,024 pixels: faster
            image.draft(None, (1024, 1024))
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF: the image as it is
                image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # PIL's own conversion would clip at 255
            grey = np.nan_to_num(np.asarray(image, float), posinf=0, neginf=0)
            # white is 1 for floats below 2, else 2^n - 1 with the smallest n >= 8 that holds all values
            bits = max(8, math.ceil(math.log2(max(grey.max(), 1) + 1)))
            white = 1 if image.mode == "F" and grey.max() < 2 else 2**bits - 1
            image = Image.fromarray((grey * (255 / white)).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        image.filename = source if isinstance(source, Path) else ""  # for Images.name, if it is kept
        return image
    except Exception as error:  # of any kind, if the file is damaged
        name = source if isinstance(source, Path) else f"#{source[1]}"
        raise UserError(f"cannot read the image {name}: {error}") from None


def make_transforms(size: int, augment: str = "none", square: str = "crop") -> tuple[v2.Compose, v2.Compose]:
    """The training and the evaluation transform: PIL image in RGB -> float [3, size, size] in [0, 1].

    augment: a key of `kinds` below; with "+randaugment" appended, RandAugment (Cubuk et al. 2019), too
    square: "squeeze" or "crop" to a square where no random crop does; squeezed and zoomed always squeeze
    """
    kind, pad, flip = augment.removesuffix("+randaugment"), max(1, size // 8), v2.RandomHorizontalFlip()
    squeeze, turn = [v2.Resize((size, size))], v2.RandomRotation(15, v2.InterpolationMode.BILINEAR)
    whole = [v2.Resize(round(size / 0.875) if kind == "resized" else size), v2.CenterCrop(size)]
    fit = squeeze if square == "squeeze" or kind in ("squeezed", "zoomed") else whole
    kinds = {
        "digits": [*fit, v2.RandomCrop(size, max(1, pad // 2), padding_mode="reflect")],
        "crop": [*fit, v2.RandomCrop(size, pad), flip],  # usual on CIFAR
        "resized": [v2.RandomResizedCrop(size), flip],  # usual on ImageNet
        "squeezed": [*fit, flip, turn],  # DIAGen's on COCO
        "zoomed": [v2.RandomResizedCrop(size, (0.7, 1.0)), flip, turn],  # DIAGen's on FOCUS
        "none": fit,
    }
    require(kind in kinds, f"unknown --augment '{augment}'; choose one of: {', '.join(kinds)}")
    more, end = [v2.RandAugment()], [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose(kinds[kind] + more * (augment != kind) + end), v2.Compose(fit + end)


def for_generator(images: Images, pipe, square: str) -> Images:
    """The images at the pipeline's resolution, squeezed or cropped to squares (`square`), not augmented."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return images.seen(make_transforms(size, "none", square)[1])


def english(name: str) -> str:
    """A class name for prompts: "001.Grey_owl" -> "Grey owl", "n01440764" -> "tench"."""
    with contextlib.suppress(KeyError):  # it is no synset
        return IMAGENET.label_name_to_description(name).split(", ")[0]
    name = re.sub(r"^(\d+\.\s*|0\d*[_ -]+|n\d{8}[_ -])(?=[^\W\d])", "", name)
    if re.fullmatch(r"([A-Z][a-z]+){2,}", name):  # AnnualCrop
        name = re.sub(r"(?<=[a-z])([A-Z])", r" \1", name).lower()
    return " ".join(name.replace("_", " ").split())


def read_text(path: Path, parse: Callable = str):
    """parse(a user's UTF-8 file, in Unicode's composed form); UserError if it cannot be read or parsed."""
    try:
        return parse(unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; give a whole text file in UTF-8") from None


def name_classes(folders: list[str], file: Path | None) -> list[str]:
    """English names of the class folders, in order; lines FOLDER,NAME of `file` replace some of them."""
    names = {folder: english(folder) for folder in folders}
    for number, line in enumerate(read_text(file).splitlines() if file else [], 1):
        folder, _, name = (part.strip() for part in line.partition(","))
        form = f"{file}, line {number}: '{line}' must be FOLDER,NAME with the name of a class folder"
        require(not line.strip() or (name and folder in names), form)
        names |= {folder: name} if name else {}
    lower = [name.lower() for name in names.values()]
    odd = [n for n in names.values() if lower.count(n.lower()) > 1 or not re.search(r"[^\W\d_]", n)]
    if odd:
        say(f"warning: {len(odd)} class names are unclear or alike, such as '{odd[0]}'; see --class_names")
    return [*names.values()]


# what the recipes for digits share; tuned on standard augmentation, without a method: digits/RESULTS.md
DIGITS = dict(diffusion=DIGITS_SD, classifier="small_cnn", image_size=32, augment="digits", workers=0)
DIGITS |= dict(examples_per_class=16, batch_size=8, optimizer="adamw", lr=0.004, weight_decay=0.05)
DIGITS |= dict(warmup=0.1, label_smoothing=0.1)
TORCHVISION = dict(cifar10="CIFAR10", cifar100="CIFAR100", stl10="STL10", caltech101="Caltech101")
TORCHVISION |= dict(pets="OxfordIIITPet", cars="StanfordCars", eurosat="EuroSAT", flowers102="Flowers102")
TORCHVISION |= dict(food101="Food101", fgvc_aircraft="FGVCAircraft", dtd="DTD", country211="Country211")
DATASETS = ["digits", *TORCHVISION, "imagenet", "coco", "folder", "hf"]
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "test_ood": "test_ood"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
STRAY = re.compile(r"\.|@eaDir|__MACOSX|#recycle|\$RECYCLE|Thumbs\.db|BACKGROUND_Google", re.IGNORECASE)
IMAGENET = timm.data.ImageNetInfo()


def load_data(dataset, data_dir, image_size, augment="none", examples_per_class=0, seed=0, **options) -> Data:
    """Loads a data set or downloads it; UserError if the data are bad. Arguments: see RunArgs."""
    loaders = {"digits": _digits, "coco": _coco, "imagenet": _folder, "folder": _folder, "hf": _hf}
    data = loaders.get(dataset, _torchvision)(data_dir, name=dataset, **options)
    own, file = Path(data_dir, "classes.txt"), options.get("class_names")
    data.class_names = name_classes(data.folders, Path(file) if file else own if own.exists() else None)
    if data.test is None:
        others, held = split_per_class(data.train.labels, 0.2, seed=0)
        say(f"{data_dir} has no test split: a fifth of each class is held out for it, {len(held)} images")
        data.test, data.train = data.train.subset(held), data.train.subset(others)
    require(min(map(len, data.splits().values())), f"{data_dir} has a split without images")
    counts, need = np.bincount(data.train.labels, minlength=len(data.folders)), max(1, examples_per_class)
    few = f"{counts.min()} training images of '{data.class_names[counts.argmin()]}'"
    require(counts.min() >= need, f"{data_dir} has {few}, {need} are needed")
    if examples_per_class:
        drawn = draw_per_class(data.train.labels, lambda n: examples_per_class, seed)
        left = np.setdiff1d(np.arange(len(data.train)), drawn)
        data.unlabelled = data.unlabelled or data.train.subset(left)
        data.train = data.train.subset(drawn)
    augmented, plain = make_transforms(image_size, augment)
    for split, images in data.splits().items():
        images = images.seen(augmented if split in ("train", "unlabelled") else plain)
        setattr(data, split, images if split == "unlabelled" else images.decoded())
    return data


def draw_per_class(labels, count: Callable, seed: int) -> np.ndarray:
    """Random indices, class by class: of a class with n images, count(n) of them, without repetition."""
    rng, classes = np.random.default_rng(seed), np.unique(labels)
    members = (rng.permutation(np.flatnonzero(np.equal(labels, y))) for y in classes)
    return np.concatenate([own[: count(len(own))] for own in members])


def split_per_class(labels, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (others, held out): a random `share` of each class, 1 to n - 1 of n images; of 1 image none."""
    held = draw_per_class(labels, lambda n: min(n - 1, max(1, round(share * n))), seed)
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def _data(folders: list, splits: dict[str, list[tuple]], where) -> Data:
    """The Data of splits, {split: (image source, class folder) pairs}; where: its name in error messages."""
    require(len(folders) > 1, f"{where} has {len(folders)} classes; a classifier needs two or more")
    index, images = {name: i for i, name in enumerate(folders)}, {}
    for split, pairs in splits.items():
        strange = [name for _, name in pairs if name not in index][:1]
        require(not strange, f"{split} of {where} has a class '{''.join(strange)}' that train does not have")
        images[split] = Images([source for source, _ in pairs], [index[name] for _, name in pairs])
    return Data([str(name) for name in folders], **images)


def _digits(root: str, style: float | None = None, **_) -> Data:
    from digits import world

    def truth(images: Images, accelerator) -> torch.Tensor:
        return predict(load_oracle().to(accelerator.device), images, accelerator)[0][:, :10].argmax(1)

    parts = world.splits(world.STYLE if style is None else style)
    return Data(world.NAMES, truth=truth, **{split: Images(*part) for split, part in parts.items()})


def load_oracle() -> Classifier:
    """The judge of digits: images [B, 3, 32, 32] -> logits [B, 19]: 10 digits, 6 colours, 3 settings."""
    oracle = Classifier(small_cnn(32), nn.Linear(128, 19))
    oracle.load_state_dict(load_file(ROOT / "digits" / "oracle" / "model.safetensors"))
    return oracle.eval().requires_grad_(False)


def _folder(root: str, name: str = "folder", skip_bad_images: bool = False, **_) -> Data:
    """Data of train/CLASS/*, and test, val, test_ood if present; or of CLASS/*. imagenet: val is the test."""

    def check(file) -> tuple[Path, str]:
        try:
            return file, open_image(file) and ""
        except UserError as error:
            return file, str(error)

    layout = f"a folder data set has {root}/train/CLASS/*, or {root}/CLASS/*"
    inner = [p for p in sorted(Path(root).glob("*")) if p.is_dir() and not STRAY.match(p.name)]
    names = {"train": "train", "val": "test"} if name == "imagenet" else SPLITS
    named = [(names[p.name.lower()], p) for p in inner if p.name.lower() in names]
    named, splits, kinds = named or [("train", Path(root))], {}, torchvision.datasets.folder.IMG_EXTENSIONS
    require("train" in dict(named), f"{root}/train is missing; {layout}")
    for split, folder in named:
        classes = [p for p in sorted(folder.glob("*")) if p.is_dir() and not STRAY.match(p.name)]
        require(classes, f"{folder} has no class folders; {layout}")
        for part in classes:
            files = [Path(top, f) for top, _, found in os.walk(part) for f in found]
            files = [f for f in sorted(files) if not any(map(STRAY.match, f.relative_to(part).parts))]
            images = [f for f in files if f.suffix.lower() in (".gif", ".avif", *kinds)]
            require(images, f"the class folder {part} has no images, only {len(files)} other files")
            class_name = unicodedata.normalize("NFC", part.name)
            splits.setdefault(split, []).extend((f, class_name) for f in images)
    files = [file for pairs in splits.values() for file, _ in pairs]
    with ThreadPool() as pool:
        checked = pool.imap(check, files if name == "folder" else [], 8)
        checked = tqdm(checked, "checking images", len(files), leave=False)
        bad = {file: fault for file, fault in checked if fault}
    listed = f"{len(bad)} of {len(files)} images: {'; '.join([*bad.values()][:10])}"
    require(skip_bad_images or not bad, f"{listed}; repair or delete them, or give --skip_bad_images")
    if bad:
        say(f"left out {listed}")
    names = [*dict.fromkeys(name for _, name in splits["train"])]
    splits = {split: [pair for pair in pairs if pair[0] not in bad] for split, pairs in splits.items()}
    return _data(names, splits, root)


def _hf(root: str, label_column: str = "", **_) -> Data:
    """Data of the Hugging Face hub (OWNER/NAME) or a `save_to_disk` folder; val serves as a missing test."""
    import datasets

    saved = "a folder that datasets' save_to_disk wrote; for class folders, give --dataset folder"
    try:
        loaded = datasets.load_from_disk(root) if Path(root).exists() else datasets.load_dataset(root)
    except Exception as error:
        raise UserError(f"'{root}' is neither on the hub nor {saved} ({error!s:.200})") from None
    loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
    found = {SPLITS[split.lower()]: part for split, part in loaded.items() if split.lower() in SPLITS}
    require("train" in found, f"'{root}' has no split train, only {', '.join(loaded)}")
    features, splits = found["train"].features, {}
    images = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [c for c, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    label = label_column or "".join(labels)  # several names joined are no column: refused below
    fits = images and isinstance(features.get(label), datasets.ClassLabel | datasets.Value)
    require(fits, f"no image or label in {', '.join(features)}: see --label_column")
    names = dict(enumerate(getattr(features[label], "names", [])))
    for split, part in found.items():
        known, pictures = part[label] if label in part.features else [], part.select_columns(images[:1])
        known = [names.get(y) if names else y for y in known]  # None, or -1 of a ClassLabel: no label
        pairs = [((pictures, i), y) for i, y in enumerate(known) if y is not None]
        splits |= {split: pairs} if pairs or split == "train" else {}
    if "test" not in splits and "val" in splits:
        splits["test"] = splits.pop("val")
    used = {y for _, y in splits["train"]}
    return _data([y for y in names.values() if y in used] or sorted(used), splits, root)


def _coco(root: str, **_) -> Data:
    """Data of annotations/, train2017/ and val2017/ (as test); a label: the largest object's category."""
    splits = {}
    for split, year in (("train", "train2017"), ("test", "val2017")):
        path = Path(root, "annotations", f"instances_{year}.json")
        content = read_text(path, json.loads)
        names = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
        files = {image["id"]: Path(root, year, image["file_name"]) for image in content["images"]}
        objects = sorted((a["area"], a["category_id"], a["image_id"]) for a in content["annotations"])
        largest = {image: category for _, category, image in objects}
        splits[split] = [(files[image], names[category]) for image, category in sorted(largest.items())]
    used = {name for _, name in splits["train"]}
    splits["test"] = [(file, name) for file, name in splits["test"] if name in used]
    return _data([name for name in names.values() if name in used], splits, root)


def _torchvision(root: str, name: str, unlabelled: int = 0, **_) -> Data:
    def load_split(**split):
        try:
            split |= {} if name == "cars" else {"download": True}  # if it is not there
            return kind(root, **split)
        except Exception as error:
            raise UserError(f"{name} is not in {root} and cannot be downloaded ({error!s:.200})") from None

    kind, pairs = getattr(torchvision.datasets, TORCHVISION[name]), {}
    takes, train = inspect.signature(kind).parameters, "train" + "val" * (name in ("pets", "fgvc_aircraft"))
    parts = [dict(train=True), dict(train=False)] if "train" in takes else [{}]  # the official splits
    parts = [dict(split=train), dict(split="test")] if "split" in takes else parts
    parts = [load_split(**part) for part in parts]
    names = getattr(parts[0], "classes", None) or parts[0].categories
    for split, part in zip(("train", "test"), parts, strict=False):
        labels = next(vars(part)[key] for key in ("targets", "labels", "_labels", "y") if key in vars(part))
        pairs[split] = [((part, i), names[y]) for i, y in enumerate(labels)]
    data = _data(names, pairs, name)
    if unlabelled and name == "stl10":
        more = load_split(split="unlabeled")
        data.unlabelled = Images([(more, i) for i in range(len(more))], more.labels.tolist())
    return data


# Run folders ------------------------------------------------------------------------------------------------


class Run:
    """A run folder. With these four methods, a run that was stopped resumes and ends with the same result:

    for epoch in run.epochs("ActGen", 300, model=net)  yields the epochs still to do; saves after each
    value = run.once("plan.json", compute, ...)        computes a value once, then reads it from its file
    for batch in run.missing("drawing", files, 8)      yields batches (of indices) that lack a file
    run.keep(images, files)                            writes a batch of images
    """

    MAY_CHANGE = "out overwrite data_dir seeds workers generation_batch_size gradient_checkpointing".split()

    def __init__(self, args, accelerator):
        """Opens or creates args.out. Raises UserError if it is in use or holds a run with other arguments."""
        self.path, self.accelerator, self.main = Path(args.out), accelerator, accelerator.is_main_process
        self.config, self.logs, self.line, self.drawing = {"args": vars(args).copy()}, {}, {}, 0.0
        if self.main:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock", blocking=False)
            try:
                self.lock.acquire()
            except Timeout:
                raise UserError(f"another process is running in {self.path}; give another --out") from None
            except OSError as error:  # a file system without locks
                say(f"warning: {self.path} cannot be locked ({error.strerror}); start no second run in it")
            before = read_file(self.path / "config.json", self.config)
            require("args" in before, f"{self.path} has a config.json that no run wrote; give another --out")
            if args.overwrite and (self.path / "config.json").exists():  # else it is no run's folder
                for old in sorted(self.path.glob("[!.]*"), key=lambda path: path.name == "config.json"):
                    shutil.rmtree(old) if old.is_dir() else old.unlink()  # config.json, its mark, goes last
                before = self.config
            for key in sorted(vars(args).keys() - self.MAY_CHANGE):
                old, now = before["args"].get(key), getattr(args, key)
                moved = isinstance(now, str) and os.path.exists(now) and Path(now).name == Path(str(old)).name
                moved = moved and (not os.path.exists(old) or os.path.samefile(old, now))
                message = f"{self.path} holds a run with --{key} {old}, this one has --{key} {now}"
                message += " (a longer run has other learning rates)" * (key == "epochs")
                require(old == now or moved, f"{message}; give another --out, or --overwrite")
        accelerator.wait_for_everyone()

    def begin(self, data: Data, plan: str) -> None:
        """Call it after all checks. Writes config.json, prints the plan. UserError if the data changed."""
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, diffusers, transformers)}
        files = [(k, v) for k, v in self.config["args"].items() if isinstance(v, str) and os.path.isfile(v)]
        seen = data.fingerprint() | {f"--{k}": sha256(Path(v).read_bytes()).hexdigest() for k, v in files}
        self.config |= {"data": seen, "class_names": data.class_names, "versions": versions}
        before = self.once("config.json", lambda: self.config)["data"]
        for part in self.config["data"] | before:
            now, was = self.config["data"].get(part), before.get(part)
            changed = f"the data changed since the run in {self.path} began: {part}: {now}, was {was}"
            require(now == was, f"{changed}; undo the change, or give another --out, or --overwrite")
        say(f"{self.path}: {plan}")

    def write(self, name: str, value) -> None:
        """Writes a file whole or not at all, on the main process; see write_file."""
        if self.main:
            write_file(self.path / name, value)

    def once(self, name: str, compute, together: bool = False):
        """What file `name` holds; if missing, first writes compute(). together: all processes compute."""
        missing = not (self.path / name).exists()
        self.accelerator.wait_for_everyone()
        if missing and (self.main or together):
            self.write(name, compute())
        self.accelerator.wait_for_everyone()
        return read_file(self.path / name)

    def missing(self, title: str, files: list[Path], batch_size: int):
        """Yields this process's batches (lists of indices into `files`) that lack a file on disk."""
        rank, processes, clock = self.accelerator.process_index, self.accelerator.num_processes, time.time()
        batches = [[*range(len(files))[b : b + batch_size]] for b in range(0, len(files), batch_size)]
        todo = [b for b in batches[rank::processes] if not all(files[i].exists() for i in b)]
        yield from tqdm(todo, title, leave=False, disable=not (self.main and todo))
        self.accelerator.wait_for_everyone()
        self.drawing += time.time() - clock

    def keep(self, images: torch.Tensor, files: list[Path]) -> None:
        """Writes images [B, 3, H, W] in [0, 1] as PNG files; UserError if a value is NaN or infinite."""
        require(images.isfinite().all(), "an image came out as NaN; lower --guidance_scale or the noise")
        for image, file in zip(images.float().cpu(), files, strict=True):
            write_file(file, image)

    def epochs(self, title: str, count: int, **parts):
        """Yields the epochs (0 to count - 1) that are still to do, with a progress bar; seeds torch for each.

        Before the first epoch it restores the checkpoint TITLE.pt, if any: the states of `parts` (models,
        optimizers) and the logged lines. It saves these after each epoch, in long runs about 300 times.
        """
        scaler, file = getattr(self.accelerator, "scaler", None), f"{slug(title)}.pt"
        parts |= {"scaler": scaler} if scaler else {}  # of the losses, in fp16
        state = read_file(self.path / file, {"log": []})
        log = self.logs[title] = state["log"]
        for name in parts.keys() & state.keys():
            parts[name].load_state_dict(state[name])
        bar = tqdm(range(len(log), count), title, count, initial=len(log), disable=not self.main)
        for epoch in bar:
            key = self.config["args"]["seed"], epoch, self.accelerator.process_index
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))  # of dropout and MixUp
            clock, self.line = time.time() - self.drawing, {"classifier": title, "epoch": epoch + 1}
            yield epoch
            log.append(self.line | {"seconds": time.time() - self.drawing - clock})
            bar.set_postfix({k: f"{v:.3f}" for k, v in self.line.items() if isinstance(v, float)})
            self.write("metrics.jsonl", [*itertools.chain(*self.logs.values())])
            if (epoch + 1) % max(1, count // 300) == 0 or epoch + 1 == count:  # for the disk's sake
                self.write(file, {name: part.state_dict() for name, part in parts.items()} | {"log": log})

    def log(self, **values) -> None:
        """Adds values to this epoch's line of metrics.jsonl; with `scores`, also the top-1 of each split."""
        self.line |= values | {k: score["top1"] for k, score in values.get("scores", {}).items()}

    def outcome(self, title: str) -> dict:
        """The last scores logged in run.epochs(title, ...), and "training": the seconds of all epochs."""
        scores = [line["scores"] for line in self.logs[title] if "scores" in line] or [{}]
        return scores[-1] | {"training": sum(line["seconds"] for line in self.logs[title])}

    def finish(self, result: dict | None = None) -> dict | None:
        """The saved result, or None. First saves `result`, if given, and curves: the run is then finished."""
        if result and self.main:
            save_curves(self.logs, self.path / "curves.png")
            self.write("result.json", result)
        self.accelerator.wait_for_everyone()
        result = read_file(self.path / "result.json")
        if result and self.main:
            self.lock.release()
        return result


def slug(text: str) -> str:
    """A title as a file name: "+ image guidance" becomes "image-guidance"."""
    return re.sub("[^a-zA-Z0-9]+", "-", text).strip("-")


def write_file(path: Path, value) -> None:
    """Writes a file whole or not at all: .json, .jsonl (records), .pt (tensors), .png (an image) or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch.save to a file may hide that the disk is full
    if path.suffix == ".pt":
        torch.save(value, buffer)
    elif path.suffix == ".png":  # a higher level of compression takes ten times as long
        image = v2.functional.to_pil_image((value.detach().float().cpu() * 255).round().byte())
        image.save(buffer, format="PNG", compress_level=1)
    else:
        value = "".join(f"{json.dumps(line)}\n" for line in value) if path.suffix == ".jsonl" else value
        buffer.write((json.dumps(value, indent=1) if path.suffix == ".json" else value).encode())
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getbuffer())
    os.replace(temporary, path)


def read_file(path: Path, default=None):
    """What write_file wrote, or the default if there is no such file; a .pt file can run no code."""
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
        raise UserError(f"cannot read {path} ({error!s:.80}); delete it, or --overwrite") from None


def load_classifier(folder: str, title: str) -> tuple[Classifier, list[str]]:
    """(classifier, class names) of a run; the classifier: images [B, 3, S, S] in [0, 1] -> logits [B, K].

    title: a row of the table the run prints; S: its --image_size. DreamDA: main head; DIAGen: best epoch
    """
    state, config = (read_file(Path(folder, file)) for file in (f"{slug(title)}.pt", "config.json"))
    require(state and config, f"{folder} has no trained classifier '{title}'")
    args = argparse.Namespace(**config["args"] | {"pretrained": False})
    net = build_classifier(args, config["class_names"])
    weights = state["best"]["weights"] if "best" in state else state["model"]
    net.load_state_dict({key: value for key, value in weights.items() if not key.startswith("auxiliary")})
    return net.eval(), config["class_names"]


def record(class_names: list[str], label: int, stem: str, seed: list[int]) -> dict:
    """Metadata of a synthetic image. Its folder begins with the label, so ImageFolder keeps the labels."""
    folder = f"{label:04d} " + re.sub(r"[^\w ()'-]", "_", class_names[label])[:60].strip()
    return dict(file_name=f"{folder}/{stem}.png", label=label, class_name=class_names[label], seed=seed)


def images_of(records: list[dict], folder: Path, transform) -> Images:
    """The Images, with labels, that the records describe; their files are in `folder`."""
    return Images([folder / r["file_name"] for r in records], [r["label"] for r in records], transform)


def read_records(folder: Path, class_names: list[str]) -> list[dict]:
    """The records of a run's images, for --synthetic; UserError if files are missing or classes differ."""
    records = read_file(folder / "metadata.jsonl", [])
    there = records and all((folder / r["file_name"]).exists() for r in records)
    require(there, f"--synthetic: {folder} lacks images or their metadata; finish that run first")
    strange = [r["class_name"] for r in records if [r["class_name"]] != class_names[r["label"] :][:1]]
    require(not strange, f"--synthetic: {folder} has other classes than this data set: {strange[:1]}")
    return records


def cost(pipe, images: int, passes: int) -> str:
    """Text: the number of images, `passes` U-Net passes for each, and gigabytes at 1.5 bytes per pixel."""
    gigabytes = images * (pipe.unet.config.sample_size * pipe.vae_scale_factor) ** 2 * 1.5 / 1e9
    return f"{images} images ({passes} U-Net passes each, {gigabytes:.2g} GB)"


def save_grid(images: torch.Tensor, path: Path, columns: int) -> None:
    """Writes images [N, 3, H, W] in [0, 1] as one PNG grid; enlarges images of W <= 32."""
    tiles = F.interpolate(images.float().cpu(), scale_factor=max(1, 64 // images.shape[-1]))
    write_file(path, torchvision.utils.make_grid(tiles, nrow=columns, pad_value=1.0).clamp(0, 1))


def save_variations(real: Images, files: list[Path], path: Path, rows: int = 10, columns: int = 9) -> None:
    """Writes a picture: a row is a real image and its first variations. files: M per real image, in order."""
    M, chosen = len(files) // len(real), np.unique(np.linspace(0, len(real) - 1, rows).astype(int))
    shown = [s for i in chosen for s in (real.sources[i], *files[i * M : (i + 1) * M][:columns])]
    save_grid(torch.stack([real.transform(open_image(s)) for s in shown]), path, 1 + min(M, columns))


def save_curves(series: dict[str, list[dict]], path: Path) -> None:
    """Plots accuracy and loss over the epochs; series: {title: the lines of metrics.jsonl}."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = {"test": "-", "test_ood": "--", "val": ":"}, {"loss": "-"}
    for axes, keys in zip(figure.subplots(1, 2), panels, strict=True):
        for (i, name), (key, style) in itertools.product(enumerate(series), keys.items()):
            if points := [(line["epoch"], line[key]) for line in series[name] if key in line]:
                axes.plot(*zip(*points, strict=True), f"C{i}{style}", label=f"{name}, {key}")
        axes.set(xlabel="epoch", ylabel="training loss" if "loss" in keys else "accuracy")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


# The command line: one run, or the ladder -------------------------------------------------------------------


def number(interval: str, help: str, default=None, **options):
    """An argument of one or more numbers in an interval such as "(0, 1]"; --help shows the interval."""
    return HfArg(help=help, metadata={"metavar": interval}, **(options or {"default": default}))


@dataclass
class RunArgs:
    """The arguments that all methods share. A recipe (see Method) replaces some of these defaults."""

    dataset: str = HfArg(default="digits", help=", ".join(DATASETS))
    data_dir: str = HfArg(default="data", help="data set's folder; hf: hub id OWNER/NAME, or folder")
    class_names: str = HfArg(default="", help="file with lines FOLDER,NAME; by default DATA_DIR/classes.txt")
    label_column: str = HfArg(default="", help="hf: label column; by default the only ClassLabel column")
    skip_bad_images: bool = HfArg(default=False, help="leave out images that cannot be read")
    style: float | None = number("[0, 1]", "digits: how far its style is from the generator's; 0.65 if unset")
    out: str = HfArg(default="", help="run folder; by default runs/SCRIPT-DATASET[-ladder]-sSEED")
    overwrite: bool = HfArg(default=False, help="start afresh if the folder holds a run")
    seed: int = number("[0, 4294967295]", "seed of every random draw", 0)
    ladder: bool = HfArg(default=False, help="run the ablation ladder over --seeds seeds")
    seeds: int = number("[1, 1000]", "number of seeds of the ladder", 5)
    baseline: bool = HfArg(default=True, help="also train the baselines of the method")
    real_only: bool = HfArg(default=False, help="train on the real images alone")
    workers: int = number("[0, 1000]", "processes that load images, for each GPU", 8)
    diffusion: str | None = HfArg(default=None, help="Stable Diffusion: model id or local folder")
    prompt: str = HfArg(default="a photo of a {}", help="prompt; {} stands for the class name")
    steps: int | None = number("[1, 10000]", "sampling steps")
    guidance_scale: float | None = number("[0, 100]", "scale of classifier-free guidance")
    generation_batch_size: int = number("[1, 1e6]", "images generated at once, on each GPU", 8)
    square: Literal["squeeze", "crop"] = HfArg(default="squeeze", help="how generator inputs become square")
    gradient_checkpointing: bool = HfArg(default=False, help="generator: less gradient memory, but slower")
    examples_per_class: int = number("[0, 1e9]", "real training images per class; 0 takes all", 0)
    classifier: str = HfArg(default="resnet50", help="small_cnn, clip, or any model of timm")
    pretrained: bool = HfArg(default=False, help="start from pretrained weights")
    frozen: bool = HfArg(default=False, help="train only the classifier's last linear layer")
    clip: str = HfArg(default="openai/clip-vit-base-patch32", help="CLIP model, where CLIP is used")
    image_size: int = number("[8, 1024]", "side of the classifier's images in pixels", 224)
    augment: str = HfArg(default="resized", help="(digits|crop|resized|squeezed|zoomed|none)[+randaugment]")
    epochs: int | None = number("[1, 1e6]", "training epochs")
    batch_size: int | None = number("[2, 1e6]", "images in a batch, over all GPUs (dreamda: real images)")
    optimizer: Literal["sgd", "adam", "adamw"] = HfArg(default="sgd", help="optimizer")
    lr: float | None = number("(0, 100]", "peak learning rate")
    head_lr: float = number("(0, 1000]", "learning rate of the last layer, in multiples of --lr", 1.0)
    weight_decay: float = number("[0, 1]", "weight decay", 1e-4)
    warmup: float = number("[0, 1)", "share of the epochs with linear warm-up", 0.0)
    label_smoothing: float = number("[0, 1)", "share of a label spread evenly over all classes", 0.0)
    eval_every: int = number("[1, 1e6]", "epochs from one evaluation to the next", 1)


@dataclass
class Method:
    """A script: its name, arguments (a class), recipes, ablation ladder, and the function that does a run.

    recipes: {key: arguments}; keys: DATASET, "DATASET/CLASSIFIER", a value of --method, or "*" (always).
        Later keys win over earlier ones, the command line over all
    ladder: {rung: changed arguments}; synthetic="RUNG" takes that rung's images, embeddings="RUNG" its tokens
    run: (args, run, data, pipe) -> {classifier's title: its scores}; the last classifier is the method's
    """

    name: str
    args: type
    recipes: dict[str, dict]
    ladder: dict[str, dict]
    run: Callable

    def recipe(self, dataset: str = "digits", classifier: str = "", method: str = "", **_) -> dict:
        """The values of all recipes that apply, merged; see `recipes` of Method."""
        words = {"*", dataset, classifier.split(".")[0], method}
        return {k: v for key, vs in self.recipes.items() if {*key.split("/")} <= words for k, v in vs.items()}

    def arguments(self, **given):
        """All arguments: given, else the recipe's, else defaults. UserError if a value is not allowed."""
        args = self.args(**self.recipe(**given) | given)
        for field in fields(args):
            value, interval = getattr(args, field.name), field.metadata.get("metavar", "")
            setattr(args, field.name, os.path.expanduser(value) if isinstance(value, str) else value)
            if interval and value is not None:
                low, high = map(float, interval[1:-1].split(","))
                for v in value if isinstance(value, list) else [value]:
                    end = (v == low and "[" in interval) or (v == high and "]" in interval)
                    require(low < v < high or end, f"--{field.name} {v} must lie in {interval}")
        require(args.dataset in DATASETS, f"--dataset {args.dataset} is none of: {', '.join(DATASETS)}")
        args.out = args.out or f"runs/{self.name}-{args.dataset}{'-ladder' * args.ladder}-s{args.seed}"
        require(args.prompt.count("{}") == 1, f"--prompt '{args.prompt}' must have one {{}} for the class")
        knows = args.pretrained or args.classifier == "clip" or not args.frozen
        require(knows, "--frozen trains one layer on random features; give --pretrained, or --frozen false")
        return args

    def parse(self) -> dict:
        """{name: value} of only the arguments on the command line; --help shows the recipe's values."""
        about, quiet = sys.modules["__main__"].__doc__.split("\n")[0], argparse.SUPPRESS
        bare = HfArgumentParser(self.args, usage=quiet, add_help=False, allow_abbrev=False)
        bare.set_defaults(**{field.name: None for field in fields(self.args)})
        given = {key: v for key, v in vars(bare.parse_known_args()[0]).items() if v is not None}
        parser = HfArgumentParser(self.args, description=about, usage=quiet, allow_abbrev=False)
        parser.set_defaults(**self.recipe(**given))
        parser.parse_args()
        return given


def run_once(method: Method, args, accelerator) -> dict:
    """The result of the run in args.out: runs it or, if it is finished, reads its result."""
    inside = Path(args.out).resolve().is_relative_to(Path(args.data_dir).resolve())
    require(not inside or args.dataset not in ("folder", "imagenet"), f"--out {args.out} is in --data_dir")
    run = Run(args, accelerator)
    if result := run.finish():
        say(f"{run.path} is finished; --overwrite starts it afresh")
        return result
    with accelerator.main_process_first():  # it downloads what is missing
        data, pipe = load_data(**vars(args)), None
        build_classifier(args, data.class_names)
        if not (args.real_only or getattr(args, "synthetic", "")):
            pipe = load_pipeline(args.diffusion, accelerator.device, None, args.gradient_checkpointing)
    load(data.train, args.batch_size, accelerator)  # refuses a batch size before anything takes time
    return run.finish(method.run(args, run, data, pipe))


def run_ladder(method: Method, given: dict, accelerator) -> str:
    """Runs every rung of the ladder for every seed; returns the table, which is also in ladder.md."""
    args, top1 = method.arguments(**given), {}
    fixed = sorted({"synthetic", "embeddings", "real_only", "random_generation", "method"} & given.keys())
    require(not fixed, f"--ladder takes no --{' or --'.join(fixed)}: its rungs set them")
    for seed in range(args.seed, args.seed + args.seeds):
        out = {rung: str(Path(args.out, f"{slug(rung)}-s{seed}")) for rung in method.ladder}
        for rung, changes in method.ladder.items():
            own = {"seed": seed, "out": out[rung], "ladder": False, "baseline": False}
            own |= {key: out[changes[key]] for key in ("synthetic", "embeddings") if key in changes}
            *_, last = run_once(method, method.arguments(**given | changes | own), accelerator).values()
            accelerator.free_memory()  # it would keep every run's model and optimizer
            for split in [split for split in ("test", "test_ood") if split in last]:
                top1.setdefault(split, {}).setdefault(rung, []).append(100 * last[split]["top1"])
    title = f"{args.seeds} seeds, mean ± 95 % interval, % top-1; gain: over the rung before, seed by seed"
    lines = [title, "", f"| rung | {' | gain | '.join(top1)} | gain |", "|---" * (1 + 2 * len(top1)) + "|"]
    for before, rung in itertools.pairwise([None, *method.ladder]):
        cells = [rung]
        for values in top1.values():
            gain = interval_text(np.subtract(values[rung], values[before]), "+") if before else ""
            cells += [interval_text(values[rung]), gain]
        lines.append(f"| {' | '.join(cells)} |")
    if accelerator.is_main_process:
        write_file(Path(args.out, "ladder.md"), "\n".join(lines) + "\n")
    return "\n".join(lines)


def report(result: dict[str, dict], out: str) -> str:
    """The text that ends a run: accuracies, gains over the first classifier, notes, images, seconds."""
    first, *others = result.values()
    splits = [split for split in ("test", "test_ood") if split in first]
    gain = "    gain" * bool(others)
    lines = [f"{'accuracy in %':24}" + "".join(f"{split:>9}{gain}" for split in splits)]
    for title, own in result.items():
        values = [(100 * own[split]["top1"], 100 * first[split]["top1"]) for split in splits]
        cells = [f"{v:9.1f}" + (f"{v - base:+8.1f}" if own is not first else " " * 8) for v, base in values]
        lines.append(f"{title:24}{''.join(cells)}".rstrip())
    lines += [r["note"] for r in result.values() if "note" in r]
    training, drawn = (sum(r.get(key, 0) for r in result.values()) for key in ("training", "generation"))
    n = sum(r["synthetic"] for r in result.values() if "generation" in r)
    return "\n".join([*lines, f"{n} images generated in {drawn:.0f} s, {training:.0f} s of training; {out}"])


def main(method: Method) -> None:
    """The command line of a script. A user's mistake ends in one line and exit status 2."""
    try:
        args, accelerator = method.arguments(**(given := method.parse())), make_accelerator()
        if args.ladder:
            return say(run_ladder(method, given, accelerator))
        return say(report(run_once(method, args, accelerator), args.out))
    except UserError as error:  # a DataLoader worker puts its traceback before the message
        message = " ".join(str(error).rpartition("UserError: ")[2].split())
    except torch.OutOfMemoryError:
        message = "out of GPU memory; lower --generation_batch_size, or --batch_size if it was training"
    except OSError as error:
        message = f"cannot read or write {error.filename or args.out}: {error.strerror or error}"
    except KeyboardInterrupt:
        message = "stopped; the same command, without --overwrite, goes on from here"
    print(f"{method.name}.py: error: {message}", file=sys.stderr)
    sys.exit(2)
