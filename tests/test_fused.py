"""The compiled kernel: its gradients are autograd's, and nothing that does not fit reaches it."""

import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from fobmaml import Learner, TaskBatch
from fobmaml.engine import library
from fobmaml.engine.activations import ACTIVATIONS
from fobmaml.engine.fused import FusedGradient
from fobmaml.engine.layers import Convolution, Dense, lengths_taken
from fobmaml.engine.losses import Loss, Part
from fobmaml.engine.stacked import StackedNetwork
from fobmaml.estimators import Symmetric, estimate
from fobmaml.models import MLP, CNN1d
from fobmaml.solvers import GradientDescent, InnerProblem

SILU = ACTIVATIONS["silu"]


def _tasks(rows: int = 3, examples: int = 6, length: int = 40) -> TaskBatch:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, examples, length, generator=g), torch.randint(5, (rows, examples), generator=g)
    return TaskBatch(x, y, x, y)


@pytest.fixture(autouse=True)
def _seeded(used_memory):
    torch.manual_seed(0)


def _sizes(seed: int, *ranges: tuple[int, int]) -> list[int]:
    """Random numbers, one of each range, on both sides of all that the kernel cuts into blocks. Seeds torch, too."""
    torch.manual_seed(seed)
    choose = np.random.default_rng(seed)
    return [int(choose.integers(low, high)) for low, high in ranges]


