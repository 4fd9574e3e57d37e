"""Data: ids, batches, splits and sums."""

from collections import defaultdict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from pyro_forget.data import MADE_UP, Batch, Data, as_ids

Pair = namedtuple("Pair", ["x", "y"])


def rows(num_data: int = 10) -> tuple[Tensor, Tensor]:
    return torch.arange(2.0 * num_data).reshape(num_data, 2), torch.arange(num_data) * 10


def batches(data: Data) -> list[Batch]:
    return list(data.batches())


def test_a_call_is_cut_into_batches_in_order() -> None:
    x, y = rows()
    data = Data(x, y=y).with_batch_size(4)
    assert [len(batch) for batch in data.batches()] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.args[0] for batch in data.batches()]), x)
    assert torch.equal(torch.cat([batch.kwargs["y"] for batch in data.batches()]), y)
    assert torch.equal(torch.cat([batch.ids for batch in data.batches()]), torch.arange(10))
    assert [batch.ids.tolist() for batch in data.batches()] == [batch.ids.tolist() for batch in data.batches()]


def test_what_has_no_rows_is_passed_as_it_is() -> None:
    x, _ = rows()
    fixed = (torch.zeros(3, 10), torch.tensor(2.0), "text", 10, None, np.zeros(4), print)
    (batch,) = batches(Data(x, *fixed).split([3])[0])
    assert torch.equal(batch.args[0], x[3:4])
    assert all(mine is theirs for mine, theirs in zip(batch.args[1:], fixed, strict=True))


def test_one_level_of_nesting() -> None:
    x, y = rows()
    nested: dict[str, Any] = defaultdict(list, {"x": x, "names": ["a", "b"], "scale": 2.0})
    (batch,) = batches(Data(nested, (x, y), [y, 3], Pair(x, y)).split([8, 2])[0])
    assert torch.equal(batch.args[0]["x"], x[[2, 8]])
    assert batch.args[0]["names"] == ["a", "b"] and batch.args[0]["scale"] == 2.0
    assert torch.equal(batch.args[1][1], y[[2, 8]])
    assert torch.equal(batch.args[2][0], y[[2, 8]]) and batch.args[2][1] == 3
    assert isinstance(batch.args[3], Pair) and torch.equal(batch.args[3].y, y[[2, 8]])


def test_arrays_and_data_frames() -> None:
    x, y = rows()
    frame = pd.DataFrame({"x": x[:, 0], "name": list("abcdefghij")}, index=range(10, 0, -1))
    (batch,) = batches(Data(x.numpy(), frame, frame["name"], y).split([1, 7])[0])
    assert np.array_equal(batch.args[0], x.numpy()[[1, 7]])
    assert batch.args[1]["name"].tolist() == batch.args[2].tolist() == ["b", "h"]


def test_a_data_frame_is_cut_by_position_in_slices_too() -> None:
    frame = pd.DataFrame({"x": range(10)}, index=range(10, 0, -1))
    assert [batch.args[0]["x"].tolist() for batch in Data(frame).with_batch_size(6).batches()] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9],
    ]


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("chosen", [[1, 2], [1, 7]])
def test_data_along_another_dim(dim: int, chosen: list[int]) -> None:
    x, y = rows()
    data = Data.of((x.T.contiguous(),), {"y": y, "z": x.T.numpy()}, dims={0: dim, "z": dim})
    (batch,) = batches(data.split(chosen)[0])
    assert torch.equal(batch.args[0], x.T[:, chosen])
    assert torch.equal(batch.kwargs["y"], y[chosen])
    assert np.array_equal(batch.kwargs["z"], x.T.numpy()[:, chosen])
    assert data.template().args[0].shape == data.template().kwargs["z"].shape == (2, 2)


def test_fixed_arguments() -> None:
    x, y = rows()
    data = Data.of((x, y), {"prior": {"scale": torch.ones(10)}}, fixed=(1, "scale"))
    (batch,) = batches(data.split([4])[0])
    assert batch.args[1] is y
    assert len(batch.kwargs["prior"]["scale"]) == 10
    assert data.template().args[1] is y


