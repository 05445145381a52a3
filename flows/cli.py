"""`retuner VERB ...`: the command line. Everything heavy is imported by the verb that needs it."""

import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from flows.data import data_app
from flows.export import export, import_app
from flows.options import AsJson, Because, Debug, ModelName, Overrides, ParamsFile, Version, print_json
from flows.params_verbs import params_app
from flows.stdout import take_stdout, visible_lines
from retuner.errors import Refused, RetunerError, Unavailable
from retuner.runtime import home_said, load_runtime, person

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of shells: 128 and the signal's number."""

app = typer.Typer(
    help="Retrain Phi-3 LoRA adapters on a schedule, and prove where each one came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(import_app, name="import")
app.command()(export)
app.add_typer(params_app, name="params")


@app.callback()
def options(
    home: Annotated[Path | None, typer.Option(help="Where everything a run leaves lies.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    processes: Annotated[str | None, typer.Option(help="How many train together, one for each GPU.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Of several processes: ddp or fsdp.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow's; SQLite under --home if unset.")] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = None,
) -> None:
    for name, value in {
        "HOME": home,
        "DEVICE": device,
        "PROCESSES": processes,
        "STRATEGY": strategy,
        "TRACKING_URI": tracking_uri,
        "LOG_LEVEL": log_level,
    }.items():
        if value is not None:
            # Through the environment, so that servers and workers that we start see the same.
            os.environ[f"RETUNER_{name}"] = str(value)


@app.command()
def run(params: ParamsFile, set_: Overrides = [], as_json: AsJson = False, debug: Debug = False) -> None:
    """Run the whole pipeline; stages whose result is there are not run again."""
    runtime = load_runtime()
    summary = None
    if not (os.environ.get("PREFECT_API_URL") or (runtime.prefect_home / "server.json").exists()):
        # With a Prefect server the run is recorded there, cached or not.
        from flows.receipts import answer_from_receipt

        summary = answer_from_receipt(params, tuple(set_), runtime)
    if summary is None:
        from flows.run import run_pipeline

        summary = run_pipeline(params, tuple(set_), runtime)
        if not as_json:
            from flows.console import show_summary

            show_summary(summary, str(params))
    elif not as_json:
        from flows.receipts import show_nothing_to_do

        show_nothing_to_do(summary)
    if as_json:
        print_json(summary)
    if not summary["gate"]["passed"]:
        raise typer.Exit(3)


@app.command()
def why(params: ParamsFile, set_: Overrides = [], as_json: AsJson = False, debug: Debug = False) -> None:
    """Say for each stage whether it would be cached and, if not, what changed."""
    from dataclasses import asdict

    from flows.cached import reasons
    from retuner.params_file import load
    from tasks.context import open_context

    told = reasons(open_context(load(params, tuple(set_)), load_runtime()))
    if as_json:
        print_json({"stages": [asdict(reason) for reason in told]})
        return
    for reason in told:
        print(f"{reason.stage:<11} {reason.state:<8} {(reason.fingerprint or '')[:12]}")
        for change in reason.changes:
            print(f"{'':<12}{change}")


@app.command()
def plan(params: ParamsFile, set_: Overrides = [], as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what training would take: memory, speed, time, rows cut or left out, and whether it fits."""
    from flows.console import Terminal
    from flows.plan import plan_training

    terminal = Terminal()
    try:
        planned, refusal = plan_training(params, tuple(set_), load_runtime(), terminal)
    finally:
        terminal.close()
    if as_json and not refusal:
        print_json(planned.as_json())
    elif not as_json:
        for line in planned.lines():
            print(line)
    if refusal:
        raise refusal


@app.command()
def accept(
    params: ParamsFile,
    stage: Annotated[str, typer.Option(help="The stage whose code changed.")],
    because: Because,
    set_: Overrides = [],
    debug: Debug = False,
) -> None:
    """Keep a stage's result although its code changed: the change is known not to alter it."""
    from flows.cached import accept_code_change
    from retuner.params_file import load
    from tasks.context import open_context

    source = accept_code_change(open_context(load(params, tuple(set_)), load_runtime()), stage, because)
    print(
        f"{stage}: the result made under {source[:12]} is served from now on; the acceptance is kept with it"
    )


@app.command()
def compare(
    a: Version, b: Version, model: ModelName = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Two versions or runs side by side, with intervals and the prompts whose answers changed."""
    from flows.versions import compare_versions, model_named, version_named

    runtime = load_runtime()
    name = model_named(runtime, model)
    numbers = [version_named(runtime, name, version) for version in (a, b)]
    comparison = compare_versions(runtime, name, *numbers)
    if as_json:
        print_json(comparison.model_dump(mode="json"))
        return
    from rich.console import Console

    from retuner.compare import render

    Console(highlight=False).print(render(comparison, *(f"{name} v{number}" for number in numbers)))


@app.command()
def promote(
    version: Version,
    model: ModelName = None,
    expect_current: Annotated[
        str, typer.Option(help="The version to be replaced: a number, `none`, or `any`.")
    ] = "any",
    because: Because = "",
    force: Annotated[bool, typer.Option(help="Although its gate said no; needs --because.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put a version into production, after checking every byte of it."""
    from flows.versions import model_named, version_named
    from retuner import promotion

    runtime = load_runtime()
    name = model_named(runtime, model)
    number = version_named(runtime, name, version)
    expected = _expected_version(expect_current)
    done = promotion.promote(runtime, name, number, expected, because, person(), force)
    _say_promotion(done, as_json)


@app.command()
def rollback(
    model: ModelName = None, because: Because = "", as_json: AsJson = False, debug: Debug = False
) -> None:
    """Put the previous version back into production."""
    from flows.versions import model_named
    from retuner import promotion

    runtime = load_runtime()
    done = promotion.rollback(runtime, model_named(runtime, model), because, person())
    _say_promotion(done, as_json)


@app.command()
def history(model: ModelName = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Who put what into production, from the audit log; says when production was changed elsewhere."""
    from dataclasses import asdict

    from flows.versions import history_lines, model_named
    from retuner import promotion

    runtime = load_runtime()
    name = model_named(runtime, model)
    told = promotion.history(runtime, name)
    if as_json:
        print_json({"model_name": name, **asdict(told)})
        return
    for line in [*history_lines(told.entries), *told.notes]:
        print(line)
    print(f"{name}: production is version {told.production}, previous is {told.previous}")


@app.command()
def replay(version: Version, model: ModelName = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Make a version again from its lineage alone, and compare the bytes."""
    from flows.console import Terminal
    from flows.replay import replay as make_again
    from flows.versions import model_named, version_named

    runtime = load_runtime()
    name = model_named(runtime, model)
    terminal = Terminal()
    try:
        made = make_again(runtime, name, version_named(runtime, name, version), terminal)
    finally:
        terminal.close()
    if as_json:
        print_json(
            {
                "same": made.same,
                "registered_sha256": made.registered_sha256,
                "replayed_sha256": made.replayed_sha256,
                "differences": list(made.differences),
            }
        )
    else:
        for line in made.differences:
            print(f"  {line}")
        verdict = "the same bytes" if made.same else "other bytes"
        print(f"{verdict}: registered {made.registered_sha256}, replayed {made.replayed_sha256}")
    if not made.same:
        raise typer.Exit(1)


@app.command()
def serve(
    model: ModelName = None,
    host: Annotated[str, typer.Option(help="Beyond loopback RETUNER_SERVE_TOKEN must be set.")] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8000,
    debug: Debug = False,
) -> None:
    """Answer OpenAI-style chat requests with the production adapter; follows its alias."""
    from flows.versions import model_named
    from retuner.serving import serve as answer_requests

    runtime = load_runtime()
    answer_requests(runtime, model_named(runtime, model), host, port)


@app.command()
def schedule(
    params: ParamsFile,
    cron: Annotated[str, typer.Option(help="When, e.g. '0 3 * * 1' for Mondays at three (UTC).")],
    set_: Overrides = [],
    debug: Debug = False,
) -> None:
    """Retrain on a schedule: serves a Prefect deployment until Ctrl-C."""
    from flows.schedule import schedule as serve_deployment

    serve_deployment(params, tuple(set_), cron, load_runtime(), print)


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option()] = 5000,
    prefect_port: Annotated[int, typer.Option()] = 4200,
    debug: Debug = False,
) -> None:
    """MLflow's and Prefect's pages on loopback, over this project's stores."""
    from flows.servers import ui as serve_pages

    serve_pages(load_runtime(), mlflow_port, prefect_port)


@app.command()
def gc(
    keep: Annotated[
        int, typer.Option(help="Versions of each model whose results stay, besides aliases.")
    ] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    forget: Annotated[
        list[str], typer.Option(help="A model that was deleted from the registry for good.")
    ] = [],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove stored results that no alias and no recent version was made from."""
    from dataclasses import asdict

    from flows.collect import collect

    done = collect(load_runtime(), keep, dry_run, forget)
    if as_json:
        print_json(asdict(done))
        return
    verb = "would remove" if dry_run else "removed"
    print(f"{verb} {len(done.removed)} results, {done.freed_bytes / 1e6:.1f} MB; {done.kept} stay")


def _expected_version(text: str) -> Any:
    if text in ("any", "none"):
        return None if text == "none" else "any"
    if text.isdecimal():
        return int(text)
    raise Refused(f"--expect-current {text}", "a version number, `none`, or `any`")


def _say_promotion(done: Any, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json({**asdict(done), "already": done.already})
        return
    for note in done.notes:
        print(note)
    if done.already:
        print(f"{done.model_name} version {done.version} is in production already")
    else:
        instead = f"instead of version {done.replaced}" if done.replaced else "where nothing was before"
        print(f"{done.model_name} version {done.version} is in production, {instead}")


class Terminated(SystemExit):
    """SIGTERM ends a run as Ctrl-C does: its MLflow run is closed, and the server it started is stopped."""


def _terminated(number: int, frame: object) -> NoReturn:
    raise Terminated


def main() -> None:
    """Run the command line and leave with the documented exit code."""
    take_stdout()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = _outcome()
        sys.stdout.flush()
    except Unavailable as error:  # of stdout itself
        code = _fail(error)
    sys.exit(code)


def _outcome() -> int:
    """The exit code; what went wrong is said."""
    debug = "--debug" in sys.argv
    code: int | None
    try:
        with home_said():
            code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            _fail(_stopped_by("Ctrl-C"), code)
    except RetunerError as error:
        if debug:
            traceback.print_exc()
        code = _fail(error)
    except Terminated:
        code = _fail(_stopped_by("SIGTERM"), TERMINATED)
    except Exception as error:  # noqa: BLE001 - said in one line, and whole with --debug
        usage = getattr(error, "format_message", None)
        if debug:
            traceback.print_exc()
        if usage:  # click's own: a wrong argument
            code = _fail(RetunerError(usage(), do="retuner --help"), code=2)
        else:
            code = _fail(
                RetunerError(f"{type(error).__name__}: {error}", do="this is a defect; --debug shows where")
            )
    return code or 0


def _stopped_by(what: str) -> RetunerError:
    return RetunerError(f"stopped by {what}", do="run again: the same command goes on from what is finished")


def _fail(error: RetunerError, code: int | None = None) -> int:
    code = error.exit_code if code is None else code
    with suppress(OSError):  # where stderr takes nothing either, the exit code still says it
        print(visible_lines(str(error)), file=sys.stderr)
    if "--json" in sys.argv:
        told = {"found": error.found, "expected": error.expected, "do": error.do}
        print_json({"error": told, "exit_code": code})
    return code


if __name__ == "__main__":
    main()
