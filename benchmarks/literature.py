"""Claims of the DeepSpeed literature that a compiled plan can check, and how each is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Plans = Mapping[str, Mapping[str, Any]]
GB = 1e9
"""The papers count in powers of ten."""
_CLOSE = 0.05


@dataclass(frozen=True)
class Asked:
    """A run, and the cluster that it is compiled for."""

    config: Mapping[str, Any]
    target: str
    gpus: int


@dataclass(frozen=True)
class Finding:
    """One figure of a claim.

    Attributes:
      what: it is.
      said: by the literature.
      found: in the compiled plan.
      unit: of both; empty for a ratio.
      holds: whether the plan agrees.
    """

    what: str
    said: float
    found: float
    unit: str
    holds: bool


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
      key: a short name.
      text: what is claimed.
      source: where.
      runs: the names, in `RUNS`, of the runs that are compiled to check it.
      judge: makes findings of their plans.
      why: what the findings mean, and why they differ from the claim where they do.
    """

    key: str
    text: str
    source: str
    runs: tuple[str, ...]
    judge: Callable[[Plans], Sequence[Finding]]
    why: str


def gpt(
    *, layers: int, width: int, heads: int, stage: int, sequence: int = 1024, **batch: int
) -> dict[str, Any]:
    """A GPT-2 of some size in bf16 with Adam, recomputed in full, with one sequence per device
    unless `micro` says otherwise, and as many microbatches per step as `microbatches` says.

    Args:
      layers: of the model.
      width: of the residual stream.
      heads: of the attention.
      stage: of ZeRO.
      sequence: tokens of one.
      batch: `micro`, `microbatches`.
    """
    return {
        "train_micro_batch_size_per_gpu": batch.get("micro", 1),
        "gradient_accumulation_steps": batch.get("microbatches", 1),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "model": {
            "family": "gpt2",
            "layers": layers,
            "hidden_size": width,
            "heads": heads,
            "vocab_size": 50304,
            "sequence_length": sequence,
            "remat": "full",
        },
    }


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """The same without recomputation."""
    return {**config, "model": {**config["model"], "remat": "none"}}


_7B5 = {"layers": 36, "width": 4096, "heads": 32}
_1B5 = {"layers": 48, "width": 1600, "heads": 25}
_50B = {"layers": 62, "width": 8192, "heads": 64, "sequence": 2048}
_1T = {"layers": 128, "width": 25600, "heads": 160}
_N = 64

RUNS: Mapping[str, Asked] = {
    **{f"7.5B, stage {s}": Asked(gpt(**_7B5, stage=s), "a100-80", _N) for s in range(4)},
    "1.5B, stage 0": Asked(gpt(**_1B5, stage=0), "a100-40", 8),
    "1.5B, stage 1 on 4": Asked(gpt(**_1B5, stage=1), "a100-40", 4),
    "1.5B, stage 1 on 8": Asked(gpt(**_1B5, stage=1), "a100-40", 8),
    **{
        f"1.5B, {micro} rows kept": Asked(_kept(gpt(**_1B5, stage=0, micro=micro)), "b200", 1)
        for micro in (16, 32)
    },
    **{
        f"1.5B, {micro} rows recomputed": Asked(gpt(**_1B5, stage=0, micro=micro), "b200", 1)
        for micro in (16, 32)
    },
    "50B": Asked(gpt(**_50B, stage=3), "a100-80", 16),
    "50B, 8 microbatches": Asked(gpt(**_50B, stage=3, microbatches=8), "a100-80", 16),
    "1T": Asked(gpt(**_1T, stage=3), "a100-40", 1024),
}


def _state_and_gradients(plan: Mapping[str, Any]) -> float:
    """What the papers call model states: parameters, gradients and optimizer state, in bytes."""
    memory = plan["memory"]
    return memory["state"] + memory["at_peak"]["gradients"]


def _at_most(what: str, said: float, found: float, unit: str = "GB") -> Finding:
    return Finding(what, said, found, unit, found <= said * (1 + _CLOSE))


def _at_least(what: str, said: float, found: float, unit: str = "") -> Finding:
    return Finding(what, said, found, unit, found >= said * (1 - _CLOSE))


def _equal(what: str, said: float, found: float, unit: str = "") -> Finding:
    return Finding(what, said, found, unit, abs(found - said) <= _CLOSE * said)