def test_the_number_of_data() -> None:
    x, y = rows()
    assert len(Data(x, torch.zeros(3))) == 10, "the longer where lengths tie"
    assert len(Data(x, y, torch.zeros(30))) == 10, "the commonest"
    assert len(Data.of((x, torch.zeros(30)), num_data=30)) == 30
    with pytest.raises(ValueError, match=r"number of data is unknown.*num_data"):
        Data(3, "text")


def test_an_indexed_call() -> None:
    data = Data.of(num_data=10)
    assert data.indexed and not Data(rows()[0]).indexed
    (batch,) = batches(data.split([2, 9])[0])
    assert (batch.args, batch.kwargs, batch.rows.tolist()) == ((), {}, [2, 9])


# --- ids


def test_ids_survive_splits() -> None:
    ids = [7, -3, 10**15, 0, 2, 11, 12, 13, 14, 15]
    data = Data.of(rows(), ids=ids)
    erased, retained = data.split([10**15, 7, 15])
    assert erased.ids.tolist() == [7, 10**15, 15], "in the order of the data"
    assert retained.ids.tolist() == [-3, 0, 2, 11, 12, 13, 14]
    further, rest = retained.split([-3])
    assert batches(further)[0].rows.tolist() == [1]
    assert torch.equal(batches(further)[0].args[0], rows()[0][1:2])
    assert rest.num_data == 6
    assert data.ids.tolist() == ids


@pytest.mark.parametrize(
    "ids", [[2, 5], (2, 5), np.array([2, 5]), torch.tensor([5, 2]), range(2, 6, 3), torch.tensor([2, 5]).int()]
)
def test_ids_of_any_kind(ids: Any) -> None:
    assert Data(*rows()).split(ids)[0].ids.tolist() == [2, 5]


def test_no_ids() -> None:
    none, everything = Data(*rows()).split([])
    assert (len(none), len(everything)) == (0, 10)
    assert batches(none) == []
    assert torch.equal(none.ids, torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([3, 4, 3], r"`ids` repeats 3: each row can be chosen once"),
        ([3, 99, 98], r"id 99, 98 not in the data: erased before, or never there"),
        (range(100, 110), r"id 100, 101, 102, 103, 104 and 5 more not in"),
        ([-1], r"id -1 not in the data"),
        (torch.arange(10) > 3, r"boolean mask: use `data.ids\[mask\]`"),
        ([1.5], r"must be integers, got torch.float64"),
        ([[1, 2]], r"one-dimensional, got shape \(1, 2\)"),
        (["anna"], r"must be integers"),
        ([2**70], r"must be integers that int64 holds"),
    ],
)
def test_wrong_ids(ids: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Data(*rows()).split(ids)


def test_an_erased_row_is_unknown() -> None:
    _, retained = Data(*rows()).split([4])
    with pytest.raises(ValueError, match="id 4 not in the data: erased before"):
        retained.split([4])


def test_own_ids_are_checked() -> None:
    with pytest.raises(ValueError, match="`ids` has 3 entries for 10 rows"):
        Data.of(rows(), ids=[1, 2, 3])
    with pytest.raises(ValueError, match="repeats 0"):
        Data.of(rows(), ids=[0] * 10)


def test_own_ids_are_copied() -> None:
    ids = torch.arange(10)
    data = Data.of(rows(), ids=ids)
    ids += 5
    data.ids.add_(7)
    assert data.ids.tolist() == list(range(10))


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=30, unique=True), st.data())
def test_every_split_is_a_partition(ids: list[int], choose: st.DataObject) -> None:
    data = Data.of((torch.arange(len(ids)),), ids=ids)
    chosen = choose.draw(st.lists(st.sampled_from(ids), unique=True))
    these, rest = data.split(chosen)
    assert sorted(these.ids.tolist()) == sorted(chosen)
    assert sorted(these.ids.tolist() + rest.ids.tolist()) == sorted(ids)
    for part in (these, rest):
        for batch in part.with_batch_size(4).batches():
            assert [ids[row] for row in batch.args[0].tolist()] == batch.ids.tolist()
    assert these.join(rest).ids.tolist() == ids