@pytest.mark.parametrize("seed", range(12))
def test_compiled_gradients_equal_autograd(instructions, seed):
    """Every other time with saturated units."""
    ranges = (3, 50), (2, 60), (1, 120), (1, 5), (1, 6), (1, 140)
    length, outputs, width, depth, rows, examples = _sizes(seed, *ranges)
    if seed == 11:
        width, depth, examples = 230, 3, 110  # in the blocks of large layers
    model = (CNN1d if seed % 3 else MLP)((length,), outputs, width, depth)
    learner, precise = Learner(model, F.cross_entropy), Learner(model.double(), F.cross_entropy, engine="autograd")
    x, targets = torch.randn(rows, examples, length), torch.randint(outputs, (rows, examples))
    factor = torch.rand(rows)
    phi = precise.theta() * (1.0, 5.0)[seed % 2] + 0.1 * torch.randn(rows, precise.parameter_count)
    before = torch.randn(rows, precise.parameter_count)
    scale, step = ((0.0, 1.0), (0.9, -0.1))[seed // 2 % 2]
    found = []
    for which, dtype in ((learner, torch.float32), (precise, torch.float64)):
        loss = Loss(F.cross_entropy).rows(targets, [Part(slice(None), factor.to(dtype))])
        engine = which.engine_for(x.to(dtype), loss)
        if which is precise:
            found.append(scale * before + step * engine.gradient(phi))
            continue
        into = torch.full_like(before, torch.nan) if scale == 0.0 else before.clone()  # is not read
        engine.engine.kernel.add(phi.float(), None, into, scale, step)
        found.append(into)
        assert scale or torch.equal(engine.gradient(phi.float()), into)
    assert learner.used.startswith("fused-")
    assert precise.used == "autograd"
    assert (found[0] - found[1]).norm() <= 1e-5 * found[1].norm()


@pytest.mark.parametrize("seed", range(6))
def test_descent_on_mini_batches_equals_autograd(instructions, seed):
    """Random orders, examples taken twice among them, in several blocks; steps of their own lengths."""
    ranges = (3, 50), (2, 60), (1, 80), (1, 4), (1, 6), (1, 60), (1, 5), (1, 120)
    length, outputs, width, depth, rows, examples, times, chosen = _sizes(seed, *ranges)
    model = (CNN1d if seed % 3 else MLP)((length,), outputs, width, depth)
    precise = Learner(model.double(), F.cross_entropy, engine="autograd")
    x, targets = torch.randn(rows, examples, length), torch.randint(outputs, (rows, examples))
    order, weights = torch.randint(examples, (rows, times, chosen)), torch.rand(rows, times, chosen) / chosen
    theta = precise.theta().expand(rows, -1)
    scales, steps = torch.rand(2, times).tolist()
    wanted = torch.zeros(rows, precise.parameter_count, dtype=torch.float64)
    for t, (scale, step) in enumerate(zip(scales, steps, strict=True)):
        for r in range(rows):
            phi, which = (theta[r] + wanted[r]).requires_grad_(), order[r, t]
            output = precise.one_row(phi, x[r, which].double())
            loss = F.cross_entropy(output, targets[r, which], reduction="none") @ weights[r, t].double()
            wanted[r] = scale * wanted[r] - step * torch.autograd.grad(loss, phi)[0]
    learner = Learner(model.float(), F.cross_entropy)
    kernel = learner.engine_for(x, learner.row_loss(targets)).engine.kernel
    found = torch.zeros(rows, precise.parameter_count)
    kernel.add(theta.float(), found, found, scales, [-step for step in steps], times, order, weights)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("seed", range(12))
def test_compiled_hessian_products_equal_autograd(instructions, seed):
    """Every other time with saturated units."""
    ranges = (3, 50), (2, 60), (1, 90), (1, 4), (1, 4), (1, 90)
    length, outputs, width, depth, rows, examples = _sizes(seed, *ranges)
    if seed == 11:
        length, width, depth, examples = 40, 230, 2, 60  # in the blocks of large layers
    model = (CNN1d if seed % 3 else MLP)((length,), outputs, width, depth if seed else 0)
    learner, precise = Learner(model, F.cross_entropy), Learner(model.double(), F.cross_entropy, engine="autograd")
    x, targets = torch.randn(rows, examples, length), torch.randint(outputs, (rows, examples))
    phi = precise.theta().float() * (1.0, 3.0)[seed % 2] + 0.1 * torch.randn(rows, precise.parameter_count)
    v, parts = torch.randn_like(phi), [Part(slice(None), torch.rand(rows))]
    loss = Loss(F.cross_entropy)
    engine = learner.engine_for(x, loss.rows(targets, parts), second_order=True)
    assert learner.used.startswith("fused-")
    gradient, product = engine.linearize(moved := phi.clone())
    moved.zero_()  # is not read again
    exact = precise.engine_for(x.double(), loss.rows(targets, parts), second_order=True)
    gradient_wanted, product_wanted = exact.linearize(phi.double())
    for found, wanted in ((gradient, gradient_wanted), (product(v), product_wanted(v.double()))):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    u = torch.randn_like(phi)
    torch.testing.assert_close((u * product(v)).sum(1), (v * product(u)).sum(1), rtol=1e-3, atol=1e-4)
    lying = phi.mT.contiguous().mT  # otherwise in memory
    engine.engine.kernel.linearize(lying, torch.empty_like(v)).add(u, into := v.clone(), 0.5, -0.1)
    wanted = 0.5 * v - 0.1 * product_wanted(u.double())
    assert (into - wanted).norm() <= 1e-5 * wanted.norm()
    assert torch.equal(engine.gradient(phi), gradient)


def test_an_order_of_all_examples_is_the_whole_gradient(instructions):
    given = _given()
    wanted = _add(given | {"into": torch.zeros(2, 25)})
    order = torch.arange(3).flip(0).expand(2, 1, 3)
    weights = given["weights"][:, order[0, 0]].unsqueeze(1)
    found = _add(given | {"weights": torch.full((2, 3), torch.nan), "order": order, "chosen_weights": weights})
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_compiled_gradients_do_not_depend_on_threads_and_tasks_at_once(instructions):
    learner, tasks = Learner(CNN1d((40,), 5, width=20), F.cross_entropy), _tasks().to(dtype=torch.float32)
    found = []
    for threads, chunk in ((1, 1), (1, 3), (2, 3), (5, 3)):
        torch.set_num_threads(threads)
        found.append(estimate(Symmetric(GradientDescent()), learner, learner.theta(), tasks, chunk).gradient)
    assert learner.used.startswith("fused-")
    assert all(torch.equal(found[1], other) for other in found[2:])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)  # the sum over tasks is in other parts


def test_a_network_that_overflows_is_not_finite(instructions):
    learner, tasks = Learner(CNN1d((40,), 5, width=20), F.cross_entropy), _tasks().to(dtype=torch.float32)
    for value in (torch.nan, torch.inf, 1e30):
        rows = (learner.theta() * value).expand(len(tasks), -1)
        assert not InnerProblem(learner, rows, tasks, 1.0).gradient(rows).isfinite().all()


