"""DreamDA: generative data augmentation with diffusion models (Fu, Chen, Qiao, Yu, 2024, arXiv 2403.12803).

A training image, here called the source image (the paper's seed), is inverted: into the noise from which the
sampler would draw exactly this image. Sampling again from this noise, with the class as the prompt and with
noise added to the U-Net's bottleneck, gives variations of the image. A variation may no longer show the class
of its source. Therefore asymmetric multi-head self-training (AMST) labels the variations: four auxiliary
heads, which learn from real images alone and are kept different from each other, have to agree and be sure.

    python dreamda.py                                       handwritten digits, a few minutes on a laptop
    python dreamda.py --dataset pets                        the paper's: 3 days of one A100, 60 h of drawing
    python dreamda.py --dataset folder --data_dir mydata    your own images, in mydata/train/CLASS/*
    python dreamda.py --dataset stl10 --unlabelled 100000   semi-supervised
    python dreamda.py --ladder --seeds 5                    the paper's comparison, one rung after the other

Paper to code:
    inversion (CycleDiffusion)                 invert, equations (1) to (4)
        a step of the sampler: mu_theta        ddim_steps, predict_eps, ddim_mean
    perturbed reverse process                  vary, equations (5) and (6); Perturbation
    AMST: heads, their augmentations           MultiHead, HEAD_AUGMENTATIONS, head_views
        L_aux, L_orth, L                       self_training_loss (7) and (11), orthogonality_loss (8)
        pseudo-labels, others; L_cons          agreement (9), synthetic_targets; consistency_loss (10)
        burn-in, training                      train
    baseline of as many steps and images       load_batches without a pool: "standard augmentation"
"""

import csv
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torchvision.transforms import v2
from transformers.hf_argparser import HfArg

import common
from common import number, require

# kinds of labels of synthetic images, and the titles of their classifiers; seed: the source image's label
LABELS = {"none": "standard augmentation", "seed": "seed labels", "amst": "AMST", "head": "one head's labels"}
LABELS |= {"soft": "soft labels", "clip": "CLIP labels", "truth": "true labels"}  # soft: probabilities
LABELS |= {"seed_heads": "seed labels, AMST's heads"}  # the heads train, but label nothing


@dataclass
class Args(common.RunArgs):
    """DreamDA's own arguments. The data set's recipe replaces these defaults; see --dataset NAME --help."""

    inversion: Literal["cycle", "ddim", "none"] = HfArg(default="cycle", help="none: img2img with new noise")
    paths: int = number("[0, 10000]", "inversions per image, for its variations in turn; 0: one for each", 0)
    strength: float = number("(0, 1]", "share of the sampling steps that are inverted", 0.8)
    eta: float = number("[0, 1]", "DDIM's eta; 1: every step carries noise, 0: none does", 1.0)
    prompts: str = HfArg(default="", help="CSV file, CLASS;INDEX;PROMPT, instead of --prompt")
    variations: int = number("[1, 10000]", "M, number of variations of each training image", 30)
    perturb: str = HfArg(default="bottleneck", help="noise on bottleneck, mid_input, down, up, latents, none")
    noise_scale: float = number("[0, 1000]", "s, scale of the noise on the features", 3.0)
    relative_noise: bool = HfArg(default=False, help="measure s in standard deviations of the features")
    synthetic: str = HfArg(default="", help="use the synthetic images of this run folder; generate none")
    # self-training; choice: the defaults, but for the number of heads
    labels: Literal[*[*LABELS][1:]] = HfArg(default="amst", help="variation labels; seed: the source's label")
    heads: int = number("[2, 100]", "number of auxiliary heads of AMST", 4)
    auxiliary_lr: float = number("(0, 1000]", "learning rate of auxiliary heads, in multiples of --lr", 1.0)
    threshold: float = number("[0, 1]", "tau, minimum confidence of a pseudo-label", 0.95)
    auxiliary_weight: float = number("[0, 1000]", "w_a, weight of L_aux", 0.2)
    orthogonality_weight: float = number("[0, 1000]", "w_o, weight of L_orth", 0.1)
    consistency_weight: float = number("[0, 1000]", "w_c, weight of L_cons", 1.0)
    burn_in: float = number("[0, 1]", "share of the epochs with source labels, before pseudo-labels", 0.5)
    synthetic_ratio: float = number("(0, 100]", "synthetic + unlabelled images per real one in a batch", 2.0)
    unlabelled: int = number("[0, 1e9]", "number of unlabelled real images added to the synthetic ones", 0)


