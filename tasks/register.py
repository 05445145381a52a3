import json
import subprocess
from pathlib import Path
from typing import Any

from retuner import gate, held_out, promotion, registry, registry_reads, run_page, tracking
from retuner.artifacts import (
    Adapter,
    Artifact,
    Base,
    Chats,
    Decision,
    Report,
    Splits,
    VersionFacts,
)
from retuner.errors import Refused
from retuner.files import sha256_file
from retuner.metric_stream import MetricStream
from retuner.params import RegisterParams
from retuner.warm_start import TRAIN_REQUEST, WARM_START, train_request
from tasks.context import RunContext
from tasks.step import Step


def register(
    run: RunContext,
    adapter: Adapter,
    report: Report,
    base: Base,
    splits: Splits,
    chats: Chats,
    params: RegisterParams,
) -> Step[VersionFacts]:
    """Decide by the gate, publish what people look at, register the version, and promote it where that is wanted."""

    def build(out: Path, work: Path) -> VersionFacts:
        rule = held_out.split_rule(run.params.prepare.model_dump(mode="json"))
        incumbent = run.incumbent(adapter.facts.sha256)
        decision = _decision(run, report, splits, incumbent, rule, params)
        mlflow_run = run.mlflow_run(adapter.fingerprint)
        lineage = _lineage(run, (base, splits, chats, adapter, report), decision)
        _write_json(out / "lineage.json", lineage)
        if not tracking.has_metric(mlflow_run, "loss"):
            _send_curves(run, mlflow_run, adapter)
        tracking.publish(
            mlflow_run,
            files=_files(out, base, splits, chats, adapter, report),
            tables={"answers.json": run_page.answers_table(report.path / "answers.jsonl")},
            metrics={
                **run_page.comparable_metrics(report.facts),
                "trainable_parameters": float(adapter.facts.trainable_parameters),
                "supervised_tokens": float(chats.facts.supervised_tokens),
            },
            tags={
                "retuner.gate": "passed" if decision.passed else "said no",
                "mlflow.source.git.commit": lineage["git_commit"],
            },
            note=run_page.note(report.facts, decision, _note_lines(run, base, adapter)),
        )
        version = registry.register_version(
            mlflow_run,
            params.model_name,
            adapter,
            base,
            run.params,
            decision,
            incumbent,
            tags={
                "data_md5": run.dataset.md5,
                "report_digest": report.digest,
                "git_commit": lineage["git_commit"],
                "split_rule": rule,
                "held_out_splits": splits.fingerprint,
                "held_out_digest": sha256_file(splits.path / "held_out.jsonl"),
                **_warm_start_tags(run, lineage["stages"]["train"]["identity"], chats, base),
                "stage_fingerprints": json.dumps(
                    {r.stage: r.fingerprint for r in (base, splits, chats, adapter, report)}
                    | {"register": work.name}
                ),
            },
            lineage=lineage,
            say=run.observer.say,
        )
        if decision.passed and params.promote == "when_gate_passes":
            _promote(run, params.model_name, version, incumbent)
        facts = VersionFacts(
            model_name=params.model_name,
            model_version=version,
            run_id=mlflow_run.run_id,
            experiment_id=mlflow_run.experiment_id,
            adapter_sha256=adapter.facts.sha256,
            decision=decision,
        )
        _write_json(out / "version.json", facts.model_dump(mode="json"))
        return facts

    return Step(
        stage="register",
        code=("retuner.gate:decide", "retuner.registry:register_version"),
        libraries=("numpy",),
        params=params.model_dump(mode="json"),
        inputs={"adapter": adapter.digest, "report": report.digest, "base": base.digest},
        uses=(adapter, report),
        facts=VersionFacts,
        build=build,
        still_stands=lambda made: registry_reads.still_registered(
            run.runtime, made.facts.model_name, made.facts.model_version, made.facts.adapter_sha256
        ),
    )


def _decision(
    run: RunContext,
    report: Report,
    splits: Splits,
    incumbent: registry_reads.Incumbent | None,
    rule: str,
    params: RegisterParams,
) -> Decision:
    """The gate's, with a note when production may have been trained on what it was scored on."""
    decision = gate.decide(report, params.gate)
    if incumbent is None:
        return decision
    rows = splits.path / "held_out.jsonl"
    redact = run.params.prepare.redact
    warning = held_out.seen_by(run.runtime, params.model_name, incumbent.version, rule, rows, redact)
    if warning is None:
        return decision
    run.observer.say(f"register: beware: {warning}")
    return decision.model_copy(update={"notes": (warning,)})


