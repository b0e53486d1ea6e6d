"""Files as other programs write them, made from their formats' descriptions: small, and for a few layers."""

import torch
from safetensors.torch import save_file

from tlora_core.files.foreign import ModelDescription, load_any
from tlora_core.files.layer_names import plain_name

QKVO = ("q", "k", "v", "out")
SDXL_ATTENTION = {  # diffusers' attention module -> ComfyUI's, and the width that keys and values read
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1": ("input_blocks.4.1.transformer_blocks.0.attn1", 12),
    "down_blocks.2.attentions.1.transformer_blocks.9.attn2": ("input_blocks.8.1.transformer_blocks.9.attn2", 20),
    "mid_block.attentions.0.transformer_blocks.3.attn2": ("middle_block.1.transformer_blocks.3.attn2", 20),
    "up_blocks.1.attentions.2.transformer_blocks.1.attn1": ("output_blocks.5.1.transformer_blocks.1.attn1", 12),
}
WIDTH, RANK = 12, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unet_layers():
    """(diffusers' name of the projection, ComfyUI's, out_features, in_features)."""
    for module, (path, text) in SDXL_ATTENTION.items():
        for x in QKVO:
            projection = "to_out.0" if x == "out" else f"to_{x}"
            yield f"{module}.{projection}", f"{path}.{projection}", WIDTH, text if x in "kv" else WIDTH


def orthogonal_parts(out_features, in_features, rank=RANK, moved=0.1, g=None):
    """(B, S, A), (B0, S0, A0) as after some training, in float64: the second orthogonal, the first a bit off it."""
    g = g or generator()
    B0 = torch.linalg.qr(torch.randn(out_features, rank, generator=g).double())[0]
    A0 = torch.linalg.qr(torch.randn(in_features, rank, generator=g).double())[0].T
    S0 = torch.rand(rank, generator=g).double().sort(descending=True)[0] + 0.5
    base = (B0, S0, A0)
    trained = tuple(part + moved * torch.randn(part.shape, generator=g).double() for part in base)
    return trained, base


def masked(parts, r):
    """B S M A with the first r components on."""
    B, S, A = (part.double() for part in parts)
    return (B[:, :r] * S[:r]) @ A[:r]


def reference_key(diffusers_name: str, flux: bool = False) -> str:
    module, _, projection = diffusers_name.replace("to_out.0", "to_out").rpartition(".")
    names = {"add_q_proj": "to_q_proj", "add_k_proj": "to_k_proj", "add_v_proj": "to_v_proj"}
    return f"{'' if flux else 'unet.'}{module}.processor.{names.get(projection, projection)}_lora."


def reference_orthogonal():
    """(state dict of the reference's SDXL T-LoRA or Ortho-LoRA, {ComfyUI's name: (trained, base)})."""
    state, layers, g = {}, {}, generator()
    for name, path, out_features, in_features in unet_layers():
        trained, base = layers[path] = orthogonal_parts(out_features, in_features, g=g)
        key = reference_key(name)
        for (B, S, A), (q, p, s) in (
            (trained, ("q_layer.weight", "p_layer.weight", "lambda_layer")),
            (base, ("base_q.weight", "base_p.weight", "base_lambda")),
        ):
            state |= {key + q: A.float(), key + p: B.float(), key + s: S.float()[None]}
    return {key: tensor.contiguous() for key, tensor in state.items()}, layers


def pairs(layers, rank=RANK):
    """{name: (up, down)} with random values; layers: (name, out_features, in_features)."""
    g = generator(1)
    return {name: (torch.randn(o, rank, generator=g), torch.randn(rank, i, generator=g)) for name, o, i in layers}


def reference_plain():
    """(state dict of the reference's SDXL Vanilla T-LoRA or LoRA, {ComfyUI's name: (up, down)})."""
    layers = pairs((path, o, i) for _, path, o, i in unet_layers())
    state = {}
    for name, path, _, _ in unet_layers():
        state[reference_key(name) + "up.weight"], state[reference_key(name) + "down.weight"] = layers[path]
    return state, layers


HPARAMS = """adam_beta1: 0.9
alpha_rank_scale: {alpha}
class_name: dog
lora_rank: {rank}
min_rank: {min_rank}
one_image: 02.jpg
placeholder_token: sks
trainer_class: {trainer_class}
trainer_type: {trainer_type}
train_data_dir: /home/someone/dog
"""


FLUX_HPARAMS = """class_name: dog
min_rank: {min_rank}
placeholder_token: sks
rank: {rank}
resolution: 1024
tlora: {tlora}
"""


def reference_flux_run(folder, state, tlora="true", rank=RANK, min_rank=1):
    """The same of its FLUX trainer."""
    path = reference_run(folder, lambda p: torch.save(state, p), name="lora.pt")
    (path.parents[1] / "logs" / "hparams.yml").write_text(
        FLUX_HPARAMS.format(tlora=tlora, rank=rank, min_rank=min_rank)
    )
    return path