# From the released script: 100 sampling steps, strength 0.8, guidance 7.5, s = 3, a path per variation; SGD
# with lr 0.01, 5 epochs of warm-up, cosine. From the paper's tables: ResNet-50 from scratch and M = 30.
# choice: 100 epochs, 32 real and 64 synthetic images a step. The released training, which has no AMST, takes
# a pretrained network, 1,000 epochs, and 64 images a step, of which one in 31 is real.
SD15 = dict(diffusion="stable-diffusion-v1-5/stable-diffusion-v1-5", steps=100, guidance_scale=7.5)
SD15 |= dict(generation_batch_size=10, epochs=100, batch_size=32, lr=0.01, warmup=0.05, eval_every=5)
# choice: "Boxer" alone is ambiguous; the authors use a language model's prompt for each image
PETS = dict(prompt="a photo of a {}, a breed of cat or dog")
CIFAR = dict(image_size=32, augment="crop", variations=1)
DIGITS = common.DIGITS | dict(steps=15, guidance_scale=4.0, generation_batch_size=40)
DIGITS |= dict(noise_scale=12.0, relative_noise=True, variations=4, paths=1, burn_in=0.0, threshold=0.3)
# choice: the paper's semi-supervised task, with a pretrained backbone. Its heads are new layers, so they have
# higher learning rates. AdamW trains them as fast with a small w_a, which spares the backbone.
DIGITS |= dict(examples_per_class=8, unlabelled=1000, pretrained=True, lr=1e-3, head_lr=16.0)
DIGITS |= dict(auxiliary_weight=0.02, auxiliary_lr=32.0, batch_size=3, synthetic_ratio=5 / 3, epochs=10)
RECIPES = {"*": SD15, "digits": DIGITS, "pets": PETS, "cifar10": CIFAR, "cifar100": CIFAR}
RECIPES |= {"stl10": dict(image_size=96, augment="crop"), "imagenet": dict(variations=1, batch_size=256)}

# Inversion of the source images (CycleDiffusion, Wu and De la Torre 2022, arXiv 2210.05559) -----------------


@dataclass
class DDIMSteps:
    """The S DDIM steps in use, noisiest first. alpha is the DDIM paper's, which others call alpha-bar."""

    t: torch.Tensor  # [S], timesteps
    alpha: torch.Tensor  # alpha_t [S]
    previous: torch.Tensor  # alpha_{t-1} [S]
    sigma: torch.Tensor  # sigma_t [S]


def ddim_steps(pipe, steps: int = 100, strength: float = 0.8, eta: float = 1.0) -> DDIMSteps:
    """The last int(strength * steps) of `steps` DDIM steps. UserError if there are none, or too many.

    sigma_t = eta sqrt((1 - alpha_{t-1}) / (1 - alpha_t)) sqrt(1 - alpha_t / alpha_{t-1})  (DDIM, equation 16)
    """
    scheduler, t = common.ddim(pipe, steps, strength)
    before, alphas = t - scheduler.config.num_train_timesteps // steps, scheduler.alphas_cumprod
    alpha = alphas[t]
    previous = torch.where(before >= 0, alphas[before.clamp(0)], scheduler.final_alpha_cumprod)
    sigma = eta * ((1 - previous) / (1 - alpha) * (1 - alpha / previous)).sqrt()
    return DDIMSteps(*(values.to(pipe.device) for values in (t, alpha, previous, sigma)))


