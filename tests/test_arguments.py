"""Arguments and machines: ranges of numbers, other systems, what README says, classifiers used again."""

import ast
import dataclasses
import importlib
import io
import itertools
import json
import math
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import HfArgumentParser

import actgen
import common
import diagen
import dreamda
from runs import in_this_process, the_error

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
    kinds = {field.name: str(field.type) for field in dataclasses.fields(script.Args)}
    return {n: ("int" in k, "list" in k) for n, k in kinds.items() if "int" in k or "float" in k}


@pytest.fixture
def tiny(tmp_path):
    """tiny(script): the arguments of a tiny run on a folder of two classes, three images in each split."""
    rng = np.random.default_rng(0)
    for split, name, i in itertools.product(("train", "val", "test"), ("cat", "dog"), range(3)):
        file = tmp_path / "data" / split / name / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    folder = dict(dataset="folder", data_dir=tmp_path / "data", baseline=False)
    small = dict(diffusion=common.DIGITS_SD, classifier="small_cnn", pretrained=False, image_size=32)
    small |= dict(frozen=False)
    more = dict(augment="crop", workers=0, examples_per_class=3, attention_resolution=8)

    def arguments(script, **changes):
        known = folder | dict(out=tmp_path / script.__name__) | small | more | TINY[script] | changes
        return {k: v for k, v in known.items() if k in {f.name for f in dataclasses.fields(script.Args)}}

    return arguments


# ----------------------------------------------------------------------------------------------------------
# The ranges of numbers

REFUSED = """lr 0 1e9; head_lr 0; warmup 1 7; guidance_scale 1e9; image_size 0 1 100000000; label_smoothing 1
epochs 0; style 1.5; batch_size 0 1; generation_batch_size 0; steps 0; seed 18446744073709551616; seeds 0
eval_every 0; variations 0; images_per_epoch 0; genval_share 0 1 2; attention_resolution 0; strength 0 1.01
heads 0 1; auxiliary_lr 0; threshold 7; burn_in 1.1; synthetic_ratio 0; inversion_lr 0 1e9; inversion_steps 0
inversion_batch_size 0; synthetic_probability 1.1; iterations 0; filter_epochs 0; vectors 0; eta 2
prompts_per_class 0"""
# values that no run can mean, beside those that no number takes
REFUSED = {name: values for name, *values in map(str.split, re.split("[;\n]", REFUSED))}


def started(script, *words) -> dict | str:
    """The arguments with which the command line starts a run, or the one line that it ends with."""
    got = []

    def run_once(_, args, accelerator):
        got.append(vars(args))
        return {"real": {"test": {"top1": 0.5}}}

    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        patch.setitem(sys.modules, "__main__", script)
        patch.setattr(common, "run_once", run_once)
        try:
            common.main(script.METHOD)
        except SystemExit as stop:
            return the_error((stop.code, "", err.getvalue()))
    return got[0]


@each_script
def test_nonsense_is_refused_with_the_argument_its_value_and_its_range(script):
    for name, (whole, _) in numbers(script).items():
        values = [*REFUSED.get(name, []), "-1", *([str(10**20)] if whole else ["nan", "inf", "-inf"])]
        # with a single epoch ActGen would draw no image
        for value in values + ["1"] * (script is actgen and name == "epochs"):
            with pytest.raises(common.UserError) as error:
                script.METHOD.arguments(**{name: (int if whole else float)(value)})
            said = re.fullmatch(rf"--{name} \[?(\S+?)\]? must lie in [\[(].+, .+[\])]", str(error.value))
            assert said and str(float(said[1])) == str(float(value)), error.value
    assert set(REFUSED) <= {name for script in SCRIPTS for name in numbers(script)}


def test_a_range_holds_for_each_number_of_a_list():
    assert started(diagen, "--strength", "0.2", "0.4")["strength"] == [0.2, 0.4]
    for wrong in ("nan", "1.5"):
        assert re.search(r"--strength .*must lie in \(0, 1\]", started(diagen, "--strength", "0.2", wrong))


