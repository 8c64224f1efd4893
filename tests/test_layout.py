"""README's table of notebooks and modules is the layout: every module has its row, and imports run down the rows only."""

import ast
import fnmatch
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hstu_lab"
BESIDE = ("__init__.py", "__main__.py", "checks.py", "config.py", "options.py", "settings.py", "ops/__init__.py", "widgets/*")
"""What belongs to no notebook: README names these below the table."""


def rows() -> dict[int, list[str]]:
    """Notebook number -> its patterns of modules, e.g. {0: ["environment.py"], 4: ["ops/triton_*.py", ...]}."""
    found = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        if row := re.match(r"\| `(\d\d)_\w+` \|(.*?)\|", line):
            found[int(row[1])] = [f"{name}*" if name.endswith("/") else name for name in re.findall(r"`([^`]+)`", row[2])]
    return found


def row_of(path: str, table: dict[int, list[str]]) -> int | None:
    return next((row for row, patterns in table.items() if any(fnmatch.fnmatch(path, p) for p in patterns)), None)


def modules() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(source: str) -> set[str]:
    """Modules of this package that a source imports, anywhere in it, as paths; of `from package import name` both readings."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "hstu_lab":
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("hstu_lab.")}
    return {f"{name.partition('.')[2].replace('.', '/')}.py" for name in names if "." in name}


def upward(path: str, source: str, table: dict[int, list[str]]) -> list[str]:
    """Imports of that module that run up the table."""
    own = row_of(path, table)
    if own is None:
        return []
    return [f"{path} (row {own:02}) imports {name}" for name in sorted(imported(source)) if (row_of(name, table) or 0) > own]


def test_every_module_has_one_row_and_every_name_a_module():
    table, known = rows(), modules()
    assert len(table) > 10
    homeless = [p for p in known if row_of(p, table) is None and not any(fnmatch.fnmatch(p, b) for b in BESIDE)]
    assert not homeless, f"in no row of README's table of notebooks: {', '.join(homeless)}"
    named = [name for patterns in table.values() for name in patterns]
    gone = [name for name in named if not fnmatch.filter(known, name) and name != "capacity.py"]  # notebook 12 is to come
    assert not gone, f"named in README's table, and not there: {', '.join(gone)}"


def test_imports_run_down_the_table():
    table = rows()
    found = [line for path in modules() for line in upward(path, (PACKAGE / path).read_text(), table)]
    assert not found, "\n".join(found)


def test_an_import_that_runs_up_is_noticed_wherever_it_stands():
    source = "import torch\nfrom hstu_lab import config\n\ndef late():\n    from hstu_lab.pipeline import Recommender\n"
    assert upward("events.py", source, rows()) == ["events.py (row 01) imports pipeline.py"]
    assert upward("events.py", "from hstu_lab import server", rows()) == ["events.py (row 01) imports server.py"]
    assert upward("server.py", source, rows()) == []
