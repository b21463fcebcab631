"""Meta-trains one configuration and measures it: python train.py estimator=symmetric width=250

Every setting is in configs/; python train.py --help lists them.
"""

import inspect
import json
import logging
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import hydra
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fobmaml import distributed, folders, sweeps
from fobmaml.allocator import keep_freed_memory
from fobmaml.arguments import number, one_of, refuse, whole_number
from fobmaml.console import make_lasting, one_line
from fobmaml.estimators import Estimator, NotConverged
from fobmaml.files import (
    CannotWrite,
    CheckpointError,
    EventLog,
    FolderInUse,
    events_until,
    load_checkpoint,
    read_events,
    save_checkpoint,
    sole_user,
    write_json,
)
from fobmaml.plotting import learning_curve, method
from fobmaml.provenance import provenance
from fobmaml.solvers import Solver
from fobmaml.tasks.checks import check_members
from fobmaml.tracking import WandbRun, check_options, options_of
from fobmaml.training import Diverged, Event, MetaTraining, Settings

log = logging.getLogger("train")

TRACED = os.environ.get("HYDRA_FULL_ERROR") == "1"  # as in Hydra

# Runs that agree in everything else are the same run, and continue each other's checkpoints.
NOT_PART_OF_A_RUN = ("resume", "wandb", "device", "engine", "checkpoint_every")

KINDS = {"model": torch.nn.Module, "solver": Solver, "estimator": Estimator, "optimizer": torch.optim.Optimizer}
"""What the ``_target_`` of a group makes; of a data set it is looked at what it has."""

SUMMARY_KEYS = ("test/accuracy", "test/accuracy_ci95", "test/loss", "memory/peak_bytes", "bias/relative_error",
                "bias/cosine", "bias/reference", "bias/reason", "time/meta_step_s", "inner/residual",
                "meta_gradient/norm", "model/parameters", "val/accuracy", "val/loss", "train/loss")


class ConfigError(ValueError):
    """A setting that cannot work; the text is one line that names it."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop."""


# What a user can put right: reported in one line. Set HYDRA_FULL_ERROR=1 for the traceback.
EXPECTED = (ConfigError, CannotWrite, CheckpointError, Diverged, FolderInUse, NotConverged, distributed.ProcessLost,
            HydraException, OmegaConfBaseException, yaml.YAMLError)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """One job: a run in its own folder. Returns its last validation accuracy, for sweepers."""
    keep_freed_memory()
    make_lasting()  # in a job's process, too
    hydra_config = HydraConfig.get()
    folder, in_sweep = Path(hydra_config.runtime.output_dir), hydra_config.mode == RunMode.MULTIRUN
    try:
        read_numbers(cfg)
        with distributed.processes():
            if distributed.rank() == 0:
                return run(cfg, folder)
            follow(cfg)
            return None
    except EXPECTED as error:
        if TRACED or in_sweep:  # a sweep goes on, and ends with the error
            raise
        sys.exit(f"error: {one_line(error)}")
    finally:
        folders.remove_empty()


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
    with distributed.leading(training.learner.device):
        load(cfg, training, folder)  # for its errors: nothing is written before all is known to fit
        with sole_user(folder):
            return lead(cfg, training, folder)


@dataclass(frozen=True)
class Start:
    """Where a run goes on: at a checkpoint's ``state`` from ``source``, after the events that ``history`` says."""

    source: Path | None
    state: dict[str, Any] | None
    history: list[dict[str, Any]]
    summary: dict[str, Any] | None
    """Of the run that is complete already."""


def load(cfg: DictConfig, training: MetaTraining, folder: Path) -> Start:
    """Brings ``training`` to where the run goes on. Raises CheckpointError, CannotWrite."""
    source = checkpoint_to_continue(cfg, folder)
    state, history = None, []
    if source:
        try:
            state = load_checkpoint(source, same_run(cfg))
        except CheckpointError as error:
            raise CheckpointError(f"{'checkpoint ' if source.parent == folder else 'resume='}{error}") from None
        try:
            training.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{source}: takes a whole checkpoint of this program, and this one's state does not "
                                  f"fit ({one_line(error) or type(error).__name__})") from None
        history = events_until(source.with_name("metrics.jsonl"), training.step)
    summary = read_summary(folder / "summary.json")
    if source is None or source.parent != folder:
        folders.refuse_foreign(folder, "hydra.run.dir", folders.CONFIG,
                               ("summary.json", "metrics.jsonl", "learning_curve.png"))
        steps = [event["step"] for event in events_until(folder / "metrics.jsonl", sys.maxsize)]
        if any(steps) or (summary and (summary["step"] or summary["status"] == "completed")):
            raise CannotWrite(f"hydra.run.dir={folder}: takes a folder without results, and there are those of a run "
                              "whose checkpoint.pt is gone")
        summary = None
    return Start(source, state, history, summary if summary and summary["status"] == "completed" else None)


