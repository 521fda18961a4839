"""Draws samples/inside.png of a finished run: the symbols of the paper at work on the run's own images.

    python digits/inside.py runs/actgen-digits-s0       or a run folder of dreamda.py or diagen.py

Reads what the run kept (config.json, synthetic/, latents/, embeddings/, votes/, TITLE.pt) and calls the
script's own samplers; their hook `on_step` gives what is drawn. The numbers in brackets are those of the
script's equations. What needs the true classes is drawn for digits alone, where the oracle reads them.
"""

import argparse
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rcParams
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402

TILE = 64  # pixels of an image in a picture
KEY = 4 * 10**6  # of the random draws, which no run uses
RIGHT, WRONG, PLAIN = "#2a9d55", "#d1495b", "#777777"
rcParams.update({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 7, "legend.frameon": False})


class Finished:
    """A finished run: its folder, script, arguments and data; pipe is None if the run drew no images."""

    def __init__(self, path: Path):
        """Raises UserError if the folder holds no run of one of the scripts."""
        given = common.read_file(path / "config.json", {"args": {}})["args"]
        scripts = [s for s in (actgen, dreamda, diagen) if s.Args.__annotations__.keys() <= given.keys()]
        common.require(scripts, f"{path} is no run folder of this version of the scripts")
        self.path, self.accelerator, self.pipe = path, common.make_accelerator(), None
        self.script, self.args = scripts[0], (args := argparse.Namespace(**given))
        self.images = Path(given.get("synthetic") or path, "synthetic")  # the folder of the images
        self.data = common.load_data(**given)
        if not (args.real_only or given.get("synthetic")):
            options = dict(checkpointing=args.gradient_checkpointing)
            self.pipe = common.load_pipeline(args.diffusion, self.accelerator.device, **options)


# Drawing ----------------------------------------------------------------------------------------------------


