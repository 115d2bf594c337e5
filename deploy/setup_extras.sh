#!/bin/sh
# Installs the extra `transformers` into .venv, from its lock file. Done once, as deploy/setup.sh is.
set -eu
cd "$(dirname "$0")/.."

python=.venv/bin/python
stamp=.venv/headrace-setup-extras
wanted=$( (pwd; readlink -f "$python"; cat requirements-transformers.lock deploy/setup_extras.sh) | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
rm -f "$stamp"

say() { printf 'setup: %s\n' "$*"; }
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"
say "installing PyTorch and transformers into .venv (once, 2 minutes, 5.6 GB)"
"$python" -m uv pip install -q --python "$python" --require-hashes -r requirements-transformers.lock ||
    { say "uv could not; trying pip"
      "$python" -m pip install -q --disable-pip-version-check --require-hashes -r requirements-transformers.lock; }
printf '%s\n' "$wanted" >"$stamp"