def model_states(plans: Plans) -> list[Finding]:
    """The bytes of model states by stage, by the paper's formulas for the model's own size."""
    psi = plans["7.5B, stage 0"]["model"]["parameters"] / GB
    said = (16 * psi, 4 * psi + 12 * psi / _N, 2 * psi + 14 * psi / _N, 16 * psi / _N)
    return [
        _at_most(
            f"stage {stage}", said[stage], _state_and_gradients(plans[f"7.5B, stage {stage}"]) / GB
        )
        for stage in range(4)
    ]


def reductions(plans: Plans) -> list[Finding]:
    """How many times less the model states of each stage are than without ZeRO."""
    whole = _state_and_gradients(plans["7.5B, stage 0"])
    return [
        _at_least(
            f"stage {stage}", times, whole / _state_and_gradients(plans[f"7.5B, stage {stage}"])
        )
        for stage, times in ((1, 4.0), (2, 8.0), (3, float(_N)))
    ]


def optimizer_state(plans: Plans) -> list[Finding]:
    """Master parameters and moments without ZeRO, and their share with it."""

    def held(name: str) -> float:
        return plans[name]["memory"]["master"] + plans[name]["memory"]["moments"]

    whole = held("1.5B, stage 0")
    return [
        _equal("without ZeRO", 18.0, whole / GB, "GB"),
        _equal("stage 1 on 4 devices, of that", 1 / 4, held("1.5B, stage 1 on 4") / whole),
        _equal("stage 1 on 8 devices, of that", 1 / 8, held("1.5B, stage 1 on 8") / whole),
        _equal("stage 1 on 8 devices", 2.25, held("1.5B, stage 1 on 8") / GB, "GB"),
    ]


def volumes(plans: Plans) -> list[Finding]:
    """Elements that a step sends, in multiples of the parameters."""
    sent = [plans[f"7.5B, stage {s}"]["volume"]["parameter_multiples"] for s in range(4)]
    said = (2.0, 2.0, 2.0, 3.0)
    found = [_equal(f"stage {s}", said[s], sent[s], "x parameters") for s in range(4)]
    return [*found, _equal("stage 3 against stage 0", 1.5, sent[3] / sent[0])]


def recomputation(plans: Plans) -> list[Finding]:
    """Activations, as what grows with the batch, kept and recomputed; and the matrix products."""

    def activations(kind: str) -> float:
        few, many = (plans[f"1.5B, {rows} rows {kind}"]["memory"] for rows in (16, 32))
        return 32 * (many["temporaries"] - few["temporaries"]) / 16 / GB

    kept, recomputed = activations("kept"), activations("recomputed")
    products = [plans[f"1.5B, 32 rows {kind}"]["flops"] for kind in ("kept", "recomputed")]
    return [
        _at_most("kept", 60.0, kept),
        _at_most("recomputed", 8.0, recomputed),
        _at_least("saved, of those kept", 0.6, 1 - recomputed / kept),
        _at_most("matrix products that come on top", 0.33, products[1] / products[0] - 1, ""),
    ]


def fits_50b(plans: Plans) -> list[Finding]:
    """The peak against what the device has for a program."""
    return [
        Finding(f"peak of {what}", limit / GB, peak / GB, "GB", plan["fits"])
        for what, plan in (
            ("one microbatch", plans["50B"]),
            ("8 microbatches", plans["50B, 8 microbatches"]),
        )
        for peak, limit in ((plan["memory"]["peak_bytes"], plan["memory"]["limit_bytes"]),)
    ]


def trillion(plans: Plans) -> list[Finding]:
    """What is stored of a trillion parameters, and what a step takes beside it."""
    plan = plans["1T"]
    memory = plan["memory"]
    said = 16 * plan["model"]["parameters"] / 1024 / GB
    return [
        _at_most("stored between steps", said, memory["state"] / GB),
        _at_most("with gradients at the peak", said, _state_and_gradients(plan) / GB),
        Finding(
            "peak, on an A100-40",
            memory["limit_bytes"] / GB,
            memory["peak_bytes"] / GB,
            "GB",
            plan["fits"],
        ),
    ]


