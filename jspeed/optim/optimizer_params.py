"""What each DeepSpeed optimizer's `params` may hold, with DeepSpeed's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jspeed.core.errors import ConfigError
from jspeed.optim.params import (
    Param,
    anything,
    betas,
    choice,
    flag,
    number,
    only,
    read_params,
    suggestion,
)

_positive = number(low=0)
_fraction = number(low=0, high=1, open_high=True)
_AMSGRAD = {"amsgrad": Param(False, only(False, "the AMSGrad variant is not offered"))}
_TORCH_KERNELS = {
    # How PyTorch runs its kernels; the mathematics is the same, and XLA fuses by itself.
    **{key: Param(None, anything) for key in ("foreach", "fused", "capturable", "set_grad_none")},
    "maximize": Param(False, only(False, "minimise the negated loss instead")),
}
_MOMENTS = {
    "lr": Param(1e-3, _positive),
    "betas": Param((0.9, 0.999), betas),
    "eps": Param(1e-8, _positive),
    "weight_decay": Param(None, _positive),
    "bias_correction": Param(True, flag),
}
_TABLES: Mapping[str, Mapping[str, Param]] = {
    "Adam": {
        **_MOMENTS,
        "adam_w_mode": Param(True, flag),
        "torch_adam": Param(False, flag),
        "fp32_optimizer_states": Param(True, only(True, "moments are always fp32")),
        **_AMSGRAD,
        **_TORCH_KERNELS,
    },
    "Lamb": {
        **_MOMENTS,
        "eps_inside_sqrt": Param(False, flag),
        "max_coeff": Param(10.0, _positive),
        "min_coeff": Param(0.01, _positive),
        **_AMSGRAD,
    },
    "Lion": {
        "lr": Param(1e-3, _positive),
        "betas": Param((0.9, 0.999), betas),
        "weight_decay": Param(0.0, _positive),
        **_TORCH_KERNELS,
    },
    "Adagrad": {
        "lr": Param(1e-2, _positive),
        "eps": Param(1e-10, _positive),
        "weight_decay": Param(0.0, _positive),
        "lr_decay": Param(0.0, _positive),
        "initial_accumulator_value": Param(0.0, _positive),
        **_AMSGRAD,
        **_TORCH_KERNELS,
    },
    "SGD": {
        "lr": Param(1e-3, _positive),
        "momentum": Param(0.0, _positive),
        "dampening": Param(0.0, number()),
        "weight_decay": Param(0.0, _positive),
        "nesterov": Param(False, flag),
        **_TORCH_KERNELS,
    },
    "Muon": {
        "lr": Param(None, _positive),
        "muon_lr": Param(None, _positive),
        "adam_lr": Param(None, _positive),
        "momentum": Param(0.95, _fraction),
        "weight_decay": Param(0.0, _positive),
        "ns_method": Param("gram", choice("gram", "standard")),
        "betas": Param((0.9, 0.95), betas),
        "eps": Param(1e-10, _positive),
        "adam_w_mode": Param(True, flag),
        "torch_adam": Param(False, flag),
        "per_head_muon": Param(False, only(False, "one orthogonalisation per matrix is offered")),
    },
}
_ALIASES = {"AdamW": "Adam", "FusedAdam": "Adam", "FusedLamb": "Lamb", "FusedLion": "Lion"}
HAVE_BETAS = ("Adam", "Lamb", "Lion")
OPTIMIZERS = (
    "Adam",
    "AdamW",
    "FusedAdam",
    "Lamb",
    "FusedLamb",
    "Lion",
    "FusedLion",
    "Adagrad",
    "SGD",
    "Muon",
)


def canonical_name(type: str) -> str:
    """The family that a name of `OPTIMIZERS`, in any case, belongs to; raises ConfigError."""
    names = {name.lower(): name for name in OPTIMIZERS}
    name = names.get(str(type).lower())
    if name is None:
        raise ConfigError(
            f'"optimizer.type": unknown optimizer {type!r}.{suggestion(str(type), OPTIMIZERS)}'
        )
    return _ALIASES.get(name, name)


def read_optimizer_params(*, type: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Checks an optimizer's `params` and fills in DeepSpeed's defaults; raises ConfigError."""
    if "max_grad_norm" in params:
        raise ConfigError(
            '"optimizer.params.max_grad_norm": not an optimizer parameter. '
            'Set "gradient_clipping" instead.'
        )
    name = canonical_name(type)
    values = read_params(params, _TABLES[name], section="optimizer.params", owner=type)
    if name == "SGD" and values["nesterov"] and (not values["momentum"] or values["dampening"]):
        raise ConfigError(
            '"optimizer.params.nesterov": true needs momentum above 0 and dampening 0; momentum is '
            f"{values['momentum']:g} and dampening {values['dampening']:g}."
        )
    return values


def base_learning_rate(*, type: str, params: Mapping[str, Any]) -> float:
    """The learning rate an `optimizer` section asks for: `params.lr`, or DeepSpeed's default."""
    values = read_optimizer_params(type=type, params=params)
    return muon_rates(values)[0] if canonical_name(type) == "Muon" else values["lr"]


def muon_rates(values: Mapping[str, Any]) -> tuple[float, float]:
    """Learning rates of Muon and its Adam: their own, else the shared one, else the defaults."""

    def first(*candidates: float | None) -> float:
        return next(each for each in candidates if each is not None)

    shared = values["lr"]
    return first(values["muon_lr"], shared, 0.02), first(values["adam_lr"], shared, 3e-4)
