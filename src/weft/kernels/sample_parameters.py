"""How rows of logits are to be drawn, as tensors: made on the host, read by triton_sample.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from weft.core.plan import Sampling

COLDEST = 1e-30  # the least temperature but 0: float32 holds it, and 0 divided by it is 0


@dataclass(frozen=True, slots=True)
class Edits:
    """What is done to logits before a draw. Row r has the entries starts[r] to starts[r + 1], of distinct ids.

    starts: int32 [R + 1]. ids: int32, biases: float32 (-inf: forbidden), counts: int32 (-1: not in prompt or output,
    else how often in the output) [E]. repetition, frequency, presence: float32 [R].
    """

    starts: torch.Tensor
    ids: torch.Tensor
    biases: torch.Tensor
    counts: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.starts, self.ids, self.biases, self.counts, self.repetition, self.frequency, self.presence


@dataclass(frozen=True, slots=True)
class Parameters:
    """How each of R rows is drawn; `core.plan.Sampling` as tensors. None for what no row needs.

    seeds: int64, the bits of the seed; positions: int64. temperatures: float32, 0 for greedy; top_ks: int32, 0 for
    off; top_ps: float64; min_ps: float32. scores: most log-probabilities that a row asks for; None: no row does.
    """

    seeds: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    temperatures: torch.Tensor | None = None
    top_ks: torch.Tensor | None = None
    top_ps: torch.Tensor | None = None
    min_ps: torch.Tensor | None = None
    edits: Edits | None = None
    scores: int | None = None

    def moved(self, move: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]) -> Parameters:
        """The same in other tensors: `move` is given all that there are, and returns its own in the same order."""
        rows = (self.seeds, self.positions, self.temperatures, self.top_ks, self.top_ps, self.min_ps)
        given = [tensor for tensor in rows if tensor is not None]
        edits = [] if self.edits is None else list(self.edits.tensors)
        there = iter(move(given + edits))
        seeds, positions, temperatures, top_ks, top_ps, min_ps = (None if x is None else next(there) for x in rows)
        moved = Edits(*there) if edits else None
        return Parameters(seeds, positions, temperatures, top_ks, top_ps, min_ps, moved, self.scores)

    def to(self, device: torch.device | str) -> Parameters:
        """A copy there."""
        return self.moved(lambda tensors: [tensor.to(device) for tensor in tensors])


def parameters_of(samplings: Sequence[Sampling], vocabulary: int) -> Parameters:
    """In host memory. Ids from `vocabulary` on are left out: they cannot be drawn anyway."""
    params = [sampling.params for sampling in samplings]
    edits = _edits_of(samplings, vocabulary)
    asked = [one.logprobs for one in params if one.logprobs is not None]
    scores = min(max(asked), vocabulary) if asked else None
    if all(one.greedy for one in params):
        return Parameters(edits=edits, scores=scores)
    seeds = [(sampling.seed + 2**63) % 2**64 - 2**63 for sampling in samplings]
    return Parameters(
        torch.tensor(seeds, dtype=torch.int64),
        torch.tensor([sampling.position for sampling in samplings], dtype=torch.int64),
        torch.tensor([0.0 if one.greedy else max(one.temperature, COLDEST) for one in params], dtype=torch.float32),
        torch.tensor([max(one.top_k, 0) for one in params], dtype=torch.int32),
        torch.tensor([one.top_p for one in params], dtype=torch.float64),
        torch.tensor([one.min_p for one in params], dtype=torch.float32),
        edits,
        scores,
    )


def _edits_of(samplings: Sequence[Sampling], vocabulary: int) -> Edits | None:
    rows = [_row_edits(sampling, vocabulary) for sampling in samplings]
    if not any(rows):
        return None
    entries = [(token, *entry) for row in rows for token, entry in row.items()]
    params = [sampling.params for sampling in samplings]
    return Edits(
        torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32),
        torch.tensor([token for token, _, _ in entries], dtype=torch.int32),
        torch.tensor([bias for _, bias, _ in entries], dtype=torch.float32),
        torch.tensor([count for _, _, count in entries], dtype=torch.int32),
        torch.tensor([one.repetition_penalty for one in params], dtype=torch.float32),
        torch.tensor([one.frequency_penalty for one in params], dtype=torch.float32),
        torch.tensor([one.presence_penalty for one in params], dtype=torch.float32),
    )


def _row_edits(sampling: Sampling, vocabulary: int) -> dict[int, tuple[float, int]]:
    """(bias, count) of each token that is forbidden, biased, or in prompt or output."""
    biases = dict(sampling.params.logit_bias) | dict.fromkeys(sampling.forbidden, -torch.inf)
    counts = dict.fromkeys(sampling.prompt, 0)
    for token in sampling.output:
        counts[token] = counts.get(token, 0) + 1
    tokens = biases.keys() | counts.keys()
    return {token: (biases.get(token, 0.0), counts.get(token, -1)) for token in sorted(tokens) if token < vocabulary}
