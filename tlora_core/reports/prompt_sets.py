"""The evaluation prompts of the T-LoRA paper (its appendix D), with {} for the subject: 25 contextual and 6 complex
prompts in each set.

Spelt as in the paper, since figures are only comparable on the same texts.
"""

NEUTRAL = "a photo of {}"  # the paper measures image similarity on this prompt

LIVE = (
    "a chocolate-colored {}",
    "a red {}",
    "a purple {}",
    "a brightly lit {}",
    "a snowy {}",
    "a {} in a purple wizard outfit",
    "a {} in a doctor outfit",
    "a {} in a superhero suit",
    "a {} dressed as a ballerina",
    "a {} wearing a green bow tie",
    "a {} with the Eiffel Tower in the background",
    "a {} with a mountain in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} on top of green grass with sunflowers around it",
    "a {} with a sunset and palm trees in the background",
    "a {} with the Sydney Opera House in the background",
    "a {} lying in the bed",
    "a {} sitting on the chair",
    "a {} swimming",
    "a {} sleeping",
    "a {} skateboarding",
    "a {} riding a surfboard",
    "a {} jumping with a parachute",
    "a {} running on a treadmill",
    "a {} riding a bike",
    "a {} in a chief outfit in a nostalgic kitchen filled with vintage furniture and scattered biscuit",
    "a {} dressed in a superhero cape, soaring through the skies above a bustling city during a sunset",
    "a {} dressed wearing a tuxedo performing on a stage in the spotlight",
    "a {} in a wizard's robe in a magical forest at midnight, accented with purples and sparkling silver tones",
    "a {} wearing a space helmet, among stars in a cosmic landscape during a starry night",
    "a {} wearing a pirate hat exploring a sandy beach at the sunset with a boat floating in the background",
)

OBJECT = (
    "a chocolate-colored {}",
    "a {} made of gold",
    "a brightly lit {}",
    "a red {}",
    "a purple {}",
    "a {} on top of a red and white checkered picnic blanket",
    "a {} with the Eiffel Tower in the background",
    "a {} with a mountain in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} on top of green grass with sunflowers around it",
    "a {} with a sunset and palm trees in the background",
    "a {} with the Sydney Opera House in the background",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
    "a {} with a wheat field in the background",
    "a {} in the bed",
    "a {} on the chair",
    "a {} on top of a snowy mountain peak",
    "a {} with a sand castle in the background",
    "a {} in a cave",
    "a {} on a windowsill in Tokyo at dusk, illuminated by neon city lights, using neon color palette",
    "a {} on a sofa in a cozy living room, rendered in warm tones",
    "a {} on a wooden table in a sunny backyard, surrounded by flowers and butterflies",
    "a {} floating in a bathtub filled with bubbles and illuminated by the warm glow of evening sunlight filtering "
    "through a nearby window",
    "a {} floating among stars in a cosmic landscape during a starry night with a spacecraft in the background",
    "a {} on a sandy beach next to the sand castle at the sunset with a floating boat in the background",
)

SETS = {"live": (NEUTRAL, *LIVE), "object": (NEUTRAL, *OBJECT)}
