"""Where each array lives: mesh, sharding rules, ZeRO placement, gather at use."""

from jspeed.layout.mesh import AXES, BATCH_AXES, ZERO_AXES, MeshShape, make_mesh, resolve_mesh
from jspeed.layout.placing import ZeroSettings, place
from jspeed.layout.rules import Rule
from jspeed.layout.zero import Layout, LeafPlacement, Role

__all__ = [
    "AXES",
    "BATCH_AXES",
    "ZERO_AXES",
    "Layout",
    "LeafPlacement",
    "MeshShape",
    "Role",
    "Rule",
    "ZeroSettings",
    "make_mesh",
    "place",
    "resolve_mesh",
]
