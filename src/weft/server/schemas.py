"""What clients may send: every field, its bounds, and a sentence on each for the OpenAPI description.

A field that is not here is refused by name (parsing.py), unless it is null, which stands for a field that is absent.
Numbers have the bounds of core/sampling.py, and whatever can be long is bounded. Fields that OpenAI's clients send and
that ask for nothing are taken; those that ask for something weft does not do take only the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from weft.config import MAX_NAME
from weft.core.sampling import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MAX_TOKENS,
    SEED_MAX,
    SEED_MIN,
)
from weft.text.chat import MAX_MESSAGES, REQUEST_VARIABLES

MAX_PROMPTS = 1024
MAX_SEQUENCES = 1024  # prompts x n of one call
MAX_PROMPT_TOKENS = 2**20
MAX_PARTS = 1024
MAX_PRIORITY = 2**31 - 1
# A million wrong elements are one error.
FAIL_FAST: Any = Field(fail_fast=True)


def _no(value: bool) -> bool:
    """For what weft does not do. Not Literal[False]: pydantic takes 0 for that."""
    if value:
        raise ValueError("it must be false")
    return value


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Label = Annotated[str, Field(max_length=1024)]
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]
TokenIds = Annotated[list[TokenId], FAIL_FAST, Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
TopCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
One = Annotated[float, Field(ge=1, le=1)]
Nothing = Annotated[list[Any], Field(max_length=0)]
No = Annotated[bool, AfterValidator(_no), WithJsonSchema({"type": "boolean", "const": False})]
Bias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }
    ),
]
Variables = Annotated[
    dict[Name, str | int | float | bool | None],
    Field(max_length=16),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"enum": sorted(REQUEST_VARIABLES)},
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
        }
    ),
]


def _prompt_kind(value: Any) -> str | None:
    """Which form a prompt has, by its first element, so that a wrong element is reported for that form alone."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    kinds = {str: "<texts>", int: "<tokens>", list: "<token lists>"}
    return kinds.get(type(value[0]))


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], FAIL_FAST, Field(min_length=1, max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[TokenIds], FAIL_FAST, Field(min_length=1, max_length=MAX_PROMPTS), Tag("<token lists>")],
    Discriminator(_prompt_kind),
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn. developer is OpenAI's newer word for system. The last five fields are those that an answer of the
    official client brings along when it is sent back; they must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], FAIL_FAST, Field(min_length=1, max_length=MAX_PARTS)]
    name: Name | None = Field(None, description="handed to the chat template")
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None


Messages = Annotated[list[Message], FAIL_FAST, Field(min_length=1, max_length=MAX_MESSAGES)]


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="send the usage in a last chunk without choices")
    continuous_usage_stats: bool | None = Field(None, description="the usage so far in every chunk; with include_usage")
    include_obfuscation: No | None = Field(None, description="weft pads nothing")


class TextFormat(Body):
    type: Literal["text"]


class Generation(Body):
    """What chat and text completions have in common."""

    model: Name | None = Field(None, description="one of /v1/models; default: the first")
    max_tokens: Count | None = Field(None, description="most tokens to generate for each sequence")
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="no end of text and no stop before that many tokens"
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="0 is greedy; default: the model's own, or 1"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = Field(None, description="0 and -1: all tokens")
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = Field(None, description="token id to what is added to its logit")
    seed: Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX)] | None = Field(
        None, description="draws that can be repeated; default: random ones"
    )
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = Field(None, description="sequences for each prompt")
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP)] | None = Field(
        None, description="strings that end a sequence"
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(None, description="leave special tokens out of the text; default: true")
    ignore_eos: bool | None = Field(None, description="go on behind the end of the text")
    prompt_logprobs: TopCount | None = Field(None, description="score the prompt, with so many most probable tokens")
    return_token_ids: bool | None = Field(None, description="add token_ids and prompt_token_ids to the response")
    cache_salt: Annotated[str, Field(max_length=MAX_NAME)] | None = Field(
        None, description="share cached prefixes only with requests of the same salt"
    )
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = Field(
        None, description="smaller is served first; default: 0"
    )
    stream: bool | None = Field(None, description="send server-sent events as text is generated")
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    user: Label | None = Field(None, description="taken, unused")
    use_beam_search: No | None = Field(None, description="weft draws its tokens and does not search")
    length_penalty: One | None = Field(None, description="for beams; must be 1")


class CompletionRequest(Generation):
    """POST /v1/completions"""

    prompt: Prompt = Field(description="a text, token ids, or a list of either; each gets n choices")
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="most tokens to generate for each sequence; 0: the prompt only, for echo and prompt_logprobs"
    )
    logprobs: TopCount | None = Field(None, description="score each token, with so many most probable ones")
    echo: bool | None = Field(None, description="begin with the prompt; with logprobs its tokens are scored too")
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = Field(None, description="must equal n")
    suffix: None = Field(None, description="weft does not fill in the middle")
    add_special_tokens: bool | None = Field(None, description="as the tokenizer has it; default: true")


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: Messages
    max_completion_tokens: Count | None = Field(None, description="OpenAI's newer name of max_tokens")
    logprobs: bool | None = Field(None, description="score each token")
    top_logprobs: TopCount | None = Field(None, description="with so many most probable ones; needs logprobs")
    add_generation_prompt: bool | None = Field(None, description="begin the assistant's turn; default: true")
    continue_final_message: bool | None = Field(None, description="go on in the last message, and begin no new one")
    chat_template_kwargs: Variables | None = Field(None, description="variables of the chat template")
    echo: No | None = Field(None, description="the prompt of a conversation is not sent back")
    reasoning_effort: Label | None = Field(None, description="the chat template's variable of that name")
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="taken, unused: there are no tools")
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    verbosity: Literal["medium"] | None = None
    store: No | None = Field(None, description="weft stores nothing")
    service_tier: Literal["auto", "default"] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = Field(None, description="taken, unused")
    safety_identifier: Label | None = Field(None, description="taken, unused")
    prompt_cache_key: Label | None = Field(None, description="taken, unused: see cache_salt")


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages for the chat template"""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="as the tokenizer has it; default: true for a prompt, false for messages"
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Variables | None = None
    return_token_strs: bool | None = Field(None, description="the text of each token too")


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: Name | None = None
    tokens: Annotated[list[TokenId], FAIL_FAST, Field(max_length=MAX_PROMPT_TOKENS)]
