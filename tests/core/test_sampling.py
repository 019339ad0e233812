from __future__ import annotations

from typing import Any

import pytest

from weft.core.sampling import SamplingParams
from weft.errors import InvalidRequest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2**63),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("n", 0),
        ("n", 10_000),
        ("seed", 2**64),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("stop", ("",)),
        ("stop", ("x",) * 10_000),
        ("stop", ("x" * 2000,)),
        ("stop_token_ids", (50,)),
        ("stop_token_ids", (1,) * 1000),
        ("logit_bias", ((50, 1.0),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", ((1, 1.0),) * 2000),
        # What a caller in Python may give, where a request over HTTP has been looked at before.
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("n", 1.5),
        ("min_tokens", None),
        ("temperature", "hot"),
        ("top_p", None),
        ("stop", "ab"),
        ("stop", (5,)),
        ("stop_token_ids", 5),
        ("stop_token_ids", ("5",)),
        ("logit_bias", {5: 1.0}),
        ("logit_bias", ((5, "x"),)),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**{field: value}).validate(50)
    assert refused.value.param == field and refused.value.message


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidRequest, match="more than max_tokens 3"):
        SamplingParams(min_tokens=4, max_tokens=3).validate()
    SamplingParams(min_tokens=4, max_tokens=None).validate()


def test_without_a_vocabulary_any_token_id_from_0_will_do() -> None:
    SamplingParams(stop_token_ids=(10**9,)).validate()
    with pytest.raises(InvalidRequest, match="non-negative"):
        SamplingParams(stop_token_ids=(-1,)).validate()


def test_what_a_sampler_asks() -> None:
    assert SamplingParams(temperature=0.0).greedy and not SamplingParams().greedy
    assert not SamplingParams().penalised
    for field in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert SamplingParams(**{field: 0.5}).penalised
