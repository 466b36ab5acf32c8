"""Registered data sets of six and eight images, and command lines of toy runs on it."""

import json
import os
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from formats import make_coco
from toys import CONFIGS, toy_opts

from libra_d2.data.digits import Split, make_digits
from libra_d2.engine import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A registered data set of six images."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    make_digits(Split(num_images=6, seed=5, training=True), folder)
    make_proposals(folder)
    with registered("tiny", folder):
        yield folder


@pytest.fixture
def eight(tmp_path):
    """The folder of a registered data set of eight images, for a test to damage."""
    make_coco(tmp_path)
    with registered("eight", tmp_path):
        yield tmp_path


@contextmanager
def registered(name, folder):
    register_coco_instances(name, {}, f"{folder}/annotations.json", f"{folder}/images")
    try:
        yield
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def make_proposals(folder):
    """Precomputed proposals: boxes near the ground truths, and some anywhere."""
    coco = json.loads((folder / "annotations.json").read_text())
    rng = np.random.default_rng(0)
    proposals = {"ids": [], "boxes": [], "objectness_logits": []}
    for image in coco["images"]:
        own = [a["bbox"] for a in coco["annotations"] if a["image_id"] == image["id"]]
        near = np.repeat(np.float32(own).reshape(-1, 4), 10, axis=0)
        near[:, :2] += rng.normal(0, 3, (len(near), 2))
        far = rng.uniform((0, 0, 10, 10), (100, 100, 110, 110), (60, 4))
        boxes = np.concatenate([near, far])
        boxes[:, 2:] += boxes[:, :2]
        proposals["ids"].append(image["id"])
        proposals["boxes"].append(boxes.astype(np.float32))
        proposals["objectness_logits"].append(rng.normal(size=len(boxes)).astype(np.float32))
    (folder / "proposals.pkl").write_bytes(pickle.dumps(proposals))


def command(config, output, *opts, flags=()):
    """A command line for a toy run on the tiny data set."""
    tiny_data = ("DATASETS.TRAIN", ("tiny",), "DATASETS.TEST", ("tiny",), "OUTPUT_DIR", output)
    proposals = (str(Path(MetadataCatalog.get("tiny").json_file).with_name("proposals.pkl")),)
    for split in ("TRAIN", "TEST"):
        tiny_data += (f"DATASETS.PROPOSAL_FILES_{split}", proposals)
    return ["--config-file", str(CONFIGS / config), *flags, *toy_opts(*tiny_data, *opts)]


def metrics(output):
    lines = (output / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def fails(capsys, argv, match):
    """The run ends with exit status 2 and one sentence that matches."""
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    message = capsys.readouterr().err.strip()
    assert re.search(match, message), message
    assert message.count("\n") == 0 and "Traceback" not in message


def start(argv, *, dataset, launcher=(sys.executable,), program=CONFIGS.parent / "train_net.py"):
    """Runs a program in a process of its own, which does not know the tiny data set."""
    data = ["DATASETS.TRAIN", f"('{dataset}',)", "DATASETS.TEST", "()"]
    return subprocess.run(
        [*launcher, str(program), *argv, *data],
        capture_output=True,
        text=True,
        cwd=CONFIGS.parent,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)},
    )
