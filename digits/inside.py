"""Draws samples/inside.png at the end of a run: the symbols of the paper at work on the run's own images.

The numbers in brackets are those of the script's equations. The samplers' hook `on_step` gives what is drawn.
The random draws are the picture's own, so it changes nothing in a run. What needs the true class is drawn for
digits alone, where the oracle reads it.
"""

import io
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common

TILE = 64  # pixels of an image in a picture
KEY = 4 * 10**6  # of the random draws, which no run uses
RIGHT, WRONG, PLAIN = "#2a9d55", "#d1495b", "#777777"


# ----------------------------------------------------------------------------------------------------------
# Drawing


def new_figure(height: float):
    """A figure of 9 inches' width, in a small type."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), layout="constrained")


def save(figure, run) -> None:
    """Writes samples/inside.png, whole or not at all."""
    path = run.path / "samples" / "inside.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(buffer := io.BytesIO(), dpi=120)
    (temporary := path.with_suffix(".tmp")).write_bytes(buffer.getvalue())
    temporary.replace(path)


def to_draw(run) -> bool:
    """Whether this process has a picture to draw: the main one, once in a run."""
    return run.main and not (run.path / "samples" / "inside.png").exists()


def tile(image: torch.Tensor) -> np.ndarray:
    """An image [3, H, W], or a mask [1, H, W], in [0, 1] as [TILE, TILE, 3]."""
    mode = "nearest-exact" if image.shape[-1] <= TILE else "area"
    image = F.interpolate(image[None].float().cpu(), (TILE, TILE), mode=mode)[0].clamp(0, 1)
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy()


def sheet(axes, rows: list[list], columns=(), labels=(), right=(), under: list[list] = ()) -> None:
    """Draws rows of images; None leaves a place white.

    columns, labels and right: texts above the columns, and left and right of the rows; under: below images
    """
    lines = max((1 + text.count("\n") for texts in under for text in texts), default=0)
    high, wide = TILE + 4 + 17 * lines, TILE + 4
    canvas = np.ones((len(rows) * high, max(map(len, rows)) * wide, 3))
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            if image is not None:
                y, x = r * high, c * wide
                canvas[y : y + TILE + 2, x : x + TILE + 2] = 0.8  # a frame, as an image may be white
                canvas[y + 1 : y + TILE + 1, x + 1 : x + TILE + 1] = tile(image)
    axes.imshow(canvas, interpolation="nearest")
    middle = TILE / 2 + 1
    axes.set_xticks([c * wide + middle for c in range(len(columns))], columns)
    axes.set_yticks([r * high + middle for r in range(len(labels))], labels)
    axes.tick_params(length=0, labelsize=9, top=False, labeltop=True, bottom=False, labelbottom=False)
    for r, text in enumerate(right):
        axes.text(canvas.shape[1], r * high + middle, text, fontsize=9, va="center")
    for r, texts in enumerate(under):
        for c, text in enumerate(texts):
            x, y = c * wide + middle, r * high + TILE + 3
            axes.text(x, y, text, fontsize=8, ha="center", va="top", parse_math=False)
    axes.spines[:].set_visible(False)


def curves(axes, lines: dict[str, tuple], title: str, first: int = 0, **options) -> None:
    """Draws {name: (y from x = first on, style)}; a name that begins with "_" is not in the legend."""
    for name, (y, style) in lines.items():
        axes.plot(range(first, first + len(y)), y, style, label=name, linewidth=1.4, markersize=3)
    axes.set(**options)
    axes.set_title(title, fontsize=9)
    axes.xaxis.label.set_size(8)
    axes.tick_params(labelsize=8)
    if any(not name.startswith("_") for name in lines):
        axes.legend(fontsize=7, frameon=False)


def distinct(keys, count: int) -> list[int]:
    """`count` positions in the list of keys: the first of each key, then others."""
    keys = list(keys)
    first = [i for i, key in enumerate(keys) if key not in keys[:i]]
    return [*first, *(i for i in range(len(keys)) if i not in first)][:count]


@torch.no_grad()
def oracle_reads(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The digits [N] and the settings [N] that the oracle reads in images [N, 3, S, S] in [0, 1]."""
    from digits import judge

    oracle, images = judge.load_oracle(), F.interpolate(images.cpu(), (32, 32), mode="area")
    logits = torch.cat([oracle(part) for part in images.split(256)])
    digits, _, settings = logits.split(judge.HEADS, 1)
    return digits.argmax(1), settings.argmax(1)


