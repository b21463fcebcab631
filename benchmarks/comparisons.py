"""What is compared with what, and the rows of the tables that come of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from candidates import TASKS, Candidate, Ours, Setting, Workers, candidate, gradient_error, method_of, ways
from jax_peer import Failed, TooLong
from rate import Limit, seconds
from timing import Round, Row, first_round, not_far_behind, spread, take_turns

from fobmaml.tasks import TaskBatch

SHORT, FEW = 10, 2
"""Up to SHORT inner steps all tasks are measured; beyond, FEW at most, to save time: memory a task is the same, and so
are seconds a task where task_chunk=auto is no more than FEW."""
CHUNKS = (1, 2, 4, 8, 16)
PATIENCE = 4.0
"""Chunks that at first take so many times as long as the best are not timed further."""
CLOSE = 1.3
"""Of the ways to write one candidate, and its numbers of threads, those that at first take so many times as long as the
quickest are not timed further."""
TOO_LONG, AT_LEAST = 6.0, 5.0
"""A candidate that at first takes so many times as long as ours by the same method, and so many seconds, is dropped."""


@dataclass
class Bench:
    """What a run of the benchmark has: the machine's ``limit``, the ``names`` of bench.csv, the processes of JAX, and
    ``report``, which tells. ``quick``: only the first way to write each candidate."""

    limit: Limit
    names: Sequence[str]
    report: Callable[[str], object] = print
    quick: bool = False
    workers: Workers = field(default_factory=Workers)


def tried(way: Candidate) -> str:
    return f"{way.how}, {way.threads}" if way.how else str(way.threads)


def trial(one: Candidate, part: int, limit: float | None, report: Callable[[str], object]) -> float:
    """Seconds of the calls on the first ``part`` tasks, warmed up; infinite, with a line to ``report``, where it takes
    longer than ``limit`` or its process fails."""
    tasks = one.setting.tasks[:part]
    try:
        one.prepare(tasks)
        for call in one.calls(tasks, limit)[:1]:  # warms up
            call()
        return sum(map(seconds, one.calls(tasks, limit)))
    except (TooLong, Failed) as error:
        report(f"{type(one).__name__}, {tried(one)}: {error}")
        return float("inf")


def quickest_ways(
    make: Callable[[str, int], Candidate], hows: tuple[str, ...], threads: int, time: Callable[[Candidate], float]
) -> tuple[list[Candidate], dict[str, float]]:
    """Of one name: who is to be timed, and the seconds of all that were tried. Every way with all ``threads``, then
    those that are not far behind with one."""
    found: dict[Candidate, float] = {one: time(one) for one in (make(how, threads) for how in hows)}
    if threads > 1:
        alone = [make(one.how, 1) for one in not_far_behind(found, CLOSE)]
        found |= {one: time(one) for one in alone}
    return not_far_behind(found, CLOSE), {tried(one): spent for one, spent in found.items()}


def by_estimator(width: int, steps: int, repeats: int, bench: Bench) -> list[Row]:
    """The rows of bench.csv for one width and number of inner steps."""
    setting, threads = Setting(width, steps), torch.get_num_threads()
    if steps > SHORT:
        setting.tasks = setting.tasks[:FEW]

    def part(one: Candidate) -> int:
        return TASKS if steps <= SHORT else min(one.a_call, FEW)

    def most_seconds(name: str) -> float | None:
        """That a task may take."""
        method = method_of(name)
        return max(TOO_LONG * min(tries[method].values()), AT_LEAST / TASKS) if method else None

    def seconds_a_task(name: str, one: Candidate) -> float:
        most = most_seconds(name)
        return trial(one, part(one), most and most * part(one), bench.report) / part(one)

    kept: dict[str, list[Candidate]] = {}
    tries: dict[str, dict[str, float]] = {}
    for name in bench.names:
        make = partial(candidate, setting, name, bench.workers)
        hows = ways(name)[:1] if bench.quick else ways(name)
        kept[name], tries[name] = quickest_ways(make, hows, threads, partial(seconds_a_task, name))
    survivors = [one for ones in kept.values() for one in ones]
    for one in survivors:
        one.prepare(setting.tasks[: part(one)])  # again, where its process was stopped
    measured = take_turns({one: one.calls(setting.tasks[: part(one)]) for one in survivors}, repeats, bench.limit)
    rows = []
    for name, ones in kept.items():
        row: Row = {"estimator": name, "engine": "", "how": "", "threads": None, "width": width, "inner_steps": steps}
        if ones:
            one = min(ones, key=lambda one: statistics.median(found.seconds for found in measured[one]))
            row |= timed(one, setting.tasks[: part(one)], measured[one], bench.limit)
            if method_of(name):
                row["gradient_error"] = float(f"{gradient_error(name, one.how, width, steps, bench.workers):.2e}")
        else:
            row["note"] = f"more than {TASKS * (most_seconds(name) or 0.0):.0f} s at first, or no result"
        row["tried_seconds_a_task"] = "; ".join(f"{way}: {spent:.2g}" for way, spent in tries[name].items())
        rows.append(row)
    return rows


def timed(one: Candidate, tasks: TaskBatch, rounds: Sequence[Round], limit: Limit) -> Row:
    """What a row of bench.csv has of one candidate."""
    chunk = tasks[: one.at_once]
    timing = spread([found.seconds for found in rounds])
    others = [found.others_share for found in rounds if found.others_share is not None]
    multiply_adds = round(one.multiply_adds(chunk) * len(tasks) / len(chunk))
    return {
        "engine": one.engine,
        "how": one.how,
        "threads": one.threads,
        "tasks": len(tasks),
        "tasks_at_once": len(chunk),
        **timing,
        f"seconds_{TASKS}_tasks": round(timing["seconds_median"] * TASKS / len(tasks), 5),
        "multiply_adds": multiply_adds,
        "matrix_product_gflops": round(statistics.median(found.matrix_product for found in rounds) / 1e9, 1),
        "multiply_add_gflops": round(statistics.median(found.rate for found in rounds) / 1e9, 1),
        "limit": limit.name,
        "fraction_of_limit": round(
            statistics.median(2 * multiply_adds / found.seconds / found.rate for found in rounds), 4
        ),
        "matrix_product_of_limit": round(statistics.median(found.matrix_product / found.rate for found in rounds), 4),
        "calls_repeated": sum(found.repeated for found in rounds),
        "calls_disturbed": sum(found.disturbed for found in rounds),
        "others_share": round(statistics.mean(others), 3) if others else None,
        "peak_bytes": one.peak_bytes(tasks if one.engine == "jax" else chunk),
        "gradient_error": None,
        "compile_seconds": one.compile_seconds(tasks),
        "tried_seconds_a_task": "",
        "note": "",
    }


def by_chunk(width: int, name: str, repeats: int, bench: Bench) -> list[Row]:
    """The rows of bench_chunks.csv for one width and estimator."""
    setting, threads = Setting(width, SHORT), torch.get_num_threads()
    chunks: dict[str, int | None] = {"auto": None, **{str(chunk): chunk for chunk in CHUNKS}}
    candidates = {key: Ours(setting, name, threads, chunk=chunk) for key, chunk in chunks.items()}
    calls = {key: one.calls(setting.tasks) for key, one in candidates.items()}
    kept = not_far_behind(first_round(calls), PATIENCE)
    measured = take_turns({key: calls[key] for key in calls if key in kept}, repeats, bench.limit)
    timings = {key: spread([found.seconds for found in rounds]) for key, rounds in measured.items()}
    least = min(timing["seconds_median"] for key, timing in timings.items() if key != "auto")
    return [
        {
            "estimator": name,
            "width": width,
            "inner_steps": SHORT,
            "tasks": TASKS,
            "task_chunk": candidates[key].at_once,
            "auto": str(key == "auto").lower(),
            **timing,
            "ratio_to_best_fixed": round(timing["seconds_median"] / least, 3),
        }
        for key, timing in timings.items()
    ]
