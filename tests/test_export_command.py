"""Registered versions out and loralib's files in, by the command line."""

import json
from dataclasses import replace
from pathlib import Path

import loralib
import pytest
import torch
from exports import TINY, adapter_on_base, difference, put_loralib, together
from safetensors.torch import save_file
from versions import MODEL, a_decision, empty_database, quickstart, runtime_on_file, small_adapter, some_run

from flows.cli import app
from retuner import bundle, registry, tracking
from retuner.artifacts import BaseFacts
from retuner.base import load_model
from retuner.errors import Refused
from retuner.export_source import base_of, source_of_folder, source_of_version
from retuner.files import sha256_file
from retuner.generation import adapter_on
from retuner.observe import Silent
from retuner.params_file import load
from retuner.store import Store

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A home with a tiny base and a version of an adapter on it: the first has a report, the second none."""
    home = tmp_path_factory.mktemp("project") / ".retuner"
    runtime = replace(
        runtime_on_file(home, empty_database(tmp_path_factory.getbasetemp() / "empty")), device="cpu"
    )
    base = base_of(TINY, runtime, Silent())
    params = quickstart().model_copy(update={"base": TINY})
    report = home / "evaluation"
    report.mkdir()
    asked = [{"prompt": [{"role": "user", "content": f"Colour of item {n}?"}]} for n in range(12)]
    (report / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for number in (1, 2):
        folder = adapter_on_base(base.path, home / f"adapter-{number}", number)
        (folder / "README.md").unlink()
        sample = small_adapter(home / "sample", number)
        sha = sha256_file(folder / "adapter_model.safetensors")
        adapter = sample.model_copy(
            update={"path": folder, "facts": sample.facts.model_copy(update={"sha256": sha})}
        )
        run, tags = some_run(runtime, key=str(number)), {}
        if number == 1:
            files = {f"{registry.REPORT}/{path.name}": path for path in report.iterdir()}
            tracking.publish(run, files=files, tables={}, metrics={}, tags={}, note="")
            tags["report_digest"] = bundle.digest_of(
                {path.name: sha256_file(path) for path in report.iterdir()}
            )
        registry.register_version(
            run, MODEL, adapter, base, params, a_decision(), None, tags=tags, lineage={}
        )
    return runtime


def test_a_version_is_held_against_its_own_held_out_prompts(project, tmp_path):
    found = source_of_version(project, MODEL, 1, tmp_path)
    assert found.prompts_from == f"the held-out prompts of {MODEL} version 1"
    assert len(found.prompts) == 12 and found.prompts[3][0]["content"] == "Colour of item 3?"
    without = source_of_version(project, MODEL, 2, tmp_path)
    assert (
        without.prompts_from.startswith("a fixed set, because the files of the report of") and without.prompts
    )
    assert found.base_facts["source"] == "tiny" and found.base == without.base


@pytest.fixture
def cli(project, monkeypatch, capsys):
    """`retuner` in this process, over the project; what it prints as JSON."""
    monkeypatch.setenv("RETUNER_HOME", str(project.home))

    def run(*arguments):
        capsys.readouterr()
        app([*map(str, arguments), "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    return run


def test_a_registered_version_is_exported_by_one_command(cli, project):
    made = cli("export", "1", "--to", "merged")
    assert made["folder"] == str(project.home / "exports" / f"{MODEL}-1-merged")
    assert made["source"]["name"] == f"{MODEL} version 1"
    assert made["source"]["adapter_sha256"] == registry.tags_of(project, MODEL, 1)["adapter_sha256"]
    assert made["parity"]["prompts"] == made["parity"]["equal_texts"] == 8
    assert not list(project.home.glob("export-*")), "what was fetched to work on is gone"
    with pytest.raises(Refused, match="is there already"):
        cli("export", "1", "--to", "merged")
    with pytest.raises(Refused, match="--to onnx"):
        cli("export", "1", "--to", "onnx")
    with pytest.raises(Refused, match="version 9 does not exist"):
        cli("export", "9", "--to", "split")


@pytest.fixture
def tiny_params(tmp_path):
    text = (ROOT / "params" / "smoke.yaml").read_text()
    seed = load(ROOT / "params" / "smoke.yaml").base.seed
    assert f"seed: {seed}" in text
    (tmp_path / "tiny.yaml").write_text(text.replace(f"seed: {seed}", f"seed: {TINY.seed}", 1))
    assert load(tmp_path / "tiny.yaml").base == TINY
    return tmp_path / "tiny.yaml"


def test_a_loralib_file_is_imported_evaluated_and_exported_again(cli, project, tiny_params, tmp_path):
    """On the base itself: q and v of the fused projections, as the loralib of the tutorial has them."""
    base = base_of(TINY, project, Silent()).path
    theirs = load_model(base, "float32", "sdpa", "cpu")
    torch.manual_seed(3)
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn.qkv_proj"
        options = {"r": 4, "lora_alpha": 16, "enable_lora": [True, False, False, True]}
        put_loralib(theirs, path, loralib.MergedLinear, **options)
        put_loralib(theirs, f"model.layers.{layer}.mlp.down_proj", loralib.Linear, r=4, lora_alpha=16)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    theirs.train()
    save_file(loralib.lora_state_dict(theirs), tmp_path / "theirs.safetensors")

    given = ("--alpha", "16", "--rank", "4", "--enable-lora", "qkv_proj=1,0,0,1")
    folder = tmp_path / "imported"
    made = cli(
        "import", "loralib", tmp_path / "theirs.safetensors", "--base", tiny_params, *given, "--to", folder
    )
    assert made["layers"] == 4 and made["base"] == "tiny"
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert difference(together(base, folder), theirs) < 1e-5
    scored = load_model(base, "float32", "sdpa", "cpu")
    with adapter_on(scored, folder):  # as the evaluation puts adapters on
        assert difference(scored, theirs) < 1e-5

    again = cli(
        *(
            "export",
            folder,
            "--base",
            tiny_params,
            "--to",
            "loralib",
            "--out",
            tmp_path / "again",
            *given[-2:],
        )
    )
    assert again["parity"]["equal_texts"] == 8 and again["parity"]["prompts_from"] == "a fixed set"
    assert (tmp_path / "again" / "lora_state_dict.safetensors").read_bytes() == (
        tmp_path / "theirs.safetensors"
    ).read_bytes()

    settings = tmp_path / "again" / "loralib.yaml"
    cli(
        *("import", "loralib", tmp_path / "again" / "lora_state_dict.safetensors", "--settings", settings),
        *("--base", tiny_params, "--to", tmp_path / "thrice"),
    )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "thrice" / name).read_bytes() == (folder / name).read_bytes()


def test_an_import_that_is_refused_writes_nothing(cli, tiny_params, tmp_path):
    save_file({"x.lora_A": torch.ones(2, 2), "x.lora_B": torch.ones(2, 2)}, tmp_path / "state")
    command = ("import", "loralib", tmp_path / "state", "--base", tiny_params, "--to", tmp_path / "to")
    with pytest.raises(Refused, match="the base has no layer x"):
        cli(*command, "--alpha", "1")
    with pytest.raises(Refused, match="neither --alpha nor --settings"):
        cli(*command)
    with pytest.raises(Refused, match="--enable-lora x=yes"):
        cli(*command, "--alpha", "1", "--enable-lora", "x=yes")
    with pytest.raises(Refused, match="bias:"):
        cli(*command, "--alpha", "1", "--bias", "some")
    assert {path.name for path in tmp_path.iterdir()} == {"state", "tiny.yaml"}


def test_a_base_in_the_store_is_not_fetched_again(project):
    made = base_of(TINY, project, Silent())
    store = Store(project.store)
    assert [m["stage"] for m in store.manifests()].count("fetch_base") == 1
    assert base_of(TINY, project, Silent()) == made
    assert made.facts == BaseFacts.model_validate(store.manifest(made.fingerprint)["facts"])


def test_a_folder_without_an_adapter_is_refused(project, tmp_path):
    with pytest.raises(Refused, match=r"has no adapter_model\.safetensors"):
        source_of_folder(tmp_path, quickstart(), base_of(TINY, project, Silent()))
