#!/usr/bin/env bash
# One would guess: an NBD connection with a pre-shared key is encrypted as fast as one with
# certificates; on a CPU with AES instructions both use AES-GCM.
#
# What happens: GnuTLS at both ends (libnbd with nbdkit, libnbd with qemu-nbd) takes AES-256-GCM
# with certificates and ChaCha20-Poly1305 with a key. In TLS 1.3 a key of this kind is tied to
# SHA-256, so AES-256-GCM (SHA-384) is out, and ChaCha20 stands before AES-128-GCM in GnuTLS'
# order.
#
# Why it matters to a block export daemon: a server that may choose (its own order before the
# client's) can take AES-128-GCM for keys where the CPU has AES; `openssl speed` below tells what
# that is worth here. Benchmarks of "TLS" over keys and over certificates measure two ciphers.
#
# Seen with libnbd 1.14.2, nbdkit 1.32.5, QEMU 10.0.2, GnuTLS 3.7.9 (Debian 12).
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
finish() {
    for file in *.pid; do [ ! -s "$file" ] || kill "$(cat "$file")" || true; done
    rm -rf "$dir"
}
trap finish EXIT
for tool in nbdkit nbdinfo qemu-nbd psktool certtool openssl; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
nbdkit --version; nbdinfo --version | sed -n 1p; qemu-nbd --version | sed -n 1p
certtool --version | sed -n 1p

mkdir pki psk
psktool -u alice -p psk/keys.psk > tool.log 2>&1
printf 'cn=authority\nca\ncert_signing_key\n' > ca.info
printf 'cn=localhost\ndns_name=localhost\ntls_www_server\n' > server.info
printf 'encryption_key\nsigning_key\n' >> server.info
{
    certtool --generate-privkey --outfile pki/ca-key.pem
    certtool --generate-privkey --outfile pki/server-key.pem
    certtool --generate-self-signed --load-privkey pki/ca-key.pem --template ca.info \
        --outfile pki/ca-cert.pem
    certtool --generate-certificate --load-ca-certificate pki/ca-cert.pem \
        --load-ca-privkey pki/ca-key.pem --load-privkey pki/server-key.pem \
        --template server.info --outfile pki/server-cert.pem
} > tool.log 2>&1

nbdkit -P 1.pid -U "$dir/1" --tls=require --tls-certificates="$dir/pki" memory 1M
nbdkit -P 2.pid -U "$dir/2" --tls=require --tls-psk="$dir/psk/keys.psk" memory 1M
truncate -s 1M disk.raw
qemu-nbd --fork --pid-file="$dir/3.pid" -t -r -f raw -k "$dir/3" \
    --object tls-creds-psk,id=t,endpoint=server,dir="$dir/psk" --tls-creds t disk.raw
suite() {
    GNUTLS_DEBUG_LEVEL=4 nbdinfo --size "$1" 2>&1 | sed -n 's/.*Selected cipher suite: GNUTLS_//p'
}
key="tls-psk-file=$dir/psk/keys.psk"
certificate=$(suite "nbds+unix://localhost/?socket=$dir/1&tls-certificates=$dir/pki")
nbdkit_key=$(suite "nbds+unix://alice@/?socket=$dir/2&$key")
qemu_key=$(suite "nbds+unix://alice@/?socket=$dir/3&$key")
echo "certificate, nbdkit: $certificate"
echo "key, nbdkit:         $nbdkit_key"
echo "key, qemu-nbd:       $qemu_key"
for cipher in chacha20-poly1305 aes-128-gcm; do
    openssl speed -seconds 1 -bytes 16384 -evp $cipher 2> speed.log | tail -1
done
[ "$certificate $nbdkit_key $qemu_key" = \
    "AES_256_GCM_SHA384 CHACHA20_POLY1305_SHA256 CHACHA20_POLY1305_SHA256" ] ||
    { echo "changed"; exit 1; }
echo "as recorded"
