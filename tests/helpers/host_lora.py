"""Plain LoRAs as the host's own Load LoRA applies them. Import inside tests that use `comfy`."""

import torch


def by_the_host(model, path):
    """The model with the file as the host's Load LoRA patches it."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0)[0]


def host_updates(patched) -> dict[str, torch.Tensor]:
    """What the patches of `by_the_host` add to the weights, by module path."""
    import comfy.lora
    import comfy.utils

    weights = {key: comfy.utils.get_attr(patched.model, key) for key in patched.patches}
    return {
        key.removeprefix("diffusion_model.").removesuffix(".weight"): comfy.lora.calculate_weight(
            patched.patches[key], torch.zeros_like(weight), key
        )
        for key, weight in weights.items()
    }


def our_updates(model, tlora) -> dict[str, torch.Tensor]:
    """What a T-LoRA of full rank adds to the weights, by module path."""
    found = {}
    for name, layer in tlora.layers.items():
        module = model.model.diffusion_model.get_submodule(name.path)
        whole = found.setdefault(name.path, torch.zeros(module.out_features, module.in_features))
        whole[name.row : name.row + len(layer.up)] += (layer.up.double() @ layer.down.double()).float()
    return found
