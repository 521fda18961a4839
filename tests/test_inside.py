"""The samplers' hook on_step, against recomputed values; the pictures of a run; README's commands."""

import functools
import re
import shlex
import sys

import pytest
import torch
from PIL import Image

import actgen
import common
import diagen
import dreamda
from digits import inside, world
from runs import in_this_process, result_and_files

README = (common.ROOT / "README.md").read_text(encoding="utf-8")
TINY = {
    actgen: dict(epochs=4, images_per_epoch=4, generation_batch_size=3, steps=6, eval_every=4)
    | dict(examples_per_class=4, gradient_steps=3, genval_share=0.5),
    dreamda: dict(variations=2, steps=4, generation_batch_size=6, epochs=3, eval_every=3, batch_size=8)
    | dict(threshold=0.0, examples_per_class=1),
    diagen: dict(epochs=1, iterations=2, filter_epochs=1, batch_size=4, steps=4, variations=2)
    | dict(inversion_steps=4, inversion_batch_size=1, generation_batch_size=10, prompts_per_class=3)
    | dict(examples_per_class=1),
}
each_script = pytest.mark.parametrize("script", TINY, ids=[script.__name__ for script in TINY])


def generators(n=3):
    return [common.generator(0, i) for i in range(n)]


def close(a, b, atol=1e-4):
    return torch.allclose(a, b, atol=atol)


@pytest.fixture(scope="module")
def guides():
    drawn = world.render_pool(world.pools()["test"], 3, seed=5)
    return drawn["images"].permute(0, 3, 1, 2).float() / 255, drawn["labels"]


# --- the hook; ActGen's equations by it: test_actgen.py


def test_actgens_hook_changes_no_image_and_tells_of_the_guide_while_it_is_mixed_in(pipe, guides):
    oracle, steps = common.load_oracle(), inside.Steps()
    bank = {int(y): torch.randn(5, 4, 16, 16) for y in guides[1]}
    options = dict(prompt="a photo of a {}", guidance_scale=4.0, attention_resolution=8, bank=bank, steps=20)
    options |= dict(gradient_steps=4, guidance_centre=2.0, image_size=32)
    call = pipe, *guides, world.NAMES, lambda x: oracle(x)[:, :10]
    seen = actgen.generate(*call, generators=generators(), on_step=steps.add, **options)
    unseen = actgen.generate(*call, generators=generators(), **options)
    assert all(map(torch.equal, seen, unseen)) and torch.equal(steps[-1]["x_tilde"], unseen[1])
    assert [(step["i"], step["t"]) for step in steps] == [*enumerate(pipe.scheduler.timesteps.tolist())]
    mixing = [bool((step["gamma"] > 1e-4).all()) for step in steps]
    assert 4 < sum(mixing) < 20 and mixing == [{"m", "x_g"} <= step.keys() for step in steps]
    assert (steps["gradient_norm"] > 0).all(1).tolist() == [True] * 4 + [False] * 16


@pytest.mark.parametrize("inversion", ["cycle", "ddim"])
def test_dreamdas_hook_gives_the_path_and_its_noise(pipe, guides, inversion):
    path, options = inside.Steps(), dict(inversion=inversion, steps=6)
    inverted = dreamda.invert(pipe, guides[0], generators(), on_step=path.add, **options)
    unseen = dreamda.invert(pipe, guides[0], generators(), **options)
    assert torch.equal(inverted.start, unseen.start) and torch.equal(inverted.noise, unseen.noise)
    path.sort(key=lambda step: step["i"])
    z, text, s = path["z"], dreamda.embed(pipe, [""] * 3, 1.0), inverted.steps
    with torch.no_grad():
        assert close(z[-1], common.encode(pipe, guides[0]))
        if inversion == "cycle":  # the sampler goes along the path by the noise
            for i, before in enumerate([inverted.start, *z[:-1]]):
                eps = dreamda.predict_eps(pipe, before, s.t[i], s.alpha[i], text)
                after = dreamda.ddim_mean(before, eps, s.alpha[i], s.previous[i], s.sigma[i])
                assert close(after + path[i]["noise"], z[i])
        else:
            eps = dreamda.predict_eps(pipe, z[0], s.t[0], s.previous[0], text)
            assert close(dreamda.ddim_mean(z[0], eps, s.previous[0], s.alpha[0], 0.0), inverted.start)


def test_dreamdas_hook_gives_the_variations_and_the_size_of_the_perturbation(pipe, guides):
    inverted, steps, seen = dreamda.invert(pipe, guides[0], generators(), steps=6), inside.Steps(), []
    options = dict(noise_scale=2.0, relative_noise=True, guidance_scale=4.0)
    call = (pipe, inverted, torch.arange(3), ["a photo of a two"] * 3)
    unseen = dreamda.vary(*call, generators(), **options)
    with pipe.unet.mid_block.register_forward_hook(lambda module, inputs, h: seen.append(h[-3:])):
        drawn = dreamda.vary(*call, generators(), on_step=steps.add, **options)
    assert torch.equal(drawn, unseen) and torch.equal(steps[-1]["y"], unseen)
    assert torch.equal(steps["noise"], inverted.noise)
    for h, step in zip(seen, steps, strict=True):
        assert close(step["h_norm"], h.flatten(1).norm(dim=1))
        size = 2 * h.flatten(1).std(1) * h[0].numel() ** 0.5
        assert torch.allclose(step["perturbation_norm"], size, rtol=0.1)


