#!/usr/bin/env bash
# Makes .venv-NAME for `make test-trainer NAME=…`: a trainer and what tests/trainers/NAME.txt names, in place of what
# .venv has of it, and all else of .venv. Transformer Engine comes from .venv-te, where NAME.txt says so and it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=${1:?usage: bash scripts/setup_trainer.sh NAME, for example verl}
wanted=tests/trainers/$name.txt
folder=.venv-$name
stamp=$folder/complete # written last: without it the folder counts as broken
log=.cache/setup-$name.log

fingerprint() { { pwd; cat .venv/complete .venv-te/complete scripts/setup_trainer.sh "$wanted" || true; } 2>/dev/null | cksum; } # not every checkout has .venv-te

give_up() {
  if [ -f "$stamp" ]; then return; fi
  tail -n 15 "$log" >&2
  rm -rf "$folder"
  echo "setup-trainer: did not finish, see $log; the unfinished $folder was removed" >&2
}

if [ ! -f "$wanted" ]; then
  echo "setup-trainer: no $wanted; NAME is one of $(cd tests/trainers && echo *.txt | sed 's/\.txt//g')" >&2
  exit 1
fi
if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then exit 0; fi

mkdir -p .cache
: >"$log"
trap give_up EXIT
rm -rf "$folder"
python=$(.venv/bin/python -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
shared=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m venv --without-pip "$folder" >>"$log" 2>&1
site=$("$folder"/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -m pip --disable-pip-version-check install --no-deps --target "$site" -r "$wanted" \
  </dev/null >>"$log" 2>&1
# Links to the other packages one by one: the folder itself would bring the other Megatron into the namespace `megatron`.
te=
if grep -q "from .venv-te" "$wanted" && [ -e .venv-te/complete ]; then
  te=$(realpath .venv-te/lib/python3*/site-packages)
fi
for package in "$shared"/* ${te:+"$te"/*}; do
  base=$(basename "$package")
  case $base in
    megatron* | __editable__* | __pycache__ | venv.pth) continue ;;
    *.dist-info) compgen -G "$site/${base%%-*}-*.dist-info" >/dev/null && continue ;;
  esac
  [ -e "$site/$base" ] || ln -s "$package" "$site/$base"
done
fingerprint >"$stamp"
