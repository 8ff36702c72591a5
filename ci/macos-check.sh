#!/bin/sh
# Type-checks crates for macOS on Apple silicon, on an x86-64 Debian. Nothing is linked or run.
#
#     ci/macos-check.sh [PACKAGE...]        default: flash-moe-kernels
#
# There is no macOS std to install here, so it is checked along from Debian's std sources. Installs
# what is missing and does nothing twice. Prints the seconds of each part.
set -eu

cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- flash-moe-kernels
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/debian"

started=$(date +%s)
missing=
for package in rustc-web cargo-web rust-web-src; do
    state=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    $as_root apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -qq -y --no-install-recommends $missing
fi
echo "ci/macos-check: set-up $(($(date +%s) - started)) s"

packages=
for package in "$@"; do
    packages="$packages --package $package"
done
started=$(date +%s)
# Building std is an unstable feature of cargo; RUSTC_BOOTSTRAP opens it on this stable compiler.
# shellcheck disable=SC2086
RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 /usr/bin/cargo check -Zbuild-std=std,panic_abort \
    --target aarch64-apple-darwin $packages
echo "ci/macos-check: check $(($(date +%s) - started)) s"
