#!/usr/bin/env bash
# Makes .venv from the pinned versions in constraints.txt, once; says nothing when there is nothing to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/complete # written last: without it .venv counts as broken
log=.venv/setup.log

say() { echo "setup: $*"; }

# What the environment depends on: the pins, the declared dependencies, and this folder (a venv cannot move).
fingerprint() { { pwd; cat constraints.txt; sed '/^\[tool\./,$d' pyproject.toml; } | cksum; }

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

give_up() {
  if [ -f "$stamp" ]; then return; fi
  if [ -s "$log" ]; then tail -n 15 "$log" >&2; fi
  rm -rf .venv
  say "did not finish; the unfinished .venv was removed" >&2
}

# One setup at a time, where the system has flock; the lock is on this file, so nothing is left behind.
exec 9<scripts/setup.sh
if command -v flock >/dev/null; then flock 9; fi

if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && .venv/bin/python -c '' 2>/dev/null; then exit 0; fi

python=$(bash scripts/find_python.sh)
say "making .venv with $("$python" -V), $python"
say "this happens once: up to 3 GB of downloads (PyTorch) and 5 GB of disk, 2 to 10 minutes"
started=$SECONDS
trap give_up EXIT
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]' </dev/null 2>&1 | tee "$log" | progress
fingerprint >"$stamp"
say "done in $((SECONDS - started)) s"