_ZERO = "Rajbhandari et al., ZeRO, 2020"
_STAGES = tuple(f"7.5B, stage {stage}" for stage in range(4))

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "model states",
        "A model of 7.5 B parameters with Adam in mixed precision takes 120 GB of model states per "
        "device; on 64 devices 31.4 GB with stage 1, 16.6 GB with stage 2 and 1.9 GB with stage 3.",
        f"{_ZERO}, figure 1 and table 1: 16Ψ, 4Ψ + 12Ψ/N, 2Ψ + 14Ψ/N and 16Ψ/N bytes, here for the "
        "Ψ of the compiled model (36 layers, width 4,096)",
        _STAGES,
        model_states,
        "State is what is stored between steps, and gradients are those alive at the peak. At "
        "stage 3 the stored state agrees (12Ψ/N: there is no copy in bfloat16, the master is cast "
        "and gathered at use), but gradients are more than the paper's 2Ψ/N: their shards are "
        "fp32, and until they are reduced those of the layers at hand are whole in bfloat16 and "
        "that of the embedding, which is the head too, in fp32. The paper counts neither.",
    ),
    Claim(
        "reductions",
        "Stage 1 reduces the memory of model states 4 times, stage 2 8 times, and stage 3 as many "
        "times as there are devices (64).",
        f"{_ZERO}, section 1; DeepSpeed's documentation repeats it",
        _STAGES,
        reductions,
        "4 and 8 are the limits for ever more devices: the paper's own formulas give 3.8 and 7.2 "
        "on 64, and the plan is within 4% of those. Stage 3: see above.",
    ),
    Claim(
        "optimizer state",
        "The Adam states of a GPT-2 of 1.5 B parameters take 18 GB; stage 1 on eight devices "
        "reduces them to 2.25 GB each. On N devices each holds 1/N: 1/4 on 4, 1/8 on 8.",
        "DeepSpeed tutorial, Zero Redundancy Optimizer, Training a 1.5B Parameter GPT-2 model "
        "(48 layers, width 1,600)",
        ("1.5B, stage 0", "1.5B, stage 1 on 4", "1.5B, stage 1 on 8"),
        optimizer_state,
        "fp32 master parameters and two moments, 12 bytes per parameter. The model has 1.558 B "
        "parameters, hence 18.7 GB.",
    ),
    Claim(
        "volume",
        "Data parallelism and stages 1 and 2 send 2Ψ elements per device and step, stage 3 sends "
        "3Ψ: 1.5 times as many.",
        f"{_ZERO}, section 7",
        _STAGES,
        volumes,
        "Counted in the compiled program, loops with their trip counts; an all-reduce is a "
        "reduce-scatter and an all-gather. The embedding, which is used at both ends, is reduced "
        "twice at stages 2 and 3, which makes the 0.03 on top. With accumulation stage 3 sends so "
        "much per microbatch.",
    ),
    Claim(
        "recomputation",
        "A GPT-2 of 1.5 B parameters with 32 sequences of 1,024 tokens needs 60 GB of activations; "
        "recomputation makes that about 8 GB, for 33% more computation. Elsewhere 60 to 70% is "
        "what is said to be saved.",
        f"{_ZERO}, section 3.2; 60 to 70% is common in guides to training, without a first source",
        tuple(f"1.5B, {rows} rows {k}" for k in ("kept", "recomputed") for rows in (16, 32)),
        recomputation,
        "Activations are what grows with the batch, from 16 to 32 sequences, so that they include "
        "what a layer needs while it is computed again. The paper estimates 24 bytes per token, "
        "layer and unit of width; the compiled step keeps more where nothing is recomputed, and "
        "one input of 2 bytes per layer where all is, beside one layer's own. So a larger share is "
        "saved than is claimed, for less: of a recomputed layer the last product is not needed, "
        "and the compiler leaves it out.",
    ),
    Claim(
        "50B on 16",
        "Stage 3 trains a model of 50 B parameters on 16 A100s of 80 GB: its model states are "
        "16Ψ/16 = 50 GB per device.",
        f"follows from {_ZERO}, section 5.3",
        ("50B", "50B, 8 microbatches"),
        fits_50b,
        "62 layers of width 8,192, one sequence of 2,048 tokens per device, full recomputation. "
        "Said is what jspeed counts as usable, 90% of the device (docs/targets.md). Accumulation "
        "adds a second fp32 shard of the gradients.",
    ),
    Claim(
        "1T on 1024",
        "With all three stages the model states of a trillion parameters take 15.6 GB on each of "
        "1,024 devices.",
        f"{_ZERO}, table 1; the shape (128 layers, width 25,600) is that of ZeRO-Infinity "
        "(Rajbhandari et al., 2021), table 1",
        ("1T",),
        trillion,
        "What is stored agrees. A step takes more, which the table does not count: one layer has "
        "7.9 B parameters, so that its gradients alone are 16 GB in bfloat16 until they are "
        "reduced, and those of two layers are alive at a time. ZeRO-Infinity tiles layers for "
        "that reason; here it takes a larger device, or tensor parallelism.",
    ),
)
