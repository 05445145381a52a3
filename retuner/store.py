"""Finished stage outputs, by fingerprint.

    objects/<fingerprint>/         the files of one result and its manifest.json; never changed
    drafts/<fingerprint>-*/        being written; removed when their writer is gone
    work/<fingerprint>/            what a stage keeps across a kill (checkpoints, see `retuner.checkpoint_sharing`)
    locks/<fingerprint>            held, by the kernel's lock, while one process computes
    locks/in-use                   shared by runs, held alone while results are removed
    quarantine/                    results whose bytes no longer are what their manifest says
    seen/<fingerprint>.json        size, times and inode of large files when they were last hashed

A result exists when its manifest does, and the manifest comes with the one rename that publishes all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from retuner.errors import Refused, Unavailable
from retuner.files import disk_full_said, fsync_folder, fsync_tree, sha256_file, write_whole
from retuner.fingerprint import fingerprint, spell
from retuner.shared_store import SharedStore, work_of

if TYPE_CHECKING:  # pydantic is not needed to check a stored result
    from retuner.artifacts import Artifact, Facts

MANIFEST = "manifest.json"
FORMAT = 1
LARGE_BYTES = 1 << 20
"""From this size a file that looks untouched (size, mtime, ctime, inode) is not hashed to serve a hit.
Whoever computes with it calls `verify`, which hashes every byte."""

F = TypeVar("F", bound="Facts")
Build = Callable[[Path, Path], F]
"""Writes files into its first folder, may keep progress in its second, and returns the facts."""


class Broken(Exception):
    """Why a stored result may not be served."""


class Store:
    def __init__(
        self, root: Path, say: Callable[[str], None] = lambda line: None, shared_url: str | None = None
    ):
        """`shared_url`: an fsspec URL where results of several machines meet, see `retuner.shared_store`."""
        self.root = root
        self.say = say
        self.shared = SharedStore(shared_url) if shared_url else None
        self._held: IO[bytes] | None = None

    def folder(self, name: str) -> Path:
        return self.root / "objects" / name

    def find(self, stage: str, name: str, facts: type[F]) -> Artifact[F] | None:
        """The verified result of this fingerprint, or None."""
        manifest = self.verified_manifest(stage, name)
        return self._artifact(stage, name, manifest, facts) if manifest else None

    def verified_manifest(self, stage: str, name: str) -> dict[str, Any] | None:
        """The manifest of a result that can be served, or None. What does not verify goes to quarantine."""
        if not self.folder(name).exists() and not (self.shared and self._bring(stage, name)):
            return None
        try:
            manifest = self._checked_manifest(name)
            self._check_files(name, manifest, every_byte=False)
            return manifest
        except Broken as reason:
            self._quarantine(name, f"{stage}: {reason}")
            return None

    def verify(self, artifact: Artifact[Any]) -> None:
        """Hash every byte, for use. Errors: Unavailable when something is wrong; the copy is quarantined."""
        try:
            self._check_files(
                artifact.fingerprint, self._checked_manifest(artifact.fingerprint), every_byte=True
            )
        except Broken as reason:
            self._quarantine(artifact.fingerprint, f"{artifact.stage}: {reason}")
            raise Unavailable(
                f"the stored result of {artifact.stage} is damaged: {reason}",
                "the bytes its manifest names",
                "run the same command again: the damaged copy is set aside and the stage is remade",
            ) from None

    def make(self, stage: str, identity: dict[str, Any], facts: type[F], build: Build) -> Artifact[F]:
        """Compute, seal and publish the result. The caller holds the lock of its fingerprint."""
        name = fingerprint(identity)
        self._sweep(name)
        draft = self.root / "drafts" / f"{name}-{uuid.uuid4().hex[:8]}"
        work = self.root / "work" / name
        began = time.time()
        with disk_full_said(self.root):
            try:
                draft.mkdir(parents=True)
                work.mkdir(parents=True, exist_ok=True)
                made = build(draft, work)
                manifest = self._seal(stage, identity, draft, made, time.time() - began)
                fsync_tree(draft)
                manifest = self._publish(stage, name, draft) or manifest
            finally:
                shutil.rmtree(draft, ignore_errors=True)
            shutil.rmtree(work, ignore_errors=True)
        self._note_seen(name, manifest)
        if self.shared:
            self.shared.send(name, self.folder(name), self.say)
            self.shared.drop(work_of(name))
        return self._artifact(stage, name, manifest, facts)

    def accept(self, stage: str, identity: dict[str, Any], because: str) -> str:
        """Serve, under this identity, the newest result that differs from it in the code alone.

        Returns the fingerprint it was made under. Errors: Refused when there is none.
        """
        name = fingerprint(identity)
        others = []
        for folder in sorted((self.root / "objects").glob("*")):
            try:
                manifest = self._checked_manifest(folder.name)
            except Broken:
                continue
            if {**manifest["identity"], "code": None} == {**identity, "code": None} and folder.name != name:
                others.append((manifest["made"]["at"], folder.name, manifest))
        if not others:
            raise Refused(
                f"no stored {stage} differs from this one in its code alone",
                "a result made by earlier code with the same params, inputs and libraries",
                "`retuner why` shows what differs",
            )
        _, source, manifest = max(others)
        self._check_or_refuse(source, manifest)
        draft = self.root / "drafts" / f"{name}-{uuid.uuid4().hex[:8]}"
        with disk_full_said(self.root), self.lock(name, stage):
            shutil.copytree(self.folder(source), draft, copy_function=os.link)
            (draft / MANIFEST).unlink()
            accepted = {"made_under": source, "because": because, "at": _now()}
            body = {**manifest, "fingerprint": name, "identity": identity, "accepted": accepted}
            _write_manifest(draft, body)
            fsync_tree(draft)
            shutil.rmtree(self.folder(name), ignore_errors=True)
            os.rename(draft, self.folder(name))
        return source

    def hold(self) -> None:
        """From now on, as long as this store is used, nothing is collected from it."""
        if self._held is None:
            self._held = self._opened_hold()
            try:
                fcntl.flock(self._held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say("results are being removed from the store; waiting for the end of it")
                fcntl.flock(self._held, fcntl.LOCK_SH)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While nobody holds the store. Errors: Refused when somebody does."""
        with self._opened_hold() as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(
                    "a run is going on", "no run while results are removed", "try again after it"
                ) from None
            yield

    def _opened_hold(self) -> IO[bytes]:
        path = self.root / "locks" / "in-use"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")

    @contextmanager
    def lock(self, name: str, what: str) -> Iterator[None]:
        """One process at a time; the kernel lets go when the holder dies, however it dies."""
        from filelock import FileLock, Timeout

        path = self.root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            self.say(f"{what}: another run is busy with the very same thing; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def forget(self, name: str) -> None:
        """Remove a result that no longer stands for anything. The caller holds its lock."""
        shutil.rmtree(self.folder(name), ignore_errors=True)

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a stored result, None when it is not there or not whole. Its files are not looked at."""
        try:
            return self._checked_manifest(name)
        except Broken:
            return None

    def manifests(self) -> Iterator[dict[str, Any]]:
        """Of every stored result whose manifest is whole."""
        for folder in sorted((self.root / "objects").glob("*")):
            if manifest := self.manifest(folder.name):
                yield manifest

    def _bring(self, stage: str, name: str) -> bool:
        """Copy a result from the shared store, verify it, and publish it here."""
        draft = self.root / "drafts" / f"{name}-{uuid.uuid4().hex[:8]}"
        with disk_full_said(self.root):
            try:
                if not self.shared or not self.shared.bring(name, draft, self.say):
                    return False
                self._check_files(name, self._checked_manifest(name, draft), every_byte=True, folder=draft)
                fsync_tree(draft)
                self._publish(stage, name, draft)
            except Broken as reason:
                self.say(f"{stage}: the copy in the shared store is damaged and not used: {reason}")
                return False
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        self.say(f"{stage}: brought from the shared store")
        return True

    def _publish(self, stage: str, name: str, draft: Path) -> dict[str, Any] | None:
        """One rename. Where another process was first, with what it made or brought, and that is whole, it stands: its
        manifest is returned."""
        place = self.folder(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                os.rename(draft, place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if stands := self.verified_manifest(stage, name):
                    return stands
            else:
                fsync_folder(place.parent)
                return None

    def _seal(
        self, stage: str, identity: dict[str, Any], draft: Path, made: Facts, seconds: float
    ) -> dict[str, Any]:
        files = {}
        for path in sorted(p for p in draft.rglob("*") if p.is_file()):
            path.chmod(0o644)  # safetensors writes 0600, which a server under another user cannot read
            relpath = path.relative_to(draft).as_posix()
            files[relpath] = {"sha256": sha256_file(path), "size": path.stat().st_size}
        contents = {relpath: f["sha256"] for relpath, f in files.items() if not relpath.startswith("aside/")}
        body = {
            "format": FORMAT,
            "stage": stage,
            "fingerprint": fingerprint(identity),
            "identity": identity,
            "files": files,
            "digest": hashlib.sha256(spell(contents).encode()).hexdigest(),
            "facts": made.model_dump(mode="json"),
            "made": {"at": _now(), "seconds": round(seconds, 3), "host": socket.gethostname()},
        }
        return _write_manifest(draft, body)

    def _checked_manifest(self, name: str, folder: Path | None = None) -> dict[str, Any]:
        try:
            manifest = json.loads(((folder or self.folder(name)) / MANIFEST).read_bytes())
            seal = manifest.pop("seal")
            if manifest["format"] != FORMAT or seal != _seal_of(manifest):
                raise Broken("its manifest was changed")
            if manifest["fingerprint"] != name or fingerprint(manifest["identity"]) != name:
                raise Broken("its manifest belongs to another result")
        except FileNotFoundError:
            raise Broken("its manifest is gone") from None
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise Broken(f"its manifest cannot be read ({error})") from None
        return manifest

    def _check_files(
        self, name: str, manifest: dict[str, Any], every_byte: bool, folder: Path | None = None
    ) -> None:
        seen = {} if every_byte else self._seen(name)
        looked_at_large = False
        for relpath, recorded in manifest["files"].items():
            path = (folder or self.folder(name)) / relpath
            if path.is_symlink() or not path.is_file():
                raise Broken(f"{relpath} is gone")
            stat = path.stat()
            if stat.st_size != recorded["size"]:
                raise Broken(f"{relpath} has {stat.st_size} bytes, not {recorded['size']}")
            if stat.st_size >= LARGE_BYTES and seen.get(relpath) == _looks(stat):
                continue
            if sha256_file(path) != recorded["sha256"]:
                raise Broken(f"the bytes of {relpath} changed")
            looked_at_large |= stat.st_size >= LARGE_BYTES
        if looked_at_large and folder is None:
            self._note_seen(name, manifest)

    def _seen(self, name: str) -> dict[str, list[int]]:
        try:
            return json.loads((self.root / "seen" / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return {}  # Only a shortcut: without it every byte is hashed.

    def _note_seen(self, name: str, manifest: dict[str, Any]) -> None:
        large = [relpath for relpath, f in manifest["files"].items() if f["size"] >= LARGE_BYTES]
        if large:
            looks = {relpath: _looks((self.folder(name) / relpath).stat()) for relpath in large}
            write_whole(self.root / "seen" / f"{name}.json", json.dumps(looks).encode())

    def _check_or_refuse(self, name: str, manifest: dict[str, Any]) -> None:
        try:
            self._check_files(name, manifest, every_byte=True)
        except Broken as reason:
            raise Refused(f"the stored result {name[:12]} is damaged: {reason}") from None

    def _quarantine(self, name: str, reason: str) -> None:
        with self.lock(f"{name}.quarantine", "quarantine"):
            if self.folder(name).exists():
                place = self.root / "quarantine" / f"{name}-{time.time_ns()}"
                place.parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.folder(name), place)
                self.say(f"{reason}; the copy is set aside in {place}")

    def _sweep(self, name: str) -> None:
        """Drafts of this fingerprint belong to a writer that is gone: we hold its lock."""
        for draft in (self.root / "drafts").glob(f"{name}-*"):
            shutil.rmtree(draft, ignore_errors=True)

    def _artifact(self, stage: str, name: str, manifest: dict[str, Any], facts: type[F]) -> Artifact[F]:
        from retuner.artifacts import Artifact

        return Artifact[facts](  # type: ignore[valid-type]
            stage=stage,
            fingerprint=name,
            digest=manifest["digest"],
            path=self.folder(name),
            facts=facts.model_validate(manifest["facts"]),
        )


def _write_manifest(draft: Path, body: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps({**body, "seal": _seal_of(body)}, sort_keys=True, ensure_ascii=False, indent=1)
    write_whole(draft / MANIFEST, text.encode() + b"\n")
    return body


def _seal_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _looks(stat: os.stat_result) -> list[int]:
    # ctime cannot be set back by a program that writes a byte and restores the mtime.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
