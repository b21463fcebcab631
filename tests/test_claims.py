"""Verdicts: every claim's rule returns each of its outcomes on tables made for it, and noise never helps."""

import math

import pytest
from claims import CLAIMS
from conftest import ROOT
from verdicts import Verdict, above, below, level, of_all, over_runs, within

HOLDS, IN_PART, DOES_NOT, NOT_DECIDED = Verdict
EXAMINE = {claim.title: claim.examine for claim in CLAIMS}


class Made:
    """Tables by name."""

    def __init__(self, **tables):
        self.tables = tables

    def rows(self, name, made_by=None):
        return self.tables[name]

    def settings(self, name):
        return {"solver.lr": 0.1}


def _accuracies(*of_steps):
    """Rows of both methods, a seed each, of pairs (symmetric, MAML) in per cent; None: the run stopped."""
    return [
        {
            "estimator": name,
            "seed": seed,
            "solver.steps": steps,
            "test/accuracy": None if value is None else value / 100,
            "status": "diverged" if value is None else "completed",
        }
        for steps, pairs in enumerate(of_steps)
        for seed, pair in enumerate(pairs)
        for name, value in zip(("symmetric", "maml"), pair, strict=True)
    ]


def _compared(pairs, apart=0.0):
    """The table of ``pairs`` and that of a hundred test examples, of which half are the one method's and half the
    other's by ``apart`` points."""
    examples = [{"symmetric": 0.93 + apart * (-1) ** place, "maml": 0.93} for place in range(100)]
    return {
        f"{name}{suffix}": rows
        for name in ("accuracy", "accuracy_1shot")
        for suffix, rows in (("", _accuracies(pairs)), ("_examples", examples))
    }


SAME = [(93.0, 93.5), (93.2, 92.9), (92.8, 93.1), (93.1, 93.0)]
BETTER = [(93.0, 85.0), (93.2, 86.0), (92.8, 84.0), (93.1, 85.5)]
WORSE = [(b, a) for a, b in BETTER]
NOISY = [(93.0, 85.0), (93.2, 99.0), (70.0, 84.0), (93.1, 60.0)]


def _memory(symmetric, maml, most=200):
    rows = [
        {"estimator": name, "width": 64, "solver.steps": steps, "memory/peak_bytes": size}
        for name, growth in {"symmetric": symmetric, "maml": maml, "maml_checkpoint": 2.0}.items()
        for steps, size in ((10, 1.0), (most, growth))
    ]
    return {"memory_steps": rows, "memory": rows}


def _deep(symmetric, maml, steps=(5, 10, 50)):
    """Growth of symmetric's memory, and MAML's over it."""
    rows = [
        {
            "depth": 3,
            "width": width,
            "dataset.dimension": 16,
            "estimator": name,
            "solver.steps": count,
            "memory/peak_bytes": (1.0 if name == "symmetric" else maml) * (symmetric if count == steps[-1] else 1.0),
        }
        for name in ("symmetric", "maml", "maml_checkpoint", "imaml", "tangent")
        for width in (32, 250)
        for count in steps
    ]
    return {"memory_deep": rows, "memory_transformer": rows}


def _bench(*ratios, spread=0.01):
    rows = []
    for width, ratio in enumerate(ratios):
        for name, seconds in (("symmetric", ratio), ("maml", 1.0), ("higher", 9.0)):
            quartiles = {f"seconds_{q}": seconds * (1 + sign * spread) for q, sign in (("q25", -1), ("q75", 1))}
            rows.append(
                {
                    "estimator": name,
                    "width": width,
                    "inner_steps": 10,
                    "tasks": 16,
                    "seconds_median": seconds,
                    **quartiles,
                }
            )
    return {"bench": rows}


SEEDS = range(3)


