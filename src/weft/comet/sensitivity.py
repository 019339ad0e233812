"""What an error in a site's input costs in the end: nats of KL, for each block, the same unit everywhere in the model.

Let g be the gradient of log p(y) with respect to a site's output, y drawn from the model's own next-token distribution.
An error δ there makes KL(float || changed) = E[(g·δ)²] / 2, to second order (the Fisher information). With δ = W e for
an error e in the input, g·δ is p·e, where p = Wᵀ g is the gradient pulled back through the site's weights. So some rows
of x and p tell what 4 bits cost in each block, however the channels are scaled, ordered or transformed.

The gradients go back through the layers one at a time, from the hidden rows that were kept before each: here too no
more than one layer of weights is in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from weft.comet import reference
from weft.comet.forward import SITES, Linears, Tensors, joined, plain_linears
from weft.comet.packing import split

TOKENS = 2048  # that gradients are taken for

Pulled = dict[str, tuple[torch.Tensor, torch.Tensor]]  # for each site, x and p, [R, K] each


def last_gradients(
    hidden: torch.Tensor, normalised: Callable[[torch.Tensor], torch.Tensor], head: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The gradients of log p(y) for hidden [S, L, D], what leaves the last layer, one y drawn for each token; and the
    x and p of the output layer. normalised: what the output layer, of weight [vocabulary, D], reads."""
    generator = torch.Generator().manual_seed(0)
    before, rows = [], []
    for sequence in hidden:
        with torch.enable_grad():
            start = sequence.detach().requires_grad_()
            x = normalised(start)
            logs = (x @ head.T).log_softmax(dim=-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            gradient, pulled = torch.autograd.grad(logs.gather(1, drawn).sum(), [start, x])
        before.append(gradient)
        rows.append((x.detach(), pulled))
    return torch.stack(before), (torch.cat([x for x, _ in rows]), torch.cat([p for _, p in rows]))


def pull_back(
    tensors: Tensors,
    run: Callable[[torch.Tensor, Linears], torch.Tensor],
    hidden: torch.Tensor,
    gradients: torch.Tensor,
) -> tuple[Pulled, torch.Tensor]:
    """Back through one float layer, a sequence at a time: x and p of its sites, and the gradients before it.

    run: hidden [S, L, D] through the layer with given linears. hidden: before the layer; gradients: after it.
    """
    plain = plain_linears(tensors)
    weights = {site: joined(tensors, site)[0] for site in SITES}
    rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {site: [] for site in SITES}
    before = []
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of the sequence that is looked at

    def watching(site: str, x: torch.Tensor) -> torch.Tensor:
        y = plain(site, x)
        seen[site] = (x.detach(), y)
        return y

    for sequence, after in zip(hidden[:, None], gradients[:, None], strict=True):
        with torch.enable_grad():
            start = sequence.detach().requires_grad_()
            end = run(start, watching)
            outputs = [seen[site][1] for site in SITES]
            first, *others = torch.autograd.grad(end, [start, *outputs], after)
        before.append(first)
        for site, gradient in zip(SITES, others, strict=True):
            rows[site].append((seen[site][0], gradient @ weights[site]))
    pulled = {
        site: (torch.cat([x for x, _ in parts]), torch.cat([p for _, p in parts])) for site, parts in rows.items()
    }
    return pulled, torch.cat(before)


def block_costs(x: torch.Tensor, pulled: torch.Tensor) -> torch.Tensor:
    """Nats [K / 128] that 4 bits cost in each block of x [R, K], prepared; pulled: p in the same form."""
    lost = x - reference.quantise_rows(x, 0, exact_a4=True).dequantised()
    return split(pulled * lost).sum(dim=-1).square().mean(dim=0) / 2
