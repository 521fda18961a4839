"""Whole runs of the three scripts, as a user starts them: what they leave, pictures, kills, mistakes."""

import functools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import actgen
import common
import diagen
import dreamda
import runs
from digits import inside, world
from runs import DIGITS, FOLDER, each_script, in_child, in_this_process, lines_of, refused, the_error

pytestmark = pytest.mark.usefixtures("quick")
TITLES = {
    actgen: ["real only", "ActGen"],
    dreamda: ["standard augmentation", "seed labels", "AMST"],
    diagen: ["standard augmentation", "DIAGen"],
}
IMAGES = {actgen: 8, dreamda: 20, diagen: 20}  # synthetic images of the tiny run on digits
SYNTHETIC = "synthetic/metadata.jsonl"


def run_well(script, *words, **arguments) -> str:
    """What a run prints that must end well."""
    status, stdout, stderr = in_this_process(script, *words, **arguments)
    assert status == 0, stderr
    return stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick):
    """finished(script): folder and output of the tiny run on digits."""

    @functools.cache
    def run(script):
        out = tmp_path_factory.mktemp(script.__name__) / "digits"
        return out, run_well(script, **DIGITS[script], out=out, pictures=True)

    return run


@pytest.fixture
def striped(tmp_path):
    """A folder of 48 training and 60 test images of stripes; see runs.stripes."""
    for split, count in (("train", 48), ("test", 60)):
        for i, (image, y) in enumerate(zip(*runs.stripes(count, len(split)), strict=True)):
            folder = tmp_path / "stripes" / split / world.NAMES[y]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    return {"data_dir": tmp_path / "stripes", "image_size": 16, "augment": "none"}


# --- what a run leaves


@each_script
def test_a_run_writes_all_its_files(script, finished):
    out, stdout = finished(script)
    config = runs.read_json(out / "config.json")
    assert config["args"] | DIGITS[script] == config["args"] and "torch" in config["versions"]
    assert {name for name, value in config["args"].items() if value is None} <= {"style"}
    images, passes = {actgen: (8, 8), dreamda: (20, 5), diagen: (20, 4)}[script]  # what it will do
    plan = f"{images} images ({passes} U-Net passes each, {images * 32**2 * 1.5e-9:.2g} GB)"
    assert f"{out}: " in stdout and plan in stdout and (script is not diagen or "prompts: bank" in stdout)
    result, metrics = runs.read_json(out / "result.json"), runs.metrics_of(out)
    assert list(result) == list(metrics) == TITLES[script]
    assert script is not dreamda or all(np.isfinite(line["orthogonality"]) for line in metrics["AMST"])
    for title, lines in metrics.items():  # 3 x 40 real images are next to the 16 + 24 + 48 + 48 of ActGen
        epochs = 3 if title == "real only" else DIGITS[script]["epochs"]
        assert [line["epoch"] for line in lines] == [*range(1, epochs + 1)]
        assert all(np.isfinite(line["loss"]) and line["seconds"] > 0 for line in lines)
        assert script is diagen or lines[-1]["test"] == result[title]["test"]["top1"]
    assert stdout.endswith(common.report(result, str(out)) + "\n")
    assert f"{images} images generated" in stdout
    pictures = [out / "curves.png", *(out / "samples").iterdir()]
    assert len(pictures) > 1 and all(min(Image.open(picture).size) >= 64 for picture in pictures)
    records = lines_of(out / SYNTHETIC)
    runs.check_imagefolder(out / "synthetic", records)
    assert len(records) == IMAGES[script] == len([*out.glob("synthetic/*/*.png")])
    for r in records:
        assert r["file_name"].startswith(f"{r['label']:04d} {r['class_name']}/")
        assert r["class_name"] == world.NAMES[r["label"]]


@each_script
def test_a_loaded_classifier_scores_what_the_run_reported(script, finished):
    (out, _), data = finished(script), common.load_data("digits", "", 32)
    for title, scores in runs.read_json(out / "result.json").items():
        net, names = common.load_classifier(out, title)
        assert names == world.NAMES and not net.training
        again = common.evaluate(net, data, common.make_accelerator())
        assert all(again[split] == pytest.approx(scores[split], rel=1e-4) for split in again)
    with refused("has no trained classifier 'ActDream'"):
        common.load_classifier(out, "ActDream")


