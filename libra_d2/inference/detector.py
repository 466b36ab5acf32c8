"""Predictions from Python: a trained model in, boxes with class names out."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import AugInput, AugmentationList, ResizeShortestEdge
from detectron2.modeling import build_model
from PIL import Image

from libra_d2 import data, modeling  # noqa: F401  (imported to register)
from libra_d2.config import NUM_CLASSES, choose, get_key, set_key, suggest
from libra_d2.data.images import open_image, to_rgb
from libra_d2.data.resize import with_resize
from libra_d2.engine import load_config
from libra_d2.engine.lazy_config import (
    RunConfig,
    build_lazy_model,
    is_lazy_yaml,
    load_lazy_config,
)
from libra_d2.engine.plain_errors import plain_errors
from libra_d2.engine.weights import (
    WeightsCheckpointer,
    check_weights,
    class_names_of,
    find_checkpoint,
)
from libra_d2.modeling.half import compute_in
from libra_d2.modeling.roi_align import ROI_ALIGNS, use_roi_align

from .result import Result

__all__ = ["Detector"]

_NO_CLASSES = "a ProposalNetwork proposes boxes without classes; nothing to detect with"
_MOST_ELONGATED = 100  # beyond, a side vanishes when images are resized
# Anything that is an image; numpy arrays are (H, W, 3) or (H, W), tensors (3, H, W).
_WHAT = "an image must be a path, a PIL image, an array or a tensor"
ImageLike = str | Path | Image.Image | np.ndarray | torch.Tensor


class Detector:
    """A trained detector.

    .. code-block:: python

        detector = Detector("output/mine")
        result = detector("a.jpg")
        print(result.class_names, result.boxes)

    Args:
        path: a run's folder; a file of weights whose config lies beside it, as config.yaml or
            under its own name as .yaml; or a config file that names weights, where a LazyConfig
            is code that is run.
        threshold: the lowest score of what is found, in [0, 1].
        classes: names of the classes to look for; empty for all.
        device: "cuda", "cpu", ...; None for a GPU where there is one.
        batch_size: how many images go through the model at once, if they are of one size once
            resized: what is found in an image does not depend on the others.
        half: whether the networks compute in half precision, bfloat16 on a CPU and float16 on
            others: faster where the machine has instructions for it; scores change a little.
        opts: overrides of the config, KEY VALUE KEY VALUE ..., or PLACE=VALUE ... of a LazyConfig.

    Raises:
        ValueError: if there is no config or no weights, or an argument is wrong.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threshold: float = 0.5,
        classes: Sequence[str] = (),
        device: str | None = None,
        batch_size: int = 1,
        half: bool = False,
        opts: Sequence[str] = (),
    ):
        if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        if not isinstance(path, (str, Path)):
            raise ValueError(f"path must be a run's folder, weights or a config, got {path!r}")
        device = None if device is None else str(device)
        classes = [classes] if isinstance(classes, str) else list(classes or ())
        self.batch_size, self.threshold = batch_size, threshold
        self.cfg, weights = _find(Path(path), threshold, device, opts)
        is_lazy = isinstance(self.cfg, RunConfig)
        with plain_errors(self.cfg):
            self.model = (build_lazy_model if is_lazy else build_model)(self.cfg).eval()
        check_weights(weights, self.model, "the file of weights")
        WeightsCheckpointer(self.model).load(weights)
        use_roi_align(self.model, choose("MODEL.ROI_ALIGN", self.cfg, ROI_ALIGNS))
        if half:
            on_cpu = torch.device(self.cfg.MODEL.DEVICE).type == "cpu"
            self.model = compute_in(torch.bfloat16 if on_cpu else torch.float16, self.model)
        self.names = _class_names(self.cfg, weights)
        for name in classes:
            if name not in self.names:
                raise ValueError(
                    f"there is no class '{name}'{suggest(name, self.names)}; there is "
                    f"{', '.join(self.names)}"
                )
        self._wanted = [self.names.index(name) for name in classes]
        if is_lazy:
            mapper = self.cfg.lazy.dataloader.test.mapper
            augmentations = instantiate(mapper.augmentations)
        else:
            inputs = self.cfg.INPUT
            augmentations = [ResizeShortestEdge(inputs.MIN_SIZE_TEST, inputs.MAX_SIZE_TEST)]
        self.augmentations = with_resize(augmentations, self.cfg)

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], *, channels: str = "RGB"
    ) -> Result | list[Result]:
        """What is found in one image, or a list of it for several.

        Args:
            images: paths, PIL images, arrays (H, W, 3) or (H, W), or tensors (3, H, W); of uint8,
                or floats in [0, 1].
            channels: the order of an array's or tensor's channels, "RGB" or "BGR" (OpenCV's).

        Raises:
            ValueError: if an image cannot be read.
        """
        if channels not in ("RGB", "BGR"):
            raise ValueError(f"channels must be RGB or BGR, got '{channels}'")
        if isinstance(images, ImageLike):
            return self([images], channels=channels)[0]
        if not isinstance(images, Iterable):
            raise ValueError(f"{_WHAT}, or several; got {type(images).__name__}")
        images = list(images)
        results: list[Result | None] = [None] * len(images)
        waiting: dict[tuple[int, ...], list] = {}  # by size
        for i, image in enumerate(images):
            array = _to_rgb(image, channels)
            item = self._to_input(array)
            batch = waiting.setdefault(tuple(item["image"].shape), [])
            batch.append((i, array, item))
            if len(batch) == self.batch_size:
                self._detect(batch, images, results)
                batch.clear()
        for batch in filter(None, waiting.values()):
            self._detect(batch, images, results)
        return results

    @torch.no_grad()
    def _detect(self, batch: list[tuple], images: list[ImageLike], results: list) -> None:
        """Puts what is found in a batch's images into their places among the results."""
        outputs = self.model([item for _, _, item in batch])
        for (i, array, _), output in zip(batch, outputs, strict=True):
            results[i] = self._to_result(output["instances"].to("cpu"), array, images[i])

    def preprocess(self, image: ImageLike, *, channels: str = "RGB") -> dict:
        """What the model gets for an image: ``image``, (3, H, W) float32, ``height``, ``width``.

        Raises:
            ValueError: if the image cannot be read.
        """
        return self._to_input(_to_rgb(image, channels))

    def _to_input(self, image: np.ndarray) -> dict:
        if self.cfg.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        height, width = image.shape[:2]
        if max(height, width) > _MOST_ELONGATED * min(height, width):
            raise ValueError(f"an image of {width}x{height} is too narrow to detect in")
        augmented = AugInput(image)
        AugmentationList(self.augmentations)(augmented)
        image = augmented.image
        tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)), dtype=torch.float)
        return {"image": tensor, "height": height, "width": width}

    def _to_result(self, instances, array: np.ndarray, image: ImageLike) -> Result:
        result = Result(
            image=array,
            boxes=instances.pred_boxes.tensor.numpy(),
            scores=instances.scores.numpy(),
            class_ids=instances.pred_classes.numpy(),
            names=self.names,
            masks=instances.pred_masks.numpy() if instances.has("pred_masks") else None,
            keypoints=instances.pred_keypoints.numpy() if instances.has("pred_keypoints") else None,
            path=str(image) if isinstance(image, (str, Path)) else None,
        )
        return result.filter(np.isin(result.class_ids, self._wanted)) if self._wanted else result