def test_the_kernel_is_for_what_it_knows(monkeypatch):
    def is_fused(model, **options):
        learner = Learner(model, F.cross_entropy, **options)
        x, y = torch.randn(2, 3, 40, dtype=learner.dtype), torch.zeros(2, 3, dtype=torch.long)
        learner.engine_for(x, learner.row_loss(y))
        return learner.used.startswith("fused-")

    model = CNN1d((40,), 5, width=4)
    assert is_fused(model) == (library.kernel() is not None)
    assert not is_fused(model, engine="stacked")
    assert not is_fused(model, engine="autograd")
    assert not is_fused(CNN1d((40,), 5, width=4, activation="tanh"))
    assert not is_fused(CNN1d((40,), 5, width=4).double())
    monkeypatch.setattr(library, "instructions", lambda: "default")
    library.kernel.cache_clear()
    assert not is_fused(model)
    library.kernel.cache_clear()


# the boundary

WRONG_INPUTS = [
    (CNN1d((40,), 5, 32), (4000,), "[examples, 4000]: takes [examples, 35 to 42]"),
    (CNN1d((40,), 5, 8), (60,), "[examples, 60]: takes [examples, 35 to 42]"),
    (CNN1d((40,), 5, 8), (20,), "[examples, 20]: takes [examples, 35 to 42]"),
    (CNN1d((40,), 5, 8), (34,), "[examples, 34]: takes [examples, 35 to 42]"),
    (CNN1d((40,), 5, 8), (43,), "[examples, 43]: takes [examples, 35 to 42]"),
    (CNN1d((40,), 5, 8, depth=1), (37,), "[examples, 37]: takes [examples, 39 to 40]"),
    (CNN1d((3,), 5, 8), (2,), "[examples, 2]: takes [examples, 3 to 10]"),
    (CNN1d((40,), 5, 8), (1,), "[examples, 1]: takes [examples, 35 to 42]"),
    (CNN1d((40,), 5, 8), (0,), "[examples, 0]: takes [examples, 35 to 42]"),
    (CNN1d((40,), 5, 8), (2, 20), "[examples, 2, 20]: takes [examples, 35 to 42]"),
    (CNN1d((40,), 5, 8), (40, 1), "[examples, 40, 1]: takes [examples, 35 to 42]"),
    (CNN1d((40,), 5, 8), (), "[examples]: takes [examples, 35 to 42]"),
    (MLP((40,), 5, 8), (60,), "[examples, 60]: takes 40 values an example"),
    (MLP((40,), 5, 8), (2, 21), "[examples, 2, 21]: takes 40 values an example"),
    (MLP((40,), 5, 8, depth=0), (), "[examples]: takes 40 values an example"),
    (MLP((40,), 5, 8), (0,), "[examples, 0]: takes 40 values an example"),
]


@pytest.mark.parametrize(("model", "example", "says"), WRONG_INPUTS)
@pytest.mark.parametrize("compiled", [True, False])
def test_inputs_of_another_shape_are_refused_in_the_same_words(model, example, says, compiled):
    """By the module itself and by engines, also after a right batch, with the kernel and without."""
    says, x = f"^{re.escape('inputs=' + says)}$", torch.randn(3, 6, *example)
    for call in (lambda: model(x[0]), lambda: torch.vmap(model)(x)):
        with pytest.raises(ValueError, match=says):
            call()
    learner = Learner(model, F.cross_entropy, engine="auto" if compiled else "stacked")
    rows, tasks = learner.theta().expand(3, -1), _right(model)
    loss = learner.row_loss(tasks.support_y)
    learner.engine_for(tasks.support_x, loss).gradient(rows)
    with pytest.raises(ValueError, match=says):
        learner.engine_for(x, loss).gradient(rows)


def _right(model) -> TaskBatch:
    return _tasks(length=model.lengths[-1] if isinstance(model, CNN1d) else 40)