def _bias(off=0.0, floor=0.5, noise=0.0, nus=(1, 2, 3, 4, 5), best=3, cosine=0.9):
    """``off``: what the exponents are from theory's, ``noise``: by how much more or less in two of three seeds."""
    powers = {"forward": 1 / 2, "symmetric": 2 / 3, "central4": 4 / 5}
    delta = [
        {
            "estimator": name,
            "seed": seed,
            "solver.delta": d,
            "estimator.nu": nu,
            "bias/relative_error": d ** (power + off + noise * (seed - 1))
            * (1 + abs(0 if nu == "auto" else nu - best)),
        }
        for name, power in powers.items()
        for d in (1e-6, 1e-5, 1e-4, 1e-3)
        for nu in ("auto", *nus)
        for seed in SEEDS
    ]
    kept = [
        {"estimator": name, "seed": seed, "bias/relative_error": floor, "bias/cosine": cosine, "solver.delta": 1e-6}
        for name in ("fomaml", "reptile")
        for seed in SEEDS
    ]
    imaml = [{**row, "estimator": "imaml", "estimator.cg_steps": 5} for row in kept]
    nu = [{"estimator": "symmetric", "dtype": "float64", "estimator.nu": 1e-3, "bias/relative_error": 1e-6}]
    return {"bias_delta": delta, "bias_delta_cnn": delta, "bias_floor": kept, "bias_imaml": imaml, "nu": nu}


def _bias_steps(symmetric, others):
    return {
        "bias_steps": [
            {"estimator": name, "solver.steps": steps, "bias/relative_error": value if steps == 500 else 0.9}
            for name, value in (("symmetric", symmetric), ("fomaml", others), ("reptile", others))
            for steps in (5, 500)
        ]
    }


def _smoothness(first, second, norms=(0.1, 1.0, 10.0)):
    """Of each data set, the power in each run."""
    return {
        name: [
            {"run": run, "smoothness/gradient_norm": norm, "smoothness/local": norm**power}
            for run, power in enumerate(powers)
            for norm in norms
        ]
        for name, powers in (("smoothness_curves", first), ("smoothness_logistic_curves", second))
    }


def _optimizers(**good):
    """Of each optimizer, the rates with which it does well, of 1 to 6."""
    return {
        "optimizers": [
            {
                "estimator": "symmetric",
                "optimizer": name,
                "optimizer.lr": rate,
                "status": "completed",
                "test/accuracy": 0.5,
                "val/loss": 1.0 if rate in rates else 1.5,
            }
            for name, rates in good.items()
            for rate in range(1, 7)
        ]
    }


def _convergence(symmetric, others, reptile=None):
    return {
        "convergence_curves": [
            {"estimator": name, "step": step, "bias/exact_norm": value if step else 1.0}
            for name, value in (("symmetric", symmetric), ("fomaml", others), ("reptile", reptile or others))
            for step in (0, 400)
        ]
    }


def _noise(*rivals, stopped=False):
    """Of each outer optimizer FO-MAML's norms at the end, a seed each; Reptile's are a tenth more, symmetric's 1. At a
    second rate all end higher, or stop."""
    return {
        "convergence_noise": [
            {
                "optimizer": optimizer,
                "estimator": name,
                "seed": seed,
                "optimizer.lr": rate,
                "status": "diverged" if stopped and name == "symmetric" and not seed else "completed",
                "bias/exact_norm": norm * factor * (1 if rate == 1 else 3),
            }
            for optimizer, norms in enumerate(rivals)
            for seed, norm in enumerate(norms)
            for name, factor in (("symmetric", 1 / norm), ("fomaml", 1.0), ("reptile", 1.1))
            for rate in (1, 2)
        ]
    }


def _floor(power, noise=0.0, auto=1.0):
    """Where ‖∇F‖ levels off: δ to a power that is by ``noise`` more or less in two of three seeds; with ν=auto ``auto``
    times that."""
    return {
        "convergence_floor_curves": [
            {
                "estimator.nu": nu,
                "solver.delta": delta,
                "seed": seed,
                "step": step,
                "bias/exact_norm": factor * delta ** (power + noise * (seed - 1)) if step else 1.0,
            }
            for nu, factor in (("auto", auto), (0.1, 1.0))
            for delta in (1e-5, 1e-4, 1e-3)
            for seed in SEEDS
            for step in range(6)
        ]
    }


