"""Runs of diagen.py as a user gives them: end to end, interrupted, with mistakes, on several processes."""

import csv
import functools
import json
import re
import shutil
from pathlib import Path

import matplotlib.figure  # noqa: F401 (imported once, before the runs in child processes)
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

import common
import diagen

pytestmark = pytest.mark.usefixtures("quick")
TINY = dict(
    epochs=2, iterations=2, filter_epochs=2, batch_size=4, steps=4, variations=2, inversion_steps=4,
    inversion_batch_size=2, generation_batch_size=4, prompts_per_class=3,
)  # fmt: skip
DIGITS = TINY | dict(examples_per_class=1, generation_batch_size=20, inversion_steps=2)
FOLDER = TINY | dict(
    dataset="folder", classifier="small_cnn", pretrained=False, image_size=32, augment="crop",
    diffusion=common.ROOT / "digits_sd", lr=1e-3, workers=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    status, stdout, stderr = in_this_process(diagen, **DIGITS, out=out)
    assert status == 0, stderr
    return out, stdout


def test_a_run_writes_all_its_files(finished):
    out, stdout = finished
    config = json.loads((out / "config.json").read_text())
    assert config["args"] | DIGITS == config["args"] and config["args"]["frozen"] is True
    assert (
        None not in {k: v for k, v in config["args"].items() if k not in ("embeddings", "synthetic")}.values()
    )
    result = json.loads((out / "result.json").read_text())
    assert list(result) == ["standard augmentation", "DA-Fusion", "DIAGen"]
    for file, (title, scores) in zip(
        ("standard_augmentation", "DA_Fusion", "metrics"), result.items(), strict=True
    ):
        log = lines_of(out / f"{file}.jsonl")
        assert [line["epoch"] for line in log] == [1, 2]
        best = max(log, key=lambda line: line["val"])  # the first of the best
        assert scores["val"]["top1"] == best["val"]
        checkpoint = out / f"{'checkpoint' if file == 'metrics' else file}.pt"
        weights = torch.load(checkpoint, weights_only=True)["progress"]["best"]["weights"]
        classifier = diagen.Probe(common.build_classifier("small_cnn", common.DIGIT_NAMES, 32))
        classifier.load_state_dict(weights)
        data = common.load_data("digits", "", 32, "none")
        for split, images in (("test", data.test), ("test_ood", data.test_ood), ("val", data.val)):
            logits, y = common.predict(classifier, images, common.make_accelerator())
            assert scores[split]["top1"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
        assert (sum(line["synthetic_share"] for line in log) > 0) == (title != "standard augmentation")
        assert scores["synthetic"] == (0 if title == "standard augmentation" else 20)
        assert ("distances" in scores) == (title != "standard augmentation")
        assert ("filter" in scores) == (title == "DIAGen")
    assert {"fid", "kid", "precision", "recall", "oracle"} == set(scores["distances"])
    assert (
        scores["filter"]["nll_calibrated"] <= scores["filter"]["nll"] and scores["filter"]["temperature"] > 0
    )
    for split in ("test", "test_ood"):
        printed = re.search(rf"^{split} +accuracy: (.+) \(", stdout, re.M)[1]
        assert printed == ", ".join(f"{k} {100 * r[split]['top1']:.1f} %" for k, r in result.items())
    for name in common.DIGIT_NAMES:
        row = diagen.load_embedding(out / "embeddings" / name / "learned_embeds.safetensors", 96)
        assert 0.01 < row.std() < 10
    for picture in ("curves.png", "filter.png", "samples/variations.png", "samples/lowest.png"):
        assert min(Image.open(out / picture).size) >= 64
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["epoch"] == 2


def test_the_synthetic_folder_is_an_image_folder_with_metadata(finished):
    out, stdout = finished
    images = torchvision.datasets.ImageFolder(out / "synthetic")
    records = lines_of(out / "synthetic" / "metadata.jsonl")
    assert len(images) == len(records) == int(re.search(r"(\d+) images generated", stdout)[1]) == 20
    check_imagefolder(out / "synthetic", records)
    assert all(image.size == (32, 32) for image, _ in images)
    prompts = diagen.read_prompts(out / "prompts.csv", common.DIGIT_NAMES)
    assert all(len(lines) == 3 for lines in prompts.values())
    for i, r in enumerate(records):
        name, variant = r["class_name"], i % 2
        assert name == common.DIGIT_NAMES[r["label"]] == r["file_name"].split("/")[0]
        assert r["prompt"].replace(f"<{name}|{variant}>", name) == prompts[name][variant] != r["prompt"]
        assert r["seed"] == [0, r["guide_index"], variant] and 0 <= r["confidence"] <= 1
    q, w = (torch.tensor([r[k] for r in records]).view(10, 2) for k in ("confidence", "weight"))
    assert torch.allclose(diagen.weights_of(q), w) and w.std() > 0
    plain = lines_of(out / "da_fusion" / "metadata.jsonl")
    assert all(r["weight"] == 0.5 and r["prompt"] == f"a photo of a <{r['class_name']}|0>" for r in plain)
    assert len([*out.glob("da_fusion/*/*.png")]) == 20


def test_a_finished_run_says_so_refuses_other_arguments_and_can_be_overwritten(finished, tmp_path):
    shutil.copytree(finished[0], out := tmp_path / "copy")
    status, stdout, _ = in_this_process(diagen, **DIGITS, out=out)
    assert status == 0 and "is finished" in stdout
    assert stdout.splitlines()[-3:] == finished[1].replace(str(finished[0]), str(out)).splitlines()[-3:]
    error = the_error(in_this_process(diagen, **DIGITS | {"strength": 0.5}, out=out))
    assert "--strength 0.7" in error and "--strength 0.5" in error and str(out) in error
    other = DIGITS | {"variations": 1, "baseline": False}
    status, stdout, _ = in_this_process(diagen, "--overwrite", **other, out=out)
    assert status == 0 and "10 images generated" in stdout
    assert len([*out.glob("synthetic/*/*.png")]) == 10 and not (out / "da_fusion").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_of_ones_own_images_runs_end_to_end(split, mine):
    """Without val/ a quarter of the few training images is held out."""
    if split == "val":
        shutil.copytree(mine["data_dir"] / "test", mine["data_dir"] / "val")
    status, stdout, stderr = in_this_process(diagen, **mine)
    count = {"train": 3, "val": 4}[split]
    assert status == 0 and f"{4 * count} images generated" in stdout, stderr
    records = lines_of(mine["out"] / "synthetic" / "metadata.jsonl")
    assert [r["class_name"] for r in records] == ["baker's yeast"] * 2 * count + ["guinea pig"] * 2 * count
    assert all((mine["out"] / "synthetic" / r["file_name"]).exists() for r in records)
    guides = {r["guide"]: r["guide_index"] for r in records}
    assert len(guides) == len(set(guides.values())) == 2 * count
    assert all(Path(g).is_relative_to(mine["data_dir"] / "train") and Path(g).exists() for g in guides)
    result = json.loads((mine["out"] / "result.json").read_text())["DIAGen"]
    assert len(result["val"]["per_class"]) == 2 and "distances" not in result


def prompts_of(arguments, *words):
    """The prompts with which a run without baselines draws, by class, and the records."""
    status, _, stderr = in_this_process(diagen, *words, **arguments | {"baseline": False})
    assert status == 0, stderr
    records = lines_of(arguments["out"] / "synthetic" / "metadata.jsonl")
    return {
        n: [r["prompt"] for r in records if r["class_name"] == n] for n in ("baker's yeast", "guinea pig")
    }, records


def test_without_prompts_a_token_stands_in_the_template(mine):
    prompts, records = prompts_of(mine | {"prompts": "none", "prompt": "one {} here", "sigmas": 0.01})
    assert set(prompts["guinea pig"]) == {"one <guinea pig|0> here"} and "confidence" in records[0]


def test_da_fusion_has_no_noise_no_prompts_and_no_weights(mine):
    prompts, records = prompts_of(mine | {"method": "da_fusion"})
    assert prompts == {name: [f"a photo of a <{name}|0>"] * 6 for name in prompts}
    assert all(r["weight"] == 0.5 and "confidence" not in r for r in records)
    assert list(json.loads((mine["out"] / "result.json").read_text())) == ["DA-Fusion"]


def test_real_guidance_learns_no_tokens(mine, monkeypatch):
    monkeypatch.setattr(diagen, "textual_inversion", None)
    prompts, _ = prompts_of(mine | {"method": "real_guidance"})
    assert prompts == {name: [f"a photo of a {name}"] * 6 for name in prompts}
    assert not (mine["out"] / "embeddings").exists()


def test_real_images_alone_need_no_generator(mine):
    status, stdout, stderr = in_this_process(diagen, "--real_only", **mine | {"diffusion": "/nowhere/sd"})
    assert status == 0 and "0 images generated" in stdout, stderr
    assert list(json.loads((mine["out"] / "result.json").read_text())) == ["standard augmentation"]


def test_prompts_of_a_file_are_drawn_in_turn(mine, tmp_path):
    with open(tmp_path / "mine.csv", "w", newline="") as file:
        for prompt in ("a Guinea Pig; asleep", "a wet guinea pig"):
            csv.writer(file, delimiter=";").writerow(["guinea pig", 1, prompt])
    prompts, _ = prompts_of(mine | {"prompts": tmp_path / "mine.csv", "sigmas": 0.01})
    assert prompts["guinea pig"] == ["a <guinea pig|0>; asleep", "a wet <guinea pig|0>"] * 3
    assert prompts["baker's yeast"] == ["a photo of a <baker's yeast|0>"] * 6


def test_a_language_model_is_asked_once_and_its_prompts_are_kept(mine, monkeypatch):
    asked = []

    def ask(model, names, count, uncommon):
        asked.append((model, count, uncommon))
        return {name: [f"a {name} number {k}" for k in range(count)] for name in names}

    monkeypatch.setattr(diagen, "ask_llm", ask)
    mine |= {"prompts": "llm", "llm": "my/model"}
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_curves", None)
        with pytest.raises(TypeError):
            in_this_process(diagen, "--uncommon", "--no_baseline", **mine)
    prompts, _ = prompts_of(mine, "--uncommon")
    assert asked == [("my/model", 3, True)]
    assert [re.sub("<.*>", "x", p) for p in prompts["guinea pig"]] == [
        f"a x number {k}" for k in (0, 1, 2)
    ] * 2
    assert (
        diagen.read_prompts(mine["out"] / "prompts.csv", [*prompts])["guinea pig"][2]
        == "a guinea pig number 2"
    )


def test_learned_tokens_are_used_again(mine, tmp_path, monkeypatch):
    folder, runs = tmp_path / "tokens", []
    for inversion_steps in (4, 500):
        mine |= {
            "embeddings": folder,
            "inversion_steps": inversion_steps,
            "out": tmp_path / str(inversion_steps),
        }
        prompts_of(mine | {"sigmas": 0.01})
        tokens = {
            p.parent.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob("embeddings/*/*")
        }
        runs.append((tokens, [p.read_bytes() for p in sorted(mine["out"].glob("synthetic/*/*.png"))]))
        monkeypatch.setattr(diagen, "textual_inversion", None)
    assert runs[0] == runs[1] and set(tokens) == {"guinea pig", "baker's yeast"}
    assert len(runs[0][1]) == 12 and not (mine["out"] / "embeddings").exists()


def test_the_images_of_another_run_give_the_same_classifier_and_nothing_is_generated(finished, tmp_path):
    out, before = tmp_path / "run", result_and_files(finished[0])
    status, stdout, stderr = in_this_process(
        diagen, **DIGITS | {"synthetic": finished[0], "baseline": False, "out": out}
    )
    assert status == 0 and "20 images generated in 0 s" in stdout, stderr
    scores, files = result_and_files(out)
    assert scores == {"DIAGen": before[0]["DIAGen"]}
    assert files["metrics.jsonl"] == before[1]["metrics.jsonl"]
    assert lines_of(out / "metadata.jsonl") == lines_of(finished[0] / "synthetic" / "metadata.jsonl")
    assert not any(name.startswith(("synthetic", "embeddings")) for name in files)
    assert result_and_files(finished[0]) == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, "has --seed 0, this run --seed 1"),
        ({"variations": 1}, "has --variations 2, this run --variations 1"),
        ({"examples_per_class": 2}, "has --examples_per_class 1, this run --examples_per_class 2"),
        ({"synthetic": "/nowhere"}, "no images with metadata in /nowhere/synthetic"),
    ],
)
def test_images_of_a_run_on_other_training_images_are_refused(change, words, finished, tmp_path):
    arguments = DIGITS | {"synthetic": finished[0], "out": tmp_path / "run"} | change
    assert words in the_error(in_this_process(diagen, **arguments))


