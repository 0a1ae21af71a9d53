# The front door: `make` alone says what there is.
#
# Everything is built in the release profile and into one folder, always for the whole
# workspace: another selection would mean other features, and wasmtime a second time.

CARGO ?= cargo
PREFIX ?= /usr/local
# Seconds per fuzz target.
FUZZ_SECONDS ?= 30
# Damaged images.
COUNT ?= 100000
# Arguments for the benchmark, e.g. BENCH="--rows 'raw-4k*'".
BENCH ?= --quick

# Tests of code that makes no system call, and that miri ends within a minute. Leaks are of tests
# that stop midway.
MIRI_TESTS := engine::background engine::buffer engine::iov engine::racing engine::transfer \
	gate
MIRIFLAGS := -Zmiri-disable-isolation -Zmiri-ignore-leaks

export CARGO_TARGET_DIR ?= $(CURDIR)/target
BIN := $(CARGO_TARGET_DIR)/release

.PHONY: help build demo test bench fuzz crash mutated check tools install clean

help:
	@echo "make demo     a qcow2 image, served by its sandboxed plugin and read back: one minute"
	@echo "              (the first build takes some more)"
	@echo "make test     every test; the last line is N passed, N failed"
	@echo "make build    outportd and outport, in $(BIN)"
	@echo "make bench    beside qemu-storage-daemon and nbdkit; see BENCH"
	@echo "make fuzz     random bytes for every parser, FUZZ_SECONDS=$(FUZZ_SECONDS) each"
	@echo "make crash    every crash point of every transaction of the format plugins"
	@echo "make mutated  COUNT=$(COUNT) damaged qcow2 images, opened by one daemon (a million: hours)"
	@echo "make check    formatting, lints, documentation, memory models"
	@echo "make tools    installs the programs that all this needs (Debian, as root)"
	@echo "make install  PREFIX=$(PREFIX), DESTDIR="

build:
	$(CARGO) build --release --locked --workspace --bins

demo:
	@CARGO="$(CARGO)" BIN="$(BIN)" tests/demo.sh

test:
	@.ci/test

bench: build
	python3 tests/bench/bench.py --ours "$(BIN)/outportd" --load "$(BIN)/nbd-load" $(BENCH)
	python3 tests/bench/fuse.py --ours "$(BIN)/outportd" $(filter --quick,$(BENCH))

fuzz:
	@.ci/test fuzz $(FUZZ_SECONDS)

crash:
	@.ci/test crash

mutated: build
	/usr/bin/python3 tests/mutated/mutated.py --ours "$(BIN)/outportd" --count $(COUNT)

check:
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path plugins/Cargo.toml --all --check
	$(CARGO) fmt --manifest-path tests/loom/Cargo.toml --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --release --locked --manifest-path plugins/Cargo.toml --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --locked --workspace --no-deps
	$(CARGO) clippy --release --locked --manifest-path tests/loom/Cargo.toml -- -D warnings
	$(CARGO) run --release --locked --manifest-path tests/loom/Cargo.toml -- --full
	@if $(CARGO) +nightly miri --version > /dev/null 2>&1; then \
		MIRIFLAGS="$(MIRIFLAGS)" CARGO_TARGET_DIR="$(CARGO_TARGET_DIR)/miri" \
		$(CARGO) +nightly miri test --locked -p outport-block --lib -- $(MIRI_TESTS); \
	else echo "miri is not installed: unsafe code is not run under it"; fi
	@if command -v cargo-deny > /dev/null; then $(CARGO) deny --workspace check; \
	else echo "cargo-deny is not installed: licences and advisories are not checked"; fi

tools:
	@.ci/tools

# Manual pages and completions come from the programs themselves.
install: build
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/man" \
		"$(DESTDIR)$(PREFIX)/share/bash-completion/completions" \
		"$(DESTDIR)$(PREFIX)/share/zsh/site-functions" \
		"$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d"
	install -m 755 "$(BIN)/outportd" "$(BIN)/outport" "$(DESTDIR)$(PREFIX)/bin"
	"$(BIN)/outport" man "$(DESTDIR)$(PREFIX)/share/man"
	"$(BIN)/outport" completions bash \
		> "$(DESTDIR)$(PREFIX)/share/bash-completion/completions/outport"
	"$(BIN)/outport" completions zsh > "$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_outport"
	"$(BIN)/outport" completions fish \
		> "$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/outport.fish"

clean:
	$(CARGO) clean
