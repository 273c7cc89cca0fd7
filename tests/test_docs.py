"""Checks what the documentation says by running it."""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import re
from pathlib import Path

import jax
import pytest

import otfusion_jax
from otfusion_jax.tracing import registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "otfusion_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
README = ROOT / "README.md"
PRIMITIVES = ROOT / "docs" / "primitives.md"
MESSAGES = ROOT / "docs" / "messages.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def has_python(page: Path) -> bool:
    return "```python\n" in page.read_text()


# Tested elsewhere: README.md below, and docs/files.md, which runs commands too, in test_cli.py.
ELSEWHERE = ("README.md", "files.md")
EXECUTED = [page for page in filter(has_python, PAGES) if page.name not in ELSEWHERE]
"""Pages whose Python blocks are run, and print what the blocks of text below them say."""


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


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps rules that documentation registers from other tests."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "_selecting", set(registry._selecting))


@pytest.mark.usefixtures("default_promotion", "own_registry")
@pytest.mark.parametrize("example", doctests(), ids=lambda example: example.name)
def test_doctest(example: doctest.DocTest):
    module = importlib.import_module(example.name.partition(":")[0])
    example.globs = dict(vars(module))
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def fenced_blocks(markdown: str) -> list[tuple[int, str, str]]:
    """Of each fenced block the first line's number, the language and the text."""
    fence = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
    return [(markdown.count("\n", 0, m.start(2)), m[1], m[2]) for m in fence.finditer(markdown)]


def run_block(path: Path, line: int, block: str, namespace: dict) -> str:
    """Runs a block of a page and returns what it prints."""
    printed = io.StringIO()
    # Padded, and with the page's name, so that messages name the page's own lines.
    code = compile("\n" * line + block, name(path), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


PERCENT = re.compile(r" *\d+\.\d(?=%)")


def require_agreement(printed: str, said: str, where: str) -> None:
    """Checks that a block prints what its page says.

    Accuracies of networks that were trained in the block may be another's of 50: training rounds
    differently from version to version. Of those that are no better than a guess, to average what
    does not correspond, nothing more than that is stable.
    """
    assert PERCENT.sub("", printed) == PERCENT.sub("", said), where
    figures = zip(PERCENT.findall(printed), PERCENT.findall(said), strict=True)
    for found, expected in figures:
        if float(expected) < 40:
            assert float(found) < 40, where
        else:
            assert float(found) == pytest.approx(float(expected), abs=6), where


@pytest.mark.compatibility
@pytest.mark.usefixtures("default_promotion")
def test_readme_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (line, language, code), (_, _, said), (_, _, table) = fenced_blocks(README.read_text())[1:4]
    assert language == "python"
    namespace = {"__name__": "__main__"}
    printed = run_block(README, line, code, namespace)
    require_agreement(printed, said, "README.md")
    assert str(namespace["symmetry"]).split() == table.split()


@pytest.mark.compatibility
@pytest.mark.usefixtures("default_promotion", "own_registry")
@pytest.mark.parametrize("page", EXECUTED, ids=name)
def test_pages_print_what_they_say(page: Path):
    blocks = fenced_blocks(page.read_text())
    namespace = {"__name__": "__main__"}
    nothing = (0, "", "")
    for (line, language, text), following in zip(blocks, [*blocks[1:], nothing], strict=True):
        if language != "python":
            continue
        printed = run_block(page, line, text, namespace)
        if following[1] == "text":
            require_agreement(printed, following[2], f"{name(page)}, the block at line {line}")


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


# --- the table of messages


def template(node: ast.AST) -> str | None:
    """A text of the sources, with an ellipsis in the place of what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        return "".join(map(str, parts))
    return None


def test_the_messages_of_the_table_are_those_of_the_library():
    texts = []
    for path in SOURCES:
        texts += filter(None, map(template, ast.walk(ast.parse(path.read_text()))))
    rows = re.findall(r"^\| `([^`]+ [^`]+)`[^|`]*\|", MESSAGES.read_text(), re.M)
    assert len(rows) > 50
    for row in rows:
        pieces = [piece.strip() for piece in row.split("…")]
        assert any(all(piece in text for piece in pieces) for text in texts), row


def test_the_classes_of_errors_and_warnings_are_in_the_table():
    page = MESSAGES.read_text()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name in otfusion_jax.__all__:
                value = getattr(otfusion_jax, node.name)
                if issubclass(value, BaseException):
                    assert f"| `{node.name}` |" in page, node.name


# --- the site


def test_every_public_name_is_on_one_page_of_the_reference():
    shown = []
    for page in sorted(ROOT.glob("docs/api/*.md")):
        shown += re.findall(r"^::: otfusion_jax\.(\w+)$", page.read_text(), re.M)
    assert sorted(shown) == sorted(otfusion_jax.__all__)


def anchors_of(page: Path) -> set[str]:
    """The names by which links lead to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)$", text, re.M)
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{name(path)} leads to {link}, which is not there"
        if anchor:
            assert anchor in anchors_of(target), f"{name(path)}: there is no heading for {link}"


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
