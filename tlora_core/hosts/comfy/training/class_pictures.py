"""Class pictures for prior preservation (Ruiz et al. 2023), which the model draws itself.

Drawing them takes minutes on a large model. They are saved, so that a resumed training, or another training of the same
class on the same model, can reuse them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy.utils import ProgressBar
from PIL import Image
from torch import Tensor

from ....errors import TLoRAError
from ....files.atomic import write_whole
from ....training.dataset import TrainingImage, caption_of
from ....training.images import to_picture, to_tensor
from ....training.run_folder import as_file_name
from ..draw import draw
from ..progress import say
from .fingerprint import fingerprint

PROMPT = "a photo of {class_word}"
DRAWN_SINCE = "0.2.0"  # the version since which equal settings give equal pictures


class ClassPictures:
    """folder: where to save the pictures; None: nowhere. node_id: the node that shows the progress."""

    def __init__(self, folder: Path | None = None, node_id: str | None = None):
        self.folder, self.node_id = folder, node_id

    def of(
        self, model: ModelPatcher, clip: CLIP, vae: VAE, class_word: str, resolution: int, seeds: Sequence[int]
    ) -> list[TrainingImage]:
        """One picture for each seed, [side, side, 3]; side is the resolution, unless the VAE decodes at another size
        than it encodes. Lets the host's interrupt through; pictures drawn by then stay saved."""
        folder = self._folder_for(
            class_word, DRAWN_SINCE, model, clip.patcher, clip.layer_idx, vae.patcher, PROMPT, class_word, resolution
        )
        paths = [folder and folder / f"{seed}.png" for seed in seeds]
        side = resolution // int(vae.spacial_compression_encode()) * int(vae.spacial_compression_decode())
        pictures = [path and _loaded(path, side) for path in paths]
        for i, seed in enumerate(seeds):
            if pictures[i] is None:
                self._tell(i, len(seeds))
                [[drawn]] = draw(model, clip, vae, [caption_of(PROMPT, "", class_word)], resolution, [seed])
                pictures[i] = _saved(drawn, paths[i])
        self._tell(len(seeds), len(seeds))
        return [TrainingImage(picture, PROMPT) for picture in pictures]

    def _folder_for(self, class_word: str, *drawn_by) -> Path | None:
        """The folder of these class pictures. None to save none, or if the model has no stable fingerprint."""
        if self.folder is None or (key := fingerprint(*drawn_by)) != fingerprint(*drawn_by):
            return None
        return self.folder / f"{as_file_name(class_word[:40], 'class')}-{key[:16]}"

    def _tell(self, done: int, total: int) -> None:
        say(
            f"drawing class picture {done + 1} of {total}" if done < total else f"{total} class pictures are ready",
            self.node_id,
        )
        # Raises the host's interrupt after a cancel.
        ProgressBar(total, node_id=self.node_id).update_absolute(done)


def _loaded(path: Path, side: int) -> Tensor | None:
    """The picture [side, side, 3] that `_saved` wrote; None if there is no intact file."""
    try:
        with Image.open(path) as picture:
            pixels = to_tensor(picture)[0]
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's errors for damaged files
        logging.warning("[T-LoRA] %s is damaged and drawn again: %s", path, error)
        return None
    return pixels if pixels.shape[:2] == (side, side) else None


def _saved(drawn: Tensor, path: Path | None) -> Tensor:
    """Saves the picture and returns it in the file's 8 bits, so that new and reused pictures train alike."""
    if not drawn.isfinite().all():
        return drawn  # the encoder refuses it
    picture = to_picture(drawn)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: picture.save(temporary, "PNG"))
        except (OSError, TLoRAError) as error:  # a full disk does not end the training
            logging.warning("[T-LoRA] A class picture was not saved: %s", error)
    return to_tensor(picture)[0]
