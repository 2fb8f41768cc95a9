# SPDX-License-Identifier: Apache-2.0
"""What the launchers share: checked options, commands shown or run, the line that trains."""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Mistake(Exception):
  """One sentence for the user; exit code 2."""


class Commands:
  """Runs commands, or with ``dry_run`` prints them: every line can be pasted into a shell."""

  def __init__(self, tools: dict[str, str], *, dry_run: bool):
    self.dry_run = dry_run
    for tool, where in tools.items():
      if not dry_run and shutil.which(tool) is None:
        raise Mistake(f"{tool} is not installed; {where}, or look at the commands with --dry-run")

  def run(self, *args: str, may_fail: bool = False) -> int:
    """The exit code; anything but 0 is an error unless it ``may_fail``."""
    print(f"+ {shlex.join(args)}" if not self.dry_run else shlex.join(args), flush=True)
    if self.dry_run:
      return 0
    code = subprocess.run(args, cwd=ROOT, check=False).returncode
    if code and not may_fail:
      raise Mistake(f"{shlex.join(args[:5])} ... ended with code {code}; its own words are above")
    return code

  def read(self, *args: str) -> str | None:
    """What a command prints, None where it fails. Not run under ``dry_run``."""
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def parser(description: str) -> argparse.ArgumentParser:
  """Options of every launcher."""
  out = argparse.ArgumentParser(
    description=description, epilog="What follows -- goes to `jaxdec train` as it is."
  )
  out.add_argument("config", help="configuration in this repository, file.py or file.py:preset")
  out.add_argument("--name", required=True, help="of the run, its folder and its resources")
  out.add_argument("--spot", action="store_true", help="cheaper, and preempted at any time")
  out.add_argument("--dry-run", action="store_true", help="print the commands and stop")
  return out


def parse(options: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
  """Options, with ``train`` the arguments after ``--``; checks what all launchers have."""
  argv = list(argv)
  at = argv.index("--") if "--" in argv else len(argv)
  found = options.parse_args(argv[:at])
  found.train = argv[at + 1 :]
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", found.name):
    raise Mistake(
      f"--name {found.name!r} must be at most 40 lower-case letters, digits and hyphens, with a "
      "letter first and no hyphen last"
    )
  if any(arg.startswith("--work-dir") for arg in found.train):
    raise Mistake("the run's folder is made from --name; leave --work-dir out")
  _check_config(found.config)
  return found


def _check_config(config: str) -> None:
  """Workers get what git has at HEAD."""
  file = config.partition(":")[0]
  path = (pathlib.Path.cwd() / file).resolve()
  if not path.is_file() or ROOT not in path.parents:
    raise Mistake(f"configuration {file!r} is no file of this repository")
  if pathlib.Path.cwd().resolve() != ROOT:
    raise Mistake(f"start the launcher in the root of the repository, {ROOT}")
  known = subprocess.run(
    ["git", "cat-file", "-e", f"HEAD:{path.relative_to(ROOT)}"],
    cwd=ROOT, capture_output=True, check=False,
  )  # fmt: skip
  if known.returncode:
    raise Mistake(f"configuration {file!r} is not committed; workers get what git has at HEAD")


def train(options: argparse.Namespace, jaxdec: str, runs: str) -> str:
  """The line that every worker runs; a folder that holds the run already is resumed."""
  args = [options.config, "--work-dir", f"{runs}/{options.name}", *options.train]
  return f"{jaxdec} train {shlex.join(args)}"


def main(launch, argv: Sequence[str] | None = None) -> int:
  """Runs a launcher; a mistake is one sentence."""
  try:
    return launch(sys.argv[1:] if argv is None else argv)
  except Mistake as error:
    print(f"launch: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("launch: stopped here; what was created stays and costs", file=sys.stderr)
    return 130
