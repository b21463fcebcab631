"""Meta-trains one configuration and measures it: python train.py estimator=symmetric width=250

Every setting is in configs/; python train.py --help lists them.
"""

import json
import logging
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fobmaml import distributed, sweeps
from fobmaml.allocator import keep_freed_memory
from fobmaml.arguments import number, one_of, refuse
from fobmaml.estimators import NotConverged
from fobmaml.files import (
    CannotWrite,
    CheckpointError,
    EventLog,
    FolderInUse,
    load_checkpoint,
    read_events,
    save_checkpoint,
    sole_user,
    write_json,
)
from fobmaml.plotting import learning_curve, method
from fobmaml.provenance import provenance
from fobmaml.tracking import WandbRun
from fobmaml.training import Diverged, Event, MetaTraining, Settings

log = logging.getLogger("train")

TRACED = "HYDRA_FULL_ERROR" in os.environ

# Runs that agree in everything else are the same run, and continue each other's checkpoints.
NOT_PART_OF_A_RUN = ("resume", "wandb", "device", "engine", "checkpoint_every")

SUMMARY_KEYS = ("test/accuracy", "test/accuracy_ci95", "test/loss", "memory/peak_bytes", "bias/relative_error",
                "bias/cosine", "bias/reference", "bias/reason", "time/meta_step_s", "inner/residual",
                "meta_gradient/norm", "model/parameters", "val/accuracy", "val/loss", "train/loss")


class ConfigError(ValueError):
    """A setting that cannot work; the text is one line that names it."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop."""


# What a user can put right: reported in one line. Set HYDRA_FULL_ERROR=1 for the traceback.
EXPECTED = (ConfigError, CannotWrite, CheckpointError, Diverged, FolderInUse, NotConverged, distributed.ProcessLost,
            HydraException, OmegaConfBaseException)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """One job: a run in its own folder. Returns its last validation accuracy, for sweepers."""
    keep_freed_memory()
    hydra_config = HydraConfig.get()
    folder, in_sweep = Path(hydra_config.runtime.output_dir), hydra_config.mode == RunMode.MULTIRUN
    try:
        with distributed.processes():
            if distributed.rank() == 0:
                return run(cfg, folder)
            follow(cfg)
            return None
    except EXPECTED as error:
        kept = any((folder / name).exists() for name in ("checkpoint.pt", "summary.json", "metrics.jsonl"))
        if not kept and not isinstance(error, FolderInUse):
            shutil.rmtree(folder, ignore_errors=True)  # only Hydra's copy of the bad settings is in it
        if TRACED or in_sweep:  # a sweep goes on, and ends with the error
            raise
        sys.exit(f"error: {one_line(error)}")