def stack(images: common.Images, indices) -> torch.Tensor:
    """The images [N, 3, S, S] at these indices."""
    return torch.stack([images[int(i)][0] for i in indices])


def seen_by(pipe, images: common.Images, square: str) -> common.Images:
    """The images as the pipeline takes them."""
    return images.transformed(common.make_transforms(common.resolution(pipe), "none", square)[1])


@torch.no_grad()
def decoded(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Decodes latents [N, C, h, w] a few at a time; on the CPU."""
    return torch.cat([common.decode(pipe, z.to(pipe.device)).cpu() for z in latents.split(8)])


class Steps(list):
    """An `on_step` that keeps the values of all steps, on the CPU."""

    def __call__(self, i, t, values) -> None:
        self.append({"i": i, "t": int(t.max())} | {k: v.detach().float().cpu() for k, v in values.items()})

    def __getitem__(self, key):
        return torch.stack([step[key] for step in self]) if isinstance(key, str) else super().__getitem__(key)


# ----------------------------------------------------------------------------------------------------------
# ActGen


def show_actgen(args, run, pipe, net, gen_val, names: list[str]) -> None:
    """Draws three guides through all steps, and what comes of them without each part of the method.

    net: the trained classifier
    """
    records = common.read_file(run.path / "synthetic" / "metadata.jsonl", [])
    guided = [record for record in reversed(records) if record["guided"]]  # the latest first
    if not to_draw(run) or not guided:
        return
    import actgen

    gen_val, training = seen_by(pipe, gen_val, args.square), net.training
    indices = list(dict.fromkeys(record["guide_index"] for record in guided))[:32]
    kinds = [gen_val.labels[i] for i in indices]
    if args.dataset == "digits":  # one guide in each setting
        kinds = oracle_reads(stack(gen_val, indices))[1].tolist()
    indices = [indices[k] for k in distinct(kinds, min(3, args.generation_batch_size))]
    guides, labels = stack(gen_val, indices), torch.tensor([gen_val.labels[i] for i in indices])
    options = {name: getattr(args, name) for name in actgen.SAMPLER_ARGS}
    bank = {y: read_bank(run, guided, y) for y in labels.unique().tolist()}
    options |= {"classifier_size": args.image_size, "bank": bank, "guidance_centre": args.guidance_centre}

    def draw(**changes) -> torch.Tensor:
        generators = [common.generator(args.seed, KEY, i) for i in indices]
        changes = {"generators": generators} | options | changes
        return actgen.generate(pipe, guides, labels, names, net, **changes).images

    net.eval()
    steps = Steps()
    results = {
        "all parts": draw(on_step=steps),
        "without mask": draw(attention_mask=False),
        "without\n$L_{contra}$": draw(contrastive_weight=0.0),
        "without $L_{adv}$": draw(adversarial_weight=0.0),
    }
    x0 = [decoded(pipe, step["x0"]) for step in steps]
    p = torch.stack([p_of(net, args.image_size, x.to(pipe.device), labels) for x in [guides, *x0]])
    net.train(training)

    figure, G = new_figure(2.95 * len(guides) + 2.1), len(guides)
    grid = figure.add_gridspec(G + 1, 4, height_ratios=[2.95] * G + [2.1])
    for g, y in enumerate(labels.tolist()):
        axes = figure.add_subplot(grid[g, :])
        show_guide(axes, pipe, steps, x0, guides, results, g)
        axes.set_ylabel(f"guide {g + 1}: {names[y]}, p(y) = {p[0, g]:.2f}", fontsize=9, parse_math=False)
    bank = [bank[y] for y in labels.tolist()]
    with torch.no_grad():
        z_g = common.encode(pipe, guides).float().cpu()
    show_curves(
        [figure.add_subplot(grid[G, k]) for k in range(4)], steps, args.gradient_steps, z_g, bank, p[1:]
    )
    save(figure, run)


def read_bank(run, guided: list[dict], y: int) -> torch.Tensor:
    """The latents [N, C, h, w] of the latest 1,024 guided images of class y, with which L_contra compares."""
    stems = [Path(record["file_name"]).stem for record in guided if record["label"] == y]
    return torch.stack([common.read_file(run.path / "latents" / f"{stem}.pt") for stem in stems[:1024]])


@torch.no_grad()
def p_of(classifier, size: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The classifier's probability of each image's label, [B] on the CPU."""
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return classifier(images).float().softmax(1).cpu()[torch.arange(len(labels)), labels]


def show_curves(axes, steps: Steps, gradient_steps: int, z_g, bank: list, p) -> None:
    """Draws over the steps gamma, the gradient's norm, distances of x^_0 and the probability p [S, G]."""
    lines = [{}, {}, {}, {}]
    for g in range(len(z_g)):
        z, title, colour = steps["x0"][:, g].flatten(1), f"guide {g + 1}", f"C{g}"
        lines[0][title] = steps["gamma"][:, g], colour
        lines[1][title] = steps["gradient_norm"][:gradient_steps, g], colour
        lines[2][f"{'_' * g}the guide"] = (z - z_g[g].flatten()).norm(dim=1), f"{colour}--"
        lines[2][f"{'_' * g}nearest in bank"] = torch.cdist(z, bank[g].float().flatten(1)).amin(1), colour
        lines[3][f"_{g}"] = p[:, g], colour
    titles = (
        r"$\gamma_i$ (5)",
        r"$\|\nabla_c L\|_2$ (2)",
        r"distance of $\hat{x}_0$ to",
        r"classifier's p(y) of $\hat{x}_0$",
    )
    ranges = {}, {"yscale": "symlog"}, {"ylim": 0}, {"ylim": (-0.03, 1.03)}
    for axis, lines_of, title, options in zip(axes, lines, titles, ranges, strict=True):
        curves(axis, lines_of, title, xlabel="step i", **options)
    axes[1].set_yscale("symlog", linthresh=1e-3)


def show_guide(axes, pipe, steps: Steps, x0: list[torch.Tensor], guides, results: dict, g: int) -> None:
    """Draws guide g: equations (1), (5), (4) and (5) at eight steps, then the results."""
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
    labels = (r"$\hat{x}_0$  (1)", r"$m_t$  (5)", r"$x^g_{t-1}$  (4)", r"$\tilde{x}_{t-1}$  (5)")
    sheet(axes, rows, columns if g == 0 else (), labels, results)
    if shown[-1] > mixing:
        axes.text(
            7 * (TILE + 4) + TILE,
            1.95 * (TILE + 4),
            "γ ≈ 0, the guide\nis no longer mixed in",
            fontsize=8,
            ha="center",
            va="center",
        )


# ----------------------------------------------------------------------------------------------------------
# DreamDA


@torch.no_grad()
def votes(args, net, pool) -> dict[str, torch.Tensor]:
    """How the heads of MultiHead `net` vote on up to 200 images of the pool, and the label that follows.

    index [N], of the images; votes and their confidences [N, A]; label and accepted [N]
    """
    import dreamda

    training, device = net.training, next(net.parameters()).device
    index = torch.linspace(0, len(pool.images) - 1, min(200, len(pool.images))).round().long()
    net.eval()
    with torch.random.fork_rng(devices=[]):
        logits = torch.cat([net(stack(pool.images, part).to(device)).cpu() for part in index.split(64)])
    net.train(training)
    label, accepted = dreamda.synthetic_targets(args.labels, logits, args.threshold)
    confidence, vote = (logits[:, 1:] if args.labels == "amst" else logits).float().softmax(2).max(2)
    return {"index": index, "votes": vote, "confidence": confidence, "label": label, "accepted": accepted}


def show_dreamda(args, run, data, pool) -> None:
    """Draws the inversion and the perturbation of one training image, and how the heads vote on the pool."""
    answers = {int(f.stem): common.read_file(f) for f in sorted((run.path / "votes").glob("*.pt"))}
    if not to_draw(run) or (args.synthetic and not answers):
        return
    rows = sum(1 + answer["votes"].shape[1] for answer in answers.values())
    parts = ([4.6] if not args.synthetic else []) + ([3.2 + 0.2 * rows] if answers else [])
    figure = new_figure(sum(parts))
    blocks = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=parts)[:, 0]
    if not args.synthetic:
        show_variations(args, run, data, blocks[0])
    if answers:
        show_votes(args, run, data, pool, answers, blocks[-1])
    save(figure, run)


