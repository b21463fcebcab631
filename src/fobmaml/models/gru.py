"""A recurrent network."""

from torch import Tensor, nn

from fobmaml.arguments import whole_number
from fobmaml.models.parts import Sequences


class GRU(nn.Module):
    """``depth`` layers of gated recurrent units, each of ``width``, and a linear layer on the last state: sequences ->
    [N, outputs].

    ``input_shape``: (length,) for values [N, L] or, with ``tokens`` the size of their vocabulary, for tokens; or
    (length, d) for vectors [N, L, d]; shorter sequences are taken, too. ``torch.func.vmap`` does not batch it, so that
    rows are evaluated one by one. Reference: Cho et al. 2014, arXiv:1406.1078. Raises ValueError for other inputs.
    """

    def __init__(
        self, input_shape: tuple[int, ...], outputs: int, width: int = 32, depth: int = 1, tokens: int | None = None
    ):
        super().__init__()
        width, depth = whole_number("width", width), whole_number("depth", depth)
        outputs = whole_number("outputs", outputs)
        self.inputs = Sequences(input_shape, width, tokens)
        self.cells = nn.GRU(self.inputs.features, width, depth, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L], [N, L, d] -> [N, outputs]."""
        return self.head(self.cells(self.inputs(x))[0][:, -1])
