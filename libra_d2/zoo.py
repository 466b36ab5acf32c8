"""detectron2's own LazyConfigs, to be built upon."""

from importlib.resources import as_file, files

from detectron2.config import LazyConfig
from omegaconf import DictConfig

__all__ = ["get_config"]


def get_config(name: str) -> DictConfig:
    """A LazyConfig of detectron2's model zoo; each call gives a new one.

    ``detectron2.model_zoo.get_config`` does so too, with setuptools before 81 alone.

    Args:
        name: such as "common/models/mask_rcnn_fpn.py".

    Raises:
        ValueError: if there is none of that name.
    """
    folder = files("detectron2") / "model_zoo" / "configs"
    with as_file(folder.joinpath(*name.split("/"))) as path:
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"detectron2's model zoo has no LazyConfig '{name}'")
        return LazyConfig.load(str(path))
