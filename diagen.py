"""DIAGen: semantically diverse image augmentation (Lingenberg et al., GCPR 2024, arXiv 2408.14584).

From a few real images of each class, Textual Inversion learns a token for the class. Stable Diffusion then
draws M variations of every real image with the token in the prompt. Noise on the learned embeddings, and
prompts by a language model, make the variations diverse. A filter classifier gives each a weight. The
downstream classifier trains on the real images, replaced at random by one of their variations, drawn by
weight. Without noise, prompts and weights this is DA-Fusion (Trabucco et al., ICLR 2024, arXiv 2302.07944);
without tokens, too, Real Guidance (He et al., ICLR 2023); both with DIAGen's strength, guidance, probability.

    python diagen.py                                        handwritten digits, a few minutes on a laptop
    python diagen.py --dataset folder --data_dir mydata     10 classes of 4 images: under an hour of one A100
    python diagen.py --prompts llm --llm MODEL              prompts by any instruct model, kept as a CSV file
    python diagen.py --method da_fusion --out runs/fusion   a baseline: da_fusion or real_guidance
    python diagen.py --ladder --seeds 5                     the paper's ablation, one rung after the other

Paper to code:
    3.1 Textual Inversion                         textual_inversion, equation (1)
        the initial token                         initial_embedding
        noise on the embeddings, sigma            noisy_embeddings, equation (2)
    3.2 class-specific prompts                    write_prompt, ask_llm, parse_answer, read_prompts
        variations of the real images             img2img, equations (3) to (5)
        their strength t_0                        common.ddim
    3.3 the confidence filter                     train_filter
        its temperature                           fit_temperature, equation (6)
        confidence q                              confidences, equation (7)
        weight w(q)                               weights_of, equation (8)
        training on real and synthetic images     draw_weights; train, its best epoch: Best
"""

import contextlib
import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from torch import nn
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import AddedToken, AutoTokenizer
from transformers.hf_argparser import HfArg

import common
from common import number, require

PHOTO = "a photo of a {}"
METHODS = {"diagen": "DIAGen", "da_fusion": "DA-Fusion", "real_guidance": "Real Guidance"}


@dataclass
class Args(common.RunArgs):
    """DIAGen's own arguments. The data set's recipe replaces these defaults; see --dataset NAME --help."""

    method: Literal[*METHODS] = HfArg(default="diagen", help="DIAGen or a baseline without some of its parts")
    inversion_steps: int = number("[1, 1e6]", "training steps of Textual Inversion", 1000)
    inversion_batch_size: int = number("[1, 1000]", "images in a training step of Textual Inversion", 4)
    inversion_lr: float = number("(0, 1]", "learning rate of Textual Inversion; released: 5e-4 x batch", 2e-3)
    initializer: str = HfArg(default="the", help="words that initialise a token; '': the class name (paper)")
    embeddings: str = HfArg(default="", help="folder of a run whose learned tokens are used")
    sigmas: list[float] | None = number("[0, 100]", "token noise: standard deviations, one per image in turn")
    relative_sigma: bool = HfArg(default=False, help="sigmas in units of the embedding's root mean square")
    prompts: str = HfArg(default="bank", help="bank (random words), llm, none (--prompt), or a CSV file")
    prompts_per_class: int = number("[1, 1000]", "number of prompts of a class, used in rotation", 10)
    uncommon: bool = HfArg(default=False, help="ask the language model for uncommon locations")
    llm: str = HfArg(default="meta-llama/Llama-3.1-8B-Instruct", help="instruct model for --prompts llm")
    variations: int = number("[1, 10000]", "M, synthetic images of each real image", 10)
    strength: list[float] | None = number("(0, 1]", "t_0, shares of the noise; each image draws one of them")
    synthetic: str = HfArg(default="", help="folder of a run whose synthetic images are used")
    weighting: bool = HfArg(default=True, help="weigh the synthetic images by a filter classifier")
    synthetic_probability: float = number("[0, 1]", "chance that a variation replaces a real image", 0.7)
    iterations: int = number("[1, 1e6]", "training steps in an epoch", 200)
    cosine: bool = HfArg(default=False, help="cosine learning rate with --warmup; released: constant")
    filter_epochs: int = number("[1, 1e6]", "maximum number of epochs of the filter classifier", 50)