def tile(image: torch.Tensor) -> np.ndarray:
    """Resizes an image [3, H, W] or a mask [1, H, W] in [0, 1] to an array [TILE, TILE, 3]."""
    mode = "nearest-exact" if image.shape[-1] <= TILE else "area"
    image = F.interpolate(image[None].float().cpu(), (TILE, TILE), mode=mode)[0].clamp(0, 1)
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def sheet(axes, rows: list[list], columns=(), labels=(), right=(), under=(), title: str = "") -> None:
    """Draws rows of images; None leaves a place white.

    columns: texts above the columns; labels, right: texts left and right of the rows; under: rows of texts,
    one text below each image
    """
    lines = max((1 + text.count("\n") for texts in under for text in texts), default=0)
    high, wide, middle = TILE + 4 + 17 * lines, TILE + 4, TILE / 2 + 1
    canvas = np.ones((len(rows) * high, max(map(len, rows)) * wide, 3))
    places = [(r * high, c * wide, image) for r, row in enumerate(rows) for c, image in enumerate(row)]
    for y, x, image in places:
        if image is not None:
            canvas[y : y + TILE + 2, x : x + TILE + 2] = 0.8  # a frame, as an image may be white
            canvas[y + 1 : y + TILE + 1, x + 1 : x + TILE + 1] = tile(image)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_title(title, parse_math=False)
    axes.set_xticks([c * wide + middle for c in range(len(columns))], columns)
    axes.set_yticks([r * high + middle for r in range(len(labels))], labels)
    axes.tick_params(length=0, labelsize=9, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    for r, text in enumerate(right):
        axes.text(canvas.shape[1], r * high + middle, text, fontsize=9, va="center")
    for (y, x, _), text in zip(places, [text for texts in under for text in texts], strict=False):
        axes.text(x + middle, y + TILE + 3, text, ha="center", va="top", parse_math=False)


def curves(axes, lines: dict, title: str, xlabel: str = "step i", first: int = 0, **options) -> None:
    """Draws lines {name: (y, style)}, with x from `first` on; names that begin with "_" get no legend."""
    for name, (y, style) in lines.items():
        axes.plot(range(first, first + len(y)), y, style, label=name, linewidth=1.4, markersize=3)
    axes.set(title=title, xlabel=xlabel, **options)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def stack(images: common.Images, indices) -> torch.Tensor:
    """The images [N, 3, S, S] at these indices."""
    return torch.stack([images[int(i)][0] for i in indices])


@torch.no_grad()
def decoded(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Decodes latents [N, C, h, w], a few at a time, to images on the CPU."""
    return torch.cat([common.decode(pipe, z.to(pipe.device)).cpu() for z in latents.split(8)])


class Steps(list):
    """Records a sampler's steps, by on_step=steps.add, on the CPU; steps["x0"] stacks the x0 of all steps."""

    def add(self, i, t, values) -> None:
        self.append({"i": i, "t": int(t.max())} | {k: v.detach().float().cpu() for k, v in values.items()})

    def __getitem__(self, key):
        return torch.stack([step[key] for step in self]) if isinstance(key, str) else super().__getitem__(key)


# ActGen -----------------------------------------------------------------------------------------------------


def show_guides(run: Finished, records: list[dict], shown: list[dict], figure) -> None:
    """Draws how guides become variants, and the variants without the mask, L_contra or L_adv.

    records: of all synthetic images; the guided ones' latents are the bank; shown: the records to draw
    """
    args, pipe, names, bank = run.args, run.pipe, run.data.class_names, {}
    for record in records:
        latents = run.path / "latents" / f"{Path(record['file_name']).stem}.pt"
        bank.setdefault(record["label"], []).extend([common.read_file(latents)] * record["guided"])
    net, gen_val = common.load_classifier(run.path, "ActGen")[0], actgen.hold_out(args, run.data)[1]
    net, gen_val = net.to(pipe.device), common.for_generator(gen_val, pipe, args.square)
    y, centre = (torch.tensor([record[key] for record in shown]) for key in ("label", "centre"))
    indices = [record["guide_index"] for record in shown]
    guides = stack(gen_val, indices)

    def draw(**changes) -> torch.Tensor:
        options = common.options(actgen.generate, args) | dict(bank=bank, guidance_centre=centre) | changes
        generators = [common.generator(args.seed, KEY, i) for i in indices]
        return actgen.generate(pipe, guides, y, names, net, generators=generators, **options)[0]

    def p_of(images) -> torch.Tensor:
        """The classifier's probability of each image's label, [B] on the CPU."""
        size = args.image_size, args.image_size
        with torch.no_grad():
            logits = net(F.interpolate(images.to(pipe.device), size, mode="bilinear", antialias=True))
        return logits.float().softmax(1).cpu()[torch.arange(len(y)), y]

    steps = Steps()
    results = {"all parts": draw(on_step=steps.add), "without mask": draw(attention_mask=False)}
    results["without\n$L_{contra}$"] = draw(contrastive_weight=0.0)
    results["without $L_{adv}$"] = draw(adversarial_weight=0.0)
    x0 = [decoded(pipe, step["x0"]) for step in steps]
    with torch.no_grad():
        z_g = common.encode(pipe, guides).float().cpu()
    grid = figure.add_gridspec(len(y) + 1, 4, height_ratios=[*[2.95] * len(y), 2.1])
    axes, p = [figure.add_subplot(grid[-1, k]) for k in range(4)], torch.stack([*map(p_of, [guides, *x0])])
    for g, c in enumerate(y.tolist()):
        place = figure.add_subplot(grid[g, :])
        show_guide(place, pipe, steps, x0, guides, results, g)
        place.set_ylabel(f"guide {g + 1}: {names[c]}, p(y) = {p[0, g]:.2f}", fontsize=9, parse_math=False)
        z, colour, first = steps["x0"][:, g].flatten(1), f"C{g}", "_" * g  # one legend for all guides
        curves(axes[0], {f"guide {g + 1}": (steps["gamma"][:, g], colour)}, r"$\gamma_i$ (6)")
        norm = steps["gradient_norm"][: args.gradient_steps, g]
        curves(axes[1], {"_": (norm, colour)}, r"$\|\nabla_c L\|_2$ (3)")
        far = {first + "the guide": ((z - z_g[g].flatten()).norm(dim=1), f"{colour}--")}
        near = torch.cdist(z, torch.stack(bank[c]).float().flatten(1)).amin(1)
        far[first + "nearest in bank"] = near, colour
        curves(axes[2], far, r"distance of $\hat{x}_0$ to")
        curves(axes[3], {"_": (p[1:, g], colour)}, r"classifier's p(y) of $\hat{x}_0$", ylim=(-0.03, 1.03))
    axes[1].set_yscale("symlog", linthresh=1e-3)


def show_guide(axes, pipe, steps: Steps, x0: list[torch.Tensor], guides, results: dict, g: int) -> None:
    """Draws guide g, then x^_0 (1), m_t (6), x^g (5) and x~ (6) at up to eight steps, then the results.

    Once gamma is nearly 0, the guide is no longer mixed in, and m_t and x^g are left out.
    """
    mixing = max((i for i, step in enumerate(steps) if "m" in step), default=0)  # the last step with a guide
    shown = np.r_[np.linspace(0, mixing, 6), (mixing + len(steps) - 1) / 2, len(steps) - 1]
    shown = np.unique(shown.round().astype(int)).tolist()
    rows = [[guides[g]], [None], [None], [None]]
    for i in shown:
        step = steps[i]
        rows[0].append(x0[i][g])
        rows[1].append(step["m"][g] if "m" in step else None)
        rows[2].append(decoded(pipe, step["x_g"][g : g + 1])[0] if "x_g" in step else None)
        rows[3].append(decoded(pipe, step["x_tilde"][g : g + 1])[0])
    for row, images in zip(rows, results.values(), strict=True):
        row.append(images[g])
    columns = ["guide", *(f"i = {i}\nt = {steps[i]['t']}" for i in shown), "result"]
    labels = (r"$\hat{x}_0$  (1)", r"$m_t$  (6)", r"$x^g_{t-1}$  (5)", r"$\tilde{x}_{t-1}$  (6)")
    sheet(axes, rows, columns if g == 0 else (), labels, results)


# DreamDA ----------------------------------------------------------------------------------------------------


def show_variations(run: Finished, figure) -> None:
    """Draws an image's inversion (1) to (3), its variations (6), and the norms of noise and perturbation."""
    args, data, pipe, i = run.args, run.data, run.pipe, len(run.data.train) // 2
    image = common.for_generator(data.train, pipe, args.square)[i][0]
    name = data.class_names[data.train.labels[i]]
    prompt = args.prompt.replace("{}", name)
    path, steps, rows, count = Steps(), Steps(), {}, min(6, args.generation_batch_size)
    options = common.options(dreamda.invert, args) | {"on_step": path.add}
    inverted = dreamda.invert(pipe, image[None], [common.generator(args.seed, KEY, i)], **options)
    scales = [0, 0.5, 1, 2] if args.perturb != "none" and args.noise_scale else [0]
    for s in [args.noise_scale * scale for scale in scales]:
        n = count if s else 1  # without noise all are alike
        generators = [common.generator(args.seed, KEY, i, k) for k in range(n)]
        options = common.options(dreamda.vary, args) | {"noise_scale": s}
        options["on_step"] = steps.add if s == args.noise_scale else None
        sources = torch.zeros(n, dtype=torch.long)
        drawn = decoded(pipe, dreamda.vary(pipe, inverted, sources, [prompt] * n, generators, **options))
        rows[f"s = {s:g}"] = [*drawn.expand(count, -1, -1, -1)]

    grid = figure.add_gridspec(2, 2, height_ratios=[1, 3.2], width_ratios=[2.2, 1])
    path.sort(key=lambda step: step["i"])
    z = torch.cat([inverted.start.float().cpu(), *(step["z"] for step in path)])
    shown = np.unique(np.linspace(0, len(z) - 1, 9).round().astype(int)).tolist()
    columns = ["$z_T$", *(f"t = {t}" for t in inverted.steps.t[1:].tolist()), "$z_0$"]
    top = [[image, *decoded(pipe, z[shown])]]
    sheet(figure.add_subplot(grid[0, :]), top, ["source", *(columns[k] for k in shown)], ["path\n(1), (2)"])
    axes, title = figure.add_subplot(grid[1, 0]), f"{count} variations (6), {prompt}"
    sheet(axes, [*rows.values()], labels=[*rows], title=title)

    fresh = inverted.steps.sigma.flatten().cpu() * inverted.start[0].numel() ** 0.5
    noise = inverted.noise[:, 0].flatten(1).norm(dim=1).cpu()
    lines = {"inverted (3)": (noise, "C0"), "fresh": (fresh, "C0--")}
    if steps and "h_norm" in steps[0]:
        perturbation, h = (steps[key].mean(1) for key in ("perturbation_norm", "h_norm"))
        lines |= {r"$\|s\,n_t\|$ (6)": (perturbation, "C3"), r"$\|h\|$": (h, "C1")}
    curves(figure.add_subplot(grid[1, 1]), lines, r"norm of the noise $\sigma_t\xi_t$", yscale="log")


def show_votes(run: Finished, answers: dict[int, dict], figure) -> None:
    """Draws votes on eight images; curves of L_orth, label share and accuracy; answers: {epoch: votes}."""
    last, names = answers[max(answers)], run.data.class_names
    records = common.read_records(run.images, names)
    use = last["index"] < len(records)  # the others are unlabelled real images
    images = common.images_of(records, run.images, run.data.test.transform).subset(last["index"][use])
    source, truth = torch.tensor(images.labels), run.data.truth and run.data.truth(images, run.accelerator)
    split = torch.tensor([len(set(row)) for row in last["votes"][use].tolist()])
    # five hard ones, by disagreement, doubt and a wrong label of the source, and three easy ones
    hard = split - last["confidence"][use].mean(1) + (0.0 if truth is None else (truth != source).float())
    order = hard.argsort(descending=True, stable=True)
    chosen, rows = torch.cat([order[:5], order[5:][-3:]]), []  # rows: (title, labels, confidences or None)
    for epoch, answer in answers.items():
        for k, (vote, sure) in enumerate(zip(answer["votes"].T, answer["confidence"].T, strict=True)):
            rows.append((f"{'' if k else f'before epoch {epoch}, '}head {k + 1}", vote[use], sure[use]))
        rows.append(("label given", torch.where(answer["accepted"], answer["label"], -1)[use], None))
    rows += [("source's label", source, None)] + ([] if truth is None else [("true class", truth, None)])
    grid = figure.add_gridspec(2, 2, height_ratios=[1 + 0.2 * len(rows), 1.6])
    rows = [(title, labels[chosen], None if q is None else q[chosen]) for title, labels, q in rows]
    short = [str(c) if run.args.dataset == "digits" else name[:8] for c, name in enumerate(names)] + ["none"]
    truth = [None] * len(chosen) if truth is None else truth[chosen].tolist()
    texts, colours, axes = [], [], figure.add_subplot(grid[0, :])
    for _, labels, sure in rows:  # green if right, red if wrong
        cells = [*zip(labels.tolist(), [None] * len(chosen) if sure is None else sure, truth, strict=True)]
        kinds = [PLAIN if true is None else RIGHT if y == true else WRONG for y, _, true in cells]
        strength = [0.0 if y < 0 else 0.6 if q is None else 0.6 * float(q) for y, q, _ in cells]
        texts.append([short[y] if q is None else f"{short[y]}  {q:.2f}" for y, q, _ in cells])
        colours.append([to_rgba(*pair) for pair in zip(kinds, strength, strict=True)])
    axes.axis("off")
    axes.set(xlim=(0, len(chosen)), ylim=(5 + len(rows), 0))
    for c, image in enumerate(stack(images, chosen)):
        axes.imshow(tile(image), extent=(c + 0.15, c + 0.85, 4.7, 0), aspect="auto", interpolation="nearest")
    options = dict(cellLoc="center", rowLoc="right", bbox=(0, 0, 1, len(rows) / (5 + len(rows))))
    table = axes.table(texts, colours, rowLabels=[title for title, *_ in rows], **options)
    table.auto_set_font_size(False)
    for cell in table.get_celld().values():
        cell.set(edgecolor="white")
    log = common.read_file(run.path / "metrics.jsonl")
    log = [line for line in log if line["classifier"] == log[-1]["classifier"]]  # the last classifier's
    for k, keys in enumerate([["orthogonality"], ["labelled", "label_accuracy", "seed_accuracy"]]):
        lines = {key: ([line.get(key, np.nan) for line in log], f"C{j}.-") for j, key in enumerate(keys)}
        curves(figure.add_subplot(grid[1, k]), lines, ["$L_{orth}$ (8)", "labels (9)"][k], "epoch", 1)


# DIAGen -----------------------------------------------------------------------------------------------------


def show_tokens(run: Finished, records: list[dict], figure) -> None:
    """Draws images of a token as it is learned (1), and one image's variations by sigma (2) and by prompt."""
    args, pipe, names, t_0 = run.args, run.pipe, run.data.class_names, run.args.strength[0]
    real, y = common.for_generator(run.data.train, pipe, args.square), records[len(records) // 2]["label"]
    images = stack(real, [i for i, label in enumerate(real.labels) if label == y])
    with torch.no_grad():
        z = common.encode(pipe, images[:1])

    # the class's token is learned once more, as the run learned it
    start = diagen.initial_embedding(pipe, names[y], args.initializer)
    options, steps, n = diagen.inversion_options(args), Steps(), args.inversion_steps
    diagen.textual_inversion(pipe, images, "<S>", start, seed=(args.seed, y), on_step=steps.add, **options)
    moments = sorted({max(1, min(100, n) // 4), max(1, min(100, n) // 2), min(100, n), n})
    learned = torch.stack([start.cpu(), *(steps[k - 1]["S"] for k in moments)])

    def draw(texts: list[str], z: torch.Tensor, strength: float, key: int = 0) -> list[torch.Tensor]:
        """One img2img image per prompt, all from the latents z [1, C, h, w] and the same random numbers."""
        options, key = common.options(diagen.img2img, args) | {"strength": strength}, (args.seed, KEY, y, key)
        return [diagen.img2img(pipe, z, [p], [common.generator(*key)], **options)[0].cpu() for p in texts]

    tokens = [f"<S|{k}>" for k in range(len(learned))]
    diagen.place_tokens(pipe, tokens, learned)
    prompts = [args.prompt.replace("{}", token) for token in tokens]
    rows = [[image, *draw(prompts, 0 * z, 1.0, k)] for k, image in enumerate(images[:3])]
    S = diagen.read_embeddings(args.embeddings or run.path, names, pipe)
    generators = [common.generator(args.seed, 3, c) for c in range(len(S))]
    S = diagen.noisy_embeddings(S, args.sigmas, generators, args.relative_sigma)[y]
    folder = diagen.embedding_files("", names)[y].parent.name
    tokens = [f"<{folder}|{v}>" for v in range(len(S))]
    diagen.place_tokens(pipe, tokens, S)
    noisy = {f"σ = {sigma:g}": args.prompt.replace("{}", tokens[v]) for v, sigma in enumerate(args.sigmas)}
    written = [re.sub(r"\|\d+>", "|0>", record["prompt"]) for record in records if record["label"] == y]
    written = {textwrap.fill(p.replace(tokens[0], "S*"), 12, max_lines=4): p for p in dict.fromkeys(written)}
    panels = {f"one image under every σ (2), strength {t_0:g}": [*noisy.items()][:5]}
    panels |= {"one image under several prompts": [*written.items()][:4]}

    wide = 1.25 * (1 + max(map(len, panels.values())))
    grid = figure.add_gridspec(2, 2, width_ratios=[1 + len(learned), wide])
    columns, title = ["real", *(f"{k} steps" for k in (0, *moments))], f"{names[y]}: S* while it learns (1)"
    sheet(figure.add_subplot(grid[:, 0]), rows, columns, title=title)
    for k, (title, shown) in enumerate(panels.items()):
        captions, prompts = zip(*shown, strict=True)
        row, captions = [images[0], *draw(prompts, z, t_0)], ["real", *captions]
        sheet(figure.add_subplot(grid[k, 1]), [row], under=[captions], title=title)


def show_weights(run: Finished, records: list[dict], figure) -> None:
    """Draws the histogram of q (7) with w(q) (8) over it, and the images of lowest and of highest q."""
    q, wide = torch.tensor([record["confidence"] for record in records]), [1, 1.5]
    grid = figure.add_gridspec(1, 2, width_ratios=wide)
    kinds, images = {"images": (q, PLAIN)}, common.images_of(records, run.images, run.data.test.transform)
    if run.data.truth:
        right = run.data.truth(images, run.accelerator) == torch.tensor(images.labels)
        kinds = {"class right": (q[right], RIGHT), "class wrong": (q[~right], WRONG)}
    axes, (values, colours) = figure.add_subplot(grid[0]), zip(*kinds.values(), strict=True)
    axes.hist([v.numpy() for v in values], bins=20, range=(0, 1), stacked=True, color=colours, label=[*kinds])
    axes.set(xlabel="confidence q (7)", ylabel="images")
    axes.legend(loc="center left")
    (weight := axes.twinx()).plot([0, 0.5, 1], [0, 1, 1], "k", linewidth=1.4)
    weight.set(ylabel="w(q) = min(1, 2q) (8)", ylim=(0, 1.08))
    order, axes = q.argsort(stable=True).tolist(), figure.add_subplot(grid[1])
    ends = order[:6], order[-6:][::-1]
    captions = [[f"{records[j]['class_name'][:11]}\nq = {q[j]:.2f}" for j in end] for end in ends]
    sheet(axes, [[*stack(images, end)] for end in ends], labels=["lowest", "highest"], under=captions)


def parts_of(run: Finished) -> list[tuple]:
    """The parts of a run's picture: pairs of a height in inches and a function that draws into a figure."""
    args, parts = run.args, []
    own = run.path / ("metadata.jsonl" if run.pipe is None else "synthetic/metadata.jsonl")
    records = common.read_file(own, [])
    if run.script is actgen:
        latest = {record["label"]: record for record in records if record["guided"]}  # of each class
        shown = [*latest.values()][: min(3, args.generation_batch_size)]
        return [(2.95 * len(shown) + 2.1, partial(show_guides, run, records, shown))] if shown else []
    if run.script is dreamda:
        answers = {int(f.stem): common.read_file(f) for f in sorted((run.path / "votes").glob("*.pt"))}
        rows = sum(1 + answer["votes"].shape[1] for answer in answers.values())
        parts += [(4.6, partial(show_variations, run))] if run.pipe else []
        return parts + ([(3.2 + 0.2 * rows, partial(show_votes, run, answers))] if answers else [])
    diagen.add_validation(args, run.data)  # it may take some of the training images
    learned = run.pipe and records and args.method != "real_guidance"
    parts += [(3.9, partial(show_tokens, run, records))] if learned else []
    weighed = "confidence" in (records or [{}])[0]
    return parts + ([(2.8, partial(show_weights, run, records))] if weighed else [])


def draw(path: Path) -> None:
    """Draws samples/inside.png of a run. Raises UserError if the run kept nothing to draw."""
    common.require(parts := parts_of(Finished(path)), f"{path} has no images that the method drew")
    high = [height for height, _ in parts]
    figure = Figure(figsize=(9, sum(high)), layout="constrained")
    places = figure.subfigures(len(high), 1, squeeze=False, height_ratios=high)[:, 0]
    for k, place in enumerate(places):
        parts[k][1](place)
    (path / "samples").mkdir(exist_ok=True)
    figure.savefig(path / "samples" / "inside.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder")
    try:
        draw(parser.parse_args().run)
    except common.UserError as error:
        parser.error(str(error))
