"""The C++ extension (csrc/). Addresses are `tensor.data_ptr()`; kernels/cpu.py checks what they point to."""

from collections.abc import Sequence

from weft.core.plan import Slice

def levels() -> list[str]:
    """The levels that this CPU can run, best first."""

def contenders(
    level: str, logits: int, size: int, peak: float, temperature: float, low: int, high: int
) -> list[int] | None:
    """See weft.kernels.race. None: more than 256. ValueError: a level that this CPU cannot run."""

class Memory:
    """Zeroed memory on huge pages where the kernel gives them; freed by `release` or with the object."""

    def __init__(self, bytes: int, backend: Backend) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def release(self) -> None: ...

class PackedLinear:
    """A packed weight [out, in] and its bias (address of `out` floats, or 0). type: 0 float32, 1 bfloat16."""

    def __init__(
        self, backend: Backend, weight: int, row_stride: int, bias: int, out: int, in_: int, type: int
    ) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def release(self) -> None: ...

class PackedW4Ax:
    """4-bit weights, and how their input is prepared. Addresses: values int8 [out, in], scales float32 and zeros int8
    [out, in / 128] (or 0), bias float32 [out] or 0, permutation int32 [in] or 0.

    wide_blocks: so many leading blocks keep 8 bits a weight; the values of the others are -8 to 7. general: scales are
    kept in 32 bits and zeros are subtracted; otherwise scales are kept in bfloat16, and there are no zeros.
    """

    def __init__(
        self,
        backend: Backend,
        values: int,
        scales: int,
        zeros: int,
        bias: int,
        permutation: int,
        out: int,
        in_: int,
        outlier_blocks: int,
        wide_blocks: int,
        hadamard: bool,
        exact_a4: bool,
        general: bool,
    ) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def wire_bytes(self) -> int:
        """Of one quantised row on its way between ranks (csrc/w4ax.h)."""
    def release(self) -> None: ...

