"""The one-way flow between the rooms, read from the imports themselves."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "oomless"
FLOORS = [
    {"errors", "units", "kept"},
    {"catalogue"},
    {"config", "hardware"},
    {"ops"},
    {"optim", "memory"},
    {"techniques"},
    {"models", "data"},
    {"vocabulary"},
    {"training"},
    {"planning"},
    {"calibration", "programs"},
    {"diagnosis"},
    {"export"},
    {"report"},
    {"studio"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF_ROOM = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TORCH_ONLY = {"ops", "optim", "memory"}
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_names(path: Path) -> list[str]:
    """Absolute dotted names of everything that the module imports, relative imports resolved."""
    names = []
    package = ["oomless", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    here = FLOOR_OF_ROOM[room(path)]
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "oomless" and len(parts) > 1 and parts[1] in FLOOR_OF_ROOM and parts[1] != room(path):
            assert FLOOR_OF_ROOM[parts[1]] < here, f"{path.name} on floor {here} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in TORCH_ONLY], ids=lambda p: p.name)
def test_torch_only_rooms(path):
    for name in imported_names(path):
        assert name.split(".")[0] not in {"transformers", "peft", "tokenizers", "datasets", "accelerate"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_people_are_spoken_to_through_the_screen_alone(path):
    """Where text is neither markup nor able to steer the terminal."""
    text = path.read_text(encoding="utf-8")
    if path.name in ("screen.py", "reference.py") or path == SOURCE / "cli" / "__init__.py":
        return
    assert not {"rich.console.Console", "rich.markup", "rich.progress", "rich.live"} & set(imported_names(path))
    assert not re.search(
        r"from_markup|markup=True|\[/\]|(?<!\w)(typer|click)\.(echo|secho)\(|(?<![\w.])print\((?!self)", text
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_modules_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