def test_actgens_images_join_the_training_set_and_gen_val_at_half_time(finished):
    out, _ = finished(actgen)
    lines = runs.metrics_of(out)["ActGen"]
    assert [line["synthetic"] for line in lines] == [0, 4, 8, 8]
    assert [line["images"] - line["synthetic"] for line in lines] == [20, 20, 40, 40]
    files = {path.stem for path in out.glob("synthetic/*/*.png")}
    assert files == {path.stem for path in out.glob("latents/*.pt")} and len(files) == 8
    assert torch.load(next(out.glob("latents/*.pt")), weights_only=True).shape == (4, 16, 16)
    planned = [record for path in sorted(out.glob("plans/*")) for record in runs.read_json(path)]
    assert planned == lines_of(out / SYNTHETIC)
    assert [r["seed"] for r in planned] == [[0, j // 4, j % 4] for j in range(8)]


def test_diagens_best_epoch_counts_and_its_images_have_prompts_and_weights(finished, tmp_path):
    out, _ = finished(diagen)
    result, metrics = runs.read_json(out / "result.json"), runs.metrics_of(out)
    for title, scores in result.items():
        best = max(metrics[title], key=lambda line: line["val"])  # the first of the best
        assert (scores["val"]["class_mean"], scores["epoch"]) == (pytest.approx(best["val"]), best["epoch"])
        assert scores["synthetic"] == (0 if title == "standard augmentation" else 20)
    fit = result["DIAGen"]["filter"]
    assert fit["after"]["nll"] <= fit["before"]["nll"] and fit["temperature"] > 0
    rows = [line.split(";") for line in (out / "prompts.csv").read_text().splitlines()[1:]]
    prompts = {name: [row[2] for row in rows if row[0] == name] for name in world.NAMES}
    records = lines_of(out / SYNTHETIC)
    for i, r in enumerate(records):
        name, variant = r["class_name"], i % 2
        assert r["prompt"].replace(f"<{r['label']:04d} {name}|{variant}>", "{name}") == prompts[name][variant]
        assert r["seed"] == [0, r["guide_index"], variant] and 0 <= r["confidence"] <= 1
    q, w = (torch.tensor([r[key] for r in records]).view(10, 2) for key in ("confidence", "weight"))
    assert torch.allclose(diagen.weights_of(q), w) and w.std() > 0
    arguments = DIGITS[diagen] | dict(method="da_fusion", embeddings=out, out=tmp_path / "plain")
    assert "\nDA-Fusion " in run_well(diagen, "--no_baseline", **arguments)
    plain = lines_of(tmp_path / "plain" / SYNTHETIC)
    assert all(
        r["weight"] == 0.5 and re.fullmatch(r"a photo of a <\d{4} \w+\|0>", r["prompt"]) for r in plain
    )
    assert len(plain) == 20 == 2 * len([*out.glob("embeddings/*/*")])


@each_script
def test_a_finished_run_says_so_refuses_other_arguments_and_can_be_overwritten(script, finished, tmp_path):
    (first, printed), out = finished(script), tmp_path / "copy"
    shutil.copytree(first, out)
    stdout = run_well(script, **DIGITS[script], out=out)
    assert "is finished" in stdout and stdout.endswith(printed.replace(str(first), str(out))[-90:])
    other = DIGITS[script] | {"seed": 1, "out": out}
    error = the_error(in_this_process(script, **other))
    assert f"{out} holds a run with --seed 0, this one has --seed 1; " in error
    (out / "synthetic" / "old.png").touch()
    stdout = run_well(script, "--overwrite", "--no_baseline", **other)
    assert "is finished" not in stdout
    assert not (out / "synthetic" / "old.png").exists() and list(runs.metrics_of(out)) == TITLES[script][-1:]
    assert runs.read_json(out / "config.json")["args"]["seed"] == 1


@each_script
def test_a_folder_of_ones_own_images_runs_end_to_end(script, mine):
    """DIAGen draws four of five images per class; of the others one is for validation."""
    stdout = run_well(script, **FOLDER[script] | mine)
    count = {actgen: 8, dreamda: 20, diagen: 16}[script]
    records = lines_of(mine["out"] / SYNTHETIC)
    assert f"{count} images generated" in stdout and len(records) == count
    assert {r["class_name"] for r in records} <= {"guinea pig", "baker's yeast"}
    assert all((mine["out"] / "synthetic" / r["file_name"]).exists() for r in records)
    guides = [Path(r["guide"]) for r in records if r["guide"]]
    assert guides and all(g.is_relative_to(mine["data_dir"] / "train") and g.exists() for g in guides)
    assert script is actgen or len(set(guides)) == count / 2  # ActGen's may be guides again
    assert height_of_picture(mine["out"]) > 200  # without truth


def test_torchrun_works_on_cpus_without_further_settings(mine):
    status, stdout, stderr = runs.in_own_process(actgen, launcher=runs.TWO_PROCESSES, **FOLDER[actgen] | mine)
    assert status == 0 and "8 images generated" in stdout, stderr
    assert stdout.count("images generated") == 1 and (mine["out"] / "curves.png").exists()


@each_script
def test_classes_of_any_name_and_one_of_a_single_image_run(script, tmp_path):
    """A folder's name can have 255 bytes; only a learned token stands for a name that the prompt cuts off."""
    rng, long = np.random.default_rng(0), "x" * 250 if script is diagen else "x" + "_" * 249
    folders = ['naïve "café"', "漢字 😀", f"{long}.jpg", "it's; $HOME & co"]
    names = [common.english(name) for name in folders]
    for split, name in ((split, name) for split in ("train", "val", "test") for name in folders):
        (folder := tmp_path / "data" / split / name).mkdir(parents=True)
        for i in range(1 if split == "train" and name == names[1] else 4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    arguments = FOLDER[script] | {"data_dir": tmp_path / "data", "out": tmp_path / "run", "prompt": "{}"}
    run_well(script, "--no_baseline", **arguments | ({"examples_per_class": 1} if script is diagen else {}))
    records = lines_of(tmp_path / "run" / SYNTHETIC)
    assert all((tmp_path / "run" / "synthetic" / r["file_name"]).exists() for r in records)
    drawn = {r["class_name"] for r in records}
    assert drawn <= set(names) if script is actgen else drawn == set(names)


def height_of_picture(out):
    inside.draw(out)
    return Image.open(out / "samples" / "inside.png").height


@each_script
def test_a_finished_run_has_a_picture_which_changes_nothing_else(script, finished, pipe, monkeypatch):
    """Drawn again it is the same; DIAGen's token is learned for it as the run learned it."""
    (out, _), function, learned = finished(script), diagen.textual_inversion, []
    before = runs.result_and_files(out)
    assert height_of_picture(out) > 400
    drawn = runs.result_and_files(out)
    picture = {"samples/inside.png": drawn[1]["samples/inside.png"]}
    assert drawn == (before[0], before[1] | picture)
    monkeypatch.setattr(diagen, "textual_inversion", lambda *x, **y: learned.append(function(*x, **y)))
    inside.draw(out)
    assert runs.result_and_files(out) == drawn and bool(learned) == (script is diagen)
    for row in learned:
        assert torch.cdist(row[None], diagen.read_embeddings(out, world.NAMES, pipe)).min() < 1e-3


# --- stopped and started again


def a_run(script, out):
    """A run in a child process; ActGen's draws all images with a guide and both losses."""
    actgen.curriculum = lambda *_: (0.0, 1.0)
    common.save_curves = lambda *_: None
    more = dict(paths=2, unlabelled=4) if script is dreamda else {}
    args = script.METHOD.arguments(**DIGITS[script] | more, out=str(out))
    common.run_once(script.METHOD, args, common.make_accelerator())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, quick):
    """uninterrupted(script): what a_run leaves, and its seconds."""

    @functools.cache
    def run(script):
        out, clock = tmp_path_factory.mktemp("uninterrupted"), time.time()
        assert in_child(lambda: a_run(script, out)) == 0
        return runs.result_and_files(out), time.time() - clock

    return run


KILLS = {  # what the run was doing: script, the function whose n-th call ends the process
    "training ActGen's baseline": (actgen, common, "train_epoch", 3),
    "asking the classifier": (actgen, actgen, "plan_epoch", 2),
    "drawing a second batch after the second epoch": (actgen, actgen, "generate", 4),
    "writing images": (actgen, common.v2.functional, "to_pil_image", 8),
    "writing a checkpoint after drawing": (actgen, torch, "save", 12),
    "writing ActGen's result": (actgen, common.Run, "finish", 1),
    "drawing variations": (dreamda, dreamda, "vary", 3),
    "training by AMST": (dreamda, dreamda, "self_training_loss", 6),
    "writing embeddings": (diagen, diagen, "save_file", 2),
    "training the filter": (diagen, common, "train_epoch", 6),
    "writing DIAGen's result": (diagen, common.Run, "finish", 1),
}


@pytest.mark.parametrize("doing", KILLS)
def test_the_result_is_the_same_after_a_kill_while(doing, tmp_path, uninterrupted):
    script, module, name, n = KILLS[doing]
    assert in_child(lambda: (runs.die_at(module, name, n), a_run(script, tmp_path))) == 9
    assert not (tmp_path / "result.json").exists()
    assert in_child(lambda: a_run(script, tmp_path)) == 0
    assert runs.result_and_files(tmp_path) == uninterrupted(script)[0]


@each_script
def test_twenty_kills_at_random_moments_change_nothing(script, tmp_path, uninterrupted):
    (expected, seconds), kills, out = uninterrupted(script), 0, tmp_path / "killed"
    rng = random.Random(0)
    while kills < 20:
        pid = runs.start_child(lambda: a_run(script, out))
        time.sleep(rng.uniform(0, seconds / 3))
        os.kill(pid, signal.SIGKILL)
        if runs.exit_status(pid) == -signal.SIGKILL:
            kills += 1
        else:  # it was done before
            assert runs.result_and_files(out) == expected
            shutil.rmtree(out)
    assert in_child(lambda: a_run(script, out)) == 0
    assert runs.result_and_files(out) == expected


@each_script
def test_data_that_changed_between_a_kill_and_going_on_is_refused(script, mine):
    arguments = FOLDER[script] | mine
    assert (
        in_child(lambda: (runs.die_at(common, "train_epoch", 1), in_this_process(script, **arguments))) == 9
    )
    Image.new("RGB", (20, 20)).save(mine["data_dir"] / "train" / "guinea pig" / "added.png")
    error = the_error(in_this_process(script, **arguments))
    assert re.search(r"the data changed since the run in .*(train|val): \d+ images", error)
    run_well(script, "--overwrite", "--no_baseline", **arguments)


def test_a_killed_run_goes_on_with_less_memory(tmp_path):
    """Another batch size of generation and other loading processes change no image but for rounding."""
    assert (
        in_child(
            lambda: (runs.die_at(common.v2.functional, "to_pil_image", 8), a_run(dreamda, tmp_path / "run"))
        )
        == 9
    )
    same = DIGITS[dreamda] | dict(paths=2, unlabelled=4, out=tmp_path / "run")
    run_well(dreamda, "--gradient_checkpointing", **same | dict(generation_batch_size=2, workers=1))
    assert in_child(lambda: a_run(dreamda, tmp_path / "whole")) == 0
    assert runs.grey_levels(tmp_path / "run", tmp_path / "whole") <= 2


def test_images_that_are_missing_are_drawn_again_the_same(tmp_path, uninterrupted):
    """With their whole batches, whose size decides over the last bits."""
    assert in_child(lambda: (runs.die_at(dreamda, "make_pool", 1), a_run(dreamda, tmp_path))) == 9
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("synthetic/*/*.png")}
    for i in (0, 7):
        (tmp_path / "synthetic" / lines_of(tmp_path / SYNTHETIC)[i]["file_name"]).unlink()
    assert in_child(lambda: a_run(dreamda, tmp_path)) == 0
    assert runs.result_and_files(tmp_path) == uninterrupted(dreamda)[0]
    assert sum(path.stat().st_mtime_ns != time for path, time in times.items()) == 12


def test_ctrl_c_says_that_the_run_can_go_on(mine, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_epoch", lambda *_: signal.raise_signal(signal.SIGINT))
        error = the_error(in_this_process(actgen, **FOLDER[actgen] | mine))
    assert "stopped; the same command, without --overwrite, goes on" in error
    signal.signal(signal.SIGINT, before)
    run_well(actgen, **FOLDER[actgen] | mine)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_space(tmp_path):
    (tmp_path / "ActGen.pt.tmp").symlink_to("/dev/full")
    error = the_error(in_this_process(actgen, "--no_baseline", **DIGITS[actgen], out=tmp_path))
    assert "No space left on device" in error
    (tmp_path / "ActGen.pt.tmp").unlink()
    run_well(actgen, "--no_baseline", **DIGITS[actgen], out=tmp_path)


# --- mistakes


def leave_one(d):
    for folder in (d / "data/train").iterdir():
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()


OF_ACTGEN = [  # what is done to the folder, arguments, words of the error
    (lambda d: runs.cut(d / "data/train/guinea pig/5.png"), {}, "1 of 20 images: .*pig/5.png.*--skip_bad"),
    (lambda d: runs.empty(d / "sd"), {"diffusion": "sd"}, "cannot load the model 'sd': it must be a folder"),
    (None, {"classifier": "resnet81"}, "--classifier resnet81: give small_cnn"),
    (lambda d: (d / "file").touch(), {"out": "file"}, "file"),
    (None, {"out": "/sys/run"}, "cannot read or write /sys"),  # where even root cannot write
    (None, {"out": "data/train/x", "dataset": "imagenet"}, "--out data/train/x is in --data_dir"),
    (None, {"out": "data/run"}, "--out data/run is in --data_dir"),  # a class of the next run
    (None, {"prompt": "a " * 20 + "{}"}, "--prompt: 'baker's yeast' ends at token"),
    (None, {"attention_resolution": 5}, r"--attention_resolution 5 is none of \[4, 8\]"),
    (None, {"steps": 2000}, "--steps must be below 1000"),
    (leave_one, {"examples_per_class": 1, "few_shot": False}, "no image to guide; see --few_shot"),
]
OF_DREAMDA = [
    (None, {"prompt": "a " * 20 + "{}"}, "--prompt: 'a a .*yeast' ends at token"),
    (None, {"labels": "amts"}, "--labels.*'amts'"),
    (None, {"perturb": "head"}, "--perturb 'head'.* bottleneck, mid_input, "),
    (None, {"labels": "clip", "clip": "/nowhere/clip"}, "model '/nowhere/clip': there is no such folder"),
    (None, {"labels": "truth"}, "--labels truth: known for digits, not for folder"),
    (None, {"steps": 1000, "strength": 1}, "--steps 1000 with --strength 1"),
    (None, {"strength": 0.1}, "--steps 3 with --strength 0.1"),
    (None, {"unlabelled": 5}, "--unlabelled 5"),
    (None, {"synthetic": "/nowhere"}, "--synthetic: /nowhere/synthetic lacks images or their metadata"),
]
OF_DIAGEN = [
    (leave_one, {"examples_per_class": 1}, "no class has an image to spare for validation"),
    (None, {"initializer": " "}, "has no token for .*--initializer"),
    (None, {"prompts": "p.csv"}, "cannot read p.csv"),
    (None, {"prompts": "llm", "llm": "/nowhere/llm"}, "cannot load the model '/nowhere/llm'"),
    (None, {"strength": 0.1}, "--steps 4 with --strength 0.1"),
    (None, {"embeddings": "/nowhere"}, "--embeddings /nowhere must have .* lacks /nowhere/"),
    (None, {"frozen": True}, "--frozen trains one layer on random features"),
    (None, {"synthetic": "/nowhere"}, "--synthetic: /nowhere/synthetic lacks images or their metadata"),
]
MISTAKES = {actgen: OF_ACTGEN, dreamda: OF_DREAMDA, diagen: OF_DIAGEN}
MISTAKES = [(script, *mistake) for script, mistakes in MISTAKES.items() for mistake in mistakes]


@pytest.mark.parametrize("script, spoil, changes, words", MISTAKES, ids=[str(m[3]) for m in MISTAKES])
def test_a_mistake_ends_in_one_line_before_training(script, spoil, changes, words, mine, monkeypatch):
    monkeypatch.chdir(folder := mine["data_dir"].parent)
    if spoil:
        spoil(folder)
    outcome = in_this_process(script, "--no_baseline", **FOLDER[script] | mine | changes)
    assert re.search(words, the_error(outcome)) and not [*folder.rglob("config.json")]


# --- images and tokens of other runs


@pytest.mark.parametrize("script", [dreamda, diagen], ids=["dreamda", "diagen"])
def test_the_images_of_another_run_give_the_same_classifier(script, finished, tmp_path):
    source, out = finished(script)[0], tmp_path / "run"
    before = runs.result_and_files(source)
    stdout = run_well(script, "--no_baseline", **DIGITS[script] | {"synthetic": source, "out": out})
    title, (scores, files) = TITLES[script][-1], runs.result_and_files(out)
    assert "20 images generated in 0 s" in stdout and scores.pop(title) == before[0][title]
    log = [line for line in before[0].values() if line.get("classifier") == title]
    assert [*scores.values()] == log
    assert not any(name.startswith(("synthetic", "embeddings")) for name in files)
    assert runs.result_and_files(source) == before
    own = {dreamda: "labels.jsonl", diagen: "metadata.jsonl"}[script]
    assert lines_of(out / own) == lines_of(source / SYNTHETIC)
    assert height_of_picture(out) < 0.8 * height_of_picture(source)  # of what this run did


OTHERS = [
    (script, *other) for script in (dreamda, diagen) for other in (("seed", 1), ("examples_per_class", 3))
]
OTHERS += [(diagen, "variations", 1)]


@pytest.mark.parametrize("script, name, value", OTHERS)
def test_images_of_a_run_on_other_training_images_are_refused(script, name, value, finished, tmp_path):
    arguments = DIGITS[script] | {"synthetic": finished(script)[0], "out": tmp_path / "run"} | {name: value}
    error = the_error(in_this_process(script, **arguments))
    assert "is of other real images" in error and name in error


@pytest.mark.parametrize("labels", ["seed", "seed_heads", "head", "soft", "clip", "truth"])
def test_every_kind_of_label_trains(labels, finished, tmp_path):
    runs.tiny_clip(tmp_path / "clip", " ".join(world.NAMES))
    reuse = DIGITS[dreamda] | {"synthetic": finished(dreamda)[0], "unlabelled": 5, "threshold": 0.3}
    reuse |= {"clip": tmp_path / "clip", "labels": labels, "out": tmp_path / "run"}
    stdout = run_well(dreamda, "--no_baseline", **reuse)
    ((name, lines),) = runs.metrics_of(tmp_path / "run").items()
    assert name == dreamda.LABELS[labels] and re.search(r"\d+ of the 25 images of the pool", stdout)
    expected = {"soft": 1.0, "clip": 1.0, "truth": 1.0}
    expected |= dict.fromkeys(("seed", "seed_heads"), 20 / 25)  # an unlabelled image has no seed
    assert all(line["labelled"] == pytest.approx(expected.get(labels, line["labelled"])) for line in lines)
    assert all(("orthogonality" in line) == (labels == "seed_heads") for line in lines)


# --- several runs, several processes


LADDERS = {
    actgen: dict(epochs=2, eval_every=2, images_per_epoch=2, steps=2, examples_per_class=2),
    dreamda: dict(variations=1, epochs=1, eval_every=1),
    diagen: dict(variations=1, epochs=1, filter_epochs=1, inversion_steps=1, iterations=1),
}


@each_script
def test_the_ladder_runs_every_rung_with_every_seed(script, tmp_path):
    stdout = run_well(script, "--ladder", **DIGITS[script] | LADDERS[script], seeds=2, out=tmp_path)
    assert (tmp_path / "ladder.md").read_text(encoding="utf-8") in stdout
    folders = [tmp_path / f"{common.slug(rung)}-s1" for rung in script.METHOD.ladder]
    drawn = {actgen: [0] + [2] * 5, dreamda: [0] + [10] * 4 + [0], diagen: [0] + [10] * 4 + [0]}[script]
    assert [len([*folder.glob("synthetic/*/*.png")]) for folder in folders] == drawn
    for folder, changes in zip(folders, script.METHOD.ladder.values(), strict=True):
        args = runs.read_json(folder / "config.json")["args"]
        assert not args["baseline"]
        for name, value in changes.items():
            borrowed = name in ("synthetic", "embeddings")
            assert args[name] == (str(tmp_path / f"{common.slug(value)}-s1") if borrowed else value)
    if script is diagen:
        assert [len([*folder.glob("embeddings/*/*")]) for folder in folders] == [0, 0, 10, 0, 0, 0]


PROCESSES = {  # settings at which rounding is not amplified
    actgen: dict(few_shot=True, generation_batch_size=1, images_per_epoch=2, epochs=6, eval_every=6),
    dreamda: dict(variations=1, noise_scale=0.0, epochs=6, eval_every=6, baseline=False),
    diagen: dict(baseline=False, inversion_steps=2, inversion_lr=1e-4, sigmas=0.0, examples_per_class=0),
}


@each_script
def test_several_processes_draw_what_one_does(script, striped, tmp_path):
    """Two going on with a run of one that was killed; and, for DreamDA, one going on with a run of two.

    DreamDA's and DIAGen's images agree within two grey levels. Those of ActGen have the same guides and
    seeds, but depend on the classifier, which with two processes sees half of each batch in its batch norm.
    What is to be learnt is easy: all classifiers learn it.
    """
    arguments = FOLDER[script] | striped | PROCESSES[script] | dict(batch_size=8, lr=0.01)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))

    def run(out):
        run_well(script, **arguments, out=out)

    run(one)
    assert in_child(lambda: (runs.die_at(common.v2.functional, "to_pil_image", 3), run(two))) == 9
    assert runs.in_two_children(lambda: run(two)) == [0, 0]
    if script is dreamda:
        images = three / "synthetic"
        begun = runs.in_two_children(lambda: run(three), kill=lambda: len([*images.glob("*/*.png")]) > 2)
        assert begun == [-signal.SIGKILL] * 2 and not (three / "result.json").exists()
        run(three)
    if script is actgen:  # few-shot confidence is that before training, so that guidance does not fade
        centres = {}
        for record in lines_of(one / SYNTHETIC):
            centres.setdefault(record["guide_index"], set()).add(record["centre"])
        assert all(len(found) == 1 for found in centres.values()) and min(map(min, centres.values())) > 6

    def drawn(out):
        varying = ("centre", "confidence", "weight", "pseudo_label", "adversarial")
        return [{k: v for k, v in r.items() if k not in varying} for r in lines_of(out / SYNTHETIC)]

    for other in [two, three] if script is dreamda else [two]:
        assert drawn(other) == drawn(one)
        assert script is actgen or runs.grey_levels(one, other) <= 2
        names = [{str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} for out in (one, other)]
        assert names[0] == names[1]
        last = [*runs.read_json(other / "result.json").values()][-1]
        assert script is diagen or last["test"]["top1"] > 0.8


def test_two_processes_take_the_steps_of_one(striped, tmp_path):
    """But for rounding; without batch norm, augmentation and several batches in an epoch."""
    exact = dict(classifier="vit_small_patch16_224", optimizer="sgd", lr=0.05, batch_size=48, real_only=True)
    exact = FOLDER[dreamda] | striped | exact | dict(synthetic_ratio=2.0, epochs=3, eval_every=1)
    assert runs.in_two_children(lambda: in_this_process(dreamda, **exact, out=tmp_path / "two")) == [0, 0]
    run_well(dreamda, **exact, out=tmp_path / "one")
    logs = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    two, one = ([line["scores"]["test"]["nll"] for line in log] for log in logs)
    assert two == pytest.approx(one, rel=1e-2) and one[2] != pytest.approx(one[0], rel=0.1)