# As released, but for two parts. Sampler: PNDM there, DDIM here. Frozen classifier: mean and std 0.5 and
# batch norm in training mode there, the backbone's own here. As released, only COCO's images are squeezed.
SD14 = dict(diffusion="CompVis/stable-diffusion-v1-4", steps=50, guidance_scale=15.0, strength=[0.7])
SD14 |= dict(sigmas=[0.0, 0.005, 0.01, 0.025], examples_per_class=4, classifier="resnet50.tv2_in1k")
SD14 |= dict(pretrained=True, image_size=256, augment="zoomed", epochs=50, batch_size=16)
SD14 |= dict(frozen=True, optimizer="adam", lr=1e-4, weight_decay=0.0)
DIGITS = common.DIGITS | dict(steps=13, guidance_scale=7.5, generation_batch_size=40)
# choice: t_0 is 0.5, not 0.7 as for latents of 64x64, because in smaller latents less noise hides the image
DIGITS |= dict(strength=[0.5], variations=3, inversion_steps=50, inversion_lr=0.03, filter_epochs=2)
# choice: a token starts as "background", not as the class name (paper), because DIAGen is for classes that
# must be learned from images. Sigmas: the paper's, divided by the root mean square of SD 1.4's embeddings.
DIGITS |= dict(initializer="background", sigmas=[0.0, 0.33, 0.67, 1.67], relative_sigma=True)
DIGITS |= dict(pretrained=False, frozen=False, cosine=True, epochs=15, iterations=300, eval_every=5)
PLAIN = dict(sigmas=[0.0], prompts="none", weighting=False)  # DIAGen without its three parts
RECIPES = {"*": SD14, "coco": dict(augment="squeezed"), "digits": DIGITS}
RECIPES |= {"da_fusion": PLAIN, "real_guidance": PLAIN}


# Section 3.1: Textual Inversion (Gal et al. 2023), and noise on the learned embeddings ----------------------

TEMPLATES = [PHOTO] + (
    "a photo of one {}, a photo of the {}, a picture of a {}, a picture of the {}, a rendering of a {}, "
    "a rendering of the {}, a drawing of the {}, a depiction of a {}, a snapshot of the {}, "
    "a cropped photo of a {}, a cropped photo of the {}, a close-up of a {}, a close-up photo of the {}, "
    "a bright photo of a {}, a bright photo of the {}, a dark photo of a {}, a dark photo of the {}, "
    "a good photo of a {}, a good photo of the {}, a sharp photo of the {}, a blurred photo of a {}, "
    "a photo of a clean {}, a photo of a dirty {}, a photo of a small {}, a photo of a large {}, "
    "a photo of my {}"
).split(", ")


def place_tokens(pipe, tokens: list[str], rows: torch.Tensor) -> torch.Tensor:
    """Adds tokens, or overwrites them, with the embeddings `rows` [T, d]; returns the tokens' ids [T]."""
    # choice: tokens are matched as written, not in lower case, so that none is found inside another one
    pipe.tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    if len(pipe.tokenizer) > pipe.text_encoder.get_input_embeddings().num_embeddings:
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    ids = torch.tensor(pipe.tokenizer.convert_tokens_to_ids(tokens), device=pipe.device)
    weight = pipe.text_encoder.requires_grad_(False).get_input_embeddings().weight
    weight.data[ids] = rows.detach().to(weight)
    return ids


@contextlib.contextmanager
def new_token(pipe, token: str, row: torch.Tensor):
    """Context manager: a token's embedding `row` [d] gets gradients; on exit the pipeline keeps its value."""
    ids = place_tokens(pipe, [token], row[None])

    def look_up(module, inputs, output):
        return torch.where(inputs[0][..., None] == ids, row.to(output.dtype), output)

    with pipe.text_encoder.get_input_embeddings().register_forward_hook(look_up):
        yield
    place_tokens(pipe, [token], row[None])


