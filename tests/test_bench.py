"""The benchmark: its limit, its turns, whom it quotes, and that everybody computes the same gradient."""

import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import candidates
import claims
import comparisons
import figure_time
import jax_peer
import processors
import pytest
import rate
import summary
import tables
import timing
from candidates import Workers, gradient_error
from conftest import ROOT
from peers import PEERS
from rate import Limit

from fobmaml.files import read_csv, write_csv

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """rate.c, compiled as make bench does."""
    if shutil.which("gcc") is None or rate.instructions() not in rate.WIDER:
        pytest.skip("no gcc, or not a processor with AVX2")
    folder = tmp_path_factory.mktemp("rate")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", folder, "--build-temp", folder / "o"]
    subprocess.run(command, cwd=ROOT / "benchmarks", check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers()
    yield started
    started.stop()


def test_the_loops_that_a_processor_can_run_are_found(loops):
    found = rate.compiled(loops)
    assert tuple(sorted(found)) == tuple(sorted(rate.WIDER[rate.instructions()]))
    for name, loop in found.items():
        lanes, times = {"avx2": 8, "avx512": 16}[name], 10**6
        started = time.perf_counter()
        rate_of_one = loop(1, times)
        # 12 vectors of multiply-adds each time, two operations each: no more is timed than the call takes.
        assert rate_of_one * (time.perf_counter() - started) >= 2 * 12 * lanes * times


def test_the_limit_is_the_quickest_loop(loops):
    limit = Limit(1, loops)
    assert limit.rates[limit.name] == max(limit.rates.values())
    assert limit.rate() > 0
    assert limit.usual() > 0


def test_without_a_loop_the_limit_is_a_matrix_product(tmp_path):
    (tmp_path / "rate_avx2.so").write_text("no library")
    limit = Limit(1, tmp_path)
    assert (limit.name, limit.loops, limit.rates) == (rate.PRODUCT, {}, {})
    assert limit.rate() > 0


@pytest.mark.parametrize(
    ("rates", "repeated", "disturbed", "counted"),
    [
        ([100, 100], 0, False, 100),
        ([100, 91], 0, False, 95.5),
        ([100, 89, 100, 102], 1, False, 101),  # slower after it
        ([112, 100, 100, 100], 1, False, 100),  # quicker before it
        ([50, 50, 70, 80, 60, 60, 50, 40], 3, True, 75),  # never usual: the least disturbed counts
    ],
)
def test_a_disturbed_call_is_repeated(rates, repeated, disturbed, counted):
    found, calls = iter(rates), []
    clocked = timing.clocked(lambda: calls.append(1), lambda: next(found), lambda: 100.0)
    assert (clocked.repeated, clocked.disturbed, clocked.rate) == (repeated, disturbed, counted)
    assert len(calls) == repeated + 1
    assert not [*found]


def test_everybody_has_a_turn_in_every_round():
    limit, order = SimpleNamespace(rate=lambda: 2.0, usual=lambda: 2.0, matrix_product=lambda: 1.0), []
    calls = {name: [lambda name=name: order.append(name)] * 2 for name in "ab"}
    rounds = timing.take_turns(calls, 2, limit)
    assert "".join(order) == "aabbaabb"
    assert [(found.rate, found.matrix_product, found.repeated) for found in rounds["b"]] == [(2.0, 1.0, 0)] * 2


def test_the_share_of_other_processes():
    before, after = processors.Spent(10.0, 4.0, 20.0), processors.Spent(13.0, 5.0, 24.0)
    assert processors.others_share(before, after) == 0.5  # (3 - 1) of 4
    assert processors.others_share(before, None) is None
    assert processors.others_share(before, processors.Spent(11.0, 6.0, 24.0)) == 0.0  # rounding


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells")
def test_own_processor_time_is_counted():
    before, started = processors.spent(), time.process_time()
    while time.process_time() - started < 0.2:
        pass
    after = processors.spent()
    assert after.by_us - before.by_us >= 0.15
    assert after.by_all - before.by_all >= 0.15


def test_whoever_is_not_far_behind_is_timed():
    assert timing.not_far_behind({"a": 1.2, "b": 1.0, "c": 1.4}, 1.3) == ["b", "a"]
    assert timing.not_far_behind({"a": float("inf")}, 1.3) == []


def test_one_thread_is_tried_of_the_ways_that_are_quick_with_all():
    seconds = {("x", 2): 1.0, ("y", 2): 1.1, ("z", 2): 9.0, ("x", 1): 0.5, ("y", 1): 1.0}

    class Way(SimpleNamespace):
        __hash__ = object.__hash__

    kept, tried = comparisons.quickest_ways(
        lambda how, threads: Way(how=how, threads=threads),
        ("x", "y", "z"),
        2,
        lambda one: seconds[one.how, one.threads],
    )
    assert [(one.how, one.threads) for one in kept] == [("x", 1)]
    assert tried == {"x, 2": 1.0, "y, 2": 1.1, "z, 2": 9.0, "x, 1": 0.5, "y, 1": 1.0}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "") for name in PEERS),
        ("jax_maml", "own, vmap"),
        ("jax_symmetric", "windows, map"),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in itertools.product(jax_peer.METHODS, jax_peer.HOW)),
    ],
    ids=lambda part: part.replace(", ", "-"),
)
def test_others_compute_our_gradient(name, how, workers):
    if jax_peer.missing() if how else PEERS[name].missing():
        pytest.skip(f"{name}: its library is not installed")
    assert gradient_error(name, how, 4, 3, workers) < 1e-9


