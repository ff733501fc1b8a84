#!/usr/bin/env bash
# Creates an environment with everything that training, tools and tests need: make_env.sh FOLDER [PYTHON].
# Packages come through uv if it is there, else through pip (UV= for pip in any case).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 wanted=${2:-} uv=${UV-$(command -v uv || true)}
files=(-r requirements/runtime.txt -r requirements/dev.txt)

read -r oldest above < <(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$/\1 \2/p' pyproject.toml)
range="3.$oldest to 3.$((above - 1))"

version_of() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null; }

fits() {
  local version
  version=$(version_of "$1") && [[ $version == 3.* ]] && ((${version#3.} >= oldest && ${version#3.} < above))
}

# The first Python that will do: the one asked for, or python3, or the newest with a version in its name.
python=
if [[ -n $wanted ]]; then
  candidates=("$wanted")
else
  candidates=(python3)
  for ((minor = above - 1; minor >= oldest; minor--)); do candidates+=("python3.$minor"); done
fi
for candidate in "${candidates[@]}"; do
  if fits "$candidate"; then python=$candidate && break; fi
done

stop() {
  printf 'make env: %s\n' "$@" >&2
  exit 1
}

debian=$(command -v apt-get >/dev/null && echo "apt-get install" || true)
newest="python3.$((above - 1))"
if [[ -n $wanted && -z $python ]]; then
  found=$(version_of "$wanted" || echo "not there")
  stop "PYTHON=$wanted is $found; Python $range is needed: name another one, or leave PYTHON out"
fi
if [[ -z $python && -n $uv ]]; then
  python="3.$((above - 1))" # uv brings it
elif [[ -z $python ]]; then
  stop "no Python $range here (python3 is $(version_of python3 || echo "not there"))." \
    "Get one: ${debian:-install} $newest${debian:+ $newest-venv}, then make env PYTHON=$newest;" \
    "or install uv (https://docs.astral.sh/uv), which brings its own, and run make env again."
elif [[ -z $uv ]] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  name=python$(version_of "$python")
  stop "$python is there but cannot create environments: its modules venv and ensurepip are missing." \
    "Get them: ${debian:-install} $name-venv; or install uv (https://docs.astral.sh/uv), and run make env again."
fi

# uv does not read pip's settings: a mirror or a folder of wheels that pip is told to use is passed on to it (pip lists
# its environment variables first, which count most).
pip_setting() {
  "$venv/bin/python" -m pip config list 2>/dev/null | sed -n "s/^[a-z:]*\.$1='\(.*\)'\$/\1/p" | sed -n 1p || true
}

pass_to_uv() {
  local name=$1 value values
  value=$(pip_setting "$2")
  read -ra values <<<"${value//\\n/ }"
  value=$(IFS="${3:- }" && echo "${values[*]}")
  if [[ -n $value && -z ${!name:-} ]]; then export "$name=$value"; fi
}

if [[ -n $uv ]]; then
  test -x "$venv/bin/python" || "$uv" venv --quiet --seed --python "$python" "$venv"
  pass_to_uv UV_DEFAULT_INDEX index-url
  pass_to_uv UV_INDEX extra-index-url
  pass_to_uv UV_FIND_LINKS find-links ,
  pass_to_uv UV_CONSTRAINT constraint
  export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # the best version of all indices, as pip chooses
  install=("$uv" pip install --quiet --python "$venv/bin/python")
else
  test -x "$venv/bin/python" || "$python" -m venv "$venv"
  install=("$venv/bin/python" -m pip install --disable-pip-version-check --quiet)
fi
"${install[@]}" "${files[@]}"
"${install[@]}" --no-deps --editable .
# Transformer Engine's Python, which tests run on the CPU and go without where it is missing.
rm -rf "$venv/wheels"
"$venv/bin/python" -m pip download --disable-pip-version-check --quiet --no-deps --dest "$venv/wheels" \
  -r requirements/te.txt || echo "make env: no wheel of Transformer Engine; its tests on the CPU will be skipped" >&2
