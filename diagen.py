"""DIAGen: semantically diverse image augmentation (Lingenberg et al., GCPR 2024, arXiv 2408.14584).

From a few real images of each class, Textual Inversion learns a token for the class. Stable Diffusion then
draws M variations of every real image with the token in the prompt. Noise on the learned embeddings, and
prompts that a language model writes for each class, make the variations diverse. A filter classifier gives
each variation a weight. The downstream classifier trains on the real images, which are replaced at random by
one of their variations, drawn by weight. Without noise, prompts and weights the method is DA-Fusion (Trabucco
et al., ICLR 2024, arXiv 2302.07944); without learned tokens, too, it is Real Guidance (He et al., ICLR 2023).

    python diagen.py                                        handwritten digits, a few minutes on a laptop
    python diagen.py --dataset folder --data_dir mydata --examples_per_class 4   your own images (GPU)
    python diagen.py --prompts llm --llm MODEL              prompts by any instruct model, kept as a CSV file
    python diagen.py --method da_fusion                     a baseline: da_fusion or real_guidance
    python diagen.py --ladder --seeds 5                     the paper's ablation, one rung after the other
    accelerate launch diagen.py --dataset coco              several GPUs

Paper to code:
    3.1 Textual Inversion                         textual_inversion, equation (1)
        noise on the embeddings, sigma            noisy_embeddings, equation (2)
    3.2 class-specific prompts                    write_prompt, ask_llm, parse_answer, read_prompts
        variations of the real images             img2img, equations (3) to (5)
    3.3 temperature of the filter classifier      fit_temperature, equation (6)
        confidence q                              confidences, equation (7)
        weight w(q)                               weights_of, equation (8)
        training on real and synthetic images     draw_epoch, train
"""

import csv
import dataclasses
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AddedToken
from transformers.hf_argparser import HfArg

import common
from common import number, require
from digits import inside, world


@dataclass
class Args(common.RunArgs):
    """DIAGen's own arguments. Where the default is None, the data set's recipe gives the value."""

    method: str = HfArg(
        default="diagen", help="diagen, or da_fusion or real_guidance at its settings, or *_published"
    )
    # Textual Inversion
    inversion_steps: int | None = number("[1, 1e6]", "training steps of Textual Inversion")
    inversion_batch_size: int | None = number("[1, 1000]", "images of each class in such a step")
    inversion_lr: float | None = number("(0, 1]", "learning rate of Textual Inversion")
    vectors: int = number("[1, 64]", "number of vectors that a token has", 1)
    initializer: str | None = HfArg(default=None, help="word the tokens start from; '': the class's own name")
    embeddings: str | None = HfArg(default=None, help="folder of a run whose learned tokens are used")
    # diversity
    sigmas: list[float] | None = number("[0, 100]", "standard deviations of the noise on the tokens")
    relative_sigma: bool | None = HfArg(default=None, help="sigma in units of a token's root mean square")
    prompts: str = HfArg(default="bank", help="bank (random words), llm, none, or the name of a CSV file")
    prompts_per_class: int = number("[1, 1000]", "number of prompts of a class, used in rotation", 10)
    uncommon: bool = HfArg(default=False, help="ask the language model for uncommon locations")
    llm: str = HfArg(default="meta-llama/Llama-3.1-8B-Instruct", help="instruct model for --prompts llm")
    # generation
    variations: int | None = number("[1, 10000]", "M, synthetic images of each real image")
    strength: list[float] | None = number(
        "(0, 1]", "t_0, share of the noise schedule; of several, one at random"
    )
    synthetic: str | None = HfArg(default=None, help="folder of a run whose synthetic images are used")
    # weighting and training
    weighting: bool = HfArg(default=True, help="weigh the synthetic images by a filter classifier")
    synthetic_probability: float = number("[0, 1]", "chance that a variation replaces a real image", 0.7)
    iterations: int | None = number("[1, 1e6]", "training steps in an epoch")
    frozen: bool | None = HfArg(default=None, help="train only the classifier's last linear layer")
    filter_epochs: int = number("[1, 1e6]", "largest number of epochs of the filter classifier", 50)


PHOTO = "a photo of a {}"
SD14 = dict(
    # Stable Diffusion 1.4
    diffusion="CompVis/stable-diffusion-v1-4",
    prompt=PHOTO,
    steps=50,
    guidance_scale=15.0,
    generation_batch_size=8,
    variations=10,
    strength=[0.7],
    # Textual Inversion
    inversion_steps=1000,
    inversion_batch_size=4,
    inversion_lr=2e-3,  # 5e-4 for each image of the batch
    initializer="the",  # as in both released codes
    # noise on the embeddings
    sigmas=[0.0, 0.005, 0.01, 0.025],
    relative_sigma=False,
    # classifier; its learning rate is constant
    examples_per_class=4,
    classifier="resnet50",
    pretrained=True,
    frozen=True,
    image_size=256,
    augment="squeezed",  # on FOCUS: zoomed
    epochs=50,
    iterations=200,
    batch_size=32,
    optimizer="adam",
    lr=1e-4,
    head_lr=1.0,
    weight_decay=0.0,
    warmup=0.0,
    label_smoothing=0.0,
    eval_every=1,
    workers=8,
)
RECIPES = {name: SD14 for name in common.DATASETS} | {
    "digits": SD14
    | dict(
        # the embedded generator
        diffusion=common.DIGITS_SD,
        steps=15,
        guidance_scale=7.5,
        generation_batch_size=40,
        # choice: small latents settle later than those of 64x64, which have 0.7 (digits/experiments/tune.py)
        strength=[0.5],
        examples_per_class=8,
        variations=5,
        # Textual Inversion
        inversion_steps=100,
        inversion_lr=0.02,
        # choice: the generator knows the digits' names, but the learner is not told them: the method is for
        # classes that have to be learned from images. (Real Guidance is told them, by its prompts.)
        initializer="background",
        # choice: the embedded text encoder has another scale. These are the paper's 0.005, 0.01 and 0.025 in
        # units of the root mean square of Stable Diffusion 1.4's embeddings.
        sigmas=[0.0, 0.33, 0.67, 1.67],
        relative_sigma=True,
        # choice: all of the classifier learns. Its backbone was pretrained to ignore what DIAGen varies: the
        # colour, the setting and the geometry of a digit (digits/pretrain.py).
        frozen=False,
        classifier="small_cnn",
        image_size=32,
        augment="digits",
        epochs=20,
        iterations=30,
        batch_size=16,  # choice: with so few images the noise of small batches helps all methods
        lr=1e-3,
        workers=0,
    ),
}