class PackedEmbedding:
    """A table of `rows` token embeddings of `size` channels, copied. stored: 0 float32, 1 bfloat16, 2 int8, 3 int4 (as
    csrc/embedding.h has it). scales: address of float32 [rows, size / 128], or 0 for floats."""

    def __init__(self, backend: Backend, data: int, scales: int, rows: int, size: int, stored: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def release(self) -> None: ...

class LayerKv:
    """Zeroed keys and values of one layer, in the kernels' own layout. type: of the activations, 0 float32, 1 bfloat16.
    bits: 8 or 4 for codes (kernels/kv.py), 0 for the activations' type.

    ValueError: a block_size that is no multiple of 16, a head_dim that is no multiple of 8 or over 256.
    """

    def __init__(
        self, backend: Backend, blocks: int, block_size: int, kv_heads: int, head_dim: int, type: int, bits: int
    ) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Whole blocks to others. ValueError: one that is not there, or lists of different lengths."""
    def release(self) -> None: ...

class BatchView:
    """Addresses of a Batch's tensors (kernels/base.py); whoever makes it keeps them alive."""

    def __init__(
        self,
        rows: int,
        slices: int,
        table_width: int,
        positions: int,
        slots: int,
        starts: int,
        contexts: int,
        tables: int,
    ) -> None: ...

class Tables:
    """The block tables of a lane's last step, so that those that are still the same tuples are not read again."""

    def __init__(self) -> None: ...

class Program:
    """The calls of a step, recorded and replayed: see csrc/program.h. Places are bytes per row; `domain`: 0 rows of
    tokens, 1 rows that are sampled after. What is recorded must be kept alive."""

    def __init__(self, arena: int, max_rows: int, sampled_arena: int, max_sampled: int) -> None: ...
    def embed(self, table: PackedEmbedding, type: int, out: int) -> None: ...
    def norm(self, type: int, weight: int, eps: float, size: int, domain: int, x: int, residual: int, out: int) -> None:
        """residual: -1 for none."""

    def linear(self, packed: PackedLinear, domain: int, x: int, y: int, type: int) -> None: ...
    def quantise(self, packed: PackedW4Ax, domain: int, x: int, type: int, out: int) -> None: ...
    def norm_quantise(
        self,
        type: int,
        weight: int,
        eps: float,
        size: int,
        domain: int,
        x: int,
        residual: int,
        between: int,
        packed: PackedW4Ax,
        out: int,
    ) -> None:
        """A norm and `quantise` of what it gives in one pass, which writes `between`, too."""

    def silu_mul_quantise(
        self, type: int, domain: int, gate_up: int, size: int, between: int, packed: PackedW4Ax, out: int
    ) -> None: ...
    def multiply(self, packed: PackedW4Ax, domain: int, x: int, y: int, type: int) -> None: ...
    def rotary_write(
        self,
        kv: LayerKv,
        cos: int,
        sin: int,
        max_positions: int,
        heads: int,
        q_norm: int,
        k_norm: int,
        eps: float,
        qkv: int,
        q: int,
    ) -> None: ...
    def attention(self, kv: LayerKv, heads: int, scale: float, window: int, q: int, out: int) -> None: ...
    def silu_mul(self, type: int, domain: int, gate_up: int, size: int, out: int) -> None: ...
    def take(self, x: int, row_bytes: int, out: int) -> None: ...
    def seam(
        self,
        group: Seams,
        type: int,
        weight: int,
        eps: float,
        size: int,
        domain: int,
        x: int,
        residual: int,
        out: int,
    ) -> None:
        """A fused seam. A run that comes to it raises RuntimeError as `Seams.finish`."""

    def own_rows(self, group: Seams, x: int, row_bytes: int, out: int) -> None:
        """Of a value with all rows, this rank's own."""

    def take_own(self, group: Seams, residual: int, row_bytes: int, out: int) -> None:
        """Of a residual at a seam, the own rows that are sampled."""

    def best(self, x: int, size: int) -> None:
        """The number and the value of the greatest element of each sampled row: what a run returns."""

    def run(
        self,
        backend: Backend,
        slices: Sequence[Slice],
        tables: Tables,
        block_size: int,
        sampled: Sequence[int],
        first: int,
        last: int,
    ) -> list[tuple[int, float]]:
        """Calls [first, last). sampled: rows of the step. tables: the same one for all steps. ValueError: a step that
        does not fit into KV, tables or arenas; nothing was touched then."""

    def run_timed(
        self,
        backend: Backend,
        slices: Sequence[Slice],
        tables: Tables,
        block_size: int,
        sampled: Sequence[int],
        first: int,
        last: int,
    ) -> list[tuple[int, float]]:
        """The same, and adds to `seconds`."""

    @property
    def seconds(self) -> list[float]:
        """Of each call, over all timed runs."""

class Seams:
    """One rank of a group (csrc/seam.h). One thread at a time.

    ValueError: numbers that cannot be. RuntimeError: a rank that did not come in time, has ended, or has another plan.
    Nothing works after that.
    """

    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    def start(
        self,
        backend: Backend,
        plan: int,
        type: int,
        part_type: int,
        partial: int,
        bounds: list[int],
        residual: int,
        weight: int,
        eps: float,
        size: int,
        out: int,
        packed: PackedW4Ax | None,
    ) -> None:
        """plan: a fingerprint, the same on all ranks. What the addresses point to is used until `finish` has returned.
        out: hidden rows, or with `packed` quantised ones as `Backend.multiply_w4ax` takes them."""

    def finish(self, backend: Backend) -> None: ...
    def gather(self, backend: Backend, plan: int, rows: int, from_: int, bytes: int, out: int) -> None:
        """out: [ranks][bytes]."""

    def leave(self) -> None: ...

class SeamGroup(Seams):
    """Of the processes that share the memory `path`. RuntimeError: what the system or another rank refuses. spin:
    set it while nobody waits."""

    spin: float
    def __init__(self, path: str, rank: int, ranks: int, slot_bytes: int, timeout: float, spin: float) -> None: ...

class Links(Seams):
    """Of ranks that are joined by sockets (csrc/links.h). files: one for each rank (any number for this one), which are
    this object's from now on."""

    def __init__(self, rank: int, files: list[int], timeout: float) -> None: ...

class DistantSeams(Seams):
    """Other seams, each of which takes so many seconds longer: those of a link with more latency (csrc/distant.h)."""

    seconds: float
    def __init__(self, seams: Seams) -> None: ...

class SeamThread(Seams):
    """Other seams, carried out by a thread of its own on these cores (none: where its maker may run), in the order in
    which they were started: any number before the first is finished (csrc/seam_thread.h). `finish` is of the first."""

    def __init__(self, seams: Seams, cores: Sequence[int]) -> None: ...
    def set_cores(self, cores: Sequence[int]) -> None:
        """Where the thread runs from now on. ValueError: a core that it may not run on; after `leave`."""

class Backend:
    """The kernels of one level on one lane's threads: the calling one, and workers pinned to cores[1:].

    ValueError: a level that this CPU cannot run, a core that this process may not use. RuntimeError: after `close`.
    """

    def __init__(self, level: str, cores: list[int]) -> None: ...
    @property
    def threads(self) -> int: ...
    def set_cores(self, cores: list[int]) -> None: ...
    def close(self) -> None: ...
    def embed(self, table: PackedEmbedding, tokens: int, count: int, out: int, type: int) -> None:
        """tokens: int64 [count]. ValueError: a token that the table does not have."""

    def linear(self, packed: PackedLinear, x: int, rows: int, y: int, type: int) -> None: ...
    def quantise_w4ax(self, packed: PackedW4Ax, x: int, rows: int, type: int, quantised: int) -> None:
        """quantised: rows * in / 128 * 144 bytes: values int8 [in / 128, rows, 128], then scales float32 and the sums
        of the values int32, both [in / 128, rows]."""

    def multiply_w4ax(self, packed: PackedW4Ax, quantised: int, rows: int, y: int, type: int) -> None: ...
    def join_rows(
        self,
        type: int,
        part_type: int,
        parts: list[int],
        residual: int,
        weight: int,
        eps: float,
        rows: int,
        size: int,
        out: int,
        wire: int,
        packed: PackedW4Ax | None,
    ) -> None:
        """residual += the sum of the parts in their order; out = RMSNorm(residual). wire: 0, or where the rows are put
        as they travel: a copy of out, or with `packed` quantised for that."""

    def encode_rows(self, packed: PackedW4Ax, x: int, rows: int, type: int, wire: int) -> None:
        """wire: rows * packed.wire_bytes."""

    def decode_rows(self, packed: PackedW4Ax, wire: int, rows: int, quantised: int) -> None:
        """Back into what `quantise_w4ax` gives."""

    def probe_read(self, memory: Memory) -> None:
        """Reads all of it once."""
    def probe_multiply(self, type: int, steps: int) -> int:
        """Multiplies and adds in registers; returns the floating-point operations done."""
    def probe_integers(self, steps: int) -> int:
        """The same with integers of 8 bits."""

    def norm(self, type: int, x: int, residual: int, weight: int, eps: float, rows: int, size: int, out: int) -> None:
        """residual 0: out = RMSNorm(x). Otherwise residual += x, and out = RMSNorm(residual)."""

    def silu_mul(self, type: int, gate_up: int, rows: int, size: int, out: int) -> None:
        """gate_up [rows, 2 * size]."""

    def rotary_write(
        self,
        kv: LayerKv,
        batch: BatchView,
        qkv: int,
        cos: int,
        sin: int,
        max_positions: int,
        heads: int,
        q_norm: int,
        k_norm: int,
        eps: float,
        q: int,
    ) -> None:
        """q_norm and k_norm: 0 for none. ValueError: a slot outside of the KV, a position outside of cos and sin."""

    def attention(self, kv: LayerKv, batch: BatchView, q: int, heads: int, scale: float, window: int, out: int) -> None:
        """window: 0 for none. ValueError: a slice, context or block outside of its table or the KV."""
