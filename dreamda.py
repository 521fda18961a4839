"""DreamDA: generative data augmentation with diffusion models (Fu, Chen, Qiao, Yu, 2024, arXiv 2403.12803).

A training image is inverted: into the noise with which the sampler would draw just this image. Sampling with
that noise, the class as the prompt and the U-Net's bottleneck perturbed gives variations of it. They may no
longer show the class of their seed, so asymmetric multi-head self-training (AMST) labels them: four auxiliary
heads, trained on real images alone and kept different, have to agree and be confident.

    python dreamda.py                                       handwritten digits, a few minutes on a laptop
    python dreamda.py --dataset pets                        the paper's experiment (one GPU, SD 1.5)
    python dreamda.py --dataset folder --data_dir mydata    your own images, in mydata/train/CLASS/*
    python dreamda.py --dataset stl10 --unlabelled 100000   semi-supervised
    python dreamda.py --ladder --seeds 5                    the paper's comparison, one rung after the other
    accelerate launch dreamda.py --dataset caltech101       several GPUs

Paper to code:
    inversion of the seed (CycleDiffusion)      invert, ddim_mean
    perturbed reverse process                   vary, Perturbation
    AMST: heads, losses, pseudo-labels          MultiHead, head_augmentations, orthogonality_loss, agreement,
                                                consistency_loss, train
"""

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

import common


@dataclass
class Args(common.RunArgs):
    """DreamDA's arguments, beside every method's; "(recipe)": defaults to the data set's recipe."""

    # generation
    variations: int | None = HfArg(default=None, help="variations of a training image, M (recipe)")
    inversion: str = HfArg(default="cycle", help="cycle, ddim, or none: img2img with fresh noise")
    inversions: int = HfArg(default=1, help="inversions of an image, its variations take turns")
    perturb: str = HfArg(default="bottleneck", help="bottleneck, mid_input, down, up, latents or none")
    noise_scale: float | None = HfArg(default=None, help="s (recipe)")
    relative_noise: bool | None = HfArg(
        default=None, help="s counts standard deviations of the perturbed features, not units (recipe)"
    )
    paired_noise: bool = HfArg(default=False, help="both guidance rows of an image get the same noise")
    strength: float = HfArg(default=0.8, help="share of the noise schedule that is inverted")
    eta: float = HfArg(default=1.0, help="DDIM's eta; 1: every step carries noise")
    source_prompt: str = HfArg(default="", help="prompt of the inversion, {} is the class name")
    source_guidance: float = HfArg(default=1.5, help="its guidance; an empty prompt makes it idle")
    synthetic: str | None = HfArg(default=None, help="a run folder whose images are used, none generated")
    # self-training
    labels: str = HfArg(default="amst", help="of synthetic images: amst, seed, head, soft or clip")
    heads: int = HfArg(default=4, help="auxiliary heads of AMST")
    threshold: float | None = HfArg(default=None, help="tau, least confidence of a pseudo-label (recipe)")
    auxiliary_weight: float = HfArg(default=0.05, help="w_a, weight of L_aux")
    orthogonality_weight: float = HfArg(default=0.1, help="w_o, weight of L_orth")
    consistency_weight: float | None = HfArg(default=None, help="w_c, weight of L_cons (recipe)")
    synthetic_ratio: float = HfArg(default=2.0, help="synthetic images per real one in a batch")
    unlabelled: int = HfArg(default=0, help="real images without labels that join the synthetic ones")


