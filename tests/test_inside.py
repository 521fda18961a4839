"""The samplers' hook, against recomputed values; the pictures of a run; README's experiments."""

import functools
import io
import re
import shlex

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import actgen
import common
import diagen
import dreamda
from digits import inside, judge, world
from runs import in_this_process, lines_of, result_and_files

README = (common.ROOT / "README.md").read_text(encoding="utf-8")
ACTGEN = dict(prompt="a photo of a {}", guidance_scale=4.0, attention_resolution=8, nu=1.0)
TINY = {
    actgen: dict(
        epochs=4, images_per_epoch=4, generation_batch_size=3, steps=6, eval_every=4, examples_per_class=4,
        gradient_steps=3, genval_share=0.5,
    ),
    dreamda: dict(
        variations=2, steps=4, generation_batch_size=6, epochs=3, eval_every=3, batch_size=8, threshold=0.0,
        examples_per_class=1,
    ),
    diagen: dict(
        epochs=1, iterations=2, filter_epochs=1, batch_size=4, steps=4, variations=2, inversion_steps=4,
        inversion_batch_size=1, generation_batch_size=10, prompts_per_class=3, examples_per_class=1,
    ),
}  # fmt: skip
each_script = pytest.mark.parametrize("script", TINY, ids=[script.__name__ for script in TINY])


def generators(n, key=0):
    return [common.generator(key, i) for i in range(n)]


@pytest.fixture(scope="module")
def guides():
    """Three held-out digits: images [3, 3, 32, 32] and their labels."""
    r = world.render_pool(world.pools()["test"], 3, seed=5)
    return r["images"].permute(0, 3, 1, 2).float() / 255, r["labels"]


# --- the hook


@pytest.fixture(scope="module")
def guided(pipe, guides):
    """ActGen's steps, its result with the hook and without, its classifier and its bank."""
    oracle, steps = judge.load_oracle(), inside.Steps()
    bank = {int(y): torch.randn(5, 4, 16, 16, generator=common.generator(1)) for y in guides[1]}

    def classifier(x):
        return oracle(x)[:, :10]

    def draw(**options):
        options = ACTGEN | options | dict(generators=generators(3), bank=bank, steps=8, gradient_steps=4)
        return actgen.generate(pipe, *guides, world.NAMES, classifier, guidance_centre=3.0, **options)

    return steps, draw(on_step=steps), draw(), classifier, bank


def test_the_hook_changes_no_image(guided):
    steps, seen, unseen, *_ = guided
    assert torch.equal(seen.images, unseen.images) and torch.equal(seen.latents, unseen.latents)
    assert torch.equal(steps[-1]["x_tilde"], unseen.latents) and [step["i"] for step in steps] == [*range(8)]


def test_actgens_hook_gives_the_symbols_of_the_equations(pipe, guides, guided):
    steps, seen, _, classifier, bank = guided
    gamma = 1 - torch.sigmoid(torch.arange(8.0) - 3)
    assert torch.allclose(steps["gamma"], gamma[:, None].expand(8, 3))
    mask = F.interpolate(seen.masks, (16, 16), mode="bilinear")
    for step in steps:
        assert 0 <= step["m"].min() and step["m"].max() <= 1
    assert torch.equal(steps[-1]["m"], mask)

    # step 1 anew, with one graph from c to the loss
    x, c, a = (
        steps[0]["x_tilde"],
        steps[0]["c"].requires_grad_(),
        pipe.scheduler.alphas_cumprod[steps[1]["t"]],
    )
    _, empty = pipe.encode_prompt(["a"] * 3, "cpu", 1, True)
    eps_empty, eps = (pipe.unet(x, steps[1]["t"], text).sample for text in (empty, c))
    x0 = (x - (1 - a).sqrt() * (eps_empty + 4 * (eps - eps_empty))) / a.sqrt()
    assert torch.allclose(x0, steps[1]["x0"], atol=1e-3)
    norms, rho = [], 200 * (1024 / 16384) ** 0.5
    for b, y in enumerate(guides[1].tolist()):
        contra = (rho - (x0[b] - bank[y]).flatten(1).norm(dim=1)).clamp(min=0).mean()
        logits = classifier(common.decode(pipe, x0[b : b + 1], clamp=False))
        loss = contra - 0.1 * F.cross_entropy(logits, guides[1][b : b + 1])
        gradient = torch.autograd.grad(loss, c, retain_graph=True)[0][b]
        norms.append(gradient.norm())
        assert torch.allclose(steps[1]["c"][b], c[b] - gradient / gradient.norm(), atol=1e-3)
    assert steps[1]["gradient_norm"].tolist() == pytest.approx([float(n) for n in norms], rel=1e-2)
    assert not steps[4]["gradient_norm"].any()