# ----------------------------------------------------------------------------------------------------------
# Section 3.1: Textual Inversion (Gal et al. 2023), and noise on the learned embeddings

TEMPLATES = [PHOTO] + (
    "a photo of one {}, a photo of the {}, a picture of a {}, a picture of the {}, a rendering of a {}, "
    "a rendering of the {}, a drawing of the {}, a depiction of a {}, a snapshot of the {}, "
    "a cropped photo of a {}, a cropped photo of the {}, a close-up of a {}, a close-up photo of the {}, "
    "a bright photo of a {}, a bright photo of the {}, a dark photo of a {}, a dark photo of the {}, "
    "a good photo of a {}, a good photo of the {}, a sharp photo of the {}, a blurred photo of a {}, "
    "a photo of a clean {}, a photo of a dirty {}, a photo of a small {}, a photo of a large {}, "
    "a photo of my {}"
).split(", ")


class NewTokens:
    """Gives tokens the embeddings `rows` [T, d] or [T, N, d], which can be trained; a context manager.

    The N vectors of a token <x> are tokens, too: <x>, <x>_1 and so on. These names are diffusers', whose
    encode_prompt writes all of them in the place of <x>.

    Tokens that the tokenizer lacks are added to it and to the text encoder's embedding table. Inside the
    context a forward hook on the table looks the tokens up in `rows`, so no other embedding can change. On
    leaving, the table itself holds the values of `rows`.
    """

    def __init__(self, pipe, tokens: list[str], rows: torch.Tensor):
        self.rows, vectors = rows, rows[0].numel() // rows.shape[-1]
        tokens = [token + (f"_{i}" if i else "") for token in tokens for i in range(vectors)]
        # choice: the tokenizer finds a token as a whole or not at all, never a part of another class's token
        pipe.tokenizer.add_tokens([AddedToken(t, normalized=False) for t in tokens])
        encoder = pipe.text_encoder
        if len(pipe.tokenizer) > encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
            encoder.requires_grad_(False)
        self.table = encoder.get_input_embeddings()
        self.ids = torch.tensor(pipe.tokenizer.convert_tokens_to_ids(tokens), device=pipe.device)
        self.index = torch.full((self.table.num_embeddings,), -1, device=pipe.device)
        self.index[self.ids] = torch.arange(len(tokens), device=pipe.device)

    def __enter__(self):
        def look_up(module, inputs, output):
            row = self.index[inputs[0]]
            rows = self.rows.flatten(0, -2)[row]
            return torch.where(row[..., None] < 0, output, rows.to(output.dtype))

        self.handle = self.table.register_forward_hook(look_up)
        return self

    def __exit__(self, *_):
        self.handle.remove()
        self.table.weight.data[self.ids] = self.rows.detach().flatten(0, -2).to(self.table.weight.dtype)


def initial_embeddings(pipe, class_names: list[str], initializer: str = "") -> torch.Tensor:
    """[K, d]: the mean embedding of the words of `initializer`, or of each class's name if it is empty.

    Raises UserError if the tokenizer finds nothing in the words.
    """
    table, rows = pipe.text_encoder.get_input_embeddings().weight.detach().float(), []
    for name in class_names:
        ids = pipe.tokenizer(initializer or name, add_special_tokens=False).input_ids
        require(ids, f"the tokenizer has no token for '{initializer or name}'; give another --initializer")
        rows.append(table[ids].mean(0))
    return torch.stack(rows)