def test_joining() -> None:
    data = Data(*rows())
    these, rest = data.split([1, 8])
    assert rest.join(these).ids.tolist() == list(range(10))
    with pytest.raises(ValueError, match="share rows"):
        data.join(these)
    with pytest.raises(ValueError, match="splits of the same `Data`"):
        these.join(Data(*rows()))


# --- memory


def test_splits_share_memory() -> None:
    x, y = rows(10)
    these, rest = Data(x, y).split(range(3))
    assert batches(these)[0].args[0].data_ptr() == x.data_ptr()
    assert batches(rest)[0].args[0].data_ptr() == x[3:].data_ptr()
    assert np.shares_memory(batches(Data(x.numpy()))[0].args[0], x.numpy())


class Counting(Dataset):
    """Squares, and a note of what was asked for."""

    def __init__(self, wrap: Any = tuple) -> None:
        self.asked: list[int] = []
        self.wrap = wrap

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.wrap((torch.tensor([index, 1.0]), index**2))


def test_a_data_set_is_loaded_batch_by_batch() -> None:
    dataset = Counting()
    data = Data.from_dataset(dataset, ids=range(100, 110), batch_size=4)
    these, _ = data.split([109, 101, 104])
    assert dataset.asked == [] and len(data) == 10 and not data.indexed
    (batch,) = batches(these)
    assert dataset.asked == [1, 4, 9]
    assert torch.equal(batch.args[0][:, 0], torch.tensor([1.0, 4.0, 9.0]))
    assert batch.args[1].tolist() == [1, 16, 81]
    assert batch.ids.tolist() == [101, 104, 109]
    first = next(data.batches())
    assert dataset.asked == [1, 4, 9, 0, 1, 2, 3] and len(first) == 4
    assert data.template().args[0].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_items_of_a_data_set_are_calls() -> None:
    data = Data.from_dataset(Counting(lambda item: {"x": item[0], "y": item[1]}))
    assert batches(data)[0].args == () and set(batches(data)[0].kwargs) == {"x", "y"}
    data = Data.from_dataset(Counting(lambda item: item[0]))
    assert batches(data)[0].args[0].shape == (10, 2)
    data = Data.from_dataset(TensorDataset(*rows()))
    assert torch.equal(batches(data)[0].args[1], rows()[1])


def test_a_stream_is_no_data_set() -> None:
    def stream() -> Iterator[int]:
        yield 1

    with pytest.raises(ValueError, match="map-style, with a length and items by index; got generator"):
        Data.from_dataset(stream())


def test_rows_move_to_a_device_one_batch_at_a_time() -> None:
    x, y = rows()
    data = Data(x, y, torch.zeros(3)).with_batch_size(4)
    moved = data.to("meta")
    assert data.device is None and x.device.type == "cpu"
    for batch in moved.split([1, 2])[0].batches():
        assert {part.device.type for part in batch.args} == {"meta"}
        assert batch.ids.device.type == batch.rows.device.type == "cpu"
    assert moved.template().args[0].is_meta
    assert next(Data.from_dataset(Counting()).to("meta").batches()).args[0].is_meta


# --- sums


def test_sums_over_batches() -> None:
    x, y = rows()
    data = Data(x, y).with_batch_size(3)
    assert torch.equal(data.reduce(lambda batch: batch.args[0].sum(0)), x.sum(0))
    found = data.reduce(
        lambda batch: {"x": batch.args[0].sum(), "more": (batch.args[1].sum(), batch.args[1].sum() * 2)}
    )
    assert found == {"x": x.sum(), "more": (y.sum(), 2 * y.sum())}
    assert data.reduce(lambda batch: batch.args[1].sum(), start=torch.tensor(5)) == y.sum() + 5


