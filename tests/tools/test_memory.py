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


@pytest.fixture
def counted(comfy):
    """A function that counts a step on a small FLUX, given how its weights are stored and the setting of memory. Gives
    the count, and the sizes of the blocks' matrices."""
    import memory
    import random_models
    import torch

    def count(weights, setting):
        with memory.host_on_meta():
            storage = memory.STORAGES[weights]
            model = random_models.flux(256, (1, 1), 64, 32, dtype=torch.bfloat16, storage=storage, device=memory.META)
            blocks = model.model.diffusion_model.double_blocks
            if weights == "q8_0":
                memory.pack(blocks)
            layers = [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
            sizes = [layer.in_features * layer.out_features for layer in layers]
            return memory.step(model, 6, 8, 4, setting), sizes

    return count


def test_packed_weights_take_what_they_take_in_a_file(counted):
    (packed, sizes), (plain, _) = counted("q8_0", "low"), counted("bf16", "low")
    assert plain["weights"] - packed["weights"] == sum(2 * size - size * 34 // 32 for size in sizes)


def test_a_packed_weight_is_unpacked_in_float16_first_and_gone_after_its_use(comfy):
    import memory
    import torch

    from tlora_core.hosts.comfy.model.layers import fetched

    layer = torch.nn.Linear(64, 128, bias=False)
    memory.pack([layer])
    with memory.Counter() as counter:
        with fetched(layer, torch.empty(1, 64, dtype=torch.bfloat16, device=memory.META)) as (weight, _):
            assert weight.shape == (128, 64) and weight.dtype == torch.bfloat16
            assert counter.live == 128 * 64 * 2 + 64 * 2
        assert counter.peak == 128 * (64 * (2 + 2) + 64 // 32 * 34) + 64 * 2, "float16, bfloat16 and the packed bytes"
        del weight
    assert counter.live == 0
