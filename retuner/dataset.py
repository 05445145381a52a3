"""The data a run reads: files that DVC keeps, every byte checked against the one hash in the .dvc file.

DVC itself trusts its cache, so a flipped bit passes `dvc pull` and `dvc status`. Here the files are hashed
again on every use, without importing DVC; DVC is only asked when something is missing or does not match.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retuner.dvc_file import Tracked, md5_of, read_dvc_file
from retuner.dvc_objects import corrupt_cache, faults, listing_of, open_repo, pull, some
from retuner.errors import Refused, Unavailable
from retuner.files import write_whole

if TYPE_CHECKING:
    from dvc.repo import Repo

# A file touched this recently may be written to again without its time stamps moving: its hash is not kept.
RACY_NS = 2_000_000_000


# Dataclasses, not pydantic models: a fully cached run ends before pydantic would have been imported.


@dataclass(frozen=True)
class DataFile:
    relpath: str
    path: Path
    size: int
    md5: str


@dataclass(frozen=True)
class Dataset:
    """DVC-tracked files whose bytes have just been hashed and found to be what the .dvc file names."""

    md5: str
    """DVC's name for the whole, `<32 hex>.dir` for a folder."""
    dvc_file: str
    path: Path
    files: tuple[DataFile, ...]


def open_dataset(dvc_file: Path, stat_cache: Path | None = None) -> Dataset:
    """The files that `dvc_file` names, hashed just now and found to be exactly those.

    Files that are missing are pulled from the configured DVC remote. With `stat_cache`, a JSON file that this
    function keeps, a file is hashed again only when its size, time stamps or inode have changed; whoever then
    reads the bytes should still compare them with `DataFile.md5`.

    Errors: Refused when the .dvc file cannot be understood or the data is not what it names; Unavailable when
    data is missing and cannot be had, or DVC's copy of it is corrupt.
    """
    tracked = read_dvc_file(dvc_file)
    files = _hashed(tracked, stat_cache)
    if not files:
        with open_repo(tracked) as repo:
            pull(repo, tracked)
        files = _hashed(tracked, stat_cache)
    if _digest(tracked, files) != tracked.md5:
        files = _settled(tracked, files, stat_cache)
    if not files:
        raise Refused(
            f"{tracked.path} holds no files, and {dvc_file} says so too",
            "at least one file of chats",
            f"put data there and run `dvc add {tracked.path.name}`",
        )
    return Dataset(tracked.md5, dvc_file.as_posix(), tracked.path, tuple(files))


def as_it_lies(dvc_file: Path, stat_cache: Path | None = None) -> Dataset:
    """The files that lie where `dvc_file` names some, hashed just now, whatever it says of them; maybe none.

    Errors: Refused and Unavailable, as `open_dataset`, but not because the data is not what the .dvc file names.
    """
    tracked = read_dvc_file(dvc_file)
    with open_repo(tracked) as repo:
        files = _not_ignored(repo, _hashed(tracked, stat_cache))
    return Dataset(_digest(tracked, files), dvc_file.as_posix(), tracked.path, tuple(files))


def is_still(dataset_md5: str, path: Path, dvc_file: Path, stat_cache: Path | None) -> bool:
    """Whether the data at `path` is, byte for byte, what it was when `dvc_file` named this digest.

    Never asks DVC, and does not read the .dvc file. Errors: Refused, Unavailable, as `open_dataset`.
    """
    tracked = Tracked(dvc_file, path, dataset_md5, None)
    return _digest(tracked, _hashed(tracked, stat_cache)) == dataset_md5


def _hashed(tracked: Tracked, stat_cache: Path | None) -> list[DataFile]:
    """Every file on disk with its md5, by relative path in DVC's order; none when there is nothing."""
    top = tracked.dvc_file.parent
    for place in [*reversed(tracked.path.relative_to(top).parents), tracked.path.relative_to(top)]:
        if place.parts and (top / place).is_symlink():
            raise _link_refused(top / place)
    if not tracked.path.exists():
        return []
    if tracked.path.is_dir() != tracked.is_folder:
        kinds = ("a file", "a folder")
        raise Refused(
            f"{tracked.path} is {kinds[tracked.path.is_dir()]}",
            f"{kinds[tracked.is_folder]}, as {tracked.dvc_file} says",
            f"run `dvc checkout {tracked.path.name}`, or `dvc add {tracked.path.name}` to accept it",
        )
    paths = sorted(_walk(tracked.path)) if tracked.is_folder else [(tracked.path.name, tracked.path)]

    known = _read_stat_cache(stat_cache)
    seen: dict[str, list] = {}
    files = []
    for relpath, path in paths:
        key = str(path.absolute())
        stamp, md5 = _stamp_and_md5(path, known.get(key))
        seen[key] = [*stamp, md5]
        files.append(DataFile(relpath=relpath, path=path, size=stamp[0], md5=md5))
    if stat_cache and seen != known:
        fresh = time.time_ns() - RACY_NS
        kept = {key: entry for key, entry in seen.items() if max(entry[1], entry[2]) < fresh}
        write_whole(stat_cache, json.dumps(kept).encode())
    return files