def test_a_sum_over_no_rows_is_its_start() -> None:
    none = Data(*rows()).split([])[0]
    assert none.reduce(lambda batch: batch.args[0].sum(), start=torch.tensor(1.5)) == 1.5
    with pytest.raises(ValueError, match="no rows needs a `start`"):
        none.reduce(lambda batch: batch.args[0].sum())
    with pytest.raises(ValueError, match="No rows to gather"):
        none.gather(lambda batch: batch.args[0].sum(-1))


def test_gathering_joins_the_last_dim() -> None:
    data = Data(*rows()).split([0, 3, 4, 9])[0].with_batch_size(3)
    found = data.gather(lambda batch: batch.args[0].T)
    assert torch.equal(found, rows()[0][[0, 3, 4, 9]].T)


# --- random batches


def test_random_batches_cover_an_epoch() -> None:
    data = Data.of(rows(12), ids=range(50, 62)).split([55])[1]
    found = data.minibatches(3, torch.Generator().manual_seed(1))
    epochs = [[next(found) for _ in range(3)] for _ in range(40)]
    for epoch in epochs:
        ids = torch.cat([batch.ids for batch in epoch])
        assert len(ids.unique()) == 9, "each row at most once, the last two of 11 left out"
    counts = torch.cat([batch.ids for epoch in epochs for batch in epoch]).bincount(minlength=62)[50:]
    assert counts[5] == 0 and counts[counts > 0].min() > 20
    assert all(torch.equal(batch.args[1] // 10 + 50, batch.ids) for epoch in epochs for batch in epoch)


def test_random_batches_are_seeded_and_use_no_other_generator() -> None:
    data, state = Data(*rows()), torch.get_rng_state()
    first, second, third = (
        [next(found).ids.tolist() for _ in range(5)]
        for found in (data.minibatches(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    )
    assert first == second != third
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_batch_is_at_most_all_rows() -> None:
    found = Data(*rows()).minibatches(99, torch.Generator())
    assert sorted(next(found).ids.tolist()) == list(range(10))
    with pytest.raises(ValueError, match="No rows to draw"):
        next(Data(*rows()).split([])[0].minibatches(3, torch.Generator()))


@pytest.mark.parametrize("size", [0, -1])
def test_batch_sizes_are_positive(size: int) -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got"):
        Data(*rows()).with_batch_size(size)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got"):
        Data.of(rows(), batch_size=size)


# --- the template


def test_the_template_holds_shapes_and_no_values() -> None:
    x, y = rows()
    frame = pd.DataFrame({"x": x[:, 0] + 3, "count": y + 3, "name": list("abcdefghij")})
    single, table = torch.tensor([7.0]), torch.ones(3, 3)
    template = Data(x + 3, y + 3, x.numpy() + 3, frame, frame["name"], single, table).template()
    assert torch.equal(template.args[0], torch.ones(2, 2))
    assert torch.equal(template.args[1], torch.zeros(2, dtype=torch.int64))
    assert np.array_equal(template.args[2], np.ones((2, 2)))
    assert template.args[3].dtypes.equals(frame.dtypes)
    assert template.args[3]["x"].tolist() == [1.0, 1.0] and template.args[3]["count"].tolist() == [0, 0]
    assert template.args[3]["name"].tolist() == template.args[4].tolist() == ["", ""]
    assert template.args[5] is single and template.args[6] is table, "what is no row stays"
    assert template.ids.tolist() == [MADE_UP, MADE_UP]


def test_there_is_a_template_without_rows() -> None:
    none = Data(*rows()).split([])[0]
    assert none.template().args[0].shape == (2, 2)


def test_ids_as_a_tensor() -> None:
    assert as_ids(range(3)).tolist() == [0, 1, 2]
    assert as_ids(5).tolist() == [5]  # type: ignore[arg-type]
    assert as_ids([]).dtype == torch.int64


def test_what_data_says_of_itself() -> None:
    assert repr(Data(*rows()).split([3])[1]) == "Data(9 rows, batch_size=2048)"
