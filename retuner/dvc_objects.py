"""What DVC holds of tracked data: its cache and its remote, and why something cannot be had from them.

Its objects are named by their md5, and DVC trusts the names; here the bytes are hashed.
"""

import json
import logging
from typing import TYPE_CHECKING, Any

from retuner.dvc_file import Tracked, md5_of, stays_inside
from retuner.errors import Refused, Unavailable

if TYPE_CHECKING:
    from dvc.repo import Repo

READ_BYTES = 1 << 20


def open_repo(tracked: Tracked) -> "Repo":
    """The DVC repository around a .dvc file. Errors: Unavailable."""
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


def listing_of(tracked: Tracked, objects: Any) -> dict[str, str] | None:
    """Relative path to md5 of what the .dvc file names, from an object store; None when it lacks it.

    Errors: Refused when it names paths outside the folder, which `dvc checkout` would write to.
    """
    if not tracked.is_folder:
        return {tracked.path.name: tracked.md5}
    try:
        content = objects.fs.cat_file(objects.oid_to_path(tracked.md5))
    except FileNotFoundError:
        return None
    if md5_of(content).hexdigest() + ".dir" != tracked.md5:
        return None
    listing = {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
    for relpath in listing:
        if not stays_inside(relpath):
            raise Refused(f"{tracked.dvc_file} names a file {relpath!r}", "files inside its folder")
    return listing


def pull(repo: "Repo", tracked: Tracked) -> None:
    """Fetch into DVC's cache, look at the list of files, then put them in place."""
    target = str(tracked.dvc_file.absolute())
    try:
        repo.fetch([target])
    except Exception as error:  # each kind of remote has its own errors
        raise not_fetched(repo, tracked, error) from error
    if listing_of(tracked, repo.cache.local) is None:
        raise not_fetched(repo, tracked, None)
    try:
        repo.checkout([target])
    except Exception as error:
        raise not_fetched(repo, tracked, error) from error


def not_fetched(repo: "Repo", tracked: Tracked, error: Exception | None) -> Unavailable:
    """Why the data could not be had: corrupt or missing on the remote, or the remote cannot be reached."""
    what = f"{tracked.path} is not complete here"
    if corrupt := faults(tracked, repo.cache.local)[1]:
        return corrupt_cache(tracked, corrupt)
    try:
        remote = repo.cloud.get_remote(tracked.remote)
        name = f"remote `{remote.name}` ({remote.fs.unstrip_protocol(remote.path)})"
        absent, corrupt = faults(tracked, remote.odb)
    except Exception as unreachable:  # noqa: BLE001 - each kind of remote has its own errors
        return Unavailable(
            f"{what}, and DVC's remote cannot be used: {one_line(unreachable)}",
            "a remote that can be reached, with the right to read it",
            "check `dvc remote list`, the network and the credentials; then run again",
        )
    if corrupt:
        return Unavailable(
            f"{what}, and {name} holds corrupt bytes for {some(corrupt)}",
            "objects whose md5 is their name",
            "delete those objects there, and `dvc push` from a machine where the data is right",
        )
    if absent:
        return Unavailable(
            f"{what}, and {name} does not have {some(absent)}",
            f"the data that {tracked.dvc_file} names",
            "run `dvc push` where the data is; if that is done, check the remote's address and access",
        )
    return Unavailable(
        f"{what}, and DVC did not bring it: {one_line(error)}",
        "a working `dvc pull`",
        "run it by hand to see more",
    )


def faults(tracked: Tracked, objects: Any) -> tuple[list[str], list[str]]:
    """What an object store lacks (relative paths) and what it holds wrongly (with the objects' paths)."""
    listing = listing_of(tracked, objects)
    wanted = {f"the list of files of {tracked.path}": tracked.md5} if listing is None else listing
    absent, corrupt = [], []
    for relpath, md5 in wanted.items():
        place, found = objects.oid_to_path(md5), md5_of()
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


def corrupt_cache(tracked: Tracked, corrupt: list[str]) -> Unavailable:
    return Unavailable(
        f"DVC's cache holds corrupt bytes for {some(corrupt)}",
        "objects whose md5 is their name",
        f"delete those objects and {tracked.path}, then run again to pull them",
    )


def some(names: list[str], at_most: int = 5) -> str:
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def one_line(error: Exception | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
