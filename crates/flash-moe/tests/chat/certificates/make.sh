#!/bin/sh
# Makes the certificates of the tests anew: an authority, and two servers that it has signed, one for
# this machine and one for another name. The key protects nothing.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$work/authority.key" \
    -out authority.pem -subj "/CN=flash-moe test authority" -days 36500 2>/dev/null
openssl ecparam -genkey -name prime256v1 -noout | openssl pkcs8 -topk8 -nocrypt -out server.key
sign() {
    openssl req -new -key server.key -subj "/CN=$2" -out "$work/request"
    printf 'subjectAltName=%s\nbasicConstraints=CA:FALSE\n' "$3" > "$work/names"
    openssl x509 -req -in "$work/request" -CA authority.pem -CAkey "$work/authority.key" \
        -CAcreateserial -CAserial "$work/serial" -extfile "$work/names" -days 36500 -out "$1" 2>/dev/null
}
sign server.pem localhost "DNS:localhost,IP:127.0.0.1"
sign other.pem example.org "DNS:example.org"
