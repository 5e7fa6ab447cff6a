#!/bin/sh
# Makes an authority, and from it a certificate for each side of a migration, laid out as QEMU's tls-creds-x509.
# Usage: make_certificates.sh HOST, the name by which the source calls the destination. They are valid for a year.
set -eu
HOST=$1
mkdir -p certificates && cd certificates
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj "/CN=migration authority" \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign -keyout ca-key.pem -out ca-cert.pem
for side in client server; do
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$side" -keyout $side-key.pem -out $side.csr
    printf 'basicConstraints=critical,CA:FALSE\nextendedKeyUsage=%sAuth\nsubjectAltName=DNS:%s\n' $side "$HOST" > $side.ext
    openssl x509 -req -in $side.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 365 \
        -extfile $side.ext -out $side-cert.pem
    rm $side.csr $side.ext
done
