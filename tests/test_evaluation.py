"""Evaluation and generation on a real tiny Phi-3 with real PEFT adapters."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest

from retuner.artifacts import Adapter, AdapterFacts, Base, Chats, ChatsFacts
from retuner.base import fetch_base
from retuner.errors import Refused
from retuner.generation import Answerer, adapter_on, batches, generate, load
from retuner.observe import Silent
from retuner.params import EvaluateParams, Sampling, TinyBase

MESSAGES = [
    [{"role": "user", "content": text}]
    for text in ("hi", "What is the colour of the sky?", "one two three", "a" * 70, "the ring is on", "x y")
]
REFERENCES = [["hello"], ["blue", "light blue"], ["four"], ["b"], ["the cat"], ["z"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    facts = fetch_base(folder, TinyBase(source="tiny", seed=1), Silent())
    return Base(stage="fetch_base", fingerprint="f", digest="d", path=folder, facts=facts)


@pytest.fixture(scope="module")
def loaded(base):
    return load(base.path, "float32", "sdpa", "cpu")


@pytest.fixture(scope="module")
def chats(base, loaded, tmp_path_factory) -> Chats:
    """What `template` writes: held-out rows and prompts of the conversations above."""
    from retuner.rendering import Renderer

    folder = tmp_path_factory.mktemp("chats")
    renderer = Renderer(loaded[1])
    rows = {"id": [], "group": [], "input_ids": [], "labels": []}
    with (folder / "prompts.jsonl").open("w") as file:
        for at, (messages, references) in enumerate(zip(MESSAGES, REFERENCES, strict=True)):
            prompt_ids = renderer.encode_prompt(messages)
            line = {
                "group": f"g{at}",
                "prompt_ids": prompt_ids,
                "messages": messages,
                "references": references,
            }
            print(json.dumps(line), file=file)
            for reference in references:
                chat = [*messages, {"role": "assistant", "content": reference}]
                ids, labels = renderer.encode_chat(chat)
                for name, value in zip(rows, (f"{at}-{reference}", f"g{at}", ids, labels), strict=True):
                    rows[name].append(value)
    table = pyarrow.table(rows)
    with pyarrow.ipc.new_stream(str(folder / "held_out.arrow"), table.schema) as writer:
        writer.write_table(table)
    facts = ChatsFacts(
        train_rows=0,
        held_out_rows=table.num_rows,
        held_out_prompts=len(MESSAGES),
        train_tokens=0,
        supervised_tokens=0,
        longest_row_tokens=0,
        left_out={},
        packs=None,
    )
    return Chats(stage="template", fingerprint="f", digest="d", path=folder, facts=facts)


def make_adapter(base: Base, folder: Path, seed: int, scale: float = 0.3, **options) -> Path:
    """A LoRA with random weights, saved by PEFT itself."""
    import torch
    from peft import LoraConfig, get_peft_model

    model, _ = load(base.path, "float32", "sdpa", "cpu")
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5, "target_modules": "all-linear"} | options
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(0, scale)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def candidate(base, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("candidate"), seed=1)


def artifact(folder: Path) -> Adapter:
    facts = AdapterFacts(
        sha256="0",
        trained_steps=1,
        final_loss=1.0,
        trainable_parameters=1,
        total_parameters=1,
        adapted_modules={},
        trainable_by_module={},
        packing_fill=1.0,
        effective={},
    )
    return Adapter(stage="train", fingerprint="f", digest="d", path=folder, facts=facts)


def params(**changes) -> EvaluateParams:
    settings = {
        "max_prompts": None,
        "max_new_tokens": 8,
        "batch_size": 3,
        "sampling": None,
        "metrics": ("exact_match", "bleu"),
    }
    return EvaluateParams(**settings | changes)


def run(out: Path, base, chats, adapter: Path, incumbent: Path | None = None, observer=None, **changes):
    from retuner.evaluation import evaluate

    out.mkdir()
    return evaluate(
        out,
        artifact(adapter),
        chats,
        base,
        incumbent,
        params(**changes),
        "float32",
        "sdpa",
        "cpu",
        observer or Silent(),
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts_of(chats) -> list[list[int]]:
    return [line["prompt_ids"] for line in lines(chats.path / "prompts.jsonl")]


# --- generation


def greedy_by_hand(model, prompt: list[int], stop_ids, tokens: int) -> list[int]:
    """One prompt, no padding, no cache, one forward pass a token."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + tokens:
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stop_ids:
                break
            ids.append(token)
    return ids[len(prompt) :]


