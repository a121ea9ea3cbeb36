"""Losses and gradients that are not as they should be: found by the metrics of a step, and what the
run was told to do about them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jspeed.core.errors import AnomalyError, JspeedError, ModelError
from jspeed.engine.overflow import note_overflow

if TYPE_CHECKING:
    from jspeed.config.sections_run import AnomaliesConfig, Policy

# Of a normal distribution the standard deviation is so many times the median deviation.
_SIGMA = 1.4826
# Losses that hardly vary, as those of a model that knows its data by heart, are not held to less.
_LEAST_DEVIATION = 0.01


@dataclass(frozen=True)
class Anomaly:
    """Something that a run is to be stopped or rolled back for.

    Attributes:
      step: at which it happened.
      text: what happened, for people: a sentence without its end.
      policy: `stop` or `roll_back`.
      error: to stop with, where it says more.
    """

    step: int
    text: str
    policy: Policy
    error: JspeedError | None = None


class LossHistory:
    """The last losses, and above which the next one is a spike.

    The limit is `median + factor x deviation`, where the deviation is 1.4826 times the median
    absolute deviation (Hampel, 1974, "The influence curve and its role in robust estimation"), so
    that spikes among the losses do not raise it, and at least 1% of the median.

    Args:
      factor: how many deviations.
      window: how many losses count; with fewer than a quarter of them there is no limit.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor, self._window = factor, window
        self._kept = window + 2
        self._losses: deque[tuple[int, float]] = deque(maxlen=self._kept)

    def add(self, step: int, loss: float) -> None:
        """Takes the loss of a step; one that is not finite says nothing."""
        if math.isfinite(loss):
            self._losses.append((step, loss))

    def forget(self, after: int, *, known: int) -> None:
        """Drops the losses of steps after one that the run goes back to.

        So that processes which have read one step more agree with the others, what those do not
        have any more goes as well.

        Args:
          after: the step.
          known: the last step that all processes have read; the next one may be known here, too.
        """
        first = known + 2 - self._kept
        kept = [entry for entry in self._losses if first < entry[0] <= after]
        self._losses.clear()
        self._losses.extend(kept)

    def state(self) -> list[list[float]]:
        """For a checkpoint: pairs of step and loss."""
        return [[step, loss] for step, loss in self._losses]

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Takes what `state` gave."""
        self._losses.clear()
        self._losses.extend((int(step), float(loss)) for step, loss in state)

    def limit(self, step: int) -> float:
        """Above which the loss of a step is a spike; infinity as long as there are few.

        The loss of the step before does not count: it is not known when this one is dispatched.
        """
        losses = [loss for at, loss in self._losses if at <= step - 2][-self._window :]
        if len(losses) < max(2, self._window // 4):
            return math.inf
        median = statistics.median(losses)
        deviation = _SIGMA * statistics.median(abs(loss - median) for loss in losses)
        return median + self._factor * max(deviation, _LEAST_DEVIATION * abs(median))


class Anomalies:
    """Watches the metrics of every step.

    Args:
      config: the section `run.anomalies`.
      parameters: paths of all parameters in tree order.
      skips_nonfinite: whether the steps skip gradients that are not finite.
      scaled: whether the loss scale follows overflows, which are then part of training.
      say: takes lines for people.
    """

    def __init__(
        self,
        config: AnomaliesConfig,
        *,
        parameters: Sequence[str],
        skips_nonfinite: bool,
        scaled: bool,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._nonfinite: Policy = nonfinite_policy(config, skips_nonfinite=skips_nonfinite)
        self._parameters, self._scaled, self._say = parameters, scaled, say
        self._history = LossHistory(config.spike_factor, config.spike_window)
        self._skipped = self._roll_backs = self._last = 0

    def limit(self, step: int) -> float:
        """The largest loss with which a step may change anything, see `StepSettings`."""
        return self._history.limit(step) if self._config.spike == "skip" else math.inf

    def judge(self, step: int, values: Mapping[str, Any]) -> tuple[dict[str, Any], Anomaly | None]:
        """Looks at a step's metrics, in the order of steps.

        Nothing is raised here: other processes may not have read them yet.

        Args:
          step: whose they are.
          values: as Python numbers.

        Returns:
          What belongs into the metrics beside them, and what the run is to be stopped or rolled
          back for.
        """
        entry, anomaly = self._judge(step, values)
        self._history.add(step, values["loss"])
        self._skipped = 0 if values["applied"] else self._skipped + 1
        if anomaly is not None:
            self._last = max(self._last, step)
        elif step > self._last + self._config.spike_window:
            self._roll_backs = 0  # the run has got past what it was rolled back for
        most = self._config.max_skipped_steps
        if most is not None and self._skipped >= most:
            text = (
                f"step {step}: the last {self._skipped} steps were all skipped, so nothing is "
                "learned. Look for what makes the gradients infinite, or lower the learning rate "
                'and resume; "run.anomalies.max_skipped_steps" says how many are too many.'
            )
            anomaly = Anomaly(step, text, "stop", AnomalyError(text))
        return entry, anomaly

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": self._history.state(), "skipped": self._skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave; of older checkpoints there is nothing."""
        self._history.restore(state.get("losses", []))
        self._skipped = int(state.get("skipped", 0))

    def _judge(self, step: int, values: Mapping[str, Any]) -> tuple[dict[str, Any], Anomaly | None]:
        loss, limit = values["loss"], self._history.limit(step)
        if not values["finite"]:
            try:
                entry = note_overflow(
                    step,
                    values,
                    parameters=self._parameters,
                    skipped=not values["applied"],
                    say=self._say,
                )
            except ModelError as error:
                return {"skipped": 1}, Anomaly(step, str(error), "stop", error)
            text = f"the gradient of {entry['first_nonfinite']} is not finite"
            return entry, None if self._scaled else self._act(step, text, self._nonfinite)
        if not math.isfinite(loss):
            text = f"the loss is {loss}, although all gradients are finite"
            return self._told(step, text, values), self._act(step, text, self._nonfinite)
        if loss > limit:
            text = f"the loss is {loss:.4g}, a spike above {limit:.4g}"
            entry = self._told(step, text, values) | {"loss_limit": limit}
            return entry, self._act(step, text, self._config.spike)
        return {}, None

    def _told(self, step: int, text: str, values: Mapping[str, Any]) -> dict[str, Any]:
        self._say(f"step {step}: {text}" + ("." if values["applied"] else "; the step is skipped."))
        return {"skipped": int(not values["applied"])}

    def _act(self, step: int, text: str, policy: Policy) -> Anomaly | None:
        return Anomaly(step, text, policy) if policy in ("stop", "roll_back") else None

    def heed(self, anomaly: Anomaly, *, checkpoint: bool) -> None:
        """To be called before the run is rolled back for an anomaly.

        Args:
          anomaly: what happened.
          checkpoint: whether there is one to go back to.

        Raises:
          JspeedError: the run is to be stopped instead.
        """
        if anomaly.error is not None:
            raise anomaly.error
        what = f"step {anomaly.step}: {anomaly.text}."
        if anomaly.policy == "stop":
            where = "its last checkpoint is from before" if checkpoint else "it has no checkpoint"
            raise AnomalyError(
                f"{what} The run stops here; {where}. Lower the learning rate or look at the data, "
                'or set "run.anomalies" to skip such steps or to roll back.'
            )
        if not checkpoint:
            raise AnomalyError(
                f"{what} There is no checkpoint to roll back to yet; "
                '"run.save_every" says how often there is one.'
            )
        if self._roll_backs == self._config.max_roll_backs:
            raise AnomalyError(
                f"{what} The run was rolled back {self._roll_backs} times already, which is "
                '"run.anomalies.max_roll_backs". Lower the learning rate and resume.'
            )
        self._roll_backs += 1

    def rolled_back(self, step: int, *, known: int) -> None:
        """The run goes on from a step; `known` is the last that all processes have read."""
        self._history.forget(step, known=known)
        self._skipped = 0


def nonfinite_policy(config: AnomaliesConfig, *, skips_nonfinite: bool) -> Policy:
    """What is done about a loss or gradient that is not finite.

    Args:
      config: the section `run.anomalies`.
      skips_nonfinite: whether the precision skips steps with such gradients.
    """
    if config.nonfinite is not None:
        return config.nonfinite
    return "skip" if skips_nonfinite else "stop"
