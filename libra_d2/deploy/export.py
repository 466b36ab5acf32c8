"""Exports a detector to a file."""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from detectron2.export import scripting_with_instances
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn

from libra_d2.modeling.half import compute_in

from .exportable import Exportable, Traceable
from .graph import DetectorGraph
from .plain import make_plain

__all__ = ["FORMATS", "check_exportable", "export_model", "open_exported", "smallest_side"]

# With what their files end.
FORMATS = {"torchscript": ".pt", "script": ".pt", "onnx": ".onnx", "torch-export": ".pt2"}
_NEEDED = {"onnx": ("onnx", "onnxruntime")}
_OPSET = 17
_FIELDS = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
_TWO_STAGE = {"proposal_boxes": Boxes, "objectness_logits": Tensor}


def check_exportable(model: nn.Module, format: str, half: bool = False) -> None:
    """Checks that a detector can be exported.

    Args:
        model: detectron2's.
        format: one of ``FORMATS``.
        half: whether backbone and heads compute in half precision.

    Raises:
        ValueError: if it can't; it says which format takes it.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got '{format}'")
    missing = [p for p in _NEEDED.get(format, ()) if importlib.util.find_spec(p) is None]
    if missing:
        raise ValueError(f"format {format} needs {' and '.join(missing)}; pip installs them")
    # It has no bounds of sizes before.
    if format == "torch-export" and not callable(torch.export.Dim.AUTO):
        raise ValueError(
            f"format torch-export needs torch 2.7 or later, here is {torch.__version__}; the other "
            "formats do not"
        )
    heads = getattr(model, "roi_heads", None)
    is_two_stage = isinstance(model, GeneralizedRCNN) and isinstance(heads, StandardROIHeads)
    if not is_two_stage and not isinstance(model, RetinaNet):
        raise ValueError(
            f"a {type(model).__name__} with {type(heads).__name__} cannot be exported; Faster, "
            "Mask and Cascade R-CNN and RetinaNet can"
        )
    if is_two_stage and heads.keypoint_on:
        raise ValueError("keypoints cannot be exported")
    if format == "script":
        if half:
            raise ValueError("script has no half precision; the other formats have")
        if isinstance(heads, CascadeROIHeads):
            raise ValueError("a cascade cannot be scripted; the other formats take it")
        if getattr(model, "clip_before_nms", False):
            raise ValueError(
                "MODEL.RETINANET.CLIP_BOXES before_nms cannot be scripted; the other formats take "
                "it"
            )


def export_model(
    model: nn.Module, file: str | Path, *, format: str, image: Tensor, half: bool = False
) -> None:
    """Writes a detector to a file, from whose inputs and outputs those of ``Exportable`` are.

    A scripted one takes any number of images, others as many as ``image`` has; all take any height
    and width from :func:`smallest_side` on.

    Args:
        model: detectron2's, in evaluation mode.
        file: to write.
        format: one of ``FORMATS``.
        image: an example (N, 3, H, W), float32 in [0, 255], on the model's device.
        half: whether backbone and heads compute in half precision: bfloat16 on a CPU for
            torchscript and torch-export, else float16. Inputs, outputs and boxes are float32.

    Raises:
        ValueError: if the detector can't be exported.
    """
    check_exportable(model, format, half)
    if format == "script":
        model = make_plain(model)  # the others trace a balanced pyramid as it is, for all sizes
    elif half:
        on_cpu = image.device.type == "cpu" and format != "onnx"
        model = compute_in(torch.bfloat16 if on_cpu else torch.float16, model, for_graph=True)
    if format == "torch-export":
        _export_graph(model, file, image)
        return
    exportable = Exportable(model).eval()
    with torch.no_grad(), _quietly():
        if format == "script":
            fields = {**_FIELDS, **(_TWO_STAGE if not exportable.is_one_stage else {})}
            fields |= {"pred_masks": Tensor} if exportable.has_masks else {}
            scripting_with_instances(exportable, fields).save(str(file))
            return
        traceable = Traceable(exportable).eval()
        with patch_builtin_len():  # or lengths seen here would hold for all images
            if format == "torchscript":
                torch.jit.trace(traceable, image, check_trace=False).save(str(file))
                return
            torch.onnx.export(
                traceable,
                (image,),
                str(file),
                opset_version=_OPSET,
                dynamo=False,  # the newer exporter fails on sizes that depend on data
                input_names=["images"],
                output_names=exportable.outputs,
                dynamic_axes={
                    "images": {2: "height", 3: "width"},
                    **{name: {0: "objects"} for name in exportable.outputs},
                },
            )


def smallest_side(model: nn.Module, format: str) -> int:
    """The smallest height and width, in pixels, of images that a file takes."""
    if format != "torch-export":
        return 1
    # A graph of torch.export does not hold for a level of one cell beside those of more.
    anchors = model if isinstance(model, RetinaNet) else model.proposal_generator
    return max(anchors.anchor_generator.strides) + 1


def _export_graph(model: nn.Module, file: str | Path, image: Tensor) -> None:
    side = torch.export.Dim.AUTO(min=smallest_side(model, "torch-export"))
    graph = DetectorGraph(model).eval()
    try:
        # Before it fails it prints the graph it has, thousands of lines.
        with torch.no_grad(), _quietly(), contextlib.redirect_stderr(io.StringIO()):
            program = torch.export.export(
                graph, (image,), dynamic_shapes={"images": {2: side, 3: side}}, strict=False
            )
    except RuntimeError as error:  # such as a backbone whose decisions depend on sizes
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"torch.export can't take this model; onnx and torchscript may: {reason}"
        ) from error
    with open(file, "wb") as stream:  # of a name it asks for one end
        torch.export.save(program, stream)


def open_exported(file: str | Path, format: str) -> Callable[[Tensor], Sequence[Tensor]]:
    """What a file computes, as a function from images to the outputs of ``Exportable``."""
    if format == "onnx":
        import onnxruntime  # what tests and checks of it need, and nothing else

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda images: [
            torch.from_numpy(x) for x in session.run(None, {"images": images.cpu().numpy()})
        ]
    if format == "torch-export":
        with open(file, "rb") as stream:
            return torch.export.load(stream).module()
    return torch.jit.load(str(file))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the tracers' hundreds of warnings; what they warn of is compared afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
