"""How many bits weights, activations and the KV cache have, and on what arithmetic their products run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from weft.errors import ConfigError
from weft.sim.gemm import Operands
from weft.sim.hardware import Gpu, Part

# A scale and a zero point of 16 bits for every 128 elements.
SCALES = 32 / 128
# The part of activations with outliers that COMET keeps in 8 bits (paper section 3; 16 % on average).
OUTLIERS = 0.16


@dataclass(frozen=True, slots=True)
class Precision:
    """weights, inputs, kv: bits of an element in memory, scales included. arithmetic: of the products, one of a GPU's.
    outliers: the part of the inputs that is computed in int8 instead."""

    name: str
    weights: float
    inputs: float
    arithmetic: str
    kv: float = 16
    outliers: float = 0.0

    @property
    def operands(self) -> Operands:
        return Operands(self.inputs, self.weights)

    def part(self, gpu: Gpu, share: float, rival: float) -> Part:
        """What a lane has of the GPU for products in this precision."""
        part = gpu.part(share, rival, self.arithmetic)
        if not self.outliers:
            return part
        time = (1 - self.outliers) / part.speed + self.outliers / gpu.speed("int8")
        return replace(part, speed=1 / time)


PRECISIONS = {
    one.name: one
    for one in (
        Precision("bf16", 16, 16, "bf16"),
        Precision("fp16", 16, 16, "bf16"),
        Precision("fp8", 8, 8, "fp8"),
        Precision("w8a8", 8, 8, "int8"),
        Precision("w4a16", 4 + SCALES, 16, "bf16"),
        Precision("w4a8", 4 + SCALES, 8, "int8"),
        Precision("w4a4", 4 + SCALES, 4 + SCALES, "int4"),
        Precision("w4ax", 4 + SCALES, 4 + 4 * OUTLIERS + SCALES, "int4", outliers=OUTLIERS),
    )
}
KV = {16: 16.0, 8: 8 + SCALES, 4: 4 + SCALES}


def find_precision(name: str, kv_bits: int = 16) -> Precision:
    """kv_bits: 16, 8 or 4. Raises ConfigError naming what there is."""
    if name not in PRECISIONS:
        raise ConfigError(f"no precision is called {name!r}; there are {', '.join(PRECISIONS)}")
    if kv_bits not in KV:
        raise ConfigError(f"kv_bits is {kv_bits}; it must be one of {', '.join(map(str, KV))}")
    return replace(PRECISIONS[name], kv=KV[kv_bits])
