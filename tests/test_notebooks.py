"""Every notebook keeps the rules a reader relies on, and every exercise fails on its stub and passes on its solution."""

import ast
import copy
import pathlib
import re

import nbformat
import pytest

from hstu_lab import checks

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LONGEST_CELL = 14
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>(.*?)</details>", re.DOTALL)
FENCED = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
IN_SOURCE = {
    r"\bsys\.path\b": "changes sys.path",
    r"(^|\s)[%!]?\s*(python -m )?(uv )?pip3? install": "installs packages",
}
ANYWHERE = {rf"/(home|root|Users)/|{re.escape(str(FOLDER.parent))}/": "names a private folder"}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", [])]


def texts(output):
    """Everything in an output that a reader can read."""
    if output.output_type == "stream":
        yield output.text
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield "".join(value)


def problems(notebook) -> list[str]:
    """The rules that a notebook breaks, each as a line naming the cell."""
    found = []
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        found.append(f"not a valid notebook: {error.message}")
    if "widgets" in notebook.metadata:
        found.append("stores widget state")
    cells, run = notebook.cells, 0
    for i, cell in enumerate(cells):
        where = f"cell {i}"
        if cell.cell_type == "markdown":
            continue
        run += 1
        if cell.execution_count != run:
            found.append(f"{where}: execution count {cell.execution_count} in place of {run}: not one run from top to bottom")
        if sum(bool(line.strip()) for line in cell.source.splitlines()) > LONGEST_CELL:
            found.append(f"{where}: more than {LONGEST_CELL} lines")
        if i + 1 == len(cells) or cells[i + 1].cell_type != "markdown":
            found.append(f"{where}: no markdown after it says what to notice")
        read = [cell.source]
        found += [f"{where}: {what}" for pattern, what in IN_SOURCE.items() if re.search(pattern, cell.source, re.M)]
        for output in cell.outputs:
            if output.get("name") == "stderr":
                found.append(f"{where}: stores a warning: {output.text.strip().splitlines()[-1]}")
            if output.output_type == "error":
                found.append(f"{where}: stores an error: {output.ename}: {output.evalue}")
            found += [
                f"{where}: a figure is {k}, not PNG"
                for k in output.get("data", {})
                if k.startswith("image/") and k != "image/png"
            ]
            read += texts(output)
        found += [f"{where}: {what}" for pattern, what in ANYWHERE.items() if any(re.search(pattern, t, re.M) for t in read)]
    if not cells or cells[0].cell_type != "markdown" or not cells[0].source.startswith("# "):
        found.append("does not open with a title")
    if "banner()" not in "".join(cell.source for cell in tagged(notebook, "setup")[:1]):
        found.append("the first cell tagged setup does not show environment.banner()")
    if not tagged(notebook, "exercise"):
        found.append("has no exercise")
    return found


def exercise(notebook, cell) -> tuple[str, str, str]:
    """Name of the check, name of the function and the solution's source, of an exercise cell."""
    last = ast.parse(cell.source).body[-1]
    match last:
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("checks"), "check"), [ast.Constant(name), ast.Name(function)])):
            pass
        case _:
            raise AssertionError(f'the last line of an exercise is checks.check("NAME", function), not: {ast.unparse(last)}')
    after = notebook.cells[notebook.cells.index(cell) + 1].source
    solutions = [block for folded in SOLUTION.findall(after) for block in FENCED.findall(folded)]
    assert len(solutions) == 1, f"exercise {name}: {len(solutions)} folded solutions in the next cell in place of one"
    assert re.search(r"hint", after, re.I), f"exercise {name}: no hint"
    around = after + notebook.cells[notebook.cells.index(cell) - 1].source
    assert re.search(r"\d+ min", around), f"exercise {name}: says neither minutes nor difficulty"
    return name, function, solutions[0]


def prove(notebook, cell) -> None:
    """Stub fails, solution passes. Runs only the setup cells and the exercise itself."""
    name, function, solution = exercise(notebook, cell)
    namespace = {"__name__": "__notebook__"}
    for setup in tagged(notebook, "setup"):
        exec(setup.source, namespace)
    exec(cell.source, namespace)
    with pytest.raises(checks.CheckFailed):
        checks.check(name, namespace[function], strict=True)
    stub = namespace.pop(function)
    exec(solution, namespace)
    assert namespace[function] is not stub
    checks.check(name, namespace[function], strict=True)


