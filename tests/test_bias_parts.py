"""Where a bias is from, against the distances themselves."""

import json

import pytest
from conftest import relative_error, tasks_of

from fobmaml.estimators import MAML, Exact, Symmetric, Tangent, estimate
from fobmaml.measure import bias, bias_parts
from fobmaml.solvers import GradientDescent, NewtonCG

LAM = 2.0


def _of(estimator, learner, tasks):
    return estimate(estimator, learner, learner.theta(), tasks).gradient


def test_each_distance_is_to_its_own_reference():
    learner, tasks = tasks_of("logistic")
    solver = GradientDescent(5, 0.1)
    found = bias_parts(Symmetric(solver, LAM, 0.5), learner, tasks)
    returned = _of(Symmetric(solver, LAM, 0.5), learner, tasks)
    for name, reference in (
        ("tangent", Tangent(solver, LAM, "products")),
        ("steps", MAML(solver, LAM)),
        ("exact", Exact(NewtonCG(), LAM)),
    ):
        assert found[f"bias_parts/{name}_error"] == pytest.approx(
            relative_error(returned, _of(reference, learner, tasks)), rel=1e-5
        )
    half = len(tasks) // 2
    one, other = (_of(Symmetric(solver, LAM, 0.5), learner, part) for part in (tasks[:half], tasks[half:]))
    assert found["bias_parts/noise_error"] == pytest.approx(relative_error(other, one), rel=1e-9)
    assert found["bias_parts/exact_error"] == pytest.approx(
        bias(Symmetric(solver, LAM, 0.5), learner, tasks).relative_error, rel=1e-5
    )


def test_all_but_the_noise_vanish_with_small_nu_and_many_steps():
    learner, tasks = tasks_of("logistic")
    found = bias_parts(Symmetric(GradientDescent(300, 0.1), LAM, 1e-3), learner, tasks)
    for name in ("tangent", "steps", "exact"):
        assert found[f"bias_parts/{name}_error"] < 1e-5
        assert found[f"bias_parts/{name}_cosine"] > 1 - 1e-9
    assert found["bias_parts/noise_error"] > 0.1


def test_on_the_command_line(run_train, tmp_path):
    done = run_train(
        "+measure=bias_parts",
        "bias_parts.every=1",
        "bias_parts.tasks=2",
        "estimator=symmetric",
        "steps=1",
        "width=2",
        "bias.every=0",
        "eval.validation_tasks=0",
        "eval.tasks=0",
        "hydra.run.dir=run",
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "bias_parts/tangent_cosine" in event] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("estimator=maml",), "lam=0"),
        (("estimator=symmetric", "solver.batch=5"), "bias_parts.every=1: takes inner steps on all examples"),
        (("estimator=symmetric", "solver=newton_cg"), "solver=NewtonCG"),
    ],
)
def test_what_has_no_reference_is_refused(run_train, settings, said):
    done = run_train("+measure=bias_parts", "bias_parts.every=1", *settings)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
