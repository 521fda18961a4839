"""DIAGen: semantically diverse image augmentation for few-shot learning (Lingenberg et al., 2408.14584).

From a few images per class: Textual Inversion learns a token for each class; noise on the learned embeddings
and prompts written by a language model make img2img variations of the real images diverse; a filter
classifier weighs them; training replaces real images by variations drawn by weight. Without noise, prompts
and weights it is DA-Fusion (Trabucco et al., ICLR 2024, 2302.07944), without learned tokens Real Guidance.

    python diagen.py                                        handwritten digits, a few minutes on a laptop
    python diagen.py --dataset folder --data_dir mydata --examples_per_class 4   your own images (GPU)
    python diagen.py --prompts llm --llm MODEL              prompts by any instruct model, kept as a CSV file
    python diagen.py --method da_fusion                     the baselines: da_fusion, real_guidance
    python diagen.py --ladder --seeds 5                     the paper's ablation, one rung after the other
    accelerate launch diagen.py --dataset coco              several GPUs

Paper to code:
    3.1 Textual Inversion, embedding noise          textual_inversion, noisy_embeddings
    3.2 class-specific prompts                      write_prompt, ask_llm, parse_answer, read_prompts
        generation by img2img                       img2img
    3.3 weighting                                   fit_temperature, confidences, weights_of
        training of the downstream classifier       draw_epoch, train
"""

import csv
import dataclasses
import io
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import AddedToken
from transformers.hf_argparser import HfArg

import common


@dataclass
class Args(common.RunArgs):
    """DIAGen's arguments, beside every method's; "(recipe)": defaults to the data set's recipe."""

    method: str = HfArg(default="diagen", help="diagen, da_fusion or real_guidance")
    # textual inversion
    inversion_steps: int | None = HfArg(default=None, help="steps of Textual Inversion (recipe)")
    inversion_batch_size: int | None = HfArg(default=None, help="its batch, of all classes (recipe)")
    inversion_lr: float | None = HfArg(default=None, help="its learning rate (recipe)")
    initializer: str | None = HfArg(
        default=None, help="a word the tokens start from, '': the class name (recipe)"
    )
    embeddings: str | None = HfArg(default=None, help="a run folder whose learned tokens are used")
    # diversity
    sigmas: list[float] | None = HfArg(default=None, help="noise on the embeddings, a variant each (recipe)")
    relative_sigma: bool | None = HfArg(
        default=None, help="sigma counts the root mean square of the learned embedding (recipe)"
    )
    prompts: str = HfArg(default="bank", help="bank, llm, none, or a CSV file class_name;class_idx;prompt")
    prompts_per_class: int = HfArg(default=10, help="prompts of a class, cycled over its images")
    uncommon: bool = HfArg(default=False, help="ask the language model for uncommon locations")
    llm: str = HfArg(default="meta-llama/Llama-3.1-8B-Instruct", help="instruct model of --prompts llm")
    # generation
    variations: int | None = HfArg(default=None, help="synthetic images of a real one, M (recipe)")
    strength: float = HfArg(default=0.7, help="t_0, share of the noise schedule")
    synthetic: str | None = HfArg(default=None, help="a run folder whose images are used, none generated")
    # weighting and training
    weighting: bool = HfArg(default=True, help="weigh synthetic images by a filter classifier")
    synthetic_probability: float = HfArg(default=0.7, help="that a draw of a real image becomes synthetic")
    iterations: int | None = HfArg(default=None, help="training steps of an epoch (recipe)")
    frozen: bool | None = HfArg(default=None, help="train the linear head only (recipe)")
    filter_epochs: int = HfArg(default=30, help="epochs of the filter classifier, at most")


