"""The plain forward against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft.comet.calibrate import through
from weft.comet.forward import plain_linears
from weft.comet.outer import as_it_was
from weft.comet.report import compare

from .conftest import FAMILIES, make_model, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_transformers_computes(family: str) -> None:
    import transformers

    raw, config = tiny_config(family)
    model = make_model(config)
    oracle_config = transformers.AutoConfig.for_model(
        config.family, **{key: value for key, value in raw.items() if key != "architectures"}
    )
    oracle: Any = transformers.AutoModelForCausalLM.from_config(oracle_config, attn_implementation="eager").eval()
    state = {
        f"model.layers.{index}.{name}": tensor
        for index in range(config.layers)
        for name, tensor in model.layer(index).items()
    }
    missing = oracle.load_state_dict(state | dict(model.rest()), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    tokens = torch.randint(0, config.vocabulary, (3, 17), generator=torch.Generator().manual_seed(1))

    hidden = as_it_was(model.rest()).embed(tokens)
    for index in range(config.layers):
        tensors = model.layer(index)
        hidden = through(hidden, tensors, model, index, plain_linears(tensors))
    with torch.no_grad():
        expected = oracle(tokens, output_hidden_states=True)
        last = oracle.model.norm(hidden)
    assert torch.allclose(last, expected.hidden_states[-1], rtol=1e-3, atol=1e-3)

    logits = as_it_was(model.rest()).logits(config.eps)
    quality = compare(hidden, hidden, logits, logits, tokens)
    nats = torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert quality.tokens == 3 * 16
    assert quality.float_nats == quality.nats == pytest.approx(float(nats), rel=1e-4)
    assert quality.kl == quality.flips == 0