def show_variations(args, run, data, figure) -> None:
    """Draws an image's path (1) to (3), the size of its noise and of the perturbation, and variations (6)."""
    import dreamda

    pipe, i = common.load_pipeline(args.diffusion, run.accelerator.device), len(data.train) // 2
    image, name = seen_by(pipe, data.train, args.square)[i][0], data.class_names[data.train.labels[i]]
    inverting = {"method": args.inversion} | {key: getattr(args, key) for key in dreamda.INVERT_ARGS}
    inverting |= {
        "source_prompts": [common.fill_prompt(args.source_prompt, name)],
        "rows": 2 * args.generation_batch_size,
    }
    varying = {key: getattr(args, key) for key in dreamda.VARY_ARGS}
    path, steps, rows, count = Steps(), Steps(), {}, min(6, args.generation_batch_size)
    generators = [common.generator(args.seed, KEY, i)]
    inverted = dreamda.invert(pipe, image[None], generators, on_step=path, **inverting)
    for s in sorted({args.noise_scale * k for k in ((0, 0.5, 1, 2) if args.perturb != "none" else (0,))}):
        n = count if s else 1  # without noise all are alike
        generators = [common.generator(args.seed, KEY, i, k) for k in range(n)]
        options = varying | {"noise_scale": s, "on_step": steps if s == args.noise_scale else None}
        sources, prompts = torch.zeros(n, dtype=torch.long), [common.fill_prompt(args.prompt, name)] * n
        drawn = decoded(pipe, dreamda.vary(pipe, inverted, sources, prompts, generators, **options))
        rows[f"s = {s:g}"] = [*drawn.expand(count, -1, -1, -1)]

    grid = figure.add_gridspec(2, 2, height_ratios=[1, 3.2], width_ratios=[2.2, 1])
    path.sort(key=lambda step: step["i"])
    z = torch.cat([inverted.start.float().cpu(), *(step["z"] for step in path)])
    shown = np.unique(np.linspace(0, len(z) - 1, 9).round().astype(int)).tolist()
    columns = ["$z_T$", *(f"t = {t}" for t in inverted.steps.t[1:].tolist()), "$z_0$"]
    top = [[image, *decoded(pipe, z[shown])]]
    sheet(figure.add_subplot(grid[0, :]), top, ["source", *(columns[k] for k in shown)], ["path\n(1), (2)"])
    axes = figure.add_subplot(grid[1, 0])
    sheet(axes, [*rows.values()], labels=[*rows])
    axes.set_title(
        f"{count} variations (6), {common.fill_prompt(args.prompt, name)}", fontsize=9, parse_math=False
    )

    right, sigma = grid[1, 1].subgridspec(2, 1), inverted.steps.sigma.flatten().cpu()
    noise = inverted.noise[:, 0].flatten(1).norm(dim=1).cpu()
    lines = {"inverted (3)": (noise, "C0"), "fresh noise": (sigma * inverted.start[0].numel() ** 0.5, "C0--")}
    curves(figure.add_subplot(right[0]), lines, r"$\|\sigma_t\xi_t\|$ over the steps")
    if steps and "h_norm" in steps[0]:
        norms = {r"$\|h\|$": ("h_norm", "C1"), r"$\|s\,n_t\|$": ("perturbation_norm", "C3")}
        lines = {title: (steps[key].mean(1), colour) for title, (key, colour) in norms.items()}
        title = f"{args.perturb}, s = {args.noise_scale:g} (6)"
        curves(figure.add_subplot(right[1]), lines, title, xlabel="step", ylim=0)


