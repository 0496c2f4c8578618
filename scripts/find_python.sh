#!/usr/bin/env bash
# Prints the path of a Python that can make .venv, or says in one line what to install and fails.
# PYTHON=/path/to/python is looked at alone. Else: the PATH, pyenv's installed versions, uv's.
set -euo pipefail

versions="3.12 3.13" # in order of preference; megatron-core has no wheels for later ones

# True if $1 runs at all (a pyenv shim may not), is CPython $2 with the GIL, and can make environments.
answers() {
  "$1" -c '
import ensurepip, sys, sysconfig, venv
free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
found = "%d.%d" % sys.version_info[:2]
sys.exit(sys.implementation.name != "cpython" or bool(free_threaded) or found != sys.argv[1])
' "$2" </dev/null >/dev/null 2>&1
}

# Every place where a Python $1 may be, one a line; newest patch release first.
candidates() {
  if [ -n "${PYTHON:-}" ]; then
    type -ap "$PYTHON" || true
    return
  fi
  local pyenv=${PYENV_ROOT:-$HOME/.pyenv}
  local uv=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}
  type -ap "python$1" python3 python || true
  printf '%s\n' "$pyenv/versions/$1".*/bin/python "$uv/cpython-$1".*/bin/python | sort -rV
}

for version in $versions; do
  while IFS= read -r candidate; do
    if answers "$candidate" "$version"; then
      echo "$candidate"
      exit 0
    fi
  done < <(candidates "$version")
done
echo "setup: found no Python 3.12 or 3.13 that works${PYTHON:+ at PYTHON=$PYTHON}: install one with" \
  "'apt install python3.12-venv', 'brew install python@3.12', 'uv python install 3.12' or 'pyenv install 3.12'," \
  "or name it: PYTHON=/path/to/python make setup" >&2
exit 1
