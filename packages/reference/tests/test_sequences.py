"""Cutting problems into dense attentions."""

from __future__ import annotations

import pytest
import torch

from attn_reference import Problem
from attn_reference import sequences as sequences_module
from attn_reference.sequences import cut, gather_pages, sequences, visibility


def test_cut_keeps_what_broadcasts():
    tensor = torch.arange(12).reshape(1, 3, 4)
    assert torch.equal(cut(tensor, (0, slice(1, 3), slice(0, 2))), tensor[0, 1:3, 0:2])
    assert cut(tensor, (5, slice(None), slice(None))).shape == (3, 4)
    assert cut(tensor[:, :1], (0, slice(7, 9), slice(None))).shape == (1, 4)
    assert cut(None, (0,)) is None


def test_pages_in_the_order_of_the_table():
    pages = torch.arange(4 * 2 * 3).reshape(4, 1, 2, 3)
    table = torch.tensor([2, 0, 99], dtype=torch.int32)
    found = gather_pages(pages, table, 3)
    assert torch.equal(found, torch.cat([pages[2, :, :2], pages[0, :, :1]], dim=1))
    assert gather_pages(pages, table, 0).shape == (1, 0, 3)


def test_sequences_share_memory_with_the_inputs(random_inputs):
    problem = Problem(packed=((2, 3), (4, 1)), heads_q=2, head_dim=5)
    inputs = random_inputs(problem)
    first, second = sequences(inputs, problem)
    assert (first.len_q, first.len_k, second.len_q, second.len_k) == (2, 3, 4, 1)
    assert torch.equal(second.q, inputs.q[0, :, 2:6])
    assert torch.equal(inputs.k[second.keys], second.k)
    assert second.v.untyped_storage().data_ptr() == inputs.v.untyped_storage().data_ptr()


@pytest.mark.parametrize("multiple", [1, 3])
@pytest.mark.parametrize("elements", [1, 60, 1 << 22])
def test_chunks_cover_the_rows_and_stay_small(elements, multiple, random_inputs, monkeypatch):
    monkeypatch.setattr(sequences_module, "CHUNK_ELEMENTS", elements)
    problem = Problem(heads_q=4, heads_kv=2, seqlen_q=11, seqlen_k=5, head_dim=1)
    (sequence,) = sequences(random_inputs(problem), problem)
    chunks = list(sequence.chunks(multiple))
    assert [i for rows in chunks for i in range(rows.start, rows.stop)] == list(range(11))
    for rows in chunks[:-1]:
        assert (rows.stop - rows.start) % multiple == 0
    largest = max(rows.stop - rows.start for rows in chunks)
    assert largest <= multiple or 2 * largest * 5 <= elements


def test_visibility_has_the_full_shape(random_inputs):
    problem = Problem(
        heads_q=3, seqlen_q=4, seqlen_k=6, head_dim=2, mask="random", mask_shape="111k"
    )
    inputs = random_inputs(problem)
    (sequence,) = sequences(inputs, problem)
    seen = visibility(sequence, problem, slice(1, 3), slice(2, 4))
    assert torch.equal(seen, inputs.mask[0].expand(3, 4, 6)[1:3, 2:4])
