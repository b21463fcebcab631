"""Solvers reach the minimiser, report the residual truly, and stop when they should."""

import pytest
import torch
import torch.nn.functional as F
from conftest import newton, plain_losses, tasks_of

from fobmaml import Learner, TaskBatch
from fobmaml.models import CNN1d
from fobmaml.solvers import (
    BarzilaiBorwein,
    GradientDescent,
    Inexact,
    InnerProblem,
    Iterate,
    Iterative,
    NewtonCG,
    conjugate_gradients,
)

LAM = 0.5


@pytest.mark.parametrize(
    "solver",
    [
        GradientDescent(steps=2000, lr=0.3),
        GradientDescent(400, 0.3, momentum=0.8),
        BarzilaiBorwein(steps=300, tol=1e-11),
        NewtonCG(tol=1e-11),
    ],
)
@pytest.mark.parametrize("kind", ["logistic", "least_squares"])
def test_reaches_the_minimiser(solver, kind):
    learner, tasks = tasks_of(kind)
    nu = torch.tensor([-0.2, 0.0, 0.3], dtype=torch.float64)
    solution = solver.solve(InnerProblem(learner, learner.theta(), tasks, LAM, nu))
    assert solution.residual.max() < 1e-9
    for task in range(len(tasks)):
        support, query = plain_losses(learner, tasks, task)
        for j, weight in enumerate(nu):
            wanted = newton(
                lambda p, s=support, q=query, w=weight: (
                    s(p) + w * q(p) + 0.5 * LAM * (p - learner.theta()).square().sum()
                ),
                learner.theta(),
            )
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
    assert (loose.gradients < tight.gradients).all()
    alone = [
        BarzilaiBorwein(tol=1e-9).solve(InnerProblem(learner, learner.theta(), tasks[i : i + 1], LAM))
        for i in range(len(tasks))
    ]
    assert tight.gradients.tolist() == [int(s.gradients) for s in alone]  # rows do not wait for, or hurry, each other


def test_barzilai_borwein_beats_gradient_descent():
    learner, tasks = tasks_of("logistic")
    problem = InnerProblem(learner, learner.theta(), tasks, 0.01)
    quick = BarzilaiBorwein(steps=1000, tol=1e-6).solve(problem)
    slow = GradientDescent(steps=int(quick.gradients.max()), lr=0.1).solve(problem)
    assert (quick.residual <= 1e-6).all()
    assert (slow.residual > 1e-4).all()


def test_barzilai_borwein_already_there():
    learner, tasks = tasks_of("logistic")
    solution = BarzilaiBorwein(tol=1e9).solve(InnerProblem(learner, learner.theta(), tasks, LAM))
    assert torch.equal(solution.phi, learner.theta().expand(len(tasks), -1))
    assert solution.gradients.tolist() == [1] * len(tasks)


def test_newton_reaches_a_minimiser_of_a_network_where_gradient_descent_crawls(mnist1d):
    torch.manual_seed(0)
    learner = Learner(CNN1d((40,), 5, width=4).double(), F.cross_entropy)
    tasks = mnist1d.sample("train", 2, torch.Generator().manual_seed(0))
    problem = InnerProblem(learner, learner.theta(), tasks, 0.1)
    solution = NewtonCG(tol=1e-10).solve(problem)
    assert (solution.residual <= 1e-10).all()
    assert (GradientDescent(steps=300, lr=0.1).solve(problem).residual > 1e-4).all()
    assert (solution.problem.objective(solution.phi) < problem.objective(problem.theta)).all()
    for task in range(2):  # a minimum, by the dense Hessian of the plain module
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


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GradientDescent(steps=0), "steps=0: takes a whole number of at least 1"),
        (lambda: GradientDescent(steps=True), "steps=True: takes"),
        (lambda: GradientDescent(lr=0), "lr=0: takes a finite number above 0"),
        (lambda: GradientDescent(lr=float("inf")), "lr=inf: takes"),
        (lambda: GradientDescent(momentum=1), "momentum=1: takes a finite number of at least 0 below 1"),
        (lambda: BarzilaiBorwein(tol=-1), "tol=-1: takes"),
        (lambda: NewtonCG(cg_steps=0), "cg_steps=0: takes"),
    ],
)
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
        torch.testing.assert_close(
            error.norm(dim=1), torch.full((len(tasks),), 1e-3, dtype=torch.float64), rtol=1e-6, atol=0
        )
    assert torch.nn.functional.cosine_similarity(errors[0], errors[1]).abs().max() < 0.99
    assert torch.equal(Inexact(delta=1e-3).solve(problem).phi - exact, errors[0])
    with pytest.raises(ValueError, match=r"^delta=-1: takes a finite number of at least 0"):
        Inexact(delta=-1)


