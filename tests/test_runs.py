"""Whole runs of the three scripts, as a user starts them: what they leave, kills, faults, mistakes."""

import functools
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import actgen
import common
import diagen
import dreamda
from digits import world
from runs import (
    TWO_PROCESSES,
    check_imagefolder,
    check_kill,
    check_ladder,
    cut,
    die_at,
    empty,
    exit_status,
    grey_levels,
    in_child,
    in_own_process,
    in_this_process,
    in_two_children,
    lines_of,
    metrics_of,
    read_json,
    result_and_files,
    start_child,
    stripes,
    the_error,
    tiny_clip,
)

pytestmark = pytest.mark.usefixtures("quick")

ACTGEN = dict(epochs=4, images_per_epoch=4, generation_batch_size=2, steps=4, eval_every=4, genval_share=0.5)
DREAMDA = dict(variations=2, steps=3, generation_batch_size=6, epochs=2, eval_every=2, batch_size=8, heads=2)
DIAGEN = dict(epochs=2, iterations=2, filter_epochs=2, batch_size=4, steps=4, variations=2, inversion_steps=4)
DIAGEN |= dict(inversion_batch_size=2, generation_batch_size=4, prompts_per_class=3)
TINY = {actgen: ACTGEN, dreamda: DREAMDA, diagen: DIAGEN}
DIGITS = {  # a tiny run on digits
    actgen: ACTGEN | dict(examples_per_class=4),
    dreamda: DREAMDA | dict(examples_per_class=1, threshold=0.0),
    diagen: DIAGEN | dict(examples_per_class=1, generation_batch_size=20, inversion_steps=2),
}
OWN = dict(dataset="folder", diffusion=common.DIGITS_SD, classifier="small_cnn", image_size=32, workers=0)
OWN |= dict(augment="crop", lr=1e-3, pretrained=False, examples_per_class=0)
FOLDER = {  # a tiny run on a folder of images; the test adds data_dir and out
    actgen: ACTGEN | OWN | dict(attention_resolution=8, optimizer="adamw", batch_size=4),
    dreamda: DREAMDA | OWN | dict(optimizer="adamw"),
    diagen: DIAGEN | OWN | dict(examples_per_class=4, frozen=False),
}
TITLES = {
    actgen: ["real only", "ActGen"],
    dreamda: ["standard augmentation", "seed labels", "AMST"],
    diagen: ["standard augmentation", "DA-Fusion", "DIAGen"],
}
IMAGES = {actgen: 8, dreamda: 20, diagen: 20}  # synthetic images of the tiny run on digits
each_script = pytest.mark.parametrize("script", TINY, ids=[script.__name__ for script in TINY])
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
        for i, (image, y) in enumerate(zip(*stripes(count, len(split)), strict=True)):
            folder = tmp_path / "stripes" / split / world.NAMES[y]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    return {"data_dir": tmp_path / "stripes", "image_size": 16, "augment": "none"}


# --- what a run leaves


@each_script
def test_a_run_writes_all_its_files(script, finished):
    out, stdout = finished(script)
    config = read_json(out / "config.json")
    assert config["args"] | DIGITS[script] == config["args"] and "torch" in config["versions"]
    assert {name for name, value in config["args"].items() if value is None} <= {"style"}
    result, metrics = read_json(out / "result.json"), metrics_of(out)
    assert list(result) == list(metrics) == TITLES[script]
    for title, lines in metrics.items():
        assert [line["epoch"] for line in lines] == [*range(1, DIGITS[script]["epochs"] + 1)]
        assert all(np.isfinite(line["loss"]) and line["seconds"] > 0 for line in lines)
        assert script is diagen or lines[-1]["test"] == result[title]["test"]["top1"]
    for split in ("test", "test_ood"):
        *printed, gain = map(float, re.search(rf"^{split} +(.+)$", stdout, re.M)[1].split())
        accuracies = [100 * scores[split]["top1"] for scores in result.values()]
        assert printed == pytest.approx(accuracies, abs=0.051)
        assert gain == pytest.approx(accuracies[-1] - accuracies[0], abs=0.051)
    assert re.search(rf"^accuracy in % +{'  +'.join(TITLES[script])} +gain$", stdout, re.M)
    assert int(re.search(r"(\d+) images generated", stdout)[1]) == IMAGES[script]
    pictures = [out / "curves.png", *(out / "samples").iterdir()]
    assert len(pictures) > 1 and all(min(Image.open(picture).size) >= 64 for picture in pictures)
    records = lines_of(out / SYNTHETIC)
    check_imagefolder(out / "synthetic", records)
    assert len(records) == IMAGES[script] == len([*out.glob("synthetic/*/*.png")])
    assert all(r["class_name"] == world.NAMES[r["label"]] == r["file_name"].split("/")[0] for r in records)


