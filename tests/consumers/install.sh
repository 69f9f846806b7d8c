#!/usr/bin/env bash
# What `make test-consumers` needs of the system: Node.js 20 or later with npm, and Chromium, from Debian.
set -euo pipefail

missing=()
command -v node > /dev/null || missing+=(nodejs)
command -v npm > /dev/null || missing+=(npm)
command -v chromium > /dev/null || command -v chromium-browser > /dev/null || missing+=(chromium fonts-dejavu-core)
if ((${#missing[@]})); then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "test-consumers: expected ${missing[*]} on this machine; install them" >&2
        exit 1
    fi
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
fi
if ! node -e 'process.exit(parseInt(process.versions.node) >= 20 ? 0 : 1)'; then
    echo "test-consumers: expected Node.js 20 or later, got $(node --version); install a newer one" >&2
    exit 1
fi
