"""What ranks have seen, merged; `tests/distributed` runs whole commands among them."""

import pytest
import torch

from ckptq.calibrate.divided import check_observers
from ckptq.calibrate.observers import make_observer
from ckptq.calibrate.statistics import Statistics, Wanted
from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.errors import UsageError


def test_a_half_is_not_the_whole():
    """What one of two has seen gives other scales."""
    batches = range(5)
    halves = [Ranks(rank, 2).share(batches) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == list(batches)
    wanted = Wanted(
        strategy="tensor", attention=make_observer("static_minmax", None), inputs={},
        linear=make_observer("static_minmax", None),
    )  # fmt: skip
    one, other = Statistics(wanted), Statistics(wanted)
    one.add({"a.k": {"amin": torch.tensor([-3.0]), "amax": torch.tensor([2.0])}})
    other.add({"a.k": {"amin": torch.tensor([-1.0]), "amax": torch.tensor([7.0])}})
    before = one.scale("a.k", torch.float32)
    one.add(other.points)
    assert one.scale("a.k", torch.float32).item() == pytest.approx(7 / 448)
    assert before.item() == pytest.approx(3 / 448)


def test_an_average_in_order_is_refused():
    check_observers(["minmax"], ALONE)
    check_observers(["static_minmax", "percentile", "mse"], Ranks(0, 2))
    with pytest.raises(UsageError, match="'minmax' depends on the order of batches, which 2"):
        check_observers(["static_minmax", "minmax"], Ranks(0, 2))
