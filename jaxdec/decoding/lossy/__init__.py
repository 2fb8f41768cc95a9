# SPDX-License-Identifier: Apache-2.0
"""Decoders that change the output or its law, on purpose.

Nothing here gives the tokens, or the law of the tokens, of ``generate``: beams search for probable
texts, superposed drafts approximate them, cautious decoding and contrast prefer some texts to
others, constraints forbid some. Each module says what it changes.
"""

from jaxdec.decoding.lossy.beam import Beams, generate_beams
from jaxdec.decoding.lossy.cautious import Cautious, generate_cautious
from jaxdec.decoding.lossy.constrained import Constrained, Constraint, generate_constrained
from jaxdec.decoding.lossy.contrastive import Contrasted, generate_contrastive
from jaxdec.decoding.lossy.ngrams import NGrams, build_ngrams
from jaxdec.decoding.lossy.superposed import Superposed, generate_superposed

__all__ = [
  "Beams",
  "Cautious",
  "Constrained",
  "Constraint",
  "Contrasted",
  "NGrams",
  "Superposed",
  "build_ngrams",
  "generate_beams",
  "generate_cautious",
  "generate_constrained",
  "generate_contrastive",
  "generate_superposed",
]
