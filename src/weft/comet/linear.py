"""The reference kernels with W4Ax linears: for a decoder whose packed linears are `QuantisedSite`s."""

from __future__ import annotations

import torch

from weft.comet import reference
from weft.comet.checkpoint import QuantisedSite
from weft.comet.reference import InputForm, QuantisedLinear
from weft.kernels.reference import PlainLinear, ReferenceKernels


class QuantisedReferenceKernels(ReferenceKernels):
    """As the reference kernels; `linear` also takes a quantised site, and prepares and quantises its input itself.

    exact_a4: 4-bit activations as the paper has them; else, as on every device without 4-bit arithmetic, 8 bits.
    """

    name = "reference"

    def __init__(self, cores: tuple[int, ...], *, exact_a4: bool = False) -> None:
        super().__init__(cores)
        self.exact_a4 = exact_a4

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
    ) -> QuantisedSite:
        """The site itself: nothing is repacked."""
        form = InputForm(values.shape[1], permutation, outlier_blocks, hadamard)
        return QuantisedSite(form, QuantisedLinear(values, scales, bias, zeros))

    def linear(
        self, x: torch.Tensor, packed: PlainLinear | QuantisedSite, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        x = x if dtype is None else x.to(dtype)  # sums are float32 either way; the result has the dtype of x
        if isinstance(packed, QuantisedSite):
            return reference.linear(x, packed.form, packed.linear, exact_a4=self.exact_a4)
        return super().linear(x, packed)
