"""Writes results/README.md, claim by claim, from the tables: python scripts/summary.py [FOLDER] (--check: only says
whether it is up to date)."""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from drawing import Missing, Row, folder_given, groups, load, settings
from figure_bias import THEORY, best_nu
from statistics_of_runs import paired, slope
from tables import percent

from fobmaml.files import write_atomically
from fobmaml.run.plotting import OF_OTHERS, method

TUNING = ("tuning_adam", "tuning_sngdm", "tuning_clipped")
HOLDS, IN_PART, DOES_NOT = "holds", "holds in part", "does not hold"


@dataclass(frozen=True)
class Finding:
    """What was measured, in words, and the verdict on the claim."""

    measured: str
    verdict: str


@dataclass(frozen=True)
class Claim:
    """``paper``: what is claimed; ``examine``: what the tables say of it."""

    title: str
    paper: str
    figure: str
    examine: Callable[[Path], Finding]


def against_maml(rows: Sequence[Row]) -> tuple[float, float, float, int]:
    """symmetric − MAML in points of test accuracy, paired by seed: mean, half width of its interval, p-value, seeds."""
    scores = {
        name: {row["seed"]: 100 * row["test/accuracy"] for row in found if row["test/accuracy"] is not None}
        for name, found in groups(rows, "estimator").items()
    }
    seeds = sorted(scores["symmetric"].keys() & scores["maml"].keys())
    return *paired([scores["symmetric"][seed] for seed in seeds], [scores["maml"][seed] for seed in seeds]), len(seeds)


def accuracy(table: str, folder: Path) -> Finding:
    rows = load(folder, table)
    mean, half, p, seeds = against_maml(rows)
    parts = [f"{method(name).label} {percent(found)}" for name, found in groups(rows, "estimator").items()]
    return Finding(
        f"symmetric − MAML = {mean:+.1f} ± {half:.1f} points over {seeds} seeds (paired t test, p = "
        f"{p:.2g}). Meta-test accuracy: {', '.join(parts)}.",
        HOLDS if mean + half >= 0 else DOES_NOT,
    )


def inner_steps(folder: Path) -> Finding:
    parts, level = [], []
    for steps, rows in sorted(groups(load(folder, "inner_steps"), "solver.steps").items()):
        mean, half, *_ = against_maml(rows)
        level.append(mean + half >= 0)
        parts.append(f"K = {steps:.0f}: {mean:+.1f} ± {half:.1f}")
    return Finding(
        f"symmetric − MAML in points: {'; '.join(parts)}.", HOLDS if all(level) else IN_PART if any(level) else DOES_NOT
    )


def memory(folder: Path) -> Finding:
    steps = groups(load(folder, "memory_steps"), "estimator")
    at = {name: {row["solver.steps"]: row["memory/peak_bytes"] for row in rows} for name, rows in steps.items()}
    short, long = 10, max(at["symmetric"])
    growth = {name: sizes[long] / sizes[short] for name, sizes in at.items()}
    wide = {
        (row["estimator"], row["width"], row["solver.steps"]): row["memory/peak_bytes"]
        for row in load(folder, "memory")
    }
    _, top, most = max(wide, key=lambda key: key[1:])
    ratio = wide["maml", top, most] / wide["symmetric", top, most]
    rival = wide["maml_checkpoint", top, most] / wide["symmetric", top, most]
    return Finding(
        f"From K = {short} to {long:.0f}, peak memory of a task grows {growth['symmetric']:.3f}-fold for symmetric, "
        f"{growth['maml']:.1f}-fold for MAML and {growth['maml_checkpoint']:.1f}-fold for MAML with checkpointing (64 "
        f"channels). At {top:.0f} channels and K = {most:.0f}, MAML takes {ratio:.1f} times symmetric's memory, "
        f"checkpointed {rival:.1f} times.",
        HOLDS if growth["symmetric"] < 1.05 and ratio > 1 else DOES_NOT,
    )


