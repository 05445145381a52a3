"""Results that several machines share, as files at any fsspec URL (`s3://bucket/retuner`, `file:///srv/share`).

`URL/<fingerprint>/` holds the files and, written last, manifest.json: a result exists when its manifest does. Nothing
that comes from there is used before every byte of it was verified, which is the local store's work. What a training
needs to go on elsewhere lies in `URL/work/<fingerprint>/`, see `retuner.checkpoint_sharing`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner.errors import Unavailable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MANIFEST = "manifest.json"


def work_of(fingerprint: str) -> str:
    return f"work/{fingerprint}"


def _shown(name: str) -> str:
    return name.rpartition("/")[2][:12]


class SharedStore:
    def __init__(self, url: str):
        self.url = url
        self._opened: tuple[AbstractFileSystem, str] | None = None

    def bring(self, name: str, into: Path, say: Callable[[str], None]) -> bool:
        """Copy a result into the new folder `into`; False when it is not there, or not whole, which is said.

        Errors: Unavailable when the place cannot be reached.
        """
        files, root = self._open()
        try:
            text = files.cat_file(f"{root}/{name}/{MANIFEST}")
        except FileNotFoundError:
            return False
        except Exception as error:  # each file system has its own
            raise self._unavailable(error) from error
        try:
            relpaths = [MANIFEST, *json.loads(text)["files"]]
            targets = [(into / relpath).resolve() for relpath in relpaths]
            if not all(target.is_relative_to(into.resolve()) for target in targets):
                raise ValueError("it names files outside of its folder")
        except (ValueError, KeyError, TypeError) as error:
            say(
                f"the copy of {_shown(name)} in the shared store is damaged and not used: its manifest ({error})"
            )
            return False
        for relpath, target in zip(relpaths, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                files.get_file(f"{root}/{name}/{relpath}", str(target))
            except FileNotFoundError:
                say(f"the copy of {_shown(name)} in the shared store is not used: {relpath} is gone")
                return False
            except Exception as error:
                raise self._unavailable(error) from error
        return True

    def send(self, name: str, folder: Path, say: Callable[[str], None]) -> None:
        """Copy a result there, its manifest last. The result is safe here, so a failure is only said."""
        try:
            files, root = self._open()
            place = f"{root}/{name}"
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in sorted(paths, key=lambda path: path.name == MANIFEST):
                target = f"{place}/{path.relative_to(folder).as_posix()}"
                files.makedirs(target.rpartition("/")[0], exist_ok=True)
                files.put_file(str(path), target)
        except Exception as error:  # noqa: BLE001 - each file system has its own
            say(f"not shared: {self.url} cannot be written ({type(error).__name__}: {error})")

    def names(self, place: str) -> list[str]:
        """Of what lies below a place there. Errors: Unavailable when it cannot be reached."""
        files, root = self._open()
        try:
            files.invalidate_cache()
            found = files.ls(f"{root}/{place}", detail=False)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise self._unavailable(error) from error
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def drop(self, name: str) -> None:
        """Remove what is no longer needed, if that can be done; its manifest first, so that no half of it is used."""
        with suppress(Exception):  # each file system has its own, and what stays does no harm
            files, root = self._open()
            place = f"{root}/{name}"
            if files.exists(f"{place}/{MANIFEST}"):
                files.rm_file(f"{place}/{MANIFEST}")
            files.rm(place, recursive=True)

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            import fsspec

            try:
                self._opened = fsspec.core.url_to_fs(self.url)
            except (ImportError, ValueError) as error:
                raise self._unavailable(error) from error
        return self._opened

    def _unavailable(self, error: Exception) -> Unavailable:
        return Unavailable(
            f"the shared store {self.url} cannot be read ({type(error).__name__}: {error})",
            "the place that RETUNER_STORE_REMOTE names",
            "check its address and credentials (for s3://, make -B setup EXTRAS=s3), or unset RETUNER_STORE_REMOTE",
        )
