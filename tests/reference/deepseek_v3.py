"""DeepSeek-V3 as `transformers` computes it, given the weights of our model."""

from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from engram.config import ModelConfig
from engram.model.transformer import Transformer


def public_config(config: ModelConfig, **overrides: object) -> DeepseekV3Config:
    attention, moe = config.attention, config.moe
    assert config.memory is None and config.hyper_connection is None and config.over_encoding is None and moe
    assert moe.num_shared_experts and moe.shared_dim is None
    settings = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        intermediate_size=config.dense_width,
        moe_intermediate_size=moe.expert_dim,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_heads,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.num_shared_experts,
        num_experts_per_tok=moe.top_k,
        n_group=moe.num_groups,
        topk_group=moe.top_k_groups,
        first_k_dense_replace=moe.num_dense_layers,
        norm_topk_prob=True,
        routed_scaling_factor=moe.routed_scaling_factor,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        rope_interleave=True,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        rope_parameters=_rope_parameters(config),
    )
    return DeepseekV3Config(**{**settings, **overrides})


def _rope_parameters(config: ModelConfig) -> dict[str, object]:
    yarn = config.attention.yarn
    if yarn is None:
        return {"rope_type": "default", "rope_theta": config.attention.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": config.attention.rope_theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def public_model(model: Transformer) -> DeepseekV3ForCausalLM:
    """A `transformers` model with the same weights; every tensor of both models is used exactly once."""
    public = DeepseekV3ForCausalLM(public_config(model.config)).eval()
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("token_map", "router.load")):
            weights.update(_public_tensors(name, tensor))
    public.load_state_dict(weights, strict=True)
    return public


def _public_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    public = _public_name(name)
    if name.endswith("experts.gate_up"):
        return {public: tensor.flatten(1, 2)}
    if name.endswith("gate_up.weight"):
        return {public.replace("gate_up", "gate_proj"): tensor[0], public.replace("gate_up", "up_proj"): tensor[1]}
    return {public: tensor}


_RENAMED = (
    ("embed.", "model.embed_tokens."),
    ("head.", "lm_head."),
    ("norm.", "model.norm."),
    ("blocks.", "model.layers."),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attn.", ".self_attn."),
    (".kv_a_proj.", ".kv_a_proj_with_mqa."),
    ("_a_norm.", "_a_layernorm."),
    (".router.weight", ".gate.weight"),
    (".router.bias", ".gate.e_score_correction_bias"),
    (".experts.gate_up", ".experts.gate_up_proj"),
    (".experts.down", ".experts.down_proj"),
    (".down.", ".down_proj."),
    (".shared.", ".shared_experts."),
    (".ffn.", ".mlp."),
)


def _public_name(name: str) -> str:
    for ours, theirs in _RENAMED:
        if name.startswith(ours) or (ours[0] in "._" and ours in name):
            name = name.replace(ours, theirs, 1)
    return name
