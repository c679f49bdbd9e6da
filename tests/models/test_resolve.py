from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.config import ModelSection
from headrace.errors import ModelError
from headrace.models import catalog, superseded
from headrace.models.byte_tokenizer import CHATML
from headrace.models.resolve import local_models, pull, resolve
from headrace.models.template import load_template
from headrace.models.tokenizer import load_tokenizer
from headrace.types import Message, ModelFiles
from models.hub_server import COMMIT, Hub, serving
from models.tiny_llama import write_tiny_llama
from models.words import described

CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048, "eos_token_id": 0}
WORDS = {"chat_template": CHATML, "bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True}


def openvino_files() -> dict[str, bytes]:
    return {
        "openvino_model.xml": b"<net/>",
        "openvino_model.bin": b"weights" * 1000,
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": json.dumps(described()).encode(),
        "tokenizer_config.json": json.dumps(WORDS).encode(),
        "README.md": b"not needed",
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def section(tmp_path: Path, model: str, **more: object) -> ModelSection:
    return ModelSection(model=model, cache_dir=tmp_path / "cache", **more)  # type: ignore[arg-type]


def test_echo_and_its_options(tmp_path: Path) -> None:
    assert resolve(section(tmp_path, "echo")).context_length == 8192
    files = resolve(section(tmp_path, "echo?pace=0.01&context=100", name="parrot", context=50))
    assert (files.kind, files.options, files.context_length, files.aliases) == ("echo", {"pace": "0.01"}, 50, ("parrot",))
    for bad in ("echo?context=x", "echo?context=0", "echo?context=9&context=9", "echo?context=99999999999999999999"):
        with pytest.raises(ModelError):
            resolve(section(tmp_path, bad))


def test_remote_urls(tmp_path: Path) -> None:
    files = resolve(section(tmp_path, "http://127.0.0.1:9/v1/?timeout=3", remote_model="big"))
    assert (files.kind, files.url, files.options, files.name, files.context_length) == (
        "remote",
        "http://127.0.0.1:9/v1",
        {"timeout": "3"},
        "big",
        0,
    )
    assert resolve(section(tmp_path, "https://h/v1", name="mine")).aliases == ("mine",)
    for bad in ("http://", "http://user:pw@h/v1", "http://h:99999/v1"):
        with pytest.raises(ModelError):
            resolve(section(tmp_path, bad))


def test_an_openvino_folder_is_served_in_place(tmp_path: Path) -> None:
    folder = write(tmp_path / "my-model", openvino_files())
    files = resolve(section(tmp_path, str(folder), offline=True))
    assert (files.kind, files.name, files.folder, files.context_length) == ("openvino", "my-model", str(folder), 2048)
    tokenizer, template = load_tokenizer(files), load_template(files)
    ids = {item["content"]: item["id"] for item in described()["added_tokens"]}
    assert tokenizer.eos_ids == {0, ids["<|im_end|>"]}
    assert tokenizer.bos_ids == (ids["<|endoftext|>"],)
    assert template is not None
    assert tokenizer.decode(template.encode([Message(role="user", content="a")])).startswith("<|im_start|>user\na<|im_end|>")
    (folder / "openvino_model.bin").write_bytes(b"others!")
    assert resolve(section(tmp_path, str(folder))).fingerprint != files.fingerprint


def test_the_context_can_be_less_but_not_more(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "m", openvino_files()))
    assert resolve(section(tmp_path, folder, context=512)).context_length == 512
    with pytest.raises(ModelError, match="2048"):
        resolve(section(tmp_path, folder, context=4096))


@pytest.mark.parametrize(("missing", "words"), [("tokenizer.json", "tokenizer.json"), ("config.json", "max_position_embeddings")])
def test_an_incomplete_folder_is_refused_with_what_to_do(tmp_path: Path, missing: str, words: str) -> None:
    files = openvino_files()
    del files[missing]
    with pytest.raises(ModelError, match=words):
        resolve(section(tmp_path, str(write(tmp_path / "m", files))))


@pytest.mark.parametrize(
    "name", ["nothing-like-it", "smollm2-135m-instrukt", "./none", "/none/at/all", "none.gguf", "a/b/c", "hf:x", "", "a\0b", "x" * 5000]
)
def test_names_that_mean_nothing_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError):
        resolve(section(tmp_path, name))


