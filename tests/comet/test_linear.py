"""The serving decoder on quantised layers, through paged KV, against the plain forward over whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import rms_norm

from weft.comet.calibrate import Model, Settings, Text, quantise_model, quantised_linears, through
from weft.comet.checkpoint import QuantisedLayer, read_layer
from weft.comet.layer import Method
from weft.comet.linear import QuantisedReferenceKernels
from weft.comet.outer import EMBEDDING, NORM, as_it_was
from weft.comet.weights import Rounding
from weft.comet.work import shard
from weft.core.plan import Slice
from weft.models.batch import make_batch
from weft.models.decoder import Decoder
from weft.models.families import ModelConfig
from weft.models.loader import LayerWeights, Weights
from weft.models.rope import Rotary

TEXT = Text(
    torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(5)),
    torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(6)),
)


def layers_of(model: Model, folder: Path) -> list[QuantisedLayer]:
    settings = Settings(Method(budget=0.3), Rounding())
    config, _ = quantise_model(model, TEXT, settings, folder, lambda _: None)
    layers = []
    for index in range(model.shapes.layers):
        path = shard(folder, index, model.shapes.layers)
        tensors = {name.removeprefix(f"model.layers.{index}."): one for name, one in load_file(path).items()}
        layers.append(read_layer(tensors, config, model.shapes, index, path))
    return layers


def weights_of(model: Model, config: ModelConfig, layers: list[QuantisedLayer], kernels: object) -> Weights:
    rest = model.rest()
    return Weights(
        dtype=torch.float32,
        embedding=kernels.pack_embedding(rest[EMBEDDING]),  # type: ignore[attr-defined]
        layers=tuple(
            LayerWeights(
                input_norm=layer.norms["input_layernorm.weight"],
                mlp_norm=layer.norms["post_attention_layernorm.weight"],
                q_norm=layer.norms.get("self_attn.q_norm.weight"),
                k_norm=layer.norms.get("self_attn.k_norm.weight"),
                qkv=layer.sites["attention"],
                output=layer.sites["output"],
                gate_up=layer.sites["mlp"],
                down=layer.sites["down"],
            )
            for layer in layers
        ),
        norm=rest[NORM],
        head=kernels.pack_linear(rest[EMBEDDING]),  # type: ignore[attr-defined]
        rotary=Rotary(config.rope, config.head_dim),
        size=0,
    )


@pytest.mark.parametrize("family", ["llama", "biased llama", "qwen3"])
@pytest.mark.parametrize("exact_a4", [False, True])
def test_the_decoder_serves_quantised_layers_as_they_are(
    tmp_path: Path, model_of: Callable[..., Model], family: str, exact_a4: bool
) -> None:
    model = model_of(family)
    config = model.shapes
    assert isinstance(config, ModelConfig)
    layers = layers_of(model, tmp_path)
    kernels = QuantisedReferenceKernels((0,), exact_a4=exact_a4)
    decoder = Decoder(config, weights_of(model, config, layers, kernels), kernels, 32)
    tokens = TEXT.held_out
    kv = decoder.make_kv(8, 8)
    hidden = []
    for begin, end in ((0, 10), (10, 24)):
        slices = [
            Slice(row, begin, tuple(tokens[row, begin:end].tolist()), tuple(range(4 * row, 4 * row + 3)))
            for row in range(len(tokens))
        ]
        hidden.append(decoder.hidden(make_batch(slices, 8), kv).view(len(tokens), end - begin, -1))
    found = torch.cat(hidden, dim=1)

    with torch.inference_mode():
        expected = as_it_was(model.rest()).embed(tokens)
        for index, layer in enumerate(layers):
            expected = through(expected, layer.norms, model, index, quantised_linears(layer, exact_a4=exact_a4))
        expected = rms_norm(expected, (config.hidden_size,), model.rest()[NORM], config.eps)
    # A last bit may move a value over a rounding boundary; few do, and each by one step.
    error = (found - expected).square().mean() / expected.square().mean()
    assert error < 1e-4


def test_plain_linears_are_those_of_the_reference() -> None:
    kernels = QuantisedReferenceKernels((0,))
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    assert torch.allclose(kernels.linear(x, kernels.pack_linear(weight)), x @ weight.T, atol=1e-5)
