"""The reader of machine code reads what it should, and the rules bite."""

import dataclasses
import itertools
import re

import pytest

pytest.importorskip("triton", reason="compiling kernels needs Triton")

import jax.numpy as jnp

from benchmarks.codegen import compile, points, programs, roofline, rules, sass
from benchmarks.codegen.points import EXTRAS, Point, read
from jax_flash_attn2.base.config import Config, Tuned
from jax_flash_attn2.base.spec import Spec
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
GOOD |= {"wide ldg": 0, "sts": 0, "local": 0, "bar": 1, "depbar": 2, "mufu": 8, "lds": 0}
GOOD |= {"global bytes": 16, "shared bytes": 64, "mufu alone": 0}
CODE = sass.Code(registers=128, spill_bytes=0, shared=65536, warps=4, serialized=False, loops=(GOOD,))
POINT = Point(90, "fwd", 64, False, Tuned(128, 64, 4, 3, overlaps=True))


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
        ({}, {"wgmma": 0}, "products without wgmma"),
        ({}, {"mufu alone": 8}, "the softmax runs beside no product"),
    ],
)
def test_rules_bite(changes, loop, message):
    broken = dataclasses.replace(CODE, loops=(GOOD | loop,), **changes)
    assert rules.broken_rules(POINT, CODE) == []
    assert any(message in rule for rule in rules.broken_rules(POINT, broken))


@pytest.mark.parametrize(
    ("changes", "loop", "message"),
    [
        ({}, {"total": 106}, "instructions [106], [100] in the baseline"),
        ({"registers": 140}, {}, "registers 140, 128 in the baseline"),
        ({"spill_bytes": 8}, {}, "spilled bytes 8, 0 in the baseline"),
        ({"shared": 70000}, {}, "shared memory 70000, 65536 in the baseline"),
        ({"tensor_memory": 512}, {}, "tensor memory 512, 0 in the baseline"),
        ({}, {"ex2": 16}, "ex2 per element [0.25], [0.125] in the baseline"),
        ({}, {"mufu alone": 2}, "special functions beside no wgmma [2], [0] in the baseline"),
        ({}, {"global bytes": 32}, "bytes loaded by threads [4096], [2048] in the baseline"),
        ({"loops": (GOOD, GOOD)}, None, "2 loops, 1 in the baseline"),
    ],
)
def test_what_got_worse_is_seen(changes, loop, message, tmp_path):
    versions = {"triton": "3.9.0", "jax": "0.11"}
    baseline = rules.Baseline(versions, tmp_path / "baseline.json")
    assert baseline.broken(POINT, CODE) == ["not in the baseline: add it with --baseline"]
    baseline.write([(POINT, CODE)], whole=True)
    baseline = rules.Baseline(versions, tmp_path / "baseline.json")
    a_little = dataclasses.replace(CODE, registers=130, loops=(GOOD | {"total": 105},))
    assert baseline.broken(POINT, CODE) == baseline.broken(POINT, a_little) == []
    now = dataclasses.replace(CODE, **({"loops": (GOOD | loop,)} if loop is not None else {}) | changes)
    assert message in baseline.broken(POINT, now)
    (other,) = rules.Baseline({"triton": "3.10.0"}, tmp_path / "baseline.json").broken(POINT, CODE)
    assert "renew it with --baseline" in other


def test_every_row_is_compiled():
    """The table has a row for all that DESIGN promises, and the check compiles each, causal and not."""
    found = {(p.arch, p.name, p.head_dim, p.causal) for p in points.points()}
    for arch, width in itertools.product((80, 86, 89, 90, 100), (64, 128, 256)):
        for name, causal in itertools.product(("fwd", "dq", "dkdv"), (False, True)):
            assert (arch, name, width, causal) in found or (arch == 89 and not causal)
        assert (arch, "dbias", width, True) in found
    assert {p.extra for p in points.points()} == set(EXTRAS)
    assert {p.arch for p in points.points()} == set(roofline.CHIPS)


def test_every_kernel_is_in_the_baseline():
    assert {p.title for p in points.points()} == set(rules.Baseline({"triton": ""}).kernels)


@pytest.mark.parametrize("text", ["128x64-w8-s2", "128-w8-s2-ptr", "128x64-w8-s2-r-ptr", ""])
def test_configs_are_read(text):
    assert read("128x64-w8-s2-r168-block") == Tuned(128, 64, 8, 2, 168, True)
    every = Tuned(128, 64, 8, 2, 168, True, overlaps=True, warp_specialize=True)
    assert read(points.written(every)) == every
    with pytest.raises(ValueError, match="a config is written like"):
        read(text)


def test_compiles_what_is_launched():
    point = next(p for p in points.points() if (p.arch, p.name, p.head_dim) == (80, "fwd", 64))
    code = compile.compile_point(point)
    assert code.loops
    assert 0 < code.shared <= Target(80).shared_memory


