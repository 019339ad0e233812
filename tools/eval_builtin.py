"""Measure the built-in model on the held-out files, and show what it writes.

    python tools/eval_builtin.py                                  # held-out bits per byte, in FP32 and BF16
    python tools/eval_builtin.py --prompt 'def add(a, b):\\n'      # one greedy continuation

Bits per byte: every file is one document that begins with the end-of-text token; windows of the context slide by
half a window, each token is scored once, with at least half a window of context where the file has it; the sum of bits
over all files is divided by the sum of their UTF-8 bytes. It does not depend on the tokenizer.
"""

import argparse
import lzma
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from builtin_data import END, corpus
from builtin_model import Llama, load_folder
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "src" / "weft" / "assets" / "builtin"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def document_nats(model: Llama, tokens: list[int], context: int) -> float:
    """Sum of -log p over tokens[1:], each given at most context - 1 tokens before it (and at least half of that)."""
    total, scored = 0.0, 1  # tokens[:scored] are done; the first one is given
    while scored < len(tokens):
        end = min(len(tokens), context + 1 if scored == 1 else scored + context // 2)
        window = torch.tensor(tokens[max(0, end - context - 1) : end])
        fresh = end - scored
        with torch.inference_mode():
            logits = model(window[None, :-1])[0, -fresh:].float()
        total += F.cross_entropy(logits, window[-fresh:], reduction="sum").item()
        scored = end
    return total


def measure(folder: Path, dtype: torch.dtype, texts: list[str]) -> tuple[float, float, int]:
    """Bits per byte, nats per token and number of tokens of the texts under the model in the folder."""
    model = load_folder(folder, dtype)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = [tokenizer.encode(text).ids for text in texts]
    nats = sum(document_nats(model, tokens, model.shape.context) for tokens in documents)
    count = sum(len(tokens) - 1 for tokens in documents)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts), nats / count, count


def generate(folder: Path, dtype: torch.dtype, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and its continuation: greedy at temperature 0, else sampled. Recomputes the prefix for each token."""
    model = load_folder(folder, dtype)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([ids[-model.shape.context :]]))[0, -1].float()
        if temperature == 0:
            chosen = int(logits.argmax())
        else:
            chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if chosen == tokenizer.token_to_id(END):
            break
        ids.append(chosen)
    return str(tokenizer.decode(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both")
    parser.add_argument("--prompt", help="print a continuation of this text instead; \\n means a new line")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = list(DTYPES) if arguments.dtype == "both" else [arguments.dtype]
    if arguments.prompt is not None:
        prompt = arguments.prompt.replace("\\n", "\n")
        dtype = DTYPES[names[-1]]
        print(generate(arguments.folder, dtype, prompt, arguments.tokens, arguments.temperature, arguments.seed))
        return
    texts = [document.text for document in corpus()[1]]
    size = sum(len(text.encode()) for text in texts)
    packed = len(lzma.compress("".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"held-out: {len(texts)} files, {size:,} bytes; xz -9e of them all: {8 * packed / size:.3f} bits per byte")
    for name in names:
        begin = time.monotonic()
        bits, nats, count = measure(arguments.folder, DTYPES[name], texts)
        seconds = time.monotonic() - begin
        print(f"{name:>8}: {bits:.4f} bits per byte, {nats:.4f} nats per token, {count:,} tokens, {seconds:.0f} s")


if __name__ == "__main__":
    main()
