"""Which tensors to keep so that a step fits a budget of device memory, chosen by compiling.

Saving a tensor buys FLOPs that the backward pass need not repeat, for bytes. Each tensor's price is
what the compiler says of the step that saves it alone, beside the step that saves none. Then they
are taken in the order of FLOPs per byte, and each step is compiled before it counts: prices do not
add up, since what is saved makes the recomputation of other tensors shorter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jspeed.config.remat import TENSORS, Budget
from jspeed.core.errors import JspeedError
from jspeed.planner.run_file import RunFile
from jspeed.planner.suggest import RunJobs, Where

# What enters a layer is kept whatever is saved.
NAMES: tuple[str, ...] = tuple(name for name in TENSORS if name != "layer_in")
_NONE, _FULL = "none", "full"


@dataclass(frozen=True)
class Chosen:
    """The policy that a budget allows.

    Attributes:
      policy: as `model.remat` takes it.
      plan: of the run with it, as JSON.
      budget_bytes: that its peak was to keep to.
      tried: one entry per compiled step, in order: `policy`, `peak_bytes`, `flops`, `reason`.
    """

    policy: Any
    plan: Mapping[str, Any]
    budget_bytes: int
    tried: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "budget_bytes": self.budget_bytes,
            "tried": [dict(entry) for entry in self.tried],
        }


def choose(run: RunFile, where: Where, run_jobs: RunJobs) -> Chosen:
    """Chooses what to save of a run whose `model.remat` is a budget.

    Everything where that fits. Otherwise nothing, and then one tensor after another, by FLOPs saved
    per byte, as long as the step fits. Where not even nothing fits, the inputs of layers go to the
    host's memory, if that needs less.

    Args:
      run: the run file.
      where: the cluster.
      run_jobs: compiles.

    Raises:
      JspeedError: the step cannot be compiled.
    """
    assert run.config.model is not None
    budget = run.config.model.remat
    assert isinstance(budget, Budget)
    return _Choice(run, where, run_jobs, budget).made()


class _Choice:
    def __init__(self, run: RunFile, where: Where, run_jobs: RunJobs, budget: Budget) -> None:
        self.run = run
        self.where = where
        self.run_jobs = run_jobs
        self.asked = budget.bytes
        self.limit = 0
        self.plans: dict[str, Mapping[str, Any]] = {}
        self.tried: list[Mapping[str, Any]] = []

    def made(self) -> Chosen:
        self._compile({_NONE: "none", _FULL: "full"})
        device = self.plans[_FULL]["memory"]["limit_bytes"]
        self.limit = device if self.asked is None else min(self.asked, device)
        if self._fits(_NONE):
            self._note("none", _NONE, "taken: everything fits")
            return self._chosen("none", _NONE)
        self._note("none", _NONE, "does not fit")
        if not self._fits(_FULL):
            self._note("full", _FULL, "does not fit")
            return self._offloaded()
        self._note("full", _FULL, "fits; tensors are added to it")
        return self._saved()

    def _saved(self) -> Chosen:
        """Tensors added to `full` in the order of their price."""
        self._compile({name: {"save": [name]} for name in NAMES})
        kept: list[str] = []
        last, policy = _FULL, "full"
        for name in sorted(NAMES, key=self._worth, reverse=True):
            if self._flops_saved(name) <= 0:
                self._note({"save": [name]}, name, "saves no product")
                continue
            wanted = {"save": [*kept, name]}
            key = name if not kept else "+".join(wanted["save"])
            self._compile({key: wanted})
            if not self._fits(key):
                self._note(wanted, key, "does not fit")
            elif self._flops(key) >= self._flops(last):
                self._note(wanted, key, "saves no further product")
            else:
                self._note(wanted, key, f"taken: {self._price(last, key)}")
                kept.append(name)
                last, policy = key, wanted
        return self._chosen(policy, last)

    def _offloaded(self) -> Chosen:
        """The least that a policy can need on the device; not for pipelines."""
        policy = {"offload": ["layer_in"]}
        if self.plans[_FULL]["mesh"]["pipe"] > 1:
            return self._chosen("full", _FULL)
        self._compile({"offload": policy})
        if self._peak("offload") >= self._peak(_FULL):
            self._note(policy, "offload", "needs no less")
            return self._chosen("full", _FULL)
        fits = "fits" if self._fits("offload") else "does not fit, but needs less"
        self._note(policy, "offload", f"taken: {fits}")
        return self._chosen(policy, "offload")

    def _compile(self, wanted: Mapping[str, Any]) -> None:
        missing = {key: policy for key, policy in wanted.items() if key not in self.plans}
        jobs = [
            self.where.job(key, self.run.changed({"model.remat": policy}))
            for key, policy in missing.items()
        ]
        for outcome in self.run_jobs(jobs):
            if outcome.result is None:
                raise JspeedError(f'"model.remat": {missing[outcome.key]}: {outcome.error}')
            self.plans[outcome.key] = outcome.result

    def _peak(self, key: str) -> int:
        return self.plans[key]["memory"]["peak_bytes"]

    def _flops(self, key: str) -> float:
        return self.plans[key]["flops"]

    def _fits(self, key: str) -> bool:
        return self._peak(key) <= self.limit

    def _flops_saved(self, name: str) -> float:
        return self._flops(_FULL) - self._flops(name)

    def _worth(self, name: str) -> float:
        """FLOPs saved per byte, of a tensor saved alone."""
        flops, size = self._flops_saved(name), self._peak(name) - self._peak(_FULL)
        if flops <= 0:
            return -math.inf
        return flops / size if size > 0 else math.inf

    def _price(self, before: str, after: str) -> str:
        flops = self._flops(before) - self._flops(after)
        size = self._peak(after) - self._peak(before)
        return f"{flops:.3g} FLOPs less for {size:,} bytes"

    def _note(self, policy: Any, key: str, reason: str) -> None:
        entry = {
            "policy": policy,
            "peak_bytes": self._peak(key),
            "flops": self._flops(key),
            "reason": reason,
        }
        self.tried.append(entry)

    def _chosen(self, policy: Any, key: str) -> Chosen:
        return Chosen(policy, self.plans[key], self.limit, tuple(self.tried))
