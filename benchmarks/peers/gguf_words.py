"""A GGUF file without a vocabulary, with one of made-up words: gguf_words.py FILE OUT. Needs gguf.

llama.cpp's server turns every token into text and ends where it has no vocabulary to do that with.
"""

from __future__ import annotations

import sys

from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType

SPECIAL = {0: TokenType.UNKNOWN, 1: TokenType.CONTROL, 2: TokenType.CONTROL}
OWN = ("GGUF.", "tokenizer.", "general.architecture")  # what the writer writes by itself, and what is replaced


def main(source: str, out: str) -> None:
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if not field.name.startswith(OWN):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    count = reader.fields[f"{architecture}.vocab_size"].contents()
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"\u2581w{number}" for number in range(count)])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([SPECIAL.get(number, TokenType.NORMAL) for number in range(count)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
