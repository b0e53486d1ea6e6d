"""The count of memory, as README's table of cards is made from it."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.mark.parametrize("card, setting", [(6, "lowest"), (8, "low"), (12, "low"), (16, "fast"), (1, None)])
def test_the_fastest_setting_that_fits_leaves_room_for_cuda_and_the_allocator(comfy, card, setting):
    import memory

    rows = [{"memory": name, "peak_mb": peak} for name, peak in (("fast", 11461), ("low", 6265), ("lowest", 1477))]
    assert memory.fastest(rows, card) == setting
    assert memory.fastest([{"memory": "low", "peak_mb": 1024 * 7}], 8) is None, "7 GiB and a tenth, and CUDA's half"