def initial_embedding(pipe, class_name: str, initializer: str = "") -> torch.Tensor:
    """The mean embedding [d] of the tokens of `initializer` or, if it is empty, of the class name."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()
    ids = pipe.tokenizer(initializer or class_name, add_special_tokens=False).input_ids
    require(ids, f"the tokenizer has no token for '{initializer or class_name}'; give another --initializer")
    return table[ids].mean(0)


def textual_inversion(
    pipe,
    images: torch.Tensor,
    token: str,
    start: torch.Tensor,
    *,
    steps: int = 1000,
    batch_size: int = 4,
    lr: float = 2e-3,
    templates: list[str] = TEMPLATES,
    flip: bool = True,
    seed: tuple[int, ...] = (0,),
    on_step: Callable | None = None,
) -> torch.Tensor:
    """Learns the embedding S* [d], float32, of a token for a class from a few images of the class.

        (1)  S* = argmin_S E || eps - eps_theta(x_t, t, c(S)) ||^2      c(S): encoded template with the token

    images: [n, 3, H, W] in [0, 1]; start: S before training [d]; templates: prompts with {} for the token
    flip: mirror an image with probability 1/2; seed: integers, of every random draw
    on_step: called after each step as on_step(step, t [B], {"S": [d], "loss": scalar})
    Raises UserError if the training diverges.
    """
    require(torch.is_grad_enabled(), "training needs gradients; leave torch.inference_mode() or no_grad()")
    device, scheduler, dtype, B = pipe.device, pipe.scheduler, pipe.unet.dtype, batch_size
    with torch.no_grad():  # z [V, n, C, h, w] of V views, plain and mirrored
        views = [images, images.flip(-1)] if flip else [images]
        latents = torch.stack([torch.cat([common.encode(pipe, x[None]) for x in view]) for view in views])
    latents = latents.float().cpu()  # on the CPU: one copy of z a step, not two of indices
    S = nn.Parameter(start.clone().to(device))
    optimizer = torch.optim.AdamW([S], lr, weight_decay=0.0)
    with new_token(pipe, token, S):
        for step in (bar := tqdm(range(steps), token, leave=False)):
            g = common.generator(*seed, step)
            sizes = len(images), len(latents), scheduler.config.num_train_timesteps
            i, view, t = (torch.randint(n, (B,), generator=g) for n in sizes)
            z, noise = latents[view, i], torch.randn(B, *latents.shape[2:], generator=g)
            chosen = torch.randint(len(templates), (B,), generator=g)
            z, t, noise = z.to(device), t.to(device), noise.to(device)
            prompts = [templates[k].replace("{}", token) for k in chosen]
            text, _ = pipe.encode_prompt(prompts, device, 1, False)
            require(text.requires_grad, "the text encoder bypasses its hooks; is it compiled?")
            x_t = scheduler.add_noise(z, noise, t)
            output = pipe.unet(x_t.to(dtype), t, text.to(dtype)).sample.float()
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(z, noise, t) if velocity else noise
            loss = (output - target).square().mean()  # (1)
            optimizer.zero_grad()
            (1024 * loss).backward()  # fp16 has no small numbers
            S.grad /= 1024
            optimizer.step()
            if on_step is not None:
                on_step(step, t, {"S": S.detach().clone(), "loss": loss.detach()})
            if (step + 1) % 10 == 0 or step + 1 == steps:  # reading a value makes a GPU wait
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                require(S.isfinite().all(), "Textual Inversion diverged; lower --inversion_lr")
    return S.detach()


def noisy_embeddings(rows: torch.Tensor, sigmas: list[float], generators: list, relative: bool = False):
    """V noisy copies of each class's embedding, one for each of `sigmas`: rows [K, d] -> [K, V, d].

        (2)  S_v = S* + sigma_v n      n ~ N(0, I)

    generators: one CPU generator per class; relative: sigma is in units of the embedding's root mean square
    """
    noise = torch.stack([torch.randn(len(sigmas), rows.shape[1], generator=g) for g in generators])
    sigma = torch.tensor(sigmas).view(1, -1, 1).to(rows)
    if relative:
        sigma = sigma * rows.square().mean(-1, keepdim=True).sqrt()[:, None]
    return rows[:, None] + sigma * noise.to(rows)  # (2)


# Section 3.2: prompts "a photo of a [adjective] {name} [weather] [location] [time of day]" for each class ---

# choice: by default the prompts are random words in the paper's form, which needs no language model
WORDS = {
    "adjective": "small large old new shiny dusty colourful dark bright wet weathered striped".split(),
    "weather": ["in the rain", "in the snow", "in thick fog", "in bright sunshine", "under a cloudy sky"],
    "location": (
        "on a beach, in a forest, in a city street, in a kitchen, on a mountain, in a garden, in a desert, "
        "on a table, beside a lake, in front of a brick wall, in an office, on a roof"
    ).split(", "),
    "time": ["at night", "at dawn", "in the early morning", "at noon", "at sunset"],
}
DIGIT_WORDS = {"adjective": "red yellow green blue white purple".split()}
DIGIT_WORDS |= {"location": [f"on a {setting} background" for setting in ("temple", "flower", "plain")]}


def write_prompt(rng: np.random.Generator, words: dict[str, list[str]] = WORDS, prompt: str = PHOTO) -> str:
    """A random prompt in the paper's form, {} for the class name; each optional part has probability 1/2."""
    parts = {part: str(rng.choice(options)) for part, options in words.items() if rng.random() < 0.5}
    name = " ".join([*([parts.pop("adjective")] if "adjective" in parts else []), "{}"])
    return " ".join([prompt.replace("{}", name), *parts.values()])


def template_of(prompt: str, name: str) -> str:
    """The prompt with {} in the place of the class name, or "" if the name is not there exactly once.

    In the prompt, {name}, {} or the name itself stands for the class, in upper or lower case, as a whole word
    ("carrot" has no "car"). In scripts without spaces, such as Chinese, a name may stand anywhere.
    """
    prompt, word = prompt.replace("{name}", "{}"), re.escape(name)
    if not re.search("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uac00-\ud7af]", name):
        word = rf"(?<!\w){word}(?!\w)"
    template, count = re.subn(r"\{\}" if "{}" in prompt else word, "{}", prompt, flags=re.IGNORECASE)
    return template if count == 1 else ""


