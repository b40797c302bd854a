"""The discriminator of Real-ESRGAN (Wang et al., arXiv 2107.10833): a U that tells real pixels from made ones.

Every convolution but the first and the last is divided by its largest singular value (spectral normalization, Miyato
et al., arXiv 1802.05957), which one power iteration per training step follows: the network stays in eval mode, and
`follow` does the iteration, so that how often it is asked within a step, and by how many processes, changes nothing.

Axes in tensor names: b batch, c channels, h height, w width.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

SLOPE = 0.2


class Discriminator(nn.Module):
    """(B, 3, H, W) in 0..1 -> (B, 1, H, W), the logit of each pixel being real."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        widths = [channels, 2 * channels, 4 * channels, 8 * channels]
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(_half(above, below) for above, below in itertools.pairwise(widths))
        self.up = nn.ModuleList(_same(below, above) for above, below in itertools.pairwise(widths))
        self.head = nn.ModuleList(_same(channels, channels) for _ in range(2))
        self.last = nn.Conv2d(channels, 1, 3, padding=1)
        self.eval()

    def forward(self, x_bchw: Tensor) -> Tensor:
        """See the class; any H and W from 8 px on."""
        x_bchw = F.leaky_relu(self.first(x_bchw), SLOPE)
        skipped = []
        for conv in self.down:
            skipped.append(x_bchw)
            x_bchw = F.leaky_relu(conv(x_bchw), SLOPE)
        for conv in reversed(self.up):
            above_bchw = skipped.pop()
            larger_bchw = F.interpolate(x_bchw, size=above_bchw.shape[2:], mode="bilinear", align_corners=False)
            x_bchw = F.leaky_relu(conv(larger_bchw), SLOPE) + above_bchw
        for conv in self.head:
            x_bchw = F.leaky_relu(conv(x_bchw), SLOPE)
        return self.last(x_bchw)

    @torch.no_grad()
    def follow(self) -> None:
        """One power iteration of every spectral norm, after the weights have changed."""
        self.train()
        for conv in (*self.down, *self.up, *self.head):
            conv.weight  # noqa: B018  (asking for it in training mode is what iterates)
        self.eval()


class _Convolution(nn.Conv2d):
    """A convolution without bias whose weight is normed in fp32: CUDA's autocast would multiply it in bf16 for that."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        with torch.autocast(x_bchw.device.type, enabled=False):
            weight = self.weight
        return self._conv_forward(x_bchw, weight, None)


def _half(inputs: int, outputs: int) -> nn.Module:
    return spectral_norm(_Convolution(inputs, outputs, 4, stride=2, padding=1, bias=False))


def _same(inputs: int, outputs: int) -> nn.Module:
    return spectral_norm(_Convolution(inputs, outputs, 3, padding=1, bias=False))
