"""The data a run reads: files that DVC keeps, every byte checked against the one hash in the .dvc file.

DVC itself trusts its cache, so a flipped bit passes `dvc pull` and `dvc status`. Here the files are hashed
again on every use, without importing DVC; DVC is only asked when something is missing or does not match.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner.errors import Refused, Unavailable
from retuner.files import write_whole

if TYPE_CHECKING:
    from dvc.repo import Repo

MD5_NAME = re.compile(r"^[0-9a-f]{32}(\.dir)?$")
READ_BYTES = 1 << 20
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


@dataclass(frozen=True)
class Tracked:
    """What a .dvc file says: which path, and the digest it must have."""

    dvc_file: Path
    path: Path
    md5: str
    remote: str | None

    @property
    def is_folder(self) -> bool:
        return self.md5.endswith(".dir")


def open_dataset(dvc_file: Path, stat_cache: Path | None = None) -> Dataset:
    """The files that `dvc_file` names, hashed just now and found to be exactly those.

    Files that are missing are pulled from the configured DVC remote. With `stat_cache`, a JSON file that this
    function keeps, a file is hashed again only when its size, time stamps or inode have changed; whoever then
    reads the bytes should still compare them with `DataFile.md5`.

    Errors: Refused when the .dvc file cannot be understood or the data is not what it names; Unavailable when
    data is missing and cannot be had, or DVC's copy of it is corrupt.
    """
    tracked = _read_dvc_file(dvc_file)
    files = _hashed(tracked, stat_cache)
    if not files:
        with _repo(tracked) as repo:
            _pull(repo, tracked)
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


def is_still(dataset_md5: str, path: Path, dvc_file: Path, stat_cache: Path | None) -> bool:
    """Whether the data at `path` is, byte for byte, what it was when `dvc_file` named this digest.

    Never asks DVC, and does not read the .dvc file. Errors: Refused, Unavailable, as `open_dataset`.
    """
    tracked = Tracked(dvc_file, path, dataset_md5, None)
    return _digest(tracked, _hashed(tracked, stat_cache)) == dataset_md5


def _read_dvc_file(dvc_file: Path) -> Tracked:
    from ruamel.yaml import YAML, YAMLError

    one_out = "a .dvc file of DVC 3 with one entry under `outs`, as `dvc add data` writes it"
    try:
        content = YAML(typ="safe", pure=True).load(dvc_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"there is no {dvc_file}", one_out, "run `dvc add data`, or check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{dvc_file} cannot be read: {error}", one_out) from None
    except YAMLError as error:
        # A merge conflict is the usual cause.
        raise Refused(f"{dvc_file} is not YAML: {' '.join(str(error).split())}", one_out) from None

    outs = content.get("outs") if isinstance(content, dict) else None
    if not isinstance(outs, list) or not all(isinstance(out, dict) for out in outs):
        raise Refused(f"{dvc_file} has no list of `outs`", one_out)
    if len(outs) != 1:
        raise Refused(f"{dvc_file} has {len(outs)} outs", one_out, "keep the data in one folder")
    out = outs[0]
    md5, path, remote = out.get("md5"), out.get("path"), out.get("remote")
    if not isinstance(md5, str) or not MD5_NAME.match(md5):
        raise Refused(f"{dvc_file} names the digest {md5!r}", "an md5", "run `dvc add` or `dvc commit` again")
    if out.get("hash") != "md5":
        raise Refused(f"{dvc_file} was written by DVC 2", one_out, "run `dvc cache migrate --dvc-files`")
    if content.get("wdir", ".") != ".":
        raise Refused(f"{dvc_file} has wdir {content['wdir']!r}", "data beside its .dvc file")
    if not isinstance(path, str) or not _stays_inside(path):
        raise Refused(f"{dvc_file} names the path {path!r}", "a path inside the folder of the .dvc file")
    return Tracked(dvc_file, dvc_file.parent / path, md5, str(remote) if remote else None)


def _stays_inside(relpath: str) -> bool:
    parts = relpath.split("/")
    return "\\" not in relpath and "\0" not in relpath and not {"", ".", ".."} & set(parts)


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
            digest = hashlib.file_digest(file, _md5)
            if _stamp(file.fileno()) != before:
                raise Refused(
                    f"{path} changed while it was read", "data at rest", "run again when it is written"
                )
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error}", "readable data") from error
    return before, digest.hexdigest()


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


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
    return _md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


# From here on DVC is asked. It is imported only when something is missing or does not match.


def _repo(tracked: Tracked) -> "Repo":
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # What DVC would log, the errors here say better.
    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return Repo(str(tracked.dvc_file.parent.absolute()))
    except DvcException as error:
        raise Unavailable(
            f"{tracked.path} is not complete here, and DVC cannot be asked: {error}",
            "a clone of the project, with its .dvc folder",
        ) from error


def _settled(tracked: Tracked, files: list[DataFile], stat_cache: Path | None) -> list[DataFile]:
    """The files without those DVC ignores and with those that were missing: they match, or this raises."""
    try:
        repo = _repo(tracked)
    except Unavailable as error:
        raise _not_what_is_named(tracked, files) from error
    with repo:
        files = _not_ignored(repo, files)
        if _digest(tracked, files) == tracked.md5:
            return files
        listing = _listing(tracked, repo.cache.local)
        if listing and {file.relpath: file.md5 for file in files}.items() < listing.items():
            _pull(repo, tracked)
            files = _not_ignored(repo, _hashed(tracked, stat_cache))
            if _digest(tracked, files) == tracked.md5:
                return files
        raise _mismatch(repo, tracked, files)


def _not_ignored(repo: "Repo", files: list[DataFile]) -> list[DataFile]:
    return [file for file in files if not repo.dvcignore.is_ignored_file(str(file.path.absolute()))]


def _listing(tracked: Tracked, objects: Any) -> dict[str, str] | None:
    """Relative path to md5 of what the .dvc file names, from an object store; None when it lacks it.

    Errors: Refused when it names paths outside the folder, which `dvc checkout` would write to.
    """
    if not tracked.is_folder:
        return {tracked.path.name: tracked.md5}
    try:
        content = objects.fs.cat_file(objects.oid_to_path(tracked.md5))
    except FileNotFoundError:
        return None
    if _md5(content).hexdigest() + ".dir" != tracked.md5:
        return None
    listing = {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
    for relpath in listing:
        if not _stays_inside(relpath):
            raise Refused(f"{tracked.dvc_file} names a file {relpath!r}", "files inside its folder")
    return listing


def _pull(repo: "Repo", tracked: Tracked) -> None:
    """Fetch into DVC's cache, look at the list of files, then put them in place."""
    target = str(tracked.dvc_file.absolute())
    try:
        repo.fetch([target])
    except Exception as error:  # each kind of remote has its own errors
        raise _not_fetched(repo, tracked, error) from error
    if _listing(tracked, repo.cache.local) is None:
        raise _not_fetched(repo, tracked, None)
    try:
        repo.checkout([target])
    except Exception as error:
        raise _not_fetched(repo, tracked, error) from error


