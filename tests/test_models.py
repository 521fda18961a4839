"""Models and prompts as users bring them: several vectors per token, LoRA weights, few steps, any prompt."""

import re

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import actgen
import common
import diagen
import dreamda
from digits import judge, pretrain, world
from runs import in_this_process, lines_of, the_error

NAMES = ["two", "seven"]
TINY = {
    actgen: dict(epochs=2, images_per_epoch=2, steps=2, eval_every=2, genval_share=0.5, examples_per_class=2),
    dreamda: dict(variations=1, steps=2, epochs=1, heads=2, examples_per_class=1, threshold=0.0),
    diagen: dict(
        epochs=1, iterations=1, filter_epochs=1, batch_size=4, steps=2, variations=2, inversion_steps=2,
        inversion_batch_size=2, prompts_per_class=2, examples_per_class=1, generation_batch_size=20,
    ),
}  # fmt: skip
each_script = pytest.mark.parametrize("script", TINY, ids=[script.__name__ for script in TINY])
load_pipeline = common.load_pipeline  # not `quick`'s, which is shared: a run's tokens would stay in it
img2img_scripts = pytest.mark.parametrize("script", [dreamda, diagen], ids=["dreamda", "diagen"])


def generators(n, key=0):
    return [common.generator(key, i) for i in range(n)]


def embed(pipe, prompts):
    return pipe.encode_prompt(prompts, "cpu", 1, False)[0].detach()


@pytest.fixture(scope="module")
def few():
    """Four images of each of two digits [8, 3, 32, 32], and their labels 0 and 1."""
    r = world.render_pool(world.pools()["train"], 150, seed=1)
    chosen = torch.cat([(r["labels"] == world.NAMES.index(n)).nonzero()[:4, 0] for n in NAMES])
    return r["images"][chosen].permute(0, 3, 1, 2).float() / 255, torch.arange(2).repeat_interleave(4)


def run(script, out, *words, **changes):
    """A tiny run on digits without baselines, which must succeed: the records of its images."""
    options = TINY[script] | {"out": out} | changes
    status, _, stderr = in_this_process(script, "--no_baseline", *words, **options)
    assert status == 0, stderr
    return lines_of(out / "synthetic" / "metadata.jsonl")


# --- several vectors per token


def learn(few, vectors, steps=20):
    """The pipeline after Textual Inversion of <two> and <seven>, their start and what they learned."""
    pipe = common.load_pipeline(common.DIGITS_CLEAN)
    start = diagen.initial_embeddings(pipe, NAMES, "background")
    start = start[:, None].repeat(1, vectors, 1) if vectors else start
    tokens = [f"<{name}>" for name in NAMES]
    options = dict(steps=steps, lr=0.02, templates=[diagen.PHOTO], flip=False)
    return pipe, start, diagen.textual_inversion(pipe, *few, tokens, start, **options)


def test_all_vectors_of_a_token_learn_and_stock_diffusers_reads_them_bit_for_bit(few, tmp_path):
    pipe, start, rows = learn(few, 3)
    assert rows.shape == (2, 3, 96) and torch.equal(start[:, 0], start[:, 2])
    assert (rows - start).norm(dim=2).min() > 0.1
    assert min(torch.pdist(row).min() for row in rows) > 0.1  # and each learns something else
    stock = StableDiffusionPipeline.from_pretrained(common.DIGITS_CLEAN)
    for row, name in zip(rows, NAMES, strict=True):
        file = tmp_path / name / "learned_embeds.safetensors"
        diagen.save_embedding(row, f"<{name}>", file)
        assert torch.equal(diagen.load_embedding(file, 96, 3), row)
        stock.load_textual_inversion(str(file.parent))
    prompts = ["a photo of a <two> on a flower background", "a red <seven>", "<two> <seven>", "a red seven"]
    ours = embed(pipe, prompts)
    assert torch.equal(embed(stock, prompts), ours)
    ids = pipe.tokenizer(pipe.maybe_convert_prompt("a <two> seven", pipe.tokenizer)).input_ids
    words = ["a</w>", "<two>", "<two>_1", "<two>_2", "seven</w>"]
    assert pipe.tokenizer.convert_ids_to_tokens(ids)[1:-1] == words
    for i in range(3):  # every vector counts, in its own prompts alone
        moved = rows.clone()
        moved[0, i] *= -1
        with diagen.NewTokens(pipe, [f"<{name}>" for name in NAMES], moved):
            changed = (embed(pipe, prompts) - ours).abs().amax((1, 2)) > 1e-4
        assert changed.tolist() == [True, False, True, False]


