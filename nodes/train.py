"""Train T-LoRA from Image."""
import torch
from comfy_api.latest import io

from ..tlora_core.adapters import METHODS
from PIL import Image

from ..tlora_core.comfy_host.live import LiveRun
from ..tlora_core.comfy_host.files import name_of, new_lora_path
from ..tlora_core.comfy_host.personalize import TrainRequest, train_from_images
from ..tlora_core.comfy_host.progress import Progress
from ..tlora_core.comfy_host.sampling import apply_tlora
from ..tlora_core.errors import TLoRAError
from ..tlora_core.images import to_tensor
from ..tlora_core.orthogonal import STARTS
from ..tlora_core.plot import loss_curve
from ..tlora_core.trainer import TrainConfig, TrainingDiverged
from .sockets import CATEGORY, TLORA, alpha_input, file_name_input, rank_inputs


class TrainTLoRAFromImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRATrainFromImage", display_name="Train T-LoRA from Image", category=CATEGORY,
            search_aliases=["lora training", "dreambooth", "personalize", "finetune"],
            description="Teaches the model a new object, pet or character from a single image (or a few), without copying "
                        "that image's pose and background.",
            inputs=[
                io.Model.Input("model", tooltip="The model to train for. It is trained in place, without a second copy, and "
                                                "its own weights stay as they are."),
                io.Clip.Input("clip", tooltip="The model's text encoder; it is not trained."),
                io.Vae.Input("vae", tooltip="The model's VAE; it is not trained."),
                io.Image.Input("image", tooltip="One picture of the subject, or a batch of several. The centre square is used."),
                io.String.Input("token", default="sks", tooltip="A rare word that will stand for the subject in your prompts."),
                io.String.Input("class_word", default="dog", tooltip='What kind of thing it is. Prompt later with both: "sks dog".'),
                io.Combo.Input("method", options=list(METHODS), default="tlora",
                               tooltip="tlora: the paper's. vanilla_tlora: plain start with the mask. ortho_lora: orthogonal start "
                                       "without the mask. lora: neither."),
                *rank_inputs(),
                io.Int.Input("steps", default=800, min=1, max=100000,
                             tooltip="Training steps. The paper uses 800 for tlora and ortho_lora, 500 for the others; too many copy the image."),
                io.Float.Input("learning_rate", default=1e-4, min=1e-7, max=1.0, step=1e-6, round=False,
                               tooltip="Size of the steps. Higher learns faster and breaks sooner."),
                io.Int.Input("resolution", default=1024, min=64, max=4096, step=8,
                             tooltip="Side of the square training picture in pixels; the model's own is best. Lower needs less memory."),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=False,
                             tooltip="The same seed trains the same T-LoRA; another one another."),
                file_name_input(),
                alpha_input(),
                io.Combo.Input("start", options=list(STARTS), default="last_random", advanced=True,
                               tooltip="Where the orthogonal factors come from: the last, middle or principal singular vectors of a random "
                                       "matrix or of the layer's weight. last_random is the paper's."),
                io.Int.Input("batch_size", default=1, min=1, max=64, advanced=True,
                             tooltip="Samples a step, each with its own noise level. More is steadier, slower and needs more memory."),
            ],
            outputs=[
                TLORA.Output(display_name="T-LoRA", tooltip="For Apply and Save."),
                io.Model.Output(tooltip="The model with the T-LoRA, ready for a sampler."),
                io.String.Output(display_name="file", tooltip="The name in Load T-LoRA's list."),
                io.Image.Output(display_name="loss", tooltip="The loss curve."),
            ],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, model, clip, vae, image, token, class_word, method, rank, min_rank, steps, learning_rate, resolution,
                seed, file_name, alpha, start, batch_size):
        request = TrainRequest(
            token, class_word, method, rank, min_rank, alpha, start, resolution,
            TrainConfig(steps=steps, learning_rate=learning_rate, batch_size=batch_size, seed=seed))
        path = new_lora_path(file_name)
        losses = []
        progress = Progress(steps, cls.hidden.unique_id, lambda: loss_curve(losses))

        live = LiveRun.begin(cls.hidden.unique_id, steps, title=request.prompt)

        class Stop(TrainingDiverged):
            pass

        def on_step(step, loss):
            losses.append(loss)
            live.report(step, loss)
            progress.update(step, f"loss {loss:.4f}")
            if live.take_checkpoint_request():
                live.note(f"Checkpoint of step {step} asked for.")
            if step % max(steps // 8, 1) == 0:
                picture = (image[0].detach().cpu().numpy() * 255).astype("uint8")
                live.validation(step, Image.fromarray(picture).resize((128, 128)), [f"a photo of {token} {class_word}"])
            if live.stop_requested:
                raise Stop(step, step)

        try:
            trained = train_from_images(model, clip, vae, image, request, on_step)
        except BaseException as error:
            live.finish("cancelled" if "Interrupt" in type(error).__name__ else "failed", str(error))
            raise
        trained.tlora.save(path, torch.float16)
        if isinstance(trained.stopped, Stop):
            live.finish("stopped", file=name_of(path))
        elif trained.stopped is not None:
            live.finish("failed", str(trained.stopped), name_of(path))
        else:
            live.finish("done", file=name_of(path))
        if trained.stopped is not None and not isinstance(trained.stopped, Stop):
            raise TLoRAError(f"{trained.stopped} It is saved as {name_of(path)}.")
        return io.NodeOutput(
            trained.tlora, apply_tlora(model, trained.tlora), name_of(path), to_tensor(loss_curve(losses)),
            ui={"tlora_files": [str(path)], "text": [name_of(path)]})
