#!/usr/bin/env bash
# Makes .venv from the pinned versions in constraints.txt, once; says nothing when there is nothing to do. It changes only a
# .venv that it made: that one is brought up to date, or follows a moved checkout, where it stands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/complete # written last: without it .venv counts as unfinished
log=.venv/setup.log  # written first: with it .venv is ours

say() { echo "setup: $*"; }

# What the environment depends on: the pins, the declared dependencies, and the folder $1, where its paths point.
fingerprint() { { printf '%s\n' "$1"; cat constraints.txt; sed '/^\[tool\./,$d' pyproject.toml; } | cksum; }

is_of() { [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint "$1")" ]; }

runs() { .venv/bin/python -c '' 2>/dev/null; }

# The folder in which .venv was made.
birthplace() {
  local path
  path=$(sed -n 's/^command = .* -m venv \(--[a-z-]* \)*//p' .venv/pyvenv.cfg 2>/dev/null || true)
  echo "${path%/.venv}"
}

# True if a .venv of somebody else has what the Makefile calls.
serves() {
  .venv/bin/python -c '
from importlib.metadata import version
for name in ("megatron-longact", "megatron-core", "torch", "pytest", "ruff", "mypy"): version(name)' 2>/dev/null
}

# True if .venv holds a file: folders alone are nobody'"'"'s.
holds_files() {
  shopt -s nullglob dotglob
  local path
  for path in .venv/* .venv/*/* .venv/*/*/* .venv/*/*/*/*; do
    if [ ! -d "$path" ] || [ -L "$path" ]; then return 0; fi
  done
  return 1
}

# A venv holds its own path in a few text files; $1 is the folder that they name.
mend_paths() {
  .venv/bin/python - "$1" "$PWD" <<'PYTHON'
import sys
from pathlib import Path

old, new = (folder.encode() for folder in sys.argv[1:])
packages = Path(".venv").glob("lib/python*/site-packages")
files = [*Path(".venv/bin").iterdir(), Path(".venv/pyvenv.cfg")]
for folder in packages:
    files += [file for name in ("__editable__*", "*.dist-info/direct_url.json") for file in folder.glob(name)]
for file in files:
    if file.is_file() and not file.is_symlink():
        text = mended = file.read_bytes()
        for end in (b"/", b"'", b'"'):
            mended = mended.replace(old + end, new + end)
        if mended != text:
            file.write_bytes(mended)
PYTHON
}

# Shortens pip's output to what takes time.
progress() {
  local line
  while IFS= read -r line; do
    case $line in
      *Downloading*"("[0-9][0-9][0-9]*MB* | *Downloading*GB*) say "${line#"${line%%[![:space:]]*}"}" ;;
      "Installing collected packages"*) say "installing (a minute or two)" ;;
    esac
  done
}

new=""
give_up() {
  if [ -f "$stamp" ]; then return; fi
  if [ -s "$log" ]; then tail -n 15 "$log" >&2; fi
  if [ -n "$new" ]; then
    rm -rf .venv
    say "did not finish; the unfinished .venv was removed" >&2
  else
    say "did not finish; .venv is as far as it came, and 'make setup' goes on with it" >&2
  fi
}

# One setup at a time, where the system has flock; the lock is on this file, so nothing is left behind.
exec 9<scripts/setup.sh
if command -v flock >/dev/null; then flock 9; fi

if [ -L .venv ] || { [ -e .venv ] && [ ! -f "$stamp" ] && [ ! -f "$log" ] && holds_files; }; then
  if serves; then exit 0; fi
  say "there is a .venv that this script did not make, without all that is needed; it is left alone: move it away, or" \
    "install into it with .venv/bin/python -m pip install -c constraints.txt -e '.[dev]'" >&2
  exit 1
fi
if is_of "$PWD" && runs; then exit 0; fi

started=$SECONDS
if [ -e .venv ] && .venv/bin/python -c 'import pip' 2>/dev/null; then
  old=$(birthplace)
  if [ -n "$old" ] && [ "$old" != "$PWD" ]; then
    say "this checkout was in $old: mending the paths in .venv"
    mend_paths "$old"
    if is_of "$old"; then
      fingerprint "$PWD" >"$stamp"
      exit 0
    fi
  fi
  say "bringing .venv up to date with constraints.txt and pyproject.toml, where it stands"
else
  python=$(bash scripts/find_python.sh)
  if [ -e .venv ]; then say "the .venv that was made here is unfinished or does not run any more: it is made anew"; fi
  say "making .venv with $("$python" -V), $python"
  say "this happens once: up to 3 GB of downloads (PyTorch) and 5 GB of disk, 2 to 10 minutes"
  trap give_up EXIT
  rm -rf .venv
  new=1
  "$python" -c 'import os; os.mkdir(".venv")'
  : >"$log"
  "$python" -m venv .venv
fi
trap give_up EXIT
rm -f "$stamp"
.venv/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]' </dev/null 2>&1 | tee "$log" | progress
fingerprint "$PWD" >"$stamp"
say "done in $((SECONDS - started)) s"