def ddim_mean(z, eps, alpha, previous, sigma):
    """The mean of z_{t-1}, if eps is the noise in z = z_t (DDIM, equation 12); previous: alpha_{t-1}."""
    z0 = (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    return previous**0.5 * z0 + (1 - previous - sigma**2).clamp(min=0) ** 0.5 * eps


def embed(pipe, prompts: list[str], guidance_scale: float) -> torch.Tensor:
    """Text embeddings [G, B, L, d] of prompts, G = 1; if guidance_scale > 1, G = 2, empty prompts first."""
    text, empty = pipe.encode_prompt(prompts, pipe.device, 1, guidance_scale > 1)
    return text[None] if empty is None else torch.stack([empty, text])


def predict_eps(pipe, z, t, alpha, text, guidance_scale: float = 1.0):
    """eps_theta(z_t, t, text) in float32, by a U-Net for eps or v; guided if text [G, B, L, d] has G = 2."""
    rows, dtype = z.repeat(len(text), 1, 1, 1), pipe.unet.dtype
    output = pipe.unet(rows.to(dtype), t, text.flatten(0, 1).to(dtype)).sample.float()
    if len(text) == 2:
        out_empty, out_text = output.chunk(2)
        output = out_empty + guidance_scale * (out_text - out_empty)
    if pipe.scheduler.config.prediction_type == "v_prediction":
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * z
    return output


@dataclass
class Inverted:
    """The noise that inversion finds, for B paths; a path is one inversion of one image."""

    start: torch.Tensor  # z_T [B, C, h, w]
    noise: torch.Tensor  # sigma_t xi_t [S, B, C, h, w]; choice: the product, as a last sigma_t may be 0
    steps: DDIMSteps


@torch.no_grad()
def invert(
    pipe,
    images: torch.Tensor,
    generators: list[torch.Generator],
    *,
    sources: list[int] | None = None,
    source_prompts: list[str] | None = None,
    start_generators: list[torch.Generator] | None = None,
    inversion: str = "cycle",
    source_guidance: float = 1.5,
    steps: int = 100,
    strength: float = 0.8,
    eta: float = 1.0,
    on_step: Callable | None = None,
) -> Inverted:
    """Inverts `images` [N, 3, H, W] in [0, 1]: returns noise from which DDIM sampling draws the same images.

        (1)  z_T          ~ q(z_T | z_0) = N(sqrt(alpha_T) z_0, (1 - alpha_T) I)     z_0: the images' latents
        (2)  z_{t-1}      ~ q(z_{t-1} | z_t, z_0) = N(ddim_mean(z_t, noise in z_t), sigma_t^2 I)
        (3)  sigma_t xi_t = z_{t-1} - mu_theta(z_t, t, source prompt)    mu_theta = ddim_mean(z_t, eps_theta)
        (4)  z_t          = ddim_mean(z_{t-1}, eps_theta(z_{t-1}, t, source)), alpha_{t-1} and alpha_t swapped

    generators: CPU, one per path; start_generators: for z_T, by default `generators`; equal seeds: equal z_T
    sources: [B], the index of each path's image, by default one path per image; source_prompts: [N], or empty
    inversion: "cycle": (1) to (3); "ddim": (4), no noise; "none": (1) and new xi_t: img2img, other images
    on_step: gets (i, t, {"z": z_{t-1}, "noise": sigma_t xi_t}); "ddim": last i first; "none": never called
    """
    on_step = on_step or (lambda i, t, values: None)
    which = torch.arange(len(images)) if sources is None else torch.as_tensor(sources)
    prompts = source_prompts or [""] * len(images)
    # choice: guidance between two empty prompts changes nothing, so it is switched off
    scale = source_guidance if any(prompts) else 1.0
    text, z0 = embed(pipe, prompts, scale)[:, which], common.encode(pipe, images).float()[which]
    s, noise = ddim_steps(pipe, steps, strength, 0.0 if inversion == "ddim" else eta), []
    if inversion == "ddim":
        z, nothing = z0, torch.zeros(len(s.t), *z0.shape, device=z0.device)
        for i in reversed(range(len(s.t))):
            on_step(i, s.t[i], {"z": z, "noise": nothing[i]})
            eps = predict_eps(pipe, z, s.t[i], s.previous[i], text, scale)
            z = ddim_mean(z, eps, alpha=s.previous[i], previous=s.alpha[i], sigma=s.sigma[i])  # (4)
        return Inverted(z, nothing, s)
    xi = randn_tensor(z0.shape, start_generators or generators, z0.device)
    z = start = s.alpha[0] ** 0.5 * z0 + (1 - s.alpha[0]) ** 0.5 * xi  # (1)
    for i, (t, alpha, previous, sigma) in enumerate(zip(s.t, s.alpha, s.previous, s.sigma, strict=True)):
        xi = randn_tensor(z0.shape, generators, z0.device)
        if inversion == "none":
            noise.append(sigma * xi)
            continue
        eps = (z - alpha**0.5 * z0) / (1 - alpha) ** 0.5  # the noise in z_t, known as z_0 is
        after = ddim_mean(z, eps, alpha, previous, sigma) + sigma * xi  # (2)
        after = after if i + 1 < len(s.t) else z0  # the last is z_0 itself
        eps = predict_eps(pipe, z, t, alpha, text, scale)
        noise.append(after - ddim_mean(z, eps, alpha, previous, sigma))  # (3)
        z = after
        on_step(i, t, {"z": z, "noise": noise[i]})
    return Inverted(start, torch.stack(noise), s)


# The perturbed reverse process ------------------------------------------------------------------------------


def noisy_modules(unet, where: str) -> list[nn.Module]:
    """The U-Net's modules that get noise on their input or output; where: see Perturbation."""
    modules = {"bottleneck": [unet.mid_block], "mid_input": [unet.mid_block], "down": unet.down_blocks}
    modules |= {"up": unet.up_blocks, "latents": [unet.conv_in], "none": []}
    has = None not in modules.get(where, [None])  # small distilled U-Nets have no bottleneck
    require(has, f"--perturb '{where}': this U-Net has none; choose one of: {', '.join(modules)}")
    return [*modules[where]]


class Perturbation:
    """A context manager that adds noise to features h of the U-Net: h + s n_t in every forward pass.

    where: "bottleneck" (the mid block's output), "mid_input" (its input), "down" or "up" (the outputs of all
        such blocks), "latents" (the U-Net's input) or "none"; scale: s
    generators: one CPU generator per image; the U-Net's batch has each image once or, with guidance, twice
    relative: s is in standard deviations of each image's h (with guidance: of h in the row with the prompt)
    calls: how often noise was added; norms: the last ||h|| and ||s n_t|| [B] (of the rows with the prompt)
    """

    def __init__(self, unet, where: str, scale: float, generators, relative: bool = False):
        self.modules = noisy_modules(unet, where) if scale else []  # without noise there is no hook
        self.before, self.calls, self.norms = where in ("mid_input", "latents"), 0, {}
        self.scale, self.generators, self.relative = scale, generators, relative

    def __enter__(self):
        hook = "register_forward_pre_hook" if self.before else "register_forward_hook"
        self.handles = [getattr(module, hook)(self.on_pass) for module in self.modules]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def on_pass(self, module, inputs, output=None):
        """Replaces h by h + s n_t, n_t ~ N(0, I); the skip connections of down blocks stay as they are."""
        values = inputs if output is None else output
        h, *others = values if isinstance(values, tuple) else (values,)
        B, copies = len(self.generators), len(h) // len(self.generators)
        # choice: the two guidance rows of an image get independent noise, as in the released code. Guidance
        # amplifies the difference of the two draws, and this difference makes most of the variety.
        n = torch.cat([randn_tensor(h[:B].shape, self.generators, h.device) for _ in range(copies)])
        if self.relative:
            n = n * h[-B:].float().flatten(1).std(1).repeat(copies).view(-1, 1, 1, 1)
        last = {"h_norm": h, "perturbation_norm": self.scale * n}
        self.norms = {name: v[-B:].float().flatten(1).norm(dim=1) for name, v in last.items()}
        self.calls, h = self.calls + 1, h + (self.scale * n).to(h.dtype)  # of (6)
        return (h, *others) if isinstance(values, tuple) else h


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
    guidance_scale: float = 7.5,
    on_step: Callable | None = None,
) -> torch.Tensor:
    """Draws B variations of inverted images; returns scaled latents [B, C, h, w] for common.decode.

        (5)  y_T     = z_T
        (6)  y_{t-1} = mu_theta(y_t, t, target; h + s n_t) + sigma_t xi_t,   n_t ~ N(0, I)

    sources: [B], the index of each variation's path in `inverted`; prompts: [B], `target` in (6)
    generators: CPU, one per variation, for n_t; perturb, noise_scale (s), relative_noise: see Perturbation
    on_step: called after step i as on_step(i, t, {"y": y_{t-1}, "noise": sigma_t xi_t}); with a perturbation
        the dict also has h_norm and perturbation_norm: ||h|| and ||s n_t|| [B]
    """
    s, text = inverted.steps, embed(pipe, prompts, guidance_scale)
    y, noise = inverted.start[sources], inverted.noise[:, sources]  # (5)
    with Perturbation(pipe.unet, perturb, noise_scale, generators, relative_noise) as added:
        for i, t in enumerate(s.t):
            eps = predict_eps(pipe, y, t, s.alpha[i], text, guidance_scale)  # of h + s n_t
            y = ddim_mean(y, eps, s.alpha[i], s.previous[i], s.sigma[i]) + noise[i]  # (6)
            require(added.calls or not added.modules, "the U-Net bypasses its hooks; is it compiled?")
            if on_step is not None:
                on_step(i, t, {"y": y, "noise": noise[i]} | added.norms)
    return y


