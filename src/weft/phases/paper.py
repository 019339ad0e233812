"""`--partition paper`: the controller of semi-PD, Algorithm 1 with the constants of its public code, for comparison.

Faithful to the code rather than to the paper where they differ: the window counts finished requests, not iterations;
the scaling curves are fixed numbers, not fits; both targets missed means (100, 100), and nothing at all when one share
is 100 already; no share ever goes below the floor. The shares are soft caps that overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from weft.core.plan import Partition, Regime, Sharing
from weft.phases.observations import Decision, Finished, Observation, Queue, Targets

WHOLE = 100


@dataclass(frozen=True, slots=True)
class PaperState:
    """prefill, decode: shares in percent. window: (ttft, waited, tpot) of requests since the last decision."""

    prefill: int = WHOLE
    decode: int = WHOLE
    window: tuple[tuple[float, float, float], ...] = ()


def tpot_curve(share: float) -> float:
    """TPOT at a share, relative to the whole device. share: percent."""
    return 1.0 if share >= WHOLE else 0.610 * WHOLE / share + 0.415


def prefill_curve(share: float) -> float:
    """Prefill time without waiting, likewise."""
    return 1.0 if share >= WHOLE else 0.732 * WHOLE / share + 0.319


def waiting_curve(share: float) -> float:
    """Waiting time, likewise. It is not monotone where it is used; so it is in the code."""
    scale = WHOLE / share
    return 1.0 if share >= WHOLE else 1.405 * scale * scale - 3.159 * scale + 2.873


@dataclass(frozen=True, slots=True)
class PaperPolicy:
    """shares: units of the device that 100 percent are. window: requests; step: points; floor: percent."""

    targets: Targets
    shares: int
    window: int = 400
    percentile: float = 0.9
    step: int = 2
    most_steps: int = 3
    floor: int = 80
    tpot_margin: float = 1.1

    def start(self) -> PaperState:
        return PaperState()

    def first(self, now: float) -> Decision:
        """Both lanes start with the whole device."""
        return self._decision(PaperState(), now, "both shares start at 100%")

    def decide(
        self, state: PaperState, seen: tuple[Observation, ...], queue: Queue, now: float
    ) -> tuple[PaperState, Decision | None]:
        del queue  # this controller looks at what has ended only
        ended = tuple(
            (one.ttft, one.waited, one.tpot) for one in seen if isinstance(one, Finished) and one.tpot is not None
        )
        state = replace(state, window=state.window + ended)
        if len(state.window) < self.window:
            return state, None
        ttft, waited, _ = self._rank(sorted(state.window))
        tpot = self._rank(sorted(state.window, key=lambda one: one[2]))[2]
        prefill, decode, why = self._shares(state, ttft, waited, tpot)
        moved = replace(state, prefill=prefill, decode=decode, window=())
        if (prefill, decode) == (state.prefill, state.decode):
            return moved, None
        reason = (
            f"P{self.percentile * 100:.0f} TTFT {ttft:.3f} s (target {self.targets.ttft:g}) and TPOT {tpot:.4f} s "
            f"(target {self.targets.tpot:g}) of {len(state.window)} requests: {why}, {state.prefill}:{state.decode} to "
            f"{prefill}:{decode} percent"
        )
        return moved, self._decision(moved, now, reason)

    def _rank(self, values: list[tuple[float, float, float]]) -> tuple[float, float, float]:
        return values[min(int(self.percentile * len(values) + 1), len(values) - 1)]

    def _shares(self, state: PaperState, ttft: float, waited: float, tpot: float) -> tuple[int, int, str]:
        late = ttft > self.targets.ttft
        slow = tpot * self.tpot_margin > self.targets.tpot
        prefill, decode = state.prefill, state.decode

        def ttft_at(share: int) -> float:
            wait = waited * waiting_curve(share) / waiting_curve(state.prefill)
            return wait + (ttft - waited) * prefill_curve(share) / prefill_curve(state.prefill)

        def tpot_at(share: int) -> float:
            return tpot * tpot_curve(share) / tpot_curve(state.decode)

        if late and slow:
            alone = WHOLE not in (prefill, decode)
            return (WHOLE, WHOLE, "both miss") if alone else (prefill, decode, "both miss")
        if slow:
            if decode < WHOLE:
                for _ in range(self.most_steps):
                    if tpot_at(decode) * self.tpot_margin > self.targets.tpot:
                        decode = min(WHOLE, decode + self.step)
                return prefill, decode, "decode gets more"
            for _ in range(self.most_steps):
                if prefill - self.step >= self.floor and ttft_at(prefill - self.step) <= self.targets.ttft:
                    prefill -= self.step
            return prefill, decode, "prefill gets less"
        if late:
            if prefill < WHOLE:
                for _ in range(self.most_steps):
                    if ttft_at(prefill) > self.targets.ttft:
                        prefill = min(WHOLE, prefill + self.step)
                return prefill, decode, "prefill gets more"
            for _ in range(self.most_steps):
                lower = decode - self.step
                if lower >= self.floor and tpot_at(lower) * self.tpot_margin <= self.targets.tpot:
                    decode = lower
            return prefill, decode, "decode gets less"
        return prefill, decode, "both met"

    def _decision(self, state: PaperState, now: float, reason: str) -> Decision:
        units = [max(1, round(self.shares * share / WHOLE)) for share in (state.prefill, state.decode)]
        return Decision(now, Sharing(Regime.SPLIT, Partition(*units)), reason)