def draw_examples(latents, token: str, templates: list[str], timesteps: int, batch_size: int, generator):
    """Draws one token's part of a batch: latents z [B, C, h, w], timesteps t [B], noise like z, and prompts.

    latents: [V, n, C, h, w] of V views (plain, mirrored) of the token's n images
    """
    i = torch.randint(latents.shape[1], (batch_size,), generator=generator)
    view = torch.randint(len(latents), (batch_size,), generator=generator)
    z = latents[view, i]
    t = torch.randint(timesteps, (batch_size,), generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    template = torch.randint(len(templates), (batch_size,), generator=generator)
    return z, t, noise, [common.fill_prompt(templates[k], token) for k in template]


def textual_inversion(
    pipe,
    images: torch.Tensor,
    labels: torch.Tensor,
    tokens: list[str],
    start: torch.Tensor,
    *,
    steps: int = 1000,
    batch_size: int = 4,
    lr: float = 2e-3,
    templates: list[str] = TEMPLATES,
    flip: bool = True,
    seed: int = 0,
    keys: list[int] | None = None,
    on_step: Callable | None = None,
) -> torch.Tensor:
    """Learns the embeddings S* of T tokens from a few images of each: float32, in the shape of `start`.

        (1)  S* = argmin_S E || eps - eps_theta(x_t, t, c(S)) ||^2      c(S): encoded template with the token

    images: [N, 3, H, W] in [0, 1]; labels: [N] indices into `tokens`
    start: [T, d], or [T, N, d] for N vectors per token
    batch_size: images of each token in a step; flip: mirror an image with probability 1/2
    keys: [T] integers that seed the tokens' draws beside `seed`; by default 0 to T - 1
    on_step: called after each step as on_step(step, t, values), with the timesteps t [T B] of its images and
        a dict of S, the embeddings [T, d], and loss, the sum over the tokens

    The loss is a sum over the tokens, and Adam treats every number by itself. Therefore a token learns the
    same, up to rounding, whichever others train beside it. Raises UserError if the training diverges.
    """
    device, scheduler, T = pipe.device, pipe.scheduler, len(tokens)
    timesteps, dtype, keys = scheduler.config.num_train_timesteps, pipe.unet.dtype, keys or range(T)
    with torch.no_grad():
        views = [common.encode(pipe, x).float() for x in ((images, images.flip(-1)) if flip else (images,))]
    # on the CPU, because a copy to a GPU makes the host wait: the examples of all tokens go there as one
    latents = [torch.stack(views)[:, labels == c].cpu() for c in range(T)]
    rows = nn.Parameter(start.clone().to(device))
    optimizer = torch.optim.AdamW([rows], lr, weight_decay=0.0)
    with NewTokens(pipe, tokens, rows):
        for step in (bar := tqdm(range(steps), "textual inversion", leave=False)):
            examples = []
            for c in range(T):
                g = common.generator(seed, keys[c], step)
                examples.append(draw_examples(latents[c], tokens[c], templates, timesteps, batch_size, g))
            *tensors, prompts = zip(*examples, strict=True)
            z, t, noise = (torch.cat(parts).to(device) for parts in tensors)
            text, _ = pipe.encode_prompt(sum(prompts, []), device, 1, False)
            x_t = scheduler.add_noise(z, noise, t)
            output = pipe.unet(x_t.to(dtype), t, text.to(dtype)).sample.float()
            v_prediction = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(z, noise, t) if v_prediction else noise
            loss = (output - target).square().mean((1, 2, 3)).view(T, -1).mean(1).sum()  # (1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if on_step is not None:
                on_step(step, t, {"S": rows.detach().clone(), "loss": loss.detach()})
            if (step + 1) % 10 == 0 or step + 1 == steps:  # reading a value makes a GPU wait
                bar.set_postfix(loss=f"{loss.item() / T:.4f}", refresh=False)
                require(rows.isfinite().all(), "Textual Inversion diverged; lower --inversion_lr")
    return rows.detach()


def noisy_embeddings(
    rows: torch.Tensor, sigmas: list[float], generators: list[torch.Generator], relative: bool = False
) -> torch.Tensor:
    """Adds noise of V standard deviations to each class's embedding: rows [K, (N,) d] -> [K, V, (N,) d].

        (2)  S_v = S* + sigma_v n      n ~ N(0, I)

    generators: one CPU generator per class
    relative: sigma is in units of the root mean square of S*, which carries over between text encoders; of
    several vectors each has its own
    """
    # choice: the paper's token is one vector; of several each gets noise of the same standard deviation
    noise = torch.stack([torch.randn(len(sigmas), *rows.shape[1:], generator=g) for g in generators])
    sigma = torch.tensor(sigmas).view(1, -1, *[1] * (rows.ndim - 1)).to(rows)
    if relative:
        sigma = sigma * rows.square().mean(-1, keepdim=True).sqrt()[:, None]
    return rows[:, None] + sigma * noise.to(rows)  # (2)


# ----------------------------------------------------------------------------------------------------------
# Section 3.2: prompts "a photo of a [adjective] {name} [weather] [location] [time of day]" for each class

# choice: by default the prompts are random words in the paper's form, which needs no language model
LOCATIONS = (
    "on a beach, in a forest, in a city street, in a kitchen, on a mountain, in a garden, in a desert, "
    "on a table, beside a lake, in front of a brick wall, in an office, on a roof"
)
WORDS = {
    "adjective": "small large old new shiny dusty colourful dark bright wet weathered striped".split(),
    "weather": ["in the rain", "in the snow", "in thick fog", "in bright sunshine", "under a cloudy sky"],
    "location": LOCATIONS.split(", "),
    "time": ["at night", "at dawn", "in the early morning", "at noon", "at sunset"],
}
DIGIT_WORDS = {
    "adjective": list(world.COLOURS),
    "location": [f"on a {setting} background" for setting in world.SETTINGS],
}


def write_prompt(name: str, rng: np.random.Generator, words: dict[str, list[str]] = WORDS) -> str:
    """A random prompt of the paper's form. Each optional part is in it with probability 1/2."""
    parts = {part: str(rng.choice(options)) for part, options in words.items() if rng.random() < 0.5}
    adjective = parts.pop("adjective", None)
    return " ".join(["a photo of a", *([adjective] if adjective else []), name, *parts.values()])


def names_in(prompt: str, name: str) -> list[re.Match]:
    """The places where a class name stands in a prompt as a whole word: "car" is not in "carrot".

    Upper and lower case do not matter, unless the name is there exactly as it is written: then only those
    places count, so that the class "A" is once in "a photo of A".
    """
    pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
    return [*re.finditer(pattern, prompt)] or [*re.finditer(pattern, prompt, re.IGNORECASE)]


def with_token(prompt: str, name: str, token: str) -> str:
    """The prompt with the token in the place of the class name (of the last one, if there are several)."""
    place = names_in(prompt, name)[-1]
    return prompt[: place.start()] + token + prompt[place.end() :]


REQUEST = (
    "Write {count} prompts for a text-to-image model, each of the form\n"
    "a photo of a [adjective] {name} [location and/or weather preposition] [weather] [location] "
    "[time of day with preposition]\n"
    "Everything in brackets is optional; vary how many of these parts you use. Adjectives must be visible in "
    'a photo. {place}Every prompt contains "{name}" exactly once. One prompt a line, nothing else.'
)
COMMON_PLACE = "Choose locations where one would see it. "
UNCOMMON_PLACE = "Choose locations where one would not expect it. "


def parse_answer(answer: str, name: str, count: int) -> list[str]:
    """Reads `count` prompts from a language model's answer.

    A prompt begins with "a photo of" and ends with the line, a double quote or an opening bracket. It counts
    if it contains the class name exactly once. "a photo of a {name}" stands in for missing prompts.
    """
    prompts, begin = [], r"\ba photo of "
    for line in re.findall(rf'{begin}(?:(?!{begin})[^"\u201d\r\n\[])*', answer, re.IGNORECASE):
        line = line.rstrip(" .,;'`*\\]")
        if len(names_in(line, name)) == 1 and line not in prompts:
            prompts.append(line)
    return (prompts + [common.fill_prompt(PHOTO, name)] * count)[:count]


def chat_tokenizer(model: str):
    """The tokenizer of an instruct model. Raises UserError if it cannot be loaded or has no chat template."""
    from transformers import AutoTokenizer

    tokenizer = common.from_pretrained(AutoTokenizer, model)
    require(tokenizer.chat_template, f"--llm {model} has no chat template; give an instruct model")
    return tokenizer


def ask_llm(model: str, class_names: list[str], count: int, uncommon: bool = False) -> dict[str, list[str]]:
    """Asks an instruct model for `count` prompts of each class. Raises UserError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM, TextGenerationPipeline

    tokenizer = chat_tokenizer(model)
    llm = common.from_pretrained(AutoModelForCausalLM, model, dtype="auto")
    chat = TextGenerationPipeline(llm.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
    options = dict(max_new_tokens=40 * count, do_sample=False, return_full_text=False)
    place, prompts = UNCOMMON_PLACE if uncommon else COMMON_PLACE, {}
    for name in tqdm(class_names, "asking for prompts"):
        request = REQUEST.format(count=count, name=name, place=place)
        answer = chat([{"role": "user", "content": request}], **options)[0]["generated_text"]
        prompts[name] = parse_answer(answer, name, count)
    return prompts


def write_prompts(args: Args, class_names: list[str]) -> str:
    """Prompts by the language model, or of random words, as the text of a CSV file; see read_prompts."""
    count = args.prompts_per_class
    if args.prompts == "llm":
        prompts = ask_llm(args.llm, class_names, count, args.uncommon)
    else:
        words, rng = DIGIT_WORDS if args.dataset == "digits" else WORDS, np.random.default_rng(args.seed)
        prompts = {name: [write_prompt(name, rng, words) for _ in range(count)] for name in class_names}
    writer = csv.writer(file := io.StringIO(), delimiter=";", lineterminator="\n")
    writer.writerow(["class_name", "class_idx", "prompt"])
    for name, lines in prompts.items():
        lines = [p for p in lines if len(names_in(p, name)) == 1]  # a random word may be the class's name
        writer.writerows([name, class_names.index(name), p] for p in lines)
    return file.getvalue()


def read_prompts(path: Path, class_names: list[str], pipe=None, vectors: int = 0) -> dict[str, list[str]]:
    """The prompts of each class from a CSV file class_name;class_idx;prompt, in the format of the authors.

    {name} or {} in a prompt stands for the class name. The second column has no effect: in the authors' files
    it counts the prompts of a class, and in those of write_prompts it is the index of the class. A class
    without prompts gets "a photo of a {name}".

    pipe, vectors: if given, common.check_prompt checks each prompt's length

    Raises UserError, which names the line, if a line has other columns, an unknown class, or a prompt that
    does not contain the class name exactly once.
    """
    prompts = {name: [] for name in class_names}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise common.UserError(f"cannot read the prompts {path}: {error}") from None
    reader = csv.reader(text.splitlines(), delimiter=";")
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        if not row or (reader.line_num == 1 and row[0] == "class_name"):
            continue
        require(len(row) == 3, f"{place}: {len(row)} columns instead of class_name;class_idx;prompt")
        name, _, prompt = (field.strip() for field in row)
        require(name in prompts, f"{place}: the data set has no class '{name}'")
        prompt = common.fill_prompt(prompt.replace("{name}", "{}"), name)
        # choice: the name is looked for as a whole word, as the token is that takes its place
        once = len(names_in(prompt, name)) == 1
        require(once, f"{place}: the prompt must contain '{name}' exactly once, or {{name}} in its place")
        if pipe:
            common.check_prompt(pipe, with_token(prompt, name, "{}"), [name], place, vectors)
        prompts[name].append(prompt)
    require(any(prompts.values()), f"{path} has no prompts")
    return {name: lines or [common.fill_prompt(PHOTO, name)] for name, lines in prompts.items()}


# ----------------------------------------------------------------------------------------------------------
# Section 3.2: variations of the real images by SDEdit (Meng et al. 2022), also known as img2img


@torch.no_grad()
def img2img(
    pipe,
    latents: torch.Tensor,
    prompts: list[str],
    generators: list[torch.Generator],
    *,
    steps: int = 50,
    strength: float = 0.7,
    guidance_scale: float = 15.0,
    on_step: Callable | None = None,
) -> torch.Tensor:
    """Draws variations [B, 3, H, W] in [0, 1] of images: noise up to t_0, then DDIM back to 0 with a prompt.

        (3)  x_{t_0}  = sqrt(alpha_{t_0}) z + sqrt(1 - alpha_{t_0}) xi        alpha: alphas_cumprod
        (4)  eps^     = eps(x_t, "") + s (eps(x_t, c) - eps(x_t, ""))         classifier-free guidance
        (5)  x_{t-1}  = sqrt(alpha_{t-1}) x^_0 + sqrt(1 - alpha_{t-1}) eps^   x^_0: from x_t and eps^

    latents: z [B, C, h, w], scaled; prompts and CPU generators: one per image
    eps: the U-Net's output, which is v for a v-prediction U-Net; c: the encoded prompt
    strength: t_0, as a share of the noise schedule
    guidance_scale: s; up to 1 there is no guidance, only the prompt, as in diffusers
    on_step: called after step i as on_step(i, t, values), with a dict of x, which is x_{t-1}, and x0 (5)

    In fp32 the images are bit-equal to those of diffusers' StableDiffusionImg2ImgPipeline with common.ddim's
    scheduler; in half precision the steps stay in fp32, which is closer to fp32's images than diffusers is.
    Raises UserError if no step is left.
    """
    from diffusers.utils.torch_utils import randn_tensor

    scheduler, timesteps = common.ddim(pipe, steps, strength)
    guided = guidance_scale > 1
    c, empty = pipe.encode_prompt(prompts, pipe.device, 1, guided)
    text = torch.cat([empty, c]) if guided else c
    z = latents.to(pipe.device, torch.float32)
    xi = randn_tensor(z.shape, generators, pipe.device)
    x = scheduler.add_noise(z, xi, timesteps[:1])  # (3)
    for i, t in enumerate(timesteps):
        rows = torch.cat([x, x]) if guided else x
        output = pipe.unet(rows.to(c.dtype), t, text).sample.float()
        if guided:
            output_empty, output_c = output.chunk(2)
            output = output_empty + guidance_scale * (output_c - output_empty)  # (4)
        step = scheduler.step(output, t, x)
        x = step.prev_sample  # (5)
        if on_step is not None:
            on_step(i, t, {"x": x, "x0": step.pred_original_sample})
    return common.decode(pipe, x)


# ----------------------------------------------------------------------------------------------------------
# Section 3.3: the filter classifier, its temperature, the weights of synthetic images, and draws by weight


class Probe(nn.Module):
    """A classifier of which only the last linear layer learns. Its batch norm does not move either."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.backbone, self.head = common.split_head(classifier)
        self.backbone.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x):
        return self.head(self.backbone(x))