def follow(cfg: DictConfig) -> None:
    """A process that is not the first of its run."""
    for asked in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asked, signal.SIG_IGN)  # the first one stops after its step, and then this one
    try:
        distributed.everywhere(lambda: build(cfg)).follow()
    except (ConfigError, distributed.ProcessLost):
        sys.exit(1)  # the first process says it


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Build, continue if there is a checkpoint, meta-train, measure, report."""
    training = distributed.everywhere(lambda: build(cfg))
    with distributed.leading(training.learner.device), sole_user(folder):
        return lead(cfg, training, folder)


def lead(cfg: DictConfig, training: MetaTraining, folder: Path) -> float | None:
    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    same_run = {key: value for key, value in config.items() if key not in NOT_PART_OF_A_RUN}
    source = checkpoint_to_continue(cfg, folder)
    try:
        state = load_checkpoint(source, same_run) if source else None
    except CheckpointError as error:
        raise CheckpointError(f"{'checkpoint ' if cfg.resume is None else 'resume='}{error}") from None
    summary_path = folder / "summary.json"
    if source and source.parent == folder and summary_path.exists():
        summary = json.loads(summary_path.read_text())
        if summary["status"] == "completed":
            log.info("%s is complete: nothing to do", folder)
            report(summary, folder)
            return cast(float | None, summary["val/accuracy"])

    if state and source:
        try:
            training.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{source}: takes a whole checkpoint of this program, and this one's state does not "
                                  f"fit ({one_line(error) or type(error).__name__})") from None
        log.info("continuing %s at step %d", source, training.step)
    events = EventLog(folder / "metrics.jsonl", training.step if state else None,
                      source.with_name("metrics.jsonl") if source else None)
    wandb_run = WandbRun(folder, {**config, "choices": choices()}, **config["wandb"] | {
        "group": cfg.wandb.group or sweep_name(), "name": "-".join(folder.parts[-2:]),
        "id": state["wandb_id"] if state and source and source.parent == folder else None})

    def record(event: Event) -> None:
        if event:
            events.write(training.step, event)
            wandb_run.write(training.step, event)

    def checkpoint() -> None:
        save_checkpoint(folder / "checkpoint.pt", {**training.state_dict(), "wandb_id": wandb_run.id}, same_run)

    summary = {"status": "failed"}
    started = time.time()
    try:
        with stop_requests() as stop:
            meta_train(training, state is None, record, checkpoint, stop)
            log.info("measuring memory and %d meta-test tasks", training.settings.eval_tasks)
            record({**training.test(), **training.measure_memory()})
        summary["status"] = "completed"
    except BaseException as error:
        summary["reason"] = str(error) or type(error).__name__
        if isinstance(error, Interrupted):
            summary["status"] = "interrupted"
            where = "" if sweep_name() else f" with hydra.run.dir={folder}"
            error.args = (f"{error}; the same command{where} continues",)
        elif isinstance(error, NotConverged):
            error.args = (f"the exact meta-gradient at step {training.step + 1} is not available: {error}; try more "
                          "solver.steps or a larger estimator.lam",)
        elif isinstance(error, Diverged):
            error.args = (f"{error}; the last good checkpoint is {folder / 'checkpoint.pt'}",)
        raise
    finally:
        measured = {"step": training.step, "engine": training.learner.used, **dict.fromkeys(SUMMARY_KEYS),
                    **training.latest}
        summary |= {**measured, "choices": choices(), "seconds": round(time.time() - started, 1),
                    "provenance": provenance(training.learner.device), "config": config}
        events.close()
        try:
            write_json(summary_path, summary)
        finally:
            wandb_run.finish(measured, exit_code=0 if summary["status"] == "completed" else 1)
    if summary["val/loss"] is not None:
        learning_curve(read_events(folder / "metrics.jsonl"), summary, folder / "learning_curve.png")
    report(summary, folder)
    return cast(float | None, training.latest.get("val/accuracy"))


def build(cfg: DictConfig) -> MetaTraining:
    """The parts of a run, every setting checked. Raises ConfigError."""
    with bad_values_named():
        device = choose_device(cfg.device)
        dtype = getattr(torch, one_of("dtype", cfg.dtype, ("float32", "float64")))
        one_of("wandb.mode", cfg.wandb.mode, ("offline", "online", "disabled"))
        settings = Settings(**{key: cfg[key] for key in ("steps", "seed", "meta_batch", "fixed_tasks", "task_chunk",
                                                         "memory_limit_mb", "engine", "schedule", "log_every",
                                                         "checkpoint_every")},
                            **{f"{group}_{key}": value for group in ("eval", "bias", "smoothness", "curvature")
                               for key, value in cfg[group].items()})
        number("optimizer.lr", cfg.optimizer.lr, above=0.0)  # torch's own optimizers say less
    dataset = build_part(cfg, "dataset")
    torch.manual_seed(settings.seed)
    model = build_part(cfg, "model", input_shape=dataset.input_shape, outputs=dataset.outputs).to(device, dtype)
    estimator = build_part(cfg, "estimator", solver=build_part(cfg, "solver"))
    with bad_values_named():
        return MetaTraining(model, dataset, estimator, settings, lambda p: build_part(cfg, "optimizer", params=p))


def build_part(cfg: DictConfig, group: str, **given: Any) -> Any:
    """What a group's ``_target_`` makes of its settings. Raises ConfigError."""
    try:
        return hydra.utils.instantiate(cfg[group], **given, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError | TypeError):
            raise
        text = str(error.__cause__)
        key = text.split("=", 1)[0]
        if key in cfg[group]:  # a setting taken from the top level, like width, is named as it is there
            text = text if OmegaConf.is_interpolation(cfg[group], key) else f"{group}.{text}"
        else:
            text = f"{group}={choices()[group]}: {text}"
        raise ConfigError(text) from error


@contextmanager
def bad_values_named() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(re.sub("^(eval|bias|smoothness|curvature)_", r"\1.", str(error))) from error


def choose_device(name: str) -> torch.device:
    found = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if found else "cpu"
    if name == "cuda" and distributed.size() > 1:  # each of a machine's processes has a GPU of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise refuse("device", name, "auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(f"{name}:0".split(":")[1]) >= found:
        raise refuse("device", name, f"a GPU that is there, and PyTorch finds {found}; device=cpu works everywhere")
    return torch.device(name)


def checkpoint_to_continue(cfg: DictConfig, folder: Path) -> Path | None:
    """A run started again in its own folder continues there; else ``resume=``, a checkpoint or a run's folder."""
    own = folder / "checkpoint.pt"
    if own.exists() or cfg.resume is None:
        return own if own.exists() else None
    path = Path(str(cfg.resume))
    return path / own.name if path.is_dir() else path


def choices() -> dict[str, str]:
    """The word chosen for each group: estimator=..., dataset=..., ..."""
    chosen = HydraConfig.get().runtime.choices
    return {group: chosen[group] for group in ("dataset", "model", "estimator", "solver", "optimizer")}


