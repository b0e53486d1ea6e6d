"""What training a T-LoRA takes in memory at real sizes: counted, not measured, and without a GPU.

    python3 tools/host.py bench memory [--model sdxl|flux|klein|z-image|krea2|qwen-image] [--weights bf16 fp8 q8_0]
        [--memory fast low lowest] [--pixels 1024] [--rank 64] [--cards 8 12 16 24] [--json]

A step is made on PyTorch's device "meta", where tensors have a size and no numbers, and every tensor is counted for as
long as it lives. Two steps are made, as the optimizer's state is there from the second one on. "peak_mb" is the highest
sum, weights of the diffusion model included; "kernels" the operations that a GPU would be given for a step's forward
and backward pass. With "lowest" no weight stays on the device that the host can stream from RAM: its peak is the least
with which the model trains, and includes the two buffers through which the host streams on a GPU. Not counted: CUDA's
own memory (about half a gigabyte), workspaces of convolutions, what the allocator loses, text encoders and VAE, which
the host moves off. Attention is taken to keep its inputs and output, as the kernels do that GPUs have for it. --cards
adds, for cards of so many GiB, the fastest setting that fits: 0.5 GiB are left for CUDA, and a tenth of the peak for
what the allocator loses. q8_0 is a GGUF file's, which its own layers unpack at each use, in float16 first; the host
does not stream it, so there are no buffers but what the layer in use takes.
"""

import argparse
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import torch
from _packed import pack
from _printing import show
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
META = torch.device("meta")
# Their texts' tokens.
MODELS = {"sdxl": 77, "flux": 512, "klein": 512, "z-image": 256, "krea2": 256, "qwen-image": 256}
STORAGES = {"bf16": None, "fp16": None, "fp8": torch.float8_e4m3fn, "q8_0": None}
_BUDGET = 0.1  # bytes of weights that "lowest" keeps on the device
STREAMS = 2  # as many copies to the device does the host make at once
_NO_KERNELS = {
    "view",
    "t",
    "transpose",
    "permute",
    "expand",
    "as_strided",
    "unbind",
    "split",
    "slice",
    "select",
    "detach",
    "alias",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "split_with_sizes",
    "narrow",
    "empty",
    "empty_like",
    "new_empty",
    "_reshape_alias",
    "reshape",
}


class Counter(TorchDispatchMode):
    """Within the block, counts the bytes of tensors on META while they live, and operations. `known`: tensors counted
    from before."""

    def __init__(self, known=()):
        super().__init__()
        self.live = self.peak = self.kernels = 0
        self._storages = set()
        self.note(known)

    def note(self, tensors):
        for tensor in tensors:
            self._note(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        on_meta = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_meta]
        for tensor in on_meta:
            self._note(tensor)
        self.kernels += bool(on_meta) and function._schema.name.split("::")[1] not in _NO_KERNELS
        return result

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage, size):
        self._storages.discard(storage)
        self.live -= size


class _Attention(torch.autograd.Function):
    """Keeps what a GPU's attention keeps: its inputs, its output and a number for each row."""

    @staticmethod
    def forward(ctx, q, k, v):
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextmanager
def host_on_meta():
    """Within the block the host and the trainer take META for a device with memory enough: nothing is loaded, read at
    the end of a step, or kept to fall back on."""
    import comfy.model_management as management

    from tlora_core.training.trainer import Reading, Trainer

    stand_ins = [
        (management, "load_models_gpu", _load),
        (
            management,
            "get_free_memory",
            lambda device=None, torch_free_too=False: (1 << 40, 1 << 40) if torch_free_too else 1 << 40,
        ),
        (Trainer, "_keep_as_good", lambda trainer: None),
        (Reading, "value", lambda reading: 0.1),
        (
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, k, v, *args, **kwargs: _Attention.apply(q, k, v),
        ),
    ]
    with _replaced(stand_ins):
        yield


def _load(models, memory_required=0, force_full_load=False):
    """As the host's, with room for _BUDGET bytes of weights."""
    if not force_full_load:
        models[0].partially_load(META, _BUDGET)


def _prodigy_reads():
    """For an optimizer's step alone: Prodigy reads sums, and asks whether a parameter is all zero, of which it would
    keep no copy; it is taken not to be. Nothing else of a step may read a number."""
    return _replaced([(torch.Tensor, "any", lambda tensor: True), (torch.Tensor, "item", lambda tensor: 1.0)])


@contextmanager
def _replaced(stand_ins):
    before = [(place, name, getattr(place, name)) for place, name, _ in stand_ins]
    try:
        for place, name, stand_in in stand_ins:
            setattr(place, name, stand_in)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def move(model):
    """All of a MODEL to META, but for its table of noise levels, which has to be read beforehand."""
    levels, model.model.model_sampling = model.model.model_sampling, torch.nn.Identity()
    model.model.to(META)
    model.model.model_sampling, model.model.device, model.load_device = levels, META, META


def to_ram(model):
    """All weights of a MODEL on META to RAM, which is taken only as it is written to, and nothing writes to it."""
    for module in model.model.diffusion_model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fresh = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                module._parameters[name] = torch.nn.Parameter(fresh, requires_grad=False)
    model.offload_device = torch.device("cpu")