def test_a_batch_answers_each_prompt_as_if_it_were_alone(base, loaded, chats):
    model, _ = loaded
    prompts, stop_ids = prompts_of(chats), base.facts.stop_token_ids
    by_hand = [greedy_by_hand(model, prompt, stop_ids, 12) for prompt in prompts]
    for batch_size in (1, 2, 8):
        assert generate(model, prompts, stop_ids, 0, 12, batch_size) == by_hand
    assert generate(model, prompts[::-1], stop_ids, 5, 12, 4) == by_hand[::-1]
    assert len({tuple(answer) for answer in by_hand}) > 1


def test_an_answer_ends_before_the_first_of_several_stop_tokens(loaded, chats):
    model, _ = loaded
    prompts = prompts_of(chats)
    endless = generate(model, prompts, [447], 0, 12, 8)
    stops = {endless[0][3], endless[1][5]}
    for whole, cut in zip(endless, generate(model, prompts, stops, 0, 12, 8), strict=True):
        end = next((at for at, token in enumerate(whole) if token in stops), len(whole))
        assert cut == whole[:end]


def test_the_model_s_own_sampling_settings_do_not_reach_the_answers(loaded, chats, recwarn, caplog):
    model, _ = loaded
    prompts = prompts_of(chats)
    plain = generate(model, prompts, [447], 0, 12, 8)
    own = model.generation_config
    own.update(do_sample=True, temperature=0.1, top_p=0.5, repetition_penalty=5.0, min_new_tokens=3)
    assert generate(model, prompts, [447], 0, 12, 8) == plain
    assert model.generation_config is own
    assert not [str(w.message) for w in recwarn if "temperature" in str(w.message)]
    assert "generation flags" not in caplog.text
    own.update(do_sample=False, temperature=1.0, top_p=1.0, repetition_penalty=1.0, min_new_tokens=None)


def test_an_answer_ends_where_the_context_is_full_and_a_longer_prompt_is_refused(loaded, monkeypatch):
    model, _ = loaded
    monkeypatch.setattr(model.config, "max_position_embeddings", 20)
    short, long = generate(model, [[1, 300, 301], [7] * 16], [447], 0, 12, 8)
    assert (len(short), len(long)) == (12, 4)
    assert generate(model, [[7] * 20], [447], 0, 12, 8) == [[]]
    for prompt in ([], [7] * 21):
        with pytest.raises(Refused, match=f"{len(prompt)} tokens"):
            generate(model, [prompt], [447], 0, 12, 8)


def test_batches_hold_rows_of_similar_length_and_no_more_than_they_may():
    lengths = [5, 100, 6, 90, 7, 400]
    assert batches(lengths, 2) == [[0, 2], [4, 3], [1, 5]]
    assert batches(lengths, 8, max_tokens=210) == [[0, 2, 4], [3, 1], [5]]
    assert batches(lengths, 8, alone_above=50) == [[0, 2, 4], [3], [1], [5]]
    assert batches([], 8) == []


def test_rows_past_longrope_s_switch_do_not_sway_their_neighbours():
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [9.0] * 8,
        },
        initializer_range=1.0,
        pad_token_id=0,
    )
    model = Phi3ForCausalLM(config).eval()
    prompts = [list(range(1, 6)), list(range(1, 13)), list(range(1, 30)), list(range(3, 23))]
    alone = [generate(model, [prompt], [63], 0, 8, 1)[0] for prompt in prompts]
    assert generate(model, prompts, [63], 0, 8, 8) == alone


# --- adapters


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor([[1, 300, 301, 302]])).logits


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True}, {"target_modules": ["qkv_proj"]}], ids=str
)
def test_an_adapter_computes_what_peft_computes_with_it_and_leaves_the_base_untouched(
    base, loaded, tmp_path, options
):
    import torch
    from peft import PeftModel

    model, _ = loaded
    folder = make_adapter(base, tmp_path / "adapter", seed=2, **options)
    reference = PeftModel.from_pretrained(load(base.path, "float32", "sdpa", "cpu")[0], folder).eval()
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    for _ in range(2):
        with adapter_on(model, folder):
            assert torch.equal(logits(model), logits(reference))
        assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert not torch.equal(before, logits(reference))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_replaces_biases_gives_them_back(tmp_path, bias):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def model_with_biases():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 310}
        return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()

    adapted = get_peft_model(model_with_biases(), LoraConfig(task_type="CAUSAL_LM", r=2, bias=bias))
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.normal_()
    adapted.save_pretrained(tmp_path)
    model = model_with_biases()
    before = logits(model)
    with adapter_on(model, tmp_path):
        assert torch.equal(logits(model), logits(adapted.eval()))
    assert torch.equal(logits(model), before)


