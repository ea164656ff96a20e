"""A batch says where every token stands, where its key goes and which logits are wanted."""

from __future__ import annotations

import pytest
import torch

from model.batch import Batch, BatchBuilder, BatchRow

ROWS = [
    BatchRow([11], 9, [5, 2, 8], 1),
    BatchRow([12], 0, [3], 1),
    BatchRow([20, 21, 22, 23, 24], 6, [7, 1, 4], 0),
    BatchRow([30, 31], 0, [6], 2),
]


def build(rows: list[BatchRow]) -> Batch:
    return BatchBuilder(16, 8, 4, 4).build(rows)


def test_tokens_stand_one_after_another_at_their_positions() -> None:
    batch = build(ROWS)
    assert batch.token_ids.tolist() == [11, 12, 20, 21, 22, 23, 24, 30, 31]
    assert batch.positions.tolist() == [9, 0, 6, 7, 8, 9, 10, 0, 1]
    assert batch.query_starts.tolist() == [0, 1, 2, 7, 9]
    assert batch.query_lengths == [1, 1, 5, 2]
    assert (batch.num_tokens, batch.num_decodes) == (9, 2)


def test_keys_go_to_the_page_and_place_of_their_position() -> None:
    batch = build(ROWS)
    assert batch.slot_blocks.tolist() == [8, 3, 1, 1, 4, 4, 4, 6, 6]
    assert batch.slot_offsets.tolist() == [1, 0, 2, 3, 0, 1, 2, 0, 1]


def test_contexts_count_the_keys_of_this_step() -> None:
    batch = build(ROWS)
    assert batch.context_lengths.tolist() == batch.contexts == [10, 1, 11, 2]
    assert batch.block_tables.tolist() == [[5, 2, 8], [3, 0, 0], [7, 1, 4], [6, 0, 0]]
    assert batch.tables == [[5, 2, 8], [3], [7, 1, 4], [6]]


def test_wanted_logits_are_those_of_each_rows_last_tokens() -> None:
    assert build(ROWS).logit_rows.tolist() == [0, 1, 7, 8]


def test_a_token_only_the_device_knows_is_put_in_from_those_drawn() -> None:
    drawn = torch.tensor([70, 80, 90])
    rows = [
        BatchRow([0], 9, [5, 2, 8], 1, drawn_at=2),
        BatchRow([12], 0, [3], 1),
        BatchRow([0], 4, [1, 6], 1, drawn_at=0),
        BatchRow([30, 31], 0, [7], 2),
    ]
    builder = BatchBuilder(16, 8, 4, 4)
    assert builder.build(rows, drawn).token_ids.tolist() == [90, 12, 70, 30, 31]
    assert builder.build(rows).token_ids.tolist() == [0, 12, 0, 30, 31]


def test_pages_past_the_context_are_left_out() -> None:
    assert build([BatchRow([1], 3, [5, 6, 7], 1)]).tables == [[5]]


def test_integers_have_the_width_kernels_read() -> None:
    batch = build(ROWS)
    narrow = (batch.query_starts, batch.context_lengths, batch.block_tables)
    assert {each.dtype for each in narrow} == {torch.int32}
    wide = (batch.token_ids, batch.positions, batch.slot_blocks, batch.slot_offsets)
    assert {each.dtype for each in (*wide, batch.logit_rows)} == {torch.int64}


def test_a_builder_serves_step_after_step() -> None:
    builder = BatchBuilder(16, 8, 4, 4)
    builder.build(ROWS)
    batch = builder.build(ROWS[1:3])
    assert batch.token_ids.tolist() == [12, 20, 21, 22, 23, 24]
    assert batch.block_tables.tolist() == [[3, 0, 0], [7, 1, 4]]
    assert batch.logit_rows.tolist() == [0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[2], ROWS[0]], "rows of one token come first"),
        ([BatchRow([], 3, [1], 0)], "come first"),
        ([], "0 tokens"),
        ([BatchRow([1] * 17, 0, [1] * 5, 0)], "17 tokens"),
        ([BatchRow([1], 0, [1], 0)] * 9, "9 rows"),
        ([BatchRow([1], 16, [1] * 5, 0)], "too long"),
    ],
)
def test_what_only_a_bug_can_cause_is_asserted(rows: list[BatchRow], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        build(rows)
