"""Where and how a run happens: nothing here may change its result, and nothing here is hashed.

Read from the environment (`RETUNER_HOME`, `RETUNER_DEVICE`, `RETUNER_TRACKING_URI`, ...) and flags. A plain
dataclass, because a fully cached run ends before pydantic alone would have been imported.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retuner.errors import Refused, Unavailable
from retuner.files import disk_full_said

QUIET = {
    # Telemetry and update checks of what we build on: off, unless a person turned them on.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # A stored artifact is never a reason to run code.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}

HOME = ".retuner"
DEVICES = ("auto", "cpu", "cuda")
STRATEGIES = ("ddp", "fsdp")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def _setting(name: str, default: str | None = None) -> Any:
    """A field's default factory: the environment's value, read when a Runtime is made."""
    return lambda: os.environ.get(f"RETUNER_{name}") or default


@dataclass(frozen=True)
class Runtime:
    home: Path = field(default_factory=_setting("HOME", HOME))
    """Everything a run leaves behind: store, MLflow, Prefect, audit log."""
    device: str = field(default_factory=_setting("DEVICE", "auto"))
    processes: int = field(default_factory=_setting("PROCESSES", "1"))
    """That train together on this machine: one for each GPU, or on a CPU as many as there are cores for."""
    strategy: str = field(default_factory=_setting("STRATEGY", "ddp"))
    """Of several processes: each has the whole base (ddp), or a part of it (fsdp), for one that fits no GPU."""
    tracking_uri: str | None = field(default_factory=_setting("TRACKING_URI"))
    """MLflow's; SQLite under `home` when not given. MLFLOW_TRACKING_URI is honoured too."""
    store_remote: str | None = field(default_factory=_setting("STORE_REMOTE"))
    """An fsspec URL that several machines share results through, e.g. `s3://bucket/retuner`."""
    log_level: str = field(default_factory=_setting("LOG_LEVEL", "WARNING"))
    serve_token: str | None = field(default_factory=_setting("SERVE_TOKEN"), repr=False)
    """Bearer token of `retuner serve`; needed to listen beyond loopback."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "home", Path(self.home))
        if not str(self.processes).isdecimal() or not int(self.processes):
            raise Refused(f"RETUNER_PROCESSES or --processes is {self.processes!r}", "a whole number above 0")
        object.__setattr__(self, "processes", int(self.processes))
        for name, accepted in (("device", DEVICES), ("strategy", STRATEGIES), ("log_level", LOG_LEVELS)):
            value = getattr(self, name)
            if value not in accepted:
                raise Refused(
                    f"RETUNER_{name.upper()} or --{name.replace('_', '-')} is {value!r}",
                    f"one of {', '.join(accepted)}",
                )

    @property
    def store(self) -> Path:
        return self.home.absolute() / "store"

    @property
    def mlflow_uri(self) -> str:
        if uri := self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
            return uri
        return f"sqlite:///{self.home.absolute() / 'mlflow' / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        """Where artifacts lie when MLflow is our own SQLite file."""
        return self.home.absolute() / "mlflow" / "artifacts"

    @property
    def prefect_home(self) -> Path:
        return self.home.absolute() / "prefect"

    @property
    def audit_log(self) -> Path:
        return self.home.absolute() / "audit.jsonl"


def load_runtime(**flags: object) -> Runtime:
    """The runtime from the environment, overridden by the flags that are not None.

    Errors: Refused when a setting cannot be understood.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    runtime = Runtime(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
    return _without_secrets(runtime)


def _without_secrets(runtime: Runtime) -> Runtime:
    """A user and a password in the address of MLflow go where its client looks for them too: what fails later speaks
    of the address."""
    from urllib.parse import unquote, urlsplit, urlunsplit

    parts = urlsplit(runtime.mlflow_uri)
    if parts.scheme not in ("http", "https") or parts.username is None:
        return runtime
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
    return replace(runtime, tracking_uri=urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))


@contextmanager
def home_said() -> Iterator[None]:
    """Turn a home that cannot be made or written to, and a full disk, into Unavailable."""
    try:
        yield
    except OSError as error:
        home = Path(os.environ.get("RETUNER_HOME") or HOME)  # flags may have changed it meanwhile
        with disk_full_said(home):
            if not _is_about(error, home.absolute()):
                raise
            raise Unavailable(
                f"the home {home} cannot be used: {error}",
                "a folder that can be made and written to",
                "mend that, or name another with --home or RETUNER_HOME",
            ) from error


def _is_about(error: OSError, home: Path) -> bool:
    """Whether it names the home, something in it, or a folder on the way to it."""
    if not isinstance(error.filename, str):
        return False
    place = Path(error.filename).absolute()
    return place.is_relative_to(home) or home.is_relative_to(place)


def person() -> str:
    """Who runs this, as the operating system knows them."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
