"""Who may import whom: one picture of the house, walked over all folders."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "train", "sample_ddp", "evaluator"
OURS = *SCRIPTS, "models", "dataset", "utils", "tests", "benchmarks", "examples"
GROUND_FLOOR = tuple(f"utils.{path.stem}" for path in (ROOT / "utils").glob("*.py") if path.stem != "__init__")
WINGS = "utils/training", "utils/sampling", "utils/evaluation"

# folder -> what of ours its files may import, and what of others they may not
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "models": (("models",), ("argparse", "torch.distributed")),
    "dataset": (("dataset", "utils.files", "utils.noise"), ("torch.distributed",)),
    "utils": (GROUND_FLOOR, ()),
    **{wing: ((*GROUND_FLOOR, wing.replace("/", ".")), ()) for wing in WINGS},
    "examples": (("models", "dataset", "utils"), ()),
    ".": (("models", "dataset", "utils"), ()),  # the scripts
}


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports: `from utils import files` is utils.files."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def files_of(room: str) -> list[Path]:
    """The Python files of a room; the wings of utils are rooms of their own."""
    if room == ".":
        return [ROOT / f"{script}.py" for script in SCRIPTS]
    inner = [ROOT / other for other in ROOMS if other.startswith(f"{room}/")]
    return [path for path in (ROOT / room).rglob("*.py") if not any(path.is_relative_to(other) for other in inner)]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    allowed, forbidden = ROOMS[room]
    assert files_of(room)
    for path in files_of(room):
        for name in sorted(imported(path)):
            where = f"{path.relative_to(ROOT)} imports {name}"
            assert not is_within(name, OURS) or is_within(name, allowed), where
            assert not is_within(name, forbidden), where


def test_every_python_file_of_the_product_is_in_a_room():
    known = {path for room in ROOMS for path in files_of(room)}
    product = {path for path in ROOT.glob("*.py")}
    product |= {path for folder in ("models", "dataset", "utils", "examples") for path in (ROOT / folder).rglob("*.py")}
    assert product == known


def public_names(script: str) -> set[str]:
    """A script's `__all__`: main, and what it offers in Python."""
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return {"main"}


def test_tests_and_benchmarks_take_only_public_names_from_a_script():
    public = {script: public_names(script) for script in SCRIPTS}
    whole = {f"{script}.{name}" for script, names in public.items() for name in names}
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        names = {name for name in imported(path) if is_within(name, SCRIPTS)}
        assert names <= set(SCRIPTS) | whole, f"{path}: {names}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                where = f"{path.relative_to(ROOT)}: {node.value.id}.{node.attr}"
                assert node.attr in public[node.value.id], where