def test_there_are_notebooks():
    assert NOTEBOOKS, f"no notebook in {FOLDER}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_keeps_the_rules(path):
    assert problems(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stubs_fail_and_solutions_pass(path):
    notebook = nbformat.read(path, as_version=4)
    exercises = tagged(notebook, "exercise")
    assert exercises, "no cell is tagged exercise"
    for cell in exercises:
        prove(notebook, cell)


def test_every_check_belongs_to_a_notebook():
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    used = [exercise(notebook, cell)[0] for notebook in notebooks for cell in tagged(notebook, "exercise")]
    assert sorted(used) == checks.names()


# The rules themselves: a small notebook that keeps them, and one way to break each.

STUB = 'def largest_batch(limit, fixed, per_user):\n    raise NotImplementedError\n\nchecks.check("largest-batch", largest_batch)'
ANSWER = """Hint: subtract first. (2 min, easy)
<details><summary>Solution</summary>

```python
def largest_batch(limit, fixed, per_user):
    return max(int((limit - fixed) // per_user), 0)
```
</details>"""


@pytest.fixture
def good():
    def code(count, source, *outputs, tags=()):
        return nbformat.v4.new_code_cell(source, execution_count=count, outputs=list(outputs), metadata={"tags": list(tags)})

    def stream(text):
        return nbformat.v4.new_output("stream", text=text)

    setup = "from hstu_lab import checks, environment\n\nenvironment.banner()"
    said = stream("✗ largest-batch: not written yet\n")
    cells = [
        nbformat.v4.new_markdown_cell("# A title"),
        code(1, setup, tags=["setup"]),
        nbformat.v4.new_markdown_cell("Versions."),
        code(2, STUB, said, tags=["exercise"]),
        nbformat.v4.new_markdown_cell(ANSWER),
    ]
    return nbformat.v4.new_notebook(cells=cells)


def test_a_good_notebook_has_no_problems(good):
    assert problems(good) == []
    prove(good, good.cells[3])


SVG = nbformat.v4.new_output("display_data", data={"image/svg+xml": "<svg/>"})
WARNING = nbformat.v4.new_output("stream", name="stderr", text="UserWarning: x\n")
ERROR = nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda n: n.cells[1].update(execution_count=None), "execution count None"),
        (lambda n: n.cells[3].update(execution_count=7), "execution count 7 in place of 2"),
        (lambda n: n.cells[1].outputs.append(ERROR), "stores an error"),
        (lambda n: n.cells[1].outputs.append(SVG), "not PNG"),
        (lambda n: n.cells[1].outputs.append(WARNING), "stores a warning: UserWarning"),
        (lambda n: n.cells[3].outputs[0].update(text="/home/me/x"), "private folder"),
        (lambda n: n.cells[3].outputs[0].update(text=f"{FOLDER.parent}/.venv/bin/python"), "private folder"),
        (lambda n: n.metadata.update(widgets={}), "widget state"),
        (lambda n: n.cells[1].update(source="import sys\nsys.path.append('..')\nenvironment.banner()"), "sys.path"),
        (lambda n: n.cells[1].update(source="!pip install torch\nenvironment.banner()"), "installs packages"),
        (lambda n: n.cells[1].update(source="environment.banner()\n" + "x = 1\n" * 14), "more than 14 lines"),
        (lambda n: n.cells[1].update(source="x = 1"), "banner"),
        (lambda n: n.cells.pop(), "no markdown after"),
        (lambda n: n.cells.pop(2), "no markdown after"),
        (lambda n: n.cells.pop(0), "title"),
        (lambda n: n.cells[3].metadata.update(tags=[]), "no exercise"),
        (lambda n: n.metadata.update(language_info="Python"), "not a valid notebook"),
    ],
)
def test_each_rule_notices_when_it_is_broken(good, spoil, message):
    broken = copy.deepcopy(good)
    spoil(broken)
    assert any(message in problem for problem in problems(broken)), problems(broken)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda n: n.cells[4].update(source=ANSWER.replace("(limit - fixed)", "limit")),
        lambda n: n.cells[4].update(source="Hint: no solution, 2 min"),
        lambda n: n.cells[4].update(source=ANSWER.replace("Hint", "")),
        lambda n: n.cells[4].update(source=ANSWER.replace("2 min", "")),
        lambda n: n.cells[3].update(source="def largest_batch():\n    pass"),
    ],
)
def test_an_exercise_that_does_not_work_is_noticed(good, spoil):
    spoil(good)
    with pytest.raises(AssertionError):
        prove(good, good.cells[3])


def test_a_stub_that_already_passes_is_noticed(good):
    good.cells[3].source = STUB.replace("raise NotImplementedError", "return max(int((limit - fixed) // per_user), 0)")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        prove(good, good.cells[3])
