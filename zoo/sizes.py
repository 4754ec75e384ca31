"""What a key of a configuration means, as its size in a small model.

Few of these sizes divide others: 6 heads, 2 key-value heads, 100 features, 251 tokens.
"""

from typing import Any

# Skipping whole layers at random would change which operations a step has.
OFF = {
    "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "speech_encoder_layerdrop",
    "mask_time_prob", "mask_feature_prob",
}  # fmt: skip

SIZES: dict[str, Any] = {
    # Widths.
    "hidden_size": 48, "d_model": 48, "n_embd": 48, "emb_dim": 48, "dim": 48, "embedding_dim": 48,
    "intermediate_size": 100, "ffn_dim": 100, "d_ff": 100, "dff": 100, "dim_ff": 100,
    "d_inner": 100, "hidden_dim": 100, "ffn_hidden_size": 100, "encoder_ffn_dim": 100,
    "decoder_ffn_dim": 100, "mlp_dim": 100, "feed_forward_size": 100, "n_inner": 100,
    "dense_intermediate_size": 100, "intermediate_size_mlp": 100,
    "prefix_dense_intermediate_size": 100, "embedding_size": 20, "input_embedding_size": 20,
    "word_embed_proj_dim": 48, "projection_dim": 24, "projection_size": 24, "output_dim": 48,
    "pooler_hidden_size": 48, "pooler_output_size": 48, "backbone_hidden_size": 48,
    "decoder_hidden_size": 48, "encoder_hidden_size": 48, "output_embedding_size": 28,
    # Heads.
    "num_attention_heads": 6, "n_head": 6, "n_heads": 6, "num_heads": 6, "attention_heads": 6,
    "encoder_attention_heads": 6, "decoder_attention_heads": 6, "conf_num_attention_heads": 6,
    "num_key_value_heads": 2, "num_kv_heads": 2, "kv_n_heads": 2,
    "swa_num_attention_heads": 6, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "head_dim": 8, "d_kv": 8, "d_head": 8, "dim_head": 8, "global_head_dim": 8, "rotary_dim": 4,
    "kv_channels": 8, "attention_head_size": 8,
    # Latent and indexed attention.
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    # Layers.
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "conf_num_hidden_layers": 2,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2,
    "moe_top_k": 2, "top_k_experts": 2, "moe_intermediate_size": 20,
    "expert_ffn_hidden_size": 20, "shared_expert_intermediate_size": 20,
    "shared_intermediate_size": 20, "moe_shared_expert_intermediate_size": 20,
    "shared_experts_intermediate_size": 20,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "zero_expert_num": 2, "expert_capacity": 64,
    "num_nextn_predict_layers": 0,
    # Recurrences.
    "state_size": 4, "mamba_d_state": 4, "time_step_rank": 3, "mamba_dt_rank": 3,
    "chunk_size": 4, "mamba_chunk_size": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 6, "lru_width": 48,
    "ssm_state_size": 4, "mamba_num_heads": 6, "mamba_head_dim": 16,
    # Words and places.
    "vocab_size": 251, "decoder_vocab_size": 251, "src_vocab_size": 251, "tgt_vocab_size": 251,
    "vocab_size_per_layer_input": 251, "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "context_length": 64, "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64, "max_source_positions": 20,
    "max_target_positions": 40, "max_2d_position_embeddings": 64, "model_max_length": 64,
    "sliding_window": 5, "sliding_window_size": 5, "attention_window_size": 5,
    "attention_chunk_size": 8, "local_attention": 4,
    # Pictures and sounds.
    "image_size": 32, "patch_size": 8, "num_mel_bins": 16, "num_codebooks": 2,
}  # fmt: skip

# Where the default has one: a model without a token for padding looks for none in its input.
TOKENS = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
    "sep_token_id": 2, "cls_token_id": 1, "mask_token_id": 3, "forced_eos_token_id": 2,
}  # fmt: skip

# With latent attention every head has keys of its own, of which this many features are rotated.
LATENT = {"num_key_value_heads": 6, "head_dim": 4}
