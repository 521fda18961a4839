"""Arguments, machines and what a run says: ranges of numbers, paths, Windows, trackers, tables."""

import ast
import dataclasses
import importlib
import io
import itertools
import json
import math
import pickle
import re
import shlex
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

import actgen
import common
import diagen
import dreamda
from runs import in_this_process, lines_of, the_error

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (actgen, dreamda, diagen)
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=[script.__name__ for script in SCRIPTS])
TINY = {  # one class or two, a handful of images and steps
    actgen: dict(epochs=2, images_per_epoch=2, steps=2, genval_share=0.5, batch_size=4),
    dreamda: dict(epochs=1, variations=1, steps=3, batch_size=4),
    diagen: dict(epochs=1, variations=2, steps=4, batch_size=4, iterations=2, filter_epochs=1)
    | dict(inversion_steps=1, inversion_batch_size=1, prompts_per_class=1),
}


def numbers(script):
    """The fields of a script's arguments that hold numbers: name -> whether whole, whether several."""
    found = {}
    for field in dataclasses.fields(script.Args):
        kind = str(field.type)
        if "int" in kind or "float" in kind:
            found[field.name] = ("int" in kind, "list" in kind)
    return found


@pytest.fixture
def tiny(tmp_path):
    return tiny_in(tmp_path)


def tiny_in(tmp_path):
    """tiny(script): the arguments of a tiny run on a folder of two classes, three images in each split."""
    rng = np.random.default_rng(0)
    for split, name, i in itertools.product(("train", "val", "test"), ("cat", "dog"), range(3)):
        file = tmp_path / "data" / split / name / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    folder = dict(dataset="folder", data_dir=tmp_path / "data", out=tmp_path / "run", baseline=False)
    small = dict(diffusion=common.DIGITS_SD, classifier="small_cnn", pretrained=False, image_size=32)
    more = dict(augment="crop", workers=0, examples_per_class=3, attention_resolution=8)

    def arguments(script, **changes):
        known = folder | small | more | TINY[script] | changes
        return {k: v for k, v in known.items() if k in {f.name for f in dataclasses.fields(script.Args)}}

    return arguments


# --- the ranges of numbers

REFUSED = {  # values that no run can mean, for every script that has the argument
    "--lr": "nan inf -1 0 1e9",
    "--weight_decay": "nan inf -0.1",
    "--head_lr": "nan inf 0 -1",
    "--warmup": "nan -0.1 1 7",
    "--guidance_scale": "nan inf -inf -1 1e9",
    "--image_size": "0 -32 1 100000000",
    "--label_smoothing": "nan -0.1 1",
    "--epochs": "0 -1 99999999999999999999",
    "--batch_size": "0 -8 99999999999999999999",
    "--generation_batch_size": "0 -8",
    "--steps": "0 -1",
    "--seed": f"-1 {2**64}",
    "--seeds": "0 -1",
    "--workers": "-1",
    "--eval_every": "0 -1",
    "--examples_per_class": "-1",
    "--variations": "0 -1",
    "--images_per_epoch": "0",
    "--guidance_centre": "nan inf",
    "--contrastive_weight": "nan inf -1",
    "--adversarial_weight": "nan inf -1",
    "--nu": "nan inf -1",
    "--rho": "nan inf -1",
    "--genval_share": "nan 0 1 -0.5 2",
    "--attention_resolution": "-1",
    "--adversarial_pixels": "-1",
    "--gradient_steps": "-1",
    "--eta": "nan -0.1 2",
    "--strength": "nan 0 -1 1.01 inf",
    "--source_guidance": "nan inf -1",
    "--noise_scale": "nan inf -1",
    "--heads": "-1 0 1",
    "--auxiliary_lr": "nan inf 0 -1",
    "--threshold": "nan -0.1 7",
    "--auxiliary_weight": "nan inf -1",
    "--orthogonality_weight": "nan inf -1",
    "--consistency_weight": "nan inf -1",
    "--burn_in": "nan -0.1 1.1",
    "--synthetic_ratio": "nan inf -1 0",
    "--unlabelled": "-1",
    "--paths": "-1",
    "--inversion_lr": "nan inf -1 0 1e9",
    "--inversion_steps": "0",
    "--inversion_batch_size": "0",
    "--sigmas": "nan inf -1",
    "--synthetic_probability": "nan -0.1 1.1",
    "--iterations": "0",
    "--filter_epochs": "0",
    "--vectors": "0 -1",
    "--style": "nan -0.1 1.5",
    "--prompts_per_class": "0",
}


