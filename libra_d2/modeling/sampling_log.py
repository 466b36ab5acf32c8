"""Numbers of the sampled proposals, for metrics.json and TensorBoard."""

import torch
from detectron2.structures import Instances, RotatedBoxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import get_event_storage

__all__ = ["log_sampled"]


def log_sampled(
    proposals: list[Instances],
    *,
    num_gts: list[int],
    background_label: int,
    num_bins: int,
    max_iou: float,
) -> None:
    """Logs what the sampler chose in a batch, with one transfer to the host; of upright boxes only.

    - ``roi_head/negative_iou_bin<k>``: share of the sampled negatives whose IoU is in bin k of
      ``num_bins`` over [0, max_iou).
    - ``roi_head/min_positives_per_gt``, ``roi_head/max_positives_per_gt``: the fewest and the most
      sampled positives that a ground truth of the batch has.

    Args:
        proposals: sampled proposals of each image; with ground truths they have ``gt_boxes`` and
            ``gt_indices``, also for negatives: those of their largest IoU.
        num_gts: number of ground truths of each image.
        background_label: the class of negatives.
        num_bins: number of IoU bins.
        max_iou: upper edge of the last bin; what lies above counts to it.
    """
    if any(isinstance(image.proposal_boxes, RotatedBoxes) for image in proposals):
        return
    bins, counts = [], []
    for image, num_gt in zip(proposals, num_gts, strict=True):
        is_negative = image.gt_classes == background_label
        if num_gt == 0:
            ious = torch.zeros(len(image), device=is_negative.device)
        else:
            ious = matched_pairwise_iou(image.proposal_boxes, image.gt_boxes)
            count = torch.zeros(num_gt, device=ious.device)
            counts.append(count.index_add_(0, image.gt_indices, (~is_negative).to(count.dtype)))
        bin_of = (ious * (num_bins / max_iou)).long().clamp(max=num_bins - 1)
        bins.append(torch.where(is_negative, bin_of, -1))

    in_bin = torch.cat(bins) == torch.arange(num_bins, device=bins[0].device).unsqueeze(1)
    shares = in_bin.sum(dim=1) / in_bin.sum().clamp(min=1)
    names = [f"negative_iou_bin{k}" for k in range(num_bins)]
    values = [shares]
    if counts:
        values += [torch.cat(counts).amin().unsqueeze(0), torch.cat(counts).amax().unsqueeze(0)]
        names += ["min_positives_per_gt", "max_positives_per_gt"]
    storage = get_event_storage()
    for name, value in zip(names, torch.cat(values).tolist(), strict=True):
        storage.put_scalar(f"roi_head/{name}", value)