PHOTO = "a photo of a {}"
TEMPLATES = [  # of Textual Inversion
    PHOTO,
    "a photo of one {}",
    "a photo of the {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a dark photo of a {}",
    "a good photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a photo of a small {}",
    "a photo of a large {}",
    "a depiction of a {}",
]
SD14 = dict(  # inversion_batch_size counts the images of one class
    prompt=PHOTO, workers=8, diffusion="CompVis/stable-diffusion-v1-4", steps=50, guidance_scale=15.0,
    variations=10, sigmas=[0.0, 0.005, 0.01, 0.025], relative_sigma=False, generation_batch_size=8,
    inversion_steps=1000, inversion_batch_size=4, inversion_lr=2e-3, initializer="", examples_per_class=4,
    classifier="resnet50", pretrained=True, frozen=True, image_size=224, augment="resized", epochs=50,
    iterations=200, batch_size=32, optimizer="adam", lr=1e-4, weight_decay=0.0, warmup=0.0, eval_every=1,
)  # fmt: skip
RECIPES = {name: SD14 for name in common.DATASETS} | {
    "digits": SD14 | dict(
        workers=0, diffusion=str(common.ROOT / "digits_sd"), steps=25, guidance_scale=4.0,
        sigmas=[0.0, 0.33, 0.67, 1.67], relative_sigma=True, generation_batch_size=40, inversion_steps=100,
        inversion_lr=0.02, initializer="background", classifier="small_cnn", image_size=32,
        augment="digits", epochs=20, iterations=50, lr=1e-3,
    ),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------
# 3.1 Textual Inversion (Gal et al. 2022), and noise on the learned embeddings


class NewTokens:
    """Gives tokens the embeddings of `rows` [T, d], which can be trained, while active as a context manager.

    The tokens join the tokenizer and the text encoder's table if they are not there yet. A forward hook on
    the table looks them up in `rows`: nothing else of the table can move, and nothing has to be restored.
    On leaving, the table's own rows get the values.
    """

    def __init__(self, pipe, tokens: list[str], rows: torch.Tensor):
        self.pipe, self.rows = pipe, rows
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
            return torch.where(row[..., None] < 0, output, self.rows[row].to(output.dtype))

        self.handle = self.table.register_forward_hook(look_up)
        return self

    def __exit__(self, *_):
        self.handle.remove()
        self.table.weight.data[self.ids] = self.rows.detach().to(self.table.weight.dtype)


def initial_embeddings(pipe, class_names: list[str], initializer: str = "") -> torch.Tensor:
    """[K, d]: the mean embedding of the tokens of `initializer`, or of each class's name if it is empty."""
    table, rows = pipe.text_encoder.get_input_embeddings().weight.detach().float(), []
    for name in class_names:
        ids = pipe.tokenizer(initializer or name, add_special_tokens=False).input_ids
        if not ids:
            raise common.UserError(
                f"the tokenizer has no token for '{initializer or name}'; see --initializer"
            )
        rows.append(table[ids].mean(0))
    return torch.stack(rows)


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
    state: dict | None = None,
    save=None,
    save_every: int = 100,
) -> torch.Tensor:
    """Learns an embedding for each token from its few images: [T, d], float32.

    images [N, 3, H, W] in [0, 1], labels [N] index `tokens`; start [T, d]. Each step takes batch_size images
    of every class. The loss is the denoising error, summed over classes, and Adam works row by row, so the
    embedding of a class does not depend on which others train beside it; keys [T] (0..T-1) seed its draws.
    state: what `save` was called with last (every save_every steps and at the end), to go on from.
    Raises UserError when the loss is not a number.
    """
    device, scheduler = pipe.device, pipe.scheduler
    T, keys = len(tokens), keys or range(len(tokens))
    with torch.no_grad():
        latents = [common.encode(pipe, x).float() for x in ((images, images.flip(-1)) if flip else (images,))]
        latents = torch.stack(latents)  # [1 or 2, N, C, h, w]
    members = [(labels == c).nonzero()[:, 0] for c in range(T)]
    rows = nn.Parameter(start.clone().to(device))
    optimizer = torch.optim.AdamW([rows], lr, weight_decay=0.0)
    first = 0
    if state:
        first, rows.data = state["step"], state["rows"].to(device)
        optimizer.load_state_dict(state["optimizer"])
    with NewTokens(pipe, tokens, rows):
        bar = tqdm(range(first, steps), "textual inversion", initial=first, total=steps)
        for step in bar:
            parts = []
            for c in range(T):
                g = common.generator(seed, keys[c], step)
                i = members[c][torch.randint(len(members[c]), (batch_size,), generator=g)]
                z = latents[torch.randint(len(latents), (batch_size,), generator=g).to(device), i.to(device)]
                t = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=g)
                noise = torch.randn(z.shape, generator=g)
                template = torch.randint(len(templates), (batch_size,), generator=g)
                parts.append((z, t, noise, [templates[k].format(tokens[c]) for k in template]))
            z, t, noise = (torch.cat([part[k] for part in parts]).to(device) for k in range(3))
            text, _ = pipe.encode_prompt([p for part in parts for p in part[3]], device, 1, False)
            noisy = scheduler.add_noise(z, noise, t)
            output = pipe.unet(noisy.to(pipe.unet.dtype), t, text.to(pipe.unet.dtype)).sample.float()
            target = noise
            if scheduler.config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(z, noise, t)
            loss = (output - target).square().mean((1, 2, 3)).view(T, -1).mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % 10 == 0 or step + 1 == steps:  # not always: a GPU would have to wait for it
                bar.set_postfix(loss=f"{loss.item() / T:.4f}", refresh=False)
                if not rows.isfinite().all():
                    raise common.UserError("Textual Inversion gives no numbers; lower --inversion_lr")
            if save and ((step + 1) % save_every == 0 or step + 1 == steps):
                save({"step": step + 1, "rows": rows.data, "optimizer": optimizer.state_dict()})
    return rows.detach()


