"""docs/api.md says what the docstrings say."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_these_docstrings(make_api):
    assert (DOCS / "api.md").read_text(encoding="utf-8") == make_api.page(), "run make api"


def test_every_public_function_and_method_has_a_docstring(make_api):
    for module in map(importlib.import_module, make_api.MODULES):
        for name in module.__all__:
            item = getattr(module, name)
            assert inspect.getdoc(item), f"{module.__name__}.{name}"


def test_fields_have_the_strings_under_them(make_api):
    entry = make_api.entry("RankMicroBatch", importlib.import_module("flexsp.data").RankMicroBatch)
    assert "- `input_ids: Tensor`: (1, t) int64." in entry
    assert "- `.num_labels`: Labels of this rank that count." in entry
