"""docs/api.md says what the docstrings say."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from flexsp import data

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


def test_what_a_protocol_requires_is_listed(make_api):
    entry = make_api.entry("Corpus", importlib.import_module("flexsp.data").Corpus)
    assert "- `lengths: LengthArray`: (documents,) tokens, each at least 1." in entry
    assert "- `num_empty: int`: Documents of no token, which were left out; for the log." in entry
    assert "max_token" not in entry, "nothing reads it: a corpus of one's own need not have it"


def test_attributes_that_a_public_class_sets_are_listed(make_api):
    for module in map(importlib.import_module, make_api.MODULES):
        for name in module.__all__:
            item = getattr(module, name)
            if inspect.isclass(item) and "__init__" in vars(item) and not dataclasses.is_dataclass(item):
                page = make_api.entry(name, item)
                for attribute in re.findall(
                    r"^        self\.([a-z]\w*)(?::| =|,)", inspect.getsource(item.__init__), re.M
                ):
                    assert re.search(rf"- `\.?{attribute}\b", page), f"{module.__name__}.{name}.{attribute}"


def test_what_apply_context_limit_returns_has_an_entry(make_api):
    assert "- `lost_tokens: int`: Tokens that are not trained." in make_api.page()


def test_apply_context_limit_takes_what_the_protocol_says_and_no_more():
    """A corpus of one's own, with the attributes that the page lists."""

    class Own:
        name, num_empty, lengths = "own", 0, np.array([3, 5])

        def read(self, document, start, stop):
            return np.arange(start, stop), np.arange(start, stop)

        def describe(self, document):
            return f"document {document}"

    declared = inspect.get_annotations(data.Corpus)
    assert sorted(declared) == sorted(name for name in vars(Own) if name in ("name", "num_empty", "lengths"))
    sequences, _ = data.apply_context_limit(Own(), 4, data.Overlong.SPLIT)
    assert sequences.lengths.tolist() == [3, 4, 1]
    assert len(data.hold_out(Own(), 1, seed=0)[0].lengths) == 1
