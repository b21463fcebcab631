"""The claims that are examined, each by a rule that was fixed before the runs (results/protocol.md) and is a pure
function of tables."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from drawing import Row, groups
from figure_bias import THEORY, best_nu
from figure_optimizers import NEAR
from statistics_of_runs import CHANCE, interval, of_examples, slope
from tables import in_words, percent, points
from verdicts import MARGIN, Verdict, above, below, level, of_all, over_runs, within

from fobmaml.run.plotting import OF_OTHERS, method

SHORT = 10
"""Inner steps."""
MAML = ("maml", "maml_plus")
"""As published, and with its remedies."""


class Tables(Protocol):
    """Where claims read: the rows of a table, and what the jobs behind it had in common."""

    def rows(self, name: str, made_by: str | None = None) -> list[Row]:
        """Of a table. Raises Missing."""
        ...

    def settings(self, name: str) -> dict[str, Any]:
        """Of the jobs. Raises Missing."""
        ...


@dataclass(frozen=True)
class Finding:
    """What was measured, in words, and the verdict on the claim."""

    measured: str
    verdict: Verdict


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


def bias(tables: Tables) -> Finding:
    parts, verdicts = [], []
    for name, rows in best_nu(tables.rows("bias_delta")).items():
        rate, half, _ = slope([row["solver.delta"] for row in rows], [row["bias/relative_error"] for row in rows])
        a, b = THEORY[name].split("/")
        verdicts.append(within(rate, half if len(rows) > 2 else math.inf, int(a) / int(b), 0.1))
        parts.append(f"{name} {rate:.3f} ± {half:.3f} (theory {THEORY[name]}: {verdicts[-1]})")
    floor = groups(tables.rows("bias_floor"), "estimator")
    least = {name: min(rows, key=lambda row: row["bias/relative_error"]) for name, rows in floor.items()}
    left = ", ".join(
        f"{method(name).label} {row['bias/relative_error']:.2g} (cosine {row['bias/cosine']:.4f})"
        for name, row in least.items()
    )
    verdicts += [above(least[name]["bias/relative_error"], 0.1) for name in ("fomaml", "reptile")]
    return Finding(
        f"Fitted exponents of δ at the best ν: {', '.join(parts)}. Least bias at any δ of the others, of ‖∇F‖: {left}.",
        of_all(verdicts),
    )


def bias_of_steps(tables: Tables) -> Finding:
    found = groups(tables.rows("bias_steps"), "estimator")
    steps = max(row["solver.steps"] for rows in found.values() for row in rows)
    last = {
        name: next((row["bias/relative_error"] for row in rows if row["solver.steps"] == steps), None)
        for name, rows in found.items()
    }
    known = {name: value for name, value in last.items() if value is not None}
    parts = ", ".join(f"{method(name).label} {value:.2g}" for name, value in known.items())
    verdicts = [below(last["symmetric"] or math.nan, 0.01)]
    verdicts += [above(last[name] or math.nan, 0.1) for name in ("fomaml", "reptile")]
    return Finding(f"After {steps:.0f} inner steps: {parts}.", of_all(verdicts))


def trade_off(tables: Tables) -> Finding:
    parts = []
    for name, rows in groups(tables.rows("nu"), "estimator", "dtype").items():
        known = [row for row in rows if row["bias/relative_error"] is not None]
        best = min(known, key=lambda row: row["bias/relative_error"])
        parts.append(f"{name[0]}, {name[1]}: {best['bias/relative_error']:.1e} at ν = {best['estimator.nu']:g}")
    inside = []
    for rows in groups(tables.rows("bias_delta"), "estimator", "solver.delta").values():
        tried = sorted({row["estimator.nu"] for row in rows})
        best = min(rows, key=lambda row: row["bias/relative_error"])
        if len(tried) < 5:
            inside.append(Verdict.NOT_DECIDED)
        else:
            inside.append(Verdict.HOLDS if tried[0] < best["estimator.nu"] < tried[-1] else Verdict.DOES_NOT)
    return Finding(
        f"On MNIST-1D the least bias is {'; '.join(parts)}. On the logistic tasks the best ν lies inside "
        f"the range tried for {inside.count(Verdict.HOLDS)} of {len(inside)} pairs of method and δ.",
        of_all(inside),
    )


def smoothness(tables: Tables) -> Finding:
    parts, verdicts = [], []
    for name, label in (("smoothness_curves", "MNIST-1D"), ("smoothness_logistic_curves", "logistic tasks")):
        rows = [row for row in tables.rows(name) if row["smoothness/local"] is not None]
        slopes = [
            slope([row["smoothness/gradient_norm"] for row in of], [row["smoothness/local"] for row in of])[0]
            for of in groups(rows, "run").values()
        ]
        power, half = over_runs(slopes)
        strong = above(power, 0.5, half)
        verdicts.append(Verdict.IN_PART if strong != Verdict.HOLDS and power - half > 0 else strong)
        if verdicts[-1] == Verdict.DOES_NOT and power + half > 0:
            verdicts[-1] = Verdict.NOT_DECIDED
        parts.append(f"{power:.2f} ± {half:.2f} on {label} ({len(slopes)} runs, {len(rows)} points: {verdicts[-1]})")
    return Finding(
        f"Local smoothness goes with ‖∇F‖ to the power {' and '.join(parts)}; intervals over runs.", of_all(verdicts)
    )


def optimizers(tables: Tables) -> Finding:
    parts, good = [], {}
    rows = tables.rows("optimizers")
    least = min(row["val/loss"] for row in rows if row["val/loss"] is not None)
    slowest, fastest = (pick(row["optimizer.lr"] for row in rows) for pick in (min, max))
    for name, found in groups(rows, "optimizer").items():
        at = groups(found, "optimizer.lr")
        good[name] = [
            rate
            for rate, runs in sorted(at.items())
            if all(row["status"] == "completed" and row["val/loss"] < least + NEAR for row in runs)
        ]
        best = min((row for row in found if row["val/loss"] is not None), key=lambda row: row["val/loss"])
        dead = sum(row["status"] != "completed" for row in found)
        parts.append(
            f"{name}: least loss {best['val/loss']:.2f} at {best['optimizer.lr']:g}, {len(good[name])} of {len(at)} "
            f"rates with every run within {NEAR:g} of the least of all, {dead} of {len(found)} runs stopped by a "
            "meta-gradient that was not finite"
        )
    verdicts = []
    for name in ("sngdm", "clipped_sgd"):
        few = max(len(good[name]), len(good["sgd"])) < 2
        cut = {slowest, fastest} & {*good[name], *good["sgd"]}
        wide = [each[-1] / each[0] if each else 0.0 for each in (good[name], good["sgd"])]
        verdicts.append(Verdict.NOT_DECIDED if few or cut else above(wide[0], wide[1]))
    return Finding("; ".join(parts) + ".", of_all(verdicts))


def convergence(tables: Tables) -> Finding:
    measured = [row for row in tables.rows("convergence_curves") if row["bias/exact_norm"] is not None]
    ends = {
        name: max(rows, key=lambda row: row["step"])["bias/exact_norm"]
        for name, rows in groups(measured, "estimator").items()
    }
    parts = ", ".join(f"{method(name).label} {value:.1e}" for name, value in ends.items())
    ratios = [ends[name] / ends["symmetric"] for name in ("fomaml", "reptile")]
    verdicts = [
        Verdict.HOLDS if ratio > 10 else Verdict.DOES_NOT if ratio < 1 else Verdict.NOT_DECIDED for ratio in ratios
    ]
    return Finding(f"‖∇F‖ at the end: {parts}.", of_all(verdicts))


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
        "The 95 % interval of each fitted exponent is within 0.1 of theory's; FO-MAML's and Reptile's least bias is "
        "above 0.1.",
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
        "For each method and δ, the best of five ν or more is neither the least nor the greatest.",
        "nu",
        trade_off,
    ),
    Claim(
        "Smoothness",
        "The smoothness of the meta-objective grows with the norm of its gradient.",
        "On each data set the fitted power is above 0.5, with its 95 % interval over runs. In part: above 0. Does not: "
        "below 0.",
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
        "What FO-MAML drops",
        "Of the Hessian that FO-MAML drops, the network's own curvature is the lesser part.",
        "For each loss, dropping the network's own curvature alone makes a smaller error than FO-MAML, by the 95 % "
        "interval over runs of the mean difference.",
        "curvature",
        curvature,
    ),
]