def _to_rgb(image: ImageLike, channels: str) -> np.ndarray:
    """An image as an array (H, W, 3) of uint8, RGB."""
    if isinstance(image, (str, Path)):
        return np.asarray(open_image(image))
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image))
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{_WHAT}; got {type(image).__name__}")
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            "an array must be (H, W, 3) or (H, W), a tensor (3, H, W) or (H, W); got one that is "
            f"{image.shape} with channels last"
        )
    if image.dtype.kind == "f":
        if not (0 <= image.min() and image.max() <= 1):
            raise ValueError("an image of floats must be in [0, 1]")
        image = (image * 255).round().astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"an image must be of uint8, or floats in [0, 1]; got {image.dtype}")
    return image[:, :, ::-1] if channels == "BGR" else image


def _find(
    path: Path, threshold: float, device: str | None, opts: Sequence[str]
) -> tuple[CfgNode, str]:
    """The config and the file of weights that a path leads to."""
    if path.suffix == ".py":
        return _find_lazy(path, threshold, device, opts)
    overrides = ["SOLVER.AMP.ENABLED", "False"]  # of training; this device may not know it
    for head in ("ROI_HEADS", "RETINANET"):
        overrides += [f"MODEL.{head}.SCORE_THRESH_TEST", str(threshold)]
    # A run's config names the device it was trained on.
    overrides += ["MODEL.DEVICE", device or ("cuda" if torch.cuda.is_available() else "cpu")]
    if path.is_dir():
        config, weights = path / "config.yaml", _last_weights(path)
        if not config.is_file():
            raise ValueError(f"'{path}' holds no config.yaml, so it is not a run's folder")
    elif path.suffix in (".yaml", ".yml"):
        config, weights = path, None
    elif path.is_file():
        config, weights = _config_beside(path), path
    else:
        raise ValueError(f"'{path}' does not exist; give a run's folder, weights or a config")
    if is_lazy_yaml(config):
        raise ValueError(
            f"'{config}' is a LazyConfig, which is code and not read here; name the .py file that "
            f"it came from, with the weights as an override: train.init_checkpoint={weights}"
        )
    cfg = load_config(str(config), [*overrides, *opts]).clone()
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "a model on precomputed proposals (MODEL.LOAD_PROPOSALS) can be evaluated with "
            "train_net.py --eval-only, not used here"
        )
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        raise ValueError(_NO_CLASSES)
    if "MODEL.WEIGHTS" not in opts and weights is not None:
        return cfg, str(weights)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(f"MODEL.WEIGHTS is empty in {config}; name the weights to detect with")
    return cfg, cfg.MODEL.WEIGHTS


