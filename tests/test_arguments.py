"""Arguments and machines: ranges of numbers, other systems, what README says."""

import ast
import dataclasses
import importlib
import io
import itertools
import math
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

import actgen
import common
import diagen
import dreamda
from digits import inside
from runs import FOLDER, SCRIPTS, each_script, in_this_process, refused, started, the_error

ROOT = common.ROOT


def numbers(script):
    """The fields of a script's arguments that hold numbers: name -> whether whole, whether several."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(script.Args)}
    return {n: ("int" in k, "list" in k) for n, k in kinds.items() if "int" in k or "float" in k}


REFUSED = """lr 0 1e9; head_lr 0; warmup 1 7; guidance_scale 1e9; image_size 0 1 100000000; label_smoothing 1
epochs 0; style 1.5; batch_size 0 1; generation_batch_size 0; steps 0; seed 18446744073709551616; seeds 0
eval_every 0; variations 0; images_per_epoch 0; genval_share 0 1 2; attention_resolution 0; strength 0 1.01
heads 0 1; auxiliary_lr 0; threshold 7; burn_in 1.1; synthetic_ratio 0; inversion_lr 0 1e9; inversion_steps 0
inversion_batch_size 0; synthetic_probability 1.1; iterations 0; filter_epochs 0; eta 2
prompts_per_class 0"""
# values that no run can mean, beside those that no number takes
REFUSED = {name: values for name, *values in map(str.split, re.split("[;\n]", REFUSED))}


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
    assert started(diagen, "--strength", "0.2", "0.4")[0].strength == [0.2, 0.4]
    for wrong in ("nan", "1.5"):
        error = the_error(started(diagen, "--strength", "0.2", wrong)[1])
        assert re.search(r"--strength .*must lie in \(0, 1\]", error)


SAID = {
    "--learning_rate 1": "unrecognized arguments: --learning_rate 1",
    "--epochs 1e3": "--epochs: invalid int value: '1e3'",
    "--optimizer lion": "--optimizer: invalid choice: 'lion'",
    "--dataset cats": "--dataset cats is none of: digits, cifar10, ",
    "--prompt a": "--prompt 'a' must have one {} for the class",
    "--prompt {}{}": "--prompt '{}{}' must have one {} for the class",
}


@pytest.mark.parametrize("words", SAID)
@each_script
def test_an_unknown_argument_or_value_ends_in_one_line(script, words):
    assert SAID[words] in the_error(started(script, *words.split())[1])


def test_every_recipe_is_whole_and_within_the_ranges():
    for script, name in itertools.product(SCRIPTS, common.DATASETS):
        classifiers = [key.split("/")[1] for key in script.METHOD.recipes if key.startswith(f"{name}/")]
        for chosen in [{}, *({"classifier": classifier} for classifier in classifiers)]:
            args = script.METHOD.arguments(dataset=name, **chosen)
            assert not [n for n in numbers(script) if getattr(args, n) is None and n not in ("style", "eta")]
            assert args.diffusion and args.lr > 0


NUMBER = st.one_of(st.integers(-3, 20), st.integers(), st.floats(-2, 2), st.floats())
TEXT = st.one_of(NUMBER.map(repr), st.sampled_from(["", "1e3", "0x10", "½", "1_0", "-", "1e-320", "nan"]))


@each_script
@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(data=st.data())
def test_any_numbers_start_a_run_or_end_in_one_line(script, data):
    fields = numbers(script)
    names = data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True))
    args, outcome = started(script, *(f"--{name}={data.draw(TEXT)}" for name in names))
    assert args or the_error(outcome)
    for value in [getattr(args, name) for name in fields] if args else ():
        values = value if isinstance(value, list) else [value]
        assert all(v is None or (math.isfinite(v) and 0 <= v <= 2**32) for v in values), (names, values)


EXTREMES = [  # legal, but at an end of their ranges
    (actgen, dict(guidance_scale=100, nu=1000, rho=0, gradient_steps=10000, guidance_centre=1000)),
    (actgen, dict(lr=100, weight_decay=1, warmup=0.999999, genval_share=0.7)),
    (actgen, dict(image_size=8, batch_size=2, steps=1, guidance_scale=0, seed=4294967295, lr=1e-300)),
    (actgen, dict(epochs=2, images_per_epoch=1)),
    (dreamda, dict(noise_scale=1000, guidance_scale=100, strength=1, eta=0, paths=10000)),
    (dreamda, dict(lr=100, threshold=0, heads=2, auxiliary_weight=1000, consistency_weight=1000)),
    (dreamda, dict(strength=1e-300)),
    (diagen, dict(sigmas=100, guidance_scale=100, inversion_lr=1, strength=1, seed=4294967295)),
    (diagen, dict(lr=100, optimizer="sgd", frozen=False, synthetic_probability=1, batch_size=2)),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("script, extreme", EXTREMES, ids=lambda x: getattr(x, "__name__", None))
def test_an_extreme_run_ends_with_a_table_or_in_one_line(script, extreme, mine):
    outcome = in_this_process(script, "--no_baseline", **FOLDER[script] | mine | extreme)
    if outcome[0] == 0:
        assert "accuracy in %" in outcome[1] and "nan" not in outcome[1]
    else:
        assert "--" in the_error(outcome)


@pytest.mark.usefixtures("quick")
@each_script
def test_real_images_alone_need_no_generator_and_the_smoothing_and_rates_are_those_asked_for(
    script, mine, monkeypatch
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
    training = dict(label_smoothing=0.25, head_lr=3, diffusion="/nowhere/sd")
    status, out, stderr = in_this_process(script, "--real_only", **FOLDER[script] | mine | training)
    assert status == 0 and smoothed == {0.25} and rates == {1.0, 3.0}, stderr
    title = "real only" if script is actgen else "standard augmentation"
    assert f"\n{title} " in out and "\n0 images generated" in out
    with refused("no images that the method drew"):
        inside.draw(mine["out"])


@each_script
def test_a_tilde_is_the_home_folder_in_every_argument(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    texts = ("data_dir", "out", "diffusion", "clip", "synthetic", "embeddings", "llm")
    known = [k for k in texts if k in {f.name for f in dataclasses.fields(script.Args)}]
    args, _ = started(script, *(f"--{name}=~/my {name}" for name in known))
    assert all(getattr(args, name) == str(tmp_path / f"my {name}") for name in known)


def test_documented_commands_have_arguments_that_exist_and_named_tests_exist(capsys):
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
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (added,) = re.findall(r"\| try, with `(.*)` \|", readme)
    for name, words in re.findall(r"^\| `python (\w+)\.py (.*?)` \|", readme, re.M):
        args, _ = started(importlib.import_module(name), *shlex.split(f"{words} {added}"))
        assert (args.out, args.overwrite, args.baseline) == ("runs/try", True, False)
    named = re.findall(r"`(test_\w{9,})`", readme)
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) == 9 and not [name for name in named if f"def {name}(" not in code]


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
