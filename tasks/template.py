from pathlib import Path

from retuner import templating
from retuner.artifacts import Base, ChatsFacts, Splits
from retuner.params import TemplateParams
from tasks.context import RunContext
from tasks.step import Step


def template(run: RunContext, splits: Splits, base: Base, params: TemplateParams) -> Step[ChatsFacts]:
    """Token ids and the loss mask, laid out by the base's own chat template."""

    def build(out: Path, work: Path) -> ChatsFacts:
        return templating.template(out, splits, base, params, run.observer)

    return Step(
        stage="template",
        code=("retuner.templating:template",),
        libraries=("jinja2", "pyarrow", "tokenizers", "transformers"),
        params=params.model_dump(mode="json"),
        # Only the tokenizer of the base matters here: other weights under it are no reason to run again.
        inputs={
            "splits": splits.digest,
            "tokenizer": base.facts.tokenizer_sha256,
            "template": base.facts.template_sha256,
        },
        uses=(splits, base),
        facts=ChatsFacts,
        build=build,
    )
