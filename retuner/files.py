"""Writing files so that they are whole or absent, whenever the power goes."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retuner.errors import DISK_FULL, Unavailable


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: written aside, fsynced, renamed, and the rename fsynced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    fsync_folder(path.parent)


def fsync_tree(folder: Path) -> None:
    """Every file and folder below `folder`, and itself, on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_full_said(folder: Path) -> Iterator[None]:
    """Turn a full disk (or quota, or file-size limit) below `folder` into Unavailable."""
    try:
        yield
    except Exception as error:
        if (cause := _disk_full(error)) is None:
            raise
        raise Unavailable(
            f"no room to write below {folder}: {cause}",
            "free disk space; nothing that was finished is lost",
            "free some space or set RETUNER_HOME to a larger disk, then run the same command again",
        ) from error


def _disk_full(error: BaseException) -> BaseException | None:
    """The link of the chain that says so. Rust libraries give the errno as text alone."""
    link: BaseException | None = error
    while link is not None:
        told = str(link)
        if getattr(link, "errno", None) in DISK_FULL or any(f"os error {n})" in told for n in DISK_FULL):
            return link
        link = link.__cause__ or link.__context__
    return None