def test_other_lengths_of_as_many_places_are_right():
    for length, depth in ((40, 3), (17, 6), (3, 4), (40, 1)):
        model = CNN1d((length,), 5, 4, depth)
        for other in range(1, 50):
            if other in model.lengths:
                assert model(torch.randn(2, other)).shape == (2, 5)
            else:
                with pytest.raises(ValueError, match=r"^inputs="):
                    model(torch.randn(2, other))
        assert length in model.lengths


def test_a_module_takes_what_its_docstring_says():
    x = torch.randn(3, 6, 2, 20)
    model = MLP((2, 20), 5, 8)
    assert torch.equal(model(x[0]), model(x[0].flatten(1)))
    assert MLP((), 5)(torch.randn(6)).shape == (6, 5)  # a number an example
    assert model(x[0, :0]).shape == (0, 5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CNN1d((40,), 0), "outputs=0"),
        (lambda: MLP((40,), 0), "outputs=0"),
        (lambda: MLP((4, 0), 5), "input_shape=0"),
        (lambda: Convolution("w", "b", 0, None), "stride=0"),
        (lambda: Convolution("w", "b", 1.5, None), "stride=1.5"),
    ],
)
def test_networks_of_no_size_are_refused(make, says):
    with pytest.raises(ValueError, match=f"^{says}: takes a whole number of at least 1"):
        make()


def _layers(*kinds, **shapes) -> tuple[list, dict]:
    """C3/2: a convolution of kernel size three and stride two, D: a dense layer; shapes of w0, b0, w1, ..."""
    layers = [
        Dense(f"w{i}", f"b{i}", SILU if i < len(kinds) - 1 else None)
        if kind == "D"
        else Convolution(f"w{i}", f"b{i}", int(kind[1:]), SILU)
        for i, kind in enumerate(kinds)
    ]
    return layers, {name: torch.Size(shape) for name, shape in shapes.items()}


def _tied():
    layers, shapes = _layers("D", "D", "D", w0=(4, 4), b0=(4,), w1=(4, 4), b1=(4,), w2=(5, 4), b2=(5,))
    return [layers[0], layers[0], layers[2]], {name: shapes[name] for name in ("w0", "b0", "w2", "b2")}


def _without(name):
    layers, shapes = _layers("D", w0=(5, 4), b0=(5,))
    del shapes[name]
    return layers, shapes


WRONG_NETWORKS = {
    "no layer": ([], {}),
    "a parameter twice": _tied(),
    "a parameter without shape": _without("b0"),
    "a parameter of no layer": _layers("D", w0=(5, 4), b0=(5,), scale=(1,)),
    "a bias of another length": _layers("D", w0=(5, 4), b0=(4,)),
    "a weight without inputs": _layers("D", w0=(5,), b0=(5,)),
    "no outputs": _layers("D", w0=(0, 4), b0=(0,)),
    "more than memory": _layers("D", w0=(2**62, 16), b0=(2**62,)),
    "dense layers that do not follow": _layers("D", "D", w0=(3, 4), b0=(3,), w1=(5, 4), b1=(5,)),
    "channels that do not follow": _layers(
        "C1", "C1", "D", w0=(3, 3, 1), b0=(3,), w1=(3, 3, 2), b1=(3,), w2=(5, 12), b2=(5,)
    ),
    "no whole number of places": _layers("C1", "D", w0=(3, 3, 1), b0=(3,), w1=(5, 10), b1=(5,)),
    "a convolution at the end": _layers("C1", w0=(3, 3, 1), b0=(3,)),
    "a convolution after a dense layer": _layers(
        "D", "C1", "D", w0=(3, 4), b0=(3,), w1=(3, 3, 3), b1=(3,), w2=(5, 3), b2=(5,)
    ),
    "two-dimensional kernel": _layers("C1", "D", w0=(3, 3, 3, 1), b0=(3,), w1=(5, 12), b1=(5,)),
    "windows longer than any signal": _layers("C1", "D", w0=(3, 1, 1), b0=(3,), w1=(5, 3), b1=(5,)),
}