SD15 = dict(  # batch_size counts the real images; each comes with synthetic_ratio synthetic ones
    prompt="a photo of a {}", workers=8, diffusion="stable-diffusion-v1-5/stable-diffusion-v1-5", steps=100,
    guidance_scale=7.5, variations=30, noise_scale=3.0, relative_noise=False, generation_batch_size=10,
    examples_per_class=0, classifier="resnet50", pretrained=False, image_size=224, augment="resized",
    epochs=100, batch_size=32, optimizer="sgd", lr=0.01, weight_decay=1e-4, warmup=0.05, eval_every=5,
    threshold=0.95, consistency_weight=1.0,
)  # fmt: skip
RECIPES = {name: SD15 for name in common.DATASETS} | {
    "digits": SD15 | dict(
        workers=0, diffusion=str(common.ROOT / "digits_sd"), steps=25, guidance_scale=4.0, variations=10,
        noise_scale=12.0, relative_noise=True, generation_batch_size=40, examples_per_class=8,
        classifier="small_cnn", pretrained=True, image_size=32, augment="digits", epochs=20, batch_size=16,
        optimizer="adamw", lr=1e-3, weight_decay=0.05, threshold=0.6,
    ),
    "stl10": SD15 | dict(image_size=96, augment="crop"),
    "cifar10": SD15 | dict(image_size=32, augment="crop", variations=1),
    "cifar100": SD15 | dict(image_size=32, augment="crop", variations=1),
    "imagenet": SD15 | dict(variations=1, batch_size=256),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------
# The seed's inversion (CycleDiffusion, Wu and De la Torre 2022, arXiv 2210.05559)


@dataclass
class Steps:
    """The DDIM steps in use, first to last: t [S], and alpha_t, alpha_{t-1}, sigma_t, each [S, 1, 1, 1]."""

    t: torch.Tensor
    alpha: torch.Tensor
    previous: torch.Tensor
    sigma: torch.Tensor


def ddim_steps(pipe, steps: int = 100, strength: float = 0.8, eta: float = 1.0) -> Steps:
    """The last `strength` of `steps` DDIM steps, sigma_t as in DDIM's eq. 16. UserError if none is left."""
    scheduler, t = common.ddim(pipe, steps, strength)
    before = t - scheduler.config.num_train_timesteps // steps
    alpha = scheduler.alphas_cumprod[t]
    previous = torch.where(
        before >= 0, scheduler.alphas_cumprod[before.clamp(0)], scheduler.final_alpha_cumprod
    )
    sigma = eta * ((1 - previous) / (1 - alpha) * (1 - alpha / previous)).sqrt()
    return Steps(t.to(pipe.device), *(a.view(-1, 1, 1, 1).to(pipe.device) for a in (alpha, previous, sigma)))


def ddim_mean(z, eps, alpha, previous, sigma):
    """The mean of z_{t-1} given z_t and its noise (DDIM, eq. 12): mu_theta if the U-Net predicted eps."""
    z0 = (z - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    return previous**0.5 * z0 + (1 - previous - sigma**2).clamp(min=0) ** 0.5 * eps


def predict_eps(pipe, z, t, alpha, text):
    """eps_theta(z_t, t, text) in float32; the U-Net computes in its own precision."""
    output = pipe.unet(z.to(pipe.unet.dtype), t, text.to(pipe.unet.dtype)).sample.float()
    if pipe.scheduler.config.prediction_type == "v_prediction":
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * z
    return output


@dataclass
class Inverted:
    """start: z_T [B, C, h, w]; noise: sigma_t xi_t [S, B, C, h, w], the product, since sigma_t may be 0."""

    start: torch.Tensor
    noise: torch.Tensor
    steps: Steps


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
) -> Inverted:
    """The noise with which DDIM sampling reproduces `images` [B, 3, H, W] in [0, 1].

    method "cycle": z_T ~ q(z_T | z_0), then z_{t-1} ~ q(z_{t-1} | z_t, z_0) and
        sigma_t xi_t = z_{t-1} - mu_theta(z_t, t, source)
    The whole path is drawn without the U-Net, which then sees all its steps at once, `rows` rows at a time.
    method "ddim": the deterministic ODE run backwards, no noise (eta is 0).
    method "none": no inversion; z_T as above and fresh noise, which makes `vary` stock img2img.
    generators: one CPU generator per image. source_prompts: [B], default empty, when guidance has no effect
    and is left out.
    """
    from diffusers.utils.torch_utils import randn_tensor

    B, device = len(images), pipe.device
    s = ddim_steps(pipe, steps, strength, 0.0 if method == "ddim" else eta)
    z0 = common.encode(pipe, images).float()
    prompts = source_prompts or [""] * B
    guided = source_guidance != 1 and any(prompts)
    source, empty = pipe.encode_prompt(prompts, device, 1, guided)

    def predict(z, t, alpha, image):  # eps of the rows z, which belong to the images `image`
        eps = predict_eps(pipe, z, t, alpha, source[image])
        if guided:
            eps_empty = predict_eps(pipe, z, t, alpha, empty[image])
            eps = eps_empty + source_guidance * (eps - eps_empty)
        return eps

    if method == "ddim":
        z, everyone = z0, torch.arange(B, device=device)
        for i in reversed(range(len(s.t))):  # the same equation, from alpha_{t-1} to alpha_t
            eps = predict(z, s.t[i].expand(B), s.previous[i], everyone)
            z = ddim_mean(z, eps, s.previous[i], s.alpha[i], s.sigma[i])
        return Inverted(z, torch.zeros(1, 1, 1, 1, 1, device=device).expand(len(s.t), *z.shape), s)

    def fresh():
        return randn_tensor(z0.shape, generators, device)

    path = [s.alpha[0] ** 0.5 * z0 + (1 - s.alpha[0]) ** 0.5 * fresh()]
    if method == "none":
        return Inverted(path[0], torch.stack([sigma * fresh() for sigma in s.sigma]), s)
    for i in range(len(s.t) - 1):
        eps = (path[i] - s.alpha[i] ** 0.5 * z0) / (1 - s.alpha[i]) ** 0.5  # the noise that is in z_t
        mean = ddim_mean(path[i], eps, s.alpha[i], s.previous[i], s.sigma[i])
        path.append(mean + s.sigma[i] * fresh())
    path = torch.stack([*path, z0])  # [S + 1, B, C, h, w]
    step = torch.arange(len(s.t), device=device).repeat_interleave(B)
    image = torch.arange(B, device=device).repeat(len(s.t))
    z, noise = path[:-1].flatten(0, 1), path[1:].flatten(0, 1).clone()
    for some in torch.arange(len(z), device=device).split(rows):
        i = step[some]
        eps = predict(z[some], s.t[i], s.alpha[i], image[some])
        noise[some] -= ddim_mean(z[some], eps, s.alpha[i], s.previous[i], s.sigma[i])
    return Inverted(path[0], noise.view(len(s.t), *z0.shape), s)


# ----------------------------------------------------------------------------------------------------------
# The perturbed reverse process


class Perturbation:
    """Adds noise to U-Net features, h + s n_t at every call, while active as a context manager.

    where: "bottleneck" (the mid block's output), "mid_input", "down" or "up" (every such block's output),
    "latents" (the U-Net's input) or "none". relative: s counts standard deviations of an image's features.
    generators: one CPU generator per image; the U-Net's rows are the images once or twice (guidance). paired:
    both rows of an image get the same noise; if not, as in the released code, guidance amplifies the
    difference of the two draws, and most of the variety comes from that.
    Forward hooks only: on leaving, also by an exception, the U-Net is as it was.
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
        if isinstance(output, tuple):  # a down block: its hidden state, and what it hands to the up blocks
            return (self.perturbed(output[0]), *output[1:])
        return self.perturbed(output)

    def perturbed(self, h: torch.Tensor) -> torch.Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        B, copies = len(self.generators), len(h) // len(self.generators)
        draws = 1 if self.paired else copies
        shape = (B, *h.shape[1:])
        n = torch.cat([randn_tensor(shape, self.generators, h.device) for _ in range(draws)])
        if draws < copies:
            n = n.repeat(copies, 1, 1, 1)
        if self.relative:
            n = n * h[-B:].float().flatten(1).std(1).repeat(copies).view(-1, 1, 1, 1)
        return h + (self.scale * n).to(h.dtype)


@torch.no_grad()
def vary(
    pipe,
    inverted: Inverted,
    seeds: torch.Tensor,
    prompts: list[str],
    generators: list[torch.Generator],
    *,
    perturb: str = "bottleneck",
    noise_scale: float = 3.0,
    relative_noise: bool = False,
    paired_noise: bool = False,
    guidance_scale: float = 7.5,
) -> torch.Tensor:
    """Variations of inverted images, one batch: scaled latents [B, C, h, w] for common.decode.

        y_T = z_T,   y_{t-1} = mu_theta(y_t, t, target; h + s n_t) + sigma_t xi_t

    seeds: [B], which inverted image each one varies. prompts: [B]. generators: one CPU generator per
    variation, for n_t.
    """
    s, B = inverted.steps, len(seeds)
    guided = guidance_scale != 1
    c, empty = pipe.encode_prompt(prompts, pipe.device, 1, guided)
    text, rows = (torch.cat([empty, c]), 2) if guided else (c, 1)
    y = inverted.start[seeds]
    with Perturbation(pipe.unet, perturb, noise_scale, generators, relative_noise, paired_noise):
        for i, t in enumerate(s.t):
            eps = predict_eps(pipe, y.repeat(rows, 1, 1, 1), t, s.alpha[i], text)
            if guided:
                eps = eps[:B] + guidance_scale * (eps[B:] - eps[:B])
            y = ddim_mean(y, eps, s.alpha[i], s.previous[i], s.sigma[i]) + inverted.noise[i][seeds]
    return y


# ----------------------------------------------------------------------------------------------------------
# Asymmetric multi-head self-training (AMST). The sources name its parts; where they give no formula, the ones
# below are this project's choice, and so are all weights.


class MultiHead(nn.Module):
    """A shared backbone f and 1 + A linear heads W_k: [B, 3, H, W] in [0, 1] -> logits [B, 1 + A, K].

    The classifier's last linear layer becomes W_0, the main head; `heads` auxiliary ones are added.
    """

    def __init__(self, classifier: nn.Module, heads: int):
        super().__init__()
        self.backbone, last = common.split_head(classifier)
        self.classes = last.out_features
        self.linear = nn.Linear(last.in_features, (1 + heads) * self.classes)
        with torch.no_grad():
            self.linear.weight[: self.classes] = last.weight
            self.linear.bias[: self.classes] = 0 if last.bias is None else last.bias

    def forward(self, x):
        return self.linear(self.backbone(x)).unflatten(1, (-1, self.classes))

    def auxiliary_weights(self) -> torch.Tensor:
        """W_1..W_A: [A, K, d]."""
        return self.linear.weight.unflatten(0, (-1, self.classes))[1:]


def head_augmentations() -> dict[str, list]:
    """The augmentation a_k of each auxiliary head (beyond four heads they repeat), after the standard one."""
    from torchvision.transforms import v2

    return {
        "geometry": [v2.RandomAffine(8, translate=(0.05, 0.05), scale=(0.9, 1.1))],
        "colour": [v2.ColorJitter(0.3, 0.3, 0.3, 0.05)],
        "noise": [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(sigma=0.04)],
        "erase": [v2.ToImage(), v2.RandomErasing(p=0.5, scale=(0.02, 0.12))],
    }


class Views:
    """A transform that stacks several views of an image: PIL -> [V, 3, size, size] in [0, 1]."""

    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        return torch.stack([transform(image) for transform in self.transforms])


def make_views(size: int, augment: str, heads: int):
    """Transforms of a real image to its standard view and a_1..a_A; of a synthetic one to its strong view."""
    from torchvision.transforms import v2

    standard, _ = common.make_transforms(size, augment)
    *pixels, to_tensor, to_float = standard.transforms
    named = list(head_augmentations().values())
    views = [[], *(named[k % len(named)] for k in range(heads))]
    strong = [*named[0], *named[1], *named[3]]
    finish = [to_tensor, to_float]
    real = Views([v2.Compose([*pixels, *view, *finish]) for view in views])
    return real, v2.Compose([*pixels, *strong, *finish])


def orthogonality_loss(weights: torch.Tensor) -> torch.Tensor:
    """L_orth = sum over pairs of heads of the mean |cos| of their rows, class by class; weights [A, K, d]."""
    rows = F.normalize(weights, dim=2)
    cosines = torch.einsum("jcd,kcd->jkc", rows, rows).abs().mean(2)
    return cosines.triu(1).sum()


def agreement(logits: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pseudo-labels [N] and which are accepted [N] from auxiliary logits [N, A, K].

    Accepted: every head has the same argmax, and the mean of their confidences in it is at least threshold.
    """
    votes = logits.argmax(2)
    label = votes[:, 0]
    confidence = logits.softmax(2).mean(1).gather(1, label[:, None])[:, 0]
    return label, (votes == label[:, None]).all(1) & (confidence >= threshold)


def consistency_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_cons = |softmax W_0 f(strong(u)) - softmax W_0 f(weak(u))|^2 per image; target [N, K]: the latter."""
    return (logits.softmax(1) - target.detach()).square().sum(1)


def self_training_loss(
    real,
    y,
    synthetic,
    targets,
    labelled,
    weak,
    auxiliary,
    w_a: float = 0.05,
    w_o: float = 0.1,
    w_c: float = 1.0,
) -> torch.Tensor:
    """The loss of a batch of B real and U synthetic images.

        L = CE(W_0 f(x), y) + w_a sum_k CE(W_k f(a_k(x)), y) + w_o L_orth
            + CE(W_0 f(strong(u)), y^(u)) for labelled u, w_c L_cons for the others

    real: logits [1 + A, B, 1 + A, K], every head's for every view, standard and a_1..a_A; y [B]; synthetic:
    logits [U, 1 + A, K] of strong views; targets [U, K] and labelled [U]: see synthetic_targets; weak: the
    main head's probabilities [U, K] for weak views; auxiliary: W_1..W_A [A, K, d]. A and U may be 0.
    """
    loss = F.cross_entropy(real[0, :, 0], y)
    for k in range(1, len(real)):
        loss = loss + w_a * F.cross_entropy(real[k, :, k], y)
    if len(auxiliary):
        loss = loss + w_o * orthogonality_loss(auxiliary)
    if len(synthetic):
        main = synthetic[:, 0]
        supervised = -(targets * main.log_softmax(1)).sum(1)
        loss = loss + torch.where(labelled, supervised, w_c * consistency_loss(main, weak)).mean()
    return loss


def synthetic_targets(labels: str, logits, seed_labels, threshold: float, clip_logits=None):
    """What synthetic (and unlabelled) images are trained towards: targets [N, K] and which are labelled [N].

    logits: [N, 1 + A, K] of their weak views; seed_labels: [N], -1 where there is no seed.
    labels "amst": agreement of the auxiliary heads; "seed": the seed's label; "head": the main head's argmax
    where it is confident; "soft": the main head's probabilities; "clip": CLIP's zero-shot labels.
    """
    classes, main = logits.shape[2], logits[:, 0].softmax(1)
    if labels == "soft":
        return main, torch.ones(len(main), dtype=torch.bool)
    if labels == "amst":
        hard, labelled = agreement(logits[:, 1:], threshold)
    elif labels == "head":
        hard, labelled = main.argmax(1), main.max(1).values >= threshold
    else:
        hard = seed_labels if labels == "seed" else clip_logits.argmax(1)
        labelled = hard >= 0
    return F.one_hot(hard.clamp(0), classes).float(), labelled


# ----------------------------------------------------------------------------------------------------------
# The run


def generate(args: Args, run: common.Run, accelerator, pipe, data: common.Data) -> tuple[list[dict], float]:
    """M variations of every training image, as files in synthetic/; returns their records, and the seconds.

    Split over the processes by groups of seeds whose variations fill a batch. A group that exists is skipped,
    an incomplete one drawn again, to the bit: every image has its own generators and always the same batch.
    """
    M, size, pixels = args.variations, args.generation_batch_size, common.resolution(pipe)
    folders = common.class_folders(data.class_names)
    seeds = data.train.subset(range(len(data.train)), common.make_transforms(pixels, "none")[1])
    names = [f"{folders[y]}/{i:06d}" for i, y in enumerate(seeds.labels)]
    prompts = [args.prompt.format(data.class_names[y]) for y in seeds.labels]
    sources = [args.source_prompt.format(data.class_names[y]) for y in seeds.labels]
    groups = torch.arange(len(seeds)).split(max(1, size // M))
    mine = range(accelerator.process_index, len(groups), accelerator.num_processes)
    seconds = (run.load("generation.pt") or {"seconds": 0.0})["seconds"]
    for g in tqdm(mine, "generating", disable=not run.main):
        clock = time.time()
        todo = list(itertools.product(groups[g].tolist(), range(M)))
        if all((run.path / "synthetic" / f"{names[i]}-{k:02d}.png").exists() for i, k in todo):
            continue
        starts = sorted({(i, k % args.inversions) for i, k in todo})
        inverted = invert(
            pipe, torch.stack([seeds[i][0] for i, _ in starts]),
            [common.generator(args.seed, 1, i, n) for i, n in starts], method=args.inversion,
            source_prompts=[sources[i] for i, _ in starts], source_guidance=args.source_guidance,
            steps=args.steps, strength=args.strength, eta=args.eta, rows=2 * size,
        )  # fmt: skip
        for some in [todo[b : b + size] for b in range(0, len(todo), size)]:
            latents = vary(
                pipe, inverted, torch.tensor([starts.index((i, k % args.inversions)) for i, k in some]),
                [prompts[i] for i, _ in some], [common.generator(args.seed, 2, i, k) for i, k in some],
                perturb=args.perturb, noise_scale=args.noise_scale, relative_noise=args.relative_noise,
                paired_noise=args.paired_noise, guidance_scale=args.guidance_scale,
            )  # fmt: skip
            run.save("generation.pt", {"seconds": seconds})  # images that exist belong to these arguments
            for (i, k), image in zip(some, common.decode(pipe, latents), strict=True):
                common.save_png(image, run.path / "synthetic" / f"{names[i]}-{k:02d}.png")
        seconds += time.time() - clock
        run.save("generation.pt", {"seconds": seconds})
    accelerator.wait_for_everyone()
    records = []
    for (i, y), k in itertools.product(enumerate(seeds.labels), range(M)):
        record = {"file_name": f"{names[i]}-{k:02d}.png", "label": y, "class_name": data.class_names[y]}
        record |= {"guide": seeds.name(i), "guide_index": i, "prompt": prompts[i], "seed": [args.seed, i, k]}
        records.append(record)
    run.write_lines("synthetic/metadata.jsonl", records)
    if run.main:  # a picture to look at: seed | variations
        tiles = []
        for i in np.linspace(0, len(seeds) - 1, 10).astype(int):
            files = [run.path / "synthetic" / r["file_name"] for r in records[i * M : (i + 1) * M][:9]]
            tiles += [seeds[i][0], *(seeds.transform(common.open_image(file)) for file in files)]
        path = run.path / "samples" / "variations.png"
        common.save_grid(torch.stack(tiles), path, 1 + min(M, 9), max(1, 64 // pixels))
    return records, seconds


@dataclass
class Pool:
    """Images without a sure label: synthetic ones, then unlabelled real ones.

    seed_labels [N]: the seed's class, -1 for a real image; truth [N]: the true class where it can be known
    (on digits), for reports only; clip_logits [N, K]: CLIP's zero-shot prediction if --labels clip.
    """

    images: common.Images
    seed_labels: torch.Tensor
    truth: torch.Tensor | None = None
    clip_logits: torch.Tensor | None = None


def make_pool(args: Args, run: common.Run, accelerator, data: common.Data, folder, records):
    """Pool of the images in `folder` and the unlabelled ones asked for; on digits, distances to `test`."""
    sources = [common.keep_small(folder / r["file_name"], args.image_size) for r in records]
    images = common.Images(sources, [r["label"] for r in records], data.test.transform)
    seed_labels = torch.tensor(images.labels)
    truth, distances = None, {}
    if args.dataset == "digits":
        distances, truth = common.distances_to_test(images, data, accelerator)
    if args.unlabelled:
        some = np.random.default_rng(args.seed).permutation(len(data.unlabelled))[: args.unlabelled]
        extra = data.unlabelled.subset(some)
        images = images + extra
        seed_labels = torch.cat([seed_labels, torch.full((len(extra),), -1)])
        truth = None if truth is None else torch.cat([truth, torch.tensor(extra.labels)])
    pool = Pool(images, seed_labels, truth)
    if args.labels == "clip":
        clip = common.build_classifier("clip", data.class_names, args.image_size, clip=args.clip)
        pool.clip_logits, _ = common.predict(clip.to(accelerator.device), images, accelerator, args.workers)
    return pool, distances


CLASSIFIERS = {  # names in reports: what the classifier learns from, by the labels of the synthetic images
    "none": "standard augmentation",
    "seed": "seed labels",
    "amst": "AMST",
    "head": "one head's labels",
    "soft": "soft labels",
    "clip": "CLIP labels",
}


def label_report(targets, labelled, pool: Pool) -> dict[str, float]:
    """Share of the pool that is labelled; where the truth is known, how often pseudo-labels are right.

    label_accuracy: of the labels in use; seed_accuracy: of the seeds' labels of the same images.
    """
    report = {"labelled": labelled.float().mean().item()}
    if pool.truth is not None and labelled.any():
        report["label_accuracy"] = (targets.argmax(1) == pool.truth)[labelled].float().mean().item()
        seeded = labelled & (pool.seed_labels >= 0)
        report["seed_accuracy"] = (pool.seed_labels == pool.truth)[seeded].float().mean().item()
    return report


def train(
    args: Args, run: common.Run, accelerator, data: common.Data, pool: Pool | None, labels: str,
    files: tuple[str, str],
):  # fmt: skip
    """Trains a classifier on real images and, with a pool, towards synthetic_targets(labels) on its images.

    An epoch is one pass over the pool, or as many steps if there is none; each step takes batch_size real
    images and synthetic_ratio times as many of the pool. Targets are predicted anew before every epoch, from
    the weak (not augmented) views. files: of the checkpoint and the metrics. Returns the final scores, the
    log, and the pool's final targets with whether each is labelled.
    """
    torch.manual_seed(args.seed)
    heads = args.heads if labels == "amst" else 0
    classifier = common.build_classifier(
        args.classifier, data.class_names, args.image_size, args.pretrained, args.clip
    )
    net = MultiHead(classifier, heads).to(memory_format=torch.channels_last)  # faster convolutions
    optimizer = common.make_optimizer(args.optimizer, net, args.lr, args.weight_decay)
    model, optimizer = accelerator.prepare(net, optimizer)

    real_views, strong_view = make_views(args.image_size, args.augment, heads)
    real = data.train.subset(range(len(data.train)), real_views)
    many = max(1, round(args.batch_size * args.synthetic_ratio))
    count = len(pool.images) if pool else len(real) * args.variations + args.unlabelled
    steps = math.ceil(count / many)
    w_c = args.consistency_weight if labels == "amst" else 0.0
    if pool:
        drawn = common.Images(pool.images.sources, range(count), strong_view)  # labelled by their index
        plain = pool.images.subset(range(count), data.test.transform)
    else:
        targets = labelled = weak = torch.zeros(0, device=accelerator.device)

    parts = {"model": net, "optimizer": optimizer}
    progress = run.resume(files[0], {"epoch": 0, "log": [], "training": 0.0}, **parts)

    def targets_now():
        logits, _ = common.predict(model, plain, accelerator, args.workers)
        targets, labelled = synthetic_targets(
            labels, logits, pool.seed_labels, args.threshold, pool.clip_logits
        )
        return targets, labelled, logits[:, 0].softmax(1)

    start = progress["epoch"]
    bar = tqdm(
        range(start, args.epochs), CLASSIFIERS[labels], initial=start, total=args.epochs, disable=not run.main
    )
    for epoch in bar:
        clock = time.time()
        common.seed_everything(args.seed, epoch)
        line = {"epoch": epoch + 1, "images": len(real), "pool": count if pool else 0}
        samples = steps * args.batch_size
        batches = [common.make_loader(real, args.batch_size, accelerator, True, args.workers, samples)]
        if pool:
            targets, labelled, weak = targets_now()
            line |= label_report(targets, labelled, pool)
            targets, labelled, weak = (t.to(accelerator.device) for t in (targets, labelled, weak))
            batches.append(common.make_loader(drawn, many, accelerator, True, args.workers))
        model.train()
        total = 0.0
        for step, batch in enumerate(zip(*batches, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * common.cosine((epoch + step / steps) / args.epochs, args.warmup)
            x, y = batch[0]  # x [B, 1 + A, 3, H, W]
            u, index = batch[1] if pool else (x[:0, 0], y[:0])
            with accelerator.autocast():
                logits = model(torch.cat([x.transpose(0, 1).flatten(0, 1), u])).float()
                ours, theirs = logits[: len(logits) - len(u)], logits[len(logits) - len(u) :]
                ours = ours.unflatten(0, (1 + heads, -1))
                loss = self_training_loss(
                    ours, y, theirs, targets[index], labelled[index], weak[index], net.auxiliary_weights(),
                    args.auxiliary_weight, args.orthogonality_weight, w_c,
                )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            optimizer.step()
            total += loss.detach()
        line["loss"] = common.finite(total) / steps
        common.share_buffers(accelerator, model)
        progress["training"] += time.time() - clock
        if heads > 1:
            line["orthogonality"] = orthogonality_loss(net.auxiliary_weights()).item()
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            line["scores"] = common.evaluate(model, data, accelerator, args.workers)
            line |= {split: score["top1"] for split, score in line["scores"].items()}
        progress["log"].append(line)
        bar.set_postfix({k: f"{v:.3f}" for k, v in line.items() if isinstance(v, float)})
        progress["epoch"] = epoch + 1
        run.write_lines(files[1], progress["log"])
        run.checkpoint(files[0], progress, **parts)
    final = progress["log"][-1]["scores"] | {"training": progress["training"]}
    return final, progress["log"], targets_now()[:2] if pool else None


def save_labels(
    run, folder: Path, records: list[dict], targets, labelled, names: list[str], own: bool
) -> None:
    """Adds the final pseudo-labels to metadata.jsonl; draws the images whose label is not their seed's."""
    changed, captions = [], []
    for r, target, sure in zip(records, targets.argmax(1).tolist(), labelled.tolist(), strict=False):
        r["pseudo_label"] = target if sure else None
        if sure and target != r["label"]:
            changed.append(folder / r["file_name"])
            captions.append(f"{names[r['label']]} → {names[target]}")
    if own:
        run.write_lines("synthetic/metadata.jsonl", records)
    if changed:
        some = slice(None, None, math.ceil(len(changed) / 32))
        common.save_captioned(changed[some], captions[some], run.path / "samples" / "relabelled.png", 8)


def resolve(args: Args) -> Args:
    """Fills the fields left open from the data set's recipe. Raises UserError for what cannot be."""
    args = common.fill_recipe(args, RECIPES, "dreamda")
    common.check_choice("--labels", args.labels, [*CLASSIFIERS][1:])
    common.check_choice("--inversion", args.inversion, ["cycle", "ddim", "none"])
    common.check_at_least(1, args, "variations", "inversions")
    common.check_at_least(0, args, "unlabelled")
    if args.labels == "amst" and args.heads < 2:
        raise common.UserError(f"--heads {args.heads}: agreement needs at least 2")
    return args


def check(args: Args, data: common.Data) -> None:
    """Raises UserError for the mistakes that would otherwise show only after the images are generated."""
    available = len(data.unlabelled) if data.unlabelled else 0
    if available < args.unlabelled:
        raise common.UserError(f"--unlabelled {args.unlabelled}: {args.dataset} has {available}")
    for name in [args.classifier] + ["clip"] * (args.labels == "clip"):
        classifier = common.build_classifier(
            name, data.class_names, args.image_size, args.pretrained, args.clip
        )
        common.make_optimizer(args.optimizer, classifier, args.lr, args.weight_decay)


def run_once(args: Args, accelerator) -> dict:
    """One run in args.out, with its baselines; a finished run's result is read from its folder."""
    run = common.Run(args.out, args, accelerator, free=("seeds",))
    if result := run.result():
        return result
    data = common.data_of(args, unlabelled=args.unlabelled > 0)
    pool, records, about, kinds = None, [], {"generation": 0.0}, ["none"]
    if not args.real_only:
        check(args, data)
        folder = Path(args.synthetic or run.path) / "synthetic"
        if args.synthetic:
            records = common.read_records(folder, data.class_names)
        else:
            pipe = common.load_pipeline(args.diffusion, accelerator.device)
            records, about["generation"] = generate(args, run, accelerator, pipe, data)
            del pipe
        pool, about["distances"] = make_pool(args, run, accelerator, data, folder, records)
        kinds = list(dict.fromkeys([*(("none", "seed") if args.baseline else ()), args.labels]))
    result, logs = {}, {}
    for kind in kinds:
        main = kind == kinds[-1]
        files = ("checkpoint.pt", "metrics.jsonl") if main else (f"{kind}.pt", f"{kind}.jsonl")
        scores, logs[CLASSIFIERS[kind]], labels = train(
            args, run, accelerator, data, pool if kind != "none" else None, kind, files
        )
        result[CLASSIFIERS[kind]] = scores | {"synthetic": len(records)} | (about if main else {})
    if pool and run.main:
        save_labels(run, folder, records, *labels, data.class_names, own=not args.synthetic)
    return run.finish(result, logs)


# The paper's comparison: every rung adds one part, all with as many images and as many training steps.
LADDER = {
    "standard augmentation": dict(real_only=True),
    "+ img2img variations": dict(inversion="none", inversions=999, perturb="none", labels="seed"),
    "+ inversion, no perturbation": dict(inversions=999, perturb="none", labels="seed"),
    "+ latent noise": dict(perturb="latents", noise_scale=0.2, labels="seed"),
    "+ bottleneck noise": dict(labels="seed"),
    "+ AMST": dict(synthetic="+ bottleneck noise"),
}


def main(args: Args) -> None:
    common.run_method(resolve(args), LADDER, run_once)


if __name__ == "__main__":
    common.cli(main, Args)