def new_classifier(args: Args, accelerator, class_names: list[str]):
    """See common.new_classifier, for the downstream task and for the filter; frozen, only its head learns."""
    options = {"wrap": Probe} if args.frozen else {}
    return common.new_classifier(args, accelerator, class_names, **options)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that calibrates a classifier on logits [N, K] and labels [N] (Guo et al. 2017).

        (6)  T = argmin_T NLL(softmax(logits / T), labels)      by LBFGS on log T, so that T > 0

    T is 1 if LBFGS does not lower the loss.
    """
    log_t, logits = torch.zeros((), requires_grad=True), logits.detach()
    optimizer = torch.optim.LBFGS([log_t], lr=0.1, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_t.exp(), labels)  # (6)
        loss.backward()
        return loss

    optimizer.step(closure)
    T = log_t.detach().exp()
    lower = F.cross_entropy(logits / T, labels) <= F.cross_entropy(logits, labels)
    return float(T) if lower else 1.0


def train_filter(args: Args, accelerator, data: common.Data) -> nn.Module:
    """Trains the filter classifier on the real images with RandAugment; returns it at its best epoch.

    The best epoch is the one with the lowest loss on the validation split.
    """
    adam = dataclasses.replace(args, optimizer="adam", weight_decay=1e-2)
    (net, model, optimizer), best = new_classifier(adam, accelerator, data.class_names), common.Best()
    augment = args.augment.removesuffix("+randaugment") + "+randaugment"
    real = data.train.transformed(common.make_transforms(args.image_size, augment)[0])
    quiet, count = not accelerator.is_main_process, args.iterations * args.batch_size
    loader = common.Loader(real, args.batch_size, accelerator, args.workers, count)
    for epoch in tqdm(range(args.filter_epochs), "filter classifier", leave=False, disable=quiet):
        common.seed_everything(accelerator, args.seed, 10**6 + epoch)
        rng = np.random.default_rng([args.seed, 10**6 + epoch])
        loader.draw(draw_epoch(real.labels, 1, None, count, 0.0, rng), args.seed, 10**6 + epoch)
        common.train_epoch(model, loader, optimizer, lambda _: args.lr, accelerator)
        logits, labels = common.predict(model, data.val, accelerator, args.workers)
        best.update(epoch, -F.cross_entropy(logits, labels).item(), net)
        if epoch - best.epoch >= 6:  # as released
            break
    net.load_state_dict(best.weights)
    return model


def confidences(
    args: Args, accelerator, model: nn.Module, temperature: float, images: common.Images, views: int = 5
) -> torch.Tensor:
    """The confidence q [N] of the filter classifier `model` in each image's own label y.

        (7)  q = mean_v softmax(f(x_v) / T)_y

    x_v: randomly augmented views of the image, five in the paper; f: the classifier's logits; T: temperature
    """
    augment = args.augment.removesuffix("+randaugment")
    viewed, labels = images.transformed(common.make_transforms(args.image_size, augment)[0]), images.labels
    options = [dict(workers=args.workers, seed=(args.seed, 2 * 10**6 + v)) for v in range(views)]
    logits = [common.predict(model, viewed, accelerator, **o)[0] for o in options]
    return (torch.stack(logits) / temperature).softmax(2).mean(0)[torch.arange(len(labels)), labels]  # (7)


def weights_of(confidence: torch.Tensor) -> torch.Tensor:
    """The weights [N, M] of the M variations of N real images, from the filter's confidences q [N, M].

        (8)  w(q) = min(1, 2 q)

    They are normalised over the M variations of a real image.
    """
    w = (2 * confidence).clamp(max=1)  # (8)
    # choice: if all M confidences are 0, the weights are equal
    w = torch.where(w.sum(1, keepdim=True) > 0, w, torch.ones_like(w))
    return w / w.sum(1, keepdim=True)


def draw_epoch(
    labels, variations: int, weights: np.ndarray | None, count: int, probability: float, rng
) -> np.ndarray:
    """The `count` draws of an epoch: indices into N real images followed by their N M synthetic images.

    All classes are equally probable. With `probability` a drawn real image is replaced by one of its M
    variations, which is drawn by `weights` [N, M]. If these are None, no real image is replaced.
    """
    members = common.by_class(labels)
    sizes = np.array([len(m) for m in members])
    c = rng.integers(len(members), size=count)  # a class, then one of its images
    drawn = np.concatenate(members)[(sizes.cumsum() - sizes)[c] + rng.integers(sizes[c])]
    if weights is None:
        return drawn
    # a variation m by its weight: as many of the cumulated weights are below a uniform random number
    m = (weights.cumsum(1)[drawn, :-1] <= rng.random((count, 1))).sum(1)
    return np.where(rng.random(count) < probability, len(labels) + drawn * variations + m, drawn)


# ----------------------------------------------------------------------------------------------------------
# The run


def load_few(args: Args, main: bool) -> common.Data:
    """The data set with few training images of each class, and with a validation split.

    Where the data set has none, the validation images are drawn from those that the few-shot draw left, as
    many again. Where it left none of a class, a quarter of the few images is held out, at least one per
    class. Raises UserError if a class has too few images for that.
    """
    data = common.data_of(args)
    if data.val is not None:
        return data
    classes, left = len(data.class_names), data.unlabelled
    if args.examples_per_class and left and len(set(left.labels) - {-1}) == classes:
        # choice: as many again, because a user with a few labels has no large labelled validation split
        held = common.draw_per_class(left.labels, args.examples_per_class, args.seed)
        data.val = left.subset(held, data.test.transform)
        source = "that the few-shot draw left"
    else:
        others, held = common.split_per_class(data.train.labels, 0.25, args.seed, at_least=1)
        data.val = data.train.subset(held, data.test.transform)
        data.train = data.train.subset(others)
        enough = len(set(data.train.labels)) == classes
        require(enough, "too few images to hold some out for validation; give val/ or more images per class")
        source = "held out of the few training images"
    if main:
        print(f"no validation split: {len(held)} images {source} choose the best epoch")
    return data


def embedding_files(folder: Path, class_names: list[str]) -> list[Path]:
    """The file of each class's embedding in a run folder; the format is that of load_textual_inversion."""
    folders = common.class_folders(class_names)
    return [folder / "embeddings" / name / "learned_embeds.safetensors" for name in folders]