@pytest.mark.parametrize(
    "words, said",
    [
        ("--learning_rate 1", "unrecognized arguments: --learning_rate 1"),
        ("--epochs 1e3", "--epochs: invalid int value: '1e3'"),
        ("--optimizer lion", "--optimizer: invalid choice: 'lion'"),
        ("--dataset cats", "--dataset cats is none of: digits, cifar10, "),
        ("--prompt a", "--prompt 'a' must have one {} for the class name"),
        ("--prompt {}{}", "--prompt '{}{}' must have one {} for the class name"),
    ],
)
@each_script
def test_an_unknown_argument_or_value_ends_in_one_line(script, words, said):
    assert said in started(script, *words.split())


def test_every_recipe_is_whole_and_within_the_ranges():
    for script, name in itertools.product(SCRIPTS, common.DATASETS):
        classifiers = [key.split("/")[1] for key in script.METHOD.recipes if key.startswith(f"{name}/")]
        for chosen in [{}, *({"classifier": classifier} for classifier in classifiers)]:
            args = script.METHOD.arguments(dataset=name, **chosen)
            assert not [n for n in numbers(script) if getattr(args, n) is None and n not in ("style", "eta")]
            assert args.diffusion and args.lr > 0


WHOLE = st.one_of(st.integers(-3, 20), st.integers(), st.sampled_from([2**31, 2**63, 10**30, -(2**63)]))
ENDS = st.sampled_from([0.0, 1.0, 1e-320, 1e308, math.inf, math.nan])
REAL = st.one_of(st.floats(), st.floats(-2, 2), ENDS)
TEXT = st.one_of(WHOLE.map(str), REAL.map(repr), st.sampled_from(["", "1e3", "0x10", "½", "1_0", "-"]))


@each_script
@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(data=st.data())
def test_any_numbers_start_a_run_or_end_in_one_line(script, data):
    fields, words = numbers(script), []
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True)):
        value = st.one_of(WHOLE.map(str) if fields[name][0] else REAL.map(repr), TEXT)
        several = data.draw(st.lists(value, min_size=1, max_size=3 if fields[name][1] else 1))
        words += [f"--{name}={several[0]}", *several[1:]]
    found = started(script, *words)
    for name in fields if isinstance(found, dict) else ():
        values = found[name] if isinstance(found[name], list) else [found[name]]
        fits = (v is None or (math.isfinite(v) and 0 <= v <= 2**32) for v in values)
        assert all(fits), (name, values)