def deep_memory(axes: Sequence[str], table: str, folder: Path) -> Finding:
    rows = load(folder, table)
    at = {(*(r[a] for a in axes), r["estimator"], r["solver.steps"]): r["memory/peak_bytes"] for r in rows}
    sizes, steps = sorted(groups(rows, *axes)), sorted({row["solver.steps"] for row in rows})
    first, last = steps[0], steps[-1]
    growth = {
        name: [at[*size, name, last] / at[*size, name, first] for size in sizes] for name in ("symmetric", "maml")
    }
    text = f"{len(sizes)} sizes. From K = {first:g} to {last:g} peak memory of a task grows "
    text += f"{max(growth['symmetric']):.3f}-fold at most for symmetric, {_span(growth['maml'])}-fold for MAML."
    below = True
    for count in steps[1:]:
        over = {
            name: [at[*size, name, count] / at[*size, "symmetric", count] for size in sizes]
            for name in ("maml", "maml_checkpoint", "imaml", "tangent")
        }
        below = below and min(over["maml"]) > 1
        said = ", ".join(f"{method(name).label} {_span(ratios)}" for name, ratios in over.items())
        text += f" At K = {count:g}, as multiples of symmetric's: {said}."
    larger = at[*sizes[-1], "symmetric", last] / at[*sizes[0], "symmetric", last]
    text += f" It is not flat in size: at the largest symmetric takes {larger:.0f} times what it takes at the smallest."
    return Finding(text, (HOLDS if below else IN_PART) if max(growth["symmetric"]) < 1.05 else DOES_NOT)