def save_embedding(row: torch.Tensor, token: str, file: Path) -> None:
    """Writes a token's embedding [d] or [N, d], whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({token: row}, temporary := file.with_suffix(".tmp"))
    temporary.replace(file)


def load_embedding(file: Path, width: int, vectors: int = 1) -> torch.Tensor:
    """Reads a token's embedding, [width] or [vectors, width]. Raises UserError if the file holds another."""
    try:
        (row,) = load_file(file).values()
        row = row.float().reshape(-1, width)
    except Exception as error:
        raise common.UserError(f"cannot read the embedding {file} ({error}); delete it") from None
    require(len(row) == vectors, f"the token in {file} has {len(row)} vectors; give --vectors {len(row)}")
    return row.squeeze(0)


def read_embeddings(folder: Path, class_names: list[str], pipe, vectors: int = 1) -> torch.Tensor:
    """The learned embeddings [K, (N,) d] of a run folder's classes. Raises UserError if it lacks one."""
    files, width = embedding_files(folder, class_names), pipe.text_encoder.config.hidden_size
    for file in files:
        require(file.exists(), f"--embeddings {folder} must have the tokens of all classes, but lacks {file}")
    return torch.stack([load_embedding(file, width, vectors) for file in files])


def inversion_options(args: Args) -> dict:
    """How `textual_inversion` is called."""
    options = dict(steps=args.inversion_steps, batch_size=args.inversion_batch_size, lr=args.inversion_lr)
    options |= dict(flip=args.augment != "digits", seed=args.seed)  # digits are not mirrored
    if args.dataset == "digits":
        options |= dict(templates=[args.prompt])  # the only template that the embedded generator has learned
    return options


