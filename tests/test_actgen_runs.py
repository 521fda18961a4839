"""Runs of actgen.py as a user gives them: end to end, interrupted, with mistakes, on several processes."""

import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

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
)

import actgen
import common

pytestmark = pytest.mark.usefixtures("quick")
TINY = dict(epochs=4, images_per_epoch=4, generation_batch_size=2, steps=4, eval_every=4, genval_share=0.5)
DIGITS = TINY | dict(examples_per_class=4)
FOLDER = TINY | dict(
    dataset="folder", classifier="small_cnn", pretrained=False, image_size=32, augment="crop", batch_size=4,
    diffusion=common.ROOT / "digits_sd", attention_resolution=8, optimizer="adamw", lr=1e-3, workers=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    status, stdout, stderr = in_own_process(actgen, **DIGITS, out=out)
    assert status == 0, stderr
    return out, stdout


def test_a_run_writes_all_its_files(finished):
    out, stdout = finished
    config = json.loads((out / "config.json").read_text())
    assert config["args"] | DIGITS == config["args"] and config["args"]["classifier"] == "small_cnn"
    assert None not in config["args"].values() and "torch" in config["versions"]
    metrics = lines_of(out / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4]
    assert [line["synthetic"] for line in metrics] == [0, 4, 8, 8]
    assert [line["images"] - line["synthetic"] for line in metrics] == [20, 20, 40, 40]  # gen-val merged
    for picture in (out / "curves.png", out / "samples" / "epoch-002.png"):
        assert min(Image.open(picture).size) >= 64
    result = json.loads((out / "result.json").read_text())
    for split in ("test", "test_ood"):
        printed = re.search(rf"^{split} +accuracy: real only (.+) %, ActGen (.+) % ", stdout, re.M)
        expected = [f"{100 * result[k][split]['top1']:.1f}" for k in ("real only", "ActGen")]
        assert [*printed.groups()] == expected and metrics[-1][split] == result["ActGen"][split]["top1"]
    assert "latents" in torch.load(out / "latents" / "0000-0000.pt", weights_only=True)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["epoch"] == 4


def test_the_synthetic_folder_is_an_image_folder_with_metadata(finished):
    out, stdout = finished
    images = torchvision.datasets.ImageFolder(out / "synthetic")
    records = lines_of(out / "synthetic" / "metadata.jsonl")
    assert len(images) == len(records) == int(re.search(r"(\d+) images generated", stdout)[1]) == 8
    check_imagefolder(out / "synthetic", records)
    for r in records:
        assert r["class_name"] == common.DIGIT_NAMES[r["label"]] == r["file_name"].split("/")[0]
        assert r["prompt"] == f"a photo of a {r['class_name']}" and len(r["seed"]) == 3
    assert all(image.size == (32, 32) for image, _ in images)


def test_a_finished_run_says_so_refuses_other_arguments_and_can_be_overwritten(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    status, stdout, _ = in_this_process(actgen, **DIGITS, out=out)
    assert status == 0 and "is finished" in stdout
    assert stdout.splitlines()[-3:] == finished[1].replace(str(finished[0]), str(out)).splitlines()[-3:]
    error = the_error(in_this_process(actgen, **DIGITS | {"steps": 5}, out=out))
    assert "--steps 4" in error and "--steps 5" in error and str(out) in error
    (out / "synthetic" / "one" / "old.png").parent.mkdir(exist_ok=True)
    (out / "synthetic" / "one" / "old.png").touch()
    status, stdout, _ = in_this_process(actgen, "--overwrite", **DIGITS | {"steps": 5}, out=out)
    assert (
        status == 0 and "is finished" not in stdout and not (out / "synthetic" / "one" / "old.png").exists()
    )
    assert json.loads((out / "config.json").read_text())["args"]["steps"] == 5


def test_a_folder_of_ones_own_images_runs_end_to_end(mine):
    status, stdout, stderr = in_this_process(actgen, **mine)
    assert status == 0 and "8 images generated" in stdout, stderr
    records = lines_of(mine["out"] / "synthetic" / "metadata.jsonl")
    assert {r["class_name"] for r in records} <= {"guinea pig", "baker's yeast"}
    assert all((mine["out"] / "synthetic" / r["file_name"]).exists() for r in records)
    guides = [Path(r["guide"]) for r in records if r["guide"]]
    assert guides and all(g.is_relative_to(mine["data_dir"] / "train") and g.exists() for g in guides)


def run_with_all_losses(out):
    actgen.curriculum = lambda *_: (0.0, 1.0)  # in a child: all images guided, with both losses
    actgen.main(actgen.Args(**DIGITS, ema=0.5, out=str(out)))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert in_child(lambda: run_with_all_losses(out)) == 0
    return result_and_files(out)


@pytest.mark.parametrize(
    "module, name, n",
    [
        pytest.param(common, "train_epoch", 3, id="training the baseline"),
        pytest.param(common, "train_epoch", 6, id="training"),
        pytest.param(actgen, "generate", 2, id="generating the first epoch's second batch"),
        pytest.param(actgen, "generate", 4, id="generating the second epoch's second batch"),
        pytest.param(common, "save_png", 8, id="writing images"),
        pytest.param(torch, "save", 3, id="writing the baseline's checkpoint"),
        pytest.param(torch, "save", 9, id="writing the checkpoint before generation"),
        pytest.param(torch, "save", 11, id="writing latents"),
        pytest.param(torch, "save", 12, id="writing the checkpoint after generation"),
        pytest.param(common, "save_curves", 1, id="writing the result"),
    ],
)
def test_the_result_is_the_same_after_a_kill_while(module, name, n, tmp_path, uninterrupted):
    check_kill(module, name, n, run_with_all_losses, tmp_path, uninterrupted, result_and_files)


MISTAKES = [  # in its own process?, what is done to the folder, arguments, words of the error
    (True, None, {"dataset": "cifar11"}, "unknown dataset 'cifar11'.* digits, "),
    (True, None, {"data_dir": "/nowhere/at/all"}, "/nowhere/at/all/train is"),
    (True, lambda d: empty(d / "data/train/guinea pig"), {}, "/train/guinea pig has no images"),
    (True, lambda d: cut(d / "data/train/guinea pig/5.png"), {"workers": 1}, "cannot read .*/5.png"),
    (True, None, {"examples_per_class": 9}, "'baker's yeast' has 5.*--examples_per_class"),
    (True, None, {"diffusion": "/nowhere/sd", "baseline": False}, "cannot load the model '/nowhere/sd'"),
    (True, None, {"epoch_count": 3}, "unknown arguments: --epoch_count 3"),
    (True, None, {"prompt": "a photo"}, "--prompt 'a photo' has no {}"),
    (False, lambda d: cut(d / "data/test/guinea pig/17.png"), {}, "cannot read .*/test/guinea pig/17.png"),
    (False, lambda d: shutil.rmtree(d / "data/test"), {}, "/data/test is"),
    (False, lambda d: empty(d / "data/test/owl"), {}, "/data/test has 'owl'"),
    (False, lambda d: empty(d / "data/train"), {}, "/data/train has no classes"),
    (False, lambda d: empty(d / "sd"), {"diffusion": "sd"}, "cannot load the model 'sd'"),
    (False, lambda d: (d / "file").touch(), {"out": "file"}, "file"),
    (False, None, {"epochs": "many"}, "--epochs.*'many'"),
    (False, None, {"epochs": 0}, "--epochs 0 must be at least 1"),
    (False, None, {"eval_every": 0}, "--eval_every"),
    (False, None, {"seed": -1}, "--seed"),
    (False, None, {"steps": 2000}, "--steps"),
    (False, None, {"adversarial_pixels": -1}, "--adversarial_pixels -1 must be at least 0"),
    (False, None, {"genval_share": 0}, "--genval_share 0.0 must lie between 0 and 1"),
    (False, None, {"genval_share": 0.001}, "gen-val.*--genval_share"),
    (False, None, {"classifier": "resnet81"}, "unknown classifier 'resnet81'.* small_cnn, "),
    (False, None, {"optimizer": "adamm"}, "unknown optimizer 'adamm'"),
    (False, None, {"augment": "flips"}, "flips.* crop, "),
    (False, None, {"attention_resolution": 5}, "--attention_resolution"),
    (False, None, {"lr": 1e30}, "not a number.*--lr"),
]


@pytest.mark.parametrize("own, spoil, changes, words", MISTAKES, ids=[words for *_, words in MISTAKES])
def test_a_mistake_ends_in_one_line(own, spoil, changes, words, mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil(tmp_path)
    run = in_own_process if own else in_this_process
    assert re.search(words, the_error(run(actgen, **mine | changes)))


@pytest.mark.parametrize("mistake", [{"classifier": "resnet81"}, {"diffusion": "/nowhere/sd"}], ids=str)
def test_after_a_mistake_the_corrected_command_runs(mistake, mine):
    the_error(in_this_process(actgen, **mine | mistake))
    status, _, stderr = in_this_process(actgen, **mine)
    assert status == 0, stderr


def test_ctrl_c_says_that_the_run_can_go_on(mine, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_epoch", lambda *_: signal.raise_signal(signal.SIGINT))
        assert "stopped; the same command goes on" in the_error(in_this_process(actgen, **mine))
    signal.signal(signal.SIGINT, before)
    assert in_this_process(actgen, **mine)[0] == 0


def test_the_ladder_runs_every_rung_with_every_seed(tmp_path):
    tiny = DIGITS | dict(epochs=2, eval_every=2, images_per_epoch=2, steps=2, examples_per_class=2)
    status, stdout, stderr = in_this_process(actgen, "--ladder", **tiny, seeds=2, out=tmp_path)
    assert status == 0 and (tmp_path / "ladder.md").read_text() in stdout, stderr
    check_ladder(actgen, tmp_path, seeds=(0, 1))
    folders = [tmp_path / f"{rung}-s1" / "synthetic" for rung in ("real-only", "adversarial")]
    assert [len([*folder.glob("*/*.png")]) for folder in folders] == [0, 2]


def test_any_processes_generate_what_one_does_and_learn_as_well(striped, tmp_path):
    """One; two, going on with a run of one that was killed; one, going on with a run of two.

    With two, batch norm sees half a batch and augmentations are others; what is to be learnt is easy: all do.
    """
    striped |= dict(few_shot=True, generation_batch_size=1, images_per_epoch=2, lr=0.01)
    striped |= dict(epochs=6, eval_every=6, batch_size=8)
    begun = in_child(
        lambda: (die_at(actgen, "generate", 3), in_this_process(actgen, **striped, out=tmp_path / "two"))
    )
    two = in_own_process(actgen, launcher=TWO_PROCESSES, **striped, out=tmp_path / "two")
    one = in_this_process(actgen, **striped, out=tmp_path / "one")
    assert (one[0], two[0], begun) == (0, 0, 9), one[2] + two[2]
    begun_by_two(actgen, tmp_path / "three", 3, **striped)
    assert in_this_process(actgen, **striped, out=tmp_path / "three")[0] == 0

    def written(out):
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        return names, (out / "synthetic" / "metadata.jsonl").read_text()

    assert written(tmp_path / "one") == written(tmp_path / "two") == written(tmp_path / "three")
    for out in ("one", "two", "three"):
        result = json.loads((tmp_path / out / "result.json").read_text())
        assert min(scores["test"]["top1"] for scores in result.values()) > 0.8


def test_a_process_draws_its_batches_whatever_the_others_have_drawn(tmp_path, monkeypatch, pipe):
    def generate(pipe, guides, labels, *_, **__):
        return actgen.Generated(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 16, 16), None)

    monkeypatch.setattr(actgen, "generate", generate)
    args = actgen.resolve(actgen.Args(**DIGITS | {"generation_batch_size": 1}, out=str(tmp_path)))
    (tmp_path / "latents").mkdir()
    images = common.Images([Image.new("RGB", (32, 32))] * 4, [0] * 4)
    plan = dict(guide=[0] * 4, label=[0] * 4, guided=[True] * 4, adversarial=[False] * 4, centre=[12.5] * 4)

    def process(index):
        run = SimpleNamespace(path=tmp_path, main=index == 0)
        ranks = SimpleNamespace(process_index=index, num_processes=2, wait_for_everyone=lambda: None)
        return actgen.generate_epoch(args, run, ranks, pipe, None, images, ["a"], plan, {}, 0)

    with pytest.raises(FileNotFoundError):  # the other process has not begun
        list(process(1))
    assert [batch["records"][0]["seed"] for batch in process(0)] == [[0, 0, j] for j in range(4)]