def show_votes(args, run, data, pool, answers: dict[int, dict], figure) -> None:
    """Draws eight images of the pool with the heads' votes on them in some epochs, and curves over all.

    answers: by epoch, what `votes` found before it
    """
    last = answers[max(answers)]
    index, split = last["index"], torch.tensor([len(set(row)) for row in last["votes"].tolist()])
    source, truth = pool.source_labels[index], None if pool.truth is None else pool.truth[index]
    # five hard ones, by disagreement, doubt and a wrong label of the source, and three easy ones
    hard = split - last["confidence"].mean(1) + (0.0 if truth is None else (truth != source).float())
    order = hard.argsort(descending=True, stable=True)
    chosen = torch.cat([order[:5], order[5:][-3:]])

    rows = []  # (title, labels, confidences)
    for epoch, answer in answers.items():
        for k, (vote, sure) in enumerate(zip(answer["votes"].T, answer["confidence"].T, strict=True)):
            rows.append((f"{'' if k else f'before epoch {epoch}, '}head {k + 1}", vote, sure))
        rows.append(("label given", torch.where(answer["accepted"], answer["label"], -1), None))
    rows.append(("source's label", source, None))
    if truth is not None:
        rows.append(("true class", truth, None))
    rows = [(title, labels[chosen], None if q is None else q[chosen]) for title, labels, q in rows]
    short = [str(y) if args.dataset == "digits" else name[:8] for y, name in enumerate(data.class_names)]
    grid = figure.add_gridspec(2, 3, height_ratios=[1 + 0.2 * len(rows), 1.6])
    images, truth = stack(pool.images, index[chosen]), None if truth is None else truth[chosen]
    show_table(figure.add_subplot(grid[0, :]), images, rows, truth, [*short, "none"])

    panels = {
        "$L_{orth}$ (8)": {"_": "orthogonality"},
        "share of the pool with a label (9)": {"_": "labelled"},
        "share of them right": {"label given": "label_accuracy", "source's label": "seed_accuracy"},
    }
    log = list(run.logs.values())[-1]  # of the last classifier
    for k, (title, keys) in enumerate(panels.items()):
        series = {name: [line.get(key, np.nan) for line in log] for name, key in keys.items()}
        if not np.isnan([*series.values()]).all():
            lines = {name: (y, f"C{j}.-") for j, (name, y) in enumerate(series.items())}
            limits = {} if k == 0 else {"ylim": (-0.03, 1.03)}
            curves(figure.add_subplot(grid[1, k]), lines, title, 1, xlabel="epoch", **limits)


