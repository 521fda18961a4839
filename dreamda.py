"""DreamDA: generative data augmentation with diffusion models (Fu, Chen, Qiao, Yu, 2024, arXiv 2403.12803).

A training image, here called the source image (the paper's seed), is inverted: into the noise from which the
sampler would draw exactly this image. Sampling again from this noise, with the class as the prompt and with
noise added to the U-Net's bottleneck, gives variations of the image. A variation may no longer show the class
of its source. Therefore asymmetric multi-head self-training (AMST) labels the variations: four auxiliary
heads, which learn from real images alone and are kept different from each other, have to agree and be sure.

    python dreamda.py                                       handwritten digits, a few minutes on a laptop
    python dreamda.py --dataset pets                        the paper's experiment (one GPU, SD 1.5)
    python dreamda.py --dataset folder --data_dir mydata    your own images, in mydata/train/CLASS/*
    python dreamda.py --dataset stl10 --unlabelled 100000   semi-supervised
    python dreamda.py --ladder --seeds 5                    the paper's comparison, one rung after the other
    accelerate launch dreamda.py --dataset caltech101       several GPUs

Paper to code:
    inversion (CycleDiffusion)                 invert, invert_cycle, equations (1) to (3)
        q(z_{t-1} | z_t, z_0) and mu_theta     posterior_mean, mu_theta
    perturbed reverse process                  vary, equations (5) and (6); Perturbation
    AMST: the heads, their augmentations       MultiHead, HEAD_AUGMENTATIONS
        L_orth, pseudo-labels, L_cons, L       orthogonality_loss, agreement, consistency_loss,
                                               self_training_loss, equations (7) to (11)
        training                               train
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.hf_argparser import HfArg

import common
from common import number, require
from digits import inside


@dataclass
class Args(common.RunArgs):
    """DreamDA's own arguments. Where the default is None, the data set's recipe gives the value."""

    # inversion
    inversion: str = HfArg(default="cycle", help="cycle, ddim, or none, which is img2img with fresh noise")
    paths: int | None = number("[0, 10000]", "paths of an image, used in turn; 0: one per variation")
    strength: float = number("(0, 1]", "share of the sampling steps that are inverted", 0.8)
    eta: float = number("[0, 1]", "DDIM's eta; 1: every step carries noise, 0: none does", 1.0)
    source_prompt: str = HfArg(default="", help="prompt of the inversion; {} stands for the class name")
    source_guidance: float = number("[0, 100]", "guidance scale of the inversion, if it has a prompt", 1.5)
    # perturbed sampling
    variations: int | None = number("[1, 10000]", "M, number of variations of each training image")
    perturb: str = HfArg(default="bottleneck", help="bottleneck, mid_input, down, up, latents or none")
    noise_scale: float | None = number("[0, 1000]", "s, scale of the noise on the features")
    relative_noise: bool | None = HfArg(default=None, help="measure s in standard deviations of the features")
    paired_noise: bool = HfArg(default=False, help="give both guidance rows of an image the same noise")
    synthetic: str | None = HfArg(default=None, help="use the images of this run folder, generate none")
    # self-training; choice: the defaults, but for the number of heads
    labels: str = HfArg(
        default="amst",
        help="labels of synthetic images: amst, seed (their source's), seed_heads (these, with AMST's "
        "heads), head, soft, clip; on digits truth",
    )
    heads: int = number("[2, 100]", "number of auxiliary heads of AMST", 4)
    auxiliary_lr: float | None = number("(0, 1000]", "learning rate of auxiliary heads, in multiples of --lr")
    threshold: float | None = number("[0, 1]", "tau, least confidence of a pseudo-label")
    auxiliary_weight: float = number("[0, 1000]", "w_a, weight of L_aux", 0.2)
    orthogonality_weight: float = number("[0, 1000]", "w_o, weight of L_orth", 0.1)
    consistency_weight: float | None = number("[0, 1000]", "w_c, weight of L_cons")
    burn_in: float | None = number(
        "[0, 1]",
        "share of the epochs in which the classifier learns from real images alone, before it labels others "
        "(1: it never does); if none is given, 0 with pretrained weights, else 0.5",
    )
    synthetic_ratio: float = number("(0, 100]", "synthetic images per real image in a batch", 2.0)
    unlabelled: int = number("[0, 1e9]", "real images without labels, added to the synthetic ones", 0)


SD15 = dict(
    # Stable Diffusion 1.5
    diffusion="stable-diffusion-v1-5/stable-diffusion-v1-5",
    prompt="a photo of a {}",
    steps=100,
    guidance_scale=7.5,
    generation_batch_size=10,
    # variations
    variations=30,
    paths=0,  # as released
    noise_scale=3.0,
    relative_noise=False,
    # classifier
    examples_per_class=0,
    classifier="resnet50",
    pretrained=False,
    image_size=224,
    augment="resized",
    epochs=100,
    batch_size=32,  # real images; synthetic_ratio times as many synthetic ones come with them
    optimizer="sgd",
    lr=0.01,
    head_lr=1.0,
    weight_decay=1e-4,
    warmup=0.05,
    label_smoothing=0.0,
    eval_every=5,
    workers=8,
    # self-training
    auxiliary_lr=1.0,
    threshold=0.95,
    consistency_weight=1.0,
)
RECIPES = {name: SD15 for name in common.DATASETS} | {
    "stl10": SD15 | dict(image_size=96, augment="crop"),
    "cifar10": SD15 | dict(image_size=32, augment="crop", variations=1),
    "cifar100": SD15 | dict(image_size=32, augment="crop", variations=1),
    "imagenet": SD15 | dict(variations=1, batch_size=256),
    "digits": SD15
    | dict(
        # the embedded generator
        diffusion=common.DIGITS_SD,
        steps=15,
        guidance_scale=4.0,
        generation_batch_size=40,
        # variations
        variations=4,
        paths=1,
        noise_scale=12.0,  # with less, all variations show their source's colour and setting
        relative_noise=True,
        # classifier; choice: few images and a pretrained backbone (the paper also trains from scratch)
        examples_per_class=16,
        classifier="small_cnn",
        pretrained=True,
        image_size=32,
        augment="digits",
        epochs=30,
        batch_size=8,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.05,
        workers=0,
        # self-training
        auxiliary_lr=32.0,  # slower ones stay alike
        threshold=0.3,  # the four heads' agreement counts for more than their confidence
    ),
}

# ----------------------------------------------------------------------------------------------------------
# Inversion of the source images (CycleDiffusion, Wu and De la Torre 2022, arXiv 2210.05559)


@dataclass
class Steps:
    """The S DDIM steps in use, first to last. As in DDIM's paper, alpha is what others call alpha-bar."""

    t: torch.Tensor  # [S], timesteps
    alpha: torch.Tensor  # alpha_t [S, 1, 1, 1]
    previous: torch.Tensor  # alpha_{t-1} [S, 1, 1, 1]
    sigma: torch.Tensor  # sigma_t [S, 1, 1, 1]


