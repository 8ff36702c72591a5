#!/bin/sh
# Builds the tests of a crate for AArch64 Linux and runs them under qemu, on an x86-64 Debian.
#
#     ci/arm64.sh [PACKAGE...]        default: flash-moe-kernels
#
# rustup's toolchain here has no other target; Debian's rustc-web comes with an arm64 std. Installs
# what is missing and does nothing twice. Prints the seconds of each part.
set -eu

cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- flash-moe-kernels
target=aarch64-unknown-linux-gnu
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/debian"

needed="rustc-web:amd64 cargo-web:amd64 libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu:amd64"
needed="$needed libc6-dev-arm64-cross:all libc6:arm64 qemu-user-static:amd64"
started=$(date +%s)
missing=
for package in $needed; do
    state=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing ${package%:all}"
done
if [ -n "$missing" ]; then
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    $as_root dpkg --add-architecture arm64
    $as_root apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -qq -y --no-install-recommends $missing
fi
echo "ci/arm64: set-up $(($(date +%s) - started)) s"

packages=
for package in "$@"; do
    packages="$packages --package $package"
done
# The absolute paths keep rustup's shims, which have no such target, out of the way.
export RUSTC=/usr/bin/rustc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# Programs find libc6:arm64 in its own place. Pointed at the cross compiler's libc by -L instead, qemu
# would mix the loader of one version with the library of the other, and threads would hang.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -cpu max"
started=$(date +%s)
# shellcheck disable=SC2086
/usr/bin/cargo test --target "$target" --tests $packages --no-run
echo "ci/arm64: build $(($(date +%s) - started)) s"

started=$(date +%s)
# shellcheck disable=SC2086
/usr/bin/cargo test --target "$target" --tests $packages
echo "ci/arm64: tests $(($(date +%s) - started)) s"
