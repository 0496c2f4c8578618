#!/usr/bin/env bash
# Makes .venv from the pinned versions in constraints.txt, once; says nothing when there is nothing to do.
#   bash scripts/setup.sh            finds a Python by itself
#   PYTHON=/path/to/python bash scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

versions="3.12 3.13" # in order of preference; megatron-core has no wheels for later ones
stamp=.venv/complete # written last: without it .venv counts as broken
log=.venv/setup.log

say() { echo "setup: $*"; }

# What the environment depends on: the pins, the declared dependencies, and this folder (a venv cannot move).
fingerprint() { { pwd; cat constraints.txt; sed '/^\[tool\./,$d' pyproject.toml; } | cksum; }

# True if $1 runs at all (a pyenv shim may not), is CPython $2 with the GIL, and can make environments.
answers() {
  "$1" -c '
import ensurepip, sys, sysconfig, venv
free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
found = "%d.%d" % sys.version_info[:2]
sys.exit(sys.implementation.name != "cpython" or free_threaded or found != sys.argv[1])
' "$2" </dev/null >/dev/null 2>&1
}

# Every place where a Python $1 may be, one a line; newest patch release first.
candidates() {
  local pyenv=${PYENV_ROOT:-$HOME/.pyenv}
  local uv=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}
  type -ap "python$1" python3 python || true
  printf '%s\n' "$pyenv/versions/$1".*/bin/python "$uv/cpython-$1".*/bin/python | sort -rV
}

find_python() {
  local version candidate
  for version in $versions; do
    while IFS= read -r candidate; do
      if answers "$candidate" "$version"; then echo "$candidate" && return; fi
    done < <(if [ -n "${PYTHON:-}" ]; then type -ap "$PYTHON" || true; else candidates "$version"; fi)
  done
  return 1
}

# Shortens pip's output to the downloads that take time.
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
  local status=$?
  [ -f "$stamp" ] && return
  if [ -s "$log" ]; then tail -n 15 "$log" >&2; fi
  rm -rf .venv
  say "did not finish (status $status); the unfinished .venv was removed" >&2
}

# One setup at a time, where the system has flock; the lock is on this file, so nothing is left behind.
exec 9<scripts/setup.sh
if command -v flock >/dev/null; then flock 9; fi

if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && .venv/bin/python -c '' 2>/dev/null; then exit 0; fi

python=$(find_python) || {
  echo "setup: no usable Python found: install Python 3.12 or 3.13 with its venv module (apt install python3.12-venv, brew install python@3.12, pyenv install 3.12 or uv python install 3.12) or name one with PYTHON=/path/to/python" >&2
  exit 1
}

say "making .venv with $("$python" -V) at $python"
say "this happens once: up to 3 GB of downloads (PyTorch) and 5 GB of disk, 2 to 10 minutes"
started=$SECONDS
trap give_up EXIT
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]' 2>&1 </dev/null | tee "$log" | progress
fingerprint >"$stamp"
say "done in $((SECONDS - started)) s"
