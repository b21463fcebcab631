"""Torch's operators, by what nodes there are for them."""

import torch

aten = torch.ops.aten
SAME_NUMBERS = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    **{
        each: each
        for each in (
            aten.reshape.default,
            aten.unsqueeze.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.flatten.using_ints,
            aten.slice.Tensor,
            aten.alias.default,
            aten.clone.default,
            aten.t.default,
            aten.transpose.int,
            aten.permute.default,
            aten.expand.default,
            aten.select.int,
            aten.unbind.int,
        )
    },
}
"""Operations that compute nothing, and what does the same to numbers that lie otherwise in memory."""
ELEMENTWISE = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.tanh.default: "tanh",
    aten.gelu.default: "gelu",
    aten.softplus.default: "softplus",
}
"""With their defaults, of which torch names softplus's: slope and threshold."""
SOFTPLUS = 1, 20
POOLS = {aten.max_pool2d_with_indices.default: "max", aten.avg_pool2d.default: "average"}
PRODUCTS = (aten.addmm.default, aten.mm.default, aten.bmm.default)