def test_a_near_name_is_offered(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="smollm2-135m-instruct"):
        resolve(section(tmp_path, "smollm2-135m-instrukt"))


def test_folders_without_a_model_and_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no model")
    for name in ("empty", "text.txt"):
        with pytest.raises(ModelError):
            resolve(section(tmp_path, str(tmp_path / name)))


def test_pickles_and_remote_code_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tiny_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling.Mine"}}))
    with pytest.raises(ModelError, match="auto_map"):
        resolve(section(tmp_path, str(folder)))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        resolve(section(tmp_path, str(folder)))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights"):
        resolve(section(tmp_path, str(folder)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    with serving(Hub(openvino_files())) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.mark.parametrize("address", ["hf:OWNER/NAME", "OWNER/NAME", "hf:OWNER/NAME@v1", "ms:OWNER/NAME"])
def test_a_repository_is_pulled_once(tmp_path: Path, hub: Hub, address: str) -> None:
    files = resolve(section(tmp_path, address))
    assert files.name == "OWNER/NAME"
    assert files.context_length == 2048
    assert load_tokenizer(files).encode("hello")
    assert not any("README" in path for path, _ in hub.seen)
    asked = len(hub.seen)
    assert resolve(section(tmp_path, address, offline=True)) == files
    assert len(hub.seen) == asked
    (listed,) = local_models(tmp_path / "cache")
    assert (listed.name, listed.context_length) == ("OWNER/NAME", 2048)
    assert list((tmp_path / "cache" / "work").iterdir()) == []


def test_offline_never_asks(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ModelError, match="offline"):
        resolve(section(tmp_path, "hf:OWNER/NAME", offline=True))
    with pytest.raises(ModelError, match="offline"):
        resolve(section(tmp_path, catalog.DEFAULT, offline=True))
    assert hub.seen == []


def test_tokens_are_sent(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_x"
    with pytest.raises(ModelError, match="HF_TOKEN"):
        resolve(section(tmp_path, "hf:OWNER/NAME"))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert resolve(section(tmp_path, "hf:OWNER/NAME")).context_length == 2048


def test_unknown_repositories_and_revisions_are_refused(tmp_path: Path, hub: Hub) -> None:
    for address in ("hf:OWNER/OTHER", "hf:OWNER/NAME@v9", "ms:OWNER/OTHER"):
        with pytest.raises(ModelError, match="no such model"):
            resolve(section(tmp_path, address))


def test_an_unreachable_hub_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="mirror"):
        resolve(section(tmp_path, "hf:OWNER/NAME"))


@pytest.mark.parametrize("broken", ["config.json", "openvino_model.bin"])
def test_a_wrong_file_lands_nothing_and_the_next_try_goes_on(tmp_path: Path, hub: Hub, broken: str) -> None:
    hub.wrong = {broken}
    with pytest.raises(ModelError, match=broken):
        resolve(section(tmp_path, "hf:OWNER/NAME"))
    assert local_models(tmp_path / "cache") == []
    hub.wrong = set()
    hub.seen.clear()
    assert resolve(section(tmp_path, "hf:OWNER/NAME")).context_length == 2048
    assert sum("openvino_model.xml" in path for path, _ in hub.seen) == 0


def test_hostile_names_in_a_listing_touch_nothing(tmp_path: Path, hub: Hub) -> None:
    hub.files = {"../evil.gguf": b"GGUF", **{name: data for name, data in openvino_files().items() if "openvino" not in name}}
    with pytest.raises(ModelError):
        resolve(section(tmp_path, "hf:OWNER/NAME"))
    hub.files = {"../../evil.safetensors": b"x", "a\\b.safetensors": b"x", "config.json": b"{}"}
    with pytest.raises(ModelError):
        resolve(section(tmp_path, "hf:OWNER/NAME"))
    assert not list(tmp_path.rglob("*evil*"))


def test_repositories_that_cant_be_served_are_refused_before_downloading(tmp_path: Path, hub: Hub) -> None:
    cases = [
        ({"README.md": b""}, "neither"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "pickle"),
        ({"m-00001-of-00002.gguf": b"x"}, "several parts"),
        ({"m-IQ1_S.gguf": b"x", "m-IQ2_S.gguf": b"x"}, "several GGUF"),
        ({name: data for name, data in openvino_files().items() if name != "tokenizer.json"}, "tokenizer.json"),
    ]
    for files, words in cases:
        hub.files = files
        with pytest.raises(ModelError, match=words):
            resolve(section(tmp_path, "hf:OWNER/NAME"))
    assert not any(COMMIT in path for path, _ in hub.seen)


def test_two_processes_pull_the_same_model_once(tmp_path: Path, hub: Hub) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom headrace.config import ModelSection\nfrom headrace.models.resolve import resolve\n"
        "print(resolve(ModelSection(model='hf:OWNER/NAME', cache_dir=Path(sys.argv[1]))).folder)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum("openvino_model.bin" in path for path, _ in hub.seen) == 1


def test_the_catalog_says_all_that_models_needs() -> None:
    names = [entry.name for entry in catalog.entries()]
    assert names[0] == catalog.DEFAULT
    assert len(set(names)) == len(names)
    assert catalog.find("SmolLM2-135M-Instruct") is catalog.entries()[0]
    for entry in catalog.entries():
        assert entry.description
        assert entry.licence
        assert entry.languages
        assert entry.size > 0
        assert entry.memory > entry.size / 2
        assert entry.source.startswith(("pypi:", "hf:"))
        assert not entry.mirror or entry.mirror.startswith("ms:")
    notes = " ".join(catalog.entries()[0].notes)
    assert "demonstration" in notes
    assert "Chinese" in notes
    assert all(name in names for name in ("qwen3-0.6b", "qwen3-4b", "qwen3-8b", "phi-4-mini"))


@pytest.mark.slow
def test_the_default_model_is_found_again_offline(default_model: ModelFiles) -> None:
    assert resolve(ModelSection(offline=True)) == default_model
    assert default_model.context_length == 8192
    assert "demonstration" in default_model.notes[0]
    assert pull(catalog.DEFAULT, ModelSection(model="echo", offline=True)).folder == default_model.folder


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen-7B-Chat",
        "Qwen/Qwen-14B-Chat-Int4",
        "THUDM/chatglm3-6b",
        "hf:thudm/ChatGLM2-6B",
        "ms:ZhipuAI/chatglm3-6b",
        "chatglm3-6b",
        "./models/Qwen-7B-Chat",
    ],
)
def test_the_tutorials_models_are_answered_with_what_takes_their_place(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="trust_remote_code") as refused:
        resolve(section(tmp_path, name))
    instead = re.search(r"`headrace serve (\S+)`", refused.value.message)
    assert instead is not None
    entry = catalog.find(instead[1])
    assert entry is not None
    assert "Chinese" in entry.languages


def test_all_that_is_superseded_has_a_model_in_its_place() -> None:
    assert all(name == name.lower() and catalog.find(instead) is not None for name, instead in superseded._INSTEAD.items())
    assert all(superseded.find(name) is None for name in ("Qwen/Qwen3-8B", "glm-4-9b", "zai-org/GLM-4-9B-0414", "other/chatglm3-6b"))


def test_who_trusts_remote_code_is_asked_no_further(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ModelError) as refused:
        resolve(section(tmp_path, "THUDM/chatglm3-6b", trust_remote_code=True, offline=True))
    assert "offline" in refused.value.message
