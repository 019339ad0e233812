"""What weaving costs and hides on one GPU: products in two halves, and seams beside them on a second stream.

    python benchmarks/weave_gpu.py [--quick] [--json FILE] [--plot FILE] [--only NAME] [--dry-run]

One GPU can show all of it but the links. Layers have the shapes that one rank of several has, and random weights; there
is no attention. A seam is the real kernel (kernels/triton_seam.py, 8 thread blocks) of a group of one: it reads partial
sums and the residual and writes the residual and hidden rows in this GPU's memory, in the time that this takes, which
stands for that of a link. Rows:

* split: a layer's products of all tokens, against those of two parts: cut where weave/split.py does, and a few rows
  beside the middle. The tax is what the parts take longer.
* drag: products of one half beside a seam of the other half: what they take longer than the longer of them alone, of
  the shorter (weave/choice.py): 0 if the shorter is hidden, 1 if they might as well follow one another.
* woven: some layers with all their seams: one strand and two strands, launched and from graphs.

Claims: wave_tax_percent, the worst of BF16 at 1024 tokens and more, cut as weft does; seam_drag, the median;
woven_standin_gain, one strand over two, both from graphs, the worst at 2048 tokens and more.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import common
import torch

EPS = 1e-5
TOKENS, QUICK_TOKENS, DRY_TOKENS = (512, 1024, 2048, 4096, 8192), (1024, 4096), (12,)
ROUNDS, QUICK_ROUNDS = 15, 5
LAYERS = 4
BESIDE = 37  # rows beside the middle
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A rank's part of a layer: (outputs, inputs) of its products."""

    name: str
    hidden: int
    attend: tuple[tuple[int, int], ...]
    feed: tuple[tuple[int, int], ...]


def rank_of(name: str, hidden: int, heads: int, kv_heads: int, inner: int, ranks: int, head_dim: int = 128) -> Shape:
    own, both = heads * head_dim // ranks, (heads + 2 * kv_heads) * head_dim // ranks
    return Shape(
        f"{name}, one of {ranks}",
        hidden,
        ((both, hidden), (hidden, own)),
        ((2 * inner // ranks, hidden), (hidden, inner // ranks)),
    )


SHAPES = (rank_of("70B", 8192, 64, 8, 28672, 8), rank_of("8B", 4096, 32, 8, 14336, 2))
TINY = (rank_of("tiny", 128, 4, 2, 256, 1, head_dim=32),)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="rows with this in their name")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes and interpreted kernels: shows that it runs"
    )
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, below
    from weft.devices.cuda_streams import open_gpu
    from weft.errors import DeviceError

    try:
        gpu = open_gpu()
    except DeviceError as error:
        raise SystemExit(f"weave_gpu.py: nothing measured: {error}") from error
    gpu.adopt()
    rows: list[Row] = []
    for name, measure in cases(gpu, arguments):
        if arguments.only is None or arguments.only in name:
            try:
                row = measure()
            except Exception as error:  # the others are worth having
                row = {"error": f"{type(error).__name__}: {error}"}
            rows.append({"name": name, **row})
            common.say(f"{name}: {row}")
            common.write_json(arguments, claims(rows), rows, ["not finished"])
    print(gpu.name, "\n")
    keys = ("tax_percent", "tax_beside_percent", "drag", "gain", "gain_graph")
    print(common.table(["", *keys], [[row["name"], *(_cell(row.get(key)) for key in keys)] for row in rows]), "\n")
    if arguments.plot is not None:
        _plot(arguments, rows)
    common.report(arguments, claims(rows), rows, [gpu.name])
    if failed := [row for row in rows if "error" in row]:
        raise SystemExit("\n".join(f"FAILED {row['name']}: {row['error']}" for row in failed))


