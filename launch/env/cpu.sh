# shellcheck shell=bash
# CPU, for a first look and for drills. Nothing here has been measured.

# Takes the CPU even where JAX finds an accelerator.
# https://docs.jax.dev/en/latest/config_options.html
export JAX_PLATFORMS=cpu
