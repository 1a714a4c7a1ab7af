# shellcheck shell=bash
# CPU, for a first look and for drills. What is measured is in docs/benchmarks.md.

# Takes the CPU even where JAX finds an accelerator.
# https://docs.jax.dev/en/latest/config_options.html
export JAX_PLATFORMS=cpu

# Large pages for the memory that each step asks for anew (glibc 2.35 or later, where the system has
# transparent huge pages at `madvise` or `always`): a tenth to a fifth of a step (docs/benchmarks.md).
# https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