def cases(gpu: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    rounds = 1 if arguments.dry_run else QUICK_ROUNDS if arguments.quick else ROUNDS
    sizes = DRY_TOKENS if arguments.dry_run else QUICK_TOKENS if arguments.quick else TOKENS
    for shape in TINY if arguments.dry_run else SHAPES[:1] if arguments.quick else SHAPES:
        for units in ("BF16", "W4A8"):
            layer: list[Layer] = []

            def made(shape: Shape = shape, units: str = units, layer: list[Layer] = layer) -> Layer:
                """In memory while its rows are measured."""
                if not layer:
                    layer.append(Layer(gpu, shape, units, rounds))
                return layer[0]

            for tokens in sizes:
                of = f"{shape.name}, {units}, {tokens}"
                yield f"split {of}", lambda made=made, tokens=tokens: made().split(tokens)
                yield f"drag {of}", lambda made=made, tokens=tokens: made().drag(tokens)
                yield f"woven {of}", lambda made=made, tokens=tokens: made().woven(tokens)
            layer.clear()


class Layer:
    """A rank's layer of random weights, and what is measured of it."""

    def __init__(self, gpu: Any, shape: Shape, units: str, rounds: int) -> None:
        from weft.devices.cuda_ranks import waves_of
        from weft.kernels.triton import TritonKernels
        from weft.weave.split import Waves

        self.gpu, self.shape, self.rounds = gpu, shape, rounds
        real = gpu.device.type == "cuda"
        self.waves = waves_of([*shape.attend, *shape.feed], gpu.sms) if real else Waves(4)
        self.kernels = TritonKernels(gpu.device)
        self.stream = gpu.stream()
        self.attend = [self._packed(units, *size) for size in shape.attend]
        self.feed = [self._packed(units, *size) for size in shape.feed]
        self.norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=gpu.device)

    def split(self, tokens: int) -> Row:
        from weft.weave.split import choose_cut

        cut, beside = choose_cut([tokens], self.waves), tokens // 2 + min(BESIDE, tokens // 4)

        def parts(at: int) -> Callable[[], None]:
            halves = [self._rows(count) for count in (at, tokens - at) if count]
            return lambda: [self._stages(half) for half in halves] and None

        whole, cuts, others = self._seconds([parts(tokens), parts(cut), parts(beside)])
        return {
            "tokens": tokens,
            "cut": cut,
            "whole": common.Figure.of(whole),
            "tax_percent": _tax(whole, cuts),
            "tax_beside_percent": _tax(whole, others),
        }

    def drag(self, tokens: int) -> Row:
        from weft.weave.streams import SideStream

        half = -(-tokens // 2)
        hidden, collective = self._rows(half), self._collective(half)
        side = SideStream(collective, self.gpu.device)
        join = self._join(half)

        def products() -> None:
            self._run(self.feed, hidden)

        def both() -> None:
            pending = side.start(join)
            products()
            side.finish(pending)

        alone, seam, together = (
            statistics.median(one)
            for one in self._seconds([products, lambda: collective.finish(collective.start(join)) and None, both])
        )
        longer, shorter = max(alone, seam), min(alone, seam)
        return {"tokens": tokens, "products": alone, "seam": seam, "drag": (together - longer) / max(shorter, 1e-9)}

    def woven(self, tokens: int) -> Row:
        from weft.weave.split import choose_cut
        from weft.weave.streams import SideStream
        from weft.weave.weaver import Weaver

        cut, collective = choose_cut([tokens], self.waves), self._collective(tokens)
        side = SideStream(collective, self.gpu.device)

        def work(counts: list[int], by: Any) -> Callable[[], None]:
            batches = [self._rows(count) for count in counts if count]
            return lambda: Weaver(by, self._begin).weave([self._strand(rows) for rows in batches]) and None

        one, two = work([tokens], collective), work([cut, tokens - cut], side)
        self.gpu.settle()  # what they read was made on another stream
        graphs = [self.stream.capture(work) for work in (one, two)]  # launches of one strand must not be in its time
        fused, woven, fused_graph, graph = self._seconds([one, two, *graphs])
        return {
            "tokens": tokens,
            "cut": cut,
            "one strand": common.Figure.of(fused),
            "gain": statistics.median(fused) / max(statistics.median(woven), 1e-9),
            "gain_graph": statistics.median(fused_graph) / max(statistics.median(graph), 1e-9),
        }

    def _begin(self, seam: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kernels.rms_norm(seam.partial, seam.weight, seam.eps), seam.partial

    def _strand(self, hidden: torch.Tensor) -> Any:
        from weft.weave.seam import Seam

        hidden, residual = yield Seam(hidden, None, self.norm, EPS)
        for _ in range(LAYERS):
            for weights in (self.attend, self.feed):
                hidden, residual = yield Seam(self._run(weights, hidden), residual, self.norm, EPS)
        return hidden

    def _stages(self, hidden: torch.Tensor) -> None:
        self._run(self.attend, hidden)
        self._run(self.feed, hidden)

    def _run(self, weights: list[Any], hidden: torch.Tensor) -> torch.Tensor:
        """Two products; what is between them (attention, or the gate) is left out, but for its width."""
        first, second = weights
        wide = self.kernels.linear(hidden, first)
        return self.kernels.linear(wide[:, : self._inputs(second)].contiguous(), second)

    def _inputs(self, second: Any) -> int:
        return self.shape.attend[1][1] if second is self.attend[1] else self.shape.feed[1][1]

    def _rows(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.shape.hidden, device=self.gpu.device).bfloat16()

    def _packed(self, units: str, outputs: int, inputs: int) -> Any:
        if units == "BF16":
            return self.kernels.pack_linear((torch.randn(outputs, inputs, device=self.gpu.device) * 0.02).bfloat16())
        values = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, device=self.gpu.device)
        scales = (torch.rand(outputs, inputs // 128, device=self.gpu.device) * 0.01).bfloat16().float()
        return self.kernels.pack_w4ax(values, scales, outlier_blocks=max(1, inputs // 1280), hadamard=True)

    def _collective(self, most: int) -> Any:
        from weft.weave.symmetric import Layout, Region, SymmetricCollective

        layout = Layout(1, most, self.shape.hidden, torch.bfloat16, room=16)
        memory = torch.zeros(layout.bytes, dtype=torch.uint8, device=self.gpu.device)
        return SymmetricCollective(Region(memory, (memory.data_ptr(),)), 0, layout, timeout=5.0)

    def _join(self, count: int) -> Any:
        from weft.weave.collective import Join

        return Join(self._rows(count), self._rows(count), self.norm, EPS, (0, count))

    def _seconds(self, works: list[Callable[[], None]]) -> list[list[float]]:
        """Of each, round by round, taking turns; the first time does not count."""
        self.gpu.settle()
        marks: list[list[tuple[Any, Any]]] = [[] for _ in works]
        with self.stream.use(), torch.inference_mode():
            for turn in range(self.rounds + 1):
                for work, found in zip(works, marks, strict=True):
                    began = self.stream.mark()
                    work()
                    if turn:
                        found.append((began, self.stream.mark()))
        self.stream.check()
        return [[done.seconds_since(began) for began, done in found] for found in marks]


def claims(rows: list[Row]) -> dict[str, float]:
    found = {
        "wave_tax_percent": (max, _values(rows, "split", "tax_percent", 1024, "BF16")),
        "seam_drag": (statistics.median, _values(rows, "drag", "drag", 0)),
        "woven_standin_gain": (min, _values(rows, "woven", "gain_graph", 2048)),
    }
    return {name: fold(values) for name, (fold, values) in found.items() if values}


def _values(rows: list[Row], kind: str, key: str, least: int, units: str = "") -> list[float]:
    return [
        row[key]
        for row in rows
        if row["name"].startswith(kind) and units in row["name"] and row.get("tokens", -1) >= least
    ]


def _tax(whole: list[float], parts: list[float]) -> float:
    return 100 * (statistics.median(parts) / max(statistics.median(whole), 1e-9) - 1)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _plot(arguments: argparse.Namespace, rows: list[Row]) -> None:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(9, 4), layout="constrained")
    left, right = picture.subplots(1, 2)
    for axes, kind, key, title in (
        (left, "split", "tax_percent", "split tax, %"),
        (right, "woven", "gain_graph", "gain"),
    ):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["name"].startswith(kind) and key in row:
                lines.setdefault(row["name"].removeprefix(kind).rpartition(",")[0], []).append(
                    (row["tokens"], row[key])
                )
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", xlabel="tokens", title=title)
        axes.legend(fontsize="small")
    picture.savefig(arguments.plot)


if __name__ == "__main__":
    main()
