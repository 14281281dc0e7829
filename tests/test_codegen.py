"""The reader of machine code reads what it should, and the rules bite."""

import dataclasses

import pytest

pytest.importorskip("triton", reason="compiling kernels needs Triton")

import jax.numpy as jnp

from benchmarks import codegen, sass
from jax_flash_attn2.base.spec import Config, Spec, Tuned
from jax_flash_attn2.gpu import cache, tuning
from jax_flash_attn2.gpu.target import Target

LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.128 [R2], [R4.64] ;
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0040*/                   FFMA R9, R9, R10, -R11 ;
        /*0050*/                   MUFU.EX2 R9, R9 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""


def test_reads_a_loop():
    (loop,) = sass._loops(LISTING)
    assert loop["total"] == 6
    assert (loop["mma"], loop["ex2"], loop["ffma"]) == (1, 1, 1)
    assert (loop["cp.async"], loop["wide ldg"], loop["local"]) == (1, 1, 0)


GOOD = {"total": 100, "mma": 8, "wgmma": 8, "ex2": 8, "ffma": 8, "cp.async": 2, "tma": 0, "ldg": 0}
GOOD |= {"wide ldg": 0, "sts": 0, "local": 0, "bar": 1, "depbar": 2}
CODE = sass.Code(registers=128, spill_bytes=0, shared=65536, warps=4, serialized=False, loops=(GOOD,))


@pytest.mark.parametrize(
    ("changes", "loop", "message"),
    [
        ({}, {"local": 1}, "a spill in a loop"),
        ({"serialized": True}, {}, "wgmma serialised"),
        ({}, {"depbar": 20}, "a wait behind every wgmma"),
        ({"shared": 300000}, {}, "300000 bytes of shared memory, the chip has 232448"),
        ({}, {"cp.async": 0}, "no asynchronous copy"),
        ({}, {"wide ldg": 4}, "tiles loaded without asynchronous copies"),
        ({}, {"ffma": 0}, "no fused multiply-add"),
        ({}, {"sts": 4}, "a layout conversion"),
        ({"registers": 32, "spill_bytes": 900}, {}, "32 registers and yet spills"),
    ],
)
def test_rules_bite(changes, loop, message):
    point = codegen.Point(90, "fwd", 64, False, Tuned(128, 64, 4, 3))
    assert codegen.broken_rules(point, CODE) == []
    broken = dataclasses.replace(CODE, loops=(GOOD | loop,), **changes)
    assert any(message in rule for rule in codegen.broken_rules(point, broken))


def test_every_row_is_compiled():
    """The table has a row for all that DESIGN promises, and the check compiles each, causal and not."""
    points = codegen.points()
    for arch in (80, 86, 89, 90, 100):
        for name in ("fwd", "dq", "dkdv"):
            for head_dim in (64, 128, 256):
                for causal in (False, True):
                    assert any((p.arch, p.name, p.head_dim, p.causal) == (arch, name, head_dim, causal) for p in points)


def test_compiles_what_is_launched():
    point = next(p for p in codegen.points() if (p.arch, p.name, p.head_dim) == (80, "fwd", 64))
    code = codegen.compile_point(point)
    assert code.loops
    assert 0 < code.shared <= Target(80).shared_memory


def test_what_was_read_is_kept(tmp_path, monkeypatch):
    """It comes back equal without a compiler, and not for other sources, nor where it is wanted anew."""
    monkeypatch.setattr(codegen, "KEPT", tmp_path / "codegen")
    point, compiled = codegen.Point(90, "fwd", 64, False, Tuned(128, 64, 4, 3)), []

    def compile_kernel(*args):
        compiled.append(args)
        return CODE

    monkeypatch.setattr(sass, "compile_kernel", compile_kernel)
    assert codegen.compile_point(point) == codegen.compile_point(point) == CODE
    assert len(compiled) == 1
    codegen.compile_point(point, anew=True)
    codegen.compile_point(dataclasses.replace(point, arch=80))
    codegen.compile_point(dataclasses.replace(point, config=Tuned(128, 64, 8, 3)))
    monkeypatch.setattr(cache, "sources", lambda folder: "other sources")
    codegen.compile_point(point)
    assert len(compiled) == 5


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_fp32_products_are_ieee_unless_asked(precision):
    """IEEE fp32 products run on the FMA units; TF32 ones on the tensor cores."""
    config = tuning.choose("fwd", Spec(8, 8, 64, 64), jnp.float32, Target(80), Config(precision=precision))
    code = codegen.compile_point(codegen.Point(80, "fwd", 64, False, config), dtype=jnp.float32)
    assert any(loop["mma"] for loop in code.loops) == (precision == "tf32")


@pytest.mark.parametrize("block_ptr", [None, True, False])
@pytest.mark.parametrize("arch", [80, 86, 87, 89, 90, 100, 103, 120])
def test_choose_is_complete(arch, block_ptr):
    """Every chip gets a config for every pass, with every field set and the caller's wishes kept."""
    for name in ("fwd", "dq", "dkdv", "dbias"):
        for d in (16, 64, 80, 128, 256):
            for dtype in (jnp.bfloat16, jnp.float32):
                c = tuning.choose(name, Spec(8, 8, d, d), dtype, Target(arch), Config(64, None, block_ptr=block_ptr))
                assert c.block_m == 64
                assert None not in (c.block_n, c.num_warps, c.num_stages, c.block_ptr)
                assert block_ptr in (None, c.block_ptr)


@pytest.mark.parametrize("widths", [(64, 68), (68, 64), (8, 12)])
def test_descriptors_are_for_rows_of_16_bytes(widths):
    """Each width by itself: jaxlib refuses at launch a descriptor whose rows are 136 or 24 bytes apart."""
    for name in ("fwd", "dq", "dkdv"):
        spec = Spec(8, 8, *widths)
        assert not tuning.choose(name, spec, jnp.bfloat16, Target(90), Config()).block_ptr
