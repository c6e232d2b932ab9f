"""The two trainings behind the weights in the package, see weights.sh: long on small patches, then short on larger ones."""
from pathlib import Path

from tinycea import train

SHARED = {"suite": "everyday+cdd11+patchwork", "adapter": "cea:encoders=1+1,decoders=1+1,middle=1", "adapter_lr": 0.3,
          "images": "runs/photographs", "scenes": 64}

if __name__ == "__main__":
    for folder, recipe in (("runs/weights-1", {"steps": 44_000, "patch": 64, "batch": 6}),
                           ("runs/weights-2", {"steps": 11_000, "patch": 96, "batch": 3, "lr": 1.5e-3, "floor": 3e-4, "seed": 1,
                                               "start": "runs/weights-1/model.safetensors"})):
        if not Path(folder, "result.json").exists():
            train(folder, resume=Path(folder).exists(), **SHARED, **recipe)
