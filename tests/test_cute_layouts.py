"""CuTe's layout algebra, as the notebook uses it, against arithmetic done by hand."""

import numpy as np
import pytest

from hstu_lab.ops.cute_layouts import (
    evaluate,
    mma_owners,
    pieces_touched,
    product_feeds_product,
    shared_offsets,
    words_per_bank,
)


def test_evaluate_hands_out_what_the_trace_computes():
    import cutlass.cute as cute

    assert evaluate(lambda: cute.make_layout((4, (2, 3)), stride=(1, (12, 4)))((3, (1, 2)))) == 3 + 12 + 8


@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_swizzle_is_an_exclusive_or_of_the_row(bits):
    row, column = np.meshgrid(np.arange(8), np.arange(64), indexing="ij")
    expected = 64 * row + (column ^ ((row % 2**bits) << 3))
    assert np.array_equal(shared_offsets(8, 64, 0, bits), expected)
    assert len(np.unique(shared_offsets(8, 64, 0, bits))) == 512


def test_padding_moves_rows_apart():
    assert shared_offsets(4, 64, 8)[3, 5] == 3 * 72 + 5


@pytest.mark.parametrize(("padding", "bits", "passes"), [(0, 0, 8), (0, 1, 4), (0, 2, 2), (0, 3, 1), (8, 0, 1)])
def test_passes_of_a_column(padding, bits, passes):
    offsets = shared_offsets(8, 64, padding, bits)
    assert words_per_bank(offsets, pieces_touched("column", 8, 64, 5)).max() == passes
    assert words_per_bank(offsets, pieces_touched("row", 8, 64, 5)).max() == 1


def test_a_word_that_many_want_counts_once():
    offsets = shared_offsets(8, 64)
    assert words_per_bank(offsets, [(0, 0)] * 8).sum() == 4


def test_another_access_or_operand_is_refused():
    with pytest.raises(ValueError, match="access is 'diagonal': use row or column"):
        pieces_touched("diagonal", 8, 64)
    with pytest.raises(ValueError, match="operand is 'D': use one of A, B, C, wgmma C"):
        mma_owners("D")


@pytest.mark.parametrize("operand", ["A", "B", "C", "wgmma C"])
def test_every_register_holds_one_element(operand):
    owners = mma_owners(operand)
    assert len({tuple(pair) for pair in owners.reshape(-1, 2)}) == owners.shape[0] * owners.shape[1]


def test_result_of_mma_as_the_ptx_manual_has_it():
    """m16n8k16, C: row lane / 4 (plus 8 for registers 2 and 3), column 2 (lane % 4) + register % 2."""
    owners = mma_owners("C")
    for lane in range(32):
        for register in range(4):
            row, column = lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2
            assert tuple(owners[row, column]) == (lane, register)


def test_result_of_one_product_is_operand_of_the_next():
    assert product_feeds_product(16)
