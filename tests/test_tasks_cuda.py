"""Tasks on a GPU are those of the CPU, and give what they give there. Skipped where there is none."""

import pytest
import torch
import torch.nn.functional as F

from fobmaml import TaskBatch, meta_gradient
from fobmaml.estimators import Symmetric
from fobmaml.models import MLP
from fobmaml.solvers import GradientDescent
from fobmaml.tasks import FewShot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (200, 6, 6), generator=generator).to(torch.uint8), torch.arange(200) // 10


@pytest.mark.parametrize("transform", [None, torch.neg])
def test_tasks_are_gathered_there(transform):
    here = FewShot(*_images(), ways=3, shots=2, queries=4, rotations=True, transform=transform)
    there = here.to("cuda")
    for split in ("train", "validation", "test"):
        one, other = (source.sample(split, 20, torch.Generator().manual_seed(1)) for source in (here, there))
        assert other.support_x.is_cuda
        assert other.query_y.is_cuda
        for name, tensor in one.tensors().items():
            torch.testing.assert_close(other.tensors()[name].cpu(), tensor)


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda o, y: F.cross_entropy(o, y).sqrt()])
def test_masked_tasks(loss):
    generator = torch.Generator().manual_seed(0)

    def part(n):
        return torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)

    batch = TaskBatch.padded([(*part(s), *part(q)) for s, q in ((3, 5), (4, 2))])
    torch.manual_seed(0)
    model, estimator = MLP((5,), 3, width=4, depth=1).double(), Symmetric(GradientDescent(3, 0.1))
    wanted = meta_gradient(estimator, model, loss, batch, support_loss=F.cross_entropy)
    found = meta_gradient(estimator, model.cuda(), loss, batch.to("cuda"), support_loss=F.cross_entropy)
    for name, gradient in wanted.gradient.items():
        torch.testing.assert_close(found.gradient[name].cpu(), gradient, rtol=1e-9, atol=1e-12)
