"""`retuner data VERB ...`: the data before it is trained on. Everything heavy is imported by the verb that needs it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.options import AsJson, Debug, ModelName, Overrides, ParamsFile, print_json
from flows.stdout import visible_lines
from retuner.errors import Refused, Unavailable
from retuner.runtime import load_runtime

if TYPE_CHECKING:
    from retuner.data_diff import Read, Source
    from retuner.params import PrepareParams
    from tasks.context import RunContext

data_app = typer.Typer(help="Look at the data before it is trained on.", no_args_is_help=True)

AT_HAND = ("smollm2", "tiny", "local")
"""Bases that can be had without a hub."""

Revision = Annotated[
    str, typer.Argument(help="A git commit, branch or tag, `workspace`, or the path of a .dvc file.")
]


@data_app.command("check")
def check(params: ParamsFile, set_: Overrides = [], as_json: AsJson = False, debug: Debug = False) -> None:
    """Read, validate and split the data; the split itself is not kept."""
    from tempfile import TemporaryDirectory

    from retuner.files import disk_full_said
    from tasks.prepare import prepare

    context = _context(params, set_, silent=as_json)
    step = prepare(context, context.dataset, context.params.prepare)
    with TemporaryDirectory() as folder, disk_full_said(Path(folder)):
        out, work = Path(folder, "out"), Path(folder, "work")
        out.mkdir()
        work.mkdir()
        facts = step.build(out, work)
        with (out / "aside" / "quarantine.jsonl").open(encoding="utf-8") as lines:
            set_aside = [json.loads(line) for line in lines]
    if as_json:
        print_json({"md5": context.dataset.md5, **facts.model_dump(mode="json"), "set_aside": set_aside})


@data_app.command("stats")
def stats(
    params: ParamsFile,
    html: Annotated[Path | None, typer.Option(help="Write the page of the data to this file.")] = None,
    set_: Overrides = [],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Describe the data: rows, lengths, roles, scripts, duplicates, leaks. What is computed is kept for the run."""
    from retuner.data_page import data_page
    from retuner.files import disk_full_said, write_whole
    from tasks.fetch_base import fetch_base
    from tasks.prepare import prepare
    from tasks.step import carry_out, look_up
    from tasks.template import template

    if html:
        _check_page(html)
    context = _context(params, set_, silent=as_json)
    wanted = context.params
    splits, _ = carry_out(context, prepare(context, context.dataset, wanted.prepare))
    report: dict[str, Any] = json.loads((splits.path / "aside" / "report.json").read_bytes())
    tokens: dict[str, Any] | None = None
    page = None
    fetching = fetch_base(context, wanted.base)
    base = carry_out(context, fetching)[0] if wanted.base.source in AT_HAND else look_up(context, fetching)
    if base:
        chats, _ = carry_out(context, template(context, splits, base, wanted.template))
        tokens = json.loads((chats.path / "aside" / "tokens.json").read_bytes())
        page = (chats.path / "aside" / "report.html").read_bytes()
    if html:
        with disk_full_said(html.parent):
            write_whole(html, page or data_page(report, None).encode())
    if as_json:
        print_json({"md5": context.dataset.md5, "report": report, "tokens": tokens})
        return
    from flows.data_console import show_stats

    show_stats(report, tokens)
    if html:
        print(f"the page of the data is {html}")


