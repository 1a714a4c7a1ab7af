"""FLOPs and bytes of the kernels of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from tools.perf.profile import kernel_costs
from vlp_jax.objectives.flops import count_flops
from vlp_jax.planning import hlo
from vlp_jax.planning.loops import count_runs

DEPTH, N = 5, 64


def layers(weights, x):
    return jax.lax.scan(lambda x, w: (jax.nn.gelu(x @ w), None), x, weights)[0].sum()


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def totals(text):
    """FLOPs of all runs of all kernels, and the computation that each kernel is in."""
    module = hlo.parse(text)
    costs, runs = kernel_costs(module), count_runs(module)
    total = 0.0
    for name, times in runs.times.items():
        if name not in runs.fused:
            total += sum(
                costs[i.name].flops * times
                for i in module.computations[name].instructions
                if i.name in costs
            )
    return total


def test_kernels_have_all_products_of_a_scan_and_its_gradient():
    shapes = ((DEPTH, N, N), (8, N))
    program = compiled(jax.grad(layers, argnums=(0, 1)), *shapes)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert totals(program.as_text()) == count_flops(jax.grad(layers, (0, 1)), *arguments).total
    assert totals(program.as_text()) == 3 * DEPTH * 2 * 8 * N * N


def test_flops_and_bytes_of_a_product_are_those_of_xlas_analysis():
    program = compiled(lambda a, b: a @ b, (32, 48), (48, 16))
    (kernel,) = kernel_costs(hlo.parse(program.as_text())).values()
    analysis = program.cost_analysis()
    assert kernel.flops == analysis["flops"] == 2 * 32 * 48 * 16
    assert kernel.bytes == analysis["bytes accessed"] == 4 * (32 * 48 + 48 * 16 + 32 * 16)


def test_a_convolution_counts_every_tap():
    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    program = compiled(convolve, (2, 16, 16, 3), (4, 4, 3, 8))
    assert totals(program.as_text()) == 2 * (2 * 4 * 4 * 8) * (4 * 4 * 3)


# As XLA's GPU compiler writes them (openxla/xla, gemm_rewriter_test.cc, and
# cudnn_fused_mha_rewriter_test.cc), shortened.
GPU_TEXT = """HloModule jit_f, is_scheduled=true

%fused_slice (p0: f32[12,64,64], p1: s32[]) -> f32[64,64] {
  %p0 = f32[12,64,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,64,64]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %flat = f32[64,64]{1,0} bitcast(%cut)
}

%fused_update (p0: f32[12,64,64], p1: f32[64,64], p2: s32[]) -> f32[12,64,64] {
  %p0 = f32[12,64,64]{2,1,0} parameter(0)
  %p1 = f32[64,64]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,64,64]{2,1,0} bitcast(%p1)
  ROOT %put = f32[12,64,64]{2,1,0} dynamic-update-slice(%p0, %row, %p2, %zero, %zero)
}

ENTRY %main (a: bf16[8,128,64], w: f32[12,64,64], i: s32[]) -> f32[12,64,64] {
  %a = bf16[8,128,64]{2,1,0} parameter(0)
  %w = f32[12,64,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %slice = f32[64,64]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %gemm = (f32[8,128,128]{2,1,0}, s8[4194304]{0}) custom-call(%a, %a), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  %attention = (bf16[8,128,64]{2,1,0}, u8[0]{0}) custom-call(%a, %a, %a), \
custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %update = f32[12,64,64]{2,1,0} fusion(%w, %slice, %i), kind=kLoop, calls=%fused_update, \
metadata={op_name="jit(f)/encoder/while/body/update"}
}
"""


def test_kernels_of_a_gpu_and_slices_of_stacked_layers():
    costs = kernel_costs(hlo.parse(GPU_TEXT))
    assert costs.keys() == {"slice", "gemm", "attention", "update"}
    assert costs["gemm"].flops == 2 * 8 * 128 * 128 * 64
    assert costs["attention"].flops is None
    assert costs["slice"].flops == costs["update"].flops == 0
    row = 4 * 64 * 64
    assert costs["slice"].bytes == pytest.approx(2 * row, abs=16)
    assert costs["update"].bytes == pytest.approx(2 * row, abs=16)
    assert costs["update"].what.endswith("body/update")