def test_one_vector_is_what_a_plain_token_is_bit_for_bit(few):
    (_, _, one), (_, _, plain) = learn(few, 1, steps=3), learn(few, 0, steps=3)
    assert plain.shape == (2, 96) and torch.equal(one[:, 0], plain)
    for relative in (False, True):
        noisy = diagen.noisy_embeddings(one, [0.0, 0.5], generators(2), relative)
        assert torch.equal(
            noisy[:, :, 0], diagen.noisy_embeddings(plain, [0.0, 0.5], generators(2), relative)
        )


@pytest.mark.parametrize("relative", [False, True])
def test_every_vector_has_noise_of_its_own_of_standard_deviation_sigma(relative):
    rows, sigmas = torch.tensor([[1.0, 3.0], [2.0, 9.0]])[..., None] * torch.randn(2, 2, 50_000), [0.0, 0.5]
    noisy = diagen.noisy_embeddings(rows, sigmas, generators(2), relative)
    noise = noisy - rows[:, None]
    assert noisy.shape == (2, 2, 2, 50_000) and not noise[:, 0].any()
    scale = rows.std(2) if relative else torch.ones(2, 2)
    assert torch.allclose(noise[:, 1].std(2), 0.5 * scale, rtol=0.02)
    correlation = torch.corrcoef(noise[:, 1].flatten(0, 1)) - torch.eye(4)
    assert correlation.abs().max() < 0.025