def test_another_gradient_is_refused(workers, monkeypatch):
    plain = candidates.plain_network

    def other_network(model):
        network = plain(model)
        network[-1].weight.data *= 1.1
        return network

    monkeypatch.setattr(candidates, "plain_network", other_network)
    with pytest.raises(AssertionError, match=r"loop_maml at width 4 and 3 inner steps is .* away from our maml"):
        gradient_error("loop_maml", "", 4, 3, workers)


def test_who_takes_too_long_is_stopped(workers):
    if jax_peer.missing():
        pytest.skip("JAX is not installed")
    setting = candidates.Setting(4, 10**6)  # MAML would keep all these steps, and fail before it is late
    one = candidates.ByJax(setting, "jax_symmetric", 1, jax_peer.HOW[0], workers)
    one.prepare(setting.tasks)
    with pytest.raises(jax_peer.TooLong):
        one.gradient(setting.tasks, 0.01)
    assert one.worker.process is None


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(jax_peer, "missing", lambda: True)
    said: list[str] = []
    assert not [name for name in candidates.names(said.append) if "jax" in name]
    assert [line for line in said if line.startswith("jax_maml is left out")]


def test_rows_say_who_was_quoted(tmp_path):
    bench = comparisons.Bench(Limit(1, tmp_path), ["symmetric", "loop_symmetric"])
    ours, loop = comparisons.by_estimator(4, 2, 1, bench)
    assert (ours["estimator"], ours["threads"], ours["tasks"], ours["limit"]) == ("symmetric", 1, 16, rate.PRODUCT)
    assert (loop["tasks_at_once"], loop["engine"]) == (1, "autograd")
    assert loop["gradient_error"] < 1e-9
    assert 0 < loop["fraction_of_limit"] < ours["fraction_of_limit"] < 1
    write_csv(tmp_path / "bench.csv", [ours, loop])
    (row, _) = read_csv(tmp_path / "bench.csv")
    assert row["multiply_adds"] == str(ours["multiply_adds"])


def test_tables_and_figure_take_the_columns_of_the_limit(tmp_path):
    """Of the table that is there, with JAX's row another's."""
    new = {"threads": 2, "limit": "avx512", "multiply_add_gflops": 400.0, "note": ""}
    table = [row for row in read_csv(RESULTS / "bench.csv") if row["estimator"] != "jax_maml"]
    rows = [{**row, **new, "matrix_product_gflops": 200.0} for row in table]
    of_jax = [
        {**row, "estimator": "jax_maml", "threads": 1, "seconds_16_tasks": 5.0}
        for row in rows
        if row["estimator"] == "maml"
    ]
    widest = [row for row in of_jax if row["width"] == of_jax[-1]["width"]]
    widest[0] |= {"seconds_median": None, "seconds_16_tasks": None, "limit": None}
    widest[-1] |= {"seconds_median": None, "peak_bytes": None, "multiply_add_gflops": None}
    write_csv(tmp_path / "bench.csv", rows + of_jax)
    table = tables.speed(tmp_path)
    (jax,) = [line for line in table.splitlines() if line.startswith("| MAML by JAX")]
    assert jax.count("(1 thread)") == 3
    assert "| took too long |" in jax
    assert jax.endswith("| – |")
    assert "| a large matrix product by torch | 50 % | 50 % | 50 % | 50 % |" in table
    assert "fused multiply-adds by all threads (2), 400 GFLOP/s" in table
    figure_time.draw(tmp_path)
    assert (tmp_path / "figures" / "time.png").exists()
    assert "MAML by TorchOpt, MAML, plain torch, MAML by JAX: " in claims.seconds(summary.InFolder(tmp_path)).measured
