"""Classifiers, their training and scores, run folders and the command line."""

import copy
import errno
import gc
import itertools
import pickle
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from accelerate.state import AcceleratorState
from PIL import Image
from scipy import stats
from sklearn import metrics

import common
import runs
from runs import die_at, in_child, refused, started, the_error

# --- classifiers


def build(name, size=32, classes=("a", "b", "c"), **options):
    options = dict(pretrained=False, clip="") | options
    return common.build_classifier(SimpleNamespace(classifier=name, image_size=size, **options), classes)


HEADS = "resnetv2_50 dla34 deit_small_distilled_patch16_224".split()  # timm's are no single linear layers
USUAL = "small_cnn resnet50 wide_resnet50_2 vgg16_bn vit_small_patch16_224 deit_base_patch16_224".split()


@pytest.mark.parametrize("size", [32, 64, 96, 224])
@pytest.mark.parametrize("name", USUAL + HEADS)
def test_a_classifier_has_feature_vectors_and_one_linear_layer_on_them(name, size):
    with torch.device("meta"):  # shapes only: the big ones cost nothing
        net, sides = build(name, size).eval(), []
        if "resnet5" in name:
            net.backbone.layer1.register_forward_pre_hook(lambda _, x: sides.append(x[0].shape[-1]))
        x = torch.zeros(2, 3, size, size)
        assert net.features(x).shape == (2, net.head.in_features) and net(x).shape == (2, 3)
    assert type(net.head) is torch.nn.Linear
    assert set(sides) <= {size if size <= 64 else size // 4}
    if name == "vgg16_bn":  # CIFAR's form has one linear layer of 512 features
        assert net.head.in_features == (512 if size <= 64 else 4096)


def test_a_classifier_normalises_as_its_weights_were_trained():
    for name in ("resnet18", "vit_small_patch16_224"):
        net = build(name, 64).eval()
        mean, std = (torch.tensor(net.backbone.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        x = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.allclose(net(x), net.head(net.backbone((x - mean) / std)), atol=1e-5)


def test_a_pretrained_stem_becomes_cifars_by_the_middle_of_its_kernels(tmp_path):
    pretrained = timm.create_model("resnet18", num_classes=5)
    timm.models.save_for_hf(pretrained, tmp_path, model_args={})
    for size, middle in ((64, slice(2, 5)), (96, slice(0, 7))):
        net = build(f"local-dir:{tmp_path}", size, pretrained=True).backbone
        assert torch.equal(net.conv1.weight, pretrained.conv1.weight[..., middle, middle])
        assert torch.equal(net.layer4[1].conv2.weight, pretrained.layer4[1].conv2.weight)


def test_a_classifier_that_cannot_be_had_is_named_at_once(monkeypatch):
    with refused("--classifier resnet81: give small_cnn, clip or a model of timm"):
        build("resnet81")
    with torch.device("meta"), refused("pit_b_224: give .* that takes 8 pixels"):
        build("pit_b_224", 8)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with monkeypatch.context() as patch, refused("resnet18: .*no network"):
        patch.setattr("timm.create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
        build("resnet18", pretrained=True)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: torch.nn.Conv2d(3, 4, 3))
    with refused(r"its features are \[4, 30, 30\], not a vector"):
        build("resnet18")


def test_clip_starts_as_its_own_zero_shot_classifier(tmp_path):
    names = ["cat", "guinea pig"]
    clip, tokenizer = runs.tiny_clip(tmp_path, "cat guinea pig")
    x, (mean, std) = torch.rand(5, 3, 32, 32), (timm.data.OPENAI_CLIP_MEAN, timm.data.OPENAI_CLIP_STD)
    words = tokenizer([f"a photo of a {n}" for n in names], padding=True, return_tensors="pt")
    with torch.no_grad():
        x_clip = torchvision.transforms.functional.normalize(x, mean, std)
        expected = clip(**words, pixel_values=x_clip).logits_per_image
        logits = build("clip", classes=names, clip=str(tmp_path)).eval()(x)
    assert torch.allclose(logits, expected, atol=1e-4)
    clip.half().save_pretrained(tmp_path)  # as some are stored; training needs more
    half = build("clip", classes=names, clip=str(tmp_path))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert METHOD.arguments(classifier="clip", frozen=True).frozen  # its features are pretrained ones


# --- training


def test_the_learning_rate_is_torchs_cosine_and_warms_up_linearly():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(21):
        assert common.cosine(step / 20) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()
    assert [common.cosine(p, 0.2) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


@pytest.mark.parametrize("name, kind", [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_matrices_decay_vectors_do_not_and_the_last_layer_learns_at_its_own_rate(name, kind):
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    net[0].bias.requires_grad_(False)
    optimizer = common.make_optimizer(name, net, 0.1, 0.05, {net[2]: 16.0})
    batch = torch.randn(4, 5), torch.arange(4) % 3, None
    common.train_epoch(net, [batch], optimizer, [0.01], common.make_accelerator())
    found = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {net[0].weight: (0.01, 0.05), net[1].weight: (0.01, 0), net[1].bias: (0.01, 0)}
    assert found == expected | {net[2].weight: (0.16, 0.05), net[2].bias: (0.16, 0)}
    assert type(optimizer) is getattr(torch.optim, kind)
    assert name != "sgd" or (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)


def noise_images(count=24, side=20):
    pixels = np.random.default_rng(0).integers(0, 255, (count, side, side, 3), np.uint8)
    return [Image.fromarray(p) for p in pixels]


def process(index=0, count=1):
    """The accelerator of one of several processes, as far as a loader or a run folder needs it."""
    place = dict(process_index=index, num_processes=count, is_main_process=index == 0)
    return SimpleNamespace(**place, wait_for_everyone=list, free_memory=list, device=torch.device("cpu"))


AUGMENTATIONS = ["digits", "crop+randaugment", "resized", "squeezed", "zoomed"]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_an_image_is_augmented_alike_in_any_batch_worker_or_process(augment):
    images = common.Images(noise_images(), range(24), common.make_transforms(16, augment)[0])

    def epoch(images, batch_size, workers=0, processes=1, seed=(3, 1)):
        seen, order = {}, common.shuffled(24, 24, 5)
        for index in range(processes):
            torch.manual_seed(index)  # whatever a process has drawn
            batches = common.load(images, batch_size, process(index, processes), workers, order, seed)
            parts = [*batches]
            assert [len(y) for _, y, _ in parts] == [batch_size // processes] * (24 // batch_size)
            assert all(torch.equal(y, i) for _, y, i in parts)
            seen |= {y.item(): x for xs, ys, _ in parts for x, y in zip(xs, ys, strict=True)}
        return torch.stack([seen[y] for y in range(24)])

    before = torch.get_rng_state()
    assert len(torch.stack([images[2, seed][0] for seed in range(20)]).unique(dim=0)) > 5
    assert torch.equal(torch.get_rng_state(), before)  # the caller's draws go on as if there were no images
    first = epoch(images, 8)
    for other in (epoch(images, 4), epoch(images, 8, workers=2), epoch(images, 8, processes=2)):
        assert torch.equal(first, other)
    assert not torch.equal(first, epoch(images, 8, seed=(3, 2)))
    # Windows and macOS start loading processes anew instead of forking: all goes through pickle
    assert torch.equal(first, epoch(pickle.loads(pickle.dumps(images)), 8))


def test_an_image_that_comes_again_in_an_epoch_is_augmented_anew():
    images = common.Images(noise_images(1), [0], common.make_transforms(16, "digits")[0])
    (x, _, _), *rest = common.load(images, 9, process(), order=[0] * 9, seed=(0,))
    assert not rest and len(x.unique(dim=0)) > 4


@pytest.mark.parametrize("samples", [24, 40])
def test_processes_share_one_random_order_whatever_each_has_drawn(samples):
    images, shares = common.Images(noise_images(), range(24), common.make_transforms(8, "none")[1]), []
    for index in range(2):
        torch.rand(index)
        order = common.shuffled(24, samples, 0, 3)
        shares.append([y.tolist() for _, y, _ in common.load(images, 8, process(index, 2), order=order)])
    batches = [a + b for a, b in zip(*shares, strict=True)]
    assert [len(batch) for batch in batches] == [8] * (samples // 8) and all(sorted(b) != b for b in batches)
    drawn = list(itertools.chain(*batches))
    assert sorted(drawn[:24]) == list(range(24)) and len(set(drawn[24:])) == samples - 24
    with refused("2 processes cannot share a batch of 7 equally"):
        common.load(images, 7, process(0, 2))


def test_the_last_batch_is_left_out_unless_it_is_the_only_one():
    images = common.Images(noise_images(10), range(10), common.make_transforms(8, "none")[1])
    loaders = [common.load(images, b, process(), drop_last=True) for b in (4, 10, 16)]
    assert [[len(y) for _, y, _ in loader] for loader in loaders] == [[4, 4], [10], [10]]
    assert [len(loader) for loader in loaders] == [2, 1, 1]
    assert [len(y) for _, y, _ in common.load(images, 4, process())] == [4, 4, 2]  # to evaluate, all


def test_generators_reproduce_and_differ_by_key():
    keys = list(itertools.product(range(4), repeat=3))
    first, second = ([torch.rand(4, generator=common.generator(*key)) for key in keys] for _ in range(2))
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert len(torch.stack(first).unique(dim=0)) == len(keys)


def test_an_epoch_of_training_is_torchs_with_its_rates_and_smoothed_labels():
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    net = torch.nn.Linear(5, 3)
    twin, accelerator = copy.deepcopy(net), common.make_accelerator()
    optimizer = common.make_optimizer("sgd", net, 1.0, 0.0, {})
    batches = [(x[:4], y[:4], None), (x[4:], F.one_hot(y[4:], 3).float(), None)]
    mean = common.train_epoch(net, batches, optimizer, [0.1, 0.2], accelerator, smoothing=0.3)
    reference, losses = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, nesterov=True), []
    for (images, labels, _), lr in zip(batches, (0.1, 0.2), strict=True):
        reference.param_groups[0]["lr"] = lr
        losses.append(torch.nn.CrossEntropyLoss(label_smoothing=0.3)(twin(images), labels))
        reference.zero_grad()
        losses[-1].backward()
        reference.step()
    assert torch.allclose(net.weight, twin.weight) and torch.allclose(net.bias, twin.bias)
    assert mean == pytest.approx((losses[0].item() + losses[1].item()) / 2)


def test_a_diverged_training_names_the_learning_rate():
    images = common.Images(noise_images(6, 4), [0, 1] * 3, common.make_transforms(4, "none")[1])
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    torch.nn.init.constant_(net[1].weight, torch.inf)
    accelerator = common.make_accelerator()
    optimizer = common.make_optimizer("sgd", net, 0.1, 0.0, {})
    with refused("loss is not a number; lower --lr"):
        common.train_epoch(net, common.load(images, 3, accelerator), optimizer, [1.0] * 2, accelerator)
    with refused("outputs are NaN or infinite; lower --lr"):
        common.predict(net, images, accelerator)


def test_precision_is_the_launchers_if_it_names_one(monkeypatch):
    for named, found in (("bf16", "bf16"), ("no", "no")):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", named)
        assert common.make_accelerator().mixed_precision == found
    AcceleratorState._reset_state(reset_partial_state=True)
    for native, found in ((False, torch.float16), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert common.native_dtype("cuda") == found


# --- evaluation


def test_scores_are_scikit_learns():
    labels, logits = torch.arange(400) % 9, 2 * torch.randn(400, 10)  # class 9 never occurs
    labels[labels == 3] = 4  # of classes that are unequal, too
    ours, p = common.scores(logits, labels), logits.softmax(1).double().numpy()
    p, y = p / p.sum(1, keepdims=True), labels.numpy()
    assert ours["top1"] == pytest.approx(metrics.accuracy_score(y, p.argmax(1)))
    assert ours["nll"] == pytest.approx(metrics.log_loss(y, p, labels=range(10)), rel=1e-5)
    with warnings.catch_warnings(action="ignore"):  # some predictions are of class 9
        assert ours["class_mean"] == pytest.approx(metrics.balanced_accuracy_score(y, p.argmax(1)))


def test_the_interval_is_students():
    values = [71.0, 74.5, 69.0, 73.0, 70.5]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert common.interval_text(values) == f"71.6 ± {(high - low) / 2:.1f}"
    assert (common.interval_text([3.0]), common.interval_text([3.0, 4.0], "+")) == ("3.0", "+3.5")


def test_curves_show_accuracies_that_are_measured_now_and_then(tmp_path):
    lines = [{"epoch": e, "loss": 1.0 / e} | ({"test": 0.5} if e % 5 == 0 else {}) for e in range(1, 11)]
    with warnings.catch_warnings(action="error"):  # Matplotlib warns of a legend without curves
        common.save_curves({"real only": lines}, tmp_path / "curves.png")


# --- run folders


def open_run(path, accelerator=None, **arguments):
    gc.collect()  # a folder stays locked while the frames of an exception in an earlier run live
    known = {"out": str(path), "overwrite": False, "seed": 0, "epochs": 4, **arguments}
    return common.Run(SimpleNamespace(**known), accelerator or common.make_accelerator())


def a_data_set(folder, *names):
    """A data set of two classes whose training files have these names."""
    for file in (files := [folder / name for name in names or ("0.png", "1.png")]):
        folder.mkdir(exist_ok=True)
        if not file.exists():
            noise_images(1, 8)[0].save(file)
    images = common.Images(files, [i % 2 for i in range(len(files))])
    return common.Data(["cat", "dog"], images, class_names=["cat", "dog"])


def begun(path, data=None, **arguments):
    run = open_run(path, **arguments)
    run.begin(data or common.Data(["cat"], common.Images([], []), class_names=["cat"]), "the plan")
    return run


def test_each_epoch_and_process_draws_something_else_and_the_same_when_it_comes_again(tmp_path):
    def draws(*place):
        run = open_run(tmp_path / "-".join(map(str, place)), process(*place))
        return [torch.rand(4) for _ in run.epochs("first", 2)]

    drawn = draws(0, 2) + draws(1, 2)
    assert len(torch.stack(drawn).unique(dim=0)) == 4
    torch.rand(1)
    assert all(map(torch.equal, draws(0, 2), drawn[:2]))


def test_an_image_of_nan_is_refused_and_not_kept(tmp_path):
    files = [tmp_path / "a" / f"{i}.png" for i in range(2)]
    with refused("came out as NaN; lower --guidance_scale"):
        open_run(tmp_path).keep(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)]), files)
    assert not any(file.exists() for file in files)


def test_a_begun_run_refuses_other_arguments_and_names_the_difference(tmp_path):
    open_run(tmp_path)
    begun(tmp_path, epochs=5, seeds=1, data_dir="a").write("model.pt", {"x": torch.ones(1)})
    with refused("--epochs 5, this one has --epochs 4 .a longer run has other learning rates.*--overwrite"):
        open_run(tmp_path, seeds=1)
    with refused("holds a run with --seed 0, this one has --seed 1; give another"):
        open_run(tmp_path, epochs=5, seed=1)
    open_run(tmp_path, epochs=5, seeds=2, data_dir="b")  # these two may change
    config = common.read_file(tmp_path / "config.json")
    assert config["args"]["epochs"] == 5 and config["versions"]["torch"] == torch.__version__
    open_run(tmp_path, epochs=4, seeds=1, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_run_goes_on_when_a_folder_moved_or_its_path_is_written_otherwise(tmp_path, monkeypatch):
    for place in ("a", "b"):
        (tmp_path / place / "sd").mkdir(parents=True)
    begun(tmp_path / "run", diffusion=str(tmp_path / "a" / "sd"))
    monkeypatch.chdir(tmp_path)
    for path in ("a/sd", "./a/sd/"):
        open_run(tmp_path / "run", diffusion=path)
    for path in ("a", "nowhere/sd", "b/sd"):  # a/sd is there, so b/sd is another one
        with refused(f"this one has --diffusion {path};"):
            open_run(tmp_path / "run", diffusion=path)
    (tmp_path / "a" / "sd").rmdir()
    open_run(tmp_path / "run", diffusion="b/sd")
    with refused("this one has --diffusion b;"):
        open_run(tmp_path / "run", diffusion="b")


def test_a_data_set_that_changed_while_a_run_was_stopped_is_refused(tmp_path):
    data, run, moved = a_data_set(tmp_path / "data"), tmp_path / "run", tmp_path / "moved"
    begun(run, replace(data, val=data.train))
    (tmp_path / "data").rename(moved)  # a folder may move
    begun(run, data := replace(a_data_set(moved), val=a_data_set(moved).train))
    changes = {
        "train: 3 images .*, was 2 images": dict(train=a_data_set(moved, "0.png", "1.png", "2.png").train),
        "train: 2 images": dict(train=a_data_set(moved, "0.png", "3.png").train),
        "train: 2 images .*, was 2": dict(train=replace(data.train, labels=[0, 0])),
        "cat, ox, was cat, dog": dict(class_names=["cat", "ox"]),
        "test_ood: 2 images .*, was None": dict(test_ood=data.train),
        "val: None, was 2 images": dict(val=None),
    }
    for words, change in changes.items():
        with refused(f"data changed since .*{words}.*undo the change"):
            begun(run, replace(data, **change))
    (moved / "1.png").write_bytes(b"x")
    with refused("data changed since .*train: 2 images"):
        begun(run, data)


def test_a_file_that_an_argument_names_and_that_changed_is_refused_and_a_long_prompt_is_no_file(tmp_path):
    data, given = a_data_set(tmp_path / "data"), {"prompts": str(tmp_path / "p.csv"), "prompt": "{}" * 2000}
    for text in ("one", "one"):
        (tmp_path / "p.csv").write_text(text)
        begun(tmp_path / "run", data, **given)
    (tmp_path / "p.csv").write_text("two")
    with refused("data changed since .*--prompts: .*, was "):
        begun(tmp_path / "run", data, **given)


def test_overwriting_that_is_killed_at_any_deletion_is_made_good_when_it_is_given_again(tmp_path):
    for n in (1, 2, 3):
        run = begun(path := tmp_path / str(n))
        run.write("a.pt", {})
        run.write("z.jsonl", [])
        del run
        overwrite = partial(open_run, path, overwrite=True, epochs=5)
        assert in_child(lambda n=n, f=overwrite: (die_at(Path, "unlink", n), f())) == 9
        assert (path / "config.json").exists()
        overwrite()
        assert [file.name for file in path.iterdir()] == [".lock"], n


def test_a_long_run_writes_about_300_checkpoints_and_the_last_one_is_whole(tmp_path, monkeypatch):
    run, written = begun(tmp_path), []
    write = run.write
    monkeypatch.setattr(
        run, "write", lambda name, value: name == "A.pt" and written.append(write(name, value))
    )
    for _ in run.epochs("A", 1000):
        pass
    assert 250 <= len(written) <= 350 and len(common.read_file(tmp_path / "A.pt")["log"]) == 1000


def test_overwriting_never_empties_a_folder_that_holds_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    open_run(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # a model's folder
    for overwrite in (False, True):
        with refused("has a config.json that no run wrote"):
            open_run(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_folder_in_use_is_refused_and_left_alone(tmp_path, overwrite):
    run = begun(tmp_path)
    run.write("model.pt", {"x": torch.ones(1)})
    with refused(f"another process is running in {tmp_path}"):
        open_run(tmp_path, overwrite=overwrite)
    assert common.read_file(tmp_path / "model.pt")["x"] == 1 and (tmp_path / "config.json").exists()
    del run
    assert open_run(tmp_path).finish() is None


def test_a_finished_run_has_its_curves_and_can_be_read_by_many(tmp_path):
    run, result = begun(tmp_path), {"first": {"training": 1.0}}
    run.logs["first"] = [{"epoch": 1, "loss": 1.0, "test": 0.5}]
    assert run.finish() is None
    assert run.finish(result) == result and (tmp_path / "curves.png").exists()
    again = open_run(tmp_path)  # `run` still lives: a notebook reads a finished run twice
    assert again.finish() == open_run(tmp_path).finish() == result


@pytest.mark.parametrize("name", ["model.pt", "plan.json", "lines.jsonl"])
def test_a_truncated_file_is_named_and_a_missing_one_has_a_default(tmp_path, name):
    path = tmp_path / name
    assert common.read_file(path) is None and common.read_file(path, [1]) == [1]
    common.write_file(path, [{"x": 1.0}] * 20)
    assert common.read_file(path) == [{"x": 1.0}] * 20
    path.write_bytes(path.read_bytes()[:-15])
    with refused(f"cannot read {path}.*delete it") as error:
        common.read_file(path)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_png_is_compressed_at_the_fastest_level(tmp_path):
    common.write_file(tmp_path / "a.png", torch.rand(3, 8, 8))
    assert b"IDATx\x01" in (tmp_path / "a.png").read_bytes()


def test_reading_a_checkpoint_never_runs_foreign_code(tmp_path):
    torch.save({"x": tmp_path}, tmp_path / "model.pt")  # to make a path, a function is called
    with refused("cannot read .*model.pt .Weights only load failed"):
        common.read_file(tmp_path / "model.pt")


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch, capsys):
    def acquire(self):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(common.FileLock, "acquire", acquire)
    begun(tmp_path)
    assert "cannot be locked (no locks here); start no second run" in capsys.readouterr().out
    assert (tmp_path / "config.json").exists()


def test_any_class_name_gets_a_folder_of_its_own(tmp_path):
    names = ["a/b", "a_b", "a\\b", "a_b 0", 'say "hi"', "baker's", "naïve café", "x" * 300, "x" * 299 + "y"]
    names += ["語" * 300, "", " ", ".", "..", "../up", "a:b*c?", "line\nbreak", "nul\0", "Owl", "owl"]
    records = [common.record(names, i, "x", [0, i]) for i in range(len(names))]
    for record in records:
        (file := tmp_path / record["file_name"]).parent.mkdir()  # fails if a name is taken, too long or up
        noise_images(1, 4)[0].save(file)
    assert len({record["file_name"].lower() for record in records}) == len(names)
    assert len(torchvision.datasets.ImageFolder(tmp_path)) == len(names)
    assert not any(set(record["file_name"][:-6]) & set('<>:"/\\|?*\0\n') for record in records)
    common.write_file(tmp_path / "metadata.jsonl", records)
    assert common.read_records(tmp_path, names) == records
    with refused("has other classes than this data set: .'a/b'."):
        common.read_records(tmp_path, names[1:])
    file.unlink()
    with refused("lacks images or their metadata; finish that run first"):
        common.read_records(tmp_path, names)


# --- the command line


RECIPES = {"*": dict(epochs=3, prompt="a {}"), "digits": dict(lr=0.5, epochs=7)}
RECIPES |= {"cifar10": dict(lr=0.25, pretrained=True), "cifar10/clip": dict(lr=0.1)}


RUNGS = {"plain": dict(augment="none"), "with crops": dict(augment="crop")}
METHOD = common.Method("method", common.RunArgs, RECIPES, RUNGS, None)
SCRIPT = SimpleNamespace(METHOD=METHOD, __file__="method.py", __doc__="A method.\n\nMore.")
VALUES = {  # by a command line: those of --lr, --epochs, --pretrained and --prompt
    "": (0.5, 7, False, "a {}"),
    "--dataset cifar10": (0.25, 3, True, "a {}"),
    "--dataset=cifar10 --classifier clip": (0.1, 3, True, "a {}"),
    "--dataset=cifar10 --classifier clip.tag": (0.1, 3, True, "a {}"),  # timm's names have tags
    "--lr 0.3 --dataset cifar10 --pretrained false --prompt {}s": (0.3, 3, False, "{}s"),
}


@pytest.mark.parametrize("words", VALUES)
def test_an_arguments_value_is_what_is_given_else_the_recipes_which_help_shows(words):
    args, _ = started(SCRIPT, *words.split())
    assert (args.lr, args.epochs, args.pretrained, args.prompt) == VALUES[words]
    given = {k: v for k, v in vars(args).items() if f"--{k}" in words}
    assert vars(METHOD.arguments(**given)) == vars(args)  # as a notebook gets them
    if "0.3" not in words:
        status, text, _ = runs.in_this_process(SCRIPT, *words.split(), "--help")
        text = " ".join(text.split())
        assert status == 0 and "A method. options:" in text and "--lr (0, 100]" in text
        assert f"peak learning rate (default: {VALUES[words][0]})" in text


def test_an_error_ends_in_one_line_and_status_2_but_for_one_of_the_program_itself():
    def raising(error):
        return started(SCRIPT, run=lambda args: (_ for _ in ()).throw(error))[1]

    error = the_error(raising(common.UserError("give  another\nfolder")))
    assert error == "method.py: error: give another folder"
    assert "out of GPU memory; lower --generation_batch_size" in the_error(raising(torch.OutOfMemoryError()))
    for own in (ZeroDivisionError, RuntimeError):
        with pytest.raises(own):
            raising(own)


def test_an_image_that_a_loading_process_cannot_read_is_named_in_one_line(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    images = common.Images([tmp_path / "bad.png"], [0], common.make_transforms(8, "none")[1])
    _, outcome = started(SCRIPT, run=lambda args: [*common.load(images, 1, process(), workers=1)])
    error = the_error(outcome)
    assert error.startswith(f"method.py: error: cannot read the image {tmp_path}/bad.png")


def scored(args):
    top1 = args.seed / 100 + (0.8 if args.augment == "crop" else 0.5)
    return {"test": {"top1": top1, "class_mean": top1}, "test_ood": {"top1": top1 / 2}}


def test_the_ladder_compares_rungs_seed_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "run_once", lambda _, args, *__: {"real only": {}, "method": scored(args)})
    table = common.run_ladder(METHOD, dict(seeds=3, seed=3, out=str(tmp_path)), process())
    assert common.read_file(tmp_path / "ladder.md") == f"{table}\n"
    header, _, plain, crops = (line.split(" | ") for line in table.splitlines()[2:])
    assert header == ["| rung", "test", "gain", "test_ood", "gain |"]
    assert plain == ["| plain", "54.0 ± 2.5", "", "27.0 ± 1.2", " |"]
    assert crops[1:3] == ["84.0 ± 2.5", "+30.0 ± 0.0"] and crops[4] == "+15.0 ± 0.0 |"
    with refused("--ladder takes no --real_only"):  # every rung would be the same
        common.run_ladder(METHOD, dict(real_only=True), process())


def test_the_last_lines_are_a_table_of_accuracies_their_gain_notes_and_costs():
    args = [SimpleNamespace(augment=augment, seed=0) for augment in ("none", "crop")]
    real, method = map(scored, args)
    method |= {"synthetic": 320, "training": 10.4, "generation": 4.0, "note": "a note"}
    lines = common.report({"real only": real | {"training": 10.4}, "ActGen": method}, "runs/x")
    assert lines.splitlines() == [
        "accuracy in %                test    gain test_ood    gain",
        "real only                    50.0             25.0",
        "ActGen                       80.0   +30.0     40.0   +15.0",
        "a note",
        "320 images generated in 4 s, 21 s of training; runs/x",
    ]
    assert "gain" not in common.report({"real only": real}, "runs/x")
