# Sourced by the commands beside it: `ensure_venv EXTRA` makes .venv with this checkout and one of its extras.

fail() { echo "$(basename "$0"): $*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3 python}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

ensure_venv() {
  local extra=$1 venv=${VENV:-.venv} python stamp
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python) || fail "needs Python 3.11 or newer with its venv module, found none. Install one, or set PYTHON=/path/to/python."
    echo "Making $venv with $("$python" --version) ..."
    "$python" -m venv "$venv" || fail "could not make $venv. Is this folder writable and the disk not full?"
  fi
  # Installed once per version of pyproject.toml: the checkout itself is editable.
  stamp="$venv/.installed-$extra-$(cksum < pyproject.toml | tr -d ' ')"
  if [ ! -e "$stamp" ]; then
    echo "Installing subquad[$extra] into $venv (once; a minute or two) ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extra]" ||
      fail "the installation into $venv failed; see above. Run again when it is cured, or remove $venv to start over."
    if [ "$extra" = test ]; then ensure_cuda_lowering; fi
    link_folders "$venv/editable/subquad"
    touch "$stamp"
  fi
}

# The import root as editors and type checkers want to find it (see pyproject.toml): links to this checkout's folders.
link_folders() {
  mkdir -p "$1"
  ln -sfn "$PWD"/subquad/* "$PWD/kernels" "$PWD/lra" "$PWD/zoo" "$1/"
}

# jax-triton lowers for CUDA, without a GPU, where JAX's CUDA plugin is installed; CUDA itself is not needed. No extra can ask
# for that alone: the plugin requires jax-cuda13-pjrt, 124 MB that make every process of this environment look for a GPU.
ensure_cuda_lowering() {
  local version
  version=$("$venv/bin/python" -c 'import jaxlib; print(jaxlib.__version__)')
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "jax-cuda13-plugin==$version" ||
    echo "jax-cuda13-plugin $version is not to be had here: the tests that lower for CUDA will be skipped." >&2
}
