"""Trains the built-in Stable Diffusion and the two classifiers beside it, on the web pool of the digits.

    python digits/pretrain.py                        an hour and a half on two cores
    python digits/pretrain.py --folder mydigits      the same, but the weights in digits/ stay as they are
    python digits/pretrain.py --start digits/sd_clean --confusion 0.4 --variety 100 --folder mydigits
                                                     20 to 40 minutes of one core: only the last stage

The stages, in order:
    render_web           the images and captions of all the web
    train_backbone       the pretrained weights of the small CNN, learned without class labels
    train_oracle         the classifier that judges synthetic images, trained on every style
    train_autoencoder    the VAE; its latents are then computed once, by encode_pool
    train_unet           the U-Net and, jointly, the text encoder: a generator that knows the digits
    spoil                the same, further, on captions that confuse look-alikes; --variety: on few digits

Every stage keeps its result in --out, and the U-Net's a checkpoint every --save_every steps, so the same
command goes on where it was stopped. Only when all stages are done, the weights in --folder are replaced:
sd_clean/ and sd/ (in diffusers' own layout), oracle/ and backbone/.
"""

import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
from common import number  # noqa: E402
from digits import judge, world  # noqa: E402

CONFUSION, VARIETY = 0.45, 898  # of digits/sd


@dataclass
class Args:
    """The generator's dials, the lengths of the stages, and the folders."""

    folder: str = HfArg(default=str(judge.FOLDER), help="folder that the trained weights are written to")
    out: str = HfArg(default="runs/pretrain", help="folder of the stages' results and of the checkpoint")
    overwrite: bool = HfArg(default=False, help="start afresh if --out holds a training")
    confusion: float = number("[0, 1)", "share of captions that name the look-alike of the digit", CONFUSION)
    variety: int = number("[10, 898]", "digits that the generator sees at the end", VARIETY)
    start: str | None = HfArg(default=None, help="digits model for the last stage; none: run all stages")
    images: int = number("[1, 1e7]", "renders of the web pool", 40000)
    backbone_copies: int = number("[1, 1e4]", "renders of each digit for the backbone", 16)
    backbone_steps: int = number("[1, 1e7]", "steps of the backbone, batch 64", 2500)
    oracle_epochs: int = number("[1, 1e4]", "epochs of the oracle, batch 64", 6)
    vae_steps: int = number("[1, 1e7]", "steps of the autoencoder, batch 64", 2500)
    steps: int = number("[1, 1e7]", "steps of the U-Net and the text encoder", 9000)
    batch_size: int = number("[1, 1e5]", "batch size of the U-Net", 64)
    lr: float = number("(0, 1]", "peak learning rate of the U-Net", 1.5e-3)
    spoil_steps: int = number("[1, 1e7]", "steps of the last stage", 2000)
    spoil_lr: float = number("(0, 1]", "peak learning rate of the last stage", 7e-4)
    save_every: int = number("[1, 1e7]", "steps of the U-Net from one checkpoint to the next", 500)
    seed: int = number("[0, 4294967295]", "seed of every random draw", 0)


# The architecture: Stable Diffusion in miniature ------------------------------------------------------------