def test_the_guides_trajectory_is_given_while_it_is_mixed_in(pipe, guides):
    steps = inside.Steps()
    options = ACTGEN | dict(generators=generators(3), steps=30, guidance_centre=2.0, on_step=steps)
    actgen.generate(pipe, *guides, world.NAMES, **options)
    assert ["x_g" in step for step in steps] == [float(step["gamma"][0]) > 1e-4 for step in steps]
    assert not steps["gradient_norm"].any() and 2 < sum("m" in step for step in steps) < 30


@pytest.mark.parametrize("method", ["cycle", "ddim"])
def test_dreamdas_hook_gives_the_path_and_its_noise(pipe, guides, method):
    path, options = inside.Steps(), dict(method=method, steps=6)
    inverted = dreamda.invert(pipe, guides[0], generators(3), on_step=path, **options)
    unseen = dreamda.invert(pipe, guides[0], generators(3), **options)
    assert torch.equal(inverted.start, unseen.start) and torch.equal(inverted.noise, unseen.noise)
    path.sort(key=lambda step: step["i"])
    z, text, s = path["z"], dreamda.embed(pipe, [""] * 3, 1.0), inverted.steps
    with torch.no_grad():
        assert torch.allclose(z[-1], common.encode(pipe, guides[0]))
        if method == "cycle":  # the sampler goes along the path by the noise
            for i, before in enumerate([inverted.start, *z[:-1]]):
                after = dreamda.mu_theta(pipe, before, s, i, text, 1.0) + path[i]["noise"]
                assert torch.allclose(after, z[i], atol=1e-4)
        else:
            eps = dreamda.predict_eps(pipe, z[0], s.t[0], s.previous[0], text)
            start = dreamda.ddim_mean(z[0], eps, s.previous[0], s.alpha[0], 0.0)
            assert torch.allclose(start, inverted.start, atol=1e-4)


def test_dreamdas_hook_gives_the_variations_and_the_size_of_the_perturbation(pipe, guides):
    inverted, steps, seen = dreamda.invert(pipe, guides[0], generators(3), steps=6), inside.Steps(), []
    options = dict(noise_scale=2.0, relative_noise=True, guidance_scale=4.0)
    call = (pipe, inverted, torch.arange(3), ["a photo of a two"] * 3)
    unseen = dreamda.vary(*call, generators(3), **options)
    first = pipe.unet.mid_block.register_forward_hook(lambda module, inputs, h: seen.append(h[-3:]))
    drawn = dreamda.vary(*call, generators(3), on_step=steps, **options)
    first.remove()
    assert torch.equal(drawn, unseen) and torch.equal(steps[-1]["y"], unseen)
    assert torch.equal(steps["noise"], inverted.noise)
    for h, step in zip(seen, steps, strict=True):
        assert torch.allclose(step["h_norm"], h.flatten(1).norm(dim=1))
        expected = 2 * h.flatten(1).std(1) * h[0].numel() ** 0.5
        assert torch.allclose(step["perturbation_norm"], expected, rtol=0.1)
    plain = inside.Steps()
    dreamda.vary(*call, generators(3), on_step=plain, perturb="none")
    assert "h_norm" not in plain[0]


def test_diagens_hook_gives_the_steps_of_equation_5(pipe, guides):
    steps, options = inside.Steps(), dict(steps=10, strength=0.7, guidance_scale=4.0)
    with torch.no_grad():
        z = common.encode(pipe, guides[0])
    call = (pipe, z, ["a photo of a two"] * 3)
    seen = diagen.img2img(*call, generators(3), on_step=steps, **options)
    assert torch.equal(seen, diagen.img2img(*call, generators(3), **options))
    with torch.no_grad():
        assert torch.equal(common.decode(pipe, steps[-1]["x"]), seen)
    alpha = pipe.scheduler.alphas_cumprod
    for before, step, after in zip(steps, steps[1:], steps[2:], strict=False):
        a, previous = alpha[step["t"]], alpha[after["t"]]
        eps = (before["x"] - a.sqrt() * step["x0"]) / (1 - a).sqrt()
        assert torch.allclose(
            step["x"], previous.sqrt() * step["x0"] + (1 - previous).sqrt() * eps, atol=1e-4
        )