# Asymmetric multi-head self-training (AMST). choice: the paper names its parts, no code was released; -------
# equations (7) to (11), their weights, the threshold and the augmentations are this project's.


class MultiHead(common.Classifier):
    """Backbone f, main head W_0, auxiliary heads W_1..W_A: x [B, 3, H, W] -> logits [B, 1 + A, K]."""

    def __init__(self, net: common.Classifier, heads: int):
        super().__init__(net.backbone, net.head, net.mean, net.std)
        size = net.head.in_features, net.head.out_features
        self.auxiliary = nn.ModuleList(nn.Linear(*size) for _ in range(heads))

    def forward(self, x):
        features = self.features(x)
        return torch.stack([head(features) for head in (self.head, *self.auxiliary)], 1)

    def auxiliary_weights(self) -> torch.Tensor:
        """The auxiliary heads' weights W_1..W_A [A, K, d]."""
        return torch.stack([head.weight for head in (self.head, *self.auxiliary)])[1:]


# choice: the paper only says that every head has an augmentation of its own; a fifth head has head 1's
HEAD_AUGMENTATIONS = {
    "geometry": v2.RandomAffine(8, (0.05, 0.05), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
    "colour": v2.ColorJitter(0.3, 0.3, 0.3),
    "blur": v2.RandomChoice([v2.GaussianBlur(3, (0.3, 1.0)), v2.RandomAdjustSharpness(2, p=1.0)]),
    "erase": v2.RandomErasing(0.5, (0.02, 0.12), (0.5, 2.0)),
}
# choice: strong(u) is the training augmentation, then one of geometry, colour and erase, at random
STRONG = v2.RandomChoice([HEAD_AUGMENTATIONS[name] for name in ("geometry", "colour", "erase")])


def head_views(x: torch.Tensor, heads: int) -> tuple[torch.Tensor, int]:
    """Views x and a_k(x) [2, 3, H, W], and a random k from 1 to `heads`; heads = 0: x [1, 3, H, W], and 0."""
    k = int(torch.randint(heads, ())) if heads else -1
    own = [[*HEAD_AUGMENTATIONS.values()][k % len(HEAD_AUGMENTATIONS)](x)] if heads else []
    return torch.stack([x, *own]), 1 + k


def orthogonality_loss(weights: torch.Tensor) -> torch.Tensor:
    """L_orth of the auxiliary heads' weights [A, K, d].

    (8)  L_orth = sum_{j<k} mean_c |cos(W_j[c], W_k[c])|        W_k[c]: the row of class c
    """
    rows = F.normalize(weights, dim=2)
    return torch.einsum("jcd,kcd->jkc", rows, rows).abs().mean(2).triu(1).sum()  # (8)


def agreement(logits: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pseudo-labels y^ [N], and which of them are accepted [N], from the auxiliary heads' logits [N, A, K].

    (9)  y^(u) is accepted if it is the argmax of every W_k f(u) and mean_k softmax(W_k f(u))[y^] >= tau
    """
    votes = logits.argmax(2)
    label = votes[:, 0]
    confidence = logits.softmax(2).mean(1).gather(1, label[:, None])[:, 0]  # of (9)
    return label, (votes == label[:, None]).all(1) & (confidence >= threshold)  # (9)


def consistency_loss(logits: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
    """L_cons [U] of each u, by the main head; logits: [U, K] of strong(u); weak: softmax [U, K] of weak(u).

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

    real: all heads' logits [B, 2, 1 + A, K] of x and a_k(x), or [B, 1, 1, K] of x if A is 0; y: [B]
    head: [B], the k drawn for each image, 1 to A (its term times A estimates (7)); auxiliary: W_k [A, K, d]
    synthetic: all heads' logits [U, 1 + A, K] of strong(u); weak: W_0's probabilities [U, K] of weak(u)
    targets: y^, classes [U] or probabilities [U, K]; labelled: bools [U]; smoothing: for W_0; U may be 0
    """
    L_x = F.cross_entropy(real[:, 0, 0], y, label_smoothing=smoothing)
    L_aux = L_u = torch.zeros_like(L_x)
    if A := len(auxiliary):
        # choice: in each step an image trains one random auxiliary head. This loss times A estimates the sum
        # over k, and costs one more view of each image instead of A more.
        own = real[torch.arange(len(y), device=y.device), 1, head]  # W_k f(a_k(x))
        # choice: the auxiliary heads' labels are not smoothed, because their confidence decides in (9)
        L_aux = A * F.cross_entropy(own, y)  # (7)
    if len(synthetic):
        main = synthetic[:, 0]
        supervised = F.cross_entropy(main, targets, reduction="none", label_smoothing=smoothing)
        L_u = torch.where(labelled, supervised, w_c * consistency_loss(main, weak)).mean()  # of (11)
    return L_x + w_a * L_aux + w_o * orthogonality_loss(auxiliary) + L_u  # (11)


def synthetic_targets(labels: str, logits: torch.Tensor, threshold: float):
    """Targets of N images, classes [N] or probabilities [N, K], and bools [N]: which targets are accepted.

    labels: "amst": agreement of the auxiliary heads; "head": the main head's argmax, if confident;
        "soft": its probabilities, all accepted; logits: [N, 1 + A, K] of the weak views
    """
    if labels == "amst":
        return agreement(logits[:, 1:], threshold)
    main = logits[:, 0].softmax(1)
    if labels == "soft":
        return main, torch.ones(len(main), dtype=torch.bool, device=main.device)
    return main.argmax(1), main.amax(1) >= threshold


# The run ----------------------------------------------------------------------------------------------------


def read_prompts(args: Args, data: common.Data) -> list[list[str]]:
    """Each class's prompts in the file --prompts, with {name} filled in; if it has none, --prompt."""
    names, prompts = data.class_names, [[] for _ in data.class_names]
    text = common.read_text(Path(args.prompts)) if args.prompts else ""
    for row in csv.reader(text.splitlines(), delimiter=";", skipinitialspace=True):
        if "".join(row).strip() and row[0] != "class_name":  # the header
            known = [y for y, own in enumerate(zip(data.folders, names, strict=True)) if row[0] in own]
            require(known and len(row) == 3 and row[2], f"{args.prompts}: {row} is not CLASS;INDEX;PROMPT")
            for y in known:
                prompts[y].append(row[2].replace("{}", "{name}").replace("{name}", names[y]))
    require(any(prompts) or not args.prompts, f"{args.prompts} has no prompts")
    return [own or [args.prompt.replace("{}", name)] for own, name in zip(prompts, names, strict=True)]


def plan_variations(args: Args, data: common.Data) -> list[dict]:
    """The records of all variations: M of the first training image, then M of the second, and so on."""
    names, prompts, records = data.class_names, [*map(itertools.cycle, read_prompts(args, data))], []
    for i, y in enumerate(data.train.labels):
        for k in range(args.variations):
            record = common.record(names, y, f"{i:06d}-{k:02d}", [args.seed, 2, i, k])
            records.append(record | dict(guide=data.train.name(i), guide_index=i, prompt=next(prompts[y])))
    return records


def draw_variations(args: Args, run: common.Run, pipe, data: common.Data, records: list[dict]) -> None:
    """Draws the images of the records, generation_batch_size at a time, split over the processes."""
    M, real = args.variations, common.for_generator(data.train, pipe, args.square)
    files = [run.path / "synthetic" / record["file_name"] for record in records]
    for batch in run.missing("generating", files, args.generation_batch_size):
        # the variations of a source image take its paths in turn; its paths share z_T, but not in img2img
        path = {j: (j // M, j % M % (args.paths or M)) for j in batch}
        paths = sorted(set(path.values()))  # pairs of a source image and the number of its path
        sources = sorted({i for i, _ in paths})
        generators = [common.generator(args.seed, 1, i, k) for i, k in paths]
        starts = [
            own if k == 0 or args.inversion == "none" else common.generator(args.seed, 1, i, 0)
            for own, (i, k) in zip(generators, paths, strict=True)
        ]
        of_paths = dict(sources=[sources.index(i) for i, _ in paths], start_generators=starts)
        images = torch.stack([real[i][0] for i in sources])
        inverted = invert(pipe, images, generators, **of_paths, **common.options(invert, args))
        follows = torch.tensor([paths.index(path[j]) for j in batch])
        # choice: a generator per variation; in the released code all images' k-th variations share noise
        generators = [common.generator(*records[j]["seed"]) for j in batch]
        prompts = [records[j]["prompt"] for j in batch]
        latents = vary(pipe, inverted, follows, prompts, generators, **common.options(vary, args))
        run.keep(common.decode(pipe, latents), [files[j] for j in batch])
    run.write("synthetic/metadata.jsonl", records)
    if run.main:
        common.save_variations(real, files, run.path / "samples" / "variations.png")


def make_pool(args: Args, run: common.Run, data: common.Data, folder: Path, records: list[dict], clip):
    """The pool: N images, synthetic then --unlabelled; {kind: labels [N] known before training, -1: none}."""
    images, accelerator = common.images_of(records, folder, data.test.transform), run.accelerator
    given = dict.fromkeys(("seed", "seed_heads"), torch.tensor(images.labels + [-1] * args.unlabelled))
    if args.unlabelled:
        drawn = common.shuffled(len(data.unlabelled), args.unlabelled, args.seed)
        images = images + data.unlabelled.subset(drawn).seen(data.test.transform)
    if data.truth:
        given["truth"] = data.truth(images, accelerator)
    if clip:
        logits, _ = common.predict(clip.to(accelerator.device), images, accelerator, args.workers)
        given["clip"] = logits.argmax(1)
    return images.decoded(), given


def predict_targets(args: Args, run: common.Run, model, pool, given: dict, labels: str, votes: str = ""):
    """Labels the pool: targets [N] or [N, K], labelled (bools [N]), weak [N, K], and a report.

    If not `given`, targets and weak (the main head's probabilities) are of the weak views: no augmentation.
    report: the share of images with a label; if the truth is known, label_accuracy: the share of these labels
    that are right; seed_accuracy: the same for the labelled variations' source labels. Without a pool N is 0.
    votes: a file for the votes and confidences [n, A] of the auxiliary (or main) heads on n <= 200 images
    """

    def reduce(logits):  # the logits of all heads would not fit for a large data set
        found = synthetic_targets(labels, logits, args.threshold)
        return *found, logits[:, 0].softmax(1), *logits[:, -max(1, logits.shape[1] - 1) :].softmax(2).max(2)

    if pool is None:
        none = torch.zeros(0, dtype=torch.long, device=run.accelerator.device)
        return none, none, none, {}
    if (known := given.get(labels)) is not None:
        found = known.clamp(0), known >= 0, torch.zeros(len(known), 1)
    else:
        *found, _ = common.predict(model, pool, run.accelerator, args.workers, reduce=reduce)
    if votes:
        index = torch.linspace(0, len(pool) - 1, min(200, len(pool))).round().long()
        kept = zip(("label", "accepted", "weak", "confidence", "votes"), found, strict=True)
        run.write(votes, {"index": index} | {name: values[index] for name, values in kept})
    targets, labelled, weak = found[:3]
    report, sourced = {"labelled": labelled.float().mean().item()}, labelled & (given["seed"] >= 0)
    if "truth" in given and sourced.any():
        right = (targets if targets.ndim == 1 else targets.argmax(1)) == given["truth"]
        report["label_accuracy"] = right[labelled].float().mean().item()
        report["seed_accuracy"] = (given["seed"] == given["truth"])[sourced].float().mean().item()
    return *(values.to(run.accelerator.device) for values in (targets, labelled, weak)), report


def pool_batch(args: Args) -> int:
    """The number of pool images, synthetic or unlabelled, in a batch."""
    return max(1, round(args.batch_size * args.synthetic_ratio))


def load_batches(args: Args, accelerator, data: common.Data, pool, heads: int, steps: int, epoch: int):
    """For each step of an epoch a batch of real images ((views, k), y, i) and one of pool images (u, y, i).

    views, k: see head_views; u: strong views. Without a pool (baseline) pool batches are empty, and real ones
    larger by as many images.
    """

    def load(images, size, key, function):
        order = common.shuffled(len(images), steps * size, args.seed, epoch, key)
        images, seed = images.seen(v2.Compose([data.train.transform, function])), (args.seed, epoch, key + 1)
        return common.load(images, size, accelerator, args.workers, order, seed)

    views, U = partial(head_views, heads=heads), pool_batch(args)
    if pool:
        real = load(data.train, args.batch_size, 0, views)
        return zip(real, load(pool, U, 2, STRONG), strict=True)
    real = load(data.train, args.batch_size + U, 0, views)
    return ((((x, k), y, i), (x[:0, 0], y[:0], i[:0])) for (x, k), y, i in real)


def train(args: Args, run: common.Run, data: common.Data, pool, given: dict, labels: str, steps: int):
    """Trains on real images and the pool, if any; returns scores and the pool's final predict_targets."""
    accelerator, heads = run.accelerator, args.heads if labels in ("amst", "seed_heads") else 0
    # choice: the auxiliary heads have their own lr: with a low one, on a pretrained backbone, they stay alike
    parts = dict(rates=lambda net: {net.head: args.head_lr, net.auxiliary: args.auxiliary_lr})
    parts |= dict(wrap=partial(MultiHead, heads=heads))
    net, model, optimizer = common.new_classifier(args, accelerator, data.class_names, **parts)
    weights = dict(w_a=args.auxiliary_weight, w_o=args.orthogonality_weight, smoothing=args.label_smoothing)
    weights |= dict(w_c=args.consistency_weight if labels == "amst" else 0.0)
    # choice: labels are no better than the classifier that gives them. So the main head first learns from the
    # sources' labels, the auxiliary heads from real images; a pretrained backbone needs no burn-in.
    burn_in = int(args.burn_in * args.epochs) if pool and labels not in given else 0

    for epoch in run.epochs(LABELS[labels], args.epochs, model=net, optimizer=optimizer):
        kind, shown = "seed" if epoch < burn_in else labels, (0, args.epochs // 2, args.epochs - 1)
        file = f"votes/{epoch + 1:03d}.pt" if pool and kind in ("amst", "head") and epoch in shown else ""
        # choice: the pool's images are labelled anew before every epoch, not before every step
        targets, labelled, weak, report = predict_targets(args, run, model, pool, given, kind, file)
        # if this kind does not label the --unlabelled images, which are the pool's last, they train nothing
        used = pool.subset(torch.nonzero(given[kind] >= 0)) if kind in given else pool

        def loss_of(batch, targets=targets, labelled=labelled, weak=weak):
            ((views, k), y, _), (u, _, j) = batch
            logits = model(torch.cat([views.flatten(0, 1), u])).float()
            real, synthetic = logits.split([len(logits) - len(u), len(u)])
            of_real = dict(real=real.unflatten(0, views.shape[:2]), y=y, head=k)
            of_pool = dict(synthetic=synthetic, targets=targets[j], labelled=labelled[j], weak=weak[j])
            return self_training_loss(**of_real, **of_pool, auxiliary=net.auxiliary_weights(), **weights)

        done = (torch.arange(steps) / steps + epoch) / args.epochs
        rates = [args.lr * common.cosine(share, args.warmup) for share in done.tolist()]
        batches = load_batches(args, accelerator, data, used, heads, steps, epoch)
        loss = common.train_epoch(model, batches, optimizer, rates, accelerator, loss_of=loss_of)
        run.log(**report, loss=loss)
        if heads:
            run.log(orthogonality=orthogonality_loss(net.auxiliary_weights()).item())
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            run.log(scores=common.evaluate(model, data, accelerator, args.workers))
    return run.outcome(LABELS[labels]), predict_targets(args, run, model, pool, given, labels)


def check(args: Args, run: common.Run, data: common.Data, pipe) -> str:
    """UserError if arguments do not fit the data or the model; returns the cost of drawing, as text."""
    available, processes = len(data.unlabelled or []), run.accelerator.num_processes
    require(args.unlabelled <= available, f"--unlabelled {args.unlabelled}: {args.dataset} has {available}")
    require(args.labels != "truth" or data.truth, f"--labels truth: known for digits, not for {args.dataset}")
    require((n := pool_batch(args)) % processes == 0, f"{processes} processes cannot share {n} pool images")
    if pipe is None:
        return ""
    common.check_prompt(pipe, "{}", sum(read_prompts(args, data), []), args.prompts or "--prompt")
    noisy_modules(pipe.unet, args.perturb)
    S, M = len(ddim_steps(pipe, args.steps, args.strength, args.eta).t), args.variations
    paths = 0 if args.inversion == "none" else min(args.paths or M, M)
    return f"; {common.cost(pipe, len(data.train) * M, round(S * (2 + paths / M)))}"


def experiment(args: Args, run: common.Run, data: common.Data, pipe) -> dict:
    """Draws variations; trains without them, with source labels, and with --labels; returns the scores."""
    drawing, folder = check(args, run, data, pipe), Path(args.synthetic or run.path, "synthetic")
    clip = common.clip_classifier(args.clip, data.class_names) if args.labels == "clip" else None
    there = common.read_file(folder.parent / "config.json", {"args": vars(args)})["args"]
    other = [k for k in ("dataset", "seed", "examples_per_class") if there.get(k) != getattr(args, k)]
    require(not other, f"--synthetic {args.synthetic} is of other real images; changed: {', '.join(other)}")
    records = common.read_records(folder, data.class_names) if args.synthetic else plan_variations(args, data)
    kinds = ["none"] if args.real_only else [*(["none", "seed"] if args.baseline else []), args.labels]
    # choice: an epoch is one pass over the pool; without a pool it has as many steps, of as many images
    steps = max(1, (len(records) + args.unlabelled) // pool_batch(args))
    titles, result = {kind: LABELS[kind] for kind in kinds}, {}
    run.begin(data, f"{', '.join(titles.values())}: {args.epochs} epochs of {steps} steps{drawing}")
    if pipe:
        draw_variations(args, run, pipe, data, records)
    pool, given = (None, {}) if args.real_only else make_pool(args, run, data, folder, records, clip)
    for kind, title in titles.items():
        used = None if kind == "none" else pool
        result[title], (targets, labelled, _, report) = train(args, run, data, used, given, kind, steps)
        result[title]["synthetic"] = len(records) if used else 0
    if pool:
        note = f"{int(labelled.sum())} of the {len(pool)} images of the pool have a label"
        if "label_accuracy" in report:
            right, of_sources = (f"{100 * report[key]:.0f} %" for key in ("label_accuracy", "seed_accuracy"))
            note += f"; {right} of these labels are right; of the variations' source labels, {of_sources}"
        result[title] |= {"note": note, "generation": run.drawing}
        final = targets if targets.ndim == 1 else targets.argmax(1)
        for record, label, sure in zip(records, final.tolist(), labelled.tolist(), strict=False):
            record["pseudo_label"] = label if sure else None
        run.write("labels.jsonl" if args.synthetic else "synthetic/metadata.jsonl", records)
    return result


# The paper's comparison: every rung adds one part, all with as many images and as many training steps.
# choice: without perturbation, variations from the same path are equal, so here each has its own path.
# On digits, latent noise moves a variation as far from its source as the recipe's bottleneck noise does.
LADDER = {
    "standard augmentation": dict(real_only=True),
    "+ img2img variations": dict(inversion="none", paths=0, perturb="none", labels="seed"),
    "+ inversion, no perturbation": dict(paths=0, perturb="none", labels="seed"),
    "+ latent noise": dict(perturb="latents", noise_scale=0.1, labels="seed"),
    "+ bottleneck noise": dict(perturb="bottleneck", labels="seed"),
    "+ AMST": dict(synthetic="+ bottleneck noise", labels="amst"),
}
METHOD = common.Method("dreamda", Args, RECIPES, LADDER, experiment)

if __name__ == "__main__":
    common.main(METHOD)
