"""The four-block backbone of few-shot image classification."""

from collections import OrderedDict

from torch import nn

from fobmaml.arguments import whole_number
from fobmaml.models.parts import Images, activation_layer, group_norm, image_shape


class Conv4(nn.Sequential):
    """``depth`` blocks of a 3 × 3 convolution of ``width`` channels, GroupNorm, activation and max-pooling by 2, and a
    linear layer: images [N, channels, height, width] -> [N, outputs].

    Four blocks of 64 or 32 channels are the backbone of Vinyals et al. 2016, arXiv:1606.04080, and Finn et al. 2017,
    arXiv:1703.03400, with GroupNorm in place of batch statistics: ``input_shape`` (1, 28, 28) for Omniglot, (3, 84, 84)
    for mini-ImageNet. ``activation``: ``silu``, ``gelu``, ``softplus``, ``tanh`` or ``relu``.
    Raises ValueError for images of other shapes, or that ``depth`` halvings leave nothing of.
    """

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, width: int = 32, depth: int = 4, activation: str = "silu"
    ):
        width, depth = whole_number("width", width), whole_number("depth", depth)
        outputs = whole_number("outputs", outputs)
        shape = image_shape(input_shape, depth)
        layers: OrderedDict[str, nn.Module] = OrderedDict(inputs=Images(shape))
        for block in range(depth):
            layers[f"conv{block}"] = nn.Conv2d(width if block else shape[0], width, 3, padding=1)
            layers[f"norm{block}"] = group_norm(width)
            layers[f"activation{block}"] = activation_layer(activation)
            layers[f"pool{block}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(width * (shape[1] >> depth) * (shape[2] >> depth), outputs)
        super().__init__(layers)
