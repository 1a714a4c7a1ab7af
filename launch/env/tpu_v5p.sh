# shellcheck shell=bash
# TPU v5p. Starting points of others: none has been measured by us. Without a source of its own, what
# a flag does is stated in https://docs.jax.dev/en/latest/xla_flags.html

flags=(
  # This set is MaxText's for it:
  # https://github.com/AI-Hypercomputer/maxtext/blob/main/src/maxtext/configs/tpu/v5p/128b.sh
  # More overlap of the all-reduces of data parallelism across slices with compute
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  # ... also across steps of a scan whose sizes differ; costs memory
  --xla_tpu_data_parallel_opt_different_sized_ops=true

  # Fuses collectives with the compute that is scheduled between their start and their end,
  --xla_tpu_enable_async_collective_fusion=true
  # in several steps,
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  # on one TensorCore.
  --xla_tpu_overlap_compute_collective_tc=true
  # The same for all-gathers (parameters that are sharded by fsdp)
  --xla_enable_async_all_gather=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true

  # No fusing of all-gathers with convolutions and all-reduces, and asynchronous
  # collective-permutes (our blocked losses use them), as MaxText does on v5p
  --xla_tpu_megacore_fusion_allow_ags=false
  --xla_enable_async_collective_permute=true
)
export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:+$LIBTPU_INIT_ARGS }${flags[*]}"
unset flags
