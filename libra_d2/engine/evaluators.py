"""detectron2's evaluators, without what pycocotools prints beside them."""

import contextlib
import importlib.util
import io
import logging
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.utils.events import has_event_storage

from libra_d2.checkpoint import is_disk_full

__all__ = ["QuietCOCOEvaluator", "choose_evaluator"]


class _QuietThread(io.TextIOBase):
    """A stream that drops what this thread prints, and hands on what others do."""

    def __init__(self, stream: TextIO):
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.thread else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


class QuietCOCOEvaluator(COCOEvaluator):
    """detectron2's COCO evaluator; of box proposals it tells AR at 300 too (Libra R-CNN, table 3).

    pycocotools prints tables whose numbers detectron2 logs. On a disk that is full there are no
    results while a run trains, and an error else.
    """

    def evaluate(self, img_ids=None):
        try:
            # What is logged is not caught: its handlers hold the real stdout.
            with contextlib.redirect_stdout(_QuietThread(sys.stdout)):
                return super().evaluate(img_ids)
        except OSError as error:
            # In training the other processes, which don't write, go on, and so has this one to.
            if not (is_disk_full(error) and has_event_storage()):
                raise
            logging.getLogger(__name__).warning("this evaluation cannot be written: %s", error)
            return {}

    def _eval_box_proposals(self, predictions):
        super()._eval_box_proposals(predictions)
        if self._do_evaluation:
            stats = _evaluate_box_proposals(predictions, self._coco_api, area="all", limit=300)
            self._results["box_proposals"]["AR@300"] = stats["ar"].item() * 100


_EVALUATORS = {
    "coco": QuietCOCOEvaluator,
    "lvis": LVISEvaluator,
    "pascal_voc": lambda name, output_dir: PascalVOCDetectionEvaluator(name),
}


def choose_evaluator(dataset_name: str) -> Callable[..., DatasetEvaluator]:
    """The class of evaluator that a data set's metadata names.

    Raises:
        ValueError: if it names none, or one whose package is not installed.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _EVALUATORS:
        raise ValueError(
            f"data set '{dataset_name}' has evaluator_type '{kind}' in its metadata; "
            f"there is {', '.join(_EVALUATORS)}"
        )
    if kind == "lvis" and importlib.util.find_spec("lvis") is None:
        raise ValueError(f"data set '{dataset_name}' needs the package lvis: pip install lvis")
    return _EVALUATORS[kind]
