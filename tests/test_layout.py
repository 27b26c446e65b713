"""The floors of the house: which folder of src/pose2id may import which."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

SOURCE = ROOT / "src" / "pose2id"
# From the ground up: a file imports from its own floor and from those below.
FLOORS = (
    ("io",),
    ("datasets", "neighbors", "poses"),
    ("centralization", "retrieval"),
    ("extraction", "extractor", "ipg", "models", "plots"),
    ("centralizer", "training"),
    ("distributed", "gallery", "report"),
    ("demo",),
    ("cli", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(module):
    """The folder, or top-level file, of a module's dotted name below pose2id."""
    return module.split(".")[0]


def imported(path):
    """Dotted names below pose2id that a file imports, wherever in it; for type checkers too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pose2id":
            below = node.module.partition(".")[2]
            yield from [below] if below else [alias.name for alias in node.names if alias.name != "__version__"]
        elif isinstance(node, ast.Import):
            bare = [a.asname or a.name for a in node.names if a.name == "pose2id"]
            # Of the package itself only the version is asked for, which is in no room.
            used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in bare}
            yield from used - {"__version__"}
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("pose2id."))


def home(name):
    """The room of a public name of the package itself."""
    import pose2id  # noqa: PLC0415

    return room(pose2id._HOME.get(name, name))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_file_imports_from_a_higher_floor(path):
    own = room(path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."))
    higher = [name for name in imported(path) if LEVEL[home(name)] > LEVEL[own]]
    assert not higher, f"{own} is on floor {LEVEL[own]}, and imports {higher}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_can_be_seen(path):
    """None is relative; none of our own goes by a name made at run time, but for the lazy packages' own modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            package = ".".join(path.relative_to(SOURCE).parts[:-1])
            lazy = path.name == "__init__.py" and ast.unparse(node.args[0]).startswith(f"f'pose2id.{package}.")
            literal = isinstance(node.args[0], ast.Constant) and "pose2id" not in node.args[0].value
            # require_modules, for what is optional; a person's own model.
            assert lazy or literal or path.name in ("checks.py", "models.py")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "require_modules":
            assert "pose2id" not in "".join(ast.unparse(module) for module in node.args[2:])


def test_every_room_has_a_floor():
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(LEVEL)


def test_the_demo_is_imported_by_the_command_line_alone():
    importers = {path.relative_to(SOURCE).parts[0] for path in FILES for name in imported(path) if home(name) == "demo"}
    assert importers <= {"cli", "demo"}


def test_the_page_lists_the_floors():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([\w, ]+)", page, flags=re.MULTILINE)
    listed = {room: int(level) for level, rooms in rows for room in rooms.strip().split(", ")}
    assert listed == {room: level for room, level in LEVEL.items() if room != "__main__"}


def equations():
    """(numbers, file, name) of the table "equation -> file:function" in docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:eq\. (\d+)(?:-(\d+))?|-) \|.*\| `([\w/]+\.py):([\w.]+)` \|$", page, re.MULTILINE)
    return [(range(int(first or 0), int(last or first or -1) + 1), path, name) for first, last, path, name in rows]


def definition(path, name):
    found = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        names = {node: getattr(node, "name", ast.unparse(getattr(node, "target", node))) for node in found.body}
        (found,) = (node for node, called in names.items() if called.partition(" = ")[0] == part)
    return found


def test_the_table_has_the_papers_equations():
    numbers = {number for listed, _, _ in equations() for number in listed}
    assert numbers == {5, 6, 7, 8, 9, 20, 21, *range(22, 26), 26, 27, 28, *range(29, 33)}


@pytest.mark.parametrize(("numbers", "path", "name"), equations())
def test_an_equation_is_where_the_table_says_and_cites_its_number(numbers, path, name):
    if not numbers:
        assert definition(path, name)
        return
    cited = re.findall(r"eq\. (\d+)(?:-(\d+))?", ast.get_docstring(definition(path, name)).lower())
    covered = {number for first, last in cited for number in range(int(first), int(last or first) + 1)}
    assert covered.issuperset(numbers), f"{path}:{name} cites {sorted(covered)}"