def show_table(axes, images, rows: list[tuple], truth: torch.Tensor | None, names: list[str]) -> None:
    """Draws N images side by side, and under each a column of labels, green if right and red if wrong.

    rows: (title, labels [N], their confidences [N] or None); names: of the classes, and of label -1
    """
    axes.axis("off")
    axes.set(xlim=(-1.5, len(images)), ylim=(5 + len(rows), 0))
    for c, image in enumerate(images):
        extent = (c + 0.15, c + 0.85, 4.2, 0)
        axes.imshow(tile(image), extent=extent, aspect="auto", interpolation="nearest")
    for r, (title, labels, confidences) in enumerate(rows):
        style = dict(
            fontsize=8, va="center", parse_math=False, weight="normal" if confidences is not None else "bold"
        )
        axes.text(-0.02, r + 5, title, ha="right", **style)
        for c, y in enumerate(labels.tolist()):
            colour = PLAIN if truth is None or y < 0 else RIGHT if y == truth[c] else WRONG
            if confidences is None:
                axes.text(c + 0.5, r + 5, names[y], ha="center", color=colour, **style)
            else:
                q = float(confidences[c])
                axes.barh(r + 5, 0.76, 0.86, c + 0.12, color=colour, alpha=0.6 * q, linewidth=0)
                axes.text(c + 0.5, r + 5, f"{names[y]}  {q:.2f}", ha="center", **style)


