"""What a run measures, in the words of its parts: the keys of its summary, the table at its end, the list in --help."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from fobmaml.logged import KEYS
from fobmaml.measure import Measurement
from fobmaml.measure.base import shown
from fobmaml.run.plotting import method
from fobmaml.run.settings import measurements_in


def summary_keys(measurements: Sequence[Measurement]) -> list[str]:
    """Those of every summary, in their order; behind them stands what else was measured."""
    return [
        *(key for each in measurements for key in each.results),
        "time/meta_step_s",
        "inner/residual",
        "meta_gradient/norm",
        "work/example_gradients",
        "work/hessian_products",
        "model/parameters",
        *(key for each in measurements for key in each.progress),
        "train/loss",
    ]


def report(summary: Mapping[str, Any], folder: Path, measurements: Sequence[Measurement]) -> None:
    """The table at the end of a run."""
    rows = [
        ("estimator", method(summary["choices"]["estimator"]).label),
        *(row for each in measurements for row in each.rows(summary)),
        ("time of a meta-step", shown(summary, "time/meta_step_s", ".4f") + " s"),
        ("meta-steps", f"{summary['step']}"),
        ("work of meta-steps", work(summary)),
    ]
    if summary.get("val/loss") is not None:
        rows.append(("learning curve", str(folder / "learning_curve.png")))
    width = max(len(label) for label, _ in rows)
    print("\n" + "\n".join(f"  {label:<{width}}  {value}" for label, value in rows) + "\n", flush=True)


def work(summary: Mapping[str, Any]) -> str:
    gradients, products = (summary[f"work/{kind}"] for kind in ("example_gradients", "hessian_products"))
    return f"{gradients:,.0f} example-gradients" + (f", {products:,} Hessian products" if products else "")


def measured(_root_: DictConfig) -> str:
    """The end of --help: every key of ``metrics.jsonl`` and ``summary.json``."""
    classes: list[Any] = [get_class(_root_[name]["_target_"]) for name in measurements_in(_root_)]
    keys = KEYS | {key: text for each in classes for key, text in each.keys.items()}
    for node in _root_.metrics.values():
        metric: Any = get_class(node["_target_"])
        if f"test/{metric.name}" not in keys:
            keys |= {f"{split}/{metric.name}": f"of {split} tasks, mean" for split in ("val", "test")}
            keys |= {f"test/{metric.name}_ci95": "half width of its 95 % interval"}
    width = max(map(len, keys))
    return "== Measured ==\n" + "\n".join(f"{key:<{width}}  {text}" for key, text in keys.items())


OmegaConf.register_new_resolver("measured", measured, replace=True)