def started(script, *words) -> dict | str:
    """The arguments with which the command line starts a run, or the one line that it ends with."""
    got = []

    def run_once(args, accelerator):
        got.append(vars(args))
        return {"real": {"test": {"top1": 0.5, "class_mean": 0.5}, "synthetic": 0}}

    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        patch.setitem(sys.modules, "__main__", script)
        patch.setattr(script, "run_once", run_once)
        try:
            common.cli(script.main, script.Args, script.RECIPES)
        except SystemExit as stop:
            return the_error((stop.code, "", err.getvalue()))
    return got[0]


def test_a_pretrained_classifier_of_dreamda_has_no_burn_in_unless_it_is_given():
    scratch = ("--pretrained", "false")
    assert [started(dreamda, *words)["burn_in"] for words in ((), scratch)] == [0, 0.5]
    assert [started(dreamda, *words, "--burn_in", "0.3")["burn_in"] for words in ((), scratch)] == [0.3] * 2


def test_every_number_is_refused_somewhere():
    names = {f"--{name}" for script in SCRIPTS for name in numbers(script)}
    assert names == set(REFUSED)


@each_script
def test_nonsense_is_refused_with_the_argument_its_value_and_its_range(script):
    for name, values in REFUSED.items():
        for value in values.split() if name[2:] in numbers(script) else ():
            line = started(script, f"{name}={value}")
            said = re.search(rf"error: {name} \[?(\S+?)\]? must lie in [\[(].+, .+[\])]$", line)
            assert said and str(float(said[1])) == str(float(value)), line


def test_a_range_is_shown_by_help_and_holds_for_each_number_of_a_list(capsys):
    for words, line in (("0.2 0.4", None), ("0.2 nan", "[0.2, nan]"), ("0.2 1.5", "[0.2, 1.5]")):
        found = started(diagen, "--strength", *words.split())
        assert (
            found["strength"] == [0.2, 0.4]
            if line is None
            else f"--strength {line} must lie in (0, 1]" in found
        )
    with pytest.raises(common.UserError, match="--sigmas"):
        diagen.resolve(diagen.Args(sigmas=[]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["dreamda.py", "--help"])
        patch.setitem(sys.modules, "__main__", dreamda)
        common.cli(dreamda.main, dreamda.Args, dreamda.RECIPES)
    assert "--threshold [0, 1]" in capsys.readouterr().out


def test_every_recipe_is_within_the_ranges():
    for script in SCRIPTS:
        for dataset in script.RECIPES:
            name, _, classifier = dataset.partition("/")
            script.resolve(script.Args(dataset=name, classifier=classifier or None))


WHOLE = st.one_of(st.integers(-3, 20), st.integers(), st.sampled_from([2**31, 2**63, 10**30, -(2**63)]))
REAL = st.one_of(
    st.floats(), st.floats(-2, 2), st.sampled_from([0.0, 1.0, 1e-320, 1e308, math.inf, math.nan])
)
TEXT = st.one_of(
    WHOLE.map(str), REAL.map(repr), st.sampled_from(["", "1e3", "0x10", "many", "½", "1_0", "-"])
)


@each_script
@settings(deadline=None, max_examples=120, database=None, derandomize=True)
@given(data=st.data())
def test_any_numbers_start_a_run_or_end_in_one_line(script, data):
    fields, words = numbers(script), []
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True)):
        value = st.one_of(WHOLE.map(str) if fields[name][0] else REAL.map(repr), TEXT)
        several = (
            data.draw(st.lists(value, min_size=1, max_size=3)) if fields[name][1] else [data.draw(value)]
        )
        words += [f"--{name}={several[0]}", *several[1:]]
    found = started(script, *words)
    if isinstance(found, dict):
        for name in fields:
            values = found[name] if isinstance(found[name], list) else [found[name]]
            fits = (v is None or (math.isfinite(v) and 0 <= v <= 2**32) for v in values)
            assert all(fits), (name, values)


