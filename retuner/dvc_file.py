"""What a .dvc file says: which path, and the digest its bytes must have. DVC itself is not imported."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retuner.errors import Refused

MD5_NAME = re.compile(r"^[0-9a-f]{32}(\.dir)?$")
ONE_OUT = "a .dvc file of DVC 3 with one entry under `outs`, as `dvc add data` writes it"


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


def read_dvc_file(dvc_file: Path) -> Tracked:
    """Errors: Refused when there is none, or as `parse_dvc_file`."""
    try:
        content = dvc_file.read_bytes()
    except FileNotFoundError:
        raise Refused(f"there is no {dvc_file}", ONE_OUT, "run `dvc add data`, or check the path") from None
    except OSError as error:
        raise Refused(f"{dvc_file} cannot be read: {error}", ONE_OUT) from None
    return parse_dvc_file(content, dvc_file)


def parse_dvc_file(raw: bytes, dvc_file: Path) -> Tracked:
    """What `raw`, the bytes of `dvc_file` now or once, names. Errors: Refused when that is not one path and its md5."""
    from ruamel.yaml import YAML, YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(f"{dvc_file} cannot be read: {error}", ONE_OUT) from None
    except YAMLError as error:
        # A merge conflict is the usual cause.
        raise Refused(f"{dvc_file} is not YAML: {' '.join(str(error).split())}", ONE_OUT) from None

    outs = content.get("outs") if isinstance(content, dict) else None
    if not isinstance(outs, list) or not all(isinstance(out, dict) for out in outs):
        raise Refused(f"{dvc_file} has no list of `outs`", ONE_OUT)
    if len(outs) != 1:
        raise Refused(f"{dvc_file} has {len(outs)} outs", ONE_OUT, "keep the data in one folder")
    out = outs[0]
    md5, path, remote = out.get("md5"), out.get("path"), out.get("remote")
    if not isinstance(md5, str) or not MD5_NAME.match(md5):
        raise Refused(f"{dvc_file} names the digest {md5!r}", "an md5", "run `dvc add` or `dvc commit` again")
    if out.get("hash") != "md5":
        raise Refused(f"{dvc_file} was written by DVC 2", ONE_OUT, "run `dvc cache migrate --dvc-files`")
    if content.get("wdir", ".") != ".":
        raise Refused(f"{dvc_file} has wdir {content['wdir']!r}", "data beside its .dvc file")
    if not isinstance(path, str) or not stays_inside(path):
        raise Refused(f"{dvc_file} names the path {path!r}", "a path inside the folder of the .dvc file")
    return Tracked(dvc_file, dvc_file.parent / path, md5, str(remote) if remote else None)


def stays_inside(relpath: str) -> bool:
    """Whether a path that someone else wrote names something below the folder it is meant for."""
    parts = relpath.split("/")
    return "\\" not in relpath and "\0" not in relpath and not {"", ".", ".."} & set(parts)


def md5_of(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)