@pytest.mark.usefixtures("quick")
def test_a_run_with_several_vectors_keeps_them_and_another_run_uses_them(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_pipeline", load_pipeline)
    options = dict(vectors=3, sigmas=0.5)
    records = run(diagen, tmp_path / "run", **options)
    assert all(f"<{r['class_name']}|0>" in r["prompt"] for r in records)
    files = [*(tmp_path / "run").glob("embeddings/*/*")]
    assert len(files) == 10 and {t.shape for f in files for t in load_file(f).values()} == {(3, 96)}
    again = run(diagen, tmp_path / "again", embeddings=tmp_path / "run", **options)
    assert not (tmp_path / "again" / "embeddings").exists()
    for a, b in zip(records, again, strict=True):
        images = [Image.open(tmp_path / n / "synthetic" / a["file_name"]) for n in ("run", "again")]
        assert a["file_name"] == b["file_name"] and images[0].tobytes() == images[1].tobytes()
    other = TINY[diagen] | {"embeddings": tmp_path / "run", "out": tmp_path / "other"}
    assert "has 3 vectors; give --vectors 3" in the_error(in_this_process(diagen, **other))


# --- LoRA weights


@each_script
def test_without_peft_a_lora_ends_in_one_line(script, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.utils, "is_peft_available", lambda: False)
    options = TINY[script] | {"lora": tmp_path, "out": tmp_path / "run"}
    assert "--lora needs the package peft; install it: pip install peft" in the_error(
        in_this_process(script, **options)
    )
    assert not (tmp_path / "run" / "config.json").exists()


def a_lora(folder):
    """Saves LoRA weights of U-Net and text encoder in a folder; the stock pipeline with them, not fused."""
    peft = pytest.importorskip("peft")
    stock = StableDiffusionPipeline.from_pretrained(common.DIGITS_CLEAN)
    options = dict(r=2, lora_alpha=2, init_lora_weights=False)
    stock.unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_v"], **options))
    stock.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj"], **options))
    layers = {
        f"{part}_lora_layers": diffusers.utils.convert_state_dict_to_diffusers(
            peft.utils.get_peft_model_state_dict(getattr(stock, part))
        )
        for part in ("unet", "text_encoder")
    }
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return stock


def test_a_lora_becomes_part_of_plain_layers(pipe, tmp_path):
    stock, x, t = a_lora(tmp_path), torch.randn(2, 4, 16, 16), torch.tensor([7, 700])
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        ours = common.load_pipeline(common.DIGITS_CLEAN, lora=str(path))
        text = embed(ours, ["a red one", "a two"])
        assert torch.allclose(text, embed(stock, ["a red one", "a two"]), atol=1e-4)
        assert torch.allclose(ours.unet(x, t, text).sample, stock.unet(x, t, text).sample, atol=1e-3)
        assert (text - embed(pipe, ["a red one", "a two"])).abs().max() > 0.01
        assert (ours.unet(x, t, text).sample - pipe.unet(x, t, text).sample).abs().max() > 0.01
        for part in ("unet", "text_encoder"):
            kinds = [[type(m) for m in getattr(p, part).modules()] for p in (ours, pipe)]
            assert kinds[0] == kinds[1] and not any(p.requires_grad for p in getattr(ours, part).parameters())


def test_a_lora_that_is_none_of_the_model_is_named(tmp_path):
    a_lora(tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    unet = {k: w for k, w in weights.items() if k.startswith("unet")}
    files = {
        "nan": {k: w * torch.nan for k, w in unet.items()},
        "wide": {k: w.repeat(2, *[1] * (w.ndim - 1)) if ".lora.up" in k else w for k, w in unet.items()},
        "foreign": {k.replace("unet", "transformer"): w for k, w in unet.items()},
        "odd": {"weight": torch.zeros(3)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    for name in [*files, "cut"]:
        options = TINY[dreamda] | {"lora": tmp_path / f"{name}.safetensors", "out": tmp_path / "run"}
        error = the_error(in_this_process(dreamda, **options))
        assert re.search(rf"cannot load --lora '.*{name}.safetensors': give LoRA weights", error)
    with pytest.raises(common.UserError, match="--lora '/nowhere/lora': no such file or folder"):
        common.load_pipeline(common.DIGITS_CLEAN, lora="/nowhere/lora")


# --- few-step models


@pytest.mark.parametrize("steps, strength", [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (2, 0.5), (4, 0.7)])
def test_few_steps_without_guidance_are_those_of_stock_img2img_with_turbos_scheduler(
    pipe, few, steps, strength, monkeypatch
):
    """SD-Turbo comes with Euler's scheduler, whose steps are DDIM's, but for a little of the last one."""
    turbo = dict(timestep_spacing="trailing", steps_offset=1, beta_schedule="scaled_linear")
    turbo = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, **turbo)
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.scheduler = turbo
    stock.set_progress_bar_config(disable=True)
    latents, prompts = common.encode(pipe, few[0][[0, 4]]), ["a photo of a blue one", "a photo of a red nine"]
    options = dict(strength=strength, guidance_scale=0.0)
    expected = stock(
        prompts, latents, num_inference_steps=steps, generator=generators(2), output_type="pt", **options
    ).images
    for base in (turbo, pipe.scheduler):  # also where the base model's own spacing is "leading"
        own = diffusers.DDPMScheduler.from_config(base.config)
        monkeypatch.setattr(pipe, "scheduler", own)
        ours = diagen.img2img(pipe, latents, prompts, generators(2), steps=steps, **options)
        assert (ours - expected).abs().mean() < 0.02 and (ours - few[0][[0, 4]]).abs().mean() > 0.04


def test_a_single_step_draws_the_prompts_class(pipe, digits):
    images, oracle = torch.stack([digits.test[i][0] for i in range(24)]), judge.load_oracle()
    wanted = torch.tensor([(digits.test.labels[i] + 3) % 10 for i in range(24)])
    prompts = [f"a photo of a {world.NAMES[y]}" for y in wanted]
    options = dict(steps=1, strength=1.0, guidance_scale=4.0)
    drawn = diagen.img2img(pipe, common.encode(pipe, images), prompts, generators(24), **options)
    assert (oracle(drawn)[:, :10].argmax(1) == wanted).float().mean() > 0.3  # by chance 0.1


@pytest.mark.usefixtures("quick")
@img2img_scripts
def test_few_steps_run_or_say_what_to_give(script, tmp_path):
    strength = {dreamda: 0.8, diagen: 0.5}[script]
    options = TINY[script] | {"out": tmp_path / "run", "steps": 1}
    error = the_error(in_this_process(script, **options))
    assert f"--steps 1 with --strength {strength} leaves no step" in error and "product at least 1" in error
    assert not (tmp_path / "run" / "config.json").exists()
    assert len(run(script, tmp_path / "run", steps=1, strength=1.0, guidance_scale=0.0)) == 10 * (
        1 + (script is diagen)
    )


def test_a_unet_that_wants_the_guidance_scale_is_refused(tmp_path):
    """It would draw without, and badly."""
    sd = pretrain.build_pipeline()
    config = {k: v for k, v in sd.unet.config.items() if not k.startswith("_")}
    sd.unet = type(sd.unet)(**config | {"time_cond_proj_dim": 32})
    sd.save_pretrained(tmp_path / "lcm")
    with pytest.raises(common.UserError, match="wants the guidance scale, as an LCM's does; .* as --lora$"):
        common.load_pipeline(str(tmp_path / "lcm"))


# --- prompts

BRACES = "a {red} photo {{of}} a {}} { {0} {!r}"


def test_the_name_takes_the_place_of_empty_braces_and_of_nothing_else():
    assert common.fill_prompt(BRACES, "cat") == "a {red} photo {{of}} a cat} { {0} {!r}"
    assert common.fill_prompt("{}", "{} {x}") == "{} {x}"


@pytest.mark.usefixtures("quick")
@each_script
def test_other_braces_in_a_prompt_are_plain_text(script, tmp_path):
    prompt = "a {x} {} } {0}"
    method = {diagen: {"prompts": "none", "sigmas": 0.0}, dreamda: {"source_prompt": "{y} {}"}}
    records = run(script, tmp_path / "run", prompt=prompt, **method.get(script, {}))
    for r in records:
        name = f"<{r['class_name']}|0>" if script is diagen else r["class_name"]
        assert r["prompt"] == f"a {{x}} {name} }} {{0}}"


@each_script
@pytest.mark.parametrize("prompt, count", [("a photo", 0), ("a {} on a {}", 2), ("a {name}", 0)])
def test_a_prompt_has_one_place_for_the_name(script, prompt, count, tmp_path):
    error = the_error(in_this_process(script, prompt=prompt, out=tmp_path / "run"))
    assert f"--prompt '{prompt}' must have one {{}} for the class name, not {count}" in error
    assert not (tmp_path / "run").exists()


def test_prompts_in_a_file_may_have_braces(tmp_path):
    (tmp_path / "p.csv").write_text("owl;1;{an} {} at {night}\nowl;2;a {name} {x}\nowl;3;an owl {!}\n")
    prompts = diagen.read_prompts(tmp_path / "p.csv", ["owl"])["owl"]
    assert prompts == ["{an} owl at {night}", "a owl {x}", "an owl {!}"]
    (tmp_path / "p.csv").write_text("owl;1;an owl beside {}\n")
    with pytest.raises(common.UserError, match="line 1: .*exactly once"):
        diagen.read_prompts(tmp_path / "p.csv", ["owl"])


LONG = "red " * 9  # the embedded text encoder reads 14 tokens between start and end


@pytest.mark.usefixtures("quick")
@each_script
def test_a_class_name_that_is_cut_off_is_named(script, tmp_path):
    changes = {"prompt": f"a photo of a {LONG}{{}}"}
    if script is diagen:
        changes |= {"method": "real_guidance"}
    options = TINY[script] | {"out": tmp_path / "run"} | changes
    run(script, tmp_path / "fits", **changes)  # 4 + 9 + 1
    error = the_error(in_this_process(script, **options | {"prompt": f"a photo of a {LONG} red {{}}"}))
    assert "--prompt: the class 'zero' ends at token 15 of the prompt, of which 14 are read" in error
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.usefixtures("quick")
def test_a_source_prompt_a_line_of_a_file_and_vectors_that_do_not_fit_are_named(tmp_path):
    def error(script, **changes):
        options = TINY[script] | {"out": tmp_path / "run", "baseline": False} | changes
        return the_error(in_this_process(script, **options))

    assert "--source_prompt: the class 'zero'" in error(dreamda, source_prompt=f"{LONG * 2}{{}}")
    (tmp_path / "p.csv").write_text(f"one;1;a one\ntwo;1;{LONG * 2} two\n")
    place = f"{tmp_path / 'p.csv'}, line 2: the class 'two' ends at token 19"
    assert place in error(diagen, prompts=tmp_path / "p.csv")
    assert "token 15 of the prompt, of which 14 are read; shorten it or lower --vectors" in error(
        diagen, vectors=11
    )
    assert "prompts.csv, line" in error(diagen, vectors=10)  # with an adjective


def test_a_learned_token_stands_for_a_name_of_any_length(pipe):
    common.check_prompt(pipe, diagen.PHOTO, ["x" * 60], "--prompt", vectors=10)
    with pytest.raises(common.UserError, match="the class 'xxx"):
        common.check_prompt(pipe, diagen.PHOTO, ["x" * 60], "--prompt")


@pytest.mark.parametrize("folder", ["", "nowhere", "data"])
def test_embeddings_of_no_run_are_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    before = [*tmp_path.rglob("*")]
    outcome = in_this_process(diagen, **TINY[diagen], embeddings=folder, out="run")
    assert " ".join(f"--embeddings {folder} is no folder of a run".split()) in the_error(outcome)
    assert [*tmp_path.rglob("*")] == before
