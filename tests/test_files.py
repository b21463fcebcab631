"""Files are whole or absent, and what cannot be trusted is refused in one line."""

import json
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fobmaml.files import CannotWrite, write_json
from fobmaml.run.errors import FolderInUse
from fobmaml.run.events import EventLog, events_until, read_events
from fobmaml.run.folders import sole_user
from fobmaml.saved.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from fobmaml.tasks import mnist1d
from fobmaml.tasks.cache import stored

CONFIG = {"width": 8, "estimator": {"lam": 0.5}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 3, "model": {"w": torch.arange(4.0)}}, CONFIG)
    return path


def test_round_trip(checkpoint):
    state = load_checkpoint(checkpoint, CONFIG)
    assert state["step"] == 3
    assert torch.equal(state["model"]["w"], torch.arange(4.0))


@pytest.mark.parametrize("keep", [0, 1, 30, 200, -1, -30])
def test_truncated(checkpoint, keep):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="takes a whole checkpoint") as caught:
        load_checkpoint(checkpoint, CONFIG)
    assert "\n" not in str(caught.value)


def test_one_changed_bit_is_refused_or_has_no_effect(checkpoint):
    content, wanted = checkpoint.read_bytes(), load_checkpoint(checkpoint, CONFIG)
    refused = 0
    for place in range(0, len(content), 7):
        checkpoint.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            found = load_checkpoint(checkpoint, CONFIG)
        except CheckpointError:
            refused += 1
            continue
        assert found["step"] == wanted["step"]
        assert torch.equal(found["model"]["w"], wanted["model"]["w"])
    assert refused > 50


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: torch.save(Malice(), p),
        lambda p: p.write_bytes(pickle.dumps(Malice())),
        lambda p: p.write_text("hello"),
        lambda p: torch.save({"step": 1}, p),
        lambda p: torch.save(torch.ones(2), p),
    ],
)
def test_foreign_files_are_refused_and_nothing_runs(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="takes a whole checkpoint") as caught:
        load_checkpoint(tmp_path / "c.pt", CONFIG)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="takes a checkpoint file, and there is none"):
        load_checkpoint(tmp_path / "none.pt", CONFIG)


def test_another_configuration_is_named(checkpoint):
    with pytest.raises(CheckpointError, match=r"same configuration, and here width=16 \(there 8\)"):
        load_checkpoint(checkpoint, CONFIG | {"width": 16})


def test_a_failed_write_leaves_the_last_good_file(checkpoint, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite, match=r"checkpoint.pt: cannot be written \(No space left on device\)"):
        save_checkpoint(checkpoint, {"step": 4, "model": {}}, CONFIG)
    assert load_checkpoint(checkpoint, CONFIG)["step"] == 3
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint.pt"]


def test_a_folder_has_one_user(tmp_path):
    with (
        sole_user(tmp_path),
        pytest.raises(FolderInUse, match="takes a folder in which no other process works"),
        sole_user(tmp_path),
    ):
        pass
    with sole_user(tmp_path):
        pass


def test_a_users_file_of_the_locks_name_keeps_its_content(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with sole_user(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "s.json", {"a": float("nan"), "b": 1.5, "c": float("inf")})
    assert json.loads((tmp_path / "s.json").read_text()) == {"a": None, "b": 1.5, "c": None}


def test_event_log_continues_after_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = EventLog(path)
    for step in range(5):
        log.write(step, {"x": step / 2})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "x"')  # cut short
    log = EventLog(path, events_until(path, 3))
    log.write(4, {"x": -1.0})
    log.close()
    assert [(e["step"], e["x"]) for e in read_events(path)] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, -1.0)]


def test_a_log_that_is_not_one_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in ('{"step": 1}\nnote\n{"step": 2}\n', "[1]\n", '{"stop": 1}\n', "a\nb\n"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: takes an event of this program's a line"):
            events_until(path, 5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> tuple[bytes, dict]:
    folder = tmp_path_factory.mktemp("cache")
    arrays = mnist1d.load_arrays(folder)
    return (folder / "mnist1d.npz").read_bytes(), arrays


def test_a_damaged_cache_is_known_whatever_the_damage(tmp_path, cache):
    content, arrays = cache
    path, random = tmp_path / "mnist1d.npz", np.random.default_rng(0)
    middle = content.index(b"NUMPY")
    damaged = [
        b"",
        b"x",
        b"PK\x03\x04",
        pickle.dumps(Malice()),
        content[: len(content) // 2],
        content[:-1],
        content[1:],
        content.replace(b"descr", b"d(scr"),
        content.replace(b"'shape'", b"\x00\xff((((("),
        content.replace(b"\x93NUMPY\x01", b"\x93NUMPY\x09"),
        content[:middle] + content[middle + 64 :],
    ]
    for _ in range(100):  # where the formats are: the directory at the end, and the headers
        place = int(random.choice([random.integers(200), len(content) - 1 - random.integers(400)]))
        damaged.append(content[:place] + bytes([content[place] ^ 1 << int(random.integers(8))]) + content[place + 1 :])
    unknown = 0
    for data in damaged:
        path.write_bytes(data)
        found = stored(path)
        unknown += found is None
        assert found is None or all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert unknown > 50
    path.unlink()
    path.mkdir()
    assert stored(path) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.write_bytes(b"PK damaged"),
        lambda p: p.mkdir(),
        lambda p: p.parent.chmod(0o500),
        lambda p: (p.parent.rmdir(), p.parent.write_text("in the way")),
    ],
)
def test_a_cache_that_cannot_be_used_costs_only_time(tmp_path, cache, make):
    (tmp_path / "cache").mkdir()
    make(tmp_path / "cache" / "mnist1d.npz")
    found = mnist1d.load_arrays(tmp_path / "cache")
    assert all(np.array_equal(found[name], cache[1][name]) for name in cache[1])


def test_a_cache_in_a_folder_that_cannot_be_written(tmp_path, cache):
    """A file system mounted read-only: root may write to a folder whatever its mode."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        found = mnist1d.load_arrays(disk)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert all(np.array_equal(found[name], cache[1][name]) for name in cache[1])
