"""Helpers of several test files: tiny runs as a user starts them, kills, what a run leaves, tiny models.

`script` is a script's module.
"""

import atexit
import faulthandler
import functools
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
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import pytest
import scipy.stats
import timm
import torch
import torch._dynamo
import torch.distributed
import torchmetrics.functional.classification
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

import actgen
import common
import diagen
import dreamda
from digits import pretrain, world

# imported once, before the runs in child processes, and left out of every collection of garbage
IMPORTED = accelerate, scipy, timm, torchmetrics, DDIMScheduler, StableDiffusionPipeline
gc.freeze()
atexit.register(gc.unfreeze)
TWO_PROCESSES = "-m torch.distributed.run --standalone --nproc_per_node 2".split()

ACTGEN = dict(epochs=4, images_per_epoch=4, generation_batch_size=2, steps=4, eval_every=4, genval_share=0.5)
ACTGEN |= dict(few_shot=False)
DREAMDA = dict(variations=2, steps=3, generation_batch_size=6, epochs=2, eval_every=2, batch_size=8, heads=2)
DREAMDA |= dict(burn_in=0.0, synthetic_ratio=2.0, unlabelled=0, head_lr=1.0)
DIAGEN = dict(epochs=2, iterations=2, filter_epochs=2, batch_size=4, steps=4, variations=2, inversion_steps=4)
DIAGEN |= dict(inversion_batch_size=2, generation_batch_size=4, prompts_per_class=3, eval_every=1)
DIGITS = {  # a tiny run on digits
    actgen: ACTGEN | dict(examples_per_class=4),
    dreamda: DREAMDA | dict(examples_per_class=1, threshold=0.0),
    diagen: DIAGEN | dict(examples_per_class=1, generation_batch_size=20, inversion_steps=2),
}
OWN = dict(dataset="folder", diffusion=common.DIGITS_SD, classifier="small_cnn", image_size=32, workers=0)
OWN |= dict(augment="crop", lr=1e-3, pretrained=False, examples_per_class=0)
FOLDER = {  # a tiny run on a folder of images; a test adds data_dir and out
    actgen: ACTGEN | OWN | dict(attention_resolution=8, optimizer="adamw", batch_size=4),
    dreamda: DREAMDA | OWN | dict(optimizer="adamw"),
    diagen: DIAGEN | OWN | dict(examples_per_class=4, frozen=False),
}
SCRIPTS = [*DIGITS]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=[script.__name__ for script in SCRIPTS])


def refused(words):
    return pytest.raises(common.UserError, match=words)


def generators(n, key=0):
    return [common.generator(key, i) for i in range(n)]


def held_out(n):
    """Held-out digits: images [n, 3, 32, 32], labels, prompts, true masks [n, 32, 32]."""
    r = world.render_pool(world.pools()["test"], n, seed=5)
    prompts = [f"a photo of a {world.NAMES[y]}" for y in r["labels"]]
    return r["images"].permute(0, 3, 1, 2).float() / 255, r["labels"], prompts, r["masks"]


def command_line(words, arguments):
    return [str(word) for name, value in arguments.items() for word in (f"--{name}", value)] + list(words)


