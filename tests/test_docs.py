"""The prose: links lead somewhere, examples compile, and what is documented is what is there."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

import hf_kvattn

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, words joined by hyphens, other characters dropped."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def backticked(page: Path) -> set[str]:
    """Everything that a page sets in backticks, and the file name at the end of each path among it."""
    spans = set(re.findall(r"`([^`\n]+)`", prose(page)))
    return spans | {span.rpartition("/")[2] for span in spans}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{name(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_examples_compile(page):
    for language, code in FENCE.findall(page.read_text()):
        if language == "python":
            compile(code, name(page), "exec")


def test_readme_is_one_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_within_120_columns(page):
    long = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long


def test_every_public_name_is_in_the_api_page():
    page = ROOT / "docs/api.md"
    missing = {each.lower() for each in hf_kvattn.__all__} - anchors(page)
    assert not missing, f"docs/api.md has no heading for {sorted(missing)}"


def test_every_file_is_in_the_architecture_page():
    named = backticked(ROOT / "docs/architecture.md")
    package = ROOT / "hf_kvattn"
    files = [file for kind in ("*.py", "*.h", "*.cpp", "*.txt") for file in package.rglob(kind)]
    rooms = {"evaluation", "convert"}  # described as folders
    missing = [
        name(file)
        for file in files
        if file.relative_to(package).parts[0] not in rooms
        and (file.name != "__init__.py" or file.parent == package)
        and not any(fnmatch(file.name, pattern) for pattern in named)
    ]
    assert not missing, f"not in docs/architecture.md: {sorted(missing)}"


def test_every_script_is_in_the_architecture_page():
    named = backticked(ROOT / "docs/architecture.md")
    assert {file.name for file in (ROOT / "scripts").glob("*.*")} <= named


def test_the_readmes_step_times_are_those_of_the_card():
    results = json.loads((ROOT / "model_cards/smollm2-135m-static/results.json").read_text())
    cells = {(cell["context"], cell["batch"]): cell for cell in results["throughput"]["cells"]}
    rows = {
        "transformers, default (`DynamicCache`)": "stock-dynamic",
        "transformers, `StaticCache` sized to fit": "stock-static",
        "transformers, `StaticCache` of 8,192 tokens": "stock-static-8192",
        "hf_kvattn, `StaticKVCache` sized to fit": "kvattn-static-fit",
    }
    readme = (ROOT / "README.md").read_text().replace("**", "")
    for title, variant in rows.items():
        found = [
            next(row["step_ms"]["median"] for row in cells[cell]["rows"] if row["variant"] == variant)
            for cell in ((128, 1), (2048, 1), (7900, 1), (2048, 8))
        ]
        assert f"| {title} | {' | '.join(f'{value:.1f}' for value in found)} |" in readme