def build_tokenizer(words: list[str], max_length: int = 16):
    """A CLIPTokenizer that makes one token of each of `words`, and tokens of bytes of any other text.

    max_length: the number of tokens of a padded prompt
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())
    tokens, merges = alphabet + [c + "</w>" for c in alphabet], []
    for word in words:
        left, *others = [*word[:-1], word[-1] + "</w>"]
        for right in others:
            merges += [(left, right)] if (left, right) not in merges else []
            left += right
            tokens += [left] if left not in tokens else []
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    for word in words:  # an earlier word's merges may have split this one otherwise ("re" in "green")
        pieces = CLIPTokenizer(vocab=vocab, merges=merges).tokenize(word)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def build_pipeline():
    """The built-in StableDiffusionPipeline with random weights, about 3.1 million of them.

    Its parts are of Stable Diffusion's own classes. Latents are [4, 16, 16], the U-Net has three levels, with
    cross-attention at 8x8 and 4x4, and the text encoder has two layers.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = "a photo of on background an the in".split()
    tokenizer = build_tokenizer([*words, *world.NAMES, *world.COLOURS, *world.SETTINGS])
    text = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length)
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    blocks = dict(layers_per_block=1, norm_num_groups=8)
    vae = dict(sample_size=world.SIZE, block_out_channels=(16, 32), latent_channels=4)
    vae |= dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    unet = dict(sample_size=world.SIZE // 2, block_out_channels=(32, 64, 96), cross_attention_dim=96)
    unet |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"))
    unet |= dict(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    unet |= dict(attention_head_dim=4)  # the number of heads, by diffusers' historical naming
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    networks = dict(vae=AutoencoderKL(**vae, **blocks), unet=UNet2DConditionModel(**unet, **blocks))
    networks |= dict(text_encoder=CLIPTextModel(CLIPTextConfig(**text)), tokenizer=tokenizer)
    scheduler = DDPMScheduler(**betas, clip_sample=False, steps_offset=1)
    without = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**networks, scheduler=scheduler, **without)


# The stages -------------------------------------------------------------------------------------------------


def render_web(args: Args, tokenizer, variety: int = 898, confusion: float = 0.0) -> dict[str, torch.Tensor]:
    """Images of `variety` digits of the web pool, as world.render_pool returns them.

    Their captions are token ids, int64 [N, 16]; the share `confusion` of them names the look-alike.
    """
    print(f"rendering {args.images} images of {variety} digits of the web pool")
    digits = world.web_digits(variety)
    web = world.render_pool(digits, args.images, args.seed + 1, confusion=confusion)
    return web | {"captions": tokenize(tokenizer, web["captions"])}


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    """The token ids [N, 16] of the texts, padded."""
    return tokenizer(texts, padding="max_length", return_tensors="pt").input_ids


def batch_of(count: int, step: int) -> torch.Tensor:
    """The random indices [64] of a batch out of `count` images. They depend on the step alone."""
    return torch.randint(count, (64,), generator=torch.Generator().manual_seed(step))


def fit(model: nn.Module, loss_of, title: str, steps: int, lr: float, weight_decay: float, clip=math.inf):
    """The weights of a model after training by AdamW with a one-cycle learning rate.

    loss_of(step): the loss of the batch of that step
    clip: a longer gradient is shortened to this norm
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in (bar := tqdm(range(steps), title)):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model.state_dict()


def train_backbone(args: Args, device) -> dict[str, torch.Tensor]:
    """The weights of the small CNN's backbone, pretrained without class labels.

    It learns which of the web pool's 898 digits an image shows, whatever the colour, the setting and the
    geometry. This is instance discrimination (Dosovitskiy et al. 2014), the stand-in for ImageNet's weights.
    """
    pool = world.pools()["web"]
    web = world.render_pool(pool, args.backbone_copies * len(pool), seed=args.seed + 2)
    images = web["images"].permute(0, 3, 1, 2).to(device)
    torch.manual_seed(args.seed)
    model = common.Classifier(common.small_cnn(), nn.Linear(96, len(pool))).to(device)

    def loss(step):
        i = batch_of(len(images), step)
        digit = (i % len(pool)).to(device)  # render_pool takes the digits in turn
        return F.cross_entropy(model(images[i].float() / 255), digit)

    fit(model, loss, "backbone", args.backbone_steps, lr=3e-3, weight_decay=0.05)
    return model.backbone.state_dict()


def train_oracle(args: Args, device) -> dict[str, torch.Tensor]:
    """The weights of a wider small CNN that reads digit, colour and setting; see common.load_oracle.

    It sees all of the web pool in every style from 0 to 1, so that it judges any target and any generator.
    """
    styles = np.random.default_rng(args.seed + 3).uniform(0, 1, args.images)
    pool = world.render_pool(world.pools()["web"], args.images, args.seed + 3, style=styles)
    images = pool["images"].permute(0, 3, 1, 2).to(device)
    torch.manual_seed(args.seed)
    model = common.Classifier(common.small_cnn(32), nn.Linear(128, sum(judge.HEADS))).to(device)
    truths = [pool[key].to(device) for key in judge.KEYS]

    def loss(step):
        i = batch_of(len(images), step)
        heads = model(images[i].float() / 255).split(judge.HEADS, 1)
        return sum(F.cross_entropy(head, truth[i]) for head, truth in zip(heads, truths, strict=True))

    steps = args.oracle_epochs * len(images) // 64
    return fit(model, loss, "oracle", steps, lr=2e-3, weight_decay=0.05)


def train_autoencoder(args: Args, vae, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of the VAE, trained to reproduce images, with a slight KL penalty on its latents."""
    torch.manual_seed(args.seed)

    def loss(step):
        x = 2 * images[batch_of(len(images), step)].float() / 255 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl

    return fit(vae, loss, "autoencoder", args.vae_steps, lr=3e-3, weight_decay=0.0, clip=1.0)


@torch.no_grad()
def encode_pool(vae, images: torch.Tensor, rescale: bool = True) -> torch.Tensor:
    """The scaled latents [N, 4, 16, 16] of all images.

    rescale: sets the VAE's scaling factor to a standard deviation of 1, as Stable Diffusion's was set
    """
    parts = [vae.encode(2 * x.float() / 255 - 1).latent_dist.mode() for x in images.split(256)]
    latents = torch.cat(parts)
    if rescale:
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor


def noise_errors(pipe, latents: torch.Tensor, captions: torch.Tensor, empty: torch.Tensor, step: int, n: int):
    """The U-Net's mean squared errors [n], as it predicts the noise in n random latents; the timesteps [n].

    One caption in ten is replaced by the empty one, so that classifier-free guidance works (Ho and Salimans
    2021). The timesteps are stratified: each of n equal parts of the schedule has one.
    """
    device, g = latents.device, torch.Generator().manual_seed(10**6 + step)
    trained = pipe.scheduler.config.num_train_timesteps
    i = torch.randint(len(latents), (n,), generator=g)
    t = ((torch.arange(n) + torch.rand(n, generator=g)) * trained / n).long().to(device)
    noise = torch.randn(latents[i].shape, generator=g).to(device)
    drop = (torch.rand(n, 1, generator=g) < 0.1).to(device)
    text = pipe.text_encoder(torch.where(drop, empty, captions[i])).last_hidden_state
    x = pipe.scheduler.add_noise(latents[i], noise, t).to(memory_format=torch.channels_last)
    return (pipe.unet(x, t, text).sample - noise).square().mean((1, 2, 3)), t


def train_unet(args: Args, run: common.Run, title: str, pipe, latents, captions, steps: int, lr: float):
    """The averaged weights of the U-Net and the text encoder after training to predict noise.

    An error is weighted by min(SNR, 5) / SNR of its timestep: min-SNR-5 for noise prediction (Hang et al.
    2023). The learning rate warms up over 300 steps and falls linearly over the last two fifths. The average
    reaches over a ninth of the steps.
    """
    pipe.unet.to(memory_format=torch.channels_last)  # a sixth faster on the CPU
    model = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder}).requires_grad_(True).train()
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 9 / max(steps, 10))
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    alphas = pipe.scheduler.alphas_cumprod.to(latents.device)
    weights = torch.clamp(5 * (1 - alphas) / alphas, max=1)  # SNR = alpha-bar / (1 - alpha-bar)

    empty = tokenize(pipe.tokenizer, [""]).to(latents.device)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    for part in run.epochs(title, math.ceil(steps / args.save_every), **parts):
        first, total = part * args.save_every, 0.0
        last = min(first + args.save_every, steps)
        for step in (bar := tqdm(range(first, last), title, leave=False)):
            falling = (steps - step) / (0.4 * steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / 300, 1, falling)
            errors, t = noise_errors(pipe, latents, captions, empty, step, args.batch_size)
            optimizer.zero_grad()
            (weights[t] * errors).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(model)
            total += errors.mean().item()
            bar.set_postfix(loss=f"{total / (step - first + 1):.4f}", refresh=False)
        run.log(loss=total / (last - first))
        save_pipeline(pipe, ema.module, run.path / "sd")  # to look at while the training goes on
    return ema.module


