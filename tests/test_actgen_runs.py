"""Runs of actgen.py as a user gives them: end to end, interrupted, with mistakes, on several processes."""

import gc
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import actgen
import common

ROOT = Path(actgen.__file__).parent
TINY = dict(epochs=4, images_per_epoch=4, generation_batch_size=2, steps=4, eval_every=4, genval_share=0.5)
DIGITS = TINY | dict(examples_per_class=4)
FOLDER = TINY | dict(
    dataset="folder", classifier="small_cnn", pretrained=False, image_size=32, augment="crop", batch_size=4,
    diffusion=ROOT / "digits_sd", attention_resolution=8, optimizer="adamw", lr=1e-3, workers=0,
)  # fmt: skip


def command_line(**arguments):
    return [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]


def in_own_process(*words, launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "actgen.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module", autouse=True)
def quick(pipe):
    """In this process: 100 digits to evaluate on, and digits_sd loaded once."""
    few = {k: v if k == "train" else (v[0][:100], v[1][:100]) for k, v in common._digit_splits().items()}
    digits_sd, load = str(ROOT / "digits_sd"), common.load_pipeline
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_digit_splits", lambda: few)
        patch.setattr(common, "load_pipeline", lambda name, *a: pipe if name == digits_sd else load(name, *a))
        yield


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """Runs a command line without paying for imports again: (status, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["actgen.py", *words])
        monkeypatch.setitem(sys.modules, "__main__", actgen)
        try:
            status = common.cli(actgen.main, actgen.Args) or 0
        except SystemExit as stop:
            status = stop.code
        gc.collect()  # a run folder stays locked while an exception's frames live
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def mine(tmp_path):
    """Arguments of a run on one's own images: odd sizes and modes, a space and an apostrophe in the names."""
    rng, kinds = np.random.default_rng(0), [(40, 30, "L"), (17, 80, "RGB"), (5, 5, "P"), (33, 32, "CMYK")]
    for split, name in itertools.product(("train", "test"), ("guinea pig", "baker's_yeast")):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for width, height, mode in [*kinds, (200, 64, "L")]:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
            image.save(tmp_path / "data" / split / name / f"{width}.{'jpg' if mode == 'CMYK' else 'png'}")
    return FOLDER | {"data_dir": tmp_path / "data", "out": tmp_path / "run"}


def the_error(outcome):
    """The one line that a mistake ends with."""
    status, _, stderr = outcome
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("actgen.py: error: "), stderr
    assert stderr.rstrip().endswith(lines[0]) and "Traceback" not in stderr and "usage:" not in stderr, stderr
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    status, stdout, stderr = in_own_process(*command_line(**DIGITS, out=out))
    assert status == 0, stderr
    return out, stdout


def test_a_run_writes_all_its_files(finished):
    out, stdout = finished
    config = json.loads((out / "config.json").read_text())
    assert config["args"] | DIGITS == config["args"] and config["args"]["classifier"] == "small_cnn"
    assert None not in config["args"].values() and "torch" in config["versions"]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
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
    records = [json.loads(line) for line in (out / "synthetic" / "metadata.jsonl").read_text().splitlines()]
    assert len(images) == len(records) == int(re.search(r"(\d+) images generated", stdout)[1]) == 8
    assert {str(out / "synthetic" / r["file_name"]) for r in records} == {path for path, _ in images.samples}
    for r in records:
        assert r["class_name"] == common.DIGIT_NAMES[r["label"]] == r["file_name"].split("/")[0]
        assert r["prompt"] == f"a photo of a {r['class_name']}" and len(r["seed"]) == 3
    assert all(image.size == (32, 32) for image, _ in images)


def test_a_finished_run_says_so_refuses_other_arguments_and_can_be_overwritten(
    finished, tmp_path, in_this_process
):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    status, stdout, _ = in_this_process(*command_line(**DIGITS, out=out))
    assert status == 0 and "is finished" in stdout
    assert stdout.splitlines()[-3:] == finished[1].replace(str(finished[0]), str(out)).splitlines()[-3:]
    error = the_error(in_this_process(*command_line(**DIGITS | {"steps": 5}, out=out)))
    assert "--steps 4" in error and "--steps 5" in error and str(out) in error
    (out / "synthetic" / "one" / "old.png").parent.mkdir(exist_ok=True)
    (out / "synthetic" / "one" / "old.png").touch()
    status, stdout, _ = in_this_process(*command_line(**DIGITS | {"steps": 5}, out=out), "--overwrite")
    assert (
        status == 0 and "is finished" not in stdout and not (out / "synthetic" / "one" / "old.png").exists()
    )
    assert json.loads((out / "config.json").read_text())["args"]["steps"] == 5


