"""A Transformer encoder on short sequences."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fobmaml.arguments import one_of, refuse, whole_number
from fobmaml.models.parts import Sequences, activation_layer

EXPANSION = 4
"""Units of the layer between, by those of a vector."""


class Block(nn.Module):
    """h ← h + attention(norm(h)), h ← h + mlp(norm(h)): [N, L, width] -> [N, L, width]."""

    def __init__(self, width: int, heads: int, activation: str):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)  # queries, keys and values
        self.mlp = nn.Sequential(
            nn.Linear(width, EXPANSION * width), activation_layer(activation), nn.Linear(EXPANSION * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.into(self.attention_norm(h)).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # [N, L, heads, .]
        mixed = F.scaled_dot_product_attention(q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2))
        h = h + self.out(mixed.transpose(-3, -2).flatten(-2))
        return h + self.mlp(self.mlp_norm(h))


class Transformer(nn.Module):
    """A pre-norm encoder of ``depth`` blocks of ``width``, and a linear layer on the mean of the last vectors, or on a
    class token's: sequences -> [N, outputs].

    ``input_shape``: (length,) for values [N, L] or, with ``tokens`` the size of their vocabulary, for tokens; or
    (length, d) for vectors [N, L, d]; shorter sequences are taken, too. Each vector is mapped to ``width`` numbers, and
    a learned one of its place is added. ``heads``: of attention, a divisor of ``width``. ``readout``: ``mean`` or
    ``token``. Memory grows with L²: the attention weights of ``heads`` heads. No dropout, which is random.
    ``activation``: ``silu``, ``gelu``, ``softplus``, ``tanh`` or ``relu``.

    Reference: Vaswani et al. 2017, arXiv:1706.03762; pre-norm: Xiong et al. 2020, arXiv:2002.04745; class token:
    Dosovitskiy et al. 2021, arXiv:2010.11929. Raises ValueError for other inputs.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        outputs: int,
        width: int = 32,
        depth: int = 2,
        heads: int = 4,
        readout: str = "mean",
        tokens: int | None = None,
        activation: str = "gelu",
    ):
        super().__init__()
        width, depth = whole_number("width", width), whole_number("depth", depth)
        outputs = whole_number("outputs", outputs)
        if width % whole_number("heads", heads):
            raise refuse("heads", heads, f"a divisor of width={width}")
        by_token = one_of("readout", readout, ("mean", "token")) == "token"
        self.class_token = nn.Parameter(torch.randn(width)) if by_token else None
        self.inputs = Sequences(input_shape, width, tokens)
        self.into = nn.Identity() if tokens else nn.Linear(self.inputs.features, width)
        self.places = nn.Parameter(0.02 * torch.randn(self.inputs.length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, activation) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L], [N, L, d] -> [N, outputs]."""
        h = self.into(self.inputs(x))
        h = h + self.places[: h.shape[1]]
        if self.class_token is not None:
            h = torch.cat([self.class_token.expand(len(h), 1, -1), h], dim=1)
        h = self.norm(self.blocks(h))
        return self.head(h.mean(1) if self.class_token is None else h[:, 0])