@pytest.mark.parametrize("solver", [BarzilaiBorwein(tol=1e-9), NewtonCG(tol=1e-9)])
def test_a_solution_says_what_it_took_and_how_it_ended(solver):
    """Counted by the calls themselves, one task at a time."""
    learner, tasks = tasks_of("logistic")
    for task in tasks.split(1):
        problem = InnerProblem(learner, learner.theta(), task, LAM)
        counts = {"gradient": 0, "product": 0}
        gradient, linearize = problem.gradient, problem.linearize

        def counted(phi, gradient=gradient, counts=counts):
            counts["gradient"] += 1
            return gradient(phi)

        def counted_linearize(phi, linearize=linearize, counts=counts):
            counts["gradient"] += 1
            g, hvp = linearize(phi)

            def product(v):
                counts["product"] += 1
                return hvp(v)

            return g, product

        problem.gradient, problem.linearize = counted, counted_linearize
        solution = solver.solve(problem)
        assert (int(solution.gradients), int(solution.hessian_products)) == (counts["gradient"], counts["product"])
        assert solution.result == ["converged"]


def test_results_by_name():
    learner, tasks = tasks_of("logistic")
    problem = InnerProblem(learner, learner.theta(), tasks, LAM)
    few = BarzilaiBorwein(steps=2, tol=1e-9).solve(problem)
    assert few.result == ["out of steps"] * len(tasks)
    assert few.gradients.tolist() == [3] * len(tasks)
    assert GradientDescent(steps=5).solve(problem).result == ["out of steps"] * len(tasks)
    assert GradientDescent(steps=5).solve(problem).gradients.tolist() == [5] * len(tasks)
    assert GradientDescent(steps=800, lr=1e4).solve(InnerProblem(learner, learner.theta(), tasks, 1.0)).result == [
        "diverged"
    ] * len(tasks)


def test_negative_curvature_is_a_result():
    """The loss −‖φ‖² has the Hessian −2, beyond λ."""
    model = torch.nn.Linear(3, 2, bias=False).double()
    x, y = torch.eye(3, dtype=torch.float64).expand(2, -1, -1), torch.zeros(2, 3, 2, dtype=torch.float64)
    learner = Learner(model, lambda o, _: -o.square().sum())
    problem = InnerProblem(learner, learner.theta(), TaskBatch(x, y, x, y), LAM)
    solution = NewtonCG(steps=3).solve(problem)
    assert solution.result == ["negative curvature"] * 2
    assert solution.hessian_products.tolist() == [3, 3]  # the first of each step shows it


class Halving(Iterative):
    """A solver of a user's own: gradient descent whose steps get shorter."""

    steps, tol = 400, 1e-6

    def begin(self, problem):
        at = super().begin(problem)
        return Iterate(at.phi, at.gradient, 0.5)

    def step(self, problem, at, active):
        phi = at.phi - at.memory * active.unsqueeze(1) * at.gradient
        return Iterate(phi, problem.gradient(phi), max(0.999 * at.memory, 0.2))


def test_a_solver_of_a_users_own():
    learner, tasks = tasks_of("logistic")
    solution = Halving().solve(InnerProblem(learner, learner.theta(), tasks, LAM))
    assert (solution.residual <= 1e-6).all()
    assert solution.result == ["converged"] * len(tasks)