def _find_lazy(
    path: Path, threshold: float, device: str | None, opts: Sequence[str]
) -> tuple[CfgNode, str]:
    arguments = ["SOLVER.AMP.ENABLED", "False", *(["MODEL.DEVICE", device] if device else [])]
    cfg = load_lazy_config(str(path), [*arguments, *opts], settle=_take_classes_from_weights)
    model = cfg.lazy.model
    heads = model.roi_heads if "roi_heads" in model else None
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        raise ValueError(_NO_CLASSES)
    if heads is None:
        predictors = [model]
    else:
        predictors = heads.get("box_predictors") or [heads.get("box_predictor")]
    if None in predictors:
        raise ValueError(f"'{path}': model.roi_heads has no box_predictor to give a threshold to")
    for predictor in predictors:
        predictor.test_score_thresh = threshold
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(
            f"train.init_checkpoint is empty in {path}; name the weights to detect with"
        )
    return cfg, cfg.MODEL.WEIGHTS


def _take_classes_from_weights(cfg: CfgNode) -> None:
    names = class_names_of(cfg.MODEL.WEIGHTS)
    for key in NUM_CLASSES if names else ():
        if get_key(cfg, key) is None:
            set_key(cfg, key, len(names))
    cfg.DATASETS.CLASS_NAMES = names or list(cfg.DATASETS.CLASS_NAMES)


def _last_weights(folder: Path) -> Path:
    final = folder / "model_final.pth"
    if final.is_file() and not (folder / "last_checkpoint").is_file():
        return final
    if last := find_checkpoint(folder):
        return Path(last)
    raise ValueError(f"'{folder}' holds no checkpoint that is whole")


def _config_beside(weights: Path) -> Path:
    for config in (weights.with_suffix(".yaml"), weights.parent / "config.yaml"):
        if config.is_file():
            return config
    raise ValueError(f"no config lies beside '{weights}', as {weights.stem}.yaml or config.yaml")


def _class_names(cfg: CfgNode, weights: str) -> list[str]:
    """From the config, the weights' file, what lies beside it, or the data set's metadata."""
    one_stage = "RetinaNet" in cfg.MODEL.META_ARCHITECTURE
    number = cfg.MODEL["RETINANET" if one_stage else "ROI_HEADS"].NUM_CLASSES
    beside = Path(weights).with_suffix(".classes.json")
    own = list(cfg.DATASETS.CLASS_NAMES)
    if own and len(own) != number:
        raise ValueError(
            f"NUM_CLASSES is {number} but DATASETS.CLASS_NAMES has {len(own)}: {', '.join(own)}"
        )
    candidates = [own, class_names_of(weights)]
    if beside.is_file():
        candidates.append(json.loads(beside.read_text()))
    candidates += [list(MetadataCatalog.get(n).get("thing_classes", ())) for n in cfg.DATASETS.TEST]
    for names in candidates:
        if len(names) == number:
            return [str(name) for name in names]
    return [str(i) for i in range(number)]