def ddim_steps(pipe, steps: int = 100, strength: float = 0.8, eta: float = 1.0) -> Steps:
    """The last `strength` of `steps` DDIM steps. Raises UserError if none is left.

    sigma_t = eta sqrt((1 - alpha_{t-1}) / (1 - alpha_t)) sqrt(1 - alpha_t / alpha_{t-1})  (DDIM, equation 16)
    """
    scheduler, t = common.ddim(pipe, steps, strength)
    before, alphas = t - scheduler.config.num_train_timesteps // steps, scheduler.alphas_cumprod
    alpha = alphas[t]
    previous = torch.where(before >= 0, alphas[before.clamp(0)], scheduler.final_alpha_cumprod)
    sigma = eta * ((1 - previous) / (1 - alpha) * (1 - alpha / previous)).sqrt()
    return Steps(t.to(pipe.device), *(a.view(-1, 1, 1, 1).to(pipe.device) for a in (alpha, previous, sigma)))


def ddim_mean(z, eps, alpha, previous, sigma):
    """The mean of z_{t-1} if eps is the noise in z_t (DDIM, equation 12)."""
    z0 = (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    return previous**0.5 * z0 + (1 - previous - sigma**2).clamp(min=0) ** 0.5 * eps


def posterior_mean(z, z0, s: Steps, i):
    """The mean of the posterior q(z_{t-1} | z_t, z_0) at step i; with z_0 the noise in z_t is known, too."""
    eps = (z - s.alpha[i] ** 0.5 * z0) / (1 - s.alpha[i]) ** 0.5
    return ddim_mean(z, eps, s.alpha[i], s.previous[i], s.sigma[i])


def mu_theta(pipe, z, s: Steps, i, text, guidance_scale: float):
    """mu_theta(z_t, t, text), the sampler's mean of z_{t-1}: the U-Net predicts the noise in z_t.

    i: the step, a number or one for each row of z
    """
    eps = predict_eps(pipe, z, s.t[i], s.alpha[i], text, guidance_scale)
    return ddim_mean(z, eps, s.alpha[i], s.previous[i], s.sigma[i])


def embed(pipe, prompts: list[str], guidance_scale: float) -> torch.Tensor:
    """The prompts' text embeddings [G, B, L, d]; with guidance G is 2, and the empty prompt's come first.

    A guidance scale of 1 or less means no guidance (G is 1), as in diffusers.
    """
    text, empty = pipe.encode_prompt(prompts, pipe.device, 1, guidance_scale > 1)
    return text[None] if empty is None else torch.stack([empty, text])


def predict_eps(pipe, z, t, alpha, text, guidance_scale: float = 1.0):
    """eps_theta(z_t, t, text) in float32, with classifier-free guidance if `text` has two embeddings.

    The U-Net, which computes in its own precision, predicts eps or, if trained so, v.
    """
    copies, dtype = len(text), pipe.unet.dtype
    rows, t = z.repeat(copies, 1, 1, 1).to(dtype), t.expand(len(z)).repeat(copies)
    output = pipe.unet(rows, t, text.flatten(0, 1).to(dtype)).sample.float()
    if copies == 2:
        out_empty, out_text = output.chunk(2)
        output = out_empty + guidance_scale * (out_text - out_empty)
    if pipe.scheduler.config.prediction_type == "v_prediction":
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * z
    return output


@dataclass
class Inverted:
    """The noise of B inverted images."""

    start: torch.Tensor  # z_T [B, C, h, w]
    # choice: the product sigma_t xi_t is kept, so that a last step with sigma_t = 0 is reproduced, too
    noise: torch.Tensor  # sigma_t xi_t [S, B, C, h, w]
    steps: Steps


def normal(z: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Standard normal noise in the shape of z, each image's from its own generator."""
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(z.shape, generators, z.device)


def invert_cycle(pipe, z0, start, s: Steps, text, guidance_scale, generators, rows, on_step=None) -> Inverted:
    """CycleDiffusion's inversion of z_0 from z_T = start on: equations (2) and (3) of `invert`."""
    B, S = len(z0), len(s.t)
    # choice: the whole path z_T ... z_0 is drawn first, which takes no U-Net
    path = [start]
    for i in range(S - 1):
        path.append(posterior_mean(path[i], z0, s, i) + s.sigma[i] * normal(z0, generators))  # (2)
    path = torch.stack([*path, z0])  # [S + 1, B, C, h, w]

    # then the U-Net sees all steps of all images in full batches
    step = torch.arange(S, device=z0.device).repeat_interleave(B)
    image = torch.arange(B, device=z0.device).repeat(S)
    z, noise = path[:-1].flatten(0, 1), path[1:].flatten(0, 1).clone()
    for r in torch.arange(len(z), device=z0.device).split(max(1, rows // len(text))):
        noise[r] -= mu_theta(pipe, z[r], s, step[r], text[:, image[r]], guidance_scale)  # (3)
    noise = noise.view(S, *z0.shape)
    if on_step is not None:
        for i, t in enumerate(s.t):
            on_step(i, t, {"z": path[i + 1], "noise": noise[i]})
    return Inverted(start, noise, s)


def invert_ddim(pipe, z0, s: Steps, text, guidance_scale: float, on_step=None) -> Inverted:
    """DDIM's inversion: the steps without noise, backwards from z_0 to z_T; equation (4) of `invert`."""
    z = z0
    for i in reversed(range(len(s.t))):
        if on_step is not None:
            on_step(i, s.t[i], {"z": z})
        eps = predict_eps(pipe, z, s.t[i], s.previous[i], text, guidance_scale)
        z = ddim_mean(z, eps, alpha=s.previous[i], previous=s.alpha[i], sigma=s.sigma[i])  # (4)
    return Inverted(z, torch.zeros(1, 1, 1, 1, 1, device=z.device).expand(len(s.t), *z.shape), s)


@torch.no_grad()
def invert(
    pipe,
    images: torch.Tensor,
    generators: list[torch.Generator],
    *,
    method: str = "cycle",
    source_prompts: list[str] | None = None,
    source_guidance: float = 1.5,
    steps: int = 100,
    strength: float = 0.8,
    eta: float = 1.0,
    rows: int = 32,
    start_generators: list[torch.Generator] | None = None,
    on_step: Callable | None = None,
) -> Inverted:
    """The noise from which DDIM sampling reproduces `images` [B, 3, H, W] in [0, 1]; z_0 are their latents.

        (1)  z_T          ~ q(z_T | z_0) = N(sqrt(alpha_T) z_0, (1 - alpha_T) I)
        (2)  z_{t-1}      ~ q(z_{t-1} | z_t, z_0) = N(posterior_mean(z_t, z_0), sigma_t^2 I)
        (3)  sigma_t xi_t = z_{t-1} - mu_theta(z_t, t, source)
        (4)  z_t          = ddim_mean(z_{t-1}, eps_theta(z_{t-1}, t, source)), alpha_{t-1} and alpha_t swapped

    generators: one CPU generator per image
    method: "cycle": (1) to (3); "ddim": (4), without noise; "none": (1) and fresh xi_t, which is img2img
    source_prompts: [B], by default empty
    rows: the number of rows of the U-Net's batches in (3)
    start_generators: draw z_T, by default `generators`; equal ones let several paths share it
    on_step: called as on_step(i, t, values) for each step i, with a dict of z, which is z_{t-1}, and noise,
        which is sigma_t xi_t; "ddim" goes through the steps backwards and has z alone, "none" has no path
    """
    prompts = source_prompts or [""] * len(images)
    # choice: guidance between two empty prompts changes nothing, so the second row is left out
    scale = source_guidance if any(prompts) else 1.0
    text = embed(pipe, prompts, scale)
    z0 = common.encode(pipe, images).float()
    s = ddim_steps(pipe, steps, strength, 0.0 if method == "ddim" else eta)
    if method == "ddim":
        return invert_ddim(pipe, z0, s, text, scale, on_step)
    noise = normal(z0, start_generators or generators)
    start = s.alpha[0] ** 0.5 * z0 + (1 - s.alpha[0]) ** 0.5 * noise  # (1)
    if method == "none":
        return Inverted(start, torch.stack([sigma * normal(z0, generators) for sigma in s.sigma]), s)
    return invert_cycle(pipe, z0, start, s, text, scale, generators, rows, on_step)


# ----------------------------------------------------------------------------------------------------------
# The perturbed reverse process


class Perturbation:
    """Adds noise to features h of the U-Net, h + s n_t in every forward pass; a context manager.

    where: "bottleneck" (the mid block's output), "mid_input" (its input), "down" or "up" (the outputs of all
        such blocks), "latents" (the U-Net's input) or "none"; scale: s
    generators: one CPU generator per image; the U-Net's rows are the images once or, with guidance, twice
    relative: s counts standard deviations of an image's features (with guidance, of its prompted row's)
    paired: both guidance rows of an image get the same noise
    norms: set to a dict, it takes ||h|| and ||s n_t|| [B] of the last pass, of the images' prompted rows

    It works by forward hooks. On leaving, also by an exception, the U-Net is as it was.
    """

    def __init__(self, unet, where: str, scale: float, generators, relative=False, paired=False):
        modules = {
            "bottleneck": [unet.mid_block],
            "mid_input": [unet.mid_block],
            "down": unet.down_blocks,
            "up": unet.up_blocks,
            "latents": [unet.conv_in],
            "none": [],
        }
        common.check_choice("--perturb", where, modules)
        self.modules = modules[where] if scale else []
        self.before = where in ("mid_input", "latents")
        self.scale, self.generators, self.relative, self.paired = scale, generators, relative, paired
        self.norms = None

    def __enter__(self):
        if self.before:
            self.handles = [m.register_forward_pre_hook(self.on_input) for m in self.modules]
        else:
            self.handles = [m.register_forward_hook(self.on_output) for m in self.modules]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def on_input(self, module, inputs):
        return (self.perturbed(inputs[0]), *inputs[1:])

    def on_output(self, module, inputs, output):
        if isinstance(output, tuple):  # a down block's hidden state, and what goes to the up blocks
            return (self.perturbed(output[0]), *output[1:])
        return self.perturbed(output)

    def perturbed(self, h: torch.Tensor) -> torch.Tensor:
        """h + s n_t, n_t ~ N(0, I), for features h of all rows."""
        B, copies = len(self.generators), len(h) // len(self.generators)
        # choice: unless `paired`, the two guidance rows get independent noise, as in the released code.
        # Guidance amplifies the difference of the two draws, and most of the variety comes from it.
        n = torch.cat([normal(h[:B], self.generators) for _ in range(1 if self.paired else copies)])
        n = n.repeat(len(h) // len(n), 1, 1, 1)
        if self.relative:
            n = n * h[-B:].float().flatten(1).std(1).repeat(copies).view(-1, 1, 1, 1)
        if self.norms is not None:
            self.norms["h_norm"], self.norms["perturbation_norm"] = (
                v[-B:].float().flatten(1).norm(dim=1) for v in (h, self.scale * n)
            )
        return h + (self.scale * n).to(h.dtype)


@torch.no_grad()
def vary(
    pipe,
    inverted: Inverted,
    sources: torch.Tensor,
    prompts: list[str],
    generators: list[torch.Generator],
    *,
    perturb: str = "bottleneck",
    noise_scale: float = 3.0,
    relative_noise: bool = False,
    paired_noise: bool = False,
    guidance_scale: float = 7.5,
    on_step: Callable | None = None,
) -> torch.Tensor:
    """Draws one batch of variations of inverted images: scaled latents [B, C, h, w] for common.decode.

        (5)  y_T     = z_T
        (6)  y_{t-1} = mu_theta(y_t, t, target; h + s n_t) + sigma_t xi_t,   n_t ~ N(0, I)

    sources: [B], for each variation the index of the inverted image that it varies
    prompts: [B], the target prompts
    generators: one CPU generator per variation, for n_t
    perturb, noise_scale, relative_noise, paired_noise: see Perturbation, which adds s n_t to h
    on_step: called after step i as on_step(i, t, values), with a dict of y, which is y_{t-1}, and noise,
        which is sigma_t xi_t; with a perturbation also h_norm and perturbation_norm: ||h|| and ||s n_t|| [B]
    """
    s, text = inverted.steps, embed(pipe, prompts, guidance_scale)
    sources = sources.to(inverted.start.device)  # once: a copy to a GPU makes the host wait
    y = inverted.start[sources]  # (5)
    with Perturbation(pipe.unet, perturb, noise_scale, generators, relative_noise, paired_noise) as perturbed:
        perturbed.norms = {} if on_step is not None else None
        for i in range(len(s.t)):
            y = mu_theta(pipe, y, s, i, text, guidance_scale) + inverted.noise[i][sources]  # (6)
            if on_step is not None:
                on_step(i, s.t[i], {"y": y, "noise": inverted.noise[i][sources]} | perturbed.norms)
    return y


# ----------------------------------------------------------------------------------------------------------
# Asymmetric multi-head self-training (AMST)
#
# choice: the paper names AMST's parts and its code was never released. Equations (7) to (11), their weights,
# the threshold and the augmentations are this project's.


class MultiHead(nn.Module):
    """A shared backbone f and 1 + A linear heads W_k: [B, 3, H, W] in [0, 1] -> logits [B, 1 + A, K].

    The classifier's last linear layer becomes W_0, the main head; `heads` auxiliary ones are added.
    """

    def __init__(self, classifier: nn.Module, heads: int):
        super().__init__()
        self.backbone, self.main = common.split_head(classifier)
        size = self.main.in_features, self.main.out_features
        self.auxiliary = nn.ModuleList(nn.Linear(*size) for _ in range(heads))

    def forward(self, x):
        features = self.backbone(x)
        return torch.stack([head(features) for head in (self.main, *self.auxiliary)], 1)

    def auxiliary_weights(self) -> torch.Tensor:
        """W_1..W_A: [A, K, d]."""
        return torch.stack([head.weight for head in (self.main, *self.auxiliary)])[1:]


# choice: the paper only says that every head has an augmentation of its own. Each takes images x [B, 3, H, W]
# in [0, 1] and uniform random numbers u [B, n] in [0, 1).


def geometry(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Turns by up to 8 degrees, scales by 0.9 to 1.1 and shifts by up to a twentieth; u: [B, 4]."""
    a, s, right, down = (2 * u - 1).unbind(1)
    return common.affine(x, 8 * a, 1 + 0.1 * s, 0.05 * right, 0.05 * down)


def colour(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Changes brightness, contrast and saturation by up to 30 %; u: [B, 3]."""
    brightness, contrast, saturation = (0.7 + 0.6 * u).T[..., None, None, None]
    x = (brightness * x).clamp(0, 1)
    x = (x + (contrast - 1) * (x - x.mean((1, 2, 3), keepdim=True))).clamp(0, 1)
    return (x + (saturation - 1) * (x - x.mean(1, keepdim=True))).clamp(0, 1)


def blur(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Mixes each image with a blurred copy: half of them get softer, the others sharper; u: [B, 1]."""
    soft = F.avg_pool2d(F.pad(x, [1] * 4, "replicate"), 3, 1)
    return (x + (2 * u[..., None, None] - 1) * (soft - x)).clamp(0, 1)


def erase(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Blackens a rectangle of 2 to 12 % of half of the images; u: [B, 5]."""
    use, area, shape, down, right = u.T[..., None]
    side, shape = (0.02 + 0.1 * area).sqrt(), 2 ** (shape - 0.5)
    y, x_ = ((torch.arange(n, device=x.device) + 0.5) / n for n in x.shape[2:])
    high, wide = side * shape, side / shape
    rows = ((y - down * (1 - high)) / high).floor() == 0  # [B, H]
    columns = ((x_ - right * (1 - wide)) / wide).floor() == 0
    patch = (use < 0.5)[:, :, None, None] & rows[:, None, :, None] & columns[:, None, None, :]
    return x.masked_fill(patch, 0)


HEAD_AUGMENTATIONS = {
    "geometry": (geometry, 4),
    "colour": (colour, 3),
    "blur": (blur, 1),
    "erase": (erase, 5),
}


def all_views(x: torch.Tensor, u: torch.Tensor, heads: int) -> torch.Tensor:
    """The views [B, 1 + heads, 3, H, W] of each image: x itself and a_1(x)..a_A(x); u: [B, 5 heads]."""
    own = zip(u.split(5, 1), itertools.cycle(HEAD_AUGMENTATIONS.values()), strict=False)
    return torch.stack([x, *(augmentation(x, numbers[:, :n]) for numbers, (augmentation, n) in own)], 1)


def make_views(size: int, augment: str, heads: int) -> tuple[common.Transform, common.Transform]:
    """The transforms of real images to the views x, a_1(x)..a_A(x), and of the pool's images to strong(u).

    A fifth head has the first one's augmentation. Without heads a real image has its standard view x alone.
    """
    real, strong = (common.make_transforms(size, augment)[0] for _ in range(2))
    if heads:
        real.steps.append((partial(all_views, heads=heads), 5 * heads))
    # choice: geometry, colour and erased patches together
    strong.steps += [HEAD_AUGMENTATIONS[name] for name in ("geometry", "colour", "erase")]
    return real, strong


def orthogonality_loss(weights: torch.Tensor) -> torch.Tensor:
    """L_orth of the heads' weights [A, K, d].

    (8)  L_orth = sum_{j<k} mean_c |cos(W_j[c], W_k[c])|        W_k[c]: the row of class c
    """
    rows = F.normalize(weights, dim=2)
    cosines = torch.einsum("jcd,kcd->jkc", rows, rows).abs().mean(2)
    return cosines.triu(1).sum()  # (8)


def agreement(logits: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pseudo-labels y^ [N], and which of them are accepted [N], from the auxiliary heads' logits [N, A, K].

    (9)  y^(u) is accepted if it is the argmax of every W_k f(u) and mean_k softmax(W_k f(u))[y^] >= tau
    """
    votes = logits.argmax(2)
    label = votes[:, 0]
    confidence = logits.softmax(2).mean(1).gather(1, label[:, None])[:, 0]
    return label, (votes == label[:, None]).all(1) & (confidence >= threshold)  # (9)


def consistency_loss(logits: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
    """L_cons of each image, from the main head's logits for strong(u) and probabilities for weak(u).

    (10)  L_cons = ||softmax W_0 f(strong(u)) - softmax W_0 f(weak(u))||^2        no gradient through weak(u)
    """
    return (logits.softmax(1) - weak.detach()).square().sum(1)  # (10)


def self_training_loss(
    real, y, head, synthetic, targets, labelled, weak, auxiliary, w_a=0.2, w_o=0.1, w_c=1.0, smoothing=0.0
) -> torch.Tensor:
    """The loss of a batch of B real images x and U synthetic images u.

        (7)   L_aux = sum_k CE(W_k f(a_k(x)), y)
        (11)  L     = CE(W_0 f(x), y) + w_a L_aux + w_o L_orth
                      + mean over u of CE(W_0 f(strong(u)), y^(u)) if u is labelled, else w_c L_cons

    real: logits [2, B, 1 + A, K] by every head, of x and of a_k(x), or [1, B, 1, K] if A is 0; y: [B]
    head: [B], the k of each image, 1 to A
    synthetic: logits [U, 1 + A, K] of the strong views
    targets: classes [U] or probabilities [U, K]; labelled: [U] bools
    weak: the main head's probabilities [U, K] of the weak views
    auxiliary: the weights W_1..W_A [A, K, d]. A and U may be 0.
    smoothing: label smoothing of the main head's cross-entropies
    """
    # choice: each image of a batch is shown to one auxiliary head, in the next step to another. So (7) is
    # estimated, and costs one more view of each image instead of A.
    loss = F.cross_entropy(real[0, :, 0], y, label_smoothing=smoothing)
    if A := len(auxiliary):
        own = real[1, torch.arange(len(y), device=y.device), head]  # W_k f(a_k(x))
        # choice: the auxiliary heads' labels are not smoothed, because their confidence decides in (9)
        loss = loss + w_a * A * F.cross_entropy(own, y) + w_o * orthogonality_loss(auxiliary)  # (7)
    if len(synthetic):
        main = synthetic[:, 0]
        supervised = F.cross_entropy(main, targets, reduction="none", label_smoothing=smoothing)
        consistency = w_c * consistency_loss(main, weak) if w_c else 0.0 * supervised
        loss = loss + torch.where(labelled, supervised, consistency).mean()  # (11)
    return loss


def synthetic_targets(labels: str, logits: torch.Tensor, threshold: float):
    """The classifier's targets of synthetic and unlabelled images, and which of the images are labelled [N].

    labels: "amst": agreement of the auxiliary heads; "head": the main head's argmax where it is confident;
        "soft": its probabilities
    logits: [N, 1 + A, K] of the weak views
    The targets are classes [N]; if they are soft, probabilities [N, K].
    """
    if labels == "amst":
        return agreement(logits[:, 1:], threshold)
    main = logits[:, 0].softmax(1)
    if labels == "soft":
        return main, torch.ones(len(main), dtype=torch.bool, device=main.device)
    return main.argmax(1), main.max(1).values >= threshold


# ----------------------------------------------------------------------------------------------------------
# The run: variations of all training images

INVERT_ARGS = ("source_guidance", "steps", "strength", "eta")
VARY_ARGS = ("perturb", "noise_scale", "relative_noise", "paired_noise", "guidance_scale")


def records_of(args: Args, data: common.Data) -> list[dict]:
    """The metadata of all variations: M of the first training image, then M of the second, and so on."""
    folders, records = common.class_folders(data.class_names), []
    for (i, y), k in itertools.product(enumerate(data.train.labels), range(args.variations)):
        name = data.class_names[y]
        record = {"file_name": f"{folders[y]}/{i:06d}-{k:02d}.png", "label": y, "class_name": name}
        record |= {"guide": data.train.name(i), "guide_index": i}
        record |= {"prompt": common.fill_prompt(args.prompt, name), "seed": [args.seed, i, k]}
        records.append(record)
    return records


def draw_variations(args: Args, run: common.Run, pipe, data: common.Data, records: list[dict]) -> None:
    """Draws the images of the records, split over the processes by batch; see Run.missing.

    A batch has all M variations of as many source images as fit in generation_batch_size, but of at least
    one. If M is larger, `vary` draws them in several calls.
    """
    M, size, pixels = args.variations, args.generation_batch_size, common.resolution(pipe)
    inverting = {"method": args.inversion} | {name: getattr(args, name) for name in INVERT_ARGS}
    varying = {name: getattr(args, name) for name in VARY_ARGS}
    paths = args.paths or M
    real = data.train.transformed(common.make_transforms(pixels, "none", args.square)[1])
    files = [run.path / "synthetic" / record["file_name"] for record in records]
    for batch in run.missing("generating", files, max(1, size // M) * M):
        # the variations of a source image share z_T and take its paths in turn; img2img shares nothing
        path = {j: (j // M, j % M % paths) for j in batch}
        inversions = sorted(set(path.values()))  # pairs of a source image and the number of its path
        images = torch.stack([real[i][0] for i, _ in inversions])
        names = [records[i * M]["class_name"] for i, _ in inversions]
        prompts = [common.fill_prompt(args.source_prompt, name) for name in names]
        generators = [common.generator(args.seed, 1, i, k) for i, k in inversions]
        starts = [
            g if k == 0 or args.inversion == "none" else common.generator(args.seed, 1, i, 0)
            for g, (i, k) in zip(generators, inversions, strict=True)
        ]
        options = inverting | {"source_prompts": prompts, "rows": 2 * size, "start_generators": starts}
        inverted = invert(pipe, images, generators, **options)
        for part in [batch[b : b + size] for b in range(0, len(batch), size)]:
            sources = torch.tensor([inversions.index(path[j]) for j in part])
            prompts = [records[j]["prompt"] for j in part]
            # choice: every variation has a generator of its own; in the released code the k-th variations of
            # all images have the same noise
            generators = [common.generator(args.seed, 2, *divmod(j, M)) for j in part]
            latents = vary(pipe, inverted, sources, prompts, generators, **varying)
            run.keep(common.decode(pipe, latents), [files[j] for j in part])
        if batch[0] == 0:  # a first picture to look at
            save_variations(run, real, files, M, [j // M for j in batch[::M]])
    run.write("synthetic/metadata.jsonl", records)
    if run.main:
        save_variations(run, real, files, M, np.linspace(0, len(real) - 1, 10).astype(int))


def save_variations(run: common.Run, real: common.Images, files: list[Path], M: int, sources) -> None:
    """Draws a grid of some source images, each beside its first variations."""
    tiles = []
    for i in sources:
        shown = files[i * M : (i + 1) * M][:9]
        tiles += [real[i][0], *(real.transform(common.open_image(file)) for file in shown)]
    scale = max(1, 64 // real[0][0].shape[-1])
    common.save_grid(torch.stack(tiles), run.path / "samples" / "variations.png", 1 + min(M, 9), scale)


# ----------------------------------------------------------------------------------------------------------
# The run: self-training


@dataclass
class Pool:
    """Images whose labels are not sure: N synthetic ones and unlabelled real ones, without augmentation."""

    images: common.Images
    source_labels: torch.Tensor  # [N], the label of the source image; -1 for a real image
    truth: torch.Tensor | None = None  # [N], the true classes if they can be known
    clip_labels: torch.Tensor | None = None  # [N], CLIP's zero-shot prediction if --labels is clip

    def given(self, labels: str) -> torch.Tensor | None:
        """The labels [N] if they do not come from the classifier, -1 where there is none; else None."""
        given = dict.fromkeys(("seed", "seed_heads"), self.source_labels)
        return (given | {"clip": self.clip_labels, "truth": self.truth}).get(labels)


def make_pool(args: Args, accelerator, data: common.Data, folder: Path, records) -> tuple[Pool, dict]:
    """The pool of the synthetic images in `folder` and of --unlabelled real ones.

    On digits also the distances of the synthetic images to the real test images.
    """
    images = common.images_of(records, folder, data.test.transform).keep()
    pool, distances = Pool(images, torch.tensor(images.labels)), {}
    if args.dataset == "digits":
        from digits import judge

        distances, pool.truth = judge.distances_to_test(images, data, accelerator)
    if args.unlabelled:
        drawn = np.random.default_rng(args.seed).permutation(len(data.unlabelled))[: args.unlabelled]
        extra = data.unlabelled.subset(drawn, data.test.transform).keep()
        pool.images = images + extra
        pool.source_labels = torch.cat([pool.source_labels, torch.full((len(extra),), -1)])
        if pool.truth is not None:
            pool.truth = torch.cat([pool.truth, torch.tensor(extra.labels)])
    if args.labels == "clip":
        clip = common.build_classifier("clip", data.class_names, args.image_size, clip=args.clip)
        clip = clip.to(accelerator.device)
        logits, _ = common.predict(clip, pool.images, accelerator, args.workers)
        pool.clip_labels = logits.argmax(1)
    return pool, distances


def predict_targets(args: Args, accelerator, model, pool: Pool | None, labels: str):
    """The pool's targets, which are labelled [N], and the main head's probabilities [N, K] where they count.

    All are predicted from the weak views, which are the images without augmentation. Of each batch only this
    is kept: the logits of all heads would not fit for a large data set. Without a pool N is 0.
    """
    if pool is None:
        return (torch.zeros(0, device=accelerator.device),) * 3

    def reduce(logits):
        return *synthetic_targets(labels, logits, args.threshold), logits[:, 0].softmax(1).half()

    if (given := pool.given(labels)) is not None:
        found = given.clamp(0), given >= 0, torch.zeros(len(given), 1)
    else:
        *found, _ = common.predict(model, pool.images, accelerator, args.workers, reduce=reduce)
    return tuple(t.to(accelerator.device) for t in found)


def label_report(targets, labelled, pool: Pool | None) -> dict[str, float]:
    """The share of the pool that is labelled and, where the truth is known, the share of right labels.

    label_accuracy: of the labels in use; seed_accuracy: of the source images' labels, for the same images
    """
    if pool is None:
        return {}
    label = targets.cpu() if targets.ndim == 1 else targets.argmax(1).cpu()
    labelled = labelled.cpu()
    report = {"labelled": labelled.float().mean().item()}
    if pool.truth is not None and labelled.any():
        report["label_accuracy"] = (label == pool.truth)[labelled].float().mean().item()
        with_source = labelled & (pool.source_labels >= 0)
        report["seed_accuracy"] = (pool.source_labels == pool.truth)[with_source].float().mean().item()
    return report


def pool_batch(args: Args) -> int:
    """The number of images of the pool in a batch."""
    return max(1, round(args.batch_size * args.synthetic_ratio))


def make_loaders(args: Args, accelerator, data: common.Data, heads: int, pool: Pool | None, alone: bool):
    """The loaders of the views of real images and of the pool's strong views, and an epoch's steps.

    alone: without the pool's images; as many real ones, or views of real ones, take their places
    In the place of its label an image has its index.
    """
    views, strong_view = make_views(args.image_size, args.augment, heads)
    real = data.train.transformed(views)
    real.labels = list(range(len(real)))
    # choice: an epoch is one pass over the pool; without a pool it has as many steps, of as many images
    count = len(pool.images) if pool else len(real) * args.variations + args.unlabelled
    steps = max(1, count // pool_batch(args))
    size = args.batch_size
    if alone:
        more = pool_batch(args) // (2 if heads else 1)  # with heads a real image is there twice, x and a_k(x)
        size += more - more % accelerator.num_processes
    loaders = [common.Loader(real, size, accelerator, args.workers, steps * size)]
    if not alone:
        strong = pool.images.transformed(strong_view)
        strong.labels = list(range(count))
        loaders.append(common.Loader(strong, pool_batch(args), accelerator, args.workers, count))
    return loaders, steps


def load_batches(loaders: list[common.Loader], *key: int):
    """Yields the batches of an epoch, by the random seed `key`: real images x, or all their views, and their
    indices, views u of the pool's images and their indices. Without a pool u is empty.
    """
    shuffled = [loader.shuffle(*key, i) for i, loader in enumerate(loaders)]
    for (x, i), *of_pool in zip(*shuffled, strict=True):
        yield x, i, *(of_pool[0] if of_pool else (x.new_empty(0, *x.shape[-3:]), i[:0]))


CLASSIFIERS = {  # the names in reports of classifiers that are trained on real images and these labels
    "none": "standard augmentation",
    "seed": "seed labels",
    "amst": "AMST",
    "head": "one head's labels",
    "soft": "soft labels",
    "clip": "CLIP labels",
    "truth": "true labels",
    "seed_heads": "seed labels, AMST's heads",
}


def learning_rates(args: Args, net: MultiHead) -> dict[nn.Module, float]:
    """The learning rates of the heads, for common.make_optimizer."""
    # choice: the auxiliary heads, which are new, have a rate of their own. Beside a pretrained backbone slow
    # ones stay alike, and AMST gains less.
    return {net.main: args.head_lr, net.auxiliary: args.auxiliary_lr}


def train(args: Args, run: common.Run, accelerator, data: common.Data, pool: Pool | None, labels: str):
    """Trains a classifier on real images and, with a pool, on the pool's images with the chosen labels.

    Returns its scores on each split, and the pool's final targets [N, K] and which are labelled [N].
    """
    heads, names = args.heads if labels in ("amst", "seed_heads") else 0, data.class_names
    wrap = partial(MultiHead, heads=heads)
    net, model, optimizer = common.new_classifier(args, accelerator, names, wrap, learning_rates)
    weights = dict(
        w_a=args.auxiliary_weight,
        w_o=args.orthogonality_weight,
        w_c=args.consistency_weight if labels == "amst" else 0.0,
        smoothing=args.label_smoothing,
    )
    classes = torch.tensor(data.train.labels, device=accelerator.device)
    # choice: labels are no better than the classifier that gives them, so one that was not pretrained learns
    # from real images alone first, in steps of the same size
    burn_in = int(args.burn_in * args.epochs) if pool and pool.given(labels) is None else 0
    loaders = None

    for epoch in run.epochs(CLASSIFIERS[labels], args.epochs, model=net, optimizer=optimizer):
        common.seed_everything(accelerator, args.seed, epoch)
        used = pool if epoch >= burn_in else None
        if not loaders or epoch == burn_in:
            loaders, steps = make_loaders(args, accelerator, data, heads, pool, alone=not used)
        # choice: the pool's images are labelled anew before every epoch, not before every step
        targets, labelled, weak = predict_targets(args, accelerator, model, used, labels)
        run.log(images=len(classes), pool=len(targets), **label_report(targets, labelled, used))
        if pool and labels in ("amst", "head") and epoch in (0, args.epochs // 2, args.epochs - 1):
            run.once(f"votes/{epoch + 1:03d}.pt", inside.votes, args, net, pool)

        # one pass over the pool, real images beside it
        model.train()
        total = 0.0
        for step, (x, i, u, j) in enumerate(load_batches(loaders, args.seed, epoch)):
            progress = (epoch + step / steps) / args.epochs
            common.set_lr(optimizer, args.lr * common.cosine(progress, args.warmup))
            head = 1 + (i + step) % max(1, heads)  # every image has its turn with every head
            if heads:
                x = torch.cat([x[:, 0], x[torch.arange(len(i), device=i.device), head]])  # x, then a_k(x)
            with accelerator.autocast():
                on_real, on_pool = model(torch.cat([x, u])).float().split([len(x), len(u)])
                known = on_real.unflatten(0, (-1, len(i))), classes[i], head
                guessed = on_pool, targets[j], labelled[j], weak[j]
                loss = self_training_loss(*known, *guessed, net.auxiliary_weights(), **weights)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            optimizer.step()
            total += loss.detach()
        common.share_buffers(accelerator, model)
        run.log(loss=common.finite(total) / steps)
        if heads:
            run.log(orthogonality=orthogonality_loss(net.auxiliary_weights()).item())
        if common.to_evaluate(epoch, args.epochs, args.eval_every):
            run.log_scores(common.evaluate(model, data, accelerator, args.workers))
    return run.outcome(CLASSIFIERS[labels]), *predict_targets(args, accelerator, model, pool, labels)[:2]


def save_labels(run, folder: Path, records: list[dict], targets, labelled, names, own: bool) -> None:
    """Adds the final pseudo-labels to the records; draws images that were given another label.

    own: the images in `folder` are this run's, and their metadata is written again
    """
    final = targets if targets.ndim == 1 else targets.argmax(1)
    for record, label, sure in zip(records, final.tolist(), labelled.tolist(), strict=False):
        record["pseudo_label"] = label if sure else None
    if own:
        run.write("synthetic/metadata.jsonl", records)
    changed = [r for r in records if r["pseudo_label"] not in (None, r["label"])]
    if changed and run.main:
        shown = changed[:: math.ceil(len(changed) / 32)]
        captions = [f"{names[r['label']]} → {names[r['pseudo_label']]}" for r in shown]
        files = [folder / r["file_name"] for r in shown]
        common.save_captioned(files, captions, run.path / "samples" / "relabelled.png", columns=8)


def resolve(args: Args) -> Args:
    """Fills the fields left None from the data set's recipe. Raises UserError if a value cannot be."""
    args = common.fill_recipe(args, RECIPES, "dreamda")
    common.check_choice("--labels", args.labels, [*CLASSIFIERS][1:])
    common.check_choice("--inversion", args.inversion, ["cycle", "ddim", "none"])
    if args.burn_in is None:
        args.burn_in = 0.0 if args.pretrained else 0.5  # choice: tuned on digits alone
    return args


def plan_run(args: Args, records: int, real: int, kinds: list[str]) -> dict[str, str]:
    """What a run will do, for Run.begin: records: synthetic images; real: real ones; kinds: of labels."""
    plan = {"generating": f"{records} images"} if records and not args.synthetic else {}
    pool = (records or real * args.variations) + args.unlabelled
    steps = args.epochs * max(1, pool // pool_batch(args))
    return plan | {CLASSIFIERS[kind]: f"{args.epochs} epochs, {steps} steps" for kind in kinds}


def check(args: Args, accelerator, data: common.Data, pipe) -> None:
    """Raises UserError for mistakes that would otherwise show only after the images are generated."""
    common.check_training(args, accelerator, data)
    if args.real_only:
        return
    available, processes = len(data.unlabelled or []), accelerator.num_processes
    require(args.unlabelled <= available, f"--unlabelled {args.unlabelled}: {args.dataset} has {available}")
    known = args.labels != "truth" or args.dataset == "digits"
    require(known, "--labels truth: only the embedded digits' oracle reads synthetic images; choose another")
    of_pool = f"--synthetic_ratio {args.synthetic_ratio}: {pool_batch(args)} synthetic images in a batch are"
    require(pool_batch(args) % processes == 0, f"{of_pool} not a multiple of {processes} processes")
    if args.labels == "clip":
        common.build_classifier("clip", data.class_names, args.image_size, clip=args.clip)
    if pipe is not None:
        common.check_prompt(pipe, args.prompt, data.class_names, "--prompt")
        if "{}" in args.source_prompt:
            common.check_prompt(pipe, args.source_prompt, data.class_names, "--source_prompt")
        ddim_steps(pipe, args.steps, args.strength, args.eta)
        Perturbation(pipe.unet, args.perturb, args.noise_scale, [])


def run_once(args: Args, accelerator) -> dict:
    """Makes one run in args.out, with its baselines. A finished run's result is read from its folder."""
    run = common.Run(args, accelerator)
    if result := run.result():
        return result
    pipe, records, kinds = None, [], ["none"]
    folder = Path(args.synthetic or args.out) / "synthetic"
    with accelerator.main_process_first():  # it downloads what is missing
        data = common.data_of(args, unlabelled=args.unlabelled > 0)
        if not (args.real_only or args.synthetic):
            pipe = common.load_pipeline(args.diffusion, accelerator.device, lora=args.lora)
    if not args.real_only:
        read = common.read_records
        records = read(folder, data.class_names) if args.synthetic else records_of(args, data)
        kinds = list(dict.fromkeys([*(("none", "seed") if args.baseline else ()), args.labels]))
    check(args, accelerator, data, pipe)
    run.begin(plan_run(args, len(records), len(data.train), kinds))

    pool, generated, result = None, {}, {}
    if pipe is not None:
        draw_variations(args, run, pipe, data, records)
        pipe = None  # frees its memory
    if not args.real_only:
        pool, generated["distances"] = make_pool(args, accelerator, data, folder, records)
    for kind in kinds:
        scores, *labels = train(args, run, accelerator, data, pool if kind != "none" else None, kind)
        result[CLASSIFIERS[kind]] = scores | {"synthetic": len(records)}
    result[CLASSIFIERS[kinds[-1]]] |= {"generation": run.seconds.get("generating", 0.0)} | generated
    if pool and args.baseline:
        net = MultiHead(common.new_classifier(args, accelerator, data.class_names)[0], 0)
        judged = (folder, data, accelerator, args.workers)
        seen = common.judge_images(net.to(accelerator.device), run, CLASSIFIERS["none"], *judged)
        result[CLASSIFIERS[kinds[-1]]]["judged"] = seen
    if pool:
        save_labels(run, folder, records, *labels, data.class_names, own=not args.synthetic)
        inside.show_dreamda(args, run, data, pool)
    return run.finish(result)


# The paper's comparison: every rung adds one part, all with as many images and as many training steps.
# choice: without perturbation the variations by one path would be equal, so each gets its own path. On digits
# the noise on the latents takes a variation as far from its source as the recipe's on the bottleneck does.
LADDER = {
    "standard augmentation": dict(real_only=True),
    "+ img2img variations": dict(inversion="none", paths=0, perturb="none", labels="seed"),
    "+ inversion, no perturbation": dict(paths=0, perturb="none", labels="seed"),
    "+ latent noise": dict(perturb="latents", noise_scale=0.1, labels="seed"),
    "+ bottleneck noise": dict(labels="seed"),
    "+ AMST": dict(synthetic="+ bottleneck noise"),
}


def main(args: Args) -> None:
    common.run_method(resolve(args), LADDER, run_once)


if __name__ == "__main__":
    common.cli(main, Args, RECIPES)
