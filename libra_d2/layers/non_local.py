"""Non-local block (Wang et al., Non-local Neural Networks, CVPR 2018)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NonLocal2d(nn.Module):
    r"""Embedded Gaussian non-local block that keeps the number of channels.

    .. math:: y = x + W_{out}\,\mathrm{softmax}(\theta(x)^T \phi(x))\,g(x)

    with the softmax over all positions, no reduction of channels, no 1/sqrt(C) scale and no
    subsampling, as Libra R-CNN uses it (section 3.2). ``conv_out`` starts at zero, so that a new
    block is the identity.

    The attention is torch's fused one: where a fused kernel exists (CPU and GPU) the matrix of
    (H W) x (H W) weights is never held in memory.

    Args:
        in_channels: C, channels of the input and the output.

    Shape:
        Input and output ``(N, C, H, W)``, any floating dtype.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.theta = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.phi = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.g = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.conv_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        for conv in (self.theta, self.phi, self.g):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = _to_rows(self.theta(x)), _to_rows(self.phi(x)), _to_rows(self.g(x))
        y = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        # A copy, because as a mere view it would be channels-last, and make all that follows so:
        # slower on a CPU where the rest of the model is not.
        y = y.squeeze(1).transpose(1, 2).contiguous().view(x.shape)
        return x + self.conv_out(y)


def _to_rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, one head, H * W, C), with a position's channels side by side."""
    return torch.flatten(x, 2).transpose(1, 2).unsqueeze(1).contiguous()
