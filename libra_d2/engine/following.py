"""What shows how a run goes: its best checkpoint, when to stop, and pictures in TensorBoard."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.engine import HookBase, hooks
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils import comm
from torch import Tensor, nn

from libra_d2.config import suggest
from libra_d2.drawing import draw, draw_groups, make_sheet, shrink
from libra_d2.metrics import is_loss, read_metrics, split_score

from .stopping import FinishedEarly
from .weights import WeightsCheckpointer

__all__ = ["BestModel", "SampledRois", "check_best_metric", "input_picture", "show_predictions"]

_SHOWN_SCORE = 0.5
_LONGEST = 480  # pixels of an image on a sheet
# Negatives, by the IoU with the nearest ground truth.
_BINS = ((0.1, (255, 235, 59)), (0.3, (255, 152, 0)), (1.0, (244, 67, 54)))
_POSITIVE, _TRUTH = (76, 175, 80), (255, 255, 255)
# What detectron2's evaluators measure.
_METRIC = re.compile(r"AP(50|75|[smlrcf]|-.+)?|AR[sml]?@\d+")


def check_best_metric(cfg: CfgNode) -> None:
    """Checks that ``TEST.BEST_METRIC``, if it is one of detectron2's or ours, will be measured.

    Raises:
        ValueError: naming what is missing, or what would be right.
    """
    name, tests = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if not name:
        return
    if not tests:
        raise ValueError(f"TEST.BEST_METRIC {name} needs test data: DATASETS.TEST, or --val")
    test = next((test for test in tests if name.startswith(f"{test}/")), "")
    metric = name.removeprefix(f"{test}/")
    score = split_score(metric)
    if metric.startswith("validation/"):
        if not cfg.TEST.LOSSES:
            raise ValueError(f"TEST.BEST_METRIC {name} needs TEST.LOSSES True")
    elif not score or score[0] or not _METRIC.fullmatch(score[2]):
        near = suggest(metric, ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50", "keypoints/AP"))
        if not score and not near:
            return  # of an evaluator that nobody knows here
        raise ValueError(f"TEST.BEST_METRIC '{name}' is not measured{near}")
    if len(tests) > 1 and not test:
        right = f"of one of the test sets, such as {tests[0]}/{metric}"
        raise ValueError(f"TEST.BEST_METRIC must be {right}, got '{name}'")
    if len(tests) == 1 and test:
        raise ValueError(f"TEST.BEST_METRIC must be {metric}, of the one test set, got '{name}'")


class BestModel(hooks.BestCheckpointer):
    """Keeps ``model_best.pth``; ends the run when the metric no longer improves.

    Unlike its parent it knows the best of what it resumes, from ``metrics.json``, and leaves
    ``last_checkpoint`` alone.

    Args:
        period: of evaluations.
        checkpointer: of the run.
        metric: its name in ``metrics.json``; of a loss the lowest is best.
        patience: after how many evaluations without a better one the run ends; 0 for never.
    """

    def __init__(
        self, period: int, checkpointer: WeightsCheckpointer, metric: str, patience: int = 0
    ):
        super().__init__(period, _Beside(checkpointer), metric, "min" if is_loss(metric) else "max")
        self.patience = patience
        self.since_best = 0

    def before_train(self) -> None:
        """Takes up what the run has measured before."""
        folder = Path(self.trainer.cfg.OUTPUT_DIR)
        is_there = all((folder / n).is_file() for n in ("metrics.json", f"{self._file_prefix}.pth"))
        if self.trainer.start_iter > 0 and comm.is_main_process() and is_there:
            for record in read_metrics(folder / "metrics.json"):
                if self._val_metric in record:
                    self._count(record[self._val_metric], record["iteration"])
        # Where it is over, no step was made that after_train would evaluate.
        self.trainer.iter -= 1
        self._stop_if_over()
        self.trainer.iter += 1

    def after_step(self) -> None:
        following = self.trainer.iter + 1
        if following % self._period == 0 and following != self.trainer.max_iter:
            self._look()
            self._stop_if_over()

    def after_train(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._look()

    def _look(self) -> None:
        if not comm.is_main_process():
            return
        latest = self.trainer.storage.latest()
        if self._val_metric not in latest or latest[self._val_metric][1] != self.trainer.iter:
            numbers = [n for n in latest if split_score(n) or n.endswith("total_loss")]
            self._logger.warning(
                "TEST.BEST_METRIC '%s' was not measured%s; there is %s",
                *(self._val_metric, suggest(self._val_metric, numbers), ", ".join(sorted(numbers))),
            )
            return
        value, former = latest[self._val_metric][0], (self.best_metric, self.best_iter)
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)  # the last that is finished
        self._count(value, iteration)
        if self.best_iter != former[1]:
            if not self._checkpointer.save(self._file_prefix, iteration=iteration):
                self.best_metric, self.best_iter = former
                return
            self._logger.info("best %s so far: %.5g", self._val_metric, value)

    def _count(self, value: float, iteration: int) -> None:
        is_better = self.best_metric is None or self._compare(value, self.best_metric)
        if is_better and self._update_best(value, iteration):
            self.since_best = 0
        elif self.best_metric is not None:  # before, nothing is found, and AP is no number
            self.since_best += 1

    def _stop_if_over(self) -> None:
        is_over = 0 < self.patience <= self.since_best
        best = (self.best_metric, self.best_iter)
        is_over, (value, iteration) = comm.all_gather((is_over, best))[0]  # who has the numbers
        if is_over:
            raise FinishedEarly(
                f"{self._val_metric} has not improved for {self.patience} evaluations; the best, "
                f"{value:.5g}, was after iteration {iteration} (model_best.pth)"
            )


class _Beside:
    """Saves without a note that this is the last checkpoint; what fails does not end a run."""

    def __init__(self, checkpointer: WeightsCheckpointer):
        self.checkpointer = checkpointer

    def save(self, name: str, **extra: Any) -> bool:
        try:
            self.checkpointer.save(name, is_last=False, **extra)
        except ValueError as error:
            logging.getLogger(__name__).warning("%s", error)
            return False
        return True


class SampledRois(HookBase):
    """Puts the proposals that a step was trained on into TensorBoard, on their image.

    Positives are green; negatives yellow, orange or red, the larger their IoU with the nearest
    ground truth; ground truths white.

    Args:
        period: iterations between two pictures.
    """

    def __init__(self, period: int):
        self.period = period

    def before_step(self) -> None:
        model = self.trainer.checkpointer.model
        if (self.trainer.iter + 1) % self.period == 0 and comm.is_main_process():
            self._watching = (
                model.register_forward_pre_hook(self._keep_inputs),
                model.roi_heads.register_forward_hook(self._show),
            )

    def _keep_inputs(self, model: nn.Module, inputs: tuple[list[dict]]) -> None:
        self._image = inputs[0][0]

    def _show(self, heads: nn.Module, inputs: tuple, outputs: tuple) -> None:
        """Of the first image; heads give the sampled proposals with their losses."""
        for handle in self._watching:  # tests have nothing to show
            handle.remove()
        if not outputs[0] or not outputs[0][0].has("gt_classes"):  # as C4 heads, which keep theirs
            return
        sampled, truths = outputs[0][0].to("cpu"), self._image["instances"].to("cpu").gt_boxes
        is_positive = sampled.gt_classes < heads.num_classes
        ious = torch.zeros(len(sampled))
        if len(truths):
            ious = pairwise_iou(sampled.proposal_boxes, truths).amax(dim=1)
        around = truths.tensor + torch.tensor([-2, -2, 2, 2])  # those that are sampled hide them
        groups = [(f"{len(truths)} ground truths", _TRUTH, around.numpy())]
        boxes, lowest = sampled.proposal_boxes.tensor, 0.0
        for highest, color in _BINS:
            chosen = ~is_positive & (ious >= lowest) & (ious <= highest)
            name = f"{int(chosen.sum())} negatives of IoU {lowest:g} to {highest:g}"
            groups.append((name, color, boxes[chosen].numpy()))
            lowest = np.nextafter(highest, 2.0)
        name = f"{int(is_positive.sum())} positives"
        groups.append((name, _POSITIVE, boxes[is_positive].numpy()))
        picture = draw_groups(input_picture(self._image, self.trainer.cfg.INPUT.FORMAT), groups)
        self.trainer.storage.put_image("sampled_rois", _as_image(picture))


@torch.no_grad()
def show_predictions(
    cfg: CfgNode,
    model: Callable[[list[dict]], list[dict]],
    batches: Any,
    put_image: Callable[[str, Tensor], None],
) -> None:
    """Puts a sheet of ``TEST.NUM_SHOWN`` images with what the model finds into TensorBoard.

    Args:
        cfg: the run's config.
        model: in evaluation mode.
        batches: of the first of ``DATASETS.TEST``.
        put_image: the storage's.
    """
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes", ())
    tiles = []
    for batch in batches:
        for record, output in zip(batch, model(batch), strict=True):
            found = output.get("instances")
            if found is None or "file_name" not in record:
                return  # a model of proposals, or data of one's own
            image = read_image(record["file_name"], "RGB")
            tiles.append([shrink(_drawn(image, found.to("cpu"), names), _LONGEST)])
        if len(tiles) >= cfg.TEST.NUM_SHOWN:
            break
    if tiles:
        sheet = make_sheet(tiles[: cfg.TEST.NUM_SHOWN], columns=4)
        put_image("predictions", _as_image(sheet))


def _drawn(image: np.ndarray, found: Instances, names: list[str]) -> np.ndarray:
    found = found[found.scores >= _SHOWN_SCORE]
    classes = found.pred_classes.tolist()
    labels = [
        f"{names[c] if names else c} {score:.0%}"
        for c, score in zip(classes, found.scores.tolist(), strict=True)
    ]
    masks = found.pred_masks.numpy() if found.has("pred_masks") else None
    return draw(image, found.pred_boxes.tensor.numpy(), classes, labels, masks)


def input_picture(record: dict, format: str) -> np.ndarray:
    """What a model gets for an image, (H, W, 3) uint8, RGB.

    Args:
        record: with ``image``, (C, H, W).
        format: ``INPUT.FORMAT``.
    """
    pixels = record["image"].cpu().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(convert_image_to_rgb(pixels, format), dtype=np.uint8)


def _as_image(picture: np.ndarray) -> Tensor:
    """As TensorBoard takes it: (3, H, W)."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)