REQUEST = (
    "Write {count} prompts for a text-to-image model, each of the form\n"
    "a photo of a [adjective] {name} [location and/or weather preposition] [weather] [location] "
    "[time of day with preposition]\n"
    "Everything in brackets is optional; vary how many of these parts you use. Adjectives must be visible in "
    "a photo. Choose locations where one would {place} it. "
    'Every prompt contains "{name}" exactly once. One prompt a line, nothing else.'
)


def parse_answer(answer: str, name: str, count: int) -> list[str]:
    """The first `count` different prompts in a language model's answer, {} for the class name.

    A prompt begins with "a photo of", ends before a double quote, a "[" or the end of the line, and has the
    name exactly once. Thoughts (<think>) are skipped. For missing prompts: a warning and "a photo of a {}".
    """
    answer, begin = answer.rpartition("</think>")[2].partition("<think>")[0], r"\ba photo of "
    lines = re.findall(rf'{begin}(?:(?!{begin})[^"\u201d\r\n\[])*', answer, re.IGNORECASE)
    found = [template_of(line.rstrip(" .,;'`*\\]"), name) for line in lines]
    prompts = [prompt for prompt in dict.fromkeys(found) if prompt][:count]
    if len(prompts) < count:
        common.say(f"warning: {len(prompts)} of {count} prompts for '{name}' are usable")
    return prompts + [PHOTO] * (count - len(prompts))