def test_textual_inversions_hook_gives_the_embeddings(pipe, guides):
    learned, start = [], diagen.initial_embeddings(pipe, ["background"])
    call = (pipe, guides[0], torch.zeros(3, dtype=torch.long), ["<hook>"], start)
    options = dict(steps=3, batch_size=2, lr=0.02)
    rows = diagen.textual_inversion(*call, on_step=lambda i, t, v: learned.append((i, v["S"])), **options)
    assert [i for i, _ in learned] == [0, 1, 2] and torch.equal(learned[-1][1], rows)
    assert torch.equal(rows, diagen.textual_inversion(*call, **options))
    assert torch.equal(learned[0][1], diagen.textual_inversion(*call, **options | {"steps": 1}))


# --- the pictures


in_this_process = functools.partial(in_this_process, pictures=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick):
    """finished(script): the folder of a tiny run on digits, without baseline."""
    runs = {}

    def run(script):
        if script not in runs:
            runs[script] = tmp_path_factory.mktemp(script.__name__) / "run"
            status, _, stderr = in_this_process(script, "--no_baseline", **TINY[script], out=runs[script])
            assert status == 0, stderr
        return runs[script]

    return run


@each_script
def test_a_run_is_the_same_without_its_picture(script, finished, tmp_path, monkeypatch):
    expected, files = result_and_files(finished(script))
    width, height = Image.open(io.BytesIO(files.pop("samples/inside.png"))).size
    assert width == 1080 and height > 600
    monkeypatch.setattr(inside, f"show_{script.__name__}", lambda *_: None)
    monkeypatch.setattr(inside, "votes", lambda *_: {})
    arguments = TINY[script] | {"out": tmp_path / "run"}
    status, _, stderr = in_this_process(script, "--no_baseline", **arguments)
    assert status == 0, stderr
    assert result_and_files(tmp_path / "run") == (expected, files)


@each_script
def test_a_picture_is_drawn_once_and_again_if_it_is_gone(script, finished):
    out = finished(script)
    picture, result = out / "samples" / "inside.png", out / "result.json"
    drawn, scores = picture.read_bytes(), result.read_bytes()
    for content in (b"mine", None):
        result.unlink()
        picture.write_bytes(content) if content else picture.unlink()
        status, _, stderr = in_this_process(script, "--no_baseline", **TINY[script], out=out)
        assert status == 0, stderr
        assert picture.read_bytes() == (content or drawn) and result.read_bytes() == scores


@pytest.mark.parametrize("labels", ["head", "seed"])
def test_on_another_runs_images_dreamda_draws_the_votes_alone(labels, finished, tmp_path):
    source, out = finished(dreamda), tmp_path / "run"
    arguments = TINY[dreamda] | {"synthetic": source, "labels": labels, "out": out}
    assert in_this_process(dreamda, "--no_baseline", **arguments)[0] == 0
    picture = out / "samples" / "inside.png"
    assert picture.exists() == (labels == "head")
    if labels == "head":
        whole = Image.open(source / "samples" / "inside.png").height
        assert Image.open(picture).height < 0.7 * whole
        assert torch.load(out / "votes" / "003.pt")["votes"].shape == (20, 1)


def test_on_another_runs_images_diagen_draws_the_weights_alone(finished, tmp_path):
    source, out = finished(diagen), tmp_path / "run"
    arguments = TINY[diagen] | {"synthetic": source, "out": out}
    assert in_this_process(diagen, "--no_baseline", **arguments)[0] == 0
    heights = [Image.open(folder / "samples" / "inside.png").height for folder in (source, out)]
    assert heights[1] < 0.5 * heights[0]


def test_a_run_keeps_how_the_token_of_its_picture_was_learned(finished):
    args, folder = diagen.resolve(diagen.Args(**TINY[diagen], seed=0)), finished(diagen)
    data, learning = common.data_of(args), torch.load(folder / "embeddings" / "learning.pt")
    names, real = data.class_names, data.train.transformed(data.test.transform)
    y = inside.shown_class(real)
    pipe = common.load_pipeline(args.diffusion)
    assert list(learning) == ["0 steps", "1 steps", "2 steps", "4 steps"]
    start = diagen.initial_embeddings(pipe, [names[y]], args.initializer)
    assert torch.equal(learning["0 steps"], start[0])
    assert torch.equal(learning["4 steps"], diagen.read_embeddings(folder, names, pipe)[y])
    options = diagen.inversion_options(args) | dict(keys=[y], steps=2)
    call = (pipe, real[real.labels.index(y)][0][None], torch.zeros(1, dtype=torch.long), ["<again>"], start)
    again = diagen.textual_inversion(*call, **options)
    assert torch.allclose(learning["2 steps"], again[0], atol=1e-4) and not torch.equal(again, start)


