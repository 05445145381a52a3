"""The tutorial's dictionaries, as they are: what each name becomes, what is refused, and that the result runs."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from projects import ROOT, add_to_dvc, chats, retrain, retuner, write_chats

from retuner import registry_reads, run_page, tracking
from retuner.errors import Refused
from retuner.params import Params
from retuner.params_file import load
from retuner.tutorial import Row, Translation, translate
from retuner.tutorial_source import read
from retuner.tutorial_table import GONE, TABLE

HERE = Path(__file__).parent
SCRIPT = HERE / "tutorial_sample_finetune.py"
NOTEBOOK = HERE / "tutorial_qlora.ipynb"
DICTS = HERE / "tutorial_dicts.json"
SHIPPED = ROOT / "params" / "tutorial_sample_finetune.yaml"


def translated(folder: Path, text: str, name: str = "theirs.py") -> Translation:
    (folder / name).write_text(text)
    return translate(read(folder / name))


def row(translation: Translation, name: str) -> Row:
    (found,) = [row for row in translation.rows if row.name == name]
    return found


def loaded(translation: Translation, folder: Path) -> Params:
    (folder / "translated.yaml").write_text(translation.text)
    return load(folder / "translated.yaml")


# The tutorial's own


def test_the_two_dictionaries_alone_are_taken_as_they_are(tmp_path):
    done = retuner(
        tmp_path, tmp_path / "home", "params", "from-tutorial", str(DICTS), "--to", "p.yaml", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["refused"], told["written"]) == (0, "p.yaml")
    run = load(tmp_path / "p.yaml")
    assert (run.train.learning_rate, run.train.schedule, run.train.warmup_fraction) == (5e-6, "cosine", 0.2)
    assert (run.train.precision, run.train.epochs, run.train.max_steps) == ("bfloat16", 1, None)
    assert (run.train.batch_size, run.train.gradient_accumulation, run.train.seed) == (4, 1, 0)
    assert (run.train.checkpoint_every_steps, run.train.log_every_steps) == (100, 20)
    lora = run.train.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.bias, lora.targets) == (
        16,
        32,
        0.05,
        "none",
        "all-linear",
    )


@pytest.mark.parametrize("path", [SCRIPT, DICTS], ids=lambda path: path.name)
def test_no_name_of_the_dictionaries_is_dropped(path):
    theirs = json.loads(DICTS.read_text())
    rows = {(row.group, row.key): row for row in translate(read(path)).rows}
    for group, name in (("training", "training_config"), ("peft", "peft_config")):
        for key in theirs[name]:
            found = rows[group, key]
            assert (found.verdict == "kept" and found.became) or found.why


def test_the_shipped_file_is_what_the_command_writes_of_the_script(tmp_path):
    asked = ("params", "from-tutorial", str(SCRIPT), "--leave-out", "--to", "p.yaml")
    done = retuner(tmp_path, tmp_path / "home", *asked)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.yaml").read_text() == SHIPPED.read_text()
    assert "warmup_ratio" in done.stdout and "train.warmup_fraction: 0.2" in done.stdout


def test_each_value_of_the_shipped_file_names_the_line_it_came_from():
    lines = SCRIPT.read_text().splitlines()
    for place, key in (
        line.split("# line ")[1].split(";")[0].split(": ")
        for line in SHIPPED.read_text().splitlines()
        if "# line " in line
    ):
        assert key in lines[int(place) - 1] or key == "pretrained_model_name_or_path"


def test_the_dictionaries_run_through_the_whole_pipeline_to_a_registered_version(tmp_path, monkeypatch):
    write_chats(tmp_path / "data", chats(24))
    add_to_dvc(tmp_path)
    shutil.copy(SHIPPED, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    small = (
        "base={source: tiny, seed: 0}",  # Phi-3 in small; what it learns is not the claim
        "train.precision=float32",
        "train.attention=sdpa",
        "template.max_tokens=128",
        "template.pack_tokens=128",
        "prepare.held_out_fraction=0.2",
        "evaluate.max_prompts=2",
        "evaluate.max_new_tokens=4",
    )
    context = retrain(small)
    tags = registry_reads.read_version(context.runtime, "tutorial-sample-finetune", 1)
    assert len(tags["adapter_sha256"]) == 64
    run = tracking.mlflow_client(context.runtime).search_runs(
        [e.experiment_id for e in tracking.mlflow_client(context.runtime).search_experiments()]
    )[0]
    assert run.data.params["train.learning_rate"] == "5e-06"
    assert run.data.params["train.lora.rank"] == "16"
    assert "not as requested" not in run.data.tags["mlflow.note.content"]
    (effective,) = (context.runtime.home / "mlflow").rglob("train/effective.json")
    said = json.loads(effective.read_text())
    for name, value in {"attention": "sdpa", "dtype": "float32", "use_cache": "False"}.items():
        assert said[name] == said[f"requested_{name}"] == value


def test_what_came_out_otherwise_than_requested_is_named():
    effective = {"attention": "eager", "requested_attention": "sdpa", "dtype": "bfloat16", "device": "cpu"}
    assert run_page.not_as_requested(effective) == "attention eager, sdpa was requested"
    assert run_page.not_as_requested(effective | {"attention": "sdpa"}) == ""


SAYS_HOW = "training_config = {'seed': 7}\nmodel.generate(do_sample=%s, temperature=0.3, top_p=0.95)\n"


def test_how_answers_are_drawn_is_one_setting(tmp_path):
    drawn = translated(tmp_path, SAYS_HOW % "True")
    asked = {"temperature": 0.3, "top_k": 50, "top_p": 0.95, "seed": 7}
    assert loaded(drawn, tmp_path).evaluate.sampling.model_dump() == asked
    assert {row(drawn, f"generate.{key}").verdict for key in ("do_sample", "temperature", "top_p")} == {
        "kept"
    }

    greedy = translated(tmp_path, SAYS_HOW % "False")
    assert loaded(greedy, tmp_path).evaluate.sampling is None
    assert "not used without do_sample" in row(greedy, "generate.temperature").why


# Defects


DEFECTS = {
    "trust_remote_code": "runs whatever code",
    "tokenizer.trust_remote_code": "runs whatever code",
    "from_pretrained.trust_remote_code": "runs whatever code",
    "eos_as_text": "appended as text",
    "input_without_input": "where there is no input too",
    "unseeded_split": "evaluated on rows it was trained on",
    "load_metric": "fetches code from a hub",
    "push_to_hub": "nothing is uploaded",
}


def test_every_defect_of_the_notebook_is_refused_by_name_at_its_place_and_all_at_once():
    translation = translate(read(NOTEBOOK))
    refused = {row.name: row for row in translation.refused}
    for name, why in DEFECTS.items():
        assert why in refused[name].why and refused[name].do and "cell" in refused[name].place
    assert row(translation, "unseeded_split").place == "cell 10, line 1"


def test_names_of_llama_that_would_adapt_two_of_four_projections_become_all_four(tmp_path):
    found = row(translate(read(NOTEBOOK)), "target_modules")
    assert found.verdict == "changed" and "adapt the rest only" in found.why
    assert found.became == "train.lora.targets: [qkv_proj, o_proj, gate_up_proj, down_proj]"


def test_names_that_have_gone_from_the_libraries_are_taken_and_said():
    translation = translate(read(NOTEBOOK))
    for name in ("evaluation_strategy", "warmup_ratio", "max_seq_length", "torch_dtype", "load_metric"):
        assert GONE[name] in row(translation, name).why


def test_what_would_be_decided_where_it_runs_is_decided_in_the_file(tmp_path):
    translation = translate(read(NOTEBOOK))
    for name in ("bf16", "fp16", "torch_dtype", "attn_implementation"):
        found = row(translation, name)
        assert found.verdict == "changed" and "decided where it runs" in found.why
    run = loaded(translation, tmp_path)
    assert (run.train.precision, run.train.attention) == ("bfloat16", "flash_attention_2")


def test_a_seeded_split_keeps_its_share_and_salts_the_hash(tmp_path):
    run = loaded(translate(read(NOTEBOOK)), tmp_path)
    assert (run.prepare.held_out_fraction, run.prepare.split_salt) == (0.05, "1234")


@pytest.mark.parametrize(
    "text",
    [
        "SFTTrainer(model, train_dataset=rows, eval_dataset=rows)",
        "split = rows['train']\nSFTTrainer(model, train_dataset=split, eval_dataset=split, max_seq_length=512)",
    ],
)
def test_evaluating_on_the_training_rows_is_refused(tmp_path, text):
    assert row(translated(tmp_path, text), "eval_on_training_rows").verdict == "refused"


@pytest.mark.parametrize(
    "text",
    ["t = f'{text}{tokenizer.eos_token_id}'", "t = text + str(tokenizer.eos_token_id)", "t = text + '32000'"],
)
def test_an_end_token_as_text_is_refused_however_it_is_appended(tmp_path, text):
    translation = translated(tmp_path, f"peft_config = {{'r': 8}}\n{text}\n")
    assert [(row.key, row.place) for row in translation.refused] == [("eos_as_text", "line 2")]


def test_a_cell_that_is_no_python_is_told(tmp_path):
    notebook = json.loads(NOTEBOOK.read_text())
    notebook["cells"].insert(3, {**notebook["cells"][3], "source": ["Bitsandbytes NF4"]})
    translation = translated(tmp_path, json.dumps(notebook), "theirs.ipynb")
    assert row(translation, "unreadable_cell").place == "cell 4"


# One name at a time


@pytest.mark.parametrize(
    ("text", "name", "verdict", "became"),
    [
        ("training_config = {'optim': 'adamw_hf'}", "optim", "changed", "train.optimizer: adamw_torch"),
        ("training_config = {'optim': 'lion_32bit'}", "optim", "refused", ""),
        ("training_config = {'learning_rate': '5e-6'}", "learning_rate", "refused", ""),
        ("training_config = {'learning_rate': args.lr}", "learning_rate", "refused", ""),
        ("training_config = {'lr_scheduler_type': 'polynomial'}", "lr_scheduler_type", "refused", ""),
        ("training_config = {'warmup_steps': 0}", "warmup_steps", "kept", ""),
        ("training_config = {'warmup_steps': 5}", "warmup_steps", "refused", ""),
        (
            "training_config = {'warmup_steps': 5, 'max_steps': 50}",
            "warmup_steps",
            "changed",
            "train.warmup_fraction: 0.1",
        ),
        ("training_config = {'use_liger_kernel': True}", "use_liger_kernel", "kept", "train.kernels: liger"),
        ("training_config = {'use_liger_kernel': False}", "use_liger_kernel", "kept", "train.kernels: torch"),
        ("training_config = {'fp16': True}", "fp16", "refused", ""),
        ("training_config = {'fp16': False}", "fp16", "kept", ""),
        ("training_config = {'gradient_checkpointing_kwargs': {'use_reentrant': True}}",
         "gradient_checkpointing_kwargs", "changed", ""),
        ("training_config = {'save_strategy': 'epoch'}", "save_strategy", "changed", ""),
        ("training_config = {'load_best_model_at_end': False}", "load_best_model_at_end", "kept", ""),
        ("training_config = {'push_to_hub': True}", "push_to_hub", "refused", ""),
        ("training_config = {'packing_strategy': 'wrapped'}", "packing_strategy", "changed", ""),
        ("training_config = {'assistant_only_loss': False}", "assistant_only_loss", "changed", ""),
        ("training_config = {'lerning_rate': 1e-4}", "lerning_rate", "refused", ""),
        ("peft_config = {'target_modules': ['q_proj', 'v_proj']}", "target_modules", "changed",
         "train.lora.targets: [q_proj, v_proj]"),
        ("peft_config = {'target_modules': ['gate_proj', 'up_proj', 'v_proj']}", "target_modules", "changed",
         "train.lora.targets: [gate_up_proj, v_proj]"),
        ("peft_config = {'target_modules': ['qkv_proj']}", "target_modules", "kept", "train.lora.targets: [qkv_proj]"),
        ("peft_config = {'target_modules': ['c_attn']}", "target_modules", "refused", ""),
        ("peft_config = {'target_modules': None}", "target_modules", "refused", ""),
        ("peft_config = {'task_type': 'SEQ_CLS'}", "task_type", "refused", ""),
        ("peft_config = {'use_dora': True}", "use_dora", "kept", "train.lora.dora: true"),
        ("model_kwargs = {'trust_remote_code': False}", "trust_remote_code", "kept", ""),
        ("model_kwargs = {'use_cache': True}", "use_cache", "changed", ""),
        ("model_kwargs = {'attn_implementation': 'eager'}", "attn_implementation", "kept", "train.attention: eager"),
        ("model_kwargs = {'attn_implementation': 'magic'}", "attn_implementation", "refused", ""),
        ("model_kwargs = {'torch_dtype': torch.float32}", "torch_dtype", "kept", "train.precision: float32"),
        ("model_kwargs = {'torch_dtype': torch.float16}", "torch_dtype", "refused", ""),
        ("import loralib as lora\nlayer = lora.Linear(64, 64, r=16)", "loralib.r", "kept", "train.lora.rank: 16"),
    ],
)  # fmt: skip
def test_a_name_and_its_value_have_one_verdict(tmp_path, text, name, verdict, became):
    translation = translated(tmp_path, text)
    found = row(translation, name)
    assert (found.verdict, found.became) == (verdict, became)
    assert bool(found.do) == (verdict == "refused")
    assert verdict == "kept" or found.why
    loaded(translation, tmp_path)


def test_code_that_is_handed_over_is_refused_as_code(tmp_path):
    found = row(translated(tmp_path, "SFTTrainer(model, formatting_func=lay_out, seed=1)"), "formatting_func")
    assert found.verdict == "refused" and "prompt format of one's own" in found.why


def test_a_line_of_json_is_that_of_the_key_in_its_group(tmp_path):
    text = '{\n"peft_config": {\n"r": 8,\n"revision": null},\n"model_kwargs": {\n"revision": "revision"}}'
    places = [(r.group, r.key, r.place) for r in translated(tmp_path, text, "a.json").rows]
    assert places == [
        ("peft", "r", "line 3"),
        ("peft", "revision", "line 4"),
        ("model", "revision", "line 6"),
    ]


def test_max_steps_decide_over_epochs_as_theirs_do(tmp_path):
    translation = translated(tmp_path, "training_config = {'num_train_epochs': 3, 'max_steps': 7}")
    assert row(translation, "num_train_epochs").why == "max_steps decides, there too"
    run = loaded(translation, tmp_path)
    assert (run.train.max_steps, run.train.epochs) == (7, None)


def test_a_schedule_without_warm_up_has_none_here_either(tmp_path):
    text = "training_config = {'lr_scheduler_type': 'constant', 'warmup_ratio': 0.2}"
    assert loaded(translated(tmp_path, text), tmp_path).train.warmup_fraction == 0.0


def test_where_theirs_is_silent_its_libraries_defaults_hold(tmp_path):
    plain = loaded(translated(tmp_path, "TrainingArguments(output_dir='x')"), tmp_path)
    assert (plain.train.learning_rate, plain.train.batch_size, plain.train.epochs) == (5e-5, 8, 3)
    trl = loaded(translated(tmp_path, "SFTConfig(output_dir='x')"), tmp_path)
    assert (trl.train.learning_rate, trl.train.precision) == (2e-5, "bfloat16")


def test_a_setting_that_is_asked_for_twice_and_differently_is_refused(tmp_path):
    text = "TrainingArguments(seed=1, learning_rate=1e-4)\nTrainingArguments(seed=1, learning_rate=2e-4)"
    translation = translated(tmp_path, text)
    (refused,) = translation.refused
    assert (refused.key, refused.place) == ("learning_rate", "line 2")
    assert "line 1 asks for 0.0001" in refused.why
    assert row(translation, "seed").place == "line 1; line 2"


# Reading


@pytest.mark.parametrize(
    "text",
    [
        "training_config = {'seed': 3}",
        "seed = 3\ntraining_config = dict(seed=seed)",
        "training_config = {'seed': 1}\ntraining_config['seed'] = 3",
        "training_config = {}\ntraining_config.update({'seed': 3})",
        "training_config = {}\ntraining_config.update(seed=3)",
        "training_config = {'seed': 1}\ntraining_config |= {'seed': 3}",
        "common = {'seed': 1}\ncommon.update({'seed': 2}, seed=3)\nTrainingArguments(**common)",
        "training_config = {'seed': 3}\nif fast:\n    training_config['seed'] = 3",
        "common = {'seed': 3}\nTrainingArguments(**common)",
        "common = {'seed': 3}\ntraining_config = {**common}\nTrainingArguments(**training_config)",
        "class Run:\n    def __init__(self):\n        self.training_config = {'seed': 3}",
        "def main():\n    seed = 1 + 2\n    return SFTConfig(seed=seed)\nif __name__ == '__main__':\n    main()",
        "args = TrainingArguments(output_dir='x')\nargs.seed = 3",
        "if fast:\n    seed = 3\nelse:\n    seed = 3\nTrainingArguments(seed=seed)",
    ],
)
def test_a_value_is_found_however_python_spells_it(tmp_path, text):
    assert loaded(translated(tmp_path, text), tmp_path).train.seed == 3


@pytest.mark.parametrize(
    "text",
    [
        "def main(seed):\n    return SFTConfig(seed=seed)",
        "for seed in seeds:\n    TrainingArguments(seed=seed)",
        "seed = 1\nseed += 1\nTrainingArguments(seed=seed)",
        "TrainingArguments(seed=int(os.environ['SEED']))",
    ],
)
def test_what_only_running_it_would_tell_is_refused_not_guessed(tmp_path, text):
    assert row(translated(tmp_path, text), "seed").why.startswith("only running the file would tell")


@pytest.mark.parametrize(
    "text",
    [
        "training_config = {'seed': 1}\ntraining_config |= load()",
        "training_config = {'seed': 1}\ntraining_config['seed'] += 1",
        "training_config = {'seed': 1}\ndef f(training_config):\n    training_config.update({'seed': 3})",
        "training_config = {'seed': 1}\ndef f(training_config):\n    training_config['seed'] = 3",
        "def f():\n    training_config = {'seed': 1}\ndef g():\n    training_config.update(seed=3)",
        "training_config = {'seed': 1}\ntraining_config.pop('seed')",
    ],
)
def test_a_change_of_settings_that_cannot_be_followed_is_refused(tmp_path, text):
    (refused,) = translated(tmp_path, text).refused
    assert (refused.key, refused.place) == ("settings_changed", f"line {len(text.splitlines())}")


@pytest.mark.parametrize(
    "text",
    [
        "rate = 5e-6\nif fast:\n    rate = 9e-3\ntraining_config = {'learning_rate': rate}",
        "training_config = {'learning_rate': 5e-6}\nif fast:\n    training_config['learning_rate'] = 9e-3",
        "training_config = {'learning_rate': 5e-6}\nif fast:\n    training_config.update(learning_rate=9e-3)",
        "training_config = {'learning_rate': 5e-6}\nif fast:\n    training_config = {'learning_rate': 9e-3}",
        "if fast:\n    training_config = {'learning_rate': 9e-3}\nelse:\n    training_config = {'learning_rate': 5e-6}",
        "training_config = {'learning_rate': 5e-6}\ndef main():\n    if fast:\n"
        "        training_config['learning_rate'] = 9e-3\n    SFTConfig(**training_config)",
        "training_config = {}\nif fast:\n    training_config['learning_rate'] = 9e-3",
    ],
)
def test_what_a_branch_changes_is_decided_in_the_file(tmp_path, text):
    found = row(translated(tmp_path, text), "learning_rate")
    assert (found.verdict, found.became) == ("changed", "train.learning_rate: 0.009")
    assert "decided where it runs" in found.why


def test_a_branch_does_not_see_what_the_other_one_changes(tmp_path):
    text = (
        "training_config = {'seed': 3}\nif fast:\n    training_config['seed'] = 4\nelse:\n"
        "    SFTConfig(**training_config)\n"
    )
    found = row(translated(tmp_path, text), "seed")
    assert (found.verdict, found.became) == ("kept", "train.seed: 3")


def test_spreading_what_is_not_known_is_refused(tmp_path):
    (refused,) = translated(tmp_path, "TrainingArguments(**load_settings())").refused
    assert refused.key == "**load_settings()"


def test_a_script_is_never_run(tmp_path):
    text = (
        f"import nowhere_to_be_found\nopen({str(tmp_path / 'mark')!r}, 'w').write('ran')\n"
        "training_config = {'seed': 3}\nraise SystemExit(1)\n"
    )
    assert row(translated(tmp_path, text), "seed").became == "train.seed: 3"
    assert not (tmp_path / "mark").exists()


def test_json_yaml_and_python_say_the_same(tmp_path):
    held = json.loads(DICTS.read_text())
    python = "".join(f"{name} = {value!r}\n" for name, value in held.items())
    yaml = "".join(
        f"{name}:\n" + "".join(f"  {key}: {json.dumps(item)}\n" for key, item in value.items())
        for name, value in held.items()
    )
    flat = json.dumps({key: item for value in held.values() for key, item in value.items()}, indent="\t")
    files = {"a.py": python, "a.yaml": yaml, "a.json": DICTS.read_text()}
    first, *others = (loaded(translated(tmp_path, text, name), tmp_path) for name, text in files.items())
    assert first == others[0] == others[1] == loaded(translated(tmp_path, flat, "a.json"), tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.py", "training_config = {", "a.py, line 1: not Python"),
        ("a.py", "print(1)", "sets nothing that a training run is made of"),
        ("a.py", "x = " + "(" * 300 + ")" * 300, "not Python"),
        ("a.py", "x = " + "-" * 5000 + "1", "too deep"),
        ("a.ipynb", "{}", "is no notebook"),
        ("a.json", "[1]", "holds list"),
        ("a.json", '{"seed": 1, "seed": 2}', "says seed twice"),
        ("a.json", '{"seed": NaN}', "NaN is no number"),
        ("a.yaml", "seed: 1\nseed: 2", "is not YAML"),
        ("a.yaml", "- 1", "holds CommentedSeq"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.toml", "a = 1", "is no .toml that is read here"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_a_line(tmp_path, name, text, said):
    with pytest.raises(Refused, match=said):
        translated(tmp_path, text, name)


def test_a_base_without_a_known_commit_is_refused_until_one_is_given(tmp_path):
    (tmp_path / "a.yaml").write_text("model_name_or_path: somebody/phi\nlearning_rate: 1e-4\n")
    (refused,) = translate(read(tmp_path / "a.yaml")).refused
    assert refused.key == "model_name_or_path" and "--commit HASH" in refused.do
    run = loaded(translate(read(tmp_path / "a.yaml"), commit="a" * 40), tmp_path)
    assert (run.base.repo, run.base.commit) == ("somebody/phi", "a" * 40)


@pytest.mark.parametrize("place", ["./phi", "/models/phi", "Model_Name", ""])
def test_a_folder_is_no_repository(tmp_path, place):
    text = f"AutoModelForCausalLM.from_pretrained({place!r})"
    assert "source: local" in row(translated(tmp_path, text), "pretrained_model_name_or_path").do


def test_a_credential_is_not_shown(tmp_path):
    translation = translated(tmp_path, "TrainingArguments(hub_token='hf_secret')\nlogin(token='hf_secret')")
    assert "hf_secret" not in json.dumps(translation.as_json())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(sorted({name for entry in TABLE for name in entry.names})),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=5,
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_the_values_every_name_has_a_row_and_what_is_left_describes_a_run(tmp_path_factory, held):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.json").write_text(json.dumps(held))
    source = read(folder / "a.json")
    try:
        translation = translate(source)
    except Refused as refused:
        assert "do not fit together" in str(refused)
        return
    assert [row.key for row in translation.rows] == [setting.key for setting in source.settings]
    loaded(translation, folder)


# The command


def test_what_is_refused_stops_the_command_with_2_and_writes_nothing(tmp_path):
    asked = ("params", "from-tutorial", str(SCRIPT), "--to", "p.yaml", "--json")
    done = retuner(tmp_path, tmp_path / "home", *asked)
    assert done.returncode == 2 and not (tmp_path / "p.yaml").exists()
    told = json.loads(done.stdout)
    assert [row["key"] for row in told["rows"] if row["verdict"] == "refused"] == ["trust_remote_code"]
    plain = retuner(tmp_path, tmp_path / "home", *asked[:-1])
    assert plain.returncode == 2 and not (tmp_path / "p.yaml").exists()
    assert "--leave-out" in plain.stderr and "trust_remote_code" in plain.stderr


def test_a_params_file_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "p.yaml").write_text("mine\n")
    done = retuner(tmp_path, tmp_path / "home", "params", "from-tutorial", str(DICTS), "--to", "p.yaml")
    assert done.returncode == 2 and (tmp_path / "p.yaml").read_text() == "mine\n"


# Today's libraries


def test_every_name_that_todays_libraries_take_has_an_answer_and_their_defaults_are_never_refused(tmp_path):
    from peft import LoraConfig
    from trl import SFTConfig

    for made, group in (
        (SFTConfig(output_dir="x", bf16=False), "training_config"),
        (LoraConfig(r=4), "peft_config"),
    ):
        names = {field.name for field in fields(made)}
        known = {name for entry in TABLE for name in entry.names if group.split("_")[0] in entry.groups}
        assert not names - known
        plain = {
            field.name: field.default
            for field in fields(made)
            if isinstance(field.default, bool | int | float | str | None)
            # Theirs fails without one.
            and field.name != "target_modules"
        }
        assert not translated(tmp_path, json.dumps({group: plain}), "a.json").refused


def test_the_names_that_are_said_to_be_gone_are_gone():
    import inspect

    import datasets
    from trl import SFTConfig, SFTTrainer

    taken = {field.name for field in fields(SFTConfig)} | set(
        inspect.signature(SFTTrainer.__init__).parameters
    )
    assert not (set(GONE) & taken)
    assert not hasattr(datasets, "load_metric")


def test_the_page_names_tests_that_are_there():
    named = set(re.findall(r"(test_\w+\.py)::(test_\w+)", (ROOT / "docs" / "tutorial.md").read_text()))
    files = {name: (HERE / name).read_text() for name, _ in named}
    missing = {(name, test) for name, test in named if f"def {test}(" not in files[name]}
    assert len(named) > 30 and not missing
