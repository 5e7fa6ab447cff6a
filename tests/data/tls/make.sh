#!/bin/sh
# Makes the certificates of the tests, laid out as QEMU's tls-creds-x509, for localhost; and in other/, those of another
# authority. They are valid for a hundred years, their keys are public, and nothing but the tests may trust them.
set -eu
cd "$(dirname "$0")"

# make FOLDER NAME: an authority, and one certificate for each side
make() (
  mkdir -p "$1"
  cd "$1"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 \
    -subj "/CN=$2" -keyout ca-key.pem -out ca-cert.pem \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign
  for side in client server; do
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
      -subj "/CN=hwdbm tests, $side" -keyout $side-key.pem -out $side.csr
    printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=%sAuth\n' $side >$side.ext
    printf 'subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1\n' >>$side.ext
    openssl x509 -req -in $side.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial \
      -days 36500 -extfile $side.ext -out $side-cert.pem
    rm $side.csr $side.ext
  done
  rm -f ca-key.pem ca-cert.srl # nobody signs anything else with it
)

make . "hwdbm tests, authority"
make other "hwdbm tests, another authority"
