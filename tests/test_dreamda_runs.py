"""Runs of dreamda.py as a user gives them: end to end, interrupted, with mistakes, on several processes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from runs import (
    TWO_PROCESSES,
    begun_by_two,
    check_imagefolder,
    check_kill,
    check_ladder,
    cut,
    die_at,
    empty,
    in_child,
    in_own_process,
    in_this_process,
    lines_of,
    result_and_files,
    the_error,
    tiny_clip,
)

import common
import dreamda

pytestmark = pytest.mark.usefixtures("quick")
TINY = dict(variations=2, steps=3, generation_batch_size=6, epochs=2, eval_every=2, batch_size=8, heads=2)
DIGITS = TINY | dict(examples_per_class=1)
FOLDER = TINY | dict(
    dataset="folder", classifier="small_cnn", pretrained=False, image_size=32, augment="crop",
    diffusion=common.ROOT / "digits_sd", optimizer="adamw", lr=1e-3, workers=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    status, stdout, stderr = in_this_process(dreamda, **DIGITS, threshold=0.0, out=out)
    assert status == 0, stderr
    return out, stdout


def test_a_run_writes_all_its_files(finished):
    out, stdout = finished
    config = json.loads((out / "config.json").read_text())
    assert config["args"] | DIGITS == config["args"] and config["args"]["labels"] == "amst"
    assert None not in {k: v for k, v in config["args"].items() if k != "synthetic"}.values()
    result = json.loads((out / "result.json").read_text())
    assert list(result) == ["standard augmentation", "seed labels", "AMST"]
    for kind, name in (("none", "standard augmentation"), ("seed", "seed labels"), ("metrics", "AMST")):
        log = lines_of(out / f"{kind}.jsonl")
        assert [line["epoch"] for line in log] == [1, 2] and {line["images"] for line in log} == {10}
        assert {line["pool"] for line in log} == {0 if kind == "none" else 20}
        assert all("labelled" in line for line in log) == (kind != "none")
        assert log[-1]["test"] == result[name]["test"]["top1"]
    assert [line["labelled"] for line in lines_of(out / "seed.jsonl")] == [1.0, 1.0]
    assert all(np.isfinite(line["orthogonality"]) for line in log)
    for split in ("test", "test_ood"):
        printed = re.search(rf"^{split} +accuracy: (.+) \(", stdout, re.M)[1]
        assert printed == ", ".join(f"{k} {100 * r[split]['top1']:.1f} %" for k, r in result.items())
    assert {"fid", "kid", "precision", "recall", "oracle"} == set(result["AMST"]["distances"])
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["epoch"] == 2
    for picture in (out / "curves.png", out / "samples" / "variations.png"):
        assert min(Image.open(picture).size) >= 64


def test_the_synthetic_folder_is_an_image_folder_with_pseudo_labels(finished):
    out, stdout = finished
    images = torchvision.datasets.ImageFolder(out / "synthetic")
    records = lines_of(out / "synthetic" / "metadata.jsonl")
    assert len(images) == len(records) == int(re.search(r"(\d+) images generated", stdout)[1]) == 20
    check_imagefolder(out / "synthetic", records)
    for r in records:
        assert r["class_name"] == common.DIGIT_NAMES[r["label"]] == r["file_name"].split("/")[0]
        assert r["prompt"] == f"a photo of a {r['class_name']}" and len(r["seed"]) == 3
        assert r["pseudo_label"] in (None, *range(10))
    assert {r["guide_index"] for r in records} == set(range(10))
    assert all(image.size == (32, 32) for image, _ in images)


def test_a_finished_run_says_so_refuses_other_arguments_and_can_be_overwritten(finished, tmp_path):
    shutil.copytree(finished[0], out := tmp_path / "copy")
    status, stdout, _ = in_this_process(dreamda, **DIGITS, threshold=0.0, out=out)
    assert status == 0 and "is finished" in stdout
    assert stdout.splitlines()[-3:] == finished[1].replace(str(finished[0]), str(out)).splitlines()[-3:]
    error = the_error(in_this_process(dreamda, **DIGITS, threshold=0.5, out=out))
    assert "--threshold 0.0" in error and "--threshold 0.5" in error and str(out) in error
    other = DIGITS | {"variations": 1, "baseline": False}
    status, stdout, _ = in_this_process(dreamda, "--overwrite", **other, out=out)
    assert status == 0 and "10 images generated" in stdout
    assert len([*out.glob("synthetic/*/*.png")]) == 10 and not (out / "seed.jsonl").exists()


def test_the_same_images_give_the_same_classifier_and_nothing_is_generated(finished, tmp_path):
    out, before = tmp_path / "run", result_and_files(finished[0])
    reuse = DIGITS | {"synthetic": finished[0], "baseline": False, "threshold": 0.0, "out": out}
    status, stdout, stderr = in_this_process(dreamda, **reuse)
    assert status == 0 and "20 images generated in 0 s" in stdout, stderr
    scores, files = result_and_files(out)
    assert scores == {"AMST": before[0]["AMST"]} and files["metrics.jsonl"] == before[1]["metrics.jsonl"]
    assert not any(name.startswith("synthetic") for name in files)
    assert result_and_files(finished[0]) == before


@pytest.mark.parametrize("labels", ["seed", "head", "soft", "clip"])
def test_every_kind_of_label_trains(labels, finished, tmp_path):
    tiny_clip(tmp_path / "clip", " ".join(common.DIGIT_NAMES))
    out = tmp_path / "run"
    reuse = DIGITS | {"synthetic": finished[0], "baseline": False, "clip": tmp_path / "clip", "unlabelled": 5}
    status, _, stderr = in_this_process(dreamda, **reuse, labels=labels, threshold=0.3, out=out)
    assert status == 0, stderr
    ((name, scores),) = json.loads((out / "result.json").read_text()).items()
    log = lines_of(out / "metrics.jsonl")
    assert name == dreamda.CLASSIFIERS[labels] and 0 <= scores["test"]["top1"] <= 1
    assert {line["pool"] for line in log} == {25}
    expected = {"seed": 20 / 25, "soft": 1.0, "clip": 1.0}  # an unlabelled image has no seed
    assert all(line["labelled"] == pytest.approx(expected.get(labels, line["labelled"])) for line in log)


def opened(out, **changes):
    args = dreamda.resolve(dreamda.Args(**DIGITS | changes, out=str(out)))
    accelerator = common.make_accelerator()
    return args, common.Run(out, args, accelerator), accelerator


def test_unlabelled_images_are_some_of_what_the_few_shot_draw_left(tmp_path):
    args, run, accelerator = opened(tmp_path, unlabelled=30)
    data = common.load_data("digits", "", 32, "digits", args.examples_per_class, args.seed)
    data.train.sources[0].save(tmp_path / "a.png")
    records = [{"file_name": "a.png", "label": 3}] * 5
    pool, _ = dreamda.make_pool(args, run, accelerator, data, tmp_path, records)
    assert pool.seed_labels.tolist() == [3] * 5 + [-1] * 30 and len(pool.images) == len(pool.truth) == 35
    left = zip(data.unlabelled.sources, data.unlabelled.labels, strict=True)
    left = {image.tobytes(): y for image, y in left}
    drawn = [image.tobytes() for image in pool.images.sources[5:]]
    assert len(set(drawn)) == 30 and [left[image] for image in drawn] == pool.truth[5:].tolist()
    assert not {image.tobytes() for image in data.train.sources} & set(drawn)


def test_the_final_pseudo_labels_are_written_and_changed_ones_shown(tmp_path, monkeypatch):
    _, run, _ = opened(tmp_path)
    records = [{"file_name": f"{i}.png", "label": 1} for i in range(3)]
    for i in range(3):
        common.save_png(torch.full((3, 32, 32), i / 4), tmp_path / f"{i}.png")
    targets = torch.eye(4)[[1, 2, 2, 0]]  # of three synthetic images and an unlabelled one
    labelled = torch.tensor([True, True, False, True])
    shown = []
    monkeypatch.setattr(common, "save_captioned", lambda *arguments: shown.append(arguments))
    dreamda.save_labels(run, tmp_path, records, targets, labelled, [*"abcd"], own=True)
    written = lines_of(tmp_path / "synthetic" / "metadata.jsonl")
    assert [r["pseudo_label"] for r in written] == [1, 2, None]
    relabelled = tmp_path / "samples" / "relabelled.png"
    assert shown == [([tmp_path / "1.png"], ["b → c"], relabelled, 8)]  # the second image alone


def test_a_folder_of_ones_own_images_runs_end_to_end(mine):
    status, stdout, stderr = in_this_process(dreamda, **mine)
    assert status == 0 and "20 images generated" in stdout, stderr
    records = lines_of(mine["out"] / "synthetic" / "metadata.jsonl")
    assert [r["class_name"] for r in records] == ["baker's yeast"] * 10 + ["guinea pig"] * 10
    assert all((mine["out"] / "synthetic" / r["file_name"]).exists() for r in records)
    guides = {r["guide"]: r["guide_index"] for r in records}
    assert len(guides) == len(set(guides.values())) == 10
    assert all(Path(g).is_relative_to(mine["data_dir"] / "train") and Path(g).exists() for g in guides)
    assert json.loads((mine["out"] / "result.json").read_text())["AMST"]["distances"] == {}  # no oracle


def a_run(out, **changes):
    args = DIGITS | dict(inversions=2, unlabelled=4, out=str(out))
    dreamda.main(dreamda.Args(**args | changes))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert in_child(lambda: a_run(out)) == 0
    return result_and_files(out)


@pytest.mark.parametrize(
    "module, name, n",
    [
        pytest.param(dreamda, "vary", 3, id="generating"),
        pytest.param(common, "save_png", 8, id="writing images"),
        pytest.param(torch, "save", 4, id="writing the seconds"),
        pytest.param(dreamda, "self_training_loss", 4, id="training the first baseline"),
        pytest.param(dreamda, "self_training_loss", 11, id="training"),
        pytest.param(torch, "save", 11, id="writing a checkpoint"),
        pytest.param(dreamda, "save_labels", 1, id="writing the pseudo-labels"),
    ],
)
def test_the_result_is_the_same_after_a_kill_while(module, name, n, tmp_path, uninterrupted):
    check_kill(module, name, n, a_run, tmp_path, uninterrupted, result_and_files)


def test_images_that_are_missing_are_drawn_again_the_same(tmp_path, pipe):
    args, run, accelerator = opened(tmp_path)
    data = common.load_data("digits", "", 32, "digits", 1)
    records, _ = dreamda.generate(args, run, accelerator, pipe, data)
    files = {path: path.read_bytes() for path in tmp_path.glob("synthetic/*/*.png")}
    times = {path: path.stat().st_mtime_ns for path in files}
    missing = [tmp_path / "synthetic" / records[i]["file_name"] for i in (0, 7)]
    for path in missing:
        path.unlink()
    assert dreamda.generate(args, run, accelerator, pipe, data)[0] == records and len(files) == 20
    assert {path: path.read_bytes() for path in tmp_path.glob("synthetic/*/*.png")} == files
    drawn = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert len(drawn) == 12  # their whole batches, whose size decides over the last bits


def test_images_of_a_killed_run_are_not_taken_for_those_of_other_arguments(tmp_path):
    assert in_child(lambda: (die_at(common, "save_png", 2), a_run(tmp_path))) == 9
    assert len([*tmp_path.glob("synthetic/*/*.png")]) == 1
    other = DIGITS | dict(inversions=2, unlabelled=4, noise_scale=1.0)
    error = the_error(in_this_process(dreamda, **other, out=tmp_path))
    assert "--noise_scale 12.0" in error and "--noise_scale 1.0" in error


MISTAKES = [  # in its own process?, what is done to the folder, arguments, words of the error
    (True, None, {"labels": "amts"}, "unknown --labels 'amts'.* seed, amst, head, soft, clip"),
    (False, lambda d: cut(d / "data/train/guinea pig/5.png"), {}, "cannot read .*/guinea pig/5.png"),
    (False, None, {"dataset": "cifar11"}, "unknown dataset 'cifar11'.* digits, "),
    (False, None, {"inversion": "ddpm"}, "unknown --inversion 'ddpm'.* cycle, ddim, none"),
    (False, None, {"perturb": "head"}, "unknown --perturb 'head'.* bottleneck, mid_input, "),
    (False, None, {"labels": "clip", "clip": "/nowhere/clip"}, "cannot load the model '/nowhere/clip'"),
    (False, None, {"diffusion": "/nowhere/sd"}, "cannot load the model '/nowhere/sd'"),
    (False, None, {"classifier": "resnet81"}, "unknown classifier 'resnet81'.* small_cnn, "),
    (False, None, {"optimizer": "adamm"}, "unknown optimizer 'adamm'"),
    (False, None, {"augment": "flips"}, "flips.* crop, "),
    (False, None, {"variations": 0}, "--variations 0 must be at least 1"),
    (False, None, {"inversions": 0}, "--inversions 0 must be at least 1"),
    (False, None, {"heads": 1}, "--heads 1: agreement needs at least 2"),
    (False, None, {"steps": 2000}, "--steps 2000"),
    (False, None, {"steps": 1000, "strength": 1}, "--steps 1000 at --strength 1"),
    (False, None, {"strength": 0}, "--steps 3 at --strength 0.0"),
    (False, None, {"strength": 1.5}, "--strength 1.5"),
    (False, None, {"unlabelled": 5}, "--unlabelled 5: folder has 0"),
    (False, None, {"unlabelled": 11, "examples_per_class": 1}, "--unlabelled 11: folder has 8"),
    (False, None, {"unlabelled": -1}, "--unlabelled -1 must be at least 0"),
    (False, None, {"synthetic": "/nowhere"}, "--synthetic: no images with metadata in /nowhere/synthetic"),
    (False, None, {"lr": 1e30}, "not a number.*--lr"),
    (False, None, {"variation_count": 3}, "unknown arguments: --variation_count 3"),
    (False, lambda d: empty(d / "data/train/guinea pig"), {}, "/train/guinea pig has no images"),
]


@pytest.mark.parametrize("own, spoil, changes, words", MISTAKES, ids=[words for *_, words in MISTAKES])
def test_a_mistake_ends_in_one_line(own, spoil, changes, words, mine, tmp_path):
    if spoil:
        spoil(tmp_path)
    run = in_own_process if own else in_this_process
    assert re.search(words, the_error(run(dreamda, **mine | changes)))


def test_synthetic_images_that_are_gone_or_of_other_classes_are_refused(mine, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "digits")
    (tmp_path / "digits" / "result.json").unlink()
    error = the_error(in_this_process(dreamda, **mine, synthetic=tmp_path / "digits"))
    assert "of another data set, of the class 'zero'" in error
    for folder in (tmp_path / "digits" / "synthetic").glob("*/"):
        shutil.rmtree(folder)
    error = the_error(in_this_process(dreamda, **DIGITS, synthetic=tmp_path / "digits", out=tmp_path / "run"))
    assert f"the images in {tmp_path / 'digits' / 'synthetic'} are missing" in error


def test_after_mistakes_the_corrected_command_runs(mine):
    for mistake in (
        {"classifier": "resnet81"},
        {"optimizer": "adamm"},
        {"perturb": "head"},
        {"strength": 0},
        {"labels": "clip", "clip": "/nowhere/clip"},
        {"unlabelled": 9},
        {"diffusion": "/nowhere/sd"},
    ):
        the_error(in_this_process(dreamda, **mine | mistake))
    status, _, stderr = in_this_process(dreamda, **mine)
    assert status == 0, stderr


def test_the_ladder_runs_every_rung_with_every_seed(tmp_path):
    tiny = DIGITS | {"variations": 1, "epochs": 1, "eval_every": 1}
    status, stdout, stderr = in_this_process(dreamda, "--ladder", **tiny, seeds=2, out=tmp_path)
    assert status == 0 and (tmp_path / "ladder.md").read_text() in stdout, stderr
    ladder = check_ladder(dreamda, tmp_path, seeds=(0, 1))
    rungs = list(dreamda.LADDER)
    assert list(ladder["distances"]["fid"]) == rungs[1:] and len(ladder["distances"]["fid"][rungs[-1]]) == 2
    assert ladder["distances"]["fid"]["+ AMST"] == ladder["distances"]["fid"]["+ bottleneck noise"]
    images = {path.name: len([*path.glob("synthetic/*/*.png")]) for path in tmp_path.glob("*-s1")}
    assert images == {
        "standard-augmentation-s1": 0, "img2img-variations-s1": 10, "inversion-no-perturbation-s1": 10,
        "latent-noise-s1": 10, "bottleneck-noise-s1": 10, "AMST-s1": 0,
    }  # fmt: skip


def test_any_processes_draw_the_same_images_and_learn_as_well(striped, tmp_path):
    """One; two, going on with a run of one that was killed; one, going on with a run of two.

    With two, batch norm sees half a batch and augmentations are others; what is to be learnt is easy: all do.
    """
    striped |= dict(variations=1, noise_scale=0.0, epochs=6, eval_every=6, lr=0.01, baseline=False)
    one, two, three = (tmp_path / k for k in ("one", "two", "three"))
    assert in_child(lambda: (die_at(dreamda, "vary", 3), in_this_process(dreamda, **striped, out=two))) == 9
    outcome = in_own_process(dreamda, launcher=TWO_PROCESSES, **striped, out=two)
    assert outcome[0] == 0, outcome[2]
    begun_by_two(dreamda, three, 20, **striped)
    for out in (one, three):
        outcome = in_this_process(dreamda, **striped, out=out)
        assert outcome[0] == 0, outcome[2]
    files = [{p.name: p.read_bytes() for p in out.glob("synthetic/*/*.png")} for out in (one, two, three)]
    assert len(files[0]) == 48 and files[0] == files[1] == files[2]
    last = [lines_of(out / "metrics.jsonl")[-1] for out in (one, two, three)]
    assert min(line["test"] for line in last) > 0.8 and last[0]["loss"] != last[1]["loss"]


def test_two_processes_take_the_steps_of_one(striped, tmp_path):
    """Without batch norm, augmentation and several batches in an epoch, but for rounding."""
    exact = striped | dict(classifier="vit_s_16", optimizer="sgd", lr=0.05, real_only=True, batch_size=48)
    exact |= dict(synthetic_ratio=2.0, epochs=3, eval_every=1)
    outcomes = [
        in_own_process(dreamda, launcher=TWO_PROCESSES, **exact, out=tmp_path / "two"),
        in_this_process(dreamda, **exact, out=tmp_path / "one"),
    ]
    assert [status for status, *_ in outcomes] == [0, 0], outcomes
    logs = [lines_of(tmp_path / name / "metrics.jsonl") for name in ("two", "one")]
    two, one = ([line["scores"]["test"]["nll"] for line in log] for log in logs)
    assert two == pytest.approx(one, rel=1e-3) and one[2] != pytest.approx(one[0], rel=0.1)
    assert logs[0][0]["loss"] != logs[1][0]["loss"]  # that of half the batch, of the whole one
