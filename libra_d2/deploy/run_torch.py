"""Runs MODEL, which lies beside this file: python MODEL.py IMAGE ..."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision  # noqa: F401  (its operators)
from PIL import Image, ImageOps

FILE = Path(__file__).with_suffix("")
ABOUT = json.loads(Path(f"{FILE}.json").read_text())
IS_GRAPH = ABOUT["format"] == "torch-export"
MODEL = torch.export.load(str(FILE)).module() if IS_GRAPH else torch.jit.load(str(FILE))


def detect(image: Image.Image) -> dict[str, np.ndarray]:
    """What is found: boxes (M, 4) in pixels, scores, classes, and masks (M, 1, 28, 28) if any."""
    about, (width, height) = ABOUT["input"], image.size
    scale = about["shorter_side"] / min(width, height)
    scale = min(scale, about["longer_side"] / max(width, height))
    resized = image.resize((int(width * scale + 0.5), int(height * scale + 0.5)), Image.BILINEAR)
    pixels = np.asarray(resized, np.float32)[:, :, :: -1 if about["channels"] == "BGR" else 1]
    batch = np.repeat(pixels.transpose(2, 0, 1)[None], about["batch"], axis=0)
    batch = torch.from_numpy(batch).to(ABOUT["device"])
    with torch.no_grad():
        outputs = [output.cpu().numpy() for output in MODEL(batch)]
    found = dict(zip(ABOUT["outputs"], outputs, strict=True))
    found = {name: values[found["image_index"] == 0] for name, values in found.items()}
    found["boxes"] *= np.tile(np.divide(image.size, resized.size), 2).astype(np.float32)
    return found


for path in sys.argv[1:]:
    found = detect(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    for box, score, number in zip(found["boxes"], found["scores"], found["classes"], strict=True):
        print(path, ABOUT["classes"][number], f"{score:.3f}", *box.round(1))