def _send_curves(run: RunContext, mlflow_run: tracking.Run, adapter: Adapter) -> None:
    """The step metrics of an adapter that was trained for an earlier MLflow run."""
    with MetricStream(mlflow_run, run.observer.say) as stream:
        for line in (adapter.path / "aside" / "metrics.jsonl").read_text().splitlines():
            point = json.loads(line)
            stream.metrics(point["step"], point["metrics"])


def _promote(run: RunContext, name: str, version: int, incumbent: registry_reads.Incumbent | None) -> None:
    expected = incumbent.version if incumbent else None
    if registry_reads.read_alias(run.runtime, name, registry_reads.PRODUCTION) == version:
        return
    try:
        promotion.promote(run.runtime, name, version, expected, "it passed its gate", "retuner run")
    except Refused as refusal:
        # Someone promoted another version since this one was compared. Theirs stands.
        run.observer.say(f"register: version {version} passed its gate but is not promoted: {refusal.found}")


def _lineage(run: RunContext, results: tuple[Artifact[Any], ...], decision: Decision) -> dict[str, Any]:
    """Everything needed to make the version again, and to see why it was allowed."""
    stages = {}
    for result in results:
        manifest = run.store.manifest(result.fingerprint) or {}
        stages[result.stage] = {
            "fingerprint": result.fingerprint,
            "digest": result.digest,
            "identity": manifest.get("identity"),
            "facts": manifest.get("facts"),
            "accepted": manifest.get("accepted"),
        }
    return {
        "params": run.params.spelled(),
        "data": {
            "md5": run.dataset.md5,
            "dvc_file": run.dataset.dvc_file,
            "path": run.dataset.path.name,
        },
        "held_out": run.held_out_sets.spelled(),
        "git_commit": _git_commit(),
        "stages": stages,
        "gate": decision.model_dump(mode="json"),
    }


def _warm_start_tags(run: RunContext, identity: Any, chats: Chats, base: Base) -> dict[str, str]:
    """By these a later run finds out whether the adapter in production is its own."""
    params = run.params.train.model_dump(mode="json")
    return {
        WARM_START: identity["inputs"].get("warm_start") or "",
        TRAIN_REQUEST: train_request(params, chats.digest, base.digest),
    }


def _git_commit() -> str:
    """HEAD, with `+changes` when tracked files differ from it; `unknown` outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit


def _files(
    out: Path, base: Base, splits: Splits, chats: Chats, adapter: Adapter, report: Report
) -> dict[str, Path]:
    """Artifact path in MLflow to file."""
    wanted = {
        "data/report.html": chats.path / "aside" / "report.html",
        "data/report.json": splits.path / "aside" / "report.json",
        "data/quarantine.jsonl": splits.path / "aside" / "quarantine.jsonl",
        "train/effective.json": adapter.path / "aside" / "effective.json",
        "train/plan.json": adapter.path / "aside" / "plan.json",
        "evaluation/report.json": report.path / "report.json",
        "evaluation/answers.jsonl": report.path / "answers.jsonl",
        "evaluation/losses.jsonl": report.path / "losses.jsonl",
        "lineage.json": out / "lineage.json",
    }
    return {name: path for name, path in wanted.items() if path.exists() and path.stat().st_size}


def _note_lines(run: RunContext, base: Base, adapter: Adapter) -> dict[str, str]:
    facts = adapter.facts
    lines = {
        "data": f"`{run.dataset.md5}` ({run.dataset.dvc_file})",
        "base": base.facts.source,
        "adapter": f"`{facts.sha256}`, {facts.trainable_parameters:,} of {facts.total_parameters:,} parameters",
        "train fingerprint": f"`{adapter.fingerprint}`",
    }
    if differs := run_page.not_as_requested(facts.effective):
        lines["not as requested"] = differs
    if chosen := facts.effective.get("chosen"):
        lines["chosen"] = chosen
    if flow_run := run.links.get("prefect"):
        lines["Prefect flow run"] = flow_run
    return lines


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
