# SPDX-License-Identifier: Apache-2.0
"""Every mistake gets one sentence before anything is compiled."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxdec.decoding import Sampler, compilations, generate
from jaxdec.drafting import DraftModel
from jaxdec.errors import UserError
from jaxdec.models import Decoder
from tests.decoding.targets import Letters, Scripted, target


@pytest.mark.parametrize("options, words", [
  ({"prompts": []}, "prompts is empty"),
  ({"prompts": [[1], []]}, "prompt 1 is empty"),
  ({"prompts": [""], "tokenizer": Letters()}, "prompt 0 is empty"),
  ({"prompts": "abc", "tokenizer": Letters()}, "must be a list"),
  ({"prompts": ["abc"]}, "needs a tokenizer"),
  ({"prompts": [[1, 13]]}, "token id 13, outside the vocabulary of 13"),
  ({"prompts": [[-1]]}, "token id -1"),
  ({"prompts": [[1.5]]}, "integer token ids"),
  ({"prompts": [[[1, 2]]]}, "flat list"),
  ({"prompts": [[1] * 150], "max_new_tokens": 11}, "161, over the model's limit of 160"),
  ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
  ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
  ({"stop": [13]}, "stop id 13"),
  ({"stop": "x"}, "tokenizer"),
  ({"stop": [""], "tokenizer": Letters()}, "must not be empty"),
  ({"stop": [None]}, "NoneType"),
  ({"seed": [1, 2]}, "2 entries for 1 prompts"),
  ({"seed": "x"}, "seed must be"),
  ({"sampler": 0.5}, "must be a Sampler"),
  ({"drafter": "prompt_lokup"}, "did you mean 'prompt_lookup'"),
  ({"drafter": 3}, "name or a Drafter"),
  ({"rule": "mtach"}, "did you mean 'match'"),
  ({"rule": "ratio", "drafter": Scripted(), "sampler": Sampler(temperature=1.0)}, "scripted"),
  ({"drafter": "draft_model"}, "draft_model"),
  ({"drafter": DraftModel(model=target(vocab=11)[0]), "drafter_params": {"x": 1}}, "of 11 .* 13"),
  ({"drafter": DraftModel(model=target()[0])}, "no parameters"),
  ({"prefill_chunk": 0}, "prefill_chunk"),
])  # fmt: skip
def test_mistakes(options, words):
  model, params = target()
  before = compilations()
  with pytest.raises(UserError, match=words) as caught:
    generate(model, params, **{"prompts": [[1, 2]], "max_new_tokens": 4, **options})
  assert compilations() == before
  assert "\n" not in str(caught.value)


def test_the_scanned_layout_is_refused():
  model, params = target()
  with pytest.raises(UserError, match="unrolled"):
    generate(Decoder(model.config, layout="scanned"), params, [[1]], max_new_tokens=2)


def test_prompts_of_numpy_and_text_are_the_same():
  model, params = target()
  want = generate(model, params, [[1, 2, 3]], max_new_tokens=3)
  assert (
    generate(model, params, [np.array([1, 2, 3], np.int64)], max_new_tokens=3).tokens == want.tokens
  )
  text = generate(model, params, ["bcd"], max_new_tokens=3, tokenizer=Letters())
  assert text.tokens == want.tokens and text.text == [Letters().decode(want.tokens[0])]


def test_bos_goes_before_text_once():
  model, params = target()
  model = Decoder(dataclasses.replace(model.config, bos_id=1))
  want = generate(model, params, [[1, 2, 3]], max_new_tokens=3)
  for text in ("cd", "bcd"):
    assert (
      generate(model, params, [text], max_new_tokens=3, tokenizer=Letters()).tokens == want.tokens
    )