@each_script
def test_a_loaded_classifier_scores_what_the_run_reported(script, finished):
    """Of every title, on test and test_ood; an unknown title is refused."""
    (out, _), data = finished(script), common.load_data("digits", "", 32)
    for title, scores in read_json(out / "result.json").items():
        net, names = common.load_classifier(out, title)
        again = common.evaluate(net, data, common.make_accelerator())
        assert names == world.NAMES and not net.training
        for split in ("test", "test_ood"):
            assert again[split] == pytest.approx(scores[split], rel=1e-4)
    with pytest.raises(common.UserError, match="has no trained classifier 'ActDream'"):
        common.load_classifier(out, "ActDream")


def test_actgens_images_join_the_training_set_and_gen_val_at_half_time(finished):
    out, _ = finished(actgen)
    lines = metrics_of(out)["ActGen"]
    assert [line["synthetic"] for line in lines] == [0, 4, 8, 8]
    assert [line["images"] - line["synthetic"] for line in lines] == [20, 20, 40, 40]
    files = {path.stem for path in out.glob("synthetic/*/*.png")}
    assert files == {path.stem for path in out.glob("latents/*.pt")} and len(files) == 8
    assert torch.load(next(out.glob("latents/*.pt")), weights_only=True).shape == (4, 16, 16)
    planned = [record for path in sorted(out.glob("plans/*")) for record in read_json(path)]
    assert planned == lines_of(out / SYNTHETIC)
    assert [r["seed"] for r in planned] == [[0, j // 4, j % 4] for j in range(8)]


def test_dreamda_says_how_many_images_of_its_pool_have_a_label_and_how_many_rightly(finished, tmp_path):
    out, stdout = finished(dreamda)
    metrics, records = metrics_of(out), lines_of(out / SYNTHETIC)
    assert all(np.isfinite(line["orthogonality"]) for line in metrics["AMST"])
    assert [r["guide_index"] for r in records] == [i for i in range(10) for _ in range(2)]
    few = sum(r["pseudo_label"] is not None for r in records)  # two new heads hardly agree
    assert f"{few} of the 20 images of the pool have a label" in stdout
    reuse = DIGITS[dreamda] | {"synthetic": out, "labels": "head", "out": tmp_path}
    stdout, records = run_well(dreamda, "--no_baseline", **reuse), lines_of(tmp_path / "labels.jsonl")
    images = common.images_of(records, out / "synthetic", common.make_transforms(32)[1])
    truth = common.load_data("digits", "", 32).truth(images, common.make_accelerator())
    right = (torch.tensor([r["pseudo_label"] for r in records]) == truth).float().mean()
    assert f"20 of the 20 images of the pool have a label; {100 * right:.0f} % of these" in stdout


def test_diagens_best_epoch_counts_and_its_images_have_prompts_and_weights(finished):
    out, _ = finished(diagen)
    result, metrics = read_json(out / "result.json"), metrics_of(out)
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
        assert r["prompt"].replace(f"<{name}|{variant}>", "{name}") == prompts[name][variant]
        assert r["seed"] == [0, r["guide_index"], variant] and 0 <= r["confidence"] <= 1
    q, w = (torch.tensor([r[key] for r in records]).view(10, 2) for key in ("confidence", "weight"))
    assert torch.allclose(diagen.weights_of(q), w) and w.std() > 0
    plain = lines_of(out / "da_fusion" / "metadata.jsonl")
    assert all(r["weight"] == 0.5 and r["prompt"] == f"a photo of a <{r['class_name']}|0>" for r in plain)
    assert len([*out.glob("da_fusion/*/*.png")]) == 20 == 2 * len([*out.glob("embeddings/*/*")])


OTHER = {actgen: ("steps", 4, 5), dreamda: ("threshold", 0.0, 0.5), diagen: ("lr", 0.001, 0.002)}


@each_script
def test_a_finished_run_says_so_refuses_other_arguments_and_can_be_overwritten(script, finished, tmp_path):
    (first, printed), out = finished(script), tmp_path / "copy"
    shutil.copytree(first, out)
    stdout = run_well(script, **DIGITS[script], out=out)
    assert "is finished" in stdout and stdout.endswith(printed.replace(str(first), str(out))[-90:])
    name, old, new = OTHER[script]
    error = the_error(in_this_process(script, **DIGITS[script] | {name: new}, out=out))
    assert f"--{name} {old}" in error and f"--{name} {new}" in error and str(out) in error
    (out / "synthetic" / "old.png").touch()
    stdout = run_well(script, "--overwrite", "--no_baseline", **DIGITS[script] | {name: new}, out=out)
    assert "is finished" not in stdout
    assert not (out / "synthetic" / "old.png").exists() and list(metrics_of(out)) == TITLES[script][-1:]
    assert read_json(out / "config.json")["args"][name] == new


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


def test_torchrun_works_on_cpus_without_further_settings(mine):
    """As a user starts two processes, where nothing is imported but by the script."""
    status, stdout, stderr = in_own_process(actgen, launcher=TWO_PROCESSES, **FOLDER[actgen] | mine)
    assert status == 0 and "8 images generated" in stdout, stderr
    assert stdout.count("images generated") == 1 and (mine["out"] / "curves.png").exists()


@each_script
def test_real_images_alone_need_no_generator(script, mine):
    stdout = run_well(script, "--real_only", **FOLDER[script] | mine | {"diffusion": "/nowhere/sd"})
    assert "0 images generated" in stdout
    assert list(read_json(mine["out"] / "result.json")) == TITLES[script][:1]


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
        return result_and_files(out), time.time() - clock

    return run


KILLS = {  # what the run was doing: script, the function whose n-th call ends the process
    "training ActGen's baseline": (actgen, common, "train_epoch", 3),
    "asking the classifier": (actgen, actgen, "ask", 2),
    "drawing a second batch after the second epoch": (actgen, actgen, "generate", 4),
    "writing images": (actgen, common, "to_pil", 8),
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
    expected, _ = uninterrupted(script)
    check_kill(module, name, n, functools.partial(a_run, script), tmp_path, expected, result_and_files)


@each_script
def test_twenty_kills_at_random_moments_change_nothing(script, tmp_path, uninterrupted):
    (expected, seconds), kills, out = uninterrupted(script), 0, tmp_path / "killed"
    rng = random.Random(0)
    while kills < 20:
        pid = start_child(lambda: a_run(script, out))
        time.sleep(rng.uniform(0, seconds / 3))
        os.kill(pid, signal.SIGKILL)
        if exit_status(pid) == -signal.SIGKILL:
            kills += 1
        else:  # it was done before
            assert result_and_files(out) == expected
            shutil.rmtree(out)
    assert in_child(lambda: a_run(script, out)) == 0
    assert result_and_files(out) == expected


@each_script
def test_data_that_changed_between_a_kill_and_going_on_is_refused(script, mine):
    arguments = FOLDER[script] | mine
    assert in_child(lambda: (die_at(common, "set_lr", 3), in_this_process(script, **arguments))) == 9
    Image.new("RGB", (20, 20)).save(mine["data_dir"] / "train" / "guinea pig" / "added.png")
    error = the_error(in_this_process(script, **arguments))
    assert re.search(r"the data set changed since the run in .*(train|val): \d+ images", error)
    run_well(script, "--overwrite", "--no_baseline", **arguments)


def test_a_killed_run_goes_on_only_with_its_own_arguments_but_with_less_memory(tmp_path, uninterrupted):
    """Another batch size of generation and other loading processes change no image but for rounding."""
    assert in_child(lambda: (die_at(common, "to_pil", 8), a_run(dreamda, tmp_path / "run"))) == 9
    same = DIGITS[dreamda] | dict(paths=2, unlabelled=4, out=tmp_path / "run")
    assert "--guidance_scale" in the_error(in_this_process(dreamda, **same | {"guidance_scale": 1.5}))
    run_well(dreamda, "--gradient_checkpointing", **same | dict(generation_batch_size=2, workers=1))
    assert in_child(lambda: a_run(dreamda, tmp_path / "whole")) == 0
    assert grey_levels(tmp_path / "run", tmp_path / "whole") <= 2
    shutil.move(tmp_path / "run", moved := tmp_path / "elsewhere" / "run")
    (moved / "result.json").unlink()
    shutil.copytree(common.DIGITS_SD, tmp_path / "sd")  # a model folder that moved
    run_well(dreamda, **same | dict(out=moved, diffusion=tmp_path / "sd"))


def test_images_that_are_missing_are_drawn_again_the_same(tmp_path, uninterrupted):
    """With their whole batches, whose size decides over the last bits."""
    assert in_child(lambda: (die_at(dreamda, "make_pool", 1), a_run(dreamda, tmp_path))) == 9
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("synthetic/*/*.png")}
    for i in (0, 7):
        (tmp_path / "synthetic" / lines_of(tmp_path / SYNTHETIC)[i]["file_name"]).unlink()
    assert in_child(lambda: a_run(dreamda, tmp_path)) == 0
    assert result_and_files(tmp_path) == uninterrupted(dreamda)[0]
    assert sum(path.stat().st_mtime_ns != time for path, time in times.items()) == 12


def test_ctrl_c_says_that_the_run_can_go_on(mine, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_epoch", lambda *_: signal.raise_signal(signal.SIGINT))
        assert "stopped; the same command goes on" in the_error(
            in_this_process(actgen, **FOLDER[actgen] | mine)
        )
    signal.signal(signal.SIGINT, before)
    run_well(actgen, **FOLDER[actgen] | mine)


# --- faults of machines


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_space(tmp_path):
    (tmp_path / "ActGen.pt.tmp").symlink_to("/dev/full")
    error = the_error(in_this_process(actgen, "--no_baseline", **DIGITS[actgen], out=tmp_path))
    assert "No space left on device" in error
    (tmp_path / "ActGen.pt.tmp").unlink()
    run_well(actgen, "--no_baseline", **DIGITS[actgen], out=tmp_path)


@pytest.mark.skipif(not Path("/sys").exists(), reason="needs a folder where even root cannot write")
def test_a_folder_that_cannot_be_written_is_named():
    error = the_error(in_this_process(actgen, **DIGITS[actgen], out="/sys/run"))
    assert "cannot read or write /sys/run: " in error


# --- mistakes


def leave_one(d):
    for folder in (d / "data/train").iterdir():
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()


def write_prompts(text):
    return lambda d: (d / "p.csv").write_text(text)


OF_ACTGEN = [  # what is done to the folder, arguments, words of the error
    (lambda d: cut(d / "data/train/guinea pig/5.png"), {}, "1 of 20 images: .*/train/guinea pig/5.png"),
    (lambda d: empty(d / "sd"), {"diffusion": "sd"}, "cannot load the model 'sd': it must be a folder"),
    (lambda d: (d / "file").touch(), {"out": "file"}, "file"),
    (None, {"prompt": "a " * 20 + "{}"}, "--prompt: the class 'baker's yeast' ends at token"),
    (None, {"epochs": 1}, r"--epochs 1 must lie in \[2, 1e6\]"),  # of which no half could draw images
    (None, {"attention_resolution": 5}, "--attention_resolution 5: this U-Net has cross-attention at "),
    (None, {"steps": 2000}, "--steps 2000: the model was trained with 1000 only"),
]
OF_DREAMDA = [
    (None, {"labels": "amts"}, "--labels.*'amts'"),
    (None, {"inversion": "ddpm"}, "--inversion.*'ddpm'"),
    (None, {"perturb": "head"}, "--perturb 'head'.* bottleneck, mid_input, "),
    (None, {"labels": "clip", "clip": "/nowhere/clip"}, "cannot load the model '/nowhere/clip'"),
    (None, {"labels": "truth"}, "--labels truth: for folder the truth is not known"),
    (None, {"heads": 1}, "--heads 1"),
    (None, {"steps": 1000, "strength": 1}, "--steps 1000 with --strength 1"),
    (None, {"strength": 0.1}, "--steps 3 with --strength 0.1"),
    (None, {"unlabelled": 5}, "--unlabelled 5"),
    (None, {"synthetic": "/nowhere"}, "--synthetic: /nowhere/synthetic lacks images or their metadata"),
]
OF_DIAGEN = [
    (None, {"method": "diagram"}, "--method.*'diagram'"),
    (leave_one, {"examples_per_class": 1}, "no class has an image to spare for validation"),
    (None, {"initializer": " "}, "has no token for .*--initializer"),
    (write_prompts(""), {"prompts": "p.csv"}, "p.csv has no prompts"),
    (None, {"prompts": "p.csv"}, "cannot read p.csv"),
    (write_prompts("\n\nguinea pig;1\n"), {"prompts": "p.csv"}, "p.csv, line 3"),
    (write_prompts("guinea pig;1;a pig"), {"prompts": "p.csv"}, "line 1: 'guinea pig' .*exactly once"),
    (write_prompts("owl;1;an owl"), {"prompts": "p.csv"}, "line 1: .*'owl'"),
    (None, {"prompts": "llm", "llm": "/nowhere/llm"}, "cannot load the model '/nowhere/llm'"),
    (None, {"sigmas": -1}, r"--sigmas -1.0 must lie in "),
    (None, {"strength": 0.1}, "--steps 4 with --strength 0.1"),
    (None, {"embeddings": "/nowhere"}, "--embeddings /nowhere"),
    (None, {"frozen": True}, "--frozen trains one layer on random features"),
    (None, {"synthetic": "/nowhere"}, "--synthetic: /nowhere/synthetic lacks images or their metadata"),
]
MISTAKES = {actgen: OF_ACTGEN, dreamda: OF_DREAMDA, diagen: OF_DIAGEN}
MISTAKES = [(script, *mistake) for script, mistakes in MISTAKES.items() for mistake in mistakes]


@pytest.mark.parametrize("script, spoil, changes, words", MISTAKES, ids=[str(m[3]) for m in MISTAKES])
def test_a_mistake_ends_in_one_line_before_training(script, spoil, changes, words, mine, monkeypatch):
    monkeypatch.chdir(mine["data_dir"].parent)
    if spoil:
        spoil(mine["data_dir"].parent)
    outcome = in_this_process(script, "--no_baseline", **FOLDER[script] | mine | changes)
    assert re.search(words, the_error(outcome)) and not (mine["out"] / "config.json").exists()


@each_script
def test_after_mistakes_the_corrected_command_runs(script, mine):
    """What mistakes leave, which show before anything is trained, does not matter."""
    for name, value in (("classifier", "resnet81"), ("diffusion", "/nowhere/sd"), ("batch_size", 0)):
        the_error(in_this_process(script, **FOLDER[script] | mine | {name: value}))
    run_well(script, "--no_baseline", **FOLDER[script] | mine)


# --- images and tokens of other runs


@pytest.mark.parametrize("script", [dreamda, diagen], ids=["dreamda", "diagen"])
def test_the_images_of_another_run_give_the_same_classifier(script, finished, tmp_path):
    """Nothing is generated, and the other run is left alone."""
    source, out = finished(script)[0], tmp_path / "run"
    before = result_and_files(source)
    stdout = run_well(script, "--no_baseline", **DIGITS[script] | {"synthetic": source, "out": out})
    title, (scores, files) = TITLES[script][-1], result_and_files(out)
    assert "20 images generated in 0 s" in stdout and scores.pop(title) == before[0][title]
    log = [line for line in before[0].values() if line.get("classifier") == title]
    assert [*scores.values()] == log
    assert not any(name.startswith(("synthetic", "embeddings")) for name in files)
    assert result_and_files(source) == before
    own = {dreamda: "labels.jsonl", diagen: "metadata.jsonl"}[script]
    assert lines_of(out / own) == lines_of(source / SYNTHETIC)


@pytest.mark.parametrize("name, value", [("seed", 1), ("variations", 1), ("examples_per_class", 2)])
def test_diagen_refuses_images_of_a_run_on_other_training_images(name, value, finished, tmp_path):
    arguments = DIGITS[diagen] | {"synthetic": finished(diagen)[0], "out": tmp_path / "run"} | {name: value}
    error = the_error(in_this_process(diagen, **arguments))
    assert "is of other real images" in error and name in error


def prompts_of(mine, *words, **changes):
    """The prompts with which a DIAGen run without baselines draws, by class, and the records."""
    arguments = FOLDER[diagen] | mine | changes
    run_well(diagen, "--no_baseline", *words, **arguments)
    records = lines_of(Path(arguments["out"]) / SYNTHETIC)
    names = ("baker's yeast", "guinea pig")
    return {n: [r["prompt"] for r in records if r["class_name"] == n] for n in names}, records


def test_without_prompts_a_token_stands_in_the_template(mine):
    prompts, records = prompts_of(mine, prompts="none", prompt="one {} here", sigmas=0.01)
    assert set(prompts["guinea pig"]) == {"one <guinea pig|0> here"} and "confidence" in records[0]


def test_da_fusion_has_no_noise_no_prompts_and_no_weights_unless_they_are_given(mine, tmp_path):
    prompts, records = prompts_of(mine, method="da_fusion")
    assert prompts == {name: [f"a photo of a <{name}|0>"] * 8 for name in prompts}
    assert all(r["weight"] == 0.5 and "confidence" not in r for r in records)
    assert list(read_json(mine["out"] / "result.json")) == ["DA-Fusion"]
    given = mine | {"out": tmp_path / "given", "embeddings": mine["out"]}
    assert len(set(prompts_of(given, method="da_fusion", prompts="bank")[0]["guinea pig"])) == 3


def test_real_guidance_learns_no_tokens(mine, monkeypatch):
    monkeypatch.setattr(diagen, "textual_inversion", None)
    prompts, _ = prompts_of(mine, method="real_guidance")
    assert prompts == {name: [f"a photo of a {name}"] * 8 for name in prompts}
    assert not (mine["out"] / "embeddings").exists()


def test_prompts_of_a_file_are_drawn_in_turn_and_learned_tokens_are_used_again(mine, tmp_path, monkeypatch):
    (tmp_path / "mine.csv").write_text('guinea pig;1;"a Guinea Pig; asleep"\nguinea pig;2;a wet {name}\n')
    options = dict(prompts=tmp_path / "mine.csv", sigmas=0.01)
    prompts, _ = prompts_of(mine, **options)
    assert prompts["guinea pig"] == ["a <guinea pig|0>; asleep", "a wet <guinea pig|0>"] * 4
    assert prompts["baker's yeast"] == ["a photo of a <baker's yeast|0>"] * 8
    monkeypatch.setattr(diagen, "textual_inversion", None)
    again = mine | {"out": tmp_path / "again"}
    prompts_of(again, **options, embeddings=mine["out"], inversion_steps=500)
    assert grey_levels(mine["out"], again["out"]) == 0 and not (again["out"] / "embeddings").exists()


def test_a_language_model_is_asked_once_and_its_prompts_are_kept(mine, monkeypatch):
    def ask(model, names, count, uncommon):
        assert (model, uncommon) == ("my/model", True)
        return [[f"a {{}} number {k}" for k in range(count)] for _ in names]

    def load(cls, model, **options):  # its template is looked at before anything is trained
        known = SimpleNamespace(chat_template="{{ messages }}")
        return known if model == "my/model" else from_pretrained(cls, model, **options)

    from_pretrained, changes = common.from_pretrained, {"prompts": "llm", "llm": "my/model"}
    monkeypatch.setattr(common, "from_pretrained", load)
    monkeypatch.setattr(diagen, "ask_llm", ask)
    assert in_child(lambda: (die_at(diagen, "img2img", 1), prompts_of(mine, "--uncommon", **changes))) == 9
    monkeypatch.setattr(diagen, "ask_llm", None)
    prompts, _ = prompts_of(mine, "--uncommon", **changes)
    numbers = [re.sub("<.*>", "x", prompt) for prompt in prompts["guinea pig"]]
    assert numbers == [f"a x number {k}" for k in (0, 1, 2, 0, 1, 2, 0, 1)]


@pytest.mark.parametrize("labels", ["seed", "seed_heads", "head", "soft", "clip", "truth"])
def test_every_kind_of_label_trains(labels, finished, tmp_path):
    tiny_clip(tmp_path / "clip", " ".join(world.NAMES))
    reuse = DIGITS[dreamda] | {"synthetic": finished(dreamda)[0], "unlabelled": 5, "threshold": 0.3}
    reuse |= {"clip": tmp_path / "clip", "labels": labels, "out": tmp_path / "run"}
    stdout = run_well(dreamda, "--no_baseline", **reuse)
    ((name, lines),) = metrics_of(tmp_path / "run").items()
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
    """Rungs use images and tokens of others, as the ladder says, and draw only where it does not."""
    stdout = run_well(script, "--ladder", **DIGITS[script] | LADDERS[script], seeds=2, out=tmp_path)
    assert (tmp_path / "ladder.md").read_text(encoding="utf-8") in stdout
    check_ladder(script, tmp_path, seeds=(0, 1))
    folders = [tmp_path / f"{common.slug(rung)}-s1" for rung in script.METHOD.ladder]
    drawn = {actgen: [0, 0] + [2] * 5, dreamda: [0] + [10] * 4 + [0], diagen: [0] + [10] * 4 + [0]}[script]
    assert [len([*folder.glob("synthetic/*/*.png")]) for folder in folders] == drawn
    for folder, changes in zip(folders, script.METHOD.ladder.values(), strict=True):
        args = read_json(folder / "config.json")["args"]
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
    assert in_child(lambda: (die_at(common, "to_pil", 3), run(two))) == 9
    assert in_two_children(lambda: run(two)) == [0, 0]
    if script is dreamda:
        begun = in_two_children(lambda: run(three), kill=lambda: len([*three.glob("synthetic/*/*.png")]) > 2)
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
        assert script is actgen or grey_levels(one, other) <= 2
        names = [{str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} for out in (one, other)]
        assert names[0] == names[1]
        last = [*read_json(other / "result.json").values()][-1]
        assert script is diagen or last["test"]["top1"] > 0.8


def test_two_processes_take_the_steps_of_one(striped, tmp_path):
    """But for rounding; without batch norm, augmentation and several batches in an epoch."""
    exact = dict(classifier="vit_small_patch16_224", optimizer="sgd", lr=0.05, batch_size=48, real_only=True)
    exact = FOLDER[dreamda] | striped | exact | dict(synthetic_ratio=2.0, epochs=3, eval_every=1)
    assert in_two_children(lambda: in_this_process(dreamda, **exact, out=tmp_path / "two")) == [0, 0]
    run_well(dreamda, **exact, out=tmp_path / "one")
    logs = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    two, one = ([line["scores"]["test"]["nll"] for line in log] for log in logs)
    assert two == pytest.approx(one, rel=1e-2) and one[2] != pytest.approx(one[0], rel=0.1)


def test_the_oracle_reads_held_out_digits(digits):
    """The truth in reports rests on it."""
    read = digits.truth(digits.test, common.make_accelerator())
    assert (read == torch.tensor(digits.test.labels)).float().mean() > 0.95