def _span(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


def seconds(folder: Path) -> Finding:
    rows = load(folder, "bench", "make bench")
    steps = min(row["inner_steps"] for row in rows)
    at = {(row["estimator"], row["width"]): row["seconds_16_tasks"] for row in rows if row["inner_steps"] == steps}
    widths = sorted({row["width"] for row in rows})
    alike, ours = (
        ", ".join(f"{at[name, w] / at['maml', w]:.2f}" for w in widths) for name in ("symmetric_operators", "symmetric")
    )
    others = [name for name in OF_OTHERS if "symmetric" not in name and at.get((name, widths[0]))]
    quickest = [min(found for name in others if (found := at.get((name, w)))) for w in widths]
    peers = ", ".join(f"{at['symmetric', w] / least:.2f}" for w, least in zip(widths, quickest, strict=True))
    compared = ", ".join(method(name).label for name in others)
    held = all(at["symmetric_operators", w] < 1.5 * at["maml", w] for w in widths)
    return Finding(
        f"Time of symmetric over MAML's (ours, made fast), both by torch's operators: {alike}; with the "
        f"compiled kernel, which has no Hessian products: {ours}, and over the quickest of "
        f"{compared}: {peers} (at {', '.join(f'{w:.0f}' for w in widths)} channels, {steps:.0f} inner "
        "steps).",
        HOLDS if held else IN_PART,
    )


def bias(folder: Path) -> Finding:
    parts, good = [], []
    for name, rows in best_nu(load(folder, "bias_delta")).items():
        rate, half, _ = slope([row["solver.delta"] for row in rows], [row["bias/relative_error"] for row in rows])
        a, b = THEORY[name].split("/")
        good.append(abs(rate - int(a) / int(b)) < max(half, 0.05))
        parts.append(f"{name} {rate:.3f} ± {half:.3f} (theory {THEORY[name]})")
    floor = groups(load(folder, "bias_floor"), "estimator")
    least = {name: min(rows, key=lambda row: row["bias/relative_error"]) for name, rows in floor.items()}
    left = ", ".join(
        f"{method(name).label} {row['bias/relative_error']:.2g} (cosine {row['bias/cosine']:.4f})"
        for name, row in least.items()
    )
    kept = min(least[name]["bias/relative_error"] for name in ("fomaml", "reptile"))
    return Finding(
        f"Fitted exponents of δ at the best ν: {', '.join(parts)}. Least bias at any δ of the others, of ‖∇F‖: {left}.",
        HOLDS if all(good) and kept > 0.01 else IN_PART,
    )


def bias_of_steps(folder: Path) -> Finding:
    rows = groups([row for row in load(folder, "bias_steps") if row["bias/relative_error"] is not None], "estimator")
    last = {name: max(found, key=lambda row: row["solver.steps"]) for name, found in rows.items()}
    parts = ", ".join(f"{method(name).label} {row['bias/relative_error']:.2g}" for name, row in last.items())
    steps = max(row["solver.steps"] for row in last.values())
    return Finding(
        f"After {steps:.0f} inner steps: {parts}.",
        HOLDS if last["symmetric"]["bias/relative_error"] < 0.01 < last["fomaml"]["bias/relative_error"] else IN_PART,
    )


def trade_off(folder: Path) -> Finding:
    parts = []
    for name, rows in groups(load(folder, "nu"), "estimator", "dtype").items():
        known = [row for row in rows if row["bias/relative_error"] is not None]
        best = min(known, key=lambda row: row["bias/relative_error"])
        parts.append(f"{name[0]}, {name[1]}: {best['bias/relative_error']:.1e} at ν = {best['estimator.nu']:g}")
    inside = []
    for rows in groups(load(folder, "bias_delta"), "estimator", "solver.delta").values():
        tried = sorted(row["estimator.nu"] for row in rows)
        best = min(rows, key=lambda row: row["bias/relative_error"])
        inside.append(tried[0] < best["estimator.nu"] < tried[-1])
    return Finding(
        f"On MNIST-1D the least bias is {'; '.join(parts)}. On the logistic tasks the best ν lies inside "
        f"the range tried for {sum(inside)} of {len(inside)} pairs of method and δ.",
        HOLDS if all(inside) else IN_PART,
    )


def smoothness(folder: Path) -> Finding:
    parts, positive, strong = [], [], []
    for name, label in (("smoothness_curves", "MNIST-1D"), ("smoothness_logistic_curves", "logistic tasks")):
        rows = [row for row in load(folder, name) if row["smoothness/local"] is not None]
        power, half, _ = slope(
            [row["smoothness/gradient_norm"] for row in rows], [row["smoothness/local"] for row in rows]
        )
        strong.append(power - half > 0.5)
        positive.append(power - half > 0)
        parts.append(f"{power:.2f} ± {half:.2f} on {label} ({len(rows)} points)")
    return Finding(
        f"Local smoothness goes with ‖∇F‖ to the power {' and '.join(parts)}. "
        "(Points of one path are not independent; the intervals take them to be.)",
        HOLDS if all(strong) else IN_PART if any(positive) else DOES_NOT,
    )


def optimizers(folder: Path) -> Finding:
    parts, spans, failures, unfinished = [], {}, {}, []
    rows = load(folder, "optimizers")
    least = min(row["val/loss"] for row in rows if row["val/loss"] is not None)
    fastest = max(row["optimizer.lr"] for row in rows)
    for name, found in groups(rows, "optimizer").items():
        rates = sorted(
            rate
            for rate, at in groups(found, "optimizer.lr").items()
            if all(row["status"] == "completed" and row["val/loss"] < least + 0.15 for row in at)
        )
        best = min((row for row in found if row["val/loss"] is not None), key=lambda row: row["val/loss"])
        failures[name] = sum(row["status"] != "completed" for row in found)
        learning = sum(
            all(row["status"] == "completed" and row["val/loss"] < 0.9 * math.log(5) for row in at)
            for at in groups(found, "optimizer.lr").values()
        )
        spans[name] = rates[-1] / rates[0] if rates else 0.0
        if best["optimizer.lr"] == fastest:
            unfinished.append(name)
        parts.append(
            f"{name}: least loss {best['val/loss']:.2f} at {best['optimizer.lr']:g}, {len(rates)} of the "
            f"rates within 0.15 of the best loss of all, {learning} with all runs a tenth below guessing, "
            f"{failures[name]} of {len(found)} runs stopped by a meta-gradient that was not finite"
        )
    if unfinished:
        parts.append(
            f"best at the largest rate tried, so that the grid does not show where they fail: {', '.join(unfinished)}"
        )
    if "sgd" in unfinished:
        return Finding("; ".join(parts) + ".", "not decided")
    wider = max(spans["sngdm"], spans["clipped_sgd"]) > spans["sgd"]
    safer = min(failures["sngdm"], failures["clipped_sgd"]) < failures["sgd"]
    return Finding("; ".join(parts) + ".", HOLDS if wider else IN_PART if safer else DOES_NOT)


def convergence(folder: Path) -> Finding:
    measured = [row for row in load(folder, "convergence_curves") if row["bias/exact_norm"] is not None]
    ends = {
        name: max(rows, key=lambda row: row["step"])["bias/exact_norm"]
        for name, rows in groups(measured, "estimator").items()
    }
    parts = ", ".join(f"{method(name).label} {value:.1e}" for name, value in ends.items())
    return Finding(
        f"‖∇F‖ at the end: {parts}.",
        HOLDS if 10 * ends["symmetric"] < min(ends["fomaml"], ends["reptile"]) else IN_PART,
    )


def curvature(folder: Path) -> Finding:
    rows = [row for row in load(folder, "curvature_curves") if row["curvature/hessian"] is not None]
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
    lr = settings(folder, "curvature")["solver.lr"]
    parts.append(f"inner gradient descent with steps of {lr:g} is unstable where the Hessian's norm exceeds {2 / lr:g}")
    smaller = all(row["curvature/gauss_newton_error"] < row["curvature/fomaml_error"] for row in rows)
    return Finding("; ".join(parts) + ".", HOLDS if smaller else IN_PART)


def tuning(folder: Path) -> str:
    try:
        rows = [row for table in TUNING for row in load(folder, table)]
    except Missing as missing:
        return f"Not measured: {missing}."
    lines = [
        "| method | trials | failed | best on validation tasks | outer steps | inner lr |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in groups(rows, "estimator").items():
        best = max((row for row in found if row["val/accuracy"] is not None), key=lambda row: row["val/accuracy"])
        lines.append(
            f"| {method(name).label} | {len(found)} | {sum(row['status'] == 'failed' for row in found)} | "
            f"{100 * best['val/accuracy']:.1f} % | {best['optimizer']}, lr "
            f"{best['optimizer.lr']:g} | {best['solver.lr']:g} |"
        )
    return "\n".join(lines)


CLAIMS = [
    Claim(
        "Accuracy",
        "FO-B-MAML with the symmetric estimator is level with second-order MAML.",
        "accuracy",
        partial(accuracy, "accuracy"),
    ),
    Claim(
        "Accuracy, one shot",
        "The same with one support example a class, at the settings tuned for five.",
        "",
        partial(accuracy, "accuracy_1shot"),
    ),
    Claim(
        "Longer inner loops",
        "The same at every number of inner steps, at the settings tuned for ten.",
        "inner_steps",
        inner_steps,
    ),
    Claim("Memory", "FO-B-MAML's memory does not grow with inner steps; MAML's does.", "memory", memory),
    Claim(
        "Memory, deep and wide",
        "The same with depth and width together, to 12 convolutions of 250 channels, where activations are heavy; and "
        "below MAML's at 10 inner steps, too.",
        "memory_deep",
        partial(deep_memory, ("depth", "width"), "memory_deep"),
    ),
    Claim(
        "Memory of Transformers",
        "The same for Transformers by depth, width and length.",
        "memory_transformer",
        partial(deep_memory, ("depth", "width", "dataset.dimension"), "memory_transformer"),
    ),
    Claim("Time", "A symmetric meta-gradient costs about as much as MAML's.", "time", seconds),
    Claim(
        "Bias against inner precision",
        "forward O(δ^{1/2}), symmetric O(δ^{2/3}), order 4 O(δ^{4/5}); FO-MAML and Reptile keep a bias.",
        "bias",
        bias,
    ),
    Claim(
        "Bias against inner steps",
        "The same on a network: with more inner steps FO-B-MAML's bias falls to its "
        "truncation error, FO-MAML's and Reptile's stays.",
        "bias",
        bias_of_steps,
    ),
    Claim(
        "Bias against ν",
        "Truncation against the solver's error and rounding: the bias has a minimum in ν.",
        "nu",
        trade_off,
    ),
    Claim(
        "Smoothness",
        "The smoothness of the meta-objective grows with the norm of its gradient.",
        "smoothness",
        smoothness,
    ),
    Claim(
        "Outer optimizers",
        "So normalized and clipped steps stand a wider range of learning rates than plain gradient descent.",
        "optimizers",
        optimizers,
    ),
    Claim(
        "Convergence",
        "FO-B-MAML comes close to a stationary point, FO-MAML and Reptile level off.",
        "convergence",
        convergence,
    ),
    Claim(
        "What FO-MAML drops",
        "Of the Hessian that FO-MAML drops, the network's own curvature is the lesser part.",
        "curvature",
        curvature,
    ),
]


def costs(folder: Path) -> str:
    """What each experiment took."""
    lines = ["| table | jobs | minutes, one thread each | commit |", "|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        about = json.loads(path.read_text())
        if "jobs" in about:
            commits = dict.fromkeys(made["commit"][:7] for made in about["provenance"])
            lines.append(
                f"| [{path.stem}]({path.stem}.csv) | {about['jobs']} | {about['seconds'] / 60:.0f} | "
                f"{', '.join(commits)} |"
            )
    return "\n".join(lines)


def page(folder: Path) -> str:
    sections, verdicts = [], ["| claim | verdict |", "|---|---|"]
    for claim in CLAIMS:
        try:
            found = claim.examine(folder)
        except Missing as missing:
            found = Finding(f"{missing}.", "not measured")
        verdicts.append(f"| {claim.title} | {found.verdict} |")
        picture = f"\n\n![{claim.title}](figures/{claim.figure}.png)" if claim.figure else ""
        sections.append(
            f"## {claim.title}: {found.verdict}\n\n*Claim:* {claim.paper}\n\n*Measured:* {found.measured}{picture}\n"
        )
    return (
        "# What was claimed and what was measured\n\nWritten by `make figures` from the tables beside it; each "
        "`NAME.json` has the commit, versions, machine and settings of `NAME.csv`, and `make reproduce ARGS=NAME` "
        "makes it again. Intervals are 95 %.\n\n"
        + "\n".join(verdicts)
        + "\n\n"
        + "\n".join(sections)
        + "\n## Tuning\n\nThe same trials for every method, on validation tasks, one seed, "
        f"{', '.join(f'[{t}.csv]({t}.csv)' for t in TUNING)}.\n\n"
        + tuning(folder)
        + "\n\n## What it took\n\n"
        + costs(folder)
        + "\n"
    )


def write(folder: Path) -> None:
    path, text = folder / "README.md", page(folder)
    write_atomically(path, lambda file: file.write(text.encode()))
    print(os.path.relpath(path))


def main() -> None:
    folder = folder_given()
    if "--check" not in sys.argv:
        write(folder)
    elif not (folder / "README.md").exists() or (folder / "README.md").read_text() != page(folder):
        sys.exit(f"error: {os.path.relpath(folder / 'README.md')} differs from the tables: make figures")


if __name__ == "__main__":
    main()
