"""Damaged configs, annotations and checkpoints, and runs that are killed.

Each ends in success or in one sentence. FUZZ_RUNS is how many of each kind; `make test-slow` takes
1,000.
"""

import contextlib
import copy
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from formats import make_coco
from toys import CONFIGS, SMALL, toy_config, toy_opts

from libra_d2.config import list_keys
from libra_d2.engine import main

RUNS = int(os.environ.get("FUZZ_RUNS", 5))
LIBRA = "Base-Libra-RCNN-FPN.yaml"
BAD = (0, -1, 1, 7, 0.5, -0.5, 2.0, 1e-30, 1e30, "", "x", "p9", "BN", True, False)
BAD += ((), (0,), (-1, 2), [[]], [[0]], [1, 2, 3], ["x"], ((), ()), {}, None, "nan", "[", "()")
# What has no bad value, or would have other places written to.
LEFT_ALONE = ("OUTPUT_DIR", "VERSION", "MODEL.DEVICE", "SOLVER.MAX_ITER")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    make_coco(folder)
    return folder


def argv(folder, output, *opts, annotations="annotations.json", flags=(), iterations=1):
    toy = toy_opts("SOLVER.MAX_ITER", iterations, *SMALL)
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")
    toy = [o for i, o in enumerate(toy) if toy[i - i % 2] not in classes]
    data = ["--train", f"coco:{folder}/{annotations}:{folder}/images"]
    data += ["--val", f"coco:{folder}/{annotations}:{folder}/images"]
    arguments = ["--config-file", str(CONFIGS / LIBRA), *flags, *data, "--output", str(output)]
    return [*arguments, *toy, *map(str, opts)]


def ends_well(arguments):
    """Runs, and checks that it ends in success or in one sentence."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as exit_:
            message = err.getvalue().strip()
            assert exit_.code in (1, 2), message
            assert message and "Traceback" not in message, message
            return False
    return True


@pytest.mark.parametrize("number", range(RUNS))
def test_configs(number, folder, tmp_path):
    rng = random.Random(number)
    keys = [k for k, v in list_keys(toy_config(LIBRA)) if not isinstance(v, dict)]
    keys = [key for key in keys if key not in LEFT_ALONE]
    opts = [x for _ in range(rng.choice([1, 1, 2])) for x in (rng.choice(keys), rng.choice(BAD))]
    ends_well(argv(folder, tmp_path / "out", *opts))


def places(content):
    """Every place in a json content: the container and its key."""
    found = []
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        found.append((content, key))
        if isinstance(value, (dict, list)):
            found += places(value)
    return found


@pytest.mark.parametrize("number", range(RUNS))
def test_annotations(number, folder, tmp_path):
    rng = random.Random(number)
    content = json.loads((folder / "annotations.json").read_text())
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 3])):
        container, key = rng.choice(places(content))
        if rng.random() < 0.2:
            del container[key]
        else:
            container[key] = rng.choice([*BAD[:15], [], {}, None, "../x.jpg", [1] * 5, 10**12])
    name = f"damaged{number}.json"
    (folder / name).write_text(json.dumps(content))
    try:
        ends_well(argv(folder, tmp_path / "out", annotations=name))
    finally:
        (folder / name).unlink()


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "out"
    main(argv(folder, output, iterations=2))
    return output


@pytest.mark.parametrize("number", range(RUNS))
def test_checkpoints(number, folder, trained, tmp_path):
    """Damaged weights to start from, or a damaged checkpoint to go on from."""
    rng = random.Random(number)
    content = bytearray((trained / "model_final.pth").read_bytes())
    if rng.random() < 0.4:
        content = content[: rng.randrange(len(content))]
    else:
        for _ in range(rng.choice([1, 10, 1000])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    output = tmp_path / "out"
    output.mkdir()
    if rng.random() < 0.5:
        (tmp_path / "w.pth").write_bytes(content)
        ends_well(argv(folder, output, "MODEL.WEIGHTS", tmp_path / "w.pth"))
        return
    (output / "model_0000000.pth").write_bytes(content)
    (output / "last_checkpoint").write_text("model_0000000.pth")
    ends_well(argv(folder, output, flags=["--resume"], iterations=3))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(folder, tmp_path):
    """Twenty kills at random moments; each time it goes on, to the same weights."""
    program = [sys.executable, str(CONFIGS.parent / "train_net.py")]
    opts = ("SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.BASE_LR", 1e-3)

    def start(output, *flags):
        arguments = argv(folder, output, *opts, flags=flags, iterations=400)
        return subprocess.Popen([*program, *arguments], stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    rng, killed = random.Random(0), 0
    while killed < 20:
        process = start(tmp_path / "out", "--resume")
        # Starting takes most of the time: from where it trains on, at any moment.
        begin = time.time()
        log, size = tmp_path / "out" / "log.txt", -1
        while process.poll() is None and time.time() - begin < 120:
            if log.exists() and log.stat().st_size != size and size >= 0:
                break
            size = log.stat().st_size if log.exists() else 0
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 2))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        status = process.wait()
        if status == 0:
            break  # it was faster
        killed += 1
    assert killed >= 5
    assert start(tmp_path / "out", "--resume").wait() == 0
    one, other = (
        torch.load(tmp_path / n / "model_final.pth", weights_only=True)["model"]
        for n in ("whole", "out")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(Path(tmp_path / "out").glob("*.partial"))
