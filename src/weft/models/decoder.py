"""The one decoder of all families: a generator that stops at each seam and knows nothing of ranks or overlap."""

from __future__ import annotations

from typing import Any

import torch

from weft.errors import ConfigError
from weft.kernels.base import Batch, Kernels
from weft.models.families import ModelConfig
from weft.models.layers import Layer
from weft.models.loader import Weights
from weft.weave.seam import Joined, Seam, Shared, Strand, run


class Decoder:
    """The model on one lane's kernels. Cheap: the decoders of two lanes share weights, rotary tables and KV."""

    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels, max_model_len: int) -> None:
        """Raises ConfigError for a max_model_len beyond the checkpoint's context."""
        if not 1 <= max_model_len <= config.context:
            raise ConfigError(
                f"--max-model-len is {max_model_len}; the checkpoint's context is {config.context} tokens, "
                "so it must be from 1 to that"
            )
        self.config = config
        self.max_model_len = max_model_len
        self._weights = weights
        self._kernels = kernels
        cos, sin = weights.rotary.tables(max_model_len)
        self._layers = [
            Layer(config, layer, kernels, window, cos, sin)
            for layer, window in zip(weights.layers, config.windows, strict=True)
        ]
        # What follows each layer: the next one's input norm and qkv, and the final norm after the last.
        self._next_norms = [layer.input_norm for layer in weights.layers[1:]] + [weights.norm]
        self._next_readers = [layer.qkv for layer in weights.layers[1:]] + [None]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self._weights.dtype

    def on(self, kernels: Kernels) -> Decoder:
        """The same model on other kernels, which take the same packed weights."""
        return Decoder(self.config, self._weights, kernels, self.max_model_len)

    @property
    def padded(self) -> bool:
        """Whether zeros are put behind what the heads give (see shard.py)."""
        return any(layer.output_zeros for layer in self._weights.layers)

    def make_kv(self, blocks: int, block_size: int, cache: str = "auto") -> list[Any]:
        """Storage for the keys and values of `blocks` blocks, one for each layer. cache: as --kv-cache-dtype."""
        config, dtype = self.config, self._weights.dtype
        make = self._kernels.make_kv
        return [make(blocks, block_size, config.kv_heads, config.head_dim, dtype, cache) for _ in self._layers]

    def strand(self, batch: Batch, kv: list[Any]) -> Strand:
        """One strand through all layers. At the first seam the embedding enters the first norm. Returns the hidden
        rows after the final norm, [R, hidden]: those that the batch keeps. After the last layer has written its keys
        and values, no other row is of use to anyone."""
        eps = self.config.eps
        first, embed = self._weights.layers[0], self._kernels.embed
        hidden: torch.Tensor
        # The embedding has no name here: the strand would keep all of its rows, and a rank's residual has only its own.
        hidden, residual = yield Seam(
            embed(batch.tokens, self._weights.embedding, self._weights.dtype),
            None,
            first.input_norm,
            eps,
            reader=first.qkv,
        )
        for layer, storage, next_norm, reader in zip(
            self._layers, kv, self._next_norms, self._next_readers, strict=True
        ):
            last = layer is self._layers[-1]
            partial = layer.attend(hidden, storage, batch, last=last)
            kept = batch if last else None
            hidden, residual = yield Seam(partial, residual, layer.mlp_norm, eps, kept=kept, reader=layer.mlp_reader)
            partial = (yield Shared(hidden, layer.feed)) if layer.mixed else layer.feed(hidden)
            hidden, residual = yield Seam(partial, residual, next_norm, eps, reader=reader)
        return hidden

    def join(self, seam: Seam) -> Joined:
        """Carry out a seam for one rank, or a first one, which is the same on all ranks: there is nothing to sum, so
        the residual and the norm only."""
        if seam.residual is None:
            return self._kernels.rms_norm(seam.partial, seam.weight, seam.eps, seam.reader), seam.partial
        residual = seam.residual if seam.kept is None else self._kernels.keep(seam.residual, seam.kept)
        return self._kernels.add_rms_norm(seam.partial, residual, seam.weight, seam.eps, seam.reader)

    @torch.inference_mode()
    def hidden(self, batch: Batch, kv: list[Any]) -> torch.Tensor:
        """The rows that the batch keeps, after the final norm: [R, hidden]. The KV of all tokens is in `kv` then."""
        return run(self.strand(batch, kv), self.join)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> float32 [R, vocabulary]: the sums as they are, not rounded to the model's precision."""
        return self._kernels.linear(hidden, self._weights.head, torch.float32)
