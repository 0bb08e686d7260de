# What a newcomer types: `make demo`, `make test`. Both install what they need (Debian packages, a virtual environment), as root.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PACKAGES := python3-venv iproute2 nftables qemu-system-x86 seabios ipxe-qemu busybox-static containernetworking-plugins iperf3 \
            iputils-ping procps kmod util-linux tcpdump tshark dnsutils isc-dhcp-client dhcpcd-base conntrack curl gcc libc6-dev \
            bind9-host musl-tools prometheus cpio

.PHONY: demo workshop manifests references shim test lint unit lab bench-datapath bench-migration bench-ipam bench-dns fuzz-dns alerts soak \
        install clean
demo: install            ; $(BIN)/vmnet lab demo
workshop: install        ; $(BIN)/vmnet lab workshop
test: lint unit lab
# The single-file install; a test tells when it is no longer what the manifests say.
manifests: install       ; $(BIN)/python -m vmnet.lab.manifests deploy/install.yaml
# What is made from the code (metrics, definitions, annotations) and from the alerts' rules; a test tells when it is not current.
references: install      ; $(BIN)/python -m vmnet.lab.references
# The CNI plugin as a static program, where the agent looks for it; without it the agent installs the Python one.
shim: .venv/libexec/vmnet-cni
lint: install            ; $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
# What fails beside others is tried once more alone: these tests share two cores with QEMU and the machine's other work.
AGAIN := $(BIN)/pytest --last-failed --last-failed-no-failures none
unit: install            ; $(BIN)/pytest tests/unit tests/contract tests/netns -n 2 || $(AGAIN) tests/unit tests/contract tests/netns
# The workshop has a lab of its own, so it begins when the machines of the others' lab are gone.
WORKSHOP := tests/lab/test_workshop.py
lab: install             ; { $(BIN)/pytest tests/lab --ignore $(WORKSHOP) || $(AGAIN) tests/lab --ignore $(WORKSHOP); } && { $(BIN)/pytest $(WORKSHOP) || $(AGAIN) $(WORKSHOP); }
bench-datapath: install  ; $(BIN)/python -m vmnet.lab.bench.datapath
bench-migration: install ; $(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]' && $(BIN)/python -m vmnet.lab.bench.migration
bench-ipam: install      ; $(BIN)/python -m vmnet.lab.bench.ipam
bench-dns: install build/.servers ; $(BIN)/python -m vmnet.lab.bench.dns
# Ten million inputs; the tests try some thousands.
fuzz-dns: install        ; $(BIN)/python -m vmnet.lab.bench.dns_fuzz
# Each alert that can be provoked in minutes, in a lab with a real Prometheus; `make test` fires all with promtool.
alerts: install          ; VMNET_ALERTS=1 $(BIN)/pytest tests/lab/test_monitoring.py
soak: install            ; VMNET_SOAK_STEPS=1000000 $(BIN)/pytest tests/unit/controller/test_ledger.py -n 2 -k million
clean:                   ; rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

install: build/.packages build/.venv .venv/libexec/vmnet-cni

# Programs are installed, not services: none may start, now or (Debian enables that of prometheus) with the machine.
build/.packages: Makefile
	@[ "$$(id -u)" = 0 ] || { echo "make: run as root: the lab makes network namespaces and installs Debian packages" >&2; exit 1; }
	@mkdir -p build
	@missing=$$(dpkg-query -W -f '$${db:Status-Abbrev} $${Package}\n' $(PACKAGES) 2>/dev/null | awk '$$1 == "ii" {print $$2}' | sort | comm -13 - <(printf '%s\n' $(PACKAGES) | sort)); \
	if [ -n "$$missing" ]; then echo "==> Debian packages:" $$missing; apt-get update -qq || exit 1; \
	  [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; made=1; }; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >build/apt.log 2>&1; done=$$?; \
	  [ -z "$$made" ] || rm /usr/sbin/policy-rc.d; [ $$done = 0 ] || { tail -20 build/apt.log >&2; exit 1; }; \
	  case " $$(echo $$missing) " in *" prometheus "*) ! command -v systemctl >/dev/null || systemctl disable --quiet prometheus.service;; esac; fi
	@touch $@

# Name servers to compare with. Their services must not start: somebody may listen on port 53, or nobody should.
build/.servers:
	@mkdir -p build
	@[ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; made=1; }; \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends unbound nsd dnsperf >build/apt-servers.log 2>&1; done=$$?; \
	[ -z "$$made" ] || rm /usr/sbin/policy-rc.d; [ $$done = 0 ] || { tail -20 build/apt-servers.log >&2; exit 1; }
	@touch $@

build/.venv: pyproject.toml build/.packages
	@echo "==> Python packages (.venv)"
	@$(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --disable-pip-version-check -e '.[lab,dev]'
	@touch $@

build/vmnet-cni: vmnet/cni/shim.c
	@mkdir -p build
	@musl-gcc -std=c11 -Os -Wall -Wextra -Werror -static -s -o $@.$$$$ $< && mv $@.$$$$ $@

.venv/libexec/vmnet-cni: build/vmnet-cni build/.venv
	@install -D -m 0755 $< $@
