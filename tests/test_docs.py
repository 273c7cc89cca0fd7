"""Checks what the documentation says by running it."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import jax
import pytest

import otfusion_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "otfusion_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
README = ROOT / "README.md"
PRIMITIVES = ROOT / "docs" / "primitives.md"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# --- docstrings


def documentable(symbol: str) -> bool:
    """Whether a symbol can have a docstring of its own, as constants cannot."""
    value = getattr(otfusion_jax, symbol)
    wrapped = hasattr(value, "__wrapped__")  # jitted functions are of no class that inspect knows
    return inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value) or wrapped


@pytest.mark.parametrize("symbol", list(filter(documentable, otfusion_jax.__all__)))
def test_public_symbol_is_documented(symbol: str):
    value = getattr(otfusion_jax, symbol)
    docstring = inspect.getdoc(value) or ""
    assert docstring, f"{symbol} has no docstring"
    if inspect.isclass(value):
        # What dataclasses write where there is none.
        assert not docstring.startswith(f"{symbol}("), f"{symbol} has no docstring"
    elif not inspect.ismodule(value):
        signature = inspect.signature(value)
        if signature.parameters:
            assert re.search(r"^Args:$", docstring, re.M), f"{symbol} has no Args section"
        if signature.return_annotation is not None:
            assert re.search(r"^Returns:$", docstring, re.M), f"{symbol} has no Returns section"


# --- examples


def doctests() -> list[doctest.DocTest]:
    """All examples in the sources.

    Found in the syntax trees: doctest's own finder looks at live objects and overlooks those that
    decorators replaced, such as jitted functions.
    """
    parser = doctest.DocTestParser()
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            docstring = ast.get_docstring(node, clean=False)
            if docstring and ">>>" in docstring:
                line = node.body[0].lineno - 1
                label = f"{module_name(path)}:{getattr(node, 'name', '')}"
                found.append(parser.get_doctest(docstring, {}, label, str(path), line))
    return found


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("example", doctests(), ids=lambda example: example.name)
def test_doctest(example: doctest.DocTest):
    module = importlib.import_module(example.name.partition(":")[0])
    example.globs = dict(vars(module))
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def python_blocks(markdown: str) -> list[tuple[int, str]]:
    """The first line's number and the text of each fenced Python block."""
    fence = re.compile(r"^```(?:python|py)\b[^\n]*\n(.*?)^```", re.M | re.S)
    return [(markdown.count("\n", 0, m.start(1)), m[1]) for m in fence.finditer(markdown)]


@pytest.mark.compatibility
@pytest.mark.usefixtures("default_promotion")
def test_readme_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocks = python_blocks(README.read_text())
    assert blocks, "README.md has no Python block"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, block in blocks:
        # Padded, so that a traceback shows the README's own line.
        exec(compile("\n" * line + block, str(README), "exec"), namespace)


@pytest.mark.compatibility
def test_documented_primitives_are_the_registered_ones():
    """On the version of JAX that the page names; on others the rules are the same."""
    rules = importlib.import_module("otfusion_jax.tracing.rules")
    begin, end = "<!-- primitives:begin -->", "<!-- primitives:end -->"
    page = PRIMITIVES.read_text()
    match = re.search(f"{begin}(.*?){end}", page, re.S)
    assert match, f"{name(PRIMITIVES)} has no {begin} ... {end}"
    written, found = match[1].strip(), rules.primitive_table().strip()
    if f"JAX {jax.__version__}" in page:
        assert written == found, (
            f"{name(PRIMITIVES)}: put otfusion_jax.tracing.rules.primitive_table() between "
            f"{begin} and {end}"
        )
    else:
        # Some rules are for primitives that other versions do not have.
        assert what_rules_say(found) <= what_rules_say(written)


def what_rules_say(table: str) -> set[tuple[str, str]]:
    """The name of each rule of a table and what it does to axes."""
    cells = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return {(row[0].strip(), row[-1].strip()) for row in cells}


@pytest.mark.parametrize("path", [README, *sorted(README.parent.glob("docs/*.md"))], ids=name)
def test_links_lead_somewhere(path: Path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)$", text, re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, f"{name(path)} has no heading for {link}"
        elif "://" not in link:
            assert (path.parent / link).exists(), (
                f"{name(path)} leads to {link}, which is not there"
            )


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_library_never_prints(path: Path):
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not calls, f"{name(path)} prints on lines {calls}"