def change(folder: Path, name: str, edit) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors, next(key for key in sorted(tensors) if name in key))
    save_file(tensors, folder / "adapter_model.safetensors")


def poisoned(tensors, key):
    tensors[key][0, 0] = math.nan


def renamed(tensors, key):
    tensors["base_model.model.nowhere.lora_A.weight"] = tensors.pop(key)


def halved(tensors, key):
    tensors[key] = tensors[key][:2].clone()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors, key: tensors.pop(key), "is missing"),
        (poisoned, "is not finite"),
        (renamed, "is missing"),
        (lambda tensors, key: tensors.update(more=tensors[key].clone()), "has no place in the model"),
        (halved, r"is \(2, 128\) where the model has \(4, 128\)"),
    ],
)
def test_an_adapter_that_is_not_exactly_what_its_configuration_says_is_refused(
    base, loaded, tmp_path, edit, said
):
    import torch

    model, _ = loaded
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    folder = make_adapter(base, tmp_path / "adapter", seed=3)
    change(folder, "lora_A", edit)
    with pytest.raises(Refused, match=said), adapter_on(model, folder):
        pass
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_parameters()] == names


def test_an_adapter_without_whole_safetensors_is_refused(base, loaded, tmp_path):
    model, _ = loaded
    folder = make_adapter(base, tmp_path / "adapter", seed=3)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Refused, match="cannot be read"), adapter_on(model, folder):
        pass
    # A pickle in its place is not taken instead.
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(Refused, match=r"no adapter_model\.safetensors"), adapter_on(model, folder):
        pass


# --- evaluation


def test_every_model_is_scored_on_the_same_rows(base, chats, candidate, tmp_path):
    production = make_adapter(base, tmp_path / "production", seed=9)
    facts = run(tmp_path / "out", base, chats, candidate, production)
    models = {"base", "production", "candidate"}
    assert facts.scores.keys() == models
    assert (facts.prompts, facts.rows) == (6, 7)
    assert all(
        score.keys() == {"loss", "perplexity", "exact_match", "bleu"} for score in facts.scores.values()
    )
    assert len({score["loss"] for score in facts.scores.values()}) == 3
    assert json.loads((tmp_path / "out" / "report.json").read_text())["scores"] == facts.scores
    for line, messages, references in zip(
        lines(tmp_path / "out" / "answers.jsonl"), MESSAGES, REFERENCES, strict=True
    ):
        assert line["prompt"] == messages
        assert line["references"] == references
        assert line["answers"].keys() == line["scores"].keys() == models
    for line in lines(tmp_path / "out" / "losses.jsonl"):
        assert line.keys() == {"id", "group", "tokens", "loss"}
        assert line["loss"].keys() == models


def test_without_production_there_are_two_models(base, chats, candidate, tmp_path):
    assert run(tmp_path / "out", base, chats, candidate).scores.keys() == {"base", "candidate"}


