"""The house: a room imports only from lower floors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("pallas_kernels", "core"),
    ("config",),
    ("layout", "comm"),
    ("nn", "models", "optim"),
    ("pipeline", "offload"),
    ("training", "checkpoint", "hf", "data", "monitor", "profile"),
    ("engine",),
    ("planner", "inference", "compression"),
    ("cli", "launch"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms that stand on another one of their own floor: models are made of layers, and launching is
# also a command.
ON_THE_SAME_FLOOR = {("models", "nn"), ("cli", "launch")}


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import of a module, wherever it stands, under
    `TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "jspeed":
                for name in node.names:
                    yield node.lineno, f"jspeed.{name.name}"
            else:
                yield node.lineno, module


def room_of(module: str) -> str | None:
    """`jspeed.layout.zero` -> `layout`; None for what is not ours."""
    if module.partition(".")[0] == "pallas_kernels":
        return "pallas_kernels"
    parts = module.split(".")
    return parts[1] if parts[0] == "jspeed" and len(parts) > 1 else None


def wrong_imports(source: str, package: str) -> list[str]:
    """The imports that a module of `package` may not have, each with its line."""
    room = room_of(package)
    assert room is not None, package
    wrong = []
    for line, module in imports(source, package):
        other = room_of(module)
        if other in (None, room, "__version__") or (room, other) in ON_THE_SAME_FLOOR:
            continue
        if other not in FLOOR_OF:
            wrong.append(f"line {line}: {module} is in no room; import it from its own")
        elif FLOOR_OF[other] >= FLOOR_OF[room]:
            wrong.append(
                f"line {line}: {room} is on floor {FLOOR_OF[room]} and imports {module} from "
                f"floor {FLOOR_OF[other]}"
            )
    return wrong


def modules() -> list[Path]:
    """Every module that stands in a room."""
    return sorted([*(ROOT / "jspeed").glob("*/**/*.py"), *(ROOT / "pallas_kernels").rglob("*.py")])


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts[:-1])


def test_rooms_import_only_from_lower_floors() -> None:
    wrong = {
        str(path.relative_to(ROOT)): problems
        for path in modules()
        if (problems := wrong_imports(path.read_text(), package_of(path)))
    }
    assert wrong == {}


def test_every_room_is_on_a_floor() -> None:
    rooms = {room_of(package_of(path)) for path in modules()}
    assert rooms - set(FLOOR_OF) == set()
    assert len(rooms) >= 12


def test_nothing_stands_beside_the_rooms() -> None:
    assert {path.name for path in (ROOT / "jspeed").glob("*.py")} <= {"__init__.py", "__main__.py"}


@pytest.mark.parametrize(
    ("source", "package", "problems"),
    [
        ("from jspeed.core.errors import LayoutError", "jspeed.layout", []),
        ("import jspeed.layout.zero", "jspeed.layout", []),
        ("from jspeed.nn import Linear", "jspeed.models.gpt2", []),
        ("from . import mesh\nfrom ..core import tree", "jspeed.layout", []),
        ("from jspeed import __version__", "jspeed.cli", []),
        ("import jax, numpy", "jspeed.config", []),
        (
            "from jspeed.training.state import TrainState",
            "jspeed.layout",
            ["line 1: layout is on floor 2 and imports jspeed.training.state from floor 5"],
        ),
        (
            "if TYPE_CHECKING:\n    from jspeed.engine import Engine",
            "jspeed.monitor",
            ["line 2: monitor is on floor 5 and imports jspeed.engine from floor 6"],
        ),
        (
            "def late():\n    import jspeed.data.build",
            "jspeed.training",
            ["line 2: training is on floor 5 and imports jspeed.data.build from floor 5"],
        ),
        (
            "from ..engine import loop",
            "jspeed.data",
            ["line 1: data is on floor 5 and imports jspeed.engine from floor 6"],
        ),
        (
            "from jspeed import config, initialize",
            "jspeed.core",
            [
                "line 1: core is on floor 0 and imports jspeed.config from floor 1",
                "line 1: jspeed.initialize is in no room; import it from its own",
            ],
        ),
    ],
)
def test_the_check_sees_every_kind_of_import(
    source: str, package: str, problems: list[str]
) -> None:
    assert wrong_imports(source, package) == problems
