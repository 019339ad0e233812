"""What stands around the layers, quantised: the embedding, and the output layer as one more site.

The embedding's rows are rounded to the nearest, after a search for their scales: nothing that follows could make up for
an error in one row without spoiling another. The output layer is planned and rounded like the sites of a layer; its
balance is in the gain of the last norm. With 8 bits it is neither scaled nor moved: there is nothing to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import embedding, rms_norm

from weft.comet import reference
from weft.comet.checkpoint import (
    FmpqConfig,
    QuantisedSite,
    Stored,
    check_permutation,
    check_tensors,
    linear_shapes,
    linear_tensors,
    read_linear,
)
from weft.comet.fmpq import Statistics, leading
from weft.comet.forward import Shapes
from weft.comet.layer import (
    LayerPlan,
    Method,
    PreparedSite,
    paper_site,
    plan_site,
    prepare_site,
    storable_balance,
)
from weft.comet.packing import BLOCK, split
from weft.comet.reference import InputForm, QuantisedLinear
from weft.comet.watch import every
from weft.comet.weights import Rounding, quantise_weight
from weft.errors import CheckpointError

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
HEAD_SITE = "head"  # the output layer's name among the sites
EMBEDDING_MODULE, HEAD_MODULE = EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")
PERMUTATION = f"{HEAD_MODULE}.permutation"


@dataclass(frozen=True, slots=True)
class Outer:
    """The embedding, the last norm's gain and the output layer; a float tensor where it is not quantised."""

    embedding: torch.Tensor | QuantisedLinear
    norm: torch.Tensor
    head: torch.Tensor | QuantisedSite

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [S, L, hidden]."""
        if isinstance(self.embedding, torch.Tensor):
            return embedding(tokens, self.embedding).float()
        values, scales = self.embedding.values[tokens], self.embedding.scales[tokens]
        return (split(values) * scales[..., None]).flatten(-2)

    def normalised(self, hidden: torch.Tensor, eps: float) -> torch.Tensor:
        """[..., hidden] -> what the output layer reads."""
        return rms_norm(hidden, self.norm.shape, self.norm.float(), eps)

    def logits(self, eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
        """Rows [R, hidden] -> float32 [R, vocabulary], with 4-bit activations where the output layer has them."""
        if isinstance(self.head, torch.Tensor):
            plain = self.head.float()
            return lambda rows: self.normalised(rows, eps) @ plain.T
        form, weight = self.head.form, self.head.linear.dequantised()

        def apply(rows: torch.Tensor) -> torch.Tensor:
            x = reference.prepare(self.normalised(rows, eps), form)
            return reference.quantise_rows(x, form.outlier_blocks, exact_a4=True).dequantised() @ weight.T

        return apply


def as_it_was(rest: Mapping[str, torch.Tensor]) -> Outer:
    return Outer(rest[EMBEDDING], rest[NORM], rest.get(HEAD, rest[EMBEDDING]))


def float_head(rest: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The output layer's weight, float32 [vocabulary, hidden]."""
    return rest.get(HEAD, rest[EMBEDDING]).float()


def quantise_embedding(weight: torch.Tensor, bits: int) -> torch.Tensor | QuantisedLinear:
    """[V, K] -> integers of 4 or 8 bits, or itself for 16."""
    if bits == 16:
        return weight
    eight = weight.shape[1] // BLOCK if bits == 8 else 0
    return quantise_weight(weight.float(), None, None, eight, Rounding(outlier_bits=8, compensate=False), _silent)


def plan_head(rest: Mapping[str, torch.Tensor], hidden: torch.Tensor, eps: float, method: Method) -> LayerPlan:
    """The output layer as the one site of a layer. rest: the float tensors; hidden [S, L, hidden]: what leaves the
    last layer."""
    outer = as_it_was(rest)
    x = outer.normalised(hidden, eps).flatten(0, 1)
    seen = Statistics(x.square().mean(dim=0), x.abs().amax(dim=0), x[:: every(len(x))].clone())
    nothing = torch.ones(0)
    if method.name == "paper":
        plan, blocks = paper_site(seen, method)
        return LayerPlan({HEAD_SITE: plan}, False, nothing, {}, {HEAD_SITE: blocks})
    weight = float_head(rest)
    scaling = storable_balance(outer.norm, seen.squares, weight)
    return LayerPlan({HEAD_SITE: plan_site(seen, weight, scaling, method)}, False, nothing, {}, {})


