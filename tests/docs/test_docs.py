"""The documentation says what the code says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_key_table_is_the_codes_own():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = generate.PAGE.read_text()
    assert text == generate.page(text), "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_shipped_run_file_stands_in_the_documentation():
    shipped = json.loads((ROOT / "configs" / "gpt2_tiny.json").read_text())
    page = (ROOT / "docs" / "run-file.md").read_text()
    blocks = re.findall(r"```json\n(\{.*?\n\})\n```", page, re.S)
    assert shipped in [json.loads(block) for block in blocks]
