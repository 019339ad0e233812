"""`--partition auto`: shares the device in the way that is predicted to miss the fewest targets.

The ways: one lane for both phases with chunked prefill (steps as long as answers have time for within the TPOT target,
or as large as the device takes them), turns, and any split that the device allows. The step law is fitted from every
step; shares that were not seen are tried for a moment, but only while there are misses to be saved. A change must save
enough (hysteresis), and no change comes soon after another (dwell).

Prompts wait in the order of arrival. One that could not make the TTFT target any more, when it comes or when its turn
has come, is put back: it would make others late and gain nothing. Where nothing meets both targets, the declared
policy: decode keeps its target, prompts are put back by their size, so that short ones go first and long ones get their
turn, and one that could not make its deadline even so is refused, if that was allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from weft.core.plan import Partition, Regime, Sharing
from weft.phases.forecast import FILLS, Limits, Load, Outlook, candidates, cost, of_prompts, outlook
from weft.phases.history import kept, likely_output, rate, recent
from weft.phases.latency import StepModel, TtftModel, TtftSample, Unfit, drift, fit_one_share, fit_steps, fit_ttft
from weft.phases.observations import Arrived, Decision, Finished, FirstToken, Observation, Queue, Stepped, Targets

# Kept: times to a first token, and requests that ended.
FIRSTS_MOST, OUTPUTS = 200, 24
# Steps of so many seconds tell how fast the device is just now.
NOW = 1.0
# After so many seconds without a step the device has rested: what is known of it is no older than before.
REST = 1.0
# A change has to save so many misses within the horizon, and such a part of them. Forecasts of one regime err alike, so
# that they can be compared closely; those of two regimes do not.
SAVES, SAVES_PART, SAVES_REGIME = 0.5, 0.1, 0.5
# A regime in which no more than this part of the last requests has missed a target is left alone.
WELL = 0.05
# Shares of the prefill lane for trying out. One trial shows two shares, for the law is one for both lanes.
TRIALS = (1 / 4, 1 / 3, 2 / 3, 3 / 4)
# So many misses within the horizon are worth a trial, and so many trials are made at most.
TRIAL_WORTH, TRIALS_MOST = 2.0, 12
# Before so many requests have come, what is predicted of the load is no reason for a trial.
TRIAL_ARRIVALS = 8
# Seconds that a second of a prompt's own computing time puts it back in the queue, under overload.
ORDER = 4.0
# A prompt that would have its first token after this part of the TTFT target lets others pass, for so many targets.
HOLD, BACK = 0.9, 30.0
# What is told anew when it has changed by such a part.
HOLD_CHANGES = 0.15
# A target that more than this part of the requests misses is out of reach; both are, when even the best way of sharing
# has that part of them miss one or the other.
OUT_OF_REACH, HOPELESS = 0.5, 0.5
# For so many seconds it has to look like that, or no more, before that is believed: a device that others use, too, can
# be slow for a moment, and who is refused then does not come back.
BELIEVED = 2.0
# What it begins with is such a part of the largest chunk: a long step hurts those that decode at once.
FIRST_CHUNK = 8
# Where memory is taken to be full until it is known: with half of the device, as on most of those that were measured.
LIKELY_SATURATION = 0.5


EMPTY = Queue()


@dataclass(frozen=True, slots=True)
class AutoState:
    """sharing: in force since `since`. overload: whether the declared policy holds. looks: whether it looks as if it
    should, since `turned`. tried: trials so far.
    hold: what the last decision said of it. ended: the last requests that did. fit: the step law of the last minute;
    model: as fast as the device is now."""

    sharing: Sharing
    since: float = 0.0
    trial: bool = False
    tried: int = 0
    overload: bool = False
    looks: bool = False
    turned: float = 0.0
    hold: int | None = None
    fitted: float = -1e9
    steps: tuple[Stepped, ...] = ()
    arrivals: tuple[Arrived, ...] = ()
    firsts: tuple[TtftSample, ...] = ()
    ended: tuple[Finished, ...] = ()
    fit: StepModel | None = None
    model: StepModel | None = None
    ttft: TtftModel | None = None


@dataclass(frozen=True, slots=True)
class AutoPolicy:
    """dwell: seconds between changes. refit: seconds between fits. trial: seconds that a share is tried.
    shed: whether prompts that cannot make the TTFT target may be refused."""

    targets: Targets
    device: Limits
    shed: bool = False
    dwell: float = 0.5
    refit: float = 5.0
    trial: float = 1.0

    @property
    def _whole(self) -> Partition:
        return Partition(self.device.shares, self.device.shares)

    @property
    def _back(self) -> float:
        return BACK * self.targets.ttft

    def start(self) -> AutoState:
        chunk = max(1, self.device.chunk // FIRST_CHUNK)
        return AutoState(Sharing(Regime.MIXED, self._whole, chunk, tpot=FILLS[-1] * self.targets.tpot))

    def first(self, now: float) -> Decision:
        return Decision(now, self.start().sharing, "one lane for both phases until there is something to go by")

    def decide(
        self, state: AutoState, seen: tuple[Observation, ...], queue: Queue, now: float
    ) -> tuple[AutoState, Decision | None]:
        rest = resting(state, seen)
        state = self._learn(state, seen, now)
        afresh = rest >= REST and state.overload
        state, decision = self._afresh(state, now) if afresh else self._choose(state, queue, now)
        return self._hold(state, decision, queue, now)

    def _afresh(self, state: AutoState, now: float) -> tuple[AutoState, Decision]:
        """The device has had nothing to do: whatever was too much for it is over, and what comes now begins anew."""
        sharing = self.start().sharing
        state = replace(state, sharing=sharing, since=now, trial=False, overload=False, looks=False, turned=now)
        return state, Decision(now, sharing, "one lane for both phases again, since the device had nothing to do")

    def _choose(self, state: AutoState, queue: Queue, now: float) -> tuple[AutoState, Decision | None]:
        model, load = state.model, self._load(state, now, queue)
        if model is None or now - state.since < (self.trial if state.trial else self.dwell):
            return state, None
        if not (queue.waiting or queue.decoding):
            return state, None  # nothing to decide for
        here = self._outlook(state.sharing, state, load, queue, now)
        if here.score < SAVES and not (state.trial or state.overload):
            return replace(state, looks=False), None  # nothing that could be saved is worth a change
        well = not state.trial and self._well(state, queue, now)
        options = [
            self._outlook(one, state, load, queue, now)
            for one in self._options(state, model, load, queue)
            if not well or one.regime is state.sharing.regime
        ]
        if not options:
            return state, None  # of other shares in a regime that is to be left alone nothing is known
        known = min(one.score for one in options)
        trial = None if well else self._trial(state, model, here, known, load, queue, now)
        if trial is not None:
            return trial
        looks = min(one.part for one in options) > HOPELESS
        if looks is not state.looks:
            state = replace(state, looks=looks, turned=now)
        overload = looks if now - state.turned >= BELIEVED else state.overload
        best = self._best(options, overload, load)
        saved = here.score - best.score
        part = SAVES_PART if best.sharing.regime is state.sharing.regime else SAVES_REGIME
        better = saved > max(SAVES, part * here.score) or (overload and self._protects(here, best))
        if not (better or state.trial or overload is not state.overload):
            return state, None
        if not better and not state.trial:
            best = here
        return self._change(state, model, best, here, overload, load, now)

    # -- what is known -------------------------------------------------------------------------------------------

    def _learn(self, state: AutoState, seen: tuple[Observation, ...], now: float) -> AutoState:
        steps = [one for one in seen if isinstance(one, Stepped)]
        state = rested(state, steps)
        arrivals = recent([*state.arrivals, *(one for one in seen if isinstance(one, Arrived))], now)
        state = replace(state, arrivals=tuple(arrivals))
        load = self._load(state, now)
        firsts = list(state.firsts)
        if state.model is not None:
            whole = self._speed(state.model, load)
            here = self._outlook(state.sharing, state, load, EMPTY, now)
            for one in seen:
                # Fresh only: of requests that came after the last change.
                if isinstance(one, FirstToken) and one.arrived >= state.since:
                    share, used = min(1.0, here.speed / whole), load.rate * load.prompt / whole
                    firsts.append(TtftSample(one.at, share, used, one.ttft))
        state = replace(
            state,
            firsts=tuple(firsts[-FIRSTS_MOST:]),
            steps=kept(state.steps, steps),
            ended=(state.ended + tuple(one for one in seen if isinstance(one, Finished)))[-OUTPUTS:],
        )
        tried = state.trial and now - state.since >= self.trial  # what a trial has shown is wanted at once
        if tried or state.fit is None or now - state.fitted >= self.refit:
            state = self._fit(state, now)
        if state.fit is None or not steps:
            return state
        newest = [one for one in state.steps if one.at > state.steps[-1].at - NOW]
        return replace(state, model=state.fit.scaled(drift(state.fit, newest)))

    def _fit(self, state: AutoState, now: float) -> AutoState:
        found = fit_steps(state.steps, now)
        if isinstance(found, Unfit):
            found = fit_one_share(state.steps, now)
        if isinstance(found, Unfit):
            return state
        ttft = fit_ttft(state.firsts, now)
        return replace(state, fit=found, model=found, ttft=ttft if isinstance(ttft, TtftModel) else None, fitted=now)

    def _well(self, state: AutoState, queue: Queue, now: float) -> bool:
        """Whether those who ended lately met their targets, and those who wait have not missed theirs yet."""
        late = sum(now - arrived > self.targets.ttft for arrived, _ in queue.waiting)
        missed = late + sum(
            one.ttft > self.targets.ttft or (one.tpot or 0.0) > self.targets.tpot for one in state.ended
        )
        return bool(state.ended) and missed <= WELL * (len(state.ended) + len(queue.waiting))

    def _load(self, state: AutoState, now: float, queue: Queue = EMPTY) -> Load:
        """Of the same requests how often they come and how long they are, so that a change shows in both at once."""
        output = likely_output([one.output for one in state.ended], [done for _, done in queue.answers])
        return Load(rate(state.arrivals, now), tuple(one.tokens for one in state.arrivals), output)

    def _speed(self, model: StepModel, load: Load) -> float:
        """Tokens of prompts per second on the whole device."""
        return self.device.chunk / of_prompts(model, self.device.chunk, load.prompt)

    # -- what to do ----------------------------------------------------------------------------------------------

    def _options(self, state: AutoState, model: StepModel, load: Load, queue: Queue) -> list[Sharing]:
        found = list(candidates(model, self.targets, queue, load, self.device, state.sharing.size_weight))
        if len(model.shares) < 2:
            # Of shares that were never seen there is nothing to say; turns and chunks need none.
            return [one for one in found if one.regime is not Regime.SPLIT]
        # The law bends where shares are small: no further below those that were seen than a twelfth.
        least = min(model.shares) - 1.01 / 12
        found = [
            one
            for one in found
            if one.regime is not Regime.SPLIT
            or min(one.partition.prefill, one.partition.decode) / self.device.shares >= least
        ]
        return found

    def _outlook(self, sharing: Sharing, state: AutoState, load: Load, queue: Queue, now: float) -> Outlook:
        model = state.model or StepModel(0.0, 1e-3, 0.0, 0.0)
        return outlook(sharing, model, state.ttft, load, queue, self.targets, self.device, now)

    def _trial(
        self, state: AutoState, model: StepModel, here: Outlook, known: float, load: Load, queue: Queue, now: float
    ) -> tuple[AutoState, Decision] | None:
        """A split that was not seen yet, while both phases have work and there are misses to be saved. Of those that
        show the curve, the one that looks best so far; none where all look worse than what is known, whose best score
        is `known`."""
        units = self.device.shares
        if state.trial or len(model.shares) >= min(3, units) or here.misses < TRIAL_WORTH or units < 2:
            return None
        if not (queue.waiting and queue.decoding) or state.tried >= TRIALS_MOST:
            return None
        if len(state.arrivals) < TRIAL_ARRIVALS:
            return None
        parts = sorted({max(1, min(units - 1, round(units * part))) for part in TRIALS})
        splits = [Sharing(Regime.SPLIT, Partition(one, units - one), None, state.sharing.size_weight) for one in parts]
        likely = replace(state, model=_likely(model))
        scores = {one: self._outlook(one, likely, load, queue, now).score for one in splits}
        splits.sort(key=scores.__getitem__)
        if scores[splits[0]] >= known:
            return None
        sharing = splits[state.tried % len(splits)]
        reason = (
            f"{here.misses:.1f} misses are predicted, and step times are known at {len(model.shares)} share"
            f"{'s' if len(model.shares) > 1 else ''} only: a trial of {words(sharing, self.device.shares)}"
        )
        state = replace(state, sharing=sharing, since=now, trial=True, tried=state.tried + 1)
        return state, Decision(now, sharing, reason)

    def _best(self, options: list[Outlook], overload: bool, load: Load) -> Outlook:
        """Of ways that can compute what comes in, while there are any: the others' queue grows for ever (the paper's
        x > lambda)."""
        if overload:
            safe = [one for one in options if one.slow <= OUT_OF_REACH]
            if safe:  # decode keeps its target; of those, what serves prompts fastest
                return max(safe, key=lambda one: one.speed)
            return min(options, key=lambda one: one.tpot)
        stable = [one for one in options if one.speed > load.rate * load.prompt]
        return min(stable or options, key=lambda one: one.score)

    def _protects(self, here: Outlook, best: Outlook) -> bool:
        if best.slow <= OUT_OF_REACH < here.slow:
            return True
        return best.slow <= OUT_OF_REACH and best.speed > here.speed * (1.0 + SAVES_PART)

    def _hold(
        self, state: AutoState, decision: Decision | None, queue: Queue, now: float
    ) -> tuple[AutoState, Decision | None]:
        """How much a new prompt may find before it, beside the decision or, where it has changed enough, as one."""
        if state.model is None:
            return state, decision
        if state.trial:  # over before a prompt that comes now has its turn
            if decision is not None:
                decision = replace(decision, hold=state.hold, within=HOLD * self.targets.ttft, back=self._back)
                decision = replace(decision, cost=cost(state.model))
            return state, decision
        here = self._outlook(state.sharing, state, self._load(state, now, queue), queue, now)
        hold = max(1, int(HOLD * self.targets.ttft * here.speed))
        if decision is None:
            if state.hold is not None and abs(hold - state.hold) < HOLD_CHANGES * state.hold:
                return state, None
            reason = f"{words(state.sharing, self.device.shares)} goes on, at {here.speed:.0f} tokens of prompts/s"
            decision = Decision(now, state.sharing, reason)
        within = HOLD * self.targets.ttft
        decision = replace(decision, hold=hold, within=within, back=self._back, shed=self.shed and state.overload)
        ttft = here.ttft if math.isfinite(here.ttft) else None
        return replace(state, hold=hold), replace(decision, cost=cost(state.model), ttft=ttft, tpot=here.tpot)

    def _change(
        self,
        state: AutoState,
        model: StepModel,
        best: Outlook,
        here: Outlook,
        overload: bool,
        load: Load,
        now: float,
    ) -> tuple[AutoState, Decision | None]:
        # In the order of arrival while all can be in time: that is the order of their deadlines. Otherwise shortest
        # first: a second of its own computing time puts a prompt back by a few seconds of waiting.
        weight = ORDER / self._speed(model, load) if overload else 0.0
        sharing = replace(best.sharing, size_weight=weight)
        moved = replace(state, sharing=sharing, since=now, trial=False, overload=overload)
        if replace(sharing, size_weight=0.0) == replace(state.sharing, size_weight=0.0) and overload is state.overload:
            return replace(moved, sharing=state.sharing), None
        reason = (
            f"{words(sharing, self.device.shares)}: predicted TTFT {best.ttft:.3f} s (target {self.targets.ttft:g}), "
            f"TPOT {best.tpot:.4f} s (target {self.targets.tpot:g}), {best.misses:.1f} misses in 10 s instead of "
            f"{here.misses:.1f}; {load.rate:.2f} requests/s of {load.prompt:.0f} tokens"
        )
        if overload:
            reason = f"both targets are out of reach, so decode keeps its own and prompts go shortest first: {reason}"
        return moved, Decision(now, sharing, reason)


def _likely(model: StepModel) -> StepModel:
    """The law of one share, with memory that saturates where it mostly does, and the same on the whole device."""
    if model.saturation is not None:
        return model
    base, slot = model.base * LIKELY_SATURATION, model.slot * LIKELY_SATURATION
    return replace(model, base=base, slot=slot, saturation=LIKELY_SATURATION)


def words(sharing: Sharing, shares: int) -> str:
    """A way of sharing, for people."""
    prefill, decode = sharing.partition.prefill, sharing.partition.decode
    if sharing.regime is Regime.MIXED and sharing.tpot is not None:
        return f"one lane, {1e3 * sharing.tpot:.3g} ms for each token of an answer, {sharing.chunk} tokens in a step"
    if sharing.regime is Regime.MIXED:
        return f"one lane, chunks of {sharing.chunk} tokens"
    if sharing.regime is Regime.TURNS:
        return f"turns, {prefill}:{decode} of the time"
    return f"split, {prefill}:{decode} of {shares}"


def resting(state: AutoState, seen: Iterable[Observation]) -> float:
    """Seconds between the last step that is known and the first new one in which the device had nothing to do."""
    first = next((one for one in seen if isinstance(one, Stepped)), None)
    return first.at - first.seconds - state.steps[-1].at if state.steps and first is not None else 0.0


def rested(state: AutoState, new: list[Stepped]) -> AutoState:
    """The state without the time in which the device had nothing to do: neither drift nor forgetting goes on then."""
    rest = resting(state, new)
    if rest < REST:
        return state
    steps = tuple(replace(one, at=one.at + rest) for one in state.steps)
    firsts = tuple(replace(one, at=one.at + rest) for one in state.firsts)
    return replace(state, steps=steps, firsts=firsts, fitted=state.fitted + rest)