def learn_tokens(args: Args, run: common.Run, pipe, data: common.Data) -> torch.Tensor:
    """The embeddings [K, (N,) d] of all classes, by Textual Inversion or from the run in --embeddings.

    Classes learn in groups that fill a batch, split over the processes; see Run.missing. A group that was
    interrupted starts again.
    """
    if args.embeddings:
        return read_embeddings(Path(args.embeddings), data.class_names, pipe, args.vectors)
    files = embedding_files(run.path, data.class_names)
    tokens = [f"<{folder}>" for folder in common.class_folders(data.class_names)]
    real = data.train.transformed(common.make_transforms(common.resolution(pipe), "none", args.square)[1])
    start = initial_embeddings(pipe, data.class_names, args.initializer)
    options, start = inversion_options(args), start[:, None].repeat(1, args.vectors, 1).squeeze(1)
    group_size = max(1, args.generation_batch_size // args.inversion_batch_size)
    for group in run.missing("learning tokens", files, group_size):
        members = [i for i, y in enumerate(real.labels) if y in group]
        images = torch.stack([real[i][0] for i in members])
        labels = torch.tensor([group.index(real.labels[i]) for i in members])
        names = [tokens[c] for c in group]
        learning = inside.Learning(start[group], args.inversion_steps)  # for samples/inside.png
        hooked = options | dict(keys=group, on_step=learning)
        rows = textual_inversion(pipe, images, labels, names, start[group], **hooked)
        learning.keep(group, data, run.path)
        for c, row in zip(group, rows.cpu(), strict=True):
            save_embedding(row, tokens[c], files[c])
    return read_embeddings(run.path, data.class_names, pipe, args.vectors)


def find_prompts(args: Args, run: common.Run, class_names: list[str], pipe=None) -> dict[str, list[str]]:
    """The prompts of each class, with its name in them. Those of bank and llm are kept in prompts.csv."""
    if args.prompts == "none":
        return {name: [common.fill_prompt(args.prompt, name)] for name in class_names}
    path, vectors = Path(args.prompts), args.vectors if learns_tokens(args) else 0
    if args.prompts in ("bank", "llm"):
        run.once("prompts.csv", write_prompts, args, class_names)
        path = run.path / "prompts.csv"
    return read_prompts(path, class_names, pipe, vectors)


def plan_variations(args: Args, data: common.Data, prompts: dict[str, list[str]]) -> list[dict]:
    """The metadata of the M variations of every real image, one real image after the other.

    The variations of a class take its prompts in rotation, and also its noisy tokens. In Real Guidance the
    class name stays in the prompt.
    """
    folders, records = common.class_folders(data.class_names), []
    count = [0] * len(folders)  # variations of each class so far
    for i, y in enumerate(data.train.labels):
        name, lines = data.class_names[y], prompts[data.class_names[y]]
        for m in range(args.variations):
            prompt, v = lines[count[y] % len(lines)], count[y] % len(args.sigmas)
            count[y] += 1
            if learns_tokens(args):
                prompt = with_token(prompt, name, f"<{folders[y]}|{v}>")
            record = {"file_name": f"{folders[y]}/{i:06d}-{m:02d}.png", "label": y, "class_name": name}
            record |= {"guide": data.train.name(i), "guide_index": i, "prompt": prompt}
            strength = float(np.random.default_rng([args.seed, i, m]).choice(args.strength))
            records.append(record | {"strength": strength, "seed": [args.seed, i, m]})
    return records


def draw_variations(args: Args, run, pipe, data: common.Data, records: list[dict], folder: Path) -> None:
    """Draws the images of the records, a batch at a time, split over the processes; see Run.missing."""
    real = data.train.transformed(common.make_transforms(common.resolution(pipe), "none", args.square)[1])

    @lru_cache(args.generation_batch_size)
    @torch.no_grad()
    def latents(i: int) -> torch.Tensor:  # encoded alone: the bits do not depend on the rest of the batch
        return common.encode(pipe, real[i][0][None])[0]

    files = [folder / record["file_name"] for record in records]
    for batch in run.missing(f"{folder.name} images", files, args.generation_batch_size):
        for strength in dict.fromkeys(records[j]["strength"] for j in batch):
            alike = [j for j in batch if records[j]["strength"] == strength]
            z = torch.stack([latents(records[j]["guide_index"]) for j in alike])
            prompts = [records[j]["prompt"] for j in alike]
            generators = [common.generator(*records[j]["seed"]) for j in alike]
            options = dict(steps=args.steps, strength=strength, guidance_scale=args.guidance_scale)
            images = img2img(pipe, z, prompts, generators, **options)
            run.keep(images, [files[j] for j in alike])


def synthesize(args: Args, run: common.Run, pipe, data: common.Data, folder: Path) -> list[dict]:
    """Generates the variations of all real images in `folder`, and returns their metadata."""
    device = pipe.device
    if args.prompts == "llm":
        pipe.to("cpu")  # to make room on the GPU for the language model
    records = plan_variations(args, data, find_prompts(args, run, data.class_names, pipe))
    pipe.to(device)
    if learns_tokens(args):
        rows = learn_tokens(args, run, pipe, data)
        generators = [common.generator(args.seed, 3, c) for c in range(len(rows))]
        rows = noisy_embeddings(rows, args.sigmas, generators, args.relative_sigma)
        # choice: every noisy embedding has a token of its own, named by its class and the index of its sigma:
        # no class draws from another one whose name contains its own
        folders = common.class_folders(data.class_names)
        tokens = [f"<{name}|{v}>" for name in folders for v in range(len(args.sigmas))]
        with NewTokens(pipe, tokens, rows.flatten(0, 1).to(pipe.device)):
            pass  # on leaving, the pipeline's own table holds the embeddings
    draw_variations(args, run, pipe, data, records, folder)
    return records


def read_variations(args: Args, data: common.Data) -> list[dict]:
    """The metadata of the images of the run that --synthetic names.

    Raises UserError if they are variations of other real images than this run's, or if some are missing.
    """
    folder, config = Path(args.synthetic) / "synthetic", Path(args.synthetic) / "config.json"
    records = common.read_records(folder, data.class_names)
    require(config.exists(), f"--synthetic: cannot read {config}; name a folder that diagen.py has written")
    settings = common.read_file(config)["args"]
    for name in ("dataset", "seed", "examples_per_class", "variations"):
        there, here = settings.get(name), getattr(args, name)
        message = f"--synthetic: {args.synthetic} has --{name} {there}, this run --{name} {here}"
        require(there == here, f"{message}; its images are variations of other real images")
    guides = [i for i in range(len(data.train)) for _ in range(args.variations)]
    complete = [record["guide_index"] for record in records] == guides
    require(complete, f"--synthetic: images in {folder} are missing; finish that run first")
    return records


@dataclass
class Synthetic:
    """The variations of N real images, in order."""

    images: common.Images  # N M
    weights: np.ndarray  # [N, M]
    records: list[dict]  # metadata of the N M images
    report: dict  # their scores, for the result of the run


def judge_variations(args: Args, run: common.Run, data: common.Data, images: common.Images) -> dict:
    """The filter classifier's confidence in each image, and its scores before and after calibration.

    Also draws the reliability diagram filter.png.
    """
    model = train_filter(args, run.accelerator, data)
    logits, labels = common.predict(model, data.val, run.accelerator, args.workers)
    temperature = fit_temperature(logits, labels)
    if run.main:
        series = {"before": (logits, labels), "after": (logits / temperature, labels)}
        common.save_reliability(series, run.path / "filter.png")
    before, after = common.scores(logits, labels), common.scores(logits / temperature, labels)
    report = {"temperature": temperature, "accuracy": before["top1"]}
    report |= {"ece": before["ece"], "ece_calibrated": after["ece"]}
    report |= {"nll": before["nll"], "nll_calibrated": after["nll"]}
    return {"confidence": confidences(args, run.accelerator, model, temperature, images), "report": report}


def weigh(args: Args, run: common.Run, data: common.Data, records: list[dict], folder: Path) -> Synthetic:
    """Weighs the images of the records, which are in `folder`, and writes the weights into the metadata."""
    images = common.images_of(records, folder, data.train.transform).keep()
    plain, N, M = images.transformed(data.test.transform), len(data.train), args.variations
    report = {"synthetic": N * M, "generation": run.seconds.get(f"{folder.name} images", 0.0)}
    if args.dataset == "digits":
        from digits import judge

        report["distances"], _ = judge.distances_to_test(plain, data, run.accelerator)
    weights = torch.full((N, M), 1 / M)
    if args.weighting:
        judged = run.once("filter.pt", judge_variations, args, run, data, plain, together=True)
        q, report["filter"] = judged["confidence"], judged["report"]
        weights = weights_of(q.view(N, M))
        records = [r | {"confidence": value} for r, value in zip(records, q.tolist(), strict=True)]
    records = [r | {"weight": w} for r, w in zip(records, weights.flatten().tolist(), strict=True)]
    run.write("metadata.jsonl" if args.synthetic else f"{folder.name}/metadata.jsonl", records)
    weights = weights.double().numpy()
    return Synthetic(images, weights / weights.sum(1, keepdims=True), records, report)


def save_pictures(folder: Path, data: common.Data, synthetic: dict[str, Synthetic]) -> None:
    """Draws real images beside their variations by each method, and the last one's lowest weights, if any."""

    def caption(record: dict) -> str:
        return f"{record['prompt']}, {record['weight'] * M:.2f}"

    last, M = list(synthetic)[-1], synthetic[list(synthetic)[-1]].weights.shape[1]
    most = 4 if len(synthetic) > 1 else 5
    shown = {title: min(M, most if title == last else 2) for title in synthetic}
    tiles, captions = [], []
    for i in np.linspace(0, len(data.train) - 1, min(6, len(data.train))).astype(int):
        tiles.append(common.open_image(data.train.sources[i]))
        captions.append("real")
        for title, variations in synthetic.items():
            of_i = slice(i * M, i * M + shown[title])
            tiles += variations.images.sources[of_i]
            captions += [f"{title}: {caption(record)}" for record in variations.records[of_i]]
    common.save_captioned(tiles, captions, folder / "variations.png", columns=1 + sum(shown.values()))
    sources, records = synthetic[last].images.sources, synthetic[last].records
    if "confidence" not in records[0]:
        return
    lowest = np.argsort([record["weight"] for record in records], kind="stable")[:12]
    captions = [caption(records[j]) for j in lowest]
    common.save_captioned([sources[j] for j in lowest], captions, folder / "lowest.png", columns=6)


def train(args: Args, run, accelerator, data: common.Data, synthetic: Synthetic | None, title: str) -> dict:
    """Trains a downstream classifier and returns its scores on each split, at its best epoch.

    synthetic: the variations of the real images and their weights; None: the real images alone
    """
    net, model, optimizer = new_classifier(args, accelerator, data.class_names)
    best, real = common.Best(), data.train
    images, weights = (real + synthetic.images, synthetic.weights) if synthetic else (real, None)
    count, probability = args.iterations * args.batch_size, args.synthetic_probability
    loader = common.Loader(images, args.batch_size, accelerator, args.workers, count)

    for epoch in run.epochs(title, args.epochs, model=net, optimizer=optimizer, best=best):
        # choose the images: real ones, class-balanced, and by weight their variations in the place of most
        common.seed_everything(accelerator, args.seed, epoch)
        rng = np.random.default_rng([args.seed, epoch])
        drawn = draw_epoch(real.labels, args.variations, weights, count, probability, rng)
        run.log(synthetic_share=float((drawn >= len(real)).mean()))

        # one epoch on these images
        loader.draw(drawn, args.seed, epoch)
        losses = common.train_epoch(
            model, loader, optimizer, lambda _: args.lr, accelerator, args.label_smoothing
        )
        run.log(**losses)

        # the epoch that is best on the validation split, by the mean of the classes' accuracies, counts
        if common.to_evaluate(epoch, args.epochs, args.eval_every):
            score = common.scores(*common.predict(model, data.val, accelerator, args.workers))
            run.log(val=score["class_mean"], val_nll=score["nll"])
            best.update(epoch, score["class_mean"], net)

    net.load_state_dict(best.weights)
    scores = common.evaluate(model, data, accelerator, args.workers)
    scores |= {"epoch": best.epoch + 1, "training": run.seconds.get(title, 0.0)}
    return scores | (synthetic.report if synthetic else {"synthetic": 0})


METHODS = {
    "diagen": "DIAGen",
    "da_fusion": "DA-Fusion",
    "real_guidance": "Real Guidance",
    "da_fusion_published": "DA-Fusion as published",
    "real_guidance_published": "Real Guidance as published",
}
PUBLISHED = {  # the baselines' own settings; without "_published" they have those of DIAGen
    "da_fusion_published": [1.0, 0.75, 0.5, 0.25],
    "real_guidance_published": [0.5],
}


def learns_tokens(args: Args) -> bool:
    """Whether the method has a learned token in its prompts; Real Guidance has the class's name."""
    return not args.method.startswith("real_guidance")


def as_method(args: Args, method: str) -> Args:
    """The settings that make DIAGen one of METHODS; the baselines are DIAGen without its three parts."""
    args = dataclasses.replace(args, method=method)
    if method != "diagen":
        args.sigmas, args.prompts, args.weighting = [0.0], "none", False
    if method in PUBLISHED:
        args.strength, args.guidance_scale, args.synthetic_probability = PUBLISHED[method], 7.5, 0.5
    return args


def resolve(args: Args) -> Args:
    """Fills the fields left None from the data set's recipe. Raises UserError if a value cannot be."""
    args = common.fill_recipe(args, RECIPES, "diagen")
    common.check_choice("--method", args.method, METHODS)
    found = args.embeddings is None or (Path(args.embeddings) / "embeddings").is_dir()
    require(found, f"--embeddings {args.embeddings} is no folder of a run: it has no folder embeddings/")
    given = args.embeddings or args.synthetic
    require(not (args.ladder and given), f"--ladder makes its own tokens and images; leave out {given}")
    return as_method(args, args.method)


def plan_jobs(args: Args) -> dict[str, Args | None]:
    """The classifiers to train: title -> settings of their variations, or None for the real images alone."""
    jobs = {"standard augmentation": None} if args.real_only or args.baseline else {}
    if args.baseline and args.method == "diagen" and not (args.real_only or args.synthetic):
        jobs["DA-Fusion"] = as_method(args, "da_fusion")
    return jobs if args.real_only else jobs | {METHODS[args.method]: args}


def plan_run(args: Args, data: common.Data) -> dict[str, str]:
    """What a run will do, for Run.begin."""
    plan, jobs = {}, plan_jobs(args)
    drawn = [] if args.synthetic else [job for job in jobs.values() if job]
    if any(map(learns_tokens, drawn)) and not args.embeddings:
        plan["learning tokens"] = f"{len(data.class_names)} tokens, {args.inversion_steps} steps each"
    for job in drawn:
        images = len(data.train) * args.variations
        plan[f"{'synthetic' if job is args else job.method} images"] = f"{images} images"
    return plan | dict.fromkeys(jobs, f"{args.epochs} epochs, {args.epochs * args.iterations} steps")


def check(args: Args, run: common.Run, accelerator, data: common.Data, pipe) -> None:
    """Raises UserError for mistakes that would otherwise show only after hours."""
    common.check_training(args, accelerator, data)
    if args.synthetic and not args.real_only:
        read_variations(args, data)
    if pipe is None:
        return
    for strength in args.strength:
        common.ddim(pipe, args.steps, strength)
    if learns_tokens(args):
        initial_embeddings(pipe, data.class_names, args.initializer)
        if args.embeddings:
            read_embeddings(Path(args.embeddings), data.class_names, pipe, args.vectors)
    vectors = args.vectors if learns_tokens(args) else 0
    common.check_prompt(pipe, args.prompt, data.class_names, "--prompt", vectors)
    if args.prompts not in ("none", "bank", "llm"):
        read_prompts(Path(args.prompts), data.class_names, pipe, vectors)
    if args.prompts == "llm" and not (run.path / "prompts.csv").exists():
        chat_tokenizer(args.llm)


def run_once(args: Args, accelerator) -> dict:
    """Makes one run in args.out, with its baselines. A finished run's result is read from its folder."""
    run = common.Run(args, accelerator)
    if result := run.result():
        return result
    pipe, result, synthetic, save_memory = None, {}, {}, args.gradient_checkpointing
    with accelerator.main_process_first():  # it downloads what is missing
        data = load_few(args, run.main)
        if not (args.real_only or args.synthetic):
            pipe = common.load_pipeline(args.diffusion, accelerator.device, None, save_memory, lora=args.lora)
    check(args, run, accelerator, data, pipe)
    run.begin(plan_run(args, data))
    for title, job in plan_jobs(args).items():
        if job:
            folder = Path(args.synthetic or run.path) / ("synthetic" if job is args else job.method)
            records = (
                read_variations(job, data) if args.synthetic else synthesize(job, run, pipe, data, folder)
            )
            synthetic[title] = weigh(job, run, data, records, folder)
            if run.main:
                save_pictures(run.path / "samples", data, synthetic)
        result[title] = train(args, run, accelerator, data, synthetic.get(title), title)
    if METHODS[args.method] in synthetic and args.baseline:
        net, folder = new_classifier(args, accelerator, data.class_names)[0], Path(args.synthetic or run.path)
        judged = (folder / "synthetic", data, accelerator, args.workers)
        seen = common.judge_images(net, run, "standard augmentation", *judged)
        result[METHODS[args.method]]["judged"] = seen
    if METHODS[args.method] in synthetic:
        inside.show_diagen(args, run, pipe, data, synthetic[METHODS[args.method]])
    return run.finish(result)


# The paper's ablation: every rung adds one part.
LADDER = {
    "standard augmentation": dict(real_only=True),
    "Real Guidance": dict(method="real_guidance", sigmas=[0.0], prompts="none", weighting=False),
    "DA-Fusion": dict(method="da_fusion", sigmas=[0.0], prompts="none", weighting=False),
    "+ embedding noise": dict(embeddings="DA-Fusion", prompts="none", weighting=False),
    "+ prompts": dict(embeddings="DA-Fusion", weighting=False),
    "+ weights": dict(synthetic="+ prompts"),
}


def main(args: Args) -> None:
    common.run_method(resolve(args), LADDER, run_once)


if __name__ == "__main__":
    common.cli(main, Args, RECIPES)
