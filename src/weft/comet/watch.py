"""Linears that look at what goes through them, for calibration."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from weft.comet import reference
from weft.comet.fmpq import Statistics
from weft.comet.forward import SITES, Linears
from weft.comet.layer import PreparedLayer

KEPT_ROWS = 2048  # of each input, for the errors of its blocks


def every(tokens: int) -> int:
    """Each how many-th row is kept of an input of `tokens` rows."""
    return max(1, tokens // KEPT_ROWS)


class Watch:
    """Linears that note what a plan is made from: mean squares and largest magnitudes, and some of the rows."""

    def __init__(self, linears: Linears, tokens: int) -> None:
        self._linears = linears
        self._tokens = tokens
        self._squares: dict[str, torch.Tensor] = {}
        self._largest: dict[str, torch.Tensor] = {}
        self._rows: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        squares, largest = x.double().square().sum(dim=0), x.abs().amax(dim=0)
        self._squares[site] = self._squares[site] + squares if site in self._squares else squares
        self._largest[site] = torch.maximum(self._largest[site], largest) if site in self._largest else largest
        self._rows[site].append(x[:: every(self._tokens)].clone())
        return self._linears(site, x)

    def statistics(self) -> dict[str, Statistics]:
        return {
            site: Statistics(
                (self._squares[site] / self._tokens).float(), self._largest[site], torch.cat(self._rows[site])
            )
            for site in SITES
        }


class Moments:
    """Linears of a prepared layer, in float, that note the second moments of their prepared inputs and some rows."""

    def __init__(self, prepared: PreparedLayer, tokens: int) -> None:
        self._sites = prepared.sites
        self._tokens = tokens
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}

    def __call__(self, site: str, x: torch.Tensor) -> torch.Tensor:
        one = self._sites[site]
        x = reference.prepare(x, one.form)
        product = (x.T @ x).double()
        self._sums[site] = self._sums[site] + product if site in self._sums else product
        self._rows[site].append(x[:: every(self._tokens)].clone())
        return linear(x, one.weight, one.bias)

    def hessian(self, site: str) -> torch.Tensor:
        """float64 [K, K]: the mean of x xᵀ."""
        return self._sums[site] / self._tokens

    def rows(self, site: str) -> torch.Tensor:
        return torch.cat(self._rows[site])