@data_app.command("diff")
def diff(
    rev_a: Revision,
    rev_b: Revision,
    params: Annotated[
        Path | None,
        typer.Argument(help="Says which files, in which format, what is redacted, and how they are split."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The .dvc file; that of PARAMS, or data.dvc, if not given.")
    ] = None,
    set_: Overrides = [],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the data at two git revisions: rows, answers, lengths, roles, words. Changes nothing."""
    from functools import partial

    from retuner.data_diff import diff as compare
    from retuner.intake import read_redacted
    from retuner.params_file import load

    if set_ and params is None:
        raise Refused("--set without PARAMS", "a params file whose settings are overridden")
    loaded = load(params, tuple(set_)) if params else None
    dvc_file = data or Path(loaded.data if loaded else "data.dvc")
    prepare = loaded.prepare if loaded else None
    read: Read = (
        partial(read_redacted, format=prepare.format, columns=prepare.columns, redact=prepare.redact)
        if prepare
        else partial(read_redacted, format="auto", columns=None, redact=())
    )
    a, b = (_source(name, dvc_file, prepare) for name in (rev_a, rev_b))
    try:
        found = compare(a, b, read)
    except Refused as refusal:
        if params:
            raise
        choose = (
            "give PARAMS behind the revisions: its prepare.files and prepare.format say what the chats are"
        )
        do = f"{refusal.do}; {choose}" if refusal.do else choose
        raise Refused(refusal.found, refusal.expected, do) from None
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    from flows.data_console import show_diff

    show_diff(found)


@data_app.command("freeze")
def freeze(
    name: Annotated[str, typer.Argument(help="Of the new set, such as 2026-q4.")],
    params: ParamsFile,
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="VERSION", help="That version's held-out set, not the current one."),
    ] = None,
    model: ModelName = None,
    set_: Overrides = [],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Give the held-out prompts a name, so that they stay held out whatever becomes of data and split."""
    from retuner import held_out

    place = held_out.place_of(name)
    context = _context(params, set_, silent=True)
    if from_ is None:
        from tasks.prepare import prepare
        from tasks.step import carry_out

        wanted = context.params.prepare
        splits, _ = carry_out(context, prepare(context, context.dataset, wanted))
        rows = splits.path / "held_out.jsonl"
        rule = held_out.split_rule(wanted.model_dump(mode="json"))
        source = f"{context.dataset.dvc_file} {context.dataset.md5}"
    else:
        rows, rule, source = _of_version(context, from_, model or context.params.register_.model_name)
    made = held_out.freeze(name, held_out.groups_in(rows), rule, source)
    if as_json:
        print_json(
            {"name": name, "file": place.as_posix(), "prompts": len(made.groups), "sha256": made.sha256}
        )
        return
    print(f"{place}: {len(made.groups):,} prompts of {source}")
    print(f"next: git add {place}, and prepare.held_out_set: {name} in the params that are to use it")


def _check_page(html: Path) -> None:
    """Makes the page's folder. Errors: Refused, before any data is read, where no page can be written."""
    from tempfile import TemporaryFile

    if html.exists() and not html.is_file():
        kind = "a folder" if html.is_dir() else "no plain file"
        raise Refused(
            f"--html {html} is {kind}", "a file that the page may replace", "name a file, new or old"
        )
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=html.parent):
            pass
    except OSError as error:
        raise Refused(
            f"--html {html} cannot be written: {error}",
            "a file in a folder that can be written to",
            "name another",
        ) from error


def _of_version(context: "RunContext", version: str, model: str) -> tuple[Path, str, str]:
    """What a registered version was scored on: its rows, its rule, and what to call it."""
    from flows.versions import model_named, version_named
    from retuner import held_out, registry

    model = model_named(context.runtime, model)
    number = version_named(context.runtime, model, version)
    tags = registry.tags_of(context.runtime, model, number)
    rows = held_out.stored(context.store, tags.get("held_out_splits", ""), tags.get("held_out_digest", ""))
    if rows is None:
        raise Unavailable(
            f"the held-out set of {model} version {number} is not in the store",
            "the result of its `prepare` stage",
            "run its params again on its data, or freeze the current set",
        )
    return rows, tags["split_rule"], f"{model} version {number}"


def _context(params: Path, overrides: list[str], silent: bool) -> "RunContext":
    from retuner.params_file import load
    from tasks.context import Quiet, open_context

    observer = Quiet() if silent else _speaker()
    return open_context(load(params, tuple(overrides)), load_runtime(), observer)


def _speaker() -> Any:
    """Says lines on stdout, for verbs whose whole output these are."""
    from tasks.context import Quiet

    class Speaker(Quiet):
        def say(self, line: str) -> None:
            print(visible_lines(line))

    return Speaker()


def _source(name: str, dvc_file: Path, prepare: "PrepareParams | None") -> "Source":
    """The data at a revision: the files that the params choose, and how they are split there."""
    from retuner import held_out
    from retuner.data_diff import Source
    from retuner.dvc_revision import open_revision, text_at
    from retuner.naming import is_held_out
    from retuner.splits import matching

    revision = open_revision(name, dvc_file, load_runtime().home / "seen-data.json")
    dataset = revision.dataset
    if prepare is None:
        return Source(revision.name, dataset.md5, dataset.files)
    spelled = prepare.model_dump(mode="json")
    frozen: frozenset[str] | None = None
    if set_name := spelled.get("held_out_set"):
        text = text_at(revision, held_out.place_of(set_name))
        frozen = held_out.parse_frozen(set_name, text).groups if text else frozenset()

    def side(group: str) -> str:
        if frozen is not None:
            return "held_out" if group in frozen else "train"
        held = is_held_out(group, prepare.split_salt, prepare.held_out_fraction)
        return "held_out" if held else "train"

    return Source(revision.name, dataset.md5, tuple(matching(dataset, prepare.files)), side)
