# SPDX-License-Identifier: Apache-2.0
"""The ``jaxdec`` command: parse, check what can be checked cheaply, call the library, print.

Only the standard library is imported here. ``--help``, ``--version`` and every wrong option or path
are answered before JAX is loaded; a mistake ends with one sentence and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Returns:
    The exit code: 0 fine, 1 a check failed, 2 a mistake in the arguments, 130 interrupted.
  """
  from jaxdec.errors import UserError

  args = list(sys.argv[1:] if argv is None else argv)
  try:
    return _dispatch(args)
  except UserError as error:
    print(f"jaxdec: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("jaxdec: interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:
    sys.stderr.close()  # the reader went away (`jaxdec ... | head`); nothing left to tell it
    return 0


def _dispatch(args: list[str]) -> int:
  if args[:1] in (["--version"], ["-V"]):
    from jaxdec import __version__

    print(f"jaxdec {__version__}")
    return 0

  from jaxdec.cli.configs import COMMANDS

  if not args or args[0] in ("-h", "--help", "help"):
    print(_usage(COMMANDS))
    return 0
  name, rest = args[0], args[1:]
  if name not in COMMANDS:
    from jaxdec.errors import UserError, nearest

    kind = "option" if name.startswith("-") else "command"
    options = (*COMMANDS, "--help", "--version")
    raise UserError(
      f"unknown {kind} {name!r}{nearest(name, options)}; commands are {', '.join(COMMANDS)}"
    )

  from jaxdec.cli.parse import parse

  config = parse(name, COMMANDS[name], rest)

  from jaxdec.cli.checks import check

  check(config)

  from jaxdec.cli import commands

  return getattr(commands, name)(config)


def _usage(commands: dict[str, type]) -> str:
  lines = ["usage: jaxdec COMMAND [OPTIONS]", "", "Decoding fast and reading long, in JAX.", ""]
  for name, config in commands.items():
    lines.append(f"  {name:<10}{(config.__doc__ or '').strip().splitlines()[0]}")
  lines += ["", "`jaxdec COMMAND --help` lists the options of a command; `jaxdec --version`."]
  return "\n".join(lines)
