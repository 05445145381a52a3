from pathlib import Path

from retuner import evaluation, registry
from retuner.artifacts import Adapter, Base, Chats, ReportFacts
from retuner.pair_evaluation import evaluate_pairs
from retuner.params import EvaluateParams
from retuner.warm_start import registered_start
from tasks.context import RunContext
from tasks.step import Step


def evaluate(
    run: RunContext, adapter: Adapter, chats: Chats, base: Base, params: EvaluateParams
) -> Step[ReportFacts]:
    """Base, production and new adapter on the same held-out rows."""
    model_name, train = run.params.register_.model_name, run.params.train
    incumbent = run.incumbent(adapter.facts.sha256)
    preference = adapter.facts.preference

    def build(out: Path, work: Path) -> ReportFacts:
        folder = None
        if incumbent:
            folder = work / "production"
            registry.fetch_adapter(run.runtime, model_name, incumbent.version, folder, base)
        how = (params, train.precision, train.attention, run.runtime.device, run.observer)
        if preference is None:
            return evaluation.evaluate(out, adapter, chats, base, folder, *how)
        reference = folder if incumbent and incumbent.adapter_sha256 == preference.reference else None
        if preference.reference and not reference:
            reference = work / "reference"
            began = registered_start(run.runtime, model_name, preference.reference)
            registry.fetch_adapter(run.runtime, model_name, began.version, reference, base)
        return evaluate_pairs(out, adapter, chats, base, folder, reference, preference, *how)

    return Step(
        stage="evaluate",
        code=("retuner.pair_evaluation:evaluate_pairs" if preference else "retuner.evaluation:evaluate",),
        libraries=(
            "evaluate",
            "numpy",
            "peft",
            "rouge-score",
            "sacrebleu",
            "tokenizers",
            "torch",
            "transformers",
        ),
        params={
            **params.model_dump(mode="json"),
            "precision": train.precision,
            "attention": train.attention,
        },
        inputs={
            "adapter": adapter.digest,
            "chats": chats.digest,
            "base": base.digest,
            "production": incumbent.adapter_sha256 if incumbent else None,
            **({"preference": preference.model_dump(mode="json")} if preference else {}),
        },
        uses=(adapter, chats, base),
        facts=ReportFacts,
        build=build,
    )