def noisy_embeddings(rows, sigmas: list[float], generators: list[torch.Generator], relative=False):
    """S_v = S* + sigma_v n, n ~ N(0, I): rows [K, d] -> [K, V, d]; one generator per class.

    relative: sigma counts the root mean square of S*, which carries over between text encoders; the paper's
    0.005, 0.01 and 0.025 are about a third, two thirds and 1.7 of that of Stable Diffusion 1.4's vocabulary.
    """
    noise = torch.stack([torch.randn(len(sigmas), rows.shape[1], generator=g) for g in generators])
    sigma = torch.tensor(sigmas).view(1, -1, 1).to(rows)
    if relative:
        sigma = sigma * rows.square().mean(1).sqrt().view(-1, 1, 1)
    return rows[:, None] + sigma * noise.to(rows)


# ----------------------------------------------------------------------------------------------------------
# 3.2 Class-specific prompts: "a photo of a [adjective] {name} [weather] [location] [time of day]"

WORDS = {
    "adjective": "small large old new shiny dusty colourful dark bright wet weathered striped".split(),
    "weather": ["in the rain", "in the snow", "in thick fog", "in bright sunshine", "under a cloudy sky"],
    "location": [
        "on a beach", "in a forest", "in a city street", "in a kitchen", "on a mountain", "in a garden",
        "in a desert", "on a table", "beside a lake", "in front of a brick wall", "in an office", "on a roof",
    ],
    "time": ["at night", "at dawn", "in the early morning", "at noon", "at sunset"],
}  # fmt: skip
DIGIT_WORDS = {
    "adjective": list(common.COLOURS),
    "location": [f"on a {setting} background" for setting in common.SETTINGS],
}


def write_prompt(name: str, rng: np.random.Generator, words: dict[str, list[str]] = WORDS) -> str:
    """A random prompt of the paper's form, every optional part there or not with equal chances."""
    chosen = {part: str(rng.choice(options)) for part, options in words.items() if rng.random() < 0.5}
    adjective = chosen.pop("adjective", None)
    return " ".join(["a photo of a", *([adjective] if adjective else []), name, *chosen.values()])


def names_in(prompt: str, name: str) -> list[re.Match]:
    """Where `name` stands in a prompt as a word of its own: "car" is not in "carrot".

    In any case, but where it stands in its own case the others do not count: the class "A" in "a photo of A".
    """
    pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
    return [*re.finditer(pattern, prompt)] or [*re.finditer(pattern, prompt, re.IGNORECASE)]


def with_token(prompt: str, name: str, token: str) -> str:
    """The prompt with the class name, where it stands last, replaced by the token."""
    where = names_in(prompt, name)[-1]
    return prompt[: where.start()] + token + prompt[where.end() :]


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
    """`count` prompts from a language model's answer: whatever begins "a photo of", in a list of any kind.

    It ends with the line, a double quote or a bracket. What does not contain the class name exactly once is
    dropped; missing ones become "a photo of a {name}".
    """
    prompts, begin = [], r"\ba photo of "
    for line in re.findall(rf'{begin}(?:(?!{begin})[^"\u201d\r\n\[])*', answer, re.IGNORECASE):
        line = line.rstrip(" .,;'`*\\]")
        if len(names_in(line, name)) == 1 and line not in prompts:
            prompts.append(line)
    return (prompts + [PHOTO.format(name)] * count)[:count]


def ask_llm(model: str, class_names: list[str], count: int, uncommon: bool = False) -> dict[str, list[str]]:
    """`count` prompts per class from an instruct model. Raises UserError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextGenerationPipeline

    llm = common.from_pretrained(AutoModelForCausalLM, model, dtype="auto")
    tokenizer = common.from_pretrained(AutoTokenizer, model)
    if tokenizer.chat_template is None:
        raise common.UserError(f"--llm {model} has no chat template; take an instruct model")
    chat = TextGenerationPipeline(llm.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
    prompts = {}
    for name in tqdm(class_names, "asking for prompts"):
        place = UNCOMMON_PLACE if uncommon else COMMON_PLACE
        message = REQUEST.format(count=count, name=name, place=place)
        answer = chat(
            [{"role": "user", "content": message}], max_new_tokens=40 * count, do_sample=False,
            return_full_text=False,
        )[0]["generated_text"]  # fmt: skip
        prompts[name] = parse_answer(answer, name, count)
    return prompts


def write_prompts(path: Path, prompts: dict[str, list[str]], class_names: list[str]) -> None:
    """A CSV file of the authors' format, class_name;class_idx;prompt."""
    writer = csv.writer(file := io.StringIO(), delimiter=";", lineterminator="\n")
    writer.writerow(["class_name", "class_idx", "prompt"])
    for name, lines in prompts.items():
        writer.writerows([name, class_names.index(name), line] for line in lines)
    common.write_whole(path, file.getvalue())