@pytest.mark.parametrize("case", WRONG_NETWORKS)
def test_layers_that_are_no_network_are_refused_with_the_kernel_and_without(case):
    layers, shapes = WRONG_NETWORKS[case]
    x, targets = torch.randn(2, 3, 4, 1), torch.full((2, 3, 5), 0.2)
    for make in (
        lambda: StackedNetwork(layers, shapes, x),
        lambda: FusedGradient(layers, shapes, x, targets, torch.ones(2, 3)),
    ):
        with pytest.raises(ValueError, match=r"^(model|inputs)=.*: takes "):
            make()


def test_the_lengths_taken_are_those_that_convolutions_leave_alike():
    for kernel_size, stride in ((1, 1), (3, 1), (3, 2), (5, 2), (7, 3), (2, 5)):
        for length in range(max(kernel_size - 2, 1), 30):
            kernel = torch.zeros(1, 1, kernel_size)
            places = F.conv1d(torch.zeros(1, 1, length), kernel, stride=stride, padding=1).shape[2]
            layers, shapes = _layers(f"C{stride}", "D", w0=(3, kernel_size, 1), b0=(3,), w1=(5, 3 * places), b1=(5,))
            found = lengths_taken(layers, shapes)
            wanted = [
                other
                for other in range(max(kernel_size - 2, 1), 60)
                if F.conv1d(torch.zeros(1, 1, other), kernel, stride=stride, padding=1).shape[2] == places
            ]
            assert list(found) == wanted


