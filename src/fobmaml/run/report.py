"""The table at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fobmaml.run.plotting import method


def report(summary: Mapping[str, Any], folder: Path) -> None:
    """The table at the end of a run."""
    def given(key: str, form: str, scale: float = 1.0) -> str:
        return "not available" if summary[key] is None else format(scale * summary[key], form)

    accuracy = given("test/accuracy", ".1f", 100)
    if summary["test/accuracy"] is not None:
        accuracy += " %" if summary["test/accuracy_ci95"] is None else f" ± {given('test/accuracy_ci95', '.1f', 100)} %"
    bias = given("bias/relative_error", ".3g")
    if summary["bias/relative_error"] is None:
        bias += f" ({summary['bias/reason'] or 'bias.every=0'})"
    rows = [
        ("estimator", method(summary["choices"]["estimator"]).label),
        ("meta-test accuracy", accuracy),
        ("meta-test loss", given("test/loss", ".4f")),
        ("memory of a meta-gradient", given("memory/peak_bytes", ".1f", 1e-6) + " MB"),
        ("bias, relative error", bias),
        ("bias, cosine", given("bias/cosine", ".4f")),
        ("time of a meta-step", given("time/meta_step_s", ".4f") + " s"),
        ("meta-steps", f"{summary['step']}"),
    ]
    if summary["val/loss"] is not None:
        rows.append(("learning curve", str(folder / "learning_curve.png")))
    width = max(len(label) for label, _ in rows)
    print("\n" + "\n".join(f"  {label:<{width}}  {value}" for label, value in rows) + "\n", flush=True)
