"""An append-only log of who put what into production: a JSON object a line, each with the hash of the last.

A line exists once its newline is on the disk. Changing, removing or inserting a line breaks the chain
from there on; cutting lines off the end shows as a registry that is not where the log says it is.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from retuner.errors import Refused
from retuner.files import disk_full_said, fsync_folder

START = "0" * 64
"""What the first line holds in place of a hash."""

CHAIN = ("seq", "at", "prev", "hash", "after_torn_line")
"""The keys that `append` gives an entry."""

Entry = dict[str, Any]


def append(log: Path, facts: Entry) -> Entry:
    """Add an entry and wait until it is on the disk. One writer at a time; the caller sees to that.

    Errors: Refused when the chain is broken: nothing may be added to a log that was tampered with.
    """
    entries = verified(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        **facts,
        "seq": len(entries) + 1,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "prev": entries[-1]["hash"] if entries else START,
    }
    if torn := _split(log)[1]:
        entry["after_torn_line"] = torn.decode("utf-8", "replace")
    entry["hash"] = _hash(entry)
    line = json.dumps(entry, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    is_new = not log.exists()
    with disk_full_said(log.parent), log.open("r+b" if log.exists() else "xb") as file:
        file.truncate(file.seek(0, os.SEEK_END) - len(torn))
        file.seek(0, os.SEEK_END)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        fsync_folder(log.parent)
    return entry


def verified(log: Path) -> list[Entry]:
    """Every entry, oldest first. A last line that a crash tore is no entry.

    Errors: Refused, naming the first line that is not what was written.
    """
    entries: list[Entry] = []
    previous = START
    for number, line in enumerate(_split(log)[0], 1):
        try:
            entry = json.loads(line)
            whole = entry["prev"] == previous and entry["hash"] == _hash(entry) and entry["seq"] == number
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise Refused(
                f"{log} line {number} is not what was written there",
                "an unbroken chain of hashes",
                "find out who changed it; restore the file, or move it away to begin a new log",
            )
        entries.append(entry)
        previous = entry["hash"]
    return entries


def _split(log: Path) -> tuple[list[bytes], bytes]:
    """The whole lines, and what stands after the last newline."""
    if not log.exists():
        return [], b""
    *lines, torn = log.read_bytes().split(b"\n")
    return lines, torn


def _hash(entry: Entry) -> str:
    told = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
