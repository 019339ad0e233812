"""What a checkpoint says about generating: the ids that end a text and the sampling it was tuned for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.core.sampling import SamplingParams
from weft.errors import CheckpointError, InvalidRequest
from weft.text.tokenizer import read_json

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """eos_ids: ids that end a text. sampling: SamplingParams fields for requests that do not set them."""

    eos_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path, tokenizer_eos: Iterable[int] = ()) -> GenerationDefaults:
        """From generation_config.json, or config.json for the ids; `tokenizer_eos` are ended by as well.

        With `do_sample: false` the file's sampling values are not in force. Raises CheckpointError for values that
        cannot be honoured.
        """
        path = folder / "generation_config.json"
        given = read_json(path)
        ids = given.get("eos_token_id")
        if ids is None:
            ids = read_json(folder / "config.json").get("eos_token_id")
        listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int and token >= 0 for token in listed):
            raise CheckpointError(f"{path}: eos_token_id is {ids!r}; it must be a token id or a list of them")
        sampling = {}
        if given.get("do_sample") is not False:
            sampling = {key: given[key] for key in SAMPLING_KEYS if given.get(key) is not None}
        defaults = cls(tuple(dict.fromkeys([*listed, *tokenizer_eos])), sampling)
        try:
            defaults.params().validate()
        except (InvalidRequest, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        return defaults

    def params(self, **given: Any) -> SamplingParams:
        """SamplingParams of a request that sets `given`; the checkpoint's defaults for the rest."""
        return SamplingParams(**{**self.sampling, **given})
