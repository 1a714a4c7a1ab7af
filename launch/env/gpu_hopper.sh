# shellcheck shell=bash
# NVIDIA H100 and H200, several of them. Starting points of others: none has been measured by us.

xla_flags=(
  # Moves the waiting for a collective behind compute that does not need it. Off by default in the
  # releases that the page describes; set in NVIDIA's images.
  # https://docs.jax.dev/en/latest/gpu_performance_tips.html
  # https://docs.nvidia.com/jax-toolbox/environment-variables
  --xla_gpu_enable_latency_hiding_scheduler=true

  # Collectives up to this many bytes are combined into one: fewer, larger transfers, at the price
  # of memory and of a later start. The values are MaxText's for 16 hosts of 8 H100.
  # https://docs.jax.dev/en/latest/xla_flags.html
  # https://github.com/AI-Hypercomputer/maxtext/blob/main/src/maxtext/configs/gpu/a3/llama_2_7b/16vm.sh
  --xla_gpu_all_reduce_combine_threshold_bytes=1073741824
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
)
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }${xla_flags[*]}"
unset xla_flags

# The part of a GPU's memory that JAX takes at the start (its own default is 0.75). The rest is for
# NCCL and the libraries. https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

# NCCL says why a connection failed.
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-debug
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