def test_what_was_read_is_kept(tmp_path, monkeypatch):
    """It comes back equal without a compiler, and not for other sources, nor where it is wanted anew. Another ptxas is
    given what was kept, and what it makes is not."""
    monkeypatch.setattr(compile, "KEPT", tmp_path / "codegen")
    point, compiled, assembled = POINT, [], []

    def lower(*args):
        compiled.append(args)
        return sass.Ptx("code", 90, CODE.shared, CODE.warps)

    monkeypatch.setattr(sass, "lower", lower)
    monkeypatch.setattr(sass, "assemble", lambda ptx, ptxas=None: assembled.append((ptx, ptxas)) or CODE)
    assert compile.compile_point(point) == compile.compile_point(point) == CODE
    assert len(compiled) == 1
    compile.compile_point(point, anew=True)
    compile.compile_point(dataclasses.replace(point, arch=80))
    compile.compile_point(dataclasses.replace(point, config=Tuned(128, 64, 8, 3)))
    monkeypatch.setattr(cache, "made_of", lambda: "other sources")
    compile.compile_point(point)
    assert len(compiled) == 5
    compile.compile_point(point, ptxas="another")
    assert len(compiled) == 5
    assert assembled[-1] == (assembled[0][0], "another")
    monkeypatch.setattr(cache, "made_of", lambda: "yet others")
    compile.compile_point(point, ptxas="another")
    compile.compile_point(point)
    assert len(compiled) == 7


@pytest.mark.parametrize(("arch", "version"), [(80, "8.5"), (90, "8.6"), (100, "8.8")])
def test_ptx_is_the_oldest_that_will_do(arch, version, monkeypatch):
    """Whatever Triton's own ptxas could read: JAX's may be older. And neither may fuse what the kernels do not."""
    written = []
    monkeypatch.setattr(sass, "assemble", lambda ptx, *rest: written.append(ptx.text) or CODE)
    config = Tuned(64, 32, 4, 2, block_ptr=arch >= 90)
    assert compile.compile_point(Point(arch, "fwd", 64, False, config), anew=True).loops == CODE.loops
    assert f".version {version}\n" in written[0]
    assert "fma.rn.f32" in written[0]
    assert not re.search(r"(mul|add|sub)\.f32", written[0])


def test_what_ptxas_refuses_is_told(tmp_path):
    refuses = tmp_path / "ptxas"
    refuses.write_text("#!/bin/sh\necho 'Unsupported .version 9.4' >&2\nexit 255\n")
    refuses.chmod(0o755)
    with pytest.raises(ValueError, match=r"Unsupported \.version 9\.4"):
        sass.assemble(sass.Ptx(".target sm_90a", 90, 0, 4), str(refuses))


def test_roofline():
    """Nothing binds by itself: a tile takes its products and, after them, what is issued, but for what is computed
    beside the product with v."""
    found = roofline.units(POINT, CODE)
    assert found["tensor"] == 4 * 128 * 64 * 64 / 4096
    assert found["issue"] == 100
    assert found["special"] == 8 * 128 / 16
    assert found["beside"] == found["tensor"] / 2
    assert roofline.cycles(found, 2.0) == found["tensor"]
    assert roofline.cycles(found, 4.0) == found["tensor"] + 400 - 256
    apart = roofline.units(POINT, dataclasses.replace(CODE, loops=(GOOD | {"mufu alone": 8},)))
    assert roofline.cycles(apart, 2.0) == found["tensor"] + 200
    assert roofline.share(apart, 2.0) == pytest.approx(512 / 712)
    assert roofline.cycles(found | {"L2": 10000.0}, 2.0) == 10000


@pytest.mark.parametrize(("kv_heads", "before", "now"), [(1, 15.53, 1.30), (4, 4.00, 1.30), (8, 2.12, 1.30)])
def test_few_key_heads_leave_no_chip_idle(kv_heads, before, now):
    """One sequence of 2048, 32 query heads, on an H100: times the balanced time."""
    cells, found = programs.line(90, 1, kv_heads, 2048)
    assert float(cells[6]) == pytest.approx(before, abs=0.3)
    assert found == pytest.approx(now, abs=0.1)


def test_one_head_where_programs_are_few():
    config = Tuned(64, 128, 8, 2)
    for batch, kv_heads, seqlen, want in ((1, 1, 2048, True), (8, 8, 8192, False), (1, 32, 512, False)):
        assert tuning.one_head(Spec(32, kv_heads, 128, 128), config, batch, seqlen, Target(90)) == want


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_fp32_products_are_ieee_unless_asked(precision):
    """IEEE fp32 products run on the FMA units; TF32 ones on the tensor cores."""
    config = tuning.choose("fwd", Spec(8, 8, 64, 64), jnp.float32, Target(80), Config(precision=precision))
    code = compile.compile_point(Point(80, "fwd", 64, False, config, "fp32"))
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