def _order(order, shape=None) -> dict:
    return {"order": order, "chosen_weights": torch.zeros(shape or order.shape)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": torch.randn(2, 3, 4, 1, dtype=torch.float64)}, "inputs=torch.float64"),
        ({"inputs": torch.ones(2, 3, 4, 1, dtype=torch.long)}, "inputs=torch.int64"),
        ({"inputs": torch.randn(2, 3, 4, 1, device="meta")}, "inputs=torch.float32 (2, 3, 4, 1) on meta"),
        ({"inputs": torch.randn(2, 3, 5, 1)}, "inputs="),
        ({"inputs": torch.randn(2, 3, 4)}, "inputs="),
        ({"inputs": [[1.0]]}, "inputs=list"),
        ({"inputs": torch.randn(2, 3, 4, 1).to_sparse()}, "inputs="),
        ({"targets": torch.zeros(2, 3, 2)}, "targets=torch.float32 (2, 3, 2)"),
        ({"targets": torch.zeros(2, 3)}, "targets="),
        ({"targets": torch.zeros(2, 4, 5)}, "targets="),
        ({"targets": torch.zeros(1, 3, 5)}, "targets="),
        ({"targets": torch.zeros(2, 3, 5, dtype=torch.long)}, "targets=torch.int64"),
        ({"weights": torch.ones(2, 4)}, "weights="),
        ({"weights": torch.ones(2, 3, 2)}, "weights="),
        ({"weights": torch.ones(2, 3).double()}, "weights=torch.float64"),
        ({"start": torch.zeros(2, 24)}, "start="),
        ({"start": torch.zeros(3, 25)}, "start="),
        ({"start": torch.zeros(25)}, "start="),
        ({"start": torch.zeros(2, 25).double()}, "start=torch.float64"),
        ({"into": torch.zeros(2, 26)}, "into="),
        ({"into": torch.zeros(1, 25)}, "into="),
        ({"into": None}, "into=NoneType"),
        ({"into": torch.zeros(2, 25).double()}, "into="),
        ({"into": torch.zeros(25, 2).mT}, "into=strides (1, 2)"),
        ({"into": torch.zeros(1, 25).expand(2, 25)}, "into=strides (0, 1)"),
        ({"displacement": torch.zeros(2, 24)}, "displacement="),
        ({"displacement": torch.zeros(25, 2).mT}, "displacement="),
        ({"along": torch.zeros(1, 25)}, "along="),
        ({"along": torch.zeros(2, 25).double()}, "along=torch.float64"),
        ({"along": torch.zeros(25, 2).mT}, "along=strides (1, 2)"),
        ({"along": torch.zeros(2, 25), "scale": float("nan")}, "scale=nan"),
        ({"along": torch.zeros(2, 25), "step": 1e39}, "step=1e+39"),
        ({"along": torch.zeros(2, 25), "into": torch.zeros(2, 26)}, "into="),
        ({"times": 0}, "times=0"),
        ({"times": 2**64 + 1}, "times="),
        ({"times": 1.0}, "times=1.0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"step": float("inf")}, "step=inf"),
        ({"step": 1e39}, "step=1e+39"),
        ({"scale": [1.0, 1.0]}, "scale=2 numbers"),
        ({"step": [float("nan")]}, "step=nan"),
        ({"order": torch.zeros(2, 1, 4, dtype=torch.long)}, "weights=NoneType"),
        ({"chosen_weights": torch.zeros(2, 1, 4)}, "order=NoneType"),
        (_order(torch.zeros(2, 1, 4)), "order=torch.float32"),
        (_order(torch.zeros(2, 1, 4, dtype=torch.int32)), "order=torch.int32"),
        (_order(torch.zeros(2, 2, 4, dtype=torch.long)), "order=torch.int64 (2, 2, 4)"),
        (_order(torch.zeros(1, 1, 4, dtype=torch.long)), "order=torch.int64 (1, 1, 4)"),
        (_order(torch.zeros(2, 4, dtype=torch.long)), "order=(2, 4)"),
        (_order(torch.full((2, 1, 4), 3)), "order=3"),
        (_order(torch.full((2, 1, 4), -1)), "order=-1"),
        (_order(torch.zeros(2, 1, 4, dtype=torch.long), (2, 1, 3)), "weights=torch.float32 (2, 1, 3)"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_by_name(instructions, change, says):
    given = _given() | change
    with pytest.raises(ValueError, match=f"^{re.escape(says)}.*: takes "):
        _add(given)


def _given() -> dict:
    layers, shapes = _layers("D", w0=(5, 4), b0=(5,))
    return {
        "layers": layers,
        "shapes": shapes,
        "inputs": torch.randn(2, 3, 4, 1),
        "targets": torch.eye(5)[torch.randint(5, (2, 3))],
        "weights": torch.rand(2, 3),
        "start": torch.randn(2, 25),
        "displacement": None,
        "into": torch.zeros(2, 25),
        "scale": 1.0,
        "step": 1.0,
        "times": 1,
        "order": None,
        "chosen_weights": None,
        "along": None,
    }


def _add(given: dict) -> torch.Tensor:
    gradient = FusedGradient(*(given[name] for name in ("layers", "shapes", "inputs", "targets", "weights")))
    if given["along"] is None:
        told = ("start", "displacement", "into", "scale", "step", "times", "order", "chosen_weights")
        gradient.add(*(given[name] for name in told))
    else:
        hessian = gradient.linearize(given["start"], torch.zeros(len(given["inputs"]), 25))
        hessian.add(*(given[name] for name in ("along", "into", "scale", "step")))
    return given["into"]


@pytest.mark.parametrize("name", ["inputs", "targets", "weights", "start", "displacement", "along"])
def test_what_is_read_is_not_written(instructions, name):
    given = _given()
    memory = torch.zeros(100)
    given["into"] = memory[3:53].view(2, 25)
    shape = (2, 25) if name in ("displacement", "along") else given[name].shape
    given[name] = memory[: math.prod(shape)].view(shape)
    with pytest.raises(ValueError, match=f"^into=memory of {name}: takes memory of its own"):
        _add(given)


@pytest.mark.parametrize("name", ["inputs", "targets", "weights", "start", "into"])
def test_memory_that_was_given_back_is_not_read(instructions, name):
    given = _given()
    given[name].untyped_storage().resize_(given[name].nbytes - 4)
    with pytest.raises(ValueError, match=f"^{name}=a Tensor without memory"):
        _add(given)


def test_memory_that_is_given_back_later_is_not_read(instructions):
    given = _given()
    gradient = FusedGradient(*(given[name] for name in ("layers", "shapes", "inputs", "targets", "weights")))
    given["inputs"].resize_(1, 1)  # the kernel's are what they were
    gradient.add(given["start"], None, given["into"], 0.0, 1.0)
    assert given["into"].isfinite().all()
    given["inputs"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^inputs=a Tensor without memory"):
        gradient.add(given["start"], None, given["into"], 0.0, 1.0)


def test_a_network_that_the_kernel_does_not_know_is_refused(instructions):
    given = _given()
    for activation in (ACTIVATIONS["tanh"], SILU):
        with pytest.raises(ValueError, match=r"^model=1 layers: takes at most 512, with SiLU after all but the last"):
            _add(given | {"layers": [Dense("w0", "b0", activation)]})
    deep = MLP((4,), 5, width=1, depth=600)
    learner = Learner(deep, F.cross_entropy)
    x, y = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    learner.engine_for(x, learner.row_loss(y))
    assert learner.used == "stacked"


def _odd(t):
    memory = bytearray(4 * t.numel() + 1)
    memory[1:] = t.numpy().tobytes()
    return torch.frombuffer(memory, dtype=torch.float32, offset=1).view(t.shape)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "at an odd address": _odd,
    "negated when read": lambda t: torch.complex(t, -t).conj().imag,
    "with a gradient": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["inputs", "targets", "weights", "start"])
def test_however_numbers_lie_in_memory(instructions, layout, name):
    given = _given()
    wanted = _add(given | {"into": torch.zeros(2, 25)})
    assert torch.equal(_add(given | {name: LAYOUTS[layout](given[name])}), wanted)
    assert wanted.any()
    given |= {"along": torch.randn(2, 25), "scale": 0.0}
    product = _add(given | {"into": torch.zeros(2, 25)})
    assert torch.equal(_add(given | {name: LAYOUTS[layout](given[name])}), product)
    assert product.any()


def test_one_row_for_all_and_expanded_inputs(instructions):
    given = _given()
    start, x = given["start"][:1], given["inputs"][:, :1].expand(2, 3, 4, 1)
    wanted = _add(given | {"start": start.repeat(2, 1), "inputs": x.contiguous(), "into": torch.zeros(2, 25)})
    for one in (start, start.expand(2, 25)):
        assert torch.equal(_add(given | {"start": one, "inputs": x, "into": torch.zeros(2, 25)}), wanted)
    weights = given["weights"].unsqueeze(-1)
    assert torch.equal(_add(given | {"start": start, "inputs": x, "weights": weights}), wanted)


@pytest.mark.parametrize(("rows", "examples"), [(0, 3), (2, 0), (0, 0)])
def test_no_rows_and_no_examples(instructions, rows, examples):
    into = torch.full((rows, 25), 2.0)
    given = _given() | {
        "inputs": torch.zeros(rows, examples, 4, 1),
        "targets": torch.zeros(rows, examples, 5),
        "weights": torch.zeros(rows, examples),
        "start": torch.zeros(1, 25),
        "into": into,
    }
    assert torch.equal(_add(given | {"scale": 0.5, "times": 2}), torch.full((rows, 25), 0.5))
    into.fill_(torch.nan)
    assert torch.equal(_add(given | {"scale": 0.0}), torch.zeros(rows, 25))
    network = StackedNetwork(given["layers"], given["shapes"], given["inputs"])
    for w in network.parameters:
        w.zero_()
    packed = [torch.full_like(w, 2.0) for w in network.parameters]
    network.add_gradient(network.outputs(), packed, 0.5)
    assert all((part == 1.0).all() for part in packed)


def test_what_is_not_a_number_stays_in_its_row(instructions):
    given = _given()
    given["inputs"][0, 1, 2] = torch.nan
    found = _add(given)
    assert not found[0].isfinite().all()
    assert found[1].isfinite().all()


def test_stacked_passes_refuse_what_they_would_repeat_or_convert():
    layers, shapes = _layers("D", w0=(5, 4), b0=(5,))
    network = StackedNetwork(layers, shapes, torch.randn(2, 3, 4, 1))
    folded = {"w0": torch.randn(2, 5, 4), "b0": torch.randn(2, 5)}
    network.pack(folded, network.parameters)
    network.outputs()
    with pytest.raises(ValueError, match=r"^g=\(2, 3, 1\): takes a tensor like the outputs"):
        network.add_gradient(torch.ones(2, 3, 1), network.pack(folded))
    with pytest.raises(ValueError, match=r"^packed=.*: takes a list like parameters"):
        network.add_gradient(torch.ones(2, 3, 5), [])
    with pytest.raises(ValueError, match=r"^inputs=torch.float32 on cpu: takes the dtype and device of w0"):
        network.pack({name: part.double() for name, part in folded.items()}, network.parameters)
    with pytest.raises(ValueError, match=r"^inputs=torch.int64 "):
        StackedNetwork(layers, shapes, torch.ones(2, 3, 4, 1, dtype=torch.long))


def test_refusals_are_no_assertions():
    """Under ``python -O``, after a batch that is right."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "scripts")!r}]
import test_fused as t
refused = 0
for model, example, says in t.WRONG_INPUTS:
    learner = t.Learner(model, t.F.cross_entropy)
    rows, tasks = learner.theta().expand(3, -1), t._right(model)
    loss = learner.row_loss(tasks.support_y)
    learner.engine_for(tasks.support_x, loss).gradient(rows)
    try:
        learner.engine_for(t.torch.randn(3, 6, *example), loss).gradient(rows)
    except ValueError as error:
        refused += str(error) == "inputs=" + says
for change in ({{"targets": t.torch.zeros(2, 3, 2)}}, {{"into": t.torch.zeros(25, 2).mT}}, {{"times": 0}}):
    try:
        t._add(t._given() | change)
    except ValueError:
        refused += 1
print(refused, __debug__)
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.stdout == f"{len(WRONG_INPUTS) + 3} False\n", done.stdout + done.stderr


# whether it is there


COMPILED = {"x86_64": ("avx2", "avx512"), "aarch64": ("neon",), "arm64": ("neon",)}.get(platform.machine(), ())


def _compiler() -> str:
    if platform.system() not in ("Linux", "Darwin") or not COMPILED:
        pytest.skip("the kernel is for x86-64 and ARM, and setting up is tried on Linux and macOS")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("there is no C compiler")
    return compiler


@pytest.mark.parametrize("name", COMPILED)
def test_where_there_is_a_compiler_there_is_the_kernel(name):
    _compiler()
    assert find_spec(f"fobmaml.engine.fused_{name}"), "make setup has not compiled it"


def _setup_says(tmp_path, *, built: bool, **environment: str) -> str:
    """What ``make setup`` prints at its end, with the library as it is or without what was compiled."""
    recipe = subprocess.run(
        ["make", "-n", "-B", ".venv/complete", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    (line,) = (line for line in recipe.splitlines() if "missing" in line)
    line = line.replace(".venv/bin/python", sys.executable)
    source = ROOT / "src"
    if not built:
        source = shutil.copytree(source, tmp_path / "src", ignore=shutil.ignore_patterns("*.so"))
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(source)} | environment,
    )
    return done.stdout


def test_setting_up_says_when_the_kernel_was_not_compiled(tmp_path):
    compiler = _compiler()
    says = _setup_says(tmp_path, built=False, PATH="")
    if library.kernel() is not None:
        assert _setup_says(tmp_path, built=True) == ""
        assert f"there is no C compiler ({compiler})" in says
    assert says.startswith("no compiled kernel, so gradients take longer: ")
    assert says.count("\n") == 1
    if "avx2" in COMPILED:
        says = _setup_says(tmp_path / "again", built=False, ATEN_CPU_CAPABILITY="default")
        assert says.startswith("no compiled kernel, so gradients take longer: it is for processors with AVX2")


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_library_that_cannot_be_loaded_is_not_used(tmp_path, content):
    if library.instructions() not in COMPILED:
        pytest.skip("there is no kernel for what torch uses here")
    source = shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so"))
    (source / f"fobmaml/engine/fused_{library.instructions()}.so").write_bytes(content)
    code = "from fobmaml.engine import library; print(library.kernel(), library.missing())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(source)},
    )
    assert re.fullmatch(r"None .*\.so cannot be loaded\n", done.stdout)


# sanitizers


@pytest.mark.nightly
def test_descriptions_by_chance_under_sanitizers():
    """At every change .ci/run calls the script itself, with more of them."""
    _compiler()
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/sanitize_kernel.py"), "--count", "150"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=1200,
    )
    if "takes gcc with libasan" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    valid, invalid, caught = map(int, re.findall(r"(\d+) (?:valid|invalid|mistakes)", done.stdout))
    assert valid >= 150
    assert invalid >= 4 * 150
    assert caught >= 7
