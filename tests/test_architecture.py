"""The floors hold: imports point downward, torch stays where it belongs, no file grows past reading."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qwen_precision"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = [
    {"errors", "dtypes", "names", "operations", "parts", "upgrades", "packing"},
    {"files", "readings", "masks", "references", "generation", "rescaling"},
    {"remedy", "weightbits", "evidence", "weightfacts"},
    {"record", "watcher"},
    {"findings"},
    {"controls"},
    {"config", "facts"},
    {"needs"},
    {
        "guardsettings",
        "rescued",
        "clioptions",
        "surroundings",
        "rescueplan",
        "weightcheck",
        "checkpoint",
        "hub",
        "machine",
    },
    {"causes", "precision"},
    {"degenerate", "guards", "draw", "stopwatch", "nextcommand"},
    {"textchecks"},
    {"checks", "microscope", "prompts"},
    {"locate", "skeleton", "plan", "compare"},
    {"collect", "weights", "export", "sampling", "lanes", "rows", "render", "bundle", "redact"},
    {"measure", "logprobs", "mend", "terminal", "reporting"},
    {"head", "decode"},
    {"shadow"},
    {"rescue"},
    {"probe"},
    {"deliver", "rescaler", "again"},
    {"explain", "sweep"},
    {"triggers"},
    {"diagnose"},
    {"generate"},
    {"cli"},
    {"__main__", "__init__"},
]
NO_TORCH = {
    "bundle",
    "compare",
    "redact",
    "reporting",
    "causes",
    "checks",
    "controls",
    "clioptions",
    "needs",
    "remedy",
    "rescaling",
    "rescued",
    "surroundings",
    "cli",
    "config",
    "degenerate",
    "dtypes",
    "errors",
    "evidence",
    "facts",
    "files",
    "findings",
    "generation",
    "guardsettings",
    "hub",
    "names",
    "nextcommand",
    "operations",
    "packing",
    "parts",
    "precision",
    "prompts",
    "record",
    "references",
    "render",
    "terminal",
    "textchecks",
    "upgrades",
    "weightfacts",
}


def part(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and top_level_only
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if lazy or typing_only:
            skipped.update(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward_only(path: Path) -> None:
    level = {name: number for number, names in enumerate(FLOORS) for name in names}
    mine = level[part(path)]
    for module in imports(path):
        if module.startswith("qwen_precision."):
            other = module.split(".")[1]
            assert other == part(path) or level[other] < mine, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", [path for path in FILES if part(path) in NO_TORCH], ids=lambda path: path.name)
def test_judging_and_rendering_need_no_torch(path: Path) -> None:
    assert not {"torch", "transformers"} & {module.split(".")[0] for module in imports(path, top_level_only=True)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_and_no_function_is_too_long_to_read(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 320, path
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 40, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_does(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))