def test_diagens_hook_gives_the_steps_of_equation_5(pipe, guides):
    steps, options = inside.Steps(), dict(steps=10, strength=0.7, guidance_scale=4.0)
    with torch.no_grad():
        call = (pipe, common.encode(pipe, guides[0]), ["a photo of a two"] * 3)
        seen = diagen.img2img(*call, generators(), on_step=steps.add, **options)
        assert torch.equal(seen, diagen.img2img(*call, generators(), **options))
        assert torch.equal(common.decode(pipe, steps[-1]["x"]), seen)
    alphas = pipe.scheduler.alphas_cumprod
    for before, step, after in zip(steps, steps[1:], steps[2:], strict=False):
        alpha, previous = alphas[step["t"]], alphas[after["t"]]
        eps = (before["x"] - alpha.sqrt() * step["x0"]) / (1 - alpha).sqrt()
        assert close(step["x"], previous.sqrt() * step["x0"] + (1 - previous).sqrt() * eps)


def test_textual_inversions_hook_gives_the_embeddings(pipe, guides):
    learned, start = inside.Steps(), diagen.initial_embeddings(pipe, ["background"])
    call = (pipe, guides[0], torch.zeros(3, dtype=torch.long), ["<hook>"], start)
    options = dict(steps=3, batch_size=2, lr=0.02)
    rows = diagen.textual_inversion(*call, on_step=learned.add, **options)
    assert [step["i"] for step in learned] == [0, 1, 2] and torch.equal(learned[-1]["S"], rows)
    assert torch.equal(rows, diagen.textual_inversion(*call, **options))
    assert torch.equal(learned[0]["S"], diagen.textual_inversion(*call, **options | {"steps": 1}))


# --- the pictures


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick):
    """finished(script): the folder of a tiny run on digits, without baseline."""

    @functools.cache
    def run(script):
        out = tmp_path_factory.mktemp(script.__name__) / "run"
        assert in_this_process(script, "--no_baseline", **TINY[script], out=out)[0] == 0
        return out

    return run


def height_of(out):
    """The height of the picture that inside.py draws of a run."""
    inside.draw(out)
    return Image.open(out / "samples" / "inside.png").height


@each_script
def test_a_finished_run_has_a_picture_which_changes_nothing_else(script, finished, pipe, monkeypatch):
    """Drawn again it is the same; DIAGen's token is learned for it as the run learned it."""
    (out, function), learned = (finished(script), diagen.textual_inversion), []
    before = result_and_files(out)
    assert height_of(out) > 600
    drawn = result_and_files(out)
    picture = drawn[1].pop("samples/inside.png")
    assert drawn == before
    monkeypatch.setattr(diagen, "textual_inversion", lambda *x, **y: learned.append(function(*x, **y)))
    inside.draw(out)
    assert (out / "samples" / "inside.png").read_bytes() == picture and bool(learned) == (script is diagen)
    for row in learned:
        assert torch.cdist(row, diagen.read_embeddings(out, world.NAMES, pipe)).min() < 1e-3


@each_script
def test_on_other_runs_images_or_without_images_only_what_the_run_did_is_drawn(script, finished, tmp_path):
    """DreamDA's votes, DIAGen's weights; of real images alone there is no picture."""
    if script is not actgen:
        source, other = finished(script), tmp_path / "other"
        assert in_this_process(script, "--no_baseline", **TINY[script], synthetic=source, out=other)[0] == 0
        assert height_of(other) < 0.7 * height_of(source)
    assert in_this_process(script, "--real_only", **TINY[script], out=tmp_path / "real")[0] == 0
    with pytest.raises(common.UserError, match="no images that the method drew"):
        inside.draw(tmp_path / "real")


@each_script
def test_images_of_ones_own_have_a_picture_without_truth(script, mine, quick):
    own = dict(dataset="folder", diffusion=common.DIGITS_SD, classifier="small_cnn", pretrained=False)
    own |= dict(image_size=32, augment="crop", lr=1e-3, workers=0, optimizer="adamw")
    own |= {actgen: dict(attention_resolution=8), diagen: dict(frozen=False)}.get(script, {})
    own |= dict(prompt="a photo of a {}") | TINY[script] | {"examples_per_class": 0} | mine
    assert in_this_process(script, "--no_baseline", **own)[0] == 0
    assert height_of(mine["out"]) > 200


# --- README


def test_readmes_commands_to_try_have_arguments_that_exist_and_its_tests_and_pictures_are_there(monkeypatch):
    (added,) = re.findall(r"\| try, with `(.*)` \|", README)
    commands = re.findall(r"^\| `python (\w+)(\.py .*?)` \|", README, re.M)
    assert len(commands) == 5
    for script, words in commands:
        module = {"actgen": actgen, "dreamda": dreamda, "diagen": diagen}[script]
        monkeypatch.setattr(sys, "argv", shlex.split(f"{script}{words} {added}"))
        monkeypatch.setitem(sys.modules, "__main__", module)
        args = module.METHOD.arguments(**module.METHOD.parse())
        assert (args.out, args.overwrite, args.baseline) == ("runs/try", True, False)
    code = "".join(path.read_text(encoding="utf-8") for path in (common.ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w{9,})`", README)
    assert all((common.ROOT / path).exists() for path in re.findall(r"\((digits/[\w./]+)", README))
    assert len(named) == 9 and not (gone := [name for name in named if f"def {name}(" not in code]), gone