def _walk(folder: Path, below: str = "") -> Iterable[tuple[str, Path]]:
    for entry in os.scandir(folder):
        relpath, path = below + entry.name, folder / entry.name
        if entry.is_symlink():
            # DVC follows links out of the repository when it pulls.
            raise _link_refused(path)
        if entry.is_dir():
            yield from _walk(path, relpath + "/")
        elif not entry.is_file():
            raise Refused(f"{path} is neither a file nor a folder", "plain files")
        elif not _is_utf8(entry.name):
            raise Refused(f"{os.fsencode(path)!r} is not a UTF-8 name", "names in UTF-8", "rename the file")
        else:
            yield relpath, path


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _link_refused(path: Path) -> Refused:
    return Refused(
        f"{path} is a symbolic link",
        "plain files, which only the data's own digest decides",
        "put the file itself there; if DVC linked it: `dvc config cache.type copy; dvc checkout --relink`",
    )


def _stamp_and_md5(path: Path, known: list | None) -> tuple[list[int], str]:
    """Size, modification, change and inode of a file, and its md5: read, or known from the same stamp."""
    try:
        with path.open("rb") as file:
            before = _stamp(file.fileno())
            if isinstance(known, list) and known[:-1] == before:
                return before, known[-1]
            digest = hashlib.file_digest(file, md5_of)
            if _stamp(file.fileno()) != before:
                raise Refused(
                    f"{path} changed while it was read", "data at rest", "run again when it is written"
                )
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error}", "readable data") from error
    return before, digest.hexdigest()


def _stamp(handle: int) -> list[int]:
    facts = os.fstat(handle)
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _read_stat_cache(stat_cache: Path | None) -> dict[str, list]:
    """What an earlier call wrote; nothing when that cannot be understood, since it only saves time."""
    if stat_cache is None:
        return {}
    try:
        known = json.loads(stat_cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _digest(tracked: Tracked, files: list[DataFile]) -> str:
    """DVC 3's name for these files: a file's own md5, or the md5 of the listing of a folder."""
    if not tracked.is_folder:
        return files[0].md5 if files else ""
    listing = [{"md5": file.md5, "relpath": file.relpath} for file in files]
    return md5_of(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


# From here on DVC is asked. It is imported only when something is missing or does not match.


def _settled(tracked: Tracked, files: list[DataFile], stat_cache: Path | None) -> list[DataFile]:
    """The files without those DVC ignores and with those that were missing: they match, or this raises."""
    try:
        repo = open_repo(tracked)
    except Unavailable as error:
        raise _not_what_is_named(tracked, files) from error
    with repo:
        files = _not_ignored(repo, files)
        if _digest(tracked, files) == tracked.md5:
            return files
        listing = listing_of(tracked, repo.cache.local)
        if listing and {file.relpath: file.md5 for file in files}.items() < listing.items():
            pull(repo, tracked)
            files = _not_ignored(repo, _hashed(tracked, stat_cache))
            if _digest(tracked, files) == tracked.md5:
                return files
        raise _mismatch(repo, tracked, files)


def _not_ignored(repo: "Repo", files: list[DataFile]) -> list[DataFile]:
    return [file for file in files if not repo.dvcignore.is_ignored_file(str(file.path.absolute()))]


def _mismatch(repo: "Repo", tracked: Tracked, files: list[DataFile]) -> Refused | Unavailable:
    """The data is not what the .dvc file names: edited here, or put here from a corrupt cache."""
    told = ""
    listing = listing_of(tracked, repo.cache.local)
    if listing is not None:
        found = {file.relpath: file.md5 for file in files}
        changed = [relpath for relpath, md5 in found.items() if listing.get(relpath, md5) != md5]
        differences = {
            "changed": changed,
            "added": sorted(found.keys() - listing.keys()),
            "missing": sorted(listing.keys() - found.keys()),
        }
        told = "".join(f"; {how}: {some(relpaths)}" for how, relpaths in differences.items() if relpaths)
        corrupt = faults(tracked, repo.cache.local)[1]
        if any(text.startswith(f"{relpath} (") for text in corrupt for relpath in changed):
            return corrupt_cache(tracked, corrupt)
    return _not_what_is_named(tracked, files, told)


def _not_what_is_named(tracked: Tracked, files: list[DataFile], told: str = "") -> Refused:
    name = tracked.path.name
    return Refused(
        f"{tracked.path} has the digest {_digest(tracked, files)}{told}",
        f"{tracked.md5}, which {tracked.dvc_file} names",
        f"run `dvc add {name}` to accept the data as it is, or `dvc checkout {name}` to restore it",
    )
