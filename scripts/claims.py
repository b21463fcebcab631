"""The claims that are examined, each by a rule that was fixed before the runs (results/protocol.md) and is a pure
function of tables."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from claims_of_theory import (
    LEAST,
    bias,
    bias_of_steps,
    convergence,
    floor,
    optimizers,
    rates,
    smoothness,
    trade_off,
    with_noise,
)
from drawing import Row, groups
from figure_optimizers import NEAR
from statistics_of_runs import CHANCE, interval, of_examples
from tables import in_words, percent, points
from verdicts import MARGIN, Finding, Tables, Verdict, above, below, level, of_all, over_runs

from fobmaml.run.plotting import OF_OTHERS, method

SHORT = 10
"""Inner steps."""
MAML = ("maml", "maml_plus")
"""As published, and with its remedies."""


@dataclass(frozen=True)
class Claim:
    """``paper``: what is claimed; ``rule``: when it holds; ``examine``: what the tables say of it."""

    title: str
    paper: str
    rule: str
    figure: str
    examine: Callable[[Tables], Finding]


def against_maml(rows: Sequence[Row], examples: Sequence[Row] = ()) -> tuple[list[float], float]:
    """symmetric − MAML, as it is best, in points of test accuracy: of each seed, and the variance that the seeds share,
    as their test examples are the same (0 where ``examples`` are not given)."""
    scores = {name: points(found) for name, found in groups(rows, "estimator").items()}
    name = max((each for each in MAML if each in scores), key=lambda each: statistics.fmean(scores[each].values()))
    found = [one - scores[name][seed] for seed, one in scores["symmetric"].items() if seed in scores[name]]
    return found, of_examples([row["symmetric"] - row[name] for row in examples]) if examples else 0.0


def _difference(found: Sequence[float], shared: float) -> str:
    mean, half = interval(found, shared)
    return f"{mean:+.1f} ± {half:.1f}"


def accuracy(table: str, tables: Tables) -> Finding:
    rows, examples = tables.rows(table), tables.rows(f"{table}_examples")
    found, shared = against_maml(rows, examples)
    parts = [f"{in_words(name)} {percent(of, examples)}" for name, of in groups(rows, "estimator").items()]
    return Finding(
        f"symmetric − MAML = {_difference(found, shared)} points over {len(found)} seeds. Meta-test accuracy: "
        f"{', '.join(parts)}.",
        level(found, MARGIN, shared),
    )


def inner_steps(tables: Tables) -> Finding:
    parts, verdicts = [], []
    for steps, rows in sorted(groups(tables.rows("inner_steps"), "solver.steps").items()):
        found, shared = against_maml(rows)
        verdicts.append(level(found, MARGIN, shared))
        parts.append(f"K = {steps:.0f}: {_difference(found, shared)} ({verdicts[-1]})")
    return Finding(f"symmetric − MAML in points: {'; '.join(parts)}.", of_all(verdicts))


def memory(tables: Tables) -> Finding:
    steps = groups(tables.rows("memory_steps"), "estimator")
    at = {name: {row["solver.steps"]: row["memory/peak_bytes"] for row in rows} for name, rows in steps.items()}
    short, long = 10, max(at["symmetric"])
    growth = {name: sizes[long] / sizes[short] for name, sizes in at.items()}
    wide = {
        (row["estimator"], row["width"], row["solver.steps"]): row["memory/peak_bytes"] for row in tables.rows("memory")
    }
    _, top, most = max(wide, key=lambda key: key[1:])
    ratio = wide["maml", top, most] / wide["symmetric", top, most]
    rival = wide["maml_checkpoint", top, most] / wide["symmetric", top, most]
    verdicts = [below(growth["symmetric"], 1.05), above(growth["maml"], 2.0)]
    return Finding(
        f"From K = {short} to {long:.0f}, peak memory of a task grows {growth['symmetric']:.3f}-fold for symmetric, "
        f"{growth['maml']:.1f}-fold for MAML and {growth['maml_checkpoint']:.1f}-fold for MAML with checkpointing (64 "
        f"channels). At {top:.0f} channels and K = {most:.0f}, MAML takes {ratio:.1f} times symmetric's memory, "
        f"checkpointed {rival:.1f} times.",
        of_all(verdicts) if long >= 4 * short else Verdict.NOT_DECIDED,
    )


def deep_memory(axes: Sequence[str], table: str, tables: Tables) -> Finding:
    rows = tables.rows(table)
    at = {(*(r[a] for a in axes), r["estimator"], r["solver.steps"]): r["memory/peak_bytes"] for r in rows}
    sizes, steps = sorted(groups(rows, *axes)), sorted({row["solver.steps"] for row in rows})
    first, last = steps[0], steps[-1]
    growth = {
        name: [at[*size, name, last] / at[*size, name, first] for size in sizes] for name in ("symmetric", "maml")
    }
    text = f"{len(sizes)} sizes. From K = {first:g} to {last:g} peak memory of a task grows "
    text += f"{max(growth['symmetric']):.3f}-fold at most for symmetric, {_span(growth['maml'])}-fold for MAML."
    for count in steps[1:]:
        over = {
            name: [at[*size, name, count] / at[*size, "symmetric", count] for size in sizes]
            for name in ("maml", "maml_checkpoint", "imaml", "tangent")
        }
        said = ", ".join(f"{method(name).label} {_span(ratios)}" for name, ratios in over.items())
        text += f" At K = {count:g}, as multiples of symmetric's: {said}."
    larger = at[*sizes[-1], "symmetric", last] / at[*sizes[0], "symmetric", last]
    text += f" It is not flat in size: at the largest symmetric takes {larger:.0f} times what it takes at the smallest."
    if last < 4 * first or SHORT not in steps:
        return Finding(text, Verdict.NOT_DECIDED)
    lower = min(at[*size, "maml", SHORT] / at[*size, "symmetric", SHORT] for size in sizes)
    return Finding(text, of_all([below(max(growth["symmetric"]), 1.05), above(lower, 1.0)]))


def _span(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


def seconds(tables: Tables) -> Finding:
    rows = tables.rows("bench", "make bench")
    steps = min(row["inner_steps"] for row in rows)
    timed = [row for row in rows if row["inner_steps"] == steps and row["seconds_median"] is not None]
    at = {(row["estimator"], row["width"]): row for row in timed}
    widths = sorted({row["width"] for row in rows})

    def ratio(name: str, other: str, width: float, of: str = "median", to: str = "median") -> float:
        took = [at[who, width][f"seconds_{q}"] / at[who, width]["tasks"] for who, q in ((name, of), (other, to))]
        return took[0] / took[1]

    verdicts = []
    for w in widths:
        least, most = ratio("symmetric", "maml", w, "q25", "q75"), ratio("symmetric", "maml", w, "q75", "q25")
        verdicts.append(Verdict.HOLDS if most < 1.5 else Verdict.DOES_NOT if least > 1.5 else Verdict.NOT_DECIDED)
    others = [who for who in OF_OTHERS if "symmetric" not in who and any((who, w) in at for w in widths)]
    quickest = [max(ratio("symmetric", who, w) for who in others if (who, w) in at) for w in widths]
    ours = ", ".join(
        f"{ratio('symmetric', 'maml', w):.2f} ({verdict})" for w, verdict in zip(widths, verdicts, strict=True)
    )
    return Finding(
        f"Time of symmetric over MAML's, both as fast as this library has them: {ours}; over the quickest of "
        f"{', '.join(method(who).label for who in others)}: {', '.join(f'{each:.2f}' for each in quickest)} "
        f"(at {', '.join(f'{w:.0f}' for w in widths)} channels, {steps:.0f} inner steps).",
        of_all(verdicts),
    )


def curvature(tables: Tables) -> Finding:
    rows = [row for row in tables.rows("curvature_curves") if row["curvature/hessian"] is not None]
    parts = []
    for loss, found in groups(rows, "dataset.loss").items():
        for step in (0, max(row["step"] for row in found)):
            at = [row for row in found if row["step"] == step]
            mean = {
                key: sum(row[f"curvature/{key}"] for row in at) / len(at)
                for key in ("hessian", "gauss_newton", "network", "fomaml_error", "gauss_newton_error")
            }
            parts.append(
                f"{loss} at step {step:.0f}: norms {mean['hessian']:.2g} (Hessian), "
                f"{mean['gauss_newton']:.2g} (Gauss–Newton), {mean['network']:.2g} (network); error of "
                f"FO-MAML {mean['fomaml_error']:.2f}, without the network's own curvature alone "
                f"{mean['gauss_newton_error']:.2f}"
            )
    lr = tables.settings("curvature")["solver.lr"]
    parts.append(f"inner gradient descent with steps of {lr:g} is unstable where the Hessian's norm exceeds {2 / lr:g}")
    verdicts = []
    for runs in groups(rows, "dataset.loss").values():
        lesser = [
            sum(row["curvature/fomaml_error"] - row["curvature/gauss_newton_error"] for row in run) / len(run)
            for run in groups(runs, "run").values()
        ]
        difference, half = over_runs(lesser)
        verdicts.append(above(difference, 0.0, half))
    return Finding("; ".join(parts) + ".", of_all(verdicts))


LEVEL = (
    f"Two one-sided t tests at 5 % say that the mean difference, paired by seed, is within ±{MARGIN:g} points. In "
    f"part: that it is above −{MARGIN:g} points. Does not: the 95 % interval is below −{MARGIN:g}. A run that stopped "
    f"counts at chance, {CHANCE:g} %; fewer than three seeds decide nothing. Of MAML as published and MAML with its "
    "remedies, the one with the higher mean."
)
OF_EXAMPLES = " Its interval is over seeds and over test examples, which the runs share."
DEEP = (
    "At every size, symmetric's peak grows less than 1.05-fold from the fewest to the most inner steps, which must be "
    "four times as many; and MAML's is above it at 10."
)
CLAIMS = [
    Claim(
        "Accuracy",
        "FO-B-MAML with the symmetric estimator is level with second-order MAML.",
        LEVEL + OF_EXAMPLES,
        "accuracy",
        partial(accuracy, "accuracy"),
    ),
    Claim(
        "Accuracy, one shot",
        "The same with one support example a class, tuned for that.",
        LEVEL + OF_EXAMPLES,
        "",
        partial(accuracy, "accuracy_1shot"),
    ),
    Claim(
        "Longer inner loops",
        "The same at every number of inner steps, at the settings of the accuracy table but for that.",
        f"At each number of inner steps: {LEVEL[0].lower()}{LEVEL[1:]}",
        "inner_steps",
        inner_steps,
    ),
    Claim(
        "Memory",
        "FO-B-MAML's memory does not grow with inner steps; MAML's does.",
        "From 10 inner steps to the most measured, which must be four times as many, symmetric's peak grows less than "
        "1.05-fold, and MAML's more than twofold.",
        "memory",
        memory,
    ),
    Claim(
        "Memory of deep and wide networks",
        "The same with depth and width together, to 12 convolutions of 250 channels, where activations are heavy; and "
        "below MAML's at 10 inner steps, too.",
        DEEP,
        "memory_deep",
        partial(deep_memory, ("depth", "width"), "memory_deep"),
    ),
    Claim(
        "Memory of Transformers",
        "The same for Transformers by depth, width and length.",
        DEEP,
        "memory_transformer",
        partial(deep_memory, ("depth", "width", "dataset.dimension"), "memory_transformer"),
    ),
    Claim(
        "Time",
        "A symmetric meta-gradient costs about as much as MAML's.",
        "At each width it takes at most 1.5 times MAML's time, by the upper quartile of its own times over the lower "
        "one of MAML's. Does not: by the lower one over the upper one it takes more.",
        "time",
        seconds,
    ),
    Claim(
        "Bias against inner precision",
        "forward O(δ^{1/2}), symmetric O(δ^{2/3}), order 4 O(δ^{4/5}); FO-MAML and Reptile keep a bias.",
        "With ν=auto, a rule that knows neither δ nor the bias, on logistic tasks and on a network: the 95 % interval "
        "over seeds of each fitted exponent is within 0.1 of theory's. On logistic tasks FO-MAML's least bias, and "
        "Reptile's at its best scale, are above 0.1.",
        "bias",
        bias,
    ),
    Claim(
        "Bias against inner steps",
        "The same on a network: with more inner steps FO-B-MAML's bias falls to its "
        "truncation error, FO-MAML's and Reptile's stays.",
        "After the most steps symmetric's bias is below 0.01, FO-MAML's and Reptile's above 0.1.",
        "bias",
        bias_of_steps,
    ),
    Claim(
        "Bias against ν",
        "Truncation against the solver's error and rounding: the bias has a minimum in ν.",
        "For each method and δ, the best of five ν or more, by the mean over seeds, is neither the least nor the "
        "greatest.",
        "nu",
        trade_off,
    ),
    Claim(
        "Smoothness",
        "The smoothness of the meta-objective grows with the norm of its gradient.",
        "On each data set the fitted power is above 0.5, with its 95 % interval over runs. In part: above 0. Does not: "
        f"below 0. Where ‖∇F‖ spans less than a factor of {LEAST:g} in a run, nothing is decided.",
        "smoothness",
        smoothness,
    ),
    Claim(
        "Outer optimizers",
        "So normalized and clipped steps stand a wider range of learning rates than plain gradient descent.",
        f"Of the rates with which every run ends within {NEAR:g} of the least validation loss of all, the ratio of the "
        "greatest to the least is larger for each of the two than for plain descent. Not decided: neither has two such "
        "rates, or some are on the edge of what was tried.",
        "optimizers",
        optimizers,
    ),
    Claim(
        "Convergence",
        "FO-B-MAML comes close to a stationary point, FO-MAML and Reptile level off.",
        "Symmetric's ‖∇F‖ ends more than ten times below FO-MAML's and Reptile's. Does not: above.",
        "convergence",
        convergence,
    ),
    Claim(
        "Convergence with noise",
        "The same where a meta-step takes a few of many tasks, whatever the outer optimizer.",
        "With SGD, clipped SGD and SNGDM, each at the best of the rates tried, symmetric's ‖∇F‖ ends below FO-MAML's "
        "and Reptile's, by the 95 % interval over seeds of the ratio.",
        "convergence",
        with_noise,
    ),
    Claim(
        "Where it levels off",
        "FO-B-MAML's ‖∇F‖ levels off at its bias, O(δ^{2/3}) for symmetric.",
        "With ν=auto the 95 % interval over seeds of the exponent of δ is within 0.1 of 2/3, and at each δ, by the "
        "interval over seeds of the ratio, ‖∇F‖ is at most twice that at the best ν of a grid.",
        "convergence",
        floor,
    ),
    Claim(
        "Steps to a stationary point",
        "Under the noise of mini-batches ‖∇F‖ ≤ ε takes O(ε^{−4}) normalized or clipped meta-steps.",
        "For SNGDM and for clipped SGD the exponent of 1/ε, fitted to four ε or more, is below 4, by its 95 % interval "
        "over seeds. It is an upper bound: less is as the theory says.",
        "convergence",
        rates,
    ),
    Claim(
        "What FO-MAML drops",
        "Of the Hessian that FO-MAML drops, the network's own curvature is the lesser part.",
        "For each loss, dropping the network's own curvature alone makes a smaller error than FO-MAML, by the 95 % "
        "interval over runs of the mean difference.",
        "curvature",
        curvature,
    ),
]