def test_images_of_another_script_or_an_unfinished_run_are_refused(finished, tmp_path):
    shutil.copytree(finished[0], other := tmp_path / "other")
    arguments = DIGITS | {"synthetic": other, "out": tmp_path / "run"}
    next(other.glob("synthetic/*/*.png")).unlink()
    assert f"images in {other / 'synthetic'} are missing" in the_error(in_this_process(diagen, **arguments))
    config = json.loads((other / "config.json").read_text())
    del config["args"]["variations"]
    (other / "config.json").write_text(json.dumps(config))
    assert "has --variations None" in the_error(in_this_process(diagen, **arguments))
    (other / "config.json").unlink()
    assert f"cannot read {other / 'config.json'}" in the_error(in_this_process(diagen, **arguments))
    assert not [*(tmp_path / "run").glob("*.pt")]  # before anything is trained


# --- interrupted


@pytest.fixture(scope="module")
def three_digits(tmp_path_factory):
    """A folder with four training and two test images of each of three digits."""
    folder = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 4), ("test", 2)):
        r = common.render_pool(common.digit_pools()[split], 80, 1)
        for y in (0, 3, 7):
            (folder / split / common.DIGIT_NAMES[y]).mkdir(parents=True)
            for i, image in enumerate(r["images"][r["labels"] == y][:count].numpy()):
                Image.fromarray(image).save(folder / split / common.DIGIT_NAMES[y] / f"{i}.png")
    return folder