def read_prompts(path: Path, class_names: list[str]) -> dict[str, list[str]]:
    """The prompts of a CSV file class_name;class_idx;prompt; a class without any gets "a photo of a {name}".

    Raises UserError, with the number of the line, for one that has other columns, an unknown class, or a
    prompt that does not contain the class name exactly once; and for a file without prompts.
    """
    prompts = {name: [] for name in class_names}
    known = {(name, str(i)) for i, name in enumerate(class_names)}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise common.UserError(f"cannot read the prompts {path}: {error}") from None
    reader = csv.reader(text.splitlines(), delimiter=";")
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if not row or (reader.line_num == 1 and row[:1] == ["class_name"]):
            continue
        if len(row) != 3:
            raise common.UserError(f"{where}: {len(row)} columns, not class_name;class_idx;prompt")
        name, index, prompt = (field.strip() for field in row)
        if (name, index) not in known:
            raise common.UserError(f"{where}: no class '{name}' of index {index}")
        if len(names_in(prompt, name)) != 1:
            raise common.UserError(f"{where}: the prompt must contain '{name}' exactly once")
        prompts[name].append(prompt)
    if not any(prompts.values()):
        raise common.UserError(f"{path} has no prompts")
    return {name: lines or [PHOTO.format(name)] for name, lines in prompts.items()}


# ----------------------------------------------------------------------------------------------------------
# Generation by img2img (SDEdit, Meng et al. 2022)


def stock_img2img(pipe, steps: int, strength: float):
    """The stock pipeline of pipe's parts, with DDIM. Raises UserError if no valid step is left."""
    from diffusers import StableDiffusionImg2ImgPipeline

    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.scheduler, _ = common.ddim(pipe, steps, strength)
    stock.set_progress_bar_config(disable=True)
    return stock


def img2img(
    pipe,
    latents,
    prompts: list[str],
    generators,
    *,
    steps: int = 50,
    strength: float = 0.7,
    guidance_scale=15.0,
) -> torch.Tensor:
    """Variations [B, 3, H, W] in [0, 1] of images given as scaled latents [B, 4, h, w] (SDEdit), one batch.

    Stock img2img with DDIM; a prompt and a CPU generator per image.
    """
    stock = stock_img2img(pipe, steps, strength)
    return stock(
        prompts, latents, strength=strength, num_inference_steps=steps, guidance_scale=guidance_scale,
        generator=generators, output_type="pt",
    ).images.float()  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# 3.3 Weighting: a filter classifier, its temperature, the weights of synthetic images, and draws by weight


class Probe(nn.Module):
    """A classifier of which only the last linear layer learns; its batch norm does not move either."""

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


