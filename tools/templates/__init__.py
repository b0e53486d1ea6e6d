"""The contents of the pack's templates, which `make_workflows.py` writes."""

from .families import (
    draw_with_krea2_turbo,
    draw_with_sdxl_lightning,
    draw_with_z_image_turbo,
    train_klein_on_one_image,
    train_krea2_on_one_image,
    train_qwen_image_on_one_image,
    train_z_image_on_one_image,
)
from .full_size import (
    generate_with_a_file,
    train_flux_on_one_image,
    train_sdxl_on_one_image,
    train_sdxl_on_several_images,
    use_a_file_from_elsewhere,
    which_checkpoint_to_keep,
)
from .prepared import train_on_one_prepared_image, train_on_variations_of_one_image
from .tiny import (
    compare_lora_with_tlora,
    min_rank_sweep,
    quickstart,
    several_images_with_masks,
    stop_and_go_on,
    xy_sheet,
)

# Keys: file names, which the template browser shows. It lists the templates in this order.
TEMPLATES = {
    "01 Quickstart": quickstart,
    "02 SDXL, train on one picture": train_sdxl_on_one_image,
    "03 FLUX, train on one picture": train_flux_on_one_image,
    "04 SDXL, train on several pictures with masks": train_sdxl_on_several_images,
    "05 Generate with a T-LoRA file": generate_with_a_file,
    "06 Use a LoRA or T-LoRA from elsewhere": use_a_file_from_elsewhere,
    "07 LoRA against T-LoRA": compare_lora_with_tlora,
    "08 How low should min_rank be": min_rank_sweep,
    "09 XY sheet of strength and min_rank": xy_sheet,
    "10 Which checkpoint to keep": which_checkpoint_to_keep,
    "11 Stop a training and go on": stop_and_go_on,
    "12 Several pictures with masks, no download": several_images_with_masks,
    "13 FLUX.2 Klein, train on one picture": train_klein_on_one_image,
    "14 Z-Image, train on one picture": train_z_image_on_one_image,
    "15 Qwen-Image, train on one picture": train_qwen_image_on_one_image,
    "16 Krea 2, train on one picture": train_krea2_on_one_image,
    "17 Z-Image, draw with Turbo": draw_with_z_image_turbo,
    "18 Krea 2, draw with Turbo": draw_with_krea2_turbo,
    "19 SDXL, draw with Lightning": draw_with_sdxl_lightning,
    "20 SDXL, one picture prepared by models": train_on_one_prepared_image,
    "21 FLUX.2 Klein, one picture and variations": train_on_variations_of_one_image,
}
