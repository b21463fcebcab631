"""The residual network of few-shot image classification."""

from collections import OrderedDict

from torch import Tensor, nn

from fobmaml.arguments import whole_number
from fobmaml.models.parts import Images, activation_layer, group_norm, image_shape


class Residual(nn.Module):
    """Three 3 × 3 convolutions with GroupNorm, beside them a 1 × 1 convolution with GroupNorm, and max-pooling by 2 of
    the activated sum: [N, channels_in, h, w] -> [N, channels_out, h/2, w/2]."""

    def __init__(self, channels_in: int, channels_out: int, activation: str):
        super().__init__()
        layers: list[nn.Module] = []
        for layer in range(3):
            channels = channels_out if layer else channels_in
            layers += [nn.Conv2d(channels, channels_out, 3, padding=1, bias=False), group_norm(channels_out)]
            layers += [activation_layer(activation)] * (layer < 2)
        self.convolutions = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, bias=False), group_norm(channels_out))
        self.activation, self.pool = activation_layer(activation), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.convolutions(x) + self.shortcut(x)))


class ResNet12(nn.Sequential):
    """``depth`` residual blocks of three convolutions, global average pooling and a linear layer: images
    [N, channels, height, width] -> [N, outputs].

    The blocks have 1, 5/2, 5, 10, 20, ... times ``width`` channels, rounded down. Depth 4 and width 64, with 64, 160,
    320 and 640, give the ResNet-12 of Lee, Maji, Ravichandran & Soatto 2019, arXiv:1904.03758, with GroupNorm in place
    of batch statistics, and without DropBlock, which is random. ``input_shape``: (channels, height, width).
    ``activation``: ``silu``, ``gelu``, ``softplus``, ``tanh`` or ``relu``.
    Raises ValueError for images of other shapes, or that ``depth`` halvings leave nothing of.
    """

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, width: int = 32, depth: int = 4, activation: str = "silu"
    ):
        width, depth = whole_number("width", width), whole_number("depth", depth)
        outputs = whole_number("outputs", outputs)
        shape = image_shape(input_shape, depth)
        channels = [width if block == 0 else 5 * width * 2**block // 4 for block in range(depth)]
        layers: OrderedDict[str, nn.Module] = OrderedDict(inputs=Images(shape))
        for block, (before, after) in enumerate(zip([shape[0], *channels], channels, strict=False)):
            layers[f"block{block}"] = Residual(before, after, activation)
        layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        layers["head"] = nn.Linear(channels[-1], outputs)
        super().__init__(layers)