def read_summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {**summary, "status": summary["status"], "step": summary["step"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: takes a summary of this program's ({one_line(error)})") from None


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def same_run(cfg: DictConfig) -> dict[str, Any]:
    return {key: value for key, value in plain_config(cfg).items() if key not in NOT_PART_OF_A_RUN}


def lead(cfg: DictConfig, training: MetaTraining, folder: Path) -> float | None:
    start = load(cfg, training, folder)  # again: another process may have gone on until now
    if start.summary:
        log.info("%s is complete: nothing to do", folder)
        report(start.summary, folder)
        return cast(float | None, start.summary["val/accuracy"])
    config, state = plain_config(cfg), start.state
    folders.write_settings(folder, cfg)
    if state:
        log.info("continuing %s at step %d", start.source, training.step)
    events = EventLog(folder / "metrics.jsonl", start.history)
    own = start.source is not None and start.source.parent == folder
    wandb_run = WandbRun(folder, {**config, "choices": choices()},
                         options_of(config["wandb"], sweep_name(), "-".join(folder.parts[-2:]),
                                    state["wandb_id"] if state and own else None))

    def record(event: Event) -> None:
        if event:
            events.write(training.step, event)
            wandb_run.write(training.step, event)

    def checkpoint() -> None:
        save_checkpoint(folder / "checkpoint.pt", {**training.state_dict(), "wandb_id": wandb_run.id}, same_run(cfg))

    summary: dict[str, Any] = {"status": "failed"}
    started = time.time()
    try:
        with stop_requests() as stop:
            meta_train(training, state, record, checkpoint, stop)
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
                    "provenance": provenance(training.learner.device, training.learner.used), "config": config}
        events.close()
        try:
            with suppress(CannotWrite) if "reason" in summary else nullcontext():  # the first error is the one to say
                write_json(folder / "summary.json", summary)
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
        check_options(plain_config(cfg)["wandb"])
        whole_number("seed", cfg.seed, at_least=0, at_most=2**64 - 1)  # what torch takes
        settings = Settings(**{key: cfg[key] for key in ("steps", "seed", "meta_batch", "fixed_tasks", "task_chunk",
                                                         "memory_limit_mb", "engine", "schedule", "log_every",
                                                         "checkpoint_every")},
                            **{f"{group}_{key}": value for group in ("eval", "bias", "smoothness", "curvature")
                               for key, value in cfg[group].items()})
        number("optimizer.lr", cfg.optimizer.lr, above=0.0)  # torch's own optimizers say less
    dataset = build_part(cfg, "dataset")
    with bad_values_named():
        check_members(dataset)
    torch.manual_seed(settings.seed)
    model = build_part(cfg, "model", input_shape=dataset.input_shape, outputs=dataset.outputs).to(device, dtype)
    estimator = build_part(cfg, "estimator", solver=build_part(cfg, "solver"))
    with bad_values_named():
        return MetaTraining(model, dataset, estimator, settings, lambda p: build_part(cfg, "optimizer", params=p))


def read_numbers(node: DictConfig | ListConfig) -> None:
    """Makes numbers of text that reads as one, as environment variables have it: seed=${oc.env:SLURM_ARRAY_TASK_ID}.

    What the class of a group (``_target_``) takes as text, and wandb's settings, stay as they are.
    """
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        if key in ("_target_", "resume", "wandb") or OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            read_numbers(value)
        elif isinstance(value, str) and takes_number(node, key):
            with suppress(HydraException):  # it is no value that a command line could have
                read = OverridesParser.create().parse_override(f"value={value}").value()
                if isinstance(read, int | float):
                    node[key] = read


def takes_number(node: DictConfig | ListConfig, key: Any) -> bool:
    """Whether a setting may be a number. Where a class does not say, text is meant if it was written as text."""
    if isinstance(node, ListConfig) or "_target_" not in node:
        return True
    try:
        parameters = inspect.signature(hydra.utils.get_object(node["_target_"])).parameters
    except (HydraException, ImportError, ValueError, TypeError):  # build_part says it
        return False
    wanted = parameters[key].annotation if key in parameters else inspect.Parameter.empty
    if wanted in (inspect.Parameter.empty, Any) or isinstance(wanted, str):
        return OmegaConf.is_interpolation(node, key)
    return bool({int, float, bool} & {wanted, *get_args(wanted)})


def build_part(cfg: DictConfig, group: str, **given: Any) -> Any:
    """What a group's ``_target_`` makes of its settings. Raises ConfigError."""
    try:
        part = hydra.utils.instantiate(cfg[group], **given, _convert_="all")
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
    kind = KINDS.get(group, object)
    if not isinstance(part, kind):
        raise ConfigError(f"{group}._target_={cfg[group].get('_target_')}: takes one that makes a "
                          f"{kind.__module__}.{kind.__qualname__}")
    return part


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
    if HydraConfig.get().job.chdir:  # it is said from where the command is given
        path = Path(hydra.utils.to_absolute_path(str(path)))
    return path / own.name if path.is_dir() else path


def choices() -> dict[str, str]:
    """The word chosen for each group: estimator=..., dataset=..., ..."""
    chosen = HydraConfig.get().runtime.choices
    return {group: chosen[group] for group in ("dataset", "model", "estimator", "solver", "optimizer")}


def sweep_name() -> str | None:
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN:
        return None
    folder, here = Path(config.sweep.dir).absolute(), Path(config.runtime.cwd)
    return (folder.relative_to(here) if folder.is_relative_to(here) else folder).as_posix()


def meta_train(training: MetaTraining, state: dict[str, Any] | None, record: Callable[[Event], None],
               checkpoint: Callable[[], None], stop: "StopRequest") -> None:
    """The loop: meta-steps, and after each what is due; what is due at the start, if it continues no ``state``."""
    s, first = training.settings, training.step + 1
    if state is None:
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
            if state and training.step == first:
                say_if_another_engine(state.get("engine", ""), training.learner.used)
            bar.set_postfix(progress(training), refresh=False)
            bar.update()
            if measured and not on_terminal:
                log.info("step %d/%d, %s, %.0f s left", training.step, s.steps,
                         ", ".join(f"{key} {value}" for key, value in progress(training).items()),
                         (s.steps - training.step) * statistics.median(training.step_seconds))
    if stop.requested:
        checkpoint()
        raise Interrupted(f"stopped by {stop.requested} at step {training.step}")


def say_if_another_engine(before: str, now: str) -> None:
    if before and set(now.split("+")) - set(before.split("+")):
        log.warning("gradients are computed by engine %s, and up to this checkpoint by %s: the run may differ from an "
                    "uninterrupted one by rounding", now, before)


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


def start() -> None:
    """What ``main`` does, with every expected end told in one line."""
    make_lasting()
    try:
        os.environ["FOBMAML_SWEEP"] = sweeps.name_of(sys.argv[1:])
        if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv):
            if distributed.size() > 1:
                raise ConfigError("--multirun: takes one process, and torchrun started this one with others")
            if any(argument.startswith("hydra/launcher=") for argument in sys.argv):
                os.environ.setdefault("OMP_NUM_THREADS", "1")  # jobs side by side do not fight for cores
        main()
    except EXPECTED as error:
        if TRACED:
            raise
        if not sweeps.failures():
            sweeps.undo()
            sys.exit(f"error: {one_line(error)}" if distributed.rank() == 0 else 1)
    except OSError as error:  # Hydra's own files, before a run begins
        if TRACED or error.errno is None:
            raise
        sys.exit(f"error: {error.filename or 'the output folder'}: cannot be written ({error.strerror})")
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'stopped; the same command continues'}", file=sys.stderr)
        sys.exit(130)
    finally:
        folders.remove_empty()
    if failed := sweeps.failures():
        jobs = "\n".join(f"  {failure['job']}: {failure['reason']}" for failure in failed)
        sys.exit(f"error: {len(failed)} of the jobs failed; the same command runs them again:\n{jobs}")


if __name__ == "__main__":
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it logs is raised, too
    logging.raiseExceptions = False  # a log that cannot be written does not fill the screen
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors then arrive here instead of being printed by Hydra
    if distributed.rank() == 0:
        start()
    else:  # only the first process of a run writes and speaks
        logging.disable()
        with tempfile.TemporaryDirectory() as folder:
            sys.argv += [f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
            start()
