"""CuTe DSL attention: machine code of both generations here; the oracle's answers on a GPU."""

import random

import pytest
import torch

from hstu_lab.ops import reference
from hstu_lab.ops.cute_attention import attention_jagged, default_tiles, unsupported
from hstu_lab.ops.cute_compile import Kernel, compile_attention, occupancy
from hstu_lab.ops.cute_hopper import HopperTiles


@pytest.mark.parametrize("width", [64, 128])
def test_hopper_kernel_keeps_products_in_flight_and_spills_nothing(width):
    kernel = compile_attention(90, width)
    assert kernel.spilled_bytes == kernel.instructions("LDL") == kernel.instructions("STL") == 0
    assert min(kernel.instructions(name) for name in ("HGMMA.64x64x16.F32.BF16", "UTMALDG.3D", "USETMAXREG.DEALLOC.CTAPOOL")) > 0
    # A compiler that cannot prove the accumulators safe waits after every product: as many waits as products.
    assert kernel.instructions("WARPGROUP.DEPBAR.LE") <= kernel.instructions(f"HGMMA.64x{64}x16.F32.BF16") / 3
    assert kernel.shared_bytes <= 227 * 1024
    assert kernel.instructions("HMMA.16816.F32.BF16") == 0


def test_a_serialised_kernel_would_be_noticed():
    """Two sets of 64 x 128 scores and a 64 x 128 output do not fit in 240 registers when unrolled: the count must show it."""
    kernel = compile_attention(90, 128, tiles=HopperTiles(128, 2, 2, "ahead", 2))
    products = sum(kernel.instructions(f"HGMMA.64x{n}x16.F32.BF16") for n in (64, 128))
    assert kernel.instructions("WARPGROUP.DEPBAR.LE") > products / 3


@pytest.mark.parametrize("width", [64, 128])
def test_ampere_kernel_copies_asynchronously_and_spills_nothing(width):
    kernel = compile_attention(80, width)
    assert kernel.spilled_bytes == kernel.instructions("LDL") == kernel.instructions("STL") == 0
    assert min(kernel.instructions(n) for n in ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.LTC128B.128", "LDSM.16.M88.4")) > 0
    assert occupancy(kernel).blocks >= 2
    assert ".target sm_80" in kernel.ptx
    assert kernel.entry in kernel.ptx


def test_half_precision_compiles_too():
    assert compile_attention(90, 64, torch.float16).instructions("HGMMA.64x64x16.F32") > 0


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks", "limit"),
    [
        (128, 255, 49152, 2, "registers"),
        (128, 32, 65536, 2, "shared memory"),
        (1024, 16, 0, 2, "warps"),
        (32, 16, 0, 32, "blocks"),
        (1024, 72, 0, 0, "registers"),
    ],
)
def test_occupancy_by_hand(threads, registers, shared, blocks, limit):
    found = occupancy(Kernel("", 80, threads, registers, 0, shared, ""))
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * threads // 32, limit)


def test_listing_shows_instructions_without_addresses():
    kernel = Kernel("", 80, 1, 1, 0, 0, "  /*0010*/  @P0 LDGSTS.E [R1], [R2.64] ;\n /*0020*/  MOV R1, R2 ;\n /*0030*/  HMMA R4 ;")
    assert kernel.listing("LDGSTS", "HMMA") == "@P0 LDGSTS.E [R1], [R2.64]\nHMMA R4"
    assert kernel.listing("LDGSTS", "HMMA", most=1) == "@P0 LDGSTS.E [R1], [R2.64]"


@pytest.mark.parametrize("capability", [80, 90])
def test_default_tiles_fit_shared_memory(capability):
    for width in (64, 128):
        assert (
            compile_attention(capability, width, tiles=default_tiles(width, capability)).shared_bytes
            <= (163 if capability == 80 else 227) * 1024
        )


@pytest.mark.parametrize("wrong", [{"keys": 96}, {"groups": 4}, {"order": "sideways"}, {"stages": 1}])
def test_tiles_that_the_kernel_cannot_do_are_refused(wrong):
    with pytest.raises(ValueError, match="keys 64 or 128, groups 2 or 3, at least 2 stages, order ahead or behind"):
        HopperTiles(**wrong)


def test_tensors_of_another_device_are_named():
    q = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    assert unsupported(q, q, q) == "q is on cpu: a CUDA device is needed"
    with pytest.raises(ValueError, match="q is on cpu"):
        attention_jagged(q, q, q, torch.tensor([0, 3]), divisor=3)


# ---- on a GPU

EDGES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 384, 385]