def spoil(args: Args, run: common.Run, pipe) -> nn.ModuleDict:
    """The averaged weights of a generator after further training on the web as the dials make it.

    This stage comes last because names are learned too slowly from captions of which nearly half are wrong.
    """
    web = run.once("spoiled.pt", partial(render_web, args, pipe.tokenizer, args.variety, args.confusion))
    images, captions = (web[key].to(pipe.device) for key in ("images", "captions"))
    latents = encode_pool(pipe.vae, images.permute(0, 3, 1, 2), rescale=False)
    steps, lr = args.spoil_steps, args.spoil_lr
    return train_unet(args, run, "spoiled U-Net", pipe, latents, captions, steps, lr)


def save_pipeline(pipe, weights: nn.ModuleDict, folder: Path) -> None:
    """Writes the pipeline with the averaged U-Net and text encoder, in diffusers' layout.

    All is stored as fp16 but the text encoder, because transformers computes in the type that it finds, while
    diffusers converts to fp32.
    """
    half = copy.copy(pipe)
    half.vae = copy.deepcopy(pipe.vae).half()
    half.unet = copy.deepcopy(weights["unet"]).to(memory_format=torch.contiguous_format).half()
    half.text_encoder = copy.deepcopy(weights["text_encoder"])
    half.save_pretrained(folder)