def test_with_another_runs_tokens_the_picture_shows_them_learned(finished, tmp_path):
    arguments = TINY[diagen] | {"embeddings": finished(diagen), "out": tmp_path / "run"}
    assert in_this_process(diagen, "--no_baseline", **arguments)[0] == 0
    assert (tmp_path / "run" / "samples" / "inside.png").exists()
    assert not (tmp_path / "run" / "embeddings" / "learning.pt").exists()


@each_script
def test_on_real_images_alone_there_is_no_picture(script, quick, tmp_path):
    arguments = TINY[script] | {"out": tmp_path / "run"}
    assert in_this_process(script, "--real_only", **arguments)[0] == 0
    assert not (tmp_path / "run" / "samples" / "inside.png").exists()


@each_script
def test_images_of_ones_own_have_a_picture_without_truth(script, mine, quick):
    own = dict(dataset="folder", diffusion=common.DIGITS_SD, classifier="small_cnn", pretrained=False)
    own |= dict(
        image_size=32, augment="crop", lr=1e-3, workers=0, optimizer="adamw", prompt="a photo of a {}"
    )
    own |= dict(attention_resolution=8) if script is actgen else {}
    own |= TINY[script] | {"examples_per_class": 0} | mine
    status, _, stderr = in_this_process(script, "--no_baseline", **own)
    assert status == 0 and (mine["out"] / "samples" / "inside.png").exists(), stderr


def test_the_votes_are_those_of_the_heads(finished):
    out = finished(dreamda)
    args = dreamda.resolve(dreamda.Args(**TINY[dreamda], out=str(out), baseline=False))
    data, accelerator = common.data_of(args), common.make_accelerator()
    records = lines_of(out / "synthetic" / "metadata.jsonl")
    pool, _ = dreamda.make_pool(args, accelerator, data, out / "synthetic", records)
    net, *_ = common.new_classifier(
        args, accelerator, data.class_names, lambda net: dreamda.MultiHead(net, 4)
    )
    logits, _ = common.predict(net, pool.images, accelerator)
    found, known = inside.votes(args, net.train(), pool), torch.load(out / "votes" / "001.pt")
    assert net.training and all(torch.equal(found[key], known[key]) for key in ("index", "votes", "label"))
    assert torch.equal(found["votes"], logits[found["index"], 1:].argmax(2))
    label, accepted = dreamda.agreement(logits[:, 1:], 0.0)
    assert torch.equal(found["label"], label) and torch.equal(found["accepted"], accepted)


# --- README


COMMANDS = re.findall(r"`python (\w+\.py .*--out runs/try)`", README)
SMALLER = {
    "actgen.py": "--epochs 2 --images_per_epoch 4 --steps 6 --examples_per_class 4 --genval_share 0.5",
    "dreamda.py": "--epochs 1 --variations 2 --steps 4 --examples_per_class 1",
    "diagen.py": "--iterations 2 --filter_epochs 1 --steps 4 --inversion_steps 4 --examples_per_class 1",
}


def test_readme_has_six_experiments_and_names_tests_and_pictures_that_exist():
    assert len(COMMANDS) == 6
    code = "".join(path.read_text(encoding="utf-8") for path in (common.ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w{9,})`", README)
    assert len(named) == 9 and all(f"def {name}(" in code for name in named)
    assert all((common.ROOT / path).exists() for path in re.findall(r"\((digits/[\w./]+)", README))


@pytest.mark.parametrize("command", COMMANDS)
def test_readmes_experiments_run_and_leave_a_picture(command, quick, tmp_path):
    """With smaller settings, which come last and count."""
    script, *words = shlex.split(command)
    module = {"actgen.py": actgen, "dreamda.py": dreamda, "diagen.py": diagen}[script]
    words += [*shlex.split(SMALLER[script]), "--out", str(tmp_path / "run")]
    status, _, stderr = in_this_process(module, *words)
    assert status == 0 and (tmp_path / "run" / "samples" / "inside.png").exists(), stderr
