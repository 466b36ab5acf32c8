"""Images brought to their size by torch, which is faster than PIL at it."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import (
    Augmentation,
    AugmentationList,
    ResizeShortestEdge,
    ResizeTransform,
)
from PIL import Image
from torch.nn import functional as F

__all__ = ["TorchResize", "TorchResizeShortestEdge", "use_resize", "with_resize"]


class TorchResize(ResizeTransform):
    """The parent, with torch's kernel for bilinear resizing of bytes.

    It smooths what gets smaller, as PIL does; values differ by at most 1 of 255.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resizes an image (H, W, 3) or (H, W, 1); one of another kind as the parent does."""
        method = self.interp if interp is None else interp
        is_known = img.dtype == np.uint8 and img.ndim == 3 and img.shape[2] in (1, 3)
        if not is_known or method != Image.BILINEAR:
            return super().apply_image(img, interp)
        assert img.shape[:2] == (self.h, self.w)
        img = np.require(
            img, requirements=["C", "W"]
        )  # torch takes no negative strides, and warns of arrays that are not to be written
        image = torch.from_numpy(img).permute(2, 0, 1)[None]
        size = self.new_h, self.new_w
        resized = F.interpolate(image, size, mode="bilinear", antialias=True)
        return resized[0].permute(1, 2, 0).numpy()


class TorchResizeShortestEdge(ResizeShortestEdge):
    """The parent, whose transform is a :class:`TorchResize`."""

    def get_transform(self, image: np.ndarray) -> Any:
        transform = super().get_transform(image)
        if type(transform) is not ResizeTransform:  # one that does nothing
            return transform
        sizes = transform.h, transform.w, transform.new_h, transform.new_w
        return TorchResize(*sizes, transform.interp)


def with_resize(augmentations: Iterable[Augmentation], cfg: CfgNode) -> list[Augmentation]:
    """Augmentations in which those of ``ResizeShortestEdge`` resize as ``INPUT.RESIZE`` says."""
    augmentations = list(augmentations)
    if cfg.INPUT.RESIZE == "torch":
        for i, augmentation in enumerate(augmentations):
            if type(augmentation) is ResizeShortestEdge:
                augmentations[i] = TorchResizeShortestEdge.__new__(TorchResizeShortestEdge)
                augmentations[i].__dict__.update(augmentation.__dict__)
    return augmentations


def use_resize(mapper: Callable[[dict], Any], cfg: CfgNode) -> Callable[[dict], Any]:
    """Lets a mapper that has a list of augmentations, such as detectron2's, do so, in place."""
    augmentations = getattr(mapper, "augmentations", None)
    if isinstance(augmentations, AugmentationList):
        augmentations.augs = with_resize(augmentations.augs, cfg)
    return mapper
