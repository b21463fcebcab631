"""What is claimed of biases, convergence and smoothness, examined (claims.py)."""

import math
import statistics

from drawing import groups
from figure_bias import AUTO, PROBLEMS, THEORY, at_best_scale, best_nu, exponents, mean_error, of_nu
from figure_convergence import NORM, floors, lowest, steps_to
from figure_optimizers import NEAR
from figure_smoothness import fitted
from statistics_of_runs import slope
from verdicts import Finding, Tables, Verdict, above, below, of_all, over_runs, within

from fobmaml.run.plotting import method

LEAST = 10.0
"""Times that ‖∇F‖ must span where smoothness is fitted."""
FEWEST = 4
"""ε of which a power is fitted."""


def bias(tables: Tables) -> Finding:
    parts, verdicts = [], []
    for table, problem in PROBLEMS.items():
        for name, rows in groups(tables.rows(table), "estimator").items():
            auto = [row for row in rows if row["estimator.nu"] == AUTO]
            rate, half = over_runs(exponents(auto))
            a, b = THEORY[name].split("/")
            verdicts.append(within(rate, half, int(a) / int(b), 0.1))
            times = mean_error(auto) / mean_error(best_nu(rows))
            parts.append(
                f"{name} on {problem} {rate:.3f} ± {half:.3f} (theory {THEORY[name]}: {verdicts[-1]}; {times:.1f} "
                "times the bias at the best ν)"
            )
    left = []
    for name, rows in groups(tables.rows("bias_floor"), "estimator").items():
        least = min(groups(rows, "solver.delta").values(), key=mean_error)
        error = over_runs([row["bias/relative_error"] for row in least])
        scaled = over_runs([at_best_scale(row) for row in least])
        mean, half = scaled if name == "reptile" else error
        verdicts.append(above(mean, 0.1, half))
        said = (f"{mean:.2f} ± {half:.2f}" for mean, half in (error, scaled))
        left.append(f"{method(name).label} {', at its best scale '.join(said)}")
    for steps, rows in groups(tables.rows("bias_imaml"), "estimator.cg_steps").items():
        least = min(groups(rows, "solver.delta").values(), key=mean_error)
        left.append(f"iMAML with at most {steps:g} steps of conjugate gradients {mean_error(least):.1e}")
    return Finding(
        f"Fitted exponents of δ at ν=auto: {', '.join(parts)}. Least bias at any δ of the others, of ‖∇F‖: "
        f"{'; '.join(left)}.",
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
        errors = of_nu(rows)
        tried, least = [*errors], min(errors, key=lambda nu: errors[nu])
        if len(tried) < 5:
            inside.append(Verdict.NOT_DECIDED)
        else:
            inside.append(Verdict.HOLDS if tried[0] < least < tried[-1] else Verdict.DOES_NOT)
    return Finding(
        f"On MNIST-1D the least bias is {'; '.join(parts)}. On the logistic tasks the best ν lies inside "
        f"the range tried for {inside.count(Verdict.HOLDS)} of {len(inside)} pairs of method and δ.",
        of_all(inside),
    )


def smoothness(tables: Tables) -> Finding:
    parts, verdicts = [], []
    for name, label in (("smoothness_curves", "MNIST-1D"), ("smoothness_logistic_curves", "logistic tasks")):
        runs = [
            tuple([row[f"smoothness/{key}"] for row in of] for key in ("gradient_norm", "local"))
            for of in groups([row for row in tables.rows(name) if row["smoothness/local"] is not None], "run").values()
        ]
        power, half = over_runs([slope(norms, local)[0] for norms, local in runs])
        constants = [over_runs(each) for each in zip(*(fitted(*run) for run in runs), strict=True)]
        span = min(max(norms) / min(norms) for norms, _ in runs)
        strong = above(power, 0.5, half)
        verdicts.append(Verdict.IN_PART if strong != Verdict.HOLDS and power - half > 0 else strong)
        if (verdicts[-1] == Verdict.DOES_NOT and power + half > 0) or span < LEAST:
            verdicts[-1] = Verdict.NOT_DECIDED
        zero, one = (f"{mean:.2g} ± {wide:.2g}" for mean, wide in constants)
        parts.append(
            f"{power:.2f} ± {half:.2f} on {label} ({len(runs)} runs, in each ‖∇F‖ spans a factor of {span:.0f} or "
            f"more; L₀ = {zero}, L₁ = {one}: {verdicts[-1]})"
        )
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
    measured = [row for row in tables.rows("convergence_curves") if row[NORM] is not None]
    ends = {name: max(rows, key=lambda row: row["step"])[NORM] for name, rows in groups(measured, "estimator").items()}
    parts = ", ".join(f"{method(name).label} {value:.1e}" for name, value in ends.items())
    ratios = [ends[name] / ends["symmetric"] for name in ("fomaml", "reptile")]
    verdicts = [
        Verdict.HOLDS if ratio > 10 else Verdict.DOES_NOT if ratio < 1 else Verdict.NOT_DECIDED for ratio in ratios
    ]
    return Finding(f"‖∇F‖ at the end: {parts}.", of_all(verdicts))


def with_noise(tables: Tables) -> Finding:
    parts, verdicts = [], []
    for name, rows in groups(tables.rows("convergence_noise"), "optimizer").items():
        ends = {who: lowest(of) for who, of in groups(rows, "estimator").items()}
        said = [
            f"{method(who).label} {statistics.geometric_mean(end.values()):.1e} (rate {rate:g})"
            for who, (rate, end) in ends.items()
        ]
        ours, compared = ends["symmetric"][1], []
        for who in ("fomaml", "reptile"):
            ratios = [math.log(norm) - math.log(ours[seed]) for seed, norm in ends[who][1].items()]
            mean, half = over_runs(ratios) if all(map(math.isfinite, ratios)) else (0.0, math.inf)
            verdicts.append(above(mean, 0.0, half))
            compared.append(f"{math.exp(mean):.2g} times [{math.exp(mean - half):.2g}, {math.exp(mean + half):.2g}]")
        parts.append(f"{name}: {', '.join(said)}; FO-MAML's and Reptile's are {' and '.join(compared)} symmetric's")
    return Finding(f"‖∇F‖ at the end, by outer optimizer: {'. '.join(parts)}.", of_all(verdicts))


def floor(tables: Tables) -> Finding:
    measured = [row for row in tables.rows("convergence_floor_curves") if row[NORM] is not None]
    found = {key: floors(rows) for key, rows in groups(measured, "estimator.nu", "solver.delta").items()}
    deltas = sorted({delta for _, delta in found})
    auto = [found[AUTO, delta] for delta in deltas]
    rate, half = over_runs([slope(deltas, [at[seed] for at in auto])[0] for seed in auto[0]])
    said = [
        f"{statistics.geometric_mean(at.values()):.1e} at δ = {delta:g}" for delta, at in zip(deltas, auto, strict=True)
    ]
    verdicts, times = [within(rate, half, 2 / 3, 0.1)], []
    for delta, at in zip(deltas, auto, strict=True):
        given = [found[nu, of] for nu, of in found if of == delta and nu != AUTO]
        best = min(given, key=lambda floors: statistics.geometric_mean(floors.values()))
        mean, wide = over_runs([math.log(at[seed] / best[seed]) for seed in at])
        times.append(f"{math.exp(mean):.2f} [{math.exp(mean - wide):.2f}, {math.exp(mean + wide):.2f}]")
        verdicts.append(below(mean, math.log(2), wide))
    return Finding(
        f"‖∇F‖ levels off with ν=auto at {', '.join(said)}: as δ to the power {rate:.2f} ± {half:.2f}; it is "
        f"{', '.join(times)} times that with the best ν of a grid.",
        of_all(verdicts),
    )


def rates(tables: Tables) -> Finding:
    measured = [row for row in tables.rows("convergence_rates_curves") if row[NORM] is not None]
    parts, verdicts = [], []
    for name, rows in groups(measured, "optimizer").items():
        steps = steps_to(rows)
        power, half = math.nan, math.inf
        said = f"{len(steps)} ε that all seeds reach in time, too few to fit"
        if len(steps) >= FEWEST:
            inverse = [1 / epsilon for epsilon in steps]
            power, half = over_runs([slope(inverse, of_seed)[0] for of_seed in zip(*steps.values(), strict=True)])
            said = f"1/ε to the power {power:.2f} ± {half:.2f}, ε from {max(steps):.2g} to {min(steps):.2g}"
        parts.append(f"{name}: {said}")
        if name in ("sngdm", "clipped_sgd"):
            verdicts.append(below(power, 4.0, half))
    return Finding(f"Meta-steps until ‖∇F‖ ≤ ε, by outer optimizer. {'; '.join(parts)}.", of_all(verdicts))