def new_classifier(args, class_names: list[str]) -> nn.Module:
    classifier = common.build_classifier(
        args.classifier, class_names, args.image_size, args.pretrained, args.clip
    )
    return Probe(classifier) if args.frozen else classifier


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The T > 0 that minimises the negative log-likelihood of logits / T (Guo et al. 2017), by LBFGS."""
    log_t = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], lr=0.1, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits.detach() / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = F.cross_entropy(logits / log_t.detach().exp(), labels)
    return float(log_t.detach().exp()) if found <= F.cross_entropy(logits, labels) else 1.0


def confidences(args: Args, accelerator, data: common.Data, images: common.Images, views: int = 5):
    """Each image's confidence q [N] in its label, averaged over augmented views, by the filter classifier.

    The filter trains on the real images with RandAugment until its validation loss has not fallen for five
    epochs; its best weights count; its temperature is fitted on validation. Also returns that temperature and
    the logits and labels of the validation split.
    """
    torch.manual_seed(args.seed)
    net = new_classifier(args, data.class_names)
    optimizer = common.make_optimizer("adam", net, args.lr, 1e-2)
    model, optimizer = accelerator.prepare(net, optimizer)
    plain = args.augment.removesuffix("+randaugment")
    standard, strong = (
        common.make_transforms(args.image_size, augment)[0] for augment in (plain, f"{plain}+randaugment")
    )
    real = data.train.subset(range(len(data.train)), strong)
    best, losses = None, []
    quiet = not accelerator.is_main_process
    for epoch in tqdm(range(args.filter_epochs), "filter classifier", disable=quiet):
        common.seed_everything(args.seed, 10**6 + epoch)
        rng = np.random.default_rng([args.seed, 10**6 + epoch])
        drawn = draw_epoch(real.labels, 1, None, args.iterations * args.batch_size, 0.0, rng)
        loader = common.make_loader(real.subset(drawn), args.batch_size, accelerator, workers=args.workers)
        common.train_epoch(model, loader, optimizer, lambda _: args.lr, accelerator)
        logits, labels = common.predict(model, data.val, accelerator, args.workers)
        losses.append(F.cross_entropy(logits, labels).item())
        if losses[-1] == min(losses):
            best, val = {k: v.clone() for k, v in net.state_dict().items()}, (logits, labels)
        elif losses.index(min(losses)) < epoch - 4:
            break
    net.load_state_dict(best)
    temperature = fit_temperature(*val)
    common.seed_everything(args.seed, 2 * 10**6)
    viewed, labels = images.subset(range(len(images)), standard), torch.tensor(images.labels)
    logits = [common.predict(model, viewed, accelerator, args.workers)[0] for _ in range(views)]
    q = (torch.stack(logits) / temperature).softmax(2).mean(0)[torch.arange(len(labels)), labels]
    return q, temperature, val


def weights_of(confidence: torch.Tensor) -> torch.Tensor:
    """w(q) = min(1, 2 q) of [N, M] confidences, normalised over the M images of each real one.

    Where all M are zero they are equal.
    """
    w = (2 * confidence).clamp(max=1)
    w = torch.where(w.sum(1, keepdim=True) > 0, w, torch.ones_like(w))
    return w / w.sum(1, keepdim=True)


def draw_epoch(labels, variations: int, weights, count: int, probability: float, rng) -> np.ndarray:
    """`count` draws of an epoch: indices into N real images followed by their N * M synthetic ones.

    Class-balanced real images; each is replaced with `probability` by one of its M by weight [N, M]. Without
    weights (None) there are only real images.
    """
    labels = np.asarray(labels)
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    drawn = [rng.choice(members[c]) for c in rng.integers(len(members), size=count)]
    if weights is not None:
        for j, i in enumerate(drawn):
            if rng.random() < probability:
                drawn[j] = len(labels) + i * variations + rng.choice(variations, p=weights[i])
    return np.array(drawn)


# ----------------------------------------------------------------------------------------------------------
# The run


def learn_tokens(args: Args, run: common.Run, accelerator, pipe, data: common.Data) -> torch.Tensor:
    """Textual Inversion of every class [K, d], split over the processes by groups that fill a batch.

    A class's embedding is kept as embeddings/CLASS/learned_embeds.safetensors, which stock diffusers reads,
    and used if it is there. Where one of a group is missing the whole group trains, as it would have at once.
    """
    folder = Path(args.embeddings or run.path) / "embeddings"
    names, pixels = common.class_folders(data.class_names), common.resolution(pipe)
    files = [folder / name / "learned_embeds.safetensors" for name in names]
    real = data.train.subset(range(len(data.train)), common.make_transforms(pixels, "none")[1])
    start = initial_embeddings(pipe, data.class_names, args.initializer)
    groups = torch.arange(len(names)).split(max(1, args.generation_batch_size // args.inversion_batch_size))
    templates = [args.prompt] if args.dataset == "digits" else TEMPLATES
    for group in groups[accelerator.process_index :: accelerator.num_processes]:
        group = group.tolist()
        if all(files[c].exists() for c in group):
            continue
        members = [i for i, y in enumerate(real.labels) if y in group]
        path = run.path / f"inversion-{group[0]:04d}.pt"
        rows = textual_inversion(
            pipe, torch.stack([real[i][0] for i in members]),
            torch.tensor([group.index(real.labels[i]) for i in members]),
            [f"<{names[c]}>" for c in group], start[group], steps=args.inversion_steps,
            batch_size=args.inversion_batch_size, lr=args.inversion_lr, templates=templates,
            flip=args.augment != "digits", seed=args.seed, keys=group,
            state=run.load(path.name), save=lambda state, path=path: common.save_atomically(state, path),
        )  # fmt: skip
        for c, row in zip(group, rows.cpu(), strict=True):
            files[c].parent.mkdir(parents=True, exist_ok=True)
            if not files[c].exists():
                save_embedding(row, f"<{names[c]}>", files[c])
    accelerator.wait_for_everyone()
    return torch.stack([load_embedding(file, start.shape[1]) for file in files])


def save_embedding(row: torch.Tensor, token: str, path: Path) -> None:
    """A token's embedding [d] in the format of diffusers' load_textual_inversion, whole or not at all."""
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file({token: row}, temporary)
    temporary.replace(path)


def load_embedding(path: Path, width: int) -> torch.Tensor:
    """The only embedding [width] in a learned_embeds.safetensors. Raises UserError if there is none such."""
    from safetensors.torch import load_file

    try:
        (row,) = load_file(path).values()
        return row.float().reshape(width)
    except Exception as error:
        raise common.UserError(f"cannot read the embedding {path} ({error}); delete it") from None


def find_prompts(args: Args, run: common.Run, accelerator, data: common.Data) -> dict[str, list[str]]:
    """The prompts of each class, with its name in them: bank, llm (asked once) or a CSV file; kept in OUT.

    Those of an earlier run with other arguments, of which there is no checkpoint, are written anew.
    """
    names, path = data.class_names, run.path / "prompts.csv"
    if args.prompts == "none":
        return {name: [args.prompt.format(name)] for name in names}
    if args.prompts not in ("bank", "llm"):
        return read_prompts(Path(args.prompts), names)
    if run.main and not (path.exists() and any(run.path.glob("*.pt"))):
        if args.prompts == "llm":
            prompts = ask_llm(args.llm, names, args.prompts_per_class, args.uncommon)
        else:
            words, rng = DIGIT_WORDS if args.dataset == "digits" else WORDS, np.random.default_rng(args.seed)
            prompts = {n: [write_prompt(n, rng, words) for _ in range(args.prompts_per_class)] for n in names}
            prompts = {n: [p for p in lines if len(names_in(p, n)) == 1] for n, lines in prompts.items()}
        write_prompts(path, prompts, names)
    accelerator.wait_for_everyone()
    return read_prompts(path, names)


def generate(args: Args, run, accelerator, pipe, data: common.Data, rows, prompts, folder: Path):
    """M img2img variations of every real image, as files in `folder`; returns their records, and the seconds.

    rows: the tokens' embeddings [K, V, d], or None: the class's name stands in the prompt (Real Guidance).
    prompts: per class. Variants and prompts take turns within a class. Every image has its own generator; all
    images of all classes fill the batches; what exists is skipped.
    """
    names, pixels = common.class_folders(data.class_names), common.resolution(pipe)
    real = data.train.subset(range(len(data.train)), common.make_transforms(pixels, "none")[1])
    records, turn = [], dict.fromkeys(range(len(names)), 0)
    for i, y in enumerate(real.labels):
        for m in range(args.variations):
            name = data.class_names[y]
            prompt = prompts[name][turn[y] % len(prompts[name])]
            variant = turn[y] % rows.shape[1] if rows is not None else 0
            if rows is not None:
                prompt = with_token(prompt, name, f"<{names[y]}|{variant}>")
            turn[y] += 1
            record = {"file_name": f"{names[y]}/{i:06d}-{m:02d}.png", "label": y, "class_name": name}
            record |= {"guide": real.name(i), "guide_index": i, "prompt": prompt, "seed": [args.seed, i, m]}
            records.append(record)
    todo = [r for r in records if not (folder / r["file_name"]).exists()]
    if rows is not None and todo:
        tokens = [f"<{name}|{v}>" for name in names for v in range(rows.shape[1])]
        with NewTokens(pipe, tokens, rows.flatten(0, 1).to(pipe.device)):
            pass
    size, latents, state = args.generation_batch_size, {}, f"{folder.name}-seconds.pt"
    seconds = (run.load(state) or {"seconds": 0.0})["seconds"]
    run.save(state, {"seconds": seconds})
    batches = [records[b : b + size] for b in range(0, len(records), size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for batch in tqdm(mine, "generating", disable=not run.main):
        if not any(not (folder / r["file_name"]).exists() for r in batch):
            continue
        clock = time.time()
        with torch.no_grad():  # each real image is encoded once, alone: the same beside whichever others
            latents = {
                i: latents[i] if i in latents else common.encode(pipe, real[i][0][None])[0]
                for i in sorted({r["guide_index"] for r in batch})
            }
        images = img2img(
            pipe,
            torch.stack([latents[r["guide_index"]] for r in batch]),
            [r["prompt"] for r in batch],
            [common.generator(*r["seed"]) for r in batch],
            steps=args.steps,
            strength=args.strength,
            guidance_scale=args.guidance_scale,
        )
        for image, r in zip(images, batch, strict=True):
            common.save_png(image, folder / r["file_name"])
        seconds += time.time() - clock
        run.save(state, {"seconds": seconds})
    accelerator.wait_for_everyone()
    return records, seconds


def synthesize(args: Args, run, accelerator, pipe, data: common.Data, prompts, folder: Path):
    """Generates the images of args.method in `folder`: (their records, seconds)."""
    rows = None
    if args.method != "real_guidance":
        rows = learn_tokens(args, run, accelerator, pipe, data)
        generators = [common.generator(args.seed, 3, c) for c in range(len(rows))]
        rows = noisy_embeddings(rows, args.sigmas, generators, args.relative_sigma)
    return generate(args, run, accelerator, pipe, data, rows, prompts, folder)


def read_variations(args: Args, data: common.Data, folder: Path) -> list[dict]:
    """The records of another run's images in `folder`. UserError if they vary other training images."""
    records = common.read_records(folder, data.class_names)
    try:
        theirs = json.loads((folder.parent / "config.json").read_text())["args"]
    except (OSError, ValueError, KeyError) as error:
        raise common.UserError(
            f"--synthetic: cannot read {folder.parent / 'config.json'} ({error})"
        ) from None
    for name in ("dataset", "seed", "examples_per_class", "variations"):
        if theirs.get(name) != getattr(args, name):
            raise common.UserError(
                f"--synthetic: {args.synthetic} has --{name} {theirs.get(name)}, "
                f"this run --{name} {getattr(args, name)}; its images vary others"
            )
    if [r["guide_index"] for r in records] != [
        i for i in range(len(data.train)) for _ in range(args.variations)
    ]:
        raise common.UserError(f"--synthetic: images in {folder} are missing; go on with that run first")
    return records


