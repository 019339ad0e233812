"""The text and the tokenizer of the built-in model.

Owns: which files of the running Python's standard library are read, how they are split into train and held-out, the
byte-level BPE tokenizer made from the train files, and the chat template.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
SPECIAL_TOKENS = (END, "<|user|>", "<|assistant|>", "<|system|>")
VOCABULARY = 4096
HELD_OUT_PERCENT = 5

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
# Tables and boilerplate rather than programs: a model of this size would spend its few parameters on reciting them, and
# near copies on both sides of the split would flatter the held-out figure.
SKIPPED_PATHS = (
    "_sysconfigdata",
    "config-",
    "encodings/",
    "html/entities.py",
    "locale.py",
    "pydoc_data/topics.py",
    "stringprep.py",
)

# One newline run; the indentation after it, whole; a word with at most one leading space, dot or underscore; one digit;
# punctuation; what is left of white space. Indentation is a token of its own so that a prompt that ends in a newline is
# continued as in the training text.
SPLIT = (
    r"\n+|(?<=\n) +| +(?= \S)|[ ._]?[^\W\d_]+| ?\d| ?_+| ?[^\s\w]+|[^\S\n]+"  # every character matches one alternative
)

# The model has only seen Python files, so a chat is written as one: what the system says is a comment; what the user
# says is code to continue if it begins like code, and else a docstring; what the assistant says is the code below it.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set text = message['content'] | trim %}
    {%- if message['role'] == 'system' %}
        {{- '# ' + (text | replace('\\n', '\\n# ')) + '\\n\\n' }}
    {%- elif message['role'] == 'user' and text.startswith(('def ', 'async def ', 'class ', 'import ', '@', '#')) %}
        {{- text + '\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '\"\"\"' + (text | replace('\"\"\"', "'''")) + '\\n\"\"\"\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'].rstrip() + '\\n\\n\\n' }}
    {%- else %}
        {{- raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') }}
    {%- endif %}
{%- endfor %}
"""


@dataclass(frozen=True, slots=True)
class Document:
    """One source file: its path below the standard library's folder, and its text."""

    path: str
    text: str


def is_held_out(path: str) -> bool:
    """Whether the file is kept out of training; depends on the relative path alone, so it is the same everywhere."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4]) % 100 < HELD_OUT_PERCENT


def _documents(root: Path) -> Iterator[Document]:
    seen: set[bytes] = set()
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.as_posix().startswith(SKIPPED_PATHS):
            continue
        try:
            text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            print(f"left out {relative}: not UTF-8")
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen and len(text) >= 64:
            seen.add(digest)
            yield Document(relative.as_posix(), text)


def corpus() -> tuple[list[Document], list[Document]]:
    """The train and the held-out files of this Python's standard library, each sorted by path, without duplicates."""
    documents = list(_documents(Path(sysconfig.get_paths()["stdlib"])))
    train = [document for document in documents if not is_held_out(document.path)]
    held_out = [document for document in documents if is_held_out(document.path)]
    return train, held_out


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """A byte-level BPE tokenizer of VOCABULARY tokens; special tokens have the lowest ids and END begins each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def tokenizer_config(context: int) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }


def encode_stream(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """All documents as one row of token ids [tokens] (uint16), END before each and after the last."""
    end = tokenizer.token_to_id(END)
    encodings = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    pieces = [np.array([end, *encoding.ids], dtype=np.uint16) for encoding in encodings]
    return np.concatenate([*pieces, np.array([end], dtype=np.uint16)])
