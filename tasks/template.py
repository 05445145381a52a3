from pathlib import Path

from retuner import templating
from retuner.artifacts import Base, ChatsFacts, Splits
from retuner.code_digest import code_digest
from retuner.fingerprint import fingerprint, library_versions
from retuner.pair_templating import template_pairs
from retuner.params import TemplateParams
from tasks.context import RunContext
from tasks.step import Step


def template(run: RunContext, splits: Splits, base: Base, params: TemplateParams) -> Step[ChatsFacts]:
    """Token ids and the loss mask, laid out by the base's own chat template."""
    # Only the tokenizer of the base matters here: other weights under it are no reason to run again. How many tokens
    # the base takes is no part of the result either, so it is asked whether or not there is one.
    templating.check_room(base, params)
    tokenizer = {"tokenizer": base.facts.tokenizer_sha256, "template": base.facts.template_sha256}
    libraries = ("jinja2", "numpy", "pyarrow", "pydantic-core", "tokenizers", "transformers")

    def build(out: Path, work: Path) -> ChatsFacts:
        # What one row becomes depends on this alone, not on the other rows or the params.
        code = code_digest("retuner.rendering:Renderer", run.code_notes)
        key = fingerprint({**tokenizer, "code": code, "libraries": library_versions(libraries)})
        memo = run.store.root / "memo" / key
        lay_out = template_pairs if splits.facts.pairs else templating.template
        return lay_out(out, work, splits, base, params, memo, run.observer)

    return Step(
        stage="template",
        code=(
            "retuner.pair_templating:template_pairs" if splits.facts.pairs else "retuner.templating:template",
        ),
        libraries=libraries,
        params=params.model_dump(mode="json"),
        inputs={"splits": splits.digest, **tokenizer},
        uses=(splits, base),
        facts=ChatsFacts,
        build=build,
    )