def a_run(data_dir, out, **changes):
    """In a child; Textual Inversion saves its state every second step, its groups are of two classes."""
    diagen.textual_inversion = functools.partial(diagen.textual_inversion, save_every=2)
    args = FOLDER | dict(
        data_dir=str(data_dir), out=str(out), diffusion=str(FOLDER["diffusion"]), baseline=False
    )
    diagen.main(diagen.Args(**args | changes))


def all_files(out):
    scores, files = result_and_files(out)
    more = [*out.glob("embeddings/*/*"), out / "prompts.csv", out / "filter.png", out / "curves.png"]
    return scores, files | {str(p.relative_to(out)): p.read_bytes() for p in more}


@pytest.fixture(scope="module")
def uninterrupted(three_digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert in_child(lambda: a_run(three_digits, out)) == 0
    return all_files(out)


@pytest.mark.parametrize(
    "module, name, n",
    [
        pytest.param(torch, "save", 2, id="writing a state of Textual Inversion"),
        pytest.param(common, "save_atomically", 4, id="learning the second group of tokens"),
        pytest.param(diagen, "save_embedding", 2, id="writing embeddings"),
        pytest.param(diagen, "img2img", 2, id="generating"),
        pytest.param(common, "save_png", 7, id="writing images"),
        pytest.param(common, "train_epoch", 2, id="training the filter"),
        pytest.param(torch, "save", 9, id="writing the confidences"),
        pytest.param(common, "train_epoch", 4, id="training"),
        pytest.param(torch, "save", 11, id="writing a checkpoint"),
        pytest.param(common, "save_curves", 1, id="writing the result"),
    ],
)
def test_the_result_is_the_same_after_a_kill_while(module, name, n, three_digits, tmp_path, uninterrupted):
    check_kill(module, name, n, lambda out: a_run(three_digits, out), tmp_path, uninterrupted, all_files)


@pytest.mark.parametrize("name, n", [("save_embedding", 1), ("img2img", 1)])
def test_what_a_killed_run_has_made_is_not_taken_for_that_of_other_arguments(name, n, three_digits, tmp_path):
    assert in_child(lambda: (die_at(diagen, name, n), a_run(three_digits, tmp_path))) == 9
    arguments = FOLDER | {"data_dir": three_digits, "out": tmp_path}
    error = the_error(in_this_process(diagen, "--no_baseline", **arguments | {"inversion_steps": 5}))
    assert "--inversion_steps 4" in error and "--inversion_steps 5" in error


def test_prompts_of_other_arguments_are_not_taken(three_digits, tmp_path):
    die = functools.partial(die_at, diagen, "learn_tokens", 1)
    assert in_child(lambda: (die(), a_run(three_digits, tmp_path, prompts_per_class=1))) == 9
    assert len((tmp_path / "prompts.csv").read_text().splitlines()) == 1 + 3
    assert in_child(lambda: (die(), a_run(three_digits, tmp_path, prompts_per_class=5))) == 9
    assert len((tmp_path / "prompts.csv").read_text().splitlines()) == 1 + 15


# --- mistakes


def rename(d, new):
    for split in ("train", "test"):
        (d / "data" / split / "guinea pig").rename(d / "data" / split / new)


def write_prompts(text):
    return lambda d: (d / "p.csv").write_text(text)


def spoil_token(d):
    folder = d / "tokens" / "embeddings" / "guinea pig"
    folder.mkdir(parents=True)
    diagen.save_embedding(torch.zeros(7), "<x>", folder / "learned_embeds.safetensors")


MISTAKES = [  # in its own process?, what is done to the folder, arguments, words of the error
    (True, None, {"method": "diagram"}, "unknown --method 'diagram'.* diagen, da_fusion, real_guidance"),
    (False, None, {"dataset": "cifar11"}, "unknown dataset 'cifar11'.* digits, "),
    (False, None, {"examples_per_class": 9}, "'baker's yeast' has 5.*--examples_per_class"),
    (False, None, {"examples_per_class": 1}, "too few images to hold some out for validation; give val/"),
    (False, lambda d: rename(d, "_"), {"examples_per_class": 3}, "no token for ''; see --initializer"),
    (False, None, {"initializer": " "}, "no token for ' '; see --initializer"),
    (False, write_prompts(""), {"prompts": "p.csv"}, "p.csv has no prompts"),
    (False, None, {"prompts": "p.csv"}, "cannot read the prompts p.csv"),
    (False, write_prompts("\n\nguinea pig;1\n"), {"prompts": "p.csv"}, "p.csv, line 3: 2 columns"),
    (
        False,
        write_prompts("guinea pig;0;a guinea pig"),
        {"prompts": "p.csv"},
        "line 1: no class .* of index 0",
    ),
    (False, write_prompts("guinea pig;1;a pig"), {"prompts": "p.csv"}, "line 1: .*'guinea pig' exactly once"),
    (False, None, {"prompts": "llm", "llm": "/nowhere/llm"}, "cannot load the model '/nowhere/llm'"),
    (False, None, {"diffusion": "/nowhere/sd"}, "cannot load the model '/nowhere/sd'"),
    (False, None, {"classifier": "resnet81"}, "unknown classifier 'resnet81'.* small_cnn, "),
    (False, None, {"optimizer": "adamm"}, "unknown optimizer 'adamm'"),
    (False, None, {"sigmas": -1}, "--sigmas .*-1.0.* must not be negative"),
    (False, None, {"strength": 0}, "--steps 4 at --strength 0.0"),
    (False, None, {"strength": 1.5}, "--strength 1.5"),
    (False, None, {"steps": 2000}, "--steps 2000"),
    (False, None, {"steps": 1000, "strength": 1}, "--steps 1000 at --strength 1"),
    (False, None, {"synthetic_probability": 2}, "--synthetic_probability must lie between 0 and 1"),
    (False, None, {"variations": 0}, "--variations 0 must be at least 1"),
    (False, None, {"iterations": 0}, "--iterations 0 must be at least 1"),
    (False, None, {"inversion_lr": 1e30}, "no numbers; lower --inversion_lr"),
    (False, None, {"lr": 1e30}, "not a number.*--lr"),
    (
        False,
        spoil_token,
        {"embeddings": "tokens"},
        "cannot read .*tokens/embeddings/guinea pig/learned_embeds.*delete it",
    ),
    (False, None, {"sigmaz": 0}, "unknown arguments: --sigmaz 0"),
    (
        False,
        lambda d: cut(d / "data/train/guinea pig/5.png"),
        {"examples_per_class": 5},
        "cannot read .*/5.png",
    ),
    (False, lambda d: empty(d / "data/train/guinea pig"), {}, "/train/guinea pig has no images"),
]


@pytest.mark.parametrize("own, spoil, changes, words", MISTAKES, ids=[words for *_, words in MISTAKES])
def test_a_mistake_ends_in_one_line(own, spoil, changes, words, mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil(tmp_path)
    run = in_own_process if own else in_this_process
    assert re.search(words, the_error(run(diagen, "--no_baseline", **mine | changes)))


def test_after_mistakes_the_corrected_command_runs(mine):
    """They show before anything is trained, and what they leave does not matter."""
    mistakes = ("classifier", "resnet81"), ("optimizer", "adamm"), ("strength", 0), ("prompts", "no.csv")
    for name, value in (*mistakes, ("initializer", " "), ("diffusion", "/nowhere/sd"), ("batch_size", 0)):
        the_error(in_this_process(diagen, **mine | {name: value}))
    assert not [*mine["out"].glob("*.pt")]
    status, _, stderr = in_this_process(diagen, "--no_baseline", **mine)
    assert status == 0, stderr


# --- several runs, several processes


def test_the_ladder_runs_every_rung_with_every_seed(tmp_path):
    tiny = DIGITS | dict(variations=1, epochs=1, filter_epochs=1, inversion_steps=1, iterations=1)
    status, stdout, stderr = in_this_process(diagen, "--ladder", **tiny, seeds=2, out=tmp_path)
    assert status == 0 and (tmp_path / "ladder.md").read_text() in stdout, stderr
    ladder, rungs = check_ladder(diagen, tmp_path, seeds=(0, 1)), list(diagen.LADDER)
    assert list(ladder["distances"]["recall"]) == rungs[1:]
    configs = [
        json.loads(
            (tmp_path / f"{re.sub('[^a-zA-Z0-9]+', '-', rung).strip('-')}-s1" / "config.json").read_text()
        )
        for rung in rungs
    ]
    parts = ("real_only", "method", "sigmas", "prompts", "weighting")
    sigmas = [0.0, 0.33, 0.67, 1.67]
    assert [[config["args"][part] for part in parts] for config in configs[1:]] == [
        [False, "real_guidance", [0.0], "none", False],
        [False, "da_fusion", [0.0], "none", False],
        [False, "diagen", sigmas, "none", False],
        [False, "diagen", sigmas, "bank", False],
        [False, "diagen", sigmas, "bank", True],
    ]
    assert configs[0]["args"]["real_only"]
    assert configs[5]["args"]["synthetic"] == str(tmp_path / "prompts-s1")
    assert [len([*tmp_path.glob(f"{rung}-s1/{kind}")]) for rung in ("DA-Fusion", "prompts", "weights")
            for kind in ("embeddings/*/*", "synthetic/*/*.png")] == [10, 10, 0, 10, 0, 0]  # fmt: skip
    weighed = lines_of(tmp_path / "weights-s1" / "metadata.jsonl")
    assert len(weighed) == 10 and all({"confidence", "weight"} <= set(r) for r in weighed)


def test_any_processes_draw_the_images_that_one_draws(three_digits, tmp_path, monkeypatch):
    """Two, each learning tokens and drawing batches of its own, going on with a run of one that was killed,
    and one going on with a run of two.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = FOLDER | {"data_dir": three_digits, "baseline": False}
    assert in_child(lambda: (die_at(diagen, "save_embedding", 2), a_run(three_digits, tmp_path / "two"))) == 9
    outcome = in_own_process(diagen, launcher=TWO_PROCESSES, **arguments, out=tmp_path / "two")
    assert outcome[0] == 0, outcome[2]
    begun_by_two(diagen, tmp_path / "three", 5, **arguments)
    for name in ("one", "three"):
        assert in_child(lambda name=name: a_run(three_digits, tmp_path / name)) == 0
    one, two, three = (
        {str(p.relative_to(tmp_path / k)): p.read_bytes()
         for pattern in ("synthetic/*/*.png", "embeddings/*/*", "prompts.csv")
         for p in (tmp_path / k).glob(pattern)} for k in ("one", "two", "three")
    )  # fmt: skip
    assert len(one) == 18 + 3 + 1 and one == two == three
    records = [lines_of(tmp_path / k / "synthetic" / "metadata.jsonl") for k in ("one", "two", "three")]
    for r in sum(records, []):
        del r["confidence"], r["weight"]  # the filter sees batches in halves, augmented otherwise
    assert records[0] == records[1] == records[2]
