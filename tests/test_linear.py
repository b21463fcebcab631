"""MINRES against dense linear algebra: eigenvalues of any sign, singular matrices, rows that end at different steps."""

import pytest
import torch
from torch import Tensor

from fobmaml.solvers import conjugate_gradients, minres

SIZE = 12


def _matrix(eigenvalues: list[float] | Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64)).Q
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, basis


def _product(matrices: Tensor):
    return lambda v: (matrices @ v.unsqueeze(-1)).squeeze(-1)


DEFINITE = torch.linspace(0.5, 3.0, SIZE)
INDEFINITE = torch.linspace(-2.0, 3.3, SIZE)
SINGULAR = torch.cat([torch.zeros(3), torch.linspace(-1.0, 2.3, SIZE - 3)])
FEW = torch.tensor([1.0, -2.0, 5.0]).repeat(SIZE // 3)


def test_rows_of_every_kind_at_once():
    g = torch.Generator().manual_seed(1)
    matrices = torch.stack([_matrix(e, i)[0] for i, e in enumerate((DEFINITE, INDEFINITE, SINGULAR, FEW, DEFINITE))])
    b = torch.randn(5, SIZE, generator=g, dtype=torch.float64)
    b[2] = matrices[2] @ b[2]  # in the range
    b[4] = 0.0
    found = minres(_product(matrices), b, 50, 1e-11)
    wanted = torch.stack([torch.linalg.pinv(m, rtol=1e-10) @ row for m, row in zip(matrices, b, strict=True)])
    torch.testing.assert_close(found.x, wanted, rtol=1e-8, atol=1e-8)
    assert (found.relative_residual <= 1e-11).all()
    true = (b - _product(matrices)(found.x)).norm(dim=1)
    assert (true[:4] <= 1e-9 * b[:4].norm(dim=1)).all()
    assert found.steps[3] == 3  # as many as there are different eigenvalues
    assert found.steps[4] == 0
    assert (found.steps[:3] > 3).all()
    assert found.negative_curvature.tolist() == [False, True, True, True, False]


def test_outside_the_range_it_is_the_least_residual():
    matrix, basis = _matrix(SINGULAR)
    b = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = minres(_product(matrix[None]), b, 60, 1e-12)
    outside = (basis[:, :3].T @ b[0]).norm()
    assert (b[0] - matrix @ found.x[0]).norm() == pytest.approx(float(outside), rel=1e-9)
    assert found.relative_residual.item() == pytest.approx(float(outside / b.norm()), rel=1e-9)
    assert found.x.norm() < 1e3
    assert found.steps.item() < 20
    nothing = minres(_product(torch.zeros(1, SIZE, SIZE, dtype=torch.float64)), b, 5, 1e-12)
    assert not nothing.x.any()
    assert nothing.relative_residual.item() == 1.0


@pytest.mark.parametrize("eigenvalues", [DEFINITE, INDEFINITE, SINGULAR])
def test_every_step_is_the_best_of_its_krylov_space(eigenvalues):
    matrix, _ = _matrix(eigenvalues)
    b = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    powers, lengths, last = [b[0]], [0.0], 1.0
    for steps in range(1, 8):
        krylov = torch.linalg.qr(torch.stack(powers, dim=1)).Q
        best = krylov @ torch.linalg.lstsq(matrix @ krylov, b[0]).solution
        found = minres(_product(matrix[None]), b, steps, 0.0)
        torch.testing.assert_close(found.x[0], best, rtol=1e-7, atol=1e-7)
        assert found.relative_residual.item() == pytest.approx(
            float((b[0] - matrix @ best).norm() / b.norm()), abs=1e-9
        )
        assert found.relative_residual.item() <= last + 1e-12
        last = found.relative_residual.item()
        lengths.append(float(found.x.norm()))
        powers.append(matrix @ powers[-1] / powers[-1].norm())
    assert lengths == sorted(lengths) or eigenvalues is not DEFINITE


def test_curvature_is_that_of_the_residuals():
    """Seen at the first step whose residual before had rᵀAr ≤ 0; conjugate gradients stop, MINRES goes on."""
    matrix, basis = _matrix(torch.cat([torch.tensor([-0.01]), torch.linspace(1.0, 3.0, SIZE - 1)]))
    b = (basis.sum(1) + 0.0)[None]
    for steps in range(1, 10):
        seen = False
        for before in range(steps):
            r = b - _product(matrix[None])(minres(_product(matrix[None]), b, before, 0.0).x)
            seen |= bool((r * _product(matrix[None])(r)).sum() <= 0)
        assert minres(_product(matrix[None]), b, steps, 0.0).negative_curvature.item() == seen
    assert seen
    assert conjugate_gradients(_product(matrix[None]), b, 40, 1e-12).relative_residual > 1e-3
    assert minres(_product(matrix[None]), b, 40, 1e-12).relative_residual <= 1e-12


def test_tolerances_may_differ_by_row():
    matrix, _ = _matrix(INDEFINITE)
    b = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64).expand(3, -1)
    tol = torch.tensor([0.5, 1e-3, 1e-10], dtype=torch.float64)
    found = minres(_product(matrix.expand(3, -1, -1)), b, 50, tol)
    assert (found.relative_residual <= tol).all()
    assert found.steps.tolist() == sorted(found.steps.tolist())
    assert found.steps[0] < found.steps[2]
    for row in range(3):
        alone = minres(_product(matrix[None]), b[:1], 50, float(tol[row]))
        torch.testing.assert_close(found.x[row], alone.x[0])
        assert found.steps[row] == alone.steps[0]