@dataclass
class Synthetic:
    """The M variations of each of N real images, in order: images (N * M), weights [N, M], their records."""

    images: common.Images
    weights: np.ndarray
    records: list[dict]


def weigh(args: Args, run, accelerator, data: common.Data, records: list[dict], folder: Path):
    """Weighs the images in `folder`, and writes that into their metadata: (Synthetic, what to report)."""
    sources = [common.keep_small(folder / r["file_name"], args.image_size) for r in records]
    images = common.Images(sources, [r["label"] for r in records], data.train.transform)
    plain = images.subset(range(len(images)), data.test.transform)
    about = {"synthetic": len(records)}
    if args.dataset == "digits":
        about["distances"], _ = common.distances_to_test(plain, data, accelerator)
    weights = torch.full((len(data.train), args.variations), 1 / args.variations)
    if args.weighting:
        if (known := run.load("filter.pt")) is None:
            q, temperature, (logits, y) = confidences(args, accelerator, data, plain)
            before, after = common.scores(logits, y), common.scores(logits / temperature, y)
            report = {"temperature": temperature, "accuracy": before["top1"]}
            report |= {k: before[k] for k in ("ece", "nll")}
            report |= {f"{k}_calibrated": after[k] for k in ("ece", "nll")}
            if run.main:
                series = {"before": (logits, y), "after": (logits / temperature, y)}
                common.save_reliability(series, run.path / "filter.png")
            run.save("filter.pt", known := {"confidence": q, "report": report})
        q, about["filter"] = known["confidence"], known["report"]
        weights = weights_of(q.view(len(data.train), args.variations))
        for r, confidence in zip(records, q.tolist(), strict=True):
            r["confidence"] = confidence
    for r, w in zip(records, weights.flatten().tolist(), strict=True):
        r["weight"] = w
    run.write_lines("metadata.jsonl" if args.synthetic else f"{folder.name}/metadata.jsonl", records)
    weights = weights.double().numpy()
    return Synthetic(images, weights / weights.sum(1, keepdims=True), records), about


