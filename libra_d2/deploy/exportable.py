"""A detector as a function of tensors.

Shape shorthand in this module:

    N: number of images, all of one size
    M: number of objects found in all of them
"""

import torch
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor, nn

__all__ = ["Exportable", "Traceable"]

_OUTPUTS = ("boxes", "scores", "classes", "image_index", "masks")


class Exportable(nn.Module):
    """A detector from images to tensors, which can be scripted if the detector can.

    Args:
        model: detectron2's, in evaluation mode.

    Attributes:
        outputs: names of what it returns.
    """

    is_one_stage: torch.jit.Final[bool]
    has_masks: torch.jit.Final[bool]

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.is_one_stage = isinstance(model, RetinaNet)
        self.has_masks = bool(getattr(getattr(model, "roi_heads", None), "mask_on", False))
        self.outputs = list(_OUTPUTS[: 4 + self.has_masks])

    def forward(self, images: Tensor) -> list[Tensor]:
        """What is found in images (N, 3, H, W), float32 in [0, 255], in the model's channels.

        Returns:
            boxes (M, 4) in pixels of these images, scores (M,), classes (M,) int64, the image of
            each (M,) int64; with masks their probabilities (M, 1, 28, 28) inside of the boxes.
        """
        inputs = [{"image": image} for image in images.unbind(0)]
        if self.is_one_stage:
            if torch.jit.is_scripting():
                found = self.model(inputs)
            else:
                found = [result["instances"] for result in self.model(inputs)]
        else:
            found = self.model.inference(inputs, None, False)
        boxes = torch.cat([x.pred_boxes.tensor for x in found]).float()
        scores = torch.cat([x.scores for x in found]).float()
        classes = torch.cat([x.pred_classes for x in found])
        index = torch.cat([torch.zeros_like(x.pred_classes) + i for i, x in enumerate(found)])
        if torch.jit.is_scripting():  # where RetinaNet does not clip them
            height, width = float(images.shape[2]), float(images.shape[3])
            across, down = boxes[:, 0::2].clamp(0.0, width), boxes[:, 1::2].clamp(0.0, height)
            boxes = torch.stack([across, down], dim=2).flatten(1)
        outputs = [boxes, scores, classes, index]
        if self.has_masks:
            outputs.append(torch.cat([x.pred_masks for x in found]).float())
        return outputs


class Traceable(nn.Module):
    """The same with a tuple as output, which a tracer wants."""

    def __init__(self, exportable: Exportable):
        super().__init__()
        self.exportable = exportable

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`Exportable.forward`."""
        return tuple(self.exportable(images))