def _rates(*powers, shortest=0.001, noise=0.0):
    """Of SNGDM and clipped SGD, the power of 1/ε with which meta-steps go, by ``noise`` more or less in a seed."""
    return {
        "convergence_rates_curves": [
            {
                "optimizer": name,
                "optimizer.lr": 0.1,
                "seed": seed,
                "step": step,
                "bias/exact_norm": max(0.15 * (1 + step / 20) ** (-1 / (power + noise * (seed - 1))), shortest),
            }
            for name, power in zip(("sngdm", "clipped_sgd"), powers, strict=True)
            for seed in SEEDS
            for step in range(0, 20_000, 20)
        ]
    }


def _curvature(*of_losses):
    """Of each loss the difference of the two errors in each run."""
    return {
        "curvature_curves": [
            {
                "dataset.loss": str(loss),
                "run": run,
                "step": step,
                **dict.fromkeys((f"curvature/{key}" for key in ("hessian", "gauss_newton", "network")), 1.0),
                "curvature/fomaml_error": 1.0 + difference,
                "curvature/gauss_newton_error": 1.0,
            }
            for loss, differences in enumerate(of_losses)
            for run, difference in enumerate(differences)
            for step in (0, 400)
        ]
    }


CASES = {
    "Accuracy": [
        (HOLDS, _compared(SAME)),
        (IN_PART, _compared(BETTER)),
        (DOES_NOT, _compared(WORSE)),
        (NOT_DECIDED, _compared(NOISY)),
        (NOT_DECIDED, _compared([*SAME, (93.0, None)])),  # a run that stopped is none to drop
        (NOT_DECIDED, _compared(SAME[:2])),
        (HOLDS, _compared(SAME, apart=0.01)),
        (NOT_DECIDED, _compared(SAME, apart=0.3)),  # another set of test examples might say something else
    ],
    "Accuracy, one shot": [
        (HOLDS, _compared(SAME)),
        (IN_PART, _compared(BETTER)),
        (DOES_NOT, _compared(WORSE)),
        (NOT_DECIDED, _compared(NOISY)),
    ],
    "Longer inner loops": [
        (HOLDS, {"inner_steps": _accuracies(SAME, SAME)}),
        (IN_PART, {"inner_steps": _accuracies(SAME, WORSE)}),
        (DOES_NOT, {"inner_steps": _accuracies(WORSE, WORSE)}),
        (NOT_DECIDED, {"inner_steps": _accuracies(NOISY, WORSE)}),
    ],
    "Memory": [
        (HOLDS, _memory(1.01, 9.0)),
        (IN_PART, _memory(1.01, 1.2)),
        (DOES_NOT, _memory(1.5, 1.2)),
        (NOT_DECIDED, _memory(1.01, 9.0, most=20)),
    ],
    "Memory of deep and wide networks": [
        (HOLDS, _deep(1.01, 3.0)),
        (IN_PART, _deep(1.01, 0.9)),
        (DOES_NOT, _deep(1.2, 0.9)),
        (NOT_DECIDED, _deep(1.01, 3.0, steps=(10, 20))),
    ],
    "Memory of Transformers": [
        (HOLDS, _deep(1.01, 3.0)),
        (IN_PART, _deep(1.01, 0.9)),
        (DOES_NOT, _deep(1.2, 0.9)),
        (NOT_DECIDED, _deep(1.01, 3.0, steps=(10, 20))),
    ],
    "Time": [
        (HOLDS, _bench(1.0, 1.4)),
        (IN_PART, _bench(1.0, 1.6)),
        (DOES_NOT, _bench(1.6, 1.7)),
        (NOT_DECIDED, _bench(1.4, 1.6, spread=0.1)),
    ],
    "Bias against inner precision": [
        (HOLDS, _bias()),
        (IN_PART, _bias(off=0.3)),
        (DOES_NOT, _bias(off=0.3, floor=1e-3, cosine=1.0)),
        (IN_PART, _bias(off=0.3, floor=1e-3)),  # Reptile is no gradient: its direction counts
        (NOT_DECIDED, _bias(noise=0.3, floor=1e-3, cosine=1.0)),
    ],
    "Bias against inner steps": [
        (HOLDS, _bias_steps(1e-4, 0.5)),
        (IN_PART, _bias_steps(1e-4, 0.05)),
        (DOES_NOT, _bias_steps(0.2, 0.05)),
        (NOT_DECIDED, _bias_steps(None, None)),
    ],
    "Bias against ν": [
        (HOLDS, _bias()),
        (DOES_NOT, _bias(best=5)),
        (NOT_DECIDED, _bias(nus=(2, 3, 4))),
        (IN_PART, {**_bias(), "bias_delta": _bias(best=5)["bias_delta"][18:] + _bias()["bias_delta"][:18]}),
    ],
    "Smoothness": [
        (HOLDS, _smoothness([1.0, 1.1, 0.9], [0.8, 0.81, 0.82])),
        (IN_PART, _smoothness([1.0, 1.1, 0.9], [0.1, 0.5, -0.3])),
        (DOES_NOT, _smoothness([-1.0, -1.1, -0.9], [-0.8, -0.81, -0.82])),
        (NOT_DECIDED, _smoothness([1.0, -1.0, 0.5], [1.0, -1.0, 0.5])),
        (NOT_DECIDED, _smoothness([1.0], [1.0])),  # one run says nothing of others
        (NOT_DECIDED, _smoothness([1.0, 1.1, 0.9], [0.8, 0.81, 0.82], norms=(1.0, 2.0, 9.0))),
    ],
    "Outer optimizers": [
        (HOLDS, _optimizers(sgd={3}, sngdm={2, 3, 4}, clipped_sgd={3, 4})),
        (IN_PART, _optimizers(sgd={3, 4}, sngdm={2, 3, 4, 5}, clipped_sgd={3})),
        (DOES_NOT, _optimizers(sgd={2, 3, 4}, sngdm={3, 4}, clipped_sgd={3})),
        (NOT_DECIDED, _optimizers(sgd={3}, sngdm={3}, clipped_sgd={4})),
        (NOT_DECIDED, _optimizers(sgd={3}, sngdm={4, 5, 6}, clipped_sgd={4, 5, 6})),
    ],
    "Convergence": [
        (HOLDS, _convergence(1e-5, 1e-2)),
        (IN_PART, _convergence(1e-3, 1e-1, reptile=1e-4)),
        (DOES_NOT, _convergence(1e-2, 1e-3)),
        (NOT_DECIDED, _convergence(1e-2, 2e-2)),
    ],
    "Convergence with noise": [
        (HOLDS, _noise([2.0, 2.1, 1.9], [3.0, 3.1, 2.9])),
        (IN_PART, _noise([2.0, 2.1, 1.9], [0.3, 0.31, 0.29])),
        (DOES_NOT, _noise([0.2, 0.21, 0.19], [0.3, 0.31, 0.29])),
        (NOT_DECIDED, _noise([2.0, 0.5, 1.0], [3.0, 0.3, 1.0])),
        (NOT_DECIDED, _noise([2.0, 2.1, 1.9], [3.0, 3.1, 2.9], stopped=True)),
    ],
    "Where it levels off": [
        (HOLDS, _floor(2 / 3)),
        (IN_PART, _floor(2 / 3, auto=3.0)),
        (DOES_NOT, _floor(1.0, auto=3.0)),
        (NOT_DECIDED, _floor(2 / 3, noise=0.2, auto=3.0)),
    ],
    "Steps to a stationary point": [
        (HOLDS, _rates(2.0, 3.0)),
        (IN_PART, _rates(2.0, 4.5)),
        (DOES_NOT, _rates(4.5, 4.5)),
        (NOT_DECIDED, _rates(2.0, 2.0, shortest=0.08)),
        (NOT_DECIDED, _rates(4.0, 4.0, noise=0.5)),
    ],
    "What FO-MAML drops": [
        (HOLDS, _curvature([0.5, 0.6, 0.4], [1.0, 1.1, 0.9])),
        (IN_PART, _curvature([0.5, 0.6, 0.4], [1.0, -1.0, 0.3])),
        (DOES_NOT, _curvature([-0.5, -0.6, -0.4], [-1.0, -1.1, -0.9])),
        (NOT_DECIDED, _curvature([0.5, -0.5], [1.0, -1.0])),
        (NOT_DECIDED, _curvature([0.5], [0.5])),
    ],
}