def stream_buffers(model):
    """Bytes of the buffers through which the host streams: each as large as the largest weight that it streams, which
    are all in RAM that are not packed."""
    weights = model.model.diffusion_model.parameters()
    in_ram = [w.nbytes for w in weights if w.device.type == "cpu" and w.dtype != torch.uint8]
    return STREAMS * max(in_ram, default=0)


def adapters_on_meta(model, method, rank):
    from tlora_core.hosts.comfy.model.families import target_layers
    from tlora_core.method.adapters import Adapters
    from tlora_core.method.bank import Bank

    of_shapes = {}
    for name, layer in target_layers(model).items():
        of_shapes.setdefault(layer.shape, []).append(name)
    made = {}
    for (rows, columns), names in of_shapes.items():
        B, S, A = (torch.empty(len(names), *shape, device=META) for shape in ((rows, rank), (1, rank), (rank, columns)))
        bank = Bank(B, S if method == "tlora" else None, A)
        made |= {name: bank[i] for i, name in enumerate(names)}
    return Adapters(made)


def step(model, tokens, size, rank, memory):
    """A second step on MODEL with all ranks on, in bytes: its peak; what lives after it; and of that what belongs to
    the run (own): weights, adapters, starts, gradients, the optimizer that the model's training has by default. Then
    the kernels. memory: "fast", "low" or "lowest", as the Train node's."""
    import random_models

    from tlora_core import RankSchedule
    from tlora_core.hosts.comfy.model.defaults import defaults_for
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.hosts.comfy.training.encode import Sample
    from tlora_core.hosts.comfy.training.session import training_session
    from tlora_core.training.config import TrainConfig
    from tlora_core.training.trainer import Trainer

    move(model)
    if memory == "lowest":
        to_ram(model)
    base = model.model
    usual = defaults_for(model)
    adapters = adapters_on_meta(model, usual.method, rank)
    trainer = Trainer(adapters, TrainConfig(steps=9, optimizer=usual.optimizer))
    trainer.step = 1  # the first loss of all is read
    tensors = [*trainer.parameters, *adapters.buffers()]
    sample = Sample(
        random_models.latent(model, size)[0],
        None,
        None,
        random_models.conditioning(model, tokens),
    )
    update, kernels = trainer._update, []

    def counted_update():
        kernels.append(counter.kernels)
        with _prodigy_reads():
            update()

    trainer._update = counted_update
    with training_session(model, memory != "fast", 0 if memory == "lowest" else None), Counter(tensors) as counter:
        weights = [*base.diffusion_model.parameters(), *base.diffusion_model.buffers()]
        weights = [weight for weight in weights if weight.is_meta]
        counter.note(weights)
        buffers = stream_buffers(model)
        denoiser = HostDenoiser(model, adapters, RankSchedule(rank, rank), [sample], trainer.config)
        base.model_sampling.to(META)
        trainer.run(denoiser, 2)
        counter.peak, counter.kernels = counter.live, 0
        trainer.run(denoiser, 3)
        del denoiser  # ends with the session, and with it what layers keep of the text
    state = [
        v
        for values in trainer.optimizer.state.values()
        for v in values.values()
        if isinstance(v, torch.Tensor) and v.is_meta
    ]
    own = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in (*weights, *tensors, *state, *(p.grad for p in trainer.parameters))
    }
    return {
        "peak": counter.peak + buffers,
        "after": counter.live,
        "own": sum(own.values()),
        "kernels": kernels[-1],
        "weights": sum(w.untyped_storage().nbytes() for w in weights),
    }


def measure(args):
    import random_models

    from tlora_core.hosts.comfy.training.session import blocks

    rows, make = [], getattr(random_models, args.model.replace("-", "_"))
    for weights in args.weights:
        for memory in args.memory:
            dtype = torch.float16 if weights == "fp16" else torch.bfloat16
            model = make(dtype=dtype, storage=STORAGES[weights], device=META)
            if weights == "q8_0":
                pack(blocks(model.model.diffusion_model))
            size = args.pixels // model.model.latent_format.spacial_downscale_ratio
            counted = step(model, MODELS[args.model], size, args.rank, memory)
            rows.append(
                {
                    "weights": weights,
                    "memory": memory,
                    **{f"{name}_mb": round(counted[name] / 2**20) for name in ("weights", "own", "after", "peak")},
                    "kernels": counted["kernels"],
                }
            )
    return rows


def fastest(rows, card):
    """The fastest setting of `memory` whose peak fits on a card of so many GiB; None if none does."""
    return next((row["memory"] for row in rows if 1.1 * row["peak_mb"] + 512 <= 1024 * card), None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument(
        "--weights", choices=STORAGES, nargs="+", default=["bf16", "fp8"], help="what they are stored in"
    )
    parser.add_argument("--memory", choices=("fast", "low", "lowest"), nargs="+", default=["fast", "low", "lowest"])
    parser.add_argument("--pixels", type=int, default=1024, help="the side of the picture")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--cards", type=float, nargs="*", default=[], help="sizes of cards in GiB")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    sys.argv = sys.argv[:1] + ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    with host_on_meta():
        rows = measure(args)
    for weights in args.weights if args.cards else ():
        of_weights = [row for row in rows if row["weights"] == weights]
        rows.append(
            {"weights": weights, **{f"{card:g}_gib": fastest(of_weights, card) or "none" for card in args.cards}}
        )
    show(rows, args.json, model=args.model, pixels=args.pixels, rank=args.rank)


if __name__ == "__main__":
    main()