def ask_llm(model: str, class_names: list[str], count: int, uncommon: bool = False) -> list[list[str]]:
    """Prompts by an instruct model, `count` per class. Raises UserError if the model cannot be loaded."""
    from transformers import AutoModelForCausalLM, TextGenerationPipeline

    tokenizer = common.from_pretrained(AutoTokenizer, model)
    llm = common.from_pretrained(AutoModelForCausalLM, model, dtype="auto")
    chat = TextGenerationPipeline(llm.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
    options = dict(max_new_tokens=2000 + 40 * count, do_sample=False, return_full_text=False)  # some think
    place, prompts = "not expect" if uncommon else "see", []
    for name in tqdm(class_names, "asking for prompts"):
        request = REQUEST.format(count=count, name=name, place=place)
        answer = chat([{"role": "user", "content": request}], **options)[0]["generated_text"]
        prompts.append(parse_answer(answer, name, count))
    return prompts


def write_prompts(args: Args, class_names: list[str]) -> str:
    """The text of a CSV file of prompts, by the language model or of random words; see read_prompts."""
    count, rng = args.prompts_per_class, np.random.default_rng(args.seed)
    words = DIGIT_WORDS if args.dataset == "digits" else WORDS
    prompts = [[write_prompt(rng, words, args.prompt) for _ in range(count)] for _ in class_names]
    if args.prompts == "llm":
        prompts = ask_llm(args.llm, class_names, count, args.uncommon)
    writer = csv.writer(file := io.StringIO(), delimiter=";", lineterminator="\n")
    writer.writerow(["class_name", "class_idx", "prompt"])
    for y, name in enumerate(class_names):
        writer.writerows([name, y, prompt.replace("{}", "{name}")] for prompt in prompts[y])
    return file.getvalue()


def read_prompts(path: Path, data: common.Data, pipe=None, learned: bool = False) -> list[list[str]]:
    """The prompts of each class, {} for its name, from a file of lines class_name;class_idx;prompt.

    class_name: in English or the data set's own; class_idx: ignored; prompt: see template_of. A bad line
    raises UserError; a class without lines gets "a photo of a {}". pipe, learned: see common.check_prompt.
    """
    names, prompts = data.class_names, [[] for _ in data.class_names]
    rows = csv.reader(io.StringIO(common.read_text(path)), delimiter=";")
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if not row or (rows.line_num == 1 and row[0] == "class_name"):
            continue
        require(len(row) == 3 and "\n" not in row[2], f"{where}: {row} is not class_name;class_idx;prompt")
        name, _, prompt = (field.strip() for field in row)
        own = [y for y in range(len(names)) if name in (names[y], data.folders[y])]
        require(own, f"{where}: the data set has no class '{name}'")
        for y in own:
            template = template_of(prompt, names[y]) or template_of(prompt, name)
            require(template, f"{where}: '{names[y]}' or {{name}} must be in the prompt exactly once")
            if pipe:
                common.check_prompt(pipe, template, [names[y]], where, learned)
            prompts[y].append(template)
    require(any(prompts), f"{path} has no prompts")
    return [lines or [PHOTO] for lines in prompts]


# Section 3.2: variations of the real images by SDEdit (Meng et al. 2022), also known as img2img -------------


@torch.no_grad()
def img2img(
    pipe, latents, prompts, generators, *, steps=50, strength=0.7, guidance_scale=15.0, on_step=None
) -> torch.Tensor:
    """Draws variations [B, 3, H, W] in [0, 1] of images: adds noise up to t_0, denoises by DDIM with prompts.

        (3)  x_{t_0}  = sqrt(alpha_{t_0}) z + sqrt(1 - alpha_{t_0}) xi        alpha: alphas_cumprod
        (4)  eps^     = eps(x_t, "") + s (eps(x_t, c) - eps(x_t, ""))         classifier-free guidance
        (5)  x_{t-1}  = sqrt(alpha_{t-1}) x^_0 + sqrt(1 - alpha_{t-1}) eps^   x^_0: from x_t and eps^

    latents: z [B, C, h, w], scaled; prompts and CPU generators: one per image; c: the encoded prompt
    strength: t_0, as a share of the noise schedule; guidance_scale: s; if s <= 1, there is no guidance
    on_step: called after step i as on_step(i, t, {"x": x_{t-1}, "x0": x^_0})

    In fp32 bit-equal to diffusers' StableDiffusionImg2ImgPipeline with common.ddim's scheduler; in half
    precision the steps stay in fp32. Raises UserError if `strength` leaves no step.
    """
    scheduler, timesteps = common.ddim(pipe, steps, strength)  # the last int(steps * t_0) of the timesteps
    guided = guidance_scale > 1
    c, empty = pipe.encode_prompt(prompts, pipe.device, 1, guided)
    text = torch.cat([empty, c]) if guided else c
    z = latents.to(pipe.device, torch.float32)
    x = scheduler.add_noise(z, randn_tensor(z.shape, generators, pipe.device), timesteps[:1])  # computes (3)
    for i, t in enumerate(timesteps):
        rows = torch.cat([x, x]) if guided else x
        output = pipe.unet(rows.to(c.dtype), t, text).sample.float()
        if guided:
            output_empty, output_c = output.chunk(2)
            output = output_empty + guidance_scale * (output_c - output_empty)  # (4)
        step = scheduler.step(output, t, x)  # computes x^_0, and from it (5)
        x = step.prev_sample
        if on_step is not None:
            on_step(i, t, {"x": x, "x0": step.pred_original_sample})
    return common.decode(pipe, x)


# Section 3.3: the filter classifier, its temperature, weights of synthetic images, draws by weight ----------


class Best(dict):
    """The best epoch so far, its score and its weights: a dict that a checkpoint can hold."""

    state_dict, load_state_dict = dict.copy, dict.update

    def judge(self, epoch: int, score: float, net: nn.Module) -> None:
        """Keeps a copy of the network's weights if the score is higher than every earlier one."""
        if score > self.get("score", -math.inf):
            weights = {key: value.clone() for key, value in net.state_dict().items()}
            self.update(epoch=epoch, score=score, weights=weights)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that calibrates a classifier on logits [N, K] and labels [N] (Guo et al. 2017).

    (6)  T = argmin_T NLL(softmax(logits / T), labels)      choice: by a search on log T from -5 to 5
    """

    def nll(log_t: float) -> float:
        return F.cross_entropy(logits.double() / math.exp(log_t), labels).item()

    return math.exp(minimize_scalar(nll, bounds=(-5, 5)).x)  # (6)


def train_filter(args: Args, accelerator, real: common.Images, data: common.Data) -> nn.Module:
    """Trains the filter classifier on real images; returns it as of the epoch of lowest loss on data.val."""
    adam = replace(args, optimizer="adam", weight_decay=1e-2)
    (net, model, optimizer), best = common.new_classifier(adam, accelerator, data.class_names), Best()
    chances, rates = draw_weights(real.labels), [args.lr] * args.iterations
    for epoch in tqdm(range(args.filter_epochs), "filter classifier", leave=False):
        batches = draw_batches(args, real, chances, accelerator, 10**6 + epoch)
        common.train_epoch(model, batches, optimizer, rates, accelerator)
        logits, labels = common.predict(model, data.val, accelerator, args.workers)
        nll = F.cross_entropy(logits, labels, 1 / labels.bincount(minlength=logits.shape[1]))
        best.judge(epoch, -nll.item(), net)  # as released, the mean of the classes' losses
        if epoch - best["epoch"] >= 6:  # as released
            break
    net.load_state_dict(best["weights"])
    return model


def confidences(args: Args, accelerator, model, temperature: float, images: common.Images, views: int = 5):
    """The confidence q [N] of the filter classifier `model` in each image's own label y.

        (7)  q = mean_v softmax(f(x_v) / T)_y

    x_v: randomly augmented views, five in the paper; f: the classifier's logits; T: temperature
    """
    keys = [(args.seed, 2 * 10**6 + v) for v in range(views)]
    logits = [common.predict(model, images, accelerator, args.workers, seed=key)[0] for key in keys]
    own = torch.arange(len(images)), torch.tensor(images.labels)
    return (torch.stack(logits) / temperature).softmax(2).mean(0)[own]  # (7)


def weights_of(confidence: torch.Tensor) -> torch.Tensor:
    """The weights [N, M] of the M variations of N real images, from the filter's confidences q [N, M].

        (8)  w(q) = min(1, 2 q)

    A weight is w(q), divided by the sum of w over the M variations of the same real image.
    """
    w = (2 * confidence).clamp(max=1)  # (8)
    # choice: if all M confidences are 0, the weights are equal
    w = torch.where(w.sum(1, keepdim=True) > 0, w, torch.ones_like(w))
    return w / w.sum(1, keepdim=True)


def draw_weights(labels: list[int], weights: torch.Tensor | None = None, probability: float = 0.7):
    """Relative probabilities to draw each of N real images, then each of their N x M variations, if any.

    Classes are equally likely. With `probability`, a variation by its weight [N, M] replaces its real image.
    """
    real = 1 / torch.bincount(torch.tensor(labels))[labels].double()
    if weights is None:
        return real
    return torch.cat([(1 - probability) * real, (probability * real[:, None] * weights).flatten()])


def draw_batches(args: Args, images: common.Images, chances: torch.Tensor, accelerator, epoch: int):
    """The args.iterations batches of an epoch; images are drawn, with replacement, by weights `chances`."""
    g, count = common.generator(args.seed, epoch), args.iterations * args.batch_size
    drawn = torch.multinomial(chances, count, replacement=True, generator=g)
    return common.load(images, args.batch_size, accelerator, args.workers, drawn, (args.seed, epoch, 1))


# The run ----------------------------------------------------------------------------------------------------


def add_validation(args: Args, data: common.Data) -> None:
    """If data.val is missing, takes examples_per_class unused images per class or a quarter of data.train."""
    left, few = data.unlabelled, args.examples_per_class
    if data.val is not None:
        return
    if few and left and len(set(left.labels) - {-1}) == len(data.class_names):
        # choice: as many as in training, because a user with few labels has no large validation split
        data.val = left.subset(common.draw_per_class(left.labels, lambda n: few, args.seed))
    else:
        others, held = common.split_per_class(data.train.labels, 0.25, args.seed)
        data.val, data.train = data.train.subset(held), data.train.subset(others)
    require(len(data.val), "no class has an image to spare for validation; add val/ or two images per class")
    data.val = data.val.seen(data.test.transform)
    common.say(f"no validation split: {len(data.val)} other training images choose the best epoch")


def embedding_files(folder: str | Path, class_names: list[str]) -> list[Path]:
    """The file of each class's embedding in a run folder; diffusers' load_textual_inversion reads them."""
    records = [common.record(class_names, y, "learned_embeds", []) for y in range(len(class_names))]
    return [Path(folder, "embeddings", r["file_name"]).with_suffix(".safetensors") for r in records]


def read_embeddings(folder: str | Path, class_names: list[str], pipe) -> torch.Tensor:
    """Reads the embeddings [K, d] in a run folder. Raises UserError if one is missing or does not fit."""
    rows, width = [], pipe.text_encoder.get_input_embeddings().embedding_dim
    for file in embedding_files(folder, class_names):
        require(file.exists(), f"--embeddings {folder} must have the tokens of all classes, but lacks {file}")
        row = next(iter(load_file(file).values())).squeeze()
        made = f"{file} was made for another text encoder, or has several vectors"
        require(row.shape == (width,), f"{made}: shape {[*row.shape]}, here [{width}]")
        rows.append(row.float())
    return torch.stack(rows)


def inversion_options(args: Args) -> dict:
    """The keyword arguments of textual_inversion that a run's arguments ask for."""
    options = dict(steps=args.inversion_steps, batch_size=args.inversion_batch_size, lr=args.inversion_lr)
    if args.dataset == "digits":  # they are not mirrored, and their generator has learned one template alone
        options |= dict(flip=False, templates=[args.prompt])
    return options


def learn_tokens(args: Args, run: common.Run, pipe, data: common.Data) -> torch.Tensor:
    """The embeddings [K, d] of all classes, read from --embeddings or learned by Textual Inversion."""
    names, files = data.class_names, embedding_files(run.path, data.class_names)
    if args.embeddings:
        return read_embeddings(args.embeddings, names, pipe)
    real = common.for_generator(data.train, pipe, args.square)
    for (c,) in run.missing("learning tokens", files, 1):
        images = torch.stack([real[i][0] for i, y in enumerate(real.labels) if y == c])
        start = initial_embedding(pipe, names[c], args.initializer)
        token = f"<{files[c].parent.name}>"
        S = textual_inversion(pipe, images, token, start, seed=(args.seed, c), **inversion_options(args))
        files[c].parent.mkdir(parents=True, exist_ok=True)
        save_file({token: S.cpu()}, temporary := files[c].with_suffix(".tmp"))
        temporary.replace(files[c])
    return read_embeddings(run.path, names, pipe)


def draw_variations(args: Args, run, pipe, data: common.Data, folder: Path) -> list[dict]:
    """Draws M variations of each real image into `folder`; returns their records, M per image in order."""
    names, path, learned = data.class_names, Path(args.prompts), args.method != "real_guidance"
    prompts = [[args.prompt]] * len(names)
    if args.prompts in ("bank", "llm"):
        path = run.path / "prompts.csv"
        run.once(path.name, partial(write_prompts, args, names))
    if args.prompts != "none":
        prompts = read_prompts(path, data, pipe, learned)
    if learned:
        rows = learn_tokens(args, run, pipe, data)
        generators = [common.generator(args.seed, 3, c) for c in range(len(rows))]
        rows = noisy_embeddings(rows, args.sigmas, generators, args.relative_sigma)
        # choice: each noisy embedding has its own token, named by class and index of sigma. The released code
        # matches class names by substring, so that "car" also draws from "carrot"
        V, files = range(len(args.sigmas)), embedding_files(run.path, names)
        tokens = [[f"<{file.parent.name}|{v}>" for v in V] for file in files]
        place_tokens(pipe, sum(tokens, []), rows.flatten(0, 1))
    # prompts and noisy tokens take turns within a class
    records, count = [], [0] * len(names)
    for i, y in enumerate(data.train.labels):
        for m in range(args.variations):
            shown = tokens[y][count[y] % len(args.sigmas)] if learned else names[y]
            prompt, key = prompts[y][count[y] % len(prompts[y])].replace("{}", shown), [args.seed, i, m]
            count[y] += 1
            record = common.record(names, y, f"{i:06d}-{m:02d}", key) | {"guide": data.train.name(i)}
            strength = float(np.random.default_rng(key).choice(args.strength))
            records.append(record | {"guide_index": i, "prompt": prompt, "strength": strength})

    view = common.for_generator(data.train, pipe, args.square).transform
    files = [folder / record["file_name"] for record in records]
    for batch in run.missing(f"{folder.name} images", files, args.generation_batch_size):
        guides = {records[j]["guide_index"] for j in batch}
        sources = {i: common.open_image(data.train.sources[i]) for i in guides}
        with torch.no_grad():  # each alone: then its bits do not depend on the rest of the batch
            latents = {i: common.encode(pipe, view(source)[None]) for i, source in sources.items()}
        for strength in dict.fromkeys(records[j]["strength"] for j in batch):
            alike = [j for j in batch if records[j]["strength"] == strength]
            z = torch.cat([latents[records[j]["guide_index"]] for j in alike])
            generators = [common.generator(*records[j]["seed"]) for j in alike]
            options = common.options(img2img, args) | {"strength": strength}
            images = img2img(pipe, z, [records[j]["prompt"] for j in alike], generators, **options)
            for j, image in zip(alike, images.split(1), strict=True):
                if args.square == "squeeze":  # as released, its source's shape; choice: not its size
                    size = sources[records[j]["guide_index"]].size[::-1]
                    size = [round(image.shape[2] * side / min(size)) for side in size]
                    image = v2.functional.resize(image, size)
                run.keep(image, [files[j]])
    return records


def judge(args: Args, run: common.Run, data: common.Data, images: common.Images) -> dict:
    """Trains and calibrates the filter; returns {"confidence": q of `images`, "report": scores}."""
    # as released, the filter sees images with RandAugment alone
    view = common.make_transforms(args.image_size, "none+randaugment", "squeeze")[0]
    model = train_filter(args, run.accelerator, data.train.seen(view), data)
    z, y = common.predict(model, data.val, run.accelerator, args.workers)
    T = fit_temperature(z, y)
    report = {"temperature": T, "before": common.scores(z, y), "after": common.scores(z / T, y)}
    return {"confidence": confidences(args, run.accelerator, model, T, images.seen(view)), "report": report}


def weigh(args: Args, run: common.Run, data: common.Data, records: list[dict], folder: Path):
    """Returns the variations, their weights [N, M] and the filter's scores, if any; writes their metadata."""
    images = common.images_of(records, folder, data.train.transform).decoded()
    weights, report = torch.full((len(data.train), args.variations), 1 / args.variations), {}
    if args.weighting:
        judged = run.once("filter.pt", partial(judge, args, run, data, images), together=True)
        q, report = judged["confidence"], {"filter": judged["report"]}
        weights = weights_of(q.view_as(weights))
        records = [r | {"confidence": value} for r, value in zip(records, q.tolist(), strict=True)]
    records = [r | {"weight": w} for r, w in zip(records, weights.flatten().tolist(), strict=True)]
    run.write("metadata.jsonl" if args.synthetic else f"{folder.name}/metadata.jsonl", records)
    if run.main:  # a picture to look at: real images beside their variations
        real = data.train.seen(data.test.transform)
        common.save_variations(real, images.sources, run.path / "samples" / f"{args.method}.png")
    return images, weights, report


def train(args: Args, run: common.Run, data: common.Data, title: str, images=None, weights=None) -> dict:
    """Trains a downstream classifier and returns its scores on each split, at its best epoch.

    images, weights: the variations of the real images and their weights [N, M]; None: the real images alone
    """
    accelerator, best, real = run.accelerator, Best(), data.train
    net, model, optimizer = common.new_classifier(args, accelerator, data.class_names)
    everything, N = real + images if images else real, args.iterations
    chances = draw_weights(real.labels, weights, args.synthetic_probability)

    for epoch in run.epochs(title, args.epochs, model=net, optimizer=optimizer, best=best):
        # one epoch on real images, class-balanced, and by weight their variations in the place of most
        batches = draw_batches(args, everything, chances, accelerator, epoch)
        done = [(epoch + i / N) / args.epochs for i in range(N)]
        rates = [args.lr * (common.cosine(share, args.warmup) if args.cosine else 1.0) for share in done]
        run.log(loss=common.train_epoch(model, batches, optimizer, rates, accelerator, args.label_smoothing))

        # the epoch with the best class_mean on the validation split counts (tables show top-1, the paper's
        # class_mean). In the released code the last epoch always counts: the weights it keeps are an alias.
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            score = common.scores(*common.predict(model, data.val, accelerator, args.workers))
            run.log(val=score["class_mean"], val_nll=score["nll"])
            best.judge(epoch, score["class_mean"], net)

    net.load_state_dict(best["weights"])
    scores = common.evaluate(model, data, accelerator, args.workers) | {"epoch": best["epoch"] + 1}
    return run.outcome(title) | scores | {"synthetic": len(everything) - len(real)}


def check(args: Args, run: common.Run, data: common.Data, pipe) -> None:
    """Raises UserError for mistakes that would otherwise show only after hours."""
    for strength in args.strength:
        common.ddim(pipe, args.steps, strength)
    names, learned = data.class_names, args.method != "real_guidance"
    common.check_prompt(pipe, args.prompt, names, "--prompt", learned)
    if learned and args.embeddings:
        read_embeddings(args.embeddings, names, pipe)
    elif learned:
        [initial_embedding(pipe, name, args.initializer) for name in names]
    if args.prompts == "llm" and not (run.path / "prompts.csv").exists():
        template = common.from_pretrained(AutoTokenizer, args.llm).chat_template
        require(template, f"--llm {args.llm} has no chat template; give an instruct model")
    elif args.prompts not in ("none", "bank", "llm"):
        read_prompts(Path(args.prompts), data, pipe, learned)


def experiment(args: Args, run: common.Run, data: common.Data, pipe) -> dict:
    """Trains the baseline, standard augmentation, and the method; returns {title: scores}."""
    title, records, result = METHODS[args.method], [], {}
    plan = f"{args.epochs} epochs of {args.iterations} steps for each classifier"
    add_validation(args, data)
    if pipe:
        check(args, run, data, pipe)
        images, passes = len(data.train) * args.variations, 2 * int(args.steps * max(args.strength))
        plan = f"{common.cost(pipe, images, passes)}, prompts: {args.prompts}, {plan}"
    elif args.synthetic:
        records = common.read_records(Path(args.synthetic, "synthetic"), data.class_names)
        there = common.read_file(Path(args.synthetic, "config.json"), {"args": {}, "data": {}})
        there, here = there["args"] | there["data"], vars(args) | data.fingerprint()
        keys = ["dataset", "seed", "examples_per_class", "variations", "train"]
        keys = [key for key in keys if there.get(key) != here[key]]
        require(not keys, f"--synthetic {args.synthetic} is of other real images; changed: {', '.join(keys)}")
    run.begin(data, plan)
    if args.baseline or args.real_only:
        result["standard augmentation"] = train(args, run, data, "standard augmentation")
    if not args.real_only:
        folder = Path(args.synthetic or run.path, "synthetic")
        records = draw_variations(args, run, pipe, data, folder) if pipe else records
        images, weights, report = weigh(args, run, data, records, folder)
        result[title] = train(args, run, data, title, images, weights) | report | {"generation": run.drawing}
    return result


# The paper's ablation: every rung adds one part. A rung's values win over the command line's.
LADDER = {
    "standard augmentation": dict(real_only=True),
    "Real Guidance": PLAIN | dict(method="real_guidance"),
    "DA-Fusion": PLAIN | dict(method="da_fusion"),
    "+ embedding noise": dict(embeddings="DA-Fusion", prompts="none", weighting=False),
    "+ prompts": dict(embeddings="DA-Fusion", weighting=False),
    "+ weights": dict(synthetic="+ prompts"),
}
METHOD = common.Method("diagen", Args, RECIPES, LADDER, experiment)

if __name__ == "__main__":
    common.main(METHOD)
