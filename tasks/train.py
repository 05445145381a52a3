from contextlib import ExitStack
from pathlib import Path
from typing import Any

from retuner import dpo, launch, planner, registry, training
from retuner.artifacts import AdapterFacts, Base, Chats
from retuner.checkpoint_sharing import CheckpointSharing
from retuner.fused_kernels import require_liger, uses_liger
from retuner.metric_stream import MetricStream
from retuner.observe import Tee
from retuner.planning_aside import plan_aside
from retuner.quantized import needs_bitsandbytes, require_bitsandbytes
from retuner.train_params import DpoParams, SftParams
from retuner.warm_start import production_start, train_request
from tasks.context import RunContext
from tasks.step import Step


def train(run: RunContext, chats: Chats, base: Base, params: SftParams | DpoParams) -> Step[AdapterFacts]:
    """A LoRA adapter; step metrics go to MLflow while it learns."""
    require_bitsandbytes(params)
    require_liger(params)
    spelled = params.model_dump(mode="json")
    inputs: dict[str, Any] = {"chats": chats.digest, "base": base.digest}
    start = None
    if params.warm_start == "production":
        start = run.start
        if start is None:
            request = train_request(spelled, chats.digest, base.digest)
            start = production_start(run.runtime, run.params.register_.model_name, request)
        inputs["warm_start"] = start.sha256 if start else None

    def build(out: Path, work: Path) -> AdapterFacts:
        folder = None
        if start:
            folder = work / "start"
            registry.fetch_adapter(start.runtime, start.model_name, start.version, folder, base)
            run.observer.say(f"train: learning on from {start.model_name} version {start.version}")
        elif params.warm_start == "production":
            run.observer.say("train: nothing is in production to learn on from; the adapter begins at zero")
        runtime, speeds = run.runtime, run.runtime.home / planner.SPEEDS
        several = (runtime.processes, runtime.strategy)
        plan = plan_aside(chats, base, params, runtime.device, speeds, *several)
        run.observer.say(f"train: expecting {plan.summary()}")
        plan.refuse_what_cannot_fit()
        asked = params.model_copy(update={"gradient_checkpointing": plan.gradient_checkpointing})
        with ExitStack() as open_:
            stream = open_.enter_context(MetricStream(run.mlflow_run(work.name), run.observer.say))
            if run.store.shared:
                open_.enter_context(CheckpointSharing(run.store.shared, work, run.observer.say))
            rest = (runtime.device, Tee(run.observer, stream), folder)
            if isinstance(asked, DpoParams):
                facts = dpo.train(out, work, chats, base, asked, *rest)
            elif runtime.processes > 1:
                facts = launch.train_in_processes(out, work, chats, base, asked, *rest, *several)
            else:
                facts = training.train(out, work, chats, base, asked, *rest)
        planner.record_outcome(out / "aside", plan, speeds)
        return facts

    extra = ("bitsandbytes",) if needs_bitsandbytes(params) else ()
    if uses_liger(params):
        extra = (*extra, "liger-kernel", "triton")
    return Step(
        stage="train",
        code=("retuner.dpo:train" if isinstance(params, DpoParams) else "retuner.training:train",),
        libraries=(
            *("accelerate", "datasets", "numpy", "peft", "safetensors", "torch", "transformers", "trl"),
            *extra,
        ),
        params=spelled,
        inputs=inputs,
        uses=(chats, base),
        facts=AdapterFacts,
        build=build,
    )
