"""A lane on a real GPU: recorded steps compute what others do, and the next one is launched before it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from weft.core.plan import Lane, Plan, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.cuda_forward import CudaForward
from weft.devices.cuda_lane import CudaLane
from weft.devices.cuda_streams import open_gpu
from weft.kernels.triton import TritonKernels
from weft.models.decoder import Decoder
from weft.models.families import read_config
from weft.models.loader import load_weights, move

pytestmark = pytest.mark.xdist_group("lane")  # one worker loads the model
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SEQUENCES, PROMPT, ROOM = 3, 20, 64
SLEEP = 2_000_000_000  # cycles of the device: about a second


class Model:
    """The quantised model, with keys and values in 4 bits."""

    def __init__(self, folder: Path) -> None:
        self.gpu = open_gpu()
        config, kernels = read_config(folder), TritonKernels(self.gpu.device)
        self.decoder = Decoder(
            config,
            move(load_weights(folder, config, kernels, torch.bfloat16, room=2**40), self.gpu.device),
            kernels,
            ROOM,
        )

    def forward(self, stream: Any, *, graphs: bool) -> CudaForward:
        kv = self.decoder.make_kv(SEQUENCES * ROOM // 16, 16, "int4")
        made = CudaForward(self.gpu, stream, self.decoder, kv, 16, max_slices=4, graphs=graphs)
        self.gpu.settle()  # what was made outside of the stream
        return made


@pytest.fixture(scope="module")
def model(quantised_model: Path) -> Model:
    return Model(quantised_model)


def slices(start: int, tokens: list[list[int]]) -> tuple[Slice, ...]:
    each = ROOM // 16
    return tuple(
        Slice(i, start, tuple(some), tuple(range(i * each, i * each + each)), Sampling(GREEDY, 0, start + len(some)))
        for i, some in enumerate(tokens)
    )


def prompts() -> list[list[int]]:
    return [[(11 * i + 7 * place) % 4096 for place in range(PROMPT)] for i in range(SEQUENCES)]


@torch.inference_mode()
def test_a_recorded_step_computes_what_an_eager_one_does(model: Model) -> None:
    found = []
    for graphs in (True, False):
        stream = model.gpu.stream()
        forward = model.forward(stream, graphs=graphs)
        with stream.use():
            forward.run(slices(0, prompts()), [PROMPT * (i + 1) - 1 for i in range(SEQUENCES)])
            steps = [
                forward.run(slices(PROMPT + step, [[step + i] for i in range(SEQUENCES)]), range(SEQUENCES)).clone()
                for step in range(5)
            ]
        stream.check()
        found.append(torch.stack(steps))
    assert torch.equal(found[0], found[1])
    assert found[0].isfinite().all() and len(found[0].unique()) > 1000


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_on_the_host(model: Model) -> None:
    stream = model.gpu.stream()
    lane = CudaLane(model.gpu, stream, model.decoder, model.forward(stream, graphs=True), 16)

    def step(number: int, start: int, tokens: list[list[int]]) -> Any:
        return lane.start(Plan(number, Lane.MIXED, slices(start, tokens)))

    def drawn(pending: Any) -> list[list[int]]:
        result = pending.finish()
        assert result.error is None
        return [[sampled.token] for sampled in result.sampled]

    tokens = drawn(step(1, 0, prompts()))
    tokens = drawn(step(2, PROMPT, tokens))  # kernels are compiled and graphs recorded by now
    stream.check()
    with stream.use():
        torch.cuda._sleep(SLEEP)
    pending = step(3, PROMPT + 1, tokens)  # was computed ahead; the step after it waits behind the sleep
    blocks = {block for piece in slices(PROMPT + 2, tokens) for block in piece.blocks}
    (guessed,) = lane.writing(blocks)
    assert not guessed.reached()
    tokens = drawn(pending)
    following = step(4, PROMPT + 2, tokens)
    (launch,) = following.launches
    assert launch.done is guessed  # what was launched without its tokens is the answer
    ahead = drawn(following)

    alone = CudaLane(model.gpu, stream, model.decoder, model.forward(stream, graphs=False), 16)
    tokens = prompts()
    for number, start in enumerate((0, PROMPT, PROMPT + 1, PROMPT + 2)):
        plan = Plan(number, Lane.MIXED, slices(start, tokens))
        tokens = drawn(alone.start(plan, ahead=False))
    assert ahead == tokens


def test_a_guess_that_was_wrong_is_thrown_away(model: Model) -> None:
    stream = model.gpu.stream()
    lane = CudaLane(model.gpu, stream, model.decoder, model.forward(stream, graphs=True), 16)
    first = lane.start(Plan(1, Lane.MIXED, slices(0, prompts()))).finish()
    tokens = [[sampled.token] for sampled in first.sampled]
    lane.start(Plan(2, Lane.MIXED, slices(PROMPT, tokens))).finish()
    other = tuple(piece._replace(tokens=(1,)) for piece in slices(PROMPT + 1, tokens))
    found = lane.start(Plan(3, Lane.MIXED, other)).finish()
    again = lane.start(Plan(4, Lane.MIXED, other), ahead=False).finish()
    assert found.sampled == again.sampled