EXTREMES = [  # legal, but at an end of their ranges
    (actgen, dict(guidance_scale=100, nu=1000, rho=0, gradient_steps=10000, guidance_centre=1000)),
    (actgen, dict(lr=100, weight_decay=1, warmup=0.999999, genval_share=0.7, adversarial_pixels=1)),
    (actgen, dict(image_size=8, batch_size=1, epochs=1, steps=1, guidance_scale=0, seed=4294967295)),
    (actgen, dict(optimizer="adamw", lr=1e-300, contrastive_weight=1000, eval_every=1000000)),
    (dreamda, dict(noise_scale=1000, guidance_scale=100, strength=1, eta=0, paths=10000)),
    (dreamda, dict(lr=100, threshold=0, heads=2, auxiliary_weight=1000, consistency_weight=1000)),
    (dreamda, dict(image_size=8, batch_size=1, synthetic_ratio=100, threshold=1, seed=4294967295)),
    (dreamda, dict(strength=1e-300)),
    (diagen, dict(sigmas=100, guidance_scale=100, inversion_lr=1, strength=1, seed=4294967295)),
    (diagen, dict(lr=100, optimizer="sgd", frozen=False, synthetic_probability=1, batch_size=1)),
    (diagen, dict(image_size=8, steps=1, strength=1, sigmas=0, weight_decay=1, inversion_batch_size=100)),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "script, extreme", EXTREMES, ids=lambda x: x.__name__ if hasattr(x, "train") else None
)
def test_an_extreme_run_ends_with_a_table_or_in_one_line(script, extreme, tiny):
    outcome = in_this_process(script, **tiny(script, **extreme))
    if outcome[0] == 0:
        assert "accuracy in %" in outcome[1] and "nan" not in outcome[1]
    else:
        assert "--" in the_error(outcome)


def test_a_network_that_cannot_take_the_images_is_named_before_anything_is_trained(tiny):
    """Batch norm needs two numbers of a channel: a single image of 1 x 1 features has one."""
    outcome = in_this_process(
        dreamda, "--real_only", **tiny(dreamda, classifier="resnet18", image_size=8, batch_size=1)
    )
    assert "the classifier resnet18 cannot train on 1 images of 8 pixels" in the_error(outcome)