def reference_run(
    folder,
    write,
    trainer_class="sdxl_tlora",
    trainer_type="ortho_lora",
    alpha=1,
    rank=RANK,
    min_rank=1,
    name="pytorch_lora_weights.safetensors",
):
    """The folders of a run of the reference's trainer; write(path) makes the weights, whose path is returned."""
    step = folder / "0000-dog" / "checkpoint-800"
    (step.parent / "logs").mkdir(parents=True)
    step.mkdir()
    hparams = HPARAMS.format(
        alpha=alpha, rank=rank, min_rank=min_rank, trainer_class=trainer_class, trainer_type=trainer_type
    )
    (step.parent / "logs" / "hparams.yml").write_text(hparams)
    write(step / name)
    return step / name


FLUX_LAYERS = {  # diffusers' name -> (ComfyUI's, out_features, in_features)
    "transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv@0", 6, 6),
    "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv@6", 6, 6),
    "transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv@12", 6, 6),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", 6, 6),
    "transformer_blocks.0.attn.add_q_proj": ("double_blocks.0.txt_attn.qkv@0", 6, 6),
    "transformer_blocks.0.attn.add_k_proj": ("double_blocks.0.txt_attn.qkv@6", 6, 6),
    "transformer_blocks.0.attn.add_v_proj": ("double_blocks.0.txt_attn.qkv@12", 6, 6),
    "single_transformer_blocks.3.attn.to_q": ("single_blocks.3.linear1@0", 6, 6),
    "single_transformer_blocks.3.attn.to_k": ("single_blocks.3.linear1@6", 6, 6),
    "single_transformer_blocks.3.attn.to_v": ("single_blocks.3.linear1@12", 6, 6),
}


def reference_flux():
    """(state dict of the reference's FLUX lora.pt, {ComfyUI's name: (up, down)})."""
    layers = pairs(FLUX_LAYERS.values())
    state = {}
    for name, (path, _, _) in FLUX_LAYERS.items():
        key = reference_key(name, flux=True)
        state[key + "up.weight"], state[key + "down.weight"] = layers[path]
    return state, layers


def unused_of_single_blocks(flux_state):
    """What the reference's FLUX file holds beside `flux_state`: adapters of single blocks as they began, which
    its code never uses."""
    g, unused = generator(2), {}
    for key, tensor in flux_state.items():
        if key.startswith("single_transformer_blocks.") and ".to_q_lora." in key:
            for name in ("to_out", "to_q_proj", "to_k_proj", "to_v_proj"):
                drawn = torch.randn(tensor.shape, generator=g)
                unused[key.replace("to_q", name)] = drawn if key.endswith("down.weight") else torch.zeros_like(tensor)
    return unused


# Comparing.


def update(layer, r):
    """The stored update with its first r components on, in float64."""
    columns = r * layer.group
    return layer.up[:, :columns].double() @ layer.down[:columns].double()


def assert_close(have, want, tolerance=1e-5):
    assert (have - want).norm() <= tolerance * want.norm()


def assert_same_updates(have, want, tolerance=1e-5):
    """At every rank."""
    assert have.layers.keys() == want.layers.keys()
    for name, layer in want.layers.items():
        for r in range(1, layer.rank + 1):
            assert_close(update(have.layers[name], r), update(layer, r), tolerance)


NAMINGS = {
    "kohya": ("lora_unet_{ldm_}", "lora_up.weight", "lora_down.weight"),
    "kohya with diffusers names": ("lora_unet_{diffusers_}", "lora_up.weight", "lora_down.weight"),
    "comfyui": ("diffusion_model.{ldm}", "lora_up.weight", "lora_down.weight"),
    "diffusers": ("unet.{diffusers}", "lora_B.weight", "lora_A.weight"),
    "diffusers, older": ("unet.{diffusers}", "lora.up.weight", "lora.down.weight"),
    "peft": ("base_model.model.{diffusers}", "lora_B.weight", "lora_A.weight"),
    "peft with an adapter's name": (
        "base_model.model.unet.{diffusers}",
        "lora_B.default.weight",
        "lora_A.default.weight",
    ),
}


def plain_state(naming, layers, alpha=None):
    pattern, up, down = NAMINGS[naming]
    state = {}
    for diffusers, ldm, _, _ in unet_layers():
        key = pattern.format(
            ldm=ldm, ldm_=ldm.replace(".", "_"), diffusers=diffusers, diffusers_=diffusers.replace(".", "_")
        )
        state[f"{key}.{up}"], state[f"{key}.{down}"] = layers[ldm]
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def plain_layers():
    return pairs((path, o, i) for _, path, o, i in unet_layers())


def target_with(weights):
    shapes = {path: tuple(weight.shape) for path, weight in weights.items()}
    names = {plain_name(path): path for path in weights}
    names |= {plain_name(name): path for name, path, _, _ in unet_layers() if path in weights}
    return ModelDescription(names, shapes, lambda name, rows: weights[name][:rows].float(), "sdxl", 1000, "discrete")


def load_of(name, tmp_path):
    """The T-LoRA of the reference's "orthogonal" or "plain" file."""
    state, _ = {"orthogonal": reference_orthogonal, "plain": reference_plain}[name]()
    path = tmp_path / f"{name}.safetensors"
    save_file(state, path)
    return load_any(path, min_rank=2, alpha=1.5).tlora