# ----------------------------------------------------------------------------------------------------------
# DIAGen


def show_diagen(args, run, pipe, data, synthetic) -> None:
    """Draws what a token learns and what noise and prompts do to one image; how the filter weighs the images.

    synthetic: the run's images, their weights and records
    """
    import diagen

    drawn, weighed = pipe is not None and diagen.learns_tokens(args), "confidence" in synthetic.records[0]
    if not to_draw(run) or not (drawn or weighed):
        return
    parts = ([3.9] if drawn else []) + ([2.8] if weighed else [])
    figure = new_figure(sum(parts))
    blocks = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=parts)[:, 0]
    if drawn:
        show_tokens(args, run, pipe, data, synthetic.records, blocks[0])
    if weighed:
        show_weights(args, synthetic, data.test.transform, blocks[-1])
    save(figure, run)


def show_tokens(args, run, pipe, data, records: list[dict], figure) -> None:
    """Draws a class's token while it learns (1); one image with every sigma (2); one with four prompts."""
    import diagen

    real = seen_by(pipe, data.train, args.square)
    y = shown_class(real)
    name, folder = data.class_names[y], common.class_folders(data.class_names)[y]
    images = stack(real, [i for i, label in enumerate(real.labels) if label == y])
    with torch.no_grad():
        z = common.encode(pipe, images[:1])

    def draw(prompts: list[str], z: torch.Tensor, strength: float, key: int = 0) -> list[torch.Tensor]:
        """An image by each prompt, all from the latents z [1, C, h, w] and by the same random draws."""
        options, drawn = dict(steps=args.steps, strength=strength, guidance_scale=args.guidance_scale), []
        for b in range(0, len(prompts), args.generation_batch_size):
            part = prompts[b : b + args.generation_batch_size]
            generators = [common.generator(args.seed, KEY, y, key) for _ in part]
            drawn += diagen.img2img(pipe, z.expand(len(part), -1, -1, -1), part, generators, **options).cpu()
        return drawn

    last = diagen.read_embeddings(Path(args.embeddings or run.path), data.class_names, pipe, args.vectors)[y]
    learned = common.read_file(run.path / "embeddings" / "learning.pt", {"learned": last})
    tokens = [f"<inside|{k}>" for k in range(len(learned))]
    with diagen.NewTokens(pipe, tokens, torch.stack([row.to(pipe.device) for row in learned.values()])):
        pass
    prompts = [common.fill_prompt(args.prompt, token) for token in tokens]
    grown = [[image, *draw(prompts, 0 * z, 1.0, k)] for k, image in enumerate([*images[:3], None, None][:3])]
    noisy = [common.fill_prompt(args.prompt, f"<{folder}|{v}>") for v in range(len(args.sigmas))][:5]
    written = [re.sub(r"\|\d+>", "|0>", r["prompt"]) for r in records if r["label"] == y]
    written = list(dict.fromkeys(written))[:4]

    grid = figure.add_gridspec(
        2, 2, width_ratios=[1 + len(learned), 1.25 * (1 + max(len(noisy), len(written)))]
    )
    axes = figure.add_subplot(grid[:, 0])
    sheet(axes, grown, ["real", *learned])
    axes.set_title(f"{name}: what S* draws while it learns (1)", fontsize=9)
    axes = figure.add_subplot(grid[0, 1])
    captions = [f"σ = {sigma:g}" for sigma in args.sigmas]
    sheet(axes, [[images[0], *draw(noisy, z, args.strength[0])]], under=[["real", *captions]])
    axes.set_title(f"one image under every σ (2), strength {args.strength[0]:g}", fontsize=9)
    axes = figure.add_subplot(grid[1, 1])
    captions = ["\n".join(textwrap.wrap(p.replace(f"<{folder}|0>", "S*"), 12)) for p in written]
    sheet(axes, [[images[0], *draw(written, z, args.strength[0])]], under=[["real", *captions]])
    axes.set_title("one image under several prompts", fontsize=9)


