"""The network."""

from torch import Tensor, nn


class Listener(nn.Module):
    """Two convolutions, the mean over time, a linear layer: [N, samples] -> [N, outputs]. Any nn.Module will do whose
    outputs depend on its parameters and inputs alone: GroupNorm or LayerNorm in place of BatchNorm, no dropout."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, *input_shape)),
            nn.Conv1d(1, width, kernel_size=7, padding=3),
            nn.SiLU(),  # smooth: finite differences of solutions ask for it
            nn.Conv1d(width, width, kernel_size=7, padding=3, stride=2),
            nn.GroupNorm(1, width),
            nn.SiLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(width, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
