# SPDX-License-Identifier: Apache-2.0
"""Decoders that change the output or its law, on purpose.

Nothing here gives the tokens, or the law of the tokens, of ``generate``: beams search for probable
texts, superposed drafts approximate them, cautious decoding and contrast prefer some texts to
others, constraints forbid some. Each module says what it changes.
"""

from jaxdec.decoding.lossy.beam import Beams, generate_beams

__all__ = ["Beams", "generate_beams"]