def save_pictures(run, data: common.Data, made: dict[str, Synthetic], M: int) -> None:
    """samples/: real | variations by each method, with prompts and weights; the last one's lowest weights."""

    def caption(record: dict) -> str:
        return f"{record['prompt']}, {record['weight'] * M:.2f}"

    last = list(made)[-1]
    count = {title: min(M, 5 if len(made) == 1 else 4 if title == last else 2) for title in made}
    tiles, captions = [], []
    for i in np.linspace(0, len(data.train) - 1, min(6, len(data.train))).astype(int):
        tiles.append(common.open_image(data.train.sources[i]))
        captions.append("real")
        for title, synthetic in made.items():
            of_i = slice(i * M, i * M + count[title])
            tiles += synthetic.images.sources[of_i]
            captions += [f"{title}: {caption(r)}" for r in synthetic.records[of_i]]
    columns = 1 + sum(count.values())
    common.save_captioned(tiles, captions, run.path / "samples" / "variations.png", columns)
    images, records = made[last].images, made[last].records
    low = sorted(range(len(records)), key=lambda j: records[j]["weight"])[:12]
    captions = [caption(records[j]) for j in low]
    common.save_captioned([images.sources[j] for j in low], captions, run.path / "samples" / "lowest.png", 6)


def train(args, run, accelerator, data, synthetic: Synthetic | None, files: tuple[str, str], title: str):
    """Trains a classifier; the epoch that is best on the validation split counts. Returns scores and log.

    files: of the checkpoint and of the metrics.
    """
    torch.manual_seed(args.seed)
    net = new_classifier(args, data.class_names)
    optimizer = common.make_optimizer(args.optimizer, net, args.lr, args.weight_decay)
    model, optimizer = accelerator.prepare(net, optimizer)
    real, val = data.train, data.val
    images = real + synthetic.images if synthetic else real
    parts = {"model": net, "optimizer": optimizer}
    progress = run.resume(files[0], {"epoch": 0, "log": [], "training": 0.0, "best": None}, **parts)
    start = progress["epoch"]
    bar = tqdm(range(start, args.epochs), title, initial=start, total=args.epochs, disable=not run.main)
    for epoch in bar:
        clock = time.time()
        common.seed_everything(args.seed, epoch)
        drawn = draw_epoch(
            real.labels, args.variations, synthetic and synthetic.weights, args.iterations * args.batch_size,
            args.synthetic_probability, np.random.default_rng([args.seed, epoch]),
        )  # fmt: skip
        loader = common.make_loader(images.subset(drawn), args.batch_size, accelerator, workers=args.workers)
        line = {"epoch": epoch + 1, "synthetic_share": float((drawn >= len(real)).mean())}
        line |= common.train_epoch(model, loader, optimizer, lambda _: args.lr, accelerator)
        progress["training"] += time.time() - clock
        score = common.scores(*common.predict(model, val, accelerator, args.workers))
        line |= {"val": score["top1"], "val_nll": score["nll"]}
        if progress["best"] is None or score["top1"] > progress["best"]["val"]:
            weights = {k: v.clone() for k, v in net.state_dict().items()}
            progress["best"] = {"val": score["top1"], "epoch": epoch + 1, "weights": weights}
        progress["log"].append(line)
        bar.set_postfix({k: f"{v:.3f}" for k, v in line.items() if isinstance(v, float)})
        progress["epoch"] = epoch + 1
        run.write_lines(files[1], progress["log"])
        run.checkpoint(files[0], progress, **parts)
    best = progress["best"]
    net.load_state_dict(best["weights"])
    final = common.evaluate(model, data, accelerator, args.workers)
    return final | {"epoch": best["epoch"], "training": progress["training"]}, progress["log"]


