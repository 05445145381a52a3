"""The data as it was at a git revision, read out of DVC's cache: the work tree is neither needed nor touched."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from retuner.dataset import DataFile, Dataset, as_it_lies, open_dataset
from retuner.dvc_file import Tracked, parse_dvc_file
from retuner.dvc_objects import corrupt_cache, faults, listing_of, not_fetched, open_repo
from retuner.errors import Refused

if TYPE_CHECKING:
    from dvc.repo import Repo

WORKSPACE = "workspace"


@dataclass(frozen=True)
class Revision:
    """What a name such as `HEAD~2`, `workspace` or `old/data.dvc` stands for."""

    name: str
    dataset: Dataset
    commit: str | None
    """None for what lies in the work tree."""


def open_revision(name: str, dvc_file: Path, stat_cache: Path | None = None) -> Revision:
    """The files that `dvc_file` named at the git revision `name`, each hashed just now.

    `name` may also be `workspace`, for the data that lies there, or the path of another .dvc file. Where that data is
    not what `dvc_file` names, the name of the revision says so. The `path` of a file of an earlier revision is that of
    DVC's object; what the cache lacks is fetched from the remote.
    Errors: Refused when there is no such revision, or no such file at it; Unavailable when the data cannot be had.
    """
    if name == WORKSPACE:
        return _workspace(dvc_file, stat_cache)
    if name.endswith(".dvc") and Path(name).is_file():
        return Revision(name, open_dataset(Path(name), stat_cache), None)
    with open_repo(Tracked(dvc_file, dvc_file.with_suffix(""), "", None)) as repo:
        commit = _commit(repo, name)
        tracked = parse_dvc_file(_content(repo, commit, name, dvc_file), dvc_file)
        # Errors name the revision: the file that lies here may say something else.
        told = replace(tracked, dvc_file=Path(f"{dvc_file} at {name}"))
        return Revision(name, _from_cache(repo, told), commit)


def _workspace(dvc_file: Path, stat_cache: Path | None) -> Revision:
    try:
        return Revision(WORKSPACE, open_dataset(dvc_file, stat_cache), None)
    except Refused:
        dataset = as_it_lies(dvc_file, stat_cache)
        if not dataset.files:
            raise
        return Revision(f"{WORKSPACE} (not what {dvc_file} names)", dataset, None)


def text_at(revision: Revision, path: Path) -> bytes | None:
    """The bytes of a file that git keeps, as they were at the revision; None where it was not there."""
    if revision.commit is None:
        return path.read_bytes() if path.is_file() else None
    with open_repo(Tracked(path, path, "", None)) as repo:
        return _git_bytes(repo, revision.commit, path)


def _commit(repo: "Repo", name: str) -> str:
    from dvc.scm import NoSCM, RevError, resolve_rev

    expected = f"a git commit, branch or tag, `{WORKSPACE}`, or the path of a .dvc file"
    if isinstance(repo.scm, NoSCM):
        raise Refused(f"{name} cannot be looked up: the project is not in a git repository", expected)
    try:
        return resolve_rev(repo.scm, name)
    except RevError:
        raise Refused(
            f"there is no revision {name}", expected, "`git log --oneline -- data.dvc` lists the data's"
        ) from None


def _content(repo: "Repo", commit: str, name: str, dvc_file: Path) -> bytes:
    content = _git_bytes(repo, commit, dvc_file)
    if content is None:
        raise Refused(
            f"there is no {dvc_file} at {name} ({commit[:10]})",
            "a revision at which git kept that file",
            f"`git log --oneline -- {dvc_file}` lists them",
        )
    return content


def _git_bytes(repo: "Repo", commit: str, path: Path) -> bytes | None:
    from dvc.fs import GitFileSystem

    try:
        inside = path.absolute().resolve().relative_to(Path(repo.scm.root_dir).resolve())
    except ValueError:
        raise Refused(f"{path} lies outside the git repository of the project", "a path inside it") from None
    try:
        return GitFileSystem(scm=repo.scm, rev=commit).cat_file(f"/{inside.as_posix()}")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _from_cache(repo: "Repo", tracked: Tracked) -> Dataset:
    cache = repo.cache.local
    if faults(tracked, cache)[0]:
        _fetch(repo, tracked)
    absent, corrupt = faults(tracked, cache)
    if corrupt:
        raise corrupt_cache(tracked, corrupt)
    listing = listing_of(tracked, cache)
    if absent or listing is None:
        raise not_fetched(repo, tracked, None)
    files = []
    for relpath, md5 in listing.items():
        place = Path(cache.oid_to_path(md5))
        files.append(DataFile(relpath, place, place.stat().st_size, md5))
    return Dataset(tracked.md5, str(tracked.dvc_file), tracked.path, tuple(files))


def _fetch(repo: "Repo", tracked: Tracked) -> None:
    """The list of files into the cache, then, when it can be trusted, the files."""
    from dvc_data.hashfile.hash_info import HashInfo

    try:
        repo.cloud.pull([HashInfo("md5", tracked.md5)], remote=tracked.remote)
        listing = listing_of(tracked, repo.cache.local) or {}
        repo.cloud.pull([HashInfo("md5", md5) for md5 in listing.values()], remote=tracked.remote)
    except Refused:
        raise
    except Exception as error:  # each kind of remote has its own errors
        raise not_fetched(repo, tracked, error) from error
