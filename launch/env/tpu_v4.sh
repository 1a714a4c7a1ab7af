# shellcheck shell=bash
# TPU v4. Starting points of others: none has been measured by us. Without a source of its own, what
# a flag does is stated in https://docs.jax.dev/en/latest/xla_flags.html

flags=(
  # Asynchronous all-gathers (parameters that are sharded by fsdp), as MaxText sets for v4:
  # https://github.com/AI-Hypercomputer/maxtext/blob/main/src/maxtext/configs/tpu/v4/22b.sh
  --xla_enable_async_all_gather=true

  # More overlap of the all-reduces of data parallelism across slices with compute
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  # ... also across steps of a scan whose sizes differ; costs memory
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:+$LIBTPU_INIT_ARGS }${flags[*]}"
unset flags