METHODS = {"diagen": "DIAGen", "da_fusion": "DA-Fusion", "real_guidance": "Real Guidance"}


def resolve(args: Args) -> Args:
    """Fills the fields left open from the data set's recipe. Raises UserError for what cannot be."""
    args = common.fill_recipe(args, RECIPES, "diagen")
    common.check_choice("--method", args.method, METHODS)
    common.check_at_least(1, args, "variations", "iterations", "inversion_batch_size", "filter_epochs")
    common.check_at_least(1, args, "prompts_per_class")
    if not args.sigmas or min(args.sigmas) < 0:
        raise common.UserError(f"--sigmas {args.sigmas} must not be negative")
    if not 0 <= args.synthetic_probability <= 1:
        raise common.UserError("--synthetic_probability must lie between 0 and 1")
    return as_method(args, args.method)


def as_method(args: Args, method: str) -> Args:
    """The settings that make DIAGen one of METHODS: DA-Fusion is DIAGen without its three parts."""
    args = dataclasses.replace(args, method=method)
    if method != "diagen":
        args.sigmas, args.prompts, args.weighting = [0.0], "none", False
    return args


def check(args: Args, accelerator, pipe, data: common.Data) -> None:
    """Raises UserError for the mistakes that would otherwise show only after the images are generated."""
    classifier = new_classifier(args, data.class_names)
    common.make_optimizer(args.optimizer, classifier, args.lr, args.weight_decay)
    common.make_loader(data.train, args.batch_size, accelerator)
    stock_img2img(pipe, args.steps, args.strength)
    if args.method != "real_guidance":
        initial_embeddings(pipe, data.class_names, args.initializer)


def run_once(args: Args, accelerator) -> dict:
    """One run in args.out, with its baselines; a finished run's result is read from its folder."""
    run = common.Run(args.out, args, accelerator, free=("seeds",))
    if result := run.result():
        return result
    data = common.data_of(args)
    if data.val is None:  # a quarter of the few images, at least one of each class
        rest, held = common.split_per_class(data.train.labels, 0.25, args.seed, at_least=1)
        if len(np.unique(np.asarray(data.train.labels)[rest])) < len(data.class_names):
            raise common.UserError(
                "too few images to hold some out for validation; give val/ or more per class"
            )
        data.val = data.train.subset(held, data.test.transform)
        data.train = data.train.subset(rest)
    jobs = {"standard augmentation": None} if args.real_only or args.baseline else {}
    if not args.real_only:
        if args.baseline and args.method == "diagen" and not args.synthetic:
            jobs["DA-Fusion"] = as_method(args, "da_fusion")
        jobs[METHODS[args.method]] = args
    if args.synthetic and not args.real_only:
        folder, seconds = Path(args.synthetic) / "synthetic", 0.0
        records = read_variations(args, data, folder)
    elif not args.real_only:
        pipe = common.load_pipeline(args.diffusion, accelerator.device)
        common.checkpoint_gradients(pipe, args.gradient_checkpointing)
        check(args, accelerator, pipe, data)
        prompts = {title: find_prompts(job, run, accelerator, data) for title, job in jobs.items() if job}
    result, logs, made = {}, {}, {}
    for title, job in jobs.items():
        main = title == list(jobs)[-1]
        synthetic, about = None, {"synthetic": 0, "generation": 0.0}
        if job:
            if not args.synthetic:
                folder = run.path / ("synthetic" if main else job.method)
                records, seconds = synthesize(job, run, accelerator, pipe, data, prompts[title], folder)
            synthetic, about = weigh(job, run, accelerator, data, records, folder)
            about["generation"], made[title] = seconds, synthetic
            if run.main:
                save_pictures(run, data, made, args.variations)
        name = "checkpoint" if main else re.sub(r"\W", "_", title)
        files = (f"{name}.pt", "metrics.jsonl" if main else f"{name}.jsonl")
        scores, logs[title] = train(args, run, accelerator, data, synthetic, files, title)
        result[title] = scores | about
    return run.finish(result, logs)


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
    common.cli(main, Args)