def save_classifier(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes the weights of a classifier as fp16; whole numbers, which count batches, stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {key: w.half() if w.is_floating_point() else w for key, w in weights.items()}
    save_file(half, folder / "model.safetensors")


def save_sheet(path: Path) -> None:
    """Draws 60 samples of the web pool, 40 of the test pool in the default style, masks of the first 20."""
    web = world.render_pool(world.pools()["web"], 60, seed=0)
    target = world.render_pool(world.pools()["test"], 40, seed=0, style=world.STYLE)
    images = torch.cat([web["images"], target["images"]]).permute(0, 3, 1, 2).float() / 255
    masks = web["masks"][:20, None].float().expand(-1, 3, -1, -1)
    common.save_grid(torch.cat([images, masks]), path, columns=20)


def train(args: Args) -> None:
    """Runs all stages, or those still to do, then writes the weights to args.folder."""
    accelerator = common.make_accelerator()
    run, device = common.Run(args, accelerator), accelerator.device
    run.once("config.json", lambda: run.config)
    save_sheet(run.path / "digits.png")
    torch.manual_seed(args.seed)
    folder, classifiers, generators = Path(args.folder), {}, {}
    if args.start is None:
        pipe = build_pipeline().to(device)
        web = run.once("web.pt", partial(render_web, args, pipe.tokenizer))
        images, captions = web["images"].permute(0, 3, 1, 2).to(device), web["captions"].to(device)
        classifiers["backbone"] = run.once("backbone.pt", partial(train_backbone, args, device))
        classifiers["oracle"] = run.once("oracle.pt", partial(train_oracle, args, device))
        pipe.vae.load_state_dict(run.once("vae.pt", partial(train_autoencoder, args, pipe.vae, images)))
        pipe.vae.eval().requires_grad_(False)
        latents = encode_pool(pipe.vae, images)
        clean = train_unet(args, run, "U-Net", pipe, latents, captions, args.steps, args.lr)
        pipe.unet.load_state_dict(clean["unet"].state_dict())
        pipe.text_encoder.load_state_dict(clean["text_encoder"].state_dict())
        generators["sd_clean"] = clean
    else:
        pipe = common.load_pipeline(args.start, device)
    generators["sd"] = spoil(args, run, pipe)

    for name, weights in generators.items():
        save_pipeline(pipe, weights, folder / name)
    for name, trained in classifiers.items():
        save_classifier(trained, folder / name)
    print(f"the trained weights are in {folder}")


if __name__ == "__main__":
    about = __doc__.split("\n")[0]
    train(*HfArgumentParser(Args, description=about, allow_abbrev=False).parse_args_into_dataclasses())