def case(lengths, *, width, seed, heads=2, dtype=torch.bfloat16, tiles=None, max_len=None):
    """Relative error of one jagged batch; q, k, v are slices of one tensor, as in the layer, and freed memory holds NaN."""
    g = torch.Generator("cuda").manual_seed(seed)
    packed = torch.randn(sum(lengths), 3 * heads * width, device="cuda", generator=g).to(dtype)
    q, k, v = (t.unflatten(-1, (heads, width)) for t in packed.split(heads * width, dim=-1))
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    junk = [torch.full_like(q, torch.nan) for _ in range(3)]
    del junk
    got = attention_jagged(q, k, v, offsets, divisor=512, tiles=tiles, max_len=max_len)
    expected = reference.attention_jagged(q.float(), k.float(), v.float(), offsets, divisor=512)
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hundred_random_batches(width, dtype):
    """200 in bfloat16 over both widths, drawn fresh every time: the seed is printed by a failure."""
    start = random.SystemRandom().randrange(2**30)
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-3
    for seed in range(start, start + 100):
        draw = random.Random(seed)
        lengths = [draw.choice(EDGES) if draw.random() < 0.6 else draw.randint(0, 1500) for _ in range(draw.randint(1, 9))]
        if sum(lengths) == 0:
            lengths.append(1)
        found = case(lengths, width=width, seed=seed, heads=draw.choice([1, 2, 5]), dtype=dtype)
        assert found < limit, (seed, lengths, found)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_every_choice_of_tiles(width):
    from hstu_lab.ops.cutlass_ops import HOPPER_ATTENTION

    for tiles in (*HOPPER_ATTENTION.values(), HopperTiles(64, 2, 4, "behind"), HopperTiles(128, 2, 2, "ahead", 1)):
        assert case([700, 0, 1, 129, 512, 64], width=width, seed=3, tiles=tiles) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_one_sequence_never_spoils_another(width):
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(900, 2, width, device="cuda", generator=g).bfloat16() for _ in range(3))
    offsets = torch.tensor([0, 333, 334, 600, 900], device="cuda")
    expected = attention_jagged(q, k, v, offsets, divisor=512)
    for t in (q, k, v):
        t[333:334], t[600:] = torch.nan, torch.inf
    got = attention_jagged(q, k, v, offsets, divisor=512)
    assert torch.equal(got[:333], expected[:333])
    assert torch.equal(got[334:600], expected[334:600])


@pytest.mark.gpu
def test_a_loose_bound_and_one_long_sequence():
    assert case([5, 300], width=64, seed=0, max_len=4096) < 1e-2
    assert case([5000], width=64, seed=1, heads=1) < 1e-2


@pytest.mark.gpu
def test_the_same_answer_every_time_and_in_a_graph():
    q, k, v = (torch.randn(3000, 2, 64, device="cuda").bfloat16() for _ in range(3))
    offsets = torch.tensor([0, 1000, 1001, 3000], device="cuda")

    def run():
        return attention_jagged(q, k, v, offsets, divisor=512, max_len=2000)

    expected = run()
    assert all(torch.equal(run(), expected) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_an_address_that_tma_cannot_read_is_copied():
    flat = torch.randn(300 * 2 * 64 + 1, device="cuda").bfloat16()
    q = flat[1:].view(300, 2, 64)
    offsets = torch.tensor([0, 300], device="cuda")
    expected = attention_jagged(q.clone(), q.clone(), q.clone(), offsets, divisor=512)
    assert torch.equal(attention_jagged(q, q, q, offsets, divisor=512), expected)


@pytest.mark.gpu
def test_no_rows():
    empty = torch.zeros(0, 2, 64, device="cuda", dtype=torch.bfloat16)
    assert attention_jagged(empty, empty, empty, torch.tensor([0, 0], device="cuda"), divisor=1).shape == (0, 2, 64)


@pytest.mark.gpu
def test_what_is_not_for_them_is_named():
    q = torch.zeros(3, 2, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros(2, 8, device="cuda")
    assert unsupported(q, q, q) == ""
    assert unsupported(q.float(), q.float(), q.float()) == "q, k and v must all be bfloat16 or all float16"
    assert unsupported(q[..., :32], q[..., :32], q).startswith("head widths are 32 and 64")
    assert unsupported(q, q, q, reference.RelativeBias(table)) == "a relative bias is not fused in them"
    assert unsupported(q, q, q, None, torch.zeros(1, device="cuda")) == "candidates are not masked by them"
    assert unsupported(q, q, q, num_context=2) == "a context prefix is not masked by them"
