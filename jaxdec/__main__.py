# SPDX-License-Identifier: Apache-2.0
"""``python -m jaxdec`` is the ``jaxdec`` command."""

import sys

from jaxdec.cli import main

if __name__ == "__main__":
  sys.exit(main())