def sweep_name() -> str | None:
    config = HydraConfig.get()
    return Path(config.sweep.dir).as_posix() if config.mode == RunMode.MULTIRUN else None


def meta_train(training: MetaTraining, fresh: bool, record: Callable[[Event], None], checkpoint: Callable[[], None],
               stop: "StopRequest") -> None:
    """The loop: meta-steps, and after each what is due; what is due at the start, if it is ``fresh``."""
    s = training.settings
    if fresh:
        record(training.measure(first=True))
        checkpoint()
    on_terminal = sys.stderr.isatty()
    with (logging_redirect_tqdm() if on_terminal else nullcontext(),
          tqdm(total=s.steps, initial=training.step, unit="step", disable=not on_terminal, dynamic_ncols=True,
               desc="meta-training") as bar):
        for event in training.train(lambda: stop.requested):
            measured = training.measure()
            event |= measured
            record(event)
            if training.step % s.checkpoint_every == 0 or training.step == s.steps:
                checkpoint()
            bar.set_postfix(progress(training), refresh=False)
            bar.update()
            if measured and not on_terminal:
                log.info("step %d/%d, %s, %.0f s left", training.step, s.steps,
                         ", ".join(f"{key} {value}" for key, value in progress(training).items()),
                         (s.steps - training.step) * statistics.median(training.step_seconds))
    if stop.requested:
        checkpoint()
        raise Interrupted(f"stopped by {stop.requested} at step {training.step}")


def progress(training: MetaTraining) -> dict[str, str]:
    shown = {"loss": "train/loss", "val accuracy": "val/accuracy", "val loss": "val/loss"}
    return {name: f"{training.latest[key]:.3f}" for name, key in shown.items() if training.latest.get(key) is not None}


@dataclass
class StopRequest:
    """The name of the signal that asked for a stop, if one has."""

    requested: str | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask for a stop after the present step; a second one stops at once."""
    request = StopRequest()
    alone = distributed.size() == 1  # else torchrun repeats a terminal's signal, and kills who takes too long

    def ask(number: int, _: object) -> None:
        if request.requested and alone:
            raise Interrupted("stopped at once")
        if not request.requested:
            request.requested = signal.Signals(number).name
            log.warning("%s: stopping after this step%s", request.requested, " (once more: at once)" * alone)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        if alone:  # else to the end, so that torchrun's signal does not cut short what is said of a lost process
            for number, handler in before.items():
                signal.signal(number, handler)


def report(summary: Mapping[str, Any], folder: Path) -> None:
    """The table at the end of a run."""
    def given(key: str, form: str, scale: float = 1.0) -> str:
        return "not available" if summary[key] is None else format(scale * summary[key], form)

    accuracy = given("test/accuracy", ".1f", 100)
    if summary["test/accuracy"] is not None:
        accuracy += f" ± {given('test/accuracy_ci95', '.1f', 100)} %"
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


def one_line(error: Exception) -> str:
    """What was wrong on the command line, as one line."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: takes one of {', '.join(error.options)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unknown = re.match("Could not override '(.+)'", lines[0])
    if unknown:
        return f"{unknown[1]}: there is no such setting (python train.py --help lists them)"
    return "; ".join(lines[:2])


def start() -> None:
    """What ``main`` does, with every expected end told in one line."""
    try:
        if {"-m", "--multirun"} & set(sys.argv):
            if distributed.size() > 1:
                raise ConfigError("--multirun: takes one process, and torchrun started this one with others")
            os.environ["FOBMAML_SWEEP"] = sweeps.name_of(sys.argv[1:])
            if any(argument.startswith("hydra/launcher=") for argument in sys.argv):
                os.environ.setdefault("OMP_NUM_THREADS", "1")  # jobs side by side do not fight for cores
        main()
    except EXPECTED as error:
        if TRACED:
            raise
        if not sweeps.failures():
            sys.exit(f"error: {one_line(error)}" if distributed.rank() == 0 else 1)
    except OSError as error:  # Hydra's own files, before a run begins
        if TRACED or error.errno is None:
            raise
        sys.exit(f"error: {error.filename or 'the output folder'}: cannot be written ({error.strerror})")
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'stopped; the same command continues'}", file=sys.stderr)
        sys.exit(130)
    if failed := sweeps.failures():
        jobs = "\n".join(f"  {failure['job']}: {failure['reason']}" for failure in failed)
        sys.exit(f"error: {len(failed)} of the jobs failed; the same command runs them again:\n{jobs}")


if __name__ == "__main__":
    logging.raiseExceptions = False  # a log that cannot be written does not fill the screen
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors then arrive here instead of being printed by Hydra
    if distributed.rank() == 0:
        start()
    else:  # only the first process of a run writes and speaks
        logging.disable()
        with tempfile.TemporaryDirectory() as folder:
            sys.argv += [f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
            start()