def in_own_process(script, *words, launcher=(), **arguments):
    """(status, stdout, stderr) of the script with these arguments; launcher: nothing or TWO_PROCESSES."""
    command = [sys.executable, *launcher, script.__file__, *command_line(words, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def in_this_process(script, *words, pictures=False, **arguments):
    """The same without paying for imports again, and for pictures only if asked to."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        patch.setattr(sys, "argv", [Path(script.__file__).name, *command_line(words, arguments)])
        patch.setitem(sys.modules, "__main__", script)
        if not pictures:  # which matplotlib draws
            patch.setattr(common, "save_curves", lambda *_: None)
        try:
            status = common.main(script.METHOD) or 0
        except SystemExit as stop:
            status = stop.code
    gc.collect()  # a run folder stays locked while an exception's frames live
    return status, out.getvalue(), err.getvalue()


def the_error(outcome):
    """The one line that a mistake ends with."""
    status, _, stderr = outcome
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and re.match(r"\w+\.py: error: ", lines[0]), stderr
    assert stderr.rstrip().endswith(lines[0]) and "Traceback" not in stderr and "usage:" not in stderr, stderr
    return lines[0]


def started(script, *words, run=lambda args: {"real only": {"test": {"top1": 0.5}}}):
    """Arguments of the run that a command line starts, or None, and the outcome; run: args -> a result."""
    got = [None]

    def run_once(method, args, accelerator):
        got[0] = args
        return run(args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run_once", run_once)
        outcome = in_this_process(script, *words)
    return got[0], outcome


def start_child(function) -> int:
    """The id of a forked process that calls function(), one thread, two minutes at most."""
    if (pid := os.fork()) == 0:
        faulthandler.dump_traceback_later(120, exit=True, file=2)
        tqdm.set_lock(threading.RLock())  # its own is shared by processes: a kill could leave it locked
        torch.set_num_threads(1)
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return pid


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(function) -> int:
    """The exit status of function() in a forked process, which may die at any moment."""
    return exit_status(start_child(function))


def in_two_children(function, kill=lambda: False) -> list[int]:
    """The exit statuses of two forked processes that call function() as the two of one run.

    kill(): whether it is time to kill them
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common_to_both = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    common_to_both |= {"TORCHELASTIC_USE_AGENT_STORE": True}

    def one_of_two(rank):
        names = common_to_both | {"RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in names.items()})
        AcceleratorState._reset_state(reset_partial_state=True)
        function()
        assert AcceleratorState().num_processes == 2

    pids, statuses = [start_child(functools.partial(one_of_two, rank)) for rank in range(2)], {}
    while len(statuses) < 2:
        time.sleep(0.02)
        for pid in set(pids) - set(statuses):
            if kill():
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
    return [statuses[pid] for pid in pids]


def die_at(module, name, n):
    """The n-th call of module.name ends the process; of torch.save after half of the bytes."""
    function, calls = getattr(module, name), itertools.count(1)

    @functools.wraps(function)  # common.options reads its arguments
    def dying(*args, **kwargs):
        if next(calls) < n:
            return function(*args, **kwargs)
        if module is torch:
            function(args[0], buffer := io.BytesIO())
            args[1].write(buffer.getvalue()[: buffer.tell() // 2])
            args[1].flush()
        os._exit(9)

    setattr(module, name, dying)


def lines_of(path):
    """The records of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_imagefolder(folder, records):
    """Both loaders of image folders read `folder`: torchvision's, and Hugging Face's with the metadata."""
    import datasets
    import torchvision

    images = torchvision.datasets.ImageFolder(folder)
    assert {str(folder / r["file_name"]) for r in records} == {path for path, _ in images.samples}
    places = dict(data_dir=str(folder), cache_dir=str(folder.parent / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        read = datasets.load_dataset("imagefolder", split="train", **places)
    assert [{k: v for k, v in row.items() if k != "image"} for row in read] == [
        {k: v for k, v in r.items() if k != "file_name"} for r in records
    ]
    for row, r in zip(read, records, strict=True):
        with Image.open(folder / r["file_name"]) as image:
            assert row["image"].tobytes() == image.tobytes()


def read_json(path):
    return json.loads(path.read_text())


def metrics_of(out) -> dict[str, list[dict]]:
    """The lines of metrics.jsonl of each classifier."""
    lines = {}
    for line in lines_of(out / "metrics.jsonl"):
        lines.setdefault(line["classifier"], []).append(line)
    return lines


def result_and_files(out):
    """Everything that a run leaves, but for the seconds: its result, log, and the bytes of its files."""
    timed = ("generation", "training", "seconds")
    values = [*read_json(out / "result.json").items(), *enumerate(lines_of(out / "metrics.jsonl"))]
    result = {key: {k: v for k, v in value.items() if k not in timed} for key, value in values}
    patterns = (
        "synthetic/**/*.* samples/* plans/* latents/* votes/* embeddings/*/* [!m]*.jsonl *.csv **/*.tmp"
    )
    files = [file for pattern in patterns.split() for file in out.glob(pattern)]
    return result, {str(file.relative_to(out)): file.read_bytes() for file in files}


def grey_levels(folder, other):
    """The largest difference of a pixel, of 255, over the images of two runs; their names must be equal."""
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("synthetic/*/*.png"))
    assert names == sorted(str(path.relative_to(other)) for path in other.glob("synthetic/*/*.png")) != []
    pairs = ([np.asarray(Image.open(run / name), int) for run in (folder, other)] for name in names)
    return max(abs(a - b).max() for a, b in pairs)


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


def empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def stripes(count, seed):
    """Noisy stripes, 16 x 16 pixels, in one of four directions, the class; colour, width and phase vary.

    Easy enough for a small classifier to learn in seconds. Returns PIL images and labels.
    """
    rng, (v, u) = np.random.default_rng(seed), np.mgrid[:16, :16]
    labels, images = rng.permutation(np.arange(count) % 4), []
    for y in labels:
        angle = y * np.pi / 4
        wave = np.sin((u * np.cos(angle) + v * np.sin(angle)) * rng.uniform(1, 1.6) + rng.uniform(0, 7))
        image = 0.5 + 0.4 * wave[..., None] * rng.uniform(0.3, 1, 3) + rng.normal(0, 0.15, (16, 16, 3))
        images.append(Image.fromarray((255 * image.clip(0, 1)).astype(np.uint8)))
    return images, labels.tolist()


def stable_diffusion(version, device="cpu", thin=False):
    """Stable Diffusion 1.5's or 2.1's architecture, random weights, in bf16; thin: few channels, in fp32."""
    width, heads, layers, act = (768, 12, 12, "quick_gelu") if version == "1.5" else (1024, 16, 23, "gelu")
    text = dict(vocab_size=49408, hidden_size=width, intermediate_size=4 * width, hidden_act=act)
    text |= dict(num_hidden_layers=layers, num_attention_heads=heads)
    unet = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=width)
    unet |= dict(attention_head_dim=8 if version == "1.5" else (5, 10, 20, 20))
    unet |= dict(use_linear_projection=version != "1.5")
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = dict(sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    if thin:
        text |= dict(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        few = dict(block_out_channels=(8, 16, 16, 16), norm_num_groups=8)
        unet |= dict(sample_size=32, attention_head_dim=(1, 2, 4, 4), cross_attention_dim=32, **few)
        vae |= dict(sample_size=256, **few)
    with torch.device(device):
        parts = [diffusers.AutoencoderKL(**vae, **blocks), CLIPTextModel(CLIPTextConfig(**text))]
        parts = [*parts, diffusers.UNet2DConditionModel(**unet)]
    dtype = torch.float32 if thin else torch.bfloat16
    vae, text, unet = (part.to(dtype).eval().requires_grad_(False) for part in parts)
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    parts = dict(vae=vae, text_encoder=text, unet=unet, safety_checker=None, feature_extractor=None)
    parts |= dict(tokenizer=pretrain.build_tokenizer(["a", "photo", "of", *world.NAMES], max_length=77))
    parts |= dict(scheduler=diffusers.DDPMScheduler(clip_sample=False, **noise))
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_clip(folder, names):
    """A CLIP model with random weights, saved in a folder, and its tokenizer, which knows `names`."""
    layers = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32)
    tokenizer = pretrain.build_tokenizer(["a", "photo", "of", *names.split()])
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    text = dict(**layers, **ids, vocab_size=len(tokenizer), max_position_embeddings=16)
    vision = dict(**layers, image_size=32, patch_size=8)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return clip, tokenizer
