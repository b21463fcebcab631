"""Reads the records of an offline wandb run: LevelDB's log format, blocks of 32 KiB, around protocol buffers."""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def records(path: Path) -> list[Any]:
    data, at, parts, found = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # a block's tail too short for a header is padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def read_run(folder: Path) -> dict[str, Any]:
    """Config, history, summary, exit code and names of the one offline run in a run's folder."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "exit_code": None}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update if u.key}
            run |= {
                "id": record.run.run_id,
                "name": record.run.display_name,
                "group": record.run.run_group,
                "project": record.run.project,
                "entity": record.run.entity,
                "notes": record.run.notes,
                "tags": list(record.run.tags),
                "job_type": record.run.job_type,
            }
        elif kind == "history":
            run["history"].append(
                {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            )
        elif kind == "summary":
            run["summary"] |= {u.key or ".".join(u.nested_key): json.loads(u.value_json) for u in record.summary.update}
        elif kind == "exit":
            run["exit_code"] = record.exit.exit_code
    return run
