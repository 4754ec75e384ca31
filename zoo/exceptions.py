"""What the small sizes would break: by type of model, the keys that need another value.

A mapping where the value is a configuration of its own changes keys of that. One key is not of
the configuration: `_start` has keys without which the class makes no default configuration.
"""

from typing import Any

from zoo.stages import STAGES
from zoo.towers import TOWERS

_MAMBA_TWO = {"mamba_n_heads": 6, "mamba_d_head": 16}
# Grouped attention is not offered by these; each head has its own keys and values.
_SAME_HEADS = {"num_key_value_heads": 6}

_BYTES = {"hidden_size_global": 48, "num_key_value_heads": 6}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA_TWO | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 97, "encoder_hash_byte_group_size": [3, 4],
        "cross_attn_k": 2, "use_cache": False, "local_attention_window_len": 5,
    },
    "blt_local_encoder": _BYTES,
    "blt_local_decoder": _BYTES,
    "codegen": {"n_embd": 64, "n_head": 8},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
            },
        },
    },
    "deepseek_v4": {"o_lora_rank": 10, "o_groups": 2, "compress_rates": {
        "compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": _SAME_HEADS | {
        "swa_num_attention_heads": 6, "swa_num_key_value_heads": 6, "swa_q_lora_rank": 20,
        "swa_kv_lora_rank": 12, "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
        "swa_qk_rope_head_dim": 4,
    },
    "encoder-decoder": {
        "pad_token_id": 0, "decoder": {"is_decoder": True, "add_cross_attention": True},
    },
    "esm": {"pad_token_id": 0},
    "esmc": _SAME_HEADS,
    "falcon_h1": {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_ssm": 96},
    "flint": {"mlp_only_layers": [0]},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "_start": {
            "text_config": {
                "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
                "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
            }
        }
    },
    "granitemoehybrid": _MAMBA_TWO | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"block_multiple_of": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "led": {"attention_window": 4},
    "longformer": {"attention_window": 4},
    "luke": {"entity_vocab_size": 60, "entity_emb_size": 12},
    "mamba2": {"num_heads": 6, "head_dim": 16, "n_groups": 2},
    "mimo_v2_flash": {"num_key_value_heads": 3, "head_dim": 12},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mobilebert": {"true_hidden_size": 24, "intra_bottleneck_size": 24},
    "neomme": {"head_dim": 16},
    "nemotron_h": {"n_groups": 2},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "perceiver": {
        "num_latents": 10, "d_latents": 48, "num_self_attends_per_block": 2,
        "num_self_attention_heads": 6, "num_cross_attention_heads": 1,
        "max_position_embeddings": 11, "train_size": [16, 16],
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"], "ple_layer_ids": [1],
        "ple_embed_dim": 24, "heads_per_ngram": 2, "ngram_vocab_size_base": 97,
        "make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 1, "hc_lowrank": 10,
        "hc_count": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "eos_token_id": 2, "indexer_budget": 4, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": [3, 4],
        "axial_pos_embds_dim": [20, 28], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
        "num_buckets": 2, "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 50, "shape_vocab_size": 60, "pronunciation_embed_dim": 12,
        "shape_embed_dim": 20,
    },
    "rwkv": {"attention_hidden_size": 48},
    "shieldgemma2": {"yes_token_index": 40, "no_token_index": 41, "mm_tokens_per_image": 4},
    "squeezebert": {"embedding_size": 48},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {
        "num_heads": 6, "ffn_round_up_to_multiple_of": 4, "num_blocks": 2, "use_cache": False,
    },
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4,
        "n_mamba_heads": 6, "mamba_ngroups": 2, "use_shared_attention_adapter": True,
        "adapter_rank": 6, "num_key_value_heads": 6,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 12},
}  # fmt: skip

EXCEPTIONS |= STAGES | TOWERS

# By name of class, where one type of model has classes that need different things.
BY_NAME: dict[str, dict[str, Any]] = {
    "PerceiverForImageClassificationFourier": {"image_size": 224},
    "PerceiverForImageClassificationConvProcessing": {"image_size": 224},
}

# By list. Keys that a configuration does not have are left out.
BY_LIST: dict[str, dict[str, Any]] = {
    "causal": {"is_decoder": True},
    "seq2seq": {"decoder_start_token_id": 0},
    "image": {"num_labels": 7},
}
