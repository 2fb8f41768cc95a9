# SPDX-License-Identifier: Apache-2.0
"""Small, real text for the data tests: parts of the standard library of this interpreter."""

from __future__ import annotations

import itertools

import pytest

from jaxdec.data import python_stdlib
from jaxdec.data.tokenizer_training import train_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXDEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def stdlib_documents():
  """Thirty documents of at most 8,000 characters, about 60 kB."""
  short = (d for d in python_stdlib.sources("train") if len(d.text) < 8000)
  return list(itertools.islice(short, 30))


@pytest.fixture(scope="session")
def tokenizer(stdlib_documents):
  return train_tokenizer((d.text for d in stdlib_documents), vocab_size=600)
