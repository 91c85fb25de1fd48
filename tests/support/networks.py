"""Small networks of each architecture that an encoder may have, as transformers saves them."""

import json
from pathlib import Path

import torch

TINY = {
    "beit": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 8},
    "convnext": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
    "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "dinov2_with_registers": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "dinov3_convnext": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
    "dinov3_vit": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "focalnet": {"embed_dim": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    "pvt_v2": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "swin": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
    "swinv2": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
    "vit": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
NORMALISATION = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def save_network(folder: Path, kind: str = "dinov2", *, dtype: torch.dtype = torch.float32, **fields) -> Path:
    """A whole network as transformers saves it, with weights that are all different, and a preprocessor."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(3)
    network = AutoModel.from_config(AutoConfig.for_model(kind, **(TINY[kind] | fields)))
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.1 + 0.01)
    network.to(dtype).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(NORMALISATION))
    return folder


def change_json(path: Path, **fields) -> None:
    """Set fields of a JSON object on disk; None removes one."""
    found = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
