from pathlib import Path

from retuner import training
from retuner.artifacts import AdapterFacts, Base, Chats
from retuner.metric_stream import MetricStream
from retuner.observe import Tee
from retuner.params import TrainParams
from tasks.context import RunContext
from tasks.step import Step


def train(run: RunContext, chats: Chats, base: Base, params: TrainParams) -> Step[AdapterFacts]:
    """A LoRA adapter; step metrics go to MLflow while it learns."""

    def build(out: Path, work: Path) -> AdapterFacts:
        with MetricStream(run.mlflow_run(work.name), run.observer.say) as stream:
            listener = Tee(run.observer, stream)
            return training.train(out, work, chats, base, params, run.runtime.device, listener)

    return Step(
        stage="train",
        code=("retuner.training:train",),
        libraries=("accelerate", "datasets", "numpy", "peft", "safetensors", "torch", "transformers", "trl"),
        params=params.model_dump(mode="json"),
        inputs={"chats": chats.digest, "base": base.digest},
        uses=(chats, base),
        facts=AdapterFacts,
        build=build,
    )