def test_a_folder_of_ones_own_images_runs_end_to_end(mine, in_this_process):
    status, stdout, stderr = in_this_process(*command_line(**mine))
    assert status == 0 and "8 images generated" in stdout, stderr
    records = [
        json.loads(line) for line in (mine["out"] / "synthetic/metadata.jsonl").read_text().splitlines()
    ]
    assert {r["class_name"] for r in records} <= {"guinea pig", "baker's yeast"}
    assert all((mine["out"] / "synthetic" / r["file_name"]).exists() for r in records)
    guides = [Path(r["guide"]) for r in records if r["guide"]]
    assert guides and all(g.is_relative_to(mine["data_dir"] / "train") and g.exists() for g in guides)


def in_child(function) -> int:
    """The exit status of function() in a forked process, which may die at any moment."""
    if (pid := os.fork()) == 0:
        signal.alarm(120)
        torch.set_num_threads(1)
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(module, name, n):
    """The n-th call of module.name ends the process; of torch.save after half of the bytes."""
    function, calls = getattr(module, name), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) < n:
            return function(*args, **kwargs)
        if module is torch:
            function(args[0], buffer := io.BytesIO())
            args[1].write(buffer.getvalue()[: buffer.tell() // 2])
            args[1].flush()
        os._exit(9)

    setattr(module, name, dying)


def result_and_files(out):
    """All that a run leaves but its seconds."""
    result = json.loads((out / "result.json").read_text())
    scores = {
        k: {s: x for s, x in v.items() if s not in ("generation", "training")} for k, v in result.items()
    }
    files = [*out.glob("synthetic/**/*.*"), *out.glob("samples/*"), *out.glob("*.jsonl"), *out.glob("*.tmp")]
    return scores, {str(f.relative_to(out)): f.read_bytes() for f in files}


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
    assert in_child(lambda: (die_at(module, name, n), run_with_all_losses(tmp_path))) == 9
    assert not (tmp_path / "result.json").exists()
    assert in_child(lambda: run_with_all_losses(tmp_path)) == 0
    assert result_and_files(tmp_path) == uninterrupted


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


def empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


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
    (False, None, {"genval_share": 0}, "--genval_share 0.0 must lie between 0 and 1"),
    (False, None, {"genval_share": 0.001}, "gen-val.*--genval_share"),
    (False, None, {"classifier": "resnet81"}, "unknown classifier 'resnet81'.* small_cnn, "),
    (False, None, {"optimizer": "adamm"}, "unknown optimizer 'adamm'"),
    (False, None, {"augment": "flips"}, "flips.* crop, "),
    (False, None, {"attention_resolution": 5}, "--attention_resolution"),
    (False, None, {"lr": 1e30}, "not a number.*--lr"),
]


@pytest.mark.parametrize("own, spoil, changes, words", MISTAKES, ids=[words for *_, words in MISTAKES])
def test_a_mistake_ends_in_one_line(own, spoil, changes, words, mine, tmp_path, in_this_process, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil(tmp_path)
    run = in_own_process if own else in_this_process
    assert re.search(words, the_error(run(*command_line(**mine | changes))))


@pytest.mark.parametrize("mistake", [{"classifier": "resnet81"}, {"diffusion": "/nowhere/sd"}], ids=str)
def test_after_a_mistake_the_corrected_command_runs(mistake, mine, in_this_process):
    the_error(in_this_process(*command_line(**mine | mistake)))
    status, _, stderr = in_this_process(*command_line(**mine))
    assert status == 0, stderr


def test_a_truncated_checkpoint_is_named(mine, in_this_process):
    assert in_this_process(*command_line(**mine))[0] == 0
    (mine["out"] / "result.json").unlink()
    for length in (20_000, 300, 0):
        os.truncate(mine["out"] / "checkpoint.pt", length)
        error = the_error(in_this_process(*command_line(**mine)))
        assert f"cannot read {mine['out'] / 'checkpoint.pt'}" in error and len(error) < 500


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_space(mine, in_this_process):
    mine["out"].mkdir()
    (mine["out"] / "checkpoint.pt.tmp").symlink_to("/dev/full")
    assert "No space left on device; free some space" in the_error(in_this_process(*command_line(**mine)))
    (mine["out"] / "checkpoint.pt.tmp").unlink()
    assert in_this_process(*command_line(**mine))[0] == 0


def test_ctrl_c_says_that_the_run_can_go_on(mine, in_this_process, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_epoch", lambda *_: signal.raise_signal(signal.SIGINT))
        assert "stopped; the same command goes on" in the_error(in_this_process(*command_line(**mine)))
    assert in_this_process(*command_line(**mine))[0] == 0


def test_two_processes_generate_what_one_does(mine, tmp_path, in_this_process):
    mine |= {"few_shot": True, "generation_batch_size": 1}
    launcher = "-m accelerate.commands.launch --cpu --num_processes 2 --main_process_port 0".split()
    two = in_own_process(*command_line(**mine | {"out": tmp_path / "two"}), launcher=launcher)
    one = in_this_process(*command_line(**mine | {"out": tmp_path / "one"}))
    assert (one[0], two[0]) == (0, 0), one[2] + two[2]

    def written(out):
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        return names, (out / "synthetic" / "metadata.jsonl").read_text()

    assert written(tmp_path / "one") == written(tmp_path / "two")


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