@pytest.mark.parametrize(
    ("title", "verdict", "made"), [(title, *case) for title, cases in CASES.items() for case in cases]
)
def test_each_outcome(title, verdict, made):
    assert EXAMINE[title](Made(**made)).verdict == verdict


def test_every_claim_is_here_with_each_outcome():
    assert CASES.keys() == EXAMINE.keys()
    for title, cases in CASES.items():
        assert {verdict for verdict, _ in cases} == {*Verdict}, title


def test_the_protocol_has_the_rules():
    protocol = (ROOT / "results" / "protocol.md").read_text()
    for claim in CLAIMS:
        assert f"- **{claim.title}**: {claim.paper} *Holds if:* {claim.rule}\n" in protocol


def test_noise_never_helps():
    """With a wider interval a verdict becomes not decided, or stays."""
    for value in (-3.0, 0.0, 0.5, 3.0):
        for rule in (lambda v, h: below(v, 1.0, h), lambda v, h: above(v, 1.0, h), lambda v, h: within(v, h, 0.0, 1.0)):
            verdicts = [rule(value, half) for half in (0.0, 0.1, 1.0, 3.0, 10.0)]
            decided = [verdict for verdict in verdicts if verdict != NOT_DECIDED]
            assert verdicts == decided + [NOT_DECIDED] * (len(verdicts) - len(decided))
            assert len({*decided}) == 1
    around = [-1.0, 1.0, -0.5, 0.5]
    for centre in (0.0, 5.0, -5.0):
        spreads = [level([centre + spread * each for each in around], 2.0) for spread in (0.01, 0.1, 1.0, 10.0, 100.0)]
        assert spreads[-1] == NOT_DECIDED
        assert len({*spreads} - {NOT_DECIDED}) == 1
    assert over_runs([1.0]) == (1.0, math.inf)


def test_the_verdict_of_several_parts():
    assert of_all([HOLDS, HOLDS]) == HOLDS
    assert of_all([DOES_NOT, DOES_NOT]) == DOES_NOT
    assert of_all([HOLDS, DOES_NOT]) == of_all([HOLDS, NOT_DECIDED]) == of_all([IN_PART, DOES_NOT]) == IN_PART
    assert of_all([NOT_DECIDED, DOES_NOT]) == NOT_DECIDED


def test_level_is_what_two_t_tests_say():
    """By scipy's tests of the same differences."""
    from scipy import stats

    found = [0.5, -0.3, 1.4, 0.2, -1.1]
    larger = stats.ttest_1samp(found, -2.0, alternative="greater").pvalue
    smaller = stats.ttest_1samp(found, 2.0, alternative="less").pvalue
    assert (level(found, 2.0) == HOLDS) == (max(larger, smaller) < 0.05)
    for margin in (0.5, 0.9, 1.0, 1.1, 1.3, 2.0):
        passes = max(
            stats.ttest_1samp(found, -margin, alternative="greater").pvalue,
            stats.ttest_1samp(found, margin, alternative="less").pvalue,
        )
        assert (level(found, margin) == HOLDS) == (passes < 0.05)
