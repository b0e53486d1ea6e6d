"""Train T-LoRA from Image."""

from comfy_api.latest import io

from ..tlora_core.hosts.comfy.files import told_of
from ..tlora_core.hosts.comfy.page.rank import show_active_rank
from ..tlora_core.hosts.comfy.page.training import shown_when_it_fails
from ..tlora_core.hosts.comfy.sampling import apply_tlora
from ..tlora_core.hosts.comfy.training.before_run import wrong_training
from ..tlora_core.hosts.comfy.training.by_name import trained
from ..tlora_core.hosts.comfy.training.keeping import LAST, NO_SCORER, RERUNS
from ..tlora_core.hosts.comfy.training.run import stopped_runs
from ..tlora_core.reports.plot import loss_curve
from ..tlora_core.training.dataset import training_list
from ..tlora_core.training.images import to_tensor
from .sockets import CATEGORY, SEARCH, TLORA, unlisted
from .train_inputs import train_inputs


class TrainTLoRAFromImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRATrainFromImage",
            display_name="Train T-LoRA from Image",
            category=CATEGORY,
            is_input_list=True,  # a list of pictures makes one training, not one per picture
            is_output_node=True,  # it saves a file, so a graph may end here
            search_aliases=[*SEARCH, "lora training", "dreambooth", "personalize", "finetune"],
            description="Teaches the model a new object, pet or character from a single image (or a few), without "
            "copying the image's pose and background.",
            inputs=train_inputs(),
            outputs=[
                TLORA.Output(display_name="T-LoRA", tooltip="For Apply, Save, Export, Bake, Info, Sweep and Prompts."),
                io.Model.Output(tooltip="The model with the T-LoRA, ready for a sampler."),
                io.String.Output(display_name="file", tooltip="The file's name in Load T-LoRA's list."),
                io.Image.Output(display_name="loss", tooltip="The loss curve."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, rerun=RERUNS[:1], **others):
        """Makes the host run an unchanged graph again when rerun is "continue" and a training was stopped since."""
        return stopped_runs() if "continue" in rerun else 0

    @classmethod
    def validate_inputs(
        cls,
        token=None,
        class_word=None,
        method=None,
        rank=None,
        min_rank=None,
        file_name=None,
        curve="",
        validation_prompts="",
        validate_every=0,
        clip_vision=False,
        scorer=NO_SCORER,
        keep=LAST,
        patience=1,
        score_seeds=1,
    ):
        return (
            wrong_training(
                {
                    "token": token,
                    "class_word": class_word,
                    "method": method,
                    "rank": rank,
                    "min_rank": min_rank,
                    "file_name": file_name,
                    "curve": curve,
                    "validation_prompts": validation_prompts,
                    "validate_every": validate_every,
                    "scorer": scorer,
                    "keep": keep,
                    "patience": patience,
                    "score_seeds": score_seeds,
                },
                clip_vision is not False,  # a socket: if connected, its value is not known yet
            )
            or True
        )

    @classmethod
    @shown_when_it_fails
    def execute(cls, image, captions=("",), mask=(), **lists):
        return _trained(cls.hidden.unique_id, training_list(image, captions, mask), **unlisted(lists))


def _trained(node_id, images, *, model, **inputs):
    done = trained(images, model=model, node_id=node_id, **inputs)
    return io.NodeOutput(
        done.tlora,
        show_active_rank(apply_tlora(model, done.tlora), done.tlora.schedule, node_id),
        done.file,
        to_tensor(loss_curve(done.losses)),
        ui=told_of([done.file], done.file),
    )