def _not_fetched(repo: "Repo", tracked: Tracked, error: Exception | None) -> Unavailable:
    """Why the data could not be had: corrupt or missing on the remote, or the remote cannot be reached."""
    what = f"{tracked.path} is not complete here"
    if corrupt := _faults(tracked, repo.cache.local)[1]:
        return _corrupt_cache(tracked, corrupt)
    try:
        remote = repo.cloud.get_remote(tracked.remote)
        name = f"remote `{remote.name}` ({remote.fs.unstrip_protocol(remote.path)})"
        absent, corrupt = _faults(tracked, remote.odb)
    except Exception as unreachable:  # noqa: BLE001 - each kind of remote has its own errors
        return Unavailable(
            f"{what}, and DVC's remote cannot be used: {_one_line(unreachable)}",
            "a remote that can be reached, with the right to read it",
            "check `dvc remote list`, the network and the credentials; then run again",
        )
    if corrupt:
        return Unavailable(
            f"{what}, and {name} holds corrupt bytes for {_some(corrupt)}",
            "objects whose md5 is their name",
            "delete those objects there, and `dvc push` from a machine where the data is right",
        )
    if absent:
        return Unavailable(
            f"{what}, and {name} does not have {_some(absent)}",
            f"the data that {tracked.dvc_file} names",
            "run `dvc push` where the data is; if that is done, check the remote's address and access",
        )
    return Unavailable(
        f"{what}, and DVC did not bring it: {_one_line(error)}",
        "a working `dvc pull`",
        "run it by hand to see more",
    )


def _faults(tracked: Tracked, objects: Any) -> tuple[list[str], list[str]]:
    """What an object store lacks (relative paths) and what it holds wrongly (with the objects' paths)."""
    listing = _listing(tracked, objects)
    wanted = {f"the list of files of {tracked.path}": tracked.md5} if listing is None else listing
    absent, corrupt = [], []
    for relpath, md5 in wanted.items():
        place, found = objects.oid_to_path(md5), _md5()
        try:
            with objects.fs.open(place, "rb") as file:
                while block := file.read(READ_BYTES):
                    found.update(block)
        except FileNotFoundError:
            absent.append(relpath)
        else:
            if found.hexdigest() != md5.removesuffix(".dir"):
                corrupt.append(f"{relpath} ({place})")
    return absent, corrupt


def _corrupt_cache(tracked: Tracked, corrupt: list[str]) -> Unavailable:
    return Unavailable(
        f"DVC's cache holds corrupt bytes for {_some(corrupt)}",
        "objects whose md5 is their name",
        f"delete those objects and {tracked.path}, then run again to pull them",
    )


def _mismatch(repo: "Repo", tracked: Tracked, files: list[DataFile]) -> Refused | Unavailable:
    """The data is not what the .dvc file names: edited here, or put here from a corrupt cache."""
    told = ""
    listing = _listing(tracked, repo.cache.local)
    if listing is not None:
        found = {file.relpath: file.md5 for file in files}
        changed = [relpath for relpath, md5 in found.items() if listing.get(relpath, md5) != md5]
        differences = {
            "changed": changed,
            "added": sorted(found.keys() - listing.keys()),
            "missing": sorted(listing.keys() - found.keys()),
        }
        told = "".join(f"; {how}: {_some(relpaths)}" for how, relpaths in differences.items() if relpaths)
        corrupt = _faults(tracked, repo.cache.local)[1]
        if any(text.startswith(f"{relpath} (") for text in corrupt for relpath in changed):
            return _corrupt_cache(tracked, corrupt)
    return _not_what_is_named(tracked, files, told)


def _not_what_is_named(tracked: Tracked, files: list[DataFile], told: str = "") -> Refused:
    name = tracked.path.name
    return Refused(
        f"{tracked.path} has the digest {_digest(tracked, files)}{told}",
        f"{tracked.md5}, which {tracked.dvc_file} names",
        f"run `dvc add {name}` to accept the data as it is, or `dvc checkout {name}` to restore it",
    )


def _some(names: list[str], at_most: int = 5) -> str:
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def _one_line(error: Exception | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