EXTREMES = [  # legal, but at an end of their ranges
    (actgen, dict(guidance_scale=100, nu=1000, rho=0, gradient_steps=10000, guidance_centre=1000)),
    (actgen, dict(lr=100, weight_decay=1, warmup=0.999999, genval_share=0.7)),
    (actgen, dict(image_size=8, batch_size=2, steps=1, guidance_scale=0, seed=4294967295, lr=1e-300)),
    (dreamda, dict(noise_scale=1000, guidance_scale=100, strength=1, eta=0, paths=10000)),
    (dreamda, dict(lr=100, threshold=0, heads=2, auxiliary_weight=1000, consistency_weight=1000)),
    (dreamda, dict(strength=1e-300)),
    (diagen, dict(sigmas=100, guidance_scale=100, inversion_lr=1, strength=1, seed=4294967295)),
    (diagen, dict(lr=100, optimizer="sgd", frozen=False, synthetic_probability=1, batch_size=2)),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("script, extreme", EXTREMES, ids=lambda x: getattr(x, "__name__", None))
def test_an_extreme_run_ends_with_a_table_or_in_one_line(script, extreme, tiny):
    outcome = in_this_process(script, **tiny(script, **extreme))
    if outcome[0] == 0:
        assert "accuracy in %" in outcome[1] and "nan" not in outcome[1]
    else:
        assert "--" in the_error(outcome)


# ----------------------------------------------------------------------------------------------------------
# Training by the arguments, and its classifiers used again


@pytest.mark.usefixtures("quick")
@each_script
def test_every_classifier_of_a_run_scores_again_what_the_run_reported(script, tiny):
    # at this rate DIAGen's best epoch is not the last
    more = dict(epochs=4, lr=0.3) if script is diagen else {}
    arguments = tiny(script, baseline=True, examples_per_class=0, **more)
    status, stdout, stderr = in_this_process(script, **arguments)
    assert status == 0, stderr
    assert f"{arguments['out']}: " in stdout and "accuracy in %" in stdout  # what it will do, and did
    data = common.load_data("folder", str(arguments["data_dir"]), 32)
    for title, scores in json.loads((arguments["out"] / "result.json").read_text()).items():
        net, names = common.load_classifier(arguments["out"], title)
        again = common.evaluate(net, data, common.make_accelerator())
        assert names == ["cat", "dog"] and net(torch.rand(2, 3, 32, 32)).shape == (2, 2)
        for split in ("test", "val"):
            assert again[split] == pytest.approx({key: scores[split][key] for key in again[split]}, 1e-4)
    with pytest.raises(common.UserError, match="has no trained classifier 'Other'"):
        common.load_classifier(arguments["out"], "Other")


@pytest.mark.usefixtures("quick")
@each_script
def test_classifiers_are_trained_with_the_label_smoothing_and_the_rates_that_are_asked_for(
    script, tiny, monkeypatch
):
    smoothed, rates, cross_entropy, make = set(), set(), F.cross_entropy, common.make_optimizer

    def spy(logits, y, **options):
        if logits.requires_grad:
            smoothed.add(options.get("label_smoothing", 0.0))
        return cross_entropy(logits, y, **options)

    def made(*args, **options):
        optimizer = make(*args, **options)
        rates.update(group["factor"] for group in optimizer.param_groups)
        return optimizer

    monkeypatch.setattr(F, "cross_entropy", spy)
    monkeypatch.setattr(common, "make_optimizer", made)
    training = dict(real_only=True, label_smoothing=0.25, frozen=False, head_lr=3)
    status, _, stderr = in_this_process(script, **tiny(script, **training))
    assert status == 0 and smoothed == {0.25} and rates == {1.0, 3.0}, stderr


# ----------------------------------------------------------------------------------------------------------
# Other machines


@each_script
def test_a_tilde_is_the_home_folder_in_every_argument(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    texts = ("data_dir", "out", "diffusion", "lora", "clip", "synthetic", "embeddings", "llm")
    known = [k for k in texts if k in {f.name for f in dataclasses.fields(script.Args)}]
    found = started(script, *(f"--{name}=~/my {name}" for name in known))
    assert {name: found[name] for name in known} == {name: str(tmp_path / f"my {name}") for name in known}


def test_documented_commands_have_arguments_that_exist(capsys):
    patterns = "*.md", "digits/**/*.md", "*.py", "digits/**/*.py", "tests/bench.py"
    pages = [path.read_text(encoding="utf-8") for pattern in patterns for path in ROOT.glob(pattern)]
    lines = re.findall(r"python ((?:\w+/)*\w+\.py.*)", "\n".join(pages).replace("\\\n", ""))
    commands = {re.split(r"  +(?=[^ -])|[`#;]", line)[0].replace("[", "").replace("]", "") for line in lines}
    assert len(commands) > 15
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
    for link in [link for link in links if "://" not in link]:
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
            name = ast.unparse(node.func).removeprefix("common")
            binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:2])
            if re.search(r"\w\.(read|write)_text$|^open$", name):
                assert binary or "encoding" in {k.arg for k in node.keywords}, ast.unparse(node)


def test_a_console_that_lacks_letters_is_no_reason_to_stop(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with redirect_stdout(out):
        monkeypatch.setattr(sys, "argv", ["actgen.py"])
        monkeypatch.setitem(sys.modules, "__main__", actgen)
        monkeypatch.setattr(common, "run_once", lambda *_: {"a 犬 ± 1": {"test": {"top1": 0.5}}})
        common.main(actgen.METHOD)
    out.flush()
    assert b"a ? \xb1 1" in out.buffer.getvalue()
