"""Small hand-made adapters and decisions, and MLflow stores to register them in."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from functools import cache
from pathlib import Path

from retuner import registry, tracking
from retuner.artifacts import (
    Adapter,
    AdapterFacts,
    Base,
    BaseFacts,
    Decision,
    GateVerdict,
)
from retuner.dataset import DataFile, Dataset
from retuner.files import sha256_file
from retuner.params import Params
from retuner.params_file import load
from retuner.registry_reads import Incumbent
from retuner.runtime import Runtime

MODEL = "support"
PARAMS = Path(__file__).parents[1] / "params" / "quickstart.yaml"


@cache
def quickstart() -> Params:
    return load(PARAMS)


def small_adapter(folder: Path, value: float) -> Adapter:
    """An adapter of four numbers; `value` makes it another one."""
    import numpy
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"lora_A": numpy.full((2, 2), value, "float32")}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 2}\n')
    (folder / "aside").mkdir(exist_ok=True)
    (folder / "aside" / "metrics.jsonl").write_text("{}\n")
    facts = AdapterFacts(
        sha256=sha256_file(folder / "adapter_model.safetensors"),
        trained_steps=3,
        final_loss=1.5,
        trainable_parameters=4,
        total_parameters=100,
        adapted_modules={"qkv_proj": 1},
        trainable_by_module={},
        packing_fill=0.9,
        effective={"attention": "sdpa"},
    )
    return Adapter(stage="train", fingerprint="f" * 64, digest="d" * 64, path=folder, facts=facts)


def some_base(weights_sha256: str = "b" * 64) -> Base:
    facts = BaseFacts(
        source="smollm2",
        architecture="Phi3ForCausalLM",
        parameters=100,
        weights_sha256=weights_sha256,
        tokenizer_sha256="t" * 64,
        template_sha256="c" * 64,
        stop_token_ids=(2,),
    )
    return Base(stage="fetch_base", fingerprint="a" * 64, digest="e" * 64, path=Path("base"), facts=facts)


def a_decision(passed: bool = True) -> Decision:
    verdict = GateVerdict(
        metric="exact_match",
        against="base",
        gain=0.5,
        low=0.3,
        high=0.7,
        required=0.1 if passed else 0.9,
        holds=passed,
        note="+0.5 of at least 0.1",
    )
    return Decision(passed=passed, confidence=0.95, verdicts=(verdict,))


def some_data() -> Dataset:
    file = DataFile(relpath="chats.jsonl", path=Path("data/chats.jsonl"), size=10, md5="0" * 32)
    return Dataset(md5=f"{'1' * 32}.dir", dvc_file="data.dvc", path=Path("data"), files=(file,))


def some_run(runtime: Runtime, key: str = "key", **changes: object) -> tracking.Run:
    return tracking.open_run(
        runtime,
        **{
            "key": key,
            "experiment": MODEL,
            "run_name": "r8-lr0.001",
            "params": quickstart().spelled(),
            "tags": {"git_commit": "abc"},
            "dataset": some_data(),
            **changes,
        },
    )


def register(
    runtime: Runtime,
    folder: Path,
    value: float,
    passed: bool = True,
    compared_with: Incumbent | None = None,
    say=lambda line: None,
    key: str | None = None,
) -> int:
    return registry.register_version(
        some_run(runtime, key=key or f"key {value}"),
        MODEL,
        small_adapter(folder / f"adapter-{value}", value),
        some_base(),
        quickstart(),
        a_decision(passed),
        compared_with,
        tags={"data_md5": some_data().md5},
        lineage={"fingerprints": {"train": "f" * 64}},
        say=say,
    )


def runtime_on_file(home: Path, prepared: Path) -> Runtime:
    """A home whose MLflow database has its tables already; making them takes seconds."""
    runtime = Runtime(home=home)
    database = home / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    shutil.copyfile(prepared, database)
    return runtime


def empty_database(folder: Path) -> Path:
    """Made in `folder` by whoever asks first."""
    database = folder / "mlflow" / "mlflow.db"
    if not database.exists():
        tracking.mlflow_client(Runtime(home=folder))
    return database


class MlflowServer:
    """A real server on loopback, always at the same port."""

    def __init__(self, folder: Path, prepared: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(prepared, folder / "server.db")
        self.database_uri = f"sqlite:///{folder / 'server.db'}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Unless it runs already."""
        if self.process:
            return
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", self.database_uri),
            *("--artifacts-destination", (self.folder / "artifacts").as_uri()),
            *("--allowed-hosts", f"127.0.0.1:{self.port}"),
        ]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
                time.sleep(0.2)
        raise AssertionError("the MLflow server did not start")

    def stop(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(30)
            self.process = None
