"""Settings for every test; they must be made before torch and huggingface_hub are imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # tests make their models, or read them from packages
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Tiny shapes: threads cost more than they bring, and two pools that spin on the same cores
# slow each other many times over.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
