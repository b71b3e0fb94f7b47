"""What the documentation points to is there: files, recipes, configs, and what stands on its command lines."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", text)
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    missing = [link for link, _ in links if link and not (page.parent / link).exists()]
    assert not missing
    assert all(anchor in headings for link, anchor in links if not link)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_recipes_configs_and_benchmarks_that_are_named_exist(page):
    named = set(re.findall(r"\b(?:recipes|configs|benchmarks|vessl|wmtp)/[\w/.]+\.(?:py|yaml|sh)\b", page.read_text()))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    others = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not [name for name in others if f"({name})" not in index]


def test_no_page_names_a_folder_of_one_machine():
    pages = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
    assert not [name for name, text in pages.items() if re.search(r"(?<![\w.])/(?:home|work|root|tmp|Users)/", text)]
