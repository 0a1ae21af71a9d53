#!/usr/bin/env bash
# One would guess: a server made with the crate nbd, which takes whatever export name a client
# asks for, serves libnbd and QEMU alike; neither needs more than fixed newstyle.
#
# What happens: libnbd gets in by any name. QEMU is refused nothing by the server and still says
# "No export with name 'disk' available": where a server does not know NBD_OPT_GO, QEMU asks for
# the list of exports and gives up when the name is not in it, and this crate lists one fixed
# name. By that name, QEMU reads the disk.
#
# Why it matters to a block export daemon: hiding exports from NBD_OPT_LIST (a policy that one
# may want) shuts QEMU out of a server without GO, and a client of the daemon's own must not take
# a list for the truth. In a bug report, "No export with name" may come from the client.
#
# Seen with nbd 0.3.1, QEMU 10.0.2, libnbd 1.14.2.
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'kill $(jobs -p) 2> kill.log || true; wait; rm -rf "$dir"' EXIT
for tool in qemu-img nbdinfo nbdcopy cargo; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
mkdir src
cat > Cargo.toml <<'TOML'
[package]
name = "serve"
version = "0.1.0"
edition = "2021"
[dependencies]
nbd = "=0.3.1"
[profile.dev]
debug = 0
TOML
cat > src/main.rs <<'RS'
use std::{io::Cursor, os::unix::net::UnixListener, thread};
fn main() {
    let disk = std::fs::read("disk.raw").unwrap();
    for stream in UnixListener::bind("socket").unwrap().incoming() {
        let (mut stream, disk) = (stream.unwrap(), disk.clone());
        thread::spawn(move || {
            let export = |name: &str| {
                println!("asked for {name:?}");
                Ok(nbd::server::Export { size: disk.len() as u64, ..Default::default() })
            };
            let () = nbd::server::handshake(&mut stream, export)?;
            nbd::server::transmission(&mut stream, Cursor::new(disk.clone()))
        });
    }
}
RS
CARGO_TARGET_DIR=$dir/target cargo build -q 2> cargo.log || { tail cargo.log; exit 1; }
qemu-img --version | sed -n 1p; nbdinfo --version | sed -n 1p

head -c 1M /dev/urandom > disk.raw
target/debug/serve > serve.log 2>&1 &
for _ in $(seq 50); do [ -S socket ] && break; sleep 0.1; done
uri() { echo "nbd+unix:///$1?socket=$dir/socket"; }
echo "the server lists: $(nbdinfo --list "$(uri '')" | sed -n 's/^export=//p' | xargs)"
answers=""
for name in disk rustnbd; do
    nbdcopy "$(uri $name)" copy.raw
    cmp copy.raw disk.raw && echo "libnbd, $name: right"
    if qemu-img convert -f raw -O raw "$(uri $name)" convert.raw 2> error; then
        cmp convert.raw disk.raw && answer=right
    else
        answer=$(sed 's/.*: //' error)
    fi
    echo "QEMU, $name: $answer"
    answers="$answers$answer;"
done
echo "names that the server was asked for: $(sort serve.log | uniq -c | xargs)"
[ "$answers" = "No export with name 'disk' available;right;" ] || { echo "changed"; exit 1; }
echo "as recorded"