@each_script
def test_images_of_nan_stop_the_run_and_name_the_arguments(script, tiny, tmp_path):
    """As half precision gives them, or here a broken decoder."""
    shutil.copytree(common.DIGITS_SD, sd := tmp_path / "sd")
    (file,) = (sd / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights["decoder.conv_out.bias"][:] = math.nan
    save_file(weights, file)
    line = the_error(in_this_process(script, **tiny(script, diffusion=sd)))
    assert re.search(r"the image .*\.png came out as NaN; lower --guidance_scale", line)
    assert {"--nu" in line, "--noise_scale" in line, "--sigmas" in line} == {True, False}
    assert not [*(tmp_path / "run").glob("synthetic/*/*.png")]


def test_a_diverged_training_names_the_learning_rate():
    accelerator = common.make_accelerator()
    images = [Image.new("RGB", (4, 4), (40 * i, 9, 9)) for i in range(6)]
    images = common.Images(images, [0, 1] * 3, common.make_transforms(4, "none")[1])
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    torch.nn.init.constant_(net[1].weight, math.inf)
    with pytest.raises(common.UserError, match="loss is not a number; lower --lr"):
        loader = common.Loader(images, 3, accelerator).draw(range(6))
        common.train_epoch(net, loader, torch.optim.SGD(net.parameters()), lambda i: 1.0, accelerator)
    with pytest.raises(common.UserError, match="outputs are not numbers; lower --lr"):
        common.predict(net, images, accelerator)


# --- other machines


@each_script
def test_a_tilde_is_the_home_folder_in_every_argument(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    (tmp_path / "my embeddings" / "embeddings").mkdir(parents=True)
    texts = ("data_dir", "out", "diffusion", "lora", "clip", "synthetic", "embeddings", "llm")
    known = [k for k in texts if k in {f.name for f in dataclasses.fields(script.Args)}]
    found = started(script, *(f"--{name}=~/my {name}" for name in known))
    assert {name: found[name] for name in known} == {name: str(tmp_path / f"my {name}") for name in known}


class Hub:
    """Stands for a class of models, whose hub cannot be reached."""

    @staticmethod
    def from_pretrained(name):
        raise OSError("no network")


@pytest.mark.parametrize(
    "name, path",
    [
        ("./sd", True), ("../sd", True), ("models/sd", True), ("models/sd/unet", True), ("~/sd", True),
        ("/nowhere/sd", True), (r"C:\models\sd", True), (r"models\sd", True), ("C:/sd", True), ("sd/", True),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", False), ("gpt2", False), ("openai/clip-vit", False),
    ],
)  # fmt: skip
def test_a_missing_folder_of_a_model_is_told_from_an_id_of_the_hub(name, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(common.UserError, match="no such folder") as error:
        common.from_pretrained(Hub, name)
    assert ("needs a network" in str(error.value)) == (not path), error.value


def test_class_folders_avoid_what_windows_refuses():
    names = [
        "CON",
        "nul",
        "Aux",
        "com1",
        "LPT9",
        "con.txt",
        "COM¹",
        "prn .x",
        "a:b",
        "dots...",
        "space ",
        "con",
    ]
    names += ["console", "common", "com10"]
    folders = common.class_folders(names)
    assert len({folder.lower() for folder in folders}) == len(names)
    for folder in folders:
        # https://learn.microsoft.com/windows/win32/fileio/naming-a-file
        stem = folder.split(".")[0].strip().lower()
        assert stem not in {"con", "prn", "aux", "nul"} and not re.fullmatch("(com|lpt)[0-9¹²³]", stem)
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f]', folder) and folder[-1] not in ". "
    assert folders[-3:] == names[-3:]


def test_documented_commands_have_arguments_that_exist(capsys):
    patterns = "*.md", "digits/**/*.md", "*.py", "digits/**/*.py", "tests/bench.py"
    pages = [path.read_text(encoding="utf-8") for pattern in patterns for path in ROOT.glob(pattern)]
    lines = re.findall(r"python ((?:\w+/)*\w+\.py.*)", "\n".join(pages).replace("\\\n", ""))
    commands = {re.split(r"  +(?=[^ -])|[`#;]", line)[0].replace("[", "").replace("]", "") for line in lines}
    assert len(commands) > 40
    for command in commands:
        path, *words = shlex.split(re.sub(r" [TN]\b", " 4", command))
        module = importlib.import_module(path.removesuffix(".py").removeprefix("tests/").replace("/", "."))
        if not hasattr(module, "Args"):  # a few experiments have no arguments
            continue
        try:
            HfArgumentParser(module.Args).parse_args_into_dataclasses(words)
        except (SystemExit, ValueError):
            pytest.fail(f"{command}: {capsys.readouterr().err}")


def anchors(page: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    heads = [head.lower() for head in re.findall(r"^#+ (.*)$", text, re.M)]
    return [re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("page", ["README.md", "digits/README.md", "digits/RESULTS.md"])
def test_links_lead_to_files_and_headings_that_exist(page):
    here = ROOT / page
    links = re.findall(r"\]\(([^)\s]+)\)", here.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local
    for link in local:
        file, _, anchor = link.partition("#")
        target = here.parent / file if file else here
        assert target.exists(), link
        # a heading that a page has twice has a number in its anchor, which changes with the page
        assert not anchor or anchors(target).count(anchor) == 1, link


SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("digits/*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=[path.name for path in SOURCES])
def test_no_module_needs_posix_or_opens_text_in_the_machines_encoding(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"fcntl", "pwd", "grp", "resource", "termios", "posix", "pty", "syslog"}
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"fork", "geteuid", "getuid", "SIGKILL", "SIGALRM", "sched_getaffinity"}
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:2])
            if name in ("read_text", "write_text") or (name == "open" and isinstance(node.func, ast.Name)):
                assert binary or "encoding" in {k.arg for k in node.keywords}, ast.unparse(node)


@pytest.fixture(scope="module")
def with_baselines(quick, tmp_path_factory):
    """with_baselines(script): arguments and output of a tiny run; its loaders' images went through pickle."""
    runs = {}

    class ThroughPickle(torch.utils.data.DataLoader):
        def __init__(self, images, *arguments, **options):
            super().__init__(pickle.loads(pickle.dumps(images)), *arguments, **options)

    def run(script):
        if script not in runs:
            arguments = tiny_in(tmp_path_factory.mktemp(script.__name__))(script, baseline=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.utils.data, "DataLoader", ThroughPickle)
                runs[script] = arguments, in_this_process(script, **arguments)
        return runs[script]

    return run


@each_script
def test_what_goes_to_loading_processes_can_be_pickled(script, with_baselines):
    """Windows and macOS start them anew instead of forking."""
    _, (status, _, stderr) = with_baselines(script)
    assert status == 0, stderr


def test_a_spawned_loading_process_gives_the_same_images(digits, monkeypatch):
    images, load = digits.test.subset(range(6)), torch.utils.data.DataLoader

    def loader(*arguments, num_workers, **options):
        context = {"multiprocessing_context": "spawn"} if num_workers else {}
        return load(*arguments, num_workers=num_workers, **context, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    accelerator = common.make_accelerator()
    here, there = ([*common.Loader(images, 3, accelerator, workers).draw(range(6))] for workers in (0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(here, there, strict=True)) and len(here) == 2


def test_a_console_that_lacks_letters_is_no_reason_to_stop(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with redirect_stdout(out):
        monkeypatch.setattr(sys, "argv", ["dreamda.py"])
        monkeypatch.setitem(sys.modules, "__main__", dreamda)
        common.cli(lambda args: print("a 犬 ± 1"), dreamda.Args)
    out.flush()
    assert out.buffer.getvalue().split() == [b"a", b"?", b"\xb1", b"1"]


# --- trackers


class Notebook(accelerate.tracking.GeneralTracker):
    """A tracker of accelerate's that keeps what it is told."""

    name, requires_logging_directory, told = "notebook", True, []

    def __init__(self, project, folder, **_):
        super().__init__()
        self.told.append({"folder": Path(folder), "lines": {}, "finished": False})

    @property
    def tracker(self):
        return self.told

    def store_init_configuration(self, values):
        self.told[-1]["config"] = values

    def log(self, values, step=None, **_):
        self.told[-1]["lines"][step] = values

    def finish(self):
        self.told[-1]["finished"] = True


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("script", [actgen, dreamda, diagen])
def test_classifiers_are_trained_with_the_label_smoothing_that_is_asked_for(script, tiny, monkeypatch):
    used, cross_entropy = set(), F.cross_entropy

    def spy(logits, y, **options):
        if logits.requires_grad:
            used.add(options.get("label_smoothing", 0.0))
        return cross_entropy(logits, y, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    status, _, stderr = in_this_process(script, **tiny(script, real_only=True, label_smoothing=0.25))
    assert status == 0 and used == {0.25}, stderr


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "script, real_only, expected",
    [
        (actgen, True, [(3, 2)]),
        (diagen, True, [(3, 2)]),
        (dreamda, True, [(3, 2)]),
        (dreamda, False, [(3, 2), (5, 4 * 2)]),
    ],
)
def test_heads_learn_at_the_rates_that_are_asked_for(script, real_only, expected, tiny, monkeypatch):
    """DreamDA's four auxiliary heads, which it has if it labels images, have a rate of their own.

    expected: of each group of heads its rate and the number of its weights and biases
    """
    rates, make = set(), common.make_optimizer

    def spy(optimizer, *_):
        backbone, *heads = optimizer.param_groups
        rates.add(tuple((round(head["lr"] / backbone["lr"], 6), len(head["params"])) for head in heads))

    def record(*args, **options):
        optimizer = make(*args, **options)
        optimizer.register_step_pre_hook(spy)
        return optimizer

    monkeypatch.setattr(common, "make_optimizer", record)
    training = dict(real_only=real_only, frozen=False, warmup=0, head_lr=3, auxiliary_lr=5)
    status, _, stderr = in_this_process(script, **tiny(script, **training))
    assert status == 0 and rates == {tuple(expected)}, stderr


@pytest.mark.usefixtures("quick")
def test_diagen_chooses_among_the_epochs_that_are_evaluated_and_the_last(tiny):
    arguments = tiny(diagen, real_only=True, epochs=5, eval_every=2)
    status, _, stderr = in_this_process(diagen, **arguments)
    lines = lines_of(arguments["out"] / "metrics.jsonl")
    assert status == 0 and [line["epoch"] for line in lines if "val" in line] == [2, 4, 5], stderr
    (result,) = json.loads((arguments["out"] / "result.json").read_text()).values()
    assert result["epoch"] in (2, 4, 5)


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr(Notebook, "told", [])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    return Notebook.told


@pytest.mark.usefixtures("quick")
def test_a_tracker_is_told_what_metrics_jsonl_is(tiny, notebook):
    arguments = tiny(actgen, baseline=True, report_to="notebook", eval_every=1)
    status, _, stderr = in_this_process(actgen, **arguments)
    assert status == 0, stderr
    lines = lines_of(arguments["out"] / "metrics.jsonl")
    assert [told["folder"].name for told in notebook] == ["real-only", "ActGen"]
    for told, title in zip(notebook, ("real only", "ActGen"), strict=True):
        expected = {line["epoch"]: line for line in lines if line["classifier"] == title}
        assert set(told["lines"]) == {1, 2} and told["finished"]
        for epoch, values in told["lines"].items():
            assert {"loss", "accuracy", "test", "val"} <= set(values)
            assert values == {k: v for k, v in expected[epoch].items() if isinstance(v, int | float)}
        assert told["config"]["epochs"] == 2 and told["config"]["dataset"] == "folder"
        assert all(isinstance(value, int | float | str) for value in told["config"].values())
    status, stdout, _ = in_this_process(actgen, **arguments | {"report_to": "none"})
    assert status == 0 and "is finished" in stdout  # it may change when a run goes on


def test_a_tracker_whose_package_is_missing_or_unknown_is_one_line(tiny, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    for name in ("tensorboard", "wandb"):
        line = the_error(in_this_process(actgen, **tiny(actgen, report_to=name)))
        assert f"--report_to {name} needs a package; pip install {name}" in line
    line = the_error(in_this_process(actgen, **tiny(actgen, report_to="diary")))
    assert "unknown --report_to 'diary'; choose one of: none, " in line and "tensorboard, wandb" in line
    assert not tiny(actgen)["out"].exists()


# --- what a run says


@pytest.mark.parametrize(
    "script, parts",
    [
        (actgen, ["generating, 2 images", "real only, 2 epochs, about 3 steps", "ActGen, 2 epochs, about"]),
        (dreamda, ["generating, 6 images"] + [f"{t}, 1 epochs" for t in ("seed labels", "AMST")]),
        (
            diagen,
            ["learning tokens, 2 tokens, 1 steps each", "da_fusion images, 12 images"]
            + ["synthetic images, 12 images", "DIAGen, 1 epochs, 2 steps"],
        ),
    ],
    ids=[script.__name__ for script in SCRIPTS],
)
def test_a_run_says_what_it_will_do_and_does_it(script, parts, with_baselines):
    arguments, (_, stdout, stderr) = with_baselines(script)
    plan = next(line for line in stdout.splitlines() if line.startswith(f"{arguments['out']}: "))
    assert all(part in plan for part in parts), plan
    lines = lines_of(arguments["out"] / "metrics.jsonl")
    done = {line["classifier"]: line["epoch"] for line in lines}
    drawn = {"generating": "synthetic", "synthetic images": "synthetic", "da_fusion images": "da_fusion"}
    for title, folder in drawn.items():
        if title in plan:
            done[title] = len([*arguments["out"].glob(f"{folder}/*/*.png")])
    seconds = json.loads((arguments["out"] / "seconds.json").read_text(encoding="utf-8"))
    for title, count in done.items():
        assert f"{title}, {count} " in plan
    assert {part.split(", ")[0] for part in plan.partition(": ")[2].split("; ")} == set(seconds)
    assert "whole run: 00:00 left" in stderr


def test_the_time_that_is_left_counts_all_parts(tmp_path):
    args = SimpleNamespace(out=str(tmp_path), overwrite=False)
    run = common.Run(args, common.make_accelerator())
    assert run.left() == ""
    run.begin({"drawing": "100 images", "first": "10 epochs", "second": "20 epochs", "third": "5 epochs"})
    assert run.left() == "whole run: over 00:00 left"
    run.done, run.seconds = {"drawing": 25}, {"drawing": 50.0}
    assert run.left() == "whole run: over 02:30 left"  # 75 images at 2 s; no epoch yet
    run.done, run.seconds = {"drawing": 100, "first": 5}, {"drawing": 200.0, "first": 5.0}
    assert run.left() == "whole run: 00:30 left"  # 5 + 20 + 5 epochs at 1 s
    run.done |= {"first": 10, "second": 10}
    run.seconds |= {"first": 10.0, "second": 30.0}
    assert run.left() == "whole run: 00:40 left"  # 10 epochs at 3 s, 5 at 2 s, the mean of both


def test_the_last_lines_are_a_table_of_both_accuracies_and_the_gain_as_readme_shows_it(capsys):
    readme = re.search(r"```\n(accuracy in %.*?)\n320", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
    rows = {}
    row = r"(\w+), (top-1|class mean) +([\d.]+) +([\d.]+) +([+-][\d.]+)"
    for split, key, *shown in re.findall(row, readme):
        real, method, gain = map(float, shown)
        rounding = 0.3 * (method - real - gain)  # the gain is of accuracies before they were rounded
        rows[split, key] = [(real + rounding) / 100, (method - rounding) / 100]
    keys = {"top1": "top-1", "class_mean": "class mean"}
    result = {
        title: {s: {k: rows[s, shown][place] for k, shown in keys.items()} for s in ("test", "test_ood")}
        | {"synthetic": 320, "training": 10.4, "generation": 4.0}
        for place, title in enumerate(("real only", "ActGen"))
    }
    numbers = re.search(r"real only reads ([\d.]+) % .* ([\d.]+) % .* ([\d.]+)$", readme).groups()
    read, read_test, fid = map(float, numbers)
    judged = {"by": "real only", "read": read / 100, "read_test": read_test / 100, "fid": fid}
    result["ActGen"]["judged"] = judged
    common.report(result, "runs/x")
    table = capsys.readouterr().out
    assert table == f"{readme}\n320 images generated in 8 s, 21 s of training; runs/x\n"
    (real, method), gain = (100 * v for v in rows["test", "top-1"]), table.split("\n")[1].split()[-1]
    assert float(gain) == pytest.approx(method - real, abs=0.06)
    common.report({"real only": result["real only"]}, "runs/x")
    assert "gain" not in capsys.readouterr().out


def test_a_ladder_shows_the_class_mean_beside_top_1(tmp_path, capsys):
    top1 = {"test": {"a": [80.0, 82.0], "b": [90.0, 91.0]}}
    mean = {"test": {"a": [50.0, 54.0], "b": [70.0, 70.0]}}
    common.save_ladder(top1, mean, {}, tmp_path)
    assert json.loads((tmp_path / "ladder.json").read_text("utf-8"))["class_mean"] == mean
    header, _, a, b = (
        line.split(" | ") for line in (tmp_path / "ladder.md").read_text("utf-8").splitlines()[2:]
    )
    assert header == ["| rung", "test", "to the rung before", "class mean |"]
    assert a[1].startswith("81.0 ± ") and a[2:] == ["", "52.0 ± 25.4 |"] and b[2].startswith("+9.5 ± ")
    assert b[3] == "70.0 ± 0.0 |"
