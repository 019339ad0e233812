"""The built-in model's files: complete, small, consistent with transformers, and worth serving."""

import importlib.util
import json
import math
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "src" / "weft" / "assets" / "builtin"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "MODEL_CARD.md",
}
MIB = 1024 * 1024
HELD_OUT = "plistlib.py"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def read_json(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return loaded


@pytest.fixture(scope="module")
def llama() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("builtin_data", REPOSITORY / "tools" / "builtin_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_there_and_small() -> None:
    assert {file.name for file in FOLDER.iterdir()} == FILES
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 16 * MIB


def test_shapes_suit_the_kernels() -> None:
    config = read_json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["vocab_size"] == TOKENIZER.get_vocab_size()


def test_weights_are_finite_bf16_and_all_used(llama: Any) -> None:
    expected = {name: p.shape for name, p in llama.named_parameters()}
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in tensors.values())


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200).filter(lambda text: "<|" not in text))
def test_tokenizer_round_trips_any_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["\n", " ", "    ", "\t", "\r\n", "def", "x_1", "__init__", "é", "漢", "🙂"]), max_size=40)
)
def test_tokenizer_round_trips_white_space(parts: list[str]) -> None:
    text = "".join(parts)
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_tokenizer_specials() -> None:
    ids = TOKENIZER.encode("x<|endoftext|>").ids
    assert ids[0] == ids[-1] == read_json("generation_config.json")["eos_token_id"] == 0
    assert read_json("config.json")["bos_token_id"] == 0
    assert [TOKENIZER.token_to_id(f"<|{role}|>") for role in ("user", "assistant", "system")] == [1, 2, 3]


def test_indentation_is_one_token() -> None:
    for depth in (4, 8, 12, 16):
        tokens = TOKENIZER.encode("if x:\n" + " " * depth + "return", add_special_tokens=False).tokens
        assert tokens[-3:] == ["Ċ", "Ġ" * depth, "return"]


def test_logits_are_finite_over_the_whole_context(llama: Any) -> None:
    length = read_json("config.json")["max_position_embeddings"]
    assert length >= 1024
    ids = torch.randint(4, 4096, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert llama(ids, logits_to_keep=8).logits.isfinite().all()


def greedy(llama: Any, prompt: str, tokens: int) -> str:
    ids = torch.tensor([TOKENIZER.encode(prompt).ids])
    with torch.inference_mode():
        out = llama.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=1.0, top_p=1.0, max_new_tokens=tokens
        )
    return str(TOKENIZER.decode(out[0, ids.shape[1] :].tolist()))


def test_continues_python(llama: Any) -> None:
    assert greedy(llama, "def add(a, b):\n", 8).startswith("    ")
    assert "return" in greedy(llama, "def read(path):\n    with open(", 32)
    assert greedy(llama, "class Point:\n    def __init__(self, x, y):\n", 16).startswith("        self.")
    assert greedy(llama, "import os\nimport sys\n\n\ndef main(", 24).split("\n")[1].startswith("    ")


def nats(llama: Any, ids: list[int]) -> float:
    with torch.inference_mode():
        logits = llama(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()


def test_held_out_bits_per_byte(llama: Any, data: ModuleType) -> None:
    file = Path(sysconfig.get_paths()["stdlib"]) / HELD_OUT
    if not file.exists():
        pytest.skip(f"this Python has no {HELD_OUT}")
    assert data.is_held_out(HELD_OUT)
    ids = TOKENIZER.encode(file.read_text(encoding="utf-8")).ids[:2048]
    size = len(TOKENIZER.decode(ids).encode())
    bits = nats(llama, ids) / math.log(2) / size
    assert bits < 1.6


def test_split_depends_on_the_path_alone(data: ModuleType) -> None:
    chosen = [path for path in ("ast.py", "argparse.py", "json/decoder.py", HELD_OUT) if data.is_held_out(path)]
    assert chosen == ["ast.py", HELD_OUT]


CHATS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text("ab \n\"'é{}%", max_size=20)}
    ),
    max_size=4,
)


def render(messages: list[dict[str, str]]) -> str:
    environment = ImmutableSandboxedEnvironment()

    def raise_exception(text: str) -> None:
        raise ValueError(text)

    template = environment.from_string(read_json("tokenizer_config.json")["chat_template"])
    return template.render(
        messages=messages, add_generation_prompt=True, bos_token="<|endoftext|>", raise_exception=raise_exception
    )


@settings(max_examples=60, deadline=None)
@given(CHATS)
def test_chat_is_a_python_file(messages: list[dict[str, str]]) -> None:
    text = render(messages)
    assert text.startswith("<|endoftext|>")
    for message in messages:
        if message["role"] == "user" and '"""' not in message["content"]:
            assert f'"""{message["content"].strip()}\n"""\n\n' in text
    assert text.count('"""') == 2 * sum(message["role"] == "user" for message in messages) + sum(
        message["content"].count('"""') for message in messages if message["role"] != "user"
    )


def test_chat_continues_code_that_the_user_began() -> None:
    assert render([{"role": "user", "content": "def read(path):\n"}]) == "<|endoftext|>def read(path):\n"


def test_chat_template_in_transformers_is_the_same() -> None:
    messages = [
        {"role": "system", "content": "Write Python.\nBe brief."},
        {"role": "user", "content": 'Say """hello""".'},
        {"role": "assistant", "content": "print('hello')"},
        {"role": "user", "content": "Again."},
    ]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = render(messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert text == (
        "<|endoftext|># Write Python.\n# Be brief.\n\n"
        '"""Say \'\'\'hello\'\'\'.\n"""\n\nprint(\'hello\')\n\n\n"""Again.\n"""\n\n'
    )
    with pytest.raises(ValueError, match="unknown role tool"):
        render([{"role": "tool", "content": "x"}])