def prepare_head(
    rest: Mapping[str, torch.Tensor], plan: LayerPlan | None, chosen: tuple[int, ...]
) -> tuple[PreparedSite, torch.Tensor]:
    """The output layer in the plan's form, and the gain of the norm before it. No plan: 8 bits throughout."""
    weight, norm = float_head(rest), rest[NORM]
    if plan is None:
        return prepare_site(weight, None, None, weight.shape[1] // BLOCK, transform=False), norm
    site = plan.sites[HEAD_SITE]
    prepared = prepare_site(weight * site.scaling, None, leading(site.order, chosen), len(chosen), site.hadamard)
    return prepared, (norm.float() / site.scaling).to(norm.dtype)


def outer_tensors(outer: Outer, config: FmpqConfig, *, tied: bool) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside the layers. An output layer that is left as it was and tied is the embedding; it
    is written down only where that was quantised."""
    tensors = {NORM: outer.norm}
    if isinstance(outer.embedding, torch.Tensor):
        tensors[EMBEDDING] = outer.embedding
    else:
        columns = outer.embedding.values.shape[1]
        tensors |= linear_tensors(EMBEDDING_MODULE, outer.embedding, _embedding_eight(config, columns))
    if isinstance(outer.head, torch.Tensor):
        if not tied or EMBEDDING not in tensors:
            tensors[HEAD] = outer.head
    else:
        form = outer.head.form
        tensors |= linear_tensors(HEAD_MODULE, outer.head.linear, _head_eight(config))
        if form.permutation is not None:
            tensors[PERMUTATION] = form.permutation
    return tensors


def embedding_shapes(config: FmpqConfig, shapes: Shapes) -> dict[str, Stored]:
    """The tensors of a quantised embedding; none where it is left as it was."""
    if config.embedding_bits == 16:
        return {}
    columns = shapes.hidden_size
    return linear_shapes(EMBEDDING_MODULE, shapes.vocabulary, columns, _embedding_eight(config, columns))


def head_shapes(config: FmpqConfig, shapes: Shapes) -> dict[str, Stored]:
    """The tensors of a quantised output layer; none where it is left as it was."""
    if config.head is None:
        return {}
    wanted = linear_shapes(HEAD_MODULE, shapes.vocabulary, shapes.hidden_size, _head_eight(config))
    return wanted | ({PERMUTATION: ((shapes.hidden_size,), "I32")} if config.head.weight_bits == 4 else {})


def read_embedding(
    tensors: Mapping[str, torch.Tensor], config: FmpqConfig, shapes: Shapes, file: Path
) -> QuantisedLinear:
    """The embedding of a config that has quantised it. Raises CheckpointError naming file and tensor."""
    check_tensors(tensors, embedding_shapes(config, shapes), file)
    columns = shapes.hidden_size
    return read_linear(tensors, EMBEDDING_MODULE, columns, _embedding_eight(config, columns), file, "")


def read_head(tensors: Mapping[str, torch.Tensor], config: FmpqConfig, shapes: Shapes, file: Path) -> QuantisedSite:
    """The output layer of a config that has quantised it. Raises CheckpointError naming file and tensor."""
    if config.head is None:
        raise CheckpointError(f"{file}: the config says that the output layer is left as it was")
    check_tensors(tensors, head_shapes(config, shapes), file)
    permutation = tensors.get(PERMUTATION)
    if permutation is not None:
        check_permutation(permutation, str(file), PERMUTATION)
    form = InputForm(shapes.hidden_size, permutation, config.head.outlier_blocks, config.head.hadamard)
    return QuantisedSite(form, read_linear(tensors, HEAD_MODULE, shapes.hidden_size, _head_eight(config), file, ""))


def _embedding_eight(config: FmpqConfig, columns: int) -> int:
    return columns if config.embedding_bits == 8 else 0


def _head_eight(config: FmpqConfig) -> int:
    head = config.head
    return 0 if head is None else config.eight(head.outlier_blocks, head.weight_bits)


def _silent(_: str) -> None:
    """Nothing to warn of: without second moments, every weight is rounded to the nearest."""
