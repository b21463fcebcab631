"""Float32 computations keep all their digits, whatever a process allows elsewhere; its settings stay its own."""

import random
import threading

import pytest
import torch
from torch import backends

from fobmaml import precision
from fobmaml.estimators import Symmetric
from fobmaml.models import MLP
from fobmaml.precision import full_precision
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import Sinusoid

NEWER = bool(precision._OPERATIONS)


def _read(call):
    try:
        return call()
    except RuntimeError:  # older and newer settings contradict each other
        return "contradictory"


def _settings() -> list:
    return [
        _read(torch.get_float32_matmul_precision),
        _read(lambda: backends.cuda.matmul.allow_tf32),
        _read(lambda: backends.cudnn.allow_tf32),
        *(place.fp32_precision for place in precision._GROUPS + precision._OPERATIONS),
    ]


@pytest.fixture(autouse=True)
def _left_as_found():
    before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    yield
    for place in precision._GROUPS + precision._OPERATIONS:
        place.fp32_precision = "none"
    torch.set_float32_matmul_precision(before[0])
    backends.cudnn.allow_tf32 = before[1]


def test_settings_are_put_back_whatever_they_were():
    choose = random.Random(0)
    changes = [lambda v=v: torch.set_float32_matmul_precision(v) for v in ("highest", "high", "medium")]
    changes += [lambda v=v: setattr(backends.cudnn, "allow_tf32", v) for v in (True, False)]
    changes += [
        lambda p=p, v=v: setattr(p, "fp32_precision", v)
        for v in ("none", "ieee", "tf32")
        for p in precision._GROUPS + precision._OPERATIONS
    ]
    for _ in range(500):
        choose.choice(changes)()
        before = _settings()
        with full_precision("cpu"):
            inside = _settings()
            assert inside[:2] == ["highest", False]
            assert {place.fp32_precision for place in precision._OPERATIONS} == ({"ieee"} if NEWER else set())
            with full_precision("cpu"):
                assert _settings() == inside
            assert _settings() == inside
        assert _settings() == before
        with pytest.raises(KeyError), full_precision("cpu"):
            raise KeyError
        assert _settings() == before


def test_threads_that_overlap_share_one_change():
    torch.set_float32_matmul_precision("high")
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with full_precision("cpu"):
            first_is_in.set()
            second_is_in.wait(60)
        first_is_out.set()

    def second():
        first_is_in.wait(60)
        with full_precision("cpu"):
            second_is_in.set()
            first_is_out.wait(60)
            seen.append(torch.get_float32_matmul_precision())

    threads = [threading.Thread(target=call) for call in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == "high"


def test_autocast_is_off_inside_and_on_again_after():
    a = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with full_precision("cpu"):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_training_computes_in_full_precision_and_leaves_the_settings_alone():
    from test_training import meta_training

    seen = []

    class Source(Sinusoid):
        @staticmethod
        def loss_fn(outputs, targets):
            seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
            return (outputs - targets).square().mean()

    def path(steps=3):
        torch.manual_seed(0)
        training = meta_training(
            MLP((1,), 1),
            Source(),
            Symmetric(GradientDescent(2, 0.1)),
            steps=steps,
            bias_every=2,
            smoothness_every=2,
            curvature_every=2,
        )
        seen.clear()
        training.measure()
        list(training.train())
        training.measure(ended=True)
        return training.learner.theta()

    plain = path()
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = path()
    assert len(seen) > 20
    assert set(seen) == {("highest", False)}
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.equal(plain, mixed)
