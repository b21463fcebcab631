"""What sanitize_kernel.py, which calls this, does with the kernel for images."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sanitize_kernel import (
    Description,
    Random,
    call,
    ends,
    fewer_parameters,
    larger_blocks,
    main,
    more_examples,
    shorter,
)
from torch import Tensor

from fobmaml.engine.images import ImageGradient
from fobmaml.engine.nodes import (
    Activate,
    Attention,
    Conv,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MeanOfPlaces,
    Node,
    Pool,
    Reshape,
    RMSNorm,
    Shift,
    Sum,
    Take,
)
from fobmaml.engine.rows import RowGradient

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu}
SIZES = [1, 2, 5, 7, 8, 9, 15, 16, 17, 25, 33, 49, 70]


class Images(Description):
    """``layers`` are nodes, inputs [R, N, channels, (height,) width] or [R, N, values]."""

    def compute(self) -> None:
        gradient = ImageGradient.of(self.layers, self.shapes, self.inputs, self.targets, self.weights)
        batches = self.times, self.order, self.chosen_weights
        gradient.add(self.start, self.displacement, self.into, self.scale, self.step, *batches)
        gradient.outputs(self.start)

    def outputs(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        def of(name: str | None) -> Tensor | None:
            return None if name is None else parameters[name]

        results = [x]
        for node in self.layers:
            match node:
                case Take(step):
                    x = results[step + 1]
                case Sum(step):
                    x = x + results[step + 1]
                case Conv(weight, bias, stride, padding):
                    if x.dim() == 4:
                        x = F.conv2d(x, parameters[weight], of(bias), stride, padding)
                    else:
                        x = F.conv1d(x, parameters[weight], of(bias), stride[1], padding[1])
                case Linear(weight, bias):
                    x = F.linear(x, parameters[weight], of(bias))
                case GroupNorm(groups, weight, bias, eps):
                    x = torch.group_norm(x, groups, of(weight), of(bias), eps)
                case Activate(name):
                    x = FUNCTIONS[name](x)
                case Pool(kind, kernel, stride, padding):
                    image = x if x.dim() == 4 else x.unsqueeze(2)
                    pooled = (F.max_pool2d if kind == "max" else F.avg_pool2d)(image, kernel, stride, padding)
                    x = pooled if x.dim() == 4 else pooled.squeeze(2)
                case Reshape(shape):
                    x = x.unflatten(1, shape)
                case LayerNorm(weight, bias, eps):
                    x = F.layer_norm(x, x.shape[-1:], of(weight), of(bias), eps)
                case RMSNorm(weight, eps):
                    x = F.rms_norm(x, x.shape[-1:], of(weight), eps)
                case Shift(parameter):
                    x = x + parameters[parameter]
                case Attention(heads):
                    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(3, -1))
                    x = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
                case MeanOfPlaces():
                    x = x.mean(1)
                case _:
                    x = x.flatten(1)
            results.append(x)
        return x


class RandomImages(Random):
    """Descriptions by chance."""

    KERNEL = "images"

    def description(self) -> Images:
        rows, examples = self.choice([0, 1, 2, 3]), self.choice([0, 1, 3, 13, 50])
        shape = self.choice([(7,), (self.randint(1, 3), 30), (30, 2), (self.randint(1, 4), self.randint(1, 14), 9)])
        self.nodes, self.shapes = list[Node](), dict[str, torch.Size]()
        self.channels, *self.size = shape
        x = torch.randn(rows, examples, *shape)
        if len(shape) == 2 and self.random() < 0.5:
            self._sequence(*shape)
        for _ in range(self.randint(0, 3) if self.size else 0):
            self._convolution()
            self._rest()
            self._branches()
        if self.size:
            self.nodes.append(Flatten())
            self.channels *= torch.Size(self.size).numel()
            self.size = []
        for _ in range(self.choice([0, 0, 1, 2])):
            self._linear()
            self._rest()
            self._branches()
        self._linear()
        shapes = dict(self.sample(list(self.shapes.items()), len(self.shapes)))  # a row has them in any order
        return self.told(Images, self.nodes, shapes, x, self.channels)  # type: ignore[return-value]

    def _sequence(self, places: int, channels: int) -> None:
        """Layers of vectors, attention among them, and one vector at the end."""
        self.channels, self.size = channels, []
        self._linear()
        for _ in range(self.randint(0, 3)):
            begin, before = len(self.nodes) - 1, self.channels
            if self.random() < 0.5:
                weight, bias = self._parameters((self.channels,), self.random() < 0.7)
                self.nodes.append(LayerNorm(self.choice([None, weight]), bias, 0.1))
                if self.nodes[-1] == LayerNorm(None, bias, 0.1):
                    del self.shapes[weight]
            elif self.random() < 0.5:
                weight, _ = self._parameters((self.channels,), False)
                self.nodes.append(RMSNorm(weight, 0.1))
            if self.random() < 0.5:
                weight, _ = self._parameters((places, self.channels), False)
                self.nodes.append(Shift(weight))
            if self.random() < 0.7:
                heads, size = self.randint(1, 3), self.choice([1, 2, 5, 8, 16, 17, 70])
                self.nodes.append(Linear(*self._parameters((3 * heads * size, self.channels), True)))
                self.nodes.append(Attention(heads))
                self.nodes.append(Linear(*self._parameters((before, heads * size), True)))
            else:
                self.nodes.append(Activate(self.choice(list(FUNCTIONS))))
            if self.random() < 0.5 and begin < len(self.nodes) - 1:
                self.nodes.append(Sum(begin))
        mean = self.random() < 0.5
        self.nodes.append(MeanOfPlaces() if mean else Flatten())
        self.channels *= 1 if mean else places

    def _parameters(self, weight: tuple[int, ...], biased: bool) -> tuple[str, str | None]:
        name = f"{len(self.nodes)}"
        self.shapes[f"{name}.w"] = torch.Size(weight)
        if biased:
            self.shapes[f"{name}.b"] = torch.Size(weight[:1])
        return f"{name}.w", f"{name}.b" if biased else None

    def _window(self, most: int) -> tuple[tuple[int, int], ...]:
        """A window that fits into the signal, strides and paddings of at most half a window."""
        size = self.size if len(self.size) == 2 else [1, *self.size]
        one = len(self.size) == 1
        kernel = tuple(1 if one and not i else self.randint(1, min(most, s)) for i, s in enumerate(size))
        stride = tuple(1 if one and not i else self.randint(1, 3) for i in range(2))
        padding = tuple(0 if one and not i else self.randint(0, k // 2) for i, k in enumerate(kernel))
        after = [(s + 2 * p - k) // t + 1 for s, k, t, p in zip(size, kernel, stride, padding, strict=True)]
        self.size = after[1:] if one else after
        return kernel, stride, padding  # type: ignore[return-value]

    def _convolution(self) -> None:
        out = self.choice(SIZES)
        one = len(self.size) == 1
        kernel, stride, padding = self._window(5)
        weight, bias = self._parameters((out, self.channels, *kernel[one:]), self.random() < 0.7)
        self.nodes.append(Conv(weight, bias, stride, padding, (1, 1), 1))
        self.channels = out

    def _linear(self) -> None:
        out = self.choice(SIZES)
        self.nodes.append(Linear(*self._parameters((out, self.channels), self.random() < 0.7)))
        self.channels = out

    def _rest(self) -> None:
        """What may follow: norms, activations, pools."""
        if self.random() < 0.5:
            groups = self.choice([g for g in range(1, self.channels + 1) if self.channels % g == 0])
            weight, bias = self._parameters((self.channels,), True) if self.random() < 0.7 else (None, None)
            self.nodes.append(GroupNorm(groups, weight, bias, 0.1))
        for _ in range(self.choice([0, 1, 1, 2])):
            self.nodes.append(Activate(self.choice(list(FUNCTIONS))))
        if self.size and self.random() < 0.5:
            self.nodes.append(Pool(self.choice(["max", "average"]), *self._window(3)))

    def _branches(self) -> None:
        """Ways from the last result that keep its shape, one after another or into each other, and their sum."""
        begin, ends = len(self.nodes) - 1, list[int]()
        for _ in range(self.choice([0, 0, 2, 3])):
            if ends:
                self.nodes.append(Take(self.choice([begin, begin, ends[-1]])))
            if not self.size:
                self.nodes.append(Linear(*self._parameters((self.channels, self.channels), True)))
            elif self.random() < 0.8:
                one = len(self.size) == 1
                kernel = [1, 1] if one else [2 * self.randint(0, 2) + 1, 2 * self.randint(0, 1) + 1]
                weight, bias = self._parameters((self.channels, self.channels, *kernel[one:]), self.random() < 0.7)
                self.nodes.append(Conv(weight, bias, (1, 1), (kernel[0] // 2, kernel[1] // 2), (1, 1), 1))
            else:
                self.nodes.append(Pool("average", (1, 1), (1, 1), (0, 0)))
            if self.random() < 0.5:
                self.nodes.append(Activate(self.choice(list(FUNCTIONS))))
            ends.append(len(self.nodes) - 1)
        for end in ends[:-1]:
            self.nodes.append(Sum(end))
        if ends and self.random() < 0.5:
            self.nodes.append(Sum(begin))
            self.nodes += [Activate(self.choice(list(FUNCTIONS)))] * self.randint(0, 1)

    def _tensor(self, d: Description, name: str) -> str | None:
        if name != "inputs":
            return super()._tensor(d, name)
        t = d.inputs
        rows, examples, channels, *size = t.shape
        if isinstance(d.layers[0], Linear) and size:  # [R, N, places, values], of any places where their mean is next
            other = [channels, size[0] + self.choice([-1, 1, 7])]
        else:
            other = [channels + self.choice([-1, 1, 7]), *size]
        ways: list[Callable[[], object]] = [
            t.double,
            t.long,
            lambda: t.to("meta"),
            t.to_sparse,
            t.tolist,
            t.flatten,
            lambda: t[None, None, None],
            lambda: t.new_zeros(rows, examples, *other),
            lambda: t.new_zeros(rows + 7, examples, channels, *size),
        ]
        if t.numel():
            ways.append(lambda: self._without_memory(t))
        d.inputs = self.choice(ways)()  # type: ignore[assignment]
        return "inputs, targets, model"  # of more rows, the second; of other channels, the third

    def _overlap(self, d: Description, name: str) -> str | None:
        if name == "inputs" and isinstance(d.layers[0], Linear) and d.inputs.dim() == 4:
            return None  # of sequences the kernel reads a copy
        return super()._overlap(d, name)

    def _layers(self, d: Description, _: str) -> str:
        nodes: list[Any] = d.layers
        i = self.choice([i for i, node in enumerate(nodes) if isinstance(node, Conv | Linear)])
        named = [name for node in nodes[:i] + nodes[i + 1 :] for name in _names(node)] + ["none"]
        ways: list[list[Any]] = [
            [],
            nodes[:i] + nodes[i + 1 :],
            nodes * 2,
            nodes + [Activate("relu")] * 600,
            [*nodes, "relu"],
            [*nodes, Activate("softplus")],
            [*nodes, Reshape((d.targets.shape[-1],))],
            [GroupNorm(1, None, None, 0.1), *nodes],
            [*nodes, *nodes[i : i + 1]],
            self._with(d, i, replace(nodes[i], weight=self.choice(named))),
            *([*nodes, kind(step)] for kind in (Take, Sum) for step in (len(nodes), 2**62, -2)),
            [*nodes, Take(0.0)],  # type: ignore[arg-type]
            [*nodes[:i], Sum(-1), *nodes[i:]],
            [*nodes, Activate("relu"), Take(len(nodes) - 1)],
        ]
        for kind in (Conv, Pool, GroupNorm, Attention):
            for j in (j for j, node in enumerate(nodes) if isinstance(node, kind)):
                ways += [self._with(d, j, wrong) for wrong in self._wrong(nodes[j])]
        d.layers = self.choice(ways)
        return "model, inputs, targets, kernel, stride, padding, groups, heads, eps, step"

    def _wrong(self, node: Any) -> list[Any]:
        if isinstance(node, GroupNorm):
            groups = [replace(node, groups=groups) for groups in (0, -1, 7 * 13, 2**62)]
            return [*groups, *(replace(node, eps=eps) for eps in (-1.0, float("nan")))]
        if isinstance(node, Attention):
            return [replace(node, heads=heads) for heads in (0, -1, 2**62, 7 * 13)]
        sizes: list[Any] = [(0, 1), (-1, 1), (1, 2**62), (1.0, 1)]
        wrong: list[Any] = [replace(node, stride=size) for size in sizes if size != (1, 2**62)]
        wrong += [replace(node, padding=size) for size in ((-1, 0), (0, 2**62))]
        if isinstance(node, Pool):
            return [*wrong, *(replace(node, kernel=size) for size in sizes), replace(node, kind="least")]
        return [*wrong, replace(node, dilation=(2, 1)), replace(node, groups=2)]

    def _shapes(self, d: Description, _: str) -> str:
        super()._shapes(d, _)
        return "model, inputs, targets, start, kernel"


def _names(node: Node) -> list[str]:
    return [name for name in (getattr(node, part, None) for part in ("weight", "bias")) if name]


def _another_height(gradient: RowGradient) -> None:
    gradient.layers[0].height += 1


def _wide_stride(gradient: RowGradient) -> None:
    gradient.layers[0].stride_height = 2**62


def _more_channels(gradient: RowGradient) -> None:
    gradient.layers[0].outputs += 64


def _padded(gradient: RowGradient) -> None:
    gradient.layers[2].pad_width -= 1


BEHIND_THE_CHECKS: dict[str, Callable[[RowGradient], None]] = {
    "inputs": shorter("inputs"),
    "targets": shorter("targets"),
    "weights": shorter("weights"),
    "parameters": fewer_parameters,
    "block": larger_blocks,
    "height": _another_height,
    "stride": _wide_stride,
    "channels": _more_channels,
    "padding": _padded,
    "order": more_examples,
}


def _make(name: str) -> None:
    """The mistake of that name, and then a call."""
    shapes = {"w": (9, 2, 3, 3), "g": (9,), "s": (9,), "v": (5, 81)}
    gradient = ImageGradient.of(
        [
            Conv("w", None, (2, 2), (1, 1), (1, 1), 1),
            GroupNorm(3, "g", "s", 1e-5),
            Pool("average", (3, 3), (1, 1), (1, 1)),
            Flatten(),
            Linear("v", None),
        ],
        {name: torch.Size(shape) for name, shape in shapes.items()},
        torch.randn(2, 20, 2, 6, 6),
        torch.full((2, 20, 5), 0.2),
        torch.rand(2, 20),
    )
    BEHIND_THE_CHECKS[name](gradient)
    call(gradient, torch.randn(2, gradient.parameters), name)


if __name__ == "__main__":
    main(RandomImages, {name: partial(ends, name, partial(_make, name)) for name in BEHIND_THE_CHECKS})
