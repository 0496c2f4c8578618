# Sourced by what makes an environment beside .venv: packages of its own, and all else of .venv.
# shellcheck shell=bash

# make_environment FOLDER: an empty one. Sets `site`, the folder of its packages, and `shared`, that of .venv's.
make_environment() {
  local python
  rm -rf "$1"
  python=$(.venv/bin/python -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
  # shellcheck disable=SC2034  # for who sources this
  shared=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -m venv --without-pip "$1"
  site=$("$1"/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
}

# install_alone ARGUMENTS OF PIP: just what they name, into `site`.
install_alone() {
  .venv/bin/python -m pip --disable-pip-version-check install --no-deps --target "$site" "$@" </dev/null
}

# link_others FOLDER...: the packages in them that `site` does not have. One by one: the folder itself would bring the
# other Megatron into the namespace `megatron`.
link_others() {
  local from package base
  for from in "$@"; do
    for package in "$from"/*; do
      base=$(basename "$package")
      case $base in
        megatron* | __editable__* | __pycache__ | venv.pth) continue ;;
        *.dist-info) compgen -G "$site/${base%%-*}-*.dist-info" >/dev/null && continue ;;
      esac
      [ -e "$site/$base" ] || ln -s "$package" "$site/$base"
    done
  done
}
