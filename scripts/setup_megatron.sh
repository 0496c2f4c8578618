#!/usr/bin/env bash
# Makes .venv-megatron-VERSION for `make test-megatron VERSION=…`: another megatron-core beside all else that .venv has.
# Wants 20 MB and some seconds. VERSION may be the folder of a checkout of Megatron-LM: then the environment is called
# by the folder's name, and links to it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/beside_venv.sh

version=${1:?usage: bash scripts/setup_megatron.sh VERSION, for example 0.16.1, or a checkout of Megatron-LM}
folder=.venv-megatron-$(basename "$version")
stamp=$folder/complete # written last: without it the folder counts as broken
log=.cache/setup-megatron.log

fingerprint() { { pwd; cat .venv/complete scripts/beside_venv.sh scripts/setup_megatron.sh; } 2>/dev/null | cksum; }

give_up() {
  if [ -f "$stamp" ]; then return; fi
  tail -n 15 "$log" >&2
  rm -rf "$folder"
  echo "setup-megatron: did not finish, see $log; the unfinished $folder was removed" >&2
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then exit 0; fi

mkdir -p .cache
: >"$log"
trap give_up EXIT
make_environment "$folder" >>"$log" 2>&1
if [ -d "$version/megatron/core" ]; then
  ln -s "$(realpath "$version/megatron")" "$site/megatron"
else
  install_alone "megatron-core==$version" >>"$log" 2>&1
fi
link_others "$shared"
fingerprint >"$stamp"
