"""The house keeps its plan: imports point downward, no circles, torch stays where it belongs."""

import ast
import re
from pathlib import Path

import pytest

from support.checkpoints import ROOT

PACKAGE = ROOT / "qwen_precision"
FILES = sorted(PACKAGE.rglob("*.py"))

RANKS = {
    # folder: rank; a folder imports lower ranks only, never another of its own rank
    "record": 1,
    "qwen3": 2,
    "settings": 2,
    "judge": 3,
    "model": 3,
    "watcher": 3,
    "probe": 4,
    "blocks": 4,
    "render": 4,
    "rescue": 5,
    "report": 5,
    "generate": 6,
    "diagnose": 6,
    "vllm": 6,
    "cli": 7,
}
"""Files that lie in no folder (errors, dtypes, …) are below all of them."""

NO_TORCH = {"record", "qwen3", "settings", "judge", "blocks", "render", "report", "cli"}
"""Reading and judging a record needs no torch; the command line imports it when a verb runs."""


def folder(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, at_import_time: bool = False) -> list[tuple[str, str]]:
    """(module, name) of everything a file imports, under TYPE_CHECKING and inside functions too unless told not to."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lazy.update(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if node in lazy:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found.extend((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            found.extend((alias.name, "") for alias in node.names)
    return found


def tree_of(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))


def opening(name: str) -> str:
    return ast.get_docstring(tree_of(name)) or ""


def may_import(name: str) -> str:
    return re.search(r"^May import: (.*)\.$", opening(name), flags=re.MULTILINE)[1]  # type: ignore[index]


def exported(name: str) -> set[str]:
    for node in tree_of(name).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def house() -> str:
    """The table of CONTRIBUTING: a row a folder, the lowest first."""
    rows = [f"| {RANKS[name]} | `{name}/` | {opening(name).splitlines()[0]} | {may_import(name)} |" for name in RANKS]
    beside = ", ".join(f"`{path.stem}`" for path in sorted(PACKAGE.glob("*.py")) if not path.name.startswith("__"))
    rows.insert(0, f"| 0 | {beside} | What everybody needs: number formats, errors, files, progress. | nothing |")
    return "| rank | folder | what lives here | may import |\n|---|---|---|---|\n" + "\n".join(rows)


NAMED = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def test_every_folder_has_a_rank_and_every_rank_a_folder() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(RANKS)


@NAMED
def test_a_folder_imports_lower_ranks_only(path: Path) -> None:
    mine = RANKS.get(folder(path), 0 if path.name not in {"__init__.py", "__main__.py"} else 9)
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "qwen_precision" and len(parts) > 1 and parts[1] in RANKS and parts[1] != folder(path):
            assert RANKS[parts[1]] < mine, f"{path.relative_to(ROOT)} imports {name}"


@NAMED
def test_a_folder_is_entered_by_its_front_door(path: Path) -> None:
    """What another folder uses is what ``__init__`` exports; what is inside can move without anybody knowing."""
    for name, item in imports(path):
        parts = name.split(".")
        if parts[0] == "qwen_precision" and len(parts) > 1 and parts[1] in RANKS and parts[1] != folder(path):
            assert len(parts) == 2, f"{path.relative_to(ROOT)} imports {name}, not qwen_precision.{parts[1]}"
            assert item in exported(parts[1]), f"{path.relative_to(ROOT)} imports {item} from {name}"


@pytest.mark.parametrize("name", RANKS)
def test_every_folder_opens_with_what_it_is_and_what_it_may_import(name: str) -> None:
    assert opening(name).splitlines()[0] and exported(name)
    lower = [other for other, rank in RANKS.items() if rank < RANKS[name]]
    assert may_import(name) == (", ".join(lower) or "no other folder")


def test_the_table_of_folders_in_contributing_is_this_one(request: pytest.FixtureRequest) -> None:
    path = ROOT / "CONTRIBUTING.md"
    text, wanted = path.read_text(encoding="utf-8"), f"<!-- begin:house -->\n{house()}\n<!-- end:house -->"
    if request.config.getoption("--update-golden"):
        text = re.sub("<!-- begin:house -->.*?<!-- end:house -->", lambda _: wanted, text, flags=re.DOTALL)
        path.write_text(text, encoding="utf-8")
    assert wanted in text, "run `make golden` and read the diff of CONTRIBUTING.md"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name)
def test_no_test_file_imports_from_another(path: Path) -> None:
    assert not [name for name, _ in imports(path) if name.split(".")[0].startswith(("test_", "conftest", "tests"))]


def test_no_two_files_import_each_other_round_any_corner() -> None:
    names = {module(path) for path in FILES}
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        targets = {f"{name}.{item}" if f"{name}.{item}" in names else name for name, item in imports(path)}
        arrows[module(path)] = targets & names
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(arrows[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in sorted(arrows):
        walk(name, ())


@pytest.mark.parametrize(
    "path", [path for path in FILES if folder(path) in NO_TORCH], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_reading_judging_and_rendering_need_no_torch(path: Path) -> None:
    assert not {"torch", "transformers"} & {name.split(".")[0] for name, _ in imports(path, at_import_time=True)}


@NAMED
def test_no_function_is_too_long_to_read(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{path.name}: {node.name} has {length} lines"


@NAMED
def test_every_module_says_what_it_does(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@NAMED
def test_code_looks_as_the_formatter_leaves_it(path: Path) -> None:
    assert not re.search(r"# fmt: (skip|off)", path.read_text(encoding="utf-8"))
