"""Files of weights: read by detectron2's checkpointer, and checked before a run."""

import functools
import io
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from libra_d2.checkpoint import read_weights, write_whole
from libra_d2.pickles import read_pickle

from .average import WeightAverage
from .stopping import NonFiniteError

__all__ = [
    "WeightsCheckpointer",
    "check_classes_of",
    "check_weights",
    "class_names_of",
    "find_checkpoint",
    "has_final_checkpoint",
]

_NOTE = "last_checkpoint"


class WeightsCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, which reads ``.safetensors`` too and writes names of classes.

    Args:
        model: whose weights.
        save_dir: folder of the checkpoints.
        class_names: what checkpoints have beside the weights.
        average: whose weights are those of the checkpoints; the model's own stand beside them.
        checkpointables: further parts of checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: Sequence[str] = (),
        average: WeightAverage | None = None,
        **checkpointables: Any,
    ):
        if average:
            checkpointables["average"] = average
        super().__init__(model, save_dir, **checkpointables)
        self.average = average
        self.class_names = list(class_names)

    def save(self, name: str, *, is_last: bool = True, **kwargs: Any) -> None:
        """Writes a checkpoint, which appears whole or not at all.

        Args:
            name: of the file, without its end.
            is_last: whether a resumed run is to go on from it.
            kwargs: what it has beside the weights.

        Raises:
            NonFiniteError: if weights are not finite.
            ValueError: if the file can't be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        model = (self.average.module if self.average else self.model).state_dict()
        broken = [key for key, value in model.items() if not _is_finite(value)]
        if broken:
            raise NonFiniteError(
                f"{len(broken)} of {len(model)} weights are not finite, among them {broken[0]}"
            )
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        content = {"model": model, **parts, "class_names": self.class_names, **kwargs}
        file = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", file)
        write_whole(file, lambda beside: _save(content, beside))
        if is_last:
            self.tag_last_checkpoint(os.path.basename(file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Notes the last checkpoint; the note is the former or the new one at any time."""
        note = os.path.join(self.save_dir, _NOTE)
        write_whole(note, lambda file: Path(file).write_text(last_filename_basename))

    def has_checkpoint(self) -> bool:
        """Whether there is a whole checkpoint to go on from."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The last whole checkpoint; empty if there is none."""
        return find_checkpoint(Path(self.save_dir))

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".safetensors"):
            return {"model": read_weights(filename)["model"]}
        if filename.endswith(".pkl"):
            return _read_zoo_file(filename)
        if filename.endswith(".pyth"):
            return {
                "model": read_weights(filename)["model_state"],
                "__author__": "pycls",
                "matching_heuristics": True,
            }
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> dict:
        return read_weights(f)


def _is_finite(value: Any) -> bool:
    return not torch.is_tensor(value) or bool(torch.isfinite(value).all())


class _File(io.BufferedWriter):
    """A file that keeps why it could not be written; torch loses that."""

    error: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _save(content: dict, path: str) -> None:
    with _File(io.FileIO(path, "w")) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise file.error or error from None


def _read_zoo_file(path: str) -> dict:
    """A ``.pkl`` of detectron2's model zoo, or of the one before it."""
    try:
        content = read_pickle(path)
    except ValueError as error:
        raise ValueError(f"'{path}' {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not a dict of weights")
    if "model" in content and "__author__" in content:
        return content
    content = content.get("blobs", content)
    model = {key: value for key, value in content.items() if not key.endswith("_momentum")}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


def find_checkpoint(folder: Path) -> str:
    """The last whole checkpoint of a run; empty if there is none.

    It is the one that ``last_checkpoint`` names, if that is in the folder and whole; else the last
    of those that are.

    Raises:
        ValueError: if ``last_checkpoint`` names what is no checkpoint of the folder.
    """
    note, names = folder / _NOTE, []
    if note.is_file():
        name = note.read_text(errors="replace").strip("\n\0 ")
        if name and (Path(name).name != name or not name.endswith(".pth")):
            raise ValueError(f"'{note}' must name a .pth file of its folder, got '{name}'")
        names = [name] if name else []
    numbered = sorted((file.name for file in folder.glob("model_[0-9]*.pth")), reverse=True)
    for name in dict.fromkeys([*names, *numbered]):
        if _is_whole(folder / name):
            if names and name != names[0]:
                logging.getLogger(__name__).warning(
                    "checkpoint '%s' is missing or damaged: going on from '%s'", names[0], name
                )
            return str(folder / name)
    return ""


def has_final_checkpoint(folder: Path, iteration: int) -> bool:
    """Whether a run's trained model is there, whole, and of its last iteration."""
    file = folder / "model_final.pth"
    return _is_whole(file) and read_weights(str(file)).get("iteration") == iteration


def _is_whole(file: Path) -> bool:
    """Whether all of a checkpoint is there, unchanged; by the checksums that it holds."""
    try:
        stamp = file.stat()
    except OSError:
        return False
    return _matches_checksums(file, stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=16)
def _matches_checksums(file: Path, modified: int, size: int) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, zlib.error):
        return False


def class_names_of(weights: str) -> list[str]:
    """The names of classes that a file of this project has beside its weights; or none."""
    if not weights.endswith((".pth", ".safetensors")) or not os.path.isfile(weights):
        return []
    try:
        content = read_weights(weights)
        names = content.get("class_names") or json.loads(content["meta"]["class_names"])
    except (ValueError, KeyError, TypeError):
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


def check_weights(weights: str, model: nn.Module, name: str, *, all_of_them: bool = False) -> None:
    """Checks that a file of weights is there, can be read, and has something for the model.

    Args:
        weights: its path; or an address, from which it is fetched; or nothing.
        model: what they are for.
        name: what to call the file: a config key.
        all_of_them: whether it must have every weight of the model.

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
    if url.path.endswith(".pkl"):
        _read_zoo_file(url.path)
        return  # detectron2 matches its names
    if "matching_heuristics" in url.query or url.path.endswith(".pyth"):
        read_weights(url.path)
        return
    try:
        checkpoint = read_weights(url.path)
        state = checkpoint.get("model", checkpoint)
        shapes = {key: value.shape for key, value in state.items() if hasattr(value, "shape")}
    except Exception as error:
        raise ValueError(f"{name} '{weights}' is not a checkpoint of a torch model") from error
    own = model.state_dict()
    broken = [key for key, value in state.items() if key in own and not _is_finite(value)]
    if broken:
        raise ValueError(f"{name} '{weights}' has weights that are not finite, in '{broken[0]}'")
    lacking = [key for key, value in own.items() if shapes.get(key) != value.shape]
    if all_of_them and lacking:
        what = f"has no weights for '{lacking[0]}' of this model's shape"
        raise ValueError(f"{name} '{weights}' {what}; resume with the config of the run")
    if len(lacking) == len(own) and not checkpoint.get("matching_heuristics"):
        raise ValueError(f"{name} '{weights}' has no weights for this model: no name and shape fit")
