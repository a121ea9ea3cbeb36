"""The optimizers and learning-rate schedules: their types, parameters and DeepSpeed's defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jspeed.config.key import (
    Auto,
    Key,
    Treatment,
    automatic,
    later,
    mapped,
    passive,
    refused,
    section,
)
from jspeed.config.kinds import Bool, Int, Kind, ListOf, Number, Object, Text, choice, either


@dataclass(frozen=True, slots=True)
class Family:
    """One optimizer or schedule type.

    Args:
        name: the canonical spelling of `type`; any case is accepted.
        params: its parameters, with paths relative to `params`.
        treatment: `mapped`, or `later` for a type that is understood but not built.
        reason: what the type is, or why it cannot be trained with yet.
        spellings: further accepted spellings of `type`.
    """

    name: str
    params: tuple[Key, ...]
    treatment: Treatment = Treatment.MAPPED
    reason: str = ""
    spellings: tuple[str, ...] = field(default=())


_RATE = Number(0)
_UNIT = Number(0, below=1)
_BETAS = ListOf(_UNIT, length=2)
_MODE = "decoupled weight decay (AdamW); false means L2 regularisation"
_STATES = "moments are fp32 on every device"
_KERNEL = "picks between PyTorch implementations of the same mathematics"
_FLOOR = "16-bit moments are not built yet"


def _lr(default: float) -> Key:
    return mapped("lr", _RATE, default, "learning rate", auto=Auto.FACTS)


def _betas(*default: float) -> Key:
    return mapped("betas", _BETAS, list(default), "decay of the moments", auto=Auto.DEFAULT)


def _eps(default: float) -> Key:
    return mapped("eps", _RATE, default, "added to the denominator", auto=Auto.DEFAULT)


_DECAY = mapped("weight_decay", _RATE, 0.0, "weight decay", auto=Auto.DEFAULT)
_BIAS = mapped("bias_correction", Bool(), True, "bias correction of the moments")
_NORM = refused(
    "max_grad_norm", Number(), None,
    'clipping is not a parameter of the optimizer; use "gradient_clipping"', on="set",
)  # fmt: skip
_AMSGRAD = refused("amsgrad", Bool(), False, "DeepSpeed's optimizers refuse AMSGrad too; remove it")
_FP32_STATES = later("fp32_optimizer_states", Bool(), True, _FLOOR)
_SET_NONE = automatic("set_grad_none", Bool(), True, "gradients are values, not attributes")
_TORCH = (
    automatic("torch_adam", Bool(), False, _KERNEL),
    automatic("foreach", Bool(), None, _KERNEL),
    automatic("fused", Bool(), None, _KERNEL),
    automatic("capturable", Bool(), None, _KERNEL),
)

_ADAM = (
    _lr(1e-3), _betas(0.9, 0.999), _eps(1e-8), _DECAY, _BIAS,
    mapped("adam_w_mode", Bool(), True, _MODE), _AMSGRAD, _NORM, _FP32_STATES, _SET_NONE, *_TORCH,
)  # fmt: skip
_LAMB = (
    _lr(1e-3), _betas(0.9, 0.999), _eps(1e-8), _DECAY, _BIAS,
    mapped("max_coeff", _RATE, 10.0, "upper bound of the trust ratio"),
    mapped("min_coeff", _RATE, 0.01, "lower bound of the trust ratio"),
    mapped("eps_inside_sqrt", Bool(), False, "epsilon is added inside the root"),
    _AMSGRAD, _NORM,
)  # fmt: skip
_MUON = (
    _lr(0.02),
    mapped("muon_lr", _RATE, None, "the rate of the orthogonalised matrices; null means lr"),
    mapped("adam_lr", _RATE, None,
           "the rate of the auxiliary Adam; null means lr if given, else 3e-4"),
    mapped("momentum", _UNIT, 0.95, "Nesterov momentum of the matrices"),
    mapped("ns_method", choice("gram", "standard"), "gram",
           "the Newton-Schulz iteration on the smaller Gram matrix, or on the matrix itself"),
    _betas(0.9, 0.95), _eps(1e-10), _DECAY,
    mapped("adam_w_mode", Bool(), True, _MODE),
    later("per_head_muon", Bool(), False, "orthogonalising per attention head is not built yet"),
    _NORM, _FP32_STATES, *_TORCH,
)  # fmt: skip
_SGD = (
    _lr(1e-3),
    mapped("momentum", _RATE, 0.0, "momentum"),
    mapped("dampening", _RATE, 0.0, "damps the gradient's part in the momentum"),
    _DECAY,
    mapped("nesterov", Bool(), False, "Nesterov momentum"),
    refused("maximize", Bool(), False, "return the negated loss instead"),
    automatic("differentiable", Bool(), False, _KERNEL),
    *_TORCH[1:], _NORM,
)  # fmt: skip

_ONE_BIT = "1-bit optimizers (compressed communication) are not built yet"
_ONE_BIT_PARAMS = (
    _lr(1e-3), _betas(0.9, 0.999), _eps(1e-8), _DECAY, _BIAS, _AMSGRAD, _NORM,
    *passive(
        later("eps_inside_sqrt", Bool(), False, _ONE_BIT),
        later("cuda_aware", Bool(), False, _ONE_BIT),
        later("comm_backend_name", choice("nccl", "mpi", "compressed"), "nccl", _ONE_BIT),
    ),
)  # fmt: skip
_FREEZE = later("freeze_step", Int(0), 100_000, _ONE_BIT, on="never")
_MUP = "muP optimizers (per-parameter learning rates) are not built yet"

OPTIMIZERS: tuple[Family, ...] = (
    Family("Adam", _ADAM, reason="AdamW unless adam_w_mode is false",
           spellings=("DeepSpeedCPUAdam", "CPUAdam")),
    Family("AdamW", _ADAM, reason="Adam with decoupled weight decay"),
    Family("FusedAdam", _ADAM,
           reason="the same mathematics as Adam; one kernel of our own on NVIDIA GPUs"),
    Family("Lamb", _LAMB, reason="layer-wise trust ratio, clamped", spellings=("FusedLamb",)),
    Family("Lion", (_lr(1e-3), _betas(0.9, 0.999), _DECAY, _NORM, _FP32_STATES, _SET_NONE),
           reason="sign of the momentum", spellings=("FusedLion", "DeepSpeedCPULion")),
    Family("Adagrad", (
        _lr(1e-2), _eps(1e-10), _DECAY,
        mapped("lr_decay", _RATE, 0.0, "decay of the rate per step"),
        mapped("initial_accumulator_value", _RATE, 0.0, "where the accumulated squares start"),
        *_TORCH[1:], _AMSGRAD, _NORM, _FP32_STATES,
    ), reason="accumulated squared gradients", spellings=("DeepSpeedCPUAdagrad",)),
    Family("SGD", _SGD, reason="stochastic gradient descent as in PyTorch"),
    Family("Muon", _MUON, reason="orthogonalised momentum, auxiliary Adam for the rest"),
    Family("OneBitAdam", (*_ONE_BIT_PARAMS, _FREEZE), Treatment.LATER, _ONE_BIT),
    Family("ZeroOneAdam", (
        *_ONE_BIT_PARAMS,
        *passive(later("var_freeze_step", Int(0), 100_000, _ONE_BIT),
        later("var_update_scaler", Int(1), 16, _ONE_BIT),
        later("local_step_scaler", Int(1), 32_678, _ONE_BIT),
        later("local_step_clipper", Int(1), 16, _ONE_BIT)),
    ), Treatment.LATER, _ONE_BIT),
    Family("OneBitLamb", (
        *_ONE_BIT_PARAMS, _FREEZE,
        *passive(later("max_coeff", _RATE, 10.0, _ONE_BIT),
        later("min_coeff", _RATE, 0.01, _ONE_BIT),
        later("coeff_beta", _UNIT, 0.9, _ONE_BIT),
        later("factor_max", _RATE, 4.0, _ONE_BIT),
        later("factor_min", _RATE, 0.5, _ONE_BIT),
        later("factor_threshold", _RATE, 0.1, _ONE_BIT)),
    ), Treatment.LATER, _ONE_BIT),
    Family("MuAdam", _ADAM, Treatment.LATER, _MUP),
    Family("MuAdamW", _ADAM, Treatment.LATER, _MUP),
    Family("MuSGD", _SGD, Treatment.LATER, _MUP),
)  # fmt: skip

_STEPS = Int(0)
_RATES = either(_RATE, ListOf(_RATE, length=1))
_MOMENTA = either(_UNIT, ListOf(_UNIT, length=1))
_LAST = automatic("last_batch_iteration", Int(-1, -1), -1,
                  "a resumed run reads its step from the checkpoint")  # fmt: skip
_TOTAL = mapped("total_num_steps", Int(1), None, "the step at which the schedule ends",
                auto=Auto.FACTS, required=True)  # fmt: skip
_WARMUP = (
    mapped("warmup_num_steps", _STEPS, 1000, "steps of warm-up; at least 2 are made",
           auto=Auto.FACTS),
    mapped("warmup_type", choice("log", "linear"), "log", "the shape of the warm-up"),
)  # fmt: skip
_MIN_LR = mapped("warmup_min_lr", _RATES, 0.0, "where the warm-up starts", auto=Auto.FACTS)


def _max_lr(default: float | None) -> Key:
    reason = "where the warm-up ends; null means the optimizer's lr"
    return mapped("warmup_max_lr", _RATES, default, reason, auto=Auto.FACTS)


_COUNT: Kind = Int(0)
SCHEDULERS: tuple[Family, ...] = (
    Family("LRRangeTest", (
        mapped("lr_range_test_min_lr", _RATES, 1e-3, "the first rate"),
        mapped("lr_range_test_step_size", Int(1), 2000, "steps between rises"),
        mapped("lr_range_test_step_rate", Number(), 1.0, "rise per interval"),
        mapped("lr_range_test_staircase", Bool(), False, "rise in stairs"),
        _LAST,
    ), reason="a rising rate, to find the largest stable one"),
    Family("OneCycle", (
        mapped("cycle_min_lr", _RATES, None, "the lowest rate of the cycle", required=True),
        mapped("cycle_max_lr", _RATES, None, "the highest rate of the cycle", required=True),
        mapped("decay_lr_rate", _RATE, 0.0, "decay of the rate after the cycle"),
        mapped("cycle_first_step_size", Int(1), 2000, "steps up"),
        mapped("cycle_second_step_size", Int(1), None, "steps down; null means as many as up"),
        mapped("cycle_first_stair_count", _COUNT, 0, "stairs up; 0 is continuous"),
        mapped("cycle_second_stair_count", _COUNT, None, "stairs down; null means as up"),
        mapped("decay_step_size", _COUNT, 0, "steps between decays after the cycle"),
        mapped("cycle_momentum", Bool(), True, "cycle the momentum the other way"),
        mapped("cycle_min_mom", _MOMENTA, 0.8, "the lowest momentum"),
        mapped("cycle_max_mom", _MOMENTA, 0.9, "the highest momentum"),
        mapped("decay_mom_rate", _RATE, 0.0, "decay of the momentum after the cycle"),
        _LAST,
    ), reason="one cycle up and down, then decay"),
    Family("WarmupLR", (_MIN_LR, _max_lr(None), *_WARMUP, _LAST),
           reason="warm-up, then constant"),
    Family("WarmupDecayLR", (_TOTAL, _MIN_LR, _max_lr(1e-3), *_WARMUP, _LAST),
           reason="warm-up, then linear decay to 0"),
    Family("WarmupCosineLR", (
        _TOTAL,
        mapped("warmup_min_ratio", _RATE, 0.0, "where the warm-up starts, as a share of lr"),
        mapped("cos_min_ratio", _RATE, 1e-4, "where the cosine ends, as a share of lr"),
        *_WARMUP, _LAST,
    ), reason="warm-up, then cosine decay"),
)  # fmt: skip


def find_family(families: tuple[Family, ...], name: str) -> Family | None:
    """Return the family that `name` spells in any case, or None."""
    wanted = name.replace("_", "").lower()
    for family in families:
        if wanted in (spelling.lower() for spelling in (family.name, *family.spellings)):
            return family
    return None


def _union(families: tuple[Family, ...], prefix: str) -> tuple[Key, ...]:
    """One row per parameter name, with the types that have it named in the reason."""
    users: dict[str, list[str]] = {}
    rows: dict[str, Key] = {}
    for family in families:
        for key in family.params:
            users.setdefault(key.path, []).append(family.name)
            rows.setdefault(key.path, key)
    return section(prefix, *(
        Key(key.path, key.kind, key.default, key.treatment,
            f"{key.reason} ({', '.join(users[key.path])})", key.auto, key.on, key.off)
        for key in rows.values()
    ))  # fmt: skip


_NAMES: Mapping[str, str] = {
    "optimizer": ", ".join(family.name for family in OPTIMIZERS),
    "scheduler": ", ".join(family.name for family in SCHEDULERS),
}

OPTIMIZER_KEYS = (
    *section(
        "optimizer",
        mapped("type", Text(filled=True), None, f"one of {_NAMES['optimizer']}", required=True),
        mapped("params", Object(), None, "the parameters of the type"),
        automatic("legacy_fusion", Bool(), False, "XLA fuses the update"),
    ),
    *_union(OPTIMIZERS, "optimizer.params"),
    *section(
        "scheduler",
        mapped("type", Text(filled=True), None, f"one of {_NAMES['scheduler']}", required=True),
        mapped("params", Object(), None, "the parameters of the type"),
    ),
    *_union(SCHEDULERS, "scheduler.params"),
)
