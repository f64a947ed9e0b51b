# Everything a person or CI runs. Each target does the set-up that it needs.
#
#   make run                the sample bundle as a container and as a microVM
#   make test               every test, on the host and in the lab
#   make test-crash         the same, and a microVM killed at each step of its life (twenty minutes more)
#   make test-clients       the same, and podman, docker and containerd with microVMs in the lab (as long again)
#   make test-load          500 containers at once, and a minute of execs, of the optimised build
#   make test-faults HITS=50 SEED=1  shim, containerd, machine or container killed at random moments, so often each
#   make fuzz SECONDS=60    hostile bytes for every parser, so long for each target (28800: overnight)
#   make build              rt, its agent and the containerd shim, optimised
#   make install PREFIX=…   build and install them (DESTDIR is respected)
#   make image              the image rt-node, by which a DaemonSet installs all that on a cluster's nodes
#   make guest              build the guest kernel and install it under /var/lib/rt/guests
#   make lab CMD='…'        a command in a virtual machine that has KVM, whatever this one has
#   make setup              install the Debian packages that are missing (`make test` adds podman and docker)

here := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PREFIX ?= /usr/local
CARGO ?= cargo
release := $(here)/target/x86_64-unknown-linux-musl/release

.DEFAULT_GOAL := build
.PHONY: run test test-programs test-crash test-clients test-load test-faults fuzz build install image guest lab setup bundles

# The kernel is built while cargo links, which leaves processors idle.
run: setup
	@$(MAKE) --no-print-directory -j2 build guest bundles
	@$(here)/integration/run-samples $(release)/rt

test: setup
	@$(here)/integration/setup clients
	@$(here)/integration/fetch-containerd || true
	@$(MAKE) --no-print-directory -j2 test-programs guest
	@cd $(here) && integration/run-tests

# The behaviour tests run the rt and rt-agent that are built beside them.
test-programs: setup
	cd $(here) && $(CARGO) build --workspace && $(CARGO) test --workspace --no-run

test-crash: export RT_TEST_CRASH = yes
test-crash: test

test-clients: export RT_TEST_CLIENTS = yes
test-clients: test

test-load: build
	cd $(here) && RT=$(release)/rt RT_MODELS=container RT_LOAD=500 $(CARGO) test -p integration --test behaviour -- many_containers_live_at_once
	cd $(here) && RT=$(release)/rt RT_MODELS=container RT_EXECS=7500 $(CARGO) test -p integration --test clients -- no_exit_is_lost

HITS ?= 50
test-faults: test-programs
	@$(here)/integration/test-faults $(HITS) $(SEED)

SECONDS ?= 60
fuzz: setup
	@$(here)/fuzz/run $(SECONDS) $(TARGETS)

build: setup
	cd $(here) && $(CARGO) build --release -p runtime -p agent -p shim

install: build
	install -d $(DESTDIR)$(PREFIX)/bin
	install $(release)/rt $(release)/rt-agent $(release)/containerd-shim-rt-v2 $(DESTDIR)$(PREFIX)/bin/
	ln -sf rt $(DESTDIR)$(PREFIX)/bin/rt-microvm
	ln -sf containerd-shim-rt-v2 $(DESTDIR)$(PREFIX)/bin/containerd-shim-rt-microvm-v2

# By podman, or by docker with BUILDER=docker.
BUILDER ?= podman
image: build guest
	rm -rf $(here)/target/image
	$(MAKE) --no-print-directory install DESTDIR=$(here)/target/image PREFIX=/usr/local
	install -d $(here)/target/image/var/lib/rt/guests
	cp -r /var/lib/rt/guests/rt-6.12 $(here)/target/image/var/lib/rt/guests/
	$(BUILDER) build --tag rt-node --file $(here)/shim/kubernetes/Containerfile $(here)/target/image

guest: setup
	@$(here)/vmm/kernel/build

bundles: setup
	@$(here)/oci-bundles/make-rootfs

lab: setup
	@[ -n "$$LAB_COMMAND" ] || { echo "usage: make lab CMD='uname -r'" >&2; exit 2; }
	@$(here)/integration/lab/lab run sh -c "$$LAB_COMMAND"

setup:
	@$(here)/integration/setup

# As it was typed: a dollar sign is the shell's, not make's.
export LAB_COMMAND = $(value CMD)
