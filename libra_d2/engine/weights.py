"""Files of weights: read by detectron2's checkpointer, and checked before a run."""

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from libra_d2.checkpoint import read_weights

__all__ = ["WeightsCheckpointer", "check_classes_of", "check_weights", "class_names_of"]


class WeightsCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, which reads ``.safetensors`` too and writes names of classes.

    Args:
        model: whose weights.
        save_dir: folder of the checkpoints.
        class_names: what checkpoints have beside the weights.
        checkpointables: further parts of checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: Sequence[str] = (),
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.class_names = list(class_names)

    def save(self, name: str, **kwargs: Any) -> None:
        super().save(name, class_names=self.class_names, **kwargs)

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".safetensors"):
            return {"model": read_weights(filename)["model"]}
        return super()._load_file(filename)


def class_names_of(weights: str) -> list[str]:
    """The names of classes that a checkpoint of this project has beside its weights; or none."""
    if not weights.endswith(".pth") or not os.path.isfile(weights):
        return []
    try:
        names = read_weights(weights).get("class_names")
    except ValueError:
        return []
    is_right = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_right else []


def check_classes_of(weights: str, class_names: Sequence[str], name: str) -> None:
    """Raises ``ValueError`` if weights go on that were trained for other classes."""
    trained = class_names_of(weights)
    if trained and class_names and trained != list(class_names):
        raise ValueError(
            f"{name} '{weights}' was trained for the classes {', '.join(trained)}, in this order; "
            f"the data or DATASETS.CLASS_NAMES have {', '.join(class_names)}"
        )


def check_weights(weights: str, model: nn.Module, name: str) -> None:
    """Checks that a file of weights is there, can be read, and has something for the model.

    Args:
        weights: its path; or an address, from which it is fetched; or nothing.
        model: what they are for.
        name: what to call the file: a config key.

    Raises:
        ValueError: if it is not so.
    """
    if not weights:
        return
    url = urlparse(weights)
    if url.scheme:
        try:
            path = PathManager.get_local_path(url._replace(query="").geturl())
        except Exception as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{name} '{weights}' cannot be fetched: {why}") from error
        url = url._replace(path=path)
    if not PathManager.isfile(url.path):
        raise ValueError(f"{name} '{weights}' does not exist or is not a file")
    if url.path.endswith(".pkl") or "matching_heuristics" in url.query:
        return  # detectron2 matches its names
    try:
        checkpoint = read_weights(url.path)
        state = checkpoint.get("model", checkpoint)
        shapes = {key: value.shape for key, value in state.items() if hasattr(value, "shape")}
    except Exception as error:
        raise ValueError(f"{name} '{weights}' is not a checkpoint of a torch model") from error
    own = model.state_dict()
    fits = any(shapes.get(key) == value.shape for key, value in own.items())
    if not fits and not checkpoint.get("matching_heuristics"):
        raise ValueError(f"{name} '{weights}' has no weights for this model: no name and shape fit")
