"""The kernels that a decoder is made of: one contract, several backends (reference, cpu; triton later).

plan/run: a `Batch` is built once per step on the host and reused by every layer. Weights and KV are opaque to the
models: each backend keeps the layout its kernels stream best (`pack_linear`, `make_kv`).

Invariant: every row of every output depends only on that row's own inputs, in a fixed order of operations. It does
not depend on the other rows of the batch, on the chunk a token was computed in, or on the number of threads. So a
sequence gives the same bits through prefix hits, chunk boundaries, preemption and either lane mode.
(The reference backend keeps this only as far as torch's matrix product does.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """The layout of one step: S slices with T tokens in all, rows ordered slice by slice.

    tokens: int64 [T] token ids. positions: int32 [T] position of each row in its sequence.
    slots: int64 [T] KV slot of each row, block * block_size + offset.
    starts: int32 [S + 1] first row of each slice, and T.
    contexts: int32 [S] KV length of each slice's sequence after this step (its last row attends to all of it).
    tables: int32 [S, W] block tables, padded with -1 (padding is never read).
    kept: int64 [R] the rows that are wanted after the last layer; None for all.
    plan: what an attention backend of GPUs has planned for the step (kernels/attention.py); None where there is none.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    contexts: torch.Tensor
    tables: torch.Tensor
    block_size: int
    kept: torch.Tensor | None = None
    plan: Any = None


def kept_rows(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`Kernels.keep` for any backend whose values are tensors."""
    return x if batch.kept is None else x.index_select(0, batch.kept)


EMBEDDING_GROUP = 128  # channels of a quantised embedding that share a scale


def check_embedding(weight: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Raises ValueError or TypeError for what is no embedding table (`Kernels.pack_embedding`)."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"the embedding has shape {list(weight.shape)}; it must be [vocabulary, D]")
    if (weight.dtype is torch.int8) is not (scales is not None):
        raise TypeError(
            f"an embedding of {weight.dtype} {'without' if scales is None else 'with'} scales; int8 has them"
        )
    if scales is None:
        return
    rows, size = weight.shape
    if size % EMBEDDING_GROUP or scales.shape != (rows, size // EMBEDDING_GROUP):
        raise ValueError(
            f"the embedding is {[rows, size]} and its scales {list(scales.shape)}; "
            f"they must be [vocabulary, D] and [vocabulary, D / {EMBEDDING_GROUP}]"
        )
    if not bool(scales.isfinite().all()):
        raise ValueError("the scales of the embedding must be finite")


class Kernels(Protocol):
    """One backend bound to one lane's cores. Packed weights and KV may be shared by the instances of two lanes.

    dtype of activations: float32 or bfloat16, as the model; all activations are contiguous [T, ...].
    """

    name: str

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """Repack weight [out, in] (and bias [out]) into the backend's own storage; the tensors may be freed after."""
        ...

    def pack_w4ax(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        permutation: torch.Tensor | None = None,
        outlier_blocks: int = 0,
        hadamard: bool = False,
        zeros: torch.Tensor | None = None,
    ) -> Any:
        """Repack an integer weight for `linear`: values int8 [out, in], scales [out, in / 128], bias [out].

        zeros: int8 [out, in / 128] or None: a weight is (value - zero) * scale.

        The input of such a linear is permuted (place i takes channel permutation[i]), transformed outside of its
        leading outlier blocks where `hadamard` says so, and quantised, as weft/comet/reference.py has it.
        """
        ...

    def linear(self, x: torch.Tensor, packed: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[T, in] -> [T, out], accumulated in float32. dtype: x's own, or float32 for sums that are not rounded.

        x may also be what `rms_norm`, `add_rms_norm` or `silu_mul` gave for `packed` as their reader.
        """
        ...

    def pack_embedding(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> Any:
        """Repack a table of token embeddings [vocabulary, D]: floats, or int8 values with scales [vocabulary, D / 128]
        (values within -8 to 7 are kept in 4 bits). The tensors may be freed after."""
        ...

    def embed(self, tokens: torch.Tensor, packed: Any, dtype: torch.dtype) -> torch.Tensor:
        """tokens int64 [T] -> rows of the table [T, D]; value * scale is rounded once to dtype."""
        ...

    def make_kv(
        self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache: str = "auto"
    ) -> Any:
        """Storage of one layer's keys and values, for activations of `dtype`.

        cache: auto (they keep the dtype), bf16 (the same, and an error where that is another), int8 or int4 (see
        kernels/kv.py). Queries belong to the KV they were made for: `rotary_write` may transform them as it does keys.
        The CPU's have copy(source, target): whole blocks, by their numbers, to others.
        """
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, reader: Any = None) -> Any:
        """[T, D] -> [T, D], mean of squares in float32.

        reader: the packed linear that alone reads the result. A backend may then hand it over as this linear wants its
        input, permuted and quantised in one pass: fit for `linear` only, with the same bits in the end.
        """
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, reader: Any = None
    ) -> tuple[Any, torch.Tensor]:
        """residual += x (rounded to the dtype), in place; returns (RMSNorm(residual) * weight, residual).

        reader: of the normalised rows, as in `rms_norm`.
        """
        ...

    def rotary_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: Any,
        batch: Batch,
        heads: int,
        kv_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Split qkv [T, (heads + 2 kv_heads) * head_dim]; RMS-normalise q and k per head where weights are given;
        rotate q and k (half-split convention, cos/sin float32 [max_model_len, head_dim / 2] indexed by position);
        write k and v to the slots. Returns q [T, heads * head_dim], for `attention` over this KV."""
        ...

    def attention(
        self, q: torch.Tensor, kv: Any, batch: Batch, heads: int, kv_heads: int, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """Causal paged attention with grouped queries: [T, heads * head_dim] -> same.

        window: attend to the last `window` positions only (the row's own included); None for all.
        """
        ...

    def keep(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, D] -> [R, D]: the rows that the batch wants kept."""
        ...

    def silu_mul(self, gate_up: torch.Tensor, reader: Any = None) -> Any:
        """[T, 2 F] -> [T, F]: silu(first half) * second half, in float32. reader: as in `rms_norm`."""
        ...

    def set_cores(self, cores: tuple[int, ...]) -> None:
        """Use these cores from the next call on."""
        ...

    def close(self) -> None: ...
