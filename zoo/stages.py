"""Exceptions of models that see: most are of stages, which are two here, or three.

A network of stages has no single width, so its small sizes cannot be read from its keys.
"""

from typing import Any

_SWIN: dict[str, Any] = {
    "embed_dim": 24, "depths": [2, 1], "num_heads": [3, 6], "window_size": 4, "patch_size": 4,
}  # fmt: skip
_PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [24, 48],
    "num_attention_heads": [3, 6], "mlp_ratios": [3, 2], "strides": [4, 2],
}  # fmt: skip
_CONVNEXT: dict[str, Any] = {
    "num_stages": 2, "hidden_sizes": [12, 20], "depths": [2, 1], "patch_size": 4,
}  # fmt: skip
_RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 1]}

STAGES: dict[str, dict[str, Any]] = {
    "bit": _RESNET | {"num_groups": 4},
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "cvt": {"embed_dim": [12, 24, 48], "depth": [1, 2, 3], "num_heads": [1, 3, 6]},
    "donut-swin": _SWIN,
    "efficientnet": {
        "width_coefficient": 0.25, "depth_coefficient": 1.0, "in_channels": [32, 32, 64],
        "out_channels": [32, 64, 96], "kernel_sizes": [3, 3, 5], "strides": [1, 2, 2],
        "num_block_repeats": [1, 2, 1], "expand_ratios": [1, 3, 3], "hidden_dim": 320,
    },
    "focalnet": {
        "embed_dim": 24, "hidden_sizes": [24, 48], "depths": [2, 1], "focal_levels": [2, 2],
        "focal_windows": [3, 3], "patch_size": 4,
    },
    "hgnet_v2": {
        "embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2],
        "stem_channels": [3, 8, 12], "stage_in_channels": [12, 16], "stage_mid_channels": [8, 10],
        "stage_out_channels": [16, 24], "stage_num_blocks": [1, 2],
        "stage_downsample": [False, True],
        "stage_downsample_strides": [2, 2], "stage_light_block": [False, True],
        "stage_kernel_size": [3, 5], "stage_numb_of_layers": [2, 2],
    },
    "hiera": {
        "embed_dim": 24, "depths": [1, 2], "num_heads": [3, 6], "image_size": [32, 32],
        "num_query_pool": 1, "masked_unit_size": [2, 2], "masked_unit_attention": [True, False],
        "patch_size": [7, 7], "hidden_size": 48,
    },
    "levit": {
        "hidden_sizes": [24, 32, 48], "num_attention_heads": [3, 4, 6], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "image_size": 64, "patch_size": 16,
    },
    "mobilenet_v1": {"depth_multiplier": 0.1},
    "mobilenet_v2": {"depth_multiplier": 0.1},
    "mobilevit": {
        "hidden_sizes": [24, 36, 48], "neck_hidden_sizes": [4, 8, 12, 16, 20, 24, 40],
        "image_size": 64, "patch_size": 2,
    },
    "mobilevitv2": {
        "width_multiplier": 0.25, "base_attn_unit_dims": [64, 96, 128], "n_attn_blocks": [1, 1, 2],
        "image_size": 64, "patch_size": 2,
    },
    "poolformer": {
        "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [12, 20], "strides": [4, 2],
        "patch_sizes": [7, 3], "padding": [2, 1],
    },
    "pp_lcnet": {"scale": 0.25, "class_expand": 40},
    "pvt": _PYRAMID | {"patch_sizes": [4, 2], "sequence_reduction_ratios": [2, 1]},
    "pvt_v2": _PYRAMID | {"patch_sizes": [7, 3], "sr_ratios": [2, 1], "image_size": [32, 32]},
    "regnet": _RESNET | {"groups_width": 8},
    "resnet": _RESNET,
    "segformer": _PYRAMID | {"patch_sizes": [7, 3], "sr_ratios": [2, 1]},
    "siglip2_vision_model": {"num_patches": 16, "patch_size": 4, "vision_use_head": False},
    "swiftformer": {
        "depths": [2, 2], "embed_dims": [12, 24], "downsamples": [True, True],
    },
    "swin": _SWIN,
    "swinv2": _SWIN | {"pretrained_window_sizes": [0, 0]},
    "textnet": {
        "hidden_sizes": [8, 8, 12, 16, 20], "stem_out_channels": 8, "image_size": [32, 32],
    },
}  # fmt: skip
