"""Solvers reach the minimiser, report the residual truly, and stop when they should."""

import pytest
import torch
import torch.nn.functional as F
from conftest import newton, plain_losses, tasks_of

from fobmaml import Learner
from fobmaml.models import CNN1d
from fobmaml.solvers import BarzilaiBorwein, GradientDescent, Inexact, InnerProblem, NewtonCG, conjugate_gradients

LAM = 0.5


@pytest.mark.parametrize("solver", [GradientDescent(steps=2000, lr=0.3), GradientDescent(400, 0.3, momentum=0.8),
                                    BarzilaiBorwein(steps=300, tol=1e-11), NewtonCG(tol=1e-11)])
@pytest.mark.parametrize("kind", ["logistic", "least_squares"])
def test_reaches_the_minimiser(solver, kind):
    learner, tasks = tasks_of(kind)
    nu = torch.tensor([-0.2, 0.0, 0.3], dtype=torch.float64)
    solution = solver.solve(InnerProblem(learner, learner.theta(), tasks, LAM, nu))
    assert solution.residual.max() < 1e-9
    for task in range(len(tasks)):
        support, query = plain_losses(learner, tasks, task)
        for j, weight in enumerate(nu):
            wanted = newton(lambda p, s=support, q=query, w=weight: s(p) + w * q(p)
                            + 0.5 * LAM * (p - learner.theta()).square().sum(), learner.theta())
            assert (solution.phi[task * 3 + j] - wanted).norm() < 1e-8


def test_residual_is_that_of_the_returned_point():
    learner, tasks = tasks_of("logistic")
    for solver in (GradientDescent(steps=3), BarzilaiBorwein(steps=4, tol=0.0)):
        solution = solver.solve(InnerProblem(learner, learner.theta(), tasks, LAM))
        for task in range(len(tasks)):
            support, _ = plain_losses(learner, tasks, task)
            phi = solution.phi[task]
            gradient = torch.func.grad(support)(phi) + LAM * (phi - learner.theta())
            assert float(solution.residual[task]) == pytest.approx(float(gradient.norm()), rel=1e-10)


def test_barzilai_borwein_stops_each_row_on_its_residual():
    learner, tasks = tasks_of("logistic")
    problem = InnerProblem(learner, learner.theta(), tasks, LAM)
    loose, tight = BarzilaiBorwein(tol=1e-2).solve(problem), BarzilaiBorwein(tol=1e-9).solve(problem)
    assert (loose.residual <= 1e-2).all()
    assert (tight.residual <= 1e-9).all()
    assert (loose.steps < tight.steps).all()
    alone = [BarzilaiBorwein(tol=1e-9).solve(InnerProblem(learner, learner.theta(), tasks[i : i + 1], LAM))
             for i in range(len(tasks))]
    assert tight.steps.tolist() == [int(s.steps) for s in alone]  # rows do not wait for, or hurry, each other


def test_barzilai_borwein_beats_gradient_descent():
    learner, tasks = tasks_of("logistic")
    problem = InnerProblem(learner, learner.theta(), tasks, 0.01)
    quick = BarzilaiBorwein(steps=1000, tol=1e-6).solve(problem)
    slow = GradientDescent(steps=int(quick.steps.max()), lr=0.1).solve(problem)
    assert (quick.residual <= 1e-6).all()
    assert (slow.residual > 1e-4).all()


def test_barzilai_borwein_already_there():
    learner, tasks = tasks_of("logistic")
    solution = BarzilaiBorwein(tol=1e9).solve(InnerProblem(learner, learner.theta(), tasks, LAM))
    assert torch.equal(solution.phi, learner.theta().expand(len(tasks), -1))
    assert solution.steps.tolist() == [1] * len(tasks)


def test_newton_reaches_a_minimiser_of_a_network_where_gradient_descent_crawls(mnist1d):
    torch.manual_seed(0)
    learner = Learner(CNN1d((40,), 5, width=8).double(), F.cross_entropy)
    tasks = mnist1d.sample("train", 3, torch.Generator().manual_seed(0))
    problem = InnerProblem(learner, learner.theta(), tasks, 0.1)
    solution = NewtonCG(tol=1e-10).solve(problem)
    assert (solution.residual <= 1e-10).all()
    assert (GradientDescent(steps=300, lr=0.1).solve(problem).residual > 1e-4).all()
    assert (solution.problem.objective(solution.phi) < problem.objective(problem.theta)).all()
    for task in range(3):  # a minimum, by the dense Hessian of the plain module
        support, _ = plain_losses(learner, tasks, task)
        eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(support)(solution.phi[task]))
        assert eigenvalues.min() + 0.1 > 0


def test_conjugate_gradients_row_by_row():
    g = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 6, 6, generator=g, dtype=torch.float64)
    matrices = roots @ roots.transpose(1, 2) + 0.1 * torch.eye(6, dtype=torch.float64)
    matrices[2] -= 5.0 * torch.eye(6, dtype=torch.float64)  # indefinite
    b = torch.randn(3, 6, generator=g, dtype=torch.float64)
    b[1] = 0.0
    found = conjugate_gradients(lambda v: (matrices @ v.unsqueeze(-1)).squeeze(-1), b, 50, 1e-12)
    torch.testing.assert_close(found.x[0], torch.linalg.solve(matrices[0], b[0]), rtol=1e-8, atol=1e-10)
    assert torch.equal(found.x[1], b[1])
    assert found.negative_curvature.tolist() == [False, False, True]
    assert (found.relative_residual[:2] <= 1e-12).all()


@pytest.mark.parametrize(("make", "text"), [
    (lambda: GradientDescent(steps=0), "steps=0: takes a whole number of at least 1"),
    (lambda: GradientDescent(steps=True), "steps=True: takes"),
    (lambda: GradientDescent(lr=0), "lr=0: takes a finite number above 0"),
    (lambda: GradientDescent(lr=float("inf")), "lr=inf: takes"),
    (lambda: GradientDescent(momentum=1), "momentum=1: takes a finite number of at least 0 below 1"),
    (lambda: BarzilaiBorwein(tol=-1), "tol=-1: takes"), (lambda: BarzilaiBorwein(steps=1), "steps=1: takes"),
    (lambda: NewtonCG(cg_steps=0), "cg_steps=0: takes"),
])
def test_bad_arguments(make, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        make()


def test_inexact_is_off_by_delta_and_never_the_same_way():
    learner, tasks = tasks_of("logistic")
    problem = InnerProblem(learner, learner.theta(), tasks, 1.0)
    exact = NewtonCG(tol=1e-14).solve(problem).phi
    solver = Inexact(delta=1e-3)
    errors = [solver.solve(problem).phi - exact for _ in range(2)]
    for error in errors:
        torch.testing.assert_close(error.norm(dim=1), torch.full((len(tasks),), 1e-3, dtype=torch.float64), rtol=1e-6,
                                   atol=0)
    assert torch.nn.functional.cosine_similarity(errors[0], errors[1]).abs().max() < 0.99
    assert torch.equal(Inexact(delta=1e-3).solve(problem).phi - exact, errors[0])
    with pytest.raises(ValueError, match=r"^delta=-1: takes a finite number of at least 0"):
        Inexact(delta=-1)