def test_the_loss_is_the_models_own_over_supervised_tokens(base, chats, candidate, tmp_path):
    import torch
    from peft import PeftModel

    facts = run(tmp_path / "out", base, chats, candidate)
    table = pyarrow.ipc.open_stream(chats.path / "held_out.arrow").read_all().to_pylist()
    plain, _ = load(base.path, "float32", "sdpa", "cpu")
    for name in ("base", "candidate"):
        model = plain if name == "base" else PeftModel.from_pretrained(plain, candidate).eval()
        total = 0.0
        for line, row in zip(lines(tmp_path / "out" / "losses.jsonl"), table, strict=True):
            with torch.no_grad():
                ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
                expected = float(model(input_ids=ids, labels=labels).loss)
            assert line["id"] == row["id"]
            assert line["tokens"] == sum(label != -100 for label in row["labels"])
            assert line["loss"][name] == pytest.approx(expected, rel=1e-5)
            total += expected * line["tokens"]
        tokens = sum(line["tokens"] for line in lines(tmp_path / "out" / "losses.jsonl"))
        assert facts.scores[name]["loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert facts.scores[name]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_a_row_s_loss_does_not_depend_on_its_batch(base, chats, candidate, tmp_path):
    for size in (1, 7):
        run(tmp_path / str(size), base, chats, candidate, batch_size=size)
    alone, together = (lines(tmp_path / str(size) / "losses.jsonl") for size in (1, 7))
    for one, other in zip(alone, together, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_an_untrained_adapter_is_the_base_to_the_last_digit(base, chats, tmp_path):
    facts = run(tmp_path / "out", base, chats, make_adapter(base, tmp_path / "zero", seed=4, scale=0.0))
    assert facts.scores["candidate"] == facts.scores["base"]
    for line in lines(tmp_path / "out" / "answers.jsonl"):
        assert line["answers"]["candidate"] == line["answers"]["base"]


def test_equal_inputs_give_equal_bytes(base, chats, candidate, tmp_path):
    for name in ("one", "two"):
        run(tmp_path / name, base, chats, candidate)
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {"report.json", "answers.jsonl", "losses.jsonl"}
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_max_prompts_takes_the_first_prompts_and_leaves_the_loss_alone(base, chats, candidate, tmp_path):
    whole = run(tmp_path / "all", base, chats, candidate)
    facts = run(tmp_path / "two", base, chats, candidate, max_prompts=2)
    assert (facts.prompts, facts.rows) == (2, 7)
    assert [line["group"] for line in lines(tmp_path / "two" / "answers.jsonl")] == ["g0", "g1"]
    assert facts.scores["base"]["loss"] == whole.scores["base"]["loss"]


def test_progress_counts_every_row_and_prompt_of_every_model(base, chats, candidate, tmp_path):
    seen = []

    class Listener(Silent):
        def progress(self, what, done, total, note=""):
            seen.append((what, done, total, note))

    run(tmp_path / "out", base, chats, candidate, observer=Listener())
    assert {what for what, *_ in seen} == {"evaluate"}
    done = [done for _, done, *_ in seen]
    assert done == sorted(done)
    assert {total for _, _, total, _ in seen} == {done[-1]} == {2 * (6 + 7)}
    assert seen[-1][3] == "candidate: answers"


def test_a_candidate_with_a_nan_is_refused_and_nothing_is_written(base, chats, tmp_path):
    folder = make_adapter(base, tmp_path / "adapter", seed=5)
    change(folder, "lora_B", poisoned)
    with pytest.raises(Refused, match="not finite"):
        run(tmp_path / "out", base, chats, folder)
    assert not list((tmp_path / "out").iterdir())


def test_finite_weights_that_overflow_are_refused_too(base, chats, tmp_path):
    folder = make_adapter(base, tmp_path / "adapter", seed=5, scale=1e30)
    with pytest.raises(Refused, match="loss of candidate"):
        run(tmp_path / "out", base, chats, folder)


def test_references_that_a_metric_cannot_use_are_refused_before_the_model_loads(
    chats, candidate, tmp_path, base
):
    nowhere = base.model_copy(update={"path": tmp_path / "no-such-base"})
    with pytest.raises(Refused, match="json_fields"):
        run(tmp_path / "out", nowhere, chats, candidate, metrics=("json_fields",))


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_k=50, top_p=0.95, seed=3)])
def test_what_is_served_is_what_was_evaluated(base, chats, candidate, tmp_path, sampling):
    run(tmp_path / "out", base, chats, candidate, sampling=sampling)
    answerer = Answerer(base.path, candidate, "float32", "sdpa", "cpu")
    for line in lines(tmp_path / "out" / "answers.jsonl"):
        assert answerer.answer(line["prompt"], 8, sampling) == line["answers"]["candidate"]


def test_evaluation_touches_neither_the_network_nor_the_home_folder(base, chats, candidate, tmp_path):
    code = """
import pathlib, socket, sys
def refuse(*a, **k): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
import test_evaluation as t
from retuner.artifacts import Base, Chats
from retuner.metrics import score
base, chats = (kind.model_validate_json(text) for kind, text in zip((Base, Chats), sys.argv[3:5]))
t.run(pathlib.Path(sys.argv[1]), base, chats, pathlib.Path(sys.argv[2]), metrics=("rouge_l", "bleu"))
for metric in ("exact_match", "json_fields", "final_number"):
    score(metric, ["a 1"], [["a 1", "b"]])
"""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    here = Path(__file__).parent
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    env |= {"HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": f"{here}:{here.parent}"}
    given = [str(tmp_path / "out"), str(candidate), base.model_dump_json(), chats.model_dump_json()]
    done = subprocess.run([sys.executable, "-c", code, *given], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path for folder in (home, scratch) for path in folder.rglob("*")] == []
