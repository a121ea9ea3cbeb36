"""Host and disk tiers: optimizer state that lives outside the devices, and its update there."""

from jspeed.offload.host_adam import AdamRule, Engine, HostAdam, host_zeros

__all__ = ["AdamRule", "Engine", "HostAdam", "host_zeros"]