class Learning:
    """A hook for `diagen.textual_inversion`: keeps the embeddings S* (1) after some of its steps."""

    def __init__(self, start: torch.Tensor, steps: int):
        """start: [T, d], the embeddings before the first step; steps: how many there will be."""
        n = min(100, steps)
        self.moments, self.S = {n // 4, n // 2, n, steps}, {0: start}

    def __call__(self, i: int, t: torch.Tensor, values: dict) -> None:
        if i + 1 in self.moments:
            self.S[i + 1] = values["S"].cpu()

    def keep(self, group: list[int], data, folder: Path) -> None:
        """Writes what it kept of the class that the picture shows, if that class is in the group."""
        if (y := shown_class(data.train)) in group:
            moments = {f"{k} steps": S[group.index(y)].clone() for k, S in self.S.items()}
            common.write_file(folder / "embeddings" / "learning.pt", moments)


def shown_class(real: common.Images) -> int:
    """The class whose token the picture shows."""
    return real.labels[len(real) // 2]


def show_weights(args, synthetic, plain: common.Transform, figure) -> None:
    """Draws the histogram of q (7) with w(q) (8) over it, and the images of lowest and of highest q."""
    q = torch.tensor([record["confidence"] for record in synthetic.records])
    images = synthetic.images.transformed(plain)
    right = torch.ones(len(q), dtype=torch.bool)
    if args.dataset == "digits":
        right = oracle_reads(stack(images, range(len(images))))[0] == torch.tensor(images.labels)
    grid = figure.add_gridspec(1, 2, width_ratios=[1, 1.5])
    axes = figure.add_subplot(grid[0])
    kinds = {"class right": (q[right], RIGHT), "class wrong": (q[~right], WRONG)}
    kinds = kinds if args.dataset == "digits" else {"images": (q, PLAIN)}
    values, colours = zip(*kinds.values(), strict=True)
    axes.hist([v.numpy() for v in values], bins=20, range=(0, 1), stacked=True, color=colours, label=[*kinds])
    axes.axvline(0.5, color="k", linestyle=":", linewidth=1)
    axes.set(xlabel="confidence q (7); left of the dotted line the weight falls", ylabel="images")
    axes.xaxis.label.set_size(8)
    axes.legend(fontsize=7, loc="center left", frameon=False)
    weight = axes.twinx()
    weight.plot([0, 0.5, 1], [0, 1, 1], "k", linewidth=1.4)
    weight.set_ylabel("w(q) = min(1, 2q) (8)", fontsize=8)
    weight.set_ylim(0, 1.08)
    for axis in (axes, weight):
        axis.tick_params(labelsize=8)

    order, axes = q.argsort(stable=True).tolist(), figure.add_subplot(grid[1])
    ends = [order[:6], order[-6:][::-1]]
    captions = [[f"{images_name(synthetic, j)}\nq = {q[j]:.2f}" for j in end] for end in ends]
    sheet(axes, [[*stack(images, end)] for end in ends], labels=["lowest", "highest"], under=captions)


def images_name(synthetic, j: int) -> str:
    """The class that image j is meant to show, cut to fit under it."""
    return synthetic.records[j]["class_name"][:11]
