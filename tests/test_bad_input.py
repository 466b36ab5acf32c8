"""Bad input is one sentence, and an output folder keeps its run."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from tiny import command, fails, metrics, start
from toys import BASELINE, LIBRA

from libra_d2.data.checks import check_dataset
from libra_d2.engine import main

pytestmark = pytest.mark.usefixtures("tiny")


class TestOutputFolder:
    def test_a_finished_run_is_not_overwritten_silently(self, tmp_path, capsys):
        main(command(BASELINE, tmp_path, "SOLVER.MAX_ITER", 1))
        before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        fails(capsys, command(BASELINE, tmp_path), "holds a training run; give --resume")
        after = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        assert before == after

    def test_overwrite_replaces_the_run_and_nothing_else(self, tmp_path):
        main(command(BASELINE, tmp_path, "SOLVER.MAX_ITER", 1))
        (tmp_path / "notes.txt").write_text("mine")
        main(command(BASELINE, tmp_path, flags=["--overwrite"]))
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert [r["iteration"] for r in metrics(tmp_path) if "total_loss" in r] == [1]

    def test_overwrite_with_bad_input_loses_nothing(self, tmp_path, capsys):
        main(command(BASELINE, tmp_path, "SOLVER.MAX_ITER", 1))
        before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        final = str(tmp_path / "model_final.pth")
        for opts, match in (
            (("MODEL.WEIGHTS", "nowhere.pth"), "'nowhere.pth' does not exist"),
            (("MODEL.BFP.REFINE_LEVEL", 7), "REFINE_LEVEL must be in"),
            (("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou"), "'iou' does not exist"),
            (("MODEL.WEIGHTS", final), "--overwrite would remove '.*model_final.pth'"),
        ):
            fails(capsys, command(LIBRA, tmp_path, *opts, flags=["--overwrite"]), match)
        argv = ["--config-file", str(tmp_path / "config.yaml"), "--overwrite"]
        fails(capsys, argv, "--overwrite would remove '.*config.yaml'")
        mine = tmp_path / "mine.yaml"
        mine.write_text("_BASE_: config.yaml\n")
        fails(capsys, ["--config-file", str(mine), "--overwrite"], "would remove '.*config.yaml'")
        mine.unlink()
        proposals = tmp_path / "inference" / "box_proposals.pkl"
        shutil.copy(
            Path(MetadataCatalog.get("tiny").json_file).with_name("proposals.pkl"), proposals
        )
        opts = ("DATASETS.PROPOSAL_FILES_TRAIN", (str(proposals),))
        fast = "COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml"
        argv = command(fast, tmp_path, *opts, flags=["--overwrite"])
        fails(capsys, argv, "--overwrite would remove '.*proposals.pkl'")
        proposals.unlink()
        assert before == {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}

    def test_resume_and_overwrite_exclude_each_other(self, tmp_path, capsys):
        flags = ["--resume", "--overwrite"]
        fails(capsys, command(BASELINE, tmp_path, flags=flags), "exclude each other")

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_must_be_a_folder(self, name, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        fails(capsys, command(BASELINE, tmp_path / name), "OUTPUT_DIR must be a folder")

    def test_a_broken_last_checkpoint_leaves_the_run_as_it_is(self, tmp_path, capsys):
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
        (tmp_path / "model_0000001.pth").write_text("broken")
        argv = command(BASELINE, tmp_path, flags=["--resume"])
        fails(capsys, argv, "whose checkpoints are all damaged")
        names = sorted(f.name for f in tmp_path.iterdir())
        assert names == ["last_checkpoint", "model_0000001.pth"]


ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}


def coco(**changes):
    """A COCO annotation file, but for the changes a good one."""
    image = {"id": 1, "file_name": "a.jpg", "height": 9, "width": 9}
    content = {"images": [image], "categories": [{"id": i, "name": str(i)} for i in range(10)]}
    return json.dumps({**content, "annotations": [ANNOTATION], **changes})


class TestBadInput:
    """What is not in the config's own values; tests/test_config.py has those."""

    @pytest.mark.parametrize(
        ("opts", "match"),
        [
            (("MODEL.WEIGHTS", "nowhere.pth"), "MODEL.WEIGHTS 'nowhere.pth' does not exist"),
            (("DATASETS.TRAIN", ("digit_train",)), "'digit_train' is not registered.*digits_train"),
            (("DATASETS.TEST", ("coco_2017_vl",)), "'coco_2017_vl' is not registered"),
            (("DATASETS.TEST", ("coco_2017_val",)), "instances_val2017.json does not exist"),
            (("DATASETS.TEST", ("voc_2007_test",)), "VOC2007 does not exist"),
            (("DATASETS.TRAIN", ()), "DATASETS.TRAIN is empty"),
            (("MODEL.ROI_HEADS.NAME", "LibraROIHead"), "did you mean 'LibraROIHeads'"),
            (("MODEL.META_ARCHITECTURE", "LibraRCNN"), "META_ARCHITECTURE 'LibraRCNN' does not"),
            (("MODEL.WEIGHTS", __file__), "is not a checkpoint of a torch model"),
            (("MODEL.FPN.NORM", "XX"), "no model can be built from this config: KeyError: 'XX'"),
            (("MODEL.KEYPOINT_ON", True), "annotation 1 without keypoints"),
            (("MODEL.ROI_HEADS.NUM_CLASSES", 9), "NUM_CLASSES is 9 but the data have 10 classes"),
            (("MODEL.BFP.REFINE_LEVEL", 7), r"REFINE_LEVEL must be in \[0, 4\]"),
            (("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou_blanced"), "did you mean 'iou_balanced'"),
            (("MODEL.BFP.FPN_BUILDER", "build_fpn"), "FPN_BUILDER 'build_fpn' does not exist"),
            (("MODEL.BFP.REFINE_LEVL", "1"), "no key MODEL.BFP.REFINE_LEVL"),
        ],
    )
    def test_is_one_sentence(self, opts, match, tmp_path, capsys):
        output = tmp_path / "out"
        fails(capsys, command(LIBRA, output, *opts), match)
        assert not output.exists()

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("{", "is not valid json"),
            ("[]", "is not COCO json: expected object"),
            ('{"images": []}', "images: expected array of length >= 1"),
            (coco(categories=[]), "categories: expected array of length >= 1"),
            (coco(annotations=[]), "has no annotations"),
            (coco(images=[{"id": 1, "height": 9, "width": 9}]), "has no file_name of 1"),
            (
                coco(annotations=[{**ANNOTATION, "image_id": 9}]),
                "annotation 1 of the unknown image_id 9",
            ),
            (
                coco(annotations=[{**ANNOTATION, "category_id": 99}]),
                "annotation 1 of the unknown category_id 99",
            ),
            (
                coco(annotations=[{**ANNOTATION, "bbox": [1, 2, 3]}]),
                r"annotations\[0\].bbox: expected array of length 4",
            ),
            (coco(annotations=[ANNOTATION, ANNOTATION]), "two annotations of the same id"),
            (coco(annotations=[{**ANNOTATION, "bbox": [math.nan, 2, 3, 4]}]), "bbox is not finite"),
            (coco(annotations=[{**ANNOTATION, "iscrowd": 2}]), "iscrowd is 2, not 0 or 1"),
            (coco(images=[{"id": "3", "file_name": 5}]), r"images\[0\].* expected str.* got int"),
        ],
    )
    def test_annotations_that_are_not_coco_json(self, content, match, tmp_path, capsys):
        file = tmp_path / "annotations.json"
        file.write_text(content)
        register_coco_instances("broken", {}, str(file), str(tmp_path))
        try:
            argv = command(LIBRA, tmp_path / "out", "DATASETS.TRAIN", ("broken",))
            fails(capsys, argv, f"data set 'broken'.*{match}")
        finally:
            DatasetCatalog.remove("broken")
            MetadataCatalog.remove("broken")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (None, "PROPOSAL_FILES_TRAIN '.*proposals.pkl' does not exist"),
            (b"nonsense", "is not a pickle"),
            (pickle.dumps([1, 2]), "is not a dict of the lists ids, boxes, objectness_logits"),
            (pickle.dumps({"ids": [1], "boxes": []}), "is not a dict of the lists ids, boxes, obj"),
            (
                pickle.dumps({"ids": [1, 2], "boxes": [], "objectness_logits": []}),
                "has 2 and 0 and 0 ids, boxes, objectness_logits",
            ),
            (
                pickle.dumps(
                    {"ids": [1], "boxes": [np.zeros((3, 4))], "objectness_logits": [np.zeros(2)]}
                ),
                r"for image 1, boxes of \(3, 4\) and objectness_logits of \(2,\)",
            ),
            (
                pickle.dumps(
                    {"ids": [2], "boxes": [np.zeros((2, 4))], "objectness_logits": [np.zeros(2)]}
                ),
                "has no proposals for 5 of the 6 images of data set 'tiny', among them 1",
            ),
            (
                pickle.dumps(
                    {
                        "ids": [1],
                        "boxes": [np.full((1, 4), np.nan)],
                        "objectness_logits": [np.ones(1)],
                    }
                ),
                "for image 1, boxes of no finite numbers",
            ),
            (
                pickle.dumps({"ids": [1], "boxes": [[[0, 0, 1, 1]]], "objectness_logits": [[1]]}),
                "for image 1, boxes of no finite numbers",
            ),
            (
                pickle.dumps({"ids": 3, "boxes": [], "objectness_logits": []}),
                "is not a dict of the lists ids, boxes, objectness_logits",
            ),
            (pickle.dumps(os.system), r"holds posix.system, not only lists and numpy arrays"),
        ],
    )
    def test_precomputed_proposals(self, content, match, tmp_path, capsys):
        file = tmp_path / "proposals.pkl"
        if content is not None:
            file.write_bytes(content)
        config = "COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml"
        argv = command(config, tmp_path / "out", "DATASETS.PROPOSAL_FILES_TRAIN", (str(file),))
        fails(capsys, argv, match)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("opts", "match"),
        [
            (("DATASETS.PROPOSAL_FILES_TRAIN", ()), "a file for each of the 1 data sets"),
            (
                ("DATASETS.PROPOSAL_FILES_TRAIN", (1,)),
                "PROPOSAL_FILES_TRAIN must name a file for each",
            ),
            (("MODEL.LOAD_PROPOSALS", False), "PrecomputedProposals needs MODEL.LOAD_PROPOSALS"),
        ],
    )
    def test_precomputed_proposals_that_are_not_named(self, opts, match, tmp_path, capsys):
        config = "COCO-Detection/libra_fast_rcnn_R_50_FPN_1x.yaml"
        fails(capsys, command(config, tmp_path / "out", *opts), match)

    def test_an_object_without_a_mask(self, tmp_path, capsys):
        file = tmp_path / "annotations.json"
        file.write_text(coco(annotations=[{**ANNOTATION, "segmentation": []}]))
        register_coco_instances("maskless", {}, str(file), str(tmp_path))
        try:
            opts = ("MODEL.MASK_ON", True, "DATASETS.TRAIN", ("maskless",))
            argv = command(LIBRA, tmp_path / "out", *opts)
            fails(capsys, argv, "annotation 1 without segmentation")
        finally:
            DatasetCatalog.remove("maskless")
            MetadataCatalog.remove("maskless")

    def test_an_evaluator_that_there_is_not(self, tmp_path, capsys):
        DatasetCatalog.register("odd", list)
        MetadataCatalog.get("odd").evaluator_type = "panoptic"
        try:
            argv = command(LIBRA, tmp_path / "out", "DATASETS.TEST", ("odd",))
            fails(capsys, argv, "evaluator_type 'panoptic'.*coco, lvis, pascal_voc")
        finally:
            DatasetCatalog.remove("odd")
            MetadataCatalog.remove("odd")

    def test_weights_of_another_model(self, tmp_path, capsys):
        torch.save({"model": {"head.weight": torch.zeros(3)}}, tmp_path / "other.pth")
        for flags in ((), ("--eval-only",)):
            argv = command(
                LIBRA, tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "other.pth", flags=flags
            )
            fails(capsys, argv, "has no weights for this model")

    def test_evaluation_without_weights(self, tmp_path, capsys):
        argv = command(LIBRA, tmp_path, flags=["--eval-only"])
        fails(capsys, argv, "MODEL.WEIGHTS is empty; name the checkpoint")

    def test_cpu_processes_and_gpus(self, tmp_path, capsys):
        argv = command(LIBRA, tmp_path, flags=["--num-processes", "2"])
        fails(capsys, argv, "give --num-gpus 0 with it")

    def test_no_config(self, capsys):
        fails(capsys, [], "give a config with --config-file")

    @pytest.mark.skipif(torch.cuda.device_count() > 6, reason="needs fewer GPUs")
    def test_more_gpus_than_there_are(self, tmp_path, capsys):
        argv = command(LIBRA, tmp_path, flags=["--num-gpus", "7"])
        fails(capsys, argv, "7 GPUs are asked for and torch finds")

    def test_a_batch_that_cannot_be_divided(self, tmp_path, capsys):
        flags = ["--num-gpus", "0", "--num-processes", "3"]
        fails(capsys, command(LIBRA, tmp_path, flags=flags), "multiple of the 3 processes, got 2")

    @pytest.mark.parametrize(
        "flags", [(), pytest.param(("--num-processes", "2"), marks=pytest.mark.slow)]
    )
    def test_from_the_shell_it_has_no_traceback(self, flags, tmp_path):
        """In the main process and, for what only building the model tells, in the others."""
        argv = command(
            LIBRA, tmp_path, "MODEL.BFP.REFINE_LEVEL", 7, flags=["--num-gpus", "0", *flags]
        )
        result = start(argv, dataset="digits_val")
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("REFINE_LEVEL must be in") == 1
        assert "Traceback" not in result.stderr


def test_lvis_annotations_pass_the_checks(tmp_path):
    image = {"id": 1, "coco_url": "http://x/train2017/1.jpg", "height": 9, "width": 9}
    annotation = {**ANNOTATION, "area": 12}
    file = tmp_path / "lvis.json"
    content = json.loads(coco(images=[image], annotations=[annotation]))
    file.write_text(json.dumps(content))
    MetadataCatalog.get("tiny_lvis").set(json_file=str(file), evaluator_type="lvis")
    DatasetCatalog.register("tiny_lvis", list)
    try:
        for for_training in (True, False):
            check_dataset(
                "tiny_lvis",
                for_training=for_training,
                num_classes=10,
                num_classes_key="NUM_CLASSES",
            )
    finally:
        DatasetCatalog.remove("tiny_lvis")
        MetadataCatalog.remove("tiny_lvis")
